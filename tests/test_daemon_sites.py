"""Real sites on real servers, from one table: Django on gunicorn, Flask on uWSGI, Flask on the built-in server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, User, free_port, wait_until
from tests.sites.django_site import django_site

SITES = Path(__file__).parent / "sites"
NAMES = ("django", "flask", "builtin:1", "builtin:2")


def table(folder: Path, ports: dict[str, int], more: str = "") -> str:
    """The three sites; `more` are lines for each program."""
    return f"""
        [listener.django]
        bind = "127.0.0.1:{ports["django"]}"

        [program.django]
        server = "gunicorn"
        app = "djsite.wsgi:application"
        listen = "django"
        workers = 2
        directory = "{folder}"
        environment = {{ DJANGO_SETTINGS_MODULE = "djsite.settings" }}
        groups = ["sites"]

        [program.flask]
        server = "uwsgi"
        app = "flask_site:app"
        listen = "127.0.0.1:{ports["flask"]}"
        workers = 2
        directory = "{SITES}"
        groups = ["sites"]

        [program.builtin]
        server = "wsgi"
        app = "flask_site:app"
        listen = "127.0.0.1:{ports["builtin"]}"
        workers = 2
        threads = 2
        directory = "{SITES}"
        groups = ["sites"]
        {more}
        """


def get(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
    return text


@pytest.fixture
def ports() -> dict[str, int]:
    return {name: free_port() for name in ("django", "flask", "builtin")}


@pytest.fixture
def sites(daemon: MakeDaemon, tmp_path: Path, ports: dict[str, int]) -> RunningDaemon:
    folder = django_site(tmp_path)
    running = daemon(table(folder, ports))
    for name in NAMES:
        running.wait_for(name, timeout=30)
    return running


def test_three_sites_run_side_by_side(sites: RunningDaemon, ports: dict[str, int]) -> None:
    for port in ports.values():
        assert get(port)
    shown = sites.ctl("status").stdout
    for name in NAMES:
        assert any(line.startswith(name) and "RUNNING" in line for line in shown.splitlines()), shown


def test_each_is_restarted_after_kill_9(sites: RunningDaemon, ports: dict[str, int]) -> None:
    before = sites.status()
    for name in NAMES:
        os.kill(before[name]["pid"], signal.SIGKILL)

    def all_new() -> bool:
        now = sites.status()
        for name in NAMES:
            assert now[name]["state"] == "RUNNING", now[name]
            assert now[name]["pid"] != before[name]["pid"]
            assert now[name]["exit"]["signal"] == "SIGKILL"
        return True

    wait_until(all_new, 30)
    for port in ports.values():
        assert get(port)


def test_stop_leaves_nothing_and_says_so(sites: RunningDaemon, ports: dict[str, int]) -> None:
    sites.look()
    children = {seen for seen in sites.seen if seen.pid not in (sites.keeper_pid, sites.supervisor_pid)}
    assert len(children) >= 8  # gunicorn and uWSGI with two workers each, two built-in servers
    done = sites.ctl("stop", "sites")
    assert done.returncode == 0, done.stderr
    assert not [seen for seen in children if seen.alive()]
    shown = sites.ctl("status", "sites")
    assert shown.returncode == 3
    assert shown.stdout.count("STOPPED") == 4


def test_the_supervisor_dies_and_no_request_fails(sites: RunningDaemon, ports: dict[str, int]) -> None:
    pids = {name: sites.status()[name]["pid"] for name in NAMES}
    os.kill(sites.supervisor_pid, signal.SIGKILL)
    for port in ports.values():
        assert get(port)
    wait_until(sites.answers)
    assert {name: sites.status()[name]["pid"] for name in NAMES} == pids


def test_a_restart_waits_until_it_serves(sites: RunningDaemon, ports: dict[str, int]) -> None:
    before = sites.status()
    done = sites.ctl("restart", "sites")
    assert done.returncode == 0, done.stderr
    after = sites.status()
    for name in NAMES:
        assert after[name]["pid"] != before[name]["pid"]
        assert after[name]["state"] == "RUNNING"
    for port in ports.values():
        assert get(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a program as another user")
def test_gunicorn_of_another_user_becomes_ready(daemon: MakeDaemon, as_user: User) -> None:
    """Its control socket lies in a folder that the daemon makes for it, since the runtime folder is root's."""
    subprocess.run([as_user.python, "-m", "venv", "--without-pip", as_user.root / "venv"], check=True, timeout=60)
    for name in ("gunicorn", "packaging"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, as_user.root / "apps" / name)
    app = "def app(environ, start):\n    start('200 OK', [])\n    return [str(__import__('os').getuid()).encode()]\n"
    (as_user.root / "apps" / "uid_site.py").write_text(app)
    for path in (as_user.root / "apps").rglob("*"):
        path.chmod(0o755)
    port = free_port()
    running = daemon(
        f"""
        [program.site]
        server = "gunicorn"
        app = "uid_site:app"
        listen = "127.0.0.1:{port}"
        user = "{as_user.name}"
        virtualenv = "{as_user.root}/venv"
        directory = "{as_user.root}/apps"
        environment = {{ PYTHONPATH = "{as_user.root}/apps" }}
        """,
        start=False,
    )
    running.folder.chmod(0o755)
    running.start()
    running.wait_for("site", timeout=20)
    assert get(port) == str(as_user.uid)
    workers = running.json("status", "-v")[0]["workers"]
    assert workers["problem"] is None
    assert workers["list"][0]["memory_bytes"] > 0

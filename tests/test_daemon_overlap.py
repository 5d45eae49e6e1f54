"""Reload by overlap: a successor takes over while the one before serves, and nobody who asks notices."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until

SITE = '''
import os, sys, time
FOLDER = os.environ["SITE_FOLDER"]
VERSION = open(f"{FOLDER}/version").read().strip()
open(f"{FOLDER}/has-read.{os.getpid()}", "w").close()
if VERSION.startswith("bad"):
    raise RuntimeError(f"release {VERSION} is bad")
while os.path.exists(f"{FOLDER}/gate"):
    time.sleep(0.01)
def app(environ, start_response):
    if VERSION.startswith("dies") and environ["PATH_INFO"] != "/probe":
        print("this release dies", file=sys.stderr, flush=True)
        os._exit(9)
    body = f"{VERSION} {os.getpid()}".encode()
    status = "503 Service Unavailable" if VERSION.startswith("fails") else "200 OK"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
'''


class Site:
    """The site of these tests: `version` is what it answers with its next start; `gate` keeps that start waiting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "release.py").write_text(SITE)
        self.version("one")

    def version(self, text: str) -> None:
        (self.folder / "version").write_text(text)

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        (self.folder / "gate").touch()
        try:
            yield
        finally:
            (self.folder / "gate").unlink(missing_ok=True)


def ask(address: Any, path: str = "/") -> str:
    """What the site answers to one request over a new connection: its version."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(20)
        sock.connect(address)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")), answer
    return body.decode().split()[0]


def started(daemon: MakeDaemon, tmp_path: Path, lines: str, **options: Any) -> tuple[RunningDaemon, Site]:
    """A daemon with the program `web`, which `lines` describe, and its site."""
    site = Site(tmp_path / "site")
    environment = f'{{ SITE_FOLDER = "{site.folder}" }}'
    table = f'[program.web]\ndirectory = "{site.folder}"\nenvironment = {environment}\n{lines}'
    running = daemon(table, **options)
    for name in running.status():
        running.wait_for(name, timeout=30)
    return running, site


def settled(running: RunningDaemon, before: int = 0) -> dict[str, Any]:
    """The ProcessInfo of `web`, when nobody is beside it any more, and its pid is not `before`; else nothing."""
    info = running.status()["web"]
    return info if info["beside"] is None and info["pid"] not in (None, before) else {}


def addresses(tmp_path: Path) -> list[tuple[str, Any]]:
    port, port6 = free_port(), free_port()
    path = f"/tmp/{tmp_path.name[-20:]}-{os.getpid()}.sock"
    return [(f"127.0.0.1:{port}", ("127.0.0.1", port)), (f"[::1]:{port6}", ("::1", port6)), (f"unix:{path}", path)]


SERVERS = {
    "wsgi": 'server = "wsgi"\napp = "release:app"',
    "gunicorn": 'server = "gunicorn"\napp = "release:app"',
    "uwsgi": 'server = "uwsgi"\napp = "release:app"',
    "uwsgi lazy": 'server = "uwsgi"\napp = "release:app"\nserver_options = { lazy-apps = true }',
    "command": """
        command = ["${PYTHON}", "-m", "procman.wsgi", "release:app"]
        ready = { http = "/probe" }
    """,
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["IPv4", "IPv6", "unix"])
def test_a_successor_takes_over(daemon: MakeDaemon, tmp_path: Path, server: str, kind: int) -> None:
    """Again and again; nobody sees the new version before it is ready, and all see it afterwards."""
    if kind == 1 and server not in ("wsgi", "command"):
        pytest.skip("the kernel's part is the same for all servers")
    listen, address = addresses(tmp_path)[kind]
    running, site = started(daemon, tmp_path, f'{SERVERS[server]}\nlisten = "{listen}"\nstart_seconds = 0.2')
    for old, new in (("one", "two"), ("two", "three")):
        replaced(running, site, address, old, new)
    if isinstance(address, str):
        assert running.stop() == 0
        assert not Path(address).exists()
        assert not Path(f"{address}~").exists()


def replaced(running: RunningDaemon, site: Site, address: Any, old: str, new: str) -> None:
    """A reload from version `old` to `new`, looked at in the trial and afterwards."""
    before = running.status()["web"]["pid"]
    site.version(new)
    with site.gate(), running.client(60) as client:
        assert client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web"]["beside"] or {}).get("pid"))
        for _ in range(20):
            assert ask(address) == old
        assert running.status()["web"]["pid"] == before
    wait_until(lambda: ask(address) == new, 30)
    info = wait_until(lambda: settled(running, before), 30)
    assert info["state"] == "RUNNING", info
    assert not Path(f"/proc/{before}").exists()
    assert ask(address) == new


@pytest.mark.parametrize("server", ["wsgi", "gunicorn", "uwsgi"])
def test_a_bad_release_is_rolled_back(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """Reason and last output are shown; the one before has never stopped serving."""
    listen, address = addresses(tmp_path)[0]
    running, site = started(daemon, tmp_path, f'{SERVERS[server]}\nlisten = "{listen}"\nstart_timeout = "20s"')
    before = running.status()["web"]["pid"]
    site.version("bad 1")
    done = running.ctl("reload", "web")
    assert done.returncode == 1
    assert "the successor failed" in done.stderr, done.stderr
    assert f"rolled back, pid {before} serves as before" in done.stderr
    assert "release bad 1 is bad" in done.stderr
    info = running.status()["web"]
    assert (info["pid"], info["state"], info["beside"], info["restarts"]) == (before, "RUNNING", None, 0)
    assert ask(address) == "one"
    site.version("two")
    done = running.ctl("reload", "web")
    assert done.returncode == 0, done.stderr
    assert ask(address) == "two"


BAD = {
    "a syntax error": ("def app(:", "SyntaxError"),
    "an import error": ("import nothing_of_this_name", "ModuleNotFoundError"),
    "no such callable": ("application = None", "app"),
    "a wrong setting": ("import sys\nsys.exit('DATABASE_URL is missing')", "DATABASE_URL is missing"),
    "a port that is taken": (
        "import os, socket\nsocket.create_server(('127.0.0.1', int(os.environ['TAKEN'])))",
        "in use",
    ),
    "a crash": ("import os\nprint('going down', flush=True)\nos.kill(os.getpid(), 11)", "going down"),
    "an end within start_seconds": (
        f"{SITE}\nimport threading\nthreading.Timer(0.3, lambda: (print('late', flush=True), os._exit(5))).start()",
        "late",
    ),
}


def test_whatever_is_wrong_with_a_release(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Each bad release is rolled back with its reason, and its last output; somebody asks all the time."""
    listen, address = addresses(tmp_path)[0]
    port = address[1]
    environment = f'environment = {{ SITE_FOLDER = "{tmp_path}/site", TAKEN = "{port}" }}'
    lines = f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 1\nready = {{ notify = true }}'
    site = Site(tmp_path / "site")
    running = daemon(f'[program.web]\ndirectory = "{site.folder}"\n{environment}\n{lines}')
    before = running.wait_for("web", timeout=30)["pid"]
    for what, (code, said) in BAD.items():
        (site.folder / "release.py").write_text(code)
        done = running.ctl("reload", "web")
        assert done.returncode == 1, what
        assert "the successor failed" in done.stderr or "the successor did not stay up" in done.stderr, what
        assert said in done.stderr, (what, done.stderr)
        info = running.status()["web"]
        assert (info["pid"], info["state"], info["beside"]) == (before, "RUNNING", None), what
        assert ask(address) == "one", what


def test_a_successor_that_never_gets_ready(daemon: MakeDaemon, tmp_path: Path) -> None:
    listen, address = addresses(tmp_path)[0]
    lines = f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nready = {{ http = "/nothing" }}\nstart_timeout = "2s"'
    site = Site(tmp_path / "site")
    table = f'[program.web]\ndirectory = "{site.folder}"\nenvironment = {{ SITE_FOLDER = "{site.folder}" }}\n{lines}'
    running = daemon(table.replace('{ http = "/nothing" }', '{ http = "/probe" }'))
    before = running.wait_for("web", timeout=30)["pid"]
    with site.gate():
        done = running.ctl("reload", "web")
    assert done.returncode == 1
    assert "not ready within 2 s" in done.stderr
    assert running.status()["web"]["pid"] == before
    assert ask(address) == "one"


def test_one_that_dies_after_it_was_ready(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Within start_seconds: no visitor has met it."""
    listen, address = addresses(tmp_path)[0]
    lines = f"""
        command = ["${{PYTHON}}", "-c", "import os, sys, time; exec(open('late.py').read())"]
        listen = "{listen}"
        ready = {{ log = "serving" }}
        start_seconds = 5
    """
    late = 'os.execv(sys.executable, [sys.executable, "-m", "procman.wsgi", "release:app"])'
    site = Site(tmp_path / "site")
    (site.folder / "late.py").write_text(late)
    table = f'[program.web]\ndirectory = "{site.folder}"\nenvironment = {{ SITE_FOLDER = "{site.folder}" }}\n{lines}'
    running = daemon(table)
    before = running.wait_for("web", timeout=30)["pid"]
    (site.folder / "late.py").write_text("print('serving', flush=True)\ntime.sleep(1)\nsys.exit('out of luck')")
    done = running.ctl("reload", "web")
    assert done.returncode == 1
    assert "did not stay up: " in done.stderr
    assert "out of luck" in done.stderr
    assert running.status()["web"]["pid"] == before
    assert ask(address) == "one"


def test_output_is_counted_over_all_children(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Each has a pipe of its own; the account goes on, also when the supervisor is killed."""
    listen, address = addresses(tmp_path)[0]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0')

    def counted() -> tuple[int, int]:
        (shown,) = running.json("show", "web")["log"]
        return shown["written"], shown["dropped"]

    for version in ("two", "three"):
        ask(address)
        site.version(version)
        assert running.ctl("reload", "web").returncode == 0
        wait_until(lambda: counted() == (len(running.log("web")), 0))
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: counted() == (len(running.log("web")), 0))


def test_nothing_piles_up(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Descriptors of keeper and supervisor after some reloads, good and bad, are those of before."""
    listen, _ = addresses(tmp_path)[2]
    running, site = started(daemon, tmp_path, f'{SERVERS["gunicorn"]}\nlisten = "{listen}"\nstart_seconds = 0')

    def open_files() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{running.keeper_pid}/fd")), len(os.listdir(f"/proc/{running.supervisor_pid}/fd"))

    assert running.ctl("reload", "web").returncode == 0
    before = wait_until(open_files)
    files = sorted(path.name for path in running.folder.rglob("*"))
    for version in ("bad", "three", "bad", "four"):
        site.version(version)
        assert running.ctl("reload", "web").returncode == (version == "bad")
    wait_until(lambda: open_files() == before, what=f"{open_files()} as {before}")
    assert sorted(path.name for path in running.folder.rglob("*")) == files


def test_several_workers(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Several processes of one program: never fewer than before serve, and the first failure ends it for all."""
    listen, address = addresses(tmp_path)[0]
    lines = f'{SERVERS["wsgi"]}\nworkers = 3\nlisten = "{listen}"\nstart_seconds = 0'
    running, site = started(daemon, tmp_path, lines)
    names = ["web:1", "web:2", "web:3"]
    before = {name: running.status()[name]["pid"] for name in names}
    site.version("two")
    seen: list[int] = []
    with running.client(60) as client:
        client.stream(
            "reload",
            lambda method, params: seen.append(
                sum(info["state"] == "RUNNING" for info in running.status().values())
            ),
            names=["web"],
        )
    assert seen
    assert min(seen) == 3
    after = {name: running.status()[name]["pid"] for name in names}
    assert not set(before.values()) & set(after.values())
    assert {ask(address) for _ in range(20)} == {"two"}
    site.version("bad 2")
    done = running.ctl("reload", "web", "--at-once", "2")
    assert done.returncode == 1
    assert "web:1, web:2, web:3: the successor failed: " in done.stderr
    assert {name: running.status()[name]["pid"] for name in names} == after


@pytest.mark.parametrize("listen", range(2), ids=["tcp", "unix"])
def test_nobody_meets_a_bad_release_of_several_workers(daemon: MakeDaemon, tmp_path: Path, listen: int) -> None:
    """Its probe asks the successor, and not those that serve; and no visitor is led to it."""
    where, address = (addresses(tmp_path)[0], addresses(tmp_path)[-1])[listen]
    more = 'ready = { http = "/" }\nstart_timeout = "3s"\nstart_seconds = 0.5'
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nworkers = 2\nlisten = "{where}"\n{more}')
    before = {name: info["pid"] for name, info in running.status().items()}
    # Where several have one socket, a probe is answered by the first that serves.
    wait_until(lambda: all((site.folder / f"has-read.{pid}").exists() for pid in before.values()))
    site.version("fails")
    answers: list[str] = []
    with running.client(60) as client:
        client.call("reload", names=["web"], wait=False)
        wait_until(lambda: running.status()["web:1"]["beside"])
        while any(info["beside"] for info in running.status().values()):
            answers.append(ask(address))
    assert len(answers) > 3
    assert set(answers) == {"one"}
    assert {name: info["pid"] for name, info in running.status().items()} == before


def test_several_that_share_a_socket_pass_on_together(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A server of which procman does not know that it drops nothing."""
    listen, address = addresses(tmp_path)[0]
    lines = f'{SERVERS["command"]}\ninstances = 2\nlisten = "{listen}"\nstart_seconds = 0'
    running, site = started(daemon, tmp_path, lines)
    before = {info["pid"] for info in running.status().values()}
    site.version("two")
    done = running.ctl("reload", "web")
    assert done.returncode == 0, done.stderr
    assert not before & {info["pid"] for info in running.status().values()}
    assert {ask(address) for _ in range(20)} == {"two"}


def test_a_second_reload_is_refused_and_a_stop_wins(daemon: MakeDaemon, tmp_path: Path) -> None:
    listen, _ = addresses(tmp_path)[0]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"')
    with site.gate(), running.client(60) as client:
        client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web"]["beside"] or {}).get("pid"))
        running.look()
        second = running.ctl("reload", "web")
        assert second.returncode == 1
        assert "a reload of web is under way already" in second.stderr
        assert "successor" in running.ctl("status").stdout
        done = running.ctl("stop", "web")
        assert done.returncode == 0, done.stderr
        info = running.status()["web"]
        assert (info["state"], info["beside"]) == ("STOPPED", None)
        assert [left.pid for left in running.leftovers() if "procman.wsgi" in cmdline(left.pid)] == []
    done = running.ctl("start", "web")
    assert done.returncode == 0, done.stderr


def cmdline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


HALF_OPEN = """
import os, socket
with socket.socket(fileno=os.dup(3)) as listener:
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
"""


@pytest.mark.parametrize("comes", [True, False], ids=["comes", "never comes"])
def test_who_is_still_connecting_is_waited_for(daemon: MakeDaemon, tmp_path: Path, comes: bool) -> None:
    """To the old socket, with a packet lost: it would be reset when that closes. (Here the kernel does not hear the end
    of the handshake before the first bytes.) It is waited for a while, and not for ever."""
    (listen, address), *_ = addresses(tmp_path)
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0.2')
    (site.folder / "release.py").write_text(HALF_OPEN + SITE)
    running.ctl("restart", "web")
    before = settled(running)["pid"]
    with socket.create_connection(address, timeout=20) as slow:
        site.version("two")
        with running.client(60) as client:
            client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web"]["beside"] or {}).get("role") == "the one before", 30)
        if comes:
            with contextlib.suppress(AssertionError):
                wait_until(lambda: settled(running, before), 2.5)  # too soon
            slow.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            assert slow.makefile("rb").read().endswith(f"one {before}".encode())
        wait_until(lambda: settled(running, before), 20)
    assert ask(address) == "two"


def test_somebody_has_an_old_socket(daemon: MakeDaemon, tmp_path: Path) -> None:
    """What `kill = "main"` has left behind may have a socket that nobody accepts from: it would get connections."""
    listen, address = addresses(tmp_path)[0]
    left = tmp_path / "left"
    serve = f"sleep 1000 & echo $! >>{left}; exec ${{PYTHON}} -m procman.wsgi release:app"
    command = f'command = ["sh", "-c", "{serve}"]\nkill = "main"\nready = {{ notify = true }}\nstart_seconds = 0'
    running, site = started(daemon, tmp_path, f'{command}\nlisten = "{listen}"')
    try:
        site.version("two")
        done = running.ctl("reload", "web")
        assert done.returncode == 0, done.stderr
        pid = running.status()["web"]["pid"]
        site.version("three")
        done = running.ctl("reload", "web")
        assert done.returncode == 1
        first = left.read_text().split()[0]
        said = f"pid {first} (sleep 1000) has a socket at {listen} that it was given before"
        assert said in done.stderr, done.stderr
        assert settled(running)["pid"] == pid
        assert {ask(address) for _ in range(20)} == {"two"}
        os.kill(int(first), signal.SIGKILL)
        for version in ("three", "four"):
            site.version(version)
            done = running.ctl("reload", "web")
            assert (done.returncode, {ask(address) for _ in range(20)}) == (0, {version}), done.stderr
            os.kill(int(left.read_text().split()[1 + (version == "four")]), signal.SIGKILL)
    finally:
        running.ctl("stop", "web")
        for word in left.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)


def test_old_processes_are_replaced(daemon: MakeDaemon, tmp_path: Path) -> None:
    """max_age, with a listener: as a reload."""
    listen, address = addresses(tmp_path)[0]
    lines = f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0.1\nmax_age = "3s"'
    running, site = started(daemon, tmp_path, lines)
    before = running.status()["web"]["pid"]
    site.version("two")
    info = wait_until(lambda: settled(running, before), 30)
    assert info["why"] == "max_age = 3 s"
    assert ask(address) == "two"
    assert info["restarts"] == 0


def test_old_processes_that_share_a_socket_are_replaced_together(daemon: MakeDaemon, tmp_path: Path) -> None:
    """No request is lost, of a server that would drop some at its stop; and each goes once."""
    listen, address = addresses(tmp_path)[0]
    lines = f'{SERVERS["command"]}\ninstances = 2\nlisten = "{listen}"\nstart_seconds = 0.1\nmax_age = "4s"'
    running, site = started(daemon, tmp_path, lines)
    before = {info["pid"] for info in running.status().values()}

    def renewed() -> bool:
        assert ask(address) in ("one", "two")
        infos = running.status().values()
        return not before & {info["pid"] for info in infos} and not any(info["beside"] for info in infos)

    site.version("two")
    wait_until(renewed, 30)
    assert {info["why"] for info in running.status().values()} == {"max_age = 4 s"}
    assert "under way already" not in running.said()


def test_a_probe_of_one_port_by_ipv4_and_ipv6_asks_the_successor(daemon: MakeDaemon, tmp_path: Path) -> None:
    port = free_port()
    listen = f'["127.0.0.1:{port}", "[::1]:{port}"]'
    more = f'ready = {{ http = "http://[::1]:{port}/" }}\nstart_timeout = "2s"'
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = {listen}\n{more}')
    site.version("fails")
    done = running.ctl("reload", "web")
    assert done.returncode == 1
    assert "HTTP 503" in done.stderr
    assert {ask(("127.0.0.1", port)), ask(("::1", port))} == {"one"}


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_restarts_in_a_reload_goes_one_after_the_other(daemon: MakeDaemon, at_once: int) -> None:
    running = daemon('[program.web]\ncommand = "sleep 1000"\ninstances = 4\nstart_seconds = 0.1\n')
    for number in range(1, 5):
        running.wait_for(f"web:{number}")
    before = {info["pid"] for info in running.status().values()}
    down: list[int] = []

    def look(method: str, params: Any) -> None:
        down.append(sum(info["state"] != "RUNNING" for info in running.status().values()))

    with running.client(60) as client:
        client.stream("reload", look, names=["web"], at_once=at_once)
    assert 0 < max(down) <= at_once
    assert not before & {info["pid"] for info in running.status().values()}


def test_a_stop_of_one_that_shares_the_socket_ends_the_reload_of_all(daemon: MakeDaemon, tmp_path: Path) -> None:
    """None of them is replaced, and who was stopped stays so."""
    listen, _ = addresses(tmp_path)[0]
    lines = f'{SERVERS["wsgi"]}\nworkers = 3\nlisten = "{listen}"\nstart_seconds = 0'
    running, site = started(daemon, tmp_path, lines)
    before = {name: info["pid"] for name, info in running.status().items()}
    with site.gate(), running.client(60) as client:
        client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web:1"]["beside"] or {}).get("pid"))
        assert running.ctl("stop", "web:2").returncode == 0
    wait_until(lambda: all(info["beside"] is None for info in running.status().values()))
    wait_until(lambda: "web:1: rolled back: something else was asked for meanwhile" in running.said())
    status = running.status()
    assert {name: info["pid"] for name, info in status.items()} == before | {"web:2": None}
    assert (status["web:2"]["state"], status["web:2"]["wanted"]) == ("STOPPED", "down")


def test_who_is_stopped_before_its_turn_is_left_out(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A reload of several that share nothing goes from one to the next: the others are replaced."""
    gate = tmp_path / "gate"
    script = f"while test -e {gate}; do sleep 0.02; done; echo serves; exec sleep 1000"
    running = daemon(f"""
        [program.job]
        command = ["sh", "-c", "{script}"]
        instances = 3
        reload = "overlap"
        ready = {{ log = "serves" }}
        start_seconds = 0
    """)
    for name in ("job:1", "job:2", "job:3"):
        running.wait_for(name)
    before = {name: info["pid"] for name, info in running.status().items()}
    gate.touch()
    with running.client(60) as client:
        client.call("reload", names=["job"], wait=False)
        wait_until(lambda: (running.status()["job:1"]["beside"] or {}).get("pid"))
        assert running.ctl("stop", "job:2").returncode == 0
        gate.unlink()

    def others() -> bool:
        status = running.status()
        return all(status[name]["pid"] != before[name] and not status[name]["beside"] for name in ("job:1", "job:3"))

    wait_until(others, 20)
    info = running.status()["job:2"]
    assert (info["state"], info["wanted"]) == ("STOPPED", "down")


# --- whoever dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 2], ids=["TCP", "unix"])
def test_the_supervisor_dies_in_a_trial(daemon: MakeDaemon, tmp_path: Path, kind: int) -> None:
    """The successor goes, and whoever asked for it asks again."""
    listen, address = addresses(tmp_path)[kind]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0.2')
    before = running.status()["web"]["pid"]
    site.version("two")
    with site.gate():
        with running.client(60) as client:
            client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web"]["beside"] or {}).get("pid"))
        os.kill(running.supervisor_pid, signal.SIGKILL)
        info = wait_until(lambda: settled(running), 30)
        assert info["pid"] == before
    assert {ask(address) for _ in range(10)} == {"one"}
    assert "rolled back: the supervisor was replaced during its trial" in running.said()
    done = running.ctl("reload", "web")
    assert done.returncode == 0, done.stderr
    assert {ask(address) for _ in range(10)} == {"two"}


@pytest.mark.parametrize("kind", [0, 2], ids=["TCP", "unix"])
def test_the_supervisor_dies_when_the_successor_serves(daemon: MakeDaemon, tmp_path: Path, kind: int) -> None:
    """It goes on to the end, and the command that waits says so."""
    listen, address = addresses(tmp_path)[kind]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0')
    before = running.status()["web"]["pid"]
    for version in ("two", "three"):
        site.version(version)
        with running.client(60) as client:
            client.call("reload", names=["web"], wait=False)
        wait_until(lambda: (running.status()["web"]["beside"] or {}).get("role") == "the one before", 30)
        os.kill(running.supervisor_pid, signal.SIGKILL)
        assert ask(address) == version
        info = wait_until(lambda: settled(running), 30)
        assert info["pid"] != before
        assert info["state"] == "RUNNING"
        before = info["pid"]
        assert {ask(address) for _ in range(10)} == {version}


def test_a_command_that_waits_outlives_the_supervisor(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Killed again and again at any moment of it: `procmanctl reload` ends with the new version."""
    listen, address = addresses(tmp_path)[0]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0.1')
    for number in range(6):
        site.version(f"v{number}")
        with running.client(60) as client:
            client.call("reload", names=["web"], wait=False)
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > number * 0.15)  # noqa: B023
        os.kill(running.supervisor_pid, signal.SIGKILL)
        done = running.ctl("reload", "web")
        assert done.returncode == 0, (number, done.stderr)
        assert ask(address) == f"v{number}"


def test_the_keeper_dies_in_a_trial(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next daemon keeps the one that serves, and ends the other."""
    listen, address = addresses(tmp_path)[0]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0.2')
    before = running.status()["web"]["pid"]
    site.version("two")
    with site.gate():
        with running.client(60) as client:
            client.call("reload", names=["web"], wait=False)
        beside = wait_until(lambda: (running.status()["web"]["beside"] or {}).get("pid"))
        running.look()
        os.kill(running.keeper_pid, signal.SIGKILL)
        assert running.process is not None
        running.process.wait(10)
        wait_until(lambda: not any(SUPERVISOR in cmdline(seen.pid) for seen in running.seen))
        running.start()
        info = running.wait_for("web", timeout=30)
        assert info["pid"] == before
        wait_until(lambda: not Path(f"/proc/{beside}").exists())
    assert {ask(address) for _ in range(10)} == {"one"}
    done = running.ctl("reload", "web")
    assert done.returncode == 0, done.stderr
    assert {ask(address) for _ in range(10)} == {"two"}


def test_the_keeper_dies_after_a_reload(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next daemon knows the child in its other place: nothing restarts, and its listener is held again."""
    listen, address = addresses(tmp_path)[2]
    running, site = started(daemon, tmp_path, f'{SERVERS["wsgi"]}\nlisten = "{listen}"\nstart_seconds = 0')
    site.version("two")
    assert running.ctl("reload", "web").returncode == 0
    before = running.status()["web"]["pid"]
    wait_until(lambda: str(before) in (running.folder / "state" / "state.json").read_text())
    running.look()
    os.kill(running.keeper_pid, signal.SIGKILL)
    assert running.process is not None
    running.process.wait(10)
    wait_until(lambda: not any(SUPERVISOR in cmdline(seen.pid) for seen in running.seen))
    running.start()
    info = running.wait_for("web", timeout=30)
    assert info["pid"] == before
    assert "the table has changed" not in running.said()
    assert ask(address) == "two"
    site.version("three")
    assert running.ctl("reload", "web").returncode == 0
    assert ask(address) == "three"


SUPERVISOR = "procman.daemon\0supervisor"

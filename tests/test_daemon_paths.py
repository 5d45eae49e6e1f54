"""The files of Unix listeners: removed, replaced or changed while the daemon holds the socket."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until
from tests.test_daemon_overlap import Site, ask


@contextlib.contextmanager
def short_path(tmp_path: Path) -> Iterator[str]:
    """A path for a socket, in a folder of its own."""
    folder = Path(f"/tmp/{tmp_path.name[-20:]}-{os.getpid()}")
    folder.mkdir()
    try:
        yield f"{folder}/web.sock"
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with short_path(tmp_path) as found:
        yield found


def table(site: Site, path: str, listener: str = "", keys: str = "") -> str:
    return f"""
        [listener.web]
        bind = "unix:{path}"
        {listener}
        [program.web]
        server = "wsgi"
        app = "release:app"
        directory = "{site.folder}"
        listen = "web"
        environment = {{ SITE_FOLDER = "{site.folder}" }}
        start_seconds = 0.1
        {keys}
    """


def serving(daemon: MakeDaemon, tmp_path: Path, path: str, listener: str = "", keys: str = "") -> RunningDaemon:
    running = daemon(table(Site(tmp_path / "site"), path, listener, keys))
    running.wait_for("web", timeout=30)
    return running


def problems(running: RunningDaemon) -> str:
    return "\n".join(running.json("daemon", "status")["problems"])


def names(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


@pytest.mark.parametrize("mends", [("reload",), ("restart",), ("stop", "start")])
def test_a_file_that_was_removed(daemon: MakeDaemon, tmp_path: Path, path: str, mends: tuple[str, ...]) -> None:
    """By who cleans /tmp, say. That is told, also by the next supervisor, and whatever starts a process mends it."""
    running = serving(daemon, tmp_path, path)
    assert problems(running) == ""
    os.unlink(path)
    assert f"unix:{path}: its file is gone" in problems(running)
    before = running.supervisor_pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.answers() and running.supervisor_pid != before)
    assert f"unix:{path}: its file is gone" in problems(running)
    for verb in mends:
        assert running.ctl(verb, "web").returncode == 0
    assert ask(path).startswith("one")
    assert problems(running) == ""
    assert names(path) == ["web.sock"]
    assert running.ctl("reload", "web").returncode == 0
    assert (ask(path)[:3], names(path)) == ("one", ["web.sock"])


def test_a_file_that_was_removed_and_a_bad_release(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    """Nobody comes to the release, and no file of it stays."""
    running = serving(daemon, tmp_path, path)
    os.unlink(path)
    (tmp_path / "site" / "version").write_text("bad")
    assert running.ctl("reload", "web").returncode == 1
    assert names(path) == []
    assert "its file is gone" in problems(running)
    (tmp_path / "site" / "version").write_text("two")
    assert running.ctl("reload", "web").returncode == 0
    assert ask(path).startswith("two")


def test_a_file_of_somebody_else(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    """It is told and left alone; once nobody listens there, the path is ours again."""
    running = serving(daemon, tmp_path, path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        made = os.stat(path).st_ino
        assert f"unix:{path}: another file is there" in problems(running)
        ran = running.ctl("reload", "web")
        assert (ran.returncode, f"unix:{path} is in use by pid {os.getpid()}" in ran.stderr) == (1, True)
        assert running.ctl("restart", "web").returncode == 0
        assert os.stat(path).st_ino == made
    assert running.ctl("reload", "web").returncode == 0
    assert (ask(path)[:3], problems(running), names(path)) == ("one", "", ["web.sock"])


def test_a_file_of_somebody_else_outlives_the_daemon(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    running = serving(daemon, tmp_path, path)
    before = running.supervisor_pid
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: running.answers() and running.supervisor_pid != before)
        assert f"unix:{path}: another file is there" in problems(running)
        running.stop()
        assert names(path) == ["web.sock"]


def test_the_first_connection_finds_a_file(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    """On demand: it is made again when the last process has gone."""
    scale = 'scale = { min = 0, max = 1, idle_timeout = "1s" }'
    running = daemon(table(Site(tmp_path / "site"), path, keys=scale))
    assert ask(path).startswith("one")
    os.unlink(path)
    running.wait_for("web", "STOPPED", timeout=30)
    wait_until(lambda: os.path.exists(path))
    assert ask(path).startswith("one")


def looks(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_mode_and_owner_change_while_it_serves(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    nobody = pwd.getpwnam("nobody")
    site = Site(tmp_path / "site")
    running = serving(daemon, tmp_path, path, 'owner = "nobody:nogroup"\nmode = 0o660')
    assert looks(path) == (0o660, nobody.pw_uid, nobody.pw_gid)
    made, pid = os.stat(path).st_ino, running.status()["web"]["pid"]
    for listener, wanted in (
        ('owner = "nobody:nogroup"\nmode = 0o666', (0o666, nobody.pw_uid, nobody.pw_gid)),
        ("mode = 0o600", (0o600, 0, 0)),
        ('mode = 0o600\nowner = "nobody:nogroup"', (0o600, nobody.pw_uid, nobody.pw_gid)),
    ):
        running.write_table(table(site, path, listener))
        assert running.ctl("apply").returncode == 0
        assert looks(path) == wanted
    assert (os.stat(path).st_ino, running.status()["web"]["pid"], problems(running)) == (made, pid, "")


def test_a_mode_that_cannot_be_changed_is_told(daemon: MakeDaemon, tmp_path: Path, path: str) -> None:
    """Its file is not there: the answer says so, and so do the problems until it is made again."""
    site = Site(tmp_path / "site")
    running = serving(daemon, tmp_path, path)
    os.unlink(path)
    running.write_table(table(site, path, "mode = 0o600"))
    ran = running.ctl("apply")
    assert f"can't change unix:{path}: its file is gone" in ran.stdout + ran.stderr
    assert f"can't change unix:{path}" in problems(running)
    assert running.ctl("reload", "web").returncode == 0
    assert (problems(running), stat.S_IMODE(os.stat(path).st_mode)) == ("", 0o600)

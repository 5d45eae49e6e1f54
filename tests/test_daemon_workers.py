"""What `status -v` and `show` tell of the workers of real servers under real load, of hung ones and of liars."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from procman.config import Address
from procman.queues import queues
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until
from tests.test_daemon_sites import SITES, get

MODULES = {"gunicorn": "gunicorn", "uwsgi": "pyuwsgi", "wsgi": "waitress"}
SERVERS = [
    pytest.param(
        server,
        marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}"),
    )
    for server, module in MODULES.items()
]


def site(server: str, port: int, more: str = "") -> str:
    return f"""
        [program.site]
        server = "{server}"
        app = "flask_site:app"
        listen = "127.0.0.1:{port}"
        directory = "{SITES}"
        {more}
        """


def told(running: RunningDaemon, name: str = "site") -> dict[str, Any]:
    """`workers` of one process."""
    with running.client() as client:
        (info,) = client.call("status", names=[name], workers=True)
    workers: dict[str, Any] = info["workers"]
    return workers


class Held:
    """Requests that are at work, or wait, until they are let go."""

    def __init__(self, folder: Path, port: int, clients: ThreadPoolExecutor) -> None:
        self.folder, self.port, self.clients = folder, port, clients
        self.answers: list[Any] = []

    def more(self, count: int) -> None:
        """So many more."""
        for _ in range(count):
            path = f"/together?n=100&at={self.folder}&mark=m{len(self.answers)}"
            self.answers.append(self.clients.submit(get, self.port, path))

    def at_work(self) -> int:
        """How many the application has in hand."""
        return len(list(self.folder.iterdir()))

    def let_go(self) -> None:
        """All are answered."""
        for number in range(100):
            (self.folder / f"x{number}").touch()
        assert [answer.result() for answer in self.answers] == ["together\n"] * len(self.answers)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def held(tmp_path: Path, port: int) -> Iterator[Held]:
    folder = tmp_path / "held"
    folder.mkdir()
    with ThreadPoolExecutor(8) as clients:
        yield Held(folder, port, clients)


def test_uwsgi_tells_what_its_workers_do(daemon: MakeDaemon, port: int, held: Held) -> None:
    pytest.importorskip("pyuwsgi")
    running = daemon(site("uwsgi", port, "threads = 2"))
    main = running.wait_for("site", timeout=30)["pid"]
    for _ in range(7):
        get(port)

    def settled() -> dict[str, Any]:
        workers = told(running)
        assert workers["problem"] is None
        (worker,) = workers["list"]
        assert (worker["requests"], worker["busy"], worker["in_flight"], worker["threads"]) == (7, False, 0, 2)
        return workers

    workers = wait_until(settled)
    (worker,) = workers["list"]
    assert worker["pid"] != main
    assert 0 < worker["average_seconds"] < 5
    assert worker["memory_bytes"] > 1_000_000
    assert worker["queue"] is worker["heartbeat_seconds"] is None
    assert workers["listen"] == [
        {"name": f"127.0.0.1:{port}", "address": f"127.0.0.1:{port}", "queue": 0, "backlog": 2048}
    ]
    held.more(1)
    wait_until(lambda: [(w["busy"], w["in_flight"]) for w in told(running)["list"]] == [(True, 1)])
    held.more(2)

    def one_waits() -> bool:
        now = told(running)
        return (now["list"][0]["in_flight"], now["listen"][0]["queue"]) == (2, 1)

    wait_until(one_waits)
    held.let_go()
    wait_until(lambda: [(w["busy"], w["requests"]) for w in told(running)["list"]] == [(False, 10)])


def test_the_built_in_server_tells_what_it_does(daemon: MakeDaemon, port: int, held: Held) -> None:
    running = daemon(site("wsgi", port, "threads = 2"))
    main = running.wait_for("site")["pid"]
    for _ in range(7):
        get(port)
    wait_until(lambda: told(running)["list"][0]["requests"] == 7)
    workers = told(running)
    (worker,) = workers["list"]
    assert (workers["problem"], worker["pid"]) == (None, main)
    figures = ("busy", "in_flight", "queue", "threads", "heartbeat_seconds")
    assert [worker[key] for key in figures] == [False, 0, 0, 2, None]
    assert 0 < worker["average_seconds"] < 5
    assert worker["memory_bytes"] > 1_000_000
    held.more(1)
    wait_until(lambda: [(w["busy"], w["in_flight"], w["queue"]) for w in told(running)["list"]] == [(True, 1, 0)])
    held.more(4)
    wait_until(lambda: [(w["in_flight"], w["queue"]) for w in told(running)["list"]] == [(2, 3)])
    held.let_go()
    wait_until(lambda: [(w["busy"], w["requests"]) for w in told(running)["list"]] == [(False, 12)])


def test_gunicorn_tells_its_workers(daemon: MakeDaemon, port: int, held: Held) -> None:
    """It tells no requests and no times, and the kernel who is busy: see docs/servers.md."""
    pytest.importorskip("gunicorn")
    running = daemon(site("gunicorn", port, "workers = 2"))
    main = running.wait_for("site", timeout=30)["pid"]
    wait_until(lambda: all(w["heartbeat_seconds"] is not None for w in told(running)["list"]))
    workers = told(running)
    assert workers["problem"] is None
    pids = [worker["pid"] for worker in workers["list"]]
    assert len(set(pids)) == 2
    assert main not in pids
    for worker in workers["list"]:
        assert worker["memory_bytes"] > 1_000_000
        assert 0 <= worker["heartbeat_seconds"] < 60
        assert worker["requests"] is worker["average_seconds"] is worker["queue"] is None
        assert worker["busy"] is False
    held.more(1)
    wait_until(lambda: held.at_work() == 1)
    assert sorted(worker["busy"] for worker in told(running)["list"]) == [False, True]
    held.more(2)
    wait_until(lambda: held.at_work() == 2)
    wait_until(lambda: told(running)["listen"][0]["queue"] == 1)
    assert [worker["busy"] for worker in told(running)["list"]] == [True, True]
    held.let_go()
    wait_until(lambda: [worker["busy"] for worker in told(running)["list"]] == [False, False])
    assert told(running)["listen"][0]["queue"] == 0


def test_gunicorn_with_threads_is_idle_or_nobody_knows(daemon: MakeDaemon, port: int, held: Held) -> None:
    """A connection that is kept alive between two requests looks the same."""
    pytest.importorskip("gunicorn")
    running = daemon(site("gunicorn", port, "threads = 2"))
    running.wait_for("site", timeout=30)
    assert [worker["busy"] for worker in told(running)["list"]] == [False]
    held.more(1)
    wait_until(lambda: held.at_work() == 1)
    assert [worker["busy"] for worker in told(running)["list"]] == [None]
    held.let_go()


def test_gunicorn_on_a_unix_socket(daemon: MakeDaemon) -> None:
    pytest.importorskip("gunicorn")
    running = daemon(site("gunicorn", 0).replace('"127.0.0.1:0"', '"unix:sock"'))
    running.wait_for("site", timeout=30)
    assert [worker["busy"] for worker in told(running)["list"]] == [False]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{running.folder}/sock")  # a request that never comes keeps a sync worker as well
        wait_until(lambda: [worker["busy"] for worker in told(running)["list"]] == [True])


@pytest.mark.parametrize("server", SERVERS)
def test_a_hung_server_makes_nobody_wait(daemon: MakeDaemon, port: int, server: str) -> None:
    running = daemon(site(server, port) + '[program.other]\ncommand = "sleep 1000"')
    pid = running.wait_for("site", timeout=30)["pid"]
    wait_until(lambda: told(running)["problem"] is None)
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as clients:
            begun = time.monotonic()
            asking = [clients.submit(told, running) for _ in range(8)]
            plain = []
            while not all(each.done() for each in asking):
                before = time.monotonic()
                running.status()
                plain.append(time.monotonic() - before)
            assert time.monotonic() - begun < 5
        assert sorted(plain)[len(plain) // 2] < 0.5  # the loop had nothing to wait for
        for each in asking:
            assert each.result()["problem"] == "no answer within 1 s"
            assert each.result()["list"] == []
        shown = running.ctl("status", "-v")
        assert "  workers: no answer within 1 s\n" in shown.stdout
        assert "  workers: no answer within 1 s\n" in running.ctl("show", "site").stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: told(running)["problem"] is None)


def test_many_who_ask_make_one_connection(daemon: MakeDaemon, port: int) -> None:
    running = daemon(site("wsgi", port))
    pid = running.wait_for("site")["pid"]
    path = f"{running.folder}/site.wsgi/ctl"
    os.kill(pid, signal.SIGSTOP)
    try:
        together = threading.Barrier(8)

        def ask() -> Any:
            with running.client() as client:
                client.call("daemon.status")
                together.wait(10)
                return client.call("status", workers=True)

        with ThreadPoolExecutor(8) as clients:
            for each in [clients.submit(ask) for _ in range(8)]:
                assert each.result()[0]["workers"]["problem"] == "no answer within 1 s"
        (queue,) = queues([Address("unix", path=path)]).values()
        assert queue.waiting <= 2  # a slow one of the eight may come after the first answer
    finally:
        os.kill(pid, signal.SIGCONT)


HOSTILE = [
    (b"\x1b[2J\x1b]0;x\x07", "its answer is no JSON"),
    (b"[" * 200_000, "its answer is no JSON"),
    (b'{"workers": "\x1b[2J"}', "its answer is no JSON"),
    (b'{"workers": {}}', "its answer tells of no workers"),
    (b"x" * (1 << 21), "its answer is too long"),
]


@contextlib.contextmanager
def impostor(path: Path, answer: bytes) -> Iterator[None]:
    """Somebody else answers at `path`."""
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(5)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_server_that_lies(daemon: MakeDaemon, port: int) -> None:
    pytest.importorskip("pyuwsgi")
    running = daemon(site("uwsgi", port))
    running.wait_for("site", timeout=30)
    path = running.folder / "site.uwsgi" / "ctl"
    wait_until(path.is_socket)
    for answer, problem in HOSTILE:
        with impostor(path, answer):
            assert (told(running)["problem"], told(running)["list"]) == (problem, [])
            shown = running.ctl("status", "-v")
            assert shown.returncode == 0
            assert "\x1b" not in shown.stdout
    strange = {"pid": 1, "status": "\x1b[2J", "requests": "\x1b[2J", "avg_rt": -1, "cores": "\x1b", "evil": "\x1b"}
    with impostor(path, json.dumps({"workers": [strange, 7, {"pid": "x"}]}).encode()):
        (worker,) = told(running)["list"]
        assert worker.pop("pid") == 1
        assert set(worker.values()) == {None}  # the memory of a process that is not its own is not told, either
        assert "\x1b" not in running.ctl("status", "-v").stdout


def test_stats_of_the_users_own(daemon: MakeDaemon, port: int) -> None:
    """uWSGI has one such place: who has named it keeps it, and procman asks there too."""
    pytest.importorskip("pyuwsgi")
    stats = free_port()
    options = f'server_options = {{ stats = "127.0.0.1:{stats}", stats-http = true }}'
    running = daemon(site("uwsgi", port, options))
    running.wait_for("site", timeout=30)
    wait_until(lambda: told(running)["problem"] is None)
    assert len(told(running)["list"]) == 1
    assert '"workers"' in get(stats)


@pytest.mark.parametrize("server", SERVERS[:2])
def test_without_a_socket_to_ask_at(daemon: MakeDaemon, port: int, server: str) -> None:
    options = {"gunicorn": "no-control-socket = true", "uwsgi": "stats = false"}[server]
    running = daemon(site(server, port, f"server_options = {{ {options} }}"))
    running.wait_for("site", timeout=30)
    workers = told(running)
    assert workers["problem"].startswith("it has no socket to ask at")
    assert (workers["list"], workers["listen"][0]["queue"]) == ([], 0)


def test_who_has_no_workers(daemon: MakeDaemon, port: int) -> None:
    table = f"""
        [program.plain]
        command = "sleep 1000"

        [program.down]
        server = "wsgi"
        app = "flask_site:app"
        listen = "127.0.0.1:{port}"
        directory = "{SITES}"
        autostart = false

        [program.listens]
        command = "sleep 1000"
        listen = "unix:sock"
        """
    running = daemon(table)
    running.wait_for("listens")
    assert [told(running, name) for name in ("plain", "down")] == [None, None]
    assert "workers" not in running.status()["plain"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{running.folder}/sock")
        workers = told(running, "listens")
    (listener,) = workers.pop("listen")
    assert workers == {"problem": None, "list": [], "left_out": 0}
    assert (listener["address"], listener["queue"]) == (f"unix:{running.folder}/sock", 1)


@pytest.mark.parametrize("server", SERVERS)
def test_its_socket_comes_back_and_goes_with_the_program(daemon: MakeDaemon, port: int, server: str) -> None:
    running = daemon(site(server, port) + '[program.other]\ncommand = "sleep 1000"')
    pid = running.wait_for("site", timeout=30)["pid"]
    wait_until(lambda: told(running)["problem"] is None)
    os.kill(pid, signal.SIGKILL)  # it leaves its socket file
    wait_until(lambda: running.status()["site"]["pid"] not in (None, pid))
    running.wait_for("site", timeout=30)
    wait_until(lambda: told(running)["problem"] is None and told(running)["list"])
    folder = running.folder / f"site.{server}"
    assert folder.stat().st_mode & 0o777 == 0o700
    running.write_table('[program.other]\ncommand = "sleep 1000"')
    running.ctl("daemon", "reread")
    assert not folder.exists()

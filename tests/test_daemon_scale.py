"""Programs whose number of processes goes by load: on demand, more, fewer, by hand, and whoever dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until

SITE = '''
import os, time
FOLDER = os.environ["SITE_FOLDER"]
if os.path.exists(f"{FOLDER}/bad"):
    raise RuntimeError("a bad release")
def app(environ, start_response):
    while environ["PATH_INFO"] == "/slow" and os.path.exists(f"{FOLDER}/gate"):
        time.sleep(0.01)
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
'''

WSGI = 'server = "wsgi"\napp = "site_:app"\nthreads = 1'
COMMAND = """
    command = ["${PYTHON}", "-m", "procman.wsgi", "--threads=1", "--leave-waiting", "site_:app"]
    ready.notify = true
"""
SERVERS = pytest.mark.parametrize("server", [WSGI, COMMAND], ids=["wsgi", "command"])
KINDS = pytest.mark.parametrize("kind", ["tcp", "unix"])


class Shop:
    """The program `shop` of these tests, and those who ask it."""

    def __init__(self, daemon: MakeDaemon, folder: Path, kind: str, lines: str, **options: Any) -> None:
        self.folder = folder / "site"
        self.folder.mkdir()
        (self.folder / "site_.py").write_text(SITE)
        port, path = free_port(), f"/tmp/{folder.name[-20:]}-{os.getpid()}.sock"
        self.address: Any = ("127.0.0.1", port) if kind == "tcp" else path
        listen = f"127.0.0.1:{port}" if kind == "tcp" else f"unix:{path}"
        self.begin = (
            f'[program.shop]\ndirectory = "{self.folder}"\nlisten = "{listen}"\n'
            f'environment = {{ SITE_FOLDER = "{self.folder}" }}\nrestart_delay = "0.2s"\nstart_seconds = 0.1\n'
        )
        self.running: RunningDaemon = daemon(self.begin + lines, **options)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET)
        sock.settimeout(30)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock

    def ask(self, path: str = "/") -> int:
        """The pid that answers."""
        with self.connect() as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return int(answer.partition(b"\r\n\r\n")[2])

    @contextlib.contextmanager
    def slow(self, count: int) -> Iterator[list[Future[int]]]:
        """So many requests that last until the end of this."""
        (self.folder / "gate").touch()
        with ThreadPoolExecutor(count) as threads:
            asked = [threads.submit(self.ask, "/slow") for _ in range(count)]
            try:
                yield asked
            finally:
                (self.folder / "gate").unlink()
            assert all(one.result(30) for one in asked)

    def states(self) -> list[str]:
        return [info["state"] for info in self.running.status().values()]

    def number(self) -> int:
        return int(next(iter(self.running.status().values()))["scale"]["number"])

    def stays(self, number: int, seconds: float) -> None:
        """For so long the number is this one."""
        with pytest.raises(AssertionError, match="the number is another one"):
            wait_until(lambda: self.number() != number, seconds, "the number is another one")

    def up(self, count: int, timeout: float = 20.0) -> None:
        """Waits until `count` run, and the others have stopped."""

        def reached() -> bool:
            states = self.states()
            assert states.count("RUNNING") == count, states
            assert states.count("STOPPED") == len(states) - count, states
            return True

        wait_until(reached, timeout, f"{count} run")
        self.running.look()

    def events(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        with self.running.client() as client:
            client.stream("events", lambda _, event: found.append(event))
        return [event for event in found if event["type"] == kind]


@KINDS
@SERVERS
def test_the_first_connection_starts_it(daemon: MakeDaemon, tmp_path: Path, server: str, kind: str) -> None:
    """It is served; idle_timeout later the program is down again, and the next connection is served too."""
    shop = Shop(daemon, tmp_path, kind, f'{server}\nscale = {{ min = 0, max = 1, idle_timeout = "2s" }}')
    info = shop.running.status()["shop"]
    assert (info["state"], info["wanted"], info["why"]) == ("STOPPED", "down", "scaled down (0 of 1)")
    assert info["scale"] == {"number": 0, "min": 0, "max": 1, "idle": True}
    first = shop.ask()
    assert shop.running.status()["shop"]["pid"] == first
    assert "a connection waits" in shop.running.status()["shop"]["why"]
    shop.up(0)
    assert shop.ask() != first
    assert [(event["before"], event["number"]) for event in shop.events("scale")] == [(0, 1), (1, 0), (0, 1)]
    shop.running.look()


@KINDS
def test_who_is_connected_is_not_idle(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """An open connection keeps it up, and so do short requests that no look has seen."""
    shop = Shop(daemon, tmp_path, kind, f'{WSGI}\nscale = {{ min = 0, max = 1, idle_timeout = "2s" }}')
    with shop.connect() as sock:
        shop.up(1)
        first = shop.ask()
        shop.stays(1, 4.5)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sock.recv(65536)
    for _ in range(3):
        shop.stays(1, 1.5)
        assert shop.ask() == first
    shop.up(0)


@SERVERS
def test_load_adds_processes_up_to_max(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """And when it has gone, so do they."""
    shop = Shop(daemon, tmp_path, "tcp", f'{server}\nscale = {{ max = 3, backlog = 2, idle_timeout = "2s" }}')
    shop.up(1)
    with shop.slow(12):
        shop.up(3)
        shown = shop.running.ctl("status").stdout
        assert "scaled up (3 of 3): " in shown
    assert shop.number() == 3
    shop.up(1)

    def why_down() -> set[str]:
        return {info["why"] for info in shop.running.status().values() if info["state"] == "STOPPED"}

    wait_until(lambda: why_down() == {"scaled down (1 of 3)"})
    numbers = [event["number"] for event in shop.events("scale")]
    assert numbers in ([2, 3, 1], [2, 3, 2, 1])
    assert shop.running.status()["shop:1"]["restarts"] == 0


@KINDS
def test_the_supervisor_dies(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """The number stays, and so does the watch for the first connection."""
    shop = Shop(daemon, tmp_path, kind, f'{WSGI}\nscale = {{ min = 0, max = 3, idle_timeout = "3s" }}')
    running = shop.running
    for _ in range(2):
        os.kill(running.supervisor_pid, signal.SIGKILL)
        asked = shop.ask()  # whether the next one is up or not
        shop.up(1)
        assert shop.running.status()["shop:1"]["pid"] == asked
        assert running.ctl("scale", "shop", "2").returncode == 0
        pids = [info["pid"] for info in running.status().values()]
        os.kill(running.supervisor_pid, signal.SIGKILL)
        wait_until(running.answers)
        assert [info["pid"] for info in running.status().values()] == pids
        assert shop.number() == 2
        shop.up(0)


def test_by_hand(daemon: MakeDaemon, tmp_path: Path) -> None:
    shop = Shop(daemon, tmp_path, "tcp", f'{WSGI}\nscale = {{ min = 1, max = 4, idle_timeout = "4s" }}')
    running = shop.running
    shop.up(1)
    done = running.ctl("scale", "shop", "3")
    assert done.returncode == 0, done.stderr
    assert shop.states() == ["RUNNING"] * 3 + ["STOPPED"]
    assert "scaled down (3 of 4)" in done.stdout
    done = running.ctl("scale", "shop", "2")
    assert done.returncode == 0, done.stderr
    assert shop.states() == ["RUNNING"] * 2 + ["STOPPED"] * 2
    for wrong in ("0", "5"):
        done = running.ctl("scale", "shop", wrong)
        assert done.returncode == 2
        assert f"shop: {wrong} is not between min = 1 and max = 4" in done.stderr
    assert running.ctl("scale", "shop:1", "2").returncode == 2
    assert running.ctl("scale", "nobody", "2").returncode != 0
    shop.up(1)  # by itself, when nobody came


def test_operators(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A stop stays, whoever connects; start, restart and reload are about those that are wanted."""
    shop = Shop(daemon, tmp_path, "tcp", f'{WSGI}\nscale = {{ min = 0, max = 3, idle_timeout = "60s", backlog = 1 }}')
    running = shop.running
    done = running.ctl("reload", "shop")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to reload: scaled down (0 of 3)") == 2
    assert running.ctl("scale", "shop", "0").returncode == 0
    assert running.ctl("restart", "shop").returncode == 0
    assert shop.states() == ["STOPPED"] * 3
    assert running.ctl("status", "shop").returncode == 0  # nobody has come yet: all is well
    done = running.ctl("start", "shop")
    assert done.returncode == 0, done.stderr
    assert shop.states() == ["RUNNING", "STOPPED", "STOPPED"]
    assert done.stdout.count("scaled down (1 of 3)") == 2
    assert running.ctl("start", "shop:3").returncode == 0  # this very one
    assert shop.states() == ["RUNNING", "STOPPED", "RUNNING"]
    before = [info["pid"] for info in running.status().values()]
    assert running.ctl("reload", "shop").returncode == 0
    after = [info["pid"] for info in running.status().values()]
    assert after[1] is None
    assert not {before[0], before[2]} & set(after)
    assert running.ctl("restart", "shop").returncode == 0
    assert shop.states() == ["RUNNING", "STOPPED", "RUNNING"]
    assert not {after[0], after[2]} & {info["pid"] for info in running.status().values()}
    assert running.ctl("status", "shop").returncode == 0
    assert running.ctl("stop", "shop").returncode == 0
    assert shop.number() == 0
    assert running.ctl("status", "shop").returncode == 3  # nobody who comes gets an answer
    with shop.connect() as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        os.kill(running.supervisor_pid, signal.SIGKILL)
        wait_until(running.answers)
        sock.settimeout(2.5)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert shop.states() == ["STOPPED"] * 3
        assert not any("scaled" in info["why"] for info in running.status().values())
        assert running.ctl("start", "shop").returncode == 0
        sock.settimeout(20)
        assert sock.recv(65536)
    shop.up(1)


def test_a_start_that_fails_does_not_spin(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Backoff as always, of one process; who has connected waits, and is served when it can be."""
    lines = f'{WSGI}\nrestart_delay_max = "1s"\nscale = {{ min = 0, max = 3, backlog = 1 }}'
    shop = Shop(daemon, tmp_path, "tcp", lines)
    (shop.folder / "bad").touch()
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(shop.ask) for _ in range(2)]
        shop.running.wait_for("shop:1", "BACKOFF", 20)
        info = wait_until(lambda: (now := shop.running.status()["shop:1"]) and now["restarts"] >= 2 and now, 20)
        assert info["restarts"] < 20
        assert shop.states()[1:] == ["STOPPED", "STOPPED"]
        assert shop.number() == 1
        (shop.folder / "bad").unlink()
        assert [one.result(20) for one in asked]


@KINDS
def test_one_that_has_given_up_is_tried_again_for_who_waits(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """Whoever mends the code need not think of it."""
    lines = f'{WSGI}\nstart_retries = 1\nrestart_delay_max = "1s"\nscale = {{ min = 0, max = 2, idle_timeout = "1h" }}'
    shop = Shop(daemon, tmp_path, kind, lines)
    (shop.folder / "bad").touch()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(shop.ask)
        for _ in range(2):
            shop.running.wait_for("shop:1", "FATAL", 20)
            shop.running.wait_for("shop:1", "BACKOFF", 20)
        (shop.folder / "bad").unlink()
        assert asked.result(20)
    shop.up(1)


def test_a_reload_while_none_is_up_tries_the_release(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Not a visitor but who deploys is told that it is bad; nothing is up then, as before."""
    lines = f'{WSGI}\nscale = {{ min = 0, max = 2, idle_timeout = "1s" }}'
    shop = Shop(daemon, tmp_path, "tcp", lines)
    (shop.folder / "bad").touch()
    ran = shop.running.ctl("reload", "shop")
    assert ran.returncode == 1
    assert "RuntimeError: a bad release" in ran.stderr
    shop.up(0)
    (shop.folder / "bad").unlink()
    ran = shop.running.ctl("reload", "shop")
    assert (ran.returncode, "tried" in ran.stdout) == (0, True)
    shop.up(0)
    assert shop.ask()


def test_apply(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Another min and max, and no scale any more: what runs goes on."""
    shop = Shop(daemon, tmp_path, "tcp", f"{WSGI}\nscale = {{ min = 1, max = 2 }}")
    running = shop.running
    shop.up(1)
    first = running.status()["shop:1"]["pid"]
    running.write_table(f"{shop.begin}{WSGI}\nscale = {{ min = 2, max = 4 }}")
    assert running.ctl("apply").returncode == 0
    shop.up(2)
    assert list(running.status()) == ["shop:1", "shop:2", "shop:3", "shop:4"]
    assert running.ctl("scale", "shop", "4").returncode == 0
    running.write_table(f"{shop.begin}{WSGI}\nscale = {{ min = 0, max = 2 }}")
    assert running.ctl("apply").returncode == 0
    shop.up(2)
    assert list(running.status()) == ["shop:1", "shop:2"]
    assert running.status()["shop:1"]["pid"] == first
    assert running.ctl("scale", "shop", "0").returncode == 0
    assert shop.ask()
    shop.up(1)
    running.write_table(f"{shop.begin}{WSGI}\nworkers = 2")
    done = running.ctl("apply")
    assert done.returncode == 0, done.stderr
    shop.up(2)
    assert running.status()["shop:1"]["scale"] is None


def test_without_autostart_an_operator_begins(daemon: MakeDaemon, tmp_path: Path) -> None:
    lines = f'{WSGI}\nautostart = false\nscale = {{ min = 0, max = 2, idle_timeout = "2s" }}'
    shop = Shop(daemon, tmp_path, "tcp", lines)
    with shop.connect() as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        sock.settimeout(2.5)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert shop.states() == ["STOPPED", "STOPPED"]
        assert shop.running.ctl("start", "shop").returncode == 0
        sock.settimeout(20)
        assert sock.recv(65536)
    shop.up(0)
    assert shop.ask()  # from now on by itself
    shop.up(1)


def test_exit_when_all_have_exited(daemon: MakeDaemon, tmp_path: Path) -> None:
    """One that waits for its first connection has not."""
    lines = f'{WSGI}\nscale = {{ min = 0, max = 1 }}\n[program.once]\ncommand = "true"\nrestart = "never"'
    shop = Shop(daemon, tmp_path, "tcp", lines, settings='exit_when = "all-exited"')
    shop.running.wait_for("once", "EXITED")
    assert shop.ask()
    assert shop.running.status()["shop"]["state"] == "RUNNING"


@KINDS
def test_a_reload_changes_nothing_about_it(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """The successor has another socket; the next first connection is seen there."""
    shop = Shop(daemon, tmp_path, kind, f'{WSGI}\nscale = {{ min = 0, max = 1, idle_timeout = "2s" }}')
    for _ in range(2):
        first = shop.ask()
        assert shop.running.ctl("reload", "shop").returncode == 0
        second = shop.ask()
        assert second != first
        shop.up(0)


def test_another_address_while_none_is_up(daemon: MakeDaemon, tmp_path: Path) -> None:
    shop = Shop(daemon, tmp_path, "tcp", f"{WSGI}\nscale = {{ min = 0, max = 2 }}")
    before, port = shop.address, free_port()
    lines = shop.begin.replace(f":{before[1]}", f":{port}")
    shop.running.write_table(f"{lines}{WSGI}\nscale = {{ min = 0, max = 2 }}")
    done = shop.running.ctl("apply")
    assert done.returncode == 0, done.stderr
    assert shop.states() == ["STOPPED", "STOPPED"]
    with pytest.raises(ConnectionRefusedError):
        shop.connect()
    shop.address = ("127.0.0.1", port)
    assert shop.ask()
    shop.up(1)


@KINDS
def test_fewer_processes_lose_no_request(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    shop = Shop(daemon, tmp_path, kind, f"{WSGI}\nscale = {{ min = 0, max = 3 }}")
    over = False

    def ask_on() -> int:
        count = 0
        while not over:
            assert shop.ask()
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask_on) for _ in range(4)]
        try:
            for number in (3, 1, 3, 2, 0, 3):
                # From 0 the next connection starts one again, maybe before the command has seen that it was stopped.
                assert shop.running.ctl("scale", "shop", str(number)).returncode == 0 or number == 0
        finally:
            over = True
        assert sum(one.result(30) for one in asking) > 50


def test_the_daemon_is_killed(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next one adopts what runs, and neither starts nor stops any for it."""
    shop = Shop(daemon, tmp_path, "tcp", f"{WSGI}\nscale = {{ min = 1, max = 4 }}")
    running = shop.running
    shop.up(1)
    assert running.ctl("scale", "shop", "3").returncode == 0
    pids = [info["pid"] for info in running.status().values()]
    os.kill(running.keeper_pid, signal.SIGKILL)
    running.process.wait(10)  # type: ignore[union-attr]
    running.start()
    assert [info["pid"] for info in running.status().values()] == pids
    shop.stays(3, 2.5)
    assert shop.ask() in pids


def test_a_command_that_waits_outlives_the_supervisor(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Killed at any moment of it, `procmanctl scale` ends with that number, and so does a start of the program."""
    shop = Shop(daemon, tmp_path, "tcp", f"{WSGI}\nscale = {{ min = 0, max = 3 }}")
    running = shop.running
    with ThreadPoolExecutor(1) as threads:
        for turn, number in enumerate((2, 0, 3, 1, 3, 0)):
            asked = threads.submit(running.ctl, "scale", "shop", str(number))
            begun = len(shop.events("operation"))
            with contextlib.suppress(AssertionError):  # it may be over by then
                wait_until(lambda: len(shop.events("operation")) > begun, 0.1 * turn)  # noqa: B023
            os.kill(running.supervisor_pid, signal.SIGKILL)
            done = asked.result(60)
            assert done.returncode == 0, done.stderr
            assert shop.number() == number
            shop.up(number)
        asked = threads.submit(running.ctl, "start", "shop")
        os.kill(running.supervisor_pid, signal.SIGKILL)
        done = asked.result(60)
        assert done.returncode == 0, done.stderr
        shop.up(1)


def test_who_comes_while_a_hanging_server_is_asked_keeps_the_last_process(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Another program's server does not tell how many it has answered, and is waited for; what was counted before that
    is old by then."""
    port = free_port()
    drops = f"""
        [program.drops]
        command = ["${{PYTHON}}", "${{PROGRAMS}}/drops.py", "4"]
        listen = "127.0.0.1:{port}"
        start_seconds = 0.1
        scale = {{ min = 0, max = 2, idle_timeout = "1s" }}
    """
    shop = Shop(daemon, tmp_path, "tcp", f'{WSGI}\nscale = {{ min = 0, max = 2, idle_timeout = "600s" }}\n{drops}')

    def visit(work: int) -> bool:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(30)
            sock.sendall(f"GET /n/1?work={work} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            with contextlib.suppress(OSError):
                return bool(sock.recv(1000))
        return False

    pid = shop.ask()
    os.kill(pid, signal.SIGSTOP)
    try:
        for tenth in range(10, 24, 2):
            assert visit(0)
            time.sleep(tenth / 10)  # idle: it stops at a look after this, or just does not
            assert visit(1500), shop.running.said()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_first_connection_is_answered_while_another_program_changes(daemon: MakeDaemon, tmp_path: Path) -> None:
    """That may take as long as a canary."""
    other = """
        [program.other]
        server = "wsgi"
        app = "site_:app"
        directory = "{folder}"
        environment = {{ SITE_FOLDER = "{folder}", NUMBER = "{number}" }}
        listen = "127.0.0.1:{port}"
        start_seconds = 0
        canary = "10% for 100s"
    """
    port, folder = free_port(), tmp_path / "site"
    lines = f"{WSGI}\nscale = {{ min = 0, max = 2, idle_timeout = '1s' }}\n"
    shop = Shop(daemon, tmp_path, "tcp", lines + other.format(folder=folder, port=port, number=1))
    running = shop.running
    running.wait_for("other", timeout=20)
    running.write_table(shop.begin + lines + other.format(folder=folder, port=port, number=2))
    assert running.ctl("apply", "--no-wait").returncode == 0
    wait_until(lambda: (running.status()["other"]["beside"] or {}).get("canary"), 20)
    first = shop.ask()
    running.wait_for("shop:1", "STOPPED", timeout=30)  # idle
    assert shop.ask() != first
    assert running.status()["other"]["beside"]["canary"]
    assert running.ctl("promote", "other").returncode == 0
    wait_until(lambda: "nothing" in running.ctl("diff").stdout, 20)

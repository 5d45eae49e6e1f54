"""Requests a second of the built-in server, beside gunicorn and uWSGI: the server alone, with the least application.

Each server has one core to itself and the client another one, where the machine has two. They are measured in turns,
one at a time, for a short window each; a row is the median of the windows. In "kept" a client asks again and again on
its connections, if the server lets it; in "close" each request has a new connection.

A rate is what one core can do: requests by second of CPU time that the server used, so that whatever else a shared
machine does is left out. How many came by second of the clock is shown beside it.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.figures import digits
from tests.bench.machine import kill_all
from tests.bench.plan import Plan
from tests.harness import PROJECT, descendants, free_port, wait_until
from tests.sites.hello_site import HELLO

NAMES = ("wsgi",)

CONNECTIONS = 16
OURS = "built-in"
APP = "hello_site:app"
SITES = PROJECT / "tests" / "sites"


@dataclass(frozen=True, slots=True)
class Server:
    """`module` must be installed; `keeps` connections for the next request."""

    module: str
    argv: Sequence[str]
    keeps: bool = True


_WSGI = ("python", "-m", "procman.wsgi", "--bind={bind}", "--threads=4")
_GUNICORN = ("python", "-m", "gunicorn", "--no-control-socket", "-b", "{bind}")
_UWSGI = ("uwsgi", "--master", "--die-on-term", "--need-app", "--disable-logging", "--http-socket={bind}")

SERVERS: Mapping[str, Server] = {
    OURS: Server("waitress", (*_WSGI, "--no-access-log", APP)),
    "built-in, access log": Server("waitress", (*_WSGI, APP)),
    "gunicorn sync": Server("gunicorn", (*_GUNICORN, APP), keeps=False),
    "gunicorn gthread": Server("gunicorn", (*_GUNICORN, "--threads=4", APP)),
    "uWSGI": Server("pyuwsgi", (*_UWSGI, "--enable-threads", "--threads=4", f"--module={APP}"), keeps=False),
    "waitress": Server("waitress", ("python", "-m", "waitress", "--listen={bind}", "--threads=4", APP)),
}
"""One process each. Only "built-in, access log" and waitress' own defaults differ in what they log: the others log no
requests."""


@dataclass(slots=True)
class Row:
    """Requests a second in each window, of CPU time and (`clock`) of time."""

    server: str
    kept: list[float] = field(default_factory=list)
    close: list[float] = field(default_factory=list)
    kept_clock: list[float] = field(default_factory=list)
    close_clock: list[float] = field(default_factory=list)

    def measure(self, served: Served, seconds: float, keeps: bool) -> None:
        """One window each way."""
        for rates, clock, keep in (
            (self.kept, self.kept_clock, keeps), (self.close, self.close_clock, False)
        ):  # fmt: skip
            before = served.cpu_seconds()
            answers, passed = ask(served.port, seconds, keep)
            rates.append(answers / (served.cpu_seconds() - before))
            clock.append(answers / passed)

    def document(self) -> dict[str, object]:
        """As JSON shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work."""

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """Of all its threads and processes since their beginning: nanoseconds in the files schedstat (proc(5))."""
        pids = [self.pid, *(child.pid for child in descendants(self.pid))]
        files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def run(plan: Plan, say: Callable[[str], None]) -> list[Row]:
    """`plan.wsgi_rounds` windows of `plan.wsgi_seconds` for each server and way."""
    servers = {name: each for name, each in SERVERS.items() if importlib.util.find_spec(each.module)}
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = {cores[0]}, {cores[-1]}
    rows = {name: Row(name) for name in servers}
    with ExitStack() as stack:
        served = {name: stack.enter_context(serving(each, theirs)) for name, each in servers.items()}
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, ours)
        for number in range(plan.wsgi_rounds):
            say(f"round {number + 1} of {plan.wsgi_rounds}: {', '.join(servers)}")
            for name, each in servers.items():
                rows[name].measure(served[name], plan.wsgi_seconds, each.keeps)
    return list(rows.values())


@contextmanager
def serving(server: Server, cores: set[int]) -> Iterator[Served]:
    """A server at work on these cores. After the block it has gone."""
    port = free_port()
    first = {"python": sys.executable, "uwsgi": f"{Path(sys.executable).parent}/uwsgi"}
    words = [first.get(word, word).format(bind=f"127.0.0.1:{port}") for word in server.argv]
    with tempfile.TemporaryFile(dir="/tmp") as output:
        process = subprocess.Popen(
            words, cwd=SITES, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            os.sched_setaffinity(process.pid, cores)
            wait_until(lambda: _answers(process, port), 30, f"{words} answers")
            yield Served(port, process.pid)
        finally:
            below = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            kill_all(child.pid for child in below if child.alive())


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            return False
    return ask(port, 0.01, keep=False)[0] > 0


class _Client:
    """CONNECTIONS connections, each with one request under way."""

    def __init__(self, port: int, keep: bool) -> None:
        self._port, self._keep = port, keep
        close = "" if keep else "Connection: close\r\n"
        self._request = f"GET / HTTP/1.1\r\nHost: localhost\r\n{close}\r\n".encode()
        self._poll = select.epoll()
        self._socks: dict[int, socket.socket] = {}
        self._parts: dict[int, bytes] = {}
        self.answers = 0

    def ask(self, sock: socket.socket | None = None) -> None:
        """The next request, on this connection or on a new one."""
        if sock is None:
            sock = socket.create_connection(("127.0.0.1", self._port), 20)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socks[sock.fileno()] = sock
            self._poll.register(sock, select.EPOLLIN)
        self._parts[sock.fileno()] = b""
        sock.sendall(self._request)

    def turn(self) -> None:
        """Takes what has come. Raises RuntimeError for what is no answer: a fast wrong one is worth nothing."""
        for number, _ in self._poll.poll(1):
            sock = self._socks[number]
            data = sock.recv(65536)
            whole = self._parts[number] = self._parts[number] + data
            if whole.endswith(HELLO):
                if not whole.startswith(b"HTTP/1.1 200 OK\r\n"):
                    raise RuntimeError(f"answered {whole!r}")
                self.answers += 1
                last = not self._keep or b"onnection: close" in whole
                if last:
                    self._end(number)
                self.ask(None if last else sock)
            elif not data:
                if whole:
                    raise RuntimeError(f"answered {whole!r}")
                self._end(number)
                self.ask()

    def _end(self, number: int) -> None:
        self._poll.unregister(number)
        self._socks.pop(number).close()

    def close(self) -> None:
        """Ends all connections."""
        for number in list(self._socks):
            self._end(number)
        self._poll.close()


def ask(port: int, seconds: float, keep: bool) -> tuple[int, float]:
    """How many right answers came, in how many seconds."""
    client = _Client(port, keep)
    try:
        for _ in range(CONNECTIONS):
            client.ask()
        began = now = time.monotonic()
        while now < began + seconds or not client.answers:
            client.turn()
            now = time.monotonic()
            if now > began + seconds + 20:
                raise RuntimeError("no answer within 20 s")
        return client.answers, now - began
    finally:
        client.close()


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as a Markdown table, which docs/performance.md takes as it is."""
    head = ("server", "kept, by CPU second", "built-in is", "close, by CPU second", "built-in is", "by clock second")
    ours = next(row for row in rows if row.server == OURS)
    cells = [head, ("---",) * len(head)]
    for row in rows:
        kept, close = _times(ours.kept, row.kept), _times(ours.close, row.close)
        clock = " / ".join(f"{statistics.median(each):.0f}" for each in (row.kept_clock, row.close_clock))
        cells.append((row.server, _cell(row.kept), kept, _cell(row.close), close, clock))
    widths = [max(len(each[column]) for each in cells) for column in range(len(head))]
    for each in cells:
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(each, widths, strict=True))} |"


def _cell(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples):.0f} ({min(samples):.0f}–{max(samples):.0f})"


def _times(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of one round, with the smallest and the largest: "1.2 × (1.1–1.3)"."""
    if ours is theirs:
        return "1"
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return f"{digits(statistics.median(ratios))} × ({digits(min(ratios))}–{digits(max(ratios))})"

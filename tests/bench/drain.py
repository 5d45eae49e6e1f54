"""python -m tests.bench.drain [SERVER ...]: what each server does to its clients when it is stopped. The table in
docs/servers.md is what this prints.

Some times (10 where most fails, else 3) a successor is started on the socket of a server, and the old one is stopped by
its stop signal when the new one answers. Meanwhile 8 clients ask without a pause between their requests. Counted are
the requests that failed (tests/loss): no connection, a reset, an answer that is short or wrong.

shared    both have one socket
diverted  the successor has a socket of its own in the SO_REUSEPORT group; all new connections go to it, and the old one
          gets half a second for what it has accepted (docs/architecture.md)
close     clients say `Connection: close`
kept      they keep their connections

A kept connection that is closed between two requests is no failure: clients ask again (RFC 9112, 9.3.1). It is
counted too, in brackets.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from procman import listeners
from procman.config import Address, Listener
from procman.servers import Request, plan
from tests.harness import group, wait_until
from tests.loss.load import load
from tests.loss.tally import Tally
from tests.test_real_servers import SERVERS, Running

ROWS = {
    "wsgi": ("procman", SERVERS["wsgi"]),
    "gunicorn": ("gunicorn", SERVERS["gunicorn"]),
    "gunicorn, 4 threads": ("gunicorn", replace(SERVERS["gunicorn"], threads=4)),
    "uwsgi": ("pyuwsgi", SERVERS["uwsgi"]),
    "uvicorn": ("uvicorn", SERVERS["uvicorn"]),
    "uvicorn, 2 workers": ("uvicorn", SERVERS["uvicorn workers"]),
    "hypercorn": ("hypercorn", SERVERS["hypercorn"]),
    "hypercorn, 2 workers": ("hypercorn", SERVERS["hypercorn workers"]),
    "daphne": ("daphne", SERVERS["daphne"]),
    "granian": ("granian", SERVERS["granian"]),
    "granian, 2 workers": ("granian", SERVERS["granian workers"]),
}

CLIENTS = 8
SETTLE = 0.5
"""Seconds that a diverted server gets for the connections that it has accepted, and each swap for what comes after."""


@dataclass(frozen=True, slots=True)
class Way:
    """One of the four ways."""

    name: str
    diverted: bool
    kept: bool
    swaps: int = 3


WAYS = (
    Way("shared, close", diverted=False, kept=False, swaps=10),
    Way("shared, kept", diverted=False, kept=True),
    Way("diverted, close", diverted=True, kept=False),
    Way("diverted, kept", diverted=True, kept=True),
)


def divert(group_of: socket.socket, index: int) -> None:
    """All new connections of the group go to its socket number `index` (architecture, section 4)."""
    instructions = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, index), 8)
    group_of.setsockopt(socket.SOL_SOCKET, 51, struct.pack("@H6xQ", 1, ctypes.addressof(instructions)))


def queue(sock: socket.socket) -> int:
    """How many connections wait to be accepted: tcpi_unacked of a socket that listens."""
    (waiting,) = struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)
    return int(waiting)


class Stage:
    """One server after the other at one address."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.folder = folder
        wanted = Listener(name="web", address=Address("tcp", "127.0.0.1", 0))
        self.socket = listeners.open_listener(wanted)
        self.listener = replace(wanted, address=Address("tcp", *self.socket.getsockname()))
        self.request = replace(request, listen=(self.listener,))
        self.generation = 0
        self.server = self.start(self.socket)
        self.server.wait_ready()

    def start(self, sock: socket.socket) -> Running:
        self.generation += 1
        runtime = str(self.folder / str(self.generation))  # each gunicorn has a control socket of its own
        return Running(plan(replace(self.request, runtime_dir=runtime)), [sock], self.folder, {})

    def swap(self, diverted: bool) -> float:
        """A successor takes the place of the server; returns the seconds that its stop took."""
        old, old_socket = self.server, self.socket
        if diverted:
            divert(old_socket, 0)
            self.socket = listeners.join(self.listener)
        try:
            self.server = self.start(self.socket)
            if diverted:
                wait_until(lambda: accepts(self.server), 30)
                divert(self.socket, 1)
                wait_until(lambda: queue(old_socket) == 0)
                time.sleep(SETTLE)
            else:
                wait_until(self.successor_answers, 30)
            _, seconds = old.stop()
        finally:
            old.close()
        if diverted:
            old_socket.close()
            divert(self.socket, 0)
        return seconds

    def successor_answers(self) -> bool:
        with contextlib.suppress(OSError, HTTPException):
            return int(self.server.get("/pid")[1]) in group(self.server.process.pid)
        return False

    def close(self) -> None:
        self.server.close()
        self.socket.close()


def accepts(server: Running) -> bool:
    """Whether a server to which nothing is sent yet has come so far that it would answer."""
    if server.plan.ready.kind == "http":
        # Its socket gets no connections, so only its output tells.
        words = ("startup complete", "Running on", "Listening on TCP", "Started worker-")
        return any(word in server.output.read_text(errors="replace") for word in words)
    return server.is_ready(0.5)


def measure(request: Request, way: Way) -> tuple[Tally, float]:
    """What became of the requests, and the longest stop in seconds."""
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as name:
        stage = Stage(request, Path(name))
        try:
            address = f"127.0.0.1:{stage.listener.address.port}"
            with load(address, modes=("get" if way.kept else "get/close",), connections=CLIENTS) as running:
                slowest = 0.0
                for _ in range(way.swaps):
                    time.sleep(SETTLE)
                    slowest = max(slowest, stage.swap(way.diverted))
                time.sleep(SETTLE)
        finally:
            stage.close()
    return running.result.total, slowest


def cell(tally: Tally) -> str:
    text = f"{tally.failed_count} of {tally.requests:,}"
    return text + (f" ({tally.idle_closed})" if tally.idle_closed else "")


def rows(names: Sequence[str], show: Callable[[str], None]) -> Iterator[str]:
    """The table, line by line."""
    yield "| server | " + " | ".join(way.name for way in WAYS) + " | longest stop |"
    yield "|---|" + "---|" * len(WAYS) + "---|"
    for name in names:
        package, request = ROWS[name]
        cells, slowest = [], 0.0
        for way in WAYS:
            tally, seconds = measure(request, way)
            slowest = max(slowest, seconds)
            cells.append(cell(tally))
            show(f"{name}, {way.name}: {tally.failed} {[failure.detail for failure in tally.failures[:2]]}")
        version = "" if package == "procman" else f" {importlib.metadata.version(package)}"
        title, comma, rest = name.partition(",")
        yield f"| {title}{version}{comma}{rest} | " + " | ".join(cells) + f" | {slowest:.1f} s |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.drain", description="What a stop does to the clients.")
    parser.add_argument("name", nargs="*", choices=[[], *ROWS], help="rows of the table; all of them by default")
    options = parser.parse_args(argv)
    for line in rows(options.name or list(ROWS), lambda text: print(text, file=sys.stderr, flush=True)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

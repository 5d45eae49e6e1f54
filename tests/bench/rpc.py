"""How many questions a manager answers, and how soon: the state of one of ten programs, asked over its socket.

Each client has one connection, and asks again as soon as it has its answer. All clients are one process here.
"""

from __future__ import annotations

import select
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench import limits
from tests.bench.contenders import START_SECONDS
from tests.bench.figures import Figure, Limit, percentile
from tests.bench.lineup import Notes, present
from tests.bench.machine import Starts
from tests.bench.plan import Plan
from tests.bench.wires import Wire

NAMES = ("rpc",)

CLIENTS = (1, 50)
PROGRAMS = 10
ANSWER_SECONDS = 20.0
"""Bound of one answer."""

ANSWER_BYTES = 600
"""Of the echo: about what the state of one program takes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of some seconds of asking."""

    calls_a_second: float
    p99_ms: float


def ask(wire: Wire, clients: int, seconds: float) -> Asked:
    """Raises ValueError for a wrong answer, TimeoutError for none."""
    with ExitStack() as stack:
        poll = select.epoll()
        stack.callback(poll.close)
        open_: dict[int, socket.socket] = {}
        for _ in range(clients):
            connection = stack.enter_context(wire.connect())
            open_[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
        asked_at: dict[int, float] = {}
        answers: dict[int, bytes] = {}
        took: list[float] = []
        begun = now = time.monotonic()
        for fd, connection in open_.items():
            asked_at[fd], answers[fd] = time.monotonic(), b""
            connection.sendall(wire.request)
        while now < begun + seconds or not took:
            ready = poll.poll(ANSWER_SECONDS)
            if not ready:
                raise TimeoutError(f"no answer within {ANSWER_SECONDS} s")
            now = time.monotonic()
            for fd, _ in ready:
                data = open_[fd].recv(262144)
                if not data:
                    raise ConnectionError("the connection was closed")
                answers[fd] += data
                if wire.whole(answers[fd]):
                    took.append((now - asked_at[fd]) * 1000)
                    asked_at[fd], answers[fd] = time.monotonic(), b""
                    open_[fd].sendall(wire.request)
        return Asked(len(took) / (now - begun), percentile(took, 99))


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """`plan.rpc_rounds` windows for each manager that has such a socket, and for the echo, in turns."""
    found: dict[tuple[str, int], list[Asked]] = defaultdict(list)
    notes = {clients: Notes(say) for clients in CLIENTS}
    with ExitStack() as stack:
        wires: dict[str, Wire] = {}
        for kind in present(plan.peers):
            with notes[CLIENTS[0]].leaving_out(kind.title):
                starts = stack.enter_context(Starts())
                names = [f"p{number:03d}" for number in range(PROGRAMS)]
                contender = stack.enter_context(kind({name: starts.argv(name) for name in names}))
                wire = contender.wire(names[0])
                if wire is not None:
                    contender.start()
                    starts.wait(PROGRAMS, START_SECONDS)
                    contender.wait_running(PROGRAMS)
                    wires[kind.title] = wire
        wires["limit"] = stack.enter_context(limits.echo(ANSWER_BYTES))
        for number in range(1, plan.rpc_rounds + 1):
            for title, wire in wires.items():
                say(f"round {number} of {plan.rpc_rounds}: {' and '.join(map(str, CLIENTS))} clients ask {title}")
                for clients in CLIENTS:
                    with notes[clients].leaving_out(title):
                        found[title, clients].append(ask(wire, clients, plan.rpc_seconds))
    return [figure for clients in CLIENTS for figure in _figures(clients, found, notes[clients].texts)]


def _figures(clients: int, found: dict[tuple[str, int], list[Asked]], notes: list[str]) -> list[Figure]:
    who = f"{clients} client{'' if clients == 1 else 's'}"
    name = f"rpc-{clients}"

    def figure(suffix: str, title: str, unit: str, take: Callable[[Asked], float], more: bool) -> Figure:
        sides = {who: tuple(map(take, each)) for (who, many), each in found.items() if many == clients}
        limit = Limit("bare echo", sides.pop("limit", ()))
        return Figure(
            name + suffix, title, unit, sides, limit, more_is_better=more, programs=PROGRAMS,
            notes=() if suffix else tuple(notes),
        )  # fmt: skip

    return [
        figure("", f"state of one program over the socket, {who}", "calls/s", lambda each: each.calls_a_second, True),
        figure("-p99", f"the same call, 99th percentile, {who}", "ms", lambda each: each.p99_ms, False),
    ]

"""How long a program is away: from the SIGKILL of a child to its successor's first instruction.

A program is killed only when it has been up for more than the second after which both managers call it started.
Supervisor needs about a second for each restart, so several of it run side by side, idle but for their own one.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

from tests.bench.contenders import START_SECONDS, Contender, Procmand, Supervisord
from tests.bench.figures import Figure
from tests.bench.machine import Start, Starts
from tests.bench.plan import Plan

NAMES = ("restart",)

RESTART_SECONDS = 15.0
"""Bound of one restart."""

UP_SECONDS = 1.3
"""A program that has been up for this long counts as started."""


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Kills `plan.kills` times under each manager, in turns of `kills_a_step`."""
    with ExitStack() as stack:
        ours = stack.enter_context(Starts())
        theirs = [stack.enter_context(Starts()) for _ in range(plan.kills_a_step)]
        # Twice as many programs as a turn kills: the others have been up since the turn before.
        names = [f"p{number:03d}" for number in range(2 * plan.kills_a_step)]
        procmand = stack.enter_context(Procmand({name: ours.argv(name) for name in names}))
        supervisords = [
            stack.enter_context(Supervisord({name: starts.argv(name) for name in ("p000", "p001")}))
            for starts in theirs
        ]
        say(f"{plan.kills} kills under procman, and under {len(supervisords)} Supervisors")
        return _kill(plan, _Killed(procmand, ours, names), [
            _Killed(supervisord, starts, ["p000", "p001"])
            for supervisord, starts in zip(supervisords, theirs, strict=True)
        ])  # fmt: skip


def _kill(plan: Plan, procmand: _Killed, supervisords: list[_Killed]) -> list[Figure]:
    for killed in (procmand, *supervisords):
        killed.begin()
    ours: list[float] = []
    theirs: list[float] = []
    limit: list[float] = []
    while len(theirs) < plan.kills:
        for _ in range(plan.kills_a_step):
            ours.append(procmand.wait(procmand.kill()))
            limit.append(_bare())
        killed_at = [killed.kill() for killed in supervisords]
        theirs += [killed.wait(at) for killed, at in zip(supervisords, killed_at, strict=True)]
    title = "SIGKILL of a child → successor's first instruction"

    def figure(name: str, of: str, percent: float) -> Figure:
        sides = (tuple(ours), tuple(theirs), tuple(limit))
        return Figure(name, f"{title}, {of}", "ms", *sides, limit_title="bare wait and spawn", percentile=percent)

    return [figure("restart", "median", 50), figure("restart-p99", "99th percentile", 99)]


class _Killed:
    """A manager whose programs are killed one after the other."""

    def __init__(self, contender: Contender, starts: Starts, names: list[str]) -> None:
        self._contender, self._starts, self._names = contender, starts, names
        self._running: dict[str, Start] = {}
        self._next = 0

    def begin(self) -> None:
        """Starts it and waits for its programs."""
        self._contender.start()
        self._running = {start.name: start for start in self._starts.wait(len(self._names), START_SECONDS)}

    def kill(self) -> float:
        """SIGKILL for the next program; when."""
        start = self._running[self._names[self._next]]
        self._next = (self._next + 1) % len(self._names)
        time.sleep(max(0.0, start.at + UP_SECONDS - time.monotonic()))
        at = time.monotonic()
        os.kill(start.pid, signal.SIGKILL)
        return at

    def wait(self, killed_at: float) -> float:
        """Waits for the successor; milliseconds since `killed_at`."""
        start = self._starts.wait(1, RESTART_SECONDS)[0]
        self._running[start.name] = start
        return (start.at - killed_at) * 1000


def _bare() -> float:
    """The same without a manager: kill, wait for the end by a pidfd, start again; milliseconds."""
    with Starts() as starts:
        argv = starts.argv("bare")
        first = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        starts.wait(1, RESTART_SECONDS)
        ended = select.poll()
        fd = os.pidfd_open(first.pid)
        ended.register(fd, select.POLLIN)
        at = time.monotonic()
        first.kill()
        ended.poll(RESTART_SECONDS * 1000)
        first.wait(1)
        second = os.posix_spawn(argv[0], argv, os.environ)
        start = starts.wait(1, RESTART_SECONDS)[0]
        os.close(fd)
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        return (start.at - at) * 1000

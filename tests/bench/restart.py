"""How long a program is away: from the SIGKILL of a child to its successor's first instruction.

A program is killed only when it has been up for more than the second after which managers call it started. Some need
about a second for each restart, so several of those run side by side, idle but for their own one.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tests.bench import limits
from tests.bench.contenders import START_SECONDS, Contender
from tests.bench.figures import Figure, Limit
from tests.bench.lineup import Notes, present
from tests.bench.machine import Start, Starts
from tests.bench.plan import Plan

NAMES = ("restart",)

RESTART_SECONDS = 15.0
"""Bound of one restart."""

UP_SECONDS = 1.3
"""A program that has been up for this long counts as started."""

TITLE = "SIGKILL of a child → successor's first instruction"
LIMIT = "bare wait and spawn"


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Kills `plan.kills` times under each manager, in turns of `kills_a_step`."""
    samples: dict[str, list[float]] = defaultdict(list)
    limit: list[float] = []
    notes = Notes(say)
    with ExitStack() as stack:
        all_killed: dict[str, Killed] = {}
        for kind in present(plan.peers):
            with notes.leaving_out(kind.title):
                all_killed[kind.title] = _killed(kind, plan.kills_a_step, stack)
        for done in range(0, plan.kills, plan.kills_a_step):
            say(f"kills {done + 1} to {done + plan.kills_a_step} of {plan.kills} under {', '.join(all_killed)}")
            for title, killed in list(all_killed.items()):
                took: list[float] = []
                with notes.leaving_out(title):
                    took = killed.turn(plan.kills_a_step)
                samples[title] += took
                if not took:
                    del all_killed[title]
            limit += [limits.restart() for _ in range(plan.kills_a_step)]

    def figure(name: str, of: str, percent: float) -> Figure:
        sides = {title: tuple(each) for title, each in samples.items()}
        least = Limit(LIMIT, tuple(limit))
        return Figure(name, f"{TITLE}, {of}", "ms", sides, least, percentile=percent, notes=tuple(notes.texts))

    return [figure("restart", "median", 50), figure("restart-p99", "99th percentile", 99)]


def _killed(kind: type[Contender], kills_a_step: int, stack: ExitStack) -> Killed:
    """One manager with twice as many programs as a turn kills, for the others have been up since the turn before; or,
    of a slow one, as many managers with two programs each."""
    count = kills_a_step if kind.slow_restart else 1
    starts = stack.enter_context(Starts())
    lanes = [[f"p{lane:02d}{number:02d}" for number in range(2 * kills_a_step // count)] for lane in range(count)]
    for names in lanes:
        stack.enter_context(kind({name: starts.argv(name) for name in names})).start()
    return Killed(lanes, starts, starts.wait(2 * kills_a_step, START_SECONDS))


class Killed:
    """Managers, each with one of the `lanes` of names of programs, that are killed in turns, one in each lane."""

    def __init__(self, lanes: Sequence[Sequence[str]], starts: Starts, running: Sequence[Start]) -> None:
        self._lanes, self._starts = [deque(names) for names in lanes], starts
        self._running = {start.name: start for start in running}

    def turn(self, count: int) -> list[float]:
        """So many restarts, in milliseconds."""
        took: list[float] = []
        while len(took) < count:
            took += self._kill([lane[0] for lane in self._lanes[: count - len(took)]])
            for lane in self._lanes:
                lane.rotate(-1)
        return took

    def _kill(self, names: Sequence[str]) -> list[float]:
        """SIGKILL for each at about the same time. Nothing is done between it and the wait: a start counts from when it
        is read."""
        up_since = max(self._running[name].at for name in names)
        time.sleep(max(0.0, up_since + UP_SECONDS - time.monotonic()))
        killed_at = {}
        for name in names:
            killed_at[name] = time.monotonic()
            os.kill(self._running[name].pid, signal.SIGKILL)
        started = self._starts.wait(len(names), RESTART_SECONDS)
        self._running.update({start.name: start for start in started})
        return [(start.at - killed_at[start.name]) * 1000 for start in started]

"""What a SIGKILL of the manager itself does: how long until its status command is whole again, and to its programs.

Two kinds of process are killed: the one that decides what is started (of procman the supervisor), and the one that is
the parent of a program (of procman the keeper, of s6 and runit the process that watches one service; for the others it
is the same). A manager whose first process has gone is started again at once, as systemd would do it. Two seconds later
the programs are counted that still are what they were, those that run twice, and those that do not run.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.contenders import START_SECONDS, Contender
from tests.bench.figures import OURS, Figure
from tests.bench.lineup import Notes, present
from tests.bench.machine import Ends, Start, Starts, runs
from tests.bench.plan import Plan
from tests.harness import wait_until

NAMES = ("crash",)

PEERS_MOST = 100
"""Programs. Beyond, only procman is killed: the time of all others is that of a start."""

RECOVERY_SECONDS = 60.0
"""Bound of one recovery."""

VICTIMS = ("decides", "parent")


@dataclass(frozen=True, slots=True)
class Crash:
    """What came of one: `ms` until the status is whole again, and how many programs went on, run twice, do not run."""

    ms: float
    same: int
    twice: int
    away: int


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Of each kind, in turns, for each number of programs of the plan."""
    return [figure for programs, times in plan.crashes.items() for figure in _run(plan, programs, times, say)]


def _run(plan: Plan, programs: int, times: int, say: Callable[[str], None]) -> list[Figure]:
    found: dict[tuple[str, str], list[Crash]] = defaultdict(list)
    notes = {victim: Notes(say) for victim in VICTIMS}
    kinds = present(plan.peers)
    if programs > PEERS_MOST and len(kinds) > 1:
        kinds = [kind for kind in kinds if kind.title == OURS]
        notes[VICTIMS[0]].add(f"{OURS} alone: the others begin anew, and `boot` shows how long {programs:,} take")
    for number in range(1, times + 1):
        for kind in kinds:
            for victim in VICTIMS:
                say(f"{programs} programs, crash {number} of {times}: of what {victim} under {kind.title}")
                with notes[victim].leaving_out(kind.title), Starts() as starts:
                    names = [f"p{each:04d}" for each in range(programs)]
                    with kind({name: starts.argv(name) for name in names}) as contender:
                        found[victim, kind.title].append(_crash(contender, starts, victim, plan.crash_settle_seconds))
    return [figure for victim in VICTIMS for figure in _figures(victim, programs, found, tuple(notes[victim].texts))]


def _crash(contender: Contender, starts: Starts, victim: str, settle: float) -> Crash:
    contender.start()
    count = len(contender.programs)
    before = starts.wait(count, START_SECONDS)
    contender.wait_running(count)
    pid = contender.deciding_pid if victim == "decides" else contender.parent_pid(before[0].pid)
    took = recovery(contender, pid, count)
    time.sleep(settle)
    return _count(took, before, starts.seen())


def recovery(contender: Contender, pid: int, programs: int) -> float:
    """SIGKILL for one of its processes; milliseconds until its status is whole again."""
    watchers, main = len(contender.watcher_pids()), contender.main_pid
    begun = time.monotonic()
    with Ends([pid]) as ends:
        os.kill(pid, signal.SIGKILL)
        ends.wait(RECOVERY_SECONDS, f"a killed process of {contender.title} did not end")

    def whole() -> bool:
        if contender.ended():
            contender.start()
        if pid != main and len(contender.watcher_pids()) < watchers:  # the killed one has no successor yet
            return False
        return contender.count_running(contender.status()[1]) == programs

    wait_until(whole, RECOVERY_SECONDS, f"the status of {contender.title} is whole")
    return (time.monotonic() - begun) * 1000


def _count(took: float, before: Sequence[Start], after: Sequence[Start]) -> Crash:
    living: dict[str, set[int]] = {start.name: set() for start in before}
    for start in (*before, *after):
        if runs(start.pid):
            living[start.name].add(start.pid)
    same = sum(living[start.name] == {start.pid} for start in before)
    return Crash(
        took, same, sum(len(each) > 1 for each in living.values()), sum(not each for each in living.values())
    )


def _figures(
    victim: str, programs: int, found: dict[tuple[str, str], list[Crash]], notes: tuple[str, ...]
) -> list[Figure]:
    what = {"decides": "SIGKILL of the process that decides", "parent": "SIGKILL of a program's parent"}[victim]

    def figure(suffix: str, title: str, unit: str, take: Callable[[Crash], float], more: bool = False) -> Figure:
        sides = {who: tuple(map(take, each)) for (which, who), each in found.items() if which == victim}
        return Figure(
            f"crash-{victim}{suffix}", f"{what}{title}", unit, sides, more_is_better=more, programs=programs,
            notes=notes if not suffix else (),
        )  # fmt: skip

    return [
        figure("", " → status command is whole again", "ms", lambda each: each.ms),
        figure("-same", ": same processes afterwards", f"of {programs}", lambda each: each.same, more=True),
        figure("-twice", ": run twice afterwards", f"of {programs}", lambda each: each.twice),
        figure("-away", ": do not run afterwards", f"of {programs}", lambda each: each.away),
    ]

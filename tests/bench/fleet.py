"""Many programs that do nothing: boot, idle CPU, memory, status and stop of their manager.

Each round starts procman, then Supervisor, then procman without sampling, each with its programs and alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from tests.bench.contenders import START_SECONDS, Contender, Procmand, Programs, Supervisord
from tests.bench.figures import Figure
from tests.bench.machine import Starts, cpu_seconds, memory, run_timed
from tests.bench.plan import Plan

NAMES = ("boot", "idle", "memory", "status", "stop")

SETTLE_SECONDS = 1.2
"""After the last program has started: both managers call it RUNNING after one second, and look at it once more then."""

BARE_BOOT = """\
import os, sys
script, fifo, *names = sys.argv[1:]
for name in names:
    os.posix_spawn("/bin/sh", ["/bin/sh", script, fifo, name], os.environ)
"""

SAMPLING_SECONDS = 5
"""procman's default."""

LIMIT = "limit"
UNSAMPLED = "procman without sampling"


class Unsampled(Procmand):
    """procman that measures no CPU and memory of its programs, as Supervisor."""

    title = UNSAMPLED

    def __init__(self, programs: Programs) -> None:
        super().__init__(programs, sampling=0)


Samples = defaultdict[tuple[str, str], list[float]]
"""Seconds or megabytes by (what, whose)."""

Take = Callable[[str, float], None]


def run(plan: Plan, names: Collection[str], say: Callable[[str], None]) -> list[Figure]:
    """Measures those of NAMES that are in `names`."""
    samples: Samples = defaultdict(list)
    for number in range(1, plan.rounds + 1):
        kinds: list[type[Procmand | Supervisord]] = [Procmand, Supervisord, *([Unsampled] if "idle" in names else [])]
        for make in kinds:
            say(f"round {number} of {plan.rounds}: {plan.programs} programs under {make.title}")
            with Starts() as starts, make(_programs(plan, starts)) as contender:
                _measure(plan, names, contender, starts, partial(_take, samples, make.title))
                if "stop" in names and (make is Procmand or (make is Supervisord and number <= plan.sigterm_rounds)):
                    contender.ctl("start", "all")
                    starts.wait(plan.programs, START_SECONDS)
                    _take(samples, make.title, "stop", contender.stop())
        if "boot" in names:
            _take(samples, LIMIT, "boot", _bare_boot(plan))
        for _ in range(plan.status_calls if "status" in names else 0):
            _take(samples, LIMIT, "status", run_timed([sys.executable, "-c", "pass"], os.environ)[0])
    figures = [figure for figure in _figures(plan.programs, samples) if figure.name.partition("-")[0] in names]
    if plan.idle_seconds < SAMPLING_SECONDS:
        note = f"measured for {plan.idle_seconds} s, so it holds no sample: only the full run says something"
        figures = [replace(each, notes=(note,)) if each.name == "idle-sampling" else each for each in figures]
    return figures


def _take(samples: Samples, whose: str, what: str, value: float) -> None:
    samples[what, whose].append(value)


def _programs(plan: Plan, starts: Starts) -> dict[str, list[str]]:
    return {name: starts.argv(name) for name in (f"p{number:03d}" for number in range(plan.programs))}


def _measure(plan: Plan, names: Collection[str], contender: Contender, starts: Starts, take: Take) -> None:
    """One round of one of them. The order matters: commands leave traces in idle CPU and memory."""
    begun = contender.start()
    last = starts.wait(plan.programs, START_SECONDS)[-1]
    take("boot", last.at - begun)
    time.sleep(SETTLE_SECONDS)
    contender.wait_running(plan.programs)
    pids = contender.own_pids()
    if "idle" in names:
        take("idle", _idle(pids, plan.idle_seconds))
    if contender.title == UNSAMPLED:
        return
    take("pss", memory(pids, "Pss"))
    take("dirty", memory(pids, "Private_Dirty"))
    for _ in range(plan.status_calls if "status" in names else 0):
        take("status", contender.ctl("status")[0])
    if "stop" in names:
        take("stop-command", contender.ctl("stop", "all")[0])


def _idle(pids: Sequence[int], seconds: float) -> float:
    """Seconds of CPU in a second in which nobody asks for anything."""
    start, before = time.monotonic(), cpu_seconds(pids)
    time.sleep(seconds)
    used = cpu_seconds(pids) - before
    return used / (time.monotonic() - start)


def _bare_boot(plan: Plan) -> float:
    """Seconds for a bare interpreter that starts the same children and does nothing else."""
    with Starts() as starts:
        names = list(_programs(plan, starts))
        _shell, script, fifo, _name = starts.argv("")
        begun = time.monotonic()
        command = [sys.executable, "-c", BARE_BOOT, script, fifo, *names]
        process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        try:
            return starts.wait(plan.programs, START_SECONDS)[-1].at - begun
        finally:
            process.wait(START_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)


def _figures(count: int, samples: Samples) -> list[Figure]:
    def figure(name: str, what: str, title: str, *, ours: str = Procmand.title, limit: str = "") -> Figure:
        scale, unit = (1, "MB") if what in ("pss", "dirty") else (1000, "ms")
        sides = [tuple(scale * each for each in samples[what, whose]) for whose in (ours, Supervisord.title, LIMIT)]
        return Figure(name, title, unit, sides[0], sides[1], sides[2], limit)

    boot_limit = f"bare interpreter, {count} spawns"
    return [
        figure("boot", "boot", f"start of the manager → all {count} run", limit=boot_limit),
        figure("idle-sampling", "idle", "idle CPU per second, sampling every 5 s"),
        figure("idle", "idle", "idle CPU per second, sampling off", ours=UNSAMPLED),
        figure("memory", "pss", "memory of the manager (PSS)"),
        figure("memory-dirty", "dirty", "memory of the manager (private and dirty)"),
        figure("status", "status", f"whole status command, {count} programs", limit="bare interpreter"),
        figure("stop", "stop", f"SIGTERM to the manager → all {count} have gone"),
        figure("stop-command", "stop-command", f"whole `stop all` command, {count} programs"),
    ]

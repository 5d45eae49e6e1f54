"""What it costs to take the output of many programs that print steadily: 1 MB/s each, in lines of 100 bytes.

Once procman's files are read afterwards, compressed as they are by default: each line has its number, and none may be
missing or be there twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.bench.contenders import Contender
from tests.bench.figures import Figure
from tests.bench.lineup import Notes, present
from tests.bench.logs import PATIENCE_SECONDS
from tests.bench.machine import MB, TooSlow, cpu_seconds
from tests.bench.plan import Plan
from tests.bench.procmand import Procmand
from tests.harness import PROGRAMS, command_line, descendants, log_content, log_files, wait_until

NAMES = ("many",)

RATE = 1_000_000
"""Bytes a second and program."""

SCRIPT = str(PROGRAMS / "paced_lines.py")
FOREVER = 100_000.0
"""Seconds."""

KEEP = 1
CHECKED_KEEP, CHECKED_BYTES = 100, 4_000_000
"""Where lines are counted: files are rotated so often that all of them are, a few times."""

WARM_SECONDS, END_SECONDS = 2.0, 60.0


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """One manager after the other, and procman once more."""
    count = plan.many_programs
    rates: dict[str, tuple[float, ...]] = {}
    costs: dict[str, tuple[float, ...]] = {}
    notes = Notes(say)
    for kind in present(plan.peers):
        say(f"{count} programs print {RATE / MB:g} MB/s each under {kind.title}")
        with notes.leaving_out(kind.title), kind(_programs(count, FOREVER), keep_logs=KEEP) as contender:
            contender.start()
            contender.wait_running(count)
            rates[kind.title], costs[kind.title] = _windows(contender, plan)
    checked: list[str] = []
    with notes.leaving_out("the count of procman's lines"):
        checked = _checked(count, plan, say)
    said = [*notes.texts, *checked]
    title = "programs that print 1 MB/s each"
    return [
        Figure("many", f"{title}: CPU of the manager in a second", "s", costs, programs=count, notes=tuple(said)),
        Figure("many-rate", f"{title}: taken of it", "MB/s", rates, more_is_better=True, programs=count),
    ]


def _programs(count: int, seconds: float) -> dict[str, list[str]]:
    return {f"p{number}": [sys.executable, "-S", "-E", SCRIPT, str(RATE), str(seconds)] for number in range(count)}


def _windows(contender: Contender, plan: Plan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    writers = [each.pid for each in descendants(contender.main_pid) if SCRIPT in command_line(each.pid)]
    own = contender.own_pids()
    time.sleep(min(WARM_SECONDS, plan.many_seconds))
    rates, costs = [], []
    for _ in range(plan.many_rounds):
        start, before, used = time.monotonic(), contender.taken_bytes(writers), cpu_seconds(own)
        time.sleep(plan.many_seconds)
        while not (size := contender.taken_bytes(writers) - before) and time.monotonic() < start + PATIENCE_SECONDS:
            time.sleep(plan.many_seconds)
        took = time.monotonic() - start
        costs.append((cpu_seconds(own) - used) / took)
        rates.append(size / MB / took)
        if not size:
            raise TooSlow("nothing of the output was taken")
        contender.trim()
    return tuple(rates), tuple(costs)


def _checked(count: int, plan: Plan, say: Callable[[str], None]) -> list[str]:
    """What procman's files say, when all that was printed is in them, and what compressing them has used."""
    say(f"{count} programs print numbered lines under procman")
    seconds = 2 * plan.many_seconds
    programs = _programs(count, seconds)
    with Procmand(programs, keep_logs=CHECKED_KEEP, log_bytes=CHECKED_BYTES, compress=True) as procmand:
        procmand.start()
        procmand.wait_running(count)
        missing = _missing(procmand, list(programs), seconds)
        used = cpu_seconds(procmand.compressor_pids())
    return [*missing, f"compressing them has used {used:.2f} s of CPU, with nice 19"]


def _missing(procmand: Procmand, names: list[str], seconds: float) -> list[str]:
    lines = int(seconds / 0.02) * (RATE // 5000)

    def all_read() -> bool:
        return all(procmand.counters(name)["read"] >= lines * 100 for name in names)

    wait_until(all_read, END_SECONDS, "all is printed")
    wrong = [name for name in names if _numbers(procmand, name) != list(range(lines))]
    if wrong:
        return [f"lines are missing or doubled: {', '.join(wrong)}"]
    return [f"each of {lines * len(names)} lines is in procman's files once"]


def _numbers(procmand: Procmand, name: str) -> list[int]:
    path = procmand.logs / f"{name}.log"

    def read() -> list[int]:
        try:
            return [int(line[:9]) for file in log_files(path) for line in log_content(file).splitlines()]
        except FileNotFoundError:  # it was compressed just now
            return []

    return wait_until(read, END_SECONDS, f"{path} is at rest")

"""What it costs a manager when many programs print at the same time: a megabyte a second each, into rotated files."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.contenders import Contender
from tests.bench.figures import Figure
from tests.bench.lineup import Notes, present
from tests.bench.machine import MB, TooSlow, cpu_seconds
from tests.bench.plan import Plan
from tests.harness import command_line, descendants

NAMES = ("load",)

WRITER = """\
import os, time
block = (b"x" * 99 + b"\\n") * 500
wake = time.monotonic()
while True:
    os.write(1, block)
    wake += 0.05
    time.sleep(max(0, wake - time.monotonic()))
"""
"""A megabyte a second, in blocks that a pipe holds. One that had to wait does not catch up by more than it was late."""

WARM_SECONDS = 1.0
KEEP = 1


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """One manager after the other."""
    count = plan.load_writers
    rates: dict[str, tuple[float, ...]] = {}
    costs: dict[str, tuple[float, ...]] = {}
    notes = Notes(say)
    with tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp") as folder:
        script = Path(folder) / "writer.py"
        script.write_text(WRITER)
        programs = {f"w{number:03d}": [sys.executable, "-IS", str(script), str(number)] for number in range(count)}
        for kind in present(plan.peers):
            say(f"{count} programs write 1 MB/s each under {kind.title}")
            with notes.leaving_out(kind.title), kind(programs, keep_logs=KEEP) as contender:
                contender.start()
                contender.wait_running(count)
                rates[kind.title], costs[kind.title] = _windows(contender, str(script), plan)
    title = "log of programs that write 1 MB/s each"
    return [
        Figure("load", f"{title}: taken", "MB/s", rates, more_is_better=True, programs=count, notes=tuple(notes.texts)),
        Figure("load-cpu", f"{title}: CPU of the manager for 1 GB", "s", costs, programs=count),
    ]


def _windows(contender: Contender, script: str, plan: Plan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    writers = [each.pid for each in descendants(contender.main_pid) if script in command_line(each.pid)]
    own = contender.own_pids()
    time.sleep(WARM_SECONDS)
    rates, costs = [], []
    for _ in range(plan.load_rounds):
        start, before, used = time.monotonic(), contender.taken_bytes(writers), cpu_seconds(own)
        time.sleep(plan.load_seconds)
        took, size = time.monotonic() - start, contender.taken_bytes(writers) - before
        used = cpu_seconds(own) - used
        if not size:
            raise TooSlow("nothing of the output was taken")
        rates.append(size / MB / took)
        costs.append(used / (size / 1e9))
        contender.trim()
    return tuple(rates), tuple(costs)

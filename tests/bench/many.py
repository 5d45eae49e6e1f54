"""What it costs to take the output of many programs that print steadily: 1 MB/s each, in lines of 100 bytes.

Each line has its number, and when all is over procman's files are read: nothing may be missing or be there twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.bench.contenders import Contender, Procmand, Supervisord
from tests.bench.figures import Figure
from tests.bench.machine import MB, cpu_seconds
from tests.bench.plan import Plan
from tests.harness import PROGRAMS, log_content, log_files, wait_until

NAMES = ("many",)

RATE = 1_000_000
"""Bytes a second and program."""

LOG_MB = 4
"""Files are rotated so often that all of them are, a few times."""

KEEP = 100

WARM_SECONDS, END_SECONDS = 2.0, 60.0


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Measures CPU seconds per second while all print."""
    script, count = str(PROGRAMS / "paced_lines.py"), plan.programs
    warm = min(WARM_SECONDS, plan.many_seconds)
    seconds = plan.many_seconds + 2 * warm
    command = [sys.executable, "-S", "-E", script, str(RATE), str(seconds)]
    programs = {f"p{number}": command for number in range(count)}
    costs: dict[str, float] = {}
    notes: list[str] = []
    for contender in (
        Procmand(programs, keep_logs=KEEP, log_mb=LOG_MB), Supervisord(programs, keep_logs=KEEP, log_mb=LOG_MB)
    ):  # fmt: skip
        with contender:
            say(f"{count} programs that print {RATE / MB:g} MB/s each under {contender.title}")
            contender.start()
            contender.wait_running(count)
            costs[contender.title] = _window(contender, warm, plan.many_seconds)
            if isinstance(contender, Procmand):
                notes = [_compressor(contender), *_missing(contender, list(programs), seconds)]
    return [
        Figure(
            "many", f"CPU of the manager for {count} programs at 1 MB/s each, a second", "s",
            (costs[Procmand.title],), (costs[Supervisord.title],), notes=tuple(notes),
        )
    ]  # fmt: skip


def _window(contender: Contender, warm: float, seconds: float) -> float:
    own = contender.own_pids()
    time.sleep(warm)
    start, used = time.monotonic(), cpu_seconds(own)
    time.sleep(seconds)
    return (cpu_seconds(own) - used) / (time.monotonic() - start)


def _compressor(procmand: Procmand) -> str:
    used = cpu_seconds(procmand.compressor_pids())
    return f"the compressor, with nice 19, has used {used:.2f} s in all"


def _missing(procmand: Procmand, names: list[str], seconds: float) -> list[str]:
    """What procman's files say, when all that was printed is in them."""
    lines = int(seconds / 0.02) * (RATE // 5000)

    def all_read() -> bool:
        return all(procmand.counters(name)["read"] >= lines * 100 for name in names)

    wait_until(all_read, END_SECONDS, "all is printed")
    wrong = [name for name in names if _numbers(procmand, name) != list(range(lines))]
    if wrong:
        return [f"lines are missing or doubled: {', '.join(wrong)}"]
    return [f"each of {lines * len(names)} lines is in procman's files once"]


def _numbers(procmand: Procmand, name: str) -> list[int]:
    path = procmand.log_dir / f"{name}.log"

    def read() -> list[int]:
        try:
            return [int(line[:9]) for file in log_files(path) for line in log_content(file).splitlines()]
        except FileNotFoundError:  # it was compressed just now
            return []

    return wait_until(read, END_SECONDS, f"{path} is at rest")

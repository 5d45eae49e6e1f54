"""How fast a manager takes what one program prints, and at what cost: 100-byte lines into a file, rotated at 50 MB.

Both programs stand (SIGSTOP) but for the one that is measured. What a manager has taken is what the program has
written: a pipe holds so little that it does not count.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable

from tests.bench.contenders import Contender, Procmand, Supervisord, main_pid
from tests.bench.figures import Figure
from tests.bench.machine import MB, cpu_seconds, written_bytes
from tests.bench.plan import Plan

NAMES = ("logs",)

KEEP = 2
"""Rotated files: so the whole run needs 300 MB of disk."""

WARM_SECONDS = 0.3
"""After SIGCONT, before the window begins."""


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Measures MB/s and CPU seconds per GB, in turns."""
    command = shutil.which("yes")
    if command is None:
        say("logs: not measured, there is no `yes`")
        return []
    programs = {"writer": [command, "x" * 99]}
    with Procmand(programs, keep_logs=KEEP) as procmand, Supervisord(programs, keep_logs=KEEP) as supervisord:
        contenders: list[Contender] = [procmand, supervisord]
        writers = {contender.title: _start(contender, command) for contender in contenders}
        rates: dict[str, list[float]] = {contender.title: [] for contender in contenders}
        costs: dict[str, list[float]] = {contender.title: [] for contender in contenders}
        for number in range(1, plan.log_rounds + 1):
            for contender in contenders:
                say(f"round {number} of {plan.log_rounds}: a writer under {contender.title}")
                rate, cost = _window(contender, writers[contender.title], plan.log_seconds)
                rates[contender.title].append(rate)
                costs[contender.title].append(cost)
        os.kill(writers[procmand.title], signal.SIGCONT)  # it must be able to end by SIGTERM
        lost = procmand.lost_bytes("writer")
    notes = (f"procman dropped {lost / MB:.1f} MB",) if lost else ()
    return [
        Figure(
            "logs", "log throughput of one program, 100-byte lines", "MB/s",
            tuple(rates[procmand.title]), tuple(rates[supervisord.title]), more_is_better=True, notes=notes,
        ),
        Figure(
            "logs-cpu", "CPU of the manager for 1 GB of log", "s",
            tuple(costs[procmand.title]), tuple(costs[supervisord.title]),
        ),
    ]  # fmt: skip


def _start(contender: Contender, command: str) -> int:
    """Starts it and returns the pid of its program, which stands."""
    contender.start()
    pid = main_pid(contender, command)
    os.kill(pid, signal.SIGSTOP)
    return pid


def _window(contender: Contender, writer: int, seconds: float) -> tuple[float, float]:
    """MB/s and CPU seconds per GB while the writer runs."""
    own = contender.own_pids()
    os.kill(writer, signal.SIGCONT)
    try:
        time.sleep(WARM_SECONDS)
        start, written, used = time.monotonic(), written_bytes(writer), cpu_seconds(own)
        time.sleep(seconds)
        took, size = time.monotonic() - start, written_bytes(writer) - written
        used = cpu_seconds(own) - used
    finally:
        os.kill(writer, signal.SIGSTOP)
    return size / MB / took, used / (size / 1e9)

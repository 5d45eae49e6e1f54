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
from tests.harness import log_files, wait_until

NAMES = ("logs",)

KEEP = 2
"""Rotated files: so the whole run needs 300 MB of disk."""

REST_SECONDS = 120.0
"""A bound, not a figure."""

WARM_SECONDS = 0.3
"""After SIGCONT, before the window begins."""


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Measures MB/s and CPU seconds per GB, in turns."""
    command = shutil.which("yes")
    if command is None:
        say("logs: not measured, there is no `yes`")
        return []
    programs = {"writer": [command, "x" * 99]}
    with (
        Procmand(programs, keep_logs=KEEP, compress="none") as plain,
        Procmand(programs, keep_logs=KEEP) as packing,
        Supervisord(programs, keep_logs=KEEP) as supervisord,
    ):
        contenders: list[Contender] = [plain, packing, supervisord]
        writers = {contender: _start(contender, command) for contender in contenders}
        rates: dict[Contender, list[float]] = {contender: [] for contender in contenders}
        costs: dict[Contender, list[float]] = {contender: [] for contender in contenders}
        for number in range(1, plan.log_rounds + 1):
            for contender in contenders:
                say(f"round {number} of {plan.log_rounds}: a writer under {contender.title}")
                rate, cost = _window(contender, writers[contender], plan.log_seconds)
                rates[contender].append(rate)
                costs[contender].append(cost)
                if contender is packing:
                    _rest(packing)
        for procmand in (plain, packing):
            os.kill(writers[procmand], signal.SIGCONT)  # it must be able to end by SIGTERM
        lost = plain.lost_bytes("writer") + packing.lost_bytes("writer")
        beside = cpu_seconds(packing.compressor_pids()) / (packing.counters("writer")["written"] / 1e9)
    notes = (f"procman dropped {lost / MB:.1f} MB",) if lost else ()
    aside = f"beside it the compressor, with nice 19, has used {beside:.2f} s for each GB that was written"
    return [
        figure
        for name, title, procmand, more in (
            ("logs", "", plain, notes), ("logs-gzip", ", rotated files compressed", packing, (aside,)),
        )
        for figure in (
            Figure(
                name, f"log throughput of one program, 100-byte lines{title}", "MB/s",
                tuple(rates[procmand]), tuple(rates[supervisord]), more_is_better=True, notes=more,
            ),
            Figure(
                f"{name}-cpu", f"CPU of the manager for 1 GB of log{title}", "s",
                tuple(costs[procmand]), tuple(costs[supervisord]),
            ),
        )
    ]  # fmt: skip


def _rest(procmand: Procmand) -> None:
    """Waits until all is compressed: it would take part of the next one's window."""
    path = procmand.log_dir / "writer.log"
    wait_until(lambda: all(file.suffix == ".gz" for file in log_files(path)[:-1]), REST_SECONDS, "all is compressed")


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

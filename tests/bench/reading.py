"""How fast `procmanctl logs` answers on a large log, and how much memory it takes, in the daemon and in the command.

One log of many GB, whose lines have times, under a daemon of one program that prints nothing. Each row is asked of the
daemon, and of the files with no daemon (`-c`), by the `procmanctl` that users run (see `tools`). No other manager is
asked: Supervisor's `tail` gives bytes, no lines.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from procman.client import Client
from tests.bench import tools
from tests.bench.figures import digits, percentile
from tests.bench.machine import MB
from tests.bench.plan import Plan
from tests.harness import RunningDaemon

NAMES = ("reading",)

TABLE = """
[program.big]
command = ["sleep", "1000000"]
log = { max_size = 0 }

[program.other]
command = ["sleep", "1000000"]
log = { max_size = 0 }
"""
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SIZE = 100
"""Bytes of a line."""

MINUTE_LINES = 60_000
"""Lines of one minute."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to ask: milliseconds by the clock and of CPU time of the command, which others on the machine change
    less; and MB. An empty tuple where it makes no sense."""

    title: str
    by_daemon: tuple[float, ...]
    by_files: tuple[float, ...] = ()
    cpu_by_daemon: tuple[float, ...] = ()
    cpu_by_files: tuple[float, ...] = ()
    memory_mb: float = 0.0
    daemon_memory_mb: float = 0.0

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(plan: Plan, say: Callable[[str], None]) -> list[Row]:
    """All rows."""
    running = RunningDaemon(TABLE)
    try:
        running.log_dir.mkdir()
        say(f"writing a log of {plan.reading_gb} GB")
        last = _write(running.log_dir / "big.log", int(plan.reading_gb * 1e9))
        _write(running.log_dir / "other.log", int(plan.reading_gb * 1e7))
        running.start()
        rows = list(_rows(running, plan, last, say))
    finally:
        wrong = running.close()
    if wrong:
        say("; ".join(wrong))
    return rows


def _write(path: Path, size: int) -> datetime:
    """Lines of 100 bytes with times that grow; the time of the last minute."""
    line = b"[%s 12:34:56 +0000] [4711] [INFO] GET /a/path/that/is/asked/for 200 in 12 ms, for " % (b"0" * 10)
    block = (line.ljust(SIZE - 1, b".") + b"\n") * MINUTE_LINES
    moment = BEGIN
    with open(path, "wb", buffering=0) as file:
        for _ in range(max(1, size // len(block))):
            moment += timedelta(minutes=1)
            file.write(block.replace(b"0000000000 12:34:56", moment.strftime("%Y-%m-%d %H:%M:00").encode()))
        file.write(b"[%s +0000] [4711] [ERROR] needle\n" % moment.strftime("%Y-%m-%d %H:%M:30").encode())
    return moment


def _rows(running: RunningDaemon, plan: Plan, last: datetime, say: Callable[[str], None]) -> Iterator[Row]:
    since = ["--since", last.isoformat()]
    asked: Sequence[tuple[str, list[str], int]] = (
        ("logs -n 100", ["big", "-n", "100"], plan.reading_calls),
        ("logs -n 100 of two programs", ["big", "other", "-n", "100"], plan.reading_calls),
        ("logs --since (the last minute) -n 100", ["big", *since, "-n", "100"], plan.reading_calls),
        ("logs -n 1 --level error", ["big", "-n", "1", "--level", "error"], plan.reading_calls),
        ("logs --grep of what is nowhere, all of it", ["big", "--grep", "no-such-thing"], 1),
        ("all of it, to /dev/null", ["big", "-n", "999999999999"], 1),
    )
    for title, code in (("python -c pass (the limit)", "pass"), ("the same, and what logs imports", IMPORTING)):
        command = [*tools.python(), "-c", code]
        took = _times(command, plan.reading_calls)
        yield Row(title, took.clock, cpu_by_daemon=took.cpu)
    yield Row("the answer alone: logs.files and logs.read", tuple(_answers(running, plan.reading_calls)))
    table = running.folder / "elsewhere.toml"  # its socket is nobody's
    table.write_text(running.table.read_text().replace(str(running.socket), f"{running.socket}-"))
    by_daemon, by_files = (
        _without_start([*where, "logs", "big", "-n", "100"], plan.reading_calls)
        for where in (["-s", str(running.socket)], ["-c", str(table)])
    )
    yield Row("logs -n 100, without the start of Python and imports", by_daemon, by_files)
    for title, arguments, calls in asked:
        say(title)
        base = tools.procman("procmanctl")
        asking = _times([*base, "-s", str(running.socket), "logs", *arguments], calls)
        daemon_memory = _peak_mb(running.supervisor_pid)
        reading = _times([*base, "-c", str(table), "logs", *arguments], calls)
        peak = max(asking.peak_mb, reading.peak_mb)
        yield Row(title, asking.clock, reading.clock, asking.cpu, reading.cpu, peak, daemon_memory)


IMPORTING = "import procman.ctl.main, procman.ctl.logs, procman.ctl.logtext"
WITHIN = """
import os, sys, time
from procman.ctl.main import main
shown, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 1)
for call in range(int(sys.argv[1]) + 1):  # the first one imports what it needs
    start = time.monotonic()
    main(sys.argv[2:])
    os.write(shown, b"%f\\n" % ((time.monotonic() - start) * 1000))
"""


def _without_start(arguments: list[str], calls: int) -> tuple[float, ...]:
    """Milliseconds of the same command again and again in one process."""
    command = [*tools.python(), "-c", WITHIN, str(calls), *arguments]
    done = subprocess.run(command, env=tools.procman_environment({}), capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))[1:]


class Took(NamedTuple):
    """Milliseconds of each call of a command, by the clock and of CPU time; the largest memory (RSS) of one, in MB."""

    clock: tuple[float, ...]
    cpu: tuple[float, ...]
    peak_mb: float


def _times(command: list[str], calls: int) -> Took:
    found: list[tuple[float, float]] = []
    peak = 0.0
    environment = tools.procman_environment({})
    for call in range(calls + 1 if calls > 1 else 1):
        start = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        pid = 0
        while not pid:
            if call == 0:  # rusage would tell the memory that this process has
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
                    peak = max(peak, _peak_mb(process.pid))
                time.sleep(0.002)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG if call == 0 else 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}")
        found.append(((time.monotonic() - start) * 1000, (usage.ru_utime + usage.ru_stime) * 1000))
    clock, cpu = zip(*(found[1:] or found), strict=True)
    return Took(clock, cpu, peak)


def _answers(running: RunningDaemon, calls: int) -> Iterator[float]:
    with Client(str(running.socket), 30) as client:
        for _ in range(calls):
            start = time.monotonic()
            file = client.call("logs.files", names=["big"])["sources"][0]["files"][-1]
            offset = file["bytes"] - 65536
            client.call("logs.read", name="big", file=file["file"], offset=max(0, offset), bytes=65536)
            yield (time.monotonic() - start) * 1000


def _peak_mb(pid: int) -> float:
    """The largest memory (RSS) that a process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def table(rows: Sequence[Row]) -> Iterator[str]:
    """As Markdown."""
    head = ("", "by the daemon, ms", "CPU", "by the files, ms", "CPU", "memory, MB", "daemon's peak, MB")
    lines = [
        (
            row.title,
            *map(_cell, (row.by_daemon, row.cpu_by_daemon, row.by_files, row.cpu_by_files)),
            *map(_number, (row.memory_mb, row.daemon_memory_mb)),
        )
        for row in rows
    ]
    for line in (head, ("---",) * len(head), *lines):
        yield f"| {' | '.join(line)} |"


def _cell(samples: Sequence[float]) -> str:
    if not samples:
        return "–"
    return f"{digits(percentile(samples, 50))} ({digits(min(samples))}–{digits(max(samples))})"


def _number(value: float) -> str:
    return digits(value) if value else "–"

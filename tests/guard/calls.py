"""System calls of a process that runs, counted by strace(1). Where that is not there, or not allowed, it says why."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import wait_until


@dataclass(slots=True)
class Calls:
    """How often each was made; filled when the block has ended."""

    by_name: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


def missing() -> str:
    """Why nothing can be counted here, "" where it can."""
    command = shutil.which("strace")
    if command is None:
        return "there is no strace (apt install strace)"
    done = subprocess.run([command, "-c", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"strace is not allowed here: {done.stderr.strip()[:200]}"


@contextlib.contextmanager
def counted(pid: int) -> Iterator[Calls]:
    """Those of all threads of this process in the block."""
    calls = Calls()
    with tempfile.TemporaryDirectory() as folder:
        report, said = Path(folder) / "report", Path(folder) / "said"
        with said.open("wb") as errors:
            strace = subprocess.Popen(["strace", "-f", "-c", "-o", str(report), "-p", str(pid)], stderr=errors)
        try:
            wait_until(lambda: b"attached" in said.read_bytes(), what="strace is attached")
            yield calls
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(20)
        calls.by_name = _counts(report.read_text())


def _counts(report: str) -> dict[str, int]:
    """Of the table that strace prints: % time, seconds, usecs/call, calls, errors (or nothing), name."""
    rows = [line.split() for line in report.splitlines()]
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}

"""The end of what a program has printed: its last lines, its last traceback. It reads the disk: for a thread."""

from __future__ import annotations

import time

from procman import launch, logread, report
from procman.config import Program
from procman.report import Info

MAX_BYTES = 64 * 1024
"""Of the end of a log that are looked at."""


def last_lines(program: Program, lines: int) -> list[str]:
    """Its last lines, at most MAX_BYTES of them; standard error's where they are apart. Raises Failed."""
    sources = launch.log_sources(program)
    if not sources:
        return []
    source = sources[-1]
    data, _ = logread.tail(source.path, lines, source.keep, MAX_BYTES)
    return data.decode(errors="replace").splitlines()[-lines:]


def last_traceback(program: Program) -> Info | None:
    """The last traceback in the last MAX_BYTES of its output, None where there is none; that of standard error first,
    where they are apart. Raises Failed."""
    from procman import logrecords  # for the rare moment when somebody asks: it has many patterns
    from procman.logformat import Clock

    clock = Clock(time.time())
    for source in reversed(launch.log_sources(program)):
        data, _ = logread.tail(source.path, MAX_BYTES, source.keep, MAX_BYTES)
        found = logrecords.last_traceback(data, clock)
        if found is not None:
            return report.traceback(found)
    return None

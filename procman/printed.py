"""The end of what a program has printed: its last lines, its last traceback. It reads the disk: for a thread.

`recent` is the end of each stream, standard error last, of a program whose output goes to no file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from procman import launch, logread, report
from procman.config import Program
from procman.report import Info

MAX_BYTES = 64 * 1024
"""Of the end of a log that are looked at."""


def last_lines(program: Program, lines: int, recent: Sequence[bytes]) -> list[str]:
    """Its last lines, at most MAX_BYTES of them; standard error's where they are apart. Raises Failed."""
    data = next(_ends(program, lines, recent), b"")
    return data.decode(errors="replace").splitlines()[-lines:]


def last_traceback(program: Program, recent: Sequence[bytes]) -> Info | None:
    """The last traceback in the last MAX_BYTES of its output, None where there is none; that of standard error first,
    where they are apart. Raises Failed."""
    from procman import logrecords  # for the rare moment when somebody asks: it has many patterns
    from procman.logformat import Clock

    clock = Clock(time.time())
    for data in _ends(program, MAX_BYTES, recent):
        found = logrecords.last_traceback(data, clock)
        if found is not None:
            return report.traceback(found)
    return None


def _ends(program: Program, lines: int, recent: Sequence[bytes]) -> Iterator[bytes]:
    """The end of each stream, that of standard error first."""
    yield from reversed(recent)
    for source in reversed(launch.log_sources(program)):
        yield logread.tail(source.path, lines, MAX_BYTES)[0]

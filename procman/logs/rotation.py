"""When a log file is rotated by the clock, which rotated files go first. Pure.

    rotate_every   boundary
    hourly         each full hour of local time
    daily          each local midnight
    weekly         the local midnight at which a Monday begins

A file is due when something was written to it before the last boundary. So nothing has to be remembered: a daemon that
was down over midnight finds the file's time of last writing (mtime) before it.

Local time jumps. What counts is the first moment that belongs to the new hour or day, by the clock on the wall:

    a midnight that does not exist (clocks go from 00:00 to 01:00)   the day begins with the jump
    one that comes twice (from 01:00 back to 00:00)                  it begins with the first one
    an hour that comes twice (from 03:00 back to 02:00)              begins twice

Knows no files and no clock. `zone` is None for the local time of this machine (localtime(3)).
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable

from procman.config import Every
from procman.records import dataclass

QUARTER = 900.0
"""Seconds. No zone's clock shows a full hour at another moment than a full quarter of UTC."""

NEXT_DAYS = {"daily": 1, "weekly": 7}


def last_boundary(when: float, every: Every, zone: dt.tzinfo | None = None) -> float:
    """The latest boundary at or before `when` (seconds since the epoch)."""
    local = dt.datetime.fromtimestamp(math.floor(when), zone)  # else it is rounded, and may come behind a boundary
    if every == "hourly":
        hour = local.replace(minute=0, second=0, microsecond=0)
        both = (hour.replace(fold=fold).timestamp() for fold in (0, 1))
        return max((moment for moment in both if moment <= when), default=when)
    day = local.date()
    if every == "weekly":
        day -= dt.timedelta(days=day.weekday())
    return _midnight(day, zone)


def next_boundary(when: float, every: Every, zone: dt.tzinfo | None = None) -> float:
    """The earliest boundary after `when`."""
    last = last_boundary(when, every, zone)
    if every == "hourly":
        moment = when - when % QUARTER
        while last_boundary(moment, every, zone) <= last:
            moment += QUARTER
        return last_boundary(moment, every, zone)
    day = dt.datetime.fromtimestamp(last, zone).date()
    while True:
        day += dt.timedelta(days=NEXT_DAYS[every])
        if (midnight := _midnight(day, zone)) > when:
            return midnight


def due(written: float, now: float, every: Every, zone: dt.tzinfo | None = None) -> bool:
    """Whether a file that was last written at `written` belongs to an hour, day or week that is over. A time in the
    future (the clock was set back) does not count."""
    return bool(every) and written < last_boundary(now, every, zone)


def _midnight(day: dt.date, zone: dt.tzinfo | None) -> float:
    """The first moment of a day. One that the clock skips is the moment of the jump (PEP 495: fold 0 in a gap)."""
    return dt.datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


@dataclass(frozen=True, slots=True)
class Rotated:
    """A rotated file: of the log at `path`, number `number`; `written` is its mtime, `size` its bytes on the disk.
    `newest`: it may not go, since it waits for its compression."""

    path: str
    number: int
    written: float
    size: int
    newest: bool = False

    @property
    def _age(self) -> tuple[float, str, int]:
        return (self.written, self.path, -self.number)


def oldest_first(files: Iterable[Rotated]) -> list[Rotated]:
    """In the order in which they go."""
    return sorted(files, key=lambda file: file._age)


def surplus(files: Iterable[Rotated], total: int) -> list[Rotated]:
    """Those that go, the oldest first, so that the others have at most `total` bytes. 0: none goes."""
    ordered = oldest_first(files)
    size = sum(file.size for file in ordered)
    gone: list[Rotated] = []
    for file in ordered:
        if not total or size <= total:
            break
        if not file.newest:
            gone.append(file)
            size -= file.size
    return gone

"""In which zone a log tells those of its times that name none.

A program may live by another zone than the machine: Django sets the one of its settings (UTC unless told otherwise) for
its whole process. Its lines say 09:00 where the clock on the wall says 10:00, and beside them in the same log are
others that name a zone, those of an access log. What tells the zone is what a line stands between: lines with exact
times, and the moments at which the file before and this one were last written.

Pure. Each line votes for the offsets from UTC with which it is where it belongs. Local time is taken where no other
offset has more votes. Lines that are too rare for a sample to hold any are understood when they come (`Records`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import NamedTuple

from procman.logformat import Clock
from procman.logrecords import CROWD, DISORDER, OFFSETS, Records, crowded

SAMPLES = (4 * 1024, 16 * 1024), (4 * 1024,), (4 * 1024,)
"""Bytes that are looked at of each file, the newest first: more where less tells nothing."""


class Sample(NamedTuple):
    """Some bytes of a file. It was `written` last then, and the file before it `before` (None: there is none), in
    seconds since the epoch. `begins`: the first byte begins a line. `ends`: the last one is the last one of the file.
    """

    data: bytes
    before: float | None
    written: float
    begins: bool
    ends: bool


class _Time(NamedTuple):
    """A time that names no zone, as if it were UTC, and between which moments it was printed."""

    told: float
    earliest: float
    latest: float


def zone(samples: Iterable[Sample], clock: Clock) -> tzinfo | None:
    """The zone of a log, by samples of its files, the newest first; None where it is that of `clock`."""
    votes: Counter[int | None] = Counter()
    for sample in samples:
        times = _times(sample, clock.now)
        for time in _unknown(times, sample):
            votes.update(_fitting(time, clock))
        if not votes and crowded([told for told, exact in times if exact][-CROWD:]):
            return None
        most = max(votes.values(), default=0)
        best = [offset for offset in (None, *OFFSETS) if most and votes[offset] == most]
        if len(best) == 1 or (best and None not in best):
            return None if best[0] is None else timezone(timedelta(minutes=best[0]))
    return None


def _times(sample: Sample, now: float) -> list[tuple[float, bool]]:
    """The times of a sample, and whether they are exact; the others as if they were UTC. NaN is one of the last record,
    where that tells none."""
    maker = Records(Clock(now, UTC), "record" if sample.begins else "within")
    heads = [record.said[0] for record in (*maker.feed(sample.data), *maker.end())]
    times = [(said.time, said.exact) for said in heads if said.time is not None]
    return times if times and heads[-1].time is not None else [*times, (math.nan, False)]


def _unknown(times: Sequence[tuple[float, bool]], sample: Sample) -> Iterator[_Time]:
    """Those that name no zone."""
    next_ones, latest = [], sample.written
    for told, exact in reversed(times):
        latest = told if exact else latest
        next_ones.append(latest)
    earliest = -math.inf if sample.before is None else sample.before
    for number, ((told, exact), latest) in enumerate(zip(times, reversed(next_ones), strict=True)):
        if exact:
            earliest = told
        elif math.isnan(told):
            return
        elif number == len(times) - 1 and sample.ends:
            yield _Time(told, max(earliest, sample.written), latest)
        else:
            yield _Time(told, earliest, latest)


def _fitting(time: _Time, clock: Clock) -> Iterator[int | None]:
    """The offsets in minutes with which a time is where it belongs; None for local time, and not that offset again."""
    naive = datetime.fromtimestamp(time.told, UTC).replace(tzinfo=clock.zone)
    local = {naive.timestamp(), naive.replace(fold=1).timestamp()}
    if any(time.earliest - DISORDER <= at <= time.latest + DISORDER for at in local):
        yield None
    least, most = (time.told - time.latest - DISORDER) / 60, (time.told - time.earliest + DISORDER) / 60
    yield from (offset for offset in OFFSETS if least <= offset <= most and time.told - offset * 60 not in local)

"""procman.logzones: in which zone a log tells the times that name none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman.logformat import Clock, parse
from procman.logrecords import OFFSETS, Records
from procman.logzones import Sample, zone

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp()
BERLIN, NEW_YORK, KATHMANDU = map(ZoneInfo, ("Europe/Berlin", "America/New_York", "Asia/Kathmandu"))


def app(at: float, where: tzinfo) -> str:
    """A line of `logging` of a program that lives by the time of `where`."""
    return f"{datetime.fromtimestamp(at, where):%Y-%m-%d %H:%M:%S},123 INFO view called\n"


def access(at: float) -> str:
    """A line of gunicorn's access log."""
    return f'1.1.1.1 - - [{datetime.fromtimestamp(at, UTC):%d/%b/%Y:%H:%M:%S} +0000] "GET / HTTP/1.1" 200 2 "-" "-"\n'


def found(lines: Sequence[str], here: tzinfo, *, written: float = NOW, before: float | None = None) -> tzinfo | None:
    sample = Sample("".join(lines).encode(), before, written, begins=True, ends=True)
    return zone([sample], Clock(NOW, here))


@pytest.mark.parametrize("here", [UTC, BERLIN, NEW_YORK, KATHMANDU])
@pytest.mark.parametrize("there", [UTC, BERLIN, NEW_YORK, KATHMANDU])
@pytest.mark.parametrize("kind", ["alone", "busy", "followed by another", "followed by a print"])
def test_a_time_is_when_it_was_whatever_the_zone_here_and_there(here: tzinfo, there: tzinfo, kind: str) -> None:
    begin = NOW - 1800
    lines = [app(begin + 60 * number, there) for number in range(31)]
    if kind == "busy":
        lines = [line + access(begin + 60 * number) * 3 for number, line in enumerate(lines)]
    if kind == "followed by another":
        lines = [access(begin), *lines[:2], access(begin + 90), *(access(begin + n) for n in range(600, 1800, 60))]
    if kind == "followed by a print":
        lines = [access(begin), lines[1], access(begin + 60), lines[2], "printed\n"]
    shown = found(lines, here)
    told = parse(lines[1].split("\n")[0].encode(), Clock(NOW, shown or here))
    assert told.time == pytest.approx(begin + 60.123)
    ours, theirs = (datetime.fromtimestamp(NOW, where).utcoffset() for where in (here, there))
    assert (shown is None) == (ours == theirs)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["no time at all\n"],
        [access(NOW - 5)],
        [app(NOW - 3 * 3600, BERLIN), "printed\n"],  # the last time is old, but something was printed since
        [app(NOW - 1234, BERLIN)],  # such a zone there is not
        [app(NOW - 3600, BERLIN), access(NOW - 1)],
        [app(NOW - 7, BERLIN), "[pid: 5|app: 0|req: 1/1] x [Fri Nov 27 12:00:00 2026] GET / =>\n", app(NOW, BERLIN)],
    ],
)
def test_local_time_is_taken_where_nothing_speaks_against_it(lines: list[str]) -> None:
    assert found(lines, BERLIN) is None


def test_a_time_ahead_of_the_clock_is_of_another_zone() -> None:
    assert found([app(NOW, UTC), "printed\n"], NEW_YORK) == UTC


def test_an_hour_that_comes_twice_is_local() -> None:
    """In Berlin on 2026-10-25: half an hour after the clocks were set back, and the lines of the hour before it."""
    at = datetime(2026, 10, 25, 1, 30, tzinfo=UTC).timestamp()
    lines = [app(at - 60 * ago, BERLIN) for ago in range(70, -1, -1)]
    sample = Sample("".join(lines).encode(), None, at, begins=True, ends=True)
    assert zone([sample], Clock(at, BERLIN)) is None


def test_just_after_a_rotation_the_file_before_tells_it() -> None:
    full = Sample(("cut off " + app(NOW - 60, UTC) * 3).encode(), None, NOW - 60, begins=False, ends=True)
    empty = Sample(b"", NOW - 60, NOW - 59, begins=True, ends=True)
    assert zone([empty, full], Clock(NOW, BERLIN)) == UTC
    beside = (access(NOW - 900) + app(NOW - 899, UTC) + access(NOW - 898)).encode()
    assert zone([empty, Sample(beside, None, NOW - 60, begins=True, ends=False)], Clock(NOW, BERLIN)) == UTC
    alone = app(NOW - 9000, UTC).encode()  # of a compressed file the beginning is read
    for before, expected in ((None, None), (NOW - 9001, UTC)):
        assert zone([empty, Sample(alone, before, NOW - 60, begins=True, ends=False)], Clock(NOW, BERLIN)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=3, max_size=60), st.sampled_from(OFFSETS))
def test_any_zone_is_seen_in_a_log_that_somebody_uses(steps: list[tuple[int, bool]], offset: int) -> None:
    """Also where some lines are a little late, and a request has taken long."""
    there, at, lines = timezone(timedelta(minutes=offset)), NOW - 3000, []
    for number, (step, exact) in enumerate(steps):
        at += step
        late = at - number % 2 * 20
        lines.append(access(late) if exact else app(late, there))
    lines += [app(at, there), app(at + 900, there)]
    shown = found(lines, UTC, written=at + 900)
    assert (shown or UTC).utcoffset(None) == timedelta(minutes=offset)


@pytest.mark.parametrize("here", [UTC, BERLIN, NEW_YORK])
@pytest.mark.parametrize("there", [UTC, BERLIN])
def test_lines_that_are_rare_are_understood_by_those_around_them(here: tzinfo, there: tzinfo) -> None:
    """Also where two zones take turns, as of uWSGI and of a Django in it."""
    maker, expected, lines = Records(Clock(NOW, here)), [], []
    for number in range(2000):
        at = NOW - 2000 + number
        rare = number % 300 == 299
        lines.append(access(at) if not rare else app(at, there if number < 1000 else here))
        expected.append(at + 0.123 * rare)
    found = [*maker.feed("".join(lines).encode()), *maker.end()]
    assert [record.at for record in found] == pytest.approx(expected)


def test_lines_that_are_rare_and_far_from_others_are_local() -> None:
    """What is done each hour, and then asked for: not one of these times is of another zone."""
    hours = [NOW - 3600 * hour for hour in range(40, 0, -1)]
    lines = [app(at, BERLIN) + access(at + 1) for at in hours]
    maker = Records(Clock(NOW, BERLIN))
    found = [*maker.feed("".join(lines).encode()), *maker.end()]
    assert [record.at for record in found[::2]] == pytest.approx([at + 0.123 for at in hours])


@given(st.binary(max_size=500), st.booleans())
def test_any_bytes_have_a_zone(data: bytes, begins: bool) -> None:
    assert zone([Sample(data + b"\n" + app(NOW, UTC).encode(), None, NOW, begins, ends=True)], Clock(NOW, UTC)) is None

"""procman.logs.rotation: tables of the days on which local time jumps, and what holds for all days."""

from __future__ import annotations

import datetime as dt
import time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from procman.config import Every
from procman.lognames import clashes, owners, split
from procman.logs.rotation import Rotated, due, last_boundary, next_boundary, oldest_first, surplus

EVERY: list[Every] = ["hourly", "daily", "weekly"]
ZONES = [
    *("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe"),
    *("America/Sao_Paulo", "America/Havana", "Asia/Beirut", "Africa/Cairo", "Atlantic/Azores", "Pacific/Apia"),
]


def utc(text: str) -> float:
    """Seconds since the epoch of "2026-03-29 01:00" in UTC."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp()


# zone, every, now (UTC) -> last boundary, next boundary (UTC)
BOUNDARIES: list[tuple[str, Every, str, str, str]] = [
    ("UTC", "hourly", "2026-05-05 10:59", "2026-05-05 10:00", "2026-05-05 11:00"),
    ("UTC", "hourly", "2026-05-05 11:00", "2026-05-05 11:00", "2026-05-05 12:00"),
    ("Asia/Kolkata", "hourly", "2026-05-05 10:29", "2026-05-05 09:30", "2026-05-05 10:30"),  # UTC+05:30
    ("Asia/Kathmandu", "hourly", "2026-05-05 10:29", "2026-05-05 10:15", "2026-05-05 11:15"),  # UTC+05:45
    # Germany, 2026-03-29: from 02:00 to 03:00, so that day has 23 hours; 2026-10-25: from 03:00 back to 02:00, it has
    # 25
    ("Europe/Berlin", "daily", "2026-03-29 12:00", "2026-03-28 23:00", "2026-03-29 22:00"),
    ("Europe/Berlin", "daily", "2026-10-25 12:00", "2026-10-24 22:00", "2026-10-25 23:00"),
    ("Europe/Berlin", "hourly", "2026-03-29 00:30", "2026-03-29 00:00", "2026-03-29 01:00"),
    ("Europe/Berlin", "hourly", "2026-03-29 01:00", "2026-03-29 01:00", "2026-03-29 02:00"),
    ("Europe/Berlin", "hourly", "2026-10-25 00:30", "2026-10-25 00:00", "2026-10-25 01:00"),  # the first 02:30
    ("Europe/Berlin", "hourly", "2026-10-25 01:30", "2026-10-25 01:00", "2026-10-25 02:00"),  # the second 02:30
    ("Europe/Berlin", "weekly", "2026-03-29 12:00", "2026-03-22 23:00", "2026-03-29 22:00"),  # a Sunday
    ("Europe/Berlin", "weekly", "2026-03-30 12:00", "2026-03-29 22:00", "2026-04-05 22:00"),  # a Monday
    # Brazil, 2018-11-04: from 00:00 to 01:00, there is no midnight; 2018-02-18: from 00:00 back to 23:00 of the day
    # before
    ("America/Sao_Paulo", "daily", "2018-11-04 12:00", "2018-11-04 03:00", "2018-11-05 02:00"),
    ("America/Sao_Paulo", "daily", "2018-11-04 02:59", "2018-11-03 03:00", "2018-11-04 03:00"),
    ("America/Sao_Paulo", "daily", "2018-02-18 02:30", "2018-02-17 02:00", "2018-02-18 03:00"),  # the second 23:30
    # Cuba, 2026-11-01: from 01:00 back to 00:00, midnight comes twice
    ("America/Havana", "daily", "2026-11-01 05:30", "2026-11-01 04:00", "2026-11-02 05:00"),
    ("America/Havana", "daily", "2026-11-01 03:59", "2026-10-31 04:00", "2026-11-01 04:00"),
    # Lord Howe, 2026-04-05: from 02:00 back to 01:30; no clock shows 02:00 until half an hour later
    ("Australia/Lord_Howe", "hourly", "2026-04-04 15:15", "2026-04-04 14:00", "2026-04-04 15:30"),
    # Samoa had no 2011-12-30
    ("Pacific/Apia", "daily", "2011-12-30 09:59", "2011-12-29 10:00", "2011-12-30 10:00"),
    ("Pacific/Apia", "daily", "2011-12-30 12:00", "2011-12-30 10:00", "2011-12-31 10:00"),
]


@pytest.mark.parametrize(("zone", "every", "now", "last", "next_"), BOUNDARIES)
def test_boundaries(zone: str, every: Every, now: str, last: str, next_: str) -> None:
    tz = ZoneInfo(zone)
    assert last_boundary(utc(now), every, tz) == utc(last)
    assert next_boundary(utc(now), every, tz) == utc(next_)


MOMENTS = st.floats(utc("1990-01-01 00:00"), utc("2037-12-31 00:00"))


@given(MOMENTS, st.sampled_from(EVERY), st.sampled_from(ZONES))
@example(utc("2011-12-30 10:00"), "daily", "Pacific/Apia")
@example(utc("2026-11-01 04:00"), "daily", "America/Havana")
@example(utc("2026-04-04 15:00"), "hourly", "Australia/Lord_Howe")
def test_each_moment_lies_between_two_boundaries(now: float, every: Every, zone: str) -> None:
    tz = ZoneInfo(zone)
    last, next_ = last_boundary(now, every, tz), next_boundary(now, every, tz)
    assert last <= now < next_
    assert last_boundary(last, every, tz) == last
    assert last_boundary(next_, every, tz) == next_
    assert last_boundary(max(now, next_ - 0.5), every, tz) == last  # there is none in between
    longest = {"hourly": 2 * 3600, "daily": 26 * 3600, "weekly": 8 * 86400}[every]
    assert 1800 <= next_ - last <= longest
    local = dt.datetime.fromtimestamp(next_, tz)
    jumped = tz.utcoffset(dt.datetime.fromtimestamp(next_ - 1, tz)) != local.utcoffset()
    assert jumped or (local.minute == 0 and (every == "hourly" or local.hour == 0))
    assert every != "weekly" or local.weekday() == 0


@given(MOMENTS, st.floats(0, 10 * 86400), st.sampled_from(EVERY), st.sampled_from(ZONES))
def test_a_file_is_due_once_for_each_boundary(written: float, later: float, every: Every, zone: str) -> None:
    """However long the daemon was down: when it looks, the file of a time that is over is due, and the new one is
    not."""
    tz = ZoneInfo(zone)
    now = written + later
    assert due(written, now, every, tz) == (next_boundary(written, every, tz) <= now)
    assert not due(now, now, every, tz)
    assert not due(now, written, every, tz)  # the clock was set back


def test_nothing_is_due_where_nothing_is_asked_for() -> None:
    assert not due(0.0, 2e9, "")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe"])
@pytest.mark.parametrize("every", EVERY)
def test_the_local_time_of_this_machine_is_a_zone_like_any_other(
    zone: str, every: Every, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        moment = utc("2018-01-01 00:10")
        for _ in range(1500):  # a year, at odd moments
            moment += 21_017
            assert last_boundary(moment, every) == last_boundary(moment, every, ZoneInfo(zone))
            assert next_boundary(moment, every) == next_boundary(moment, every, ZoneInfo(zone))
    finally:
        monkeypatch.undo()
        time.tzset()


# --- which go first ---------------------------------------------------------------------------------------------------

FILES = st.lists(
    st.builds(
        Rotated, st.sampled_from(["a", "b"]), st.integers(1, 9), st.floats(0, 100), st.integers(0, 50), st.booleans()
    ),
    max_size=12,
)


@given(FILES, st.integers(0, 200))
def test_the_oldest_go_until_the_rest_is_small_enough(files: list[Rotated], total: int) -> None:
    gone = surplus(files, total)
    left = list(files)
    for file in gone:
        left.remove(file)
    assert not any(file.newest for file in gone)
    size = sum(file.size for file in left)
    if not total:
        assert not gone
        return
    assert size <= total or all(file.newest for file in left)
    if gone:
        assert size + gone[-1].size > total  # no more than is needed
    assert [file for file in oldest_first(files) if not file.newest][: len(gone)] == gone


def test_of_the_same_moment_the_higher_number_goes_first() -> None:
    files = [Rotated("log", number, 5.0, 1) for number in (1, 3, 2)]
    assert [file.number for file in oldest_first(files)] == [3, 2, 1]


def test_only_names_that_we_give_are_ours() -> None:
    ours = ["log", "log.1", "log.2.gz", "log.2", "log.10.gz"]
    others = ["log.03", "log.0", "log.x", "log.1.bz2", "log.gz.partial", "xlog.4", "log.5.gz.gz", "log.123456"]
    found = [split(name) for name in [*ours, *others]]
    assert sorted(number for log, number in filter(None, found) if log == "log") == [1, 2, 2, 10]
    assert split("log.1.2") == ("log.1", 2)


def test_names_that_a_log_takes_for_its_files() -> None:
    ours = ["log.1", "log.2.gz", "log.partial", "log.next", "log.gz.partial"]
    assert all("log" in owners(name) for name in ours)
    assert not any(owners(name) for name in ["log", "log.gz", "log.03", "log.partial.x", ".partial", "1"])


def test_logs_that_would_take_files_of_each_other() -> None:
    asked = []

    def real(folder: str) -> str:
        asked.append(folder)
        return {"/link": "/logs"}.get(folder, folder)

    paths = ["/logs/a.log", "/link/a.log", "/link/a.log.1", "/other/a.log", "/logs/b.log.2.gz"]
    assert clashes([*paths, "/x/c.log", "/x/c.log.next"], real) == {
        "/link/a.log": "/logs/a.log",
        "/link/a.log.1": "/logs/a.log",
        "/x/c.log.next": "/x/c.log",
    }
    assert "/x" not in asked, "where names can't clash no disk is asked"

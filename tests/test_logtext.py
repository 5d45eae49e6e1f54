"""procman.logrecords, logsummary, unzip, moments and ctl.logtext: any log, in any files, gives what reading all of it
gives."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
import re
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import logformat, logrecords, logsummary, moments, terminal, tracebacks
from procman.ctl import logtext, summing
from procman.ctl.library import File, Heard, Places, Source
from procman.ctl.logtext import LogText, Place
from procman.logformat import Clock
from procman.logrecords import RECORD_MAX, Filter, Record, Records, Whole
from procman.unzip import COPIES_MAX, Unzipped
from tests.guarantees.fuzz.inputs import touched

FORMATS = Path(__file__).parent / "formats"
CLOCK = Clock(datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp(), UTC)
REAL = {path.stem: path.read_bytes() for path in sorted(FORMATS.glob("*.log"))}


def records(data: bytes, cut: int = 1 << 30) -> list[Record]:
    """All of them, from pieces of `cut` bytes."""
    maker = Records(CLOCK)
    found = [record for at in range(0, len(data), cut) for record in maker.feed(data[at : at + cut])]
    return [*found, *maker.end()]


@pytest.mark.parametrize("own", ["", "2026-11-27T05:33:43.5Z "])
def test_an_access_line_without_an_address_begins_a_record(own: str) -> None:
    """gunicorn prints such a one over a Unix socket: nginx has no address there."""
    answer = ' - - [27/Nov/2026:05:33:43 +0000] "GET / HTTP/1.0" 200 11 "-" "-"\n'
    error = "[2026-11-27 05:33:43 +0000] [5] [ERROR] Error handling request /\n"
    lines = [own + line for line in (answer, answer, error, "Traceback (most recent call last):\n", "  File x\n",
                                     "ValueError: x\n", answer)]  # fmt: skip
    found = records("".join(lines).encode())
    assert [len(record.lines) for record in found] == [1, 1, 4, 1]
    assert [logformat.level_name(record.level) for record in found] == ["info", "info", "error", "info"]
    summary = logsummary.Summary()
    for record in found:
        summary.add(record)
    assert summary._statuses == {"2xx": 3}


class Memory:
    """A library of one log whose files are in memory. It counts what is read."""

    elsewhere: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, files: Sequence[bytes], *, zipped: int = 0, modified: Sequence[float] = ()) -> None:
        self.content = [gzip.compress(data) if index < zipped else data for index, data in enumerate(files)]
        self.bytes_read = 0
        self.source = Source(
            "web",
            "out",
            tuple(
                File(
                    str(index),
                    f"web.log.{index}",
                    len(data),
                    modified[index] if modified else 1e12,
                    index < zipped,
                    len(files[index]),
                )
                for index, data in enumerate(self.content)
            ),
        )

    def sources(self, names: Sequence[str], *, stderr: bool) -> list[Source]:
        return [self.source]

    def files(self, source: Source) -> tuple[File, ...]:
        return self.source.files

    def read(self, source: Source, file: File, size: int, offset: int) -> bytes | None:
        data = self.content[int(file.id)][offset : offset + size]
        self.bytes_read += len(data)
        return data

    def follow(self, places: Places, heard: Heard) -> None:
        raise NotImplementedError

    def text(self) -> LogText:
        return LogText(self, self.source, CLOCK.now)


# --- records


@pytest.mark.parametrize("server", REAL)
@pytest.mark.parametrize("cut", [1, 7, 1000, 1 << 20])
def test_every_byte_is_in_one_record_wherever_it_is_cut(server: str, cut: int) -> None:
    found = records(REAL[server], cut)
    assert b"".join(record.text for record in found) == REAL[server]
    assert found == records(REAL[server])


@pytest.mark.parametrize("server", [name for name in REAL if b"Traceback" in REAL[name]])
def test_a_traceback_is_one_record_with_the_line_that_announces_it(server: str) -> None:
    for record in records(REAL[server]):
        if b"Traceback" in record.text:
            assert record.level == 40
            assert len(list(tracebacks.scan(record.text.decode().split("\n")))) == 1
            assert record.lines[-1].split(b":")[0] in (b"RuntimeError", b"KeyError")
            assert (server == "uwsgi") == record.lines[0].startswith(b"Traceback")


def test_a_traceback_begins_no_record_where_the_line_before_it_is_not_known() -> None:
    maker = Records(CLOCK, "within")
    trace = b'an error\nTraceback (most recent call last):\n  File "a", line 1, in f\nValueError: b\n'
    found = list(maker.feed(trace + b"2026-01-31 12:00:00 INFO a\n"))
    assert [record.text for record in [*found, *maker.end()]] == [b"2026-01-31 12:00:00 INFO a\n"]
    assert maker.skipped == len(trace)


def test_a_line_and_a_record_that_never_end_come_in_parts() -> None:
    size = logrecords.LINE_MAX
    for data in (
        b"2026-01-31 12:00:00 ERROR " + b"x" * (3 * size) + b"\nnext\n",
        b"2026-01-31 12:00:00 ERROR x\n" + (b"  y" * 1000 + b"\n") * 1500 + b"next\n",
        b"\0" * (5 * size),
    ):
        found = records(data, 65536)
        assert b"".join(record.text for record in found) == data
        assert len(found) >= 3
        assert [record.part for record in found][:3] == [False, True, True]
        assert max(len(record.text) for record in found) <= size + 65536 + 4096
        wanted = Filter(level=40)
        kept = [record for record in found if wanted.wants(record)]
        assert b"next\n" not in [record.text for record in kept]
        assert len(kept) == (len([record for record in found if record.text != b"next\n"]) if data[0] else 0)


LINES = st.sampled_from(
    [
        b"2026-01-31 12:00:00,000 INFO a\n",
        b"2026-01-31 12:%02d:00,000 ERROR b\n",
        b"1.1.1.1 - - [31/Jan/2026:12:%02d:30 +0000] \"GET / HTTP/1.1\" 200 1\n",
        b"plain line\n",
        b"  indented\n",
        b"\n",
        b"Traceback (most recent call last):\n  File \"a\", line 1, in f\n    x\nValueError: b\nDETAIL: c\n",
        b'  File "b.py", line 2\n    x = (1\n        ^\nSyntaxError: b\n',
        b"x" * 3000 + b"\n",
    ]
)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[bytes], int]:
    """Files of one log in the order of its times, and how many of them are compressed."""
    drawn = draw(st.lists(LINES, max_size=50))
    lines = [line.replace(b"%02d", b"%02d" % (minute % 60)) for minute, line in enumerate(drawn)]
    files = [b""]
    for line in lines:
        files[-1] += line
        if draw(st.integers(0, 9)) == 0:
            files.append(b"")
    if draw(st.booleans()):
        files[-1] += b"unfinished"
    return files, draw(st.integers(0, len(files)))


@settings(max_examples=150, deadline=None)
@given(logs(), st.integers(0, 60), st.integers(0, 4), st.integers(100, 2000), st.booleans())
def test_the_last_lines_and_records_of_any_log(
    log: tuple[list[bytes], int], count: int, choice: int, piece: int, stamped: bool
) -> None:
    files, zipped = log
    if stamped:
        files = [re.sub(rb"(?m)^(?!\Z)", b"2026-01-31T12:00:00.000Z ", data) for data in files]
    whole = b"".join(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logtext, "BLOCK", 200)
        patch.setattr(logtext, "SPAN_MAX", 4000)
        patch.setattr(logtext, "BEGIN", 50)
        patch.setattr(logtext, "HELD", 1000)  # any of these records
        patch.setattr(logrecords, "PROBE", 1 << 20)
        text = Memory(files, zipped=zipped).text()
        start = text.last_lines(count)
        lines = whole.splitlines(keepends=True)
        assert b"".join(text.forward(start)) == b"".join(lines[len(lines) - count :] if count < len(lines) else lines)
        grep = (None, None, None, re.compile(b"[ab]$"), re.compile(b"Value"))[choice]
        wanted = Filter(level=(0, 40, 20, 0, 40)[choice], grep=grep)
        expected = [record.text for record in records(whole) if wanted.wants(record)]
        start, skip = text.last_records(count, wanted, Place())
        maker, sieve = text.maker(start, exact=True), logrecords.sieve(wanted.grep)
        chosen = text.records(maker, start, piece=piece * 4 if stamped else piece, sieve=sieve)
        found = [record.text for record in chosen if wanted.wants(record)][skip:]
        assert found == (expected[len(expected) - count :] if count < len(expected) else expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=400), st.integers(0, 40_000), st.integers(0, 3), st.randoms())
def test_since_and_until_miss_nothing(steps: list[int], since: int, zipped: int, rng: random.Random) -> None:
    """Lines with times that grow, some without, some a little late, in some files."""
    begin = datetime(2026, 1, 31, tzinfo=UTC).timestamp()
    files, modified, at = [b""], [0.0], begin
    for step in steps:
        at += step
        late = at - rng.choice([0, 0, 0, 30])
        stamp = datetime.fromtimestamp(late, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        files[-1] += f"{stamp} INFO {'x' * rng.randrange(300)}\n".encode() + rng.choice([b"", b"  more\n", b"print\n"])
        modified[-1] = at
        if rng.randrange(60) == 0:
            files.append(b"")
            modified.append(at)
    wanted = Filter(since=begin + since)
    whole = logrecords.timed(records(b"".join(files)))
    expected = [record.text for record in whole if wanted.wants(record)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logrecords, "PROBE", 2000)
        text = Memory(files, zipped=zipped, modified=modified).text()
        start = text.since(begin + since)
        found = [record.text for record in text.records(text.maker(start), start) if wanted.wants(record)]
        assert found == expected
        ended = Filter(until=begin + since)
        expected = [record.text for record in logrecords.timed(records(b"".join(files))) if ended.wants(record)]
        start, skip = text.last_records(5, ended, Place())
        found = [one.text for one in text.records(text.maker(start, exact=True), start) if ended.wants(one)][skip:]
    assert found == expected[-5:]


def test_since_reads_little_of_a_large_file() -> None:
    lines = b"".join(
        b"2026-01-%02d %02d:%02d:%02dZ INFO a line\n" % (1 + n // 86400, n // 3600 % 24, n // 60 % 60, n % 60)
        for n in range(400_000)
    )
    library = Memory([lines])
    text = library.text()
    start = text.since(datetime(2026, 1, 4, tzinfo=UTC).timestamp())
    assert lines[start.offset :].split(b"\n", 1)[1].startswith(b"2026-01-03 23:")
    assert library.bytes_read < 20 * logrecords.PROBE
    assert text.since(0.0) == Place()
    assert text.since(CLOCK.now).offset > len(lines) - 2 * logrecords.PROBE


@pytest.mark.parametrize("rare", [1, 2, 7, 500])
@pytest.mark.parametrize("zone", ["CET-1", "EST5", "UTC"])
def test_since_misses_nothing_where_some_lines_tell_the_time_of_another_zone(
    rare: int, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of so many lines is a Django's, in UTC, the others are of an access log."""
    begin = int(CLOCK.now) - 40_000
    lines = b""
    for at in range(begin, int(CLOCK.now), 2):
        when = datetime.fromtimestamp(at, UTC)
        access = f'1.1.1.1 - - [{when:%d/%b/%Y:%H:%M:%S} +0000] "GET / HTTP/1.1" 200 2\n'
        lines += (f"{when:%Y-%m-%d %H:%M:%S},000 INFO view\n" if at // 2 % rare == 0 else access).encode()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    logformat._minute.cache_clear()
    try:
        for ago in (600, 5000, 20_000):
            text = Memory([lines], modified=[CLOCK.now - 1]).text()
            wanted = Filter(since=CLOCK.now - ago)
            start = text.since(CLOCK.now - ago)
            assert sum(map(wanted.wants, text.records(text.maker(start), start))) == ago // 2
            assert (text.zone is None) == (zone == "UTC" or rare == 500)
    finally:
        monkeypatch.undo()
        time.tzset()
        logformat._minute.cache_clear()


def second(n: int) -> bytes:
    return b"2026-01-%02d %02d:%02d:%02dZ INFO a line\n" % (1 + n // 86400, n // 3600 % 24, n // 60 % 60, n % 60)


@functools.cache
def seconds(first: int, last: int) -> bytes:
    return b"".join(map(second, range(first, last)))


@pytest.mark.parametrize("zipped", [0, 1, 2])
@pytest.mark.parametrize("n", [50_000, 149_999, 150_000, 299_999])
def test_a_search_by_time_takes_few_lines_apart(zipped: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In compressed files, too; and the last lines before a time are found without those that are later."""
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    at = begin + n
    files = [seconds(0, 150_000), seconds(150_000, 300_000)]
    text = Memory(files, zipped=zipped, modified=[begin + 150_000, begin + 300_000]).text()
    start = text.since(at)
    assert sum(map(len, files[: start.file])) + start.offset > len(files[0]) // 150_000 * n - 2 * logrecords.PROBE
    fed: list[int] = []
    feed = Records.feed

    def counting(self: Records, chunk: bytes) -> Iterator[Record]:
        fed.append(len(chunk))
        return feed(self, chunk)

    monkeypatch.setattr(Records, "feed", counting)
    wanted = Filter(until=at)
    start, skip = text.last_records(3, wanted, Place())
    chosen = text.records(text.maker(start, exact=True), start, piece=logrecords.PROBE)
    in_time = itertools.takewhile(lambda one: not wanted.after(one), chosen)
    assert [one.text for one in in_time if wanted.wants(one)][skip:] == [second(n - 2), second(n - 1), second(n)]
    assert sum(fed) < 10 * logrecords.PROBE


# --- summary


def summary(data: bytes) -> logsummary.Document:
    found = logsummary.Summary()
    for record in records(data):
        found.add(record)
    return found.document()


def test_a_summary_of_real_output() -> None:
    found = summary(REAL["wsgi"] * 3)
    assert (found["lines"], found["bytes"]) == (63, 3 * len(REAL["wsgi"]))
    assert found["levels"] == {"info": 15, "error": 3}
    assert found["statuses"] == {"2xx": 9, "5xx": 3}
    assert [(path["path"], path["count"], path["errors"]) for path in found["paths"]][:2] == [
        ("/none", 3, 0), ("/boom", 3, 3),
    ]  # fmt: skip
    (error,) = found["errors"]
    assert (error["exception"], error["count"], error["raised"]) == ("RuntimeError", 3, ["ValueError", "RuntimeError"])
    assert error["sample"].startswith("Traceback (most recent call last):")
    assert sum(bar["lines"] for bar in found["bars"]) + found["untimed_lines"] == found["lines"]


@pytest.mark.parametrize("server", [name for name in REAL if b"Traceback" in REAL[name]])
def test_errors_of_all_servers_are_grouped(server: str) -> None:
    errors = summary(REAL[server] * 5)["errors"]
    assert [error["count"] for error in errors] == [10 if server == "django" else 5]


def test_a_summary_stays_small() -> None:
    """Of thousands of different paths and errors the frequent and slow ones are still known."""
    found = logsummary.Summary()
    maker = Records(CLOCK)
    for number in range(5_000):
        day, minute = number // 1440, number % 1440
        line = (
            f"1.1.1.1 - - [{day % 28 + 1:02}/Jan/2026:{minute // 60:02}:{minute % 60:02}:00 +0000]"
            f' "GET /p{number}x HTTP/1.1" 200 1 "-" "-" {number % 7}.0ms\n'
            f'1.1.1.1 - - [01/Jan/2026:00:00:00 +0000] "GET /often HTTP/1.1" 500 1 "-" "-" 2000.0ms\n'
            f'Traceback (most recent call last):\n  File "a.py", line {number}, in f\nValueError: {number}\n'
            f'Traceback (most recent call last):\n  File "often.py", line 1, in f\nKeyError: {number}\n'
        )
        for record in maker.feed(line.encode()):
            found.add(record)
    document = found.document()
    assert len(found._paths) <= logsummary.PATHS_MAX
    assert len(found._errors) <= logsummary.ERRORS_MAX
    assert len(document["bars"]) <= logsummary.BARS_MAX
    assert (document["paths"][0]["path"], document["paths"][0]["count"]) == ("/often", 5_000)
    assert document["other_paths"]["count"] + sum(path.count for path in found._paths.values()) >= 9_990
    assert (document["errors"][0]["exception"], document["errors"][0]["count"]) == ("KeyError", 4_999)
    assert document["other_errors"] > 4_500


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(30080.4, "30080"), (1_234_567.0, "1234567"), (803.52, "803.5"), (999.96, "1000"), (2.0, "2"), (0.00001, "0.00")],
)
def test_rates_are_plain_numbers(rate: float, shown: str) -> None:
    document = {**summary(REAL["wsgi"]), "lines_a_minute": rate}
    assert f"  rate     {shown} lines, " in "\n".join(summing.draw("shop", document, errors=False))


def test_lines_without_a_time_take_nothing_from_the_bytes_a_minute() -> None:
    """Neither those of a log that has none, in the summary of all."""
    timed = b"".join(b"2026-11-27 10:0%d:00 INFO %b\n" % (minute, b"x" * 1000) for minute in range(5))
    alone, together = (summary(data) for data in (timed, b"\n".join([*[b"print"] * 1000, timed])))
    assert alone["bytes_a_minute"] == len(timed) / 4
    assert together["untimed_lines"] == 1000
    for key in ("lines_a_minute", "bytes_a_minute"):
        assert together[key] == alone[key]


@pytest.mark.parametrize(
    ("listed", "others", "words"),
    [
        (10, 0, None),
        (11, 0, "    and 1 other error"),
        (19, 0, "    and 9 other errors"),
        (19, 1, "    and 9 other errors, and 1 traceback of rare ones"),
        (3, 5, "    and 5 tracebacks of rare errors"),
    ],
)
def test_how_many_errors_are_not_shown(listed: int, others: int, words: str | None) -> None:
    document = summary(TRACE)
    document = {**document, "errors": document["errors"] * listed, "other_errors": others}
    last = summing.draw("shop", document, errors=False)[-1]
    assert last == (words or "    1 × ValueError: x")


@settings(max_examples=60, deadline=None)
@given(touched([data[:3000] for data in REAL.values()], changes=8), st.integers(1, 5000))
def test_damaged_output_is_counted_like_any_other(data: bytes, cut: int) -> None:
    found = records(data, cut)
    assert b"".join(record.text for record in found) == data
    document = summary(data)
    assert (document["bytes"], document["lines"]) == (len(data), sum(len(record.lines) for record in found))
    assert sum(document["levels"].values()) == sum(not record.part for record in found)
    assert all(error["sample"] and error["count"] > 0 for error in document["errors"])
    json.dumps(document)


# --- compressed files


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 100_000)), max_size=8))
def test_any_place_of_a_compressed_file(members: int, asked: list[tuple[int, int]]) -> None:
    parts = [b"".join(b"%d line %d\n" % (number, n) for n in range(9000)) for number in range(members)]
    whole, file = b"".join(parts), b"".join(map(gzip.compress, parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("procman.unzip.SPACING", 10_000)
        unzipped = Unzipped(lambda size, offset: file[offset : offset + size])
        for offset, size in asked:
            assert unzipped.pread(size, offset) == whole[offset : offset + size]
        assert unzipped.size == len(whole)
        assert unzipped.damaged == (not members)
        assert len(unzipped._copies) <= COPIES_MAX
        assert unzipped.pread(len(whole), 0) == whole


@pytest.mark.parametrize("lines", [None, 100_000])
@pytest.mark.parametrize("left", [False, True])
def test_many_compressed_logs_are_read_at_once_in_little_memory(
    lines: int | None, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they are merged by time: each of them is in the midst of its compressed file, or has left it."""
    monkeypatch.setattr("procman.unzip.SPACING", 50_000)
    content = [seconds(0, 150_000), b"one\n" * 9 if left else b""]
    library = Memory(content, zipped=1)
    tracemalloc.start()
    reading = []
    for text in (library.text() for _ in range(5)):
        start = Place() if lines is None else text.last_lines(lines)
        reading.append(text.forward(start, piece=5_000))
        found = next(data for data in reading[-1] if text.reached > Place(0, 4_000_000))
        found = next(data for data in reading[-1] if text.reached.file == 1) if left else found
        assert len(found) <= 5_000
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < len(reading) * (50_000 if left else 200_000)


WHOLE = b"".join(b"line %d\n" % number for number in range(5000))
GZIPPED = gzip.compress(WHOLE)


@pytest.mark.parametrize(
    ("file", "rest", "damaged"),
    [
        (GZIPPED[:-9], WHOLE, True),
        (GZIPPED[:-8] + b"\0\0\0\0" + GZIPPED[-4:], WHOLE[:-1], True),  # another CRC-32: zlib keeps one byte
        (b"x" + GZIPPED, b"", True),
        (GZIPPED + GZIPPED[:-8] + bytes(8), (WHOLE * 2)[:-1], True),
        (GZIPPED + b"\x1f\x8bjunk", WHOLE, True),
        (GZIPPED + b"junk", WHOLE, False),
        (GZIPPED + b"\x1f", WHOLE, False),
        (GZIPPED + bytes(512), WHOLE, False),
    ],
)
def test_a_damaged_file_is_read_as_far_as_it_goes(file: bytes, rest: bytes, damaged: bool) -> None:
    unzipped = Unzipped(lambda size, offset: file[offset : offset + size])
    assert unzipped.pread(len(WHOLE) * 3, 0) == rest
    assert unzipped.pread(1, len(WHOLE) * 2) == b""
    assert unzipped.damaged == damaged


@settings(max_examples=60, deadline=None)
@given(st.integers(10, len(GZIPPED) - 1), st.integers(1, 255))
def test_a_wrong_byte_anywhere_is_noticed(place: int, bits: int) -> None:
    """But not in the header: all of what it says is for people."""
    file = GZIPPED[:place] + bytes([GZIPPED[place] ^ bits]) + GZIPPED[place + 1 :]
    unzipped = Unzipped(lambda size, offset: file[offset : offset + size])
    assert unzipped.size or unzipped.damaged
    assert unzipped.damaged


# --- times that people write


NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW),
        ("10 min ago", NOW - timedelta(minutes=10)),
        ("2h", NOW - timedelta(hours=2)),
        ("1h 30m ago", NOW - timedelta(minutes=90)),
        ("-1.5 days", NOW - timedelta(hours=36)),
        ("today", NOW.replace(hour=0)),
        ("Yesterday", NOW.replace(hour=0, day=30)),
        ("09:30", NOW.replace(hour=9, minute=30)),
        ("23:00:05.5", NOW.replace(day=30, hour=23, second=5, microsecond=500_000)),
        ("2026-01-30", NOW.replace(hour=0, day=30)),
        ("2026/01/30 07:00", NOW.replace(hour=7, day=30)),
        ("2026-01-30T07:00:00+02:00", NOW.replace(hour=5, day=30)),
        ("2026-01-30T07:00:00Z", NOW.replace(hour=7, day=30)),
        ("@1000", datetime.fromtimestamp(1000, UTC)),
    ],
)
def test_times_that_people_write(text: str, expected: datetime) -> None:
    assert moments.moment(text, NOW.timestamp(), UTC) == pytest.approx(expected.timestamp())


@pytest.mark.parametrize(
    ("text", "now", "expected"),
    [  # in Berlin, where 02:00 to 03:00 comes twice, from 00:00Z and from 01:00Z
        ("02:30", (0, 40), (0, 30)),
        ("02:30", (1, 10), (0, 30)),
        ("02:30", (1, 40), (1, 30)),
        ("01:30", (1, 40), (-1, 30)),
        ("today", (1, 40), (-2, 0)),
        ("02:50", (0, 40), (-24, 50)),
    ],
)
def test_a_time_of_an_hour_that_comes_twice(text: str, now: tuple[int, int], expected: tuple[int, int]) -> None:
    day, zone = datetime(2026, 10, 25, tzinfo=UTC), ZoneInfo("Europe/Berlin")
    clock, found = (day + timedelta(hours=hours, minutes=minutes) for hours, minutes in (now, expected))
    assert moments.moment(text, clock.timestamp(), zone) == found.timestamp()


@pytest.mark.parametrize("text", ["", "soon", "10 parsecs ago", "25:00", "2026-02-30", "@nan", "@1e99", "9" * 99 + "d"])
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is no time: it must be like"):
        moments.moment(text, NOW.timestamp(), UTC)


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_said_to_be_none(text: str) -> None:
    try:
        assert abs(moments.moment(text, NOW.timestamp(), UTC)) < 1e12
    except ValueError as error:
        assert "is no time" in str(error)


# --- terminals


@given(st.binary(max_size=100))
def test_nothing_reaches_a_terminal_but_text_and_colours(line: bytes) -> None:
    shown = terminal.visible(line.replace(b"\n", b"") + b"\n").decode()
    assert shown.endswith("\n")
    plain = re.sub("\x1b\\[[0-9;:]*m", "", shown[:-1])
    assert all(character.isprintable() or character == "\t" for character in plain)
    if plain != shown[:-1]:
        assert shown.endswith("\x1b[0m\n")


@pytest.mark.parametrize(
    ("pattern", "there"),
    [(b"x", True), (b"^x$", True), (b"[^y]*x", True), (b"\\Ax", False), (b"x(?!y)", False), (b"a*+x", False)],
)
def test_a_pattern_that_sees_more_than_its_line_has_no_sieve(pattern: bytes, there: bool) -> None:
    assert (logrecords.sieve(re.compile(pattern)) is not None) == there


# --- messages of more than one line


MESSAGES = (FORMATS / "messages.txt").read_text()
"""Of pydantic, SQLAlchemy, psycopg, notes, groups, other processes: as `logging` prints them, a line after each."""
ERRORS = [text for text in re.split(r"(?m)^\S+ \S+ INFO shop after .*\n", MESSAGES) if text]
UNANNOUNCED = [text.split("\n", 1)[1] for text in ERRORS if re.search(r"\A.*\n(Traceback| *\+|.*Remote)", text)]


@pytest.mark.parametrize("error", [*ERRORS, *UNANNOUNCED], ids=lambda error: re.sub(r"\W+", "-", error[:50]))
@pytest.mark.parametrize("added", ["", "timestamps", "json"])
def test_all_of_a_message_belongs_to_its_traceback(error: str, added: str) -> None:
    lines = ["2026-11-27 10:00:00,000 INFO before", *error.splitlines(), "2026-11-27 10:43:55,000 INFO after", "print"]
    if added == "timestamps":
        lines = [f"2026-11-27T10:43:55.000Z {line}" for line in lines]
    if added == "json":
        about = {"time": "2026-11-27T10:43:55.000Z", "program": "shop", "instance": 1, "stream": "stdout"}
        lines = [json.dumps({**about, "message": line}) for line in lines]
    data = "".join(f"{line}\n" for line in lines).encode()
    wanted = Filter(level=40)
    (record,) = [record for record in records(data) if wanted.wants(record)]
    assert record.text.decode() == "".join(f"{line}\n" for line in lines[1:-2])
    (found,) = summary(data)["errors"]
    assert found["count"] == 1
    whole = "\n".join(said.body.decode() for said in record.said).rstrip()
    assert whole.endswith(found["sample"].rstrip())
    assert found["sample"].split("\n", 1)[0].endswith("Traceback (most recent call last):")
    last = logrecords.last_traceback(data, CLOCK)
    assert last is not None
    assert (last.text, len(last.raised)) == (found["sample"], len(found["raised"]))


def test_the_exception_of_a_long_message_is_named() -> None:
    found = [error["exception"] for text in ERRORS for error in summary(text.encode())["errors"]]
    assert found == [
        "pydantic_core._pydantic_core.ValidationError", "ZeroDivisionError", "KeyError",
        "sqlalchemy.exc.IntegrityError", "psycopg.errors.UniqueViolation", "psycopg2.errors.UniqueViolation",
        "psycopg.errors.UndefinedTable", "sqlalchemy.exc.IntegrityError",
        "ExceptionGroup", "OSError", "ExceptionGroup", "ValueError", "ValueError",
    ]  # fmt: skip


TRACE = b"Traceback (most recent call last):\n  File \"a\", line 1, in f\nValueError: x\n"


@pytest.mark.parametrize(
    ("after", "more"),
    [
        (b"print\n" * 10_000, logrecords.MESSAGE_LINES),
        ((b"x" * 1000 + b"\n") * 20, logrecords.MESSAGE_MAX // 1000),
        (b"more\n" + TRACE, 1),
        (b"more\nWARNING: x\nprint\n", 1),
        (b"more\n2026-11-27 10:00:00 x\nprint\n", 1),
        (b"more\n\nThe above exception was the direct cause of the following exception:\n\n" + TRACE + b"INFO: x\n", 7),
    ],
)
def test_what_follows_an_exception_is_not_taken_without_end(after: bytes, more: int) -> None:
    first = records(b"INFO: x\n" + TRACE + after)[1]
    assert first.text == TRACE + b"".join(after.splitlines(keepends=True)[:more])
    assert first.level == 40


def test_lines_may_end_as_on_windows() -> None:
    data = b"2026-11-27 10:00:00 INFO xy\r\nx\ry\r\ny\n"
    wanted = {b"y$": 3, b"x\ry$": 1, b"^y": 1, b"(?-m:y$)": 3, b"(?-m:^x)": 1, b"(?i-m:^Y)": 1}
    for pattern, expected in wanted.items():
        grep = re.compile(pattern)
        sieve = logrecords.sieve(grep)
        assert sum(map(Filter(grep=grep).wants, records(data))) == expected
        assert (sieve is None) == (b"-m" in pattern)
        assert sieve is None or sieve(data)


CHAINED = b"""\
Traceback (most recent call last):
  File "/srv/shop/job.py", line 3, in work
    {}["id"]
KeyError: 'id'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/srv/shop/job.py", line 5, in <module>
    raise ValueError("needle 5") from error
ValueError: needle 5
"""


def test_what_comes_line_by_line_is_let_through_whole() -> None:
    """As `-f --grep` has it: nobody waits for the end of a record, and only its last line has the match."""
    other = CHAINED.replace(b"needle", b"thread")
    maker = Records(CLOCK)
    whole = Whole(Filter(grep=re.compile(b"needle")))
    ready = b"2026-11-27 12:00:00,000 INFO ready\n"
    shown = b""
    for line in (CHAINED + ready + other + ready + CHAINED + ready).splitlines(keepends=True):
        for record in (*maker.feed(line), *maker.flush()):
            shown += b"".join(each.text for each in whole.let(record))
    assert shown == CHAINED * 2


def test_of_a_very_long_record_the_end_is_let_through() -> None:
    maker = Records(CLOCK)
    whole = Whole(Filter(grep=re.compile(b"needle")))
    lines = [b"Traceback (most recent call last):\n"]
    lines += [b'  File "job.py", line 3, in work\n', b"    " + b"x" * 5000 + b"\n"] * (RECORD_MAX // 5000 + 2)
    shown = b""
    for line in (*lines, b"ValueError: needle\n"):
        for record in (*maker.feed(line), *maker.flush()):
            shown += b"".join(each.text for each in whole.let(record))
    assert shown.endswith(b"ValueError: needle\n")
    assert len(shown) <= RECORD_MAX


UNCLOSED = b"""\
  File "/srv/shop/job.py", line 2
    x = (1
        ^
SyntaxError: '(' was never closed
"""
INDENTED = b"""\
  File "/srv/shop/job.py", line 2
    return 5
    ^
IndentationError: expected an indented block after function definition on line 1
"""
TABBED = b"""\
  File "job.py", line 3
    x = 1
TabError: inconsistent use of tabs and spaces in indentation
"""
SOURCELESS = b"""\
  File "<stdin>", line 1
SyntaxError: invalid syntax
"""


@pytest.mark.parametrize("error", [UNCLOSED, INDENTED, TABBED, SOURCELESS])
@pytest.mark.parametrize("before", [b"", b"print\n", b"2026-11-27 10:00:00,000 INFO a\n", CHAINED, UNCLOSED, b"\n"])
@pytest.mark.parametrize("added", [b"", b"2026-11-27T10:43:55.000Z "])
def test_a_script_that_is_no_python_is_an_error(error: bytes, before: bytes, added: bytes) -> None:
    """Python prints no header above it, and its first line is indented."""
    texts = before, error, b"  more\nprint\n" + TRACE
    before, error, after = (re.sub(rb"(?m)^(?!\Z)", added, text) for text in texts)
    found = records(before + error + after, 50)
    errors = [record.text for record in found if record.level == 40]
    more = after.splitlines(keepends=True)
    assert errors[-2:] == [error + more[0], b"".join(more[2:])]
    assert b"".join(record.text for record in found) == before + error + after
    counted = {one["exception"]: one["count"] for one in summary(before + error)["errors"]}
    kind = error.splitlines()[-1].removeprefix(added).decode().split(":")[0]
    assert counted[kind] == (2 if before.endswith(error) else 1)
    last = logrecords.last_traceback(before + error, CLOCK)
    assert last is not None
    assert (last.exception, last.raised) == (kind, (kind,))
    assert last.text.encode() == error.replace(added, b"").rstrip(b"\n")
    assert re.fullmatch(r"\S+:\d", last.frames[0])
    assert last.message


def test_what_only_looks_like_such_an_error_is_left_as_it_is() -> None:
    jinja = b'ERROR:root:no template\n  File "a.html", line 3\n    {{ x\nprint\n'
    imported = b'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n' + UNCLOSED
    coding = b"SyntaxError: Non-UTF-8 code starting with '\\xff' in file job.py on line 1\n"
    message = b"INFO: x\n" + TRACE + b"SyntaxError: no frames\nmore\n"
    found = [[len(record.lines) for record in records(data)] for data in (jinja, imported, coding, message)]
    assert found == [[3, 1], [6], [1], [1, 5]]
    assert [len(summary(data)["errors"]) for data in (jinja, imported, coding, message)] == [0, 1, 0, 1]
    assert [record.level for record in records(coding)] == [40]


def test_such_an_error_comes_whole_while_its_lines_come_one_by_one() -> None:
    maker = Records(CLOCK)
    whole = Whole(Filter(level=40))
    shown = b""
    for piece in (b"INFO: x\n", UNCLOSED, b"INFO: y\n", b"print\n", INDENTED[:60], INDENTED[60:], b"INFO: z\n"):
        for record in (*maker.feed(piece), *maker.flush()):
            shown += b"".join(each.text for each in whole.let(record))
    assert shown == UNCLOSED + INDENTED.splitlines(keepends=True)[-1]

"""procman.logformat: the time and the level of a line, in the formats that real programs print (tests/formats)."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import logformat, moments
from procman.logformat import Clock, level_name, level_number, parse

FORMATS = Path(__file__).parent / "formats"
NOW = datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp()
CLOCK = Clock(NOW, UTC)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


LINES: list[tuple[str, str | None, str]] = [
    # logging: basicConfig's own format, the usual ones
    ("WARNING:root:disk is nearly full", None, "warning"),
    ("2026-11-27 05:33:49,644 INFO     Starting server", "2026-11-27T05:33:49.644", "info"),
    ("2026-11-27 05:33:49,644 - shop.views - ERROR - no such thing", "2026-11-27T05:33:49.644", "error"),
    ("2026-11-27 05:33:49,644:CRITICAL:shop:INFO is what it said", "2026-11-27T05:33:49.644", "critical"),
    ("2026-11-27 05:33:49,644 [MainThread] DEBUG shop.views: x", "2026-11-27T05:33:49.644", "debug"),
    ("ERROR 2026-11-27 05:34:08,580 log 25306 139756615043968 Internal Server Error: /boom", "2026-11-27T05:34:08.580",
     "error"),
    # servers
    ("[2026-11-27 05:33:43 +0000] [23465] [INFO] Starting gunicorn 27.0.1", "2026-11-27T05:33:43", "info"),
    ("[2026-11-27 06:33:43 +0100] [23465] [ERROR] Error handling request /", "2026-11-27T05:33:43", "error"),
    ('127.0.0.1 - - [27/Nov/2026:05:33:43 +0000] "GET /error HTTP/1.1" 200 2 "-" "-"', "2026-11-27T05:33:43", "info"),
    ('::1 - ann [27/Nov/2026:05:33:43 -0130] "GET / HTTP/1.1" 500 2', "2026-11-27T07:03:43", "info"),
    ('127.0.0.1:35686 - - [27/Nov/2026:05:33:49] "GET /" 200 2', "2026-11-27T05:33:49", "info"),
    # over a Unix socket nobody has an address
    (' - - [27/Nov/2026:05:33:43 +0000] "GET / HTTP/1.0" 200 11 "-" "-"', "2026-11-27T05:33:43", "info"),
    (' - ann [27/Nov/2026:05:33:43 +0000] "GET / HTTP/1.0" 500 11 "-" "-"', "2026-11-27T05:33:43", "info"),
    ("[pid: 23558|app: 0|req: 1/1] 127.0.0.1 () {24 vars in 246 bytes} [Fri Nov 27 05:33:44 2026] GET / => generated 2",
     "2026-11-27T05:33:44", "info"),
    ("*** Starting uWSGI 2.0.30 (64bit) on [Fri Nov 27 05:33:44 2026] ***", "2026-11-27T05:33:44", ""),
    ("Tue Nov  3 05:33:44 2026 - *** WARNING: you are running uWSGI as root", "2026-11-03T05:33:44", "warning"),
    ("DAMN ! worker 1 (pid: 5) died :( trying respawn ...", None, "error"),
    ("INFO:     127.0.0.1:58606 - \"GET / HTTP/1.1\" 200 OK", None, "info"),
    ("[ERROR] Application callable raised an exception", None, "error"),
    ('[27/Nov/2026 05:34:29] "GET / HTTP/1.1" 200 2', "2026-11-27T05:34:29", "info"),
    ("Internal Server Error: /boom", None, "error"),
    ("Not Found: /a/1", None, "warning"),
    ("procman.wsgi: Exception while serving /boom", None, "error"),
    ("procman: 12345 bytes of output were dropped: No space left on device (ENOSPC)", None, "warning"),
    ("Traceback (most recent call last):", None, "error"),
    # what a visitor asks for is no level
    ('[2026-11-27 05:33:52 +0000] 127.0.0.1 - "GET /ERROR/x HTTP/1.1" 200 0.086', "2026-11-27T05:33:52", "info"),
    # others
    ("2026/11/27 05:33:43 [error] 123#0: *5 connect() failed", "2026-11-27T05:33:43", "error"),
    ("Nov 27 05:33:43 host prog[12]: ERROR x", "2026-11-27T05:33:43", "error"),
    ("Dec  1 05:33:43 host prog[12]: x", "2025-12-01T05:33:43", ""),
    ("<11>Nov 27 05:33:43 host prog[12]: x", "2026-11-27T05:33:43", ""),
    ("[2026-11-27 05:33:43,123: WARNING/MainProcess] celery@host ready.", "2026-11-27T05:33:43.123", "warning"),
    ("2026-11-27 05:33:43.123 | SUCCESS  | __main__:<module>:1 - x", "2026-11-27T05:33:43.123", "info"),
    ("2026-11-27 05:33:43 [warning  ] disk full                      free=3", "2026-11-27T05:33:43", "warning"),
    ('level=warn ts=2026-11-27T05:33:43.123Z msg="x"', "2026-11-27T05:33:43.123", "warning"),
    ('time="2026-11-27T05:33:43Z" level=fatal msg="x"', "2026-11-27T05:33:43", "critical"),
    ("error: can't open it", None, "error"),
    # what says nothing
    ("hello", None, ""),
    ("the INFO desk had an ERROR", None, ""),
    ("2026-13-99 25:61:00 INFO no such date", None, "info"),
    ("\x1b[31mred\x1b[0m", None, ""),
]


@pytest.mark.parametrize(("line", "time", "level"), LINES)
def test_time_and_level_of_a_line(line: str, time: str | None, level: str) -> None:
    said = parse(line.encode(), CLOCK)
    assert said.time == (None if time is None else pytest.approx(at(time)))
    assert level_name(said.level) == level
    assert not said.continues
    unclocked = parse(line.encode(), None)
    assert unclocked._replace(time=said.time) == said
    assert unclocked.time == (None if time is None and "2026-13-99" not in line else 0.0)
    assert said.exact == (said.time is not None and any(mark in line for mark in (" +0", " -0", "Z")))
    assert (said.speaks, said.stamped) == (time is not None or level != "", False)
    plain = line.replace("\x1b[31m", "").replace("\x1b[0m", "").encode()  # of what has colours
    stamped = parse(b"2026-01-31T12:00:00.500Z " + line.encode(), CLOCK)  # timestamps = true
    assert stamped.time == at("2026-01-31T12:00:00.500")
    assert (stamped.level, stamped.body, stamped.exact) == (said.level, plain, True)
    assert (stamped.speaks, stamped.stamped) == (said.speaks, said.time is None)
    ours = {"time": "2026-01-31T12:00:00.500Z", "program": "shop", "instance": 1, "stream": "out", "message": line}
    wrapped = parse(json.dumps(ours).encode(), CLOCK)  # format = "json"
    assert wrapped == stamped


JSONS: list[tuple[object, float | None, int, bytes]] = [
    ({"timestamp": "2026-11-27T05:33:43Z", "level": "error", "message": "x"}, at("2026-11-27T05:33:43"), 40, b"x"),
    ({"asctime": "2026-11-27 05:33:43,250", "levelname": "WARN", "msg": "x"}, at("2026-11-27T05:33:43.25"), 30, b"x"),
    ({"ts": 1795757623.5, "severity": "INFO", "event": "x"}, 1795757623.5, 20, b"x"),
    ({"time": 1795757623500, "level": 50, "msg": "x"}, 1795757623.5, 50, b"x"),
    # pino
    ({"level": 30, "time": 1795757623500, "pid": 7, "hostname": "a", "msg": "x"}, 1795757623.5, 20, b"x"),
    ({"level": 60, "time": 1795757623500, "pid": 7, "hostname": "a", "msg": "x"}, 1795757623.5, 50, b"x"),
    ({"@timestamp": "2026-11-27T05:33:43.000+00:00", "log.level": "fatal"}, at("2026-11-27T05:33:43"), 50, b""),
    # loguru with serialize=True
    ({"text": "x\n", "record": {"level": {"name": "ERROR", "no": 40}, "message": "x",
                                "time": {"repr": "2026-11-27 05:33:43+00:00", "timestamp": 1795757623.5}}},
     1795757623.5, 40, b"x"),
    ({"text": "x\n", "record": {"level": {"name": "AUDIT", "no": 35}, "message": "x", "exception": None,
                                "time": {"repr": "2026-11-27 05:33:43+00:00"}}},
     at("2026-11-27T05:33:43"), 35, b"x"),
    ({"text": "x\n", "record": {"level": {"name": "TRACE", "no": 5}, "message": 5, "time": []}}, None, 10, b""),
    ({"text": "x", "record": 5, "level": {}, "time": {"timestamp": {}}}, None, 0, b"x"),
    ({"time": True, "level": None, "message": 5}, None, 0, b""),
    ({"time": "soon", "level": "loud", "message": "x"}, None, 0, b"x"),
    ({}, None, 0, b""),
]


@pytest.mark.parametrize(("document", "time", "level", "body"), JSONS)
def test_json_lines(document: object, time: float | None, level: int, body: bytes) -> None:
    line = json.dumps(document).encode()
    said = parse(line, CLOCK)
    assert (said.time, said.level, said.body) == (time, level, body or line)


@pytest.mark.parametrize(
    "line",
    [b'{"level":"error","x":"y', b'{"a": 5, "levelname": "ERROR", "m', b'{"log.level":"err","x":"\\"level\\":\\"info'],
)
def test_json_that_is_cut_off_tells_its_level(line: bytes) -> None:
    assert parse(line, CLOCK).level == 40
    assert parse(b'{"x": "\\"level\\": \\"error\\" ', CLOCK).level == 0


def test_a_traceback_in_json_makes_an_error() -> None:
    said = parse(json.dumps({"message": "x", "exc_info": "Traceback (most recent call last):\nE: x"}).encode(), CLOCK)
    assert (said.level, said.trace) == (40, b"Traceback (most recent call last):\nE: x")
    said = parse(b'{"event": "x", "exception": [{"exc_type": "E", "exc_value": "x", "frames": []}]}', CLOCK)
    assert (said.level, said.trace) == (40, b"Traceback (most recent call last):\nE: x")
    assert parse(b'{"event": "x", "exception": [], "stack": [5]}', CLOCK).level == 0


INDENTED = (b"  File \"x\"", b"\tat x", b"", b"\r", b"2026-01-31T12:00:00Z   indented", b" - - a list", b" - [x] y")


@pytest.mark.parametrize("line", INDENTED)
def test_what_goes_on_with_the_line_before(line: bytes) -> None:
    assert parse(line, CLOCK).continues


def test_a_time_without_a_zone_is_local() -> None:
    here = Clock(NOW, timezone(timedelta(hours=-5)))
    assert parse(b"2026-11-27 05:33:43 x", here).time == at("2026-11-27T10:33:43")
    assert parse(b"2026-11-27 05:33:43 +0200 x", here).time == at("2026-11-27T03:33:43")


@pytest.mark.parametrize(
    ("line", "now", "expected"),
    [  # in Berlin: on 2026-10-25 the hour from 02:00 to 03:00 comes twice, from 00:00Z and from 01:00Z
        ("2026-10-25 02:35:00", "2026-10-25T00:40", "2026-10-25T00:35"),
        ("2026-10-25 02:35:00", "2026-10-25T01:10", "2026-10-25T00:35"),
        ("2026-10-25 02:35:00", "2026-10-25T01:34:30", "2026-10-25T01:35"),
        ("2026-10-25 02:35:00", "2026-10-25T01:40", "2026-10-25T01:35"),
        ("2026-10-25 02:35:00", "2026-10-26T12:00", "2026-10-25T01:35"),
        ("2026-10-25 02:35:00 +0200", "2026-10-25T01:40", "2026-10-25T00:35"),
        ("2026-10-25 01:35:00", "2026-10-25T01:40", "2026-10-24T23:35"),
        ("2026-10-25 03:35:00", "2026-10-25T03:40", "2026-10-25T02:35"),
        ("2026-03-29 02:35:00", "2026-03-29T03:40", "2026-03-29T01:35"),  # never
    ],
)
def test_an_hour_that_comes_twice(line: str, now: str, expected: str) -> None:
    assert parse(f"{line} x".encode(), Clock(at(now), ZoneInfo("Europe/Berlin"))).time == at(expected)


@pytest.mark.parametrize(
    "line", [b"9999-12-31T23:59:59-05:00 x", b"9999-12-31T23:59:59.9999999Z x", b"0001-01-01T00:00:00+14:00 x"]
)
def test_a_time_before_the_year_1_or_after_9999_is_none(line: bytes) -> None:
    assert parse(line, CLOCK).time is None


@given(st.datetimes(), st.integers(-1439, 1439), st.sampled_from(["", ".9", ".999999999"]))
def test_any_time_that_is_told_can_be_shown(moment: datetime, offset: int, part: str) -> None:
    zone = f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02}:{abs(offset) % 60:02}"
    said = parse(f"{moment.isoformat()[:19]}{part}{zone} x".encode(), CLOCK)
    assert said.time is None or moments.rfc3339(said.time).endswith("Z")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_line(line: bytes) -> None:
    said = parse(line, CLOCK)
    assert said.level in (0, 10, 20, 30, 40, 50) or line.startswith(b"{")
    assert said.time is None or said.time < 1e12


PATTERNS = [
    "%Y-%m-%d %H:%M:%S",
    "%Y/%m/%d %H:%M:%S",
    "1.1.1.1 - - [%d/%b/%Y:%H:%M:%S +0000]",
    "%a %b %d %H:%M:%S %Y",
    "[%d/%b/%Y %H:%M:%S]",
]


@given(st.integers(631152000, 4102444800), st.sampled_from(PATTERNS))
def test_a_time_is_read_as_it_was_written(moment: int, pattern: str) -> None:
    line = datetime.fromtimestamp(moment, UTC).strftime(pattern) + " x"
    assert parse(line.encode(), CLOCK).time == moment


def test_a_line_of_json_that_is_deep_or_long_is_text() -> None:
    for line in (b"{" * 100_000, b'{"a":' * 50_000, b'{"level":"error","x":"' + b"x" * logformat.JSON_MAX + b'"}'):
        assert parse(line, CLOCK).time is None


def test_names_of_levels() -> None:
    assert [level_name(number) for number in (0, 10, 25, 30, 45, 60)] == [
        "", "debug", "info", "warning", "error", "critical",
    ]  # fmt: skip
    assert [level_number(word) for word in ("Warn", "fatal", "loud")] == [30, 50, 0]


@pytest.mark.parametrize("path", sorted(FORMATS.glob("*.log")), ids=lambda path: path.stem)
def test_lines_of_real_servers_say_what_they_can(path: Path) -> None:
    """Of those that always tell a time, or a level, each line that begins something does."""
    lines = [parse(line, CLOCK) for line in path.read_bytes().splitlines()]
    begins = [line for line in lines if not line.continues and line.body[:9] not in (b"The above", b"During ha")]
    begins = [line for line in begins if b"Error: " not in line.body[:22]]
    if path.stem in ("gunicorn", "daphne", "hypercorn", "uwsgi-logdate"):
        assert all(line.time or line.body.startswith(logformat.TRACEBACK) for line in begins)
    if path.stem in ("gunicorn", "uvicorn", "daphne", "hypercorn", "wsgi", "django"):
        assert all(line.level for line in begins)
    assert any(line.level == 40 for line in lines) or path.stem == "uwsgi-logdate"


UWSGI_SAYS = [
    (b"DAMN ! worker 1 (pid: 3) died, killed by signal 9 :( trying respawn ...", 40),
    (b"*** HARAKIRI ON WORKER 1 (pid: 3, try: 1, graceful: yes) ***", 40),
    (b"HARAKIRI: -- wchan> hrtimer_nanosleep", 40),  # with harakiri-verbose
    (b"HARAKIRI !!! worker 1 status !!!", 40),
    (b"HARAKIRI [core 0] 127.0.0.1 - GET /slow/x since 1795822499", 40),
    (b"HARAKIRI triggered by worker 1 core 0 !!!", 40),
    (b'*** uWSGI listen queue of socket "127.0.0.1:1" (fd: 3) full !!! (101/100) ***', 30),
    (b"!!! uWSGI process 5 got Segmentation Fault !!!", 50),
    (b"!!! no internal routing support, rebuild with pcre support !!!", 30),
]


@pytest.mark.parametrize(("text", "level"), UWSGI_SAYS)
def test_what_uwsgi_says_has_a_level_with_its_date_and_without(text: bytes, level: int) -> None:
    dated = parse(b"Thu Nov 26 12:00:00 2026 - " + text, CLOCK)
    assert (parse(text, CLOCK).level, dated.level, dated.time) == (level, level, at("2026-11-26T12:00:00"))


COLOURED = [
    (b"\x1b[2m2026-11-27 05:33:43\x1b[0m [\x1b[31m\x1b[1merror    \x1b[0m] \x1b[1mno such order\x1b[0m id=5", 40),
    (b"\x1b[32m2026-11-27 05:33:43.000\x1b[0m | \x1b[33m\x1b[1mWARNING \x1b[0m | \x1b[36mshop\x1b[0m - slow", 30),
    (b"\x1b[31mERROR:root:no such order\x1b[0m", 40),
]


@pytest.mark.parametrize(("line", "level"), COLOURED)
def test_colours_hide_nothing(line: bytes, level: int) -> None:
    said = parse(line, CLOCK)
    assert said.level == level
    assert said.time == (at("2026-11-27T05:33:43") if b"2026" in line else None)
    assert b"\x1b" not in said.body
    assert parse(b"\x1b[31mTraceback (most recent call last):\x1b[0m", CLOCK).body == logformat.TRACEBACK

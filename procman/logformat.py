"""What one line of a log says of itself: its time, its level, and whether it goes on with the line before.

Known are the formats that Python web sites print: `logging` (the default, the usual ones, and Django's), gunicorn,
uWSGI, uvicorn, hypercorn, daphne, granian, Django's runserver, access logs in the common and combined format, nginx,
syslog, celery, loguru, structlog, logfmt, JSON lines; and what procman itself adds: `timestamps` (an RFC 3339 time
before each line) and `format = "json"`. tests/test_logformat.py has a line of each, as the real programs print them.

Pure. Lines are bytes: nothing is decoded before it must be. A line that says nothing is normal, no error.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any, NamedTuple

from procman import tracebacks

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""The levels by name, as `logging` numbers them."""

HEAD = 512
"""Bytes of a line in which its time and level stand."""

JSON_MAX = 1024 * 1024
"""Bytes of a line that is read as JSON."""

EARLIEST, LATEST = -62135596800.0, 253402300799.0
"""Seconds since the epoch: the years 1 to 9999 in UTC, which are those that RFC 3339 and `datetime` can show."""

AHEAD_SECONDS = 60.0
"""By so much a line may be ahead of the clock: it is read a moment after the clock was."""

TRACEBACK = b"Traceback (most recent call last):"
GROUP = b"  + Exception Group " + TRACEBACK
REMOTE = b".RemoteTraceback: ", b"._RemoteTraceback: "  # of multiprocessing: a traceback of another process follows

_BY_WORD = {
    **dict.fromkeys(("TRACE", "DEBUG", "FINE"), 10),
    **dict.fromkeys(("INFO", "NOTICE", "SUCCESS", "INFORMATION"), 20),
    **dict.fromkeys(("WARN", "WARNING"), 30),
    **dict.fromkeys(("ERROR", "ERR", "SEVERE", "EXCEPTION"), 40),
    **dict.fromkeys(("CRITICAL", "CRIT", "FATAL", "ALERT", "EMERG", "EMERGENCY", "PANIC"), 50),
}
_WORDS = (
    rb"TRACE|DEBUG|INFO(?:RMATION)?|NOTICE|SUCCESS|WARN(?:ING)?|ERR(?:OR)?|CRIT(?:ICAL)?|FATAL|ALERT|EMERG(?:ENCY)?"
)
_MONTH_NAMES = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES.split("|"), 1)}
_MONTH = rb"(?P<month>" + _MONTH_NAMES.encode() + rb")"
_CLOCK = rb"(?P<clock>\d\d:\d\d):(?P<second>\d\d)"
_ISO = (
    rb"(?P<year>\d{4})[-/](?P<month>\d\d)[-/](?P<day>\d\d)[T ]" + _CLOCK + rb"(?:[.,](?P<part>\d{1,9}))?"
    rb"(?P<zone> ?(?:Z|[+-]\d\d:?\d\d)(?!\d))?"
)
_APACHE = rb"(?P<day>\d\d)/" + _MONTH + rb"/(?P<year>\d{4})[: ]" + _CLOCK + rb"(?P<zone> [+-]\d{4})?"
_DATE = _MONTH + rb" {1,2}(?P<day>\d{1,2}) " + _CLOCK + rb"(?P<zone>)"
_CTIME = rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) " + _DATE + rb" (?P<year>\d{4})"
_SYSLOG = _DATE + rb"(?P<year>)(?= )"

_BEFORE = rb"(?:<\d{1,3}>(?:\d )?)?(?:\[?(?P<level>" + _WORDS + rb")\]?:? {1,8})?\[?"
_DIGITS, _CAPITALS = b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANY = bytes(range(256))
_ISO_TIME = re.compile(_BEFORE + _ISO)
_RUNSERVER = re.compile(_BEFORE + _APACHE)
_LOGFMT = re.compile(rb"(?:[a-z.]{1,20}=[^\s=]{1,40} ){0,3}(?:ts|time|timestamp|t)=\"?" + _ISO)
_BEGINNINGS = (  # with what a line must begin, and what it must hold, for a pattern to be tried
    (b"<[" + _DIGITS + _CAPITALS, b":", _ISO_TIME),
    (b"<[" + _DIGITS + _CAPITALS, b"/", _RUNSERVER),
    (_ANY, b"[", re.compile(rb"(?P<access>(?:[^\s\[]{1,100} [^\s\[]{1,100}| -) [^\[\n]{1,100}\[)" + _APACHE)),
    (b"[", b"|", re.compile(rb"(?P<access>\[pid: \d+\|)[^\]\n]{0,80}\] [^\[\n]{0,300}\[" + _CTIME)),  # uWSGI
    (b"*" + _CAPITALS, b":", re.compile(rb"(?:\*\*\* Starting uWSGI [^\[\n]{0,60}\[)?" + _CTIME)),
    (b"<[" + _CAPITALS, b":", re.compile(_BEFORE + _SYSLOG)),
    (bytes(_CAPITALS.lower()) + b".", b"=", _LOGFMT),
)
_TIMES = tuple(
    tuple((inside, pattern) for begins, inside, pattern in _BEGINNINGS if byte in begins) for byte in range(256)
)
"""Patterns of lines that tell a time, by the first byte of a line."""

_NOBODY = b" - "  # so begins a line of an access log without an address, as over a Unix socket
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_OWN = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d) ")

_LEVEL = re.compile(
    # Upper case between separators, lower case only where it can be nothing else.
    rb"(?<![\w.])(?:" + _WORDS + rb")(?=[\s\]:|/),;=-]|\Z)"
    rb"|\[ *(?i:" + _WORDS + rb") *\]"
    rb"|\b(?:level|lvl|severity|levelname)=\"?(?i:" + _WORDS + rb")\b"
)
_FIRST_LEVEL = re.compile(
    rb"\[ *(?i:" + _WORDS + rb") *\]|(?i:" + _WORDS + rb"):|(?:" + _WORDS + rb") |(?:" + _WORDS + rb")\Z"
    rb"|(?:[a-z.]{1,20}=[^\s=]{1,60} ){0,3}(?:level|lvl|severity)=\"?(?i:" + _WORDS + rb")\b"
)
_WORD = re.compile(rb"(?i:" + _WORDS + rb")(?=\W*\Z)")
_CUT_JSON = re.compile(rb'"(?:level|levelname|severity|log\.level)": ?"(?i:' + _WORDS + rb')"')
_REQUEST = re.compile(rb'"[A-Z]{3,10} (?:[/*]|https?:)')  # what a visitor has chosen begins here

_SAID = (  # beginnings of lines without a level, and what level they have
    (TRACEBACK, 40),
    (b"Internal Server Error: /", 40),  # Django's logger django.request, as it prints without a formatter
    *((word, 30) for word in (b"Not Found: /", b"Bad Request: /", b"Method Not Allowed (", b"Forbidden (")),
    (b"procman.wsgi: Exception while", 40),
    (b"procman.wsgi: ", 20),
    (b"procman: ", 30),  # what was dropped
    (b"DAMN ! worker ", 40),  # uWSGI
    (b"*** HARAKIRI ON ", 40),
    *((b"HARAKIRI" + words, 40) for words in (b": ", b" !!! ", b" [core ", b" triggered ")),  # on which request
    (b"*** WARNING", 30),
    (b"*** uWSGI listen queue of socket ", 30),
    (b"!!! uWSGI process ", 50),  # "got Segmentation Fault !!!"
    (b"!!! ", 30),
)
_SAID_FIRST = frozenset(word[:1] for word, _ in _SAID)

_TIME_KEYS = ("time", "timestamp", "@timestamp", "ts", "asctime", "datetime", "date", "t")
_LEVEL_KEYS = ("level", "levelname", "severity", "log.level", "lvl", "loglevel", "level_name")
_TEXT_KEYS = ("message", "msg", "event", "text")
_TRACE_KEYS = ("exc_info", "exception", "exc_text", "traceback", "stack_trace", "error.stack_trace", "stack")
_BUNYAN = frozenset({"pid", "hostname"})
"""Keys by which lines of bunyan and pino are known: 30 is "info" there."""
_OURS = frozenset({"time", "program", "instance", "stream", "message"})


class Line(NamedTuple):
    """What a line says. `time` is seconds since the epoch, None where it tells none; `level` a number of LEVELS, 0
    where it tells none. `body` is the line without what procman put before or around it, `trace` the traceback that a
    JSON line holds. `continues`: it belongs to the line before. `access`: it is one of an access log. `exact`: its time
    names a zone. `stamped`: only procman has put a time there."""

    time: float | None
    level: int
    body: bytes
    continues: bool = False
    access: bool = False
    trace: bytes = b""
    exact: bool = False
    stamped: bool = False

    @property
    def begins(self) -> bool:
        """Whether this is surely the first line of what was printed at once. That of a traceback may be announced."""
        said = self.time is not None or self.level > 0
        return said and not self.continues and not self.body.startswith(TRACEBACK)

    @property
    def speaks(self) -> bool:
        """Whether what the program itself has printed tells a time or a level."""
        return self.level > 0 or (self.time is not None and not self.stamped)


class Clock(NamedTuple):
    """How a time that does not tell all is understood: without a zone it is local time in `zone` (None: that of this
    machine), without a year the last one before `now`. So it is for a time of an hour that a change of the clock
    repeats: the second one, once that has been."""

    now: float
    zone: tzinfo | None = None


def level_number(word: str) -> int:
    """The number of a level from its name, in any case, "warn" for one; 0 for what is none."""
    return _BY_WORD.get(word.upper(), 0)


def level_name(number: int) -> str:
    """ "error" for 40, "" for 0; a number between two levels has the name of the lower one."""
    return next((name for name, least in reversed(LEVELS.items()) if number >= least), "")


def parse(line: bytes, clock: Clock | None) -> Line:
    """What `line` says, which has no newline at its end. Of a long line only the beginning is looked at. Without a
    clock no time is worked out: it is 0.0 then, or None where there is none."""
    if b"\x1b" in line[:HEAD]:  # of rich, structlog, loguru, colorlog
        line = _COLOURS.sub(b"", line)
    first = line[:1]
    if first == b"{" and len(line) <= JSON_MAX:
        document = _json(line)
        if document is not None:
            return _of_json(line, document, clock)
    if first.isdigit() and (found := _OWN.match(line)):
        at = _time(_ISO_TIME.match(line), clock)
        inner = parse(line[found.end() :], clock) if not _OWN.match(line, found.end()) else Line(None, 0, line)
        if at is not None:
            return inner._replace(time=at, exact=True, stamped=inner.time is None)
    if first in (b" ", b"\t", b"\r", b""):
        if line.startswith(GROUP):
            return Line(None, 40, line)
        said = _plain(line, first, clock) if line.startswith(_NOBODY) else None
        return said if said and said.access else Line(None, 0, line, continues=True)
    return _plain(line, first, clock)


def _plain(line: bytes, first: bytes, clock: Clock | None) -> Line:
    head = line[:HEAD]
    for inside, pattern in _TIMES[first[0]]:
        found = pattern.match(head) if inside in head else None
        if found:
            break
    else:
        return _untimed(line, head, first)
    at, end, groups = _time(found, clock), found.end(), found.re.groupindex
    access = pattern is _RUNSERVER and head[end : end + 3] == b'] "'
    access = access or ("access" in groups and found["access"] is not None)
    word = found["level"] if "level" in groups else None
    level = _number(word) if word else 0
    if not level and not access:
        asked = _REQUEST.search(head, end, end + 160) if b'"' in head else None
        told = _LEVEL.search(head, end, asked.start() if asked else end + 160)
        told = told or (_LEVEL.search(head, 0, found.start("year")) if pattern is _LOGFMT else None)
        level = _number(told[0]) if told else _said(head[end + 3 :]) if head[end : end + 3] == b" - " else 0
        access = asked is not None and not level
    return Line(at, level or (20 if access else 0), line, access=access, exact=bool(found["zone"]))


def _untimed(line: bytes, head: bytes, first: bytes) -> Line:
    if first in _SAID_FIRST and (level := _said(head)):
        return Line(None, level, line)
    found = _CUT_JSON.search(head) if first == b"{" else _FIRST_LEVEL.match(head)
    return Line(None, _number(found[0]) if found else 40 if line.endswith(REMOTE) else 0, line)


def _said(head: bytes) -> int:
    return next((level for words, level in _SAID if head.startswith(words)), 0)


def _number(text: bytes) -> int:
    """The level of a match of _LEVEL or _FIRST_LEVEL: the word at its end."""
    level = _BY_WORD.get(text.strip(b"[]: ").decode())
    if level is None:
        found = _WORD.search(text)
        level = _BY_WORD.get(found[0].decode().upper(), 0) if found else 0
    return level


# --- times ----------------------------------------------------------------------------------------------------------


def _time(found: re.Match[bytes] | None, clock: Clock | None) -> float | None:
    if found is None or clock is None:
        return None if found is None else 0.0
    year, month, day, time, second, zone = found.group("year", "month", "day", "clock", "second", "zone")
    year = year or b"%d" % _year(month, int(day), clock.now)
    first, again = _minute(b" ".join((year, month, day)), time, zone or b"", clock.zone)
    minute = first if again > clock.now + AHEAD_SECONDS else again
    part = found["part"] if "part" in found.re.groupindex else b""
    at = minute + int(second) + (int(part) / 10 ** len(part) if part else 0.0)
    return at if EARLIEST <= at < LATEST else None  # no NaN; and a zone may lead out of the years that there are


@functools.lru_cache(maxsize=4096)
def _minute(date: bytes, clock: bytes, zone: bytes, local: tzinfo | None) -> tuple[float, float]:
    """Seconds since the epoch at the beginning of a minute; the two of one that comes twice (PEP 495). NaN for a date
    that is none."""
    year, month, day = date.split(b" ")
    number = int(month) if month.isdigit() else _MONTHS[month.decode()]
    try:
        at = datetime(int(year), number, int(day), int(clock[:2]), int(clock[3:]), tzinfo=_zone(zone) or local)
        first, again = at.timestamp(), at.replace(fold=1).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.nan, math.nan
    return first, max(first, again)  # in a gap fold 1 is the earlier one


def _zone(text: bytes) -> tzinfo | None:
    text = text.strip()
    if not text:
        return None
    if text == b"Z":
        return UTC
    minutes = int(text[1:3]) * 60 + int(text[-2:])
    return timezone(timedelta(minutes=-minutes if text[:1] == b"-" else minutes))


def _year(month: bytes, day: int, now: float) -> int:
    """The year of a date that names none: the last one in which it has been."""
    today = datetime.fromtimestamp(now + 86400, UTC)
    return today.year - ((_MONTHS[month.decode()], day) > (today.month, today.day))


def _told_time(value: object, clock: Clock | None) -> tuple[float, bool] | None:
    """The time that a JSON value is, and whether it names a zone: text, or a number of seconds, or of milli-, micro- or
    nanoseconds."""
    if isinstance(value, str):
        head = value[:64].encode(errors="replace")
        for pattern in (_ISO_TIME, _RUNSERVER):
            if found := pattern.match(head):
                at = _time(found, clock)
                return None if at is None else (at, bool(found["zone"]))
        try:
            value = float(value[:40])
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e8 < value < 1e20:
        return None
    seconds = float(value)
    while seconds > 1e11:
        seconds /= 1000
    return seconds, True


# --- JSON -----------------------------------------------------------------------------------------------------------


def _json(line: bytes) -> Mapping[str, Any] | None:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _of_json(line: bytes, document: Mapping[str, Any], clock: Clock | None) -> Line:
    if "record" in document:
        document = _of_loguru(document)
    told = (_told_time(document.get(key), clock) for key in _TIME_KEYS)
    at, exact = next(filter(None, told), (None, False))
    text = next((value for key in _TEXT_KEYS if isinstance(value := document.get(key), str)), "")
    body = text.encode("utf-8", "replace")
    if document.keys() >= _OURS:
        inner = parse(body, clock) if body[:1] != b"{" or body != line else Line(None, 0, body)
        return inner._replace(time=at, exact=exact, stamped=inner.time is None)
    higher = 10 if document.keys() >= _BUNYAN else 0
    level = next((level for key in _LEVEL_KEYS if (level := _json_level(document.get(key), higher))), 0)
    trace = next((text for key in _TRACE_KEYS if key in document and (text := _trace(document[key]))), "")
    trace_bytes = trace.encode("utf-8", "replace")
    return Line(at, level or (40 if trace else 0), body or line, trace=trace_bytes, exact=exact)


def _of_loguru(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What loguru prints with serialize=True, with the keys that others have; another document as it is."""
    record = document["record"]
    if not isinstance(record, dict) or not isinstance(level := record.get("level"), dict):
        return document
    time, name = record.get("time"), level.get("name")
    return {
        "time": time.get("timestamp", time.get("repr")) if isinstance(time, dict) else None,
        "level": name if isinstance(name, str) and level_number(name) else level.get("no"),
        "message": record.get("message"),
        "exception": document.get("text") if record.get("exception") else None,
    }


def _trace(value: object) -> str:
    """A traceback that is text, or lists and objects as structlog's dict_tracebacks make them; "" for none."""
    if isinstance(value, str):
        return value if "\n" in value else ""
    return tracebacks.of_structlog(value) if isinstance(value, list) else ""


def _json_level(value: object, higher: int) -> int:
    """A level by its name, or by its number, which is so much `higher` than in `logging`."""
    if isinstance(value, str):
        return level_number(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value - higher <= 60:
        return value - higher
    return 0

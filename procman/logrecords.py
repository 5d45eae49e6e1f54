"""From the bytes of a log to records: a line with those that belong to it, such as a traceback. Which of them are
wanted, and where in a large file to begin.

A record begins with a line that stands for itself. Indented and empty lines belong to the one before, and so does a
traceback to the line that announces it (a level of warning or worse); one that nothing announces is a record of its
own. What follows the first line of an exception's message belongs to it until a line tells a time or a level. Where a
script is no Python, the indented lines above `SyntaxError: ` are known when that comes, and begin a record.

Pure. Memory is bounded whatever the log holds: a line of more than LINE_MAX bytes, and a record of more than
RECORD_MAX, comes in parts, and what was decided of the first part holds for the others.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import UTC, timedelta, timezone
from enum import Enum
from typing import Literal, NamedTuple

from procman import logformat, tracebacks
from procman.logformat import Clock, Line
from procman.tracebacks import Traceback

LINE_MAX = 1024 * 1024
RECORD_MAX = 1024 * 1024
RECORD_LINES = 4000

PROBE = 64 * 1024
"""Bytes that are read to find the time at one place of a file."""

AHEAD = 1000
"""Records without a time that are read to find the time of those that follow."""

MESSAGE_LINES = 50
MESSAGE_MAX = 8 * 1024
"""Lines and bytes that may follow the first line of an exception's message, indented ones not counted."""

MESSAGE_SECONDS = 1.0
"""By so much later they may come, where it is known when a line came."""

DISORDER = 60.0
"""Seconds by which a line may stand behind a later one: several workers print, and an access log tells when a request
began."""

CROWD, CROWD_SECONDS = 20, 300.0
"""So many exact times within so many seconds: what stands behind them was printed just after."""

OFFSETS = (
    *(60 * hours for hours in (0, *range(1, 15), *range(-1, -13, -1))),
    *(210, 270, 330, 345, 390, 525, 570, 630, 765, 825, -150, -210, -570),
)
"""Minutes by which local time is ahead of UTC somewhere on earth; of two that are as likely the first one is taken."""

_CHAIN = (b"The above exception was the direct cause of", b"During handling of the above exception, another")
_RAISED = re.compile(rb"[A-Za-z_\x80-\xff][\w.<>\x80-\xff]*(?:: |:?\Z)")
_SYNTAX = b"SyntaxError: ", b"IndentationError: ", b"TabError: "
_FILE = re.compile(rb'  File "[^"\n]*", line \d+\Z')
_CAUGHT = b'> File "'  # so loguru marks the frame that caught; its other frames are indented
_SEES_MORE = re.compile(
    rb"\\[AZz]|\(\?<?!|\(\?>|[*+?}]\+"  # ends of the text, "not followed by", no way back
    rb"|\(\?[a-zA-Z]*-[a-zA-Z]*m"  # ^ and $ that are ends of the text
)
_ANNOUNCES, _ERROR = logformat.LEVELS["warning"], logformat.LEVELS["error"]


class Record(NamedTuple):
    """`lines` are as they were printed, each with its newline but for an unfinished last one; `said` is what they say.
    `at` is the time of the first one or, where it tells none, that of the record before (None: no record had one).
    `part`: what came before was too long, and this goes on with it."""

    lines: tuple[bytes, ...]
    said: tuple[Line, ...]
    at: float | None
    level: int
    part: bool = False

    @property
    def text(self) -> bytes:
        """All lines."""
        return b"".join(self.lines)


class _Trace(Enum):
    """Where in a traceback the last line was."""

    NONE = 0
    FRAMES = 1
    RAISED = 2  # after the exception: more of its message may follow, or a chain
    CHAIN = 3
    GROUP = 4  # all lines of a group are indented; a chain may follow


class Joints:
    """Tells of the lines of one stream, which come one after the other, what belongs together. `head` is the first line
    of the record at work."""

    def __init__(self) -> None:
        self.head = Line(None, 0, b"")
        self._trace = _Trace.NONE
        self._traced = False  # the record has a traceback
        self._lines = self._bytes = 0  # of the message, after its first line
        self._came = -math.inf  # when that came

    def begin(self, said: Line) -> None:
        """A record begins with this line."""
        self.head = said
        if not said.level and said.body.startswith(_SYNTAX):
            self.head = said._replace(level=_ERROR)
        self._trace = _opens(said.body)
        if self._trace is _Trace.NONE and said.body.endswith(logformat.TRACEBACK):  # on one line with what announces it
            self._trace = _Trace.GROUP if said.body.endswith(logformat.GROUP) else _Trace.FRAMES
        self._traced = self._trace is not _Trace.NONE

    def begin_syntax_error(self, said: Line) -> None:
        """A record begins with this line, which says where a script is no Python."""
        self.head = said._replace(level=_ERROR, continues=False)
        self._trace, self._traced = _Trace.NONE, True

    @property
    def in_frames(self) -> bool:
        """Whether a traceback has begun whose exception is yet to come."""
        return self._trace in (_Trace.FRAMES, _Trace.CHAIN)

    def forget(self) -> None:
        """Lines are missing here."""
        self._trace, self._traced = _Trace.NONE, False

    def joins(self, said: Line, came: float | None = None) -> bool:
        """Whether this line belongs to the record at work; `came` is when it came, where that is known."""
        if said.continues:
            return True
        before, self._trace = self._trace, _opens(said.body)
        if self._trace is not _Trace.NONE:
            if before is _Trace.CHAIN:
                return True
            announced = self.head.level >= _ANNOUNCES and not self._traced and not self.head.access
            self._traced = self._traced or announced
            return announced
        if before is _Trace.NONE:
            return False
        self._trace = self._after(before, said, math.inf if came is None else came)
        return self._trace is not _Trace.NONE

    def _after(self, before: _Trace, said: Line, came: float) -> _Trace:
        """Where in a traceback a line is that does not open one."""
        body = said.body
        if before is _Trace.FRAMES and _RAISED.match(body) and not (said.level and body[:4].isupper()):
            self._lines = self._bytes = 0
            self._came = came
            return _Trace.RAISED
        if before is _Trace.FRAMES and body.startswith(_CAUGHT):
            return _Trace.FRAMES
        if before in (_Trace.RAISED, _Trace.GROUP) and body.startswith(_CHAIN):
            return _Trace.CHAIN
        if before is _Trace.CHAIN and body == b'"""':
            return _Trace.CHAIN
        if before is _Trace.RAISED and not said.speaks and not came > self._came + MESSAGE_SECONDS:
            self._lines += 1
            self._bytes += len(body)
            if self._lines <= MESSAGE_LINES and self._bytes <= MESSAGE_MAX:
                return _Trace.RAISED
        return _Trace.NONE


def _opens(body: bytes) -> _Trace:
    """What a line opens that is the first one of a traceback."""
    if b"Traceback" not in body:
        return _Trace.NONE
    if body.startswith(logformat.TRACEBACK):
        return _Trace.FRAMES
    if body.startswith(logformat.GROUP):
        return _Trace.GROUP
    return _Trace.CHAIN if body.endswith(logformat.REMOTE) else _Trace.NONE


def _place(said: Sequence[Line]) -> int:
    """How many of the last lines tell the place of the SyntaxError that follows: the file, the source and a mark below
    it, of which Python leaves out what it does not know."""
    for count, line in enumerate(reversed(said[-3:]), 1):
        if line.continues and _FILE.match(line.body):
            return count
        if not line.body.startswith(b"    "):
            break
    return 0


class Records:
    """Makes records of bytes that come in pieces.

    `begin` says what the first byte begins: a "record"; a "line", which may belong to a record before; or nothing, as
    it may stand "within" a line. What comes before the first line that surely begins a record is left out then, but
    not much more than PROBE bytes, and counted: `skipped`. With `sure` neither the time that procman has put before a
    line makes it such a one, nor a traceback: a line before may announce it.

    A time without a zone between many exact ones that lie close together is of the zone with which it is one of them.
    """

    def __init__(
        self, clock: Clock, begin: Literal["record", "line", "within"] = "record", *, sure: bool = False
    ) -> None:
        self.skipped = 0
        self._clock = clock
        self._rest = b""
        self._within = begin == "within"  # the next bytes go on with a line whose beginning is gone, or was given out
        self._skipping = begin != "record"
        self._sure = sure
        self._lines: list[bytes] = []
        self._said: list[Line] = []
        self._size = 0
        self._part = False
        self._joints = Joints()
        self._at: float | None = None
        self._exact: collections.deque[float] = collections.deque(maxlen=CROWD)

    def feed(self, chunk: bytes) -> Iterator[Record]:
        """More bytes; the records that are complete now."""
        *whole, self._rest = (self._rest + chunk).split(b"\n") if self._rest else chunk.split(b"\n")
        for line in whole:
            yield from self._line(line + b"\n")
        if len(self._rest) > LINE_MAX:
            piece, self._rest = self._rest, b""
            yield from self._line(piece)

    def read_at(self, now: float) -> None:
        """When what is fed from now on is read, in seconds since the epoch."""
        self._clock = self._clock._replace(now=now)

    def flush(self) -> Iterator[Record]:
        """What there is, without waiting for lines that may belong to it: those come as parts. An unfinished line is
        kept."""
        if self._lines:
            yield self._out()
            self._part = True

    @property
    def begun(self) -> bool:
        """Whether nothing more is left out."""
        return not self._skipping

    def gap(self) -> Iterator[Record]:
        """Whole lines are not fed here in which nothing is wanted: what there is so far is given out."""
        yield from self.flush()
        self._part = False
        self._joints.forget()

    def end(self) -> Iterator[Record]:
        """There are no more bytes: what is left, an unfinished line too."""
        if self._rest:
            piece, self._rest = self._rest, b""
            yield from self._line(piece)
        yield from self.flush()
        self._part = self._within = False

    def _line(self, raw: bytes) -> Iterator[Record]:
        if self._within:
            yield from self._more_of_a_line(raw)
            return
        self._within = raw[-1:] != b"\n"
        said = self._parse(raw.rstrip(b"\r\n") if not self._within else raw)
        if self._skipping:
            begins = said.begins and (not self._sure or (said.speaks and _opens(said.body) is _Trace.NONE))
            if not begins and self.skipped < PROBE:
                self.skipped += len(raw)
                return
            self._skipping = False
        ends = not said.level and said.body.startswith(_SYNTAX) and not self._joints.in_frames
        if ends and (count := _place(self._said)):
            yield from self._split(count)
        elif self._joints.joins(said, said.time if said.stamped else None) and (self._lines or self._part):
            if self._size + len(raw) > RECORD_MAX or len(self._lines) >= RECORD_LINES:
                yield from self.flush()
        elif self._lines or self._part:
            if self._lines:
                yield self._out()
            self._part = False
        if not self._lines and not self._part:
            self._begin(said)
        self._lines.append(raw)
        self._said.append(said)
        self._size += len(raw)

    def _split(self, count: int) -> Iterator[Record]:
        """The last lines, so many of them, belong to the SyntaxError that follows: a record begins with them."""
        lines, said = self._lines[-count:], self._said[-count:]
        del self._lines[-count:], self._said[-count:]
        if self._lines:
            yield self._out()
        self._part = False
        self._joints.begin_syntax_error(said[0])
        said[0] = self._joints.head
        if said[0].time is not None:
            self._at = said[0].time
        self._lines, self._said, self._size = lines, said, sum(map(len, lines))

    def _parse(self, line: bytes) -> Line:
        said = logformat.parse(line, self._clock)
        if said.time is None:
            return said
        if said.exact:
            self._exact.append(said.time)
        elif crowded(self._exact) and abs(said.time - self._exact[-1]) > DISORDER:
            ahead = (logformat.parse(line, self._clock._replace(zone=UTC)).time or 0.0) - self._exact[-1]
            offset = next((offset for offset in OFFSETS if abs(ahead - offset * 60) <= DISORDER), None)
            if offset is not None:
                self._clock = self._clock._replace(zone=timezone(timedelta(minutes=offset)))
                return logformat.parse(line, self._clock)
        return said

    def _more_of_a_line(self, raw: bytes) -> Iterator[Record]:
        self._within = raw[-1:] != b"\n"
        if self._skipping:
            self.skipped += len(raw)
            return
        yield from self.flush()
        self._lines, self._said, self._size = [raw], [Line(None, 0, b"", continues=True)], len(raw)

    def _begin(self, said: Line) -> None:
        self._joints.begin(said)
        if said.time is not None:
            self._at = said.time

    def _out(self) -> Record:
        record = Record(tuple(self._lines), tuple(self._said), self._at, self._joints.head.level, self._part)
        self._lines, self._said, self._size = [], [], 0
        return record


def crowded(times: Sequence[float]) -> bool:
    """Whether these exact times, one after the other, lie so close that any other one among them is near."""
    return len(times) >= CROWD and abs(times[-1] - times[0]) <= CROWD_SECONDS


class Filter(NamedTuple):
    """Which records are wanted: from `since` to `until` (seconds since the epoch), at least of `level`, with a match of
    `grep`. A record whose time nobody knows is taken."""

    since: float | None = None
    until: float | None = None
    level: int = 0
    grep: re.Pattern[bytes] | None = None

    def wants(self, record: Record) -> bool:
        """Whether it is; of a part of one see `Whole`."""
        return self._in_time_and_level(record) and self._matches(record)

    def after(self, record: Record) -> bool:
        """Whether all that follows is later than `until`, too."""
        told = record.said[0].time
        return self.until is not None and told is not None and told > self.until + DISORDER

    @property
    def chooses(self) -> bool:
        """Whether anything but the time matters."""
        return bool(self.level or self.grep)

    def _in_time_and_level(self, record: Record) -> bool:
        if record.at is not None:
            if self.since is not None and record.at < self.since:
                return False
            if self.until is not None and record.at > self.until:
                return False
        return record.level >= self.level

    def _matches(self, record: Record) -> bool:
        if self.grep is None:
            return True
        lines = (line[:-2] if line.endswith(b"\r\n") else line.rstrip(b"\n") for line in record.lines)
        return any(map(self.grep.search, lines))


class Whole:
    """Lets all parts of a record through, or none: with a part that is `wanted` come those before it, of a very long
    record a mebibyte of them or none, and those that follow."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        self._before: list[Record] = []
        self._size = 0
        self._lets = False

    def let(self, record: Record) -> Sequence[Record]:
        """To be asked of all records of one log in their order. What is to be shown now."""
        if not record.part:
            self._before, self._size, self._lets = [], 0, False
        if self._lets or self._wanted.wants(record):
            shown = [*self._before, record]
            self._before, self._size, self._lets = [], 0, True
            return shown
        self._before.append(record)
        self._size += sum(map(len, record.lines))
        if self._size > RECORD_MAX:
            self._before, self._size = [], 0
        return ()


def timed(records: Iterable[Record]) -> Iterator[Record]:
    """The same records; those before the first time have that time, unless there are very many of them."""
    waiting: list[Record] = []
    size, found = 0, False
    for record in records:
        if found:
            yield record
            continue
        waiting.append(record)
        size += sum(map(len, record.lines))
        found = record.at is not None or len(waiting) >= AHEAD or size > RECORD_MAX
        if found:
            yield from (one._replace(at=record.at) for one in waiting)
            waiting.clear()
    yield from waiting


def sieve(grep: re.Pattern[bytes] | None) -> Callable[[bytes], object] | None:
    """A quick look at many lines at once: what it finds nothing in has no line that `grep` matches. None where there
    is no such thing for this pattern, as it could see that other lines follow."""
    if grep is None or _SEES_MORE.search(grep.pattern):
        return None
    search = re.compile(grep.pattern, grep.flags | re.MULTILINE).search
    return lambda lines: search(lines.replace(b"\r\n", b"\n"))


def tracebacks_in(record: Record) -> Iterator[Traceback]:
    """Those of a record, in whatever format its lines are."""
    for said in record.said:
        if said.trace:
            yield from tracebacks.scan(said.trace.decode(errors="replace").split("\n"))
    if len(record.lines) > 1 or logformat.TRACEBACK in record.lines[0]:
        bodies = b"\n".join(said.body for said in record.said).decode(errors="replace").split("\n")
        found = tracebacks.syntax_error(bodies) if bodies[0].startswith('  File "') else None
        yield from tracebacks.scan(bodies) if found is None else (found,)


def last_traceback(data: bytes, clock: Clock) -> Traceback | None:
    """The last traceback in the lines of `data`, in whatever format they are."""
    if not any(word in data for word in (b"Traceback (most", b"exc_type", *_SYNTAX)):
        return None
    maker = Records(clock)
    records = itertools.chain(maker.feed(data), maker.end())
    found = itertools.chain.from_iterable(map(tracebacks_in, records))
    return next(iter(collections.deque(found, maxlen=1)), None)


def seek(size: int, since: float) -> Generator[int, float | None, int]:
    """Where in a file of `size` bytes to begin, so that nothing from `since` on is missed: a binary search.

    Yields an offset and is sent the time that the first line from there on tells, None when there is none near.
    Returns the offset: 0, or one somewhere within a line.
    """
    low, high = 0, size
    while high - low > PROBE:
        middle = (low + high) // 2
        at = yield middle
        if at is not None and at < since - DISORDER:
            low = middle
        else:
            high = middle
    return low


def first_time(window: bytes, clock: Clock, *, whole: bool) -> float | None:
    """The first time that the lines of `window` tell, an exact one if there is one near; `whole`: its first line is,
    else it may be the end of one."""
    lines = window.split(b"\n")
    said = (logformat.parse(line, clock) for line in (lines if whole else lines[1:]))
    first = list(itertools.islice((one for one in said if one.time is not None), 1))
    if first and not first[0].exact:
        first += itertools.islice((one for one in said if one.time is not None), CROWD)
    return next((one.time for one in (*(one for one in first if one.exact), *first)), None)

"""What a log amounts to: lines and bytes a minute, levels, answers and paths of access logs, and errors, grouped.

Pure. Memory is bounded whatever the log holds: of too many paths and errors the least are put together as "others", and
of a long time each bar stands for more minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from procman import accesslog, logformat, logrecords
from procman.logrecords import Record
from procman.records import dataclass
from procman.tracebacks import Traceback

PATHS_MAX = 2000
ERRORS_MAX = 200
BARS_MAX = 1440
SHOWN = 20
"""Paths in a document."""

Document = dict[str, Any]


@dataclass(slots=True)
class _Times:
    """The first and the last time of something; None where no line told one."""

    first: float | None = None
    last: float | None = None

    def add(self, at: float | None) -> None:
        if at is not None:
            self.first = at if self.first is None else min(self.first, at)
            self.last = at if self.last is None else max(self.last, at)


@dataclass(slots=True)
class _Path:
    """Answers for one method and path. `timed` of them told how many `seconds` they took."""

    count: int = 0
    errors: int = 0
    timed: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    def add(self, status: int, seconds: float | None) -> None:
        self.count += 1
        self.errors += status >= 500
        if seconds is not None:
            self.timed += 1
            self.seconds += seconds
            self.slowest = max(self.slowest, seconds)

    def join(self, other: _Path) -> None:
        self.count += other.count
        self.errors += other.errors
        self.timed += other.timed
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)

    def document(self) -> Document:
        average = self.seconds / self.timed if self.timed else None
        slowest = self.slowest if self.timed else None
        return {"count": self.count, "errors": self.errors, "average_seconds": average, "slowest_seconds": slowest}


@dataclass(slots=True)
class _Error:
    """Tracebacks of the same error, and the first of them."""

    sample: Traceback
    count: int = 0
    times: _Times = field(default_factory=_Times)


class _Bars:
    """Lines and bytes by the minute; by more of them when there are too many."""

    def __init__(self) -> None:
        self.seconds = 60
        self._bars: dict[int, list[int]] = {}

    def add(self, at: float, lines: int, size: int) -> None:
        bar = self._bars.setdefault(int(at // self.seconds), [0, 0])
        bar[0] += lines
        bar[1] += size
        while len(self._bars) > BARS_MAX:
            self._double()

    def _double(self) -> None:
        self.seconds *= 2
        bars: dict[int, list[int]] = {}
        for key, (lines, size) in self._bars.items():
            bar = bars.setdefault(key // 2, [0, 0])
            bar[0] += lines
            bar[1] += size
        self._bars = bars

    def list(self) -> list[Document]:
        return [
            {"at": key * self.seconds, "lines": lines, "bytes": size}
            for key, (lines, size) in sorted(self._bars.items())
        ]


class Summary:
    """Of one log, or of several that are added."""

    def __init__(self) -> None:
        self._lines = self._bytes = 0
        self._untimed = self._untimed_bytes = 0
        self._times = _Times()
        self._bars = _Bars()
        self._levels: dict[str, int] = {}
        self._statuses: dict[str, int] = {}
        self._paths: dict[tuple[str, str], _Path] = {}
        self._other_paths = _Path()
        self._errors: dict[str, _Error] = {}
        self._other_errors = 0

    def add(self, record: Record) -> None:
        """One more record of a log. Those of one log come in their order."""
        size = sum(map(len, record.lines))
        self._lines += len(record.lines)
        self._bytes += size
        self._times.add(record.at)
        if record.at is None:
            self._untimed += len(record.lines)
            self._untimed_bytes += size
        else:
            self._bars.add(record.at, len(record.lines), size)
        if not record.part:
            level = logformat.level_name(record.level) or "none"
            self._levels[level] = self._levels.get(level, 0) + 1
            self._answer(record.said[0].body)
        for found in logrecords.tracebacks_in(record):
            self._error(found, record.at)

    def _answer(self, body: bytes) -> None:
        answer = accesslog.parse(body)
        if answer is None:
            return
        kind = f"{answer.status // 100}xx"
        self._statuses[kind] = self._statuses.get(kind, 0) + 1
        path = self._paths.setdefault((answer.method, accesslog.place(answer.path)), _Path())
        path.add(answer.status, answer.seconds)
        if len(self._paths) > PATHS_MAX:
            weights = sorted(self._paths.items(), key=lambda item: (item[1].slowest, item[1].count))
            for key, least in weights[: PATHS_MAX // 2]:
                self._other_paths.join(least)
                del self._paths[key]

    def _error(self, found: Traceback, at: float | None) -> None:
        error = self._errors.setdefault(found.key, _Error(found))
        error.count += 1
        error.times.add(at)
        if len(self._errors) > ERRORS_MAX:
            weights = sorted(self._errors.items(), key=lambda item: (item[1].count, item[1].times.last or 0.0))
            for key, least in weights[: ERRORS_MAX // 2]:
                self._other_errors += least.count
                del self._errors[key]

    def document(self) -> Document:
        """For JSON, and for `procmanctl` to draw. Times are seconds since the epoch, null where no line tells one."""
        first, last = self._times.first, self._times.last
        minutes = (last - first) / 60 if first is not None and last is not None else 0.0
        timed = self._lines - self._untimed
        return {
            "lines": self._lines,
            "bytes": self._bytes,
            "first": first,
            "last": last,
            "lines_a_minute": timed / max(minutes, 1.0) if timed else None,
            "bytes_a_minute": (self._bytes - self._untimed_bytes) / max(minutes, 1.0) if timed else None,
            "untimed_lines": self._untimed,
            "bar_seconds": self._bars.seconds,
            "bars": self._bars.list(),
            "levels": {name: self._levels[name] for name in (*logformat.LEVELS, "none") if name in self._levels},
            "statuses": dict(sorted(self._statuses.items())),
            "paths": self._path_list(),
            "other_paths": self._other_paths.document() if self._other_paths.count else None,
            "errors": [self._error_document(key, error) for key, error in self._sorted_errors()],
            "other_errors": self._other_errors,
        }

    def _path_list(self) -> list[Document]:
        """The slowest on average where the log tells how long answers took, else the most frequent."""

        def weight(item: tuple[tuple[str, str], _Path]) -> tuple[float, int]:
            path = item[1]
            return (path.seconds / path.timed if path.timed else 0.0, path.count)

        best = sorted(self._paths.items(), key=weight, reverse=True)[:SHOWN]
        return [{"method": method, "path": path, **found.document()} for (method, path), found in best]

    def _sorted_errors(self) -> Iterable[tuple[str, _Error]]:
        return sorted(self._errors.items(), key=lambda item: (-item[1].count, -(item[1].times.last or 0.0)))

    def _error_document(self, key: str, error: _Error) -> Mapping[str, Any]:
        sample = error.sample
        return {
            "key": key,
            "exception": sample.exception,
            "message": sample.message,
            "count": error.count,
            "first": error.times.first,
            "last": error.times.last,
            "raised": list(sample.raised),
            "frames": list(sample.frames[-20:]),
            "sample": sample.text,
        }

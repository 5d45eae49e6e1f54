"""What became of requests, as values: how many failed, in which way, who answered, and how long it took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

KINDS = {
    "refused": "no connection",
    "reset": "the server had the request, and the connection ended before the first byte of the answer",
    "cut": "a reset in the midst of an answer",
    "short": "an orderly end in the midst of an answer",
    "wrong": "another answer than the right one",
    "error": "a status of 5xx",
    "slow": "no whole answer in time",
}
"""How a request fails."""

FAILURES_SHOWN = 200
"""Failures that are kept with their details; all are counted."""


@dataclass(slots=True)
class Failure:
    """One failed request. Times are monotonic seconds, which all processes of a machine share: `began` is before the
    connection was made, where it was new, else before the request was sent. `who` answered on this connection before
    ("" on a new one)."""

    began: float
    at: float
    kind: str
    mode: str
    who: str
    detail: str


@dataclass(slots=True)
class Tally:
    """What became of the requests of one mode.

    A keep-alive connection that the server closes while it is idle is no failure, for a client may ask again (RFC 9112,
    section 9.3.1): `idle_closed` counts them, but for those that nobody had used for a while (`unused_closed`);
    `idle_closed_most` those of the one connection that had most; `retried` are the requests that met such a close on
    the wire, and were asked again. `told_close`: answers with `Connection: close` to a client that would have gone on;
    `behind_close` are pipelined requests behind such an answer, which are asked again as well (section 9.6).
    """

    requests: int = 0
    ok: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    idle_closed: int = 0
    idle_closed_most: int = 0
    unused_closed: int = 0
    retried: int = 0
    told_close: int = 0
    behind_close: int = 0
    connections: int = 0
    p50: float = 0.0
    p99: float = 0.0
    slowest: float = 0.0
    _took: list[float] = field(default_factory=list)

    def right(self, seconds: float) -> None:
        """A right answer, after so many seconds."""
        self.ok += 1
        self._took.append(seconds)

    def wrong(self, failure: Failure) -> None:
        """A request that failed."""
        self.failed[failure.kind] = self.failed.get(failure.kind, 0) + 1
        if len(self.failures) < FAILURES_SHOWN:
            self.failures.append(failure)

    def add(self, other: Self) -> None:
        """Takes in what another connection saw."""
        counted = "requests ok idle_closed unused_closed retried told_close behind_close connections"
        for name in counted.split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed = dict(Counter(self.failed) + Counter(other.failed))
        self.failures = sorted(self.failures + other.failures, key=lambda failure: failure.at)[:FAILURES_SHOWN]
        self.idle_closed_most = max(self.idle_closed_most, other.idle_closed_most)
        self._took += other._took

    def document(self) -> dict[str, Any]:
        """As JSON has it: figures instead of each single latency."""
        took = sorted(self._took)
        self.p50, self.p99, self.slowest = (percentile(took, percent) for percent in (50, 99, 100))
        document = asdict(self)
        del document["_took"]
        return document

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The tally that `document()` has told of."""
        return cls(**{**document, "failures": [Failure(**failure) for failure in document["failures"]]})

    @property
    def failed_count(self) -> int:
        return sum(self.failed.values())

    def line(self) -> str:
        """All figures that are not 0, in one line."""
        failed = ", ".join(f"{kind} {count}" for kind, count in sorted(self.failed.items()))
        counts = {
            "idle closes": self.idle_closed,
            "unused closes": self.unused_closed,
            "asked again": self.retried,
            "told to close": self.told_close,
            "behind a close": self.behind_close,
        }
        rest = "".join(f", {name} {count}" for name, count in counts.items() if count)
        times = f"p50 {self.p50 * 1000:.1f} ms, p99 {self.p99 * 1000:.0f} ms, slowest {self.slowest:.2f} s"
        failures = f"{self.failed_count} ({failed})" if failed else "0"
        return f"failed {failures} of {self.requests}, {times}{rest}"


def percentile(in_order: list[float], percent: float) -> float:
    """Nearest rank; 0 for none."""
    return in_order[max(0, math.ceil(len(in_order) * percent / 100) - 1)] if in_order else 0.0


@dataclass(slots=True)
class Seen:
    """When a generation of the server answered, and how often. The times are as in Failure."""

    first: float
    last: float
    answers: int = 0


@dataclass(slots=True)
class Result:
    """One load, whole. `generations` are by "PID VERSION", in the order of their first answers; `longest_gap` is the
    longest time without any right answer, in seconds."""

    seconds: float = 0.0
    longest_gap: float = 0.0
    modes: dict[str, Tally] = field(default_factory=dict)
    generations: dict[str, Seen] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        """All modes together. The percentiles are those of the worst one."""
        total = Tally()
        for tally in self.modes.values():
            total.add(tally)
            for name in ("p50", "p99", "slowest"):
                setattr(total, name, max(getattr(total, name), getattr(tally, name)))
        return total

    @property
    def versions(self) -> list[str]:
        """The versions that answered, in the order of their first answers."""
        return list(dict.fromkeys(who.partition(" ")[2] for who in self.generations))

    @property
    def pids(self) -> list[int]:
        """The processes that answered, in the order of their first answers."""
        return [int(who.partition(" ")[0]) for who in self.generations]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "seconds": self.seconds,
            "longest_gap": self.longest_gap,
            "modes": {mode: tally.document() for mode, tally in self.modes.items()},
            "generations": {who: asdict(seen) for who, seen in self.generations.items()},
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The result that `document()` has told of."""
        modes = {mode: Tally.of(tally) for mode, tally in document["modes"].items()}
        generations = {who: Seen(**seen) for who, seen in document["generations"].items()}
        return cls(document["seconds"], document["longest_gap"], modes, generations)

    def lines(self) -> Iterator[str]:
        """The result in words, with the first failures."""
        for mode, tally in self.modes.items():
            yield f"{mode}: {tally.line()}"
        gap = f"longest time without an answer {self.longest_gap:.2f} s"
        yield f"{self.seconds:.1f} s, {gap}, answered by {len(self.generations)} processes"
        for failure in self.total.failures[:10]:
            yield f"  {failure.kind} ({failure.mode}, before: {failure.who or 'new'}): {failure.detail}"

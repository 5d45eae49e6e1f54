"""A canary: for a while a share of the new connections goes to a successor, and what comes of them decides. Pure.

What is seen of both versions are counts: answers, those of them with a status of 5xx, tracebacks, workers that died
(`Tally`, from what they print). `judge` compares the successor's with those of the one before, in the same time. What
else ends a canary (the successor has ended, its probe fails, an operator says so) needs no judgement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from procman import accesslog
from procman.config import Listener, Program
from procman.records import dataclass

DEFAULT_SECONDS = 120.0
"""How long a canary takes where nobody says it."""

MIN_ANSWERS = 10
"""With fewer answers their share of 5xx says nothing."""

MIN_BAD = 3
"""Fewer answers of 5xx, or tracebacks, or dead workers, can be chance."""

SIGMAS = 4.0
"""By how many standard deviations the successor must be worse than the one before: it is looked at again and again."""

PRIOR_ANSWERS = 20
"""The one before counts as if it had given one bad answer in so many more: nothing is known to be without a fault."""

FAILURES = 3
"""So many times in a row without an answer are no chance: for a moment all its workers may be busy."""

WAIT_LOOKS = 10
"""A connection that was seen waiting, and is there after so many looks more, one a second, is accepted by nobody."""

PATH = "/?procman-canary"
"""What the successor is asked for. Lines of output with its query are those of our own requests: they do not count."""

_OURS = PATH[2:].encode()

LINE_MAX = 16 * 1024
"""Of a longer line only the beginning counts. The access log of the built-in server has none of more than 4 KB."""


@dataclass(frozen=True, slots=True)
class Canary:
    """`share` (0 to 1) of new connections for `seconds`."""

    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Wish:
    """What a reload asks for. None: as the table says; a share of 0: no canary."""

    share: float | None = None
    seconds: float | None = None

    def of(self, program: Program) -> Canary | None:
        """The canary of a successor of `program`."""
        share = program.canary if self.share is None else self.share
        return Canary(share, self.seconds or program.canary_seconds or DEFAULT_SECONDS) if share else None


AS_TABLE, NO_CANARY = Wish(), Wish(share=0.0)


def obstacle(program: Program, listeners: Sequence[Listener]) -> str:
    """Why there can be no canary for `program`, which listens on `listeners`; "" where there can."""
    if not listeners:
        return "a canary needs a listener: it gets a share of the new connections"
    for listener in listeners:
        if listener.address.kind == "unix":
            return f"connections to the Unix socket {listener.address.path} can't be shared out: a canary needs TCP"
        if listener.reuse_port:
            return f"a canary can't share the listener {listener.title}, which has reuse_port"
    return "" if program.reload == "overlap" else 'a canary needs reload = "overlap"'


# --- what is seen -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """What one of the two versions did in the time of the canary. `errors` are answers with a status of 5xx, `deaths`
    those of workers of gunicorn or uWSGI, whose own process goes on."""

    answers: int = 0
    errors: int = 0
    tracebacks: int = 0
    deaths: int = 0

    def __add__(self, other: Counts) -> Counts:
        both = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(one + another for one, another in both))


_TRACEBACK = re.compile(rb"^[^\n]*\bTraceback \(most recent call last\):", re.MULTILINE)
_CHAINED = re.compile(rb"^(?:During handling of the above|The above exception was the direct cause)", re.MULTILINE)
_DEATH = re.compile(
    rb"^\[[^\n]*\] Worker \(pid:[0-9]+\) (?:was sent SIG(?!TERM)|exited with code)|^DAMN ! worker [0-9]+ \(pid: ",
    re.MULTILINE,
)


class Tally:
    """Counts what one stream of output tells. `trouble` is called when there is more of what is bad."""

    def __init__(self, trouble: Callable[[], None] = lambda: None) -> None:
        self.counts = Counts()
        self._trouble = trouble
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """More output, which may end within a line."""
        lines, newline, rest = (self._rest + chunk).rpartition(b"\n")
        self._rest = rest[:LINE_MAX]
        if not newline:
            return
        found = count(lines)
        if found != Counts():
            self.counts += found
        if found.errors or found.tracebacks or found.deaths:
            self._trouble()


def count(lines: bytes) -> Counts:
    """What whole lines of output tell. Our own requests are nobody's visit."""
    if _OURS in lines:
        lines = b"\n".join(line for line in lines.split(b"\n") if _OURS not in line)
    answers = filter(None, map(accesslog.parse, lines.split(b"\n")))
    statuses = [answer.status for answer in answers if (answer.method, answer.path) != accesslog.NO_REQUEST]
    tracebacks = deaths = 0
    # Each look at all of it costs: a search for a few words costs little.
    if b"Traceback (most" in lines:
        tracebacks += len(_TRACEBACK.findall(lines))
    if b" above exception" in lines:
        # Those of one chain are one. What comes between two of them may be here already, the second yet to come.
        tracebacks -= len(_CHAINED.findall(lines))
    if b"] Worker (pid:" in lines or b"DAMN ! " in lines:
        deaths = len(_DEATH.findall(lines))
    return Counts(len(statuses), sum(status >= 500 for status in statuses), tracebacks, deaths)


# --- what it means --------------------------------------------------------------------------------------------------


def judge(share: float, successor: Counts, before: Counts) -> str:
    """Why the successor, which got `share` of the connections, is worse than the one before; "" while it is not."""
    if successor.answers >= MIN_ANSWERS and successor.errors >= MIN_BAD:
        usual = (before.errors + 1) / (before.answers + PRIOR_ANSWERS)
        expected = successor.answers * min(usual, 1.0)
        if successor.errors > expected + SIGMAS * math.sqrt(expected * max(0.0, 1.0 - usual)):
            return (
                f"{successor.errors} of its {successor.answers} answers were 5xx"
                f" (before: {before.errors} of {before.answers})"
            )
    told = successor.answers and before.answers
    ratio = successor.answers / before.answers if told else share / (1.0 - share)
    if _more(successor.tracebacks, before.tracebacks, ratio):
        return f"it printed {successor.tracebacks} tracebacks (before: {before.tracebacks})"
    if _more(successor.deaths, before.deaths, ratio):
        return f"{successor.deaths} of its workers died (before: {before.deaths})"
    return ""


class Silence:
    """Whether the successor answers at one of its sockets. It must do so where the one before does: what both do not
    answer (TLS is spoken there, a database is down) condemns nobody."""

    def __init__(self) -> None:
        self.of_use = True
        """Whether it makes sense to ask again."""
        self.settled = False
        """Whether nothing is open that another answer would show."""
        self._failures = 0
        self._known = False
        self._tries = FAILURES

    def heard(self, problem: str, before: str = "") -> str:
        """What became of asking the successor: "" or why it did not answer; then of asking the one before, too. Returns
        why that is the end of the canary, or ""."""
        if problem and before:
            self._tries -= 1
            self.of_use = self._known or self._tries > 0
            self.settled = self._known or not self.of_use
            return ""
        self._known = True
        self._failures = self._failures + 1 if problem else 0
        self.settled = not problem
        return problem if self._failures >= FAILURES else ""


class Waiting:
    """Whether connections wait at the successor, and nobody accepts them."""

    def __init__(self) -> None:
        self._clients: frozenset[tuple[bytes, int]] = frozenset()
        self._looks = 0
        self._sure = False

    def look(self, clients: frozenset[tuple[bytes, int]], others: int) -> int:
        """`clients` wait at the address, `others` of them at sockets that are not the successor's. Returns how many of
        the successor's have waited for WAIT_LOOKS looks. So long may nobody wait there who would not at the one before:
        as long as some always wait there too, they can't be told apart, and do not count."""
        if left := self._clients & clients:
            self._looks += 1
        else:
            left, self._looks, self._sure = clients, 0, False
        self._clients = left
        self._sure = self._sure or not others  # then all that are left wait at the successor
        return len(left) if self._sure and self._looks >= WAIT_LOOKS else 0


def _more(successor: int, before: int, ratio: float) -> bool:
    """Whether the successor, which had `ratio` times the work of the one before, has too many of something."""
    expected = (max(0, before) + 1) * ratio
    return successor >= MIN_BAD and successor > expected + SIGMAS * math.sqrt(expected)


def words(document: dict[str, Any]) -> str:
    """How a canary stands, for people; `document` is the `canary` of a ProcessInfo's `beside`."""
    before = document["before"]
    said = [f"{document['share'] * 100:g}% of new connections", f"{document['seconds_left']:.0f} s left"]
    if document["answers"] or before["answers"]:
        mine, others = (f"{one['errors']} of {one['answers']}" for one in (document, before))
        said.append(f"5xx {mine} (before: {others})")
    if "output" in document["watched"]:
        said.append(f"tracebacks {document['tracebacks']} (before: {before['tracebacks']})")
    if document["deaths"] or before["deaths"]:
        said.append(f"dead workers {document['deaths']} (before: {before['deaths']})")
    return f"{', '.join(said)}; watched: {', '.join(document['watched'])}"

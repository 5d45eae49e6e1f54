"""A load client that misses nothing: every request that failed, when, and how.

    with Load("http://127.0.0.1:8000", connections=8, rate=20) as load:
        ...                                # the load goes on, in a process of its own
    load.tally.failed                      # {"reset": 2, ...}; {} when every request was answered rightly

Every other connection is kept alive, if `keep_alive`; the rest say `Connection: close` and connect anew for each
request. What is asked
for is `/body/N` with N = 0, 1, 2, ...; the right answer is `body(N)` (tests/sites/flask_site.py serves it).

An idle connection that the server closes is no failure (RFC 9112, 9.3.1): it is counted as `reopened` where the client
saw the end before it asked, and as `retried` where the two crossed. It knows nothing of procman.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tests.harness import PROJECT

KINDS = ("refused", "reset", "short", "wrong", "slow")
"""How a request fails: no connection, an end instead of an answer, a part of it, another one, or none in time."""

FAILURES_SHOWN = 50
"""Failures that are kept with their details; all are counted."""


def body(number: int) -> str:
    """The right answer to `/body/NUMBER`: up to 4 KB that no other number near it has."""
    return f"{number}\n" * (1 + number % 499)


@dataclass(slots=True)
class Failure:
    """One failed request: seconds since the load began, one of KINDS, and what was seen."""

    at: float
    kind: str
    detail: str


@dataclass(slots=True)
class Tally:
    """What became of all requests. `slowest` is the longest answer in seconds."""

    requests: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    reopened: int = 0
    retried: int = 0
    slowest: float = 0.0

    def add(self, other: Tally) -> None:
        """Takes in what another connection saw."""
        self.requests += other.requests
        self.failed = dict(Counter(self.failed) + Counter(other.failed))
        self.failures = sorted(self.failures + other.failures, key=lambda failure: failure.at)[:FAILURES_SHOWN]
        self.reopened += other.reopened
        self.retried += other.retried
        self.slowest = max(self.slowest, other.slowest)


@dataclass(frozen=True, slots=True)
class Plan:
    """`connections` at one time, `rate` requests a second on each (0: one after the other), each answered within
    `patience` seconds; it ends by itself after `limit` seconds."""

    url: str
    connections: int = 8
    rate: float = 20.0
    keep_alive: bool = True
    patience: float = 20.0
    limit: float = 3600.0


class Connection:
    """One connection after the other to one server, one request at a time."""

    def __init__(self, plan: Plan, number: int, began: float) -> None:
        self.plan = plan
        self.keep_alive = plan.keep_alive and number % 2 == 0
        self.tally = Tally()
        self._began = began
        self._number = number
        where = urlsplit(plan.url)
        self._http = http.client.HTTPConnection(where.hostname or "", where.port, timeout=plan.patience)

    def run(self, stop: threading.Event) -> None:
        """Asks until `stop` is set; the request that is under way then is finished."""
        next_at = self._began + self._number / self.plan.connections / (self.plan.rate or 1e9)
        asked = self._number
        while not stop.wait(max(0.0, next_at - time.monotonic())):
            next_at = max(next_at + 1 / self.plan.rate, time.monotonic() - 1) if self.plan.rate else 0.0
            self.ask(asked)
            asked += self.plan.connections
        self._http.close()

    def ask(self, number: int) -> None:
        """One request, counted."""
        self._drop_if_closed()
        reused = self._http.sock is not None
        self.tally.requests += 1
        start = time.monotonic()
        try:
            try:
                answer = self._send(number)
            except (ConnectionResetError, BrokenPipeError):
                if not reused:
                    raise
                self.tally.retried += 1  # the server's end of an idle connection and our request crossed
                self._http.close()
                answer = self._send(number)
            problem = self._problem(number, answer)
            if not self.keep_alive:
                self._http.close()  # we said so; some servers do not repeat it
        except (OSError, http.client.HTTPException) as error:
            problem = (kind_of(error), f"{type(error).__name__}: {error}")
            self._http.close()
        took = time.monotonic() - start
        self.tally.slowest = max(self.tally.slowest, took)
        if not problem and took > self.plan.patience:
            problem = ("slow", f"{took:.1f} s")
        if problem:
            self._failed(start, f"/body/{number}: ", *problem)

    def _send(self, number: int) -> http.client.HTTPResponse:
        """Raises what sockets and http.client raise."""
        headers = {} if self.keep_alive else {"Connection": "close"}
        self._http.request("GET", f"/body/{number}", headers=headers)
        return self._http.getresponse()

    @staticmethod
    def _problem(number: int, answer: http.client.HTTPResponse) -> tuple[str, str] | None:
        """What is wrong with the answer, as kind and detail. Raises as `_send` does."""
        found = answer.read()
        if answer.status != 200:
            return "wrong", f"{answer.status} {found[:200]!r}"
        if found != body(number).encode():
            return "wrong", f"{len(found)} bytes: {found[:200]!r}"
        return None

    def _drop_if_closed(self) -> None:
        if self._http.sock is not None and select.select([self._http.sock], [], [], 0)[0]:
            self.tally.reopened += 1
            self._http.close()

    def _failed(self, start: float, what: str, kind: str, detail: str) -> None:
        self.tally.failed[kind] = self.tally.failed.get(kind, 0) + 1
        if len(self.tally.failures) < FAILURES_SHOWN:
            self.tally.failures.append(Failure(round(start - self._began, 3), kind, what + detail))


def kind_of(error: Exception) -> str:
    """Which of KINDS an error of the socket or of http.client is."""
    match error:
        case TimeoutError():
            return "slow"
        case ConnectionRefusedError() | FileNotFoundError():
            return "refused"
        case http.client.IncompleteRead():
            return "short"
        case OSError():
            return "reset"
        case _:
            return "wrong"


class Load:
    """See the module. `tally` is complete after the `with`; the arguments are those of Plan."""

    def __init__(
        self, url: str, *, connections: int = 8, rate: float = 20.0, keep_alive: bool = True, patience: float = 20.0
    ) -> None:
        self.plan = Plan(url, connections, rate, keep_alive, patience)
        self.tally = Tally()

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.load", json.dumps(asdict(self.plan))]
        self._process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the load: no new requests, and those under way get their answers."""
        try:
            out, _ = self._process.communicate(timeout=self.plan.patience * 3 + 30)
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise
        if kind is None:
            told = json.loads(out)
            failures = [Failure(**failure) for failure in told.pop("failures")]
            self.tally = Tally(**told, failures=failures)


def run(plan: Plan, stop: threading.Event) -> Tally:
    """Load in this process until `stop` is set or the plan's limit is reached."""
    began = time.monotonic()
    connections = [Connection(plan, number, began) for number in range(plan.connections)]
    threads = [threading.Thread(target=connection.run, args=(stop,)) for connection in connections]
    for thread in threads:
        thread.start()
    stop.wait(plan.limit)
    stop.set()
    total = Tally()
    for thread, connection in zip(threads, connections, strict=True):
        thread.join()
        total.add(connection.tally)
    return total


def main() -> int:
    """`python -m tests.load PLAN`: until its stdin ends, then the tally as JSON on stdout."""
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    tally = run(Plan(**json.loads(sys.argv[1])), stop)
    sys.stdout.write(json.dumps(asdict(tally)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

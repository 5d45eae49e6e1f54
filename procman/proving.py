"""A canary under way: what is seen of both versions, and what comes of it.

It watches, asks, and decides by `canary`. Where connections go, and what follows, is for `rollout`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from procman import canary, servers, values
from procman.canary import FAILURES, Canary, Counts, Silence, Tally, Waiting
from procman.ground import Ground
from procman.lifecycle import State
from procman.process import Process
from procman.report import Info

LOOK_SECONDS = 1.0
"""How often it is looked at, and told how it stands. What is bad is looked at when it happens."""

PROBE_SECONDS = 5.0
"""From one probe of a successor to the next: each is one more answer of it."""

PROBE_AGAIN_SECONDS = 1.0
"""The same, after one that has failed."""


class Verdict(NamedTuple):
    """What comes of a canary: whether the successor takes over, and why."""

    promoted: bool
    why: str
    deaf: bool = False
    """It answers nobody: so it will not answer who waits there."""


class Proving:
    """The canary of `successors`, which are beside those of `before`, and have the sockets beside `firsts`. `said` gets
    how it stands, again and again."""

    def __init__(
        self,
        ground: Ground,
        wish: Canary,
        successors: Sequence[Process],
        before: Sequence[Process],
        *,
        firsts: Sequence[str],
        said: Callable[[str], None],
    ) -> None:
        self._ground = ground
        self._canary = wish
        self._successors = successors
        self._said = said
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + wish.seconds
        self._news = asyncio.Event()
        self._verdict: Verdict | None = None
        self._taps: list[Callable[[], None]] = []
        self._tallies = self._listen(successors)
        self._others = self._listen(before)
        self._probed = [process for process in successors if ground.can_ask(process) and not self._answers(process)]
        self._failures: dict[str, int] = {}
        self._silences = {first: Silence() for first in firsts if self._is_asked(first)}
        self._waiting = {first: Waiting() for first in firsts}
        self._queues_told = True
        # Bad answers to our own requests, and those that may come: of the successor, of the one before.
        self._own_errors = [0, 0]

    @staticmethod
    def _answers(process: Process) -> bool:
        """Whether its readiness is shown by any answer of a server: that is what `_ask` asks for, too."""
        program = process.program
        return program.ready.any_status and servers.speaks_http(program.server, program.argv)

    def _is_asked(self, first: str) -> bool:
        """Whether an answer can be asked for at that socket, and no probe with a rule of its own does it."""
        address = self._ground.sockets.address(first)
        rules = (process.program.ready for process in self._probed)
        ruled = any(rule.kind == "http" and rule.address and values.meets(address, rule.address) for rule in rules)
        return not ruled and all(servers.speaks_http(p.program.server, p.program.argv) for p in self._successors)

    def _listen(self, processes: Sequence[Process]) -> list[Tally]:
        tallies: list[Tally] = []

        def make() -> Callable[[bytes], None]:
            tallies.append(Tally(self._trouble))
            return tallies[-1].feed

        self._taps += [self._ground.tap_streams(process.program, make) for process in processes]
        return tallies

    def _trouble(self) -> None:  # in the log thread
        self._loop.call_soon_threadsafe(self._news.set)

    def decide(self, *, promoted: bool, why: str) -> None:
        """An operator has decided. The first verdict counts."""
        self._verdict = self._verdict or Verdict(promoted, why)
        self._news.set()

    async def run(self) -> Verdict:
        """From now on, until there is a verdict."""
        for process in self._successors:
            process.watchers.add(self._watch)
            process.canary = self.document
            self._watch(process)
        tasks = [asyncio.ensure_future(work) for work in (self._probe(), self._watch_queues())]
        for task in tasks:
            task.add_done_callback(lambda _: self._news.set())
        try:
            while self._verdict is None:
                for task in tasks:
                    if task.done():
                        task.result()  # raises what was a mistake there: nothing would end the canary then
                self._said(canary.words(self.document()))
                self._news.clear()
                self._look()
                await self._wait()
            return self._verdict
        finally:
            for task in tasks:
                task.cancel()
            for process in self._successors:
                process.watchers.discard(self._watch)
                process.canary = None

    def close(self) -> None:
        """It is over: their output is no longer listened to."""
        for end in self._taps:
            end()

    async def _wait(self) -> None:
        """For news, or for the time of the next look."""
        if self._verdict is not None:
            return
        left = self._end - self._loop.time()
        try:
            async with asyncio.timeout(min(LOOK_SECONDS, left) if left > 0 else LOOK_SECONDS):
                await self._news.wait()
        except TimeoutError:
            pass

    def _watch(self, process: Process) -> None:
        if process.status.state is not State.RUNNING:
            self._fail(f"the successor did not stay up: {process.status.why}")

    def _look(self) -> None:
        worse = canary.judge(self._canary.share, *self._counts())
        if worse:
            self._fail(worse)
        elif self._loop.time() >= self._end and self._settled():
            self.decide(promoted=True, why=f"promoted: {self._account()}")

    def _settled(self) -> bool:
        """Whether all that is asked has shown itself good: a canary may be short."""
        asked = (silence.settled for silence in self._silences.values())
        return all(asked) and all(self._failures.get(process.key) == 0 for process in self._probed)

    def _fail(self, why: str, *, deaf: bool = False) -> None:
        self._verdict = self._verdict or Verdict(False, f"the canary failed: {why}", deaf)
        self._news.set()

    def _account(self) -> str:
        successor, before = self._counts()
        text = f"its canary of {self._canary.share * 100:g}% for {self._canary.seconds:g} s went well"
        if successor.answers or before.answers:
            text += f", {successor.errors} of {successor.answers} answers were 5xx"
            text += f" (before: {before.errors} of {before.answers})"
        return text

    def _counts(self) -> tuple[Counts, Counts]:
        return self._seen(self._tallies, 0), self._seen(self._others, 1)

    def _seen(self, tallies: Sequence[Tally], whose: int) -> Counts:
        seen = sum((tally.counts for tally in tallies), Counts())
        # A request of ours that was answered 5xx may have left a traceback; whether it did, nobody can tell.
        return replace(seen, tracebacks=max(0, seen.tracebacks - self._own_errors[whose]))

    async def _probe(self) -> None:
        """Ask again and again, one after the other: two can't be told apart on the way."""
        while self._probed or self._silences:
            good = True
            for process in self._probed:
                self._own_errors[0] += 1
                reason = await self._ground.ask(process)
                self._own_errors[0] -= not reason
                self._failures[process.key] = self._failures.get(process.key, 0) + 1 if reason else 0
                good = good and not reason
                if self._failures[process.key] >= FAILURES:
                    self._fail(f"its {process.program.ready.kind} probe failed: {reason}")
                    return
            for first, silence in list(self._silences.items()):
                problem = await self._ask(first, silence)
                good = good and silence.settled
                if problem:
                    address = self._ground.sockets.address(first)
                    self._fail(f"it does not answer at {address}, where the one before does: {problem}", deaf=True)
                    return
                if not silence.of_use:
                    del self._silences[first]
            self._news.set()
            await asyncio.sleep(PROBE_SECONDS if good else PROBE_AGAIN_SECONDS)

    async def _ask(self, first: str, silence: Silence) -> str:
        """Ask the successor for an answer, whatever its status, and where it gives none, the one before. Returns what
        is wrong with the successor."""
        answer = await self._answer(first, before=False)
        return silence.heard(answer, await self._answer(first, before=True) if answer else "")

    async def _answer(self, first: str, *, before: bool) -> str:
        self._own_errors[before] += 1  # until it has answered: a traceback comes first
        answer = await self._ground.trials.answer(first, before=before)
        self._own_errors[before] -= answer.status < 500
        return answer.problem

    async def _watch_queues(self) -> None:
        """Look again and again whether somebody waits for the successor, and nobody accepts."""
        with contextlib.suppress(OSError, RuntimeError):  # a kernel that does not tell; no process left for a thread
            while True:
                for first, waiting in self._waiting.items():
                    clients, others = await self._ground.trials.backlog(first)
                    if left := waiting.look(clients, others):
                        what = "a connection waits" if left == 1 else f"{left} connections wait"
                        self._fail(f"{what} in its queue since {canary.WAIT_LOOKS} s, and nobody accepts", deaf=True)
                await asyncio.sleep(LOOK_SECONDS)
        self._queues_told = False

    def document(self) -> Info:
        """`canary` of the one beside, in a ProcessInfo."""
        successor, before = self._counts()
        watched = ["exits", *dict.fromkeys(f"{process.program.ready.kind} probe" for process in self._probed)]
        watched += ["answers"] if self._silences else []
        watched += ["queue"] if self._queues_told else []
        watched += ["output"] if self._tallies else []
        return {
            "share": self._canary.share,
            "seconds_left": round(max(0.0, self._end - self._loop.time()), 1),
            "watched": watched + (["5xx"] if successor.answers or before.answers else []),
            **asdict(successor),
            "before": asdict(before),
        }

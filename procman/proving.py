"""A canary under way: what is seen of both versions, and what comes of it.

It watches and decides, by `canary.judge`. Where connections go, and what follows, is for `rollout`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from procman import canary
from procman.canary import Canary, Counts, Tally
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

PROBE_FAILURES = 3
"""So many failed probes in a row are no chance."""


class Verdict(NamedTuple):
    """What comes of a canary: whether the successor takes over, and why."""

    promoted: bool
    why: str


class Proving:
    """The canary of `successors`, which are beside those of `before`. `said` gets how it stands, again and again."""

    def __init__(
        self,
        ground: Ground,
        wish: Canary,
        successors: Sequence[Process],
        before: Sequence[Process],
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
        self._probed = [process for process in successors if ground.can_ask(process)]
        self._failures: dict[str, int] = {}

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
        probing = asyncio.ensure_future(self._probe())
        try:
            while self._verdict is None:
                self._said(canary.words(self.document()))
                self._news.clear()
                self._look()
                await self._wait()
            return self._verdict
        finally:
            probing.cancel()
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
        try:
            async with asyncio.timeout(max(0.0, min(LOOK_SECONDS, self._end - self._loop.time()))):
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
        elif self._loop.time() >= self._end:
            self.decide(promoted=True, why=f"promoted: {self._account()}")

    def _fail(self, why: str) -> None:
        self.decide(promoted=False, why=f"the canary failed: {why}")

    def _account(self) -> str:
        successor, before = self._counts()
        text = f"its canary of {self._canary.share * 100:g}% for {self._canary.seconds:g} s went well"
        if successor.answers or before.answers:
            text += f", {successor.errors} of {successor.answers} answers were 5xx"
            text += f" (before: {before.errors} of {before.answers})"
        return text

    def _counts(self) -> tuple[Counts, Counts]:
        mine, others = (
            sum((tally.counts for tally in tallies), Counts()) for tallies in (self._tallies, self._others)
        )
        return mine, others

    async def _probe(self) -> None:
        """Ask them again and again, one after the other: two can't be told apart on the way."""
        while self._probed:
            pause = PROBE_SECONDS
            for process in self._probed:
                reason = await self._ground.ask(process)
                self._failures[process.key] = self._failures.get(process.key, 0) + 1 if reason else 0
                pause = PROBE_AGAIN_SECONDS if reason else pause
                if self._failures[process.key] >= PROBE_FAILURES:
                    self._fail(f"its {process.program.ready.kind} probe failed: {reason}")
                    return
            await asyncio.sleep(pause)

    def document(self) -> Info:
        """`canary` of the one beside, in a ProcessInfo."""
        successor, before = self._counts()
        watched = ["exits", *dict.fromkeys(f"{process.program.ready.kind} probe" for process in self._probed)]
        watched += ["output"] if self._tallies else []
        return {
            "share": self._canary.share,
            "seconds_left": round(max(0.0, self._end - self._loop.time()), 1),
            "watched": watched + (["5xx"] if successor.answers or before.answers else []),
            **asdict(successor),
            "before": asdict(before),
        }

"""One target of the fuzz: inputs are drawn and checked until there are enough of them, or one breaks something."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.guarantees.fuzz.inputs import shaken

HANG_SECONDS = 10
"""CPU seconds after which one input counts as a hang. The usual one takes a thousandth of a second."""

BATCH = 2000
"""Inputs that hypothesis draws in one go: it remembers all of a go, to draw none twice."""

ISOLATED = "PROCMAN_FUZZ_ISOLATED"
"""Set in the environment of a run in a pid namespace of its own: what is signalled there is nobody else's."""

SHOWN = 6000
"""Characters of an input and of a traceback. The seed draws it again."""

Check = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is fed, and how it is judged.

    `inputs` are drawn in a full run, `short` in the short one. `ready` sets up what is fed and returns the check of one
    input: any exception that it raises is a finding, and so is one at the end of `ready`. Each input that was drawn is
    fed `shakes` more times, with bytes touched. `isolated`: it belongs into a pid namespace of its own.
    """

    name: str
    inputs: int
    short: int
    strategy: Callable[[], st.SearchStrategy[Any]]
    ready: Callable[[], AbstractContextManager[Check]]
    seconds: float = HANG_SECONDS
    shakes: int = 0
    isolated: bool = False


@dataclass(slots=True)
class Outcome:
    """What came of a target. `finding` is "" or what is broken, with the smallest input that does it."""

    name: str
    inputs: int = 0
    seconds: float = 0.0
    finding: str = ""

    def __str__(self) -> str:
        rate = self.inputs / self.seconds if self.seconds else 0.0
        verdict = "BROKEN" if self.finding else "good"
        return f"{self.name:12} {self.inputs:7} inputs {self.seconds:7.1f} s {rate:8.0f}/s  {verdict}"


class Hang(BaseException):
    """One input took too long. No Exception: nothing that is fed may take it for one of its own errors."""


@contextlib.contextmanager
def no_hang(seconds: float) -> Iterator[None]:
    """Raises Hang when the block takes more CPU time than this. (pytest-timeout has the timer of real time.)"""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s of CPU time for one input")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(target: Target, inputs: int, seed: int) -> Outcome:
    """Feeds `target` so many inputs. The same seed draws the same ones."""
    outcome = Outcome(target.name)
    start = time.monotonic()
    last: list[Any] = []
    try:
        with warnings.catch_warnings(), target.ready() as check:
            warnings.simplefilter("ignore", FutureWarning)  # about regular expressions that were drawn
            while outcome.inputs < inputs:
                each = 1 + target.shakes
                count = max(1, min(BATCH, inputs - outcome.inputs) // each)
                _batch(target, check, count, seed + outcome.inputs, last)
                outcome.inputs += count * each
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is what we look for
        shown = "".join(traceback.format_exception(error, limit=-6)).rstrip()[-SHOWN:]
        smallest = f"smallest input: {repr(last[-1])[:SHOWN]}\n" if last else ""
        outcome.finding = f"{target.name} (seed {seed}, batch from input {outcome.inputs}): {smallest}{shown}"
    outcome.seconds = time.monotonic() - start
    return outcome


def _batch(target: Target, check: Check, count: int, seed: int, last: list[Any]) -> None:
    def one(drawn: Any) -> None:
        try:
            for each in (drawn, *(shaken(drawn, target.shakes) if target.shakes else ())):
                last[:] = [each]
                with no_hang(target.seconds):
                    check(each)
        except Hang as error:
            raise AssertionError(str(error)) from error  # so that hypothesis makes the input smaller

    limits = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
    )
    hypothesis.seed(seed)(limits(given(drawn=target.strategy())(one)))()
    last.clear()


def descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    """Fails when this process has more descriptors open after the block."""
    before = descriptors()
    yield
    after = descriptors()
    assert after <= before, f"{after - before} descriptors are left open: {list(Path('/proc/self/fd').iterdir())}"

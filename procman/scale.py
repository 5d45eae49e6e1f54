"""How many processes of a program are wanted, from how many connections wait and are open: `[program.NAME.scale]`.

One more comes when `backlog` connections wait and all that were asked for serve already: what is still starting, or
fails, is no reason for another. Fewer come by two rules, both after `idle_timeout`:

    idle    not one connection was waiting, open, or came and went: down to `min`, at once
    calm    there were never more than half as many connections as when the last process was added: one less

Between "half as many" and "so many that they wait" nothing changes: that is the hysteresis. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from procman.config import Scale

CALM = 0.5
"""Of the connections that made it grow, how many count as few."""


@dataclass(frozen=True, slots=True)
class Range:
    """Between which numbers it may go now, both included: the table's, less what an operator has stopped."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the listeners: connections that wait in the accept queue, and those that are open; None where nobody
    can tell. `passed`: others came and went since the last look."""

    waiting: int
    open: int | None
    passed: bool = False

    @property
    def load(self) -> int | None:
        """All of them."""
        return None if self.open is None else self.waiting + self.open


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered from look to look. `busy` and `crowded`: when it was last not idle, and not calm. `grown`: how
    many connections there were when it grew to a number."""

    busy: float
    crowded: float
    grown: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Decision:
    """How many are wanted, what is to be remembered, and why the number is another one."""

    number: int
    memory: Memory
    why: str = ""


def within(scale: Scale, usable: int) -> Range:
    """The range of a program of which `usable` processes may be started."""
    return Range(min(scale.min, usable), min(scale.max, usable))


def decide(scale: Scale, bounds: Range, number: int, ready: int, seen: Seen, memory: Memory, now: float) -> Decision:
    """The number after one look. `number` are wanted up and `ready` of them serve."""
    if number < bounds.low:
        return Decision(bounds.low, _fresh(memory, now), f"min = {scale.min}")
    if number > bounds.high:
        return Decision(bounds.high, _fresh(memory, now), f"max = {scale.max}")
    memory = _remember(number, seen, memory, now)
    if number < bounds.high:
        if number == 0 and seen.waiting:
            return Decision(1, _fresh(memory, now), "a connection waits")
        if number and seen.waiting >= scale.backlog and ready >= number:
            grown = {**memory.grown, number + 1: seen.load or seen.waiting}
            why = f"{seen.waiting} connections wait (backlog = {scale.backlog})"
            return Decision(number + 1, _fresh(replace(memory, grown=grown), now), why)
    if number > bounds.low:
        if now - memory.busy >= scale.idle_timeout:
            return Decision(bounds.low, _fresh(memory, now), f"no connection for {scale.idle_timeout:g} s")
        if number > 1 and now - memory.crowded >= scale.idle_timeout:
            why = f"for {scale.idle_timeout:g} s less than half as many connections as when it grew"
            return Decision(number - 1, _fresh(memory, now), why)
    return Decision(number, memory)


def _remember(number: int, seen: Seen, memory: Memory, now: float) -> Memory:
    load, full = seen.load, memory.grown.get(number)
    if seen.waiting or load is None or load > 0 or seen.passed:
        memory = replace(memory, busy=now)
    if load is None or full is None or load > full * CALM:
        memory = replace(memory, crowded=now)
    return memory


def _fresh(memory: Memory, now: float) -> Memory:
    """After a change all times begin anew."""
    return replace(memory, busy=now, crowded=now)

"""How many processes of a program are wanted, from how many connections wait and are open: `[program.NAME.scale]`.

One more comes when `backlog` connections wait and all that were asked for serve already: what is still starting, or
fails, is no reason for another. Fewer come by two rules, both after `idle_timeout`:

    idle    not one connection was waiting, open, or came and went: down to `min`, at once
    calm    there were never more than half as many connections as when the last process was added: one less

One that a connection starts (`min` = 0), and of which all have given up, goes to 0 as well after a while in which
connections wait: what waits then has it tried again.

Between "half as many" and "so many that they wait" nothing changes: that is the hysteresis. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from types import MappingProxyType

from procman.config import Scale
from procman.records import dataclass

CALM = 0.5
"""Of the connections that made it grow, how many count as few."""


@dataclass(frozen=True, slots=True)
class Range:
    """Between which numbers it may go now, both included: the table's, less what an operator has stopped."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One look: `number` processes are wanted and `ready` of them serve; `waiting` connections are in the accept queue,
    and `open` ones were accepted. `passed`: others came and went since the last look. `hopeless`: none of them will
    serve, for all have failed to start too often; None, or after how many seconds of that there may be another try."""

    number: int
    ready: int
    waiting: int
    open: int
    passed: bool = False
    hopeless: float | None = None

    @property
    def load(self) -> int:
        """All connections."""
        return self.waiting + self.open


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered from look to look. `busy` and `crowded`: when it was last not idle, and not calm. `grown`: how
    many connections there were when it grew to a number. `hopeful`: when it was last not hopeless, None before the
    first look."""

    busy: float
    crowded: float
    grown: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    hopeful: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """How many are wanted, what is to be remembered, and why the number is another one."""

    number: int
    memory: Memory
    why: str = ""


def within(rule: Scale, usable: int) -> Range:
    """The range of a program of which `usable` processes may be started."""
    return Range(min(rule.min, usable), min(rule.max, usable))


def decide(rule: Scale, bounds: Range, seen: Seen, memory: Memory, now: float) -> Decision:
    """The number after one look."""
    number = seen.number
    if number < bounds.low:
        return Decision(bounds.low, _fresh(memory, now), f"min = {rule.min}")
    if number > bounds.high:
        return Decision(bounds.high, _fresh(memory, now), f"max = {rule.max}")
    memory = _remember(seen, memory, now)
    if number == 0 and seen.waiting and bounds.high:
        return Decision(1, _fresh(memory, now), "a connection waits")
    since = now if memory.hopeful is None else memory.hopeful
    if bounds.low == 0 and seen.hopeless is not None and seen.waiting and now - since >= seen.hopeless:
        return Decision(0, _fresh(memory, now), f"a connection waits, and no start went well for {now - since:.0f} s")
    if 0 < number < bounds.high and seen.waiting >= rule.backlog and seen.ready >= number:
        grown = {**memory.grown, number + 1: seen.load}
        why = f"{seen.waiting} connections wait (backlog = {rule.backlog})"
        return Decision(number + 1, _fresh(replace(memory, grown=grown), now), why)
    if number > bounds.low and now - memory.busy >= rule.idle_timeout:
        return Decision(bounds.low, _fresh(memory, now), f"no connection for {rule.idle_timeout:g} s")
    if number > max(bounds.low, 1) and now - memory.crowded >= rule.idle_timeout:
        why = f"for {rule.idle_timeout:g} s less than half as many connections as when it grew"
        return Decision(number - 1, replace(memory, crowded=now), why)
    return Decision(number, memory)


def _remember(seen: Seen, memory: Memory, now: float) -> Memory:
    if seen.load or seen.passed:
        memory = replace(memory, busy=now)
    if seen.hopeless is None or memory.hopeful is None:
        memory = replace(memory, hopeful=now)
    grown = memory.grown.get(seen.number)
    if grown is None or seen.load > grown * CALM:
        memory = replace(memory, crowded=now)
    return memory


def _fresh(memory: Memory, now: float) -> Memory:
    """The times begin anew."""
    return replace(memory, busy=now, crowded=now)

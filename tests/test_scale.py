"""How many processes are wanted: tables of single looks, and what holds whatever is seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.config import Scale
from procman.scale import Memory, Range, Seen, decide, within

RULE = Scale(min=1, max=4, idle_timeout=60.0, backlog=10)
NEW = Memory(0.0, 0.0)


@pytest.mark.parametrize(
    ("usable", "low", "high"), [(4, 1, 4), (3, 1, 3), (1, 1, 1), (0, 0, 0)]
)
def test_what_an_operator_has_stopped_does_not_count(usable: int, low: int, high: int) -> None:
    assert within(RULE, usable) == Range(low, high)


@pytest.mark.parametrize(
    ("number", "ready", "waiting", "open_", "after"),
    [
        (1, 1, 9, 100, 1),  # however many are open: none of them waits
        (1, 1, 10, 0, 2),
        (1, 1, 500, 0, 2),  # one at a time
        (2, 1, 500, 0, 2),  # the one before is still to come
        (3, 3, 10, 9, 4),
        (4, 4, 500, 9, 4),  # max
        (0, 0, 0, 0, 1),  # min
        (6, 6, 0, 0, 4),  # max is less than it was
    ],
)
def test_one_look(number: int, ready: int, waiting: int, open_: int, after: int) -> None:
    decided = decide(RULE, Range(1, 4), Seen(number, ready, waiting, open_), NEW, 0.0)
    assert decided.number == after
    assert bool(decided.why) == (number != after)


def test_on_demand() -> None:
    bounds = Range(0, 4)
    assert decide(RULE, bounds, Seen(0, 0, 0, 0), NEW, 1000.0).number == 0
    assert decide(RULE, bounds, Seen(0, 0, 1, 0), NEW, 1000.0).number == 1
    assert decide(RULE, Range(0, 0), Seen(0, 0, 1, 0), NEW, 1000.0).number == 0  # all stopped by an operator


@pytest.mark.parametrize(
    "last", [Seen(3, 3, 0, 1), Seen(3, 3, 1, 0), Seen(3, 3, 0, 0, passed=True)], ids=["open", "waiting", "passed"]
)
def test_idle(last: Seen) -> None:
    """Down to min at once, when so long nobody was there."""
    memory = decide(RULE, Range(1, 4), last, NEW, 100.0).memory
    decided = decide(RULE, Range(1, 4), Seen(3, 3, 0, 0), memory, 159.0)
    assert decided.number == 3
    decided = decide(RULE, Range(1, 4), Seen(3, 3, 0, 0), decided.memory, 160.0)
    assert (decided.number, decided.why) == (1, "no connection for 60 s")
    assert decide(RULE, Range(0, 4), Seen(3, 3, 0, 0), memory, 160.0).number == 0


def test_calm() -> None:
    """One less after a time with half as many connections as made it grow; none less while there are more."""
    grown = decide(RULE, Range(1, 4), Seen(2, 2, 12, 8), NEW, 0.0)
    assert (grown.number, dict(grown.memory.grown)) == (3, {3: 20})
    memory = grown.memory
    for now in range(1, 300):
        decided = decide(RULE, Range(1, 4), Seen(3, 3, 0, 11), memory, float(now))
        assert decided.number == 3
        memory = decided.memory
    for now in range(300, 359):
        decided = decide(RULE, Range(1, 4), Seen(3, 3, 0, 10), memory, float(now))
        assert decided.number == 3
        memory = decided.memory
    assert decide(RULE, Range(1, 4), Seen(3, 3, 0, 10), memory, 359.0).number == 2


def test_another_try_where_all_have_given_up() -> None:
    """As long as somebody waits, and not too often; never where no connection starts it, or while one may come."""

    def tried(bounds: Range, waiting: int, hopeless: float | None) -> list[int]:
        memory, changed = NEW, []
        for now in range(1, 13):
            decided = decide(RULE, bounds, Seen(1, 0, waiting, 0, hopeless=hopeless), memory, float(now))
            memory = decided.memory
            changed += [now] if decided.number == 0 else []
        return changed

    assert tried(Range(0, 4), 1, 5.0)[0] == 6
    assert tried(Range(0, 4), 0, 5.0) == tried(Range(1, 4), 1, 5.0) == tried(Range(0, 4), 1, None) == []
    memory = decide(RULE, Range(0, 4), Seen(1, 0, 1, 0), NEW, 5.0).memory
    assert decide(RULE, Range(0, 4), Seen(1, 0, 1, 0, hopeless=5.0), memory, 9.0).number == 1


LOOKS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.booleans(), st.floats(0.5, 40.0), st.integers(0, 2)),
    max_size=80,
)
RULES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.floats(1.0, 100.0), st.integers(1, 20)).map(
    lambda given_: Scale(min=given_[0], max=given_[0] + given_[1], idle_timeout=given_[2], backlog=given_[3])
)


@given(RULES, LOOKS)
def test_what_always_holds(rule: Scale, looks: list[tuple[int, int, bool, float, int]]) -> None:
    """Between min and max; up only by a full queue and one at a time; down only after idle_timeout in which it did not
    grow, and in which nobody was there; or one at a time, when there never were more than half of the connections that
    had made it grow."""
    bounds = within(rule, rule.max)
    number, now, memory = rule.min, 0.0, NEW
    changed = grown = 0.0
    looked: list[tuple[float, Seen]] = []
    for waiting, open_, passed, seconds, behind in looks:
        now += seconds
        seen = Seen(number, max(0, number - behind), waiting, open_, passed)
        looked.append((now, seen))
        decided = decide(rule, bounds, seen, memory, now)
        memory = decided.memory
        assert rule.min <= decided.number <= rule.max
        if decided.number > number:
            assert decided.number == number + 1
            assert waiting >= (rule.backlog if number else 1)
            assert seen.ready >= number
        elif decided.number < number:
            assert now - grown >= rule.idle_timeout
            late = [each for at, each in looked if now - at < rule.idle_timeout]
            quiet = not any(each.load or each.passed for each in late)
            assert quiet or (decided.number == number - 1 and now - changed >= rule.idle_timeout)
            assert quiet or all(each.load <= memory.grown[number] / 2 for each in late)
        if decided.number != number:
            grown = now if decided.number > number else grown
            changed, number = now, decided.number


@given(RULES, st.integers(0, 50), st.integers(0, 50), st.integers(0, 6))
def test_no_flapping(rule: Scale, waiting: int, open_: int, start: int) -> None:
    """What stays as it is makes the number go one way only, and then stay."""
    bounds = within(rule, rule.max)
    number, memory, ways = min(max(start, rule.min), rule.max), NEW, set()
    for look in range(200):
        now = look * rule.idle_timeout / 7
        decided = decide(rule, bounds, Seen(number, number, waiting, open_), memory, now)
        if decided.number != number:
            ways.add(decided.number > number)
        number, memory = decided.number, decided.memory
    assert len(ways) <= 1

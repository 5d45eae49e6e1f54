"""The short form of `python -m tests.guarantees modes`, and that its judgement can find something."""

from __future__ import annotations

import pytest

from tests.guarantees.modes import Mode, Options, run


@pytest.mark.timeout(240)
def test_killed_again_and_again_while_lines_are_read() -> None:
    result = run(Options(lines=60_000, kills=8))
    assert not result.problems, "\n".join((*result.lines(), *result.problems))
    assert result.kills >= 8


@pytest.mark.parametrize(
    ("found", "lost", "torn", "doubled"),
    [
        ([1, 2, 3, 4, 5, 6], 0, 0, []),
        ([1, 2, 4, 5, 6], 1, 0, []),
        ([1, 2, 0, 3, 4, 5, 6], 0, 1, []),
        ([1, 2, 3, 3, 4, 5, 6], 0, 0, [1]),
        ([1, 2, 3, 2, 3, 4, 5, 6, 6], 0, 0, [2, 1]),
        ([1, 2, 3, 1, 5, 6], 1, 0, [3]),
        ([], 6, 0, []),
    ],
)
def test_what_is_not_as_it_was_printed_is_found(found: list[int], lost: int, torn: int, doubled: list[int]) -> None:
    mode = Mode("times", 6, 0)
    mode.judge(iter(found))
    assert (mode.lost, mode.torn, mode.doubled) == (lost, torn, doubled)
    assert bool(mode.problems(2)) == bool(lost or torn or doubled)

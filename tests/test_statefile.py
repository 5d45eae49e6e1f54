"""What of a state file is believed: of a damaged one, the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from procman import statefile
from procman.ground import counters_from
from procman.logs import Counters
from procman.orphans import known_children
from tests.guarantees.fuzz.pure import STATE, judge_state


def test_what_is_written_is_believed_as_it_is() -> None:
    assert statefile.believable(STATE) == (STATE, "")


def test_every_part_that_is_written_is_known() -> None:
    assert set(STATE) == set(statefile.PARTS)


WRONG: list[tuple[str, Any, str]] = [
    ("down", 5, "down: must be an array, not 5"),
    ("down", ["web", None], "down[1]: must be a string, not None"),
    ("closing", "no", "closing: must be true or false, not 'no'"),
    ("exit_status", [1], "exit_status: must be an integer, not an array of 1"),
    ("exit_status", 10**30, f"exit_status: must be an integer, not {10**30}"),
    ("exit_status", 256, "exit_status: no exit status: 256"),
    ("at", "now", "at: must be a number, not 'now'"),
    ("processes", [], "processes: must be an object, not an array of 0"),
    ("sockets", {"listener/web": 5}, "sockets.listener/web: must be list or null, not 5"),
    ("sockets", "x", "sockets: must be an object, not 'x'"),
    ("pipes", {"a": "b"}, "pipes.a: must be an integer, not 'b'"),
    ("last", 1 << 40, f"last: no number of a child: {1 << 40}"),
    ("last", -1, "last: no number of a child: -1"),
    ("children", {"a#1": [1, 2, 0, "tree"]}, "children.a#1: no tag of a child: 0"),
    ("children", {"a#1": [1, 2, 1 << 62, "tree"]}, f"children.a#1: no tag of a child: {1 << 62}"),
    ("children", {"a#1": [float("inf"), 2, 3, "tree"]}, "children.a#1.pid: must be an integer, not inf"),
    ("children", {"a#1": [1, 2, 3, "all"]}, "children.a#1: no process"),
    ("kept", {"programs": {"a": {}}}, "kept: programs.a.name: is missing"),
    ("refused", {"listeners": 5}, "refused: listeners: must be an object, not 5"),
    ("logs", {"a": {"read": "1"}}, "logs.a.read: must be an integer, not '1'"),
    ("logs", {"a": {"read": -1}}, "logs.a: a count can't be below 0"),
]


@pytest.mark.parametrize(("part", "value", "said"), WRONG)
def test_what_makes_no_sense_is_left_out_and_named(part: str, value: Any, said: str) -> None:
    believed, wrong = statefile.believable(STATE | {part: value})
    assert wrong == said
    assert {key: believed[key] for key in STATE if key != part} == {key: STATE[key] for key in STATE if key != part}
    judge_state(believed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", 10**400), ("pid", 0), ("pid", 1 << 30), ("started_at", 1e300), ("started", float("nan")),
        ("deadline", -1e300), ("failures", 10**18), ("ending", "soon"), ("why", ["x"]), ("state", []),
        ("exit", {"code": 0, "signal": None, "at": 1e18, "reason": ""}),
    ],
)  # fmt: skip
def test_one_bad_status_is_one_process(field: str, value: Any) -> None:
    document = copy.deepcopy(STATE)
    document["processes"]["shop:1"][field] = value
    believed, wrong = statefile.believable(document)
    assert list(believed["processes"]) == ["blog"]
    assert wrong.startswith(f"processes.shop:1: {field}")


def test_of_many_mistakes_some_are_named() -> None:
    document = STATE | {"pipes": {f"p{number}": "x" for number in range(1000)}}
    wrong = statefile.believable(document)[1]
    assert wrong.endswith(" and 995 more")
    assert len(wrong) < 500


def test_what_is_believed_is_read() -> None:
    assert counters_from(STATE["logs"]) == {"log/shop:1/out": Counters(read=10, written=10)}
    assert counters_from({"a": {"read": "x"}, "b": 5, "c": {"read": 1}}) == {"c": Counters(read=1)}
    assert list(known_children(STATE)) == ["shop:1#3"]


FIRST, SECOND = {"keeper": "k", "at": 1.0}, {"keeper": "k", "at": 2.0}
BEFORE = {"keeper": "of a daemon before", "at": 9.0}


@pytest.mark.parametrize(
    ("in_file", "held", "counts"),
    [
        (None, None, None),
        (FIRST, None, FIRST),
        (None, FIRST, FIRST),
        (FIRST, SECOND, SECOND),
        (SECOND, FIRST, SECOND),
        (FIRST, dict(FIRST), FIRST),
        (BEFORE, FIRST, FIRST),
        (FIRST, BEFORE, FIRST),
        (None, BEFORE, None),
        ({"keeper": "k"}, FIRST, FIRST),
    ],
)
def test_of_file_and_keeper_the_later_counts(in_file: Any, held: Any, counts: Any) -> None:
    assert statefile.later(in_file, held, "k") is counts

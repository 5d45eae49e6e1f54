"""Documents that are read by the declaration of what they become."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import pytest

from procman.shape import Misfit, fit, sane, shown


class Colour(StrEnum):
    RED = "red"


class Pair(NamedTuple):
    left: int
    right: str


@dataclass(frozen=True)
class Box:
    number: int
    text: str = ""
    colour: Colour = Colour.RED
    pair: Pair | None = None
    word: Literal["", "yes"] = ""
    seconds: float = 0.0
    items: tuple[int, ...] = ()


def test_what_fits() -> None:
    document = {"number": 1, "colour": "red", "pair": [1, "x"], "word": "yes", "seconds": 2, "items": [1, 2]}
    assert fit(document, Box) == Box(1, "", Colour.RED, Pair(1, "x"), "yes", 2, (1, 2))
    assert fit({"a": [None, True]}, dict[str, list[bool | None]]) == {"a": [None, True]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (7, "it: must be an object, not 7"),
        ({}, "number: is missing"),
        ({"number": 1, "more": 1}, "more: is unknown"),
        ({"number": True}, "number: must be an integer, not True"),
        ({"number": 1.0}, "number: must be an integer, not 1.0"),
        ({"number": 2**63}, "number: must be an integer, not 9223372036854775808"),
        ({"number": 10**4000}, f"number: must be an integer, not 1{'0' * 39}…"),
        ({"number": 10**5000}, "number: must be an integer, not a huge number"),
        ({"number": 1, "text": None}, "text: must be a string, not None"),
        ({"number": 1, "text": "x" * 9, "colour": "blue"}, "colour: must be one of red, not 'blue'"),
        ({"number": 1, "colour": []}, "colour: must be one of red, not an array of 0"),
        ({"number": 1, "pair": [1]}, "pair: must be Pair or null, not an array of 1"),
        ({"number": 1, "pair": [1, 2]}, "pair.right: must be a string, not 2"),
        ({"number": 1, "pair": 5}, "pair: must be Pair or null, not 5"),
        ({"number": 1, "word": "no"}, "word: must be one of '', 'yes', not 'no'"),
        ({"number": 1, "seconds": float("nan")}, "seconds: must be a number, not nan"),
        ({"number": 1, "seconds": float("inf")}, "seconds: must be a number, not inf"),
        ({"number": 1, "seconds": 10**400}, f"seconds: must be a number, not 1{'0' * 39}…"),
        ({"number": 1, "items": [1, {}]}, "items[1]: must be an integer, not an object"),
        ({"number": 1, "\x1b" + "x" * 99: 1}, rf"'\x1b{'x' * 39}…': is unknown".replace("…", r"\u2026")),
    ],
)
def test_what_does_not_fit(document: Any, said: str) -> None:
    with pytest.raises(Misfit) as caught:
        fit(document, Box)
    assert str(caught.value) == said


def test_what_is_sane_of_a_document() -> None:
    parts = {"number": int, "boxes": dict[str, Box], "list": list[int]}
    boxes = {"good": {"number": 1}, "bad": {"number": "x"}}
    kept, wrong = sane({"number": "1", "boxes": boxes, "list": [1], "new": 1}, parts)
    assert kept == {"boxes": {"good": Box(1)}, "list": [1]}
    assert wrong == ["number: must be an integer, not '1'", "boxes.bad.number: must be an integer, not 'x'"]


def test_a_message_does_not_grow_with_the_value() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"x": deep}, "x" * 10**6, 10**6000):
        assert len(shown(value)) < 60
    while deep:  # one by one: its own end would be as deep
        [deep] = deep

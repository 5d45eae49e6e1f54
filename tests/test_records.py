"""Records are dataclasses in all that procman does with them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import FrozenInstanceError, field
from typing import Any

import pytest

from procman.records import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """A point."""

    x: int
    y: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    x: int = 1
    y: int


@dataclass(slots=True)
class Open:
    x: int = 1
    hidden: int = field(default=2, repr=False, compare=False)

    def __repr__(self) -> str:
        return "own"


@dataclass(frozen=True, slots=True, eq=False)
class Itself:
    x: int = 1


STANDARD: Any = dataclasses.make_dataclass(
    "Point", [("x", int), ("y", int, 0), ("names", list, field(default_factory=list))], frozen=True, slots=True
)


@pytest.mark.parametrize(
    ("args", "named"), [((1,), {}), ((1, 2), {}), ((1,), {"names": ["a"]}), ((), {"y": 3, "x": 1}), ((1, 2, ["b"]), {})]
)
def test_as_the_standard_library_has_it(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, theirs = Point(*args, **named), STANDARD(*args, **named)
    assert repr(ours) == repr(theirs)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert dataclasses.astuple(ours) == dataclasses.astuple(theirs)
    assert dataclasses.replace(ours, y=9) == Point(ours.x, 9, ours.names)
    assert copy.copy(ours) == copy.deepcopy(ours) == ours
    match ours:
        case Point(x, y):
            assert (x, y) == (ours.x, ours.y)


@pytest.mark.parametrize(
    ("args", "named", "said"),
    [
        ((), {}, "'x'"),
        ((1, 2, [], 4), {}, "takes 3 values, 4 were given"),
        ((1,), {"z": 1}, "'z' is none of its fields"),
        ((1,), {"x": 1}, "'x' has two values"),
    ],
)
def test_wrong_arguments(args: tuple[Any, ...], named: dict[str, Any], said: str) -> None:
    for kind in (Point, STANDARD):
        with pytest.raises(TypeError):
            kind(*args, **named)
    with pytest.raises(TypeError, match=said):
        Point(*args, **named)


def test_frozen_ones() -> None:
    point: Any = Point(1)
    with pytest.raises(FrozenInstanceError, match=r"Point\.x"):
        point.x = 2
    with pytest.raises(FrozenInstanceError):
        del point.x
    with pytest.raises(FrozenInstanceError):
        point.new = 2
    assert {Point(1, 2, ()), Point(1, 2, ())} == {Point(1, 2, ())}  # type: ignore[arg-type]
    other: object = Open(1)
    assert Point(1) != other
    assert Point(1).names is not Point(1).names
    assert Point.__doc__ == "A point."


def test_those_that_can_change() -> None:
    one = Open()
    one.x = 5
    assert one == Open(5, hidden=3)
    assert repr(one) == "own"
    with pytest.raises(TypeError):
        hash(one)
    with pytest.raises(AttributeError):
        one.new = 1  # type: ignore[attr-defined]


def test_named_ones_and_those_without_equality() -> None:
    assert Named(y=2) == Named(y=2, x=1)
    with pytest.raises(TypeError, match="takes 0 values"):
        Named(2)  # type: ignore[call-arg]
    assert Itself() != Itself()
    assert len({Itself(), Itself()}) == 2

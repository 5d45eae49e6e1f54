"""From a JSON document to values of the types that a class declares: damage is found where it is read, not where it
hurts.

What one process has written for another (the state file, memory that the keeper holds) may be damaged, or be
something else. `fit` takes the declaration of a dataclass or NamedTuple as the description of its document. Pure.
"""

from __future__ import annotations

import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union

NUMBERS = 2**63
"""No number that we write reaches this; larger ones are refused, since much of the kernel and of Python would do so
later."""


class Misfit(ValueError):
    """A value that is not what was declared. The text says where in the document (`at`), and what was expected."""

    def __init__(self, at: str, text: str) -> None:
        super().__init__(f"{at or 'it'}: {text}")
        self.at = at
        self._text = text

    def inside(self, place: str) -> Misfit:
        """The same, seen from outside: what it was said of stands at `place`."""
        dot = "." if place and self.at and not self.at.startswith("[") else ""
        return Misfit(f"{place}{dot}{self.at}", self._text)


Reader = Callable[[object], Any]
"""From a value of a document to what was declared. Raises Misfit, with a place below that value."""


def flat(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that holds no other one. dataclasses.asdict copies deeply, and takes ten times as
    long."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def fit(value: object, kind: Any, at: str = "") -> Any:
    """`value` as the type `kind` declares it; `at` is where it stands, for the message. Raises Misfit.

    Known are bool, int, float, str, None, Any, X | Y, Literal, StrEnum, list[X], tuple[X, ...], frozenset[X],
    dict[str, X], dataclasses (from an object; fields with a default may be missing) and NamedTuples (from an array). A
    bool is no number, and a number is finite.
    """
    try:
        return reader(kind)(value)
    except Misfit as error:
        raise error.inside(at) from None


@functools.cache
def reader(kind: Any) -> Reader:
    """`fit` for one type. To look at a type takes longer than to look at a value, so it is done once."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin in (types.UnionType, Union):
        return _either(arguments)
    if origin is Literal:
        return _literal(arguments)
    if origin in (list, tuple, frozenset):
        return _array(origin, arguments[0])
    if origin is dict:
        return _mapping(arguments[1])
    if is_dataclass(kind):
        return _instance(kind)
    if hasattr(kind, "_fields"):
        return _named_tuple(kind)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return _member(kind)
    return _plain(kind)


def sane(document: object, parts: dict[str, Any], at: str = "") -> tuple[dict[str, Any], list[str]]:
    """What of an object has the declared shape, key by key, and what was left out and why. A dict[str, X] is looked at
    entry by entry. Unknown keys are left out without a word: a newer version may have written them."""
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    for key, item in _object(document, at).items():
        kind = parts.get(key)
        try:
            if kind is None:
                continue
            if typing.get_origin(kind) is dict:
                here = place(at, key)
                each = dict.fromkeys(_object(item, here), typing.get_args(kind)[1])
                kept[key], more = sane(item, each, here)
                wrong += more
            else:
                kept[key] = fit(item, kind, place(at, key))
        except Misfit as error:
            wrong.append(str(error))
    return kept, wrong


def _object(value: object, at: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _misfit(value, "an object", at)
    return value


def _either(kinds: Sequence[Any]) -> Reader:
    readers = [reader(kind) for kind in kinds]

    def read(value: object) -> Any:
        for each in readers:
            try:
                return each(value)
            except Misfit as error:
                if error.at:  # it has looked inside: that is the one that was meant
                    raise
        raise _misfit(value, " or ".join(map(_word, kinds)))

    return read


def _literal(words: Sequence[Any]) -> Reader:
    def read(value: object) -> Any:
        if any(value == one and type(value) is type(one) for one in words):
            return value
        raise _misfit(value, "one of " + ", ".join(map(repr, words)))

    return read


def _member(kind: type[enum.StrEnum]) -> Reader:
    members = {str(member): member for member in kind}

    def read(value: object) -> Any:
        if isinstance(value, str) and value in members:
            return members[value]
        raise _misfit(value, "one of " + ", ".join(members))

    return read


def _array(origin: Any, kind: Any) -> Reader:
    item = reader(kind)

    def read(value: object) -> Any:
        if not isinstance(value, list):
            raise _misfit(value, "an array")
        found: list[Any] = []
        try:
            for each in value:
                found.append(item(each))  # noqa: PERF401 - its length is the place of a misfit
        except Misfit as error:
            raise error.inside(f"[{len(found)}]") from None
        return found if origin is list else origin(found)

    return read


def _mapping(kind: Any) -> Reader:
    item = reader(kind)

    def read(value: object) -> dict[str, Any]:
        given = _object(value)
        return _read_fields(given, dict.fromkeys(given, item))

    return read


def _instance(kind: Any) -> Reader:
    readers = {name: reader(hint) for name, hint in _hints(kind).items()}
    needed = [
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    ]  # fmt: skip

    def read(value: object) -> Any:
        given = _object(value)
        for key in given:
            if key not in readers:
                raise Misfit(place("", key), "is unknown")
        for name in needed:
            if name not in given:
                raise Misfit(place("", name), "is missing")
        return kind(**_read_fields(given, readers))

    return read


def _named_tuple(kind: Any) -> Reader:
    names = kind._fields
    readers = {name: reader(hint) for name, hint in _hints(kind).items()}

    def read(value: object) -> Any:
        if not isinstance(value, list) or len(value) != len(names):
            raise _misfit(value, f"an array of {len(names)}")
        return kind(**_read_fields(dict(zip(names, value, strict=True)), readers))

    return read


def _read_fields(given: Mapping[str, object], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Each of them, read by the reader of its key."""
    found = {}
    for key, item in given.items():
        try:
            found[key] = readers[key](item)
        except Misfit as error:
            raise error.inside(place("", key)) from None
    return found


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_number(value: object) -> bool:
    # Compared before it is converted: an int may be too large for that.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -NUMBERS <= value < NUMBERS
        and math.isfinite(value)
    )


_PLAIN: Mapping[Any, Callable[[object], bool]] = {
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    int: lambda value: isinstance(value, int) and _is_number(value),
    float: _is_number,
    type(None): lambda value: value is None,
    None: lambda value: value is None,
}


def _plain(kind: Any) -> Reader:
    fits = _PLAIN[kind]

    def read(value: object) -> Any:
        if not fits(value):
            raise _misfit(value, _word(kind))
        return value

    return read


def _word(kind: Any) -> str:
    words = {bool: "true or false", str: "a string", int: "an integer", float: "a number", type(None): "null"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))


def _misfit(value: object, expected: str, at: str = "") -> Misfit:
    return Misfit(at, f"must be {expected}, not {shown(value)}")


def shown(value: object) -> str:
    """What a value is, in a few words, for a message: it may be of any size and depth."""
    if isinstance(value, str | int | float | bool) or value is None:
        try:
            text = repr(value)
        except ValueError:  # an int of more than 4,300 digits
            text = "a huge number"
        return text if len(text) <= 40 else f"{text[:40]}…"
    return f"an array of {len(value)}" if isinstance(value, list) else "an object"


def place(at: str, key: str) -> str:
    """Where `key` of the object at `at` stands, for a message."""
    key = key if len(key) <= 40 else f"{key[:40]}…"
    readable = key if key.isprintable() else ascii(key)
    return f"{at}.{readable}" if at else readable

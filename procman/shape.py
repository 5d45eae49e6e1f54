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
from collections.abc import Sequence
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
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, Union):
        return _either(value, arguments, at)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in arguments):
            return value
        raise _misfit(value, "one of " + ", ".join(map(repr, arguments)), at)
    if origin in (list, tuple, frozenset):
        if not isinstance(value, list):
            raise _misfit(value, "an array", at)
        return origin(fit(item, arguments[0], f"{at}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        return {key: fit(item, arguments[1], place(at, key)) for key, item in _object(value, at).items()}
    if is_dataclass(kind):
        return _instance(value, kind, at)
    if hasattr(kind, "_fields"):
        return _named_tuple(value, kind, at)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        if isinstance(value, str) and value in {str(member) for member in kind}:
            return kind(value)
        raise _misfit(value, "one of " + ", ".join(map(str, kind)), at)
    return _plain(value, kind, at)


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


def _object(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _misfit(value, "an object", at)
    return value


def _either(value: object, kinds: Sequence[Any], at: str) -> Any:
    for kind in kinds:
        try:
            return fit(value, kind, at)
        except Misfit as error:
            if error.at != at:  # it has looked inside: that is the one that was meant
                raise
    raise _misfit(value, " or ".join(map(_word, kinds)), at)


def _instance(value: object, kind: Any, at: str) -> Any:
    given = _object(value, at)
    hints = _hints(kind)
    for key in given:
        if key not in hints:
            raise Misfit(place(at, key), "is unknown")
    for field in fields(kind):
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise Misfit(place(at, field.name), "is missing")
    return kind(**{key: fit(item, hints[key], place(at, key)) for key, item in given.items()})


def _named_tuple(value: object, kind: Any, at: str) -> Any:
    names = kind._fields
    if not isinstance(value, list) or len(value) != len(names):
        raise _misfit(value, f"an array of {len(names)}", at)
    hints = _hints(kind)
    return kind(*(fit(item, hints[name], place(at, name)) for name, item in zip(names, value, strict=True)))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(value: object, kind: Any, at: str) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        str: isinstance(value, str),
        int: number and isinstance(value, int) and -NUMBERS <= value < NUMBERS,
        # Compared before it is converted: an int may be too large for that.
        float: number and -NUMBERS <= value < NUMBERS and math.isfinite(value),  # type: ignore[operator, arg-type]
        type(None): value is None,
        None: value is None,
    }
    if not fits[kind]:
        raise _misfit(value, _word(kind), at)
    return value


def _word(kind: Any) -> str:
    words = {bool: "true or false", str: "a string", int: "an integer", float: "a number", type(None): "null"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))


def _misfit(value: object, expected: str, at: str) -> Misfit:
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

"""What a message of a supervisor may hold: the keeper believes nothing that could hurt it later.

It keeps names, notes and numbers for the next supervisor, who must be able to read them, and some go into system calls.
So each field that it keeps is looked at when it comes. What a program is to be (argv, environment, limits) is not: the
child itself finds out, and reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from procman.keeper import tree

NAME_MAX, HELD_MAX, NOTE_MAX = 16_384, 4096, 4096
"""Characters of the name of a child, of something held, and of a note: far more than a table makes, and far less than
does not fit into the messages of a snapshot."""

HOUSE_BITS = tree.TAG_BITS - tree.NUMBER_BITS
LAST_MAX = 1 << (tree.NUMBER_BITS - 1)
"""No daemon starts so many children; above it the numbers would run into those of another house."""

PID_MAX = 1 << 22
"""The highest one that Linux gives (proc(5))."""

TIME_MAX = 253402300800
"""Seconds since the epoch: the year 10000. Nobody can write later times as RFC 3339."""


def _number(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value < high


def _text(longest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= longest


def _is_child(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= NAME_MAX and value.isprintable()


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < TIME_MAX


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "child": _is_child,
    "name": _text(HELD_MAX),
    "names": lambda value: isinstance(value, list) and all(map(_text(HELD_MAX), value)),
    "note": _text(NOTE_MAX),
    "signal": _number(-(1 << 31), 1 << 31),
    "house": _number(0, 1 << HOUSE_BITS),
    "last": _number(0, LAST_MAX),
    "tag": _number(1, 1 << tree.TAG_BITS),  # 0 is what every other process of the machine has
    "pid": _number(0, PID_MAX + 1),
    "start": _number(0, 1 << 63),
    "at": _is_time,
    "members": lambda value: isinstance(value, list) and all(map(_number(0, PID_MAX + 1), value)),
    "number": _number(0, 1 << 53),
    "status": _number(0, 256),
}
"""By the name of the field, whatever the message is; fields that are not here are not kept."""


def nonsense(message: Mapping[str, Any]) -> str:
    """The first field of `message` that can't be what it stands for, "" when all make sense."""
    return next((name for name, fits in FIELDS.items() if name in message and not fits(message[name])), "")

"""What a terminal is shown of output that may hold anything: text and colours, and nothing that could harm it. Pure."""

from __future__ import annotations

import re

_PLAIN = re.compile(rb"[\t\x20-\x7e]*\n?")
_COLOUR = re.compile("\x1b\\[[0-9;:]*m")
_RESET = b"\x1b[0m"
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of what follows, and so can show another text than there is."""


def visible(line: bytes) -> bytes:
    """A line for a terminal: control characters as escapes that show them, but for tabs and colours; so is what is no
    UTF-8. No colour reaches further than the line."""
    if _PLAIN.fullmatch(line):
        return line
    newline = b"\n" if line.endswith(b"\n") else b""
    text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "backslashreplace")
    shown, at, coloured = [], 0, False
    for found in _COLOUR.finditer(text):
        shown += [_escaped(text[at : found.start()]), found[0]]
        at, coloured = found.end(), True
    shown.append(_escaped(text[at:]))
    return "".join(shown).encode() + (_RESET if coloured else b"") + newline


def _escaped(text: str) -> str:
    return "".join(
        c if (c.isprintable() and c not in _TURNS) or c == "\t" else c.encode("unicode_escape").decode() for c in text
    )

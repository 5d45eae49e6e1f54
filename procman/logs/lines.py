"""Output as lines: where it is cut, and how each line is dressed for its reader.

    text      "shop:1 | 2026-11-27T05:30:00.123Z hello": name and time are there where they are asked for
    json      {"time": "2026-11-27T05:30:00.123Z", "program": "shop", "instance": 1, "stream": "stdout", "message": "…"}

One line of output becomes one line, or one message. One that is longer than LINE_LIMIT bytes is cut into parts, between
two characters of UTF-8. All parts but the last are marked: by a backslash at their end, or `"partial": true`.

No I/O and no clock: bytes and the time come in, `Piece`s go out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring as quoted
from typing import NamedTuple

from procman.records import dataclass
from procman.terminal import visible

LINE_LIMIT = 64 * 1024
"""Bytes of a line that are waited for until it is complete."""

NEWLINE = ord("\n")

CUT = b"\\"
"""Ends a part of a line that goes on."""

COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
"""Of names on a terminal: SGR codes (ECMA-48). Red is left to errors."""


class Piece(NamedTuple):
    """Bytes to write: whole lines, or one message. `source` is the program's output that they stand for, a line for a
    line; a line of procman's own has none. It `reports` so many dropped bytes. `added` is how much longer each line has
    become, or -1: that differs."""

    data: bytes
    source: bytes = b""
    reports: int = 0
    added: int = -1

    def own_in(self, start: int, length: int, own: int = 0) -> int:
        """How many bytes of `source` are in `length` bytes of `data` from `start` on; before them were `own`. A line
        counts when all of it is there."""
        if start + length >= len(self.data):
            return len(self.source) - own
        lines = self.data.count(b"\n", start, start + length)
        whole = self.data[start + length - 1] == NEWLINE and (not start or self.data[start - 1] == NEWLINE)
        if whole and self.added >= 0:
            return length - lines * self.added
        end = own
        for _ in range(lines):
            end = self.source.index(b"\n", end) + 1
        return end - own


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a line comes from. `process` is "shop:1", its `program` "shop", and `stream` "stdout" or "stderr"."""

    process: str
    program: str
    instance: int
    stream: str

    @staticmethod
    def of(process: str, *, error: bool) -> Origin:
        """That of one output of the process of this name."""
        program, _, instance = process.partition(":")
        return Origin(process, program, int(instance or 1), "stderr" if error else "stdout")


Dress = Callable[[bytes, bool, float], list[Piece]]
"""Makes pieces of lines: dress(lines, partial, wall). `lines` ends with a newline, or is one line without an end;
`partial`: more of that one will come. `wall` is the time, in seconds since the epoch."""


def stamp(wall: float) -> str:
    """A time as it stands before lines: RFC 3339, UTC, milliseconds."""
    return f"{datetime.fromtimestamp(wall, UTC).isoformat(timespec='milliseconds').removesuffix('+00:00')}Z"


def cut(waiting: bytes, limit: int = LINE_LIMIT) -> tuple[int, bool]:
    """How much of the output that waits can be dressed now: whole lines (length, False), or a part of a line that is
    longer than `limit` (length, True). 0: no line is complete yet."""
    end = waiting.rfind(b"\n") + 1
    if end or len(waiting) <= limit:
        return end, False
    return whole_characters(waiting[:limit]), True


def each(lines: bytes) -> list[bytes]:
    """The lines one by one, with their newlines; the last one may have none."""
    *whole, rest = lines.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def whole_characters(data: bytes) -> int:
    """The length of `data` without a character of UTF-8 at its end that is not complete."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < needed and len(data) > back else len(data)
    return len(data)


def plain(lines: bytes, partial: bool, _wall: float) -> list[Piece]:
    """Lines as they are. One without an end goes on in what follows; a part that is cut off is marked."""
    return [Piece(_ended(lines, partial) if partial else lines, lines)]


def text(name: bytes, *, timestamps: bool, safe: bool = False) -> Dress:
    """Lines with `name` before each (it brings what separates it), and the time where it is asked for. `safe`: for a
    terminal, without what could harm it."""

    def dress(lines: bytes, partial: bool, wall: float) -> list[Piece]:
        before = name + stamp(wall).encode() + b" " if timestamps else name
        shown = lines
        if safe and lines.translate(None, HARMLESS):
            shown = b"".join(map(visible, each(lines)))
        ended = _ended(shown, partial)
        added = len(before) if shown is lines else -1
        # One replace for all lines: a loop over lines would cost ten times as much.
        return [Piece(before + ended[:-1].replace(b"\n", b"\n" + before) + b"\n", lines, 0, added)]

    return dress


def prefix(process: str, *, colour: bool) -> bytes:
    """What stands before lines on the daemon's stdout: the name, in a colour that stays its own."""
    if not colour:
        return f"{process} | ".encode()
    code = COLOURS[zlib.crc32(process.encode()) % len(COLOURS)]
    return f"\x1b[{code}m{process} |\x1b[0m ".encode()


HARMLESS = bytes({*range(0x20, 0x7F), *b"\n\t"})
"""What a terminal only shows."""

EASY = bytes({*range(0x20, 0x100), *b"\n\t"})
"""What JSON takes as it is, or with a backslash before it, where it is UTF-8 (RFC 8259, 7)."""


def json_objects(origin: Origin) -> Dress:
    """One object a line: time, program, instance, stream, message. Bytes that are no UTF-8 are shown as `\\xff`."""
    about = f'"program": {quoted(origin.program)}, "instance": {origin.instance}, "stream": "{origin.stream}"'

    def dress(lines: bytes, partial: bool, wall: float) -> list[Piece]:
        before = f'{{"time": "{stamp(wall)}", {about}, "message": "'.encode()
        after = b'", "partial": true}\n' if partial else b'"}\n'
        messages = _quoted(lines.removesuffix(b"\n"))
        return [Piece(before + messages.replace(b"\n", after + before) + after, lines)]

    return dress


def _quoted(lines: bytes) -> bytes:
    """Lines as JSON strings without the quotes, newlines between them. Without a loop over lines, if possible."""
    if lines.translate(None, EASY) or not _is_utf8(lines):
        found = (quoted(line.decode(errors="backslashreplace"))[1:-1] for line in lines.split(b"\n"))
        return "\n".join(found).encode()
    for char, escaped in ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\t", b"\\t")):
        if char in lines:
            lines = lines.replace(char, escaped)
    return lines


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ended(lines: bytes, partial: bool) -> bytes:
    if partial:
        return lines + CUT + b"\n"
    return lines if lines.endswith(b"\n") else lines + b"\n"

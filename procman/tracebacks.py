"""Tracebacks of Python in a text: where one begins and ends, what it says, and which are the same error.

One that was raised while another was handled (PEP 3134) is one with it: the chain is a single traceback, and its
exception is the last one. An exception group (PEP 654) is one, too. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

TEXT_MAX = 16 * 1024
"""Characters of a traceback that are kept: of a longer one the beginning and the end."""

MESSAGE_MAX = 500
FRAMES_MAX = 400
CHAIN_MAX = 20
"""Exceptions of a chain, and groups within each other."""

_HEAD = re.compile(r"(?:.*\W)?Traceback \(most recent call last\):\s*")
_CHAIN = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_FRAME = re.compile(r'[\s|+-]*(?:> )?File "(?P<file>[^"\n]*)", line (?P<line>\d+)(?:, in (?P<function>.*))?')
_RAISED = re.compile(r"[\s|+-]*(?P<type>[^\W\d][\w.\ufffd]*(?:\.<locals>\.[\w.\ufffd]+)*)(?:: (?P<message>.*))?")
_SYNTAX = re.compile(r"(?P<type>(?:Syntax|Indentation|Tab)Error): (?P<message>.*)")
_LEFT_OUT = re.compile(r"  \[(\d+) lines left out\]")
_ENDINGS = ("Group", "Error", "Exception", "Warning", "Interrupt", "Exit")  # of names of exceptions, in a group


class Traceback(NamedTuple):
    """`exception` is the type as it was printed ("?" where the end is missing), `raised` those of all exceptions of the
    chain, the first one first. `frames` are "file:line function", the outermost first."""

    exception: str
    message: str
    raised: tuple[str, ...]
    frames: tuple[str, ...]
    text: str

    @property
    def key(self) -> str:
        """The same for two tracebacks of the same error: same types, same frames, whatever the messages."""
        import hashlib  # which loads OpenSSL: only for who asks

        whole = "\n".join((*self.raised, "", *self.frames))
        return hashlib.blake2b(whole.encode(errors="replace"), digest_size=8).hexdigest()


class _At(Enum):
    """Where a Scanner is."""

    OUTSIDE = 0
    FRAMES = 1
    RAISED = 2  # after the line with the exception: more of its message, or a chain may follow
    CHAIN = 3  # after the sentence that joins two


class Scanner:
    """Finds tracebacks in lines that come one by one. Memory is bounded. What follows an exception is taken for more of
    its message, and for its notes (PEP 678), until another traceback begins: what it does not belong to, the caller
    leaves out."""

    def __init__(self) -> None:
        self._at = _At.OUTSIDE
        self._group = False
        self._text = _Text()
        self._raised: list[str] = []
        self._exception, self._message = "?", ""
        self._named = False  # the exception of the present section of the chain
        self._frames: list[str] = []

    @property
    def inside(self) -> bool:
        """Whether the last line that was fed belongs to a traceback which may not be complete."""
        return self._at is not _At.OUTSIDE

    def feed(self, line: str) -> Traceback | None:
        """One more line without its newline; the traceback that it shows to be complete."""
        done = self._step(line)
        if self._at is not _At.OUTSIDE:
            self._text.add(line)
        return done

    def end(self) -> Traceback | None:
        """There are no more lines: the traceback that they ended with."""
        done = None
        if self._raised or self._frames:
            raised, text = tuple(self._raised), self._text.text()
            done = Traceback(self._exception, self._message[:MESSAGE_MAX], raised, tuple(self._frames), text)
        self._at, self._group, self._text = _At.OUTSIDE, False, _Text()
        self._raised, self._frames = [], []
        self._exception, self._message = "?", ""
        return done

    def _step(self, line: str) -> Traceback | None:
        head = _HEAD.fullmatch(line) if "Traceback (most recent" in line else None
        if self._at is _At.FRAMES:
            return self._in_frames(line, head)
        if self._at is not _At.OUTSIDE and not line.strip(" |"):
            return None
        if self._at is _At.CHAIN and head:
            self._begin(head)
            return None
        if self._at is _At.RAISED and not head:
            if line.strip(" |") in _CHAIN:
                self._at = _At.CHAIN
            return None
        done = self.end() if self._at is not _At.OUTSIDE else None
        if head:
            self._begin(head)
        return done

    def _in_frames(self, line: str, head: re.Match[str] | None) -> Traceback | None:
        frame = _FRAME.match(line)
        if frame:
            if len(self._frames) < FRAMES_MAX:
                self._frames.append(f"{frame['file']}:{frame['line']} {frame['function'] or ''}".rstrip()[:300])
            return None
        if self._group and line[:1] == " ":
            found = _RAISED.fullmatch(line) if line.lstrip(" ").startswith("| ") else None
            if found and found["type"].endswith(_ENDINGS) and len(self._raised) < CHAIN_MAX:
                self._raise(found)
            return None
        if self._group and self._named and not line:
            self._at = _At.RAISED
            return None
        if line[:1] in (" ", "\t") or not line:
            return None
        if head:  # the last one was cut off
            done = self.end()
            self._begin(head)
            return done
        found = None if self._group else _RAISED.fullmatch(line)
        if found is None:
            return self.end()
        self._raise(found)
        self._at = _At.RAISED
        return None

    def _raise(self, found: re.Match[str]) -> None:
        """An exception, or one of a group: the group is the first one of it."""
        kind = found["type"][:200]
        if not self._named:
            self._exception, self._message, self._named = kind, found["message"] or "", True
        self._raised.append(kind)

    def _begin(self, head: re.Match[str]) -> None:
        self._at = _At.FRAMES
        self._group = "+ Exception Group Traceback" in head[0]
        self._named = False
        del self._raised[: -CHAIN_MAX]


class _Text:
    """The lines of a traceback, the middle ones left out where there are too many."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._room = TEXT_MAX // 2
        self._last: list[str] = []
        self._size = 0
        self._left_out = 0

    def add(self, line: str) -> None:
        line = line[: TEXT_MAX // 8]
        if self._room > 0:
            self._first.append(line)
            self._room -= len(line) + 1
            return
        self._last.append(line)
        self._size += len(line) + 1
        if self._size > TEXT_MAX:  # now and then, not with each line
            while self._size > TEXT_MAX // 3:
                self._size -= len(self._last.pop(0)) + 1
                self._left_out += 1

    def text(self) -> str:
        """All of it, without empty lines at its end."""
        more = [f"  [{self._left_out} lines left out]"] if self._left_out else []
        return "\n".join([*self._first, *more, *self._last]).rstrip("\n")


def shortened(lines: Sequence[str], most: int) -> list[str | int]:
    """What to show of a traceback in about `most` lines: of its first exception and of its last one the beginning and
    the end. A number stands for so many lines that are left out."""
    joints = [number for number, line in enumerate(lines) if line.strip(" |") in _CHAIN]
    sections = [(0, joints[0]), (joints[-1], len(lines))] if joints else [(0, len(lines))]
    room = most // len(sections) // 2
    keep = {n for begin, end in sections for n in range(begin, end) if n < begin + room or n >= end - room}
    shown: list[str | int] = []
    for number, line in enumerate(lines):
        if number in keep:
            shown.append(line)
            continue
        before = shown.pop() if shown and isinstance(shown[-1], int) else 0
        found = _LEFT_OUT.fullmatch(line)
        shown.append(int(before) + (int(found[1]) if found else 1))
    return shown


def scan(lines: Iterable[str]) -> Iterator[Traceback]:
    """Each traceback in some lines, also one that the end cuts off."""
    scanner = Scanner()
    for line in lines:
        if (found := scanner.feed(line)) is not None:
            yield found
    if (found := scanner.end()) is not None:
        yield found


def syntax_error(lines: Sequence[str]) -> Traceback | None:
    """What Python prints of a script that is none, which has no header; None where `lines` do not begin with that."""
    place = _FRAME.fullmatch(lines[0])
    found = ((number, _SYNTAX.fullmatch(line)) for number, line in enumerate(lines[1:4], 1))
    number, raised = next((one for one in found if one[1]), (0, None))
    if place is None or raised is None:
        return None
    frames = (f"{place['file']}:{place['line']}"[:300],)
    text = _Text()
    for line in lines[: number + 1]:
        text.add(line)
    return Traceback(raised["type"], raised["message"][:MESSAGE_MAX], (raised["type"],), frames, text.text())


def of_structlog(stacks: object) -> str:
    """Exceptions as the dict_tracebacks of structlog tell them, the last one first: the text that Python prints for
    them, without the lines of source. "" for what is none."""
    return "\n".join(_printed(stacks, CHAIN_MAX))


def _printed(stacks: object, depth: int) -> list[str]:
    lines: list[str] = []
    joint = _CHAIN[1]
    for stack in reversed(stacks[:CHAIN_MAX] if isinstance(stacks, list) else []):
        if not isinstance(stack, dict) or not isinstance(stack.get("exc_type"), str):
            continue
        if lines:
            lines += ["", joint, ""]
        members = stack.get("exceptions") if stack.get("is_group") else None
        lines += _section(stack, members[:CHAIN_MAX] if isinstance(members, list) and depth else [], depth)
        joint = _CHAIN[0 if stack.get("is_cause") else 1]
    return lines


def _section(stack: Mapping[str, object], members: Sequence[object], depth: int) -> list[str]:
    """One exception with its frames; with `members`, those of a group."""
    frames, value, notes = (stack.get(key) for key in ("frames", "exc_value", "exc_notes"))
    lines = [
        f'  File "{frame.get("filename")!s:.300}", line {frame.get("lineno")!s:.20}, in {frame.get("name")!s:.300}'
        for frame in (frames[:FRAMES_MAX] if isinstance(frames, list) else ())
        if isinstance(frame, dict)
    ]
    raised = f"{stack['exc_type']}: {value}" if value and isinstance(value, str) else f"{stack['exc_type']}"
    more = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    lines += "\n".join([raised, *more]).split("\n")
    if not members:
        return ["Traceback (most recent call last):", *lines]
    lines = ["  + Exception Group Traceback (most recent call last):", *(f"  | {line}" for line in lines)]
    for number, member in enumerate(members, 1):
        lines.append(f"  {'+-+' if number == 1 else '  +'}---------------- {number} ----------------")
        lines += (f"    | {line}" for line in _printed(member, depth - 1))
    return [*lines, "    +------------------------------------"]

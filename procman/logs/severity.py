"""How bad a line of output is, as syslog and the journal want to know: a number, by RFC 5424 (6.2.1).

Taken from the line, where it tells: a prefix "<3>" as in sd-daemon(3), which is not part of the message, or the level
that `procmanctl logs --level` sees there. Else by stream. What belongs to a line is as bad as that one: the lines of a
traceback, those that are indented, and the later parts of a long line.

What a line says of itself may be what a visitor of the site has typed. So it is never more than critical (2): that a
machine is unusable (0, 1), which wakes people and which journald prints on every terminal, takes a prefix.
"""

from __future__ import annotations

from procman import logformat
from procman.logrecords import Joints

ERROR, INFO = 3, 6

_OF_LEVEL = (INFO, *[7] * 19, *[INFO] * 10, *[4] * 10, *[ERROR] * 10, *[2] * 11)
"""By the number of a level of `logging`, which is at most 60."""


class Severities:
    """Those of the lines of one stream, which come one after the other. `error`: it is stderr, and that apart; such a
    line is an error unless it says otherwise."""

    def __init__(self, *, error: bool) -> None:
        self._usual = self._now = ERROR if error else INFO
        self._joints = Joints()
        self._within = False  # the next one goes on with a long line

    def of(self, line: bytes, wall: float, *, partial: bool = False) -> tuple[int, bytes]:
        """(the severity of a line that came at `wall`, the line without a prefix that told it); `partial`: more of it
        will come."""
        within, self._within = self._within, partial
        if within:
            return self._now, line
        if line[:1] == b"<" and line[2:3] == b">" and line[1:2] in b"01234567":
            self._now, line = line[1] - ord("0"), line[3:]
            self._joints.begin(logformat.parse(line, None))
            return self._now, line
        said = logformat.parse(line.rstrip(b"\r"), None)
        if not self._joints.joins(said, wall):
            self._joints.begin(said)
            level = self._joints.head.level
            self._now = _OF_LEVEL[level] if level else self._usual
        return self._now, line

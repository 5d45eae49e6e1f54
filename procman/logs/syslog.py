"""Lines as messages of syslog (RFC 5424), for the socket of a syslog daemon, which is the machine's unless a table says
otherwise.

    <30>1 2026-11-27T05:30:00.123Z host shop shop:1 stdout - hello

Facility daemon; APP-NAME is the program, PROCID the process, MSGID the stream. No structured data.
"""

from __future__ import annotations

import os

from procman.logs.lines import CUT, Dress, Origin, Piece, each, stamp

ADDRESS = "unix:/dev/log"
FACILITY = 3
MESSAGE_LIMIT = 7 * 1024
"""Bytes of output in one message: with its header it stays below the 8 KiB that rsyslog takes."""

NAME_MAX = 48
PROCESS_MAX = 128
HOST_MAX = 255


def messages(origin: Origin, *, apart: bool) -> Dress:
    """Dresses each line as a message. `apart`: its stream tells errors from the rest."""
    from procman.logs.severity import Severities  # which has many patterns: only for who asks

    host = _word(os.uname().nodename, HOST_MAX)
    about = f"{host} {_word(origin.program, NAME_MAX)} {_word(origin.process, PROCESS_MAX)} {origin.stream} - "
    severities = Severities(error=apart and origin.stream == "stderr")

    def dress(lines: bytes, partial: bool, wall: float) -> list[Piece]:
        header = f">1 {stamp(wall)} {about}".encode()
        pieces = []
        for line in each(lines):
            number, message = severities.of(line.removesuffix(b"\n"), wall, partial=partial)
            data = b"<%d%b%b%b" % (FACILITY * 8 + number, header, message, CUT if partial else b"")
            pieces.append(Piece(data, line))
        return pieces

    return dress


def _word(name: str, limit: int) -> str:
    """A name as a field of the header: printable ASCII without spaces, not empty."""
    return "".join(char if "!" <= char <= "~" else "_" for char in name[:limit]) or "-"

"""Lines as entries of systemd's journal, in its own protocol (systemd's "Native Journal Protocol").

Fields of an entry: MESSAGE, PRIORITY, SYSLOG_IDENTIFIER (the program), PROCMAN_PROGRAM, PROCMAN_INSTANCE,
PROCMAN_PROCESS, PROCMAN_STREAM, and PROCMAN_PARTIAL=1 for a part of a line that goes on in the next entry. Bytes
stay as they are.

An entry that is too large for a datagram is sent as a sealed memory file, whose descriptor is all that the datagram
holds.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct

from procman.logs.lines import Dress, Origin, Piece, each

ADDRESS = "unix:/run/systemd/journal/socket"

MESSAGE_LIMIT = 512 * 1024
"""Bytes of output in one entry."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def entries(origin: Origin, *, apart: bool) -> Dress:
    """Dresses each line as an entry. `apart`: its stream tells errors from the rest."""
    from procman.logs.severity import Severities  # which has many patterns: only for who asks

    fields = {
        "SYSLOG_IDENTIFIER": origin.program,
        "PROCMAN_PROGRAM": origin.program,
        "PROCMAN_INSTANCE": str(origin.instance),
        "PROCMAN_PROCESS": origin.process,
        "PROCMAN_STREAM": origin.stream,
    }
    about = "".join(f"{name}={value}\n" for name, value in fields.items()).encode()
    severities = Severities(error=apart and origin.stream == "stderr")

    def dress(lines: bytes, partial: bool, wall: float) -> list[Piece]:
        pieces = []
        for line in each(lines):
            number, message = severities.of(line.removesuffix(b"\n"), wall, partial=partial)
            rest = b"PROCMAN_PARTIAL=1\n" if partial else b""
            # A length instead of "=": so the message may hold anything.
            data = b"PRIORITY=%d\n%b%bMESSAGE\n%b%b\n" % (number, about, rest, struct.pack("<Q", len(message)), message)
            pieces.append(Piece(data, line))
        return pieces

    return dress


def send_large(sock: socket.socket, data: bytes) -> None:
    """Sends an entry as a memory file. Raises OSError."""
    fd = os.memfd_create("procman-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        sock.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    finally:
        os.close(fd)

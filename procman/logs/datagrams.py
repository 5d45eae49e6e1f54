"""A socket as a place for messages (syslog, the journal): one piece each, never blocking.

Messages are datagrams. Some syslog daemons have a stream socket at /dev/log (unix-stream of syslog-ng): there a NUL
ends each, as syslog(3) does it.

Whoever reads there may be slow, be restarted, or not be there. Knows nothing of what the messages say.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence

from procman.logs.lines import Piece
from procman.logs.logfile import describe
from procman.logs.outlet import Settled

FULL = {errno.EAGAIN, errno.ENOBUFS}
"""The reader has not come so far yet."""


class Datagrams:
    """Sends pieces to the socket at `address`: "unix:/path", or "udp:HOST:PORT" with an IP address, from which nobody
    hears whether anything arrives. `large` sends what is too large for one datagram; `streams`: the socket at a path
    may be a stream socket, too.

    As `outlet.Outlet`: `fd` is -1 while there is no connection. An error may pass: a daemon that is restarted makes its
    socket anew. So it `mends`.
    """

    mends = True
    coloured = False

    def __init__(
        self, address: str, large: Callable[[socket.socket, bytes], None] | None = None, *, streams: bool = False
    ) -> None:
        kind, _, self._place = address.partition(":")
        self._family = socket.AF_UNIX
        self._peer: str | tuple[str, int] = self._place
        if kind == "udp":
            host, _, port = self._place.rpartition(":")
            self._family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            self._peer = host.strip("[]"), int(port)
        self._large = large
        self._streams = streams
        self._sent = 0  # bytes of the first piece that a stream has taken
        self._socket: socket.socket | None = None
        self._pieces: deque[Piece] = deque()
        self.connections = 0
        self.error = ""

    @property
    def fd(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """True while it has pieces that could not be sent yet."""
        return bool(self._pieces)

    def queue(self, pieces: Sequence[Piece]) -> None:
        """Adds pieces; `push` sends them."""
        self._pieces.extend(pieces)

    def push(self, settled: Settled) -> None:
        """Sends what can be sent now. Each message is settled before the next one."""
        self.error = ""
        again = True
        while self._pieces:
            piece = self._pieces[0]
            try:
                if not self._send(piece.data):
                    settled(0, 0)  # it moves
                    break
            except OSError as error:
                if error.errno in FULL:
                    break
                had_one = self._socket is not None
                self.close()
                if had_one and again:  # it was restarted since the last message, perhaps
                    again = False
                    continue
                self.error = f"{self._place}: {describe(error)}"
                break
            self._pieces.popleft()
            settled(len(piece.source), piece.reports)

    def discard(self) -> int:
        """Forgets what could not be sent; returns how many of its bytes were a program's own."""
        lost = sum(len(piece.source) for piece in self._pieces)
        self._pieces.clear()
        if self._sent:  # what comes next would be the rest of a message that nobody gets whole
            self.close()
        return lost

    def close(self) -> None:
        """Closes the socket; the next `push` opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._sent = 0

    def _send(self, data: bytes) -> bool:
        """False where a stream has taken a part of it."""
        sock = self._socket = self._socket or self._connect()
        if sock.type == socket.SOCK_STREAM:
            message = data.replace(b"\0", b" ") + b"\0"
            self._sent += self._deliver(sock, message[self._sent :])
            if self._sent < len(message):
                return False
            self._sent = 0
            return True
        try:
            self._deliver(sock, data)
        except OSError as error:
            if error.errno != errno.EMSGSIZE or self._large is None:
                raise
            self._large(sock, data)
        return True

    def _deliver(self, sock: socket.socket, data: bytes) -> int:
        return sock.send(data)

    def _connect(self) -> socket.socket:
        try:
            made = self._connect_as(socket.SOCK_DGRAM)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE or not self._streams:
                raise
            made = self._connect_as(socket.SOCK_STREAM)
        self.connections += 1
        return made

    def _connect_as(self, kind: socket.SocketKind) -> socket.socket:
        made = socket.socket(self._family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.connect(self._peer)
        except OSError:
            made.close()
            raise
        return made

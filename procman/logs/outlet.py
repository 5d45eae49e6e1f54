"""The daemon's stdout, or stderr, as a place for lines of programs (`log.mode = "inherit"`).

It belongs to someone else: it may be a terminal that is stopped, a pipe that nobody reads, a socket whose reader is
gone, and its O_NONBLOCK flag is shared with every process that has it open. So it is never changed, and never written
to when that could block. Knows nothing of pipes, counters and files.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections import deque
from collections.abc import Callable, Sequence

from procman.logs.lines import Piece

SAFE_WRITE = 4096  # PIPE_BUF: a pipe that poll(2) calls writable takes this much at once (pipe(7))


Settled = Callable[[int, int], None]
"""Called when bytes have gone out: (how many of a program's own, how many dropped ones are told of)."""


class Outlet:
    """Prints pieces to `fd` without ever blocking; `fd` stays the caller's and stays open.

    `error` says why no more can be printed: the other end is gone, or the disk is full; else it is "". `mends` tells
    whether that may pass while one waits a little. `connections` counts the descriptors that `fd` has been.
    """

    mends = False

    def __init__(self, fd: int) -> None:
        self.connections = 0
        self._open(fd)
        self._pieces: deque[Piece] = deque()
        self._sent = 0  # bytes of the first piece that went out already
        self._own = 0  # and how many of a program's own that are
        self._mid_line = False
        self.error = ""

    def redirect(self, fd: int) -> None:
        """Goes on with another `fd`, which stays the caller's too. What could not be printed yet goes there."""
        before = self.fd
        self._open(fd)
        os.close(before)
        self._mid_line = False

    @property
    def terminal(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.fd)

    @property
    def coloured(self) -> bool:
        """Whether it is a terminal that shows colours (no-color.org)."""
        return self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    @property
    def waiting(self) -> bool:
        """True while it has pieces that could not be printed yet."""
        return bool(self._pieces)

    def queue(self, pieces: Sequence[Piece]) -> None:
        """Adds pieces; `push` prints them."""
        if self._mid_line and pieces and not self._pieces:
            self._pieces.append(Piece(b"\n"))
        self._pieces.extend(pieces)

    def push(self, settled: Settled) -> None:
        """Prints what can be printed now, lines that fit into SAFE_WRITE bytes at a time: a pipe takes them all or not
        at all. Each write(2) is settled before the next one."""
        self.error = ""
        while self._pieces:
            try:
                sent = self._write(self._chunk())
            except BlockingIOError:
                break
            except OSError as error:
                self.error = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
                break
            if not sent:
                break
            self._settle(sent, settled)

    def discard(self) -> int:
        """Forgets what could not be printed; returns how many of its bytes were a program's own."""
        lost = sum(len(piece.source) for piece in self._pieces) - self._own
        self._pieces.clear()
        self._sent = self._own = 0
        return lost

    def close(self) -> None:
        """Closes what this object opened, not the caller's descriptor."""
        os.close(self.fd)

    def _open(self, fd: int) -> None:
        self.fd, self._exclusive = _own_description(fd)
        self.connections += 1
        self._regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLOUT)

    def _settle(self, sent: int, settled: Settled) -> None:
        """`sent` more bytes of the first piece are out."""
        piece = self._pieces[0]
        own = piece.own_in(self._sent, sent, self._own)
        self._sent += sent
        self._own += own
        self._mid_line = piece.data[self._sent - 1] != ord("\n")
        told = 0
        if self._sent == len(piece.data):
            self._pieces.popleft()
            self._sent = self._own = 0
            told = piece.reports
        settled(own, told)

    def _chunk(self) -> bytes:
        data = self._pieces[0].data
        most = self._sent + SAFE_WRITE
        return data[self._sent : data.rfind(b"\n", self._sent, most) + 1 or most]

    def _write(self, data: bytes) -> int:
        if not self._exclusive and not self._regular and not self._poll.poll(0):
            return 0
        return os.write(self.fd, data)


def _own_description(fd: int) -> tuple[int, bool]:
    """A descriptor for the same pipe or terminal whose O_NONBLOCK is ours alone, where the kernel lets us open it again
    (proc(5), /proc/PID/fd); else a duplicate of `fd`."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:  # the daemon was started without a stdout
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), True
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open(f"/proc/self/fd/{fd}", flags), True
        except OSError:  # opened by another user before we gave up root, or no /proc: done with more care then
            pass
    return os.dup(fd), False

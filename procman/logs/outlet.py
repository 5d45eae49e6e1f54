"""The daemon's stdout as a place for lines of programs (`log.mode = "inherit"`).

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
from typing import NamedTuple

LINE_LIMIT = 64 * 1024  # the most that is held until its line is complete
SAFE_WRITE = 4096  # PIPE_BUF: a pipe that poll(2) calls writable takes this much at once (pipe(7))


class Piece(NamedTuple):
    """Bytes to print. `own` bytes from offset `start` are the program's; `reports` dropped bytes are told of."""

    data: bytes
    start: int = 0
    own: int = 0
    reports: int = 0

    def own_in(self, sent: int) -> int:
        """How many of the first `sent` bytes are the program's own."""
        return max(0, min(sent - self.start, self.own))


class Lines:
    """Cuts a program's output into lines with its name before each. `split` counts lines that were too long to hold."""

    def __init__(self, process: str) -> None:
        self.split = 0
        self._prefix = f"{process} | ".encode()
        self._held = b""

    @property
    def held(self) -> int:
        """Bytes of the line that has no end yet."""
        return len(self._held)

    def feed(self, data: bytes) -> list[Piece]:
        """The complete lines, now that `data` has come."""
        *lines, self._held = (self._held + data).split(b"\n")
        pieces = [self._piece(line) for line in lines]
        while len(self._held) >= LINE_LIMIT:
            pieces.append(self._piece(self._held[:LINE_LIMIT], added=1))
            self._held = self._held[LINE_LIMIT:]
            self.split += 1
        return pieces

    def close(self) -> list[Piece]:
        """The line without an end: no more of it will come."""
        line, self._held = self._held, b""
        return [self._piece(line, added=1)] if line else []

    def discard(self) -> int:
        """Forgets the line without an end; returns its length."""
        lost, self._held = len(self._held), b""
        return lost

    def marker(self, text: str, reports: int) -> Piece:
        """A line of procman's own, which tells of so many dropped bytes."""
        return Piece(self._prefix + text.encode() + b"\n", reports=reports)

    def _piece(self, line: bytes, added: int = 0) -> Piece:
        return Piece(self._prefix + line + b"\n", len(self._prefix), len(line) + 1 - added)


class Outlet:
    """Prints pieces to `fd` without ever blocking; `fd` stays the caller's and stays open."""

    def __init__(self, fd: int) -> None:
        self._open(fd)
        self._pieces: deque[Piece] = deque()
        self._sent = 0  # bytes of the first piece that went out already
        self._mid_line = False
        self.error = ""

    def redirect(self, fd: int) -> None:
        """Goes on with another `fd`, which stays the caller's too. Pieces that could not be printed yet go there."""
        before = self.fd
        self._open(fd)
        os.close(before)
        self._mid_line = False

    @property
    def waiting(self) -> bool:
        """True while it has pieces that could not be printed yet."""
        return bool(self._pieces)

    def queue(self, pieces: list[Piece]) -> None:
        """Adds pieces; `push` prints them."""
        if self._mid_line and pieces and not self._pieces:
            self._pieces.append(Piece(b"\n"))
        self._pieces.extend(pieces)

    def push(self) -> tuple[int, int]:
        """Prints what can be printed now; returns (the program's own bytes, dropped bytes told of) that went out.
        `error` says why no more can be: the other end is gone, or the disk is full; else it is ""."""
        own = told = 0
        self.error = ""
        while self._pieces:
            data = b"".join(piece.data for piece in self._pieces)[self._sent :]
            try:
                sent = self._write(data)
            except BlockingIOError:
                break
            except OSError as error:
                self.error = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
                break
            if not sent:
                break
            self._mid_line = data[sent - 1] != ord("\n")
            own_now, told_now = self._settle(sent)
            own += own_now
            told += told_now
        return own, told

    def discard(self) -> int:
        """Forgets what could not be printed; returns how many of its bytes were the program's own."""
        lost = sum(piece.own for piece in self._pieces) - self._first_own()
        self._pieces.clear()
        self._sent = 0
        return lost

    def close(self) -> None:
        """Closes what this object opened, not the caller's descriptor."""
        os.close(self.fd)

    def _open(self, fd: int) -> None:
        self.fd, self._own = _own_description(fd)
        self._regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLOUT)

    def _settle(self, sent: int) -> tuple[int, int]:
        """Takes `sent` more bytes off the queue; returns as `push` does."""
        own = -self._first_own()
        told = 0
        self._sent += sent
        while self._pieces and self._sent >= len(self._pieces[0].data):
            piece = self._pieces.popleft()
            self._sent -= len(piece.data)
            own += piece.own
            told += piece.reports
        return own + self._first_own(), told

    def _first_own(self) -> int:
        return self._pieces[0].own_in(self._sent) if self._pieces else 0

    def _write(self, data: bytes) -> int:
        if not self._own and not self._regular:
            if not self._poll.poll(0):
                return 0
            data = data[:SAFE_WRITE]
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

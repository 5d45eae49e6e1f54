"""Output on its way from the pipe to a reader of lines, in memory that outlives the supervisor: a memory file
(memfd_create(2)) that the keeper holds.

As with a log file of raw output, the file is the only record. splice(2) moves bytes out of the pipe and into the file,
and its size tells how many were taken. The first page says how many of them are *done*: dressed and written.
It is mapped into memory, and each step is one store of eight bytes. So whoever comes after a SIGKILL, at any
instruction, knows what is left: the bytes from `done` to the end, an unfinished line among them.

A log file is written in three steps, so that a line is neither lost nor doubled:

    intend    where in which file how many bytes will be written, and for how much of the output; valid while `done` is
              what it was then
    write     pwrite(2): all of it, a part of it, or nothing
    advance   `done` moves on: one store, which also ends the intent

`settle` finds an intent that is still valid: what was written in part is cut off, and done again; what was written
whole counts.

Offsets only grow, and memory of what is done is given back (fallocate(2), FALLOC_FL_PUNCH_HOLE). When all is done and
enough was done, it begins anew: truncate, then `done` = 0. A `done` beyond the end is a death between these two.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

from procman.crossing import crossing

HEADER = mmap.PAGESIZE
SPOOL_MAX = 1024 * 1024
"""Bytes that wait at most."""

GIVE_BACK = 64 * 1024
"""So much that is done may still take memory."""

ANEW = 1024 * 1024
"""From so many bytes on it begins anew."""

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_DONE, _INTENT, _DEVICE, _INODE, _OFFSET, _LENGTH, _OWN, _USED = range(8)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def make() -> int:
    """A new spool's descriptor. Raises OSError."""
    fd = os.memfd_create("procman-output", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, HEADER)
    except OSError:
        os.close(fd)
        raise
    return fd


class Spool:
    """The bytes that wait in the memory file `fd`, which it owns. Raises OSError or ValueError for one that can't be
    used.

    `seen` bytes of what waits are on their way already; `window` shows those behind them. `fresh`: nobody has used it
    before.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if os.fstat(fd).st_size < HEADER:
            os.ftruncate(fd, HEADER)
        self._map = mmap.mmap(fd, HEADER)
        self._words = memoryview(self._map).cast("Q")
        self._size = self._given_back = self.seen = 0
        self.fresh = not self._words[_USED]
        self._words[_USED] = 1
        self.look()

    def look(self) -> None:
        """Looks again: somebody else has worked with it."""
        self._size = os.fstat(self._fd).st_size - HEADER
        if self._words[_DONE] > self._size:
            self._words[_DONE] = 0
        self._given_back = 0
        self.seen = 0

    @property
    def waiting(self) -> int:
        """Bytes that were taken and are not done."""
        return self._size - int(self._words[_DONE])

    def take(self, pipe: int, most: int) -> int:
        """Takes from `pipe` what waits there, at most `most` bytes and what there is room for. Returns their number, 0
        where nothing waits. Raises OSError when there is no memory."""
        room = min(most, SPOOL_MAX - self.waiting)
        if room <= 0:
            return 0
        try:
            count = os.splice(pipe, self._fd, room, offset_dst=HEADER + self._size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0
        self._size += count
        return count

    def window(self, most: int) -> bytes:
        """The first `most` bytes that wait and are not seen."""
        return os.pread(self._fd, most, HEADER + int(self._words[_DONE]) + self.seen)

    def last(self, count: int) -> bytes:
        """The `count` bytes that were taken last."""
        return os.pread(self._fd, count, HEADER + self._size - count)

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        if not count:
            return
        self._words[_DONE] += count
        self.seen = max(0, self.seen - count)
        self._clear()

    def discard(self) -> int:
        """Forgets all that waits; returns how much that was."""
        count = self.waiting
        self.advance(count)
        self.seen = 0
        return count

    def close(self) -> None:
        """Closes the descriptor. What waits stays in the keeper's copy."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    # --- the way into a file ----------------------------------------------------------------------------------------

    def intend(self, file: int, offset: int, length: int, own: int) -> None:
        """The next `own` bytes will be written as `length` bytes at `offset` of the open file."""
        status, words = os.fstat(file), self._words
        words[_DEVICE], words[_INODE], words[_OFFSET] = status.st_dev, status.st_ino, offset
        words[_LENGTH], words[_OWN] = length, own
        words[_INTENT] = words[_DONE] + 1  # last: from here on it is valid
        crossing("log intend")

    def call_off(self) -> None:
        """What was intended was not written."""
        self._words[_INTENT] = 0

    @property
    def intends(self) -> bool:
        """Whether a predecessor died between intent and success."""
        return bool(self._words[_INTENT] == self._words[_DONE] + 1)

    @property
    def intended(self) -> tuple[int, int]:
        """Device and inode of the file that the intent is about."""
        return self._words[_DEVICE], self._words[_INODE]

    def settle(self, file: int) -> int:
        """Finds out how far the predecessor came in the open `file`, and cuts off what it wrote in part. To be done
        before anything else is written there. Returns how many bytes more are done by that. Raises OSError."""
        if not self.intends:
            return 0
        found, words, status = 0, self._words, os.fstat(file)
        if self.intended == (status.st_dev, status.st_ino):
            if status.st_size >= words[_OFFSET] + words[_LENGTH]:
                found = min(int(words[_OWN]), self.waiting)
                self.advance(found)
            elif status.st_size > words[_OFFSET]:
                os.ftruncate(file, int(words[_OFFSET]))
        self.call_off()
        crossing("log settle")
        return found

    # --- memory -----------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        done = int(self._words[_DONE])
        if done == self._size and done >= ANEW:
            os.ftruncate(self._fd, HEADER)
            crossing("log anew")
            self._words[_DONE] = 0
            self._size = self._given_back = 0
        elif done - self._given_back >= GIVE_BACK:
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            with suppress(OSError):
                _fallocate(self._fd, mode, HEADER + self._given_back, done - self._given_back)
            self._given_back = done - done % HEADER

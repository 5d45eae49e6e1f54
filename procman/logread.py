"""Reading what the log thread has written: the last lines of a log, and following it, across its rotated files.

A log is the bytes of path.N ... path.2, path.1, path, in this order. Nothing is locked: every step of a rotation (see
`procman.logs.logfile`) may happen between any two calls here. What makes that safe:

  * Rotated files only move up (path.1 -> path.2), the highest first. So whoever looks at path, path.1, path.2, ... in
    this order may see a file twice, but misses none that was there when he began, and sees them in their order of age.
  * A file is known by its inode, not by its name. A Follower has it open, so its inode is not given to another.
  * A rotation cuts the partial line off the old file and puts it at the start of the new one. A reader who had read it
    already finds the old file shorter than his offset, and skips as much of the new one.

Knows files only: no pipes, no thread, no programs. Memory is bounded, whatever the size of the files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from procman.errors import Failed
from procman.folders import open_folder, others_may_write

BLOCK = 64 * 1024
TAIL_LIMIT = 16 * 1024 * 1024
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})  # ELOOP: a symlink, which the log thread refuses too
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

ATTEMPTS = 10  # to find the next file while rotations go on

Identity = tuple[int, int]
Entry = tuple[int, str, os.stat_result]
"""A rotated file: its number, path and status."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a log: `offset` in the file that has this device and inode now, under whatever name later. All zero:
    before the first byte of a log that has no file yet."""

    device: int = 0
    inode: int = 0
    offset: int = 0


def tail(path: str, lines: int, keep: int, limit: int = TAIL_LIMIT) -> tuple[bytes, Position]:
    """The last `lines` lines of a log of at most `keep` rotated files, and the position after them, from which a
    Follower goes on. An unfinished last line counts as one. No more than the last `limit` bytes. Raises Failed when the
    log can't be read; a log that has no file yet is empty."""
    blocks: list[bytes] = []
    end: Position | None = None
    room = limit
    for position, block in _blocks_from_the_end(path, keep):
        end = end or position
        start, lines = _start_of_lines(block, lines, last=room == limit)
        start = max(start, len(block) - room)
        room -= len(block) - start
        blocks.append(block[start:])
        if start or not room or lines <= 0:
            break
    return b"".join(reversed(blocks)), end or Position()


def last_lines(path: str, lines: int, keep: int) -> Position:
    """Where the last `lines` lines of a log begin, for a Follower that reads more of them than fit in memory."""
    begin = Position()
    last = True
    for end, block in _blocks_from_the_end(path, keep):
        start, lines = _start_of_lines(block, lines, last)
        begin = Position(end.device, end.inode, end.offset - len(block) + start)
        last = last and not block
        if start or lines <= 0:
            break
    return begin


def _start_of_lines(block: bytes, lines: int, last: bool) -> tuple[int, int]:
    """(where the wanted lines begin in this block, how many newlines are still to be found before it). Begin is 0 when
    they begin further back. `last` is the block at the end of the log, where a newline begins no line."""
    if lines <= 0:
        return len(block), 0
    at = len(block) - 1 if last and block.endswith(b"\n") else len(block)
    while (at := block.rfind(b"\n", 0, at)) >= 0:
        lines -= 1
        if not lines:
            return at + 1, 0
    return 0, lines


def _blocks_from_the_end(path: str, keep: int) -> Iterator[tuple[Position, bytes]]:
    """(position after it, block) of a log, the last one first. An empty file at the end gives an empty block."""
    seen: set[Identity] = set()
    for name in (path, *(f"{path}.{number}" for number in range(1, keep + 1))):
        with _opened(name) as fd:
            if fd is None:
                continue
            status = os.fstat(fd)
            identity = (status.st_dev, status.st_ino)
            if identity in seen:  # a rotation has overtaken us
                continue
            if not status.st_size and not seen:
                yield Position(*identity, 0), b""
            seen.add(identity)
            end = status.st_size
            while end > 0:
                start = max(0, end - BLOCK)
                block = os.pread(fd, end - start, start)
                if len(block) < end - start:  # a rotation has just cut off the partial line
                    end = min(start + len(block), os.fstat(fd).st_size)
                    if not block:
                        continue
                yield Position(*identity, start + len(block)), block
                end = start


@contextmanager
def _opened(path: str) -> Iterator[int | None]:
    fd = _open(path)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _open(path: str) -> int | None:
    """A descriptor for a regular file, None when there is none: or one that somebody could have led us to (`folders`),
    for root reads here on behalf of whoever may see logs."""
    place, name = os.path.split(path)
    try:
        folder = open_folder(place or ".")
        try:
            fd = os.open(name, OPEN_FLAGS, dir_fd=folder)
            linked = others_may_write(os.fstat(folder)) and os.geteuid() == 0
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise Failed(f"can't read {path}: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or (linked and status.st_nlink > 1):
        os.close(fd)
        return None
    return fd


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


class Follower:
    """Reads a log on and on, through rotations, each byte once. `start` None is the beginning of the newest file.

    A truncated file is read again from its start; after a deletion it goes on with the file that comes next; where its
    files were dropped by `keep`, with the oldest one. Never waits: `read` gives b"" at the end, and is called again
    when there is news. To be closed.
    """

    def __init__(self, path: str, start: Position | None = None) -> None:
        self._path = path
        self._offset = 0
        self._older: tuple[int, ...] | None = None
        self._fd = -1
        if start is None:
            self._fd = _open(path) or -1
        else:
            self._fd, self._offset = self._find((start.device, start.inode)), start.offset
        if self._fd >= 0:
            self._remember_older()

    def read(self, max_bytes: int = BLOCK) -> bytes:
        """The next bytes, at most so many; b"" when there are no more now. Raises Failed when the log can't be read."""
        if self._fd < 0:
            oldest = self._open_next(None)
            if oldest is None:
                return b""
            self._fd, self._offset = oldest, 0
            self._remember_older()
        while True:
            data = os.pread(self._fd, max_bytes, self._offset)
            if data or not self._advance():
                self._offset += len(data)
                return data

    @property
    def position(self) -> Position:
        """After the last byte that was read."""
        if self._fd < 0:
            return Position()
        status = os.fstat(self._fd)
        return Position(status.st_dev, status.st_ino, self._offset)

    def close(self) -> None:
        """Closes its file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- which file comes next --------------------------------------------------------------------------------------

    def _find(self, wanted: Identity) -> int:
        """A descriptor for the file, whatever its name is now; -1 when it is gone."""
        for _attempt in range(ATTEMPTS):
            found = [(self._path, _status(self._path))]
            found += [(name, status) for _, name, status in self._rotated()]
            name = next((name for name, status in found if status and _identity(status) == wanted), "")
            fd = _open(name) if name else None
            if fd is not None:
                if _identity(os.fstat(fd)) == wanted:
                    return fd
                os.close(fd)
            elif not name:
                break
        return -1

    def _advance(self) -> bool:
        """At the end of the open file: True when there is more to read after all, here or in a next file."""
        mine = os.fstat(self._fd)
        if self._offset > mine.st_size and os.path.lexists(f"{self._path}.next"):
            return False  # in the middle of a rotation; looked at before the path, which changes later
        current = _status(self._path)
        if current is not None and _identity(current) == _identity(mine):
            if self._offset > mine.st_size:
                self._offset = 0
                return True
            self._remember_older()
            return False
        newer = self._open_next(_identity(mine))
        if newer is None:
            return False
        final = os.fstat(self._fd)
        if final.st_size > self._offset:  # written after our last look, before the rotation
            os.close(newer)
            return True
        os.close(self._fd)
        self._fd = newer
        self._offset -= final.st_size  # what we have read of a partial line that moved along
        self._older = _signature(final)
        return True

    def _open_next(self, mine: Identity | None) -> int | None:
        """The file that follows ours; None when there is none yet."""
        for _attempt in range(ATTEMPTS):
            entry = self._next_rotated(mine)
            fd = _open(entry[1] if entry else self._path)
            if fd is None and entry is None:
                break
            if fd is not None:
                again = self._next_rotated(mine)  # what was rotated before we opened it is seen now
                if (_identity(again[2]) if again else None) == (_identity(os.fstat(fd)) if entry else None):
                    return fd
                os.close(fd)
        return None

    def _next_rotated(self, mine: Identity | None) -> Entry | None:
        """The rotated file that follows ours; None when that is the newest file. The oldest one when we have none."""
        rotated = list(self._rotated())
        place = next((number for number, _, status in rotated if _identity(status) == mine), None)
        if place is None:  # dropped by `keep`, or deleted: then the file just older than ours shows the place
            place = next((number for number, _, status in rotated if _signature(status) == self._older), None)
        newer = [entry for entry in rotated if place is None or entry[0] < place]
        return newer[-1] if newer else None

    def _remember_older(self) -> None:
        """Notes the file just older than ours, to know our place should ours be deleted."""
        first = _status(f"{self._path}.1")
        if first is not None and _signature(first) == self._older:
            return
        mine = _identity(os.fstat(self._fd))
        rotated = [status for _, _, status in self._rotated()]
        place = next((index for index, status in enumerate(rotated) if _identity(status) == mine), -1)
        self._older = next((_signature(status) for status in rotated[place + 1 :]), None)

    def _rotated(self) -> Iterator[Entry]:
        """The rotated files, the newest first. Each number is asked for in turn: a list of names is no snapshot."""
        folder, name = os.path.split(self._path)
        pattern = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,3})")
        try:
            numbers = [int(match[1]) for entry in os.listdir(folder or ".") if (match := pattern.fullmatch(entry))]
        except OSError:
            return
        for number in range(1, max(numbers, default=0) + 3):  # two more rotations may come meanwhile
            status = _status(f"{self._path}.{number}")
            if status is not None:
                yield number, f"{self._path}.{number}", status


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _signature(status: os.stat_result) -> tuple[int, ...]:
    """Tells a rotated file from a later one that got its inode: it never changes again."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

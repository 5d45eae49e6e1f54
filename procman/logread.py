"""Reading what the log thread has written: the last lines of a log, and following it, across its rotated files.

A log is the bytes of path.N ... path.2, path.1, path, in this order; each but the last may be compressed, path.2.gz,
and then counts as what it holds. Before them come files that another program has rotated and called by their date,
path-20300131. Nothing is locked: every step of a rotation (see `procman.logs.logfile`) may happen
between any two calls here. What makes that safe:

  * Rotated files only move up (path.1 -> path.2), the highest first. So whoever looks at path, path.1, path.2, ... in
    this order may see a file twice, but misses none that was there when he began, and sees them in their order of age.
  * A file is known by its inode, not by its name. A Follower has it open, so its inode is not given to another.
  * A rotation cuts the partial line off the old file and puts it at the start of the new one. A reader who had read it
    already finds the old file shorter than his offset, and skips as much of the new one.
  * A compressed file keeps the time of its last change: so whoever has read path.1 knows it again in path.1.gz. Several
    files may have one time, so what it holds must have the same size and the same beginning, too.
  * The inode of a file that was removed is given to the next one. So a place that is told to somebody, who may come
    back with it any time later, knows the first lines of its file.
  * What somebody is reading stays open (`Held`), so neither compression nor `keep` takes it away from him.

Knows files only: no pipes, no thread, no programs. Memory is bounded, whatever the size of the files.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from procman import rpc
from procman.errors import Failed
from procman.folders import open_folder, others_may_write
from procman.records import dataclass
from procman.unzip import Unzipped

BLOCK = 64 * 1024
TAIL_LIMIT = 16 * 1024 * 1024
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})  # ELOOP: a symlink, which the log thread refuses too
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

ZIPPED = ".gz"
HEAD = 256
"""First bytes of a file by which it is known again."""

GAPS = 10
"""Numbers in a row that no file has, behind which there is none but by accident: only a list of the folder shows it."""

TICK = 20_000_000
"""Nanoseconds in which the clock of a file system surely moves on, unless it counts whole seconds."""

ATTEMPTS = 10  # to find the next file while rotations go on

Identity = tuple[int, int]
Entry = tuple[int, str, os.stat_result]
"""A rotated file: its number, path and status."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a log: `offset` in what the file holds that has this device and inode now, under whatever name later.
    `head` is the `rpc.mark` of its beginning. All zero: before the first byte of a log that has no file yet."""

    device: int = 0
    inode: int = 0
    offset: int = 0
    head: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, file: str, offset: int) -> Position:
        """In the file of this `rpc.file_id`. Raises ValueError."""
        return cls(*rpc.file_of(file), offset, rpc.head_of(file))

    @property
    def file(self) -> str:
        """What names its file (`rpc.file_id`)."""
        return rpc.file_name(self.device, self.inode, self.head)


@dataclass(frozen=True, slots=True)
class LogFile:
    """A file of a log as it is now. `size` and `head`, the bytes by which it is known again, are of the file itself,
    compressed or not; `holds` is the size of what it holds, of a compressed one modulo 2**32; `modified` is in seconds
    since the epoch."""

    path: str
    device: int
    inode: int
    size: int
    modified: float
    head: bytes
    holds: int

    @property
    def id(self) -> str:
        """What names it from now on (`rpc.file_id`)."""
        return rpc.file_id(self.device, self.inode, self.head)

    @property
    def zipped(self) -> bool:
        """Whether it is compressed."""
        return self.path.endswith(ZIPPED)


class Held:
    """Files of logs that stay open from when they are listed: what was there then can be read, whatever rotates since.

    No more than `room` of them: of each log the newest, which changes most, and the oldest, which go first. One thread
    at a time may use it, and any may close it.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self._open: dict[str, _Descriptor] = {}

    def __len__(self) -> int:
        return len(self._open)

    def files(self, paths: Sequence[str]) -> list[list[LogFile]]:
        """As `files`, for several logs; holds these from now on, not those before."""
        self._open = {}
        found: list[list[LogFile]] = []
        folders = _Folders()
        for number, path in enumerate(paths):
            room, mine = (self.room - len(self._open)) // (len(paths) - number), dict[str, _Descriptor]()
            found.append([])
            for file, fd in _from_the_newest(path, folders):
                found[-1].append(file)
                with suppress(OSError):  # no descriptor is left: it can be read as long as it is there
                    mine[file.id] = _Descriptor(fd)
                if len(mine) > room:
                    del mine[list(mine)[min(1, room)]]
            found[-1].reverse()
            self._open |= mine
        return found

    def read(self, path: str, wanted: str, offset: int, size: int) -> bytes | None:
        """As `read`; a file that is held need not be there any more."""
        file = self._open.get(wanted)
        if file is not None:
            return os.pread(file.fd, size, offset)
        return read(path, wanted, offset, size)

    def close(self) -> None:
        """Holds none any more. A file that is being read this moment is closed after that."""
        self._open = {}


class _Descriptor:
    """A copy of one, closed when nobody refers to it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = -1
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def files(path: str) -> list[LogFile]:
    """The files of a log, the oldest first. Raises Failed when they can't be read."""
    return [file for file, _ in _from_the_newest(path, _Folders())][::-1]


def _from_the_newest(path: str, folders: _Folders) -> Iterator[tuple[LogFile, int]]:
    """The files of a log, each with a descriptor that is closed when the next one is asked for."""
    seen = _Seen()
    for name in _names(path, folders):
        with _opened(name) as file:
            if file is not None and seen.new(file):
                status, head = os.fstat(file.fd), file.head
                stands = status.st_dev, status.st_ino, status.st_size, status.st_mtime
                yield LogFile(name, *stands, head, file.told_size if file.zipped else status.st_size), file.fd


def read(path: str, wanted: str, offset: int, size: int) -> bytes | None:
    """Bytes of one file of a log (LogFile.id) as they are on disk, at most `size`; None when it has gone. Raises
    Failed."""
    identity, head = rpc.file_of(wanted), rpc.head_of(wanted)
    for name in _names(path, _Folders()):
        status = _status(name)
        if status is None or _identity(status) != identity:
            continue
        with _opened(name) as file:
            if file is not None and _identity(os.fstat(file.fd)) == identity:
                return os.pread(file.fd, size, offset) if file.begins(head) else None
    return None


class _Folders:
    """What is in folders beside logs. Each is listed once for many logs, as long as nothing changes there. With `only`
    it remembers what is beside one of that name."""

    _ROTATED = re.compile(r"(?:\.([1-9][0-9]{0,3})|([-.][0-9]{4}-?[0-9]{2}-?[0-9]{2}(?:[-_T]?[0-9]{2,6})?))(?:\.gz)?\Z")

    def __init__(self, only: str = "") -> None:
        self._only = only
        self._listed: dict[str, tuple[int, dict[str, tuple[int, set[str]]]]] = {}

    def rotated(self, path: str) -> tuple[int, list[str]]:
        """The highest number of a rotated file; and the ends of the names of those that are called by their date, the
        newest first."""
        folder, name = os.path.split(path)
        highest, dates = self._names(folder or ".").get(name, (0, set[str]()))
        return highest, sorted(dates, key=lambda date: re.sub("[^0-9]", "", date), reverse=True)

    def _names(self, folder: str) -> dict[str, tuple[int, set[str]]]:
        listed, names = self._listed.get(folder, (-1, {}))
        try:
            changed = os.stat(folder).st_mtime_ns
            if changed != listed:
                tick = TICK if changed % 1_000_000_000 else 2_000_000_000
                settled = time.time_ns() - changed > tick  # else it may change without another time
                names = self._sorted(os.listdir(folder))
                self._listed[folder] = changed if settled else -1, names
        except OSError:  # it may be used, but not listed
            return {}
        return names

    def _sorted(self, names: Sequence[str]) -> dict[str, tuple[int, set[str]]]:
        found: dict[str, tuple[int, set[str]]] = {}
        for match in filter(None, map(self._ROTATED.search, names)):
            name = match.string[: match.start()]
            if self._only not in ("", name):
                continue
            highest, dates = found.get(name) or (0, set[str]())
            if match[2]:
                dates.add(match[2])
            found[name] = max(highest, int(match[1] or 0)), dates
        return found


def _names(path: str, folders: _Folders) -> Iterator[str]:
    """The names that files of a log have, the newest first. Whoever opens each before he asks for the next one misses
    none."""
    yield path
    for _, name, _ in _rotated(path, folders):
        yield name


def _rotated(path: str, folders: _Folders | None = None) -> Iterator[Entry]:
    """The rotated files, the newest first; those behind GAPS, and those that are called by a date, with `folders` only.
    Each name is asked for in turn: a list of names is no snapshot."""
    highest, dates = folders.rotated(path) if folders is not None else (0, [])
    numbered = _numbered(path, highest)
    if not dates:
        yield from numbered
        return
    youngest = next(numbered, None)
    modified = max((status.st_mtime_ns for _, _, status in _forms(0, path + dates[0])), default=0)
    later = youngest is not None and youngest[2].st_mtime_ns > modified  # the dates are what was used before
    if youngest is not None and later:
        yield from itertools.chain([youngest], numbered)
    for place, date in enumerate(dates):
        yield from _forms(place + (1_000_000 if later else -len(dates)), path + date)
    if youngest is not None and not later:
        yield from itertools.chain([youngest], numbered)


def _numbered(path: str, highest: int) -> Iterator[Entry]:
    number = 0
    while number < highest + GAPS:
        number += 1
        for entry in _forms(number, f"{path}.{number}"):
            highest = max(highest, number)
            yield entry


def _forms(number: int, name: str) -> Iterator[Entry]:
    """A rotated file as it is, and compressed: for an instant it is both."""
    for path in (name, name + ZIPPED):
        if (status := _status(path)) is not None:
            yield number, path, status


class _File:
    """An open file of a log: `pread` and `size` are of what it holds."""

    def __init__(self, fd: int, *, zipped: bool) -> None:
        self.fd = fd
        self.zipped = zipped
        self._unzipped = Unzipped(lambda size, offset: os.pread(fd, size, offset)) if zipped else None

    def pread(self, size: int, offset: int) -> bytes:
        return self._unzipped.pread(size, offset) if self._unzipped else os.pread(self.fd, size, offset)

    @property
    def size(self) -> int:
        return self._unzipped.size if self._unzipped else os.fstat(self.fd).st_size

    @property
    def head(self) -> bytes:
        """Bytes by which the file itself is known again: whole lines, for a rotation takes an unfinished one away."""
        head = os.pread(self.fd, HEAD, 0)
        end = len(head) if self.zipped or (len(head) == HEAD and b"\n" not in head) else head.rfind(b"\n") + 1
        return head[:end]

    def begins(self, head: tuple[int, int]) -> bool:
        """Whether the file itself begins with these bytes (`rpc.mark`)."""
        return rpc.mark(os.pread(self.fd, head[0], 0)) == head

    def holds(self, head: tuple[int, int]) -> bool:
        """Whether what it holds begins with these bytes."""
        return rpc.mark(self.pread(head[0], 0)) == head

    @property
    def told_size(self) -> int:
        """The size of what it holds, modulo 2**32, as its end tells it (RFC 1952: ISIZE): the rest is not read."""
        status = os.fstat(self.fd)
        if not self.zipped:
            return status.st_size & 0xFFFFFFFF
        return int.from_bytes(os.pread(self.fd, 4, max(0, status.st_size - 4)), "little")

    def position(self, offset: int) -> Position:
        status = os.fstat(self.fd)
        return Position(status.st_dev, status.st_ino, offset, rpc.mark(self.head))


@dataclass(frozen=True, slots=True)
class _Known:
    """What a file is known by later: itself, or, if it is not `zipped` yet, what it was compressed to."""

    identity: Identity
    size: int
    modified: int
    zipped: bool
    head: tuple[int, int] = (0, 0)

    def is_(self, status: os.stat_result) -> bool:
        """Whether this is the same file, which has not changed since."""
        return (_identity(status), status.st_size, status.st_mtime_ns) == (self.identity, self.size, self.modified)

    def place(self, rotated: Sequence[Entry], *, changed: bool = False) -> int | None:
        """Its number among the rotated files. `changed`: it may have grown or shrunk since."""
        for number, _, status in rotated:
            if self.is_(status) or (changed and _identity(status) == self.identity):
                return number
        if self.zipped:
            return None
        # The oldest one that may be it: a line that comes twice is better than one that does not come.
        return max((number for number, path, status in rotated if self._is_in(path, status)), default=None)

    def _is_in(self, path: str, status: os.stat_result) -> bool:
        if not path.endswith(ZIPPED) or status.st_mtime_ns != self.modified:
            return False
        with _opened(path) as file:
            return file is not None and file.told_size == self.size & 0xFFFFFFFF and file.holds(self.head)


class _Seen:
    """The files of a log that were looked at, the newest first: a rotation that overtakes us shows one again, under a
    higher number, and compression shows it as another file of the same time and size, which begins as it did."""

    def __init__(self) -> None:
        self._identities: set[Identity] = set()
        self._contents: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def new(self, file: _File) -> bool:
        """Whether it is another one than all before."""
        status = os.fstat(file.fd)
        if _identity(status) in self._identities:
            return False
        self._identities.add(_identity(status))
        content = status.st_mtime_ns, file.told_size
        if file.zipped:
            return not any(file.holds(head) for head in self._contents.get(content, ()))
        self._contents.setdefault(content, []).append(rpc.mark(file.head))
        return True


def tail(path: str, lines: int, limit: int = TAIL_LIMIT) -> tuple[bytes, Position]:
    """The last `lines` lines of a log, and the position after them, from which a Follower goes on. An unfinished last
    line counts as one. No more than the last `limit` bytes. Raises Failed when the log can't be read; a log that has no
    file yet is empty."""
    blocks: list[bytes] = []
    end: Position | None = None
    room = limit
    for position, block in _blocks_from_the_end(path):
        end = end or position
        start, lines = _start_of_lines(block, lines, last=room == limit)
        start = max(start, len(block) - room)
        room -= len(block) - start
        blocks.append(block[start:])
        if start or not room or lines <= 0:
            break
    return b"".join(reversed(blocks)), end or Position()


def last_lines(path: str, lines: int) -> Position:
    """Where the last `lines` lines of a log begin, for a Follower that reads more of them than fit in memory."""
    begin = Position()
    last = True
    for end, block in _blocks_from_the_end(path):
        start, lines = _start_of_lines(block, lines, last)
        begin = replace(end, offset=end.offset - len(block) + start)
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


def _blocks_from_the_end(path: str) -> Iterator[tuple[Position, bytes]]:
    """(position after it, block) of a log, the last one first. An empty file at the end gives an empty block."""
    seen = _Seen()
    first = True
    for name in _names(path, _Folders()):
        with _opened(name) as file:
            if file is None or not seen.new(file):
                continue
            end = file.size
            if not end and first:
                yield file.position(0), b""
            first = False
            while end > 0:
                start = max(0, end - BLOCK)
                block = file.pread(end - start, start)
                if len(block) < end - start:  # a rotation has just cut off the partial line
                    end = min(start + len(block), file.size)
                    if not block:
                        continue
                yield file.position(start + len(block)), block
                end = start


@contextmanager
def _opened(path: str) -> Iterator[_File | None]:
    file = _open_file(path)
    try:
        yield file
    finally:
        if file is not None:
            os.close(file.fd)


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


def refusal(path: str) -> str:
    """Why what stands at the path of a log is not read; "" where nothing stands there, or where it is read."""
    status = _status(path)
    if status is None:
        return ""
    if stat.S_ISREG(status.st_mode):
        with _opened(path) as file:
            return "" if file is not None else f"{path} is not read: another user could have led procman to it"
    kind = "a symlink, which is not followed" if stat.S_ISLNK(status.st_mode) else "no regular file"
    return f"{path} is not read: it is {kind}"


def _open_file(path: str) -> _File | None:
    """See `_open`."""
    fd = _open(path)
    return None if fd is None else _File(fd, zipped=path.endswith(ZIPPED))


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
        self._older: _Known | None = None
        self._was_newest = False  # our file, when we began to read it
        self._folders = _Folders(os.path.basename(path))
        self._file: _File | None = None
        file = _open_file(path) if start is None else self._find(start)
        if file is not None:
            self._offset = start.offset if start is not None else 0
            self._enter(file)
            self._remember_older(file)

    def read(self, max_bytes: int = BLOCK) -> bytes:
        """The next bytes, at most so many; b"" when there are no more now. Raises Failed when the log can't be read."""
        if self._file is None:
            file = self._open_next(None)
            if file is None:
                return b""
            self._enter(file)
            self._remember_older(file)
        while True:
            assert self._file is not None
            data = self._file.pread(max_bytes, self._offset)
            if data or not self._advance():
                self._offset += len(data)
                return data

    @property
    def position(self) -> Position:
        """After the last byte that was read."""
        if self._file is None:
            return Position()
        return self._file.position(self._offset)

    def close(self) -> None:
        """Closes its file."""
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None

    def _enter(self, file: _File) -> None:
        current = _status(self._path)
        self._file = file
        self._was_newest = current is not None and _identity(current) == _identity(os.fstat(file.fd))

    # --- which file comes next --------------------------------------------------------------------------------------

    def _find(self, start: Position) -> _File | None:
        """The file of a place, whatever its name is now, or what it was compressed to; None when it is gone."""
        same = self._find_inode((start.device, start.inode))
        if same is not None and same.begins(start.head):
            return same
        found = self._find_compressed(start.head) if start.head[0] else None
        if same is not None:
            current = _status(self._path)
            newest = current is not None and _identity(current) == _identity(os.fstat(same.fd))
            if found is None and newest and same.size < start.offset:
                return same  # it was truncated
            os.close(same.fd)
        return found

    def _find_compressed(self, head: tuple[int, int]) -> _File | None:
        """The rotated file that holds what begins so. The oldest one, if there are several: a line that comes twice is
        better than one that does not come."""
        found: _File | None = None
        for _, path, _ in _rotated(self._path, self._folders):
            file = _open_file(path) if path.endswith(ZIPPED) else None
            if file is not None and file.holds(head):
                file, found = found, file
            if file is not None:
                os.close(file.fd)
        return found

    def _find_inode(self, wanted: Identity) -> _File | None:
        for _attempt in range(ATTEMPTS if any(wanted) else 0):
            names = ((name, _status(name)) for name in _names(self._path, self._folders))
            name = next((name for name, status in names if status and _identity(status) == wanted), "")
            file = _open_file(name) if name else None
            if file is not None:
                if _identity(os.fstat(file.fd)) == wanted:
                    return file
                os.close(file.fd)
            elif not name:
                break
        return None

    def _advance(self) -> bool:
        """At the end of the open file: True when there is more to read after all, here or in a next file."""
        file = self._file
        assert file is not None
        mine, end = os.fstat(file.fd), file.size
        if self._offset > end and os.path.lexists(f"{self._path}.next"):
            return False  # in the middle of a rotation; looked at before the path, which changes later
        current = _status(self._path)
        if current is not None and _identity(current) == _identity(mine):
            if self._offset > end:
                self._offset = 0
                return True
            self._remember_older(file)
            return False
        newer = self._open_next(file)
        if newer is None:
            return False
        end = file.size
        if end > self._offset:  # written after our last look, before the rotation
            os.close(newer.fd)
            return True
        self._older = _known(file)
        os.close(file.fd)
        self._enter(newer)
        self._offset -= end  # what we have read of a partial line that moved along
        return True

    def _open_next(self, mine: _File | None) -> _File | None:
        """The file that follows ours; None when there is none yet."""
        for _attempt in range(ATTEMPTS):
            entry = self._next_rotated(mine)
            file = _open_file(entry[1] if entry else self._path)
            if file is None and entry is None:
                break
            if file is not None:
                again = self._next_rotated(mine)  # what was rotated before we opened it is seen now
                if (_identity(again[2]) if again else None) == (_identity(os.fstat(file.fd)) if entry else None):
                    return file
                os.close(file.fd)
        return None

    def _next_rotated(self, mine: _File | None) -> Entry | None:
        """The rotated file that follows ours; None when that is the newest file. The oldest one when we have none."""
        rotated = self._rotated(None if mine is None or self._was_newest else self._folders)
        place = None
        if mine is not None:
            place = _known(mine).place(rotated, changed=True)
        if place is None and self._older:  # dropped by `keep`, or deleted: the one just older than ours shows the place
            place = self._older.place(rotated)
        newer = [entry for entry in rotated if place is None or entry[0] < place]
        return newer[-1] if newer else None

    def _remember_older(self, mine: _File) -> None:
        """Notes the file just older than ours, to know our place should ours be deleted."""
        first = _status(f"{self._path}.1") or _status(f"{self._path}.1{ZIPPED}")
        if first is not None and self._older is not None and self._older.is_(first):
            return
        identity = _identity(os.fstat(mine.fd))
        rotated = self._rotated()
        place = next((index for index, entry in enumerate(rotated) if _identity(entry[2]) == identity), -1)
        self._older = _known_as(rotated[place + 1]) if rotated[place + 1 :] else None

    def _rotated(self, folders: _Folders | None = None) -> list[Entry]:
        """The rotated files, the newest first, each once. Without `folders` those that are easily found: in the whole
        folder there may be thousands of logs, and as many who follow them."""
        found: dict[int, Entry] = {}
        for entry in _rotated(self._path, folders):
            found.setdefault(entry[0], entry)
        return list(found.values())


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _known(file: _File) -> _Known:
    status = os.fstat(file.fd)
    return _Known(_identity(status), status.st_size, status.st_mtime_ns, file.zipped, rpc.mark(file.head))


def _known_as(entry: Entry) -> _Known:
    """A rotated file, by its name and status: should another one have its name by now, without its beginning."""
    _, path, status = entry
    with _opened(path) as file:
        if file is not None and _identity(os.fstat(file.fd)) == _identity(status):
            return _known(file)
    return _Known(_identity(status), status.st_size, status.st_mtime_ns, path.endswith(ZIPPED))

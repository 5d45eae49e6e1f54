"""The rotated files of one log, in its folder: shifted, dropped, and replaced by what was compressed.

Number N is `NAME.N`, or `NAME.N.gz` once it is compressed; 1 is the newest. All names are changed by one thread, that
of the log, and each change is one system call:

    shift      NAME.2 -> NAME.3, NAME.1 -> NAME.2   highest first, up to the first gap; without one the oldest goes
    compress   NAME.gz.partial is written by another process, through descriptors: it needs no name, so a shift
               meanwhile does no harm. When it is complete and on the disk (fsync(2)), it gets the times of NAME.N,
               whatever N is by then, and
    name       NAME.gz.partial -> NAME.N.gz         from here on the file is there twice
    remove     NAME.N                               from here on once

A death at any step leaves a NAME.gz.partial, which the next one removes and makes again, or both NAME.N and NAME.N.gz.
Whoever meets both reads NAME.N, and so looks for NAME.N first. That the one is a copy of the other is seen by their
times and sizes (a gzip file names both, RFC 1952), and then the next compression or shift removes NAME.N. Two files
that are no copies of each other (somebody put them there) stay beside each other, as number N.

Nothing is done here but in the folder that `folder` is a descriptor of. Knows nothing of the log file itself.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator

from procman.crossing import crossing
from procman.folders import others_may_write
from procman.lognames import PACKING, split
from procman.records import dataclass

FORMS = ("", ".gz")
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
TRAILER = 8
"""Bytes at the end of a gzip file: CRC32 and the length of the content modulo 2^32 (RFC 1952)."""

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """A rotated file that is being compressed: from the descriptor `source` to `target`. `status` is that of the
    source, before."""

    source: int
    target: int
    status: os.stat_result

    def close(self) -> None:
        """Closes both."""
        os.close(self.source)
        os.close(self.target)


class Shelf:
    """The rotated files of the log `name` in `folder`, whose descriptor stays the caller's."""

    def __init__(self, folder: int, name: str) -> None:
        self._folder = folder
        self._name = name

    # --- what is there ----------------------------------------------------------------------------------------------

    def status(self, name: str) -> os.stat_result | None:
        """Of the file `name`, None where there is none."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def forms(self, number: int) -> list[str]:
        """The names that number `number` has now: none, one, or for a moment both."""
        names = [f"{self._name}.{number}{form}" for form in FORMS]
        return [name for name in names if self.status(name) is not None]

    def _row(self) -> Iterator[tuple[int, list[str]]]:
        """(number, names) up to the first gap."""
        number = 1
        while names := self.forms(number):
            yield number, names
            number += 1

    # --- changes ----------------------------------------------------------------------------------------------------

    def rename(self, name: str, new: str) -> None:
        """Within the folder; what is there as `new` is replaced."""
        os.rename(name, new, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def unlink(self, name: str) -> None:
        """Raises FileNotFoundError."""
        os.unlink(name, dir_fd=self._folder)

    def drop(self, number: int, written: float | None = None) -> str:
        """Removes number `number`; with `written` only the file that was written last then. Returns the name that it
        had; "" where nothing of it could be removed: a folder of that name is not ours, and stays."""
        gone, names = "", self.forms(number)
        if written is not None:
            found = map(self.status, names)
            if all(status is None or status.st_mtime != written for status in found):
                return ""
        for name in names:
            with contextlib.suppress(OSError):
                self.unlink(name)
                gone = gone or name
        return gone

    def shift(self, keep: int) -> bool:
        """Makes room for number 1. Returns whether a file was dropped for that which was not compressed. Raises
        OSError."""
        gap, plain = 1, False
        while gap <= keep and (names := self.forms(gap)):
            if len(names) == 2:
                self._settle(gap)
            gap += 1
        if gap > keep > 0:
            gap = keep
            for name in self.forms(gap):
                plain = plain or not name.endswith(".gz")
                self.unlink(name)
            crossing("log drop")
        for number in range(gap - 1, 0, -1):
            for name in self.forms(number):
                form = ".gz" if name.endswith(".gz") else ""
                self.rename(name, f"{self._name}.{number + 1}{form}")
                crossing("log shift")
        return plain

    def retire(self, identity: Identity, keep: int) -> None:
        """The log itself becomes number 1, or goes with `keep` 0; only if it is the file of this device and inode. Its
        writers go on with it until they open the new one. Raises OSError."""
        status = self.status(self._name)
        if status is None or _identity(status) != identity:
            return
        if not keep:
            self.unlink(self._name)
            return
        self.shift(keep)
        self.rename(self._name, f"{self._name}.1")

    def prune(self, keep: int) -> None:
        """Removes what an earlier, larger `keep` has left; highest first: a crash leaves no gap that hides the rest."""
        number = max(keep, 0) + 1
        while self.forms(number):
            number += 1
        for extra in range(number - 1, keep, -1):
            self.drop(extra)
            crossing("log prune")

    # --- compression ------------------------------------------------------------------------------------------------

    @property
    def _partial(self) -> str:
        return f"{self._name}{PACKING}"

    def clean(self) -> None:
        """Removes what a compression that came to nothing has left."""
        with contextlib.suppress(FileNotFoundError):
            self.unlink(self._partial)

    def uncompressed(self) -> list[int]:
        """Numbers that are still to be compressed, up to the first gap."""
        return [number for number, names in self._row() if names == [f"{self._name}.{number}"]]

    def begin(self) -> Job | None:
        """The next file to be compressed, None when there is none: the newest one, for it will be there the longest.
        Raises OSError. What can't be compressed (a symlink, say) is left alone."""
        self.clean()
        for number, names in self._row():
            if len(names) == 2:
                self._settle(number)
            elif names[0].endswith(".gz"):
                continue
            elif (source := self._open(names[0])) is not None:
                try:
                    return Job(source, self._create_partial(os.fstat(source)), os.fstat(source))
                except BaseException:
                    os.close(source)
                    raise
        return None

    def commit(self, job: Job, *, done: bool) -> bool:
        """Puts the compressed file in the place of the other. False when it is not `done`, or when that one has gone or
        changed meanwhile: then what was made of it goes too. Raises OSError. The caller closes `job`."""
        made, mine = self.status(self._partial), os.fstat(job.target)
        if made is None or _identity(made) != _identity(mine):
            return False  # another supervisor was here
        number = self._number_of(_identity(job.status))
        now = os.fstat(job.source)
        unchanged = (now.st_size, now.st_mtime_ns) == (job.status.st_size, job.status.st_mtime_ns)
        if number is None or not unchanged or not done:
            self.clean()
            return False
        os.utime(job.target, ns=(job.status.st_atime_ns, job.status.st_mtime_ns))
        crossing("log gzip")
        self.rename(self._partial, f"{self._name}.{number}.gz")
        crossing("log gzip name")
        self.unlink(f"{self._name}.{number}")
        crossing("log gzip remove")
        return True

    def _number_of(self, identity: Identity) -> int | None:
        """Which number has this file now, with no compressed one beside it."""
        for number, names in self._row():
            status = self.status(f"{self._name}.{number}")
            if status is not None and _identity(status) == identity:
                return number if len(names) == 1 else None
        return None

    def _open(self, name: str) -> int | None:
        """A descriptor for a file that may be compressed: a regular one, and as root none with a second name that
        others could have made: it may be any file of this file system."""
        try:
            fd = os.open(name, OPEN_FLAGS, dir_fd=self._folder)
        except OSError:  # a symlink, or no permission: not ours, and no reason to stop at it
            return None
        status = os.fstat(fd)
        linked = status.st_nlink > 1 and os.geteuid() == 0 and others_may_write(os.fstat(self._folder))
        if not stat.S_ISREG(status.st_mode) or linked:
            os.close(fd)
            return None
        return fd

    def _create_partial(self, like: os.stat_result) -> int:
        """A new file with the owner and the mode of another."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._partial, flags, 0o600, dir_fd=self._folder)
        try:
            own = os.fstat(fd)
            if (own.st_uid, own.st_gid) != (like.st_uid, like.st_gid):
                with contextlib.suppress(PermissionError):  # we are not root: then it is ours, as what we write now
                    os.fchown(fd, like.st_uid, like.st_gid)
            os.fchmod(fd, stat.S_IMODE(like.st_mode) & 0o777)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _settle(self, number: int) -> None:
        """Number `number` is there in both forms: where the one is a copy of the other, it is needed once."""
        plain = f"{self._name}.{number}"
        if self._is_copy(f"{plain}.gz", plain):
            self.unlink(plain)
            crossing("log gzip settle")

    def _is_copy(self, packed: str, plain: str) -> bool:
        status = self.status(plain)
        fd = self._open(packed)
        if status is None or fd is None:
            if fd is not None:
                os.close(fd)
            return False
        try:
            packed_status = os.fstat(fd)
            head = os.pread(fd, 8, 0)
            tail = os.pread(fd, TRAILER, max(0, packed_status.st_size - TRAILER))
        finally:
            os.close(fd)
        seconds = int(status.st_mtime) & 0xFFFFFFFF
        said = (head[:3], int.from_bytes(head[4:8], "little"), int.from_bytes(tail[4:], "little"))
        found = (b"\x1f\x8b\x08", seconds, status.st_size & 0xFFFFFFFF)
        return said == found and packed_status.st_mtime_ns == status.st_mtime_ns


def listing(folder: int, names: Collection[str]) -> list[tuple[str, int, str, os.stat_result]]:
    """(log, number, name, status) of all rotated files of the logs `names` in a folder, also of those behind a gap. The
    folder is read once, however many logs there are. Raises OSError."""
    opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    found = []
    try:
        for file in os.listdir(opened):
            parts = split(file)
            if parts is None or parts[0] not in names:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(file, dir_fd=opened, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found.append((*parts, file, status))
    finally:
        os.close(opened)
    return found


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino

"""One log file: appended to by splice(2), rotated at line ends, and whole again after a SIGKILL at any instruction.

The rule that makes it safe: the file itself is the only record. Its size says how much was taken from the pipe (the
kernel moves bytes and size together), so there is no position to remember and nothing in memory to lose.

A file that has reached `max_size`, or whose hour, day or week is over (`rotation`), is rotated before more is written.
The bytes after its last newline, the partial line, belong into the next file. Every step is one system call, but for
`copy`, and is done or not done:

    copy      path.partial = the partial line        a crash leaves rubbish, which the next one removes
    shift     path.2 -> path.3, path.1 -> path.2     see `shelf`. A crash leaves a gap, and the next shift fills just
                                                     that
    name      path.partial -> path.next              from here on the partial line is on the disk twice,
    truncate  path ends with its last newline        from here on once, in path.next
    retire    path -> path.1
    enter     path.next -> path

Without a partial line there is no path.next; `copy`, `name`, `truncate` and `enter` fall away. With keep = 0 nothing is
shifted or retired: `enter` replaces the old file.

Recovery when a file is opened and path.next exists: a partial line is never empty and never ends with a newline. So if
path does not end with a newline, `truncate` had not happened, path is complete and path.next is a copy: remove it. If
path ends with a newline (or is gone), path.next holds the only copy: do what is left, `retire` and `enter`.

All this is safe against the death of the process, not of the machine: nothing is fsync'ed.

The folder may belong to a program's user, and we may be root. It is opened once with the file, with care (`folders`),
and every step names files relative to its descriptor: a folder that is swapped meanwhile changes nothing.

Knows nothing of pipes' owners, counters and threads; a caller gives it a descriptor to take bytes from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator

from procman.config import Log
from procman.crossing import crossing
from procman.errors import is_shortage
from procman.folders import open_folder, others_may_write
from procman.lognames import NEXT, PARTIAL
from procman.logs.rotation import due, last_boundary, next_boundary
from procman.logs.shelf import Job, Shelf
from procman.logs.spool import Spool
from procman.records import dataclass

CHUNK = 1 << 20  # most bytes that are moved in one call, so that one program can't starve the others
RETRY_SECONDS = 1.0  # how soon a failed file is tried again, and how often a foreign hand on the path is looked for
SCAN = 64 * 1024
OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class Span:
    """Where bytes went: `length` bytes at `offset` of the file."""

    offset: int
    length: int


def describe(error: OSError) -> str:
    """An error as people know it: "No space left on device (ENOSPC)"."""
    code = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror or error}" + (f" ({code})" if code else "")


class LogFile:
    """A log file at `path`. Opened when first needed; `log` comes from the program's table.

    `size` is valid after `prepare`. `error` is "" while all is well. Times are CLOCK_MONOTONIC, given by the caller.
    `news` is set by each rotation, `raw` by one that dropped a file which should have been compressed and was not yet:
    who looks after that takes note and resets them (`upkeep`). `boundary` is when it is rotated by the clock next, in
    seconds since the epoch.
    """

    def __init__(self, path: str, log: Log) -> None:
        self.path = path
        self.log = log
        self._place, self._name = os.path.split(path)
        self._folder = -1
        self.size = 0
        self.users = 0
        self.rotations = 0
        self.lines_split = 0
        self._counted = (0, 0)
        self.error = ""
        self._fd = -1
        self._retry_at = 0.0
        self._look_at = 0.0
        self._rotate_at = 0.0
        self._claims: dict[Spool, Callable[[int], None]] = {}
        self.news = self.raw = self.unrotated = False
        self.boundary = 0.0
        self._period = 0.0  # when the hour, day or week began that `boundary` ends
        self._overdue = False
        self.job: Job | None = None

    # --- use -----------------------------------------------------------------------------------------------------

    def usable(self, now: float) -> bool:
        """False for a second after a failure: then the caller drops what comes, and does not ask the disk each time."""
        return now >= self._retry_at

    def prepare(self, now: float) -> None:
        """Has the file at `path` open, `size` known and room in it, or raises OSError.

        A file that was deleted, replaced or moved away (within a second) is left and a new one opened; one that was
        truncated is simply shorter. Rotates a full file.
        """
        if self._fd >= 0:
            status = os.fstat(self._fd)
            if status.st_nlink == 0 or (now >= self._look_at and not self._still_at_path(status, now)):
                self.close()
            self.size = status.st_size
        if self._fd < 0:
            self._open(now)
        if self.log.rotate_every:
            self._look_at_clock()
        if self._overdue and now >= self._rotate_at:
            self._overdue = not self._rotate(now)
        while self._full() and now >= self._rotate_at and self._rotate(now):
            pass  # again, where the partial line alone fills the new file
        if self.unrotated and not (self._overdue or self._full()):  # other rules
            self.unrotated, self.error = False, ""

    def tick(self, now: float) -> None:
        """Rotates a file whose hour, day or week is over, though its program prints nothing. One that is not there is
        not made. Raises OSError."""
        if self._fd >= 0 or os.path.lexists(self.path):
            self.prepare(now)

    def forget_clock(self) -> None:
        """It is rotated by other rules from now on."""
        self.boundary = self._period = 0.0
        self._overdue = False

    def _look_at_clock(self) -> None:
        """Whether the last boundary has passed since something was written here; asked once for each boundary. The wall
        clock may have been set back: then another one is the last."""
        wall = time.time()
        if self._period <= wall < self.boundary:
            return
        every = self.log.rotate_every
        self._period, self.boundary = last_boundary(wall, every), next_boundary(wall, every)
        self._overdue = self.size > 0 and due(os.fstat(self._fd).st_mtime, wall, every)

    def take(self, pipe: int, most: int = CHUNK) -> Span:
        """Moves what waits in `pipe` to the end of the file: at most `most` bytes, and as much as fits before the next
        rotation. A length of 0 means end of file. OSError: nothing was moved; BlockingIOError: nothing waits."""
        room = most
        if self.log.max_size and not self._full():
            room = min(room, self.log.max_size - self.size)
        offset = self.size
        length = os.splice(pipe, self._fd, room, offset_dst=offset, flags=os.SPLICE_F_NONBLOCK)
        self.size += length
        return Span(offset, length)

    def read_back(self, span: Span) -> bytes:
        """The bytes that `take` has just moved."""
        return os.pread(self._fd, span.length, span.offset)

    def mark(self, line: bytes) -> None:
        """Appends a line of our own, whole or not at all. OSError when it can't be written."""
        if self.in_a_line:
            line = b"\n" + line
        if self._write(line) < len(line):
            os.ftruncate(self._fd, self.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(line)

    def fit(self, lines: bytes, now: float) -> int:
        """How many bytes of whole `lines` are to be appended now: what fits into the file, which is rotated if nothing
        does. Raises OSError."""
        self.prepare(now)
        self.end_line()
        while self.log.max_size:
            room = max(0, self.log.max_size - self.size)
            end = len(lines) if len(lines) <= room else lines.rfind(b"\n", 0, room) + 1
            if end:
                return end
            if not self.size:
                return lines.find(b"\n") + 1  # longer than a file may be: it gets one of its own
            if now < self._rotate_at or not self._rotate(now):
                break
        return len(lines)

    def append(self, spool: Spool, lines: bytes, own: int) -> int:
        """Appends whole lines (see `fit`), which stand for the first `own` bytes that wait in `spool`; returns how many
        bytes were written: whole lines, fewer where the disk is full. OSError: nothing was written."""
        spool.intend(self._fd, self.size, len(lines), own)
        try:
            written = self._write(lines)
            crossing("log append")
            if written < len(lines):
                written = self._whole(lines, written)
        except OSError:
            spool.call_off()
            raise
        self.size += written
        return written

    def claim(self, spool: Spool, found: Callable[[int], None]) -> None:
        """Has `spool` settled with the file as soon as it is open: before anything else is written there. Then calls
        `found` with the number of bytes that turn out to be written."""
        if spool.intends:
            self._claims[spool] = found

    def disclaim(self, spool: Spool) -> None:
        """It will be closed."""
        self._claims.pop(spool, None)

    def _whole(self, lines: bytes, written: int) -> int:
        """Cuts off what is no whole line of the `written` bytes. Raises OSError where nothing is left: why the disk
        took no more."""
        whole = lines.rfind(b"\n", 0, written) + 1
        try:
            if not whole:
                os.pwrite(self._fd, lines[written : written + 1], self.size + written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # it takes more by now
        finally:
            os.ftruncate(self._fd, self.size + whole)
        return whole

    @property
    def in_a_line(self) -> bool:
        """Whether the file is open and ends in the midst of a line."""
        return self._fd >= 0 and self.size > 0 and os.pread(self._fd, 1, self.size - 1) != b"\n"

    def look(self) -> None:
        """Has `size` as it is, where the file is open; nothing is opened, made or rotated. Raises OSError."""
        if self._fd >= 0:
            self.size = os.fstat(self._fd).st_size

    def end_line(self) -> None:
        """Ends a line that has no end. Raises OSError."""
        if self.in_a_line:
            self.size += self._write(b"\n")

    def _write(self, data: bytes) -> int:
        return os.pwrite(self._fd, data, self.size)

    def fail(self, error: OSError, now: float) -> None:
        """Notes that the file can't be written and closes it; `usable` says when to try again."""
        self.close()
        self.error = describe(error)
        self._retry_at = now + RETRY_SECONDS

    def reopen(self, now: float) -> None:
        """Closes the file and opens what is at its path now: an external logrotate has moved it."""
        self.close()
        self._retry_at = 0.0
        try:
            self.prepare(now)
        except OSError as error:
            self.fail(error, now)

    def close(self) -> None:
        """Closes the descriptors, if open. The next `prepare` opens the path again."""
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1

    def uncounted(self) -> tuple[int, int]:
        """Rotations, and lines that were split, since this was asked last."""
        before, self._counted = self._counted, (self.rotations, self.lines_split)
        return self.rotations - before[0], self.lines_split - before[1]

    # --- opening -------------------------------------------------------------------------------------------------

    def _full(self) -> bool:
        return 0 < self.log.max_size <= self.size

    def _still_at_path(self, status: os.stat_result, now: float) -> bool:
        self._look_at = now + RETRY_SECONDS
        try:
            folder = open_folder(self._place)
        except OSError as error:
            # Without a free descriptor nobody can tell; the open file is good, and opening another one would fail.
            return is_shortage(error)  # else opening it again says why
        try:
            found = os.stat(self._name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.close(folder)
        return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)

    def _open(self, now: float) -> None:
        self.close()
        self._folder = open_folder(self._place, 0o750)
        self._recover()
        self._fd = open_regular(self._name, self.log.mode_bits, self._folder)
        while self._claims:
            spool, found = next(iter(self._claims.items()))
            found(self._settle(spool))
            del self._claims[spool]
        self.size = os.fstat(self._fd).st_size
        self._look_at = now + RETRY_SECONDS
        self.error = ""
        self.unrotated = False

    def _settle(self, spool: Spool) -> int:
        """See `Spool.settle`. A predecessor may have written to a file that logrotate has moved away meanwhile, within
        the folder: it is known by its inode."""
        status = os.fstat(self._fd)
        if not spool.intends or spool.intended == (status.st_dev, status.st_ino):
            return spool.settle(self._fd)
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.inode() == spool.intended[1]]
        finally:
            os.close(folder)
        for name in names:
            with contextlib.suppress(OSError):
                moved = os.open(name, OPEN_FLAGS, dir_fd=self._folder)
                try:
                    return spool.settle(moved)
                finally:
                    os.close(moved)
        return spool.settle(self._fd)  # it has gone

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self._folder, self._name)

    def _recover(self) -> None:
        """Finishes or undoes a rotation that a predecessor began."""
        with contextlib.suppress(FileNotFoundError):
            self._unlink(self._partial)
        if self.job is None:
            self._shelf.clean()
        if self._shelf.status(self._next) is None:
            return
        ending = last_byte(self._name, self._folder)
        if ending is None:
            self._enter()
        elif ending in (b"\n", b""):
            self._shift()
            self._finish(carried=True)
        else:
            self._unlink(self._next)
            crossing("log undo")

    # --- compression: see `shelf` -------------------------------------------------------------------------------------

    def begin_compression(self) -> Job | None:
        """The next rotated file to be compressed, None where there is none. `end_compression` comes after it. Raises
        OSError."""
        if self.job is not None or self.log.compress != "gzip":
            return None
        with self.shelf() as shelf:
            self.job = shelf.begin()
        return self.job

    def abandon(self) -> None:
        """Ends a compression that is not done, whatever happens: nobody will use the file any more."""
        with contextlib.suppress(OSError):
            self.end_compression(done=False)

    def end_compression(self, *, done: bool) -> bool:
        """Puts the compressed file in the place of the other, or removes it where that was not `done`. Returns whether
        it is there. Raises OSError."""
        job, self.job = self.job, None
        if job is None:
            return False
        try:
            with self.shelf() as shelf:
                return shelf.commit(job, done=done)
        finally:
            job.close()

    @contextlib.contextmanager
    def shelf(self) -> Iterator[Shelf]:
        """The rotated files, also while the file itself is not open. Raises OSError."""
        folder = open_folder(self._place)
        try:
            yield Shelf(folder, self._name)
        finally:
            os.close(folder)

    # --- rotation: see the module's docstring -----------------------------------------------------------------------

    @property
    def _partial(self) -> str:
        return f"{self._name}{PARTIAL}"

    @property
    def _next(self) -> str:
        return f"{self._name}{NEXT}"

    def _rename(self, name: str, new: str) -> None:
        self._shelf.rename(name, new)

    def _unlink(self, name: str) -> None:
        self._shelf.unlink(name)

    def _rotate(self, now: float) -> bool:
        """Starts a new file. False where that can't be done (a folder that may not be written, say): the old one goes
        on growing and it is tried again in a second. Better a large file than lost output."""
        line_end = last_newline(self._fd, self.size) + 1
        split = line_end == 0  # one line longer than the whole file: it has to be cut somewhere
        if split and not self._full():
            self._rotate_at = now + RETRY_SECONDS  # by the clock: then its end is waited for
            return False
        carried = not split and line_end < self.size
        try:
            if carried:
                self._copy_from(line_end)
            self._shift()
            if carried:
                self._keep_partial()
                self._truncate(line_end)
        except OSError as error:
            for rest in (self._partial, self._next):
                with contextlib.suppress(FileNotFoundError):
                    self._unlink(rest)
            self.error = f"rotation: {describe(error)}"
            self.unrotated = True
            self._rotate_at = now + RETRY_SECONDS
            return False
        os.close(self._fd)
        self._fd = -1
        self._finish(carried)
        self.lines_split += split
        self._open(now)
        return True

    def _copy_from(self, start: int) -> None:
        target = create(self._partial, self.log.mode_bits, self._folder)
        try:
            crossing("log create")
            while start < self.size:
                copied = os.sendfile(target, self._fd, start, self.size - start)
                if not copied:
                    raise OSError(errno.EIO, "the file became shorter during its rotation")
                start += copied
            crossing("log copy")
        finally:
            os.close(target)

    def _shift(self) -> None:
        plain = self._shelf.shift(self.log.keep)
        self.raw = self.raw or (plain and self.log.compress == "gzip")

    def _keep_partial(self) -> None:
        self._rename(self._partial, self._next)
        crossing("log name")

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        crossing("log truncate")

    def _finish(self, carried: bool) -> None:
        if self.log.keep:
            self._rename(self._name, f"{self._name}.1")
            crossing("log retire")
        elif not carried:
            self._unlink(self._name)
            crossing("log retire")
        if carried:
            self._enter()
        self.rotations += 1
        self.news = True
        self._shelf.prune(self.log.keep)

    def _enter(self) -> None:
        self._rename(self._next, self._name)
        crossing("log enter")


def open_regular(name: str, mode: int, folder: int) -> int:
    """Opens a regular file for reading and writing, or creates it with exactly `mode`. Follows no symlink (open(2)),
    nor as root a hard link that others could have made in `folder`: it may be any file of this file system."""
    try:
        fd = os.open(name, OPEN_FLAGS, dir_fd=folder)
    except FileNotFoundError:
        fd = create(name, mode, folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symlink, which is not followed") from None
        raise
    status = os.fstat(fd)
    problem = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if status.st_nlink > 1 and os.geteuid() == 0 and others_may_write(os.fstat(folder)):
        problem = "the file has a second name, and others may write its folder"
    if problem:
        os.close(fd)
        raise OSError(errno.EINVAL, problem)
    return fd


def create(name: str, mode: int, folder: int) -> int:
    """Makes a file that must not exist yet, with exactly `mode`: the umask does not count, the program table does."""
    fd = os.open(name, OPEN_FLAGS | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder)
    os.fchmod(fd, mode)
    return fd


def last_byte(name: str, folder: int) -> bytes | None:
    """The last byte of a file in `folder`, b"" when it is empty, None when there is none."""
    try:
        fd = os.open(name, OPEN_FLAGS, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, 1, size - 1) if size else b""
    finally:
        os.close(fd)


def last_newline(fd: int, size: int) -> int:
    """Offset of the last newline before `size`, or -1. Reads backwards in small blocks."""
    end = size
    while end > 0:
        start = max(0, end - SCAN)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return -1

"""One stream on its way through the log thread: its descriptor, its running counts, and its turns.

What is read by lines goes through a spool and a dress; the rest goes from the pipe to the file inside the kernel.
Knows one LogFile and one pipe; nothing of other streams, of epoll and of what channels print to.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from procman.config import Log
from procman.crossing import crossing
from procman.logs import lines
from procman.logs.lines import Dress, Piece
from procman.logs.logfile import CHUNK, LogFile
from procman.logs.spool import Spool
from procman.records import dataclass

if TYPE_CHECKING:
    from procman.logs.channel import Channel

PIPE_SIZE = 256 * 1024  # large enough for most; 256 of them fit under an ordinary user's limit (pipe(7)), not 64
SAID_SECONDS = 60.0  # a disk that is full, and then not, and then again, is told of once in so many
BUSY_PIPE_SIZE = 1024 * 1024  # for a stream that was seen to fill its pipe: half as fast again
RECENT_BYTES = 16 * 1024  # of a stream that no file keeps: as much as a traceback has that is told
TURN = 256 * 1024  # most bytes of one turn of a file that is written by lines


def make_pipe() -> tuple[int, int]:
    """A pipe for a process's output: (read end, non-blocking; write end, blocking), both close-on-exec. Larger than
    usual where the user's limit on pipe memory allows (pipe(7)).

    The write end can read too, as Linux allows for a pipe that is opened by name (fifo(7)): whoever writes is a reader
    himself, so that nobody gets SIGPIPE while procman is not there, and the output waits in the pipe.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_fd, False)
    with suppress(OSError):  # no /proc
        both = os.open(f"/proc/self/fd/{write_fd}", os.O_RDWR | os.O_CLOEXEC)
        os.close(write_fd)
        write_fd = both
    with suppress(OSError):  # EPERM: the user has many pipes; a small one works too
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return read_fd, write_fd


def bytes_waiting(pipe: int) -> int:
    """How many bytes a pipe holds now (FIONREAD, pipe(7))."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def _readable(pipe: int, deadline: float) -> bool:
    """Whether something waits in a pipe, or comes until `deadline` (CLOCK_MONOTONIC)."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return any(mask & select.POLLIN for _, mask in poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


@dataclass(frozen=True, slots=True)
class Stream:
    """One output of one process: `key` names it ("shop:1/out", "shop:1/err"), `process` is whose it is, `path` the file
    in "file" mode. `read_fd` is the pipe's read end, `spool_fd` a spool (`spool.make`) or -1; the LogThread owns both
    from `add` on. Output that is read by lines without a spool gets one, which does not outlive us."""

    key: str
    process: str
    log: Log
    path: str
    read_fd: int
    spool_fd: int = -1

    @property
    def is_error(self) -> bool:
        """Whether it is standard error, and that apart."""
        return self.key.endswith("/err")


@dataclass(frozen=True, slots=True)
class Counters:
    """What became of a stream's bytes. read = written + dropped + held; only what is read by lines is held.

    `unreported` are dropped bytes that the log does not tell of yet. `waits` is how often the program had to wait for a
    file that could not be written (`on_error` "block"), `waited` how many seconds. `error` is "" or why output is
    dropped or waits, or why a file is not rotated, now.
    """

    read: int = 0
    written: int = 0
    dropped: int = 0
    held: int = 0
    unreported: int = 0
    rotations: int = 0
    lines_split: int = 0
    waits: int = 0
    waited: float = 0.0
    error: str = ""

    def document(self) -> dict[str, int | float | str]:
        """For the state file: `Counters(**document)` is this again. (dataclasses.asdict takes ten times as long.)"""
        return {name: getattr(self, name) for name in self.__slots__}


class Begun(NamedTuple):
    """Where the output of a stream begins in its file: device and inode of that, 0 where there was none yet, and its
    size then."""

    path: str
    device: int = 0
    inode: int = 0
    size: int = 0

    @classmethod
    def at(cls, path: str) -> Begun:
        """At the end of that file as it is now."""
        try:
            found = os.stat(path)
        except OSError:
            return cls(path)
        return cls(path, found.st_dev, found.st_ino, found.st_size)


class Flow:
    """A stream as the log thread sees it: it goes to `file`, or else to `channel`; `null` is /dev/null. `dress` is None
    for a file that is not written by lines."""

    def __init__(self, stream: Stream, counters: Counters, null: int) -> None:
        self.fd = stream.read_fd
        self.stream = stream
        self.log = stream.log
        self.file: LogFile | None = None
        self.channel: Channel | None = None
        self.dress: Dress | None = None
        self.limit = lines.LINE_LIMIT
        self.spool = Spool(stream.spool_fd) if stream.spool_fd >= 0 else None
        self.tap: Callable[[bytes], None] | None = None
        self.begun: Begun | None = None
        self.recent = b""  # where no file keeps it: the end of what was taken
        self.listening = False
        self.on_its_way = False
        self.waiting = False  # its bytes stay where they are: the file can't be written, and `on_error` is "block"
        self.unfinished = False  # its child has ended while it waited: its last line is to be ended
        self.comes_from_elsewhere = False  # what its file holds by now is none of its lines
        self.until: int | None = None  # not more than so many bytes are read: what follows is another child's
        self.trouble = ""
        self.process = stream.process
        self._capacity = fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ)
        self.written = counters.written
        # A predecessor held it in memory that is gone.
        lost = 0 if self.spool and not self.spool.fresh else counters.held
        self.dropped = counters.dropped + lost
        self.read = self.written + self.dropped + self.held
        self.unreported = counters.unreported + lost
        self.error = counters.error
        self.null = null
        self._rotations = counters.rotations
        self._lines_split = counters.lines_split
        self._reason = counters.error or "procman was restarted"
        self._waits = counters.waits
        self._waited = counters.waited
        self._waits_since = 0.0
        self._said = ""
        self._said_at = -SAID_SECONDS
        self.publish()

    @property
    def held(self) -> int:
        """Bytes that were taken and are not written yet: an unfinished line, or what a channel has not taken."""
        return self.spool.waiting if self.spool else 0

    def publish(self) -> None:
        """Makes the running counts visible to the other thread, all at once: one assignment."""
        numbers = (
            *(self.read, self.written, self.dropped, self.held, self.unreported),
            *(self._rotations, self._lines_split, self._waits, round(self._waited, 3)),
        )
        self.published = (numbers, self.error)

    def counters(self) -> Counters:
        """The published counts; may be called from another thread."""
        numbers, error = self.published
        return Counters(*numbers, error=error)

    def recount(self, late: Counters) -> None:
        """Adds what a predecessor has counted since we were made; what it holds is in the spool."""
        self.written += late.written
        self.dropped += late.dropped
        self.read += late.written + late.dropped
        self.unreported += late.unreported
        self._rotations += late.rotations
        self._lines_split += late.lines_split
        self._waits += late.waits
        self._waited += late.waited
        self.publish()

    @property
    def is_behind(self) -> bool:
        """Whether something is to be tried again, also while its program prints nothing: to tell of a loss, to write
        what waits, to rotate its file."""
        return bool(self.unreported or self.waiting or (self.file is not None and self.file.unrotated))

    def close_spool(self) -> None:
        """What is left in it belongs to a successor."""
        if self.spool:
            self.spool.close()
            self.spool = None

    # --- to a file ----------------------------------------------------------------------------------------------------

    def turn(self, file: LogFile, now: float, wall: float) -> None:
        """One turn of a stream with a file: what waits goes there. Where that can't be done it is dropped, or goes on
        waiting."""
        if not file.usable(now):
            self._refuse(file, now)
            return
        try:
            with self._counting(file):
                if self.dress:
                    if not self.waiting:  # else as much as may be is held already
                        self.take(TURN)
                    self._append_lines(file, now, wall)
                else:
                    if self.held:  # from a time when it was read by lines; the rest of its last line follows
                        self._append_lines(file, now, wall, last=True)
                        self.comes_from_elsewhere = False
                    self._append(file, now, wall)
        except BlockingIOError:
            return
        except OSError as error:
            file.fail(error, now)
            self._refuse(file, now)
            return
        self.go_on(now)
        self.error = file.error

    def _append(self, file: LogFile, now: float, wall: float) -> None:
        self._report(file, now, wall)
        file.prepare(now)
        if self.comes_from_elsewhere:
            file.end_line()
            self.comes_from_elsewhere = False
        self._move(file, CHUNK)

    def _move(self, file: LogFile, most: int) -> int:
        span = file.take(self.fd, most)
        self.read += span.length
        self.written += span.length
        self._widen(span.length)
        if self.tap:
            self._tell(file.read_back(span))
        return span.length

    def leave(self, file: LogFile, now: float, deadline: float) -> None:
        """Its output goes elsewhere, or is read by lines, from now on. The rest of the line that is under way belongs
        here, if it comes until `deadline`. Else the line ends here."""
        try:
            with self._counting(file):
                file.look()
                for _ in range(lines.LINE_LIMIT):
                    if not file.in_a_line or not _readable(self.fd, deadline) or not self._move(file, 1):
                        break
                file.end_line()
        except OSError as error:
            file.fail(error, now)

    def _append_lines(self, file: LogFile, now: float, wall: float, *, last: bool = False) -> None:
        assert self.spool
        file.prepare(now)  # first: it may find out that some of what waits is there already (`Spool.settle`)
        while pieces := self._next(wall, last=last):
            for rest in pieces:
                self._report(file, now, wall)
                while rest.data:
                    size = file.fit(rest.data, now)
                    written = file.append(self.spool, rest.data[:size], rest.own_in(0, size))
                    own = rest.own_in(0, written)
                    self.settle(own, 0)
                    crossing("log advance")
                    rest = rest._replace(data=rest.data[written:], source=rest.source[own:])

    def last_line_to(self, file: LogFile, now: float, wall: float) -> None:
        """A line that has no end yet gets one in the file: no more of it will come."""
        if not self.held or not file.usable(now):
            return
        try:
            with self._counting(file):
                self._append_lines(file, now, wall, last=True)
                if self.dress is None:
                    file.end_line()
        except OSError as error:
            file.fail(error, now)
            self._refuse(file, now)

    def _refuse(self, file: LogFile, now: float) -> None:
        """`file` can't be written."""
        if file.log.on_error == "drop":
            self.go_on(now)
            self.drop(file.error)
            return
        if self.spool:
            self.spool.seen = 0  # what was on its way is not there
        if not self.waiting:
            self.waiting = True
            self._waits += 1
            self._waits_since = now
        self._count_waited(now)
        self.error = f"{file.error}; the program waits as soon as its pipe is full"

    def go_on(self, now: float) -> None:
        """Its bytes need not wait any more."""
        if self.waiting:
            self._count_waited(now)
            self.waiting = False

    def _count_waited(self, now: float) -> None:
        self._waited += now - self._waits_since
        self._waits_since = now

    def drop_all(self, reason: str) -> None:
        """Drops what waits in the pipe, which nobody will read again."""
        self.waiting = False
        end = self.read + bytes_waiting(self.fd)
        before = -1
        while before < self.read < end:
            before = self.read
            self.drop(reason)
        self.publish()

    def inherit(self, other: Flow) -> None:
        """Tells of what `other` has dropped and not told of, which ends."""
        self.unreported += other.unreported
        self._reason = other._reason
        other.unreported = 0
        self.publish()

    def will(self) -> str:
        """What the daemon's own log is to tell of a stream that ends, and whose log does not tell of a loss."""
        count, self.unreported = self.unreported, 0
        return f"{count} bytes of output of {self.process} were dropped, and its log does not tell: {self._reason}"

    def news(self, now: float) -> str:
        """What the daemon's own log should tell of this stream: that its file can't be written, and that it can again.
        "" when there is nothing new. Not more often than once in SAID_SECONDS."""
        if self.error == self._said or (self.error and now - self._said_at < SAID_SECONDS):
            return ""
        before, self._said = self._said, self.error
        if self.error:
            self._said_at = now
            return f"the log of {self.process} is not written as it should be: {self.error}"
        return f"the log of {self.process} is written again (it was not: {before})"

    def catch_up(self, file: LogFile, now: float, wall: float) -> None:
        """Tells in the log of what was dropped before, if it can be written by now, and rotates the file that could not
        be rotated: the program may print no more."""
        if not file.usable(now):
            return
        try:
            with self._counting(file):
                if file.unrotated:
                    file.prepare(now)
                self._report(file, now, wall)
        except OSError as error:
            file.fail(error, now)
        self.error = file.error

    def _report(self, file: LogFile, now: float, wall: float) -> None:
        if self.unreported:
            file.prepare(now)
            file.mark(self.marker(wall).data)
            self.unreported = 0

    @contextmanager
    def _counting(self, file: LogFile) -> Iterator[None]:
        try:
            yield
        finally:
            self.count_rotations(file)

    def count_rotations(self, file: LogFile) -> None:
        """Those that nobody has counted yet. Of several streams with one file, the one that asks first counts them."""
        rotations, lines_split = file.uncounted()
        self._rotations += rotations
        self._lines_split += lines_split

    # --- by lines -----------------------------------------------------------------------------------------------------

    def take(self, most: int) -> None:
        """Takes what waits in the pipe into the spool, `most` bytes at most. Raises OSError when there is no memory for
        it."""
        assert self.spool
        if self.until is not None:
            most = min(most, max(0, self.until - self.read))
        count = self.spool.take(self.fd, most)
        self.read += count
        self.error = ""
        self._widen(count)
        if count and (self.tap or self.file is None):
            # Also where the lines can't be written.
            self._tell(self.spool.last(count if self.tap else min(count, RECENT_BYTES)))

    def pieces(self, wall: float, *, last: bool = False) -> list[Piece]:
        """All that waits and is complete, for a channel; see `settle`. `last`: what is not complete, too."""
        found = []
        while pieces := self._next(wall, last=last):
            found += pieces
        return [self.marker(wall), *found] if found and self.unreported else found

    def settle(self, own: int, told: int) -> None:
        """So many bytes of what waits are written, and so many dropped ones told of."""
        self.written += own
        self.unreported -= told
        if self.spool:
            self.spool.advance(own)

    def give_up(self, count: int, reason: str) -> None:
        """So many bytes of what waits could not be written."""
        if self.spool:
            self.spool.advance(count)
        self.lose(count, reason)

    def claim(self, file: LogFile) -> None:
        """Before anything is written to `file` by us: what of our lines somebody before us has written there counts."""
        if self.spool:
            file.claim(self.spool, self._found)

    def _found(self, own: int) -> None:
        self.written += own
        self.publish()

    def rewind(self) -> None:
        """What is on its way waits again; somebody else may have worked with the spool."""
        if self.spool:
            self.spool.look()
            self.read = self.written + self.dropped + self.held
            self.publish()

    def _next(self, wall: float, *, last: bool) -> list[Piece]:
        """The next lines of what waits, dressed; [] where no line is complete."""
        assert self.spool
        window = self.spool.window(self.limit + 1)
        length, partial = lines.cut(window, self.limit)
        if not length and last:
            length = len(window)
        if not length:
            return []
        self.spool.seen += length
        self._lines_split += partial
        return (self.dress or lines.plain)(window[:length], partial, wall)

    def drop(self, reason: str) -> None:
        """Empties the pipe without writing, so that the program can go on. A tap still gets the bytes: a program does
        become ready on a full disk."""
        if self.spool:
            self.lose(self.spool.discard(), reason)
        with suppress(BlockingIOError):
            data = b""
            if self.tap or self.file is None:
                data = os.read(self.fd, CHUNK)
                count = len(data)
            else:
                count = os.splice(self.fd, self.null, CHUNK, flags=os.SPLICE_F_NONBLOCK)
            self.read += count
            self.lose(count, reason)
            self._tell(data)

    def lose(self, count: int, reason: str) -> None:
        """Counts bytes that were taken and could not be written."""
        self.dropped += count
        self.unreported += count
        self._reason = self.error = reason

    def _tell(self, data: bytes) -> None:
        if self.file is None:
            self.recent = (self.recent + data)[-RECENT_BYTES:]  # one assignment: others read it
        tap = self.tap
        if tap and data:
            try:
                tap(data)
            except Exception as error:  # noqa: BLE001  a listener's mistake must not cost a byte of the log
                self.tap = None
                self.trouble = f"{type(error).__name__}: {error}"

    def _widen(self, count: int) -> None:
        """Gives a program that fills its pipe a larger one, once, if the user's limit allows. It is never quite full:
        pages of a pipe may have gaps."""
        if count > self._capacity // 2:
            self._capacity = 1 << 62
            with suppress(OSError):
                fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BUSY_PIPE_SIZE)

    def marker(self, wall: float) -> Piece:
        """A line of procman's own, which tells of what was dropped."""
        text = f"procman: {self.unreported} bytes of output were dropped: {self._reason}\n".encode()
        return Piece((self.dress or lines.plain)(text, False, wall)[0].data, b"", self.unreported)

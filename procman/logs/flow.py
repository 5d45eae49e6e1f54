"""One stream on its way through the log thread: its descriptor, its running counts, and its turns.

Knows one LogFile and one pipe; nothing of other streams, of epoll and of the outlet.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from procman.config import Log
from procman.logs.logfile import CHUNK, LogFile
from procman.logs.outlet import LINE_LIMIT, Lines, Piece

PIPE_SIZE = 256 * 1024  # large enough for most; 256 of them fit under an ordinary user's limit (pipe(7)), not 64
SAID_SECONDS = 60.0  # a disk that is full, and then not, and then again, is told of once in so many
BUSY_PIPE_SIZE = 1024 * 1024  # for a stream that was seen to fill its pipe: half as fast again


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


@dataclass(frozen=True, slots=True)
class Stream:
    """One output of one process: `key` names it ("shop:1/out", "shop:1/err"), `process` is the prefix in "inherit"
    mode, `path` the file in "file" mode. `read_fd` is the pipe's read end; the LogThread owns it from `add` on."""

    key: str
    process: str
    log: Log
    path: str
    read_fd: int


@dataclass(frozen=True, slots=True)
class Counters:
    """What became of a stream's bytes. read = written + dropped + held; only "inherit" mode holds (an unfinished line).

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


class Flow:
    """A stream as the log thread sees it. `file` is None for one that is printed to the outlet; `null` is /dev/null."""

    def __init__(self, stream: Stream, counters: Counters, null: int) -> None:
        self.fd = stream.read_fd
        self.file: LogFile | None = None
        self.tap: Callable[[bytes], None] | None = None
        self.listening = False
        self.unwanted = False
        self.waiting = False  # its bytes stay in the pipe: the file can't be written, and `on_error` is "block"
        self.trouble = ""
        self.process = stream.process
        self._capacity = fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ)
        self.read = counters.read
        self.written = counters.written
        self.dropped = counters.dropped + counters.held  # a predecessor held it in memory, and died
        self.unreported = counters.unreported + counters.held
        self.error = counters.error
        self.null = null
        self._lines = Lines(stream.process)
        self._rotations = counters.rotations
        self._lines_split = counters.lines_split
        self._reason = counters.error or "procman was restarted"
        self._waits = counters.waits
        self._waited = counters.waited
        self._waits_since = 0.0
        self._said = ""
        self._said_at = -SAID_SECONDS
        self.publish()

    def publish(self) -> None:
        """Makes the running counts visible to the other thread, all at once: one assignment."""
        held, split = self._lines.held, self._lines_split + self._lines.split
        counts = (self.read, self.written, self.dropped, held, self.unreported, self._rotations, split)
        numbers = (*counts, self._waits, round(self._waited, 3))
        self.published = (numbers, self.error)

    def counters(self) -> Counters:
        """The published counts; may be called from another thread."""
        numbers, error = self.published
        return Counters(*numbers, error=error)

    def append(self, file: LogFile, now: float) -> None:
        """One turn of a stream with a file: what waits goes there. Where that can't be done it is dropped, or goes on
        waiting."""
        if not file.usable(now):
            self._refuse(file, now)
            return
        try:
            with self._counting(file):
                self._report(file, now)
                file.prepare(now)
                span = file.take(self.fd)
        except BlockingIOError:
            return
        except OSError as error:
            file.fail(error, now)
            self._refuse(file, now)
            return
        self.go_on(now)
        self.read += span.length
        self.written += span.length
        self.error = file.error
        if span.length > self._capacity // 2:  # never quite full: pages of a pipe may have gaps
            self._widen()
        if self.tap:
            self._tell(file.read_back(span))

    def _refuse(self, file: LogFile, now: float) -> None:
        """`file` can't be written."""
        if file.log.on_error == "drop":
            self.go_on(now)
            self.drop(file.error)
            return
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

    def catch_up(self, file: LogFile, now: float) -> None:
        """Tells in the log of what was dropped before, if it can be written by now: the program may print no more."""
        if not file.usable(now):
            return
        try:
            with self._counting(file):
                self._report(file, now)
        except OSError as error:
            file.fail(error, now)
        self.error = file.error

    def _report(self, file: LogFile, now: float) -> None:
        if self.unreported:
            file.prepare(now)
            file.mark(self._marker())
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

    def next_lines(self) -> list[Piece]:
        """One turn of a stream without a file: what waits, as lines for the outlet."""
        try:
            data = os.read(self.fd, LINE_LIMIT)
        except BlockingIOError:
            return []
        self.read += len(data)
        self.error = ""
        self._tell(data)
        return self._with_marker(self._lines.feed(data))

    def last_line(self) -> list[Piece]:
        """A printed line that has no end yet, closed: no more of it will come."""
        return self._with_marker(self._lines.close())

    def drop(self, reason: str) -> None:
        """Empties the pipe without writing, so that the program can go on. A tap still gets the bytes: a program does
        become ready on a full disk."""
        with suppress(BlockingIOError):
            data = b""
            if self.tap:
                data = os.read(self.fd, CHUNK)
                count = len(data)
            else:
                count = os.splice(self.fd, self.null, CHUNK, flags=os.SPLICE_F_NONBLOCK)
            self.read += count
            self.lose(count + self._lines.discard(), reason)
            self._tell(data)

    def lose(self, count: int, reason: str) -> None:
        """Counts bytes that were taken and could not be written."""
        self.dropped += count
        self.unreported += count
        self._reason = self.error = reason

    def _tell(self, data: bytes) -> None:
        tap = self.tap
        if tap and data:
            try:
                tap(data)
            except Exception as error:  # noqa: BLE001  a listener's mistake must not cost a byte of the log
                self.tap = None
                self.trouble = f"{type(error).__name__}: {error}"

    def _widen(self) -> None:
        """Gives a program that fills its pipe a larger one, once, if the user's limit allows."""
        self._capacity = 1 << 62
        with suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BUSY_PIPE_SIZE)

    def _with_marker(self, pieces: list[Piece]) -> list[Piece]:
        if pieces and self.unreported:
            pieces.insert(0, self._lines.marker(self._marker(), self.unreported))
        return pieces

    def _marker(self) -> str:
        return f"procman: {self.unreported} bytes of output were dropped: {self._reason}"

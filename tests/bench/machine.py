"""What the benchmark reads from the kernel: CPU clocks, memory, starts and ends of processes."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.harness import pids

MB = 1e6


class TooSlow(Exception):
    """Something did not happen within its bound."""


class Start(NamedTuple):
    """A child that ran its first instruction: the name that it was given, its pid, and when, in seconds."""

    name: str
    pid: int
    at: float


CHILD = """\
#!/bin/sh
# child.sh FIFO NAME: says at once that it runs, then waits to be ended.
echo "$2 $$" >"$1"
exec sleep 100000
"""


class Starts:
    """Tells when children run: each one is `argv(name)`, and says so through a FIFO first of all.

    The time is taken here when the line arrives, so every manager's children are slow by the same wake-up of this
    process. Use it in a `with`.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp")
        self._fifo = f"{self._folder.name}/starts"
        self._script = f"{self._folder.name}/child.sh"
        Path(self._script).write_text(CHILD)
        os.mkfifo(self._fifo)
        self._fd = os.open(self._fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # O_RDWR: no open(2) of a child waits
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._folder.cleanup()

    def argv(self, name: str) -> list[str]:
        """The command of a child."""
        return ["/bin/sh", self._script, self._fifo, name]

    def wait(self, count: int, timeout: float) -> list[Start]:
        """The next `count` starts. Raises TooSlow when they do not come within `timeout` seconds."""
        found: list[Start] = []
        end = time.monotonic() + timeout
        while len(found) < count:
            if not self._poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise TooSlow(f"only {len(found)} of {count} children started within {timeout:.0f} s")
            found += self._read()
        return found

    def seen(self) -> list[Start]:
        """The starts that nobody has waited for; when they were is not known."""
        return self._read() if self._poll.poll(0) else []

    def _read(self) -> list[Start]:
        at = time.monotonic()
        *lines, self._rest = (self._rest + os.read(self._fd, 65536)).split(b"\n")
        pairs = (line.decode().split() for line in lines)
        return [Start(name, int(pid), at) for name, pid in pairs]


PRINTER = """\
#!/bin/sh
# printer.sh FOLDER: prints the file `lines` each time that somebody writes a line into the FIFO `go`.
cd "$1" || exit 1
while read -r _ <go; do
  cat lines
  echo done >done
done
"""
LINE = b"x" * 99 + b"\n"


class Printer:
    """A program that prints `size` bytes of 100-byte lines when it is told to, and waits else. Use it in a `with`."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp")
        folder = Path(self._folder.name)
        self.argv = ["/bin/sh", f"{folder}/printer.sh", str(folder)]
        (folder / "printer.sh").write_text(PRINTER)
        self._size = (folder / "lines").write_bytes(LINE * (size // len(LINE)))
        for name in ("go", "done"):
            os.mkfifo(folder / name)
        self._go, self._done = (os.open(folder / name, os.O_RDWR | os.O_CLOEXEC) for name in ("go", "done"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._go)
        os.close(self._done)
        self._folder.cleanup()

    def turn(self, timeout: float) -> float:
        """MB/s until all is out of its hands: a pipe holds too little to count. Raises TooSlow."""
        begun = time.monotonic()
        os.write(self._go, b"go\n")
        if not select.select([self._done], [], [], timeout)[0]:
            raise TooSlow(f"{self._size / MB:.0f} MB of output were not taken within {timeout:.0f} s")
        os.read(self._done, 4096)
        return self._size / MB / (time.monotonic() - begun)


class Ends:
    """Waits for the ends of processes that need not be children, by pidfds. What has gone already has ended."""

    def __init__(self, ending: Iterable[int]) -> None:
        self._poll = select.epoll()
        self._open: set[int] = set()
        for pid in ending:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            self._open.add(fd)
            self._poll.register(fd, select.EPOLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._open:
            os.close(fd)
        self._poll.close()

    def wait(self, timeout: float, what: str) -> float:
        """When the last one ended, in monotonic seconds. Raises TooSlow, beginning with `what`, after `timeout`."""
        count, end = len(self._open), time.monotonic() + timeout
        at = time.monotonic()
        while self._open:
            ready = self._poll.poll(max(0.0, end - time.monotonic()))
            at = time.monotonic()
            if not ready:
                raise TooSlow(f"{what} within {timeout:.0f} s: {len(self._open)} of {count} processes were left")
            for fd, _ in ready:
                self._poll.unregister(fd)
                self._open.remove(fd)
                os.close(fd)
        return at


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the block has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_limits() -> None:
    """As many descriptors for us, and for the managers that we start, as we may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_seconds(of: Iterable[int]) -> float:
    """CPU time that these processes have used, to the nanosecond: their CPU clocks (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in of)


def wake_ups(of: Iterable[int]) -> int:
    """How often all threads of these processes have been put on a processor: context switches (proc_pid_status(5))."""
    count = 0
    for pid in of:
        for task in Path(f"/proc/{pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            count += sum(int(line.split()[1]) for line in lines if "ctxt_switches:" in line)
    return count


def parent_of(pid: int) -> int:
    """The pid of the parent (proc_pid_stat(5)). Raises OSError when there is no such process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def marked(variable: str) -> set[int]:
    """The processes with NAME=VALUE in their environment that have not ended."""
    found = set()
    for pid in pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if variable.encode() in environment.split(b"\0") and runs(pid):
            found.add(pid)
    return found


def memory(of: Iterable[int], field: str) -> float:
    """Megabytes of these processes together; `field` of proc_pid_smaps(5): "Pss", "Private_Dirty"."""
    kib = 0
    for pid in of:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{field}:"):
                kib += int(line.split()[1])
    return kib * 1024 / MB


def written_bytes(pid: int) -> int:
    """What a process has passed to write(2) so far (proc_pid_io(5))."""
    text = Path(f"/proc/{pid}/io").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("wchar:"))


def wait_end(process: subprocess.Popen[bytes], timeout: float) -> float:
    """When the process ended, to the wake-up (Popen.wait would look only every 50 ms). Raises TooSlow."""
    fd = os.pidfd_open(process.pid)
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        if not ended.poll(timeout * 1000):
            raise TooSlow(f"{process.args!r} did not end within {timeout} s")
    finally:
        os.close(fd)
    at = time.monotonic()
    process.wait(1)
    return at


def run_timed(argv: Sequence[str], environment: Mapping[str, str], timeout: float = 30.0) -> tuple[float, str]:
    """Seconds from fork to end of a command, and what it printed."""
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            seconds = wait_end(process, timeout) - start
        except TooSlow:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        return seconds, output.read().decode(errors="replace")


def kill_all(of: Iterable[int]) -> None:
    """SIGKILL to processes of our own that may have gone."""
    for pid in of:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

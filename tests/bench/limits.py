"""What the same work costs with no manager at all: the least that the machine allows, measured beside the managers."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench.machine import Ends, Starts, memory, run_timed
from tests.bench.wires import Wire
from tests.harness import wait_until

SECONDS = 120.0
"""A bound."""

BARE_BOOT = """\
import os, sys
script, fifo, *names = sys.argv[1:]
for name in names:
    os.posix_spawn("/bin/sh", ["/bin/sh", script, fifo, name], os.environ)
"""

COPY = """\
import fcntl, os, sys, termios, time
fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 1 << 20)
folder, size, keep = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
number = 0
while True:
    path = f"{folder}/{number % (keep + 1)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    left = size
    while left:
        waiting = int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), sys.byteorder)
        if 0 < waiting < 1 << 19:
            time.sleep(0.0003)  # a copy of more at once costs less
        done = os.splice(0, fd, min(left, 1 << 20))
        if not done:
            sys.exit()
        left -= done
    os.close(fd)
    number += 1
"""

ECHO = """\
import select, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(100)
answer, poll, open = b"x" * int(sys.argv[2]) + b"\\n", select.epoll(), {}
poll.register(listener, select.EPOLLIN)
while True:
    for fd, _ in poll.poll():
        if fd == listener.fileno():
            connection = listener.accept()[0]
            open[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
            continue
        try:
            asked = open[fd].recv(65536)
            if asked:
                open[fd].sendall(answer)
        except ConnectionError:
            asked = b""
        if not asked:
            poll.unregister(fd)
            open.pop(fd).close()
"""

PYTHON = (sys.executable, "-I", "-S")


def restart() -> float:
    """Kill, wait for the end by a pidfd, start again; milliseconds to the first instruction."""
    with Starts() as starts:
        argv = starts.argv("bare")
        first = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        starts.wait(1, SECONDS)
        ended = select.poll()
        fd = os.pidfd_open(first.pid)
        ended.register(fd, select.POLLIN)
        at = time.monotonic()
        first.kill()
        ended.poll(SECONDS * 1000)
        first.wait(1)
        second = os.posix_spawn(argv[0], argv, os.environ)
        start = starts.wait(1, SECONDS)[0]
        os.close(fd)
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        return (start.at - at) * 1000


def boot_and_stop(names: Sequence[str]) -> tuple[float, float]:
    """Seconds for a bare interpreter that starts children and does nothing else; and from a SIGTERM for their group
    until all have gone."""
    with Starts() as starts:
        _shell, script, fifo, _name = starts.argv("")
        begun = time.monotonic()
        command = [*PYTHON, "-c", BARE_BOOT, script, fifo, *names]
        process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        try:
            found = starts.wait(len(names), SECONDS)
            process.wait(SECONDS)
            with Ends([start.pid for start in found]) as ends:
                signalled = time.monotonic()
                os.killpg(process.pid, signal.SIGTERM)
                gone = ends.wait(SECONDS, "bare children did not end")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return found[-1].at - begun, gone - signalled


def command() -> float:
    """Seconds for the start and end of an interpreter."""
    return run_timed([sys.executable, "-c", "pass"], os.environ)[0]


def interpreter_memory(field: str) -> float:
    """Megabytes of an interpreter that does nothing; `field` as in machine.memory."""
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory([process.pid], field)
        process.communicate()
    return found


@contextmanager
def copying(writer: Sequence[str], size: int, keep: int) -> Iterator[tuple[int, int]]:
    """splice(2) from a writer into files of `size` bytes, the oldest taken anew: the pids of writer and copier."""
    with tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp") as folder:
        first = subprocess.Popen(writer, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert first.stdout is not None
        second = subprocess.Popen([*PYTHON, "-c", COPY, folder, str(size), str(keep)], stdin=first.stdout)
        first.stdout.close()
        try:
            yield first.pid, second.pid
        finally:
            for process in (first, second):
                process.kill()
                process.wait()


class Lines(Wire):
    """What the echo answers: a line."""

    def whole(self, data: bytes) -> bool:
        return data.endswith(b"\n")


@contextmanager
def echo(size: int) -> Iterator[Wire]:
    """The least that can answer: an interpreter that sends `size` bytes back for whatever it gets."""
    with tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp") as folder:
        path = f"{folder}/s"
        process = subprocess.Popen([*PYTHON, "-c", ECHO, path, str(size)], stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: _listens(path), SECONDS, "the echo listens")
            yield Lines(path, b'{"jsonrpc":"2.0","id":1,"method":"status","params":{"names":["p000"]}}\n')
        finally:
            process.kill()
            process.wait()


def _listens(path: str) -> bool:
    if not Path(path).exists():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0

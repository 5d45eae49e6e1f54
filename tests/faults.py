"""System calls of a real daemon that fail, or hang, when a test wants them to: seccomp_unotify(2), no tool needed.

The daemon is started under `tests/programs/under_faults.py`. The kernel then asks this module about each of the named
calls; `Faults.rule` says which error it shall give, or lets it be done.
It knows nothing of procman.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.harness import PROGRAMS

_BY_MACHINE: dict[str, dict[str, int]] = {
    "x86_64": {"clone": 56, "fork": 57, "vfork": 58, "clone3": 435}
    | {"splice": 275, "pwrite64": 18, "fsync": 74, "openat": 257},
    "aarch64": {"clone": 220, "clone3": 435, "splice": 76, "pwrite64": 68, "fsync": 82, "openat": 56},
}
NUMBERS = _BY_MACHINE.get(platform.machine(), {})
"""The calls that can be named here, on this machine."""

HANG = -1
"""What a rule returns instead of an errno."""

FORKS = ("clone", "fork", "vfork", "clone3")

RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1  # linux/seccomp.h
NOTIFICATION = struct.Struct("QIIiIQ6Q")  # id, pid, flags, nr, arch, instruction, arguments
ANSWER = struct.Struct("QqiI")  # id, value, error, flags


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that a thread of process `pid` makes."""

    call: str
    pid: int
    arguments: tuple[int, ...]

    def path(self, argument: int) -> str:
        """What the descriptor that it gives as this argument stands for."""
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{self.arguments[argument]}")
        except OSError:
            return ""

    def text(self, argument: int) -> str:
        """The string that this argument points to, as far as it stands in one page."""
        address = self.arguments[argument]
        try:
            with open(f"/proc/{self.pid}/mem", "rb") as memory:
                memory.seek(address)
                return memory.read(4096 - address % 4096).partition(b"\0")[0].decode(errors="replace")
        except OSError:
            return ""


class Faults:
    """Use it in a `with`, around the whole life of the daemon; `prefix` goes before its command.

    `rule` may be replaced at any time. It returns an errno, or 0 to let the call be done, or HANG: then the call does
    not return before `release`.
    """

    def __init__(self, folder: Path, python: str, *calls: str) -> None:
        self.rule: Callable[[Asked], int] = lambda asked: 0
        self.hanging: list[Asked] = []
        self._held: list[int] = []
        self._listener = -1
        self._names = {NUMBERS[call]: call for call in calls if call in NUMBERS}
        self._path = folder / "faults"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._path))
        self._path.chmod(0o666)
        self._server.listen()
        self._end_read, self._end_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="faults")
        numbers = ",".join(map(str, self._names))
        self.prefix = [python, "-S", "-E", str(PROGRAMS / "under_faults.py"), str(self._path), numbers]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._end_write)
        self._thread.join(20)
        os.close(self._end_read)
        self._server.close()

    def _run(self) -> None:
        select.select([self._server.fileno(), self._end_read], [], [])
        self._server.setblocking(False)
        try:
            connection, _ = self._server.accept()
        except BlockingIOError:
            return
        with connection:
            connection.setblocking(True)
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        self._listener = descriptors[0]
        try:
            self._answer_all()
        finally:
            os.close(self._listener)

    def release(self) -> None:
        """Lets all that hangs be done, and what comes too."""
        self.rule = lambda asked: 0
        while self._held:
            self._send(self._held.pop(), 0)
        self.hanging.clear()

    def _send(self, number: int, error: int) -> None:
        try:
            fcntl.ioctl(self._listener, SEND, ANSWER.pack(number, 0, -error, 0 if error else CONTINUE))
        except OSError as problem:
            if problem.errno != errno.ENOENT:  # it was killed meanwhile
                raise

    def _answer_all(self) -> None:
        listener = self._listener
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._end_read, 0)  # POLLHUP comes unasked
        while True:
            events = dict(poll.poll())
            if self._end_read in events or events.get(listener, 0) & select.POLLHUP:
                return
            record = bytearray(NOTIFICATION.size)
            try:
                fcntl.ioctl(listener, RECEIVE, record)
            except OSError as problem:
                if problem.errno == errno.ENOENT:  # it was killed meanwhile
                    continue
                raise
            number, pid, _, call, _, _, *arguments = NOTIFICATION.unpack(record)
            asked = Asked(self._names[call], process_of(pid), tuple(arguments))
            error = self.rule(asked)
            if error == HANG:
                self._held.append(number)
                self.hanging.append(asked)
            else:
                self._send(number, error)


def process_of(thread: int) -> int:
    """The process that a thread belongs to; 0 when it has gone."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("\nTgid:")[2].split(None, 1)[0])

"""Processes that are not the keeper's children: those of programs that an earlier keeper had started, by pidfd.

wait4(2) knows nothing of them: whoever became their parent reaps them. A pidfd (pidfd_open(2)) becomes readable when
its process has ended, and it is never somebody else's. This module knows processes; it must not know children, nor the
wire.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
from collections.abc import Callable

from procman.keeper import tree

INFO_SIZE = 64
"""Bytes of the first struct pidfd_info (linux/pidfd.h): `mask` is its first field, `exit_code` its last."""

GET_INFO = 3 << 30 | INFO_SIZE << 16 | 0xFF << 8 | 11
"""The ioctl PIDFD_GET_INFO, _IOWR(0xFF, 11, struct pidfd_info): Linux 6.13."""

INFO_EXIT = 1 << 3
"""PIDFD_INFO_EXIT: asks for the exit status of a process that has been reaped, and says that it is there (Linux
6.15)."""

EXIT_FIELD = 49
"""Where /proc/PID/stat shows the wait status, counted from the field after the name: field 52 of proc(5)."""


class Watch:
    """Pidfds in the selector of the keeper's loop, one for each process."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._watched: dict[tuple[int, int], int] = {}

    def add(self, pid: int, start: int, ended: Callable[[int], None]) -> bool:
        """Have `ended` called, once, with the pidfd when the process has ended. `start` is in clock ticks since boot.

        False: it has ended already, and `ended` is not called. Raises OSError when no descriptor is free.
        """
        key = (pid, start)
        if key in self._watched:
            return True
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        process = tree.read_process(pid)
        if process is None or process.start != start:
            os.close(fd)
            return False
        self._watched[key] = fd
        self._selector.register(fd, selectors.EVENT_READ, lambda events: self._over(key, ended))
        return True

    def _over(self, key: tuple[int, int], ended: Callable[[int], None]) -> None:
        fd = self._watched.pop(key)
        self._selector.unregister(fd)
        try:
            ended(fd)
        finally:
            os.close(fd)


def exit_status(pidfd: int, pid: int, start: int) -> int | None:
    """The wait status of a process that has ended, or None where nobody can know it any more.

    A zombie shows it in /proc/PID/stat; once its parent has reaped it, the pidfd tells (from Linux 6.15 on).
    """
    status = _from_stat(pid, start)
    return _from_pidfd(pidfd) if status is None else status


def _from_pidfd(pidfd: int) -> int | None:
    info = bytearray(INFO_SIZE)
    struct.pack_into("=Q", info, 0, INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, GET_INFO, info)
    except OSError:
        return None
    told: int = struct.unpack_from("=Q", info, 0)[0]
    status: int = struct.unpack_from("=i", info, INFO_SIZE - 4)[0]
    return status if told & INFO_EXIT else None


def _from_stat(pid: int, start: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) <= EXIT_FIELD or fields[0] != b"Z" or int(fields[19]) != start:
        return None
    return int(fields[EXIT_FIELD])

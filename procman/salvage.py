"""Descriptors out of the hands of living processes: log pipes and listening sockets that an earlier daemon had held.

A program that outlived its daemon still has them open. Whoever may look at the program (proc(5)) can open its pipes
again, and who may trace it (ptrace(2)) can copy its sockets: root, and the same user where no security module forbids
it. This module knows descriptors. It must not know what they are for.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress

SYS_PIDFD_GETFD = 438
"""The same on every architecture (pidfd_getfd(2), Linux 5.6)."""

_libc = ctypes.CDLL(None, use_errno=True)


def reopen_pipe(pids: Iterable[int], inode: int) -> tuple[int, int] | None:
    """The pipe with this inode, as one of these processes has it open, in the form of `logs.make_pipe`: (read end,
    non-blocking; an end that reads and writes, blocking). None where none of them has it, or lets us look."""
    wanted = f"pipe:[{inode}]"
    for pid in pids:
        for path, target in _descriptors(pid):
            if target != wanted:
                continue
            with suppress(OSError):
                return _reopened(path, inode)
    return None


def _reopened(path: str, inode: int) -> tuple[int, int]:
    both = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.fstat(both).st_ino != inode:
            raise FileNotFoundError(path)
        os.set_blocking(both, True)
        return os.open(f"/proc/self/fd/{both}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), both
    except BaseException:
        os.close(both)
        raise


def own_pipe(pid: int, number: int) -> int:
    """The inode of the pipe that is descriptor `number` of `pid`, if it looks like one of ours: made by this user, and
    open for reading and writing. 0 for anything else."""
    try:
        found = os.stat(f"/proc/{pid}/fd/{number}")
        with open(f"/proc/{pid}/fdinfo/{number}") as file:
            flags = re.search(r"^flags:\s*([0-7]+)", file.read(), re.MULTILINE)
    except OSError:
        return 0
    ours = stat.S_ISFIFO(found.st_mode) and found.st_uid == os.geteuid()
    both = flags is not None and int(flags[1], 8) & os.O_ACCMODE == os.O_RDWR
    return found.st_ino if ours and both else 0


def listening_sockets(pid: int) -> Iterator[socket.socket]:
    """Copies of the listening sockets of `pid`, one after the other; each is closed when the next one is asked for,
    unless the caller has detached it. Raises PermissionError where that is not allowed."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        for path, target in _descriptors(pid):
            if not target.startswith("socket:["):
                continue
            fd = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, int(os.path.basename(path)), 0))
            if fd < 0:
                error = ctypes.get_errno()
                if error == 1:  # EPERM. Anything else: it was closed meanwhile, or none is free here
                    raise PermissionError(error, os.strerror(error))
                continue
            with socket.socket(fileno=fd) as sock:
                if _listens(sock):
                    yield sock
    finally:
        os.close(pidfd)


def _listens(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # no such option: a netlink socket, say
        return False


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """(path in /proc, what it is) of each open descriptor of `pid`, as far as we may look."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in sorted(names, key=int):
        with suppress(OSError):
            yield f"/proc/{pid}/fd/{name}", os.readlink(f"/proc/{pid}/fd/{name}")

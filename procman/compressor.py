"""Compresses rotated log files, as a process of its own beside the daemon: `python -I -S compressor.py`.

Its standard output is a Unix socket. Each message that comes there brings two descriptors (SCM_RIGHTS, unix(7)): what
to read, and what to write. It answers each with one message: empty when the gzip file (RFC 1952) is complete and on the
disk, else why not. It ends when the other end is closed.

It opens no file and knows no name, so nobody can lead it astray. It takes a processor, and a disk, only when nobody
else needs them. Not a thread of the supervisor: one that runs so seldom would hold the interpreter's lock while it
waits for its turn, and everybody else with it.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import zlib

CHUNK = 256 * 1024
LEVEL = 6
"""As gzip(1)."""

MESSAGE_MAX = 300
NICE = 19
IOPRIO_IDLE = 3 << 13
"""IOPRIO_CLASS_IDLE (ioprio_set(2)): the disk is ours when nobody else has asked for it lately."""

IOPRIO_SET = {"x86_64": 251, "i686": 289, "ppc64le": 273, "s390x": 282}
IOPRIO_SET_USUALLY = 30
"""The number of the system call on all newer architectures (aarch64, riscv64, loongarch64)."""


class Deserted(Exception):
    """Nobody waits for the answer any more."""


def main() -> int:
    """Works until the other end of the socket is closed. Returns the exit status."""
    step_back()
    with socket.socket(fileno=1) as wire:
        while True:
            message, descriptors, _, _ = socket.recv_fds(wire, 1, 2)
            if not message:
                return 0
            try:
                answer = work(descriptors, wire)
            except Deserted:
                return 0
            finally:
                for fd in descriptors:
                    os.close(fd)
            wire.send(answer.encode()[:MESSAGE_MAX] or b"\0")


def step_back() -> None:
    """Lets everybody else go first, as far as the kernel allows."""
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    number = IOPRIO_SET.get(os.uname().machine, IOPRIO_SET_USUALLY)
    ctypes.CDLL(None).syscall(number, 1, 0, IOPRIO_IDLE)  # may be forbidden: then it is only nice


def work(descriptors: list[int], wire: socket.socket) -> str:
    """Why it could not be done; "" when it was."""
    if len(descriptors) != 2:
        return "no descriptor is free"
    try:
        source, target = descriptors
        compress(source, target, wire)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def compress(source: int, target: int, wire: socket.socket) -> None:
    """Writes a gzip file that names the time of `source`. Raises OSError, or Deserted."""
    poll = select.poll()
    poll.register(wire, select.POLLRDHUP)
    seconds = int(os.fstat(source).st_mtime) & 0xFFFFFFFF
    write(target, b"\x1f\x8b\x08\x00" + seconds.to_bytes(4, "little") + b"\x00\x03")
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    length = checksum = 0
    while data := os.pread(source, CHUNK, length):
        if poll.poll(0):
            raise Deserted
        length += len(data)
        checksum = zlib.crc32(data, checksum)
        write(target, packer.compress(data))
    write(target, packer.flush())
    write(target, checksum.to_bytes(4, "little") + (length & 0xFFFFFFFF).to_bytes(4, "little"))
    os.fsync(target)
    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)


def write(target: int, data: bytes) -> None:
    """All of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


if __name__ == "__main__":
    sys.exit(main())

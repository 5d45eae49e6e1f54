"""On which disk a path lies, found out without touching that disk.

stat(2) on a disk that hangs (NFS, a frozen file system) hangs too, and so would whoever asks. The kernel's list of
mounts (/proc/self/mountinfo, proc(5)) is in memory. What is told is good enough to keep work for one disk apart from
work for another: a symlink that leads to another disk is not followed. It knows nothing of what is on a disk.
"""

from __future__ import annotations

import re
import time

FRESH_SECONDS = 1.0
"""For how long the list of mounts is not read again: a table of 1,000 programs asks 1,000 times."""

_OCTAL = re.compile(rb"\\([0-7]{3})")

_known: tuple[float, list[tuple[str, str]]] = (-FRESH_SECONDS, [])


def of(path: str) -> str:
    """What names the disk that the absolute `path` is on: the device number of its mount, "8:1". "" where the mounts
    can't be read."""
    global _known
    read_at, mounts = _known
    if time.monotonic() - read_at >= FRESH_SECONDS:
        mounts = _read()
        _known = (time.monotonic(), mounts)
    return disk_of(path, mounts)


def disk_of(path: str, mounts: list[tuple[str, str]]) -> str:
    """`of`, given the mounts: (mount point, device), in the order in which they were made. The last of the longest
    mount points above `path` counts: it hides what was mounted there before."""
    best, disk = -1, ""
    for point, device in mounts:
        above = point.rstrip("/") + "/"
        if len(above) >= best and f"{path}/".startswith(above):
            best, disk = len(above), device
    return disk


def parse(text: bytes) -> list[tuple[str, str]]:
    """(mount point, device) of each line of a mountinfo file; odd characters stand there as octal escapes."""
    found = []
    for line in text.splitlines():
        fields = line.split(b" ")
        if len(fields) > 4:
            point = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            found.append((point.decode(errors="surrogateescape"), fields[2].decode()))
    return found


def _read() -> list[tuple[str, str]]:
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            return parse(file.read())
    except OSError:
        return []

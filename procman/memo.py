"""JSON documents in memory files (memfd_create(2)): what a supervisor has the keeper hold for the next one.

A document that is handed over before something is done about it outlives a SIGKILL in the midst of that, and no disk
is asked. Knows nothing of what the documents say.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of a document. The largest, tables with all that they include, have some megabytes."""


def write(name: str, document: object) -> int:
    """A descriptor of a memory file that holds `document`; `name` is for people who look into /proc. Raises OSError."""
    fd = os.memfd_create(f"procman-{name}", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    return fd


def same(one: int, other: int) -> bool:
    """Whether two memory files hold the same. Raises OSError."""
    sizes = os.fstat(one).st_size, os.fstat(other).st_size
    return sizes[0] == sizes[1] and os.pread(one, sizes[0], 0) == os.pread(other, sizes[1], 0)


def read(fd: int) -> Any:
    """What `write` wrote, on whatever copy of its descriptor. Closes `fd`. Raises OSError, and ValueError for what is
    no JSON, or too large or too deep to have been written."""
    with open(fd, "rb", buffering=0) as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no memory")
        if about.st_size > MAX_SIZE:
            raise ValueError(f"it is too large: {about.st_size} bytes")
        file.seek(0)
        content = file.read(MAX_SIZE)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None

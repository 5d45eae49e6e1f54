"""JSON documents in memory files (memfd_create(2)): what a supervisor has the keeper hold for the next one.

A document that is handed over before something is done about it outlives a SIGKILL in the midst of that, and no disk
is asked. Knows nothing of what the documents say.
"""

from __future__ import annotations

import json
import os
from typing import Any


def write(name: str, document: object) -> int:
    """A descriptor of a memory file that holds `document`; `name` is for people who look into /proc. Raises OSError."""
    fd = os.memfd_create(f"procman-{name}", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    return fd


def read(fd: int) -> Any:
    """What `write` wrote, on whatever copy of its descriptor. Closes `fd`. Raises OSError, and ValueError for what is
    no JSON."""
    with open(fd, "rb") as file:
        file.seek(0)
        return json.loads(file.read())

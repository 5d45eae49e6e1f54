"""Other daemons that write the same log files: each rotates them under the other's hands.

Two daemons may share a `log_dir`, as long as their programs have other names. Nothing in the folder tells who writes
there, so it is looked for in what other supervisors have open (proc(5)): as far as this user may see that.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

SUPERVISOR = (b"procman.daemon", b"supervisor")
"""Words of the command line of every supervisor."""


def writers(paths: Collection[str], keeper: int) -> dict[str, int]:
    """Which of these log files the supervisor of another daemon than that of `keeper` has open now, and its pid."""
    wanted = {os.path.realpath(path): path for path in paths}
    found: dict[str, int] = {}
    for pid in _others(keeper) if wanted else ():
        for target in _open_files(pid):
            if target in wanted:
                found.setdefault(wanted[target], pid)
    return found


def _others(keeper: int) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has gone
        if all(word in words for word in SUPERVISOR) and parent != keeper:
            yield int(name)


def _open_files(pid: int) -> Iterator[str]:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # it has gone, or is another user's
    for name in names:
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue

"""The boundaries that a supervisor crosses: moments between which a SIGKILL makes a difference.

Each is named where it is crossed: `crossing("state renamed")` stands right before or behind the step that it names.
There is one at each message to and from the keeper, each write of the state file, each transition of a process, each
step of a log rotation and each RPC request and reply. A test counts them, and lets the supervisor die at any of them
(`daemon`, tests/guarantees/crash.py). Outside of tests nobody watches, and a crossing does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

watcher: Callable[[str], None] | None = None
"""Called with the name of each crossing, in the thread that makes it."""


def crossing(name: str) -> None:
    """The boundary `name` is crossed now."""
    if watcher is not None:
        watcher(name)

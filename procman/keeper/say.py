"""What the keeper says: lines on stderr, its only log. It knows nothing of what it is about."""

from __future__ import annotations

import os
import signal
import sys


def say(text: str) -> None:
    """A line on stderr. Nobody may be there to read it."""
    try:
        print(f"procmand: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def describe(status: int) -> str:
    """A wait status in words: "exit status 3", "killed by SIGKILL"."""
    if os.WIFSIGNALED(status):
        try:
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        except ValueError:
            return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"

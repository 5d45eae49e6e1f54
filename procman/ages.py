"""Processes that are to be replaced when they are old (`max_age`): one timer each.

When it is due it says so; `rollout` knows how a process is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from procman.config import Program
from procman.lifecycle import State, Status, spread
from procman.process import Process

SPREAD = 0.1
"""Processes that started together are not replaced together: so much of `max_age` earlier or later."""


def due(program: Program, status: Status) -> float | None:
    """When the child of `status` is too old, on its clock; None: never, or there is no such child. Pure."""
    if program.max_age <= 0 or status.state is not State.RUNNING:
        return None
    return status.started + program.max_age * _spread(program.name, status.generation)


def _spread(name: str, generation: int) -> float:
    """Around 1, always the same for the same child."""
    return 1 - SPREAD + 2 * SPREAD * spread(f"{name}/{generation}")


class Ages:
    """Calls `replace` with each process whose time has come."""

    def __init__(self, replace: Callable[[Process], None]) -> None:
        self._replace = replace
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def watch(self, process: Process, *, again: float = 0.0) -> None:
        """Set its timer to what its status and its program ask for now, but not before some `again` seconds."""
        timer = self._timers.pop(process.name, None)
        if timer is not None:
            timer.cancel()
        at = due(process.program, process.status)
        if at is not None:
            loop = asyncio.get_running_loop()
            later = loop.time() + again * _spread(process.name, process.status.generation)
            self._timers[process.name] = loop.call_at(max(at, later), self._replace, process)

    def forget(self, name: str) -> None:
        """The process has left the table."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

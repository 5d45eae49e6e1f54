"""What happened lately: state changes and operations, for `procmanctl events`, in memory."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from procman.moments import rfc3339

KEPT = 1000
"""Events that are remembered."""

Occurrence = dict[str, Any]


class EventLog:
    """The last KEPT events, and who wants to hear of the next ones."""

    def __init__(self) -> None:
        self._recent: collections.deque[Occurrence] = collections.deque(maxlen=KEPT)
        self._subscribers: list[Callable[[Occurrence], None]] = []

    def add(self, at: float, kind: str, name: str, **details: object) -> None:
        """`kind` is "state", "operation" or "daemon"; `at` is seconds since the epoch."""
        event: Occurrence = {"at": rfc3339(at), "type": kind, "name": name, **details}
        self._recent.append(event)
        for subscriber in list(self._subscribers):
            subscriber(event)

    def recent(self) -> list[Occurrence]:
        """Oldest first."""
        return list(self._recent)

    def subscribe(self, callback: Callable[[Occurrence], None]) -> Callable[[], None]:
        """Call `callback` with every event from now on, until what is returned is called."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

"""What happened lately: state changes and operations, for `procmanctl events`, in memory."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from procman.moments import rfc3339
from procman.records import dataclass

KEPT = 1000
"""Events that are remembered."""

Occurrence = dict[str, Any]


@dataclass(slots=True)
class _Held:
    """An event that is told when it is `ready`, and not before those in front of it."""

    event: Occurrence
    ready: bool = False


class EventLog:
    """The last KEPT events, and who wants to hear of the next ones."""

    def __init__(self) -> None:
        self._recent: collections.deque[Occurrence] = collections.deque(maxlen=KEPT)
        self._held: collections.deque[_Held] = collections.deque()
        self._subscribers: list[Callable[[Occurrence], None]] = []

    def follow(self, before: Iterable[Occurrence]) -> None:
        """These come before all others."""
        self._recent.extend(before)

    def add(self, at: float, kind: str, name: str, **details: object) -> None:
        """`kind` is "state", "operation" or "daemon"; `at` is seconds since the epoch."""
        self.hold(at, kind, name, **details)({})

    def hold(self, at: float, kind: str, name: str, **details: object) -> Callable[[Mapping[str, object]], None]:
        """As `add`, but the event is told when what is returned is called, with more details. Events that come later
        wait for it, so it must be called soon, whatever happens."""
        held = _Held({"at": rfc3339(at), "type": kind, "name": name, **details})
        self._held.append(held)

        def tell(more: Mapping[str, object]) -> None:
            held.event.update(more)
            held.ready = True
            while self._held and self._held[0].ready:
                self._tell(self._held.popleft().event)

        return tell

    def _tell(self, event: Occurrence) -> None:
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

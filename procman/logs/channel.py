"""A place that many streams print to: the daemon's stdout or stderr, syslog, the journal.

While it does not take all that one stream has, no other one prints there, and nobody's pipe is emptied: programs slow
down to the pace of the reader. When nothing at all has moved for STALL_SECONDS, it is given up: what comes is dropped
and counted, and nobody waits any more, until it takes something. So each turn looks whether there is room by now, for a
program at full speed loses gigabytes in a second. A place that answers with an error is asked again after a while.

Knows flows and outlets; nothing of files. epoll is the thread's; it tells when there is room.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from procman.crossing import crossing
from procman.logs.flow import Flow
from procman.logs.lines import Piece
from procman.logs.logfile import RETRY_SECONDS, describe
from procman.logs.outlet import Settled

STALL_SECONDS = 1.0
"""How long programs wait for a place that takes nothing, before output is dropped."""

TURN = 64 * 1024
"""Bytes of one turn: a message each, they may take a while."""

MEND_SECONDS = 0.05
"""How soon a place is tried again that is not there, or of which nobody hears when it has room."""


class Place(Protocol):
    """What a channel prints to: see `outlet.Outlet` and `datagrams.Datagrams`."""

    mends: bool
    connections: int
    error: str

    @property
    def fd(self) -> int: ...
    @property
    def coloured(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    def queue(self, pieces: Sequence[Piece]) -> None: ...
    def push(self, settled: Settled) -> None: ...
    def discard(self) -> int: ...
    def close(self) -> None: ...


class Channel:
    """`outlet`, and who waits for it. `name` is for people: "the daemon's stdout". `on_turn` is called when streams may
    print again, or may not."""

    def __init__(self, name: str, outlet: Place, epoll: select.epoll, on_turn: Callable[[], None]) -> None:
        self.outlet = outlet
        self.debtor: Flow | None = None
        self.retry_at = 0.0
        self._idle = f"{name} takes nothing"
        self._epoll = epoll
        self._on_turn = on_turn
        self._stalled_at = 0.0
        self._mend_at = 0.0
        self._given_up = False
        self._registered = (-1, 0)

    @property
    def fd(self) -> int:
        """What epoll tells of when there is room; -1: nothing."""
        return self._registered[0]

    def due(self) -> float | None:
        """When `tick` has something to do."""
        if self.debtor is None:
            return None
        return min(self._stalled_at, self._mend_at) if self.fd < 0 else self._stalled_at

    def tick(self, now: float) -> None:
        """Does what is due."""
        if self.debtor is None:
            return
        if self.fd < 0 and now >= self._mend_at:
            self.go_on(now)
        if self.stalled(now):
            self.give_up(self.outlet.error or self._idle, now)

    def stalled(self, now: float) -> bool:
        """Whether nothing has moved for so long that nobody waits any more."""
        return self.debtor is not None and now >= self._stalled_at

    def turn(self, flow: Flow, now: float, wall: float) -> None:
        """One turn of a stream: what waits is printed, or dropped where that can't be done now."""
        if self._refuses(now):
            flow.drop(self.outlet.error)
            return
        try:
            flow.take(TURN)
        except OSError as error:  # there is no memory
            flow.drop(describe(error))
            return
        self.print(flow, flow.pieces(wall), now)

    def end_line(self, flow: Flow, now: float, wall: float) -> None:
        """A line that has no end yet, closed: no more of it will come. Not while the place is taken; dropped where that
        can't be done now."""
        if self.debtor is not None:
            return
        if flow.held and self._refuses(now):
            flow.give_up(flow.held, self.outlet.error)
        else:
            self.print(flow, flow.pieces(wall, last=True), now)

    def catch_up(self, flow: Flow, now: float, wall: float) -> None:
        """Tells of what was dropped before, if that can be: the program may print no more."""
        if self.debtor is None and not self._refuses(now):
            self.print(flow, [flow.marker(wall)], now)

    def print(self, flow: Flow, pieces: list[Piece], now: float) -> None:
        if pieces:
            self.outlet.queue(pieces)
            self._stalled_at = now + STALL_SECONDS
            self._push(flow, now)

    def go_on(self, now: float) -> None:
        """There is room, perhaps. Where epoll says so and it is not true (ENOBUFS), it is not asked for a while."""
        if self.debtor is not None:
            moved = self._push(self.debtor, now)
            if not moved:
                self._watch(-1)

    def give_up(self, reason: str, now: float) -> None:
        """Drops what the place did not take, and what comes, until there is room."""
        if self.debtor is not None:
            self._give_up(self.debtor, reason, now)

    def forget(self) -> None:
        """What waits here stays where it came from, for whoever goes on."""
        if self.debtor is not None:
            self.outlet.discard()
            self.debtor.rewind()
            self._owe(None)

    def let_go(self) -> None:
        """Its descriptor will be another one: epoll must not know it any more, and it is worth a try."""
        self._watch(-1)
        self.retry_at, self._given_up = 0.0, False

    def _refuses(self, now: float) -> bool:
        """Whether it was given up and would take nothing now either. Waits for nothing."""
        if now < self.retry_at:
            return True
        return self._given_up and self.outlet.fd >= 0 and not _has_room(self.outlet.fd)

    def _push(self, flow: Flow, now: float) -> bool:
        moved = False

        def settled(own: int, told: int) -> None:
            nonlocal moved
            moved = True
            crossing("log sent")
            flow.settle(own, told)

        self.outlet.push(settled)
        now = max(now, time.monotonic())  # that may have taken long: it is no time in which nothing moved
        flow.publish()
        if moved:
            self._stalled_at = now + STALL_SECONDS
            self._given_up = False
        self._mend_at = now + MEND_SECONDS
        if self.outlet.waiting and (self._given_up or (self.outlet.error and not self.outlet.mends)):
            self._give_up(flow, self.outlet.error or self._idle, now)
        else:
            self._owe(flow if self.outlet.waiting else None)
        return moved

    def _give_up(self, flow: Flow, reason: str, now: float) -> None:
        flow.give_up(self.outlet.discard(), reason)
        flow.publish()
        if self.outlet.error:
            self.retry_at = now + (MEND_SECONDS if self.outlet.mends else RETRY_SECONDS)
        self.outlet.error = reason
        self._given_up = True
        self._owe(None)

    def _owe(self, debtor: Flow | None) -> None:
        before, self.debtor = self.debtor, debtor
        self._watch(-1 if debtor is None else self.outlet.fd)
        if (before is None) != (debtor is None):
            self._on_turn()

    def _watch(self, fd: int) -> None:
        wanted = (fd, self.outlet.connections if fd >= 0 else 0)
        if wanted == self._registered:
            return
        if self._registered[0] >= 0:
            with suppress(OSError):  # it is closed, or another one of the same number
                self._epoll.unregister(self._registered[0])
        if fd >= 0:
            self._epoll.register(fd, select.EPOLLOUT)
        self._registered = wanted


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))

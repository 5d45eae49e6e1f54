"""The supervisor's end of the wire to the keeper: requests go out, the snapshot and then events come in.

It decides nothing. See `keeper/wire.py` for the messages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from procman.keeper.wire import Message, Wire, WireClosed, WireError

log = logging.getLogger("procman")


@dataclass(slots=True)
class Snapshot:
    """What the keeper holds when a supervisor comes up. `held` descriptors belong to the receiver.

    `starts` counts supervisors, this one included: 1 means that the daemon itself has just been started. Children may
    be there even so: `adopted` names the processes whose child an earlier keeper had started, each with what was lost,
    and `changed` those of them that the table now describes otherwise.
    """

    starts: int = 1
    last: str = ""
    cgroup: str = ""
    keeper_pid: int = 0
    children: dict[str, Message] = field(default_factory=dict)
    adopted: dict[str, list[str]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    held: dict[str, int] = field(default_factory=dict)


class KeeperLink:
    """One connection to the keeper, for as long as this supervisor lives."""

    def __init__(self, descriptor: int) -> None:
        self._wire = Wire(socket.socket(fileno=descriptor))
        os.set_inheritable(descriptor, False)
        self._loop = asyncio.get_running_loop()
        self._on_event: Callable[[Message], None] | None = None
        self._on_end: Callable[[], None] = lambda: None
        self._early: list[Message] = []
        self._syncs: dict[int, asyncio.Future[None]] = {}

    async def snapshot(self) -> Snapshot:
        """The keeper's account of everything; it comes first, once. Raises WireError."""
        snapshot = Snapshot()
        await self._early_until(lambda message, descriptors: _collect(snapshot, message, descriptors))
        return snapshot

    async def adopt(self, house: int, last: int, requests: Iterable[Message]) -> dict[str, Message]:
        """Have the keeper tag its children with `house` and numbers above `last`, and take over what an earlier keeper
        had started. Returns the records of those that it took, as in the snapshot. Comes before `listen`."""
        self.send({"op": "house", "house": house, "last": last})
        for request in requests:
            self.send({"op": "adopt", **request})
        self.send({"op": "sync", "number": 0})
        records: dict[str, Message] = {}

        def collect(message: Message, _descriptors: list[int]) -> bool:
            match message:
                case {"op": "child", "child": str(name)}:
                    records[name] = message
                case {"op": "synced", "number": 0}:
                    return True
                case _:
                    self._early.append(message)
            return False

        await self._early_until(collect)
        return records

    async def _early_until(self, collect: Callable[[Message, list[int]], bool]) -> None:
        """Give each message to `collect` until it says that this was the last one; what comes after is for `listen`."""
        readable = asyncio.Event()
        self._loop.add_reader(self._wire.fileno(), readable.set)
        complete = False
        while not complete:
            await readable.wait()
            readable.clear()
            for message, descriptors in self._wire.receive():
                if complete:
                    self._early.append(message)
                else:
                    complete = collect(message, descriptors)
                for fd in descriptors:  # all that were not taken
                    os.close(fd)
        self._loop.remove_reader(self._wire.fileno())

    def listen(self, on_event: Callable[[Message], None], on_end: Callable[[], None]) -> None:
        """From now on call `on_event` with each message, and `on_end` when the keeper has gone."""
        self._on_event, self._on_end = on_event, on_end
        early, self._early = self._early, []
        for message in early:
            self._take(message)
        self._loop.add_reader(self._wire.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            messages = self._wire.receive()
        except WireError:
            self._loop.remove_reader(self._wire.fileno())
            self._on_end()
            return
        for message, descriptors in messages:
            for fd in descriptors:
                os.close(fd)
            self._take(message)

    def _take(self, message: Message) -> None:
        assert self._on_event is not None
        if message.get("op") == "ping":
            self.send({"op": "pong"})
        elif message.get("op") == "synced":
            if (future := self._syncs.pop(message["number"], None)) is not None and not future.done():
                future.set_result(None)
        else:
            try:
                self._on_event(message)
            except Exception:  # the messages behind it are about other processes
                log.exception("a message of the keeper was not taken in: %s", message)

    def send(self, message: Message, *descriptors: int) -> None:
        """Send one message; never blocks. A keeper that has gone is reported by `on_end`, not here.

        Raises WireError for a message that is too large.
        """
        try:
            self._wire.send(message, descriptors)
        except WireClosed:
            return
        if self._wire.waiting:
            self._loop.add_writer(self._wire.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            self._wire.flush()
        except WireError:
            self._loop.remove_writer(self._wire.fileno())
            return
        if not self._wire.waiting:
            self._loop.remove_writer(self._wire.fileno())

    async def sync(self) -> None:
        """Wait until the keeper has done all that was asked of it so far."""
        number = max(self._syncs, default=0) + 1
        self._syncs[number] = self._loop.create_future()
        self.send({"op": "sync", "number": number})
        await self._syncs[number]

    # --- what can be asked ------------------------------------------------------------------------------------------

    def spawn(self, request: Mapping[str, object]) -> None:
        """Start a child (`launch.request`)."""
        self.send({"op": "spawn", **request})

    def signal(self, child: str, number: int, tree: bool = False) -> None:
        """Send a signal to a child, or to all that is left of it and its descendants."""
        self.send({"op": "signal", "child": child, "signal": number, "tree": tree})

    def forget(self, child: str) -> None:
        """The end of this child is on record: the keeper need not tell it again."""
        self.send({"op": "forget", "child": child})

    def note(self, child: str, text: str) -> None:
        """The keeper remembers `text` with this child, for the next supervisor."""
        self.send({"op": "note", "child": child, "note": text})

    def hold(self, name: str, descriptor: int) -> None:
        """Give the keeper a copy of `descriptor` to keep under `name`."""
        self.send({"op": "hold", "name": name}, descriptor)

    def release(self, name: str) -> None:
        """The keeper closes what it holds as `name`."""
        self.send({"op": "release", "name": name})


def _collect(snapshot: Snapshot, message: Message, descriptors: list[int]) -> bool:
    match message:
        case {"op": "hello"}:
            snapshot.starts = int(message["starts"])
            snapshot.last = str(message["last"])
            snapshot.cgroup = str(message["cgroup"])
            snapshot.keeper_pid = int(message["pid"])
        case {"op": "child", "child": str(name)}:
            snapshot.children[name] = message
        case {"op": "held", "name": str(name)} if descriptors:
            snapshot.held[name] = descriptors.pop()
        case {"op": "begin"}:
            return True
    return False

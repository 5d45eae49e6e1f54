"""The supervisor's end of the wire to the keeper: requests go out, events come in. `snapshot` has come before them.

It decides nothing. See `keeper/wire.py` for the messages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Callable, Iterable, Mapping, Sequence

from procman import memo
from procman.crossing import crossing
from procman.keeper.wire import Message, Wire, WireClosed, WireError

log = logging.getLogger("procman")


class KeeperLink:
    """One connection to the keeper, for as long as this supervisor lives. `early` came on the wire already."""

    def __init__(self, wire: Wire, early: Sequence[Message] = ()) -> None:
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self._on_event: Callable[[Message], None] | None = None
        self._on_end: Callable[[], None] = lambda: None
        self.on_lost: Callable[[list[str]], None] = lambda names: None
        self._early = list(early)
        self._syncs: dict[int, asyncio.Future[None]] = {}

    async def adopt(self, house: int, last: int, requests: Iterable[Message]) -> dict[str, Message]:
        """Have the keeper tag its children with `house` and numbers above `last`, and take over what an earlier keeper
        had started. Returns the records of those that it took, as in the snapshot. Comes before `listen`."""
        self.send({"op": "house", "house": house, "last": last})
        for request in requests:
            self.send({"op": "adopt", **request})
        self.send({"op": "sync", "number": 0})
        records: dict[str, Message] = {}
        readable = asyncio.Event()
        self._loop.add_reader(self._wire.fileno(), readable.set)
        complete = False
        while not complete:
            await readable.wait()
            readable.clear()
            for message, descriptors in self._wire.receive():
                match message:
                    case {"op": "child", "child": str(name)} if not complete:
                        records[name] = message
                    case {"op": "synced", "number": 0}:
                        complete = True
                    case _:
                        self._early.append(message)
                for fd in descriptors:
                    os.close(fd)
        self._loop.remove_reader(self._wire.fileno())
        return records

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
        crossing(f"hear {message.get('op')}")
        try:
            match message:
                case {"op": "ping"}:
                    self.send({"op": "pong"})
                case {"op": "lost", "names": list(names)}:
                    self.on_lost([str(name) for name in names])
                case {"op": "synced", "number": int(number)}:
                    if (future := self._syncs.pop(number, None)) is not None and not future.done():
                        future.set_result(None)
                case _:
                    self._on_event(message)
        except WireError as error:
            log.error("a message of the keeper was not taken in: %s", error)
        except Exception:  # the messages behind it are about other processes
            log.exception("a message of the keeper was not taken in: %.300s", message)

    def send(self, message: Message, *descriptors: int) -> None:
        """Send one message; never blocks. A keeper that has gone is reported by `on_end`, not here.

        Raises WireError for a message that is too large.
        """
        crossing(f"tell {message['op']}")
        try:
            self._wire.send(message, descriptors)
        except WireClosed:
            return
        crossing(f"told {message['op']}")
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

    def stand_still(self) -> None:
        """Tell the keeper that all work is put down, and do nothing at all until it says "resume": the event loop does
        not run. What it says meanwhile is taken in afterwards (`_after_all`). It ends this process, or the upgrade, in
        bounded time."""
        self.send({"op": "yielded"})
        poll = select.poll()
        heard: list[Message] = []
        try:
            while True:
                poll.register(self._wire.fileno(), select.POLLIN | (select.POLLOUT if self._wire.waiting else 0))
                poll.poll()
                self._wire.flush()
                for message, descriptors in self._wire.receive():
                    for fd in descriptors:
                        os.close(fd)
                    heard.append(message)
                    if message.get("op") == "resume":
                        for each in _after_all(heard):
                            self._loop.call_soon(self._take, each)
                        return
        except WireError:
            self._loop.call_soon(self._on_end)

    # --- what can be asked ------------------------------------------------------------------------------------------

    def obeyed(self, number: int) -> None:
        """What signal `number` to procmand asked for is done, or on record: the keeper need not tell it again."""
        self.send({"op": "obeyed", "signal": number})

    def spawn(self, request: Mapping[str, object]) -> None:
        """Start a child (`launch.request`)."""
        self.send({"op": "spawn", **request})

    def signal(self, child: str, number: int, tree: bool = False, note: str | None = None) -> None:
        """Send a signal to a child, or to all that is left of it and its descendants. With a `note`: see `note`."""
        noted = {} if note is None else {"note": note}
        self.send({"op": "signal", "child": child, "signal": number, "tree": tree, **noted})

    def forget(self, child: str) -> None:
        """The end of this child is on record: the keeper need not tell it again."""
        self.send({"op": "forget", "child": child})

    def note(self, child: str, text: str) -> None:
        """The keeper remembers `text` with this child, for the next supervisor."""
        self.send({"op": "note", "child": child, "note": text})

    def hold(self, descriptors: Mapping[str, int]) -> None:
        """Give the keeper copies of `descriptors` to keep under their names: all, or none when it has no room, which
        `on_lost` is told then. Raises WireError when they can't be copied."""
        self.send({"op": "hold", "names": list(descriptors)}, *descriptors.values())

    def hand_over(self, name: str, document: object, descriptors: Mapping[str, int] | None = None) -> None:
        """Give the keeper `document` to keep as `name` for the next supervisor (`memo`), and `descriptors` with it, all
        or none. That there is no room for it is only said: what it is for goes on."""
        try:
            memory = memo.write(name, document)
            try:
                self.hold({**(descriptors or {}), name: memory})
            finally:
                os.close(memory)
        except (OSError, WireError) as error:
            log.error("a supervisor that replaces this one now would not know of %s: %s", name, error)

    def release(self, name: str) -> None:
        """The keeper closes what it holds as `name`."""
        self.send({"op": "release", "name": name})


def _after_all(heard: Sequence[Message]) -> list[Message]:
    """What still counts of all that the keeper has said while nobody listened. At the end it told how each child
    stands, the newest ones first here; what it said of them before is in that, and would be taken for something
    new."""
    records = {str(message.get("child")): message for message in heard if message.get("op") == "child"}
    others = [message for message in heard if message.get("op") != "child" and message.get("child") not in records]
    return [*reversed(records.values()), *others]

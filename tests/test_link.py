"""The supervisor's end of the wire, with the test as the keeper."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from procman.keeper.wire import MAX_MESSAGE, Message, Wire, WireError
from procman.link import KeeperLink

HELLO: Message = {"op": "hello", "pid": 42, "starts": 3, "last": "killed by SIGKILL", "cgroup": "/c"}


def linked(check: Callable[[KeeperLink, Wire], Coroutine[Any, Any, None]], early: Sequence[Message] = ()) -> None:
    """Runs `check` with a link and the keeper's end, and counts descriptors. `early` came right after the snapshot."""

    async def run() -> None:
        ours, theirs = socket.socketpair()
        keeper = Wire(ours)
        link = KeeperLink(Wire(theirs), early)
        try:
            await asyncio.wait_for(check(link, keeper), 10)
        finally:
            asyncio.get_running_loop().remove_reader(link._wire.fileno())
            asyncio.get_running_loop().remove_writer(link._wire.fileno())
            link._wire.close()  # in procman it lives as long as its process
            keeper.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


async def answer(keeper: Wire) -> list[Message]:
    while not (messages := keeper.receive()):
        await asyncio.sleep(0.001)
    return [message for message, _ in messages]


def test_what_comes_with_the_snapshot_is_not_lost() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        keeper.send({"op": "gone", "child": "a#1"})
        events: list[str] = []
        link.listen(lambda message: events.append(message["op"]), lambda: None)
        assert await answer(keeper) == [{"op": "pong"}]
        while len(events) < 2:
            await asyncio.sleep(0.001)
        assert events == ["spawned", "gone"], "pings are nobody else's"

    linked(check, [{"op": "ping"}, {"op": "spawned", "child": "a#1"}])


def test_an_event_that_can_not_be_taken_in_does_not_take_others_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        events: list[int] = []

        def take(message: Message) -> None:
            if message["number"] == 1:
                raise KeyError("a bug")
            events.append(message["number"])

        link.listen(take, lambda: None)
        for number in range(3):
            keeper.send({"op": "exited", "number": number})
        while len(events) < 2:
            await asyncio.sleep(0.001)
        assert events == [0, 2]

    linked(check)
    assert "a bug" in caplog.text


def test_requests() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        link.listen(lambda message: None, lambda: None)
        link.spawn({"child": "a#1", "argv": ["x"]})
        link.signal("a#1", 15)
        link.signal("a#1", 9, tree=True)
        link.forget("a#1")
        link.release("out")
        assert await answer(keeper) == [
            {"op": "spawn", "child": "a#1", "argv": ["x"]},
            {"op": "signal", "child": "a#1", "signal": 15, "tree": False},
            {"op": "signal", "child": "a#1", "signal": 9, "tree": True},
            {"op": "forget", "child": "a#1"},
            {"op": "release", "name": "out"},
        ]
        read_end, write_end = os.pipe()
        link.hold({"out": write_end})
        os.close(write_end)
        ((message, descriptors),) = keeper.receive()
        assert message == {"op": "hold", "names": ["out"]}
        os.write(descriptors[0], b"x")
        assert os.read(read_end, 1) == b"x"
        os.close(read_end)
        os.close(descriptors[0])

    linked(check)


def test_syncs_are_answered_each_for_itself() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        link.listen(lambda message: None, lambda: None)
        tasks = [asyncio.create_task(link.sync()) for _ in range(3)]
        tasks[1].add_done_callback(lambda task: None)
        await asyncio.sleep(0)
        numbers = [message["number"] for message in await answer(keeper)]
        assert len(set(numbers)) == 3
        tasks[1].cancel()
        for number in (*numbers, 999):
            keeper.send({"op": "synced", "number": number})
        await tasks[0]
        await tasks[2]
        again = asyncio.create_task(link.sync())
        await asyncio.sleep(0)
        (message,) = await answer(keeper)
        keeper.send({"op": "synced", "number": message["number"]})
        await again

    linked(check)


def test_a_keeper_that_does_not_read_blocks_nobody() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        link.listen(lambda message: None, lambda: None)
        for number in range(50):
            link.send({"op": "spawn", "number": number, "filling": "x" * 50_000})
        received: list[int] = []
        while len(received) < 50:
            received += [message["number"] for message in await answer(keeper)]
        assert received == list(range(50))

    linked(check)


def test_the_end_of_the_keeper_is_told_once() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        events: list[Message] = []
        ends: list[None] = []
        link.listen(events.append, lambda: ends.append(None))
        keeper.send({"op": "gone", "child": "last words"})
        keeper.close()
        while not ends:
            await asyncio.sleep(0.001)
        assert events == [{"op": "gone", "child": "last words"}]
        link.forget("a#1")  # no error: `on_end` has said it
        await asyncio.sleep(0.02)
        assert len(ends) == 1

    linked(check)


def test_a_request_that_is_too_large_is_an_error_of_its_own() -> None:
    async def check(link: KeeperLink, keeper: Wire) -> None:
        with pytest.raises(WireError, match="too large"):
            link.spawn({"child": "a#1", "argv": ["x" * MAX_MESSAGE]})

    linked(check)

"""trials.py and sockets.py, and what a new supervisor makes of what one before had begun, with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from procman.config import Address, Config, Daemon, Listener, Program
from procman.rollout import Memo
from procman.rollouts import Rollouts
from procman.sockets import Sockets
from procman.trials import Trials
from tests.harness import free_port, wait_until

FIRST, SECOND = "listener/web", "listener~/web"


class Keeper:
    """Holds names. What it is asked to release it does not close: these are the tests' own."""

    def __init__(self, received: dict[str, int]) -> None:
        self.received = received
        self.names = set(received)
        self.released: list[str] = []

    def take(self, name: str) -> int | None:
        return self.received.pop(name, None)

    def hold(self, descriptors: Mapping[str, int]) -> None:
        self.names |= descriptors.keys()

    def release(self, name: str) -> None:
        self.names.discard(name)
        self.released.append(name)

    def holds(self, name: str) -> bool:
        return name in self.names

    def held(self) -> list[str]:
        return list(self.names)


class Pair:
    """A listener, and its two sockets, as a keeper has them."""

    def __init__(self, listener: Listener, received: dict[str, int]) -> None:
        self.listener = listener
        self.keeper = Keeper(received)
        self.sockets = Sockets(self.keeper, received)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both are open."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(socket.socket()) for _ in range(2))
        for sock in (first, second):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(first.getsockname() if sock is second else ("127.0.0.1", 0))
            sock.listen()
        listener = Listener(name="web", address=Address("tcp", *first.getsockname()))
        pair = Pair(listener, {FIRST: os.dup(first.fileno()), SECOND: os.dup(second.fileno())})
        yield pair
        for name in (FIRST, SECOND):
            pair.sockets.inode(name)  # takes what was not taken
            pair.sockets.lost(name)


def shop(name: str) -> Program:
    return Program(name=name, program="shop", argv=("x",), listen=("web",))


def resumed(pair: Pair, phase: str, successors: dict[str, int]) -> tuple[Keeper, Trials, list[str]]:
    """What a new supervisor makes of a rollout of `successors` in `phase`; its table has shop:1 and shop:2."""
    sockets, trials = pair.sockets, Trials(pair.sockets)
    daemon = Daemon(socket="", state_dir="", log_dir="")
    programs = (shop("shop:1"), shop("shop:2"))
    config = Config(path="", files=(), daemon=daemon, listeners=(pair.listener,), programs=programs)
    closed: list[str] = []
    beside: dict[str, Any] = {}
    supervisor: Any = SimpleNamespace(config=config, places=SimpleNamespace(beside=beside), all=list)
    link: Any = SimpleNamespace(release=closed.append)
    ground: Any = SimpleNamespace(sockets=sockets, trials=trials, close_unused=lambda config: closed.append("unused"))
    rollouts = Rollouts(supervisor, link, ground)
    memos = {"shop:1": Memo(phase, "why", successors, [FIRST], {})}
    rollouts.prepare(memos)
    if not set(successors) & {"shop:1", "shop:2"}:
        rollouts.resume(memos)
    return pair.keeper, trials, closed


@pytest.mark.parametrize("dies", [False, True])
def test_a_socket_that_nobody_comes_to_for_a_moment(dies: bool) -> None:
    """Who had come waits in its queue as before; who comes is not heard until that is over, or the supervisor dies."""
    listener = Listener(name="web", address=Address("tcp", "127.0.0.1", free_port()))
    sockets = Sockets(Keeper({}), {})
    assert not sockets.shut(FIRST)  # it is not open
    with contextlib.ExitStack() as stack:
        sockets.open(listener, "")
        stack.callback(sockets.lost, FIRST)
        asked = (listener.address.host, listener.address.port)
        early = stack.enter_context(socket.create_connection(asked))
        assert sockets.shut(FIRST)
        assert not sockets.shut(FIRST)
        late = stack.enter_context(socket.socket())
        late.setblocking(False)
        assert late.connect_ex(asked) == errno.EINPROGRESS
        assert select.select([], [late], [], 0.1)[1] == []
        assert early.getpeername() == asked
        if dies:
            sockets._deaf.pop(FIRST).close()
        else:
            sockets.reopen(FIRST)
        stack.enter_context(socket.create_connection(asked, timeout=10))
        assert select.select([], [late], [], 10)[1] == [late]
        assert late.getpeername() == asked


def test_a_socket_that_passes_on_is_not_shut(pair: Pair) -> None:
    pair.sockets.open(pair.listener, "")
    assert not pair.sockets.shut(FIRST)


@pytest.mark.parametrize(("phase", "gets"), [("trial", SECOND), ("canary", SECOND), ("back", SECOND)])
def test_who_is_asked_for_again_gets_the_socket_that_it_had(pair: Pair, phase: str, gets: str) -> None:
    """Also before anything else is done: the child of a supervisor before may have been killed just then."""
    keeper, trials, _ = resumed(pair, phase, {"shop:1": 1})
    assert trials.socket("shop:1~", "shop:1", pair.listener) == gets
    assert trials.socket("shop:1", "shop:1", pair.listener) == FIRST
    assert trials.bars(shop("shop:1")) == ""
    assert trials.bars(shop("shop:2")) == "shop:1"
    trials.release("shop:1")
    trials.over(["shop:1~"])
    assert trials.bars(shop("shop:2")) == ""
    assert trials.socket("shop:1~", "shop:1", pair.listener) == FIRST
    assert keeper.released == []


def test_the_successor_has_the_current_socket_once_it_serves(pair: Pair) -> None:
    _, trials, _ = resumed(pair, "passed", {"shop:1": 1})
    assert trials.socket("shop:1~", "shop:1", pair.listener) == SECOND
    assert trials.bars(shop("shop:2")) == "shop:1"


@pytest.mark.parametrize(("phase", "closes"), [("trial", SECOND), ("canary", SECOND), ("passed", FIRST)])
def test_a_rollout_of_nobody_leaves_one_socket(pair: Pair, phase: str, closes: str) -> None:
    """Its processes have left the table: nobody would close the other one."""
    keeper, trials, closed = resumed(pair, phase, {"gone": 1})
    assert keeper.released == [closes]
    assert closed == ["rollout/shop:1", "unused"]
    assert trials.bars(shop("shop:2")) == ""


def test_who_waits_gets_its_turn() -> None:
    async def main() -> None:
        trials = Trials(Sockets(Keeper({}), {}))
        for rollout in ("a", "b"):
            trials.hold(rollout, [rollout], ["web"])
        waiting = asyncio.ensure_future(trials.turn(shop("shop:1")))
        for rollout in ("a", "b"):
            await asyncio.sleep(0)
            assert not waiting.done()
            trials.release(rollout)
            trials.release(rollout)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(main())


def test_a_hold_is_for_places() -> None:
    """A process may start in one of its places, and not in the other."""
    trials = Trials(Sockets(Keeper({}), {}))
    trials.hold("shop:1", ["shop:1~"], ["web"])
    assert trials.bars(shop("shop:1")) == "shop:1"
    assert trials.bars(replace(shop("shop:1"), slot=1)) == ""
    assert trials.bars(replace(shop("shop:1"), listen=("other",))) == ""


def test_a_stranger_in_the_group(pair: Pair) -> None:
    """A socket that is none of the two is found, and goes with its last holder."""
    sockets, listener = pair.sockets, pair.listener
    for name in (FIRST, SECOND):
        assert sockets.inode(name)
    assert sockets.strangers(FIRST) == set()
    with socket.socket() as third:
        third.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        third.bind((listener.address.host, listener.address.port))
        third.listen()
        assert sockets.strangers(FIRST) == {os.fstat(third.fileno()).st_ino}
    wait_until(lambda: sockets.strangers(FIRST) == set())

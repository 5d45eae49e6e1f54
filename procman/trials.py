"""The sockets of processes on trial: a successor has second sockets, that nobody but its readiness probe can reach
until it has proven itself.

It knows which of their two sockets processes get, and who gets none now. When that changes, `rollout` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from procman import canary, listeners, probes, queues, values
from procman.config import Address, Listener, Program, Ready
from procman.errors import Failed, ProcmanError
from procman.listeners import FileId
from procman.probes import LetThrough
from procman.sockets import Sockets, base_name, beside, held_name

ANSWER_SECONDS = 3.0
"""How long a version may take to answer a request of the canary's. Where both take longer, it does not count."""


class _Hold(NamedTuple):
    """Only what is at `keys` may start on `listeners`, until it is `over`."""

    keys: frozenset[str]
    listeners: frozenset[str]
    over: asyncio.Event

    def bars(self, program: Program) -> bool:
        return program.key not in self.keys and not self.listeners.isdisjoint(program.listen)


class _Seat(NamedTuple):
    """The sockets that the process at a place gets, while its listeners have two: those of `place`, the second ones (1)
    or the first (0). `firsts` are the held names of the first ones, by listener."""

    firsts: Mapping[str, str]
    place: int

    def socket(self, listener: str) -> str | None:
        """The held name of the one that it gets; None where that listener has only one."""
        first = self.firsts.get(listener)
        return beside(first) if first is not None and self.place else first


class Trials:
    """All of them, by the place of the successor (`Program.key`)."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._seats: dict[str, _Seat] = {}
        self._addresses: dict[str, Address] = {}
        self._asking: set[int] = set()  # ports
        self._ports: dict[str, int] = {}  # the one that is being led, by first socket
        self._quiet: dict[str, dict[str, str]] = {}  # held names of new sockets inside of wider ones, by listener
        self._holds: dict[str, _Hold] = {}

    def firsts(self, listeners: Iterable[Listener]) -> list[str]:
        """The held names of the sockets that are the first ones, when second ones are opened for `listeners`."""
        return [self._sockets.current(listener, "") for listener in listeners]

    def strangers(self, firsts: Iterable[str]) -> dict[str, int]:
        """The inode of a socket that is in the group of each of `firsts`, and is none of ours; nothing where there is
        none."""
        # In the loop: the kernel goes through sockets that listen, however many connections there are.
        with contextlib.suppress(OSError):  # a kernel that does not tell
            return {first: min(found) for first in firsts if (found := self._sockets.strangers(first))}
        return {}

    async def said(self, strangers: Mapping[str, int]) -> Failed:
        """What to say about them: nobody could say any more which socket gets a connection."""
        first, inode = next(iter(strangers.items()))
        who = await asyncio.to_thread(listeners.holder, inode)
        return Failed(
            f"{who} has a socket at {self._sockets.address(first)} that it was given before:"
            " no connection can be led past it",
            hint="end that process, or use procmanctl restart",
        )

    def begin(
        self,
        keys: Iterable[str],
        listeners: Iterable[Listener],
        new: Iterable[Listener] = (),
        before: Iterable[str] = (),
    ) -> None:
        """Open second sockets for `listeners`, which the processes at `keys` get, and those of `new` where only they
        can be asked (`Sockets.open_quietly`). Those at `before` have the first ones, whoever is the current one. Raises
        Failed, and leaves no second one open."""
        firsts: dict[str, str] = {}
        quiet: dict[str, str] = {}
        try:
            for listener in new:
                if name := self._sockets.open_quietly(listener):
                    quiet[listener.name], self._addresses[listener.name] = name, listener.address
            for listener in listeners:
                firsts[listener.name] = self._sockets.open_second(listener)
                self._addresses[listener.name] = listener.address
        except BaseException:
            self.end(firsts.values())
            raise
        for key in keys:
            self._seats[key], self._quiet[key] = _Seat(firsts, 1), quiet
        self._seats |= dict.fromkeys(before, _Seat(firsts, 0))

    def resume(
        self,
        keys: Iterable[str],
        firsts: Iterable[str],
        files: Mapping[str, FileId],
        listeners: Iterable[Listener],
        before: Iterable[str],
    ) -> list[str]:
        """A supervisor before has begun it: the processes at `keys` get the second sockets, those at `before` the first
        ones. Returns those of `firsts` whose listener the table still has."""
        known = {held_name(listener, ""): listener for listener in listeners}
        there = {first: known[base_name(first)] for first in firsts if base_name(first) in known}
        for first, listener in there.items():
            self._sockets.resume(first, listener, files)
            self._addresses[listener.name] = listener.address
        named = {listener.name: first for first, listener in there.items()}
        self._seats |= dict.fromkeys(before, _Seat(named, 0)) | dict.fromkeys(keys, _Seat(named, 1))
        return list(there)

    def seat(self, rollout: str, key: str, firsts: Mapping[str, str], place: int) -> None:
        """The process at `key` starts on the first sockets `firsts`, by listener (`place` 0), or on the second ones
        (1), wherever new connections go: it answers who waits in their queues."""
        self._seats[key] = _Seat(firsts, place)
        if (hold := self._holds.get(rollout)) is not None:
            self._holds[rollout] = hold._replace(keys=hold.keys | {key})

    def over(self, keys: Iterable[str]) -> None:
        """For the processes at `keys` there are no two sockets any more: what they get now is the current one of each
        listener."""
        for key in keys:
            self._seats.pop(key, None)
            self._quiet.pop(key, None)
        if not self._seats:
            self._asking.clear()

    def keys(self) -> list[str]:
        """Part of the state file: the places of all that are on trial."""
        return sorted(key for key, seat in self._seats.items() if seat.place)

    def end(self, firsts: Iterable[str]) -> None:
        """Close the second sockets: the trial has failed."""
        for first in firsts:
            self._sockets.close(beside(first))

    # --- who does not start meanwhile -------------------------------------------------------------------------------

    def hold(self, rollout: str, keys: Iterable[str], listeners: Iterable[str]) -> None:
        """Until `release`, nobody but the processes at `keys` gets a socket of `listeners`: one of the two closes, and
        nobody knows yet which."""
        self._holds[rollout] = _Hold(frozenset(keys), frozenset(listeners), asyncio.Event())

    def release(self, rollout: str) -> None:
        """The reverse; can be done again."""
        if (hold := self._holds.pop(rollout, None)) is not None:
            hold.over.set()

    def bars(self, program: Program) -> str:
        """The rollout for which the start of `program` has to wait; "" where it need not."""
        found = (rollout for rollout, hold in self._holds.items() if hold.bars(program))
        return next(found, "")

    async def turn(self, program: Program) -> None:
        """Wait until it need not wait any more."""
        while rollout := self.bars(program):
            await self._holds[rollout].over.wait()

    # --- who gets which ---------------------------------------------------------------------------------------------

    def socket(self, key: str, process: str, listener: Listener) -> str:
        """The held name of what a child at `key` gets for `listener`. Raises Failed."""
        seat = self._seats.get(key)
        return (seat and seat.socket(listener.name)) or self._sockets.give(listener, process)

    def alone(self, key: str, ready: Ready) -> tuple[Ready, LetThrough | None]:
        """How the process at `key` is asked for `ready`, and nobody else: whoever connects to its address like a client
        meets the one before."""
        asked = ready.address
        if asked is None:
            return ready, None
        seat = self._seats.get(key, _Seat({}, 1))
        firsts, quiet = (
            [held for name, held in there.items() if values.meets(self._addresses[name], asked)]
            for there in (seat.firsts, self._quiet.get(key, {}))
        )
        if not (firsts or quiet):
            return ready, None

        def through(port: int) -> Callable[[], None]:
            for name in quiet:
                self._sockets.hear_only(name, port)
            return self._led(firsts, port, seat.place)  # several: of one port, by IPv4 and by IPv6, say

        if firsts:
            ready = replace(ready, address=self._sockets.asked_at(firsts[0], seat.place, asked))
        return ready, through

    def _led(self, firsts: Sequence[str], port: int, place: int) -> Callable[[], None]:
        def end() -> None:
            for first in firsts:
                if self._ports.get(first) == port:  # else another one is being led
                    del self._ports[first]
                    with contextlib.suppress(ProcmanError):
                        self._sockets.let_through(first, 0, place=place)

        try:
            for first in firsts:
                self._sockets.let_through(first, port, place=place)
                self._ports[first] = port
        except BaseException:
            end()
            raise
        return end

    # --- a canary ---------------------------------------------------------------------------------------------------

    async def answer(self, first: str, *, before: bool) -> probes.Answer:
        """What the successor, on the second socket of `first` (`before`: the one before, on the first), answers to a
        request of the canary's."""
        def through(port: int) -> Callable[[], None]:
            self._asking.add(port)
            return self._led([first], port, 0 if before else 1)

        return await probes.answer(self._sockets.address(first), canary.PATH, through, ANSWER_SECONDS)

    async def backlog(self, first: str) -> tuple[frozenset[tuple[bytes, int]], int]:
        """The clients that wait to be accepted at the address of `first`, but for who came by `answer`, and how many of
        them not at its second socket. Raises OSError where the kernel does not tell, RuntimeError where there is no
        thread."""
        second = self._sockets.inode(beside(first))
        found = await asyncio.to_thread(queues.backlog, self._sockets.address(first).port)
        clients = frozenset(client for client in found.clients if client[1] not in self._asking)
        return clients, sum(length for inode, length in found.lengths.items() if inode != second)

    async def connecting(self, firsts: Iterable[str]) -> frozenset[tuple[bytes, int]]:
        """The clients whose handshake at one of these TCP sockets is under way (`queues.handshakes`). None where the
        kernel does not tell."""
        ports = {where.port for where in map(self._sockets.address, firsts) if where.kind == "tcp"}
        try:
            return frozenset().union(*[await asyncio.to_thread(queues.handshakes, port) for port in ports])
        except (OSError, RuntimeError):  # RuntimeError: there is no thread
            return frozenset()

"""The sockets of processes on trial: a successor has second sockets, that nobody but its readiness probe can reach
until it has proven itself.

It knows which of their two sockets processes get. When that changes, `rollout` decides.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from procman.config import Address, Listener, Ready
from procman.listeners import FileId
from procman.probes import LetThrough
from procman.sockets import Sockets, base_name, beside, held_name

_EVERY = ("", "0.0.0.0", "::")


class Trials:
    """All of them, by the place of the successor (`Program.key`): the held names of the first sockets, by listener."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._first: dict[str, dict[str, str]] = {}
        self._addresses: dict[str, Address] = {}

    def firsts(self, listeners: Iterable[Listener]) -> list[str]:
        """The held names of the sockets that are the first ones, when second ones are opened for `listeners`."""
        return [self._sockets.current(listener, "") for listener in listeners]

    def begin(self, keys: Iterable[str], listeners: Iterable[Listener]) -> None:
        """Open second sockets for `listeners`, which the processes at `keys` get. Raises Failed, and leaves none
        open."""
        firsts: dict[str, str] = {}
        try:
            for listener in listeners:
                firsts[listener.name] = self._sockets.open_second(listener)
                self._addresses[listener.name] = listener.address
        except BaseException:
            self.end(firsts.values())
            raise
        for key in keys:
            self._first[key] = firsts

    def resume(self, firsts: Iterable[str], files: Mapping[str, FileId], listeners: Iterable[Listener]) -> list[str]:
        """A supervisor before has begun it. Returns those of `firsts` whose listener the table still has."""
        known = {held_name(listener, ""): listener for listener in listeners}
        there = [first for first in firsts if base_name(first) in known]
        for first in there:
            self._sockets.resume(first, known[base_name(first)], files)
        return there

    def over(self, keys: Iterable[str]) -> None:
        """The processes at `keys` are on trial no more: what they get now is the current socket of each listener."""
        for key in keys:
            self._first.pop(key, None)

    def end(self, firsts: Iterable[str]) -> None:
        """Close the second sockets: the trial has failed."""
        for first in firsts:
            self._sockets.close(beside(first))

    def socket(self, key: str, process: str, listener: Listener) -> str:
        """The held name of what a child at `key` gets for `listener`. Raises Failed."""
        first = self._first.get(key, {}).get(listener.name)
        return self._sockets.open(listener, process) if first is None else beside(first)

    def alone(self, key: str, ready: Ready) -> tuple[Ready, LetThrough | None]:
        """How the process at `key` is asked for `ready`, and nobody else: whoever connects to its address like a client
        meets the one before."""
        for name, first in self._first.get(key, {}).items():
            if ready.address is not None and _meet(self._addresses[name], ready.address):
                asked = replace(ready, address=self._sockets.ask_second(first, ready.address))
                return asked, functools.partial(self._sockets.let_through, first)
        return ready, None


def _meet(listener: Address, asked: Address) -> bool:
    """Whether who connects to `asked` comes to a socket at `listener`."""
    if listener.kind == "unix" or asked.kind == "unix":
        return listener == asked
    same_host = listener.host == asked.host or bool({listener.host, asked.host}.intersection(_EVERY))
    return same_host and listener.port == asked.port

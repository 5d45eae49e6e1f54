"""The listening sockets that the keeper holds: opened once, found again by the next supervisor, passed from a process
to its successor.

A listener has one socket, held as `listener/NAME`. While it passes on, it has a second one, `listener~/NAME`: the first
one's connections are answered by the process before, new ones go to its successor. When the first one closes, the
second is the only one, until the next time. The supervisor has a copy of each: it leads connections, and sees whether
some wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from procman import listeners, queues, routing, values
from procman.config import Address, Listener
from procman.errors import Failed, ProcmanError

log = logging.getLogger("procman")

FIRST, SECOND = "listener/", "listener~/"


class Holder(Protocol):
    """Where descriptors are held (`holdings.Holdings`)."""

    def take(self, name: str) -> int | None:
        """What the snapshot brought under `name`, now the caller's."""

    def hold(self, descriptors: Mapping[str, int]) -> None:
        """Let the keeper hold copies. Raises ProcmanError."""

    def release(self, name: str) -> None:
        """The keeper may close it."""

    def holds(self, name: str) -> bool:
        """Whether it is held."""

    def held(self) -> list[str]:
        """All held names."""


def held_name(listener: Listener, process: str) -> str:
    """Under which name the keeper holds the socket of `listener` that `process` gets, while there is one."""
    return f"{FIRST}{listener.name}" + (f"@{process}" if listener.reuse_port else "")


def beside(name: str) -> str:
    """The held name of the other of the two sockets that a listener can have."""
    return FIRST + name.removeprefix(SECOND) if name.startswith(SECOND) else SECOND + name.removeprefix(FIRST)


def _path_problem(listener: Listener, made: listeners.FileId | None) -> str:
    """What is wrong with the path of the Unix listener, whose file is `made`."""
    found = listeners.socket_file(listener.address.path)
    if made is not None and found == made:
        return ""
    what = f"{listener.address}: {listeners.astray(found)}, nobody comes to its socket"
    return f"{what}: procmanctl reload, or restart, makes it again"


def listener_of(name: str) -> str:
    """The name of the listener of a held socket that all its processes share."""
    return base_name(name).removeprefix(FIRST)


def base_name(name: str) -> str:
    """The held name of the first of the two."""
    return beside(name) if name.startswith(SECOND) else name


class Sockets:
    """All of them, by held name. `received` names what the snapshot brought. What the state file says of it: `known`
    are those whose second socket was the current one (`seconds`), `files` those of Unix listeners (`document`)."""

    def __init__(
        self,
        holder: Holder,
        received: Mapping[str, int],
        known: Container[str] = (),
        files: Mapping[str, Sequence[int] | None] = MappingProxyType({}),
    ) -> None:
        self._holder = holder
        self._copies: dict[str, socket.socket] = {}
        self._open: dict[str, Listener] = {}
        self._files: dict[str, listeners.FileId | None] = {}  # of Unix listeners
        self._shares: dict[str, float] = {}  # of new connections that go to the second socket, by the first
        self._watched: set[str] = set()
        self._deaf: dict[str, socket.socket] = {}  # beside an open one, while nobody is to come to that
        seconds = [name for name in received if name.startswith(SECOND)]
        self._current = {
            beside(name): name for name in seconds if beside(name) not in received or beside(name) in known
        }
        self._untuned: dict[str, str] = {}
        self._left: set[str] = set()
        for base, file in files.items():
            name = self._now(base)
            if name in received and (name != base) == (base in known):  # else the file is that of the other socket
                self._files[name] = None if file is None else (file[0], file[1])

    def document(self) -> dict[str, listeners.FileId | None]:
        """Part of the state file: how the file of a Unix listener is known again without the keeper."""
        return {base_name(name): file for name, file in self._files.items() if name == self._now(name)}

    def seconds(self) -> list[str]:
        """Part of the state file: the first sockets' names of listeners whose second one is the current one."""
        return sorted(first for first, name in self._current.items() if name != first)

    def current(self, listener: Listener, process: str) -> str:
        """The held name of the socket that a child of `process` gets for `listener`."""
        base = held_name(listener, process)
        return self._current.get(base, base)

    def of(self, listen: Mapping[str, Container[str]]) -> list[str]:
        """The held names of the open sockets that processes get: `listen` has their listeners, by process."""
        found = []
        for name in self._holder.held():
            listener = self._open.get(name)
            if listener is not None and name == self._now(name):
                own = name.partition("@")[2] if listener.reuse_port else ""
                users = [theirs for process, theirs in listen.items() if own in ("", process)]
                found += [name] if any(listener.name in theirs for theirs in users) else []
        return found

    def _now(self, name: str) -> str:
        return self._current.get(base_name(name), base_name(name))

    def open(self, listener: Listener, process: str) -> str:
        """As `current`; the socket is opened if need be. Raises Failed when it can't be bound."""
        name = self.current(listener, process)
        there = self._copy(name)
        if there is not None and listener.address.kind == "tcp" and listeners.is_left(there):
            self.close(name)  # what was to close has not closed
        if not self._holder.holds(name):
            ours = listener.address.kind == "tcp" and self._is_ours(listener)
            self._keep(name, listener, listeners.join(listener) if ours else listeners.open_listener(listener))
        self._copy(name)
        self._open[name] = listener
        if listener.address.kind == "unix" and name not in self._files:
            self._files[name] = listeners.socket_file(listener.address.path)
        return name

    def give(self, listener: Listener, process: str) -> str:
        """As `open`, for a child that starts now. Where the path of a Unix listener does not lead to its socket any
        more, that one is of no use to anybody: it gets another one, as far as the path can be had."""
        name = self.open(listener, process)
        if listener.address.kind == "unix" and _path_problem(listener, self._files.get(name)):
            try:
                sock = listeners.open_listener(listener)
            except Failed as error:
                log.error("%s", error)
                return name
            before = self._copy(name)
            self.unwatch(name)
            self._keep(name, listener, sock)  # the keeper closes the one before
            if before is not None:
                before.close()
            self._files[name] = listeners.socket_file(listener.address.path)
            self._untuned.pop(name, None)
            self._left.discard(name)
            log.warning("%s was opened again: its path did not lead to the socket of before", listener.address)
        return name

    def paths(self) -> list[tuple[str, Callable[[], str]]]:
        """For each open Unix listener its path, and what tells what is wrong with it ("": nothing). That looks at a
        disk."""
        found: list[tuple[str, Callable[[], str]]] = []
        for name, listener in self._open.items():
            if listener.address.kind == "unix" and name == self._now(name) and name not in self._left:
                look = functools.partial(_path_problem, listener, self._files.get(name))
                found.append((listener.address.path, look))
        return found

    def problems(self) -> list[str]:
        """What could not be done to open sockets."""
        return list(self._untuned.values())

    def open_early(self, listener: Listener) -> None:
        """Open `listener` before anybody is there who accepts, if it is new; where each process has a socket of its own
        that would take connections from others, so it is only tried. Raises Failed when it can't be bound."""
        if self._is_ours(listener):
            return  # nobody else can have the port
        if listener.reuse_port:
            listeners.open_listener(listener).close()
        else:
            self.open(listener, "")

    def try_out(self, listener: Listener) -> None:
        """Raises Failed where `open_early` would for somebody who has the address; opens nothing."""
        if not self._is_ours(listener):
            listeners.try_out(listener)

    def _is_ours(self, listener: Listener) -> bool:
        """Whether one of these sockets is bound where `listener` is to be, under this name or another one."""
        there = (self._open[name] for name in self._holder.held() if name in self._open)
        return any(values.overlap(one.address, listener.address) for one in there)

    def tune(self, listener: Listener) -> None:
        """Give open sockets of `listener` its backlog, mode and owner. Raises Failed."""
        first = held_name(listener, "")
        for name in self._holder.held():
            if base_name(name) == first or base_name(name).startswith(f"{first}@"):
                copy = self._copy(name)
                if copy is not None:
                    self._open[name] = listener  # also when it fails: a socket with other settings serves all the same
                    self._untuned.pop(name, None)
                    try:
                        listeners.tune(copy, listener, self._files.get(name))
                    except Failed as error:
                        self._untuned[name] = str(error)
                        raise

    def lost(self, name: str) -> None:
        """The keeper had no room for it."""
        self._open.pop(name, None)
        self._untuned.pop(name, None)
        self._left.discard(name)
        self.unwatch(name)
        copy = self._copies.pop(name, None)
        if copy is not None:
            copy.close()

    def close(self, name: str) -> None:
        """Close one socket, here and in the keeper; a file of its own goes too, but not the one that clients use."""
        listener, copy = self._open.get(name), self._copy(name)
        made = self._files.pop(name, None)
        if listener is not None and copy is not None and listener.address.kind == "unix":
            listeners.remove_socket_file(listeners.beside_address(listener.address).path, made)
            if made is not None:  # it has got the path, since that led nowhere, and is not the current one after all
                listeners.remove_socket_file(listener.address.path, made)
        self.lost(name)
        self._holder.release(name)

    def close_own(self, process: str) -> None:
        """Close the sockets that are of `process` alone (`reuse_port`): it has no child that would accept."""
        for name in [name for name in self._holder.held() if name.startswith(FIRST) and name.endswith(f"@{process}")]:
            self.lost(name)
            self._holder.release(name)

    def close_others(self, keep: Mapping[str, Listener]) -> None:
        """Close every listening socket that is not in `keep` under its held name, or is there with other settings."""
        for name in [name for name in self._holder.held() if name.startswith((FIRST, SECOND))]:
            opened = self._open.get(name)
            if opened is not None and keep.get(base_name(name)) == opened:
                continue
            made = self._files.pop(name, None)
            self.lost(name)
            self._holder.release(name)
            if self._current.get(base_name(name)) == name:
                del self._current[base_name(name)]
            if opened is not None and made is not None:
                listeners.remove_socket_file(opened.address.path, made)

    def close_seconds(self, but: Collection[str]) -> None:
        """Close what is left of successors of which nobody knows any more. `but`: the first sockets of the others."""
        for name in self._holder.held():
            two = name.startswith((FIRST, SECOND)) and self._holder.holds(beside(name))
            if two and name != self._now(name) and not {name, beside(name)}.intersection(but):
                self.close(name)

    # --- from a process to its successor ----------------------------------------------------------------------------

    def open_second(self, listener: Listener) -> str:
        """A second socket for `listener`, to which no connection goes yet. Returns the held name of the first. Raises
        Failed."""
        first = self.current(listener, "")
        copy = self._copy(first)
        if copy is None:
            raise Failed(f"the listener {listener.title} is not open")
        if self._holder.holds(beside(first)):  # of a try before
            self.close(beside(first))
        if listener.address.kind == "unix":
            second = listeners.open_beside(listener, self._files.get(first))
            self._files[beside(first)] = listeners.socket_file(listeners.beside_address(listener.address).path)
        else:
            self._lead(copy, listener, 0)  # before the other one listens: no connection may go there
            second = listeners.join(listener)
        self._keep(beside(first), listener, second)
        return first

    def strangers(self, first: str) -> set[int]:
        """The inodes of sockets that are in the SO_REUSEPORT group of the TCP socket `first`, and are none of ours: the
        places in it are not what they seem (`routing`). Raises OSError where the kernel does not tell."""
        copy = self._copy(first)
        if copy is None or copy.family == socket.AF_UNIX:
            return set()
        host, port = copy.getsockname()[:2]
        return queues.group(copy.family, host, port) - {self.inode(first), self.inode(beside(first))}

    def asked_at(self, first: str, place: int, address: Address) -> Address:
        """Where the second socket of `first` (`place` 0: the first one) is asked, whose clients come to `address`; for
        TCP see `let_through`."""
        listener = self._open[first]
        aside = listener.address.kind == "unix" and place != self._place(first)
        return listeners.beside_address(listener.address) if aside else address

    def _place(self, first: str) -> int:
        """0: clients go to the socket `first`, or 1: to the one beside it."""
        return int(self._now(first) != first)

    def let_through(self, first: str, port: int, *, place: int = 1) -> None:
        """The next connection from the local port `port` goes to the second socket of `first` (`place` 0: to the first
        one), others as before: to the current one, or as `split` has it. 0 is the port of nobody. Raises Failed."""
        copy = self._copy(first)
        if copy is not None:
            with self._failures(self._open[first]):
                routing.lead_port(copy, port, place, self._place(first), self._shares.get(first, 0.0))

    def address(self, name: str) -> Address:
        """The address of the open socket `name`."""
        return self._open[name].address

    def inode(self, name: str) -> int:
        """By which the kernel knows the socket `name`; 0 where it is not open."""
        copy = self._copy(name)
        return 0 if copy is None else os.fstat(copy.fileno()).st_ino

    def split(self, first: str, share: float) -> None:
        """From now on `share` of the new connections goes to the second socket of `first`, a TCP one, until `pass_on`
        or `take_back`. Raises Failed."""
        copy = self._copy(first)
        if copy is None or not self._holder.holds(beside(first)):
            raise Failed(f"{first} is not open")
        with self._failures(self._open[first]):
            routing.lead_share(copy, share, 1, 0)
        self._shares[first] = share

    def pass_on(self, first: str) -> None:
        """New connections go to the second socket, and who starts gets that. Can be done again. Raises Failed."""
        self._make_current(beside(first), 1)

    def take_back(self, first: str) -> None:
        """The reverse of `pass_on`; can be done again, and without it."""
        self._make_current(first, 0)

    def resume(self, first: str, listener: Listener, files: Mapping[str, listeners.FileId]) -> None:
        """A supervisor before was to open a second socket beside `first`; `files` are the Unix sockets', by name."""
        for name in (first, beside(first)):
            if self._copy(name) is not None:
                self._open[name] = listener
            if name in files:
                self._files[name] = files[name]
        self._current[base_name(first)] = first

    def open_quietly(self, listener: Listener) -> str:
        """Open the TCP socket of `listener` where one of ours that is wider serves its clients: they are not heard
        before `hear_all`, and should it close before that, they come to the wider one when TCP asks again. Returns its
        held name; "" where it is open already, or there is no such wider one. Raises Failed."""
        name = self.current(listener, "")
        there = [self._open[each].address for each in self._holder.held() if each in self._open and each != name]
        inside = any(values.covers(address, listener.address) for address in there)
        if listener.address.kind == "unix" or listener.reuse_port or self._holder.holds(name) or not inside:
            return ""
        self.open(listener, "")
        self.hear_only(name, 0)
        return name

    def hear_only(self, name: str, port: int) -> None:
        """Who connects to the TCP socket `name` from the local port `port` is heard, and nobody else. Raises Failed."""
        if (copy := self._copy(name)) is not None:
            with self._failures(self._open[name]):
                routing.hear_only(copy, port)

    def hear_all(self, name: str) -> None:
        """The reverse; can be done again, and without it. Raises Failed."""
        copy = self._copy(name)
        if copy is not None and copy.family != socket.AF_UNIX:
            with self._failures(self._open[name]):
                routing.hear_all(copy)

    # --- for a moment -----------------------------------------------------------------------------------------------

    def shut(self, name: str) -> bool:
        """Until `reopen`, or until this supervisor ends, who connects to the TCP socket `name` is not heard, and TCP
        asks again a second later. False, and nothing is done, where it can't be, or is passed on now. Raises Failed."""
        copy, listener = self._copy(name), self._open.get(name)
        busy = name in self._deaf or self._holder.holds(beside(name))
        if copy is None or listener is None or busy or listener.address.kind == "unix" or listener.reuse_port:
            return False
        self._lead(copy, listener, 0)
        deaf = listeners.join(listener)
        try:
            with self._failures(listener):
                routing.deafen(deaf)
                routing.lead(copy, 1)
        except BaseException:
            deaf.close()
            raise
        self._deaf[name] = deaf  # the keeper has none of it: when we die it is gone, and the first one is alone again
        return True

    def reopen(self, name: str) -> None:
        """The reverse of `shut`."""
        self._deaf.pop(name).close()

    def leave(self, name: str) -> None:
        """For good, nobody more comes to the socket `name`, which will close; who waits in its queue is accepted as
        before. Can be done again. Raises Failed."""
        copy, listener = self._copy(name), self._open.get(name)
        if copy is None or listener is None:
            raise Failed(f"{name} is not open")
        try:
            self._left.add(name)
            listeners.leave(copy, listener, self._files.get(name))
        except OSError as error:
            raise Failed(f"connections to {listener.address} can't be refused: {error.strerror}") from error

    def files(self, firsts: Iterable[str]) -> dict[str, listeners.FileId]:
        """The files of both sockets of these listeners, by held name, as far as they have some."""
        names = [name for first in firsts for name in (first, beside(first))]
        return {name: file for name in names if (file := self._files.get(name)) is not None}

    def watch(self, name: str, callback: Callable[[], None]) -> None:
        """Call back as long as connections wait in the queue of the open socket `name`, until `unwatch` or its end."""
        copy = self._copy(name)
        if copy is not None:
            self._watched.add(name)
            asyncio.get_running_loop().add_reader(copy, callback)

    def is_watched(self, name: str) -> bool:
        """Whether `watch` still holds: not once the socket was closed."""
        return name in self._watched

    def unwatch(self, name: str) -> None:
        """The reverse."""
        if name in self._watched:
            self._watched.remove(name)
            asyncio.get_running_loop().remove_reader(self._copies[name])

    def waiting(self, name: str) -> bool:
        """Whether connections wait in its queue."""
        copy = self._copy(name)
        return copy is not None and routing.waiting(copy)

    def _make_current(self, name: str, place: int) -> None:
        copy, listener = self._copy(name), self._open.get(name) or self._open.get(beside(name))
        if copy is None or listener is None:
            raise Failed(f"{name} is not open")
        if listener.address.kind == "unix":
            made = self._files.get(name)
            if made is None:
                raise Failed(f"the file of {listener.address} is not there any more")
            with self._failures(listener):
                listeners.take_over(listener, made)
        elif self._holder.holds(beside(name)):
            self._lead(copy, listener, place)
        self._open[name] = listener
        self._current[base_name(name)] = name
        for each in (name, beside(name)):
            self._shares.pop(each, None)

    def _lead(self, copy: socket.socket, listener: Listener, place: int) -> None:
        with self._failures(listener):
            routing.lead(copy, place)

    @staticmethod
    @contextlib.contextmanager
    def _failures(listener: Listener) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failed(f"connections to {listener.address} can't be led elsewhere: {error.strerror}") from error

    # --- copies -----------------------------------------------------------------------------------------------------

    def _keep(self, name: str, listener: Listener, sock: socket.socket) -> None:
        try:
            self._holder.hold({name: sock.fileno()})
        except ProcmanError:
            sock.close()
            raise
        self._copies[name] = sock
        self._open[name] = listener

    def _copy(self, name: str) -> socket.socket | None:
        if (received := self._holder.take(name)) is not None:
            self._copies[name] = socket.socket(fileno=received)
        return self._copies.get(name)

"""Processes that stop on a socket that others go on with: before their stop signal they answer what they have accepted,
and nobody comes to that socket meanwhile.

Only who is told to stop while it has nothing in hand can't drop anything. Where a whole unit is replaced, its
successors have a second socket (`rollout`); here others accept from the same one. So for a moment, of some ten
milliseconds where answers are quick and of GRACE_SECONDS at most, the kernel does not hear who connects: TCP asks again
by itself, a second later. Those who stay are not touched, and need not be started anew for the sake of one that goes.

Not for Unix sockets, where nobody asks again.

An address that closes with who stops is *left* first: there nobody need be kept out, who comes is refused for good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from procman import queues, servers
from procman.config import Address, Listener, Program
from procman.errors import ProcmanError
from procman.lifecycle import Restart, Stop
from procman.process import Process
from procman.resources import processes_of, sockets_of
from procman.sockets import Sockets

log = logging.getLogger("procman")

GRACE_SECONDS = 1.0
"""So long they may take to answer what they have accepted."""

DEAF_SECONDS = 0.5
"""After their stop signal, so long it may take until they accept no more."""

LOOK_SECONDS = 0.02
"""How often that is looked at."""


class Parting:
    """Of all processes that stand on `sockets`; one parting at a time: while `turn` is taken, somebody is not heard."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self.turn = asyncio.Lock()

    def closing(self, programs: Iterable[Program], needed: Container[str]) -> list[str]:
        """The held names of the sockets that close with these, since nobody needs their listeners."""
        there = {program.name: {each for each in program.listen if each not in needed} for program in programs}
        return self._sockets.of(there)

    def address(self, name: str) -> Address:
        """Of an open socket."""
        return self._sockets.address(name)

    async def leave(self, names: Sequence[str], seconds: float) -> None:
        """Nobody more comes to these sockets, which will close; wait until who has come was accepted, for `seconds` at
        most, and GRACE_SECONDS longer, for that to be read."""
        for name in names:
            try:
                self._sockets.leave(name)
            except ProcmanError as error:
                log.warning("%s", error)
        if names:
            await _until(lambda: any(map(self._sockets.waiting, names)), seconds)
            await asyncio.sleep(GRACE_SECONDS)

    async def aside(
        self,
        processes: Sequence[Process],
        listeners: Sequence[Listener],
        why: str,
        still: Callable[[Process], bool] = lambda process: True,
        *,
        again: bool = False,
    ) -> None:
        """Tell those of `processes` to stop, or to start `again`, that may drop what they have accepted, and `still`
        are to; returns when their children accept no more from the sockets of `listeners`, which others go on with.
        What can't be told like that is left to the caller."""
        async with self.turn:
            doomed = [process for process in processes if process.status.pid and servers.may_drop(process.program)]
            children = {process.name: process.child for process in doomed}
            shut: list[str] = []
            try:
                for listener in listeners if doomed else ():
                    name = self._sockets.current(listener, "")
                    if self._sockets.shut(name):
                        shut.append(name)
                if shut:
                    await self._run_dry(doomed, shut, [each.address for each in listeners])
                    for process in filter(still, doomed):
                        if process.status.wanted or not again:  # whoever was stopped meanwhile stays so
                            process.feed(Restart(why) if again else Stop(why))
                    inodes = {self._sockets.inode(name) for name in shut}

                    def before() -> list[Process]:
                        return [process for process in doomed if process.child == children[process.name]]

                    await _until(lambda: bool(inodes & _sockets_of(before())), DEAF_SECONDS)
            except (ProcmanError, OSError, RuntimeError) as error:  # they just stop
                log.warning("%s: %s", ", ".join(process.name for process in doomed), error)
            finally:
                for name in shut:
                    self._sockets.reopen(name)

    async def _run_dry(self, doomed: Sequence[Process], shut: Sequence[str], where: Sequence[Address]) -> None:
        def in_hand() -> bool:
            return any(map(self._sockets.waiting, shut)) or bool(queues.accepted(where) & _sockets_of(doomed))

        await _until(in_hand, GRACE_SECONDS)


async def _until(busy: Callable[[], bool], seconds: float) -> None:
    """Until it is not `busy` any more, twice in a row: what has just been accepted is nobody's descriptor yet."""
    try:
        async with asyncio.timeout(seconds):
            calm = 0
            while calm < 2:
                await asyncio.sleep(LOOK_SECONDS)
                calm = 0 if await asyncio.to_thread(busy) else calm + 1
    except TimeoutError:
        pass


def _sockets_of(processes: Sequence[Process]) -> set[int]:
    """The inodes of the sockets that they and what they have started have open."""

    def pids() -> Iterator[int]:
        for process in processes:
            if (pid := process.status.pid) is not None:
                yield from {pid, *(int(each["pid"]) for each in processes_of(pid))}

    return {inode for pid in pids() for inode in sockets_of(pid) or ()}

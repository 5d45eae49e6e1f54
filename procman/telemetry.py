"""What the servers of processes tell of their workers, for `status -v` and `show`: asked only when somebody wants it.

However many ask, a process is asked by one connection at a time, and all of it is bounded: a server that hangs makes
nobody wait longer than SECONDS for the others.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from procman import servers, workers, workload
from procman.config import Address, Listener
from procman.errors import Failed
from procman.process import Process
from procman.queues import Queue, accepted, queues
from procman.reading import Read
from procman.records import dataclass
from procman.report import Info
from procman.resources import resident, sockets_of

AT_ONCE = 64
"""Servers that are asked at one time: each takes a descriptor."""

SECONDS = 3.0
"""Who could not be asked within this, because so many others do not answer, is not asked."""

NOWHERE = "it has no socket to ask at: its server_options say so, or the path would be too long"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server said, or why it said nothing."""

    data: bytes = b""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A process with a child, and its answer; None where its server is none that tells."""

    name: str
    pid: int
    server: str
    listen: tuple[tuple[str, Address], ...]
    answer: _Answer | None


class Telemetry:
    """See the module."""

    def __init__(self) -> None:
        self._asking: dict[tuple[str, str], asyncio.Task[_Answer]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def of(
        self, processes: Sequence[Process], listeners: Mapping[str, Listener], read: Read
    ) -> dict[str, Info | None]:
        """By name: `workers` of its ProcessInfo (docs/procmanctl.md); None for one that has no child, or neither a
        server that tells nor a listener."""
        told: dict[str, Info | None] = {process.name: None for process in processes}
        about = [(process, process.status.pid) for process in processes]
        answers = await asyncio.gather(*(self._answer(process, pid) for process, pid in about))
        asked = [
            _Asked(
                process.name,
                pid,
                process.program.server,
                tuple(
                    (listeners[name].title, listeners[name].address)
                    for name in process.program.listen
                    if name in listeners
                ),
                answer,
            )
            for (process, pid), answer in zip(about, answers, strict=True)
            if pid is not None
        ]
        return told | await read(functools.partial(_put_together, asked))

    async def _answer(self, process: Process, pid: int | None) -> _Answer | None:
        program = process.program
        if pid is None or program.server not in servers.TELLING:
            return None
        where = servers.told_at(program.server, program.argv)
        if not where:
            return _Answer(problem=NOWHERE)
        key = process.child, where
        task = self._asking.get(key)
        if task is None:
            uid = program.account.uid if program.account is not None else os.geteuid()
            task = asyncio.get_running_loop().create_task(self._ask(program.server, where, uid))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key))
        return await asyncio.shield(task)

    async def _ask(self, server: str, where: str, uid: int) -> _Answer:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with self._turns:
            if loop.time() - begun > SECONDS:
                return _Answer(problem="not asked: too many others do not answer")
            try:
                return _Answer(await workers.ask(server, where, uid))
            except Failed as error:
                return _Answer(problem=str(error))


def _put_together(asked: Sequence[_Asked]) -> dict[str, Info | None]:
    """Reads answers, memory and listen queues: for a thread."""
    waiting = queues(address for one in asked for _, address in one.listen)
    silent = [address for one in asked if one.server == "gunicorn" for _, address in one.listen]
    connections = accepted(silent)
    return {one.name: _told(one, waiting, connections) for one in asked if one.listen or one.answer}


def _told(one: _Asked, waiting: Mapping[Address, Queue], connections: set[int]) -> Info:
    load, problem = workload.Workload(()), None
    if one.answer is not None:
        problem = one.answer.problem
        try:
            load = load if problem else workload.read(one.server, one.answer.data)
        except workload.Unreadable as error:
            problem = str(error)
    memory = resident(one.pid, (worker.pid for worker in load.workers))
    drawn = []
    for worker in load.workers:
        count = None
        if worker.busy is None and worker.pid in memory:  # else it is none of its own
            count = _count(connections, sockets_of(worker.pid))
        seen = {"busy": workload.busy(load, worker, count), "memory_bytes": memory.get(worker.pid)}
        drawn.append(asdict(worker) | seen)
    return {
        "problem": problem,
        "list": drawn,
        "left_out": load.left_out,
        "listen": [_listen(name, address, waiting.get(address)) for name, address in one.listen],
    }


def _count(connections: set[int], sockets: set[int] | None) -> int | None:
    return None if sockets is None else len(connections & sockets)


def _listen(name: str, address: Address, queue: Queue | None) -> Info:
    figures = {"queue": queue and queue.waiting, "backlog": queue and queue.room}
    return {"name": name, "address": str(address), **figures}

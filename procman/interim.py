"""The output of programs goes on before a new supervisor is up: the first thing that it does, and all it does so early.

A supervisor that replaces another one takes some 300 ms to come up, more on a busy machine, and may be killed before
that, again and again. Meanwhile the pipes fill, and programs that print much wait in write(2). So the supervisor before
leaves a plan with the keeper, which output goes where, and the new one follows it as soon as it has the
snapshot. That takes a fifth of the time, for little has to be imported: neither asyncio nor anything that reads tables.

Not in the plan: programs whose readiness is a line of their output (whoever waits for it must see all of it), and
what is printed to the daemon's own stdout. They wait until all is up.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from procman import memo, shape
from procman.config import Log
from procman.keeper.wire import Wire
from procman.logs import Counters, LogThread, Stream
from procman.snapshot import Snapshot, receive

HELD_NAME = "interim"
"""Under which the keeper holds the plan."""

STOP_SECONDS = 1.0
"""Longer than this the coming up of a supervisor does not wait for a disk."""


class Output(NamedTuple):
    """One output of the plan: its held name, its process, and where it goes."""

    key: str
    process: str
    log: Log
    path: str


@dataclass(frozen=True)
class _Item:
    """An Output as the document has it."""

    key: str
    process: str
    log: Log
    path: str


def plan(outputs: Iterable[Output]) -> int:
    """A descriptor (memfd_create(2)) that holds the plan for the next supervisor."""
    document = [
        {"key": key, "process": process, "log": shape.flat(log), "path": path} for key, process, log, path in outputs
    ]
    return memo.write("interim", document)


class Interim:
    """The time between the snapshot, which it reads from the wire `descriptor`, and the log threads of `supervise`."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        # The snapshot may bring more descriptors than our first soft limit allows.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.wire = Wire(socket.socket(fileno=descriptor))
        self.snapshot: Snapshot = receive(self.wire)
        self.problem = ""
        self._told: dict[str, Counters] = {}
        self._keys: list[str] = []
        self._thread: LogThread | None = None
        self._last: LogThread | None = None  # that has told what it counted before it had ended
        memory = self.snapshot.held.pop(HELD_NAME, None)
        if memory is not None:
            try:
                self._begin(_read(memory))
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
                # No more than a delay: what was not begun here is done when all is up.
                self.problem = f"the output of programs had to wait for the new supervisor: {error}"

    def _begin(self, outputs: list[Output]) -> None:
        for key, process, log, path in outputs:
            pipe = self.snapshot.held.get(f"{key}/r")
            if pipe is not None:
                self._thread = self._thread or LogThread()
                spool = self.snapshot.held.get(f"{key}/s")
                copy = -1 if spool is None else os.dup(spool)
                self._thread.add(Stream(key, process, log, path, os.dup(pipe), copy))
                self._keys.append(key)
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> dict[str, Counters]:
        """Leaves the rest to others; returns what was counted, by key. See `ended`."""
        if self._thread is None:
            return {}
        thread = self._thread
        if thread.stop(STOP_SECONDS):
            self._thread = None
        else:
            self._last = thread
        self._told = {key: thread.counters(key) for key in self._keys}
        return self._told

    def late(self) -> dict[str, Counters]:
        """What was counted after `stop` had told of it; to be asked when it has `ended`, once."""
        if self._last is None:
            return {}
        last, self._last = self._last, None
        return {key: since(last.counters(key), self._told[key]) for key in self._keys}

    def ended(self) -> bool:
        """Whether nobody writes here any more. Until then nobody else may: two would write over each other. Call `stop`
        first; a stuck disk may hold it up."""
        return self._thread is None or self._thread.stop(0)


def add(one: Counters, other: Counters) -> Counters:
    """The counters of a stream whose bytes were counted in two places; the error of the later."""
    sums: dict[str, Any] = {
        field.name: getattr(one, field.name) + getattr(other, field.name)
        for field in fields(Counters)
        if field.name != "error"
    }
    return Counters(**sums, error=other.error)


def since(now: Counters, before: Counters) -> Counters:
    """What was counted between the two."""
    names = [field.name for field in fields(Counters) if field.name != "error"]
    return Counters(**{name: getattr(now, name) - getattr(before, name) for name in names})


def _read(memory: int) -> list[Output]:
    """What `plan` wrote. Closes `memory`. Raises OSError or ValueError for anything else."""
    return [Output(**vars(item)) for item in shape.fit(memo.read(memory), list[_Item])]

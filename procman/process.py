"""One process at work: feeds `lifecycle.step`, carries out what it returns, keeps one timer and one readiness watch.

It decides nothing itself. What it needs from the outside (the keeper, sockets, logs) is `Surroundings`.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from procman import lifecycle
from procman.config import Program
from procman.crossing import crossing
from procman.errors import ProcmanError, is_shortage
from procman.launch import child_id
from procman.lifecycle import Deadline, Event, Exit, IllegalEvent, Ready, Spawn, SpawnFailed, State, Status

log = logging.getLogger("procman")

HISTORY = 20
"""How many changes of state a process remembers for `procmanctl why`."""


class Moment(NamedTuple):
    """One change of state that a process remembers."""

    at: float
    state: State
    why: str


class Surroundings(Protocol):
    """What a process needs of the daemon around it."""

    def spawn(self, process: Process, generation: int) -> None:
        """Ask for a child, now or when what it needs has been read. Raises ProcmanError when that can't even be asked;
        what turns out later goes to `process.spawn_failed`."""

    def signal(self, process: Process, number: int, tree: bool) -> None:
        """Send a signal to its child."""

    def remember(self, process: Process) -> None:
        """The status of `process` is to outlive this supervisor. `spawn` and `signal` do that in one with what they are
        for: a successor finds both done, or neither."""

    def changed(self, process: Process, before: Status) -> None:
        """The status of `process` is no longer `before`."""

    def watch_ready(
        self, process: Process, ready: Callable[[], None], report: Callable[[str], None]
    ) -> Coroutine[Any, Any, None] | None:
        """What to run until the child is ready, or None when there is nothing to watch. It calls `ready` when it is,
        and `report` with the reason why not yet. It ends by being cancelled."""


class Process:
    """A process of the table: its program, its status, its history."""

    def __init__(self, program: Program, status: Status, surroundings: Surroundings) -> None:
        self.program = program
        self.status = status
        self.history: collections.deque[Moment] = collections.deque(maxlen=HISTORY)
        self.role = "successor"
        self.canary: Callable[[], dict[str, Any]] | None = None
        """Tells how its canary stands, while it is one (`proving`)."""
        self.watchers: set[Callable[[Process], None]] = set()
        self.last_words: list[str] = []
        """The output of a successor, or new version, that has failed, as long as `Status.setback` tells of it."""
        self._surroundings = surroundings
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None
        self._not_ready = ""

    @property
    def name(self) -> str:
        """The name of the process, "shop:1"."""
        return self.program.name

    @property
    def key(self) -> str:
        """The place that its children have: while a successor starts, two share the name."""
        return self.program.key

    @property
    def child(self) -> str:
        """What the keeper calls its last child."""
        return child_id(self.key, self.status.generation)

    def feed(self, event: Event) -> None:
        """Something happened to this process."""
        before = self.status
        try:
            after, actions = lifecycle.step(self.program, before, event, self._loop.time())
        except IllegalEvent as error:
            log.error("%s (a bug in procman; nothing was changed)", error)
            return
        moved = after.state is not before.state
        if moved:
            crossing(f"leave {before.state}")
        self.status = after
        if not actions and _essence(after) != _essence(before):
            self._surroundings.remember(self)
        for action in actions:
            if isinstance(action, Spawn):
                self._spawn(action.generation)
            else:
                self._surroundings.signal(self, action.signal, action.tree)
        self.resume()
        self._tell(before)
        if moved:
            crossing(f"enter {after.state}")

    def take(self, status: Status) -> None:
        """Another supervisor has brought it to `status`: one whose upgrade has failed."""
        before, self.status = self.status, status
        self.resume()
        self._tell(before)

    def _tell(self, before: Status) -> None:
        """Let everybody know that the status is no longer `before`, if so."""
        after = self.status
        if after == before:
            return
        if (after.state, after.why) != (before.state, before.why):
            self.history.append(Moment(time.time(), after.state, after.why))
        self._surroundings.changed(self, before)
        for watcher in list(self.watchers):
            watcher(self)

    def resume(self) -> None:
        """Set timer and readiness watch to what the status asks for: after a change, and in a new supervisor."""
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.status.deadline
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._deadline)
        waiting = self.status.state is State.STARTING and self.status.pid is not None
        if waiting and self._watch is None:
            self._not_ready = ""
            watch = self._surroundings.watch_ready(self, self._ready, self._report)
            self._watch = None if watch is None else self._loop.create_task(watch)
        elif not waiting and self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def request_again(self) -> None:
        """The keeper never heard of the child that was asked for: ask again, for the same one."""
        self._spawn(self.status.generation)

    def amend(self, exit: Exit, explained: Exit) -> None:
        """More is known about an exit that was fed before."""
        status = self.status
        if status.exit is exit and explained != exit:
            self.status = replace(status, exit=explained, why=status.why.replace(exit.reason, explained.reason))

    def mark(self, setback: str, printed: Sequence[str] = ()) -> None:
        """A reload or an apply has failed, and this child goes on (`Status.setback`); "": that is over. `printed` is
        what the other one had printed."""
        before = self.status
        self.last_words = list(printed)
        if setback or before.setback:
            self.status = replace(before, setback=setback, setback_at=time.time())
            self._surroundings.remember(self)
            self._tell(before)

    def close(self) -> None:
        """It is no longer part of the table: no timer or watch may outlive it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()

    def _spawn(self, generation: int) -> None:
        try:
            self._surroundings.spawn(self, generation)
        except ProcmanError as error:
            self._loop.call_soon(self.spawn_failed, generation, error)

    def spawn_failed(self, generation: int, error: ProcmanError) -> None:
        """The keeper was not asked for child `generation` after all. Not for use within `Surroundings.spawn`, which
        raises."""
        if self.status.alive and self.status.generation == generation:
            self.feed(SpawnFailed(str(error), is_shortage(error)))

    def _deadline(self) -> None:
        self.feed(Deadline(self._not_ready))

    def _ready(self) -> None:
        if self.status.state is State.STARTING:
            self.feed(Ready())

    def _report(self, reason: str) -> None:
        self._not_ready = reason


def _essence(status: Status) -> tuple[object, ...]:
    """All of a status that its successor could not work out from what the keeper knows of the child."""
    return status.state, status.wanted, status.ending, status.failures

"""Another table while everything runs: read, compared, and carried out, whoever dies on the way.

A change has two halves. First all that is removed or must restart is stopped; then, at one moment, the new table comes
into force, and what is wanted is started. Before each half the keeper is handed what is about to be done, so a
supervisor that comes up in the midst of it goes on where the one before was:

    "next table" and "change" {"half": "stop", "why", "wanted"}     the old table is in force
    "table" and "change" {"half": "start", "why", "start"}          the new one is; each process that is to be started,
                                                                    with the number of the last child that it had

What differs is decided by `apply.plan`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from procman import apply, memo, servers, shape
from procman.config import Config
from procman.errors import ConfigError, Failed, ProcmanError
from procman.ground import Ground
from procman.lifecycle import Start, State, Status
from procman.link import KeeperLink
from procman.operation import carry_out
from procman.process import Process
from procman.report import Info
from procman.rollout import Rollouts
from procman.supervisor import Supervisor

log = logging.getLogger("procman")

HELD_NAME, NEXT_TABLE = "change", "next table"

PARTS: dict[str, Any] = {"half": Literal["stop", "start"], "why": str, "wanted": list[str], "start": dict[str, int]}
NEEDED = {"stop": ("wanted",), "start": ("start",)}
"""Of the document that the keeper holds: all that is read of it, and what each half can't do without."""

SAID = 1000
"""Characters about what is wrong with it."""


class Read(NamedTuple):
    """A table that was read, and a descriptor of all that reading it has asked from the machine (`recall`)."""

    config: Config
    memory: int


class Tables(Protocol):
    """Where tables come from, and who else must know which one is in force."""

    def read(self) -> Read:
        """The table as its files say it now. Raises ConfigError. For a thread: it may be slow."""

    def in_force(self, read: Read, config: Config, together: Mapping[str, int]) -> None:
        """`config` is in force from now on, which is `read` with the settings that a running daemon keeps. The keeper
        takes the descriptors `together` in the same moment."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A change that a supervisor before was about: the table to come ("stop"), or what is to be started ("start")."""

    half: str
    why: str
    wanted: frozenset[str] = frozenset()
    start: Mapping[str, int] = field(default_factory=dict)
    read: Read | None = None

    @staticmethod
    def needs_table(document: Any) -> bool:
        """Whether what the keeper held is of the first half, in which the next table is not yet in force."""
        return isinstance(document, dict) and document.get("half") == "stop"

    @staticmethod
    def of(document: Any, read: Read | None) -> Unfinished:
        """From what the keeper held. Raises ValueError for what makes no sense."""
        told, wrong = shape.sane(document, PARTS)
        half = str(told.get("half", ""))
        missing = [key for key in ("half", "why", *NEEDED.get(half, ())) if key not in told]
        if wrong or missing:
            raise ValueError("; ".join((*wrong, *(f"{key}: is missing" for key in missing)))[:SAID])
        if half == "start":
            return Unfinished("start", told["why"], start=told["start"])
        if read is None:
            raise ValueError("the next table is not there")
        return Unfinished("stop", told["why"], frozenset(told["wanted"]), read=read)


class Change:
    """Changes the table of `supervisor`. `problem` is "", or why the last one was refused."""

    def __init__(
        self, supervisor: Supervisor, link: KeeperLink, ground: Ground, tables: Tables, rollouts: Rollouts
    ) -> None:
        self._rollouts = rollouts
        self.problem = ""
        self._supervisor = supervisor
        self._link = link
        self._ground = ground
        self._tables = tables
        self._again = False
        self._resumed: asyncio.Task[None] | None = None
        supervisor.on_hang_up = self.hang_up

    async def reread(self, why: str) -> Info:
        """Read the table again and apply it. Raises ConfigError, and changes nothing, when it has a problem.

        Returns when all has been added, removed and asked to start again: which processes, and what it can't change.
        """
        await self._rollouts.ended()
        if self._resumed is not None:
            await asyncio.shield(self._resumed)  # whoever asked for that one may be asking again
        self._supervisor.check_free()
        self._supervisor.changing = True
        try:
            # In a thread: it reads files and looks users up, and either may be on the network.
            try:
                read = await asyncio.to_thread(self._tables.read)
            except RuntimeError as error:  # can't start new thread: RLIMIT_NPROC counts threads too
                raise Failed(f"the table can't be read now: {error}") from error
            self.problem = ""
            try:
                return await self._carry_out(read, why)
            finally:
                os.close(read.memory)
        except ConfigError as error:
            self.problem = f"the table was refused ({why}), the one before is in force: {error}"
            raise
        finally:
            self._supervisor.changing = False
            if self._again:
                self._supervisor.background(self.hang_up())

    async def hang_up(self) -> None:
        """SIGHUP: nobody waits for the answer, so it goes to the log. One that comes during a change follows after it;
        one during an upgrade is told again by the keeper."""
        if self._supervisor.upgrading:
            return
        if self._supervisor.changing:
            self._again = True
            return
        self._again = False
        try:
            await self.reread("SIGHUP")
        except ProcmanError as error:
            log.error("the table was not taken, everything stays as it is:\n%s", error)
        finally:
            if not self._again:
                self._supervisor.obeyed_hang_up()

    # --- the two halves ---------------------------------------------------------------------------------------------

    async def _carry_out(self, read: Read, why: str, wanted: Iterable[str] = ()) -> Info:
        supervisor = self._supervisor
        plan = apply.plan(supervisor.config, read.config)
        restart = {program.name for program in plan.restart}
        up = set(wanted) | {name for name in restart if supervisor.processes[name].status.wanted}
        supervisor.replacing = up & restart
        if plan.removed or restart:
            document = {"half": "stop", "why": why, "wanted": sorted(up & restart)}
            self._link.hand_over(HELD_NAME, document, {NEXT_TABLE: read.memory})
        config = replace(read.config, daemon=apply.daemon_in_force(supervisor.config.daemon, read.config.daemon))
        supervisor.take_settings(config)
        for program in plan.hot:
            process = supervisor.processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.change_logs(process.program)
            self._rollouts.watch_age(process)
        names = {
            "added": [program.name for program in plan.added],
            "removed": [program.name for program in plan.removed],
            "changed": [program.name for program in plan.hot],
            "restarted": [program.name for program in plan.restart],
        }
        supervisor.note("daemon", "", what="table", why=why, **names)
        needs_restart = f"; restart the daemon for {', '.join(plan.ignored)}" if plan.ignored else ""
        message = f"the table was read again{needs_restart}"
        log.info("%s (%s): %s", message, why, names)
        await self._replace(read, plan, why, up)
        return {**names, "message": message}

    async def _replace(self, read: Read, plan: apply.Plan, why: str, wanted: set[str]) -> None:
        """The part of a change that takes time: what must stop is stopped first."""
        supervisor = self._supervisor
        processes, config = supervisor.processes, supervisor.config
        wanted |= await self._bring_down([processes[program.name] for program in (*plan.removed, *plan.restart)], why)
        if supervisor.closing:
            return  # nothing may start any more
        await self._ground.written([processes[program.name].program for program in (*plan.removed, *plan.restart)])
        for program in plan.removed:
            supervisor.remove(program.name)
        for program in plan.restart:
            self._ground.unprepare(processes[program.name].program)
        self._ground.close_unused(config)
        await self._link.sync()  # until then the keeper still holds the addresses
        wanted |= await self._bring_down([processes[program.name] for program in plan.restart], why)
        if supervisor.closing:
            return
        again = [program.name for program in plan.restart if program.name in wanted]
        start = {name: processes[name].status.generation for name in again if not supervisor.is_down(name)}
        start |= {program.name: 0 for program in plan.added if supervisor.starts_by_itself(program)}
        self._into_force(read, {"half": "start", "why": why, "start": start})
        for program in plan.restart:
            process = processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.prepare(process.program, config)
        for program in plan.added:
            supervisor.add(program, Status())
        supervisor.put_in_order()
        await self._start(start, why)

    async def _start(self, start: Mapping[str, int], why: str) -> None:
        """The second half: start what has had no child since. When that is on record, the change is over: also what
        has left the table, for one of that name may come back."""
        found = [self._supervisor.processes[name] for name in start if name in self._supervisor.processes]
        for process in sorted(found, key=lambda process: process.program.priority):
            if process.status.generation <= start[process.name] and not process.status.wanted:
                process.feed(Start(f"the table has changed ({why})"))
        self._supervisor.replacing = set()
        await self._supervisor.journal.saved()
        for name in (HELD_NAME, NEXT_TABLE):
            self._link.release(name)

    async def _bring_down(self, processes: Sequence[Process], why: str) -> set[str]:
        """Stop them, also one that an operator starts meanwhile. Returns the names of those that were wanted up."""
        wanted: set[str] = set()
        while up := [process for process in processes if process.status.state is not State.STOPPED]:
            wanted |= {process.name for process in up if process.status.wanted}
            await carry_out("stop", up, f"the table has changed ({why})", lambda info: None)
        return wanted

    # --- what the keeper is handed ----------------------------------------------------------------------------------

    def _into_force(self, read: Read, document: Mapping[str, object]) -> None:
        together: dict[str, int] = {}
        try:
            together[HELD_NAME] = memo.write(HELD_NAME, document)
        except OSError as error:
            log.error("a supervisor that replaces this one now would not know of the change: %s", error)
        try:
            self._tables.in_force(read, self._supervisor.config, together)
        finally:
            for memory in together.values():
                os.close(memory)
        self._link.release(NEXT_TABLE)

    # --- a change that a supervisor before has begun ----------------------------------------------------------------

    def leaving(self, unfinished: Unfinished) -> frozenset[str]:
        """The processes that it stops, or has stopped: none of them may be started for anything else."""
        if unfinished.read is None:
            return frozenset()
        plan = apply.plan(self._supervisor.config, unfinished.read.config)
        return frozenset(program.name for program in (*plan.removed, *plan.restart))

    def resume(self, unfinished: Unfinished) -> None:
        """Go on with it. All processes have been taken up."""
        if not self._supervisor.closing:
            self._supervisor.changing = True
            self._resumed = self._supervisor.background(self._finish(unfinished))

    async def _finish(self, unfinished: Unfinished) -> None:
        log.info("the change of the table goes on (%s)", unfinished.why)
        try:
            if unfinished.read is None:
                await self._start(unfinished.start, unfinished.why)
            else:
                await self._carry_out(unfinished.read, unfinished.why, unfinished.wanted)
        except ProcmanError as error:
            log.error("the change of the table can't go on: %s", error)
        finally:
            if unfinished.read is not None:
                os.close(unfinished.read.memory)
            self._supervisor.changing = False
            self._resumed = None
            if self._again:
                self._supervisor.background(self.hang_up())

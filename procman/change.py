"""Another table while everything runs: read, compared, and carried out, whoever dies on the way.

A change has two halves. First all that is removed or must restart is stopped; then, at one moment, the new table comes
into force, and what is wanted is started. Before each half the keeper is handed what is about to be done, so a
supervisor that comes up in the midst of it goes on where the one before was:

    "next table" and "change" {"half": "stop", "why", "wanted"}     the old table is in force
    "table", "kept" and "change" {"half": "start", "why", "start",  the new one is; each process that is to be started,
                                  "replace", "remove"}              with the number of the last child that it had

What can be replaced by a successor is not stopped: it is *kept* as it was (`kept`) when the new table comes into force,
and passes on after all else is done, one program after the other, until one fails. So is a process that leaves because
its program has another number of them: it stops when the others run.

What differs is decided by `apply.plan`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from procman import apply, kept, memo, printed, servers, shape
from procman.config import Config, Program
from procman.errors import ConfigError, Failed, ProcmanError
from procman.kept import Kept
from procman.lifecycle import Start, State, Status
from procman.operation import Aim, Progress, carry_out, reach
from procman.process import Process
from procman.report import Info
from procman.rollout import running, serves
from procman.rollouts import Rollouts

log = logging.getLogger("procman")

HELD_NAME, NEXT_TABLE = "change", "next table"

PARTS: dict[str, Any] = {
    "half": Literal["stop", "start"],
    "why": str,
    "wanted": list[str],
    "start": dict[str, int],
    "replace": list[str],
    "remove": list[str],
}
NEEDED = {"stop": ("wanted",), "start": ("start",)}
"""Of the document that the keeper holds: all that is read of it, and what each half can't do without."""

STOPPING: Info = {"name": "the daemon", "why": "it is stopping", "output": []}
"""What has failed, when a shutdown has cut a change off."""

OUTPUT_LINES = 20
"""Of the end of the log of a program that did not start, so many are shown."""

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

    def previous(self) -> Read:
        """The table that was in force before. Raises Failed where there was none in this life of the daemon."""

    def in_force(self, read: Read, config: Config, together: Mapping[str, int], *, other: bool) -> None:
        """`config` is in force from now on, which is `read` with the settings that a running daemon keeps, but for what
        is kept of the one before. The keeper takes the descriptors `together` in the same moment. `other`: it is
        another table than the one before, which becomes the previous one."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A change that a supervisor before was about: the table to come ("stop"), or what is to be started ("start")."""

    half: str
    why: str
    wanted: frozenset[str] = frozenset()
    start: Mapping[str, int] = field(default_factory=dict)
    read: Read | None = None
    replace: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()

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
            replace_, remove = (tuple(told.get(key, ())) for key in ("replace", "remove"))
            return Unfinished("start", told["why"], start=told["start"], replace=replace_, remove=remove)
        if read is None:
            raise ValueError("the next table is not there")
        return Unfinished("stop", told["why"], frozenset(told["wanted"]), read=read)


class Change:
    """Changes the table of `supervisor`. `problem` is "", or why the last one was refused."""

    def __init__(self, rollouts: Rollouts, tables: Tables, table: Config, kept_programs: Kept) -> None:
        self._rollouts = rollouts
        self.problem = ""
        supervisor, self._link, self._ground = rollouts.world
        self._supervisor = supervisor
        self._tables = tables
        self._table = table
        self._kept = kept_programs
        self._why = ""
        self._again = False
        self._turn = asyncio.Lock()
        supervisor.on_hang_up = self.hang_up

    async def reread(self, why: str, *, previous: bool = False, progress: Progress = lambda info: None) -> Info:
        """Read the table again and apply it; or go back to the one before (`previous`). Raises ConfigError, and changes
        nothing, when it has a problem.

        Returns when all is done: which processes, and what it can't change. `failed` is there when something did not
        start, or a successor has failed: then the rest was left as it was.
        """
        async with self._turn:  # one after the other: whoever asked for the one that goes on may be asking again
            await self._rollouts.ended()
            self._supervisor.check_free()
            return await self._apply(why, previous, progress)

    async def _apply(self, why: str, previous: bool, progress: Progress) -> Info:
        self._supervisor.changing = True
        self._supervisor.on_moved()
        try:
            read = await self._read(previous)
            await self._rollouts.ended()  # none begins from now on
            self.problem = ""
            try:
                return await self._carry_out(read, why, progress=progress)
            finally:
                os.close(read.memory)
        except ConfigError as error:
            self.problem = f"the table was refused ({why}), the one before is in force: {error}"
            raise
        finally:
            self._over()

    async def plan(self, *, previous: bool = False) -> list[apply.Line]:
        """What `reread` would do now. Raises ConfigError."""
        read = await self._read(previous)
        os.close(read.memory)
        config = self._supervisor.config
        up = running(self._supervisor.all())
        return apply.lines(config, read.config, self._possible(apply.plan(config, read.config)), up)

    async def _read(self, previous: bool) -> Read:
        # In a thread: it reads files and looks users up, and either may be on the network.
        try:
            return await asyncio.to_thread(self._tables.previous if previous else self._tables.read)
        except RuntimeError as error:  # can't start new thread: RLIMIT_NPROC counts threads too
            raise Failed(f"the table can't be read now: {error}") from error

    def _possible(self, plan: apply.Plan) -> apply.Plan:
        """`plan`, where only what serves is replaced."""
        processes = self._supervisor.processes
        serving = [program for program in plan.replace if serves(processes[program.name])]
        others = [program for program in plan.replace if program not in serving]
        return replace(plan, replace=tuple(serving), restart=(*plan.restart, *others))

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
            done = await self.reread("SIGHUP")
            if "failed" in done:
                log.error("%s", done["message"])
        except ProcmanError as error:
            log.error("the table was not taken, everything stays as it is:\n%s", error)
        finally:
            if not self._again:
                self._supervisor.obeyed_hang_up()

    # --- the two halves ---------------------------------------------------------------------------------------------

    async def _carry_out(
        self, read: Read, why: str, wanted: Iterable[str] = (), progress: Progress = lambda info: None
    ) -> Info:
        supervisor = self._supervisor
        self._why = why
        before = supervisor.config
        plan = self._possible(apply.plan(before, read.config))
        late = self._late(plan, read.config)
        plan = replace(plan, removed=tuple(program for program in plan.removed if program.name not in late))
        restart = {program.name for program in plan.restart}
        up = set(wanted) | {name for name in restart if supervisor.processes[name].status.wanted}
        up |= self._unscaled(before, plan)
        supervisor.replacing = up & restart
        if plan.removed or restart:
            document = {"half": "stop", "why": why, "wanted": sorted(up & restart)}
            self._link.hand_over(HELD_NAME, document, {NEXT_TABLE: read.memory})
        daemon = apply.daemon_in_force(before.daemon, read.config.daemon)
        self._table = replace(read.config, daemon=daemon)
        listeners = {listener.name: listener for listener in before.listeners}
        self._kept = kept.keep(before, {*late, *(program.name for program in plan.replace)}, listeners)
        supervisor.take_settings(self._kept.of(self._table))
        self._ground.tune(plan.tuned)
        for program in plan.hot:
            process = supervisor.processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.change_logs(process.program)
            self._rollouts.watch_age(process)
        names = {
            "added": [program.name for program in plan.added],
            "removed": [program.name for program in plan.removed] + late,
            "changed": [program.name for program in plan.hot],
            "restarted": [program.name for program in plan.restart],
            "replaced": [program.name for program in plan.replace],
        }
        supervisor.note("daemon", "", what="table", why=why, **names)
        needs_restart = f"; restart the daemon for {', '.join(plan.ignored)}" if plan.ignored else ""
        message = f"the table was read again{needs_restart}"
        log.info("%s (%s): %s", message, why, names)
        failed = await self._replace(read, plan, up, late, progress)
        for part in ("replaced", "removed"):
            names[part] = [name for name in names[part] if name not in self._kept.programs]
        names["left"] = sorted(self._kept.programs)
        if failed:
            return {**names, "message": f"stopped at {failed['name']}: {failed['why']}", "failed": failed}
        return {**names, "message": message}

    def _late(self, plan: apply.Plan, new: Config) -> list[str]:
        """Those that leave because their program has another number of processes: the others start before that."""
        programs = {program.program for program in new.programs}
        processes = self._supervisor.processes
        return [p.name for p in plan.removed if p.program in programs and serves(processes[p.name])]

    def _unscaled(self, before: Config, plan: apply.Plan) -> set[str]:
        """Those whose number goes by load no more: whatever it was, they all start."""
        scaled = {program.name for program in before.programs if program.scale is not None}
        fixed = [program for program in (*plan.hot, *plan.restart) if program.scale is None]
        return {p.name for p in fixed if p.name in scaled and self._supervisor.starts_by_itself(p)}

    async def _replace(
        self, read: Read, plan: apply.Plan, wanted: set[str], late: Sequence[str], progress: Progress
    ) -> Info:
        """The part of a change that takes time: what must stop is stopped first. Returns what has failed, if any."""
        supervisor, why = self._supervisor, self._why
        processes, config = supervisor.processes, supervisor.config
        wanted |= await self._bring_down([processes[program.name] for program in (*plan.removed, *plan.restart)], why)
        if supervisor.closing:
            return STOPPING  # nothing may start any more
        await self._ground.written([processes[program.name].program for program in (*plan.removed, *plan.restart)])
        for program in plan.removed:
            supervisor.remove(program.name)
        for program in plan.restart:
            self._ground.unprepare(processes[program.name].program)
        self._ground.close_unused(config)
        await self._link.sync()  # until then the keeper still holds the addresses
        wanted |= await self._bring_down([processes[program.name] for program in plan.restart], why)
        if supervisor.closing:
            return STOPPING
        again = [program.name for program in (*plan.restart, *plan.hot) if program.name in wanted]
        start = {name: processes[name].status.generation for name in again if not supervisor.is_down(name)}
        start |= {program.name: 0 for program in plan.added if supervisor.starts_by_itself(program)}
        passing = [program.name for program in plan.replace]
        document = {"half": "start", "why": why, "start": start, "replace": passing, "remove": late}
        self._into_force(read, document, other=plan != apply.Plan(ignored=plan.ignored) or bool(late))
        for program in plan.restart:
            process = processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.prepare(process.program, config)
        for program in plan.added:
            supervisor.add(program, Status())
        supervisor.put_in_order()
        return await self._start(Unfinished("start", why, start=start, replace=(*passing,), remove=(*late,)), progress)

    async def _start(self, rest: Unfinished, progress: Progress) -> Info:
        """The second half: start what has had no child since, then replace what is kept. When that is on record, the
        change is over: also what has left the table, for one of that name may come back."""
        start, why = rest.start, f"the table has changed ({rest.why})"
        found = [self._supervisor.processes[name] for name in start if name in self._supervisor.processes]
        for process in sorted(found, key=lambda process: process.program.priority):
            if process.status.generation <= start[process.name] and not process.status.wanted:
                process.feed(Start(why))
        self._supervisor.replacing = set()
        failed = await self._pass_on(found, rest, why, progress)
        await self._supervisor.journal.saved()
        for name in (HELD_NAME, NEXT_TABLE):
            self._link.release(name)
        return failed

    async def _pass_on(self, started: Sequence[Process], rest: Unfinished, why: str, progress: Progress) -> Info:
        """Replace and remove what is kept, once what was started serves. Ends at the first failure, and returns it."""
        aims = [Aim("start", process, process.status.generation) for process in started]
        for aim in aims:
            good, reason = await reach(aim, progress)
            if not good:
                output: list[str] = []
                with contextlib.suppress(ProcmanError, OSError, RuntimeError):  # no descriptor or thread is left
                    output = await asyncio.to_thread(printed.last_lines, aim.process.program, OUTPUT_LINES)
                return {"name": aim.process.name, "why": f"it did not start: {reason}", "output": output}
        by_program: dict[str, list[Program]] = {}
        for program in sorted(self._table.programs, key=lambda program: program.priority):
            if program.name in rest.replace and program.name in self._kept.programs:
                by_program.setdefault(program.program, []).append(program)
        for programs in by_program.values():
            outcomes, outputs = await self._rollouts.replace(programs, why, progress, passed=self._passed)
            for name, (good, reason) in outcomes.items():
                if not good:
                    self._ground.close_unused(self._supervisor.config)
                    text = f"{reason}; it stays what it was"
                    return {"name": name, "why": text, "output": outputs.get(name, [])}
        leaving = [self._supervisor.processes[name] for name in rest.remove if name in self._kept.programs]
        await self._bring_down(leaving, rest.why)
        await self._ground.written([process.program for process in leaving])
        for process in leaving:
            if self._supervisor.closing:
                return STOPPING
            self._supervisor.remove(process.name)
            self._let_go(process.name)
        self._ground.close_unused(self._supervisor.config)
        return {}

    def _passed(self, name: str, again: Program | None) -> None:
        """The successor of a process that was kept serves; or it does no more, and the process is `again` what it
        was."""
        if again is None:
            self._let_go(name)
        elif name not in self._kept.programs:
            known = {listener.name: listener for listener in self._supervisor.config.listeners}
            needed = {each: known[each] for each in again.listen if each in known}
            self._keep(kept.Kept(self._kept.programs | {name: again}, self._kept.listeners | needed))

    def _let_go(self, name: str) -> None:
        if name in self._kept.programs:
            self._keep(self._kept.without([name]))

    def _keep(self, now: kept.Kept) -> None:
        self._kept = now
        self._supervisor.take_settings(now.of(self._table))
        if now.programs:
            self._link.hand_over(kept.HELD_NAME, now.document())
        else:
            self._link.release(kept.HELD_NAME)

    async def _bring_down(self, processes: Sequence[Process], why: str) -> set[str]:
        """Stop them, also one that an operator starts meanwhile. Returns the names of those that were wanted up."""
        wanted: set[str] = set()
        while up := [process for process in processes if process.status.state is not State.STOPPED]:
            wanted |= {process.name for process in up if process.status.wanted}
            await carry_out("stop", up, f"the table has changed ({why})", lambda info: None)
        return wanted

    # --- what the keeper is handed ----------------------------------------------------------------------------------

    def _into_force(self, read: Read, document: Mapping[str, object], *, other: bool) -> None:
        together: dict[str, int] = {}
        try:
            together[HELD_NAME] = memo.write(HELD_NAME, document)
            together[kept.HELD_NAME] = memo.write(kept.HELD_NAME, self._kept.document())
        except OSError as error:
            log.error("a supervisor that replaces this one now would not know of the change: %s", error)
        try:
            self._tables.in_force(read, self._supervisor.config, together, other=other)
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
            self._supervisor.background(self._finish(unfinished))

    async def _finish(self, unfinished: Unfinished) -> None:
        async with self._turn:
            await self._go_on(unfinished)

    def _over(self) -> None:
        self._supervisor.changing = False
        self._supervisor.on_moved()
        if self._again:
            self._supervisor.background(self.hang_up())

    async def _go_on(self, unfinished: Unfinished) -> None:
        log.info("the change of the table goes on (%s)", unfinished.why)
        try:
            if unfinished.read is None:
                failed = await self._start(unfinished, lambda info: None)
            else:
                failed = (await self._carry_out(unfinished.read, unfinished.why, unfinished.wanted)).get("failed", {})
            if failed:
                log.error("the change of the table has stopped at %s: %s", failed["name"], failed["why"])
        except ProcmanError as error:
            log.error("the change of the table can't go on: %s", error)
        finally:
            if unfinished.read is not None:
                os.close(unfinished.read.memory)
            self._over()

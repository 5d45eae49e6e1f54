"""Another table while everything runs: read, compared, and carried out, whoever dies on the way.

Before all else every new address is opened: when one can't be had, nothing changes. A change has two halves. First all
that is removed is stopped; then, at one moment, the new table comes into force, and what is wanted is started. Before
each half the keeper is handed what is about to be done, so a supervisor that comes up in the midst of it goes on where
the one before was:

    "next table" and "change" {"half": "stop", "why", "wanted"}     the old table is in force
    "table", "kept" and "change" {"half": "start", "why", "start",  the new one is; each process that is to be started,
                                  "replace", "restart", "remove",   or restarted, with the number of its last child;
                                  "added"}                          what is there for the first time
    "kept" and "change" {"half": "start", "why", "back"}            a restart has failed (`renewal`)

What serves and needs another child is *kept* as it was (`versions`) when the new table comes into force. After all else
is done it is replaced by a successor (`rollouts`) or restarted (`renewal`), one program after the other, until one
fails. So is a process that leaves because its program has another number of them, or other names: it stops when the
others run. Those that come with it to a program that serves are successors, too, with nobody before them.

What differs is decided by `apply.plan`, and what that means for what serves by `apply.rolling`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Literal, NamedTuple, Protocol

from procman import apply, kept, memo, servers, shape
from procman.config import Config, Program
from procman.errors import ConfigError, Failed, ProcmanError
from procman.kept import Kept
from procman.lifecycle import Start, Status
from procman.operation import Aim, Progress, bring_down, reach
from procman.process import Process
from procman.records import dataclass
from procman.renewal import STOPPING, Renewal
from procman.report import Info
from procman.rollout import running, serves
from procman.rollouts import Rollouts
from procman.versions import CHANGE, Versions

log = logging.getLogger("procman")

HELD_NAME, NEXT_TABLE = CHANGE, "next table"

PARTS: dict[str, Any] = {
    "half": Literal["stop", "start"],
    "why": str,
    "wanted": list[str],
    "start": dict[str, int],
    "replace": list[str],
    "restart": dict[str, int],
    "back": dict[str, int],
    "remove": list[str],
    "added": list[str],
}
NEEDED = {"stop": ("wanted",), "start": ("start",)}
"""Of the document that the keeper holds: all that is read of it, and what each half can't do without."""

NOTICE_SECONDS = 10.0
"""So long a program that is new may start before whoever waits is told how to give it up."""

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
        """The table that was in force before, maybe in another daemon's life. Raises Failed where none is known."""

    def in_force(self, read: Read, config: Config, together: Mapping[str, int], *, other: bool) -> None:
        """`config` is in force from now on, which is `read` with the settings that a running daemon keeps, but for what
        is kept of the one before. The keeper takes the descriptors `together` in the same moment. `other`: it is
        another table than the one before, and that one worked: it becomes the previous one."""

    def settled(self, *, works: bool) -> None:
        """No change is under way any more. `works`: nothing is left of the table before that in force."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A change that a supervisor before was about: the table to come ("stop"), or what is to be started ("start")."""

    half: str
    why: str
    wanted: frozenset[str] = frozenset()
    start: Mapping[str, int] = field(default_factory=dict)
    read: Read | None = None
    replace: tuple[str, ...] = ()
    restart: Mapping[str, int] = field(default_factory=dict)
    back: Mapping[str, int] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

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
            told |= {key: tuple(told.get(key, ())) for key in ("replace", "remove", "added")}
            return Unfinished(**told)
        if read is None:
            raise ValueError("the next table is not there")
        return Unfinished("stop", told["why"], frozenset(told["wanted"]), read=read)

    def document(self) -> Info:
        """For the keeper, in the second half."""
        told = {"half": self.half, "why": self.why, "start": dict(self.start), "replace": list(self.replace)}
        told |= {"restart": dict(self.restart), "back": dict(self.back), "remove": list(self.remove)}
        return {**told, "added": list(self.added)}


class Change:
    """Changes the table of `supervisor`. `problem` is "", or why the last one was refused; `versions` says what of the
    one before is in force."""

    def __init__(self, rollouts: Rollouts, tables: Tables, table: Config, kept_programs: Kept) -> None:
        self._rollouts = rollouts
        self.problem = ""
        supervisor, self._link, self._ground = rollouts.world
        self._supervisor = supervisor
        self._tables = tables
        self.versions = Versions(supervisor, self._link, table, kept_programs)
        self._renewal = Renewal(rollouts.world, self.versions)
        self._why = ""
        self._notes: dict[str, list[str]] = {}  # what is to be told of how successors have taken over: of which
        self._works = True  # the table in force, all of it
        self._again = False
        self._turn = asyncio.Lock()
        supervisor.on_hang_up = self.hang_up
        rollouts.passed, rollouts.listening = self.versions.passed, self.versions.listening

    async def reread(
        self,
        why: str,
        *,
        previous: bool = False,
        progress: Progress = lambda info: None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Info:
        """Read the table again and apply it; or go back to the one before (`previous`). Raises ConfigError, and changes
        nothing, when it has a problem; and Failed when an address can't be had.

        Returns when all is done: which processes, and what it can't change. `failed` is there when something did not
        start, or a successor has failed: then the rest was left as it was. `goes_on` is there when that takes more than
        `timeout` seconds, or nobody wants to wait: then the table was taken, and the log tells what comes of it.
        """
        begun = asyncio.Event()
        task = self._supervisor.background(self._in_turn(why, previous, progress, begun))
        if wait:
            try:
                async with asyncio.timeout(timeout):
                    return await asyncio.shield(task)
            except TimeoutError:
                waits = "" if begun.is_set() else self._reloads()
                message = f"not done within {timeout:g} s; it goes on" + (f" when {waits} has ended" if waits else "")
        else:
            beginning = asyncio.ensure_future(begun.wait())
            await asyncio.wait({task, beginning}, return_when=asyncio.FIRST_COMPLETED)
            beginning.cancel()
            message = "the table was read again; the change goes on"
            if task.done():
                return task.result()
        task.add_done_callback(self._unattended)
        return {"message": message, "goes_on": True}

    async def _in_turn(self, why: str, previous: bool, progress: Progress, begun: asyncio.Event) -> Info:
        async with self._turn:  # one after the other: whoever asked for the one that goes on may be asking again
            if waits := self._reloads():
                name = self._rollouts.busy()[0]
                stop = f"procmanctl stop {self._rollouts.to_stop()} gives that up"
                told = f"the change of the table waits until {waits} has ended; {stop}"
                process = self._supervisor.processes.get(name)
                state = "" if process is None else str(process.status.state)
                progress({"name": name, "state": state, "why": told, "notice": True})
            await self._rollouts.ended()
            self._supervisor.check_free()
            return await self._apply(why, previous, progress, begun)

    def _reloads(self) -> str:
        """What goes on that a change has to wait for, in words."""
        names = self._rollouts.busy()
        return f"the reload of {', '.join(names)}" if names else ""

    @staticmethod
    def _unattended(task: asyncio.Task[Info]) -> None:
        """A change is over that nobody waits for."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("the table was not taken, everything stays as it is:\n%s", error)
        elif not task.cancelled() and "failed" in task.result():
            log.error("%s", task.result()["message"])

    async def _apply(self, why: str, previous: bool, progress: Progress, begun: asyncio.Event) -> Info:
        self._supervisor.changing = True
        self._supervisor.on_moved()
        try:
            read = await self._read(previous)
            await self._rollouts.ended()  # none begins from now on
            self.problem = ""
            try:
                self._open_early(read.config)
                begun.set()
                said = "the table before is in force again" if previous else "the table was read again"
                return await self._carry_out(read, why, progress=progress, said=said)
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
        lines = apply.lines(config, read.config, self._plan(read.config), up)
        taken = self._ground.taken(read.config, self._starting(read.config))
        programs = {program.name: program for program in read.config.programs}
        return [apply.refused(self._as_it_is(line), programs, taken) for line in lines]

    def _as_it_is(self, line: apply.Line) -> apply.Line:
        """`line`, for a process that may not serve now."""
        process = self._supervisor.processes.get(line.name)
        if process is None or line.action != "restart" or serves(process):
            return line
        cost = "it does not serve now, and starts anew" if process.status.wanted else "takes effect when it is started"
        return replace(line, cost=cost)

    async def _read(self, previous: bool) -> Read:
        # In a thread: it reads files and looks users up, and either may be on the network.
        try:
            return await asyncio.to_thread(self._tables.previous if previous else self._tables.read)
        except RuntimeError as error:  # can't start new thread: RLIMIT_NPROC counts threads too
            raise Failed(f"the table can't be read now: {error}") from error

    def _plan(self, new: Config) -> apply.Plan:
        """From what there is now to `new`."""
        old, processes = self._supervisor.config, self._supervisor.all()
        wanted = {process.name for process in processes if process.status.wanted} | self._unscaled(new)
        return apply.rolling(old, new, apply.plan(old, new), running(processes), wanted)

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
        self,
        read: Read,
        why: str,
        wanted: Iterable[str] = (),
        progress: Progress = lambda info: None,
        said: str = "the table was read again",
    ) -> Info:
        supervisor = self._supervisor
        self._why, self._notes, self._works = why, {}, not self.versions.left()
        before = supervisor.config
        plan = self._plan(read.config)
        serving = {program.name for program in plan.restart if serves(supervisor.processes[program.name])}
        idle = {program.name for program in plan.restart} - serving
        up = set(wanted) | {name for name in idle if supervisor.processes[name].status.wanted}
        up |= self._unscaled(read.config)
        supervisor.replacing = up & idle
        if plan.removed or idle:
            document = {"half": "stop", "why": why, "wanted": sorted(up & idle)}
            self._link.hand_over(HELD_NAME, document, {NEXT_TABLE: read.memory})
        daemon = apply.daemon_in_force(before.daemon, read.config.daemon)
        listeners = {listener.name: listener for listener in before.listeners}
        later = {*serving, *(program.name for program in (*plan.leaving, *plan.replace, *plan.resting))}
        self.versions.begin(replace(read.config, daemon=daemon), kept.keep(before, later, listeners))
        untuned = self._ground.tune(plan.tuned)
        for program in plan.hot:
            process = supervisor.processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.change_logs(process.program)
            self._rollouts.watch_age(process)
        names = {
            "added": [program.name for program in (*plan.added, *plan.coming)],
            "removed": [program.name for program in (*plan.removed, *plan.leaving)],
            "changed": [program.name for program in plan.hot],
            "restarted": [program.name for program in (*plan.restart, *plan.resting)],
            "replaced": [program.name for program in plan.replace],
        }
        supervisor.note("daemon", "", what="table", why=why, **names)
        needs_restart = f"; restart the daemon for {', '.join(plan.ignored)}" if plan.ignored else ""
        message = f"{said}{needs_restart}"
        log.info("%s (%s): %s", message, why, names)
        plan = replace(plan, restart=tuple(program for program in plan.restart if program.name in idle))
        failed = await self._replace(read, plan, up, sorted(serving), progress)
        left = self.versions.left()
        for part in ("added", "replaced", "restarted", "removed"):
            names[part] = [name for name in names[part] if name not in left]
        names["left"] = left
        if failed:
            return {**names, "message": f"stopped at {failed['name']}: {failed['why']}", "failed": failed}
        notes = "".join(f"; {', '.join(each)}: {note}" for note, each in self._notes.items())
        return {**names, "message": message + notes + "".join(f"; {problem}" for problem in untuned)}

    def _open_early(self, new: Config) -> None:
        """Open the addresses that are new, for all that is to run. Raises Failed when one can't be had: then none of
        them is left open."""
        before = self._supervisor.config
        try:
            self._ground.open_early(new, self._starting(new))
        except ProcmanError as error:
            self._ground.close_unused(before)
            raise Failed(f"nothing was changed: {error}", hint=error.hint) from error

    def _starting(self, new: Config) -> list[Program]:
        """What gets a child when `new` is applied."""
        plan = self._plan(new)
        up = [program for program in plan.restart if self._supervisor.processes[program.name].status.wanted]
        return [*up, *(program for program in plan.added if program.autostart), *plan.replace, *plan.coming]

    def _unscaled(self, new: Config) -> set[str]:
        """Those whose number goes by load no more: whatever it was, they all start."""
        scaled = {program.name for program in self._supervisor.config.programs if program.scale is not None}
        fixed = [program for program in new.programs if program.scale is None and program.name in scaled]
        return {program.name for program in fixed if self._supervisor.starts_by_itself(program)}

    async def _replace(
        self, read: Read, plan: apply.Plan, wanted: set[str], later: Sequence[str], progress: Progress
    ) -> Info:
        """The part of a change that takes time: what is removed is stopped first, and what is to be another program and
        does not serve; those `later` restart when the others run. Returns what has failed, if any."""
        supervisor, why = self._supervisor, self._why
        processes, config = supervisor.processes, supervisor.config
        await self.versions.leave([processes[program.name] for program in plan.removed], self._ground.parting)
        going = [processes[program.name] for program in (*plan.removed, *plan.restart)]
        wanted |= await bring_down(going, why, supervisor.aside)
        if supervisor.closing:
            return STOPPING  # nothing may start any more
        await self._ground.written([process.program for process in going])
        for program in plan.removed:
            supervisor.remove(program.name)
        for program in plan.restart:
            self._ground.unprepare(processes[program.name].program)
        self._ground.close_unused(config, self.versions.table.listeners)
        await self._link.sync()  # until then the keeper still holds the addresses
        wanted |= await bring_down([processes[program.name] for program in plan.restart], why)
        if supervisor.closing:
            return STOPPING
        again = [program.name for program in (*plan.restart, *plan.hot) if program.name in wanted]
        start = {name: processes[name].status.generation for name in again if not supervisor.is_down(name)}
        start |= {program.name: 0 for program in plan.added if supervisor.starts_by_itself(program)}
        rest = Unfinished(
            "start",
            why,
            start=start,
            replace=tuple(program.name for program in (*plan.replace, *plan.coming)),
            restart={name: processes[name].status.generation for name in later},
            remove=tuple(program.name for program in plan.leaving),
            added=tuple(program.name for program in (*plan.added, *plan.coming)),
        )
        other = plan != apply.Plan(ignored=plan.ignored) or bool(later)
        # The way back leads to a table that worked: not to one of which something was left out.
        self._into_force(read, rest.document(), other=other and self._works)
        for program in plan.restart:
            process = processes[program.name]
            process.program = servers.in_place(program, process.program.slot)
            self._ground.prepare(process.program, config)
        for program in (*plan.added, *plan.coming):
            supervisor.add(program, Status())
        supervisor.put_in_order()
        return await self._start(rest, progress)

    async def _start(self, rest: Unfinished, progress: Progress) -> Info:
        """The second half: start what has had no child since, then replace what is kept. When that is on record, the
        change is over: also what has left the table, for one of that name may come back."""
        found = [self._supervisor.processes[name] for name in rest.start if name in self._supervisor.processes]
        changing = {program.program for program in self._awaited((*rest.replace, *rest.restart))}
        early = [process for process in found if process.program.program not in changing]
        later = [process for process in found if process not in early]
        self.versions.awaiting(rest.replace)
        self._leave_alone(rest)
        self._begin(early, rest)
        self._supervisor.replacing = set()
        if rest.back:
            then = await self._renewal.go_back(rest.back, rest.why, progress)
            failed: Info = {"name": next(iter(rest.back)), "why": f"it did not start: {then}"}
        else:
            failed = await self._up(early, progress) or await self._pass_on(later, rest, progress)
        if failed:
            await self._leave_out(failed, rest)
        if self._supervisor.closing:
            return failed
        self._ground.close_unused(self._supervisor.config)
        self.settled()
        await self._supervisor.journal.saved()
        for name in (HELD_NAME, NEXT_TABLE):
            self._link.release(name)
        return failed

    def _leave_alone(self, rest: Unfinished) -> None:
        """The programs with which `rest` has nothing to do can have more or fewer processes, and a first one, at once:
        it may take as long as others take to start, or their canaries."""
        names = {*rest.start, *rest.replace, *rest.restart, *rest.back, *rest.remove, *rest.added}
        names |= {*self.versions.left(), *self.versions.kept.tried}
        there = self._supervisor.all()
        touched = {process.program.program for process in there if process.name in names}
        self._supervisor.untouched = {process.program.program for process in there} - touched
        self._supervisor.on_moved()

    def settled(self) -> None:
        """No change is under way: what is so now is for a daemon to come."""
        self.versions.settled()
        self._tables.settled(works=not self.versions.left())

    @staticmethod
    def _begin(processes: Iterable[Process], rest: Unfinished) -> None:
        for process in sorted(processes, key=lambda process: process.program.priority):
            if process.status.generation <= rest.start[process.name] and not process.status.wanted:
                process.feed(Start(f"the table has changed ({rest.why})"))

    async def _up(self, started: Iterable[Process], progress: Progress) -> Info:
        """Wait until all of them serve. Returns what has failed, if anything."""
        loop = asyncio.get_running_loop()
        for aim in [Aim("start", process, process.status.generation) for process in started]:
            notice = loop.call_later(NOTICE_SECONDS, self._waits, aim.process, progress)
            try:
                good, reason = await reach(aim, progress)
            finally:
                notice.cancel()
            if not good:
                output = await self._renewal.output(aim.process)
                return {"name": aim.process.name, "why": f"it did not start: {reason}", "output": output}
        return {}

    @staticmethod
    def _waits(process: Process, progress: Progress) -> None:
        status = process.status
        told = f"is {status.state}, {status.why}: all else waits for it; procmanctl stop {process.name} gives it up"
        progress({"name": process.name, "state": str(status.state), "why": told, "notice": True})

    async def _pass_on(self, later: Sequence[Process], rest: Unfinished, progress: Progress) -> Info:
        """Replace what is kept, and start `later` of the same programs when that has gone well; then remove what
        leaves. Ends at the first failure, and returns it."""
        versions = self.versions
        before = versions.kept.programs | versions.kept.tried
        turns = [(group, True) for group in apply.turns(versions.of_table(rest.restart), before)]
        turns += [(group, False) for group in apply.turns(self._awaited(rest.replace), before)]
        for group, restarts in turns:
            if restarts:
                failed = await self._renewal.renew(group, rest.why, progress)
            else:
                failed = await self._pass_over(group, f"the table has changed ({rest.why})", progress, rest.remove)
            programs = {program.program for program in group}
            more = [process for process in later if process.program.program in programs]
            if not failed and not self._supervisor.closing:
                self._begin(more, rest)
                failed = await self._up(more, progress)
            if failed:
                return failed
            await self._renewal.follow(self._resting(programs, rest), rest.why)
            self._ground.close_unused(self._supervisor.config, versions.table.listeners)
        leaving = [self._supervisor.processes[name] for name in rest.remove if name in versions.kept.programs]
        programs = {process.program.program for process in leaving}
        beside = [self._supervisor.processes[name] for name in rest.start if name in self._supervisor.processes]
        if failed := await self._renewal.proven([one for one in beside if one.program.program in programs], progress):
            return failed
        await bring_down(leaving, rest.why, self._supervisor.aside)
        await self._ground.written([process.program for process in leaving])
        for process in leaving:
            if self._supervisor.closing:
                return STOPPING
            self._supervisor.remove(process.name)
            versions.let_go([process.name])
        return {}

    def _resting(self, programs: Container[str], rest: Unfinished) -> list[Program]:
        """What the table says of those of `programs` that were down when the change began."""
        turns = {*rest.replace, *rest.restart}
        names = [name for name, one in self.versions.kept.programs.items() if one.program in programs]
        return self.versions.of_table(name for name in names if name not in turns)

    def _awaited(self, names: Iterable[str]) -> list[Program]:
        """What the table says of those of these processes that are not that yet, in order of their priority: what is
        kept, or tried, and what has come with it and has had no child, or has one that only takes over now."""
        there, names = self._supervisor.processes, list(names)
        new = [each for each in names if each in there and not there[each].status.generation]
        return self.versions.of_table(names, [*new, *filter(self._rollouts.under_way, names)])

    async def _pass_over(
        self, programs: Sequence[Program], why: str, progress: Progress, leaving: Sequence[str]
    ) -> Info:
        """Successors take over from these, and from those of the same programs that are `leaving`. Returns what has
        failed, if anything."""
        programs = self._awaited([program.name for program in programs])  # others have done it meanwhile
        outcomes, outputs = await self._rollouts.replace(
            programs, why, progress, passed=self.versions.passed, leaving=leaving
        )
        self.versions.let_go(name for name, (good, _) in outcomes.items() if good)
        for name, (good, reason) in outcomes.items():
            if not good:
                return {"name": name, "why": f"{reason}; it stays what it was", "output": outputs.get(name, [])}
            if more := reason.removeprefix(why).removeprefix("; "):
                self._notes.setdefault(more, []).append(name)
        return {}

    async def _leave_out(self, failed: Info, rest: Unfinished) -> None:
        """The new version of a process is no good, as `failed` tells: what has come to its program with it goes again.
        A program that is all new stays, and is tried again. Adds to `failed` what has gone, and who remembers it."""
        supervisor = self._supervisor
        process = supervisor.processes.get(failed["name"])
        if process is None or supervisor.closing:
            return
        others = [each for each in supervisor.all() if each.program.program == process.program.program]
        came = [each for each in others if each.name in rest.added]
        if not came or len(came) == len(others):
            return
        await bring_down(came, rest.why)
        await self._ground.written([each.program for each in came])
        if supervisor.closing:
            return
        self.versions.left_out([each.name for each in came])
        for each in came:
            supervisor.remove(each.name)
        gone = f"{', '.join(each.name for each in came)} came with it, and went with it"
        log.error("%s", gone)
        failed["why"] += f"; {gone}"
        remember = (each.name for each in others if each not in came and each.status.setback)
        failed["stays"] = next(remember, "")

    # --- what the keeper is handed ----------------------------------------------------------------------------------

    def _into_force(self, read: Read, document: Mapping[str, object], *, other: bool) -> None:
        together: dict[str, int] = {}
        try:
            together[HELD_NAME] = memo.write(HELD_NAME, document)
            together[kept.HELD_NAME] = memo.write(kept.HELD_NAME, self.versions.kept.document())
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
        """The processes that it stops for good, or has stopped: none of them may be started for anything else."""
        if unfinished.read is None:
            return frozenset()
        plan = apply.plan(self._supervisor.config, unfinished.read.config)
        there = {program.program for program in unfinished.read.config.programs}
        return frozenset(program.name for program in plan.removed if program.program not in there)

    def resume(self, unfinished: Unfinished) -> None:
        """Go on with it. All processes have been taken up."""
        if not self._supervisor.closing:
            self._supervisor.changing = True
            self._supervisor.background(self._finish(unfinished))

    async def _finish(self, unfinished: Unfinished) -> None:
        async with self._turn:
            await self._go_on(unfinished)

    def _over(self) -> None:
        self._supervisor.changing, self._supervisor.untouched = False, ()
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

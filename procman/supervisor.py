"""The set of processes: which there are, what happens to them, in what order they start and stop.

Each process decides for itself (`lifecycle`), and stands on `ground.Ground`; this module decides about several of them.
What operators ask comes through `desk`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from procman import apply, launch, lifecycle, report
from procman.config import Config, Program
from procman.errors import ConfigError, Failed, ProcmanError
from procman.events import EventLog
from procman.ground import Ground
from procman.journal import Journal
from procman.keeper.wire import Message
from procman.lifecycle import Exited, Gone, Ready, Spawned, SpawnFailed, Start, State, Status, Stop
from procman.link import KeeperLink
from procman.measures import Measures
from procman.operation import carry_out, levels
from procman.orphans import Register
from procman.process import Process
from procman.report import Info
from procman.snapshot import Keeper, Snapshot

log = logging.getLogger("procman")

ADOPTED = "adopted: the procmand before was killed"
"""Why a process is what it is when a new daemon has found it."""

SAID_ONCE = frozenset({"notify", "log"})
"""Kinds of readiness that a program shows only once: nobody may have heard it."""

READY = "ready"
"""What the keeper remembers of a child that became ready."""

LAST_KILL_SECONDS = 5.0
"""How long a stopping daemon waits for its last SIGKILL to take effect."""

Result = TypeVar("Result")


class Supervisor:
    """All processes of one table, and what can be done to them. `read_table` reads the table again, or raises."""

    def __init__(self, config: Config, link: KeeperLink, ground: Ground, read_table: Callable[[], Config]) -> None:
        self.config = config
        self.events = EventLog()
        self.processes: dict[str, Process] = {}
        self.finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.on_table: Callable[[Config], None] = lambda config: None
        self._read_table = read_table
        self._link = link
        self._ground = ground
        self._down: set[str] = set()
        self._documents: dict[str, tuple[Status, Info]] = {}
        self.closing = False
        self.deserted = False
        self._applying = False
        self._reread_again = False
        self._table_problem = ""
        self._beginning = True
        self.keeper = Keeper()
        self._upgrade: asyncio.Future[str] | None = None
        self._exit_status = 0
        self.since = time.time()
        self.snapshot = Snapshot()
        self._register = Register()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.journal = Journal(f"{config.daemon.state_dir}/state.json", self._document, link.forget)
        self.measures = Measures(config.daemon.sampling, self._mains)
        ground.attach(self._changed, self.processes)

    # --- beginning --------------------------------------------------------------------------------------------------

    def begin(self, snapshot: Snapshot, document: dict[str, Any] | None) -> None:
        """Take up the processes: those of a supervisor that died as they are now, else start what is to be started.

        `document` is the state file's, None where there is none. A daemon that is new takes them up too, where children
        of one that was killed go on; but it was started to run the programs, whatever the old one was about to do.
        """
        self.snapshot = snapshot
        self.keeper = snapshot.keeper
        state = document or {}
        replaces = snapshot.starts > 1
        recovered = replaces or bool(snapshot.children)
        self._down = {str(name) for name in state.get("down", [])}
        self._exit_status = int(state.get("exit_status", 0)) if replaces else 0
        statuses = state.get("processes", {}) if recovered else {}
        for program in self.config.programs:
            self._add(program, _status_of(statuses.get(program.name)))
        if replaces:
            self.note("daemon", "", what="supervisor restarted", why=snapshot.last)
            log.warning("the supervisor was replaced (%s); %d children go on", snapshot.last, len(snapshot.children))
        self._take_up(snapshot)
        self._link.listen(self._keeper_says, self._keeper_gone)
        if replaces and state.get("closing"):
            self.shut_down("continued after the supervisor was replaced")
        elif replaces and state.get("reread"):
            self.background(self._hang_up())
        elif recovered and not replaces:
            self._settle_adopted(snapshot, starting=bool(state.get("closing")))
        for process in itertools.chain.from_iterable(levels(self.all())):
            fresh = process.status.generation == 0 and process.status.state is State.STOPPED
            if fresh and process.program.autostart and process.name not in self._down and not self.closing:
                process.feed(Start("autostart"))
            elif fresh and process.name in self._down:
                process.status = Status(why="stopped by an operator before the daemon was started")
        self._beginning = False
        for process in self.all():
            self._check_exit_when(process)
        self.journal.dirty()

    def _settle_adopted(self, snapshot: Snapshot, *, starting: bool) -> None:
        """Say which children were adopted, and what of them was lost. `starting`: the daemon before was ending all."""
        for name, lost in snapshot.adopted.items():
            process = self.processes[name]
            status, said = process.status, list(lost)
            if status.pid is None:
                continue
            if status.state is State.STARTING and process.program.ready.kind in SAID_ONCE:
                said.append("it may have said meanwhile that it is ready, so it counts as ready")
                process.feed(Ready())
            why = "; ".join([ADOPTED, *said])
            process.status = replace(process.status, why=why)
            if process.status.state is State.RUNNING:
                self._link.note(process.child, READY)
            self.note("adopted", name, state=str(process.status.state), pid=status.pid, why=why)
            log.warning("%s: pid %d goes on (%s)", name, status.pid, why)
            if name in snapshot.changed and status.wanted:
                process.feed(Stop("the table has changed since it was started"))
                process.feed(Start("the table has changed since it was started"))
        for process in self.all():
            if starting and process.program.autostart and process.name not in self._down and not process.status.wanted:
                process.feed(Start("autostart"))

    def _take_up(self, snapshot: Snapshot) -> None:
        """Bring what the state file said and what the keeper holds together. The keeper is right about children."""
        newest: dict[str, tuple[int, Message]] = {}
        for child, record in snapshot.children.items():
            name, generation = launch.split_child_id(child)
            if name in self.processes:
                self._register.born(record, self.processes[name].program.kill)
            if name not in self.processes:
                log.warning("%s belongs to no process of the table; it is ended", child)
                self._link.signal(child, signal.SIGKILL, tree=True)
                self._link.forget(child)
            elif generation >= newest.get(name, (0, {}))[0]:
                newest[name] = (generation, record)
        now = asyncio.get_running_loop().time()
        for process in self.all():
            generation, record = newest.get(process.name, (0, {}))
            status = process.status
            if generation > status.generation or (record and not _agrees(status, generation, record)):
                started = float(record.get("since", now))  # not from its wall-clock time: that clock may have jumped
                status = lifecycle.adopted(process.program, status, generation, started)
            process.status = lifecycle.restore(process.program, status, now)
            if generation == process.status.generation and generation:
                self._catch_up(process, record)
            elif process.status.alive:
                process.request_again()
            elif process.status.state is State.STOPPING:
                process.feed(Gone())  # the supervisor before had heard it, and the keeper has forgotten the child
            process.resume()
            for child in snapshot.children:
                name, older = launch.split_child_id(child)
                if name == process.name and older != process.status.generation:
                    self._link.forget(child)

    def _catch_up(self, process: Process, record: Message) -> None:
        """Feed what happened to the child while no supervisor was there."""
        if process.status.alive and process.status.pid is None and record["state"] != "starting" and record["pid"]:
            process.feed(Spawned(int(record["pid"]), float(record["at"])))
        if record["note"] == READY and process.program.ready.kind != "seconds":
            process.feed(Ready())  # it said so to a supervisor that died before its next write
        if record["state"] != "exited":
            return
        if process.status.alive:
            self._ended(process, record)
        elif process.status.state is State.STOPPING and not record["left"]:
            process.feed(Gone())
        self.journal.forget_later(str(record["child"]))

    def _add(self, program: Program, status: Status) -> Process:
        process = Process(program, status, self._ground)
        self.processes[program.name] = process
        self._ground.prepare(program, self.config)
        return process

    # --- what the keeper and the processes say ----------------------------------------------------------------------

    def _keeper_says(self, message: Message) -> None:
        match message["op"]:
            case "signal":
                self._signalled(int(message["signal"]))
                return
            case "yield":
                self.background(self._yield())
                return
            case "keeper":
                self._keeper_is(Keeper.of(message))
                return
        child = str(message.get("child", ""))
        if self._ground.ran(child, message):
            return
        name, generation = launch.split_child_id(child)
        process = self.processes.get(name)
        if process is None or process.status.generation != generation:
            if message["op"] in ("exited", "failed", "gone"):
                self._link.forget(child)
            return
        match message["op"]:
            case "spawned":
                self._register.born(message, process.program.kill)
                process.feed(Spawned(int(message["pid"]), float(message["at"])))
            case "exited" | "failed":
                self._ended(process, message)
                self.journal.forget_later(child)
            case "child":
                if message["note"] == READY and process.program.ready.kind != "seconds":
                    process.feed(Ready())  # it told a successor that was on trial
            case "gone":
                if not process.status.alive and process.status.state is State.STOPPING:
                    process.feed(Gone())
                self.journal.forget_later(child)

    def _ended(self, process: Process, record: Message) -> None:
        if "status" not in record:
            process.feed(SpawnFailed(report.failure_of(record), report.is_short(record)))
            return
        exit = report.exit_of(record)
        process.feed(Exited(exit, bool(record["left"])))
        process.amend(exit, self._ground.explain(exit, int(record["pid"])))
        self.journal.dirty()

    def _keeper_gone(self) -> None:
        if not self.finished.done():
            log.error("the keeper has gone; the supervisor ends, and leaves everything to the next procmand")
        self.deserted = True
        self._finish(1)

    def _signalled(self, number: int) -> None:
        name = report.signal_name(number)
        match number:
            case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                self.shut_down(name)
            case signal.SIGHUP:
                self.background(self._hang_up())
            case signal.SIGUSR2:
                self._ground.reopen_logs()

    def _changed(self, process: Process, before: Status) -> None:
        status = process.status
        self.journal.dirty()
        if status.pid is None:
            self.measures.forget(process.name)
        if status.state is before.state:
            return
        level = logging.WARNING if status.state in (State.BACKOFF, State.FATAL) else logging.INFO
        log.log(level, "%s: %s (%s)", process.name, status.state, status.why)
        if status.state is State.RUNNING:
            self._link.note(process.child, READY)
        details = {"from": str(before.state), "pid": status.pid, "why": status.why}
        self.note("state", process.name, state=str(status.state), **details)
        self._check_exit_when(process)

    def _check_exit_when(self, process: Process) -> None:
        rule = self.config.daemon.exit_when
        over = (State.EXITED, State.FATAL)
        if self.closing or self._beginning or rule == "never" or process.status.state not in over:
            return
        ended = [other for other in self.all() if other.status.state in over]
        if rule == "any-fatal" and process.status.state is State.FATAL:
            self._exit_status = _shell_status(process.status) or 1
        elif rule == "all-exited" and len(ended) == len([p for p in self.all() if p.status.state is not State.STOPPED]):
            self._exit_status = next((code for code in map(_shell_status, (p.status for p in ended)) if code), 0)
        else:
            return
        self.shut_down(f'exit_when = "{rule}": {process.name} is {process.status.state}')

    # --- another table ----------------------------------------------------------------------------------------------

    async def reread(self, why: str) -> Info:
        """Read the table again and apply it. Raises ConfigError, and changes nothing, when it has a problem.

        Returns when all has been added, removed and asked to start again: which processes, and what it can't change.
        """
        self._check_free()
        self._applying = True
        try:
            # In a thread: it reads files and looks users up, and either may be on the network.
            try:
                new = await asyncio.to_thread(self._read_table)
            except RuntimeError as error:  # can't start new thread: RLIMIT_NPROC counts threads too
                raise Failed(f"the table can't be read now: {error}") from error
            self._table_problem = ""
            return await self._change_to(new, why)
        except ConfigError as error:
            self._table_problem = f"the table was refused ({why}), the one before is in force: {error}"
            raise
        finally:
            self._applying = False
            self._reread_if_asked()

    def _reread_if_asked(self) -> None:
        if self._reread_again:
            self._reread_again = False
            self.background(self._hang_up())

    async def _change_to(self, new: Config, why: str) -> Info:
        plan = apply.plan(self.config, new)
        daemon = apply.daemon_in_force(self.config.daemon, new.daemon)
        self.config = replace(new, daemon=daemon)
        if daemon.sampling != self.measures.sampling:
            self.measures.change(daemon.sampling)
        for program in plan.hot:
            self.processes[program.name].program = program
            self._ground.change_logs(program)
        names = {
            "added": [program.name for program in plan.added],
            "removed": [program.name for program in plan.removed],
            "changed": [program.name for program in plan.hot],
            "restarted": [program.name for program in plan.restart],
        }
        self.note("daemon", "", what="table", why=why, **names)
        needs_restart = f"; restart the daemon for {', '.join(plan.ignored)}" if plan.ignored else ""
        message = f"the table was read again{needs_restart}"
        log.info("%s (%s): %s", message, why, names)
        await self._apply(plan, why)
        return {**names, "message": message}

    def _check_free(self) -> None:
        """Raises Failed while something goes on that neither a change of the table nor an upgrade may meet."""
        if self.closing:
            raise Failed("the daemon is stopping")
        if self._applying:
            raise Failed("the last change of the table is still under way")
        if self._upgrade is not None:
            raise Failed("an upgrade is under way")

    async def _hang_up(self) -> None:
        """SIGHUP: nobody waits for the answer, so it goes to the log. One that comes during a change follows after
        it."""
        if self._applying or self._upgrade is not None:
            self._reread_again = True
            return
        try:
            await self.reread("SIGHUP")
        except ProcmanError as error:
            log.error("the table was not taken, everything stays as it is:\n%s", error)

    async def _apply(self, plan: apply.Plan, why: str) -> None:
        """The part of a change that takes time: what must stop is stopped first."""
        leaving = [self.processes[program.name] for program in (*plan.removed, *plan.restart)]
        wanted = await self._bring_down(leaving, why)
        if self.closing:
            return  # nothing may start any more
        for program in plan.removed:
            process = self.processes.pop(program.name)
            process.close()
            self.measures.forget(program.name, history=True)
            self._documents.pop(program.name, None)
            self._down.discard(program.name)
            self._ground.unprepare(process.program)
        for program in plan.restart:
            self._ground.unprepare(self.processes[program.name].program)
        self._ground.close_unused(self.config)
        await self._link.sync()  # until then the keeper still holds the addresses
        wanted |= await self._bring_down([self.processes[program.name] for program in plan.restart], why)
        if self.closing:
            return
        for program in plan.restart:
            process = self.processes[program.name]
            process.program = program
            self._ground.prepare(program, self.config)
            if program.name in wanted:
                process.feed(Start(f"the table has changed ({why})"))
        for program in sorted(plan.added, key=lambda program: program.priority):
            process = self._add(program, Status())
            if program.autostart and program.name not in self._down:
                process.feed(Start(f"new in the table ({why})"))
        ordered = {program.name: self.processes[program.name] for program in self.config.programs}
        self.processes.clear()  # one object with Ground: it keeps it
        self.processes.update(ordered)
        self.journal.dirty()
        self.on_table(self.config)

    async def _bring_down(self, processes: Sequence[Process], why: str) -> set[str]:
        """Stop them, also one that an operator starts meanwhile. Returns the names of those that were wanted up."""
        wanted: set[str] = set()
        while up := [process for process in processes if process.status.state is not State.STOPPED]:
            wanted |= {process.name for process in up if process.status.wanted}
            await carry_out("stop", up, f"the table has changed ({why})", lambda info: None)
        return wanted

    # --- another version --------------------------------------------------------------------------------------------

    async def upgrade(self, why: str) -> None:
        """Ask the keeper for new code in both processes (`keeper.upgrade`), and wait. Where it works, this process does
        not live to see it. Raises Failed where all is as before."""
        self._check_free()
        log.info("upgrading to the installed version (%s)", why)
        self._upgrade = asyncio.get_running_loop().create_future()
        try:
            await self.journal.saved()
            self._link.send({"op": "upgrade"})
            problem = await self._upgrade or "it was called off"
            raise Failed(
                f"the daemon was not upgraded: {problem}",
                hint=f"version {self.keeper.version} goes on; mend what it says, or install that version again",
            )
        finally:
            self._upgrade = None
            self._reread_if_asked()

    async def _yield(self) -> None:
        """Put all work down for a successor on trial; take it up again if that one fails."""
        if not await self._ground.pause_logs():
            return  # a disk is stuck: the keeper does not wait for long, and goes on with us
        await self.journal.saved()
        if self._upgrade is not None and not self._upgrade.done():  # else the keeper has given up waiting for us
            self._link.stand_still()
        self._ground.resume_logs()
        self.journal.dirty()

    def _keeper_is(self, keeper: Keeper) -> None:
        """News of the keeper's own code: an upgrade has come to its end."""
        self.keeper = keeper
        if keeper.problem:
            log.error("the upgrade failed: %s", keeper.problem)
        self.note("daemon", "", what="upgrade", version=keeper.version, why=keeper.problem or "done")
        if self._upgrade is not None and not self._upgrade.done():
            self._upgrade.set_result(keeper.problem)

    def problems(self) -> list[str]:
        """What an operator should know of: a state file that can't be written, a table that was refused."""
        return [problem for problem in (self.journal.stuck(), self.journal.problem, self._table_problem) if problem]

    def remember(self, names: set[str], *, down: bool) -> None:
        """An operator wants these down (or up), also after a restart of the daemon."""
        self._down = self._down | names if down else self._down - names

    def note(self, kind: str, name: str, **details: object) -> None:
        self.events.add(time.time(), kind, name, **details)

    def all(self) -> list[Process]:
        return list(self.processes.values())

    def _mains(self) -> dict[str, int]:
        return {p.name: p.status.pid for p in self.all() if p.status.pid is not None}

    def _document(self) -> dict[str, Any]:
        statuses = {p.name: self._status_document(p) for p in self.all() if p.status.generation}
        logs = self._ground.counters_document(self.config.programs)
        end = {"closing": self.closing, "exit_status": self._exit_status, "reread": self._reread_again}
        found_again = self._register.document(self.all(), self.config) | self._ground.held_document()
        return {"down": sorted(self._down), **end, "processes": statuses, "logs": logs, **found_again}

    def _status_document(self, process: Process) -> Info:
        """Made once for each status: of a thousand processes most have not changed since the last write."""
        known = self._documents.get(process.name)
        if known is None or known[0] is not process.status:
            known = self._documents[process.name] = (process.status, report.status_document(process.status))
        return known[1]

    # --- the end ----------------------------------------------------------------------------------------------------

    def shut_down(self, why: str) -> None:
        """Stop all programs, highest priority number first, and then the daemon. Calling it again changes nothing."""
        if self.closing:
            return
        self.closing = True
        log.info("stopping all programs (%s)", why)
        self.note("daemon", "", what="shutdown", why=why)
        self._link.send({"op": "notify", "state": "STOPPING=1"})
        self.journal.dirty()
        self.background(self._shut_down())

    async def _shut_down(self) -> None:
        timeout = self.config.daemon.shutdown_timeout
        try:
            async with asyncio.timeout(timeout):
                await carry_out("stop", self.all(), "the daemon is stopping", lambda info: None)
        except TimeoutError:
            left = [process for process in self.all() if process.status.state is not State.STOPPED]
            log.error("after %g s these still run and are killed: %s", timeout, ", ".join(p.name for p in left))
            for process in left:
                if process.status.state in (State.STARTING, State.RUNNING):
                    process.feed(Stop("the daemon is stopping"))
                self._link.signal(process.child, signal.SIGKILL, tree=True)
            try:
                async with asyncio.timeout(LAST_KILL_SECONDS):
                    await carry_out("stop", left, "the daemon is stopping", lambda info: None)
            except TimeoutError:
                log.error("something can't be killed; the keeper tries once more")
        await self.journal.close()
        self._finish(self._exit_status)

    def _finish(self, status: int) -> None:
        if not self.finished.done():
            self.finished.set_result(status)

    def background(self, coroutine: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _agrees(status: Status, generation: int, record: Message) -> bool:
    """Whether what the state file says can be true of a process whose newest child the keeper has as `record`. While
    that one lives, there is no other."""
    if record["state"] == "exited":
        return True
    pid = record["pid"] if record["state"] == "running" else None
    return status.alive and status.generation == generation and status.pid in (None, pid)


def _status_of(document: object) -> Status:
    """A status of the state file; what can't be read counts as never started."""
    if document is None:
        return Status()
    try:
        return report.status_from(document)
    except (TypeError, ValueError, KeyError) as error:
        log.error("a status in the state file can't be read (%s); what the keeper knows has to do", error)
        return Status()


def _shell_status(status: Status) -> int:
    """The exit status of a child as a shell shows it: 128 + number for a signal; 0 when there was none, 1 when nobody
    knows it."""
    if status.exit is None:
        return 0
    if status.exit.code is None and status.exit.signal is None:
        return 1
    return status.exit.code or 0 if status.exit.signal is None else 128 + status.exit.signal

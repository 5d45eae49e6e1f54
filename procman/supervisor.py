"""The set of processes: which there are, in what order they start and stop, and what an operator may ask of them.

It is what the RPC methods call (`methods.Operations`). Each process decides for itself (`lifecycle`), and stands on
`ground.Ground`; this module decides about several of them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from procman import __version__, apply, launch, lifecycle, operation, report
from procman.config import Config, Program
from procman.errors import Failed, NoSuchProgram, ProcmanError, WrongUse
from procman.events import EventLog, rfc3339
from procman.ground import Ground
from procman.journal import Journal
from procman.keeper.wire import Message
from procman.lifecycle import Exited, Gone, Spawned, SpawnFailed, Start, State, Status, Stop
from procman.link import KeeperLink, Snapshot
from procman.measures import Measures
from procman.operation import Outcome, carry_out, levels
from procman.process import Process
from procman.report import Info
from procman.resources import daemon_usage
from procman.rpc import LogSource, Peer

log = logging.getLogger("procman")

LAST_KILL_SECONDS = 5.0
"""How long a stopping daemon waits for its last SIGKILL to take effect."""

OUTPUT_LINES = 20
"""Lines of output that `why` shows."""

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
        self._closing = False
        self._applying = False
        self._beginning = True
        self._exit_status = 0
        self._since = time.time()
        self._snapshot = Snapshot()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._journal = Journal(f"{config.daemon.state_dir}/state.json", self._document, link.forget)
        self.measures = Measures(config.daemon.sampling, self._mains)
        ground.attach(self._changed, self.processes)

    # --- beginning ------------------------------------------------------------------------------------------------------

    def begin(self, snapshot: Snapshot, document: dict[str, Any] | None) -> None:
        """Take up the processes: those of a supervisor that died as they are now, else start what is to be started.

        `document` is the state file's, None where there is none.
        """
        self._snapshot = snapshot
        state = document or {}
        recovered = snapshot.starts > 1
        self._down = {str(name) for name in state.get("down", [])}
        self._exit_status = int(state.get("exit_status", 0)) if recovered else 0
        statuses = state.get("processes", {}) if recovered else {}
        for program in self.config.programs:
            self._add(program, _status_of(statuses.get(program.name)))
        if recovered:
            self._note("daemon", "", what="supervisor restarted", why=snapshot.last)
            log.warning("the supervisor was replaced (%s); %d children go on", snapshot.last, len(snapshot.children))
        self._take_up(snapshot)
        self._link.listen(self._keeper_says, self._keeper_gone)
        if recovered and state.get("closing"):
            self.shut_down("continued after the supervisor was replaced")
        for process in itertools.chain.from_iterable(levels(self._all())):
            fresh = process.status.generation == 0 and process.status.state is State.STOPPED
            if fresh and process.program.autostart and process.name not in self._down and not self._closing:
                process.feed(Start("autostart"))
            elif fresh and process.name in self._down:
                process.status = Status(why="stopped by an operator before the daemon was started")
        self._beginning = False
        for process in self._all():
            self._check_exit_when(process)
        self._journal.dirty()

    def _take_up(self, snapshot: Snapshot) -> None:
        """Bring what the state file said and what the keeper holds together. The keeper is right about children."""
        newest: dict[str, tuple[int, Message]] = {}
        for child, record in snapshot.children.items():
            name, generation = launch.split_child_id(child)
            if name not in self.processes:
                log.warning("%s belongs to no process of the table; it is ended", child)
                self._link.signal(child, signal.SIGKILL, tree=True)
                self._link.forget(child)
            elif generation >= newest.get(name, (0, {}))[0]:
                newest[name] = (generation, record)
        now = asyncio.get_running_loop().time()
        for process in self._all():
            generation, record = newest.get(process.name, (0, {}))
            status = process.status
            if generation > status.generation:
                started = now - max(0.0, time.time() - float(record["at"]))
                status = lifecycle.adopted(process.program, status, generation, started)
            process.status = lifecycle.restore(process.program, status, now)
            if generation == process.status.generation and generation:
                self._catch_up(process, record)
            elif process.status.alive:
                process.request_again()
            process.resume()
            for child in snapshot.children:
                name, older = launch.split_child_id(child)
                if name == process.name and older != process.status.generation:
                    self._link.forget(child)

    def _catch_up(self, process: Process, record: Message) -> None:
        """Feed what happened to the child while no supervisor was there."""
        if process.status.alive and process.status.pid is None and record["state"] != "starting" and record["pid"]:
            process.feed(Spawned(int(record["pid"]), float(record["at"])))
        if record["state"] != "exited":
            return
        if process.status.alive:
            self._ended(process, record)
        elif process.status.state is State.STOPPING and not record["left"]:
            process.feed(Gone())
        self._journal.forget_later(str(record["child"]))

    def _add(self, program: Program, status: Status) -> Process:
        process = Process(program, status, self._ground)
        self.processes[program.name] = process
        self._ground.prepare(program, self.config)
        return process

    # --- what the keeper and the processes say --------------------------------------------------------------------------

    def _keeper_says(self, message: Message) -> None:
        if message["op"] == "signal":
            self._signalled(int(message["signal"]))
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
                process.feed(Spawned(int(message["pid"]), float(message["at"])))
            case "exited" | "failed":
                self._ended(process, message)
                self._journal.forget_later(child)
            case "gone":
                if not process.status.alive and process.status.state is State.STOPPING:
                    process.feed(Gone())
                self._journal.forget_later(child)

    def _ended(self, process: Process, record: Message) -> None:
        if "status" not in record:
            process.feed(SpawnFailed(report.failure_of(record)))
            return
        exit = report.exit_of(record)
        process.feed(Exited(exit, bool(record["left"])))
        process.amend(exit, self._ground.explain(exit))

    def _keeper_gone(self) -> None:
        if not self.finished.done():
            log.error("the keeper has gone; the supervisor ends")
        self._finish(1)

    def _signalled(self, number: int) -> None:
        name = report.signal_name(number)
        match number:
            case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                self.shut_down(name)
            case signal.SIGHUP:
                try:
                    self._reread(name)
                except ProcmanError as error:
                    log.error("the table was not taken, everything stays as it is:\n%s", error)
            case signal.SIGUSR2:
                self._ground.reopen_logs()

    def _changed(self, process: Process, before: Status) -> None:
        status = process.status
        self._journal.dirty()
        if status.pid is None:
            self.measures.forget(process.name)
        if status.state is before.state:
            return
        level = logging.WARNING if status.state in (State.BACKOFF, State.FATAL) else logging.INFO
        log.log(level, "%s: %s (%s)", process.name, status.state, status.why)
        details = {"from": str(before.state), "pid": status.pid, "why": status.why}
        self._note("state", process.name, state=str(status.state), **details)
        self._check_exit_when(process)

    def _check_exit_when(self, process: Process) -> None:
        rule = self.config.daemon.exit_when
        over = (State.EXITED, State.FATAL)
        if self._closing or self._beginning or rule == "never" or process.status.state not in over:
            return
        ended = [other for other in self._all() if other.status.state in over]
        if rule == "any-fatal" and process.status.state is State.FATAL:
            self._exit_status = _shell_status(process.status) or 1
        elif rule == "all-exited" and len(ended) == len([p for p in self._all() if p.status.state is not State.STOPPED]):
            self._exit_status = next((code for code in map(_shell_status, (p.status for p in ended)) if code), 0)
        else:
            return
        self.shut_down(f'exit_when = "{rule}": {process.name} is {process.status.state}')

    # --- another table --------------------------------------------------------------------------------------------------

    def _reread(self, why: str) -> Info:
        """Read the table again and begin to apply it. Raises ConfigError, and changes nothing, when it has a problem."""
        if self._closing or self._applying:
            raise Failed("the daemon is stopping" if self._closing else "the last change of the table is still under way")
        new = self._read_table()
        plan = apply.plan(self.config, new)
        daemon = apply.daemon_in_force(self.config.daemon, new.daemon)
        self.config = replace(new, daemon=daemon)
        if daemon.sampling != self.measures.sampling:
            self.measures.change(daemon.sampling)
        for program in plan.hot:
            self.processes[program.name].program = program
            self._ground.change_logs(program)
        self._applying = True
        self._background(self._apply(plan, why))
        names = {
            "added": [program.name for program in plan.added],
            "removed": [program.name for program in plan.removed],
            "changed": [program.name for program in plan.hot],
            "restarted": [program.name for program in plan.restart],
        }
        self._note("daemon", "", what="table", why=why, **names)
        needs_restart = f"; restart the daemon for {', '.join(plan.ignored)}" if plan.ignored else ""
        message = f"the table was read again{needs_restart}"
        log.info("%s (%s): %s", message, why, names)
        return {**names, "message": message}

    async def _apply(self, plan: apply.Plan, why: str) -> None:
        """The part of a change that takes time: what must stop is stopped first."""
        try:
            leaving = [self.processes[program.name] for program in (*plan.removed, *plan.restart)]
            wanted = await self._bring_down(leaving, why)
            for program in plan.removed:
                process = self.processes.pop(program.name)
                process.close()
                self.measures.forget(program.name, history=True)
                self._ground.unprepare(process.program)
            for program in plan.restart:
                self._ground.unprepare(self.processes[program.name].program)
            self._ground.close_unused(self.config)
            await self._link.sync()  # until then the keeper still holds the addresses
            wanted |= await self._bring_down([self.processes[program.name] for program in plan.restart], why)
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
            self._journal.dirty()
            self.on_table(self.config)
        finally:
            self._applying = False

    async def _bring_down(self, processes: Sequence[Process], why: str) -> set[str]:
        """Stop them, also one that an operator starts meanwhile. Returns the names of those that were wanted up."""
        wanted: set[str] = set()
        while up := [process for process in processes if process.status.state is not State.STOPPED]:
            wanted |= {process.name for process in up if process.status.wanted}
            await carry_out("stop", up, f"the table has changed ({why})", lambda info: None)
        return wanted

    def _note(self, kind: str, name: str, **details: object) -> None:
        self.events.add(time.time(), kind, name, **details)

    def _all(self) -> list[Process]:
        return list(self.processes.values())

    def _mains(self) -> dict[str, int]:
        return {p.name: p.status.pid for p in self._all() if p.status.pid is not None}

    def _document(self) -> dict[str, Any]:
        statuses = {p.name: report.status_document(p.status) for p in self._all() if p.status.generation}
        logs = self._ground.counters_document(self.config.programs)
        end = {"closing": self._closing, "exit_status": self._exit_status}
        return {"down": sorted(self._down), **end, "processes": statuses, "logs": logs}

    # --- the end --------------------------------------------------------------------------------------------------------

    def shut_down(self, why: str) -> None:
        """Stop all programs, highest priority number first, and then the daemon. Calling it again changes nothing."""
        if self._closing:
            return
        self._closing = True
        log.info("stopping all programs (%s)", why)
        self._note("daemon", "", what="shutdown", why=why)
        self._link.send({"op": "notify", "state": "STOPPING=1"})
        self._journal.dirty()
        self._background(self._shut_down())

    async def _shut_down(self) -> None:
        timeout = self.config.daemon.shutdown_timeout
        try:
            async with asyncio.timeout(timeout):
                await carry_out("stop", self._all(), "the daemon is stopping", lambda info: None)
        except TimeoutError:
            left = [process for process in self._all() if process.status.state is not State.STOPPED]
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
        await self._journal.close()
        self._finish(self._exit_status)

    def _finish(self, status: int) -> None:
        if not self.finished.done():
            self.finished.set_result(status)

    def _background(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what RPC asks (methods.Operations) -----------------------------------------------------------------------------

    def select(self, names: Sequence[str]) -> list[Process]:
        """Processes by process, program or group name, or "all" (also: no name), without doubles, in the table's order."""
        wanted: set[str] = set()
        for name in names or ["all"]:
            found = {
                process.name
                for process in self._all()
                if name in ("all", process.name, process.program.program, *process.program.groups)
            }
            if not found and name != "all":
                raise NoSuchProgram(f"no such program: {name!r}", hint="`procmanctl status` lists all")
            wanted |= found
        return [process for process in self._all() if process.name in wanted]

    def infos(self, names: Sequence[str]) -> list[Info]:
        """See `methods.Operations`, as for all below."""
        return [report.info(process, self.measures.latest(process.name)) for process in self.select(names)]

    def show(self, name: str) -> Info:
        process = self._one(name)
        shown = report.info(process, self.measures.latest(process.name))
        logged = self._ground.log_counters(process.program)
        tree = self._ground.tree(process.status.pid)
        samples = self.measures.history(process.name)
        return shown | {
            "definition": report.definition(process.program),
            "log": logged,
            "samples": samples,
            "processes": tree,
        }

    def why(self, name: str) -> Info:
        process = self._one(name)
        history = [
            {"at": rfc3339(at), "state": str(state), "why": why} for at, state, why in process.history
        ]
        status = process.status
        return {
            "name": process.name,
            "state": str(status.state),
            "wanted": "up" if status.wanted else "down",
            "why": status.why,
            "exit": report.exit_info(status.exit),
            "history": history,
            "output": self._ground.last_output(process.program, OUTPUT_LINES),
        }

    def _one(self, name: str) -> Process:
        processes = self.select([name])
        if len(processes) != 1:
            names = ", ".join(process.name for process in processes)
            raise WrongUse(f"{name!r} is several processes", hint=f"name one of {names}")
        return processes[0]

    async def operate(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Info], None],
    ) -> list[Info]:
        processes = self.select(names)
        if self._closing and verb != "stop":
            raise Failed("the daemon is stopping")
        why = f"{verb} by uid {peer.uid}"
        for process in processes:
            self._note("operation", process.name, what=verb, uid=peer.uid, pid=peer.pid)
        log.info("%s: %s (pid %d)", ", ".join(process.name for process in processes), why, peer.pid)
        signalled: dict[str, Outcome] = {}
        if verb == "reload":
            signalled = self._signal_reload(processes)
            processes, verb = [p for p in processes if p.name not in signalled], "restart"
        names_set = {process.name for process in processes}
        self._down = self._down | names_set if verb == "stop" else self._down - names_set
        task = asyncio.ensure_future(carry_out(verb, processes, why, progress))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        outcomes: dict[str, Outcome] = {}
        if wait:
            try:
                async with asyncio.timeout(timeout):
                    outcomes = await asyncio.shield(task)
            except TimeoutError:
                late = f"not done within {timeout:g} s; it goes on"
                aims = [operation.Aim(verb, process, process.status.generation) for process in processes]
                outcomes = {aim.process.name: aim.outcome() or (False, late) for aim in aims}
        await self._journal.saved()
        outcomes |= signalled
        result = []
        for process in self.select(names):
            ok, text = outcomes.get(process.name, (True, process.status.why))
            result.append(report.change(process) | {"ok": ok, "why": text})
        return result

    def _signal_reload(self, processes: Sequence[Process]) -> dict[str, Outcome]:
        """Those whose `reload` is a signal get it, and are done; one that does not run can't reload."""
        outcomes: dict[str, Outcome] = {}
        for process in processes:
            number = process.program.reload_signal
            if not number:
                continue
            if process.status.pid is None:
                outcomes[process.name] = (False, f"it does not run: {process.status.why}")
            else:
                self._link.signal(process.child, number)
                outcomes[process.name] = (True, f"sent {report.signal_name(number)}")
        return outcomes

    def signal(self, names: Sequence[str], signum: int, peer: Peer) -> list[Info]:
        result = []
        for process in self.select(names):
            running = process.status.pid is not None
            if running:
                self._link.signal(process.child, signum)
                what = report.signal_name(signum)
                self._note("operation", process.name, what=what, uid=peer.uid, pid=peer.pid)
            why = process.status.why if running else f"it does not run: {process.status.why}"
            result.append(report.change(process) | {"ok": running, "why": why})
        return result

    def log_sources(self, names: Sequence[str], stderr: bool) -> list[LogSource]:
        sources = [s for process in self.select(names) for s in self._ground.log_sources(process.program)]
        return [source for source in sources if not stderr or source.stream == "err"]

    def watch_logs(self, keys: Sequence[str], callback: Callable[[], None]) -> Callable[[], None]:
        return self._ground.watch_logs(keys, callback)

    def recent(self) -> list[Info]:
        return self.events.recent()

    def subscribe(self, callback: Callable[[Info], None]) -> Callable[[], None]:
        return self.events.subscribe(callback)

    def daemon_status(self) -> Info:
        pids = [self._snapshot.keeper_pid, os.getpid()]
        usage = daemon_usage(pids)
        states = [str(process.status.state) for process in self._all()]
        return {
            "identifier": self.config.daemon.identifier,
            "version": __version__,
            "keeper_pid": pids[0],
            "supervisor_pid": pids[1],
            "supervisor_starts": self._snapshot.starts,
            "supervisor_started_at": rfc3339(self._since),
            "table": self.config.path,
            "socket": self.config.daemon.socket,
            "state_dir": self.config.daemon.state_dir,
            "log_dir": self.config.daemon.log_dir,
            "cgroup": self._snapshot.cgroup or None,
            "processes": {state: states.count(state) for state in sorted(set(states))},
            "memory_bytes": usage.memory_bytes,
            "cpu_seconds": usage.cpu_seconds,
            "stopping": self._closing,
            "problems": [self._journal.problem] if self._journal.problem else [],
        }

    def shutdown(self, peer: Peer) -> None:
        self.shut_down(f"asked by uid {peer.uid}, pid {peer.pid}")

    def reopen_logs(self, peer: Peer) -> None:
        self._note("operation", "", what="reopen-logs", uid=peer.uid, pid=peer.pid)
        self._ground.reopen_logs()

    def reread(self, peer: Peer) -> Info:
        return self._reread(f"reread by uid {peer.uid}")


def _status_of(document: object) -> Status:
    """A status of the state file; what can't be read counts as never started."""
    if document is None:
        return Status()
    try:
        return report.status_from(document)
    except (TypeError, ValueError, KeyError) as error:
        log.error("a status in the state file can't be read (%s); the process is taken up from the keeper's account", error)
        return Status()


def _shell_status(status: Status) -> int:
    """The exit status of a child as a shell shows it: 128 + number for a signal; 0 when there was none."""
    if status.exit is None:
        return 0
    return status.exit.code or 0 if status.exit.signal is None else 128 + status.exit.signal

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
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from procman import launch, report, servers, shape, takeover, units
from procman.config import Config, Program, place
from procman.errors import Failed
from procman.events import EventLog
from procman.ground import CHILDLESS, Ground
from procman.journal import Journal
from procman.keeper.wire import Message
from procman.lifecycle import Exited, Gone, Ready, Restart, Spawned, SpawnFailed, Start, State, Status, Stop
from procman.link import KeeperLink
from procman.measures import Measures
from procman.operation import carry_out, levels
from procman.orphans import Register
from procman.places import Places
from procman.process import HISTORY, Moment, Process
from procman.records import dataclass
from procman.report import Info
from procman.snapshot import NEEDED, Keeper, Snapshot, about_child

log = logging.getLogger("procman")

ADOPTED = "adopted: the procmand before was killed"
"""Why a process is what it is when a new daemon has found it."""

SAID_ONCE = frozenset({"notify", "log"})
"""Kinds of readiness that a program shows only once: nobody may have heard it."""

CLOSING = "closing"
"""Held by the keeper once all is to stop: why, and with which exit status."""

STATE = "state"
"""Held by the keeper: a document that the state file may lack (`journal`)."""

PAST = "past"
"""Held by the keeper during an upgrade: what the supervisor before had seen (`Past`)."""

CONTINUED = "continued after the supervisor was replaced"

LAST_KILL_SECONDS = 5.0
"""How long a stopping daemon waits for its last SIGKILL to take effect."""

Result = TypeVar("Result")


class Ending(NamedTuple):
    """All is being stopped: why, and with which exit status the daemon ends then."""

    why: str
    exit_status: int

    @staticmethod
    def of(document: Any) -> Ending:
        """From what the keeper held. Raises ValueError for what makes no sense: the keeper would refuse the status."""
        told, wrong = shape.sane(document, {"why": str, "exit_status": int})
        if wrong or len(told) < 2 or not 0 <= told["exit_status"] <= 255:
            raise ValueError("; ".join(wrong) or f"no reason and exit status: {str(document)[:100]}")
        return Ending(**told)


@dataclass(frozen=True, slots=True)
class Past:
    """What a supervisor has seen, for `procmanctl events` and `why`: by process, what of it is no part of a status."""

    events: list[dict[str, Any]] = field(default_factory=list)
    history: dict[str, list[Moment]] = field(default_factory=dict)
    last_words: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(document: Any) -> Past:
        """From what the keeper held. Raises ValueError for what makes no sense."""
        past: Past = shape.fit(document, Past)
        for name, moments in past.history.items():
            if not all(0 <= moment.at < report.TIME_MAX for moment in moments):
                raise ValueError(f"history.{name}: is no time")
        return past


NO_PAST = Past()


class Supervisor:
    """All processes of one table, and what can be done to them."""

    def __init__(self, config: Config, link: KeeperLink, ground: Ground) -> None:
        self.config = config
        self.events = EventLog()
        self.places = Places()
        self.processes = self.places.current
        self.finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.on_change: Callable[[Process], None] = lambda process: None
        self.on_moved: Callable[[], None] = lambda: None
        self.under_way: Callable[[str], bool] = lambda name: False
        self.reloading: Collection[str] = ()
        """The programs whose processes restart one after the other now, for a reload."""
        self.awaits_first: Callable[[], bool] = lambda: False
        self.on_closing: Callable[[], None] = lambda: None
        self.on_places: Callable[[], None] = lambda: None
        self.on_hang_up: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.versions: Callable[[], dict[str, Any]] = dict
        self.changing = False
        self.untouched: Container[str] = ()
        """The programs that go on as ever while the table changes (`changing`)."""
        self.damage = ""
        self._past = Past()
        self._link = link
        self._ground = ground
        self._down: set[str] = set()
        self.replacing: set[str] = set()  # what a change of the table stops to start it again
        self._documents: dict[str, tuple[Status, Info]] = {}
        self.closing = False
        self.deserted = False
        self._beginning = True
        self.keeper = Keeper()
        self._upgrade: asyncio.Future[str] | None = None
        self._exit_status = 0
        self.since = time.time()
        self.snapshot = Snapshot()
        self._register = Register()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.journal = Journal(f"{config.daemon.state_dir}/state.json", self._document, link.forget, self._hold_state)
        self.measures = Measures(config.daemon.sampling, self._mains)
        ground.attach(self._changed, self.places)

    # --- beginning --------------------------------------------------------------------------------------------------

    def begin(
        self,
        snapshot: Snapshot,
        document: Mapping[str, Any] | None,
        *,
        ending: Ending | None = None,
        leaving: Container[str] = (),
        coming: Container[str] = (),
        lost: bool = False,
        rollouts: Mapping[str, takeover.Passing] = MappingProxyType({}),
        past: Past = NO_PAST,
    ) -> None:
        """Take up the processes: those of a supervisor that died as they are now, else start what is to be started.

        `document` is the state file's, None where there is none. It counts as far as it is of this life of the daemon,
        or tells of children of a daemon that was killed. A daemon that is new takes those up too; but it was started to
        run the programs, whatever the old one was about to do. `ending`: all was being stopped, as the keeper was told
        (CLOSING). A change of the table is stopping those in `leaving`, and is to start those that are `coming`; those
        in `rollouts` pass on to a successor.
        `lost`: what the supervisor before was about is not known any more (`legacy`). `past`: what it had seen.
        """
        self.snapshot = snapshot
        self._past = past
        self.events.follow(past.events)
        self.keeper = snapshot.keeper
        state: Mapping[str, Any] = document or {}
        ours = state.get("keeper", "") == snapshot.identity
        adopted = any(record.get("adopted") for record in snapshot.children.values())
        self._down = {str(name) for name in state.get("down", [])}
        replaced = set() if ours else {str(name) for name in state.get("replacing", [])} - self._down
        if ending is None and ours and state.get("closing"):
            ending = Ending("", int(state.get("exit_status", 0)))
        self._exit_status = ending.exit_status if ending is not None else 0
        statuses = state.get("processes", {}) if ours or adopted else {}
        found, strangers = self._make_processes(snapshot, statuses, rollouts)
        if snapshot.starts > 1:
            self.note("daemon", "", what="supervisor restarted", why=snapshot.last)
            log.warning("the supervisor was replaced (%s); %d children go on", snapshot.last, len(snapshot.children))
        self._take_up(found, strangers, leaving)
        self._link.listen(self._keeper_says, self._keeper_gone)
        if ending is not None:
            self.shut_down(CONTINUED)
        elif adopted and not ours:
            self._settle_adopted(snapshot)
            self._start_again("autostart", replaced)
        elif lost:
            self._start_again("it was stopped for something that is lost", replaced)
        for process in itertools.chain.from_iterable(levels(self.all())):
            fresh = process.status.generation == 0 and process.status.state is State.STOPPED
            up = self.starts_by_itself(process.program) or process.name in replaced
            if fresh and up and not self.closing and process.name not in leaving and process.name not in coming:
                process.feed(Start("autostart"))
            elif fresh and process.name in self._down:
                process.status = Status(why="stopped by an operator before the daemon was started")
        self._beginning, self._past = False, NO_PAST
        for process in self.all():
            self._check_exit_when(process)
        self.journal.dirty()
        self.on_moved()

    def _make_processes(
        self, snapshot: Snapshot, statuses: Mapping[str, Any], rollouts: Mapping[str, takeover.Passing]
    ) -> tuple[dict[str, takeover.Records], list[str]]:
        """Each process in the place in which its child is. Returns the keeper's records of both places of each, and the
        children that belong to none."""
        known = {program.name: takeover.in_file(statuses.get(program.name)) for program in self.config.programs}
        found, strangers = takeover.by_place(snapshot.children, known)
        for program in self.config.programs:
            passing = rollouts.get(program.name)
            slot = passing.current if passing else takeover.current_slot(program.name, found, known[program.name])
            self.add(servers.in_place(program, slot), known[program.name])
            if passing:
                self.put_beside(servers.in_place(passing.beside or program, 1 - slot), Status())
            else:
                strangers += [str(record["child"]) for record in found[place(program.name, 1 - slot)].values()]
        return found, strangers

    def _settle_adopted(self, snapshot: Snapshot) -> None:
        """Say which children were adopted, and what of them was lost."""
        for name, lost in snapshot.adopted.items():
            process = self.processes[name]
            status, said = process.status, list(lost)
            if status.pid is None:
                continue
            if status.state is State.STARTING and process.program.ready.kind in SAID_ONCE:
                said.append("it may have said meanwhile that it is ready, so it counts as ready")
                process.feed(Ready())
            why = "; ".join([ADOPTED, *said])
            if process.status.state is not State.STOPPING:  # that has a reason which its successor inherits
                process.status = replace(process.status, why=why)
                self._ground.remember(process)
            self.note("adopted", name, state=str(process.status.state), pid=status.pid, why=why)
            log.warning("%s: pid %d goes on (%s)", name, status.pid, why)
            if name in snapshot.changed and status.wanted:
                process.feed(Restart("the table has changed since it was started"))

    def _start_again(self, why: str, replaced: Container[str]) -> None:
        """What no operator wants down was stopped before for the end of the daemon, or for a change of the table; so
        was what was `replaced` just then, also if only an operator had started it."""
        for process in self.all():
            up = self.starts_by_itself(process.program) or process.name in replaced
            if up and not process.status.wanted:
                process.feed(Start("autostart" if process.status.generation == 0 else why))

    def _take_up(
        self, found: Mapping[str, takeover.Records], strangers: Iterable[str], leaving: Container[str]
    ) -> None:
        """Bring what the state file said and what the keeper holds together. The keeper is right about children."""
        for child in strangers:
            if "/" not in child:  # else what the supervisor before had run for itself: it is begun again
                log.warning("%s belongs to no process of the table; it is ended", child)
            self._link.signal(child, signal.SIGKILL, tree=True)
            self._link.forget(child)
        now = asyncio.get_running_loop().time()
        for process in self.places.everyone():
            records, leaves = found[process.key], process.name in leaving
            for record in records.values():
                self._register.born(record, process.program.kill)
            process.status = takeover.status(process.program, process.status, records, now, leaving=leaves)
            newest = records.get(process.status.generation)
            if newest is not None and process.status.generation:
                self._catch_up(process, newest)
            elif process.status.alive and leaves:
                process.feed(SpawnFailed(process.status.why))  # the keeper never heard of it, and need not any more
            elif process.status.alive:
                process.request_again()
            elif process.status.state is State.STOPPING:
                process.feed(Gone())  # the supervisor before had heard it, and the keeper has forgotten the child
            process.resume()
            for generation, record in records.items():
                if generation < process.status.generation:
                    self._link.forget(str(record["child"]))

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
        self.journal.forget_later(str(record["child"]))

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
        if message["op"] not in NEEDED:
            return
        message = about_child(message)
        child = str(message["child"])
        if self._ground.ran(child, message):
            return
        key, generation = launch.split_child_id(child)
        process = self.places.by_key.get(key)
        if process is not None and message["op"] == "child":
            self._take_over(process, generation, message)
            return
        if process is None or process.status.generation != generation:
            if process is None and message["op"] == "failed":
                log.warning("%s: %s", child, report.failure_of(message))
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
            case "gone":
                if not process.status.alive and process.status.state is State.STOPPING:
                    process.feed(Gone())
                self.journal.forget_later(child)

    def _take_over(self, process: Process, generation: int, record: Message) -> None:
        """The keeper tells how a child stands: after an upgrade that has failed, for a successor on trial has started
        it, or has heard what became of it; and to who asks for it a second time."""
        if generation < process.status.generation:
            self._link.forget(str(record["child"]))
            return
        now = asyncio.get_running_loop().time()
        self._register.born(record, process.program.kill)
        process.take(takeover.status(process.program, process.status, {generation: record}, now, leaving=False))
        self._catch_up(process, record)

    def _ended(self, process: Process, record: Message) -> None:
        if "status" not in record:
            process.feed(SpawnFailed(report.failure_of(record), report.is_short(record)))
            return
        exit = report.exit_of(record)
        process.feed(Exited(exit, bool(record["left"]), record.get("lived")))
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
                if self.on_hang_up is not None:
                    self.background(self.on_hang_up())
            case signal.SIGUSR2:
                self._ground.reopen_logs()
                self._link.obeyed(number)
            case _:
                self._link.obeyed(number)

    def _changed(self, process: Process, before: Status) -> None:
        status = process.status
        self.journal.dirty()
        current = self.processes.get(process.name) is process
        if process.program.scale is not None:
            self.on_moved()
        if status.pid is None and current:
            self.measures.forget(process.name)
        if status.state is before.state:
            return
        self.on_change(process)
        level = logging.WARNING if status.state in (State.BACKOFF, State.FATAL) else logging.INFO
        who = process.name if current else f"{process.name} ({process.role})"
        log.log(level, "%s: %s (%s)", who, status.state, status.why)
        details = {"from": str(before.state), "pid": status.pid, "why": status.why}
        if current:
            if status.state is State.FATAL:
                tell = self.events.hold(time.time(), "state", process.name, state=str(status.state), **details)
                self.background(self._tell_fatal(process, tell))
            else:
                self.note("state", process.name, state=str(status.state), **details)
            self._check_exit_when(process)
        else:
            self.note("rollout", process.name, who=process.role, state=str(status.state), **details)

    async def _tell_fatal(self, process: Process, tell: Callable[[Mapping[str, object]], None]) -> None:
        found = None
        try:
            if process.status.exit is not None:
                found = await self._ground.last_traceback(process.program)
        finally:
            tell({"traceback": found})

    def _check_exit_when(self, process: Process) -> None:
        rule = self.config.daemon.exit_when
        over = (State.EXITED, State.FATAL)
        if self.closing or self._beginning or rule == "never" or process.status.state not in over:
            return
        if process.name in self.replacing:
            return  # it goes back to what it was
        ended = [other for other in self.all() if other.status.state in over]
        if rule == "any-fatal" and process.status.state is State.FATAL:
            self._exit_status = _shell_status(process.status) or 1
        elif rule == "all-exited" and self.awaits_first():
            return  # a connection will start it
        elif rule == "all-exited" and len(ended) == len([p for p in self.all() if p.status.state is not State.STOPPED]):
            self._exit_status = next((code for code in map(_shell_status, (p.status for p in ended)) if code), 0)
        else:
            return
        self.shut_down(f'exit_when = "{rule}": {process.name} is {process.status.state}')

    # --- another table: see `change` --------------------------------------------------------------------------------

    def check_free(self) -> None:
        """Raises Failed while something goes on that neither a change of the table nor an upgrade may meet."""
        if self.closing:
            raise Failed("the daemon is stopping")
        if self.changing:
            slow = [process.name for process in self.all() if process.status.state is State.STARTING]
            waits = [*slow, *(name for name in sorted(self.places.beside) if name not in slow)]
            awaited = f": it waits for {', '.join(waits)}" if waits else ""
            hint = f"procmanctl why {waits[0]}; procmanctl stop {waits[0]} gives it up" if waits else ""
            raise Failed(f"the last change of the table is still under way{awaited}", hint=hint)
        if self.upgrading:
            raise Failed("an upgrade is under way")
        if self.places.beside or self.reloading:
            names = ", ".join(sorted({*self.places.beside, *self.reloading}))
            raise Failed(f"a reload is under way: {names}", hint="try again when it has ended")

    async def aside(self, processes: Sequence[Process], why: str, again: bool = False) -> bool:
        """Those of `processes` that are about to stop on sockets that others go on with answer first what they have
        accepted, and are told to stop, or to start `again`. False: the daemon is stopping."""
        names = {process.name for process in processes}
        up = {process.name for process in self.all() if process.status.state not in CHILDLESS}
        shared = units.shared(self.config, names, up)
        await self._ground.parting.aside(
            processes, shared, why, lambda process: not self.is_replaced(process.name), again=again
        )
        return not self.closing

    def is_replaced(self, name: str) -> bool:
        """Whether a successor takes over from the process `name`, or is to in a moment."""
        return name in self.places.beside or self.under_way(name)

    def take_settings(self, config: Config) -> None:
        """The settings of `config` are in force; its programs come with `add` and `remove`."""
        if config.daemon.sampling != self.measures.sampling:
            self.measures.change(config.daemon.sampling)
        self.config = config

    def add(self, program: Program, status: Status) -> Process:
        """A process of the table."""
        process = Process(program, status, self._ground)
        process.history.extend(self._past.history.get(program.name, ()))
        process.last_words = self._past.last_words.get(program.name, [])
        self.places.add(process)
        self._ground.prepare(program, self.config)
        return process

    def put_beside(self, program: Program, status: Status) -> Process:
        """One more process of this name, in its other place."""
        process = Process(program, status, self._ground)
        self.places.put_beside(process)
        self._ground.prepare(program, self.config)
        self.on_places()
        return process

    def switch(self, name: str, *, back: bool = False) -> None:
        """The process beside becomes the current one, and the other way round; `back`: as it was before that."""
        self.places.switch(name)
        now, before = self.processes[name], self.places.beside[name]
        now.role, before.role = "successor", "successor" if back else "the one before"
        now.history.extendleft(entry for entry in reversed(before.history) if len(now.history) < HISTORY)
        before.history.clear()
        self.measures.forget(name)
        self._documents.pop(name, None)
        self.on_change(now)
        self.journal.dirty()

    def take_away(self, name: str) -> None:
        """The process beside has stopped, and leaves."""
        process = self.places.take_away(name)
        process.close()
        self._ground.retire(process.program)
        self._link.forget(process.child)
        self.on_places()
        self.journal.dirty()
        self.on_moved()

    def remove(self, name: str) -> None:
        """A process that has stopped leaves the table."""
        process = self.places.remove(name)
        process.close()
        self.measures.forget(name, history=True)
        self._documents.pop(name, None)
        self._down.discard(name)
        self._ground.unprepare(process.program)
        self._link.forget(process.child)  # one of this name begins anew: its first child must not be taken for this

    def starts_by_itself(self, program: Program) -> bool:
        """The table says so, and no operator wants it down."""
        needed = program.scale is None or program.instance <= program.scale.min
        return program.autostart and needed and not self.is_down(program.name)

    def is_down(self, name: str) -> bool:
        """An operator wants it down."""
        return name in self._down

    def put_in_order(self) -> None:
        """The processes in the order of the table."""
        self.places.put_in_order([program.name for program in self.config.programs])

    def obeyed_hang_up(self) -> None:
        """What SIGHUP asked for is done, or was refused."""
        self._link.obeyed(signal.SIGHUP)

    # --- another version --------------------------------------------------------------------------------------------

    async def upgrade(self, why: str) -> None:
        """Ask the keeper for new code in both processes (`keeper.upgrade`), and wait. Where it works, this process does
        not live to see it. Raises Failed where all is as before."""
        self.check_free()
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

    async def _yield(self) -> None:
        """Put all work down for a successor on trial; take it up again if that one fails."""
        if not await self._ground.pause_logs():
            return  # a disk is stuck: the keeper does not wait for long, and goes on with us
        await self.journal.saved()
        async with self._ground.parting.turn:  # nobody may be kept out while we do nothing
            if self._upgrade is not None and not self._upgrade.done():  # else the keeper has given up waiting for us
                self._link.hand_over(PAST, self._seen())
                self._link.stand_still()
                self._link.release(PAST)
        self._ground.resume_logs()
        self.journal.dirty()

    def _seen(self) -> Info:
        """For the successor in an upgrade: the `Past`."""
        processes = self.all()
        history = {process.name: [list(each) for each in process.history] for process in processes}
        words = {process.name: process.last_words for process in processes if process.last_words}
        return {"events": self.events.recent(), "history": history, "last_words": words}

    def _keeper_is(self, keeper: Keeper) -> None:
        """News of the keeper's own code: an upgrade has come to its end."""
        self.keeper = keeper
        if keeper.problem:
            log.error("the upgrade failed: %s", keeper.problem)
        self.note("daemon", "", what="upgrade", version=keeper.version, why=keeper.problem or "done")
        if self._upgrade is not None and not self._upgrade.done():
            self._upgrade.set_result(keeper.problem)

    def problems(self) -> list[str]:
        """What an operator should know of: a state file that could not be read, or can't be written."""
        return [problem for problem in (self.damage, self.journal.stuck(), self.journal.problem) if problem]

    @property
    def upgrading(self) -> bool:
        """An upgrade is under way."""
        return self._upgrade is not None

    def remember(self, names: set[str], *, down: bool) -> None:
        """An operator wants these down (or up), also after a restart of the daemon."""
        self._down = self._down | names if down else self._down - names
        self.on_moved()

    def note(self, kind: str, name: str, **details: object) -> None:
        self.events.add(time.time(), kind, name, **details)

    def all(self) -> list[Process]:
        return list(self.processes.values())

    def _mains(self) -> dict[str, int]:
        return {p.name: p.status.pid for p in self.all() if p.status.pid is not None}

    def _document(self) -> dict[str, Any]:
        statuses = {p.name: self._status_document(p) for p in self.all() if p.status.generation}
        logs = self._ground.counters_document([process.program for process in self.places.everyone()])
        end = {"closing": self.closing, "exit_status": self._exit_status, "keeper": self.snapshot.identity}
        found_again = self._register.document(self.places.everyone(), self.config) | self._ground.held_document()
        found_again["trials"] = self._ground.trials.keys()
        wanted: dict[str, Any] = {"down": sorted(self._down), "replacing": sorted(self.replacing)}
        wanted |= self.versions()
        return {**wanted, **end, "processes": statuses, "logs": logs, **found_again}

    def _hold_state(self, document: dict[str, Any]) -> None:
        self._link.hand_over(STATE, document)

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
        self.replacing = set()
        self.on_moved()
        self.on_closing()
        log.info("stopping all programs (%s)", why)
        self.note("daemon", "", what="shutdown", why=why)
        self._link.send({"op": "notify", "state": "STOPPING=1"})
        # Whatever becomes of this supervisor: its successor goes on.
        self._link.hand_over(CLOSING, {"why": why, "exit_status": self._exit_status})
        self.journal.dirty()
        self.background(self._shut_down())

    async def _shut_down(self) -> None:
        timeout = self.config.daemon.shutdown_timeout
        try:
            async with asyncio.timeout(timeout):
                await carry_out("stop", self.places.everyone(), "the daemon is stopping", lambda info: None)
        except TimeoutError:
            left = [process for process in self.places.everyone() if process.status.state is not State.STOPPED]
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


def _shell_status(status: Status) -> int:
    """The exit status of a child as a shell shows it: 128 + number for a signal; 0 when there was none, 1 when nobody
    knows it."""
    if status.exit is None:
        return 0
    if status.exit.code is None and status.exit.signal is None:
        return 1
    return status.exit.code or 0 if status.exit.signal is None else 128 + status.exit.signal

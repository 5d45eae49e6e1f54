"""Replacing a process by its successor while it serves: no visitor notices, whether that goes well or not.

    trial     the successor starts in the other place of the process (`Program.slot`), on second sockets that nobody
              but its readiness probe can reach; it must become ready, and stay so for `start_seconds`
    canary    where one is wanted (`canary`): a share of the new connections goes to the successor for a while, and what
              comes of it decides (`proving`)
    back      it was decided against it: all new connections go to the one before, the successor answers what it has
    passed    new connections go to the successor, which is the current process from now on; the one before answers
              what waits in its queue and what it has accepted
    leaving   where it has an address that closes with it: nobody more comes there, and it answers who has come
    stopping  it gets its stop signal
    (done)    it has gone, its sockets are closed

What goes wrong in the trial, or in the phase "passed", ends the successor, and all is as it was. Each phase
is handed to the keeper before it begins: a supervisor that comes up in a trial or a canary ends the successor, and one
that comes up later goes on to the end. So whoever dies, one of the two versions serves.

Sharing one socket would not do: nobody could ask a successor alone, visitors would meet it in its trial, and most
servers drop what they have accepted and not yet read when they are told to stop. So where several processes have one
socket, all that share it pass on together: all of before to all of afterwards (`units.Unit`), whatever their names and
number. A successor may have nobody before it: its process has fallen, or comes with a changed table. Then the process
in its other place just does not run. And who is before may have no successor of its name: it *leaves*.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple, TypeVar

from procman import servers, shape
from procman.canary import Canary
from procman.config import Program
from procman.config import place as spot
from procman.errors import ProcmanError
from procman.ground import Ground
from procman.lifecycle import State, Status, Stop
from procman.link import KeeperLink
from procman.listeners import FileId
from procman.operation import Outcome, Progress, begin, carry_out, reach, until_failing
from procman.process import Moment, Process
from procman.proving import Proving
from procman.records import dataclass
from procman.sockets import beside, listener_of
from procman.supervisor import Supervisor
from procman.takeover import Passing
from procman.units import Unit, company

log = logging.getLogger("procman")

HELD = "rollout/"
"""Begins the name under which the keeper holds what is to be known of a rollout."""

GRACE_SECONDS = 1.0
"""After its queue is empty, the one before has this long to read what it has accepted, before its stop signal."""

DRY_SECONDS = 60.0
"""So long the one before may work on its queue: who waits there is lost when its socket closes."""

HANDSHAKE_SECONDS = 4.0
"""Who had begun to connect to it may take so long: a lost packet is sent again after 1 and after 3 seconds. Who is not
there by then is reset, or will never come."""

HANDSHAKE_LOOK_SECONDS = 0.1

PATIENCE_SECONDS = 2.0
"""So long who waits in its queue waits for a process before that is not RUNNING: it may get up, or hang."""

LOOK_SECONDS = 0.02
"""How often that is looked at: nobody tells that a queue is empty."""

STRANGER_SECONDS = 2.0
"""A socket of a rollout before that is not closed after so long is held by somebody who was left behind."""

LINES = 20
"""Of the output of a successor that failed, so many lines are shown."""

PHASES = ("trial", "canary", "back", "passed", "leaving")

Passed = Callable[[str, Program | None], None]
"""Told of a process whose successor is the current one from now on (None), or of the program that it is once more."""

Listening = Callable[[Container[str]], Container[str]]
"""Which listeners some process has, or is to have, but for these processes, which leave."""

T = TypeVar("T")


def serves(process: Process) -> bool:
    """Whether there is somebody who could pass on to a successor."""
    return process.status.state in (State.STARTING, State.RUNNING)


def running(processes: Iterable[Process]) -> set[str]:
    """The names of those that serve. One that drains accepts no more, and its next start waits (`Trials.hold`)."""
    return {process.name for process in processes if serves(process)}


def overlaps(process: Process) -> bool:
    """Whether a reload of `process` starts a successor beside it, as it is now."""
    return process.program.reload == "overlap" and serves(process)


@dataclass(frozen=True, slots=True)
class Memo:
    """What the keeper holds of a rollout: its phase, the places of the successors by process, the held names of the
    first sockets, and the files of Unix sockets, first and second ones, by held name."""

    phase: str
    why: str
    """Of the rollout; in the phase "back" what has decided against it."""
    successors: dict[str, int]
    firsts: list[str]
    files: dict[str, list[int]]
    leaving: list[str] = field(default_factory=list)
    """Processes without a successor, which stop with the ones before."""

    @property
    def passed(self) -> bool:
        """Whether the successors are the current processes."""
        return self.phase in ("passed", "leaving")

    def known_files(self) -> dict[str, FileId]:
        """The files as `sockets` has them."""
        return {name: (file[0], file[1]) for name, file in self.files.items()}


class World(NamedTuple):
    """What a rollout works on."""

    supervisor: Supervisor
    link: KeeperLink
    ground: Ground


class _Abandoned(Exception):
    """Somebody wants it to end now."""


class Rollout:
    """One unit on its way. `programs` are what the successors are, by name."""

    def __init__(
        self,
        world: World,
        unit: Unit,
        programs: Mapping[str, Program],
        why: str,
        *,
        progress: Progress = lambda info: None,
        passed: Passed = lambda name, kept: None,
        wish: Canary | None = None,
        at_once: int = 1,
        listening: Listening = lambda but: frozenset(),
    ) -> None:
        """`at_once` successors start at a time. The one before leaves the listeners that are not `listening`."""
        self._listening = listening
        self._passed = passed
        self._at_once = max(1, at_once)
        self._canary = wish
        self.proving: Proving | None = None
        """Its canary, while there is one."""
        self._reached = self._deaf = False  # visitors reach the successors; they accept nobody
        self._by_hand = False  # it is rolled back because an operator says so, whatever it has printed
        self._settled = self._called_off = self._hurry = False
        """Which version goes on is decided; somebody has asked for something else; all of it is to stop."""
        self._supervisor, self._link, self._ground = world
        self._unit, self._programs, self._why, self._progress = unit, programs, why, progress
        self.name = unit.names[0]
        self.output: dict[str, list[str]] = {}
        self._outputs: dict[str, Callable[[], list[str]]] = {}
        self._firsts: list[str] = []
        self._slots: dict[str, int] = {}
        self._abandoned = asyncio.Event()
        self._ended = asyncio.Event()
        self._keys: list[str] = []
        self._keys_before: list[str] = []
        self.outcome: Outcome | None = None
        """What came of it; None: it has not ended, or the supervisor was replaced before anything was decided."""

    async def abandon(self, names: Container[str] | None = None) -> None:
        """An operator wants something else: end it, and wait until it has ended. Where the processes `names` stop, and
        these are all of them, at once; else nobody is lost who waits for one of the two versions."""
        there = self._supervisor.processes
        if names is not None and all(name in names or not there[name].status.wanted for name in self._unit.names):
            self.give_up()
        elif not self._settled:
            self._called_off = True
            self._abandoned.set()
        await self._ended.wait()

    @property
    def leaving(self) -> tuple[str, ...]:
        """See `Unit`."""
        return self._unit.leaving

    def give_up(self) -> None:
        """End it now, without waiting for that."""
        self._hurry = self._called_off = True
        self._abandoned.set()

    async def ended(self) -> None:
        """Wait until it has ended by itself."""
        await self._ended.wait()

    def decide(self, *, promoted: bool, why: str, progress: Progress) -> None:
        """An operator ends the canary, and wants to be told what follows, too."""
        first = self._progress

        def both(info: dict[str, Any]) -> None:
            first(info)
            progress(info)

        if self.proving is not None:
            self._progress = both
            self._by_hand = not promoted
            self.proving.decide(promoted=promoted, why=why)

    async def run(self) -> Outcome:
        """Carry it out. Returns whether the successors serve, and why not."""
        try:
            self.outcome = await self._carry_out()
            return self.outcome
        finally:
            self._ground.trials.release(self.name)
            self._ended.set()

    async def _carry_out(self) -> Outcome:
        try:
            await self._trial()
            if self._canary is not None:
                self._why += f"; {await self._prove(self._canary)}"
        except (_Abandoned, ProcmanError, _Failed) as error:
            await self._roll_back(str(error) or "something else was asked for meanwhile")
            return False, self._result(str(error))
        except Exception as error:  # whatever it is: nothing may stay beside, for that would bar every change to come
            log.exception("%s: a mistake in procman", ", ".join(self._unit.names))
            await self._roll_back(f"a mistake in procman: {error!r}")
            return False, self._result("a mistake in procman, which the log tells")
        problem = await self._pass_on()
        return (not problem, problem or self._why)

    def _result(self, reason: str) -> str:
        everyone = (*self._unit.names, *self._unit.leaving)
        there = [self._supervisor.processes[name] for name in everyone if name in self._supervisor.processes]
        serving = [f"pid {process.status.pid}" for process in there if process.status.state is State.RUNNING]
        text = f"{reason or 'it was called off, as something else was asked for'}; rolled back"
        if self._called_off or not serving:  # what serves now may be about to stop
            return text
        return f"{text}, {', '.join(serving)} serve{'s' * (len(serving) == 1)} as before"

    # --- the trial --------------------------------------------------------------------------------------------------

    async def _trial(self) -> None:
        supervisor, unit = self._supervisor, self._unit
        everyone = (*unit.names, *unit.leaving)
        programs = {
            name: servers.in_place(self._programs[name], 1 - supervisor.processes[name].program.slot)
            for name in unit.names
        }
        self._keys = [program.key for program in programs.values()]
        self._slots = {name: program.slot for name, program in programs.items()}
        # One that has fallen must not get up on the socket that serves: it may be the new release.
        self._keys_before = [each.key for each in self._at(0)]
        self._ground.trials.hold(self.name, [*self._keys, *self._keys_before], unit.listeners)
        up = running(supervisor.all())
        if others := company(supervisor.config, everyone, unit.listeners, up):
            raise _Failed(f"{others[0]}, which has the same listener, was started meanwhile")
        # Until the keeper has closed the sockets of a rollout before, one that nobody accepts from is in the group, and
        # the places in it are others (`routing`).
        await self._link.sync()
        listeners = {listener.name: listener for listener in supervisor.config.listeners}
        passing = [listeners[name] for name in unit.listeners]
        self._firsts = self._ground.trials.firsts(passing)
        await self._unless_abandoned(self._alone())
        self._tell("trial")
        new = {each for program in programs.values() for each in program.listen}.difference(unit.listeners)
        quiet = [each for each in listeners.values() if each.name in new]
        self._ground.trials.begin(self._keys, passing, quiet, self._keys_before)
        self._tell("trial")
        waiting = list(programs)
        while waiting:
            names, waiting = waiting[: self._at_once], waiting[self._at_once :]
            starts = [self._start(supervisor.processes[name], programs[name]) for name in names]
            for problem in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(problem, BaseException):
                    raise problem
        seconds = [program.start_seconds for program in programs.values() if program.ready.kind != "seconds"]
        await self._stay_ready(max(seconds, default=0.0))

    async def _alone(self) -> None:
        """Wait until no socket is in the groups of ours that should be closed. Raises Failed where one stays."""
        trials, end = self._ground.trials, time.monotonic() + STRANGER_SECONDS
        # A child that the keeper has just started has each until it executes its command.
        while (found := trials.strangers(self._firsts)) and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)
        if found:
            raise await trials.said(found)

    async def _start(self, process: Process, program: Program) -> None:
        if self._supervisor.closing:
            raise _Abandoned
        self._say(process.name, "its successor starts")
        process.mark("")
        number = self._supervisor.places.next_number(process)
        known = Status(generation=number, restarts=process.status.restarts)
        successor = self._supervisor.put_beside(program, known)
        self._outputs[process.name] = self._ground.remember_output(program)
        aim = begin("start", successor, self._why)
        good, why = await self._unless_abandoned(reach(aim, lambda info: self._say(process.name, _successor(info))))
        if not good or successor.status.state is not State.RUNNING:
            raise _Failed(f"the successor failed: {why}")
        self._say(process.name, f"its successor, pid {successor.status.pid}, is ready")

    async def _stay_ready(self, seconds: float) -> None:
        """Wait; raises _Failed when a successor does not stay RUNNING."""
        successors = [self._beside(name) for name in self._unit.names]
        await self._unless_abandoned(until_failing(successors, seconds))
        self._check(successors)

    def _check(self, successors: Iterable[Process]) -> None:
        for process in successors:
            if process.status.state is not State.RUNNING:
                exit = process.status.exit
                raise _Failed(f"the successor did not stay up: {process.status.why if exit is None else exit.reason}")

    # --- the canary -------------------------------------------------------------------------------------------------

    async def _prove(self, wish: Canary) -> str:
        """A share of the new connections goes to the successors, until something decides. Returns why they take over;
        raises _Failed when they do not."""
        names = self._unit.names
        successors = [self._beside(name) for name in names]

        def said(text: str) -> None:
            for name in names:
                self._say(name, f"canary: {text}")

        self._tell("canary")
        self._hear_all(self._slots)
        self.proving = Proving(self._ground, wish, successors, self._at(0), firsts=self._firsts, said=said)
        try:
            self._reached = True
            for first in self._firsts:
                self._ground.sockets.split(first, wish.share)
            what = f"{wish.share * 100:g}% of new connections go to its successor for {wish.seconds:g} s"
            decides = "procmanctl promote or rollback decides at once"
            self._say(names[0], f"waits for its canary: {what}; {decides}", notice=True)
            for name in names:
                log.info("%s: canary: %s", name, what)
                self._supervisor.note("rollout", name, what="canary", share=wish.share, seconds=wish.seconds)
            promoted, why, self._deaf = await self._unless_abandoned(self.proving.run())
        finally:
            self.proving.close()
            self.proving = None
        if not promoted:
            raise _Failed(why)
        for name in names:
            log.info("%s: %s", name, why)
            self._supervisor.note("rollout", name, what="promoted", why=why)
        return why

    async def _lead_back(self, reason: str) -> None:
        """Nobody more comes to the successors, and they answer whom they have."""
        self._tell("back", reason)
        try:
            for first in self._firsts:
                self._ground.sockets.take_back(first)
        except ProcmanError as error:
            log.error("%s: %s", ", ".join(self._unit.names), error)
        seconds = [beside(first) for first in self._firsts]
        try:
            deaf = self._deaf and any(map(self._ground.sockets.waiting, seconds))
            if deaf or not await self._run_dry(seconds, 1):
                await self._stand_in(1)
        except _Abandoned:
            await self._hurried(seconds, 1)

    # --- the successor serves ---------------------------------------------------------------------------------------

    async def _pass_on(self) -> str:
        """From the moment when the successors are the current ones. Returns "" or why they are not any more."""
        self._settled = True
        if not self._hurry:
            self._abandoned.clear()  # too late for that
        self._tell("passed")
        try:
            for first in self._firsts:
                self._ground.sockets.pass_on(first)
        except ProcmanError as error:
            await self._take_back(str(error))
            return self._result(str(error))
        self._hear_all(self._slots)
        for name in self._unit.names:
            self._supervisor.switch(name)
            self._passed(name, None)
        self._ground.trials.over(self._keys)
        for name in self._unit.names:
            self._say(name, "new connections go to the successor; the one before runs dry")
        return await self._let_go()

    def _hear_all(self, names: Iterable[str]) -> None:
        """Everybody may come to the addresses that are new with the successors."""
        for name in self._ground.sockets.of({name: self._successor(name).program.listen for name in names}):
            try:
                self._ground.sockets.hear_all(name)
            except ProcmanError as error:
                log.error("%s", error)

    async def _let_go(self, *, decided: bool = False) -> str:
        """The one before runs dry and stops; if the successor fails meanwhile, it goes on, unless it was `decided` that
        it does not. Returns as `_pass_on`."""
        names = self._unit.names
        try:
            if not decided:
                if await self._run_dry(self._firsts, 0):
                    current = [self._supervisor.processes[name] for name in names]
                    # One that an operator has stopped meanwhile says nothing about its version.
                    self._check([process for process in current if process.status.wanted])
                else:
                    await self._stand_in(0)
            await self._leave()
        except _Abandoned:
            await self._hurried(self._firsts, 0)
        except _Failed as error:
            if any(process.status.state is State.RUNNING for process in self._at(0)):
                await self._take_back(str(error))
                return self._result(str(error))
            log.error("%s: %s", ", ".join(names), error)
        for lines in self._outputs.values():
            lines()
        await self._finish()
        return ""

    async def _take_back(self, reason: str) -> None:
        """All is as it was before the successor."""
        current = self._supervisor.processes
        passed = [name for name in self._unit.names if current[name].program.slot == self._slots[name]]
        for name in passed:
            self._passed(name, servers.in_place(self._beside(name).program, 0))
        self._tell("back", reason)
        # One that falls and gets up again must not do so on the socket that serves from now on.
        firsts = {listener_of(first): first for first in self._firsts}
        for key in self._keys:
            self._ground.trials.seat(self.name, key, firsts, 1)
        for first in self._firsts:
            try:
                self._ground.sockets.take_back(first)
            except ProcmanError as error:
                log.error("%s", error)
        for name in passed:
            self._supervisor.switch(name, back=True)
        self._reached = True
        await self._roll_back(reason)

    async def _leave(self) -> None:
        """Nobody more comes to the addresses that close with the one before, and it answers who has come."""
        before = [process.program for process in self._at(0)]
        left = self._ground.parting.closing(before, self._listening(self._unit.leaving))
        if not left:
            return
        self._tell("leaving")
        await self._unless_abandoned(self._ground.parting.leave(left, DRY_SECONDS))

    async def _aside(self, processes: Sequence[Process], why: str, _again: bool = False) -> bool:
        """These stop, while those in their other places go on with the sockets that do not pass on."""
        listen, needed = {each for process in processes for each in process.program.listen}, self._listening(())
        known = [each for each in self._supervisor.config.listeners if each.name in listen and each.name in needed]
        current = {each.name: self._ground.sockets.current(each, "") for each in known}
        passing = {*self._firsts, *map(beside, self._firsts)}
        shared = [each for each in known if current[each.name] not in passing]
        await self._ground.parting.aside(processes, shared, why)
        return not self._supervisor.closing

    async def _run_dry(self, queues: Sequence[str], place: int) -> bool:
        """Wait until nobody waits in these queues or is on the way to them, and those who have them, the ones before
        (`place` 0) or the successors (1), have read what they accepted. False: there are some whom they do not
        answer."""
        if not queues and not any(process.program.listen for process in self._at(place)):
            return True
        trials, end = self._ground.trials, time.monotonic() + HANDSHAKE_SECONDS
        connecting = await trials.connecting(queues)  # some to the other one: it will not take long
        dry, patience = time.monotonic() + DRY_SECONDS, time.monotonic() + PATIENCE_SECONDS
        while (waiting := any(map(self._ground.sockets.waiting, queues))) or connecting:
            if any(process.status.state is State.RUNNING for process in self._at(place)):
                patience = time.monotonic() + PATIENCE_SECONDS
            if waiting and time.monotonic() >= min(dry, patience):
                return False
            pause = HANDSHAKE_LOOK_SECONDS if connecting else LOOK_SECONDS
            await self._unless_abandoned(asyncio.sleep(pause))
            if connecting:
                late = time.monotonic() >= end
                connecting = frozenset() if late else connecting & await trials.connecting(queues)
        current = [self._supervisor.processes[name] for name in self._unit.names]
        await self._unless_abandoned(until_failing(current, GRACE_SECONDS))
        return True

    async def _hurried(self, queues: Sequence[str], place: int) -> None:
        """All of it stops. Who waits in these queues can't wait for the next start, as others can: he has as long as a
        stop may take."""
        there = self._at(place)
        end = time.monotonic() + max((process.program.stop_timeout for process in there), default=0.0)
        while any(map(self._ground.sockets.waiting, queues)) and time.monotonic() < end:
            if self._supervisor.closing or not any(process.status.state is State.RUNNING for process in there):
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _stand_in(self, place: int) -> None:
        """Those beside do not answer who waits in their queue, that of `place`: one more process of the version that
        serves does that in their place."""
        name, why = self._unit.names[0], "it does not answer who waits for it"
        role = "the successor" if place else "the one before"
        instead = "one more process of the version that serves does"
        log.warning("%s: %s does not answer who waits for it: %s", name, role, instead)
        self._say(name, f"{role} does not answer who waits for it: {instead}")
        others = [*map(self._beside, self._unit.names), *([] if place else self._leaving())]
        gone = await self._unless_abandoned(carry_out("stop", others, why, lambda info: None, self._aside))
        if failed := next((reason for good, reason in gone.values() if not good), ""):
            log.error("%s: connections that waited for %s are lost: %s", name, role, failed)
            return
        there, now = self._beside(name), self._supervisor.processes[name]
        number = max(there.status.generation, self._supervisor.places.next_number(now))
        program = servers.in_place(now.program, there.program.slot)
        if self._abandoned.is_set():
            raise _Abandoned
        self._supervisor.take_away(name)
        self._ground.trials.seat(self.name, program.key, {listener_of(first): first for first in self._firsts}, place)
        queues = [beside(first) for first in self._firsts] if place else self._firsts
        try:
            process = self._supervisor.put_beside(program, Status(generation=number, restarts=there.status.restarts))
            process.role = role.removeprefix("the ") if place else role
            good, said = await self._unless_abandoned(reach(begin("start", process, why), lambda info: None))
            if not good or not await self._run_dry(queues, place):
                log.error("%s: connections that waited for %s are lost: %s", name, role, said)
        except ProcmanError as error:
            log.error("%s: connections that waited for %s are lost: %s", name, role, error)
        finally:
            self._ground.trials.over([program.key])

    async def _finish(self) -> None:
        """The one before stops, and all that was its own goes."""
        names = self._unit.names
        before, leaving = [self._beside(name) for name in names], self._leaving()
        for process in before:
            if process.status.pid is None:  # it has fallen, and would start when nothing holds it any more
                process.feed(Stop("its successor serves"))
        self._ground.trials.release(self.name)
        self._ground.trials.over(self._keys_before)
        await asyncio.gather(
            carry_out("stop", before, "its successor serves", lambda info: None, self._aside),
            carry_out("stop", leaving, self._why, lambda info: None),
        )
        await self._ground.written([process.program for process in before])
        for process in before:
            now = self._supervisor.processes.get(process.name)
            if now is not None and now.status.exit is None:
                now.status = replace(now.status, exit=process.status.exit)
            self._supervisor.take_away(process.name)
        for first in self._firsts:
            self._ground.sockets.close(first)
        self._link.release(HELD + self.name)
        for name in names:
            self._supervisor.note("rollout", name, what="done", why=self._why)

    async def _roll_back(self, reason: str) -> None:
        """The successors go; what was before has never stopped."""
        self._settled = True
        if not self._hurry:
            self._abandoned.clear()
        names = [name for name in self._unit.names if name in self._supervisor.places.beside]
        if self._reached:
            await self._lead_back(reason)
        successors = [self._beside(name) for name in names]
        await carry_out("stop", successors, reason, lambda info: None, self._aside)
        await self._ground.written([process.program for process in successors])
        printed = {name: lines() for name, lines in self._outputs.items()}
        self.output = {} if self._by_hand else {name: lines[-LINES:] for name, lines in printed.items()}
        self._ground.trials.over([*self._keys, *self._keys_before])
        self._ground.trials.end(self._firsts)
        for name in names:
            self._supervisor.take_away(name)
            log.warning("%s: rolled back: %s", name, reason)
            self._supervisor.note("rollout", name, what="rolled back", why=reason, output=self.output.get(name, []))
        told = next((lines for lines in printed.values() if lines), [])
        there = self._supervisor.processes
        for process in [*(there[name] for name in self._unit.names if name in there), *self._leaving()]:
            self._set_back(process, reason, printed.get(process.name, told))
        self._link.release(HELD + self.name)

    def _set_back(self, process: Process, reason: str, printed: Sequence[str]) -> None:
        """`process` goes on, and remembers why."""
        process.history.append(Moment(time.time(), process.status.state, f"{self._why}: rolled back: {reason}"))
        setback = "" if self._called_off else f"{reason}; rolled back"
        process.mark(setback, printed if setback else [])

    # --- what a supervisor before had begun -------------------------------------------------------------------------

    async def go_on(self, memo: Memo) -> None:
        """End a rollout that a supervisor before had begun, in one way or the other."""
        self._slots = {name: memo.successors[name] for name in self._unit.names}
        self._keys = [spot(name, slot) for name, slot in self._slots.items()]
        self._keys_before = [spot(name, 1 - slot) for name, slot in self._slots.items()]
        self._firsts = list(memo.firsts)
        if memo.passed and not any(self._successor(name).status.wanted for name in self._unit.names):
            self.give_up()  # all of it was stopped
        try:
            if memo.passed:
                self._hear_all(self._slots)
            self._reached, self._settled = memo.phase in ("canary", "back"), memo.passed
            if memo.phase == "back":
                await self._roll_back(memo.why)
                self.outcome = False, self._result(memo.why)
            elif not memo.passed:
                await self._roll_back(f"the supervisor was replaced during its {memo.phase}")
            elif not (problem := await self._let_go(decided=memo.phase == "leaving")):
                self.outcome = True, f"{self._why}; the supervisor was replaced meanwhile"
            else:
                self.outcome = False, problem
        finally:
            self._ground.trials.release(self.name)
            self._ended.set()

    # --- around -----------------------------------------------------------------------------------------------------

    def _successor(self, name: str) -> Process:
        """In either place."""
        process = self._supervisor.processes[name]
        return process if process.program.slot == self._slots[name] else self._beside(name)

    def _at(self, place: int) -> list[Process]:
        """The successors (1), or those before (0) and who leaves with them, that have a child, in whichever place."""
        places = self._supervisor.places.by_key
        found = [places.get(spot(name, slot if place else 1 - slot)) for name, slot in self._slots.items()]
        everyone = (*found, *([] if place else self._leaving()))
        return [each for each in everyone if each is not None and each.status.pid is not None]

    def _leaving(self) -> list[Process]:
        there = self._supervisor.processes
        return [there[name] for name in self._unit.leaving if name in there]

    def _beside(self, name: str) -> Process:
        return self._supervisor.places.beside[name]

    def _tell(self, phase: str, why: str = "") -> None:
        files = self._ground.sockets.files(self._firsts)
        document = {"phase": phase, "why": why or self._why, "successors": self._slots}
        document |= {"firsts": self._firsts, "files": files, "leaving": list(self._unit.leaving)}
        self._link.hand_over(HELD + self.name, document)

    def _say(self, name: str, text: str, **more: bool) -> None:
        process = self._supervisor.processes[name]
        self._progress({"name": name, "state": str(process.status.state), "why": text, **more})

    async def _unless_abandoned(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        abandoned = asyncio.ensure_future(self._abandoned.wait())
        try:
            await asyncio.wait({task, abandoned}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _Abandoned
        finally:
            task.cancel()
            abandoned.cancel()


class _Failed(Exception):
    """A successor has not proven itself."""


def _successor(info: dict[str, Any]) -> str:
    return f"its successor is {info['state']}: {info['why']}"


def memo_of(document: object) -> Memo:
    """What the keeper has held of a rollout. Raises ValueError for what makes no sense."""
    memo: Memo = shape.fit(document, Memo)
    good = memo.phase in PHASES and memo.successors and set(memo.successors.values()) <= {0, 1}
    if not good or any(len(file) != 2 for file in memo.files.values()):
        raise ValueError("it is no rollout")
    return memo


def passing(memos: Mapping[str, Memo], names: Iterable[str]) -> dict[str, Passing]:
    """Which place is the current one of each process that is being replaced."""
    known = set(names)
    return {
        name: Passing(slot if memo.passed else 1 - slot)
        for memo in memos.values()
        for name, slot in memo.successors.items()
        if name in known
    }

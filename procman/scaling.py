"""Programs whose number of processes goes by load (`[program.NAME.scale]`): looks at their listeners, asks `scale`, and
starts and stops processes.

The number of a program is nothing of its own: it is how many of its processes are wanted up. That is part of the status
of each, which the keeper is told together with the deed, so it outlives a supervisor that is killed at any moment. What
an operator has stopped (`Supervisor.is_down`) is not started, and does not count.

While none is up, the loop waits on the listening sockets themselves, so a first connection is seen at once and nothing
is polled. Else the kernel is asked every LOOK_SECONDS for the connections of those that could become more, or fewer.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Container, Sequence
from dataclasses import replace

from procman import queues, scale, servers, workers, workload
from procman.config import Address, Listener
from procman.config import Scale as Rule
from procman.errors import Failed, ProcmanError
from procman.ground import Ground
from procman.lifecycle import Start, State, Stop
from procman.operation import Aim, Outcome, Progress, reach
from procman.process import Process
from procman.records import dataclass
from procman.scale import Memory, Seen
from procman.supervisor import Supervisor

log = logging.getLogger("procman")

LOOK_SECONDS = 1.0
"""How often connections are counted. How long a queue takes to fill is no matter of less."""

_DOWN = "scaled down"


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of one program, in their order."""

    name: str
    rule: Rule
    processes: Sequence[Process]

    @property
    def number(self) -> int:
        """How many are wanted."""
        return sum(process.status.wanted for process in self.processes)

    @property
    def ready(self) -> int:
        """How many of those serve."""
        return sum(process.status.wanted and process.status.ready for process in self.processes)

    @property
    def hopeless(self) -> float | None:
        """See `Seen`."""
        wanted = [process for process in self.processes if process.status.wanted]
        over = wanted and all(process.status.state is State.FATAL for process in wanted)
        return max(process.program.restart_delay_max for process in wanted) if over else None


class Scaling:
    """See the module. It acts by itself where nothing else does: not during a change of the table, a reload of the
    program, or the end of the daemon."""

    def __init__(self, supervisor: Supervisor, ground: Ground) -> None:
        self._supervisor = supervisor
        self._sockets = ground.sockets
        self._loop = asyncio.get_running_loop()
        self._memories: dict[str, Memory] = {}
        self._numbers: dict[str, int] = {}
        self._traces: dict[str, object] = {}  # of connections that have gone: what is new there
        self._watched: dict[str, list[str]] = {}  # program → held names of the sockets that the loop waits on
        self._timer: asyncio.TimerHandle | None = None
        self._settling: asyncio.Handle | None = None
        self._problems: dict[str, str] = {}  # by program; "" is what they all have in common
        self._leaving: dict[str, asyncio.Task[None]] = {}  # programs of which processes are being stopped
        supervisor.on_moved = self.settle_soon
        supervisor.awaits_first = self.awaits_first

    # --- for others -------------------------------------------------------------------------------------------------

    def group(self, name: str) -> Group | None:
        """The program `name`, None where its number does not go by load."""
        found = [process for process in self._supervisor.all() if process.program.program == name]
        rule = found[0].program.scale if found else None
        return None if rule is None else Group(name, rule, found)

    def numbers(self) -> dict[str, int]:
        """The number of each program that has one, by its name."""
        return {group.name: group.number for group in self._groups()}

    def says(self, process: Process) -> str:
        """Why `process` is down where that is a matter of the number; else ""."""
        group = self.group(process.program.program)
        down = process.status.wanted or self._supervisor.is_down(process.name)
        return "" if group is None or down or not self.begun(group) else _down(group.number, group.rule)

    @staticmethod
    def begun(group: Group) -> bool:
        """Without autostart, a program is left alone until an operator starts one of its processes."""
        return any(process.program.autostart or process.status.generation for process in group.processes)

    def awaits_first(self) -> bool:
        """Whether a program of which none is up will be started by a connection."""
        return any(group.number == 0 and self.begun(group) and self._usable(group) for group in self._groups())

    def problems(self) -> list[str]:
        """What an operator should know of."""
        return list(self._problems.values())

    def _troubled(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            log.error("%s", problem)
        self._problems[name] = problem

    def set_number(self, group: Group, number: int, why: str) -> list[Process]:
        """`number` processes of `group` are wanted from now on. Returns those that are started or stopped for it, the
        latter when that is `settled`. One that an operator has stopped is started only where no other is left."""
        before = group.number
        if number > before:
            idle = [process for process in group.processes if not process.status.wanted]
            down = self._supervisor.is_down
            idle.sort(key=lambda process: (down(process.name), process.status.state is not State.STOPPED))
            moved = idle[: number - before]
        else:
            moved = [process for process in reversed(group.processes) if process.status.wanted][: before - number]
        if moved:
            self._supervisor.note("scale", group.name, number=number, before=before, max=group.rule.max, why=why)
            log.info("%s: scaled from %d to %d of %d (%s)", group.name, before, number, group.rule.max, why)
        self._numbers[group.name] = number
        self._memories.pop(group.name, None)
        if number < before:
            stop = self._stop(group.name, moved, _down(number, group.rule))
            self._leaving[group.name] = self._supervisor.background(stop)
            return moved
        for process in moved:
            process.feed(Start(f"scaled up ({number} of {group.rule.max}): {why}"))
        self.settle_soon()
        return moved

    def is_first(self, process: Process) -> bool:
        """Whether none of its program is up, and `process` is the one that is started next."""
        group = self.group(process.program.program)
        if group is None or group.number or not self._free(group):
            return False
        return process is next((each for each in group.processes if not self._supervisor.is_down(each.name)), None)

    async def try_out(self, process: Process, why: str, progress: Progress) -> Outcome:
        """Start `process`, of which `is_first` is true, to see whether it does; if not, it is down again. Returns what
        came of it."""
        name = process.program.program
        group = self.group(name)
        if group is None:
            return False, "it has left the table"
        self.set_number(group, 1, f"{why}: none is up, and one is tried")
        good, reason = await reach(Aim("start", process, process.status.generation), progress)
        if good:
            return True, "none was up: it was started to be tried, and goes on as if a connection had come"
        group = self.group(name)
        if group is not None and group.number == 1 and process.status.wanted:
            self.set_number(group, 0, "it was tried, and did not start")
            await self.settled({name})
        return False, f"none was up, and one that was tried did not start: {reason}"

    async def _stop(self, name: str, processes: Sequence[Process], why: str) -> None:
        supervisor = self._supervisor
        try:
            await supervisor.aside(processes, why)
            for process in processes:
                there = supervisor.processes.get(process.name) is process
                if there and process.status.wanted and not supervisor.is_replaced(process.name):
                    process.feed(Stop(why))
        finally:
            del self._leaving[name]
            self.settle_soon()

    async def settled(self, names: Container[str]) -> None:
        """Wait until the number that was set for each of the programs `names` is the number that there is."""
        if leaving := [task for name, task in self._leaving.items() if name in names]:
            await asyncio.wait(leaving)

    # --- what is to be looked at ------------------------------------------------------------------------------------

    def settle_soon(self) -> None:
        """Something has changed."""
        if self._settling is None:
            self._settling = self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = None
        groups = self._groups()
        names = {group.name for group in groups}
        for name in [name for name in self._watched if name not in names]:
            self._unwatch(name)
        for known in (self._memories, self._numbers, self._traces, self._problems):
            for name in known.keys() - names - {""}:
                del known[name]
        for group in groups:
            number = group.number
            if self._numbers.get(group.name) != number:  # by an operator, or an end: what was seen before says nothing
                self._memories.pop(group.name, None)
                self._numbers[group.name] = number
            if not self._free(group):
                self._unwatch(group.name)
                continue
            self._explain(group)
            if number < self._bounds(group).low:
                self.set_number(group, self._bounds(group).low, f"min = {group.rule.min}")
            elif number == 0 and self._usable(group):
                self._watch(group)
            else:
                self._unwatch(group.name)
        if self._timer is None and any(self._polled(group) for group in groups):
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _groups(self) -> list[Group]:
        found: dict[str, list[Process]] = {}
        for process in self._supervisor.all():
            if process.program.scale is not None:
                found.setdefault(process.program.program, []).append(process)
        return [Group(name, each[0].program.scale, each) for name, each in found.items() if each[0].program.scale]

    def _usable(self, group: Group) -> int:
        """How many of its processes no operator wants down."""
        return sum(not self._supervisor.is_down(process.name) for process in group.processes)

    def _bounds(self, group: Group) -> scale.Range:
        return scale.within(group.rule, self._usable(group))

    def _free(self, group: Group) -> bool:
        """Whether its number may be changed now."""
        supervisor = self._supervisor
        replaced = any(supervisor.is_replaced(process.name) for process in group.processes)
        replaced = replaced or group.name in supervisor.reloading
        changing = supervisor.changing and group.name not in supervisor.untouched
        busy = supervisor.closing or changing or replaced or group.name in self._leaving
        return self.begun(group) and not busy

    def _polled(self, group: Group) -> bool:
        """Whether its connections are to be counted: it could become more or fewer."""
        bounds = self._bounds(group)
        number = group.number
        none_heard = number == 0 and bounds.high > 0 and group.name not in self._watched  # no socket: tried again
        return self.begun(group) and (0 < number < bounds.high or number > bounds.low or none_heard)

    def _explain(self, group: Group) -> None:
        """Why they are down changes with the number."""
        scaled = _down(group.number, group.rule)
        for process in group.processes:
            status = process.status
            if status.state is not State.STOPPED or status.wanted:
                continue
            text = scaled
            if self._supervisor.is_down(process.name):
                text = "stopped by an operator" if status.why.startswith(_DOWN) else status.why
            if status.why != text:
                process.status = replace(status, why=text)
                self._supervisor.journal.dirty()

    # --- the first connection ---------------------------------------------------------------------------------------

    def _watch(self, group: Group) -> None:
        watched = self._watched.get(group.name, ())
        if watched and all(self._sockets.is_watched(each) for each in watched):
            return
        self._unwatch(group.name)
        listen = self._listeners(group)
        try:
            names = [self._sockets.give(listener, group.processes[0].name) for listener in listen]
        except (ProcmanError, OSError) as error:
            self._troubled(group.name, f"{group.name} can't be started by a connection: {error}")
            return
        self._problems.pop(group.name, None)
        self._watched[group.name] = names
        for name in names:
            self._sockets.watch(name, functools.partial(self._connected, group.name))

    def _unwatch(self, name: str) -> None:
        for each in self._watched.pop(name, ()):
            self._sockets.unwatch(each)

    def _connected(self, name: str) -> None:
        """A connection waits, and nobody is there to accept it."""
        self._unwatch(name)
        group = self.group(name)
        if group is None or not self._free(group) or group.number or not self._usable(group):
            self.settle_soon()
            return
        self.set_number(group, max(1, self._bounds(group).low), "a connection waits")

    # --- the looks --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._timer = None
        self._supervisor.background(self._look_at([group for group in self._groups() if self._polled(group)]))

    async def _look_at(self, groups: Sequence[Group]) -> None:
        try:
            counted = [group for group in groups if self._free(group) and group.number]
            if counted:
                addresses = {each.address for group in counted for each in self._listeners(group)}
                found = await asyncio.to_thread(queues.loads, addresses)
                self._problems.pop("", None)
                for group in counted:
                    await self._decide(group.name, found)
        except (OSError, RuntimeError) as error:  # a kernel that does not tell; no process left for a thread
            self._troubled("", f"the connections of programs with scale can't be counted: {error}")
        finally:
            self.settle_soon()

    async def _decide(self, name: str, found: dict[Address, queues.Load]) -> None:
        group = self.group(name)
        if group is None:  # it has left the table while connections were counted
            return
        loads = [found[each.address] for each in self._listeners(group) if each.address in found]
        waiting, open_ = sum(each.waiting for each in loads), sum(each.open for each in loads)
        idle = loads and waiting + open_ == 0 and group.number > self._bounds(group).low
        passed = False
        if idle:
            passed = await self._passed(group, loads)
        else:
            self._traces.pop(group.name, None)
        group = self.group(name)  # as it is by now: its processes may be others
        if group is None or not loads or not self._free(group) or not group.number:
            return
        now = self._loop.time()
        memory = self._memories.get(group.name) or Memory(now, now)
        seen = Seen(group.number, group.ready, waiting, open_, passed, group.hopeless)
        decided = scale.decide(group.rule, self._bounds(group), seen, memory, now)
        if decided.number < group.number and await self._in_use(group, loads):
            return  # somebody has come since they were counted: servers that hang have been asked meanwhile
        if decided.number != group.number:
            self.set_number(group, decided.number, decided.why)
        self._memories[group.name] = decided.memory

    async def _in_use(self, group: Group, loads: Sequence[queues.Load]) -> bool:
        """Whether there are more connections now than in `loads`, or what is there may not be made less any more."""
        before, number = sum(each.waiting + each.open for each in loads), group.number
        addresses = {each.address for each in self._listeners(group)}
        found = await asyncio.to_thread(queues.loads, addresses)
        now = self.group(group.name)
        changed = now is None or not self._free(now) or now.number != number
        return changed or sum(each.waiting + each.open for each in found.values()) > before

    async def _passed(self, group: Group, loads: Sequence[queues.Load]) -> bool:
        """Whether connections came and went between the last look and this one: what the built-in servers have
        answered, or what TCP remembers. The first look at an idle program says yes: nobody knows."""
        past = frozenset().union(*(each.past for each in loads))
        answered = await self._answered(group)
        before, self._traces[group.name] = self._traces.get(group.name), (past, answered)
        return not isinstance(before, tuple) or bool(past - before[0]) or answered != before[1]

    async def _answered(self, group: Group) -> tuple[object, ...]:
        """How many requests each of its built-in servers has answered since it was started."""
        up = [process for process in group.processes if process.status.ready]
        return tuple(await asyncio.gather(*(self._requests(process) for process in up)))

    @staticmethod
    async def _requests(process: Process) -> object:
        program = process.program
        where = servers.told_at(program.server, program.argv)
        if not where:
            return process.child
        uid = program.account.uid if program.account is not None else os.geteuid()
        try:
            told = workload.read(program.server, await workers.ask(program.server, where, uid))
        except (Failed, workload.Unreadable):
            return process.child
        return process.child, *(worker.requests for worker in told.workers)

    def _listeners(self, group: Group) -> list[Listener]:
        known = {listener.name: listener for listener in self._supervisor.config.listeners}
        return [known[name] for name in group.processes[0].program.listen if name in known]


def _down(number: int, rule: Rule) -> str:
    return f"{_DOWN} ({number} of {rule.max})"

"""Programs that can't overlap get their new version: they stop, then they start. What does not start is once more what
it was.

    kept      it runs as an earlier table said, and is stopped
    tried     it has stopped, and starts as the table says now
    (done)    it serves; or it was wanted down
    back      it did not start: it stops, and starts as it was; it stays *kept* (`versions`)

Each step is told to the keeper before it begins, so a supervisor that comes up in the midst of it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from procman import apply, servers
from procman import printed as logged
from procman.config import Program
from procman.errors import ProcmanError
from procman.lifecycle import Start
from procman.operation import Aim, Progress, bring_down, proven, reach
from procman.process import Process
from procman.report import Info
from procman.rollout import World
from procman.versions import CHANGE, Versions

log = logging.getLogger("procman")

STOPPING: Info = {"name": "the daemon", "why": "it is stopping", "output": []}
"""What has failed, when a shutdown has cut a change off."""

OUTPUT_LINES = 20
"""Of the end of the log of a program that did not start, so many are shown."""


class _Bad(NamedTuple):
    """A process that did not start, and why."""

    process: Process
    reason: str
    printed: Mapping[str, Sequence[str]] = MappingProxyType({})
    """The end of what it and those beside it have printed, by name."""


class Renewal:
    """Renews processes of `world`."""

    def __init__(self, world: World, versions: Versions) -> None:
        self._supervisor, self._link, self._ground = world
        self._versions = versions

    async def renew(self, programs: Sequence[Program], why: str, progress: Progress) -> Info:
        """Stop the processes of `programs`, and start them as these say, one after the other where that can be
        (`apply.steps`); those that have begun that already go on. Returns what has failed, if anything: then all of
        them are what they were."""
        supervisor = self._supervisor
        tried: list[str] = []
        bad: _Bad | None = None
        for step in self._steps(programs):
            tried += [program.name for program in step]
            bad = await self._try(step, why, progress)
            if supervisor.closing:
                return STOPPING
            if bad is not None:
                break
        if bad is None or not bad.process.status.wanted:  # that was an operator, and says nothing of the version
            self._versions.let_go(tried)
            return {} if bad is None else {"name": bad.process.name, "why": f"it did not start: {bad.reason}"}
        log.error("%s: its new version did not start, it goes back to what it was: %s", bad.process.name, bad.reason)
        numbers = {name: supervisor.processes[name].status.generation for name in tried}
        failed = f"its new version did not start: {bad.reason}"
        then = await self.go_back(numbers, why, progress, failed, bad.printed)
        output = bad.printed[bad.process.name][-OUTPUT_LINES:]
        return {"name": bad.process.name, "why": f"it did not start: {bad.reason}; {then}", "output": output}

    def _steps(self, programs: Sequence[Program]) -> list[list[Program]]:
        kept, table = self._versions.kept, self._versions.table
        new = {listener.name: listener for listener in table.listeners}
        return apply.steps(programs, kept.programs | kept.tried, kept.listeners, new)

    async def _try(self, programs: Sequence[Program], why: str, progress: Progress) -> _Bad | None:
        """One step of `renew`. Returns who does not start, if anybody."""
        supervisor = self._supervisor
        names = [program.name for program in programs]
        supervisor.replacing = {name for name in names if not supervisor.is_down(name)}
        await self._stop([name for name in names if name in self._versions.kept.programs], why)
        if supervisor.closing:
            return None
        self._versions.trying(names)
        await self._become(programs, why)
        processes = [supervisor.processes[name] for name in names]
        outputs = {process.name: self._ground.remember_output(process.program) for process in processes}
        for process in processes:
            if not process.status.wanted and not supervisor.is_down(process.name):
                process.feed(Start(f"the table has changed ({why})"))
        bad = await self._bad([process for process in processes if not supervisor.is_down(process.name)], progress)
        supervisor.replacing = set()
        if bad is not None and not supervisor.closing:
            await self._ground.written([process.program for process in processes])
        printed = {name: lines() for name, lines in outputs.items()}
        return None if bad is None else bad._replace(printed=printed)

    async def follow(self, programs: Sequence[Program], why: str) -> None:
        """The processes of `programs`, which are down, are what these say from now on. One that was started meanwhile
        is stopped for that, and started again."""
        up = await bring_down([self._supervisor.processes[program.name] for program in programs], why)
        if self._supervisor.closing or not programs:
            return
        for program in programs:
            self._ground.unprepare(self._supervisor.processes[program.name].program)
        self._versions.let_go([program.name for program in programs])
        await self._become(programs, why)
        for process in [self._supervisor.processes[program.name] for program in programs]:
            if process.name in up and not self._supervisor.is_down(process.name):
                process.feed(Start(f"the table has changed ({why})"))

    async def go_back(
        self,
        numbers: Mapping[str, int],
        why: str,
        progress: Progress,
        failed: str = "its new version did not start",
        printed: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> str:
        """These processes are what they were before, in the reverse order, in steps as in `renew`: children up to
        `numbers` stop, and the next ones are that, marked with what has `failed`, and what that had `printed`. Returns
        in words what came of it."""
        supervisor, versions = self._supervisor, self._versions
        there = [name for name in numbers if name in supervisor.processes]
        versions.failed(there, CHANGE, {"half": "start", "why": why, "start": {}, "back": dict(numbers)})
        wrong = ""
        for step in reversed(self._steps(versions.of_table(there))):
            names = [program.name for program in step]
            part = {name: numbers[name] for name in names}
            told = await self._back(part, why, progress, failed, printed)
            if supervisor.closing:
                return "the daemon is stopping"
            wrong = wrong or told
        return wrong or "it was started again as it was before"

    async def _back(
        self,
        numbers: Mapping[str, int],
        why: str,
        progress: Progress,
        failed: str,
        printed: Mapping[str, Sequence[str]],
    ) -> str:
        """One step of `go_back`. Returns "" or who does not start even so."""
        supervisor, kept = self._supervisor, self._versions.kept.programs
        names = list(numbers)
        old = [kept[name] for name in names if name in kept]
        late = [name for name in names if not self._is_back(supervisor.processes[name], numbers[name])]
        await self._stop(late, why)
        if supervisor.closing:
            return ""
        await self._become([program for program in old if program.name in late], why)
        processes = [supervisor.processes[name] for name in names if not supervisor.is_down(name)]
        for process in processes:
            if process.name in late and not process.status.wanted:
                process.feed(Start("it is what it was"))
            process.mark(failed, printed.get(process.name, ()))
        bad = await self._bad(processes, progress)
        return "" if bad is None else f"as it was before, {bad.process.name} does not start either: {bad.reason}"

    def _is_back(self, process: Process, number: int) -> bool:
        """Whether it has had a child since number `number`, of the program that is kept for it: it may have fallen, and
        got up again, as what it was to be."""
        old = self._versions.kept.programs.get(process.name)
        same = old is None or servers.in_place(old, process.program.slot) == process.program
        return same and process.status.generation > number

    async def proven(self, processes: Sequence[Process], progress: Progress) -> Info:
        """Wait until these, which were told to start, have stayed up for `start_seconds`. Returns what has failed, if
        anything."""
        bad = await self._bad(processes, progress)
        if bad is None:
            return {}
        output = await self.output(bad.process)
        return {"name": bad.process.name, "why": f"it did not start: {bad.reason}", "output": output}

    async def output(self, process: Process) -> list[str]:
        """The last lines of its log."""
        with contextlib.suppress(ProcmanError, OSError, RuntimeError):  # no descriptor or thread is left
            recent = self._ground.recent(process.program)
            return await asyncio.to_thread(logged.last_lines, process.program, OUTPUT_LINES, recent)
        return []

    async def _stop(self, names: Iterable[str], why: str) -> None:
        """Stop them, and close what was theirs alone, once all that they have printed is in their logs."""
        processes = [self._supervisor.processes[name] for name in names]
        await self._versions.leave(processes, self._ground.parting)
        await bring_down(processes, why)
        await self._ground.written([process.program for process in processes])
        await bring_down(processes, why)
        if not self._supervisor.closing:
            for process in processes:
                self._ground.unprepare(process.program)

    async def _become(self, programs: Iterable[Program], why: str) -> None:
        """Their processes, which have stopped, are these programs. Sockets close that nobody has any more."""
        supervisor = self._supervisor
        changed = []
        for program in programs:
            process = supervisor.processes[program.name]
            if servers.in_place(program, process.program.slot) != process.program:
                process.program = servers.in_place(program, process.program.slot)
                changed.append(process)
        self._ground.close_unused(supervisor.config, self._versions.table.listeners)
        await self._link.sync()  # until then the keeper still holds the addresses
        for process in changed:
            self._ground.prepare(process.program, supervisor.config)

    async def _bad(self, processes: Sequence[Process], progress: Progress) -> _Bad | None:
        """Wait until they have started, and stayed up for `start_seconds`. The first that has not."""
        aims = [Aim("start", process, process.status.generation) for process in processes]
        outcomes = await asyncio.gather(*(reach(aim, progress) for aim in aims))
        for process, (good, reason) in zip(processes, outcomes, strict=True):
            if not good:
                return _Bad(process, reason)
        bad = await proven(processes)
        return None if bad is None else _Bad(*bad)

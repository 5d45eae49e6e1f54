"""A reload by an operator: what it does to each process is what its table says.

    overlap   a successor takes over (`rollouts.replace`)
    restart   it stops and starts when it is its turn (`rollouts.restart`)
    signal    it gets the signal
    command   the command runs
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Container, Iterable, Sequence
from typing import Any

from procman import printed, report
from procman.canary import Wish
from procman.errors import ProcmanError
from procman.lifecycle import State
from procman.operation import Outcome, Progress
from procman.process import Process
from procman.records import dataclass
from procman.rollout import overlaps
from procman.rollouts import Rollouts
from procman.scaling import Scaling

OUTPUT_LINES = 20
"""Of the end of the log of what has failed, so many are shown."""


@dataclass(slots=True)
class Reload:
    """One of them. `outputs` gets the last output of what has failed, by process. What is wanted down is left alone,
    which is no failure for those `spared`."""

    why: str
    progress: Progress
    outputs: dict[str, list[str]]
    at_once: int
    wish: Wish
    spared: Container[str]


class Reloading:
    """All of them."""

    def __init__(self, rollouts: Rollouts, scaling: Scaling) -> None:
        self._rollouts = rollouts
        self._scaling = scaling
        self._supervisor, self._link, self._ground = rollouts.world
        self._commands: dict[str, asyncio.Future[Outcome]] = {}  # by process, as long as they run

    def end_commands(self, names: Iterable[str]) -> None:
        """Something else is to be done with these processes."""
        for task in [self._commands[name] for name in names if name in self._commands]:
            task.cancel()

    async def carry_out(self, reload: Reload, processes: Sequence[Process]) -> dict[str, Outcome]:
        """What came of each. What does not run now, since it has failed or ended, is started: with the successors of
        the others, if there are any."""
        await self._scaling.settled({process.program.program for process in processes})
        outcomes: dict[str, Outcome] = {}
        overlapping: list[Process] = []
        restarting: list[Process] = []
        others: list[Any] = []
        passing = {process.program.program for process in processes if overlaps(process)}
        for process in processes:
            program, status = process.program, process.status
            runs = status.pid is not None and status.state is not State.STOPPING
            idle = self._scaling.says(process) or (status.why if process.name in reload.spared else "")
            if not status.wanted and idle:
                outcomes[process.name] = (True, f"nothing to reload: {idle}")
                if self._scaling.is_first(process):
                    others.append(self._try_out(reload, process))
            elif not status.wanted:
                outcomes[process.name] = (False, f"it does not run: {status.why}")
            elif runs and program.reload == "signal":
                self._link.signal(process.child, program.reload_signal)
                outcomes[process.name] = (True, f"sent {report.signal_name(program.reload_signal)}")
            elif runs and program.reload == "command":
                others.append(self._command(reload, process))
            elif self._rollouts.under_way(process.name) or (
                program.reload == "overlap" and program.program in passing  # also what has fallen: with the others
            ):
                overlapping.append(process)
            else:
                restarting.append(process)
        others += [self._overlap(reload, overlapping), self._restart(reload, restarting)]
        for each in await asyncio.gather(*others):
            outcomes |= each
        return outcomes

    async def _overlap(self, reload: Reload, processes: Sequence[Process]) -> dict[str, Outcome]:
        programs = [process.program for process in processes]
        outcomes, lines = await self._rollouts.replace(
            programs, reload.why, reload.progress, at_once=reload.at_once, wish=reload.wish
        )
        reload.outputs |= lines
        for name in [name for name, (good, _) in outcomes.items() if good]:
            now = self._supervisor.processes.get(name)
            scaled = now is not None and bool(self._scaling.says(now))  # nobody but its number has stopped it
            if now is None or scaled or (now.status.wanted and now.status.ending == "asked"):  # or it restarts
                continue
            if now.status.state is not State.RUNNING:
                said = "it serves no more" if now.status.wanted else "it was stopped meanwhile"
                outcomes[name] = False, f"{said}: {now.status.why}"
        return outcomes

    async def _restart(self, reload: Reload, processes: Sequence[Process]) -> dict[str, Outcome]:
        outcomes = await self._rollouts.restart(processes, reload.why, reload.progress, reload.at_once)
        for process in processes:
            if process.status.wanted and process.status.state in (State.BACKOFF, State.FATAL, State.EXITED):
                await self._show_output(reload, process)
        return outcomes

    async def _command(self, reload: Reload, process: Process) -> dict[str, Outcome]:
        name = process.name
        if name in self._commands:
            return {name: (False, f"a reload of {name} is under way already")}
        task = self._commands[name] = asyncio.ensure_future(self._ground.run_reload(process))
        await asyncio.wait({task})
        del self._commands[name]
        if task.cancelled():
            return {name: (False, "its reload command was ended: something else was asked for")}
        good, reason = task.result()
        process.mark("" if good else f"its reload failed: {reason}")
        if not good:
            await self._show_output(reload, process)
        return {name: (good, reason)}

    async def _try_out(self, reload: Reload, process: Process) -> dict[str, Outcome]:
        good, said = await self._scaling.try_out(process, reload.why, reload.progress)
        if not good:
            await self._show_output(reload, process)
        return {process.name: (good, said)}

    async def _show_output(self, reload: Reload, process: Process) -> None:
        """The end of its log."""
        await self._ground.written([process.program])
        recent = self._ground.recent(process.program)
        lines = functools.partial(printed.last_lines, process.program, OUTPUT_LINES, recent)
        with contextlib.suppress(ProcmanError, OSError, RuntimeError):  # no descriptor or thread is left
            reload.outputs[process.name] = await asyncio.to_thread(lines)

"""What an operator asked for several processes, carried out and waited for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence

from procman import lifecycle
from procman.lifecycle import Event, Restart, Start, State, Stop
from procman.process import Process
from procman.records import dataclass
from procman.report import Info, change

Progress = Callable[[Info], None]
Outcome = tuple[bool, str]
Aside = Callable[[Sequence[Process], str, bool], Awaitable[bool]]
"""Called with those that are to stop next, why, and whether they are to start again, before they are told to; it may
have told them. False: nothing may start any more."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What is to become of one process: `verb` is "start", "stop" or "restart"; `generation` is its child's number
    before."""

    verb: str
    process: Process
    generation: int

    def outcome(self) -> Outcome | None:
        """(reached?, why), or None while it is on its way."""
        status = self.process.status
        if self.verb == "stop":
            if status.state is State.STOPPED:
                return True, status.why
            return (False, "it was started meanwhile") if status.wanted else None
        fresh = self.verb == "start" or status.generation > self.generation
        match status.state:
            case State.RUNNING if fresh:
                return True, status.why
            case State.STOPPED:
                return False, f"it was stopped meanwhile: {status.why}"
            case State.EXITED if fresh:
                good = status.exit is not None and lifecycle.succeeded(self.process.program, status.exit)
                return good, status.why
            case State.BACKOFF | State.FATAL if fresh:
                return False, status.why
            case State.STOPPING if status.ending != "asked" and fresh and status.generation > self.generation:
                return False, status.why  # its start failed; what is left of it is being ended
        return None


def levels(processes: Iterable[Process], *, reverse: bool = False) -> list[list[Process]]:
    """Groups of the same priority: lowest first, for a stop highest first. Within a group: the order of the table."""
    ordered = sorted(processes, key=lambda process: process.program.priority)
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda process: process.program.priority)]
    return groups[::-1] if reverse else groups


async def reach(aim: Aim, progress: Progress) -> Outcome:
    """Wait until `aim` is reached or missed, telling `progress` of every change on the way."""
    changed = asyncio.Event()

    def watch(process: Process) -> None:
        progress(change(process))
        changed.set()

    aim.process.watchers.add(watch)
    try:
        while (outcome := aim.outcome()) is None:
            changed.clear()
            await changed.wait()
        return outcome
    finally:
        aim.process.watchers.discard(watch)


def begin(verb: str, process: Process, why: str) -> Aim:
    """Feed the event that `verb` stands for."""
    aim = Aim(verb, process, process.status.generation)
    events: dict[str, Event] = {"start": Start(why), "stop": Stop(why), "restart": Restart(why)}
    process.feed(events[verb])
    return aim


async def carry_out(
    verb: str, processes: Sequence[Process], why: str, progress: Progress, aside: Aside | None = None
) -> dict[str, Outcome]:
    """Start, stop or restart `processes` and wait for each. A stop goes by priority, one level after the other."""
    outcomes: dict[str, Outcome] = {}
    if verb == "restart" and aside is not None:
        return await _restart(processes, why, progress, aside)
    if verb != "stop":
        aims = [begin(verb, process, why) for level in levels(processes) for process in level]
        results = await asyncio.gather(*(reach(aim, progress) for aim in aims))
        return {aim.process.name: result for aim, result in zip(aims, results, strict=True)}
    for level in levels(processes, reverse=True):
        if aside is not None:
            await aside(level, why, False)
        aims = [begin(verb, process, why) for process in level]
        results = await asyncio.gather(*(reach(aim, progress) for aim in aims))
        outcomes |= {aim.process.name: result for aim, result in zip(aims, results, strict=True)}
    return outcomes


async def _restart(processes: Sequence[Process], why: str, progress: Progress, aside: Aside) -> dict[str, Outcome]:
    aims = [Aim("restart", process, process.status.generation) for level in levels(processes) for process in level]
    wanted = [aim.process for aim in aims if aim.process.status.wanted]
    if not await aside(processes, why, True):
        return {process.name: (False, "the daemon is stopping") for process in processes}
    # That takes seconds: an operator may have stopped one.
    stopped = [process for process in wanted if not process.status.wanted]
    outcomes = {each.name: (False, f"it was stopped meanwhile: {each.status.why}") for each in stopped}
    aims = [aim for aim in aims if aim.process not in stopped]
    for aim in aims:
        status = aim.process.status
        told = status.generation > aim.generation or (status.ending == "asked" and status.wanted)
        if not told:
            aim.process.feed(Restart(why))
    results = await asyncio.gather(*(reach(aim, progress) for aim in aims))
    return outcomes | {aim.process.name: result for aim, result in zip(aims, results, strict=True)}


async def bring_down(processes: Sequence[Process], why: str, aside: Aside | None = None) -> set[str]:
    """Stop them for a change of the table, also one that an operator starts meanwhile. Returns the names of those that
    were wanted up."""
    wanted: set[str] = set()
    while up := [process for process in processes if process.status.state is not State.STOPPED]:
        wanted |= {process.name for process in up if process.status.wanted}
        await carry_out("stop", up, f"the table has changed ({why})", lambda info: None, aside)
    return wanted


async def until_failing(processes: Sequence[Process], seconds: float) -> None:
    """Wait so long, or until one of them is not RUNNING any more."""
    failed = asyncio.Event()

    def watch(process: Process) -> None:
        if process.status.state is not State.RUNNING:
            failed.set()

    for process in processes:
        process.watchers.add(watch)
    try:
        async with asyncio.timeout(seconds):
            await failed.wait()
    except TimeoutError:
        pass
    finally:
        for process in processes:
            process.watchers.discard(watch)


async def proven(processes: Sequence[Process]) -> tuple[Process, str] | None:
    """Wait until these, which have started, have stayed up for `start_seconds`. The first that has not, and why."""
    running = [process for process in processes if process.status.state is State.RUNNING]
    seconds = [process.program.start_seconds for process in running if process.program.ready.kind != "seconds"]
    await until_failing(running, max(seconds, default=0.0))
    for process in running:
        status = process.status
        if status.state is not State.RUNNING:
            return process, f"it did not stay up: {status.why if status.exit is None else status.exit.reason}"
    return None

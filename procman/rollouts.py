"""All rollouts that are under way: who asks for one, in what order units follow each other, and what a supervisor
before had begun. What one of them does is in `rollout`.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace

from procman import canary
from procman.ages import Ages
from procman.canary import AS_TABLE, NO_CANARY, Wish
from procman.config import Program, place
from procman.errors import ProcmanError, WrongUse
from procman.ground import Ground
from procman.lifecycle import State
from procman.link import KeeperLink
from procman.operation import Outcome, Progress, carry_out, proven
from procman.process import Process
from procman.rollout import HELD, Listening, Memo, Passed, Rollout, World, overlaps, running
from procman.sockets import listener_of
from procman.supervisor import Supervisor
from procman.takeover import SLOTS
from procman.units import Unit, no_canary, units

log = logging.getLogger("procman")

FAILED_SECONDS, BUSY_SECONDS = 60.0, 3.0
"""When a process that is too old could not be replaced, the next try follows this much later; the second where it or
the table was just being changed."""


class Rollouts:
    """All that are under way, of all programs."""

    def __init__(self, supervisor: Supervisor, link: KeeperLink, ground: Ground) -> None:
        self.world = World(supervisor, link, ground)
        self._supervisor, self._link, self._ground = self.world
        self._running: dict[str, Rollout] = {}
        self._resumed: set[Rollout] = set()
        self.passed: Passed = lambda name, again: None
        """Is told of rollouts that a supervisor before had begun, as `replace` tells its caller."""
        self.listening: Listening = lambda but: frozenset()
        """Which listeners are needed when a rollout has passed."""
        self._turns: dict[str, asyncio.Event] = {}  # by program whose processes restart in turn: set when they have
        supervisor.reloading = self._turns.keys()
        self._ages = Ages(self._too_old)
        self._aging: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)  # by program
        supervisor.on_change = self.watch_age
        supervisor.on_closing, supervisor.under_way = self._give_way, self.under_way

    def under_way(self, name: str) -> bool:
        """Whether the process `name` is being replaced."""
        return name in self._running

    def watch_age(self, process: Process) -> None:
        """Something about `process` has changed: when is it too old?"""
        if self._supervisor.processes.get(process.name) is process:
            self._ages.watch(process)

    def _give_way(self) -> None:
        """All is to stop: no rollout goes on."""
        for rollout in self._running.values():
            rollout.give_up()

    def _too_old(self, process: Process) -> None:
        if self._supervisor.closing or self._supervisor.processes.get(process.name) is not process:
            return
        if self._supervisor.changing or self.under_way(process.name):  # it may be about to replace this very one
            self._ages.watch(process, again=BUSY_SECONDS)
        else:
            self._supervisor.background(self._rejuvenate(process))

    async def _rejuvenate(self, process: Process) -> None:
        """Replace a process that is too old, as a reload does, when no other one of its program is being replaced."""
        child, supervisor = process.child, self._supervisor
        async with self._aging[process.program.program]:  # several may be too old at one moment
            while others := self._others(process):
                await others()
            current = supervisor.processes.get(process.name) is process and process.child == child
            if current and supervisor.changing:
                self._ages.watch(process, again=BUSY_SECONDS)
            elif current and not supervisor.closing:
                await self._renew(process)

    async def _renew(self, process: Process) -> None:
        name, why = process.name, f"max_age = {process.program.max_age:g} s"
        if overlaps(process):
            # Without a canary: it is the same release. Those that share a socket can only pass on together.
            programs = [each.program for each in self._company(process)]
            outcomes, _ = await self.replace(programs, why, lambda info: None, wish=NO_CANARY)
        else:
            outcomes = await self.restart([process], why, lambda info: None)
        now = self._supervisor.processes.get(name)
        good, reason = outcomes.get(name, (True, ""))
        if not good and now is not None:
            log.error("%s: %s: %s", name, why, reason)
            self._ages.watch(now, again=FAILED_SECONDS)

    def _others(self, process: Process) -> Callable[[], Awaitable[object]] | None:
        """How to wait for what replaces processes of its program now, if anything does."""
        program = process.program.program
        if program in self._turns:
            return self._turns[program].wait
        there = self._supervisor.processes
        names = [each for each in self._running if each in there and there[each].program.program == program]
        found = (self._running[name] for name in names)
        return next((rollout.ended for rollout in found), None)

    def _company(self, process: Process) -> list[Process]:
        """`process`, and those of its program that run and have a socket of it."""
        mine = process.program
        found = [each for each in self._supervisor.processes.values() if each.program.program == mine.program]
        shares = [each for each in found if overlaps(each) and set(each.program.listen) & set(mine.listen)]
        own = {listener.name for listener in self._supervisor.config.listeners if listener.reuse_port}
        return shares if set(mine.listen) - own else [process]

    def leaving(self) -> set[str]:
        """The processes without a successor, which stop with the ones before."""
        return {name for rollout in self._running.values() for name in rollout.leaving}

    def busy(self) -> list[str]:
        """The processes that are being replaced, or restart in turn."""
        turns = [process for process in self._supervisor.all() if process.program.program in self._turns]
        return [*self._running, *(process.name for process in turns)]

    def to_stop(self) -> str:
        """Whose stop ends the first of them."""
        return next(iter((*self._running, *self._turns)), "")

    async def ended(self) -> None:
        """Wait until none is under way."""
        while self._running or self._turns:
            for rollout in list(self._running.values()):
                await rollout.ended()
            for turn in list(self._turns.values()):
                await turn.wait()

    async def abandon(self, names: Collection[str], *, stop: bool = False) -> None:
        """End those of these processes, which are to `stop`, or to have something else done to them; and wait."""
        rollouts = {id(r): r for r in (self._running.get(name) for name in names) if r is not None}
        await asyncio.gather(*(rollout.abandon(names if stop else None) for rollout in rollouts.values()))

    async def replace(
        self,
        programs: Sequence[Program],
        why: str,
        progress: Progress,
        *,
        at_once: int = 1,
        passed: Passed = lambda name, kept: None,
        wish: Wish = AS_TABLE,
        leaving: Container[str] = (),
    ) -> tuple[dict[str, Outcome], dict[str, list[str]]]:
        """Replace the processes of `programs`, which are what the successors are to be. Programs go side by side, the
        units of one program one after the other (`at_once` of them together; so many start at a time), and none
        follows on one that failed. Some may have nobody before them: what has fallen, and what is new in the table.
        `wish` says which canary there is. `passed` is told in the moment when a successor is the current process, and
        when it is that no more. Processes of these programs that are `leaving` stop when the others have passed on, if
        they share a socket with them.

        Returns what came of each, and the last output of successors that failed."""
        by_program: dict[str, list[Program]] = {}
        for program in programs:
            by_program.setdefault(program.program, []).append(program)
        busy = by_program.keys() & self._turns.keys()
        outcomes = {each.name: _under_way(program) for program in busy for each in by_program.pop(program)}
        found = await asyncio.gather(
            *(
                self._replace_program(group, why, progress, at_once=at_once, passed=passed, wish=wish, leaving=leaving)
                for group in by_program.values()
            )
        )
        outcomes |= {name: outcome for each, _ in found for name, outcome in each.items()}
        return outcomes, {name: lines for _, each in found for name, lines in each.items()}

    async def _replace_program(
        self, programs: Sequence[Program], why: str, progress: Progress, *, at_once: int, passed: Passed, wish: Wish,
        leaving: Container[str],
    ) -> tuple[dict[str, Outcome], dict[str, list[str]]]:
        by_name = {program.name: program for program in programs}
        proof, up = wish.of(programs[0]), running(self._supervisor.all())
        todo = units(self._supervisor.config, programs, up, leaving)
        if proof is not None and (problem := no_canary(self._supervisor.config, todo, up)):
            if wish.share is not None:  # an operator has said so, and it could be done a moment ago
                return dict.fromkeys(by_name, (False, f"no canary: {problem}")), {}
            why += f"; without its canary: {problem}"
            self._without_canary(by_name, problem, progress)
            proof = None
        outcomes: dict[str, Outcome] = {}
        outputs: dict[str, list[str]] = {}
        serving: dict[str, str] = {}
        coming = {name for name in by_name if name not in up}
        stopped: dict[str, str] = {}  # meanwhile: that is no reason to leave the others what they are

        async def work() -> None:
            while todo and all(good for good, _ in outcomes.values()):
                unit = todo.pop(0)
                fallen = next((name for name, child in serving.items() if not self._still(name, child)), "")
                if fallen:
                    told = (False, f"not tried: {fallen}, which was replaced before, does not run any more")
                    outcomes.update(dict.fromkeys(unit.names, told))
                    return
                outcome = await self._went_on(unit)
                if outcome is not None:
                    outcomes.update(dict.fromkeys(unit.names, outcome))
                    continue
                left = tuple(name for name in unit.names if self._may(name, name in coming))
                stopped.update((name, f"{name} does not run any more") for name in unit.names if name not in left)
                if not left:
                    continue
                unit = replace(unit, names=left)
                busy = [name for name in unit.names if name in self._running]
                if busy:
                    outcomes.update(dict.fromkeys(unit.names, _under_way(busy[0])))
                    return
                rollout = Rollout(
                    self.world, unit, by_name, why, progress=progress, passed=passed, wish=proof, at_once=at_once,
                    listening=self.listening,
                )  # fmt: skip
                self._running |= dict.fromkeys(unit.names, rollout)
                try:
                    outcome = await rollout.run()
                finally:
                    for name in unit.names:
                        del self._running[name]
                outcomes.update(dict.fromkeys(unit.names, outcome))
                outputs.update(rollout.output)
                if outcome[0]:
                    serving.update({name: self._supervisor.processes[name].child for name in unit.names})

        await asyncio.gather(*(work() for _ in range(max(1, at_once))))
        failed = next((name for name, (good, _) in outcomes.items() if not good), "")
        for unit in todo:
            outcomes.update(dict.fromkeys(unit.names, (False, f"not tried: {failed} failed")))
        return outcomes | {name: (False, why) for name, why in stopped.items()}, outputs

    async def restart(
        self, processes: Sequence[Process], why: str, progress: Progress, at_once: int = 1
    ) -> dict[str, Outcome]:
        """The reload of what can't overlap: programs side by side, `at_once` processes of one program at a time. None
        follows on one that does not start, or does not stay up for `start_seconds`. Whoever is stopped meanwhile stays
        so."""
        by_program: dict[str, list[Process]] = {}
        for process in processes:
            by_program.setdefault(process.program.program, []).append(process)

        busy = by_program.keys() & self._turns.keys()
        outcomes = {each.name: _under_way(program) for program in busy for each in by_program.pop(program)}
        self._turns |= {program: asyncio.Event() for program in by_program}  # at once: nobody comes in between

        async def work(program: str, waiting: list[Process]) -> dict[str, Outcome]:
            try:
                return await self._in_turn(waiting, why, progress, at_once)
            finally:
                self._turns.pop(program).set()
                self._supervisor.on_moved()

        found = await asyncio.gather(*(work(*each) for each in by_program.items()))
        return outcomes | {name: outcome for each in found for name, outcome in each.items()}

    async def _in_turn(
        self, waiting: list[Process], why: str, progress: Progress, at_once: int
    ) -> dict[str, Outcome]:
        supervisor = self._supervisor
        outcomes: dict[str, Outcome] = {}
        failed = ""
        while waiting and not failed:
            part, waiting = waiting[:at_once], waiting[at_once:]
            stopped = [process for process in part if supervisor.closing or not process.status.wanted]
            outcomes |= {each.name: (False, f"it does not run any more: {each.status.why}") for each in stopped}
            part = [process for process in part if process not in stopped]
            outcomes |= await carry_out("restart", part, why, progress, supervisor.aside)
            if bad := await proven([process for process in part if outcomes[process.name][0]]):
                status = bad[0].status
                said = bad[1] if status.wanted else f"it was stopped meanwhile: {status.why}"
                outcomes[bad[0].name] = False, said
            # One that an operator has stopped says nothing about the others.
            failed = next((each.name for each in part if each.status.wanted and not outcomes[each.name][0]), "")
        return outcomes | {process.name: (False, f"not tried: {failed} failed") for process in waiting}

    def _without_canary(self, programs: Mapping[str, Program], problem: str, progress: Progress) -> None:
        """Say so, by the names of the processes."""
        log.warning("%s: without its canary: %s", next(iter(programs.values())).program, problem)
        for name in programs:
            state = str(self._supervisor.processes[name].status.state)
            progress({"name": name, "state": state, "why": f"without its canary: {problem}"})

    def _still(self, name: str, child: str) -> bool:
        """Whether this child, to which the process has passed on, serves."""
        process = self._supervisor.processes.get(name)
        if process is None or not process.status.wanted:
            return True  # somebody has stopped it: that is no sign of a bad release
        return process.child == child and process.status.state is State.RUNNING

    def _may(self, name: str, coming: bool) -> bool:
        """Whether it still is to be replaced, or to come (`coming`): an operator may have stopped it, or it has ended,
        while others were."""
        process = self._supervisor.processes.get(name)
        if process is None or self._supervisor.closing or self._supervisor.is_down(name):
            return False
        return coming or (process.status.wanted and process.status.state is not State.EXITED)

    # --- canaries ---------------------------------------------------------------------------------------------------

    def check_canary(self, processes: Sequence[Process], wish: Wish) -> None:
        """Raises WrongUse unless each of `processes` can have the canary that an operator wishes for."""
        if wish in (AS_TABLE, NO_CANARY):
            return
        listeners = {listener.name: listener for listener in self._supervisor.config.listeners}
        by_program: dict[str, list[Program]] = {}
        for process in processes:
            program = process.program
            problem = canary.obstacle(program, [listeners[name] for name in program.listen])
            if not problem and wish.of(program) is None:
                problem = "a time is given, and no share: its table says nothing of a canary"
            if problem:
                raise WrongUse(f"{process.name}: {problem}", hint="reload it without a canary")
            if overlaps(process):
                by_program.setdefault(program.program, []).append(program)
        config, up = self._supervisor.config, running(self._supervisor.all())
        for name, serving in by_program.items():
            if problem := no_canary(config, units(config, serving, up), up):
                hint = "name all that have this listener, or reload without a canary"
                raise WrongUse(f"{name}: no canary: {problem}", hint=hint)

    def canaries(self, names: Iterable[str]) -> dict[str, Rollout]:
        """The rollouts with a canary under way, by process."""
        found = {name: self._running.get(name) for name in names}
        return {name: rollout for name, rollout in found.items() if rollout is not None and rollout.proving}

    # --- what a supervisor before had begun -------------------------------------------------------------------------

    async def _went_on(self, unit: Unit) -> Outcome | None:
        """What came of a rollout of these that a supervisor before had begun: whoever asks has asked for that one. None
        where there is none to the end."""
        rollout = self._running.get(unit.names[0])
        if rollout is None or rollout not in self._resumed:
            return None
        await rollout.ended()
        return rollout.outcome

    def prepare(self, memos: Mapping[str, Memo]) -> None:
        """Have the sockets as a supervisor before had left them: comes before the processes are taken up."""
        names = {program.name for program in self._supervisor.config.programs}
        for rollout, memo in memos.items():
            sockets = self._ground.sockets
            # One whose child has to be asked for again gets what it had; once it serves, that is the current one.
            on_trial = not memo.passed
            keys = [place(name, slot) for name, slot in memo.successors.items() if on_trial and name in names]
            known = self._supervisor.config.listeners
            before = [place(name, 1 - slot) for name, slot in memo.successors.items() if name in names]
            there = self._ground.trials.resume(keys, memo.firsts, memo.known_files(), known, before)
            if not names.isdisjoint(memo.successors):
                listen = [listener_of(first) for first in there]
                keys = [place(name, slot) for name in (*memo.successors, *memo.leaving) for slot in SLOTS]
                self._ground.trials.hold(rollout, keys, listen)
            for first in there:
                try:
                    (sockets.pass_on if memo.passed else sockets.take_back)(first)
                except ProcmanError as error:
                    log.error("%s", error)

    def resume(self, memos: Mapping[str, Memo]) -> None:
        """Go on with them, now that all processes have been taken up."""
        beside = self._supervisor.places.beside
        living = [memo for memo in memos.values() if not beside.keys().isdisjoint(memo.successors)]
        self._ground.sockets.close_seconds({first for memo in living for first in memo.firsts})
        for process in self._supervisor.all():
            self.watch_age(process)
        for name, memo in memos.items():
            names = tuple(each for each in memo.successors if each in self._supervisor.places.beside)
            unit = Unit(names, (), tuple(memo.leaving))
            if not unit.names:  # they have left the table
                self._link.release(HELD + name)
                self._ground.trials.over(place(each, slot) for each in memo.successors for slot in SLOTS)
                self._ground.close_unused(self._supervisor.config)
                continue
            rollout = Rollout(self.world, unit, {}, memo.why, passed=self.passed, listening=self.listening)
            rollout.name = name
            self._resumed.add(rollout)
            self._running |= dict.fromkeys(unit.names, rollout)
            log.info("%s: its rollout goes on after the supervisor was replaced (%s)", name, memo.phase)
            self._supervisor.background(self._go_on(rollout, unit, memo))

    async def _go_on(self, rollout: Rollout, unit: Unit, memo: Memo) -> None:
        try:
            await rollout.go_on(memo)
        finally:
            self._resumed.discard(rollout)
            for name in unit.names:
                del self._running[name]


def _under_way(name: str) -> Outcome:
    return False, f"a reload of {name} is under way already"

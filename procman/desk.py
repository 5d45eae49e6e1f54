"""What operators may look at and ask for: `methods.Operations` for a real daemon.

It finds the processes that are meant, keeps account of who asked for what, and leaves the doing to `Supervisor`,
`operation` and `Ground`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from procman import __version__, launch, operation, printed, report, rivals
from procman.canary import AS_TABLE, Wish
from procman.change import Change
from procman.config import Program
from procman.errors import Failed, NoSuchProgram, WrongUse
from procman.ground import Ground
from procman.lifecycle import State
from procman.link import KeeperLink
from procman.logread import Position
from procman.moments import rfc3339
from procman.operation import Outcome, carry_out
from procman.process import Process
from procman.reading import Read
from procman.reloading import Reload, Reloading
from procman.report import Info
from procman.resources import daemon_usage, descriptors_short, processes_of
from procman.rollouts import Rollouts
from procman.rpc import LogSource, Peer
from procman.scaling import Group, Scaling
from procman.supervisor import Supervisor
from procman.telemetry import Telemetry

log = logging.getLogger("procman")

RIVALS_SECONDS = 5.0

OUTPUT_LINES = 20
"""Lines of output that `why` shows."""


class Desk:
    """See `methods.Operations` for what each method is."""

    def __init__(
        self,
        supervisor: Supervisor,
        link: KeeperLink,
        ground: Ground,
        change: Change,
        rollouts: Rollouts,
        *,
        scaling: Scaling,
    ) -> None:
        self._rollouts = rollouts
        self._scaling = scaling
        self._rivals: list[str] = []
        self._rivals_at = 0.0
        self._change = change
        self._supervisor = supervisor
        self._link = link
        self._ground = ground
        self._telemetry = Telemetry()
        self._reloading = Reloading(rollouts, scaling)

    def select(self, names: Sequence[str]) -> list[Process]:
        """Processes by process, program or group name, or "all" (also: no name), without doubles, in the table's
        order."""
        everyone, called = self._supervisor.all, self._supervisor.places.called
        found: dict[str, list[Process]] = {}
        for name in dict.fromkeys(names or ["all"]):  # a request has room for 200,000 times the same one
            of_group = (process for process in everyone() if name in process.program.groups)
            found[name] = everyone() if name == "all" else called(name) or list(of_group)
            if not found[name] and name != "all":
                raise NoSuchProgram(f"no such program: {name[:200]!r}", hint="`procmanctl status` lists all")
        if len(found) == 1:
            return next(iter(found.values()))
        wanted = {process.name for processes in found.values() for process in processes}
        return [process for process in everyone() if process.name in wanted]

    def infos(self, names: Sequence[str]) -> list[Info]:
        """See `methods.Operations`, as for all below."""
        processes = self.select(names)
        numbers = self._scaling.numbers() if any(process.program.scale for process in processes) else {}
        return [self._info(process, numbers) for process in processes]

    def _info(self, process: Process, numbers: Mapping[str, int]) -> Info:
        beside = self._supervisor.places.beside.get(process.name)
        number = numbers.get(process.program.program)
        sample, behind = self._supervisor.measures.latest(process.name), self._change.versions.behind(process.name)
        output = self._ground.output(process.program)
        idle = number is not None and bool(self._scaling.says(process))
        return report.info(process, sample, beside, number, behind, idle=idle, output=output)

    async def infos_with_workers(self, names: Sequence[str], read: Read) -> list[Info]:
        processes = self.select(names)
        told = await self._workers(processes, read)
        # Some may have left the table meanwhile.
        return [info | {"workers": told[info["name"]]} for info in self.infos([]) if info["name"] in told]

    async def _workers(self, processes: Sequence[Process], read: Read) -> dict[str, Info | None]:
        listeners = {listener.name: listener for listener in self._supervisor.config.listeners}
        return await self._telemetry.of(processes, listeners, read)

    async def show(self, name: str, read: Read) -> Info:
        process = self._one(name)
        workers = (await self._workers([process], read))[process.name]
        shown = self._info(process, self._scaling.numbers())
        logged = self._ground.log_counters(process.program)
        samples = self._supervisor.measures.history(process.name)
        pid = process.status.pid
        tree = [] if pid is None else await read(functools.partial(processes_of, pid))
        return shown | {
            "definition": report.definition(process.program),
            "log": logged,
            "samples": samples,
            "processes": tree,
            "workers": workers,
        }

    async def why(self, name: str, read: Read) -> Info:
        process = self._one(name)
        history = [{"at": rfc3339(at), "state": str(state), "why": why} for at, state, why in process.history]
        status = process.status
        program, recent = process.program, self._ground.recent(process.program)
        setback = report.setback(status)
        # What runs goes on to print into the same log: what has failed has words of its own.
        failed = process.last_words if setback else []
        if failed:
            recent = ["\n".join(failed).encode()]
            program = replace(program, log=replace(program.log, path="", error_path=""))
        return {
            "name": process.name,
            "state": str(status.state),
            "wanted": "up" if status.wanted else "down",
            "why": status.why,
            "setback": setback,
            "behind": self._change.versions.behind(process.name),
            "exit": report.exit_info(status.exit),
            "history": history,
            "output_of": "setback" if failed else "log",
            "output": await read(lambda: printed.last_lines(program, OUTPUT_LINES, recent)),
            "traceback": await read(lambda: printed.last_traceback(program, recent)),
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
        at_once: int = 1,
        wish: Wish = AS_TABLE,
    ) -> list[Info]:
        processes = self.select(names)
        if self._supervisor.closing and verb != "stop":
            raise Failed("the daemon is stopping")
        if self._supervisor.changing and verb == "reload":
            raise Failed("a change of the table is under way", hint="reload when `procmanctl apply` has ended")
        self._rollouts.check_canary(processes, wish)
        why = f"{verb} by uid {peer.uid}"
        for process in processes:
            self._supervisor.note("operation", process.name, what=verb, uid=peer.uid, pid=peer.pid)
        log.info("%s: %s (pid %d)", ", ".join(process.name for process in processes), why, peer.pid)
        outputs: dict[str, list[str]] = {}
        unneeded: list[Process] = []
        if verb == "reload":
            spared = self._spared(names)
            reload = Reload(why, progress, outputs, at_once=at_once, wish=wish, spared=spared)
            task = self._supervisor.background(self._reloading.carry_out(reload, processes))
        else:
            needed = processes if verb == "stop" else self._needed(verb, processes)
            self._supervisor.remember({process.name for process in processes}, down=verb == "stop")
            task = self._supervisor.background(self._carry_out(verb, needed, why, progress))
            unneeded = [process for process in processes if process not in needed]
        outcomes: dict[str, Outcome] = {}
        if wait:
            try:
                async with asyncio.timeout(timeout):
                    outcomes = await asyncio.shield(task)
            except TimeoutError:
                late = f"not done within {timeout:g} s; it goes on"
                outcomes = {process.name: self._so_far(verb, process) or (False, late) for process in processes}
        outcomes |= {process.name: (True, self._scaling.says(process) or process.status.why) for process in unneeded}
        if verb == "reload" and wait:  # what is not in the table in force is replaced by nobody
            leaving = (False, "it is leaving the table")
            outcomes = {process.name: leaving for process in processes} | outcomes
        return await self._results(self.select(names), outcomes, outputs)

    def _spared(self, names: Sequence[str]) -> set[str]:
        """Those that are down, and are not meant by who wants `names` reloaded: they are named with others that are up,
        and not by themselves."""
        named = [self.select([name]) for name in dict.fromkeys(names or ["all"])]
        alone = {found[0].name for found in named if len(found) == 1}
        up = [found for found in named if any(process.status.wanted for process in found)]
        return {process.name for found in up for process in found if not process.status.wanted} - alone

    def _needed(self, verb: str, processes: Sequence[Process]) -> list[Process]:
        """Those of `processes` that a start or restart is for. Who names a whole program whose number goes by load
        does not mean those that are not wanted now; but one at least, if an operator had stopped them all."""
        asked = {process.name for process in processes}
        needed = dict.fromkeys(processes)
        for name in dict.fromkeys(process.program.program for process in processes):
            group = self._scaling.group(name)
            if group is None or not {process.name for process in group.processes} <= asked:
                continue
            down = all(self._supervisor.is_down(process.name) for process in group.processes)
            stopped = down or not self._scaling.begun(group)
            least = max(group.rule.min, 1) if verb == "start" or stopped else 0
            idle = [process for process in group.processes if not process.status.wanted]
            for process in idle[max(0, least - group.number) :]:
                del needed[process]
        return list(needed)

    async def _results(
        self, processes: Sequence[Process], outcomes: dict[str, Outcome], outputs: dict[str, list[str]]
    ) -> list[Info]:
        """What came of it, when it is on record."""
        await self._supervisor.journal.saved()
        unwritten = self._supervisor.journal.problem or self._supervisor.journal.stuck()
        forgotten = f" (not on record for a restart of the daemon: {unwritten})" if unwritten else ""
        result = []
        for process in processes:
            ok, text = outcomes.get(process.name, (True, process.status.why))
            failed = {"output": outputs[process.name]} if process.name in outputs else {}
            result.append(report.change(process) | {"ok": ok, "why": text + forgotten} | failed)
        return result

    async def scale(
        self,
        name: str,
        number: int,
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Info], None],
    ) -> list[Info]:
        await self._scaling.settled([name])
        group = self._scaled(name, number)
        why = f"scale by uid {peer.uid}"
        self._supervisor.note("operation", name, what=f"scale {number}", uid=peer.uid, pid=peer.pid)
        log.info("%s: %s to %d (pid %d)", name, why, number, peer.pid)
        moved = self._scaling.set_number(group, number, why)
        await self._scaling.settled([name])
        self._supervisor.remember({p.name for p in group.processes if p.status.wanted}, down=False)
        aims = [operation.Aim("start" if p.status.wanted else "stop", p, p.status.generation) for p in group.processes]
        aims = [aim for aim in aims if aim.process in moved or aim.verb == "start"]
        task = self._supervisor.background(self._reach(aims, progress))
        outcomes: dict[str, Outcome] = {}
        if wait:
            try:
                async with asyncio.timeout(timeout):
                    outcomes = await asyncio.shield(task)
            except TimeoutError:
                late = f"not done within {timeout:g} s; it goes on"
                outcomes = {aim.process.name: aim.outcome() or (False, late) for aim in aims}
        return await self._results(self.select([name]), outcomes, {})

    @staticmethod
    async def _reach(aims: Sequence[operation.Aim], progress: Callable[[Info], None]) -> dict[str, Outcome]:
        found = await asyncio.gather(*(operation.reach(aim, progress) for aim in aims))
        return {aim.process.name: outcome for aim, outcome in zip(aims, found, strict=True)}

    def _scaled(self, name: str, number: int) -> Group:
        """The program whose number is to be set. Raises what is against it."""
        self.select([name])
        group, supervisor = self._scaling.group(name), self._supervisor
        if group is None:
            hint = f"give it a table [program.NAME.scale], or name a program that has one, not {name[:80]!r}"
            raise WrongUse(f"{name[:80]!r} is no program whose number of processes can be set", hint=hint)
        rule = group.rule
        if not rule.min <= number <= rule.max:
            hint = f"[program.{name}.scale] says so; `procmanctl stop {name}` stops all"
            raise WrongUse(f"{name}: {number} is not between min = {rule.min} and max = {rule.max}", hint=hint)
        if supervisor.closing:
            raise Failed("the daemon is stopping")
        if supervisor.changing:
            raise Failed("a change of the table is under way", hint="try again when it has ended")
        if name in supervisor.reloading or any(supervisor.is_replaced(process.name) for process in group.processes):
            raise Failed(f"a reload of {name} is under way", hint="try again when it has ended")
        return group

    @staticmethod
    def _so_far(verb: str, process: Process) -> Outcome | None:
        return None if verb == "reload" else operation.Aim(verb, process, process.status.generation).outcome()

    async def _carry_out(
        self, verb: str, processes: Sequence[Process], why: str, progress: Callable[[Info], None]
    ) -> dict[str, Outcome]:
        """Start, stop or restart. A reload that is under way gives way to a stop or a restart."""
        names = [process.name for process in processes]
        if not names:
            return {}
        if verb != "start":
            self._reloading.end_commands(names)
        if verb == "stop":
            leaving = self._rollouts.leaving()  # they answer who waits, and stop with the ones before
            now = [process for process in processes if process.name not in leaving]
            stopped, _ = await asyncio.gather(
                carry_out(verb, now, why, progress, self._supervisor.aside),
                self._rollouts.abandon(names, stop=True),
            )
            # One whose successor had taken over meanwhile is another process now; one may have been started since.
            late = [now for now in self._there(names) if self._supervisor.is_down(now.name)]
            late = [now for now in late if now.status.state is not State.STOPPED]
            return stopped | await carry_out(verb, late, why, progress)
        if verb == "restart":
            await self._rollouts.abandon(names)
            found = self._there(names)
            processes = [process for process in found if not self._supervisor.is_down(process.name)]
            gone = {p.name: (False, f"it was stopped meanwhile: {p.status.why}") for p in found if p not in processes}
            return gone | await carry_out(verb, processes, why, progress, self._supervisor.aside)
        return await carry_out(verb, processes, why, progress, self._supervisor.aside)

    def _there(self, names: Iterable[str]) -> list[Process]:
        """The processes of these names that are still in the table."""
        there = self._supervisor.processes
        return [there[name] for name in names if name in there]

    async def decide(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Info], None],
    ) -> list[Info]:
        found = self._rollouts.canaries(process.name for process in self.select(names))
        if not found:
            named = ", ".join(dict.fromkeys(names))[:200]  # a request has room for 200,000 names
            raise Failed(f"no canary is under way for {named}", hint="`procmanctl status` shows one")
        why = f"{'promoted' if verb == 'promote' else verb} by uid {peer.uid}"
        for name in found:
            self._supervisor.note("operation", name, what=verb, uid=peer.uid, pid=peer.pid)
        log.info("%s: %s (pid %d)", ", ".join(found), why, peer.pid)
        for rollout in found.values():
            rollout.decide(promoted=verb == "promote", why=why, progress=progress)
        late = ""
        if wait:
            try:
                async with asyncio.timeout(timeout):
                    for rollout in found.values():
                        await rollout.ended()
            except TimeoutError:
                late = f"not done within {timeout:g} s; it goes on"
        result = []
        for name, rollout in found.items():
            process = self._supervisor.processes.get(name)
            if process is None:
                continue  # it has left the table meanwhile
            promoted, text = rollout.outcome or (verb == "promote", late or why)
            good = promoted == (verb == "promote") and not (late and rollout.outcome is None)
            result.append(report.change(process) | {"ok": good, "why": text})
        return result

    def signal(self, names: Sequence[str], signum: int, peer: Peer) -> list[Info]:
        result = []
        for process in self.select(names):
            running = process.status.pid is not None
            if running:
                self._link.signal(process.child, signum)
                what = report.signal_name(signum)
                self._supervisor.note("operation", process.name, what=what, uid=peer.uid, pid=peer.pid)
            why = process.status.why if running else f"it does not run: {process.status.why}"
            result.append(report.change(process) | {"ok": running, "why": why})
        return result

    def log_sources(self, names: Sequence[str], stderr: bool, *, strict: bool = True) -> list[LogSource]:
        if not strict and names:
            known = _names(process.program for process in self._supervisor.all())
            names = [name for name in names if name in known]
            if not names:
                return []
        sources = [s for process in self.select(names) for s in launch.log_sources(process.program)]
        return [source for source in sources if not stderr or source.stream == "err"]

    def unknown(self, names: Sequence[str]) -> list[str]:
        if not names:
            return []
        # While a change is under way, the table before counts: what is to be another program has no process then.
        there = (process.program for process in self._supervisor.all())
        known = _names((*self._supervisor.config.programs, *there))
        return [name for name in dict.fromkeys(names) if name not in known]

    def watch_table(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._supervisor.places.watchers.append(callback)
        return lambda: self._supervisor.places.watchers.remove(callback)

    def output_elsewhere(self, names: Sequence[str], stderr: bool) -> dict[str, str]:
        programs = [process.program for process in self.select(names)]
        found = {program.program: launch.elsewhere(program, stderr=stderr) for program in programs}
        return {name: text for name, text in found.items() if text}

    def watch_logs(self, keys: Sequence[str], callback: Callable[[], None]) -> Callable[[], None]:
        return self._ground.watch_logs(keys, callback)

    def log_begins(self, key: str) -> tuple[str, Position] | None:
        return self._ground.log_begins(key)

    def recent(self) -> list[Info]:
        return self._supervisor.events.recent()

    def subscribe(self, callback: Callable[[Info], None]) -> Callable[[], None]:
        return self._supervisor.events.subscribe(callback)

    async def daemon_status(self) -> Info:
        paths = await self._ground.path_problems()
        pids = [self._supervisor.snapshot.keeper_pid, os.getpid()]
        usage = daemon_usage(pids)
        states = [str(process.status.state) for process in self._supervisor.all()]
        return {
            "identifier": self._supervisor.config.daemon.identifier,
            "version": __version__,
            **self._supervisor.keeper.info(),
            "keeper_pid": pids[0],
            "supervisor_pid": pids[1],
            "supervisor_starts": self._supervisor.snapshot.starts,
            "supervisor_started_at": rfc3339(self._supervisor.since),
            "table": self._supervisor.config.path,
            "socket": self._supervisor.config.daemon.socket,
            "state_dir": self._supervisor.config.daemon.state_dir,
            "log_dir": self._supervisor.config.daemon.log_dir,
            "cgroup": self._supervisor.snapshot.cgroup or None,
            "processes": {state: states.count(state) for state in sorted(set(states))},
            "memory_bytes": usage.memory_bytes,
            "cpu_seconds": usage.cpu_seconds,
            "stopping": self._supervisor.closing,
            # Two outputs of one process may have the same one.
            "problems": list(dict.fromkeys((*_short(*pids), *self._problems(), *paths))),
        }

    def _problems(self) -> list[str]:
        """What an operator should know of."""
        more = self._scaling.problems() + self.rivals()
        return [*more, *self._supervisor.problems(), *filter(None, [self._change.problem]), *self._ground.problems()]

    def rivals(self) -> list[str]:
        """Which log files another daemon writes, too. Asked again after RIVALS_SECONDS: that reads all of /proc."""
        now = time.monotonic()
        if now < self._rivals_at:
            return self._rivals
        self._rivals_at = now + RIVALS_SECONDS
        sources = [s for process in self._supervisor.all() for s in launch.log_sources(process.program)]
        with contextlib.suppress(OSError):  # no descriptor is free: what was found before still counts
            found = rivals.writers({source.path for source in sources}, self._supervisor.snapshot.keeper_pid)
            self._rivals = [
                f"{path} is also the log of another procmand (its supervisor is pid {pid}): give one another log_dir"
                for path, pid in sorted(found.items())
            ]
        return self._rivals

    async def shutdown(self, peer: Peer) -> None:
        self._supervisor.shut_down(f"asked by uid {peer.uid}, pid {peer.pid}")
        await self._supervisor.journal.saved()

    async def reopen_logs(self, peer: Peer) -> None:
        self._supervisor.note("operation", "", what="reopen-logs", uid=peer.uid, pid=peer.pid)
        await self._ground.logs_reopened()

    async def upgrade(self, peer: Peer) -> None:
        self._supervisor.note("operation", "", what="upgrade", uid=peer.uid, pid=peer.pid)
        await self._supervisor.upgrade(f"upgrade by uid {peer.uid}")

    async def reread(
        self,
        peer: Peer,
        *,
        previous: bool,
        progress: Callable[[Info], None],
        wait: bool,
        timeout: float | None,
    ) -> Info:
        why = f"{'apply --previous' if previous else 'apply'} by uid {peer.uid}"
        change = self._change
        return await change.reread(why, previous=previous, progress=progress, wait=wait, timeout=timeout)

    async def plan(self, *, previous: bool) -> list[Info]:
        return [asdict(line) for line in await self._change.plan(previous=previous)]


def _names(programs: Iterable[Program]) -> set[str]:
    """All that operators may call these."""
    return {"all"}.union(*((program.name, program.program, *program.groups) for program in programs))


def _short(keeper: int, supervisor: int) -> list[str]:
    """Which of the two processes has no file descriptors left."""
    found = {"the keeper": descriptors_short(keeper), "the supervisor": descriptors_short(supervisor)}
    return [f"{who}: {text}" for who, text in found.items() if text]

"""Many programs that do nothing: boot, idle CPU, memory, status, restart, recovery and stop of their manager.

For each number and round every manager is started in its turn, with its programs and alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial

from tests.bench import limits
from tests.bench.contenders import START_SECONDS, Contender
from tests.bench.crash import recovery
from tests.bench.figures import OURS, Figure, Limit
from tests.bench.lineup import ALL, Notes, present
from tests.bench.machine import MB, Printer, Starts, TooSlow, cpu_seconds, memory, wake_ups
from tests.bench.plan import Fleet, Plan
from tests.bench.procmand import Unsampled
from tests.bench.restart import LIMIT as RESTART_LIMIT
from tests.bench.restart import TITLE as RESTART_TITLE
from tests.bench.restart import Killed
from tests.bench.rpc import ask

NAMES = ("boot", "idle", "memory", "status", "again", "print", "recover", "stop")

SETTLE_SECONDS, SETTLE_EACH = 1.2, 0.002
"""After the last program has started, and for each of them: managers call it running after one second, and look at it
once more then; and a start of many leaves work behind for some seconds."""

SAMPLING_SECONDS = 5
"""procman's default."""

ASK_SECONDS = 0.5
"""Of one client that asks for one program."""

PRINT_SECONDS = 30.0
"""Bound of one program that prints."""

LIMIT = "limit"

Samples = dict[tuple[str, str], list[float]]
"""By (what, whose), in the unit of the figure."""

Take = Callable[[str, float], None]


class Round:
    """What the rounds of one fleet have brought."""

    def __init__(self, plan: Plan, fleet: Fleet, names: Collection[str], say: Callable[[str], None]) -> None:
        self.fleet, self.names, self.say = fleet, names, say
        self.kinds: list[type[Contender]] = [*present(plan.peers), *([Unsampled] if "idle" in names else [])]
        self.samples: Samples = defaultdict(list)
        self.cut: dict[str, list[str]] = defaultdict(list)
        self.notes = Notes(say)
        self.programs = [f"p{number:04d}" for number in range(fleet.programs)]

    def run(self, number: int) -> None:
        """All contenders, one after the other, and the limits."""
        for kind in self.kinds:
            if kind.most < self.fleet.programs:
                self.notes.add(f"{kind.title} is left out: it holds at most {kind.most:,} programs")
                continue
            self.say(f"{self.fleet.programs} programs, round {number} of {self.fleet.rounds}: {kind.title}")
            with self.notes.leaving_out(kind.title), ExitStack() as stack:
                starts = stack.enter_context(Starts())
                programs = {name: starts.argv(name) for name in self.programs}
                printer = None
                if "print" in self.names and self.programs:
                    printer = stack.enter_context(Printer(int(self.fleet.print_mb * MB)))
                    programs["printer"] = printer.argv
                contender = stack.enter_context(kind(programs))
                self._measure(contender, starts, printer, partial(self._take, kind.title))
        self._measure_limits(partial(self._take, LIMIT))

    def _take(self, whose: str, what: str, value: float) -> None:
        self.samples[what, whose].append(value)

    def _measure(self, contender: Contender, starts: Starts, printer: Printer | None, take: Take) -> None:
        """The order matters: commands leave traces in idle CPU and memory."""
        count = len(contender.programs)
        begun = contender.start()
        running = starts.wait(self.fleet.programs, self.fleet.start_seconds)
        if running:
            take("boot", (running[-1].at - begun) * 1000)
        time.sleep(SETTLE_SECONDS + self.fleet.programs * SETTLE_EACH)
        contender.wait_running(count, self.fleet.start_seconds)
        pids = contender.own_pids()
        if "idle" in self.names and self.fleet.idle_seconds:
            self._idle(pids, take)
        if isinstance(contender, Unsampled):
            return
        take("pss", memory(pids, "Pss"))
        take("dirty", memory(pids, "Private_Dirty"))
        if "again" in self.names and running and self.fleet.kills:
            killed = Killed([[start.name for start in running]], starts, running)
            for took in killed.turn(min(self.fleet.kills, len(running))):
                take("again", took)
            contender.wait_running(count)
        if "status" in self.names:
            for _ in range(self.fleet.status_calls):
                take("status", contender.status()[0] * 1000)
            wire = contender.wire(self.programs[0]) if running else None
            if wire is not None:
                asked = ask(wire, 1, ASK_SECONDS)
                take("ask", asked.calls_a_second)
                take("ask-p99", asked.p99_ms)
        if printer is not None:
            take("print", printer.turn(PRINT_SECONDS))
        if "recover" in self.names and running and contender.deciding_pid != contender.main_pid:
            take("recover", recovery(contender, contender.deciding_pid, count))
        if "stop" in self.names and running:
            self._stop(contender, starts, take)

    def _idle(self, pids: Sequence[int], take: Take) -> None:
        """CPU time and wake-ups in a second in which nobody asks for anything."""
        start, used, woken = time.monotonic(), cpu_seconds(pids), wake_ups(pids)
        time.sleep(self.fleet.idle_seconds)
        used, woken = cpu_seconds(pids) - used, wake_ups(pids) - woken
        passed = time.monotonic() - start
        take("idle", used / passed * 1000)
        take("wake-ups", woken / passed)

    def _stop(self, contender: Contender, starts: Starts, take: Take) -> None:
        if self.fleet.stop_command:
            take("stop-command", contender.operate("stop") * 1000)
            contender.operate("start")
            starts.wait(self.fleet.programs, START_SECONDS)
            contender.wait_running(len(contender.programs))
        try:
            take("stop", contender.stop(self.fleet.end_seconds) * 1000)
        except TooSlow as error:
            self.say(str(error))
            take("stop", self.fleet.end_seconds * 1000)
            self.cut["stop"].append(contender.title)

    def _measure_limits(self, take: Take) -> None:
        if self.programs and {"boot", "stop"} & set(self.names):
            boot, stop = limits.boot_and_stop(self.programs)
            take("boot", boot * 1000)
            take("stop", stop * 1000)
        if "again" in self.names:
            for _ in range(self.fleet.kills):
                take("again", limits.restart())
        if "status" in self.names:
            for _ in range(self.fleet.status_calls):
                take("status", limits.command() * 1000)
        if "memory" in self.names:
            take("pss", limits.interpreter_memory("Pss"))
            take("dirty", limits.interpreter_memory("Private_Dirty"))

    # What is shown

    def figures(self) -> list[Figure]:
        """Those that `names` name and that have samples."""
        interpreter = "bare interpreter"
        found = [
            self._figure("boot", "boot", "start of the manager → all run", limit="bare interpreter that spawns"),
            self._figure("idle-sampling", "idle", "idle CPU in a second, procman sampling every 5 s"),
            self._figure("idle", "idle", "idle CPU in a second, sampling off", ours=Unsampled.title),
            self._figure("idle-wake-ups-sampling", "wake-ups", "idle wake-ups, procman sampling every 5 s", "a second"),
            self._figure("idle-wake-ups", "wake-ups", "idle wake-ups, sampling off", "a second", ours=Unsampled.title),
            self._figure("memory", "pss", "memory of the manager (PSS)", "MB", limit=interpreter),
            self._figure("memory-dirty", "dirty", "memory of the manager (private, dirty)", "MB", limit=interpreter),
            self._figure("status", "status", "whole status command", limit=interpreter),
            self._figure("status-call", "ask", "state of one of them over the socket", "calls/s", more=True),
            self._figure("status-call-p99", "ask-p99", "the same call, 99th percentile"),
            self._figure("print", "print", "log throughput of one beside them, 100-byte lines", "MB/s", more=True),
            self._figure("again", "again", RESTART_TITLE, limit=RESTART_LIMIT),
            self._figure("recover", "recover", "SIGKILL of the supervisor after all this → status is whole again"),
            self._figure("stop", "stop", "signal to the manager → all have gone", limit="bare SIGTERM to a group"),
            self._figure("stop-command", "stop-command", "whole command that stops all"),
        ]
        return [each for each in found if any(each.sides.values()) and _named(each.name, self.names)]

    def _figure(
        self,
        name: str,
        what: str,
        title: str,
        unit: str = "ms",
        *,
        ours: str = OURS,
        limit: str = "",
        more: bool = False,
    ) -> Figure:
        sides = {kind.title: tuple(self.samples.get((what, kind.title), ())) for kind in ALL}
        sides[OURS] = tuple(self.samples.get((what, ours), ()))
        least = tuple(self.samples.get((what, LIMIT), ()))
        notes = list(self.notes.texts) if name == "boot" else []
        if name == "idle-sampling" and self.fleet.idle_seconds < SAMPLING_SECONDS:
            notes.append(f"measured for {self.fleet.idle_seconds} s, so there is no sample in it: a full run has one")
        return Figure(
            name, title, unit, sides, Limit(limit, least) if limit and least else None, more_is_better=more,
            programs=self.fleet.programs, cut=tuple(self.cut.get(name, ())), notes=tuple(notes),
        )  # fmt: skip


def _named(figure: str, names: Collection[str]) -> bool:
    return figure.partition("-")[0] in names


def run(plan: Plan, names: Collection[str], say: Callable[[str], None]) -> list[Figure]:
    """Measures those of NAMES that are in `names`, for each fleet of the plan."""
    figures = []
    for fleet in plan.fleets:
        rounds = Round(plan, fleet, names, say)
        for number in range(1, fleet.rounds + 1):
            rounds.run(number)
        figures += rounds.figures()
    return figures

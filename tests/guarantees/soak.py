"""A soak: many programs end again and again, under everything that operators do, and what the daemon holds stays flat.

    python -m tests.guarantees soak [--programs 1000] [--restarts 100000] [--minutes 10]

It ends with whichever of restarts and minutes comes first, at once with exit status 1 when the daemon breaks, and
prints its figures. How "flat" is judged: `census`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from procman.client import Closed
from procman.errors import ProcmanError
from tests.guarantees.census import COUNTS_MIN, Census, Verdict, children, held, judge
from tests.harness import RunningDaemon, wait_until

KINDS = (
    ("fails", "/bin/sh -c 'exit 3'"),
    ("ends", "/bin/true"),
    ("is-killed", "/bin/sh -c 'kill -9 $$$$'"),
    ("prints", "/bin/sh -c 'for i in 1 2 3 4 5 6 7 8; do echo line $i of some forty characters; done; exit 1'"),
)
"""What most programs are: each ends at once, and is started again after the delay."""

SPECIAL = {
    100: ("stays", "/bin/sleep 1000"),
    50: ("leaves", "/bin/sh -c 'setsid sleep 100 & exit 1'"),
    20: ("lasts", "/bin/sleep 1.2"),
}
"""Every so many programs one is another kind: it stays, it leaves an orphan behind, or it lives so long that it is
started again at once."""

DELAY_SHARE = 0.7
"""Of the time in which the restarts have to be done, what the delays alone would take."""


SETTINGS = 'log_level = "error"'
"""A line for each change of state would fill the disk."""

MEMORY_SLACK = 4 * 1024 * 1024
"""Bytes. Over 100,000 restarts that is 40 a restart: less than the smallest thing that could be forgotten."""

PATIENCE = 120.0
"""Seconds for one operation: right after the start of a thousand programs it waits behind all of them."""

EVENTS_MAX, HISTORY_MAX = 1000, 20
"""What procman says that it keeps at most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a soak is. It ends with the first of `restarts` and `seconds`; `every` is the seconds between counts."""

    programs: int
    restarts: int
    seconds: float
    every: float
    kills: int
    seed: int = 1

    @property
    def delay(self) -> float:
        """`restart_delay` in seconds."""
        return max(0.1, DELAY_SHARE * self.seconds * self.programs / self.restarts)


@dataclass(slots=True)
class Figures:
    """What came of it."""

    censuses: list[Census] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)  # seconds that `daemon.status` took
    recoveries: list[float] = field(default_factory=list)  # the same, right after the supervisor was killed
    listings: list[float] = field(default_factory=list)  # seconds that `status` of all took
    calls: dict[str, int] = field(default_factory=dict)
    kills: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        return self.censuses[-1].restarts if self.censuses else 0


def kind_of(index: int) -> tuple[str, str]:
    """Name and command of program number `index`."""
    for every, kind in SPECIAL.items():
        if index % every == every - 1:
            return kind
    return KINDS[index % len(KINDS)]


def table(plan: Plan, more: int = 0) -> str:
    """The program table; `more` programs come and go with its changes."""
    delay = f"{plan.delay:.2f}s"
    lines = [
        "[defaults]",
        'restart = "always"\nstart_retries = -1\nstart_seconds = 0\nstop_timeout = "1s"',
        f'restart_delay = "{delay}"\nrestart_delay_max = "{delay}"',
        'log = { max_size = "16KB", keep = 2 }',
    ]
    for index in range(plan.programs):
        kind, command = kind_of(index)
        lines.append(f'[program.{kind}-{index}]\ncommand = "{command}"')
    lines += [f'[program.guest-{index}]\ncommand = "/bin/sleep 1000"' for index in range(more)]
    return "\n".join(lines)


class Soak:
    """One daemon under the plan. `run` returns the figures; what went wrong is in them."""

    def __init__(self, running: RunningDaemon, plan: Plan, say: Callable[[str], None]) -> None:
        self.running = running
        self.plan = plan
        self.say = say
        self.figures = Figures()
        self.random = random.Random(plan.seed)
        self.cgroup = ""
        self.guests = 0
        self.began = time.monotonic()

    def run(self) -> Figures:
        chores = self._chores()
        try:
            self.running.start(timeout=60)
            self.cgroup = str(self._call("daemon.status")["cgroup"] or "")
            next_count = self.began = time.monotonic()
            while not self._over():
                if time.monotonic() >= next_count:
                    next_count = time.monotonic() + self.plan.every
                    self._count()
                next(chores)()
                time.sleep(0.02)  # so that this process leaves the processors to the others
            self._end()
        except (ProcmanError, OSError, AssertionError, RuntimeError) as error:
            self.figures.wrong.append(f"{type(error).__name__}: {error}\n{self.running.said()}")
        return self.figures

    def _over(self) -> bool:
        """All is done, or broken. A short soak on a busy machine goes on until the last supervisor was counted so
        often that it can be judged."""
        if self.figures.wrong:
            return True
        seconds = time.monotonic() - self.began
        done = seconds > self.plan.seconds or self.figures.restarts >= self.plan.restarts
        last = self.figures.censuses[-1].supervisor.pid if self.figures.censuses else 0
        counts = sum(census.supervisor.pid == last for census in self.figures.censuses)
        enough = counts >= COUNTS_MIN and self.figures.kills == self.plan.kills
        return done and (enough or seconds > 3 * self.plan.seconds)

    # --- what operators do ------------------------------------------------------------------------------------------

    def _chores(self) -> Iterator[Callable[[], object]]:
        while True:
            for chore in (self._restart, self._logs, self._ask, self._events, self._signal, self._change_table):
                yield self._ask
                yield chore
                yield self._kill_if_due

    def _call(self, method: str, **params: object) -> Any:
        """One call. One that a supervisor's end cuts off is asked again."""
        self.figures.calls[method] = self.figures.calls.get(method, 0) + 1
        for _ in range(4):
            try:
                with self.running.client(timeout=PATIENCE + 30) as client:
                    return client.call(method, **params)
            except Closed:
                continue
        raise AssertionError(f"{method}: the daemon closed the connection four times")

    def _restart(self) -> None:
        name = f"stays-{self._pick(100)}"
        for answer in self._call("restart", names=[name], timeout=PATIENCE):
            if not answer["ok"]:
                self.figures.wrong.append(f"restart {name}: {answer['why']}")

    def _pick(self, every: int) -> int:
        """The number of one of those programs that there are every so many times."""
        return self.random.randrange(self.plan.programs // every) * every + every - 1

    def _logs(self) -> None:
        index = self.random.randrange(self.plan.programs)
        self._call("logs", names=[f"{kind_of(index)[0]}-{index}"], lines=5)

    def _ask(self) -> None:
        start = time.monotonic()
        self._call("daemon.status")
        self.figures.answers.append(time.monotonic() - start)

    def _events(self) -> None:
        self._call("events")

    def _signal(self) -> None:
        self._call("signal", signal="TERM", names=[f"stays-{self._pick(100)}"])

    def _change_table(self) -> None:
        """Guests come, or go."""
        self.guests = 0 if self.guests else max(2, self.plan.programs // 100)
        self.running.write_table(table(self.plan, self.guests), settings=SETTINGS)
        self._call("daemon.reread")

    def _kill_if_due(self) -> None:
        """SIGKILL the supervisor: `kills` times in the second tenth of the soak, so that the last one has a long
        life."""
        done = max(self.figures.restarts / self.plan.restarts, (time.monotonic() - self.began) / self.plan.seconds)
        if self.figures.kills < self.plan.kills and done >= 0.1 + 0.1 * self.figures.kills / self.plan.kills:
            self.figures.kills += 1
            os.kill(self.running.supervisor_pid, signal.SIGKILL)
            start = time.monotonic()
            self._call("daemon.status")
            self.figures.recoveries.append(time.monotonic() - start)

    # --- counting ---------------------------------------------------------------------------------------------------

    def _count(self) -> None:
        start = time.monotonic()
        infos = self._call("status")
        self.figures.listings.append(time.monotonic() - start)
        keeper, supervisor = self.running.keeper_pid, self._call("daemon.status")["supervisor_pid"]
        living, zombies = children(keeper)
        self.figures.censuses.append(
            Census(
                at=time.monotonic() - self.began,
                restarts=sum(info["restarts"] for info in infos),
                keeper=held(keeper),
                supervisor=held(supervisor),
                children=living,
                zombies=zombies,
                cgroups=self._cgroups(),
                state_bytes=(self.running.folder / "state" / "state.json").stat().st_size,
                log_files=len(os.listdir(self.running.log_dir)),
            )
        )
        last = self.figures.censuses[-1]
        if last.log_files > 3 * self.plan.programs:
            self.figures.wrong.append(f"{last.log_files} log files, with keep = 2")
        there = f"{living} children, {last.cgroups} cgroups"
        memory = f"{last.keeper.memory / 1e6:.1f} + {last.supervisor.memory / 1e6:.1f} MB"
        cpu = f"CPU {last.keeper.cpu_seconds:.0f} + {last.supervisor.cpu_seconds:.0f} s"
        self.say(f"{last.at:6.1f} s: {last.restarts} restarts, {memory}, {cpu}, {there}")

    def _cgroups(self) -> int:
        return sum(entry.is_dir() for entry in os.scandir(self.cgroup)) if self.cgroup else 0

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """After `stop all` nothing is left but what keeper and supervisor hold for the next start."""
        names = [info["name"] for info in self._call("status")]
        bad = [answer for answer in self._call("stop", names=names, timeout=PATIENCE) if not answer["ok"]]
        wrong = self.figures.wrong
        wrong += [f"stop {answer['name']}: {answer['why']}" for answer in bad[:5]]
        keeper = self.running.keeper_pid

        def only_the_supervisor() -> bool:
            living, zombies = children(keeper)
            assert (living, len(zombies)) == (1, 0), f"{living} children, {len(zombies)} zombies"
            return True

        wait_until(only_the_supervisor, 20, "the keeper has no child but the supervisor")
        wait_until(lambda: not self._cgroups(), 20, "no cgroup is left")
        kept: list[object] = []
        with self.running.client(30) as client:
            client.stream("events", lambda method, params: kept.append(params))
        if len(kept) > EVENTS_MAX:
            wrong.append(f"{len(kept)} events are kept")
        history = self._call("why", name=names[0])["history"]
        if len(history) > HISTORY_MAX:
            wrong.append(f"{len(history)} changes of one process are kept")


def judged(figures: Figures, plan: Plan) -> Verdict:
    """What is to be said of the figures. Slack: what the bounded histories still take while they fill up, and what is
    open for a moment only."""
    count_slack = 8 + plan.programs // 2  # a quarter prints: a log file and its folder are opened by the first line
    warm_up = 8 * plan.programs if plan.restarts >= 50 * plan.programs else 0  # a restart is three changes of twenty
    verdict = judge(figures.censuses, memory_slack=MEMORY_SLACK, count_slack=count_slack, warm_up=warm_up)
    verdict.wrong += figures.wrong
    return verdict


def too_few(figures: Figures, plan: Plan) -> list[str]:
    """Of the long form: what is wrong when it ended by its time."""
    if figures.restarts >= plan.restarts:
        return []
    return [f"{figures.restarts} restarts of {plan.restarts} in the time there was: give it more --minutes"]


def main(argv: Sequence[str]) -> int:
    """The long form. Returns 0, or 1 when something grew, was left behind, or failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees soak")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` must not leave the daemon behind
    seconds = options.minutes * 60
    plan = Plan(options.programs, options.restarts, seconds, every=max(1.0, seconds / 200), kills=10)
    running = RunningDaemon(table(plan), settings=SETTINGS)
    try:
        figures = Soak(running, plan, lambda line: print(line, flush=True)).run()
    finally:
        left = running.close()
    return report(figures, plan, left)


def report(figures: Figures, plan: Plan, left: Sequence[str]) -> int:
    """Prints the figures at the end; the exit status."""
    if not figures.censuses:
        print("\n".join(figures.wrong))
        return 1
    verdict = judged(figures, plan)
    first, last = figures.censuses[0], figures.censuses[-1]
    seconds = last.at - first.at
    rate = (last.restarts - first.restarts) / seconds if seconds else 0.0
    print(f"\n{plan.programs} programs, {last.restarts} restarts in {last.at:.0f} s ({rate:.0f}/s), seed {plan.seed}")
    print(f"{figures.kills} kills of the supervisor, {sum(figures.calls.values())} calls")
    asked = {
        "daemon.status": figures.answers,
        "status of all": figures.listings,
        "daemon.status after a kill": figures.recoveries,
    }
    for what, times in asked.items():
        ordered = sorted(times or [0.0])
        p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        print(f"{what}: median {statistics.median(ordered) * 1000:.0f} ms, 99 % within {p99 * 1000:.0f} ms")
    print("\n".join(verdict.lines))
    wrong = [*verdict.wrong, *left, *too_few(figures, plan)]
    print("\n".join(f"WRONG: {each}" for each in wrong) if wrong else "nothing grew, nothing was left behind")
    return 1 if wrong else 0

"""Many programs in crash loops at once: how soon the daemon answers, and what it costs, while the delays grow.

    python -m tests.guarantees loops [--programs 1000] [--seconds 60]

Exit status 1 when an answer takes too long, programs are started more often than their delays allow, or a start costs
too much.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.answers import CALLS, p99
from tests.guarantees.census import held
from tests.harness import RunningDaemon

ANSWER_MAX = 0.5
"""Seconds: the median, of some windows, of p99 of a call about one program."""

CPU_PER_START, CPU_PER_CALL, CPU_PER_SECOND = 0.004, 0.001, 0.1
"""Seconds of both processes together, twice what it takes. The last is for what they do now and then."""

SETTINGS = 'log_level = "error"'
"""A line for each change of state would fill the disk."""


@dataclass(frozen=True, slots=True)
class Loops:
    """So many programs that end at once, and the first and the longest delay before they are started again."""

    programs: int = 1000
    delay: float = 2.0
    longest: float = 8.0

    def table(self) -> str:
        return f"""
            [program.looping]
            command = "/bin/false"
            instances = {self.programs}
            start_seconds = 0
            restart_delay = "{self.delay:g}s"
            restart_delay_max = "{self.longest:g}s"
            """

    def restarts_at_most(self, seconds: float) -> int:
        """As many as the delays leave room for: the jitter makes each of them a tenth shorter at most."""
        count, at = 0, 0.9 * self.delay
        while at <= seconds:
            count += 1
            at += 0.9 * min(self.delay * 2**count, self.longest)
        return count


@dataclass(slots=True)
class Figures:
    """What came of it."""

    loops: Loops
    answers: list[float] = field(default_factory=list)  # p99 of each window
    starts: int = 0
    restarts: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    age: float = 0.0

    def line(self) -> str:
        return (
            f"{self.loops.programs} programs in crash loops, {self.seconds:.0f} s: p99 of status of one "
            f"{statistics.median(self.answers) * 1000:.0f} ms ({max(self.answers) * 1000:.0f} ms in the worst of "
            f"{len(self.answers)} windows); {self.starts / self.seconds:.0f} starts and "
            f"{self.cpu / self.seconds:.2f} s of CPU a second"
        )

    def wrong(self) -> list[str]:
        """What breaks a promise, in words."""
        found = []
        if statistics.median(self.answers) > ANSWER_MAX:
            found.append(f"p99 of the answers is more than {ANSWER_MAX * 1000:.0f} ms")
        # All together, and a tenth more: where a thousand start at once, a few wait longer than a second for a
        # processor. These count as steady, and are started again without a delay.
        allowed = self.loops.programs * self.loops.restarts_at_most(self.age) * 11 // 10
        if self.restarts > allowed:
            found.append(f"{self.restarts} times was one started again; the delays allow {allowed}")
        calls = CALLS * len(self.answers)
        allowed_cpu = CPU_PER_START * self.starts + CPU_PER_CALL * calls + CPU_PER_SECOND * self.seconds
        if self.cpu > allowed_cpu:
            found.append(f"{self.cpu:.1f} s of CPU, {allowed_cpu:.1f} s are allowed for {self.starts} starts")
        return found


def measure(running: RunningDaemon, loops: Loops, *, restarts: int, seconds: float) -> Figures:
    """Starts the daemon and looks at it for so long, or until each program was started again so often, whichever is
    later; for two minutes more at most."""
    figures = Figures(loops)
    born = time.monotonic()
    running.start(timeout=60)
    before, spent, began = sum(counted(running)), cpu_seconds(running), time.monotonic()
    while figures.seconds < seconds + 120:
        figures.answers.append(p99(running, names=[f"looping:{loops.programs // 2}"]))
        now = counted(running)
        figures.seconds = time.monotonic() - began
        if min(now) >= restarts and figures.seconds >= seconds:
            break
    else:
        raise AssertionError(f"one of them was started again only {min(now)} times")
    figures.starts, figures.restarts = sum(now) - before, sum(now)
    figures.cpu = cpu_seconds(running) - spent
    figures.age = time.monotonic() - born
    return figures


def counted(running: RunningDaemon) -> list[int]:
    """How often each was started again."""
    return [info["restarts"] for info in running.status().values()]


def cpu_seconds(running: RunningDaemon) -> float:
    """Of keeper and supervisor, without their children."""
    return sum(held(pid).cpu_seconds for pid in (running.keeper_pid, running.supervisor_pid))


def main(argv: Sequence[str]) -> int:
    """The long form: there the longest delay decides, and a daemon that does more than it must is found by its CPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees loops")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing is left behind
    loops = Loops(options.programs, delay=2.0, longest=20.0)
    running = RunningDaemon(loops.table(), settings=SETTINGS)
    try:
        figures = measure(running, loops, restarts=3, seconds=options.seconds)
    finally:
        left = running.close()
    wrong = [*figures.wrong(), *left]
    for line in (figures.line(), *(f"BROKEN {each}" for each in wrong)):
        sys.stdout.write(f"{line}\n")
    return 1 if wrong else 0

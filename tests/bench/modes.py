"""What the modes of the log cost beside the raw one, and whether a program that writes at full speed delays anybody.

One daemon for all: each program is `yes`, and stands (SIGSTOP) but for the one whose turn it is. So every round has all
modes within seconds of each other, and what counts is the ratio to the raw mode of the same round.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tests import syslogs
from tests.bench.figures import digits, percentile
from tests.bench.logs import WARM_SECONDS
from tests.bench.machine import MB, Starts, cpu_seconds, written_bytes
from tests.bench.plan import Plan
from tests.bench.restart import UP_SECONDS
from tests.harness import RunningDaemon

NAMES = ("modes",)

FILES = 'max_size = "50MB", keep = 1, compress = "none"'
LOGS = {
    "raw": FILES,
    "timestamps": f"timestamps = true, {FILES}",
    "json": f'format = "json", {FILES}',
    "inherit": 'mode = "inherit"',
    "inherit, json": 'mode = "inherit", format = "json"',
    "syslog": 'mode = "syslog"',
    "journal": 'mode = "journal"',
}
LOADS = ("nothing", "raw", "json")
"""What writes at full speed while restarts and requests are measured."""

RESTARTED = 10
"""Programs that are killed in turn."""

SECONDS = 60.0


@dataclass(slots=True)
class Cost:
    """One mode: MB/s and CPU seconds a GB, by round."""

    mode: str
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    dropped: int = 0


@dataclass(slots=True)
class Delay:
    """Milliseconds of each restart and each `status` request while one program writes at full speed."""

    load: str
    restarts: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Measured:
    """All of one run."""

    costs: list[Cost] = field(default_factory=list)
    delays: list[Delay] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """As JSON shows it."""
        return asdict(self)


def run(plan: Plan, say: Callable[[str], None]) -> Measured:
    """Measures `plan.mode_rounds` rounds of costs, then of delays."""
    command = shutil.which("yes")
    if command is None:
        say("modes: not measured, there is no `yes`")
        return Measured()
    argv = f'command = ["{command}", "{"x" * 99}"]'
    left_out = () if syslogs.possible() else ("syslog", "journal")
    logs = {name: log for name, log in LOGS.items() if name not in left_out}
    names = {name: f"w{number}" for number, name in enumerate(logs)}
    with ExitStack() as stack:
        starts = stack.enter_context(Starts())
        tables = [f"[program.{names[name]}]\n{argv}\nlog = {{ {log} }}" for name, log in logs.items()]
        for number in range(RESTARTED):
            words = ", ".join(f'"{word}"' for word in starts.argv(f"p{number}"))
            tables.append(f"[program.p{number}]\ncommand = [{words}]")
        daemon = stack.enter_context(_daemon("\n".join(tables), "syslog" in logs))
        pids = {name: int(daemon.wait_for(names[name], timeout=SECONDS)["pid"]) for name in logs}
        stack.callback(_go_on, list(pids.values()))
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        measured = Measured([Cost(name) for name in logs], [Delay(load) for load in LOADS])
        for number in range(1, plan.mode_rounds + 1):
            for cost in measured.costs:
                say(f"round {number} of {plan.mode_rounds}: {cost.mode}")
                _window(daemon, pids[cost.mode], plan.log_seconds, cost)
        for cost in measured.costs:
            with daemon.client() as client:
                cost.dropped = client.call("show", name=names[cost.mode])["log"][0]["dropped"]
        lives = {start.name: start for start in starts.wait(RESTARTED, SECONDS)}
        for number in range(1, plan.mode_rounds + 1):
            for delay in measured.delays:
                say(f"round {number} of {plan.mode_rounds}: restarts and requests while {delay.load} writes")
                with _writing(pids.get(delay.load)):
                    _delays(daemon, starts, lives, plan, delay)
    return measured


@contextmanager
def _daemon(table: str, with_syslog: bool) -> Iterator[RunningDaemon]:
    """A daemon whose stdout is a pipe that somebody empties, as in a container."""
    daemon = RunningDaemon(table)
    fifo = daemon.folder / "stdout"
    os.mkfifo(fifo)
    with ExitStack() as stack:
        stack.callback(daemon.close)
        reader = subprocess.Popen(["sh", "-c", f"exec cat <{fifo} >/dev/null"], start_new_session=True)
        stack.callback(reader.wait)
        stack.callback(reader.kill)
        redirect = ["sh", "-c", f'exec "$@" >{fifo}', "sh"]
        if with_syslog:
            for name in ("syslog", "journal"):
                stack.callback(syslogs.Reader(daemon.folder / f"{name}.sock").close)
            redirect = [*syslogs.prefix(daemon.folder), *redirect]
        daemon.start(prefix=redirect, timeout=SECONDS)
        yield daemon


def _go_on(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)  # it must be able to end by SIGTERM


@contextmanager
def _writing(pid: int | None) -> Iterator[None]:
    if pid is not None:
        os.kill(pid, signal.SIGCONT)
        time.sleep(WARM_SECONDS)
    try:
        yield
    finally:
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)


def _window(daemon: RunningDaemon, pid: int, seconds: float, cost: Cost) -> None:
    own = [daemon.keeper_pid, daemon.supervisor_pid]
    with _writing(pid):
        start, written, used = time.monotonic(), written_bytes(pid), cpu_seconds(own)
        time.sleep(seconds)
        took, size = time.monotonic() - start, written_bytes(pid) - written
        used = cpu_seconds(own) - used
    cost.rates.append(size / MB / took)
    cost.costs.append(used / (size / 1e9) if size else 0.0)


def _delays(daemon: RunningDaemon, starts: Starts, lives: dict[str, Any], plan: Plan, delay: Delay) -> None:
    for name in list(lives):
        time.sleep(max(0.0, lives[name].at + UP_SECONDS - time.monotonic()))
        at = time.monotonic()
        os.kill(lives[name].pid, signal.SIGKILL)
        [lives[name]] = starts.wait(1, SECONDS)
        delay.restarts.append((lives[name].at - at) * 1000)
    with daemon.client() as client:
        for _ in range(plan.requests):
            at = time.monotonic()
            client.call("status")
            delay.requests.append((time.monotonic() - at) * 1000)


def table(measured: Measured) -> Iterator[str]:
    """Two tables, as docs/performance.md takes them."""
    if not measured.costs:
        return
    raw = measured.costs[0]
    yield "| mode | MB/s | of raw | CPU seconds a GB | of raw | dropped |"
    yield "|---|---|---|---|---|---|"
    for cost in measured.costs:
        rates, costs = _ratio(cost.rates, raw.rates), _ratio(cost.costs, raw.costs)
        cells = (cost.mode, _cell(cost.rates), rates, _cell(cost.costs), costs, str(cost.dropped))
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| full speed | restart, median | × | restart, p99 | × | status, p99 | × |"
    yield "|---|---|---|---|---|---|---|"
    quiet = measured.delays[0]
    for delay in measured.delays:
        row = [delay.load]
        restarts, requests = (delay.restarts, quiet.restarts), (delay.requests, quiet.requests)
        for (samples, others), percent in ((restarts, 50), (restarts, 99), (requests, 99)):
            mine, theirs = percentile(samples, percent), percentile(others, percent)
            row += [f"{digits(mine)} ms", digits(mine / theirs)]
        yield f"| {' | '.join(row)} |"


def _cell(samples: Sequence[float]) -> str:
    return f"{digits(statistics.median(samples))} ({digits(min(samples))}–{digits(max(samples))})"


def _ratio(samples: Sequence[float], others: Sequence[float]) -> str:
    """The median of the ratios by round; a round in which nothing was written has none."""
    ratios = [one / other for one, other in zip(samples, others, strict=True) if other]
    return f"{digits(statistics.median(ratios))} ×" if ratios else "–"

"""The life of one process: the whole state machine, and nothing else. Pure: no I/O, no clock.

Theory first
------------
A *process* (`shop`, `blog:2`) is what the table wants to exist. Its *child* is one pid: it dies and is replaced.
What is **wanted** (up or down) and what **is** (the state) are two fields; there is no RESTARTING or RELOADING.
Restart is Stop and Start in one step, which no crash can part: the process is STOPPING and wanted up, so it is started
again when it has stopped.

    STOPPED    no child, and none is wanted
    STARTING   a child was asked for, and is not ready yet
    RUNNING    the child is ready (its `ready` probe said so, or it stayed up for `start_seconds`)
    STOPPING   the child, or what it left behind, is being ended; `ending` says on whose account
    BACKOFF    the last start failed; the next one comes at the deadline
    EXITED     the child ended, and by its `restart` policy it is not started again
    FATAL      it failed to start more often than `start_retries` allows

`step()` is the only place that makes a state. It takes what happened and the time, and returns the new `Status` and
what is to be done. The caller (`process.py`) does it and feeds back what comes of it.

Rules that always hold (the state machine test checks them after every event):
  1. At most one child: Spawn is only returned when `alive` is false, and makes it true with a new `generation`.
  2. Every state that waits (STARTING, STOPPING, BACKOFF) has a deadline; the others have none.
  3. STOPPED, BACKOFF, EXITED and FATAL have no child and nothing left of one.
  4. Wanted down ends in STOPPED, whatever happens on the way.
  5. Only the moves in LEGAL are made.

Time is CLOCK_MONOTONIC in seconds. Wall-clock times (`started_at`, `Exit.at`) are only carried, never compared.
"""

from __future__ import annotations

import signal as signals
from dataclasses import replace
from enum import StrEnum
from typing import Literal
from zlib import crc32

from procman.config import Program
from procman.records import dataclass

STEADY_SECONDS = 1.0
"""A child that ends sooner than this (or `start_seconds`, if longer) is not started again at once, but after a delay:
a program that dies at birth must not take a whole processor."""

KILL_AGAIN_SECONDS = 1.0
"""How long after a SIGKILL of the whole tree the next one follows, while something is still there."""

LATE_SECONDS, MOMENT_SECONDS = 0.1, 3.0
"""A Deadline that comes later than the first means that nobody was there for a while. What a starting child has become,
or has said, in that time is found out first: it gets the second."""


class State(StrEnum):
    """What a process is doing. The names are Supervisor's: users know them."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    BACKOFF = "BACKOFF"
    EXITED = "EXITED"
    FATAL = "FATAL"


LEGAL: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.RUNNING, State.STOPPING, State.BACKOFF, State.FATAL, State.EXITED}),
    State.RUNNING: frozenset({State.STOPPING, State.STARTING, State.BACKOFF, State.FATAL, State.EXITED}),
    State.STOPPING: frozenset({State.STOPPED, State.STARTING, State.BACKOFF, State.FATAL, State.EXITED}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPED}),
    State.EXITED: frozenset({State.STARTING, State.STOPPED}),
    State.FATAL: frozenset({State.STARTING, State.STOPPED}),
}
"""The moves that exist. The diagram in docs/architecture.md is drawn from this."""

WAITING = frozenset({State.STARTING, State.STOPPING, State.BACKOFF})
"""States that have a deadline."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended: `code` (0-255) or `signal`, one of them; neither where nobody knows, which is no success. `at`
    is seconds since the epoch, `reason` one phrase."""

    code: int | None
    signal: int | None
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """Where one process stands.

    `alive`       a child was asked for and its end has not been reported
    `generation`  number of the last child; with the process name it names the child for the keeper
    `started`     monotonic time at which that child was asked for
    `ending`      in STOPPING: "asked" (an operator, or the table), "failed" (a failed start, or one that was too
                  short), "exited" (ended by itself); of the latter two, what it left behind is being killed
    `failures`    failed or too short starts in a row
    `restarts`    how often procman started it again by itself
    `why`         one sentence: the reason for this state
    `setback`     what came of the last reload or apply, where that failed while this child went on; "" else. At
                  `setback_at`, seconds since the epoch, that was last set
    """

    state: State = State.STOPPED
    wanted: bool = False
    alive: bool = False
    generation: int = 0
    pid: int | None = None
    started: float = 0.0
    started_at: float = 0.0
    deadline: float | None = None
    ending: Literal["", "asked", "failed", "exited"] = ""
    failures: int = 0
    restarts: int = 0
    exit: Exit | None = None
    why: str = "not started yet"
    setback: str = ""
    setback_at: float = 0.0

    @property
    def ready(self) -> bool:
        """It serves: a RUNNING process is a ready one."""
        return self.state is State.RUNNING


@dataclass(frozen=True, slots=True)
class Start:
    """It is wanted up. `why`: on whose account."""

    why: str


@dataclass(frozen=True, slots=True)
class Stop:
    """It is wanted down. `why`: on whose account."""

    why: str


@dataclass(frozen=True, slots=True)
class Restart:
    """What runs is to be stopped, and then it is wanted up again. `why`: on whose account."""

    why: str


@dataclass(frozen=True, slots=True)
class Spawned:
    """The child that was asked for runs as `pid`, since the wall-clock time `at`."""

    pid: int
    at: float


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """There is no child: set-up or exec failed. `reason` names the step and the error.

    `shortage`: the machine had no process, memory or descriptor to spare. The program never ran, so this is no failed
    start of it: it is tried again until it works.
    """

    reason: str
    shortage: bool = False


@dataclass(frozen=True, slots=True)
class Exited:
    """The child ended; `left`: some of its descendants still live. `lived` is how many seconds it ran, None where
    nobody knows: the news may be old."""

    exit: Exit
    left: bool = False
    lived: float | None = None


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing is left of a child that ended before."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The child serves."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time of `Status.deadline` has come. `reason`: what the readiness probe said last."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """The child that was asked for can't start yet, on account of others: its time begins anew. `why`: what for."""

    why: str


Event = Start | Stop | Restart | Spawned | SpawnFailed | Exited | Gone | Ready | Deadline | Held


@dataclass(frozen=True, slots=True)
class Spawn:
    """Ask for child number `generation`."""

    generation: int


@dataclass(frozen=True, slots=True)
class Signal:
    """Send `signal` to the child, or (`tree`) to all that is left of it and its descendants."""

    signal: int
    tree: bool = False


Action = Spawn | Signal
Result = tuple[Status, list[Action]]


class IllegalEvent(Exception):
    """An event that can't happen in this state: a bug of the caller. Nothing was changed."""


def step(program: Program, status: Status, event: Event, now: float) -> Result:
    """What `event` at the time `now` (monotonic seconds) makes of `status`, and what is to be done about it.

    Raises IllegalEvent, and changes nothing, for the report of a child that was never asked for.
    """
    match event:
        case Start(why):
            return _start(program, status, why, now)
        case Stop(why):
            return _stop(program, status, why, now)
        case Restart(why):
            stopped, actions = _stop(program, status, why, now)
            started, more = _start(program, stopped, why, now)
            return started, actions + more
        case Ready():
            return _ready(status)
        case Deadline(reason):
            return _deadline(program, status, reason, now)
        case Held(why):
            if status.state is State.STARTING and status.pid is None:
                return replace(status, deadline=now + program.start_timeout, why=why), []
            return status, []
        case Gone():
            if status.state is State.STOPPING and not status.alive:
                return _settle(program, status, now)
            raise IllegalEvent(f"{program.name}: Gone in {status.state}")
    if not status.alive:
        raise IllegalEvent(f"{program.name}: {event} in {status.state}, but there is no child")
    match event:
        case Spawned(pid, at):
            return _spawned(program, status, pid, at, now)
        case SpawnFailed(reason, shortage):
            ended = replace(status, alive=False, pid=None, why=reason, ending=status.ending or "failed")
            if shortage and ended.wanted and ended.ending == "failed":
                return _postpone(program, ended, now)
            return _settle(program, ended, now)
        case Exited():
            return _exited(program, status, event, now)


def restore(program: Program, status: Status, now: float) -> Status:
    """`status` as a new supervisor takes it up: what the old one had, with deadlines that make sense for this table."""
    if status.state not in WAITING:
        return replace(status, deadline=None)
    longest = max(program.start_timeout, program.stop_timeout, program.restart_delay_max * 1.1)
    deadline = now + KILL_AGAIN_SECONDS if status.deadline is None else min(status.deadline, now + longest)
    return replace(status, deadline=deadline)


def later(known: Status, noted: Status | None) -> Status:
    """The later one of two accounts of one process: the state file's, and what the keeper was told before something was
    done. The file is written after that, but knows more of the same moment: the pid, deadlines."""
    if noted is None or noted.generation < known.generation:
        return known
    if noted.generation > known.generation:
        return noted
    same = (noted.state, noted.wanted, noted.ending, noted.failures)
    if same != (known.state, known.wanted, known.ending, known.failures):
        return noted
    if noted.setback_at <= known.setback_at:
        return known
    return replace(known, setback=noted.setback, setback_at=noted.setback_at)


def adopted(program: Program, status: Status, generation: int, started: float, now: float) -> Status:
    """`status` of a process whose child `generation`, of the time `started`, the keeper has, while nobody knows what it
    was: the state file is lost, or knows an older one. It has `start_timeout` from `now` on to show that it is ready:
    it may have been for long. What came of it is fed afterwards, as always."""
    deadline = now + program.start_timeout
    wanted = replace(status, state=State.STARTING, wanted=True, alive=True, generation=generation, pid=None)
    return replace(wanted, started=started, deadline=deadline, ending="", why="started by a supervisor that died")


def succeeded(program: Program, exit: Exit) -> bool:
    """Whether the table counts this exit as a success."""
    result = exit.code if exit.signal is None else -exit.signal
    return result in program.success_exit_codes


def _start(program: Program, status: Status, why: str, now: float) -> Result:
    match status.state:
        case State.STOPPING if status.ending == "asked":
            return replace(status, wanted=True, why=why), []
        case State.STARTING | State.RUNNING | State.STOPPING:
            return replace(status, wanted=True), []
        case _:
            return _spawn(program, replace(status, failures=0), why, now)


def _stop(program: Program, status: Status, why: str, now: float) -> Result:
    down = replace(status, wanted=False)
    match status.state:
        case State.STARTING | State.RUNNING:
            deadline = now + program.stop_timeout
            stopping = replace(down, state=State.STOPPING, ending="asked", deadline=deadline, why=why)
            return stopping, [Signal(program.stop_signal)]
        case State.STOPPING:
            return replace(down, why=why), []
        case State.STOPPED:
            return down, []
        case _:
            return replace(down, state=State.STOPPED, deadline=None, failures=0, why=why), []


def _spawn(program: Program, status: Status, why: str, now: float) -> Result:
    generation = status.generation + 1
    starting = replace(
        status,
        state=State.STARTING,
        wanted=True,
        alive=True,
        generation=generation,
        pid=None,
        started=now,
        started_at=0.0,
        deadline=now + program.start_timeout,
        ending="",
        why=why,
        setback="",
        setback_at=0.0,
    )
    return starting, [Spawn(generation)]


def _spawned(program: Program, status: Status, pid: int, at: float, now: float) -> Result:
    known = replace(status, pid=pid, started_at=at)
    if status.state is State.STARTING and program.ready.kind == "seconds":
        if program.start_seconds <= 0:
            return replace(known, state=State.RUNNING, deadline=None), []
        known = replace(known, deadline=now + program.start_seconds)
    return known, []


def _ready(status: Status) -> Result:
    if status.state is State.STARTING and status.pid is not None:
        return replace(status, state=State.RUNNING, deadline=None), []
    return status, []  # late, or said again after a reload of its own: nothing changes


def _deadline(program: Program, status: Status, reason: str, now: float) -> Result:
    if status.deadline is None or now < status.deadline:
        return status, []
    match status.state:
        case State.STARTING if program.ready.kind == "seconds" and status.pid is not None:
            return replace(status, state=State.RUNNING, deadline=None), []
        case State.STARTING if now > status.deadline + LATE_SECONDS:
            return replace(status, deadline=now + MOMENT_SECONDS), []
        case State.STARTING:
            why = f"not ready within {program.start_timeout:g} s" + (f": {reason}" if reason else "")
            deadline = now + program.stop_timeout
            stopping = replace(status, state=State.STOPPING, ending="failed", deadline=deadline, why=why)
            return stopping, [Signal(program.stop_signal)]
        case State.BACKOFF:
            return _spawn(program, replace(status, restarts=status.restarts + 1), f"started again: {status.why}", now)
        case _:
            return replace(status, deadline=now + KILL_AGAIN_SECONDS), [Signal(signals.SIGKILL, tree=True)]


def _exited(program: Program, status: Status, event: Exited, now: float) -> Result:
    ended = replace(status, alive=False, pid=None, exit=event.exit)
    if status.state is State.STOPPING:
        if not event.left:
            return _settle(program, ended, now)
        overdue = status.deadline is not None and now >= status.deadline
        return ended, [Signal(signals.SIGKILL if overdue else program.stop_signal, tree=True)]
    final = program.restart != "always" and succeeded(program, event.exit)
    failed_start = status.state is State.STARTING and not final
    why = event.exit.reason
    if failed_start and program.ready.kind == "seconds" and succeeded(program, event.exit):
        why += f" before start_seconds = {program.start_seconds:g} s"  # else nobody sees what was wrong with it
    lived = now - status.started if event.lived is None else event.lived
    # One that is to run for ever and soon ended is not started again at once.
    short = not final and program.restart != "never" and lived < max(program.start_seconds, STEADY_SECONDS)
    ended = replace(ended, ending="failed" if failed_start or short else "exited", why=why)
    if event.left:  # it ended by itself: what it left behind would meet its successor
        leaving = replace(ended, state=State.STOPPING, deadline=now + KILL_AGAIN_SECONDS)
        return leaving, [Signal(signals.SIGKILL, tree=True)]
    return _settle(program, ended, now)


def _settle(program: Program, status: Status, now: float) -> Result:
    """Nothing of the child is left: where to from here."""
    ending = status.ending
    over = replace(status, ending="", deadline=None)
    if not status.wanted:
        return replace(over, state=State.STOPPED, failures=0), []
    if ending == "asked":
        return _spawn(program, replace(over, failures=0), status.why, now)
    if ending == "exited":
        success = status.exit is not None and succeeded(program, status.exit)
        if program.restart == "never" or (program.restart == "on-failure" and success):
            return replace(over, state=State.EXITED, failures=0), []
        again = replace(over, failures=0, restarts=status.restarts + 1)
        return _spawn(program, again, f"started again: {status.why}", now)
    return _retry(program, over, now)


def _retry(program: Program, status: Status, now: float) -> Result:
    """A start failed, or was too short: wait, and try again, unless that was the last try."""
    failures = status.failures + 1
    failed = replace(status, failures=failures)
    if program.restart == "never":
        return replace(failed, state=State.FATAL), []
    if 0 <= program.start_retries < failures:
        return replace(failed, state=State.FATAL, why=f"{status.why}; gave up after {failures} failed starts"), []
    delay = backoff_seconds(program, failures)
    return replace(failed, state=State.BACKOFF, deadline=now + delay), []


def _postpone(program: Program, status: Status, now: float) -> Result:
    """A start that was not possible now. The delay grows, but it never was the last try."""
    failures = status.failures + 1
    if program.start_retries >= 0:
        failures = min(failures, max(1, program.start_retries))
    later = replace(status, state=State.BACKOFF, ending="", failures=failures)
    return replace(later, deadline=now + backoff_seconds(program, failures)), []


def backoff_seconds(program: Program, failures: int) -> float:
    """How long to wait before the next start after `failures` failures in a row (from 1).

    Doubles from `restart_delay` to `restart_delay_max`, with ±10 % jitter so that many programs that failed together do
    not come back together. The jitter depends on name and number only: the same call gives the same answer.
    """
    delay = program.restart_delay * 2.0 ** min(failures - 1, 60)
    return float(min(delay, program.restart_delay_max) * (0.9 + 0.2 * spread(f"{program.name}/{failures}")))


def spread(text: str) -> float:
    """From 0 to 1, always the same for the same text, and far apart for texts that are nearly the same.

    CRC-32 alone has neighbours for neighbours; the mixing is the finaliser of MurmurHash3 (A. Appleby, public domain).
    """
    number = crc32(text.encode())
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        number = ((number ^ number >> shift) * factor) % 2**32
    return number / 2**32

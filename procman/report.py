"""What the daemon tells about processes: ProcessInfo objects, exits in words. Data only; the client draws."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from procman import canary, shape
from procman.config import Program
from procman.errors import SHORTAGES
from procman.keeper.wire import Message
from procman.lifecycle import Exit, State, Status
from procman.moments import rfc3339
from procman.process import Process
from procman.resources import Sample

if TYPE_CHECKING:
    from procman.tracebacks import Traceback

Info = dict[str, Any]

STATUS_FIELDS = tuple(field.name for field in fields(Status))
EXIT_FIELDS = tuple(field.name for field in fields(Exit))


COUNT_MAX = 1 << 53
"""What a double, and so every reader of JSON, can still hold."""

TIME_MAX = 253402300800
"""Seconds since the epoch: the year 10000, which RFC 3339 can't write."""

PID_MAX = 1 << 22
"""The highest one that Linux gives (proc(5))."""

SIGNAL_MAX = 64
"""The highest number of a signal (signal(7))."""

REASON_MAX = 300
"""Characters of a reason in a note."""

UNKNOWN_END = "ended; how is not known: it was adopted from a procmand that was killed"
"""The reason of an exit whose status nobody could tell any more."""


def signal_name(number: int) -> str:
    """ "SIGTERM" for 15; "signal 77" for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_of(message: Message) -> Exit:
    """The end of a child as the keeper's "exited" message tells it."""
    at = float(message.get("ended_at") or time.time())
    if message["status"] is None:
        return Exit(None, None, at, UNKNOWN_END)
    result = os.waitstatus_to_exitcode(int(message["status"]))
    if result < 0:
        return Exit(None, -result, at, f"killed by {signal_name(-result)}")
    return Exit(result, None, at, f"exit status {result}")


def failure_of(message: Message) -> str:
    """Why there is no child, from the keeper's "failed" message: the step of its set-up, and what went wrong."""
    return f"can't start: {message['step']}: {message['message']}"


def is_short(message: Message) -> bool:
    """Whether the "failed" message tells of a shortage (`lifecycle.SpawnFailed`): no process could be made; its user
    has too many, or it does not fit into memory (execve(2)); the keeper had no room for what it was to hold (EBADF)."""
    number, step = message["errno"], message["step"]
    if step == "descriptors":
        return bool(number == errno.EBADF)
    return number in SHORTAGES and (step == "fork" or (step == "exec" and number in (errno.EAGAIN, errno.ENOMEM)))


def exit_info(exit: Exit | None) -> Info | None:
    """`exit` of a ProcessInfo."""
    if exit is None:
        return None
    ended: Info = {"code": exit.code} if exit.signal is None else {"signal": signal_name(exit.signal)}
    return ended | {"at": rfc3339(exit.at), "reason": exit.reason}


def info(
    process: Process,
    sample: Sample | None,
    other: Process | None = None,
    number: int | None = None,
    behind: Sequence[str] = (),
    *,
    idle: bool = False,
    output: Info | None = None,
) -> Info:
    """The ProcessInfo of `process` (architecture, "Procmanctl"). `sample` is None while nothing was measured, `other`
    is the one beside it while it is being replaced. `number` of its program are wanted, where that goes by load;
    `idle`: this one is not, and well so. `behind` are the keys in which it is not what the table says. `output` is what
    became of its output, None while
    nobody takes it."""
    program, status = process.program, process.status
    running = status.pid is not None
    return {
        "name": program.name,
        "program": program.program,
        "instance": program.instance,
        "groups": list(program.groups),
        "state": str(status.state),
        "wanted": "up" if status.wanted else "down",
        "ready": status.ready,
        "health": None,
        "pid": status.pid,
        "started_at": rfc3339(status.started_at) if running else None,
        "uptime_seconds": round(time.monotonic() - status.started, 3) if running else None,
        "restarts": status.restarts,
        "cpu_percent": sample and sample.cpu_percent,
        "memory_bytes": sample and sample.memory_bytes,
        "exit": exit_info(status.exit),
        "why": status.why + next_start(status),
        "setback": setback(status),
        "beside": None if other is None else beside(other),
        "scale": None if number is None else scale(program, number, idle=idle),
        "behind": list(behind),
        "output": output,
    }


def setback(status: Status) -> Info | None:
    """What came of the last reload or apply of a process that goes on as before, where that failed."""
    return {"at": rfc3339(status.setback_at), "why": status.setback} if status.setback and status.wanted else None


def scale(program: Program, number: int, *, idle: bool) -> Info | None:
    """How many processes of its program are wanted, of how many that there can be; `idle`: without this one."""
    rule = program.scale
    return None if rule is None else {"number": number, "min": rule.min, "max": rule.max, "idle": idle}


def beside(process: Process) -> Info:
    """The other one of a process that is being replaced: its successor, which may be a canary, or the one before."""
    status = process.status
    shown: Info = {"role": process.role, "state": str(status.state), "ready": status.ready}
    shown |= {"pid": status.pid, "why": status.why}
    if process.canary is None:
        return shown | {"canary": None}
    stands = process.canary()
    return shown | {"role": "canary", "why": f"{status.why}; {canary.words(stands)}", "canary": stands}


def next_start(status: Status) -> str:
    """For BACKOFF: when it is tried again."""
    if status.state is not State.BACKOFF or status.deadline is None:
        return ""
    return f"; next start in {max(0.0, status.deadline - time.monotonic()):.1f} s"


def change(process: Process) -> Info:
    """What a waiting client is told on the way."""
    return {"name": process.name, "state": str(process.status.state), "why": process.status.why}


def definition(program: Program) -> Info:
    """The program as the table says it, every default filled in; environment values may be secret and stay out."""
    shown: Info = asdict(program)
    del shown["slot"]  # nothing that the table says
    shown["environment"] = sorted(key for key, _ in program.environment)
    shown["success_exit_codes"] = sorted(program.success_exit_codes)
    shown["stop_signal"] = signal_name(program.stop_signal)
    return shown


def traceback(found: Traceback) -> Info:
    """A traceback that a program has printed."""
    return {"exception": found.exception, "message": found.message, "text": found.text}


def status_document(status: Status) -> Info:
    """A status for the state file."""
    shown = {name: getattr(status, name) for name in STATUS_FIELDS}  # dataclasses.asdict takes ten times as long
    if status.exit is not None:
        shown["exit"] = {name: getattr(status.exit, name) for name in EXIT_FIELDS}
    return shown


def status_from(document: Any) -> Status:
    """The reverse of `status_document`. Raises ValueError for what is none."""
    status: Status = shape.fit(document, Status)
    _check_numbers(status)
    if status.state is not State.STOPPING and status.alive != (status.state in (State.STARTING, State.RUNNING)):
        raise ValueError(f"{status.state} can't be with alive = {status.alive}")
    return status


def note_of(status: Status) -> str:
    """A status as the keeper remembers it with the child. Reasons may be long, and are cut: it has no room for them."""
    exit = status.exit and replace(status.exit, reason=status.exit.reason[:REASON_MAX])
    short = replace(status, why=status.why[:REASON_MAX], setback=status.setback[:REASON_MAX], exit=exit)
    return json.dumps(status_document(short), separators=(",", ":"), ensure_ascii=False)


def noted(record: Message) -> Status | None:
    """The reverse of `note_of`, from the keeper's record of a child; None where there is none."""
    try:
        return status_from(json.loads(str(record.get("note") or "")))
    except (ValueError, RecursionError):
        return None


def _check_numbers(status: Status) -> None:
    """Raises ValueError unless every number of `status` can be what it stands for."""
    exit = status.exit
    counts = {"generation": status.generation, "failures": status.failures, "restarts": status.restarts}
    # The first two count from boot, and a machine that has slept makes them begin before that.
    times = {"started": abs(status.started), "deadline": abs(status.deadline or 0.0), "started_at": status.started_at}
    times["setback_at"] = status.setback_at
    if exit is not None:
        times["exit.at"] = exit.at
        if not 0 <= (exit.code or 0) <= 255 or not 0 <= (exit.signal or 0) <= SIGNAL_MAX:
            raise ValueError(f"exit: nothing ends with status {exit.code}, signal {exit.signal}")
    for name, count in counts.items():
        if not 0 <= count < COUNT_MAX:
            raise ValueError(f"{name}: can't be {count}")
    for name, at in times.items():
        if not 0 <= at < TIME_MAX:
            raise ValueError(f"{name}: is no time: {at}")
    if status.pid is not None and not 0 < status.pid <= PID_MAX:
        raise ValueError(f"pid: can't be {status.pid}")

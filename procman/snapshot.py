"""What the keeper tells a new supervisor first: the account of everything that it holds.

It is read before the event loop is there, even before it is imported: see `interim`. Knows the wire, nothing of what
the children and descriptors are for.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

from procman import shape
from procman.crossing import crossing
from procman.keeper.wire import Message, Wire, WireError
from procman.records import dataclass


@dataclass(frozen=True, slots=True)
class Keeper:
    """What is known of the keeper's code: its version, how often it was upgraded, whether that happens now, and why the
    last try has failed ("": it has not)."""

    version: str = ""
    upgrades: int = 0
    upgrading: bool = False
    problem: str = ""

    @staticmethod
    def of(message: Message) -> Keeper:
        """As a "hello" or a "keeper" message tells it."""
        upgrading = bool(message.get("upgrading", False))
        problem = str(message.get("problem", ""))
        return Keeper(str(message.get("version", "")), int(message.get("upgrades", 0)), upgrading, problem)

    def info(self) -> dict[str, object]:
        """The fields of `daemon status`."""
        shown = {"keeper_version": self.version, "upgrades": self.upgrades}
        return shown | {"upgrading": self.upgrading, "upgrade_problem": self.problem}


@dataclass(slots=True)
class Snapshot:
    """What the keeper holds when a supervisor comes up. `held` descriptors belong to the receiver.

    `identity` names this life of the daemon, which all its supervisors share.

    `starts` counts supervisors, this one included: 1 means that the daemon itself has just been started. Children may
    be there even so: `adopted` names the processes whose child an earlier keeper had started, each with what was lost,
    and `changed` those of them that the table now describes otherwise. `events` are messages that came right behind the
    snapshot.
    """

    starts: int = 1
    last: str = ""
    cgroup: str = ""
    keeper_pid: int = 0
    identity: str = ""
    keeper: Keeper = field(default_factory=Keeper)
    children: dict[str, Message] = field(default_factory=dict)
    adopted: dict[str, list[str]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    held: dict[str, int] = field(default_factory=dict)
    events: list[Message] = field(default_factory=list)


HELLO: dict[str, Any] = {
    **dict.fromkeys(("op", "identity", "last", "cgroup", "version", "problem"), str),
    **dict.fromkeys(("pid", "starts", "upgrades"), int),
    "upgrading": bool,
}
CHILD: dict[str, Any] = {
    **dict.fromkeys(("op", "child", "note", "step", "message"), str),
    **dict.fromkeys(("pid", "start", "tag", "errno"), int),
    **dict.fromkeys(("at", "since", "ended_at", "lived"), float),
    "state": Literal["starting", "running", "exited"],
    **dict.fromkeys(("left", "adopted"), bool),
    "status": int | None,
    "rusage": Any,
}
"""The fields that are read of the two messages of a snapshot, and of those about children that come later."""

NEEDED = {
    "child": ("child", "state", "pid", "at", "note", "left"),
    "spawned": ("child", "pid", "at"),
    "exited": ("child", "pid", "status", "left"),
    "failed": ("child", "step", "errno", "message"),
    "gone": ("child",),
}
"""What each message about a child can't do without."""

TIMES = ("at", "ended_at")
TIME_MAX = 253402300800
"""Seconds since the epoch: the year 10000."""


STATUS_MAX = 0xFFFF
"""Of a wait status (wait(2))."""


def about_child(message: Message) -> Message:
    """What the keeper tells about a child (NEEDED), if it makes sense; what nobody reads is left out. Raises
    WireError."""
    told = _checked(message, CHILD, NEEDED[message["op"]])
    name = told["child"]
    if told.get("state") == "exited" and not {"status", "step"} & told.keys():
        raise WireError(f"the keeper does not tell how {name} has ended")
    if "step" in told and not {"errno", "message"} <= told.keys():
        raise WireError(f"the keeper does not tell why {name} did not start")
    if told.get("pid", 0) < 0 or any(not 0 <= told.get(key, 0) < TIME_MAX for key in TIMES):
        raise WireError(f"the keeper tells of {name} what can't be")
    status = told.get("status") or 0
    if not 0 <= status <= STATUS_MAX or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        raise WireError(f"the keeper tells of {name} how nothing can end: wait status {status}")
    return told


def _checked(message: Message, parts: dict[str, Any], needed: Sequence[str]) -> Message:
    told, wrong = shape.sane(message, parts)
    missing = [key for key in needed if key not in told]
    if wrong or missing:
        raise WireError(f"the keeper's message {message['op']!r} makes no sense: {', '.join(wrong or missing)}")
    return told


def receive(wire: Wire) -> Snapshot:
    """Waits for the snapshot; it comes first on `wire`, once. Raises WireError, also for one that makes no sense."""
    snapshot = Snapshot()
    readable = select.poll()
    readable.register(wire.fileno(), select.POLLIN)
    complete = False
    while not complete:
        readable.poll()
        received = wire.receive()
        try:
            for message, descriptors in received:
                crossing(f"receive {message.get('op')}")
                if complete:
                    snapshot.events.append(message)
                else:
                    complete = _collect(snapshot, message, descriptors)
        finally:
            for _, descriptors in received:  # all that were not taken
                for fd in descriptors:
                    os.close(fd)
    return snapshot


def _collect(snapshot: Snapshot, message: Message, descriptors: list[int]) -> bool:
    match message:
        case {"op": "hello"}:
            hello = _checked(message, HELLO, ("starts", "last", "cgroup", "pid"))
            snapshot.identity = hello.get("identity", "")
            snapshot.starts, snapshot.last = hello["starts"], hello["last"]
            snapshot.cgroup, snapshot.keeper_pid = hello["cgroup"], hello["pid"]
            snapshot.keeper = Keeper.of(hello)
        case {"op": "child", "child": str(name)}:
            snapshot.children[name] = about_child(message)
        case {"op": "held", "name": str(name)}:
            if name in snapshot.held:
                raise WireError(f"the keeper tells twice what it holds as {name}")
            if not descriptors:
                raise WireError(f"no file descriptor is free for {name}: open_files is too small")
            snapshot.held[name] = descriptors.pop()
        case {"op": "begin"}:
            return True
    return False

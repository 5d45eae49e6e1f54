"""What the keeper tells a new supervisor first: the account of everything that it holds.

It is read before the event loop is there, even before it is imported: see `interim`. Knows the wire, nothing of what
the children and descriptors are for.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass, field

from procman.crossing import crossing
from procman.keeper.wire import Message, Wire, WireError


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


def receive(wire: Wire) -> Snapshot:
    """Waits for the snapshot; it comes first on `wire`, once. Raises WireError."""
    snapshot = Snapshot()
    readable = select.poll()
    readable.register(wire.fileno(), select.POLLIN)
    complete = False
    while not complete:
        readable.poll()
        for message, descriptors in wire.receive():
            crossing(f"receive {message.get('op')}")
            if complete:
                snapshot.events.append(message)
            else:
                complete = _collect(snapshot, message, descriptors)
            for fd in descriptors:  # all that were not taken
                os.close(fd)
    return snapshot


def _collect(snapshot: Snapshot, message: Message, descriptors: list[int]) -> bool:
    match message:
        case {"op": "hello"}:
            snapshot.starts = int(message["starts"])
            snapshot.last = str(message["last"])
            snapshot.cgroup = str(message["cgroup"])
            snapshot.keeper_pid = int(message["pid"])
            snapshot.identity = str(message.get("identity", ""))
            snapshot.keeper = Keeper.of(message)
        case {"op": "child", "child": str(name)}:
            snapshot.children[name] = message
        case {"op": "held", "name": str(name)}:
            if not descriptors:
                raise WireError(f"no file descriptor is free for {name}: open_files is too small")
            snapshot.held[name] = descriptors.pop()
        case {"op": "begin"}:
            return True
    return False

"""What belongs to a child: its descendants, wherever they went, and how to end them all.

A descendant that forks twice and calls setsid leaves its family tree, but not the keeper: as a subreaper
(PR_SET_CHILD_SUBREAPER, prctl(2)) the keeper becomes its parent when the one in between ends. So everything that
outlives a child hangs below a direct child of the keeper, and the end of the last one is always a SIGCHLD here.

Whose it is tells, in this order: the cgroup v2 of the child (where one can be made), the family tree below the child,
its
session, and a *tag*: the soft limit RLIMIT_RSS, which Linux ignores since 2.4.30 (setrlimit(2)), so that a number in it
harms nobody. fork and exec hand it on; no daemon clears it, as some do with their environment. The tag names the
*house* too (the state folder that the daemon works for), and everybody may read it: so a keeper finds what one that was
killed has left. Of such a family nobody is below us, and the tag is looked for in the whole process table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MARKER = "PROCMAN_CHILD"
"""Environment variable that names the child ("shop:1#7") in what descends from it. For people, and for a daemon whose
state file is lost: the keeper uses the tag."""

MARKER_PID = "PROCMAN_CHILD_PID"
"""Environment variable with the pid of that child: whoever has this pid itself is the child, not a descendant."""

TAG_BASE = 1 << 62
"""Bytes. A soft RLIMIT_RSS of this plus a tag says whose descendant a process is."""

NUMBER_BITS, TAG_BITS = 32, 62
"""A tag is the number of a house (30 bits), and then the number of a child in so many bits; and the bits of it all."""

ROOT_NAME = "procman-"
"""How the name of a cgroup folder of ours starts; the pid of its keeper follows."""


CHILDREN_KNOWN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
"""The kernel has CONFIG_PROC_CHILDREN: what is below a process is found without reading the whole process table."""


class Process(NamedTuple):
    """One line of the process table (proc(5)). `start` is in clock ticks since boot: with the pid it is unique."""

    pid: int
    parent: int
    session: int
    start: int


class Family(NamedTuple):
    """Of a child: its tag, its pid (0 when it has ended), its session (-1: gone), its cgroup folder ("": none), and
    whether an earlier keeper had started it."""

    tag: int
    pid: int
    session: int
    cgroup: str
    adopted: bool = False


def read_process(pid: int) -> Process | None:
    """That process as /proc shows it now; None when it has gone or is a zombie."""
    try:
        text = _read(f"/proc/{pid}/stat")
    except OSError:
        return None
    # The name (field 2) may hold anything, spaces and parentheses too: count from its end.
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def monotonic_start(start: int) -> float:
    """When a process began that began `start` clock ticks after boot (proc(5)), on CLOCK_MONOTONIC."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def direct_children() -> list[int]:
    """Pids of this process's own children, zombies too."""
    try:
        return [int(pid) for pid in _read(f"/proc/self/task/{os.getpid()}/children").split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return [process.pid for process in every_process() if process.parent == os.getpid()]


def every_process() -> Iterator[Process]:
    """The process table. What comes and goes meanwhile may be missing."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read_process(int(name))) is not None:
            yield process


def members(family: Family, known: Iterable[int]) -> list[Process]:
    """All that is left of `family`, its main process included. `known` are the pids of all the keeper's own children.

    This is on the way to every restart, so it costs what the family and the orphans are, not what the machine is.
    Raises OSError when the process table can't be read: no file descriptor is free, say.
    """
    if family.adopted:  # what descends from it is not below us
        return _look_everywhere(family, [*_cgroup_pids(family.cgroup), family.pid])
    strangers = set(direct_children()) - set(known)
    found = dict.fromkeys(_cgroup_pids(family.cgroup))
    if family.pid:
        found[family.pid] = None
    for stranger in filter(None, map(read_process, strangers)):
        tag = tag_of(stranger.pid)
        if stranger.session == family.session or tag == family.tag:
            found[stranger.pid] = None
        elif not tag:
            return _look_everywhere(family, [*found])  # it has shed its tag: what is below it may be of any family
    pending = list(found)
    while pending:
        below = _children(pending.pop())
        if below is None:
            return _look_everywhere(family, [*found])
        pending += [pid for pid in below if pid not in found]
        found.update(dict.fromkeys(below))
    found.pop(os.getpid(), None)
    return list(filter(None, map(read_process, found)))


def _look_everywhere(family: Family, found: list[int]) -> list[Process]:
    """`members` by the whole process table, which costs as much as the machine has processes: all that is below `found`
    or in the session of the family, and strangers that carry its tag."""
    table = {process.pid: process for process in every_process()}
    own = os.getpid()
    ours = {pid for pid in found if pid in table}
    ours |= {process.pid for process in table.values() if process.session == family.session}
    strangers = (p.pid for p in table.values() if p.parent == own or (family.adopted and may_signal(p.pid)))
    # A family without a tag has no strangers: 0 is what every other process of the machine has.
    ours |= {pid for pid in strangers if tag_of(pid) == family.tag} if family.tag else set()
    children: dict[int, list[int]] = {}
    for process in table.values():
        if process.pid != own:  # somebody may have started us from within a program
            children.setdefault(process.parent, []).append(process.pid)
    pending = list(ours)
    while pending:
        below = [pid for pid in children.get(pending.pop(), ()) if pid not in ours]
        ours.update(below)
        pending += below
    ours.discard(own)
    return [table[pid] for pid in ours]


def _children(pid: int) -> list[int] | None:
    """The pids of all children of `pid`, none when it has gone. None where the kernel does not tell."""
    if not CHILDREN_KNOWN:
        return None
    try:
        return [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in _children_of_task(pid, task)]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children_of_task(pid: int, task: str) -> list[bytes]:
    try:
        return _read(f"/proc/{pid}/task/{task}/children").split()
    except (FileNotFoundError, ProcessLookupError):
        return []  # that thread has ended


def send(family: Family, known: Iterable[int], number: int) -> None:
    """Send signal `number` to all that is left of `family`. For SIGKILL it is repeated until no new process turns up.

    Raises OSError for a number that is no signal, and where nobody can tell what is left.
    """
    if number not in signal.valid_signals() and number != 0:
        raise OSError(errno.EINVAL, f"no such signal: {number}")
    if number == signal.SIGKILL and family.cgroup:
        try:
            with open(f"{family.cgroup}/cgroup.kill", "w") as file:
                file.write("1")
        except OSError:
            pass  # before Linux 5.14, or not writable: one by one
    known = list(known)
    hit: set[tuple[int, int]] = set()
    for _ in range(50 if number == signal.SIGKILL else 1):  # a fork bomb may outrun this; the caller comes again
        fresh = [process for process in members(family, known) if (process.pid, process.start) not in hit]
        if not fresh:
            return
        for process in fresh:
            hit.add((process.pid, process.start))
            send_one(process, number)


def send_one(process: Process, number: int) -> None:
    """Signal exactly this process: a pid that was given to another one meanwhile is left alone (pidfd_open(2))."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        now = read_process(process.pid)
        if now is not None and now.start == process.start:
            signal.pidfd_send_signal(fd, number)
    except OSError:
        pass
    finally:
        os.close(fd)


def may_signal(pid: int) -> bool:
    """Whether that process exists and is one that we may signal: anybody can give himself somebody's tag."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def make_cgroup_root() -> str:
    """A cgroup v2 folder below our own for the programs' cgroups, or "" where none can be made (cgroups(7)). Empty ones
    of keepers that were killed are removed."""
    try:
        own = _cgroup_folder(os.getpid())
        if not own:
            return ""
        for name in os.listdir(own):
            pid = name.removeprefix(ROOT_NAME)
            if name.startswith(ROOT_NAME) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                remove_cgroup(f"{own}/{name}")
        root = f"{own}/{ROOT_NAME}{os.getpid()}"
        os.makedirs(root, exist_ok=True)
        return root if os.access(f"{root}/cgroup.procs", os.W_OK) else ""
    except (OSError, IndexError):
        return ""


def old_cgroup(pid: int, name: str) -> str:
    """The folder that an earlier keeper had made for its child `name`, whose process `pid` is in it; "" for none, and
    for one that we are in ourselves."""
    try:
        path, own = _cgroup_folder(pid), _cgroup_folder(os.getpid())
    except (OSError, IndexError):
        return ""
    folder = name.replace("/", "_")
    above, found, _ = f"{path}/".partition(f"/{folder}/")
    root = os.path.basename(above)
    if not found or not (root.startswith(ROOT_NAME) and root.removeprefix(ROOT_NAME).isdigit()):
        return ""
    made = f"{above}/{folder}"
    return "" if f"{own}/".startswith(f"{made}/") else made


def _cgroup_folder(pid: int) -> str:
    """Where the cgroup v2 of `pid` is mounted, "" for nowhere. Raises OSError."""
    mount = ""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split()[0] == "cgroup2" and before.split()[3] == "/":
                mount = before.split()[4]
    with open(f"/proc/{pid}/cgroup") as file:
        path = next((line[3:].strip() for line in file if line.startswith("0::")), "")
    return f"{mount}{path.rstrip('/')}" if mount and path else ""


def make_cgroup(root: str, name: str) -> str:
    """A fresh cgroup for one child, or "". Never used again: after cgroup.kill a kernel may kill what enters it
    later."""
    path = f"{root}/{name.replace('/', '_')}"
    try:
        os.mkdir(path)
    except OSError:
        return ""
    return path


def remove_cgroup(path: str) -> None:
    """Remove an empty cgroup, with what the child made inside. One that is still in use stays."""
    if not path:
        return
    try:
        os.rmdir(path)
    except OSError:
        for folder, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _cgroup_pids(path: str) -> list[int]:
    if not path:
        return []
    found: list[int] = []
    with contextlib.suppress(OSError):
        if b"populated 0" in _read(f"{path}/cgroup.events"):
            return []
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in _read(f"{folder}/cgroup.procs").split()]
    return found


def _read(path: str) -> bytes:
    """A file of /proc or /sys, with as few system calls as can be: this is on the way to every restart."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = [os.read(fd, 65536)]
        while chunks[-1]:
            chunks.append(os.read(fd, 65536))
    finally:
        os.close(fd)
    return b"".join(chunks)


def tag_of(pid: int) -> int:
    """The tag of a process, 0 if it has none."""
    try:
        lines = _read(f"/proc/{pid}/limits").splitlines()
        line = next(line for line in lines if line.startswith(b"Max resident set"))
    except (OSError, StopIteration):
        return 0
    soft = line.split()[3]
    return int(soft) - TAG_BASE if soft.isdigit() and int(soft) > TAG_BASE else 0

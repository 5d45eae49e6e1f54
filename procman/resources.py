"""CPU and memory of every program's whole process tree, and their last hour.

It knows /proc and psutil. It must not know programs, limits or policy: it gets main pids and gives numbers.

One pass over /proc/*/stat makes a sample, whatever the number of programs. It reads the files itself: with psutil the
same pass took six times the CPU (38 instead of 6 ms for 290 processes). psutil, which is loaded only when it is needed,
reads proportional set sizes.

A process belongs to a program if it is its main process, descends from it, is in its session (setsid() makes the
session id the main pid, so orphans are found), or belonged to it in the sample before (orphans that made a session of
their own).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from procman.errors import is_shortage
from procman.records import dataclass

HISTORY_SECONDS = 3600

SPARE_DESCRIPTORS = 8
"""With fewer free ones a process counts as short of them."""

_OOM_VICTIM = re.compile(rb"Killed process (\d+) \(")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ANCESTORS_MAX = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """A program now. `cpu_percent`: of one core, since the sample before (0 in the first). Zombies don't count."""

    cpu_percent: float
    memory_bytes: int
    processes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What some processes use together: proportional set size (RSS where PSS may not be read), CPU seconds so far."""

    memory_bytes: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of /proc/PID/stat, as far as it matters here. Times are clock ticks; `started` counts from boot."""

    pid: int
    parent: int
    session: int
    started: int
    own: int
    children: int
    memory: int
    zombie: bool


class Sampler:
    """Samples programs again and again; it remembers the sample before. Not thread-safe."""

    def __init__(self, memory: Literal["rss", "pss"] = "rss") -> None:
        """`memory`: "pss" counts what workers share once, at the cost of a walk over their page tables."""
        self._pss = memory == "pss"
        self._before: dict[str, dict[int, Reading]] = {}
        self._at: float | None = None
        self._ticks_before = 0

    def sample(self, mains: Mapping[str, int]) -> dict[str, Sample]:
        """A sample of each program in `mains` (name to main pid) that has a process. It may end meanwhile."""
        # starttime counts on CLOCK_BOOTTIME. Taken before the pass: what starts during it may be seen only next time.
        ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS)
        at = time.monotonic()
        trees = _trees(_read_all(), mains, self._before)
        elapsed = max(at - self._at, 1 / _TICKS) if self._at is not None else 0.0
        samples = {}
        for name, tree in trees.items():
            used = ticks_used(self._before.get(name, {}), tree, self._ticks_before) if elapsed else 0
            percent = 100.0 * used / _TICKS / elapsed if elapsed else 0.0
            memory = sum(self._memory(reading) for reading in tree.values())
            samples[name] = Sample(percent, memory, sum(not reading.zombie for reading in tree.values()))
        self._before, self._at, self._ticks_before = trees, at, ticks
        return samples

    def _memory(self, reading: Reading) -> int:
        if not self._pss or reading.zombie:
            return reading.memory
        pss = _pss(reading.pid)
        return reading.memory if pss is None else pss


class Ring:
    """The last hour of samples of one process, 18 bytes each."""

    __slots__ = ("_at", "_cpu", "_memory", "_next", "_processes", "capacity")

    def __init__(self, interval: float) -> None:
        """`interval`: seconds between two samples."""
        self.capacity = max(1, math.ceil(HISTORY_SECONDS / interval))
        self._at = array("d")
        self._cpu = array("f")
        self._memory = array("I")  # KiB: 4 TiB fit
        self._processes = array("H")
        self._next = 0

    def add(self, at: float, sample: Sample) -> None:
        """Adds a sample taken `at` (any clock; seconds); the oldest one makes room."""
        kib, processes = min(sample.memory_bytes >> 10, 0xFFFFFFFF), min(sample.processes, 0xFFFF)
        if len(self._at) < self.capacity:
            self._at.append(at)
            self._cpu.append(sample.cpu_percent)
            self._memory.append(kib)
            self._processes.append(processes)
            return
        place = self._next
        self._at[place], self._cpu[place] = at, sample.cpu_percent
        self._memory[place], self._processes[place] = kib, processes
        self._next = (place + 1) % self.capacity

    def items(self) -> Iterator[tuple[float, Sample]]:
        """All samples with their times, oldest first. Memory is rounded down to KiB, CPU to single precision."""
        size = len(self._at)
        for count in range(size):
            place = (self._next + count) % size
            sample = Sample(self._cpu[place], self._memory[place] << 10, self._processes[place])
            yield self._at[place], sample

    def __len__(self) -> int:
        return len(self._at)


class OutOfMemory:
    """Tells which processes the kernel has killed for want of memory: it says so in its log, /dev/kmsg.

    Where that can't be read (it takes root, and a container may not show it), nobody was.
    """

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._killed: set[int] = set()
        self._log = -1
        with contextlib.suppress(OSError):
            self._log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)

    def killed(self, pid: int) -> bool:
        """Whether the kernel has killed `pid` since this object was made. Asked once for each process."""
        while self._log >= 0:
            try:
                record = os.read(self._log, 8192)
            except BrokenPipeError:
                continue  # some records were overwritten before they were read
            except OSError:
                break
            found = _OOM_VICTIM.search(record)
            if found:
                self._killed.add(int(found[1]))
            if not record:
                break
        was = pid in self._killed
        self._killed.discard(pid)
        return was


def daemon_usage(pids: Iterable[int]) -> Usage:
    """Memory and CPU of these processes together, themselves only. One that is gone counts nothing."""
    memory, ticks = 0, 0
    for pid in pids:
        reading = _read(pid)
        if reading is not None:
            pss = _pss(pid)
            memory += reading.memory if pss is None else pss
            ticks += reading.own
    return Usage(memory, ticks / _TICKS)


def descriptors_short(pid: int) -> str:
    """"", or that the process `pid` (of our own user, or we are root) has hardly a file descriptor left: which, and its
    limit. What it can't find out is no shortage, but for our own."""
    try:
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
        used = sum(int(name) < limit for name in os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError) as error:
        return "no file descriptor is free" if is_shortage(error) else ""
    return f"{used} of {limit} file descriptors are open" if used > limit - SPARE_DESCRIPTORS else ""


def processes_of(pid: int) -> list[dict[str, Any]]:
    """Every process of the tree below and with `pid`: pid, command line, memory in bytes (RSS). Reads all of /proc: for
    a thread."""
    found: list[dict[str, Any]] = []
    try:
        import psutil
    except (ImportError, OSError):  # no descriptor is free; the rest of what is asked for can be told all the same
        return found
    try:
        main = psutil.Process(pid)
        processes = [main, *main.children(recursive=True)]
    except (psutil.Error, OSError):
        return found
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline()) or process.name()
            found.append({"pid": process.pid, "command": command, "memory_bytes": process.memory_info().rss})
    return found


def resident(main: int, pids: Iterable[int]) -> dict[int, int]:
    """Memory in bytes (RSS) of those of `pids` that are the process `main` or a child of it."""
    readings = (_read(pid) for pid in pids)
    return {each.pid: each.memory for each in readings if each is not None and main in (each.pid, each.parent)}


def sockets_of(pid: int) -> set[int] | None:
    """The inodes of the sockets that a process has open; None where that may not be read, or it is gone."""
    try:
        names = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return None
    return {int(name[8:-1]) for name in names if name.startswith("socket:[")}


def holders(inodes: Collection[int], mains: Mapping[str, int]) -> dict[int, str]:
    """Which of these programs, as `Sampler.sample` has them, has each of these sockets open, as far as we may see it:
    the first one. Reads all of /proc: for a thread."""
    trees = _trees(_read_all(), mains, {})
    found: dict[int, str] = {}
    for name in mains:
        for pid in trees.get(name, ()):
            for inode in (sockets_of(pid) or set()).intersection(inodes):
                found.setdefault(inode, name)
    return found


def ticks_used(before: Mapping[int, Reading], now: Mapping[int, Reading], since: int) -> int:
    """Clock ticks of CPU that a tree used between two readings of it; `since` is the boot time of the first, in ticks.

    A process that is new and was born since counts whole; one that is older (it was adopted) counts from now on. The
    time of a dead child moves into its parent's `children` when that waits for it. What was counted while the child
    lived is taken off again, and no parent counts less than 0.
    """
    used = 0
    counted: dict[int, int] = {}  # by living parent: what its dead descendants had used when they were last seen
    for pid, old in before.items():
        if not _same(old, now.get(pid)):
            heir = _living_ancestor(old, before, now)
            counted[heir] = counted.get(heir, 0) + old.own + old.children
    for pid, new in now.items():
        was = before.get(pid)
        if was is not None and _same(was, new):
            own, inherited = new.own - was.own, new.children - was.children
        elif new.started >= since:
            own, inherited = new.own, new.children
        else:
            continue
        used += max(0, own) + max(0, inherited - counted.get(pid, 0))
    return used


def _same(one: Reading, other: Reading | None) -> bool:
    """Whether both are the same process: a pid comes back, but not with the same start time."""
    return other is not None and one.pid == other.pid and one.started == other.started


def _living_ancestor(dead: Reading, before: Mapping[int, Reading], now: Mapping[int, Reading]) -> int:
    pid = dead.parent
    for _ in range(_ANCESTORS_MAX):
        old = before.get(pid)
        if old is None:
            return 0
        if _same(old, now.get(pid)):
            return pid
        pid = old.parent
    return 0


def _trees(
    table: Mapping[int, Reading], mains: Mapping[str, int], before: Mapping[str, Mapping[int, Reading]]
) -> dict[str, dict[int, Reading]]:
    """The processes of each program."""
    names = {pid: name for name, pid in mains.items()}
    owners: dict[int, str] = {pid: name for pid, name in names.items() if pid in table}
    for name, tree in before.items():
        if name in mains:
            for pid, old in tree.items():
                if _same(old, table.get(pid)):
                    owners.setdefault(pid, name)
    for pid, reading in table.items():
        if reading.session in names:
            owners.setdefault(pid, names[reading.session])
    trees: dict[str, dict[int, Reading]] = {}
    for pid, reading in table.items():
        owner = _owner(pid, table, owners)
        if owner:
            trees.setdefault(owner, {})[pid] = reading
    return trees


def _owner(pid: int, table: Mapping[int, Reading], owners: dict[int, str]) -> str:
    """The program that `pid` belongs to, or ""; remembers the answer for all that it passes."""
    passed: list[int] = []
    owner = ""
    while pid in table and len(passed) < _ANCESTORS_MAX:
        known = owners.get(pid)
        if known is not None:
            owner = known
            break
        passed.append(pid)
        pid = table[pid].parent
    for each in passed:
        owners[each] = owner
    return owner


def _read_all() -> dict[int, Reading]:
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            reading = _read(int(entry))
            if reading is not None:
                table[reading.pid] = reading
    return table


def _read(pid: int) -> Reading | None:
    """/proc/PID/stat (proc(5)), or None if the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, 2048)
    except OSError:  # ESRCH: it ended after the open
        return None
    finally:
        os.close(fd)
    # The command stands in brackets and may hold any character; the last bracket ends it. `word[0]` is field 3.
    word = data[data.rfind(b")") + 2 :].split(None, 22)
    if len(word) < 22:
        return None
    return Reading(
        pid=pid,
        parent=int(word[1]),
        session=int(word[3]),
        started=int(word[19]),
        own=int(word[11]) + int(word[12]),
        children=int(word[13]) + int(word[14]),
        memory=int(word[21]) * _PAGE,
        zombie=word[0] == b"Z",
    )


def _pss(pid: int) -> int | None:
    """Proportional set size in bytes; None if it may not be read or the process is gone."""
    try:
        import psutil  # 1.6 MB that a daemon without "pss" need not carry
    except (ImportError, OSError):  # it can't be read: no descriptor is free
        return None
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except (psutil.Error, OSError):
        return None

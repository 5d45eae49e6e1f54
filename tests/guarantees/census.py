"""What keeper and supervisor hold at one moment, and whether a series of such counts is flat.

It reads /proc from outside; it knows nothing of procman's insides.

How flatness is judged: a series is cut into its first quarter and its second half, and the medians of the two are
compared. A leak grows with the work done, so the second half lies above the first quarter; noise moves single samples,
not a median. Memory is RssAnon, what a process has allocated itself: its PSS, which is shown too, also moves when any
other program on the machine maps or unmaps the same files.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KIB = 1024

THREADS = 8
"""How many the supervisor's pools of threads may still get after the first quarter: they are made when first used."""

ZOMBIE_SECONDS = 10.0
"""On a busy machine even the keeper waits for a processor, and a child that has ended waits for the keeper."""

COUNTS_MIN = 8
"""Fewer counts than this are no series."""


@dataclass(frozen=True, slots=True)
class Held:
    """One process: bytes of memory (RssAnon, and PSS), open descriptors, threads, CPU seconds since it began."""

    pid: int
    memory: int
    pss: int
    descriptors: int
    threads: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Census:
    """All that is counted at the time `at` (monotonic seconds), after `restarts` restarts.

    `zombies` are (pid, start time) of the keeper's dead children that nobody has reaped yet.
    """

    at: float
    restarts: int
    keeper: Held
    supervisor: Held
    children: int
    zombies: frozenset[tuple[int, int]]
    cgroups: int
    state_bytes: int
    log_files: int


@dataclass(slots=True)
class Verdict:
    """What was compared, as lines to print, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def held(pid: int) -> Held:
    """What `pid` holds now. Raises OSError when it has gone."""
    status = _fields(Path(f"/proc/{pid}/status").read_text())
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Held(
        pid=pid,
        memory=_kib(status["RssAnon"]),
        pss=_kib(rollup["Pss"]),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        cpu_seconds=(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
    )


def _fields(text: str) -> dict[str, str]:
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in text.splitlines())}


def _kib(text: str) -> int:
    return int(text.removesuffix("kB")) * KIB


def children(pid: int) -> tuple[int, frozenset[tuple[int, int]]]:
    """How many living children `pid` has, and its zombies."""
    living, zombies = 0, set()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended and reaped meanwhile
        if stat[0] == "Z":
            zombies.add((int(child), int(stat[19])))
        else:
            living += 1
    return living, frozenset(zombies)


def judge(censuses: Sequence[Census], *, memory_slack: int, count_slack: int, warm_up: int = 0) -> Verdict:
    """Whether what the two processes hold is flat over `censuses`, of which all are of one keeper.

    The supervisor is judged over the life of the last one only: a new one begins with fresh memory. Its first `warm_up`
    restarts are left out, in which the histories that it keeps are filled. `memory_slack` is in bytes, `count_slack` in
    descriptors or cgroups.
    """
    verdict = Verdict()
    last = censuses[-1].supervisor.pid
    one_life = [census for census in censuses if census.supervisor.pid == last]
    warm = [census for census in one_life if census.restarts >= one_life[0].restarts + warm_up]
    compared: list[tuple[str, Sequence[Census], Callable[[Census], int], int]] = [
        ("keeper: memory", censuses, lambda census: census.keeper.memory, memory_slack),
        ("keeper: PSS", censuses, lambda census: census.keeper.pss, -1),
        ("keeper: descriptors", censuses, lambda census: census.keeper.descriptors, count_slack),
        ("keeper: threads", censuses, lambda census: census.keeper.threads, 0),
        ("supervisor: memory", warm, lambda census: census.supervisor.memory, memory_slack),
        ("supervisor: PSS", warm, lambda census: census.supervisor.pss, -1),
        ("supervisor: descriptors", one_life, lambda census: census.supervisor.descriptors, count_slack),
        ("supervisor: threads", one_life, lambda census: census.supervisor.threads, THREADS),
        ("cgroups", censuses, lambda census: census.cgroups, count_slack),
        ("state file, bytes", one_life, lambda census: census.state_bytes, memory_slack),
        ("log files", one_life, lambda census: census.log_files, -1),  # the soak knows how many there may be
    ]
    for what, series, value, slack in compared:
        _compare(verdict, what, [value(census) for census in series], slack)
    first_seen: dict[tuple[int, int], float] = {}
    for census in censuses:
        first_seen = {zombie: first_seen.get(zombie, census.at) for zombie in census.zombies}
        old = [pid for (pid, _), at in first_seen.items() if census.at - at > ZOMBIE_SECONDS]
        verdict.wrong += [f"zombie {pid} was not reaped within {ZOMBIE_SECONDS:g} s" for pid in old]
    return verdict


def _compare(verdict: Verdict, what: str, values: Sequence[int], slack: int) -> None:
    """Adds a line, and what is wrong when the second half lies more than `slack` above the first quarter. A slack below
    0: only shown."""
    if len(values) < COUNTS_MIN:
        verdict.wrong.append(f"{what}: only {len(values)} counts, which tell nothing")
        return
    first = round(statistics.median(values[: len(values) // 4]))
    later = round(statistics.median(values[len(values) // 2 :]))
    verdict.lines.append(f"{what}: {first:,} in the first quarter, {later:,} in the second half ({len(values)} counts)")
    if 0 <= slack < later - first:
        verdict.wrong.append(f"{what}: it grew by {later - first:,}")

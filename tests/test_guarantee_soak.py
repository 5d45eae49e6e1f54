"""The short form of the soak (`python -m tests.guarantees soak`), and that its judgement can find something."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

import pytest

from tests.conftest import MakeDaemon
from tests.guarantees.census import Census, Held, held, judge
from tests.guarantees.soak import SETTINGS, Plan, Soak, judged, table


def test_a_thousand_restarts_leave_nothing_behind(daemon: MakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(programs=100, restarts=1000, seconds=10, every=0.5, kills=2)
    running = daemon(table(plan), settings=SETTINGS, start=False)
    figures = Soak(running, plan, print).run()
    verdict = judged(figures, plan)
    assert not verdict.wrong, "\n".join([*verdict.wrong, *verdict.lines, capsys.readouterr().out])
    assert figures.restarts >= 200  # the machine may be slow, but not so slow
    assert figures.kills == plan.kills


HELD = Held(pid=10, memory=20_000_000, pss=30_000_000, descriptors=300, threads=3, cpu_seconds=1.0)
FLAT = [
    Census(
        at=number,
        restarts=number * 100,
        keeper=HELD,
        supervisor=replace(HELD, pid=11 if number > 10 else 12),
        children=20,
        zombies=frozenset({(100 + number, 5)}),
        cgroups=20 + number % 3,
        state_bytes=40_000 + number % 2,
        log_files=30,
    )
    for number in range(60)
]


def wrong(censuses: list[Census]) -> str:
    return "; ".join(judge(censuses, memory_slack=1_000_000, count_slack=8).wrong)


def test_what_is_flat_is_flat() -> None:
    assert not wrong(FLAT)
    once = [replace(c, keeper=replace(HELD, memory=90_000_000)) if c.at == 50 else c for c in FLAT]
    assert not wrong(once), "one sample is noise"


def test_what_grows_is_found() -> None:
    def each(change: str) -> str:
        grown = {
            "memory": lambda c: replace(c, keeper=replace(HELD, memory=20_000_000 + int(c.at) * 50_000)),
            "descriptors": lambda c: replace(c, supervisor=replace(c.supervisor, descriptors=300 + int(c.at))),
            "threads": lambda c: replace(c, supervisor=replace(c.supervisor, threads=3 + int(c.at) // 2)),
            "cgroups": lambda c: replace(c, cgroups=20 + int(c.at)),
            "state": lambda c: replace(c, state_bytes=40_000 + int(c.at) * 50_000),
            "zombie": lambda c: replace(c, zombies=frozenset({(7, 5)})),
        }
        return wrong([grown[change](census) for census in FLAT])

    assert each("memory").startswith("keeper: memory: it grew by ")
    assert "supervisor: descriptors" in each("descriptors")
    assert "supervisor: threads" in each("threads")
    assert "cgroups" in each("cgroups")
    assert "state file" in each("state")
    assert "zombie 7 was not reaped within 10 s" in each("zombie")


def test_too_few_counts_tell_nothing() -> None:
    assert "tell nothing" in wrong(FLAT[:5])


def test_what_a_process_holds_is_read_from_proc() -> None:
    before = held(os.getpid())
    read_end, write_end = os.pipe()
    with mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:  # no memory that was freed before
        ballast.write(os.urandom(8 << 20))
        after = held(os.getpid())
    os.close(read_end)
    os.close(write_end)
    assert after.descriptors == before.descriptors + 2
    assert after.memory >= before.memory + (8 << 20) // 2
    assert after.pss > 0

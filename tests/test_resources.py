"""resources.py: tables for the arithmetic, real process trees for the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.resources import OutOfMemory, Reading, Ring, Sample, Sampler, daemon_usage, holders, ticks_used
from tests.harness import PROJECT, wait_until

TICKS = os.sysconf("SC_CLK_TCK")


PRELUDE = """
import os, signal, sys, time
def say(text):
    os.write(1, f"{text}\\n".encode())  # one write: several processes share the pipe
"""


class Start(Protocol):
    def __call__(self, code: str) -> subprocess.Popen[str]: ...


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs, each in a session of its own, that end when their stdin does."""
    children: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        with child:  # closes stdin: all that read it end
            pass


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()


# Arithmetic


def process(pid: int, own: int, children: int = 0, *, parent: int = 1, started: int = 10) -> Reading:
    return Reading(pid, parent, pid, started, own, children, 0, False)


def tree(*readings: Reading) -> dict[int, Reading]:
    return {reading.pid: reading for reading in readings}


SINCE = 1000

USED = [
    ("one process", tree(process(7, 50)), tree(process(7, 80)), 30),
    ("idle", tree(process(7, 50, 20)), tree(process(7, 50, 20)), 0),
    ("a new one", tree(process(7, 50)), tree(process(7, 50), process(8, 5, 2, parent=7, started=1000)), 7),
    ("an adopted old one", tree(process(7, 50)), tree(process(7, 50), process(8, 5000, parent=7, started=999)), 0),
    ("all new", {}, tree(process(7, 50, started=2000)), 50),
    (
        "a child died: its last 4 ticks",
        tree(process(7, 50), process(8, 100, parent=7)),
        tree(process(7, 51, 104)),
        5,
    ),
    (
        "a child lived and died in between",
        tree(process(7, 50, 10)),
        tree(process(7, 50, 13)),
        3,
    ),
    (
        "a child with children of its own died",
        tree(process(7, 50), process(8, 100, 30, parent=7), process(9, 20, parent=8)),
        tree(process(7, 50, 155)),
        5,
    ),
    (
        "a child died and nobody waited for it (SIGCHLD is ignored)",
        tree(process(7, 50), process(8, 100, parent=7)),
        tree(process(7, 60)),
        10,
    ),
    (
        "an orphan died: the keeper has its time",
        tree(process(7, 50), process(8, 100, parent=1)),
        tree(process(7, 60)),
        10,
    ),
    (
        "one died, another worked",
        tree(process(7, 50), process(8, 100, parent=7), process(9, 10, parent=7)),
        tree(process(7, 50, 100), process(9, 17, parent=7)),
        7,
    ),
    ("a reused pid", tree(process(7, 500, started=10)), tree(process(7, 3, started=2000)), 3),
    (
        "a worker's pid came back",
        tree(process(7, 50), process(8, 100, parent=7)),
        tree(process(7, 50, 102), process(8, 1, parent=7, started=2000)),
        3,
    ),
    ("main died, an orphan stays", tree(process(7, 50), process(8, 1, parent=7)), tree(process(8, 4, parent=1)), 3),
    ("all gone", tree(process(7, 50)), {}, 0),
    ("parents in a circle", tree(process(7, 1, parent=8), process(8, 1, parent=7)), {}, 0),
]


@pytest.mark.parametrize(("name", "before", "now", "used"), USED, ids=[row[0] for row in USED])
def test_ticks_used(name: str, before: Mapping[int, Reading], now: Mapping[int, Reading], used: int) -> None:
    assert ticks_used(before, now, SINCE) == used, name


readings = st.builds(
    process,
    st.integers(2, 6),
    st.integers(0, 50),
    st.integers(0, 50),
    parent=st.integers(1, 6),
    started=st.sampled_from([10, 999, 1000, 2000]),
)
trees = st.lists(readings, max_size=5).map(lambda found: tree(*found))


@given(trees, trees)
def test_use_is_never_negative(before: dict[int, Reading], now: dict[int, Reading]) -> None:
    assert ticks_used(before, now, SINCE) >= 0


# Real trees


def test_a_tree_is_counted_whole(start: Start) -> None:
    shop = start(
        "block = b'x' * 50_000_000\n"
        "if os.fork() == 0:\n"
        "    block = b'y' * 50_000_000\n"
        "    say('up')\n"
        "sys.stdin.read()\nos._exit(0)"
    )
    other = start("say('up'); sys.stdin.read()")
    assert line(shop) == line(other) == "up"
    samples = Sampler().sample({"shop": shop.pid, "other": other.pid, "gone": 2**22 + 1})
    assert sorted(samples) == ["other", "shop"]
    assert (samples["shop"].processes, samples["other"].processes) == (2, 1)
    assert samples["shop"].memory_bytes > 100_000_000
    assert 1_000_000 < samples["other"].memory_bytes < 50_000_000
    assert samples["shop"].cpu_percent == 0


def test_pss_counts_shared_memory_once(start: Start) -> None:
    shop = start("block = bytearray(b'x') * 60_000_000\nif os.fork() == 0: say('up')\nsys.stdin.read()\nos._exit(0)")
    assert line(shop) == "up"
    mains = {"shop": shop.pid}
    rss, pss = Sampler("rss").sample(mains)["shop"], Sampler("pss").sample(mains)["shop"]
    assert rss.memory_bytes > 120_000_000
    assert 60_000_000 < pss.memory_bytes < 100_000_000


def test_cpu_of_a_busy_tree(start: Start) -> None:
    """The work is done in children that come and go between two samples; it must not get lost, nor be counted twice."""
    work = start(
        "def burn(ticks):\n"
        "    end = time.process_time() + ticks / 100\n"
        "    while time.process_time() < end: pass\n"
        "for command in sys.stdin:\n"
        "    if os.fork() == 0:\n"
        "        burn(20); os._exit(0)\n"
        "    os.wait()\n"
        "    burn(10)\n"
        "    say('done')\n"
    )
    idle = start("sys.stdin.read()")
    sampler, mains = Sampler(), {"work": work.pid, "idle": idle.pid}
    first = sampler.sample(mains)
    assert first["work"].cpu_percent == 0
    begin = time.monotonic()
    assert work.stdin is not None
    work.stdin.write("go\n")
    work.stdin.flush()
    assert line(work) == "done"
    second = sampler.sample(mains)
    elapsed = time.monotonic() - begin
    assert 0.2 < second["work"].cpu_percent / 100 * elapsed < 0.6  # 0.3 s of CPU and the rounding to ticks
    third = sampler.sample(mains)
    assert third["work"].cpu_percent <= 2 * 100  # at most two ticks in the least interval


def test_orphans_still_count(start: Start) -> None:
    """One orphan stays in the session; another made its own after a sample had seen it."""
    shop = start(
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        say(os.getpid()); sys.stdin.read()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "gate, go = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); os.close(go)\n"
        "    if os.fork() == 0:\n"
        "        say(os.getpid()); sys.stdin.read(); os._exit(0)\n"
        "    os.read(gate, 1); os._exit(0)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (os.write(go, b'x'), os.wait(), say('orphaned')))\n"
        "say('up')\n"
        "sys.stdin.read()"
    )
    lines = [line(shop) for _ in range(3)]
    pids = [int(text) for text in lines if text != "up"]
    sampler, mains = Sampler(), {"shop": shop.pid}
    assert sampler.sample(mains)["shop"].processes == 4
    shop.send_signal(signal.SIGUSR1)
    assert line(shop) == "orphaned"
    assert sampler.sample(mains)["shop"].processes == 3
    assert Sampler().sample(mains)["shop"].processes == 2  # one that has not seen it before can't know
    end(shop)
    shop.wait(10)
    wait_until(lambda: all(sample.processes == 0 for sample in sampler.sample(mains).values()))
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert sampler.sample(mains) == {}


def test_zombies_do_not_count(start: Start) -> None:
    shop = start("if os.fork() == 0: os._exit(0)\nsay('up'); sys.stdin.read()")
    assert line(shop) == "up"
    sampler = Sampler()
    wait_until(lambda: sampler.sample({"shop": shop.pid})["shop"].processes == 1)


def test_processes_that_come_and_go_do_no_harm(start: Start) -> None:
    shop = start(
        "say('up')\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end:\n"
        "    if os.fork() == 0: os._exit(0)\n"
        "    os.wait()\n"
    )
    assert line(shop) == "up"
    sampler = Sampler()
    while shop.poll() is None:
        samples = sampler.sample({"shop": shop.pid})
        assert all(0 <= sample.cpu_percent < 10_000 for sample in samples.values())


def test_odd_names_are_read_right(tmp_path: Path, start: Start) -> None:
    odd = tmp_path / ") Z 1 (\n"
    odd.symlink_to(sys.executable)
    with subprocess.Popen([str(odd), "-c", "input()"], stdin=subprocess.PIPE) as child:
        wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text().startswith(") Z 1"))
        assert Sampler().sample({"odd": child.pid})["odd"].processes == 1
        assert child.stdin is not None
        child.stdin.write(b"\n")


def test_daemon_usage(start: Start) -> None:
    child = start("block = b'x' * 30_000_000\nsay('up'); sys.stdin.read()")
    assert line(child) == "up"
    one, both = daemon_usage([child.pid]), daemon_usage([child.pid, os.getpid(), 2**22 + 1])
    assert 30_000_000 < one.memory_bytes < 80_000_000
    assert both.memory_bytes > one.memory_bytes + 5_000_000
    assert 0 < both.cpu_seconds - one.cpu_seconds <= time.process_time() + 2 / TICKS
    assert daemon_usage([]).memory_bytes == 0


def test_psutil_stays_out_of_memory_without_pss() -> None:
    code = (
        "import os, sys; from procman.resources import Sampler\n"
        "assert Sampler().sample({'me': os.getpid()}); assert 'psutil' not in sys.modules\n"
        "assert Sampler('pss').sample({'me': os.getpid()}); assert 'psutil' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


# The ring


@given(st.integers(1, 8), st.integers(0, 30))
def test_the_ring_keeps_the_last_samples(capacity: int, count: int) -> None:
    ring = Ring(3600 / capacity)
    assert ring.capacity == capacity
    added = [(float(n), Sample(n / 4, n * 1024, n)) for n in range(count)]
    for at, sample in added:
        ring.add(at, sample)
        assert len(ring) <= capacity
    assert list(ring.items()) == added[-capacity:]
    assert len(ring) == min(count, capacity)


@pytest.mark.parametrize(("interval", "capacity"), [(5, 720), (7, 515), (3600, 1), (86400, 1), (0.5, 7200)])
def test_the_ring_lasts_an_hour(interval: float, capacity: int) -> None:
    assert Ring(interval).capacity == capacity


def test_the_ring_takes_any_sample() -> None:
    ring = Ring(3600)
    for _ in range(2):
        ring.add(1.5, Sample(1e6, 2**60, 2**20))
        assert list(ring.items()) == [(1.5, Sample(1e6, 0xFFFFFFFF << 10, 0xFFFF))]


@pytest.mark.skipif(not os.access("/dev/kmsg", os.W_OK), reason="the kernel's log can't be written here")
def test_a_kill_by_the_kernel_is_found_in_its_log() -> None:
    memory = OutOfMemory()
    with open("/dev/kmsg", "w") as log:
        log.write("Out of memory: Killed process 4194305 (python) total-vm:1kB\n")
    assert memory.killed(4194305)
    assert not memory.killed(4194305), "a pid may come again"
    assert not memory.killed(1)
    os.close(memory._log)


def test_without_the_log_of_the_kernel_nothing_was_killed() -> None:
    assert not OutOfMemory("/nowhere").killed(1)


def test_who_has_a_socket_open(start: Start) -> None:
    """A program, or one of those below it."""
    code = """
        import socket
        held = socket.socket()
        if not os.fork():
            own = socket.socket()
            say(f"{os.fstat(held.fileno()).st_ino} {os.fstat(own.fileno()).st_ino}")
            sys.stdin.read()
            os._exit(0)
        sys.stdin.read()
        """
    first, second = (start(textwrap.dedent(code)) for _ in range(2))
    (held, own), (_, other) = ([int(word) for word in line(child).split()] for child in (first, second))
    mains = {"first": first.pid, "second": second.pid}
    assert holders({held, own, other, 1}, mains) == {held: "first", own: "first", other: "second"}
    assert holders({held}, {"second": second.pid}) == {}

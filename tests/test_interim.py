"""What a new supervisor does first: it reads the snapshot, and goes on with the output of programs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman import interim
from procman.config import Log
from procman.interim import Interim, Output
from procman.keeper.wire import Message, Wire, WireError
from procman.logs import Counters, LogThread, Stream, make_pipe, make_spool
from procman.snapshot import receive
from tests.harness import PROJECT, wait_until

HELLO: Message = {"op": "hello", "pid": 42, "starts": 3, "last": "killed by SIGKILL", "cgroup": "/c"}


@pytest.fixture
def wires() -> Iterator[tuple[Wire, socket.socket]]:
    """The keeper's end, and the supervisor's as a bare socket. Descriptors are counted."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    keeper = Wire(ours)
    yield keeper, theirs
    keeper.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_snapshot(wires: tuple[Wire, socket.socket]) -> None:
    keeper, theirs = wires
    read_end, write_end = os.pipe()

    def tell() -> None:
        keeper.send({"op": "child", "child": "a#1", "state": "running", "pid": 7, "at": 1.5, "note": "", "left": False})
        keeper.send({"op": "held", "name": "out"}, [write_end, read_end])  # one too many: closed
        for message in ({"op": "begin"}, {"op": "gone", "child": "a#1"}):
            keeper.send(message)

    keeper.send(HELLO)
    later = threading.Timer(0.05, tell)  # it waits for the rest
    later.start()
    snapshot = receive(Wire(theirs))
    later.join()
    assert (snapshot.starts, snapshot.last) == (3, "killed by SIGKILL")
    assert (snapshot.cgroup, snapshot.keeper_pid) == ("/c", 42)
    assert snapshot.children["a#1"]["pid"] == 7
    assert list(snapshot.held) == ["out"]
    for fd in (*snapshot.held.values(), read_end, write_end):
        os.close(fd)


def test_a_keeper_that_goes_before_the_snapshot_is_complete(wires: tuple[Wire, socket.socket]) -> None:
    keeper, theirs = wires
    keeper.send(HELLO)
    keeper.close()
    with pytest.raises(WireError):
        receive(Wire(theirs))


GOOD: Message = {"op": "child", "child": "a#1", "state": "exited", "pid": 7, "at": 1.5, "note": "", "left": False}


@pytest.mark.parametrize(
    "told",
    [
        {"op": "hello"}, HELLO | {"starts": "2"}, HELLO | {"pid": 10**30}, HELLO | {"upgrading": 1}, GOOD,
        GOOD | {"status": 10**9}, GOOD | {"status": 0x7F}, GOOD | {"status": "9"}, GOOD | {"step": "exec"},
        GOOD | {"status": 0, "at": 1e300}, GOOD | {"status": 0, "state": "flying"}, GOOD | {"status": 0, "left": None},
        GOOD | {"status": 0, "pid": -1}, GOOD | {"status": 0, "ended_at": -5.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_snapshot_that_makes_no_sense(wires: tuple[Wire, socket.socket], told: Message) -> None:
    """Said as such, and not by what it breaks later."""
    keeper, theirs = wires
    keeper.send(told)
    with pytest.raises(WireError, match="keeper"):
        receive(Wire(theirs))


def tell_of(keeper: Wire, plan: int, pipes: dict[str, int]) -> None:
    """A whole snapshot. The descriptors are the keeper's copies, and closed here."""
    keeper.send(HELLO)
    for name, fd in {interim.HELD_NAME: plan, **pipes}.items():
        keeper.send({"op": "held", "name": name}, [fd])
        os.close(fd)
    keeper.send({"op": "begin"})


def close(started: Interim) -> None:
    started.wire.close()
    for fd in started.snapshot.held.values():
        os.close(fd)


def test_output_goes_on_until_it_is_stopped(wires: tuple[Wire, socket.socket], tmp_path: Path) -> None:
    keeper, theirs = wires
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.write(write_end, b"waited\n")
    path = tmp_path / "a.log"
    log = Log(path=str(path), max_size=1000, keep=2)
    gone = Output("log/b/out", "b", log, str(tmp_path / "b.log"))  # its pipe has gone meanwhile
    plan = interim.plan([Output("log/a/out", "a", log, str(path)), gone])
    tell_of(keeper, plan, {"log/a/out/r": read_end})
    started = Interim(theirs.detach())
    wait_until(lambda: path.exists() and path.read_text() == "waited\n")
    os.write(write_end, b"new\n")
    wait_until(lambda: path.read_text() == "waited\nnew\n")
    assert started.stop() == {"log/a/out": Counters(read=11, written=11)}
    assert started.ended()
    os.write(write_end, b"for others\n")
    assert os.read(started.snapshot.held["log/a/out/r"], 100) == b"for others\n", "the pipe is still ours to give"
    os.close(write_end)
    close(started)


def test_what_a_stuck_disk_lets_pass_after_the_stop_is_counted_too(
    wires: tuple[Wire, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log thread of the supervisor has its stream by then. The spool begins anew meanwhile."""
    monkeypatch.setattr(interim, "STOP_SECONDS", 0.05)
    keeper, theirs = wires
    (read_end, write_end), spool = make_pipe(), make_spool()
    path, log, key = tmp_path / "a.log", Log(timestamps=True), "log/a/out"
    plan = interim.plan([Output(key, "a", log, str(path))])
    tell_of(keeper, plan, {f"{key}/r": read_end, f"{key}/s": spool})
    started = Interim(theirs.detach())
    first = started._thread
    assert first
    line, count = b"z" * 99 + b"\n", 12_000
    for _ in range(count // 1000):
        os.write(write_end, line * 1000)
    wait_until(lambda: first.counters(key).written == len(line) * count)
    stuck, passes = threading.Event(), threading.Event()

    def hang(_data: bytes) -> None:
        stuck.set()
        passes.wait(20)

    first.tap(key, hang)
    os.write(write_end, line * 10)
    assert stuck.wait(10)
    counters = started.stop()[key]
    held = started.snapshot.held
    thread = LogThread()
    thread.add(Stream(key, "a", log, str(path), os.dup(held[f"{key}/r"]), os.dup(held[f"{key}/s"])), counters)
    assert not started.ended()
    passes.set()
    wait_until(started.ended)
    for late_key, late in started.late().items():
        thread.recount(late_key, late)
    thread.start()
    os.write(write_end, b"after\n")
    wait_until(lambda: b"after" in path.read_bytes())
    whole = len(line) * (count + 10) + len(b"after\n")
    wait_until(lambda: thread.counters(key) == Counters(read=whole, written=whole))
    assert thread.stop()
    os.close(write_end)
    close(started)


WRONG_TYPES = b'[{"key": "log/a/out", "process": "a", "log": {"max_size": "x"}, "path": "/tmp/a.log"}]'


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"null", b'[{"key": "log/a/out"}]', b"\xff", WRONG_TYPES])
def test_a_plan_that_makes_no_sense_is_only_a_delay(wires: tuple[Wire, socket.socket], text: bytes) -> None:
    keeper, theirs = wires
    plan = os.memfd_create("plan")
    os.write(plan, text)
    tell_of(keeper, plan, {})
    started = Interim(theirs.detach())
    assert (started.stop(), started.ended()) == ({}, True)
    assert "the output of programs had to wait" in started.problem
    close(started)


def test_what_was_counted_in_two_places_is_added() -> None:
    before = Counters(read=10, written=7, dropped=3, unreported=1, rotations=2, lines_split=1, error="disk full")
    after = Counters(read=5, written=5, rotations=1)
    assert interim.add(before, after) == Counters(
        read=15, written=12, dropped=3, unreported=1, rotations=3, lines_split=1
    )


def test_it_needs_little() -> None:
    """What it imports is what programs wait for."""
    code = "import sys, procman.daemon, procman.interim; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.split())
    assert "procman.logs.capture" in modules
    assert not modules & {"asyncio", "logging", "tomllib", "procman.table", "procman.supervise", "psutil", "ssl"}

"""The supervisor is killed while its disks are full, broken, read-only or dead: the next one knows all the same.

What the disk does not take, the keeper holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from procman.client import Client
from procman.errors import ProcmanError
from tests.conftest import MakeDaemon
from tests.faults import Asked, Faults
from tests.harness import SUPERVISOR, RunningDaemon, command_line, descendants, wait_until
from tests.test_guarantee_disks import (
    LINES,
    PLAIN,
    accounted_for,
    as_root,
    counters,
    frozen,
    inside,
    prepared,
    problems,
    said_until,
    say,
    start_with_mounts,
)

SLEEPERS = "".join(
    f"""
    [program.{name}]
    command = "/bin/sleep 1000"
    start_seconds = 0
    """
    for name in ("stopped", "late", "woken")
)

FAILING = """
    [program.failing]
    command = "/bin/false"
    start_retries = -1
    restart_delay = "100s"
    restart_delay_max = "100s"
    """

GUEST = """
    [program.guest]
    command = "/bin/sleep 1000"
    start_seconds = 0
    """

ALL = LINES + PLAIN + SLEEPERS + FAILING

DOWN = ["failing", "late", "stopped"]


class Disk(NamedTuple):
    """The log of `lines`, the state file, how both become bad and good again, and what is said of it."""

    log: Path
    state: Path
    spoil: Callable[..., None]
    mend: Callable[[], None]
    why: str


@contextlib.contextmanager
def full(running: RunningDaemon) -> Iterator[Disk]:
    mounted = start_with_mounts(
        running, "mount -t tmpfs -o size=256k,mode=700 tmpfs disk", "mkdir disk/state", "mount --bind disk/state state"
    )
    filler = mounted / "disk/filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    yield Disk(mounted / "disk/lines.log", mounted / "disk/state/state.json", fill, filler.unlink, "No space left")


@contextlib.contextmanager
def broken(running: RunningDaemon, reading: bool = False) -> Iterator[Disk]:
    """EIO of every write; `reading`: the state file can't be read either."""
    log, state = running.folder / "disk/lines.log", running.folder / "state/state.json"
    with Faults(running.folder, running.python, "splice", "pwrite64", "fsync", "openat") as faults:
        running.start(prefix=faults.prefix)

        def spoil(*, only_log: bool = False) -> None:
            bad = [str(log)] if only_log else [str(log), f"{state}.new", *([str(state)] if reading else [])]

            def rule(asked: Asked) -> int:
                if asked.call == "openat":
                    return errno.EIO if asked.text(1) in bad[1:] else 0
                where = asked.path({"splice": 2, "pwrite64": 0, "fsync": 0}[asked.call])
                return errno.EIO if where in bad else 0

            faults.rule = rule

        try:
            yield Disk(log, state, spoil, faults.release, "Input/output error")
        finally:
            faults.release()
            assert running.stop() == 0


@contextlib.contextmanager
def unreadable(running: RunningDaemon) -> Iterator[Disk]:
    with broken(running, reading=True) as disk:
        yield disk


@contextlib.contextmanager
def read_only(running: RunningDaemon) -> Iterator[Disk]:
    """Only the state folder; what is in it can be read."""
    mounted = start_with_mounts(running)
    state = str(running.folder / "state")

    def spoil() -> None:
        inside(running, "mount", "--bind", state, state)
        inside(running, "mount", "-o", "remount,bind,ro", state)

    log, file = mounted / "disk/lines.log", mounted / "state/state.json"
    yield Disk(log, file, spoil, lambda: inside(running, "umount", state), "Read-only file system")


def kill_supervisor(running: RunningDaemon) -> None:
    before = running.supervisor_pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != before, 30, "another supervisor runs")
    wait_until(running.answers, 30)


def supervisors(running: RunningDaemon) -> list[int]:
    """Pids of those that run. One that is about to die has no command line."""
    below = descendants(running.keeper_pid)
    return [each.pid for each in below if SUPERVISOR in command_line(each.pid)]


def lives(running: RunningDaemon) -> dict[str, tuple[object, ...]]:
    """What a death of the supervisor must not change."""
    return {
        name: (info["pid"], info["state"], info["restarts"], info["started_at"])
        for name, info in running.status().items()
    }


def operate(running: RunningDaemon, why: str) -> None:
    """What operators do while nothing can be written: each command succeeds, and says what it lacks."""
    with ThreadPoolExecutor() as threads:  # a command waits for a dead disk, for some seconds
        commands = [("stop", "late", "failing"), ("start", "woken")]
        for done in threads.map(lambda command: running.ctl(*command), commands):
            assert done.returncode == 0, done.stderr
            assert why in done.stdout + done.stderr


def another_table(running: RunningDaemon, table: str) -> None:
    running.write_table(table)
    done = running.ctl("daemon", "reread")
    assert done.returncode == 0, done.stderr


KINDS = [pytest.param(full, marks=as_root), broken, unreadable, pytest.param(read_only, marks=as_root)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_supervisor_that_is_killed_on_a_bad_disk(
    daemon: MakeDaemon, kind: Callable[[RunningDaemon], contextlib.AbstractContextManager[Disk]]
) -> None:
    running = prepared(daemon, ALL + GUEST)
    with kind(running) as disk:
        running.wait_for("guest")
        running.wait_for("failing", "BACKOFF")
        assert running.ctl("stop", "stopped", "woken").returncode == 0
        assert json.loads(disk.state.read_text())["down"] == ["stopped", "woken"]
        said = said_until(running, "good", lambda: disk.log.exists() and "good\n" in disk.log.read_text())
        disk.spoil()
        loses = kind is not read_only
        said += said_until(running, "x" * 200, lambda: not loses or counters(running)["dropped"] > 2000)
        wait_until(lambda: counters(running)["read"] == said, 30)
        operate(running, disk.why)
        # A program that leaves the table and comes back is another one, which nobody has started.
        another_table(running, ALL)
        another_table(running, ALL + GUEST + "autostart = false")
        before, counted = lives(running), counters(running)
        for _ in range(2):
            kill_supervisor(running)
            assert lives(running) == before
            assert before["guest"][:2] == (None, "STOPPED")
            found = counters(running)
            assert {key: found[key] for key in ("read", "written", "dropped", "unreported")} == {
                key: counted[key] for key in ("read", "written", "dropped", "unreported")
            }
            wait_until(lambda: disk.why in problems(running), 30)
        disk.mend()
        wait_until(lambda: counters(running)["unreported"] == 0, 30, "the log tells what was dropped")
        said += said_until(running, "again", lambda: "again\n" in disk.log.read_text())
        wait_until(lambda: json.loads(disk.state.read_text())["down"] == DOWN, 30)
        wait_until(lambda: "state file" not in problems(running), 30)
        if loses:
            accounted_for(running, disk.log, said)
        # What is on the disk counts again: it is later than what the keeper holds.
        before.pop("plain")
        assert running.ctl("restart", "plain").returncode == 0
        kill_supervisor(running)
        assert counters(running)["read"] == said
        after = lives(running)
        assert after.pop("plain")[1] == "RUNNING"
        assert after == before


def test_what_is_dropped_is_on_record_though_nothing_else_changes(daemon: MakeDaemon) -> None:
    """Only the log is on a bad disk: once a second the state file learns what was lost."""
    running = prepared(daemon, LINES)
    with broken(running) as disk:

        def on_record() -> Any:
            return json.loads(disk.state.read_text())["logs"].get("log/lines/out")

        said = said_until(running, "good", lambda: disk.log.exists() and "good\n" in disk.log.read_text())
        disk.spoil(only_log=True)
        said += said_until(running, "x" * 200, lambda: counters(running)["dropped"] > 2000)
        wait_until(lambda: counters(running)["read"] == said, 30)
        lost = counters(running)["dropped"]
        wait_until(lambda: on_record()["dropped"] == lost, 30)
        kill_supervisor(running)
        disk.mend()
        said += said_until(running, "again", lambda: "again\n" in disk.log.read_text())
        accounted_for(running, disk.log, said)
        assert counters(running)["dropped"] == lost
        wait_until(lambda: on_record()["unreported"] == 0, 30)


def test_a_successor_starts_without_the_folder_of_the_logs(daemon: MakeDaemon) -> None:
    """It has gone, and can't be made again: a file is in its place."""
    running = prepared(daemon, PLAIN)
    running.start()
    before = running.wait_for("plain")["pid"]
    shutil.rmtree(running.log_dir)
    running.log_dir.write_text("")
    kill_supervisor(running)
    assert running.wait_for("plain")["pid"] == before
    assert f"can't make the folder {running.log_dir}" in running.said()
    running.log_dir.unlink()


@as_root
def test_a_supervisor_that_is_killed_on_a_dead_disk(daemon: MakeDaemon) -> None:
    """It can't die before the disk answers, and there is no second one as long as it can write. Nothing is lost."""
    running = prepared(daemon, ALL)
    mounted = start_with_mounts(
        running,
        "truncate -s 16M image",
        "mkfs.ext4 -q -F -m0 image",
        "mount -o loop image disk",
        "mkdir disk/state",
        "mount --bind disk/state state",
    )
    log, state = mounted / "disk/lines.log", mounted / "disk/state/state.json"
    running.wait_for("late")
    running.wait_for("failing", "BACKOFF")
    assert running.ctl("stop", "stopped", "woken").returncode == 0
    supervisor = running.supervisor_pid
    with frozen(running):
        say(running, "before")
        wait_until(lambda: "lines.log is not written" in problems(running), 30)
        operate(running, "is its disk stuck?")
        before = lives(running)
        os.kill(supervisor, signal.SIGKILL)
        say(running, "after")
        with pytest.raises(ProcmanError), Client(str(running.socket), 2) as client:
            client.call("status")
        assert Path(f"/proc/{supervisor}").exists(), "the disk holds it"
        assert not supervisors(running)
        for name in ("lines", "plain", "woken"):
            assert Path(f"/proc/{before[name][0]}").exists()
    wait_until(running.answers, 30)
    assert running.supervisor_pid != supervisor
    assert lives(running) == before
    wait_until(lambda: log.read_text() == "before\nafter\n", 30)
    wait_until(lambda: json.loads(state.read_text())["down"] == DOWN, 30)
    wait_until(lambda: not problems(running), 30)

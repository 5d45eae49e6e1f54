"""Machine trouble with processes and time, each as the real fault on a real daemon.

The clock jumps, children are frozen, deaf or too many, a pid comes back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.guarantees.loops import SETTINGS, Loops, measure
from tests.guarantees.reuse import NAMESPACE
from tests.harness import PROGRAMS, PROJECT, RunningDaemon, descendants, wait_until

WAYS = [pytest.param([], id="as-it-comes"), pytest.param(["--no-cgroup"], id="without-cgroup")]
COMPILER = shutil.which("cc") or shutil.which("gcc")
YEARS = 10 * 365 * 86400
LOOPS = Loops()


# --- the clock ------------------------------------------------------------------------------------------------------


class WallClock:
    """The wall clock of all that gets `environment`: off by what `jump` says. Every other clock stays true."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        library, offset = folder / "wall_clock.so", folder / "offset"
        command = [COMPILER, "-shared", "-fPIC", "-O", "-o", str(library), str(PROGRAMS / "wall_clock.c")]
        subprocess.run(command, check=True, timeout=60)
        offset.write_bytes(struct.pack("l", 0))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(offset)}
        with offset.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def jump(self, seconds: int) -> None:
        """From now on the clock is so far from the true time."""
        self._map[:] = struct.pack("l", seconds)

    def close(self) -> None:
        self._map.close()


@pytest.fixture
def wall_clock(tmp_path: Path) -> Iterator[WallClock]:
    if COMPILER is None:
        pytest.skip("no C compiler: the clock of a process can't be changed")
    with contextlib.closing(WallClock(tmp_path)) as clock:
        yield clock


CLOCKED = """
[defaults]
start_seconds = 0
[program.steady]
command = "/bin/sleep 1000"
[program.deaf]
command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
stop_timeout = "1s"
[program.slow]
command = "/bin/sleep 1000"
start_seconds = 1
autostart = false
[program.failing]
command = "/bin/false"
restart_delay = "500ms"
restart_delay_max = "500ms"
start_retries = -1
"""


@pytest.mark.parametrize("jump", [YEARS, -YEARS], ids=["ahead", "back"])
def test_nothing_but_what_is_shown_follows_the_wall_clock(daemon: MakeDaemon, wall_clock: WallClock, jump: int) -> None:
    """Uptimes, delays, deadlines and timeouts, before and after the supervisor is replaced."""
    running = daemon(CLOCKED, environment=wall_clock.environment, start=False)
    began = time.monotonic()
    running.start()
    steady = running.wait_for("steady")["pid"]
    for crash in (False, True):
        wall_clock.jump(0 if crash else jump)
        if crash:  # the deadlines in the state file are from before this jump
            os.kill(running.supervisor_pid, signal.SIGKILL)
            wait_until(running.answers, 30)
        info = running.status()["steady"]
        assert info["pid"] == steady
        assert 0 <= info["uptime_seconds"] <= time.monotonic() - began
        failing = info_of_next_failure(running, began)
        assert "next start in 0." in failing["why"] or failing["state"] != "BACKOFF"
        stop_the_deaf(running)
        start_the_slow(running, jump=0 if crash else jump)


def info_of_next_failure(running: RunningDaemon, began: float) -> dict[str, Any]:
    """Two more starts come, neither at once nor never."""
    before = running.status()["failing"]["restarts"]
    wait_until(lambda: running.status()["failing"]["restarts"] >= before + 2, 20, "it is started again")
    info = running.status()["failing"]
    assert info["restarts"] <= (time.monotonic() - began) / 0.45 + 1, "no delay is shorter than 0.45 s"
    return info


def stop_the_deaf(running: RunningDaemon) -> None:
    """Its stop takes `stop_timeout`, and then ends."""
    wait_until(lambda: f"ready {running.status()['deaf']['pid']}" in running.log("deaf"), what="it is deaf")
    began = time.monotonic()
    assert running.ctl("stop", "deaf").returncode == 0
    assert time.monotonic() - began >= 1
    assert running.status()["deaf"]["exit"]["signal"] == "SIGKILL"
    assert running.ctl("start", "deaf").returncode == 0


def start_the_slow(running: RunningDaemon, jump: int) -> None:
    """It is RUNNING after `start_seconds`. What is shown does follow the clock: so the daemon has seen the jump."""
    began = time.monotonic()
    assert running.ctl("start", "slow").returncode == 0
    assert time.monotonic() - began >= 1
    shown = running.status()["slow"]["started_at"]
    assert shown.startswith(time.strftime("%Y", time.gmtime(time.time() + jump)))
    assert running.ctl("stop", "slow").returncode == 0


@pytest.mark.parametrize("jump", [3600, -3600], ids=["ahead", "back"])
def test_the_uptime_of_a_child_that_no_state_file_knows(daemon: MakeDaemon, wall_clock: WallClock, jump: int) -> None:
    """The supervisor dies after it has asked for a child, before it has written that down, and the clock jumps."""
    table = '[program.steady]\ncommand = "/bin/sleep 1000"\nstart_seconds = 0\nautostart = false'
    running = daemon(table, environment=wall_clock.environment)
    (running.folder / "state" / "state.json.new").mkdir()  # it can't be written
    began = time.monotonic()
    with running.client() as client:
        client.call("start", names=["steady"], wait=False)
    pid = running.wait_for("steady")["pid"]
    wall_clock.jump(jump)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers, 30)
    info = running.wait_for("steady")
    assert info["pid"] == pid
    assert 0 < info["uptime_seconds"] <= time.monotonic() - began
    (running.folder / "state" / "state.json.new").rmdir()


# --- frozen, deaf, lost ---------------------------------------------------------------------------------------------


FROZEN = """
[program.frozen]
command = "/bin/sleep 1000"
start_seconds = 0
stop_timeout = "300ms"
"""


@pytest.mark.parametrize("verb", ["stop", "restart", "shutdown"])
def test_a_child_that_was_sent_sigstop(daemon: MakeDaemon, verb: str) -> None:
    """SIGTERM waits in a frozen process for a SIGCONT that does not come; SIGKILL at `stop_timeout` does not wait."""
    running = daemon(FROZEN)
    pid = running.wait_for("frozen")["pid"]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", what="it is frozen")
    assert running.status()["frozen"]["state"] == "RUNNING"
    running.look()
    if verb == "shutdown":
        assert running.stop() == 0
    else:
        assert running.ctl(verb, "frozen").returncode == 0
        info = running.status()["frozen"]
        assert info["exit"]["signal"] == "SIGKILL"
        assert info["state"] == ("RUNNING" if verb == "restart" else "STOPPED")
    assert state_of(pid) in ("", "Z")


def state_of(pid: int) -> str:
    """One letter (proc(5)); "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


DEAF = """
[program.deaf]
command = "/bin/sh -c 'trap \\"\\" TERM; sleep 1000 & echo ready; wait'"
instances = 50
start_seconds = 0
stop_timeout = "1s"
"""


@pytest.mark.parametrize("arguments", WAYS)
def test_fifty_deaf_programs_with_deaf_children(daemon: MakeDaemon, arguments: list[str]) -> None:
    running = daemon(DEAF, start=False)
    running.start(*arguments)
    wait_until(lambda: len(descendants(running.keeper_pid)) >= 101, 30, "50 shells, 50 sleeps, and the supervisor")
    running.look()
    done = running.ctl("stop", "all")
    assert done.returncode == 0, done.stderr
    assert {info["exit"]["signal"] for info in running.status().values()} == {"SIGKILL"}
    assert [left.pid for left in running.leftovers()] == sorted([running.keeper_pid, running.supervisor_pid])


def test_a_stop_whose_end_only_the_keeper_and_a_dead_supervisor_knew(daemon: MakeDaemon) -> None:
    """The state file says STOPPING, and the keeper has told that all is over, to one that died before it wrote it."""
    running = daemon(
        """
        [program.deserted]
        command = "${PYTHON} -S -E ${PROGRAMS}/leaves_one.py"
        start_seconds = 0
        stop_timeout = "100s"
        """
    )
    ready = wait_until(lambda: re.search(r"ready \d+ (\d+)\n", running.log("deserted")), what="it has a child")
    assert ready is not None
    state = running.folder / "state" / "state.json"
    with running.client() as client:
        client.call("stop", names=["deserted"], wait=False)
    wait_until(lambda: re.search(r'"state":"STOPPING","wanted":false,"alive":false', state.read_text()))
    # With that on record the keeper may forget the child. What comes next is not written any more.
    (running.folder / "state" / "state.json.new").mkdir()
    os.kill(int(ready[1]), signal.SIGKILL)
    running.wait_for("deserted", "STOPPED")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers, 30)
    assert running.wait_for("deserted", "STOPPED")["why"]
    (running.folder / "state" / "state.json.new").rmdir()


# --- too many -------------------------------------------------------------------------------------------------------


BOMB = """
[program.bomb]
command = "${PYTHON} -S -E ${PROGRAMS}/fork_bomb.py 40"
start_seconds = 0
stop_timeout = "300ms"
restart = "never"
"""


@pytest.mark.parametrize("arguments", WAYS)
def test_a_fork_bomb_below_its_limit(daemon: MakeDaemon, arguments: list[str]) -> None:
    """Each process that is killed makes room for another one, which is there at once."""
    running = daemon(BOMB, start=False)
    running.start(*arguments)
    wait_until(lambda: len(bomb(running)) >= 30, 30, "it has exploded")
    with running.client(10) as client:
        assert client.call("daemon.status")["processes"] == {"RUNNING": 1}
        client.call("stop", names=["bomb"], wait=False)
        assert client.call("daemon.status")["processes"]
    running.wait_for("bomb", "STOPPED", 15)  # the bomb would end by itself after 20 s
    assert not bomb(running)
    assert running.status()["bomb"]["exit"]["signal"] == "SIGKILL", "it was not the end of the bomb's own time"


def bomb(running: RunningDaemon) -> list[int]:
    """Pids of all of the bomb that lives: all that is below the keeper but the supervisor."""
    keep = running.supervisor_pid
    return [each.pid for each in descendants(running.keeper_pid) if each.pid != keep and each.alive()]


def test_a_thousand_programs_that_crash_at_once_again_and_again(daemon: MakeDaemon) -> None:
    """The delay bounds the starts, each start costs a bounded time, and the daemon answers meanwhile. The long form:
    `python -m tests.guarantees loops`."""
    running = daemon(LOOPS.table(), settings=SETTINGS, start=False)
    figures = measure(running, LOOPS, restarts=2, seconds=0)
    sys.stdout.write(f"{figures.line()}\n")
    assert not figures.wrong(), figures.line()
    done = running.ctl("stop", "all")
    assert done.returncode == 0, done.stderr
    assert {info["state"] for info in running.status().values()} == {"STOPPED"}


# --- a pid that comes back ------------------------------------------------------------------------------------------


def _can_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def test_a_pid_that_is_given_again_is_somebody_elses() -> None:
    """Without cgroups: there pids and sessions are all that tells whose a process is."""
    if not _can_unshare():
        pytest.skip("to say which pid comes next needs a pid namespace: root, and unshare(1)")
    command = [sys.executable, "-m", "tests.guarantees", "reuse", "--no-cgroup"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=115, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

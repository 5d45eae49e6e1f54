"""The harness itself: tests that stand on it are worth nothing when it misses what a daemon left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import PORTS_OF_ONE, PROJECT, SUPERVISOR, RunningDaemon, User, command_line, free_port, wait_until

PLAIN = """
[program.plain]
command = ["${PYTHON}", "${PROGRAMS}/ready.py"]
"""

TABLE = f"""{PLAIN}
[program.forker]
command = ["${{PYTHON}}", "${{PROGRAMS}}/double_fork.py", "--clean"]
"""


def test_a_daemon_with_two_programs(daemon: MakeDaemon) -> None:
    running = daemon(TABLE)
    info = running.wait_for("plain")
    assert command_line(info["pid"]).endswith("ready.py")
    assert running.wait_for("forker")["pid"] != info["pid"]
    wait_until(lambda: f"ready {info['pid']}" in running.log("plain"), what="its output is in the log")
    assert running.ctl("status").returncode == 0
    assert {each["name"] for each in running.json("status")} == {"plain", "forker"}
    assert SUPERVISOR in command_line(running.supervisor_pid)
    assert running.stop() == 0
    assert running.leftovers() == []


def test_what_outlives_the_daemon_is_found_and_ended() -> None:
    running = RunningDaemon(TABLE)
    try:
        running.start()
        plain = running.wait_for("plain")["pid"]
        wait_until(lambda: "grandchild" in running.log("forker"), what="the grandchild runs")
        grandchild = int(running.log("forker").split("grandchild ")[1].split()[0])
        running.wait_for("forker")
        os.kill(running.supervisor_pid, signal.SIGSTOP)  # it can't tidy up when it notices that the keeper has gone
        os.kill(running.keeper_pid, signal.SIGKILL)
        assert running.stop() == -signal.SIGKILL
        left = {each.pid for each in running.leftovers()}
        assert {plain, grandchild} <= left
    finally:
        wrong = running.close()
    assert len([line for line in wrong if line.startswith("left behind: ")]) == len(left)
    wait_until(lambda: not running.leftovers(), what="close() has ended them")
    assert not running.folder.exists()


def test_an_ordinary_user_can_run_a_daemon(daemon: MakeDaemon, as_user: User) -> None:
    running = daemon(PLAIN, user=as_user)
    assert os.stat(f"/proc/{running.wait_for('plain')['pid']}").st_uid == as_user.uid


def test_wait_until_shows_what_it_saw_last() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the cow flies; last seen: 0"):
        wait_until(lambda: 0, 0.05, "the cow flies")


def test_wait_until_takes_a_failed_assert_for_not_yet() -> None:
    answers = iter([False, True])

    def predicate() -> str:
        assert next(answers)
        return "done"

    assert wait_until(predicate) == "done"


def test_no_other_process_gets_a_free_port_by_chance() -> None:
    """Neither tests that run beside these, nor somebody who connects."""
    mine = {free_port() for _ in range(PORTS_OF_ONE)}
    code = "from tests.harness import free_port; print(free_port())"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(done.stdout) not in mine
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in mine if first <= port <= last]

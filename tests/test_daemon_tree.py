"""`stop` and a crash leave no descendant, wherever it went: with cgroups and without."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until

WAYS = [pytest.param([], id="as-it-comes"), pytest.param(["--no-cgroup"], id="without-cgroup")]
KINDS = ["", "--clean", "--ignore-term", "--clean --ignore-term"]


def alive(pid: int) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def number(running: RunningDaemon, name: str, word: str) -> int:
    """The number that a program printed after `word`."""
    found = wait_until(lambda: re.findall(rf"{word} (\d+)", running.log(name)), what=f"{name} says {word}")
    return int(found[-1])


@pytest.mark.parametrize("arguments", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_stop_ends_a_double_forked_grandchild(daemon: MakeDaemon, arguments: list[str], kind: str) -> None:
    table = f"""
        [program.daemonish]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/double_fork.py {kind}"
        stop_timeout = "300ms"
        start_seconds = 0
        """
    running = daemon(table, start=False)
    running.start(*arguments)
    grandchild = number(running, "daemonish", "grandchild")
    running.wait_for("daemonish")
    assert alive(grandchild)
    assert running.ctl("stop", "daemonish").returncode == 0
    assert not alive(grandchild)


@pytest.mark.parametrize("arguments", WAYS)
def test_what_a_crashed_child_leaves_is_gone_before_its_successor_starts(
    daemon: MakeDaemon, arguments: list[str]
) -> None:
    table = """
        [program.daemonish]
        command = "${PYTHON} -S -E ${PROGRAMS}/double_fork.py --clean --ignore-term"
        restart_delay = 0.01
        start_seconds = 0
        """
    running = daemon(table, start=False)
    running.start(*arguments)
    grandchild = number(running, "daemonish", "grandchild")
    before = running.wait_for("daemonish")
    os.kill(before["pid"], signal.SIGKILL)

    def replaced() -> bool:
        now = running.status()["daemonish"]
        return bool(now["state"] == "RUNNING" and now["pid"] != before["pid"])

    wait_until(replaced)
    assert not alive(grandchild)


@pytest.mark.parametrize("arguments", WAYS)
def test_only_its_own_descendants_are_ended(daemon: MakeDaemon, arguments: list[str]) -> None:
    table = """
        [program.one]
        command = "${PYTHON} -S -E ${PROGRAMS}/double_fork.py --clean"
        [program.two]
        command = "${PYTHON} -S -E ${PROGRAMS}/double_fork.py --clean"
        """
    running = daemon(table, start=False)
    running.start(*arguments)
    first, second = number(running, "one", "grandchild"), number(running, "two", "grandchild")
    assert running.ctl("stop", "one").returncode == 0
    assert not alive(first)
    assert alive(second)


@pytest.mark.parametrize("arguments", WAYS)
def test_children_in_sessions_of_their_own_go_too(daemon: MakeDaemon, arguments: list[str]) -> None:
    table = """
        [program.many]
        command = "${PYTHON} -S -E ${PROGRAMS}/forker.py 20 --sessions"
        start_seconds = 0
        """
    running = daemon(table, start=False)
    running.start(*arguments)
    line = wait_until(lambda: re.search(r"ready .*\n", running.log("many")), what="it has forked")
    assert line is not None
    pids = [int(word) for word in line.group().split()[1:]]
    assert len(pids) == 21
    assert running.ctl("stop", "many").returncode == 0
    assert not [pid for pid in pids if alive(pid)]


def test_kill_main_leaves_the_others_alone(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.daemonish]
        command = "${PYTHON} -S -E ${PROGRAMS}/double_fork.py"
        kill = "main"
        start_seconds = 0
        """
    )
    grandchild = number(running, "daemonish", "grandchild")
    running.wait_for("daemonish")
    assert running.ctl("stop", "daemonish").returncode == 0
    try:
        assert alive(grandchild)
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_child_that_ignores_the_stop_signal_is_killed_at_stop_timeout(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.stubborn]
        command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
        stop_timeout = "200ms"
        """
    )
    number(running, "stubborn", "ready")
    pid = running.status()["stubborn"]["pid"]
    done = running.ctl("stop", "stubborn")
    assert done.returncode == 0
    assert not alive(pid)
    assert running.status()["stubborn"]["exit"]["signal"] == "SIGKILL"

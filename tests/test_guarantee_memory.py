"""What the keeper holds in memory for the next supervisor is damaged while it is needed: each time one comes up, says
what it sets aside, has the same children, and nothing stays stopped that nobody stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from procman.errors import ProcmanError
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until

STEADY = """
[program.steady]
command = "/bin/sleep 100000"
start_seconds = 0
"""
SLOW = """
[program.slow]
command = "${{PYTHON}} -S -E ${{PROGRAMS}}/ignore_term.py"
stop_timeout = "60s"
ready = {{ log = "ready" }}
environment = {{ VERSION = "{version}" }}
"""


def table(version: int) -> str:
    return STEADY + SLOW.format(version=version)


@pytest.fixture
def stopping(daemon: MakeDaemon) -> Iterator[Callable[..., RunningDaemon]]:
    """Makes a daemon in which `method` was called, with a `new` table, and has begun to stop what takes its time."""
    asked: list[threading.Thread] = []
    made: list[RunningDaemon] = []

    def make(method: str, new: str = table(2)) -> RunningDaemon:
        running = daemon(table(1))
        made.append(running)
        running.wait_for("steady")
        running.wait_for("slow")
        running.write_table(new)

        def ask() -> None:
            with contextlib.suppress(ProcmanError, OSError), running.client(60) as client:
                client.call(method)

        asked.append(threading.Thread(target=ask))
        asked[0].start()
        running.wait_for("slow", "STOPPING")
        return running

    yield make
    for running in made:
        if running.process is not None and running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            os.kill(running.wait_for("slow", "STOPPING")["pid"], signal.SIGKILL)  # nothing else ends it
            running.process.wait(30)
    for thread in asked:
        thread.join(60)
        assert not thread.is_alive()


def held(running: RunningDaemon, name: str) -> Path | None:
    """Where the keeper has the memory of this name open."""
    for path in Path(f"/proc/{running.keeper_pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(path).startswith(f"/memfd:procman-{name} "):
                return path
    return None


def spoil(running: RunningDaemon, name: str, content: bytes) -> None:
    """Writes `content` into what the keeper holds as `name`, once that is there, and ends the supervisor."""
    memory = wait_until(lambda: held(running, name), what=f"the keeper holds {name}")
    assert memory is not None
    old = running.supervisor_pid
    os.kill(old, signal.SIGSTOP)
    with open(memory, "r+b") as file:
        file.truncate(0)
        file.write(content)
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    wait_until(running.answers, 30)


def pid_of(running: RunningDaemon, name: str) -> Any:
    return running.status()[name]["pid"]


OLD_VERSION = json.dumps({"half": "halt", "why": "SIGHUP", "names": ["slow"]}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[[" * 5000, b"\0" * 4096, b"null", OLD_VERSION, b'{"half": "stop", "why": "x", "wanted": [[]]}'],
    ids=("empty", "torn", "deep", "zeros", "null", "another version", "wrong types"),
)
def test_a_damaged_change_is_set_aside_and_what_it_had_stopped_runs_again(
    stopping: Callable[[str], RunningDaemon], content: bytes
) -> None:
    running = stopping("daemon.reread")
    before = running.status()
    spoil(running, "change", content)
    assert "set aside" in running.said()
    assert pid_of(running, "steady") == before["steady"]["pid"]
    assert pid_of(running, "slow") == before["slow"]["pid"]
    os.kill(before["slow"]["pid"], signal.SIGKILL)
    wait_until(lambda: pid_of(running, "slow") not in (None, before["slow"]["pid"]), what="slow runs again")
    running.wait_for("slow")
    wait_until(lambda: held(running, "change") is None, what="it is let go")
    said = running.said().count("set aside")
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    wait_until(running.answers, 30)
    assert running.said().count("set aside") == said, "it is said once"
    assert pid_of(running, "steady") == before["steady"]["pid"]


@pytest.mark.parametrize("content", [b"", b'{"cwd": "/", "environ": {}, "answers": {"read": 5}}'])
def test_a_damaged_next_table_is_set_aside(stopping: Callable[..., RunningDaemon], content: bytes) -> None:
    running = stopping("daemon.reread", STEADY)  # what leaves is stopped before the new table is in force
    before = running.status()
    wait_until(lambda: held(running, "change"), what="the keeper holds the change")
    # Three tables are held, all of the same name: the next one is the only one without "slow".
    for path in Path(f"/proc/{running.keeper_pid}/fd").iterdir():
        if "procman-table" in os.readlink(path):
            with open(path, "r+b") as file:
                texts = json.loads(file.read())["answers"]["read"]
                if not any(b"VERSION" in base64.b85decode(text) for text in texts.values()):
                    file.truncate(0)
                    file.seek(0)
                    file.write(content)
                    break
    else:
        pytest.fail("the keeper holds no next table")
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    wait_until(running.answers, 30)
    assert "set aside" in running.said()
    assert pid_of(running, "steady") == before["steady"]["pid"]
    os.kill(before["slow"]["pid"], signal.SIGKILL)
    wait_until(lambda: pid_of(running, "slow") not in (None, before["slow"]["pid"]), what="slow runs again")
    running.wait_for("slow")


NO_ENDS = (b"", b"{", b"[]", b'{"why": "x", "exit_status": 300}', b'{"why": "x", "exit_status": "0"}', b'{"why": 1}')


@pytest.mark.parametrize("content", NO_ENDS)
def test_a_damaged_end_still_is_the_end(stopping: Callable[[str], RunningDaemon], content: bytes) -> None:
    """The state file says it too. The exit status is none that nobody can end with: the keeper would refuse it, and
    start one supervisor after another."""
    running = stopping("daemon.shutdown")
    state = running.folder / "state" / "state.json"
    wait_until(lambda: state.exists() and b'"closing":true' in state.read_bytes())
    slow = pid_of(running, "slow")
    spoil(running, "closing", content)
    assert "set aside" in running.said()
    assert pid_of(running, "slow") == slow
    os.kill(slow, signal.SIGKILL)
    assert running.process is not None
    assert running.process.wait(30) == 0

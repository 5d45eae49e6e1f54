"""A pid that is given to another process while the daemon still thinks of its old owner: nobody foreign is signalled.

    python -m tests.guarantees reuse [--no-cgroup]

It runs itself again as process 1 of a new pid namespace, where it may say which pid comes next. Needs root.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.harness import RunningDaemon, wait_until

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")

TABLE = """
[defaults]
start_seconds = 0
[program.old]
command = "${PYTHON} -S -E ${PROGRAMS}/leaves_one.py"
stop_timeout = "5s"
autostart = false
[program.new]
command = "/bin/sleep 1000"
autostart = false
"""


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 when a foreign process was hit."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees reuse")
    parser.add_argument("--no-cgroup", action="store_true")
    options = parser.parse_args(argv)
    if os.getpid() != 1:
        return subprocess.run(
            [*NAMESPACE, sys.executable, "-m", "tests.guarantees", "reuse", *argv], timeout=110, check=False
        ).returncode
    running = RunningDaemon(TABLE)
    try:
        running.start(*(["--no-cgroup"] if options.no_cgroup else []))
        _another_program(running)
        _a_stranger(running)
    finally:
        wrong = running.close()
    print("\n".join(wrong) or "no foreign process was signalled")
    return 1 if wrong else 0


def _another_program(running: RunningDaemon) -> None:
    """The pid goes to a program of the same daemon, while the old one is being stopped."""
    pid, orphan = _stopping(running)

    def start_new() -> int:
        _call(running, "start", "new")
        return int(running.wait_for("new")["pid"])

    _until_given(pid, start_new, lambda: _call(running, "stop", "new"))
    running.wait_for("old", "STOPPED", 30)
    assert not _lives(orphan), "what the old program had left is still there"
    running.ctl("signal", "KILL", "old")
    _call(running, "stop", "old")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers, 30)
    info = running.status()["new"]
    assert (info["pid"], info["state"]) == (pid, "RUNNING"), info
    _call(running, "stop", "new")


def _a_stranger(running: RunningDaemon) -> None:
    """The pid goes to a process that is none of the daemon's, and that leads a session of that number."""
    pid, orphan = _stopping(running)
    strangers: list[subprocess.Popen[bytes]] = []

    def start_stranger() -> int:
        strangers.append(subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True))
        return strangers[-1].pid

    def end_stranger() -> None:
        strangers[-1].kill()
        strangers.pop().wait()

    _until_given(pid, start_stranger, end_stranger)
    running.wait_for("old", "STOPPED", 30)
    assert not _lives(orphan), "what the old program had left is still there"
    running.ctl("signal", "KILL", "old")
    for verb in ("stop", "restart", "stop"):
        _call(running, verb, "old")
    assert running.stop() == 0
    assert strangers[-1].poll() is None, "the stranger was signalled"
    end_stranger()


def _stopping(running: RunningDaemon) -> tuple[int, int]:
    """`old` has been started and asked to stop: its main pid, which is free now, and the orphan that it has left."""
    _call(running, "start", "old")
    pid = int(running.status()["old"]["pid"])

    def orphan_said() -> int:
        words = [line.split() for line in running.log("old").splitlines()]
        return next((int(word[2]) for word in words if word[:2] == ["ready", str(pid)]), 0)

    orphan = wait_until(orphan_said, what="the program says its orphan's pid")
    _call(running, "stop", "old", wait=False)

    def main_has_gone() -> bool:
        info = running.status()["old"]
        return info["state"] == "STOPPING" and info["pid"] is None

    wait_until(main_has_gone, what="the main process has ended, the other one not")
    return pid, orphan


def _until_given(pid: int, start: Callable[[], int], end: Callable[[], object]) -> None:
    """Starts until what was started has `pid`: any other fork may come between."""
    for _ in range(20):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        if start() == pid:
            return
        end()
    raise AssertionError(f"pid {pid} was not given again")


def _call(running: RunningDaemon, verb: str, name: str, *, wait: bool = True) -> None:
    """Not by procmanctl: that would be a process, and take the pid."""
    with running.client(30) as client:
        client.call(verb, names=[name], wait=wait)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False

"""apply --previous also leads back in the life of another daemon: the last good tables are kept on disk."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until


def table(number: int, *, program: str = "sleep") -> str:
    """`job` with the argument `number`; another `program` is no good."""
    return f'[program.job]\ncommand = "{program} {number}"\nstart_seconds = 0.1\nrestart = "never"\n'


def argument(running: RunningDaemon) -> int:
    """What `job` runs with."""
    pid = running.wait_for("job")["pid"]
    return int(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1])


def kept(running: RunningDaemon) -> list[Path]:
    """The files in which tables are kept."""
    return sorted((running.folder / "state").glob("*-table.json"))


def apply(running: RunningDaemon, number: int) -> None:
    running.write_table(table(number))
    assert running.ctl("apply").returncode == 0


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_another_daemon_knows_the_way_back(daemon: MakeDaemon, ending: str) -> None:
    """To the last table that worked; one that failed does not count, however the daemon ended."""
    running = daemon(table(1001))
    running.wait_for("job")
    apply(running, 1002)
    running.write_table(table(1003, program="false"))
    assert running.ctl("apply").returncode == 1
    if ending == "stop":
        assert running.stop() == 0
    else:
        running.look()
        os.kill(running.keeper_pid, signal.SIGKILL)
        running._process().wait(10)
    running.start()
    assert argument(running) == 1002
    shown = running.ctl("apply", "--previous")
    assert shown.returncode == 0, shown.stderr
    assert running.status()["job"]["behind"] == []
    apply(running, 1004)
    running.stop()
    running.start()
    assert argument(running) == 1004
    assert running.ctl("apply", "--previous").returncode == 0
    assert argument(running) == 1002
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept(running))


def test_a_table_that_was_edited_while_no_daemon_ran(daemon: MakeDaemon) -> None:
    """The one before it is the last that worked; the supervisor may die meanwhile."""
    running = daemon(table(1001))
    running.wait_for("job")
    running.stop()
    running.write_table(table(1002))
    running.start()
    assert argument(running) == 1002
    running.stop()
    running.start()  # with the same table: the way back is the same
    before = running.supervisor_pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != before)
    wait_until(running.answers)
    assert running.ctl("apply", "--previous").returncode == 0
    assert argument(running) == 1001


def test_secrets_of_the_environment_are_not_written_down(daemon: MakeDaemon) -> None:
    """Only variables that the table names are."""
    running = daemon(table(1001).replace("1001", "${NUMBER}"), environment={"NUMBER": "1001", "TOKEN": "geheim"})
    running.wait_for("job")
    apply(running, 1002)
    assert not any("geheim" in path.read_text() for path in kept(running))
    running.stop()
    running.start()
    assert running.ctl("apply", "--previous").returncode == 0
    assert argument(running) == 1001


@pytest.mark.parametrize("content", [b"{", b'{"version": 1, "path": "/x"}'])
def test_a_kept_table_that_is_damaged(daemon: MakeDaemon, content: bytes) -> None:
    """The daemon starts, says what is wrong, and so does who asks for that table."""
    running = daemon(table(1001))
    running.wait_for("job")
    apply(running, 1002)
    running.stop()
    files = kept(running)
    assert len(files) == 2
    for path in files:
        path.write_bytes(content)
    running.start()
    running.wait_for("job")
    said = running.said()
    assert "-table.json" in said
    done = running.ctl("apply", "--previous")
    assert done.returncode == 1
    assert "there is no table before this one" in done.stderr
    assert "-table.json" in done.stderr
    apply(running, 1003)
    assert json.loads(kept(running)[0].read_text())["path"] == str(running.table)
    running.stop()
    running.start()
    assert running.ctl("apply", "--previous").returncode == 0
    assert argument(running) == 1002


def test_a_kept_table_that_others_may_write(daemon: MakeDaemon) -> None:
    """It would decide what root runs."""
    if os.geteuid() != 0:
        pytest.skip("only root has to mind that")
    running = daemon(table(1001))
    running.wait_for("job")
    apply(running, 1002)
    running.stop()
    for path in kept(running):
        path.chmod(0o666)
    running.start()
    done = running.ctl("apply", "--previous")
    assert done.returncode == 1
    assert "can be written by everybody" in done.stderr

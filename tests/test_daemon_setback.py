"""A reload or an apply that failed leaves a mark in `status`, until the next start, reload, or table that mends it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until


class Job:
    """A process whose release is a file that says how it ends; none: it stays."""

    def __init__(self, daemon: MakeDaemon, tmp_path: Path, more: str = 'reload = "overlap"') -> None:
        self.release = tmp_path / "release"
        self.more = more
        self.running: RunningDaemon = daemon(self.table())
        self.running.wait_for("job")

    def table(self, argument: str = "1000") -> str:
        command = f"test -e {self.release} && echo bad release && exit 3; exec sleep {argument}"
        return f"""
            [program.job]
            command = ["sh", "-c", "{command}"]
            start_seconds = 0.2
            {self.more}
        """

    def setback(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.running.status()["job"]["setback"]
        return found

    def why(self) -> str:
        """WHY of `procmanctl status`."""
        return self.running.ctl("status", "job").stdout.splitlines()[1]


def test_a_failed_reload_is_seen_until_one_goes_well(daemon: MakeDaemon, tmp_path: Path) -> None:
    job = Job(daemon, tmp_path)
    running = job.running
    assert job.setback() is None
    job.release.touch()
    assert running.ctl("reload", "job").returncode == 1
    found = job.setback()
    assert found is not None
    assert found["why"] == "the successor failed: exit status 3; rolled back"
    assert "autostart; at " in job.why()
    assert "the successor failed: exit status 3; rolled back" in job.why()
    assert "the successor failed: exit status 3; rolled back" in running.ctl("why", "job").stdout.splitlines()[0]
    before = running.supervisor_pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != before)
    wait_until(running.answers)
    assert job.setback() == found
    job.release.unlink()
    assert running.ctl("reload", "job").returncode == 0
    assert job.setback() is None


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_a_start_ends_it(daemon: MakeDaemon, tmp_path: Path, way: str) -> None:
    job = Job(daemon, tmp_path)
    job.release.touch()
    assert job.running.ctl("reload", "job").returncode == 1
    job.release.unlink()
    if way == "restart":
        assert job.running.ctl("restart", "job").returncode == 0
    else:
        pid = job.running.status()["job"]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: job.running.status()["job"]["pid"] not in (pid, None), 20)
    assert job.setback() is None


@pytest.mark.parametrize("reload", ["overlap", "restart"])
def test_an_apply_that_mends_it_ends_it(daemon: MakeDaemon, tmp_path: Path, reload: str) -> None:
    """Also where the table is what it was, and nothing has to start."""
    job = Job(daemon, tmp_path, f'reload = "{reload}"')
    running = job.running
    running.write_table(job.table("2000; exit 4").replace("exec sleep 2000", "false"))
    assert running.ctl("apply").returncode == 1
    found = job.setback()
    assert found is not None
    assert "exit status 4" in found["why"]
    assert "not as the table says: command" in job.why()
    running.write_table(job.table())
    pid = running.wait_for("job")["pid"]
    assert running.ctl("apply").returncode == 0
    assert running.status()["job"]["pid"] == pid
    assert job.setback() is None
    assert "exit status 4" not in job.why()
    assert "its new version" not in job.why()


def test_why_shows_what_has_failed_and_not_what_runs_on(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Both print into the same log."""
    job = Job(daemon, tmp_path)
    job.running.write_table(job.table().replace("exec sleep 1000", "while :; do echo well; sleep 0.01; done"))
    assert job.running.ctl("apply").returncode == 0
    job.release.touch()
    assert job.running.ctl("reload", "job").returncode == 1
    told = job.running.json("why", "job")
    assert told["output"] == ["bad release"]
    assert "last output of what has failed:\n  bad release\n" in job.running.ctl("why", "job").stdout
    job.release.unlink()
    assert job.running.ctl("reload", "job").returncode == 0
    assert "well" in job.running.json("why", "job")["output"]


def test_the_output_of_a_version_that_did_not_start_is_its_own(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Not that of the one before, nor of its way back."""
    job = Job(daemon, tmp_path, 'reload = "restart"')
    running = job.running
    running.write_table(job.table().replace("exec sleep", "echo as before; exec sleep"))
    assert running.ctl("apply").returncode == 0
    job.release.touch()
    running.write_table(job.table("2000").replace("exec sleep", "echo as before; exec sleep"))
    done = running.ctl("apply")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("  | ")] == ["  | bad release"]
    job.release.unlink()


def test_a_reload_by_a_command_that_fails(daemon: MakeDaemon, tmp_path: Path) -> None:
    job = Job(daemon, tmp_path, f'reload = ["test", "!", "-e", "{tmp_path}/release"]')
    job.release.touch()
    assert job.running.ctl("reload", "job").returncode == 1
    found = job.setback()
    assert found is not None
    assert "exit status 1" in found["why"]
    job.release.unlink()
    assert job.running.ctl("reload", "job").returncode == 0
    assert job.setback() is None

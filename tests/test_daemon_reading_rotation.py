"""procmanctl logs while the log is rotated and compressed: what was there when the command began comes whole."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, RunningDaemon, log_files, wait_until

FILE = 30_000
"""Bytes of a file: it is full after a twentieth of a second."""


def writing(daemon: MakeDaemon, keep: int) -> RunningDaemon:
    """A daemon whose program `w` has rotated its log at least 6 times, and goes on."""
    running = daemon(
        f"""
        [program.w]
        command = ["${{PYTHON}}", "-S", "-E", "${{PROGRAMS}}/paced_lines.py", "600000", "1000"]
        start_seconds = 0
        log = {{ max_size = {FILE}, keep = {keep} }}
        """
    )
    wait_until(lambda: rotations(running) >= 6, 20)
    return running


def rotations(running: RunningDaemon) -> int:
    count: int = running.json("show", "w")["log"][0]["rotations"]
    return count


def last_line(path: Path) -> int:
    """The number of the last line that is in the log now."""

    def found() -> str:
        data = path.read_bytes() if path.exists() else b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return lines[-1][:9].decode() if lines else ""

    return int(wait_until(found))


@contextmanager
def reading(running: RunningDaemon, by: str, *arguments: str, ctl: str = CTL) -> Iterator[subprocess.Popen[bytes]]:
    """A procmanctl that has looked at the files, and can't go on, for nobody reads what it prints."""
    where = ["-s", str(running.socket)]
    if by == "table":  # as where no daemon runs: it is not reachable there
        elsewhere = running.folder / "other.toml"
        elsewhere.write_text(running.table.read_text().replace(str(running.socket), f"{running.socket}.none"))
        where = ["-c", str(elsewhere)]
    command = [sys.executable, "-c", ctl, *where, "logs", *arguments, "w"]
    with subprocess.Popen(
        command, env=running.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 20)[0]
        yield process


def rotated(running: RunningDaemon, keep: int) -> None:
    """Waits until all files have another name, are compressed, or were removed by `keep`."""
    before = rotations(running)
    wait_until(lambda: rotations(running) >= before + 6, 30)
    files = running.log_dir / "w.log"
    wait_until(lambda: sum(file.suffix == ".gz" for file in log_files(files)) >= min(keep - 1, 8), 30)


def numbers(process: subprocess.Popen[bytes]) -> list[int]:
    """Those of the lines that it prints now; it has nothing to say of them, but that no time stands before them."""
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, [line for line in said.splitlines() if b"tell no time" not in line]) == (0, [])
    found = [int(line[:9]) for line in printed.splitlines()]
    assert found == list(range(found[0], found[0] + len(found)))
    return found


@pytest.mark.parametrize("keep", [1000, 3])
@pytest.mark.parametrize(
    ("by", "arguments"),
    [
        ("socket", ["-n", "300000"]),
        ("socket", ["-n", "300000", "-g", "[0-9]"]),
        ("table", ["--since", "2000-01-01"]),
    ],
    ids=["lines", "grep", "since"],
)
def test_a_slow_reader_gets_all_that_was_there(daemon: MakeDaemon, keep: int, by: str, arguments: list[str]) -> None:
    running = writing(daemon, keep)
    last = last_line(running.log_dir / "w.log")
    with reading(running, by, *arguments) as process:
        rotated(running, keep)
        found = numbers(process)
    assert found[-1] >= last
    assert found[0] == 0 if keep == 1000 else len(found) >= keep * FILE // 100


def test_a_reader_goes_on_with_the_next_supervisor(daemon: MakeDaemon) -> None:
    """Nothing is held for it then, so what was compressed is known again by its time, its size and its beginning."""
    running = writing(daemon, 1000)
    last = last_line(running.log_dir / "w.log")
    with reading(running, "socket", "-n", "300000") as process:
        os.kill(running.supervisor_pid, signal.SIGKILL)
        running.wait_for("w")
        rotated(running, 1000)
        found = numbers(process)
    assert found[0] == 0
    assert found[-1] >= last


def test_what_keep_has_removed_is_counted_and_nothing_is_called_damaged(daemon: MakeDaemon) -> None:
    """Where no file can be held: procmanctl has no descriptor for it. Of five files it has read three when the pipe is
    full, so some are lost even if the newest one was empty when it looked."""
    running = writing(daemon, 5)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); {CTL}"
    with reading(running, "table", "-n", "300000", ctl=limited) as process:
        rotated(running, 5)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 0
    words = rb"procmanctl: w: [0-9.]+ [kK]?B of its log, in [1-6] files?, were removed before they could be read .*\n"
    assert re.fullmatch(words, said), said
    found = [int(line[:9]) for line in printed.splitlines() if len(line) == 99]
    assert found == sorted(set(found))


def test_a_search_through_a_log_that_rotates_says_nothing_of_it(daemon: MakeDaemon) -> None:
    running = writing(daemon, 3)
    for arguments in (["-n", "300000", "-g", "nosuchthing"], ["--summary"], ["-n", "300000", "--level", "error"]):
        done = running.ctl("logs", *arguments, "w")
        assert (done.returncode, done.stderr) == (0, "")

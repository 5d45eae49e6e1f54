"""procmanctl logs -f on a real daemon, while `apply` has processes come and go and the supervisor is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, wait_until

TALKS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
ends = []
name = os.environ["PROCMAN_PROCESS"]
number = -1
while not ends:
    number += 1
    for part in (f"INFO {name} ", f"n{number} ", "end\\n"):
        sys.stdout.write(part)
        sys.stdout.flush()
        time.sleep(0.003)
    print(f"INFO {name}/err n{number} end", file=sys.stderr, flush=True)
"""
LINE = re.compile(r"INFO (\S+) n(\d+) end")


def table(program: str = "q", instances: int = 1, log: str = 'stderr = "discard"') -> str:
    """One that talks."""
    return f"""
[program.{program}]
command = "${{PYTHON}} -S -E talks.py"
start_seconds = 0
instances = {instances}
log = {{ {log} }}
"""


@pytest.fixture
def talking(daemon: MakeDaemon) -> RunningDaemon:
    """A daemon to be started, with talks.py beside its table."""
    running = daemon(table(), start=False)
    (running.folder / "talks.py").write_text(TALKS)
    return running


def begin(running: RunningDaemon, text: str) -> None:
    """Starts it with this table."""
    running.write_table(text)
    running.start()


def apply(running: RunningDaemon, text: str) -> None:
    """Has another table come into force."""
    running.write_table(text)
    done = running.ctl("apply")
    assert done.returncode == 0, done.stderr


class Follower:
    """A procmanctl logs -f."""

    def __init__(self, running: RunningDaemon, *arguments: str) -> None:
        self._out, self._err = running.folder / "followed.out", running.folder / "followed.err"
        command = [sys.executable, "-c", CTL, "-s", str(running.socket), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        assert "Traceback" not in self.said

    @property
    def shown(self) -> list[str]:
        """All whole lines so far."""
        assert self.process.poll() is None, self.said
        return self._out.read_text().split("\n")[:-1]

    @property
    def said(self) -> str:
        """What came on stderr."""
        return self._err.read_text()

    def now(self) -> int:
        """How many lines there are."""
        return len(self.shown)

    def wait_for(self, *names: str, after: int = 0, count: int = 5) -> None:
        """Lines of each of these."""
        for name in names:
            wait_until(lambda name=name: self.lines(name, after)[count:], 30, f"lines of {name}")  # type: ignore[misc]

    def lines(self, name: str, after: int = 0) -> list[str]:
        """Those of one log."""
        return [line for line in self.shown[after:] if f"INFO {name} " in line]


def assert_whole(lines: Sequence[str]) -> dict[str, list[int]]:
    """As soon as they have names, each line is one of one log; none is missing or comes twice. Of a log that was there
    the first one may be cut. Returns the numbers of each."""
    first = next(at for at, line in enumerate(lines) if " | " in line)
    found: dict[str, list[int]] = {}
    for line in lines[first:]:
        name, _, text = line.partition("|")
        name = name.rstrip()
        match = re.fullmatch(r" INFO (\S+) n(\d+) end", text)
        if match is None:
            assert text.endswith("end"), line
            assert name not in found, line
            found[name] = []
            continue
        assert match[1] == name
        number = int(match[2])
        assert not found.get(name) or number in (found[name][-1] + 1, 0), line
        found.setdefault(name, []).append(number)
    return found


WAYS = ["q", "-g INFO q", "--level info q", "--since 1h q", "--json q", "q other"]


@pytest.mark.parametrize("way", WAYS)
def test_logs_that_come_while_following(talking: RunningDaemon, way: str) -> None:
    """Standard error apart, then one more process."""
    other = table("other")
    begin(talking, table() + other)
    with Follower(talking, "logs", "-f", "-n", "0", *way.split()) as followed:
        followed.wait_for("q")
        apply(talking, table(log='stderr = "separate"') + other)
        followed.wait_for("q", "q/err", after=followed.now())
        apply(talking, table(instances=2, log='stderr = "separate"') + other)
        followed.wait_for("q:1", "q:1/err", "q:2", "q:2/err", after=followed.now())
        for name in ("q/err", "q:1", "q:2/err"):
            assert followed.said.count(f"procmanctl: {name}: followed, too, from now on\n") == 1
        assert "procmanctl: q: no log file holds its output now\n" in followed.said
        if "--json" in way:
            told = [json.loads(line) for line in followed.shown]
            streams = {(one["name"], one["stream"]) for one in told}
            assert streams == {(name, stream) for name in ("q", "q:1", "q:2") for stream in ("out", "err")}
        else:
            numbers = assert_whole(followed.shown)
            assert [numbers[name][0] for name in ("q/err", "q:1", "q:1/err", "q:2", "q:2/err")] == [0] * 5


def test_bytes_of_one_log_become_lines_with_names_when_another_comes(talking: RunningDaemon) -> None:
    begin(talking, table())
    with Follower(talking, "logs", "-f", "-n", "0", "q") as followed:
        followed.wait_for("q")
        assert LINE.fullmatch(followed.shown[3])
        apply(talking, table(instances=2))
        followed.wait_for("q:1", "q:2", after=followed.now())
        os.kill(talking.supervisor_pid, signal.SIGKILL)
        followed.wait_for("q:1", "q:2", after=followed.now(), count=50)
        apply(talking, table(instances=3))
        followed.wait_for("q:1", "q:2", "q:3", after=followed.now())
        shown = followed.shown
    first = next(at for at, line in enumerate(shown) if " | " in line)
    assert all(map(LINE.fullmatch, shown[1 : first - 1]))
    numbers = assert_whole(shown)
    assert [numbers[name][0] for name in ("q:1", "q:2", "q:3")] == [0] * 3


def test_the_number_of_processes_changes_and_the_supervisor_is_killed(talking: RunningDaemon) -> None:
    """2, 3, 1, a killed supervisor, 2: all that `logs q` would show comes."""
    begin(talking, table(instances=2))
    with Follower(talking, "logs", "-f", "-n", "0", "q") as followed:
        followed.wait_for("q:1", "q:2")
        apply(talking, table(instances=3))
        followed.wait_for("q:1", "q:2", "q:3", after=followed.now())
        assert "procmanctl: q:3: followed, too, from now on\n" in followed.said
        os.kill(talking.supervisor_pid, signal.SIGKILL)
        followed.wait_for("q:1", "q:2", "q:3", after=followed.now(), count=50)
        assert assert_whole(followed.shown)["q:3"][0] == 0
        apply(talking, table())
        followed.wait_for("q", after=followed.now())
        assert "procmanctl: q:3: no log file holds its output now\n" in followed.said
        os.kill(talking.supervisor_pid, signal.SIGKILL)
        followed.wait_for("q", after=followed.now(), count=50)
        apply(talking, table(instances=2))
        followed.wait_for("q:1", "q:2", after=followed.now())
        assert_whole(followed.shown)
        assert followed.said.count("the daemon has gone: waiting for it") == 2
        assert "q: the program table" not in followed.said


def test_a_process_that_came_and_was_silent_when_the_supervisor_was_killed(talking: RunningDaemon) -> None:
    """Its first lines are written while no supervisor tells of them."""
    waits = '[program.waits]\ncommand = "sh -c \'read line < fifo; echo INFO $line n0 end; sleep 99\'"\n'
    os.mkfifo(talking.folder / "fifo")
    begin(talking, table())
    with Follower(talking, "logs", "-f", "-n", "0") as followed:
        followed.wait_for("q")
        apply(talking, table() + waits)
        wait_until(lambda: "procmanctl: waits: followed, too" in followed.said)
        talking.wait_for("waits")
        followed.wait_for("q", after=followed.now(), count=50)
        supervisor = talking.supervisor_pid
        os.kill(supervisor, signal.SIGKILL)
        (talking.folder / "fifo").write_text("waits\n")
        followed.wait_for("waits", count=0)
        assert len(followed.lines("waits")) == 1


def test_a_program_comes_to_all_that_is_followed(talking: RunningDaemon) -> None:
    """And goes, and comes again; its name is no longer asked for by anybody meanwhile."""
    begin(talking, table("a"))
    with Follower(talking, "logs", "-f", "-n", "0") as followed:
        followed.wait_for("a")
        for _ in range(2):
            apply(talking, table("a") + table("b"))
            followed.wait_for("a", "b", after=followed.now())
            apply(talking, table("a"))
            wait_until(lambda: followed.said.endswith("procmanctl: b: no log file holds its output now\n"))
            followed.wait_for("a", after=followed.now())
        assert "the program table" not in followed.said


def test_a_name_that_leaves_the_table_is_waited_for(talking: RunningDaemon) -> None:
    """Whether others remain or not, and also when the supervisor is killed meanwhile."""
    begin(talking, table("a") + table("b") + table("c"))
    words = "procmanctl: {}: the program table has nothing of this name any more: waiting for it\n"
    with Follower(talking, "logs", "-f", "-n", "0", "a", "b") as followed:
        followed.wait_for("a", "b")
        apply(talking, table("b") + table("c"))
        wait_until(lambda: words.format("a") in followed.said)
        followed.wait_for("b", after=followed.now())
        apply(talking, table("c"))
        wait_until(lambda: words.format("b") in followed.said)
        os.kill(talking.supervisor_pid, signal.SIGKILL)
        wait_until(talking.answers, 20)
        apply(talking, table("a") + table("c"))
        followed.wait_for("a", after=followed.now())
        assert not followed.lines("c")
        for name in ("a", "b"):
            assert followed.said.count(words.format(name)) == 1


def test_a_name_of_nobody_is_an_error_at_the_beginning(talking: RunningDaemon) -> None:
    begin(talking, table())
    done = talking.ctl("logs", "-f", "q", "nobody")
    assert (done.returncode, done.stdout) == (4, "")
    assert "no such program: 'nobody'" in done.stderr

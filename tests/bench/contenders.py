"""What the benchmark asks of a process manager: `Contender`, each with a folder of its own, for a `with`.

All get the same programs, and keep a log file for each, rotated at 50 MB where they can, with standard error merged
into it where they can. The modules `procmand`, `pythonic`, `pm2` and `suites` have one class for each manager.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from uuid import uuid4

from tests.bench import tools
from tests.bench.machine import Ends, kill_all, marked, parent_of, run_timed, undisturbed, written_bytes
from tests.bench.wires import Wire
from tests.harness import command_line, descendants, wait_until

Programs = Mapping[str, Sequence[str]]
"""Commands by name."""

START_SECONDS, STOP_SECONDS = 120.0, 90.0
"""Bounds, not figures."""

LOG_BYTES = 50_000_000

MARK = "PROCMAN_BENCH_MARK"
"""A variable in the environment of all that a contender starts."""


class Contender(ABC):
    """A manager at work. Its programs tell themselves when they run (`machine.Starts`).

    `keep_logs` rotated files of each program, of `log_bytes`; `timestamps`: the time before each line; `compress` them,
    where it can (only procman does).
    """

    title: ClassVar[str]
    commands: ClassVar[Sequence[str]] = ()
    """What must be installed, by names of commands."""

    install: ClassVar[str] = ""
    """How that is done."""

    end_signal: ClassVar[signal.Signals] = signal.SIGTERM
    """Ends it and its programs in good order."""

    slow_restart: ClassVar[bool] = False
    """It takes seconds to start a program anew, as its loop or its rules say."""

    can_timestamp: ClassVar[bool] = True
    most: ClassVar[int] = 1_000_000
    """Programs."""

    def __init__(
        self,
        programs: Programs,
        *,
        keep_logs: int = 10,
        log_bytes: int = LOG_BYTES,
        timestamps: bool = False,
        compress: bool = False,
    ) -> None:
        self.programs = programs
        self.keep_logs, self.log_bytes, self.timestamps, self.compress = keep_logs, log_bytes, timestamps, compress
        self.folder = Path(tempfile.mkdtemp(prefix="pmb", dir="/tmp"))  # short: sockets stand in it
        self.mark = uuid4().hex
        self.logs = self.folder / "log"
        self.logs.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self.configure()

    @classmethod
    def missing(cls) -> str:
        """Why it can't be measured here and what to do, "" when it can."""
        absent = tools.missing(*cls.commands)
        return f"there is no {', '.join(absent)}: {cls.install}" if absent else ""

    @classmethod
    def version_argv(cls) -> Sequence[str]:
        """A command whose last line of output is its version."""
        return [tools.find(cls.commands[0]), "--version"]

    # What each one does in its own way

    @abstractmethod
    def configure(self) -> None:
        """Writes its configuration, as its documentation says."""

    @abstractmethod
    def argv(self) -> Sequence[str]:
        """What starts it."""

    @abstractmethod
    def status_argv(self) -> Sequence[str]:
        """The command that shows the state of all programs."""

    @abstractmethod
    def count_running(self, output: str) -> int:
        """How many run, by what that command printed."""

    @abstractmethod
    def operate_argv(self, verb: str) -> Sequence[str]:
        """The command that does "start" or "stop" with all programs, and waits for it."""

    def renew_argv(self, name: str) -> Sequence[str]:
        """The command that gives one program a new process, its best way."""
        raise NotImplementedError(f"{self.title}: {name}")

    def wire(self, name: str) -> Wire | None:
        """How to ask for the state of one program without a command, None when there is no way."""
        del name
        return None

    def own_pids(self) -> list[int]:
        """The manager's own processes."""
        return [self.main_pid]

    def watcher_pids(self) -> list[int]:
        """Those of them that look after programs."""
        return self.own_pids()

    @property
    def deciding_pid(self) -> int:
        """The process that decides what is started anew."""
        return self.main_pid

    @property
    def main_pid(self) -> int:
        """The first one: what a signal ends."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """Of the manager and its commands."""
        return tools.environment({"HOME": str(self.folder), MARK: self.mark})

    # What is the same for all

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> float:
        """Starts it, waits for nothing, and returns when that was, in monotonic seconds."""
        with (self.folder / "output").open("ab") as output:
            at = time.monotonic()
            self._process = subprocess.Popen(
                self.argv(), cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return at

    def said(self) -> str:
        """The last 2000 characters of its own output."""
        return (self.folder / "output").read_text(errors="replace")[-2000:]

    def ended(self) -> bool:
        """Whether its first process has gone."""
        return self._process is None or self._process.poll() is not None

    def run(self, argv: Sequence[str], timeout: float = STOP_SECONDS) -> tuple[float, str]:
        """Seconds from fork to end of one of its commands, and what it printed."""
        return run_timed(argv, self.environment(), timeout)

    def status(self) -> tuple[float, str]:
        """The same of the status command."""
        return self.run(self.status_argv())

    def operate(self, verb: str) -> float:
        """Seconds for "start" or "stop" of all programs, as a whole command."""
        return self.run(self.operate_argv(verb))[0]

    def wait_running(self, count: int, timeout: float = START_SECONDS) -> None:
        """Waits until its status command says that so many programs run."""
        what = f"{count} programs run under {self.title}"

        def reached() -> bool:
            if self.ended():
                raise RuntimeError(f"{self.title} ended:\n{self.said()}")
            found = self.count_running(self.status()[1])
            assert found == count, f"{found} run"
            return True

        wait_until(reached, timeout, what)

    def pid_of(self, command: Sequence[str]) -> int:
        """The pid of the program that was started as `command`."""
        wanted = " ".join(command)

        def found() -> int:
            return next((each.pid for each in descendants(self.main_pid) if command_line(each.pid) == wanted), 0)

        return wait_until(found, START_SECONDS, f"{wanted[:50]} runs under {self.title}")

    def taken_bytes(self, writers: Iterable[int]) -> int:
        """What the manager has taken of their output so far. A pipe holds so little that it does not count."""
        return sum(map(written_bytes, writers))

    def lost_bytes(self) -> int:
        """Output that did not reach a log and that the manager knows of."""
        return 0

    def trim(self) -> None:
        """Makes its logs short, if it does not itself."""
        return

    def stop(self, timeout: float = STOP_SECONDS) -> float:
        """Ends it in good order by a signal; seconds until all its processes and programs have gone. Raises TooSlow."""
        main = self.main_pid
        with Ends([main, *(child.pid for child in descendants(main))]) as ends:
            begun = time.monotonic()
            os.kill(main, self.end_signal)
            last = ends.wait(timeout, f"{self.title} did not end")
        if self._process is not None:
            self._process.wait(10)
        return last - begun

    def parent_pid(self, program: int) -> int:
        """The process of the manager that a program's end is told to."""
        return parent_of(program)

    def close(self) -> None:
        """Ends all that is left, the hard way, for many would take long; and removes its folder. Who ends the run
        meanwhile waits until this is done."""
        with undisturbed():
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
            wait_until(self._nothing_left, 60, f"nothing of {self.title} is left")
            if self._process is not None:
                self._process.wait(10)
            shutil.rmtree(self.folder)

    def _nothing_left(self) -> bool:
        left = marked(f"{MARK}={self.mark}")
        kill_all(left)
        return not left

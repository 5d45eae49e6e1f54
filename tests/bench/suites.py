"""s6 and runit in the benchmark: a folder for each service, a process that watches each, and a logger for each."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from tests.bench import tools
from tests.bench.contenders import Contender
from tests.harness import command_line, descendants


class Suite(Contender):
    """What the two have in common. Both say that a run script is any executable: here it is a shell script."""

    watcher: ClassVar[str]
    """The name of the process that looks after one service."""

    processes: ClassVar[frozenset[str]]
    """Names of the manager's own processes."""

    @classmethod
    def version_argv(cls) -> Sequence[str]:
        """As Debian knows it: they do not say it themselves."""
        return ["/bin/sh", "-c", f"dpkg-query -W -f '${{Version}}\n' {cls.title} 2>/dev/null"]

    def configure(self) -> None:
        self.services = self.folder / "services"
        self.services.mkdir()
        for name, command in self.programs.items():
            (self.services / name / "log").mkdir(parents=True)
            (self.logs / name).mkdir()
            self._script(self.services / name / "run", f"exec 2>&1\nexec {shlex.join(command)}")
            self._script(self.services / name / "log" / "run", f"exec {shlex.join(self.logger(self.logs / name))}")

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def logger(self, folder: Path) -> Sequence[str]:
        """The command of the logger that writes to `folder`."""
        raise NotImplementedError

    @property
    def folders(self) -> list[str]:
        """Of the services."""
        return [f"{self.services}/{name}" for name in self.programs]

    def own_pids(self) -> list[int]:
        return [self.main_pid, *self._called(self.processes)]

    def watcher_pids(self) -> list[int]:
        return self._called({self.watcher})

    def _called(self, names: Collection[str]) -> list[int]:
        below = (child.pid for child in descendants(self.main_pid))
        return [pid for pid in below if Path(command_line(pid).partition(" ")[0]).name in names]


class Svscan(Suite):
    """s6: s6-svscan, s6-supervise and s6-log."""

    title = "s6"
    commands = ("s6-svscan", "s6-svc", "s6-svstat", "s6-svwait", "s6-log")
    install = "Debian: apt install s6"
    slow_restart = True  # s6-supervise lets a second pass between two starts
    watcher = "s6-supervise"
    processes = frozenset({watcher, "s6-log"})

    def argv(self) -> Sequence[str]:
        most = str(max(500, 2 * len(self.programs) + 10))  # services; loggers count, and 500 is the default
        return [tools.find("s6-svscan"), "-c", most, str(self.services)]

    def logger(self, folder: Path) -> Sequence[str]:
        stamp = ["T"] if self.timestamps else []  # ISO 8601
        return [tools.find("s6-log"), f"n{self.keep_logs}", f"s{self.log_bytes}", *stamp, str(folder)]

    def status_argv(self) -> Sequence[str]:
        return _for_each("s6-svstat", self.folders)

    def count_running(self, output: str) -> int:
        return sum(line.startswith("up (") for line in output.splitlines())

    def operate_argv(self, verb: str) -> Sequence[str]:
        letter, wanted = {"start": ("-u", "-u"), "stop": ("-d", "-D")}[verb]
        wait = f'; exec "{tools.find("s6-svwait")}" {wanted} "$@"'
        return _for_each(f"s6-svc {letter}", self.folders, wait)

    def renew_argv(self, name: str) -> Sequence[str]:
        return [tools.find("s6-svc"), "-wR", "-r", f"{self.services}/{name}"]


class Runsvdir(Suite):
    """runit: runsvdir, runsv and svlogd."""

    title = "runit"
    commands = ("runsvdir", "sv", "svlogd")
    install = "Debian: apt install runit"
    end_signal = signal.SIGHUP  # SIGTERM ends runsvdir alone (runsvdir(8))
    most = 1000  # MAXSERVICES of runsvdir
    watcher = "runsv"
    processes = frozenset({watcher, "svlogd"})

    def configure(self) -> None:
        super().configure()
        for name in self.programs:
            (self.logs / name / "config").write_text(f"s{self.log_bytes}\nn{self.keep_logs}\n")

    def argv(self) -> Sequence[str]:
        return [tools.find("runsvdir"), "-P", str(self.services)]

    def logger(self, folder: Path) -> Sequence[str]:
        stamp = ["-tt"] if self.timestamps else []  # UTC, human readable
        return [tools.find("svlogd"), *stamp, str(folder)]

    def status_argv(self) -> Sequence[str]:
        return [tools.find("sv"), "status", *self.folders]

    def count_running(self, output: str) -> int:
        return sum(line.startswith("run:") for line in output.splitlines())

    def operate_argv(self, verb: str) -> Sequence[str]:
        return [tools.find("sv"), "-w", "60", verb, *self.folders]

    def renew_argv(self, name: str) -> Sequence[str]:
        return [tools.find("sv"), "-w", "60", "restart", f"{self.services}/{name}"]


def _for_each(command: str, folders: Sequence[str], after: str = "") -> Sequence[str]:
    """A shell that runs a command on each, for it takes one only."""
    program, _, options = command.partition(" ")
    loop = f'for service; do "{tools.find(program)}" {options} "$service"; done'
    return ["/bin/sh", "-c", loop + after, "sh", *folders]

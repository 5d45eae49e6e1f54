"""The two that are measured, under one interface: `Procmand` and `Supervisord`, each with a folder of its own.

Both get the same programs, both keep a log file for each, rotated at 50 MB, with standard error merged into it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.machine import kill_all, run_timed, wait_end
from tests.harness import CTL, PROJECT, RunningDaemon, command_line, descendants, wait_until

Programs = Mapping[str, Sequence[str]]
"""Commands by name."""

START_SECONDS, STOP_SECONDS = 60.0, 90.0
"""Bounds, not figures."""

SUPERVISORCTL = "import sys; from supervisor.supervisorctl import main; sys.exit(main())"
SUPERVISORD = "import sys; from supervisor.supervisord import main; sys.exit(main())"
"""What the scripts of the package say."""

RPC_FACTORY = "supervisor.rpcinterface:make_main_rpcinterface"


class Contender(ABC):
    """A manager at work, for a `with`. Its programs tell themselves when they run (`machine.Starts`)."""

    title = ""

    @abstractmethod
    def start(self) -> float:
        """Starts it, waits for nothing, and returns when that was, in monotonic seconds."""

    @abstractmethod
    def own_pids(self) -> list[int]:
        """The manager's own processes."""

    @abstractmethod
    def ctl(self, *arguments: str) -> tuple[float, str]:
        """Runs its command line tool ("status", "stop all", "start all"): seconds from fork to end, what it printed."""

    @abstractmethod
    def stop(self) -> float:
        """Ends it in good order by SIGTERM; seconds until its first process, and so all it ran, has gone."""

    @abstractmethod
    def close(self) -> None:
        """Ends all that is left, and removes its folder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_running(self, count: int) -> None:
        """Waits until its status command says that so many programs are RUNNING."""
        wait_until(
            lambda: self.ctl("status")[1].count("RUNNING") == count, START_SECONDS, f"{count} programs are RUNNING"
        )


class Procmand(Contender):
    """procman: keeper and supervisor. `sampling` is seconds between two samples of CPU and memory, 0: off."""

    title = "procman"

    def __init__(
        self, programs: Programs, *, sampling: int = 5, keep_logs: int = 10, log_mb: int = 50, compress: str = "gzip"
    ) -> None:
        parts = [f"[daemon.sampling]\ninterval = {sampling}"]
        for name, command in programs.items():
            argv = ", ".join(f'"{word}"' for word in command)
            log = f'max_size = "{log_mb}MB", keep = {keep_logs}, compress = "{compress}"'
            parts.append(f"[program.{name}]\ncommand = [{argv}]\nlog = {{ {log} }}")
        self._daemon = RunningDaemon("\n".join(parts))

    def start(self) -> float:
        at = time.monotonic()
        self._daemon.start(wait=False)
        return at

    def own_pids(self) -> list[int]:
        return [self._daemon.keeper_pid, self._daemon.supervisor_pid]

    def ctl(self, *arguments: str) -> tuple[float, str]:
        argv = [sys.executable, "-c", CTL, "-s", str(self._daemon.socket), *arguments]
        return run_timed(argv, {**os.environ, "PYTHONPATH": str(PROJECT)})

    @property
    def log_dir(self) -> Path:
        """Where the logs of programs are."""
        return self._daemon.log_dir

    def compressor_pids(self) -> list[int]:
        """The process that compresses rotated files; none while there is nothing to do."""
        return [seen.pid for seen in descendants(self._daemon.keeper_pid) if "compressor.py" in command_line(seen.pid)]

    def counters(self, name: str) -> dict[str, int]:
        """What became of the output of a program."""
        with self._daemon.client() as client:
            counters: dict[str, int] = client.call("show", name=name)["log"][0]
        return counters

    def lost_bytes(self, name: str) -> int:
        """Output of a program that did not reach its log."""
        return self.counters(name)["dropped"]

    def stop(self) -> float:
        process = self._daemon.process
        assert process is not None
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        return wait_end(process, STOP_SECONDS) - start

    def close(self) -> None:
        wrong = self._daemon.close()
        if wrong:
            raise RuntimeError("\n".join(wrong))


class Supervisord(Contender):
    """Supervisor, as its documentation configures it; in the foreground, as procmand is."""

    title = "Supervisor"

    def __init__(self, programs: Programs, *, keep_logs: int = 10, log_mb: int = 50) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pmb", dir="/tmp"))
        self._conf = self.folder / "supervisord.conf"
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "log").mkdir()
        self._conf.write_text(self._configuration(programs, keep_logs, log_mb))

    def _configuration(self, programs: Programs, keep_logs: int, log_mb: int) -> str:
        folder = self.folder
        parts = [
            f"[unix_http_server]\nfile={folder}/s.sock",
            f"[supervisord]\nnodaemon=true\nsilent=true\nlogfile={folder}/s.log\npidfile={folder}/s.pid",
            f"[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory={RPC_FACTORY}",
            f"[supervisorctl]\nserverurl=unix://{folder}/s.sock",
        ]
        for name, command in programs.items():
            rotation = f"stdout_logfile_maxbytes={log_mb}MB\nstdout_logfile_backups={keep_logs}"
            log = f"stdout_logfile={folder}/log/{name}.log\n{rotation}\nredirect_stderr=true"
            parts.append(f"[program:{name}]\ncommand={' '.join(command)}\nautorestart=true\n{log}")
        return "\n\n".join(parts) + "\n"

    def start(self) -> float:
        with (self.folder / "output").open("wb") as output:
            at = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISORD, "-c", str(self._conf)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return at

    def own_pids(self) -> list[int]:
        assert self._process is not None
        return [self._process.pid]

    def ctl(self, *arguments: str) -> tuple[float, str]:
        command = [sys.executable, "-c", SUPERVISORCTL, "-c", str(self._conf)]
        return run_timed([*command, *arguments], os.environ)

    def stop(self) -> float:
        assert self._process is not None
        start = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        return wait_end(self._process, STOP_SECONDS) - start

    def close(self) -> None:
        """It would take many seconds in good order: it is killed first, then what it ran."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)  # it must not start a program anew meanwhile
            below = descendants(self._process.pid)
            self._process.kill()
            self._process.wait()
            kill_all(child.pid for child in below if child.alive())
        shutil.rmtree(self.folder)


def main_pid(contender: Contender, command: str) -> int:
    """The pid of the program below `contender` whose executable is `command`."""

    def found() -> int:
        for own in contender.own_pids():
            for child in descendants(own):
                if _executable(child.pid) == os.path.realpath(command):
                    return child.pid
        return 0

    return wait_until(found, START_SECONDS, f"{command} runs")


def _executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""

"""What tests of the whole program stand on: a real daemon with a folder of its own, and waits that have a bound.

`RunningDaemon` starts `procmand` in the foreground and talks to it as users do. It remembers all that the daemon
started, so that `leftovers()` names what outlived it, even a grandchild in a session of its own with an empty
environment.
It knows nothing of procman's insides but the command lines of its two processes.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from procman.client import Client
from procman.errors import ProcmanError

Result = TypeVar("Result")

PROJECT = Path(__file__).resolve().parent.parent
PROGRAMS = PROJECT / "tests" / "programs"
MARK = "PROCMAN_TEST_MARK"
SUPERVISOR = "-m procman.daemon supervisor"
PORTS_OF_ONE = 500
CTL = "import sys; from procman.ctl.main import main; sys.exit(main())"


def wait_until(predicate: Callable[[], Result], timeout: float = 10.0, what: str = "") -> Result:
    """Asks every 10 ms until the answer is true, and returns it. A failed assert in `predicate` counts as "not yet".

    After `timeout` seconds it fails and shows the last answer.
    """
    end = time.monotonic() + timeout
    while True:
        last: object
        try:
            result = predicate()
            if result:
                return result
            last = result
        except AssertionError as error:
            last = error
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what or 'the condition'}; last seen: {last!r}")
        time.sleep(0.01)


@functools.cache
def _ports() -> Iterator[int]:
    """Ports of this process of the tests alone, again and again. The kernel gives none of them to a connection (see
    ip_local_port_range in Documentation/networking/ip-sysctl.rst of Linux, 32768 to 60999): with one of those that
    were free a moment ago a site did not start, for another test's client had got it."""
    for first in range(10_000, 32_000, PORTS_OF_ONE):
        mine = socket.socket(socket.AF_UNIX)
        try:
            mine.bind(f"\0procman tests: ports from {first}")  # nobody else can, until this process ends
        except OSError:
            mine.close()
            continue
        mine.detach()  # open as long as this process
        return itertools.cycle(range(first, first + PORTS_OF_ONE))
    raise AssertionError("all ports are those of other tests that run")


def free_port() -> int:
    """A TCP port that nobody uses now, on any address, and that nobody else gets by chance."""
    for port in itertools.islice(_ports(), PORTS_OF_ONE):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("each port of these tests is in use")


def log_files(path: Path) -> list[Path]:
    """A log and its rotated files, oldest first. Number N is `path.N` or `path.N.gz`; for a moment both, and the
    same."""
    found: dict[int, Path] = {}
    for file in sorted(path.parent.glob(f"{path.name}.[0-9]*"), reverse=True):  # N.gz, then N
        found[int(file.name[len(path.name) + 1 :].removesuffix(".gz"))] = file
    return [*(found[number] for number in sorted(found, reverse=True)), *([path] if path.exists() else [])]


def log_content(file: Path) -> bytes:
    """What is in one of `log_files`."""
    data = file.read_bytes()
    return gzip.decompress(data) if file.suffix == ".gz" else data


def whole_log(path: Path) -> bytes:
    """The log as a reader sees it; asked again where a file is renamed or compressed meanwhile."""

    def read() -> list[bytes]:
        try:
            return [b"", *(log_content(file) for file in log_files(path))]
        except FileNotFoundError:
            return []

    return b"".join(wait_until(read, what=f"{path} is at rest"))


@dataclass(frozen=True, slots=True)
class User:
    """An ordinary user to run things as: root's tests use `nobody`, others use themselves.

    `root` is a folder that the user can read: procman, what it needs, and tests/programs.
    """

    name: str
    uid: int
    gid: int
    python: str
    root: Path

    def run(self, *argv: str, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command as this user, with procman on its path, and returns what it wrote."""
        command = [self.python if word == "python" else word for word in argv]
        return subprocess.run(
            command, timeout=timeout, text=True, capture_output=True, check=False, **self.options(), **options
        )

    def options(self) -> dict[str, Any]:
        """Arguments for subprocess: who, where, and a small environment."""
        environment = {"PATH": os.defpath, "HOME": "/", "PYTHONPATH": f"{self.root}:{self.root}/site"}
        return {"env": environment, "cwd": "/", "stdin": subprocess.DEVNULL, **self.who()}

    def who(self) -> dict[str, Any]:
        """Arguments for subprocess that make the child this user."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if os.geteuid() == 0 else {}


class Installed(Protocol):
    """An environment of its own that procman is installed in (tests/installed.py)."""

    python: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A process that the daemon started: the pid, and when it began, for pids come again."""

    pid: int
    began: int

    def alive(self) -> bool:
        """Whether it still runs. One that only waits to be reaped does not."""
        stat = _stat(self.pid)
        return stat is not None and stat[19] == str(self.began) and stat[0] not in "ZX"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name (proc(5)): state, ppid, ... ; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def pids() -> Iterator[int]:
    """Every process of this machine."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def group(leader: int) -> set[int]:
    """The living processes of a process group; what only waits to be reaped is none."""
    stats = ((each, _stat(each)) for each in pids())
    return {each for each, stat in stats if stat and stat[2] == str(leader) and stat[0] not in "ZX"}


def descendants(pid: int) -> set[Seen]:
    """All processes below `pid`, as far as parents tell."""
    children: dict[int, list[Seen]] = {}
    for each in pids():
        stat = _stat(each)
        if stat:
            children.setdefault(int(stat[1]), []).append(Seen(each, int(stat[19])))
    found: set[Seen] = set()
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        todo += [child.pid for child in below]
        found.update(below)
    return found


def command_line(pid: int) -> str:
    """The argv of a process joined by spaces; "" when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class RunningDaemon:
    """A daemon under test with its table, and the commands to work it.

    `table` is the text of the program table without `[daemon]`; `settings` are lines for `[daemon]`. Two variables can
    be used in it: "${PYTHON}", the interpreter, and "${PROGRAMS}", the folder tests/programs.
    """

    def __init__(
        self,
        table: str,
        *,
        settings: str = "",
        user: User | None = None,
        environment: Mapping[str, str] | None = None,
        installed: Installed | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))  # short: sockets stand in it
        self.user = user
        self.installed = installed
        self.mark = uuid4().hex
        self.seen: set[Seen] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.table = self.folder / "procman.toml"
        self.socket = self.folder / "procman.sock"
        self.log_dir = self.folder / "log"
        self.output = self.folder / "daemon.out"
        self.output.touch()
        self.write_table(table, settings=settings)
        self.environment = self._make_environment(environment or {})
        if user:
            for path in (self.folder, self.table, self.output):
                os.chown(path, user.uid, user.gid)

    def _make_environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """That of the tests without what would lead the daemon to other folders and sockets."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PROCMAN_", "XDG_", "LISTEN_", "NOTIFY_", "WATCHDOG_"))
        }
        paths = f"{self.user.root}:{self.user.root}/site" if self.user else str(PROJECT)
        programs = self.user.root / "programs" if self.user else PROGRAMS
        own = {"PYTHONPATH": paths, "PYTHON": self.python, "PROGRAMS": str(programs), MARK: self.mark}
        if self.installed:
            del own["PYTHONPATH"]  # what is installed runs, not this checkout
            kept.pop("PYTHONPATH", None)
        return {**kept, "HOME": str(self.folder), **own, **more}

    @property
    def python(self) -> str:
        if self.installed:
            return self.installed.python
        return self.user.python if self.user else sys.executable

    def write_table(self, table: str, *, settings: str = "") -> None:
        """Puts another table in place of the present one. The daemon is not told."""
        own = f'socket = "{self.socket}"\nstate_dir = "{self.folder}/state"\nlog_dir = "{self.log_dir}"\n'
        self.table.write_text(f"[daemon]\n{own}{settings}\n{table}\n")

    # Life

    def start(self, *arguments: str, wait: bool = True, timeout: float = 20.0, prefix: Sequence[str] = ()) -> None:
        """Starts the daemon and waits until it answers `status`. `prefix`: a command that becomes procmand."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, self.python, "-m", "procman.daemon", "-c", str(self.table), *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **(self.user.who() if self.user else {}),
            )
        if wait:
            wait_until(self.answers, timeout, "procmand answers")

    def answers(self) -> bool:
        """Whether the daemon answers `status`. One that ended instead is an error at once, with what it said."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"procmand ended with {self.process.returncode}:\n{self.said()}")
        try:
            self.status()
        except ProcmanError:
            return False
        return True

    def stop(self, timeout: float = 30.0) -> int:
        """Ends the daemon by SIGTERM and returns its exit status (the one it had, if it has ended already)."""
        process = self._process()
        self.look()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout)

    def close(self) -> list[str]:
        """Ends all that is left and removes the folder. Returns what should not have been there, in words."""
        wrong = []
        if self.process is not None and self.process.poll() is None:
            try:
                status = self.stop()
                if status:
                    wrong.append(f"procmand ended with {status}:\n{self.said()}")
            except subprocess.TimeoutExpired:
                wrong.append(f"procmand did not end by SIGTERM:\n{self.said()}")
        for left in self.leftovers():
            wrong.append(f"left behind: {left.pid} {command_line(left.pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(left.pid, signal.SIGKILL)
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(10)
        shutil.rmtree(self.folder)
        return wrong

    # Questions

    def ctl(self, *arguments: str, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs procmanctl on this daemon, as whoever runs the tests."""
        command = [sys.executable, "-c", CTL, "-s", str(self.socket), *arguments]
        options = {"env": {**os.environ, "PYTHONPATH": str(PROJECT)}, "stdin": subprocess.DEVNULL, **options}
        return subprocess.run(command, timeout=timeout, text=True, capture_output=True, check=False, **options)

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """procmanctl, which goes on by itself; its stdout is all that it prints."""
        command = [sys.executable, "-c", CTL, "-s", str(self.socket), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        none, pipe, both = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, env=environment, stdin=none, stdout=pipe, stderr=both, text=True)

    def json(self, *arguments: str) -> Any:
        """What `procmanctl --json ...` prints, read. Only for commands that succeed."""
        done = self.ctl("--json", *arguments)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def client(self, timeout: float = 10.0) -> Client:
        """An RPC client of this daemon; use it in a `with`."""
        return Client(str(self.socket), timeout)

    def status(self) -> dict[str, dict[str, Any]]:
        """The ProcessInfo of each process, by name."""
        with self.client() as client:
            answer: list[dict[str, Any]] = client.call("status")
        return {info["name"]: info for info in answer}

    def wait_for(self, name: str, state: str = "RUNNING", timeout: float = 10.0) -> dict[str, Any]:
        """Waits until process `name` is in `state` and returns its ProcessInfo."""

        def reached() -> dict[str, Any]:
            info = self.status()[name]
            assert info["state"] == state, info
            return info

        try:
            return wait_until(reached, timeout, f"{name} is {state}")
        finally:
            self.look()

    def log(self, name: str) -> str:
        """What program `name` has written to its log file so far."""
        path = self.log_dir / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self) -> str:
        """What the daemon itself wrote to its stdout and stderr: its last 4000 characters."""
        return self.output.read_text(errors="replace")[-4000:]

    # Processes

    def _process(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "the daemon was not started"
        return self.process

    @property
    def keeper_pid(self) -> int:
        """The daemon in the foreground is the keeper."""
        return self._process().pid

    @property
    def supervisor_pid(self) -> int:
        """The keeper's child that is the supervisor. Waits for it: after a crash there is none for a moment."""

        def found() -> int:
            below = (seen.pid for seen in descendants(self.keeper_pid))
            return next((pid for pid in below if SUPERVISOR in command_line(pid)), 0)

        return wait_until(found, what="a supervisor runs")

    def look(self) -> None:
        """Remembers what now runs below the daemon, for leftovers()."""
        if self.process is not None:
            self.seen |= descendants(self.process.pid)

    def leftovers(self) -> list[Seen]:
        """What of all that this daemon started still runs: seen below it, or carrying its mark in the environment."""
        marked = set()
        for pid in pids():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            stat = _stat(pid)
            if f"{MARK}={self.mark}".encode() in environment.split(b"\0") and stat:
                marked.add(Seen(pid, int(stat[19])))
        return sorted((each for each in self.seen | marked if each.alive()), key=lambda each: each.pid)

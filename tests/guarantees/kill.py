"""The supervisor is killed again and again under load, and nobody notices.

One daemon runs the built-in server, gunicorn and uWSGI, each over a socket that procman holds, and a program that
writes numbered lines. Its supervisor gets SIGKILL every 300 ms, most times before it is ready. (Where a new process
needs more than a quarter of that to begin, because the machine is busy: every four times that.) Meanwhile clients ask
all three, and every byte of the log is compared with what the program wrote, as its files are rotated. Promised: no
request fails, no line is lost, doubled or torn, nothing is restarted, and the daemon answers at the end. Nor does the
program have to wait: it writes at the rate that it was given, or as fast as it does on this machine when nobody is
killed. That is measured in the same run, before the kills and after them, beside as much work for the processors; and
so is how soon a new process could begin to read, for nobody reads before that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import SUPERVISOR, RunningDaemon, command_line, descendants, free_port, wait_until
from tests.loss.load import load
from tests.loss.servers import SITES
from tests.loss.tally import Tally
from tests.programs.blocks import BLOCK, LINES, block

SERVERS = {
    "builtin": 'server = "wsgi"\nthreads = 4',
    "gunicorn": 'server = "gunicorn"\nworkers = 2\nthreads = 4',
    "uwsgi": 'server = "uwsgi"\nworkers = 2',
}
CLOSES = ("uwsgi",)  # its "http" protocol ends each connection, without saying so
LOG_FILE_SIZE = 16 * 1024 * 1024
BACK_SECONDS = 40.0
"""Within this time after the last kill the daemon must answer. Generous: the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Options:
    """How long, how often (both in seconds), how many connections for each server and requests a second on each, and
    how many MB (10^6 bytes) of lines a second. While the supervisor is killed, at least `share` of what is
    possible must be written. What is possible is measured for `calibrate` seconds, twice."""

    seconds: float = 60.0
    every: float = 0.3
    connections: int = 8
    rate: float = 20.0
    megabytes: float = 50.0
    share: float = 0.8
    calibrate: float = 5.0


@dataclass(frozen=True, slots=True)
class Without:
    """What was while nobody killed the supervisor: MB of lines a second, and how many seconds after its start a new
    process could begin to read."""

    rate: float
    begins: float

    def possible(self, every: float) -> float:
        """MB a second that can be written in spite of kills: what waits in the first quarter is made up for."""
        return self.rate * min(1.0, max(0.0, 1 - self.begins / every) / 0.75)


@dataclass(slots=True)
class Result:
    """What was seen. `problems` is empty when the promise was kept."""

    seconds: float = 0.0
    kills: int = 0
    supervisors: int = 0
    requests: dict[str, Tally] = field(default_factory=dict)
    blocks: int = 0
    files: int = 0
    longest_write: float = 0.0
    rate: float = 0.0
    every: float = 0.0
    without: list[Without] = field(default_factory=list)
    possible: float = 0.0
    back_after: float = 0.0
    restarts: int = 0
    counters: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The figures, each as a short line."""
        yield f"kills {self.kills}, one each {self.every:.2f} s, supervisors started {self.supervisors}"
        for name, tally in self.requests.items():
            yield f"{name}: {tally.line()}"
        size = f"bytes {self.blocks * BLOCK}, files {self.files}"
        yield f"lines {self.blocks * LINES}, {size}"
        yield f"{self.rate:.1f} MB/s while the supervisor was killed, of {self.possible:.1f} that are possible"
        for each in self.without:
            yield f"without kills {each.rate:.1f} MB/s; a new process begins to read after {each.begins:.2f} s"
        yield f"longest wait of a write {self.longest_write:.2f} s, the daemon answered after {self.back_after:.2f} s"
        yield f"restarts {self.restarts}, counters of the log: {self.counters}"


class LogCheck:
    """Compares a log and its rotated files with the blocks that were written, as they come, and frees the disk.

    A rotated file that was compared is emptied, not removed: the daemon renames them, and we must not race it. None is
    compressed: what the kernel moves is what is compared.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = 0
        self.position = 0
        self.problem = ""
        self._done: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def start(self) -> None:
        """Compares from now on, in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def finish(self, blocks: int) -> None:
        """Compares what is left, the current file too, with `blocks` blocks in all. The program has ended."""
        while not self.problem and self._next_file():
            pass
        if not self.problem and self.path.exists():
            with self.path.open("rb", buffering=0) as file:
                self._compare(file.fileno())
        if not self.problem and self.position != blocks * BLOCK:
            self.problem = f"the log ends at byte {self.position}, {blocks * BLOCK} were written"

    def _follow(self) -> None:
        while not self.problem and not self._stop.wait(0.1):
            while not self.problem and self._next_file():
                pass

    def _expected(self, at: int) -> bytes:
        """What comes at byte `at`, up to the end of its block."""
        return block(at // BLOCK)[at % BLOCK :]

    def _next_file(self) -> bool:
        """Looks for the rotated file that goes on where we are, and compares it. They are renamed under us, so it is
        known by how it begins."""
        for path in self.path.parent.glob(f"{self.path.name}.[0-9]*"):
            with contextlib.suppress(FileNotFoundError), path.open("r+b", buffering=0) as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode not in self._done and file.read(16) == self._expected(self.position)[:16]:
                    self._done.add(inode)
                    self.files += 1
                    file.seek(0)
                    self._compare(file.fileno())
                    file.truncate(0)
                    return True
        return False

    def _compare(self, fd: int) -> None:
        while not self.problem:
            expected = self._expected(self.position)
            found = os.read(fd, len(expected))
            if not found:
                return
            if found != expected[: len(found)]:
                same = next(at for at, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other)
                shown = f"{found[same : same + 80]!r}, not {expected[same : same + 80]!r}"
                self.problem = f"the log differs at byte {self.position + same}: {shown}"
                return
            self.position += len(found)


def table(ports: dict[str, int], folder: Path, megabytes: float) -> str:
    """The program table: three servers with one application, and the program that writes."""
    servers = "".join(
        f'[program.{name}]\n{SERVERS[name]}\napp = "numbered_site:app"\nlisten = "127.0.0.1:{port}"\n'
        f'directory = "{SITES}"\n'
        for name, port in ports.items()
    )
    return f"""{servers}
        [program.lines]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/blocks.py {megabytes} {folder}/written"
        stop_timeout = "60s"
        restart = "never"
        log = {{ path = "{folder}/lines.log", max_size = {LOG_FILE_SIZE}, keep = 10000, compress = "none" }}
        """


def kill(running: RunningDaemon, before: int) -> int:
    """Kills the supervisor, and returns its pid; 0 when there is none, or it is the one that was killed `before`."""
    below = (seen.pid for seen in descendants(running.keeper_pid))
    pid = next((pid for pid in below if SUPERVISOR in command_line(pid)), 0)
    if pid in (0, before):
        return 0
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        if SUPERVISOR not in command_line(pid):  # the pid might be somebody else's by now
            return 0
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    finally:
        os.close(handle)
    return pid


def keep_killing(running: RunningDaemon, seconds: float, every: float, check: LogCheck) -> int:
    """Kills at fixed times, or as soon as there is somebody to kill. Returns how many were."""
    start = time.monotonic()
    kills, pid, at = 0, 0, every
    while at <= seconds and not check.problem:
        time.sleep(max(0.0, start + at - time.monotonic()))
        pid = wait_until(functools.partial(kill, running, pid), BACK_SECONDS, "another supervisor runs")
        kills += 1
        at = max(at + every, time.monotonic() - start)
    return kills


def run(options: Options) -> Result:
    """See the module."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="pmkill", dir=memory if os.access(memory, os.W_OK) else None))
    ports = {name: free_port() for name in SERVERS}
    # As an installed procman: a supervisor need not compile its modules each time.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    running = RunningDaemon(table(ports, folder, options.megabytes), environment=compiled)
    result = Result()
    try:
        running.start(timeout=60)
        _load(running, options, ports, folder, result)
    finally:
        result.problems += running.close()
        shutil.rmtree(folder)
    return result


def _load(running: RunningDaemon, options: Options, ports: dict[str, int], folder: Path, result: Result) -> None:
    names = (*ports, "lines")
    before = {name: running.wait_for(name, timeout=60) for name in names}
    check = LogCheck(folder / "lines.log")
    check.start()
    start = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            loads = {
                name: stack.enter_context(
                    load(
                        f"127.0.0.1:{port}",
                        modes=("get/close",) if name in CLOSES else ("get", "get/close"),
                        connections=options.connections,
                        rate=options.rate,
                        limit=options.seconds + 10 * BACK_SECONDS,
                    )
                )
                for name, port in ports.items()
            }
            rate = functools.partial(Rate, before["lines"]["pid"])
            result.without.append(kill_others(rate(), options, running.environment))
            result.every = max(options.every, 4 * result.without[0].begins)
            killing = rate()
            result.kills = keep_killing(running, max(options.seconds, 5 * result.every), result.every, check)
            result.rate, ended = killing.megabytes(), time.monotonic()
            wait_until(running.answers, BACK_SECONDS, "the daemon answers after the last kill")
            result.back_after = time.monotonic() - ended
            result.without.append(kill_others(rate(), options, running.environment))
            result.possible = min(options.megabytes, *(each.possible(result.every) for each in result.without))
            if result.rate < options.share * result.possible:
                slow = f"{result.rate:.1f} MB/s of lines, of {result.possible:.1f} that are possible"
                result.problems.append(f"the program had to wait: {slow}")
        result.seconds = time.monotonic() - start
        after = running.status()
        _judge(before, after, result)
        _end_of_lines(running, folder, check, result)
    finally:
        check.stop()
    result.requests = {name: each.result.total for name, each in loads.items()}
    for name, tally in result.requests.items():
        if tally.failed or not tally.requests:
            shown = "; ".join(f"{failure.at:.3f} s {failure.kind} {failure.detail}" for failure in tally.failures[:5])
            result.problems.append(f"{name}: {tally.failed} of {tally.requests} requests: {shown}")


class Rate:
    """How much a process writes, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid, self._began, self._before = pid, time.monotonic(), bytes_written(pid)

    def megabytes(self) -> float:
        """MB (10^6 bytes) a second so far."""
        return (bytes_written(self._pid) - self._before) / 1e6 / (time.monotonic() - self._began)


STAND_IN = "import procman.interim; print(flush=True); import procman.supervise, time; time.sleep(60)"
"""As much work as a supervisor has that is killed soon. It says when it could begin to read what programs print."""


def kill_others(rate: Rate, options: Options, environment: Mapping[str, str]) -> Without:
    """What is written while nothing of the daemon is killed. Other processes are: the processors have as much to do."""
    command = [sys.executable, "-P", "-c", STAND_IN]
    end = time.monotonic() + options.calibrate
    begins = []
    while time.monotonic() < end:
        began = time.monotonic()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as other:
            assert other.stdout is not None
            other.stdout.readline()
            begins.append(time.monotonic() - began)
            time.sleep(max(0.0, options.every - begins[-1]))
            other.kill()
    return Without(rate.megabytes(), sum(begins) / len(begins))


def bytes_written(pid: int) -> int:
    """What a process has given to write(2) so far: wchar of /proc/PID/io (proc(5))."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def _judge(before: dict[str, Any], after: dict[str, Any], result: Result) -> None:
    for name in before:
        for key in ("pid", "state", "restarts", "started_at"):
            if after[name][key] != before[name][key]:
                result.problems.append(f"{name}: {key} was {before[name][key]}, is {after[name][key]}")
        result.restarts += after[name]["restarts"]


def _end_of_lines(running: RunningDaemon, folder: Path, check: LogCheck, result: Result) -> None:
    """Stops the program that writes, and compares the last of its lines and the daemon's counters."""
    result.supervisors = running.json("daemon", "status")["supervisor_starts"]
    done = running.ctl("stop", "lines", timeout=90)
    if done.returncode:
        result.problems.append(f"stop lines: {done.stderr}")
    blocks, longest = wait_until((folder / "written").read_text, 30).split()
    result.blocks, result.longest_write = int(blocks), float(longest)
    check.stop()
    check.finish(result.blocks)
    result.files = check.files
    if check.problem:
        result.problems.append(check.problem)
    counters = running.json("show", "lines")["log"][0]
    result.counters = {key: counters[key] for key in ("read", "written", "dropped", "held")}
    # Not compared with what the program wrote: a count lives in memory, and is on disk after the next change of state.
    if counters["read"] != counters["written"] + counters["dropped"] + counters["held"] or counters["dropped"]:
        result.problems.append(f"the counters of the log do not agree: {result.counters}")


def main(argv: list[str]) -> int:
    """`python -m tests.guarantees kill`: prints the figures; 1 when the promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees kill", description=__doc__.partition("\n")[0])
    plain = Options()
    parser.add_argument("--seconds", type=float, default=plain.seconds)
    parser.add_argument("--every", type=float, default=plain.every, help="seconds between two kills")
    parser.add_argument("--connections", type=int, default=plain.connections, help="for each of the three servers")
    parser.add_argument("--rate", type=float, default=plain.rate, help="requests a second on each connection; 0: all")
    parser.add_argument("--megabytes", type=float, default=plain.megabytes, help="of lines in a second")
    parser.add_argument("--share", type=float, default=plain.share, help="of them that must be written in spite of all")
    parser.add_argument("--calibrate", type=float, default=plain.calibrate, help="seconds without kills, twice")
    options = Options(**vars(parser.parse_args(argv)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing is left behind
    result = run(options)
    for line in (*result.lines(), *(f"BROKEN {problem}" for problem in result.problems)):
        sys.stdout.write(f"{line}\n")
    return 1 if result.problems else 0

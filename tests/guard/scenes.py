"""Fixed scenes with a real daemon, and what is counted in them: modules, messages, bytes and system calls.

Nothing here is a matter of seconds. What is idle is idle because nobody asks: the heartbeat of keeper and supervisor is
longer than a scene, and nothing is sampled.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from procman.daemon import CRASH_VARIABLE
from tests.guard import calls
from tests.guard.baseline import Count
from tests.harness import CTL, RunningDaemon, free_port, wait_until

PYTHON = ".".join(platform.python_version_tuple()[:2])
IDLE = 100
"""Programs that do nothing, beside those that are looked at."""

TIMES = 10
"""How often the same is done, and counted together: what happens at the same moment falls out differently."""

TRIES = 3
IDLE_SECONDS = 2.0
HEADER = "import time: self [us] | cumulative | imported package"
PROGRAMS = """
[program.one]
command = "sleep 100000"
start_seconds = 0
autostart = false

[program.lines]
command = "sh -c 'exec cat <>fifo'"
start_seconds = 0
log = { max_size = 0 }
"""
SITE = """
[program.site]
command = "${PYTHON} -S -E ${PROGRAMS}/http_one.py"
listen = "127.0.0.1:PORT"
ready = { http = "/" }
start_seconds = 0
"""
MANY = f"""
[program.idle]
command = "sleep 100000"
start_seconds = 0
instances = {IDLE}
"""


@contextmanager
def running(table: str, **environment: str) -> Iterator[RunningDaemon]:
    """A daemon that is left alone."""
    found = RunningDaemon(table, settings="[daemon.sampling]\ninterval = 0\n", environment=environment)
    os.mkfifo(found.folder / "fifo")
    try:
        found.start("--heartbeat", "1000")
        found.wait_for("lines")
        yield found
    finally:
        wrong = found.close()
    if wrong:
        raise RuntimeError("\n".join(wrong))


def run() -> tuple[list[Count], list[str]]:
    """All counts, and why some are missing."""
    why = calls.missing()
    left_out = [f"no system calls are counted: {why}"] if why else []
    return [*modules(), *messages(), *bytes_and_calls(with_calls=not why)], left_out


# --- modules ----------------------------------------------------------------------------------------------------------


def modules() -> list[Count]:
    """What is imported by whom (-X importtime)."""
    with running(PROGRAMS, PYTHONPROFILEIMPORTTIME="1") as found:
        keeper, supervisor = found.output.read_text().split(HEADER)[1:3]
        command = [sys.executable, "-c", CTL, "-s", str(found.socket)]
        environment = found.environment | {"PYTHONPROFILEIMPORTTIME": "1"}
        said = {
            words: subprocess.run(
                [*command, *words.split()], env=environment, capture_output=True, text=True, check=True
            ).stderr
            for words in ("status", "logs lines", "logs lines one")
        }
    imported = {f"procmanctl {words}": text for words, text in said.items()}
    imported |= {"the keeper": keeper, "the supervisor": supervisor}
    return [count for who, text in imported.items() for count in _modules(who, text)]


def _modules(who: str, output: str) -> list[Count]:
    names = {line.rsplit("|", 1)[1].strip() for line in output.splitlines() if line.startswith("import time:")}
    roots = Counter(name.partition(".")[0] for name in names)
    library = sum(count for root, count in roots.items() if root in sys.stdlib_module_names)
    return [
        Count(f"modules of procman that {who} imports", roots["procman"]),
        Count(f"modules of the standard library that {who} imports", library, python=PYTHON),
    ]


# --- messages ---------------------------------------------------------------------------------------------------------


def messages() -> list[Count]:
    """What the supervisor crosses (`procman.crossing`) for one program: messages to and from the keeper, and writes of
    the state file."""
    counts: list[Count] = []
    with tempfile.NamedTemporaryFile(prefix="pmg", dir="/tmp") as numbers:
        log = Path(f"{numbers.name}.log")
        try:
            table = PROGRAMS + SITE.replace("PORT", str(free_port()))
            with running(table, **{CRASH_VARIABLE: numbers.name}) as found, found.client(60.0) as client:
                found.wait_for("site")
                for verb, name in (("start", "one"), ("restart", "one"), ("stop", "one"), ("reload", "site")):
                    _settled(log)
                    before = log.read_bytes()
                    client.call(verb, names=[name])
                    _settled(log)
                    crossed = Counter(_kinds(log.read_bytes()[len(before) :]))
                    spare = int(verb == "reload")  # two changes at one moment are one write, or two
                    counts += [
                        Count(f"messages to the keeper for a {verb}", crossed["tell"]),
                        Count(f"messages from the keeper for a {verb}", crossed["hear"]),
                        Count(f"writes of the state file for a {verb}", crossed["state renamed"], spare=spare),
                    ]
        finally:
            log.unlink(missing_ok=True)
    return counts


def _kinds(lines: bytes) -> Iterator[str]:
    for line in lines.decode().splitlines():
        name = line.partition(" ")[2]
        yield name if name.startswith("state ") else name.partition(" ")[0]


def _settled(log: Path) -> None:
    """Waits until nothing has been crossed for a while."""
    size, since = -1, time.monotonic()

    def quiet() -> bool:
        nonlocal size, since
        if log.stat().st_size != size:
            size, since = log.stat().st_size, time.monotonic()
        return time.monotonic() > since + 0.3

    wait_until(quiet, 30)


# --- bytes and system calls -------------------------------------------------------------------------------------------


def bytes_and_calls(*, with_calls: bool) -> list[Count]:
    """With a hundred programs that do nothing: what one question, one restart, one line, and nothing at all cost."""
    with running(PROGRAMS + MANY) as found:
        wait_until(lambda: all(info["state"] == "RUNNING" for name, info in found.status().items() if name != "one"))
        with found.client() as client:
            answer = json.dumps(client.call("status"))
        counts = [Count(f"bytes of the status of {IDLE + 2} processes", len(answer), 0.05)]
        return counts + (_calls(found) if with_calls else [])


def _calls(found: RunningDaemon) -> list[Count]:
    supervisor, keeper = found.supervisor_pid, found.keeper_pid
    writer = found.status()["lines"]["pid"]

    def restarts() -> None:
        with found.client(60.0) as client:
            for _ in range(TIMES):
                client.call("restart", names=["one"])

    with found.client(60.0) as client:  # who hangs up is work too: not before the idle seconds are over
        client.call("start", names=["one"])
        idle = [
            _count("calls of the supervisor in two idle seconds", supervisor, lambda: time.sleep(IDLE_SECONDS), 0.0),
            _count("calls of the keeper in two idle seconds", keeper, lambda: time.sleep(IDLE_SECONDS), 0.0),
        ]
    return [
        *idle,
        _count(f"calls of the supervisor for {TIMES} restarts", supervisor, restarts, 0.15),
        _count(f"calls of the keeper for {TIMES} restarts", keeper, restarts, 0.4),
        _count(f"calls of the supervisor for {len(LINES)} lines, one by one", supervisor, _one_by_one(found), 0.1),
        _count("calls of the supervisor for 600 lines at once", supervisor, _at_once(found, writer), 0.3),
    ]


LINES = [f"{number:03} {'x' * 95}\n" for number in range(100)]


def _count(name: str, pid: int, scene: Callable[[], object], slack: float) -> Count:
    """The least of `TRIES`: what falls into the scene by chance is no part of it."""

    def total() -> int:
        with calls.counted(pid) as made:
            scene()
        return made.total

    return Count(name, min(total() for _ in range(TRIES)), slack, python=PYTHON)


def _one_by_one(found: RunningDaemon) -> Callable[[], None]:
    def scene() -> None:
        _write(found, LINES)

    return scene


def _at_once(found: RunningDaemon, writer: int) -> Callable[[], None]:
    """Who passes them on may run again only when all of them wait for it: then it reads, and writes, once."""

    def scene() -> None:
        os.kill(writer, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(writer).status() == psutil.STATUS_STOPPED)
        _write(found, ["".join(LINES * 6)], waiting=lambda: os.kill(writer, signal.SIGCONT))

    return scene


def _write(found: RunningDaemon, pieces: Sequence[str], waiting: Callable[[], object] = lambda: None) -> None:
    """`waiting()` is called when a piece is in the pipe."""
    path = found.log_dir / "lines.log"
    size = path.stat().st_size if path.exists() else 0
    with (found.folder / "fifo").open("wb", buffering=0) as fifo:
        for piece in pieces:
            assert fifo.write(piece.encode()) == len(piece)
            waiting()
            size += len(piece)
            wait_until(lambda: path.exists() and path.stat().st_size >= size, what="the line is in the log")  # noqa: B023

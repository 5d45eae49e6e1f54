"""The machine runs out of descriptors, processes or memory: the daemon says so, goes on, and recovers by itself."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procman.client import Client
from procman.errors import ConfigError
from tests.conftest import MakeDaemon
from tests.faults import FORKS, Faults
from tests.harness import RunningDaemon, User, wait_until

NOFILE, NPROC = resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC

PLAIN = """
    [program.plain]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    start_seconds = 0
    [program.lines]
    command = "sh -c 'while read line; do echo $line; done <> fifo'"
    start_seconds = 0
    """

ADDED = """
    [program.added]
    command = "${PYTHON} -S -E ${PROGRAMS}/notify.py"
    ready = { notify = true }
    start_retries = 1
    restart_delay = "100ms"
    restart_delay_max = "200ms"
    """


@contextlib.contextmanager
def limited(running: RunningDaemon, pid: int, what: int, soft: int) -> Iterator[None]:
    """Lowers a soft limit of a running process for a while (prlimit(2)). It may end meanwhile."""

    def set_soft(value: int) -> None:
        if running.user is None:
            resource.prlimit(pid, what, (value, hard))
            return
        # Even root may only do that to its own processes, without CAP_SYS_RESOURCE.
        code = f"import resource; resource.prlimit({pid}, {what}, ({value}, {hard}))"
        done = running.user.run("python", "-S", "-E", "-c", code)
        if done.returncode and "ProcessLookupError" in done.stderr:
            raise ProcessLookupError
        assert done.returncode == 0, done.stderr

    limits = Path(f"/proc/{pid}/limits").read_text()
    name = {NOFILE: "Max open files", NPROC: "Max processes"}[what]
    words = limits.partition(name)[2].split()[:2]
    before, hard = (resource.RLIM_INFINITY if word == "unlimited" else int(word) for word in words)
    set_soft(soft)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            set_soft(before)


def highest(pid: int) -> int:
    """The highest descriptor that a process has open."""
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def crowded(running: RunningDaemon, pid: int, free: int) -> Iterator[None]:
    """So many clients that ask nothing that `free` numbers are left of the supervisor `pid`."""
    limit = resource.prlimit(pid, NOFILE)[0]

    def left() -> int:
        """Of several looks the largest number: a file that is just being written is open for a moment only."""
        used = (sum(int(name) < limit for name in os.listdir(f"/proc/{pid}/fd")) for _ in range(10))
        return limit - min(used)

    def sockets() -> int:
        found = 0
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
        return found

    def more_sockets_than(count: int) -> bool:
        return sockets() > count

    with contextlib.ExitStack() as stack:
        while left() > free:
            before = min(sockets() for _ in range(10))
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(running.socket))
            wait_until(functools.partial(more_sockets_than, before), 30, "the client is let in")
        yield


def begin(daemon: MakeDaemon, table: str = PLAIN, **options: Any) -> RunningDaemon:
    """A daemon whose program `lines` repeats what it is told by `say`."""
    running = daemon(table, start=False, **options)
    fifo = running.folder / "fifo"
    os.mkfifo(fifo)
    if running.user:
        os.chown(fifo, running.user.uid, running.user.gid)
    running.start()
    running.wait_for("lines")
    return running


def say(running: RunningDaemon, text: str) -> None:
    """Lets `lines` print a line; it is in its log soon."""
    fd = os.open(running.folder / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)
    wait_until(lambda: f"{text}\n" in running.log("lines"), 30, f"{text} in the log")


def info(client: Client, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = client.call("status", names=[name])
    return found[0]


def problems(client: Client) -> str:
    return "\n".join(client.call("daemon.status")["problems"])


def no_problems(client: Client) -> bool:
    """For `wait_until`, which shows what was wrong last."""
    assert problems(client) == ""
    return True


def reread(client: Client) -> bool:
    """Whether the table was read. The state file may have taken the last descriptor just then: that changes nothing."""
    try:
        return bool(client.call("daemon.reread")["added"] == ["added"])
    except ConfigError as error:
        assert "Too many open files" in str(error)
        return False


def test_no_descriptor_in_the_supervisor(daemon: MakeDaemon) -> None:
    running = begin(daemon)
    lines = running.wait_for("lines")["pid"]
    say(running, "before")
    wait_until(lambda: running.log("plain"), what="all log files are open: a restart needs no more descriptors")
    supervisor = running.supervisor_pid
    with running.client(30) as client:
        client.call("status")
        with limited(running, supervisor, NOFILE, highest(supervisor) + 4), crowded(running, supervisor, free=2):
            wait_until(lambda: "the supervisor:" in problems(client), 30)
            assert client.call("restart", names=["plain"])[0]["ok"]
            say(running, "meanwhile")
            running.write_table(PLAIN + ADDED)
            wait_until(lambda: reread(client), 30, "the table is read with what two descriptors allow")
            wait_until(lambda: "Too many open files" in info(client, "added")["why"], 30)
            # More tries than start_retries allows to a program that fails itself.
            wait_until(lambda: info(client, "added")["restarts"] > 3, 30)
            assert info(client, "added")["state"] in ("BACKOFF", "STARTING")
            with crowded(running, supervisor, free=0), socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(str(running.socket))
                wait_until(lambda: "no new client can be let in" in running.said(), 30)
                wait_until(lambda: "state file" in problems(client), 30)
            assert info(client, "lines")["pid"] == lines
        wait_until(lambda: info(client, "added")["state"] == "RUNNING", 30)
        wait_until(lambda: no_problems(client), 30)
    assert running.supervisor_pid == supervisor
    assert running.output.read_text().count("no new client can be let in") <= 2  # not at each try
    assert "Traceback" not in running.output.read_text()
    assert running.ctl("status").returncode == 0
    say(running, "after")
    pid = running.status()["added"]["pid"]
    os.kill(supervisor, signal.SIGKILL)  # its successor knows the table that could not be handed over at first
    wait_until(lambda: running.supervisor_pid != supervisor)
    assert running.wait_for("added")["pid"] == pid
    assert running.log("lines") == "before\nmeanwhile\nafter\n"


def test_no_descriptor_in_the_keeper(daemon: MakeDaemon) -> None:
    running = begin(daemon)
    before = running.status()
    say(running, "before")
    with limited(running, running.keeper_pid, NOFILE, highest(running.keeper_pid) + 2):
        os.kill(before["plain"]["pid"], signal.SIGKILL)
        wait_until(lambda: "Too many open files" in running.status()["plain"]["why"], 30)
        wait_until(lambda: "the keeper:" in "".join(running.json("daemon", "status")["problems"]), 30)
        running.write_table(PLAIN + ADDED)
        running.ctl("daemon", "reread")
        say(running, "meanwhile")
        old = running.supervisor_pid
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: "can't start a supervisor: Too many open files" in running.said(), 30)
    wait_until(running.answers, 30)
    running.wait_for("plain", timeout=30)
    assert running.status()["lines"]["pid"] == before["lines"]["pid"]
    say(running, "after")
    assert running.ctl("daemon", "reread").returncode == 0
    running.wait_for("added", timeout=30)
    assert running.log("lines") == "before\nmeanwhile\nafter\n"


def test_a_small_first_limit_is_no_obstacle_to_a_new_supervisor(daemon: MakeDaemon) -> None:
    """The snapshot brings more descriptors than the soft limit that procmand was started with; the hard one counts."""
    running = daemon(
        """
        [program.many]
        command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
        start_seconds = 0
        instances = 3
        [program.idle]
        command = "true"
        autostart = false
        instances = 40
        """,
        start=False,
    )
    soft, hard = resource.getrlimit(NOFILE)
    resource.setrlimit(NOFILE, (64, hard))
    try:
        running.start()
    finally:
        resource.setrlimit(NOFILE, (soft, hard))
    before = {name: running.wait_for(name, timeout=30)["pid"] for name in ("many:1", "many:2", "many:3")}
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old, 30)
    wait_until(running.answers, 30)
    assert {name: running.status()[name]["pid"] for name in before} == before
    assert running.json("daemon", "status")["supervisor_starts"] == 2


def no_fork(running: RunningDaemon, client: Client, why: str) -> None:
    """What must hold while the keeper can't fork."""
    os.kill(running.wait_for("plain")["pid"], signal.SIGKILL)
    wait_until(lambda: why in info(client, "plain")["why"], 30)
    wait_until(lambda: info(client, "plain")["restarts"] > 3, 30)  # start_retries is 1
    assert info(client, "plain")["state"] in ("BACKOFF", "STARTING")
    say(running, "meanwhile")
    assert why in running.said()
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: f"can't start a supervisor: {why}" in running.said(), 30)


def all_is_well_again(running: RunningDaemon, lines: int) -> None:
    """Without a restart of the daemon, and with the program that nobody touched."""
    wait_until(running.answers, 40)
    running.wait_for("plain", timeout=30)
    say(running, "after")
    assert running.wait_for("lines")["pid"] == lines
    assert running.log("lines") == "meanwhile\nafter\n"
    with running.client(30) as client:
        wait_until(lambda: no_problems(client), 30)


STUBBORN = PLAIN + """
    [defaults]
    start_retries = 1
    restart_delay = "50ms"
    restart_delay_max = "100ms"
    """


def test_no_process_for_the_keeper(daemon: MakeDaemon, as_user: User) -> None:
    """RLIMIT_NPROC, which does not bind root: fork(2) gives EAGAIN."""
    running = begin(daemon, STUBBORN, user=as_user)
    lines = running.wait_for("lines")["pid"]
    with running.client(30) as client, limited(running, running.keeper_pid, NPROC, 0):
        no_fork(running, client, "Resource temporarily unavailable")
    all_is_well_again(running, lines)


def test_no_thread_for_the_supervisor(daemon: MakeDaemon, as_user: User) -> None:
    running = begin(daemon, user=as_user)
    supervisor = running.supervisor_pid
    with limited(running, supervisor, NPROC, 0):
        done = running.ctl("why", "lines")
        assert "can't start new thread" in done.stderr
        assert done.returncode == 1
        assert "can't start new thread" in running.ctl("daemon", "reread").stderr
        assert running.ctl("restart", "plain").returncode == 0
        assert running.json("daemon", "status")["problems"] == []
        say(running, "meanwhile")
    assert running.ctl("why", "lines").returncode == 0
    assert running.ctl("daemon", "reread").returncode == 0
    assert running.supervisor_pid == supervisor


def test_no_memory_for_a_fork(daemon: MakeDaemon) -> None:
    running = daemon(STUBBORN, start=False)
    os.mkfifo(running.folder / "fifo")
    with Faults(running.folder, running.python, *FORKS) as faults:
        running.start(prefix=faults.prefix)
        lines = running.wait_for("lines")["pid"]
        keeper = running.keeper_pid
        faults.rule = lambda asked: errno.ENOMEM if asked.pid == keeper else 0
        with running.client(30) as client:
            no_fork(running, client, "Cannot allocate memory")
        faults.rule = lambda asked: 0
        all_is_well_again(running, lines)
        assert running.stop() == 0


ONLY_TOLD = """
    [program.told]
    command = "${PYTHON} -S -E ${PROGRAMS}/notify.py"
    ready = { notify = true }
    log.mode = "discard"
    autostart = false
    start_timeout = "1h"
    restart_delay = "100ms"
    restart_delay_max = "200ms"
    start_retries = 1
    """


def lowest_free(pid: int) -> int:
    """The number that the kernel would give to the next descriptor of a process."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in itertools.count() if number not in used)


def tables(pid: int) -> set[bytes]:
    """The different tables that the keeper `pid` holds: the first one, and the one that is in force."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("/memfd:procman-table"):
                found.add(Path(f"/proc/{pid}/fd/{name}").read_bytes())
    return found


@pytest.mark.parametrize("room", [2, 48], ids=["for nothing", "for a child"])
def test_no_descriptor_in_the_keeper_for_a_notification_socket(daemon: MakeDaemon, room: int) -> None:
    """The supervisor opens one, the keeper refuses to hold it. Clients that come then get its number, and are served;
    the start fails for want of descriptors, again and again, until it works. With some more room the keeper would start
    a child that could never say that it is ready."""
    running = begin(daemon)
    supervisor, keeper = running.supervisor_pid, running.keeper_pid
    before = running.status()
    held = len(os.listdir(f"/proc/{keeper}/fd"))
    limit = lowest_free(keeper) + room + (held if room > 32 else 0)
    with limited(running, keeper, NOFILE, limit):
        running.write_table(PLAIN + ONLY_TOLD)
        assert running.ctl("daemon", "reread", timeout=30).returncode == 0
        wait_until(lambda: "no file descriptor is free to hold notify/told" in running.said(), 30)
        for _ in range(20):
            assert running.status()["told"]["state"] == "STOPPED"  # a client of its own each time
        done = running.ctl("start", "told", timeout=30)
        assert done.returncode == 1
        why = "no descriptor is held as 'notify/told'" if room > 32 else "Too many open files"
        assert why in done.stderr
        with running.client(30) as client:
            # More tries than start_retries allows to a program that fails itself.
            wait_until(lambda: info(client, "told")["restarts"] > 3, 30)
            assert info(client, "told")["state"] in ("BACKOFF", "STARTING")
        for name in ("plain", "lines"):
            assert running.status()[name]["pid"] == before[name]["pid"]
    running.wait_for("told", timeout=30)
    assert running.supervisor_pid == supervisor
    assert "Traceback" not in running.output.read_text()
    with running.client(30) as client:
        wait_until(lambda: no_problems(client), 30)
    pid = running.status()["told"]["pid"]
    wait_until(lambda: len(tables(keeper)) == 2, 30, "the keeper has the table, too, that it had no room for")
    os.kill(supervisor, signal.SIGKILL)  # the keeper holds the socket now
    wait_until(lambda: running.supervisor_pid != supervisor)
    assert running.wait_for("told")["pid"] == pid
    assert running.ctl("restart", "told").returncode == 0
    assert running.status()["told"]["pid"] != pid

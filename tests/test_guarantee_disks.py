"""Disks that are full, broken, read-only or dead: programs go on, the daemon says so, and recovers by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.answers import p99, p99_below
from tests.conftest import MakeDaemon
from tests.faults import HANG, Asked, Faults
from tests.harness import RunningDaemon, User, wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")

LINES = """
    [program.lines]
    command = "sh -c 'while read line; do echo $line; done <> fifo'"
    start_seconds = 0
    log = { path = "disk/lines.log" }
    """

PLAIN = """
    [program.plain]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    start_seconds = 0
    """


def prepared(daemon: MakeDaemon, table: str, user: User | None = None) -> RunningDaemon:
    """A daemon that is not started yet, whose program `lines` logs to the folder `disk`."""
    running = daemon(table, start=False, user=user)
    os.mkfifo(running.folder / "fifo")
    for name in ("disk", "state"):
        (running.folder / name).mkdir(mode=0o700)
    if user:
        for name in ("fifo", "disk", "state"):
            os.chown(running.folder / name, user.uid, user.gid)
    return running


def start_with_mounts(running: RunningDaemon, *commands: str) -> Path:
    """Starts it in a mount namespace of its own, in which `commands` have been run: nothing is left on the machine.
    Returns the daemon's folder as the daemon sees it."""
    script = "; ".join(["set -e", f"cd {running.folder}", *commands, 'exec "$@"'])
    probe = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    if subprocess.run([*probe, "true"], check=False, timeout=30, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    running.start(prefix=probe)
    return Path(f"/proc/{running.keeper_pid}/root{running.folder}")


def inside(running: RunningDaemon, *command: str) -> None:
    """Runs a command in the daemon's mount namespace."""
    subprocess.run(["nsenter", "-t", str(running.keeper_pid), "-m", *command], check=True, timeout=30)


def say(running: RunningDaemon, text: str) -> None:
    """Lets `lines` print a line."""
    fd = os.open(running.folder / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def counters(running: RunningDaemon, name: str = "lines") -> dict[str, Any]:
    with running.client(30) as client:
        found: dict[str, Any] = client.call("show", name=name)["log"][0]
    return found


def problems(running: RunningDaemon) -> str:
    with running.client(30) as client:
        return "\n".join(client.call("daemon.status")["problems"])


def said_until(running: RunningDaemon, text: str, done: Callable[[], object]) -> int:
    """Says `text` again and again until `done`; returns how many bytes that were."""
    count = 0

    def once_more() -> object:
        nonlocal count
        say(running, text)
        count += len(text) + 1
        return done()

    wait_until(once_more, 30)
    return count


def accounted_for(running: RunningDaemon, log: Path, bytes_said: int) -> None:
    """read = written + dropped, all of it; the file holds what was written, and says what was dropped."""
    wait_until(lambda: counters(running)["read"] == bytes_said, 30)
    found = counters(running)
    assert found["read"] == found["written"] + found["dropped"]
    assert found["dropped"] > 0
    assert found["unreported"] == 0
    text = log.read_text()
    told = re.findall(r"^procman: (\d+) bytes of output were dropped: .*\n", text, re.M)
    assert sum(map(int, told)) == found["dropped"]
    own = re.sub(r"^procman: .*\n", "", text, flags=re.M)
    # A line that the full disk cut gets an end, so that what procman says is a line of its own.
    assert found["written"] <= len(own) <= found["written"] + len(told)


def a_bad_disk(running: RunningDaemon, why: str, log: Path, state: Path, break_it: Callable[[], object]) -> int:
    """What must hold while log and state file can't be written. Returns how many bytes `lines` printed."""
    plain = running.wait_for("plain")["pid"]
    said = said_until(running, "good", lambda: log.exists() and "good\n" in log.read_text())
    break_it()
    said += said_until(running, "x" * 200, lambda: counters(running)["dropped"] > 2000)
    assert why in counters(running)["error"]
    assert running.ctl("restart", "plain").returncode == 0
    wait_until(lambda: why in "".join(re.findall("state file.*", problems(running))), 30)
    wait_until(lambda: f"lines: its output is not written: {why}" in problems(running), 30)
    assert running.wait_for("plain")["pid"] != plain
    assert json.loads(state.read_text())["version"] == 1  # an old one, whole
    return said


def a_good_disk_again(running: RunningDaemon, log: Path, state: Path, said: int) -> None:
    supervisor = running.supervisor_pid
    wait_until(lambda: counters(running)["unreported"] == 0, 30, "the log tells what was dropped")
    said += said_until(running, "again", lambda: "again\n" in log.read_text())
    wait_until(lambda: json.loads(state.read_text())["processes"]["plain"]["generation"] == 2, 30)
    wait_until(lambda: not problems(running), 30)
    accounted_for(running, log, said)
    assert running.supervisor_pid == supervisor


@as_root
@pytest.mark.parametrize("lacking", ["bytes", "inodes"])
def test_a_full_disk(daemon: MakeDaemon, lacking: str) -> None:
    running = prepared(daemon, LINES + PLAIN)
    options = {"bytes": "size=256k", "inodes": "size=1m,nr_inodes=8"}[lacking]
    mounted = start_with_mounts(
        running, f"mount -t tmpfs -o {options},mode=700 tmpfs disk", "mkdir disk/state", "mount --bind disk/state state"
    )
    disk = mounted / "disk"
    log, state = disk / "lines.log", disk / "state/state.json"
    wait_until(state.exists)
    fillers: list[Path] = []

    def fill() -> None:
        if lacking == "inodes":
            log.rename(disk / "moved")  # an open file needs none, but the next one does
        with contextlib.suppress(OSError):
            while len(fillers) < 1000:
                fillers.append(disk / f"filler{len(fillers)}")
                fillers[-1].write_bytes(bytes(50_000 if lacking == "bytes" else 0))
        with contextlib.suppress(OSError), fillers[0].open("ab", buffering=0) as file:
            while lacking == "bytes":
                file.write(bytes(500))

    said = a_bad_disk(running, "No space left on device", log, state, fill) if lacking == "bytes" else 0
    if lacking == "inodes":
        said_until(running, "good", log.exists)
        before = counters(running)["read"]
        fill()
        said_until(running, "x", lambda: counters(running)["dropped"] > 0)
        assert running.ctl("restart", "plain").returncode == 0
        wait_until(lambda: "No space left" in "".join(re.findall("state file.*", problems(running))), 30)
        assert before < counters(running)["read"]
    for filler in fillers:
        filler.unlink(missing_ok=True)
    if lacking == "bytes":
        a_good_disk_again(running, log, state, said)
    else:
        said_until(running, "again", lambda: log.exists() and "were dropped: No space" in log.read_text())
        wait_until(lambda: json.loads(state.read_text())["processes"]["plain"]["generation"] == 2, 30)
        wait_until(lambda: not problems(running), 30)


def test_a_broken_disk(daemon: MakeDaemon) -> None:
    """EIO: of splice(2) and pwrite(2) to the log, of fsync(2) of the state file."""
    running = prepared(daemon, LINES + PLAIN)
    log, state = running.folder / "disk/lines.log", running.folder / "state/state.json"
    with Faults(running.folder, running.python, "splice", "pwrite64", "fsync") as faults:
        running.start(prefix=faults.prefix)
        wait_until(state.exists)

        def rule(asked: Asked) -> int:
            where = asked.path({"splice": 2, "pwrite64": 0, "fsync": 0}[asked.call])
            return errno.EIO if where.startswith((str(log), f"{state}.new")) else 0

        def fail() -> None:
            faults.rule = rule

        said = a_bad_disk(running, "Input/output error", log, state, fail)
        faults.release()
        a_good_disk_again(running, log, state, said)
        assert running.stop() == 0


@as_root
def test_a_state_folder_that_becomes_read_only(daemon: MakeDaemon) -> None:
    running = prepared(daemon, PLAIN)
    start_with_mounts(running)
    running.wait_for("plain")
    state = running.folder / "state/state.json"
    wait_until(state.exists)
    inside(running, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(running.folder / "state"))
    assert running.ctl("restart", "plain").returncode == 0
    wait_until(lambda: "can't write the state file" in problems(running), 30)
    assert "Read-only file system" in problems(running)
    assert running.ctl("stop", "plain").returncode == 0
    inside(running, "umount", str(running.folder / "state"))
    wait_until(lambda: json.loads(state.read_text())["down"] == ["plain"], 30)
    wait_until(lambda: not problems(running), 30)


def test_a_state_folder_that_may_not_be_written(daemon: MakeDaemon, as_user: User) -> None:
    running = prepared(daemon, PLAIN, user=as_user)
    state = running.folder / "state"
    state.chmod(0o500)
    with pytest.raises(RuntimeError) as refused:
        running.start()
    assert f"can't use state_dir {state}: Permission denied" in str(refused.value)
    assert "set daemon.state_dir to a folder that procmand can write" in str(refused.value)
    assert running.stop() == 1
    state.chmod(0o700)
    running.start()
    running.wait_for("plain")
    wait_until((state / "state.json").exists)
    state.chmod(0o500)
    assert running.ctl("stop", "plain").returncode == 0
    wait_until(lambda: "can't write the state file" in problems(running), 30)
    state.chmod(0o700)
    wait_until(lambda: json.loads((state / "state.json").read_text())["down"] == ["plain"], 30)
    wait_until(lambda: not problems(running), 30)


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_full_pipe(daemon: MakeDaemon, then: int) -> None:
    """The supervisor stands still, or is replaced. The program waits in write(2); no line is lost or doubled."""
    code = "for i in range(20000): print(f'line {i:08}', 'x' * 80)"
    running = daemon(
        f"""
        [program.writer]
        command = ["${{PYTHON}}", "-S", "-E", "-c", "open('fifo').read(); {code}"]
        restart = "never"
        start_seconds = 0
        log = {{ max_size = 0 }}
        """.replace("; for", "\\nfor"),
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    pid = running.wait_for("writer")["pid"]
    supervisor = running.supervisor_pid
    os.kill(supervisor, signal.SIGSTOP)
    wait_until(lambda: stopped(supervisor), what="none of its threads takes another byte")
    (running.folder / "fifo").write_text("go")

    def waits() -> bool:
        written = re.search(r"^wchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return written is not None and int(written[1]) > 60_000 and state == "S"

    wait_until(waits, 30)
    assert "line 00019999" not in running.log("writer")
    os.kill(supervisor, then)
    running.wait_for("writer", "EXITED", 60)
    expected = "".join(f"line {number:08} {'x' * 80}\n" for number in range(20000))
    wait_until(lambda: len(running.log("writer")) >= len(expected), 30)
    assert running.log("writer") == expected
    found = counters(running, "writer")
    assert (found["read"], found["written"], found["dropped"]) == (len(expected), len(expected), 0)


def stopped(pid: int) -> bool:
    """All threads of a process have stopped."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@contextlib.contextmanager
def frozen(running: RunningDaemon) -> Iterator[None]:
    """Every write to `disk` hangs; not even SIGKILL ends it (fsfreeze(8)). The daemon may end meanwhile."""
    namespace = os.open(f"/proc/{running.keeper_pid}/ns/mnt", os.O_RDONLY)
    enter = ["nsenter", f"--mount=/proc/self/fd/{namespace}", "fsfreeze"]

    def turn(what: str) -> None:
        command = [*enter, what, str(running.folder / "disk")]
        subprocess.run(command, check=True, timeout=30, pass_fds=[namespace])

    turn("-f")
    try:
        yield
    finally:
        turn("-u")
        os.close(namespace)


@as_root
def test_a_dead_disk(daemon: MakeDaemon) -> None:
    """Logs and state file hang. RPC, restarts, and programs whose logs are elsewhere notice nothing."""
    writer = "open('go').read()\\nfor i in range(30000): print(f'line {i:08}', 'x' * 80)\\nopen('go').read()"
    running = prepared(
        daemon,
        LINES
        + PLAIN
        + f"""
        [program.writer]
        command = ["${{PYTHON}}", "-S", "-E", "-u", "-c", "{writer}"]
        start_seconds = 0
        log = {{ path = "disk/writer.log", max_size = 0 }}
        [program.elsewhere]
        command = ["${{PYTHON}}", "-S", "-E", "-u", "-c", "open('go2').read()\\nfor i in range(30000): print('y' * 99)"]
        restart = "never"
        start_seconds = 0
        log = {{ max_size = 0 }}
        """,
    )
    for name in ("go", "go2"):
        os.mkfifo(running.folder / name)
    mounted = start_with_mounts(
        running,
        "truncate -s 16M image",
        "mkfs.ext4 -q -F -m0 image",
        "mount -o loop image disk",
        "mkdir disk/state",
        "mount --bind disk/state state",
    )
    for name in ("lines", "plain", "writer", "elsewhere"):
        running.wait_for(name)
    wait_until((mounted / "disk/state/state.json").exists)
    before = p99(running)
    with frozen(running):
        (running.folder / "go").write_text("go")
        (running.folder / "go2").write_text("go")
        say(running, "meanwhile")
        running.wait_for("elsewhere", "EXITED", 60)
        wait_until(lambda: counters(running, "elsewhere")["written"] == 3_000_000, 30)
        plain = running.wait_for("plain")["pid"]
        os.kill(plain, signal.SIGKILL)
        wait_until(lambda: running.status()["plain"]["pid"] not in (None, plain), 30)
        assert running.ctl("stop", "plain").returncode == 0
        assert running.status()["plain"]["state"] == "STOPPED"
        wait_until(lambda: "the state file is not written" in problems(running), 30)
        wait_until(lambda: re.search(r"disk/\w+.log is not written: is its disk stuck\?", problems(running)), 30)
        assert counters(running, "writer")["written"] < 30000 * 95
        # Here log thread and state file both hang, and there is something to write.
        during = p99_below(running, max(0.05, 5 * before))
    wait_until(lambda: counters(running)["written"] == len("meanwhile\n"), 30)
    assert (mounted / "disk/lines.log").read_text() == "meanwhile\n"
    wait_until(lambda: counters(running, "writer")["written"] == 30000 * 95, 30)
    lines = (mounted / "disk/writer.log").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(30000))
    assert counters(running, "writer")["dropped"] == counters(running)["dropped"] == 0
    wait_until(lambda: json.loads((mounted / "disk/state/state.json").read_text())["down"] == ["plain"], 30)
    wait_until(lambda: not problems(running), 30)
    sys.stdout.write(f"status: p99 {during * 1000:.1f} ms while a disk is dead, {before * 1000:.1f} ms before\n")
    (running.folder / "go").write_text("go")


@as_root
def test_the_daemon_ends_all_the_same(daemon: MakeDaemon) -> None:
    """A log thread hangs for good, and SIGKILL can't end it: procmand does not wait for that."""
    running = prepared(daemon, LINES)
    start_with_mounts(running, "truncate -s 16M image", "mkfs.ext4 -q -F -m0 image", "mount -o loop image disk")
    running.wait_for("lines")
    supervisor = running.supervisor_pid
    with frozen(running):
        say(running, "never written")
        assert running.stop(90) == 0
    wait_until(lambda: not Path(f"/proc/{supervisor}").exists(), 30, "the disk lets it go")


def test_an_env_file_on_a_dead_disk(daemon: MakeDaemon) -> None:
    """Only the program that it belongs to waits; it can be stopped meanwhile, and starts when the disk is back."""
    running = prepared(
        daemon,
        PLAIN
        + """
        [program.reader]
        command = "sh -c 'echo $WORD; exec sleep 1000'"
        env_file = "dead.env"
        start_seconds = 0
        start_timeout = "1s"
        restart_delay = "100ms"
        """,
    )
    path = running.folder / "dead.env"
    path.write_text("WORD=hello\n")
    with Faults(running.folder, running.python, "openat") as faults:
        running.start(prefix=faults.prefix)
        running.wait_for("reader")
        wait_until(lambda: running.log("reader") == "hello\n", 30)  # RUNNING is as soon as there is a child
        faults.rule = lambda asked: HANG if asked.text(1) == str(path) else 0
        with running.client(30) as client:
            assert client.call("restart", names=["reader"], wait=False)
            wait_until(lambda: faults.hanging, 30)
            assert running.status()["reader"]["state"] == "STARTING"
            assert client.call("restart", names=["plain"])[0]["ok"]
            # Its start times out, and so does the next one, which does not even get a thread more.
            wait_until(lambda: f"env_file {path} has not been read" in running.status()["reader"]["why"], 30)
            wait_until(lambda: running.status()["reader"]["restarts"] >= 2, 30)
            assert len(faults.hanging) <= 2
            assert client.call("stop", names=["reader"])[0]["ok"]
            assert client.call("start", names=["reader"], wait=False)
            faults.release()
            running.wait_for("reader", timeout=30)
        wait_until(lambda: running.log("reader") == "hello\nhello\n", 30)
        assert running.stop() == 0

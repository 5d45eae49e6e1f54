"""etc/procman.service under a real systemd, PID 1 in namespaces of its own over a copy-on-write view of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import PROJECT, RunningDaemon, descendants, free_port, wait_until

SYSTEMD = "/usr/lib/systemd/systemd"
GROUPS = next(
    (path for path in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if Path(path, "cgroup.procs").exists()), ""
)
TOOLS = [name for name in ("unshare", "nsenter", "systemctl", "pivot_root", "mount") if shutil.which(name) is None]

# $1: an empty folder. The rest: folders of this machine to see as they are. Nothing is written outside of $1 and them.
BOOT = r"""
set -e; W=$1; shift; R=$W/root; mount -t tmpfs tmpfs $W; mkdir $W/upper $W/work $R
mount -t overlay overlay -o lowerdir=/,upperdir=$W/upper,workdir=$W/work $R
mount -t proc proc $R/proc; mount -t sysfs -o ro sysfs $R/sys; mount -t cgroup2 cgroup2 $R/sys/fs/cgroup
for n in run tmp dev var; do mount -t tmpfs -o mode=755 tmpfs $R/$n; done
for n in null zero full random urandom tty; do : >$R/dev/$n; mount --bind /dev/$n $R/dev/$n; done
mkdir -p $R/run/systemd/system $R/run/old $R/var/lib $R/var/log $R/dev/shm; ln -s /proc/self/fd $R/dev/fd
for d in "$@"; do mkdir -p "$R$d"; mount --rbind "$d" "$R$d"; done
cp -r "$1/units/." $R/run/systemd/system/; ln -s /dev/null $R/run/systemd/system/network-online.target
cd $R; pivot_root . run/old; umount -l /run/old; mount --make-rshared /
exec env -i container=procman-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/lib/systemd/systemd --unit=idle.target --show-status=false --log-target=null
"""
# What would start half a machine is left out; all that is procman's stays as it is shipped.
DROP_IN = """
[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart={python} -m procman.daemon -c {table}
Environment=PYTHONPATH={project} PYTHON={python} PROGRAMS={project}/tests/programs
WatchdogSec=1
StandardOutput=append:{folder}/daemon.out
StandardError=inherit
"""
SITE = """
[program.site]
command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
listen = "127.0.0.1:{port}"
ready = {{ http = "/" }}
"""
PLAIN = '[program.{}]\ncommand = "${{PYTHON}} -S -E ${{PROGRAMS}}/ready.py"\nstart_seconds = 0\n'


class Box:
    """The running systemd: commands in it."""

    def __init__(self, init: int) -> None:
        self.init = init

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self.init), "-m", "-p", "-C", "-r", "-w", *command]
        return subprocess.run(enter, timeout=60, text=True, capture_output=True, check=False)

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "--value", "-p", name, "procman.service").stdout.strip()


@pytest.fixture
def box(daemon: MakeDaemon) -> Iterator[tuple[Box, RunningDaemon]]:
    """Starts systemd with nothing in it but procman.service, which is not started yet."""
    if os.geteuid() != 0 or TOOLS or not Path(SYSTEMD).exists() or not GROUPS:
        pytest.skip(
            f"needs root, systemd, cgroup v2 and util-linux (missing: {', '.join(TOOLS) or 'none of its tools'})"
        )
    running = daemon(PLAIN.format("it"), start=False)
    units, root, group = running.folder / "units", running.folder / "box", Path(GROUPS, f"pm{running.mark}")
    (units / "procman.service.d").mkdir(parents=True)
    root.mkdir()
    (units / "idle.target").write_text("[Unit]\nDefaultDependencies=no\n")
    shutil.copy(PROJECT / "etc" / "procman.service", units)
    words = {"python": sys.executable, "table": running.table, "project": PROJECT, "folder": running.folder}
    (units / "procman.service.d" / "test.conf").write_text(DROP_IN.format(**words))
    group.mkdir()
    enter = f'echo 0 >{group}/cgroup.procs; exec unshare -C -m -u -i -p -f --kill-child=KILL --propagation private "$@"'
    seen = {str(PROJECT), sys.prefix, sys.base_prefix}
    command = ["sh", "-c", enter, "sh", "sh", "-c", BOOT, "sh", str(root), str(running.folder), *sorted(seen)]
    with (running.folder / "boot.out").open("wb") as output:
        outer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield _wait(outer, running), running
    finally:
        running.seen |= descendants(outer.pid)
        os.kill(outer.pid, signal.SIGKILL)
        outer.wait(10)
        with contextlib.suppress(OSError):
            wait_until(lambda: not (group / "cgroup.procs").read_text() and not running.leftovers(), 10)
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _wait(outer: subprocess.Popen[bytes], running: RunningDaemon) -> Box:
    """Until systemd answers; a machine that does not let us have one skips the test."""

    def booted() -> Box | None:
        if outer.poll() is not None:
            pytest.skip(f"no systemd can run here: {(running.folder / 'boot.out').read_text()[-300:]}")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        found = Box(int(children[0])) if children else None
        return found if found and found.run("systemctl", "is-active", "idle.target").returncode == 0 else None

    result = wait_until(booted, 30, "systemd is up")
    assert result is not None
    return result


def test_the_shipped_unit(box: tuple[Box, RunningDaemon]) -> None:
    """start waits until the table runs, reload rereads it, a crash inside is none outside, stop leaves nothing."""
    systemd, running = box
    done = systemd.run("systemctl", "start", "procman.service")
    assert done.returncode == 0, (
        done.stderr,
        systemd.run("systemctl", "status", "procman.service").stdout,
        running.said(),
    )
    before = running.wait_for("it")
    assert systemd.show("StatusText") == "1 processes"
    cgroup = str(running.json("daemon", "status")["cgroup"])
    assert "/system.slice/procman.service/procman-" in cgroup  # Delegate=yes: below the service, not beside it
    first = systemd.show("WatchdogTimestampMonotonic")
    running.write_table(PLAIN.format("it") + PLAIN.format("new"))
    assert systemd.run("systemctl", "reload", "procman.service").returncode == 0
    wait_until(lambda: "new" in running.status())
    running.wait_for("new")
    supervisor = running.json("daemon", "status")["supervisor_pid"]
    assert systemd.run("kill", "-9", str(supervisor)).returncode == 0
    wait_until(lambda: running.json("daemon", "status")["supervisor_pid"] != supervisor)
    assert running.status()["it"]["pid"] == before["pid"]
    wait_until(lambda: int(systemd.show("WatchdogTimestampMonotonic")) - int(first) > 2_000_000, what="2 s of watchdog")
    assert (systemd.show("ActiveState"), systemd.show("NRestarts")) == ("active", "0")
    assert systemd.run("systemctl", "stop", "procman.service").returncode == 0
    ended = [systemd.show(name) for name in ("ActiveState", "Result", "ExecMainStatus")]
    assert ended == ["inactive", "success", "0"]
    assert systemd.run("pgrep", "-f", "procman.daemon|programs/ready.py").stdout == ""


def test_the_keeper_is_killed(box: tuple[Box, RunningDaemon]) -> None:
    """systemd starts another one, which adopts; what died with it finds its socket and its pipe in systemd's store."""
    systemd, running = box
    port = free_port()
    running.write_table(SITE.format(port=port) + PLAIN.format("it"))
    assert systemd.run("systemctl", "start", "procman.service").returncode == 0, running.said()
    names = ("site", "it")
    before = {name: running.wait_for(name)["pid"] for name in names}
    stored = 1 + 2 * len(names)  # a socket, and both ends of a pipe for each
    wait_until(lambda: systemd.show("NFileDescriptorStore") == str(stored))
    keeper = systemd.show("MainPID")
    assert systemd.run("kill", "-9", keeper).returncode == 0
    wait_until(lambda: systemd.show("MainPID") not in {keeper, "0"} and running.answers(), 30, "another keeper")
    assert {name: running.wait_for(name)["pid"] for name in names} == before
    assert all(info["why"] == "adopted: the procmand before was killed" for info in running.status().values())
    assert systemd.show("NFileDescriptorStore") == str(stored)

    # Now the program dies with the keeper: who connects meanwhile waits in the queue, and is answered.
    assert systemd.run("sh", "-c", f"kill -9 {systemd.show('MainPID')} {before['site']}").returncode == 0
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        client.settimeout(30)
        assert b"200" in client.recv(100)
    assert running.wait_for("it")["pid"] == before["it"]
    assert running.wait_for("site")["pid"] != before["site"]
    assert systemd.run("systemctl", "stop", "procman.service").returncode == 0
    assert [systemd.show(name) for name in ("ActiveState", "Result", "ExecMainStatus")] == ["inactive", "success", "0"]
    assert systemd.run("pgrep", "-f", "procman.daemon|programs/").stdout == ""


JOURNAL = """
[program.talker]
command = ["sh", "-c", '''
    echo hello; echo WARNING:root:careful; head -c 300000 /dev/zero | tr "\\0" x; echo
    printf half; read line < {folder}/fifo; echo " and half"; exec sleep 1000''']
start_seconds = 0
log = {{ mode = "journal" }}
"""


def test_the_real_journal(box: tuple[Box, RunningDaemon]) -> None:
    """Its fields, a line that is too large for a datagram, and a line that is not finished when the keeper is killed:
    systemd keeps the memory that holds it."""
    systemd, running = box
    done = systemd.run("systemctl", "start", "systemd-journald.socket", "systemd-journald.service")
    if done.returncode:
        pytest.skip(f"no journal can run here: {done.stderr}")
    os.mkfifo(running.folder / "fifo")
    running.write_table(JOURNAL.format(folder=running.folder))
    assert systemd.run("systemctl", "start", "procman.service").returncode == 0, running.said()
    running.wait_for("talker")

    def entries() -> list[dict[str, str]]:
        systemd.run("journalctl", "--sync")
        done = systemd.run("journalctl", "-o", "json", "--all", "PROCMAN_PROGRAM=talker")
        return [json.loads(line) for line in done.stdout.splitlines()]

    wait_until(lambda: len(entries()) == 3, 20)
    found = entries()
    assert [entry["MESSAGE"] for entry in found] == ["hello", "WARNING:root:careful", "x" * 300_000]
    assert [entry["PRIORITY"] for entry in found] == ["6", "4", "6"]
    for entry in found:
        told = [entry[name] for name in ("SYSLOG_IDENTIFIER", "PROCMAN_PROCESS", "PROCMAN_INSTANCE", "PROCMAN_STREAM")]
        assert told == ["talker", "talker", "1", "stdout"]

    keeper = systemd.show("MainPID")
    assert systemd.run("kill", "-9", keeper).returncode == 0
    wait_until(lambda: systemd.show("MainPID") not in {keeper, "0"} and running.answers(), 30, "another keeper")
    (running.folder / "fifo").write_text("go\n")
    wait_until(lambda: [entry["MESSAGE"] for entry in entries()][3:] == ["half and half"], 20)
    assert systemd.run("systemctl", "stop", "procman.service").returncode == 0

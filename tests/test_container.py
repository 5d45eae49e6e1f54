"""procmand as PID 1 of a container: it reaps what is orphaned, passes signals on, and ends with all it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import MakeDaemon
from tests.harness import SUPERVISOR, RunningDaemon, command_line, descendants, wait_until

IN_A_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]


def _can_unshare() -> bool:
    try:
        return subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _can_unshare(), reason="a PID namespace needs root and unshare(1)")

TABLE = """
    [program.orphans]
    command = "sh -c 'for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; echo made; exec sleep 1000'"
    start_seconds = 0
    [program.plain]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    """


class Container:
    """A daemon that is PID 1; `init` is its pid as seen from outside."""

    def __init__(self, running: RunningDaemon) -> None:
        self.running = running
        command = [*IN_A_NAMESPACE, sys.executable, "-m", "procman.daemon", "-c", str(running.table)]
        with running.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=running.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        wait_until(running.answers, 20)
        self.init = min(seen.pid for seen in descendants(self.process.pid))

    def zombies(self) -> list[int]:
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat") as file:
                        fields = file.read().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] == "Z" and int(fields[1]) == self.init:
                    found.append(int(name))
        return found


@pytest.fixture
def container(daemon: MakeDaemon) -> Iterator[Container]:
    made = Container(daemon(TABLE, start=False))
    yield made
    if made.process.poll() is None:
        os.kill(made.init, signal.SIGKILL)
        made.process.wait(10)


def test_it_is_pid_1(container: Container) -> None:
    container.running.wait_for("plain")
    assert container.running.json("daemon", "status")["keeper_pid"] == 1


def test_orphans_are_reaped(container: Container) -> None:
    wait_until(lambda: "made" in container.running.log("orphans"))
    wait_until(lambda: not container.zombies() and len(descendants(container.init)) == 3, what="no zombie is left")


def test_docker_stop_ends_everything_with_status_0(container: Container) -> None:
    container.running.wait_for("plain")
    everything = descendants(container.init)
    os.kill(container.init, signal.SIGTERM)
    assert container.process.wait(20) == 0
    assert not [seen for seen in everything if seen.alive()]


def test_the_supervisor_may_die_here_too(container: Container) -> None:
    before = container.running.wait_for("plain")["pid"]
    daemon_pids = [seen.pid for seen in descendants(container.init)]
    supervisor = next(pid for pid in daemon_pids if SUPERVISOR in command_line(pid))
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: container.running.json("daemon", "status")["supervisor_starts"] == 2)
    assert container.running.status()["plain"]["pid"] == before

"""Reloads of what can't overlap: its processes restart one after the other, and what else is asked for meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, command_line, descendants, free_port, wait_until

SLOW = """
import signal, sys, time
def bye(*_):
    time.sleep({seconds})
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
print("up", flush=True)
while True:
    time.sleep(1)
"""


def workers(folder: Path, count: int, more: str = "", seconds: float = 1.5) -> str:
    """A program of `count` workers that take their time to stop."""
    (folder / "slow.py").write_text(SLOW.format(seconds=seconds))
    return f"""
        [program.worker]
        command = ["${{PYTHON}}", "{folder}/slow.py"]
        instances = {count}
        start_seconds = 0.3
        {more}
    """


def up(running: RunningDaemon, count: int) -> None:
    for number in range(1, count + 1):
        running.wait_for(f"worker:{number}")


def serving(running: RunningDaemon) -> int:
    return sum(info["state"] == "RUNNING" for info in running.status().values())


def children(running: RunningDaemon) -> list[int]:
    found = descendants(running.keeper_pid)
    return [seen.pid for seen in found if "slow.py" in command_line(seen.pid)]


def test_a_stop_wins(daemon: MakeDaemon, tmp_path: Path) -> None:
    running = daemon(workers(tmp_path, 3))
    up(running, 3)
    reload = running.begin("reload", "worker")
    running.wait_for("worker:1", "STOPPING")
    assert running.ctl("stop", "worker:3").returncode == 0
    said = reload.communicate(timeout=30)[0]
    assert reload.returncode == 1
    assert "it does not run any more: stop by uid" in said
    states = {name: info["state"] for name, info in running.status().items()}
    assert states == {"worker:1": "RUNNING", "worker:2": "RUNNING", "worker:3": "STOPPED"}
    assert running.status()["worker:2"]["why"].startswith("reload")  # the others have gone on


def test_a_change_of_the_table_waits(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Nobody is started that leaves the table, or has left it."""
    running = daemon(workers(tmp_path, 3))
    up(running, 3)
    reload = running.begin("reload", "worker")
    running.wait_for("worker:1", "STOPPING")
    assert "worker" in running.ctl("daemon", "upgrade").stderr  # it is refused
    running.write_table(workers(tmp_path, 2))
    late = running.ctl("apply", "--timeout", "0.1")
    said = "the reload of worker:1, worker:2, worker:3 has ended"
    assert f"not done within 0.1 s; it goes on when {said}" in late.stderr
    assert f"waits until {said}; procmanctl stop worker gives that up" in late.stdout + late.stderr
    assert running.ctl("apply", timeout=60).returncode == 0
    reload.communicate(timeout=30)
    assert reload.returncode == 0
    assert {name: info["state"] for name, info in running.status().items()} == {
        "worker:1": "RUNNING",
        "worker:2": "RUNNING",
    }
    assert len(children(running)) == 2


def test_a_second_one_is_refused(daemon: MakeDaemon, tmp_path: Path) -> None:
    running = daemon(workers(tmp_path, 3))
    up(running, 3)
    first = running.begin("reload", "worker")
    running.wait_for("worker:2", "STOPPING")
    second = running.ctl("reload", "worker")
    assert (second.returncode, "a reload of worker is under way already" in second.stdout + second.stderr) == (1, True)
    least = 3
    while first.poll() is None:
        least = min(least, serving(running))
    first.communicate()
    assert (first.returncode, least) == (0, 2)


RELEASE = """
import os, socket, sys, time
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
notify.send(b"READY=1")
if os.path.exists(__file__ + ".bad"):
    print("no such table: orders", flush=True)
    time.sleep(0.3)
    sys.exit(3)
while True:
    time.sleep(1)
"""


def test_a_release_that_does_not_stay_up_takes_one_process_and_no_more(daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(RELEASE)
    more = "ready.notify = true\nstart_seconds = 3\nstart_retries = 0"
    table = workers(tmp_path, 3).replace("start_seconds = 0.3", more)
    (tmp_path / "slow.py").write_text(RELEASE)
    running = daemon(table)
    up(running, 3)
    (tmp_path / "slow.py.bad").touch()
    done = running.ctl("reload", "worker")
    assert done.returncode == 1
    assert "it did not stay up: exit status 3" in done.stdout + done.stderr
    assert "no such table: orders" in done.stdout + done.stderr
    assert "not tried: worker:1 failed" in done.stdout + done.stderr
    assert (running.status()["worker:1"]["state"], serving(running)) == ("FATAL", 2)


def test_those_that_are_too_old_go_one_after_the_other(daemon: MakeDaemon, tmp_path: Path) -> None:
    running = daemon(workers(tmp_path, 3, 'max_age = "2s"', seconds=0.5))
    up(running, 3)
    before = set(children(running))
    least, end = 3, time.monotonic() + 60
    while before & set(children(running)):
        assert time.monotonic() < end
        least = min(least, serving(running))
    assert least == 2


COMMAND = """
import time
with open(__file__ + ".runs", "a") as file:
    file.write("x")
time.sleep(60)
"""


def test_a_reload_command_runs_once_and_ends_with_a_stop(daemon: MakeDaemon, tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(COMMAND)
    running = daemon(workers(tmp_path, 1, f'reload = ["${{PYTHON}}", "{script}"]', seconds=0))
    running.wait_for("worker")
    reload = running.begin("reload", "worker")
    runs = Path(f"{script}.runs")
    wait_until(runs.exists)
    second = running.ctl("reload", "worker")
    assert (second.returncode, "a reload of worker is under way already" in second.stdout + second.stderr) == (1, True)
    assert running.ctl("stop", "worker").returncode == 0
    said = reload.communicate(timeout=30)[0]
    assert (reload.returncode, "something else was asked for" in said) == (1, True)
    wait_until(lambda: not [one for one in descendants(running.keeper_pid) if str(script) in command_line(one.pid)])
    assert runs.read_text() == "x"


BUSY = """
import os, socket, sys
listener = socket.socket(fileno=3)
print("start", os.getpid(), flush=True)
while True:
    client, _ = listener.accept()
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    client.recv(1000)
    client.close()
"""


@contextmanager
def visitor(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as client:
        yield client


def test_a_restart_starts_nobody_in_a_shutdown(daemon: MakeDaemon, tmp_path: Path) -> None:
    """It waits until a visitor has his answer, and by then all is to stop."""
    port, busy = free_port(), tmp_path / "busy"
    (tmp_path / "serve.py").write_text(BUSY)
    running = daemon(
        f"""
        [program.web]
        command = ["${{PYTHON}}", "{tmp_path}/serve.py", "{busy}"]
        instances = 2
        listen = "127.0.0.1:{port}"
        start_seconds = 0.2
        {workers(tmp_path, 1, "priority = 1", seconds=4)}
        """,
    )
    for name in ("web:1", "web:2", "worker"):
        running.wait_for(name)
    with visitor(port):
        pid = int(wait_until(lambda: busy.exists() and busy.read_text()))
        name = next(name for name, info in running.status().items() if info["pid"] == pid)
        assert running.ctl("restart", name, "--no-wait").returncode == 0
        assert running.process is not None
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)
    assert "".join(path.read_text() for path in running.log_dir.glob("web*")).count("start") == 2


@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_all_of_it_is_asked_for_meanwhile(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    running = daemon(workers(tmp_path, 3, seconds=0.5))
    up(running, 3)
    reload = running.begin("reload", "worker")
    running.wait_for("worker:1", "STOPPING")
    assert running.ctl(verb, "worker").returncode == 0
    reload.communicate(timeout=30)
    assert reload.returncode == (1 if verb == "stop" else 0)
    assert serving(running) == (0 if verb == "stop" else 3)
    assert len(children(running)) == (0 if verb == "stop" else 3)


HOLDS = """
import signal, socket, sys, time
listener = socket.socket(fileno=3)
def bye(*_):
    time.sleep(2)
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_the_supervisor_dies_in_a_restart_of_one_of_several(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    """It may drop what it has accepted, and is told to stop before the others go on: in one with that it should start
    again."""
    (tmp_path / "slow.py").write_text(HOLDS)
    running = daemon(f"""
        [program.worker]
        command = ["${{PYTHON}}", "{tmp_path}/slow.py"]
        instances = 2
        listen = "127.0.0.1:{free_port()}"
        reload = "restart"
        start_seconds = 0.2
    """)
    up(running, 2)
    before = running.status()["worker:1"]["pid"]
    assert running.ctl(verb, "worker:1", "--no-wait").returncode == 0
    running.wait_for("worker:1", "STOPPING")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers, 20)
    assert running.wait_for("worker:1", timeout=20)["pid"] != before


SCALED = """
import os, socket, time
listener = socket.socket(fileno=3)
time.sleep(1)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
notify.send(b"READY=1")
while True:
    time.sleep(1)
"""


def test_the_number_stays_meanwhile(daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SCALED)
    running = daemon(f"""
        [program.worker]
        command = ["${{PYTHON}}", "{tmp_path}/slow.py"]
        listen = "127.0.0.1:{free_port()}"
        reload = "restart"
        ready.notify = true
        start_seconds = 0.2
        scale = {{ min = 1, max = 4, idle_timeout = "3s" }}
    """)
    running.wait_for("worker:1")
    assert running.ctl("scale", "worker", "4").returncode == 0
    up(running, 4)
    done = running.ctl("reload", "worker")
    assert done.returncode == 0, (done.stdout, done.stderr)
    running.wait_for("worker:4", "STOPPED", timeout=30)  # it goes by load again

"""The supervisor is killed, hung or broken: nobody notices."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, free_port, wait_until

TABLE = """
    [program.plain]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    [program.twice]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    instances = 2
    """


def kill_supervisor(running: RunningDaemon, number: int = signal.SIGKILL) -> int:
    """Ends the supervisor and waits for its successor. Returns the pid of the old one."""
    old = running.supervisor_pid
    os.kill(old, number)
    wait_until(lambda: running.supervisor_pid != old, what="another supervisor")
    return old


def pids(running: RunningDaemon) -> dict[str, int]:
    return {name: info["pid"] for name, info in running.status().items()}


def test_programs_keep_their_pids_and_uptimes(daemon: MakeDaemon) -> None:
    running = daemon(TABLE)
    for name in ("plain", "twice:1", "twice:2"):
        running.wait_for(name)
    before = running.status()
    for _ in range(3):
        kill_supervisor(running)
        wait_until(running.answers)
    after = running.status()
    for name, info in after.items():
        for key in ("pid", "state", "started_at", "restarts", "wanted"):
            assert info[key] == before[name][key], (name, key)
        assert info["uptime_seconds"] > before[name]["uptime_seconds"]


def test_status_answers_while_the_supervisor_is_replaced(daemon: MakeDaemon) -> None:
    """The RPC socket is held: a client that comes in between waits in its backlog, and is not refused."""
    running = daemon(TABLE)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    done = running.ctl("status")
    assert done.returncode in (0, 3), done.stderr
    assert "plain" in done.stdout


@pytest.mark.parametrize(("number", "shown"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_program_that_ended_meanwhile_shows_its_true_exit(daemon: MakeDaemon, number: int, shown: str) -> None:
    running = daemon(TABLE)
    before = running.wait_for("plain")["pid"]
    supervisor = running.supervisor_pid
    os.kill(supervisor, signal.SIGSTOP)  # it sees nothing of what comes now
    os.kill(before, number)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != supervisor)

    def replaced() -> bool:
        info = running.status()["plain"]
        assert info["pid"] not in (None, before)
        assert info["exit"]["signal"] == shown
        return bool(info["state"] in ("STARTING", "RUNNING", "BACKOFF"))

    wait_until(replaced)


def test_an_exit_status_is_not_lost_either(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.once]
        command = "sh -c 'read line < fifo; exit 7'"
        restart = "never"
        start_seconds = 0
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    running.wait_for("once")
    supervisor = running.supervisor_pid
    os.kill(supervisor, signal.SIGSTOP)
    Path(running.folder / "fifo").write_text("go\n")
    os.kill(supervisor, signal.SIGKILL)
    info = running.wait_for("once", "EXITED")
    assert info["exit"]["code"] == 7
    assert info["restarts"] == 0


def test_stopped_by_an_operator_stays_stopped(daemon: MakeDaemon) -> None:
    running = daemon(TABLE)
    running.wait_for("plain")
    assert running.ctl("stop", "plain").returncode == 0
    kill_supervisor(running)
    wait_until(running.answers)
    info = running.status()["plain"]
    assert (info["state"], info["wanted"], info["pid"]) == ("STOPPED", "down", None)
    assert running.stop() == 0
    running.start()
    running.wait_for("twice:1")
    info = running.status()["plain"]
    assert (info["state"], info["wanted"]) == ("STOPPED", "down")
    assert running.ctl("start", "plain").returncode == 0


@pytest.mark.parametrize("verb", ["start", "restart"])
def test_an_operation_goes_on_when_the_supervisor_is_replaced(daemon: MakeDaemon, verb: str) -> None:
    """Whether the old supervisor had written down what was asked or not: who asked is told what came of it."""
    autostart = "true" if verb == "restart" else "false"
    command = '"${PYTHON} -S -E ${PROGRAMS}/ready.py"'
    running = daemon(f"[program.it]\ncommand = {command}\nstart_seconds = 1\nautostart = {autostart}\n")
    before = running.wait_for("it")["pid"] if verb == "restart" else None
    command_line = [sys.executable, "-c", CTL, "-s", str(running.socket), verb, "it"]
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": str(PROJECT)}, "text": True}
    asked = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    wait_until(lambda: f"{verb} by uid" in running.said())
    kill_supervisor(running)
    out, err = asked.communicate(timeout=20)
    assert (asked.returncode, out.split()[:2]) == (0, ["it", "RUNNING"]), err
    assert "supervisor was replaced" in err
    assert running.status()["it"]["pid"] not in (None, before)


def test_a_shutdown_that_was_answered_is_not_forgotten(daemon: MakeDaemon) -> None:
    command = '"sh -c \'trap \\"sleep 0.5; exit 0\\" TERM; echo ready; while :; do sleep 0.05; done\'"'
    running = daemon(f"[program.slow]\ncommand = {command}\nstart_seconds = 0\n")
    wait_until(lambda: "ready" in running.log("slow"))
    supervisor = running.supervisor_pid
    with running.client() as client:
        client.call("daemon.shutdown")
        os.kill(supervisor, signal.SIGKILL)
    assert running.process is not None
    assert running.process.wait(20) == 0


def test_a_stop_that_is_under_way_is_finished(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.stubborn]
        command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
        stop_timeout = "2s"
        start_seconds = 0
        """
    )
    wait_until(lambda: "ready" in running.log("stubborn"))
    assert running.ctl("stop", "--no-wait", "stubborn").returncode == 0
    kill_supervisor(running)
    running.wait_for("stubborn", "STOPPED")


def test_a_shutdown_that_is_under_way_is_finished(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.stubborn]
        command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
        stop_timeout = "2s"
        start_seconds = 0
        """
    )
    wait_until(lambda: "ready" in running.log("stubborn"))
    assert running.process is not None
    os.kill(running.keeper_pid, signal.SIGTERM)
    running.wait_for("stubborn", "STOPPING")
    kill_supervisor(running)
    assert running.process.wait(20) == 0


def test_a_signal_during_the_replacement_is_not_lost(daemon: MakeDaemon) -> None:
    running = daemon(TABLE)
    running.wait_for("plain")
    assert running.process is not None
    os.kill(running.supervisor_pid, signal.SIGKILL)
    os.kill(running.keeper_pid, signal.SIGTERM)
    assert running.process.wait(20) == 0


def test_edits_of_the_table_do_not_come_with_a_crash(daemon: MakeDaemon) -> None:
    running = daemon(TABLE)
    running.wait_for("plain")
    before = pids(running)
    running.write_table("[program.plain]\ncommand = 7\n")
    kill_supervisor(running)
    wait_until(running.answers)
    assert pids(running) == before


def test_a_hung_supervisor_is_replaced(daemon: MakeDaemon) -> None:
    running = daemon(TABLE, start=False)
    running.start("--heartbeat", "1", timeout=30)
    for name in ("plain", "twice:1", "twice:2"):
        running.wait_for(name)
    before, hung = pids(running), running.supervisor_pid
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: running.supervisor_pid != hung, 30, "the hung supervisor is replaced")
    wait_until(running.answers, 30)
    assert pids(running) == before
    assert "does not answer; replacing it" in running.said()


def test_a_daemon_in_a_hurry_survives_many_kills(daemon: MakeDaemon) -> None:
    """Killed again and again, often before it is ready: still one child for each process, and the same one."""
    running = daemon(TABLE)
    for name in ("plain", "twice:1", "twice:2"):
        running.wait_for(name)
    before = pids(running)
    for _ in range(5):
        kill_supervisor(running)
    wait_until(running.answers, 30)
    assert pids(running) == before
    assert running.json("daemon", "status")["supervisor_starts"] >= 6


def test_the_listener_is_never_closed(daemon: MakeDaemon) -> None:
    port = free_port()
    running = daemon(
        f"""
        [program.site]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/" }}
        """
    )
    pid = running.wait_for("site")["pid"]
    for _ in range(3):
        kill_supervisor(running)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            assert int(answer.read()) == pid


def test_output_of_the_time_without_a_supervisor_is_written(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'i=0; while read go; do i=$((i+1)); echo line $i; done < fifo'"
        start_seconds = 0
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    with open(running.folder / "fifo", "w") as fifo:
        for number in range(1, 21):
            if number % 7 == 0:
                os.kill(running.supervisor_pid, signal.SIGKILL)
            fifo.write("go\n")
            fifo.flush()
        expected = "".join(f"line {number}\n" for number in range(1, 21))
        wait_until(lambda: running.log("lines") == expected, 20, "every line, once")


def test_readiness_is_remembered_without_a_state_file(daemon: MakeDaemon) -> None:
    """READY=1 comes once. A supervisor that dies before it could write it down has told the keeper."""
    running = daemon(
        """
        [program.once]
        command = "${PYTHON} -S -E ${PROGRAMS}/notify.py"
        ready = { notify = true }
        """
    )
    pid = running.wait_for("once")["pid"]
    state = running.folder / "state" / "state.json"
    wait_until(state.exists)
    state.unlink()
    state.mkdir()  # nothing can be written there, and nothing read
    kill_supervisor(running)
    assert running.wait_for("once")["pid"] == pid


@pytest.mark.parametrize("kind", ["torn", "old", "empty", "fifo", "folder", "types"])
def test_no_state_file_keeps_a_successor_from_starting(daemon: MakeDaemon, kind: str) -> None:
    running = daemon(TABLE)
    for name in ("plain", "twice:1", "twice:2"):
        running.wait_for(name)
    before, path = pids(running), running.folder / "state" / "state.json"
    wait_until(lambda: path.exists() and path.read_text().count('"RUNNING"') == 3, what="all is written down")
    whole = path.read_text()
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            changed = {"torn": whole[:200], "old": '{"version": 0}', "empty": ""}
            path.write_text(changed.get(kind) or whole.replace('"down":[]', '"down":5') * (kind == "types"))
    kill_supervisor(running)
    wait_until(running.answers)
    assert {name: running.wait_for(name)["pid"] for name in before} == before
    assert str(path) in running.said()
    assert path.with_name("state.json.bad-1").exists()
    wait_until(lambda: path.is_file() and '"RUNNING"' in path.read_text(), what="it is written again")


# --- no supervisor can start any more ---------------------------------------------------------------------------------

BROKEN = 'raise ImportError("a broken install")'


class Install:
    """A copy of procman that a daemon of its own runs from, and that can be broken and mended meanwhile."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(PROJECT / "procman", folder / "procman", ignore=shutil.ignore_patterns("__pycache__"))
        self._package = folder / "procman"
        self._whole: dict[Path, str] = {}
        self.environment = {"PYTHONPATH": str(folder)}

    def break_it(self, module: str) -> None:
        path = self._package / module
        self._whole[path] = path.read_text()
        path.write_text(f"{BROKEN}  # {time.monotonic_ns()}\n")

    def mend(self) -> None:
        for path, text in self._whole.items():
            path.write_text(text)


def tries(running: RunningDaemon) -> int:
    """How many supervisors have failed."""
    return running.output.read_text().count("the supervisor has ended (exit status 1)")


def wait_for_tries(running: RunningDaemon, number: int) -> None:
    wait_until(lambda: tries(running) >= number, 40, f"{number} supervisors have failed")


@pytest.mark.parametrize("module", ["__init__.py", "supervise.py"])
def test_programs_go_on_while_no_supervisor_can_start(daemon: MakeDaemon, tmp_path: Path, module: str) -> None:
    install, port = Install(tmp_path), free_port()
    running = daemon(
        f"""
        [program.site]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/" }}
        [program.lines]
        command = "sh -c 'i=0; while read go; do i=$((i+1)); echo line $i; done < lines'"
        start_seconds = 0
        [program.once]
        command = "sh -c 'read line < once; exit 7'"
        restart = "never"
        start_seconds = 0
        """,
        environment=install.environment,
        start=False,
    )
    for name in ("lines", "once"):
        os.mkfifo(running.folder / name)
    running.start()
    before = {name: running.wait_for(name) for name in ("site", "lines", "once")}
    began = time.monotonic()
    install.break_it(module)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    with (running.folder / "lines").open("w") as fifo:
        for number in range(1, 4):
            wait_for_tries(running, number)
            fifo.write("go\n")
            fifo.flush()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                assert int(answer.read()) == before["site"]["pid"]
        (running.folder / "once").write_text("go\n")
        # Each delay is twice the one before, from 0.1 s on, and the first has none: so they get rarer, not a flood.
        failed = tries(running)
        assert failed <= 3 + math.log2(1 + (time.monotonic() - began) / 0.1)
        assert running.output.read_text().count("ImportError: a broken install") >= failed, "it is said why"
        install.mend()
        wait_until(running.answers, 40, "the daemon answers again")
        after = {name: running.wait_for(name) for name in ("site", "lines")}
        wait_until(lambda: running.log("lines") == "line 1\nline 2\nline 3\n", 20, "every line, once")
        ended = running.wait_for("once", "EXITED")
    for name, info in after.items():
        assert (info["pid"], info["restarts"]) == (before[name]["pid"], 0)
    assert (ended["exit"]["code"], ended["restarts"]) == (7, 0)


def test_a_daemon_without_a_supervisor_can_be_ended(daemon: MakeDaemon, tmp_path: Path) -> None:
    install = Install(tmp_path)
    running = daemon(TABLE, environment=install.environment)
    for name in ("plain", "twice:1", "twice:2"):
        running.wait_for(name)
    install.break_it("__init__.py")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_for_tries(running, 1)
    assert running.stop(60) == 1
    assert "no supervisor to see to it: ending all programs" in running.said()
    assert not running.leftovers()


# --- READY=1 while nobody is there ------------------------------------------------------------------------------------


class Told:
    """A program `it` that says to its notification socket what it is told (tests/programs/notify_told.py), and a daemon
    whose supervisor can be away for a while."""

    def __init__(self, daemon: MakeDaemon, folder: Path, keys: str = "") -> None:
        self.install = Install(folder)
        self._folder = folder
        os.mkfifo(folder / "tell")
        self._fifo = os.open(folder / "tell", os.O_RDWR)
        table = f"""
            [program.it]
            command = "${{PYTHON}} -S -E ${{PROGRAMS}}/notify_told.py {folder}"
            ready = {{ notify = true }}
            restart_delay = "100ms"
            restart_delay_max = "100ms"
            {keys}
            """
        self.running = daemon(table, environment=self.install.environment)
        self.pid = wait_until(lambda: self.running.status()["it"]["pid"], what="it is started")
        wait_until(lambda: self.heard() == [f"{self.pid} begin"], what="it runs")

    def heard(self) -> list[str]:
        """What the program has written down: its pid, and what it was told."""
        path = self._folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    def tell(self, text: str) -> None:
        """Tells it, and waits until it has done so."""
        before = len(self.heard())
        os.write(self._fifo, f"{text}\n".encode())
        wait_until(lambda: len(self.heard()) > before, what=f"it does {text!r}")
        assert self.heard()[before] == f"{self.pid} {text}"

    def without_supervisor(self, how: str) -> Callable[[], None]:
        """Stops the supervisor, or kills it and lets no other one start. Returns what brings one back: the same, or
        another one."""
        supervisor = self.running.supervisor_pid
        if how == "stopped":
            os.kill(supervisor, signal.SIGSTOP)
            return lambda: os.kill(supervisor, signal.SIGCONT)
        if how == "stopped, then killed":
            os.kill(supervisor, signal.SIGSTOP)
            return lambda: os.kill(supervisor, signal.SIGKILL)
        self.install.break_it("supervise.py")
        os.kill(supervisor, signal.SIGKILL)
        wait_for_tries(self.running, 1)
        return self.install.mend

    def close(self) -> None:
        os.close(self._fifo)


AWAY = pytest.mark.parametrize("how", ["stopped", "stopped, then killed", "killed"])


@AWAY
def test_ready_that_is_said_meanwhile_counts(daemon: MakeDaemon, tmp_path: Path, how: str) -> None:
    """Also when start_timeout is over before anybody hears it, and it was not the first thing that was said."""
    with contextlib.closing(Told(daemon, tmp_path, 'start_timeout = "2s"')) as told:
        begun = time.monotonic()
        come_back = told.without_supervisor(how)
        for text in ("STATUS=nearly", "STATUS=soon", "READY=1"):
            told.tell(text)
        assert time.monotonic() < begun + 2, "it was in time"
        wait_until(lambda: time.monotonic() > begun + 2.2, what="start_timeout is over")
        come_back()
        wait_until(lambda: told.running.status()["it"]["state"] != "STARTING", 40)
        info = told.running.status()["it"]
        assert (info["state"], info["pid"], info["restarts"]) == ("RUNNING", told.pid, 0)
        assert told.heard().count(f"{told.pid} begin") == len([line for line in told.heard() if "begin" in line])


@AWAY
@pytest.mark.parametrize("next_start", ["after a delay", "at once"])
def test_ready_of_a_child_before_does_not_count(daemon: MakeDaemon, tmp_path: Path, how: str, next_start: str) -> None:
    """It says READY=1, and ends before a supervisor is there. The next child has said nothing."""
    with contextlib.closing(Told(daemon, tmp_path)) as told:
        if next_start == "at once":  # as one is started again that was up for a while
            told.tell("READY=1")
            told.running.wait_for("it")
            wait_until(lambda: told.running.status()["it"]["uptime_seconds"] > 1.1)
        come_back = told.without_supervisor(how)
        for _ in range(5):
            told.tell("READY=1")
        told.tell("exit 3")
        come_back()
        begun = wait_until(lambda: [line for line in told.heard() if line.endswith(" begin")][1:], 40, "the next child")
        assert len(begun) == 1
        told.pid = int(begun[0].split()[0])
        wait_until(lambda: told.running.status()["it"]["pid"] == told.pid, 20)
        told.tell("STATUS=what waits before this is read when the daemon has read this")
        for _ in range(20):  # each is a turn of the daemon's loop
            assert told.running.status()["it"]["state"] == "STARTING"
        assert told.running.status()["it"]["exit"]["code"] == 3
        told.tell("READY=1")
        assert told.running.wait_for("it")["pid"] == told.pid

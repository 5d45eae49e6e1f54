"""SIGHUP and `procmanctl daemon reread`: another table while all runs; and listening sockets and their troubles."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, free_port, wait_until


def program(name: str, keys: str = "", command: str = "${PYTHON} -S -E ${PROGRAMS}/ready.py") -> str:
    return f'[program.{name}]\ncommand = "{command}"\nstart_seconds = 0\n{keys}\n'


def site(name: str, listen: str, keys: str = "") -> str:
    """A web server that answers with its pid."""
    return program(
        name, f'listen = {listen}\nready = {{ http = "/" }}\n{keys}', "${PYTHON} -S -E ${PROGRAMS}/http_one.py"
    )


def hang_up(running: RunningDaemon, said: str = "the table was read again") -> None:
    """Sends SIGHUP and waits until the daemon has said what came of it."""
    before = running.output.read_text().count(said)
    os.kill(running.keeper_pid, signal.SIGHUP)
    wait_until(lambda: running.output.read_text().count(said) > before, what=f"it says {said!r}")


def ask(port: int) -> int:
    """The pid that answers at this port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return int(answer.read())


def test_added_removed_changed_and_untouched_programs(daemon: MakeDaemon) -> None:
    first = program("same") + program("gone") + program("changed") + program("hot", "priority = 5")
    running = daemon(first)
    for name in ("same", "gone", "changed", "hot"):
        running.wait_for(name)
    before = running.status()
    changed = program("changed", 'environment = { A = "1" }') + program("hot", 'priority = 7\ngroups = ["warm"]')
    running.write_table(program("new") + program("off", "autostart = false") + program("same") + changed)
    hang_up(running)
    wait_until(lambda: "new" in running.status())
    running.wait_for("new")

    def restarted() -> bool:
        now = running.status()["changed"]
        return bool(now["state"] == "RUNNING" and now["pid"] != before["changed"]["pid"])

    wait_until(restarted)
    after = running.status()
    assert list(after) == ["new", "off", "same", "changed", "hot"], "in the order of the table"
    for name in ("same", "hot"):
        assert (after[name]["pid"], after[name]["restarts"]) == (before[name]["pid"], 0)
    assert after["hot"]["groups"] == ["warm"]
    assert after["off"]["state"] == "STOPPED"
    assert not Path(f"/proc/{before['gone']['pid']}").exists()
    assert running.ctl("why", "gone").returncode == 4
    assert "the table has changed (SIGHUP)" in running.ctl("why", "changed").stdout
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2)
    assert {name: info["pid"] for name, info in running.status().items()} == {
        name: info["pid"] for name, info in after.items()
    }, "the next supervisor has the same table"


def test_a_bad_table_changes_nothing_and_says_why(daemon: MakeDaemon) -> None:
    running = daemon(program("it"))
    pid = running.wait_for("it")["pid"]
    running.write_table(program("it", "stop_signal = 'TREM'") + program("new"))
    hang_up(running, "everything stays as it is")
    assert "procman.toml:" in running.said()
    assert "program.it.stop_signal: unknown signal 'TREM'" in running.said()
    done = running.ctl("daemon", "reread")
    assert done.returncode != 0
    assert "unknown signal 'TREM'" in done.stdout + done.stderr
    assert {name: info["pid"] for name, info in running.status().items()} == {"it": pid}
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2)
    assert {name: info["pid"] for name, info in running.status().items()} == {"it": pid}
    running.table.unlink()
    hang_up(running, "everything stays as it is")
    assert running.status()["it"]["pid"] == pid


def test_settings_of_the_daemon_that_need_its_restart_are_said(daemon: MakeDaemon) -> None:
    """And they do not come into force by a crash either."""
    running = daemon(program("it"))
    pid = running.wait_for("it")["pid"]
    own = f'socket = "{running.folder}/other.sock"\nstate_dir = "{running.folder}/elsewhere"\nlog_level = "debug"\n'
    running.table.write_text(f'[daemon]\n{own}log_dir = "{running.log_dir}"\n{program("it")}')
    hang_up(running)
    assert "restart the daemon for daemon.socket, daemon.state_dir" in running.said()
    assert running.status()["it"]["pid"] == pid
    assert running.ctl("stop", "it").returncode == 0
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2)
    assert running.json("daemon", "status")["state_dir"] == f"{running.folder}/state"
    assert running.status()["it"]["state"] == "STOPPED"
    assert running.stop() == 0
    assert not running.socket.exists()
    assert not (running.folder / "elsewhere").exists()


def test_a_stopped_program_stays_stopped_when_it_changes(daemon: MakeDaemon) -> None:
    running = daemon(program("it"))
    running.wait_for("it")
    assert running.ctl("stop", "it").returncode == 0
    running.write_table(program("it", 'environment = { A = "1" }'))
    assert running.ctl("daemon", "reread").returncode == 0
    assert running.status()["it"]["state"] == "STOPPED"
    assert running.ctl("start", "it").returncode == 0
    environment = Path(f"/proc/{running.status()['it']['pid']}/environ").read_bytes()
    assert b"A=1" in environment.split(b"\0")


def test_a_listener_moves(daemon: MakeDaemon) -> None:
    """A successor takes over on the new address, the old one is free, and another listener is never closed."""
    old, new, other = free_port(), free_port(), free_port()
    running = daemon(site("moved", f'"127.0.0.1:{old}"') + site("stays", f'"127.0.0.1:{other}"'))
    running.wait_for("moved")
    stays = running.wait_for("stays")["pid"]
    running.write_table(site("moved", f'"127.0.0.1:{new}"') + site("stays", f'"127.0.0.1:{other}"'))
    hang_up(running)
    wait_until(lambda: _who_answers(new) == running.status()["moved"]["pid"])
    assert ask(other) == stays
    with socket.socket() as mine:  # not in use any more
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_until(lambda: _binds(mine, old))


def _who_answers(port: int) -> int | None:
    try:
        return ask(port)
    except OSError:
        return None


def _binds(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def backlog_of(port: int) -> int:
    """The longest queue of who listens on this port, from TCP_INFO as ss(8) shows it."""
    done = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True, timeout=20)
    return int(done.stdout.split()[2])


def test_settings_of_a_listener_change(daemon: MakeDaemon) -> None:
    """The same address with another backlog, or another mode of its file: the socket stays, and so does who has it."""
    port = free_port()
    table = '[listener.web]\nbind = "127.0.0.1:{}"\nbacklog = {}\n[listener.file]\nbind = "unix:it.sock"\nmode = 0o{}\n'
    running = daemon(table.format(port, 16, "600") + site("it", '["web", "file"]'))
    before = running.wait_for("it")["pid"]
    path = running.folder / "it.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    running.write_table(table.format(port, 32, "666") + site("it", '["web", "file"]'))
    hang_up(running)
    wait_until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o666)
    assert ask(port) == running.status()["it"]["pid"] == before
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))
        wait_until(lambda: backlog_of(port) == 32)


def test_an_address_that_is_in_use_is_a_failed_start_that_names_the_holder(daemon: MakeDaemon) -> None:
    """Other programs run, and it comes up when the port is free."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        retry = 'restart_delay = "100ms"\nrestart_delay_max = "200ms"'
        running = daemon(site("it", f'"127.0.0.1:{port}"', retry) + program("other"))
        running.wait_for("other")
        why = running.wait_for("it", "BACKOFF")["why"]
        assert f"127.0.0.1:{port} is in use by pid {os.getpid()}" in why
        assert f"pid {os.getpid()}" in running.ctl("why", "it").stdout
        done = running.ctl("start", "it")
        assert done.returncode == 1
        assert f"pid {os.getpid()}" in done.stdout + done.stderr
    running.wait_for("it")
    assert ask(port) == running.status()["it"]["pid"]


def test_reuse_port_gives_each_process_its_own_socket(daemon: MakeDaemon) -> None:
    port = free_port()
    listener = f'[listener.web]\nbind = "127.0.0.1:{port}"\nreuse_port = true\n'
    running = daemon(listener + site("it", '["web"]', "instances = 2"))
    pids = {running.wait_for(name)["pid"] for name in ("it:1", "it:2")}
    sockets = {os.readlink(f"/proc/{pid}/fd/3") for pid in pids}
    assert len(sockets) == 2
    answered = set()
    for _ in range(200):
        answered.add(ask(port))
        if answered == pids:
            break
    assert answered == pids
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2)
    assert running.ctl("restart", "it:1").returncode == 0
    fresh = running.status()["it:1"]["pid"]
    assert os.readlink(f"/proc/{fresh}/fd/3") in sockets, "it gets the socket that was held for it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a socket to another user")
def test_the_owner_and_mode_of_a_unix_listener(daemon: MakeDaemon) -> None:
    listener = '[listener.file]\nbind = "unix:run/it.sock"\nowner = "nobody:daemon"\nmode = 0o640\n'
    running = daemon(listener + site("it", '["file"]'))
    running.wait_for("it")
    found = (running.folder / "run" / "it.sock").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_uid == pwd.getpwnam("nobody").pw_uid
    assert running.stop() == 0
    assert not (running.folder / "run" / "it.sock").exists()


def test_logs_are_opened_again(daemon: MakeDaemon) -> None:
    """SIGUSR2 and `daemon reopen-logs`, after a logrotate of somebody else's has moved the file."""
    running = daemon(program("it", command="${PYTHON} -S -E ${PROGRAMS}/print_signals.py"))
    wait_until(lambda: "ready" in running.log("it"))
    file = running.log_dir / "it.log"
    for number in (1, 2):
        file.rename(running.log_dir / f"moved.{number}")
        if number == 1:
            os.kill(running.keeper_pid, signal.SIGUSR2)
        else:
            assert running.ctl("daemon", "reopen-logs").returncode == 0
        wait_until(file.exists)
        assert running.ctl("signal", "USR1", "it").returncode == 0
        wait_until(lambda: running.log("it") == "got SIGUSR1\n")


@pytest.mark.parametrize("restarts", [True, False])
def test_a_shutdown_during_a_change_starts_nothing(daemon: MakeDaemon, restarts: bool) -> None:
    """What the change would start afterwards is not started: it would only be killed."""
    slow = '[program.slow]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"\nstop_timeout = "1s"\n'
    running = daemon(slow)
    wait_until(lambda: "ready" in running.log("slow"))
    running.write_table(slow.replace("ignore_term.py", "ignore_term.py x") if restarts else program("new"))
    os.kill(running.keeper_pid, signal.SIGHUP)
    running.wait_for("slow", "STOPPING")
    assert running.stop() == 0
    said = running.said()
    assert "new: STARTING" not in said
    assert said.count("slow: STARTING") == 1
    assert "Traceback" not in said


def test_a_hangup_during_a_reread_is_obeyed_afterwards(daemon: MakeDaemon) -> None:
    slow = '[program.slow]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"\nstop_timeout = "1s"\n'
    running = daemon(slow)
    wait_until(lambda: "ready" in running.log("slow"))
    running.write_table("")
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "daemon", "reread"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}) as reread:
        running.wait_for("slow", "STOPPING")
        running.write_table(program("new"))
        os.kill(running.keeper_pid, signal.SIGHUP)
        assert reread.wait(20) == 0
    wait_until(lambda: list(running.status()) == ["new"])


def test_a_refused_table_is_a_problem_until_a_good_one_comes(daemon: MakeDaemon) -> None:
    running = daemon(program("it"))
    running.write_table("[program.it]\ncomand = 1\n")
    os.kill(running.keeper_pid, signal.SIGHUP)
    problems = wait_until(lambda: running.json("daemon", "status")["problems"])
    assert len(problems) == 1
    assert "the table was refused (SIGHUP)" in problems[0]
    assert "did you mean 'command'?" in problems[0]
    running.write_table(program("it"))
    assert running.ctl("daemon", "reread").returncode == 0
    assert running.json("daemon", "status")["problems"] == []


def test_programs_keep_the_folders_of_the_running_daemon(daemon: MakeDaemon) -> None:
    """A new socket or log folder needs a restart of the daemon: until then no program moves, or restarts, for it."""
    running = daemon(program("it"))
    before = running.wait_for("it")["pid"]
    text = running.table.read_text().replace(str(running.log_dir), f"{running.folder}/other")
    running.table.write_text(text.replace("procman.sock", "other.sock"))
    answer = running.json("daemon", "reread")
    assert (answer["changed"], answer["restarted"]) == ([], [])
    assert "daemon.log_dir" in answer["message"]
    assert "daemon.socket" in answer["message"]
    assert running.status()["it"]["pid"] == before


def test_a_reuse_port_socket_goes_with_its_process(daemon: MakeDaemon) -> None:
    """Nobody accepts from the socket of a stopped process: it must not be in the group, or requests go there."""
    port = free_port()
    table = f'[listener.web]\nbind = "127.0.0.1:{port}"\nreuse_port = true\n'
    command = "${PYTHON} -S -E ${PROGRAMS}/http_one.py"
    running = daemon(table + program("site", 'listen = "web"\ninstances = 2', command))
    for name in ("site:1", "site:2"):
        running.wait_for(name)
    assert running.ctl("stop", "site:2").returncode == 0
    pid = running.status()["site:1"]["pid"]
    assert {ask(port) for _ in range(20)} == {pid}
    assert running.ctl("start", "site:2").returncode == 0
    wait_until(lambda: ask(port) != pid, what="the new one gets its share")


def test_a_program_that_leaves_and_comes_back(daemon: MakeDaemon) -> None:
    """Its first child has the number of one that the keeper may remember still."""
    running = daemon(SLEEPS.format("it"))
    for _ in range(4):
        pid = running.wait_for("it")["pid"]
        running.write_table("")
        assert running.ctl("daemon", "reread").returncode == 0
        assert running.status() == {}
        running.write_table(SLEEPS.format("it"))
        assert running.ctl("daemon", "reread").returncode == 0
        assert running.wait_for("it")["pid"] != pid


def test_an_operators_stop_during_a_change_counts(daemon: MakeDaemon) -> None:
    running = daemon(SLOW)
    wait_until(lambda: "ready" in running.log("slow"))
    running.write_table(f"{SLOW}environment = {{ NEW = '1' }}")
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "daemon", "reread"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE) as reread:
        running.wait_for("slow", "STOPPING")
        assert running.ctl("stop", "slow").returncode == 0
        assert reread.wait(20) == 0
    info = running.status()["slow"]
    assert (info["state"], info["wanted"]) == ("STOPPED", "down")


SLEEPS = '[program.{}]\ncommand = "sleep 1000"\nstart_seconds = 0\n'
SLOW = """
[program.slow]
command = "sh -c 'trap \\"sleep 1; exit 0\\" TERM; echo ready; while :; do sleep 0.05; done'"
start_seconds = 0
"""

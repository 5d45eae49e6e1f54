"""procmand as a command: its options, one instance, the background, its end by signals, and a service manager."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman import __version__
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, Seen, User, command_line, descendants, wait_until

PLAIN = """
    [program.it]
    command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
    start_seconds = 0
    """
STUBBORN = """
    [program.stubborn]
    command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
    start_seconds = 0
    stop_timeout = "1h"
    """


def procmand(running: RunningDaemon, *arguments: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Runs procmand on this table to its end, as the daemon would be started. `shell` is what stands after it."""
    command = [running.python, "-m", "procman.daemon", "-c", str(running.table), *arguments]
    environment = running.environment
    if shell:
        command = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *command]
    return subprocess.run(
        command, env=environment, cwd=running.folder, timeout=30, text=True, capture_output=True, check=False
    )


@contextlib.contextmanager
def background(running: RunningDaemon) -> Iterator[None]:
    """Ends a daemon that went to the background, when the test is over."""
    try:
        yield
    finally:
        seen: set[Seen] = set()
        with contextlib.suppress(Exception):
            keeper = int((running.folder / "state" / "lock").read_text().split()[0])
            seen = descendants(keeper)
            running.seen |= seen
            if "procman.daemon" in command_line(keeper):
                os.kill(keeper, signal.SIGTERM)
                wait_until(lambda: not Path(f"/proc/{keeper}").exists() or not command_line(keeper), 20)


# --- options --------------------------------------------------------------------------------------------------------


def test_options_that_start_nothing(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, start=False)
    done = procmand(running, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{running.table}: good: 1 processes, 0 listeners\n"
    done = procmand(running, "--socket")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{running.socket}\n", "")
    done = procmand(running, "--version")
    assert (done.returncode, done.stdout) == (0, f"procman {__version__}\n")
    done = procmand(running, "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert not (running.folder / "state").exists()


def test_a_bad_table_is_refused_with_every_problem(daemon: MakeDaemon) -> None:
    running = daemon("[program.it]\ncommand = 7\nstop_signal = 'TREM'\n", start=False)
    for arguments in (["--check"], [], ["--daemonize"]):
        done = procmand(running, *arguments)
        assert done.returncode == 2, (arguments, done)
        found = re.findall(r"procman\.toml:\d+: (program\.it\.\w+)", done.stderr)
        assert found == ["program.it.command", "program.it.stop_signal"], (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not running.socket.exists()


def test_a_table_that_is_missing(daemon: MakeDaemon) -> None:
    running = daemon("", start=False)
    running.table.unlink()
    done = procmand(running)
    assert done.returncode == 2
    assert str(running.table) in done.stderr


# --- one instance ---------------------------------------------------------------------------------------------------


def test_a_second_daemon_names_the_first_one(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN)
    pid = running.wait_for("it")["pid"]
    for arguments in ([], ["--daemonize"]):
        done = procmand(running, *arguments)
        assert done.returncode == 1
        assert f"pid {running.keeper_pid}" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert running.status()["it"]["pid"] == pid
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert procmand(running).returncode == 1, "also while the supervisor is replaced"


def test_a_socket_file_of_a_daemon_that_was_killed_is_replaced(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, start=False)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(running.socket))
    running.start()
    running.wait_for("it")


def test_a_daemon_that_was_killed_leaves_nothing_that_keeps_the_next_one_away(daemon: MakeDaemon) -> None:
    """kill -9 of the keeper: the supervisor ends too. Its programs are not this test's: there is none."""
    running = daemon("")
    supervisor = running.supervisor_pid
    os.kill(running.keeper_pid, signal.SIGKILL)
    assert running.process is not None
    assert running.process.wait(10) == -signal.SIGKILL
    wait_until(lambda: not command_line(supervisor), what="the supervisor has ended too")
    running.start()
    assert running.stop() == 0


# --- in the background ----------------------------------------------------------------------------------------------


def test_daemonize_returns_when_the_table_runs(daemon: MakeDaemon) -> None:
    """Nothing of the caller is kept open: a pipe behind it ends, and its folder is free."""
    running = daemon(PLAIN, start=False)
    with background(running):
        done = procmand(running, "--daemonize", shell="2>&1 | cat")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        running.wait_for("it")
        assert "it: STARTING" in (running.log_dir / "procmand.log").read_text()
        keeper = running.json("daemon", "status")["keeper_pid"]
        assert os.getsid(keeper) != os.getsid(0)
        assert os.getsid(keeper) != keeper, "no leader of a session: it can't get a terminal"
        assert os.readlink(f"/proc/{keeper}/cwd") == "/"
        wait_until(lambda: "procmand is ready" in (running.log_dir / "procmand.log").read_text())
        null = os.readlink(f"/proc/{keeper}/fd/0")
        assert null == "/dev/null"
    assert not running.socket.exists()
    assert "ends with status 0" in (running.log_dir / "procmand.log").read_text()


def test_daemonize_logs_to_a_file_that_can_be_rotated(daemon: MakeDaemon) -> None:
    """Also after the supervisor has been replaced."""
    running = daemon(PLAIN + 'log.mode = "inherit"\n', start=False)
    file, old = running.log_dir / "procmand.log", running.log_dir / "old.log"
    with background(running):
        assert procmand(running, "--daemonize").returncode == 0
        running.wait_for("it")
        wait_until(lambda: "ready " in file.read_text())
        before = running.json("daemon", "status")
        os.kill(before["supervisor_pid"], signal.SIGKILL)
        wait_until(lambda: running.json("daemon", "status")["supervisor_pid"] != before["supervisor_pid"])
        wait_until(lambda: "the supervisor was replaced" in file.read_text())
        file.rename(old)
        os.kill(before["keeper_pid"], signal.SIGUSR2)
        wait_until(file.exists, what="the daemon's own log is opened again")
        assert running.ctl("restart", "it").returncode == 0
        wait_until(lambda: "restart by uid" in file.read_text())
        assert "restart by uid" not in old.read_text()
        os.kill(running.json("daemon", "status")["supervisor_pid"], signal.SIGKILL)
        wait_until(lambda: "the supervisor was replaced" in file.read_text(), what="the keeper writes there, too")


def test_daemonize_moves_inherited_output_with_its_own_log(daemon: MakeDaemon) -> None:
    table = '[program.it]\ncommand = ["sh", "-c", "while :; do echo tick; sleep 0.05; done"]\nlog.mode = "inherit"\n'
    running = daemon(table, start=False)
    file, old = running.log_dir / "procmand.log", running.log_dir / "old.log"
    with background(running):
        assert procmand(running, "--daemonize").returncode == 0
        wait_until(lambda: "it | tick" in file.read_text())
        file.rename(old)
        assert running.ctl("daemon", "reopen-logs").returncode == 0
        wait_until(lambda: file.exists() and "it | tick" in file.read_text())
        size = old.stat().st_size
        count = file.read_text().count("it | tick")
        wait_until(lambda: file.read_text().count("it | tick") > count + 1)
        assert old.stat().st_size == size


def test_daemonize_rotates_its_own_log(daemon: MakeDaemon) -> None:
    """Inherited output is in there, too: each line once, and procmand never forgets to go on in the new file."""
    table = """
        [program.it]
        command = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.002; done"]
        log.mode = "inherit"
        """
    running = daemon(table, settings='log_max_size = "20KB"\nlog_keep = 1000', start=False)
    with background(running):
        assert procmand(running, "--daemonize").returncode == 0
        wait_until((running.log_dir / "procmand.log.2").exists, 40)
        before = running.json("daemon", "status")["supervisor_pid"]
        os.kill(before, signal.SIGKILL)  # a successor goes on with it
        wait_until(lambda: running.json("daemon", "status")["supervisor_pid"] != before)
        newest = (running.log_dir / "procmand.log.1").stat().st_ino
        wait_until(lambda: (running.log_dir / "procmand.log.1").stat().st_ino != newest, 40)
        assert running.ctl("restart", "it").returncode == 0
        wait_until(lambda: "restart by uid" in (running.log_dir / "procmand.log").read_text())
        assert running.ctl("stop", "it").returncode == 0
    files = sorted(running.log_dir.glob("procmand.log*"), key=lambda path: path.stat().st_mtime)
    text = "".join(path.read_text() for path in files)
    ticks = [int(line.split()[-1]) for line in text.splitlines() if line.startswith("it | tick ")]
    again = ticks.index(1, 1)  # it was restarted
    for run in (ticks[:again], ticks[again:]):
        assert list(dict.fromkeys(run)) == list(range(1, len(set(run)) + 1))
    assert text.count("procmand ends with status 0") == 1


def test_rotated_files_of_its_own_log_go_when_room_is_short(daemon: MakeDaemon) -> None:
    table = '[program.it]\ncommand = ["sh", "-c", "while :; do echo tick; sleep 0.05; done"]\n'
    running = daemon(table, settings='log_min_free = "99%"', start=False)
    with background(running):
        running.log_dir.mkdir()
        old = running.log_dir / "procmand.log.3"
        old.write_text("old\n")
        assert procmand(running, "--daemonize").returncode == 0
        wait_until(lambda: not old.exists(), 20)
        wait_until(lambda: f"{old} is removed" in (running.log_dir / "procmand.log").read_text())


def test_daemonize_that_can_not_rotate_its_own_log_says_so(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, settings="log_max_size = 1\nlog_keep = 1", start=False)
    own = running.log_dir / "procmand.log"
    with background(running):
        running.log_dir.mkdir()
        (running.log_dir / "procmand.log.1").mkdir()
        assert procmand(running, "--daemonize").returncode == 0
        wait_until(lambda: "can't be rotated: " in own.read_text(), 40)
        assert running.ctl("restart", "it").returncode == 0
        wait_until(lambda: "restart by uid" in own.read_text())


def test_daemonize_without_a_log_folder_says_so(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, start=False)
    running.log_dir.write_text("no folder")
    done = procmand(running, "--daemonize")
    assert done.returncode == 1
    assert str(running.log_dir) in done.stderr
    assert "Traceback" not in done.stderr


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_all(daemon: MakeDaemon, number: signal.Signals) -> None:
    running = daemon(PLAIN + "listen = 'unix:it.sock'")
    pid = running.wait_for("it")["pid"]
    assert running.process is not None
    running.process.send_signal(number)
    assert running.process.wait(20) == 0
    assert not command_line(pid)
    assert not running.socket.exists()
    assert not (running.folder / "it.sock").exists()
    assert not (running.folder / "notify").exists()
    assert f"({number.name})" in running.said()
    assert not running.leftovers()


def test_a_stubborn_child_is_killed_at_shutdown_timeout(daemon: MakeDaemon) -> None:
    running = daemon(STUBBORN + PLAIN + "priority = 1000", settings='shutdown_timeout = "500ms"')
    wait_until(lambda: "ready" in running.log("stubborn"))
    assert running.stop(10) == 0
    assert "after 0.5 s these still run and are killed: stubborn" in running.said()
    assert not running.leftovers()


def test_a_second_signal_does_not_hurry_or_break_the_end(daemon: MakeDaemon) -> None:
    slow = '[program.slow]\ncommand = "sh -c \'trap \\"sleep 0.5; echo clean; exit 0\\" TERM; echo ready; '
    running = daemon(slow + "while :; do sleep 0.05; done'\"\nstart_seconds = 0\n")
    wait_until(lambda: "ready" in running.log("slow"))
    assert running.process is not None
    for _ in range(3):
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGHUP)
    assert running.process.wait(20) == 0
    assert running.log("slow") == "ready\nclean\n"


def test_ctrl_c_on_a_terminal_stops_in_order(daemon: MakeDaemon) -> None:
    """The terminal sends SIGINT to the whole foreground group: only the keeper may take it."""
    running = daemon(
        """
        [program.first]
        command = "${PYTHON} -S -E ${PROGRAMS}/print_signals.py"
        priority = 1
        start_seconds = 0
        [program.second]
        command = "${PYTHON} -S -E ${PROGRAMS}/print_signals.py"
        start_seconds = 0
        """,
        start=False,
    )
    command = [running.python, "-m", "procman.daemon", "-c", str(running.table)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(running.folder)
        os.execve(command[0], command, running.environment)
    try:
        for name in ("first", "second"):
            wait_until(lambda name=name: "ready" in running.log(name))  # type: ignore[misc]
        running.seen |= descendants(pid)
        os.write(terminal, b"\x03")
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while piece := os.read(terminal, 4096):
                said += piece
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    text = said.decode(errors="replace")
    order = [text.index(f"{name}: {state}") for name in ("second", "first") for state in ("STOPPING", "STOPPED")]
    assert order == sorted(order), text
    for name in ("first", "second"):
        assert [line for line in running.log(name).splitlines() if line.startswith("got")] == ["got SIGTERM"]


def test_exit_when_any_fatal(daemon: MakeDaemon) -> None:
    crash = """
        [program.crash]
        command = "${PYTHON} -S -E ${PROGRAMS}/crash.py 7"
        autostart = false
        start_retries = 0
        """
    running = daemon(PLAIN + crash, settings='exit_when = "any-fatal"')
    running.wait_for("it")
    assert running.ctl("start", "--no-wait", "crash").returncode == 0
    assert running.process is not None
    assert running.process.wait(20) == 7
    assert not running.leftovers()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (-9, 137)])
def test_exit_when_all_exited(daemon: MakeDaemon, code: int, expected: int) -> None:
    """Also when the supervisor was replaced meanwhile."""
    running = daemon(
        f"""
        [program.good]
        command = "true"
        restart = "never"
        start_seconds = 0
        [program.last]
        command = "sh -c 'until test -e go; do sleep 0.02; done; exec ${{PYTHON}} -S -E ${{PROGRAMS}}/crash.py {code}'"
        restart = "never"
        start_seconds = 0
        limits.core = 0
        """,
        settings='exit_when = "all-exited"',
    )
    running.wait_for("good", "EXITED")
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    running.wait_for("last")
    (running.folder / "go").touch()
    assert running.process is not None
    assert running.process.wait(20) == expected


# --- somebody else's folders ----------------------------------------------------------------------------------------


def test_as_an_ordinary_user_with_xdg_folders(daemon: MakeDaemon, as_user: User) -> None:
    """No path in the table: everything goes where the XDG base directory specification says."""
    running = daemon("", user=as_user, start=False)
    folder = running.folder
    table = folder / "config" / "procman" / "procman.toml"
    table.parent.mkdir(parents=True)
    table.write_text('[program.it]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ready.py"\nstart_seconds = 0\n')
    for path in (folder / "config", table.parent, table):
        os.chown(path, as_user.uid, as_user.gid)
    (folder / "run").mkdir(mode=0o700)
    os.chown(folder / "run", as_user.uid, as_user.gid)
    xdg = {
        "XDG_CONFIG_HOME": f"{folder}/config",
        "XDG_RUNTIME_DIR": f"{folder}/run",
        "XDG_STATE_HOME": f"{folder}/state",
    }
    running.environment |= xdg
    with running.output.open("ab") as output:
        running.process = subprocess.Popen(
            [running.python, "-m", "procman.daemon"], env=running.environment, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **as_user.who(),
        )  # fmt: skip
    running.socket = folder / "run" / "procman" / "procman.sock"
    wait_until(running.answers)
    running.wait_for("it")
    assert (running.socket.stat().st_mode & 0o777, running.socket.stat().st_uid) == (0o600, as_user.uid)
    running.log_dir = folder / "state" / "procman" / "log"
    wait_until(lambda: "ready" in running.log("it"))
    wait_until((folder / "state" / "procman" / "state.json").exists)
    assert running.stop() == 0
    assert not running.socket.exists()


def test_a_state_folder_that_can_not_be_made(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, start=False)
    (running.folder / "state").write_text("no folder")
    done = procmand(running)
    assert done.returncode == 1
    assert f"{running.folder}/state" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_state_file_that_can_not_be_written_stops_nothing(daemon: MakeDaemon) -> None:
    """A folder stands where the state file's successor is written: so it fails for root, too."""
    running = daemon(PLAIN, start=False)
    (running.folder / "state" / "state.json.new").mkdir(parents=True)
    if running.user:
        os.chown(running.folder / "state", running.user.uid, running.user.gid)
    running.start()
    pid = running.wait_for("it")["pid"]
    wait_until(lambda: "state.json" in running.said())
    assert running.json("daemon", "status")["problems"]
    assert running.ctl("restart", "it").returncode == 0
    again = running.wait_for("it")["pid"]
    assert again != pid
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    assert running.wait_for("it")["pid"] == again, "the keeper knows the child"
    (running.folder / "state" / "state.json.new").rmdir()
    wait_until(lambda: not running.json("daemon", "status")["problems"], 15)


# --- a service manager ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(daemon: MakeDaemon, tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = f"@procman-test-{os.getpid()}" if abstract else f"/tmp/pm-notify-{os.getpid()}"
        manager.bind("\0" + address[1:] if abstract else address)
        manager.settimeout(20)
        try:
            told = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
            running = daemon(PLAIN, environment=told)
            running.wait_for("it")
            heard = [manager.recv(4096).decode()]
            while not any(text.startswith("READY=1") for text in heard):
                heard.append(manager.recv(4096).decode())
            for _ in range(3):
                assert manager.recv(4096) == b"WATCHDOG=1"
            assert running.stop() == 0
            while "STOPPING=1" not in heard:
                heard.append(manager.recv(4096).decode())
        finally:
            if not abstract:
                os.unlink(address)


def test_nothing_is_imported_from_the_current_folder(daemon: MakeDaemon) -> None:
    """procmand may be called by root in a folder that is somebody else's."""
    running = daemon(PLAIN, start=False)
    trap = "import pathlib; pathlib.Path(__file__).with_name('trapped').touch()\n"
    for name in ("tomllib", "asyncio", "logging", "psutil"):
        (running.folder / f"{name}.py").write_text(trap)
    command = [running.python, "-P", "-m", "procman.daemon", "-d", "-c", str(running.table)]  # as the script procmand
    with background(running):
        done = subprocess.run(command, env=running.environment, cwd=running.folder, timeout=30, check=False)
        assert done.returncode == 0
        running.wait_for("it")
        assert not (running.folder / "trapped").exists()


def test_the_daemons_own_umask_name_and_descriptors(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, settings='umask = 0o027\nidentifier = "shop"\nopen_files = 777')
    running.wait_for("it")
    status = Path(f"/proc/{running.supervisor_pid}/status").read_text()
    assert re.search(r"^Umask:\s+0027$", status, re.M)
    assert re.search(r"^Name:\s+shop$", status, re.M)
    limits = Path(f"/proc/{running.supervisor_pid}/limits").read_text()
    soft = int(re.search(r"Max open files\s+(\d+)", limits)[1])  # type: ignore[index]
    assert soft >= 777


def test_what_another_boot_has_left_is_no_status(daemon: MakeDaemon) -> None:
    """Monotonic times and generations of another boot mean nothing; what an operator has stopped stays so."""
    running = daemon(PLAIN + '[program.off]\ncommand = "sleep 1000"\n')
    running.wait_for("it")
    assert running.ctl("stop", "off").returncode == 0
    assert running.stop() == 0
    path = running.folder / "state" / "state.json"
    document = json.loads(path.read_text())
    document["boot_id"] = "another"
    document["processes"]["it"]["restarts"] = 77
    document["closing"] = True
    path.write_text(json.dumps(document))
    running.start()
    assert running.wait_for("it")["restarts"] == 0
    assert running.status()["off"]["wanted"] == "down"


def test_an_env_file_that_would_block_is_refused(daemon: MakeDaemon) -> None:
    """A FIFO without a writer: whoever owns the file must not be able to hang the daemon."""
    waits = '[program.it]\ncommand = "sleep 1000"\nenv_file = ["fifo"]\n'
    running = daemon(waits + PLAIN.replace(".it", ".other"), start=False)
    os.mkfifo(running.folder / "fifo")
    running.start()
    running.wait_for("other")
    assert "not a regular file" in running.wait_for("it", "BACKOFF")["why"]

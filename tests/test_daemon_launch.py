"""What a child gets from the daemon, and what `why` says when it can't get it."""

from __future__ import annotations

import grp
import json
import os
import resource
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, User, free_port, wait_until

SHOW = '"${PYTHON}", "-S", "-E", "${PROGRAMS}/show_self.py"'
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def shown(running: RunningDaemon, name: str, start: int = 1) -> Any:
    """What child number `start` of process `name` says about itself."""

    def lines() -> list[str]:
        found = running.log(name).splitlines(keepends=True)
        return found if len(found) >= start and found[-1].endswith("\n") else []

    return json.loads(wait_until(lines, what=f"{name} has shown itself")[start - 1])


def reason(running: RunningDaemon, name: str) -> str:
    """The `why` of a process that can't start."""
    running.wait_for(name, "BACKOFF")
    text = running.ctl("why", name).stdout
    assert "can't start" in text
    return text


def program(name: str, keys: str = "", command: str = SHOW) -> str:
    return f"[program.{name}]\ncommand = [{command}]\nstart_seconds = 0\nrestart_delay = '30s'\n{keys}\n"


def test_a_child_gets_its_argv_directory_umask_and_place(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Also: a session of its own, nothing as stdin, clean signals, and no descriptor but its three."""
    words = """ 'two words', "", "$HOME", "ä", "-x" """
    running = daemon(program("it", f"directory = '{tmp_path}'\numask = 0o027", f"{SHOW}, {words}"))
    it = shown(running, "it")
    assert it["argv"] == ["two words", "", "$HOME", "ä", "-x"]
    assert it["cwd"] == str(tmp_path)
    assert it["umask"] == 0o027
    assert it["sid"] == it["pgid"] == it["pid"] == running.status()["it"]["pid"]
    assert it["ppid"] == running.keeper_pid
    assert it["blocked_signals"] == 0
    python_ignores = {signal.SIGPIPE, signal.SIGXFSZ}
    ignored = {number for number in signal.valid_signals() if it["ignored_signals"] >> (number - 1) & 1}
    assert ignored <= python_ignores  # 32 and 33 are glibc's own, and no program's matter
    assert sorted(it["descriptors"]) == ["0", "1", "2"]
    assert it["descriptors"]["0"] == "/dev/null"
    assert it["descriptors"]["1"] == it["descriptors"]["2"]
    assert it["descriptors"]["1"].startswith("pipe:")


def test_without_keys_it_is_where_the_table_is_and_as_the_daemon(daemon: MakeDaemon) -> None:
    """The daemon raises its own limit of open files: a child keeps the one that the daemon was started with."""
    running = daemon(program("it"))
    it = shown(running, "it")
    assert it["cwd"] == str(running.folder)
    assert it["umask"] == 0o022
    assert it["open_files"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert it["processes"] == list(resource.getrlimit(resource.RLIMIT_NPROC))
    assert it["core"] == list(resource.getrlimit(resource.RLIMIT_CORE))
    assert it["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert it["oom_score_adj"] == int(Path("/proc/self/oom_score_adj").read_text())
    assert it["cpu_affinity"] == sorted(os.sched_getaffinity(0))
    assert it["no_new_privileges"] is True
    assert it["uid"] == list(os.getresuid())
    assert sorted(it["groups"]) == sorted(os.getgroups())


def test_limits(daemon: MakeDaemon) -> None:
    cpu = min(os.sched_getaffinity(0))
    keys = f"""
        [program.it.limits]
        open_files = 200
        processes = 5000
        core = 0
        nice = 7
        oom_score_adj = 900
        cpu_affinity = [{cpu}]
        no_new_privileges = false
        """
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if hard != resource.RLIM_INFINITY and hard < 5000:
        pytest.skip("this user may have less than 5000 processes")
    it = shown(daemon(program("it", keys)), "it")
    assert it["open_files"] == [200, 200]
    assert it["processes"] == [5000, 5000]
    assert it["core"] == [0, 0]
    assert it["nice"] == 7
    assert it["oom_score_adj"] == 900
    assert it["cpu_affinity"] == [cpu]
    assert it["no_new_privileges"] is False


def test_the_environment_what_comes_later_wins(daemon: MakeDaemon) -> None:
    """The daemon's, then the virtualenv's PATH, `env_file`, `environment`, and procman's own."""
    running = daemon(
        program(
            "it",
            """
            virtualenv = "venv"
            env_file = ["one.env", "two.env"]
            environment = { D = "table", PROCMAN_PROGRAM = "forged", NOTIFY_SOCKET = "mine" }
            """,
        ),
        environment={
            "A": "daemon", "B": "daemon", "C": "daemon", "D": "daemon", "PYTHONHOME": "",
            "LISTEN_FDS": "3", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x", "WATCHDOG_USEC": "9000000",
            "WATCHDOG_PID": "1", "NOTIFY_SOCKET": "/nowhere", "INVOCATION_ID": "7",
        },
        start=False,
    )  # fmt: skip
    folder = running.folder / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(running.python)
    (running.folder / "one.env").write_text("# first\nB=one\nC=one\nD=one\n")
    (running.folder / "two.env").write_text("export C='two words'\n\nD=two\n")
    running.start()
    environment = shown(running, "it")["environment"]
    assert [environment[name] for name in "ABCD"] == ["daemon", "one", "two words", "table"]
    assert environment["PATH"].split(":")[0] == str(folder)
    assert environment["VIRTUAL_ENV"] == str(folder.parent)
    own = {name: value for name, value in environment.items() if name.startswith("PROCMAN_") and "TEST" not in name}
    assert (own["PROCMAN_PROGRAM"], own["PROCMAN_PROCESS"], own["PROCMAN_INSTANCE"]) == ("it", "it", "1")
    assert environment["NOTIFY_SOCKET"] == "mine"
    private = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID")
    assert not [name for name in private if name in environment]


def test_what_the_service_manager_told_the_daemon_does_not_reach_a_child(daemon: MakeDaemon) -> None:
    told = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "9000000", "LISTEN_FDS": "3"}
    running = daemon(program("it"), environment=told)
    assert not set(told) & set(shown(running, "it")["environment"])


def test_inherit_environment_false(daemon: MakeDaemon) -> None:
    keys = 'inherit_environment = false\nenvironment = { MINE = "1" }'
    running = daemon(program("it", keys), environment={"SECRET": "x", "LANG": "C.UTF-8", "TZ": "UTC", "USER": "me"})
    environment = shown(running, "it")["environment"]
    names = {name for name in environment if not name.startswith("PROCMAN_")}
    assert names - {"LOGNAME"} == {"PATH", "HOME", "USER", "LANG", "TZ", "MINE"}


def test_env_file_is_read_at_each_start_and_its_errors_are_shown(daemon: MakeDaemon) -> None:
    running = daemon(program("it", 'env_file = "settings.env"'), start=False)
    file = running.folder / "settings.env"
    file.write_text("RELEASE=1\n")
    running.start()
    assert shown(running, "it")["environment"]["RELEASE"] == "1"
    file.write_text("RELEASE=2\n")
    assert running.ctl("restart", "it").returncode == 0
    assert shown(running, "it", 2)["environment"]["RELEASE"] == "2"
    file.write_text("RELEASE=3\nno equals sign\n")
    done = running.ctl("restart", "it")
    assert done.returncode == 1
    assert f"env_file {file}: line 2: expected KEY=VALUE" in done.stdout + done.stderr
    file.unlink()
    done = running.ctl("start", "it")
    assert done.returncode == 1
    assert f"env_file {file}: No such file or directory" in reason(running, "it")
    file.write_bytes(b"RELEASE=\xff\n")
    assert running.ctl("start", "it").returncode == 1
    assert str(file) in reason(running, "it")
    file.write_text("RELEASE=4\n")
    assert running.ctl("start", "it").returncode == 0


def test_an_env_file_that_no_environment_can_hold_is_a_failed_start(daemon: MakeDaemon) -> None:
    running = daemon(program("it", 'env_file = "settings.env"') + program("other"), start=False)
    (running.folder / "settings.env").write_text("RELEASE=a\0b\n")
    running.start()
    assert "settings.env: line 1: no variable can hold a NUL" in reason(running, "it")
    running.wait_for("other")


def test_instances_know_their_number(daemon: MakeDaemon) -> None:
    keys = 'instances = 3\nenvironment = { NUMBER = "n${instance}" }'
    running = daemon(program("many", keys, f'{SHOW}, "${{program}}-${{instance}}"'))
    for number in (1, 2, 3):
        it = shown(running, f"many-{number}")
        assert it["argv"] == [f"many-{number}"]
        environment = it["environment"]
        assert environment["NUMBER"] == f"n{number}"
        assert environment["PROCMAN_PROGRAM"] == "many"
        assert environment["PROCMAN_PROCESS"] == f"many:{number}"
        assert environment["PROCMAN_INSTANCE"] == str(number)


def test_listeners_come_from_descriptor_3_on_in_order(daemon: MakeDaemon) -> None:
    port = free_port()
    table = program("it", f'listen = ["web", "local", "127.0.0.1:{port}"]')
    other = free_port()
    running = daemon(
        f'[listener.local]\nbind = "unix:run/it.sock"\n[listener.web]\nbind = "127.0.0.1:{other}"\n{table}'
    )
    it = shown(running, "it")
    environment = it["environment"]
    assert environment["LISTEN_FDS"] == "3"
    assert environment["LISTEN_PID"] == str(it["pid"])
    assert environment["LISTEN_FDNAMES"].split(":")[:2] == ["web", "local"]
    assert len(environment["LISTEN_FDNAMES"].split(":")) == 3
    assert sorted(it["descriptors"]) == ["0", "1", "2", "3", "4", "5"]
    pid = it["pid"]
    inodes = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (3, 4, 5)]
    assert len(set(inodes)) == 3
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    assert stat.S_ISSOCK((running.folder / "run" / "it.sock").stat().st_mode)


def test_shell_runs_the_command_with_sh(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.it]
        command = 'echo "$((6 * 7)) $HOME"; exec sleep 1000'
        shell = true
        start_seconds = 0
        """
    )
    wait_until(lambda: running.log("it") == f"42 {running.folder}\n")


@AS_ROOT
def test_user_and_group(daemon: MakeDaemon, as_user: User) -> None:
    show = f'"{as_user.python}", "-S", "-E", "{as_user.root}/programs/show_self.py"'
    other = grp.getgrnam("daemon")
    keys = f'user = "{as_user.name}"\ndirectory = "/"\n'
    more = keys + 'group = "daemon"\nenvironment = { HOME = "/elsewhere" }'
    running = daemon(program("plain", keys, show) + program("group", more, show))
    it = shown(running, "plain")
    assert it["uid"] == [as_user.uid] * 3
    assert it["gid"] == [as_user.gid] * 3
    assert sorted(it["groups"]) == sorted(os.getgrouplist(as_user.name, as_user.gid))
    environment = it["environment"]
    assert environment["USER"] == environment["LOGNAME"] == as_user.name
    assert environment["HOME"] == os.path.expanduser(f"~{as_user.name}")
    it = shown(running, "group")
    assert it["gid"] == [other.gr_gid] * 3
    assert sorted(it["groups"]) == sorted(os.getgrouplist(as_user.name, other.gr_gid))
    assert it["environment"]["HOME"] == "/elsewhere"


def test_each_step_that_fails_is_named(daemon: MakeDaemon) -> None:
    """One program after the other can't start; the one that can runs."""
    running = daemon(
        program("missing", "", '"/no/such/program"')
        + program("unknown", "", '"no-such-program-anywhere"')
        + program("plain", "", '"./plain"')
        + program("folder", "", '"/usr"')
        + program("interpreter", "", '"./interpreter"')
        + program("garbage", "", '"./garbage"')
        + program("gone", 'directory = "nowhere"')
        + program("nodir", 'directory = "plain"')
        + program("long", "", "'" + "true" + "', '" + "x" * 200_000 + "'")
        + program("good"),
        start=False,
    )
    (running.folder / "plain").write_text("#!/bin/sh\n")
    (running.folder / "interpreter").write_text("#!/no/such/interpreter\n")
    (running.folder / "garbage").write_bytes(b"\x7fELF nonsense")
    for name in ("interpreter", "garbage"):
        (running.folder / name).chmod(0o755)
    running.start()
    expected = {
        "missing": ["exec", "no such program", "/no/such/program"],
        "unknown": ["exec", "no such program", "no-such-program-anywhere", "PATH"],
        "plain": ["exec", "can't be executed by this user", "./plain"],
        "folder": ["exec", "can't be executed by this user", "/usr"],
        "interpreter": ["exec", "interpreter", "./interpreter"],
        "garbage": ["exec", "Exec format error", "./garbage"],
        "gone": ["directory", "No such file or directory", "nowhere"],
        "nodir": ["directory", "Not a directory", "plain"],
        "long": ["exec", "Argument list too long"],
    }
    for name, words in expected.items():
        text = reason(running, name)
        assert not [word for word in words if word not in text], (name, text)
    running.wait_for("good")


def test_a_limit_that_may_not_be_set_is_named(daemon: MakeDaemon, as_user: User) -> None:
    """An ordinary user may not raise a hard limit, nor take more of the processor than it has."""
    running = daemon(
        program("files", "limits.open_files = 2000000000")
        + program("nice", "limits.nice = -20")
        + program("cpu", "limits.cpu_affinity = [8000]"),
        user=as_user,
    )
    assert "open_files: 2000000000 is more than the hard limit" in reason(running, "files")
    assert "nice: Permission denied" in reason(running, "nice") or "not permitted" in reason(running, "nice")
    assert "cpu_affinity: Invalid argument" in reason(running, "cpu")


def test_the_host_of_a_probe(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A site that answers to its own names only, as Django does with ALLOWED_HOSTS, is asked by one of them."""
    (tmp_path / "picky.py").write_text(
        "def app(environ, start_response):\n"
        "    known = environ['HTTP_HOST'] == 'shop.example'\n"
        "    start_response('200 OK' if known else '400 Bad Request', [])\n"
        "    return [environ['HTTP_HOST'].encode()]\n"
    )
    table = f"""
        [program.web]
        server = "wsgi"
        app = "picky:app"
        directory = "{tmp_path}"
        listen = "127.0.0.1:{free_port()}"
        start_seconds = 0.1
        start_timeout = "3s"
    """
    running = daemon(f'{table}\nready = {{ http = "/", host = "shop.example" }}\n')
    running.wait_for("web", timeout=20)
    running.write_table(f'{table}\nready = {{ http = "/", host = "other.example" }}\n')
    assert "HTTP 400 to the host other.example; rolled back" in running.ctl("apply").stderr

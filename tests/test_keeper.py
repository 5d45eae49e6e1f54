"""The keeper as its own process. The supervisor that it starts is only a stub, which hands its end of the wire over to
the test: so the test is the supervisor, says what it likes, and lets it die when it likes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procman import __version__
from procman.keeper import tree
from procman.keeper.wire import HEADER, Message, Wire, WireClosed
from tests.harness import PROJECT, descendants, wait_until

KEEPER = """
import sys, json
from procman.keeper import keeper, upgrade
settings = json.loads(sys.argv[2])
for name in [name for name in settings if name.isupper()]:
    setattr(upgrade if hasattr(upgrade, name) else keeper, name, settings.pop(name))
command = [sys.executable, "-S", "-E", "-c", sys.argv[3], sys.argv[1]]
again = settings.pop("again", [sys.executable, "-S", "-c", sys.orig_argv[3], *sys.argv[1:4]])
if "gate" in settings:  # a fifo: the next self begins when it is written to
    again = ["/bin/sh", "-c", 'read line < "$0"; exec "$@"', settings.pop("gate"), *again]
commands = keeper.Commands(command, settings.pop("check", ["/bin/true"]), again)
settings["handed_over"] = int(sys.argv[4]) if sys.argv[4:] else -1
sys.exit(keeper.run(commands, on_ready=lambda: print("on_ready", flush=True), **settings))
"""

STUB = """
import os, select, socket, sys
control, wire = socket.socket(socket.AF_UNIX), int(sys.argv[2])
control.connect(chr(0) + sys.argv[1])
socket.send_fds(control, [str(os.getpid()).encode()], [wire])
poll = select.poll()
poll.register(control, select.POLLIN)
poll.register(wire, 0)  # the keeper closes it, and we go: as a real one does
os._exit(int(control.recv(10) or b"0") if poll.poll()[0][0] == control.fileno() else 0)
"""

SLEEP = ["sleep", "60"]


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, *arguments]


class Supervisor:
    """The test's end of the wire. What comes first is the snapshot."""

    def __init__(self, control: socket.socket) -> None:
        data, descriptors, _, _ = socket.recv_fds(control, 32, 1)
        self.control = control
        self.pid = int(data)
        self.socket = socket.socket(fileno=descriptors[0])
        self.wire = Wire(self.socket)
        self.answers_pings = True
        self.pings = 0
        self.messages: list[Message] = []
        self.children: dict[str, Message] = {}
        self.held: dict[str, int] = {}
        self.hello = self.expect("hello")
        self.expect("begin")

    def send(self, op: str, *descriptors: int, **fields: Any) -> None:
        self.wire.send({"op": op, **fields}, descriptors)
        while self.wire.waiting:
            select.select([], [self.wire], [], 1)
            self.wire.flush()

    def spawn(self, child: str, argv: list[str] | None = None, **fields: Any) -> None:
        self.send("spawn", child=child, argv=SLEEP if argv is None else argv, **({"env": dict(os.environ)} | fields))

    def spawned(self, child: str, argv: list[str] | None = None, **fields: Any) -> int:
        """Spawns a child and returns its pid."""
        self.spawn(child, argv, **fields)
        return int(self.expect("spawned", child=child)["pid"])

    def expect(self, op: str, timeout: float = 10.0, **fields: Any) -> Message:
        """Waits for a message with these fields and takes it."""
        wanted = {"op": op, **fields}

        def arrived() -> Message | None:
            seconds = 0.02
            while True:
                more = self.look(seconds)
                for message in self.messages:
                    if wanted.items() <= message.items():
                        self.messages.remove(message)
                        return message
                if not more:
                    return None
                seconds = 0.0

        found = wait_until(arrived, timeout, f"{wanted}; there is {self.messages}")
        assert found is not None
        return found

    def look(self, seconds: float = 0.0) -> bool:
        """Takes in what has come. Returns whether there was something."""
        if not select.select([self.wire], [], [], seconds)[0]:
            return False
        for message, descriptors in self.wire.receive():
            match message["op"]:
                case "ping":
                    self.pings += 1
                    if self.answers_pings:
                        self.send("pong")
                case "child":
                    self.children[message["child"]] = message
                case "held":
                    self.held[message["name"]] = descriptors[0]
                case _:
                    self.messages.append(message)
        return True

    def sync(self) -> None:
        """Everything that was asked for has been done."""
        self.send("sync", number=7)
        self.expect("synced", number=7)

    def leave(self, status: int) -> None:
        """The stub exits."""
        self.control.send(str(status).encode())
        self.close()

    def die(self) -> None:
        """The stub is killed."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        self.wire.close()
        self.control.close()
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class RunningKeeper:
    """A keeper with its own stderr file."""

    def __init__(self, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        name = f"procman-test-{uuid4().hex}"
        self.listener.bind(f"\0{name}")
        self.listener.listen(50)
        self.listener.settimeout(10)
        self.output = folder / "keeper.out"
        self.supervisors: list[Supervisor] = []
        environment = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(PROJECT)}
        given = json.dumps({"use_cgroup": False, "heartbeat": 60.0} | settings)
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", KEEPER, name, given, STUB],
                **{
                    "env": environment | options.pop("env", {}),
                    "stdin": subprocess.DEVNULL,
                    "stdout": output,
                    "stderr": output,
                    "start_new_session": True,
                    **options,
                },
            )

    def supervisor(self) -> Supervisor:
        """The next supervisor that the keeper has started, with its snapshot read."""
        control, _ = self.listener.accept()
        control.settimeout(10)
        supervisor = Supervisor(control)
        self.supervisors.append(supervisor)
        return supervisor

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float = 15.0) -> int:
        return self.process.wait(timeout)

    def below(self) -> set[int]:
        """Pids below the keeper, zombies too."""
        return {seen.pid for seen in descendants(self.process.pid)}

    def close(self) -> None:
        below = descendants(self.process.pid)
        for supervisor in self.supervisors:
            supervisor.close()
        self.listener.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for seen in below:
            if seen.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seen.pid, signal.SIGKILL)


class Start(Protocol):
    def __call__(self, *, options: dict[str, Any] | None = None, **settings: Any) -> RunningKeeper: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts keepers; `settings` are arguments of keeper.run, and constants of keeper.py and upgrade.py in
    capitals. "check" and "again" are the commands of an upgrade; by default: one that succeeds, and the same keeper."""
    made: list[RunningKeeper] = []

    def make(*, options: dict[str, Any] | None = None, **settings: Any) -> RunningKeeper:
        made.append(RunningKeeper(tmp_path, settings, dict(options or {})))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def keeper(start: Start) -> RunningKeeper:
    return start()


def alive(pid: int) -> bool:
    """It runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- spawning -------------------------------------------------------------------------------------------------------


def test_hello_comes_first(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    identity = boss.hello.pop("identity")
    expected = {"op": "hello", "pid": keeper.process.pid, "starts": 1, "last": "", "cgroup": "", "version": __version__}
    assert boss.hello == expected | {"upgrades": 0, "upgrading": False}
    boss.send("ready")
    boss.sync()
    assert keeper.said() == "on_ready\n"
    boss.die()
    second = keeper.supervisor()
    assert (second.hello["starts"], second.hello["last"]) == (2, "killed by SIGKILL")
    assert second.hello["identity"] == identity, "it is the same life of the daemon"
    second.send("ready")
    second.sync()
    assert keeper.said().count("on_ready\n") == 1, "on_ready is called once"


def test_a_child_that_is_asked_for_again_is_not_started_again(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    boss.spawn("a#1")
    boss.sync()
    boss.die()
    second = keeper.supervisor()
    assert second.children["a#1"].items() >= {"state": "running", "pid": pid, "left": False}.items()
    second.spawn("a#1")
    second.sync()
    assert second.messages == []
    assert keeper.below() == {second.pid, pid}


NOWHERE = "/nonexistent/procman"

FAILURES: list[tuple[str, dict[str, Any], str, int]] = [
    ("no folder", {"directory": NOWHERE}, "directory", errno.ENOENT),
    ("a file as folder", {"directory": "/etc/passwd"}, "directory", errno.ENOTDIR),
    ("no program", {"argv": [NOWHERE]}, "exec", errno.ENOENT),
    ("no program in PATH", {"argv": ["procman-nonexistent"]}, "exec", errno.ENOENT),
    ("below a file", {"argv": ["/etc/passwd/x"]}, "exec", errno.ENOENT),
    ("can't be executed", {"argv": ["/etc/passwd"]}, "exec", errno.EACCES),
    ("a folder", {"argv": ["/etc"]}, "exec", errno.EACCES),
    ("too long", {"argv": ["true", "x" * 3_000_000]}, "exec", errno.E2BIG),
    ("a NUL", {"argv": ["true", "\0"]}, "exec", errno.EINVAL),
    ("no argv", {"argv": []}, "exec", errno.EINVAL),
    ("argv is a number", {"argv": 7}, "exec", errno.EINVAL),
    ("no env", {"env": None}, "exec", errno.EINVAL),
    ("env holds a number", {"env": {"A": 1}}, "exec", errno.EINVAL),
    ("a name with =", {"env": {"A=B": "1"}}, "exec", errno.EINVAL),
    ("nothing held", {"stdout": "log/a/out/w"}, "descriptors", errno.EBADF),
    ("no listener held", {"listen": [["web", "listener/web"]]}, "descriptors", errno.EBADF),
    ("listen is text", {"listen": "web"}, "descriptors", errno.EINVAL),
    ("more files than there can be", {"limits": {"open_files": 1 << 40}}, "open_files", errno.EPERM),
    ("no such processor", {"limits": {"cpu_affinity": [1023]}}, "cpu_affinity", errno.EINVAL),
    ("limits is a list", {"limits": [1]}, "start", errno.EINVAL),
    ("umask is text", {"umask": "x"}, "umask", errno.EINVAL),
    ("astral", {"directory": "\N{GRINNING FACE}" * 200 + "/x"}, "directory", errno.ENAMETOOLONG),
    ("a long message", {"directory": "\N{GRINNING FACE}" * 60}, "directory", errno.ENOENT),
]


def test_each_step_that_fails_is_told(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    for name, fields, _, _ in FAILURES:
        boss.spawn(name, **{"argv": ["true"], **fields})
    for name, _, step, number in FAILURES:
        failed = boss.expect("failed", child=name)
        assert (failed["step"], failed["errno"], failed["left"]) == (step, number, False), (name, failed)
        assert failed["message"], name
        assert len(failed["message"]) <= 300, name
    boss.die()
    second = keeper.supervisor()
    assert set(second.children) == {name for name, *_ in FAILURES}
    record = second.children["no folder"]
    assert (record["state"], record["step"], record["errno"]) == ("exited", "directory", errno.ENOENT)
    for name in second.children:
        second.send("forget", child=name)
    second.sync()
    assert keeper.below() == {second.pid}
    second.die()
    assert keeper.supervisor().children == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may become anybody")
def test_another_user_needs_root(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.spawn("a#1", ["true"], uid=0, gid=0, groups=[])
    assert boss.expect("failed")["step"] == "groups"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_another_user(keeper: RunningKeeper, tmp_path: Path) -> None:
    boss = keeper.supervisor()
    read_end, write_end = os.pipe()
    boss.send("hold", write_end, names=["out"])
    os.close(write_end)
    who: dict[str, Any] = {"uid": 12345, "gid": 23456, "groups": [7], "umask": 0o27}
    boss.spawn("a#1", ["sh", "-c", "id -u; id -g; id -G; umask"], stdout="out", **who)
    boss.expect("exited", status=0)
    with open(read_end) as output:
        boss.send("release", name="out")
        assert output.read().split("\n") == ["12345", "23456", "23456 7", "0027", ""]


def test_how_a_child_ended(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.spawn("a#1", python("sum(range(3_000_000)); raise SystemExit(7)"))
    exited = boss.expect("exited", child="a#1")
    assert os.waitstatus_to_exitcode(exited["status"]) == 7
    assert exited["rusage"]["user"] + exited["rusage"]["system"] > 0.01
    assert exited["rusage"]["max_rss_kb"] > 1000
    assert abs(exited["ended_at"] - time.time()) < 60
    assert 0.01 < exited["lived"] < 60
    os.kill(boss.spawned("b#1"), signal.SIGSEGV)
    assert boss.expect("exited", child="b#1")["status"] & 0x7F == signal.SIGSEGV


def test_what_a_child_gets(start: Start, tmp_path: Path) -> None:
    """Its own descriptors only, and not what the keeper inherited; default signals, none blocked; its own session."""
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    keeper = start(options={"pass_fds": [leak]})
    os.close(leak)
    boss = keeper.supervisor()
    read_end, write_end = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        boss.send("hold", write_end, names=["out"])
        boss.send("hold", listener.fileno(), names=["listener/web"])
        os.close(write_end)
        code = (
            "import os, json, re\n"
            "status = open('/proc/self/status').read()\n"
            "mask = {k: re.search(k + ':[ \\t]*([0-9a-f]+)', status)[1] for k in ('SigBlk', 'SigIgn')}\n"
            "folder = '/proc/self/fd/'\n"
            "fds = {fd: os.readlink(folder + fd) for fd in os.listdir(folder) if os.path.islink(folder + fd)}\n"
            "listen = {k: v for k, v in os.environ.items() if k.startswith('LISTEN_')}\n"
            "mark = os.environ['PROCMAN_CHILD']\n"
            "print(json.dumps([mask, fds, listen, mark, os.getpid() == os.getsid(0), os.getpid(), os.getcwd()]))"
        )
        listen = [["web", "listener/web"], ["a:b", "listener/web"]]
        path = {"PATH": os.path.dirname(sys.executable)}
        boss.spawn("a#1", ["python3", *python(code)[1:]], stdout="out", stderr=None, listen=listen, env=path)
        boss.expect("exited", status=0)
    boss.send("release", name="out")
    with open(read_end) as output:
        mask, fds, variables, mark, leads, pid, folder = json.loads(output.read())
    assert int(mask["SigBlk"], 16) == 0
    ignored = {number for number in signal.valid_signals() if int(mask["SigIgn"], 16) >> (number - 1) & 1}
    assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ}  # Python's own two
    assert sorted(fds, key=int) == ["0", "1", "2", "3", "4"]
    assert fds["0"] == fds["2"] == "/dev/null"
    assert fds["1"].startswith("pipe:")
    assert fds["3"] == fds["4"]
    assert fds["3"].startswith("socket:")
    assert variables == {"LISTEN_FDS": "2", "LISTEN_PID": str(pid), "LISTEN_FDNAMES": "web:a_b"}
    assert (mark, leads, folder) == ("a#1", True, "/")


def test_no_descriptor_is_free(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    pid = boss.spawned("before#1")
    limits = resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{keeper.process.pid}/fd")) + 1
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    boss.spawn("a#1")
    failed = boss.expect("failed", child="a#1")
    assert (failed["step"], failed["errno"]) == ("fork", errno.EMFILE)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(pid, signal.SIGKILL)
    assert boss.expect("exited", child="before#1")["left"] is True, "nobody can tell"
    boss.send("signal", child="before#1", signal=signal.SIGKILL, tree=True)
    boss.sync()
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, limits)
    boss.send("signal", child="before#1", signal=signal.SIGKILL, tree=True)
    boss.expect("gone", child="before#1")
    boss.spawned("a#2")


def hold_all_that_goes(boss: Supervisor) -> list[str]:
    """Has the keeper hold as many descriptors as it takes, eight at once. Returns their names."""
    read, write = os.pipe()
    held: list[str] = []
    try:
        for number in range(10_000):
            names = [f"{number}/{each}" for each in range(8)]
            boss.send("hold", *[read] * 8, names=names)
            boss.sync()
            if [message for message in boss.messages if message["op"] == "lost"]:
                assert boss.expect("lost")["names"] == names
                return held
            held += names
        raise AssertionError("there is no limit")
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("limit", [128, 700])
def test_what_is_held_leaves_room_for_a_successor(keeper: RunningKeeper, limit: int) -> None:
    """A supervisor that has the keeper hold what it can get keeps nobody from replacing it, nor from what a keeper is
    for. 700: more than the wire takes at once while nobody reads it, so that copies have to wait."""
    boss = keeper.supervisor()
    boss.send("ready")
    pid = boss.spawned("before#1")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
    held = hold_all_that_goes(boss)
    assert len(held) >= 16
    assert f"no file descriptor is free to hold {len(held) // 8}/0, " in keeper.said()
    for _ in range(2):
        boss.die()
        time.sleep(0.3)  # it fills the wire, and does not read it
        boss = keeper.supervisor()
        assert sorted(boss.held) == sorted(held)
        boss.send("ready")
    ended = boss.spawned("a#1", python("import subprocess; subprocess.Popen(['sleep', '60'])"))
    assert boss.expect("exited", child="a#1", pid=ended)["left"] is True
    boss.send("signal", child="a#1", signal=signal.SIGKILL, tree=True)
    boss.expect("gone", child="a#1")
    boss.send("signal", child="before#1", signal=signal.SIGTERM, tree=True)
    assert boss.expect("exited", child="before#1", pid=pid)["left"] is False
    for name in held:
        boss.send("release", name=name)
    assert hold_all_that_goes(boss) == held, "what is given back can be held again"
    assert "can't" not in keeper.said()


def test_a_child_is_not_started_in_the_last_room(keeper: RunningKeeper) -> None:
    """Each has a descriptor in the keeper until it gets to exec, and a dead disk may make that long."""
    boss = keeper.supervisor()
    boss.send("ready")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (200, hard))
    hold_all_that_goes(boss)
    boss.spawned("a#1")
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NOFILE, (160, hard))
    boss.spawn("b#1")
    failed = boss.expect("failed", child="b#1")
    assert (failed["step"], failed["errno"], failed["message"]) == ("fork", errno.EMFILE, "Too many open files")
    boss.die()
    boss = keeper.supervisor()
    assert boss.children["a#1"]["state"] == "running"


@pytest.mark.skipif(os.geteuid() == 0, reason="RLIMIT_NPROC does not hold for root")
def test_no_process_is_free(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    limits = resource.prlimit(keeper.process.pid, resource.RLIMIT_NPROC)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NPROC, (1, limits[1]))
    boss.spawn("a#1")
    failed = boss.expect("failed", child="a#1")
    assert (failed["step"], failed["errno"]) == ("fork", errno.EAGAIN)
    resource.prlimit(keeper.process.pid, resource.RLIMIT_NPROC, limits)
    boss.spawned("a#2")


# --- what happens while nobody is there -----------------------------------------------------------------------------


def test_an_end_that_no_supervisor_saw_is_in_the_snapshot_until_it_is_forgotten(keeper: RunningKeeper) -> None:
    pid = keeper.supervisor().spawned("a#1")
    for _ in range(3):
        keeper.supervisors[-1].leave(1)
        boss = keeper.supervisor()
    boss.send("ready")
    boss.leave(1)  # the next one comes after a pause, for these have failed
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: pid not in keeper.below(), what="the end of the child")
    boss = keeper.supervisor()
    record = boss.children["a#1"]
    assert (record["state"], record["status"], record["left"]) == ("exited", signal.SIGUSR1, False)
    assert record["rusage"]
    boss.die()
    boss = keeper.supervisor()
    assert boss.children["a#1"] == record
    boss.send("forget", child="a#1")
    boss.sync()
    boss.die()
    assert keeper.supervisor().children == {}


def test_a_child_that_runs_is_not_forgotten(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.spawned("a#1")
    boss.send("forget", child="a#1")
    boss.send("forget", child="never was")
    boss.sync()
    boss.die()
    assert list(keeper.supervisor().children) == ["a#1"]


def test_held_descriptors_come_back_and_work(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    read_end, write_end = os.pipe()
    boss.send("hold", write_end, names=["log/a/out/w"])
    boss.send("hold", read_end, names=["log/a/out/r"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        boss.send("hold", listener.fileno(), names=["listener/web"])
        address = listener.getsockname()
    os.close(write_end)
    os.close(read_end)
    boss.sync()
    boss.die()
    with socket.create_connection(address, timeout=5):
        boss = keeper.supervisor()
        assert set(boss.held) == {"log/a/out/w", "log/a/out/r", "listener/web"}
        with socket.socket(fileno=boss.held.pop("listener/web")) as again:
            again.accept()[0].close()
    os.write(boss.held["log/a/out/w"], b"hello")
    assert os.read(boss.held["log/a/out/r"], 10) == b"hello"
    boss.send("release", name="listener/web")
    boss.send("release", name="never was")
    boss.sync()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    boss.die()
    assert set(keeper.supervisor().held) == {"log/a/out/w", "log/a/out/r"}


def test_what_is_held_anew_replaces_the_old(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    first_read, first_write = os.pipe()
    second_read, second_write = os.pipe()
    boss.send("hold", first_write, names=["x"])
    boss.send("hold", second_write, names=["x"])
    os.close(first_write)
    os.close(second_write)
    assert os.read(first_read, 1) == b"", "the first one was closed"
    boss.spawn("a#1", ["echo", "hello"], stdout="x")
    assert os.read(second_read, 10) == b"hello\n"
    boss.send("release", name="x")
    boss.expect("exited")
    assert os.read(second_read, 1) == b""
    os.close(first_read)
    os.close(second_read)


# --- signals and what a child leaves --------------------------------------------------------------------------------

LEAVER = """
import os, sys, time
if os.fork():
    time.sleep(60)
os.setsid()
if os.fork():
    os._exit(0)
os.write(1, str(os.getpid()).encode())
time.sleep(60)
"""


def leaver(boss: Supervisor, **fields: Any) -> tuple[int, int]:
    """A child, and its grandchild in a session of its own, which has forgotten whose it is."""
    read_end, write_end = os.pipe()
    boss.send("hold", write_end, names=["out"])
    os.close(write_end)
    pid = boss.spawned("a#1", python(LEAVER), stdout="out", **fields)
    grandchild = int(os.read(read_end, 20))
    os.close(read_end)
    return pid, grandchild


@pytest.mark.parametrize("use_cgroup", [False, True])
def test_what_a_child_leaves_is_found_and_killed(start: Start, use_cgroup: bool) -> None:
    keeper = start(use_cgroup=use_cgroup)
    boss = keeper.supervisor()
    boss.send("ready")
    if use_cgroup and not boss.hello["cgroup"]:
        pytest.skip("no cgroup can be made here")
    _, grandchild = leaver(boss)
    boss.send("signal", child="a#1", signal=signal.SIGTERM, tree=False)
    assert boss.expect("exited", child="a#1")["left"] is True
    assert alive(grandchild)
    boss.send("forget", child="a#1")
    boss.sync()
    boss.die()
    boss = keeper.supervisor()
    assert boss.children["a#1"]["left"] is True, "it is not forgotten while something is left"
    boss.send("signal", child="a#1", signal=signal.SIGKILL, tree=True)
    boss.expect("gone", child="a#1")
    wait_until(lambda: keeper.below() == {boss.pid}, what="no child and no zombie")
    assert not alive(grandchild)
    boss.die()
    boss = keeper.supervisor()
    assert boss.children == {}
    if use_cgroup:
        assert [entry for entry in os.scandir(boss.hello["cgroup"]) if entry.is_dir()] == []


def test_a_signal_for_the_whole_tree(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    leaver(boss)
    boss.send("signal", child="a#1", signal=signal.SIGTERM, tree=True)
    boss.expect("exited", child="a#1", status=signal.SIGTERM)
    wait_until(lambda: keeper.below() == {boss.pid}, what="no child and no zombie")


def test_the_last_one_that_is_left_ends_by_itself(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    pid, grandchild = leaver(boss)
    os.kill(pid, signal.SIGKILL)
    boss.expect("exited", child="a#1", left=True)
    os.kill(grandchild, signal.SIGKILL)
    boss.expect("gone", child="a#1")


def test_kill_main_leaves_the_others_alone(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    _, grandchild = leaver(boss, kill="main")
    boss.send("signal", child="a#1", signal=signal.SIGKILL, tree=True)
    assert boss.expect("exited", child="a#1")["left"] is False
    assert alive(grandchild)


def test_orphans_are_reaped(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    pid = boss.spawned("a#1", ["sh", "-c", "(sleep 0.05 & sleep 0.01 &) ; exec sleep 60"])
    wait_until(lambda: keeper.below() == {boss.pid, pid}, what="no zombie")


@pytest.mark.parametrize("tree", [False, True])
def test_signals_that_are_none(keeper: RunningKeeper, tree: bool) -> None:
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    for number in (-1, 0, 65, 999, 2**31, 2**70):
        boss.send("signal", child="a#1", signal=number, tree=tree)
    boss.send("signal", child="never was", signal=signal.SIGKILL, tree=tree)
    boss.sync()
    assert alive(pid)
    assert "a#1" in keeper.said()


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 3])
def test_exit_leaves_nothing_behind(keeper: RunningKeeper, status: int) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    pids = [*leaver(boss), boss.spawned("b#1", python("import signal, time; signal.signal(15, 1); time.sleep(60)"))]
    boss.send("exit", status=status)
    assert keeper.wait() == status
    assert not [pid for pid in (*pids, boss.pid) if alive(pid)]


@pytest.mark.parametrize("supervisor_first", [False, True])
def test_the_last_words_of_a_supervisor_count(keeper: RunningKeeper, supervisor_first: bool) -> None:
    """It asks for the end and ends at once: whatever the keeper sees first, that is no crash."""
    boss = keeper.supervisor()
    boss.send("ready")
    boss.spawned("a#1")
    os.kill(keeper.process.pid, signal.SIGSTOP)
    if supervisor_first:
        os.kill(boss.pid, signal.SIGKILL)
        wait_until(lambda: not alive(boss.pid))
        boss.wire.send({"op": "exit", "status": 5})
    else:
        boss.wire.send({"op": "exit", "status": 5})
        boss.die()
    os.kill(keeper.process.pid, signal.SIGCONT)
    assert keeper.wait() == 5
    assert "starting another" not in keeper.said()


def test_a_first_start_that_fails_ends_the_keeper(keeper: RunningKeeper) -> None:
    keeper.supervisor().leave(2)
    assert keeper.wait() == 2


def test_a_first_start_that_is_killed_is_tried_again(keeper: RunningKeeper) -> None:
    """It has not failed: somebody else has ended it."""
    keeper.supervisor().die()
    second = keeper.supervisor()
    assert second.hello["starts"] == 2
    second.send("ready")
    second.sync()
    assert keeper.said().count("on_ready\n") == 1


def test_a_supervisor_that_can_not_be_executed(tmp_path: Path) -> None:
    code = f"from procman.keeper import keeper; commands = keeper.Commands([{NOWHERE!r}], [], [])"
    code += "; raise SystemExit(keeper.run(commands, use_cgroup=False))"
    environment = {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=20, check=False)
    assert done.returncode == 127
    assert NOWHERE in done.stderr.decode()


# --- a supervisor that is no good -----------------------------------------------------------------------------------


def test_a_supervisor_that_never_becomes_ready_is_tried_again_more_and_more_slowly(start: Start) -> None:
    keeper = start(RETRY_SECONDS=0.05)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    gaps = []
    for number in range(2, 8):
        boss.leave(1)
        at = time.monotonic()
        boss = keeper.supervisor()
        gaps.append(time.monotonic() - at)
        assert (boss.hello["starts"], boss.hello["last"]) == (number, "exit status 1")
        assert boss.children["a#1"]["pid"] == pid
    assert gaps[-1] > gaps[-3] > gaps[0], gaps
    assert gaps[-1] > 1.5 * gaps[0], gaps


def test_a_ready_supervisor_that_is_killed_has_a_successor_at_once(start: Start) -> None:
    keeper = start(RETRY_SECONDS=60.0)
    for _ in range(4):
        boss = keeper.supervisor()
        boss.send("ready")
        boss.sync()
        boss.die()
    keeper.supervisor()


def test_a_supervisor_that_somebody_kills_before_it_is_ready_has_not_failed(start: Start) -> None:
    """The delay stays small. If it doubled, as for one that fails, the last one here would be 6.4 s."""
    keeper = start(RETRY_SECONDS=0.2)
    boss = keeper.supervisor()
    boss.spawned("a#1")  # else nobody would need another supervisor
    for _ in range(6):
        boss.die()
        boss = keeper.supervisor()
    boss.die()
    at = time.monotonic()
    keeper.supervisor()
    assert time.monotonic() - at < 4


def test_a_supervisor_that_failed_long_after_it_was_ready_has_not_failed_again(start: Start) -> None:
    keeper = start(RETRY_SECONDS=60.0, STEADY_SECONDS=0.0)
    for _ in range(4):
        boss = keeper.supervisor()
        boss.send("ready")
        boss.sync()
        boss.leave(1)
    keeper.supervisor()


def test_a_supervisor_that_does_not_answer_is_replaced(start: Start) -> None:
    keeper = start(heartbeat=0.1)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    while boss.pings < 8:
        boss.look(1.0)
    assert alive(boss.pid), "it answers"
    boss.answers_pings = False
    second = keeper.supervisor()
    assert not alive(boss.pid)
    assert second.hello["last"] == "killed by SIGKILL"
    assert second.children["a#1"]["pid"] == pid
    assert alive(pid)
    assert "does not answer" in keeper.said()


def test_a_supervisor_that_does_not_even_read_is_replaced(start: Start) -> None:
    keeper = start(heartbeat=0.1)
    boss = keeper.supervisor()
    boss.send("ready")
    for number in range(80):
        boss.send("spawn", child=f"{number:04}{'x' * 10_000}", argv=["/nonexistent"], env={})
    second = keeper.supervisor()
    assert len(second.children) == 80
    assert "does not answer" in keeper.said()


GARBAGE = [b"\0" * 5, b"\xff" * 100, HEADER.pack(2, 0) + b"[]", HEADER.pack(2, 1) + b"{}", HEADER.pack(9, 0) + b"[" * 9]


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
def test_a_supervisor_that_talks_nonsense_is_replaced(keeper: RunningKeeper, garbage: bytes) -> None:
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    boss.socket.send(garbage)
    second = keeper.supervisor()
    assert not alive(boss.pid)
    assert second.children["a#1"]["pid"] == pid
    assert "nonsense" in keeper.said()


def test_a_supervisor_that_closes_the_wire_and_lives_is_replaced(start: Start) -> None:
    keeper = start(heartbeat=0.05)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    os.kill(boss.pid, signal.SIGSTOP)  # alive, but it does not go by itself
    boss.socket.shutdown(socket.SHUT_RDWR)
    second = keeper.supervisor()
    assert not alive(boss.pid)
    assert second.children["a#1"]["pid"] == pid


ANYTHING = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
FIELDS = {
    "child": ANYTHING | st.sampled_from(["a#1", "", "/", "..", "x\0y", "y" * 300]),
    "argv": ANYTHING | st.just(["true"]) | st.lists(st.just(""), max_size=2),
    "env": ANYTHING | st.dictionaries(st.text(max_size=3), ANYTHING, max_size=2),
    "signal": ANYTHING,
    "name": ANYTHING,
    "number": ANYTHING,
    "listen": ANYTHING,
    "limits": ANYTHING | st.dictionaries(st.sampled_from(["nice", "core", "oom_score_adj", "cpu_affinity"]), ANYTHING),
    "state": ANYTHING,
    "stdout": ANYTHING,
    "uid": st.none() | st.text(max_size=3),
    "umask": ANYTHING,
    "directory": ANYTHING,
    "kill": ANYTHING,
    "tree": ANYTHING,
    "status": st.none() | st.text(),
}
OPS = ["spawn", "signal", "forget", "hold", "release", "sync", "ready", "notify", "log", "pong", "exit", "", None, 7]
MALFORMED = st.tuples(st.sampled_from(OPS), st.fixed_dictionaries({}, optional=FIELDS))


def test_no_message_ends_the_keeper(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    # Not "a#1", which a signal may rightly hit.
    pid = boss.spawned("survivor#1")

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(MALFORMED, max_size=8))
    def check(messages: list[tuple[object, Message]]) -> None:
        for op, fields in messages:
            boss.wire.send({"op": op} | fields)
        boss.send("sync", number=77_777)
        boss.expect("synced", number=77_777)
        boss.messages.clear()

    check()
    assert alive(pid)
    assert keeper.process.poll() is None
    assert "bug in procman" not in keeper.said()
    boss.die()
    assert keeper.supervisor().children["survivor#1"]["pid"] == pid


def test_nobody_reads_what_the_keeper_says(start: Start) -> None:
    read_end, write_end = os.pipe()
    keeper = start(options={"stderr": write_end, "stdout": subprocess.DEVNULL})
    os.close(write_end)
    os.close(read_end)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    boss.die()
    assert keeper.supervisor().children["a#1"]["pid"] == pid


def test_started_without_standard_descriptors(start: Start) -> None:
    keeper = start(options={"preexec_fn": lambda: os.closerange(0, 3)})
    boss = keeper.supervisor()
    read_end, write_end = os.pipe()
    boss.send("hold", write_end, names=["out"])
    os.close(write_end)
    boss.spawn("a#1", ["echo", "hello"], stdout="out")
    boss.expect("exited", status=0)
    assert os.read(read_end, 10) == b"hello\n"
    os.close(read_end)


# --- signals to procmand --------------------------------------------------------------------------------------------


def test_signals_are_told_until_they_are_obeyed(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    os.kill(keeper.process.pid, signal.SIGHUP)
    boss.sync()
    assert boss.messages == [], "it is not ready"
    boss.send("ready")
    boss.expect("signal", signal=signal.SIGHUP)
    os.kill(keeper.process.pid, signal.SIGUSR2)
    boss.expect("signal", signal=signal.SIGUSR2)
    boss.send("obeyed", signal=signal.SIGUSR2)
    boss.die()
    boss = keeper.supervisor()
    boss.send("ready")
    boss.expect("signal", signal=signal.SIGHUP)
    boss.send("obeyed", signal=signal.SIGHUP)
    boss.sync()
    assert boss.messages == []


def test_who_asks_again_is_told_what_there_is(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.spawn("it#1")
    pid = boss.expect("spawned", child="it#1")["pid"]
    boss.spawn("it#1")
    boss.sync()
    assert (boss.children["it#1"]["pid"], boss.children["it#1"]["state"]) == (pid, "running")
    boss.send("signal", child="it#1", signal=signal.SIGKILL, tree=True)
    boss.expect("exited", child="it#1")
    boss.spawn("it#1")
    boss.sync()
    assert (boss.children["it#1"]["state"], boss.children["it#1"]["status"]) == ("exited", signal.SIGKILL)


def test_a_note_that_makes_no_sense_keeps_no_signal_from_its_child(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.spawn("it#1")
    boss.expect("spawned", child="it#1")
    boss.send("signal", child="it#1", signal=signal.SIGKILL, tree=True, note="x" * 5000)
    boss.expect("exited", child="it#1", status=signal.SIGKILL)
    boss.send("note", child="it#1", note=7)
    boss.sync()


def test_the_end_is_asked_for_until_it_comes(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    boss.sync()
    os.kill(keeper.process.pid, signal.SIGTERM)
    boss.expect("signal", signal=signal.SIGTERM)
    boss.die()
    boss = keeper.supervisor()
    boss.send("ready")
    boss.expect("signal", signal=signal.SIGTERM)
    boss.send("exit", status=0)
    assert keeper.wait() == 0


IGNORES_TERM = python("import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(60)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_the_last_resort(start: Start, number: int) -> None:
    """No supervisor becomes ready: the keeper ends the programs itself, politely first."""
    keeper = start(LAST_RESORT_SECONDS=0.2)
    boss = keeper.supervisor()
    obedient = boss.spawned("a#1")
    read_end, write_end = os.pipe()
    boss.send("hold", write_end, names=["out"])
    os.close(write_end)
    stubborn = boss.spawned("b#1", IGNORES_TERM, stdout="out")
    assert os.read(read_end, 1) == b"x"
    os.close(read_end)
    os.kill(keeper.process.pid, number)
    assert boss.expect("exited", child="a#1")["status"] == signal.SIGTERM
    assert keeper.wait() == 1
    assert not alive(obedient)
    assert not alive(stubborn)


def test_the_last_resort_when_the_supervisor_dies_on_the_way(start: Start) -> None:
    keeper = start(LAST_RESORT_SECONDS=0.2)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1")
    boss.send("ready")
    boss.sync()
    os.kill(keeper.process.pid, signal.SIGTERM)
    boss.expect("signal", signal=signal.SIGTERM)
    boss.die()
    assert keeper.wait() == 1
    assert not alive(pid)


def test_the_last_resort_ends_when_all_have_ended(start: Start) -> None:
    keeper = start(LAST_RESORT_SECONDS=0.2)
    boss = keeper.supervisor()
    boss.spawned("a#1")
    os.kill(keeper.process.pid, signal.SIGTERM)
    boss.expect("exited", child="a#1")
    assert keeper.wait() == 1


def test_a_supervisor_that_becomes_ready_calls_the_last_resort_off(start: Start) -> None:
    keeper = start(LAST_RESORT_SECONDS=0.4)
    boss = keeper.supervisor()
    pid = boss.spawned("a#1", IGNORES_TERM)
    os.kill(keeper.process.pid, signal.SIGTERM)
    boss.sync()
    boss.send("ready")
    boss.expect("signal", signal=signal.SIGTERM)
    assert select.select([boss.wire], [], [], 1.0)[0] == [], "nothing happens"
    assert alive(pid)
    boss.send("exit", status=0)
    assert keeper.wait() == 0


# --- the service manager --------------------------------------------------------------------------------------------


def test_the_service_manager_is_told(start: Start) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"procman-test-{uuid4().hex}"
        manager.bind(f"\0{name}")
        manager.settimeout(10)
        keeper = start(options={"env": {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "200000"}})
        assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        boss = keeper.supervisor()
        boss.send("notify", state="READY=1\nSTATUS=1 process")
        boss.send("exit", status=0)
        heard = []
        while b"STOPPING=1" not in heard:
            heard.append(manager.recv(100))
        assert b"READY=1\nSTATUS=1 process" in heard
        assert keeper.wait() == 0


def test_a_service_manager_that_does_not_read_stops_nothing(start: Start) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"procman-test-{uuid4().hex}"
        manager.bind(f"\0{name}")
        keeper = start(options={"env": {"NOTIFY_SOCKET": f"@{name}"}})
        boss = keeper.supervisor()
        for _ in range(1000):
            boss.send("notify", state="x" * 100)
        boss.sync()


def test_the_watchdog_of_somebody_else(start: Start) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"procman-test-{uuid4().hex}"
        manager.bind(f"\0{name}")
        manager.settimeout(10)
        env = {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        boss = start(options={"env": env}).supervisor()
        boss.send("notify", state="first")
        assert manager.recv(100) == b"first"


def test_the_log(keeper: RunningKeeper, tmp_path: Path) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    with (tmp_path / "procmand.log").open("wb") as file:
        boss.send("log", file.fileno())
    boss.sync()
    boss.die()
    keeper.supervisor()
    assert "starting another one" in (tmp_path / "procmand.log").read_text()


def test_the_wire_of_the_test_itself(keeper: RunningKeeper) -> None:
    """The keeper ends: so does its end of the wire, and the supervisor."""
    boss = keeper.supervisor()
    keeper.process.kill()
    wait_until(lambda: not alive(boss.pid), what="the supervisor dies with its keeper")
    with pytest.raises(WireClosed):
        while True:
            boss.wire.receive()


# --- adoption -------------------------------------------------------------------------------------------------------

ORPHAN = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_RSS, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_RSS)[1]))
if os.fork():
    os._exit(0)
os.setsid()
grandchild = os.fork()
if grandchild == 0:
    os.setsid()
    print(os.getpid(), os.getppid(), flush=True)
    os.execvp("sleep", ["sleep", "60"])
sys.stdin.readline()
os._exit(7)
"""
TAG = (4711 << tree.NUMBER_BITS) + 41


class Orphan:
    """A process that is nobody's here, with a grandchild in another session; both have the tag. `end` ends it."""

    def __init__(self) -> None:
        command = python(ORPHAN, str(tree.TAG_BASE + TAG))
        self._made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._made.stdout is not None
        self.grandchild, self.pid = map(int, self._made.stdout.readline().split())
        found = tree.read_process(self.pid)
        assert found is not None
        self.start = found.start

    def end(self) -> None:
        """It exits with status 7."""
        assert self._made.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._made.stdin.write(b"\n")
            self._made.stdin.flush()

    def close(self) -> None:
        for pid in (self.pid, self.grandchild):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in (self._made.stdin, self._made.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._made.wait(10)


@pytest.fixture
def orphan() -> Iterator[Orphan]:
    made = Orphan()
    yield made
    made.close()


def adopt(boss: Supervisor, orphan: Orphan, **fields: Any) -> Message:
    """The record of the orphan as the keeper's child "a#7"."""
    asked = {"child": "a#7", "pid": orphan.pid, "start": orphan.start, "tag": TAG, "at": 17.0, "kill": "tree"}
    boss.send("adopt", **asked | {"members": [orphan.pid], "note": "ready"} | fields)
    boss.sync()
    return boss.children["a#7"]


def test_an_adopted_child_is_like_any_other(keeper: RunningKeeper, orphan: Orphan) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    record = adopt(boss, orphan)
    wanted = {"state": "running", "pid": orphan.pid, "start": orphan.start, "tag": TAG, "at": 17.0, "note": "ready"}
    assert wanted.items() <= record.items()
    boss.die()
    boss = keeper.supervisor()
    assert boss.children["a#7"] == record
    orphan.end()
    end = boss.expect("exited", child="a#7")
    assert end["left"] is True
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15):
        assert end["status"] == 7 << 8
    else:
        assert end["status"] in {7 << 8, None}
    assert alive(orphan.grandchild)
    os.kill(orphan.grandchild, signal.SIGKILL)
    boss.expect("gone", child="a#7")  # by nothing but its end: nobody asks
    boss.send("forget", child="a#7")
    boss.sync()
    boss.die()
    assert keeper.supervisor().children == {}


def test_signals_for_an_adopted_child(keeper: RunningKeeper, orphan: Orphan) -> None:
    boss = keeper.supervisor()
    adopt(boss, orphan)
    boss.send("signal", child="a#7", signal=signal.SIGTERM, tree=False)
    boss.expect("exited", child="a#7", left=True)
    assert alive(orphan.grandchild)
    boss.send("signal", child="a#7", signal=signal.SIGKILL, tree=True)
    boss.expect("gone", child="a#7")
    assert not alive(orphan.grandchild)


@pytest.mark.parametrize("kill", ["tree", "main"])
def test_what_has_gone_already_leaves_what_it_left(keeper: RunningKeeper, orphan: Orphan, kill: str) -> None:
    boss = keeper.supervisor()
    orphan.end()
    wait_until(lambda: not alive(orphan.pid))
    record = adopt(boss, orphan, kill=kill)
    assert (record["state"], record["status"], record["left"]) == ("exited", None, kill == "tree")
    os.kill(orphan.grandchild, signal.SIGKILL)
    if kill == "tree":
        boss.expect("gone", child="a#7")


def test_a_pid_that_is_another_ones_by_now_is_not_adopted(keeper: RunningKeeper, orphan: Orphan) -> None:
    boss = keeper.supervisor()
    record = adopt(boss, orphan, start=orphan.start - 1, tag=TAG + 1)
    assert (record["state"], record["left"]) == ("exited", False)
    boss.send("signal", child="a#7", signal=signal.SIGKILL, tree=True)
    boss.sync()
    assert alive(orphan.pid)


def test_new_children_get_numbers_above_the_old_ones(keeper: RunningKeeper) -> None:
    boss = keeper.supervisor()
    boss.send("house", house=4711, last=41)
    boss.spawn("b#1")
    born = boss.expect("spawned", child="b#1")
    assert born["tag"] == (4711 << tree.NUMBER_BITS) + 42 == tree.tag_of(born["pid"])
    boss.die()
    boss = keeper.supervisor()
    boss.spawn("b#2")
    assert boss.expect("spawned", child="b#2")["tag"] == born["tag"] + 1


def test_the_keeper_ends_adopted_children_too(keeper: RunningKeeper, orphan: Orphan) -> None:
    boss = keeper.supervisor()
    boss.send("ready")
    adopt(boss, orphan)
    boss.send("exit", status=0)
    assert keeper.wait() == 0
    wait_until(lambda: not alive(orphan.pid) and not alive(orphan.grandchild), what="nothing is left")


# --- what makes no sense --------------------------------------------------------------------------------------------

NONSENSE: list[dict[str, Any]] = [
    {"op": "house", "house": 10**3000, "last": 0},
    {"op": "house", "house": 7, "last": 1 << 40},
    {"op": "house", "house": True, "last": 0},
    {"op": "adopt", "child": "x#1", "pid": 0, "start": 0, "tag": 10**3000},
    {"op": "adopt", "child": "x#1", "pid": 0, "start": 0, "tag": 5, "at": float("inf")},
    {"op": "adopt", "child": "x#1", "pid": 10**30, "start": 0, "tag": 5},
    {"op": "adopt", "child": "x#1", "pid": 0, "start": 0, "tag": 5, "members": [[]]},
    {"op": "note", "child": "a#1", "note": "x" * 1_000_000},
    {"op": "spawn", "child": "", "argv": ["true"], "env": {}},
    {"op": "spawn", "child": "a\nb", "argv": ["true"], "env": {}},
    {"op": "signal", "child": "a#1", "signal": 10**30},
    {"op": "sync", "number": 10**4000},
    {"op": "exit", "status": 10**30},
    {"op": "exit", "status": -1},
    {"op": "hold", "names": [5]},
    {"op": {"x": 10**4000}},
]


def test_nothing_that_makes_no_sense_is_kept(keeper: RunningKeeper) -> None:
    """It would be in the snapshot of every successor, and in the tags of all children to come.

    A tag of 0 is not sent here: a keeper that took it would end every process of the machine. The fuzz sends it, in a
    pid namespace of its own.
    """
    boss = keeper.supervisor()
    boss.send("ready")
    pid = boss.spawned("a#1")
    for message in NONSENSE:
        boss.send(message.pop("op"), **message)
    boss.sync()
    boss.spawned("b#1")
    assert keeper.said().count("makes no sense") == len(NONSENSE) - 1, keeper.said()
    assert "a bug in procman" not in keeper.said()
    boss.die()
    second = keeper.supervisor()
    assert set(second.children) == {"a#1", "b#1"}
    assert second.children["a#1"]["pid"] == pid

"""The two halves of the daemon, each with a hostile other half.

The keeper is a real process, and what it takes for its supervisor says anything. It must not die, must not hang, and
must not touch what is not its child: so it runs in a pid namespace of its own where that can be made, and without it
nothing is adopted. The supervisor is a real one, started with a state file, a table, a plan or a snapshot that was
damaged: it must come up, and leave the child alone that its keeper tells of.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from procman import change, interim, supervisor, table
from procman.client import Client
from procman.errors import ProcmanError
from procman.keeper.wire import Wire, WireError
from procman.recall import Recording, recall
from tests.guarantees.fuzz.inputs import damaged, dumped, junk, touched
from tests.guarantees.fuzz.pure import PLAN, STATE, TABLE_MEMORY, packet, torn
from tests.guarantees.fuzz.run import ISOLATED, Check, descriptors
from tests.harness import PROJECT, wait_until
from tests.test_keeper import RunningKeeper, Supervisor

START_SECONDS = 30.0
"""For one supervisor to come up, on a busy machine."""

# --- a keeper with a hostile supervisor -----------------------------------------------------------------------------

NO_SUCH_PID = (1 << 22) + 5
"""Linux gives no such number."""

ORDERS: list[Any] = [
    {"op": "spawn", "child": "a#2", "argv": ["/bin/sleep", "100"], "env": {}, "limits": {}, "listen": []},
    {"op": "spawn", "child": "b#1", "argv": ["/bin/true"], "env": {}, "stdout": "log/a/out/w", "umask": 18},
    {"op": "signal", "child": "steady#1", "signal": 0, "tree": False},
    {"op": "signal", "child": "a#2", "signal": 9, "tree": True},
    {"op": "house", "house": 7, "last": 41},
    {"op": "adopt", "child": "c#1", "pid": NO_SUCH_PID, "start": 12, "tag": 99, "at": 1.5, "kill": "tree", "note": ""},
    {"op": "adopt", "child": "d#1", "pid": 0, "start": 0, "tag": 30064771079, "members": [1, 2], "kill": "tree"},
    {"op": "forget", "child": "b#1"},
    {"op": "note", "child": "steady#1", "note": "ready"},
    {"op": "hold", "names": ["one", "two"]},
    {"op": "release", "name": "one"},
    {"op": "yielded"},
    {"op": "sync", "number": 1},
    {"op": "notify", "state": "READY=1"},
    {"op": "pong"},
    {"op": "ready"},
]

Said = list[tuple[bytes, int]]


def orders() -> st.SearchStrategy[Said]:
    """Messages that are nearly right, each with some descriptors; seldom bytes that are none."""
    message = st.tuples(damaged(ORDERS).filter(_allowed).map(dumped), st.sampled_from((0, 0, 0, 1, 2)))
    honest = message.map(lambda drawn: (packet(*drawn), drawn[1]))
    wrong = st.builds(lambda body, told: (packet(body, told), 0), junk().map(dumped), st.integers(0, 3))
    raw = st.tuples(touched([packet(dumped(order), 0) for order in ORDERS[2:3]]), st.just(0))
    usual = st.lists(honest, min_size=1, max_size=8)
    return st.one_of(usual, usual, usual, usual, usual, usual, st.tuples(honest, st.one_of(wrong, raw)).map(list))


def _allowed(order: Any) -> bool:
    """What a supervisor may always do is no finding: end it all, run any program, put the keeper's log anywhere, end
    its own child. And outside of a pid namespace nobody is adopted."""
    if not isinstance(order, dict):
        return True
    op = order.get("op")
    if op in ("exit", "log", "upgrade") or (op == "adopt" and ISOLATED not in os.environ):
        return False
    if op == "signal" and order.get("child") == "steady#1":
        return order.get("signal") in (0, -1, 65, 2**31, "x")
    argv = order.get("argv")
    return op != "spawn" or not isinstance(argv, list) or argv[:1] in ([], ["/bin/sleep"], ["/bin/true"])


@contextlib.contextmanager
def keeper() -> Iterator[Check]:
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
    running = RunningKeeper(folder, {"heartbeat": 2.0, "RETRY_SECONDS": 0.0, "RETRY_SECONDS_MAX": 0.0}, {})
    bystander = subprocess.Popen(["/bin/sleep", "100000"])
    try:
        boss = running.supervisor()
        boss.send("ready")
        steady = boss.spawned("steady#1", ["sleep", "100000"])
        start = descriptors(running.process.pid)
        state = {"boss": boss}

        def check(said: Said) -> None:
            boss = state["boss"]
            try:
                for data, count in said:
                    _say(boss, data, count)
                boss.sync()
            except (OSError, WireError, AssertionError):
                # It was refused: then another one has come, and finds everything as it is.
                assert running.process.poll() is None, running.said()[-3000:]
                boss.close()
                boss = state["boss"] = running.supervisor()
                boss.send("ready")
                boss.sync()
            _clean_up(boss)
            assert running.process.poll() is None, running.said()[-3000:]
            assert "a bug in procman" not in running.said(), running.said()[-3000:]
            assert bystander.poll() is None, "a process that is nobody's child was ended"
            os.kill(steady, 0)
            _bounded(running)

        yield check
        boss = state["boss"]
        _clean_up(boss)
        boss.die()
        last = running.supervisor()
        assert last.children["steady#1"]["pid"] == steady
        assert last.children["steady#1"]["state"] == "running"
        wait_until(lambda: descriptors(running.process.pid) <= start + 4, what="the keeper holds no more than before")
    finally:
        running.close()
        bystander.kill()
        bystander.wait()
        shutil.rmtree(folder)


def _say(boss: Supervisor, data: bytes, count: int) -> None:
    """As it is, in one piece, with descriptors."""
    boss.socket.setblocking(True)
    boss.socket.settimeout(10)
    if count:
        sent = socket.send_fds(boss.socket, [data], [2] * count)
        data = data[sent:]
    boss.socket.sendall(data)
    boss.socket.setblocking(False)


def _clean_up(boss: Supervisor) -> None:
    """An honest supervisor ends what was begun, so that the next input finds the keeper as this one did."""
    boss.sync()
    for message in boss.messages:
        if message["op"] in ("spawned", "child", "failed", "exited", "gone") and message["child"] != "steady#1":
            boss.children[message["child"]] = message
    boss.messages.clear()
    for child in [child for child in boss.children if child != "steady#1"]:
        boss.send("signal", child=child, signal=9, tree=True)
        boss.send("forget", child=child)
        boss.children.pop(child)
    for name in [*boss.held, "one", "two"]:
        boss.send("release", name=name)
    for fd in boss.held.values():
        os.close(fd)
    boss.held.clear()
    boss.sync()


def _bounded(running: RunningKeeper) -> None:
    """What it says is bounded by what is asked of it; here it is emptied now and then."""
    if running.output.stat().st_size > 4_000_000:
        os.truncate(running.output, 0)


# --- a supervisor that comes up ------------------------------------------------------------------------------------

SHOP = """
[daemon]
socket = "{folder}/s"
state_dir = "{folder}/state"
log_dir = "{folder}/log"
log_level = "warning"
[daemon.sampling]
interval = 0
[program.steady]
command = "/bin/sleep 100000"
start_seconds = 0
[program.down]
command = "/bin/sleep 100000"
autostart = false
"""
GENERATION = 3
NAMED = {"op": "child", "child": f"steady#{GENERATION}", "state": "running", "note": "", "left": False}
CHILD: dict[str, Any] = NAMED | {"pid": 0, "at": 1.7e9, "since": 1.5, "start": 12, "tag": (7 << 32) + 3}
TOLD = {"op": "hello", "last": "killed by SIGKILL", "cgroup": "", "version": "0.1.0", "upgrading": False}
HELLO: dict[str, Any] = TOLD | {"pid": 4242, "starts": 2, "upgrades": 0}
SNAPSHOT: list[Any] = [HELLO, CHILD, {"op": "begin"}]
OURS: dict[str, Any] = json.loads(json.dumps(STATE).replace("shop:1", "steady"))

NOTE = OURS["processes"]["steady"]
CHANGES: list[Any] = [
    {"half": "stop", "why": "SIGHUP", "wanted": ["down"]},
    {"half": "start", "why": "SIGHUP", "start": {"down": 0}},
]
OTHER = SHOP.format(folder=".").replace('/bin/sleep 100000"\nauto', '/bin/sleep 99999"\nauto').encode()
READ = {"read": {"@TABLE@": base64.b85encode(OTHER).decode()}, "glob": {}, "account": {}, "group": {}}
NEXT = dumped({"cwd": "/", "environ": {}, "answers": READ})
"""The next table, in which `down` is another one. @TABLE@ stands for the file of this nest."""
CLOSING = b'{"why": "SIGTERM", "exit_status": 3}'

Order = tuple[str, bytes]
"""What is damaged, and its bytes."""


def starts() -> st.SearchStrategy[Order]:
    parts = damaged([OURS], 5).map(dumped)
    state = st.one_of(parts, parts, parts, torn(dumped(OURS)), junk().map(dumped))
    snapshot = damaged([SNAPSHOT], 2).map(dumped)
    kind = {
        "state": state,
        "plan": st.one_of(damaged([PLAN]).map(dumped), touched([dumped(PLAN)])),
        "table": st.one_of(damaged([TABLE_MEMORY]).map(dumped), touched([dumped(TABLE_MEMORY)])),
        "snapshot": snapshot,
        # What is undamaged here would do no harm either: `steady` is in it as it is in force.
        "change": st.one_of(damaged(CHANGES).map(dumped), touched([*map(dumped, CHANGES)]), junk().map(dumped)),
        "next table": st.one_of(touched([NEXT]), torn(NEXT), junk().map(dumped)),
        "closing": st.one_of(touched([CLOSING]), torn(CLOSING), damaged([json.loads(CLOSING)]).map(dumped)),
        "note": st.one_of(damaged([NOTE]).map(dumped), torn(dumped(NOTE)), st.just(b"ready"), junk().map(dumped)),
    }
    pairs = [strategy.map(lambda data, name=name: (name, data)) for name, strategy in kind.items()]  # type: ignore[misc]
    return st.one_of(pairs[0], pairs[0], pairs[0], *pairs)


class Nest:
    """Where supervisors come up: a folder with a table, a child that runs, and the process that forks them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
        self.folder.chmod(0o755)
        self.table = self.folder / "procman.toml"
        self.table.write_text(SHOP.format(folder=self.folder))
        (self.folder / "state").mkdir(0o700)
        self.state = self.folder / "state" / "state.json"
        self.child = subprocess.Popen(["/bin/sleep", "100000"])
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.orders.settimeout(START_SECONDS)
        command = [sys.executable, "-m", "tests.guarantees.fuzz.zygote", str(theirs.fileno())]
        self.zygote = subprocess.Popen(command, cwd=PROJECT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.made: list[int] = []  # memory that the keeper's end has still to close
        recording = Recording()
        recording.read(str(self.table))
        self.good_table = recording.memory()

    def close(self) -> None:
        self.orders.close()
        self.zygote.wait(20)
        self.child.kill()
        self.child.wait()
        os.close(self.good_table)
        shutil.rmtree(self.folder)

    def snapshot(self, document: list[Any], keeper: Wire, memories: dict[str, bytes]) -> None:
        """Tells it, and before its end all that is held; of the tables in force, the good one unless it is there."""
        for message in document:
            if isinstance(message, dict) and message.get("op") == "begin":
                for name, content in ({"table": None, "first table": None} | memories).items():
                    keeper.send({"op": "held", "name": name}, [self._memory(content)])
            keeper.send(message)
        for fd in self.made:
            os.close(fd)
        self.made.clear()

    def _memory(self, content: bytes | None) -> int:
        if content is None:
            return self.good_table
        fd = os.memfd_create("fuzz")
        os.write(fd, content)
        self.made.append(fd)
        return fd

    def _held(self, what: str, data: bytes) -> dict[str, bytes]:
        """What the keeper holds in memory when `what` is damaged."""
        next_table = NEXT.replace(b"@TABLE@", str(self.table).encode())
        match what:
            case "table":
                return {"table": data, "first table": data}
            case "plan":
                return {interim.HELD_NAME: data}
            case "change":
                return {change.HELD_NAME: data, change.NEXT_TABLE: next_table}
            case "next table":
                whole = data.replace(b"@TABLE@", str(self.table).encode())
                return {change.HELD_NAME: dumped(CHANGES[0]), change.NEXT_TABLE: whole}
            case "closing":
                return {supervisor.CLOSING: data}
        return {}

    def _may_touch(self, what: str, data: bytes) -> bool:
        """Whether the damage is such that it really says what happens to `steady`."""
        if what != "next table":
            return False
        memory = os.memfd_create("fuzz")
        os.write(memory, self._held(what, data)[change.NEXT_TABLE])
        try:
            told = table.parse(str(self.table), recall(memory)).programs
        except ProcmanError:
            return False
        now = table.parse(str(self.table), recall(os.dup(self.good_table))).programs
        return [each for each in told if each.name == "steady"] != [each for each in now if each.name == "steady"]

    def come_up(self, what: str, data: bytes) -> None:
        """Start one, and judge it."""
        self.state.unlink(missing_ok=True)
        state = data if what == "state" else dumped(OURS)
        self.state.write_bytes(state.replace(b"4711", str(self.child.pid).encode()))
        snapshot: Any = json.loads(data) if what == "snapshot" else json.loads(json.dumps(SNAPSHOT))
        for message in snapshot if isinstance(snapshot, list) else ():
            if isinstance(message, dict) and message.get("pid") == 0:
                message["pid"] = self.child.pid
            if what == "note" and isinstance(message, dict) and message.get("op") == "child":
                message["note"] = data.decode(errors="replace").replace("4711", str(self.child.pid))
        ours, theirs = socket.socketpair()
        keeper = Wire(ours)
        output = os.memfd_create("said")
        try:
            if what == "snapshot":
                snapshot = [m if isinstance(m, dict) else {"op": "begin", "x": 1} for m in snapshot] + [{"op": "begin"}]
            self.snapshot(snapshot, keeper, self._held(what, data))
            socket.send_fds(self.orders, [str(self.table).encode()], [theirs.fileno(), output])
            theirs.close()
            pid = int(self.orders.recv(32))
            try:
                self._judge(what, data, keeper, pid, output)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self.orders.recv(32)
        finally:
            theirs.close()
            keeper.close()
            os.close(output)

    def _judge(self, what: str, data: bytes, keeper: Wire, pid: int, output: int) -> None:
        asked: list[dict[str, Any]] = []
        end = time.monotonic() + START_SECONDS
        ready = ended = False
        while not (ready or ended):
            assert time.monotonic() < end, f"not up within {START_SECONDS} s: {said(output)}"
            select.select([keeper], [], [], 1)
            try:
                for message, fds in keeper.receive():
                    asked.append(message)
                    for fd in fds:
                        os.close(fd)
                    if message["op"] == "sync":
                        keeper.send({"op": "synced", "number": message["number"]})
            except WireError:
                ended = True
            ready = any(message["op"] == "ready" for message in asked)
        assert "Traceback" not in said(output), said(output)
        if what == "snapshot" and not ready:
            assert "procmand: " in said(output), f"it ended without a word: {said(output)!r}"
            return
        assert ready, f"it did not come up: {said(output)}"
        if what == "snapshot":
            return  # whatever it was told about children, it may believe
        if _ends(asked) or self._may_touch(what, data):
            return
        if what in ("note", "change", "next table", "closing") and _is_junk(data):
            assert "set aside" in said(output), f"nothing is said about {data!r}: {said(output)}"
        touched = [m for m in asked if m["op"] in ("spawn", "signal", "exit") and "steady" in str(m.get("child", ""))]
        assert not touched, f"{touched}: {said(output)}"
        steady = self._status(output)["steady"]
        assert (steady["pid"], steady["state"]) == (self.child.pid, "RUNNING"), (steady, said(output))

    def _status(self, output: int) -> dict[str, Any]:
        try:
            with Client(f"{self.folder}/s", START_SECONDS) as client:
                return {info["name"]: info for info in client.call("status")}
        except ProcmanError as error:
            raise AssertionError(f"status: {error}: {said(output)}") from error


def _ends(asked: list[dict[str, Any]]) -> bool:
    """A state file that says "closing" makes its successor end everything: that is what it says."""
    return any(message.get("state") == "STOPPING=1" for message in asked)


def _is_junk(data: bytes) -> bool:
    """Not even an object of JSON."""
    try:
        return not isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return data != b""


def said(output: int) -> str:
    return os.pread(output, 1 << 16, 0).decode(errors="replace")[-3000:]


@contextlib.contextmanager
def supervisors() -> Iterator[Check]:
    nest = Nest()
    try:
        before = descriptors()

        def check(order: Order) -> None:
            nest.come_up(*order)
            assert descriptors() <= before

        yield check
    finally:
        nest.close()

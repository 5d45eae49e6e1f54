"""What answers over a socket: the RPC server, every method of a real daemon, and the notification sockets of programs.

The next valid request is answered, nothing starts or stops but the one program that is there for it, and what the
daemon holds stays flat.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from procman import rpc
from procman.methods import METHODS
from procman.notify import MESSAGE_MAX, NotifySocket
from tests.guarantees.census import held
from tests.guarantees.fuzz.inputs import TEXTS, dumped, junk
from tests.guarantees.fuzz.pure import rpc_lines
from tests.guarantees.fuzz.run import Check, descriptors, nothing_left_open
from tests.harness import RunningDaemon, wait_until
from tests.rpc_stand_in import Daemon

ANSWER_SECONDS = 20.0
"""Nothing that is asked here takes so long, on a busy machine either."""

MEMORY_SLACK = 24 * 1024 * 1024
"""Bytes that a supervisor may grow in a run: its bounded histories fill up."""

# --- the server -----------------------------------------------------------------------------------------------------

Chunks = list[bytes]


def chunks() -> st.SearchStrategy[Chunks]:
    """Lines as they may come: several at once, in pieces, without an end."""
    line = st.one_of(rpc_lines().map(lambda data: data.replace(b"\n", b"") + b"\n"), rpc_lines())
    return st.tuples(st.lists(line, min_size=1, max_size=4).map(b"".join), st.integers(0, 300)).map(_cut)


def _cut(drawn: tuple[bytes, int]) -> Chunks:
    data, at = drawn
    return [piece for piece in (data[:at], data[at:]) if piece]


def expected(data: bytes) -> list[Any] | None:
    """The ids of the answers that the pure decoder says are owed, in order; None where a call may not end by itself."""
    ids: list[Any] = []
    for line in data.split(b"\n"):
        if not line or (line + b"\n").isspace():
            continue
        try:
            request = rpc.decode(line)
        except rpc.RpcError as error:
            ids.append(error.id)
            continue
        if request.method == "daemon.shutdown" or request.params.get("follow") is True:
            return None
        if not request.silent:
            ids.append(request.id)
    return ids


@contextlib.contextmanager
def server() -> Iterator[Check]:
    """The real server in this process, with the stand-in of its tests behind it."""
    with nothing_left_open(), Daemon() as daemon:

        def check(sent: Chunks) -> None:
            owed = expected(b"".join(sent))
            if owed is None:
                return
            with daemon.raw(*sent, timeout=ANSWER_SECONDS) as connection:
                connection.shutdown(socket.SHUT_WR)
                received = b""
                while data := connection.recv(1 << 16):
                    received += data
            answers = [message for message in map(json.loads, received.splitlines()) if "id" in message]
            assert [answer["id"] for answer in answers] == owed, (answers, owed)
            for answer in answers:
                assert ("error" in answer) != ("result" in answer), answer
                assert answer.get("error", {}).get("code") != rpc.INTERNAL, answer

        yield check
        with daemon.client() as client:
            assert len(client.call("status")) == 3
        wait_until(lambda: bool(daemon.do(lambda: not daemon.server.connections)), what="no connection is left")


# --- the methods of a real daemon -----------------------------------------------------------------------------------

TABLE = """
[program.steady]
command = "/bin/sleep 100000"
start_seconds = 0
[program.notes]
command = "/bin/sh -c 'echo noted; exec sleep 100000'"
start_seconds = 0
[program.toy]
command = "/bin/sleep 100000"
start_seconds = 0
stop_timeout = "1s"
"""
UNTOUCHED = ("steady", "notes")
OPERATE = {name for name, method in METHODS.items() if method.role == "operate"}
NEVER = ("daemon.shutdown", "daemon.upgrade")
"""They are never asked for rightly: always with a param that they don't have."""

MANY = 50_000
"""Names in one request: little less than fit into it."""

FILE = rpc.file_id(os.stat(__file__).st_dev, os.stat(__file__).st_ino)
"""A file that is no log."""

Call = tuple[str, Any]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A method, and params of which some are right, some wrong, some missing, some too many."""
    method = draw(st.sampled_from(sorted(METHODS)) | st.sampled_from(("stauts", "", "x" * 5000, "daemon", "\ud800")))
    row = METHODS.get(method)
    wrong = draw(junk())
    if row is None or draw(st.integers(0, 19)) == 0:
        return method, wrong if method not in NEVER or wrong else {"now": wrong}
    params: dict[str, Any] = {}
    names = ["toy"] if method in OPERATE else ["steady", "notes", "toy", "all"]
    right: dict[str, Any] = {
        "names": st.lists(st.sampled_from([*names, "nobody"]), max_size=3) | st.just(names[:1] * MANY),
        "name": st.sampled_from(names),
        "wait": st.booleans(),
        "timeout": st.sampled_from((None, 0, 0.01, 5, 1e9)),
        "signal": st.sampled_from(("HUP", "SIGCONT", 18, "18", 0, 65, -1)),
        "lines": st.sampled_from((0, 1, 100_000)),
        "at_once": st.sampled_from((1, 2, 1000)),
        "number": st.sampled_from((0, 1, 2, 1000)),
        "canary": st.sampled_from((None, 0, 0.1, 0.999, 1, -0.1)),
        "canary_seconds": st.sampled_from((None, 0, 0.01, 5, 1e9)),
        **dict.fromkeys(("dry_run", "previous"), st.booleans()),
        "follow": st.just(False),
        "stderr": st.booleans(),
        "stream": st.sampled_from(("out", "err", "")),
        "file": st.sampled_from(("0:0", "1:1", FILE, "99999999999999999999:1")),
        "offset": st.sampled_from((0, 1, 1000, (1 << 63) - 1)),
        "bytes": st.sampled_from((1, 100, 1024 * 1024)),
        "after": st.just([]) | st.just([{"name": "notes", "stream": "out", "file": FILE, "offset": 10**9}] * 3),
        "workers": st.booleans(),
    }
    for name in row.params:
        match draw(st.integers(0, 4)):
            case 0:
                pass
            case 1:
                params[name] = draw(junk())
            case _:
                params[name] = draw(right[name])
    if draw(st.integers(0, 3)) == 0 or method in NEVER:
        params[draw(st.sampled_from(("nmaes", *TEXTS)))] = wrong
    return method, params


def _harmless(call: Call) -> bool:
    """Nothing that was drawn by chance asks rightly for what must not happen."""
    method, params = call
    if not isinstance(params, dict):
        return True
    if method in NEVER:
        return bool(params)
    asked = params.get("names") if isinstance(params.get("names"), list) else []
    return not (method in OPERATE and {"steady", "notes", "all"} & {name for name in asked or () if type(name) is str})


class Asker:
    """One connection to a daemon; a new one after each stream, and after the daemon has closed it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: socket.socket | None = None

    def ask(self, line: bytes, closes: bool) -> dict[str, Any] | None:
        """The answer with an id, or None where a stream without an end has begun."""
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(ANSWER_SECONDS)
            self._connection.connect(self._path)
        self._connection.sendall(line)
        if closes:
            self.close()
            return None
        received = b""
        while True:
            data = self._connection.recv(1 << 16)
            assert data, f"closed after {received[-300:]!r}"
            received += data
            *whole, rest = received.split(b"\n")
            answers = [message for message in map(json.loads, whole) if "id" in message]
            if answers:
                assert (len(answers), rest) == (1, b""), received[-300:]
                assert "id" in json.loads(whole[-1]), f"a notification came after the answer: {received[-300:]!r}"
                found: dict[str, Any] = answers[0]
                return found

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def methods() -> Iterator[Check]:
    """A real daemon with real programs."""
    running = RunningDaemon(TABLE, settings='log_level = "error"')
    try:
        running.start()
        before = {name: running.wait_for(name)["pid"] for name in (*UNTOUCHED, "toy")}
        asker = Asker(str(running.socket))
        checked = 0
        supervisor = running.supervisor_pid
        warm: list[Any] = []

        def check(call: Call) -> None:
            nonlocal checked
            if not _harmless(call):
                return
            method, params = call
            follow = isinstance(params, dict) and params.get("follow") is True
            line = dumped({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}) + b"\n"
            answer = asker.ask(line, follow)
            if answer is not None:
                assert answer["id"] in (7, None), answer
                assert answer.get("error", {}).get("code") != rpc.INTERNAL, (answer, running.said()[-2000:])
                assert len(answer.get("error", {}).get("message", "")) < 2000, "the answer grows with the question"
            checked += 1
            if checked % 100 == 0:
                _untouched(running, before)
            if checked == 300:
                warm.append((held(running.keeper_pid), held(supervisor)))

        yield check
        asker.close()
        _untouched(running, before)
        assert running.supervisor_pid == supervisor, running.said()
        if warm:
            keeper, was = warm[0]
            _flat("the keeper", keeper, running.keeper_pid)
            _flat("the supervisor", was, supervisor)
        assert "Traceback" not in running.output.read_text(), running.said()
    finally:
        left = running.close()
    assert not left, left


def _untouched(running: RunningDaemon, before: dict[str, int]) -> None:
    status = running.status()
    assert set(status) == set(before), status
    for name in UNTOUCHED:
        assert (status[name]["pid"], status[name]["state"]) == (before[name], "RUNNING"), status[name]


def _flat(who: str, before: Any, pid: int) -> None:
    wait_until(lambda: held(pid).descriptors <= before.descriptors + 4, what=f"{who} holds no more descriptors")
    now = held(pid)
    assert now.memory <= before.memory + MEMORY_SLACK, f"{who} grew by {now.memory - before.memory} bytes"


# --- notification sockets -------------------------------------------------------------------------------------------

Datagram = tuple[bytes, int]


def datagrams() -> st.SearchStrategy[Datagram]:
    text = st.sampled_from(
        (b"READY=1", b"READY=1\nSTATUS=x", b"STOPPING=1", b"MAINPID=1\nREADY=1", b"BARRIER=1", b"FDSTORE=1")
    )
    data = st.one_of(
        text,
        st.binary(max_size=40),
        st.tuples(text, st.binary(max_size=20)).map(b"\n".join),
        st.sampled_from((b"", b"x" * MESSAGE_MAX, b"A=" + b"x" * MESSAGE_MAX, b"=" * 9000, b"\n" * 4096, b"\0" * 50)),
    )
    return st.tuples(data, st.sampled_from((0, 0, 0, 1, 2, 250)))


def _send(path: str, data: bytes, count: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(ANSWER_SECONDS)  # its queue is short
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2] * count))] if count else []
        sender.sendmsg([data], rights, 0, path)


@contextlib.contextmanager
def notifications() -> Iterator[Check]:
    """The receiving side alone."""
    with nothing_left_open(), tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as folder:
        receiver = NotifySocket(f"{folder}/s", os.geteuid())

        def check(datagram: Datagram) -> None:
            before = descriptors()
            _send(receiver.path, *datagram)
            _send(receiver.path, b"LAST=1", 0)
            message = receiver.receive()
            if message is not None and message.fields != {"LAST": "1"}:
                assert message.pid == os.getpid()
                message = receiver.receive()
            assert message is not None, "a good message is lost behind a bad one"
            assert message.fields == {"LAST": "1"}
            assert descriptors() == before

        yield check
        receiver.close()


WAITS = """
[program.waits]
command = "/bin/sleep 100000"
ready = { notify = true }
start_timeout = "10000s"
"""


@contextlib.contextmanager
def strangers() -> Iterator[Check]:
    """A real daemon with a program that waits for its own READY=1, and a process that is not the program's."""
    running = RunningDaemon(WAITS, settings='log_level = "error"')
    try:
        running.start()
        wait_until(lambda: running.status()["waits"]["pid"], what="the program runs")
        path = str(running.folder / "notify" / "waits")
        pid = running.status()["waits"]["pid"]
        supervisor = running.supervisor_pid
        before = descriptors(supervisor)

        def check(datagram: Datagram) -> None:
            _send(path, *datagram)
            status = running.status()["waits"]
            assert (status["state"], status["pid"]) == ("STARTING", pid), status

        yield check
        wait_until(lambda: descriptors(supervisor) <= before + 2, what="no descriptor that was sent along stays open")
        check((b"READY=1", 0))
    finally:
        left = running.close()
    assert not left, left

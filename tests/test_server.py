"""The socket: who may do what, and that no client can stall, grow or end the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from procman import logread, logstream, methods, rpc, server
from procman.errors import Failed, NoSuchProgram, NotAllowed, ProcmanError
from procman.methods import METHODS
from procman.rpc import MAX_REQUEST, RpcError, log_bytes
from procman.server import Access
from tests.harness import User, wait_until
from tests.rpc_stand_in import Daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


def line(method: str, request_id: object = 1, **params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}).encode() + b"\n"


def read_all(connection: socket.socket) -> list[dict[str, Any]]:
    """All messages until the daemon closes, be it with unread requests of ours."""
    received = b""
    with connection:
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return [json.loads(text) for text in received.splitlines()]


def read(connection: socket.socket, count: int = 1) -> list[dict[str, Any]]:
    """The next messages, byte by byte so that none is lost."""
    found = []
    for _ in range(count):
        text = b""
        while not text.endswith(b"\n"):
            piece = connection.recv(1)
            assert piece, f"closed after {text!r}"
            text += piece
        found.append(json.loads(text))
    return found


def alive(daemon: Daemon) -> bool:
    with daemon.client() as client:
        return len(client.call("status")) == 3


def left(daemon: Daemon) -> bool:
    return bool(daemon.do(lambda: not daemon.server.connections))


# --- methods


def test_methods_answer(daemon: Daemon) -> None:
    with daemon.client() as client:
        assert [info["name"] for info in client.call("status")] == ["shop:1", "shop:2", "blog"]
        assert [info["name"] for info in client.call("status", names=["shop"])] == ["shop:1", "shop:2"]
        assert client.call("show", name="blog")["log"][0]["read"] == 2048
        assert client.call("why", name="blog")["history"][0]["state"] == "FATAL"
        assert client.call("daemon.status")["identifier"] == "procman"
        assert client.call("daemon.reopen_logs") == {}
        assert client.call("daemon.reread")["added"] == ["new"]
        with pytest.raises(Failed, match="the table has problems") as failed:
            client.call("daemon.reread")
        assert failed.value.hint == "procmanctl check"
        with pytest.raises(NoSuchProgram, match="no such program: 'x'") as caught:
            client.call("status", names=["x"])
        assert caught.value.hint == "procmanctl status lists all"


@pytest.mark.parametrize(("signal", "number"), [("HUP", 1), ("SIGTERM", 15), ("usr1", 10), ("9", 9), (12, 12)])
def test_signal(daemon: Daemon, signal: object, number: int) -> None:
    with daemon.client() as client:
        answer = client.call("signal", signal=signal, names=["web"])
    assert [one["name"] for one in answer] == ["shop:1", "shop:2"]
    assert daemon.stand_in.asked == [("signal", ["web"], number, os.geteuid())]


@pytest.mark.parametrize("signal", ["TREM", "0", "65", 0, 65, "-1", "9" * 5000, ""])
def test_bad_signal(daemon: Daemon, signal: object) -> None:
    with daemon.client() as client, pytest.raises(RpcError, match="param 'signal'"):
        client.call("signal", signal=signal, names=["web"])
    assert not daemon.stand_in.asked


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "reload"])
def test_operations_tell_their_progress(daemon: Daemon, verb: str) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    with daemon.client() as client:
        answer = client.stream(verb, lambda *what: heard.append(what), names=["shop", "blog"], timeout=2.5)
    assert daemon.stand_in.asked == [(verb, ["shop", "blog"], os.geteuid(), 2.5, True)]
    state = "STOPPING" if verb == "stop" else "STARTING"
    assert heard == [("progress", {"name": n, "state": state, "why": "asked"}) for n in ("shop:1", "shop:2", "blog")]
    assert [one["ok"] for one in answer] == [True, True, verb == "stop"]


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("stauts", {}, "no such method: 'stauts'; did you mean 'status'?"),
        ("x" * 1000, {}, "no such method: 'xxx"),
        ("status", {"nmaes": []}, "unknown param 'nmaes'; did you mean 'names'?"),
        ("status", {"names": "shop"}, "param 'names' must be a list of names"),
        ("status", {"names": [1]}, "param 'names' must be a list of names"),
        ("status", {"names": [""]}, "param 'names' must be a list of names"),
        ("status", {"names": None}, "param 'names' must be a list of names"),
        ("show", {}, "param 'name' is missing"),
        ("why", {"name": ""}, "param 'name' must be a name"),
        ("start", {}, "param 'names' is missing"),
        ("start", {"names": []}, "param 'names' must be a list of names that is not empty"),
        ("start", {"names": ["shop"], "wait": 1}, "param 'wait' must be true or false"),
        ("start", {"names": ["shop"], "timeout": "5"}, "param 'timeout' must be a number of seconds, or null"),
        ("start", {"names": ["shop"], "timeout": True}, "param 'timeout' must be"),
        ("start", {"names": ["shop"], "timeout": -1}, "param 'timeout' must be"),
        ("start", {"names": ["shop"], "timeout": 1e12}, "param 'timeout' must be"),
        ("start", {"names": ["shop"], "timeout": 10**400}, "param 'timeout' must be"),
        ("signal", {"names": ["shop"], "signal": None}, "param 'signal' must be"),
        ("logs", {"lines": -1}, "param 'lines' must be an integer from 0 to"),
        ("logs", {"lines": True}, "param 'lines' must be"),
        ("logs", {"after": [{"name": "blog"}]}, "param 'after' must be a list of objects of name, stream, file and"),
        ("logs.read", {"name": "blog"}, "param 'file' is missing"),
        ("logs.read", {"name": "blog", "file": "../x"}, "param 'file' must be a file as logs.files names it"),
        ("logs.read", {"name": "blog", "file": "1:1", "offset": -1}, "param 'offset' must be a number of bytes"),
        ("logs.read", {"name": "blog", "file": "1:1", "bytes": 0}, "param 'bytes' must be an integer from 1 to"),
        ("logs", {"lines": 10**9}, "param 'lines' must be"),
        ("events", {"follow": None}, "param 'follow' must be"),
        ("daemon.shutdown", {"now": True}, "unknown param 'now'"),
    ],
)
def test_wrong_params(daemon: Daemon, method: str, params: dict[str, object], words: str) -> None:
    with daemon.client() as client:
        with pytest.raises(RpcError) as caught:
            client.call(method, **params)
        assert words in str(caught.value)
        assert client.call("status")  # the connection goes on
    assert not daemon.stand_in.asked


def test_a_bug_is_answered_and_logged(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    with daemon.client() as client:
        for name in ("bug", "nan"):
            with pytest.raises(ProcmanError, match="failed to answer") as caught:
                client.call("status", names=[name])
            assert caught.value.code == "internal"
        assert client.call("status")
    assert "ZeroDivisionError" in caplog.text


def test_events(daemon: Daemon) -> None:
    heard: list[dict[str, Any]] = []
    with daemon.client() as client:
        assert client.stream("events", lambda _method, event: heard.append(event)) == {}
    assert [event["name"] for event in heard] == ["blog"]
    assert not daemon.stand_in.subscribers


def test_following_events(daemon: Daemon) -> None:
    with daemon.raw(line("events", follow=True)) as connection:
        assert read(connection)[0]["params"]["name"] == "blog"
        for number in range(3):
            daemon.speak({"type": "state", "name": f"p{number}"})
        assert [message["params"]["name"] for message in read(connection, 3)] == ["p0", "p1", "p2"]
    wait_until(lambda: not daemon.stand_in.subscribers)


def test_a_flood_of_events_ends_the_stream(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "MAX_NEWS", 50)
    with daemon.raw(line("events", follow=True)) as connection:
        read(connection)

        def flood() -> None:
            for _ in range(1000):
                daemon.stand_in.subscribers[0]({"type": "state", "name": "p"})

        daemon.do(flood)
        last = read(connection)[-1]
        assert "faster than you read" in last["error"]["message"]
    assert alive(daemon)


# --- what a client may send


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    requests = [line("status", n) if n % 3 else b"no json\n" for n in range(500)]
    with daemon.raw(b"".join(requests)) as connection:
        answers = read(connection, 500)
    assert [answer["id"] for answer in answers] == [n if n % 3 else None for n in range(500)]


def test_empty_lines_and_silent_requests_get_no_answer(daemon: Daemon) -> None:
    silent = b'{"jsonrpc":"2.0","method":"daemon.reopen_logs"}\n{"jsonrpc":"2.0","method":"nonsense"}\n'
    with daemon.raw(b"\n \r\n", silent, line("status", 9)) as connection:
        assert [message["id"] for message in read(connection)] == [9]
    assert daemon.stand_in.asked == [("reopen_logs", os.geteuid())]


def test_a_request_byte_by_byte(daemon: Daemon) -> None:
    with daemon.raw(*(bytes([byte]) for byte in line("status", 5))) as connection:
        assert read(connection)[0]["id"] == 5


def test_a_request_of_the_greatest_length(daemon: Daemon) -> None:
    request = line("status", 1)
    longest = request[:-1] + b" " * (MAX_REQUEST - len(request)) + b"\n"
    with daemon.raw(longest) as connection:
        assert "result" in read(connection)[0]


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_oversized_requests_are_answered_and_end_the_connection(daemon: Daemon, ending: bytes) -> None:
    connection = daemon.raw()
    try:
        connection.sendall(b"x" * (MAX_REQUEST + 1 - len(ending)) + ending + b"y" * (1 - len(ending)))
        connection.sendall(b"x" * 100_000)
    except BrokenPipeError:
        pass
    answers = read_all(connection)
    assert [answer["error"]["code"] for answer in answers] == [-32600]
    assert answers[0]["error"]["message"] == f"a request has at most {MAX_REQUEST} bytes"
    assert alive(daemon)


def test_endless_bytes_do_not_grow_the_daemon(daemon: Daemon) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with daemon.raw() as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(1000):
            connection.sendall(b"x" * 1_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
    assert alive(daemon)


def test_half_a_request_times_out(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    started = time.monotonic()
    connection = daemon.raw(line("status")[:-5])
    assert "did not come in 0.3 s" in read_all(connection)[0]["error"]["message"]
    assert 0.25 < time.monotonic() - started < 5


def test_a_drip_of_bytes_times_out_too(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with daemon.raw() as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(200):
            connection.sendall(b" x")
            time.sleep(0.05)


def test_an_idle_connection_stays(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.1)
    with daemon.client() as client:
        client.call("status")
        time.sleep(0.4)  # well over the patience that it must not need
        assert len(daemon.server.connections) == 1
        client.call("status")


def test_a_client_that_only_shuts_its_side_gets_its_answers(daemon: Daemon) -> None:
    connection = daemon.raw(line("status", 1), line("status", 2)[:-1])  # even the last line without its end
    connection.shutdown(socket.SHUT_WR)
    assert [message["id"] for message in read_all(connection)] == [1, 2]
    wait_until(lambda: left(daemon))


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 1000, b"\n" * 100_000, b'"\xff"\n', b"GET / HTTP/1.1\r\n\r\n"])
def test_clients_that_send_anything_and_go(daemon: Daemon, data: bytes) -> None:
    for _ in range(20):
        daemon.raw(data).close()
    assert alive(daemon)
    wait_until(lambda: left(daemon))


# --- what a client may not read


def test_a_client_that_never_reads_is_dropped(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with daemon.raw(*[line("status", n) for n in range(1000)]) as connection:
        assert alive(daemon)  # others are served meanwhile
        wait_until(lambda: left(daemon))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(line("status"))


def test_a_reader_of_events_that_never_reads_is_dropped(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with daemon.raw(line("events", follow=True)):
        wait_until(lambda: daemon.stand_in.subscribers)

        def speak() -> bool:
            for hear in list(daemon.stand_in.subscribers):
                hear({"type": "state", "name": "x" * 1000})
            return not daemon.server.connections

        wait_until(lambda: daemon.do(speak))
    assert not daemon.stand_in.subscribers
    assert alive(daemon)


def test_callbacks_that_nobody_reads_do_not_grow_the_daemon(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNREAD", 100_000)
    with daemon.raw(line("status")):
        wait_until(lambda: daemon.server.connections)
        connection = next(iter(daemon.server.connections))
        most = 0

        def mention() -> bool:
            nonlocal most
            connection.send(b"x" * 9_999 + b"\n")
            most = max(most, connection.unread())
            return not daemon.server.connections

        wait_until(lambda: daemon.do(mention))
        assert 100_000 < most < 120_000


def test_one_big_answer_is_no_reason_to_drop(daemon: Daemon) -> None:
    with daemon.client() as client:
        assert len(client.call("status", names=["big"])[0]["why"]) == 8_000_000


def test_unread_answers_of_all_are_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HELD", 20_000_000)
    greedy = []
    for number in range(6):  # each leaves 8 MB unread
        greedy.append(daemon.raw(line("status", names=["big"])))
        if number < 3:
            wait_until(lambda n=number: daemon.server.unread() > 7_000_000 * (n + 1))  # type: ignore[misc]
    try:
        for connection in greedy[3:]:
            assert read_all(connection) == []  # dropped
        assert len(daemon.server.connections) == 3
        assert alive(daemon)  # who asks for little is served
    finally:
        for connection in greedy:
            connection.close()


def test_a_client_that_reads_late_but_in_time_stays(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with daemon.client() as client:
        for _ in range(2):
            client.call("status", names=["big"])  # more than the kernel takes: the daemon begins to count
        time.sleep(0.7)
        assert client.call("daemon.reopen_logs") == {}


def test_the_loop_turns_between_two_requests(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without answers need no waiting; others must have their turn between them all the same."""
    turns = 0
    seen: list[int] = []

    def turn() -> None:
        nonlocal turns
        turns += 1
        if len(seen) < 1000:
            daemon.loop.call_soon(turn)

    async def reopen_logs(_peer: object) -> None:
        seen.append(turns)

    monkeypatch.setattr(daemon.stand_in, "reopen_logs", reopen_logs)
    daemon.do(turn)
    with daemon.raw(b'{"jsonrpc":"2.0","method":"daemon.reopen_logs"}\n' * 1000):
        wait_until(lambda: len(seen) == 1000)
    assert len(set(seen)) == 1000


def test_unfinished_requests_of_all_are_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HELD", 1_000_000)
    greedy = [daemon.raw(b"x" * 400_000) for _ in range(2)]
    wait_until(lambda: daemon.server.held == 800_000)
    connection = daemon.raw()
    try:
        connection.sendall(b"x" * 400_000)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert "too many unfinished requests" in read_all(connection)[0]["error"]["message"]
    for other in greedy:
        other.close()
    wait_until(lambda: left(daemon))
    assert daemon.server.held == 0


# --- clients that go


def test_a_client_that_goes_cancels_its_call_but_not_the_operation(daemon: Daemon) -> None:
    daemon.do(daemon.stand_in.gate.clear)
    with daemon.raw(line("restart", names=["shop"])) as connection:
        read(connection, 2)  # progress
    wait_until(lambda: left(daemon))
    assert daemon.stand_in.finished == 0
    daemon.do(daemon.stand_in.gate.set)
    wait_until(lambda: daemon.stand_in.finished == 1)


def test_an_operation_that_fails_after_its_client_has_gone(daemon: Daemon) -> None:
    async def fail(*_args: object, **_named: object) -> list[dict[str, Any]]:
        daemon.stand_in.asked.append(("began",))
        await daemon.stand_in.gate.wait()
        daemon.stand_in.finished += 1
        raise Failed("too late")

    daemon.stand_in.operate = fail  # type: ignore[method-assign]
    daemon.do(daemon.stand_in.gate.clear)
    with daemon.raw(line("start", names=["shop"])):
        wait_until(lambda: daemon.stand_in.asked)
    wait_until(lambda: left(daemon))
    daemon.do(daemon.stand_in.gate.set)
    wait_until(lambda: daemon.stand_in.finished == 1)  # and Daemon checks that asyncio complained of nothing


@pytest.mark.parametrize("half_closed_first", [False, True])
def test_a_stream_ends_when_its_client_goes(daemon: Daemon, half_closed_first: bool) -> None:
    with daemon.raw(line("events", follow=True)) as connection:
        wait_until(lambda: daemon.stand_in.subscribers)
        if half_closed_first:
            connection.shutdown(socket.SHUT_WR)
            read(connection)
            time.sleep(0.05)
            assert daemon.stand_in.subscribers
    wait_until(lambda: not daemon.stand_in.subscribers)
    wait_until(lambda: left(daemon))


def test_a_client_that_goes_while_it_is_not_read(daemon: Daemon) -> None:
    """Its requests fill the buffer, so the daemon reads no more and sees no end of file."""
    with daemon.raw(line("events", follow=True)) as connection:
        wait_until(lambda: daemon.stand_in.subscribers)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                connection.send(line("status") * 100)
    wait_until(lambda: left(daemon))
    assert daemon.server.held == 0


def test_a_connection_that_was_not_read_is_read_again(daemon: Daemon) -> None:
    daemon.do(daemon.stand_in.gate.clear)
    count = 500
    with daemon.raw(line("start", 0, names=["blog"])) as connection:
        padded = line("status", 1)[:-1] + b" " * 10_000 + b"\n"
        sender = threading.Thread(target=connection.sendall, args=(padded * count,))
        sender.start()
        wait_until(lambda: daemon.server.held > server.MAX_QUEUED)
        time.sleep(0.1)
        assert daemon.server.held < 10 * server.MAX_QUEUED  # the rest waits in the socket
        daemon.do(daemon.stand_in.gate.set)
        with connection.makefile("rb") as answers:
            ids = [json.loads(next(answers)).get("id", "progress") for _ in range(count + 2)]
        sender.join()
    assert ids == ["progress", 0, *[1] * count]


# --- many clients


def test_200_clients_at_once(daemon: Daemon) -> None:
    def one(number: int) -> int:
        with daemon.client() as client:
            return sum(len(client.call("status", names=["shop"])) for _ in range(5)) + number * 0

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(one, range(200))) == [10] * 200
    wait_until(lambda: left(daemon))


def test_too_many_connections(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    held = [daemon.raw(line("status")) for _ in range(5)]
    for connection in held:
        read(connection)
    refused = read_all(daemon.raw())
    assert refused[0]["error"]["message"] == "the daemon has too many connections"
    held.pop().close()
    wait_until(lambda: len(daemon.server.connections) == 4)
    assert alive(daemon)
    for connection in held:
        connection.close()


CROWD = """
import socket, sys, time
held = []
for _ in range(int(sys.argv[2])):
    one = socket.socket(socket.AF_UNIX)
    one.connect(sys.argv[1])
    one.settimeout(20)
    held.append(one)
    try:
        one.sendall(b"x" * int(sys.argv[3]))
    except OSError:
        pass
print("there", flush=True)
sys.stdin.read(1)
for one in held:
    said = b""
    try:
        while data := one.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    print(said.decode().strip() or "nothing")
"""


class Crowd:
    """An ordinary user with `count` connections, on each of which it has sent `size` bytes and no newline."""

    def __init__(self, daemon: Daemon, user: User, count: int, size: int = 0) -> None:
        daemon.folder.chmod(0o755)
        Path(daemon.path).chmod(0o666)
        self._command = [user.python, "-c", CROWD, daemon.path, str(count), str(size)]
        self._options: dict[str, Any] = user.options() | {"stdin": subprocess.PIPE}

    def __enter__(self) -> Crowd:  # noqa: PYI034
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, **self._options)
        assert self.process.stdout
        assert self.process.stdout.readline() == "there\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def heard(self) -> list[dict[str, Any]]:
        """What each connection was told until it was closed."""
        return [json.loads(text) for text in self.process.communicate("x", 20)[0].splitlines()]


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@AS_ROOT
def test_peers_without_a_role_are_turned_away(as_user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STRANGER", 0.3)
    with Daemon(Access(0)) as daemon, Crowd(daemon, as_user, 10) as crowd:
        wait_until(lambda: left(daemon), 5)
        heard = crowd.heard()
    assert len(heard) == 10
    assert {message["error"]["data"]["code"] for message in heard} == {"not-allowed"}


@AS_ROOT
def test_a_peer_without_a_role_gets_one_answer(as_user: User) -> None:
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(20)\n"
        "s.sendall(sys.argv[2].encode() * 3); print(s.makefile().read())"
    )
    with Daemon(Access(0)) as daemon:
        daemon.folder.chmod(0o755)
        Path(daemon.path).chmod(0o666)
        done = as_user.run("python", "-c", code, daemon.path, line("status").decode())
    (answer,) = [json.loads(text) for text in done.stdout.splitlines() if text]
    assert (answer["id"], answer["error"]["data"]["code"]) == (1, "not-allowed")
    assert "may not look here" in answer["error"]["message"]


@AS_ROOT
@pytest.mark.parametrize("each", [3, 100])
def test_readers_leave_room_for_operators(as_user: User, monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    monkeypatch.setattr(server, "MAX_EACH", each)
    room = min(each, 6)
    with Daemon(Access(0, look_gid=as_user.gid)) as daemon:
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)  # now: the backlog of the socket stays long
        with Crowd(daemon, as_user, 12):
            wait_until(lambda: len(daemon.server.connections) == room)
            held = [daemon.raw(line("status")) for _ in range(8 - room)]
            for connection in held:
                assert "result" in read(connection)[0]
                connection.close()


@AS_ROOT
def test_half_requests_of_readers_leave_room_for_operators(as_user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HELD", 400_000)
    with Daemon(Access(0, look_gid=as_user.gid)) as daemon, Crowd(daemon, as_user, 12, 60_000):
        wait_until(lambda: len(daemon.server.connections) == 5)
        with daemon.client() as client:
            assert client.call("status", names=["shop"] * 10_000)


def test_reads_of_one_user_wait_for_each_other_and_not_for_those_of_others(daemon: Daemon) -> None:
    go_on = threading.Event()
    begun: list[int] = []

    def slow(number: int) -> int:
        begun.append(number)
        go_on.wait(10)
        return number

    async def run() -> list[int]:
        reading = daemon.server.reading
        tasks = [asyncio.create_task(reading.run(1, functools.partial(slow, number))) for number in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # its client has gone, the thread has not
        try:
            assert await reading.run(2, lambda: "at once") == "at once"
            assert await asyncio.get_running_loop().run_in_executor(None, lambda: "others too") == "others too"
            assert begun == [0, 1]
        finally:
            go_on.set()
        return await asyncio.gather(*tasks[1:])

    assert daemon.wait(run()) == [1, 2, 3]


def test_a_slow_call_delays_nobody_else(daemon: Daemon) -> None:
    daemon.do(daemon.stand_in.gate.clear)
    with daemon.raw(line("start", names=["shop"])):
        assert alive(daemon)
        daemon.do(daemon.stand_in.gate.set)


# --- who may


LOOKS = {name for name, method in METHODS.items() if method.role == "look"}


def test_roles_of_methods() -> None:
    assert sorted(LOOKS) == ["daemon.status", "events", "logs", "logs.files", "logs.read", "show", "status", "why"]


@pytest.mark.parametrize(
    ("uid", "groups", "role"),
    [
        (0, {0}, "operate"),
        (1000, {1000}, "operate"),
        (1001, {1001}, None),
        (1001, {50}, "operate"),
        (1001, {60}, "look"),
        (1001, {60, 50}, "operate"),
        (1001, set(), None),
    ],
)
def test_access(uid: int, groups: set[int], role: str | None) -> None:
    assert Access(1000, operate_gid=50, look_gid=60).role(uid, frozenset(groups)) == role


def test_groups_that_nobody_names_give_no_access() -> None:
    # -1 stands for "no group", and is never a group of a peer: the kernel gives unsigned numbers
    assert Access(1000).role(1001, frozenset({2**32 - 1, 0, 1001})) is None


GROUP = 54321
ASK = """
import json, socket, sys
for method, params in json.loads(sys.argv[2]):
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        connection.settimeout(20)
        connection.connect(sys.argv[1])
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        connection.sendall(json.dumps(request).encode() + b"\\n")
        message = {}
        while "id" not in message:
            message = json.loads(next(answers))
        print(message.get("error", {}).get("data", {}).get("code", "fine"))
"""
PARAMS: dict[str, dict[str, object]] = {
    **{name: {"names": ["shop"]} for name in ("start", "stop", "restart", "reload")},
    "signal": {"signal": "HUP", "names": ["shop"]},
    "show": {"name": "blog"},
    "why": {"name": "blog"},
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("access", "groups", "allowed"),
    [
        (Access(0), [GROUP], set()),
        (Access(0, operate_gid=GROUP), [], set()),
        (Access(0, operate_gid=GROUP), [GROUP], set(METHODS)),
        (Access(0, look_gid=GROUP), [GROUP], LOOKS),
        (Access(0, look_gid=GROUP, operate_gid=GROUP + 1), [*range(1, 200), GROUP], LOOKS),
        (Access(-2), [], set()),
    ],
)
def test_peers_are_known_by_their_groups(access: Access, groups: list[int], allowed: set[str], as_user: User) -> None:
    asked = sorted(set(METHODS) - {"daemon.shutdown"})
    with Daemon(access) as daemon:
        daemon.folder.chmod(0o755)
        Path(daemon.path).chmod(0o666)
        calls = json.dumps([(name, PARAMS.get(name, {})) for name in asked])
        options = {**as_user.options(), "extra_groups": groups}
        done = subprocess.run(
            [as_user.python, "-c", ASK, daemon.path, calls],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            **options,
        )
        answers = dict(zip(asked, done.stdout.split(), strict=True))
        assert {name for name, code in answers.items() if code == "fine"} == allowed - {"daemon.shutdown"}
        assert {code for code in answers.values() if code != "fine"} <= {"not-allowed"}


def test_access_may_change_while_connected(daemon: Daemon) -> None:
    def forbid() -> None:
        daemon.server.access = Access(uid=os.geteuid() + 1)

    with daemon.client() as client:
        client.call("status")
        daemon.do(forbid)
        if os.geteuid() == 0:
            client.call("status")  # root always may
        else:
            with pytest.raises(NotAllowed, match="may not look here"):
                client.call("status")


# --- the end


def test_close_cancels_and_flushes() -> None:
    with Daemon() as daemon:
        daemon.do(daemon.stand_in.gate.clear)
        waiting = daemon.raw(line("start", names=["shop"]))
        following = daemon.raw(line("events", follow=True))
        read(following)
        deaf = daemon.raw(line("status", names=["big"]))
        idle = daemon.raw()
        wait_until(lambda: len(daemon.server.connections) == 4)
        with daemon.client() as client:
            assert client.call("daemon.shutdown") == {}
            started = time.monotonic()
            client.wait_closed()
        assert read_all(following) == []
        assert [message["method"] for message in read_all(waiting)] == ["progress"] * 2
        assert read_all(idle) == []
        assert time.monotonic() - started < 5
    deaf.close()
    assert daemon.stand_in.finished == 0


def test_the_socket_file_stays_for_the_keeper(daemon: Daemon) -> None:
    async def restart() -> None:
        again = os.dup(daemon.server._listening.fileno())  # what the keeper holds
        await daemon.server.close()
        assert os.path.exists(daemon.path)
        daemon.server = server.Server(socket.socket(fileno=again), daemon.stand_in, daemon.access)
        await daemon.server.start()

    with daemon.client() as client:
        client.call("status")
        daemon.wait(restart())
        assert client.call("status")  # asked again on a new connection, since it changes nothing


def test_clients_wait_in_the_backlog_while_there_is_no_server(daemon: Daemon) -> None:
    again = os.dup(daemon.server._listening.fileno())
    daemon.wait(daemon.server.close())
    with ThreadPoolExecutor(1) as pool, daemon.client() as client:
        answer = pool.submit(client.call, "status")
        time.sleep(0.1)
        assert not answer.done()

        async def start() -> None:
            daemon.server = server.Server(socket.socket(fileno=again), daemon.stand_in, daemon.access)
            await daemon.server.start()

        daemon.wait(start())
        assert len(answer.result(10)) == 3


def test_no_descriptor_is_left(daemon: Daemon) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def churn(times: int, act: Callable[[], object]) -> None:
        for _ in range(times):
            act()

    def follow_half_closed() -> None:
        with daemon.raw(line("events", follow=True)) as connection:
            connection.shutdown(socket.SHUT_WR)
            read(connection)

    churn(3, follow_half_closed)
    wait_until(lambda: left(daemon))
    before = descriptors()
    churn(50, follow_half_closed)
    churn(50, lambda: alive(daemon))
    wait_until(lambda: left(daemon))
    assert descriptors() <= before
    assert len(asyncio.all_tasks(daemon.loop)) == 1


# --- logs


def log_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(log_bytes(message["params"]) for message in messages if message.get("method") == "log")


def logs(daemon: Daemon, **params: object) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes that came, and what else was said."""
    data: list[bytes] = []
    others: list[dict[str, Any]] = []

    def heard(method: str, params: dict[str, Any]) -> None:
        if method == "log":
            data.append(log_bytes(params))
        else:
            others.append({method: params})

    with daemon.client() as client:
        assert client.stream("logs", heard, **params) == {}
    return b"".join(data), others


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        (b"", 10, b""),
        (b"a\n", 10, b"a\n"),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\n", 0, b""),
        (b"\xff\xfe\n\x00\n", 5, b"\xff\xfe\n\x00\n"),
        ("größe\n".encode() * 30_000, 29_999, "größe\n".encode() * 29_999),
        ("世界".encode()[:-1], 1, "世界".encode()[:-1]),
        (b"x" * 200_001 + b"\n", 1, b"x" * 200_001 + b"\n"),
    ],
)
def test_last_lines_of_a_log(daemon: Daemon, content: bytes, lines: int, expected: bytes) -> None:
    (daemon.folder / "blog.log").write_bytes(content)
    data, others = logs(daemon, names=["blog"], lines=lines)
    assert data == expected
    assert others == [{"sources": {"sources": [{"name": "blog", "stream": "out"}]}}]


def test_logs_of_several_and_of_rotated_files(daemon: Daemon) -> None:
    (daemon.folder / "shop:1.log.1").write_bytes(b"1\n2\n")
    (daemon.folder / "shop:1.log").write_bytes(b"3\n")
    (daemon.folder / "shop:2.err.log").write_bytes(b"oops\n")
    assert logs(daemon, names=["shop"], lines=2)[0] == b"2\n3\n"  # shop:2 has no file yet
    assert logs(daemon, stderr=True)[0] == b"oops\n"
    assert [one["name"] for one in logs(daemon)[1][0]["sources"]["sources"]] == ["shop:1", "shop:2", "blog"]


def test_logs_that_cannot_be_read(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").symlink_to("/etc/passwd")
    assert logs(daemon, names=["blog"])[0] == b""
    with daemon.client() as client, pytest.raises(NoSuchProgram):
        client.call("logs", names=["nobody"])
    assert alive(daemon)


def test_a_piece_of_a_log_ends_with_a_character(daemon: Daemon) -> None:
    """Pieces are 64 KiB: with characters of 3 bytes each one would end within one, and be no text."""
    text = "世" * 100_000 + "\n"
    (daemon.folder / "blog.log").write_text(text)
    with daemon.raw(line("logs", names=["blog"])) as connection, connection.makefile("rb") as file:
        messages: list[dict[str, Any]] = []
        while not messages or "id" not in messages[-1]:
            messages.append(json.loads(next(file)))
    assert "".join(message["params"]["text"] for message in messages if message.get("method") == "log") == text


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"", 0),
        (b"a", 1),
        (b"a\xc3", 1),
        (b"\xc3\xa4", 2),
        (b"\xe4\xb8", 0),
        (b"a\xe4", 1),
        (b"\xe4\xb8\x96", 3),
        (b"\xf0\x9f\x98", 0),
        (b"\xf0\x9f\x98\x80", 4),
        (b"\x80\x80\x80\x80\x80", 5),
        (b"\xff", 0),
        (b"\xff\x80\x80\x80", 4),
    ],
)
def test_whole_characters(data: bytes, whole: int) -> None:
    assert logstream._whole_characters(data) == whole


def grow(daemon: Daemon, name: str, data: bytes) -> None:
    """A log is written to, and the log thread says so."""
    with (daemon.folder / name).open("ab") as file:
        file.write(data)

    def wake() -> None:
        for callback in daemon.stand_in.watchers:
            callback()

    daemon.do(wake)


def said(message: dict[str, Any]) -> tuple[str, str, str]:
    """Name, stream and text of a `log` notification."""
    params = message["params"]
    return params["name"], params["stream"], params["text"]


def test_following_logs(daemon: Daemon) -> None:
    (daemon.folder / "shop:1.log").write_bytes(b"old\n1\n")
    with daemon.raw(line("logs", names=["shop"], lines=1, follow=True)) as connection:
        assert log_of(read(connection, 2)) == b"1\n"
        assert ("watch", ["shop:1/out"]) in daemon.stand_in.asked
        grow(daemon, "shop:1.log", b"2\n")
        assert said(read(connection)[0]) == ("shop:1", "out", "2\n")
        grow(daemon, "shop:2.log", b"new file\n")
        assert said(read(connection)[0]) == ("shop:2", "out", "new file\n")
        grow(daemon, "shop:1.log", "ä".encode()[:1])
        grow(daemon, "shop:1.log", "ä\n".encode()[1:])
        assert read(connection)[0]["params"]["text"] == "ä\n"
        os.rename(daemon.folder / "shop:1.log", daemon.folder / "shop:1.log.1")
        grow(daemon, "shop:1.log", b"after rotation\n")
        assert read(connection)[0]["params"]["text"] == "after rotation\n"
    wait_until(lambda: not daemon.stand_in.watchers)


def test_following_names_that_leave_the_table_and_come_back(daemon: Daemon) -> None:
    def change(*, there: bool) -> None:
        daemon.stand_in.processes.pop("blog", None)
        daemon.stand_in.processes |= {"blog": blog} if there else {}
        for watcher in daemon.stand_in.table_watchers * 3:  # it looks once
            watcher()

    blog, path = daemon.stand_in.processes["blog"], str(daemon.folder / "blog.log")
    (daemon.folder / "blog.log").write_bytes(b"1\n")
    with daemon.raw(line("logs", names=["shop", "blog"], lines=1, follow=True)) as connection:
        assert log_of(read(connection, 2)) == b"1\n"
        for there in (False, True):
            daemon.do(functools.partial(change, there=there))
            moved, missing = read(connection, 2)
            assert moved["method"] == "moved"
            assert moved["params"] == {"name": "blog", "stream": "out", "path": path if there else ""}
            assert (missing["method"], missing["params"]) == ("missing", {"names": [] if there else ["blog"]})
        grow(daemon, "blog.log", b"2\n")
        assert said(read(connection)[0]) == ("blog", "out", "2\n")
    wait_until(lambda: not daemon.stand_in.table_watchers)


def test_a_follower_that_comes_back_to_another_table(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it knows and is gone is ignored, and what it does not know is shown from where it began."""
    (daemon.folder / "shop:2.log").write_bytes(b"old\nnew\n")
    about = (daemon.folder / "shop:2.log").stat()
    begun = str(daemon.folder / "shop:2.log"), logread.Position(about.st_dev, about.st_ino, 4)
    monkeypatch.setattr(daemon.stand_in, "log_begins", lambda key: begun if key == "shop:2/out" else None)
    after = [{"name": name, "stream": "out", "file": "0:0", "offset": 0} for name in ("gone:1", "shop:1")]
    with daemon.raw(line("logs", names=["gone", "shop"], follow=True, after=after)) as connection:
        messages = read(connection, 3)
        assert [message["method"] for message in messages] == ["sources", "missing", "log"]
        assert [one["name"] for one in messages[0]["params"]["sources"]] == ["shop:1", "shop:2"]
        assert messages[1]["params"] == {"names": ["gone"]}
        assert said(messages[2]) == ("shop:2", "out", "new\n")
    names = [f"gone{number}" for number in range(methods.MAX_MISSING + 1)]
    for params in ({"names": ["gone", "shop"]}, {"names": names, "after": after}):
        with daemon.client() as client, pytest.raises(NoSuchProgram):
            client.call("logs", follow=True, **params)


def test_followers_of_many_logs_take_turns(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logstream, "MAX_TURN", 1)
    paths = [daemon.folder / f"{name}.log" for name in ("shop:1", "shop:2", "blog")]
    for path in paths:
        path.write_bytes(b"begin\n")
    with daemon.raw(line("logs", follow=True, lines=1)) as connection:
        assert log_of(read(connection, 4)) == b"begin\n" * 3
        for path in paths:
            path.write_bytes(b"begin\nmore\n")
        grow(daemon, "blog.log", b"")  # one wake-up for all
        more = sorted(said(message) for message in read(connection, 3))
        assert more == [(path.stem, "out", "more\n") for path in sorted(paths)]


def test_a_follower_gets_every_byte(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").write_bytes(b"begin\n")
    sent = b"".join(b"%d %s\n" % (number, b"x" * 200) for number in range(20_000))
    with daemon.raw(line("logs", names=["blog"], follow=True)) as connection:
        assert log_of(read(connection, 2)) == b"begin\n"  # from here on it follows
        got = b""

        def write() -> None:
            for at in range(0, len(sent), 100_000):
                grow(daemon, "blog.log", sent[at : at + 100_000])

        writer = threading.Thread(target=write)
        writer.start()
        with connection.makefile("rb") as file:
            while len(got) < len(sent):
                got += log_of([json.loads(next(file))])
        writer.join()
    assert got == sent


def test_a_writer_that_is_faster_does_not_keep_logs_from_ending(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").write_bytes(b"x" * 99 + b"\n")
    stop = threading.Event()

    def write() -> None:
        with (daemon.folder / "blog.log").open("ab") as file:
            while not stop.is_set() and file.tell() < 300_000_000:
                file.write((b"x" * 99 + b"\n") * 10_000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        data, _ = logs(daemon, names=["blog"], lines=3000)
    finally:
        stop.set()
        writer.join()
    assert data.count(b"\n") <= 3000


def test_a_follower_that_goes_while_the_disk_is_slow(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file must stay open until the thread has done with it, and be closed then."""
    entered, go_on = threading.Event(), threading.Event()
    really_read = logread.Follower.read
    closed: list[bool] = []

    class SlowDisk(logread.Follower):
        def read(self, max_bytes: int = 65536) -> bytes:
            entered.set()
            go_on.wait(10)
            return really_read(self, max_bytes)

        def close(self) -> None:
            closed.append(go_on.is_set())
            super().close()

    monkeypatch.setattr(logread, "Follower", SlowDisk)
    (daemon.folder / "blog.log").write_bytes(b"x\n")
    with daemon.raw(line("logs", names=["blog"], follow=True)):
        assert entered.wait(10)
        assert alive(daemon)
    wait_until(lambda: left(daemon))
    assert not closed
    go_on.set()
    wait_until(lambda: closed)
    assert closed == [True]


def test_nothing_is_said_of_a_call_that_was_answered(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that nobody waits for went on telling its progress, into the next call of that client."""
    kept: list[Callable[[dict[str, Any]], None]] = []

    async def operate(*_what: object, progress: Callable[[dict[str, Any]], None], **_how: object) -> list[object]:
        progress({"name": "shop:1", "state": "STOPPING", "why": "asked"})
        kept.append(progress)
        return []

    monkeypatch.setattr(daemon.stand_in, "operate", operate)
    with daemon.raw(line("restart", names=["shop"], wait=False)) as connection:
        assert [message.get("id") for message in read(connection, 2)] == [None, 1]
        daemon.do(lambda: kept[0]({"name": "shop:1", "state": "STARTING", "why": "asked"}))
        connection.sendall(line("daemon.status", 2))
        assert read(connection)[0]["id"] == 2


# --- logs.files and logs.read


def test_the_files_of_a_log_and_their_bytes(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").write_bytes(b"new\xff\n")
    (daemon.folder / "blog.log.1").write_bytes(b"old\n")
    (daemon.folder / "blog.log.2.gz").write_bytes(b"\x1f\x8bzipped")
    with daemon.client() as client:
        (source,) = client.call("logs.files", names=["blog"])["sources"]
        assert (source["name"], source["stream"]) == ("blog", "out")
        files = source["files"]
        assert [(Path(file["path"]).name, file["bytes"], file["zipped"]) for file in files] == [
            ("blog.log.2.gz", 8, True), ("blog.log.1", 4, False), ("blog.log", 5, False),
        ]  # fmt: skip

        def read(number: int, **more: int) -> dict[str, Any]:
            found: dict[str, Any] = client.call("logs.read", name="blog", file=files[number]["file"], **more)
            return found

        assert read(1) == {"gone": False, "text": "old\n"}
        assert read(1, offset=1, bytes=2) == {"gone": False, "text": "ld"}
        assert read(1, offset=99) == {"gone": False, "text": ""}
        assert rpc.log_bytes(read(2)) == b"new\xff\n"
        (daemon.folder / "blog.log.1").rename(daemon.folder / "blog.log.2")
        assert read(1)["text"] == "old\n"  # whatever its name is now
        (daemon.folder / "blog.log.2").unlink()
        assert read(1)["text"] == "old\n"  # it was listed for this connection, which holds it
        with daemon.client() as other:
            assert other.call("logs.read", name="blog", file=files[1]["file"]) == {"gone": True}
        (daemon.folder / "secret").write_bytes(b"secret\n")
        status = (daemon.folder / "secret").stat()
        secret = rpc.file_id(status.st_dev, status.st_ino)
        assert client.call("logs.read", name="blog", file=secret) == {"gone": True}  # it is no file of this log
        with pytest.raises(Failed, match="no log file holds the output 'err'"):
            client.call("logs.read", name="blog", stream="err", file=secret)


def open_logs(daemon: Daemon) -> list[str]:
    """The files of its logs that this process, in which the daemon runs, has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(os.path.basename(one) for one in found if one.startswith(f"{daemon.folder}/blog.log"))


def test_what_a_reader_holds_open_is_bounded_and_let_go(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """By him and by all together; a while after his last call, and when he goes."""
    monkeypatch.setattr(server, "HELD_EACH", 2)
    monkeypatch.setattr(server, "HELD_ALL", 3)
    for name in ("blog.log", "blog.log.1", "blog.log.2"):
        (daemon.folder / name).write_text(f"{name}\n")
    with daemon.client() as one, daemon.client() as two:
        one.call("logs.files", names=["blog"])
        assert open_logs(daemon) == ["blog.log", "blog.log.2"]
        one.call("logs.files", names=["blog"])
        two.call("logs.files", names=["blog"])
        assert open_logs(daemon) == ["blog.log", "blog.log", "blog.log.2"]
        one.close()
        wait_until(lambda: open_logs(daemon) == ["blog.log"])
        monkeypatch.setattr(server, "HELD_SECONDS", 0.05)
        (source,) = two.call("logs.files", names=["blog"])["sources"]
        wait_until(lambda: open_logs(daemon) == [])
        for file in source["files"]:
            found = two.call("logs.read", name="blog", file=file["file"])
            assert found["text"] == f"{os.path.basename(file['path'])}\n"


def test_following_goes_on_after_a_place_that_was_told_before(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").write_bytes(b"one\ntwo\n")
    with daemon.raw(line("logs", names=["blog"], lines=1, follow=True)) as connection:
        told = read(connection, 2)[-1]["params"]
    assert (told["text"], told["offset"]) == ("two\n", 8)
    (daemon.folder / "blog.log").rename(daemon.folder / "blog.log.1")
    grow(daemon, "blog.log", b"three\n")
    after = [{key: told[key] for key in ("name", "stream", "file", "offset")}]
    with daemon.raw(line("logs", names=["blog"], follow=True, after=after)) as connection:
        assert log_of(read(connection, 2)) == b"three\n"
        grow(daemon, "blog.log", "ä".encode()[:1])
        grow(daemon, "blog.log", "ä\n".encode()[1:])
        assert read(connection)[0]["params"]["offset"] == len("three\nä\n".encode())
    wait_until(lambda: not daemon.stand_in.watchers)

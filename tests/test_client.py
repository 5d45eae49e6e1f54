"""The blocking client: what it returns, and what it says when nobody answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from procman import rpc
from procman.client import Client
from procman.errors import NoSuchProgram, Unreachable
from procman.rpc import RpcError
from tests.harness import User
from tests.rpc_stand_in import Daemon

Talk = Callable[[socket.socket], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because sockets stand in it."""
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as name:
        yield Path(name)


class Fake:
    """A daemon that does just what the test says with each connection, one after the other."""

    def __init__(self, path: Path, *talks: Talk) -> None:
        self.path = str(path)
        self._talks = talks
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Fake:  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listening.close()

    def _run(self) -> None:
        for talk in self._talks:
            connection, _ = self._listening.accept()
            with connection:
                connection.settimeout(10)
                talk(connection)


def answer(result: object) -> Talk:
    """Reads one request and answers it."""

    def talk(connection: socket.socket) -> None:
        request = json.loads(connection.makefile("rb").readline())
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\n")

    return talk


def say(*lines: bytes) -> Talk:
    """Reads one request and says something else."""

    def talk(connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            file.readline()
        for line in lines:
            connection.sendall(line)

    return talk


def test_one_connection_serves_many_calls() -> None:
    with Daemon() as daemon, daemon.client() as client:
        assert len(client.call("status")) == 3
        with pytest.raises(NoSuchProgram) as caught:
            client.call("why", name="nobody")
        assert (caught.value.code, caught.value.exit_status) == ("no-such-program", 4)
        assert len(client.call("status", names=["shop"])) == 2
        assert len(daemon.server.connections) == 1


def test_notifications_are_passed_on_or_ignored() -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    with Daemon() as daemon, daemon.client() as client:
        client.stream("start", lambda *what: heard.append(what), names=["shop:1"])
        assert heard == [("progress", {"name": "shop:1", "state": "STARTING", "why": "asked"})]
        assert client.call("start", names=["shop:1"])[0]["ok"]


def test_a_param_may_have_any_name() -> None:
    with Daemon() as daemon, daemon.client() as client, pytest.raises(RpcError, match="unknown param 'method'"):
        client.call("status", method=1)


def test_an_error_in_the_callers_function_comes_through() -> None:
    def fail(_method: str, _params: object) -> None:
        raise LookupError("mine")

    with Daemon() as daemon, daemon.client() as client, pytest.raises(LookupError, match="mine"):
        client.stream("events", fail)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_answers_may_come_in_pieces(folder: Path, pieces: int) -> None:
    line = b'{"jsonrpc":"2.0","method":"log","params":{}}\n{"jsonrpc":"2.0","id":1,"result":"' + b"x" * 5000 + b'"}\n'
    parts = [line[at : at + pieces] for at in range(0, len(line), pieces)]
    with Fake(folder / "s", say(*parts)) as fake, Client(fake.path, 10) as client:
        assert client.call("status") == "x" * 5000


def test_answers_to_others_are_ignored(folder: Path) -> None:
    stale = b'{"jsonrpc":"2.0","id":0,"result":1}\n{"jsonrpc":"2.0","id":99,"error":{"code":-32000,"message":"m"}}\n'
    with (
        Fake(folder / "s", say(stale, b'{"jsonrpc":"2.0","id":1,"result":2}\n')) as fake,
        Client(fake.path, 10) as client,
    ):
        assert client.call("status") == 2


@pytest.mark.parametrize("line", [b"hello\n", b"{}\n", b"220 smtp.example ESMTP\r\n"])
def test_somebody_else_answers(folder: Path, line: bytes) -> None:
    with Fake(folder / "s", say(line)) as fake, Client(fake.path, 10) as client, pytest.raises(RpcError):
        client.call("status")


# --- nobody answers


def refused(path: str, timeout: float | None = 5) -> Unreachable:
    with Client(path, timeout) as client, pytest.raises(Unreachable) as caught:
        client.call("status")
    assert caught.value.exit_status == 6
    assert caught.value.hint
    return caught.value


LISTEN = (
    "import socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); print(flush=True); sys.stdin.read()"
)


def test_a_third_users_daemon_in_the_default_folder_is_a_trap(
    folder: Path, as_user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("only root can be two users")
    monkeypatch.setattr(rpc, "_TMP_FOLDER", f"{folder}/procman-")
    folder.chmod(0o755)
    for number in (7, as_user.uid):
        trap = folder / f"procman-{number}"
        trap.mkdir()
        trap.chmod(0o777)
        options = as_user.options() | {"stdin": subprocess.PIPE}
        argv = [as_user.python, "-c", LISTEN, str(trap / "s")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, **options) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdout.readline()
            if number == 7:
                error = refused(f"{trap}/s")
                assert str(error) == f"the daemon at {trap}/s is not to be trusted: it runs as user {as_user.uid}"
            else:
                with Client(f"{trap}/s") as client:
                    client.connect()  # root may look after the daemon of the user that the path names
            assert daemon.stdin is not None
            daemon.stdin.close()


def test_our_own_daemon_in_the_default_folder_is_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_TMP_FOLDER", f"{folder}/procman-")
    (folder / "procman-7").mkdir()
    with Fake(folder / "procman-7" / "s", answer(3)) as fake, Client(fake.path, 10) as client:
        assert client.call("status") == 3


def test_no_socket(folder: Path) -> None:
    error = refused(f"{folder}/s")
    assert str(error) == f"no daemon listens at {folder}/s: there is no such socket"
    assert "is procmand running?" in error.hint


def test_a_left_over_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/s")
    assert str(refused(f"{folder}/s")) == f"no daemon listens at {folder}/s: the socket is left over"


def test_an_impossible_path(folder: Path) -> None:
    assert "can't be the path of a socket" in str(refused(f"{folder}/{'x' * 200}"))


def test_a_file_is_no_socket(folder: Path) -> None:
    (folder / "s").touch()
    assert "no daemon listens at" in str(refused(f"{folder}/s"))
    assert "Not a directory" in str(refused(f"{folder}/s/s"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_no_permission(as_user: User) -> None:
    with Daemon() as daemon:
        daemon.folder.chmod(0o755)
        os.chmod(daemon.path, 0o600)
        code = (
            "import sys; from procman.client import Client; from procman.errors import Unreachable\n"
            "try: Client(sys.argv[1]).call('status')\n"
            "except Unreachable as error: print(error, error.hint)"
        )
        done = as_user.run("python", "-c", code, daemon.path)
    assert done.stdout.startswith(f"no permission to connect to {daemon.path} be root, ")


def test_silence_times_out(folder: Path) -> None:
    def silent(connection: socket.socket) -> None:
        while connection.recv(1000):
            pass

    started = time.monotonic()
    with Fake(folder / "s", silent) as fake:
        assert "did not answer in time" in str(refused(fake.path, 0.2))
    assert 0.15 < time.monotonic() - started < 5


def test_a_full_backlog_times_out(folder: Path) -> None:
    """connect() itself waits then; a client with a timeout must neither fail at once nor wait for ever."""
    path = f"{folder}/s"
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(path)
        full.listen(0)
        waiting = []
        while True:
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            waiting.append(one)
            try:
                one.connect(path)
            except BlockingIOError:
                break
        started = time.monotonic()
        assert "did not answer in time" in str(refused(path, 0.3))
        assert 0.25 < time.monotonic() - started < 5
        for one in waiting:
            one.close()


def gone(connection: socket.socket) -> None:
    """Takes the request and dies."""
    connection.recv(1)


def test_a_question_is_asked_again_when_the_supervisor_is_replaced(folder: Path) -> None:
    with Fake(folder / "s", gone, answer("here")) as fake, Client(fake.path, 10) as client:
        assert client.call("status") == "here"


def test_a_question_is_asked_twice_at_most(folder: Path) -> None:
    with Fake(folder / "s", gone, gone) as fake:
        assert "closed the connection before it had answered" in str(refused(fake.path))


def test_an_operation_is_never_asked_again(folder: Path) -> None:
    with (
        Fake(folder / "s", gone) as fake,
        Client(fake.path, 10) as client,
        pytest.raises(Unreachable, match="closed") as caught,
    ):
        client.call("restart", names=["all"])
    assert "try again" in caught.value.hint


def test_a_refusal_is_told_even_when_we_were_still_sending() -> None:
    with Daemon() as daemon, daemon.client() as client, pytest.raises(RpcError, match="a request has at most"):
        client.call("status", names=["x" * 10_000_000])


def test_wait_closed() -> None:
    with Daemon() as daemon, daemon.client() as client:
        client.wait_closed()  # never connected: closed already
        client.connect()
        client.call("daemon.shutdown")
        client.wait_closed()


def test_wait_closed_times_out() -> None:
    with Daemon() as daemon, daemon.client(0.2) as client:
        client.call("status")
        with pytest.raises(Unreachable, match="in time"):
            client.wait_closed()


def test_close_may_be_called_twice_and_the_next_call_connects_again() -> None:
    with Daemon() as daemon:
        client = daemon.client()
        assert client.call("status")
        client.close()
        client.close()
        assert client.call("status")
        client.close()

"""probes.py against real servers: canned answers over real sockets, and the real gunicorn."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from asyncio.trsock import TransportSocket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from procman import ground, probes, queues, resources
from procman.config import Address, Ready
from procman.errors import Failed
from procman.probes import wait_ready
from tests.harness import free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


async def no_command(argv: tuple[str, ...]) -> int:
    raise AssertionError(f"nothing runs {argv}")


async def outcome(ready: Ready, run: probes.Run = no_command) -> str:
    """The first thing that happens: "ready", or the reason of the first failure."""
    reasons: asyncio.Queue[str] = asyncio.Queue()

    async def probe() -> None:
        await wait_ready(ready, run, reasons.put_nowait)
        reasons.put_nowait("ready")

    async with asyncio.timeout(10):
        task = asyncio.create_task(probe())
        try:
            return await reasons.get()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@dataclass
class Canned:
    """A server that gives each connection the next of its answers (the last one again and again) and keeps what it got.

    None as answer: it reads and says nothing. `late` follows each answer after a moment, as a slow body does.
    """

    answers: list[bytes | None]
    requests: list[bytes] = field(default_factory=list)
    late: bytes = b""
    clean_ends: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = self.answers[min(self.connections, len(self.answers) - 1)]
        self.connections += 1
        try:
            if answer is not None:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(answer)
                await writer.drain()
                if self.late:
                    await asyncio.sleep(0.05)
                    writer.write(self.late)
                writer.write_eof()
            while await reader.read(4096):
                pass
            self.clean_ends += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def with_server(
    canned: Canned, client: Callable[[Address], Awaitable[Any]], host: str = "127.0.0.1", path: str = ""
) -> Any:
    """Runs `client` with the address of a server that answers so."""

    async def main() -> Any:
        if path:
            server = await asyncio.start_unix_server(canned.serve, path)
            address = Address("unix", path=path)
        else:
            server = await asyncio.start_server(canned.serve, host, 0)
            address = Address("tcp", host, server.sockets[0].getsockname()[1])
        async with server:
            result = await client(address)
            async with asyncio.timeout(10):  # the server's side of the last connection ends, too
                while len(asyncio.all_tasks()) > 1:
                    await asyncio.sleep(0.01)
            return result

    return asyncio.run(main())


HTTP_ANSWERS = [
    (OK, False, "ready"),
    (b"HTTP/1.0 204 No Content\r\n\r\n", False, "ready"),
    (b"HTTP/1.1 302 Found\r\nLocation: /login\r\n\r\n", False, "ready"),
    (b"HTTP/1.1 399\r\n\r\n", False, "ready"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, False, "ready"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 No\r\n\r\n", False, "HTTP 500"),
    (b"HTTP/1.1 200 OK\n\n", False, "ready"),
    (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000, False, "ready"),
    (b"HTTP/1.1 401 Unauthorized\r\n\r\n", False, "HTTP 401"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", True, "ready"),
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False, "HTTP 503"),
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", True, "ready"),
    (b"", False, "the connection was closed without an answer"),
    (b"", True, "the connection was closed without an answer"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", True, "the answer is no HTTP"),
    (b"HTTP/1.1 2 OK\r\n\r\n", True, "the answer is no HTTP"),
    ("HTTP/1.1 ²²² OK\r\n\r\n".encode(), True, "the answer is no HTTP"),
    (b"\0" * 200_000, True, "the answer is no HTTP"),
    (b"HTTP/1.1 103 Early Hints\r\n" * 3, True, "the connection was closed without an answer"),
]


@pytest.mark.parametrize("host", ["", "shop.example"])
def test_400_tells_of_the_host(host: str) -> None:
    """Django says it to who is not in its ALLOWED_HOSTS."""

    def client(address: Address) -> Awaitable[str]:
        return outcome(Ready(kind="http", address=address, path="/up", host=host))

    said = with_server(Canned([b"HTTP/1.1 400 Bad Request\r\n\r\n"]), client)
    if host:
        assert said == "HTTP 400 to the host shop.example"
    else:
        assert said.startswith("HTTP 400 to the host 127.0.0.1:")
        assert said.endswith('(Django: of ALLOWED_HOSTS): ready = { http = "/up", host = "..." }')


@pytest.mark.parametrize(("answer", "any_status", "expected"), HTTP_ANSWERS)
def test_http_answers(answer: bytes, any_status: bool, expected: str) -> None:
    def client(address: Address) -> Awaitable[str]:
        return outcome(Ready(kind="http", address=address, path="/", any_status=any_status))

    assert with_server(Canned([answer]), client) == expected


def test_http_request() -> None:
    canned = Canned([OK])

    async def client(address: Address) -> int:
        await outcome(Ready(kind="http", address=address, path="/a?b=%20&c=ü \r\nX: y", host="shop.example\r\nX: y"))
        await outcome(Ready(kind="http", address=address))
        return address.port

    port = with_server(canned, client)
    rest = b"User-Agent: procman\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    assert canned.requests == [
        b"GET /a?b=%20&c=%C3%BC%20%0D%0AX:%20y HTTP/1.1\r\nHost: shop.exampleX: y\r\n" + rest,
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port + rest,
    ]
    assert canned.clean_ends == 2


def test_a_server_sees_no_broken_connection() -> None:
    canned = Canned([b"HTTP/1.1 200 OK\r\n\r\n"], late=b"x" * 1000)

    def client(address: Address) -> Awaitable[str]:
        return outcome(Ready(kind="http", address=address))

    assert with_server(canned, client) == "ready"
    assert canned.clean_ends == 1


def test_an_answer_counts_only_if_it_is_the_right_process_that_gives_it() -> None:
    """Of those that have the socket. Nobody else is sent a request, and each sees an orderly end."""
    single: list[list[str | None]] = [[None], [None], ["web:1"]]  # nobody yet, then another one
    two_at_once: list[list[str | None]] = [["web:1", None], ["web:1", "web:2"]]
    after_a_pause: list[list[str | None]] = [["web:1"], [None, "web:1"], ["", "web:1"]]
    told = single + two_at_once + after_a_pause

    async def accepted_by(clients: Sequence[TransportSocket]) -> list[str | None]:
        names = told.pop(0)
        assert len(clients) == len(names)
        return names

    async def client(address: Address) -> list[str]:
        reasons: list[str] = []
        ready = Ready(kind="http", address=address, path="/")
        await wait_ready(ready, no_command, reasons.append, shared=probes.Shared(accepted_by, 2))
        return reasons

    canned = Canned([None, None, None, None, OK, None])
    assert with_server(canned, client) == ["answered by web:1, which has the same socket"]
    assert told == []
    assert len(canned.requests) == 1
    assert canned.clean_ends == canned.connections == 6


def test_http_over_unix_and_ipv6(tmp_path: Path) -> None:
    def client(address: Address) -> Awaitable[str]:
        return outcome(Ready(kind="http", address=address, path="/"))

    canned = Canned([OK])
    assert with_server(canned, client, path=str(tmp_path / "web.sock")) == "ready"
    assert b"\r\nHost: localhost\r\n" in canned.requests[0]
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    canned = Canned([OK])
    assert with_server(canned, client, host="::1") == "ready"
    assert b"\r\nHost: [::1]:" in canned.requests[0]


@pytest.mark.parametrize("host", ["", "0.0.0.0", "localhost"])
def test_all_addresses_means_loopback(host: str) -> None:
    def client(address: Address) -> Awaitable[str]:
        return outcome(Ready(kind="http", address=Address("tcp", host, address.port), path="/"))

    canned = Canned([OK])
    assert with_server(canned, client) == "ready"
    assert b"\r\nHost: " + (b"localhost:" if host == "localhost" else b"127.0.0.1:") in canned.requests[0]


def test_tries_again_and_reports_changes_only() -> None:
    bad, worse = b"HTTP/1.1 503 No\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"
    canned = Canned([bad, bad, worse, bad, OK])

    async def client(address: Address) -> list[str]:
        reasons: list[str] = []
        await wait_ready(Ready(kind="http", address=address, path="/"), no_command, reasons.append)
        return reasons

    assert with_server(canned, client) == ["HTTP 503", "HTTP 500", "HTTP 503"]
    assert canned.connections == 5


def test_a_silent_server_is_given_up_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ATTEMPT_SECONDS", 0.2)
    canned = Canned([None, OK])

    async def client(address: Address) -> list[str]:
        reasons: list[str] = []
        await wait_ready(Ready(kind="http", address=address, path="/"), no_command, reasons.append)
        return reasons

    assert with_server(canned, client) == ["no answer within 0.2 s"]


def test_cancelling_closes_the_connection() -> None:
    canned = Canned([None])

    async def client(address: Address) -> None:
        task = asyncio.create_task(wait_ready(Ready(kind="http", address=address), no_command, print))
        async with asyncio.timeout(10):
            while not canned.connections:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_server(canned, client)  # waits until the server has seen the end


def test_tcp_waits_for_a_listener() -> None:
    async def main() -> None:
        port = free_port()
        ready = Ready(kind="tcp", address=Address("tcp", "127.0.0.1", port))
        reasons: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(wait_ready(ready, no_command, reasons.put_nowait))
        async with asyncio.timeout(10):
            assert await reasons.get() == "connection refused"
            assert not task.done()
            with socket.create_server(("127.0.0.1", port)):
                await task

    asyncio.run(main())


def test_unix_waits_for_a_listener(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "db.sock"
        reasons: asyncio.Queue[str] = asyncio.Queue()
        ready = Ready(kind="unix", address=Address("unix", path=str(path)))
        task = asyncio.create_task(wait_ready(ready, no_command, reasons.put_nowait))
        async with asyncio.timeout(10):
            assert await reasons.get() == "no such file or directory"
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
                assert await reasons.get() == "connection refused"
                server.listen()
                await task

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (Address("unix", path="/" + "x" * 200), "AF_UNIX path too long"),
        (Address("tcp", "x" * 70, 80), "the host name is not valid"),
        (Address("tcp", "fe80::1%nolink", 80), None),
    ],
)
def test_addresses_that_never_work_are_only_a_reason(address: Address, reason: str | None) -> None:
    found = asyncio.run(outcome(Ready(kind="tcp", address=address)))
    assert found != "ready"
    assert found == (reason or found)


def test_command() -> None:
    answers: list[int | Failed] = [1, Failed("no such file: check"), -9, 0]
    reasons: list[str] = []

    async def run(argv: tuple[str, ...]) -> int:
        assert argv == ("check", "-v")
        answer = answers.pop(0)
        if isinstance(answer, Failed):
            raise answer
        return answer

    asyncio.run(wait_ready(Ready(kind="command", argv=("check", "-v")), run, reasons.append))
    assert reasons == ["exit status 1", "no such file: check", "killed by signal 9"]


def test_a_command_that_hangs_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "COMMAND_SECONDS", 0.1)
    cancelled: list[tuple[str, ...]] = []

    async def run(argv: tuple[str, ...]) -> int:
        if cancelled:
            return 0
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(argv)
            raise
        return 0

    reasons: list[str] = []
    asyncio.run(wait_ready(Ready(kind="command", argv=("hang",)), run, reasons.append))
    assert (cancelled, reasons) == ([("hang",)], ["no answer within 0.1 s"])


@pytest.mark.parametrize(
    "ready",
    [Ready(), Ready(kind="log", pattern="up"), Ready(kind="notify"), Ready(kind="http"), Ready(kind="gunicorn")],
)
def test_what_cannot_be_probed(ready: Ready) -> None:
    with pytest.raises(ValueError, match=f"{ready.kind!r} readiness"):
        asyncio.run(wait_ready(ready, no_command, print))


# gunicorn


def framed(document: object) -> bytes:
    payload = json.dumps(document).encode()
    return struct.pack(">I", len(payload)) + payload


def workers(*beats: object) -> bytes:
    return framed({"id": 1, "status": "ok", "data": {"workers": [{"last_heartbeat": beat} for beat in beats]}})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (workers(0), "ready"),
        (workers(-123456.78, 0.52), "ready"),
        (workers(-123456.78), "no worker has booted yet"),
        (workers(None, "1", True), "no worker has booted yet"),
        (workers(), "no worker has booted yet"),
        (framed({"id": 1, "status": "error", "error": "busy"}), "no worker has booted yet"),
        (framed([1]), "no worker has booted yet"),
        (framed({"data": {"workers": {}}}), "no worker has booted yet"),
        (struct.pack(">I", 3) + b"{\xff}", "the answer of the control socket is no JSON"),
        (struct.pack(">I", 1 << 31), "the answer of the control socket is too long"),
        (workers(1)[:-1], "the connection was closed without an answer"),
        (b"\0", "the connection was closed without an answer"),
    ],
)
def test_gunicorn_answers(tmp_path: Path, answer: bytes, expected: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = struct.unpack(">I", await reader.readexactly(4))[0]
        assert json.loads(await reader.readexactly(size)) == {"id": 1, "command": "show workers"}
        writer.write(answer)
        writer.close()

    async def main() -> str:
        path = str(tmp_path / "ctl.sock")
        async with await asyncio.start_unix_server(serve, path):
            return await outcome(Ready(kind="gunicorn", address=Address("unix", path=path)))

    assert asyncio.run(main()) == expected


APPLICATION = """
import os
with open(os.environ["GATE"], "rb") as gate:  # a FIFO: the import takes until the test lets it go on
    gate.read()
def application(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


def test_real_gunicorn_is_ready_when_a_worker_serves(tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    gate = tmp_path / "gate"
    subprocess.run(["mkfifo", str(gate)], check=True)
    (tmp_path / "slow.py").write_text(APPLICATION)
    port = free_port()
    control = Address("unix", path=str(tmp_path / "ctl.sock"))
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "--control-socket", control.path]
    environment = {**os.environ, "GATE": str(gate), "HOME": str(tmp_path), "GUNICORN_CMD_ARGS": ""}

    async def main() -> None:
        reasons: asyncio.Queue[str] = asyncio.Queue()
        ready = Ready(kind="gunicorn", address=control)
        task = asyncio.create_task(wait_ready(ready, no_command, reasons.put_nowait))
        async with asyncio.timeout(30):
            while (reason := await reasons.get()) != "no worker has booted yet":
                assert reason in {"no such file or directory", "connection refused"}
            # The port is open, and gunicorn has said READY=1 by now. Nothing would answer.
            assert await outcome(Ready(kind="tcp", address=Address("tcp", "127.0.0.1", port))) == "ready"
            assert not task.done()
            gate.write_bytes(b"")
            await task
            assert await outcome(Ready(kind="http", address=Address("tcp", "127.0.0.1", port), path="/")) == "ready"

    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*argv, "slow"], cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        asyncio.run(main())
    except BaseException as error:
        error.add_note(log.read_text())
        raise
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # a worker that still waits at the gate, too
        server.wait()


def test_who_has_just_accepted_has_no_descriptor_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked again; only what stays unknown counts as the answer of the process that is asked."""
    monkeypatch.setattr(queues, "acceptors", lambda clients: [7, 0])
    monkeypatch.setattr(resources, "holders", lambda inodes, mains: {})
    looked: Counter[int] = Counter()
    for _ in range(ground.HOLDER_LOOKS - 1):
        assert ground._accepted_by([], {}, looked) == [None, None]
    assert ground._accepted_by([], {}, looked) == ["", None]
    monkeypatch.setattr(resources, "holders", lambda inodes, mains: {7: "web:1"})
    assert ground._accepted_by([], {}, Counter()) == ["web:1", None]

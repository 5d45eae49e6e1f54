"""The load client: one that sees no failure proves nothing. So each kind of failure is made here, and must be named."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.harness import PROJECT, free_port, wait_until
from tests.loss.client import FIRST_PIECE, MODES, Plan, mode_of
from tests.loss.load import load, run
from tests.loss.tally import FAILURES_SHOWN, KINDS, Result, Tally
from tests.sites.numbered_site import body

Serve = Callable[[socket.socket, int], None]
"""What a server does about the requests of a connection, which is its number-th one."""


@contextlib.contextmanager
def server(serve: Serve, path: Path | None = None) -> Iterator[str]:
    """A server that is as bad as `serve` is; its address. Each connection has a thread."""
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listener.bind(str(path) if path else ("127.0.0.1", 0))
    listener.listen(100)
    threads = []

    def work(connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(ConnectionError):
            serve(connection, number)

    def accept() -> None:
        number = 0
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(20)
                threads.append(threading.Thread(target=work, args=(connection, number)))
                threads[-1].start()
                number += 1

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        name = listener.getsockname()
        yield f"unix:{path}" if path else f"127.0.0.1:{name[1]}"
    finally:
        with contextlib.suppress(OSError):  # a test may have closed it
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def read_head(connection: socket.socket) -> bytes:
    """The head of a request. Raises ConnectionError at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError
        head += byte
    return head


def asked_by(head: bytes) -> tuple[int, int]:
    """The number of a request, and the size that it asks for."""
    url = urlsplit(head.split()[1].decode())
    return int(url.path.rpartition("/")[2]), int(parse_qs(url.query)["size"][0])


def asked(connection: socket.socket) -> tuple[int, int]:
    """Reads a GET."""
    return asked_by(read_head(connection))


def right_for_upload(connection: socket.socket) -> bytes:
    """Reads a PUT; its right answer."""
    head = read_head(connection)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    uploaded = b""
    while len(uploaded) < length:
        piece = connection.recv(length - len(uploaded))
        if not piece:
            raise ConnectionError
        uploaded += piece
    number, size = asked_by(head)
    return body(number, uploaded, size)


def right(request: tuple[int, int]) -> bytes:
    return body(request[0], b"", request[1])


def answer(text: bytes, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    size = len(text) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nX-Who: 1 a\r\n{more}\r\n".encode() + text


def reset(connection: socket.socket) -> None:
    """Has the close end the connection by RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def ends(connection: socket.socket, text: bytes, by_reset: bool = False) -> None:
    """Answers one request so, and ends the connection."""
    connection.sendall(text)
    if by_reset:
        reset(connection)


def one(make: Callable[[tuple[int, int]], bytes], by_reset: bool = False) -> Serve:
    """A server that answers one request on each connection."""
    return lambda connection, number: ends(connection, make(asked(connection)), by_reset)


CLOSE = "Connection: close\r\n"

BAD: list[tuple[str, str, Serve]] = [
    ("right", "", one(lambda request: answer(right(request), more=CLOSE))),
    ("another number", "wrong", one(lambda request: answer(right((request[0] + 1, 0)), more=CLOSE))),
    ("one byte", "wrong", one(lambda request: answer(right(request)[:-1] + b"!", more=CLOSE))),
    ("404", "wrong", one(lambda request: answer(right(request), "404 Not Found", more=CLOSE))),
    ("nonsense", "wrong", one(lambda request: b"nonsense\r\n\r\n")),
    ("no length", "wrong", one(lambda request: answer(right(request), more=CLOSE).replace(b"Length: ", b"Length: x"))),
    ("too short", "wrong", one(lambda request: answer(right(request)[:-1], more=CLOSE))),
    ("503", "error", one(lambda request: answer(b"sorry", "503 Service Unavailable", more=CLOSE))),
    ("half", "short", one(lambda request: answer(right(request)[:-1], length=len(right(request)), more=CLOSE))),
    ("half a head", "short", one(lambda request: b"HTTP/1.1 200 OK\r\nContent-Le")),
    ("nothing", "reset", one(lambda request: b"")),
    ("nothing, by RST", "reset", one(lambda request: b"", by_reset=True)),
]


@pytest.mark.parametrize(("kind", "serve"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
@pytest.mark.parametrize("mode", ["get", "get/close"])
def test_each_failure_is_seen_and_named(kind: str, serve: Serve, mode: str) -> None:
    with server(serve) as address:
        tally = run(Plan(address, (mode,), connections=2, requests=60)).total
    assert tally.requests >= 60
    assert tally.failed == ({kind: tally.requests} if kind else {}), tally.failures
    assert tally.ok == tally.requests - tally.failed_count
    assert len(tally.failures) == min(FAILURES_SHOWN, tally.failed_count)
    assert tally.idle_closed == tally.retried == 0


def test_a_reset_in_the_midst_of_an_answer() -> None:
    def serve(connection: socket.socket, number: int) -> None:
        request = asked(connection)
        connection.sendall(answer(right(request)[:-1], length=len(right(request))))
        with contextlib.suppress(TimeoutError):
            connection.settimeout(0.2)
            connection.recv(1)  # the client has read what there is by then
        reset(connection)

    with server(serve) as address:
        assert run(Plan(address, ("get",), 1, requests=2)).total.failed == {"cut": 2}


def test_bytes_that_nobody_asked_for_are_seen() -> None:
    with server(one(lambda request: answer(right(request)) + b"HTTP")) as address:
        tally = run(Plan(address, ("get",), 1, requests=1)).total
    assert (tally.ok, tally.failed) == (1, {"wrong": 1})


def test_nobody_there_is_refused(tmp_path: Path) -> None:
    for address in (f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/nobody"):
        assert run(Plan(address, connections=2, requests=10)).total.failed["refused"] >= 10


def test_an_answer_that_does_not_come_is_slow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        tally = run(Plan(address, connections=2, patience=0.2, requests=2)).total
    assert tally.failed == {"slow": 2}


# --- an idle close is no loss, and a loss is no idle close ------------------------------------------------------------


def test_a_close_while_idle_is_counted_apart() -> None:
    closed = threading.Semaphore(0)

    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(answer(right(asked(connection))))
        connection.close()
        closed.release()

    with server(serve) as address:
        tally = run(Plan(address, ("get",), 2, rate=20, requests=20)).total
    assert not tally.failed
    assert tally.idle_closed >= 10
    assert tally.idle_closed_most >= 5
    assert tally.connections > 10


def test_a_close_that_the_request_meets_on_the_wire_is_one_too() -> None:
    """The server has not read the request: the kernel answers it by RST."""

    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(answer(right(asked(connection))))
        if number:
            connection.sendall(answer(right(asked(connection)), more=CLOSE))
        else:
            connection.recv(1, socket.MSG_PEEK)  # the next one is here, and unread

    with server(serve) as address:
        tally = run(Plan(address, ("get",), 1, requests=3)).total
    assert not tally.failed
    assert (tally.idle_closed, tally.retried, tally.told_close) == (1, 1, 1)


def test_a_long_request_that_was_read_in_part_is_lost() -> None:
    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(answer(right_for_upload(connection)))
        connection.recv(FIRST_PIECE, socket.MSG_WAITALL)
        connection.recv(1)  # the client knows that it has sent more than its first piece

    with server(serve) as address:
        tally = run(Plan(address, ("up",), 1, requests=2)).total
    assert tally.failed == {"reset": 1}
    assert tally.idle_closed == 0


def test_a_request_that_was_read_and_not_answered_is_lost() -> None:
    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(answer(right(asked(connection))))
        asked(connection)

    with server(serve) as address:
        tally = run(Plan(address, ("get",), 1, requests=4)).total
    assert tally.failed == {"reset": 2}
    assert {failure.who for failure in tally.failures} == {"1 a"}
    assert tally.idle_closed == 0


def test_who_closes_always_has_lost_the_request() -> None:
    """Nobody can be asked again for ever."""

    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(answer(right(asked(connection))))
        with contextlib.suppress(ConnectionError):
            connection.recv(1, socket.MSG_PEEK)

    with server(serve) as address:
        tally = run(Plan(address, ("get",), 1, requests=10)).total
    assert tally.ok == 10 or tally.failed == {"reset": 10 - tally.ok}
    assert tally.retried >= 9 - tally.failed_count


def test_what_is_pipelined_behind_a_close_is_asked_again() -> None:
    def serve(connection: socket.socket, number: int) -> None:
        for more in ("", "", CLOSE):
            connection.sendall(answer(right(asked(connection)), more=more))
        with contextlib.suppress(TimeoutError):  # an orderly close: what is unread would make it an RST
            connection.settimeout(0.05)
            while connection.recv(65536):
                pass

    with server(serve) as address:
        tally = run(Plan(address, ("pipelined",), 1, requests=8)).total
    assert not tally.failed
    assert tally.ok == 8
    assert tally.behind_close == 5 + 2


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, int]]:
    """Two addresses of a true server, and its pid."""
    path = tmp_path_factory.mktemp("site") / "s"
    port = free_port()
    command = [sys.executable, "-m", "procman.wsgi", "--no-access-log", "--threads=8", "numbered_site:app"]
    binds = [f"--bind=127.0.0.1:{port}", f"--bind=unix:{path}"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        [*command, *binds], cwd=PROJECT / "tests" / "sites", env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process.stderr:
        assert b"serving" in process.stderr.readline()
        yield f"127.0.0.1:{port}", f"unix:{path}", process.pid
        process.terminate()
        process.stderr.read()
    assert process.wait(40) == 0


ALL = tuple(f"{name}{how}" for name in MODES for how in ("", "/close"))


@pytest.mark.parametrize("kind", [0, 1], ids=["tcp", "unix"])
def test_every_mode_on_a_good_server(site: tuple[str, str, int], kind: int) -> None:
    with load(str(site[kind]), modes=ALL, connections=len(ALL)) as running:
        running.wait_for_pid(site[2])
        wait_until(lambda: running.progress["asked"] > 200, 20)
    assert sorted(running.result.modes) == sorted(ALL)
    for mode, tally in running.result.modes.items():
        assert not tally.failed, (mode, tally.failures)
        assert 0 < tally.ok == tally.requests
        assert 0 < tally.p50 <= tally.p99 <= tally.slowest
        assert tally.idle_closed == 0
        kept, at_once = mode_of(mode).keep, mode_of(mode).at_once
        if mode != "stream":  # waitress ends a connection after an answer without a length
            assert tally.connections == (1 if kept else tally.requests // at_once), mode
    assert running.result.pids == [site[2]]
    assert running.result.versions == ["0"]
    assert running.result.generations[f"{site[2]} 0"].answers == running.result.total.ok
    assert 0 < running.result.longest_gap < 5


def test_64_connections(site: tuple[str, str, int]) -> None:
    tally = run(Plan(site[0], ("get",), 64, requests=500)).total
    assert (tally.failed, tally.connections) == ({}, 64)


def test_the_plan_ends_by_itself(site: tuple[str, str, int]) -> None:
    assert run(Plan(site[0], connections=1, rate=5, limit=0.3)).total.requests in (1, 2, 3)
    with load(site[0], requests=10) as running:
        running.wait_for_end()
    assert running.result.total.requests >= 10
    with pytest.raises(RuntimeError, match="the load ended before: 1000000 answers"), load(site[0], requests=1) as over:
        over.wait(1000000)


def test_a_result_is_the_same_behind_json() -> None:
    tally = Tally(requests=1)
    tally.right(0.5)
    result = Result(1.0, 0.5, {"get": tally})
    there = Result.of(json.loads(json.dumps(result.document())))
    assert list(there.lines()) == list(result.lines())
    assert there.total.slowest == 0.5


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="unknown mode 'got': get, "):
        mode_of("got")
    assert not mode_of("up/close").keep


def test_the_command(site: tuple[str, str, int]) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "tests.loss", *words]
        return subprocess.run(whole, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    done = command("load", site[0], "--requests", "20", "--modes", "get,up/close", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["modes"]) == {"get", "up/close"}
    assert command("load", f"127.0.0.1:{free_port()}", "--requests", "1").returncode == 1
    assert "unknown mode" in command("load", site[0], "--modes", "got").stderr
    described = command("--help").stdout
    assert all(f"{kind} " in described for kind in KINDS)

"""The short form of `python -m tests.guarantees kill`, and of the load client that it stands on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from tests.guarantees.kill import Options, run
from tests.harness import free_port
from tests.load import Load, Plan, body
from tests.load import run as load


@pytest.mark.timeout(240)
def test_killed_again_and_again_under_load() -> None:
    """Slower than the long form, so that a busy machine is fast enough."""
    result = run(Options(seconds=6, connections=4, rate=10, megabytes=10, calibrate=2))
    assert not result.problems, "\n".join((*result.lines(), *result.problems))
    assert result.kills > 1
    assert result.supervisors == result.kills + 1
    assert result.files > 1, "the log was rotated meanwhile"


# --- a load client that sees no failure proves nothing ---------------------------------------------------------------


def answer(text: str, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{text}".encode()


def asked(request: bytes) -> int:
    return int(request.split(b" ")[1].rpartition(b"/")[2])


SERVED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("", lambda request: answer(body(asked(request)))),
    ("wrong", lambda request: answer(body(asked(request) + 1))),
    ("wrong", lambda request: answer("sorry", "503 Service Unavailable")),
    ("wrong", lambda request: b"nonsense\r\n\r\n"),
    ("short", lambda request: answer(body(asked(request))[:-1], length=len(body(asked(request))))),
    ("reset", lambda request: b""),
]


@pytest.mark.parametrize(("kind", "serve"), SERVED)
def test_each_failure_is_seen_and_named(kind: str, serve: Callable[[bytes], bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run_server() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if request := connection.recv(4096):
                        connection.sendall(serve(request))

        thread = threading.Thread(target=run_server)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        tally = load(Plan(url, connections=2, rate=20, limit=0.5), threading.Event())
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert tally.requests > 0
    assert tally.failed == ({kind: tally.requests} if kind else {}), tally.failures
    assert len(tally.failures) == min(50, sum(tally.failed.values()))


def test_nobody_there_is_refused() -> None:
    tally = load(Plan(f"http://127.0.0.1:{free_port()}", connections=2, rate=20, limit=0.2), threading.Event())
    assert tally.requests > 0
    assert tally.failed == {"refused": tally.requests}


def test_an_answer_that_does_not_come_is_slow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        tally = load(Plan(url, connections=1, patience=0.2, limit=0.1), threading.Event())
    assert tally.failed == {"slow": tally.requests}


def test_a_load_in_a_process_of_its_own_tells_what_it_saw() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        with Load(f"http://127.0.0.1:{server.getsockname()[1]}", connections=1, rate=50) as running:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(answer(body(asked(connection.recv(4096)))))
            server.close()  # what comes now is refused
    assert running.tally.requests >= 3
    assert set(running.tally.failed) <= {"refused", "reset"}
    assert running.tally.requests - sum(running.tally.failed.values()) == 3

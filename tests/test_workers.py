"""workers.py: asking sockets of servers that say nothing, too much, or are somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from procman import workers
from procman.errors import Failed

Play = Callable[[socket.socket], object]
Stage = Callable[[Play | None], str]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Listens at a path; each client gets what the play gives. None: nobody accepts."""
    with contextlib.ExitStack() as stack:

        def begin(play: Play | None) -> str:
            path = str(tmp_path / "s")
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(1)
            if play is not None:
                thread = threading.Thread(target=one_client, args=(listener, play))
                thread.start()
                stack.callback(thread.join, 10)
            return path

        yield begin


def one_client(listener: socket.socket, play: Play) -> None:
    client, _ = listener.accept()
    client.settimeout(10)
    with client, contextlib.suppress(OSError):
        play(client)


def ask(server: str, where: str, uid: int | None = None) -> bytes:
    return asyncio.run(workers.ask(server, where, os.geteuid() if uid is None else uid))


def problem(server: str, where: str, uid: int | None = None) -> str:
    begun = time.monotonic()
    with pytest.raises(Failed) as caught:
        ask(server, where, uid)
    assert time.monotonic() - begun < workers.ANSWER_SECONDS + 2
    return str(caught.value)


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def test_all_until_the_end(stage: Stage) -> None:
    def in_pieces(client: socket.socket) -> None:
        client.sendall(b'{"a":')
        client.sendall(b" 1}")

    assert ask("uwsgi", stage(in_pieces)) == b'{"a": 1}'


def test_uwsgi_with_stats_http(stage: Stage) -> None:
    asked = []

    def answer(client: socket.socket) -> None:
        asked.append(client.recv(1000))
        client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}")

    assert ask("uwsgi", "http:" + stage(answer)) == b"{}"
    assert asked == [b"GET / HTTP/1.0\r\n\r\n"]


def test_gunicorn_is_asked_and_keeps_the_connection_open(stage: Stage) -> None:
    asked = []

    def answer(client: socket.socket) -> None:
        for number in (b"1", b"2"):
            asked.append(client.recv(1000))
            client.sendall(framed(number))
        client.recv(1)

    assert ask("gunicorn", stage(answer)) == b"[1,2]"
    assert asked == [framed(b'{"id":1,"command":"show workers"}'), framed(b'{"id":2,"command":"show config"}')]


def after_the_question(answer: bytes) -> Play:
    def play(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(answer)

    return play


def drip(client: socket.socket) -> None:
    while True:
        client.sendall(b" ")
        time.sleep(0.05)


def flood(client: socket.socket) -> None:
    while True:
        client.sendall(b" " * 65536)


SILENT: list[tuple[str, str, Play | None, str]] = [
    ("nobody accepts", "uwsgi", None, "no answer within 1 s"),
    ("nobody accepts gunicorn's", "gunicorn", None, "no answer within 1 s"),
    ("it says nothing", "wsgi", lambda client: client.recv(1), "no answer within 1 s"),
    ("it says a byte now and then", "uwsgi", drip, "no answer within 1 s"),
    ("it never stops", "uwsgi", flood, "its answer is too long"),
    ("gunicorn announces too much", "gunicorn", after_the_question(b"\xff" * 4), "its answer is too long"),
    ("gunicorn breaks off", "gunicorn", after_the_question(struct.pack(">I", 9) + b"{"), "it broke off its answer"),
    ("gunicorn goes at once", "gunicorn", after_the_question(b""), "it broke off its answer"),
]


@pytest.mark.parametrize(("server", "play", "words"), [row[1:] for row in SILENT], ids=[row[0] for row in SILENT])
def test_no_answer(stage: Stage, server: str, play: Play | None, words: str) -> None:
    assert problem(server, stage(play)) == words


def test_a_backlog_that_is_full(stage: Stage) -> None:
    path = stage(None)
    with contextlib.ExitStack() as clients:
        with contextlib.suppress(BlockingIOError):
            while True:
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        assert problem("uwsgi", path) == "no answer: others wait for one already"


def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert problem("uwsgi", str(path)).startswith("its socket is not there")
    path.touch()
    assert problem("uwsgi", str(path)) == "can't ask it: Connection refused"
    path.unlink()
    path.symlink_to(path)
    assert problem("uwsgi", str(path)).startswith("can't ask it: Too many levels")


def test_another_user_is_not_asked(stage: Stage) -> None:
    asked = []
    path = stage(lambda client: asked.append(client.recv(100)))
    assert problem("gunicorn", path, uid=os.geteuid() + 1) == f"another user (uid {os.geteuid()}) listens in its place"
    assert asked in ([], [b""])


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=one_client, args=(listener, lambda client: client.sendall(b"{}")))
        thread.start()
        port = listener.getsockname()[1]
        assert ask("uwsgi", f":{port}") == b"{}"
        thread.join(10)
    assert problem("uwsgi", f"127.0.0.1:{port}") == "can't ask it: Connection refused"

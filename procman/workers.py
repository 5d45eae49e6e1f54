"""Asking an application server for its workers: gunicorn's control socket, uWSGI's stats, the built-in server's own.

It knows how to ask, and not what the answer means (`workload`). A server is not trusted: it may say nothing, or say
much, or not be there, and its socket lies in a folder of its user, who may have put anything in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

from procman.errors import Failed

ANSWER_SECONDS = 1.0
"""How long a server may take."""

ANSWER_MAX = 1 << 20
"""Bytes of an answer: of uWSGI with 1,000 workers some 600,000."""

_CHUNK = 1 << 16
_QUESTIONS = (b'{"id":1,"command":"show workers"}', b'{"id":2,"command":"show config"}')
_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
_ANY_HOST = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1"}


async def ask(server: str, where: str, uid: int) -> bytes:
    """The answer of a server at `where` (`servers.told_at`), as it came. Raises Failed, in words, after ANSWER_SECONDS
    at the latest. At a path only an answer of the user `uid` counts."""
    place = where.removeprefix("http:")
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await _connect(place, uid)
            try:
                if server == "gunicorn":
                    return await _gunicorn(reader, writer)
                if place != where:
                    writer.write(_REQUEST)
                return await _all(reader)
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise Failed(f"no answer within {ANSWER_SECONDS:g} s") from None
    except asyncio.IncompleteReadError:
        raise Failed("it broke off its answer") from None
    except FileNotFoundError:
        raise Failed("its socket is not there: it has not made it yet, or an earlier procman started it") from None
    except OSError as error:
        raise Failed(f"can't ask it: {os.strerror(error.errno) if error.errno else error}") from None


async def _connect(where: str, uid: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not where.startswith("/"):
        host, _, port = where.rpartition(":")
        return await asyncio.open_connection(_ANY_HOST.get(host, host), int(port))
    with contextlib.ExitStack() as unless_connected:
        sock = unless_connected.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.setblocking(False)
        try:
            sock.connect(where)  # at once, or never: connect(2)
        except BlockingIOError:
            raise Failed("no answer: others wait for one already") from None
        _, owner, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if owner != uid:
            raise Failed(f"another user (uid {owner}) listens in its place")
        streams = await asyncio.open_unix_connection(sock=sock)
        unless_connected.pop_all()
    return streams


async def _gunicorn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """4 bytes of length, big-endian, then JSON, both ways. What it answers to each question, as one array."""
    answers = []
    for question in _QUESTIONS:
        writer.write(struct.pack(">I", len(question)) + question)
        size: int = struct.unpack(">I", await reader.readexactly(4))[0]
        if size > ANSWER_MAX:
            raise Failed("its answer is too long")
        answers.append(await reader.readexactly(size))
    return b"[" + b",".join(answers) + b"]"


async def _all(reader: asyncio.StreamReader) -> bytes:
    """All until the end, without the head of an answer over HTTP."""
    data = bytearray()
    while chunk := await reader.read(_CHUNK):
        data += chunk
        if len(data) > ANSWER_MAX:
            raise Failed("its answer is too long")
    if data.startswith(b"HTTP/"):
        return bytes(data.partition(b"\r\n\r\n")[2])
    return bytes(data)

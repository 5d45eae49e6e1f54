"""A site whose every answer is known beforehand, and tells who gave it: `app` for WSGI, `asgi` for ASGI. No framework.

    /n/NUMBER?size=BYTES&work=MILLISECONDS&stream=1

The answer is `body(NUMBER, what was uploaded, BYTES)`, `work` milliseconds later; with `stream` in pieces and without a
Content-Length. The header X-Who says "PID VERSION". The environment may name two files:

VERSION_FILE  what it holds at the import is the VERSION, else 0; BROKEN can't be imported
IMPORT_GATE   the import waits for this file, for up to a minute
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

WHO = "X-Who"
BROKEN = "broken"
PIECE = 65536


def body(number: int, uploaded: bytes, size: int) -> bytes:
    """The right answer: at least `size` bytes, and all of them tell of the number and of what was uploaded."""
    line = b"%d %d %08x\n" % (number, len(uploaded), zlib.crc32(uploaded))
    return (line * (1 + size // len(line)))[: max(size, len(line))]


def _version() -> str:
    gate = os.environ.get("IMPORT_GATE")
    end = time.monotonic() + 60
    while gate and not Path(gate).exists() and time.monotonic() < end:
        time.sleep(0.01)
    file = os.environ.get("VERSION_FILE")
    version = Path(file).read_text().strip() if file else "0"
    if version == BROKEN:
        raise RuntimeError("this release is broken")
    return version


VERSION = _version()


class Asked:
    """What a request asks for."""

    def __init__(self, path: str, query: str) -> None:
        found = parse_qs(query)
        self.number = int(path.rpartition("/")[2] or 0)
        self.size, self.work, self.stream = (int(found.get(key, ["0"])[0]) for key in ("size", "work", "stream"))

    def pieces(self, uploaded: bytes) -> tuple[list[tuple[str, str]], list[bytes]]:
        """The headers of the answer and its body."""
        whole = body(self.number, uploaded, self.size)
        headers = [("Content-Type", "text/plain"), (WHO, f"{os.getpid()} {VERSION}")]
        if not self.stream:
            return [*headers, ("Content-Length", str(len(whole)))], [whole]
        return headers, [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The WSGI application."""
    asked = Asked(environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
    uploaded = b""
    if environ.get("CONTENT_LENGTH"):
        uploaded = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    elif environ.get("wsgi.input_terminated"):
        uploaded = environ["wsgi.input"].read()
    if asked.work:
        time.sleep(asked.work / 1000)
    headers, pieces = asked.pieces(uploaded)
    start_response("200 OK", headers)
    return pieces


Message = dict[str, Any]


async def asgi(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        while (kind := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{kind}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    asked = Asked(scope["path"], scope["query_string"].decode())
    uploaded, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        uploaded += message.get("body", b"")
        more = message.get("more_body", False)
    if asked.work:
        await asyncio.sleep(asked.work / 1000)
    headers, pieces = asked.pieces(uploaded)
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": 200, "headers": encoded})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})

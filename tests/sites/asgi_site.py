"""A plain ASGI application for the real servers, with the same addresses as flask_site. What begins with /n/ is
numbered_site's.

IMPORT_MARK  a file to make when the import begins
IMPORT_GATE  a file to wait for before the import goes on, for up to a minute
LIFESPAN     "fail": the start of the application fails; a path: a file that its end makes
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

if "IMPORT_MARK" in os.environ:
    Path(os.environ["IMPORT_MARK"]).touch()
if "IMPORT_GATE" in os.environ:
    for _ in range(6000):
        if Path(os.environ["IMPORT_GATE"]).exists():
            break
        time.sleep(0.01)
    else:
        raise TimeoutError(os.environ["IMPORT_GATE"])

# Behind the gate, and as the servers see it: from its own folder.
import numbered_site  # type: ignore[import-not-found]  # noqa: E402


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    if scope["type"] == "websocket":
        await _websocket(receive, send)
        return
    if scope["path"].removeprefix(scope.get("root_path", "")).startswith("/n/"):
        await numbered_site.asgi(scope, receive, send)
        return
    query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode()).items()}
    if scope["path"].endswith("/stream"):
        await _stream(send, float(query["s"]))
        return
    status, text = await _answer(scope, query)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


async def rsgi(scope: Any, protocol: Any) -> None:
    """The first page by granian's own interface."""
    protocol.response_str(200, [("content-type", "text/plain")], "asgi\n")


class Site:
    """For "asgi_site:Site.app"."""

    app = staticmethod(app)


def make() -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """For "asgi_site:make()"."""
    return app


async def _lifespan(receive: Receive, send: Send) -> None:
    wanted = os.environ.get("LIFESPAN", "")
    await receive()
    if wanted == "fail":
        await send({"type": "lifespan.startup.failed", "message": "no database"})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if wanted:
        Path(wanted).touch()
    await send({"type": "lifespan.shutdown.complete"})


async def _stream(send: Send, seconds: float) -> None:
    """An answer in two parts."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"begun\n", "more_body": True})
    await asyncio.sleep(seconds)
    await send({"type": "http.response.body", "body": b"ended\n"})


async def _websocket(receive: Receive, send: Send) -> None:
    """Says whether its end was told to it, and how."""
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": event["text"]})
    sys.stdout.write(f"websocket ended by {event['code']}\n")
    sys.stdout.flush()


async def _answer(scope: Scope, query: dict[str, str]) -> tuple[int, str]:
    first = scope["path"].removeprefix(scope.get("root_path", "")).split("/")[1]
    match first:
        case "":
            return 200, "asgi\n"
        case "slow":
            if "mark" in query:
                Path(query["mark"]).touch()
            await asyncio.sleep(float(query.get("s", "1")))
            return 200, "slept\n"
        case "pid":
            return 200, f"{os.getpid()}\n"
        case "env":
            return 200, json.dumps(dict(os.environ))
        case "scope":
            return 200, json.dumps({name: scope.get(name) for name in ("client", "root_path")})
    return 404, "nothing\n"

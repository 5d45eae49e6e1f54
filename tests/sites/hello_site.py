"""The least that a WSGI application can do, so that a benchmark measures the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

HELLO = b"hello, world\n"


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(HELLO)))])
    return [HELLO]

"""The demo's site: a WSGI application without a framework. It says which process has answered."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

answered = count(1)
longest = 30.0  # seconds that /slow waits at most


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """`/` says who answers; `/slow?seconds=3` answers late, to see that a restart waits for it."""
    path = environ["PATH_INFO"]
    if path == "/slow":
        time.sleep(_seconds(environ["QUERY_STRING"]))
    elif path != "/":
        return _answer(start_response, "404 Not Found", f"There is no {path} here.\n")
    process = os.environ.get("PROCMAN_PROCESS", "hello")
    return _answer(start_response, "200 OK", f"Hello from {process} (pid {os.getpid()}), answer {next(answered)}.\n")


def _seconds(query: str) -> float:
    """What `?seconds=` asks for, within bounds; 1 when it is no number."""
    try:
        return max(0.0, min(longest, float(parse_qs(query)["seconds"][0])))
    except (KeyError, ValueError):
        return 1.0


def _answer(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    body = text.encode()
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]

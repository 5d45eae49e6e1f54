"""A real Flask application for the real servers. Its environment makes the import slow, requests make the answer slow.
What begins with /n/ is numbered_site's.

IMPORT_MARK  a file to make when the import begins
IMPORT_GATE  a file to wait for before the import goes on, for up to a minute
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

StartResponse = Callable[..., Any]

if "IMPORT_MARK" in os.environ:
    Path(os.environ["IMPORT_MARK"]).touch()
if "IMPORT_GATE" in os.environ:
    for _ in range(6000):
        try:
            if Path(os.environ["IMPORT_GATE"]).exists():
                break
            time.sleep(0.01)
        except KeyboardInterrupt:
            pass  # like an import with a bare `except`: a stop must end it all the same
    else:
        raise TimeoutError(os.environ["IMPORT_GATE"])

# Behind the gate, and as the servers see it: from its own folder.
import numbered_site  # type: ignore[import-not-found]  # noqa: E402

app = Flask(__name__)
flask = app.wsgi_app


def numbered_or_flask(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    site = numbered_site.app if environ["PATH_INFO"].startswith("/n/") else flask
    answer: Iterable[bytes] = site(environ, start_response)
    return answer


app.wsgi_app = numbered_or_flask  # type: ignore[method-assign]


def make() -> Flask:
    """For "flask_site:make()"."""
    return app


@app.get("/")
def index() -> ResponseReturnValue:
    return "flask\n"


@app.get("/slow")
def slow() -> ResponseReturnValue:
    """Takes `s` seconds; makes the file `mark` when it begins."""
    if "mark" in request.args:
        Path(request.args["mark"]).touch()
    time.sleep(float(request.args.get("s", "1")))
    return "slept\n"


@app.get("/together")
def together() -> ResponseReturnValue:
    """200 when `n` of these requests, each with its own `mark` in the folder `at`, are worked on at one time."""
    folder, wanted = Path(request.args["at"]), int(request.args["n"])
    (folder / request.args["mark"]).touch()
    end = time.monotonic() + 10
    while len(list(folder.iterdir())) < wanted:
        if time.monotonic() > end:
            return "alone\n", 503
        time.sleep(0.01)
    return "together\n"


@app.get("/pid")
def pid() -> ResponseReturnValue:
    return f"{os.getpid()}\n"


@app.get("/env")
def env() -> ResponseReturnValue:
    return jsonify(dict(os.environ))

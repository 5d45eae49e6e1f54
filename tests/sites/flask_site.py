"""A real Flask application for the real servers. Its environment makes the import slow, requests make the answer slow.

IMPORT_MARK  a file to make when the import begins
IMPORT_GATE  a file to wait for before the import goes on, for up to a minute
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

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

app = Flask(__name__)


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

"""What the presets of servers are made of: what the table says (`Request`), what comes of it (`Plan`), and the tools to
get from one to the other. `servers` and `asgi` hold the presets themselves.

Pure. It must not know any one server.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from procman.config import Listener, Ready
from procman.records import dataclass

# Seconds that a server gives its requests on a stop where the user says nothing (gunicorn's own default), and how long
# after that it may take to end before SIGKILL.
GRACE = 30.0
MARGIN = 5.0


class BadOption(Exception):
    """The server can't take this. `key` is relative to the program ("server_options.bind"), `message` says why."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the table says about one program that has a `server`.

    `name` is the process ("blog:2"), `program` the table's name. `workers` and `threads` are 0 where the user gives
    none, and `stop_timeout` (seconds) is None. `middleware` and `access_log` count for "wsgi" only. `python` is the
    daemon's interpreter, `wsgi_script` the path of procman/wsgi.py, `site` the folder that holds waitress, and
    `runtime_dir` the folder of the daemon's socket. `reload_signal` is the number in `reload = "signal:X"`, else 0.
    `ready_given`: the user says himself how readiness shows. `scaled`: their number goes by the accept queue.
    """

    server: str
    name: str
    program: str
    instance: int
    app: str
    workers: int
    threads: int
    listen: tuple[Listener, ...]
    options: Mapping[str, object]
    middleware: tuple[str, ...]
    access_log: bool
    virtualenv: str
    python: str
    wsgi_script: str
    site: str
    runtime_dir: str
    stop_timeout: float | None
    reload_signal: int = 0
    ready_given: bool = False
    scaled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to run it.

    `stop_timeout` is in seconds. `notify`: it needs NOTIFY_SOCKET. `processes`: how many of them procman runs and
    watches itself, more than one only for "wsgi".
    """

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    stop_signal: int
    stop_timeout: float
    ready: Ready
    notify: bool
    processes: int


def owned(reasons: Mapping[str, str]) -> dict[str, str]:
    """{reason: "option option ..."} → {option: reason}."""
    return {option: reason for reason, options in reasons.items() for option in options.split()}


# What an option that procman answers for gets as its answer, whatever the server.
LISTEN = "procman holds the sockets: use the key listen"
BACKLOG = "procman holds the sockets: use backlog of the [listener] table"
REUSE_PORT = "procman holds the sockets: use reuse_port of the [listener] table"
PARENT = "procman must be the parent of the server"
PID_FILE = "procman knows the process without a pid file"
RELOADER = "its reloader ends the old server before it knows whether the new code can be imported: use procmanctl"

_NAME = r"[^\W\d]\w*"
_APP = re.compile(rf"{_NAME}(\.{_NAME})*:(?P<attribute>{_NAME}(\.{_NAME})*)(\(\))?")
_OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# These resolve one name after the colon only.
_NO_DOTS = ("gunicorn", "uwsgi")


def check(request: Request) -> None:
    """What holds for every server."""
    app = _APP.fullmatch(request.app)
    if app is None:
        raise BadOption("app", f'expected "MODULE:CALLABLE" or "MODULE:FACTORY()", got {request.app!r}')
    if request.server in _NO_DOTS and "." in app["attribute"]:
        raise BadOption("app", f"{request.server} takes no dots after the colon; the built-in server does")
    if not request.listen:
        raise BadOption("listen", "a server needs at least one listener or address")
    for key, count in (("workers", request.workers), ("threads", request.threads)):
        if count < 0:
            raise BadOption(key, "expected a number above 0")


def python(request: Request) -> str:
    """The interpreter that runs a server which is a module of Python."""
    return f"{request.virtualenv}/bin/python" if request.virtualenv else request.python


def is_factory(request: Request) -> bool:
    """Whether the app has to be called to get the application."""
    return request.app.endswith("()")


def counts(request: Request, workers: str, threads: str) -> list[str]:
    """The keys `workers` and `threads` as options; an empty name leaves one out."""
    argv = []
    if request.workers and workers:
        argv.append(f"{workers}={request.workers}")
    if request.threads:
        argv.append(f"{threads}={request.threads}")
    return argv


def first_answer(request: Request) -> Ready:
    """A worker serves once it answers anything. A connection alone proves nothing: procman holds the socket."""
    return Ready(kind="http", address=request.listen[0].address, path="/", any_status=True)


def graceful(request: Request, option: str) -> tuple[float, float]:
    """(seconds that the server gives its requests, seconds until SIGKILL): the second is always above the first."""
    given = request.options.get(option)
    if given is None:
        if request.stop_timeout is None:
            return GRACE, GRACE + MARGIN
        return request.stop_timeout - min(MARGIN, request.stop_timeout / 2), request.stop_timeout
    own = seconds(option, given)
    if request.stop_timeout is None:
        return own, own + MARGIN
    if request.stop_timeout <= own:
        raise BadOption("stop_timeout", f"{request.stop_timeout:g} s is not above the server's {option} of {own:g} s")
    return own, request.stop_timeout


def whole_seconds(request: Request, option: str) -> tuple[int, float]:
    """Like `graceful`, for a server that takes whole seconds only, at least 1."""
    grace, stop_timeout = graceful(request, option)
    if option in request.options and (grace < 1 or grace != int(grace)):
        raise BadOption(f"server_options.{option}", f"{request.server} takes whole seconds only, at least 1")
    if grace < 1:
        why = f"{request.server} needs more: its own timeout is whole seconds, and must be shorter"
        raise BadOption("stop_timeout", why)
    return int(grace), stop_timeout


def seconds(option: str, value: object) -> float:
    """An option of the server that is a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise BadOption(f"server_options.{option}", "expected a number of seconds")
    return value


def long_options(
    options: Mapping[str, object],
    owned: Mapping[str, str],
    *,
    underscored: Collection[str] = (),
    pairs: Collection[str] = (),
    words: Collection[str] = (),
) -> Iterator[str]:
    """The server's own long options: `{"max-requests": 1000, "preload": True}` → --max-requests=1000 --preload.

    `owned` are those that procman answers for, with the reason. Of the others, `underscored` have an underscore in
    their name, `pairs` have a twin for false (--no-NAME), and `words` take true and false as a word.
    """
    for name, value in options.items():
        key = f"server_options.{name}"
        if name.startswith("-"):
            raise BadOption(key, f"write it without dashes: {name.lstrip('-')!r}")
        if not _OPTION.fullmatch(name):
            raise BadOption(key, "not the name of an option")
        hyphened = name.replace("_", "-")
        positive = name.removeprefix("no-")
        if name not in underscored and (name in owned or hyphened in owned):
            raise BadOption(key, owned.get(name) or owned[hyphened])
        if "_" in name and name not in underscored:
            raise BadOption(key, f"the server's own spelling is {hyphened!r}")
        if positive != name and positive in pairs:
            raise BadOption(key, f"write {positive} = {'false' if value is True else 'true'}")
        if not isinstance(value, bool):
            yield from (f"--{name}={text}" for text in texts(key, value))
        elif name in words:
            yield f"--{name}={'true' if value else 'false'}"
        elif value:
            yield f"--{name}"
        elif name in pairs:
            yield f"--no-{name}"


def texts(key: str, value: object) -> list[str]:
    """A string or a number, or a list of them, as words of an argv."""
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise BadOption(key, "expected a string, a number, true, false, or a list of strings and numbers")
        if isinstance(item, str) and "\0" in item:
            raise BadOption(key, "a NUL character can't be passed to a program")
    return [str(item) for item in items]


def one_of(names: Sequence[str]) -> str:
    """They in words."""
    return ", ".join(repr(name) for name in names[:-1]) + f" or {names[-1]!r}"

"""How each application server is run: a program's `server`, `app` and `server_options` become an argv and its rules.

Pure. It must not know the program table's syntax, the file system, or who starts the process. What it says about
gunicorn and uWSGI comes from their sources and is held by tests/test_real_servers.py, which runs them; docs/servers.md
is the user's side of it.

All of them get their listening sockets by LISTEN_FDS (sd_listen_fds(3)), so no plan names an address to bind.
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from procman.config import Address, Listener, Ready

SERVERS = ("wsgi", "gunicorn", "uwsgi")

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


def plan(request: Request) -> Plan:
    """The way to run `request`. Raises BadOption for the first key that its server can't take."""
    planner = _PLANNERS.get(request.server)
    if planner is None:
        raise BadOption("server", f"unknown server {request.server!r}: expected {_one_of(SERVERS)}")
    _check(request)
    return planner(request)


TELLING = {"wsgi": "--stats=", "gunicorn": "--control-socket=", "uwsgi": "--stats="}
"""The servers that tell of their workers, each with the option that says where: see `told_at`."""

SOCKET_PATH_MAX = 107
"""Bytes of the path of a Unix socket (unix(7))."""


def control_socket(runtime_dir: str, name: str, server: str = "gunicorn") -> str:
    """Where the server of process `name` makes the socket on which it tells of its workers.

    Its folder is for this process alone. The server can't make it under another account: the daemon makes it and gives
    it to that account. (Without it the readiness of a gunicorn never shows, and uWSGI does not start.)
    """
    return f"{runtime_dir}/{name}.{server}/ctl"


def told_at(server: str, argv: Sequence[str]) -> str:
    """Where a child with this argv tells of its workers: the path of a Unix socket, or HOST:PORT, after "http:" where
    it wants to hear an HTTP request first. "" is nowhere."""
    option = TELLING.get(server)
    found = (word.removeprefix(option) for word in argv if option and word.startswith(option))
    where = next(found, "")
    return f"http:{where}" if where and "--stats-http" in argv else where


def _owned(reasons: Mapping[str, str]) -> dict[str, str]:
    """{reason: "option option ..."} → {option: reason}."""
    return {option: reason for reason, options in reasons.items() for option in options.split()}


# What an option that procman answers for gets as its answer, whatever the server.
_LISTEN = "procman holds the sockets: use the key listen"
_BACKLOG = "procman holds the sockets: use backlog of the [listener] table"
_REUSE_PORT = "procman holds the sockets: use reuse_port of the [listener] table"
_PARENT = "procman must be the parent of the server"
_PID_FILE = "procman knows the process without a pid file"


# --- gunicorn (25.1 and newer; read: 27.0.1) ------------------------------------------------------------------------

_GUNICORN_OWNED = _owned(
    {
        _LISTEN: "bind",
        _BACKLOG: "backlog",
        _REUSE_PORT: "reuse-port",
        _PARENT: "daemon",
        _PID_FILE: "pid",
        "use the key workers": "workers",
        "use the key threads": "threads",
        "use the key directory": "chdir",
        "use the key user": "user initgroups",
        "use the key group": "group",
        "use the key umask": "umask",
        "gunicorn would exit at once": "check-config print-config help version",
    }
)


def _gunicorn(request: Request) -> Plan:
    """TERM gives the workers `graceful-timeout` to end their requests. gunicorn says READY=1 before it forks its first
    worker, so its control socket is asked instead: it knows when a worker has sent a heartbeat."""
    options = dict(request.options)
    grace, stop_timeout = _graceful(request, "graceful-timeout")
    if "graceful-timeout" in options and (grace < 1 or grace != int(grace)):
        raise BadOption("server_options.graceful-timeout", "gunicorn takes whole seconds only, at least 1")
    if grace < 1:
        raise BadOption("stop_timeout", "gunicorn needs more: its own timeout is whole seconds, and must be shorter")
    options["graceful-timeout"] = int(grace)
    wanted = options.pop("control-socket", True)
    if not isinstance(wanted, bool):
        message = "procman gives each gunicorn its own; false is for a gunicorn older than 25.1, which has none"
        raise BadOption("server_options.control-socket", message)
    argv = [_python(request), "-m", "gunicorn"]
    if wanted and not options.get("no-control-socket"):
        path = control_socket(request.runtime_dir, request.name)
        argv.append(f"--control-socket={path}")
        ready = Ready(kind="gunicorn", address=Address("unix", path=path))
    else:
        for option in ("certfile", "protocol"):
            if options.get(option, "http") != "http":
                message = f"without a control socket procman asks over plain HTTP, which {option} rules out"
                raise BadOption(f"server_options.{option}", message)
        ready = _first_answer(request)
    argv += _counts(request, "--workers", "--threads")
    argv += _long_options(options, _GUNICORN_OWNED)
    argv.append(request.app)
    return Plan(
        argv=tuple(argv),
        stop_signal=signal.SIGTERM,
        stop_timeout=stop_timeout,
        ready=ready,
        notify=False,
        processes=1,
    )


# --- uWSGI (read: 2.0.31; run: pyuwsgi 2.0.30, uWSGI 2.0.31) --------------------------------------------------------

_UWSGI_OWNED = _owned(
    {
        _LISTEN: """socket uwsgi-socket suwsgi-socket ssl-socket http-socket http11-socket https-socket fastcgi-socket
            fastcgi-nph-socket scgi-socket scgi-nph-socket raw-socket puwsgi-socket abstract-socket shared-socket
            undeferred-shared-socket zerg http http-router https https2""",
        _BACKLOG: "listen",
        _REUSE_PORT: "reuse-port",
        _PARENT: "daemonize daemonize2",
        _PID_FILE: "pidfile pidfile2 safe-pidfile safe-pidfile2",
        "use the key app": "module wsgi wsgi-file file callable",
        "use the key workers": "processes workers",
        "use the key threads": "threads",
        "use the key directory": "chdir force-cwd",
        "use the key user": "uid immediate-uid",
        "use the key group": "gid immediate-gid add-gid",
        "use the key umask": "umask",
        "procman sets it itself: readiness depends on it": "master need-app",
        "procman says itself what each signal does": "die-on-term",
        "it unlinks unix sockets, and they are procman's": "vacuum",
        "make each of its instances a program of its own": "emperor zerg-server",
        "use lazy-apps: uWSGI itself advises against lazy": "lazy",
    }
)

# Not "http11": it keeps a connection open even when the client says `Connection: close` (2.0.31).
_UWSGI_PROTOCOLS = ("http", "uwsgi", "fastcgi", "scgi")

# uWSGI knows the options of a plugin only after the plugin is loaded: these go first.
_UWSGI_FIRST = ("plugins-dir", "plugin-dir", "plugins", "plugin", "need-plugins", "need-plugin")

# uWSGI has no signal for a graceful stop, but hooks make one of SIGINT. (Not of SIGTERM: uWSGI ignores that while it
# reads its options, so a stop in these milliseconds would be lost.) What it means in each phase, found by stops at
# random moments of a start:
_UWSGI_STOP = (
    # The master loads the application: exit. Twice, because in the uWSGI binary Python puts its own between the two.
    "--hook-asap=unix_signal:2 _exit",
    "--hook-pre-app=unix_signal:2 _exit",
    # Workers are there: the master tells them to finish, by SIGHUP, waits for them without any limit, and exits 0.
    "--hook-master-start=unix_signal:2 gracefully_kill_them_all",
    # A worker that does not serve yet would ignore that SIGHUP, and the master wait for it forever: exit. Once for what
    # a worker inherits from the start, once for what a later one inherits from the running master.
    "--hook-asap=unix_signal:1 _exit",
    "--hook-post-fork=unix_signal:1 _exit",
    # SIGTERM by hand is a fast stop. Without this it is a reload, which can't work: see `reload` below.
    "--die-on-term",
)


def _uwsgi(request: Request) -> Plan:
    """READY=1 is the truth, unless the workers import the application (lazy-apps): then the first answer is."""
    options = dict(request.options)
    stats = _uwsgi_stats(request, options)
    if request.virtualenv:
        for option in ("virtualenv", "venv", "home", "pyhome"):
            if option in options:
                raise BadOption(f"server_options.{option}", "the key virtualenv says it already")
    if request.reload_signal == signal.SIGHUP:
        raise BadOption("reload", 'uWSGI executes itself anew on SIGHUP, and finds no socket any more: use "restart"')
    lazy = bool(options.get("lazy-apps"))
    protocol = options.pop("protocol", "http")
    if protocol not in _UWSGI_PROTOCOLS:
        raise BadOption("server_options.protocol", f"expected {_one_of(_UWSGI_PROTOCOLS)}")
    if lazy and protocol != "http":
        message = f"with protocol {protocol!r} procman can't see when a worker has imported the application"
        raise BadOption("server_options.lazy-apps", message)
    first = {name: options.pop(name) for name in _UWSGI_FIRST if name in options}
    argv = [f"{request.virtualenv}/bin/uwsgi" if request.virtualenv else "uwsgi"]
    argv += _long_options(first, {})
    if request.virtualenv:
        argv.append(f"--virtualenv={request.virtualenv}")
    argv += ["--master", "--need-app", f"--protocol={protocol}", *_UWSGI_STOP, *stats]
    argv += _counts(request, "--processes", "--threads")
    if request.threads > 1:
        argv.append("--enable-threads")
    argv += _long_options(options, _UWSGI_OWNED)
    argv.append(f"--module={request.app}")
    return Plan(
        argv=tuple(argv),
        stop_signal=signal.SIGINT,
        stop_timeout=GRACE + MARGIN if request.stop_timeout is None else request.stop_timeout,
        ready=_first_answer(request) if lazy else Ready(kind="notify"),
        notify=not lazy,
        processes=1,
    )


def _uwsgi_stats(request: Request, options: dict[str, object]) -> list[str]:
    """Where it tells of its workers: it has only one such place, so one that the user names is read there. Takes what
    is about it out of `options`."""
    for name in ("stats", "stats-server"):
        value = options.pop(name, True)
        if isinstance(value, str) and _STATS.fullmatch(value):
            return [f"--stats={value}"]
        if not isinstance(value, bool):
            message = "procman asks there too, so it must be HOST:PORT or an absolute path; false is for none"
            raise BadOption(f"server_options.{name}", message)
        if not value:
            return []
    return _own_stats(request)


def _own_stats(request: Request) -> list[str]:
    """A socket of its own, where its path is not too long for one."""
    path = control_socket(request.runtime_dir, request.name, request.server)
    return [f"--stats={path}"] if len(path.encode()) <= SOCKET_PATH_MAX else []


# --- the built-in server (waitress underneath) ----------------------------------------------------------------------

_WAITRESS_OWNED = _owned(
    {
        _LISTEN: "host port ipv4 ipv6 listen sockets unix_socket unix_socket_perms",
        _BACKLOG: "backlog",
        "use the key threads": "threads",
    }
)

# What procman.wsgi takes by --set; a test compares them with the installed waitress.
_WAITRESS = """trusted_proxy trusted_proxy_count trusted_proxy_headers log_untrusted_proxy_headers
    clear_untrusted_proxy_headers url_scheme url_prefix recv_bytes send_bytes outbuf_overflow outbuf_high_watermark
    inbuf_overflow connection_limit cleanup_interval channel_timeout log_socket_errors max_request_header_size
    max_request_body_size expose_tracebacks ident channel_request_lookahead server_name"""
WAITRESS_OPTIONS = tuple(_WAITRESS.split())


def _wsgi(request: Request) -> Plan:
    """One process for each worker, all on the same sockets. With a virtualenv the script runs by its path, so that
    neither procman nor waitress need be installed there."""
    if request.reload_signal:
        raise BadOption("reload", 'no signal makes the built-in server reload: use "restart"')
    options = dict(request.options)
    drain, stop_timeout = _graceful(request, "drain-timeout")
    options["drain-timeout"] = drain
    if request.virtualenv:
        argv = [_python(request), request.wsgi_script, "--site", request.site]
    else:
        argv = [_python(request), "-m", "procman.wsgi"]
    argv += _own_stats(request)
    argv += _counts(request, "", "--threads")
    argv += [f"--middleware={middleware}" for middleware in request.middleware]
    if not request.access_log:
        argv.append("--no-access-log")
    for option in ("drain-timeout", "idle-grace"):
        if option in options:
            argv.append(f"--{option}={_seconds(option, options.pop(option)):g}")
    argv += _settings(options)
    argv.append(request.app)
    return Plan(
        argv=tuple(argv),
        stop_signal=signal.SIGTERM,
        stop_timeout=stop_timeout,
        ready=Ready(kind="notify"),
        notify=True,
        processes=max(1, request.workers),
    )


def _settings(options: Mapping[str, object]) -> Iterator[str]:
    """waitress' adjustments: `{"connection_limit": 200}` → --set=connection_limit=200."""
    for name, value in options.items():
        key = f"server_options.{name}"
        if name in _WAITRESS_OWNED:
            raise BadOption(key, _WAITRESS_OWNED[name])
        if name not in WAITRESS_OPTIONS:
            close = difflib.get_close_matches(name.replace("-", "_"), WAITRESS_OPTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadOption(key, f"no such option of the built-in server{hint}")
        if isinstance(value, bool):
            yield f"--set={name}={'true' if value else 'false'}"
        else:
            yield f"--set={name}={' '.join(_texts(key, value))}"


# --- what they have in common ---------------------------------------------------------------------------------------

_PLANNERS: dict[str, Callable[[Request], Plan]] = {"wsgi": _wsgi, "gunicorn": _gunicorn, "uwsgi": _uwsgi}

_NAME = r"[^\W\d]\w*"
_APP = re.compile(rf"{_NAME}(\.{_NAME})*:(?P<attribute>{_NAME}(\.{_NAME})*)(\(\))?")
_STATS = re.compile(r"/[^\0\n]+|[\w.-]*:[0-9]{1,5}")
_OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# The only long options of gunicorn and uWSGI with an underscore in their name.
_UNDERSCORED = ("limit-request-field_size", "pivot_root", "start_response-nodelay")


def _check(request: Request) -> None:
    """What holds for every server."""
    app = _APP.fullmatch(request.app)
    if app is None:
        raise BadOption("app", f'expected "MODULE:CALLABLE" or "MODULE:FACTORY()", got {request.app!r}')
    if request.server != "wsgi" and "." in app["attribute"]:
        raise BadOption("app", f"{request.server} takes no dots after the colon; the built-in server does")
    if not request.listen:
        raise BadOption("listen", "a server needs at least one listener or address")
    for key, count in (("workers", request.workers), ("threads", request.threads)):
        if count < 0:
            raise BadOption(key, "expected a number above 0")


def _python(request: Request) -> str:
    return f"{request.virtualenv}/bin/python" if request.virtualenv else request.python


def _counts(request: Request, workers: str, threads: str) -> list[str]:
    argv = []
    if request.workers and workers:
        argv.append(f"{workers}={request.workers}")
    if request.threads:
        argv.append(f"{threads}={request.threads}")
    return argv


def _first_answer(request: Request) -> Ready:
    """A worker serves once it answers anything. A connection alone proves nothing: procman holds the socket."""
    return Ready(kind="http", address=request.listen[0].address, path="/", any_status=True)


def _graceful(request: Request, option: str) -> tuple[float, float]:
    """(seconds that the server gives its requests, seconds until SIGKILL): the second is always above the first."""
    given = request.options.get(option)
    if given is None:
        if request.stop_timeout is None:
            return GRACE, GRACE + MARGIN
        return request.stop_timeout - min(MARGIN, request.stop_timeout / 2), request.stop_timeout
    own = _seconds(option, given)
    if request.stop_timeout is None:
        return own, own + MARGIN
    if request.stop_timeout <= own:
        raise BadOption("stop_timeout", f"{request.stop_timeout:g} s is not above the server's {option} of {own:g} s")
    return own, request.stop_timeout


def _seconds(option: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise BadOption(f"server_options.{option}", "expected a number of seconds")
    return value


def _long_options(options: Mapping[str, object], owned: Mapping[str, str]) -> Iterator[str]:
    """The server's own long options: `{"max-requests": 1000, "preload": True}` → --max-requests=1000 --preload."""
    for name, value in options.items():
        key = f"server_options.{name}"
        if name.startswith("-"):
            raise BadOption(key, f"write it without dashes: {name.lstrip('-')!r}")
        if not _OPTION.fullmatch(name):
            raise BadOption(key, "not the name of an option")
        hyphened = name.replace("_", "-")
        if name in owned or hyphened in owned:
            raise BadOption(key, owned.get(name) or owned[hyphened])
        if "_" in name and name not in _UNDERSCORED:
            raise BadOption(key, f"the server's own spelling is {hyphened!r}")
        if isinstance(value, bool):
            yield from [f"--{name}"] if value else []
        else:
            yield from (f"--{name}={text}" for text in _texts(key, value))


def _texts(key: str, value: object) -> list[str]:
    """A string or a number, or a list of them, as words of an argv."""
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise BadOption(key, "expected a string, a number, true, false, or a list of strings and numbers")
        if isinstance(item, str) and "\0" in item:
            raise BadOption(key, "a NUL character can't be passed to a program")
    return [str(item) for item in items]


def _one_of(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:-1]) + f" or {names[-1]!r}"

"""How each application server is run: a program's `server`, `app` and `server_options` become an argv and its rules.

Pure. It must not know the program table's syntax, the file system, or who starts the process. What it says about
gunicorn and uWSGI comes from their sources and is held by tests/test_real_servers.py, which runs them; docs/servers.md
is the user's side of it.

The servers here get their listening sockets by LISTEN_FDS (sd_listen_fds(3)), so no plan names an address to bind.
Those in `asgi` get the numbers of the same descriptors.
"""

from __future__ import annotations

import difflib
import posixpath
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from procman import asgi, preset
from procman.config import Address, Program, Ready, place
from procman.preset import BadOption, Plan, Request

__all__ = ["SERVERS", "WAITRESS_OPTIONS", "BadOption", "Plan", "Request", "control_socket", "plan"]

SERVERS = ("wsgi", "gunicorn", "uwsgi", *asgi.PLANNERS)


def plan(request: Request) -> Plan:
    """The way to run `request`. Raises BadOption for the first key that its server can't take."""
    planner = _PLANNERS.get(request.server)
    if planner is None:
        raise BadOption("server", f"unknown server {request.server!r}: expected {preset.one_of(SERVERS)}")
    preset.check(request)
    return planner(request)


MAY_DROP = {"", "uvicorn"}
"""What drops at its stop what it has accepted and not read (uvicorn: with several workers), or is no server that we
know: docs/servers.md has the figures."""


def may_drop(program: Program) -> bool:
    """Whether `program` may drop requests when it is told to stop, where others go on with its socket."""
    return bool(program.listen) and program.server in MAY_DROP


TELLING = {"wsgi": "--stats=", "gunicorn": "--control-socket=", "uwsgi": "--stats="}
"""The servers that tell of their workers, each with the option that says where: see `told_at`."""

SOCKET_PATH_MAX = {"wsgi": 107, "gunicorn": 107, "uwsgi": 102}
"""Bytes of the path of a Unix socket on which they tell: unix(7), and what uWSGI takes."""


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


_NO_HTTP = {
    "gunicorn": ("--certfile=", "--protocol="),
    "uvicorn": ("--ssl-",),
    "hypercorn": ("--certfile=", "--keyfile="),
    "granian": ("--ssl-", "--http=2"),
    "daphne": ("--endpoint=ssl:",),
}
"""Options, by how they begin, with which a server speaks no plain HTTP/1.1."""


def speaks_http(server: str, argv: Sequence[str]) -> bool:
    """Whether a child with this argv can be asked over plain HTTP/1.1, as far as its options tell. A file of settings
    that they name may say otherwise."""
    if server == "uwsgi":
        return "--protocol=http" in argv
    others = _NO_HTTP.get(server, ())
    return server in SERVERS and not any(word.startswith(others) for word in argv if word != "--protocol=http")


def in_place(program: Program, slot: int) -> Program:
    """`program` for a child in one of its two places (`Program.slot`): what its server makes itself has a place too."""
    if program.slot == slot:
        return program
    moved = replace(program, slot=slot)
    where = _own_socket(program)
    if not where:
        return moved
    path = control_socket(posixpath.dirname(posixpath.dirname(where)), moved.key, program.server)
    option, ready = TELLING[program.server], program.ready
    if ready.address is not None and ready.address.path == where:
        ready = replace(ready, address=Address("unix", path=path))
    argv = tuple(option + path if word == option + where else word for word in program.argv)
    return replace(moved, argv=argv, ready=ready)


def overlaps(program: Program) -> bool:
    """Whether two children of `program` can run at once: not where each would tell of its workers at the same place of
    the user's own."""
    return not told_at(program.server, program.argv) or bool(_own_socket(program))


def _own_socket(program: Program) -> str:
    """Where it tells of its workers, if that is a place of procman's."""
    where = told_at(program.server, program.argv)
    return where if where.endswith(f"/{program.key}.{program.server}/ctl") else ""


# --- gunicorn (25.1 and newer; read: 27.0.1) ------------------------------------------------------------------------

_GUNICORN_OWNED = preset.owned(
    {
        preset.LISTEN: "bind",
        preset.BACKLOG: "backlog",
        preset.REUSE_PORT: "reuse-port",
        preset.PARENT: "daemon",
        preset.PID_FILE: "pid",
        preset.RELOADER: "reload reload-engine reload-extra-file",
        "use the key workers": "workers",
        "use the key threads": "threads",
        "use the key directory": "chdir",
        "use the key user": "user initgroups",
        "use the key group": "group",
        "use the key umask": "umask",
        "gunicorn would exit at once": "check-config print-config help version",
    }
)

_GUNICORN_UNDERSCORED = ("limit-request-field_size",)


def _gunicorn(request: Request) -> Plan:
    """TERM gives the workers `graceful-timeout` to end their requests. gunicorn says READY=1 before it forks its first
    worker, so its control socket is asked instead: it knows when a worker has sent a heartbeat."""
    options = dict(request.options)
    options["graceful-timeout"], stop_timeout = preset.whole_seconds(request, "graceful-timeout")
    wanted = options.pop("control-socket", True)
    if not isinstance(wanted, bool):
        message = "procman gives each gunicorn its own; false is for a gunicorn older than 25.1, which has none"
        raise BadOption("server_options.control-socket", message)
    argv = [preset.python(request), "-m", "gunicorn"]
    if wanted and not options.get("no-control-socket"):
        if more := _too_long(request):
            most = SOCKET_PATH_MAX["gunicorn"]
            message = f"the path of its control socket is {more} bytes longer than the {most} that Linux allows"
            message += ": give the program a shorter name, or daemon.socket a shorter folder"
            raise BadOption("server_options.control-socket", message)
        path = control_socket(request.runtime_dir, request.name)
        argv.append(f"--control-socket={path}")
        ready = Ready(kind="gunicorn", address=Address("unix", path=path))
    else:
        for option in ("certfile", "protocol"):
            if options.get(option, "http") != "http":
                message = f"without a control socket procman asks over plain HTTP, which {option} rules out"
                raise BadOption(f"server_options.{option}", message)
        ready = preset.first_answer(request)
    argv += preset.counts(request, "--workers", "--threads")
    argv += preset.long_options(options, _GUNICORN_OWNED, underscored=_GUNICORN_UNDERSCORED)
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

_UWSGI_OWNED = preset.owned(
    {
        preset.LISTEN: """socket uwsgi-socket suwsgi-socket ssl-socket http-socket http11-socket https-socket
            fastcgi-socket fastcgi-nph-socket scgi-socket scgi-nph-socket raw-socket puwsgi-socket abstract-socket
            shared-socket undeferred-shared-socket zerg http http-router https https2""",
        preset.BACKLOG: "listen",
        preset.REUSE_PORT: "reuse-port",
        preset.PARENT: "daemonize daemonize2",
        preset.PID_FILE: "pidfile pidfile2 safe-pidfile safe-pidfile2",
        preset.RELOADER: """py-auto-reload py-autoreload python-auto-reload python-autoreload py-auto-reload-ignore
            touch-reload fs-reload""",
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

_UWSGI_UNDERSCORED = ("pivot_root", "start_response-nodelay")

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

_UWSGI_LAST = "--add-header=Connection: close"
"""It answers one request on a connection and closes it, which it does not say. A proxy that keeps connections would
give the next request to one that just ends, and fail it if that is a POST."""


def _uwsgi(request: Request) -> Plan:
    """READY=1 is the truth, unless the workers import the application (lazy-apps): then the first answer is."""
    options = dict(request.options)
    stats = _uwsgi_stats(request, options)
    if request.virtualenv:
        for option in ("virtualenv", "venv", "home", "pyhome"):
            if option in options:
                raise BadOption(f"server_options.{option}", "the key virtualenv says it already")
    if request.reload_signal == signal.SIGHUP:
        raise BadOption("reload", 'uWSGI executes itself anew on SIGHUP, and finds no socket any more: use "overlap"')
    lazy = bool(options.get("lazy-apps"))
    protocol = options.pop("protocol", "http")
    if protocol not in _UWSGI_PROTOCOLS:
        raise BadOption("server_options.protocol", f"expected {preset.one_of(_UWSGI_PROTOCOLS)}")
    if lazy and protocol != "http":
        message = f"with protocol {protocol!r} procman can't see when a worker has imported the application"
        raise BadOption("server_options.lazy-apps", message)
    first = {name: options.pop(name) for name in _UWSGI_FIRST if name in options}
    argv = [f"{request.virtualenv}/bin/uwsgi" if request.virtualenv else "uwsgi"]
    argv += preset.long_options(first, {})
    if request.virtualenv:
        argv.append(f"--virtualenv={request.virtualenv}")
    argv += ["--master", "--need-app", f"--protocol={protocol}", *_UWSGI_STOP]
    argv += [_UWSGI_LAST, *stats] if protocol == "http" else stats
    argv += preset.counts(request, "--processes", "--threads")
    if request.threads > 1:
        argv.append("--enable-threads")
    argv += preset.long_options(options, _UWSGI_OWNED, underscored=_UWSGI_UNDERSCORED)
    argv.append(f"--module={request.app}")
    return Plan(
        argv=tuple(argv),
        stop_signal=signal.SIGINT,
        stop_timeout=preset.GRACE + preset.MARGIN if request.stop_timeout is None else request.stop_timeout,
        ready=preset.first_answer(request) if lazy else Ready(kind="notify"),
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
    return [] if _too_long(request) else [f"--stats={path}"]


def _too_long(request: Request) -> int:
    """By how many bytes its own socket has too long a path in one of the two places of its process."""
    path = control_socket(request.runtime_dir, place(request.name, 1), request.server)
    return max(0, len(path.encode()) - SOCKET_PATH_MAX[request.server])


# --- the built-in server (waitress underneath) ----------------------------------------------------------------------

_WAITRESS_OWNED = preset.owned(
    {
        preset.LISTEN: "host port ipv4 ipv6 listen sockets unix_socket unix_socket_perms",
        preset.BACKLOG: "backlog",
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
        raise BadOption("reload", 'no signal makes the built-in server reload: use "overlap"')
    options = dict(request.options)
    drain, stop_timeout = preset.graceful(request, "drain-timeout")
    options["drain-timeout"] = drain
    if request.virtualenv:
        argv = [preset.python(request), request.wsgi_script, "--site", request.site]
    else:
        argv = [preset.python(request), "-m", "procman.wsgi"]
    argv += _own_stats(request)
    argv += preset.counts(request, "", "--threads")
    argv += [f"--middleware={middleware}" for middleware in request.middleware]
    if not request.access_log:
        argv.append("--no-access-log")
    if request.scaled:
        argv.append("--leave-waiting")
    for option in ("drain-timeout", "idle-grace"):
        if option in options:
            argv.append(f"--{option}={preset.seconds(option, options.pop(option)):g}")
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
            yield f"--set={name}={' '.join(preset.texts(key, value))}"


_STATS = re.compile(r"/[^\0\n]+|[\w.-]*:[0-9]{1,5}")

_PLANNERS: dict[str, Callable[[Request], Plan]] = {
    "wsgi": _wsgi,
    "gunicorn": _gunicorn,
    "uwsgi": _uwsgi,
    **asgi.PLANNERS,
}

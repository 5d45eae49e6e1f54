"""How uvicorn, hypercorn, daphne and granian are run. Beside `servers`, which holds the WSGI servers.

Pure. What it says about them comes from their sources (uvicorn 0.54, hypercorn 0.18, daphne 4.2, granian 2.8) and is
held by tests/test_real_servers.py, which runs them; docs/servers.md is the user's side of it.

None of them reads LISTEN_FDS. Most are told the numbers of descriptors. Where a server's own way would lose the
socket, or requests, it is started by `procman.adapter`. None says READY=1: each is asked for an
answer, which only it can give, because nobody else accepts from its sockets.
"""

from __future__ import annotations

import posixpath
import signal
from collections.abc import Mapping
from types import MappingProxyType

from procman import preset
from procman.config import Ready
from procman.preset import BadOption, Plan, Request

FIRST_FD = 3
"""Of the sockets that a program inherits (sd_listen_fds(3))."""

_AT_ONCE = "the server would exit at once"
_FACTORY = 'write "MODULE:FACTORY()" as the app'
_LISTENER_FILE = "procman holds the sockets: use mode and owner of the [listener] table"


# --- uvicorn --------------------------------------------------------------------------------------------------------

UVICORN_OWNED = preset.owned(
    {
        preset.LISTEN: "host port uds fd",
        preset.BACKLOG: "backlog",
        preset.RELOADER: "reload reload-dir reload-include reload-exclude reload-delay",
        _FACTORY: "factory",
        _AT_ONCE: "version help",
        "use the key workers": "workers",
        "use the key directory": "app-dir",
    }
)
UVICORN_PAIRS = ("access-log", "use-colors", "proxy-headers", "server-header", "date-header")
UVICORN_WORDS = ("ws-per-message-deflate",)


def uvicorn(request: Request) -> Plan:
    """One socket by its number; several workers share it. SIGHUP means something only to the parent of workers. It
    needs `adapter` to stop without a loss."""
    _one_listener(request)
    _no_threads(request, "each worker of uvicorn is one event loop")
    if request.reload_signal and (request.reload_signal != signal.SIGHUP or request.workers < 2):
        message = 'uvicorn reloads by SIGHUP only, and only with workers = 2 or more: use "overlap"'
        raise BadOption("reload", message)
    options = dict(request.options)
    options["timeout-graceful-shutdown"], stop_timeout = preset.whole_seconds(request, "timeout-graceful-shutdown")
    ready = _answer(request, "ssl-certfile", "ssl-keyfile", "ssl-context-factory")
    listener = request.listen[0]
    # --workers always: else the variable WEB_CONCURRENCY would count, and nobody here knows it.
    argv = [*_by_adapter(request), f"--fd={FIRST_FD}", f"--backlog={listener.backlog}"]
    argv.append(f"--workers={request.workers or 1}")
    argv += preset.long_options(options, UVICORN_OWNED, pairs=UVICORN_PAIRS, words=UVICORN_WORDS)
    if preset.is_factory(request):
        argv.append("--factory")
    argv.append(request.app.removesuffix("()"))
    return _plan(argv, stop_timeout, ready)


# --- hypercorn ------------------------------------------------------------------------------------------------------

HYPERCORN_OWNED = preset.owned(
    {
        preset.LISTEN: "bind insecure-bind",
        "procman holds no sockets for datagrams": "quic-bind",
        preset.BACKLOG: "backlog",
        preset.PARENT: "daemon",
        preset.PID_FILE: "pid",
        preset.RELOADER: "reload",
        _AT_ONCE: "help",
        _LISTENER_FILE: "umask user group",
        "use the key workers": "workers",
    }
)


def hypercorn(request: Request) -> Plan:
    """Any number of sockets. Without `workers` it is one process: a parent of one worker would wait for the import when
    it is told to stop, and add nothing. It needs `adapter` to stop gracefully."""
    _no_threads(request, "each worker of hypercorn is one event loop")
    if request.reload_signal:
        message = 'on SIGHUP hypercorn ends all its workers before it starts new ones: use "overlap"'
        raise BadOption("reload", message)
    options = dict(request.options)
    options["graceful-timeout"], stop_timeout = preset.whole_seconds(request, "graceful-timeout")
    ready = _answer(request, "certfile", "keyfile")
    argv = _by_adapter(request)
    argv += [f"--bind=fd://{FIRST_FD + number}" for number in range(len(request.listen))]
    argv += [f"--backlog={_backlog(request)}", f"--workers={request.workers}"]
    argv += preset.long_options(options, HYPERCORN_OWNED)
    argv.append(request.app)  # it evaluates what stands after the colon, so it calls a factory by itself
    return _plan(argv, stop_timeout, ready)


# --- daphne ---------------------------------------------------------------------------------------------------------

DAPHNE_OWNED = preset.owned(
    {
        preset.LISTEN: "port bind unix-socket fd endpoint",
        _AT_ONCE: "help",
        "the server's own spelling is 'websocket_timeout'": "websocket-timeout",
        "the server's own spelling is 'websocket_connect_timeout'": "websocket-connect-timeout",
    }
)
DAPHNE_UNDERSCORED = ("websocket_timeout", "websocket_connect_timeout")
_GRACEFUL = "graceful-timeout"
"""An option of `adapter`, for daphne has none."""

def daphne(request: Request) -> Plan:
    """One process. By itself it knows no graceful stop: what it works on is cancelled. And its option --fd is good for
    IPv4 only. `adapter` mends both."""
    if request.workers:
        raise BadOption("workers", "daphne is one process: uvicorn, hypercorn and granian have workers")
    _no_threads(request, "daphne has no such option: environment = { ASGI_THREADS = ... } sizes its thread pool")
    if request.reload_signal:
        raise BadOption("reload", 'no signal makes daphne reload: use "overlap"')
    if preset.is_factory(request):
        raise BadOption("app", "daphne calls no factory: give the module an application")
    options = dict(request.options)
    grace, stop_timeout = preset.graceful(request, _GRACEFUL)
    options.pop(_GRACEFUL, None)
    argv = [*_by_adapter(request), f"--{_GRACEFUL}={grace:g}"]
    argv += [f"--endpoint=fd:fileno={FIRST_FD + number}" for number in range(len(request.listen))]
    argv += preset.long_options(options, DAPHNE_OWNED, underscored=DAPHNE_UNDERSCORED)
    argv.append(request.app)
    return _plan(argv, stop_timeout, _answer(request))


# --- granian --------------------------------------------------------------------------------------------------------

GRANIAN_OWNED = preset.owned(
    {
        preset.LISTEN: "host port uds",
        _LISTENER_FILE: "uds-permissions",
        preset.BACKLOG: "backlog",
        preset.PID_FILE: "pid-file",
        preset.RELOADER: """reload reload-paths reload-ignore-dirs reload-ignore-patterns reload-ignore-paths
            reload-tick reload-ignore-worker-failure""",
        _FACTORY: "factory",
        _AT_ONCE: "version help",
        "use the key workers": "workers",
        'use the key threads, with interface = "wsgi"': "blocking-threads",
        "use the key directory": "working-dir",
    }
)
GRANIAN_PAIRS = (
    *("ws", "http1-keep-alive", "http1-pipeline-flush", "http2-adaptive-window", "log", "access-log"),
    *("ssl-client-verify", "respawn-failed-workers", "metrics"),
)
GRANIAN_INTERFACES = ("asgi", "asginl", "rsgi", "wsgi")

_KILL_TIMEOUT = "workers-kill-timeout"
_KILL_TIMEOUT_MAX = 1800


def granian(request: Request) -> Plan:
    """It can't be told to inherit a socket, so `adapter` puts it in the place of the one that granian would make."""
    _one_listener(request)
    options = dict(request.options)
    interface = options.pop("interface", "asgi")
    if interface not in GRANIAN_INTERFACES:
        raise BadOption("server_options.interface", f"expected {preset.one_of(GRANIAN_INTERFACES)}")
    if request.threads > 1 and interface != "wsgi":
        message = 'each worker of granian runs Python in one thread, but with interface = "wsgi"; use workers'
        raise BadOption("threads", message)
    if request.reload_signal not in {0, signal.SIGHUP}:
        raise BadOption("reload", 'granian reloads by SIGHUP only: use "signal:HUP" or "restart"')
    grace, stop_timeout = preset.whole_seconds(request, _KILL_TIMEOUT)
    if grace > _KILL_TIMEOUT_MAX and _KILL_TIMEOUT in options:
        raise BadOption(f"server_options.{_KILL_TIMEOUT}", f"granian takes up to {_KILL_TIMEOUT_MAX} seconds")
    options[_KILL_TIMEOUT] = min(grace, _KILL_TIMEOUT_MAX)
    if str(options.get("http", "auto")) == "2":
        _answer(request, "http")
    ready = _answer(request, "ssl-certificate", "ssl-keyfile")
    argv = [*_by_adapter(request), f"--interface={interface}"]
    argv += preset.counts(request, "--workers", "--blocking-threads")
    argv += preset.long_options(options, GRANIAN_OWNED, pairs=GRANIAN_PAIRS)
    if preset.is_factory(request):
        argv.append("--factory")
    argv.append(request.app.removesuffix("()"))
    return _plan(argv, stop_timeout, ready)


# --- what they have in common ---------------------------------------------------------------------------------------

PLANNERS = MappingProxyType({"uvicorn": uvicorn, "hypercorn": hypercorn, "daphne": daphne, "granian": granian})


def _plan(argv: list[str], stop_timeout: float, ready: Ready) -> Plan:
    return Plan(
        argv=tuple(argv),
        stop_signal=signal.SIGTERM,
        stop_timeout=stop_timeout,
        ready=ready,
        notify=False,
        processes=1,
    )


def _answer(request: Request, *rules_out: str) -> Ready:
    """The first answer, which can be asked for only over plain HTTP: options that rule it out need the key `ready`."""
    options: Mapping[str, object] = request.options
    for option in rules_out:
        if options.get(option) and not request.ready_given:
            message = f"procman asks over plain HTTP/1.1, which {option} rules out: say how to ask with the key ready"
            raise BadOption(f"server_options.{option}", message)
    return preset.first_answer(request)


def _one_listener(request: Request) -> None:
    if len(request.listen) > 1:
        raise BadOption("listen", f"{request.server} takes one socket only; hypercorn and gunicorn take several")


def _no_threads(request: Request, why: str) -> None:
    if request.threads:
        raise BadOption("threads", why)


def _backlog(request: Request) -> int:
    return max(listener.backlog for listener in request.listen)


def _by_adapter(request: Request) -> list[str]:
    """Like the built-in server: by its path in a virtualenv, so that procman need not be installed there."""
    if request.virtualenv:
        script = posixpath.join(posixpath.dirname(request.wsgi_script), "adapter.py")
        start = [preset.python(request), script]
    else:
        start = [preset.python(request), "-m", "procman.adapter"]
    return [*start, request.server, str(_backlog(request))]

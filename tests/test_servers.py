"""servers.py: requests and the plans they become, as tables. test_real_servers.py shows that the plans are right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waitress.adjustments import Adjustments

from procman import asgi, preset, servers
from procman.config import Address, Listener, Ready
from procman.servers import BadOption, Plan, Request, plan

WEB = Listener(name="web", address=Address("tcp", "127.0.0.1", 8000))

GUNICORN = Request(
    server="gunicorn",
    name="shop",
    program="shop",
    instance=1,
    app="shop.wsgi:application",
    workers=0,
    threads=0,
    listen=(WEB,),
    options=MappingProxyType({}),
    middleware=(),
    access_log=True,
    virtualenv="",
    python="/opt/procman/bin/python",
    wsgi_script="/opt/procman/lib/procman/wsgi.py",
    site="/opt/procman/lib",
    runtime_dir="/run/procman",
    stop_timeout=None,
)
UWSGI = replace(GUNICORN, server="uwsgi")
WSGI = replace(GUNICORN, server="wsgi")
UVICORN = replace(GUNICORN, server="uvicorn")
HYPERCORN = replace(GUNICORN, server="hypercorn")
DAPHNE = replace(GUNICORN, server="daphne")
GRANIAN = replace(GUNICORN, server="granian")
EVERY = [GUNICORN, UWSGI, WSGI, UVICORN, HYPERCORN, DAPHNE, GRANIAN]

CONTROL = "/run/procman/shop.gunicorn/ctl"
UWSGI_STATS = "--stats=/run/procman/shop.uwsgi/ctl"
WSGI_STATS = "--stats=/run/procman/shop.wsgi/ctl"
ANY_ANSWER = Ready(kind="http", address=WEB.address, path="/", any_status=True)
UWSGI_START = (
    "--master",
    "--need-app",
    "--protocol=http",
    "--hook-asap=unix_signal:2 _exit",
    "--hook-pre-app=unix_signal:2 _exit",
    "--hook-master-start=unix_signal:2 gracefully_kill_them_all",
    "--hook-asap=unix_signal:1 _exit",
    "--hook-post-fork=unix_signal:1 _exit",
    "--die-on-term",
    "--add-header=Connection: close",
)


def server(request: Request) -> str:
    return request.server


def bad(request: Request) -> tuple[str, str]:
    """What BadOption says about `request`."""
    with pytest.raises(BadOption) as caught:
        plan(request)
    assert str(caught.value) == f"{caught.value.key}: {caught.value.message}"
    return caught.value.key, caught.value.message


def asked(*argv: str, stop_timeout: float = 35.0) -> Plan:
    """The plan of a server that is ready when it answers."""
    return Plan(
        argv=argv,
        stop_signal=signal.SIGTERM,
        stop_timeout=stop_timeout,
        ready=ANY_ANSWER,
        notify=False,
        processes=1,
    )


# --- whole plans ------------------------------------------------------------------------------------------------------

PLANS: list[tuple[Request, Plan]] = [
    (
        GUNICORN,
        Plan(
            argv=(
                *("/opt/procman/bin/python", "-m", "gunicorn", f"--control-socket={CONTROL}"),
                *("--graceful-timeout=30", "shop.wsgi:application"),
            ),
            stop_signal=signal.SIGTERM,
            stop_timeout=35.0,
            ready=Ready(kind="gunicorn", address=Address("unix", path=CONTROL)),
            notify=False,
            processes=1,
        ),
    ),
    (
        UWSGI,
        Plan(
            argv=("uwsgi", *UWSGI_START, UWSGI_STATS, "--module=shop.wsgi:application"),
            stop_signal=signal.SIGINT,
            stop_timeout=35.0,
            ready=Ready(kind="notify"),
            notify=True,
            processes=1,
        ),
    ),
    (
        WSGI,
        Plan(
            argv=(
                *("/opt/procman/bin/python", "-m", "procman.wsgi", WSGI_STATS, "--drain-timeout=30"),
                "shop.wsgi:application",
            ),
            stop_signal=signal.SIGTERM,
            stop_timeout=35.0,
            ready=Ready(kind="notify"),
            notify=True,
            processes=1,
        ),
    ),
    (
        UVICORN,
        asked(
            *("/opt/procman/bin/python", "-m", "procman.adapter", "uvicorn", "2048", "--fd=3", "--backlog=2048"),
            *("--workers=1", "--timeout-graceful-shutdown=30", "shop.wsgi:application"),
        ),
    ),
    (
        HYPERCORN,
        asked(
            *("/opt/procman/bin/python", "-m", "procman.adapter", "hypercorn", "2048", "--bind=fd://3"),
            *("--backlog=2048", "--workers=0", "--graceful-timeout=30", "shop.wsgi:application"),
        ),
    ),
    (
        DAPHNE,
        asked(
            *("/opt/procman/bin/python", "-m", "procman.adapter", "daphne", "2048", "--graceful-timeout=30"),
            *("--endpoint=fd:fileno=3", "shop.wsgi:application"),
        ),
    ),
    (
        GRANIAN,
        asked(
            *("/opt/procman/bin/python", "-m", "procman.adapter", "granian", "2048", "--interface=asgi"),
            *("--workers-kill-timeout=30", "shop.wsgi:application"),
        ),
    ),
]


@pytest.mark.parametrize(("request_", "expected"), PLANS, ids=[request.server for request, _ in PLANS])
def test_the_least_that_a_user_says(request_: Request, expected: Plan) -> None:
    assert plan(request_) == expected


ARGVS: list[tuple[str, Request, tuple[str, ...]]] = [
    (
        "gunicorn with everything",
        replace(
            GUNICORN,
            name="shop",
            virtualenv="/srv/venv",
            workers=4,
            threads=2,
            options={"max-requests": 1000, "preload": True, "reuse-x": False, "env": ["A=1", "B=2"], "timeout": 90},
        ),
        (
            *("/srv/venv/bin/python", "-m", "gunicorn", f"--control-socket={CONTROL}", "--workers=4", "--threads=2"),
            *("--max-requests=1000", "--preload", "--env=A=1", "--env=B=2", "--timeout=90"),
            *("--graceful-timeout=30", "shop.wsgi:application"),
        ),
    ),
    (
        "uwsgi with everything: plugins first",
        replace(
            UWSGI,
            virtualenv="/srv/venv",
            workers=4,
            threads=2,
            options={"harakiri": 20, "plugin": "python3", "disable-logging": True, "static-map": ["/a=/b", "/c=/d"]},
        ),
        (
            *("/srv/venv/bin/uwsgi", "--plugin=python3", "--virtualenv=/srv/venv", *UWSGI_START, UWSGI_STATS),
            *("--processes=4", "--threads=2", "--enable-threads", "--harakiri=20", "--disable-logging"),
            *("--static-map=/a=/b", "--static-map=/c=/d", "--module=shop.wsgi:application"),
        ),
    ),
    (
        "wsgi with everything",
        replace(
            WSGI,
            virtualenv="/srv/venv",
            workers=4,
            threads=8,
            middleware=("shop.outer:wrap", "shop.inner:wrap"),
            access_log=False,
            options={
                "connection_limit": 200,
                "expose_tracebacks": False,
                "log_socket_errors": True,
                "trusted_proxy_headers": ["x-forwarded-for", "x-forwarded-proto"],
                "idle-grace": 0.5,
                "drain-timeout": 10,
            },
        ),
        (
            *("/srv/venv/bin/python", "/opt/procman/lib/procman/wsgi.py", "--site", "/opt/procman/lib"),
            *(WSGI_STATS, "--threads=8"),
            *("--middleware=shop.outer:wrap", "--middleware=shop.inner:wrap", "--no-access-log", "--drain-timeout=10"),
            *("--idle-grace=0.5", "--set=connection_limit=200", "--set=expose_tracebacks=false"),
            *("--set=log_socket_errors=true", "--set=trusted_proxy_headers=x-forwarded-for x-forwarded-proto"),
            "shop.wsgi:application",
        ),
    ),
    (
        "uvicorn with everything",
        replace(
            UVICORN,
            app="shop.asgi:make()",
            listen=(replace(WEB, backlog=64),),
            virtualenv="/srv/venv",
            workers=4,
            options={
                "access-log": False,
                "proxy-headers": True,
                "ws-per-message-deflate": False,
                "header": ["A:1", "B:2"],
                "timeout-keep-alive": 65,
                "timeout-graceful-shutdown": 20,
            },
            reload_signal=signal.SIGHUP,
        ),
        (
            *("/srv/venv/bin/python", "/opt/procman/lib/procman/adapter.py", "uvicorn", "64", "--fd=3"),
            *("--backlog=64", "--workers=4", "--no-access-log", "--proxy-headers"),
            *("--ws-per-message-deflate=false", "--header=A:1", "--header=B:2"),
            *("--timeout-keep-alive=65", "--timeout-graceful-shutdown=20", "--factory", "shop.asgi:make"),
        ),
    ),
    (
        "hypercorn with everything",
        replace(
            HYPERCORN,
            app="shop.asgi:make()",
            listen=(WEB, replace(WEB, name="more", backlog=4096)),
            virtualenv="/srv/venv",
            workers=4,
            options={"keep-alive": 65, "debug": False, "access-logfile": "-"},
        ),
        (
            *("/srv/venv/bin/python", "/opt/procman/lib/procman/adapter.py", "hypercorn", "4096", "--bind=fd://3"),
            *("--bind=fd://4", "--backlog=4096", "--workers=4", "--keep-alive=65", "--access-logfile=-"),
            *("--graceful-timeout=30", "shop.asgi:make()"),
        ),
    ),
    (
        "daphne with everything",
        replace(
            DAPHNE,
            listen=(WEB, replace(WEB, name="more")),
            virtualenv="/srv/venv",
            options={"websocket_timeout": 60, "proxy-headers": True, "http-timeout": 20, "graceful-timeout": 7},
        ),
        (
            *(
                "/srv/venv/bin/python",
                "/opt/procman/lib/procman/adapter.py",
                "daphne",
                "2048",
                "--graceful-timeout=7",
                "--endpoint=fd:fileno=3",
            ),
            *("--endpoint=fd:fileno=4", "--websocket_timeout=60", "--proxy-headers", "--http-timeout=20"),
            "shop.wsgi:application",
        ),
    ),
    (
        "granian with everything",
        replace(
            GRANIAN,
            app="shop.wsgi:make()",
            virtualenv="/srv/venv",
            workers=4,
            threads=8,
            options={"interface": "wsgi", "ws": False, "access-log": True, "env-files": ["a", "b"]},
            stop_timeout=7200.0,
            reload_signal=signal.SIGHUP,
        ),
        (
            *("/srv/venv/bin/python", "/opt/procman/lib/procman/adapter.py", "granian", "2048", "--interface=wsgi"),
            *("--workers=4", "--blocking-threads=8", "--no-ws", "--access-log", "--env-files=a", "--env-files=b"),
            *("--workers-kill-timeout=1800", "--factory", "shop.wsgi:make"),
        ),
    ),
]


@pytest.mark.parametrize(("name", "request_", "argv"), ARGVS, ids=[row[0] for row in ARGVS])
def test_argv(name: str, request_: Request, argv: tuple[str, ...]) -> None:
    assert plan(request_).argv == argv


def test_an_unknown_server() -> None:
    assert bad(replace(GUNICORN, server="unicorn")) == (
        "server",
        "unknown server 'unicorn': expected 'wsgi', 'gunicorn', 'uwsgi', 'uvicorn', 'hypercorn', 'daphne' or 'granian'",
    )


def test_every_name_has_a_plan() -> None:
    assert [plan(replace(GUNICORN, server=name)).processes for name in servers.SERVERS] == [1] * 7


def test_only_the_built_in_server_has_its_workers_watched_one_by_one() -> None:
    several = [plan(replace(each, workers=3)) for each in EVERY if each != DAPHNE]
    assert [each.processes for each in several] == [1, 1, 3, 1, 1, 1]
    assert "3" not in " ".join(plan(replace(WSGI, workers=3)).argv).replace("--drain-timeout=30", "")


# --- readiness --------------------------------------------------------------------------------------------------------

READINESS: list[tuple[Request, Ready, bool]] = [
    (replace(GUNICORN, options={"control-socket": False}), ANY_ANSWER, False),
    (replace(GUNICORN, options={"no-control-socket": True}), ANY_ANSWER, False),
    (
        replace(GUNICORN, options={"no-control-socket": False}),
        Ready(kind="gunicorn", address=Address("unix", path=CONTROL)),
        False,
    ),
    (replace(UWSGI, options={"lazy-apps": True}), ANY_ANSWER, False),
    (replace(UWSGI, options={"lazy-apps": False}), Ready(kind="notify"), True),
    (replace(UWSGI, options={"protocol": "uwsgi"}), Ready(kind="notify"), True),
]


@pytest.mark.parametrize(("request_", "ready", "notify"), READINESS)
def test_readiness(request_: Request, ready: Ready, notify: bool) -> None:
    planned = plan(request_)
    assert (planned.ready, planned.notify) == (ready, notify)


def test_without_a_control_socket_gunicorn_gets_only_what_every_version_knows() -> None:
    assert not any("control" in word for word in plan(replace(GUNICORN, options={"control-socket": False})).argv)
    assert "--no-control-socket" in plan(replace(GUNICORN, options={"no-control-socket": True})).argv


def test_each_gunicorn_has_a_control_socket_of_its_own() -> None:
    paths = {servers.control_socket("/run/procman", name) for name in ("shop", "blog", "shop:1", "shop.gunicorn")}
    assert len(paths) == 4
    assert all(path.startswith("/run/procman/") for path in paths)


# --- stop timeouts ----------------------------------------------------------------------------------------------------

TIMEOUTS: list[tuple[Request, float | None, object, str, float]] = [
    # the server's own option, the user's stop_timeout, then the word in argv and the stop_timeout that come out
    (GUNICORN, None, None, "--graceful-timeout=30", 35.0),
    (GUNICORN, None, 60, "--graceful-timeout=60", 65.0),
    (GUNICORN, 10.0, None, "--graceful-timeout=5", 10.0),
    (GUNICORN, 120.0, None, "--graceful-timeout=115", 120.0),
    (GUNICORN, 6.5, None, "--graceful-timeout=3", 6.5),
    (GUNICORN, 2.0, None, "--graceful-timeout=1", 2.0),
    (GUNICORN, 61.0, 60, "--graceful-timeout=60", 61.0),
    (WSGI, None, 2.5, "--drain-timeout=2.5", 7.5),
    (WSGI, 3.0, None, "--drain-timeout=1.5", 3.0),
    (WSGI, 0.0, None, "--drain-timeout=0", 0.0),
    (UWSGI, 3.0, None, "--master", 3.0),
    (UVICORN, None, 60, "--timeout-graceful-shutdown=60", 65.0),
    (UVICORN, 10.0, None, "--timeout-graceful-shutdown=5", 10.0),
    (HYPERCORN, None, 60, "--graceful-timeout=60", 65.0),
    (HYPERCORN, 6.5, None, "--graceful-timeout=3", 6.5),
    (DAPHNE, 3.0, None, "shop.wsgi:application", 3.0),
    (GRANIAN, None, 60, "--workers-kill-timeout=60", 65.0),
    (GRANIAN, 2.0, None, "--workers-kill-timeout=1", 2.0),
]
OWN = {
    "gunicorn": "graceful-timeout",
    "wsgi": "drain-timeout",
    "uvicorn": "timeout-graceful-shutdown",
    "hypercorn": "graceful-timeout",
    "granian": "workers-kill-timeout",
}


@pytest.mark.parametrize(("request_", "asked", "own", "word", "expected"), TIMEOUTS)
def test_stop_timeout(request_: Request, asked: float | None, own: object, word: str, expected: float) -> None:
    options = {} if own is None else {OWN[request_.server]: own}
    planned = plan(replace(request_, stop_timeout=asked, options=options))
    assert planned.stop_timeout == expected
    assert word in planned.argv


@pytest.mark.parametrize("request_", [GUNICORN, UVICORN, HYPERCORN, GRANIAN], ids=server)
@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0, 1.9])
def test_some_need_a_second_of_their_own(request_: Request, asked: float) -> None:
    with pytest.raises(BadOption, match=f"{request_.server} needs more: .* must be shorter") as caught:
        plan(replace(request_, stop_timeout=asked))
    assert caught.value.key == "stop_timeout"


@pytest.mark.parametrize("request_", [GUNICORN, WSGI, UVICORN, HYPERCORN, GRANIAN], ids=server)
@given(
    asked=st.none() | st.floats(min_value=2, max_value=1e5), own=st.none() | st.integers(min_value=1, max_value=100_000)
)
def test_sigkill_never_comes_before_the_server_gives_up(
    request_: Request, asked: float | None, own: int | None
) -> None:
    option = OWN[request_.server]
    try:
        planned = plan(replace(request_, stop_timeout=asked, options={} if own is None else {option: own}))
    except BadOption as error:
        if request_ == GRANIAN and own is not None and own > 1800:
            return
        assert error.key == "stop_timeout"
        assert asked is not None
        assert own is not None
        assert asked <= own
        return
    (passed,) = (float(word.partition("=")[2]) for word in planned.argv if word.startswith(f"--{option}="))
    assert passed < planned.stop_timeout


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Request, str, str]] = [
    (replace(GUNICORN, listen=()), "listen", "a server needs at least one listener or address"),
    (replace(GUNICORN, workers=-1), "workers", "expected a number above 0"),
    (replace(WSGI, threads=-1), "threads", "expected a number above 0"),
    (
        replace(GUNICORN, app="shop.wsgi"),
        "app",
        'expected "MODULE:CALLABLE" or "MODULE:FACTORY()", got \'shop.wsgi\'',
    ),
    (
        replace(GUNICORN, app="shop:make.app"),
        "app",
        "gunicorn takes no dots after the colon; the built-in server does",
    ),
    (
        replace(GUNICORN, stop_timeout=30.0, options={"graceful-timeout": 30}),
        "stop_timeout",
        "30 s is not above the server's graceful-timeout of 30 s",
    ),
    (
        replace(UWSGI, reload_signal=signal.SIGHUP),
        "reload",
        'uWSGI executes itself anew on SIGHUP, and finds no socket any more: use "overlap"',
    ),
    (
        replace(WSGI, reload_signal=signal.SIGHUP),
        "reload",
        'no signal makes the built-in server reload: use "overlap"',
    ),
    (
        replace(UVICORN, listen=(WEB, WEB)),
        "listen",
        "uvicorn takes one socket only; hypercorn and gunicorn take several",
    ),
    (
        replace(GRANIAN, listen=(WEB, WEB)),
        "listen",
        "granian takes one socket only; hypercorn and gunicorn take several",
    ),
    (replace(UVICORN, threads=2), "threads", "each worker of uvicorn is one event loop"),
    (replace(HYPERCORN, threads=2), "threads", "each worker of hypercorn is one event loop"),
    (
        replace(DAPHNE, threads=2),
        "threads",
        "daphne has no such option: environment = { ASGI_THREADS = ... } sizes its thread pool",
    ),
    (
        replace(GRANIAN, threads=2),
        "threads",
        'each worker of granian runs Python in one thread, but with interface = "wsgi"; use workers',
    ),
    (
        replace(DAPHNE, workers=2),
        "workers",
        "daphne is one process: uvicorn, hypercorn and granian have workers",
    ),
    (replace(DAPHNE, app="shop:make()"), "app", "daphne calls no factory: give the module an application"),
    (
        replace(UVICORN, reload_signal=signal.SIGHUP),
        "reload",
        'uvicorn reloads by SIGHUP only, and only with workers = 2 or more: use "overlap"',
    ),
    (
        replace(UVICORN, workers=2, reload_signal=signal.SIGUSR1),
        "reload",
        'uvicorn reloads by SIGHUP only, and only with workers = 2 or more: use "overlap"',
    ),
    (
        replace(HYPERCORN, workers=2, reload_signal=signal.SIGHUP),
        "reload",
        'on SIGHUP hypercorn ends all its workers before it starts new ones: use "overlap"',
    ),
    (replace(DAPHNE, reload_signal=signal.SIGHUP), "reload", 'no signal makes daphne reload: use "overlap"'),
    (
        replace(GRANIAN, reload_signal=signal.SIGUSR1),
        "reload",
        'granian reloads by SIGHUP only: use "signal:HUP" or "restart"',
    ),
]


@pytest.mark.parametrize(("request_", "key", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_a_refused_key(request_: Request, key: str, message: str) -> None:
    assert bad(request_) == (key, message)


NO_TLS = "procman asks over plain HTTP/1.1, which {} rules out: say how to ask with the key ready"

STATS = "procman asks there too, so it must be HOST:PORT or an absolute path; false is for none"
OPTIONS: list[tuple[Request, str, object, str]] = [
    (GUNICORN, "bind", "127.0.0.1:80", "procman holds the sockets: use the key listen"),
    (GUNICORN, "workers", 4, "use the key workers"),
    (GUNICORN, "reuse-port", True, "procman holds the sockets: use reuse_port of the [listener] table"),
    (GUNICORN, "reuse_port", True, "procman holds the sockets: use reuse_port of the [listener] table"),
    (GUNICORN, "daemon", True, "procman must be the parent of the server"),
    (GUNICORN, "umask", 18, "use the key umask"),
    (GUNICORN, "--preload", True, "write it without dashes: 'preload'"),
    (GUNICORN, "max_requests", 1000, "the server's own spelling is 'max-requests'"),
    (GUNICORN, "a b", 1, "not the name of an option"),
    (GUNICORN, "", 1, "not the name of an option"),
    (GUNICORN, "graceful-timeout", 2.5, "gunicorn takes whole seconds only, at least 1"),
    (GUNICORN, "graceful-timeout", "30", "expected a number of seconds"),
    (GUNICORN, "graceful-timeout", True, "expected a number of seconds"),
    (GUNICORN, "graceful-timeout", float("nan"), "expected a number of seconds"),
    (
        GUNICORN,
        "control-socket",
        "/run/x",
        "procman gives each gunicorn its own; false is for a gunicorn older than 25.1, which has none",
    ),
    (GUNICORN, "timeout", {"a": 1}, "expected a string, a number, true, false, or a list of strings and numbers"),
    (GUNICORN, "env", [True], "expected a string, a number, true, false, or a list of strings and numbers"),
    (GUNICORN, "env", "A=\0", "a NUL character can't be passed to a program"),
    (UWSGI, "http-socket", ":80", "procman holds the sockets: use the key listen"),
    (UWSGI, "vacuum", True, "it unlinks unix sockets, and they are procman's"),
    (UWSGI, "master", False, "procman sets it itself: readiness depends on it"),
    (UWSGI, "die-on-term", True, "procman says itself what each signal does"),
    (UWSGI, "module", "x:y", "use the key app"),
    (UWSGI, "lazy", True, "use lazy-apps: uWSGI itself advises against lazy"),
    (UWSGI, "protocol", "http11", "expected 'http', 'uwsgi', 'fastcgi' or 'scgi'"),
    (UWSGI, "stats", "stats.sock", STATS),
    (UWSGI, "stats", "@abstract", STATS),
    (UWSGI, "stats", 9191, STATS),
    (UWSGI, "stats-server", ["/a", "/b"], STATS),
    (WSGI, "stats", "/run/x", "no such option of the built-in server"),
    (WSGI, "listen", "*:80", "procman holds the sockets: use the key listen"),
    (WSGI, "connection_limi", 5, "no such option of the built-in server; did you mean 'connection_limit'?"),
    (WSGI, "connection-limit", 5, "no such option of the built-in server; did you mean 'connection_limit'?"),
    (WSGI, "zzz", 5, "no such option of the built-in server"),
    (WSGI, "ident", {}, "expected a string, a number, true, false, or a list of strings and numbers"),
    (WSGI, "drain-timeout", -1, "expected a number of seconds"),
    (WSGI, "idle-grace", "1s", "expected a number of seconds"),
    *((each, "backlog", 9, preset.BACKLOG) for each in (UVICORN, HYPERCORN, GRANIAN)),
    *((each, "workers", 9, "use the key workers") for each in (UVICORN, HYPERCORN, GRANIAN)),
    (UVICORN, "uds", "/run/x", "procman holds the sockets: use the key listen"),
    (UVICORN, "fd", 3, "procman holds the sockets: use the key listen"),
    (UVICORN, "factory", True, 'write "MODULE:FACTORY()" as the app'),
    (UVICORN, "app-dir", "/srv", "use the key directory"),
    (UVICORN, "no-access-log", True, "write access-log = false"),
    (UVICORN, "timeout-graceful-shutdown", 2.5, "uvicorn takes whole seconds only, at least 1"),
    (UVICORN, "ssl-certfile", "/c", NO_TLS.format("ssl-certfile")),
    (HYPERCORN, "bind", ":80", "procman holds the sockets: use the key listen"),
    (HYPERCORN, "quic-bind", ":80", "procman holds no sockets for datagrams"),
    (HYPERCORN, "daemon", True, "procman must be the parent of the server"),
    (HYPERCORN, "umask", 2, "procman holds the sockets: use mode and owner of the [listener] table"),
    (HYPERCORN, "certfile", "/c", NO_TLS.format("certfile")),
    (DAPHNE, "endpoint", "tcp:80", "procman holds the sockets: use the key listen"),
    (DAPHNE, "websocket-timeout", 5, "the server's own spelling is 'websocket_timeout'"),
    (DAPHNE, "ping_interval", 5, "the server's own spelling is 'ping-interval'"),
    (GRANIAN, "uds", "/run/x", "procman holds the sockets: use the key listen"),
    (GRANIAN, "uds-permissions", 420, "procman holds the sockets: use mode and owner of the [listener] table"),
    (GRANIAN, "interface", "cgi", "expected 'asgi', 'asginl', 'rsgi' or 'wsgi'"),
    (GRANIAN, "blocking-threads", 2, 'use the key threads, with interface = "wsgi"'),
    (GRANIAN, "workers-kill-timeout", 1801, "granian takes up to 1800 seconds"),
    (GRANIAN, "workers-kill-timeout", "30s", "expected a number of seconds"),
    (GRANIAN, "working-dir", "/srv", "use the key directory"),
    (GRANIAN, "no-ws", True, "write ws = false"),
    (GRANIAN, "http", "2", NO_TLS.format("http")),
    (GRANIAN, "ssl-certificate", "/c", NO_TLS.format("ssl-certificate")),
]


@pytest.mark.parametrize(("request_", "option", "value", "message"), OPTIONS)
def test_a_refused_option(request_: Request, option: str, value: object, message: str) -> None:
    assert bad(replace(request_, options={option: value})) == (f"server_options.{option}", message)


CONFLICTS: list[tuple[Request, dict[str, object], str]] = [
    (replace(UWSGI, virtualenv="/srv/venv"), {"home": "/srv/other"}, "server_options.home"),
    (UWSGI, {"lazy-apps": True, "protocol": "uwsgi"}, "server_options.lazy-apps"),
    (GUNICORN, {"control-socket": False, "certfile": "/etc/cert.pem"}, "server_options.certfile"),
    (GUNICORN, {"no-control-socket": True, "protocol": "uwsgi"}, "server_options.protocol"),
]


@pytest.mark.parametrize(("request_", "options", "key"), CONFLICTS)
def test_options_that_rule_each_other_out(request_: Request, options: dict[str, object], key: str) -> None:
    assert bad(replace(request_, options=options))[0] == key
    for option in options:  # each alone is fine
        alone = {name: value for name, value in options.items() if name != option}
        plan(replace(request_, options=alone, virtualenv=""))


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (UVICORN, {"ssl-certfile": "/c", "ssl-keyfile": "/k"}),
        (HYPERCORN, {"certfile": "/c", "keyfile": "/k"}),
        (GRANIAN, {"http": 2, "ssl-certificate": "/c"}),
    ],
)
def test_tls_is_fine_for_who_says_how_to_ask(request_: Request, options: dict[str, object]) -> None:
    argv = plan(replace(request_, options=options, ready_given=True)).argv
    assert {f"--{name}={value}" for name, value in options.items()} <= set(argv)


@pytest.mark.parametrize("request_", [UVICORN, HYPERCORN, GRANIAN], ids=server)
def test_no_reloader_for_developers(request_: Request) -> None:
    key, message = bad(replace(request_, options={"reload": True}))
    assert key == "server_options.reload"
    assert message.startswith("its reloader ends the old server before")


def test_gunicorn_takes_over_its_one_option_with_an_underscore() -> None:
    argv = plan(replace(GUNICORN, options={"limit-request-field_size": 100})).argv
    assert "--limit-request-field_size=100" in argv


APPS: list[tuple[str, bool, bool]] = [
    # the app, do the built-in server and those for ASGI take it, do the others
    ("shop:app", True, True),
    ("shop.wsgi:make()", True, True),
    ("shop:site.app", True, False),
    ("läden:app", True, True),
    ("shop", False, False),
    ("shop:", False, False),
    (":app", False, False),
    ("shop:app:x", False, False),
    ("shop:make(1)", False, False),
    ("shop:app()()", False, False),
    ("shop..wsgi:app", False, False),
    ("2shop:app", False, False),
    ("--help", False, False),
    ("shop:app\n", False, False),
    ("", False, False),
]


@pytest.mark.parametrize(("app", "built_in", "others"), APPS)
@pytest.mark.parametrize("request_", EVERY, ids=server)
def test_app(request_: Request, app: str, built_in: bool, others: bool) -> None:
    if request_ == DAPHNE and app.endswith("()"):
        return
    if others if request_.server in {"gunicorn", "uwsgi"} else built_in:
        passed = plan(replace(request_, app=app)).argv[-1].removeprefix("--module=")
        assert passed == (app.removesuffix("()") if request_ in (UVICORN, GRANIAN) else app)
    else:
        assert bad(replace(request_, app=app))[0] == "app"


scalars = st.booleans() | st.integers() | st.floats() | st.text()
anything = scalars | st.lists(scalars) | st.none() | st.dictionaries(st.text(), scalars)


@given(
    name=st.sampled_from(servers.SERVERS),
    options=st.dictionaries(st.text() | st.from_regex(r"[a-z][a-z_-]{1,8}"), anything, max_size=3),
)
def test_any_options_give_a_plan_or_a_named_problem(name: str, options: dict[str, object]) -> None:
    try:
        planned = plan(replace(GUNICORN, server=name, options=options))
    except BadOption as error:
        assert error.key.startswith("server_options.")
        assert error.key.removeprefix("server_options.") in options
    else:
        assert all(isinstance(word, str) and "\0" not in word for word in planned.argv)


def test_the_waitress_options_are_those_of_waitress() -> None:
    real = {name for name, _ in Adjustments._params}
    internal = {"asyncore_loop_timeout", "asyncore_use_poll"}
    assert real - internal == set(servers.WAITRESS_OPTIONS) | set(servers._WAITRESS_OWNED)


# --- what the installed servers have ----------------------------------------------------------------------------------


def click_options(module: str, name: str) -> Mapping[str, tuple[bool, bool]]:
    """Option → (it is a flag, it has a twin for false), as the command line of the installed server has it."""
    command = getattr(importlib.import_module(module), name)
    found = {}
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("--"):
                found[option[2:]] = (parameter.is_flag, bool(parameter.secondary_opts))
    return found


def argparse_options(module: str, name: str) -> set[str]:
    """The long options of a parser that stands in the source as `name.add_argument("--x", ...)`."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    return {
        str(word.value)[2:]
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant) and str(word.value).startswith("--")
    } | {"help"}


def test_the_options_of_uvicorn_are_its_own() -> None:
    pytest.importorskip("uvicorn")
    real = click_options("uvicorn.main", "main")
    assert set(asgi.UVICORN_OWNED) - {"help"} <= set(real)
    assert set(asgi.UVICORN_PAIRS) == {name for name, (_, pair) in real.items() if pair}
    assert not any(real[name][0] for name in asgi.UVICORN_WORDS)
    assert not any("_" in name for name in real)


def test_the_options_of_granian_are_its_own() -> None:
    pytest.importorskip("granian")
    real = click_options("granian.cli", "cli")
    assert set(asgi.GRANIAN_OWNED) - {"help"} <= set(real)
    pairs = {name for name, (_, pair) in real.items() if pair}
    assert set(asgi.GRANIAN_PAIRS) == pairs - set(asgi.GRANIAN_OWNED)


@pytest.mark.parametrize(
    ("module", "owned", "underscored"),
    [
        ("hypercorn.__main__", asgi.HYPERCORN_OWNED, ()),
        ("daphne.cli", asgi.DAPHNE_OWNED, asgi.DAPHNE_UNDERSCORED),
    ],
)
def test_the_options_of_hypercorn_and_daphne_are_their_own(
    module: str, owned: Mapping[str, str], underscored: tuple[str, ...]
) -> None:
    pytest.importorskip(module.partition(".")[0])
    real = argparse_options(module, "parser")
    assert {name for name, reason in owned.items() if "spelling" not in reason} <= real
    assert {name for name in real if "_" in name} == set(underscored)
# --- where they tell of their workers ---------------------------------------------------------------------------------

LONG = "/run/" + "x" * 100
TOLD: list[tuple[Request, dict[str, object], str]] = [
    (GUNICORN, {}, CONTROL),
    (GUNICORN, {"no-control-socket": True}, ""),
    (GUNICORN, {"control-socket": False}, ""),
    (UWSGI, {}, "/run/procman/shop.uwsgi/ctl"),
    (UWSGI, {"stats": True}, "/run/procman/shop.uwsgi/ctl"),
    (UWSGI, {"stats": False}, ""),
    (UWSGI, {"stats": "/run/uwsgi/stats"}, "/run/uwsgi/stats"),
    (UWSGI, {"stats-server": "127.0.0.1:9191", "stats-http": True}, "http:127.0.0.1:9191"),
    (UWSGI, {"stats-http": True}, "http:/run/procman/shop.uwsgi/ctl"),
    (UWSGI, {"stats": ":9191"}, ":9191"),
    (WSGI, {}, "/run/procman/shop.wsgi/ctl"),
    (replace(UWSGI, runtime_dir=LONG), {}, ""),
    (replace(WSGI, runtime_dir=LONG), {}, ""),
]


@pytest.mark.parametrize(("request_", "most"), [(WSGI, 107), (UWSGI, 102), (GUNICORN, 107)])
def test_the_successor_has_room_for_its_socket_too(request_: Request, most: int) -> None:
    """Its path is one byte longer."""
    for size, told in ((most - 1, True), (most, False)):
        longer = replace(request_, runtime_dir="/" + "x" * (size - len(f"//shop.{request_.server}/ctl")))
        if request_ is GUNICORN and not told:
            with pytest.raises(servers.BadOption, match="is 1 bytes longer than the 107"):
                plan(longer)
        else:
            assert len(servers.told_at(request_.server, plan(longer).argv)) == (size if told else 0)


@pytest.mark.parametrize(("request_", "options", "where"), TOLD)
def test_where_a_server_tells_of_its_workers(request_: Request, options: dict[str, object], where: str) -> None:
    planned = plan(replace(request_, options=options))
    assert servers.told_at(request_.server, planned.argv) == where
    assert sum(word.startswith(("--stats=", "--control-socket=")) for word in planned.argv) == bool(where)


@pytest.mark.parametrize(
    ("request_", "options", "http"),
    [
        (WSGI, {}, True),
        (GUNICORN, {}, True),
        (GUNICORN, {"certfile": "/pem"}, False),
        (GUNICORN, {"protocol": "uwsgi"}, False),
        (GUNICORN, {"protocol": "http"}, True),
        (UWSGI, {}, True),
        (UWSGI, {"protocol": "fastcgi"}, False),
        (UVICORN, {}, True),
        (UVICORN, {"ssl-certfile": "/pem"}, False),
        (HYPERCORN, {"certfile": "/pem"}, False),
        (DAPHNE, {}, True),
        (GRANIAN, {}, True),
        (GRANIAN, {"http": "2"}, False),
        (GRANIAN, {"ssl-certificate": "/pem"}, False),
    ],
)
def test_who_speaks_plain_http(request_: Request, options: dict[str, object], http: bool) -> None:
    planned = plan(replace(request_, options=options, ready_given=True))
    assert servers.speaks_http(request_.server, planned.argv) == http
    assert not servers.speaks_http("", planned.argv)


def test_a_command_of_the_users_own_tells_nothing() -> None:
    assert servers.told_at("", ("uwsgi", "--stats=/run/x")) == ""

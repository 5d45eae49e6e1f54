"""Starts a server that would lose a socket, or requests, if it were started by its own command:
`python -m procman.adapter SERVER BACKLOG ARGUMENT...`, or by its path, `VENV/bin/python .../procman/adapter.py ...`.

granian    has no option for a socket that is open already. Its parent makes one for its workers; here it is given
           descriptor 3 instead. So nothing is closed or refused between one granian and the next. And a worker that is
           told to stop while it starts would not hear it: it has the handlers of its parent until it has its own. And
           a stop closes every idle connection at once, and drops what was just accepted: here it accepts no more, and
           its answers say `Connection: close`, for a while before.
daphne     takes every descriptor for IPv4. A Unix socket would be its own: mode 0666, a queue of 50, and shut down and
           removed when it stops. And a stop cuts off what it works on: here `--graceful-timeout=SECONDS` is what that
           gets, and the last answer of each connection says `Connection: close`.
hypercorn  with workers: when the first of them has come to its end, the others get a SIGTERM that cuts off their work.
           And when it stops it throws away what it has read from a kept connection between two requests. Here it waits
           for the next request a while, and answers it with `Connection: close`.
uvicorn    when it stops it closes every connection between two requests at once, and drops what it has just accepted.
           Here it waits for the next request a while, and answers it with `Connection: close`.

Each is mended by replacing a few functions of the server. Where one is not as expected it says so and ends, for a
server that listens somewhere else would be worse. A granian or uvicorn whose stop can't be mended says so and serves.
This module must not know procman: it runs in the application's virtualenv.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import functools
import importlib
import os
import re
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

FIRST_FD = 3
IDLE_GRACE = 1.0
"""An idle connection is kept open so long at a stop: the next answer on it is its last one, and says so."""
LOOK_SECONDS = 0.02
TURNS = 10
"""So many turns of its loop has an asyncio to make a connection of what it has accepted: three are needed."""
GRACE, BIND, KILL, INTERFACE = "--graceful-timeout=", "--bind=fd://", "--workers-kill-timeout=", "--interface="
CLOSE = (b"connection", b"close")


def granian(backlog: int, arguments: list[str]) -> Callable[[], object]:
    """Let granian (2.5 or newer) take descriptor 3 for the socket that it has just made."""
    interface = _value(arguments, INTERFACE, "rsgi")
    patience = float(_value(arguments, KILL, "inf"))
    common, net = _module("granian.server.common"), _module("granian.net")
    server, holder = _inside(common, "AbstractServer"), _inside(net, "SocketHolder")
    for name in ("_init_shared_socket", "_bind_addr_fmt"):
        _inside(server, name)
    worker = _inside(_module("granian.server.mp"), "WorkerProcess")
    spawn = _inside(worker, "_spawn")
    with socket.socket(fileno=os.dup(FIRST_FD)) as inherited:
        is_unix, where = inherited.family == socket.AF_UNIX, inherited.getsockname()
    try:
        held = holder(FIRST_FD, is_unix, backlog)
    except TypeError as error:
        raise _unknown("granian.net.SocketHolder", str(error)) from error

    def inherit(self: Any) -> None:
        self._ssp, self._shd, self._sfd = None, held, FIRST_FD

    def with_default_signals(self: object, target: Callable[..., object], arguments: object) -> None:
        spawn(self, functools.partial(_obedient, target, interface, min(IDLE_GRACE, patience / 2)), arguments)

    worker._spawn = with_default_signals
    server._init_shared_socket = inherit
    server._bind_addr_fmt = f"unix:{where}" if is_unix else f"{where[0]}:{where[1]}"
    run: Callable[[], object] = _inside(_module("granian.cli"), "entrypoint")
    return run


def _value(arguments: list[str], option: str, default: str) -> str:
    """Of an option among `arguments`, the last one."""
    return ([default] + [word.removeprefix(option) for word in arguments if word.startswith(option)])[-1]


def _obedient(target: Callable[..., object], interface: str, grace: float, *arguments: object) -> object:
    """In a worker of granian: until it has handlers of its own, a signal ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    parts = [part for argument in arguments if isinstance(argument, tuple) for part in argument]
    listener = next((part for part in parts if isinstance(part, socket.socket)), None)
    _as_far_as_known(_drain_granian, interface, grace, listener)
    return target(*arguments)


def _drain_granian(interface: str, grace: float, listener: socket.socket | None) -> None:
    """In a worker: when it is told to stop, let it go on for up to `grace` seconds, as long as it has connections. It
    accepts no more, and every answer is the last one of its connection."""
    worker, signals = _module("granian.server.mp"), _module("granian._signals")
    told = threading.Event()
    name = "_asgi_call_wrap" if interface == "asginl" else f"_{interface}_call_wrap"
    wrap, telling = _inside(worker, name), {"wsgi": _tell_wsgi, "rsgi": _tell_rsgi}.get(interface, _tell_asgi)

    def prepare(begin: Callable[..., Any], *loop: Any) -> Any:
        stop = begin(*loop)

        def leave(*_: object) -> None:
            if told.is_set() or listener is None:
                stop.set()
            else:
                told.set()
                threading.Thread(target=_run_dry, args=(listener, grace, stop.set), daemon=True).start()

        try:
            loop[0].add_signal_handler(signal.SIGTERM, leave)
        except (IndexError, NotImplementedError):
            signal.signal(signal.SIGTERM, leave)
        return stop

    setattr(worker, name, lambda application, *rest: wrap(telling(application, told), *rest))
    for each in ("set_loop_signals", "set_sync_signals"):
        setattr(signals, each, functools.partial(prepare, _inside(signals, each)))


def _run_dry(listener: socket.socket, grace: float, end: Callable[[], object]) -> None:
    """Accept no more, and call `end` when no connection is left, or `grace` seconds are over."""
    name, until = listener.getsockname(), time.monotonic() + grace
    _put_aside(listener)
    while time.monotonic() < until and any(_came_to(name, descriptor) for descriptor in _descriptors()):
        time.sleep(LOOK_SECONDS)
    end()


def _put_aside(listener: socket.socket) -> None:
    """Let each descriptor of `listener` in this process be one at which nobody ever comes: who waits at the true one is
    left to others. (It is closed nowhere, and shutdown(2) would end it for all.)"""
    me = os.fstat(listener.fileno())
    with socket.socket(socket.AF_UNIX) as nobodys:
        nobodys.bind("")  # a name of the kernel's
        nobodys.listen(1)
        nobodys.setblocking(False)
        for descriptor in _descriptors():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), me):
                    os.dup2(nobodys.fileno(), descriptor, inheritable=False)


def _came_to(name: object, descriptor: int) -> bool:
    """Whether it is a connection of the listener with this name."""
    copy = -1
    try:
        copy = os.dup(descriptor)
        with socket.socket(fileno=copy) as found:
            copy = -1
            found.getpeername()
            here = found.getsockname()
    except OSError:
        return False
    finally:
        if copy >= 0:
            os.close(copy)
    return bool(here == name or (isinstance(here, tuple) and isinstance(name, tuple) and here[1] == name[1]))


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _tell_asgi(application: Callable[..., Any], told: threading.Event) -> Callable[..., Any]:
    """The application, whose answers say `Connection: close` from the moment when `told` is set."""

    def telling(scope: Any, receive: object, send: Callable[[Any], Any]) -> Any:
        def last(event: Any) -> Any:
            if told.is_set() and event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), CLOSE]}
            return send(event)

        plain = scope["type"] == "http" and scope["http_version"].startswith("1")
        return application(scope, receive, last if plain else send)

    return telling


def _tell_wsgi(application: Callable[..., Any], told: threading.Event) -> Callable[..., Any]:
    """The same for WSGI."""

    def telling(environ: Any, start_response: Callable[..., Any]) -> Any:
        def last(status: str, headers: Any, *rest: object) -> Any:
            more = [("Connection", "close")] if told.is_set() else []
            return start_response(status, [*headers, *more], *rest)

        return application(environ, last if environ["SERVER_PROTOCOL"].startswith("HTTP/1") else start_response)

    return telling


class _LastAnswer:
    """What a request of RSGI is answered by, as it is, but for its headers."""

    def __init__(self, protocol: Any, told: threading.Event) -> None:
        self._protocol, self._told = protocol, told

    def __call__(self) -> Any:
        return self._protocol()

    def __aiter__(self) -> Any:
        return self._protocol.__aiter__()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._protocol, name)
        return functools.partial(self._answer, found) if name.startswith("response_") else found

    def _answer(self, answer: Callable[..., Any], status: int, headers: Any, *rest: object) -> Any:
        more = [("connection", "close")] if self._told.is_set() else []
        return answer(status, [*headers, *more], *rest)


def _tell_rsgi(application: Callable[..., Any], told: threading.Event) -> Callable[..., Any]:
    """The same for RSGI."""

    def telling(scope: Any, protocol: Any) -> Any:
        plain = scope.proto == "http" and scope.http_version.startswith("1")
        return application(scope, _LastAnswer(protocol, told) if plain else protocol)

    return telling


def daphne(backlog: int, arguments: list[str]) -> Callable[[], object]:
    """Let daphne's `fd:fileno=N` be whatever kind of socket it is. Let Twisted leave the file of an inherited Unix
    socket alone, and its queue as long as it was. Takes `--graceful-timeout=` out of `arguments`."""
    if arguments and arguments[0].startswith(GRACE):
        _drain_daphne(float(arguments.pop(0).removeprefix(GRACE)))
    endpoints, unix = _module("twisted.internet.endpoints"), _module("twisted.internet.unix")
    endpoint, port = _inside(endpoints, "AdoptedStreamServerEndpoint"), _inside(unix, "Port")
    prepare, adopt = endpoint.__init__, _inside(port, "_fromListeningDescriptor")
    _inside(unix, "_inFilesystemNamespace")
    _inside(port, "_shouldShutdown")

    def with_its_family(self: object, reactor: object, fd: int, family: object) -> None:
        with socket.socket(fileno=os.dup(fd)) as inherited:
            prepare(self, reactor, fd, inherited.family)

    def with_its_backlog(reactor: object, fd: int, factory: object) -> object:
        adopted = adopt(reactor, fd, factory)
        adopted.backlog = backlog
        adopted._shouldShutdown = False  # shutdown(2) would end the socket for all who hold it
        return adopted

    endpoint.__init__ = with_its_family
    port._fromListeningDescriptor = with_its_backlog
    unix._inFilesystemNamespace = lambda path: False
    run: Callable[[], object] = _inside(_inside(_module("daphne.cli"), "CommandLineInterface"), "entrypoint")
    return run


class _Drain:
    """The end of a daphne. It takes no new connections, answers what is asked on those that it has, and closes them."""

    def __init__(self, seconds: float) -> None:
        self._reactor = _module("twisted.internet.reactor")
        self._port = _inside(_module("twisted.internet.tcp"), "Port")
        self._channels: set[Any] = set()
        self._seconds, self._began = seconds, -1.0

    def opened(self, channel: Any) -> None:
        self._channels.add(channel)

    def closed(self, channel: Any) -> None:
        self._channels.discard(channel)

    def persists(self, request: Any) -> bool:
        """Whether the connection of `request` may go on after it."""
        if self._began >= 0:
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
        return self._began < 0

    def begin(self) -> Any:
        """Comes in the place of an end at once. Returns the Deferred that daphne's end waits for."""
        self._began = self._reactor.seconds()
        done = _module("twisted.internet.defer").Deferred()
        for reader in self._reactor.getReaders():  # daphne keeps no list of its ports
            if isinstance(reader, self._port):
                reader.stopReading()
        for channel in self._channels:
            if channel.requests and channel._handlingRequest:
                channel.persistent = False
                if not channel.requests[-1].startedWriting:
                    self.persists(channel.requests[-1])
        self._look(done)
        return done

    def _look(self, done: Any) -> None:
        passed = self._reactor.seconds() - self._began
        for channel in list(self._channels):
            if any(request.transport is None for request in channel.requests):
                self.closed(channel)  # it is a websocket now, and nobody's answer is due
            elif not channel.requests and passed >= IDLE_GRACE:
                channel.loseConnection()
        if self._channels and passed < self._seconds:
            self._reactor.callLater(LOOK_SECONDS, self._look, done)
        else:
            done.callback(None)


def _drain_daphne(seconds: float) -> None:
    """Give what a daphne works on so long when it is told to stop."""
    server = _inside(_module("daphne.server"), "Server")  # first: it says which reactor there is
    channel = _inside(_module("twisted.web.http"), "HTTPChannel")
    made, lost = _inside(channel, "connectionMade"), _inside(channel, "connectionLost")
    persistence = _inside(channel, "checkPersistence")
    start, end = _inside(server, "run"), _inside(server, "kill_all_applications")
    drains: list[_Drain] = []

    def run(self: Any) -> None:
        drains.append(_Drain(seconds))
        start(self)

    def connection_made(self: Any) -> None:
        drains[0].opened(self)
        made(self)

    def connection_lost(self: Any, reason: object) -> None:
        drains[0].closed(self)
        lost(self, reason)

    def check_persistence(self: Any, request: Any, version: object) -> object:
        return persistence(self, request, version) and drains[0].persists(request)

    def drain(self: Any) -> Any:
        return drains[0].begin().addCallback(lambda _: end(self))

    channel.connectionMade, channel.connectionLost = connection_made, connection_lost
    channel.checkPersistence = check_persistence
    server.run, server.kill_all_applications = run, drain


def hypercorn(backlog: int, arguments: list[str]) -> Callable[[], object]:
    """Let its workers be started with SIGTERM blocked: the parent tells them to stop by an event, and waits for each.
    (The backlog is an option of its own.)"""
    parent = _module("hypercorn.run")
    populate = _inside(parent, "_populate")

    def with_sigterm_blocked(processes: object, config: object, worker: Callable[..., object], *rest: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            populate(processes, config, functools.partial(_patient, worker, _bound(arguments)), *rest)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    parent._populate = with_sigterm_blocked
    _drain_hypercorn(_bound(arguments))
    run: Callable[[], object] = _inside(_module("hypercorn.__main__"), "main")
    return run


def _bound(arguments: list[str]) -> list[int]:
    """The descriptors that a hypercorn listens on."""
    return [int(word.removeprefix(BIND)) for word in arguments if word.startswith(BIND)]


def _patient(target: Callable[..., object], listening: list[int], *arguments: object, **named: object) -> object:
    """In a worker of hypercorn."""
    _drain_hypercorn(listening)
    return target(*arguments, **named)


class _Lasting:
    """The context of a hypercorn, for a connection that goes on until an answer has said that it is the last one."""

    def __init__(self, context: Any) -> None:
        self.true = context
        self.terminated = self

    def is_set(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)


async def _accept_no_more(listening: list[int]) -> None:
    """Leave who waits at these to a successor. Let asyncio make a connection of whom it has accepted: else, when the
    server closes, it would drop them."""
    loop = asyncio.get_running_loop()
    for descriptor in listening:
        loop.remove_reader(descriptor)
    for _ in range(TURNS):
        await asyncio.sleep(0)


def _drain_hypercorn(listening: list[int]) -> None:
    """Let what has come on a kept connection, or on one that was just accepted, be answered when a hypercorn is told to
    stop."""
    protocol = _inside(_module("hypercorn.protocol.h11"), "H11Protocol")
    server = _inside(_module("hypercorn.asyncio.tcp_server"), "TCPServer")
    prepare, send = protocol.__init__, _inside(protocol, "stream_send")
    worker = _inside(_module("hypercorn.asyncio.worker_context"), "WorkerContext")
    begin = worker.__init__
    for owner, name in ((server, "_idle_timeout"), (server, "_initiate_server_close"), (protocol, "_maybe_recycle")):
        _inside(owner, name)

    def prepare_lasting(self: Any, app: object, config: object, context: object, *rest: object) -> None:
        prepare(self, app, config, _Lasting(context), *rest)

    async def send_last(self: Any, event: object) -> None:
        if self.context.true.terminated.is_set():  # its own way to say `Connection: close`
            self.keep_alive_requests = max(self.keep_alive_requests, self.config.keep_alive_max_requests)
        await send(self, event)

    def has_part(self: Any) -> bool:
        connection = getattr(self.protocol.protocol, "connection", None)
        trailing = getattr(connection, "trailing_data", None)
        return bool(self.reader._buffer or (trailing and trailing[0]))

    async def idle_timeout(self: Any) -> None:
        # Not wait_for(): before Python 3.12 it may forget that a request has come and cancelled this task.
        terminated = asyncio.ensure_future(self.context.terminated.wait())
        try:
            await asyncio.wait({terminated}, timeout=self.config.keep_alive_timeout)
        finally:
            terminated.cancel()
        if self.context.terminated.is_set():
            await asyncio.sleep(IDLE_GRACE)
            while has_part(self):  # a whole request ends this task; hypercorn's own timeout ends all
                await asyncio.sleep(LOOK_SECONDS)
        await asyncio.shield(self._initiate_server_close())

    def begin_patient(self: Any, *rest: object) -> None:
        begin(self, *rest)
        end = self.terminated.set

        async def accept_no_more_and_end() -> None:
            await _accept_no_more(listening)
            await end()

        self.terminated.set = accept_no_more_and_end

    worker.__init__ = begin_patient
    protocol.__init__, protocol.stream_send = prepare_lasting, send_last
    server._idle_timeout = idle_timeout


def uvicorn(backlog: int, arguments: list[str]) -> Callable[[], object]:
    """Let it drain when it stops, its workers too. (The backlog is an option of its own.)"""
    run: Callable[[], object] = _inside(_module("uvicorn.main"), "main")

    def drain_workers() -> None:
        parent = _module("uvicorn.supervisors.multiprocess")
        make = _inside(parent, "get_subprocess")

        def with_drain(config: object, target: Callable[..., object], *rest: object) -> object:
            return make(config, functools.partial(_draining, target), *rest)

        parent.get_subprocess = with_drain

    for drain in (_drain_uvicorn, drain_workers):
        _as_far_as_known(drain)
    return run


def _draining(target: Callable[..., object], *arguments: object, **named: object) -> object:
    """In a worker of uvicorn."""
    _as_far_as_known(_drain_uvicorn)
    return target(*arguments, **named)


def _drain_uvicorn() -> None:
    """Let what has come on a kept connection, or on one that was just accepted, be answered when a uvicorn is told to
    stop. All within its own `--timeout-graceful-shutdown`."""
    server = _inside(_module("uvicorn.server"), "Server")
    shut_down, wait = _inside(server, "shutdown"), _inside(server, "_wait_tasks_to_complete")
    for name in ("connections", "default_headers"):
        _inside(_inside(_module("uvicorn.server"), "ServerState")(), name)

    async def shut_down_slowly(self: Any, sockets: Any = None) -> None:
        for each in self.servers:
            await _accept_no_more([sock.fileno() for sock in each.sockets])
            each.close()
        state = self.server_state
        state.default_headers = [*state.default_headers, CLOSE]
        self._not_http = {connection for connection in state.connections if _is_busy(connection) is None}
        for connection in state.connections - self._not_http:
            connection.shutdown = functools.partial(_say_last, connection, state.default_headers)
        await shut_down(self, sockets)

    async def wait_for_last_answers(self: Any) -> None:
        await _close_idle(self, self._not_http)
        await wait(self)

    server.shutdown, server._wait_tasks_to_complete = shut_down_slowly, wait_for_last_answers


def _is_busy(connection: Any) -> bool | None:
    """Whether a request has come on a connection of uvicorn, at least in part, and is not answered; None for one that
    is no HTTP/1.1 (any more)."""
    if not hasattr(connection, "cycle"):
        return None
    cycle, scope = connection.cycle, connection.scope
    if (cycle is not None and not cycle.response_complete) or connection.transport.get_write_buffer_size():
        return True
    of_h11, _ = getattr(getattr(connection, "conn", None), "trailing_data", (b"", False))
    of_httptools = scope is not None and (cycle is None or cycle.scope is not scope)
    unread = array.array("i", [0])
    fcntl.ioctl(connection.transport.get_extra_info("socket").fileno(), termios.FIONREAD, unread)
    return bool(of_h11 or of_httptools or unread[0])


def _say_last(connection: Any, headers: list[Any]) -> None:
    """In the place of a shutdown: what is worked on is the last answer, if its head is not out yet."""
    cycle = connection.cycle
    if cycle is not None and not cycle.response_started:
        cycle.default_headers = headers


async def _close_idle(server: Any, told: set[Any]) -> None:
    """Until there is no connection left but those that are `told` to end."""
    loop = asyncio.get_running_loop()
    began, last_used = loop.time(), dict[Any, float]()
    while (left := server.server_state.connections - told) and not server.force_exit:
        for connection in left:
            if connection.transport.is_closing():
                continue
            busy = _is_busy(connection)
            seen = last_used.setdefault(connection, began if busy is not None else loop.time())
            if busy:
                last_used[connection] = loop.time()
            elif loop.time() - seen >= IDLE_GRACE:
                type(connection).shutdown(connection)
                told |= {connection} if busy is None else set()
        await asyncio.sleep(LOOK_SECONDS)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        sys.exit(f"procman: can't start the server: there is no module {error.name!r} for {sys.executable}")
    except ImportError as error:  # one of its own modules misses something in another
        missing = re.search(r"cannot import name '(\w+)'", str(error))
        raise _unknown(f"{error.name}.{missing[1]}" if missing else name, "it is not there") from error


def _inside(owner: Any, name: str) -> Any:
    """An attribute that this module counts on."""
    if not hasattr(owner, name):
        where = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        raise _unknown(f"{where}.{name}", "it is not there")
    return getattr(owner, name)


NO_SOCKET, NO_DRAIN = "can't hand the socket over", "a stop may lose what comes on kept connections"


def _unknown(what: str, why: str) -> SystemExit:
    return SystemExit(f"procman: {NO_SOCKET}: {what} is not as this procman knows it ({why})")


def _as_far_as_known(drain: Callable[..., None], *arguments: object) -> None:
    """Mend the stop of a server that serves all the same where it is not as expected: then that is only said."""
    try:
        drain(*arguments)
    except SystemExit as unknown:
        sys.stderr.write(f"{unknown}\n".replace(NO_SOCKET, NO_DRAIN))


SERVERS = {"granian": granian, "daphne": daphne, "hypercorn": hypercorn, "uvicorn": uvicorn}


def main() -> None:
    """Becomes the server."""
    server, backlog, *arguments = sys.argv[1:]
    here = os.path.dirname(os.path.realpath(__file__))
    if os.path.realpath(sys.path[0]) == here:  # by its path: else procman's modules would hide the application's
        sys.path[0] = os.getcwd()
    run = SERVERS[server](int(backlog), arguments)
    sys.argv = [server, *arguments]
    sys.exit(run())  # type: ignore[arg-type]  # what they return is what sys.exit takes


if __name__ == "__main__":
    main()

"""Starts a server that would lose a socket, or requests, if it were started by its own command:
`python -m procman.adapter SERVER BACKLOG ARGUMENT...`, or by its path, `VENV/bin/python .../procman/adapter.py ...`.

granian    has no option for a socket that is open already. Its parent makes one for its workers; here it is given
           descriptor 3 instead. So nothing is closed or refused between one granian and the next. And a worker that is
           told to stop while it starts would not hear it: it has the handlers of its parent until it has its own.
daphne     takes every descriptor for IPv4. A Unix socket would be its own: mode 0666, a queue of 50, and shut down and
           removed when it stops. And a stop cuts off what it works on: here `--graceful-timeout=SECONDS` is what that
           gets, and the last answer of each connection says `Connection: close`.
hypercorn  with workers: when the first of them has come to its end, the others get a SIGTERM that cuts off their work.
           And when it stops it throws away what it has read from a kept connection between two requests. Here it waits
           for the next request a while, and answers it with `Connection: close`.

Each is mended by replacing a few functions of the server. Where one is not as expected it says so and ends, for a
server that listens somewhere else would be worse. It must not know procman: it runs in the application's virtualenv.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

FIRST_FD = 3
IDLE_GRACE = 1.0
"""Daphne and hypercorn keep an idle connection open so long when they stop: the next answer on it is its last one, and
says so."""
LOOK_SECONDS = 0.02
TURNS = 10
"""So many turns of its loop has an asyncio to make a connection of what it has accepted: three are needed."""
GRACE, BIND = "--graceful-timeout=", "--bind=fd://"


def granian(backlog: int, arguments: list[str]) -> Callable[[], object]:
    """Let granian (2.5 or newer) take descriptor 3 for the socket that it has just made."""
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
        spawn(self, functools.partial(_obedient, target), arguments)

    worker._spawn = with_default_signals
    server._init_shared_socket = inherit
    server._bind_addr_fmt = f"unix:{where}" if is_unix else f"{where[0]}:{where[1]}"
    run: Callable[[], object] = _inside(_module("granian.cli"), "entrypoint")
    return run


def _obedient(target: Callable[..., object], *arguments: object) -> object:
    """In a worker of granian: until it has handlers of its own, a signal ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    return target(*arguments)


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


def _unknown(what: str, why: str) -> SystemExit:
    return SystemExit(f"procman: can't hand the socket over: {what} is not as this procman knows it ({why})")


SERVERS = {"granian": granian, "daphne": daphne, "hypercorn": hypercorn}


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

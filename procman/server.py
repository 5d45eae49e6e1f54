"""The Unix socket that `procmanctl` talks to: who may connect, and what one connection may cost.

METHODS (from `methods`) are the rows; this module turns lines into calls of them. Nothing that a client sends may raise
out of here, stall the loop or grow the daemon: each bound is a constant below. It knows no program and no process: all
work is done by the `Operations` it is given.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import select
import socket
import struct
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from procman.records import dataclass

from . import rpc
from .crossing import crossing
from .errors import Failed, NotAllowed, ProcmanError, is_shortage
from .logread import Held
from .methods import METHODS, Call, Operations, Role, bind
from .reading import Reading
from .rpc import Object, Peer, RpcError
from .values import suggestion

MAX_CONNECTIONS = 1024
MAX_EACH = 256  # connections of one user; root and the daemon's own may have all
SHARE = 0.75  # of each bound for all together: the most that is left to peers who may not operate
STRANGER = 1.0  # seconds that a peer without any role may stay connected
MAX_QUEUED = 64 * 1024  # bytes read ahead while a call is at work; then the client waits
MAX_UNREAD = 4 * 1024 * 1024  # bytes of answers that a client may leave unread on one connection
MAX_HELD = 64 * 1024 * 1024  # bytes of half-sent requests, and of unread answers, on all connections together
PATIENCE = 30.0  # seconds for the rest of a line, and for reading what was sent
QUIET = 60.0  # seconds in which it is not said again that nobody can be let in
HELD_EACH = 256  # files of logs that are held open for one connection
HELD_ALL = 1024  # and for all together; no more than a quarter of the descriptors that this process may have
HELD_SECONDS = 60.0  # since the last call: a reader that has been left in a pager does not keep room on the disk
FLUSH = 1.0  # seconds for last answers when the daemon goes

SO_PEERGROUPS = 59  # unix(7), since Linux 4.13; Python has no name for it
T = TypeVar("T")
_LOG = logging.getLogger("procman.rpc")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what. `uid` is the daemon's own; the groups are -1 where none is named."""

    uid: int
    operate_gid: int = -1
    look_gid: int = -1

    def role(self, uid: int, groups: frozenset[int]) -> Role | None:
        """The most that a peer may do, None when it may do nothing."""
        if uid in (0, self.uid) or self.operate_gid in groups:
            return "operate"
        return "look" if self.look_gid in groups else None


class Server:
    """Answers on `listening`, a bound Unix stream socket, which it owns from `start` on.

    `access` may be replaced at any time; it counts from the next call on, also on open connections.
    """

    def __init__(self, listening: socket.socket, operations: Operations, access: Access) -> None:
        self.access = access
        self.operations = operations
        self.reading = Reading()
        self.connections: set[Connection] = set()
        self.held = 0  # bytes of requests that are not yet answered, over all connections
        self._listening = listening
        self._server: asyncio.Server | None = None
        self._quiet_until = 0.0
        self._running: set[asyncio.Task[Any]] = set()
        self._serving: set[asyncio.Task[None]] = set()  # also of connections that are closed, until they have ended
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Starts to accept. Clients that connected since the socket was bound have been waiting in its backlog."""
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self)

        # A socket that the keeper holds must keep its path when we go: 3.13 would remove it.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        # One accept(2) at a time: after one that found no free descriptor asyncio would try, and log, all the others.
        self._server = await loop.create_unix_server(connection, sock=self._listening, backlog=1, **options)
        self._listening.listen(MAX_CONNECTIONS)  # the queue of the socket itself is as long as before
        loop.set_exception_handler(self._mistake)

    def _mistake(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody caught. A shortage while accepting is none: asyncio tries again each second, and the clients wait
        in the backlog."""
        error = context.get("exception")
        if error is None or not is_shortage(error) or "socket" not in context:
            loop.default_exception_handler(context)
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + QUIET
            _LOG.error("no new client can be let in: %s", error)

    async def close(self) -> None:
        """Accepts no more, cancels the calls at work, and gives the last answers FLUSH seconds to be read."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._serving, *self._running]
        for connection in list(self.connections):
            connection.close()
        for task in self._running:
            task.cancel()
        try:
            async with asyncio.timeout(FLUSH):
                await self._empty.wait()
        except TimeoutError:
            for connection in list(self.connections):
                connection.drop()
            await self._empty.wait()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reading.close()

    async def outlive(self, operation: Coroutine[Any, Any, Any]) -> Any:
        """The result of an operation that goes on when its client has gone."""
        task = asyncio.get_running_loop().create_task(operation)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # asked for, so that nobody complains when the client has gone

    def joined(self, connection: Connection) -> None:
        """A connection is open; told by the connection itself."""
        self.connections.add(connection)
        self._empty.clear()

    def serve(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The task of a connection, which `close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return task

    def room_to_hold(self, connection: Connection) -> int:
        """How many files of logs this connection may hold open."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        others = sum(len(other.held) for other in self.connections if other is not connection)
        return max(0, min(HELD_EACH, HELD_ALL - others, limit - others))

    def crowded(self, connection: Connection) -> bool:
        """Whether this new connection is one too many: of all, or of its user."""
        uid = connection.peer.uid
        if len(self.connections) > MAX_CONNECTIONS * connection.share():
            return True
        mine = sum(other.peer.uid == uid for other in self.connections)
        return uid not in (0, self.access.uid) and mine > MAX_EACH

    def left(self, connection: Connection) -> None:
        """A connection is closed; told by the connection itself."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def unread(self) -> int:
        """Bytes of answers that all clients together have not yet read."""
        return sum(connection.unread() for connection in self.connections)


class Connection(asyncio.Protocol):
    """One client: reads lines, answers them in order. Its one task lives as long as the connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer known to hold no newline
        self._ended = False  # the client sends no more; it may still read
        self._waiting = False  # for the rest of a line
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._deadline: asyncio.TimerHandle | None = None
        self._hangup: select.epoll | None = None
        self.task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self.peer = Peer(0, 0)
        self._stranger: asyncio.TimerHandle | None = None
        self._groups: frozenset[int] = frozenset()
        self.held = Held()
        self._let_go: asyncio.TimerHandle | None = None

    # --- what asyncio tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        self.peer, self._groups = _peer(self._socket)
        self._server.joined(self)
        if self._server.crowded(self):
            self._refuse(Failed("the daemon has too many connections", hint="close some clients, then try again"))
            return
        if self.role() is None:
            self._stranger = asyncio.get_running_loop().call_later(STRANGER, self._turn_away)
        self.task = self._server.serve(self._serve())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._server.held += len(data)
        if self._server.held > MAX_HELD * self.share():
            self._refuse(Failed("the daemon holds too many unfinished requests", hint="try again"))
        elif not self._waiting and len(self._buffer) > MAX_QUEUED:
            self._transport.pause_reading()
            self._watch_hangup()
        self._arrived.set()

    def eof_received(self) -> bool:
        self._ended = True
        self._arrived.set()
        if _hung_up(self._socket):
            return False
        self._watch_hangup()  # it has only shut down its sending side, as `nc -N` does, and wants its answers
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._stranger is not None:
            self._stranger.cancel()
        self._unwatch_hangup()
        self._hold(for_a_while=False)
        self.held.close()
        self._forget()
        self._writable.set()
        self._server.left(self)

    def pause_writing(self) -> None:
        self._writable.clear()
        self._drop_later()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._deadline is not None and not self._transport.is_closing():
            self._deadline.cancel()
            self._deadline = None

    # --- who it is

    def role(self) -> Role | None:
        """What this peer may do now."""
        return self._server.access.role(self.peer.uid, self._groups)

    def share(self) -> float:
        """How much of the bounds for all connections it may use up: something must be left for operators."""
        return 1.0 if self.role() == "operate" else SHARE

    def _not_allowed(self, role: Role | None, wanted: str) -> NotAllowed:
        uid = self.peer.uid
        return NotAllowed(
            f"uid {uid} may not {wanted} here" if role is None else f"uid {uid} may only look",
            hint="root, the daemon's own user and the groups named in [daemon] of the program table may",
        )

    def _turn_away(self) -> None:
        """A peer without a role has asked nothing in its time: others need the place."""
        if self.role() is None:
            self._refuse(self._not_allowed(None, "connect"))
            if self.unread():
                self.drop()

    # --- one call after the other

    async def _serve(self) -> None:
        try:
            while line := await self._line():
                if not line.isspace():
                    await self._answer(line)
                    if self.role() is None:
                        break  # it has its answer, and gets no other
                await asyncio.sleep(0)  # a client that sends 100,000 tiny requests at once takes turns with the others
        except ProcmanError as error:
            self._refuse(error)
        else:
            self.close()

    async def _line(self) -> bytes:
        """The next line; b"" at the end. What stands before the end without a newline counts as a line."""
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        while True:
            end = self._buffer.find(b"\n", self._scanned) + 1
            if not end and self._ended:
                end = len(self._buffer)
            if (end or len(self._buffer)) > rpc.MAX_REQUEST:
                raise RpcError(rpc.INVALID_REQUEST, f"a request has at most {rpc.MAX_REQUEST} bytes")
            if end or self._ended:
                line = bytes(self._buffer[:end])
                del self._buffer[:end]
                self._server.held -= end
                self._scanned = 0
                return line
            self._scanned = len(self._buffer)
            if self._buffer and deadline is None:
                deadline = loop.time() + PATIENCE
            await self._more(deadline)

    async def _more(self, deadline: float | None) -> None:
        self._arrived.clear()
        self._waiting = True
        self._unwatch_hangup()
        self._transport.resume_reading()
        try:
            async with asyncio.timeout_at(deadline):
                await self._arrived.wait()
        except TimeoutError:
            raise RpcError(rpc.INVALID_REQUEST, f"the rest of the line did not come in {PATIENCE:g} s") from None
        finally:
            self._waiting = False

    async def _answer(self, line: bytes) -> None:
        request: rpc.Request | None = None
        try:
            request = rpc.decode(line)
            crossing(f"asked {request.method}")
            reply = rpc.encode_result(request.id, await self._call(request))
        except RpcError as error:
            reply = rpc.encode_error(request.id if request else error.id, error)
        except ProcmanError as error:
            reply = rpc.encode_error(request.id if request else None, error)
        except Exception:  # noqa: BLE001  a bug of ours must not end the connection, let alone the daemon
            _LOG.exception("the call of %r by uid %d failed", request and request.method, self.peer.uid)
            bug = RpcError(rpc.INTERNAL, "the daemon failed to answer this")
            reply = rpc.encode_error(request.id if request else None, bug)
        if request is None or not request.silent:
            crossing("answer")
            self.send(reply)
            crossing("answered")
        await self.drained()

    async def _call(self, request: rpc.Request) -> object:
        method = METHODS.get(request.method)
        if method is None:
            near = suggestion(request.method[:80], METHODS)
            raise RpcError(rpc.NO_SUCH_METHOD, f"no such method: {request.method[:80]!r}{near}")
        role = self.role()
        if role not in ("operate", method.role):
            raise self._not_allowed(role, method.role)
        params = bind(method, request.params)
        answered = False

        def mention(name: str, said: Object) -> None:
            """An operation may outlive its call; what it says then belongs to no call of this client."""
            if not answered:
                self._mention(name, said)

        self._hold(for_a_while=False)
        call = Call(params, self.peer, self._tell, mention, self._server.outlive, self._read, self._holds)
        try:
            return await method.function(self._server.operations, call)
        finally:
            answered = True
            self._hold(for_a_while=True)

    def _holds(self) -> Held:
        self.held.room = self._server.room_to_hold(self)
        return self.held

    def _hold(self, *, for_a_while: bool) -> None:
        """Files of logs are held while a call is at work, and some time after that."""
        if self._let_go is not None:
            self._let_go.cancel()
            self._let_go = None
        if for_a_while and self.held:
            self._let_go = asyncio.get_running_loop().call_later(HELD_SECONDS, self.held.close)

    async def _read(self, work: Callable[[], T], /) -> T:
        return await self._server.reading.run(self.peer.uid, work)

    # --- what goes out

    async def _tell(self, method: str, params: Object) -> None:
        self._mention(method, params)
        await self.drained()

    def _mention(self, method: str, params: Object) -> None:
        self.send(rpc.encode_notification(method, params))

    def send(self, line: bytes) -> None:
        """Sends a line, or drops a client that has left too much unread already."""
        if self._transport.is_closing():
            return
        mine = self.unread()
        big = mine + len(line) > MAX_QUEUED
        if mine > MAX_UNREAD or (big and self._server.unread() > MAX_HELD * self.share()):
            self.drop()
            return
        self._transport.write(line)

    async def drained(self) -> None:
        """Waits until the client has read most of what was sent to it."""
        await self._writable.wait()

    def unread(self) -> int:
        """Bytes sent that the client has not yet read (what the kernel holds is not counted)."""
        return self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Cancels the call at work and closes as soon as the client has read what was sent to it."""
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        self._transport.close()
        self._drop_later()

    def drop(self) -> None:
        """Closes now."""
        self._transport.abort()

    def _forget(self) -> None:
        self._server.held -= len(self._buffer)
        self._buffer.clear()

    def _refuse(self, error: ProcmanError) -> None:
        self._forget()
        self.send(rpc.encode_error(None, error))
        self.close()

    def _drop_later(self) -> None:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(PATIENCE, self.drop)

    # --- knowing that a client has gone while we don't read from it

    def _watch_hangup(self) -> None:
        """Reads no more, so an end of file is not seen. EPOLLHUP, "both sides are shut down", is told in any case."""
        if self._hangup is not None:
            return
        try:
            self._hangup = select.epoll()
        except OSError:
            return  # out of descriptors: then the next answer finds out
        self._hangup.register(self._socket.fileno(), 0)
        asyncio.get_running_loop().add_reader(self._hangup.fileno(), self.drop)

    def _unwatch_hangup(self) -> None:
        if self._hangup is not None:
            asyncio.get_running_loop().remove_reader(self._hangup.fileno())
            self._hangup.close()
            self._hangup = None


def _peer(connected: socket.socket) -> tuple[Peer, frozenset[int]]:
    """Who connected, and its groups, as they were then: SO_PEERCRED and SO_PEERGROUPS, unix(7)."""
    pid, uid, gid = struct.unpack("=iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = connected.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:  # an older kernel, or more than 256 groups: then its main group counts
        raw = b""
    return Peer(pid, uid), frozenset({gid, *struct.unpack(f"={len(raw) // 4}I", raw)})


def _hung_up(connected: socket.socket) -> bool:
    """Whether the other end is closed, not only its sending side: POLLHUP, poll(2)."""
    poll = select.poll()
    poll.register(connected.fileno(), 0)
    return bool(poll.poll(0))

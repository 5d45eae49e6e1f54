"""A blocking client of the daemon's socket: one connection, one call at a time.

    with Client(path) as client:
        for info in client.call("status"):
            print(info["name"], info["state"])

It knows the wire (`rpc`), not the methods: their names and params are the caller's matter. Errors of the daemon come as
the same ProcmanError children that the daemon raised.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from . import rpc
from .errors import ProcmanError, Unreachable
from .rpc import Object

_RECEIVE = 256 * 1024  # bytes at a time

ASK_AGAIN = frozenset({"status", "show", "why", "daemon.status", "logs.files", "logs.read"})
"""Methods that change nothing: asked once more when the daemon's supervisor is replaced under the call."""


QUIET_SECONDS = 2.0
"""A daemon that is well has answered a question by then."""


class Closed(Unreachable):
    """The daemon was there and closed the connection: it ends, or its supervisor is being replaced."""


class Client:
    """A connection to the daemon at `path`, opened by the first call.

    `timeout` is how many seconds the daemon may stay silent, None for ever. Raises Unreachable when nobody answers.
    `on_quiet` is called when the answer to a mere question takes longer than QUIET_SECONDS.
    """

    def __init__(
        self, path: str, timeout: float | None = None, on_quiet: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self._on_quiet = on_quiet
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer known to hold no newline
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it the call at work (an operation that has begun goes on)."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._buffer.clear()
        self._scanned = 0

    def call(self, method: str, /, **params: Any) -> Any:
        """The result of a call. Raises the ProcmanError that the daemon answers with, or Unreachable."""
        return self.stream(method, _ignore, **params)

    def stream(self, method: str, on_notification: Callable[[str, Object], None], /, **params: Any) -> Any:
        """As `call`; meanwhile calls `on_notification(method, params)` with what the daemon says."""
        try:
            return self._exchange(method, on_notification, params)
        except Closed:
            self.close()
            if method not in ASK_AGAIN:
                raise
            return self._exchange(method, on_notification, params)

    def connect(self) -> None:
        """Connects now, and not with the first call. Raises Unreachable."""
        if self._socket is None:
            self._socket = self._open()

    def wait_closed(self) -> None:
        """Returns when the daemon has closed this connection. `timeout` counts."""
        if self._socket is None:
            return
        try:
            while self._receive():
                self._buffer.clear()
        except Unreachable as error:
            if isinstance(error.__cause__, TimeoutError):
                raise  # other errors mean that it is gone
        self.close()

    def _exchange(self, method: str, on_notification: Callable[[str, Object], None], params: Object) -> Any:
        self._last_id += 1
        self._send(rpc.encode_request(rpc.Request(method, params, self._last_id)))
        if method in ASK_AGAIN and self._socket is not None and not self._buffer:
            wait = QUIET_SECONDS if self._timeout is None else min(QUIET_SECONDS, self._timeout)
            if not select.select([self._socket], [], [], wait)[0]:
                self._on_quiet()
        while True:
            message = rpc.decode_reply(self._line())
            if isinstance(message, rpc.Notification):
                on_notification(message.method, message.params)
            elif message.error is not None and message.id in (self._last_id, None):
                raise message.error
            elif message.id == self._last_id:
                return message.result

    def _open(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self._timeout is not None:  # a connect() that waits for room in the backlog: not with settimeout()
                seconds, rest = divmod(self._timeout, 1)
                wait = struct.pack("@ll", int(seconds), max(int(rest * 1e6), 1))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
            connection.connect(self.path)
            connection.settimeout(self._timeout)
            _check_owner(connection, self.path)
        except (OSError, ValueError) as error:
            connection.close()
            raise _unreachable(self.path, error) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _send(self, line: bytes) -> None:
        self.connect()
        assert self._socket is not None
        try:
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            return  # it refused us before it read all: it has said why, and if not, _line() says that it is gone
        except OSError as error:
            raise _unreachable(self.path, error) from error

    def _line(self) -> bytes:
        while True:
            end = self._buffer.find(b"\n", self._scanned) + 1
            if end:
                line = bytes(self._buffer[:end])
                del self._buffer[:end]
                self._scanned = 0
                return line
            self._scanned = len(self._buffer)
            if not self._receive():
                raise Closed(
                    "the daemon closed the connection before it had answered",
                    hint="it was stopped, or its supervisor was replaced, or you read too slowly: try again",
                )

    def _receive(self) -> bool:
        """Adds what comes to the buffer; False at the end of the connection."""
        assert self._socket is not None
        try:
            data = self._socket.recv(_RECEIVE)
        except ConnectionResetError:
            return False
        except OSError as error:
            raise _unreachable(self.path, error) from error
        self._buffer += data
        return bool(data)


def _check_owner(connection: socket.socket, path: str) -> None:
    """Raises Unreachable for a daemon in the default folder in /tmp that is a third user's: it may be a trap."""
    owner = rpc.tmp_owner(path)
    if owner is None:
        return
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, owner, os.geteuid()):
        raise Unreachable(
            f"the daemon at {path} is not to be trusted: it runs as user {uid}",
            hint="somebody else has made that folder in /tmp: remove it, or set XDG_RUNTIME_DIR or $PROCMAN_SOCKET",
        )


def _ignore(_method: str, _params: Object) -> None:
    pass


def _unreachable(path: str, error: OSError | ValueError) -> ProcmanError:
    """The error for a connection that can't be made or used, with what to do about it."""
    number = getattr(error, "errno", None)
    hint = "is procmand running? -s SOCKET, -c FILE or $PROCMAN_SOCKET name another daemon"
    if isinstance(error, TimeoutError | BlockingIOError):
        return Unreachable(f"the daemon at {path} did not answer in time", hint="its own log may say why")
    if number == errno.ENOENT:
        return Unreachable(f"no daemon listens at {path}: there is no such socket", hint=hint)
    if number == errno.ECONNREFUSED:
        hint += "; what a killed one has left running is adopted by the next"
        return Unreachable(f"no daemon listens at {path}: the socket is left over", hint=hint)
    if number in (errno.EACCES, errno.EPERM):
        return Unreachable(
            f"no permission to connect to {path}",
            hint="be root, the user whose daemon it is, or a member of its socket_group or read_only_group",
        )
    if isinstance(error, ValueError) or number is None:  # longer than sun_path, or a NUL in it: unix(7)
        return Unreachable(f"{path!r} can't be the path of a socket: {error}", hint=hint)
    return Unreachable(f"no daemon answers at {path}: {error.strerror}", hint=hint)

"""The wire between keeper and supervisor: a socket pair that carries messages and file descriptors.

A message is a header (4 bytes length, 1 byte number of descriptors, network order), then that many bytes of JSON. Its
descriptors travel as SCM_RIGHTS (unix(7)) with its first byte. Neither side ever blocks on the other: what the peer does
not take yet waits in memory.

supervisor → keeper
    {"op": "spawn", "child": "shop:1#7", "argv": [...], "env": {...}, "directory": "/srv", "uid": 33, "gid": 33,
     "groups": [33], "umask": 18, "stdout": "log/shop:1", "stderr": "log/shop:1", "listen": [["web", "listener/web"]],
     "limits": {"open_files": 1024, ...}, "kill": "tree"}      asked twice for one child, it starts one
    {"op": "signal", "child": "shop:1#7", "signal": 15, "tree": false}
    {"op": "forget", "child": "shop:1#7"}                      its end has been taken note of
    {"op": "hold", "name": "listener/web"} + 1 descriptor      {"op": "release", "name": "listener/web"}
    {"op": "sync", "number": 1}                                answered by "synced" when all before it has been done
    {"op": "ready"}                                            the table runs; the start has succeeded
    {"op": "notify", "state": "READY=1"}                       for the service manager, sd_notify(3)
    {"op": "log"} + 1 descriptor                               the daemon's own messages go there from now on
    {"op": "pong"}                                             the answer to a ping
    {"op": "exit", "status": 0}                                end what is left, and yourself

keeper → supervisor
    {"op": "hello", "restarts": 1, "last": "killed by SIGKILL", ...}
    {"op": "child", "child": "shop:1#7", "state": "running", "pid": 4711, ...}   one for each child that is not forgotten
    {"op": "held", "name": "listener/web"} + 1 descriptor      one for each
    {"op": "begin"}                                            the snapshot is complete; from here on: events
    {"op": "spawned", "child": "shop:1#7", "pid": 4711, "at": 1790000000.0}
    {"op": "failed", "child": "shop:1#7", "step": "chdir", "errno": 2, "message": "No such file or directory: '/srv'"}
    {"op": "exited", "child": "shop:1#7", "status": 9, "at": ..., "left": true, "rusage": {...}}
    {"op": "gone", "child": "shop:1#7"}
    {"op": "signal", "signal": 15}                             somebody sent it to procmand
    {"op": "synced", "number": 1}
    {"op": "ping"}
"""

from __future__ import annotations

import array
import collections
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from procman.errors import ProcmanError

HEADER = struct.Struct("!IB")
MAX_MESSAGE = 64 * 1024 * 1024
MAX_DESCRIPTORS = 16

Message = dict[str, Any]


class WireError(ProcmanError):
    """The other side is gone, or does not speak this language."""

    code = "wire"


class Wire:
    """One end of the wire. The socket becomes non-blocking and is owned by the Wire."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._out: collections.deque[tuple[memoryview, list[int]]] = collections.deque()
        self._in = bytearray()
        self._descriptors: collections.deque[int] = collections.deque()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """There is something to send that the peer has not taken yet: call `flush` when the socket is writable."""
        return bool(self._out)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send `message` with copies of `descriptors`; it may be queued. Raises WireError when the peer is gone."""
        body = json.dumps(message, separators=(",", ":")).encode()
        packet = memoryview(HEADER.pack(len(body), len(descriptors)) + body)
        self._out.append((packet, [os.dup(fd) for fd in descriptors]))
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it."""
        while self._out:
            packet, descriptors = self._out[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._socket.sendmsg([packet], ancillary)
            except BlockingIOError:
                return
            except OSError as error:
                raise WireError(f"the other side is gone: {error}") from error
            for fd in descriptors:
                os.close(fd)
            if sent == len(packet):
                self._out.popleft()
            else:
                self._out[0] = (packet[sent:], [])

    def receive(self) -> list[tuple[Message, list[int]]]:
        """All the messages that are here. Their descriptors belong to the caller. Raises WireError at the end."""
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        messages: list[tuple[Message, list[int]]] = []
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(262144, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise WireError(f"the other side is gone: {error}") from error
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                    self._descriptors.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise WireError("a file descriptor was lost on the way: too many are open")
            if not data:
                if messages:
                    return messages  # the end is reported by the next call
                raise WireError("the other side has closed")
            self._in += data
            messages += self._messages()
            if len(data) < 262144:
                return messages

    def _messages(self) -> list[tuple[Message, list[int]]]:
        found: list[tuple[Message, list[int]]] = []
        at = 0
        while len(self._in) - at >= HEADER.size:
            length, count = HEADER.unpack_from(self._in, at)
            if length > MAX_MESSAGE or count > MAX_DESCRIPTORS:
                raise WireError(f"message of {length} bytes with {count} descriptors")
            end = at + HEADER.size + length
            if len(self._in) < end:
                break
            try:
                message = json.loads(self._in[at + HEADER.size : end])
            except ValueError as error:
                raise WireError(f"not JSON: {error}") from error
            if not isinstance(message, dict) or count > len(self._descriptors):
                raise WireError("malformed message")
            found.append((message, [self._descriptors.popleft() for _ in range(count)]))
            at = end
        del self._in[:at]
        return found

    def close(self) -> None:
        """Close the socket and every descriptor that was not delivered."""
        for fd in [fd for _, descriptors in self._out for fd in descriptors] + list(self._descriptors):
            os.close(fd)
        self._out.clear()
        self._descriptors.clear()
        self._socket.close()

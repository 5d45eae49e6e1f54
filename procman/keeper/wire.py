"""The wire between keeper and supervisor: a socket pair that carries messages and file descriptors.

A message is a header (4 bytes length, 1 byte number of descriptors, network order), then that many bytes of JSON. Its
descriptors travel as SCM_RIGHTS (unix(7)) with its first byte. Neither side ever blocks on the other: what the peer
does not take yet waits in memory.

supervisor → keeper
    {"op": "spawn", "child": "shop:1#7", "argv": [...], "env": {...}, "directory": "/srv", "uid": 33, "gid": 33,
     "groups": [33], "umask": 18, "stdout": "log/shop:1", "stderr": "log/shop:1", "listen": [["web", "listener/web"]],
     "needs": ["notify/shop:1"],                                what must be held besides: the other end of it
     "limits": {"open_files": 1024, ...}, "kill": "tree", "note": "..."}      asked twice for one child, it starts one
    {"op": "signal", "child": "shop:1#7", "signal": 15, "tree": false, "note": "..."}     the note may be missing
    {"op": "forget", "child": "shop:1#7"}                      its end has been taken note of
    {"op": "note", "child": "shop:1#7", "note": "..."}         kept with the child, for the next supervisor
    {"op": "hold", "names": ["log/shop:1/out/r", ...]} + as many descriptors, all held or none
    {"op": "release", "name": "listener/web"}
    {"op": "house", "house": 7, "last": 41}                    whose children these are; the next one is number 42
    {"op": "adopt", "child": "shop:1#7", "pid": 4711, "start": 123456, "tag": 30064771079, "at": 1790000000.0,
     "kill": "tree", "note": "", "members": [4711, 4712]}      an earlier keeper had started it; answered by "child"
    {"op": "upgrade"}                                          new code, see `upgrade`; answered by "yield" or "keeper"
    {"op": "yielded"}                                          nothing is done here until "resume"
    {"op": "sync", "number": 1}                                answered by "synced" when all before it has been done
    {"op": "obeyed", "signal": 1}                              the next supervisor need not be told of it
    {"op": "ready"}                                            the table runs; the start has succeeded
    {"op": "notify", "state": "READY=1"}                       for the service manager, sd_notify(3)
    {"op": "log"} + 1 descriptor                               the daemon's own messages go there from now on
    {"op": "pong"}                                             the answer to a ping
    {"op": "exit", "status": 0}                                end what is left, and yourself

keeper → supervisor
    {"op": "hello", "starts": 2, "last": "killed by SIGKILL", ...}
    {"op": "child", "child": "shop:1#7", "state": "running", ...}    one for each child that is not forgotten
    {"op": "held", "name": "listener/web"} + 1 descriptor      one for each
    {"op": "begin"}                                            the snapshot is complete; from here on: events
    {"op": "spawned", "child": "shop:1#7", "pid": 4711, "at": 1790000000.0, "start": 123456, "tag": 30064771079}
    {"op": "failed", "child": "shop:1#7", "step": "chdir", "errno": 2, "message": "No such file or directory: '/srv'"}
    {"op": "exited", "child": "shop:1#7", "pid": 4711, "status": 9, "ended_at": ..., "lived": 0.5, "left": true,
     "rusage": {...}}                                          of an adopted one: no "rusage", and "status" may be null;
                                                               "lived" in seconds, unless it had ended unseen
    {"op": "gone", "child": "shop:1#7"}
    {"op": "signal", "signal": 15}                             somebody sent it to procmand
    {"op": "lost", "names": ["log/shop:1/out/r", ...]}         asked to hold them, the keeper had no descriptor free
    {"op": "yield"}                                            put all work down, and say "yielded"
    {"op": "resume"}                                           take it up again: the upgrade has failed
    {"op": "keeper", "version": "0.2.0", "problem": "", ...}   what has come of an upgrade
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
from collections.abc import Iterable, Sequence
from typing import Any

from procman.errors import ProcmanError

HEADER = struct.Struct("!IB")
MAX_MESSAGE = 64 * 1024 * 1024
MAX_DESCRIPTORS = 16
READ_SIZE = 64 * 1024

LOST = -1
"""Stands for descriptors that the kernel closed, because this process may not have more."""

Message = dict[str, Any]


class WireError(ProcmanError):
    """The other side does not speak this language, or is gone (`WireClosed`)."""

    code = "wire"


class WireClosed(WireError):
    """The other side is gone. What it had said before can still be received, if it was not received already."""


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

    @property
    def idle(self) -> bool:
        """Nothing is half sent or half received: the socket may go on under another Wire."""
        return not (self._out or self._in or self._descriptors)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send `message` with copies of `descriptors`; it may be queued, and never blocks.

        Raises WireClosed when the peer is gone, WireError for what is too large, TypeError for what is no JSON.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MAX_MESSAGE or len(descriptors) > MAX_DESCRIPTORS:
            raise WireError(f"a message of {len(body)} bytes with {len(descriptors)} descriptors is too large")
        packet = memoryview(HEADER.pack(len(body), len(descriptors)) + body)
        copies: list[int] = []
        try:
            copies.extend(map(os.dup, descriptors))
        except OSError as error:
            _close(copies)
            raise WireError(f"can't copy a file descriptor: {error.strerror}") from error
        self._out.append((packet, copies))
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it. Raises WireClosed; then the queue is empty."""
        while self._out:
            packet, descriptors = self._out[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._socket.sendmsg([packet], ancillary)
            except BlockingIOError:
                return
            except OSError as error:
                self._drop_queue()
                raise WireClosed(f"the other side is gone: {error}") from error
            _close(descriptors)
            if sent == len(packet):
                self._out.popleft()
            else:
                self._out[0] = (packet[sent:], [])

    def receive(self) -> list[tuple[Message, list[int]]]:
        """All the messages that are here. Their descriptors belong to the caller; a message whose descriptors found no
        room (EMFILE) comes without any.

        Raises WireClosed at the end, WireError for nonsense: what came in the same moment is then dropped with it.
        """
        messages: list[tuple[Message, list[int]]] = []
        try:
            self._receive(messages)
        except WireError:
            for _, descriptors in messages:
                _close(descriptors)
            raise
        return messages

    def _receive(self, messages: list[tuple[Message, list[int]]]) -> None:
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(READ_SIZE, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                if messages:
                    return
                raise WireClosed(f"the other side is gone: {error}") from error
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                    self._descriptors.extend(received)
            if flags & socket.MSG_CTRUNC:
                self._descriptors.append(LOST)
            if not data:
                if messages:
                    return  # the end is reported by the next call
                raise WireClosed("the other side has closed")
            self._in += data
            self._take_messages(messages)
            if len(data) < READ_SIZE:
                return

    def _take_messages(self, found: list[tuple[Message, list[int]]]) -> None:
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
            except (ValueError, RecursionError) as error:
                raise WireError(f"not JSON: {error}") from error
            if not isinstance(message, dict):
                raise WireError("malformed message")
            found.append((message, self._take_descriptors(count)))
            at = end
        del self._in[:at]
        # They come with the first byte of their message: what waits now belongs to the one that is half here.
        if len(self._descriptors) > (MAX_DESCRIPTORS if self._in else 0):
            raise WireError("file descriptors that belong to no message")

    def _take_descriptors(self, count: int) -> list[int]:
        """Those of one message: all, or none when the kernel had no room for one of them. What comes in one call
        belongs to one message (unix(7)), so the others' are not touched by that."""
        taken: list[int] = []
        while len(taken) < count:
            if not self._descriptors:
                _close(taken)
                raise WireError("malformed message")
            fd = self._descriptors.popleft()
            if fd == LOST:
                _close(taken)
                return []
            taken.append(fd)
        return taken

    def close(self) -> None:
        """Close the socket and every descriptor that was not delivered."""
        self._drop_queue()
        _close(self._descriptors)
        self._descriptors.clear()
        self._socket.close()

    def _drop_queue(self) -> None:
        for _, descriptors in self._out:
            _close(descriptors)
        self._out.clear()


def _close(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        if fd != LOST:
            os.close(fd)

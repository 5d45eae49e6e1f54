"""The protocols that managers answer on, as far as one call and its answer need them: bytes only.

All are spoken by the same small client, so that no client library is measured. A `Wire` has one call, which asks for
the state of one program (pm2 can only tell all of them).
"""

from __future__ import annotations

import json
import socket
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass

CONNECT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Wire(ABC):
    """A Unix socket, and the bytes of one call."""

    path: str
    request: bytes

    def connect(self) -> socket.socket:
        """A connection that is ready for the call."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(self.path)
            self.greet(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def greet(self, connection: socket.socket) -> None:
        """What stands before the first call."""
        return

    @abstractmethod
    def whole(self, data: bytes) -> bool:
        """Whether this is an answer to its end. Raises ValueError for one that tells of no running program."""


def _right(answer: bytes, word: bytes, data: bytes) -> bool:
    if word not in answer:
        raise ValueError(f"answered {data[:500]!r}")
    return True


class JsonLines(Wire):
    """procman: JSON-RPC 2.0, a message a line."""

    def whole(self, data: bytes) -> bool:
        return data.endswith(b"\n") and _right(data, b'"RUNNING"', data)


class XmlRpc(Wire):
    """Supervisor: XML-RPC over HTTP/1.1, connections kept alive."""

    def whole(self, data: bytes) -> bool:
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            return False
        lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        return len(body) >= int(lengths[0].split(b":")[1]) and _right(body, b"RUNNING", data)


def xml_request(method: str, argument: str) -> bytes:
    """A call with one string."""
    body = (
        f"<?xml version='1.0'?><methodCall><methodName>{method}</methodName><params><param><value><string>{argument}"
        "</string></value></param></params></methodCall>"
    ).encode()
    head = f"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: keep-alive\r\n\r\n".encode() + body


class Axon(Wire):
    """pm2: a message is a byte with the count of its parts, then each with its length before it."""

    def whole(self, data: bytes) -> bool:
        at = 1
        for _ in range(data[0] & 15):
            if len(data) < at + 4:
                return False
            at += 4 + int(struct.unpack_from(">I", data, at)[0])
        return len(data) >= at and _right(data, b'"online"', data)


def axon_request(method: str) -> bytes:
    """A call without arguments but an empty object."""
    call = {"type": "call", "method": method, "args": [{}]}
    parts = [b"j:" + json.dumps(call).encode(), b"s:bench:1"]
    return bytes([1 << 4 | len(parts)]) + b"".join(struct.pack(">I", len(part)) + part for part in parts)


class Zmtp(Wire):
    """Circus: ZeroMQ's ZMTP 3.0 (https://rfc.zeromq.org/spec/23/), as a DEALER without security."""

    def greet(self, connection: socket.socket) -> None:
        signature = b"\xff" + bytes(8) + b"\x7f"
        connection.sendall(signature + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
        _exactly(connection, 64)
        ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        connection.sendall(bytes([4, len(ready)]) + ready)
        flags, size = _exactly(connection, 2)
        if flags != 4 or not _exactly(connection, size).startswith(b"\x05READY"):
            raise ValueError("no READY of ZMTP")

    def whole(self, data: bytes) -> bool:
        start = 9 if data[0] & 2 else 2  # a long frame has a length of 8 bytes
        if len(data) < start:
            return False
        size = struct.unpack(">Q", data[1:9])[0] if start == 9 else data[1]
        return len(data) >= start + size and _right(data, b'"active"', data)


def zmtp_request(command: str, **properties: str) -> bytes:
    """A call, as a short frame."""
    body = json.dumps({"id": "bench", "command": command, "properties": properties}).encode()
    return bytes([0, len(body)]) + body


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("closed in the greeting")
        data += part
    return data

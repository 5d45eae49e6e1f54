"""How many connections wait at a listening socket until a server accepts them, how many may, and which were accepted.

It asks the kernel by sock_diag(7), so it needs no descriptor of the socket, and the kernel picks out what matters,
however many connections there are. It knows addresses, and not whose they are.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from asyncio.trsock import TransportSocket
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from procman.config import Address

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _ERROR, _DONE = 20, 2, 3
_REQUEST, _REQUEST_DUMP = 0x1, 0x301
_LISTENING = 1 << 10
_BEGUN = 1 << 3  # SYN_RECV
_OPEN = 1 << 1 | 1 << 8  # ESTABLISHED, CLOSE_WAIT
_PAST = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11  # FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING
_NAME, _PEER, _LENGTHS = 0, 2, 4  # attributes of unix_diag
_ANY_COOKIE = (0xFFFFFFFF, 0xFFFFFFFF)
_SHOW = 1 << _NAME | 1 << _LENGTHS
_WAIT_SECONDS = 1.0


class Queue(NamedTuple):
    """`waiting` connections of at most `room`. Of several sockets at one address: together."""

    waiting: int
    room: int


class _Found(NamedTuple):
    """A listening socket: (its port, its address in bytes) or ("", its path)."""

    port: int
    where: bytes
    queue: Queue
    inode: int
    client: tuple[bytes, int] = (b"", 0)
    state: int = 0


def queues(addresses: Iterable[Address]) -> dict[Address, Queue]:
    """The queue at each address, without those where nobody listens or the kernel does not tell. Asks the kernel: for a
    thread, like all that may take a while."""
    wanted = set(addresses)
    found: list[_Found] = []
    for kind, families in (("tcp", (socket.AF_INET, socket.AF_INET6)), ("unix", (socket.AF_UNIX,))):
        if any(address.kind == kind for address in wanted):
            for family in families:
                with contextlib.suppress(OSError, struct.error):  # a kernel without it
                    found += _unix() if family == socket.AF_UNIX else _tcp(family)
    result = {}
    for address in wanted:
        here = [each.queue for each in found if _is_at(each, address)]
        if here:
            result[address] = Queue(sum(each.waiting for each in here), sum(each.room for each in here))
    return result


class Backlog(NamedTuple):
    """Who waits to be accepted at a TCP port, at whichever of its sockets: (address in bytes, port) of each client. And
    the length of the queue of each listening socket there, by inode."""

    clients: frozenset[tuple[bytes, int]]
    lengths: dict[int, int]


def backlog(port: int) -> Backlog:
    """Who waits at `port`. Raises OSError where the kernel does not tell. For a thread."""
    clients: set[tuple[bytes, int]] = set()
    lengths: dict[int, int] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        lengths |= {each.inode: each.queue.waiting for each in _tcp(family, attribute=_local_port(port))}
        # What was not accepted yet is no file of anybody.
        clients |= {each.client for each in _tcp(family, _OPEN, _local_port(port)) if not each.inode}
    return Backlog(frozenset(clients), lengths)


def handshakes(port: int) -> frozenset[tuple[bytes, int]]:
    """The clients that have begun to connect to `port`, and whose last packet of the handshake has not come: they wait
    at no socket yet. The kernel has chosen one for each all the same, and resets who comes when that is closed. As
    `backlog`."""
    families = (socket.AF_INET, socket.AF_INET6)
    return frozenset(each.client for family in families for each in _tcp(family, _BEGUN, _local_port(port)))


def group(family: int, host: str, port: int) -> set[int]:
    """The inodes of all sockets that listen at exactly this TCP address: those of one SO_REUSEPORT group. Raises
    OSError where the kernel does not tell."""
    where = socket.inet_pton(family, host)
    return {each.inode for each in _tcp(family, attribute=_local_port(port)) if each.where == where}


class Load(NamedTuple):
    """Connections that wait in the queue of an address, those that were accepted there and are open, and those that are
    over, as far as TCP remembers them (a minute, if the server closed first): (their address in bytes, their port)."""

    waiting: int
    open: int
    past: frozenset[tuple[bytes, int]]


def loads(addresses: Iterable[Address]) -> dict[Address, Load]:
    """The load of each address; of a host name or of all addresses, that of its port. Without those where nobody
    listens. Raises OSError where the kernel does not tell. For a thread."""
    wanted = set(addresses)
    found: dict[Address, Load] = {}
    if any(address.kind == "unix" for address in wanted):
        listening, accepted_ = list(_unix()), [each for each in _unix(_OPEN) if each.inode]
        for address in (each for each in wanted if each.kind == "unix"):
            queue = [each.queue.waiting for each in listening if _is_at(each, address)]
            if queue:
                found[address] = Load(sum(queue), sum(_is_at(each, address) for each in accepted_), frozenset())
    for address in (each for each in wanted if each.kind == "tcp"):
        queue, count, past = [], 0, set[tuple[bytes, int]]()
        port = _local_port(address.port)
        for family in (socket.AF_INET, socket.AF_INET6):
            queue += [each.queue.waiting for each in _tcp(family, attribute=port) if _is_at(each, address)]
            came = [each for each in _tcp(family, _OPEN | _PAST, port) if _came_to(each, family, address)]
            count += sum(each.inode != 0 and 1 << each.state & _OPEN != 0 for each in came)
            past |= {each.client for each in came if 1 << each.state & _PAST}
        if queue:
            found[address] = Load(sum(queue), count, frozenset(past))
    return found


def _is_at(found: _Found, address: Address) -> bool:
    if address.kind == "unix":
        path = address.path.encode(errors="surrogateescape")
        # A socket keeps the name that it was bound to: that of a successor was made beside, and renamed.
        return not found.port and found.where in (path, path + b"~")
    if found.port != address.port:
        return False
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            return found.where == socket.inet_pton(family, address.host)
    return True  # all addresses, or a host name: its port tells


def _came_to(found: _Found, family: int, address: Address) -> bool:
    """Whether this end of a connection is of `address`: who listens at all addresses has none of them."""
    any_host = {"": True, "0.0.0.0": family == socket.AF_INET, "::": family == socket.AF_INET6}
    return any_host[address.host] if address.host in any_host else _is_at(found, address)


def accepted(addresses: Iterable[Address]) -> set[int]:
    """The inodes of the connections that were accepted at these addresses (of a host name, at its port) and are open.
    Empty, too, where the kernel does not tell."""
    inodes: set[int] = set()
    wanted = set(addresses)
    paths = [address for address in wanted if address.kind == "unix"]
    with contextlib.suppress(OSError, struct.error):
        for port in {address.port for address in wanted if address.kind == "tcp"}:
            for family in (socket.AF_INET, socket.AF_INET6):
                inodes |= {found.inode for found in _tcp(family, _OPEN, _local_port(port))}
        if paths:
            inodes |= {found.inode for found in _unix(_OPEN) if any(_is_at(found, path) for path in paths)}
    return inodes - {0}  # those that wait to be accepted


def acceptors(clients: Sequence[socket.socket | TransportSocket]) -> list[int]:
    """Of each of these connections, which are within this machine and to one listener: the inode of the socket that has
    accepted its other end, 0 while nobody has. Raises OSError where the kernel does not tell. For a thread."""
    if clients[0].family == socket.AF_UNIX:
        return [_unix_peer(os.fstat(client.fileno()).st_ino) for client in clients]
    port = _local_port(clients[0].getpeername()[1])
    found = [each for family in (socket.AF_INET, socket.AF_INET6) for each in _tcp(family, _OPEN, port)]
    inodes = {each.client: each.inode for each in found}
    return [max(inodes.get(one, 0) for one in _seen_as(*client.getsockname()[:2])) for client in clients]


def _seen_as(host: str, port: int) -> Iterator[tuple[bytes, int]]:
    """A client as its server's end has it: by IPv4, or that by IPv6, or IPv6."""
    packed = ipaddress.ip_address(host).packed
    yield packed.ljust(16, b"\0"), port
    yield (bytes(10) + b"\xff\xff" + packed)[-16:], port


def _unix_peer(inode: int) -> int:
    """The inode of the other end, 0 where it has none yet."""
    asked = struct.pack("=BBxxIIIII", socket.AF_UNIX, 0, 0, inode, 1 << _PEER, *_ANY_COOKIE)
    peers = [dict(_parts(message, 16, "=HH")).get(_PEER, b"") for message in _ask(asked)]
    return max((int.from_bytes(peer, sys.byteorder) for peer in peers), default=0)


def _local_port(port: int) -> bytes:
    """The attribute that has the kernel send only sockets with this port: `struct inet_diag_bc_op`, "at least" and "at
    most", each with its port in a second one. A jump beyond the end leaves a socket out."""
    code = struct.pack("=BBHBBHBBHBBH", 2, 8, 20, 0, 0, port, 3, 8, 12, 0, 0, port)
    return struct.pack("=HH", 4 + len(code), 1) + code


def _tcp(family: int, states: int = _LISTENING, attribute: bytes = b"") -> Iterator[_Found]:
    """`struct inet_diag_req_v2` out, `struct inet_diag_msg` back (linux/inet_diag.h)."""
    for message in _dump(struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, states) + attribute):
        (port,) = struct.unpack_from(">H", message, 4)
        where = message[8 : 8 + (4 if family == socket.AF_INET else 16)]
        waiting, room, _, inode = struct.unpack_from("=IIII", message, 56)
        (client_port,) = struct.unpack_from(">H", message, 6)
        yield _Found(port, where, Queue(waiting, room), inode, (message[24:40], client_port), message[1])


def _unix(states: int = _LISTENING) -> Iterator[_Found]:
    """`struct unix_diag_req` out, `struct unix_diag_msg` and attributes back (linux/unix_diag.h)."""
    for message in _dump(struct.pack("=BBxxIIIII", socket.AF_UNIX, 0, states, 0, _SHOW, 0, 0)):
        attributes = dict(_parts(message, 16, "=HH"))
        if len(attributes.get(_LENGTHS, b"")) >= 8:
            queue = Queue(*struct.unpack_from("=II", attributes[_LENGTHS]))
            (inode,) = struct.unpack_from("=I", message, 4)
            yield _Found(0, attributes.get(_NAME, b"").rstrip(b"\0"), queue, inode)


def _dump(request: bytes) -> Iterator[bytes]:
    """The messages that answer a request for all of a kind, each without its header. Raises OSError."""
    return _ask(request, _REQUEST_DUMP)


def _ask(request: bytes, flags: int = _REQUEST) -> Iterator[bytes]:
    """The same, for one socket if not otherwise said."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(_WAIT_SECONDS)
        sock.send(struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        while True:
            for kind, message in _parts(sock.recv(1 << 16), 0, "=IH10x"):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", message)[0], "sock_diag")
                yield message
            if flags == _REQUEST:
                return


def _parts(data: bytes, start: int, header: str) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of what comes one after the other, each with a header of its length and kind, aligned to 4."""
    size = struct.calcsize(header)
    while start + size <= len(data):
        length, kind = struct.unpack_from(header, data, start)
        if length < size:
            return
        yield kind, data[start + size : start + length]
        start += (length + 3) & ~3

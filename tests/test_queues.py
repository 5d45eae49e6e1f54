"""queues.py: real listening sockets with connections that nobody accepts."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procman import queues, routing
from procman.config import Address
from procman.queues import Queue
from tests.harness import wait_until


@pytest.fixture
def kept() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def waiting(address: Address) -> Queue | None:
    return queues.queues([address]).get(address)


def connect(kept: contextlib.ExitStack, where: Any, family: int = socket.AF_INET) -> None:
    client = kept.enter_context(socket.socket(family))
    client.connect(where)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_tcp(kept: contextlib.ExitStack, host: str, family: int) -> None:
    try:
        listener = kept.enter_context(socket.create_server((host, 0), family=family, backlog=7))
    except OSError:
        pytest.skip("no IPv6 here")
    port = listener.getsockname()[1]
    at = Address("tcp", host, port)
    assert waiting(at) == Queue(0, 7)
    for _ in range(3):
        connect(kept, (host, port), family)
    wait_until(lambda: waiting(at) == Queue(3, 7))
    assert waiting(Address("tcp", "localhost", port)) == Queue(3, 7)  # a name: its port tells
    assert waiting(Address("tcp", "", port)) == Queue(3, 7)
    assert waiting(Address("tcp", "127.0.0.2", port)) is None
    kept.enter_context(listener.accept()[0])
    assert waiting(at) == Queue(2, 7)


def test_several_sockets_at_one_address_count_together(kept: contextlib.ExitStack) -> None:
    first = kept.enter_context(socket.create_server(("127.0.0.1", 0), backlog=5, reuse_port=True))
    port = first.getsockname()[1]
    kept.enter_context(socket.create_server(("127.0.0.1", port), backlog=6, reuse_port=True))
    for _ in range(4):
        connect(kept, ("127.0.0.1", port))
    wait_until(lambda: waiting(Address("tcp", "127.0.0.1", port)) == Queue(4, 11))


def test_unix(kept: contextlib.ExitStack, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = kept.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    assert waiting(Address("unix", path=path)) is None
    listener.listen(5)
    connect(kept, path, socket.AF_UNIX)
    connect(kept, path, socket.AF_UNIX)
    assert waiting(Address("unix", path=path)) == Queue(2, 5)
    assert waiting(Address("unix", path=path + "x")) is None


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_accepted_connections(kept: contextlib.ExitStack, kind: str, tmp_path: Path) -> None:
    listeners, taken, addresses = [], [], []
    for number in range(2):
        if kind == "tcp":
            listener = kept.enter_context(socket.create_server(("127.0.0.1", 0)))
            addresses.append(Address("tcp", *listener.getsockname()))
        else:
            listener = kept.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / f"s{number}"))
            listener.listen(5)
            addresses.append(Address("unix", path=listener.getsockname()))
        listeners.append(listener)
        for _ in range(2):
            connect(kept, listener.getsockname(), listener.family)
        taken.append(kept.enter_context(listener.accept()[0]))
    assert queues.accepted(addresses[:1]) == {inode(taken[0])}  # not the one that waits, nor the other listener's
    assert queues.accepted(addresses) == {inode(each) for each in taken}
    assert queues.accepted([]) == set()


def test_who_waits_at_a_port(kept: contextlib.ExitStack) -> None:
    """At each of its sockets, also one that has given up; not who was accepted."""
    first = kept.enter_context(socket.create_server(("127.0.0.1", 0), reuse_port=True))
    port = first.getsockname()[1]
    assert queues.backlog(port) == queues.Backlog(frozenset(), {inode(first): 0})
    second = kept.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=True))
    routing.lead(first, 1)
    clients = [kept.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3)]
    ports = [client.getsockname()[1] for client in clients]
    clients[1].close()
    kept.enter_context(second.accept()[0])

    def waits() -> bool:
        found = queues.backlog(port)
        return found.lengths == {inode(first): 0, inode(second): 2} and {p for _, p in found.clients} == set(ports[1:])

    wait_until(waits)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_who_has_only_begun_to_connect(kept: contextlib.ExitStack, host: str, family: int) -> None:
    """A listener that waits for the first bytes has not heard the end of the handshake before them."""
    try:
        listener = kept.enter_context(socket.create_server((host, 0), family=family))
    except OSError:
        pytest.skip("no IPv6 here")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    port = listener.getsockname()[1]
    assert queues.handshakes(port) == set()
    client = kept.enter_context(socket.create_connection((host, port)))
    found = wait_until(lambda: queues.handshakes(port))
    assert {client_port for _, client_port in found} == {client.getsockname()[1]}
    assert queues.backlog(port).clients == set()
    client.sendall(b"x")
    wait_until(lambda: not queues.handshakes(port))
    assert queues.backlog(port).clients == found


def test_nobody_listens() -> None:
    assert queues.queues([]) == {}
    assert waiting(Address("tcp", "127.0.0.1", 1)) is None


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_NETLINK_SOCK_DIAG", 30)  # no such family
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert waiting(Address("tcp", "127.0.0.1", listener.getsockname()[1])) is None


# --- loads ----------------------------------------------------------------------------------------------------------


def load(address: Address) -> tuple[int, int]:
    """Waiting, open."""
    return queues.loads([address])[address][:2]


@pytest.mark.parametrize(
    ("bound", "asked", "family"),
    [
        ("127.0.0.1", "127.0.0.1", socket.AF_INET),
        ("0.0.0.0", "0.0.0.0", socket.AF_INET),
        ("0.0.0.0", "", socket.AF_INET),
        ("::1", "::1", socket.AF_INET6),
        ("::", "::", socket.AF_INET6),
    ],
)
def test_the_load_of_tcp(kept: contextlib.ExitStack, bound: str, asked: str, family: Any) -> None:
    try:
        listener = kept.enter_context(socket.create_server((bound, 0), family=family, backlog=7))
    except OSError:
        pytest.skip("no IPv6 here")
    port = listener.getsockname()[1]
    at = Address("tcp", asked, port)
    assert load(at) == (0, 0)
    there = "127.0.0.1" if family == socket.AF_INET else "::1"
    clients = [kept.enter_context(socket.create_connection((there, port))) for _ in range(3)]
    wait_until(lambda: load(at) == (3, 0))
    first, second = (kept.enter_context(listener.accept()[0]) for _ in range(2))
    assert load(at) == (1, 2)
    past = queues.loads([at])[at].past
    assert not past
    first.close()  # the server goes first: TCP remembers
    name = clients[0].getsockname()[1]
    wait_until(lambda: load(at) == (1, 1))
    assert [client for _, client in queues.loads([at])[at].past] == [name]
    clients[1].close()  # the client goes first, and the server has not noticed
    wait_until(lambda: second.recv(1) == b"")
    assert load(at) == (1, 1)
    second.close()
    wait_until(lambda: load(at) == (1, 0))


def test_the_load_of_another_host_at_the_same_port_is_not_ours(kept: contextlib.ExitStack) -> None:
    one = kept.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = one.getsockname()[1]
    kept.enter_context(socket.create_server(("127.0.0.2", port)))
    kept.enter_context(socket.create_connection(("127.0.0.1", port)))
    kept.enter_context(one.accept()[0])
    mine, other = Address("tcp", "127.0.0.1", port), Address("tcp", "127.0.0.2", port)
    assert (load(mine), load(other)) == ((0, 1), (0, 0))
    assert queues.loads([Address("tcp", "127.0.0.3", port)]) == {}


@pytest.mark.parametrize("suffix", ["", "~"])
def test_the_load_of_unix(kept: contextlib.ExitStack, tmp_path: Path, suffix: str) -> None:
    """Also of a successor's socket, which was bound beside and then renamed."""
    path = str(tmp_path / "s")
    listener = kept.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(path + suffix)
    listener.listen(5)
    if suffix:
        os.rename(path + suffix, path)
    at = Address("unix", path=path)
    clients = [kept.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
    for client in clients:
        client.connect(path)
    assert load(at) == (3, 0)
    first, second = (kept.enter_context(listener.accept()[0]) for _ in range(2))
    assert load(at) == (1, 2)
    clients[0].close()  # which its server does not know yet
    assert load(at) == (1, 2)
    first.close()
    second.close()
    wait_until(lambda: load(at) == (1, 0))


# --- who has accepted a connection ------------------------------------------------------------------------------------


def ends(host: str, at: str, family: int) -> tuple[socket.socket, socket.socket]:
    """A listening socket at `host`, and a connection to it from `at`."""
    listener = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    return listener, socket.create_connection((at, listener.getsockname()[1]))


@pytest.mark.parametrize(("host", "at"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")])
def test_who_has_accepted_a_connection_by_tcp(kept: contextlib.ExitStack, host: str, at: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener, client = ends(host, at, family)
    except OSError:
        pytest.skip("no IPv6 here")
    kept.enter_context(listener)
    kept.enter_context(client)
    assert queues.acceptors([client]) == [0]
    accepted = kept.enter_context(listener.accept()[0])
    assert queues.acceptors([client]) == [os.fstat(accepted.fileno()).st_ino]


def test_who_came_from_the_same_port_of_another_address_is_somebody_else(kept: contextlib.ExitStack) -> None:
    listener = kept.enter_context(socket.create_server(("", 0)))
    there = listener.getsockname()[1]
    first, second = (kept.enter_context(socket.socket()) for _ in range(2))
    first.bind(("127.0.0.1", 0))
    second.bind(("127.0.0.2", first.getsockname()[1]))
    second.connect(("127.0.0.1", there))
    kept.enter_context(listener.accept()[0])
    first.connect(("127.0.0.1", there))
    assert [inode > 0 for inode in queues.acceptors([second, first])] == [True, False]


def test_who_has_accepted_a_connection_by_a_unix_socket(kept: contextlib.ExitStack, tmp_path: Path) -> None:
    listener, client, other = (kept.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    for each in (client, other):
        each.connect(str(tmp_path / "s"))
    assert queues.acceptors([client]) == [0]
    accepted = kept.enter_context(listener.accept()[0])
    assert queues.acceptors([client]) == [os.fstat(accepted.fileno()).st_ino]
    assert queues.acceptors([other]) == [0]

"""Pipes and sockets got back out of a living process."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from procman import listeners, salvage
from procman.config import Address, Listener
from procman.logs import make_pipe
from tests.harness import free_port


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process with one end of a pipe of ours as stdout, a listening socket and one that does not listen."""
    port = free_port()
    sock = listeners.open_listener(Listener(name="it", address=Address("tcp", "127.0.0.1", port)))
    read_end, write_end = make_pipe()
    with sock, socket.socket() as other:
        command = ["sh", "-c", "echo said; exec sleep 60"]
        passed = (other.fileno(), sock.fileno())
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=write_end, pass_fds=passed)
        os.close(read_end)
        os.close(write_end)
        yield process, sock
    process.kill()
    process.wait(10)


def test_a_pipe_is_opened_again(holder: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    process, _ = holder
    inode = salvage.own_pipe(process.pid, 1)
    assert inode
    ends = salvage.reopen_pipe([2**22 + 1, process.pid], inode)
    assert ends is not None
    read_end, write_end = ends
    assert (os.get_blocking(read_end), os.get_blocking(write_end)) == (False, True)
    assert not os.get_inheritable(read_end)
    assert not os.get_inheritable(write_end)
    os.write(write_end, b"more")
    os.set_blocking(read_end, True)
    found = os.read(read_end, 100)
    while len(found) < 9:
        found += os.read(read_end, 100)
    assert sorted(found) == sorted(b"said\nmore")
    assert salvage.reopen_pipe([process.pid], inode + 1_000_000) is None
    os.close(read_end)
    os.close(write_end)


def test_what_is_no_pipe_of_ours(holder: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    process, sock = holder
    assert [salvage.own_pipe(process.pid, number) for number in (0, 77, sock.fileno())] == [0, 0, 0]
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as other:
        assert salvage.own_pipe(other.pid, 1) == 0, "it can't be read by who writes to it"
        other.kill()
    assert salvage.own_pipe(2**22 + 1, 1) == 0


def test_listening_sockets_are_copied(holder: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    process, sock = holder
    found = [other.detach() for other in salvage.listening_sockets(process.pid)]
    assert len(found) == 1
    assert os.fstat(found[0]).st_ino == os.fstat(sock.fileno()).st_ino
    os.close(found[0])
    assert list(salvage.listening_sockets(2**22 + 1)) == []


def test_which_listener_a_socket_fits(holder: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    _, sock = holder
    port = sock.getsockname()[1]

    def fits(host: str, number: int = port) -> bool:
        return listeners.fits(sock, Listener(name="it", address=Address("tcp", host, number)))

    assert fits("127.0.0.1")
    assert fits("localhost")
    assert not fits("127.0.0.1", port + 1)
    assert not fits("127.0.0.2")
    assert not fits("")
    assert not fits("no such host")
    assert not listeners.fits(sock, Listener(name="it", address=Address("unix", path="/nowhere")))
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        address = Address("tcp", "127.0.0.1", deaf.getsockname()[1])
        assert not listeners.fits(deaf, Listener(name="it", address=address)), "it does not listen"


def test_a_unix_socket_fits_while_its_path_leads_to_it(tmp_path: object) -> None:
    path = f"{tmp_path}/sock"
    listener = Listener(name="it", address=Address("unix", path=path), mode=0o600)
    with listeners.open_listener(listener) as sock:
        made = listeners.socket_file(path)
        assert listeners.fits(sock, listener, made)
        assert listeners.fits(sock, listener)
        os.rename(path, f"{path}.old")
        assert not listeners.fits(sock, listener, made)
        with listeners.open_listener(listener):
            assert not listeners.fits(sock, listener, made), "another one stands there"


@pytest.mark.parametrize("host", ["", "::"])
def test_a_socket_for_all_addresses_is_not_one_for_ipv6(host: str) -> None:
    listener = Listener(name="it", address=Address("tcp", host, free_port()))
    with listeners.open_listener(listener) as sock:
        assert listeners.fits(sock, listener)
        if sock.family == socket.AF_INET6:
            other = Address("tcp", "::" if host == "" else "", listener.address.port)
            assert not listeners.fits(sock, Listener(name="it", address=other))

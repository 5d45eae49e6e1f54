"""listeners.py, with real sockets, real foreign holders and real files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from procman import rpc
from procman.config import Address, Listener
from procman.errors import Failed
from procman.listeners import (
    PATH_MAX,
    fits,
    join,
    leave,
    open_listener,
    open_rpc_socket,
    remove_socket_file,
    socket_file,
    try_out,
)
from tests.harness import User, free_port

HOLD = """
import socket, sys
family, host, reuse_port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
s = socket.socket(family)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
s.bind((host, 0))
s.listen()
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""

has_ipv6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")


def tcp(host: str = "127.0.0.1", port: int = 0) -> Listener:
    return Listener(name="web", address=Address("tcp", host, port), backlog=64)


def unix(path: Path, mode: int = 0o660, uid: int = -1, gid: int = -1) -> Listener:
    return Listener(name="web", address=Address("unix", path=str(path)), mode=mode, uid=uid, gid=gid)


def at_port_of(listener: Listener, sock: socket.socket) -> Listener:
    port = sock.getsockname()[1]
    return replace(listener, address=replace(listener.address, port=port))


@contextlib.contextmanager
def foreign_holder(family: int, host: str, *, reuse_port: bool = False) -> Iterator[tuple[int, int]]:
    """Another process that listens on a free port: (its pid, the port)."""
    argv = [sys.executable, "-c", HOLD, str(int(family)), host, str(int(reuse_port))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        yield child.pid, int(child.stdout.readline())
        assert child.stdin is not None
        child.stdin.close()  # ends it


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def waiting(sock: socket.socket) -> int:
    """Takes all connections that wait and counts them."""
    sock.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def answers(family: socket.AddressFamily, host: str, port: int) -> bool:
    with socket.socket(family) as client:
        return client.connect_ex((host, port)) == 0


# TCP


def test_tcp_listener_accepts_and_is_not_inherited() -> None:
    with open_listener(tcp()) as sock:
        assert not sock.get_inheritable()
        assert sock.getblocking()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert answers(socket.AF_INET, "127.0.0.1", sock.getsockname()[1])


def test_a_plain_socket_cannot_take_the_port() -> None:
    with open_listener(tcp()) as sock, socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            foreign.bind(sock.getsockname())


@pytest.mark.parametrize("host", ["127.0.0.1", "", pytest.param("::1", marks=has_ipv6)])
def test_a_second_socket_joins_and_bpf_diverts(host: str) -> None:
    """The whole of architecture section 4: the program on the group sends all connections to one of the two."""
    target = (socket.AF_INET6, "::1") if host == "::1" else (socket.AF_INET, "127.0.0.1")
    with open_listener(tcp(host)) as first, join(at_port_of(tcp(host), first)) as second:
        port = first.getsockname()[1]
        for chosen in (0, 1, 0):
            instructions = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, chosen), 8)
            program = struct.pack("@H6xQ", 1, ctypes.addressof(instructions))
            first.setsockopt(socket.SOL_SOCKET, 51, program)  # SO_ATTACH_REUSEPORT_CBPF
            assert all(answers(*target, port) for _ in range(10))
            assert (waiting(first), waiting(second)) == ((10, 0) if chosen == 0 else (0, 10))


def test_a_joined_socket_goes_on_when_the_first_closes() -> None:
    first = open_listener(tcp())
    with join(at_port_of(tcp(), first)) as second:
        first.close()
        assert answers(socket.AF_INET, *second.getsockname())
        assert waiting(second) == 1


@pytest.mark.parametrize("reuse_port", [False, True])
@pytest.mark.parametrize("held", ["127.0.0.1", "0.0.0.0"])
def test_a_foreign_holder_is_named(held: str, reuse_port: bool) -> None:
    before = open_descriptors()
    with (
        foreign_holder(socket.AF_INET, held, reuse_port=reuse_port) as (pid, port),
        pytest.raises(Failed) as caught,
    ):
        open_listener(tcp(port=port))
    assert str(caught.value).startswith(f"127.0.0.1:{port} is in use by pid {pid} ({sys.executable[:20]}")
    assert "another address" in caught.value.hint
    assert open_descriptors() == before


def test_a_foreign_holder_of_one_address_blocks_all_addresses() -> None:
    with foreign_holder(socket.AF_INET, "127.0.0.1") as (pid, port), pytest.raises(Failed, match=f"pid {pid}"):
        open_listener(tcp("", port))


@pytest.mark.parametrize("ended", [False, True], ids=["open", "ended"])
def test_a_connection_that_has_the_port_is_named(ended: bool) -> None:
    """The kernel gives a port to whoever connects somewhere, and for up to a minute after that to nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, (_, port) = server.accept()
        if ended:
            client.close()
            assert connection.recv(1) == b""
        connection.close()
    with contextlib.closing(client), pytest.raises(Failed) as caught:
        open_listener(tcp(port=port))
    by = "a connection that has just ended" if ended else f"a connection of pid {os.getpid()}"
    assert str(caught.value).startswith(f"127.0.0.1:{port} is in use by {by} (")
    assert f"sysctl net.ipv4.ip_local_reserved_ports={port}), or give listener" in caught.value.hint


def test_a_holder_of_another_user_is_in_use_too(as_user: User) -> None:
    if os.geteuid():
        pytest.skip("only root can have what another user does not see")
    with open_listener(tcp()) as sock:
        code = (
            "import sys; from procman.config import *; from procman.listeners import open_listener\n"
            "open_listener(Listener(name='web', address=Address('tcp', '127.0.0.1', int(sys.argv[1]))))"
        )
        done = as_user.run("python", "-c", code, str(sock.getsockname()[1]))
    assert "is in use by a process that this user may not see" in done.stderr


@has_ipv6
def test_no_host_means_both_families() -> None:
    with open_listener(tcp("")) as sock:
        port = sock.getsockname()[1]
        assert answers(socket.AF_INET, "127.0.0.1", port)
        assert answers(socket.AF_INET6, "::1", port)


@has_ipv6
def test_ipv6_and_ipv4_wildcards_stand_side_by_side() -> None:
    with open_listener(tcp("::")) as six, open_listener(at_port_of(tcp("0.0.0.0"), six)) as four:
        assert answers(socket.AF_INET, "127.0.0.1", six.getsockname()[1])
        assert (waiting(six), waiting(four)) == (0, 1)


def test_a_name_with_both_families_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever /etc/hosts of this machine says: here the resolver gives IPv6 first."""
    real = socket.getaddrinfo

    def six_first(_host: str, *arguments: int, **options: int) -> list[object]:
        return [*real("::1", *arguments, **options), *real("127.0.0.1", *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", six_first)
    with open_listener(tcp("localhost")) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("203.0.113.1", "can't listen on 203.0.113.1:8000: this machine has no such address"),
        ("fe80::1%nolink", "can't listen on [fe80::1%nolink]:8000: 'fe80::1%nolink' is not known"),
        ("x" * 70, "is not known (it is no host name)"),
    ],
)
def test_bad_hosts(host: str, message: str) -> None:
    with pytest.raises(Failed) as caught:
        open_listener(tcp(host, 8000))
    assert message in str(caught.value)
    assert caught.value.hint


def test_low_ports_need_root(as_user: User) -> None:
    port = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) - 1
    if port < 1:
        pytest.skip("every user may bind every port on this machine")
    code = (
        "import sys; from procman.config import *; from procman.listeners import open_listener\n"
        "from procman.errors import Failed\n"
        "try: open_listener(Listener(name='web', address=Address('tcp', '127.0.0.1', int(sys.argv[1]))))\n"
        "except Failed as error: print(error, error.hint)"
    )
    done = as_user.run("python", "-c", code, str(port))
    assert "this port needs root or CAP_NET_BIND_SERVICE" in done.stdout, done.stderr
    assert "AmbientCapabilities" in done.stdout


# Unix


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can write; pytest's own ones are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.fixture
def strict_umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.mark.usefixtures("strict_umask")
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_unix_listener_has_its_mode_and_folders(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a" / "b" / "web.sock"
    with open_listener(unix(path, mode)) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(path.parents)[:2]] == [0o755, 0o755]
        assert sock.getsockname() == str(path)
        assert not sock.get_inheritable()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert waiting(sock) == 1


def test_unix_listener_has_its_owner(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    path = tmp_path / "web.sock"
    with open_listener(unix(path, 0o620, 12345, 23456)):
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 23456, 0o620)


def test_an_owner_that_cannot_be_set_is_said_and_leaves_nothing(as_user: User, open_folder: Path) -> None:
    foreign = next(group.gr_gid for group in grp.getgrall() if group.gr_gid not in {as_user.gid, *os.getgroups()})
    code = (
        "import sys; from procman.config import *; from procman.listeners import open_listener\n"
        "from procman.errors import Failed\n"
        "try: open_listener(Listener(name='w', address=Address('unix', path=sys.argv[1]), gid=int(sys.argv[2])))\n"
        "except Failed as error: print(error, error.hint)"
    )
    path = open_folder / "web.sock"
    done = as_user.run("python", "-c", code, str(path), str(foreign))
    assert done.stdout.startswith(f"can't listen on unix:{path}: Operation not permitted only root"), done.stderr
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    open_listener(unix(path)).close()
    assert path.is_socket()
    with open_listener(unix(path)) as sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert waiting(sock) == 1


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_live_socket_is_left_alone(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "web.sock"
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen()
        inode = path.stat().st_ino
        with pytest.raises(Failed, match=f"unix:{path} is in use") as caught:
            open_listener(unix(path))
        assert path.stat().st_ino == inode
    if kind == socket.SOCK_STREAM:
        assert f"pid {os.getpid()} (" in str(caught.value)
    assert open_descriptors() == before


def test_a_full_queue_is_not_stale(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(str(path))
        other.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            full = client.connect_ex(str(path))
        assert full, "the queue is not full"
        with pytest.raises(Failed, match="in use by another process"):
            open_listener(unix(path))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "web.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
    before = path.lstat()
    with pytest.raises(Failed, match="no socket is there"):
        open_listener(unix(path))
    remove_socket_file(str(path))
    assert path.lstat().st_ino == before.st_ino


def test_only_the_socket_that_was_made_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with open_listener(unix(path)):
        made = socket_file(str(path))
        path.rename(tmp_path / "moved")
        assert socket_file(str(path)) is None
        with open_listener(unix(path)):
            remove_socket_file(str(path), made)
            assert path.is_socket()
            remove_socket_file(str(path), socket_file(str(path)))
            assert not path.exists()


def test_nothing_is_touched_behind_a_symlink_of_another_user(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make another user's files")
    home, victim = tmp_path / "home", tmp_path / "victim"
    home.mkdir()
    victim.mkdir()
    os.chown(home, 65534, 65534)
    path = home / "run" / "web.sock"
    with open_listener(unix(path)), open_listener(unix(victim / "web.sock")):
        made = socket_file(str(path))
        path.parent.rename(home / "mine")
        path.parent.symlink_to(victim)
        assert socket_file(str(path)) is None
        remove_socket_file(str(path), made)
        remove_socket_file(str(path))
        assert (victim / "web.sock").is_socket()
    inode = (victim / "web.sock").stat().st_ino
    with pytest.raises(Failed, match=f"the symlink {home}/run is not followed") as caught:
        open_listener(unix(path))
    assert "without the symlink" in caught.value.hint
    assert (victim / "web.sock").stat().st_ino == inode, "it is stale, and not ours to remove"


def test_the_default_folder_in_tmp_must_be_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_TMP_FOLDER", f"{tmp_path}/procman-")
    folder = tmp_path / "procman-7"
    path = str(folder / "procman.sock")
    open_rpc_socket(path, 0o600).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    open_rpc_socket(path, 0o600).close()
    owners = [(os.geteuid(), 0o775), (os.geteuid(), 0o1777)] + ([] if os.geteuid() else [(65534, 0o755)])
    for uid, mode in owners:
        os.chown(folder, uid, -1)
        folder.chmod(mode)
        with pytest.raises(Failed, match=f"can't use the folder {folder}: it must belong to the user") as caught:
            open_rpc_socket(path, 0o600)
        assert "XDG_RUNTIME_DIR" in caught.value.hint
    other = tmp_path / "procman-x"
    other.mkdir()
    other.chmod(0o777)
    open_rpc_socket(str(other / "procman.sock"), 0o600).close()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match=f"can't listen on unix:{tmp_path}/file/web.sock: "):
        open_listener(unix(tmp_path / "file" / "web.sock"))


def test_the_longest_path_and_one_byte_more() -> None:
    listener = unix(Path("/run/" + "ü" * 52))
    with pytest.raises(Failed, match=f"has 109 bytes, a Unix socket takes {PATH_MAX}"):
        open_listener(listener)


def test_the_longest_path_works(tmp_path: Path) -> None:
    room = PATH_MAX - len(os.fsencode(tmp_path)) - 1
    if room < 1:
        pytest.skip("the temporary folder has a long name itself")
    path = tmp_path / ("x" * room)
    with open_listener(unix(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    with pytest.raises(Failed, match="108 bytes"):
        open_listener(unix(tmp_path / ("x" * (room + 1))))


def answers_from(sock: socket.socket) -> int:
    """The port of the client that waits there."""
    accepted, who = sock.accept()
    accepted.close()
    port: int = who[1]
    return port


def test_an_address_that_is_left() -> None:
    """Who connects is refused, or comes to a wider socket; who was in the queue is accepted. It can be done twice."""
    with contextlib.closing(open_listener(tcp())) as sock:
        port = sock.getsockname()[1]
        left = at_port_of(tcp(), sock)
        with socket.create_connection(("127.0.0.1", port)) as early:
            assert fits(sock, left)
            for _ in range(2):
                leave(sock, left, None)
            assert not fits(sock, left)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with (
                contextlib.closing(join(tcp("", port))) as wide,
                socket.create_connection(("127.0.0.1", port)) as late,
            ):
                assert answers_from(wide) == late.getsockname()[1]
            accepted, who = sock.accept()
            assert who == early.getsockname()
            with accepted:
                early.sendall(b"asked")
                assert accepted.recv(5) == b"asked"
                accepted.sendall(b"answer")
                assert early.recv(6) == b"answer"


def test_an_ordinary_user_can_leave_an_address(as_user: User) -> None:
    code = (
        "import socket; from procman.config import *; from procman.listeners import leave, open_listener\n"
        "one = Listener(name='web', address=Address('tcp', '127.0.0.1', 0)); sock = open_listener(one)\n"
        "leave(sock, one, None); print(socket.socket().connect_ex(sock.getsockname()))"
    )
    done = as_user.run("python", "-c", code)
    assert done.stdout.split() == [str(errno.ECONNREFUSED)], done.stderr


def test_unix_listeners_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="only TCP"):
        join(unix(tmp_path / "web.sock"))


def test_rpc_socket(tmp_path: Path) -> None:
    path = tmp_path / "run" / "procman.sock"
    gid = os.getegid()
    with open_rpc_socket(str(path), 0o660, gid):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, gid)
        with pytest.raises(Failed) as caught:
            open_rpc_socket(str(path), 0o600)
        assert "daemon.socket" in caught.value.hint
    remove_socket_file(str(path))
    assert not path.exists()
    remove_socket_file(str(path))


def test_a_free_port_can_be_taken_and_given_back() -> None:
    """A closed listener leaves the port free at once, with connections in TIME_WAIT."""
    port = free_port()
    for _ in range(3):
        with open_listener(tcp(port=port)) as sock, socket.create_connection(("127.0.0.1", port)):
            sock.accept()[0].close()  # first: TIME_WAIT is ours


def test_an_address_is_tried_out(tmp_path: Path) -> None:
    """Whether it can be had: that opens nothing, removes nothing, and can be done again."""
    for wanted in (tcp(port=free_port()), unix(tmp_path / "web.sock")):
        for _ in range(2):
            try_out(wanted)
        assert not (tmp_path / "web.sock").exists()
        open_listener(wanted).close()
        try_out(wanted)  # a stale file is none of its business
        with open_listener(wanted), pytest.raises(Failed, match="is in use by pid"):
            try_out(wanted)
    assert (tmp_path / "web.sock").exists()

"""Opening listening sockets: the only module that binds them.

It knows addresses, files and error numbers. It must not know programs, the keeper, or who holds the socket later.

A TCP listener is a SO_REUSEPORT group that only our own sockets belong to (architecture, section 4). The first socket
is bound *without* the option, so any other holder of the port, even one that would have shared it, is found and named.
The option is set between bind() and listen(). The kernel looks at it again in listen() and whenever another socket
binds, so later sockets of the same user can join, and a classic BPF program can be attached (socket(7), SO_REUSEPORT).

The file of a Unix listener has its mode and owner before listen(): until then a connection is refused, whoever tries.
Its folder may belong to another user, and we may be root. So the folder is opened with care (`folders`), and the file
is looked at, given away and removed relative to it, by descriptor or after a look at its inode. bind() itself has no
such form: the worst that a swap of the folder just then can do is an unused socket, mode 0600, somewhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator

from procman import rpc
from procman.config import Address, Listener
from procman.errors import Failed
from procman.folders import open_folder

PATH_MAX = 107
"""Bytes in the path of a Unix socket: sun_path has 108 with the NUL (unix(7))."""

FileId = tuple[int, int]
"""Device and inode: which file it is, whatever its path."""

RPC_BACKLOG = 1024

SO_BINDTOIFINDEX = 62
NOWHERE = 2**31 - 1
"""The number of a network interface that no machine has: no packet comes from there."""

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
"""linux/fs.h"""

_libc = ctypes.CDLL(None, use_errno=True)

_COMMAND_MAX = 80

HOLDER_SECONDS = 10.0
_holders: dict[tuple[str, int], tuple[float, tuple[str, bool]]] = {}
# What is told where a port is that of a connection, see ip_local_port_range and ip_local_reserved_ports in
# Documentation/networking/ip-sysctl.rst of Linux.
_RESERVE = "let the kernel give port {port} to no connection (sysctl net.ipv4.ip_local_reserved_ports={port})"
_ENDED = ("TIME_WAIT", "FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK")  # psutil.CONN_…


def open_listener(listener: Listener) -> socket.socket:
    """The first socket of `listener`: bound, listening, blocking, closed on exec.

    TCP: the socket founds a SO_REUSEPORT group that `join` extends. "" as host means all addresses, IPv6 and IPv4 by
    one socket (IPv4 alone where the machine has no IPv6); "::" means IPv6 only, so that it can stand beside "0.0.0.0".
    Unix: a stale file is replaced, missing folders are made with mode 0755, `mode` and `uid:gid` are set before anybody
    can connect.

    Raises `Failed` with the holder of an address that is in use, as far as this user may see it.
    """
    if listener.address.kind == "unix":
        hint = f"give listener {listener.title!r} another path"
        return _open_unix(listener.address.path, listener.backlog, listener.mode, (listener.uid, listener.gid), hint)
    return _open_tcp(listener, found=True)


def try_out(listener: Listener) -> None:
    """Raises `Failed` where `open_listener` would for somebody who has the address, and leaves nothing changed."""
    if listener.address.kind == "tcp":
        _open_tcp(listener, found=True, listen=False).close()
        return
    path = listener.address.path
    with contextlib.suppress(OSError), _folder_of(path) as folder:
        _clear_stale(folder, path, f"give listener {listener.title!r} another path", remove=False)


def join(listener: Listener) -> socket.socket:
    """One more socket in the SO_REUSEPORT group that `open_listener` founded. It must be a TCP listener.

    The place of a socket in the group, which a BPF program selects by, is the order of listen(). Call this only while
    the first socket is open: otherwise nothing checks for a foreign holder of the port.
    """
    if listener.address.kind == "unix":
        raise Failed(f"{listener.address} can't be shared by several sockets: only TCP has SO_REUSEPORT")
    return _open_tcp(listener, found=False)


def fits(sock: socket.socket, listener: Listener, made: FileId | None = None) -> bool:
    """Whether `sock`, which an earlier daemon had opened, is what `listener` asks for now, and can be reached.

    `made`: the file of a Unix listener as it was made then, where that is known.
    """
    address = listener.address
    try:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or sock.type is not socket.SOCK_STREAM:
            return False
        if address.kind == "tcp" and is_left(sock):
            return False
        where = sock.getsockname()
        if address.kind == "unix":
            there = socket_file(address.path)
            leads_here = there is not None and made in (None, there)
            bound_for_it = where in (address.path, beside_address(address).path)
            return sock.family == socket.AF_UNIX and bound_for_it and leads_here
        if sock.family == socket.AF_INET6:
            v6_only = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            if v6_only != (address.host != ""):
                return False
        return any(sock.family == family and where[:2] == wanted[:2] for family, wanted in _tcp_candidates(listener))
    except (OSError, Failed):
        return False


def tune(sock: socket.socket, listener: Listener, made: FileId | None = None) -> None:
    """Give the open socket of `listener` its backlog, and the file of a Unix socket, which is `made`, its mode and
    owner. Raises `Failed`."""
    address = listener.address
    try:
        sock.listen(listener.backlog)  # again: it changes the backlog alone (listen(2))
        if address.kind == "unix":
            with _folder_of(address.path) as folder:
                _dress_again(folder, listener, made)
    except OSError as error:
        raise Failed(f"can't change {address}: {error.strerror}") from error


def _dress_again(folder: int, listener: Listener, made: FileId | None) -> None:
    """Where the table names no owner any more, it is whose it would be if it was made now."""
    name = os.path.basename(listener.address.path)
    found = _socket_in(folder, name)
    if found is None or found != made:
        raise OSError(errno.EEXIST, astray(found) or "its file is not known")
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        now, above = os.fstat(fd), os.fstat(folder)
        if (now.st_dev, now.st_ino) != made:
            raise OSError(errno.EEXIST, astray(found))
        gid = above.st_gid if above.st_mode & stat.S_ISGID else os.getegid()
        owner = (os.geteuid() if listener.uid == -1 else listener.uid, gid if listener.gid == -1 else listener.gid)
        _dress(fd, listener.mode, (-1, -1) if owner == (now.st_uid, now.st_gid) else owner)
    finally:
        os.close(fd)


def astray(found: FileId | None) -> str:
    """Where a Unix socket can't be reached by its path: why, in words; `found` is what `socket_file` says of that."""
    return "its file is gone" if found is None else "another file is there"


def leave(sock: socket.socket, listener: Listener, made: FileId | None) -> None:
    """Nobody more comes to the open socket of `listener`: who connects is refused at once, or comes to a wider socket
    at that port. Who waits in its queue, and who is just connecting, is accepted as before. `made`: the file of a Unix
    socket. There is no way back, but for root. Can be done again. Raises OSError (Linux before 5.7, without privilege).
    """
    if listener.address.kind == "unix":
        if made is not None:
            remove_socket_file(listener.address.path, made)
    elif not is_left(sock):
        # No shutdown(2), that resets the queue, and the server's accept(2) would fail: the kernel finds a socket for
        # who connects by the interface, too (SO_BINDTODEVICE, socket(7)), and does not ask whether there is such a one.
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, NOWHERE)


def is_left(sock: socket.socket) -> bool:
    """Whether nobody comes to this TCP socket any more."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) == NOWHERE


def open_beside(listener: Listener, made: FileId | None) -> socket.socket:
    """One more socket for a Unix listener, at a path beside its own, with the same mode and owner. `take_over` gives it
    the listener's own path, at which the file `made` was. Raises `Failed`, also where somebody else listens there."""
    hint = f"give listener {listener.title!r} another path"
    own, path = listener.address.path, beside_address(listener.address).path
    if made is None or socket_file(own) != made:
        with contextlib.suppress(OSError), _folder_of(own) as folder:
            _clear_stale(folder, own, hint)
    return _open_unix(path, listener.backlog, listener.mode, (listener.uid, listener.gid), hint)


def beside_address(address: Address) -> Address:
    """Where `open_beside` listens."""
    return Address("unix", path=f"{address.path}~")


def take_over(listener: Listener, made: FileId) -> None:
    """Whoever connects to the path of `listener` from now on comes to the socket whose file is `made`: that one and the
    file beside it change places in one step (RENAME_EXCHANGE, rename(2)), so there is no moment without a socket. Where
    none has that path any more, it just gets it. Changes nothing where it stands there already. Raises OSError."""
    path = listener.address.path
    with _folder_of(path) as folder:
        here, there = os.path.basename(path), os.path.basename(beside_address(listener.address).path)
        found = _socket_in(folder, here)
        if found != made and _socket_in(folder, there) == made:
            _rename(folder, there, here, RENAME_NOREPLACE if found is None else RENAME_EXCHANGE)


def _rename(folder: int, one: str, other: str, how: int) -> None:
    names = (os.fsencode(one), os.fsencode(other))
    if _libc.renameat2(folder, names[0], folder, names[1], how) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_rpc_socket(path: str, mode: int, gid: int = -1) -> socket.socket:
    """The socket that procmanctl connects to, made as a Unix listener is. Raises `Failed` if a daemon listens there,
    and where the folder is the default one in /tmp (`rpc.default_socket`) and somebody else made it or may write it."""
    hint = "set another daemon.socket"
    return _open_unix(path, RPC_BACKLOG, mode, (-1, gid), hint, own_folder=rpc.tmp_owner(path) is not None)


def socket_file(path: str) -> FileId | None:
    """Which socket stands at `path` now; None if none does, or the way there can't be trusted."""
    try:
        with _folder_of(path) as folder:
            return _socket_in(folder, os.path.basename(path))
    except OSError:
        return None


def remove_socket_file(path: str, made: FileId | None = None) -> None:
    """Removes the file of a Unix socket that was closed for good. Any other file is left alone; with `made`, so is a
    socket that is another one than this (see `socket_file`). A folder that others may have swapped is not entered."""
    with contextlib.suppress(OSError), _folder_of(path) as folder:
        name = os.path.basename(path)
        found = _socket_in(folder, name)
        if found is not None and made in (None, found):
            os.unlink(name, dir_fd=folder)


def _socket_in(folder: int, name: str) -> FileId | None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


@contextlib.contextmanager
def _folder_of(path: str, make: int | None = None) -> Iterator[int]:
    folder = open_folder(os.path.dirname(path), make)
    try:
        yield folder
    finally:
        os.close(folder)


def _open_tcp(listener: Listener, *, found: bool, listen: bool = True) -> socket.socket:
    candidates = _tcp_candidates(listener)
    for family, where in candidates:
        try:
            return _bind_tcp(family, where, listener, found, listen)
        except OSError as error:
            no_family = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            if no_family and (family, where) != candidates[-1]:
                continue
            raise _tcp_failure(listener, where[0], error) from error
    raise AssertionError("no candidate")  # _tcp_candidates gives one at least


def _tcp_candidates(listener: Listener) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    address = listener.address
    if address.host == "":
        return [(socket.AF_INET6, ("::", address.port)), (socket.AF_INET, ("0.0.0.0", address.port))]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no host name at all
        reason = error.strerror if isinstance(error, socket.gaierror) else "it is no host name"
        raise Failed(
            f"can't listen on {address}: {address.host!r} is not known ({reason})",
            hint=f"give listener {listener.title!r} a numeric address",
        ) from error
    # A name that has both kinds ("localhost") means IPv4, as in every Python server; "[::1]" is there for the other.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, where = found[0]
    return [(family, where)]  # type: ignore[list-item]  # typeshed also allows (int, bytes), from a libc without IPv6


def _bind_tcp(
    family: socket.AddressFamily, where: tuple[str, int], listener: Listener, found: bool, listen: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Most servers set it themselves; uvicorn can't for a socket that it inherits (it takes
        # it for a Unix socket), and then every other answer on a kept connection is 40 ms late.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listener.address.host != "")
        if found:
            sock.bind(where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if not found:
            sock.bind(where)
        if listen:
            sock.listen(listener.backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_failure(listener: Listener, host: str, error: OSError) -> Failed:
    address = listener.address
    another = f"give listener {listener.title!r} another address"
    match error.errno:
        case errno.EADDRINUSE:
            holder, listens = _tcp_holder(host, address.port)
            hint = "stop that process" if listens else _RESERVE.format(port=address.port)
            return Failed(f"{address} is in use by {holder}", hint=f"{hint}, or {another}")
        case errno.EACCES:
            return Failed(
                f"can't listen on {address}: this port needs root or CAP_NET_BIND_SERVICE",
                hint="run procmand as root, give it AmbientCapabilities=CAP_NET_BIND_SERVICE, or use a port above 1023",
            )
        case errno.EADDRNOTAVAIL:
            return Failed(f"can't listen on {address}: this machine has no such address", hint=another)
        case _:
            return Failed(f"can't listen on {address}: {error.strerror}", hint=another)


def _tcp_holder(host: str, port: int) -> tuple[str, bool]:
    """Who holds it, and if by listening: a port may also be that of a connection. That takes a look at every process
    of the machine, and a program that can't start asks again and again: so the answer is good for HOLDER_SECONDS."""
    now = time.monotonic()
    at, told = _holders.get((host, port), (0.0, ("", True)))
    if not told[0] or now - at > HOLDER_SECONDS:
        told = _look_for_holder(host, port)
        _holders.clear()
        _holders[host, port] = now, told
    return told


def _look_for_holder(host: str, port: int) -> tuple[str, bool]:
    import psutil  # only needed for this message, and a daemon that is well never pays for it

    wild = ("::", "0.0.0.0")
    found: list[tuple[bool, bool, int, str]] = []
    with contextlib.suppress(psutil.Error, OSError):
        for entry in psutil.net_connections("tcp"):
            ip, its_port = entry.laddr or ("", 0)
            if its_port == port and (ip == host or ip in wild or host in wild or ip == f"::ffff:{host}"):
                # A listening holder before a client that merely uses the port; a low pid: the master, not its worker.
                found.append((entry.status != psutil.CONN_LISTEN, entry.pid is None, entry.pid or 0, entry.status))
    connects, hidden, pid, status = min(found, default=(False, True, 0, ""))
    if hidden and status in _ENDED:
        return "a connection that has just ended (the kernel keeps its port for up to a minute)", False
    who = "a process that this user may not see" if hidden else _describe(pid)
    return (f"a connection of {who}", False) if connects else (who, True)


def holder(inode: int) -> str:
    """Which process has the socket with this inode open, in words. Looks at every process: for a thread."""
    link = f"socket:[{inode}]"
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # it has gone, or is somebody else's
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == link:
                        return _describe(pid)
    return "a process that this user may not see"


def _describe(pid: int) -> str:
    """Pid and command of a process, on one line and safe for a terminal."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(4096).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    command = "".join(char if char.isprintable() else "?" for char in command)
    if len(command) > _COMMAND_MAX:
        command = command[: _COMMAND_MAX - 1] + "…"
    return f"pid {pid} ({command})" if command else f"pid {pid}"


def _open_unix(
    path: str, backlog: int, mode: int, owner: tuple[int, int], hint: str, *, own_folder: bool = False
) -> socket.socket:
    size = len(os.fsencode(path))
    if size > PATH_MAX:
        raise Failed(
            f"can't listen on unix:{path}: the path has {size} bytes, a Unix socket takes {PATH_MAX}",
            hint="choose a shorter path",
        )
    try:
        with _folder_of(path, make=0o755) as folder:
            if own_folder:
                _check_own(folder, os.path.dirname(path), hint)
            _clear_stale(folder, path, hint)
            return _bind_unix(folder, path, backlog, mode, owner)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # somebody was faster, between the look and the bind
            raise Failed(f"unix:{path} is in use by another process", hint=f"stop it, or {hint}") from error
        raise Failed(f"can't listen on unix:{path}: {error.strerror}", hint=_unix_hint(error, owner)) from error


def _check_own(folder: int, path: str, hint: str) -> None:
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Failed(
            f"can't use the folder {path}: it must belong to the user of procmand, and nobody else may write it",
            hint=f"remove it, set XDG_RUNTIME_DIR, or {hint}: in /tmp any user could have made it",
        )


def _unix_hint(error: OSError, owner: tuple[int, int]) -> str:
    if error.errno == errno.ELOOP:
        return "give the path without the symlink"
    if error.errno == errno.EPERM and owner != (-1, -1):
        return "only root can give a socket to another user, or to a group that it is not in"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the folder must be writable for the user of procmand"
    return ""


def _bind_unix(folder: int, path: str, backlog: int, mode: int, owner: tuple[int, int]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made: int | None = None
    try:
        # bind() gives the file the mode of the socket's own inode, less the umask. (Changing the umask for a moment
        # would hit files that the log thread makes just then.)
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        made = _made_now(folder, os.path.basename(path))
        _dress(made, mode, owner)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        if made is not None:
            _unlink(folder, os.path.basename(path), made)
        raise
    finally:
        if made is not None:
            os.close(made)
    return sock


def _made_now(folder: int, name: str) -> int:
    """A descriptor of the socket file that was just bound."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise OSError(errno.EEXIST, "somebody replaced its folder while it was made") from error
    found = os.fstat(fd)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise OSError(errno.EEXIST, "somebody replaced the file while it was made")
    return fd


def _dress(made: int, mode: int, owner: tuple[int, int]) -> None:
    """Sets owner and mode of the socket file, through a descriptor: nobody can swap the path for a link in between."""
    name = f"/proc/self/fd/{made}"
    if owner != (-1, -1):
        os.chown(name, *owner)
    os.chmod(name, mode)


def _unlink(folder: int, name: str, known: int) -> None:
    """Removes the socket file `name` if it still is the one that the descriptor `known` stands for."""
    status = os.fstat(known)
    if _socket_in(folder, name) == (status.st_dev, status.st_ino):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _clear_stale(folder: int, path: str, hint: str, *, remove: bool = True) -> None:
    """Removes a socket file that nobody listens on. Raises `Failed` for one that is in use, and for any other file."""
    try:
        found = os.open(os.path.basename(path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return
    try:
        if _is_stale(path, found, hint) and remove:
            _unlink(folder, os.path.basename(path), found)
    finally:
        os.close(found)


def _is_stale(path: str, found: int, hint: str) -> bool:
    """Whether nobody listens on the socket file `found`; False: it is gone. Raises `Failed` as `_clear_stale`."""
    address = Address("unix", path=path)
    if not stat.S_ISSOCK(os.fstat(found).st_mode):
        raise Failed(f"can't listen on {address}: a file that is no socket is there", hint=f"remove {path}, or {hint}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{found}")  # this very file, whatever its path means by now
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise Failed(f"{address} belongs to another user", hint=f"stop it, or {hint}") from error
        except OSError as error:  # EAGAIN: its queue is full; EPROTOTYPE: it is no stream socket. Somebody is there.
            raise Failed(f"{address} is in use by another process", hint=f"stop it, or {hint}") from error
        # The kernel remembers who called listen(); that process may have passed the socket on and gone.
        pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    raise Failed(f"{address} is in use by {_describe(pid)}", hint=f"stop it, or {hint}")

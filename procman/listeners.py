"""Opening listening sockets: the only module that binds them.

It knows addresses, files and error numbers. It must not know programs, the keeper, or who holds the socket later.

A TCP listener is a SO_REUSEPORT group that only our own sockets belong to (architecture, section 4). The first socket
is bound *without* the option, so any other holder of the port, even one that would have shared it, is found and named.
The option is set between bind() and listen(). The kernel looks at it again in listen() and whenever another socket
binds, so later sockets of the same user can join, and a classic BPF program can be attached (socket(7), SO_REUSEPORT).

The file of a Unix listener has its mode and owner before listen(): until then a connection is refused, whoever tries.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from procman.config import Address, Listener
from procman.errors import Failed

PATH_MAX = 107
"""Bytes in the path of a Unix socket: sun_path has 108 with the NUL (unix(7))."""

RPC_BACKLOG = 1024

_COMMAND_MAX = 80


def open_listener(listener: Listener) -> socket.socket:
    """The first socket of `listener`: bound, listening, blocking, closed on exec.

    TCP: the socket founds a SO_REUSEPORT group that `join` extends. "" as host means all addresses, IPv6 and IPv4 by
    one socket (IPv4 alone where the machine has no IPv6); "::" means IPv6 only, so that it can stand beside "0.0.0.0".
    Unix: a stale file is replaced, missing folders are made with mode 0755, `mode` and `uid:gid` are set before anybody
    can connect.

    Raises `Failed` with the holder of an address that is in use, as far as this user may see it.
    """
    if listener.address.kind == "unix":
        hint = f"give listener {listener.name!r} another path"
        return _open_unix(listener.address.path, listener.backlog, listener.mode, (listener.uid, listener.gid), hint)
    return _open_tcp(listener, found=True)


def join(listener: Listener) -> socket.socket:
    """One more socket in the SO_REUSEPORT group that `open_listener` founded. It must be a TCP listener.

    The place of a socket in the group, which a BPF program selects by, is the order of listen(). Call this only while
    the first socket is open: otherwise nothing checks for a foreign holder of the port.
    """
    if listener.address.kind == "unix":
        raise Failed(f"{listener.address} can't be shared by several sockets: only TCP has SO_REUSEPORT")
    return _open_tcp(listener, found=False)


def open_rpc_socket(path: str, mode: int, gid: int = -1) -> socket.socket:
    """The socket that procmanctl connects to, made as a Unix listener is. Raises `Failed` if a daemon listens there."""
    hint = "set another daemon.socket"
    return _open_unix(path, RPC_BACKLOG, mode, (-1, gid), hint)


def remove_socket_file(path: str) -> None:
    """Removes the file of a Unix socket that was closed for good. Any other file is left alone."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _open_tcp(listener: Listener, *, found: bool) -> socket.socket:
    candidates = _tcp_candidates(listener)
    for family, where in candidates:
        try:
            return _bind_tcp(family, where, listener, found)
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
            hint=f"give listener {listener.name!r} a numeric address",
        ) from error
    # A name that has both kinds ("localhost") means IPv4, as in every Python server; "[::1]" is there for the other.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, where = found[0]
    return [(family, where)]  # type: ignore[list-item]  # typeshed also allows (int, bytes), from a libc without IPv6


def _bind_tcp(family: socket.AddressFamily, where: tuple[str, int], listener: Listener, found: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listener.address.host != "")
        if found:
            sock.bind(where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if not found:
            sock.bind(where)
        sock.listen(listener.backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_failure(listener: Listener, host: str, error: OSError) -> Failed:
    address = listener.address
    another = f"give listener {listener.name!r} another address"
    match error.errno:
        case errno.EADDRINUSE:
            holder = _tcp_holder(host, address.port)
            return Failed(f"{address} is in use by {holder}", hint=f"stop that process, or {another}")
        case errno.EACCES:
            return Failed(
                f"can't listen on {address}: this port needs root or CAP_NET_BIND_SERVICE",
                hint="run procmand as root, give it AmbientCapabilities=CAP_NET_BIND_SERVICE, or use a port above 1023",
            )
        case errno.EADDRNOTAVAIL:
            return Failed(f"can't listen on {address}: this machine has no such address", hint=another)
        case _:
            return Failed(f"can't listen on {address}: {error.strerror}", hint=another)


def _tcp_holder(host: str, port: int) -> str:
    import psutil  # only needed for this message, and a daemon that is well never pays for it

    wild = ("::", "0.0.0.0")
    best: tuple[bool, int] | None = None
    with contextlib.suppress(psutil.Error, OSError):
        for entry in psutil.net_connections("tcp"):
            ip, its_port = entry.laddr or ("", 0)
            if its_port != port or entry.pid is None:
                continue
            if ip == host or ip in wild or host in wild or ip == f"::ffff:{host}":
                # A listening holder before a client that merely uses the port; a low pid: the master, not its worker.
                rank = (entry.status != psutil.CONN_LISTEN, entry.pid)
                best = min(best or rank, rank)
    return _describe(best[1]) if best else "a process that this user may not see"


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


def _open_unix(path: str, backlog: int, mode: int, owner: tuple[int, int], hint: str) -> socket.socket:
    size = len(os.fsencode(path))
    if size > PATH_MAX:
        raise Failed(
            f"can't listen on unix:{path}: the path has {size} bytes, a Unix socket takes {PATH_MAX}",
            hint="choose a shorter path",
        )
    try:
        _make_folder(os.path.dirname(path))
        _clear_stale(path, hint)
        return _bind_unix(path, backlog, mode, owner)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # somebody was faster, between the look and the bind
            raise Failed(f"unix:{path} is in use by another process", hint=f"stop it, or {hint}") from error
        raise Failed(f"can't listen on unix:{path}: {error.strerror}", hint=_unix_hint(error, owner)) from error


def _unix_hint(error: OSError, owner: tuple[int, int]) -> str:
    if error.errno == errno.EPERM and owner != (-1, -1):
        return "only root can give a socket to another user, or to a group that it is not in"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the folder must be writable for the user of procmand"
    return ""


def _bind_unix(path: str, backlog: int, mode: int, owner: tuple[int, int]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        # bind() gives the file the mode of the socket's own inode, less the umask. (Changing the umask for a moment
        # would hit files that the log thread makes just then.)
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        bound = True
        _dress(path, mode, owner)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        if bound:
            remove_socket_file(path)
        raise
    return sock


def _dress(path: str, mode: int, owner: tuple[int, int]) -> None:
    """Sets owner and mode of the socket file, through a descriptor: nobody can swap the path for a link in between."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EEXIST, "somebody replaced the file while it was made")
        name = f"/proc/self/fd/{fd}"
        if owner != (-1, -1):
            os.chown(name, *owner)
        os.chmod(name, mode)
    finally:
        os.close(fd)


def _make_folder(folder: str) -> None:
    """Makes what is missing of `folder` with mode 0755, whatever the umask; what exists stays as it is."""
    if not folder or os.path.isdir(folder):
        return
    _make_folder(os.path.dirname(folder))
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
        os.chmod(folder, 0o755)


def _clear_stale(path: str, hint: str) -> None:
    """Removes a socket file that nobody listens on. Raises `Failed` for one that is in use, and for any other file."""
    address = Address("unix", path=path)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise Failed(f"can't listen on {address}: a file that is no socket is there", hint=f"remove {path}, or {hint}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise Failed(f"{address} belongs to another user", hint=f"stop it, or {hint}") from error
        except OSError as error:  # EAGAIN: its queue is full; EPROTOTYPE: it is no stream socket. Somebody is there.
            raise Failed(f"{address} is in use by another process", hint=f"stop it, or {hint}") from error
        # The kernel remembers who called listen(); that process may have passed the socket on and gone.
        pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    raise Failed(f"{address} is in use by {_describe(pid)}", hint=f"stop it, or {hint}")

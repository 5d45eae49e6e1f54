"""The receiving side of sd_notify(3): READY=1, STOPPING=1, STATUS=... from programs, each with its true sender.

It knows datagrams and credentials. It must not know what a message means for a process.

The kernel adds pid and uid of the sender (SO_PASSCRED, unix(7)), so they can't be forged. The text can be anything: a
program may be broken or hostile. What makes no sense is ignored and counted, and nothing here raises because of it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

from procman.errors import Failed
from procman.folders import open_folder
from procman.records import dataclass

MESSAGE_MAX = 4096
"""Bytes. Longer messages are ignored, as systemd does."""

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_ANCESTORS_MAX = 64
_IGNORED_IN_A_ROW = 64
_DROPPED_AT_ONCE = 1024
"""More than a queue of datagrams holds (net.unix.max_dgram_qlen)."""
_PATH_MAX = 107


@dataclass(frozen=True, slots=True)
class Message:
    """One notification. `pid` is 0 if the sender lives in a PID namespace that can't be seen from here.

    The values are whatever the program wrote, with broken UTF-8 replaced: escape them before they reach a terminal.
    """

    fields: dict[str, str]
    pid: int
    uid: int


class NotifySocket:
    """The datagram socket that NOTIFY_SOCKET names for a program. `ignored` counts messages that made no sense."""

    def __init__(self, path: str, uid: int) -> None:
        """Binds `path`, in a folder that exists, for user `uid` alone (mode 0600). An old socket there is replaced.

        Raises `Failed`.
        """
        if len(os.fsencode(path)) > _PATH_MAX:
            raise Failed(f"can't make {path}: the path of a Unix socket takes {_PATH_MAX} bytes")
        sock = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._bind(sock, path, uid)
        except OSError as error:
            if sock is not None:
                sock.close()
            raise Failed(f"can't make the notification socket {path}: {error.strerror}") from error
        self._own(sock, path)

    @staticmethod
    def _bind(sock: socket.socket, path: str, uid: int) -> None:
        folder, name = open_folder(os.path.dirname(path)), os.path.basename(path)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=folder)
            # Credentials first, so that no message can be queued without them; the file takes the mode of the socket.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(path)
            if uid != os.geteuid():
                os.chown(name, uid, -1, dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(folder)

    @classmethod
    def from_fd(cls, fd: int) -> NotifySocket:
        """Goes on with a socket that another `NotifySocket` had made; waiting messages are kept. Takes `fd` over."""
        self = cls.__new__(cls)
        sock = socket.socket(fileno=fd)
        self._own(sock, sock.getsockname())
        return self

    def _own(self, sock: socket.socket, path: str) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.path = path
        self.ignored = 0

    def fileno(self) -> int:
        """For a selector or the keeper."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes this descriptor. The file stays: the keeper may hold the socket."""
        self._socket.close()

    def peek(self) -> Message | None:
        """The next message, which stays here until `take`: it outlives us. None when none is waiting. Never blocks.

        After many bad messages in a row it also returns None: a flood must not hold the loop, and the socket stays
        readable.
        """
        for _ in range(_IGNORED_IN_A_ROW):
            try:
                # No room for SCM_RIGHTS after the credentials: the kernel itself drops descriptors sent along, so they
                # can't use up ours. That is also all the answer that sd_notify_barrier(3) waits for.
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MESSAGE_MAX, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_PEEK
                )
            except BlockingIOError:
                return None
            message = None if flags & socket.MSG_TRUNC else _parse(data, ancillary)
            if message is not None:
                return message
            self.take()
            self.ignored += 1
        return None

    def drop(self) -> None:
        """Nobody that could still say something is there: what waits is of no use any more."""
        for _ in range(_DROPPED_AT_ONCE):
            try:
                self._socket.recv(1)
            except BlockingIOError:
                return

    def receive(self) -> Message | None:
        """`peek` and `take` in one."""
        message = self.peek()
        if message is not None:
            self.take()
        return message

    def take(self) -> None:
        """The message that `peek` has shown is dealt with."""
        with contextlib.suppress(BlockingIOError):
            self._socket.recv(1)  # not 0: Python would not ask the kernel at all


def _parse(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> Message | None:
    fields = {}
    for line in data.decode(errors="replace").split("\n"):
        key, equals, value = line.partition("=")
        if key and equals:
            fields[key] = value
    credentials = [content for _, kind, content in ancillary if kind == socket.SCM_CREDENTIALS]
    if not fields or not credentials or len(credentials[0]) != _CREDENTIALS.size:
        return None
    pid, uid, _ = _CREDENTIALS.unpack(credentials[0])
    return Message(fields, pid, uid)


def allowed(message_pid: int, uid: int, main_pid: int, program_uid: int) -> bool:
    """Whether a message from (`message_pid`, `uid`) may speak for the program with this main process and user.

    The user must be the program's, root or our own. The sender must be the main process, a descendant of it or in its
    session. A sender that has already gone, or that can't be seen from here, is judged by its user alone:
    `systemd-notify` in a shell script ends before its message is read.
    """
    if uid not in (0, program_uid, os.geteuid()):
        return False
    if message_pid in (0, main_pid):
        return True
    pid = message_pid
    for step in range(_ANCESTORS_MAX):
        found = _parent_and_session(pid)
        if found is None:
            return step == 0
        parent, session = found
        if main_pid in (parent, session):
            return True
        if parent <= 1:
            return False
        pid = parent
    return False


def _parent_and_session(pid: int) -> tuple[int, int] | None:
    """From /proc/PID/stat (proc(5)); the command in it may hold any character, the last ")" ends it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            rest = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(rest[1]), int(rest[3])) if len(rest) > 3 else None

"""What the keeper holds for the processes: log pipes, notification sockets, and listening sockets (`sockets`).

Each is opened once, given to the keeper under a name, and found again there by the next supervisor. The supervisor
keeps open only what it reads itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from procman import listeners, logs, servers
from procman.config import Daemon, Log, Program
from procman.errors import Failed, ProcmanError
from procman.folders import open_folder
from procman.launch import log_pipes, notify_name
from procman.link import KeeperLink
from procman.notify import NotifySocket
from procman.sockets import Sockets


def make_notify_folder(path: str) -> None:
    """Programs of every user must get to their sockets in it, whatever the daemon's umask; also in one that an earlier
    daemon has left. Raises OSError."""
    folder = open_folder(path, make=0o755)
    try:
        if os.fstat(folder).st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{folder}", 0o755)
    finally:
        os.close(folder)


class Holdings:
    """The held descriptors by name: `log/PLACE/out/r` and so on (r, w: a pipe; s: its spool), `notify/PLACE`, and those
    of `sockets`.

    `held` are the descriptors that the snapshot brought; this object owns them. `counters` are what the log thread of
    the supervisor before had counted, `told` what `document` had told then.
    """

    def __init__(
        self,
        link: KeeperLink,
        held: dict[str, int],
        log_thread: logs.LogThreads,
        daemon: Daemon,
        *,
        counters: Mapping[str, logs.Counters],
        told: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._link = link
        self._log_thread = log_thread
        self._runtime_folder = os.path.dirname(daemon.socket)
        self._folder = os.path.join(self._runtime_folder, "notify")
        self._names = set(held)
        self._received = held
        self.counters = dict(counters)
        self._captured: set[str] = set()
        self._pipes: dict[str, int] = {}  # inodes, by the name of the stream
        self.notify_sockets: dict[str, NotifySocket] = {}
        self.sockets = Sockets(self, held, told.get("seconds", []), told.get("sockets", {}))

    def document(self) -> dict[str, Any]:
        """Part of the state file: how pipes and the files of Unix listeners are known again without the keeper."""
        sockets = self.sockets
        return {"pipes": self._pipes, "sockets": sockets.document(), "seconds": sockets.seconds()}

    def take(self, name: str) -> int | None:
        """The descriptor that the snapshot brought under `name`, now the caller's; None if there is none."""
        return self._received.pop(name, None)

    def hold(self, descriptors: Mapping[str, int]) -> None:
        """Let the keeper hold copies of `descriptors`, all or none."""
        self._link.hold(descriptors)
        self._names.update(descriptors)

    def lost(self, names: Sequence[str]) -> None:
        """The keeper had no room for these: they are opened again when a child needs them."""
        for name in names:
            self._names.discard(name)
            self.sockets.lost(name)
            stream, _, part = name.rpartition("/")
            if stream in self._captured and part != "s":  # without a held spool it works, but for a crash
                self._captured.discard(stream)
                self._log_thread.remove(stream)
            if name.startswith("notify/"):
                self.close_notify_socket(name.removeprefix("notify/"))

    def holds(self, name: str) -> bool:
        """Whether the keeper holds it."""
        return name in self._names

    def held(self) -> list[str]:
        """All names."""
        return list(self._names)

    def release(self, name: str) -> None:
        """The keeper may close it."""
        if name in self._names:
            self._names.discard(name)
            self._link.release(name)

    def close_received(self) -> None:
        """Close the copies of what nobody took; the keeper still has its own."""
        for fd in self._received.values():
            os.close(fd)
        self._received.clear()

    # --- logs -------------------------------------------------------------------------------------------------------

    def open_logs(self, program: Program) -> None:
        """Pipes for the output of `program`, and somebody who empties them; what is open already stays. Raises
        ProcmanError."""
        out, err = log_pipes(program)
        paths = {out: program.log.path, err: program.log.path if err == out else program.log.error_path}
        for name, path in paths.items():
            if name is None or name in self._captured:
                continue
            spool = self._log_spool(name, program.log)
            try:
                read_end = self._log_pipe(name)
            except ProcmanError:
                if spool >= 0:
                    os.close(spool)
                raise
            self._pipes[name] = os.fstat(read_end).st_ino
            stream = logs.Stream(name, program.name, program.log, path, read_end, spool)
            self._log_thread.add(stream, self.counters.get(name))
            self._captured.add(name)

    def change_log(self, name: str, log: Log, path: str) -> None:
        """The output that comes through the pipe `name`, which is being emptied, goes elsewhere, or otherwise."""
        try:
            spool = self._log_spool(name, log)
        except ProcmanError:
            spool = -1  # then it has one that does not outlive this supervisor
        self._log_thread.change(name, log, path, spool)

    def _log_spool(self, name: str, log: Log) -> int:
        """The held spool of the pipe `name`, which is made if its output is read by lines; -1 where there is none, or
        the log thread has it. Raises Failed."""
        spool = self.take(f"{name}/s")
        if spool is not None:
            return spool
        if not log.by_lines or self.holds(f"{name}/s"):
            return -1
        try:
            spool = logs.make_spool()
        except OSError as error:
            raise Failed(f"can't make the memory for its output: {error.strerror}") from error
        try:
            self.hold({f"{name}/s": spool})
        except ProcmanError:
            os.close(spool)
            raise
        return spool

    def _log_pipe(self, name: str) -> int:
        """The read end of the held pipe `name`, which is made if need be."""
        read_end, write_end = self.take(f"{name}/r"), self.take(f"{name}/w")
        if read_end is not None and write_end is not None:
            os.close(write_end)
            return read_end
        for half in (read_end, write_end):
            if half is not None:  # a supervisor died while it closed them
                os.close(half)
        try:
            read_end, write_end = logs.make_pipe()
        except OSError as error:
            raise Failed(f"can't make the pipe for its output: {error.strerror}") from error
        try:
            self.hold({f"{name}/r": read_end, f"{name}/w": write_end})
        except ProcmanError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return read_end

    def captured(self, program: Program) -> list[str]:
        """Names of the pipes of `program` that are being emptied: all of them, but for what `open_logs` could not
        open."""
        return [name for name in dict.fromkeys(log_pipes(program)) if name is not None and name in self._captured]

    def is_captured(self, name: str) -> bool:
        """Whether the pipe of this name is being emptied."""
        return name in self._captured

    def close_logs(self, program: Program) -> dict[str, logs.Removed]:
        """What is still in the pipes is written, then they close. Returns what becomes of that, by name."""
        removed = {}
        for name in self.captured(program):
            self._captured.discard(name)
            self._pipes.pop(name, None)
            self.counters.pop(name, None)  # one that is made later begins anew
            self.release(f"{name}/w")
            removed[name] = self._log_thread.remove(name)
            self.release(f"{name}/r")
            self.release(f"{name}/s")
        return removed

    # --- notification sockets ---------------------------------------------------------------------------------------

    def notify_socket(self, program: Program) -> NotifySocket:
        """The socket on which `program` may say READY=1. Raises Failed."""
        known = self.notify_sockets.get(program.key)
        if known is not None:
            return known
        name = notify_name(program)
        received = self.take(name)
        if received is not None:
            socket = NotifySocket.from_fd(received)
        else:
            try:
                make_notify_folder(self._folder)
            except OSError as error:
                raise Failed(f"can't make the folder {self._folder}: {error.strerror}") from error
            uid = program.account.uid if program.account is not None else os.geteuid()
            socket = NotifySocket(os.path.join(self._folder, program.key), uid)
            try:
                self.hold({name: socket.fileno()})
            except ProcmanError:
                socket.close()
                raise
        self.notify_sockets[program.key] = socket
        return socket

    def close_notify_socket(self, name: str) -> None:
        """It is no longer needed."""
        socket = self.notify_sockets.pop(name, None)
        if socket is not None:
            self.release(f"notify/{name}")
            listeners.remove_socket_file(socket.path)
            socket.close()

    # --- control sockets --------------------------------------------------------------------------------------------

    def control_folder(self, program: Program) -> None:
        """The folder in which a server makes its own control socket: for its user alone. Raises Failed."""
        if program.server not in servers.TELLING:
            return
        folder = os.path.dirname(self._control_socket(program))
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if program.account is not None and os.geteuid() == 0:
                os.chown(folder, program.account.uid, program.account.gid, follow_symlinks=False)
        except OSError as error:
            raise Failed(f"can't make the folder {folder} for its control socket: {error.strerror}") from error

    def remove_control_folder(self, program: Program) -> None:
        """`program` has gone."""
        if program.server in servers.TELLING:
            path = self._control_socket(program)
            listeners.remove_socket_file(path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))

    def _control_socket(self, program: Program) -> str:
        return servers.control_socket(self._runtime_folder, program.key, program.server)

    def remove_files(self) -> None:
        """The daemon ends: no socket file may stay behind."""
        for name in list(self.notify_sockets):
            self.close_notify_socket(name)
        self.sockets.close_others({})
        try:
            os.rmdir(self._folder)
        except OSError:
            pass  # never made, or not ours alone

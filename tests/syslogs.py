"""Stands in for syslogd and systemd-journald: sockets that a test reads, where a daemon looks for the real ones.

The daemon runs with a /dev and a /run of its own (mount namespace), so nothing of the machine is touched. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

SCRIPT = r"""
set -e; F=$1; shift; mkdir -p $F/dev
mount -t tmpfs -o mode=755 tmpfs $F/dev
for n in null zero full random urandom tty; do : >$F/dev/$n; mount --bind /dev/$n $F/dev/$n; done
ln -s /proc/self/fd $F/dev/fd; ln -s $F/syslog.sock $F/dev/log; mkdir $F/dev/shm
mount --move $F/dev /dev
mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/systemd/journal; ln -s $F/journal.sock /run/systemd/journal/socket
exec "$@"
"""
"""$1: the folder of the sockets. The rest: a command."""

UNSHARE = ["unshare", "--mount", "--propagation", "private"]


def prefix(folder: Path) -> list[str]:
    """A command before a command, which then finds `syslog.sock` and `journal.sock` of `folder` where those of the
    machine would be."""
    return [*UNSHARE, "sh", "-c", SCRIPT, "sh", str(folder)]


def possible() -> bool:
    """Whether that works here."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


class Reader:
    """Reads datagrams at `path` until it is closed; `messages` are those that came. What comes as a memory file is
    read, and counted in `large`."""

    def __init__(self, path: Path) -> None:
        self.messages: list[bytes] = []
        self.large = 0
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> None:
        """Ends it, as a daemon ends that is stopped: nobody listens, and the path is gone."""
        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(10)
        self._socket.close()

    def _read(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 18, 4)
            for fd in descriptors:
                with open(fd, "rb") as file:
                    file.seek(0)
                    data = file.read()
                self.large += 1
            if not data:
                return
            self.messages.append(data)

"""The service manager above procmand, sd_notify(3): what the keeper tells it, and how often it wants to hear from us.

It also keeps copies of descriptors (FDSTORE=1): listening sockets and log pipes outlive even the keeper there. What it
does not take at once waits here. This module must not know programs, nor the supervisor.
"""

from __future__ import annotations

import array
import collections
import os
import select
import socket
from collections.abc import Callable, Sequence

OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE")
"""Variables that the service manager meant for the keeper alone."""

FIRST_FD = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""

STORED = ("listener/", "listener~/", "log/")
"""How the names start of what is worth keeping when the keeper dies. The rest is made anew."""

NAME_MAX = 255
"""Characters of a FDNAME."""

ALIVE = "WATCHDOG=1"

FINISH_TRIES, FINISH_SECONDS = 20, 0.05
"""How often, and how far apart, the last messages are offered."""


class Service:
    """The service manager as our environment names it, or nobody. Takes the variables out of the environment.

    `later` is called when there is something to `flush` a bit later.
    """

    def __init__(self, later: Callable[[], object] = lambda: None) -> None:
        told = {name: os.environ.pop(name, "") for name in OURS}
        self.told = {name: told[name] for name in OURS if told[name] and not name.startswith("LISTEN_")}
        """What our next self must find in its environment again."""
        self._told = told
        self._later = later
        self._waiting: collections.deque[tuple[bytes, list[int]]] = collections.deque()
        address = told["NOTIFY_SOCKET"]
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._stores = bool(address) and told["FDSTORE"] != "0"
        self.watchdog = _seconds(told["WATCHDOG_USEC"], told["WATCHDOG_PID"])
        """It wants to hear from us within this many seconds; 0: it does not watch."""

    def notify(self, state: str) -> None:
        """Send `state` ("READY=1"), never waiting for the other side: what it does not take at once is offered again.
        Not so a sign of life: there will be others."""
        if state == ALIVE and self._address:
            self._send(state.encode(), [])
        elif self._address:
            self._queue(state, [])

    # --- its store of descriptors -----------------------------------------------------------------------------------

    def take_stored(self) -> dict[str, int]:
        """The descriptors that it kept for us while there was no keeper, by name; closed on exec."""
        count, pid, names = (self._told[name] for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
        found: dict[str, int] = {}
        if pid != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
            return found
        for fd, encoded in zip(range(FIRST_FD, FIRST_FD + int(count)), names.split(":"), strict=False):
            name = encoded.replace("%3A", ":").replace("%25", "%")
            if name.startswith(STORED) and name not in found:
                found[name] = fd
        return found

    def store(self, name: str, descriptor: int) -> None:
        """Let it keep a copy of `descriptor`, if that is one to be kept. Not polled: a pipe may have no reader."""
        if self._stores and _storable(name):
            self._queue(f"FDSTORE=1\nFDPOLL=0\nFDNAME={_encoded(name)}", [descriptor])

    def drop(self, name: str) -> None:
        """It need not keep it any longer."""
        if self._stores and _storable(name):
            self._queue(f"FDSTOREREMOVE=1\nFDNAME={_encoded(name)}", [])

    def _queue(self, state: str, descriptors: Sequence[int]) -> None:
        message = state.encode(errors="replace")
        if not self._waiting and self._send(message, descriptors):
            return
        try:
            copies = [os.dup(fd) for fd in descriptors]
        except OSError:
            return  # no descriptor is free: this one is not kept
        self._waiting.append((message, copies))
        self._later()

    def flush(self) -> None:
        """Offer what waits, in order, as far as it is taken."""
        while self._waiting:
            message, copies = self._waiting[0]
            if not self._send(message, copies):
                self._later()
                return
            self._waiting.popleft()
            for fd in copies:
                os.close(fd)

    def finish(self) -> None:
        """The last chance for what waits: up to a second."""
        for _ in range(FINISH_TRIES):
            self.flush()
            if not self._waiting:
                return
            select.select([], [], [], FINISH_SECONDS)

    def _send(self, message: bytes, descriptors: Sequence[int]) -> bool:
        """False: not now, its queue is full. What can't be sent at all counts as sent."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendmsg([message], rights, socket.MSG_DONTWAIT, self._address)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            pass
        return True


def _storable(name: str) -> bool:
    """Worth keeping, and it can be a FDNAME: printable ASCII (sd_pid_notify_with_fds(3))."""
    return name.startswith(STORED) and name.isascii() and name.isprintable() and len(_encoded(name)) <= NAME_MAX


def _encoded(name: str) -> str:
    """`name` as a FDNAME, which may hold no colon: "log/shop%3A1/out/w"."""
    return name.replace("%", "%25").replace(":", "%3A")


def _seconds(microseconds: str, pid: str) -> float:
    if not (microseconds.isascii() and microseconds.isdecimal()) or (pid and pid != str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6

"""The service manager above procmand, sd_notify(3): what the keeper tells it, and how often it wants to hear from us.

It must not know programs, nor the supervisor.
"""

from __future__ import annotations

import os
import socket

OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""Variables that the service manager meant for the keeper alone."""


class Service:
    """The service manager as our environment names it, or nobody. Takes the variables out of the environment."""

    def __init__(self) -> None:
        told = {name: os.environ.pop(name, "") for name in OURS}
        self.told = {name: told[name] for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID") if told[name]}
        """What our next self must find in its environment again."""
        self._address = told["NOTIFY_SOCKET"]
        self.watchdog = _seconds(told["WATCHDOG_USEC"], told["WATCHDOG_PID"])
        """It wants to hear from us within this many seconds; 0: it does not watch."""

    def notify(self, state: str) -> None:
        """Send `state` ("READY=1"): best effort, as sd_notify(3) is, and never waiting for the other side."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(state.encode(errors="replace"), socket.MSG_DONTWAIT, address)
        except (OSError, ValueError):
            pass


def _seconds(microseconds: str, pid: str) -> float:
    if not (microseconds.isascii() and microseconds.isdecimal()) or (pid and pid != str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6

"""What a table's `log.mode` means: which channel a stream prints to, and how its lines are dressed for that.

The daemon's stdout and stderr are opened at once: later the descriptors may be other files. Syslog and the journal are
connected to when there is something to send.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

from procman.config import Log
from procman.logs import journald, lines, syslog
from procman.logs.channel import Channel
from procman.logs.datagrams import Datagrams
from procman.logs.flow import Flow
from procman.logs.lines import Dress, Origin
from procman.logs.outlet import Outlet

STDOUT, STDERR = "the daemon's stdout", "the daemon's stderr"


class Destinations:
    """The channels of one log thread. Made with -1 for both descriptors, it prints to neither."""

    def __init__(self, stdout_fd: int, stderr_fd: int, epoll: select.epoll, on_turn: Callable[[], None]) -> None:
        self._epoll = epoll
        self._on_turn = on_turn
        self._outlets = {STDOUT: Outlet(stdout_fd), STDERR: Outlet(stderr_fd)}
        self._channels: dict[str, Channel] = {}

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._channels.values())

    def aim(self, flow: Flow, log: Log) -> None:
        """Points a stream at its channel, unless it has a file, and dresses its lines."""
        stream = flow.stream
        origin = Origin.of(stream.process, error=stream.is_error)
        apart = log.stderr == "separate"
        flow.limit = lines.LINE_LIMIT
        flow.channel = None
        match log.mode:
            case "syslog":
                address = log.address or syslog.ADDRESS
                flow.channel = self._channel(f"{log.mode} {address}", lambda: Datagrams(address, streams=True))
                flow.dress, flow.limit = syslog.messages(origin, apart=apart), syslog.MESSAGE_LIMIT
            case "journal":
                flow.channel = self._channel(log.mode, lambda: Datagrams(journald.ADDRESS, journald.send_large))
                flow.dress, flow.limit = journald.entries(origin, apart=apart), journald.MESSAGE_LIMIT
            case "inherit":
                name = STDERR if stream.is_error else STDOUT
                outlet = self._outlets[name]
                flow.channel = self._channel(name, lambda: outlet)
                name_before = lines.prefix(origin.process, colour=outlet.coloured)
                flow.dress = _dress(log, origin, name_before, safe=outlet.terminal)
            case _:
                flow.dress = _dress(log, origin, b"") if log.by_lines else None

    def redirect(self, stdout_fd: int, stderr_fd: int) -> None:
        """The daemon's stdout and stderr are these now."""
        for name, fd in ((STDOUT, stdout_fd), (STDERR, stderr_fd)):
            channel = self._channels.get(name)
            if channel is not None:
                channel.let_go()
            self._outlets[name].redirect(fd)

    def close(self) -> None:
        """Closes what was opened here."""
        for channel in self:
            channel.outlet.close()
        for name in self._outlets.keys() - self._channels.keys():
            self._outlets[name].close()

    def _channel(self, name: str, make: Callable[[], Outlet | Datagrams]) -> Channel:
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(name, make(), self._epoll, self._on_turn)
        return channel


def _dress(log: Log, origin: Origin, name: bytes, *, safe: bool = False) -> Dress:
    if log.format == "json":
        return lines.json_objects(origin)
    return lines.text(name, timestamps=log.timestamps, safe=safe)

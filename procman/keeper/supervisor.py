"""One supervisor process, as the keeper sees it: started, told things, heard, looked after, and ended.

It knows one process and its wire. It must not know what the messages mean, nor when another one is needed: `Keeper`
decides that.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from procman.keeper import spawn
from procman.keeper.say import say
from procman.keeper.wire import Message, Wire, WireClosed, WireError

Obey = Callable[["Supervisor", Message, list[int]], None]
"""Does what one message says. Descriptors that stay in the list are closed by the caller."""


class Supervisor:
    """A process that was started by `start`, or taken over from the keeper's earlier self, with our end of its wire.

    `ready`: it has said that the table runs. `replaced`: we have ended it ourselves, for it was of no use any more.
    """

    def __init__(self, pid: int, sock: socket.socket, selector: selectors.BaseSelector, obey: Obey) -> None:
        self.pid = pid
        self.since = time.monotonic()
        self.ready = False
        self.replaced = False
        self.missed = 0
        self._reaped = False
        self._selector = selector
        self._obey = obey
        self._wire: Wire | None = Wire(sock)
        selector.register(sock.fileno(), selectors.EVENT_READ, self._wire_event)

    @classmethod
    def start(cls, command: Sequence[str], selector: selectors.BaseSelector, obey: Obey) -> Supervisor:
        """Start `command`; its last argument becomes the descriptor of the wire. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def become(report: int) -> NoReturn:
            try:
                spawn.become_supervisor(list(command), theirs.fileno())
            except BaseException as error:  # noqa: BLE001 - said, and then this process ends
                say(f"can't start the supervisor {command[0]}: {error}")
            os._exit(127)

        try:
            pid, report = spawn.fork_child(become)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        os.close(report)
        return cls(pid, ours, selector, obey)

    def wire_number(self) -> int:
        """The descriptor of the wire when nothing is on its way on our side, else -1: then it can be handed over."""
        return self._wire.fileno() if self._wire is not None and self._wire.idle else -1

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send `message`, as far as it still listens; never blocks."""
        if self._wire is None:
            return
        try:
            self._wire.send(message, descriptors)
            self._watch_wire()
        except WireClosed:
            pass  # its last words may be on the wire still: `_wire_event` finds them, and the end
        except WireError as error:
            self.replace(f"can't be told what happens ({error})")

    def replace(self, why: str) -> None:
        """It is of no use any more. Its end is reported by SIGCHLD."""
        say(f"the supervisor {why}; replacing it")
        self.replaced = True
        self.end()

    def end(self) -> None:
        """SIGKILL, which is what a supervisor is made for."""
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
        self.drop_wire()

    def hear_last_words(self) -> None:
        """It has ended, and was reaped. What it said before counts: "exit", or a descriptor to hold."""
        self._reaped = True
        while self._wire is not None:
            try:
                messages = self._wire.receive()
            except WireError:
                break
            if not messages:
                break
            self._take(messages)
        self.drop_wire()

    def drop_wire(self) -> None:
        """Close our end; what it says from now on is not heard."""
        if self._wire is not None:
            self._selector.unregister(self._wire.fileno())
            self._wire.close()
            self._wire = None

    def _watch_wire(self) -> None:
        if self._wire is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._wire.waiting else 0)
            self._selector.modify(self._wire.fileno(), events, self._wire_event)

    def _wire_event(self, events: int) -> None:
        if self._wire is None:
            return
        try:
            if events & selectors.EVENT_READ:
                self._take(self._wire.receive())
            if events & selectors.EVENT_WRITE and self._wire is not None:
                self._wire.flush()
                self._watch_wire()
        except WireClosed:
            self.drop_wire()  # it is on its way out; if it is not, pings find out
        except WireError as error:
            self.replace(f"talks nonsense ({error})")

    def _take(self, messages: list[tuple[Message, list[int]]]) -> None:
        for message, descriptors in messages:
            self._obey(self, message, descriptors)
            for fd in descriptors:
                os.close(fd)

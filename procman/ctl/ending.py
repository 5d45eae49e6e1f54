"""`procmanctl daemon shutdown`: asks the daemon to end, and waits until it has gone.

The keeper of a daemon is known by its pid. Whoever connects while it has no supervisor waits in the backlog of the
socket that it holds, and is told when it closes that: nothing is polled here.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from procman.client import Closed
from procman.errors import Failed, ProcmanError, Unreachable
from procman.rpc import Object

from .operating import Progress
from .session import Session

PAUSE = 0.05  # seconds between two connections, should they be closed at once


def shut_down(session: Session, timeout: float | None) -> None:
    """Returns when the daemon has gone. Raises Failed when it is still there after `timeout` seconds."""
    ending = _Ending(session, timeout)
    try:
        ending.wait()
    finally:
        ending.progress.clear()


class _Ending:
    """One shutdown; see the module."""

    def __init__(self, session: Session, timeout: float | None) -> None:
        self.progress = Progress(sys.stderr, quiet=session.json)
        self._session = session
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout
        self._asked = False
        self._keeper: Any = None
        self._begun = False

    def wait(self) -> None:
        while True:
            try:
                if self._has_gone():
                    return
            except Closed:
                pass  # it ends, or its supervisor is replaced: the next connection knows
            if self._end is not None and time.monotonic() >= self._end:
                raise Failed(
                    f"the daemon is still there after {self._timeout:g} s; it goes on to stop",
                    hint="procmanctl status shows what still runs",
                )
            time.sleep(PAUSE)

    def _has_gone(self) -> bool:
        """Asks for the end, again when a supervisor does not know of it, and stays connected as long as it can."""
        left = None if self._end is None else max(self._end - time.monotonic(), 0.001)
        with self._session.client(left) as client:
            try:
                client.connect()
                keeper = client.call("daemon.status").get("keeper_pid")
                if self._asked and keeper != self._keeper:
                    return True  # another daemon has taken its place
                self._asked, self._keeper = True, keeper
                client.call("daemon.shutdown")
            except Closed:
                raise
            except Unreachable as error:
                late = isinstance(error.__cause__, TimeoutError | BlockingIOError)
                if late or self._asked:
                    return not late
                raise
            with contextlib.suppress(ProcmanError):  # also when it says more than we read in time
                client.stream("events", self._heard, follow=True)
        return False

    def _heard(self, _method: str, event: Object) -> None:
        """Shows the changes of state since the daemon has begun to stop."""
        self._begun = self._begun or event.get("what") == "shutdown"
        if self._begun and event.get("type") == "state":
            self.progress.heard("progress", event)

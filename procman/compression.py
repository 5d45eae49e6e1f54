"""Compression of rotated log files, off the path of everything else: a queue, and one process that works for all.

The log threads say which log has something to compress. One file after the other is given to `compressor`, a child of
the keeper like any other, with nice 19 and the idle class of the disk: its source and its target go to it as
descriptors through a socket. When it is done, the log thread puts the target in the place of the source. So at most one
file is being compressed at a time, at most one processor is busy with it, and what waits is a list of logs, not of
files.

The compressor is started when it is needed, and ends when nothing was to do for a while, or when this end of its socket
closes: with the supervisor, however that dies. The next supervisor begins that file again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from procman.errors import ProcmanError
from procman.link import KeeperLink

log = logging.getLogger("procman")

CHILD = "procman/gzip"
"""How the keeper knows it, and what it holds for it for a moment. No name of the table has a "/"."""

SCRIPT = str(Path(__file__).with_name("compressor.py"))

IDLE_SECONDS = 30.0
"""Without work the compressor ends after this."""

AGAIN_SECONDS, AGAIN_MAX = 1.0, 60.0
"""One that could not be started, or has ended, is started again after this, which doubles up to the second number."""

LIMITS = {"nice": 19, "no_new_privileges": True}

INHERITED = ("PATH", "LD_LIBRARY_PATH")
"""Of the daemon's environment: what an interpreter may need to start."""

Pair = tuple[int, int]


class Logs(Protocol):
    """The log threads, as far as it needs them (`logs.LogThreads`)."""

    def begin_compression(self, path: str, then: Callable[[Pair | None], None]) -> None: ...

    def end_compression(self, path: str, problem: str) -> None: ...


class Compression:
    """The queue and its process. All methods belong to the event loop, in which it is made."""

    def __init__(self, link: KeeperLink) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._logs: Logs | None = None
        self._waiting: dict[str, None] = {}  # in the order in which they came
        self._path = ""  # the log whose file is with the compressor, or on its way there
        self._wire: socket.socket | None = None
        self._child = ""
        self._numbers = itertools.count(1)
        self._not_before = 0.0
        self._pause = AGAIN_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def begin(self, logs: Logs) -> None:
        """From now on there is somebody to get files from."""
        self._logs = logs
        self._next()

    def wish(self, path: str) -> None:
        """The log at `path` has something to compress."""
        self._waiting[path] = None
        self._next()

    def close(self) -> None:
        """Ends it; what is unfinished is begun again by the next daemon."""
        self._closed = True
        self._end_process()

    # --- one file after the other -----------------------------------------------------------------------------------

    def _next(self) -> None:
        if self._closed or self._path or self._logs is None or not self._waiting:
            return
        wait = self._not_before - self._loop.time()
        if wait > 0:
            self._later(wait, self._next)
            return
        self._path = next(iter(self._waiting))
        del self._waiting[self._path]
        self._logs.begin_compression(self._path, self._found)

    def _found(self, pair: Pair | None) -> None:
        """In the log thread: what there is to compress."""
        try:
            self._loop.call_soon_threadsafe(self._send, pair)
        except RuntimeError:  # the loop has ended
            for fd in pair or ():
                os.close(fd)

    def _send(self, pair: Pair | None) -> None:
        if self._closed:
            for fd in pair or ():
                os.close(fd)
            return
        if pair is None:
            self._path = ""
            if self._waiting:
                self._next()
            else:
                self._later(IDLE_SECONDS, self._end_process)
            return
        try:
            socket.send_fds(self._process(), [b"."], pair)
        except (OSError, ProcmanError) as error:
            self._failed(f"the compressor can't be started now: {getattr(error, 'strerror', None) or error}")
        finally:
            for fd in pair:
                os.close(fd)

    def _answered(self) -> None:
        assert self._wire is not None
        try:
            answer = self._wire.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        if not answer:
            self._failed("the compressor has ended; see the messages before")
        else:
            self._pause = AGAIN_SECONDS
            self._finished(answer.decode(errors="replace").strip("\0"))

    def _failed(self, problem: str) -> None:
        log.warning("%s; rotated files stay as they are for %g s", problem, self._pause)
        self._not_before = self._loop.time() + self._pause
        self._pause = min(2 * self._pause, AGAIN_MAX)
        self._end_process()
        if self._path:
            self._waiting[self._path] = None
            self._finished(problem)

    def _finished(self, problem: str) -> None:
        path, self._path = self._path, ""
        if path and self._logs is not None:
            self._logs.end_compression(path, problem)
        if self._waiting:
            self._next()
        else:
            self._later(IDLE_SECONDS, self._end_process)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if self._closed else self._loop.call_later(seconds, what)

    # --- the process ------------------------------------------------------------------------------------------------

    def _process(self) -> socket.socket:
        """Our end of its socket; it is started if need be. Raises OSError or ProcmanError."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._wire is not None:
            return self._wire
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._link.hold({CHILD: theirs.fileno()})
            self._child = f"{CHILD}#{os.getpid()}-{next(self._numbers)}"
            self._link.spawn(_request(self._child))
            self._link.release(CHILD)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._loop.add_reader(ours.fileno(), self._answered)
        self._wire = ours
        return ours

    def _end_process(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._wire is not None:
            self._loop.remove_reader(self._wire.fileno())
            self._wire.close()
            self._wire = None
            self._link.signal(self._child, signal.SIGKILL, tree=True)


def _request(child: str) -> dict[str, object]:
    """What the keeper is asked for."""
    return {
        "child": child,
        "argv": [sys.executable, "-I", "-S", SCRIPT],
        "env": {"PATH": os.defpath} | {name: os.environ[name] for name in INHERITED if name in os.environ},
        "directory": "/",
        "umask": 0o077,
        "stdout": CHILD,
        "stderr": None,
        "listen": [],
        "limits": LIMITS,
        "kill": "tree",
    }

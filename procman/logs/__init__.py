"""Capture of what programs print: pipe in, file (or the daemon's stdout) out, in one thread of its own.

    capture.py   LogThread: all streams, the thread, epoll
    flow.py      Stream, Counters, Flow: one stream, its counts and turns; make_pipe
    logfile.py   LogFile: one file that stays whole however the supervisor dies, and its rotation
    outlet.py    Outlet, Lines: the daemon's stdout, which may be slow or gone

Reading what was captured is another noun: `procman.logread`. Nothing here knows programs, states or clients.
"""

from __future__ import annotations

from procman.logs.capture import LogThread
from procman.logs.flow import Counters, Stream, make_pipe

__all__ = ["Counters", "LogThread", "Stream", "make_pipe"]

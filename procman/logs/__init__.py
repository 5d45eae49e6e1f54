"""Capture of what programs print: pipe in, file (or the daemon's stdout) out, in threads of its own, one for each disk.

    threads.py   LogThreads: which stream is with which thread, one for each disk
    capture.py   LogThread: its streams, the thread, epoll
    flow.py      Stream, Counters, Flow: one stream, its counts and turns; make_pipe
    logfile.py   LogFile: one file that stays whole however the supervisor dies, and its rotation
    shelf.py     Shelf: its rotated files, and how they are compressed
    rotation.py  when a file is rotated by the clock, and which rotated files go first; pure
    upkeep.py    Upkeep: what a log thread does beside moving bytes: clock, compression, room on the disk
    outlet.py    Outlet, Lines: the daemon's stdout, which may be slow or gone

Reading what was captured is another noun: `procman.logread`. Nothing here knows programs, states or clients.
"""

from __future__ import annotations

from procman.logs.capture import LogThread
from procman.logs.flow import Counters, Stream, make_pipe
from procman.logs.threads import LogThreads
from procman.logs.upkeep import Kept, Rules

__all__ = ["Counters", "Kept", "LogThread", "LogThreads", "Rules", "Stream", "make_pipe"]

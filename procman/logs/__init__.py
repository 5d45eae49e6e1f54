"""Capture of what programs print: pipe in, file (or stdout, syslog, journal) out, in threads, one for each disk.

    threads.py      LogThreads: which stream is with which thread, one for each disk
    capture.py      LogThread: its streams, the thread, epoll
    flow.py         Stream, Counters, Flow: one stream, its counts and turns; make_pipe
    logfile.py      LogFile: one file that stays whole however the supervisor dies, and its rotation
    shelf.py        Shelf: its rotated files, and how they are compressed
    rotation.py     when a file is rotated by the clock, and which rotated files go first; pure
    upkeep.py       Upkeep: what a log thread does beside moving bytes: clock, compression, `keep_total`
    room.py         Room: the rotated files of many logs, and which of them go for `log_min_free`

What is read by lines, and not moved as it is:

    spool.py        Spool: bytes on their way, in memory that outlives the supervisor
    lines.py        where output is cut, and how a line is dressed: name, time, JSON
    destination.py  Destinations: what a `log.mode` means
    channel.py      Channel: a place that many print to, and who waits for it
    outlet.py       Outlet: the daemon's stdout or stderr, which may be slow or gone
    datagrams.py    Datagrams: a local datagram socket, whose reader may be slow or gone
    syslog.py, journald.py, severity.py   lines as messages of syslog, as entries of the journal; how bad they are

Reading what was captured is another noun: `procman.logread`. Nothing here knows programs, states or clients.
"""

from __future__ import annotations

from procman.logs.capture import LogThread, Removed
from procman.logs.flow import Counters, Stream, make_pipe
from procman.logs.room import Kept, Rules
from procman.logs.spool import make as make_spool
from procman.logs.threads import LogThreads

__all__ = ["Counters", "Kept", "LogThread", "LogThreads", "Removed", "Rules", "Stream", "make_pipe", "make_spool"]

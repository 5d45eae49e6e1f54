"""Ends by SIGTERM, and leaves a child in a session of its own that ignores it. "ready PID CHILD"."""

import os
import signal

child = os.fork()
if child == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()
print("ready", os.getpid(), child, flush=True)
while True:
    signal.pause()

"""forker.py COUNT [--sessions]: has COUNT children that wait, with --sessions each in its own. "ready PID CHILD..."."""

import os
import signal
import sys

children = []
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        if "--sessions" in sys.argv:
            os.setsid()
        while True:
            signal.pause()
    children.append(child)
print("ready", os.getpid(), *children, flush=True)
while True:
    signal.pause()

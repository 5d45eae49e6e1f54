"""Says "ready PID" and ignores SIGTERM and SIGINT: only SIGKILL ends it."""

import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(f"ready {os.getpid()}", flush=True)
while True:
    signal.pause()

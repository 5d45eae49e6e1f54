"""crash.py STATUS [SECONDS]: exits with STATUS after SECONDS (default 0). A STATUS below zero is a signal: -9, -11."""

import os
import signal
import sys
import time

status = int(sys.argv[1])
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
print(f"ready {os.getpid()}, ends with {status} in {seconds} s", flush=True)
time.sleep(seconds)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)

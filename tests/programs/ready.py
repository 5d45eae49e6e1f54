"""Says "ready PID", then waits to be ended. The plainest program there is."""

import os
import signal

print(f"ready {os.getpid()}", flush=True)
while True:
    signal.pause()

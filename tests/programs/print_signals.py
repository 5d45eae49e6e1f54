"""Says "ready PID" and prints the name of each signal it gets. SIGTERM ends it with status 0, as its last line says."""

import os
import signal
import sys
from types import FrameType


def show(number: int, _frame: FrameType | None) -> None:
    """One write, so that two signals never mix their lines."""
    os.write(1, f"got {signal.Signals(number).name}\n".encode())
    if number == signal.SIGTERM:
        os.write(1, b"end\n")
        sys.exit(0)


for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    if each < signal.SIGRTMIN:
        signal.signal(each, show)
print(f"ready {os.getpid()}", flush=True)
while True:
    signal.pause()

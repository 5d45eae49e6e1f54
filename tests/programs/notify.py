"""notify.py [SECONDS] [STATE]: sends READY=1 (or STATE) to NOTIFY_SOCKET after SECONDS (default 0), then waits.

The protocol is sd_notify(3). SIGHUP sends RELOADING=1 and READY=1 again, SIGTERM sends STOPPING=1 and ends it.
"""

import os
import signal
import socket
import sys
import time
from types import FrameType


def notify(state: str) -> None:
    """One datagram. "@" is how an abstract socket is written."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def hang_up(_number: int, _frame: FrameType | None) -> None:
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    notify("READY=1")


def terminate(_number: int, _frame: FrameType | None) -> None:
    notify("STOPPING=1")
    sys.exit(0)


signal.signal(signal.SIGHUP, hang_up)
signal.signal(signal.SIGTERM, terminate)
print(f"started {os.getpid()}", flush=True)
time.sleep(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
notify(sys.argv[2] if len(sys.argv) > 2 else "READY=1")
print(f"ready {os.getpid()}", flush=True)
while True:
    signal.pause()

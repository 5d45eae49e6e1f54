"""slow_start.py SECONDS [PORT]: "starting PID"; after SECONDS opens 127.0.0.1:PORT (if given); "ready PID"."""

import os
import signal
import socket
import sys
import time

print(f"starting {os.getpid()}", flush=True)
time.sleep(float(sys.argv[1]))
server = socket.create_server(("127.0.0.1", int(sys.argv[2]))) if len(sys.argv) > 2 else None
print(f"ready {os.getpid()}", flush=True)
while True:
    signal.pause()

"""fork_bomb.py ROOM: forks as fast as it can, as a user that may have only ROOM more processes. "ready PID LIMIT".

Each process forks for ever, so one that is killed is replaced at once by any of the others. All end after 20 seconds.
Root becomes a user that nobody is; RLIMIT_NPROC does not hold for root.
"""

import os
import resource
import signal
import sys
import time

SECONDS = 20

if os.geteuid() == 0:
    own = 61000 + os.getpid() % 4000
    os.setresgid(own, own, own)
    os.setresuid(own, own, own)
uid = os.getuid()


def is_ours(pid: str) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == uid
    except OSError:
        return False


threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in os.listdir("/proc") if pid.isdigit() and is_ours(pid))
limit = threads + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombie takes a place
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"ready {os.getpid()} {limit}", flush=True)
end = time.monotonic() + SECONDS
while time.monotonic() < end:
    try:
        os.fork()
    except BlockingIOError:
        pass

"""double_fork.py [--clean] [--ignore-term] [--leave]: leaves a grandchild in a session of its own, as old daemons do.

Prints "grandchild PID" and "ready PID". --clean: the grandchild runs with an empty environment. --ignore-term: it
ignores SIGTERM. --leave: the main process ends at once with status 0; without it, it waits to be ended.
"""

import os
import signal
import sys


def grandchild() -> None:
    """Becomes the program that stays: with an exec, because /proc shows the environment that a process started with."""
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if "--ignore-term" in sys.argv else ""
    text = f"import os, signal\n{ignore}print('grandchild', os.getpid(), flush=True)\nwhile True: signal.pause()"
    environment = {} if "--clean" in sys.argv else dict(os.environ)
    os.execve(sys.executable, [sys.executable, "-S", "-E", "-c", text], environment)


child = os.fork()
if child == 0:
    os.setsid()
    if os.fork() == 0:
        grandchild()
    os._exit(0)
os.waitpid(child, 0)
print(f"ready {os.getpid()}", flush=True)
if "--leave" in sys.argv:
    sys.exit(0)
while True:
    signal.pause()

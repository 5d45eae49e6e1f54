"""lives.py NAME FOLDER [LINES_PER_SECOND]: keeps account of its own lives, whatever the daemon believes.

It appends to FOLDER/lives what happens to it: "NAME begin PID", "NAME end PID HOW", "NAME hup PID", and
"NAME double PID" when another life of NAME is not over yet: each holds a lock while it lives. SIGTERM ends it with
status 0, SIGUSR1 with 3, and by SIGUSR2 it dies, at the end of a line too. HOW is the status, or "SIGUSR2".
Its output is "PID begin", "PID 1 ...", "PID 2 ...", ..., "PID end", each line in two writes.
It says READY=1 where somebody wants to know.
"""

import fcntl
import os
import select
import signal
import socket
import sys

name, folder = sys.argv[1:3]
rate = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
pid = os.getpid()
account = os.open(f"{folder}/lives", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
ending: list[int] = []


def tell(what: str, how: str = "") -> None:
    """One line of the account."""
    os.write(account, f"{name} {what} {pid} {how}".rstrip().encode() + b"\n")


def say(text: str) -> None:
    """One line of output."""
    line = f"{pid} {text}\n".encode()
    for piece in (line[:7], line[7:]):
        os.write(1, piece)


woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)  # a signal ends the rest between two lines
signal.signal(signal.SIGTERM, lambda _number, _frame: ending.append(0))
signal.signal(signal.SIGUSR1, lambda _number, _frame: ending.append(3))
signal.signal(signal.SIGUSR2, lambda number, _frame: ending.append(-number))
signal.signal(signal.SIGHUP, lambda _number, _frame: tell("hup"))
lock = os.open(f"{folder}/{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    tell("double")
tell("begin")
say("begin")
if address := os.environ.get("NOTIFY_SOCKET"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", address)
number = 0
while not ending:
    number += 1
    if rate:
        say(f"{number} {'x' * (number % 50)}")
    if select.select([woken], [], [], 1 / rate if rate else 60)[0]:
        os.read(woken, 100)
say("end")
tell("end", str(ending[0]) if ending[0] >= 0 else signal.Signals(-ending[0]).name)
if ending[0] < 0:
    signal.signal(-ending[0], signal.SIG_DFL)
    os.kill(pid, -ending[0])
os._exit(ending[0])

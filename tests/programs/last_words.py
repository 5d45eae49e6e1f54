"""Prints "up", waits for SIGTERM, prints as many lines as its argument says, and ends."""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.write(1, b"up\n")
signal.sigwait({signal.SIGTERM})
for number in range(int(sys.argv[1])):
    os.write(1, b"%d %s\n" % (number, b"x" * 92))

"""Prints numbered lines of 100 bytes at a steady pace: paced_lines.py BYTES_A_SECOND SECONDS. Then it waits to be
ended."""

import sys
import time

rate, seconds = int(sys.argv[1]), float(sys.argv[2])
turn = 0.02
count = max(1, int(rate * turn) // 100)
begin = time.monotonic()
number = turns = 0
while turns < seconds / turn:
    sys.stdout.write("".join(f"{n:09} {'x' * 89}\n" for n in range(number, number + count)))
    sys.stdout.flush()
    number, turns = number + count, turns + 1
    time.sleep(max(0.0, begin + turns * turn - time.monotonic()))
time.sleep(100000)

"""writer.py [LINES_PER_SECOND] [COUNT] [SIZE] [--stderr]: numbered lines, "0000000001 xxxx...".

LINES_PER_SECOND 0 (default): as fast as it can. COUNT 0 (default): without end; else it waits to be ended afterwards.
SIZE: bytes of a line with its newline (default 100). The last line of a counted run is "done".
"""

import os
import signal
import sys
import time
from itertools import count

numbers = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
rate = float(numbers[0]) if numbers else 0.0
total = int(numbers[1]) if len(numbers) > 1 else 0
size = int(numbers[2]) if len(numbers) > 2 else 100
output = 2 if "--stderr" in sys.argv else 1
filler = "x" * (size - 12)
lines_a_write = 1 if rate else max(1, 60_000 // size)


def write(text: str) -> None:
    """All of it: a pipe may take a part."""
    rest = text.encode()
    while rest:
        rest = rest[os.write(output, rest) :]


def line(number: int) -> str:
    return f"{number:010d} {filler}\n"


start = time.monotonic()
for first in count(1, lines_a_write):
    if total and first > total:
        break
    last = min(first + lines_a_write, total + 1 if total else sys.maxsize)
    write("".join(line(number) for number in range(first, last)))
    if rate:
        time.sleep(max(0.0, start + first / rate - time.monotonic()))
write("done\n")
while True:
    signal.pause()

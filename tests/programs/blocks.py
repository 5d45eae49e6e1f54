"""blocks.py RATE FILE: numbered lines in large blocks, RATE MB (10^6 bytes) a second on average, until SIGTERM.

What it could not write in time it makes up for, but not more than CATCH_UP seconds of it. At the end it finishes its
block, and writes into FILE how many blocks there were and how long the longest write took in seconds. `block(n)` is
what block n looks like: whoever reads the output can compare every byte.
"""

import os
import signal
import sys
import time

LINES = 1024
LINE = 256
BLOCK = LINES * LINE
CATCH_UP = 1.0
_MARK = b"NNNNNNNNNN"
_TEMPLATE = b"".join(b"%s %04d %s\n" % (_MARK, line, b"x" * (LINE - 17)) for line in range(LINES))


def block(number: int) -> bytes:
    """LINES lines of LINE bytes; each begins with the number of its block and its own."""
    return _TEMPLATE.replace(_MARK, b"%010d" % number)


def main() -> None:
    """See the module."""
    rate, path = float(sys.argv[1]) * 1e6, sys.argv[2]
    ending = False
    longest = 0.0

    def end(_number: int, _frame: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    due = time.monotonic()
    number = 0
    while not ending:
        rest = memoryview(block(number))
        number += 1
        while rest:  # a pipe may take a part
            before = time.monotonic()
            rest = rest[os.write(1, rest) :]
            longest = max(longest, time.monotonic() - before)
        due = max(due + BLOCK / rate, time.monotonic() - CATCH_UP)
        time.sleep(max(0.0, due - time.monotonic()))
    with open(path + ".new", "w") as file:
        file.write(f"{number} {longest:.3f}\n")
    os.rename(path + ".new", path)


if __name__ == "__main__":
    main()

"""A process that has imported the whole supervisor, and forks one for each order: they start in a tenth of the time.

An order comes over the Unix socket that is descriptor argv[1]: the path of a program table, the supervisor's end of a
wire and the file for what it says. The answer is the pid; a second one, when it has ended, the wait status.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from procman.errors import ProcmanError


def main() -> None:
    """Serves orders until the other end is closed."""
    from procman import supervise
    from procman.interim import Interim

    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        table, descriptors, _, _ = socket.recv_fds(orders, 4096, 2)
        if not table:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            orders.close()
            wire, output = descriptors
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:  # as `daemon._supervisor` does it
                interim = Interim(wire)
            except ProcmanError as error:
                os.write(2, f"procmand: {error}\n".encode())
                os._exit(1)
            status = supervise.run(table.decode(), interim, to_file=False)
            sys.stderr.flush()
            os._exit(status)
        for fd in descriptors:
            os.close(fd)
        orders.send(str(pid).encode())
        _, ended = os.waitpid(pid, 0)
        orders.send(str(ended).encode())


if __name__ == "__main__":
    main()

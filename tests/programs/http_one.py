"""http_one.py [PORT] [STATUS] [SECONDS]: a tiny HTTP server that answers "PID\\n" with STATUS (default 200).

It serves the sockets it inherits by LISTEN_FDS (sd_listen_fds(3)), else 127.0.0.1:PORT, from SECONDS (default 0) on.
`/environment` answers its environment, a line for each variable; `/slow` answers after 1 s. SIGTERM ends it after the
request it is in.
"""

import os
import select
import signal
import socket
import sys
import time

port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
status = int(sys.argv[2]) if len(sys.argv) > 2 else 200
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0


def listeners() -> list[socket.socket]:
    """The inherited sockets if they are for this process, else one of its own."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return [socket.socket(fileno=3 + number) for number in range(int(os.environ["LISTEN_FDS"]))]
    return [socket.create_server(("127.0.0.1", port))]


def answer(connection: socket.socket) -> None:
    """One request, one answer, then the connection is closed."""
    request = connection.recv(65536)
    path = request.split(b" ", 2)[1] if request.count(b" ") > 1 else b"/"
    body = f"{os.getpid()}\n"
    if path == b"/environment":
        body = "".join(f"{name}={value}\n" for name, value in os.environ.items())
    elif path == b"/slow":
        time.sleep(1)
    head = f"HTTP/1.1 {status} Is\r\nContent-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n"
    connection.sendall((head + body).encode())


time.sleep(seconds)
ended, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)  # a signal is a byte in the pipe: it never interrupts an answer
signal.signal(signal.SIGTERM, lambda _number, _frame: None)
servers = {server.fileno(): server for server in listeners()}
for server in servers.values():
    server.setblocking(False)
print(f"ready {os.getpid()}", flush=True)
while ended not in (readable := select.select([*servers, ended], [], [])[0]):
    for descriptor in readable:
        try:
            client = servers[descriptor].accept()[0]
        except BlockingIOError:  # another process on the same socket was faster
            continue
        with client:
            client.setblocking(True)
            answer(client)

"""drops.py THREADS: a server that accepts from the socket that it was handed faster than it answers, and drops at its
stop what it has accepted and not yet answered. It answers by HTTP who it is and the number in VERSION, and takes
as long as the request says: /n/1?work=MILLISECONDS."""

import os
import queue
import signal
import socket
import sys
import threading
import time

VERSION = os.environ.get("VERSION", "0")
accepted: "queue.Queue[socket.socket]" = queue.Queue()


def answer(client: socket.socket) -> None:
    with client:
        request = b""
        while b"\r\n\r\n" not in request:
            piece = client.recv(65536)
            if not piece:
                return
            request += piece
        _, _, work = request.split()[1].decode().partition("work=")
        time.sleep(int(work or 0) / 1000)
        who = f"{os.getpid()} {VERSION}"
        client.sendall(f"HTTP/1.1 200 OK\r\nX-Who: {who}\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok".encode())


def work() -> None:
    while True:
        answer(accepted.get())


def serve() -> None:
    sock = socket.socket(fileno=3)
    while True:
        accepted.put(sock.accept()[0])


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
for _ in range(int(sys.argv[1])):
    threading.Thread(target=work, daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
while True:
    signal.pause()

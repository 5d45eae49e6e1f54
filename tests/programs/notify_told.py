"""notify_told.py FOLDER: sends each line that comes from the fifo FOLDER/tell to NOTIFY_SOCKET, and writes it into
FOLDER/told after its own pid. The line "exit N" ends it with that status. "begin" is what it writes first.
"""

import os
import socket
import sys

folder = sys.argv[1]
account = os.open(f"{folder}/told", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def write(what: str) -> None:
    """One line of the account."""
    os.write(account, f"{os.getpid()} {what}\n".encode())


with open(f"{folder}/tell", "r+b", buffering=0) as fifo:
    write("begin")
    for line in iter(fifo.readline, b""):
        text = line.decode().strip()
        if text.startswith("exit "):
            write(text)
            os._exit(int(text.split()[1]))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
        write(text)

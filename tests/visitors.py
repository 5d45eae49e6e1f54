"""Visitors of one address, each with a new connection every time: who of them is answered, who is refused at once, and
who is lost: let in, and then given no answer."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

from tests.harness import wait_until

COUNT = 6
"""At the same time."""

PAUSE = 0.02
"""Before who was refused comes again, and between two visits."""

PATIENCE = 20.0


class Visitors:
    """A context: they come as long as it lasts. `work` is how many milliseconds an answer takes."""

    def __init__(self, address: str, work: int = 60) -> None:
        self.address = address
        self.answered: Counter[str] = Counter()  # by version
        self.refused = 0
        self.lost: list[str] = []
        self.slowest = 0.0
        self._work = work
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._come) for _ in range(COUNT)]

    @property
    def total(self) -> int:
        """All that have got an answer."""
        return sum(self.answered.values())

    def goes_on(self, more: int = 15) -> None:
        """Wait until so many more have got an answer."""
        before = self.total
        wait_until(lambda: self.total >= before + more, 60, f"{self.address} answers")

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _come(self) -> None:
        while not self._end.wait(PAUSE):
            began = time.monotonic()
            try:
                version = self._visit()
            except (ConnectionRefusedError, FileNotFoundError):
                with self._lock:
                    self.refused += 1
                continue
            except (OSError, ValueError) as error:
                with self._lock:
                    self.lost.append(f"after {time.monotonic() - began:.3f} s: {error!r}")
                continue
            with self._lock:
                self.answered[version] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)

    def _visit(self) -> str:
        """The version that answers. What comes after the connection is made is never "refused"."""
        unix = self.address.startswith("unix:")
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as sock:
            sock.settimeout(PATIENCE)
            host, _, port = self.address.rpartition(":")
            sock.connect(self.address.removeprefix("unix:") if unix else (host, int(port)))
            request = f"GET /n/1?work={self._work} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            sock.sendall(request.encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        head, end, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        if not end or " 200 " not in lines[0] or not body:
            raise ValueError(f"no answer: {answer!r}")
        who = next(line for line in lines if line.startswith("x-who:"))
        return who.split()[-1]

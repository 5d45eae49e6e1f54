"""Reading what may be slow (a disk, /proc of a large tree) for clients, outside the loop.

A few threads of its own, not asyncio's: those resolve names for probes. A read that hangs keeps its thread, so each
user has only EACH of them, also when the client has gone. It knows no client, only the number of its user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

THREADS = 8
EACH = 2
"""Reads that run at once for one user; more wait."""

T = TypeVar("T")


class Read(Protocol):
    """Calls a function in a thread and returns what it returns, or raises."""

    async def __call__(self, work: Callable[[], T], /) -> T: ...


class Reading:
    """The threads. They are made when they are needed first."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reading")
        self._turns: dict[int, asyncio.Semaphore] = {}  # by uid: as many as users that may look

    async def run(self, uid: int, work: Callable[[], T]) -> T:
        """The result of `work`, read for user `uid`. When this is cancelled, a read that has begun goes on to its
        end."""
        turns = self._turns.setdefault(uid, asyncio.Semaphore(EACH))
        await turns.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # the daemon ends
            turns.release()
            raise asyncio.CancelledError from None
        future.add_done_callback(lambda _: turns.release())
        return await asyncio.shield(future)

    def close(self) -> None:
        """Begins no more reads, and waits for none."""
        self._threads.shutdown(wait=False, cancel_futures=True)

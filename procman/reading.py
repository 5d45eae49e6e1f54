"""Reading what may be slow (a disk, /proc of a large tree), outside the loop.

A few threads of its own, not asyncio's: those resolve names for probes. A read that hangs keeps its thread, so each
owner (the user that asks, the disk that is read) has only EACH of them, also when nobody waits any more.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from procman.errors import Failed

THREADS = 8
EACH = 2
"""Reads that run at once for one owner; more wait."""

T = TypeVar("T")


class Read(Protocol):
    """Calls a function in a thread and returns what it returns, or raises."""

    async def __call__(self, work: Callable[[], T], /) -> T: ...


class Reading:
    """The threads. They are made when they are needed first."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reading")
        self._turns: dict[Hashable, asyncio.Semaphore] = {}  # as many as users that may look, or disks
        self._closed = False

    async def run(self, owner: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, read for `owner`. When this is cancelled, a read that has begun goes on to its end.

        Raises Failed when there is no process left for a thread (RLIMIT_NPROC counts threads too).
        """
        turns = self._turns.setdefault(owner, asyncio.Semaphore(EACH))
        await turns.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError as error:
            turns.release()
            if self._closed:
                raise asyncio.CancelledError from None
            cause = OSError(errno.EAGAIN, str(error))  # "can't start new thread": pthread_create(3)
            hint = "the machine, or a limit, is short of processes"
            raise Failed(f"it can't be read now: {error}", hint=hint) from cause
        future.add_done_callback(lambda _: turns.release())
        return await asyncio.shield(future)

    def close(self) -> None:
        """Begins no more reads, and waits for none."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

"""When the state file is written: soon after a change, many changes at once, never in the loop.

The disk may be slow, full or stuck: writing happens in a thread of its own, and what fails is said once and tried
again. What must not be lost meanwhile, whoever dies, is handed to the keeper: what an operator waits for before it is
written, and each document that the disk did not take. Of that one and the file's, a successor believes the later
(`statefile.later`). Other files of the state folder are written in the same way, after it (`beside`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from procman import store
from procman.errors import Failed

log = logging.getLogger("procman")

GATHER_SECONDS = 0.05
"""Changes that come within this time are written together."""

SHARE, REST_SECONDS_MAX = 0.1, 1.0
"""Of the time, how much may go into writing: after a write comes a rest, but none longer than the second. The document
holds every process, so with a thousand of them that never stay up there would be no time for anything else."""

RETRY_SECONDS = 1.0
"""After a write that failed, the next one follows this much later."""

STUCK_SECONDS = 5.0
"""Longer than this nobody waits for the disk."""


Make = Callable[[], dict[str, Any] | None]
"""Makes a document; None where the file has it already."""


class Journal:
    """Writes what `document` returns to the state file `path` after each `dirty`.

    `forget` is called for each child given to `forget_later`, once its end is on record. `hand_over` gives a document
    to the keeper, in place of the one before.
    """

    def __init__(
        self,
        path: str,
        document: Callable[[], dict[str, Any]],
        forget: Callable[[str], None],
        hand_over: Callable[[dict[str, Any]], None],
    ) -> None:
        self.problem = ""  # with the last write that ended
        self._since = 0.0
        self._path = path
        self._document = document
        self._forget = forget
        self._hand_over = hand_over
        self._beside: dict[str, Make] = {}  # other files of the state folder that are still to be written
        self._ended: dict[str, str] = {}  # process → its child that ended last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._thread.submit(int)  # makes the thread now: later there may be no process left for one
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._again = False
        self._not_before = 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self.closed = False

    def dirty(self) -> None:
        """Something changed."""
        if self._writing is not None:
            self._again = True
        elif self._timer is None and not self.closed:
            self._timer = self._loop.call_at(self._next(), self._start)

    def beside(self, path: str, make: Make) -> None:
        """The file `path` is to hold what `make` makes, in the thread: with the next write."""
        self._beside[path] = make
        self.dirty()

    def _next(self) -> float:
        """When a change of now is to be written: loop time."""
        return max(self._loop.time() + GATHER_SECONDS, self._not_before)

    def stuck(self) -> str:
        """"", or that the write that is under way takes longer than STUCK_SECONDS."""
        seconds = self._loop.time() - self._since
        if self._writing is None or seconds < STUCK_SECONDS:
            return ""
        return f"the state file is not written after {seconds:.0f} s: is its disk stuck?"

    def forget_later(self, child: str) -> None:
        """The end of `child` is part of the document now: the keeper may forget it when that is on disk."""
        process = child.rpartition("#")[0]
        older = self._ended.get(process)
        if older is not None and older != child:
            self._forget(older)  # the newer one alone tells a successor how far it came
        self._ended[process] = child
        self.dirty()

    async def saved(self) -> None:
        """Wait until all that has changed so far is on disk, or could not be written within STUCK_SECONDS.

        On disk means that a power loss can't undo it: what an operator asked for is done when the command says so. The
        keeper has it in any case.
        """
        if self.closed:
            return
        future = self._loop.create_future()
        self._waiting.append(future)
        if self._writing is None:
            if self._timer is not None:
                self._timer.cancel()
            self._start()
        else:
            self._again = True
            self._hand_over(store.stamped(self._now()))  # the write under way may not end before we do
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                await future
        except TimeoutError:
            log.error("the state file is not written after %g s: is its disk stuck?", STUCK_SECONDS)

    async def close(self) -> None:
        """The last write, if the disk takes it; nothing is written after it."""
        await self.saved()
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:  # begun for somebody else who waits
            await asyncio.wait({self._writing}, timeout=STUCK_SECONDS)
        self._thread.shutdown(wait=False)

    def _start(self) -> None:
        self._timer = None
        self._writing = self._loop.create_task(self._write())

    def _now(self) -> dict[str, Any]:
        """The document, and of when it is: monotonic time."""
        return {"at": self._loop.time(), **self._document()}

    def _save(self, beside: dict[str, Make], document: dict[str, Any], *, durable: bool) -> None:
        store.save(self._path, document, durable=durable)
        for path, make in beside.items():
            if (other := make()) is not None:
                store.save(path, other, durable=durable)
            if self._beside.get(path) is make:
                del self._beside[path]

    async def _write(self) -> None:
        self._since = self._loop.time()
        waiting, self._waiting = self._waiting, []
        ended, self._ended = self._ended, {}
        self._again = False
        began = self._loop.time()
        document: dict[str, Any] = {}
        held = bool(waiting or self.problem)
        try:
            document = self._now()
            if held:
                self._hand_over(store.stamped(document))
            save = functools.partial(self._save, dict(self._beside), document, durable=bool(waiting))
            await self._loop.run_in_executor(self._thread, save)
        except Failed as error:
            if not self.problem:
                log.error("%s", error)
            self.problem = str(error)
            if not held:
                self._hand_over(store.stamped(document))
        except Exception as error:
            log.exception("the state file was not written (a bug in procman)")
            self.problem = f"the state file was not written: {type(error).__name__}: {error}"
        else:
            if self.problem:
                log.warning("the state file can be written again")
            self.problem = ""
        if self.problem:
            # The keeper is the only one who knows how these ended.
            newer, self._ended = self._ended, ended
            for child in newer.values():
                self.forget_later(child)
        else:
            for child in ended.values():
                self._forget(child)
        for future in waiting:
            if not future.done():
                future.set_result(None)
        self._writing = None
        now = self._loop.time()
        self._not_before = now + min((now - began) * (1 / SHARE - 1), REST_SECONDS_MAX)
        if self._waiting and not self.closed:
            self._start()
        elif self._again or self.problem:
            at = now + RETRY_SECONDS if self.problem else self._next()
            self._timer = None if self.closed else self._loop.call_at(at, self._start)

"""One log thread for each disk: a disk that hangs holds up the output that goes there, and no other.

What is written to a disk that hangs waits in the thread, and then in the pipe, and then its program waits in write(2):
nothing is dropped, for nobody knows how long it lasts. A disk that answers with an error is another matter: see
`capture`.

Knows which stream is with which thread. What a disk is, its caller knows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

from procman.config import Log, Room
from procman.logs.capture import Done, LogThread, Removed
from procman.logs.flow import Begun, Counters, Stream
from procman.logs.room import Rules

THREADS_MAX = 16
"""Log threads at most; more disks share them."""

PRINTED = "\0"
"""Stands for what is no disk among the disks: the daemon's stdout, syslog, the journal. No name of one."""


class LogThreads:
    """As one `LogThread` for all streams. `disk_of` names the disk of a path; it must not touch that disk.

    All methods return at once and belong to one thread (the event loop's).
    """

    def __init__(
        self,
        on_news: Callable[[str], None],
        stdout_fd: int,
        disk_of: Callable[[str], str],
        on_loss: Callable[[], None] = lambda: None,
        stderr_fd: int = 2,
        *,
        on_wish: Callable[[str], None] = lambda path: None,
        on_said: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._on_news = on_news
        self._on_loss = on_loss
        self._on_wish = on_wish
        self._on_said = on_said
        self._rules = Rules()
        self._disk_of = disk_of
        self._watched: set[str] = set()
        # Made now: later the descriptor may be another file.
        self._printer = LogThread(
            on_news, stdout_fd, self._watched, on_loss, stderr_fd, on_wish=on_wish, on_said=on_said
        )
        self._by_disk = {PRINTED: self._printer}
        self._started = False
        self._homes: dict[str, tuple[LogThread, str]] = {}  # by stream: its thread, and its path or PRINTED
        self._users: dict[str, int] = {}  # by path: how many streams go there; they must not part
        self._thread_of: dict[str, LogThread] = {}  # by such a path

    def start(self) -> None:
        """Starts what has something to do. Raises RuntimeError when no thread can be made."""
        self._started = True
        for thread in {id(thread): thread for thread, _ in self._homes.values()}.values():
            thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """See `LogThread.stop`; `timeout` is for all together."""
        deadline = time.monotonic() + timeout
        threads = list({id(thread): thread for thread in self._by_disk.values()}.values())
        for thread in threads:
            thread.finish()
        ended = [thread.stop(max(0.0, deadline - time.monotonic())) for thread in threads]
        return all(ended)

    def add(self, stream: Stream, counters: Counters | None = None) -> None:
        """See `LogThread`, as for all below."""
        thread = self._move_in(stream.key, stream.log, stream.path)
        thread.add(stream, counters)

    def change(self, key: str, log: Log, path: str, spool_fd: int = -1) -> None:
        before = self._homes[key][0]
        self._move_out(key)
        thread = self._move_in(key, log, path)
        if thread is before:
            thread.change(key, log, path, spool_fd)
        else:
            before.hand_over(key, thread, log, path, spool_fd)

    def remove(self, key: str, done: Done = lambda: None) -> Removed:
        thread = self._homes[key][0]
        self._move_out(key)
        return thread.remove(key, done)

    def flush(self, key: str, done: Done = lambda: None) -> None:
        self._homes[key][0].flush(key, done)

    def reopen(
        self, stdout_fd: int | None = None, stderr_fd: int | None = None, done: Done = lambda: None
    ) -> None:
        """`done` is called when all of them have, in one of them."""

        def reopen(thread: LogThread, done: Done) -> None:
            thread.reopen(*((stdout_fd, stderr_fd) if thread is self._printer else (None, None)), done)

        self._all_of_them(reopen, done)

    def pause(self, done: Done) -> None:
        """`done` is called when all of them rest, in one of them."""
        self._all_of_them(LogThread.pause, done)

    def _all_of_them(self, ask: Callable[[LogThread, Done], None], done: Done) -> None:
        """Asks each thread that runs for something, and calls `done` when the last one has done it."""
        threads = [t for t in {id(t): t for t in self._by_disk.values()}.values() if t.started]
        busy = set(map(id, threads))

        def has(thread: LogThread) -> None:
            busy.discard(id(thread))
            if not busy:
                done()

        for thread in threads:
            ask(thread, functools.partial(has, thread))
        if not threads:
            done()

    def go_on(self) -> None:
        for thread in {id(thread): thread for thread in self._by_disk.values()}.values():
            thread.go_on()

    def govern(self, rules: Rules) -> None:
        """Each thread gets what is on its disk: a file has one thread that may remove it. `rules.room` is for the
        thread of the disk of `rules.log_dir` alone: to ask a disk that hangs would hold up the others."""
        self._rules = rules
        for thread in {id(thread): thread for thread in self._by_disk.values()}.values():
            self._govern(thread)

    def retire(self, path: str, identity: tuple[int, int], keep: int, then: Callable[[str], None]) -> None:
        """By the thread that may remove its rotated files (`govern`)."""
        thread = self._thread_that_keeps(path) or self._printer
        if not self._started:
            then("its disk is stuck")
            return
        try:
            thread.start()
        except RuntimeError as error:  # no process is left for a thread
            then(str(error))
        else:
            thread.retire(path, identity, keep, then)

    def _govern(self, thread: LogThread) -> None:
        mine = [kept for kept in self._rules.logs if self._thread_that_keeps(kept.path) is thread]
        room = self._rules.room
        if room:
            disk = self._disk_of(self._rules.log_dir)
            watches = self._by_disk.get(disk) is thread or any(self._disk_of(kept.path) == disk for kept in mine)
            room = room if watches else Room()
        thread.govern(replace(self._rules, room=room, logs=tuple(mine)))

    def _thread_that_keeps(self, path: str) -> LogThread | None:
        return self._thread_of.get(path) or self._by_disk.get(self._disk_of(path))

    def begin_compression(self, path: str, then: Callable[[tuple[int, int] | None], None]) -> None:
        thread = self._thread_of.get(path)
        if thread is None:  # nobody prints there any more
            then(None)
        else:
            thread.begin_compression(path, then)

    def end_compression(self, path: str, problem: str) -> None:
        if (thread := self._thread_of.get(path)) is not None:
            thread.end_compression(path, problem)

    def counters(self, key: str) -> Counters:
        return self._homes[key][0].counters(key)

    def recent(self, key: str) -> bytes:
        return self._homes[key][0].recent(key)

    def begun(self, key: str) -> Begun | None:
        return self._homes[key][0].begun(key)

    def recount(self, key: str, late: Counters) -> None:
        self._homes[key][0].recount(key, late)

    def tap(self, key: str, callback: Callable[[bytes], None] | None) -> None:
        self._homes[key][0].tap(key, callback)

    def watch(self, path: str) -> None:
        self._watched.add(path)

    @property
    def trouble(self) -> str:
        """The last mistake that a thread has survived."""
        return next((thread.trouble for thread in self._by_disk.values() if thread.trouble), "")

    def stuck(self, seconds: float) -> list[str]:
        """Paths whose disk has let a thread wait for longer than `seconds`."""
        waiting = (thread.waits_for(seconds) for thread in {id(t): t for t in self._by_disk.values()}.values())
        return [path for path in waiting if path]

    # --- which thread -----------------------------------------------------------------------------------------------

    def _move_in(self, key: str, log: Log, path: str) -> LogThread:
        place = path if log.mode == "file" else PRINTED
        thread = self._thread_of.get(place)
        if thread is None:
            thread = self._thread_of[place] = self._thread(self._disk_of(path) if log.mode == "file" else PRINTED)
        self._users[place] = self._users.get(place, 0) + 1
        self._homes[key] = (thread, place)
        return thread

    def _move_out(self, key: str) -> None:
        _, place = self._homes.pop(key)
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place], self._thread_of[place]

    def _thread(self, disk: str) -> LogThread:
        """That of `disk`, which is made if need be. Where it can't be, or there are enough, another one does it too."""
        known = thread = self._by_disk.get(disk)
        if thread is None and len(self._by_disk) <= THREADS_MAX:
            try:
                aside = {"on_wish": self._on_wish, "on_said": self._on_said}
                thread = LogThread(self._on_news, -1, self._watched, self._on_loss, -1, **aside)
            except OSError:  # no descriptor is free
                thread = None
        if thread is not None:
            try:
                if self._started:
                    thread.start()
                if known is None:  # what it has to keep is known by its disk: a new stream changes nothing of that
                    self._by_disk[disk] = thread
                    self._govern(thread)
                return thread
            except RuntimeError:  # no process is left for a thread
                thread.stop()
        others = [other for other in self._by_disk.values() if other.started or not self._started]
        return others[hash(disk) % len(others)] if others else self._printer

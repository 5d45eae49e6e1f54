"""The log thread: takes what programs print out of their pipes, at once and for good.

    event loop ── add, change, remove, ... ──→ deque + eventfd ──→ log thread: epoll, then one turn for each ready pipe
               ←── counters() snapshots, callbacks in the log thread ──┘

Bytes have a thread of their own so that a slow or stuck disk never delays a restart or an RPC. Nothing is shared but
the queue, the published counts and the set of watched paths, each of which is used by single atomic operations; so
there is no lock.

The promise: read = written + dropped (+ held, the unfinished line of what is read by lines). A program never waits for
a disk that can't be written: what can't be written is dropped, counted, and told of in the log as soon as it can be.

Knows pipes and paths; nothing of programs' lives, clients or asyncio.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from procman.config import Log
from procman.logs import spool
from procman.logs.channel import Channel
from procman.logs.destination import Destinations
from procman.logs.flow import Begun, Counters, Flow, Stream, bytes_waiting
from procman.logs.logfile import RETRY_SECONDS, LogFile, describe
from procman.logs.room import Rules
from procman.logs.spool import Spool
from procman.logs.upkeep import Upkeep

# A program that prints line by line would wake the thread for every line: 11 CPU seconds per GB, against 1.6. After a
# small round that followed closely on another, the thread lets some more come first. A single line is never delayed.
SMALL = 32 * 1024
CLOSE = 0.004
PAUSE = 0.001

PATIENCE_SECONDS = 0.1
"""How long the ends of raw lines are waited for that `change` meets in their midst, of all streams together."""

Done = Callable[[], None]


class Removed(NamedTuple):
    """A stream that is being removed: its `counters` now, which are the last ones as soon as it has `ended`."""

    counters: Callable[[], Counters]
    ended: threading.Event


class Ending(NamedTuple):
    """A child has died: what it printed, up to the byte `end` of its stream, is to be written, and its last line ends
    there. `then` is called after that. See `LogThread._end_all`."""

    flow: Flow
    end: int
    then: Done


def _no_news(_path: str) -> None:
    """What `on_news` is for a caller who watches nothing, and `on_wish` and `on_said` likewise."""


def _no_matter() -> None:
    """What `on_loss` is for a caller who keeps no account."""


class LogThread:
    """Moves the output of all processes, from `start` to `stop`. Its methods return at once and may be called from one
    thread (the event loop's); they take effect in the log thread, in the order of the calls.

    `on_news(path)` is called in the log thread, see `watch`. So is `on_loss()`, once in RETRY_SECONDS, while some log
    does not tell yet what was dropped, and when all do again: whoever keeps an account for a successor brings it up to
    date. `stdout_fd` and `stderr_fd` are where "inherit" programs' lines go; -1: nowhere. `on_wish(path)` and
    `on_said(text)`, also there: see `upkeep`. `watched` is for several that share the set of watched paths, one of each
    path at a time.
    `trouble` is "", or the last mistake inside the log thread that it survived, for the daemon's own log.
    """

    def __init__(
        self,
        on_news: Callable[[str], None] = _no_news,
        stdout_fd: int = 1,
        watched: set[str] | None = None,
        on_loss: Callable[[], None] = _no_matter,
        stderr_fd: int = 2,
        *,
        on_wish: Callable[[str], None] = _no_news,
        on_said: Callable[[str], None] = _no_news,
    ) -> None:
        self.trouble = ""
        self._on_news = on_news
        self._on_loss = on_loss
        self._flows: dict[str, Flow] = {}  # the caller's; all below but the queue is the log thread's
        self._watched: set[str] = set() if watched is None else watched
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._stopping = False
        self._may_move = threading.Event()
        self._may_move.set()
        self._busy: tuple[float, str] | None = None  # since when with which path; written by the thread alone
        self._by_fd: dict[int, Flow] = {}
        self._files: dict[str, LogFile] = {}
        self._upkeep = Upkeep(self._files, on_wish, on_said)
        self._on_said = on_said
        self._expected: dict[Flow, list[Callable[[], None]]] = {}  # on their way to us: what is asked of them
        self._endings: list[Ending] = []  # in the order in which they were asked for
        self._left: set[Flow] = set()  # with lines that a predecessor has taken and not written
        self._behind: set[Flow] = set()  # see `Flow.is_behind`
        self._catch_up_at = 0.0
        self._patience = PATIENCE_SECONDS
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._places = Destinations(stdout_fd, stderr_fd, self._epoll, self._listen_all)

    # --- for the caller ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread, unless it runs. Streams may be added before. Raises RuntimeError when there can't be one
        more."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def started(self) -> bool:
        """Whether it has been started."""
        return self._thread.ident is not None

    def finish(self) -> None:
        """Asks the thread to end after what was asked of it before; waits for nothing."""
        self._submit(self._stop)

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends the thread after what was asked of it, and closes its descriptors; what pipes still hold is left to a
        successor. False when the disk keeps the thread for longer than `timeout` seconds: it is left behind then."""
        if self._wake < 0:
            return True
        self._submit(self._stop)
        if self._thread.ident is None:
            try:
                self._thread.start()  # it closes what it owns on its way out
            except RuntimeError:  # there can't be one more
                self._close_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        os.close(self._wake)
        self._wake = -1
        return True

    def add(self, stream: Stream, counters: Counters | None = None) -> None:
        """Takes over a pipe. `counters` continue those of a predecessor."""
        flow = self._flows[stream.key] = Flow(stream, counters or Counters(), self._null)
        self._submit(lambda: self._add(flow, stream.log, stream.path))

    def change(self, key: str, log: Log, path: str, spool_fd: int = -1) -> None:
        """Sends a stream's bytes elsewhere from now on, or otherwise, or rotates its file by other rules. `spool_fd` is
        for a stream that had no spool, as in `Stream`."""
        flow = self._flows[key]
        self._submit_for(flow, lambda: self._change(flow, log, path, spool_fd))

    def remove(self, key: str, done: Done = _no_matter) -> Removed:
        """Writes what waits in the pipe and closes it; then calls `done` in the log thread. As `flush`, it lasts as
        long as a slow reader of the daemon's stdout, say, takes for it. A loss that its log does not tell of yet is
        told by another stream that goes there, or else through `on_said`."""
        flow = self._flows.pop(key)
        removed = Removed(flow.counters, threading.Event())

        def leave() -> None:
            removed.ended.set()
            done()

        self._submit_for(flow, lambda: self._remove(flow, leave))
        return removed

    def flush(self, key: str, done: Done = _no_matter) -> None:
        """Writes what waits in the pipe now, and ends a line without an end where output is read by lines: the child
        has died. Then calls `done` in the log thread: when all of it is written, or dropped and counted, or waits for a
        file that can't be written."""
        flow = self._flows[key]
        self._submit_for(flow, lambda: self._flush(flow, done))

    def hand_over(self, key: str, heir: LogThread, log: Log, path: str, spool_fd: int = -1) -> None:
        """From now on the stream is with `heir`, and goes where `change` would have sent it."""
        flow = heir._flows[key] = self._flows.pop(key)
        heir._submit(lambda: heir._expect(flow))

        def gone(endings: list[Ending]) -> None:  # in ours, and the rest in the heir
            heir._submit(lambda: heir._arrived(flow, lambda: heir._adopt(flow, log, path, spool_fd, endings)))

        self._submit_for(flow, lambda: self._let_go(flow, log, path, gone))

    def waits_for(self, seconds: float) -> str:
        """The path with which the thread has been busy for longer than `seconds`; "" where there is none."""
        busy = self._busy
        return busy[1] if busy is not None and time.monotonic() - busy[0] > seconds else ""

    def reopen(self, stdout_fd: int | None = None, stderr_fd: int | None = None, done: Done = _no_matter) -> None:
        """Closes and opens every file again: an external logrotate has moved them; then calls `done` in the log thread.
        `stdout_fd`, when given, is where "inherit" programs' lines go from now on: the daemon's stdout may be a new
        file too, and its stderr (if it is not given, the same)."""

        def reopen() -> None:
            try:
                self._reopen(stdout_fd, stdout_fd if stderr_fd is None else stderr_fd)
            finally:
                done()

        self._submit(reopen)

    def pause(self, done: Done) -> None:
        """Brings the thread to rest: what it holds is in spools, where others find it. Calls `done` in the log thread,
        and moves nothing until `go_on`. Somebody else may take the bytes meanwhile."""
        self._may_move.clear()
        self._submit(lambda: self._rest(done))

    def go_on(self) -> None:
        """Ends a pause. Files are opened again: they may have been rotated by somebody else."""
        self._submit(self._take_up)
        self._may_move.set()

    def govern(self, rules: Rules) -> None:
        """What is to be kept, and what may have to go, from now on."""

        self._submit(lambda: self._upkeep.govern(rules))

    def retire(self, path: str, identity: tuple[int, int], keep: int, then: Callable[[str], None]) -> None:
        """Has the file at `path`, which others write, become `path`.1, if it is still that of this device and inode.
        Calls `then` in the log thread with "", or with the reason why that could not be done. `reopen` is to follow."""

        def retire() -> None:
            problem = ""
            try:
                self._upkeep.retire(path, identity, keep)
            except OSError as error:
                problem = describe(error)
            then(problem)

        self._submit(retire)

    def begin_compression(self, path: str, then: Callable[[tuple[int, int] | None], None]) -> None:
        """Calls `then` in the log thread with copies of the two descriptors of the next file of this log to be
        compressed, source and target; None when there is none. `end_compression` follows."""
        self._submit(lambda: then(self._upkeep.begin_compression(path)))

    def end_compression(self, path: str, problem: str) -> None:
        """The compressor is done with it; or could not do it, for the reason `problem`."""
        self._submit(lambda: self._upkeep.end_compression(path, problem))

    def counters(self, key: str) -> Counters:
        """What became of the stream's bytes so far."""
        return self._flows[key].counters()

    def recent(self, key: str) -> bytes:
        """The end of what came through the stream's pipe, `flow.RECENT_BYTES` at most; b"" while a file keeps it."""
        flow = self._flows[key]
        return flow.recent if flow.log.mode != "file" else b""

    def begun(self, key: str) -> Begun | None:
        """Where its output begins in the file that it goes to; None while there is none."""
        flow = self._flows[key]
        return flow.begun if flow.log.mode == "file" else None

    def recount(self, key: str, late: Counters) -> None:
        """Adds what a predecessor has counted since `add`: it had not ended by then. To be called before `start`."""
        flow = self._flows[key]
        self._submit_for(flow, lambda: flow.recount(late))

    def tap(self, key: str, callback: Callable[[bytes], None] | None) -> None:
        """Gives every chunk that leaves the stream's pipe from now on to `callback` as well, in the log thread, also
        while the file can't be written. None ends that, but for a call that is on its way; so does a callback that
        raises."""
        self._flows[key].tap = callback  # one assignment, not a command: no byte that comes after this is missed

    def watch(self, path: str) -> None:
        """Has `on_news(path)` called once, at the next bytes that go to this log file. Watch first, then read up to the
        end, then wait: no news is missed."""
        self._watched.add(path)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _submit(self, command: Callable[[], None]) -> None:
        if self._wake >= 0:
            self._commands.append(command)
            os.eventfd_write(self._wake, 1)

    def _submit_for(self, flow: Flow, command: Callable[[], None]) -> None:
        """Of a flow that is on its way to us: not before it is here."""

        def when_here() -> None:
            if flow in self._expected:
                self._expected[flow].append(command)
            else:
                command()

        self._submit(when_here)

    def _run(self) -> None:
        last_round = 0.0
        try:
            while not self._stopping:
                events = self._epoll.poll(self._timeout())
                now = time.monotonic()
                moved = self._round(events, now)
                for channel in self._places:
                    channel.tick(now)
                self._end_all()
                if self._behind and now >= self._catch_up_at:
                    self._catch_up(now)
                if self._upkeep.due_at is not None and now >= self._upkeep.due_at:
                    self._tick(now)
                if 0 < moved < SMALL and now - last_round < CLOSE:
                    time.sleep(PAUSE)
                last_round = now
        finally:
            self._close_all()

    def _round(self, events: list[tuple[int, int]], now: float) -> int:
        """Gives each ready descriptor its turn; returns the number of bytes moved. Where something was asked for, that
        is done instead, for it may have closed some of them: epoll names the others again."""
        if self._commands or any(fd == self._wake for fd, _ in events):
            with suppress(BlockingIOError):  # asked for after epoll's answer
                os.eventfd_read(self._wake)  # before the queue is emptied: what comes later wakes us again
            self._patience = PATIENCE_SECONDS
            while self._commands:
                self._command(self._commands.popleft())
            self._end_all()
            self._turn_left(now)
            return 0
        room = {channel.fd: channel for channel in self._places}
        moved = 0
        for fd, mask in events:
            flow = self._by_fd.get(fd)
            if fd in room:
                room[fd].go_on(now)
            elif flow and flow.listening and mask & select.EPOLLIN:
                before = flow.read
                self._turn(flow, now)
                moved += flow.read - before
            elif flow and flow.listening:  # EPOLLHUP alone: the pipe is empty and nobody can write any more
                self._remove(flow, _no_matter)
        return moved

    def _timeout(self) -> float | None:
        due = [at for channel in self._places if (at := channel.due()) is not None]
        if self._behind:
            due.append(self._catch_up_at)
        if self._upkeep.due_at is not None:
            due.append(self._upkeep.due_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _command(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:  # noqa: BLE001  one mistake must not end everybody's logs, and block their programs
            self._note(error)

    def _turn(self, flow: Flow, now: float) -> None:
        """Moves what waits in one pipe, CHUNK bytes at most, so that each gets its turn."""
        try:
            if flow.file is not None:
                self._busy = (time.monotonic(), flow.file.path)
                flow.turn(flow.file, now, time.time())
                self._upkeep.used(flow.file, now)
            elif flow.channel is not None:
                flow.channel.turn(flow, now, time.time())
        except Exception as error:  # noqa: BLE001  as above
            self._note(error)
        self._busy = None
        if flow.file is not None and flow.listening is flow.waiting:
            self._listen(flow)
        if flow.is_behind:
            self._is_behind(flow, now)
        if flow.file is not None and (news := flow.news(now)):
            self._on_said(news)
        if flow.trouble:
            self.trouble, flow.trouble = flow.trouble, ""
        flow.publish()
        if flow.file is not None and flow.file.path in self._watched:
            self._watched.discard(flow.file.path)
            self._on_news(flow.file.path)

    def _tick(self, now: float) -> None:
        """Files are rotated by the clock, and too many are removed, whether their programs print or not."""
        self._busy = (time.monotonic(), self._upkeep.due_path)
        try:
            self._upkeep.tick(now)
        except Exception as error:  # noqa: BLE001  as above
            self._note(error)
        self._busy = None
        for flow in self._by_fd.values():
            if flow.file is not None:
                flow.count_rotations(flow.file)
                if flow.file.unrotated:
                    flow.error = flow.file.error
                    self._is_behind(flow, now)
                flow.publish()

    def _is_behind(self, flow: Flow, now: float) -> None:
        if not self._behind:
            self._catch_up_at = now + RETRY_SECONDS
        self._behind.add(flow)

    def _catch_up(self, now: float) -> None:
        """A log tells what was dropped as soon as it can be written, also when its program prints no more."""
        self._catch_up_at = now + RETRY_SECONDS
        # One that was told in a turn of its own since the last look is news, too.
        loses = any(flow.unreported or flow.waiting or not flow.is_behind for flow in self._behind)
        for flow in list(self._behind):
            if flow.file is not None and flow.waiting:
                self._turn(flow, now)
                if flow.unfinished and not flow.waiting:
                    self._flush(flow, _no_matter)
            elif flow.file is not None or flow.unreported:
                self._tell_loss(flow, now)
            if not flow.is_behind:
                self._behind.discard(flow)
        self._busy = None
        if loses:
            self._on_loss()

    def _tell_loss(self, flow: Flow, now: float) -> None:
        try:
            if flow.file is not None:
                self._busy = (time.monotonic(), flow.file.path)
                flow.catch_up(flow.file, now, time.time())
                self._upkeep.used(flow.file, now)
            elif flow.channel is not None:
                flow.channel.catch_up(flow, now, time.time())
        except Exception as error:  # noqa: BLE001  as above
            self._note(error)
        if flow.file is not None and (news := flow.news(now)):
            self._on_said(news)
        flow.publish()

    def _note(self, error: Exception) -> None:
        self.trouble = f"{type(error).__name__}: {error}"

    def _stop(self) -> None:
        self._stopping = True

    def _close_all(self) -> None:
        for fd in (*self._by_fd, self._null):
            os.close(fd)
        for file in self._files.values():
            file.abandon()
            file.close()
        for flow in self._by_fd.values():
            flow.close_spool()
        self._places.close()
        self._epoll.close()

    # --- commands, in the thread ------------------------------------------------------------------------------------

    def _add(self, flow: Flow, log: Log, path: str) -> None:
        os.set_blocking(flow.fd, False)
        flow.rewind()  # whoever had it before may have gone on with it since the flow was made (`Interim.ended`)
        self._by_fd[flow.fd] = flow
        self._aim(flow, log, path)

    def _change(self, flow: Flow, log: Log, path: str, spool_fd: int) -> None:
        self._equip(flow, spool_fd)
        if self._by_fd.get(flow.fd) is flow:  # it has not ended
            self._aim(flow, log, path)

    def _equip(self, flow: Flow, spool_fd: int) -> None:
        """Gives a flow a spool, where it has none."""
        if flow.spool is None and spool_fd >= 0:
            flow.spool = Spool(spool_fd)
        elif spool_fd >= 0:
            os.close(spool_fd)

    def _aim(self, flow: Flow, log: Log, path: str) -> None:
        """Points a flow at its file or its channel. Flows of one path share one LogFile."""
        if log.by_lines and flow.spool is None:
            self._equip(flow, spool.make())
        self._leave(flow, log, path)
        self._forsake(flow)
        old, file = flow.file, None
        if log.mode == "file":
            file = self._files.setdefault(path, LogFile(path, log))
            file.log = log
            file.users += 1
            if flow.begun is None or flow.begun.path != path:
                flow.begun = Begun.at(path)
            flow.claim(file)
        flow.file, flow.log = file, log
        flow.go_on(time.monotonic())
        self._release(old)
        self._places.aim(flow, log)
        self._listen(flow)
        if file is not None:
            flow.recent = b""
            self._upkeep.aimed(file, time.monotonic())
            flow.count_rotations(file)
            flow.publish()
        if flow.held:
            self._left.add(flow)  # not now: all that write to a file must have claimed it (`LogFile.claim`)
        if flow.unreported:  # also what a predecessor could not write
            self._is_behind(flow, time.monotonic())

    def _leave(self, flow: Flow, log: Log, path: str) -> None:
        """A flow goes elsewhere, or otherwise, from now on. A line that is read by lines is in its spool as long as it
        has no end, and goes along; what went to a file byte for byte is there, and is to get its end there."""
        file, now = flow.file, time.monotonic()
        if file is None and flow.channel is None:
            return  # it comes
        stays = file is not None and log.mode == "file" and file.path == path
        if file is not None and flow.dress is None and not (stays and not log.by_lines):
            self._busy = (now, file.path)
            flow.leave(file, now, now + self._patience)
            self._busy = None
            self._patience = max(0.0, self._patience - (time.monotonic() - now))
        flow.comes_from_elsewhere = not stays

    def _forsake(self, flow: Flow) -> None:
        """A flow leaves its channel: what that has not taken of it goes where the flow goes."""
        if flow.channel is not None and flow.channel.debtor is flow:
            flow.channel.forget()

    def _turn_left(self, now: float) -> None:
        """Gives their turn to those that have lines of a predecessor: their programs may print no more."""
        for flow in list(self._left):
            if flow.listening:
                self._left.discard(flow)
                self._turn(flow, now)

    def _listen_all(self) -> None:
        for flow in self._by_fd.values():
            self._listen(flow)
            if flow.unreported:
                self._is_behind(flow, time.monotonic())

    def _listen(self, flow: Flow) -> None:
        """Has epoll tell of the flow's bytes, but not while they would go to a channel that takes none, or wait for a
        file."""
        if flow.file is not None:
            wanted = not flow.waiting
        else:
            wanted = flow.channel is not None and flow.channel.debtor is None
        if wanted and not flow.listening:
            self._epoll.register(flow.fd, select.EPOLLIN)
        elif flow.listening and not wanted:
            self._epoll.unregister(flow.fd)
        flow.listening = wanted

    def _release(self, file: LogFile | None) -> None:
        if file is not None:
            file.users -= 1
            if not file.users:
                file.abandon()
                file.close()
                del self._files[file.path]

    def _remove(self, flow: Flow, done: Done) -> None:
        def leave() -> None:
            if self._by_fd.get(flow.fd) is flow:
                if flow.waiting or flow.held:
                    why = flow.file.error if flow.file is not None else ""
                    why = f" while its log could not be written: {why}" if why else ""
                    flow.drop_all(f"its pipe was closed{why}")
                if flow.unreported:
                    self._pass_on_loss(flow, time.monotonic())
                self._forget(flow)
                flow.publish()
            done()

        self._flush(flow, leave)

    def _pass_on_loss(self, flow: Flow, now: float) -> None:
        """Its log, or an heir, or the daemon's own log tells what was dropped: nobody would come back for it."""
        self._tell_loss(flow, now)
        self._forsake(flow)
        if not flow.unreported:
            return
        for heir in self._by_fd.values():
            same = heir.file is flow.file and heir.channel is flow.channel
            if same and heir is not flow and (heir.file is not None or heir.process == flow.process):
                heir.inherit(flow)
                self._is_behind(heir, now)
                return
        self._on_said(flow.will())

    def _forget(self, flow: Flow) -> None:
        if self._by_fd.get(flow.fd) is flow:
            self._part_with(flow)
            flow.close_spool()
            os.close(flow.fd)

    def _part_with(self, flow: Flow) -> None:
        if flow.listening:
            self._epoll.unregister(flow.fd)
            flow.listening = False
        del self._by_fd[flow.fd]
        self._behind.discard(flow)
        self._left.discard(flow)
        if flow.file is not None and flow.spool is not None:
            flow.file.disclaim(flow.spool)
        self._release(flow.file)
        flow.file = flow.channel = None

    def _let_go(self, flow: Flow, log: Log, path: str, then: Callable[[list[Ending]], None]) -> None:
        """The first half of `hand_over`. `then` gets the endings that are not written yet."""
        theirs = [ending for ending in self._endings if ending.flow is flow]
        self._endings = [ending for ending in self._endings if ending.flow is not flow]
        try:
            if self._by_fd.get(flow.fd) is flow:
                self._leave(flow, log, path)
                self._forsake(flow)
                self._part_with(flow)
                flow.on_its_way = True
        finally:
            then(theirs)

    def _expect(self, flow: Flow) -> None:
        self._expected[flow] = []

    def _arrived(self, flow: Flow, adopt: Callable[[], None]) -> None:
        """The second half, in the heir. A pipe that has ended meanwhile is nobody's any more."""
        self._command(adopt)
        for command in self._expected.pop(flow):
            self._command(command)

    def _adopt(self, flow: Flow, log: Log, path: str, spool_fd: int, endings: list[Ending]) -> None:
        self._endings += endings
        self._equip(flow, spool_fd)
        if flow.on_its_way:
            flow.on_its_way = False
            flow.null = self._null
            self._add(flow, log, path)

    def _flush(self, flow: Flow, done: Done) -> None:
        end = 0
        if self._by_fd.get(flow.fd) is flow:
            end = flow.read + bytes_waiting(flow.fd)  # not "until empty": another process may be writing without end
        self._endings.append(Ending(flow, end, done))
        self._end_all()

    def _end_all(self) -> None:
        """Does what can be done of `_endings`; the rest when the channel, which is busy, has room again. Called then
        before streams get their turns: nothing is taken behind an end that is not written."""
        for ending in list(self._endings):
            try:
                ended = self._end(ending)
            except Exception as error:  # noqa: BLE001  as in `_command`
                self._note(error)
                ended = True
            if ended:
                self._endings.remove(ending)
                self._command(ending.then)

    def _end(self, ending: Ending) -> bool:
        """False where the channel is busy with what has come before."""
        flow = ending.flow
        if self._by_fd.get(flow.fd) is not flow:  # its pipe has ended, or it has gone to another thread
            return True
        if flow.waiting:
            self._turn(flow, time.monotonic())
        flow.until, before = ending.end, -1
        while before < flow.read < ending.end and flow.listening:
            before = flow.read
            self._turn(flow, time.monotonic())
        flow.until = None
        if flow.channel is None or flow.channel.debtor is None:
            self._end_line(flow)
        flow.unfinished = flow.waiting
        return flow.channel is None or flow.channel.debtor is None

    def _reopen(self, stdout_fd: int | None, stderr_fd: int | None) -> None:
        for file in self._files.values():
            file.reopen(time.monotonic())
        if stdout_fd is not None and stderr_fd is not None:
            self._places.redirect(stdout_fd, stderr_fd)
            for flow in self._by_fd.values():
                self._places.aim(flow, flow.log)  # a terminal has colours
            for channel in self._places:
                channel.go_on(time.monotonic())

    def _rest(self, done: Done) -> None:
        self._end_all()
        while (channel := self._busy_channel()) is not None and not self._may_move.is_set():
            fd = channel.outlet.fd
            select.select([], [fd] if fd >= 0 else [], [], 0.05)  # a line is out in part
            channel.go_on(time.monotonic())
            if channel.stalled(time.monotonic()):
                channel.forget()
            else:  # what ends there, ends before anything else is written
                self._end_all()
        for flow in self._by_fd.values():
            flow.publish()
        done()
        self._may_move.wait()

    def _busy_channel(self) -> Channel | None:
        return next((channel for channel in self._places if channel.debtor is not None), None)

    def _take_up(self) -> None:
        """Ends a rest, in which somebody else may have moved bytes."""
        for flow in self._by_fd.values():
            flow.rewind()
            if flow.file is not None:
                flow.claim(flow.file)
        self._left = {flow for flow in self._by_fd.values() if flow.held}
        self._reopen(None, None)

    def _end_line(self, flow: Flow) -> None:
        """A line that has no end yet gets one, where output is read by lines: no more of it will come."""
        now, wall = time.monotonic(), time.time()
        if flow.file is not None and (flow.dress is not None or flow.held):
            flow.last_line_to(flow.file, now, wall)
            if flow.waiting:  # its program may print no more: nothing else would try again
                self._listen(flow)
                self._is_behind(flow, now)
        elif flow.channel is not None:
            flow.channel.end_line(flow, now, wall)
            if flow.unreported:
                self._is_behind(flow, now)
        flow.publish()

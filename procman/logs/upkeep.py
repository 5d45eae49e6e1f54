"""What a log thread does beside moving bytes: rotation by the clock, compression, and what has to go (`room`).

    rotated ── wish(path) ──→ event loop: a queue, one compressor for all (`compression`)
            ←── begin_compression(path), end_compression(path) ──┘   one file at a time, at the compressor's pace

Nothing waits for the compressor. So a program that prints faster than it can compress has more files that are not
compressed, at most `keep` of them; the oldest goes as it is. That is said once, and so is its end.

All of it runs in the log thread, which is the only one that changes the names of its files. Knows files, not pipes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence

from procman.config import Log
from procman.logs.logfile import LogFile, describe
from procman.logs.room import Kept, Room, Rules, remove, rotated_of
from procman.logs.rotation import surplus

LONGEST_REST = 3600.0
"""Seconds until the wall clock is looked at again, while nothing is written: it may have been set forward."""

AGAIN_SECONDS = 60.0
"""The same thing is not said twice within so many seconds."""

NARROWED_AT_ONCE = 20
"""Programs whose rotated files are looked through in one turn."""


class Upkeep:
    """That of one log thread, with the files that it has in use.

    `wish(path)` is called when a log has files to be compressed, `say(text)` with what the daemon's log should tell.
    """

    def __init__(
        self, files: Mapping[str, LogFile], wish: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._program_of: dict[str, str] = {}  # by path
        self._logs_of: dict[str, list[Kept]] = {}  # by program
        self._room = Room(say)
        self._files = files
        self._wish = wish
        self._say = say
        self._said: dict[str, float] = {}
        self._behind: set[str] = set()  # logs that are rotated faster than their files are compressed
        self._tick_at = self._tick_wall = 0.0  # 0: no file is rotated by the clock
        self._bounds: dict[str, tuple[int, int]] = {}  # by path: its `keep` and `keep_total`, as they are kept by now
        self._narrowed: dict[str, list[Kept]] = {}  # by program: these are to be brought within their bounds

    def govern(self, rules: Rules) -> None:
        """What is to be kept, and what may have to go, from now on."""
        self._room.govern(rules)
        self._program_of = {kept.path: kept.program for kept in rules.logs}
        self._logs_of = {}
        for kept in rules.logs:
            self._logs_of.setdefault(kept.program, []).append(kept)
        before, self._bounds = self._bounds, {kept.path: (kept.log.keep, kept.log.keep_total) for kept in rules.logs}
        self._narrowed = {}  # the first time all of them: they may have been edited while no daemon ran
        for kept in rules.logs:
            if before.get(kept.path) != self._bounds[kept.path] and (kept.log.max_size or kept.log.rotate_every):
                self._narrowed.setdefault(kept.program, []).append(kept)

    # --- what happens to a file -------------------------------------------------------------------------------------

    def aimed(self, file: LogFile, now: float) -> None:
        """It is used from now on, or by other rules: what a daemon before has left is taken up. It is not opened here:
        others may be about to use it, too, and all of them come first."""
        file.forget_clock()
        if file.log.rotate_every or self._tick_at:
            self._tick_at = now
        if file.log.compress == "gzip" and file.log.keep:
            self._wish(file.path)

    def used(self, file: LogFile, now: float) -> None:
        """Something was written to it, or was to be."""
        if file.news:
            self._rotated(file)
        if 0 < file.boundary < self._tick_wall:
            self._plan(now)
        self._room.look(now)

    def _rotated(self, file: LogFile) -> None:
        file.news = False
        self._room.changed(file.path)
        if file.raw:
            file.raw = False
            self._fell_behind(file)
        if file.log.keep_total:
            self._trim(file)
        if file.log.compress == "gzip" and file.log.keep:
            self._wish(file.path)

    def retire(self, path: str, identity: tuple[int, int], keep: int) -> None:
        """Rotates a file that others write. Raises OSError."""
        with LogFile(path, Log()).shelf() as shelf:
            shelf.retire(identity, keep)
        self._room.changed(path)

    # --- the clock --------------------------------------------------------------------------------------------------

    @property
    def due_at(self) -> float | None:
        """When `tick` is to be called (CLOCK_MONOTONIC), None while there is nothing to come."""
        return 0.0 if self._narrowed or self._room.busy else self._tick_at or None

    @property
    def due_path(self) -> str:
        """One of the logs whose disk `tick` asks."""
        narrowed = (kept.path for logs in self._narrowed.values() for kept in logs)
        return next(itertools.chain(narrowed, self._files), "")

    def tick(self, now: float) -> None:
        """Rotates what is to be rotated by the clock now, and removes what `keep`, `keep_total` and `log_min_free` do
        not allow any more. A few in each turn: those that print are not to wait for all."""
        if self._narrowed or self._room.busy:
            self._narrow([self._narrowed.pop(program) for program in list(self._narrowed)[:NARROWED_AT_ONCE]])
            self._room.go_on()
            return
        for file in list(self._files.values()):
            if file.log.rotate_every:
                self._tick(file, now)
        self._plan(now)

    def _tick(self, file: LogFile, now: float) -> None:
        try:
            file.tick(now)
        except OSError as error:
            file.fail(error, now)
        if file.news:
            self._rotated(file)

    def _plan(self, now: float) -> None:
        by_clock = [file.boundary for file in self._files.values() if file.log.rotate_every]
        if not by_clock:
            self._tick_at = self._tick_wall = 0.0
            return
        wall = time.time()
        # One that is over was not asked: its file is not there, or can't be written. Its next output asks, or we do.
        due = [boundary if boundary > wall else wall + AGAIN_SECONDS for boundary in by_clock if boundary]
        self._tick_wall = min([*due, wall + LONGEST_REST])
        self._tick_at = now + max(0.0, self._tick_wall - wall)

    # --- compression ------------------------------------------------------------------------------------------------

    def begin_compression(self, path: str) -> tuple[int, int] | None:
        """Copies of the descriptors of the next file of this log, for the compressor; None when there is none. The
        caller closes them."""
        file = self._files.get(path)
        if file is None:
            return None
        try:
            job = file.begin_compression()
            return None if job is None else (os.dup(job.source), os.dup(job.target))
        except FileNotFoundError:
            return None  # its folder is not there yet, or no more
        except OSError as error:
            self._once(f"can't compress rotated files of {path}: {describe(error)}")
            if file.job is not None:
                self.end_compression(path, "no descriptor is free")
            return None

    def end_compression(self, path: str, problem: str) -> None:
        """The compressor is done with it, or could not do it for the reason `problem`. More is wished for if there is
        more."""
        file = self._files.get(path)
        if file is None or file.job is None:
            return
        try:
            file.end_compression(done=not problem)
            left = 0
            if not problem:
                with file.shelf() as shelf:
                    left = len(shelf.uncompressed())
        except OSError as error:
            problem = describe(error)
        if problem:
            self._once(f"can't compress a rotated file of {path}: {problem}")
            return  # the next rotation wishes again
        self._room.changed(path)
        if file.log.keep_total:
            self._trim(file)
        if left:
            self._wish(path)
        elif path in self._behind:
            self._behind.discard(path)
            self._say(f"{path}: its rotated files are all compressed again")

    def _fell_behind(self, file: LogFile) -> None:
        if file.path not in self._behind:
            self._behind.add(file.path)
            self._say(
                f"{file.path} is rotated faster than its files can be compressed: they stay as they are, and the oldest"
                f" goes when there is no more room for it (keep = {file.log.keep}, keep_total = {file.log.keep_total})"
            )

    # --- keep_total, keep -------------------------------------------------------------------------------------------

    def _trim(self, file: LogFile) -> None:
        """`keep_total`: the oldest rotated files of its program go."""
        program = self._program_of.get(file.path)
        logs = [Kept("", file.path, file.log)] if program is None else self._logs_of[program]
        for path, name in self._remove_surplus([(file.log.keep_total, logs)]):
            if not name.endswith(".gz") and path == file.path and file.log.compress == "gzip":
                self._fell_behind(file)

    def _narrow(self, programs: Sequence[Sequence[Kept]]) -> None:
        """New bounds of the logs of these programs. What others rotate (`max_size` is 0) is theirs, and is not asked
        for."""
        for kept in itertools.chain(*programs):
            with contextlib.suppress(OSError), LogFile(kept.path, kept.log).shelf() as shelf:  # it has never printed
                shelf.prune(kept.log.keep)
        bounds = [(logs[-1].log.keep_total, self._logs_of[logs[-1].program]) for logs in programs]
        self._remove_surplus([(total, logs) for total, logs in bounds if total])

    def _remove_surplus(self, programs: Sequence[tuple[int, Sequence[Kept]]]) -> list[tuple[str, str]]:
        """Removes the oldest files of each of these, so that its others have no more than so many bytes. Returns log
        and file of each that went."""
        found = rotated_of(kept for _, logs in programs for kept in logs)
        gone = []
        for total, logs in programs:
            extra = surplus((each for kept in logs for each in found.get(kept.path, ())), total)
            gone += [(each.path, name) for each in extra if (name := remove(each))]
        return gone

    def _once(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(text, -AGAIN_SECONDS) >= AGAIN_SECONDS:
            self._said[text] = now
            self._say(text)

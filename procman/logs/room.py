"""Room on the disk of the logs (`log_min_free`): the oldest rotated files go, of all programs together.

There may be thousands of logs in one folder, and a disk may live at its threshold for months. So a folder is listed
once for all of its logs, what was found is kept in order until it is old, and only the logs that were rotated meanwhile
are looked at again. No more than a few files are removed in one turn: those that print are not to wait for the rest.

Runs in the log thread. Knows rotated files, not what writes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import field
from typing import NamedTuple

from procman.config import Log
from procman.config import Room as Wanted
from procman.folders import open_folder
from procman.logs.rotation import Rotated, oldest_first
from procman.logs.shelf import Shelf, listing
from procman.records import dataclass

LOOK_SECONDS = 1.0
"""How often the free room of a disk is looked at, while something is written."""

LISTED_SECONDS = 60.0
"""For how long a list of files is good: somebody else may add to them, or remove some."""

REMOVED_AT_ONCE = 8
"""Files that are removed in one turn."""


class Kept(NamedTuple):
    """A log of the table, whether it is open or not: the files that may have to go when room is short."""

    program: str
    path: str
    log: Log


@dataclass(frozen=True, slots=True)
class Rules:
    """What is to be kept: `room` is to stay free on the disk of the folder `log_dir`."""

    log_dir: str = ""
    room: Wanted = field(default_factory=Wanted)
    logs: tuple[Kept, ...] = ()


def rotated_of(logs: Iterable[Kept], device: int | None = None) -> dict[str, list[Rotated]]:
    """The rotated files of each of `logs`, by its path; only those on `device`, where one is given. A folder is listed
    once. One that is not there yet has none."""
    folders: dict[str, dict[str, Kept]] = {}
    for kept in logs:
        place, name = os.path.split(kept.path)
        folders.setdefault(place, {})[name] = kept
    found: dict[str, list[Rotated]] = {}
    for place, named in folders.items():
        try:
            rows = _rows(place, named)
        except OSError:
            continue
        for name, number, file, status in rows:
            kept = named[name]
            if device is None or status.st_dev == device:
                waits = kept.log.compress == "gzip" and file == f"{name}.1"
                each = Rotated(kept.path, number, status.st_mtime, status.st_blocks * 512, waits)
                found.setdefault(kept.path, []).append(each)
    return found


def _rows(place: str, names: Collection[str]) -> list[tuple[str, int, str, os.stat_result]]:
    folder = open_folder(place)
    try:
        return listing(folder, names)
    finally:
        os.close(folder)


def remove(rotated: Rotated) -> str:
    """Removes a rotated file; returns its path, "" when that was not possible, or its number is another file's now."""
    place, name = os.path.split(rotated.path)
    try:
        folder = open_folder(place)
    except OSError:
        return ""
    try:
        gone = Shelf(folder, name).drop(rotated.number, rotated.written)
    except OSError:
        return ""
    finally:
        os.close(folder)
    return gone and os.path.join(place, gone)


class Room:
    """What is to stay free on the disk of `log_dir`. `say(text)` gets what the daemon's log should tell."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._wanted = False
        self._short = False
        self._look_at = 0.0
        self._missing = 0  # bytes that are still to be freed
        self._where = ""
        self._listed_at = 0.0
        self._device = 0
        self._oldest: list[Rotated] | None = None  # the oldest last; None: not known
        self._stale: set[str] = set()  # paths of logs whose files have other numbers by now
        self.govern(Rules())

    def govern(self, rules: Rules) -> None:
        """What is to stay free, and which logs may lose files for it, from now on."""
        self._rules = rules
        self._wanted = bool(rules.room)
        self._look_at = 0.0
        self._missing = 0
        self._oldest = None

    def changed(self, path: str) -> None:
        """A log was rotated, or a file of it compressed."""
        if self._oldest is not None:
            self._stale.add(path)

    @property
    def busy(self) -> bool:
        """Whether there are more files to be removed now: `go_on`."""
        return self._missing > 0

    def look(self, now: float) -> None:
        """Something was written. Looks whether enough is free, once in LOOK_SECONDS, and begins to remove files."""
        if not self._wanted or self.busy or now < self._look_at:
            return
        try:
            disk = os.statvfs(self._rules.log_dir)
            self._device = os.stat(self._rules.log_dir).st_dev
        except OSError:  # there is no such folder yet: no log is in there
            return
        finally:
            self._rest()
        free, wanted = disk.f_bavail * disk.f_frsize, self._rules.room.of(disk.f_blocks * disk.f_frsize)
        if free >= wanted:
            self._short = False
            if now - self._listed_at >= LISTED_SECONDS:
                self._oldest = None
            return
        self._where = f"{self._rules.log_dir}: {free} bytes are free on its disk, {wanted} should be (log_min_free)"
        self._missing = wanted - free
        self._list()
        self.go_on()

    def go_on(self) -> None:
        """Removes a few files, until enough is free, or would be when those who still have them open close them."""
        if not self.busy:
            return
        files = self._oldest or []
        for _ in range(REMOVED_AT_ONCE):
            if self._missing <= 0 or not files:
                break
            each = files.pop()
            if name := remove(each):
                self._missing -= each.size
                self._say(f"{self._where}: {name} is removed, the oldest rotated file, {each.size} bytes")
            else:
                self._stale.add(each.path)
        if self._missing > 0 and files:
            return
        if self._missing > 0 and not self._short:
            self._short = True
            self._say(f"{self._where}, and there is no rotated file left to remove")
        self._missing = 0
        self._rest()

    def _rest(self) -> None:
        self._look_at = time.monotonic() + LOOK_SECONDS  # by a fresh clock: the work may have taken long

    def _list(self) -> None:
        now = time.monotonic()
        if self._oldest is None or now - self._listed_at >= LISTED_SECONDS:
            logs: Sequence[Kept] = self._rules.logs
            known: list[Rotated] = []
            self._listed_at = now
        else:
            logs = [kept for kept in self._rules.logs if kept.path in self._stale] if self._stale else ()
            known = [each for each in self._oldest if each.path not in self._stale]
        self._stale.clear()
        for found in rotated_of(logs, self._device).values():
            known += found
        self._oldest = oldest_first(known)
        self._oldest.reverse()

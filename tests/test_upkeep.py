"""procman.logs.upkeep: what a log thread does beside moving bytes, with real files and without a thread."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from procman.config import Log, Room
from procman.logs import Kept, Rules
from procman.logs.logfile import LogFile
from procman.logs.room import REMOVED_AT_ONCE
from procman.logs.upkeep import AGAIN_SECONDS, LONGEST_REST, Upkeep


class Kit:
    """An Upkeep with the logs of the test, and what it has said and wished for."""

    def __init__(self, folder: Path, **logs: Log) -> None:
        self.folder = folder
        self.wishes: list[str] = []
        self.said: list[str] = []
        paths = {str(folder / f"{name}.log"): log for name, log in logs.items()}
        self.files = {path: LogFile(path, log) for path, log in paths.items()}
        self.upkeep = Upkeep(self.files, self.wishes.append, self.said.append)

    def file(self, name: str) -> LogFile:
        return self.files[str(self.folder / f"{name}.log")]

    def govern(self, program: str, *names: str, room: Room | None = None) -> None:
        """The logs of `names` are those of `program`."""
        kept = tuple(Kept(program, self.file(name).path, self.file(name).log) for name in names)
        self.upkeep.govern(Rules(str(self.folder), room or Room(), kept))

    def put(self, name: str, size: int, age: float) -> None:
        path = self.folder / name
        path.write_bytes(os.urandom(size))
        os.utime(path, (time.time() - age, time.time() - age))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.mark.parametrize("there", ["no folder", "no file", "a folder of that name"])
def test_a_log_that_is_due_and_can_not_be_rotated_keeps_nobody_awake(tmp_path: Path, there: str) -> None:
    kit = Kit(tmp_path / "log", web=Log(rotate_every="hourly"))
    file, now = kit.file("web"), 1000.0
    if there != "no folder":
        kit.folder.mkdir()
    if there == "a folder of that name":
        (kit.folder / "web.log").mkdir()
    kit.upkeep.aimed(file, now)
    assert kit.upkeep.due_at == now
    kit.upkeep.tick(now)
    assert now + 1 < kit.upkeep.due_at <= now + LONGEST_REST + 1
    file.boundary = time.time() - 5  # it was asked before, and has gone meanwhile
    kit.upkeep.tick(now)
    assert kit.upkeep.due_at >= now + AGAIN_SECONDS - 1
    assert not (kit.folder / "web.log").is_file()  # what is not there is not made
    file.close()


def test_the_clock_is_not_looked_at_for_logs_that_do_not_ask_for_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path, web=Log())
    kit.upkeep.aimed(kit.file("web"), 1000.0)
    assert kit.upkeep.due_at is None


@pytest.mark.parametrize(("log", "wishes"), [(Log(), 1), (Log(compress="none"), 0), (Log(keep=0), 0)])
def test_a_log_is_looked_through_when_it_is_used_first(tmp_path: Path, log: Log, wishes: int) -> None:
    kit = Kit(tmp_path, web=log)
    kit.upkeep.aimed(kit.file("web"), 1000.0)
    assert kit.wishes == [kit.file("web").path] * wishes


@pytest.mark.parametrize(
    ("compress", "left"),
    [
        ("none", ["a.log.1", "b.log.1", "b.log.2"]),
        ("gzip", ["a.log.1", "b.log.1", "b.log.2"]),
    ],
)
def test_keep_total_drops_the_oldest_of_the_program(tmp_path: Path, compress: str, left: list[str]) -> None:
    log = Log(keep_total=100_000, compress=compress)  # type: ignore[arg-type]
    kit = Kit(tmp_path, a=log, b=log)
    kit.govern("web", "a", "b")
    for age, name in enumerate(["b.log.1", "a.log.1", "b.log.2", "a.log.2", "b.log.3"]):
        kit.put(name, 32_768, age)
    kit.file("a").news = True
    kit.upkeep.used(kit.file("a"), 1000.0)
    assert kit.names() == left
    assert len(kit.said) == (compress == "gzip")  # a.log.2 went as it was


def test_bounds_that_became_narrower_hold_at_once(tmp_path: Path) -> None:
    """The table was changed by apply, or while no daemon ran; the program may print no more."""
    log = Log(compress="none", keep=10)
    kit = Kit(tmp_path, a=log, b=log)
    for number in (1, 2, 3, 4):
        kit.put(f"a.log.{number}", 32_768, number)
        kit.put(f"b.log.{number}", 32_768, number + 0.5)

    def govern(**keys: int) -> list[str]:
        kept = tuple(Kept("web", file.path, replace(log, **keys)) for file in kit.files.values())  # type: ignore[arg-type]
        kit.upkeep.govern(Rules(str(tmp_path), Room(), kept))
        while (due := kit.upkeep.due_at) is not None and due <= 1000.0:
            kit.upkeep.tick(1000.0)
        return kit.names()

    assert len(govern()) == 8
    assert govern(keep=2) == ["a.log.1", "a.log.2", "b.log.1", "b.log.2"]
    assert govern(keep=2, keep_total=100_000) == ["a.log.1", "a.log.2", "b.log.1"]
    assert govern(keep=2, keep_total=70_000) == ["a.log.1", "b.log.1"]
    assert govern(keep=1, keep_total=0, max_size=0) == ["a.log.1", "b.log.1"]
    kit.put("a.log.2", 32_768, 2)
    assert govern(keep=1, keep_total=1, max_size=0) == ["a.log.1", "a.log.2", "b.log.1"]  # those of another logrotate
    assert kit.said == []


def test_what_waits_for_its_compression_is_not_dropped_for_its_size(tmp_path: Path) -> None:
    """Compressed it may be small enough."""
    kit = Kit(tmp_path, a=Log(keep_total=10_000))
    kit.govern("web", "a")
    kit.put("a.log.1", 32_768, 0)
    kit.put("a.log.2.gz", 8192, 1)
    kit.file("a").news = True
    kit.upkeep.used(kit.file("a"), 1000.0)
    assert kit.names() == ["a.log.1"]
    pair = kit.upkeep.begin_compression(kit.file("a").path)
    assert pair is not None
    with open(pair[1], "wb") as target:
        target.write(b"\x1f\x8b" + bytes(4000))
    os.close(pair[0])
    kit.upkeep.end_compression(kit.file("a").path, "")
    assert kit.names() == ["a.log.1.gz"]


def test_what_the_compressor_could_not_do_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path, a=Log())
    kit.put("a.log.1", 10, 0)
    path = kit.file("a").path
    for _ in range(3):
        pair = kit.upkeep.begin_compression(path)
        assert pair is not None
        for fd in pair:
            os.close(fd)
        assert kit.names() == ["a.log.1", "a.log.gz.partial"]
        kit.upkeep.end_compression(path, "No space left on device")
    assert kit.names() == ["a.log.1"]
    assert kit.said == [f"can't compress a rotated file of {path}: No space left on device"]
    assert kit.upkeep.begin_compression(str(tmp_path / "other.log")) is None
    kit.upkeep.end_compression(str(tmp_path / "other.log"), "")


def test_a_folder_that_is_not_there_yet_has_nothing_to_compress(tmp_path: Path) -> None:
    kit = Kit(tmp_path / "later", a=Log())
    kit.upkeep.aimed(kit.file("a"), 0.0)
    assert kit.wishes == [kit.file("a").path]
    assert kit.upkeep.begin_compression(kit.file("a").path) is None
    assert kit.said == []


def test_enough_room_costs_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path, a=Log())
    kit.govern("web", "a", room=Room(1))
    kit.put("a.log.1", 10, 0)
    kit.upkeep.used(kit.file("a"), 1000.0)
    assert (kit.names(), kit.said) == (["a.log.1"], [])


def test_a_disk_that_is_too_small_for_what_is_to_stay_free_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Kit(tmp_path, a=Log())
    kit.govern("web", "a", room=Room(share=0.9999))
    kit.put("a.log.1", 10_000, 0)
    kit.put("a.log.7.gz", 10_000, 100)
    kit.put("b.log.1", 10_000, 200)
    monkeypatch.setattr("procman.logs.room.LOOK_SECONDS", 0.0)
    for _ in range(3):
        kit.upkeep.used(kit.file("a"), time.monotonic())
    assert kit.names() == ["b.log.1"]
    assert [text.partition("(log_min_free)")[2][:2] for text in kit.said] == [": ", ": ", ", "]
    assert str(tmp_path / "a.log.7.gz") in kit.said[0]


class Disk:
    """The free room of a disk, as the test wants it, and how often a folder was read and a file asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.missing = 0
        self.listings = self.stats = 0
        listdir, stat = os.listdir, os.stat

        def count_listing(folder: int) -> list[str]:
            self.listings += 1
            return listdir(folder)

        def count_stat(*args: Any, **options: Any) -> os.stat_result:
            self.stats += 1
            return stat(*args, **options)

        def free(_folder: str) -> SimpleNamespace:
            return SimpleNamespace(f_bavail=1000_000 - self.missing, f_frsize=1, f_blocks=2000_000)

        monkeypatch.setattr(os, "listdir", count_listing)
        monkeypatch.setattr(os, "stat", count_stat)
        monkeypatch.setattr(os, "statvfs", free)
        monkeypatch.setattr("procman.logs.room.LOOK_SECONDS", 0.0)


def test_many_logs_on_a_disk_that_lives_at_its_threshold_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking through them for each file that goes stopped all logs of the disk for seconds."""
    names = [f"p{number}" for number in range(100)]
    kit = Kit(tmp_path, **dict.fromkeys(names, Log(keep=5, compress="none")))
    for age, name in enumerate(names):
        for number in (1, 2, 3):
            kit.put(f"{name}.log.{number}", 4096, 1000 * number + age)
    kit.govern("web", *names, room=Room(1000_000))
    disk = Disk(monkeypatch)
    removed = []
    for turn in range(20):
        if turn % 2:  # a log is rotated: its numbers are other files' now
            for number in (3, 2, 1):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(tmp_path / f"p50.log.{number}", tmp_path / f"p50.log.{number + 1}")
            kit.put("p50.log.1", 4096, 0)
            for number in (4, 5):
                (tmp_path / f"p50.log.{number}").unlink(missing_ok=True)
            kit.file("p50").news = True
        disk.missing = 4096
        before = {entry.name for entry in os.scandir(tmp_path)}
        kit.upkeep.used(kit.file("p50"), time.monotonic())
        removed += sorted(before - {entry.name for entry in os.scandir(tmp_path)})
    assert removed == [f"p{number}.log.3" for number in range(99, 49 + 30, -1)]
    assert disk.listings <= 1 + 10, "once, and once for each rotation"
    assert disk.stats < 300 + 20 * 20, "and then only what was rotated is asked for"


def test_not_more_than_a_few_files_are_removed_in_one_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that print wait for it; and it goes on though they print no more."""
    kit = Kit(tmp_path, a=Log(keep=100))
    for number in range(1, 41):
        kit.put(f"a.log.{number}.gz", 4096, number)
    kit.govern("web", "a", room=Room(1000_000))
    disk = Disk(monkeypatch)
    disk.missing = 4096 * 30
    left = [len(kit.names())]
    kit.upkeep.used(kit.file("a"), time.monotonic())
    left.append(len(kit.names()))
    while (due := kit.upkeep.due_at) is not None and due <= 0:
        kit.upkeep.tick(time.monotonic())
        left.append(len(kit.names()))
    assert all(0 < before - after <= REMOVED_AT_ONCE for before, after in itertools.pairwise(left))
    assert kit.names() == sorted(f"a.log.{number}.gz" for number in range(1, 11))
    assert len(kit.said) == 30


def test_a_number_that_is_another_file_by_now_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else rotates there, too."""
    kit = Kit(tmp_path, a=Log())
    kit.put("a.log.1", 4096, 10)
    kit.put("a.log.2", 4096, 20)
    kit.govern("web", "a", room=Room(1000_000))
    disk = Disk(monkeypatch)
    disk.missing = 4096
    kit.upkeep.used(kit.file("a"), time.monotonic())
    assert kit.names() == ["a.log.1"]
    os.rename(tmp_path / "a.log.1", tmp_path / "a.log.2")
    kit.put("a.log.1", 4096, 0)
    kit.upkeep.used(kit.file("a"), time.monotonic())
    assert kit.names() == ["a.log.1", "a.log.2"]
    kit.upkeep.used(kit.file("a"), time.monotonic())
    assert kit.names() == ["a.log.1"]

"""procman.logs.upkeep: what a log thread does beside moving bytes, with real files and without a thread."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from procman.config import Log, Room
from procman.logs import Kept, Rules
from procman.logs.logfile import LogFile
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


def test_a_disk_that_is_too_small_for_what_is_to_stay_free_is_said_once(tmp_path: Path) -> None:
    kit = Kit(tmp_path, a=Log())
    kit.govern("web", "a", room=Room(share=0.9999))
    kit.put("a.log.1", 10_000, 0)
    kit.put("a.log.7.gz", 10_000, 100)
    kit.put("b.log.1", 10_000, 200)
    for turn in range(3):
        kit.upkeep.used(kit.file("a"), 1000.0 + 2 * turn)
    assert kit.names() == ["b.log.1"]
    assert [text.partition("(log_min_free)")[2][:2] for text in kit.said] == [": ", ": ", ", "]
    assert str(tmp_path / "a.log.7.gz") in kit.said[0]

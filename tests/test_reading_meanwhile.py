"""ctl.logtext and logread.Held: the text of a log is what it was when it was listed, whatever happens meanwhile."""

from __future__ import annotations

import gzip
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import logread
from procman.config import Log
from procman.ctl import logtext
from procman.ctl.library import File, Heard, Places, Source
from procman.ctl.library import _own_file as own_file
from procman.ctl.logtext import LogText, Place, compressed
from procman.logread import Held
from procman.logs.logfile import LogFile
from tests.harness import log_content


class Writer:
    """A log as the log thread writes it, step by step: lines of one length, so that times and sizes are often alike;
    with `alike` the beginnings of its files, too."""

    def __init__(self, folder: Path, rng: random.Random, *, keep: int, alike: bool) -> None:
        self.path = folder / "w.log"
        self.written = b""
        self._rng = rng
        self._alike = alike
        self._log = Log(max_size=600, keep=keep)
        self._file = LogFile(str(self.path), self._log)
        self._now = 0.0
        self._lines = 0

    def step(self) -> None:
        if self._rng.random() < 0.6:
            self._write()
        elif (job := self._file.begin_compression()) is not None:
            os.write(job.target, gzip.compress(os.pread(job.source, 1 << 20, 0)))
            self._file.end_compression(done=True)

    def _write(self) -> None:
        head = "x" * 280 if self._alike else "x"
        data = b"".join(f"{head} {number:09}\n".encode() for number in range(self._lines, self._lines + 3))
        self._lines += 3
        cut = self._rng.choice([0, 0, 7])
        for part in (data[: len(data) - cut], data[len(data) - cut :]):
            reader, writer = os.pipe()
            os.write(writer, part)
            os.close(writer)
            while part:
                self._now += 2.0
                self._file.prepare(self._now)
                part = part[self._file.take(reader).length :]
            os.close(reader)
            if cut and self._rng.random() < 0.5:
                self.between()
        self.written += data

    def between(self) -> None:
        """A line is not at its end."""

    def close(self) -> None:
        self._file.abandon()
        self._file.close()


class Disk:
    """A library of its log, in which the writer goes on between any two calls."""

    def __init__(self, writer: Writer, rng: random.Random, *, room: int) -> None:
        self._writer = writer
        self._rng = rng
        self._held = Held(room)
        self.elsewhere: dict[str, str] = {}

    def sources(self, names: Sequence[str] = (), *, stderr: bool = False) -> list[Source]:
        [found] = self._held.files([str(self._writer.path)])
        return [Source("w", "out", tuple(map(own_file, found)))]

    def files(self, source: Source) -> tuple[File, ...]:
        self.goes_on()
        return tuple(map(own_file, logread.files(str(self._writer.path))))

    def read(self, source: Source, file: File, size: int, offset: int) -> bytes | None:
        self.goes_on()
        return self._held.read(str(self._writer.path), file.id, offset, size)

    def follow(self, places: Places, heard: Heard) -> None:
        raise NotImplementedError

    def goes_on(self) -> None:
        for _ in range(self._rng.randrange(4)):
            self._writer.step()

    def close(self) -> None:
        self._held.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@dataclass(frozen=True)
class Case:
    """`lines` are read, None for all, of a log whose reader may hold `room` files."""

    seed: int
    keep: int
    room: int
    lines: int | None
    alike: bool

    @property
    def held(self) -> bool:
        return self.room == 1000


CASES = st.builds(
    Case,
    st.integers(0, 1 << 32),
    st.sampled_from([0, 1, 3, 1000]),
    st.sampled_from([0, 1, 2, 1000]),
    st.sampled_from([None, 5, 100]),
    st.booleans(),
).filter(lambda case: case.held or not case.alike)  # files that nobody holds are known by their beginning


@settings(max_examples=120, deadline=None)
@given(CASES)
def test_a_text_is_what_it_was_whatever_rotates_meanwhile(folders: Path, case: Case) -> None:
    """Whole where its files are held, and where `keep` removes none; else what is missing is counted, and no line comes
    twice or in another order."""
    rng = random.Random(case.seed)
    writer = Writer(Path(tempfile.mkdtemp(dir=folders)), rng, keep=case.keep, alike=case.alike)
    disk = Disk(writer, rng, room=case.room)
    for _ in range(rng.randrange(1, 30)):
        writer.step()
    [source] = disk.sources()
    there = b"".join(log_content(Path(file.path)) for file in source.files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logtext, "BLOCK", 200)
        text = LogText(disk, source, 0.0)
        start = Place() if case.lines is None else text.last_lines(case.lines)
        found = b"".join(text.forward(start, piece=150))
    expected = there if case.lines is None else b"".join(there.splitlines(keepends=True)[-case.lines :])
    if text.lost:
        assert case.keep < 1000
        assert not case.held or not there.endswith(b"\n")  # where an unfinished line went to is not known
        rest = iter(there)
        assert all(byte in rest for byte in found)
        assert case.lines is not None or sum(text.lost.values()) == len(expected) - len(found)
    else:
        assert found == expected
    writer.close()
    disk.close()


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[tuple[int, File]], list[tuple[int, File]]]:
    """Two lists of one log, each file with the number of its content: some were compressed between them, some written,
    some removed."""
    count = draw(st.integers(1, 8))
    gone = draw(st.integers(0, count))
    before, after = [], []
    for number in range(count + draw(st.integers(0, 4))):
        newest = number == count - 1
        zipped = draw(st.booleans()) and not newest
        modified = float(draw(st.integers(0, 1)))
        plain = File(f"1:{number}", "", 10, modified, False, 10)
        packed = File(f"1:{100 + number}", "", 5, modified, True, 10)
        if number < count:
            before.append((number, packed if zipped else plain))
        if number >= gone:
            grown = newest and draw(st.booleans())
            later = packed if zipped or draw(st.booleans()) else plain
            after.append((number, later._replace(modified=2.0, holds=12) if grown else later))
    return before, after


@settings(max_examples=400, deadline=None)
@given(lists())
def test_a_compressed_file_is_found_by_its_time_its_size_its_place_and_its_beginning(
    drawn: tuple[list[tuple[int, File]], list[tuple[int, File]]],
) -> None:
    before, after = drawn
    contents = {file.id: number for number, file in after}
    for index, (number, file) in enumerate(before):
        expected = next((one for n, one in after if n == number and one.id != file.id), None)
        found = compressed(
            [one for _, one in before], index, [one for _, one in after], lambda one, n=number: contents[one.id] == n  # type: ignore[misc]
        )
        assert found == expected


def test_the_oldest_and_the_newest_file_are_held_where_there_is_no_room_for_all(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    for name in ("w.log", *(f"w.log.{number}" for number in range(1, 6))):
        (tmp_path / name).write_text(f"{name}\n")
    for room, expected in ((0, []), (1, ["w.log"]), (3, ["w.log.5", "w.log.4", "w.log"]), (99, None)):
        held = Held(room)
        [found] = held.files([str(path)])
        (moved := tmp_path / "elsewhere").mkdir()
        for file in found:
            Path(file.path).rename(moved / Path(file.path).name)
        there = [Path(file.path).name for file in found if held.read(str(path), file.id, 0, 99) is not None]
        assert there == (expected if expected is not None else [Path(file.path).name for file in found])
        held.close()
        assert all(held.read(str(path), file.id, 0, 99) is None for file in found)
        for one in moved.iterdir():
            one.rename(tmp_path / one.name)
        moved.rmdir()


def test_files_of_one_time_and_size_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    (tmp_path / "w.log.1").write_bytes(b"b\n")
    (tmp_path / "w.log.2.gz").write_bytes(gzip.compress(b"a\n"))
    for one in tmp_path.iterdir():
        os.utime(one, (5.0, 5.0))
    assert [Path(file.path).name for file in logread.files(str(path))] == ["w.log.2.gz", "w.log.1"]

"""procman.logread: the last lines of a log, and following it, while a real LogFile rotates it."""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import crossing, logread
from procman.config import Log
from procman.errors import Failed
from procman.logread import BLOCK, Follower, Position, last_lines, tail
from procman.logs import LogThread, Stream, make_pipe
from procman.logs.logfile import LogFile

AS_ROOT = os.geteuid() == 0


class Writer:
    """A LogFile that the test writes to, rotation and all."""

    def __init__(self, path: Path, max_size: int, keep: int = 100) -> None:
        self.file = LogFile(str(path), Log(max_size=max_size, keep=keep))
        self._read_fd, self._write_fd = make_pipe()

    def write(self, data: bytes) -> None:
        while data:
            os.write(self._write_fd, data[:4096])
            left = len(data[:4096])
            while left:
                self.file.prepare(time.monotonic())
                left -= self.file.take(self._read_fd).length
            data = data[4096:]

    def close(self) -> None:
        self.file.close()
        os.close(self._read_fd)
        os.close(self._write_fd)


@pytest.fixture
def follow() -> Iterator[Callable[..., Follower]]:
    followers: list[Follower] = []

    def open_follower(path: Path, start: Position | None = None) -> Follower:
        followers.append(Follower(str(path), start))
        return followers[-1]

    yield open_follower
    for follower in followers:
        follower.close()


def read_all(follower: Follower, max_bytes: int = BLOCK) -> bytes:
    found = b""
    while data := follower.read(max_bytes):
        assert len(data) <= max_bytes
        found += data
    return found


def lay_out(path: Path, files: list[bytes]) -> None:
    """The files of a log, oldest first, the current one last."""
    for number, content in enumerate(reversed(files)):
        (path.with_name(f"{path.name}.{number}") if number else path).write_bytes(content)


# --- the last lines ---------------------------------------------------------------------------------------------------

TAILS: list[tuple[list[bytes], int, bytes]] = [
    ([], 5, b""),
    ([b""], 5, b""),
    ([b"a\nb\nc\n"], 0, b""),
    ([b"a\nb\nc\n"], 1, b"c\n"),
    ([b"a\nb\nc\n"], 2, b"b\nc\n"),
    ([b"a\nb\nc\n"], 3, b"a\nb\nc\n"),
    ([b"a\nb\nc\n"], 9, b"a\nb\nc\n"),
    ([b"a\nb\nc"], 1, b"c"),
    ([b"a\nb\nc"], 2, b"b\nc"),
    ([b"a\n\n\n"], 2, b"\n\n"),
    ([b"a\nb\n", b"c\n"], 2, b"b\nc\n"),
    ([b"a\nb\n", b"c\n"], 1, b"c\n"),
    ([b"a\nb\n", b""], 1, b"b\n"),
    ([b"a\n", b"b\n", b"", b"c"], 3, b"a\nb\nc"),
    ([b"old\n", b"a\n", b"b\n", b"", b"c"], 9, b"old\na\nb\nc"),
    ([b"a\nsplit li", b"ne\nc\n"], 2, b"split line\nc\n"),
]


@pytest.mark.parametrize(("files", "lines", "expected"), TAILS)
def test_tail(tmp_path: Path, follow: Callable[..., Follower], files: list[bytes], lines: int, expected: bytes) -> None:
    path = tmp_path / "log"
    lay_out(path, files)
    found, end = tail(str(path), lines)
    assert found == expected
    assert read_all(follow(path, end)) == b""
    assert read_all(follow(path, last_lines(str(path), lines))) == expected


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]), max_size=6),
    lines=st.integers(0, 8),
    cut=st.integers(0, 100_000),
    unfinished=st.booleans(),
)
def test_tail_is_the_end_of_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], lines: int, cut: int, unfinished: bool
) -> None:
    path = tmp_path_factory.mktemp("logs") / "log"
    output = b"".join(b"%c" % (97 + index) * length + b"\n" for index, length in enumerate(lengths))
    output = output[:-1] if unfinished else output
    lay_out(path, [output[:cut], output[cut:]])
    expected = b"".join(output.splitlines(keepends=True)[-lines:]) if lines else b""
    assert tail(str(path), lines)[0] == expected
    assert tail(str(path), lines, limit=70_000)[0] == expected[-70_000:]


def test_tail_of_a_huge_file_reads_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would take minutes
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"line\n" * 50)
    found, end = tail(str(path), 10)
    assert found == b"line\n" * 10
    assert end.offset == (1 << 40) + 251


def test_a_gap_in_the_numbers_hides_nothing(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    (tmp_path / "log.3").write_bytes(b"a\n")
    (tmp_path / "log.1").write_bytes(b"b\n")
    assert tail(str(tmp_path / "log"), 9)[0] == b"a\nb\n"
    follower = follow(tmp_path / "log", last_lines(str(tmp_path / "log"), 9))
    assert read_all(follower) == b"a\nb\n"
    (tmp_path / "log").write_bytes(b"c\n")
    assert read_all(follower) == b"c\n"


DATED = [  # of one log each, the oldest first
    ["log-20260129.gz", "log-20260130.gz", "log-20260131", "log"],
    ["log-2026-01-30", "log-2026-01-31", "log"],
    ["log.2026013109", "log.2026013110.gz", "log.2", "log.1", "log"],
    ["log.2", "log.1.gz", "log-20260130", "log-20260131.gz", "log"],
    ["log-20260131-0930", "log-20260131-0931", "log.300", "log.277", "log.7.gz", "log.1", "log"],
]


@pytest.mark.parametrize("names", DATED)
def test_files_of_any_rotation_are_part_of_a_log(
    tmp_path: Path, follow: Callable[..., Follower], names: list[str]
) -> None:
    """By a number, also behind a gap, or by a date. Those of other logs are not."""
    path = tmp_path / "log"
    for name in names:
        data = f"{name}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        os.utime(tmp_path / name, (1000.0 + names.index(name),) * 2)
    for other in ("log-2", "log-20260131.txt", "log.20260131.gz.partial", "log.01", "log-1-20260131", "a.log-20260131"):
        (tmp_path / other).write_bytes(b"another\n")
    whole = "".join(f"{name}\n" for name in names).encode()
    found = logread.files(str(path))
    assert [Path(file.path).name for file in found] == names
    assert [[Path(file.path).name for file in log] for log in logread.Held().files([str(path)] * 2)] == [names] * 2
    assert all(logread.read(str(path), file.id, 0, 99) == Path(file.path).read_bytes() for file in found)
    assert tail(str(path), 99)[0] == whole
    for number, name in enumerate(names):
        rest = whole[whole.index(f"{name}\n".encode()) :]
        follower = follow(path, last_lines(str(path), len(names) - number))
        assert read_all(follower) == rest
        assert read_all(follow(path, follower.position)) == b""
    path.rename(tmp_path / "log-20260201")
    path.write_bytes(b"next\n")
    assert read_all(follower) == b"next\n"


def test_who_follows_many_logs_does_not_list_their_folder(
    tmp_path: Path, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each that would be too much where there are thousands; and who reads them lists it once."""
    paths = [tmp_path / f"log{number}" for number in range(30)]
    for path in paths[:20]:
        lay_out(path, [b"a\n", b"b\n", b"c\n"])
    os.utime(tmp_path, (1.5, 1.5))
    listed: list[str] = []
    real_listdir = os.listdir

    def listdir(folder: str) -> list[str]:
        listed.append(folder)
        return real_listdir(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    found = logread.Held().files([str(path) for path in paths])
    assert [len(files) for files in found] == [3] * 20 + [0] * 10
    assert len(listed) == 1
    for path, files in zip(paths, found, strict=True):
        position = Position.of(files[-1].id, 2) if files else Position()
        follower = follow(path, position)
        assert follower.read() == b""
        if files:
            path.rename(f"{path}.0")
        path.write_bytes(b"d\n")
        assert read_all(follower) == b"d\n"
    assert len(listed) == 1
    (tmp_path / "log0-20260131").write_bytes(b"old\n")
    assert len(logread.files(str(paths[0]))) == 4


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "no folder"])
def test_what_is_no_log_file_is_empty(tmp_path: Path, follow: Callable[..., Follower], kind: str) -> None:
    path = tmp_path / "log"
    if kind == "symlink":
        (tmp_path / "secret").write_bytes(b"secret\n")
        path.symlink_to(tmp_path / "secret")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / "none" / "log"
    assert tail(str(path), 5) == (b"", Position())
    assert follow(path).read() == b""


@pytest.mark.skipif(AS_ROOT, reason="root may read everything")
def test_a_log_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "log").touch(0o000)
    with pytest.raises(Failed, match=r"can't read .*/log: Permission denied"):
        tail(str(tmp_path / "log"), 5)


def test_a_tail_that_a_rotation_overtakes_sees_no_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    lay_out(path, [b"a\n", b"b\n"])
    opened: list[str] = []

    def rotate_after_the_first(name: str) -> int | None:
        fd = real(name)
        if not opened:
            (tmp_path / "log.1").rename(tmp_path / "log.2")
            path.rename(tmp_path / "log.1")
            path.write_bytes(b"too late\n")
        opened.append(name)
        return fd

    real = logread._open
    monkeypatch.setattr(logread, "_open", rotate_after_the_first)
    assert tail(str(path), 9)[0] == b"a\nb\n"


@pytest.mark.parametrize("partial", [5, BLOCK, 3 * BLOCK])
def test_a_tail_whose_partial_line_is_cut_off_meanwhile_goes_on_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: Callable[..., Follower], partial: int
) -> None:
    path, line = tmp_path / "log", b"x" * partial
    path.write_bytes(b"a\nb\n" + line)

    def rotate_after(fd: int) -> os.stat_result:
        status = real(fd)
        if path.exists() and status.st_size == path.stat().st_size and not (tmp_path / "log.1").exists():
            os.truncate(path, 4)
            path.rename(tmp_path / "log.1")
            path.write_bytes(line)
        return status

    real = os.fstat
    with monkeypatch.context() as patch:
        patch.setattr(logread, "_open", lambda name: os.open(name, os.O_RDONLY))
        patch.setattr(os, "fstat", rotate_after)
        found, end = tail(str(path), 9)
    assert found + read_all(follow(path, end)) == b"a\nb\n" + line


# --- following --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.binary(max_size=60), st.integers(0, 80)), min_size=1, max_size=40),
    max_size=st.integers(10, 100),
    lines=st.integers(0, 5),
)
def test_a_follower_reads_each_byte_once_whatever_it_reads_when(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bytes, int]], max_size: int, lines: int
) -> None:
    """Writes and reads of any size in turn, over many rotations at a time."""
    path = tmp_path_factory.mktemp("logs") / "log"
    writer = Writer(path, max_size)
    writer.write(b"before\n" * 5)
    seen, end = tail(str(path), lines)
    assert seen == b"before\n" * lines
    follower = Follower(str(path), end)
    written = found = b""
    for data, asked in steps:
        data = data.replace(b" ", b"\n")
        writer.write(data)
        written += data
        if asked:
            found += follower.read(asked)
    found += read_all(follower, 7)
    assert found == written
    assert follower.position.offset <= max_size
    follower.close()
    writer.close()


@pytest.mark.parametrize("keep", [0, 1, 3, 100])
def test_a_follower_that_keeps_up_misses_nothing_at_any_step_of_a_rotation(
    tmp_path: Path, follow: Callable[..., Follower], keep: int
) -> None:
    """Reads after each single step of each rotation: no byte twice, none lost, also when it is dropped at once."""
    path = tmp_path / "log"
    writer, found, steps = Writer(path, 64, keep), b"", []
    follower = follow(path)

    def watch(step: str) -> None:
        nonlocal found
        steps.append(step)
        found += read_all(follower)

    crossing.watcher = watch
    try:
        for number in range(60):
            data = b"%d %s\n" % (number, b"x" * (number % 23))
            for piece in (data[:5], data[5:]):
                writer.write(piece)
                found += read_all(follower)
    finally:
        crossing.watcher = None
        writer.close()
    assert found == b"".join(b"%d %s\n" % (number, b"x" * (number % 23)) for number in range(60))
    assert {"log copy", "log name", "log truncate", "log enter"} <= set(steps)


def test_a_tail_at_any_step_of_a_rotation_goes_on_without_a_seam(
    tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    path = tmp_path / "log"
    writer = Writer(path, 64)
    output = b"".join(b"%d %s\n" % (number, b"x" * (number % 23)) for number in range(30))
    begun: list[tuple[bytes, Follower]] = []

    def watch(_step: str) -> None:
        seen, end = tail(str(path), 1000)
        begun.append((seen, follow(path, end)))

    crossing.watcher = watch
    try:
        for start in range(0, len(output), 9):
            writer.write(output[start : start + 9])
    finally:
        crossing.watcher = None
        writer.close()
    assert len(begun) > 20
    for seen, follower in begun:
        assert seen + read_all(follower) == output


def test_a_follower_beside_a_full_speed_writer(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    path, news = tmp_path / "log", threading.Event()
    logs = LogThread(lambda path: news.set())
    read_fd, write_fd = make_pipe()
    logs.add(Stream("w", "w", Log(max_size=200_000, keep=1000), str(path), read_fd))
    logs.start()
    output = b"".join(b"%d %s\n" % (number, b"x" * (number % 97)) for number in range(100_000))

    def write() -> None:
        for start in range(0, len(output), 5000):
            os.write(write_fd, output[start : start + 5000])

    follower, found = follow(path), bytearray()
    thread = threading.Thread(target=write)
    thread.start()
    while len(found) < len(output):
        news.clear()
        logs.watch(str(path))
        data = read_all(follower)
        found += data
        if not data:
            assert news.wait(10)
    thread.join()
    assert bytes(found) == output
    assert read_all(follower) == b""
    os.close(write_fd)
    assert logs.stop()


def test_a_file_that_does_not_exist_yet(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    follower = follow(tmp_path / "log")
    assert (follower.read(), follower.position) == (b"", Position())
    (tmp_path / "log").write_bytes(b"hello\n")
    assert (follower.read(), follower.position.offset) == (b"hello\n", 6)


def test_a_log_that_began_and_rotated_after_the_follower_is_read_from_its_first_byte(
    tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    _, end = tail(str(tmp_path / "log"), 5)
    followers = [follow(tmp_path / "log"), follow(tmp_path / "log", end)]
    lay_out(tmp_path / "log", [b"a\n", b"b\n", b"c\n"])
    assert [read_all(follower) for follower in followers] == [b"a\nb\nc\n"] * 2
    assert read_all(follow(tmp_path / "log")) == b"c\n"


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    (tmp_path / "log").write_bytes(b"before\n")
    follower = follow(tmp_path / "log")
    assert read_all(follower) == b"before\n"
    (tmp_path / "log").write_bytes(b"after\n")
    assert read_all(follower) == b"after\n"


@pytest.mark.parametrize("rotated", [0, 1, 3])
def test_after_a_deletion_it_goes_on_with_the_next_file(
    tmp_path: Path, follow: Callable[..., Follower], rotated: int
) -> None:
    path = tmp_path / "log"
    lay_out(path, [b"old\n"] * rotated + [b"before\n"])
    follower = follow(path)
    assert read_all(follower) == b"before\n"
    path.unlink()
    with open(path, "wb") as file:
        file.write(b"after\n")
    assert read_all(follower) == b"after\n"


def test_a_file_that_is_moved_away_is_left_when_a_new_one_is_there(
    tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    follower = follow(path)
    assert read_all(follower) == b"before\n"
    path.rename(tmp_path / "log-20260101")
    with open(tmp_path / "log-20260101", "ab") as file:
        file.write(b"late\n")
    assert read_all(follower) == b"late\n"
    with open(tmp_path / "log-20260101", "ab") as file:
        file.write(b"later\n")
    path.write_bytes(b"after\n")
    assert read_all(follower) == b"later\nafter\n"


def test_what_is_written_just_before_a_rotation_is_not_missed(
    tmp_path: Path, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at the end of the file and the look at its name."""
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    follower = follow(path)
    advance = follower._advance

    def write_and_rotate() -> bool:
        if not (tmp_path / "log.1").exists():
            with open(path, "ab") as file:
                file.write(b"late\n")
            path.rename(tmp_path / "log.1")
            path.write_bytes(b"after\n")
        return advance()

    monkeypatch.setattr(follower, "_advance", write_and_rotate)
    assert read_all(follower) == b"before\nlate\nafter\n"


def rotate(path: Path, content: bytes) -> None:
    """A rotation by hand, in the order of the real one."""
    for number in (3, 2, 1):
        for form in ("", ".gz"):
            if path.with_name(f"log.{number}{form}").exists():
                path.with_name(f"log.{number}{form}").rename(path.with_name(f"log.{number + 1}{form}"))
    path.rename(path.with_name("log.1"))
    path.write_bytes(content)


@pytest.mark.parametrize("moment", ["open", "look"])
def test_rotations_while_it_looks_for_the_next_file_make_it_miss_none(
    tmp_path: Path, follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\n")
    follower = follow(path)
    assert read_all(follower) == b"a\n"
    rotate(path, b"b\n")
    later = [b"c\n", b"d\n"]
    real_open, real_status = logread._open, logread._status

    def open_after_rotations(name: str) -> int | None:
        while later:
            rotate(path, later.pop(0))
        return real_open(name)

    def status_before_rotations(name: str) -> os.stat_result | None:
        found = real_status(name)
        while later and name.endswith(".1"):
            rotate(path, later.pop(0))
        return found

    if moment == "open":
        monkeypatch.setattr(logread, "_open", open_after_rotations)
    else:
        monkeypatch.setattr(logread, "_status", status_before_rotations)
    assert read_all(follower) == b"b\nc\nd\n"
    assert not later


def test_a_slow_follower_whose_files_were_dropped_goes_on_with_the_oldest(
    tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    writer, follower = Writer(tmp_path / "log", 4, keep=2), follow(tmp_path / "log")
    writer.write(b"0\n1\n")
    assert follower.read(2) == b"0\n"
    writer.write(b"2\n3\n4\n5\n6\n7\n8\n")
    assert read_all(follower) == b"1\n4\n5\n6\n7\n8\n"
    writer.close()


@pytest.mark.skipif(not AS_ROOT, reason="root is who could be led astray")
def test_root_reads_nothing_that_a_user_led_it_to(tmp_path: Path) -> None:
    """A program's user owns the folder of its log: a symlink on the way, or a hard link, must not show root's files."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "web.log").write_text("secret\n")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    (home / "log").symlink_to(secret)
    os.chown(home / "log", 65534, 65534, follow_symlinks=False)
    assert tail(str(home / "log" / "web.log"), 10)[0] == b""
    os.link(secret / "web.log", home / "web.log")
    assert tail(str(home / "web.log"), 10)[0] == b""
    assert tail(str(secret / "web.log"), 10)[0] == b"secret\n"


# --- compressed files -------------------------------------------------------------------------------------------------


def compress(path: Path) -> None:
    """As procman does it: another file of the same times takes the place of the rotated one."""
    status = path.stat()
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.unlink()


def test_compressed_files_are_part_of_a_log(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    path = tmp_path / "log"
    lay_out(path, [b"a\n" * 50_000, b"b\n" * 50_000, b"c\nd"])
    compress(path.with_name("log.2"))
    compress(path.with_name("log.1"))
    expected = b"a\n" + b"b\n" * 50_000 + b"c\nd"
    assert tail(str(path), 50_003)[0] == expected
    follower = follow(path, last_lines(str(path), 50_003))
    assert read_all(follower, 7777) == expected
    assert read_all(follow(path, last_lines(str(path), 10**9))) == b"a\n" * 50_000 + b"b\n" * 50_000 + b"c\nd"
    found = logread.files(str(path))
    assert [Path(one.path).name for one in found] == ["log.2.gz", "log.1.gz", "log"]
    assert [one.zipped for one in found] == [True, True, False]
    assert logread.read(str(path), found[2].id, 1, 2) == b"\nd"
    assert logread.read(str(path), found[0].id, 0, 2) == b"\x1f\x8b"
    assert logread.read(str(path), f"{found[2].device}:1", 0, 2) is None


@pytest.mark.parametrize("read_first", [0, 3, 8, 100])
@pytest.mark.parametrize("compressed", ["1", "2 1", "3 2 1"])
def test_a_follower_goes_on_when_its_files_are_compressed(
    tmp_path: Path, follow: Callable[..., Follower], read_first: int, compressed: str
) -> None:
    """Wherever it stands: in a file that is compressed behind its back, or before one."""
    path = tmp_path / "log"
    path.write_bytes(b"a\na\na\n")
    follower = follow(path)
    found = follower.read(read_first) if read_first else b""
    for content in (b"b\nb\n", b"c\n", b"d\n"):
        rotate(path, content)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    for number in compressed.split():
        compress(path.with_name(f"log.{number}"))
    found += read_all(follower, 5)
    assert found == b"a\na\na\nb\nb\nc\nd\n"


@pytest.mark.parametrize("first", [b"new A\nnew B\n", b"new A\nnew", b"new A " + b"x" * 999])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_place_is_found_again_when_its_file_was_compressed(
    tmp_path: Path, follow: Callable[..., Follower], first: bytes, more: int
) -> None:
    """As a client comes back with it: a supervisor was replaced, or the client has slept. Its inode may belong to
    another file by then, which is no reason to skip what that one begins with."""
    path = tmp_path / "log"
    lay_out(path, [b"old 3\n", b"old 2\n", b"old 1\n", b"seen 1\nseen 2\nhalf"])
    follower = follow(path, Position(path.stat().st_dev, path.stat().st_ino, 0))
    assert read_all(follower) == b"seen 1\nseen 2\nhalf"
    position = Position.of(follower.position.file, follower.position.offset)
    follower.close()
    with path.open("r+b") as file:
        file.truncate(14)  # the unfinished line moves along
    rotate(path, b"half" + first)
    compress(path.with_name("log.1"))
    expected = first
    for number in range(more):
        expected += b"next %d of it all\n" % number
        rotate(path, b"next %d of it all\n" % number)
    if more == 1:
        replaced = path.read_bytes()
        path.unlink()
        path.write_bytes(replaced)
        position = replace(position, inode=path.stat().st_ino)  # given again
    assert read_all(follow(path, position), 100) == expected


@pytest.mark.parametrize("content", [b"a", b"another line\n" * 9])
def test_a_place_whose_file_is_gone(tmp_path: Path, follow: Callable[..., Follower], content: bytes) -> None:
    """Truncated: it begins again. Another one that got its inode: the log from its oldest file."""
    path = tmp_path / "log"
    lay_out(path, [b"old\n", b"some lines\n" * 2])
    position = tail(str(path), 1)[1]
    path.write_bytes(content)
    assert read_all(follow(path, position)) == (content if len(content) < 22 else b"old\n" + content)


@pytest.mark.parametrize("size", ["same", "different"])
@pytest.mark.parametrize("mine", ["3", "3.gz", "deleted"])
def test_files_of_one_time_are_told_apart(
    tmp_path: Path, follow: Callable[..., Follower], size: str, mine: str
) -> None:
    """Clocks of files are coarse: a program that prints fast fills several in one tick."""
    path = tmp_path / "log"
    lay_out(path, [b"oldest\n", *(b"file %d\n" % n * (3 if size == "same" else n) for n in (3, 2, 1)), b"current\n"])
    for number in (1, 2, 3, 4):
        os.utime(path.with_name(f"log.{number}"), ns=(10**18, 10**18))
    third = path.with_name("log.3")
    follower = follow(path, Position(third.stat().st_dev, third.stat().st_ino, 0))
    found = follower.read(7)
    compress(path.with_name("log.1"))
    if mine == "3.gz":
        compress(third)
    elif mine == "deleted":
        third.unlink()
        compress(path.with_name("log.4"))
    count = (3, 3, 3) if size == "same" else (3, 2, 1)
    expected = b"".join(b"file %d\n" % n * times for n, times in zip((3, 2, 1), count, strict=True))
    assert found + read_all(follower) == expected + b"current\n"


def test_a_file_listed_with_an_unfinished_line_is_read_after_its_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a line\nhalf")
    (one,) = logread.files(str(path))
    with path.open("r+b") as file:
        file.truncate(7)
    rotate(path, b"half of it\n")
    assert logread.read(str(path), one.id, 0, 99) == b"a line\n"


def test_both_names_of_a_file_for_an_instant_are_one_file(tmp_path: Path, follow: Callable[..., Follower]) -> None:
    path = tmp_path / "log"
    lay_out(path, [b"a\n", b"b\n"])
    before = path.with_name("log.1").read_bytes()
    status = path.with_name("log.1").stat()
    compress(path.with_name("log.1"))
    path.with_name("log.1").write_bytes(before)
    os.utime(path.with_name("log.1"), ns=(0, status.st_mtime_ns))
    assert tail(str(path), 9)[0] == b"a\nb\n"
    assert len(logread.files(str(path))) == 2
    assert read_all(follow(path, last_lines(str(path), 9))) == b"a\nb\n"


def test_a_file_that_got_the_inode_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """As a compressed one does, of the file that it was made of: file systems give inodes away again at once."""
    path = tmp_path / "log"
    path.write_bytes(b"a line\n")
    (one,) = logread.files(str(path))
    with path.open("ab") as file:
        file.write(b"more\n")
    assert logread.read(str(path), one.id, 7, 99) == b"more\n"
    path.write_bytes(b"\x1f\x8b of another\n")  # the same inode
    assert logread.read(str(path), one.id, 0, 99) is None

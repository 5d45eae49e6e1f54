"""procman.logs.shelf and compressor: rotated files are compressed while others are rotated, and whoever dies loses
nothing."""

from __future__ import annotations

import gzip
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import compressor, crossing
from procman.config import Log
from procman.logs import make_pipe
from procman.logs.logfile import LogFile
from procman.logs.shelf import Job
from tests.harness import PROJECT, log_content, log_files

AS_ROOT = os.geteuid() == 0
LOG = Log(max_size=50, keep=100)


class Death(BaseException):
    """Stands for SIGKILL: nothing in procman.logs catches it."""


@pytest.fixture(autouse=True)
def crossings() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    crossing.watcher = None
    assert sorted(os.listdir("/proc/self/fd")) == before


def whole(path: Path) -> bytes:
    """The log as a reader sees it."""
    return b"".join(log_content(file) for file in log_files(path))


def names(path: Path) -> list[str]:
    """What stands beside the log, without its name."""
    return sorted(file.name[len(path.name) :] for file in path.parent.iterdir() if file != path)


def take(file: LogFile, data: bytes) -> None:
    """Has the file take these bytes."""
    read_fd, write_fd = make_pipe()
    try:
        os.write(write_fd, data)
        while select.select([read_fd], [], [], 0)[0]:
            file.prepare(time.monotonic())
            file.take(read_fd)
        file.prepare(time.monotonic())
    finally:
        os.close(read_fd)
        os.close(write_fd)


def pack(job: Job) -> None:
    """What the compressor does with it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        compressor.compress(job.source, job.target, theirs)


def compress_all(file: LogFile) -> int:
    """One after the other, until there is none left."""
    count = 0
    while (job := file.begin_compression()) is not None:
        pack(job)
        assert file.end_compression(done=True)
        count += 1
    return count


def lines(first: int, last: int) -> bytes:
    return b"".join(b"%d %s\n" % (number, b"x" * (number * 7 % 40)) for number in range(first, last))


def test_rotated_files_are_compressed_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    file = LogFile(str(path), LOG)
    take(file, lines(0, 12))
    before = {each.name: (log_content(each), each.stat().st_mtime_ns) for each in log_files(path)[:-1]}
    assert compress_all(file) == len(before) == 7
    after = {each.name: (log_content(each), each.stat().st_mtime_ns) for each in log_files(path)[:-1]}
    assert after == {f"{name}.gz": content for name, content in before.items()}
    assert subprocess.run(["gzip", "-t", *log_files(path)[:-1]], check=False).returncode == 0
    take(file, lines(12, 30))
    file.close()
    assert whole(path) == lines(0, 30)
    assert names(path) == sorted(f".{n}{'.gz' * (n > file.rotations - 7)}" for n in range(1, file.rotations + 1))


def test_a_file_that_moves_on_while_it_is_compressed_is_found_under_its_new_number(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    file = LogFile(str(path), LOG)
    take(file, lines(0, 4))
    assert names(path) == [".1"]
    job = file.begin_compression()
    assert job is not None
    take(file, lines(4, 8))
    number = file.rotations
    assert number > 1
    pack(job)
    assert file.end_compression(done=True)
    file.close()
    assert names(path) == sorted([f".{number}.gz", *(f".{n}" for n in range(1, number))])
    assert whole(path) == lines(0, 8)


@pytest.mark.parametrize("how", ["dropped", "failed", "changed", "replaced"])
def test_a_compression_that_came_to_nothing_leaves_nothing(tmp_path: Path, how: str) -> None:
    path = tmp_path / "web.log"
    file = LogFile(str(path), Log(max_size=10, keep=2))
    take(file, b"1 line 1\n2 line 2\n3\n")
    job = file.begin_compression()
    assert job is not None
    pack(job)
    match how:
        case "dropped":  # by `keep`
            take(file, b"4 line 4\n5 line 5\n6 line 6\n7 line 7\n")
        case "changed":
            with path.with_name("web.log.1").open("ab") as other:
                other.write(b"more\n")
        case "replaced":  # another supervisor has removed our unfinished file, and begun its own
            path.with_name("web.log.gz.partial").unlink()
            path.with_name("web.log.gz.partial").write_bytes(b"its own")
    before = whole(path)
    assert not file.end_compression(done=how != "failed")
    file.close()
    assert whole(path) == before
    assert [name for name in names(path) if "gz" in name] == ([".gz.partial"] if how == "replaced" else [])
    file.prepare(time.monotonic())  # whoever opens the log next cleans up
    file.close()
    assert [name for name in names(path) if "gz" in name] == []


def live(path: Path, pipe: int) -> bool:
    """A life of a log thread with a compressor, which takes what is in the pipe; False when it died."""
    file = LogFile(str(path), LOG)
    try:
        compress_all(file)
        while select.select([pipe], [], [], 0)[0]:
            file.prepare(time.monotonic())
            file.take(pipe)
        file.prepare(time.monotonic())
        compress_all(file)
    except Death:
        if file.job is not None:
            file.job.close()
        return False
    finally:
        file.close()
    return True


def test_two_deaths_at_each_pair_of_steps_lose_and_double_nothing(tmp_path: Path) -> None:
    """Dies at the n-th step of rotations and compressions, the successor at its m-th; the third finishes. Between any
    two steps of a compression a reader sees every byte once."""
    first, finished, seen = 0, False, set()

    def dying_at(number: int, path: Path) -> None:
        left = number

        def watch(step: str) -> None:
            nonlocal left
            seen.add(step)
            if step.startswith("log gzip"):
                found = whole(path)
                assert lines(0, 9).startswith(found)
                assert len(found) >= len(lines(0, 5))
            left -= 1
            if not left:
                raise Death

        crossing.watcher = watch

    while not finished:
        first += 1
        for second in (1, 2, 3, 5, 8):
            path = tmp_path / f"{first},{second}" / "log"
            crossing.watcher = None
            file = LogFile(str(path), LOG)
            take(file, lines(0, 5))
            file.close()
            read_fd, write_fd = make_pipe()
            os.write(write_fd, lines(5, 9))
            dying_at(first, path)
            finished = live(path, read_fd)
            dying_at(second, path)
            live(path, read_fd)
            crossing.watcher = None
            assert live(path, read_fd)
            os.close(read_fd)
            os.close(write_fd)
            assert whole(path) == lines(0, 9)
            assert all(name.endswith(".gz") for name in names(path)), names(path)
    assert {"log gzip", "log gzip name", "log gzip remove", "log gzip settle"} <= seen
    assert first > 10


def test_what_supervisor_has_left_is_adopted(tmp_path: Path) -> None:
    """Uncompressed, with other modes, of another owner where we may: `web.log.1` goes on as number 1."""
    path = tmp_path / "web.log"
    path.write_bytes(b"now\n")
    for number in (1, 2, 3):
        old = path.with_name(f"web.log.{number}")
        old.write_bytes(b"old %d\n" % number)
        old.chmod(0o604)
        os.utime(old, (1e9, 1e9 - number))
        if AS_ROOT:
            os.chown(old, 12, 34)
    file = LogFile(str(path), Log(max_size=4, keep=4))
    assert compress_all(file) == 3
    take(file, b"m\n")
    file.close()
    assert whole(path) == b"old 3\nold 2\nold 1\nnow\nm\n"
    packed = path.with_name("web.log.4.gz").stat()
    assert (stat.S_IMODE(packed.st_mode), packed.st_mtime) == (0o604, 1e9 - 3)
    assert not AS_ROOT or (packed.st_uid, packed.st_gid) == (12, 34)


def test_two_files_of_one_number_that_are_no_copies_both_stay(tmp_path: Path) -> None:
    """Somebody has put them there. They move on together, and go together."""
    path = tmp_path / "web.log"
    path.with_name("web.log.1").write_bytes(b"one\n")
    path.with_name("web.log.1.gz").write_bytes(gzip.compress(b"another\n"))
    path.write_bytes(b"full\n")
    file = LogFile(str(path), Log(max_size=5, keep=2))
    assert compress_all(file) == 0
    take(file, b"n\n")
    assert compress_all(file) == 1
    file.close()
    assert names(path) == [".1.gz", ".2", ".2.gz"]
    assert path.with_name("web.log.2").read_bytes() == b"one\n"


def test_a_copy_that_gzip_has_made_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    path.with_name("web.log.1").write_bytes(b"one\n")
    subprocess.run(["gzip", "-k", "web.log.1"], cwd=tmp_path, check=True)
    file = LogFile(str(path), LOG)
    assert compress_all(file) == 0
    assert names(path) == [".1.gz"]


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "hard link"])
def test_what_is_no_file_of_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    folder = tmp_path / "log"
    folder.mkdir()
    path = folder / "web.log"
    first = folder / "web.log.1"
    match kind:
        case "symlink":
            first.symlink_to(secret)
        case "directory":
            first.mkdir()
        case "fifo":
            os.mkfifo(first)
        case "hard link":
            if not AS_ROOT:
                pytest.skip("for root alone: others can read what they link to")
            os.chown(folder, 12, 34)
            first.hardlink_to(secret)
    path.with_name("web.log.2").write_bytes(b"two\n")
    file = LogFile(str(path), LOG)
    assert compress_all(file) == 1  # what comes behind it
    assert names(path) == [".1", ".2.gz"]
    assert secret.read_bytes() == b"secret"


def test_a_smaller_keep_removes_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LogFile(str(path), LOG)
    take(file, lines(0, 12))
    job = file.begin_compression()
    assert job is not None
    pack(job)
    assert file.end_compression(done=True)
    take(file, lines(12, 20))
    file.log = Log(max_size=50, keep=3)
    take(file, lines(20, 24))
    file.close()
    assert len(names(path)) == 3


STEPS = st.lists(st.sampled_from(["write", "begin", "done", "failed", "killed"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_no_byte_is_lost_whatever_happens_when(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    path = tmp_path_factory.mktemp("logs") / "log"
    file, job, number = LogFile(str(path), LOG), None, 0
    for step in steps:
        match step:
            case "write":
                take(file, lines(number, number + 2))
                number += 2
            case "begin" if job is None:
                job = file.begin_compression()
                if job is not None:
                    pack(job)
            case "done" | "failed" if job is not None:
                file.end_compression(done=step == "done")
                job = None
            case "killed":
                file.close()
                if job is not None:
                    job.close()
                file, job = LogFile(str(path), LOG), None
        assert whole(path) == lines(0, number)
    if job is not None:
        file.end_compression(done=True)
    compress_all(file)
    file.close()
    assert whole(path) == lines(0, number)
    assert all(name.endswith(".gz") for name in names(path))


# --- the compressor ---------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-S", str(PROJECT / "procman" / "compressor.py")]
    with theirs:
        process = subprocess.Popen(command, stdout=theirs.fileno(), stdin=subprocess.DEVNULL)
    yield ours, process
    ours.close()
    assert process.wait(10) == 0  # it goes with the one that it works for


def ask(wire: socket.socket, source: Path, target: Path, mode: str = "wb") -> bytes:
    with source.open("rb") as one, target.open(mode) as other:
        socket.send_fds(wire, [b"."], [one.fileno(), other.fileno()])
    wire.settimeout(30)
    return wire.recv(4096)


@pytest.mark.parametrize("content", [b"", b"x\n", os.urandom(3_000_000), b"line\n" * 1_000_000])
def test_what_is_compressed_is_what_was_there(
    tmp_path: Path, running: tuple[socket.socket, subprocess.Popen[bytes]], content: bytes
) -> None:
    source, target = tmp_path / "source", tmp_path / "target.gz"
    source.write_bytes(content)
    os.utime(source, (0, 1_234_567_890))
    assert ask(running[0], source, target) == b"\0"
    assert gzip.decompress(target.read_bytes()) == content
    assert int.from_bytes(target.read_bytes()[4:8], "little") == 1_234_567_890


def test_the_compressor_says_what_is_wrong_and_goes_on(
    tmp_path: Path, running: tuple[socket.socket, subprocess.Popen[bytes]]
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    assert ask(running[0], source, Path("/dev/full")) == b"No space left on device"
    assert ask(running[0], source, tmp_path / "target") == b"\0"


def test_the_compressor_lets_everybody_else_go_first(
    tmp_path: Path, running: tuple[socket.socket, subprocess.Popen[bytes]]
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    ask(running[0], tmp_path / "source", tmp_path / "target")
    assert os.getpriority(os.PRIO_PROCESS, running[1].pid) == 19
    shown = subprocess.run(["ionice", "-p", str(running[1].pid)], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() in ("idle", "")

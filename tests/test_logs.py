"""procman.logs: real pipes, real files, real children; bytes are counted, and compared one by one."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import crossing
from procman.config import Log, Room
from procman.logs import Counters, Kept, LogThread, LogThreads, Rules, Stream, channel, logfile, make_pipe
from procman.logs.datagrams import Datagrams
from procman.logs.flow import Flow, bytes_waiting
from procman.logs.lines import Piece
from procman.logs.logfile import LogFile
from procman.logs.outlet import Outlet
from tests.harness import PROJECT, wait_until

AS_ROOT = os.geteuid() == 0


class Capture:
    """A LogThread with pipes that the test writes to."""

    def __init__(
        self,
        folder: Path,
        stdout_fd: int = 1,
        on_news: Callable[[str], None] = lambda path: None,
        on_said: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.thread = LogThread(on_news, stdout_fd, on_said=on_said)
        self.thread.start()
        self.pipes: dict[str, int] = {}

    def add(self, key: str, log: Log, name: str = "", counters: Counters | None = None) -> int:
        """A stream of process `key`; returns the write end of its pipe."""
        read_fd, self.pipes[key] = make_pipe()
        path = str(self.folder / (name or f"{key}.log"))
        self.thread.add(Stream(key, key.partition("/")[0], log, path, read_fd), counters)
        return self.pipes[key]

    def settle(self, key: str) -> Counters:
        """Waits until all that was written so far is dealt with."""
        done = threading.Event()
        self.thread.flush(key, done.set)
        assert done.wait(10)
        return self.thread.counters(key)

    def close(self) -> None:
        for fd in self.pipes.values():
            os.close(fd)
        self.pipes.clear()
        assert self.thread.stop()
        assert not self.thread.trouble


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Capture]:
    before = sorted(os.listdir("/proc/self/fd"))
    logs = Capture(tmp_path)
    yield logs
    logs.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def no_large_files() -> Iterator[Callable[[int], None]]:
    """limit(size): no file of this process may grow past `size` bytes (EFBIG): a full disk, for ordinary users too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_speed(stdout: int) -> Iterator[None]:
    """A child that prints lines without end."""
    with subprocess.Popen(["yes", "x" * 99], stdout=stdout, stderr=subprocess.DEVNULL) as yes:
        try:
            yield
        finally:
            yes.kill()


def all_output(path: Path) -> bytes:
    """The log as a reader sees it: the rotated files, oldest first, and the current one."""
    numbers = [int(file.suffix[1:]) for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()]
    files = [*(path.with_name(f"{path.name}.{number}") for number in sorted(numbers, reverse=True)), path]
    return b"".join(file.read_bytes() for file in files if file.exists())


def numbered(first: int, last: int) -> bytes:
    """Lines of different lengths, each of which says which one it is."""
    return b"".join(b"%d %s\n" % (number, b"x" * (number * 7 % 40)) for number in range(first, last))


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_make_pipe_blocks_the_program_and_not_us() -> None:
    read_fd, write_fd = make_pipe()
    assert (os.get_blocking(read_fd), os.get_blocking(write_fd)) == (False, True)
    assert not os.get_inheritable(read_fd)
    assert not os.get_inheritable(write_fd)
    assert fcntl.fcntl(read_fd, fcntl.F_GETPIPE_SZ) > 0
    os.close(read_fd)
    os.close(write_fd)


# --- a file -----------------------------------------------------------------------------------------------------------


def test_output_goes_to_a_file_in_a_new_folder(logs: Capture) -> None:
    before = os.umask(0o077)
    try:
        pipe = logs.add("shop", Log(mode_bits=0o644), "new/folder/shop.log")
        os.write(pipe, b"hello\n\0binary\xff, and no end")
        assert logs.settle("shop") == Counters(read=26, written=26)
    finally:
        os.umask(before)
    path = logs.folder / "new/folder/shop.log"
    assert path.read_bytes() == b"hello\n\0binary\xff, and no end"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o027 == 0


def test_an_old_file_is_continued_and_counters_too(logs: Capture) -> None:
    (logs.folder / "shop.log").write_bytes(b"before\n")
    pipe = logs.add("shop", Log(), counters=Counters(read=10, written=7, dropped=3, rotations=2))
    os.write(pipe, b"after\n")
    assert logs.settle("shop") == Counters(read=16, written=13, dropped=3, rotations=2)
    assert (logs.folder / "shop.log").read_bytes() == b"before\nafter\n"


def test_what_a_killed_predecessor_held_in_memory_counts_as_dropped(logs: Capture) -> None:
    pipe = logs.add("shop", Log(), counters=Counters(read=10, written=6, held=4))
    assert logs.thread.counters("shop") == Counters(read=10, written=6, dropped=4, unreported=4)
    os.write(pipe, b"after\n")
    assert logs.settle("shop") == Counters(read=16, written=12, dropped=4)
    told = b"procman: 4 bytes of output were dropped: procman was restarted\n"
    assert (logs.folder / "shop.log").read_bytes() == told + b"after\n"


def test_remove_writes_what_is_in_the_pipe_and_closes_it(logs: Capture) -> None:
    pipe = logs.add("shop", Log())
    os.write(pipe, b"last words\n")
    done = threading.Event()
    logs.thread.remove("shop", done.set)
    assert done.wait(5)
    assert (logs.folder / "shop.log").read_bytes() == b"last words\n"
    link = os.readlink(f"/proc/self/fd/{pipe}")
    others = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}") and int(fd) != pipe]
    assert link not in [os.readlink(f"/proc/self/fd/{fd}") for fd in others if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_nobody_gets_sigpipe_while_no_reader_is_there() -> None:
    """Who writes is a reader himself: what is written waits, and whoever opens the pipe again finds it."""
    read_fd, write_fd = make_pipe()
    os.close(read_fd)
    os.write(write_fd, b"waits")
    again = os.open(f"/proc/self/fd/{write_fd}", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(again, 100) == b"waits"
    os.close(write_fd)
    assert os.read(again, 100) == b"", "and its end is still an end"
    os.close(again)


def test_remove_does_not_wait_for_a_program_that_never_stops(logs: Capture) -> None:
    pipe, done = logs.add("shop", Log()), threading.Event()

    def write_again(chunk: bytes) -> None:
        os.write(pipe, chunk)  # so the pipe is never empty

    logs.thread.tap("shop", write_again)
    os.write(pipe, b"again and again\n")
    wait_until(lambda: logs.thread.counters("shop").read > 1000)
    logs.thread.remove("shop", done.set)
    assert done.wait(5)


def test_remove_and_change_close_files_that_nobody_needs(logs: Capture) -> None:
    def is_open(name: str) -> bool:
        return str(logs.folder / name) in {
            os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
        }

    for key in ("one", "two"):
        os.write(logs.add(key, Log(), "shared.log"), b"x\n")
        logs.settle(key)
    assert is_open("shared.log")
    logs.thread.change("one", Log(), str(logs.folder / "other.log"))
    os.write(logs.pipes["one"], b"x\n")
    logs.settle("one")
    assert is_open("shared.log")
    assert is_open("other.log")
    logs.thread.remove("two")
    wait_until(lambda: not is_open("shared.log"))


def test_when_all_writers_are_gone_the_rest_is_written_and_nothing_spins(logs: Capture) -> None:
    pipe = logs.add("shop", Log())
    os.write(pipe, b"bye\n")
    os.close(logs.pipes.pop("shop"))
    wait_until(lambda: logs.thread.counters("shop").written == 4)
    assert asleep(logs.thread)
    logs.thread.remove("shop")


def asleep(thread: LogThread) -> bool:
    """Whether the log thread does nothing at all for a quarter of a second: the kernel counts each time it sleeps."""
    status = Path(f"/proc/self/task/{thread._thread.native_id}/status")
    wait_until(lambda: "State:\tS" in status.read_text())
    time.sleep(0.05)
    switches = [line for line in status.read_text().splitlines() if "ctxt_switches" in line]
    time.sleep(0.25)
    return switches == [line for line in status.read_text().splitlines() if "ctxt_switches" in line]


def test_an_idle_thread_never_wakes_up(logs: Capture) -> None:
    pipe = logs.add("shop", Log())
    os.write(pipe, b"hello\n")
    logs.settle("shop")
    assert asleep(logs.thread)


def test_change_sends_bytes_to_another_file(logs: Capture) -> None:
    pipe = logs.add("shop", Log())
    os.write(pipe, b"old\n")
    logs.settle("shop")
    logs.thread.change("shop", Log(), str(logs.folder / "other.log"))
    logs.settle("shop")
    os.write(pipe, b"new\n")
    assert logs.settle("shop").written == 8
    assert (logs.folder / "shop.log").read_bytes() == b"old\n"
    assert (logs.folder / "other.log").read_bytes() == b"new\n"


def test_streams_of_one_path_share_the_file(logs: Capture) -> None:
    pipes = [logs.add(f"shop:{number}", Log(max_size=1000, keep=100), "shop.log") for number in range(3)]
    for turn in range(100):
        os.write(pipes[turn % 3], b"line %d\n" % turn)
    for number in range(3):
        logs.settle(f"shop:{number}")
    assert sorted(all_output(logs.folder / "shop.log").splitlines()) == sorted(b"line %d" % n for n in range(100))
    logs.thread.remove("shop:0")
    os.write(pipes[1], b"still here\n")
    logs.settle("shop:1")
    assert all_output(logs.folder / "shop.log").endswith(b"still here\n")


def test_one_program_at_full_speed_leaves_the_others_their_turn(logs: Capture) -> None:
    busy, quiet = logs.add("busy", Log(max_size=8 << 20, keep=1)), logs.add("quiet", Log())
    with full_speed(busy):
        wait_until(lambda: logs.thread.counters("busy").read > 8 << 20)
        began = time.monotonic()
        for number in range(1, 11):
            os.write(quiet, b"line\n")
            wait_until(lambda number=number: logs.thread.counters("quiet").written == 5 * number)  # type: ignore[misc]
        assert time.monotonic() - began < 5
        assert fcntl.fcntl(busy, fcntl.F_GETPIPE_SZ) > fcntl.fcntl(quiet, fcntl.F_GETPIPE_SZ)
    counters = logs.settle("busy")
    assert counters.read == counters.written > 8 << 20
    assert counters.rotations >= 1


# --- foreign hands on the file ----------------------------------------------------------------------------------------


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried or looked for once a second is so at each turn, also within one round of turns."""
    monkeypatch.setattr(logfile, "RETRY_SECONDS", -1.0)


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("hand", ["delete", "truncate", "move", "replace"])
def test_a_foreign_hand_on_the_file_is_noticed(logs: Capture, hand: str) -> None:
    pipe, path = logs.add("shop", Log()), logs.folder / "shop.log"
    os.write(pipe, b"before\n")
    logs.settle("shop")
    if hand == "delete":
        path.unlink()
    elif hand == "truncate":
        os.truncate(path, 0)
    else:
        path.rename(logs.folder / "moved")
    if hand == "replace":
        path.write_bytes(b"foreign\n")
    os.write(pipe, b"after\n")
    assert logs.settle("shop").dropped == 0
    assert path.read_bytes() == (b"foreign\nafter\n" if hand == "replace" else b"after\n")


def test_reopen_at_once_makes_the_file_anew(logs: Capture) -> None:
    pipe, path = logs.add("shop", Log()), logs.folder / "shop.log"
    os.write(pipe, b"before\n")
    logs.settle("shop")
    path.rename(logs.folder / "moved")
    logs.thread.reopen()
    wait_until(path.exists)
    os.write(pipe, b"after\n")
    logs.settle("shop")
    assert path.read_bytes() == b"after\n"
    assert (logs.folder / "moved").read_bytes() == b"before\n"


@pytest.mark.usefixtures("no_delay")
@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
@pytest.mark.parametrize("running", [False, True])
def test_root_does_not_follow_what_the_folders_owner_puts_on_the_way(logs: Capture, running: bool) -> None:
    home, victim = logs.folder / "home", logs.folder / "victim"
    for folder, owner in ((home, 65534), (home / "logs", 65534), (victim, 0)):
        folder.mkdir()
        os.chown(folder, owner, owner)
    pipe = logs.add("shop", Log(max_size=20), "home/logs/shop.log")
    if running:
        os.write(pipe, b"before\n")
        assert logs.settle("shop").written == 7
    (home / "logs").rename(home / "mine")
    (home / "logs").symlink_to(victim)
    os.lchown(home / "logs", 65534, 65534)
    os.write(pipe, b"x" * 30 + b"\n")
    counters = logs.settle("shop")
    assert counters.dropped == 31
    assert f"the symlink {home}/logs is not followed" in counters.error
    assert not list(victim.iterdir())


@pytest.mark.usefixtures("no_delay")
@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
def test_root_writes_to_no_hard_link_of_the_folders_owner(logs: Capture) -> None:
    victim, path = logs.folder / "victim", logs.folder / "home" / "shop.log"
    victim.write_text("precious")
    path.parent.mkdir()
    path.hardlink_to(victim)
    os.chown(path.parent, 65534, 65534)
    pipe = logs.add("shop", Log(), "home/shop.log")
    os.write(pipe, b"x\n")
    assert logs.settle("shop").error == "the file has a second name, and others may write its folder (EINVAL)"
    assert victim.read_text() == "precious"
    os.chown(path.parent, 0, 0)
    os.write(pipe, b"x\n")
    assert logs.settle("shop").error == "", "in a folder of root's own it may be what it is"


@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
def test_a_rotation_stays_in_the_folder_of_its_file(tmp_path: Path) -> None:
    """The folder is swapped after the file was opened, and nobody has looked again since."""
    home, victim = tmp_path / "home", tmp_path / "victim"
    home.mkdir()
    victim.mkdir()
    for name in ("log", "log.1", "log.2", "log.partial"):
        (victim / name).write_text(name)
    os.chown(tmp_path, 65534, 65534)
    read_fd, write_fd = make_pipe()
    file = LogFile(str(home / "log"), Log(max_size=10, keep=2))
    os.write(write_fd, b"one\ntwo\nth")
    file.prepare(0.0)
    file.take(read_fd)
    home.rename(tmp_path / "mine")
    home.symlink_to(victim)
    with pytest.raises(OSError, match="not followed"):
        file.prepare(0.5)
    file.close()
    assert {path.name: path.read_text() for path in victim.iterdir()} == {
        name: name for name in ("log", "log.1", "log.2", "log.partial")
    }
    assert (tmp_path / "mine" / "log.1").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "mine" / "log").read_bytes() == b"th"
    os.close(read_fd)
    os.close(write_fd)


def _directory(path: Path) -> None:
    path.mkdir()


def _symlink(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _file_as_folder(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_directory, "Is a directory (EISDIR)"),
        (_symlink, "it is a symlink, which is not followed (ELOOP)"),
        (_fifo, "not a regular file (EINVAL)"),
        (_file_as_folder, "Not a directory (ENOTDIR)"),
    ],
)
def test_a_path_that_can_not_be_written_drops_and_counts(
    logs: Capture, spoil: Callable[[Path], None], error: str
) -> None:
    folder = logs.folder / "logs"
    folder.mkdir()
    path = folder / "shop.log"
    spoil(path)
    pipe = logs.add("shop", Log(), "logs/shop.log")
    for _ in range(20):  # more than a pipe holds: nobody blocks
        os.write(pipe, b"x" * 65536)
    assert logs.settle("shop") == Counters(read=1310720, dropped=1310720, unreported=1310720, error=error)
    assert not (folder.parent / "elsewhere").exists()
    if folder.is_file():
        folder.unlink()
    elif path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    os.write(pipe, b"again\n")
    assert logs.settle("shop") == Counters(read=1310726, written=6, dropped=1310720)
    marker = f"procman: 1310720 bytes of output were dropped: {error}\n"
    assert path.read_bytes() == marker.encode() + b"again\n"


@pytest.mark.usefixtures("no_delay")
def test_that_a_loss_is_told_is_news_as_well(logs: Capture) -> None:
    """Also where that was in the turn of its stream, and not when losses are looked at: else it stays on record."""
    said: list[int] = []
    (logs.folder / "shop.log").mkdir()
    pipe = logs.add("shop", Log())
    logs.thread._on_loss = lambda: said.append(logs.thread.counters("shop").unreported)
    os.write(pipe, b"lost\n")
    wait_until(lambda: said == [5])
    (logs.folder / "shop.log").rmdir()
    os.write(pipe, b"again\n")
    assert logs.settle("shop").unreported == 0
    wait_until(lambda: said[-1] == 0)


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_a_folder_without_permission_drops_and_counts(logs: Capture) -> None:
    (logs.folder / "logs").mkdir(0o500)
    pipe = logs.add("shop", Log(), "logs/shop.log")
    os.write(pipe, b"lost\n")
    assert logs.settle("shop").error == "Permission denied (EACCES)"


@pytest.mark.usefixtures("no_delay")
def test_a_full_disk_drops_counts_and_tells(logs: Capture, no_large_files: Callable[[int], None]) -> None:
    pipe, path = logs.add("shop", Log()), logs.folder / "shop.log"
    no_large_files(1000)
    os.write(pipe, b"a" * 600)
    assert logs.settle("shop") == Counters(read=600, written=600)
    os.write(pipe, b"b" * 600)
    full = Counters(read=1200, written=1000, dropped=200, unreported=200, error="File too large (EFBIG)")
    assert logs.settle("shop") == full
    no_large_files(1010)  # room for a piece of the marker: it is taken back
    os.write(pipe, b"c" * 50)
    assert logs.settle("shop").dropped == 250
    assert path.read_bytes() == b"a" * 600 + b"b" * 400
    no_large_files(-1)
    os.write(pipe, b"d\n")
    assert logs.settle("shop") == Counters(read=1252, written=1002, dropped=250)
    marker = b"\nprocman: 250 bytes of output were dropped: "
    tail = path.read_bytes()[1000:]
    assert tail.startswith(marker)
    assert tail.endswith(b"\nd\n")


def test_a_failed_file_is_left_alone_until_the_next_second_or_reopen(
    logs: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logfile, "RETRY_SECONDS", 3600.0)
    path = logs.folder / "shop.log"
    path.mkdir()
    pipe = logs.add("shop", Log())
    os.write(pipe, b"lost\n")
    assert logs.settle("shop").dropped == 5
    path.rmdir()
    os.write(pipe, b"too soon\n")
    assert logs.settle("shop").dropped == 14
    logs.thread.reopen()
    wait_until(path.exists)
    os.write(pipe, b"written\n")
    assert logs.settle("shop").written == 8
    assert path.read_bytes().endswith(b"written\n")


@pytest.mark.usefixtures("no_delay")
def test_a_full_file_system_drops_counts_and_tells(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not AS_ROOT or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and may not mount here")
    logs = Capture(disk)
    try:
        pipe = logs.add("shop", Log())
        for _ in range(10):
            os.write(pipe, b"x" * 9999 + b"\n")
        counters = logs.settle("shop")
        assert counters.error == "No space left on device (ENOSPC)"
        assert counters.read == counters.written + counters.dropped == 100_000
        assert (disk / "shop.log").stat().st_size == counters.written
        os.truncate(disk / "shop.log", 0)
        os.write(pipe, b"again\n")
        logs.settle("shop")
        told = f"procman: {counters.dropped} bytes of output were dropped: No space left on device (ENOSPC)\nagain\n"
        assert (disk / "shop.log").read_text() == told
    finally:
        logs.close()
        subprocess.run(["umount", str(disk)], check=True)


# --- rotation ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=25),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    max_size=st.integers(10, 120),
    unfinished=st.booleans(),
)
def test_no_byte_is_lost_and_no_line_is_split(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cuts: list[int], max_size: int, unfinished: bool
) -> None:
    """Whatever the lines, the writes and the size: the files together are the output, and each ends with a line that is
    not longer than a file may be."""
    path = tmp_path_factory.mktemp("logs") / "shop.log"
    output = b"".join(b"%c" % (97 + index % 26) * length + b"\n" for index, length in enumerate(lengths))
    output = output[:-1] if unfinished else output
    file = LogFile(str(path), Log(max_size=max_size, keep=100_000))
    write(file, output, cuts)
    assert all_output(path) == output
    rotated = [entry.read_bytes() for entry in path.parent.iterdir() if entry != path]
    assert len(rotated) == file.rotations
    assert sum(not content.endswith(b"\n") for content in rotated) == file.lines_split
    assert all(len(content) <= max_size for content in (*rotated, path.read_bytes() if output else b""))
    if all(length < max_size for length in lengths):
        assert file.lines_split == 0


def write(file: LogFile, output: bytes, cuts: list[int]) -> None:
    """Has the file take the output in pieces."""
    read_fd, write_fd = make_pipe()
    try:
        turn = 0
        while output:
            cut = cuts[turn % len(cuts)]
            os.write(write_fd, output[:cut])
            output, turn = output[cut:], turn + 1
            while select.select([read_fd], [], [], 0)[0]:
                file.prepare(time.monotonic())
                assert file.take(read_fd).length > 0
    finally:
        os.close(read_fd)
        os.close(write_fd)
        file.close()


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, {"": b"6\n7"}), (1, {"": b"6\n7", ".1": b"4\n5\n"}), (2, {"": b"6\n7", ".1": b"4\n5\n", ".2": b"2\n3\n"})],
)
def test_keep_is_the_number_of_rotated_files(tmp_path: Path, keep: int, left: dict[str, bytes]) -> None:
    write(LogFile(str(tmp_path / "log"), Log(max_size=5, keep=keep)), b"0\n1\n2\n3\n4\n5\n6\n7", [3])
    assert {name.name[3:]: name.read_bytes() for name in tmp_path.iterdir()} == left


def test_a_smaller_keep_removes_the_rest(tmp_path: Path) -> None:
    for number in range(1, 6):
        (tmp_path / f"log.{number}").write_bytes(b"")
    write(LogFile(str(tmp_path / "log"), Log(max_size=4, keep=2)), b"1\n2\n3\n", [2])
    assert sorted(name.name for name in tmp_path.iterdir()) == ["log", "log.1", "log.2"]


def test_max_size_0_never_rotates(tmp_path: Path) -> None:
    file = LogFile(str(tmp_path / "log"), Log(max_size=0))
    write(file, b"x\n" * 5000, [1000])
    assert (file.rotations, file.size) == (0, 10_000)


def test_a_line_of_50_MB_is_cut_where_it_must_be(logs: Capture) -> None:
    pipe = logs.add("shop", Log(max_size=8 << 20, keep=100))
    zeros = f"head -c {50 << 20} /dev/zero; echo; echo next"
    subprocess.run(["/bin/sh", "-c", zeros], stdout=pipe, check=True)
    counters = logs.settle("shop")
    size = (50 << 20) + 6
    assert counters == Counters(read=size, written=size, rotations=6, lines_split=6)
    assert (logs.folder / "shop.log").read_bytes() == b"\0" * (2 << 20) + b"\nnext\n"


@pytest.mark.usefixtures("no_delay")
def test_a_rotation_that_is_not_possible_lets_the_file_grow(tmp_path: Path, logs: Capture) -> None:
    (tmp_path / "shop.log.1").mkdir()
    (tmp_path / "shop.log.1" / "in the way").touch()
    pipe = logs.add("shop", Log(max_size=18, keep=1))
    os.write(pipe, b"1 line\n2 line\n3 li")
    counters = logs.settle("shop")
    assert counters.read == counters.written == 18
    os.write(pipe, b"ne\n")
    assert logs.settle("shop").error.startswith("rotation: ")
    assert (tmp_path / "shop.log").read_bytes() == b"1 line\n2 line\n3 line\n"
    assert sorted(os.listdir(tmp_path)) == ["shop.log", "shop.log.1"]
    (tmp_path / "shop.log.1" / "in the way").unlink()
    (tmp_path / "shop.log.1").rmdir()
    os.write(pipe, b"4 line\n")
    assert logs.settle("shop") == Counters(read=28, written=28, rotations=1)
    assert (tmp_path / "shop.log").read_bytes() == b"4 line\n"


# --- what becomes of a loss when a stream ends ------------------------------------------------------------------------

LOST = b"lost line\n" * 5 + b"partial"


def removed(logs: Capture, key: str) -> Counters:
    """The last counters of a stream."""
    last = logs.thread.remove(key)
    assert last.ended.wait(10)
    return last.counters()


@pytest.mark.parametrize("on_error", ["drop", "block"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_a_loss_of_a_stream_that_ends_is_told_by_another_one_of_its_file(
    tmp_path: Path, on_error: Literal["drop", "block"], timestamps: bool
) -> None:
    """A rolling reload on a disk that is full: the successor tells, when it can."""
    in_the_way = tmp_path / "folder"
    in_the_way.touch()
    logs = Capture(tmp_path)
    log = Log(on_error=on_error, timestamps=timestamps)
    pipe, path = logs.add("shop:1/out", log, "folder/shop.log"), in_the_way / "shop.log"
    successor = logs.add("shop:1/out~", log, "folder/shop.log")
    os.write(pipe, LOST)
    wait_until(lambda: logs.thread.counters("shop:1/out").error)
    os.write(pipe, b"more\n")
    assert removed(logs, "shop:1/out") == Counters(
        read=62, dropped=62, waits=int(on_error == "block"), waited=ANY, error=ANY
    )
    in_the_way.unlink()
    wait_until(lambda: path.exists() and b"procman: 62 bytes of output were dropped: " in path.read_bytes())
    why = b"its pipe was closed while its log could not be written: " if on_error == "block" else b""
    assert why + b"Not a directory (ENOTDIR)\n" in path.read_bytes()
    os.write(successor, b"goes on\n")
    assert logs.settle("shop:1/out~").written == 8
    assert logs.thread.counters("shop:1/out~").unreported == 0
    logs.close()


@pytest.mark.parametrize("on_error", ["drop", "block"])
def test_that_a_log_is_written_again_is_said_though_its_program_is_quiet(
    tmp_path: Path, on_error: Literal["drop", "block"]
) -> None:
    (tmp_path / "folder").touch()
    said: list[str] = []
    logs = Capture(tmp_path, on_said=said.append)
    os.write(logs.add("shop", Log(on_error=on_error), "folder/shop.log"), b"once\n")
    wait_until(lambda: said)
    (tmp_path / "folder").unlink()
    wait_until(lambda: len(said) > 1)
    assert said[1].startswith("the log of shop is written again (it was not: Not a directory (ENOTDIR)")
    assert logs.thread.counters("shop").error == ""
    logs.close()


def test_a_loss_that_no_log_tells_is_told_by_the_daemon(tmp_path: Path) -> None:
    """A program leaves the table, and its disk is full."""
    (tmp_path / "folder").touch()
    said: list[str] = []
    logs = Capture(tmp_path, on_said=said.append)
    logs.add("other", Log())
    os.write(logs.add("shop", Log(), "folder/shop.log"), LOST)
    wait_until(lambda: logs.thread.counters("shop").dropped)
    assert removed(logs, "shop") == Counters(read=57, dropped=57, error="Not a directory (ENOTDIR)")
    assert said[-1] == (
        "57 bytes of output of shop were dropped, and its log does not tell: Not a directory (ENOTDIR)"
    )
    logs.close()


def test_a_rotation_that_was_not_possible_is_done_though_the_program_is_quiet(tmp_path: Path) -> None:
    """And two streams of one file are no longer in trouble then."""
    said: list[str] = []
    logs = Capture(tmp_path, on_said=said.append)
    log = Log(max_size=18, keep=1, compress="none")
    (tmp_path / "shop.log.1").mkdir()
    pipe, other = logs.add("shop", log), logs.add("shop:2", log, "shop.log")
    os.write(pipe, b"1 line\n2 line\n3 line\n")
    logs.settle("shop")
    os.write(other, b"4 line\n")
    logs.settle("shop:2")
    wait_until(lambda: all(logs.thread.counters(key).error.startswith("rotation: ") for key in ("shop", "shop:2")))
    (tmp_path / "shop.log.1").rmdir()
    wait_until(lambda: not any(logs.thread.counters(key).error for key in ("shop", "shop:2")))
    assert all_output(tmp_path / "shop.log") == b"".join(b"%d line\n" % number for number in range(1, 5))
    assert (tmp_path / "shop.log").read_bytes() == b""
    wait_until(lambda: any("the log of shop is written again (it was not: rotation: " in text for text in said))
    wait_until(lambda: asleep(logs.thread))
    logs.close()


def test_a_rotation_by_the_clock_that_was_not_possible_is_done_though_the_program_is_quiet(tmp_path: Path) -> None:
    path = tmp_path / "shop.log"
    path.write_bytes(b"1 line\n")
    os.utime(path, (0, 0))
    (tmp_path / "shop.log.1").mkdir()
    logs = Capture(tmp_path)
    logs.add("shop", Log(rotate_every="hourly", keep=1, compress="none"))
    wait_until(lambda: logs.thread.counters("shop").error.startswith("rotation: "))
    (tmp_path / "shop.log.1").rmdir()
    wait_until(lambda: logs.thread.counters("shop").rotations == 1 and not logs.thread.counters("shop").error)
    assert (tmp_path / "shop.log.1").read_bytes() == b"1 line\n"
    logs.close()


def test_an_error_of_a_rotation_ends_with_the_rule_that_asked_for_it(tmp_path: Path) -> None:
    logs = Capture(tmp_path)
    (tmp_path / "shop.log.1").mkdir()
    os.write(logs.add("shop", Log(max_size=6, keep=1, compress="none")), b"1 line\n2 line\n")
    logs.settle("shop")
    wait_until(lambda: logs.thread.counters("shop").error)
    logs.thread.change("shop", Log(keep=1, compress="none"), str(tmp_path / "shop.log"))
    wait_until(lambda: not logs.thread.counters("shop").error)
    assert (tmp_path / "shop.log").read_bytes() == b"1 line\n2 line\n"
    logs.close()


# --- death at any instruction -----------------------------------------------------------------------------------------


class Death(BaseException):
    """Stands for SIGKILL where a thousand real deaths would take too long: nothing in procman.logs catches it."""


def dying_at(number: int, die: Callable[[], None]) -> Callable[[str], None]:
    """A watcher of crossings that dies at the n-th."""
    left = number

    def watch(_step: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            die()

    return watch


def raise_death() -> None:
    raise Death


@pytest.fixture
def crossings() -> Iterator[None]:
    yield
    crossing.watcher = None


def take_all(path: Path, log: Log, pipe: int) -> bool:
    """A life of a log thread, as far as files go: False when it died before it had taken all."""
    file = LogFile(str(path), log)
    try:
        while select.select([pipe], [], [], 0)[0]:
            file.prepare(time.monotonic())
            file.take(pipe)
        file.prepare(time.monotonic())
    except Death:
        return False
    finally:
        file.close()
    return True


@pytest.mark.usefixtures("crossings")
@pytest.mark.parametrize(("max_size", "keep"), [(50, 0), (50, 1), (50, 3), (50, 100), (64, 3)])
def test_two_deaths_at_each_pair_of_steps_lose_and_double_nothing(tmp_path: Path, max_size: int, keep: int) -> None:
    """Dies at the n-th step, for every n; the successor at its m-th, during the recovery; the third one finishes."""
    output, log = numbered(0, 12), Log(max_size=max_size, keep=keep)
    first, finished = 0, False
    while not finished:
        first += 1
        for second in (1, 2, 3, 5, 8):
            path = tmp_path / f"{first},{second}" / "log"
            read_fd, write_fd = make_pipe()
            os.write(write_fd, output)
            crossing.watcher = dying_at(first, raise_death)
            finished = take_all(path, log, read_fd)
            crossing.watcher = dying_at(second, raise_death)
            take_all(path, log, read_fd)
            crossing.watcher = dying_at(0, raise_death)
            assert take_all(path, log, read_fd)
            os.close(read_fd)
            os.close(write_fd)
            check_whole(path, output, keep)
    assert first > 10


@pytest.mark.usefixtures("crossings")
def test_a_real_death_at_each_step_of_a_rotation_loses_and_doubles_nothing(tmp_path: Path) -> None:
    output, log = numbered(0, 12), Log(max_size=64, keep=100)
    for step in range(1, 1000):
        path = tmp_path / str(step) / "log"
        read_fd, write_fd = make_pipe()
        os.write(write_fd, output)
        pid = os.fork()
        if not pid:  # nothing of pytest may run in the child
            crossing.watcher = dying_at(step, lambda: os._exit(7))
            os._exit(0 if take_all(path, log, read_fd) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 7)
        assert take_all(path, log, read_fd)
        os.close(read_fd)
        os.close(write_fd)
        check_whole(path, output, 100)
        if not status:
            assert step > 10
            break


def check_whole(path: Path, output: bytes, keep: int) -> None:
    """All of the output is there, but for whole files that `keep` has dropped; and nothing else."""
    found = all_output(path)
    assert output.endswith(found)
    files = [entry for entry in path.parent.iterdir() if entry != path]
    assert all(entry.suffix[1:].isdigit() and int(entry.suffix[1:]) <= keep for entry in files)
    assert all(entry.read_bytes().endswith(b"\n") for entry in files)
    assert found == output if keep == 100 else len(files) == keep


LOGGER = """
import sys, threading
from procman.config import Log
from procman.logs import LogThread, Stream
thread = LogThread()
thread.add(Stream("w", "w", Log(max_size=int(sys.argv[2]), keep=100000), sys.argv[1], int(sys.argv[3])))
thread.start()
print("up", flush=True)
threading.Event().wait()
"""

WRITER = """
import os, sys
for block in range(int(sys.argv[1])):
    os.write(1, b"".join(b"%d %s\\n" % (n, b"x" * (n % 97)) for n in range(block * 100, block * 100 + 100)))
"""


def test_a_SIGKILL_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, blocks = tmp_path / "log", 1500
    read_fd, write_fd = make_pipe()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(blocks)], stdout=write_fd)
    kills = 0
    try:
        while writer.poll() is None or kills < 5:
            logger = [sys.executable, "-S", "-c", LOGGER, str(path), "200000", str(read_fd)]
            environment = {"PYTHONPATH": str(PROJECT)}
            with subprocess.Popen(logger, pass_fds=[read_fd], stdout=subprocess.PIPE, env=environment) as child:
                assert child.stdout
                assert child.stdout.readline() == b"up\n"
                wait = 0.003 * (1 + kills % 7)
                time.sleep(wait)  # a random moment is the point
                child.send_signal(signal.SIGKILL)
            kills += 1
        assert writer.wait() == 0
        thread = LogThread()
        thread.add(Stream("w", "w", Log(max_size=200000, keep=100000), str(path), os.dup(read_fd)))
        thread.remove("w")
        assert thread.stop()
    finally:
        writer.kill()
        writer.wait()
        os.close(read_fd)
        os.close(write_fd)
    output = b"".join(b"%d %s\n" % (n, b"x" * (n % 97)) for n in range(blocks * 100))
    assert all_output(path) == output
    assert all(entry.read_bytes().endswith(b"\n") for entry in tmp_path.iterdir() if entry != path)


# --- taps and news ----------------------------------------------------------------------------------------------------


def test_a_tap_gets_every_byte_also_when_they_can_not_be_written(logs: Capture) -> None:
    (logs.folder / "bad.log").mkdir()
    for key in ("good", "bad"):
        heard: list[bytes] = []
        pipe = logs.add(key, Log(max_size=10))
        os.write(pipe, b"before\n")
        logs.settle(key)
        logs.thread.tap(key, heard.append)
        os.write(pipe, b"1234567\n")
        os.write(pipe, b"8\n")
        logs.settle(key)
        logs.thread.tap(key, None)
        os.write(pipe, b"after\n")
        logs.settle(key)
        assert b"".join(heard) == b"1234567\n8\n"


def test_a_tap_that_raises_is_removed_and_the_log_goes_on(logs: Capture) -> None:
    calls: list[bytes] = []

    def callback(chunk: bytes) -> None:
        calls.append(chunk)
        raise ValueError("a mistake")

    pipe = logs.add("shop", Log())
    logs.thread.tap("shop", callback)
    for line in (b"one\n", b"two\n"):
        os.write(pipe, line)
        counters = logs.settle("shop")
    assert (calls, counters.written) == ([b"one\n"], 8)
    assert logs.thread.trouble == "ValueError: a mistake"
    logs.thread.trouble = ""


def test_news_come_once_for_each_watch(tmp_path: Path) -> None:
    news: list[str] = []
    logs = Capture(tmp_path, on_news=news.append)
    pipe, path = logs.add("shop", Log()), str(tmp_path / "shop.log")
    for wanted in (0, 1, 1, 2):
        if len(news) < wanted:
            logs.thread.watch(path)
        os.write(pipe, b"x\n")
        logs.settle("shop")
        assert news == [path] * wanted
    logs.close()


# --- inherit ----------------------------------------------------------------------------------------------------------

INHERIT = Log(mode="inherit")


def debtor(logs: Capture) -> object:
    """Whose lines the stdout has not taken yet."""
    return next((channel.debtor for channel in logs.thread._places if channel.debtor), None)


def retry_at(logs: Capture) -> float:
    """When the stdout is tried again."""
    return max(channel.retry_at for channel in logs.thread._places)


def test_programs_share_the_stdout_line_by_line(tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "wb") as stdout:
        logs = Capture(tmp_path, stdout.fileno())
        one, two = logs.add("one", INHERIT), logs.add("two:1", INHERIT)
        os.write(one, b"a\nhalf")
        logs.settle("two:1")
        wait_until(lambda: logs.thread.counters("one") == Counters(read=6, written=2, held=4))
        os.write(two, b"b\n")
        assert logs.settle("two:1") == Counters(read=2, written=2)
        assert logs.settle("one") == Counters(read=6, written=6)
        logs.close()
    assert (tmp_path / "stdout").read_bytes() == b"one | a\ntwo:1 | b\none | half\n"


def test_reopen_goes_on_with_another_stdout(tmp_path: Path) -> None:
    """The daemon's own log was rotated: its descriptor 1 is another file now, or a pipe."""
    before = sorted(os.listdir("/proc/self/fd"))
    with (tmp_path / "old").open("wb") as old, (tmp_path / "new").open("wb") as new:
        logs = Capture(tmp_path, old.fileno())
        pipe = logs.add("shop", INHERIT)
        os.write(pipe, b"one\ntwo")
        logs.settle("shop")
        logs.thread.reopen(new.fileno())
        os.write(pipe, b"three\n")
        assert logs.settle("shop").dropped == 0
        logs.close()
    assert (tmp_path / "old").read_bytes() == b"shop | one\nshop | two\n"
    assert (tmp_path / "new").read_bytes() == b"shop | three\n"
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_reopen_frees_those_who_wait_for_a_stuck_stdout(tmp_path: Path) -> None:
    reader, stdout = os.pipe()
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)
    logs = Capture(tmp_path, stdout)
    pipe, output = logs.add("loud", INHERIT), b"x" * 99 + b"\n"
    os.write(pipe, output * 100)
    wait_until(lambda: logs.thread.counters("loud").read)
    with (tmp_path / "new").open("wb") as new:
        logs.thread.reopen(new.fileno())
        counters = logs.settle("loud")
        assert (counters.written, counters.dropped) == (10000, 0)
        logs.close()
    assert (os.read(reader, 1 << 16) + (tmp_path / "new").read_bytes()) == (b"loud | " + output) * 100
    os.close(reader)
    os.close(stdout)


def test_change_from_stdout_to_a_file(tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "wb") as stdout:
        logs = Capture(tmp_path, stdout.fileno())
        pipe = logs.add("shop", INHERIT)
        os.write(pipe, b"a\nhalf")
        wait_until(lambda: logs.thread.counters("shop").held == 4)
        logs.thread.change("shop", Log(), str(tmp_path / "shop.log"))
        os.write(pipe, b"b\n")
        wait_until(lambda: logs.thread.counters("shop") == Counters(read=8, written=8))
        logs.close()
    assert (tmp_path / "stdout").read_bytes() == b"shop | a\n"
    assert (tmp_path / "shop.log").read_bytes() == b"halfb\n"


RAW, TIMED, JSON = Log(), Log(timestamps=True), Log(format="json")


def reached(logs: Capture) -> None:
    """Waits until what was asked of the thread is done."""
    done = threading.Event()
    logs.thread.reopen(done=done.set)
    assert done.wait(10)


@pytest.mark.parametrize("after", [RAW, TIMED, JSON], ids=["raw", "timestamps", "json"])
@pytest.mark.parametrize("before", [RAW, TIMED, JSON], ids=["raw", "timestamps", "json"])
@pytest.mark.parametrize("same", [True, False], ids=["one file", "another file"])
def test_a_change_in_the_middle_of_a_line_tears_none(
    logs: Capture, monkeypatch: pytest.MonkeyPatch, before: Log, after: Log, same: bool
) -> None:
    """`apply` meets a program that prints in blocks, which end anywhere; and then the old rules come back."""
    monkeypatch.setattr("procman.logs.capture.PATIENCE_SECONDS", 10.0)
    pipe, paths = logs.add("shop", before), ["shop.log", "shop.log" if same else "other.log"]
    lines = [b"%06d %s\n" % (number, b"x" * (number % 90)) for number in range(2000)]
    output, flow, turn = memoryview(b"".join(lines)), logs.thread._flows["shop"], 0
    while output:
        size = min(len(output), 1000 + 37 * turn)
        turn += 1
        if turn % 3 == 1:
            size = output.tobytes().index(b"\n", size - 1) + 1
        os.write(pipe, output[:size])
        if turn % 3 == 1:
            reached(logs)
            wait_until(lambda: not bytes_waiting(flow.fd))
        if turn % 3 == 0:  # the other half comes a moment after
            log, path = ((before, paths[0]), (after, paths[1]))[turn // 3 % 2]
            logs.thread.change("shop", log, str(logs.folder / path))
        output = output[size:]
    assert logs.settle("shop").written == len(b"".join(lines))
    found = b"".join((logs.folder / path).read_bytes() for path in set(paths))
    numbers = re.findall(rb"(?m)(?:^|^[-0-9T:.]+Z |: \")(\d{6}) (x*)(?:\"}$|$)", found)
    assert sorted(b"%b %b\n" % number for number in numbers) == lines
    assert found.count(b"\n") == len(lines)


def test_a_line_without_an_end_is_ended_where_it_is_and_glued_to_nothing(logs: Capture) -> None:
    """The raw half of it is on the disk, and the rest may never come. Then the path comes back."""
    pipe, paths = logs.add("shop", RAW), [str(logs.folder / name) for name in ("shop.log", "other.log")]
    for turn in range(4):
        os.write(pipe, b"%d one\n%d half " % (turn, turn))
        wait_until(lambda: not bytes_waiting(logs.thread._flows["shop"].fd))
        logs.thread.change("shop", RAW, paths[(turn + 1) % 2])
        reached(logs)
    assert (logs.folder / "shop.log").read_bytes() == b"0 one\n0 half \n2 one\n2 half \n"
    assert (logs.folder / "other.log").read_bytes() == b"1 one\n1 half \n3 one\n3 half \n"


def test_a_file_that_ends_in_a_line_is_not_glued_to_what_comes_from_elsewhere(logs: Capture) -> None:
    pipe, other = logs.add("shop", RAW), logs.folder / "other.log"
    os.write(pipe, b"one\n")
    logs.settle("shop")
    other.write_bytes(b"torn")
    logs.thread.change("shop", RAW, str(other))
    reached(logs)
    os.write(pipe, b"two\nha")
    wait_until(lambda: logs.thread.counters("shop").written == 10)
    logs.thread.change("shop", Log(keep=3), str(other))  # other rules, and no other file
    os.write(pipe, b"lf\n")
    logs.settle("shop")
    assert other.read_bytes() == b"torn\ntwo\nhalf\n"


def test_a_change_makes_no_file_of_a_program_that_has_printed_nothing(logs: Capture) -> None:
    logs.add("shop", RAW)
    logs.thread.change("shop", TIMED, str(logs.folder / "other.log"))
    logs.settle("shop")
    assert not list(logs.folder.iterdir())


def _pipe() -> tuple[int, int]:
    return os.pipe()


def _socket() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("make", [_pipe, _socket])
def test_a_stdout_that_nobody_reads_drops_after_a_second_and_recovers(
    tmp_path: Path, make: Callable[[], tuple[int, int]]
) -> None:
    """And its O_NONBLOCK flag, which others share, is not touched; nor does a file of another program wait."""
    reader, stdout = make()
    logs = Capture(tmp_path, stdout)
    printing, filing = logs.add("loud", INHERIT), logs.add("calm", Log())
    with full_speed(printing):
        wait_until(lambda: debtor(logs))
        os.write(filing, b"not stuck\n")
        assert logs.settle("calm").written == 10
        assert logs.thread.counters("loud").dropped == 0
        wait_until(lambda: logs.thread.counters("loud").dropped > 1 << 20)
    assert os.get_blocking(stdout)
    assert logs.thread.counters("loud").error == "the daemon's stdout takes nothing"
    printed = drain(reader)
    wait_until(lambda: time.monotonic() > retry_at(logs))
    os.write(printing, b"again\n")
    printed += wait_for_bytes(reader, b"again\n")
    counters = logs.settle("loud")
    assert counters.read == counters.written + counters.dropped
    told = [line for line in printed.splitlines() if b"procman:" in line]
    assert told[-1].startswith(b"loud | procman: ")
    assert sum(int(line.split()[3]) for line in told) == counters.dropped
    whole = [line for line in printed.splitlines() if line in (b"loud | " + b"x" * 99, b"loud | again")]
    assert sum(len(line) - 6 for line in whole) == counters.written, "a line that is cut counts as dropped"
    logs.close()
    os.close(reader)
    os.close(stdout)


@pytest.mark.parametrize("make", [_pipe, _socket])
def test_a_stdout_is_printed_to_again_as_soon_as_somebody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[int, int]]
) -> None:
    """A program at full speed loses gigabytes in a second: a reader that paused is found at the next turn."""
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(channel, "RETRY_SECONDS", 3600.0)
    reader, stdout = make()
    logs = Capture(tmp_path, stdout)
    pipe = logs.add("loud", INHERIT)
    for turn in range(2):
        with full_speed(pipe):
            dropped = logs.thread.counters("loud").dropped
            wait_until(lambda: logs.thread.counters("loud").dropped > dropped + (1 << 20))  # noqa: B023
        logs.settle("loud")
        printed = drain(reader)
        before = logs.thread.counters("loud")
        os.write(pipe, b"again %d\n" % turn)
        printed += wait_for_bytes(reader, b"again %d\n" % turn)
        after = logs.settle("loud")
        assert (after.dropped, after.unreported, after.error) == (before.dropped, 0, "")
    logs.close()
    os.close(reader)
    os.close(stdout)


def test_who_was_given_up_is_not_waited_for_again_before_it_takes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.2)
    reader, stdout = os.pipe()
    logs = Capture(tmp_path, stdout)
    pipe = logs.add("loud", INHERIT)
    with full_speed(pipe):
        wait_until(lambda: logs.thread.counters("loud").dropped)
        monkeypatch.setattr(channel, "STALL_SECONDS", 3600.0)
        wait_until(lambda: logs.thread.counters("loud").dropped > 1 << 24)
        assert debtor(logs) is None
    drain(reader)
    os.write(pipe, b"again\n")
    wait_for_bytes(reader, b"again\n")
    with full_speed(pipe):
        wait_until(lambda: debtor(logs) is not None)  # it lives again, and is waited for
    logs.thread.reopen(os.open(os.devnull, os.O_WRONLY))
    logs.close()
    os.close(reader)
    os.close(stdout)


def test_a_socket_that_has_room_and_takes_nothing_keeps_nobody_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOBUFS: the kernel has no memory for it, and epoll says all the same that there is room."""
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.3)
    tries = 0

    def deliver(_self: Datagrams, _sock: socket.socket, _data: bytes) -> int:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(Datagrams, "_deliver", deliver)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
        reader.bind(("127.0.0.1", 0))
        logs = Capture(tmp_path)
        log = Log(mode="syslog", address=f"udp:127.0.0.1:{reader.getsockname()[1]}")
        os.write(logs.add("shop", log), b"hello\n")
        wait_until(lambda: logs.thread.counters("shop").dropped)
    logs.close()
    assert 2 <= tries < 50


def test_syslog_over_a_stream_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """unix-stream of syslog-ng: its reader is slow, so messages go out in parts; then it is started anew."""
    monkeypatch.setattr(channel, "STALL_SECONDS", 3600.0)
    path, lines = tmp_path / "log.sock", [b"%d %s" % (number, b"x" * 3000) for number in range(400)]
    lines[7] = b"7 with a NUL\0<0>and no message of its own"

    def listen() -> socket.socket:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        return listener

    with listen() as listener:
        logs = Capture(tmp_path)
        pipe = logs.add("shop", Log(mode="syslog", address=f"unix:{path}"))
        printing = threading.Thread(target=lambda: os.writev(pipe, [b"\n".join(lines) + b"\n"]))
        printing.start()
        connection, _ = listener.accept()
        wait_until(lambda: debtor(logs) is not None)
        found = b""
        while found.count(b"\0") < len(lines):
            assert select.select([connection], [], [], 10)[0]
            found += connection.recv(1000)
        printing.join(10)
    connection.close()
    lines[7] = lines[7].replace(b"\0", b" ")
    assert [message.partition(b" stdout - ")[2] for message in found.split(b"\0")[:-1]] == lines
    with listen() as listener:
        os.write(pipe, b"and again\n")
        connection, _ = listener.accept()
        with connection:
            assert wait_for_bytes(connection.fileno(), b"\0").endswith(b" stdout - and again\0")
        assert logs.settle("shop").dropped == 0
        logs.close()


def drain(fd: int) -> bytes:
    """All that can be read now."""
    found = b""
    while select.select([fd], [], [], 0.05)[0]:
        found += os.read(fd, 1 << 20)
    return found


def wait_for_bytes(fd: int, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        assert select.select([fd], [], [], 10)[0]
        found += os.read(fd, 1 << 20)
    return found


def test_a_stdout_whose_reader_is_slow_slows_the_program_and_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as anything moves it counts as alive, however long it takes for one chunk."""
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.5)
    reader, stdout = os.pipe()
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)
    logs = Capture(tmp_path, stdout)
    pipe = logs.add("loud", INHERIT)
    with subprocess.Popen([sys.executable, "-c", WRITER, "20"], stdout=pipe) as writer:
        printed, began = b"", time.monotonic()
        while not printed.endswith(b"\nloud | 1999 " + b"x" * (1999 % 97) + b"\n"):
            assert select.select([reader], [], [], 10)[0]
            printed += os.read(reader, 1024)
            time.sleep(0.01)  # this is the slow reader
        assert time.monotonic() - began > 0.8
        assert writer.wait() == 0
    assert printed.splitlines() == [b"loud | %d %s" % (n, b"x" * (n % 97)) for n in range(2000)]
    assert logs.settle("loud").dropped == 0
    logs.close()
    os.close(reader)
    os.close(stdout)


def reading_slowly(fd: int, chunks: list[bytes]) -> threading.Thread:
    """Somebody who reads 1 MB a second, until the end."""

    def read() -> None:
        while data := os.read(fd, 8192):
            chunks.append(data)
            time.sleep(0.008)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("spooled", [0, 1], ids=["in the pipe", "taken"])
def test_what_waits_for_a_slow_stdout_is_written_before_its_pipe_is_closed(tmp_path: Path, spooled: int) -> None:
    """A place that retires, or a program that leaves, has 200 KB in its pipe."""
    reader, stdout = os.pipe()
    logs = Capture(tmp_path, stdout)
    chunks: list[bytes] = []
    other, pipe = logs.add("other", INHERIT), logs.add("leaves", INHERIT)
    if not spooled:
        os.write(other, b"y" * 99 + b"\n" + (b"y" * 99 + b"\n") * 1000)  # stdout is busy with it
        wait_until(lambda: debtor(logs) is not None)
    lines = b"".join(b"%06d %s\n" % (number, b"x" * 92) for number in range(2000))
    os.write(pipe, lines + b"and the end")
    slow = reading_slowly(reader, chunks)
    logs.settle("leaves")
    assert logs.thread.counters("leaves") == Counters(read=len(lines) + 11, written=len(lines) + 11)
    os.write(pipe, lines)
    closed = threading.Event()
    flow = logs.thread._flows["leaves"]
    logs.thread.remove("leaves", closed.set)
    assert closed.wait(20)
    assert flow.counters() == Counters(read=2 * len(lines) + 11, written=2 * len(lines) + 11)
    logs.close()
    os.close(stdout)
    slow.join(20)
    found = [line for line in b"".join(chunks).splitlines(keepends=True) if line.startswith(b"leaves | ")]
    assert b"".join(found).replace(b"leaves | ", b"") == lines + b"and the end\n" + lines
    os.close(reader)


def test_a_pipe_is_closed_though_nobody_reads_the_stdout_and_the_loss_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "STALL_SECONDS", 0.2)
    reader, stdout = os.pipe()
    logs = Capture(tmp_path, stdout)
    pipe = logs.add("leaves", INHERIT)
    os.write(pipe, numbered(0, 5000) + b"and the end")
    closed, flow = threading.Event(), logs.thread._flows["leaves"]
    logs.thread.remove("leaves", closed.set)
    assert closed.wait(10)
    counters = flow.counters()
    assert counters.read == len(numbered(0, 5000)) + 11 == counters.written + counters.dropped
    assert counters.dropped
    logs.close()
    os.close(stdout)
    os.close(reader)


def words_of_two_children(logs: Capture) -> tuple[int, threading.Event]:
    """Of "dies", with no newline, while stdout is busy with others; its pipe, and what is set when they are written."""
    other, pipe = logs.add("other", INHERIT), logs.add("dies", INHERIT)
    os.write(pipe, b"taken ")
    wait_until(lambda: logs.thread.counters("dies").held == 6)
    os.write(other, b"y" * 100_000 + b"\n" + b"y" * 100_000 + b"\n")
    wait_until(lambda: debtor(logs) is not None)
    done = threading.Event()
    for words in (b"dying words", b"second child"):
        os.write(pipe, words)
        logs.thread.flush("dies", done.set)
        reached = threading.Event()
        logs.thread.reopen(done=reached.set)
        assert reached.wait(10)
    assert not done.is_set()
    return pipe, done


@pytest.mark.parametrize("rests", [False, True], ids=["goes on", "puts its work down"])
def test_the_last_words_of_a_child_are_no_part_of_the_first_line_of_the_next(tmp_path: Path, rests: bool) -> None:
    """Also while stdout is busy with others, and what waits in the pipe is of both; and when an upgrade begins."""
    reader, stdout = os.pipe()
    logs = Capture(tmp_path, stdout)
    pipe, done = words_of_two_children(logs)
    chunks: list[bytes] = []
    if rests:
        slow, resting = reading_slowly(reader, chunks), threading.Event()
        logs.thread.pause(resting.set)
        assert resting.wait(20)
        assert done.is_set()
        logs.thread.go_on()
    os.write(pipe, b"third child\n")
    if not rests:
        slow = reading_slowly(reader, chunks)
    wait_until(lambda: logs.thread.counters("dies").written == 41)
    logs.close()
    os.close(stdout)
    slow.join(20)
    found = [line for line in b"".join(chunks).splitlines() if line.startswith(b"dies | ")]
    assert found == [b"dies | taken dying words", b"dies | second child", b"dies | third child"]
    os.close(reader)


def test_last_words_that_wait_go_to_another_thread_as_lines_of_their_own(tmp_path: Path) -> None:
    """`apply` sends the output to another disk meanwhile."""
    reader, stdout = os.pipe()
    logs = Capture(tmp_path, stdout)
    pipe, done = words_of_two_children(logs)
    heir = LogThread()
    heir.start()
    logs.thread.hand_over("dies", heir, Log(timestamps=True), str(tmp_path / "dies.log"))
    assert done.wait(10)
    os.write(pipe, b"third child\n")
    wait_until(lambda: heir.counters("dies").written == 41)
    lines = (tmp_path / "dies.log").read_bytes().splitlines()
    assert [line.partition(b" ")[2] for line in lines] == [b"taken dying words", b"second child", b"third child"]
    heir.stop()
    slow = reading_slowly(reader, [])
    logs.close()
    os.close(stdout)
    slow.join(20)
    os.close(reader)


def test_a_long_turn_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take seconds for what the reader takes at once: that is no time in which nothing moved."""
    clock = time.monotonic()
    monkeypatch.setattr("procman.logs.channel.time.monotonic", lambda: clock)

    class Slow(Outlet):
        def push(self, settled: Callable[[int, int], None]) -> None:
            nonlocal clock
            clock += 5 * channel.STALL_SECONDS
            settled(1, 0)

    read_fd, write_fd = os.pipe()
    slow = Slow(write_fd)
    with select.epoll() as epoll:
        printing = channel.Channel("it", slow, epoll, lambda: None)
        flow = Flow(Stream("shop", "shop", INHERIT, "", read_fd), Counters(), -1)
        printing.print(flow, [Piece(b"ab", b"ab")], clock)
        assert printing.debtor is flow
        assert not printing.stalled(clock)
        clock += channel.STALL_SECONDS
        assert printing.stalled(clock)
    slow.close()
    os.close(read_fd)
    os.close(write_fd)


def test_a_stdout_that_is_gone_drops_and_nothing_spins(tmp_path: Path) -> None:
    reader, stdout = os.pipe()
    os.close(reader)
    logs = Capture(tmp_path, stdout)
    pipe = logs.add("shop", INHERIT)
    os.write(pipe, b"lost\n")
    expected = Counters(read=5, dropped=5, unreported=5, error="Broken pipe (EPIPE)")
    assert logs.settle("shop") == expected
    assert asleep(logs.thread)
    # It is tried again each second, so nobody can say whether an unfinished line is held in between.
    os.write(pipe, b"a\nhalf")
    wait_until(lambda: logs.thread.counters("shop").read == 11)
    os.write(pipe, b"b\n")
    wait_until(lambda: logs.thread.counters("shop") == Counters(13, 0, 13, 0, 13, error="Broken pipe (EPIPE)"))
    logs.close()
    os.close(stdout)


def test_a_full_disk_behind_the_stdout_drops(tmp_path: Path, no_large_files: Callable[[int], None]) -> None:
    before = b"y" * (64 * 1024 - 1) + b"\n"  # the limit is that of the spool, too
    with open(tmp_path / "stdout", "wb", buffering=0) as stdout:
        stdout.write(before)
        logs = Capture(tmp_path, stdout.fileno())
        pipe = logs.add("shop", INHERIT)
        no_large_files(len(before) + 21)
        os.write(pipe, b"1\n123456789\n")
        counters = logs.settle("shop")
        assert counters == Counters(read=12, written=2, dropped=10, unreported=10, error="File too large (EFBIG)")
        no_large_files(-1)
        wait_until(lambda: time.monotonic() > retry_at(logs))
        os.write(pipe, b"on\n")
        assert logs.settle("shop") == Counters(read=15, written=5, dropped=10)
        logs.close()
    told = "shop | procman: 10 bytes of output were dropped: File too large (EFBIG)"
    expected = f"shop | 1\nshop | 12345\n{told}\nshop | on\n"
    assert (tmp_path / "stdout").read_text().removeprefix(before.decode()) == expected


# --- the thread itself ------------------------------------------------------------------------------------------------


def test_stop_leaves_what_is_in_the_pipe_to_a_successor(tmp_path: Path) -> None:
    read_fd, write_fd = make_pipe()
    for turn in range(3):
        logs = LogThread()
        logs.start()
        logs.add(Stream("shop", "shop", Log(), str(tmp_path / "log"), os.dup(read_fd)))
        os.write(write_fd, b"%d\n" % turn)
        assert logs.stop()
        assert logs.stop()
        os.write(write_fd, b"%d and a half\n" % turn)
    logs = LogThread()
    logs.add(Stream("shop", "shop", Log(), str(tmp_path / "log"), read_fd))
    logs.remove("shop")
    assert logs.stop()
    os.close(write_fd)
    expected = b"".join(b"%d\n%d and a half\n" % (turn, turn) for turn in range(3))
    assert (tmp_path / "log").read_bytes() == expected


def test_a_mistake_inside_the_thread_does_not_end_it(logs: Capture) -> None:
    logs.thread._submit(lambda: os.close(-1))
    pipe = logs.add("shop", Log())
    os.write(pipe, b"hello\n")
    assert logs.settle("shop").written == 6
    assert logs.thread.trouble == "OSError: [Errno 9] Bad file descriptor"
    logs.thread.trouble = ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device (ENOSPC)"),
        (OSError(errno.EINVAL, "not a regular file"), "not a regular file (EINVAL)"),
        (OSError("odd"), "odd"),
    ],
)
def test_errors_are_told_as_people_know_them(error: OSError, text: str) -> None:
    assert logfile.describe(error) == text


def test_the_end_of_what_no_file_keeps_is_remembered(tmp_path: Path) -> None:
    """Also when nobody reads it, and it is dropped."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    os.set_blocking(read_end, False)
    thread = LogThread(stdout_fd=write_end)
    read_fd, write_fd = make_pipe()
    thread.add(Stream("a", "a", Log(mode="inherit"), "", read_fd))
    thread.start()
    os.write(write_fd, b"first\n")
    wait_until(lambda: thread.recent("a") == b"first\n")
    for number in range(3000):
        os.write(write_fd, b"line %06d\n" % number)
    wait_until(lambda: thread.recent("a").endswith(b"line 002999\n"))
    assert len(thread.recent("a")) == 16384
    thread.change("a", Log(), str(tmp_path / "a.log"))
    wait_until(lambda: thread.recent("a") == b"")
    os.write(write_fd, b"to the file\n")
    wait_until(lambda: (tmp_path / "a.log").exists() and "to the file" in (tmp_path / "a.log").read_text())
    assert thread.recent("a") == b""
    thread.stop()
    for fd in (read_end, write_end, write_fd):
        os.close(fd)


# --- one thread for each disk ---------------------------------------------------------------------------------------


def first_folder(path: str) -> str:
    """What stands for the disk of a path here."""
    return Path(path).parent.name


def waiting_for(event: threading.Event) -> Callable[[bytes], None]:
    """A tap that holds up its thread until then."""

    def wait(_chunk: bytes) -> None:
        event.wait(60)

    return wait


def settled(threads: LogThreads, key: str) -> Counters:
    """The counts of a stream when all that was written to it is dealt with."""
    done = threading.Event()
    threads.flush(key, done.set)
    assert done.wait(20)
    return threads.counters(key)


def test_who_waits_for_a_disk_holds_up_no_other(tmp_path: Path) -> None:
    """The tap stands for a write(2) that hangs: it is called in the thread of the stream's disk."""
    threads = LogThreads(lambda path: None, -1, first_folder)
    pipes = {}
    for key, folder in (("a", "dead"), ("b", "dead"), ("c", "good")):
        read_fd, pipes[key] = make_pipe()
        threads.add(Stream(key, key, Log(), str(tmp_path / folder / f"{key}.log"), read_fd))
    back = threading.Event()
    threads.tap("a", waiting_for(back))
    threads.start()
    os.write(pipes["a"], b"a\n")
    wait_until(lambda: threads.stuck(0.01), what="it is known that a disk hangs")
    assert threads.stuck(0.01) == [str(tmp_path / "dead/a.log")]
    os.write(pipes["b"], b"b\n")
    os.write(pipes["c"], b"c\n")
    assert settled(threads, "c").written == 2
    assert threads.counters("b").read == 0
    back.set()
    assert settled(threads, "b").written == 2
    assert threads.stuck(0.0) == []
    close_all(threads, pipes)


def test_a_stream_more_asks_for_no_disk_but_its_own(tmp_path: Path) -> None:
    """A start of thousands of programs would take the square of it."""
    asked: list[str] = []

    def disk_of(path: str) -> str:
        asked.append(path)
        return first_folder(path)

    threads, pipes = LogThreads(lambda path: None, -1, disk_of), {}
    paths = [str(tmp_path / "good" / f"{number}.log") for number in range(50)]
    threads.govern(Rules(logs=tuple(Kept("p", path, Log()) for path in paths)))
    for path in paths:
        read_fd, pipes[path] = make_pipe()
        threads.add(Stream(path, path, Log(), path, read_fd))
    assert len(asked) <= 3 * len(paths)
    close_all(threads, pipes)


def test_the_room_of_a_disk_is_asked_by_its_own_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log_min_free: the disk of log_dir hangs, and holds up no log on another one; nor has that one anything to say."""
    log_dir = tmp_path / "dead" / "logs"  # on the disk "dead", see `first_folder`
    log_dir.mkdir(parents=True)
    log, said, asked, back, real = Log(compress="none"), list[str](), threading.Event(), threading.Event(), os.statvfs
    (tmp_path / "dead/a.log.1").write_bytes(b"x" * 9000)

    def hang(path: str) -> os.statvfs_result:
        if str(path) == str(log_dir):
            asked.set()
            back.wait(60)
        return real(path)

    monkeypatch.setattr(os, "statvfs", hang)
    threads = LogThreads(lambda path: None, -1, first_folder, on_said=said.append)
    pipes, kept = {}, []
    for key, folder in (("a", "dead"), ("b", "good")):
        read_fd, pipes[key] = make_pipe()
        path = str(tmp_path / folder / f"{key}.log")
        threads.add(Stream(key, key, log, path, read_fd))
        kept.append(Kept(key, path, log))
    threads.govern(Rules(str(log_dir), Room(share=0.9999), tuple(kept)))
    threads.start()
    for _ in range(2):
        os.write(pipes["b"], b"b\n")
        settled(threads, "b")
    assert threads.counters("b").written == 4
    assert (asked.is_set(), said) == (False, [])
    os.write(pipes["a"], b"a\n")
    assert asked.wait(20)
    os.write(pipes["b"], b"b\n")
    assert settled(threads, "b").written == 6
    back.set()
    wait_until(lambda: not (tmp_path / "dead/a.log.1").exists())
    close_all(threads, pipes)


def close_all(threads: LogThreads, pipes: dict[str, int]) -> None:
    for fd in pipes.values():
        os.close(fd)
    assert threads.stop()


def test_a_log_that_moves_to_another_disk_loses_nothing(tmp_path: Path) -> None:
    """Back and forth, while its program prints: each line is there once, in order, and the counts go on."""
    threads = LogThreads(lambda path: None, -1, first_folder)
    read_fd, write_fd = make_pipe()
    threads.add(Stream("a", "a", Log(), str(tmp_path / "one/a.log"), read_fd))
    threads.start()
    text = [b"%08d\n" % number for number in range(20_000)]
    turn = threading.Semaphore(0)

    def write() -> None:
        for number, line in enumerate(text):
            if number % 500 == 0:
                turn.acquire()
            os.write(write_fd, line)

    def read(count: int) -> bool:
        return threads.counters("a").read >= count

    writer = threading.Thread(target=write)
    writer.start()
    for number, place in enumerate(("two", "one") * 10, 1):
        turn.release()  # it prints while it moves, and then to where it has moved
        threads.change("a", Log(), str(tmp_path / place / "a.log"))
        wait_until(functools.partial(read, (2 * number - 1) * 4500))
        turn.release()
        wait_until(functools.partial(read, 2 * number * 4500))
    writer.join(20)
    found = wait_until(lambda: (done := settled(threads, "a")).read == 180_000 and done)
    assert found == Counters(read=180_000, written=180_000)
    parts = [(tmp_path / place / "a.log").read_bytes().splitlines(keepends=True) for place in ("one", "two")]
    assert all(part == sorted(part) for part in parts)
    assert sorted(parts[0] + parts[1]) == text
    close_all(threads, {"a": write_fd})


def test_what_is_asked_for_a_log_on_its_way_to_another_disk_waits_until_it_is_there(tmp_path: Path) -> None:
    threads = LogThreads(lambda path: None, -1, first_folder)
    read_fd, write_fd = make_pipe()
    threads.add(Stream("a", "a", Log(), str(tmp_path / "one/a.log"), read_fd))
    threads.start()
    back = threading.Event()
    threads.tap("a", waiting_for(back))
    os.write(write_fd, b"first\n")
    wait_until(lambda: threads.stuck(0.0))
    for place in ("two/a.log", "two/b.log", "three/a.log", "one/b.log"):
        threads.change("a", Log(), str(tmp_path / place))
    os.write(write_fd, b"last\n")
    back.set()
    assert settled(threads, "a") == Counters(read=11, written=11)
    assert not threads.trouble
    assert (tmp_path / "one/b.log").read_text() == "last\n"
    close_all(threads, {"a": write_fd})


def test_a_stream_that_is_removed_on_its_way_to_another_disk_is_closed(tmp_path: Path) -> None:
    threads = LogThreads(lambda path: None, -1, first_folder)
    read_fd, write_fd = os.pipe()  # not make_pipe(): the write end of that one can be read as well
    threads.add(Stream("a", "a", Log(), str(tmp_path / "one/a.log"), read_fd))
    threads.start()
    back = threading.Event()
    threads.tap("a", waiting_for(back))
    os.write(write_fd, b"first\n")
    wait_until(lambda: threads.stuck(0.0))
    threads.change("a", Log(), str(tmp_path / "two/a.log"))
    threads.remove("a")
    os.write(write_fd, b"last\n")
    back.set()
    poll = select.poll()
    poll.register(write_fd, 0)
    assert poll.poll(20_000) == [(write_fd, select.POLLERR)]  # nobody has the read end any more
    assert (tmp_path / "two/a.log").read_text() == "last\n"
    close_all(threads, {"a": write_fd})


def test_more_disks_than_threads(tmp_path: Path) -> None:
    threads = LogThreads(lambda path: None, -1, first_folder)
    threads.start()
    pipes = {}
    for number in range(40):
        key = f"p{number}"
        read_fd, pipes[key] = make_pipe()
        threads.add(Stream(key, key, Log(), str(tmp_path / f"disk{number}" / "log"), read_fd))
        os.write(pipes[key], b"x\n")
    assert sum(settled(threads, key).written for key in pipes) == 80
    assert sum(thread.name == "logs" for thread in threading.enumerate()) <= 17
    close_all(threads, pipes)

"""procman.logs, output that is read by lines: whoever dies on the way, and however, no line is lost, and none doubled
but by what is documented."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import crossing
from procman.config import Log
from procman.logs import Counters, LogThread, Stream, make_pipe, make_spool
from procman.logs.lines import stamp
from procman.logs.logfile import LogFile
from procman.logs.spool import ANEW, GIVE_BACK, HEADER, SPOOL_MAX, Spool
from tests.harness import PROJECT, wait_until
from tests.syslogs import Reader
from tests.test_lines import fields
from tests.test_logs import Capture, all_output, dying_at, numbered

TIMES = Log(timestamps=True)
JSON = Log(format="json")
TIME = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "


def undressed(found: bytes, log: Log) -> bytes:
    """The output again, from lines that are all as they should be."""
    assert found.endswith(b"\n") or not found
    if log.format == "json":
        return b"".join(json.loads(line)["message"].encode() + b"\n" for line in found.splitlines())
    assert all(re.match(TIME, line) for line in found.splitlines()), found
    return re.sub(rb"(?m)^" + TIME, b"", found)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Capture]:
    logs = Capture(tmp_path)
    yield logs
    logs.close()


# --- the spool alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = make_pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_what_is_not_done_waits_for_the_next_one(pipe: tuple[int, int]) -> None:
    fd = make_spool()
    spool = Spool(os.dup(fd))
    os.write(pipe[1], b"one\ntwo\nhalf")
    assert spool.take(pipe[0], 1000) == 12
    assert spool.take(pipe[0], 1000) == 0
    assert (spool.window(100), spool.last(4)) == (b"one\ntwo\nhalf", b"half")
    spool.seen = 8
    assert spool.window(100) == b"half"
    spool.advance(4)
    assert (spool.waiting, spool.window(100)) == (8, b"half")
    spool.close()
    spool = Spool(fd)
    assert (spool.waiting, spool.window(100)) == (8, b"two\nhalf")
    assert spool.discard() == 8
    assert spool.waiting == 0
    spool.close()


def test_memory_is_given_back(pipe: tuple[int, int]) -> None:
    fd = make_spool()
    spool, moved = Spool(os.dup(fd)), 0
    chunk = b"x" * 50_000
    os.write(pipe[1], b"y")
    while moved < 30 * ANEW:
        os.write(pipe[1], chunk)
        moved += spool.take(pipe[0], 1 << 20)
        spool.advance(spool.waiting - 1)  # never empty: it can't begin anew
        assert os.fstat(fd).st_blocks * 512 <= HEADER + GIVE_BACK + 2 * len(chunk)
    assert os.fstat(fd).st_size > 30 * ANEW
    spool.advance(1)
    assert os.fstat(fd).st_size == HEADER
    os.write(pipe[1], b"on\n")
    spool.take(pipe[0], 100)
    assert spool.window(10) == b"on\n"
    spool.close()
    os.close(fd)


def test_it_takes_no_more_than_it_may(pipe: tuple[int, int]) -> None:
    spool = Spool(make_spool())
    while spool.waiting < SPOOL_MAX:
        os.write(pipe[1], b"x" * 50_000)
        spool.take(pipe[0], SPOOL_MAX)
    assert spool.waiting == SPOOL_MAX
    os.write(pipe[1], b"waits")
    assert spool.take(pipe[0], 100) == 0
    spool.close()


def test_a_death_while_it_begins_anew(pipe: tuple[int, int]) -> None:
    """Between the two steps `done` is beyond the end."""
    fd = make_spool()
    os.pwrite(fd, (ANEW + 7).to_bytes(8, sys.byteorder), 0)
    spool = Spool(fd)
    assert spool.waiting == 0
    os.write(pipe[1], b"on\n")
    spool.take(pipe[0], 100)
    assert spool.window(10) == b"on\n"
    spool.close()


@given(st.integers(0, 30), st.booleans(), st.integers(0, 5))
def test_an_intent_is_settled_however_far_it_came(written: int, advanced: bool, before: int) -> None:
    """`written` of 20 bytes are in the file, which stand for 4 of the program's; more than 20: somebody else's, too."""
    read_fd, write_fd = make_pipe()
    os.write(write_fd, b"one\ntwo\n")
    memory, file = make_spool(), os.memfd_create("file")
    spool = Spool(os.dup(memory))
    spool.take(read_fd, 100)
    os.pwrite(file, b"b" * before, 0)
    spool.intend(file, before, 20, 4)
    os.pwrite(file, b"x" * written, before)
    if advanced:
        spool.advance(4)
    spool.close()
    spool = Spool(memory)
    assert spool.intends is not advanced
    spool.settle(file)
    assert not spool.intends
    whole = advanced or written >= 20
    assert spool.window(100) == (b"two\n" if whole else b"one\ntwo\n")
    assert os.fstat(file).st_size == before + (written if whole else 0)
    spool.close()
    for fd in (file, read_fd, write_fd):
        os.close(fd)


def test_an_intent_for_another_file_cuts_nothing_off(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"one\n")
    spool, file, other = Spool(make_spool()), os.memfd_create("file"), os.memfd_create("other")
    spool.take(pipe[0], 100)
    spool.intend(file, 0, 20, 4)
    os.write(other, b"precious")
    spool.settle(other)
    assert os.fstat(other).st_size == 8
    assert spool.waiting == 4
    spool.close()
    os.close(file)
    os.close(other)


@pytest.mark.parametrize("written", [0, 7, 20])
def test_a_file_that_was_moved_away_before_its_intent_is_settled(
    tmp_path: Path, pipe: tuple[int, int], written: int
) -> None:
    """The supervisor was killed after the write, and logrotate was faster than its successor: no line comes twice."""
    os.write(pipe[1], b"one\ntwo\n")
    memory, path, old = make_spool(), tmp_path / "web.log", tmp_path / "web.log-20261127"
    spool = Spool(os.dup(memory))
    spool.take(pipe[0], 100)
    path.write_bytes(b"before\n")
    with path.open("r+b", buffering=0) as file:
        spool.intend(file.fileno(), 7, 20, 4)
        os.pwrite(file.fileno(), b"x" * written, 7)
    spool.close()
    path.rename(old)
    spool, log, found = Spool(memory), LogFile(str(path), TIMES), list[int]()
    log.claim(spool, found.append)
    log.prepare(0.0)
    assert found == [4 if written == 20 else 0]
    assert not spool.intends
    assert spool.waiting == 8 - found[0]
    assert old.stat().st_size == 7 + (20 if written == 20 else 0)
    assert path.stat().st_size == 0
    spool.close()
    log.close()


# --- lines in files ---------------------------------------------------------------------------------------------------


def test_lines_with_the_time(logs: Capture) -> None:
    pipe, path = logs.add("shop", TIMES), logs.folder / "shop.log"
    before = time.time()
    os.write(pipe, b"one\nha")
    wait_until(lambda: logs.thread.counters("shop") == Counters(read=6, written=4, held=2))
    os.write(pipe, b"lf\n\n")
    wait_until(lambda: logs.thread.counters("shop") == Counters(read=10, written=10))
    assert undressed(path.read_bytes(), TIMES) == b"one\nhalf\n\n"
    assert stamp(before) <= path.read_text()[:24] <= stamp(time.time())
    os.write(pipe, b"the end")
    assert logs.settle("shop") == Counters(read=17, written=17)
    assert undressed(path.read_bytes(), TIMES) == b"one\nhalf\n\nthe end\n"


def test_lines_as_json_with_stderr_apart(logs: Capture) -> None:
    log = Log(format="json", stderr="separate")
    out, err = logs.add("shop:2/out", log, "shop.log"), logs.add("shop:2/err", log, "shop.err.log")
    logs.thread.change("shop:2/out", log, str(logs.folder / "shop.log"))
    os.write(out, b"hello\n")
    os.write(err, b'Traceback (most recent call last):\n  File "x"\n\xff\n')
    logs.settle("shop:2/out")
    logs.settle("shop:2/err")
    [one] = map(json.loads, (logs.folder / "shop.log").read_text().splitlines())
    found = list(map(json.loads, (logs.folder / "shop.err.log").read_text().splitlines()))
    assert (one["stream"], one["message"]) == ("stdout", "hello")
    assert [each["message"] for each in found] == ["Traceback (most recent call last):", '  File "x"', "\\xff"]
    assert {each["stream"] for each in found} == {"stderr"}


@pytest.mark.parametrize("log", [TIMES, JSON], ids=["times", "json"])
@pytest.mark.parametrize("length", [65535, 65536, 65537, 500_000, 2_000_000])
def test_a_line_that_is_longer_than_the_pipe_and_everything(logs: Capture, log: Log, length: int) -> None:
    """Nobody waits for its end for ever; its parts are marked, and make the line again."""
    pipe, path = logs.add("shop", log), logs.folder / "shop.log"
    line = bytes(ord("a") + number % 26 for number in range(length))
    writer = threading.Thread(target=lambda: [os.write(pipe, line), os.write(pipe, b"\nnext\n")])
    writer.start()
    writer.join(20)
    assert not writer.is_alive(), "the program waits"
    wait_until(lambda: logs.thread.counters("shop").written == length + 6)
    parts = -(-length // 65536)
    assert logs.thread.counters("shop").lines_split == parts - 1
    if log is JSON:
        found = [json.loads(each) for each in path.read_text().splitlines()]
        assert [each.get("partial", False) for each in found] == [True] * (parts - 1) + [False, False]
        assert "".join(each["message"] for each in found[:-1]) == line.decode()
    else:
        assert undressed(path.read_bytes().replace(b"\\\n", b"\n"), log).replace(b"\n", b"") == line + b"next"
        assert path.read_bytes().count(b"\\\n") == parts - 1


SMALL = [Log(timestamps=True, max_size=300, keep=1000), Log(format="json", max_size=700, keep=1000)]


@pytest.mark.parametrize("log", SMALL)
def test_a_file_of_lines_is_rotated_before_it_would_grow_too_large(logs: Capture, log: Log) -> None:
    pipe, output = logs.add("shop", log), numbered(0, 100)
    os.write(pipe, output)
    counters = logs.settle("shop")
    assert counters.read == counters.written == len(output)
    assert counters.rotations > 5
    assert undressed(all_output(logs.folder / "shop.log"), log) == output
    for path in logs.folder.iterdir():
        assert path.stat().st_size <= log.max_size
        assert path.read_bytes().endswith(b"\n")


def test_a_line_that_is_longer_than_a_file_may_be_has_one_of_its_own(logs: Capture) -> None:
    pipe = logs.add("shop", Log(timestamps=True, max_size=100, keep=10))
    os.write(pipe, b"one\n" + b"x" * 300 + b"\nthree\n")
    logs.settle("shop")
    sizes = [(logs.folder / f"shop.log{end}").stat().st_size for end in (".2", ".1", "")]
    assert sizes == [25 + 4, 25 + 301, 25 + 6]


def test_from_raw_to_lines_and_back_while_it_prints(logs: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a line: none is torn, and nothing is lost."""
    monkeypatch.setattr("procman.logs.capture.PATIENCE_SECONDS", 10.0)
    pipe, path = logs.add("shop", Log()), logs.folder / "shop.log"
    for log, text in ((TIMES, b"raw\nha"), (JSON, b"lf\ntimes\nha"), (Log(), b"lf\njson\nha"), (TIMES, b"lf\nraw\n")):
        os.write(pipe, text)
        wait_until(lambda: not select.select([logs.thread._flows["shop"].fd], [], [], 0)[0])
        logs.thread.change("shop", log, str(path))
    logs.settle("shop")
    found = path.read_text().splitlines()
    time_or_not = f"^({TIME.decode()})?"
    messages = [json.loads(line)["message"] if line[0] == "{" else re.sub(time_or_not, "", line) for line in found]
    assert messages == ["raw", "half", "times", "half", "json", "half", "raw"]


def test_a_full_disk_takes_whole_lines_and_counts_the_rest(tmp_path: Path) -> None:
    """The limit is that of the spool, too: so it is large."""
    limit = 64 * 1024
    (tmp_path / "shop.log").write_bytes(b"y" * (limit - 66) + b"\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    logs = Capture(tmp_path)
    try:
        pipe = logs.add("shop", TIMES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        os.write(pipe, b"one\ntwo\nthree\n")
        counters = logs.settle("shop")
        assert counters == Counters(14, 8, 6, unreported=6, error="File too large (EFBIG)")
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        wait_until(lambda: logs.thread.counters("shop").unreported == 0, what="it tells by itself")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        logs.close()
    found = (tmp_path / "shop.log").read_bytes().split(b"\n", 1)[1]
    expected = b"one\ntwo\nprocman: 6 bytes of output were dropped: File too large (EFBIG)\n"
    assert undressed(found, TIMES) == expected


def test_the_raw_mode_has_no_spool_and_nothing_in_user_space(logs: Capture) -> None:
    os.write(logs.add("shop", Log()), b"x\n")
    logs.settle("shop")
    flow = logs.thread._flows["shop"]
    assert (flow.spool, flow.dress) == (None, None)


# --- a reader that is away --------------------------------------------------------------------------------------------


def test_lines_wait_for_a_socket_that_is_made_anew(logs: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is lost, nor does the thread spin meanwhile."""
    path = logs.folder / "socket"
    monkeypatch.setattr("procman.logs.syslog.ADDRESS", f"unix:{path}")
    monkeypatch.setattr("procman.logs.channel.STALL_SECONDS", 60.0)
    pipe = logs.add("shop", Log(mode="syslog"))
    reader = Reader(path)
    os.write(pipe, b"one\n")
    wait_until(lambda: len(reader.messages) == 1)
    reader.close()
    os.write(pipe, b"two\nthree\n")
    wait_until(lambda: logs.thread.counters("shop") == Counters(read=14, written=4, held=10))
    reader = Reader(path)
    wait_until(lambda: len(reader.messages) == 2)
    assert logs.settle("shop") == Counters(read=14, written=14)
    reader.close()


def test_a_reader_that_is_slow_gets_every_message_in_order(logs: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is full most of the time: the kernel tells when there is room again."""
    path = logs.folder / "socket"
    monkeypatch.setattr("procman.logs.journald.ADDRESS", f"unix:{path}")
    monkeypatch.setattr("procman.logs.channel.STALL_SECONDS", 60.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        pipe = logs.add("shop", Log(mode="journal"))
        os.write(pipe, numbered(0, 500))
        wait_until(lambda: logs.thread.counters("shop").held)
        found = []
        for _ in range(500):
            server.settimeout(20)
            found.append(fields(server.recv(1 << 16))["MESSAGE"])
        assert b"".join(message + b"\n" for message in found) == numbered(0, 500)
        assert logs.settle("shop").dropped == 0


# --- death at any instruction -----------------------------------------------------------------------------------------


def one_life(path: Path, log: Log, pipe: int, spool: int) -> None:
    """All that waits goes to the file."""
    thread = LogThread()
    thread.add(Stream("shop", "shop", log, str(path), os.dup(pipe), os.dup(spool)))
    thread.remove("shop")
    thread.start()
    assert thread.stop(20)
    assert not thread.trouble


def dies_at(step: int, life: Callable[[], None]) -> bool:
    """A life in a process of its own that ends at the n-th crossing. Whether it came so far."""
    pid = os.fork()
    if not pid:  # nothing of pytest may run in the child
        with contextlib.suppress(BaseException):
            crossing.watcher = dying_at(step, lambda: os._exit(7))
            life()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 7)
    return status == 7


@pytest.mark.parametrize("second", [1, 3])
@pytest.mark.parametrize("log", SMALL)
def test_deaths_at_each_step_lose_and_double_nothing(tmp_path: Path, log: Log, second: int) -> None:
    """The first one dies at its n-th step, for every n, the next one a little later; the third one finishes."""
    output, step, died = numbered(0, 24), 0, True
    while died:
        step += 1
        path = tmp_path / str(step) / "log"
        read_fd, write_fd = make_pipe()
        spool = make_spool()
        os.write(write_fd, output)

        def life(path: Path = path, read_fd: int = read_fd, spool: int = spool) -> None:
            one_life(path, log, read_fd, spool)

        died = dies_at(step, life)
        dies_at(second, life)
        life()
        for fd in (read_fd, write_fd, spool):
            os.close(fd)
        assert undressed(all_output(path), log) == output, step
    assert step > 15


def dies_after_a_write(path: Path, log: Log, pipe: int, spool: int) -> None:
    """A log thread in a process of its own that is killed when lines are in the file and not done in the spool."""

    def life() -> None:
        crossing.watcher = lambda step: os._exit(7) if step == "log append" else None
        one_life(path, log, pipe, spool)

    assert dies_at(1 << 30, life)


def test_what_a_predecessor_wrote_last_counts_as_written(logs: Capture) -> None:
    """It was killed between the write and its account of it."""
    path = logs.folder / "shop.log"
    read_fd, logs.pipes["shop"] = make_pipe()
    spool = make_spool()
    os.write(logs.pipes["shop"], b"one\ntwo\n")
    dies_after_a_write(path, TIMES, read_fd, spool)
    logs.thread.add(Stream("shop", "shop", TIMES, str(path), read_fd, spool))
    os.write(logs.pipes["shop"], b"three\n")
    assert logs.settle("shop") == Counters(read=14, written=14)
    assert undressed(path.read_bytes(), TIMES) == b"one\ntwo\nthree\n"


def test_a_successor_on_trial_that_dies_after_a_write_doubles_nothing(logs: Capture) -> None:
    """The one before takes its work up again, and finds what is written already."""
    path = logs.folder / "shop.log"
    read_fd, logs.pipes["shop"] = make_pipe()
    spool = make_spool()
    logs.thread.add(Stream("shop", "shop", TIMES, str(path), os.dup(read_fd), os.dup(spool)))
    os.write(logs.pipes["shop"], b"one\n")
    assert logs.settle("shop") == Counters(read=4, written=4)
    rests = threading.Event()
    logs.thread.pause(rests.set)
    assert rests.wait(10)
    os.write(logs.pipes["shop"], b"two\nthree\n")
    dies_after_a_write(path, TIMES, read_fd, spool)
    logs.thread.go_on()
    os.write(logs.pipes["shop"], b"four\n")
    assert logs.settle("shop") == Counters(read=19, written=19)
    assert undressed(path.read_bytes(), TIMES) == b"one\ntwo\nthree\nfour\n"
    os.close(read_fd)
    os.close(spool)


LOGGER = """
import sys, threading
from procman.config import Log
from procman.logs import LogThread, Stream, datagrams, destination, journald, syslog
path, mode, form, pipe, spool, out = sys.argv[1:]
syslog.ADDRESS = journald.ADDRESS = f"unix:{path}"
thread = LogThread(stdout_fd=int(out))
forms = {"raw": {}, "times": {"timestamps": True}, "json": {"format": "json"}}
log = Log(mode=mode, max_size=200_000, keep=100000, **forms[form])
thread.add(Stream("w", "w", log, path, int(pipe), int(spool)))
thread.start()
print("up", flush=True)
threading.Event().wait()
"""

WRITER = """
import os, sys
for block in range(int(sys.argv[1])):
    os.write(1, b"".join(b"%d %s\\n" % (n, b"x" * (n % 97)) for n in range(block * 100, block * 100 + 100)))
"""


class Mortal:
    """Log threads that are killed at a random moment, one after the other, while a program prints numbered lines."""

    def __init__(self, mode: str, form: str, path: Path, out: int) -> None:
        self._arguments = [str(path), mode, form]
        self._out = out
        self.kills = 0
        self.read_fd, self.write_fd = make_pipe()
        self.spool = make_spool()

    def run(self, blocks: int) -> bytes:
        """Kills until all is printed and taken; returns what was printed."""
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(blocks)], stdout=self.write_fd)
        try:
            while writer.poll() is None or self.kills < 5:
                with self._logger() as child:
                    time.sleep(0.003 * (1 + self.kills % 7))  # a random moment is the point
                    child.send_signal(signal.SIGKILL)
                self.kills += 1
            assert writer.wait() == 0
            with self._logger() as child:
                spool = Spool(os.dup(self.spool))
                try:
                    wait_until(lambda: self._is_empty(spool), 20)
                finally:
                    spool.close()
                    child.kill()
        finally:
            writer.kill()
            writer.wait()
            for fd in (self.read_fd, self.write_fd, self.spool):
                os.close(fd)
        return b"".join(b"%d %s\n" % (n, b"x" * (n % 97)) for n in range(blocks * 100))

    def _is_empty(self, spool: Spool) -> bool:
        spool.look()
        return not select.select([self.read_fd], [], [], 0)[0] and spool.waiting == 0

    def _logger(self) -> subprocess.Popen[bytes]:
        fds = [self.read_fd, self.spool, self._out]
        command = [sys.executable, "-S", "-c", LOGGER, *self._arguments, *map(str, fds)]
        child = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE, env={"PYTHONPATH": str(PROJECT)})
        assert child.stdout
        assert child.stdout.readline() == b"up\n"
        return child


@pytest.mark.parametrize("form", ["times", "json"])
def test_a_SIGKILL_at_any_moment_loses_and_doubles_no_line_of_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "log"
    output = Mortal("file", form, path, 1).run(600)
    assert undressed(all_output(path), JSON if form == "json" else TIMES) == output


def doubled(found: list[int], total: int) -> list[int]:
    """How many lines were doubled at each place where that happened. No line may be missing, and what is doubled must
    directly follow itself."""
    assert sorted(set(found)) == list(range(total))
    runs, expected = [], 0
    for number in found:
        if number < expected:
            runs.append(expected - number)
        elif number > expected:
            raise AssertionError(f"{number} follows {expected - 1}")
        expected = number + 1
    return runs


def test_a_SIGKILL_at_any_moment_loses_no_line_on_stdout(tmp_path: Path) -> None:
    """And doubles no more than one write: 4 KiB of lines."""
    reader, stdout = os.pipe()
    chunks: list[bytes] = []
    reading = threading.Thread(target=lambda: chunks.extend(iter(lambda: os.read(reader, 1 << 16), b"")))
    reading.start()
    mortal = Mortal("inherit", "raw", tmp_path / "none", stdout)
    mortal.run(1000)
    os.close(stdout)
    reading.join(20)
    os.close(reader)
    lines = re.findall(rb"^w \| (\d+) (x*)$", b"".join(chunks), re.MULTILINE)
    whole = [int(number) for number, rest in lines if len(rest) == int(number) % 97]
    runs = doubled(whole, 100_000)
    assert len(runs) <= mortal.kills
    assert max(runs, default=0) <= 4096 // len(b"w | 10000 x\n")


@pytest.mark.parametrize("mode", ["syslog", "journal"])
def test_a_SIGKILL_at_any_moment_loses_no_message_and_doubles_one_at_most(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "socket"
    messages: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        reading = threading.Thread(target=lambda: messages.extend(iter(lambda: server.recv(1 << 16), b"")))
        reading.start()
        mortal = Mortal(mode, "raw", path, 1)
        mortal.run(150)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(path))
        reading.join(20)
    texts = [fields(each)["MESSAGE"] if mode == "journal" else each.split(b" - ", 1)[1] for each in messages]
    assert all(len(text.partition(b" ")[2]) == int(text.split()[0]) % 97 for text in texts)
    runs = doubled([int(text.split()[0]) for text in texts], 15_000)
    assert max(runs, default=0) <= 1
    assert len(runs) <= mortal.kills

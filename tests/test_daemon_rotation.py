"""Rotation by the clock, compression, and room on the disk: the daemon with real children, clocks and full disks."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, command_line, log_files, wait_until, whole_log

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")

FIFO = "sh -c 'while read line; do echo $line; done < fifo'"
"""Prints what the test writes into the FIFO `fifo`."""


def counters(running: RunningDaemon, name: str) -> dict[str, Any]:
    """The counters of stdout; read = written + dropped + held holds."""
    found: dict[str, Any] = running.json("show", name)["log"][0]
    assert found["read"] == found["written"] + found["dropped"] + found["held"], found
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def compressors(running: RunningDaemon) -> list[int]:
    """The pids of its compressor: those that have the mark of this daemon's children in their command line's folder."""
    running.look()
    return [seen.pid for seen in running.seen if seen.alive() and "compressor.py" in command_line(seen.pid)]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of `size` on `folder`."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# --- compression ------------------------------------------------------------------------------------------------------


def test_rotated_files_are_compressed_and_nothing_is_left(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.writer]
        command = ["sh", "-c", "seq 30000; exec sleep 600"]
        log = { max_size = "20KB", keep = 100, mode_bits = 0o604 }
        """
    )
    path = running.log_dir / "writer.log"
    expected = b"".join(b"%d\n" % number for number in range(1, 30001))

    def compressed() -> bool:
        assert [file.suffix for file in log_files(path)[:-1]] == [".gz"] * 8
        return True

    wait_until(compressed, 20)
    assert whole_log(path) == expected
    assert {file.stat().st_mode & 0o777 for file in log_files(path)} == {0o604}
    [pid] = compressors(running)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert counters(running, "writer")["rotations"] == 8
    assert running.stop() == 0
    assert names(running.log_dir) == ["writer.log", *(f"writer.log.{number}.gz" for number in range(1, 9))]


def test_files_of_another_manager_are_adopted_before_the_program_prints(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.quiet]
        command = "sleep 600"
        """,
        start=False,
    )
    running.log_dir.mkdir()
    for number in (1, 2):
        (running.log_dir / f"quiet.log.{number}").write_bytes(b"old %d\n" % number)
    (running.log_dir / "quiet.log.gz.partial").write_bytes(b"what a killed daemon has left")
    running.start()
    wait_until(lambda: names(running.log_dir) == ["quiet.log.1.gz", "quiet.log.2.gz"], 20)
    assert gzip.decompress((running.log_dir / "quiet.log.2.gz").read_bytes()) == b"old 2\n"


def test_a_writer_that_is_faster_than_the_compressor_is_bounded_and_told_of(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.fast]
        command = ["sh", "-c", "head -c 600000000 /dev/urandom; read _ < fifo"]
        restart = "never"
        log = { max_size = "2MB", keep = 4 }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    path = running.log_dir / "fast.log"

    def told() -> bool:
        assert len(log_files(path)) <= 6  # the file, `keep` rotated ones, and one that is being shifted
        assert len(list(running.log_dir.glob("*.partial"))) <= 1
        return f"{path} is rotated faster than its files can be compressed" in running.said()

    wait_until(told, 30)
    wait_until(lambda: counters(running, "fast")["read"] == 600_000_000, 60)
    wait_until(lambda: f"{path}: its rotated files are all compressed again" in running.said(), 60)
    assert counters(running, "fast")["dropped"] == 0
    assert [file.suffix for file in log_files(path)] == [".gz"] * 4 + [".log"]


@pytest.mark.parametrize("who", ["supervisor", "compressor"])
def test_a_death_in_the_midst_of_a_compression_loses_and_doubles_nothing(daemon: MakeDaemon, who: str) -> None:
    running = daemon(
        """
        [program.writer]
        command = ["sh", "-c", "head -c 30000000 /dev/urandom | tee copy; exec sleep 600"]
        log = { max_size = "5MB", keep = 100 }
        """
    )
    path, partial = running.log_dir / "writer.log", running.log_dir / "writer.log.gz.partial"
    for _ in range(3):
        wait_until(partial.exists, 20)
        [pid] = wait_until(lambda: compressors(running), 20)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.supervisor_pid if who == "supervisor" else pid, signal.SIGKILL)
        wait_until(running.answers)
    wait_until(lambda: [file.suffix for file in log_files(path)[:-1]] == [".gz"] * 5, 60)
    assert not partial.exists()
    assert whole_log(path) == (running.folder / "copy").read_bytes()
    if who == "compressor":
        assert "the compressor has ended" in running.said()


def test_compression_follows_a_changed_table(daemon: MakeDaemon) -> None:
    table = """
        [program.lines]
        command = "{FIFO}"
        start_seconds = 0
        log = {{ max_size = 10, keep = 100, compress = "{compress}" }}
        """
    running = daemon(table.format(FIFO=FIFO, compress="none"), start=False)
    os.mkfifo(running.folder / "fifo")
    running.start()
    pid = running.wait_for("lines")["pid"]
    path = running.log_dir / "lines.log"
    with open(running.folder / "fifo", "w") as fifo:
        for number in range(10, 16):
            print(f"line {number}", file=fifo, flush=True)
        wait_until(lambda: counters(running, "lines")["read"] == 48)
        assert not list(running.log_dir.glob("*.gz*"))
        running.write_table(table.format(FIFO=FIFO, compress="gzip"))
        assert running.ctl("apply").returncode == 0
        wait_until(lambda: {file.suffix for file in log_files(path)[:-1]} == {".gz"}, 20)
        assert running.status()["lines"]["pid"] == pid
    assert whole_log(path) == b"".join(b"line %d\n" % number for number in range(10, 16))


# --- the clock --------------------------------------------------------------------------------------------------------


def zone_with_midnight_in(seconds: float) -> str:
    """A time zone (TZ, tzset(3)) in which the day ends so soon."""
    west = int((time.time() + seconds) % 86400)  # west of Greenwich by the time that has passed there since midnight
    west -= 86400 if west > 43200 else 0
    sign, west = ("-" if west < 0 else ""), abs(west)
    return f"XXX{sign}{west // 3600:02}:{west // 60 % 60:02}:{west % 60:02}"


def test_at_local_midnight_logs_are_rotated(daemon: MakeDaemon) -> None:
    """Also that of a program that prints nothing any more; and only once."""
    seconds, begin = 10.0, time.time()
    running = daemon(
        """
        [defaults]
        start_seconds = 0
        log = { rotate_every = "daily" }
        [program.prints]
        command = ["sh", "-c", "while true; do date +%s.%N; sleep 0.05; done"]
        [program.quiet]
        command = ["sh", "-c", "date +%s.%N; exec sleep 600"]
        """,
        environment={"TZ": zone_with_midnight_in(seconds)},
    )
    midnight = int(begin + seconds)
    wait_until(lambda: (running.log("quiet") and running.log("prints")) or time.time() > midnight, 30)
    if time.time() > midnight - 0.5:
        pytest.skip("the machine is too slow: the day is over")
    for name in ("prints", "quiet"):
        rotated = running.log_dir / f"{name}.log.1.gz"
        wait_until(rotated.exists, 20)
        wait_until(lambda name=name: bool(running.log(name)) == (name == "prints"))  # type: ignore[misc]
        old = [float(line) for line in gzip.decompress(rotated.read_bytes()).split()]
        new = [float(line) for line in running.log(name).splitlines()]
        assert max(old) < midnight + 1.5
        assert all(moment > midnight - 0.1 for moment in new)
        assert counters(running, name)["rotations"] == 1


@pytest.mark.parametrize(("age", "rotated"), [(0.0, False), (86_400.0, True)])
def test_a_midnight_while_the_daemon_was_down_counts(daemon: MakeDaemon, age: float, rotated: bool) -> None:
    running = daemon(
        """
        [program.quiet]
        command = "sleep 600"
        log = { rotate_every = "daily", compress = "none" }
        """,
        start=False,
        environment={"TZ": zone_with_midnight_in(43_200)},  # it is noon
    )
    running.log_dir.mkdir()
    path = running.log_dir / "quiet.log"
    path.write_bytes(b"a line\n")
    os.utime(path, (time.time(), time.time() - age))
    running.start()
    running.wait_for("quiet")
    if rotated:
        wait_until(lambda: names(running.log_dir) == ["quiet.log", "quiet.log.1"])
    assert counters(running, "quiet")["rotations"] == rotated
    assert path.read_bytes() == (b"" if rotated else b"a line\n")


# --- room -------------------------------------------------------------------------------------------------------------


def test_bounds_that_apply_narrows_hold_at_once(daemon: MakeDaemon) -> None:
    """Though the program prints no more."""
    table = """
        [program.quiet]
        command = "sleep 1000"
        start_seconds = 0
        log = { keep = %d, keep_total = "%s", compress = "none" }
        """
    running = daemon(table % (5, "1MB"), start=False)
    running.log_dir.mkdir()
    for number in range(1, 8):
        path = running.log_dir / f"quiet.log.{number}"
        path.write_bytes(b"x" * 4096)
        os.utime(path, (10**9 - number, 10**9 - number))

    def left() -> list[str]:
        return sorted(path.name for path in running.log_dir.glob("quiet.log.*"))

    running.start()
    running.wait_for("quiet")
    wait_until(lambda: left() == [f"quiet.log.{number}" for number in range(1, 6)])
    running.write_table(table % (3, "1MB"))
    assert running.ctl("apply").returncode == 0
    wait_until(lambda: left() == ["quiet.log.1", "quiet.log.2", "quiet.log.3"])
    running.write_table(table % (3, "8KB"))
    assert running.ctl("apply").returncode == 0
    wait_until(lambda: left() == ["quiet.log.1", "quiet.log.2"])


def test_keep_total_counts_all_processes_of_a_program(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.many]
        command = ["sh", "-c", "head -c 1000000 /dev/urandom | od; exec sleep 600"]
        instances = 2
        log = { max_size = "100KB", keep = 1000, keep_total = "400KB", compress = "none" }
        """
    )

    def settled() -> bool:
        found = [counters(running, name) for name in ("many:1", "many:2")]
        assert min(each["rotations"] for each in found) >= 30, found
        assert [each["dropped"] for each in found] == [0, 0]
        files = [path for path in running.log_dir.iterdir() if re.search(r"\.log\.\d+$", path.name)]
        size = sum(path.stat().st_blocks * 512 for path in files)
        assert 200_000 < size <= 400 * 1024, (size, names(running.log_dir))
        return True

    wait_until(settled, 40)


@as_root
def test_on_a_disk_that_is_nearly_full_the_oldest_rotated_files_go(daemon: MakeDaemon) -> None:
    """Of all programs, also of those that do not run; never a log, and never a file that is not ours."""
    running = daemon(
        f"""
        [program.lines]
        command = "{FIFO}"
        start_seconds = 0
        [program.down]
        command = "sleep 600"
        autostart = false
        [defaults.log]
        compress = "none"
        """,
        settings='log_min_free = "600KB"',
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    files = ["lines.log.2.gz", "down.log.1", "lines.log.1", "down.log.2", "foreign.log.1", "down.log.x", "down.log"]
    with small_disk(running.log_dir, "1000k"):
        for age, name in enumerate(files):
            (running.log_dir / name).write_bytes(os.urandom(80_000))
            os.utime(running.log_dir / name, (1e9, 1e9 + age))
        running.start()
        with open(running.folder / "fifo", "w") as fifo:

            def enough() -> bool:
                print("a line", file=fifo, flush=True)
                disk = os.statvfs(running.log_dir)
                return disk.f_bavail * disk.f_frsize >= 600 * 1024

            wait_until(enough, 20)
        gone = ["lines.log.2.gz", "down.log.1", "lines.log.1"]  # and no more than is needed

        def told() -> bool:
            said = re.findall(r"/([^/]+) is removed, the oldest rotated file", running.said())
            assert said == gone
            return True

        wait_until(told)
        assert set(names(running.log_dir)) == {*files, "lines.log"} - set(gone)
        assert counters(running, "lines")["dropped"] == 0
        running.write_table(f'[program.lines]\ncommand = "{FIFO}"', settings='log_min_free = "99%"')
        assert "log_min_free" in running.ctl("apply").stdout + running.said()
        with open(running.folder / "fifo", "w") as fifo:

            def nothing_left() -> bool:
                print("a line", file=fifo, flush=True)
                return "there is no rotated file left to remove" in running.said()

            wait_until(nothing_left, 20)
        assert {"foreign.log.1", "down.log.x", "down.log", "lines.log"} <= set(names(running.log_dir))
        assert running.stop() == 0


@as_root
def test_on_a_full_disk_a_program_that_is_to_block_waits_and_loses_nothing(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.counts]
        command = ["sh", "-c", "seq 400000; echo over; exec sleep 600"]
        log = { path = "small/counts.log", on_error = "block", max_size = 0 }
        [program.dated]
        command = ["sh", "-c", "seq 400000; echo over; exec sleep 600"]
        log = { path = "small/dated.log", on_error = "block", max_size = 0, timestamps = true }
        [program.drops]
        command = ["sh", "-c", "seq 400000; echo over; exec sleep 600"]
        log = { path = "small/drops.log", max_size = 0 }
        """,
        start=False,
    )
    small = running.folder / "small"
    with small_disk(small, "2000k"):
        (small / "filler").write_bytes(bytes(1_000_000))
        running.start()
        wait_until(lambda: "the program waits" in counters(running, "counts")["error"], 20)
        wait_until(lambda: "the program waits" in counters(running, "dated")["error"], 20)
        wait_until(lambda: counters(running, "drops")["dropped"] > 0, 20)
        dated = counters(running, "dated")
        assert dated["dropped"] == 0
        found = counters(running, "counts")
        assert (found["dropped"], found["waits"]) == (0, 1)
        assert "No space left on device (ENOSPC)" in found["error"]
        assert "the log of counts is not written as it should be: No space left on device" in running.said()
        assert any(problem.startswith("counts: ") for problem in running.json("daemon", "status")["problems"])
        read = found["read"]
        wait_until(lambda: counters(running, "counts")["waited"] > found["waited"])
        assert counters(running, "counts")["read"] == read
        assert counters(running, "dated")["read"] == dated["read"]  # nor does it all go into memory
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        expected = b"".join(b"%d\n" % number for number in range(1, 400_001)) + b"over\n"
        wait_until(lambda: counters(running, "counts")["read"] == len(expected), 30)
        assert (small / "counts.log").read_bytes() == expected
        found = counters(running, "counts")
        assert (found["dropped"], found["unreported"], found["error"]) == (0, 0, "")
        assert "the log of counts is written again" in running.said()
        wait_until(lambda: counters(running, "dated")["written"] == len(expected), 30)
        assert re.sub(rb"(?m)^[-0-9T:.]+Z ", b"", (small / "dated.log").read_bytes()) == expected
        assert counters(running, "dated")["dropped"] == 0
        lost = counters(running, "drops")["dropped"]
        marker = rb"^procman: \d+ bytes of output were dropped: No space left"
        assert re.search(marker, (small / "drops.log").read_bytes(), re.MULTILINE)
        assert lost > 0
        assert running.stop() == 0


@as_root
def test_a_program_whose_log_has_times_waits_too_and_its_last_line_comes_by_itself(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.counts]
        command = ["sh", "-c", "seq 60000; printf 'no end'"]
        restart = "never"
        start_seconds = 0
        log = { path = "small/counts.log", on_error = "block", max_size = 0, timestamps = true }
        """,
        start=False,
    )
    small = running.folder / "small"
    with small_disk(small, "1000k"):
        running.start()
        wait_until(lambda: running.json("show", "counts")["log"][0]["waits"] == 1, 20)
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        expected = [*map(str, range(1, 60_001)), "no end"]

        def all_there() -> bool:
            found = (small / "counts.log").read_text().splitlines()
            assert len(found) == len(expected), len(found)
            return True

        wait_until(all_there, 30)
        assert [line.partition(" ")[2] for line in (small / "counts.log").read_text().splitlines()] == expected
        assert counters(running, "counts")["dropped"] == 0
        assert running.stop() == 0


@as_root
def test_a_blocked_program_can_be_stopped_and_what_is_lost_with_its_pipe_is_counted(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.counts]
        command = ["yes", "a line"]
        log = { path = "small/counts.log", on_error = "block", max_size = 0 }
        """,
        start=False,
    )
    small = running.folder / "small"
    with small_disk(small, "400k"):
        running.start()
        wait_until(lambda: "the program waits" in counters(running, "counts")["error"], 20)
        assert running.ctl("restart", "counts").returncode == 0
        running.write_table(
            """
            [program.counts]
            command = ["yes", "a line"]
            log = { path = "small/counts.log", on_error = "drop", max_size = 0 }
            """
        )
        assert running.ctl("apply").returncode == 0  # hot: the same pid goes on, and what waited is dropped
        wait_until(lambda: counters(running, "counts")["dropped"] > 1_000_000, 20)
        assert running.ctl("stop", "counts").returncode == 0
        assert running.stop() == 0


# --- an external logrotate --------------------------------------------------------------------------------------------

LOGROTATE = shutil.which("logrotate", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")

def snippet() -> str:
    """What docs/logs.md tells people to write into /etc/logrotate.d/procman."""
    text = (PROJECT / "docs" / "logs.md").read_text()
    found = re.search(r"```logrotate\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.skipif(LOGROTATE is None, reason="there is no logrotate: apt-get install logrotate")
@pytest.mark.parametrize("how", ["reopen-logs", "USR2", "dateext"])
def test_the_logrotate_snippet_of_the_documentation_loses_nothing(daemon: MakeDaemon, how: str) -> None:
    """With the real logrotate, again and again, while a program prints: each line is there once, and is read."""
    running = daemon(
        """
        [program.lines]
        command = ["sh", "-c", "i=0; while true; do echo $i; i=$((i+1)); done"]
        log = { max_size = 0, compress = "none", keep = 2 }
        """
    )
    assert LOGROTATE is not None
    path = running.log_dir / "lines.log"
    text = snippet().replace("/var/log/procman", str(running.log_dir))
    command = f"{sys.executable} -c '{CTL}' -s {running.socket}"
    assert "procmanctl daemon reopen-logs" in text
    if how == "USR2":  # which waits for nothing
        command = f"kill -USR2 {running.keeper_pid} #"
        text = text.replace("compress", "compress\n    delaycompress")
    if how == "dateext":  # as distributions have it for all logs; with seconds, for a rotation in each
        text = text.replace("nodateext", "dateext\n    dateformat -%Y%m%d%H%M%S")
    text = text.replace("procmanctl", command).replace("rotate 14", "rotate 1000")
    config = running.folder / "logrotate.conf"
    config.write_text(text)
    config.chmod(0o644)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    for number in range(1, 6):
        size = path.stat().st_size if path.exists() else 0
        wait_until(lambda size=size: path.exists() and path.stat().st_size > size + 100)  # type: ignore[misc]
        state = ["-s", str(running.folder / "logrotate.state")]
        done = subprocess.run(
            [LOGROTATE, "-f", *state, str(config)], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        wait_until(path.exists)
        assert len(list(running.log_dir.glob("lines.log*"))) == number + 1
        second = int(time.time())
        wait_until(lambda second=second: how != "dateext" or time.time() >= second + 1)  # type: ignore[misc]
    assert running.ctl("stop", "lines").returncode == 0
    found = [int(line) for line in running.ctl("logs", "-n", str(10**9), "lines").stdout.split()]
    assert found == list(range(len(found)))
    if how != "dateext":
        assert "".join(f"{number}\n" for number in found).encode() == whole_log(path)
    assert counters(running, "lines")["dropped"] == 0

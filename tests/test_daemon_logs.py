"""What programs print, through the whole daemon: files, rotation, odd output, trouble with files, reading, samples."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, log_content, log_files, wait_until, whole_log

LINES = 20_000


def counters(running: RunningDaemon, name: str) -> dict[str, Any]:
    with running.client() as client:
        found: dict[str, Any] = client.call("show", name=name)["log"][0]
    return found


def balanced(running: RunningDaemon, name: str) -> dict[str, Any]:
    """The counters, once all that was read is accounted for."""
    found = counters(running, name)
    assert found["read"] == found["written"] + found["dropped"] + found["held"], found
    return found


def test_numbered_lines_survive_rotation_and_crashes(daemon: MakeDaemon) -> None:
    """Rotated a dozen times, with the supervisor killed meanwhile: each line is there once, whole, in order."""
    code = f"for i in range({LINES}): print(f'line {{i:08}} ' + 'x' * 80)"
    running = daemon(
        f"""
        [program.writer]
        command = ["${{PYTHON}}", "-S", "-E", "-c", "{code}"]
        restart = "never"
        start_seconds = 0
        [program.writer.log]
        max_size = "150KB"
        keep = 100
        """
    )
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers)
    running.wait_for("writer", "EXITED", 30)

    def all_lines() -> bool:
        found = whole_log(running.log_dir / "writer.log").decode().splitlines()
        assert len(found) == LINES
        assert [int(line.split()[1]) for line in found] == list(range(LINES))
        return True

    wait_until(all_lines, 20)
    wait_until(lambda: {path.suffix for path in sorted_files(running, "writer")[:-1]} == {".gz"}, 20)
    rotated = sorted_files(running, "writer")[:-1]
    assert len(rotated) >= 10
    for path in rotated:
        assert len(log_content(path)) <= 150 * 1024
        assert log_content(path).endswith(b"\n")


def sorted_files(running: RunningDaemon, name: str) -> list[Path]:
    """The log and its rotated files, oldest first."""
    return log_files(running.log_dir / f"{name}.log")


def test_keep_limits_the_rotated_files(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.writer]
        command = "sh -c 'i=0; while [ $i -lt 2000 ]; do echo 012345678901234567890123456789; i=$((i+1)); done'"
        restart = "never"
        start_seconds = 0
        log = { max_size = "4KB", keep = 3, mode_bits = 0o600 }
        """
    )
    running.wait_for("writer", "EXITED", 20)
    wait_until(lambda: balanced(running, "writer")["written"] == 2000 * 31)
    wait_until(lambda: {path.suffix for path in sorted_files(running, "writer")[:-1]} == {".gz"}, 20)
    assert len(sorted_files(running, "writer")) == 4
    assert {path.stat().st_mode & 0o777 for path in sorted_files(running, "writer")} == {0o600}


def test_binary_output_and_a_line_of_50_mb(daemon: MakeDaemon) -> None:
    code = "import os; os.write(1, bytes(range(256)) * 16); [os.write(1, b'y' * 1000000) for _ in range(50)]"
    running = daemon(
        f"""
        [program.odd]
        command = ["${{PYTHON}}", "-S", "-E", "-c", "{code}"]
        restart = "never"
        start_seconds = 0
        log = {{ max_size = 0 }}
        """
    )
    running.wait_for("odd", "EXITED", 30)
    size = 4096 + 50_000_000
    wait_until(lambda: balanced(running, "odd")["written"] == size, 20)
    path = running.log_dir / "odd.log"
    assert path.stat().st_size == size
    with path.open("rb") as file:
        assert file.read(4096) == bytes(range(256)) * 16
    shown = running.ctl("logs", "-n", "1", "odd", errors="replace")
    assert shown.returncode == 0
    assert wait_until(running.answers)


def test_a_program_at_full_speed_leaves_the_others_their_turn(daemon: MakeDaemon) -> None:
    """`yes` writes hundreds of MB a second. Others' lines arrive, status answers, and every byte is counted."""
    running = daemon(
        """
        [program.loud]
        command = "yes 0123456789012345678901234567890123456789"
        log = { max_size = "20MB", keep = 1 }
        [program.quiet]
        command = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
        """
    )
    running.wait_for("loud")
    wait_until(lambda: counters(running, "loud")["rotations"] >= 5, 30)
    assert "ready" in running.log("quiet")
    assert running.ctl("stop", "loud").returncode == 0
    found = wait_until(lambda: balanced(running, "loud"))
    assert found["dropped"] == 0
    assert found["written"] > 100_000_000


def test_a_deleted_file_is_made_again(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line; done < fifo'"
        start_seconds = 0
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    with open(running.folder / "fifo", "w") as fifo:
        print("first", file=fifo, flush=True)
        wait_until(lambda: running.log("lines") == "first\n")
        (running.log_dir / "lines.log").unlink()
        print("second", file=fifo, flush=True)
        wait_until(lambda: running.log("lines") == "second\n")


def test_an_unwritable_file_loses_nothing_uncounted(daemon: MakeDaemon) -> None:
    """The log's path is a folder for a while: output is dropped and counted, and the log says so afterwards."""
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line; done < fifo'"
        start_seconds = 0
        """,
        start=False,
    )
    path = running.log_dir / "lines.log"
    path.mkdir(parents=True)
    os.mkfifo(running.folder / "fifo")
    running.start()
    with open(running.folder / "fifo", "w") as fifo:
        print("lost", file=fifo, flush=True)
        wait_until(lambda: balanced(running, "lines")["dropped"] == 5)
        assert counters(running, "lines")["error"]
        path.rmdir()

        def written() -> bool:
            print("kept", file=fifo, flush=True)
            return path.is_file() and "kept" in path.read_text()

        wait_until(written)
    first = path.read_text().splitlines()[0]
    found = balanced(running, "lines")
    assert re.match(rf"procman: {found['dropped']} bytes of output were dropped: Is a directory", first)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_stops_nothing(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line; done < fifo'"
        start_seconds = 0
        log = { path = "small/lines.log" }
        """,
        start=False,
    )
    small = running.folder / "small"
    small.mkdir()
    os.mkfifo(running.folder / "fifo")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        running.start()
        line = "x" * 1000
        with open(running.folder / "fifo", "w") as fifo:

            def full() -> bool:
                print(line, file=fifo, flush=True)
                return bool(balanced(running, "lines")["dropped"] > 20_000)

            wait_until(full)
            assert running.status()["lines"]["state"] == "RUNNING"
            (small / "lines.log").write_bytes(b"")

            def again() -> bool:
                print(line, file=fifo, flush=True)
                return "bytes of output were dropped: No space left on device" in (small / "lines.log").read_text()

            wait_until(again)
        assert running.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_stderr_apart_and_discarded(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [defaults]
        command = "sh -c 'echo out; echo err >&2; exec sleep 1000'"
        start_seconds = 0
        [program.merged]
        [program.apart]
        log = { stderr = "separate" }
        [program.without]
        log = { stderr = "discard" }
        [program.silent]
        log = { mode = "discard" }
        """
    )
    wait_until(lambda: running.log("merged") == "out\nerr\n")
    wait_until(lambda: (running.log("apart"), running.log("apart.err")) == ("out\n", "err\n"))
    wait_until(lambda: running.log("without") == "out\n")
    running.wait_for("silent")
    assert not (running.log_dir / "silent.log").exists()
    assert running.ctl("logs", "--stderr", "apart").stdout == "err\n"


def test_inherit_writes_to_the_daemons_stdout_with_a_prefix(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.talker]
        command = "sh -c 'printf \\"one\\ntwo\\n\\"; printf end; exec sleep 1000'"
        start_seconds = 0
        log = { mode = "inherit" }
        """
    )
    wait_until(lambda: "talker | one\ntalker | two\n" in running.said())
    assert running.ctl("stop", "talker").returncode == 0
    wait_until(lambda: "talker | end" in running.said(), what="a line without an end, when its child has died")


def test_follow_goes_on_through_rotation_and_restart(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line 0123456789012345678901234567890123456789; done < fifo'"
        start_seconds = 0
        log = { max_size = "1KB", keep = 50, compress = "none" }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "logs", "-f", "-n", "0", "lines"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    output = running.folder / "followed"
    with output.open("wb") as file:
        follower = subprocess.Popen(command, stdout=file, env=environment)
    try:
        with open(running.folder / "fifo", "w") as fifo:

            def follows() -> bool:
                print("hello", file=fifo, flush=True)
                return b"hello" in output.read_bytes()

            wait_until(follows, 20)
            for number in range(100):
                print(f"n{number}", file=fifo, flush=True)

        def numbers() -> bool:
            text = output.read_text()
            assert [int(found) for found in re.findall(r"^n(\d+) ", text, re.M)] == list(range(100))
            return True

        wait_until(numbers, 20)
        assert len(sorted_files(running, "lines")) > 3
    finally:
        follower.kill()
        follower.wait(10)


def test_logs_shows_the_last_lines_across_files(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.count]
        command = "seq 1000"
        restart = "never"
        start_seconds = 0
        log = { max_size = "1KB", keep = 50, compress = "none" }
        """
    )
    running.wait_for("count", "EXITED")
    wait_until(lambda: balanced(running, "count")["written"] == len("".join(f"{n}\n" for n in range(1, 1001))))
    shown = running.ctl("logs", "-n", "700", "count")
    assert shown.stdout == "".join(f"{number}\n" for number in range(301, 1001))
    lines = [json.loads(line) for line in running.ctl("--json", "logs", "-n", "1", "count").stdout.splitlines()]
    assert "".join(line.get("text", "") for line in lines) == "1000"


def test_counters_go_on_in_the_next_supervisor(daemon: MakeDaemon) -> None:
    running = daemon('[program.talk]\ncommand = "sh -c \'echo hello; exec sleep 1000\'"\nstart_seconds = 0\n')
    wait_until(lambda: counters(running, "talk")["written"] == 6)
    assert running.ctl("restart", "talk").returncode == 0  # waits for the state file
    wait_until(lambda: counters(running, "talk")["written"] == 12)
    assert running.ctl("stop", "talk").returncode == 0
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2)
    assert counters(running, "talk")["written"] == 12


def test_samples_of_the_whole_tree_in_status_and_show(daemon: MakeDaemon) -> None:
    eat = "import os; os.fork(); held = bytearray(20_000_000)\\nfor _ in range(10**9): pass"
    running = daemon(
        f"""
        [program.busy]
        command = ["${{PYTHON}}", "-S", "-E", "-c", "{eat}"]
        """,
        settings='sampling = { interval = "200ms" }',
    )

    def measured() -> bool:
        info = running.status()["busy"]
        assert info["memory_bytes"] is not None
        assert info["memory_bytes"] > 40_000_000  # parent and child
        assert info["cpu_percent"] > 2  # of a machine that others may keep busy; who does nothing has 0
        return True

    wait_until(measured, 20)
    shown = running.json("show", "busy")
    assert len(shown["processes"]) == 2
    assert len(shown["samples"]) >= 2
    at, cpu, memory = shown["samples"][-1]
    assert at > 1e9
    assert cpu > 0
    assert memory > 40_000_000


def test_sampling_can_be_switched_off(daemon: MakeDaemon) -> None:
    table = '[program.it]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ready.py"\n'
    running = daemon(table, settings="sampling = { interval = 0 }")
    info = running.wait_for("it")
    assert info["cpu_percent"] is None
    assert info["memory_bytes"] is None


def test_two_daemons_that_write_one_log_file(daemon: MakeDaemon) -> None:
    """Both can tell. Another file in the same folder is nobody's concern."""
    table = '[program.{}]\ncommand = ["sh", "-c", "echo hello; sleep 1000"]\nstart_seconds = 0\n'
    first = daemon(table.format("one") + table.format("two"))
    wait_until(lambda: first.log("one") and first.log("two"))
    second = daemon(table.format("one") + table.format("three"), start=False)
    second.table.write_text(second.table.read_text().replace(f"{second.log_dir}", f"{first.log_dir}"))
    second.start()
    second.wait_for("three")
    path = first.log_dir / "one.log"
    said = f"{path} is also the log of another procmand (its supervisor is pid {first.supervisor_pid})"
    assert f"ERROR {said}" in second.said()
    assert [problem for problem in second.json("daemon", "status")["problems"] if said in problem]
    wait_until(lambda: len(first.json("daemon", "status")["problems"]) == 1)
    assert f"{path} is also the log" in first.json("daemon", "status")["problems"][0]


def test_what_two_outputs_have_in_common_is_one_problem(daemon: MakeDaemon) -> None:
    running = daemon(
        """
        [program.talker]
        command = "sh -c 'while :; do echo out; echo err >&2; sleep 0.05; done'"
        start_seconds = 0
        log = { path = "blocked/a.log", stderr = "separate" }
        """,
        start=False,
    )
    (running.folder / "blocked").write_text("no folder")
    running.start()

    def both() -> list[str]:
        dropped = [log for log in running.json("show", "talker")["log"] if log["dropped"]]
        assert len(dropped) == 2, dropped
        problems: list[str] = running.json("daemon", "status")["problems"]
        return problems

    problems = wait_until(both, 20)
    assert len(problems) == 1, problems
    assert problems[0] in running.ctl("daemon", "status").stdout

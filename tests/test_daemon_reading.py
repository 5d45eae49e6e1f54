"""procmanctl logs on a real daemon, and without one: merging, times, levels, compressed files, following."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest

from procman.ctl.library import Heard, Local, Places
from procman.ctl.main import main
from procman.logread import Follower, Position
from tests.conftest import MakeDaemon
from tests.harness import CTL, PROJECT, RunningDaemon, wait_until

IDLE = """
[program.{name}]
command = "${{PYTHON}} -S -E ${{PROGRAMS}}/ready.py"
"""
TWO = IDLE.format(name="web") + IDLE.format(name="api")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "TZ": "UTC"}
WAITS = b"procmanctl: the daemon has gone: waiting for it\n"


def stamped(hour: int, *lines: str) -> str:
    """Lines with a time each, a minute apart."""
    return "".join(f"2026-01-31 {hour:02}:{minute:02}:00,000 {line}\n" for minute, line in enumerate(lines))


def offline(running: RunningDaemon, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """procmanctl -c TABLE, which needs no daemon."""
    command = [sys.executable, "-c", CTL, "-c", str(running.table), *arguments]
    options = {"env": running.environment | {"TZ": "UTC"}, "capture_output": True, "text": True, **options}
    return subprocess.run(command, check=False, timeout=60, **options)


@contextmanager
def following(command: list[str], **options: Any) -> Iterator[IO[bytes]]:
    """What a command prints on and on."""
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(command, **options)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] in (b"", WAITS)


@pytest.fixture
def stopped(daemon: MakeDaemon) -> RunningDaemon:
    """A table whose daemon does not run, with logs that are there."""
    running = daemon(TWO, start=False)
    running.log_dir.mkdir()
    older, old = stamped(8, "INFO oldest"), stamped(9, "ERROR a", "INFO b")
    (running.log_dir / "web.log.2.gz").write_bytes(gzip.compress(older.encode()))
    (running.log_dir / "web.log.1").write_text(old)
    (running.log_dir / "web.log").write_text(stamped(10, "INFO c", "WARNING d", "INFO e"))
    (running.log_dir / "api.log").write_text(stamped(9, "INFO x") + stamped(10, "CRITICAL y"))
    return running


def test_logs_are_read_without_a_daemon_as_one_text_merged_by_time(stopped: RunningDaemon) -> None:
    done = offline(stopped, "logs")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] + line.split()[-1] for line in done.stdout.splitlines()] == [
        "weboldest", "weba", "apix", "webb", "webc", "apiy", "webd", "webe",
    ]  # fmt: skip
    last = (stamped(9, "ERROR a", "INFO b") + stamped(10, "INFO c", "WARNING d", "INFO e")).splitlines(keepends=True)
    assert offline(stopped, "logs", "-n", "4", "web").stdout == "".join(last[-4:])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--level", "warning"), "a y d"),
        (("--level", "error", "-n", "1"), "a y"),
        (("--grep", "INFO [be]"), "b e"),
        (("-i", "--grep", "info B"), "b"),
        (("--since", "2026-01-31 10:00"), "c y d e"),
        (("--until", "2026-01-31 09:00:30"), "oldest a x"),
        (("--since", "2026-01-31 09:00", "--until", "2026-01-31T09:59:00Z", "web"), "a b"),
        (("--since", "2026-01-31 09:00", "--level", "error", "-n", "5"), "a y"),
        (("-n", "0"), ""),
        (("--grep", "nothing of this"), ""),
    ],
)
def test_what_filters_choose(stopped: RunningDaemon, arguments: tuple[str, ...], found: str) -> None:
    done = offline(stopped, "logs", *arguments)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == found.split()


def test_the_last_minutes_in_an_hour_that_comes_twice(stopped: RunningDaemon) -> None:
    """Where the clock was set back half an hour ago, a line of ten minutes ago is no line of 70 minutes ago."""
    now = datetime.now(UTC)
    back = now - timedelta(minutes=30)
    day = min(back.timetuple().tm_yday, 365)
    half_a_year = (day + 181) % 365 + 1
    zone = f"STD0DST,J{half_a_year}/0,J{day}/{back.hour + 1}:{back.minute}:{back.second}"  # tzset(3)
    lines = [f"{now - timedelta(minutes=ago):%Y-%m-%d %H:%M:%S} INFO {ago}\n" for ago in (200, 20, 10, 5)]
    (stopped.log_dir / "web.log").write_text("".join(lines))
    env = stopped.environment | {"TZ": zone}
    assert offline(stopped, "logs", "--since", "15 min ago", "web", env=env).stdout == "".join(lines[2:])


def test_a_damaged_file_is_said(stopped: RunningDaemon) -> None:
    whole = b"".join(b"line %d\n" % number for number in range(5000))
    file = bytearray(gzip.compress(whole))
    file[len(file) // 2] ^= 1
    (stopped.log_dir / "web.log.1").unlink()
    (stopped.log_dir / "web.log.1.gz").write_bytes(file)
    for arguments in (["--since", "2000-01-01"], ["-n", "1000"], ["--level", "error"]):
        done = offline(stopped, "logs", *arguments, "web")
        assert done.returncode == 0
        assert done.stderr.startswith(f"procmanctl: {stopped.log_dir}/web.log.1.gz is damaged: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_time_that_no_calendar_has_stops_nothing(stopped: RunningDaemon) -> None:
    (stopped.log_dir / "web.log").write_text("9999-12-31T23:59:59-05:00 a\n0001-01-01T00:00:00+14:00 b\n")
    done = offline(stopped, "--json", "logs", "-n", "2", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["time"] for line in done.stdout.splitlines()] == [None, None]
    done = offline(stopped, "logs", "--summary", "web")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_has_no_time_is_placed_by_what_is_near(stopped: RunningDaemon) -> None:
    """Before the first time: there. Without any: where the file was last written. After a time: with it."""
    for path in stopped.log_dir.iterdir():
        path.unlink()
    web, api = stopped.log_dir / "web.log", stopped.log_dir / "api.log"
    api.write_text("begin\n" + stamped(9, "a") + "after a\n" + stamped(11, "b"))
    web.write_text("uvicorn has\nno times\n")
    at = datetime(2026, 1, 31, 10, tzinfo=UTC).timestamp()
    os.utime(web, (at, at))
    shown = [line.split(" | ")[1] for line in offline(stopped, "logs").stdout.splitlines()]
    assert shown == ["begin", stamped(9, "a")[:-1], "after a", "uvicorn has", "no times", stamped(11, "b")[:-1]]
    since = offline(stopped, "logs", "--since", "2026-01-31 10:30").stdout
    assert since == "api | " + stamped(11, "b")
    since = offline(stopped, "logs", "--since", "2026-01-31 09:30").stdout
    assert since == "web | uvicorn has\nweb | no times\napi | " + stamped(11, "b")


def test_the_daemon_tells_the_same_as_the_files(stopped: RunningDaemon) -> None:
    stopped.start()
    stopped.wait_for("web")
    for arguments in (["-n", "20"], ["--level", "warning"], ["--json", "-g", "INFO"], ["--since", "2026-01-31 09:30"]):
        with_daemon = stopped.ctl("logs", *arguments, env=ENVIRONMENT)
        assert with_daemon.returncode == 0, with_daemon.stderr
        assert with_daemon.stdout == offline(stopped, "logs", *arguments).stdout
        assert "oldest" in with_daemon.stdout or arguments[0] != "-n"


@pytest.mark.parametrize(("kind", "why"), [("a symlink", "is not followed"), ("a folder", "it is no regular file")])
def test_a_log_that_is_no_file_is_named(stopped: RunningDaemon, kind: str, why: str) -> None:
    """With a daemon and without one. What was rotated before is read all the same."""
    path = stopped.log_dir / "web.log"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("api.log")
    done = offline(stopped, "logs", "web")
    stopped.start()
    for said in (done, stopped.ctl("logs", "web")):
        assert said.returncode == 0
        assert [line.split()[-1] for line in said.stdout.splitlines()] == ["oldest", "a", "b"]
        assert said.stderr.startswith(f"procmanctl: web: {path} is not read: it is ")
        assert why in said.stderr


def test_a_daemon_that_is_asked_by_its_table(stopped: RunningDaemon) -> None:
    stopped.start()
    stopped.wait_for("web")
    stopped.log_dir.rename(stopped.log_dir.with_name("elsewhere"))
    try:
        assert offline(stopped, "status").returncode == 0
        assert offline(stopped, "logs").stdout == ""
    finally:
        stopped.log_dir.with_name("elsewhere").rename(stopped.log_dir)


def test_following_goes_on_through_rotation_and_a_killed_supervisor(daemon: MakeDaemon) -> None:
    """Each line once and in order, whatever happens meanwhile."""
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line; done < fifo'"
        start_seconds = 0
        log = { max_size = "1KB", keep = 50 }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "logs", "-f", "-n", "999", "-g", "line", "lines"]
    with open(running.folder / "fifo", "w") as fifo, following(command) as shown:
        for part in range(3):
            for number in range(part * 40, part * 40 + 40):
                print(f"line {number} {'x' * 30}", file=fifo, flush=True)
            for number in range(part * 40, part * 40 + 40):
                assert shown.readline().split()[1] == str(number).encode()
            if part == 1:
                os.kill(running.supervisor_pid, signal.SIGKILL)
    assert len(list(running.log_dir.glob("lines.log.*"))) >= 3


def test_a_client_that_comes_back_after_rotations_and_compression_gets_the_rest(daemon: MakeDaemon) -> None:
    """Its place was in a file whose inode another one may have by then."""
    running = daemon(
        """
        [program.lines]
        command = "sh -c 'while read line; do echo $line; done < fifo'"
        start_seconds = 0
        log = { max_size = "1KB", keep = 50 }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    lines = [f"line {number} {'x' * 30}\n" for number in range(120)]
    places: list[dict[str, Any]] = []

    class Enough(Exception):
        pass

    def follow(after: list[dict[str, Any]], size: int) -> str:
        found: list[str] = []

        def heard(method: str, params: Any) -> None:
            if method == "log":
                found.append(params["text"])
                places.append({key: params[key] for key in ("name", "stream", "file", "offset")})
            if sum(map(len, found)) >= size:
                raise Enough

        with running.client() as client, pytest.raises(Enough):
            client.stream("logs", heard, names=["lines"], lines=0, follow=True, after=after)
        return "".join(found)

    with open(running.folder / "fifo", "w") as fifo:
        fifo.writelines(lines[:10])
        fifo.flush()
        wait_until(lambda: running.log("lines").endswith(lines[9]))
        first, rest = "".join(lines[:10]), "".join(lines[10:])
        assert follow([{"name": "lines", "stream": "out", "file": "0:0", "offset": 0}], len(first)) == first
        fifo.writelines(lines[10:])
        fifo.flush()
        wait_until(lambda: not [one for one in running.log_dir.glob("lines.log.[0-9]*") if one.suffix != ".gz"])
        wait_until(lambda: running.log("lines").endswith(lines[-1]))
        assert follow(places[-1:], len(rest)) == rest


def test_following_without_a_daemon(stopped: RunningDaemon) -> None:
    command = [sys.executable, "-c", CTL, "-c", str(stopped.table), "logs", "-f", "-n", "1", "--level", "error"]
    with following(command, env=stopped.environment | {"TZ": "UTC"}) as shown:
        assert {shown.readline().split()[-1], shown.readline().split()[-1]} == {b"a", b"y"}
        with (stopped.log_dir / "api.log").open("a") as file:
            file.write(stamped(11, "INFO no", "ERROR yes"))
        assert shown.readline().split()[-1] == b"yes"
        (stopped.log_dir / "api.log").rename(stopped.log_dir / "api.log.1")
        (stopped.log_dir / "api.log").write_text(stamped(12, "ERROR after"))
        assert shown.readline().split()[-1] == b"after"


def test_a_terminal_gets_no_sequence_that_could_harm_it(stopped: RunningDaemon) -> None:
    (stopped.log_dir / "web.log").write_bytes(b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \xff\x00\n")
    for raw, expected in (
        ([], b"\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x9b2J \\xff\\x00\x1b[0m"),
        (["--raw"], b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \xff\x00"),
    ):
        reader, terminal = pty.openpty()
        command = [sys.executable, "-c", CTL, "-c", str(stopped.table), "logs", "-n", "1", "web", *raw]
        process = subprocess.Popen(command, env=stopped.environment, stdout=terminal, stdin=subprocess.DEVNULL)
        os.close(terminal)
        shown = b""
        while not shown.endswith(b"\n"):
            shown += os.read(reader, 1000)
        assert process.wait(20) == 0
        os.close(reader)
        assert shown.rstrip(b"\r\n") == expected


CRASH = """
import sys
def deep(): raise KeyError("no such thing")
try: deep()
except KeyError as error: raise RuntimeError("can't begin") from error
"""


@pytest.mark.parametrize("log", ["", 'log = { mode = "inherit" }', 'log = { mode = "inherit", stderr = "separate" }'])
def test_the_end_of_a_program_that_fails_carries_its_traceback(daemon: MakeDaemon, log: str) -> None:
    running = daemon(
        f"""
        [program.bad]
        {log}
        command = ["${{PYTHON}}", "-S", "-E", "bad.py"]
        start_retries = 0
        [program.none]
        {log}
        command = "false"
        start_retries = 0
        """,
        start=False,
    )
    (running.folder / "bad.py").write_text(CRASH)
    running.start()
    running.wait_for("bad", "FATAL")
    running.wait_for("none", "FATAL")

    def fatal() -> dict[str, Any]:
        events = [json.loads(line) for line in running.ctl("--json", "events").stdout.splitlines()]
        found = {event["name"]: event for event in events if event.get("state") == "FATAL"}
        assert found.keys() == {"bad", "none"}
        return found

    events = wait_until(fatal)
    trace = events["bad"]["traceback"]
    assert (trace["exception"], trace["message"]) == ("RuntimeError", "can't begin")
    assert "KeyError: 'no such thing'" in trace["text"]
    assert events["none"]["traceback"] is None
    assert running.json("why", "bad")["traceback"] == trace
    assert running.json("why", "bad")["output"][-1] == "RuntimeError: can't begin"
    assert running.json("why", "none")["output"] == []
    shown = running.ctl("why", "bad").stdout
    assert shown.count("RuntimeError: can't begin") == 1
    assert "last traceback:\n  Traceback (most recent call last):" in shown
    assert "  | RuntimeError: can't begin" in running.ctl("events").stdout


def test_summary_as_json_and_as_text(stopped: RunningDaemon) -> None:
    trace = "Traceback (most recent call last):\n  File \"a.py\", line 1, in f\nValueError: {}\n"
    with (stopped.log_dir / "web.log").open("a") as file:
        for number in range(3):
            file.write(stamped(11, "ERROR it failed") + trace.format(number))
        file.write('127.0.0.1 - - [31/Jan/2026:11:00:09 +0000] "GET /slow/7 HTTP/1.1" 500 2 "-" "-" 1500.0ms\n')
    summary = json.loads(offline(stopped, "--json", "logs", "--summary").stdout)
    web = summary["logs"][0]
    assert (web["name"], web["lines"], web["levels"]["error"], web["statuses"]) == ("web", 19, 4, {"5xx": 1})
    assert [(error["exception"], error["count"]) for error in web["errors"]] == [("ValueError", 3)]
    assert web["errors"][0]["sample"].endswith("ValueError: 0")
    assert web["paths"][0] == {
        "method": "GET", "path": "/slow/*", "count": 1, "errors": 1, "average_seconds": 1.5, "slowest_seconds": 1.5,
    }  # fmt: skip
    assert summary["all"]["lines"] == 21
    text = offline(stopped, "logs", "--summary", "web").stdout
    assert "3 × ValueError: 0, 2026-01-31 11:00:00" in text
    assert "GET /slow/*" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--since", "whenever"), "--since: 'whenever' is no time: it must be like"),
        (("--until", "25:99"), "--until: '25:99' is no time"),
        (("--level", "loud"), "--level: 'loud' is none: it must be debug, info"),
        (("--grep", "("), "--grep: '(' is no regular expression: missing )"),
        (("--since", "09:00", "--until", "2020-01-31"), "--since 09:00 is later than --until 2020-01-31"),
        (("-f", "--summary"), "-f never ends"),
        (("-f", "--until", "1h"), "-f never ends"),
        (("-n", "ten"), "'ten' is no number of lines"),
    ],
)
def test_wrong_use_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-c", CTL, "-s", str(tmp_path / "s"), "logs", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("option", ["--since", "--until"])
@pytest.mark.parametrize("more", [(), ("--summary",), ("--level", "error")])
def test_a_log_without_times_is_said(stopped: RunningDaemon, option: str, more: tuple[str, ...]) -> None:
    (stopped.log_dir / "web.log.2.gz").unlink()
    (stopped.log_dir / "web.log.1").unlink()
    (stopped.log_dir / "web.log").write_text("one\ntwo\n")
    done = offline(stopped, "logs", option, "1 min ago", *more)
    assert done.returncode == 0
    assert done.stderr == (
        "procmanctl: web: lines there tell no time, so --since and --until can't choose among them;"
        " log = { timestamps = true } in the program table puts one before each line\n"
    )
    assert offline(stopped, "logs", option, "1 min ago", *more, "api").stderr == ""
    assert offline(stopped, "logs", "web").stderr == ""


ELSEWHERE = {
    "": (True, 'its standard error is in DIR/web.log with the rest (log.stderr = "merge"): leave out --stderr'),
    'stderr = "discard"': (True, 'its standard error is dropped (log.stderr = "discard")'),
    'mode = "discard"': (False, 'its output is dropped (log.mode = "discard")'),
    'mode = "inherit"': (False, "its output goes to the stdout of procmand, or what that was started with"),
    'mode = "syslog"': (True, 'its output goes to the syslog of the machine (log.mode = "syslog")'),
    'mode = "journal"': (False, "its output goes to the journal: journalctl PROCMAN_PROGRAM=web (log.mode"),
}


@pytest.mark.parametrize("log", ELSEWHERE)
def test_where_output_goes_that_is_in_no_log(daemon: MakeDaemon, log: str) -> None:
    """With a daemon and without one."""
    running = daemon(IDLE.format(name="web") + f"log = {{ {log} }}\n" + IDLE.format(name="api"), start=False)
    stderr, words = ELSEWHERE[log]
    asked = ("logs", *(["--stderr"] if stderr else []), "web")
    done = offline(running, *asked)
    assert done.stderr.startswith(f"procmanctl: web: {words.replace('DIR', str(running.log_dir))}"), done.stderr
    assert done.stdout == ""
    running.start()
    assert running.ctl(*asked).stderr == done.stderr
    assert running.ctl("logs").stderr == ""  # of all: there are others


def test_a_table_that_is_bad_is_said_offline(stopped: RunningDaemon) -> None:
    stopped.write_table("[program.web]\ncomand = 'x'\n")
    done = offline(stopped, "logs")
    assert done.returncode == 1
    assert "unknown key" in done.stderr
    assert offline(stopped, "logs", "nobody").returncode == 1


MEASURED = """
import sys
from pathlib import Path
from procman.ctl.main import main
status = main()
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("peak", peak, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize("running_daemon", [False, True])
def test_hostile_content_is_read_in_little_memory(stopped: RunningDaemon, running_daemon: bool) -> None:
    """A line of 30 MB; a hole of 50 MB, which is a line of NULs; what is no UTF-8; no newline at the end."""
    with (stopped.log_dir / "web.log").open("wb") as file:
        file.write(stamped(7, "ERROR first").encode())
        file.write(b"2026-01-31 08:00:00,000 ERROR " + b"x" * 30_000_000 + b"\n")
        file.seek(50_000_000, os.SEEK_CUR)
        file.write(b"\n" + stamped(9, "INFO last").encode() + b"\xff\xfe no end")
    (stopped.log_dir / "web.log.1").unlink()
    (stopped.log_dir / "web.log.2.gz").unlink()
    where = ["-s", str(stopped.socket)] if running_daemon else ["-c", str(stopped.table)]
    if running_daemon:
        stopped.write_table(TWO.replace("${PYTHON} -S -E ${PROGRAMS}/ready.py", "sleep 1000"))
        stopped.start()
    ways = [
        (["-n", "2"], b"INFO last\n\xff\xfe no end"),
        (["--grep", "first|last"], b"INFO last\n"),
        (["--level", "error", "-n", "1", "--until", "2026-01-31 07:30"], b"ERROR first\n"),
        (["--summary"], b"error 2"),
    ]
    for arguments, end in ways[:2] if running_daemon else ways:
        command = [sys.executable, "-c", MEASURED, *where, "logs", "web", *arguments]
        environment = stopped.environment | {"TZ": "UTC"}
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert end in done.stdout[-5000:], (arguments, done.stdout[-300:])
        assert int(done.stderr.split()[-1]) < 60_000, arguments  # KB
    if running_daemon:
        status = Path(f"/proc/{stopped.supervisor_pid}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        assert peak < 60_000


@pytest.mark.parametrize("log", ["timestamps = true", 'format = "json"', "timestamps = false"])
def test_what_procman_adds_to_lines_and_files_is_understood(daemon: MakeDaemon, log: str) -> None:
    """Levels and tracebacks, whatever procman puts around lines; and files that it has compressed."""
    running = daemon(
        f"""
        [program.app]
        command = ["${{PYTHON}}", "-S", "-E", "app.py"]
        restart = "never"
        start_seconds = 0
        log = {{ max_size = "8KB", keep = 99, {log} }}
        """,
        start=False,
    )
    (running.folder / "app.py").write_text(
        "import traceback\n"
        "for number in range(1000):\n"
        "    print('INFO number', number, flush=True)\n"
        "    if number % 250 == 99:\n"
        "        print('ERROR it failed', number, flush=True)\n"
        "        try: {}[number]\n"
        "        except KeyError: print(traceback.format_exc(), end='', flush=True)\n"
    )
    running.start()
    running.wait_for("app", "EXITED", 30)
    wait_until(lambda: list(running.log_dir.glob("app.log.*.gz")), 30)

    def numbers() -> bool:
        shown = [json.loads(line) for line in running.ctl("--json", "logs", "-n", "99999", "app").stdout.splitlines()]
        texts = [json.loads(line["text"])["message"] if "json" in log else line["text"] for line in shown]
        assert [int(text.split()[-1]) for text in texts if "INFO number" in text] == list(range(1000))
        return True

    wait_until(numbers, 30)
    errors = running.ctl("logs", "--level", "error", "-n", "2", "app").stdout
    assert (errors.count("ERROR it failed"), errors.count("KeyError: ")) == (2, 2)
    assert "ERROR it failed 849" in errors
    summary = running.json("logs", "--summary")["logs"][0]
    assert [(error["exception"], error["count"]) for error in summary["errors"]] == [("KeyError", 4)]
    assert summary["levels"] == {"info": 1000, "error": 4}
    assert (summary["first"] is not None) == (log != "timestamps = false")
    since = running.ctl("logs", "--since", "1h ago", "--grep", "number 5$|number 5\"", "app").stdout
    assert since.count("INFO number 5") == 1
    assert running.json("why", "app")["traceback"]["message"] == "849"


def test_a_program_that_lives_by_another_zone_than_the_machine(daemon: MakeDaemon) -> None:
    """Django gives its process the zone of its settings. Beside its lines are those of an access log, with a zone; in
    the other log there are none."""
    running = daemon(
        """
        [defaults]
        restart = "never"
        start_seconds = 0

        [program.mixed]
        command = ["${PYTHON}", "app.py", "+0000"]

        [program.alone]
        command = ["${PYTHON}", "app.py"]
        """,
        start=False,
    )
    (running.folder / "app.py").write_text(
        "import django, logging, sys, time\n"
        "from django.conf import settings\n"
        "settings.configure(TIME_ZONE='UTC', LOGGING_CONFIG=None)\n"
        "django.setup()\n"
        "logging.basicConfig(level='INFO', format='%(asctime)s %(levelname)s %(message)s')\n"
        "for number in range(50):\n"
        "    logging.info('view %d', number)\n"
        "    for zone in sys.argv[1:]:\n"
        "        now = time.strftime('%d/%b/%Y:%H:%M:%S ' + zone)\n"
        "        print(f'1.1.1.1 - - [{now}] \"GET / HTTP/1.1\" 200 2 \"-\" \"-\"', file=sys.stderr)\n"
    )
    running.start()
    for name in ("mixed", "alone"):
        running.wait_for(name, "EXITED", 30)
    for zone in ("CET-1", "EST5"):
        env = running.environment | {"TZ": zone}
        for name, count in (("mixed", 100), ("alone", 50)):
            for arguments in (("--since", "10 min ago"), ("--since", "10 min ago", "--until", "now", "--grep", " ")):
                shown = offline(running, "logs", *arguments, name, env=env)
                assert len(shown.stdout.splitlines()) == count, (zone, name, arguments, shown)
                words = f"{name}: times there that name no zone are not local time: they are taken for UTC\n"
                assert shown.stderr == f"procmanctl: {words}"
            assert offline(running, "logs", "--until", "10 min ago", name, env=env).stdout == ""
        merged = offline(running, "logs", "-n", "1000", env=env).stdout.splitlines()
        assert len(merged) == 150
        lines = offline(running, "--json", "logs", env=env).stdout.splitlines()
        times = [json.loads(line)["time"] for line in lines]
        assert all(abs(datetime.fromisoformat(at) - datetime.now(UTC)) < timedelta(minutes=10) for at in times)


@pytest.mark.parametrize("log", ["", "timestamps = true"])
def test_following_goes_on_in_another_file(daemon: MakeDaemon, log: str) -> None:
    """When a table moves the log: also into a file that holds something, of which nothing is shown."""
    table = """
        [program.lines]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/writer.py 200"
        start_seconds = 0
        log = {{ {log} }}
        """
    settings = [log, *(", ".join(filter(None, (log, f'path = "{path}"'))) for path in ("new/a.log", "b.log"))]
    running = daemon(table.format(log=settings[0]))
    (running.folder / "b.log").write_text("something old\n" * 5)
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "logs", "-f", "-n", "1", "lines"]
    said = running.folder / "said"
    numbers: list[int] = []

    def follow(shown: IO[bytes], count: int) -> None:
        for _ in range(count):
            line = shown.readline()
            assert b"old" not in line
            numbers.append(int(line.split()[-2]))

    with said.open("wb") as stderr:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            follow(process.stdout, 20)
            for each in settings[1:]:
                running.write_table(table.format(log=each))
                assert running.ctl("apply").returncode == 0
                follow(process.stdout, 200)
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.close()
            process.wait(20)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    files = [f"procmanctl: lines: its log is {running.folder}/{name} now\n" for name in ("new/a.log", "b.log")]
    assert said.read_text() == "".join(files)


DIES = """
import sys, time
for line in {lines!r}:
    sys.stderr.write(line)
    sys.stderr.flush()
    time.sleep(0.02)
"""
READY = "2026-01-31 12:00:00,000 INFO ready\n"
NEEDLE = [
    "Traceback (most recent call last):\n",
    '  File "/srv/shop/job.py", line 3, in work\n',
    "    check(order)\n",
    "ValueError: needle\n",
]


def test_following_takes_a_record_whole(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A traceback is printed in small pieces, and what is looked for stands in its last line."""
    script = tmp_path / "dies.py"
    others = [line.replace("needle", "other") for line in NEEDLE]
    script.write_text(DIES.format(lines=[READY, *NEEDLE, READY, *others] * 100))
    running = daemon(f'[program.job]\ncommand = ["${{PYTHON}}", "{script}"]\nstart_seconds = 0\n')
    command = [sys.executable, "-c", CTL, "-s", str(running.socket), "logs", "-f", "-n", "0", "--grep", "needle", "job"]
    with following(command) as shown:
        lines = [shown.readline().decode() for _ in range(5 * len(NEEDLE))]
    begin = next(index for index, line in enumerate(lines) if line == NEEDLE[0])
    assert begin < len(NEEDLE)  # it may begin within one
    assert lines[begin:] == (NEEDLE * 5)[: len(lines) - begin]


@pytest.mark.parametrize("before", [0, 60, 600])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_record_that_is_written_while_following_begins_is_whole(
    stopped: RunningDaemon,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    earlier: int,
    before: int,
) -> None:
    """Its first lines are there when the command begins, and what is looked for comes then."""
    path = stopped.log_dir / "web.log"
    others = "".join(READY.replace("ready", f"{number} {'x' * before}") for number in range(500 if before else 0))

    def follow(library: Local, places: Places, heard: Heard) -> None:
        ((key, (file, offset)),) = places.items()
        with contextlib.closing(Follower(str(path), Position.of(file, offset))) as follower:
            for line in [*NEEDLE[cut:], READY, *NEEDLE, READY]:
                with path.open("a") as log:
                    log.write(line)
                heard(key, follower.read())

    monkeypatch.setattr(Local, "follow", follow)
    for name, value in stopped.environment.items():
        monkeypatch.setenv(name, value)
    for cut in range(1, len(NEEDLE)):
        for count in ([], ["-n", "0"], ["-n", "1"]):
            path.write_text("".join([*[READY, *NEEDLE] * earlier, READY, others, READY, *NEEDLE[:cut]]))
            assert main(["-c", str(stopped.table), "logs", "-f", "--grep", "needle", *count, "web"]) == 0
            shown = capfdbinary.readouterr().out.decode()
            assert shown == "".join(NEEDLE * (2 + min(earlier, int(count[1]) if count else 10)))

"""Where output goes and how its lines look, through the whole daemon: inherit, syslog, the journal, times, JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import syslogs
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, wait_until
from tests.test_lines import fields

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

needs_namespace = pytest.mark.skipif(not syslogs.possible(), reason="a /dev of its own needs root and unshare(1)")

FIFO = "sh -c 'while read -r line; do echo \\\"$line\\\"; done < fifo'"
"""A program that prints what the test tells it."""


def counters(running: RunningDaemon, name: str) -> dict[str, Any]:
    with running.client() as client:
        found: dict[str, Any] = client.call("show", name=name)["log"][0]
    assert found["read"] == found["written"] + found["dropped"] + found["held"], found
    return found


def wait_for_bytes(running: RunningDaemon, count: int) -> None:
    """Until so many bytes of the talker are written."""

    def written() -> bool:
        found = counters(running, "talker")
        assert found["written"] == count, found
        return True

    wait_until(written)


def with_fifo(make: MakeDaemon, log: str) -> RunningDaemon:
    """A daemon, not started yet, with one program that prints what goes into `fifo`."""
    running = make(table_with(log), start=False)
    os.mkfifo(running.folder / "fifo")
    return running


def table_with(log: str) -> str:
    return f'[program.talker]\ncommand = "{FIFO}"\nstart_seconds = 0\nlog = {{ {log} }}\n'


BOTH = """
    [defaults]
    command = "sh -c 'echo out; echo err >&2; printf unfinished; exec sleep 1000'"
    start_seconds = 0
    """


def test_times_and_json_with_stderr_merged_and_apart(daemon: MakeDaemon) -> None:
    running = daemon(
        f"""{BOTH}
        [program.times]
        log = {{ timestamps = true }}
        [program.apart]
        log = {{ timestamps = true, stderr = "separate" }}
        [program.json]
        instances = 2
        log = {{ format = "json", stderr = "separate" }}
        """
    )
    wait_until(lambda: re.fullmatch(f"{TIME} out\n{TIME} err\n", running.log("times")))
    wait_until(lambda: re.fullmatch(f"{TIME} out\n", running.log("apart")))
    wait_until(lambda: re.fullmatch(f"{TIME} err\n", running.log("apart.err")))
    wait_until(lambda: running.log("json-2") and running.log("json-2.err"))
    assert counters(running, "json:2")["held"] == len("unfinished")
    running.ctl("stop", "all")
    lines = [json.loads(line) for line in running.log("json-2").splitlines()]
    assert [line["message"] for line in lines] == ["out", "unfinished"]
    assert [line["message"] for line in map(json.loads, running.log("json-2.err").splitlines())] == ["err"]
    assert all((line["program"], line["instance"], line["stream"]) == ("json", 2, "stdout") for line in lines)
    assert re.fullmatch(f"(?s).*{TIME} unfinished\n", running.log("times"))


def test_an_unfinished_line_outlives_the_supervisor(daemon: MakeDaemon) -> None:
    """The first half was taken by the one that is killed, the second half comes to its successor."""
    running = daemon(
        """
        [program.slow]
        command = "sh -c 'printf first-; read line < fifo; echo second; exec sleep 1000'"
        start_seconds = 0
        log = { format = "json" }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    wait_until(lambda: counters(running, "slow")["held"] == 6)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers, 20)
    assert counters(running, "slow")["held"] == 6
    assert running.ctl("daemon", "upgrade").returncode == 0
    assert counters(running, "slow")["held"] == 6
    (running.folder / "fifo").write_text("go\n")
    wait_until(lambda: running.log("slow"))
    assert [json.loads(line)["message"] for line in running.log("slow").splitlines()] == ["first-second"]


def test_an_unfinished_line_is_counted_that_the_keeper_took_with_it(daemon: MakeDaemon) -> None:
    """The memory that holds it goes with keeper and supervisor. The pipe does not: the program has it."""
    running = daemon(
        """
        [program.slow]
        command = "sh -c 'printf first; read line < fifo; echo second; exec sleep 1000'"
        start_seconds = 0
        log = { timestamps = true }
        """,
        start=False,
    )
    os.mkfifo(running.folder / "fifo")
    running.start()
    pid = wait_until(lambda: counters(running, "slow")["held"] == 5 and running.status()["slow"]["pid"])
    state = running.folder / "state" / "state.json"
    has = lambda: state.exists() and '"held": 5' in json.dumps(json.loads(state.read_text()))  # noqa: E731
    wait_until(has, 20, "the state file has it")
    os.kill(running.keeper_pid, signal.SIGKILL)
    assert running.process is not None
    running.process.wait(10)
    running.start()
    assert running.wait_for("slow")["pid"] == pid
    (running.folder / "fifo").write_text("go\n")
    lost = f"{TIME} procman: 5 bytes of output were dropped: procman was restarted\n"
    wait_until(lambda: re.fullmatch(f"{lost}{TIME} second\n", running.log("slow")))


def test_inherit_keeps_stdout_and_stderr_apart(daemon: MakeDaemon) -> None:
    running = daemon(
        f"""{BOTH}
        [program.merged]
        log = {{ mode = "inherit" }}
        [program.apart]
        log = {{ mode = "inherit", stderr = "separate", timestamps = true }}
        [program.json]
        log = {{ mode = "inherit", format = "json" }}
        [program.quiet]
        log = {{ mode = "inherit", stderr = "discard" }}
        """,
        start=False,
    )
    errors = running.folder / "daemon.err"
    running.start(prefix=["sh", "-c", f'exec "$@" 2>{errors}', "sh"])
    stdout = running.said
    wait_until(lambda: "merged | out\n" in stdout() and "merged | err\n" in stdout())
    wait_until(lambda: re.search(f"^apart \\| {TIME} out$", stdout(), re.MULTILINE))
    wait_until(lambda: re.search(f"^apart \\| {TIME} err$", errors.read_text(), re.MULTILINE))
    wait_until(lambda: "quiet | out\n" in stdout())
    wait_until(lambda: len(re.findall(r"^\{.*\}$", stdout(), re.MULTILINE)) == 2)
    found = [json.loads(line) for line in re.findall(r"^\{.*\}$", stdout(), re.MULTILINE)]
    assert [(each["program"], each["message"]) for each in found] == [("json", "out"), ("json", "err")]
    assert "quiet | err" not in stdout() + errors.read_text()


@pytest.mark.parametrize(
    ("environment", "coloured"), [({"TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_names_are_coloured_on_a_terminal(daemon: MakeDaemon, environment: dict[str, str], coloured: bool) -> None:
    talker = r'command = ["sh", "-c", "printf \"\\033]0;title\\007\\thi\\n\"; echo out; exec sleep 1000"]'
    running = daemon(f'{BOTH}\n[program.talker]\n{talker}\nlog.mode = "inherit"', start=False)
    running.environment.pop("NO_COLOR", None)
    running.environment |= environment
    ours, theirs = pty.openpty()
    running.start(prefix=["sh", "-c", f'exec "$@" >{os.ttyname(theirs)}', "sh"])
    shown = b""

    def said() -> bool:
        nonlocal shown
        while select.select([ours], [], [], 0)[0]:
            shown += os.read(ours, 4096)
        return b"out" in shown

    wait_until(said)
    running.stop()
    os.close(theirs)
    os.close(ours)
    expected = rb"\x1b\[\d\dmtalker \|\x1b\[0m out" if coloured else rb"(?m)^talker \| out"
    assert re.search(expected, shown), shown
    assert b"\\x1b]0;title\\x07\thi" in shown  # nothing that could change the terminal


@needs_namespace
def test_syslog_and_the_journal(daemon: MakeDaemon) -> None:
    running = daemon(
        f"""{BOTH}
        [program.sys]
        log = {{ mode = "syslog" }}
        [program.sysapart]
        log = {{ mode = "syslog", stderr = "separate" }}
        [program.jour]
        instances = 2
        log = {{ mode = "journal", stderr = "separate" }}
        [program.long]
        command = "sh -c 'head -c 300000 /dev/zero | tr \\\\\\\\0 x; echo; exec sleep 1000'"
        log = {{ mode = "journal" }}
        """,
        start=False,
    )
    syslog, journal = (syslogs.Reader(running.folder / f"{name}.sock") for name in ("syslog", "journal"))
    try:
        running.start(prefix=syslogs.prefix(running.folder))
        host = re.escape(os.uname().nodename)
        wanted = [
            *(("30", "sys", "stdout", "out"), ("30", "sys", "stdout", "err")),
            *(("30", "sysapart", "stdout", "out"), ("27", "sysapart", "stderr", "err")),
        ]
        for priority, name, stream, text in wanted:
            pattern = f"<{priority}>1 {TIME} {host} {name} {name} {stream} - {text}".encode()
            wait_until(lambda pattern=pattern: any(re.fullmatch(pattern, each) for each in syslog.messages))  # type: ignore[misc]
        wait_until(lambda: len(journal.messages) == 5)
        entries = [fields(each) for each in journal.messages]
        second = [each for each in entries if each["PROCMAN_PROCESS"] == b"jour:2"]
        told = {(each["PROCMAN_STREAM"], each["PRIORITY"], each["MESSAGE"]) for each in second}
        assert told == {(b"stdout", b"6", b"out"), (b"stderr", b"3", b"err")}
        assert {(each["PROCMAN_PROGRAM"], each["PROCMAN_INSTANCE"]) for each in second} == {(b"jour", b"2")}
        [long] = [each for each in entries if each["SYSLOG_IDENTIFIER"] == b"long"]
        assert long["MESSAGE"] == b"x" * 300_000
        assert journal.large == 1, "it does not fit into a datagram"
        assert running.stop() == 0
        wait_until(lambda: sum(each.endswith(b" - unfinished") for each in syslog.messages) == 2)
    finally:
        syslog.close()
        journal.close()


@needs_namespace
def test_a_syslogd_that_is_restarted_is_found_again_and_one_that_stays_away_stops_nobody(daemon: MakeDaemon) -> None:
    running = with_fifo(daemon, 'mode = "syslog"')
    path = running.folder / "syslog.sock"
    reader = syslogs.Reader(path)
    try:
        running.start(prefix=syslogs.prefix(running.folder))
        with open(running.folder / "fifo", "w") as fifo:

            def tell(text: str) -> None:
                print(text, file=fifo, flush=True)

            tell("one")
            wait_until(lambda: len(reader.messages) == 1)
            reader.close()
            reader = syslogs.Reader(path)
            tell("two")
            wait_until(lambda: [each.partition(b" - ")[2] for each in reader.messages] == [b"two"])
            reader.close()
            tell("three")
            wait_until(lambda: counters(running, "talker")["dropped"] == 6, what="it does not wait for ever")
            assert "/dev/log: " in counters(running, "talker")["error"]
            assert running.status()["talker"]["state"] == "RUNNING"
            reader = syslogs.Reader(path)
            wait_until(lambda: reader.messages, what="it is told, though the program prints no more")
        told = reader.messages[0].partition(b" - ")[2].decode()
        dropped = counters(running, "talker")["dropped"]
        assert told.startswith(f"procman: {dropped} bytes of output were dropped: /dev/log: "), told
        assert counters(running, "talker")["unreported"] == 0
    finally:
        reader.close()


@needs_namespace
def test_apply_changes_where_lines_go_and_the_program_never_notices(daemon: MakeDaemon) -> None:
    running = with_fifo(daemon, "")
    syslog, journal = (syslogs.Reader(running.folder / f"{name}.sock") for name in ("syslog", "journal"))
    path = running.log_dir / "talker.log"
    try:
        running.start(prefix=syslogs.prefix(running.folder))
        pid = running.wait_for("talker")["pid"]
        modes = (f'mode = "{mode}"' for mode in ("inherit", "syslog", "journal"))
        logs = ("", "timestamps = true", 'format = "json"', *modes, "")
        with open(running.folder / "fifo", "w") as fifo:
            for number, log in enumerate(logs):
                running.write_table(table_with(log))
                done = running.ctl("apply")
                assert done.returncode == 0, done.stderr
                print(f"line {number}", file=fifo, flush=True)
                wait_for_bytes(running, 7 * (number + 1))
            assert running.wait_for("talker")["pid"] == pid
    finally:
        syslog.close()
        journal.close()
    first, times, json_line, last = path.read_text().splitlines()
    assert (first, last) == ("line 0", "line 6")
    assert re.fullmatch(f"{TIME} line 1", times)
    assert json.loads(json_line)["message"] == "line 2"
    assert "talker | line 3\n" in running.said()
    assert [each.partition(b" - ")[2] for each in syslog.messages] == [b"line 4"]
    assert [fields(each)["MESSAGE"] for each in journal.messages] == [b"line 5"]


def test_a_line_without_an_end_that_fills_the_pipe_stops_nobody(daemon: MakeDaemon) -> None:
    code = "import os, time; os.write(1, b'x' * 3_000_000); os.write(1, b'\\\\nready\\\\n'); time.sleep(1000)"
    running = daemon(
        f"""
        [program.long]
        command = ["${{PYTHON}}", "-S", "-E", "-c", "{code}"]
        log = {{ timestamps = true }}
        ready = {{ log = "^ready" }}
        """
    )
    running.wait_for("long", timeout=20)
    wait_until(lambda: counters(running, "long")["written"] == 3_000_007)  # it is ready a moment before that
    assert counters(running, "long")["lines_split"] == 45


def test_a_pipe_of_the_raw_mode_has_no_spool(daemon: MakeDaemon) -> None:
    """Nothing is kept where nothing asks for lines: what is held is the pipe alone."""
    running = daemon(f"{BOTH}\n[program.raw]\n[program.times]\nlog.timestamps = true")
    running.wait_for("raw")
    running.wait_for("times")
    links = Path(f"/proc/{running.keeper_pid}/fd")
    spools = [fd for fd in links.iterdir() if "procman-output" in os.readlink(fd)]
    assert len(spools) == 1


def test_the_end_of_the_daemon_waits_for_a_slow_reader_of_its_stdout(daemon: MakeDaemon) -> None:
    """A program prints half a megabyte when it is stopped; a collector reads 800 KB a second."""
    running = daemon(
        """
        [program.talker]
        command = "${PYTHON} -u ${PROGRAMS}/last_words.py 5000"
        start_seconds = 0
        log = { mode = "inherit" }
        """,
        start=False,
    )
    reader, stdout = os.pipe()
    output, running.output = running.output, Path(f"/proc/self/fd/{stdout}")
    running.start()
    running.output = output
    os.close(stdout)
    wait_until(lambda: counters(running, "talker")["written"])
    chunks: list[bytes] = []

    def read_slowly() -> None:
        while data := os.read(reader, 16384):
            chunks.append(data)
            time.sleep(0.02)

    reading = threading.Thread(target=read_slowly)
    reading.start()
    try:
        assert running.stop() == 0
    finally:
        reading.join(20)
        os.close(reader)
    found = re.findall(rb"^talker \| (\d+) x+$", b"".join(chunks), re.MULTILINE)
    assert list(map(int, found)) == list(range(5000))


def test_syslog_elsewhere(daemon: MakeDaemon) -> None:
    """At another socket, by UDP, and by UDP at another address as soon as the table says so."""
    table = "\n".join(
        f'[program.{name}]\ncommand = "sh -c \'while :; do echo {name}; sleep 0.05; done\'"\nstart_seconds = 0\n'
        f'log.mode = "syslog"\nlog.address = "{{{name}}}"\n'
        for name in ("local", "remote")
    )
    running = daemon(table.format(local="unix:log.sock", remote="udp:127.0.0.1:9"), start=False)
    reader = syslogs.Reader(running.folder / "log.sock")
    try:
        kind = socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as one, socket.socket(socket.AF_INET6, kind) as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("::1", 0))
            pids: list[int] = []
            for each, address in ((one, f"127.0.0.1:{one.getsockname()[1]}"), (two, f"[::1]:{two.getsockname()[1]}")):
                each.settimeout(20)
                running.write_table(table.format(local="unix:log.sock", remote=f"udp:{address}"))
                if pids:
                    assert running.ctl("apply").returncode == 0
                else:
                    running.start()
                pids.append(running.wait_for("remote")["pid"])
                assert re.fullmatch(rb"<30>1 \S+ \S+ remote remote stdout - remote", each.recv(8192))
            assert pids[0] == pids[1]
        wait_until(lambda: any(message.endswith(b" local local stdout - local") for message in reader.messages))
        assert running.status()["remote"]["output"]["dropped"] == 0
        assert f"goes to the syslog at unix:{running.folder}/log.sock" in running.ctl("logs", "local").stderr
    finally:
        running.stop()
        reader.close()

"""start, stop, restart, reload and signal, what a program's own end leads to, and what makes it ready."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until

PLAIN = "${PYTHON} -S -E ${PROGRAMS}/ready.py"
CRASH = "${PYTHON} -S -E ${PROGRAMS}/crash.py"
SIGNALS = "${PYTHON} -S -E ${PROGRAMS}/print_signals.py"


def program(name: str, command: str = PLAIN, **keys: object) -> str:
    """Its section of a table; keys are TOML texts."""
    given = {"start_seconds": 0, **keys}
    return f"[program.{name}]\ncommand = '''{command}'''\n" + "".join(
        f"{key} = {text}\n" for key, text in given.items()
    )


def events(running: RunningDaemon) -> list[tuple[str, str]]:
    """Name and state of each change of a state so far."""
    done = running.ctl("--json", "events")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)

    heard = [json.loads(line) for line in found]
    return [(event["name"], event["state"]) for event in heard if event["type"] == "state"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- start and stop -------------------------------------------------------------------------------------------------


def test_autostart_false_waits_for_start(daemon: MakeDaemon) -> None:
    running = daemon(program("it", autostart="false"))
    info = running.status()["it"]
    assert (info["state"], info["wanted"], info["pid"], info["why"]) == ("STOPPED", "down", None, "not started yet")
    assert running.ctl("status", "it").returncode == 3
    assert running.ctl("start", "it").returncode == 0
    assert running.status()["it"]["state"] == "RUNNING"
    assert running.ctl("status", "it").returncode == 0


def test_the_lowest_priority_starts_first(daemon: MakeDaemon) -> None:
    table = program("last", priority=30) + program("first", priority=-1) + program("middle", priority=20)
    running = daemon(table + program("second", priority=20))
    for name in ("last", "first", "middle", "second"):
        running.wait_for(name)
    assert [name for name, state in events(running) if state == "STARTING"] == ["first", "middle", "second", "last"]
    assert running.ctl("restart", "all").returncode == 0


def test_stop_goes_in_reverse_and_waits_for_each_level(daemon: MakeDaemon) -> None:
    slow = "sh -c 'trap \"sleep 0.3; exit 0\" TERM; echo ready; while :; do sleep 0.05; done'"
    names = ["first", "middle", "second", "last"]
    priorities = [1, 20, 20, 30]
    table = "".join(program(name, slow, priority=n) for name, n in zip(names, priorities, strict=True))
    running = daemon(table)
    for name in names:
        wait_until(lambda name=name: "ready" in running.log(name))  # type: ignore[misc]
    assert running.ctl("stop", "all").returncode == 0
    seen = [event for event in events(running) if event[1] in ("STOPPING", "STOPPED")]
    assert seen[:2] == [("last", "STOPPING"), ("last", "STOPPED")]
    assert set(seen[2:4]) == {("middle", "STOPPING"), ("second", "STOPPING")}
    assert set(seen[4:6]) == {("middle", "STOPPED"), ("second", "STOPPED")}
    assert seen[6:] == [("first", "STOPPING"), ("first", "STOPPED")]


def test_another_stop_signal(daemon: MakeDaemon) -> None:
    traps = "trap 'echo got USR1; exit 7' USR1; trap 'echo got TERM' TERM"
    command = f'sh -c "{traps}; echo ready; while :; do sleep 0.05; done"'
    running = daemon(program("it", command, stop_signal='"USR1"'))
    wait_until(lambda: "ready" in running.log("it"))
    assert running.ctl("stop", "it").returncode == 0
    assert running.log("it") == "ready\ngot USR1\n"
    assert running.status()["it"]["exit"]["code"] == 7


def test_restart_gives_a_new_child(daemon: MakeDaemon) -> None:
    running = daemon(program("it") + program("other"))
    before, other = running.wait_for("it"), running.wait_for("other")
    assert running.ctl("restart", "it").returncode == 0
    after = running.status()
    assert after["it"]["pid"] != before["pid"]
    assert not alive(before["pid"])
    assert after["it"]["restarts"] == 0, "only restarts of procman's own accord are counted"
    assert after["other"]["pid"] == other["pid"]
    assert running.ctl("stop", "it").returncode == 0
    assert running.ctl("restart", "it").returncode == 0, "a stopped program is started"


def test_a_program_that_is_starting_can_be_stopped(daemon: MakeDaemon) -> None:
    running = daemon(program("it", ready="{ notify = true }"))
    running.wait_for("it", "STARTING")
    assert running.ctl("stop", "it").returncode == 0
    info = running.status()["it"]
    assert (info["state"], info["wanted"]) == ("STOPPED", "down")


def test_start_says_the_first_failure_and_does_not_wait_on(daemon: MakeDaemon) -> None:
    running = daemon(
        program(
            "crash", f"{CRASH} 3", autostart="false", start_seconds=1, restart_delay='"1h"', restart_delay_max='"2h"'
        )
        + program("missing", "no-such-program", autostart="false", restart_delay='"1h"', restart_delay_max='"2h"')
        + program("good", autostart="false")
    )
    done = running.ctl("start", "all")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "exit status 3" in said
    assert "no-such-program" in said
    states = {name: info["state"] for name, info in running.status().items()}
    assert states == {"crash": "BACKOFF", "missing": "BACKOFF", "good": "RUNNING"}
    assert running.ctl("stop", "crash").returncode == 0, "a waiting one can be stopped"
    assert running.status()["crash"]["state"] == "STOPPED"


def test_start_in_the_midst_of_a_backoff_tries_at_once(daemon: MakeDaemon) -> None:
    command = "sh -c 'test -e go || exit 4; exec sleep 1000'"
    running = daemon(program("it", command, restart_delay='"1h"', restart_delay_max='"2h"'))
    info = running.wait_for("it", "BACKOFF")
    assert re.fullmatch(r"exit status 4; next start in 3\d{3}\.\d s", info["why"])
    (running.folder / "go").touch()
    assert running.ctl("start", "it").returncode == 0
    assert running.status()["it"]["state"] == "RUNNING"


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_seconds", [0, 1])
def test_restart_policies(daemon: MakeDaemon, start_seconds: int) -> None:
    """A program that ends soon after its start; a start counts as failed when that was within `start_seconds`."""
    failed = "EXITED" if start_seconds == 0 else "FATAL"
    cases = {
        ("always", 0): "BACKOFF", ("always", 3): "BACKOFF",
        ("on-failure", 0): "EXITED", ("on-failure", 3): "BACKOFF", ("on-failure", 5): "EXITED",
        ("on-failure", -9): "EXITED", ("on-failure", -6): "BACKOFF",
        ("never", 0): "EXITED", ("never", 3): failed, ("never", -6): failed,
    }  # fmt: skip
    keys: dict[str, object] = {"success_exit_codes": '[0, 5, "KILL"]', "restart_delay": '"1m"', "limits.core": 0}
    keys |= {"start_seconds": start_seconds}
    names = {f"it{number}": case for number, case in enumerate(cases)}
    running = daemon(
        "".join(program(name, f"{CRASH} {code}", restart=f'"{rule}"', **keys) for name, (rule, code) in names.items())
    )
    for name, (rule, code) in names.items():
        info = running.wait_for(name, cases[rule, code])
        shown = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        assert info["exit"]["reason"] == shown
        assert info["why"].startswith(shown)
        too_soon = start_seconds == 1 and rule == "always" and code == 0
        assert ("before start_seconds = 1 s" in info["why"]) == too_soon
        assert ("next start in" in info["why"]) == (info["state"] == "BACKOFF")
        assert info["wanted"] == "up"
        assert info["pid"] is None


def test_after_start_retries_it_is_fatal_until_somebody_starts_it(daemon: MakeDaemon) -> None:
    running = daemon(program("it", f"{CRASH} 3", start_seconds=1, start_retries=2, restart_delay=0.01))
    info = running.wait_for("it", "FATAL")
    assert info["why"] == "exit status 3; gave up after 3 failed starts"
    assert info["restarts"] == 2
    why = running.ctl("why", "it").stdout
    assert len(re.findall(r"ready \d+, ends with 3", why)) == 3, "its last lines are shown"
    assert why.count("BACKOFF") == 2
    assert running.ctl("start", "it").returncode == 1
    running.wait_for("it", "FATAL")
    assert running.ctl("stop", "it").returncode == 0
    assert running.status()["it"]["state"] == "STOPPED"


def test_a_program_that_was_killed_is_started_again_and_counted(daemon: MakeDaemon) -> None:
    running = daemon(program("it", restart_delay=0.01))
    for number in (1, 2, 3):
        pid = running.wait_for("it")["pid"]
        os.kill(pid, signal.SIGKILL)

        def again(number: int = number) -> bool:
            info = running.status()["it"]
            return bool(info["state"] == "RUNNING" and info["restarts"] == number)

        wait_until(again)
    exit = running.status()["it"]["exit"]
    assert (exit["signal"], exit["reason"]) == ("SIGKILL", "killed by SIGKILL")


# --- reload and signal ----------------------------------------------------------------------------------------------


def test_reload_by_a_signal_or_a_restart(daemon: MakeDaemon) -> None:
    running = daemon(program("hup", SIGNALS, reload='"signal:HUP"') + program("plain", SIGNALS))
    for name in ("hup", "plain"):
        wait_until(lambda name=name: "ready" in running.log(name))  # type: ignore[misc]
    before = running.status()
    assert running.ctl("reload", "all").returncode == 0
    wait_until(lambda: "got SIGHUP" in running.log("hup"))
    after = running.status()
    assert after["hup"]["pid"] == before["hup"]["pid"]
    assert after["plain"]["pid"] != before["plain"]["pid"]
    assert "got SIGHUP" not in running.log("plain")
    assert running.ctl("stop", "hup").returncode == 0
    done = running.ctl("reload", "hup")
    assert done.returncode == 1
    assert "does not run" in done.stdout + done.stderr
    assert running.status()["hup"]["state"] == "STOPPED"


@pytest.mark.parametrize("kind", ["signal:HUP", "restart"])
def test_a_stopped_program_that_was_asked_to_reload_stays_wanted_down(daemon: MakeDaemon, kind: str) -> None:
    """A reload that did nothing must not bring a stopped program back, nor with the next start of the daemon."""
    running = daemon(program("it", SIGNALS, reload=f'"{kind}"'))
    running.wait_for("it")
    assert running.ctl("stop", "it").returncode == 0
    done = running.ctl("reload", "it")
    assert done.returncode == 1
    assert "it does not run: stop by uid" in done.stderr
    assert running.status()["it"]["state"] == "STOPPED"
    assert running.stop() == 0
    running.start()
    info = running.status()["it"]
    assert (info["state"], info["wanted"]) == ("STOPPED", "down")


@pytest.mark.parametrize("kind", ["signal:HUP", "restart"])
def test_reload_starts_what_failed_or_ended(daemon: MakeDaemon, kind: str) -> None:
    keys = {"reload": f'"{kind}"', "restart": '"never"'}
    table = program("failed", "sh -c 'test -e there && exec sleep 1000'", **keys) + program("ended", "true", **keys)
    running = daemon(table)
    running.wait_for("failed", "EXITED")
    ended = running.wait_for("ended", "EXITED")["exit"]["at"]
    (running.folder / "there").touch()
    assert running.ctl("reload", "all").returncode == 0
    assert running.wait_for("failed")["pid"] is not None
    assert running.wait_for("ended", "EXITED")["exit"]["at"] > ended


def test_why_reads_little_of_a_log_without_lines(daemon: MakeDaemon) -> None:
    running = daemon(program("it", "sh -c 'head -c 5000000 /dev/zero | tr \\\\0 x; exec sleep 1000'"))
    wait_until(lambda: len(running.log("it")) == 5000000)
    with running.client() as client:
        (line,) = client.call("why", name="it")["output"]
    assert line == "x" * 65536


def test_signal(daemon: MakeDaemon) -> None:
    running = daemon(program("it", SIGNALS) + program("off", autostart="false"))
    wait_until(lambda: "ready" in running.log("it"))
    for name in ("USR2", "SIGWINCH", "10"):
        assert running.ctl("signal", name, "it").returncode == 0
    wait_until(lambda: {"got SIGUSR1", "got SIGUSR2", "got SIGWINCH"} <= set(running.log("it").splitlines()))
    assert running.ctl("signal", "NONSENSE", "it").returncode == 2
    assert running.ctl("signal", "HUP", "off").returncode == 1
    assert running.ctl("signal", "HUP", "nobody").returncode == 4


# --- ready ----------------------------------------------------------------------------------------------------------

UNIX = """import socket, time; time.sleep(0.3); it = socket.socket(socket.AF_UNIX); it.bind('it.sock'); it.listen()
print('ready', flush=True); time.sleep(1000)"""


def kinds(port: int, other: int) -> dict[str, tuple[str, str]]:
    """A program that is ready after 300 ms, and says so, for each kind of `ready`."""
    run = "${PYTHON} -S -E"
    return {
        "http": (f"{run} ${{PROGRAMS}}/http_one.py {port} 200 0.3", f'{{ http = "http://127.0.0.1:{port}/" }}'),
        "tcp": (f"{run} ${{PROGRAMS}}/slow_start.py 0.3 {other}", f'{{ tcp = "127.0.0.1:{other}" }}'),
        "unix": (f'{run} -c "{UNIX}"', '{ unix = "it.sock" }'),
        "command": ("sh -c 'sleep 0.3; touch there; echo ready; exec sleep 1000'", '{ command = "test -e there" }'),
        "log": (f"{run} ${{PROGRAMS}}/slow_start.py 0.3", "{ log = '^ready \\d+$' }"),
        "notify": (f"{run} ${{PROGRAMS}}/notify.py 0.3", "{ notify = true }"),
    }


def test_a_program_is_running_when_it_is_ready(daemon: MakeDaemon) -> None:
    table = kinds(free_port(), free_port())
    running = daemon("".join(program(name, command, ready=ready) for name, (command, ready) in table.items()))
    for name in table:
        running.wait_for(name)
        wait_until(lambda name=name: "ready" in running.log(name), 2)  # type: ignore[misc]
        info = running.status()[name]
        assert info["ready"] is True
        assert info["uptime_seconds"] >= 0.3 - 0.05, f"{name} counts as ready before it is"


def test_a_program_that_says_it_at_once_is_ready(daemon: MakeDaemon) -> None:
    """However fast it is: its line, or its message, may come before the daemon knows its pid."""
    line = program("line", "sh -c 'echo ready; exec sleep 1000'", instances=20, ready="{ log = '^ready' }")
    told = program("told", "${PYTHON} -S -E ${PROGRAMS}/notify.py", instances=4, ready="{ notify = true }")
    running = daemon(line + told)
    for name in running.status():
        running.wait_for(name)


def test_what_is_not_ready_in_time_says_what_was_seen(daemon: MakeDaemon) -> None:
    port, other = free_port(), free_port()
    url = f"http://127.0.0.1:{port}/"
    cases: dict[str, tuple[str, str, str]] = {
        "http": (f"${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py {port} 503", f"{{ http = '{url}' }}", "HTTP 503"),
        "tcp": (PLAIN, f'{{ tcp = "127.0.0.1:{other}" }}', "connection refused"),
        "unix": (PLAIN, '{ unix = "nowhere.sock" }', "no such file or directory"),
        "command": (PLAIN, '{ command = "sh -c \'exit 3\'" }', "exit status 3"),
        "nocommand": (PLAIN, '{ command = "no-such-program" }', "exit status 127"),
        "log": (PLAIN, "{ log = 'never said' }", "no line of its output matches 'never said' yet"),
        "notify": (PLAIN, "{ notify = true }", "READY=1 has not arrived"),
    }  # fmt: skip
    keys = {"start_timeout": "'700ms'", "restart_delay": "'1m'"}
    running = daemon(
        "".join(program(name, command, ready=ready, **keys) for name, (command, ready, _) in cases.items())
    )
    for name, (_, _, reason) in cases.items():
        info: dict[str, Any] = running.wait_for(name, "BACKOFF")
        assert info["why"].startswith("not ready within 0.7 s: ")
        assert f"{reason}; next start in" in info["why"]
        assert info["pid"] is None
    done = running.ctl("start", "tcp")
    assert done.returncode == 1
    assert "connection refused" in done.stdout + done.stderr


def test_nobody_else_can_say_that_a_program_is_ready(daemon: MakeDaemon) -> None:
    running = daemon(program("it", "sh -c 'echo $NOTIFY_SOCKET; exec sleep 1000'", ready="{ notify = true }"))
    path = wait_until(lambda: running.log("it").strip())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"READY=1", path)
    wait_until(lambda: f"notification of pid {os.getpid()} (uid {os.geteuid()}) is ignored" in running.said())
    assert running.status()["it"]["state"] == "STARTING"
    assert running.ctl("stop", "it").returncode == 0


def test_a_probe_that_hangs_is_killed(daemon: MakeDaemon) -> None:
    hang = "{ command = ['sh', '-c', 'echo $$$$ > probe; sleep 1000; true'] }"
    running = daemon(program("it", ready=hang, start_timeout="'500ms'", restart_delay="'1m'"))
    probe = int(wait_until(lambda: (running.folder / "probe").exists() and (running.folder / "probe").read_text()))
    running.look()
    assert running.wait_for("it", "BACKOFF")["why"].startswith("not ready within 0.5 s")
    wait_until(lambda: not alive(probe))


def test_a_probe_of_a_program_that_is_stopped_is_ended(daemon: MakeDaemon) -> None:
    hang = "{ command = ['sh', '-c', 'echo $$$$ > probe; exec sleep 1000'] }"
    running = daemon(program("it", ready=hang))
    probe = int(wait_until(lambda: (running.folder / "probe").exists() and (running.folder / "probe").read_text()))
    assert running.ctl("stop", "it").returncode == 0
    wait_until(lambda: not alive(probe))


def test_a_long_reason_keeps_no_signal_and_no_start_from_a_program(daemon: MakeDaemon) -> None:
    """The keeper takes 4,096 characters of status together with a signal or a start. The command of a probe may be
    longer, and stands in the reason."""
    argument = '"\\' * 5000
    running = daemon(
        program(
            "it",
            "${PYTHON} -S -E ${PROGRAMS}/print_signals.py",
            ready=f"{{ command = ['false', {json.dumps(argument)}] }}",
            start_timeout="'1s'",
            restart_delay="'100ms'",
            restart_delay_max="'100ms'",
            start_retries=1000,
            stop_timeout="'1h'",  # no SIGKILL does what SIGTERM should
        )
    )

    def lives() -> int:
        return running.log("it").count("ready ")

    wait_until(lambda: lives() >= 3, 20, "its start has failed twice, and it was started again")
    assert argument in running.status()["it"]["why"]
    assert running.ctl("stop", "it").returncode == 0
    assert running.status()["it"]["state"] == "STOPPED"
    assert running.log("it").count("got SIGTERM\nend\n") == lives()
    assert "makes no sense" not in running.said()
    # Also when a successor has to find out from the keeper what was being done.
    assert running.ctl("start", "--no-wait", "it").returncode == 0
    seen = lives()
    wait_until(lambda: lives() > seen)
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != old)
    seen = lives()
    wait_until(lambda: lives() > seen, 20)
    assert running.ctl("stop", "it").returncode == 0
    assert running.log("it").count("got SIGTERM\nend\n") == lives()


def test_reload_by_a_command(daemon: MakeDaemon) -> None:
    """What it prints goes to the log of its program, and is shown when it fails."""
    script = 'echo "reloading $MAINPID"; echo no such table >&2; exit $(cat status)'
    running = daemon(program("it", "sleep 1000", reload=f"['sh', '-c', '{script}']"))
    (running.folder / "status").write_text("0")
    pid = running.wait_for("it")["pid"]
    done = running.ctl("reload", "it")
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: running.log("it") == f"reloading {pid}\nno such table\n")
    (running.folder / "status").write_text("3")
    done = running.ctl("reload", "it")
    assert done.returncode == 1
    assert "its reload command failed with exit status 3" in done.stderr
    assert "  | no such table\n" in done.stderr
    assert running.status()["it"]["pid"] == pid


def test_why_it_runs_after_a_start_that_failed(daemon: MakeDaemon) -> None:
    """An address that was taken is no reason of a process that serves, but of its having been started again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running = daemon(program("web", "sleep 1000", listen=f'"127.0.0.1:{port}"'))
        assert "is in use by" in running.wait_for("web", "BACKOFF")["why"]
    info = running.wait_for("web")
    assert info["why"].startswith(f"started again: 127.0.0.1:{port} is in use by pid {os.getpid()}")

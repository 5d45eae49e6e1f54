"""apply: listeners that move, and programs that can only be restarted. What can't be had changes nothing, and what does
not start goes back to what it was."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until
from tests.test_daemon_overlap import Site, ask


class Sites:
    """A table with the program `web` on the listener `http`, and what is written into it."""

    def __init__(self, daemon: MakeDaemon, tmp_path: Path, keys: str = "", others: str = "") -> None:
        self.site = Site(tmp_path / "site")
        self.port, self.other = free_port(), free_port()
        self.running: RunningDaemon = daemon(self.table(self.port, keys) + others)
        for name in self.running.status():
            self.running.wait_for(name, timeout=30)

    def table(self, port: int, keys: str = "", variables: str = "", listener: str = "") -> str:
        return f"""
            [listener.http]
            bind = "127.0.0.1:{port}"
            {listener}
            [program.web]
            server = "wsgi"
            app = "release:app"
            directory = "{self.site.folder}"
            listen = "http"
            environment = {{ SITE_FOLDER = "{self.site.folder}"{variables} }}
            start_seconds = 0.1
            {keys}
        """

    def pid(self, name: str = "web") -> int:
        pid: int = self.running.status()[name]["pid"]
        return pid

    def at(self, port: int) -> str:
        return ask(("127.0.0.1", port))

    def refuses(self, port: int) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) != 0


def variables_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def worker(name: str, keys: str = "", argument: str = "1000") -> str:
    return f'[program.{name}]\ncommand = "sleep {argument}"\nstart_seconds = 0.1\n{keys}\n'


BAD = 'command = "sh -c \'echo this release is bad; exit 3\'"\nstart_seconds = 0.1\n'


class Asking:
    """Asks all the time at two ports, of which at least one must answer; and counts who did not get that."""

    def __init__(self, *ports: int) -> None:
        self._ports = ports
        self._end = threading.Event()
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._end.is_set():
            wrong = []
            for port in self._ports:
                try:
                    ask(("127.0.0.1", port))
                    break
                except (OSError, AssertionError) as error:
                    wrong.append(repr(error))
            else:
                self.failed.append("; ".join(wrong))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_a_named_listener_moves_without_a_gap(daemon: MakeDaemon, tmp_path: Path) -> None:
    """It is open at the new address before the old one closes."""
    sites = Sites(daemon, tmp_path)
    before = sites.pid()
    sites.site.version("two")
    sites.running.write_table(sites.table(sites.other))
    shown = sites.running.ctl("diff").stdout
    assert "replace" in shown
    assert f"a successor takes over; no request is lost, 127.0.0.1:{sites.port} closes" in shown
    with Asking(sites.port, sites.other) as asking:
        done = sites.running.json("apply")
    assert done["replaced"] == ["web"]
    assert asking.failed == []
    assert sites.pid() != before
    assert sites.at(sites.other) == "two"
    wait_until(lambda: sites.refuses(sites.port))
    assert sites.running.ctl("diff").returncode == 0
    told = sites.running.json("status", "-v")[0]["workers"]["listen"]
    assert [(one["name"], one["address"]) for one in told] == [("http", f"127.0.0.1:{sites.other}")]
    assert b"LISTEN_FDNAMES=http" in variables_of(sites.pid())


@pytest.mark.parametrize("keys", ["", 'reload = "restart"'], ids=["overlap", "restart"])
def test_an_address_that_is_taken_changes_nothing(daemon: MakeDaemon, tmp_path: Path, keys: str) -> None:
    """Of none of the programs of the table, and who has it is said."""
    sites = Sites(daemon, tmp_path, keys, worker("job") + worker("old"))
    before = {name: info["pid"] for name, info in sites.running.status().items()}
    with socket.create_server(("127.0.0.1", sites.other)):
        new = sites.table(sites.other, keys) + worker("job", argument="2000") + worker("more")
        sites.running.write_table(new)
        taken = f"apply will be refused: 127.0.0.1:{sites.other} is in use by pid {os.getpid()}"
        assert taken in sites.running.ctl("diff").stdout
        done = sites.running.ctl("apply")
        assert done.returncode == 1
        assert f"nothing was changed: 127.0.0.1:{sites.other} is in use by pid {os.getpid()}" in done.stderr
        assert {name: info["pid"] for name, info in sites.running.status().items()} == before
        assert sites.at(sites.port) == "one"
    assert sites.running.ctl("apply").returncode == 0
    assert sites.at(sites.other) == "one"
    assert set(sites.running.status()) == {"web", "job", "more"}


def test_a_successor_that_fails_at_a_new_address_leaves_it_closed(daemon: MakeDaemon, tmp_path: Path) -> None:
    sites = Sites(daemon, tmp_path)
    before = sites.pid()
    sites.site.version("bad 1")
    sites.running.write_table(sites.table(sites.other))
    assert sites.running.ctl("apply").returncode == 1
    assert (sites.pid(), sites.at(sites.port)) == (before, "one")
    assert sites.refuses(sites.other)


def test_from_every_address_to_one(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The two overlap, and both are ours."""
    sites = Sites(daemon, tmp_path)
    wide = sites.table(sites.port).replace("127.0.0.1:", "0.0.0.0:")
    sites.running.write_table(wide)
    assert sites.running.json("apply")["replaced"] == ["web"]
    with Asking(sites.port) as asking:
        sites.running.write_table(sites.table(sites.port))
        assert f"connections to 127.0.0.1:{sites.port} wait until it is ready" in sites.running.ctl("diff").stdout
        assert sites.running.json("apply")["replaced"] == ["web"]
    assert asking.failed == []


def test_an_address_that_gets_a_name_keeps_its_socket(daemon: MakeDaemon, tmp_path: Path) -> None:
    sites = Sites(daemon, tmp_path)
    named = sites.table(sites.port)
    inline = named.replace('listen = "http"', f'listen = "127.0.0.1:{sites.port}"')
    inline = "\n".join(line for line in inline.splitlines() if "[listener" not in line and "bind" not in line)
    with Asking(sites.port) as asking:
        for table, name in ((inline, f"127.0.0.1_{sites.port}"), (named, "http")):
            sites.running.write_table(table)
            assert sites.running.json("apply")["replaced"] == ["web"]
            assert f"LISTEN_FDNAMES={name}".encode() in variables_of(sites.pid())
    assert asking.failed == []


def test_reuse_port_is_switched_on_and_off(daemon: MakeDaemon, tmp_path: Path) -> None:
    """That can't overlap, and the plan says what it costs."""
    sites = Sites(daemon, tmp_path)
    for listener in ("reuse_port = true", ""):
        before = sites.pid()
        sites.running.write_table(sites.table(sites.port, listener=listener))
        assert "it stops, then it starts; connections are refused meanwhile" in sites.running.ctl("diff").stdout
        assert sites.running.json("apply")["restarted"] == ["web"]
        assert sites.pid() != before
        for _ in range(20):
            assert sites.at(sites.port) == "one"


def test_what_does_not_start_goes_back(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A program that can only restart is once more what it was; what comes after it is not touched."""
    one, two = worker("one", "priority = 1"), worker("two", "priority = 2")
    sites = Sites(daemon, tmp_path, others=one + two)
    before = {name: info["pid"] for name, info in sites.running.status().items()}
    bad = f"[program.one]\npriority = 1\n{BAD}"
    sites.running.write_table(sites.table(sites.port) + bad + worker("two", "priority = 2", "2000"))
    assert "it stops, then it starts; nothing of it runs meanwhile" in sites.running.ctl("diff").stdout
    done = sites.running.ctl("apply")
    assert done.returncode == 1
    assert "apply failed: one: it did not start: exit status 3" in done.stderr
    assert "it was started again as it was before" in done.stderr
    assert "this release is bad" in done.stderr
    now = sites.running.status()
    assert now["one"]["state"] == "RUNNING"
    assert now["one"]["pid"] != before["one"]
    assert (now["two"]["pid"], now["web"]["pid"]) == (before["two"], before["web"])
    assert Path(f"/proc/{now['one']['pid']}/cmdline").read_bytes() == b"sleep\x001000\x00"
    left = sites.running.ctl("diff").stdout
    assert "one" in left
    assert "two" in left
    os.kill(sites.running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: sites.running.ctl("diff").stdout == left, 20)
    os.kill(now["one"]["pid"], signal.SIGKILL)
    again = wait_until(lambda: _other(sites, "one", now["one"]["pid"]), 20)
    assert Path(f"/proc/{again}/cmdline").read_bytes() == b"sleep\x001000\x00"
    good = worker("one", "priority = 1", "3000") + worker("two", "priority = 2", "2000")
    sites.running.write_table(sites.table(sites.port) + good)
    assert sites.running.json("apply")["restarted"] == ["one", "two"]
    assert sites.running.ctl("diff").returncode == 0


def _other(sites: Sites, name: str, before: int) -> int:
    info = sites.running.status()[name]
    return info["pid"] if info["state"] == "RUNNING" and info["pid"] != before else 0


def test_one_program_after_the_other_restarts(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The second runs until the first is there again."""
    slow = f'ready = {{ command = ["test", "-e", "{tmp_path}/ready"] }}\n'
    (tmp_path / "ready").touch()
    sites = Sites(daemon, tmp_path, others=worker("one", f"priority = 1\n{slow}") + worker("two", "priority = 2"))
    two = sites.pid("two")
    (tmp_path / "ready").unlink()
    new = worker("one", f"priority = 1\n{slow}", "2000") + worker("two", "priority = 2", "2000")
    sites.running.write_table(sites.table(sites.port) + new)
    os.kill(sites.running.keeper_pid, signal.SIGHUP)
    sites.running.wait_for("one", "STARTING")
    assert sites.pid("two") == two
    (tmp_path / "ready").touch()
    wait_until(lambda: _other(sites, "two", two), 20)
    assert sites.running.ctl("diff").returncode == 0


def several(argument: str, before: str = "") -> str:
    """A program of three processes; what each does `before` it works."""
    script = f"{before}exec sleep {argument}"
    return f"""
        [program.job]
        command = ["sh", "-c", "{script}"]
        instances = 3
        start_seconds = 0.1
    """


def down_while(running: RunningDaemon, method: str, **params: Any) -> tuple[int, Any]:
    """How many processes were down at most while something was carried out, and what was answered."""
    down: list[int] = []

    def look(method: str, params: Any) -> None:
        down.append(sum(info["state"] != "RUNNING" for info in running.status().values()))

    with running.client(60) as client:
        answer = client.stream(method, look, **params)
    return max(down, default=0), answer


def works(running: RunningDaemon) -> dict[str, str]:
    """The argument of each process of `several`."""
    pids = {name: info["pid"] for name, info in running.status().items() if info["state"] == "RUNNING"}
    return {name: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1].decode() for name, pid in pids.items()}


def test_processes_of_one_program_restart_one_after_the_other(daemon: MakeDaemon) -> None:
    running = daemon(several("1000"))
    for number in (1, 2, 3):
        running.wait_for(f"job:{number}")
    running.write_table(several("2000"))
    down, done = down_while(running, "daemon.reread")
    assert down == 1
    assert done["restarted"] == ["job:1", "job:2", "job:3"]
    assert works(running) == dict.fromkeys(done["restarted"], "2000")


def test_one_of_several_that_does_not_start(daemon: MakeDaemon) -> None:
    """Those before it go back as well, one after the other."""
    running = daemon(several("1000"))
    for number in (1, 2, 3):
        running.wait_for(f"job:{number}")
    third = running.status()["job:3"]["pid"]
    running.write_table(several("2000", "test ${instance} = 2 && exit 3; "))
    down, done = down_while(running, "daemon.reread")
    assert down == 1
    assert done["failed"]["name"] == "job:2"
    assert done["left"] == ["job:1", "job:2", "job:3"]
    assert works(running) == dict.fromkeys(done["left"], "1000")
    assert running.status()["job:3"]["pid"] == third


def test_the_supervisor_dies_between_one_process_and_the_other(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next one goes on with the one that was under way, and the others wait for it."""
    gates = [tmp_path / f"gate-{number}" for number in (1, 2, 3)]
    for gate in gates:
        gate.touch()
    ready = f'ready = {{ command = ["test", "-e", "{tmp_path}/gate-${{instance}}"] }}'
    running = daemon(several("1000") + ready)
    for number in (1, 2, 3):
        running.wait_for(f"job:{number}")
    third = running.status()["job:3"]["pid"]
    gates[1].unlink()
    running.write_table(several("2000") + ready)
    os.kill(running.keeper_pid, signal.SIGHUP)
    running.wait_for("job:2", "STARTING")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2, 20)
    assert (works(running)["job:1"], running.status()["job:3"]["pid"]) == ("2000", third)
    gates[1].touch()
    wait_until(lambda: list(works(running).values()) == ["2000"] * 3, 20)
    wait_until(lambda: running.ctl("diff").returncode == 0, 20)


@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
@pytest.mark.parametrize("state", ["STOPPING", "STARTING"])
def test_the_supervisor_dies_in_a_restart(daemon: MakeDaemon, tmp_path: Path, state: str, good: bool) -> None:
    """The next one goes on, to the new version or back."""
    gate = tmp_path / "gate"
    stop = f"trap 'while test -e {gate}; do sleep 0.02; done; exit' TERM"

    def table(version: str, waits: str) -> str:
        script = f"{stop}; echo {version}; while {waits}; do sleep 0.02; done; {'exit 3' if version == 'bad' else ':'}"
        script += f"; touch {tmp_path / version}; while :; do sleep 0.02; done"
        ready = f'ready = {{ command = ["test", "-e", "{tmp_path / version}"] }}\nstart_seconds = 0.1\n'
        return f'[program.job]\ncommand = ["sh", "-c", """{script}"""]\n{ready}'

    running = daemon(table("old", "false"))
    running.wait_for("job", timeout=20)
    version = "new" if good else "bad"
    gate.touch()
    running.write_table(table(version, f"test -e {gate}"))
    os.kill(running.keeper_pid, signal.SIGHUP)
    running.wait_for("job", "STOPPING")
    if state == "STARTING":
        gate.unlink()
        gate.touch()
        first = running.status()["job"]["pid"]
        gate.unlink()
        wait_until(lambda: running.status()["job"]["pid"] != first)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    gate.unlink(missing_ok=True)
    wait_until(lambda: running.json("daemon", "status")["supervisor_starts"] == 2, 20)
    expected = "new" if good else "old"

    def over() -> bool:
        info = running.wait_for("job", timeout=30)
        try:
            text = Path(f"/proc/{info['pid']}/cmdline").read_text()
        except OSError:  # it has just gone
            return False
        return f"echo {expected}" in text and (running.ctl("diff").returncode == 0) == good

    wait_until(over, 30)


def test_a_keeper_that_is_killed_after_a_failure(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next daemon goes on with the version that ran, says so, and tries the other one when it is asked to."""
    sites = Sites(daemon, tmp_path)
    before = sites.pid()
    sites.site.version("bad 2")
    sites.running.write_table(sites.table(sites.port, variables=', DEBUG = "1"'))
    assert sites.running.ctl("apply").returncode == 1
    marked = sites.running.status()["web"]
    assert marked["behind"] == ["environment"]
    for command in ("status", "why"):
        assert "not as the table says: environment" in sites.running.ctl(command, "web").stdout
    sites.site.version("one")
    assert b"DEBUG=1" not in variables_of(before)

    os.kill(sites.running.keeper_pid, signal.SIGKILL)
    assert sites.running.process is not None
    sites.running.process.wait(10)
    sites.running.start(timeout=30)
    info = sites.running.wait_for("web", timeout=30)
    assert info["pid"] == before
    assert info["behind"] == ["environment"]
    assert "web: goes on as it was before the last apply, which failed" in sites.running.said()
    shown = sites.running.ctl("diff").stdout
    assert "environment" in shown

    assert sites.running.stop() == 0  # and one that begins anew
    sites.running.start(timeout=30)
    info = sites.running.wait_for("web", timeout=30)
    assert info["behind"] == ["environment"]
    assert b"DEBUG=1" not in variables_of(info["pid"])
    assert sites.running.json("apply")["replaced"] == ["web"]
    assert b"DEBUG=1" in variables_of(sites.pid())
    assert sites.running.status()["web"]["behind"] == []


def test_a_table_that_was_mended_is_taken_by_a_new_daemon(daemon: MakeDaemon, tmp_path: Path) -> None:
    sites = Sites(daemon, tmp_path)
    sites.site.version("bad 3")
    sites.running.write_table(sites.table(sites.port, variables=', DEBUG = "1"'))
    assert sites.running.ctl("apply").returncode == 1
    sites.site.version("three")
    sites.running.write_table(sites.table(sites.port, variables=', DEBUG = "2"'))
    assert sites.running.stop() == 0
    sites.running.start(timeout=30)
    info: dict[str, Any] = sites.running.wait_for("web", timeout=30)
    assert info["behind"] == []
    assert b"DEBUG=2" in variables_of(info["pid"])


def test_nobody_waits_for_an_apply(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A table with a mistake is refused all the same, and how it ends is in the log."""
    sites = Sites(daemon, tmp_path)
    sites.running.write_table(sites.table(sites.port, "stop_timeot = 3"))
    assert "stop_timeot" in sites.running.ctl("apply", "--no-wait").stderr
    with sites.site.gate():
        sites.site.version("two")
        sites.running.write_table(sites.table(sites.port, variables=', DEBUG = "1"'))
        done = sites.running.ctl("apply", "--timeout", "0.3")
        assert done.returncode == 1
        assert "not done within 0.3 s; it goes on" in done.stderr
    wait_until(lambda: sites.at(sites.port) == "two", 20)
    wait_until(lambda: sites.running.status()["web"]["beside"] is None, 20)
    sites.site.version("bad 4")
    sites.running.write_table(sites.table(sites.port, variables=', DEBUG = "2"'))
    done = sites.running.ctl("apply", "--no-wait")
    assert (done.returncode, done.stdout) == (0, "the table was read again; the change goes on\n")
    wait_until(lambda: "ERROR stopped at web: the successor failed" in sites.running.said(), 20)


def test_sockets_of_their_own_are_known_to_the_next_supervisor(daemon: MakeDaemon, tmp_path: Path) -> None:
    """One process starts again beside another one that has the port, and is not taken for a stranger."""
    sites = Sites(daemon, tmp_path)
    sites.running.write_table(sites.table(sites.port, "workers = 2", listener="reuse_port = true"))
    assert sites.running.ctl("apply").returncode == 0
    os.kill(sites.running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: sites.running.json("daemon", "status")["supervisor_starts"] == 2, 20)
    for name in ("web:1", "web:2"):
        assert sites.running.ctl("restart", name).returncode == 0
    sites.running.write_table(sites.table(sites.port, "workers = 2"))
    assert sites.running.ctl("apply").returncode == 0
    for _ in range(20):
        assert sites.at(sites.port) == "one"


def test_a_canary_where_the_listener_moves(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Nobody could be led there: the successor takes over without one."""
    sites = Sites(daemon, tmp_path, 'canary = "10% for 1h"')
    sites.running.write_table(sites.table(sites.other, 'canary = "10% for 1h"'))
    assert sites.running.json("apply")["replaced"] == ["web"]
    assert "web: without its canary: the new version has none of the listeners" in sites.running.said()
    assert sites.at(sites.other) == "one"


def test_a_unix_listener_moves(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Its old file goes with the process before."""
    sites = Sites(daemon, tmp_path)
    folder = sites.running.folder
    for name in ("a", "b"):
        table = sites.table(sites.port).replace(f"127.0.0.1:{sites.port}", f"unix:{folder}/{name}.sock")
        sites.running.write_table(table)
        assert sites.running.json("apply")["replaced"] == ["web"]
        assert ask(f"{folder}/{name}.sock") == "one"
    assert sorted(path.name for path in folder.glob("[ab].sock*")) == ["b.sock"]


FALLS = """
    [program.{name}]
    command = ["sh", "-c", "{command}"]
    start_seconds = 1
    start_retries = -1
    restart_delay = "0.1s"
    restart_delay_max = "0.1s"
"""


def test_what_falls_again_and_again_starts_as_the_new_table_says(daemon: MakeDaemon) -> None:
    """While others get their new version it falls and gets up as it was, more than once."""
    names = ("one", "two", "three")
    running = daemon("".join(FALLS.format(name=name, command="sleep 0.7; exit 1") for name in names))

    def starting() -> bool:
        return all(info["state"] == "STARTING" for info in running.status().values())

    wait_until(starting, 30)
    running.write_table("".join(FALLS.format(name=name, command="exec sleep 1000") for name in names))
    done = running.ctl("apply")
    assert done.returncode == 0, (done.stdout, done.stderr, running.said())
    assert {info["state"] for info in running.status().values()} == {"RUNNING"}
    assert "nothing" in running.ctl("diff").stdout

"""diff and apply: only what must change does, by a successor where there can be one."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until
from tests.test_daemon_overlap import Site, ask

JOB = '[program.job]\ncommand = "sleep 1000"\nstart_seconds = 0\n'


class Shop:
    """A table with the program `web`, which listens, and what is written into it."""

    def __init__(self, daemon: MakeDaemon, tmp_path: Path) -> None:
        self.site = Site(tmp_path / "site")
        self.port = free_port()
        self.address = ("127.0.0.1", self.port)
        self.running: RunningDaemon = daemon(self.table() + JOB)
        self.running.wait_for("web", timeout=30)
        self.running.wait_for("job")

    def table(self, more: str = "", variables: str = "") -> str:
        """`more` are lines of the program, `variables` of its environment."""
        return f"""
            [program.web]
            server = "wsgi"
            app = "release:app"
            directory = "{self.site.folder}"
            listen = "127.0.0.1:{self.port}"
            environment = {{ SITE_FOLDER = "{self.site.folder}"{variables} }}
            start_seconds = 0.1
            {more}
        """

    def write(self, more: str = "", variables: str = "", others: str = JOB) -> None:
        self.running.write_table(self.table(more, variables) + others)

    def pid(self, name: str = "web") -> int:
        pid: int = self.running.status()[name]["pid"]
        return pid

    def apply(self, *options: str) -> dict[str, Any]:
        """What `procmanctl apply` says when it succeeds."""
        found: dict[str, Any] = self.running.json("apply", *options)
        return found


@pytest.fixture
def shop(daemon: MakeDaemon, tmp_path: Path) -> Shop:
    return Shop(daemon, tmp_path)


def test_a_changed_program_is_replaced(shop: Shop) -> None:
    """First it is shown; nobody else notices; the same table once more changes nothing."""
    before, job = shop.pid(), shop.pid("job")
    shop.site.version("two")
    shop.write(variables=', DEBUG = "1"')
    shown = shop.running.ctl("diff")
    assert shown.returncode == 1
    assert "environment" in shown.stdout
    assert "a successor takes over; no request is lost" in shown.stdout
    assert shop.running.ctl("apply", "--dry-run").stdout == shown.stdout
    assert (shop.pid(), shop.pid("job")) == (before, job)
    done = shop.apply()
    assert done["replaced"] == ["web"]
    assert shop.pid() not in (before, None)
    assert ask(shop.address) == "two"
    assert shop.pid("job") == job
    assert shop.running.ctl("diff").stdout == "nothing would change\n"
    now = shop.pid()
    assert shop.apply()["replaced"] == []
    assert shop.pid() == now


def test_it_stops_at_the_first_failure(shop: Shop) -> None:
    """That program stays what it was, also when the supervisor dies and when it is started again, until it succeeds."""
    shop.site.version("bad 3")
    before = shop.pid()
    shop.write(variables=', DEBUG = "1"', others=JOB.replace("1000", "2000"))
    done = shop.running.ctl("apply")
    assert done.returncode == 1
    assert "apply failed: web: the successor failed" in done.stderr
    assert "release bad 3 is bad" in done.stderr
    assert shop.pid() == before
    assert ask(shop.address) == "one"
    left = shop.running.ctl("diff").stdout
    assert "web" in left
    assert "job" not in left  # that was done

    shop.site.version("two")
    os.kill(shop.running.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: shop.running.ctl("diff").stdout == left, 20)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: shop.running.wait_for("web")["pid"] != before)
    environment = Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")
    assert b"DEBUG=1" not in environment

    assert shop.apply()["replaced"] == ["web"]
    assert b"DEBUG=1" in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")
    assert shop.running.ctl("diff").returncode == 0


def test_back_to_the_table_before(shop: Shop) -> None:
    """Asked again it stays there; there is none before the first."""
    none = shop.running.ctl("apply", "--previous")
    assert none.returncode == 1
    assert "there is no table before this one" in none.stderr
    shop.write(variables=', DEBUG = "1"', others="")
    assert (found := shop.apply())["removed"] == ["job"], found
    shop.apply()  # no other table: the one before stays the same
    shown = shop.running.ctl("apply", "--previous", "--dry-run").stdout
    assert "job" in shown
    assert "it starts" in shown
    done = shop.apply("--previous")
    assert (done["added"], done["replaced"]) == (["job"], ["web"])
    shop.running.wait_for("job")
    assert b"DEBUG=1" not in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")
    assert shop.apply("--previous")["added"] == []
    assert "job" in shop.running.status()
    assert "remove" in shop.running.ctl("diff").stdout  # what the files say


def test_the_table_before_is_the_last_that_worked(shop: Shop) -> None:
    """Not one that failed, however often it was tried otherwise."""
    before = shop.pid()
    for number in (1, 2):
        bad = shop.table(variables=f', TRY = "{number}"').replace("release:app", "missing:app")
        shop.running.write_table(bad + JOB)
        assert shop.running.ctl("apply").returncode == 1
        assert shop.running.status()["web"]["behind"]
    done = shop.apply("--previous")
    assert done["message"].startswith("the table before is in force again"), done
    assert shop.pid() == before
    assert shop.running.status()["web"]["behind"] == []
    shop.write(variables=', DEBUG = "1"')
    assert shop.apply()["replaced"] == ["web"]
    shop.apply("--previous")
    assert b"DEBUG=1" not in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")


def test_a_mistake_changes_nothing(shop: Shop) -> None:
    before = shop.pid()
    shop.write(more='stop_timeot = "3s"')
    for command in (("diff",), ("apply",), ("apply", "--dry-run")):
        done = shop.running.ctl(*command)
        assert done.returncode not in (0, None), done.stdout
        assert "stop_timeot: unknown key; did you mean 'stop_timeout'?" in done.stderr
    assert shop.pid() == before


def test_another_number_of_processes(shop: Shop) -> None:
    """One becomes three, and one again: somebody answers all the time."""
    shop.write(more="workers = 3")
    done = False
    with shop.running.client(60) as client:
        client.call("status")
        pid = os.fork()
        if pid == 0:  # asks until it is killed; a request that fails ends it
            try:
                while True:
                    ask(shop.address)
            finally:
                os._exit(1)
        try:
            assert shop.apply()["added"] == ["web:1", "web:2", "web:3"]
            assert set(shop.running.status()) == {"web:1", "web:2", "web:3", "job"}
            shop.write(more="workers = 2")
            assert shop.apply()["removed"] == ["web:3"]
            shop.write()
            assert shop.apply()["removed"] == ["web:1", "web:2"]
            done = os.waitpid(pid, os.WNOHANG) == (0, 0)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert done, "a request has failed"
    assert ask(shop.address) == "one"


def test_more_processes_of_a_bad_release(shop: Shop) -> None:
    """They go again, and the program is what it was: for who comes up then, too. It can be tried again."""
    before = shop.pid()
    shop.site.version("bad 1")
    shop.write(more="workers = 2")
    done = shop.running.ctl("apply")
    assert done.returncode == 1
    assert "apply failed: web:1: the successor failed" in done.stderr
    assert "web:1, web:2 came with it, and went with it" in done.stderr
    assert "release bad 1 is bad" in done.stderr
    assert "what has happened: procmanctl why web\n" in done.stderr  # of web:1 itself nothing is known any more
    for _ in range(2):
        assert set(shop.running.status()) == {"web", "job"}
        assert shop.pid() == before
        assert ask(shop.address) == "one"
        left = shop.running.ctl("diff").stdout
        assert "web:1" in left
        assert "web:2" in left
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: shop.running.ctl("diff").stdout == left, 20)  # noqa: B023
    shop.site.version("two")
    done = shop.running.ctl("apply")
    assert done.returncode == 0, done.stderr
    assert set(shop.running.status()) == {"web:1", "web:2", "job"}
    assert ask(shop.address) == "two"


@pytest.mark.parametrize("changed", [False, True])
def test_one_more_process_of_a_bad_release(shop: Shop, changed: bool) -> None:
    """It is not even started, where the others are to be replaced: the first of them fails."""
    shop.write(more="workers = 2")
    shop.apply()
    before = {name: shop.pid(name) for name in ("web:1", "web:2")}
    shop.site.version("bad 1")
    shop.write(more="workers = 3", variables=', DEBUG = "1"' if changed else "")
    done = shop.running.ctl("apply")
    assert done.returncode == 1
    assert f"apply failed: {'web:1: the successor failed' if changed else 'web:3: it did not start'}" in done.stderr
    assert f"what has happened: procmanctl {'why web:1' if changed else 'events'}\n" in done.stderr
    assert set(shop.running.status()) == {"web:1", "web:2", "job"}
    assert {name: shop.pid(name) for name in before} == before
    said = shop.running.ctl("events").stdout
    assert ("state web:3 STARTING" in said) == (not changed), said
    shop.site.version("two")
    done = shop.running.ctl("apply")
    assert done.returncode == 0, done.stderr
    assert set(shop.running.status()) == {"web:1", "web:2", "web:3", "job"}


def test_more_processes_with_a_canary(shop: Shop) -> None:
    """Who is added is part of it, and serves when it has gone well."""
    shop.site.version("two")
    shop.write(more="workers = 2")
    shop.apply()
    shop.write(more='workers = 3\ncanary = "50% for 10m"', variables=', DEBUG = "1"')
    shown = shop.running.ctl("diff").stdout
    assert "without its canary" not in shown
    assert "it takes over from those before; no request is lost" in shown
    with shop.running.client(60) as client:
        done: list[Any] = []
        applying = threading.Thread(target=lambda: done.append(client.call("apply")))
        applying.start()
        wait_until(lambda: (shop.running.status().get("web:3", {}).get("beside") or {}).get("canary"), 20)
        assert shop.running.status()["web:3"]["pid"] is None
        assert shop.running.ctl("promote", "web:1").returncode == 0
        applying.join()
    assert not done[0].get("failed"), done
    assert shop.running.status()["web:3"]["state"] == "RUNNING"


def test_hang_up_is_an_apply(shop: Shop) -> None:
    """Its failure is in the daemon's log, and a next one tries again."""
    before = shop.pid()
    shop.site.version("bad 4")
    shop.write(variables=', DEBUG = "1"')
    os.kill(shop.running.keeper_pid, signal.SIGHUP)
    wait_until(lambda: "stopped at web: the successor failed" in shop.running.said(), 30)
    assert shop.pid() == before
    shop.site.version("two")
    os.kill(shop.running.keeper_pid, signal.SIGHUP)
    wait_until(lambda: ask(shop.address) == "two", 30)


def test_output_goes_where_its_own_program_says(shop: Shop) -> None:
    """The log moves with an overlap; a supervisor that is killed then has a successor that knows it."""
    shop.write(more=f'log = {{ path = "{shop.running.log_dir}/other.log" }}', variables=', DEBUG = "1"')
    assert shop.apply()["replaced"] == ["web"]
    old = (shop.running.log_dir / "web.log").stat().st_size
    for _ in range(3):
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        for _ in range(20):
            assert ask(shop.address) == "one"
    requests = [line for line in shop.running.log("other").splitlines() if "GET / " in line]
    wait_until(lambda: shop.running.log("other").count("GET / ") == 60, what=f"{len(requests)} of 60 lines")
    assert (shop.running.log_dir / "web.log").stat().st_size == old


@pytest.mark.parametrize("phase", ["trial", "passed"])
def test_the_supervisor_dies_in_an_apply(shop: Shop, phase: str) -> None:
    """The command that waits says how it ended, and no definition is mixed up with the other."""
    before = shop.pid()
    shop.site.version("two")
    shop.write(variables=', DEBUG = "1"')
    role = {"trial": "successor", "passed": "the one before"}[phase]
    with shop.site.gate():
        os.kill(shop.running.keeper_pid, signal.SIGHUP)
        wait_until(lambda: (shop.running.status()["web"]["beside"] or {}).get("pid"), 30)
        if phase == "trial":
            os.kill(shop.running.supervisor_pid, signal.SIGKILL)
    if phase == "passed":
        wait_until(lambda: (shop.running.status()["web"]["beside"] or {}).get("role") == role, 30)
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
    done = shop.running.ctl("apply")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: shop.running.status()["web"]["beside"] is None, 30)
    assert shop.pid() != before
    assert ask(shop.address) == "two"
    assert shop.running.ctl("diff").returncode == 0
    now = shop.pid()
    os.kill(now, signal.SIGKILL)
    wait_until(lambda: shop.running.wait_for("web", timeout=30)["pid"] != now)
    assert b"DEBUG=1" in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")


def test_a_reload_does_not_meet_an_apply(shop: Shop) -> None:
    """It is refused while one goes on: its successor would be what the table before said."""
    stopper = "import signal, time; signal.signal(15, lambda *_: (time.sleep(1.5), exit())); time.sleep(1000)"
    slow = f"""[program.slow]\ncommand = ["${{PYTHON}}", "-c", "{stopper}"]\nstart_seconds = 0.3\n"""
    shop.write(others=JOB + slow)
    shop.apply()
    shop.running.wait_for("slow")
    shop.write(variables=', DEBUG = "1"')
    os.kill(shop.running.keeper_pid, signal.SIGHUP)
    wait_until(lambda: shop.running.status()["slow"]["state"] == "STOPPING")
    done = shop.running.ctl("reload", "web")
    assert done.returncode == 1
    assert "a change of the table is under way" in done.stderr
    wait_until(lambda: "slow" not in shop.running.status(), 20)
    wait_until(lambda: shop.running.ctl("diff").returncode == 0, 30)
    wait_until(lambda: shop.running.status()["web"]["beside"] is None, 30)
    assert b"DEBUG=1" in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")


def test_a_successor_dies_with_the_supervisor_when_it_has_just_taken_over(shop: Shop) -> None:
    """The one before goes on, as what it was: also with its next start."""
    before = shop.pid()
    os.kill(before, signal.SIGSTOP)
    with socket.create_connection(shop.address) as waits:  # so it does not run dry
        waits.sendall(b"GET / HTTP/1.0\r\n\r\n")
        shop.site.version("two")
        shop.write(variables=', DEBUG = "1"')
        assert shop.running.ctl("apply", "--no-wait").returncode == 0
        wait_until(lambda: (shop.running.status()["web"]["beside"] or {}).get("role") == "the one before", 30)
        successor = shop.pid()
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        os.kill(successor, signal.SIGKILL)
        os.kill(before, signal.SIGCONT)
        assert waits.recv(8).startswith(b"HTTP/1.")
    wait_until(lambda: shop.pid() == before and shop.running.status()["web"]["beside"] is None, 30)
    assert ask(shop.address) == "one"
    assert "environment" in shop.running.ctl("diff").stdout
    assert shop.running.status()["web"]["behind"] == ["environment"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: shop.running.wait_for("web", timeout=30)["pid"] != before)
    assert b"DEBUG=1" not in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")
    assert shop.apply()["replaced"] == ["web"]
    assert b"DEBUG=1" in Path(f"/proc/{shop.pid()}/environ").read_bytes().split(b"\0")

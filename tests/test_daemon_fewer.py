"""Processes that stop on a socket that others go on with: what they have accepted is answered, with a server that drops
at its stop all that it has accepted and not answered."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import PROGRAMS, RunningDaemon, free_port, wait_until
from tests.visitors import Visitors

DROPS = json.dumps(["${PYTHON}", str(PROGRAMS / "drops.py"), "2"])


def table(port: int, number: str, version: int = 1) -> str:
    return f"""
        [program.shop]
        command = {DROPS}
        ready = {{ http = "/" }}
        listen = "127.0.0.1:{port}"
        environment = {{ VERSION = "{version}" }}
        start_seconds = 0.1
        {number}
    """


class Shop:
    """The program `shop`, and who visits it."""

    def __init__(self, daemon: MakeDaemon, number: str) -> None:
        self.port = free_port()
        self.running: RunningDaemon = daemon(table(self.port, number))

    def ctl(self, *arguments: str) -> str:
        done = self.running.ctl(*arguments, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def apply(self, number: str, version: int = 1) -> None:
        self.running.write_table(table(self.port, number, version))
        self.ctl("apply")

    def pids(self) -> dict[str, int]:
        return {name: info["pid"] for name, info in self.running.status().items() if info["pid"]}

    @contextmanager
    def visited(self, work: int = 40) -> Iterator[Visitors]:
        """Nobody of them is lost or refused."""
        with Visitors(f"127.0.0.1:{self.port}", work) as visitors:
            visitors.goes_on()
            yield visitors
            visitors.goes_on()
        assert (visitors.lost, visitors.refused) == ([], 0), f"{visitors.total} answered, lost: {visitors.lost[:5]}"


def fewer(shop: Shop) -> None:
    shop.apply("instances = 2")
    assert set(shop.pids()) == {"shop:1", "shop:2"}


def one(shop: Shop) -> None:
    """It has another name."""
    shop.apply("instances = 1")
    assert set(shop.pids()) == {"shop"}


def stop(shop: Shop) -> None:
    shop.ctl("stop", "shop:2")


def reload(shop: Shop) -> None:
    shop.ctl("reload", "shop:2")


def restart(shop: Shop) -> None:
    shop.ctl("restart", "shop:2")


@pytest.mark.parametrize("what", [fewer, one, stop, reload, restart])
def test_who_stops_beside_others_answers_what_it_has_accepted(
    daemon: MakeDaemon, what: Callable[[Shop], None]
) -> None:
    shop = Shop(daemon, "instances = 3")
    before = shop.pids()
    for _ in range(2):
        with shop.visited():
            what(shop)
        now = shop.pids()
        assert {name: now.get(name) for name in ("shop:1", "shop:3") if name in now}.items() <= before.items()
        if what in (fewer, one):
            shop.apply("instances = 3")
            before = shop.pids()


@pytest.mark.parametrize("kind", ["tcp", "unix", "moved"])
def test_a_new_version_of_fewer_processes(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """Nobody meets it before all its processes are ready, and nobody is lost when all of before stop."""
    old = f"unix:{tmp_path}/shop.sock" if kind == "unix" else f"127.0.0.1:{free_port()}"
    new = f"127.0.0.1:{free_port()}" if kind == "moved" else old
    gate = tmp_path / "gate"

    def at(address: str, number: int, version: int) -> str:
        lines = table(0, f"instances = {number}", version).replace("127.0.0.1:0", address)
        return lines.replace(f"command = {DROPS}", f'command = ["sh", "-c", """{script}"""]')

    script = f"while test $VERSION = 2 -a -e {gate}; do sleep 0.02; done; exec {' '.join(json.loads(DROPS))}"
    running = daemon(at(old, 3, 1))
    before = {info["pid"] for info in running.status().values()}
    gate.touch()
    with Visitors(old, 40) as visitors:
        visitors.goes_on()
        running.write_table(at(new, 2, 2))
        assert running.ctl("apply", "--no-wait").returncode == 0
        wait_until(lambda: any((info["beside"] or {}).get("pid") for info in running.status().values()))
        visitors.goes_on()
        assert set(visitors.answered) == {"1"}
        gate.unlink()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), 30)
        if kind != "moved":
            wait_until(lambda: visitors.answered["2"] > 10, 20)
    assert (visitors.lost, visitors.refused > 0) == ([], kind == "moved")
    wait_until(lambda: set(running.status()) == {"shop:1", "shop:2"})
    wait_until(lambda: running.ctl("diff").returncode == 0)


def test_a_bad_version_of_fewer_processes_leaves_all_as_they_are(daemon: MakeDaemon) -> None:
    shop = Shop(daemon, "instances = 3")
    before = shop.pids()
    with shop.visited():
        shop.running.write_table(table(shop.port, "instances = 2").replace('"2"]', '"no number"]'))
        assert shop.running.ctl("apply", timeout=60).returncode == 1
    assert shop.pids() == before


def test_the_supervisor_dies_while_fewer_take_over(daemon: MakeDaemon) -> None:
    """When they serve already: the next one lets all of before go."""
    shop = Shop(daemon, "instances = 3")
    before = shop.pids()
    with shop.visited():
        shop.running.write_table(table(shop.port, "instances = 2", 2))
        assert shop.running.ctl("apply", "--no-wait").returncode == 0
        wait_until(lambda: (shop.running.status()["shop:1"]["beside"] or {}).get("role") == "the one before", 20)
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before.values()), 30)
    wait_until(lambda: set(shop.pids()) == {"shop:1", "shop:2"})
    wait_until(lambda: shop.running.ctl("diff").returncode == 0)


def test_a_smaller_number_by_hand(daemon: MakeDaemon) -> None:
    """Those that stay are not touched."""
    shop = Shop(daemon, "scale = { min = 0, max = 3, idle_timeout = '1h' }")
    shop.ctl("scale", "shop", "3")
    for number in (2, 1):
        before = shop.pids()
        with shop.visited():
            shop.ctl("scale", "shop", str(number))
        assert shop.pids().items() <= before.items()
        assert len(shop.pids()) == number


@pytest.mark.parametrize("upgrade", [False, True])
def test_the_supervisor_goes_while_nobody_is_heard(daemon: MakeDaemon, upgrade: bool) -> None:
    """That ends with it when it is killed, and before it stands still: who connects is heard again."""
    shop = Shop(daemon, "instances = 2")
    with shop.visited(work=300) as visitors:
        shop.ctl("stop", "--no-wait", "shop:2")
        if upgrade:
            shop.ctl("daemon", "upgrade")
        else:
            os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        visitors.goes_on()
    wait_until(lambda: shop.running.status()["shop:1"]["state"] == "RUNNING")


def test_the_supervisor_dies_in_a_reload_of_one_of_several(daemon: MakeDaemon) -> None:
    """When its successor serves, on the same socket. The next one lets the one before go in the same way."""
    shop = Shop(daemon, "instances = 2")
    before = shop.pids()
    with shop.visited(work=100):
        shop.ctl("reload", "--no-wait", "shop:2")
        wait_until(lambda: (shop.running.status()["shop:2"]["beside"] or {}).get("role") == "the one before", 20)
        os.kill(shop.running.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{before['shop:2']}").exists(), 20)
    assert shop.pids()["shop:1"] == before["shop:1"]


def test_on_a_unix_socket_they_just_stop(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Nobody asks again there, so nobody may be kept out."""
    running = daemon(table(0, "instances = 2").replace("127.0.0.1:0", f"unix:{tmp_path}/shop.sock"))
    with Visitors(f"unix:{tmp_path}/shop.sock") as visitors:
        visitors.goes_on()
        assert running.ctl("stop", "shop:2").returncode == 0
        visitors.goes_on()
    assert visitors.refused == 0

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


def test_the_supervisor_dies_while_nobody_is_heard(daemon: MakeDaemon) -> None:
    """That ends with it: who connects is heard again."""
    shop = Shop(daemon, "instances = 2")
    with shop.visited(work=300) as visitors:
        shop.ctl("stop", "--no-wait", "shop:2")
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

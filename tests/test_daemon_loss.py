"""No request is lost: real servers under a real daemon, asked all the time while things happen to them.

Each site is asked directly and, where nginx is installed, through it as well, with connections to the site that nginx
keeps alive. `python -m tests.loss scenario --help` does the same by hand, longer and with more servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from tests.conftest import MakeDaemon
from tests.harness import free_port
from tests.loss import nginx
from tests.loss.client import MODES, Plan
from tests.loss.load import run
from tests.loss.scenarios import SCENARIOS, Site
from tests.loss.servers import SERVERS
from tests.loss.tally import Result

ALL = tuple(f"{name}{how}" for name in MODES for how in ("", "/close"))
NEW, KEPT = ("get/close", "up/close", "down/close"), ("get", "up", "pipelined", "down")
RATE = 10
"""Requests a second on each connection, so that two processors are enough for all."""


def play(
    daemon: MakeDaemon, scenarios: str, times: int = 1, *, server: str = "wsgi", unix: bool = False,
    modes: Sequence[str] = ALL, connections: int = 0,
) -> tuple[Site, dict[str, Result]]:  # fmt: skip
    """Scenarios under load, of one connection for each mode or more. The site, which has gone, and what became of the
    requests: "direct", and by "nginx"."""
    if not SERVERS[server].installed:
        pytest.skip(f"{server} is not installed")
    gated = scenarios == "start"
    with Site(server, unix=unix, nginx=bool(nginx.found()) and not gated, gated=gated, make=daemon) as site:
        with ExitStack() as stack:
            loads = {}
            for front in site.addresses:
                asked = tuple(modes) if front == "direct" else ALL
                plan = {"modes": asked, "connections": connections or len(asked), "rate": RATE, "work": 2}
                loads[front] = stack.enter_context(site.load(front, **plan))
            for scenario in scenarios.split():
                SCENARIOS[scenario](site, times)
        return site, {front: running.result for front, running in loads.items()}


def nothing_lost(results: dict[str, Result], idle_closes: int = 0) -> None:
    """No request failed, and no connection was closed while idle more often than that."""
    for front, result in results.items():
        shown = "\n".join((front, *result.lines()))
        assert not result.total.failed, shown
        assert result.total.idle_closed_most <= (idle_closes if front == "direct" else 0), shown


def versions(results: dict[str, Result], *expected: str) -> None:
    """Those answered, in this order."""
    assert {front: result.versions for front, result in results.items()} == {front: list(expected) for front in results}


@pytest.mark.skipif(
    not nginx.found(), reason="nginx is not installed: the other tests here ask their sites directly only"
)
def test_nginx_by_itself_is_an_error_when_its_site_is_not_there() -> None:
    """What it hides would be no measure."""
    with nginx.nginx(f"127.0.0.1:{free_port()}") as address:
        assert run(Plan(address, requests=10)).total.failed["error"] >= 10


def test_who_comes_before_the_first_start_waits(daemon: MakeDaemon) -> None:
    _, results = play(daemon, "start", 2, connections=64)
    nothing_lost(results)
    versions(results, "1", "2")


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_restart_of_the_built_in_server(daemon: MakeDaemon, unix: bool) -> None:
    """Its keep-alive connections are drained: none is closed without a word."""
    _, results = play(daemon, "restart", unix=unix)
    nothing_lost(results)
    versions(results, "1", "2")


def test_one_of_two_processes_is_killed(daemon: MakeDaemon) -> None:
    """Nothing fails but what was in its hands in that moment."""
    site, results = play(daemon, "kill", 2)
    assert len(site.killed) == 2
    for front, result in results.items():
        failures = result.total.failures
        assert len(failures) == result.total.failed_count, "\n".join(result.lines())
        for failure in failures:
            victims = [
                str(pid) for pid, before, after in site.killed if failure.began <= after and before <= failure.at
            ]
            assert victims, (failure, site.killed)
            if front == "direct":
                assert failure.kind in ("reset", "cut", "short"), failure
                assert failure.who.partition(" ")[0] in ("", *victims), failure


def test_a_killed_supervisor_and_an_upgrade_are_not_noticed(daemon: MakeDaemon) -> None:
    _, results = play(daemon, "supervisor upgrade")
    nothing_lost(results)
    assert all(len(result.pids) <= 2 for result in results.values()), "the processes of before"


RELOADED = ("gunicorn", "gthread", "uwsgi")
"""Servers that lose nothing by the present `reload`, a restart. The others lose what they accept and do not read."""


@pytest.mark.parametrize("server", RELOADED)
def test_reload(daemon: MakeDaemon, server: str) -> None:
    """New connections, and all by nginx, never fail. A kept one is closed at most once by each reload."""
    modes = NEW + KEPT if SERVERS[server].keeps else NEW
    _, results = play(daemon, "reload", server=server, modes=modes)
    nothing_lost(results, idle_closes=1)
    versions(results, "1", "2")

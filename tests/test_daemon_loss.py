"""No request is lost: real servers under a real daemon, asked all the time while things happen to them.

Each site is asked directly and, where nginx is installed, through it as well, with connections to the site that nginx
keeps alive. `python -m tests.loss scenario --help` does the same by hand, longer and with more servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from tests.conftest import MakeDaemon
from tests.harness import free_port
from tests.loss import nginx
from tests.loss.client import MODES, Plan
from tests.loss.load import Running, loads, run
from tests.loss.scenarios import SCENARIOS, Site, killed_in_trial, killed_when_passed, side_by_side
from tests.loss.servers import SERVERS, Server
from tests.loss.tally import Result

ALL = tuple(f"{name}{how}" for name in MODES for how in ("", "/close"))
NEW, KEPT = ("get/close", "up/close", "down/close"), ("get", "up", "pipelined", "down")
RATE = 10
"""Requests a second on each connection, so that two processors are enough for all."""
SIDE_BY_SIDE_RATE = 3
"""The same, where all servers are asked at the same time."""


def play(
    daemon: MakeDaemon, scenarios: str, times: int = 1, *, server: Server = SERVERS["wsgi"], unix: bool = False,
    modes: Sequence[str] = ALL, connections: int = 0, more: str = "",
) -> tuple[Site, dict[str, Result]]:  # fmt: skip
    """Scenarios under load, of one connection for each mode or more. The site, which has gone, and what became of the
    requests: "direct", and by "nginx"."""
    if not server.installed:
        pytest.skip(f"{server.module} is not installed")
    gated = scenarios == "start"
    proxied = bool(nginx.found()) and not gated
    with Site(server, unix=unix, nginx=proxied, gated=gated, make=daemon, more=more) as site:
        with ExitStack() as stack:
            loads = {}
            for front in site.addresses:
                asked = tuple(modes) if front == "direct" else ALL
                plan = {"modes": asked, "connections": connections or len(asked), "rate": RATE, "work": 2}
                loads[front] = stack.enter_context(site.load(front, **plan))
            for scenario in scenarios.split():
                SCENARIOS[scenario](site, times)
        return site, {front: running.result for front, running in loads.items()}


def nothing_lost(results: dict[str, Result], idle_closes: int = 0, server: str = "") -> None:
    """No request failed, and no connection was closed while idle more often than that."""
    for front, result in results.items():
        shown = "\n".join((server, front, *result.lines()))
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
            # nginx may give a request to a connection of which it has not heard yet that it ended. It asks again, but
            # not for a POST.
            late = 1.0 if front == "nginx" and failure.mode.startswith("post") else 0.0
            victims = [
                str(pid) for pid, before, after in site.killed if failure.began <= after + late and before <= failure.at
            ]
            assert victims, (failure, site.killed)
            if front == "direct":
                assert failure.kind in ("reset", "cut", "short"), failure
                assert failure.who.partition(" ")[0] in ("", *victims), failure


def test_a_killed_supervisor_and_an_upgrade_are_not_noticed(daemon: MakeDaemon) -> None:
    _, results = play(daemon, "supervisor upgrade")
    nothing_lost(results)
    assert all(len(result.pids) <= 2 for result in results.values()), "the processes of before"


# --- a new release, a bad one, and a supervisor that dies meanwhile ------------------------------------------------


def asked_of(server: Server, front: str) -> tuple[str, ...]:
    """The modes for it: what a server is not made for is no loss. nginx asks no POST again, so a server that closes a
    connection without a word is not sent one."""
    if front == "nginx":
        return (*NEW, "get", "up", "down", "stream", *(["post"] if server.tells else []))
    return NEW + tuple(mode for mode in KEPT if server.keeps and (server.pipelines or mode != "pipelined"))


@contextmanager
def several(
    daemon: MakeDaemon, servers: Mapping[str, Server], unix: bool
) -> Iterator[tuple[list[Site], dict[str, dict[str, Running]]]]:
    """Those that are installed, in one daemon, and the loads on each of them, by site and front."""
    sites = [
        Site(server, name=name, unix=unix, nginx=bool(nginx.found()), more="start_seconds = 0.2")
        for name, server in servers.items()
        if server.installed
    ]
    with side_by_side(sites, daemon):
        fronts = [(site, front) for site in sites for front in site.addresses]
        plans = []
        for site, front in fronts:
            modes = asked_of(site.server, front)
            plans.append(Plan(site.addresses[front], modes, connections=len(modes), rate=SIDE_BY_SIDE_RATE, work=2))
        with loads(plans) as all_of_them:
            running: dict[str, dict[str, Running]] = {}
            for (site, front), load in zip(fronts, all_of_them, strict=True):
                running.setdefault(site.name, {})[front] = load
                site.loads.append(load)
            yield sites, running


def at_the_same_time(sites: Sequence[Site], scenario: str, times: int = 1) -> None:
    with ThreadPoolExecutor(len(sites)) as threads:
        for done in [threads.submit(SCENARIOS[scenario], site, times) for site in sites]:
            done.result()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_nobody_notices_a_reload_and_a_bad_release(daemon: MakeDaemon, unix: bool) -> None:
    """Every server: new connections, and all by nginx, never fail. A kept one is closed at most once by each reload."""
    with several(daemon, SERVERS, unix) as (sites, running):
        at_the_same_time(sites, "reload")
        at_the_same_time(sites, "rollback")
    for site in sites:
        results = {front: load.result for front, load in running[site.name].items()}
        nothing_lost(results, 1, site.name)
        versions(results, "1", "2")


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_nobody_notices_that_the_supervisor_dies_in_a_reload(daemon: MakeDaemon, unix: bool) -> None:
    """In the trial, and when new connections go to the successor. (Of several processes that share a socket, the one
    before has gone too soon for that.)"""
    one = replace(SERVERS["wsgi"], lines=SERVERS["wsgi"].lines.replace("workers = 2", "workers = 1"))
    three = {"wsgi": one, "gthread": SERVERS["gthread"], "uvicorn": SERVERS["uvicorn"]}
    with several(daemon, three, unix) as (sites, running):
        killed_in_trial(sites)
        killed_when_passed(sites)
    for site in sites:
        results = {front: load.result for front, load in running[site.name].items()}
        nothing_lost(results, site.version, site.name)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_rolling_reload_of_three_processes(daemon: MakeDaemon, unix: bool) -> None:
    """One by one, two at a time, and one that is bad. No connection is closed without a word."""
    three = replace(SERVERS["wsgi"], lines=SERVERS["wsgi"].lines.replace("workers = 2", "workers = 3"))
    site, results = play(daemon, "reload reload_two rollback", server=three, unix=unix, more="start_seconds = 0.2")
    assert site.version == 3
    nothing_lost(results)
    versions(results, "1", "2", "3")

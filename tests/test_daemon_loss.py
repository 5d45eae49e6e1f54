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
NEW = ("get/close", "up/close", "down/close")
RATE = 10
"""Requests a second on each connection, so that two processors are enough for all."""
SIDE_BY_SIDE_RATE = 3
"""The same, where all servers are asked at the same time."""
MANY, MANY_CONNECTIONS, MANY_RATE = ("wsgi", "uvicorn"), 64, 2
"""Sites that have so many connections then."""


def play(daemon: MakeDaemon, scenarios: str, server: Server, *, unix: bool) -> tuple[Site, dict[str, Result]]:
    """Scenarios under load, of one connection for each mode. The site, which has gone, and what became of the requests:
    "direct", and by "nginx"."""
    more = "start_seconds = 0.2"
    with Site(server, unix=unix, nginx=bool(nginx.found()), make=daemon, more=more) as site:
        with ExitStack() as stack:
            plan = {"modes": ALL, "connections": len(ALL), "rate": RATE, "work": 2}
            loads = {front: stack.enter_context(site.load(front, **plan)) for front in site.addresses}
            for scenario in scenarios.split():
                SCENARIOS[scenario](site, 1)
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


# --- all servers, side by side ------------------------------------------------------------------------------------


def asked_of(server: Server, front: str) -> tuple[str, ...]:
    """The modes for it: what a server is not made for is no loss. One that cuts off an answer that waits for its client
    is not asked for long ones."""
    modes = [*NEW, "get", "post"]
    if front == "nginx":
        modes += ["up", "down", "stream"]
    elif server.keeps:
        modes += ["down", "up", *(["pipelined"] if server.pipelines else [])]
    return tuple(mode for mode in modes if server.whole or not mode.startswith(("down", "stream")))


@contextmanager
def several(
    daemon: MakeDaemon, servers: Mapping[str, Server], unix: bool, gated: bool = False
) -> Iterator[tuple[list[Site], dict[str, dict[str, Running]]]]:
    """Those that are installed, in one daemon, and the loads on each of them, by site and front."""
    sites = [
        Site(server, name=name, unix=unix, nginx=bool(nginx.found()), gated=gated, more="start_seconds = 0.2")
        for name, server in servers.items()
        if server.installed
    ]
    with side_by_side(sites, daemon):
        fronts = [(site, front) for site in sites for front in site.addresses]
        plans = []
        for site, front in fronts:
            modes = asked_of(site.server, front)
            many = site.name in MANY and front == "direct"
            count, rate = (MANY_CONNECTIONS, MANY_RATE) if many else (len(modes), SIDE_BY_SIDE_RATE)
            plans.append(Plan(site.addresses[front], modes, connections=count, rate=rate, work=2))
        with loads(plans) as all_of_them:
            running: dict[str, dict[str, Running]] = {}
            for (site, front), load in zip(fronts, all_of_them, strict=True):
                running.setdefault(site.name, {})[front] = load
                site.loads.append(load)
            yield sites, running


def at_the_same_time(sites: Sequence[Site], step: str) -> None:
    with ThreadPoolExecutor(len(sites)) as threads:
        for done in [threads.submit(SCENARIOS[step], site, 1) for site in sites]:
            done.result()


def only_in_their_hands(site: Site, results: Mapping[str, Result]) -> None:
    """Nothing failed but what a process that was killed was working on in that moment."""
    for front, result in results.items():
        shown = "\n".join((site.name, front, *result.lines()))
        failures = result.total.failures
        assert len(failures) == result.total.failed_count, shown
        for failure in failures:
            # nginx may give a request to a connection of which it has not heard yet that it ended. It asks again, but
            # not for a POST.
            late = 1.0 if front == "nginx" and failure.mode.startswith("post") else 0.0
            met = [each for each in site.killed if failure.began <= each.after + late and each.before <= failure.at]
            assert met, (failure, site.killed, shown)
            if front == "direct":
                assert failure.kind in ("reset", "cut", "short"), (failure, shown)
                assert failure.who.partition(" ")[0] in ("", *(str(pid) for each in met for pid in each.pids)), shown


STEPS = {
    "tcp": "start reload rollback kill supervisor upgrade restart",
    "unix": "reload rollback restart",
}
"""What all servers go through, one step after the other, by the kind of their sockets."""


@pytest.mark.parametrize("kind", STEPS)
def test_nobody_notices_what_happens_to_a_site(daemon: MakeDaemon, kind: str) -> None:
    """Every server: no request fails, and no kept connection is closed by a stop without a word (pipelined ones at most
    once by each). Who is killed takes with it what it works on, and no more."""
    steps = STEPS[kind].split()
    with several(daemon, SERVERS, kind == "unix", gated="start" in steps) as (sites, running):
        for step in steps:
            if step in ("supervisor", "upgrade"):  # of them all
                SCENARIOS[step](sites[0], 1)
                at_the_same_time(sites, "nothing")
            else:
                at_the_same_time(sites, step)
    for site in sites:
        results = {front: load.result for front, load in running[site.name].items()}
        only_in_their_hands(site, results)
        for front, result in results.items():
            for mode, tally in result.modes.items():
                # Who asks less than once a second is closed by the others, too (`idle-grace`).
                stops = sum(step in ("reload", "restart") for step in steps) * (mode == "pipelined")
                most = stops + len(site.killed) if front == "direct" else 0
                assert tally.idle_closed_most <= most, "\n".join((site.name, front, *result.lines()))
        versions(results, *(str(number + 1) for number in range(site.version)))
        assert site.version == 1 + sum(step in ("reload", "restart") for step in steps)


@pytest.mark.parametrize(("unix", "others"), [(False, ("gthread", "uvicorn")), (True, ())], ids=["tcp", "unix"])
def test_nobody_notices_that_the_supervisor_dies_in_a_reload(
    daemon: MakeDaemon, unix: bool, others: Sequence[str]
) -> None:
    """In the trial, and when new connections go to the successor. (Of several processes that share a socket, the one
    before has gone too soon for that.)"""
    one = replace(SERVERS["wsgi"], lines=SERVERS["wsgi"].lines.replace("workers = 2", "workers = 1"))
    with several(daemon, {"wsgi": one, **{name: SERVERS[name] for name in others}}, unix) as (sites, running):
        killed_in_trial(sites)
        killed_when_passed(sites)
    for site in sites:
        results = {front: load.result for front, load in running[site.name].items()}
        nothing_lost(results, site.version, site.name)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_rolling_reload_of_three_processes(daemon: MakeDaemon, unix: bool) -> None:
    """One by one, two at a time, and one that is bad. No connection is closed without a word."""
    three = replace(SERVERS["wsgi"], lines=SERVERS["wsgi"].lines.replace("workers = 2", "workers = 3"))
    site, results = play(daemon, "reload reload_two rollback", three, unix=unix)
    assert site.version == 3
    nothing_lost(results)
    versions(results, "1", "2", "3")

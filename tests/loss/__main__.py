"""The command line of the request-loss harness.

python -m tests.loss load 127.0.0.1:8000 --modes get,up/close --connections 16 --seconds 10
python -m tests.loss scenario reload --server gunicorn --nginx --times 5
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tests.loss import nginx
from tests.loss.client import MODES, Plan, mode_of
from tests.loss.load import run
from tests.loss.scenarios import SCENARIOS, Site
from tests.loss.servers import SERVERS
from tests.loss.tally import KINDS, Result


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    described = "\n".join(f"  {kind:8} {text}" for kind, text in KINDS.items())
    whole = argparse.ArgumentParser(
        prog="python -m tests.loss",
        description="Asks a site all the time, and counts every request that is lost.",
        epilog=f"How a request fails:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    plain = Plan("")
    for name, text in (("load", "a load on a running tests/sites/numbered_site.py"), ("scenario", "a load on a site")):
        command = commands.add_parser(name, help=text)
        if name == "load":
            command.add_argument("address", help="HOST:PORT or unix:PATH")
            command.add_argument("--seconds", type=float, default=10.0)
            command.add_argument("--requests", type=int, default=0, help="end after so many")
        else:
            command.add_argument("scenario", choices=(*SCENARIOS, "all"), help="what the site goes through")
            command.add_argument("--server", choices=(*SERVERS, "all"), default="wsgi", help="all: those installed")
            command.add_argument("--unix", action="store_true", help="the server listens on a Unix socket")
            command.add_argument("--nginx", action="store_true", help="ask an nginx before it as well")
            command.add_argument("--times", type=int, default=3)
        command.add_argument("--modes", default=",".join(plain.modes), help=f"{', '.join(MODES)}, each with /close")
        command.add_argument("--connections", type=int, default=plain.connections)
        command.add_argument("--rate", type=float, default=plain.rate, help="requests a second on each; 0: all")
        command.add_argument("--work", type=int, default=0, help="milliseconds of the site for each request")
        command.add_argument("--json", action="store_true", help="the whole result")
    return whole


def main(argv: Sequence[str]) -> int:
    """Prints the counts; 1 when a request was lost."""
    whole = parser()
    options = whole.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing is left behind
    plan = {
        "modes": tuple(options.modes.split(",")),
        "connections": options.connections, "rate": options.rate, "work": options.work,
    }  # fmt: skip
    try:
        for mode in plan["modes"]:
            mode_of(mode)
    except ValueError as error:
        whole.error(str(error))
    if options.command == "load":
        return show(run(Plan(options.address, **plan, limit=options.seconds, requests=options.requests)), options.json)
    if options.nginx and not nginx.found():
        whole.error("nginx is not installed")
    servers = [name for name, server in SERVERS.items() if server.installed and options.server in (name, "all")]
    if not servers:
        whole.error(f"{options.server} is not installed")
    scenarios = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
    return max(play(options, plan, scenario, server) for server in servers for scenario in scenarios)


def play(options: argparse.Namespace, plan: Mapping[str, Any], scenario: str, server: str) -> int:
    """One scenario with one server; prints the counts, and returns the exit status."""
    with ExitStack() as stack:
        gated = scenario == "start"
        site = stack.enter_context(Site(server, unix=options.unix, nginx=options.nginx, gated=gated))
        with ExitStack() as loads:
            asked = {front: loads.enter_context(site.load(front, **plan)) for front in site.addresses}
            SCENARIOS[scenario](site, options.times)
    named = {front: f"{scenario} {server} {front}" for front in asked}
    return max(show(running.result, options.json, named[front]) for front, running in asked.items())


def show(result: Result, as_json: bool, name: str = "") -> int:
    """Prints a result, and returns the exit status."""
    if name and not as_json:
        sys.stdout.write(f"--- {name}\n")
    text = json.dumps({"name": name, **result.document()}, indent=1) if as_json else "\n".join(result.lines())
    sys.stdout.write(f"{text}\n")
    return 1 if result.total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

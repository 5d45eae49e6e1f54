"""The command line of the benchmark; see docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procman
from tests.bench import crash, fleet, growth, lineup, logs, losses, many, modes, reading, restart, rpc, tools, wsgi
from tests.bench.figures import Figure, table
from tests.bench.machine import raise_limits
from tests.bench.plan import FULL, QUICK, TINY, Plan
from tests.loss.servers import SERVERS

NAMES = (*restart.NAMES, *fleet.NAMES, *rpc.NAMES, *logs.NAMES, *many.NAMES, *crash.NAMES, *losses.SHORT)
LONG = (*losses.NAMES, *wsgi.NAMES, *modes.NAMES, *reading.NAMES)
"""Measured only when they are named: losses takes an hour, and each has a table of its own."""

PLANS = {"full": FULL, "quick": QUICK, "tiny": TINY}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is named, prints the table, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    unknown = sorted(set(options.name) - {*NAMES, *LONG})
    if unknown:
        parser.error(f"unknown NAME: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, _end)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # who measures starts does not want each of them to compile
    raise_limits()
    tools.run_as_users_do()
    for title, why in lineup.left_out().items():
        _say(f"{title} is left out: {why}")
    plan = PLANS["tiny" if options.tiny else "quick" if options.quick else "full"]
    plan = replace(plan, peers=tuple(options.peer))
    if options.programs:
        crashes = {many: plan.crashes.get(many, 1) for many in options.programs if many}
        plan = replace(plan, fleets=tuple(map(plan.fleet, options.programs)), crashes=crashes)
    machine = _machine()
    start = time.monotonic()
    figures = measure(plan, options.name or NAMES)
    if set(options.name) & set(NAMES) or not options.name:
        seconds = time.monotonic() - start
        print(f"{machine}\nmedian (smallest–largest), how many times procman is better; {seconds:.0f} s\n")
        print("\n".join([*table(figures, lineup.ORDER), "", *growth.table(figures)]))
    more = _by_name(plan, options, machine)
    if options.json:
        document = {
            "machine": machine, "seconds": time.monotonic() - start, "left_out": dict(lineup.left_out()),
            "figures": [figure.document() for figure in figures], **more,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _by_name(plan: Plan, options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """Measures those of LONG that are named and prints their tables. What JSON shows of them."""
    documents: dict[str, Any] = {}

    def show(what: str, lines: Iterable[str], document: Any, name: str) -> None:
        print("\n".join([machine, what, "", *lines, ""]))
        documents[name] = document

    if "losses" in options.name:
        lost = losses.run(plan, options.server, _say)
        what = f"{plan.reloads} reloads under {losses.CONNECTIONS} connections"
        show(what, losses.table(lost), [row.document() for row in lost], "losses")
    if "wsgi" in options.name:
        rates = wsgi.run(plan, _say)
        what = f"median (smallest–largest) of {plan.wsgi_rounds} rounds"
        show(what, wsgi.table(rates), [row.document() for row in rates], "wsgi")
    if "modes" in options.name:
        costs = modes.run(plan, _say)
        what = f"median (smallest–largest) of {plan.mode_rounds} rounds"
        show(what, modes.table(costs), costs.document(), "modes")
    if "reading" in options.name:
        read = reading.run(plan, _say)
        what = f"a log of {plan.reading_gb:g} GB; median (smallest–largest)"
        show(what, reading.table(read), [row.document() for row in read], "reading")
    return documents


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measures procman beside its peers.")
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(NAMES)} (default: all), {', '.join(LONG)}"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: the order of size")
    parser.add_argument("--tiny", action="store_true", help="so little that the figures say nothing")
    parser.add_argument(
        "--programs", action="append", type=int, default=[], metavar="N",
        help=f"managers of so many programs (repeatable), instead of {[each.programs for each in FULL.fleets]}",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", default=[], choices=lineup.ORDER[1:], help="only this one beside (repeatable)"
    )
    parser.add_argument(
        "--server", action="append", default=[], choices=SERVERS, help="losses: with this one only (repeatable)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all samples to this file too")
    return parser


def measure(plan: Plan, names: Sequence[str]) -> list[Figure]:
    """The figures that `names` name."""
    figures: list[Figure] = []
    if "restart" in names:
        figures += restart.run(plan, _say)
    if set(names) & set(fleet.NAMES):
        figures += fleet.run(plan, names, _say)
    for part in (rpc, logs, many, crash):
        if set(names) & set(part.NAMES):
            figures += part.run(plan, _say)
    if "reload" in names:
        figures += losses.short(plan, _say)
    return figures


def _end(*_: object) -> None:
    """Leaves all blocks, so that nothing is left behind; a second SIGTERM must not come between."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("ended by SIGTERM")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _machine() -> str:
    """One line: when, on what, and what was measured."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    load1 = os.getloadavg()[0]
    how = "installed" if tools.installed() else "from its checkout"
    python = f"Python {platform.python_version()}"
    versions = ", ".join([f"procman {procman.__version__} ({how})", *_versions()])
    return f"{day}, {os.cpu_count()} cores, load {load1:.1f}, Linux {platform.release()}, {python}, {versions}"


def _versions() -> list[str]:
    """'Supervisor 4.3.0' and so on, of those that are here."""
    found = []
    for kind in lineup.present()[1:]:
        words = kind.version_argv()
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=tools.environment({}))
        found.append(f"{kind.title} {done.stdout.strip().splitlines()[-1]}" if done.stdout.strip() else kind.title)
    return found


if __name__ == "__main__":
    sys.exit(main())

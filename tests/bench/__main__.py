"""The command line of the benchmark; see docs/performance.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench import fleet, logs, losses, many, modes, reading, restart, wsgi
from tests.bench.figures import Figure, table
from tests.bench.plan import FULL, QUICK, TINY, Plan
from tests.loss.servers import SERVERS

NAMES = (*restart.NAMES, *fleet.NAMES, *logs.NAMES, *many.NAMES)
LONG = (*losses.NAMES, *wsgi.NAMES, *modes.NAMES, *reading.NAMES)
"""Measured only when they are named: losses takes half an hour, and each has a table of its own."""

PLANS = {"full": FULL, "quick": QUICK, "tiny": TINY}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is named, prints the table, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    unknown = sorted(set(options.name) - {*NAMES, *LONG})
    if unknown:
        parser.error(f"unknown NAME: {', '.join(unknown)}")
    if importlib.util.find_spec("supervisor") is None:
        print("The package supervisor is missing: pip install -e '.[dev]'", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing is left behind
    plan = PLANS["tiny" if options.tiny else "quick" if options.quick else "full"]
    start = time.monotonic()
    figures = measure(plan, options.name or NAMES)
    lost = losses.run(plan, options.server, _say) if "losses" in options.name else []
    rates = wsgi.run(plan, _say) if "wsgi" in options.name else []
    costs = modes.run(plan, _say) if "modes" in options.name else modes.Measured()
    read = reading.run(plan, _say) if "reading" in options.name else []
    seconds = time.monotonic() - start
    if figures or not (lost or rates or costs.costs or read):
        print(f"{_machine()}\nmedian (smallest–largest); ratio: how many times procman is better\n")
        print("\n".join(table(figures)))
    if lost:
        print(f"{_machine()}\n{plan.reloads} reloads under {losses.CONNECTIONS} connections\n")
        print("\n".join(losses.table(lost)))
    if rates:
        print(f"{_machine()}\nmedian (smallest–largest) of {plan.wsgi_rounds} rounds\n")
        print("\n".join(wsgi.table(rates)))
    if costs.costs:
        print(f"{_machine()}\nmedian (smallest–largest) of {plan.log_rounds} rounds\n")
        print("\n".join(modes.table(costs)))
    if read:
        print(f"{_machine()}\na log of {plan.reading_gb:g} GB; median (smallest–largest)\n")
        print("\n".join(reading.table(read)))
    if options.json:
        more: dict[str, Any] = {"losses": [row.document() for row in lost], "wsgi": [row.document() for row in rates]}
        more["modes"] = costs.document()
        more["reading"] = [row.document() for row in read]
        document = {**_document(figures, seconds, plan), **more}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measures procman beside Supervisor.")
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(NAMES)} (default: all), {', '.join(LONG)}"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: the order of size")
    parser.add_argument("--tiny", action="store_true", help="so little that the figures say nothing")
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
    if "logs" in names:
        figures += logs.run(plan, _say)
    if "many" in names:
        figures += many.run(plan, _say)
    return figures


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _machine() -> str:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    load = os.getloadavg()[0]
    versions = f"Python {platform.python_version()}, Supervisor {metadata.version('supervisor')}"
    return f"{day}, {os.cpu_count()} cores, load {load:.1f}, Linux {platform.release()}, {versions}"


def _document(figures: Sequence[Figure], seconds: float, plan: Plan) -> dict[str, Any]:
    rows = [figure.document() for figure in figures]
    return {"machine": _machine(), "seconds": seconds, "programs": plan.programs, "figures": rows}


if __name__ == "__main__":
    sys.exit(main())

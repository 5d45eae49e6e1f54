"""Hostile input: everything that procman reads is fed with things that it was not made for.

    python -m tests.guarantees fuzz [--inputs 100000] [--seed 1] [target...]
    python -m tests.guarantees fuzz --atheris 60 [target...]

Each target has a generator (structure-aware, and bytes of valid inputs that were touched) and a check, which fails for
any exception but the documented ones, a hang, a descriptor that stays open, a program that was touched, or a next valid
request that is not answered. hypothesis draws the inputs and makes one that breaks something small; the same seed draws
the same ones. Where atheris is installed, the pure targets run under it as well, guided by coverage, each for --guided
seconds in a process of its own; with --atheris, nothing else runs. Prints a line for each target, and exits with 1 when
something is broken.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from tests.guarantees.fuzz import guided, hostile, live, pure
from tests.guarantees.fuzz.isolated import inside, possible, run_isolated
from tests.guarantees.fuzz.run import Outcome, Target, run

__all__ = ["TARGETS", "inside", "main"]

TARGETS = [
    Target("rpc", 24_000, 400, pure.rpc_lines, pure.plainly(pure.check_rpc), shakes=3),
    Target("wire", 8_000, 200, pure.packets, pure.plainly(pure.check_wire)),
    Target("table", 16_000, 200, pure.tables, pure.plainly(pure.check_table), shakes=1),
    Target("values", 10_000, 200, pure.converted, pure.plainly(pure.check_value)),
    Target("state", 20_000, 400, pure.states, pure.state_folder, shakes=3),
    Target("memory", 12_000, 200, pure.memories, pure.plainly(pure.check_memory), shakes=3),
    Target("legacy", 8_000, 200, pure.legacies, pure.plainly(pure.check_legacy), shakes=3),
    Target("kept", 6_000, 150, pure.kept_documents, pure.plainly(pure.check_kept), shakes=3),
    Target("note", 12_000, 300, pure.notes, pure.plainly(pure.check_note), shakes=3),
    Target("workers", 8_000, 200, pure.answers, pure.plainly(pure.check_answer)),
    Target("server", 8_000, 100, live.chunks, live.server, seconds=60),
    Target("methods", 8_000, 150, live.calls, live.methods, seconds=60),
    Target("notify", 6_000, 100, live.datagrams, live.notifications),
    Target("strangers", 1_000, 30, live.datagrams, live.strangers),
    Target("keeper", 1_000, 20, hostile.orders, hostile.keeper, seconds=60, isolated=True),
    Target("start", 400, 24, hostile.starts, hostile.supervisors, seconds=60),
]


def main(argv: Sequence[str]) -> int:
    """The long form. Returns 0, or 1 when something is broken."""
    names = [target.name for target in TARGETS]
    total = sum(target.inputs for target in TARGETS)
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees fuzz")
    parser.add_argument("--inputs", type=int, default=total, help=f"in all targets together (default: {total})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", type=int, metavar="SECONDS", default=20, help="for each target under atheris")
    parser.add_argument("--atheris", type=int, metavar="SECONDS", default=0, help="only these, for so long each")
    parser.add_argument("target", nargs="*", help=f"of: {', '.join(names)} (default: all)")
    options = parser.parse_args(argv)
    if unknown := set(options.target) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` must leave no daemon behind
    if options.atheris:
        return guided.main(options.target or pure.GUIDED, options.atheris)
    chosen = [target for target in TARGETS if not options.target or target.name in options.target]
    share = options.inputs / (total if not options.target else sum(target.inputs for target in chosen))
    if any(target.isolated for target in chosen) and not possible():
        print("no pid namespace can be made here: the keeper is not asked to adopt anything")
    outcomes = []
    for target in chosen:
        runs = run_isolated if target.isolated else run
        outcomes.append(runs(target, max(1, round(target.inputs * share)), options.seed))
        print(outcomes[-1], flush=True)
    broken = guided.main(options.target or pure.GUIDED, options.guided) if options.guided else 0
    return max(report(outcomes, options.seed), broken)


def report(outcomes: Sequence[Outcome], seed: int) -> int:
    """Prints the total and what is broken; the exit status."""
    inputs, seconds = sum(o.inputs for o in outcomes), sum(o.seconds for o in outcomes)
    broken = [outcome for outcome in outcomes if outcome.finding]
    print(f"{'total':12} {inputs:7} inputs {seconds:7.1f} s, seed {seed}, {len(broken)} of {len(outcomes)} broken")
    for outcome in broken:
        print(f"\n{outcome.finding}\nagain: python -m tests.guarantees fuzz --seed {seed} {outcome.name}")
    sys.stdout.flush()
    return 1 if broken else 0

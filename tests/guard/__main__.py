"""`python -m tests.guard`: counts, and fails when one has grown. `--record` takes them as they are from now on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.guard import scenes
from tests.guard.baseline import FILE, RECORD, compare, load, save


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 where nothing has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.guard", description="Counts what procman does.")
    parser.add_argument("--record", action="store_true", help="take the counts as they are")
    parser.add_argument("--show", action="store_true", help="print all of them")
    parser.add_argument("--file", type=Path, default=FILE, metavar="FILE", help="the record (default: %(default)s)")
    options = parser.parse_args(argv)
    counts, left_out = scenes.run()
    if options.show or options.record:
        print("\n".join(f"{count.value:8}  {count.key}" for count in counts))
    if options.record:
        save(options.file, counts)
    verdict = compare(counts, load(options.file))
    for line in [*left_out, *verdict.notes]:
        print(f"guard: {line}")
    for line in verdict.wrong:
        print(f"guard: {line}", file=sys.stderr)
    if verdict.wrong:
        print(f"guard: find what does more than before. Where it has to: {RECORD}", file=sys.stderr)
        return 1
    print(f"guard: {len(counts)} counts, none has grown")
    return 0


if __name__ == "__main__":
    sys.exit(main())

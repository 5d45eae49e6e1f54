"""`python -m tests.guarantees NAME [options]` runs the long form of the module of that name, and ends as it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> int:
    """The exit status of the guarantee; 2 when there is none of that name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.stderr.write(f"usage: python -m tests.guarantees {{{','.join(names)}}} [options]\n")
        return 2
    status: int = importlib.import_module(f"tests.guarantees.{sys.argv[1]}").main(sys.argv[2:])
    return status


if __name__ == "__main__":
    sys.exit(main())

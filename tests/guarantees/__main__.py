"""`python -m tests.guarantees NAME [options]`: runs the module of that name, and exits with what its `main` returns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if "\ndef main(" in path.read_text())

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python -m tests.guarantees {'|'.join(NAMES)} [options]", file=sys.stderr)
        sys.exit(2)
    sys.exit(importlib.import_module(f"tests.guarantees.{sys.argv[1]}").main(sys.argv[2:]))

"""`python -m tests.guarantees NAME [options]`: runs the module of that name, and exits with what its `main` returns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

FILES = (*Path(__file__).parent.glob("[a-z]*.py"), *Path(__file__).parent.glob("*/__init__.py"))
NAMES = {
    path.parent.name if path.name == "__init__.py" else path.stem
    for path in FILES
    if "\ndef main(" in path.read_text()
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m tests.guarantees {{{','.join(sorted(NAMES))}}} [options]")
    sys.exit(importlib.import_module(f"tests.guarantees.{sys.argv[1]}").main(sys.argv[2:]))

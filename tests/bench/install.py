"""Installs what the benchmark measures in .run/bench, as far as this machine can: `make bench` runs it first.

    python -m tests.bench.install

procman (a real installation of this checkout, no editable one), Supervisor and Circus come into a virtual environment,
by pip; pm2 by npm. Nothing is installed outside of that folder: s6 and runit are used where they are. It says what is
left out and why, and fails only when procman can't be installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench import lineup, tools
from tests.harness import PROJECT

PEERS = ("supervisor>=4.2", "circus>=0.19")
PM2 = "pm2@7"
SECONDS = 600.0
"""Bound of one installation."""

PACKAGED = ("procman", "pyproject.toml", "README.md", "LICENSE")


def main() -> int:
    """See the module."""
    tools.run_as_users_do()
    python = str(tools.VENV / "bin" / "python")
    if not Path(python).exists():
        _run([sys.executable, "-m", "venv", "--clear", str(tools.VENV)])
    failed = "" if _current() else _install_procman(python)
    if failed:
        print(f"procman can't be installed in {tools.VENV}:\n{failed}", file=sys.stderr)
        return 1
    for peer in PEERS:
        name = peer.partition(">")[0]
        wrong = _run([python, "-m", "pip", "install", "--quiet", peer])
        if wrong:
            print(f"pip can't install {name}:\n{wrong}", file=sys.stderr)
    if shutil.which("npm") and not (tools.FOLDER / "node_modules" / ".bin" / "pm2").exists():
        wrong = _run(["npm", "install", "--silent", "--no-save", "--prefix", str(tools.FOLDER), PM2])
        if wrong:
            print(f"npm can't install {PM2}:\n{wrong}", file=sys.stderr)
    for title, why in lineup.left_out().items():
        print(f"{title} is left out: {why}")
    return 0


def _current() -> bool:
    """Whether procman is there as it is in this checkout."""
    tools.installed.cache_clear()
    return tools.installed()


def _install_procman(python: str) -> str:
    """From a copy, for building leaves files beside its source. What went wrong, "" for nothing."""
    with tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp") as folder:
        for name in PACKAGED:
            source = PROJECT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)
        wrong = _run([python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", folder])
        wrong = wrong or _run([python, "-m", "pip", "install", "--quiet", folder])  # what it needs
    return wrong or ("" if _current() else "pip said that it did, but what is there is not this checkout")


def _run(argv: Sequence[str]) -> str:
    """Runs a command; the end of its output if it failed."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            argv, check=False, timeout=SECONDS, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr)[-2000:] if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())

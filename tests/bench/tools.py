"""Where the commands of the contenders are: what `make bench` has installed in .run/bench, else what this machine has.

procman too: a benchmark should run what a user types, so the scripts `procmand` and `procmanctl` of a real
installation. The one in .run/bench counts only while it equals this checkout; otherwise the checkout itself runs.
"""

from __future__ import annotations

import filecmp
import functools
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.harness import PROJECT

FOLDER = PROJECT / ".run" / "bench"
VENV = FOLDER / "venv"

_NOT_INHERITED = ("PYTHON", "PROCMAN_", "PM2_", "XDG_", "LISTEN_", "NOTIFY_", "WATCHDOG_", "NODE_")


def find(command: str) -> str:
    """The path of a command, "" when there is none."""
    folders = [VENV / "bin", FOLDER / "node_modules" / ".bin", Path(sys.executable).parent]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    return shutil.which(command, path=path) or ""


def missing(*commands: str) -> list[str]:
    """Those that this machine does not have."""
    return [command for command in commands if not find(command)]


@functools.cache
def installed() -> bool:
    """Whether .run/bench holds procman as it is here."""
    packages = list(VENV.glob("lib/python*/site-packages/procman"))
    return len(packages) == 1 and not _differ(PROJECT / "procman", packages[0])


def _differ(one: Path, other: Path) -> bool:
    files = {path.relative_to(one) for path in one.rglob("*.py")}
    if files != {path.relative_to(other) for path in other.rglob("*.py")}:
        return True
    return any(not filecmp.cmp(one / file, other / file, shallow=False) for file in files)


def procman(script: str) -> list[str]:
    """How a script of procman is run."""
    if installed():
        return [str(VENV / "bin" / script)]
    path = Path(sys.executable).parent / script
    module = {"procmand": "procman.daemon", "procmanctl": "procman.ctl.main"}[script]
    return [str(path)] if path.exists() else [sys.executable, "-c", f"import sys, {module} as m; sys.exit(m.main())"]


def python() -> list[str]:
    """The Python that runs it, which finds it wherever it is called."""
    return [str(VENV / "bin" / "python") if installed() else sys.executable, "-P"]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """For a contender and its commands: ours, without what would lead it to other folders and modules."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    return {**kept, **more}


def run_as_users_do() -> None:
    """Python that we start keeps what it has compiled, whatever the environment of this run says: else each start of a
    checkout would compile all of it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def procman_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The same for procman: without an installation, Python must find the checkout."""
    return environment(more if installed() else {"PYTHONPATH": str(PROJECT), **more})

"""A target in a pid namespace of its own: whatever is signalled there, nobody else's process is hit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from tests.guarantees.fuzz.run import ISOLATED, Outcome, Target, run
from tests.harness import PROJECT

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def possible() -> bool:
    """Whether this user may make one."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "/bin/true"], capture_output=True, timeout=60, check=False).returncode == 0


def run_isolated(target: Target, inputs: int, seed: int) -> Outcome:
    """As `run`, where it can be in a namespace of its own; elsewhere the target leaves out what needs one."""
    if ISOLATED in os.environ or not possible():
        return run(target, inputs, seed)
    code = "import sys; from tests.guarantees import fuzz; fuzz.inside(fuzz.TARGETS, sys.argv[1:])"
    command = [*UNSHARE, sys.executable, "-c", code, target.name, str(inputs), str(seed)]
    environment = {**os.environ, ISOLATED: "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    try:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Outcome(target.name, finding=f"it was ended with everything around it: {done.returncode} {done.stdout}")


def inside(targets: Sequence[Target], arguments: Sequence[str]) -> None:
    """In the namespace: runs the target that is asked for, and prints what came of it as JSON."""
    name, inputs, seed = arguments
    [chosen] = [target for target in targets if target.name == name]
    print(json.dumps(asdict(run(chosen, int(inputs), int(seed)))), flush=True)

"""The pure targets under atheris: libFuzzer draws the bytes and is guided by what they reach in the code.

Each runs in a process of its own, which ends at its first finding. Where atheris is not installed (it is a wheel for
some systems only), it is said that it was left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.guarantees.fuzz import pure
from tests.harness import PROJECT

CHILD = """
import sys, atheris
with atheris.instrument_imports(include=["procman", "tomllib", "json"], enable_loader_override=False):
    from tests.guarantees.fuzz import guided
guided.child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""

START_SECONDS = 120
"""For imports, instrumentation and the seeds, on a busy machine."""


def main(names: Sequence[str], seconds: int) -> int:
    """Runs each of these targets for so long. Returns 0, or 1 when something is broken."""
    chosen = [name for name in names if name in pure.GUIDED]
    if chosen and not possible():
        print(f"atheris is not installed here: what coverage guides was LEFT OUT ({', '.join(chosen)})")
        return 0
    return max([_one(name, seconds) for name in chosen], default=0)


def possible() -> bool:
    """Whether atheris is there, and can be imported: it is compiled."""
    command = [sys.executable, "-c", "import atheris"]
    return subprocess.run(command, capture_output=True, timeout=START_SECONDS, check=False).returncode == 0


def _one(name: str, seconds: int) -> int:
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as folder:
        for number, data in enumerate(pure.guided(name)[1]):
            (Path(folder) / f"seed-{number}").write_bytes(data)
        command = [sys.executable, "-c", CHILD, name, str(seconds), folder]
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, errors="replace", timeout=seconds + START_SECONDS,
            check=False,
        )  # fmt: skip
    runs = [line for line in done.stderr.splitlines() if line.startswith(("#", "Done", "stat::number_of_executed"))]
    verdict = "BROKEN" if done.returncode else "good"
    print(f"atheris {name:12} {runs[-1] if runs else 'nothing ran'}  {verdict}", flush=True)
    if done.returncode:
        print((done.stdout + done.stderr)[-4000:])
    return 1 if done.returncode else 0


def child(name: str, seconds: int, folder: str) -> None:
    """In the process of its own: does not return."""
    import atheris

    check, _ = pure.guided(name)
    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-timeout=20", "-max_len=16384", "-rss_limit_mb=2048"]
    atheris.Setup([*arguments, f"-artifact_prefix={folder}/", folder], check)
    atheris.Fuzz()

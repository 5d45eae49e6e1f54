"""python -m tests.shares [PYTEST_ARGUMENT ...]: the tests as several pytest processes at once, each with its own files.

Most tests wait for something, so this takes a fraction of the time. What the first one prints is shown as it comes,
that of the others when they have ended. Files and `file::test` among the arguments are shared out; without any, all
files are.
`SHARES` in the environment says how many processes (3). `--junitxml=a.xml` becomes a-1.xml, a-2.xml and so on. The
status is 0 when all that ran has passed, and something ran.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent

SECONDS = {
    "daemon_canary": 170,
    **dict.fromkeys(("real_servers", "daemon_scale", "daemon_loss"), 120),
    **dict.fromkeys(("daemon_overlap", "bench"), 80),
    "guarantee_crash": 60,
    **dict.fromkeys(("daemon_recovery", "daemon_adoption", "daemon_rotation", "fuzz"), 40),
    **dict.fromkeys(("daemon_upgrade", "guarantee_disks", "guarantee_processes", "keeper", "daemon_apply"), 30),
    **dict.fromkeys(("daemon_renew", "daemon_ready", "daemon_paths"), 30),
    **dict.fromkeys(("daemon_wayback", "daemon_setback"), 12),
    "daemon_moves": 100,
    "daemon_fewer": 70,
    "daemon_units": 140,
    **dict.fromkeys(("daemon_meanwhile", "daemon_in_turn"), 45),
    "guarantee_disks_killed": 30,
    **dict.fromkeys(
        ("wsgi", "daemon_sites", "daemon_servers", "server", "daemon_operate", "daemon_life", "logs"), 20
    ),
    **dict.fromkeys(("spool", "guard"), 20),
    **dict.fromkeys(("guarantee_resources", "guarantee_kill", "guarantee_soak", "loss"), 12),
    **dict.fromkeys(("daemon_logs", "daemon_modes", "daemon_reread", "guarantee_modes", "offered"), 12),
    **dict.fromkeys(("daemon_reading", "daemon_reading_rotation", "reading_meanwhile", "logtext"), 12),
}
"""What files take, roughly, where that is more than ORDINARY: only for an even share."""

ORDINARY = 3

NOTHING_RAN = 5
"""pytest's status for that: a share may have nothing of what -k asks for."""


def split(items: Sequence[str], count: int) -> list[list[str]]:
    """`items`, files or parts of files, in `count` lists of about the same time. A file is in one of them, whole."""
    files: dict[str, list[str]] = {}
    for item in items:
        files.setdefault(item.partition("::")[0], []).append(item)
    lists: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count

    def seconds(file: str) -> int:
        return SECONDS.get(Path(file).stem.removeprefix("test_"), ORDINARY)

    for file in sorted(files, key=lambda file: (-seconds(file), file)):
        least = totals.index(min(totals))
        lists[least] += files[file]
        totals[least] += seconds(file)
    return [sorted(each) for each in lists if each]


def arguments_of(share: int, arguments: Sequence[str]) -> list[str]:
    """The options for one share: what pytest writes goes to files of its own."""
    cache = ["-o", f"cache_dir=.pytest_cache/{share}"]
    report = "--junitxml="
    named = (f"{word.removesuffix('.xml')}-{share}.xml" if word.startswith(report) else word for word in arguments)
    return [*cache, *named]


def is_test(word: str) -> bool:
    """Whether an argument names tests."""
    return not word.startswith("-") and Path(word.partition("::")[0]).exists()


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    asked = [word for word in arguments if is_test(word)]
    options = [word for word in arguments if not is_test(word)]
    folders = [str(path) for word in asked if Path(word).is_dir() for path in sorted(Path(word).glob("test_*.py"))]
    items = [word for word in asked if not Path(word).is_dir()] + folders
    items = items or [os.path.relpath(path) for path in sorted(TESTS.glob("test_*.py"))]
    lists = split(items, int(os.environ.get("SHARES", "3")))
    began = time.monotonic()
    statuses = []
    with contextlib.ExitStack() as stack:
        running = []
        for share, files in enumerate(lists, 1):
            output = None if share == 1 else stack.enter_context(tempfile.TemporaryFile())
            command = [sys.executable, "-m", "pytest", *arguments_of(share, options), *files]
            process = subprocess.Popen(command, stdout=output, stderr=None if output is None else subprocess.STDOUT)
            running.append((share, process, output))
        for share, process, output in running:
            statuses.append(process.wait())
            if output is not None:
                say(f"\nShare {share} of {len(lists)}:")
                output.seek(0)
                sys.stdout.buffer.write(output.read())
    say(f"\n{len(lists)} shares: {time.monotonic() - began:.0f} s, exit statuses {', '.join(map(str, statuses))}")
    ran = [status for status in statuses if status != NOTHING_RAN]
    return max(map(abs, ran), default=NOTHING_RAN)


def say(line: str) -> None:
    """A line of our own, behind all that was printed before."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(2)

"""The guard against work that creeps in: it fails when one count grows, and says which."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guard.baseline import FILE, Count, compare, load, save
from tests.harness import PROJECT


@pytest.mark.parametrize(
    ("count", "wrong", "notes"),
    [
        (Count("a", 10), [], []),
        (Count("a", 11), ["a: grew from 10 to 11"], []),
        (Count("a", 11, slack=0.1), [], []),
        (Count("a", 12, slack=0.1), ["a: grew from 10 to 12 (11 are allowed)"], []),
        (Count("a", 12, spare=2), [], []),
        (Count("a", 8, slack=0.1), [], ["a: fell from 10 to 8; record it, so that it stays there"]),
        (Count("b", 1), ["b: 1, and there is no record of it"], []),
        (Count("b", 1, python="3.99"), [], ["b: not compared, there is no record for Python 3.99"]),
    ],
)
def test_a_count_that_grows_is_wrong(count: Count, wrong: list[str], notes: list[str]) -> None:
    verdict = compare([count], {"a": 10})
    assert (verdict.wrong, verdict.notes) == (wrong, notes)


def test_a_record_keeps_what_was_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "record"
    save(file, [Count("a", 1), Count("b", 2, python="3.11")])
    save(file, [Count("a", 3)])
    assert load(file) == {"a": 3, "b, Python 3.11": 2}


def test_the_guard_fails_when_one_count_has_grown(tmp_path: Path) -> None:
    """The whole of it, beside a record in which one figure is one less."""
    recorded = load(FILE)
    name = "modules of procman that procmanctl status imports"
    file = tmp_path / "record"
    file.write_text(json.dumps(recorded | {name: recorded[name] - 1}))
    command = [sys.executable, "-m", "tests.guard", "--file", str(file)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert f"guard: {name}: grew from {recorded[name] - 1} to {recorded[name]}\n" in done.stderr
    assert "python -m tests.guard --record" in done.stderr


def test_a_machine_without_strace_is_told_what_is_left_out(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    code = "from tests.guard import calls; print(calls.missing())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "there is no strace (apt install strace)\n"

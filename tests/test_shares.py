"""How the tests are shared out among processes: each one runs once, in one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import shares
from tests.harness import PROJECT

FILES = [f"tests/test_{name}.py" for name in [*shares.SECONDS, "values", "rpc", "table"]]


@given(st.lists(st.sampled_from(FILES), unique=True), st.integers(1, 5))
def test_each_file_is_in_one_share(items: list[str], count: int) -> None:
    lists = shares.split(items, count)
    assert sorted(item for each in lists for item in each) == sorted(items)
    assert all(lists), "no share is empty: pytest would run everything"


def test_a_file_stays_whole() -> None:
    """Its fixtures of the module are made once, and its tests may be in order."""
    items = ["tests/test_a.py::one", "tests/test_b.py", "tests/test_a.py::two"]
    assert ["tests/test_a.py::one", "tests/test_a.py::two"] in shares.split(items, 2)


def test_every_slow_file_is_there() -> None:
    assert [name for name in shares.SECONDS if not (PROJECT / "tests" / f"test_{name}.py").exists()] == []


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "SHARES": "2"}
    command = [sys.executable, "-m", "tests.shares", "-q", "-p", "no:hypothesispytest", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("second", "options", "status"),
    [("assert True", [], 0), ("assert False", [], 1), ("assert False", ["-k", "first"], 0), ("", ["-k", "third"], 5)],
)
def test_the_status_and_all_reports(tmp_path: Path, second: str, options: list[str], status: int) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text("def test_first(): pass\n")
    (tmp_path / "test_two.py").write_text(f"def test_second(): {second or 'pass'}\n")
    done = run(tmp_path, *options, "--junitxml=report.xml", "test_one.py", "test_two.py")
    assert done.returncode == status, done.stdout + done.stderr
    assert {path.name for path in tmp_path.glob("*.xml")} == {"report-1.xml", "report-2.xml"}
    if status == 1:
        assert "test_second" in done.stdout

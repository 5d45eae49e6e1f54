"""The benchmark still works: it measures every figure and shows it. What the figures say is no matter of a test."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import LONG
from tests.bench.figures import Figure, digits, percentile, table
from tests.harness import PROJECT

ROWS = {
    "restart": "restart restart-p99",
    "boot": "boot",
    "idle": "idle idle-sampling",
    "memory": "memory memory-dirty",
    "status": "status",
    "stop": "stop stop-command",
    "logs": "logs logs-cpu logs-gzip logs-gzip-cpu",
    "many": "many",
}
"""The figures of each NAME of the command line."""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


def test_every_row_is_measured_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("--tiny", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    assert {row["name"] for row in document["figures"]} == {name for rows in ROWS.values() for name in rows.split()}
    for row in document["figures"]:
        assert row["title"] in done.stdout
        for side in ("procman", "supervisor", *(["limit"] if row["limit_title"] else [])):
            assert row[side]["samples"], (row["name"], side)


def test_one_name_measures_its_rows_only(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("status", "--tiny", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "figures.json").read_text())["figures"]] == ["status"]


def test_the_modes_of_the_log_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("modes", "--tiny", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["modes"]
    assert {"raw", "timestamps", "json", "inherit", "inherit, json"} <= {cost["mode"] for cost in found["costs"]}
    assert all(len(cost["rates"]) == 1 and not cost["dropped"] for cost in found["costs"])
    assert [delay["load"] for delay in found["delays"]] == ["nothing", "raw", "json"]
    assert all(delay["restarts"] and delay["requests"] for delay in found["delays"])
    assert "| timestamps |" in done.stdout


def test_an_unknown_name_is_named() -> None:
    done = bench("speed")
    assert done.returncode == 2
    assert "unknown NAME: speed" in done.stderr


def test_losses_of_one_server_are_counted_beside_its_peers(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("losses", "--tiny", "--server", "gunicorn", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    rows = {row["contender"]: row for row in json.loads((tmp_path / "figures.json").read_text())["losses"]}
    assert {"procmanctl reload", "supervisorctl restart", "SIGHUP to gunicorn"} <= set(rows)
    for contender, row in rows.items():
        assert contender in done.stdout
        assert row["requests"] >= 200
    assert rows["procmanctl reload"]["failed"] == {}
    assert rows["supervisorctl restart"]["failed"]["refused"] > 0


def test_wsgi_servers_are_measured_in_turns(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("wsgi", "--tiny", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    rows = {row["server"]: row for row in json.loads((tmp_path / "figures.json").read_text())["wsgi"]}
    assert {"built-in", "gunicorn sync", "gunicorn gthread", "uWSGI"} <= set(rows)
    for server, row in rows.items():
        assert server in done.stdout
        assert min(row["kept"] + row["close"]) > 0


def test_the_page_explains_every_name() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    assert [name for name in (*ROWS, *LONG) if f"\n`{name}`\n: " not in page] == []


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 50, 2.5),
        ([float(number) for number in range(1, 101)], 99, 99.0),
        ([1.0, 9.0], 99, 9.0),
        ([5.0], 99, 5.0),
    ],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == expected


def test_a_ratio_above_1_is_good_for_procman() -> None:
    assert Figure("a", "a", "ms", (2.0,), (8.0,)).ratio == 4
    assert Figure("a", "a", "MB/s", (8.0,), (2.0,), more_is_better=True).ratio == 4
    assert math.isnan(Figure("a", "a", "ms", (), (8.0,)).ratio)
    assert math.isnan(Figure("a", "a", "ms", (0.0,), (8.0,)).ratio)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.5, "0.50"), (1.26, "1.3"), (12.6, "13"), (99.6, "100"), (1056.4, "1056")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_the_table_shows_what_there_is() -> None:
    figure = Figure("a", "boot", "ms", (4.0, 2.0), (8.0, 9.0), (1.0,), "bare", notes=("2 MB were lost",))
    *_, row, note = table([figure])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["boot, ms", "3.0 (2.0–4.0)", "8.5 (8.0–9.0)", "2.8 ×", "1.0 (1.0–1.0): bare"]
    assert note == "boot: 2 MB were lost"
    *_, row = table([Figure("a", "boot", "ms", (4.0,), ())])
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["–", "–", "–"]


def test_reading_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="Supervisor is not installed")
    done = bench("reading", "--tiny", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["reading"]
    assert [row["title"] for row in rows if row["title"] not in done.stdout] == []
    assert all(row["by_daemon"] for row in rows)
    assert all(row["by_files"] and row["memory_mb"] and row["daemon_memory_mb"] for row in rows[4:])

"""The benchmark still works: it measures every figure of all that is installed, and shows it. What the figures say is
no matter of a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bench import growth, lineup, losses
from tests.bench.__main__ import LONG, NAMES
from tests.bench.figures import OURS, Limit, read
from tests.bench.plan import TINY, Plan
from tests.harness import PROJECT
from tests.loss.tally import Result, Tally

ROWS = {
    "restart": "restart restart-p99",
    "boot": "boot",
    "idle": "idle idle-sampling idle-wake-ups idle-wake-ups-sampling",
    "memory": "memory memory-dirty",
    "status": "status status-call status-call-p99",
    "again": "again",
    "print": "print",
    "recover": "recover",
    "stop": "stop stop-command",
    "rpc": "rpc-1 rpc-1-p99 rpc-50 rpc-50-p99",
    "logs": "logs-10 logs-10-cpu logs-100 logs-100-cpu logs-1000 logs-1000-cpu"
    " logs-100-gzip logs-100-gzip-cpu logs-100-stamped logs-100-stamped-cpu",
    "many": "many many-rate",
    "crash": "crash-decides crash-decides-same crash-decides-twice crash-decides-away"
    " crash-parent crash-parent-same crash-parent-twice crash-parent-away",
    "reload": "reload",
}
"""The figures of each NAME of the command line."""

SOCKETS = {OURS, "Supervisor", "Circus", "pm2"}
"""Who answers on a socket, for the figures that ask."""

ALWAYS_LIMITED = {"restart", "boot", "memory", "status", "again", "stop", "rpc-1", "rpc-50", "logs-10", "logs-100"}

HERE = {kind.title for kind in lineup.present()}

pytestmark = pytest.mark.timeout(400)


class Run:
    """A tiny run of the benchmark that goes on."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        self.file = folder / "figures.json"
        self._output, self._errors = folder / "output", folder / "errors"
        command = [sys.executable, "-m", "tests.bench", "--tiny", *arguments, "--json", str(self.file)]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=errors,
            )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Waits; its exit status and what it complained about."""
        return self._process.wait(380), self._errors.read_text()

    def document(self) -> dict[str, Any]:
        """What it measured. All of it was printed too, and nobody was left out."""
        status, errors = self.end()
        assert status == 0, errors
        document: dict[str, Any] = json.loads(self.file.read_text())
        printed = self.printed()
        for row in document["figures"]:
            assert row["title"] in printed
            assert not [note for note in row["notes"] if "left out" in note or "dropped" in note or "missing" in note]
        return document

    def printed(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def close(self) -> None:
        """Ends it, if nobody has waited for it."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)


PARTS = (
    "boot idle memory again print status recover stop", "restart rpc", "logs many", "crash",
    "losses --server gunicorn", "modes reading",
)  # fmt: skip
"""Runs that go on at the same time: they mostly wait, and no figure of theirs matters."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """A run of each part."""
    folder = tmp_path_factory.mktemp("bench")
    found: dict[str, Run] = {}
    try:
        for part in PARTS:
            found[part] = Run(folder / part.partition(" ")[0], *part.split())
        yield found
    finally:
        for run in found.values():
            run.close()


@pytest.mark.parametrize("part", PARTS[:4])
def test_every_row_is_measured_for_all_that_is_installed(part: str, runs: Mapping[str, Run]) -> None:
    names = part.split()
    rows = {row["name"]: row for row in runs[part].document()["figures"]}
    assert set(rows) == {row for name in names for row in ROWS[name].split()}
    for name, row in rows.items():
        expected = HERE & SOCKETS if name.startswith(("rpc", "status-call")) else HERE
        if name.startswith("logs-100-stamped"):
            expected = HERE - {"Supervisor"}
        assert set(row["sides"]) == ({OURS} if name == "recover" else expected), name
        assert all(side["samples"] for side in row["sides"].values()), name
        assert row["limit"] or name not in ALWAYS_LIMITED, name


def test_programs_survive_a_crash_of_procman_once(runs: Mapping[str, Run]) -> None:
    rows = {row["name"]: row for row in runs["crash"].document()["figures"]}
    for victim in ("decides", "parent"):
        found = {what: rows[f"crash-{victim}-{what}"]["sides"][OURS]["value"] for what in ("same", "twice", "away")}
        assert found == {"same": 10, "twice": 0, "away": 0}


def test_a_manager_without_programs_and_growth(tmp_path: Path) -> None:
    few = ("--programs", "0", "--programs", "11", "--programs", "20", "--peer", "s6")
    run = Run(tmp_path / "run", "memory", "boot", *few)
    rows = run.document()["figures"]
    assert [row["programs"] for row in rows if row["name"] == "memory"] == [0, 11, 20]
    assert [row["programs"] for row in rows if row["name"] == "boot"] == [11, 20]
    assert "memory, PSS, MB" in "\n".join(growth.table(read(run.document())))


def test_an_unknown_name_is_named(tmp_path: Path) -> None:
    status, errors = Run(tmp_path / "run", "speed").end()
    assert status == 2
    assert "unknown NAME: speed" in errors


def test_losses_of_one_server_are_counted_beside_all_peers(runs: Mapping[str, Run]) -> None:
    pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    rows = {row["contender"]: row for row in runs["losses --server gunicorn"].document()["losses"]}
    ways = {
        OURS: "procmanctl reload", "Supervisor": "supervisorctl restart", "Circus": "circusctl reload",
        "pm2": "pm2 reload", "s6": "s6-svc -r", "runit": "sv restart",
    }  # fmt: skip
    assert set(rows) == {ways[title] for title in HERE} | {"SIGHUP to gunicorn"}
    assert all(row["requests"] >= 200 for row in rows.values())
    assert rows["procmanctl reload"]["failed"] == {}
    if "Supervisor" in HERE:
        assert rows["supervisorctl restart"]["failed"]["refused"] > 0


def test_reload_is_one_figure_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"procmanctl reload": 0, "supervisorctl restart": 7, "s6-svc -r": 5, "SIGHUP to gunicorn": 1}

    def lost(plan: Plan, servers: Collection[str], say: object) -> list[losses.Row]:
        assert (plan.reloads, list(servers)) == (TINY.short_reloads, ["gunicorn"])
        tallies = {by: Tally(requests=50, failed={"refused": count} if count else {}) for by, count in failed.items()}
        return [losses.Row(by, "gunicorn", 1, Result(modes={"get": tally})) for by, tally in tallies.items()]

    monkeypatch.setattr(losses, "run", lost)
    [row] = losses.short(TINY, print)
    assert row.name == ROWS["reload"]
    assert row.sides == {OURS: (0.0,), "Supervisor": (14.0,), "s6": (10.0,)}
    assert row.limit == Limit("SIGHUP to gunicorn alone", (2.0,))
    assert "by supervisorctl restart: 7 of 50" in row.notes


def test_the_modes_of_the_log_are_measured(runs: Mapping[str, Run]) -> None:
    found = runs["modes reading"].document()["modes"]
    assert {"raw", "timestamps", "json", "inherit", "inherit, json"} <= {cost["mode"] for cost in found["costs"]}
    assert all(len(cost["rates"]) == 1 and not cost["dropped"] for cost in found["costs"])
    assert [delay["load"] for delay in found["delays"]] == ["nothing", "raw", "json"]
    assert all(delay["restarts"] and delay["requests"] for delay in found["delays"])
    assert "| timestamps |" in runs["modes reading"].printed()


def test_reading_is_measured(runs: Mapping[str, Run]) -> None:
    rows = runs["modes reading"].document()["reading"]
    assert [row["title"] for row in rows if row["title"] not in runs["modes reading"].printed()] == []
    assert all(row["by_daemon"] for row in rows)
    assert all(row["by_files"] and row["memory_mb"] and row["daemon_memory_mb"] for row in rows[4:])


def test_wsgi_servers_are_measured_in_turns(tmp_path: Path) -> None:
    rows = {row["server"]: row for row in Run(tmp_path / "run", "wsgi").document()["wsgi"]}
    assert {"built-in", "gunicorn sync", "gunicorn gthread", "uWSGI"} <= set(rows)
    for row in rows.values():
        assert min(row["kept"] + row["close"]) > 0


def test_every_name_has_rows_and_is_explained() -> None:
    page = (PROJECT / "docs" / "performance.md").read_text()
    assert set(ROWS) == set(NAMES)
    assert [name for name in (*NAMES, *LONG) if f"\n`{name}`\n: " not in page] == []

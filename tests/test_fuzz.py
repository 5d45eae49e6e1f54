"""The short form of `make fuzz`: a few of the inputs of each target, the same ones each time."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.guarantees import fuzz
from tests.guarantees.fuzz import guided, hostile, pure
from tests.guarantees.fuzz.inputs import dumped
from tests.guarantees.fuzz.isolated import run_isolated
from tests.guarantees.fuzz.run import Target, run

SEED = 20260101


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_hostile_input_does_no_harm(target: Target) -> None:
    outcome = (run_isolated if target.isolated else run)(target, target.short, SEED)
    assert not outcome.finding, outcome.finding


def test_there_are_as_many_inputs_as_promised() -> None:
    assert sum(target.inputs for target in fuzz.TARGETS) >= 100_000


def test_a_finding_is_told_with_its_smallest_input(capsys: pytest.CaptureFixture[str]) -> None:
    """The fuzz itself has teeth: what breaks is found, made small, and ends with status 1."""
    target = next(target for target in fuzz.TARGETS if target.name == "values")

    def check(drawn: tuple[str, object]) -> None:
        assert not (drawn[0] == "size" and isinstance(drawn[1], list)), "broken"

    broken = fuzz.pure.plainly(check)
    outcome = run(Target("values", 2000, 1, target.strategy, broken), 2000, SEED)
    assert "smallest input: ('size', [])" in outcome.finding
    assert fuzz.report([outcome], SEED) == 1
    assert "again: python -m tests.guarantees fuzz --seed 20260101 values" in capsys.readouterr().out


def test_a_hang_is_a_finding() -> None:
    def check(drawn: object) -> None:
        while True:
            pass

    target = next(target for target in fuzz.TARGETS if target.name == "values")
    outcome = run(Target("values", 1, 1, target.strategy, fuzz.pure.plainly(check), seconds=0.01), 1, SEED)
    assert "more than 0.01 s of CPU time" in outcome.finding


def test_that_atheris_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(guided, "possible", lambda: False)
    assert guided.main(pure.GUIDED, 1) == 0
    assert "LEFT OUT (rpc, wire, table, state, legacy, note)" in capsys.readouterr().out


@pytest.mark.parametrize("name", pure.GUIDED)
def test_what_atheris_starts_from_is_good(name: str) -> None:
    check, seeds = pure.guided(name)
    for data in (b"", *seeds):
        check(data)


# --- what it has found, by name -------------------------------------------------------------------------------------


@pytest.fixture
def nest() -> Iterator[hostile.Nest]:
    made = hostile.Nest()
    yield made
    made.close()


WRONG_PARTS: list[dict[str, object]] = [
    {"down": 5},
    {"exit_status": [1]},
    {"exit_status": 10**400},
    {"processes": []},
    {"processes": {"steady": {"state": "RUNNING", "generation": 10**400}}},
    {"sockets": {"listener/web": 5}},
    {"logs": {"log/steady/out": {"read": "ten"}}},
    {"children": {"steady#3": [1e999, 1, 1, "tree"]}},
    {"last": 10**30},
    {"boot_id": []},
]


@pytest.mark.parametrize("part", WRONG_PARTS, ids=lambda part: str(part)[:40])
def test_a_state_file_with_wrong_types_keeps_no_supervisor_from_starting(
    nest: hostile.Nest, part: dict[str, object]
) -> None:
    nest.come_up("state", dumped(hostile.OURS | part))
    kept = nest.folder / "state" / "state.json.bad-1"
    assert json.loads(kept.read_text().replace(str(nest.child.pid), "4711")).items() >= part.items()


STATUS = hostile.OURS["processes"]["steady"]
NO_CHILD = {"alive": False, "pid": None}
LIES: list[dict[str, object]] = [
    STATUS | NO_CHILD | {"state": "STOPPED", "wanted": False},
    STATUS | NO_CHILD | {"state": "FATAL"},
    STATUS | NO_CHILD | {"state": "BACKOFF", "deadline": 0.0},
    STATUS | {"generation": 99},
    STATUS | {"generation": 1},
    STATUS | {"pid": 1},
]


@pytest.mark.parametrize("status", LIES, ids=lambda status: f"{status['state']} {status['generation']} {status['pid']}")
def test_a_state_file_that_is_wrong_about_a_living_child_starts_no_second_one(
    nest: hostile.Nest, status: dict[str, object]
) -> None:
    """The keeper is right about its children, whatever the file says."""
    nest.come_up("state", dumped(hostile.OURS | {"processes": {"steady": status}}))


@pytest.mark.parametrize("content", [b"", b"{}", b"[[]]", b'{"cwd": "/", "environ": {}, "answers": {"read": 5}}'])
def test_a_table_that_is_lost_is_read_from_its_files_again(nest: hostile.Nest, content: bytes) -> None:
    nest.come_up("table", content)


def test_a_plan_with_wrong_types_is_only_a_delay(nest: hostile.Nest) -> None:
    item = pure.PLAN[0] | {"key": "log/steady/out", "path": 7}
    nest.come_up("plan", dumped([item]))


def test_a_message_about_a_child_that_makes_no_sense_is_left_out(nest: hostile.Nest) -> None:
    """Also one that comes behind the snapshot."""
    nest.come_up("snapshot", dumped([hostile.HELLO, {"op": "begin"}, hostile.CHILD | {"start": [0]}]))

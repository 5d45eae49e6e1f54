"""What is told about processes, and a status that goes into the state file and comes back, or does not."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import events, moments, report
from procman.config import Program, Scale
from procman.keeper import asked
from procman.lifecycle import Exit, State, Status
from procman.process import Process
from procman.resources import Sample

ALIVE = Status(State.RUNNING, wanted=True, alive=True, generation=3, pid=77, started=1.5)
RUNNING = replace(ALIVE, started_at=1e9, why="autostart")
KILLED = Exit(None, 9, 1e9, "killed by SIGKILL")


@pytest.mark.parametrize(
    ("message", "code", "number", "reason"),
    [
        ({"status": 0, "ended_at": 5.0}, 0, None, "exit status 0"),
        ({"status": 3 << 8, "ended_at": 5.0}, 3, None, "exit status 3"),
        ({"status": 9, "ended_at": 5.0}, None, 9, "killed by SIGKILL"),
        ({"status": 11 | 128, "ended_at": 5.0}, None, 11, "killed by SIGSEGV"),
        ({"status": 40, "ended_at": 5.0}, None, 40, "killed by signal 40"),
    ],
)
def test_exit_of(message: dict[str, Any], code: int | None, number: int | None, reason: str) -> None:
    assert report.exit_of(message) == Exit(code, number, 5.0, reason)


def test_exit_info() -> None:
    assert report.exit_info(None) is None
    assert report.exit_info(Exit(3, None, 0.0, "r")) == {"code": 3, "at": "1970-01-01T00:00:00.000Z", "reason": "r"}
    assert report.exit_info(KILLED) == {"signal": "SIGKILL", "at": "2001-09-09T01:46:40.000Z", "reason": KILLED.reason}


def test_failure_of() -> None:
    message = {"op": "failed", "step": "exec", "errno": 2, "message": "no such program"}
    assert report.failure_of(message) == "can't start: exec: no such program"


def test_signal_name() -> None:
    assert report.signal_name(signal.SIGTERM) == "SIGTERM"
    assert report.signal_name(77) == "signal 77"


def test_definition_keeps_secrets() -> None:
    program = Program(name="web", program="web", argv=("web",), environment=(("PASSWORD", "hunter2"),))
    shown = report.definition(program)
    assert shown["environment"] == ["PASSWORD"]
    assert shown["stop_signal"] == "SIGTERM"
    assert "hunter2" not in json.dumps(shown), "it can be sent"


def test_info() -> None:
    async def check() -> None:
        program = Program(name="web:2", program="web", instance=2, argv=("web",), groups=("site",))
        process = Process(program, RUNNING, None)  # type: ignore[arg-type]
        shown = report.info(process, Sample(12.5, 1000, 2))
        assert shown.pop("uptime_seconds") > 0
        assert shown == {
            "name": "web:2", "program": "web", "instance": 2, "groups": ["site"], "state": "RUNNING", "wanted": "up",
            "ready": True, "health": None, "pid": 77, "started_at": "2001-09-09T01:46:40.000Z", "restarts": 0,
            "cpu_percent": 12.5, "memory_bytes": 1000, "exit": None, "why": "autostart", "setback": None,
            "beside": None, "scale": None, "behind": [], "output": None,
        }  # fmt: skip
        scaled = Process(replace(program, scale=Scale(min=1, max=4)), RUNNING, None)  # type: ignore[arg-type]
        assert report.info(scaled, None, number=3)["scale"] == {"number": 3, "min": 1, "max": 4, "idle": False}
        process.status = replace(RUNNING, state=State.STOPPED, wanted=False, alive=False, pid=None, exit=KILLED)
        shown = report.info(process, None)
        for key in ("pid", "started_at", "uptime_seconds", "cpu_percent", "memory_bytes"):
            assert shown[key] is None, key
        assert (shown["state"], shown["wanted"], shown["exit"]["signal"]) == ("STOPPED", "down", "SIGKILL")

    asyncio.run(check())


STATUSES = [
    Status(),
    RUNNING,
    replace(RUNNING, state=State.STARTING, pid=None, deadline=12.0),
    replace(RUNNING, state=State.STOPPING, alive=False, pid=None, ending="asked", deadline=1.0, exit=KILLED),
    replace(RUNNING, state=State.STOPPING, ending="failed", deadline=1.0),
    replace(RUNNING, state=State.BACKOFF, alive=False, pid=None, deadline=9.0, failures=3, exit=Exit(1, None, 2, "x")),
    replace(RUNNING, state=State.FATAL, alive=False, pid=None),
    replace(RUNNING, state=State.EXITED, alive=False, pid=None),
]


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.state)
def test_a_status_comes_back_from_the_state_file(status: Status) -> None:
    assert report.status_from(json.loads(json.dumps(report.status_document(status)))) == status


WRONG: list[Any] = [
    None, 7, "RUNNING", [], {"x": 1},
    {"state": "FLYING"}, {"state": None}, {"generation": "3"}, {"generation": True}, {"generation": -1},
    {"generation": 1.5}, {"pid": "77"}, {"started": "now"}, {"started": float("nan")}, {"deadline": "soon"},
    {"deadline": float("inf")}, {"why": None}, {"wanted": 1}, {"alive": "yes"}, {"ending": 3},
    {"exit": 9}, {"exit": {}}, {"exit": {"code": "1", "signal": None, "at": 1.0, "reason": ""}},
    {"exit": {"code": 1, "signal": None, "at": None, "reason": ""}},
    {"exit": {"code": 1, "signal": None, "at": 1.0, "reason": None}},
    {"exit": {"code": 1, "signal": None, "at": 1.0, "reason": "", "more": 1}},
    {"alive": False}, {"state": "STOPPED"}, {"state": "BACKOFF"},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=repr)
def test_what_is_no_status(change: Any) -> None:
    """A supervisor that stumbles over its state file would stumble again and again."""
    good = report.status_document(RUNNING)
    with pytest.raises((TypeError, ValueError, KeyError)):
        report.status_from({**good, **change} if isinstance(change, dict) else change)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(State)),
    lambda inner: st.dictionaries(st.sampled_from(["code", "signal", "at", "reason"]), inner) | st.lists(inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*report.status_document(RUNNING), "x"]), ANYTHING))
def test_any_document_is_a_status_or_an_expected_error(document: dict[str, Any]) -> None:
    try:
        status = report.status_from({"state": "STOPPED", **document})
    except (TypeError, ValueError, KeyError):
        return
    json.dumps(report.status_document(status))


# --- events ---------------------------------------------------------------------------------------------------------


def test_rfc3339() -> None:
    assert moments.rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert moments.rfc3339(1e9 + 0.1239) == "2001-09-09T01:46:40.123Z"


def test_events_are_remembered_and_told() -> None:
    log = events.EventLog()
    told: list[events.Occurrence] = []
    log.add(0.0, "daemon", "", what="ready")
    end = log.subscribe(told.append)
    for number in range(events.KEPT):
        log.add(0.0, "state", "web", number=number)
    end()
    log.add(0.0, "state", "web", number=-1)
    assert len(told) == events.KEPT
    assert told[0] == {"at": "1970-01-01T00:00:00.000Z", "type": "state", "name": "web", "number": 0}
    assert [event["number"] for event in log.recent()] == [*range(1, events.KEPT), -1]


def test_a_subscriber_may_leave_while_it_is_told() -> None:
    log = events.EventLog()
    told: list[str] = []

    def first(event: events.Occurrence) -> None:
        told.append("first")
        end()

    end = log.subscribe(first)
    log.subscribe(lambda event: told.append("second"))
    log.add(0.0, "daemon", "")
    log.add(0.0, "daemon", "")
    assert told == ["first", "second", "second"]


@pytest.mark.parametrize("status", [Status(), RUNNING, replace(RUNNING, exit=KILLED, deadline=5.5, ending="asked")])
def test_a_status_goes_with_the_child_and_comes_back(status: Status) -> None:
    assert report.noted({"note": report.note_of(status)}) == status


@pytest.mark.parametrize("note", ["", "ready", "[]", '{"state": "RUNNING"}', "[" * 100_000])
def test_a_note_that_is_no_status(note: str) -> None:
    assert report.noted({"note": note}) is None
    assert report.noted({}) is None


def test_a_note_is_never_too_long_for_the_keeper() -> None:
    """It goes with signals: one that is refused would leave the child alive."""
    long = "\U0001f600\udcff" * 5000
    status = replace(RUNNING, why=long, exit=replace(KILLED, reason=long))
    note = report.note_of(status)
    assert asked.nonsense({"note": note}) == ""
    noted = report.noted({"note": note})
    assert noted is not None
    assert (noted.generation, noted.why) == (status.generation, long[: report.REASON_MAX])


def test_an_event_that_is_held_back_keeps_its_place() -> None:
    log = events.EventLog()
    told: list[object] = []
    log.subscribe(lambda event: told.append((event["name"], event.get("traceback"))))
    tell_one = log.hold(0.0, "state", "one")
    log.add(0.0, "state", "two")
    tell_three = log.hold(0.0, "state", "three")
    tell_three({"traceback": "3"})
    assert (told, log.recent()) == ([], [])
    tell_one({"traceback": None})
    assert told == [("one", None), ("two", None), ("three", "3")]
    assert [event["name"] for event in log.recent()] == ["one", "two", "three"]

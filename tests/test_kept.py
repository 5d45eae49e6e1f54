"""What stays as an earlier table said, and what a new daemon makes of that."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.config import Address, Config, Daemon, Listener, Program
from procman.kept import Kept, keep, still

OLD = Listener(name="127.0.0.1:80", label="http", address=Address("tcp", "127.0.0.1", 80))
NEW = Listener(name="127.0.0.1:81", label="http", address=Address("tcp", "127.0.0.1", 81))
WEB = Program(name="web", program="web", argv=("web", "1"), listen=(OLD.name,))
JOB = Program(name="job", program="job", argv=("job", "1"))
WEB2 = replace(WEB, argv=("web", "2"), listen=(NEW.name,))
DAEMON = Daemon(socket="/run/p.sock", state_dir="/var/lib/p", log_dir="/var/log/p")
BEFORE = Config(path="/t", files=("/t",), daemon=DAEMON, listeners=(OLD,), programs=(WEB, JOB))
TABLE = replace(BEFORE, listeners=(NEW,), programs=(WEB2, JOB))
KEPT = keep(BEFORE, ["web"], {OLD.name: OLD})
REFUSED = keep(TABLE, ["web"], {NEW.name: NEW})


def test_what_is_in_force() -> None:
    """The old and the new address are open, whoever of the two versions is tried."""
    assert KEPT.of(TABLE) == replace(TABLE, listeners=(NEW, OLD), programs=(WEB, JOB))
    assert KEPT.trying(["web"]).of(TABLE) == replace(TABLE, listeners=(NEW, OLD))
    assert KEPT.trying(["web"]).failed(["web"]) == KEPT
    assert KEPT.without(["web"]) == KEPT.trying(["web"]).without(["web"]) == Kept()
    assert KEPT.of(replace(TABLE, programs=(JOB,))).programs == (JOB, WEB)  # it leaves


NAMES = st.lists(st.sampled_from(["web", "job", "other"]))


@given(st.lists(st.tuples(st.sampled_from(["trying", "failed", "without"]), NAMES)))
def test_a_document_says_all(steps: list[tuple[str, list[str]]]) -> None:
    """Whatever was done: nothing is both kept and tried, and every listener that is needed is there."""
    found = keep(BEFORE, ["web", "job"], {OLD.name: OLD})
    for what, names in steps:
        found = getattr(found, what)(names)
        assert not found.programs.keys() & found.tried.keys()
        assert Kept.read(json.loads(json.dumps(found.document()))) == found


@pytest.mark.parametrize(
    ("table", "kept"),
    [
        (TABLE, True),
        (replace(TABLE, programs=(replace(WEB2, priority=3), JOB)), True),  # no child notices that
        (replace(TABLE, programs=(replace(WEB2, argv=("web", "3")), JOB)), False),
        (replace(TABLE, listeners=(replace(NEW, backlog=3),)), False),
        (replace(TABLE, programs=(replace(WEB2, name="web:1"), replace(WEB2, name="web:2"))), False),
        (replace(TABLE, programs=(JOB,)), False),
        (BEFORE, False),
    ],
)
def test_what_a_new_daemon_goes_on_with(table: Config, kept: bool) -> None:
    """As long as its table says what had failed; whoever has written something else wants that."""
    assert still(KEPT, REFUSED, table) == (KEPT if kept else Kept())


def test_one_that_had_passed_is_the_tables() -> None:
    assert still(KEPT.trying(["web"]), REFUSED, TABLE) == Kept()


def test_a_process_that_was_to_leave_stays_while_the_others_are_what_had_failed() -> None:
    several = replace(TABLE, programs=(replace(WEB2, name="web:1"), replace(WEB2, name="web:2")))
    refused = keep(several, ["web:1", "web:2"], {NEW.name: NEW})
    assert still(KEPT, refused, several) == KEPT

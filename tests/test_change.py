"""What a supervisor leaves of a change of the table for the next one. The change itself: tests/test_daemon_reread.py;
its interruption at every step: tests/test_guarantee_crash.py."""

from __future__ import annotations

import os
from typing import Any

import pytest

from procman import memo
from procman.change import Read, Unfinished
from procman.config import Config, Daemon

DAEMON = Daemon(socket="", state_dir="", log_dir="")
READ = Read(Config(path="/t", daemon=DAEMON, listeners=(), programs=(), files=()), -1)


@pytest.mark.parametrize(
    ("document", "read", "found"),
    [
        (
            {"half": "stop", "why": "SIGHUP", "wanted": ["a", "b"]},
            READ,
            Unfinished("stop", "SIGHUP", frozenset({"a", "b"}), read=READ),
        ),
        ({"half": "start", "why": "SIGHUP", "start": {"a": 3}}, None, Unfinished("start", "SIGHUP", start={"a": 3})),
        # The next table is let go after the second half has begun.
        ({"half": "start", "why": "SIGHUP", "start": {}}, READ, Unfinished("start", "SIGHUP")),
        ({"half": "start", "why": "SIGHUP", "start": {"a": "x"}}, None, Unfinished("start", "SIGHUP")),
        ({"half": "stop", "why": "SIGHUP", "wanted": []}, None, None),
        ({"half": "stop", "wanted": []}, READ, None),
        ({"half": "start", "why": 7, "start": {}}, None, None),
        (None, None, None),
        ([], READ, None),
    ],
)
def test_what_was_handed_over(document: Any, read: Read | None, found: Unfinished | None) -> None:
    assert Unfinished.of(document, read) == found


def test_a_document_in_memory_is_read_from_any_copy_of_its_descriptor() -> None:
    memory = memo.write("test", {"a": [1, "ü"]})
    copy = os.dup(memory)
    assert memo.read(memory) == {"a": [1, "ü"]}
    assert memo.read(copy) == {"a": [1, "ü"]}
    with pytest.raises(OSError):
        os.fstat(memory)  # read closes


def test_memory_that_holds_something_else() -> None:
    memory = os.memfd_create("test")
    os.write(memory, b"{")
    with pytest.raises(ValueError):
        memo.read(memory)

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
        ({"half": "start", "why": "", "start": {}, "of a newer version": 1}, None, Unfinished("start", "")),
    ],
)
def test_what_was_handed_over(document: Any, read: Read | None, found: Unfinished | None) -> None:
    assert Unfinished.of(document, read) == found


@pytest.mark.parametrize(
    ("document", "read", "said"),
    [
        ({"half": "start", "why": "SIGHUP", "start": {"a": "x"}}, None, "start.a: must be"),
        ({"half": "stop", "why": "SIGHUP", "wanted": []}, None, "the next table is not there"),
        ({"half": "stop", "wanted": []}, READ, "why: is missing"),
        ({"half": "stop", "why": "", "start": {}}, READ, "wanted: is missing"),
        ({"half": "start", "why": 7, "start": {}}, None, "why: must be"),
        ({"half": "start", "why": "", "start": {"a": True}}, None, "start.a: must be"),
        ({"half": "third", "why": "", "start": {}}, None, "half: must be"),
        (None, None, "must be an object"),
        ([], READ, "must be an object"),
    ],
)
def test_what_was_handed_over_and_makes_no_sense(document: Any, read: Read | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Unfinished.of(document, read)


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


def test_memory_that_can_only_be_damaged() -> None:
    """It is neither read into memory as a whole, nor waited for, nor followed into its depth."""
    huge = os.memfd_create("test")
    os.truncate(huge, memo.MAX_SIZE + 1)
    with pytest.raises(ValueError, match="too large"):
        memo.read(huge)
    deep = os.memfd_create("test")
    os.write(deep, b"[" * 100_000)
    with pytest.raises(ValueError, match="too deep"):
        memo.read(deep)
    pipe, other = os.pipe()
    with pytest.raises(ValueError, match="no memory"):
        memo.read(pipe)
    os.close(other)

"""The daemon's own messages, also on a disk that does not take them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman.ownlog import OwnLog


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[OwnLog, Path]]:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    yield OwnLog(fd), path
    os.close(fd)


def say(own: OwnLog, text: str, *values: object) -> None:
    own.handle(logging.LogRecord("procman", logging.INFO, "", 0, text, values, None))


def texts(path: Path) -> list[str]:
    return [line.partition(" INFO ")[2] or line for line in path.read_text().splitlines()]


def test_each_message_is_a_line(own: tuple[OwnLog, Path]) -> None:
    say(own[0], "%s: %d", "it", 7)
    say(own[0], "\udcff")  # a name of a file
    assert texts(own[1]) == ["it: 7", "\\udcff"]


def test_what_a_full_disk_does_not_take_is_counted(own: tuple[OwnLog, Path], capfd: pytest.CaptureFixture[str]) -> None:
    log, path = own
    good = log.fd
    with open("/dev/full", "w") as full:
        log.fd = full.fileno()
        say(log, "one")
        say(log, "two")
    log.fd = good
    say(log, "three")
    say(log, "four")
    assert len(texts(path)) == 3
    assert texts(path)[1:] == ["three", "four"]
    assert texts(path)[0] == "2 messages were lost here: No space left on device"
    assert capfd.readouterr() == ("", ""), "nobody else is told"

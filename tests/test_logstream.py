"""Logs on their way to a client that follows them, without a daemon."""

from __future__ import annotations

from pathlib import Path

from procman.logread import Position
from procman.logstream import LogReader, _read_turn
from procman.rpc import LogSource


def test_what_is_in_the_file_of_before_comes_first(tmp_path: Path) -> None:
    """Its last line was written after it was read, and before it was known that output goes to another file."""
    old, new = tmp_path / "old.log", tmp_path / "new.log"
    old.write_text("1\n")
    new.write_text("not ours\n")
    first = LogReader(LogSource("web", "out", str(old)), 1)
    first.open()
    assert first.news() == b"1\n"
    begins: list[Position] = []
    source = LogSource("web", "out", str(new))
    then = LogReader(source, 0, begins=lambda: begins[0] if begins else None, after=[first])
    assert [data for _, data in _read_turn([first, then])[0]] == [b"", b""]
    with old.open("a") as file:
        file.write("2\n")
    about = new.stat()
    begins.append(Position(about.st_dev, about.st_ino, about.st_size))
    with new.open("a") as file:
        file.write("3\n")
    assert [data for _, data in _read_turn([then])[0]] == [b"2\n", b"3\n"]
    for reader in (first, then):
        reader.close()

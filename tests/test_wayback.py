"""Which table is the one before, when a daemon starts: pure files and memories, no daemon."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procman import memo, recall, store
from procman.errors import Failed
from procman.wayback import BEFORE_NAME, GOOD_NAME, WayBack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def table(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> int:
    """The memory of a table whose file says `text`."""
    path = folder / "procman.toml"
    path.write_text(text)
    recording = recall.Recording(environ={"HOME": "/root"} if environ is None else environ)
    recording.read(str(path))
    return recording.memory()


def way(folder: Path) -> WayBack:
    return WayBack(str(folder / "procman.toml"), str(folder))


def text_of(back: WayBack) -> str:
    """What the table before says."""
    return back.recall().read(back.path).decode()


def write(back: WayBack, good: int) -> None:
    for path, make in back.documents(good):
        if (document := make()) is not None:
            store.save(path, document)
        assert make() is None  # it is there


def test_an_edited_table_leads_back_to_the_last_good_one_and_the_same_to_the_one_before(folder: Path) -> None:
    one, two = table(folder, "one"), table(folder, "two")
    first = way(folder)
    assert first.find(one) == []
    assert first.memory == -1
    assert first.left(one, two)
    write(first, two)
    same, edited = way(folder), way(folder)
    assert (same.find(table(folder, "two")), text_of(same)) == ([], "one")
    assert (edited.find(table(folder, "three")), text_of(edited)) == ([], "two")


def test_one_that_failed_is_not_the_last_good_one(folder: Path) -> None:
    one, two = table(folder, "one"), table(folder, "two")
    first = way(folder)
    write(first, one)
    assert first.left(one, two)
    write(first, -1)
    again = way(folder)
    assert (again.find(two), text_of(again)) == ([], "one")


def test_a_variable_that_the_table_names_makes_it_another_one(folder: Path) -> None:
    one = {"NUMBER": "1", "TOKEN": "secret", "HOME": "/root"}
    first = way(folder)
    write(first, table(folder, "${NUMBER}", one))
    assert "secret" not in (folder / GOOD_NAME).read_text()
    same, other = way(folder), way(folder)
    same.find(table(folder, "${NUMBER}", one | {"TOKEN": "another", "HOME": "/"}))
    assert same.memory == -1
    other.find(table(folder, "${NUMBER}", one | {"NUMBER": "2"}))
    assert other.recall().environ == {"NUMBER": "1", "HOME": "/root"}


def test_who_has_gone_back_does_not_come_forward(folder: Path) -> None:
    one, two = table(folder, "one"), table(folder, "two")
    back = way(folder)
    assert back.left(one, two)
    assert back.left(two, os.dup(back.memory)) == {}
    assert back.left(two, two) == {}
    assert text_of(back) == "one"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda more: st.lists(more, max_size=3)).map(
        lambda value: json.dumps({"version": 1, "path": "PATH", "cwd": "/", "environ": {}, "answers": value}).encode()
    )
    | st.sampled_from([b"", b'{"version": 1}', b'{"version": 99}', b'{"version": 1, "path": "/x"}', b"[" * 99999])
)
def test_any_content_is_said_and_kept(folder: Path, content: bytes) -> None:
    for path in folder.glob("*.json*"):
        path.unlink()
    now = table(folder, "now")
    (folder / GOOD_NAME).write_bytes(content.replace(b"PATH", str(folder / "procman.toml").encode()))
    back = way(folder)
    problems = back.find(now)
    os.close(now)
    assert (len(problems), back.memory) == (1, -1)
    assert str(folder / GOOD_NAME) in problems[0]
    assert "kept as" in problems[0]
    with pytest.raises(Failed) as failed:
        back.recall()
    assert GOOD_NAME in str(failed.value.hint)


def test_no_descriptor_is_left(folder: Path) -> None:
    one, two = table(folder, "one"), table(folder, "two")
    first = way(folder)
    first.left(one, two)
    write(first, two)
    open_ = len(os.listdir("/proc/self/fd"))
    again = way(folder)
    again.find(two)
    assert (folder / BEFORE_NAME).exists()
    os.close(again.memory)
    assert len(os.listdir("/proc/self/fd")) == open_
    assert memo.same(one, first.memory)

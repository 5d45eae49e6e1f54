"""The table in force comes back as it was read, whatever the files say meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from procman import recall, table
from procman.errors import ConfigError, Failed

TABLE = """
include = ["more/*.toml"]
[daemon]
socket = "{folder}/s"
state_dir = "{folder}/state"
log_dir = "{folder}/log"
[program.web]
command = "/bin/sleep ${{SECONDS}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    (tmp_path / "more").mkdir(mode=0o755)
    (tmp_path / "procman.toml").write_text(TABLE.format(folder=tmp_path))
    (tmp_path / "more" / "job.toml").write_text('[program.job]\ncommand = "/bin/sleep 2"\n')
    return tmp_path


class Trusting(recall.Recording):
    """pytest's folders stand where others may write, which the table refuses to root."""

    def trusted(self, path: str) -> str:
        return ""


def test_files_that_changed_are_not_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDS", "1")
    path = str(folder / "procman.toml")
    before = len(os.listdir("/proc/self/fd"))
    recording = Trusting()
    config = table.parse(path, recording)
    memory = recording.memory()
    assert not os.get_inheritable(memory)
    again = os.dup(memory)  # as the keeper's copy: it shares the position in the file
    (folder / "procman.toml").write_text("broken [")
    (folder / "more" / "job.toml").unlink()
    (folder / "more" / "new.toml").write_text('[program.new]\ncommand = "/bin/true"\n')
    monkeypatch.setenv("SECONDS", "9")
    monkeypatch.chdir("/")
    assert table.parse(path, recall.recall(memory)) == config
    assert table.parse(path, recall.recall(again)) == config
    assert [program.name for program in config.programs] == ["web", "job"]
    assert config.programs[0].argv[-1] == "1"
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ConfigError):
        table.parse(path, Trusting())


def test_what_was_not_asked_then(folder: Path) -> None:
    recalled = recall.recall(recall.Recording().memory())
    with pytest.raises(FileNotFoundError):
        recalled.read("/etc/passwd")
    assert recalled.glob("*") == []
    assert recalled.account("root") is None
    assert recalled.group("root") is None


def test_users_and_groups(folder: Path) -> None:
    recording = recall.Recording()
    root, nobody, group = recording.account("root"), recording.account("no such user"), recording.group("0")
    assert root is not None
    assert nobody is None
    recalled = recall.recall(recording.memory())
    assert recalled.account("root") == root
    assert recalled.account("no such user") is None
    assert recalled.group("0") == group


def test_bytes_and_variables_that_are_no_text(folder: Path) -> None:
    (folder / "binary").write_bytes(bytes(range(256)))
    recording = recall.Recording(environ={"ODD": "\udcff"})
    content = recording.read(str(folder / "binary"))
    recalled = recall.recall(recording.memory())
    assert recalled.read(str(folder / "binary")) == content
    assert recalled.environ == {"ODD": "\udcff"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000,
        b'{"cwd": 5, "environ": {}, "answers": {"read": {}, "glob": {}, "account": {}, "group": {}}}',
        b'{"cwd": "/", "environ": {"A": 1}, "answers": {"read": {}, "glob": {}, "account": {}, "group": {}}}',
        b'{"cwd": "/", "environ": {}, "answers": {"read": {"a": "\\u1234"}, "glob": {}, "account": {}, "group": {}}}',
        b'{"cwd": "/", "environ": {}, "answers": {"read": {}, "glob": {}, "account": {"x": {"uid": 1}}, "group": {}}}',
    ],
)  # fmt: skip
def test_memory_that_holds_something_else(content: bytes) -> None:
    """The keeper held it for every successor, and each died of it."""
    before = len(os.listdir("/proc/self/fd"))
    memory = os.memfd_create("table")
    os.write(memory, content)
    with pytest.raises(Failed, match="the table in force can't be read from memory"):
        recall.recall(memory)
    assert len(os.listdir("/proc/self/fd")) == before

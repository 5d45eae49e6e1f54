"""The real machine: files, patterns, users and groups, and what root may trust."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from procman.config import Account
from procman.errors import ConfigError
from procman.files import Machine
from procman.table import World, parse

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other users")
OTHER = 12345


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that nobody but its owner can write, whatever the umask."""
    tmp_path.chmod(0o755)
    path = tmp_path / "etc"
    path.mkdir()
    path.chmod(0o755)
    return path


def write(path: Path, mode: int = 0o644, text: str = "") -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_it_is_a_world() -> None:
    world: World = Machine()
    assert world.uid == os.geteuid()
    assert world.cwd == os.getcwd()
    assert world.python == sys.executable
    assert Path(world.wsgi_script).parent == Path(__file__).parent.parent / "procman"
    assert (Path(world.site) / "waitress").is_dir()


def test_the_environment_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCMAN_TEST", "before")
    machine = Machine()
    monkeypatch.setenv("PROCMAN_TEST", "after")
    assert machine.environ["PROCMAN_TEST"] == "before"


def test_reading(folder: Path) -> None:
    machine = Machine()
    assert machine.read(str(write(folder / "x", text="é"))) == "é".encode()
    with pytest.raises(FileNotFoundError):
        machine.read(str(folder / "y"))
    with pytest.raises(IsADirectoryError):
        machine.read(str(folder))


def test_patterns_match_sorted_and_no_hidden_files(folder: Path) -> None:
    for name in ("b.toml", "a.toml", ".c.toml", "d.txt"):
        write(folder / name)
    machine = Machine()
    assert machine.glob(f"{folder}/*.toml") == [f"{folder}/a.toml", f"{folder}/b.toml"]
    assert machine.glob(f"{folder}/nothing*") == []


def test_a_whole_table_from_the_disk(folder: Path) -> None:
    (folder / "conf.d").mkdir(mode=0o755)
    write(folder / "procman.toml", text='include = ["conf.d/*.toml"]')
    write(folder / "conf.d" / "a.toml", text='[program.a]\ncommand = "true"\n')
    config = parse(str(folder / "procman.toml"), Machine(environ={"HOME": "/home/ann"}))
    assert [program.directory for program in config.programs] == [str(folder / "conf.d")]


def test_users_by_name_and_by_number() -> None:
    machine = Machine()
    entry = pwd.getpwuid(0)
    root = machine.account(entry.pw_name)
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    assert root == Account(entry.pw_name, 0, entry.pw_gid, groups, entry.pw_dir)
    assert machine.account("0") == root


@pytest.mark.parametrize("name", ["no-such-user", "", "-1", "4294967290", str(10**30), "²", "0x0"])
def test_no_such_user_or_group(name: str) -> None:
    assert Machine().account(name) is None
    assert Machine().group(name) is None


def test_groups_by_name_and_by_number() -> None:
    entry = grp.getgrgid(0)
    assert (Machine().group(entry.gr_name), Machine().group("0")) == (0, 0)


def test_an_ordinary_user_trusts_his_own_files(folder: Path) -> None:
    assert Machine(uid=1000).trusted(str(write(folder / "x", 0o666))) == ""


@AS_ROOT
def test_what_root_trusts(folder: Path) -> None:
    machine = Machine()
    path = write(folder / "x", 0o664)  # its group is root
    assert machine.trusted(str(path)) == ""
    assert machine.trusted(str(folder / "missing")) == ""
    folder.chmod(0o1777)  # as /tmp: nobody can replace root's file in it
    assert machine.trusted(str(path)) == ""


@AS_ROOT
@pytest.mark.parametrize(
    ("mode", "owner", "why"),
    [
        (0o646, (0, 0), "can be written by everybody"),
        (0o664, (0, OTHER), f"can be written by group {OTHER}"),
        (0o644, (OTHER, 0), f"belongs to user {OTHER}"),
    ],
)
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_root_does_not_trust(folder: Path, which: str, mode: int, owner: tuple[int, int], why: str) -> None:
    path = write(folder / "x")
    guilty = path if which == "file" else folder
    os.chown(guilty, *owner)
    guilty.chmod(mode | (0o111 if which == "folder" else 0))
    assert Machine().trusted(str(path)) == f"{guilty} {why}"


@AS_ROOT
def test_a_symbolic_link_is_as_good_as_both_its_ends(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    target = write(elsewhere / "target")
    link = folder / "link"
    link.symlink_to(target)
    assert Machine().trusted(str(link)) == ""
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    assert Machine().trusted(str(link)) == f"{link} belongs to user {OTHER}"
    os.chown(link, 0, 0, follow_symlinks=False)
    elsewhere.chmod(0o777)
    assert Machine().trusted(str(link)) == f"{elsewhere} can be written by everybody"


def test_it_asks_the_same_database_as_id() -> None:
    name = pwd.getpwuid(os.geteuid()).pw_name
    shown = subprocess.run(["id", "-G", name], capture_output=True, text=True, check=True).stdout.split()
    account = Machine().account(name)
    assert account is not None
    assert set(account.groups) == {int(gid) for gid in shown}


def test_two_logs_that_are_one_file_by_a_symlink(folder: Path) -> None:
    (folder / "logs").mkdir()
    (folder / "link").symlink_to("logs")
    main = folder / "procman.toml"
    main.write_text("".join(f'[program.{at}]\ncommand = "x"\nlog.path = "{at}/web.log"\n' for at in ("logs", "link")))
    with pytest.raises(ConfigError, match="is the same file as"):
        parse(str(main), Machine())

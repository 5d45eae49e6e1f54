"""folders.py, with real folders and symlinks of two users."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman.folders import open_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def reached(path: Path | str, make: int | None = None) -> Path:
    fd = open_folder(str(path), make)
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def refused(path: Path) -> int:
    with pytest.raises(OSError) as caught:
        reached(path)
    return caught.value.errno or 0


def test_the_way_goes_over_folders_dots_and_own_symlinks(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    (tmp_path / "relative").symlink_to("./absolute//b/../b")
    for way in ("a/b", "a//./b/", "a/../a/b", "absolute/b", "relative"):
        assert reached(f"{tmp_path}/{way}") == tmp_path / "a" / "b"
    assert reached("/") == Path("/")


def test_a_relative_path_starts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (reached("a"), reached("")) == (tmp_path / "a", tmp_path)


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert refused(tmp_path / "none") == errno.ENOENT
    assert refused(tmp_path / "file") == errno.ENOTDIR
    assert refused(tmp_path / "file" / "x") == errno.ENOTDIR
    assert refused(tmp_path / "loop") == errno.ELOOP


@pytest.mark.parametrize("umask", [0, 0o077])
def test_missing_folders_are_made_with_exactly_the_mode(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o711)
    before = os.umask(umask)
    try:
        assert reached(tmp_path / "a" / "b", 0o750) == tmp_path / "a" / "b"
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / way).stat().st_mode) for way in ("", "a", "a/b")]
    assert modes == [0o711, 0o750, 0o750]


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_symlink_is_not_followed_where_others_may_write(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "link").symlink_to(tmp_path)
    place.chmod(mode)
    assert refused(place / "link") == errno.ELOOP
    place.chmod(mode | stat.S_ISVTX)
    assert reached(place / "link") == tmp_path


@as_root
def test_a_symlink_of_another_user_or_in_his_folder_is_not_followed(tmp_path: Path) -> None:
    place, link = tmp_path / "place", tmp_path / "place" / "link"
    place.mkdir()
    link.symlink_to(tmp_path)
    os.lchown(link, 65534, 65534)
    assert refused(link) == errno.ELOOP
    os.lchown(link, 0, 0)
    assert reached(link) == tmp_path
    os.chown(place, 65534, 65534)
    with pytest.raises(OSError, match=f"the symlink {link} is not followed: another user could have made it"):
        reached(link)
    (place / "folder").mkdir()
    assert reached(place / "folder") == place / "folder", "a folder of any user is entered"

"""The way to a folder, taken one component at a time, so that nobody who may write on the way can lead root astray.

open(2) with O_NOFOLLOW looks at the last component only. A program's user who owns a folder above it can put a symlink
there, and root would write, remove or give away files wherever it points. Here a symlink is followed only when neither
it nor its place can be another user's work. What is then done relative to the descriptor stays in that folder, whatever
becomes of its path. Knows nothing of what is in a folder: the other edge modules use it, and it uses none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS_MAX = 40  # as the kernel, path_resolution(7)


def open_folder(path: str, make: int | None = None) -> int:
    """A descriptor (O_PATH) of the folder at `path`, for `dir_fd=`. The caller closes it.

    A symlink is followed when it and the folder that it stands in belong to root or to us, and nobody else may write
    that folder (or it is sticky). With `make`, what is missing is made with exactly this mode, whatever the umask.

    Raises OSError; ELOOP with a text of its own for a symlink that is not followed.
    """
    rest = _parts(path)
    folder = os.open("/" if path.startswith("/") else ".", _FLAGS)
    where = "" if path.startswith("/") else "."  # for the message alone
    links = 0
    try:
        while rest:
            name = rest.pop()
            found = _enter(folder, name, make)
            status = os.fstat(found)
            if not stat.S_ISLNK(status.st_mode):
                os.close(folder)
                folder, where = found, f"{where}/{name}"
                if not stat.S_ISDIR(status.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), where)
                continue
            try:
                links += 1
                _check_link(status, os.fstat(folder), f"{where}/{name}", links)
                target = os.readlink("", dir_fd=found)
            finally:
                os.close(found)
            rest += _parts(target)
            if target.startswith("/"):
                os.close(folder)
                folder, where = -1, ""
                folder = os.open("/", _FLAGS)
    except BaseException:
        if folder >= 0:
            os.close(folder)
        raise
    return folder


def others_may_write(status: os.stat_result) -> bool:
    """Whether somebody who is neither root nor we could replace what stands in this folder (stat of the folder)."""
    if status.st_uid not in (0, os.geteuid()):
        return True
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not status.st_mode & stat.S_ISVTX


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _enter(folder: int, name: str, make: int | None) -> int:
    """A descriptor of `name`, whatever it is; a missing folder is made first."""
    try:
        return os.open(name, _FLAGS, dir_fd=folder)
    except FileNotFoundError:
        if make is None:
            raise
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, make, dir_fd=folder)
        made = True
    found = os.open(name, _FLAGS, dir_fd=folder)
    status = os.fstat(found)
    if made and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
        try:
            os.chmod(f"/proc/self/fd/{found}", make)
        except BaseException:
            os.close(found)
            raise
    return found


def _check_link(link: os.stat_result, folder: os.stat_result, where: str, links: int) -> None:
    if links > _LINKS_MAX:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), where)
    if link.st_uid not in (0, os.geteuid()) or others_may_write(folder):
        raise OSError(errno.ELOOP, f"the symlink {where} is not followed: another user could have made it", where)

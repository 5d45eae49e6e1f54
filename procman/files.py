"""The machine as a program table sees it: files, users and groups, the environment. The real `table.World`.

It must not know what is in a table, nor which keys ask for what.
"""

from __future__ import annotations

import glob
import grp
import importlib.util
import os
import pwd
import stat
import sys
from collections.abc import Mapping
from dataclasses import field

from procman.config import Account
from procman.records import dataclass


def _site() -> str:
    spec = importlib.util.find_spec("waitress")
    return os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `table.parse` asks. The fields are this process's own unless a caller says otherwise."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    uid: int = field(default_factory=os.geteuid)
    cwd: str = field(default_factory=os.getcwd)
    python: str = sys.executable
    wsgi_script: str = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wsgi.py")
    site: str = field(default_factory=_site)

    def read(self, path: str) -> bytes:
        """The content of a file. Raises OSError."""
        with open(path, "rb") as file:
            return file.read()

    def glob(self, pattern: str) -> list[str]:
        """The paths that a shell pattern matches, sorted; "*" matches no leading dot, as in a shell (glob(7))."""
        return sorted(glob.glob(pattern))

    def trusted(self, path: str) -> str:
        """Why this file must not decide what root runs, or "" if it may (for anybody else it always may).

        The file, a symbolic link to it, and the folders of both must belong to root, and nobody else may write them. A
        folder where only the owner of a file can remove it (sticky, like /tmp) is no danger. A file that can't be
        looked at is left to `read`, which says why.
        """
        if self.uid != 0:
            return ""
        real = os.path.realpath(path)
        for one in dict.fromkeys((os.path.dirname(path), path, os.path.dirname(real), real)):
            try:
                status = os.lstat(one)
            except OSError:
                return ""
            why = _danger(one, status)
            if why:
                return why
        return ""

    def real(self, folder: str) -> str:
        """The path of a folder without symbolic links, as far as it exists."""
        return os.path.realpath(folder)

    def account(self, name_or_id: str) -> Account | None:
        """The user of this name, or else of this number, with all the groups that the group database gives it."""
        entry = None
        try:
            entry = pwd.getpwnam(name_or_id)
        except KeyError:
            if name_or_id.isascii() and name_or_id.isdecimal():
                entry = _by_number(name_or_id)
        if entry is None:
            return None
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)

    def group(self, name_or_id: str) -> int | None:
        """The id of the group of this name, or else of this number."""
        try:
            return grp.getgrnam(name_or_id).gr_gid
        except KeyError:
            if not (name_or_id.isascii() and name_or_id.isdecimal()):
                return None
        try:
            return grp.getgrgid(int(name_or_id)).gr_gid
        except (KeyError, OverflowError):
            return None


def _by_number(number: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(int(number))
    except (KeyError, OverflowError):
        return None


def _danger(path: str, status: os.stat_result) -> str:
    if status.st_uid != 0:
        return f"{path} belongs to user {status.st_uid}"
    # The mode of a symbolic link means nothing: symlink(7).
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return ""
    if status.st_mode & stat.S_IWOTH:
        return f"{path} can be written by everybody"
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0:
        return f"{path} can be written by group {status.st_gid}"
    return ""

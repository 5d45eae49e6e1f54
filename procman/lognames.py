"""The names of the files that belong to one log, and which two logs would take each other's. Pure.

    web.log                     what is written now
    web.log.N, web.log.N.gz     rotated, 1 the newest; compressed
    web.log.partial, .next      for a moment, during a rotation
    web.log.gz.partial          while a rotated one is compressed
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable

PARTIAL, NEXT, PACKING = ".partial", ".next", ".gz.partial"
"""What follows the name of a log in those of the files that procman removes, or renames, when it opens the log."""

_ROTATED = re.compile(r"(.+)\.([1-9][0-9]{0,4})(?:\.gz)?", re.DOTALL)


def split(name: str) -> tuple[str, int] | None:
    """The log and the number of a rotated file by its name: ("web.log", 3) of `web.log.3` and of `web.log.3.gz`. None
    for another name; not so `web.log.03`, which is somebody else's."""
    found = _ROTATED.fullmatch(name) if name[-1:].isdigit() or name.endswith(".gz") else None
    return (found[1], int(found[2])) if found else None


def owners(name: str) -> list[str]:
    """The names of the logs to which a file of this name would belong, beside the one that has just this name."""
    found = [name.removesuffix(end) for end in (PACKING, PARTIAL, NEXT) if name.endswith(end)]
    rotated = split(name)
    return [owner for owner in (*found, *(rotated[:1] if rotated else ())) if owner]


def clashes(paths: Iterable[str], real: Callable[[str], str]) -> dict[str, str]:
    """Which of `paths` is a file of another one: the path itself, where it is the same file by another name. `real`
    resolves the symlinks of a folder; it is asked only where names alone would clash."""
    folders: dict[str, set[str]] = {}
    paths = list(dict.fromkeys(paths))
    for path in paths:
        folder, name = posixpath.split(path)
        folders.setdefault(_root(name), set()).add(folder)

    def key(folder: str, name: str) -> tuple[str, str]:
        return (real(folder) if len(folders[_root(name)]) > 1 else folder), name

    taken: dict[tuple[str, str], str] = {}
    for path in paths:
        taken.setdefault(key(*posixpath.split(path)), path)
    found = {}
    for path in paths:
        folder, name = posixpath.split(path)
        others = (taken.get(key(folder, owner)) for owner in (name, *owners(name)))
        other = next((other for other in others if other not in (None, path)), None)
        if other is not None:
            found[path] = other
    return found


def _root(name: str) -> str:
    while above := owners(name):
        name = min(above, key=len)
    return name

"""The state file, and the lock that keeps two daemons off one state folder.

It knows files. It must not know what the document says: that is the supervisor's.

A reader sees the old document or the new one, never a torn one: a new file is written beside it and renamed over it
(rename(2)). What can't be read is put aside, never deleted at once, and never keeps the daemon from starting.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import functools
import json
import os
import re
import select
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from procman import shape
from procman.crossing import crossing
from procman.errors import Failed, is_shortage
from procman.records import dataclass

SIZE_MAX = 256 * 1024 * 1024
"""Bytes of the largest state file that is read. One process takes a thousand or two."""

VERSION = 1
"""Of the document's format. Raise it when an older reader would misunderstand."""

BAD_KEPT = 3

LOCK_NAME = "lock"
STATE_NAME = "state.json"

HOUSE_PREFIX = "house="
"""Before the number of the house in the lock file: whoever takes the whole file for pids must not take that for one."""

HOUSE_BITS = 30
"""Of the number by which processes show that they belong to a state folder."""

DYING_SECONDS = 20.0
"""How long the supervisor of a keeper that was killed may take to die after it."""


class Lock(NamedTuple):
    """A state folder that is ours: the descriptor of the lock, the number of its `house`, and whether that is new."""

    fd: int
    house: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found. No document and no problem: there is no file yet. `problem` is one sentence for the log."""

    document: dict[str, Any] | None
    problem: str = ""


def load(path: str) -> Loaded:
    """The document that `save` wrote, with its `version`, `boot_id` and `written_at`. Never raises, and never waits
    for a writer of a FIFO.

    A file that is torn, is no document of ours, or has another version is renamed to PATH.bad-N, and so is what is no
    file; the last three are kept. A file that can't be read (permissions, a disk error) stays where it is.
    """
    try:
        reason, content = _read(path)
    except FileNotFoundError:
        return Loaded(None)
    except OSError as error:
        return Loaded(None, f"can't read the state file {path}: {error.strerror}; starting without it")
    document: Any = None
    if not reason:
        reason, document = _understand(content)
    if not reason:
        return Loaded(document)
    return Loaded(None, f"the state file {path} {reason}; starting without it, {_put_aside(path)}")


def entry(path: str, name: str) -> Any:
    """What a document that `save` has written there says of `name`; None where there is none. Never raises."""
    try:
        reason, content = _read(path)
        found = None if reason else _understand(content)[1]
    except OSError:
        return None
    return found.get(name) if isinstance(found, dict) else None


def keep_copy(path: str) -> str:
    """Keeps the file that is there now as PATH.bad-N, also when another one is put in its place. Returns what was done,
    in words."""
    return _put_aside(path, os.link)


def _read(path: str) -> tuple[str, bytes]:
    """Why the file can't be ours ("" when it can), and what is in it. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for its writer
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            return "is no file", b""
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return "is no file", b""
        if found.st_size > SIZE_MAX:
            return f"has {found.st_size} bytes, more than any that procman writes", b""
        with open(fd, "rb", closefd=False) as file:
            return "", file.read(SIZE_MAX)
    finally:
        os.close(fd)


def _understand(content: bytes) -> tuple[str, Any]:
    """Why this is no document of ours ("" when it is one), and the document."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        return (f"is damaged ({error})" if content else "is empty"), None
    if not isinstance(document, dict) or "version" not in document:
        return "is no state file of procman", None
    version = document["version"]
    if version != VERSION:
        return f"has version {shape.shown(version)}, this procman writes {VERSION}", None
    return "", document


def stamped(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with `version`, `boot_id` and `written_at` (RFC 3339). Raises OSError for want of a descriptor."""
    stamp = {"version": VERSION, "boot_id": boot_id(), "written_at": dt.datetime.now(dt.UTC).isoformat()}
    return {**document, **stamp}


def save(path: str, document: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replaces the state file at once, as a whole, by `document`, which gets its stamp (`stamped`).

    `durable` waits for the disk: a power loss then can't undo it. Without it only a crash of the machine can. Raises
    `Failed`; the old file is then untouched.
    """
    # One writer (the holder of the lock), hence one name: a crash leaves at most one such file, and the next save
    # reuses it.
    beside = f"{path}.new"
    crossing("state begin")
    try:
        content = json.dumps(stamped(document), separators=(",", ":")).encode()
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            crossing("state created")
            file.write(content)
            file.flush()
            crossing("state written")
            if durable:
                _sync(fd)
        os.rename(beside, path)
        crossing("state renamed")
        if durable:
            _sync_folder(os.path.dirname(path) or ".")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise Failed(
            f"can't write the state file {path}: {error.strerror}",
            hint="a restarted daemon would not know what was started or stopped since the last write",
        ) from error


@functools.cache
def boot_id() -> str:
    """Names this boot of the machine: monotonic times and pids of another boot mean nothing (random(4)).

    "" where nothing tells. Raises OSError for want of a descriptor.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        if is_shortage(error):
            raise  # no other boot, and it must not look like one
        return ""


def lock(state_dir: str, pid: int) -> Lock:
    """Makes `state_dir` (mode 0700) if needed and locks it for the daemon `pid`. The file holds that pid and the house.

    The lock lasts until the last copy of the descriptor is closed: a forked or SCM_RIGHTS copy holds it too (flock(2)).
    Raises `Failed`, naming the daemon that has it.
    """
    path = os.path.join(state_dir, LOCK_NAME)
    try:
        os.makedirs(state_dir, 0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Failed(
            f"can't use state_dir {state_dir}: {error.strerror}",
            hint="set daemon.state_dir to a folder that procmand can write",
        ) from error
    try:
        return _take(fd, state_dir, pid)
    except BaseException:
        os.close(fd)
        raise


def _take(fd: int, state_dir: str, pid: int) -> Lock:
    try:
        _wait_for(fd)
        known = _house(fd)
        number = known or int.from_bytes(os.urandom(8)) % ((1 << HOUSE_BITS) - 1) + 1
        text = f"{pid}\n{HOUSE_PREFIX}{number}\n".encode()
        os.pwrite(fd, text, 0)  # over the old text: no moment at which the house is not there
        os.ftruncate(fd, len(text))
    except BlockingIOError as error:
        raise _in_use(fd, state_dir) from error
    except OSError as error:
        raise Failed(f"can't lock state_dir {state_dir}: {error.strerror}") from error
    return Lock(fd, number, not known)


def held_lock(fd: int) -> Lock:
    """The lock that `fd` holds already: a copy of a descriptor that `lock` has returned. Raises Failed."""
    try:
        return Lock(fd, _house(fd), False)
    except OSError as error:
        raise Failed(f"can't read the lock file: {error.strerror}") from error


def _house(fd: int) -> int:
    """The number of the house in the lock file, 0 where there is none."""
    house = _second_line(fd).removeprefix(HOUSE_PREFIX)
    return int(house) if house.isascii() and house.isdecimal() and 0 < int(house) < 1 << HOUSE_BITS else 0


def _wait_for(fd: int) -> None:
    """Lock at once, or after a daemon whose keeper was killed: its supervisor is about to die too. Raises OSError."""
    end = time.monotonic() + DYING_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            keeper = _first_line(fd)
            if not keeper.isdecimal() or os.path.exists(f"/proc/{keeper}") or time.monotonic() > end:
                raise
        select.select([], [], [], 0.01)  # nothing tells when a lock is free without waiting for it without end


def _first_line(fd: int) -> str:
    return os.pread(fd, 64, 0).decode("ascii", "replace").partition("\n")[0]


def _second_line(fd: int) -> str:
    return os.pread(fd, 64, 0).decode("ascii", "replace").partition("\n")[2].partition("\n")[0]


def _in_use(fd: int, state_dir: str) -> Failed:
    pid = _first_line(fd)
    who = f" (pid {pid})" if pid.isdigit() else ""
    return Failed(
        f"another procmand{who} uses state_dir {state_dir}",
        hint="talk to that one with procmanctl, or give this one its own daemon.state_dir and daemon.socket",
    )


def _put_aside(path: str, move: Callable[[str, str], None] = os.rename) -> str:
    """Renames (or copies, whatever `move` does) a bad file to the next free number, forgets the oldest, and says what
    was done."""
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.bad-([0-9]+)")
    try:
        matches = (pattern.fullmatch(entry) for entry in os.listdir(folder or "."))
        numbers = sorted(int(match[1]) for match in matches if match)
        target = f"{path}.bad-{numbers[-1] + 1 if numbers else 1}"
        move(path, target)
        for number in numbers[: max(0, len(numbers) + 1 - BAD_KEPT)]:
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.bad-{number}")
    except OSError as error:
        return f"and it can't be put aside: {error.strerror}"
    return f"it is kept as {target}"


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no fsync(2) has nothing to wait for
            raise


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""The way back of `procmanctl apply --previous`: the table before, in memory for the next supervisor, and on disk for
the next daemon.

In the state folder stand the last table that worked, and the one before that. A daemon that starts takes the first
where its own table says something else, for then somebody has edited it, or it has failed; else the second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from procman import memo, store
from procman.errors import Failed
from procman.files import Machine
from procman.journal import Make
from procman.recall import Recalled, recall, recalled
from procman.records import dataclass

HELD_NAME = "previous table"
"""Held by the keeper: the table that was in force before."""

GOOD_NAME, BEFORE_NAME = "good-table.json", "previous-table.json"
"""In the state folder: the last table that worked, and the one that was in force before it."""

FOR_FOLDERS = ("HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
"""Variables by which `table` finds folders that a table does not name."""

NONE = "the daemon has had no other"


@dataclass(slots=True)
class WayBack:
    """`path` is the file of the table. `memory` is a descriptor of the table before (`recall.Recording.memory`), -1
    where there is none; then `why` says why not. The descriptor is ours."""

    path: str
    state_dir: str
    memory: int = -1
    why: str = NONE

    def find(self, now: int) -> list[str]:
        """A daemon starts with the table in the memory `now`: take what the daemon before has left. Returns what is
        wrong with that, for the log."""
        good, problem = self._load(GOOD_NAME)
        before, problem_before = self._load(BEFORE_NAME)
        if good >= 0 and not _same(good, now):
            good, before = before, good
        problems = [each for each in (problem, problem_before) if each]
        if good >= 0:
            os.close(good)
        self.memory, self.why = before, "; ".join(problems) or NONE
        return problems

    def recall(self) -> Recalled:
        """The machine as it was when the table before was read. Raises Failed."""
        if self.memory < 0:
            raise Failed("there is no table before this one", hint=self.why)
        return recall(os.dup(self.memory))

    def left(self, now: int, following: int) -> dict[str, int]:
        """The table in the memory `now` worked, and `following` comes into force in its place. Returns what the keeper
        is to hold, by its name. Raises OSError."""
        going_back = self.memory >= 0 and memo.same(following, self.memory)
        # Who goes back may ask again, and must not come forward by that; nor may a second try lose the way back.
        if going_back or memo.same(following, now):
            return {}
        before = os.dup(now)
        if self.memory >= 0:
            os.close(self.memory)
        self.memory = before
        return {HELD_NAME: before}

    def documents(self, good: int) -> Iterator[tuple[str, Make]]:
        """What is to be written where: `good` is the memory of a table that works, -1 where that in force does not.
        Raises OSError."""
        for name, memory in ((BEFORE_NAME, self.memory), (GOOD_NAME, good)):  # a kill between them costs nothing
            if memory >= 0:
                content = os.pread(memory, memo.MAX_SIZE, 0)
                yield self._file(name), functools.partial(self._document, self._file(name), content)

    def _document(self, file: str, content: bytes) -> dict[str, Any] | None:
        """What is to stand in `file` of such a memory; None where it does, or the memory is damaged. For a thread.
        No variables of the environment but those that reading it may have asked for: others may be secret."""
        of = hashlib.blake2b(content + self.path.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        if store.entry(file, "of") == of:
            return None  # most supervisors find it so, and need not look at what is in it
        try:
            machine = recalled(json.loads(content))
        except (ValueError, RecursionError):
            return None  # said when somebody goes back to it
        environ = {name: machine.environ[name] for name in FOR_FOLDERS if name in machine.environ}
        told = {"cwd": machine.cwd, "environ": environ | _named(machine), "answers": machine.answers}
        return {"of": of, "path": self.path, **told}

    def _file(self, name: str) -> str:
        return os.path.join(self.state_dir, name)

    def _load(self, name: str) -> tuple[int, str]:
        """The table of a file as a memory, -1 where there is none, and what is wrong with it."""
        path = self._file(name)
        loaded = store.load(path)
        if loaded.document is None:
            return -1, loaded.problem
        try:
            return self._checked(path, loaded.document), ""
        except (OSError, ValueError) as error:
            return -1, f"the table that is kept in {path} is not used: {error}; {store.keep_copy(path)}"

    def _checked(self, path: str, document: dict[str, Any]) -> int:
        if why := Machine().trusted(path):
            raise ValueError(f"{why}, and it decides what root runs")
        if (of := document.get("path")) != self.path:
            raise ValueError(f"it is of another file, {of!r:.200}")
        told = {name: document[name] for name in ("cwd", "environ", "answers") if name in document}
        memory = memo.write("table", told)
        try:
            recall(os.dup(memory))
        except Failed as error:
            os.close(memory)
            raise ValueError(f"it is damaged ({error.__cause__})") from error
        return memory


def _named(machine: Recalled) -> dict[str, str]:
    """The variables of the environment whose names stand in the files of the table."""
    content = b"\n".join(map(machine.read, machine.answers["read"]))
    return {name: value for name, value in machine.environ.items() if name.encode() in content}


def _same(one: int, other: int) -> bool:
    """Whether both tables say the same: by their files, and the variables that these name."""
    first, second = recall(os.dup(one)), recall(os.dup(other))
    return first.answers["read"] == second.answers["read"] and _named(first) == _named(second)

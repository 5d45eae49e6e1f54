"""The table in force, kept by the keeper: a supervisor that replaces another one goes on with what that one had read.

The files may have been edited meanwhile, half or wrong. What the daemon runs changes when somebody asks for it, never
because a supervisor died. So everything that `table.parse` learned from the machine is written down, and asked from
there.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, field
from typing import Any

from procman import memo, shape
from procman.config import Account
from procman.errors import Failed
from procman.files import Machine
from procman.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(Machine):
    """The real machine, writing down its answers."""

    answers: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"read": {}, "glob": {}, "account": {}, "group": {}}
    )

    def read(self, path: str) -> bytes:
        """See `Machine`, as for all below."""
        content = Machine.read(self, path)
        self.answers["read"][path] = base64.b85encode(content).decode()
        return content

    def glob(self, pattern: str) -> list[str]:
        found = Machine.glob(self, pattern)
        self.answers["glob"][pattern] = found
        return found

    def account(self, name_or_id: str) -> Account | None:
        account = Machine.account(self, name_or_id)
        self.answers["account"][name_or_id] = account and asdict(account)
        return account

    def group(self, name_or_id: str) -> int | None:
        gid = Machine.group(self, name_or_id)
        self.answers["group"][name_or_id] = gid
        return gid

    def memory(self) -> int:
        """A descriptor (memfd_create(2)) that holds all answers so far, and this process's folder and environment."""
        return memo.write("table", {"cwd": self.cwd, "environ": dict(self.environ), "answers": self.answers})


@dataclass(frozen=True, slots=True)
class _Answers:
    """What is in the memory, by what was asked."""

    read: dict[str, str]
    glob: dict[str, list[str]]
    account: dict[str, Account | None]
    group: dict[str, int | None]

    def asked(self) -> dict[str, dict[str, Any]]:
        """As a Recording has them."""
        accounts = {name: account and asdict(account) for name, account in self.account.items()}
        return {"read": self.read, "glob": self.glob, "account": accounts, "group": self.group}


@dataclass(frozen=True, slots=True)
class _Memory:
    """What `Recording.memory` writes."""

    cwd: str
    environ: dict[str, str]
    answers: _Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled(Machine):
    """The machine as a `Recording` saw it."""

    answers: dict[str, dict[str, Any]]

    def read(self, path: str) -> bytes:
        """See `Machine`, as for all below."""
        if path not in self.answers["read"]:
            raise FileNotFoundError(2, "No such file or directory", path)
        return base64.b85decode(self.answers["read"][path])

    def glob(self, pattern: str) -> list[str]:
        return [str(path) for path in self.answers["glob"].get(pattern, [])]

    def trusted(self, path: str) -> str:
        return ""

    def real(self, folder: str) -> str:
        return folder

    def account(self, name_or_id: str) -> Account | None:
        found = self.answers["account"].get(name_or_id)
        return None if found is None else Account(**found | {"groups": tuple(found["groups"])})

    def group(self, name_or_id: str) -> int | None:
        gid = self.answers["group"].get(name_or_id)
        return None if gid is None else int(gid)


def recall(memory: int) -> Recalled:
    """The machine that `Recording.memory` wrote down. Closes `memory`. Raises Failed for what is no such thing."""
    try:
        return recalled(memo.read(memory))
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(f"the table in force can't be read from memory: {error}") from error


def recalled(document: object) -> Recalled:
    """The same from the document that is in that memory. Raises ValueError, or RecursionError, for what is none."""
    found: _Memory = shape.fit(document, _Memory)
    for content in found.answers.read.values():
        base64.b85decode(content)
    return Recalled(cwd=found.cwd, environ=found.environ, answers=found.answers.asked())

"""Every error that procman raises on purpose.

    ProcmanError            code              exit status of procmanctl
      ├── Failed            "failed"          1   it was tried, and did not work
      ├── ConfigError       "config"          1   the program table has problems (all of them, by file and line)
      ├── WrongUse          "wrong-use"       2   the request itself makes no sense
      ├── NoSuchProgram     "no-such-program" 4
      ├── NotAllowed        "not-allowed"     5
      └── Unreachable       "unreachable"     6   no daemon answers

An error is raised where it is found, travels over the RPC socket as its `code`, and becomes text once, at the edge:
`str(error)` says what is wrong, `error.hint` what to do about it (may be empty).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NamedTuple

SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""Too little of what the machine, or a limit, has: processes, memory, file descriptors (fork(2), open(2))."""


class ProcmanError(Exception):
    """Something a caller can act on. `code` is stable: scripts may rely on it."""

    code = "internal"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Failed(ProcmanError):
    """The operation was tried and did not reach its effect."""

    code = "failed"


class WrongUse(ProcmanError):
    """The request is malformed or contradicts itself."""

    code = "wrong-use"
    exit_status = 2


class NoSuchProgram(ProcmanError):
    """A name that is no program, process or group of the table."""

    code = "no-such-program"
    exit_status = 4


class NotAllowed(ProcmanError):
    """The peer may not do this."""

    code = "not-allowed"
    exit_status = 5


class Unreachable(ProcmanError):
    """No daemon answers on the socket."""

    code = "unreachable"
    exit_status = 6


class Problem(NamedTuple):
    """One mistake in a program table. `line` is 0 when it has no line of its own (a missing file, say)."""

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        key = f"{self.key}: " if self.key else ""
        return f"{self.file}{line}: {key}{self.message}"


class ConfigError(ProcmanError):
    """A program table that can't be used. `problems` holds every mistake that was found, not only the first."""

    code = "config"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def is_shortage(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is one of SHORTAGES: nobody's mistake, and it may pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in SHORTAGES):
            return True
        cause = cause.__cause__
    return False


BY_CODE: dict[str, type[ProcmanError]] = {
    cls.code: cls for cls in (ProcmanError, Failed, WrongUse, NoSuchProgram, NotAllowed, Unreachable)
}


def from_code(code: str, message: str, hint: str = "") -> ProcmanError:
    """The error that the other end of the RPC socket raised, from its code and text."""
    return BY_CODE.get(code, Failed)(message, hint=hint)

"""What the supervisor before was about, as the keeper holds it in memory: a change of the table, rollouts, the end of
the daemon.

It may be damaged, or of another version. Then it is set aside with a message: whoever asked for it asks again, and
what was stopped for it runs again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import field
from typing import Any

from procman import kept, memo, rollout, shape
from procman.change import HELD_NAME, NEXT_TABLE, Read, Unfinished
from procman.errors import ProcmanError
from procman.kept import Kept
from procman.records import dataclass
from procman.supervisor import CLOSING, NO_PAST, PAST, STATE, Ending, Past

ReadTable = Callable[[int], Read]
"""Makes a table of such a memory, which stays open. Raises ProcmanError."""


@dataclass(slots=True)
class Legacy:
    """What there is to go on with. `lost` are the held names of what was set aside, `problems` says why."""

    unfinished: Unfinished | None = None
    ending: Ending | None = None
    rollouts: dict[str, rollout.Memo] = field(default_factory=dict)
    past: Past = NO_PAST
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def take(held: dict[str, int], read_table: ReadTable) -> Legacy:
    """Takes what is meant for us out of `held`. Never raises for what is in there."""
    legacy = Legacy()
    try:
        legacy.unfinished = _unfinished(held, read_table)
    except (OSError, ValueError, ProcmanError) as error:
        legacy.lost += [HELD_NAME, NEXT_TABLE]
        legacy.problems.append(f"the change of the table that was under way can't go on, and is set aside: {error}")
    try:
        if (memory := held.pop(CLOSING, None)) is not None:
            legacy.ending = Ending.of(memo.read(memory))
    except (OSError, ValueError) as error:
        legacy.lost.append(CLOSING)
        legacy.problems.append(f"why all was to be stopped can't be read, and is set aside: {error}")
    try:
        if (memory := held.pop(PAST, None)) is not None:
            legacy.past = Past.of(memo.read(memory))
    except (OSError, ValueError) as error:
        legacy.problems.append(f"events and history before the upgrade can't be read, and begin anew: {error}")
    for name in [name for name in held if name.startswith(rollout.HELD)]:
        try:
            legacy.rollouts[name.removeprefix(rollout.HELD)] = rollout.memo_of(memo.read(held.pop(name)))
        except (OSError, ValueError) as error:
            legacy.lost.append(name)
            legacy.problems.append(f"a rollout can't go on, and is set aside ({name}): {error}")
    return legacy


def kept_of(held: dict[str, int]) -> tuple[Kept, str]:
    """What of the table before is still in force, and what is wrong with it. Whose successor serves already, as the
    rollouts tell, is only tried."""
    memory = held.pop(kept.HELD_NAME, None)
    try:
        found = Kept() if memory is None else Kept.read(memo.read(memory))
    except (OSError, ValueError) as error:
        return Kept(), f"what was kept of the table before can't be read, and is set aside: {error}"
    passed: set[str] = set()
    for name, descriptor in held.items():
        if name.startswith(rollout.HELD):
            with contextlib.suppress(OSError, ValueError):  # said by `take`
                told = rollout.memo_of(memo.read(os.dup(descriptor)))
                passed |= told.successors.keys() if told.passed else set()
    return found.trying(passed), ""


def state(held: dict[str, int]) -> tuple[dict[str, Any] | None, str]:
    """What the disk did not take of the state file, and what is wrong with it; None where there is nothing."""
    memory = held.pop(STATE, None)
    try:
        return (None if memory is None else shape.fit(memo.read(memory), dict[str, Any])), ""
    except (OSError, ValueError) as error:
        return None, f"what the disk did not take of the state file can't be read: {error}"


def _unfinished(held: dict[str, int], read_table: ReadTable) -> Unfinished | None:
    # The table alone, without the change, is left by a supervisor that died at the very end of it.
    table, change = held.pop(NEXT_TABLE, -1), held.pop(HELD_NAME, None)
    found = None
    try:
        if change is not None:
            document: Any = memo.read(change)
            read = read_table(table) if table >= 0 and Unfinished.needs_table(document) else None
            found = Unfinished.of(document, read)
        return found
    finally:
        if table >= 0 and (found is None or found.read is None):
            os.close(table)

"""What a process is at the moment when a new supervisor takes it up: the state file, what the keeper was told, and what
it has, brought together. Decides, and does nothing.

The keeper is right about children. The state file is later than what the keeper was told, or knows no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from procman import launch, lifecycle, report
from procman.config import Program, place
from procman.keeper.wire import Message
from procman.lifecycle import Status

log = logging.getLogger("procman")


class Passing(NamedTuple):
    """A process that passes on to a successor: which of its places is the current one now, and what the one beside is,
    None where the table says that, too."""

    current: int
    beside: Program | None = None


SLOTS = (0, 1)
"""The two places of a process (`Program.slot`)."""

Records = dict[int, Message]
"""The keeper's records of the children of one process, by generation."""


def by_place(children: Mapping[str, Message], names: Iterable[str]) -> tuple[dict[str, Records], list[str]]:
    """The records of both places of each process in `names`, and the children that belong to none of them."""
    found: dict[str, Records] = {place(name, slot): {} for name in names for slot in SLOTS}
    strangers = []
    for child, record in children.items():
        key, generation = launch.split_child_id(child)
        if key in found:
            found[key][generation] = record
        else:
            strangers.append(child)
    return found, strangers


def current_slot(name: str, found: Mapping[str, Records], known: Status) -> int:
    """Which place of the process `name` is the current one, where no rollout is under way. `known` is the state file's
    account of it."""
    both = {slot: found[place(name, slot)] for slot in SLOTS if found[place(name, slot)]}
    if len(both) < len(SLOTS):
        return next(iter(both), 0)
    living = [slot for slot, records in both.items() if any(one["state"] != "exited" for one in records.values())]
    if len(living) == 1:
        return living[0]
    newest = max(both, key=lambda slot: max(both[slot]))
    return next((slot for slot, records in both.items() if known.generation in records), newest)


def in_file(document: object) -> Status:
    """A status of the state file; what can't be read counts as never started."""
    if document is None:
        return Status()
    try:
        return report.status_from(document)
    except (TypeError, ValueError, KeyError) as error:
        log.error("a status in the state file can't be read (%s); what the keeper knows has to do", error)
        return Status()


def status(program: Program, known: Status, records: Records, now: float, *, leaving: bool) -> Status:
    """What the process was when its supervisor died. `known` is the file's account; `leaving`: a change of the table is
    about to stop it, or has."""
    generation = max(records, default=0)
    record = records.get(generation, {})
    found = lifecycle.later(known, _noted(record, generation))
    if generation > found.generation or (record and not _agrees(found, generation, record)):
        started = float(record.get("since", now))  # not from its wall-clock time: that clock may have jumped
        found = lifecycle.adopted(program, found, generation, started, now)
    if leaving:
        found = replace(found, wanted=False)
    return lifecycle.restore(program, found, now)


def _noted(record: Message, generation: int) -> Status | None:
    """What the keeper was told with the child, None where that is nothing, or nothing that can be about this child."""
    noted = report.noted(record)
    if record.get("note") and (noted is None or noted.generation != generation):
        log.error("what was noted with %s makes no sense, and is set aside", record["child"])
        return None
    return noted


def _agrees(found: Status, generation: int, record: Message) -> bool:
    """Whether this can be true of a process whose newest child the keeper has as `record`. While that one lives, there
    is no other."""
    if record["state"] == "exited":
        return True
    pid = record["pid"] if record["state"] == "running" else None
    return found.alive and found.generation == generation and found.pid in (None, pid)

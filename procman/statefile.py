"""What of a state file can be believed: each part of the wrong shape is left out with a message, and the rest counts.

A file that is JSON of the right version may still hold anything: an editor, a bad disk, another program. Whoever reads
it further on finds only what `Supervisor` could have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from procman import report, shape
from procman.keeper import asked, tree
from procman.kept import Kept
from procman.logs import Counters
from procman.orphans import Known

PARTS: dict[str, Any] = {
    "version": int,
    "boot_id": str,
    "written_at": str,
    "down": list[str],
    "replacing": list[str],
    "closing": bool,
    "exit_status": int,
    "at": float,
    "keeper": str,
    "processes": dict[str, Any],  # a status says more than its types: see `report.status_from`
    "logs": dict[str, Counters],
    "children": dict[str, Known],
    "prints": dict[str, str],
    "last": int,
    "made_by": str,
    "pipes": dict[str, int],
    "sockets": dict[str, list[int] | None],
    "seconds": list[str],
    "trials": list[str],
    "kept": dict[str, Any],  # what is kept of an earlier table: see `kept.Kept.read`
    "refused": dict[str, Any],
}
"""All that is written, by its key."""

SAID = 5
"""So many of the parts that were left out are named; of the rest, the number."""


def believable(document: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The parts of `document` that make sense, in the form in which they stood there, and what was left out: words, ""
    for nothing. Never raises."""
    kept, wrong = shape.sane(dict(document), PARTS)
    for part, check in CHECKS.items():
        if part in kept and (problem := check(kept[part])):
            del kept[part]
            wrong.append(f"{part}: {problem}")
    for part, check_entry in ENTRIES.items():
        for name, entry in list(kept.get(part, {}).items()):
            if problem := check_entry(entry):
                del kept[part][name]
                wrong.append(f"{shape.place(part, name)}: {problem}")
    # Asked as documents everywhere: they have been looked at, not changed.
    for part in ("logs", "children"):
        if part in kept:
            kept[part] = {name: document[part][name] for name in kept[part]}
    more = f" and {len(wrong) - SAID} more" if len(wrong) > SAID else ""
    return kept, "; ".join(wrong[:SAID]) + more


def later(in_file: dict[str, Any] | None, held: dict[str, Any] | None, keeper: str) -> dict[str, Any] | None:
    """Which of two documents counts: that of the file, or the one that `keeper` holds because the disk might not take
    it. Pure."""
    if held is None or held.get("keeper") != keeper:
        return in_file
    if in_file is None or in_file.get("keeper") != keeper:  # it can't be read, or is of a daemon before
        return held
    return held if held.get("at", 0.0) > in_file.get("at", 0.0) else in_file


def _exit_status(value: int) -> str:
    return "" if 0 <= value <= 255 else f"no exit status: {value}"


def _last(value: int) -> str:
    return "" if 0 <= value < asked.LAST_MAX else f"no number of a child: {value}"


def _status(value: object) -> str:
    try:
        report.status_from(value)
    except ValueError as error:
        return str(error)
    return ""


def _counters(value: Counters) -> str:
    numbers = (value.read, value.written, value.dropped, value.held, value.unreported, value.rotations)
    return "" if min(*numbers, value.lines_split) >= 0 else "a count can't be below 0"


def _known(value: Known) -> str:
    if not 0 <= value.pid <= asked.PID_MAX or value.start < 0 or value.kill not in ("tree", "main"):
        return "no process"
    # A tag is what tells the processes of a child from all others of the machine.
    return "" if 0 < value.tag < 1 << tree.TAG_BITS else f"no tag of a child: {value.tag}"


def _kept(value: object) -> str:
    try:
        Kept.read(value)
    except ValueError as error:
        return str(error)
    return ""


CHECKS: dict[str, Any] = {"exit_status": _exit_status, "last": _last, "kept": _kept, "refused": _kept}
ENTRIES: dict[str, Any] = {"processes": _status, "logs": _counters, "children": _known}

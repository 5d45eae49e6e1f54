"""The recorded counts, and whether new ones are more. Pure but for `load` and `save`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).with_name("baseline.json")
RECORD = "python -m tests.guard --record"


@dataclass(frozen=True, slots=True)
class Count:
    """How often something happened. From run to run it may differ by the share `slack`, or by `spare`. `python`: it
    depends on the version of Python, for which there may be no record."""

    name: str
    value: int
    slack: float = 0.0
    spare: int = 0
    python: str = ""

    @property
    def key(self) -> str:
        """What it is called in the record."""
        return f"{self.name}, Python {self.python}" if self.python else self.name

    def most(self, recorded: int) -> int:
        """What it may be, where it was `recorded`."""
        return recorded + max(int(recorded * self.slack), self.spare)


@dataclass(slots=True)
class Verdict:
    """What has grown, in words; and what is worth saying, but no failure."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(counts: Sequence[Count], recorded: Mapping[str, int]) -> Verdict:
    """Whether a count is more than was recorded."""
    verdict = Verdict()
    for count in counts:
        before = recorded.get(count.key)
        if before is None and count.python:
            verdict.notes.append(f"{count.name}: not compared, there is no record for Python {count.python}")
        elif before is None:
            verdict.wrong.append(f"{count.name}: {count.value}, and there is no record of it")
        elif count.value > count.most(before):
            most = f" ({count.most(before)} are allowed)" if count.most(before) > before else ""
            verdict.wrong.append(f"{count.name}: grew from {before} to {count.value}{most}")
        elif count.value < before - (count.most(before) - before):
            fell = f"{count.name}: fell from {before} to {count.value}"
            verdict.notes.append(f"{fell}; record it, so that it stays there")
    return verdict


def load(file: Path) -> dict[str, int]:
    """The record. Raises OSError or ValueError."""
    found: dict[str, int] = json.loads(file.read_text())
    return found


def save(file: Path, counts: Sequence[Count]) -> None:
    """Records these; what was not measured now stays as it was."""
    known = load(file) if file.exists() else {}
    known |= {count.key: count.value for count in counts}
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")

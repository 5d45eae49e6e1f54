"""Programs that are still what an earlier table said: their successors are yet to come, or have failed.

The table in force is the last one that was applied. A program that it describes otherwise goes on as it was until its
successor serves; when that fails it stays so. What is kept of it is held by the keeper, beside the table. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from procman import shape
from procman.config import Config, Listener, Program

HELD_NAME = "kept"


@dataclass(frozen=True, slots=True)
class Kept:
    """The programs by the name of the process, and the listeners that they name."""

    programs: dict[str, Program] = field(default_factory=dict)
    listeners: dict[str, Listener] = field(default_factory=dict)

    def of(self, table: Config) -> Config:
        """What is in force: `table`, but for what is kept."""
        known = {program.name for program in table.programs}
        programs = [self.programs.get(program.name, program) for program in table.programs]
        programs += [program for name, program in self.programs.items() if name not in known]
        there = {listener.name for listener in table.listeners}
        needed = {name for program in self.programs.values() for name in program.listen} - there
        listeners = [listener for name, listener in self.listeners.items() if name in needed]
        return replace(table, programs=tuple(programs), listeners=(*table.listeners, *listeners))

    def without(self, names: Iterable[str]) -> Kept:
        """These are kept no more."""
        gone = set(names)
        left = {name: program for name, program in self.programs.items() if name not in gone}
        needed = {listener for program in left.values() for listener in program.listen}
        return Kept(left, {name: listener for name, listener in self.listeners.items() if name in needed})

    def document(self) -> dict[str, Any]:
        """For the keeper."""
        programs = {name: _document(program) for name, program in self.programs.items()}
        return {"programs": programs, "listeners": {name: asdict(each) for name, each in self.listeners.items()}}

    @staticmethod
    def read(document: object) -> Kept:
        """The reverse of `document`. Raises ValueError for what makes no sense."""
        found: Kept = shape.fit(document, Kept)
        for name, program in found.programs.items():
            if name != program.name or not program.argv or program.slot not in (0, 1):
                raise ValueError(f"programs.{name}: is no program of that name")
            if not set(program.listen) <= found.listeners.keys():
                raise ValueError(f"programs.{name}: its listeners are missing")
        return found


def keep(config: Config, names: Iterable[str], listeners: Mapping[str, Listener]) -> Kept:
    """What `config` says of the processes `names`; `listeners` are those of `config`, by name."""
    wanted = set(names)
    programs = {program.name: replace(program, slot=0) for program in config.programs if program.name in wanted}
    needed = {name for program in programs.values() for name in program.listen}
    return Kept(programs, {name: listener for name, listener in listeners.items() if name in needed})


def _document(program: Program) -> dict[str, Any]:
    return asdict(program) | {"success_exit_codes": sorted(program.success_exit_codes)}

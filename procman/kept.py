"""Programs that are still what an earlier table said: their new version is yet to come, or has failed.

The table in force is the last one that was applied. A program that it describes otherwise goes on as it was until its
successor serves, or until it is stopped to start anew; when the new version fails it stays what it was. What is kept of
it is held by the keeper, beside the table, and is in the state file: for a daemon that comes after one that was killed.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, replace
from typing import Any

from procman import apply, shape
from procman.config import Config, Listener, Program
from procman.records import dataclass

HELD_NAME = "kept"


@dataclass(frozen=True, slots=True)
class Kept:
    """The programs by the name of the process, and the listeners that they name. `tried`: what processes were whose new
    version is to show now that it starts, or goes on to serve; only then it is sure that they don't go back. `absent`:
    processes that came with a version which has failed, and have gone."""

    programs: dict[str, Program] = field(default_factory=dict)
    listeners: dict[str, Listener] = field(default_factory=dict)
    tried: dict[str, Program] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is not what the table says."""
        return bool(self.programs or self.tried or self.absent)

    def of(self, table: Config) -> Config:
        """What is in force: `table`, but for what is kept."""
        known = {program.name for program in table.programs}
        there = (program for program in table.programs if program.name not in self.absent)
        programs = [self.programs.get(program.name, program) for program in there]
        programs += [program for name, program in self.programs.items() if name not in known]
        old = (*self.programs.values(), *self.tried.values())
        needed = {name for program in old for name in program.listen}
        needed -= {listener.name for listener in table.listeners}
        listeners = [listener for name, listener in self.listeners.items() if name in needed]
        return replace(table, programs=tuple(programs), listeners=(*table.listeners, *listeners))

    def without(self, names: Iterable[str]) -> Kept:
        """These are kept no more."""
        gone = set(names)
        left, tried = (
            {name: program for name, program in some.items() if name not in gone}
            for some in (self.programs, self.tried)
        )
        needed = {listener for program in (*left.values(), *tried.values()) for listener in program.listen}
        listeners = {name: listener for name, listener in self.listeners.items() if name in needed}
        return replace(self, programs=left, listeners=listeners, tried=tried)

    def trying(self, names: Iterable[str]) -> Kept:
        """These are tried as the table says."""
        known = self.programs | self.tried
        tried = self.tried | {name: known[name] for name in names if name in known}
        left = {name: one for name, one in self.programs.items() if name not in tried}
        return replace(self, programs=left, tried=tried)

    def failed(self, names: Iterable[str]) -> Kept:
        """These were tried, and are once more what they were."""
        back = {name: self.tried[name] for name in names if name in self.tried}
        left = {name: one for name, one in self.tried.items() if name not in back}
        return replace(self, programs=self.programs | back, tried=left)

    def joined(self, later: Kept) -> Kept:
        """Both; of what both have, `later`."""
        programs, listeners = self.programs | later.programs, self.listeners | later.listeners
        absent = tuple(dict.fromkeys((*self.absent, *later.absent)))
        return Kept(programs, listeners, self.tried | later.tried, absent)

    def document(self) -> dict[str, Any]:
        """For the keeper, and for the state file."""
        shown = {
            part: {name: _document(program) for name, program in some.items()}
            for part, some in (("programs", self.programs), ("tried", self.tried))
        }
        listeners = {name: asdict(each) for name, each in self.listeners.items()}
        return {**shown, "listeners": listeners, "absent": list(self.absent)}

    @staticmethod
    def read(document: object) -> Kept:
        """The reverse of `document`. Raises ValueError for what makes no sense."""
        found: Kept = shape.fit(document, Kept)
        for name, program in (*found.programs.items(), *found.tried.items()):
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


def still(before: Kept, refused: Kept, table: Config) -> Kept:
    """What of `before` a new daemon goes on with, which has read `table`: all programs of which that says the same as
    the table that was `refused` for them. Whoever has written something else since wants that."""
    known = {listener.name: listener for listener in table.listeners}

    def same(program: str) -> bool:
        then, now = (
            {one.name: one for one in some if one.program == program}
            for some in (refused.programs.values(), table.programs)
        )
        sockets = {each: refused.listeners.get(each) for one in then.values() for each in one.listen}
        unchanged = then.keys() == now.keys() and all(apply.same_child(then[each], now[each]) for each in now)
        return bool(now) and unchanged and all(known.get(each) == listener for each, listener in sockets.items())

    kept = {name: program for name, program in before.programs.items() if same(program.program)}
    came = [name for name in before.absent if name in refused.programs and same(refused.programs[name].program)]
    return Kept(kept, before.listeners, absent=tuple(came)).without([])


def _document(program: Program) -> dict[str, Any]:
    return asdict(program) | {"success_exit_codes": sorted(program.success_exit_codes)}

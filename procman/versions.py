"""Which version of each process is in force: what the table says, or what is kept of the one before (`kept`).

Whenever that changes the keeper is told, so the next supervisor knows it; so is the state file, for the next daemon.
Nothing is started or stopped here: `change` and `renewal` do that, and `rollout`.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from procman import apply, kept, memo, values
from procman.config import Config, Program
from procman.kept import Kept
from procman.lifecycle import State
from procman.link import KeeperLink
from procman.parting import Parting
from procman.process import Process
from procman.supervisor import Supervisor

CHANGE = "change"
"""Held by the keeper: the change of the table that is under way."""


class Versions:
    """`table` is the last one that was applied; `kept_programs` are what of the one before is in force instead."""

    def __init__(self, supervisor: Supervisor, link: KeeperLink, table: Config, kept_programs: Kept) -> None:
        self._supervisor, self._link = supervisor, link
        self.table, self.kept = table, kept_programs
        self._left, self._refused = Kept(), Kept()
        self._unproven: set[str] = set()  # programs whose successors are still to come, or on trial
        self._coming: set[str] = set()  # their processes that are there for the first time
        supervisor.versions = self.document

    def begin(self, table: Config, kept_programs: Kept) -> None:
        """Another table: all that it changes is kept as it was, for now. The keeper is not told yet."""
        self.table, self.kept = table, kept_programs
        self._left = replace(self._left, absent=())  # they are to come again
        self._supervisor.take_settings(self.kept.of(self.table))

    def awaiting(self, successors: Container[str]) -> None:
        """The processes `successors` are to take over from others, or come with those that do."""
        found = [one for one in self.table.programs if one.name in successors]
        proven = {one.program for one in self.kept.tried.values()}
        self._unproven = {one.program for one in found} - proven
        self._coming = {one.name for one in found if one.name not in self.kept.programs}
        self._supervisor.journal.dirty()

    def of_table(self, names: Iterable[str], new: Iterable[str] = ()) -> list[Program]:
        """What the table says of those of these processes that are kept, or tried, or `new`, in order of their
        priority."""
        found = set(names).intersection((*self.kept.programs, *self.kept.tried, *new))
        return sorted((one for one in self.table.programs if one.name in found), key=lambda one: one.priority)

    def listening(self, but: Container[str] = ()) -> set[str]:
        """The listeners that some process has, or will have when it is what the table says. Not counted is what is kept
        of the processes `but`."""
        kept_ = (program for name, program in self.kept.programs.items() if name not in but)
        return {listener for program in (*self.table.programs, *kept_) for listener in program.listen}

    async def leave(self, processes: Iterable[Process], parting: Parting) -> None:
        """These are about to stop for good, or to be something else: nobody more comes to the sockets that close with
        them, and who has come is answered, as long as their stop may take."""
        programs = [process.program for process in processes if process.status.state is State.RUNNING]
        closing = parting.closing(programs, self.listening({program.name for program in programs}))
        # Where another one is to be bound in its place, who is refused sooner is refused longer.
        taken = [listener.address for listener in self.table.listeners]
        closing = [name for name in closing if not any(values.overlap(parting.address(name), one) for one in taken)]
        patience = max((program.stop_timeout for program in programs), default=0.0)
        await parting.leave(closing, patience)

    def left(self) -> list[str]:
        """The processes that are not what the table says."""
        return sorted((*self.kept.programs, *self.kept.absent))

    def behind(self, name: str) -> list[str]:
        """The keys in which the process `name` is not what the table says; none if it is."""
        program = self.kept.programs.get(name)
        if program is None:
            return []
        now = next((one for one in self.table.programs if one.name == name), None)
        return ["removed"] if now is None else list(apply.differences(program, now))

    def passed(self, name: str, again: Program | None) -> None:
        """The successor of a process that was kept serves; or it does no more, and the process is once more what it
        was (`again`)."""
        if again is None and (process := self._supervisor.processes.get(name)) is not None:
            self._unproven.discard(process.program.program)
        if again is None and name in self.kept.programs:
            self.trying([name])
        elif again is not None and name in self.kept.tried:
            self._now(self.kept.failed([name]))

    def let_go(self, names: Iterable[str]) -> None:
        """These are what the table says from now on."""
        there = set(names).intersection((*self.kept.programs, *self.kept.tried))
        if there:
            self._now(self.kept.without(there))

    def trying(self, names: Iterable[str]) -> None:
        """These are to show whether they start, or go on to serve, as the table says."""
        self._now(self.kept.trying(names))

    def failed(self, names: Iterable[str], held: str, document: object) -> None:
        """They don't, and are what they were. In the same moment the keeper gets `document` as `held`."""
        self._now(self.kept.failed(names), held, document)

    def left_out(self, names: Iterable[str]) -> None:
        """These came with a version that has failed, and go."""
        self._now(replace(self.kept, absent=(*self.kept.absent, *names)))

    def settled(self) -> None:
        """No change is under way: what is kept now has been left so, and a daemon to come should know it."""
        programs = {one.program for one in self.kept.programs.values()}
        programs |= {one.program for one in self.table.programs if one.name in self.kept.absent}
        for name in self._left.programs.keys() - self.kept.programs.keys():
            if (process := self._supervisor.processes.get(name)) is not None:
                process.mark("")  # it had failed, and is what the table says
        self._left = self.kept
        self._unproven.clear()
        self._refused = self._said(programs)
        self._supervisor.journal.dirty()

    def document(self) -> dict[str, Any]:
        """Part of the state file: what a change has left as it was, and what the table said then. What is on trial, or
        is yet to be, counts as left: should all of procman be killed now, nobody knows whether it is any good."""
        trial = {name: one for name, one in self.kept.programs.items() if one.program in self._unproven}
        coming = [one.name for one in self.table.programs if one.program in self._unproven and one.name in self._coming]
        if not (self._left or trial):
            return {}
        left = self._left.joined(replace(self.kept, programs=trial, tried={}, absent=tuple(coming)))
        refused = self._refused.joined(self._said(self._unproven)) if trial else self._refused
        return {"kept": left.document(), "refused": refused.document()}

    def _said(self, programs: Container[str]) -> Kept:
        """What the table says of these programs."""
        names = [one.name for one in self.table.programs if one.program in programs]
        return kept.keep(self.table, names, {listener.name: listener for listener in self.table.listeners})

    def _now(self, now: Kept, held: str = kept.HELD_NAME, document: object = None) -> None:
        gone = [name for name in self.kept.programs if name not in now.programs and name not in now.tried]
        self.kept, self._left = now, self._left.without(gone)
        self._supervisor.take_settings(now.of(self.table))
        self._supervisor.journal.dirty()
        if held != kept.HELD_NAME:
            try:
                memory = memo.write(kept.HELD_NAME, now.document())
            except OSError:
                self._link.hand_over(held, document)
                return
            try:
                self._link.hand_over(held, document, {kept.HELD_NAME: memory})
            finally:
                os.close(memory)
        elif now:
            self._link.hand_over(kept.HELD_NAME, now.document())
        else:
            self._link.release(kept.HELD_NAME)


def still_kept(table: Config, state: Mapping[str, Any]) -> Kept:
    """What a new daemon goes on with, which has read `table`, by the state file of the one before: what that one had
    kept, as long as the table says what it said then."""
    try:
        before, refused = Kept.read(state.get("kept", {})), Kept.read(state.get("refused", {}))
    except ValueError:
        return Kept()  # `statefile` has said it
    return kept.still(before, refused, table)

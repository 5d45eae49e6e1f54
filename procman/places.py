"""The processes of the table, and those beside them while one passes its work on to its successor.

A process has two places for a child (`Program.slot`). The *current* one of a name is what everybody means by it: what
status shows, what operators start and stop. Beside it there may be another for a while: a successor that is on trial,
or the one before that runs dry. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from procman.process import Process


class Places:
    """`current` and `beside` are by name; `by_key` has all, by place."""

    def __init__(self) -> None:
        self.current: dict[str, Process] = {}
        self.beside: dict[str, Process] = {}
        self.by_key: dict[str, Process] = {}
        self.watchers: list[Callable[[], None]] = []
        """Called when a process has come to the table, or has left it."""
        self._numbers: dict[str, int] = {}
        self._called: dict[str, list[str]] | None = None

    def called(self, name: str) -> list[Process]:
        """The current processes that have this name, or are of the program that has it: in the order of the table. No
        look at all of them for each question."""
        if self._called is None:
            self._called = {}
            for process in self.current.values():
                for each in {process.name, process.program.program}:
                    self._called.setdefault(each, []).append(process.name)
        return [self.current[each] for each in self._called.get(name, ())]

    def everyone(self) -> list[Process]:
        """All of them: what runs, whatever it is called."""
        return list(self.by_key.values())

    def add(self, process: Process) -> None:
        """A process of the table."""
        self._called = None
        self.current[process.name] = process
        self.by_key[process.key] = process
        self._changed()

    def next_number(self, process: Process) -> int:
        """The number of children up to which those of a successor of `process` are not counted: each trial has its own,
        so that none is taken for one of a trial before."""
        number = max(process.status.generation, self._numbers.get(process.name, 0))
        self._numbers[process.name] = number + 1
        return number

    def put_beside(self, process: Process) -> None:
        """One more for a name, in its other place."""
        self.beside[process.name] = process
        self.by_key[process.key] = process

    def switch(self, name: str) -> None:
        """The one beside becomes the current one, and the other way round."""
        self.current[name], self.beside[name] = self.beside[name], self.current[name]

    def take_away(self, name: str) -> Process:
        """The one beside has gone."""
        return self.by_key.pop(self.beside.pop(name).key)

    def remove(self, name: str) -> Process:
        """The process has left the table."""
        self._called = None
        process = self.by_key.pop(self.current.pop(name).key)
        self._changed()
        return process

    def put_in_order(self, names: Sequence[str]) -> None:
        """The current ones in this order."""
        self._called = None
        ordered = {name: self.current[name] for name in names}
        self.current.clear()  # one object with others that look into it
        self.current.update(ordered)

    def _changed(self) -> None:
        for watcher in list(self.watchers):
            watcher()

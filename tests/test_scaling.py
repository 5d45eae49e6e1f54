"""scaling.py, with a supervisor that is not one: what changes while the kernel is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from procman import queues
from procman.config import Address, Listener, Program, Scale
from procman.lifecycle import Start, State, Status
from procman.scaling import Scaling

WEB = Listener(name="web", address=Address("tcp", "127.0.0.1", 80))


class Processes:
    """What `Scaling` asks of a supervisor. Each process remembers what it was fed."""

    def __init__(self, wanted: int, of: int) -> None:
        self.config = SimpleNamespace(listeners=(WEB,))
        self.places = SimpleNamespace(beside={})
        self.journal = SimpleNamespace(dirty=lambda: None)
        self.closing = self.changing = False
        self.reloading = ()
        self.now = self.some(wanted, of)

    @staticmethod
    def some(wanted: int, of: int) -> list[Any]:
        made = []
        for number in range(of):
            up = number < wanted
            status = Status(State.RUNNING if up else State.STOPPED, wanted=up, generation=1)
            program = Program(
                name=f"shop:{number}", program="shop", argv=("x",), listen=("web",), scale=Scale(min=1, max=of)
            )
            fed: list[Any] = []
            process = SimpleNamespace(name=program.name, program=program, status=status, fed=fed, feed=fed.append)
            made.append(process)
        return made

    def all(self) -> list[Any]:
        return self.now

    def is_down(self, name: str) -> bool:
        return False

    def is_replaced(self, name: str) -> bool:
        return False

    def note(self, *_: object, **__: object) -> None:
        pass


@pytest.mark.parametrize("left", [False, True])
def test_who_was_replaced_while_connections_were_counted_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """What is done is done to the processes that there are by then."""

    async def main() -> None:
        supervisor: Any = Processes(1, of=3)
        scaling = Scaling(supervisor, SimpleNamespace(sockets=None))  # type: ignore[arg-type]
        before = supervisor.now

        def loads(addresses: object) -> dict[Address, queues.Load]:
            supervisor.now = [] if left else Processes.some(1, of=3)
            return {WEB.address: queues.Load(100, 0, frozenset())}

        monkeypatch.setattr(queues, "loads", loads)
        await scaling._look_at(scaling._groups())
        assert [process.fed for process in before] == [[], [], []]
        if not left:
            assert [len(process.fed) for process in supervisor.now] == [0, 1, 0]
            assert isinstance(supervisor.now[1].fed[0], Start)

    asyncio.run(main())

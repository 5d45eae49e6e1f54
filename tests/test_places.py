"""Who is meant by a name, whatever comes, leaves, and changes places."""

from __future__ import annotations

from typing import cast

from procman.config import Program, place
from procman.places import Places
from procman.process import Process


class _Process:
    """As much of a `Process` as places look at."""

    def __init__(self, name: str, slot: int = 0) -> None:
        self.program = Program(name=name, program=name.partition(":")[0], argv=("true",), slot=slot)
        self.name, self.key = name, place(name, slot)


def a_process(name: str, slot: int = 0) -> Process:
    return cast(Process, _Process(name, slot))


def names(places: Places, name: str) -> list[str]:
    return [process.name for process in places.called(name)]


def test_by_process_or_program_in_the_order_of_the_table() -> None:
    places = Places()
    for name in ("web:1", "job", "web:2"):
        places.add(a_process(name))
    assert names(places, "web") == ["web:1", "web:2"]
    assert names(places, "web:2") == ["web:2"]
    assert names(places, "job") == ["job"]
    assert names(places, "nobody") == []


def test_it_follows_changes() -> None:
    places = Places()
    places.add(a_process("web"))
    assert names(places, "web") == ["web"]
    places.add(a_process("web:1"))  # two workers from now on: the one before is still to go
    assert names(places, "web") == ["web", "web:1"]
    places.remove("web")
    assert names(places, "web") == ["web:1"]
    places.add(a_process("web:2"))
    places.put_in_order(["web:2", "web:1"])
    assert names(places, "web") == ["web:2", "web:1"]


def test_it_is_the_current_one() -> None:
    places = Places()
    places.add(a_process("web"))
    assert names(places, "web") == ["web"]
    successor = a_process("web", 1)
    places.put_beside(successor)
    places.switch("web")
    assert places.called("web") == [successor]

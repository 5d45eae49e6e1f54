"""What was asked for several processes: levels, and when it is reached or missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.config import Program
from procman.config import Ready as Probe
from procman.lifecycle import Event, Exit, Exited, Gone, Ready, Spawned, SpawnFailed, State, Status, Stop
from procman.operation import begin, carry_out, levels, reach
from procman.process import Process
from procman.report import Info

GOOD = Exit(0, None, 0.0, "exit status 0")
BAD = Exit(3, None, 0.0, "exit status 3")


class Nowhere:
    """Surroundings in which nothing happens by itself: the test says what happens, in `answer`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[Process, str], Event | None] = lambda process, asked: None

    def _asked(self, process: Process, what: str) -> None:
        self.asked.append(f"{what} {process.name}")
        event = self.answer(process, what)
        if event is not None:
            asyncio.get_running_loop().call_soon(process.feed, event)

    def spawn(self, process: Process, generation: int) -> None:
        self._asked(process, "spawn")

    def signal(self, process: Process, number: int, tree: bool) -> None:
        self._asked(process, "signal")

    def remember(self, process: Process) -> None:
        pass

    def changed(self, process: Process, before: Status) -> None:
        pass

    def watch_ready(
        self, process: Process, ready: Callable[[], None], report: Callable[[str], None]
    ) -> Coroutine[Any, Any, None] | None:
        return None


def program(name: str, priority: int = 1, **keys: Any) -> Program:
    # "notify" waits for Ready, which only the test feeds.
    return Program(name=name, program=name, argv=(name,), priority=priority, **({"ready": Probe(kind="notify")} | keys))


def make(ground: Nowhere, *programs: Program) -> list[Process]:
    return [Process(each, Status(), ground) for each in programs]


@given(st.lists(st.integers(0, 3)))
def test_levels(priorities: list[int]) -> None:
    async def check() -> None:
        processes = make(Nowhere(), *(program(str(at), priority) for at, priority in enumerate(priorities)))
        found = levels(processes)
        assert [level[0].program.priority for level in found] == sorted(set(priorities))
        assert [int(process.name) for level in found for process in level] == [
            at for wanted in sorted(set(priorities)) for at, priority in enumerate(priorities) if priority == wanted
        ], "the order of the table within a level"
        assert levels(processes, reverse=True) == found[::-1]

    asyncio.run(check())


STARTED: list[Event] = [Spawned(100, 0.0)]
RUNNING: list[Event] = [*STARTED, Ready()]

OUTCOMES: list[tuple[str, dict[str, Any], list[Event], str, list[Event], bool | None]] = [
    ("a start, no child yet", {}, [], "start", [], None),
    ("a start, not ready yet", {}, [], "start", STARTED, None),
    ("a start", {}, [], "start", RUNNING, True),
    ("a start of what runs", {}, RUNNING, "start", [], True),
    ("a start that fails", {}, [], "start", [SpawnFailed("exec: no")], False),
    ("a start that ends early", {}, [], "start", [*STARTED, Exited(BAD)], False),
    ("a start that is the last try", {"start_retries": 0}, [], "start", [*STARTED, Exited(BAD)], False),
    ("a task that does its work at once", {"restart": "never"}, [], "start", [*STARTED, Exited(GOOD)], True),
    ("a task that fails", {"restart": "on-failure", "start_retries": 0}, [], "start", [*STARTED, Exited(BAD)], False),
    ("a start that somebody undoes", {}, [], "start", [*STARTED, Stop("op"), Exited(GOOD)], False),
    ("a stop, not over", {}, RUNNING, "stop", [], None),
    ("a stop", {}, RUNNING, "stop", [Exited(GOOD)], True),
    ("a stop with something left", {}, RUNNING, "stop", [Exited(GOOD, left=True)], None),
    ("a stop with nothing left any more", {}, RUNNING, "stop", [Exited(GOOD, left=True), Gone()], True),
    ("a stop of what is stopped", {}, [], "stop", [], True),
    ("a restart, still the old one", {}, RUNNING, "restart", [], None),
    ("a restart, the old one is gone", {}, RUNNING, "restart", [Exited(GOOD)], None),
    ("a restart", {}, RUNNING, "restart", [Exited(GOOD), *RUNNING], True),
    ("a restart that fails", {}, RUNNING, "restart", [Exited(GOOD), *STARTED, Exited(BAD)], False),
    ("a restart of what is stopped", {}, [], "restart", RUNNING, True),
    ("a restart of what waits", {}, [*STARTED, Exited(BAD)], "restart", RUNNING, True),
]


@pytest.mark.parametrize(
    ("keys", "before", "verb", "after", "expected"), [case[1:] for case in OUTCOMES], ids=[case[0] for case in OUTCOMES]
)
def test_outcome(
    keys: dict[str, Any], before: list[Event], verb: str, after: list[Event], expected: bool | None
) -> None:
    async def check() -> None:
        (process,) = make(Nowhere(), program("web", **keys))
        if before:
            begin("start", process, "before")
            for event in before:
                process.feed(event)
        aim = begin(verb, process, "test")
        for event in after:
            process.feed(event)
        outcome = aim.outcome()
        assert (outcome and outcome[0]) == expected
        assert outcome is None or outcome[1], "with a reason"
        process.close()

    asyncio.run(check())


def test_a_stop_that_a_start_overtakes() -> None:
    async def check() -> None:
        (process,) = make(Nowhere(), program("web"))
        begin("start", process, "test")
        aim = begin("stop", process, "test")
        begin("start", process, "somebody else")
        assert aim.outcome() == (False, "it was started meanwhile")
        process.close()

    asyncio.run(check())


def test_reach_tells_every_change_and_leaves_no_watcher() -> None:
    async def check() -> None:
        (process,) = make(Nowhere(), program("web"))
        aim = begin("start", process, "test")
        told: list[Info] = []
        task = asyncio.create_task(reach(aim, told.append))
        for event in RUNNING:
            await asyncio.sleep(0)
            process.feed(event)
        assert await task == (True, "test")
        assert [info["state"] for info in told] == ["STARTING", "RUNNING"]
        assert not process.watchers
        given_up = asyncio.create_task(reach(begin("stop", process, "test"), told.append))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert not process.watchers
        process.close()

    asyncio.run(check())


def obedient(process: Process, asked: str) -> Event | None:
    if asked == "signal":
        return Exited(GOOD)
    asyncio.get_running_loop().call_soon(process.feed, Spawned(100, 0.0))
    return Ready()


def test_a_stop_goes_from_the_highest_priority_number_down_and_waits_for_each_level() -> None:
    async def check() -> None:
        ground = Nowhere()
        ground.answer = obedient
        processes = make(ground, program("db", 1), program("web", 2), program("web2", 2), program("task", 3))
        outcomes = await carry_out("start", processes, "test", lambda info: None)
        assert all(ok for ok, _ in outcomes.values())
        assert ground.asked == ["spawn db", "spawn web", "spawn web2", "spawn task"]
        ground.asked.clear()
        db, web, web2, task = processes
        ground.answer = lambda process, asked: None
        stopping = asyncio.create_task(carry_out("stop", processes, "test", lambda info: None))
        await settle()
        assert ground.asked == ["signal task"]
        task.feed(Exited(GOOD))
        await settle()
        assert ground.asked[1:] == ["signal web", "signal web2"]
        web2.feed(Exited(GOOD))
        await settle()
        assert db.status.state is State.RUNNING, "one of the level before still runs"
        web.feed(Exited(GOOD))
        await settle()
        assert ground.asked[3:] == ["signal db"]
        db.feed(Exited(BAD))
        outcomes = await stopping
        assert outcomes.keys() == {"db", "web", "web2", "task"}
        assert all(ok for ok, _ in outcomes.values())

    asyncio.run(check())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_restart_of_several() -> None:
    async def check() -> None:
        ground = Nowhere()
        ground.answer = obedient
        processes = make(ground, program("a"), replace(program("b"), restart="never"))
        await carry_out("start", processes, "test", lambda info: None)
        outcomes = await carry_out("restart", processes, "test", lambda info: None)
        assert {name: ok for name, (ok, _) in outcomes.items()} == {"a": True, "b": True}
        assert [process.status.generation for process in processes] == [2, 2]
        assert await carry_out("stop", [], "test", lambda info: None) == {}
        for process in processes:
            process.close()

    asyncio.run(check())



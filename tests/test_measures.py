"""When samples are taken, and how long they are kept; what a sample is, is tested in test_resources.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from procman.config import Sampling
from procman.measures import Measures


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_samples_come_and_are_forgotten() -> None:
    async def check() -> None:
        measures = Measures(Sampling(0.02), lambda: {"web": os.getpid()})
        assert measures.latest("web") is None
        assert measures.history("web") == []
        await until(lambda: len(measures.history("web")) >= 3)
        sample = measures.latest("web")
        assert sample is not None
        assert sample.memory_bytes > 1_000_000
        times = [at for at, _, _ in measures.history("web")]
        assert times == sorted(times)
        measures.stop()
        measures.forget("web")
        assert measures.latest("web") is None
        assert measures.history("web"), "the last hour is that of the process, not of its child"
        measures.forget("web", history=True)
        assert measures.history("web") == []

    asyncio.run(check())


def test_nothing_runs() -> None:
    async def check() -> None:
        asked: list[int] = []

        def mains() -> dict[str, int]:
            asked.append(1)
            return {}

        measures = Measures(Sampling(0.01), mains)
        await until(lambda: len(asked) >= 3)
        measures.stop()
        count = len(asked)
        await asyncio.sleep(0.05)
        assert len(asked) == count

    asyncio.run(check())


def test_other_settings() -> None:
    async def check() -> None:
        measures = Measures(Sampling(0), lambda: {"web": os.getpid()})
        await asyncio.sleep(0.05)
        assert measures.latest("web") is None, "0 is never"
        measures.change(Sampling(0.01, "pss"))
        await until(lambda: measures.latest("web"))
        measures.change(Sampling(0))
        assert measures.latest("web") is None
        assert measures.history("web") == []
        await asyncio.sleep(0.05)
        assert measures.latest("web") is None

    asyncio.run(check())

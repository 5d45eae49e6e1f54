"""The state file is written soon, together, in another thread, and nothing is forgotten that is not on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from procman import journal
from procman.journal import Journal


class Written:
    """A journal with what it writes and forgets."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.json"
        self.number: Any = 0
        self.asked = 0
        self.forgotten: list[str] = []
        self.held: dict[str, Any] = {}
        self.journal = Journal(str(self.path), self._document, self.forgotten.append, self._hold)

    def _hold(self, document: dict[str, Any]) -> None:
        self.held = json.loads(json.dumps(document))

    def _document(self) -> dict[str, Any]:
        self.asked += 1
        return {"number": self.number}

    def on_disk(self) -> Any:
        return json.loads(self.path.read_bytes())["number"]


@contextlib.asynccontextmanager
async def journaling(folder: Path) -> AsyncIterator[Written]:
    written = Written(folder)
    try:
        yield written
    finally:
        await written.journal.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(journal, "GATHER_SECONDS", 0.02)


def test_many_changes_are_one_write(tmp_path: Path) -> None:
    async def check() -> None:
        async with journaling(tmp_path) as written:
            for number in range(100):
                written.number = number
                written.journal.dirty()
            await written.journal.saved()
            assert (written.on_disk(), written.asked) == (99, 1)

    asyncio.run(check())


def test_a_change_is_written_without_being_waited_for(tmp_path: Path) -> None:
    async def check() -> None:
        async with journaling(tmp_path) as written, asyncio.timeout(10):
            written.journal.dirty()
            while not written.path.exists():
                await asyncio.sleep(0.005)

    asyncio.run(check())


def test_what_changes_during_a_write_is_written_too(tmp_path: Path) -> None:
    async def check() -> None:
        async with journaling(tmp_path) as written:
            written.number = 1
            first = asyncio.create_task(written.journal.saved())
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # it is in the thread now
            written.number = 2
            written.journal.forget_later("a#1")
            await asyncio.gather(written.journal.saved(), first)
            assert written.on_disk() == 2
            assert written.forgotten == ["a#1"]

    asyncio.run(check())


def test_the_last_write(tmp_path: Path) -> None:
    async def check() -> None:
        async with journaling(tmp_path) as written:
            written.number = 7
            written.journal.dirty()
        assert written.on_disk() == 7
        asked = written.asked
        written.journal.dirty()
        await written.journal.saved()  # returns at once
        await asyncio.sleep(0.1)
        assert written.asked == asked, "nothing is written after close"

    asyncio.run(check())


def test_a_write_that_fails_is_tried_again_and_nothing_is_forgotten_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        folder = tmp_path / "state"
        async with journaling(folder) as written:
            written.journal.forget_later("a#1")
            await written.journal.saved()
            assert str(folder) in written.journal.problem
            written.journal.forget_later("b#1")
            await written.journal.saved()
            assert written.forgotten == []
            assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1, "said once"
            folder.mkdir()
            async with asyncio.timeout(10):
                while written.journal.problem:
                    await asyncio.sleep(0.005)
            assert written.forgotten == ["a#1", "b#1"]
            assert "can be written again" in caplog.text

    asyncio.run(check())


def test_what_the_disk_does_not_take_is_handed_over(tmp_path: Path) -> None:
    async def check() -> None:
        folder = tmp_path / "state"
        async with journaling(folder) as written:
            written.number = 1
            written.journal.dirty()
            async with asyncio.timeout(10):
                while not written.held:
                    await asyncio.sleep(0.005)
            assert written.held["number"] == 1
            first = written.held
            folder.mkdir()
            async with asyncio.timeout(10):
                while written.journal.problem:
                    await asyncio.sleep(0.005)
            written.number = 2
            written.journal.dirty()
            async with asyncio.timeout(10):
                while written.on_disk() != 2:
                    await asyncio.sleep(0.005)
            assert written.held["number"] == 1, "a disk that takes it is enough"
            on_disk = json.loads(written.path.read_bytes())
            assert on_disk["at"] > first["at"]
            assert on_disk["boot_id"] == first["boot_id"]

    asyncio.run(check())


def test_what_somebody_waits_for_is_handed_over_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a disk hangs in the write before it."""
    monkeypatch.setattr(journal, "STUCK_SECONDS", 0.05)
    fifo = tmp_path / "state.json.new"
    os.mkfifo(fifo)

    async def check() -> None:
        written = Written(tmp_path)
        for number in (1, 2):
            written.number = number
            saved = asyncio.create_task(written.journal.saved())
            async with asyncio.timeout(10):
                while written.held.get("number") != number:
                    await asyncio.sleep(0.005)
            await saved
        await written.journal.close()
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go on
        async with asyncio.timeout(10):
            while not written.path.exists():
                await asyncio.sleep(0.005)
        os.close(reader)

    asyncio.run(check())


def test_a_document_that_is_no_json_does_not_end_the_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with journaling(tmp_path) as written:
            written.number = object()
            await written.journal.saved()
            assert "TypeError" in written.journal.problem
            written.number = 5
            await written.journal.saved()
            assert (written.journal.problem, written.on_disk()) == ("", 5)

    asyncio.run(check())


def test_nobody_waits_for_a_stuck_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO that nobody reads: opening it for writing blocks, as a dead network disk does."""
    monkeypatch.setattr(journal, "STUCK_SECONDS", 0.05)
    fifo = tmp_path / "state.json.new"
    os.mkfifo(fifo)

    async def check() -> None:
        written = Written(tmp_path)
        written.journal.forget_later("a#1")
        await written.journal.saved()
        await written.journal.close()
        assert written.forgotten == []
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go on
        async with asyncio.timeout(10):
            while not written.forgotten:
                await asyncio.sleep(0.005)
        os.close(reader)

    asyncio.run(check())
    assert "stuck" in caplog.text


def test_of_each_process_only_the_last_end_is_kept_while_nothing_can_be_written(tmp_path: Path) -> None:
    """A full disk and a crash loop: what the keeper has to remember must not grow with every restart."""

    async def check() -> None:
        async with journaling(tmp_path) as written:
            written.path.mkdir()  # in the way of the rename
            for generation in range(1, 51):
                written.journal.forget_later(f"shop:1#{generation}")
                written.journal.forget_later(f"blog#{generation}")
                await written.journal.saved()
            kept = {f"{name}#{number}" for name in ("shop:1", "blog") for number in range(1, 51)}
            kept -= set(written.forgotten)
            assert kept == {"shop:1#50", "blog#50"}
            written.path.rmdir()
            await written.journal.saved()
            assert set(written.forgotten) >= {"shop:1#50", "blog#50"}

    asyncio.run(check())


def test_writing_takes_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often something changes: a document of a thousand processes is not made all the time."""
    taken = 0.0

    async def check() -> None:
        nonlocal taken
        loop = asyncio.get_running_loop()
        async with journaling(tmp_path) as written:

            def slow() -> dict[str, Any]:
                nonlocal taken
                began = loop.time()
                while loop.time() < began + 0.03:
                    pass
                taken += loop.time() - began
                return {"number": 0}

            monkeypatch.setattr(written.journal, "_document", slow)
            began = loop.time()
            while loop.time() < began + 1:
                written.journal.dirty()
                await asyncio.sleep(0.001)
            assert 0 < taken <= 0.1 * (loop.time() - began) + 0.03 + 0.03
            monkeypatch.setattr(written.journal, "_document", written._document)

    asyncio.run(check())


def test_who_waits_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "REST_SECONDS_MAX", 1000.0)
    monkeypatch.setattr(journal, "SHARE", 1e-9)

    async def check() -> None:
        async with journaling(tmp_path) as written:
            for number in range(3):
                written.number = number
                await asyncio.wait_for(written.journal.saved(), 20)
                assert written.on_disk() == number

    asyncio.run(check())


def test_other_files_are_written_with_it_and_tried_again(tmp_path: Path) -> None:
    """The state file does not wait for them; one that says it already is left alone."""
    other = tmp_path / "other.json"

    async def check() -> None:
        async with journaling(tmp_path) as written:
            other.mkdir()
            written.journal.beside(str(other), lambda: {"of": [1, 2]})
            await written.journal.saved()
            assert "other.json" in written.journal.problem
            assert written.on_disk() == 0
            other.rmdir()
            async with asyncio.timeout(10):
                while written.journal.problem:
                    await written.journal.saved()
            first = other.read_bytes()
            assert json.loads(first)["of"] == [1, 2]
            written.journal.beside(str(other), lambda: None)
            await written.journal.saved()
            assert other.read_bytes() == first
            written.journal.beside(str(other), lambda: {"of": 3})
            await written.journal.saved()
            assert json.loads(other.read_bytes())["of"] == 3

    asyncio.run(check())

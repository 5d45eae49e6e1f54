"""Logs on their way to a client: followed in a thread, since a disk may be slow, in turns when there are several; and
what there is to read of each.

It knows files of logs (`logread`) and how they are told (`rpc`), neither programs nor who asks.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from procman import logread, rpc
from procman.logread import Held, Position, refusal
from procman.reading import Read
from procman.rpc import LogSource, Object

CHUNK = 64 * 1024  # bytes of a log in one notification
MAX_TURN = 1024 * 1024  # bytes that a follower reads before it sends them

T = TypeVar("T")


def refusals(sources: Sequence[LogSource]) -> list[Object]:
    """Logs at whose path something stands that is not read, and why. Reads the disk: for a thread."""
    told = ((source.name, refusal(source.path)) for source in sources)
    return [{"name": name, "text": text} for name, text in told if text]


def files(sources: Sequence[LogSource], held: Held) -> list[Object]:
    """The logs with their files, the oldest first, as `logs.files` answers; `held` has them from now on. Reads the
    disk: for a thread."""
    listed = held.files([source.path for source in sources])
    return [
        {
            "name": source.name,
            "stream": source.stream,
            "path": source.path,
            "files": [
                {
                    "file": one.id,
                    "path": one.path,
                    "bytes": one.size,
                    "modified": one.modified,
                    "zipped": one.zipped,
                    "holds": one.holds,
                }
                for one in found
            ],
        }
        for source, found in zip(sources, listed, strict=True)
    ]


def piece(source: LogSource, file: str, offset: int, size: int, held: Held) -> Object:
    """Bytes of one of these files, as `logs.read` answers. Reads the disk: for a thread."""
    data = held.read(source.path, file, offset, size)
    return {"gone": True} if data is None else {"gone": False, **rpc.log_data(data)}


class LogReader:
    """Reads one log, in a thread, from its last `lines` or from `start` on. Ends no piece within a character."""

    def __init__(
        self,
        source: LogSource,
        lines: int,
        start: Position | None = None,
        begins: Callable[[], Position | None] | None = None,
        after: Sequence[LogReader] = (),
    ) -> None:
        """`begins` tells where to start for who does not call `open`: None while nobody knows. All that came before it
        is then in the files of those `after` which it comes."""
        self.after = after
        self.source = source
        self._begins = begins
        self._lines = lines
        self._start = start
        self._follower: logread.Follower | None = None
        self.is_new = False
        """Nobody was told yet where it starts."""
        self._rest = b""  # the beginning of a character
        self._after = Position()

    def params(self, data: bytes) -> Object:
        """Those of the notification with these bytes, which were read last; with the place after them."""
        self.is_new = False
        at = self._after
        place = {"file": at.file, "offset": at.offset - len(self._rest)}
        return rpc.log_params(self.source.name, self.source.stream, data) | place

    def open(self) -> None:
        """Finds where the last lines begin."""
        start = self._start or logread.last_lines(self.source.path, self._lines)
        self._follower = logread.Follower(self.source.path, start)
        self._after = start

    def opens(self) -> bool:
        """Whether it is known now for the first time where to start."""
        if self._follower is not None or self._begins is None or (start := self._begins()) is None:
            return False
        self._start = start
        self.open()
        self.is_new = True
        return True

    @property
    def waits(self) -> bool:
        """Whether it is still to be known where to start."""
        return self._follower is None and self._begins is not None

    def news(self) -> bytes:
        """The next bytes, b"" when there are no more now."""
        if self._follower is None:
            return b""
        data = self._rest + self._follower.read(CHUNK)
        self._after = self._follower.position
        whole = _whole_characters(data)
        self._rest = data[whole:]
        return data[:whole]

    def last(self) -> bytes:
        """As `news`, but b"" after so many lines: a program that writes faster than we read must not keep us."""
        data = self.news() if self._lines > 0 else b""
        if not data:
            data, self._rest, self._lines = self._rest, b"", 0
            return data
        for match in re.finditer(b"\n", data):
            self._lines -= 1
            if not self._lines:
                self._rest = b""
                return data[: match.end()]
        return data

    def close(self) -> None:
        """Closes the file."""
        if self._follower is not None:
            self._follower.close()


def _whole_characters(data: bytes) -> int:
    """How many of the bytes come before the beginning of a character in UTF-8 whose rest is still to come."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            return len(data) - back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else len(data)
        if byte < 0x80:
            break
    return len(data)


def _read_turn(readers: Sequence[LogReader]) -> tuple[list[tuple[LogReader, bytes]], Sequence[LogReader]]:
    """What the readers read, as far as it fits into one turn, and who did not get one."""
    found: list[tuple[LogReader, bytes]] = []
    room = MAX_TURN
    for index, reader in enumerate(readers, 1):
        for each in reader.after if reader.opens() else ():
            while data := each.news():
                found.append((each, data))
        found.append((reader, reader.news()))
        room -= len(found[-1][1])
        if room <= 0:
            return found, readers[index:]
    return found, ()


class ReadingThread:
    """Lets readers work in a thread, one at a time, since a disk may be slow; knows which logs have grown meanwhile."""

    def __init__(self, readers: Sequence[LogReader], read: Read) -> None:
        self._readers = list(readers)
        self._read = read
        self._woken = False
        self._grown = dict.fromkeys(readers)  # a set that keeps its order
        self._arrived = asyncio.Event()
        self._work: asyncio.Task[Any] | None = None

    def grown(self, reader: LogReader) -> None:
        """There is something to read."""
        self._grown[reader] = None
        self._arrived.set()

    def add(self, reader: LogReader) -> None:
        """One more log."""
        self._readers.append(reader)
        self.grown(reader)

    def wake(self) -> None:
        """Whoever waits for `news` is to look up, though there may be none."""
        self._woken = True
        self._arrived.set()

    async def run(self, work: Callable[[], T]) -> T:
        """Calls `work` in the thread."""
        task = asyncio.get_running_loop().create_task(self._read(work))
        self._work = task
        return await asyncio.shield(task)

    async def news(self) -> list[tuple[LogReader, bytes]]:
        """What has come, b"" where nothing has and only the place is new; waits for it, or for `wake`. Little more than
        MAX_TURN bytes at once."""
        while not self._grown and not self._woken:
            self._arrived.clear()
            await self._arrived.wait()
        self._woken = False
        readers = list(self._grown)
        self._grown.clear()
        found, others = await self.run(functools.partial(_read_turn, readers))
        for reader in [*(reader for reader, data in found if data), *others]:
            self._grown[reader] = None
        return [(reader, data) for reader, data in found if data or reader.is_new]

    def close(self) -> None:
        """Closes the files: at once, or when the disk has answered."""
        if self._work is None or self._work.done():
            self._close_files()
        else:
            self._work.add_done_callback(self._close_files)

    def _close_files(self, _work: object = None) -> None:
        for reader in self._readers:
            reader.close()


def starts(positions: Sequence[Object]) -> Mapping[tuple[str, str], Position]:
    """Where to begin, by process and stream, from what a client was told before."""
    return {
        (str(one["name"]), str(one["stream"])): Position.of(one["file"], one["offset"]) for one in positions
    }

"""One log as one text, from its oldest file to the newest, compressed or not: read forward from any place; and the
places at which its last lines, its last records, or a time begin.

Nothing here holds more than a few pieces of a file at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .library import NOWHERE, PIECE, File, Library, Source

if TYPE_CHECKING:  # imported where they are needed: the last lines of one log need no records
    from procman.logformat import Clock
    from procman.logrecords import Filter, Record, Records
    from procman.unzip import Unzipped

BLOCK = 64 * 1024
"""Bytes that are read first when the end of a log is looked for; then more at once."""

BEGIN = 4096
"""Bytes that are looked at first for the beginning of a record."""

SPAN_MAX = 8 * 1024 * 1024
"""Bytes that are searched for records before those in front of them."""


class Place(NamedTuple):
    """An offset in what the file of this index holds."""

    file: int = 0
    offset: int = 0


class LogText:
    """The text of `source` as it was when its files were listed."""

    def __init__(self, library: Library, source: Source, now: float) -> None:
        self.source = source
        self.reached = Place()
        """After the last byte that `forward` has given."""
        self._library = library
        self._now = now
        self._files = list(source.files)
        self._unzipped: dict[int, Unzipped] = {}

    # --- bytes ------------------------------------------------------------------------------------------------------

    def forward(self, start: Place, stop: Place | None = None, piece: int = PIECE) -> Iterator[bytes]:
        """All bytes from `start` on, up to `stop`, or to the end that the log had when it was listed."""
        self.reached = start
        for index in range(start.file, len(self._files)):
            offset = start.offset if index == start.file else 0
            self.reached = Place(index, offset)
            while True:
                end = self._end(index)
                if stop is not None and stop.file == index:
                    end = stop.offset if end is None else min(end, stop.offset)
                data = self._pread(index, piece if end is None else min(piece, end - offset), offset)
                if not data:
                    break
                offset += len(data)
                self.reached = Place(index, offset)
                yield data
            if stop is not None and stop.file == index:
                return

    def position(self) -> tuple[str, int]:
        """`reached` for `Library.follow`."""
        if not self._files:
            return NOWHERE, 0
        return self._files[self.reached.file].id, self.reached.offset

    def modified(self, index: int) -> float:
        """When a file was last written, in seconds since the epoch."""
        return self._files[index].modified if self._files else 0.0

    def end(self) -> Place:
        """After its last byte."""
        last = len(self._files) - 1
        return Place(last, self._size(last)) if last >= 0 else Place()

    def _pread(self, index: int, size: int, offset: int) -> bytes:
        """Bytes of what a file holds; b"" at its end."""
        if size <= 0:
            return b""
        if not self._files[index].zipped:
            data = self._library.read(self.source, self._files[index], size, offset)
            if data is not None:
                return data
            if not self._found_again(index):
                return b""
        unzipped = self._unzipped.get(index)
        if unzipped is None:
            from procman.unzip import Unzipped

            self._unzipped.clear()  # one at a time: each has copies of its state
            unzipped = self._unzipped[index] = Unzipped(lambda size, offset: self._raw(index, size, offset))
        data = unzipped.pread(size, offset)
        if not data and unzipped.damaged:
            print(f"procmanctl: {self._files[index].path} is damaged: its end can't be read", file=sys.stderr)
            unzipped.damaged = False
        return data

    def _raw(self, index: int, size: int, offset: int) -> bytes:
        return self._library.read(self.source, self._files[index], size, offset) or b""

    def _found_again(self, index: int) -> bool:
        """Whether a file that has gone was compressed meanwhile: then that one takes its place."""
        gone = self._files[index]
        now = self._library.sources([self.source.name], stderr=self.source.stream == "err")
        files = next((one.files for one in now if one.key == self.source.key), ())
        known = {file.id for file in self._files}
        fresh = [file for file in files if file.zipped and file.id not in known]
        same = next((file for file in fresh if file.modified == gone.modified), None)
        if same is None:
            print(f"procmanctl: {gone.path} was removed while it was read", file=sys.stderr)
            self._files[index] = gone._replace(size=0)
            return False
        self._files[index] = same
        return True

    def _end(self, index: int) -> int | None:
        """The end of a file; None where only reading shows it."""
        return None if self._files[index].zipped else self._files[index].size

    def _size(self, index: int) -> int:
        file: File = self._files[index]
        if not file.zipped:
            return file.size
        self._pread(index, 1, 0)  # opens it
        return self._unzipped[index].size

    # --- places -----------------------------------------------------------------------------------------------------

    def last_lines(self, lines: int) -> Place:
        """Where the last `lines` lines begin. An unfinished one at the end counts."""
        if lines <= 0:
            return self.end()
        newlines, last, block = lines, True, BLOCK
        for index in reversed(range(len(self._files))):
            end = self._size(index)
            while end > 0:
                start = max(0, end - block)
                data = self._pread(index, end - start, start)
                if not data:  # it has shrunk, or gone
                    end = start
                    continue
                at = len(data) - 1 if last and data.endswith(b"\n") else len(data)
                last = False
                count = data.count(b"\n", 0, at)
                if count < newlines:
                    newlines -= count
                else:
                    for _ in range(newlines):
                        at = data.rindex(b"\n", 0, at)
                    return Place(index, start + at + 1)
                end, block = start, PIECE
        return Place()

    def since(self, since: float) -> Place:
        """Where to begin so that no line from `since` on is missed: little of what is older is read."""
        from procman import logrecords

        for index, file in enumerate(self._files):
            if file.modified < since - logrecords.DISORDER:
                continue
            if file.zipped:
                return Place(index)
            search = logrecords.seek(file.size, since)
            try:
                probe = next(search)
                while True:
                    window = self._pread(index, logrecords.PROBE, probe)
                    probe = search.send(logrecords.first_time(window, self._clock(), whole=probe == 0))
            except StopIteration as found:
                return Place(index, found.value)
        return self.end()

    def last_records(self, count: int, wanted: Filter, first: Place) -> tuple[Place, int]:
        """Where to begin so that the last `count` records which are wanted come, none from before `first`; and how many
        that are wanted come before them. What begins there is a record, but for `first` itself."""
        from procman import logrecords

        sieve = logrecords.sieve(wanted.grep)
        found, stop, span = 0, self.end(), BLOCK
        oldest = stop  # where something that is wanted was found
        while found < count and stop > first:
            start = max(self._plus(stop, -span), first)
            maker = self.maker(start)
            records = self.records(maker, start, stop, sieve=sieve)
            counts = [wanted.wants(record) and not record.part for record in records]
            begin = self._plus(start, maker.skipped)
            if begin < stop:
                found += sum(counts)
                oldest = begin if any(counts) else oldest
                stop, span = begin, min(span * 4, SPAN_MAX)
            elif start == first:
                break
            else:
                span *= 4  # all of it lies within one record, or one line
        return oldest, max(0, found - count)

    def _plus(self, place: Place, size: int) -> Place:
        """So many bytes further on, or back, within the text."""
        index, offset = place
        offset += size
        while offset < 0 and index > 0:
            index -= 1
            offset += self._size(index)
        while index < len(self._files) - 1 and offset >= self._size(index):
            offset -= self._size(index)
            index += 1
        return Place(index, max(0, offset))

    def records(
        self,
        maker: Records,
        start: Place,
        stop: Place | None = None,
        *,
        piece: int = PIECE,
        sieve: Callable[[bytes], object] | None = None,
        goes_on: bool = False,
    ) -> Iterator[Record]:
        """The records from `start` on, before `stop`; with a `sieve` not all in whose neighbourhood it finds nothing.
        With `goes_on` an unfinished last line stays in the `maker`."""
        from procman.logrecords import timed

        pieces = self.forward(start, stop, piece)
        return timed(_made(maker, pieces, sieve, goes_on=goes_on))

    def maker(self, start: Place, *, exact: bool = False) -> Records:
        """What makes records of the bytes from `start` on; `exact`: a record begins there."""
        from procman.logrecords import Records

        if exact or start == Place():
            return Records(self._clock())
        return Records(self._clock(), "within" if start.offset else "line")

    def _clock(self) -> Clock:
        from procman.logformat import Clock

        return Clock(self._now)


def _made(
    maker: Records, pieces: Iterator[bytes], sieve: Callable[[bytes], object] | None, *, goes_on: bool
) -> Iterator[Record]:
    if sieve is not None:
        yield from _sifted(maker, pieces, sieve)
    else:
        for data in pieces:
            yield from maker.feed(data)
    yield from maker.flush() if goes_on else maker.end()


def _counted(records: Iterable[Record]) -> Generator[Record, None, int]:
    count = 0
    for record in records:
        yield record
        count += 1
    return count


def _sifted(maker: Records, pieces: Iterator[bytes], sieve: Callable[[bytes], object]) -> Iterator[Record]:
    """The records of pieces of a log in which the sieve finds something, with the piece before each: a record may begin
    there, and what comes after, until another record has begun. All of them until the first record has begun."""
    held = rest = b""  # whole lines that are not fed yet, and the beginning of a line
    goes_on = False  # what was found may not be whole
    for data in pieces:
        lines, newline, rest = (rest + data).rpartition(b"\n")
        lines += newline
        if len(rest) > PIECE:  # a line without end
            yield from maker.feed(held + lines + rest)
            held = rest = b""
            continue
        while lines and not maker.begun:
            cut = lines.find(b"\n", BEGIN) + 1 or len(lines)
            yield from maker.feed(lines[:cut])
            lines = lines[cut:]
        hit = bool(sieve(lines))
        if hit or goes_on:
            begun = yield from _counted(maker.feed(held + lines))
            held, goes_on = b"", hit or not begun
        elif lines:
            if held:
                yield from maker.gap()
            held = lines
    if rest and (goes_on or sieve(rest)):
        yield from maker.feed(held + rest)
    else:
        if held:
            yield from maker.gap()
        yield from maker.feed(rest)

"""One log as one text, from its oldest file to the newest, compressed or not: read forward from any place; and the
places at which its last lines, its last records, or a time begin.

Nothing here holds more than a few pieces of a file at once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from procman import rpc

from .library import NOWHERE, PIECE, File, Library, Source

if TYPE_CHECKING:  # imported where they are needed: the last lines of one log need no records
    from datetime import tzinfo

    from procman.logformat import Clock
    from procman.logrecords import Filter, Record, Records
    from procman.logzones import Sample
    from procman.unzip import Unzipped

BLOCK = 64 * 1024
"""Bytes that are read first when the end of a log is looked for; then more at once."""

BEGIN = 4096
"""Bytes that are looked at first for the beginning of a record."""

HELD = 64 * 1024
"""Bytes before a match in which its record is surely found to begin."""

SPAN_MAX = 8 * 1024 * 1024
"""Bytes that are searched for records before those in front of them."""


class Place(NamedTuple):
    """An offset in what the file of this index holds."""

    file: int = 0
    offset: int = 0


def compressed(
    before: Sequence[File], index: int, after: Sequence[File], begins: Callable[[File], bool]
) -> File | None:
    """Which file of `after`, a later list of the same log, holds what was in `before[index]`; None where it is there as
    it was, or was removed. `begins` tells whether a compressed file begins as that one did. Pure.

    A rotated file keeps its time and size. Where several have the same, those that are gone were compressed in their
    order, and the oldest were removed. The newest one may have grown before it was rotated: it is behind those that
    were older.
    """
    known, there = {file.id for file in before}, {file.id for file in after}
    if before[index].id in there:
        return None
    fresh = [file for file in after if file.zipped and file.id not in known]
    alike = [file for file in fresh if _content(file) == _content(before[index])]
    newer = [file for file in before[index + 1 :] if file.id not in there and _content(file) == _content(before[index])]
    theirs = max(0, len(alike) - len(newer))
    likely = [*reversed(alike[:theirs]), *alike[theirs:]]
    if index == len(before) - 1:
        older, contents = {file.id for file in before[:index]}, set(map(_content, before[:index]))
        behind = max((place for place, file in enumerate(after) if file.id in older), default=-1)
        later = [file for file in after[behind + 1 :] if file in fresh]
        likely += sorted(later, key=lambda file: _content(file) in contents)
    return next(filter(begins, likely), None)


def _content(file: File) -> tuple[float, int]:
    return file.modified, file.holds & 0xFFFFFFFF


def _same(one: File, other: File) -> bool:
    return rpc.file_of(one.id) == rpc.file_of(other.id)


class _Gone(Exception):
    """A file was removed while it was read."""


class LogText:
    """The text of `source` as it was when its files were listed. `lost` are files of it that were removed before they
    had been read, by index, with the number of bytes that are missing."""

    def __init__(self, library: Library, source: Source, now: float) -> None:
        self.source = source
        self.reached = Place()
        """After the last byte that `forward` has given."""
        self._library = library
        self._now = now
        self._files = list(source.files)
        self._sizes = {index: file.size for index, file in enumerate(self._files) if not file.zipped}  # known ones
        self._unzipped: tuple[int, Unzipped] | None = None  # one at a time: it has copies of its state
        self._goes_back = True
        self._said: set[str] = set()  # paths of damaged files
        self._latest: tuple[File, ...] = ()
        self.lost: dict[int, int] = {}

    # --- bytes ------------------------------------------------------------------------------------------------------

    def forward(self, start: Place, stop: Place | None = None, piece: int = PIECE) -> Iterator[bytes]:
        """All bytes from `start` on, up to `stop`, or to the end that the log had when it was listed. Who gives no
        `stop` won't go back: so many logs can be read at once in little memory."""
        self.reached, self._goes_back = start, stop is not None
        index, offset = start
        while index < len(self._files):  # a line that was not at its end may have moved to a file behind these
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
            self._unzipped = None
            index, offset = index + 1, 0

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
        if size <= 0 or offset >= self._sizes.get(index, offset + 1):
            return b""
        try:
            data = self._read_plain(index, size, offset)
            if data is None:
                unzipped = self._opened(index)
                data = unzipped.pread(size, offset)
                self._tell_damage(index, unzipped)
        except _Gone:
            self._lose(index)
            return b""
        if not data and index in self._sizes:
            self._cut_off(index, offset)
        return data

    def _read_plain(self, index: int, size: int, offset: int) -> bytes | None:
        """None where the file is compressed, by now. Raises _Gone."""
        if self._files[index].zipped:
            return None
        data = self._library.read(self.source, self._files[index], size, offset)
        if data is None:
            self._find_again(index)
        return data

    def _opened(self, index: int) -> Unzipped:
        if self._unzipped is None or self._unzipped[0] != index:
            self._unzipped = index, self._unzip(self._files[index])
        if not self._goes_back:
            self._unzipped[1].forget()
        return self._unzipped[1]

    def _unzip(self, file: File) -> Unzipped:
        from procman.unzip import Unzipped

        def raw(size: int, offset: int) -> bytes:
            data = self._library.read(self.source, file, size, offset)
            if data is None:
                raise _Gone
            return data

        return Unzipped(raw)

    def _tell_damage(self, index: int, unzipped: Unzipped) -> None:
        path = self._files[index].path
        if unzipped.damaged and path not in self._said:
            self._said.add(path)
            words = "is damaged: its end can't be read, and what comes just before may be wrong"
            print(f"procmanctl: {path} {words}", file=sys.stderr)

    def tell_losses(self) -> None:
        """Says on stderr what is missing."""
        if self.lost:
            from .tables import printable, size

            files = f"{len(self.lost)} file{'s' if len(self.lost) > 1 else ''}"
            print(
                f"procmanctl: {printable(self.source.name)}: {size(sum(self.lost.values()))} of its log, in {files},"
                " were removed before they could be read (by keep, keep_total or log_min_free)",
                file=sys.stderr,
            )

    # --- what happens meanwhile -------------------------------------------------------------------------------------

    def _find_again(self, index: int) -> None:
        """Puts what a file was compressed to in its place. Raises _Gone."""
        head = rpc.head_of(self._files[index].id)

        def begins(file: File) -> bool:
            with contextlib.suppress(_Gone):
                return head[0] > 0 and rpc.mark(self._unzip(file).pread(head[0], 0)) == head
            return False

        for fresh in (False, True):  # a list serves for many files
            if fresh:
                self._latest = self._library.files(self.source)
            found = compressed(self._files, index, self._latest, begins)
            if found is not None:
                self._files[index] = found
                return
        raise _Gone

    def _lose(self, index: int) -> None:
        """A file is gone: it ends where it was read to."""
        file, done = self._files[index], self.reached.offset if self.reached.file == index else 0
        size = self._sizes.get(index, file.holds or file.size)
        self._sizes[index] = min(size, done)
        self.lost[index] = self.lost.get(index, 0) + max(0, size - done)

    def _cut_off(self, index: int, offset: int) -> None:
        """A file ends before the end that it had. If it is the newest, a rotation took the unfinished line at its end
        away, to the file behind it: there this text ends then. Else it is lost."""
        missing = self._sizes[index] - offset
        self._sizes[index] = offset
        if index == len(self._files) - 1:
            latest = self._library.files(self.source)
            place = next((place for place, one in enumerate(latest) if _same(one, self._files[index])), len(latest))
            if place + 1 < len(latest):
                self._sizes[len(self._files)] = missing
                self._files.append(latest[place + 1])
                return
        self.lost[index] = missing

    def _end(self, index: int) -> int | None:
        """The end of a file; None where only reading shows it."""
        return self._sizes.get(index)

    def _size(self, index: int) -> int:
        if index not in self._sizes:
            try:
                unzipped = self._opened(index)
                self._sizes[index] = unzipped.size
                self._tell_damage(index, unzipped)
            except _Gone:
                self._lose(index)
        return self._sizes[index]

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
                if len(data) < end - start and not self._pread(index, 1, start + len(data)):
                    return self.last_lines(lines)  # it has become shorter, or has gone
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
            if file.modified >= since - logrecords.DISORDER:
                return Place(index, self._search(index, since, unknown=math.inf))
        return self.end()

    def until(self, until: float) -> Place:
        """Where to stop so that no line up to `until` is missed: little of what is later is read."""
        from procman import logrecords

        for index, file in enumerate(self._files):
            if file.modified > until + logrecords.DISORDER:
                # From the place that is found to the first line that is surely later it is no more than this.
                stop = self._search(index, until + 2 * logrecords.DISORDER, unknown=-math.inf) + 2 * logrecords.PROBE
                if stop < self._size(index):
                    return Place(index, stop)
        return self.end()

    def _search(self, index: int, since: float, unknown: float) -> int:
        """See `logrecords.seek`, in one file. `unknown` is taken for the time of a place where no line tells one."""
        from procman import logrecords

        search = logrecords.seek(self._size(index), since)
        try:
            probe = next(search)
            while True:
                window = self._pread(index, logrecords.PROBE, probe)
                at = logrecords.first_time(window, self._clock(), whole=probe == 0)
                probe = search.send(unknown if at is None else at)
        except StopIteration as found:
            return int(found.value)

    def last_records(self, count: int, wanted: Filter, first: Place) -> tuple[Place, int]:
        """Where to begin so that the last `count` records which are wanted come, none from before `first`; and how many
        that are wanted come before them. What begins there is a record, but for `first` itself."""
        from procman import logrecords

        sieve = logrecords.sieve(wanted.grep)
        found, stop, span = 0, self.end() if wanted.until is None else self.until(wanted.until), BLOCK
        oldest = stop  # where something that is wanted was found
        while found < count and stop > first:
            start = max(self.plus(stop, -span), first)
            maker = self.maker(start, sure=True)
            records = self.records(maker, start, stop, sieve=sieve)
            whole = logrecords.Whole(wanted)
            chosen = sum(not each.part for record in records for each in whole.let(record))
            begin = self.plus(start, maker.skipped)
            if begin < stop:
                found += chosen
                oldest = begin if chosen else oldest
                stop, span = begin, min(span * 4, SPAN_MAX)
            elif start == first:
                break
            else:
                span *= 4  # all of it lies within one record, or one line
        return oldest, max(0, found - count)

    def plus(self, place: Place, size: int) -> Place:
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

    def maker(self, start: Place, *, exact: bool = False, sure: bool = False) -> Records:
        """What makes records of the bytes from `start` on; `exact`: a record begins there. `sure`: as `Records` has it.
        """
        from procman.logrecords import Records

        if exact or start == Place():
            return Records(self._clock())
        return Records(self._clock(), "within" if start.offset else "line", sure=sure)

    @functools.cached_property
    def zone(self) -> tzinfo | None:
        """The zone of its times that name none; None: that of this machine."""
        from procman import logzones
        from procman.logformat import Clock

        return logzones.zone(self._samples(), Clock(self._now))

    def _samples(self) -> Iterator[Sample]:
        """Of its newest files: their ends, of compressed ones the beginnings."""
        from procman.logzones import SAMPLES, Sample

        for index, sizes in zip(reversed(range(len(self._files))), SAMPLES, strict=False):
            file = self._files[index]
            for size in sizes:
                offset = 0 if file.zipped else max(0, file.size - size)
                data = self._pread(index, size, offset)
                before = self._files[index - 1].modified if index else None
                ends = not file.zipped and offset + len(data) == file.size
                yield Sample(data, before, file.modified, not offset, ends)

    def _clock(self) -> Clock:
        from procman.logformat import Clock

        return Clock(self._now, self.zone)


def _made(
    maker: Records, pieces: Iterator[bytes], sieve: Callable[[bytes], object] | None, *, goes_on: bool
) -> Iterator[Record]:
    if sieve is not None:
        yield from _sifted(maker, pieces, sieve, goes_on=goes_on)
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


def _sifted(
    maker: Records, pieces: Iterator[bytes], sieve: Callable[[bytes], object], *, goes_on: bool
) -> Iterator[Record]:
    """The records of pieces of a log in which the sieve finds something; with HELD bytes or more before each: a record
    may begin there; and with what comes after, until another record has begun. All of them until the first record has
    begun. With `goes_on` the last HELD bytes, too: it may be found in what comes then."""
    held: deque[bytes] = deque()  # whole lines that are not fed yet
    rest = b""  # the beginning of a line
    open_end = False  # what was found may not be whole
    for data in pieces:
        lines, newline, rest = (rest + data).rpartition(b"\n")
        lines += newline
        if len(rest) > PIECE:  # a line without end
            yield from maker.feed(b"".join(held) + lines + rest)
            held.clear()
            rest = b""
            continue
        while lines and not maker.begun:
            cut = lines.find(b"\n", BEGIN) + 1 or len(lines)
            yield from maker.feed(lines[:cut])
            lines = lines[cut:]
        hit = bool(sieve(lines))
        if hit or open_end:
            begun = yield from _counted(maker.feed(b"".join(held) + lines))
            held.clear()
            open_end = hit or not begun
        elif lines:
            held.append(lines)
            while sum(map(len, held)) - len(held[0]) >= HELD:
                yield from maker.gap()
                held.popleft()
    if goes_on or (rest and (open_end or sieve(rest))):
        yield from maker.feed(b"".join(held) + rest)
    else:
        if held:
            yield from maker.gap()
        yield from maker.feed(rest)

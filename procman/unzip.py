"""Any place of a gzip file (RFC 1952) by its offset in what was compressed.

A decompressor can be copied, so it leaves copies on its way: to get back to a place, one goes on from the copy before
it, not from the beginning. Who won't go back says so (`forget`). Pure: the bytes of the file come from a function.
Memory is bounded, whatever the size.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable

from procman.records import dataclass

PIECE = 64 * 1024
SPACING = 1024 * 1024
COPIES_MAX = 64
"""Each has some 40 KB. When there are more, every other one goes."""

GZIP = 16 + zlib.MAX_WBITS
MAGIC = b"\x1f\x8b"
"""With these a member begins. What follows a whole member and begins otherwise is ignored, as gzip(1) does."""


@dataclass(slots=True)
class _State:
    """A decompressor that has given `out` bytes, has taken `taken` of the file, and holds `pending` of these."""

    engine: zlib._Decompress
    out: int = 0
    taken: int = 0
    pending: bytes = b""

    def copy(self) -> _State:
        return _State(self.engine.copy(), self.out, self.taken, self.pending)


class Unzipped:
    """What a gzip file holds. `read(size, offset)` gives bytes of the file itself, b"" at its end.

    `damaged` is set when the file is no gzip from some place on, is cut off, or does not hold what was compressed
    (CRC-32): what comes before that place can be read, though its last bytes may be wrong.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._state = _State(zlib.decompressobj(GZIP))
        self._copies: list[_State] = []
        self._spacing = SPACING
        self._size: int | None = None
        self.damaged = False

    @property
    def size(self) -> int:
        """Bytes that it holds. The first time all of it is decompressed."""
        while self._size is None:
            self._step(PIECE * 4)
        return self._size

    def forget(self) -> None:
        """It is read forward from now on: what serves to go back is let go, and no more of it is kept."""
        self._copies, self._spacing = [], sys.maxsize

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the end."""
        if self._size is not None and offset >= self._size:
            return b""
        if offset < self._state.out or offset > self._state.out + self._spacing:
            best = next((copy for copy in reversed(self._copies) if copy.out <= offset), None)
            if offset < self._state.out or (best is not None and best.out > self._state.out):
                self._state = best.copy() if best is not None else _State(zlib.decompressobj(GZIP))
        found: list[bytes] = []
        while size > 0 and not self._at_end():
            skip = offset - self._state.out
            data = self._step(min(skip, PIECE * 4) if skip > 0 else size)
            if skip <= 0:
                found.append(data)
                size -= len(data)
                offset += len(data)
        return b"".join(found)

    def _at_end(self) -> bool:
        return self._size is not None and self._state.out >= self._size

    def _step(self, limit: int) -> bytes:
        """Up to `limit` more bytes; notes the size when there are none."""
        state = self._state
        if not state.pending:
            state.pending = self._read(PIECE, state.taken)
            state.taken += len(state.pending)
        if not state.pending:
            self._end(damaged=not state.engine.eof)
            return b""
        data = _decompressed(state, limit)
        if data is None:
            self._end(damaged=True)
            return b""
        state.out += len(data)
        state.pending = state.engine.unconsumed_tail
        if state.engine.eof:  # another member may follow
            rest = state.engine.unused_data or self._more(state)
            if len(rest) == 1:
                rest += self._more(state)
            if not rest.startswith(MAGIC):
                self._end(damaged=False)
            else:
                state.engine, state.pending = zlib.decompressobj(GZIP), rest
        last = self._copies[-1].out if self._copies else 0
        if self._size is None and state.out >= last + self._spacing:
            self._copies.append(state.copy())
            if len(self._copies) > COPIES_MAX:
                self._copies = self._copies[1::2]
                self._spacing *= 2
        return data

    def _more(self, state: _State) -> bytes:
        data = self._read(PIECE, state.taken)
        state.taken += len(data)
        return data

    def _end(self, *, damaged: bool) -> None:
        self._size = self._state.out
        self.damaged = self.damaged or damaged


def _decompressed(state: _State, limit: int) -> bytes | None:
    """Up to `limit` more bytes; None when it is damaged here. zlib throws away what it has made when it finds a damage:
    so less and less is asked for, until all that comes before is read."""
    while limit:
        before = state.engine.copy()
        try:
            return state.engine.decompress(state.pending, limit)
        except zlib.error:
            state.engine = before
            limit //= 2
    return None

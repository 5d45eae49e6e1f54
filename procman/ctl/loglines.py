"""Lines of logs as people and programs get them: with the name before each where there are several, as JSON, and on a
terminal without what could harm it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import BinaryIO

from procman import rpc
from procman.terminal import visible

from . import tables
from .library import log_title


class LinePrinter:
    """Prints lines of `sources`, each named by process and stream. Whole lines only come from here, so those of several
    are never mixed. `safe`: as `terminal.visible` has it."""

    def __init__(
        self, out: BinaryIO, sources: Sequence[tuple[str, str]], *, colour: bool, as_json: bool, safe: bool
    ) -> None:
        self._out = out
        self._json = as_json
        self._safe = safe
        self._colour = colour
        self._sources = dict.fromkeys(sources)
        self._labels: dict[tuple[str, str], bytes] = {}
        self._cut: tuple[str, str] | None = None  # whose line is not at its end yet
        self._label()

    def _label(self) -> None:
        if len(self._sources) < 2:
            return
        names = [log_title(key) for key in self._sources]
        widest = max(map(len, names))
        for number, (key, name) in enumerate(zip(self._sources, names, strict=True)):
            text = tables.label(f"{name.ljust(widest)} |", number, colour=self._colour)
            self._labels[key] = f"{text} ".encode()

    def add(self, source: tuple[str, str]) -> None:
        """There may be lines of this one, too, from now on: they all are named then."""
        if source not in self._sources:
            self._sources[source] = None
            self._label()

    @property
    def as_is(self) -> bool:
        """Whether bytes can be printed as they come, without looking for lines."""
        return not (self._json or self._safe or self._labels)

    def copy(self, key: tuple[str, str], data: bytes) -> None:
        """Prints bytes as they are; for `as_is` alone."""
        self._out.write(data)
        if data:
            self._cut = None if data.endswith(b"\n") else key

    def line(self, key: tuple[str, str], line: bytes, at: float | None, level: int) -> None:
        """Prints a line, or a part of one that is very long: then without a newline at its end."""
        if self._json:
            from procman import logformat, moments

            stands = {"time": None if at is None else moments.rfc3339(at), "level": logformat.level_name(level) or None}
            document = {**rpc.log_params(*key, line.removesuffix(b"\n")), **stands}
            self._out.write(json.dumps(document).encode() + b"\n")
            return
        if self._cut is not None and self._cut != key:
            self._out.write(b"\n")
            self._cut = None
        begin = b"" if self._cut == key else self._labels.get(key, b"")
        self._out.write(begin + (visible(line) if self._safe else line))
        self._cut = None if line.endswith(b"\n") else key

    def end(self) -> None:
        """Ends a last line that has no end, where others could follow."""
        if self._cut is not None and self._labels:
            self._out.write(b"\n")
        self._cut = None
        self._out.flush()

    def flush(self) -> None:
        """Shows what was printed."""
        self._out.flush()

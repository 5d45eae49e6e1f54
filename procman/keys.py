"""Reading one table of a program table key by key, so that each mistake is reported with its file, line and key path.

`Section` is what the readers of `[daemon]`, `[listener.*]` and `[program.*]` share: which key is unknown, where a value
stands, what "${...}" in it means, and the default when it is bad or missing. It must not know any key by name.
Pure: the machine is asked through `World`.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Protocol, TypeVar, cast

from procman import values
from procman.config import Account
from procman.errors import Problem
from procman.positions import KeyPath, nearest
from procman.records import dataclass
from procman.values import BadValue, Converter

T = TypeVar("T")


class World(Protocol):
    """What a program table asks the machine; `files.Machine` is the real one."""

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment of the daemon."""

    @property
    def uid(self) -> int:
        """The daemon's effective user id."""

    @property
    def cwd(self) -> str:
        """The folder that a relative path of the table itself starts at."""

    @property
    def python(self) -> str:
        """The interpreter of the daemon."""

    @property
    def wsgi_script(self) -> str:
        """The path of procman/wsgi.py."""

    @property
    def site(self) -> str:
        """The folder that holds waitress."""

    def read(self, path: str) -> bytes:
        """The content of a file. Raises OSError."""

    def glob(self, pattern: str) -> list[str]:
        """The paths that a shell pattern matches, sorted; none is no error."""

    def trusted(self, path: str) -> str:
        """Why this file must not decide what root runs, or "" if it may."""

    def real(self, folder: str) -> str:
        """The path of a folder without symbolic links, as far as it exists."""

    def account(self, name_or_id: str) -> Account | None:
        """The user of this name or number."""

    def group(self, name_or_id: str) -> int | None:
        """The id of the group of this name or number."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One file of the program table: its absolute path, and the line of each key in it."""

    path: str
    lines: Mapping[KeyPath, int]

    @property
    def folder(self) -> str:
        """Where the relative paths in this file start."""
        return posixpath.dirname(self.path)


@dataclass(frozen=True, slots=True)
class Place:
    """One key of one file: what a problem points at."""

    source: Source
    path: KeyPath

    def __truediv__(self, key: str | int) -> Place:
        return Place(self.source, (*self.path, key))

    @property
    def line(self) -> int:
        """The line of the key, or of the nearest thing around it; 0 for the file itself."""
        return nearest(self.source.lines, self.path)

    def problem(self, message: str) -> Problem:
        """The message about this key."""
        return Problem(self.source.path, self.line, dotted(self.path), message)

    def __str__(self) -> str:
        return f"{self.source.path}:{self.line}" if self.line else self.source.path


def dotted(path: KeyPath) -> str:
    """A key path as the user writes it: program.web."odd name".listen[0]."""
    result = ""
    for key in path:
        if isinstance(key, int):
            result += f"[{key}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", key)
            result += ("." if result else "") + (key if bare else json.dumps(key, ensure_ascii=False))
    return result


class Report:
    """Collects the problems of a whole table. The same problem, found for each instance of a program, counts once."""

    def __init__(self) -> None:
        self.problems: set[Problem] = set()

    def add(self, place: Place, message: str) -> None:
        """Notes what is wrong at this place."""
        self.problems.add(place.problem(message))


@dataclass(frozen=True, slots=True)
class Scope:
    """What a value may refer to, and where its mistakes are collected. `names`: procman's own "${...}" there."""

    report: Report
    environ: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)

    def knowing(self, **names: str) -> Scope:
        """The same scope with more names."""
        return replace(self, names={**self.names, **names})

    def expand(self, raw: object, place: Place) -> object:
        """`raw` with the variables in its strings replaced. Raises BadValue."""
        if isinstance(raw, list):
            return [self.expand(item, place) for item in raw]
        if not isinstance(raw, str) or "$" not in raw:
            return raw
        return values.expand(raw, {**self.names, "here": place.source.folder}, self.environ)


@dataclass(frozen=True, slots=True)
class Layer:
    """One TOML table and where it stands."""

    place: Place
    content: Mapping[str, object]


class Section:
    """One table as its reader sees it: the keys of the first layer win over those of the next one, the defaults.

    Each getter returns the converted value. A bad value is reported at its own place and the default is returned, so
    that reading goes on to the next mistake. Making a Section reports the unknown keys of all its layers. `known` are
    its keys, `below` those of the tables in it: they are named when somebody writes them one level too high.
    """

    def __init__(
        self,
        scope: Scope,
        layers: Sequence[Layer],
        known: Sequence[str],
        below: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.scope = scope
        self.layers = tuple(layers)
        self.known = known
        for layer in layers:
            for key in layer.content:
                if key not in known:
                    homes = [f"{table}.{key}" for table, keys in (below or {}).items() if key in keys]
                    hint = f"; did you mean {homes[0]!r}?" if homes else values.suggestion(key, known)
                    scope.report.add(layer.place / key, f"unknown key{hint}")

    @property
    def place(self) -> Place:
        """Where the table itself stands."""
        return self.layers[0].place

    def find(self, key: str) -> Layer | None:
        """The layer that decides this key."""
        assert key in self.known, f"{key} is not declared"
        for layer in self.layers:  # of all that reads a table this is called most
            if key in layer.content:
                return layer
        return None

    def has(self, key: str) -> bool:
        """Whether any layer has the key."""
        return self.find(key) is not None

    def owns(self, key: str) -> bool:
        """Whether the table itself has the key, not only the defaults."""
        return self.find(key) is self.layers[0]

    def at(self, key: str) -> Place:
        """Where the key stands, or else the table."""
        layer = self.find(key)
        return layer.place / key if layer else self.place

    def problem(self, key: str, message: str) -> None:
        """Reports what is wrong with a key, where it stands."""
        self.scope.report.add(self.at(key), message)

    def raw(self, key: str) -> object:
        """What TOML gave, unexpanded; None if there is nothing."""
        layer = self.find(key)
        return layer.content[key] if layer else None

    def value(self, key: str, convert: Converter[T], default: T) -> T:
        """The value of a key, or the default when it is missing or bad."""
        return self._converted(self.raw(key), self.at(key), convert, default) if self.has(key) else default

    def path(self, key: str, default: str, convert: Callable[[object, str], str] = values.path) -> str:
        """A path made absolute by the folder of the file that the key stands in."""
        folder = self.at(key).source.folder
        return self.value(key, lambda raw: convert(raw, folder), default)

    def items(self, key: str, convert: Converter[T], *, one: bool = False) -> list[tuple[Place, T]]:
        """The items of an array, each with its place; a bad one is reported and left out.

        `one`: a single string stands for an array of it.
        """
        raw, place = self.raw(key), self.at(key)
        if not self.has(key):
            return []
        if isinstance(raw, list):
            places, written = [place / index for index in range(len(raw))], raw
        elif one and isinstance(raw, str):
            places, written = [place], [raw]
        else:
            kind = "a string or an array of strings" if one else "an array"
            self.problem(key, f"must be {kind}, not {values.type_name(raw)}")
            return []
        found = [(at, self._converted(item, at, convert, None)) for at, item in zip(places, written, strict=True)]
        return [(at, item) for at, item in found if item is not None]

    def array(self, key: str, convert: Converter[T], *, one: bool = False) -> tuple[T, ...]:
        """The same without places."""
        return tuple(item for _, item in self.items(key, convert, one=one))

    def table(self, key: str, known: Sequence[str], *, merge: bool = True) -> Section:
        """The table of this name. `merge`: the keys of the defaults show through, else the first table counts alone."""
        found = self._tables(key)[: None if merge else 1]
        return Section(self.scope, found or [Layer(self.place / key, {})], known)

    def mapping(
        self, key: str, convert: Converter[T], *, merge: bool = True, naming: Converter[str] = values.text
    ) -> dict[str, T]:
        """A table whose keys are the user's own, in his order. `naming` checks such a key."""
        result: dict[str, T] = {}
        for layer in self._tables(key)[: None if merge else 1]:
            for name, raw in layer.content.items():
                place = layer.place / name
                converted = self._converted(raw, place, convert, None)
                if self._converted(name, place, naming, "", expanded=True) and converted is not None:
                    result.setdefault(name, converted)
        return result

    def _tables(self, key: str) -> list[Layer]:
        assert key in self.known, f"{key} is not declared"
        result: list[Layer] = []
        for layer in self.layers:
            raw = layer.content.get(key, {})
            if not isinstance(raw, dict):
                self.scope.report.add(layer.place / key, f"must be a table, not {values.type_name(raw)}")
            elif key in layer.content:
                result.append(Layer(layer.place / key, cast("dict[str, object]", raw)))
        return result

    def _converted(
        self, raw: object, place: Place, convert: Callable[[object], T], default: T, *, expanded: bool = False
    ) -> T:
        try:
            return convert(raw if expanded else self.scope.expand(raw, place))
        except BadValue as error:
            self.scope.report.add(place, str(error))
            return default

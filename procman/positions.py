"""On which line of a TOML text each key and each array item stands: what `tomllib` does not tell.

Pure. It scans only text that tomllib has accepted, so it checks nothing and takes the shortest way to the end of each
value. It must not know what the keys mean. Grammar: https://toml.io/en/v1.0.0
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Mapping

# A way into the document: table keys, and the index of an item in an array or an array of tables.
KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"""[ \t]*("(?:\\.|[^"\\])*"|'[^']*'|[A-Za-z0-9_-]+)[ \t]*""")
_VALUE = re.compile(
    r'''"""(?:\\.|[^\\])*?""""{0,2}'''  # up to two quotes may stand right before the closing ones
    r"""|'{3}.*?'{3}'{0,2}"""
    r'''|"(?:\\.|[^"\\])*"'''
    r"""|'[^']*'"""
    r"""|[0-9]{4}-[0-9]{2}-[0-9]{2}[ ][0-9]{2}:[^,\]}\s#]*"""  # a date-time may have a space in the middle
    r"""|[^,\]}\s#]+""",
    re.DOTALL,
)


def scan(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of every table, key and array item of a valid TOML document.

    A key stands where its name is written, an array item where it begins, a table where its header is, or else where it
    is first named.
    """
    return _Scanner(text).document()


def nearest(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of `path`, or of the closest thing around it that has one; 0 for the document itself."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[KeyPath, int] = {}
        self.items: dict[KeyPath, int] = {}  # arrays of tables: how many items each has so far

    def document(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)
        return self.lines

    def header(self) -> KeyPath:
        line = self.line()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        path: KeyPath = ()
        parts = self.key()
        self.at += brackets
        for part in parts[:-1]:
            path = self.inside((*path, part), line)
        path += (parts[-1],)
        if brackets == 2:
            self.lines.setdefault(path, line)
            self.items[path] = self.items.get(path, 0) + 1
            path += (self.items[path] - 1,)
        self.lines[path] = line
        return path

    def inside(self, path: KeyPath, line: int) -> KeyPath:
        """`path`, or the last item of the array of tables that it names."""
        self.lines.setdefault(path, line)
        return (*path, self.items[path] - 1) if path in self.items else path

    def pair(self, table: KeyPath) -> None:
        line = self.line()
        for part in self.key():
            table += (part,)
            self.lines.setdefault(table, line)
        self.at += 1  # "="
        self.skip(_BLANK)
        self.value(table)

    def key(self) -> list[str]:
        parts = [self.part()]
        while self.text[self.at] == ".":
            self.at += 1
            parts.append(self.part())
        return parts

    def part(self) -> str:
        written = self.skip(_KEY).strip(" \t")
        # tomllib reads the escapes, so that there is no second opinion about them.
        return next(iter(tomllib.loads(f"{written} = 0"))) if written[0] in "\"'" else written

    def value(self, path: KeyPath) -> None:
        if self.text[self.at] not in "[{":
            self.skip(_VALUE)
            return
        opening = self.text[self.at]
        self.at += 1
        self.skip(_BLANK)
        count = 0
        while self.text[self.at] not in "]}":
            if opening == "{":
                self.pair(path)
            else:
                item = (*path, count)
                self.lines[item] = self.line()
                self.value(item)
                count += 1
            self.skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self.skip(_BLANK)
        self.at += 1

    def skip(self, expression: re.Pattern[str]) -> str:
        match = expression.match(self.text, self.at)
        if match is None:
            raise ValueError(f"no valid TOML at line {self.line()}")
        self.at = match.end()
        return match[0]

    def line(self) -> int:
        return bisect.bisect_left(self.newlines, self.at) + 1

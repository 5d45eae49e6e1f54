"""The line of each key: against tables written by hand, and by two writers that know where they put things."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from procman.positions import KeyPath, nearest, scan

HAND_WRITTEN = '''\
# 1: a comment with [brackets] and "quotes
title = "x"   # 2

include = [   # 4
  "a.toml",   # 5 ]
  # 6
  "b.toml", ["c",
    "d"],     # 8
]
[daemon.sampling] # 10
interval = 1
[daemon]
"socket" = \'\'\'
/run
\'\'\'
[ program . "my shop" ]   # 16
command = """
a \\""" [x]
y = 1 """""
environment = { A = "1", "B.C" = "}", D.E = [1, 2] }
log.max_size = 1
log.keep = 2
when = 1979-05-27 07:32:00 # 23
after = 1979-05-27T07:32:00Z
"\\u0041\\"b" = 25
'q.\\' = 26
[[item]]
x = 1
[item.sub]
y = 2
[[item]]
[[item.sub]]
z = { }
'''

LINES: dict[KeyPath, int] = {
    ("title",): 2,
    ("include",): 4,
    ("include", 0): 5,
    ("include", 1): 7,
    ("include", 2): 7,
    ("include", 2, 0): 7,
    ("include", 2, 1): 8,
    ("daemon",): 12,  # its own header, though it was named before
    ("daemon", "sampling"): 10,
    ("daemon", "sampling", "interval"): 11,
    ("daemon", "socket"): 13,
    ("program",): 16,
    ("program", "my shop"): 16,
    ("program", "my shop", "command"): 17,
    ("program", "my shop", "environment"): 20,
    ("program", "my shop", "environment", "A"): 20,
    ("program", "my shop", "environment", "B.C"): 20,
    ("program", "my shop", "environment", "D"): 20,
    ("program", "my shop", "environment", "D", "E"): 20,
    ("program", "my shop", "environment", "D", "E", 0): 20,
    ("program", "my shop", "environment", "D", "E", 1): 20,
    ("program", "my shop", "log"): 21,
    ("program", "my shop", "log", "max_size"): 21,
    ("program", "my shop", "log", "keep"): 22,
    ("program", "my shop", "when"): 23,
    ("program", "my shop", "after"): 24,
    ("program", "my shop", 'A"b'): 25,
    ("program", "my shop", "q.\\"): 26,
    ("item",): 27,
    ("item", 0): 27,
    ("item", 0, "x"): 28,
    ("item", 0, "sub"): 29,
    ("item", 0, "sub", "y"): 30,
    ("item", 1): 31,
    ("item", 1, "sub"): 32,
    ("item", 1, "sub", 0): 32,
    ("item", 1, "sub", 0, "z"): 33,
}

KEYS = st.one_of(st.sampled_from(["a", "b", "a-b", "1", "log", "a.b", ""]), st.text(max_size=4))
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["'''", '"""', "]", "}", "# x", "a\nb", "\\", '"', "\r\n", "x = 1", "[t]"])
)
SCALARS = st.one_of(WORDS, st.integers(-9, 9), st.booleans(), st.floats(allow_nan=False), st.datetimes(), st.dates())
TREES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(KEYS, TREES, max_size=4)


def paths(tree: Any, path: KeyPath = ()) -> set[KeyPath]:
    """Every table, key and item of a document."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return {path}.union(*(paths(value, (*path, key)) for key, value in entries))


def test_every_line_of_a_table_written_by_hand() -> None:
    assert paths(tomllib.loads(HAND_WRITTEN)) - {()} == set(LINES)
    assert scan(HAND_WRITTEN) == LINES


def test_the_nearest_line_when_there_is_none() -> None:
    assert nearest(LINES, ("program", "my shop", "log", "nope", 3)) == 21
    assert nearest(LINES, ("nothing",)) == 0


def test_windows_line_ends_count_once() -> None:
    assert scan(HAND_WRITTEN.replace("\n", "\r\n")) == LINES


@pytest.mark.parametrize("text", ["", "\n", "# x", "a=1", "a=1#", "[a]", "a=[]", "a={}", 'a=""""""', "a=[[],[[]]]"])
def test_the_end_of_the_document_may_come_anywhere(text: str) -> None:
    assert set(scan(text)) == paths(tomllib.loads(text)) - {()}


@settings(deadline=None)  # a busy machine is no failure
@given(DOCUMENTS, st.booleans())
def test_nothing_is_missing_and_nothing_is_made_up(document: dict[str, Any], multiline: bool) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    lines = scan(text)
    assert set(lines) == paths(tomllib.loads(text)) - {()}
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


@settings(deadline=None)  # a busy machine is no failure
@given(DOCUMENTS)
def test_a_key_is_on_the_line_where_its_value_is_written(document: dict[str, Any]) -> None:
    """tomli_w puts each key, and each item of a long array, on a line of its own; the numbers tell them apart."""
    count = 1000

    def numbered(tree: Any) -> Any:
        nonlocal count
        if isinstance(tree, dict):
            return {key: numbered(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [numbered(value) for value in tree]
        count += 1
        return count

    text = tomli_w.dumps(numbered(document))
    written = text.split("\n")

    def check(tree: Any, path: KeyPath) -> None:
        if isinstance(tree, int):
            assert str(tree) in written[lines[path] - 1]
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []:
            check(value, (*path, key))

    lines = scan(text)
    check(tomllib.loads(text), ())


def escaped(text: str) -> str:
    """The inside of a basic string."""
    doubled = text.replace("\\", "\\\\").replace('"', '\\"')
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in doubled)


class Writer:
    """Writes a document in a style that hypothesis draws, and notes on which line each key goes."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw = draw
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def put(self, text: str) -> None:
        self.text += text

    def note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def any_of(self, *styles: str) -> str:
        return self.draw.draw(st.sampled_from(styles))

    def key(self, key: str) -> str:
        bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
        return self.any_of(key, f'"{escaped(key)}"') if bare else f'"{escaped(key)}"'

    def pair(self, path: KeyPath, value: Any) -> None:
        parts = [self.key(str(path[-1]))]
        self.note(path)
        while isinstance(value, dict) and len(value) == 1 and self.draw.draw(st.booleans()):
            [(key, value)] = value.items()
            path = (*path, key)
            self.note(path)
            parts.append(self.key(key))
        self.put(self.any_of(".", " . ").join(parts) + self.any_of("=", " = "))
        self.value(path, value)

    def value(self, path: KeyPath, value: Any) -> None:
        if isinstance(value, list):
            gap = ("", " ", "\n", " # ] , \n\n  ")
            self.put("[" + self.any_of(*gap))
            for index, item in enumerate(value):
                self.note((*path, index))
                self.value((*path, index), item)
                self.put(self.any_of(*gap) + "," + self.any_of(*gap))
            self.put("]")
        elif isinstance(value, dict):
            self.put("{")
            for index, (key, item) in enumerate(value.items()):
                self.put(", " if index else " ")
                self.pair((*path, key), item)
            self.put(" }")
        elif isinstance(value, str) and "\r" not in value and self.draw.draw(st.booleans()):
            self.put('"""\n' + "\n".join(escaped(line) for line in value.split("\n")) + '"""')
        else:
            self.put(tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n"))

    def table(self, path: KeyPath, content: dict[str, Any]) -> None:
        headed = {k: v for k, v in content.items() if isinstance(v, dict) and self.draw.draw(st.booleans())}
        for key, value in content.items():
            if key not in headed:
                self.pair((*path, key), value)
                self.put(self.any_of("\n", " # = [\n", "\n\n# x\n"))
        for key, value in headed.items():
            self.note((*path, key))
            self.put("[" + ".".join(self.key(str(part)) for part in (*path, key)) + "]" + self.any_of("\n", " # a.b\n"))
            self.table((*path, key), value)


NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
STYLED: st.SearchStrategy[Any] = st.recursive(
    NO_SURROGATES | st.integers() | st.booleans() | st.sampled_from(['"', "'''", "]", "\n\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NO_SURROGATES | st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.sampled_from(["a", "b", "c d"]), STYLED, max_size=3), st.data())
def test_every_style_of_writing(document: dict[str, Any], data: st.DataObject) -> None:
    writer = Writer(data)
    writer.table((), document)
    assert tomllib.loads(writer.text) == document, "the test's own writer must be right"
    assert scan(writer.text) == writer.lines

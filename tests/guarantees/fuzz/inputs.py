"""What is fed: junk of every JSON type, valid things with damage, and bytes that were valid before somebody touched
them."""

from __future__ import annotations

import copy
import functools
import json
import random
import zlib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    *(-1, 0, 1, 2, 7, 64, 65, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1),
    *(10**30, 10**400, -(10**400), 10**4000),
)
FLOATS = (0.5, -0.0, 1e-320, 1e18, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *("", "a", "all", "x" * 300, "\0", "\n", "\x1b[31m", "\ud800", "\U0001f600", "../..", "/dev/zero", "1", "9" * 5000),
    *("true", "null", "RUNNING", "a#1", "x#" + "9" * 5000, "²", "-1", "__class__", "${HOME}", "log/a/out"),
)
TOKENS = (
    *(b"", b"\n", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"[" * 50, b"{" * 50, b'"', b"\\", b"\\ud800", b"NaN"),
    *(b"-Infinity", b"1e999", b"9" * 5000, b"null", b"true", b"{}", b"[]", b'{"a":', b",", b":", b"]" * 10, b"}" * 10),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b" " * 20, b"a.b.c.", b"=", b"#", b"'''", b'"""', b"[[", b"]]", b"${", b"$$"),
)


KEYS = st.text(max_size=8) | st.sampled_from(TEXTS)


@functools.cache
def junk(leaves: int = 6) -> st.SearchStrategy[Any]:
    """Anything that `json` can write: wrong types, huge numbers, NaN, lone surrogates, a bit of nesting, much depth."""
    flat = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(NUMBERS),
        st.integers(-(2**40), 2**40),
        st.sampled_from(FLOATS),
        st.floats(),
        st.sampled_from(TEXTS),
        st.text(max_size=12),
    )
    nested = st.recursive(
        flat,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=leaves,
    )
    return st.one_of(flat, flat, nested, st.builds(deep, st.sampled_from((5, 100, 300))))


def deep(depth: int) -> Any:
    """Arrays in arrays."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def dumped(value: object) -> bytes:
    """As JSON, NaN and lone surrogates included."""
    return json.dumps(value).encode()


def _places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        if isinstance(value, dict | list):
            found += _places(value, (*here, key))
        else:
            found.append((*here, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, documents: Sequence[Any], changes: int = 3) -> Any:
    """One of the documents with some of its parts replaced by junk, left out, added or exchanged."""
    document = copy.deepcopy(documents[draw(st.integers(0, len(documents) - 1))])
    for _ in range(draw(st.integers(0, changes))):
        places = _places(document)
        if not places:
            break
        *way, key = places[draw(st.integers(0, len(places) - 1))]
        parent = document
        for step in way:
            parent = parent[step]
        match draw(st.integers(0, 5)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(KEYS)] = draw(junk())
            case 2:
                parent[key] = places[draw(st.integers(0, len(places) - 1))]  # another key, a wrong type
            case _:
                parent[key] = draw(junk())
    return document


@st.composite
def touched(draw: st.DrawFn, originals: Sequence[bytes], changes: int = 4) -> bytes:
    """One of the originals with bytes taken out, put in, turned or doubled, or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, changes))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 6)):
            case 0:
                del data[at : at + draw(st.integers(1, 9))]
            case 1:
                data[at:at] = draw(st.sampled_from(TOKENS))
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case 3 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 4:
                other = draw(st.integers(0, len(data)))
                data[at:at] = data[min(at, other) : max(at, other)][:2000]
            case 5:
                del data[at:]
            case _:
                data[at:at] = draw(st.sampled_from(TOKENS)) * draw(st.integers(1, 40))
    return bytes(data)


def shaken(drawn: Any, times: int) -> list[Any]:
    """More inputs from one that was drawn: the same with bytes touched, always the same ones for the same input. It
    costs a hundredth of a drawn one. A tuple has its bytes at its end."""
    data = drawn[-1] if isinstance(drawn, tuple) else drawn
    chance = random.Random(zlib.crc32(data))
    found = []
    for _ in range(times):
        other = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at = chance.randint(0, len(other))
            match chance.randint(0, 4):
                case 0:
                    del other[at : at + chance.randint(1, 9)]
                case 1:
                    other[at:at] = chance.choice(TOKENS)
                case 2:
                    other[at : at + chance.randint(0, 20)] = chance.choice(TOKENS)
                case 3 if at < len(other):
                    other[at] ^= 1 << chance.randint(0, 7)
                case _:
                    start = chance.randint(0, len(other))
                    other[at:at] = other[start : start + 200]
        found.append((*drawn[:-1], bytes(other)) if isinstance(drawn, tuple) else bytes(other))
    return found

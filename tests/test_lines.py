"""procman.logs, what is read by lines: where output is cut, how lines are dressed, and what stands for what."""

from __future__ import annotations

import json
import os
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.logformat import Clock
from procman.logrecords import Records
from procman.logs import journald, syslog
from procman.logs.lines import (
    CUT,
    LINE_LIMIT,
    Dress,
    Origin,
    Piece,
    cut,
    each,
    json_objects,
    plain,
    prefix,
    stamp,
    text,
    whole_characters,
)  # fmt: skip
from procman.logs.outlet import Outlet
from procman.logs.severity import Severities

WALL = 1795757400.1239
"""2026-11-27T05:30:00.123Z, and a bit more."""

STAMP = "2026-11-27T05:30:00.123Z"
SHOP = Origin.of("shop", error=False)
SECOND_ERR = Origin.of("blog:2", error=True)

OUTPUT = st.lists(
    st.sampled_from([b"a", b"\t", b"\n", b"\n", b"\xff", b"\x7f", b"\\", b'"', b"\r", b"\0", "ä€😀".encode()])
)
SAFE = text(b"a | ", timestamps=False, safe=True)
DRESSES = {
    "plain": plain,
    "name": text(b"shop | ", timestamps=False),
    "time": text(b"", timestamps=True),
    "terminal": text(b"shop | ", timestamps=False, safe=True),
    "json": json_objects(SHOP),
    "syslog": syslog.messages(SHOP, apart=False),
    "journal": journald.entries(SHOP, apart=False),
}


# --- cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (b"", (0, False)),
        (b"half", (0, False)),
        (b"one\nhalf", (4, False)),
        (b"one\n\n", (5, False)),
        (b"12345678", (0, False)),  # as long as a line may be: its end may come
        (b"12345678\n", (9, False)),
        (b"123456789", (8, True)),
        (b"1234567\xc3\xa4", (7, True)),  # not within a character
        (b"12345\xf0\x9f\x98\x80", (5, True)),
        (b"123456\xc3\xa4" + b"9", (8, True)),
        (b"\x80" * 9, (8, True)),  # no UTF-8 at all
        (b"\xf0" * 9, (7, True)),
    ],
)
def test_where_output_is_cut(waiting: bytes, expected: tuple[int, bool]) -> None:
    assert cut(waiting, 8) == expected


@given(st.lists(st.sampled_from("aä€😀"), min_size=1).map("".join), st.integers(1, 40))
def test_no_character_is_cut(characters: str, length: int) -> None:
    data = characters.encode()[:length]
    found = whole_characters(data)
    assert found > 0
    if found < len(data) or len(data) >= 4:
        data[:found].decode()


@given(OUTPUT.map(b"".join), st.integers(4, 9))
def test_every_byte_is_dressed_once(output: bytes, limit: int) -> None:
    waiting, parts = output, []
    while True:
        length, partial = cut(waiting[: limit + 1], limit)
        if not length:
            break
        parts.append(waiting[:length])
        assert partial != parts[-1].endswith(b"\n")
        assert len(max(each(parts[-1]), key=len)) <= limit + 1
        waiting = waiting[length:]
    assert b"".join(parts) + waiting == output
    assert b"\n" not in waiting


# --- dresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wall", "expected"), [(WALL, STAMP), (0.0, "1970-01-01T00:00:00.000Z"), (1e9 + 0.9999, "2001-09-09T01:46:40.999Z")]
)
def test_a_time_is_rfc_3339_with_milliseconds(wall: float, expected: str) -> None:
    assert stamp(wall) == expected


@pytest.mark.parametrize(
    ("dress", "lines", "partial", "expected"),
    [
        (plain, b"one\n\ntwo\n", False, b"one\n\ntwo\n"),
        (plain, b"no end", False, b"no end"),
        (plain, b"half", True, b"half\\\n"),
        (text(b"shop | ", timestamps=False), b"one\n\n\0\xff\n", False, b"shop | one\nshop | \nshop | \0\xff\n"),
        (text(b"shop | ", timestamps=False), b"half", True, b"shop | half\\\n"),
        (text(b"", timestamps=True), b"one\ntwo\n", False, f"{STAMP} one\n{STAMP} two\n".encode()),
        (SAFE, b"one\n\x1b[31mred\n", False, b"a | one\na | \x1b[31mred\x1b[0m\n"),
        (SAFE, b"\x1b]0;title\x07\n", False, b"a | \\x1b]0;title\\x07\n"),
        (SAFE, b"half\x1b[2J", True, b"a | half\\x1b[2J\\\n"),
        (text(b"a | ", timestamps=True), b"\n", False, f"a | {STAMP} \n".encode()),
    ],
)
def test_lines_as_text(dress: Dress, lines: bytes, partial: bool, expected: bytes) -> None:
    [piece] = dress(lines, partial, WALL)
    assert piece[:3] == (expected, lines, 0)


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (b"hello\n", ["hello"]),
        (b"one\n\ntwo", ["one", "", "two"]),
        (b'say "hi" \\n\tx\r\n', ['say "hi" \\n\tx\r']),
        (b"\xff\xc3\n", ["\\xff\\xc3"]),
        ("Grüße 😀\n".encode(), ["Grüße 😀"]),
        (b"a\x7fb\n\x00\x1b[31m\n", ["a\x7fb", "\0\x1b[31m"]),
    ],
)
def test_lines_as_json(lines: bytes, messages: list[str]) -> None:
    [piece] = json_objects(SECOND_ERR)(lines, False, WALL)
    assert piece.source == lines
    found = [json.loads(line) for line in piece.data.decode().split("\n")[:-1]]
    assert [each["message"] for each in found] == messages
    for one in found:
        assert list(one) == ["time", "program", "instance", "stream", "message"]
        assert list(one.values())[:4] == [STAMP, "blog", 2, "stderr"]


def test_the_form_of_a_json_line() -> None:
    """As the docs have it, to the byte: others read it."""
    [piece] = json_objects(SHOP)(b"hello\n", False, WALL)
    expected = f'{{"time": "{STAMP}", "program": "shop", "instance": 1, "stream": "stdout", "message": "hello"}}\n'
    assert piece.data.decode() == expected
    [piece] = json_objects(SHOP)(b"hel", True, WALL)
    assert json.loads(piece.data)["partial"] is True


@given(OUTPUT.map(b"".join))
def test_json_is_the_same_by_the_fast_way_and_by_the_slow_one(output: bytes) -> None:
    [piece] = json_objects(SHOP)(output + b"\n", False, WALL)
    found = [json.loads(line)["message"] for line in piece.data.decode().split("\n")[:-1]]
    assert found == [line.decode(errors="backslashreplace") for line in output.split(b"\n")]


@given(OUTPUT.map(b"".join).filter(bool), st.sampled_from(sorted(DRESSES)))
def test_a_line_for_a_line(output: bytes, name: str) -> None:
    """What pieces stand for is the output, and as many lines, or messages, come as were there."""
    output = output if output.endswith(b"\n") else output + b"\n"
    pieces = DRESSES[name](output, False, WALL)
    assert b"".join(piece.source for piece in pieces) == output
    if name not in ("syslog", "journal"):
        [piece] = pieces
        assert piece.data.count(b"\n") == output.count(b"\n")
    else:
        assert len(pieces) == output.count(b"\n")


def test_how_much_of_the_source_is_written() -> None:
    """A line counts when all of it is there."""
    [piece] = text(b"shop | ", timestamps=False)(b"one\n\nlonger", False, WALL)
    assert piece.data == b"shop | one\nshop | \nshop | longer\n"
    steps = {0: 0, 10: 0, 11: 4, 18: 4, 19: 5, 32: 5, 33: 11}
    assert {written: piece.own_in(0, written) for written in steps} == steps
    assert piece._replace(added=-1).own_in(11, 8, 4) == piece.own_in(11, 8, 4) == 1
    assert piece.own_in(19, 14, 5) == 6
    assert piece.own_in(12, 7, 4) == 1, "from within a line"


@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.binary(max_size=8), max_size=8), st.booleans())
def test_an_outlet_counts_own_bytes_exactly(steps: list[int], lines: list[bytes], safe: bool) -> None:
    """However little is printed at a time, a line counts when it is out, and none is counted twice."""
    output = b"".join(line + b"\n" for line in lines)
    dress = text(b"p | ", timestamps=False, safe=safe)
    pieces = [Piece(b"lost\n", b"", 5), *(dress(output, False, WALL) if output else [])]
    read_fd, write_fd = os.pipe()
    outlet = Outlet(write_fd)
    outlet.queue(pieces)
    own = told = 0

    def settled(now: int, reports: int) -> None:
        nonlocal own, told
        assert min(now, reports) >= 0
        own, told = own + now, told + reports

    for step in steps:
        if outlet.waiting:
            outlet._settle(min(step, len(outlet._pieces[0].data) - outlet._sent), settled)
    lost = outlet.discard()
    assert own + lost == len(output)
    assert told in (0, 5)
    outlet.close()
    os.close(read_fd)
    os.close(write_fd)


def test_names_have_colours_of_their_own_on_a_terminal() -> None:
    assert prefix("shop:1", colour=False) == b"shop:1 | "
    one, two = prefix("shop", colour=True), prefix("blog", colour=True)
    assert re.fullmatch(rb"\x1b\[\d+mshop \|\x1b\[0m ", one)
    assert one[:5] != two[:5]
    assert prefix("shop", colour=True) == one


# --- syslog and the journal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "error", "expected"),
    [
        (b"hello", False, 6),
        (b"hello", True, 3),
        (b"Traceback (most recent call last):", False, 3),
        (b"ERROR:root:no", False, 3),
        (b"WARNING:django.request:Not Found: /x", True, 4),
        (b"[2026-11-27 05:30:00 +0000] [17] [INFO] Booting worker", True, 6),
        (b"[2026-11-27 05:30:00 +0000] [17] [CRITICAL] WORKER TIMEOUT", False, 2),
        (b"2026-11-27 05:30:00,123 - shop - DEBUG - x", False, 7),
        (b"2026-11-27 05:30:00,123 shop ERROR x", False, 3),
        (b"INFO:     Started server process [17]", True, 6),
        (b"2026/11/27 05:30:00 [error] 17#0: *1 open() failed", False, 3),
        (b'{"time": "x", "level": "warning", "msg": "y"}', False, 4),
        (b'{"levelname":"ERROR"}', False, 3),
        (b"GET /ERROR-pages HTTP/1.1", False, 6),
        (b"TERROR: none", False, 6),
        (b"x" * 200 + b" ERROR ", False, 6),
        (b"level=error msg=x", False, 3),  # logfmt
        (b"2026-11-27 10:00:00 [info     ] started", True, 6),  # structlog
        (b'{"level":"error","exc_info":"Trace', False, 3),  # of JSON that is cut into parts
        (b"procman.wsgi: Exception while serving /boom", False, 3),
        (b"Not Found: /a/1", False, 4),
        # what a visitor has typed
        (b'1.2.3.4 - - [27/Nov/2026:10:00:00 +0000] "GET / HTTP/1.1" 200 12 "-" "curl EMERG x"', False, 6),
        (b'127.0.0.1 - - [27/Nov/2026 10:00:00] "GET / HTTP/1.1" 200 - ALERT', False, 6),
        (b'[2026-11-27 05:33:52 +0000] 127.0.0.1 - "GET /ERROR/x HTTP/1.1" 200 0.086', False, 6),
        (b'INFO:     127.0.0.1:1 - "GET /q?x=( EMERG ) HTTP/1.1" 200 OK', False, 6),
        (b"user typed: PANIC", False, 6),
        (b"2026-11-27 10:00:00,123 INFO app: user typed PANIC", False, 6),
        (b"EMERG: of the program, or of a visitor", False, 2),
        (b"", False, 6),
    ],
)
def test_how_bad_a_line_is(line: bytes, error: bool, expected: int) -> None:
    assert Severities(error=error).of(line, WALL) == (expected, line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [(b"<3>bad", (3, b"bad")), (b"<7>", (7, b"")), (b"<8>x", (6, b"<8>x")), (b"<>", (6, b"<>")), (b"<b>", (6, b"<b>"))],
)
def test_a_prefix_as_systemd_has_it_tells_and_is_taken_off(line: bytes, expected: tuple[int, bytes]) -> None:
    assert Severities(error=False).of(line, WALL) == expected


TRACEBACKS = b"""\
INFO:root:before
Traceback (most recent call last):
  File "a.py", line 1, in f
    print("INFO: x")
          ^^^^^^^^^
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 2, in g
  [Previous line repeated 5 more times]
ValueError
print
  indented
  + Exception Group Traceback (most recent call last):
  |   File "a.py", line 1, in h
  | ExceptionGroup: two (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: 1
    +------------------------------------
after
Traceback (most recent call last):
  File "a.py", line 1, in f
INFO:root:of another thread
  indented
"""


def test_later_parts_of_a_line_are_as_bad_as_the_first() -> None:
    for made in (syslog.messages(SHOP, apart=False), journald.entries(SHOP, apart=False)):
        parts = [(b"ERROR: a ", True), (b"<0>b ", True), (b"INFO: c\n", False), (b"INFO: next\n", False)]
        pieces = [made(part, partial, WALL)[0].data for part, partial in parts]
        severities = [int(re.search(rb"(?:^<|PRIORITY=)(\d+)", data)[1]) % 8 for data in pieces]  # type: ignore[index]
        assert severities == [3, 3, 3, 6]
        assert b"<0>b " in pieces[1]


def test_what_is_printed_long_after_a_traceback_is_no_error() -> None:
    """As by the next process, whose first lines say nothing of themselves."""
    severities = Severities(error=False)
    trace = [b"Traceback (most recent call last):", b'  File "a.py", line 1, in f', b"E: one", b"two"]
    assert [severities.of(line, WALL)[0] for line in trace] == [3] * 4
    assert severities.of(b"serving", WALL + 1.5)[0] == 6
    stamped = b"".join(b"2026-11-27T05:30:0%d.000Z %b\n" % (second, line) for second, line in enumerate([*trace, b"x"]))
    maker = Records(Clock(WALL))
    assert len([*maker.feed(stamped.replace(b":03.", b":02.")), *maker.end()]) == 2


def test_that_a_script_is_no_python_is_known_when_its_last_line_comes() -> None:
    severities = Severities(error=False)
    lines = [b'  File "a.py", line 2', b"    x = (", b"        ^", b"SyntaxError: '(' was never closed", b"print"]
    assert [severities.of(line, WALL)[0] for line in lines] == [6, 6, 6, 3, 6]


def test_all_lines_of_a_traceback_are_errors() -> None:
    severities = Severities(error=False)
    found = "".join(str(severities.of(line, WALL)[0]) for line in TRACEBACKS.splitlines())
    assert found == "6_33333_333_3333_33_333333_6_33_66".replace("_", "")
    pieces = syslog.messages(SHOP, apart=False)(TRACEBACKS, False, WALL)
    assert [piece.data.startswith(b"<27>") for piece in pieces] == [number == "3" for number in found]
    dress = journald.entries(SHOP, apart=False)
    assert [fields(dress(line + b"\n", False, WALL)[0].data)["PRIORITY"] for line in TRACEBACKS.splitlines()] == [
        number.encode() for number in found
    ]


def test_an_answer_without_an_address_is_no_part_of_the_error_before() -> None:
    severities = Severities(error=False)
    lines = [b"[2026-11-27 05:33:43 +0000] [5] [ERROR] x", b' - - [27/Nov/2026:05:33:43 +0000] "GET / HTTP/1.0" 200 1']
    assert [severities.of(line, WALL)[0] for line in lines] == [3, 6]


def test_a_message_of_syslog() -> None:
    found = syslog.messages(SECOND_ERR, apart=True)(b"hello\n<6>ok\nWARNING:x\n", False, WALL)
    host = re.escape(os.uname().nodename).encode()
    about = rb">1 2026-11-27T05:30:00\.123Z " + host + rb" blog blog:2 stderr - "
    expected = [rb"<27" + about + rb"hello", rb"<30" + about + rb"ok", rb"<28" + about + rb"WARNING:x"]
    for piece, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, piece.data), piece
    [part] = syslog.messages(SHOP, apart=False)(b"x" * syslog.MESSAGE_LIMIT, True, WALL)
    assert part.data.endswith(b"xx" + CUT)
    assert len(part.data) < 8192


def fields(entry: bytes) -> dict[str, bytes]:
    """An entry of the journal, read as its protocol says."""
    found = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", entry[:8])
            value, entry = entry[8 : 8 + length], entry[8 + length :]
            assert entry.startswith(b"\n")
            entry = entry[1:]
        found[name.decode()] = value
    return found


def test_an_entry_of_the_journal() -> None:
    one, two = journald.entries(SECOND_ERR, apart=True)(b"a=b\0\xff\n<4>two\n", False, WALL)
    assert fields(one.data) == {
        "PRIORITY": b"3", "SYSLOG_IDENTIFIER": b"blog", "PROCMAN_PROGRAM": b"blog", "PROCMAN_INSTANCE": b"2",
        "PROCMAN_PROCESS": b"blog:2", "PROCMAN_STREAM": b"stderr", "MESSAGE": b"a=b\0\xff",
    }  # fmt: skip
    assert (fields(two.data)["PRIORITY"], fields(two.data)["MESSAGE"]) == (b"4", b"two")
    [part] = journald.entries(SHOP, apart=False)(b"half", True, WALL)
    assert (fields(part.data)["PROCMAN_PARTIAL"], part.source) == (b"1", b"half")


def test_lines_are_not_limited_below_what_the_docs_say() -> None:
    assert (LINE_LIMIT, syslog.MESSAGE_LIMIT, journald.MESSAGE_LIMIT) == (65536, 7168, 524288)

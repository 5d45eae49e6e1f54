"""procman.tracebacks and procman.accesslog: what real servers print of errors and answers, and what bounds them."""

from __future__ import annotations

import re
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import accesslog, logrecords, tracebacks
from procman.logformat import Clock
from procman.tracebacks import TEXT_MAX, Scanner, Traceback, scan

FORMATS = Path(__file__).parent / "formats"


def deep() -> None:
    raise ValueError("bad thing: 5")


def chained() -> None:
    try:
        deep()
    except ValueError as error:
        raise RuntimeError("outer") from error


def group() -> None:
    raise ExceptionGroup("several", [ValueError("a"), ExceptionGroup("in it", [TypeError("b")])])


def around_a_group() -> None:
    try:
        group()
    except ExceptionGroup:
        raise OSError("after it")  # noqa: B904


def recursion() -> None:
    recursion()


def in_log(text: str) -> list[Traceback]:
    """Those in a log."""
    records = logrecords.Records(Clock(1.8e9))
    made = [*records.feed(text.encode()), *records.end()]
    return [found for record in made for found in logrecords.tracebacks_in(record)]


def printed(function: object) -> str:
    try:
        function()  # type: ignore[operator]
    except BaseException:  # noqa: BLE001
        return traceback.format_exc()
    raise AssertionError("it did not fail")


@pytest.mark.parametrize(
    ("function", "exception", "message", "raised"),
    [
        (deep, "ValueError", "bad thing: 5", "ValueError"),
        (chained, "RuntimeError", "outer", "ValueError RuntimeError"),
        (group, "ExceptionGroup", "several (2 sub-exceptions)", "ExceptionGroup ValueError ExceptionGroup TypeError"),
        (around_a_group, "OSError", "after it", "ExceptionGroup ValueError ExceptionGroup TypeError OSError"),
        (recursion, "RecursionError", "maximum recursion depth exceeded", "RecursionError"),
    ],
)
def test_what_python_prints(function: object, exception: str, message: str, raised: str) -> None:
    text = printed(function)
    found = in_log(f"before\n{text}2026-01-31 12:00:00 INFO after\nafter that")
    assert len(found) == 1
    assert (found[0].exception, found[0].message, " ".join(found[0].raised)) == (exception, message, raised)
    assert found[0].text == text.rstrip("\n")
    assert all(frame.startswith(__file__) for frame in found[0].frames)
    assert found == list(scan(text.split("\n")))


REAL = {
    "gunicorn": ("RuntimeError", "ValueError RuntimeError", 1),
    "uwsgi": ("RuntimeError", "ValueError RuntimeError", 1),
    "uvicorn": ("RuntimeError", "ValueError RuntimeError", 1),
    "hypercorn": ("RuntimeError", "ValueError RuntimeError", 1),
    "daphne": ("RuntimeError", "ValueError RuntimeError", 1),
    "granian": ("RuntimeError", "RuntimeError", 1),
    "wsgi": ("RuntimeError", "ValueError RuntimeError", 1),
    "runserver": ("KeyError", "ZeroDivisionError KeyError", 1),
    "django": ("KeyError", "ZeroDivisionError KeyError", 2),
}


@pytest.mark.parametrize("server", REAL)
def test_what_real_servers_print(server: str) -> None:
    exception, raised, count = REAL[server]
    found = in_log((FORMATS / f"{server}.log").read_text())
    assert [(one.exception, " ".join(one.raised)) for one in found] == [(exception, raised)] * count
    assert len({one.key for one in found}) == 1
    assert found[0].text.startswith("Traceback (most recent call last):\n  File ")
    assert found[0].text.rpartition("\n")[2].startswith(exception)


def test_the_same_error_has_the_same_key_whatever_its_message() -> None:
    one, other = (next(scan(printed(deep).replace(": 5", text).split("\n"))) for text in (": 5", ": 6"))
    assert (one.message, other.message) == ("bad thing: 5", "bad thing: 6")
    assert one.key == other.key
    assert one.key != next(scan(printed(chained).split("\n"))).key
    moved = printed(deep).replace('line 2', "line 3").replace("in deep", "in deeper")
    assert one.key != next(scan(moved.split("\n"))).key


LOGURU = dict(re.findall(r"(?ms)^=== (.*?)\n(.*?)(?=^===|\Z)", (FORMATS / "loguru.txt").read_text()))
"""What one program prints with each of these settings of loguru's `add`."""


@pytest.mark.parametrize("mode", LOGURU)
def test_what_loguru_prints(mode: str) -> None:
    """It marks the frame that caught, shows values, and puts empty lines between the parts."""
    found = in_log(LOGURU[mode])
    assert [(one.exception, one.message, " ".join(one.raised)) for one in found] == [
        ("RuntimeError", "no price for sku-12", "KeyError RuntimeError"),
        ("ZeroDivisionError", "division by zero", "ZeroDivisionError"),
        ("ValueError", "first line", "ValueError"),
        ("ExceptionGroup", "several (2 sub-exceptions)", "ExceptionGroup ValueError KeyError"),
    ]
    outer = 0 if "backtrace=False" in mode else 2  # frames above the one that caught
    assert [len(one.frames) for one in found] == ([6, 3, 2, 3] if outer else [4, 2, 1, 2])
    assert found[0].frames[2 + outer :] == ("/srv/shop/pay.py:29 view", "/srv/shop/pay.py:24 checkout")
    assert found[2].text.endswith("ValueError: first line\nsecond line\n\nfourth")


def test_what_structlog_makes_of_tracebacks() -> None:
    """With dict_tracebacks they are no text, but lists and objects."""
    found = in_log((FORMATS / "structlog.txt").read_text())
    assert [(one.exception, one.message, " ".join(one.raised)) for one in found] == [
        ("ValueError", "no price", "ZeroDivisionError ValueError"),
        ("OSError", "no disk", "ZeroDivisionError ValueError OSError"),
        ("ExceptionGroup", "several (2 sub-exceptions)", "ExceptionGroup ValueError KeyError"),
        ("SyntaxError", "'(' was never closed (s.py, line 1)", "SyntaxError"),
    ]
    assert found[0].frames == tuple(
        f"/srv/shop/orders.py:{frame}" for frame in ("9 order", "6 price", "23 <module>", "11 order")
    )
    assert found[0].text.split("\n")[:4] == [
        "Traceback (most recent call last):",
        '  File "/srv/shop/orders.py", line 9, in order',
        '  File "/srv/shop/orders.py", line 6, in price',
        "ZeroDivisionError: division by zero",
    ]
    assert tracebacks._CHAIN[0] in found[0].text.split("\n")
    assert [text in found[1].text for text in tracebacks._CHAIN] == [True, True]


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.fixed_dictionaries(
                {"exc_type": st.sampled_from(["E", 5, "a b"])},
                optional=dict.fromkeys(("exc_value", "frames", "exceptions", "is_group", "filename"), inner),
            ),
        ),
        max_leaves=20,
    )
)
def test_any_value_may_be_a_traceback_of_structlog(value: object) -> None:
    assert isinstance(tracebacks.of_structlog(value), str)


def test_a_traceback_of_structlog_may_be_deep_or_long() -> None:
    one: dict[str, object] = {"exc_type": "ExceptionGroup", "exc_value": "x"}
    for _ in range(2000):
        one = {**one, "is_group": True, "exceptions": [[one]]}
    (found,) = scan(tracebacks.of_structlog([one]).split("\n"))
    assert (found.exception, len(found.raised)) == ("ExceptionGroup", 20)
    assert len(tracebacks.of_structlog([{"exc_type": "E", "frames": [{"filename": "a"}] * 9000}])) < 20_000


@pytest.mark.parametrize(
    ("text", "exceptions"),
    [
        ("Traceback (most recent call last):\n", []),
        ('Traceback (most recent call last):\n  File "a", line 1, in f\nGrößenfehler: zu groß', ["Größenfehler"]),
        ('Traceback (most recent call last):\n  File "a", line 1, in f\nshop.Größenfehler: x', ["shop.Größenfehler"]),
        ('Traceback (most recent call last):\n  File "a", line 1, in f\nnotes.错误', ["notes.错误"]),
        ('Traceback (most recent call last):\n  File "a", line 1, in f\nGr\ufffde: not UTF-8', ["Gr\ufffde"]),
        ('Traceback (most recent call last):\n  File "a", line 1, in f', ["?"]),
        ('Traceback (most recent call last):\n  File "a", line 1, in f\n[2026-01-31 12:00:00] x', ["?"]),
        (
            'Traceback (most recent call last):\n  File "a", line 1, in f\n' * 2 + "E",
            ["?", "E"],
        ),
        ('ERROR Traceback (most recent call last):\n  File "a", line 1, in f\na.b.<locals>.E: x', ["a.b.<locals>.E"]),
        ("no Traceback (most recent call last): here", []),
    ],
)
def test_what_is_cut_off_or_mixed(text: str, exceptions: list[str]) -> None:
    assert [one.exception for one in scan(text.split("\n"))] == exceptions


def test_a_huge_traceback_is_kept_in_part() -> None:
    frames = "".join(f'  File "a{number}.py", line {number}, in f\n    {"x" * 100}\n' for number in range(20_000))
    (found,) = scan(f"Traceback (most recent call last):\n{frames}ValueError: {'y' * 100_000}".split("\n"))
    assert len(found.text) < 2 * TEXT_MAX
    assert "lines left out]" in found.text
    assert (found.exception, len(found.frames)) == ("ValueError", tracebacks.FRAMES_MAX)


@given(st.lists(st.sampled_from([*printed(chained).split("\n"), *printed(group).split("\n"), "x", ""]), max_size=60))
def test_any_order_of_lines_is_harmless(lines: list[str]) -> None:
    found = list(scan(lines))
    assert len(found) <= sum("Traceback (most" in line for line in lines)
    scanner = Scanner()
    again = [one for line in lines if (one := scanner.feed(line))]
    assert [*again, *filter(None, [scanner.end()])] == found
    assert not scanner.inside


# --- access logs


NONE = accesslog.NO_REQUEST
UWSGI = "[pid: 5|app: 0|req: 4/4] 127.0.0.1 () {22 vars in 75 bytes} [Fri Nov 27 23:59:44 2026]"
ANSWERS: list[tuple[str, tuple[str, str, int, float | None] | None]] = [
    ('1.1.1.1 - - [x] "GET /a HTTP/1.1" 200 2 "-" "curl/7" 0.2ms', ("GET", "/a", 200, 0.0002)),
    ('1.1.1.1 - - [x] "GET /a HTTP/1.1" 200 2 "-" "curl/7"', ("GET", "/a", 200, None)),
    ('1.1.1.1 - - [x] "GET /a HTTP/1.1" 200 2 "-" "curl/7" 1500', ("GET", "/a", 200, 0.0015)),
    ('1.1.1.1 - - [x] "GET /a HTTP/1.1" 200 2 "-" "curl/7" 0.150', ("GET", "/a", 200, 0.15)),
    ('1.1.1.1 - - [x] "GET /a HTTP/1.1" 200 2 "-" "curl/7" rt=2', ("GET", "/a", 200, 2.0)),
    ('1.1.1.1 - - [x] "POST /a?b=c HTTP/1.1" 503 -', ("POST", "/a?b=c", 503, None)),
    ('127.0.0.1:35686 - - [x] "GET /" 200 2', ("GET", "/", 200, None)),
    ('INFO:     127.0.0.1:5 - "GET / HTTP/1.1" 500 Internal Server Error', ("GET", "/", 500, None)),
    ('[2026-11-27 05:33:52 +0000] 127.0.0.1 - "GET / HTTP/1.1" 200 0.086', ("GET", "/", 200, 0.000086)),
    (' - - [x] "GET /a HTTP/1.0" 500 2 "-" "-"', ("GET", "/a", 500, None)),  # over a Unix socket
    ('[2026-11-27 05:33:52 +0000]  - "GET / HTTP/1.1" 200 0.086', ("GET", "/", 200, 0.000086)),
    ('[t] [7] [INFO] 127.0.0.1:5 - - [x] "GET / 1.1" 200 2 "-" "curl"', ("GET", "/", 200, None)),
    ('[27/Nov/2026 05:34:29] "GET /a HTTP/1.1" 404 2321', ("GET", "/a", 404, None)),
    (f"{UWSGI} GET /x?q => generated 2 bytes in 7 msecs (HTTP/1.1 200) 1 headers in 38 bytes (1 switches on core 0)",
     ("GET", "/x?q", 200, 0.007)),
    ("[pid: 5|app: 0|req: 1/1] x", None),
    ('1.1.1.1 - a\\"b [x] "GET /a HTTP/1.1" 200 2 "-" "-"', ("GET", "/a", 200, None)),
    ('1.1.1.1 - a\\"b', None),
    # what is no usual request: nginx, Apache, Flask with its colours, Django's runserver, daphne, uvicorn, granian
    ('1.1.1.1 - - [28/Nov/2026:00:11:29 +0000] "\\x16\\x03\\x01\\x22q\\x5C\\xFF" 400 157 "-" "-"', (*NONE, 400, None)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "" 408 0 "-" "-"', (*NONE, 408, None)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "-" 408 - "-" "-" 1500', (*NONE, 408, 0.0015)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:31 +0000] "GET / HT" 408 0 "-" "-"', ("GET", "/ HT", 408, None)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "M-SEARCH * HTTP/1.1" 405 157 "-" "-"', ("M-SEARCH", "*", 405, None)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "GET /x y HTTP/1.1" 404 157 "-" "-"', ("GET", "/x y", 404, None)),
    ('1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "OPTIONS rtsp://x RTSP/1.0" 400 157 "-" "-"',
     ("OPTIONS", "rtsp://x RTSP/1.0", 400, None)),
    (f'1.1.1.1 - - [28/Nov/2026:00:11:30 +0000] "GET /{"a" * 9000} HTTP/1.1" 414 177 "-" "-"',
     ("GET", "/" + "a" * 9000, 414, None)),
    ('1.1.1.1 - - [27/Nov/2026 23:59:37] "\x1b[33mGET /none HTTP/1.1\x1b[0m" 404 -', ("GET", "/none", 404, None)),
    ('1.1.1.1 - - [27/Nov/2026 23:59:37] "\x1b[31m\x1b[1m\\x16\\x03ü"quoted\\\\ÿ\x1b[0m" 400 -', (*NONE, 400, None)),
    ("1.1.1.1 - - [27/Nov/2026 23:59:37] code 400, message Bad request version ('FOO/1.1')", None),
    ("1.1.1.1 - - [27/Nov/2026 23:59:37] code 400, message Bad request syntax ('\\x16\\x03\"quoted\\\\ÿ')", None),
    ('1.1.1.1 - - [27/Nov/2026 23:59:37] "\x1b[31m\x1b[1mGET / FOO/1.1\x1b[0m" 400 -', ("GET", "/ FOO/1.1", 400, None)),
    ('[28/Nov/2026 00:11:18] "get /low HTTP/1.1" 404 2162', ("get", "/low", 404, None)),
    ("[28/Nov/2026 00:11:18] You're accessing the development server over HTTPS, but it only supports HTTP.",
     (*NONE, 400, None)),
    ('127.0.0.1:48996 - - [27/Nov/2026:23:59:54] "GET /"q" 200 2', ("GET", '/"q', 200, None)),
    ('INFO:     127.0.0.1:42186 - "get /low HTTP/1.1" 200 OK', ("get", "/low", 200, None)),
    ('[2026-11-27 23:59:58 +0000] 127.0.0.1 - "GET /"q HTTP/1.1" 200 1.294', ("GET", '/"q', 200, 0.001294)),
    (f"{UWSGI}   => generated 0 bytes in 0 msecs ( 500) 0 headers in 0 bytes (0 switches on core 0)",
     (*NONE, 500, 0.0)),
    (f"{UWSGI} GET /x => generated 2 bytes in 3 msecs (y HTTP/1.1 404) 1 headers in 40 bytes (1 switches on core 0)",
     ("GET", "/x", 404, 0.003)),
    (f"{UWSGI} GET /x => generated 2 bytes in 3 msecs (y (200) 404) 1 headers in 40 bytes (1 switches on core 0)",
     ("GET", "/x", 404, 0.003)),
    ('2026-11-27 05:33:43,644 INFO shop no "such thing" 404 times', None),
    ('he said "GET lost"', None),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "answer"), ANSWERS)
def test_answers(line: str, answer: tuple[str, str, int, float | None] | None) -> None:
    found = accesslog.parse(line.encode())
    if found and found.seconds:
        found = found._replace(seconds=round(found.seconds, 9))
    assert found == (answer and accesslog.Answer(*answer))


@pytest.mark.parametrize("server", REAL)
def test_answers_of_real_servers(server: str) -> None:
    lines = (FORMATS / f"{server}.log").read_bytes().splitlines()
    found = [answer for answer in map(accesslog.parse, lines) if answer]
    if server != "django":  # without an access log
        assert len(found) == 4
        assert {answer.status for answer in found} <= {200, 404, 500}
        assert {accesslog.place(answer.path) for answer in found} == {"/", "/a/*", "/boom", "/none"}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/", "/"),
        ("/shop/12?page=3", "/shop/*"),
        ("/user/7d444840-9dc0-11d1-b245-5ffdce74fad2/x", "/user/*/x"),
        ("/v2/a1", "/v2/a1"),
        ("/static/0123456789abcdef0123.css", "/static/0123456789abcdef0123.css"),
        ("/" + "x" * 500, "/" + "x" * 199),
    ],
)
def test_paths_are_counted_without_what_makes_each_its_own(path: str, place: str) -> None:
    assert accesslog.place(path) == place


@given(st.binary(max_size=200))
def test_any_line_may_be_an_answer(line: bytes) -> None:
    accesslog.parse(line)
    accesslog.parse(b'1.1.1.1 - - [x] "GET / HTTP/1.1" 200 ' + line)
    accesslog.parse(b'1.1.1.1 - - [27/Nov/2026 23:59:37] "' + line + b'" 400 -')


@pytest.mark.parametrize(
    "line",
    [
        b'"' * 200_000,
        b"\\" * 200_000,
        b'1.1.1.1 - - [27/Nov/2026 23:59:37] "' + b'" 40' * 50_000,
        b'1.1.1.1 - - [27/Nov/2026 23:59:37] "' * 9000,
        b'INFO: ' + b' - "' * 50_000,
        UWSGI.encode() + b" => generated 1 bytes in 1 msecs ( 50" * 5000,
        f"{UWSGI} GET /x => generated 2 bytes in 3 msecs (".encode() + b"1 404) 1 " * 20_000,
    ],
)  # fmt: skip
def test_a_long_line_is_no_work(line: bytes) -> None:
    """Whatever a visitor puts there."""
    begin = time.process_time()
    assert accesslog.parse(line) is None
    assert time.process_time() - begin < 0.5


def test_a_long_chain_is_shown_by_its_first_and_its_last_exception() -> None:
    """With the number of lines between them, also of those that were left out before."""

    def section(name: str, frames: int) -> list[str]:
        lines = [f'  File "{name}.py", line {number}, in {name}' for number in range(frames)]
        return ["Traceback (most recent call last):", *lines, f"{name.title()}Error: {name}"]

    joint = ["", "During handling of the above exception, another exception occurred:", ""]
    middle = [*section("middle", 100), "  [30 lines left out]"]
    lines = [*section("first", 4), *joint, *middle, *joint, *section("last", 60)]
    shown = tracebacks.shortened(lines, 40)
    assert shown[:7] == [*section("first", 4), ""]
    assert shown[-1] == "LastError: last"
    assert joint[1] in shown
    assert len(shown) <= 42
    assert sum(part if isinstance(part, int) else 1 for part in shown) == len(lines) + 29
    lone = tracebacks.shortened(section("lone", 300), 40)
    assert (lone[0], lone[20], lone[-1]) == ("Traceback (most recent call last):", 262, "LoneError: lone")


@given(st.lists(st.sampled_from(["x", "", "  [3 lines left out]", tracebacks._CHAIN[0]]), max_size=80))
def test_no_line_is_forgotten_or_doubled(lines: list[str]) -> None:
    shown = tracebacks.shortened(lines, 10)
    counted = [part for part in shown if isinstance(part, str)]
    left = sum(part for part in shown if isinstance(part, int))
    assert sum(3 if "[3" in line else 1 for line in lines) == left + sum(3 if "[3" in line else 1 for line in counted)

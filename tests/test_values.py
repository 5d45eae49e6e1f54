"""The kinds of value of a program table, as tables of what is written and what it means."""

from __future__ import annotations

import datetime as dt
import signal
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import values
from procman.config import Address, Room
from procman.values import BadValue

NAN, INFINITE = float("nan"), float("inf")

GOOD: list[tuple[Callable[[object], object], object, object]] = [
    (values.string, "", ""),
    (values.text, "x", "x"),
    (values.boolean, True, True),
    (values.integer(), -5, -5),
    (values.integer(1, 3), 3, 3),
    (values.choice(("a", "b")), "b", "b"),
    (values.duration, 0, 0.0),
    (values.duration, 2, 2.0),
    (values.duration, 0.25, 0.25),
    (values.duration, "500ms", 0.5),
    (values.duration, "10s", 10.0),
    (values.duration, "5m", 300.0),
    (values.duration, "2h", 7200.0),
    (values.duration, "7d", 604800.0),
    (values.duration, "1.5h", 5400.0),
    (values.duration, "0.1ms", 0.0001),
    (values.size, 0, 0),
    (values.size, 5, 5),
    (values.size, "512KB", 524288),
    (values.room, "", Room()),
    (values.room, 0, Room()),
    (values.room, "2GB", Room(2147483648)),
    (values.room, "5%", Room(share=0.05)),
    (values.room, "0.5%", Room(share=0.005)),
    (values.size, "50MB", 52428800),
    (values.size, "2GB", 2147483648),
    (values.size, "1.5KB", 1536),
    (values.mode, 0o660, 0o660),
    (values.mode, 0, 0),
    (values.signal_number, "TERM", signal.SIGTERM),
    (values.signal_number, "SIGHUP", signal.SIGHUP),
    (values.signal_number, "usr1", signal.SIGUSR1),
    (values.exit_code, 0, 0),
    (values.exit_code, 255, 255),
    (values.exit_code, "KILL", -9),
    (values.reload, "overlap", values.Reload("overlap")),
    (values.reload, "restart", values.Reload("restart")),
    (values.reload, "signal:HUP", values.Reload("signal", 1)),
    (values.canary, "10% for 2m", values.Canary(0.1, 120.0)),
    (values.canary, "2.5%", values.Canary(0.025)),
    (values.canary, "0%", values.Canary()),
    (values.reload, ["touch", "f"], values.Reload("command", command=("touch", "f"))),
    (values.name, "Shop-2.x_y", "Shop-2.x_y"),
    (values.title, "the shop", "the shop"),
    (values.words, "a 'b c' \"d\"", ["a", "b c", "d"]),
    (values.pattern, "^ready$", "^ready$"),
    (values.url_path, "/a?b=c", "/a?b=c"),
    (values.account_name, 33, "33"),
    (values.account_name, "www", "www"),
    (values.variable, "x", "x"),
    (values.variable_name, "A_B", "A_B"),
    (values.server_option, [1, "a", True], [1, "a", True]),
    (values.url, "http://[::1]:80/x?y", (Address("tcp", host="::1", port=80), "/x?y", "[::1]:80")),
    (values.url, "http://shop.example", (Address("tcp", host="shop.example", port=80), "/", "shop.example")),
]

BAD: list[tuple[Callable[[object], object], object, str]] = [
    (values.string, 1, "must be a string, not an integer"),
    (values.string, "a\0", "must not hold a NUL character"),
    (values.text, "", "must not be empty"),
    (values.boolean, 1, "must be true or false, not an integer"),
    (values.boolean, "true", "must be true or false, not a string"),
    (values.integer(), True, "must be an integer, not a boolean"),
    (values.integer(), 1.0, "must be an integer, not a float"),
    (values.integer(), dt.date(2000, 1, 1), "must be an integer, not a date"),
    (values.integer(), dt.time(1), "must be an integer, not a time"),
    (values.integer(1), 0, "must be 1 or more, not 0"),
    (values.integer(None, 3), 4, "must be 3 or less, not 4"),
    (values.choice(("tree", "main")), "tere", "must be one of \"tree\", \"main\", not 'tere'; did you mean 'tree'?"),
    (values.duration, True, "must be a duration, not a boolean"),
    (values.duration, [], "must be a duration, not an array"),
    (values.duration, -1, "must be 0 or more, not -1"),
    (values.duration, NAN, "must be 0 or more, not nan"),
    (values.duration, -INFINITE, "must be 0 or more, not -inf"),
    (values.duration, INFINITE, "is too long: more than 30 years"),
    (values.duration, 2**63, "is too long: more than 30 years"),
    (values.duration, "9" * 400 + "d", "is too long: more than 30 years"),
    *(
        (values.duration, word, f'bad duration {word!r}: give a number of seconds, or "500ms", "10s", "5m", "2h", "7d"')
        for word in ("", "10", "10 s", "-1s", "1S", "1s ", "s", "1w", "1_0s", "\u0663s", "1e3s", "10s\n")
    ),
    (values.positive_duration, 0, "must be more than 0"),
    (values.size, 1.5, "must be a size, not a float"),
    (values.room, "100%", "a disk that is 100% free is empty: must be less than 100%"),
    (values.room, "5", 'bad room \'5\': must be a share like "5%", or a size like "2GB", or ""'),
    (values.room, 0.05, "must be a size, not a float"),
    (values.size, False, "must be a size, not a boolean"),
    (values.size, -1, "must be 0 or more, not -1"),
    (values.size, 10**30, "is too large"),
    (values.size, "9" * 400 + "GB", "is too large"),
    *(
        (values.size, word, f'bad size {word!r}: give an integer of bytes, or "512KB", "50MB", "2GB"')
        for word in ("", "50", "50M", "50mb", "50 MB", "50MiB", "-1KB")
    ),
    (values.mode, 660, "must be between 0 and 0o777, not 660 (0o1224); did you mean 0o660?"),
    (values.mode, 999, "must be between 0 and 0o777, not 999 (0o1747)"),
    (values.mode, -1, "must be 0 or more, not -1"),
    (values.signal_number, "TREM", "unknown signal 'TREM'; did you mean 'TERM'?"),
    (values.signal_number, 15, 'must be a signal name like "TERM", not an integer'),
    (values.exit_code, 256, "must be between 0 and 255, not 256 (a signal is given by its name)"),
    (values.exit_code, True, "must be an exit status or a signal name, not a boolean"),
    (
        values.reload,
        "overlop",
        (
            'must be "overlap", "restart", like "signal:HUP", or a command as an array, not \'overlop\''
            "; did you mean 'overlap'?"
        ),
    ),
    (values.canary, "", 'must be like "10% for 2m", not \'\''),
    (values.canary, "10% 2m", 'must be like "10% for 2m", not \'10% 2m\''),
    (values.canary, "0.1", 'bad share \'0.1\': must be like "10%" or "2.5%"'),
    (values.canary, "100%", "must be less than 100%, not 100%: somebody must still meet the process before"),
    (values.canary, "10% for 0s", "must be more than 0"),
    (values.reload, [], "a command is an array of strings, and not empty"),
    (values.reload, [1], "a command is an array of strings, and not empty"),
    (values.reload, "signal:", "unknown signal ''"),
    (values.name, "", "bad name '': a name has only letters, digits, '.', '_' and '-'"),
    (values.name, "a:1", "bad name 'a:1': a name has only letters, digits, '.', '_' and '-'"),
    (values.name, "é", "bad name 'é': a name has only letters, digits, '.', '_' and '-'"),
    (values.name, "a\n", "bad name 'a\\n': a name has only letters, digits, '.', '_' and '-'"),
    (values.name, "-f", "bad name '-f': it would look like an option of procmanctl"),
    (values.name, "all", "'all' can't be a name: procmanctl means every program by it"),
    (values.name, "a" * 101, "bad name: it is longer than 100 characters"),
    (values.title, "a\nb", "must not hold control characters"),
    (values.words, "a 'b", "can't be split into words: no closing quotation"),
    (values.pattern, "(", "bad regular expression: missing ), unterminated subpattern at position 0"),
    (values.url_path, "health", "bad path 'health': must begin with '/' and have only printable ASCII without spaces"),
    (values.url_path, "/a b", "bad path '/a b': must begin with '/' and have only printable ASCII without spaces"),
    (values.url, "http://", "bad URL 'http://': must be like \"http://127.0.0.1:8000/healthz\""),
    (values.url, "http://a@b/", "bad URL 'http://a@b/': must be like \"http://127.0.0.1:8000/healthz\""),
    (values.url, "http://h:99999/", "bad address 'h:99999': a port is between 1 and 65535"),
    (values.account_name, True, "must be a name or a number, not a boolean"),
    (values.variable, 8, 'must be a string, not an integer: write "8"'),
    (values.variable, True, 'must be a string, not a boolean: write "true"'),
    (values.variable_name, "A=B", "can't name an environment variable"),
    (values.server_option, {}, "must be a boolean, a number, a string or an array of them, not a table"),
]

ADDRESSES: list[tuple[str, Address, str]] = [
    ("127.0.0.1:8000", Address("tcp", host="127.0.0.1", port=8000), "127.0.0.1:8000"),
    (":80", Address("tcp", port=80), ":80"),
    ("[::1]:80", Address("tcp", host="::1", port=80), "[::1]:80"),
    ("[0:0::0:1]:80", Address("tcp", host="::1", port=80), "[::1]:80"),
    ("[::]:80", Address("tcp", host="::", port=80), "[::]:80"),
    ("LocalHost:80", Address("tcp", host="localhost", port=80), "localhost:80"),
    ("web-1.example:65535", Address("tcp", host="web-1.example", port=65535), "web-1.example:65535"),
    ("unix:/run/x.sock", Address("unix", path="/run/x.sock"), "unix:/run/x.sock"),
    ("unix:x.sock", Address("unix", path="/etc/procman/x.sock"), "unix:/etc/procman/x.sock"),
    ("unix:../a:b", Address("unix", path="/etc/a:b"), "unix:/etc/a:b"),
]

BAD_ADDRESSES: list[tuple[object, str]] = [
    (8000, "must be a string, not an integer"),
    ("", "must not be empty"),
    ("8000", 'bad address \'8000\': must be like "127.0.0.1:8000", "[::1]:8000", ":8000" or "unix:/path"'),
    ("host:", "bad address 'host:': '' is no port number"),
    ("host:http", "bad address 'host:http': 'http' is no port number"),
    ("host:+80", "bad address 'host:+80': '+80' is no port number"),
    (":0", "bad address ':0': a port is between 1 and 65535"),
    (":65536", "bad address ':65536': a port is between 1 and 65535"),
    (":000000080" + "9" * 5, "bad address ':00000008099999': a port is between 1 and 65535"),
    (":" + "0" * 8 + "1" * 5000, f"bad address ':{'0' * 8}{'1' * 5000}': a port is between 1 and 65535"),
    (":" + "9" * 5000, f"bad address ':{'9' * 5000}': a port is between 1 and 65535"),
    ("::1:80", "bad address '::1:80': an IPv6 address stands in brackets, like \"[::1]:8000\""),
    ("[x]:80", "bad address '[x]:80': 'x' is no IPv6 address"),
    ("1.2.3:80", "bad address '1.2.3:80': '1.2.3' is no IPv4 address"),
    ("256.0.0.1:80", "bad address '256.0.0.1:80': '256.0.0.1' is no IPv4 address"),
    ("*:80", "bad address '*:80': write \":80\" for all addresses"),
    ("a b:80", "bad address 'a b:80': 'a b' is no host name"),
    ("unix:", "must not be empty"),
    ("unix:@x", "abstract sockets are not supported: give a path"),
    ("unix:/" + "x" * 107, f"the path of the socket has 108 bytes; Linux allows 107: /{'x' * 107}"),
    ("unix:/" + "x" * 106, f"the path of the socket has 107 bytes; 106 are possible here: /{'x' * 106}"),
    ("unix:/" + "é" * 54, f"the path of the socket has 109 bytes; Linux allows 107: /{'é' * 54}"),
]

OVERLAPS = [
    ("127.0.0.1:80", "127.0.0.1:80", True),
    ("127.0.0.1:80", "127.0.0.1:81", False),
    ("127.0.0.1:80", "127.0.0.2:80", False),
    ("127.0.0.1:80", ":80", True),
    ("127.0.0.1:80", "0.0.0.0:80", True),
    ("127.0.0.1:80", "[::]:80", False),
    ("[::1]:80", "[::]:80", True),
    ("[::1]:80", "0.0.0.0:80", False),
    ("[::1]:80", ":80", True),
    ("[::]:80", "0.0.0.0:80", False),  # procman binds [::] for IPv6 alone
    ("localhost:80", "127.0.0.1:80", True),
    ("localhost:80", "[::1]:80", False),  # and localhost as IPv4
    ("shop.example:80", "127.0.0.1:80", False),
    ("shop.example:80", "0.0.0.0:80", True),
    ("unix:/a", "unix:/a", True),
    ("unix:/a", "unix:/b", False),
    ("unix:/a", ":80", False),
]

NAMES = {"program": "shop", "here": "/etc/procman", "log_dir": "/var/log/procman"}
ENVIRON = {"HOME": "/home/ann", "EMPTY": "", "here": "elsewhere", "instance": "not procman's"}

EXPANSIONS = [
    ("plain", "plain"),
    ("${HOME}/x", "/home/ann/x"),
    ("${EMPTY}", ""),
    ("${EMPTY:-d}", "d"),
    ("${NONE:-d e}", "d e"),
    ("${NONE:-}", ""),
    ("${HOME:-d}", "/home/ann"),
    ("${here}", "/etc/procman"),
    ("${env:here}", "elsewhere"),
    ("${env:NONE:-x}", "x"),
    ("${log_dir}/${program}.log", "/var/log/procman/shop.log"),
    ("${instance:-1}", "1"),
    ("$$", "$"),
    ("$${HOME}", "${HOME}"),
    ("$$$$", "$$"),
    ("ready$", "ready$"),
    ("$HOME $1 a$b", "$HOME $1 a$b"),
]

BAD_EXPANSIONS = [
    ("${NONE}", "undefined variable 'NONE'"),
    ("${HOMES}", "undefined variable 'HOMES'; did you mean 'HOME'?"),
    ("${log_dri}", "undefined variable 'log_dri'; did you mean 'log_dir'?"),
    ("${instance}", "'${instance}' has no meaning here"),
    ("${env:program}", "undefined variable 'program'"),
    ("${HOME", "'${HOME' has no closing brace (a plain dollar sign before a brace is '$$')"),
    ("${}", "bad variable '${}': must be like ${NAME}, ${NAME:-default} or ${env:NAME}"),
    ("${1}", "bad variable '${1}': must be like ${NAME}, ${NAME:-default} or ${env:NAME}"),
    ("${A:-${B}}", "bad variable '${A:-${B}': must be like ${NAME}, ${NAME:-default} or ${env:NAME}"),
    ("${A-b}", "bad variable '${A-b}': must be like ${NAME}, ${NAME:-default} or ${env:NAME}"),
]


@pytest.mark.parametrize(("convert", "raw", "expected"), GOOD)
def test_what_is_written_has_its_meaning(convert: Callable[[object], object], raw: object, expected: object) -> None:
    assert convert(raw) == expected


@pytest.mark.parametrize(("convert", "raw", "message"), BAD)
def test_what_is_wrong_is_said(convert: Callable[[object], object], raw: object, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        convert(raw)
    assert str(caught.value) == message


@pytest.mark.parametrize(("written", "expected", "shown"), ADDRESSES)
def test_an_address(written: str, expected: Address, shown: str) -> None:
    address = values.address(written, "/etc/procman")
    assert (address, str(address)) == (expected, shown)


@pytest.mark.parametrize(("written", "message"), BAD_ADDRESSES)
def test_what_is_no_address(written: object, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        values.address(written, "/etc/procman")
    assert str(caught.value) == message


SYSLOGS = [
    ("unix:/run/log", "unix:/run/log"),
    ("unix:log", "unix:/etc/procman/log"),
    ("udp:192.0.2.1:514", "udp:192.0.2.1:514"),
    ("udp:[2001:DB8::1]:514", "udp:[2001:db8::1]:514"),
]
MUST = 'must be like "unix:/run/syslog.sock" or "udp:192.0.2.1:514"'
IP = "must name an IP address, for no name is looked up while output waits"
BAD_SYSLOGS = [
    ("/dev/log", f"bad address '/dev/log': {MUST}"),
    ("tcp:192.0.2.1:514", f"bad address 'tcp:192.0.2.1:514': {MUST}"),
    ("udp:logs.example:514", f"bad address 'udp:logs.example:514': {IP}"),
    ("udp::514", f"bad address 'udp::514': {IP}"),
    ("udp:unix:/x", f"bad address 'udp:unix:/x': {IP}"),
    ("udp:192.0.2.1", f"bad address 'udp:192.0.2.1': {MUST}"),
    ("udp:192.0.2.1:99999", "bad address '192.0.2.1:99999': a port is between 1 and 65535"),
]


@pytest.mark.parametrize(("written", "expected"), SYSLOGS)
def test_where_syslog_is(written: str, expected: str) -> None:
    assert values.syslog_address(written, "/etc/procman") == expected


@pytest.mark.parametrize(("written", "message"), BAD_SYSLOGS)
def test_where_no_syslog_is(written: str, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        values.syslog_address(written, "/etc/procman")
    assert str(caught.value) == message


@pytest.mark.parametrize(("one", "other", "expected"), OVERLAPS)
def test_two_addresses_of_which_only_one_can_be_bound(one: str, other: str, expected: bool) -> None:
    a, b = values.address(one, "/"), values.address(other, "/")
    assert (values.overlap(a, b), values.overlap(b, a)) == (expected, expected)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (":80", "127.0.0.1:80", True),
        ("127.0.0.1:80", ":80", False),
        (":80", "0.0.0.0:80", True),
        ("0.0.0.0:80", ":80", False),
        ("0.0.0.0:80", "127.0.0.1:80", True),
        ("0.0.0.0:80", "[::1]:80", False),
        ("127.0.0.1:80", "127.0.0.1:80", True),
        (":81", "127.0.0.1:80", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/b", False),
    ],
)
def test_an_address_that_contains_another_one(wide: str, narrow: str, expected: bool) -> None:
    assert values.covers(values.address(wide, "/"), values.address(narrow, "/")) == expected


@pytest.mark.parametrize(("written", "expected"), EXPANSIONS)
def test_variables_are_replaced(written: str, expected: str) -> None:
    assert values.expand(written, NAMES, ENVIRON) == expected


@pytest.mark.parametrize(("written", "message"), BAD_EXPANSIONS)
def test_a_bad_variable_is_named(written: str, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        values.expand(written, NAMES, ENVIRON)
    assert str(caught.value) == message


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_doubled_dollars_give_any_text_back(text: str) -> None:
    assert values.expand(text.replace("$", "$$"), {}, {}) == text


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(), st.text())
def test_the_value_of_a_variable_is_not_read_again(before: str, value: str) -> None:
    written = before.replace("$", "$$") + "${V}"
    assert values.expand(written, {}, {"V": value}) == before + value


@pytest.mark.parametrize(
    ("written", "expected"),
    [(".", "/etc/p"), ("a/../b", "/etc/p/b"), ("/x//y/", "/x/y"), ("//x", "/x"), ("../..", "/")],
)
def test_a_path_starts_at_its_folder(written: str, expected: str) -> None:
    assert values.path(written, "/etc/p") == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        *((address, "localhost:80") for address in (":80", "0.0.0.0:80", "[::]:80")),
        *((address, address) for address in ("[::1]:80", "127.0.0.1:81", "shop.example:80")),
        ("unix:/x", "localhost"),
    ],
)
def test_the_host_header_of_a_probe(written: str, expected: str) -> None:
    assert values.host_header(values.address(written, "/")) == expected


def test_no_near_word_is_looked_for_where_it_takes_long() -> None:
    assert values.suggestion("x" * 201, ["x" * 200]) == ""
    assert values.suggestion("stauts", ["status"]) == "; did you mean 'status'?"

"""The wire: what lines mean, and that no line can do harm."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import rpc
from procman.errors import (
    ConfigError,
    Failed,
    NoSuchProgram,
    NotAllowed,
    Problem,
    ProcmanError,
    Unreachable,
    WrongUse,
)
from procman.methods import METHODS, bind
from procman.rpc import Answer, Notification, Request, RpcError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("environ", "uid", "path"),
    [
        ({}, 0, "/run/procman/procman.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/procman/procman.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/procman/procman.sock"),
        ({"XDG_RUNTIME_DIR": "relative"}, 7, "/tmp/procman-7/procman.sock"),
        ({"XDG_RUNTIME_DIR": ""}, 7, "/tmp/procman-7/procman.sock"),
        ({"PROCMAN_SOCKET": "/x"}, 7, "/tmp/procman-7/procman.sock"),
    ],
)
def test_default_socket(environ: dict[str, str], uid: int, path: str) -> None:
    assert rpc.default_socket(environ, uid) == path
    assert rpc.tmp_owner(path) == (7 if path.startswith("/tmp") else None)


@pytest.mark.parametrize("path", ["/tmp/procman-7", "/tmp/procman-x/s", "/tmp/procman-/s", "x/tmp/procman-7/s"])
def test_other_paths_in_tmp_are_nobodys(path: str) -> None:
    assert rpc.tmp_owner(path) is None


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b'{"jsonrpc":"2.0","id":1,"method":"status"}\n', Request("status", {}, 1)),
        (
            b' {"jsonrpc": "2.0", "id": "a", "method": "show", "params": {"name": "x"}} \r\n',
            Request("show", {"name": "x"}, "a"),
        ),
        (b'{"jsonrpc":"2.0","id":null,"method":"status"}', Request("status", {}, None)),
        (b'{"jsonrpc":"2.0","method":"status"}', Request("status", {}, None, silent=True)),
    ],
)
def test_requests(line: bytes, request_: Request) -> None:
    assert rpc.decode(line) == request_


@pytest.mark.parametrize(
    ("line", "number", "request_id", "words"),
    [
        (b"", -32700, None, "no JSON"),
        (b"status\n", -32700, None, "no JSON"),
        (b'{"jsonrpc":"2.0"', -32700, None, "no JSON"),
        (b'\xff\xfe{"jsonrpc":"2.0"}', -32700, None, "no JSON"),
        (b"[" * 500_000, -32700, None, "no JSON"),
        (b"9" * 10_000, -32700, None, "no JSON"),
        (b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"y":NaN}}', -32700, None, "no JSON"),
        (b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"y":1e999}}', -32700, None, "no JSON"),
        (b"1", -32600, None, "one JSON object a line"),
        (b'[{"jsonrpc":"2.0","id":1,"method":"status"}]', -32600, None, "one JSON object a line"),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"status"}', -32600, None, "id must be"),
        (b'{"jsonrpc":"2.0","id":true,"method":"status"}', -32600, None, "id must be"),
        (b'{"jsonrpc":"2.0","id":[],"method":"status"}', -32600, None, "id must be"),
        (b'{"jsonrpc":"1.0","id":7,"method":"status"}', -32600, 7, "jsonrpc must be"),
        (b'{"id":7,"method":"status"}', -32600, 7, "jsonrpc must be"),
        (b'{"jsonrpc":"2.0","id":7}', -32600, 7, "method must be a string"),
        (b'{"jsonrpc":"2.0","id":7,"method":3}', -32600, 7, "method must be a string"),
        (b'{"jsonrpc":"2.0","id":7,"method":"status","parms":{}}', -32600, 7, "unknown member 'parms'"),
        (b'{"jsonrpc":"2.0","id":"q","method":"status","params":["shop"]}', -32602, "q", "params must be an object"),
        (b'{"jsonrpc":"2.0","id":"q","method":"status","params":null}', -32602, "q", "params must be an object"),
    ],
)
def test_wrong_requests(line: bytes, number: int, request_id: rpc.Id, words: str) -> None:
    with pytest.raises(RpcError, match=words) as caught:
        rpc.decode(line)
    assert (caught.value.number, caught.value.id) == (number, request_id)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_line_raises_anything_else(line: bytes) -> None:
    for decode in (rpc.decode, rpc.decode_reply):
        try:
            decode(line)
        except RpcError as error:
            assert b"\n" not in rpc.encode_error(error.id, error)[:-1]


@given(
    st.text(),
    st.dictionaries(st.text(), json_values, max_size=5),
    st.text() | st.integers() | st.none(),
    st.booleans(),
)
def test_requests_come_back(method: str, params: dict[str, Any], request_id: rpc.Id, silent: bool) -> None:
    sent = Request(method, params, None if silent else request_id, silent)
    line = rpc.encode_request(sent)
    assert line.count(b"\n") == 1
    assert rpc.decode(line) == sent


@given(st.integers() | st.text() | st.none(), json_values)
def test_results_come_back(request_id: rpc.Id, result: Any) -> None:
    line = rpc.encode_result(request_id, result)
    assert line.count(b"\n") == 1
    assert rpc.decode_reply(line) == Answer(request_id, result)


def test_lone_surrogates_are_escaped() -> None:
    line = rpc.encode_result(1, "/tmp/\udcff")  # a file name that is no UTF-8, as Python holds it
    line.decode()
    assert rpc.decode_reply(line) == Answer(1, "/tmp/\udcff")


def test_text_is_not_escaped() -> None:
    assert "Grüße 世界" in rpc.encode_notification("log", rpc.log_params("shop", "out", "Grüße 世界".encode())).decode()


def test_results_that_are_no_json_raise() -> None:
    for result in (float("nan"), {1, 2}, object()):
        with pytest.raises((TypeError, ValueError)):
            rpc.encode_result(1, result)


@pytest.mark.parametrize(
    "error",
    [
        Failed("it died", hint="procmanctl why shop"),
        WrongUse("no"),
        NoSuchProgram("no such program: 'x'", hint="h"),
        NotAllowed("no"),
        Unreachable("no"),
        ProcmanError("hm"),
        ConfigError([Problem("b.toml", 3, "program.x", "unknown key"), Problem("a.toml", 0, "", "missing")]),
    ],
)
def test_errors_come_back(error: ProcmanError) -> None:
    answer = rpc.decode_reply(rpc.encode_error("id", error))
    assert isinstance(answer, Answer)
    assert answer.error is not None
    back = answer.error
    assert (type(back), str(back), back.hint, back.exit_status) == (
        type(error),
        str(error),
        error.hint,
        error.exit_status,
    )
    if isinstance(error, ConfigError):
        assert isinstance(back, ConfigError)
        assert back.problems == error.problems


def test_protocol_errors_come_back() -> None:
    answer = rpc.decode_reply(rpc.encode_error(None, RpcError(rpc.INVALID_PARAMS, "wrong")))
    assert isinstance(answer, Answer)
    assert isinstance(answer.error, RpcError)
    assert (answer.error.number, answer.error.exit_status) == (-32602, 2)


def test_a_bug_of_the_daemon_is_no_wrong_use() -> None:
    answer = rpc.decode_reply(rpc.encode_error(1, RpcError(rpc.INTERNAL, "oops")))
    assert isinstance(answer, Answer)
    assert answer.error is not None
    assert (answer.error.code, answer.error.exit_status) == ("internal", 1)


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","id":1}',
        b'{"id":1,"result":2}',
        b'{"jsonrpc":"2.0","method":1}',
        b'{"jsonrpc":"2.0","method":"log","params":[]}',
    ],
)
def test_wrong_replies(line: bytes) -> None:
    with pytest.raises(RpcError):
        rpc.decode_reply(line)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("text", RpcError),
        ({"code": -32000}, RpcError),
        ({"code": -32000, "message": "m"}, Failed),
        ({"code": -32000, "message": "m", "data": {"code": "from-the-future"}}, Failed),
        ({"code": -32000, "message": "m", "data": {"code": "config", "problems": [1]}}, Failed),
        ({"code": -32099, "message": "m"}, RpcError),
    ],
)
def test_strange_errors(error: object, kind: type[ProcmanError]) -> None:
    answer = rpc.decode_reply(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}).encode())
    assert isinstance(answer, Answer)
    assert type(answer.error) is kind


@given(st.binary() | st.text().map(str.encode))
def test_log_bytes_come_back(data: bytes) -> None:
    notification = rpc.decode_reply(rpc.encode_notification("log", rpc.log_params("shop", "out", data)))
    assert isinstance(notification, Notification)
    assert rpc.log_bytes(notification.params) == data


@pytest.mark.parametrize("params", [{}, {"text": 1}, {"data": "a"}, {"data": None}])
def test_log_without_bytes(params: rpc.Object) -> None:
    with pytest.raises(RpcError):
        rpc.log_bytes(params)


# --- the docstring is the specification


def examples(arrow: str) -> list[str]:
    doc = inspect.getdoc(rpc) or ""
    blocks = re.findall(rf"^    {arrow} (.*(?:\n         .*)*)", doc, re.MULTILINE)
    return [re.sub(r"\n +", "", block) for block in blocks]


def test_the_docstring_shows_each_method_as_it_is() -> None:
    shown = [rpc.decode(line.encode()) for line in examples("-->")]
    assert {request.method for request in shown} == METHODS.keys()
    for request in shown:
        bind(METHODS[request.method], request.params)  # raises when a param is wrong
        assert rpc.encode_request(request).decode().rstrip() in examples("-->")


def test_the_docstring_shows_answers_as_they_are() -> None:
    replies = [rpc.decode_reply(line.encode()) for line in examples("<--")]
    said = {reply.method for reply in replies if isinstance(reply, Notification)}
    assert said == {"progress", "sources", "log", "event"}
    status = next(reply for reply in replies if isinstance(reply, Answer) and reply.id == 1)
    assert tuple(status.result[0]) == rpc.PROCESS_FIELDS
    errors = [reply.error for reply in replies if isinstance(reply, Answer) and reply.error]
    assert [type(error) for error in errors] == [RpcError, NoSuchProgram]


def test_files_of_logs_have_names_that_are_read_back() -> None:
    for name, head in ((rpc.file_id(1, 2), (0, 0)), (rpc.file_id(1, 2, b"abc"), (3, 0x352441C2))):
        assert rpc.is_file_id(name)
        assert (rpc.file_of(name), rpc.head_of(name)) == ((1, 2), head)
    assert not rpc.is_file_id("1:2:3")


def test_many_control_characters_are_no_text() -> None:
    """JSON writes each as six bytes: a hole in a log must not cost the daemon so much."""
    text, nothing = b"a\tb\r\n" * 1000 + b"\x1b[31m", b"\0"
    for data, key in ((nothing * 5000, "data"), (text, "text"), (nothing, "text")):
        params = rpc.log_params("shop", "out", data)
        assert key in params
        assert rpc.log_bytes(params) == data

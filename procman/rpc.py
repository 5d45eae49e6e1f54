r"""The wire between `procmanctl` (or any program) and the daemon: JSON-RPC 2.0, one message a line, UTF-8, Unix socket.

Pure: bytes to messages and back. It knows neither sockets nor what the methods do; `server.METHODS` does.

A line is at most MAX_REQUEST bytes. Requests on one connection are answered in their order; open a second connection to
do two things at once. While a call is at work, the daemon may send notifications that belong to it. `--> ` is sent by
the client, `<-- ` by the daemon (long messages are broken here, never on the wire). NAME is a process ("shop:1"), a
program ("shop": all its processes), a group, or "all".

Looking:

    --> {"jsonrpc":"2.0","id":1,"method":"status","params":{"names":["shop"]}}
    <-- {"jsonrpc":"2.0","id":1,"result":[{"name":"shop:1","program":"shop","instance":1,"groups":["web"],
         "state":"RUNNING","wanted":"up","ready":true,"health":null,"pid":4711,"started_at":"2030-01-31T12:00:00.000Z",
         "uptime_seconds":62.5,"restarts":0,"cpu_percent":1.5,"memory_bytes":41943040,"exit":null,"why":"autostart",
         "setback":null,"beside":null,"scale":{"number":1,"min":0,"max":4,"idle":false},"behind":[],
         "output":{"read":1024,"written":1024,"dropped":0,"error":""}}]}
    --> {"jsonrpc":"2.0","id":18,"method":"status","params":{"names":["shop:1"],"workers":true}}
    <-- {"jsonrpc":"2.0","id":18,"result":[{"name":"shop:1","state":"RUNNING","workers":{"problem":null,
         "list":[{"pid":4711,"busy":true,"requests":1234,"in_flight":1,"queue":0,"threads":4,"average_seconds":0.012,
         "heartbeat_seconds":null,"memory_bytes":41943040}],"left_out":0,
         "listen":[{"name":"web","address":"127.0.0.1:8000","queue":0,"backlog":2048}]}}]}
    --> {"jsonrpc":"2.0","id":2,"method":"show","params":{"name":"shop:1"}}
    <-- {"jsonrpc":"2.0","id":2,"result":{"name":"shop:1","state":"RUNNING","definition":{"argv":["python","shop.py"]},
         "log":[{"stream":"out","path":"/var/log/procman/shop.log","read":1024,"written":1024,"dropped":0,"rotations":0,
         "error":""}],"samples":[[1895572800.0,1.5,41943040]],"processes":[{"pid":4711,"command":"python shop.py",
         "memory_bytes":41943040}]}}
    --> {"jsonrpc":"2.0","id":3,"method":"why","params":{"name":"blog"}}
    <-- {"jsonrpc":"2.0","id":3,"result":{"name":"blog","state":"BACKOFF","wanted":"up","why":"exit status 1",
         "exit":{"code":1,"at":"2030-01-31T12:00:00.000Z","reason":"exit status 1"},"history":[
         {"at":"2030-01-31T12:00:00.000Z","state":"BACKOFF","why":"exit status 1"}],
         "output":["ModuleNotFoundError: No module named 'blog'"],"traceback":{"exception":"ModuleNotFoundError",
         "message":"No module named 'blog'","text":"Traceback (most recent call last):\n..."}}}
    --> {"jsonrpc":"2.0","id":4,"method":"daemon.status"}
    <-- {"jsonrpc":"2.0","id":4,"result":{"identifier":"procman","version":"0.1.0","keeper_pid":4700,
         "supervisor_pid":4701}}

Operating. The result has one object for each process, when the effect is reached or has failed. `wait` false: at once.
`timeout` is in seconds, null for as long as the table allows:

    --> {"jsonrpc":"2.0","id":5,"method":"start","params":{"names":["all"],"wait":true,"timeout":30}}
    <-- {"jsonrpc":"2.0","method":"progress","params":{"name":"blog","state":"STARTING","why":"start by uid 0"}}
    <-- {"jsonrpc":"2.0","id":5,"result":[{"name":"blog","ok":false,"state":"BACKOFF","why":"exit status 1"}]}
    --> {"jsonrpc":"2.0","id":6,"method":"stop","params":{"names":["shop"]}}
    --> {"jsonrpc":"2.0","id":7,"method":"restart","params":{"names":["shop:1","blog"]}}
    --> {"jsonrpc":"2.0","id":8,"method":"reload","params":{"names":["web"]}}
    --> {"jsonrpc":"2.0","id":19,"method":"reload","params":{"names":["web"],"canary":0.1,"canary_seconds":120}}
    <-- {"jsonrpc":"2.0","id":19,"result":[{"name":"web","ok":true,"state":"RUNNING",
         "why":"reload by uid 0; promoted by uid 0"}]}
    --> {"jsonrpc":"2.0","id":20,"method":"promote","params":{"names":["web"]}}
    --> {"jsonrpc":"2.0","id":21,"method":"rollback","params":{"names":["web"],"wait":false}}
    --> {"jsonrpc":"2.0","id":22,"method":"scale","params":{"name":"shop","number":1,"wait":true,"timeout":null}}
    <-- {"jsonrpc":"2.0","id":22,"result":[{"name":"shop:1","ok":true,"state":"RUNNING","why":"autostart"},
         {"name":"shop:2","ok":true,"state":"STOPPED","why":"scaled down (1 of 2)"}]}
    --> {"jsonrpc":"2.0","id":9,"method":"signal","params":{"signal":"HUP","names":["shop"]}}
    <-- {"jsonrpc":"2.0","id":9,"result":[{"name":"shop:1","ok":true,"state":"RUNNING","why":"autostart"}]}
    --> {"jsonrpc":"2.0","id":10,"method":"daemon.reread"}
    <-- {"jsonrpc":"2.0","id":10,"result":{"added":["new"],"removed":[],"changed":[],"restarted":[],"replaced":[],
         "message":"the table was read again"}}
    --> {"jsonrpc":"2.0","id":17,"method":"apply","params":{"dry_run":true,"previous":false,"wait":true,"timeout":null}}
    <-- {"jsonrpc":"2.0","id":17,"result":[{"name":"web","action":"replace","keys":["environment"],
         "cost":"a successor takes over; no request is lost"}]}
    --> {"jsonrpc":"2.0","id":11,"method":"daemon.reopen_logs"}
    --> {"jsonrpc":"2.0","id":15,"method":"daemon.upgrade"}
    --> {"jsonrpc":"2.0","id":12,"method":"daemon.shutdown"}
    <-- {"jsonrpc":"2.0","id":12,"result":{}}

Streams are notifications; the result comes at their end, and with `follow` never: close the connection. A log's bytes
that are no UTF-8 come as `data`, in base64. `sources` comes first and says whose output can follow:

    --> {"jsonrpc":"2.0","id":13,"method":"logs","params":{"names":["shop"],"lines":10,"follow":false,"stderr":false}}
    <-- {"jsonrpc":"2.0","method":"sources","params":{"sources":[{"name":"shop:1","stream":"out"}]}}
    <-- {"jsonrpc":"2.0","method":"log","params":{"name":"shop:1","stream":"out","text":"GET / 200\n",
         "file":"2049:137","offset":1024}}
    <-- {"jsonrpc":"2.0","method":"log","params":{"name":"shop:1","stream":"out","data":"//4K",
         "file":"2049:137","offset":1027}}
    <-- {"jsonrpc":"2.0","id":13,"result":{}}
    --> {"jsonrpc":"2.0","id":23,"method":"logs.files","params":{"names":["shop"]}}
    <-- {"jsonrpc":"2.0","id":23,"result":{"sources":[{"name":"shop:1","stream":"out",
         "path":"/var/log/procman/shop.log","files":[{"file":"2049:131","path":"/var/log/procman/shop.log.1.gz",
         "bytes":5012,"modified":1895572800.0,"zipped":true,"holds":50120},{"file":"2049:137",
         "path":"/var/log/procman/shop.log","bytes":1024,"modified":1895572860.5,"zipped":false,"holds":1024}]}]}}
    --> {"jsonrpc":"2.0","id":24,"method":"logs.read","params":{"name":"shop:1","file":"2049:137","offset":1000}}
    <-- {"jsonrpc":"2.0","id":24,"result":{"gone":false,"text":"GET /x 200\n"}}
    --> {"jsonrpc":"2.0","id":25,"method":"logs","params":{"names":["shop"],"follow":true,
         "after":[{"name":"shop:1","stream":"out","file":"2049:137","offset":1012}]}}
    --> {"jsonrpc":"2.0","id":14,"method":"events","params":{"follow":true}}
    <-- {"jsonrpc":"2.0","method":"event","params":{"at":"2030-01-31T12:00:00.000Z","type":"state","name":"blog",
         "state":"BACKOFF","why":"exit status 1"}}

Errors. The standard codes: -32700 no JSON, -32600 no request, -32601 no such method, -32602 wrong params, -32603 a bug
of the daemon. procman's own errors are -32000; `data.code` is the stable part (see `errors`), `data.hint` what to do:

    <-- {"jsonrpc":"2.0","id":15,"error":{"code":-32601,"message":"no such method: 'stauts'; did you mean 'status'?"}}
    <-- {"jsonrpc":"2.0","id":16,"error":{"code":-32000,"message":"no such program: 'shpo'",
         "data":{"code":"no-such-program","hint":"procmanctl status lists all"}}}

Source: https://www.jsonrpc.org/specification. Batches (an array of requests) are not taken: send one a line.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import ConfigError, Problem, ProcmanError, from_code

MAX_REQUEST = 1024 * 1024
"""Bytes of the longest request line, its newline included."""

PARSE_ERROR, INVALID_REQUEST, NO_SUCH_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
OURS = -32000

PROCESS_FIELDS = (
    "name", "program", "instance", "groups", "state", "wanted", "ready", "health", "pid", "started_at",
    "uptime_seconds", "restarts", "cpu_percent", "memory_bytes", "exit", "why", "setback", "beside", "scale",
    "behind", "output",
)  # fmt: skip
"""The keys of every ProcessInfo, in their order: what `status` lists and `show` begins with."""

_ESCAPED = bytes(set(range(32)) - set(b"\t\n\r"))

Object = dict[str, Any]
Id = str | int | None


class RpcError(ProcmanError):
    """A message that breaks the protocol. `number` is the JSON-RPC code, `id` the request's, None where it has none."""

    code = "wrong-use"
    exit_status = 2

    def __init__(self, number: int, message: str, *, request_id: Id = None) -> None:
        super().__init__(message)
        self.number = number
        self.id = request_id


class Request(NamedTuple):
    """A call. With `silent` (JSON-RPC calls it a notification) the caller wants no answer, not even an error."""

    method: str
    params: Object
    id: Id = None
    silent: bool = False


class Peer(NamedTuple):
    """Who calls, as the kernel says: for the event log. `pid` may be long gone."""

    pid: int
    uid: int


class LogSource(NamedTuple):
    """A log that can be read: of process `name`, `stream` "out" or "err", in `path` and what was rotated from it."""

    name: str
    stream: str
    path: str

    @property
    def key(self) -> str:
        """What the log thread calls it."""
        return f"{self.name}/{self.stream}"


class Notification(NamedTuple):
    """Something that the daemon says while a call is at work."""

    method: str
    params: Object


class Answer(NamedTuple):
    """The end of a call: its result, or the error that the other end raised."""

    id: Id
    result: Any = None
    error: ProcmanError | None = None


_TMP_FOLDER = "/tmp/procman-"


def default_socket(environ: Mapping[str, str], uid: int) -> str:
    """Where the daemon of user `uid` listens when nobody says otherwise. $PROCMAN_SOCKET is the caller's matter.

    A relative $XDG_RUNTIME_DIR is ignored, as the XDG Base Directory specification asks.
    """
    if uid == 0:
        return "/run/procman/procman.sock"
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/procman/procman.sock" if runtime.startswith("/") else f"{_TMP_FOLDER}{uid}/procman.sock"


def tmp_owner(path: str) -> int | None:
    """Whose folder a socket lies in when that is the default one in /tmp, None for any other path. Every user can make
    a folder of that name, so who made it, or who listens in it, has to be looked at."""
    found = re.match(rf"{_TMP_FOLDER}([0-9]{{1,10}})/", path)
    return int(found[1]) if found else None


def decode(line: bytes) -> Request:
    """The request that a line holds. Raises RpcError with the code and id to answer."""
    message = _parse(line)
    if not isinstance(message, dict):
        raise RpcError(INVALID_REQUEST, "a request is one JSON object a line")
    request_id = message.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, str | int | None):
        raise RpcError(INVALID_REQUEST, "id must be a string, an integer or null")
    if message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"', request_id=request_id)
    method = message.get("method")
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "method must be a string", request_id=request_id)
    unknown = message.keys() - {"jsonrpc", "id", "method", "params"}
    if unknown:
        raise RpcError(INVALID_REQUEST, f"unknown member {sorted(unknown)[0]!r:.80}", request_id=request_id)
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "params must be an object of named values", request_id=request_id)
    return Request(method, params, request_id, silent="id" not in message)


def decode_reply(line: bytes) -> Notification | Answer:
    """What a line from the daemon holds. Raises RpcError when it is no such message."""
    message = _parse(line)
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, "this is no answer of procman")
    if "method" in message:
        params = message.get("params", {})
        if not isinstance(message["method"], str) or not isinstance(params, dict):
            raise RpcError(INVALID_REQUEST, "this is no notification of procman")
        return Notification(message["method"], params)
    if "error" in message:
        return Answer(message.get("id"), error=_error(message["error"]))
    if "result" not in message:
        raise RpcError(INVALID_REQUEST, "an answer has neither result nor error")
    return Answer(message.get("id"), message["result"])


def encode_request(request: Request) -> bytes:
    """The line of a call."""
    message: Object = {"jsonrpc": "2.0"}
    if not request.silent:
        message["id"] = request.id
    message["method"] = request.method
    if request.params:
        message["params"] = request.params
    return _line(message)


def encode_notification(method: str, params: Object) -> bytes:
    """The line of something said while a call is at work."""
    return _line({"jsonrpc": "2.0", "method": method, "params": params})


def encode_result(request_id: Id, result: object) -> bytes:
    """The line that ends a call well. Raises TypeError or ValueError when `result` can't be written as JSON."""
    return _line({"jsonrpc": "2.0", "id": request_id, "result": result})


def encode_error(request_id: Id, error: ProcmanError) -> bytes:
    """The line that ends a call with an error: procman's own travel with their code and hint."""
    if isinstance(error, RpcError):
        return _line({"jsonrpc": "2.0", "id": request_id, "error": {"code": error.number, "message": str(error)}})
    data: Object = {"code": error.code, "hint": error.hint}
    if isinstance(error, ConfigError):
        data["problems"] = [[p.file, p.line, p.key, p.message] for p in error.problems]
    return _line({"jsonrpc": "2.0", "id": request_id, "error": {"code": OURS, "message": str(error), "data": data}})


def log_params(name: str, stream: str, data: bytes) -> Object:
    """The params of a `log` notification: `data` as text when it is UTF-8, else in base64."""
    return {"name": name, "stream": stream, **log_data(data)}


def log_data(data: bytes) -> Object:
    """Bytes of a log as `text` when they are UTF-8, else as `data` in base64; so are many control characters, which
    JSON writes six times as long."""
    if len(data) > 1024 and len(data) - len(data.translate(None, _ESCAPED)) > len(data) // 8:
        return {"data": binascii.b2a_base64(data, newline=False).decode()}
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"data": binascii.b2a_base64(data, newline=False).decode()}


def log_bytes(params: Object) -> bytes:
    """The bytes that a `log` notification, or the answer of `logs.read`, carries. Raises RpcError when it has none."""
    text, data = params.get("text"), params.get("data")
    try:
        if isinstance(text, str):
            return text.encode("utf-8", "surrogatepass")
        if isinstance(data, str):
            return binascii.a2b_base64(data)
    except (binascii.Error, ValueError):
        pass
    raise RpcError(INVALID_REQUEST, "a log notification carries neither text nor data")


def file_id(device: int, inode: int, head: bytes = b"") -> str:
    """How a file of a log is named: whatever its name is later, it is the same file. `head` are its first bytes: the
    inode of a file that was removed is given to another one soon."""
    return file_name(device, inode, mark(head))


def file_name(device: int, inode: int, head: tuple[int, int]) -> str:
    """As `file_id`, from the `mark` of the first bytes."""
    return f"{device}:{inode}" + (f":{head[0]}:{head[1]}" if head[0] else "")


def mark(head: bytes) -> tuple[int, int]:
    """How many bytes these are, and their CRC-32: what a `file_id` knows of the first bytes of a file."""
    return len(head), binascii.crc32(head)


def is_file_id(text: str) -> bool:
    """Whether `file_of` understands it."""
    return re.fullmatch(r"[0-9]{1,20}:[0-9]{1,20}(:[0-9]{1,4}:[0-9]{1,10})?", text) is not None


def file_of(text: str) -> tuple[int, int]:
    """The reverse of `file_id`: device and inode. Raises ValueError."""
    device, inode, *_ = text.split(":")
    return int(device), int(inode)


def head_of(text: str) -> tuple[int, int]:
    """The `mark` that is in a `file_id`; (0, 0) where there is none."""
    _, _, *head = text.split(":")
    return (int(head[0]), int(head[1])) if head else (0, 0)


def _error(error: object) -> ProcmanError:
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return RpcError(INVALID_REQUEST, "this is no error of procman")
    number, message, data = error.get("code"), error["message"], error.get("data")
    if number == INTERNAL:
        return ProcmanError(message, hint="this is a bug of procman: its own log holds the details")
    if isinstance(number, int) and number != OURS:
        return RpcError(number, message)
    if not isinstance(data, dict):
        return from_code("failed", message)
    if data.get("code") == ConfigError.code:
        try:
            return ConfigError([Problem(str(f), int(line), str(k), str(m)) for f, line, k, m in data["problems"]])
        except (KeyError, TypeError, ValueError):
            pass
    return from_code(str(data.get("code")), message, str(data.get("hint", "")))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):  # bad UTF-8, no JSON, a number of 5,000 digits, 100,000 open brackets
        raise RpcError(PARSE_ERROR, "this is no JSON in UTF-8") from None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is more than a double holds")  # it could not be written again
    return number


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # json.loads takes NaN and Infinity, RFC 8259 does not


def _line(message: Object) -> bytes:
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is no UTF-8 holds lone surrogates: JSON can say them only escaped
        return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"

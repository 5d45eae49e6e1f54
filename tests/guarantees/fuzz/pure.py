"""What only turns bytes into values: the RPC framing, the keeper's wire, the program table and its values, the state
file, and what the keeper holds in memory. No process is needed, so these get most of the inputs.

Each check takes the bytes as they would come, and fails for any exception but the documented one, and for a result
that could not have been meant.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import functools
import json
import logging
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from procman import (
    change,
    interim,
    kept,
    legacy,
    lifecycle,
    recall,
    report,
    rollout,
    rpc,
    servers,
    snapshot,
    statefile,
    store,
    supervisor,
    table,
    takeover,
    values,
    workload,
)
from procman.config import Address, Config, Daemon, Listener, Log, Program
from procman.ctl import tables as drawn_tables
from procman.errors import ConfigError, Failed, ProcmanError
from procman.ground import counters_from
from procman.keeper import asked, handover
from procman.keeper.wire import HEADER, MAX_DESCRIPTORS, Wire, WireError
from procman.kept import Kept
from procman.lifecycle import State, Status
from procman.logs import Counters
from procman.methods import METHODS
from procman.moments import rfc3339
from procman.orphans import known_children
from procman.rpc import Answer, Notification, Request, RpcError
from tests.guarantees.fuzz.inputs import damaged, dumped, junk, touched
from tests.guarantees.fuzz.run import Check, nothing_left_open
from tests.harness import PROJECT
from tests.test_table import MAIN, Paper

CODES = {rpc.PARSE_ERROR, rpc.INVALID_REQUEST, rpc.INVALID_PARAMS}

# --- the RPC framing ------------------------------------------------------------------------------------------------

REQUESTS: list[Any] = [
    {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    for method in METHODS
    for params in ({}, {"names": ["shop"], "wait": False}, {"names": ["shop"], "lines": 3, "signal": "HUP"})
]
REPLIES: list[Any] = [
    {"jsonrpc": "2.0", "id": 1, "result": [{"name": "shop"}]},
    {"jsonrpc": "2.0", "method": "log", "params": {"name": "shop", "stream": "out", "data": "//4K"}},
    {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "m", "data": {"code": "failed", "hint": "h"}}},
    {
        "jsonrpc": "2.0",
        "id": "x",
        "error": {"code": -32000, "message": "m", "data": {"code": "config", "problems": [["f", 1, "k", "m"]]}},
    },
]


def rpc_lines() -> st.SearchStrategy[bytes]:
    lines = [*map(dumped, REQUESTS), *map(dumped, REPLIES)]
    return st.one_of(damaged([*REQUESTS, *REPLIES]).map(dumped), touched(lines), junk().map(dumped))


def check_rpc(line: bytes) -> None:
    """What a daemon does with a line, and what a client does with it."""
    try:
        request = rpc.decode(line)
    except RpcError as error:
        assert error.number in CODES, error.number
        answer = rpc.decode_reply(rpc.encode_error(error.id, error))
        assert isinstance(answer, Answer)
        assert answer.id == error.id
    else:
        assert type(request.method) is str
        assert type(request.params) is dict
        assert _same(rpc.decode(rpc.encode_request(request)), request)
    try:
        reply = rpc.decode_reply(line)
    except RpcError:
        return
    if isinstance(reply, Notification):
        with contextlib.suppress(RpcError):
            assert type(rpc.log_bytes(reply.params)) is bytes
    else:
        assert reply.error is None or isinstance(reply.error, ProcmanError)
        str(reply.error)


def _same(one: Request, other: Request) -> bool:
    """1e999 is read as infinity, which can't be written: such a request is not written again."""
    return one == other or json.dumps(one) == json.dumps(other)


# --- the keeper's wire ----------------------------------------------------------------------------------------------

MESSAGES: list[Any] = [
    {"op": "hello", "pid": 1, "starts": 2, "last": "", "cgroup": "", "version": "1", "upgrades": 0, "upgrading": False},
    {"op": "held", "name": "listener/web"},
    {"op": "spawned", "child": "a#1", "pid": 4711, "at": 1.5, "start": 12, "tag": 99},
    {"op": "hold", "names": ["log/a/out/r", "log/a/out/w"]},
]

Packets = list[tuple[bytes, int]]
"""What one side sends: bytes, with so many descriptors."""


def packet(message: bytes, count: int) -> bytes:
    return HEADER.pack(len(message) & 0xFFFFFFFF, count & 0xFF) + message


def packets() -> st.SearchStrategy[Packets]:
    body = st.one_of(damaged(MESSAGES, 1).map(dumped), touched(list(map(dumped, MESSAGES))), st.binary(max_size=20))
    counts = st.sampled_from((0, 0, 0, 1, 2, MAX_DESCRIPTORS, MAX_DESCRIPTORS + 1, 255))
    whole = st.builds(lambda b, told, sent: (packet(b, told), sent), body, counts, st.sampled_from((0, 0, 1, 2, 16)))
    honest = st.builds(lambda b, count: (packet(b, count), count), body, st.integers(0, 3))
    raw = st.tuples(touched([packet(dumped(message), 0) for message in MESSAGES]), st.sampled_from((0, 0, 1)))
    return st.lists(st.one_of(honest, honest, whole, raw), max_size=6)


def check_wire(sent: Packets) -> None:
    """The real socket pair. What is taken in is messages with as many descriptors as they say, or a WireError; nothing
    stays open behind it."""
    with nothing_left_open():
        ours, theirs = socket.socketpair()
        wire = Wire(ours)
        try:
            for data, count in sent:
                if data:
                    socket.send_fds(theirs, [data], [2] * count) if count else theirs.sendall(data)
                for message, descriptors in wire.receive():
                    assert type(message) is dict
                    for fd in descriptors:
                        os.close(fd)
                pending = len(wire._descriptors)
                assert pending <= (MAX_DESCRIPTORS if wire._in else 0), f"{pending} descriptors wait for no message"
        except WireError:
            pass
        finally:
            theirs.close()
            wire.close()


# --- the program table ----------------------------------------------------------------------------------------------

TABLES = [
    path.read_bytes()
    for folder in (PROJECT / "etc", PROJECT / "tests" / "golden")
    for path in sorted(folder.rglob("*.toml"))
]
TOML_WORDS = (
    *("1s", "10MB", "TERM", "signal:HUP", "127.0.0.1:80", "unix:/x", "[::1]:1", ":1", "http://h/p", "${HOME}", "$${"),
    *("${instance}", "${A:-b}", "root", "no", "wsgi", "gunicorn", "uwsgi", "all", "always", "tree", "(a", "a*", "~"),
)
TOML_LITERALS = (
    *("true", "0", "-1", "1", "80", "0o644", "1e400", "nan", "-inf", "9" * 20, "1979-05-27", "07:32"),
    "1979-05-27 07:32:00Z",
)


@functools.cache
def toml_values() -> st.SearchStrategy[str]:
    text = st.text(max_size=8).map(lambda raw: json.dumps(raw, ensure_ascii=True).replace("\\ud", "x"))
    words = st.sampled_from(TOML_WORDS).map(json.dumps)
    flat = st.one_of(
        text,
        words,
        words,
        st.sampled_from(TOML_LITERALS),
        st.integers(-(2**64), 2**64).map(str),
    )
    keys = st.sampled_from(("kind", "path", "size", "keep", "bad key")).map(json.dumps)
    inline = st.dictionaries(keys, flat, max_size=2)
    return st.one_of(
        flat,
        flat,
        st.lists(flat, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        inline.map(lambda pairs: "{" + ", ".join(f"{key} = {value}" for key, value in pairs.items()) + "}"),
    )


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """A table of known keys with values of every kind."""
    lines = []
    for section in draw(st.lists(st.sampled_from(sorted(table.KEYS)), max_size=5, unique=True)):
        name = section.replace("program", "program.web").replace("listener", "listener.door")
        lines.append(f"[{name}]" if name else "")
        keys = draw(st.lists(st.sampled_from(table.KEYS[section]), max_size=6, unique=True))
        keys = [key for key in keys if f"{section}.{key}".strip(".") not in table.KEYS]
        lines += [f"{key} = {draw(toml_values())}" for key in keys]
        if section == "program" and "command" not in keys and draw(st.booleans()):
            lines.append('command = "/bin/true"')
    return "\n".join(lines).encode(errors="replace")


def tables() -> st.SearchStrategy[bytes]:
    return st.one_of(structured(), structured(), touched(TABLES))


class OneFile(Paper):
    """The paper machine with a main table of any bytes."""

    def read(self, path: str) -> bytes:
        if path == MAIN:
            return self.main
        return super().read(path)

    main: bytes = b""


def check_table(text: bytes) -> None:
    machine = OneFile({"/etc/procman/conf.d/a.toml": '[program.a]\ncommand = "/bin/true"'})
    object.__setattr__(machine, "main", text)
    try:
        config = table.parse(MAIN, machine)
    except ConfigError as error:
        assert error.problems
        lines = text.count(b"\n") + 1
        for problem in error.problems:
            assert problem.file, problem
            assert problem.message, problem
            assert 0 <= problem.line <= lines or problem.file != MAIN, problem
        return
    assert type(config) is Config
    for listener in config.listeners:
        assert listener.address.kind == "unix" or 0 < listener.address.port < 65536, listener
    for program in config.programs:
        assert program.argv, program
        assert all("\0" not in word for word in program.argv)
        json.dumps(report.definition(program), allow_nan=False)


# --- values ---------------------------------------------------------------------------------------------------------

CONVERTERS: dict[str, Callable[[object], object]] = {
    **{
        name: getattr(values, name)
        for name in (
            *("string", "text", "boolean", "duration", "positive_duration", "size", "mode", "signal_number"),
            *("exit_code", "reload", "name", "title", "words", "pattern", "url", "url_path", "variable_name"),
            *("variable", "server_option", "account_name"),
        )
    },
    "integer": values.integer(1, 9),
    "choice": values.choice(("one", "two")),
    "path": lambda raw: values.path(raw, "/here"),
    "unix_path": lambda raw: values.unix_path(raw, "/here"),
    "optional_path": lambda raw: values.optional_path(raw, "/here"),
    "address": lambda raw: values.address(raw, "/here"),
    "expand": lambda raw: values.expand(str(raw), {"program": "p"}, {"HOME": "/h", "EMPTY": ""}),
    "suggestion": lambda raw: values.suggestion(str(raw), ["status", "restart", "x"]),
    "check_name": lambda raw: values.check_name(str(raw)),
}


WORDS = (
    *("1s", "1.5h", "9" * 400 + "d", "12KB", "9" * 400 + "GB", "SIGTERM", "signal:HUP", "restart", "a b 'c'", "'"),
    *("http://[::1]:80/x?y", "http://h:99999", "h:80", "[::1]:80", "[fe80::1%e]:1", ":000000080" + "9" * 20, "*:80"),
    *(":" + "0" * 8 + "1" * 5000, "1.2.3:4", "unix:@x", "unix:" + "x" * 108, "${A:-${B}}", "$${", "${env:HOME}", "${"),
    *("a" * 100_000, "(?:a{1,9999}){1,9999}", "(" * 200, "[[:alpha:]]", "(?i)a(?x)", "/a b", "/\xe9", "all", "-x"),
)


def converted() -> st.SearchStrategy[tuple[str, object]]:
    """What TOML can give: no number has more than 64 bits, no text a lone surrogate."""
    words = st.sampled_from(WORDS)
    flat = st.one_of(
        words,
        touched([word.encode() for word in ("1.5h", "12KB", "[::1]:80", "http://h:1/x", "${A:-b}", "h.x:80")]).map(
            lambda data: data.decode(errors="replace")
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.booleans(),
        st.just(dt.date(1979, 5, 27)),
    )
    raw = st.one_of(flat, flat, st.lists(flat, max_size=3), st.dictionaries(st.text(max_size=3), flat, max_size=2))
    return st.tuples(st.sampled_from(sorted(CONVERTERS)), raw)


def check_value(drawn: tuple[str, object]) -> None:
    name, raw = drawn
    try:
        found = CONVERTERS[name](raw)
    except values.BadValue as error:
        assert str(error)
        return
    if isinstance(found, tuple):
        found = found[0]
    if isinstance(found, Address):
        assert found.kind == "unix" or 0 < found.port < 65536, found
    if isinstance(found, float):
        assert name == "server_option" or (math.isfinite(found) and found >= 0), found
    if name == "suggestion":
        assert len(str(found)) < 100


# --- the state file -------------------------------------------------------------------------------------------------

RUNNING = Status(
    *(State.RUNNING, True, True, 3, 4711, 100.5, 1.7e9, None, "", 0, 2, None, "autostart")
)
STATUSES = {
    "shop:1": report.status_document(RUNNING),
    "blog": {
        **report.status_document(Status(State.BACKOFF, True, generation=1, deadline=7.5, failures=3)),
        "exit": {"code": 1, "signal": None, "at": 1.7e9, "reason": "exit status 1"},
    },
}
PROGRAMS_BEFORE = Kept(
    {"shop": Program(name="shop", program="shop", argv=("shop",), listen=(":80",))},
    {":80": Listener(name=":80", address=Address("tcp", port=80))},
)
STATE: dict[str, Any] = {
    "version": store.VERSION,
    "boot_id": store.boot_id(),
    "written_at": "2030-01-31T12:00:00+00:00",
    "down": ["web"],
    "replacing": ["blog"],
    "closing": False,
    "exit_status": 0,
    "at": 12.5,
    "keeper": "",
    "processes": STATUSES,
    "logs": {"log/shop:1/out": Counters(read=10, written=10).document()},
    "children": {"shop:1#3": [4711, 12345, (7 << 32) + 3, "tree"]},
    "prints": {"shop:1": "0123"},
    "last": 3,
    "made_by": "0.1.0",
    "pipes": {"log/shop:1/out": 4242},
    "sockets": {"listener/web": [1, 2], "listener/x": None},
    "seconds": ["listener/web"],
    "trials": ["web:1~"],
    "kept": json.loads(json.dumps(PROGRAMS_BEFORE.document())),
    "refused": json.loads(json.dumps(PROGRAMS_BEFORE.document())),
}


def states() -> st.SearchStrategy[bytes]:
    return st.one_of(damaged([STATE], 4).map(dumped), touched([dumped(STATE)]), torn(dumped(STATE)), junk().map(dumped))


def torn(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut off at any byte, or with a hole of zeros, as a power loss leaves it."""
    cut = st.integers(0, len(data))
    holes = st.builds(lambda at, size: data[:at] + bytes(size) + data[at + size :], cut, st.integers(1, 4096))
    encodings = st.sampled_from(("utf-16", "utf-32", "utf-8-sig"))
    return st.one_of(cut.map(lambda at: data[:at]), holes, encodings.map(data.decode().encode))


def check_state_in(folder: str, content: bytes) -> None:
    path = os.path.join(folder, store.STATE_NAME)
    Path(path).write_bytes(content)
    loaded = store.load(path)
    if loaded.document is None:
        assert path in loaded.problem, loaded.problem
        assert "it is kept as" in loaded.problem, loaded.problem
        assert len(loaded.problem) < 2000, "the message grows with the file"
        return
    believed, wrong = statefile.believable(loaded.document)
    assert len(wrong) < 2000, "the message grows with the file"
    judge_state(believed)
    unknown = loaded.document.keys() - statefile.PARTS
    assert wrong or unknown or believed == loaded.document, "left out without a word"


def judge_state(believed: dict[str, Any]) -> None:
    """Written down once more here, by hand: what the rest of the supervisor takes for granted."""
    assert all(type(name) is str for name in believed.get("down", []))
    assert type(believed.get("closing", False)) is bool
    assert 0 <= believed.get("exit_status", 0) <= 255
    assert 0 <= believed.get("last", 0) < 1 << 31
    for document in believed.get("processes", {}).values():
        status = report.status_from(document)
        for at in (status.started_at, status.exit.at if status.exit else 0.0):
            assert rfc3339(at)
        assert status.pid is None or 0 < status.pid <= 1 << 22
        assert 0 <= status.generation < 1 << 63
        assert math.isfinite(status.started)
    for counters in counters_from(believed.get("logs")).values():
        assert all(type(count) in (int, float, str) for count in counters.document().values())
        assert counters.read + counters.unreported >= 0
    children = believed.get("children", {})
    assert len(known_children(believed)) == len(children), "known_children reads all that is believed"
    for known in known_children(believed).values():
        assert 0 < known.tag < 1 << 62, "a tag of 0 is that of every process of the machine"
        assert known.pid >= 0
    for key in ("pipes", "prints", "sockets"):
        assert type(believed.get(key, {})) is dict
    assert all(type(inode) is int for inode in believed.get("pipes", {}).values())


@contextlib.contextmanager
def state_folder() -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as folder, nothing_left_open():
        yield functools.partial(check_state_in, folder)


# --- what the keeper holds in memory --------------------------------------------------------------------------------

PLAN: Any = [
    {"key": "log/a/out", "process": "a", "path": "/tmp/a.log", "log": {**_fields, "path": "/tmp/a.log"}}
    for _fields in [{name: getattr(Log(), name) for name in Log.__dataclass_fields__}]
]
TABLE_MEMORY: Any = {
    "cwd": "/",
    "environ": {"HOME": "/root"},
    "answers": {
        "read": {"/etc/procman.toml": "X>D)"},
        "glob": {"*.toml": ["/etc/a.toml"]},
        "account": {"root": {"name": "root", "uid": 0, "gid": 0, "groups": [0], "home": "/root"}, "x": None},
        "group": {"root": 0, "x": None},
    },
}
HANDOVER: Any = {
    "version": handover.VERSION,
    "cgroup": "",
    "held": {"rpc": 5},
    "children": {
        "house": 7,
        "number": 3,
        "children": [
            {
                **dict.fromkeys(("adopted", "forgotten", "left"), False),
                **dict.fromkeys(("cgroup", "note"), ""),
                **dict.fromkeys(("at", "since"), 1.5),
                **dict.fromkeys(("pid", "session", "start"), 77),
                "kill_tree": True,
                "end": {},
                "id": "a#1",
                "state": "running",
                "report": -1,
                "tag": 7 << 32,
            }
        ],
    },
    "signals": [15],
    "supervisor": {"pid": 12, "wire": 6},
    "starts": 2,
    "upgrades": 1,
    "open_files": [1024, 4096],
    "name": "procmand",
}


def _read_plan(memory: int) -> None:
    for output in interim._read(memory):
        assert (type(output.key), type(output.process), type(output.path)) == (str, str, str)
        assert type(output.log.max_size) is int


def _read_table(memory: int) -> None:
    machine = recall.recall(memory)
    with contextlib.suppress(ConfigError):
        table.parse("/etc/procman.toml", machine)


def _read_handover(memory: int) -> None:
    try:
        document = handover.read(memory)
    finally:
        os.close(memory)
    assert all(type(fd) is int for fd in document["held"].values())
    assert document["supervisor"] is None or type(document["supervisor"]["pid"]) is int
    assert all(type(child["id"]) is str for child in document["children"]["children"])


MEMORIES: dict[str, tuple[Any, Callable[[int], None], type[Exception]]] = {
    "plan": (PLAN, _read_plan, ValueError),
    "table": (TABLE_MEMORY, _read_table, Failed),
    "handover": (HANDOVER, _read_handover, handover.HandoverError),
}


def memories() -> st.SearchStrategy[tuple[str, bytes]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        document = MEMORIES[name][0]
        content = st.one_of(damaged([document]).map(dumped), touched([dumped(document)]), junk().map(dumped))
        return content.map(lambda data: (name, data))

    return st.sampled_from(sorted(MEMORIES)).flatmap(of)


def check_memory(drawn: tuple[str, bytes]) -> None:
    name, content = drawn
    _, read, documented = MEMORIES[name]
    with nothing_left_open():
        memory = os.memfd_create("fuzz")
        os.write(memory, content)
        with contextlib.suppress(documented):
            read(memory)


DAEMON = Daemon(socket="/s", state_dir="/s", log_dir="/l")
KEPT = kept.keep(
    Config(path="/t", files=(), daemon=DAEMON, listeners=(), programs=()),
    (),
    {},
).document()
KEPT_SHOP = kept.Kept(
    {"shop": Program(name="shop", program="shop", argv=("shop",), listen=("web",), environment=(("A", "1"),))},
    {"web": Listener(name="web", address=Address("tcp", "127.0.0.1", 80))},
).document()


def kept_documents() -> st.SearchStrategy[bytes]:
    whole = [dumped(KEPT), dumped(KEPT_SHOP)]
    damage = damaged([KEPT_SHOP, KEPT]).map(dumped)
    return st.one_of(damage, touched(whole), torn(whole[1]), junk().map(dumped))


def check_kept(content: bytes) -> None:
    """Programs that can be in force, or nothing with a reason."""
    with nothing_left_open():
        held = {kept.HELD_NAME: _memory(content), supervisor.STATE: _memory(content)}
        found, problem = legacy.kept_of(held)
        state, unreadable = legacy.state(held)
        assert not held
        assert (state is None) == bool(unreadable)
        assert not (problem and found.programs)
        for name, program in found.programs.items():
            assert (type(program), program.name, type(program.argv[0])) == (Program, name, str)
        table_ = Config(path="/t", files=(), daemon=DAEMON, listeners=(), programs=())
        in_force = found.of(table_)
        there = {listener.name for listener in in_force.listeners}
        assert all(set(program.listen) <= there for program in in_force.programs)


# --- what the supervisor before was about ----------------------------------------------------------------------------

MEANT = base64.b85encode(b'[program.shop]\ncommand = "/bin/true"\n').decode()
OLD = {"half": "stop", "names": ["shop"], "at": 1.7e9}
STOP: Any = {"half": "stop", "why": "SIGHUP", "wanted": ["shop", "web:1"]}
ROLLOUT: Any = {"why": "reload by uid 0", "successors": {"shop": 1}, "firsts": [], "files": {}}
LEGACIES: dict[str, list[Any]] = {
    change.HELD_NAME: [STOP, {"half": "start", "why": "reread by uid 0", "start": {"shop": 3, "web:1": 0}}, OLD],
    change.NEXT_TABLE: [TABLE_MEMORY | {"answers": TABLE_MEMORY["answers"] | {"read": {"/etc/procman.toml": MEANT}}}],
    supervisor.CLOSING: [{"why": "SIGTERM", "exit_status": 3}, {"exit_status": 3}],
    f"{rollout.HELD}shop": [
        ROLLOUT | {"phase": "trial", "firsts": ["listener/web"]},
        ROLLOUT | {"phase": "passed", "firsts": ["listener/b"], "files": {"listener/b": [1, 2]}},
        ROLLOUT | {"phase": "canary", "firsts": ["listener/web"]},
        ROLLOUT | {"phase": "back", "why": "it failed", "firsts": ["listener/web"]},
        {"phase": "over", "successors": {"shop": 3}},
    ],
}
"""By the name under which the keeper holds it: documents of this version, and what another one may have written."""


def legacies() -> st.SearchStrategy[tuple[str, bytes]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        documents = LEGACIES[name]
        whole = [dumped(document) for document in documents]
        content = st.one_of(damaged(documents).map(dumped), touched(whole), torn(whole[0]), junk().map(dumped))
        return content.map(lambda data: (name, data))

    return st.sampled_from(sorted(LEGACIES)).flatmap(of)


def _memory(content: bytes) -> int:
    memory = os.memfd_create("fuzz")
    os.write(memory, content)
    return memory


def _table_of(memory: int) -> change.Read:
    return change.Read(table.parse("/etc/procman.toml", recall.recall(os.dup(memory))), memory)


def check_legacy(drawn: tuple[str, bytes]) -> None:
    """One of them is damaged, the others are good."""
    name, content = drawn
    with nothing_left_open():
        whole = {each: dumped(documents[0]) for each, documents in LEGACIES.items()} | {name: content}
        held = {each: _memory(data) for each, data in whole.items()}
        left = legacy.take(held, _table_of)
        assert not held, "what is left there stays open for ever"
        none = (left.unfinished is None) + (left.ending is None) + (not left.rollouts)
        assert len(left.lost) >= len(left.problems) == none
        for memo_ in left.rollouts.values():
            assert memo_.phase in rollout.PHASES
            assert set(memo_.successors.values()) <= {0, 1}
            assert rollout.passing({"shop": memo_}, ["shop"]).keys() <= {"shop"}
        assert all("set aside" in problem and len(problem) < 3000 for problem in left.problems), left.problems
        if (found := left.unfinished) is not None:
            assert (type(found.why), found.half in ("stop", "start")) == (str, True)
            assert all(type(each) is str for each in (*found.wanted, *found.start))
            assert all(type(number) is int for number in found.start.values())
            assert (found.read is None) == (found.half == "start")
            if found.read is not None:
                assert type(found.read.config) is Config
                os.close(found.read.memory)
        if left.ending is not None:
            assert (type(left.ending.why), type(left.ending.exit_status)) == (str, int)
            assert 0 <= left.ending.exit_status <= 255, "the keeper would refuse that, and start one after another"


# --- the note of a child --------------------------------------------------------------------------------------------

NOTES = [
    *STATUSES.values(),
    report.status_document(Status(State.STARTING, True, alive=True, generation=3, started=5.0, deadline=9.0)),
    report.status_document(Status(State.STOPPING, False, alive=True, generation=3, pid=4711, ending="asked")),
    report.status_document(Status(State.STOPPING, True, alive=False, generation=3, ending="exited")),
]
RECORDS: dict[str, dict[str, Any]] = {
    "running": {"pid": 4711},
    "starting": {"pid": 0},
    "exited": {"pid": 4711, "status": 256, "ended_at": 1.7e9},
    "failed": {"state": "exited", "pid": 0, "step": "exec", "errno": 2, "message": "no such file"},
}
KNOWN = report.status_from(NOTES[0] | {"generation": 2})
"""What the state file says: it is older than the note."""

SHOP = Program(name="shop", program="shop", argv=("shop",))

Noted = tuple[str, bool, bytes]


def notes() -> st.SearchStrategy[Noted]:
    whole = [report.note_of(report.status_from(document)).encode() for document in NOTES]
    old = st.sampled_from([b"ready", b"", b'{"ready":true}', b'"ready"', b"x" * 5000])
    content = st.one_of(damaged(NOTES).map(dumped), touched(whole), torn(whole[0]), junk().map(dumped), old)
    return st.tuples(st.sampled_from(sorted(RECORDS)), st.booleans(), content)


def check_note(drawn: Noted) -> None:
    """A successor takes the child up as what it is, whatever was noted with it, and can go on from there."""
    kind, leaving, content = drawn
    told = {"op": "child", "child": "shop#3", "state": kind, "at": 1.7e9, "since": 1.5, "left": False, "start": 12}
    text = content.decode(errors="surrogateescape")
    record = snapshot.about_child(told | {"tag": 7 << 32, "note": text} | RECORDS[kind])
    said: list[str] = []

    def keep(line: logging.LogRecord) -> bool:
        said.append(line.getMessage())
        return False

    takeover.log.addFilter(keep)
    try:
        found = takeover.status(SHOP, KNOWN, {3: record}, 100.0, leaving=leaving)
    finally:
        takeover.log.removeFilter(keep)
    noted = report.noted(record)
    assert len(said) == (bool(text) and (noted is None or noted.generation != 3)), "set aside without a word, or not"
    assert found.generation == 3, "the keeper has this child: there is no other"
    if kind in ("running", "starting"):
        assert found.alive, found
        assert found.pid in (None, record["pid"] or None), found
    assert not (leaving and found.wanted)
    assert found.deadline is None or found.deadline <= 100.0 + 3600, "a timer for ever"
    for event in events_for(found, kind):
        found, _ = lifecycle.step(SHOP, found, event, 200.0)
    assert report.status_from(report.status_document(found)) == found, "the next one could not read it"
    note = report.note_of(found)
    assert not asked.nonsense({"note": note}), f"the keeper would not take a note of {len(note)} characters"
    json.dumps([found.why, found.exit and found.exit.reason])


def events_for(found: Status, kind: str) -> Iterator[lifecycle.Event]:
    """What a supervisor feeds next (`Supervisor._catch_up`)."""
    if not found.alive:
        return
    if kind == "failed":
        yield lifecycle.SpawnFailed("can't start: exec: no such file")
        return
    if found.pid is None:
        yield lifecycle.Spawned(4711, 1.7e9)
    yield lifecycle.Exited(lifecycle.Exit(1, None, 1.7e9, "exit status 1"), False)


def plainly(check: Check) -> Callable[[], contextlib.AbstractContextManager[Check]]:
    """A target that needs nothing around it."""

    @contextlib.contextmanager
    def ready() -> Iterator[Check]:
        with nothing_left_open():
            yield check

    return ready


def guided(name: str) -> tuple[Check, Sequence[bytes]]:
    """For atheris: the check of a target on bare bytes, and bytes to start from."""
    seeds: dict[str, tuple[Check, Sequence[bytes]]] = {
        "rpc": (check_rpc, [*map(dumped, REQUESTS[:5]), *map(dumped, REPLIES)]),
        "wire": (lambda data: check_wire([(data, 0)]), [packet(dumped(message), 0) for message in MESSAGES]),
        "table": (check_table, TABLES),
        "state": (_state_bytes, [dumped(STATE)]),
        "legacy": (_legacy_bytes, [bytes([n]) + dumped(each[0]) for n, each in enumerate(LEGACIES.values())]),
        "note": (_note_bytes, [bytes([n]) + dumped(document) for n, document in enumerate(NOTES)]),
    }
    return seeds[name]


def _state_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="pm", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        check_state_in(folder, content)


def _legacy_bytes(content: bytes) -> None:
    """The first byte says which one it is."""
    check_legacy((list(LEGACIES)[content[0] % len(LEGACIES)] if content else supervisor.CLOSING, content[1:]))


def _note_bytes(content: bytes) -> None:
    first = content[0] if content else 0
    check_note((list(RECORDS)[first % len(RECORDS)], bool(first & 128), content[1:]))


GUIDED = ("rpc", "wire", "table", "state", "legacy", "note")

# --- what servers say of their workers --------------------------------------------------------------------------------

SHOWN = (
    b'[{"status":"ok","data":{"workers":[{"pid":5,"last_heartbeat":0.5}]}},'
    b'{"data":{"worker_class":"<class \'gunicorn.workers.sync.SyncWorker\'>"}}]'
)
STATS = (
    b'{"workers":[{"id":1,"pid":6,"status":"busy","requests":7,"avg_rt":1500,"cores":[{"in_request":1}]},'
    b'{"id":2,"pid":0,"status":"cheap"}]}'
)
OWN = b'{"pid":7,"threads":4,"requests":9,"average_seconds":0.25,"in_flight":1,"queue":2,"connections":3}'


def answers() -> st.SearchStrategy[tuple[str, bytes]]:
    """A server, and an answer that is hardly right."""
    documents = damaged([json.loads(SHOWN), json.loads(STATS), json.loads(OWN)]).map(dumped)
    return st.tuples(st.sampled_from(sorted(servers.TELLING)), touched([SHOWN, STATS, OWN]) | documents)


def check_answer(drawn: tuple[str, bytes]) -> None:
    """Figures that can be meant, and a text that a terminal can show, or Unreadable."""
    server, answer = drawn
    try:
        load = workload.read(server, answer)
    except workload.Unreadable:
        return
    assert len(load.workers) <= workload.WORKERS_MAX
    for worker in load.workers:
        for name, figure in asdict(worker).items():
            assert figure is None or 0 <= figure <= workload.NUMBER_MAX, (name, figure)
        assert 0 < worker.pid <= report.PID_MAX
    lines = drawn_tables.workers({"list": [asdict(worker) for worker in load.workers], "left_out": load.left_out})
    assert all(line.isprintable() for line in lines)

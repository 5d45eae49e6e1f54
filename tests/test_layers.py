"""The bands of docs/architecture.md, held by reading the source: who imports whom, and who may touch the kernel.

An import counts wherever it stands: inside a function, under TYPE_CHECKING, relative or not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.harness import PROJECT

PACKAGE = PROJECT / "procman"

BANDS = {
    "pure": "errors config positions values keys programs table preset asgi servers apply lifecycle launch rpc crossing"
    " shape kept workload canary units scale logformat moments accesslog tracebacks logrecords logsummary logzones"
    " lognames unzip terminal records",
    "keeper": "keeper",
    "edge": "disks files folders listeners logs logread resources probes notify store salvage routing workers queues"
    " offered rivals",
    "daemon": "memo ownlog events snapshot interim link process report operation journal measures holdings recall"
    " sockets trials proving places ages rollout rollouts orphans ground takeover supervisor change legacy desk"
    " supervise reading methods server statefile daemon telemetry scaling versions renewal compression logstream"
    " printed parting wayback reloading",
    "client": "client ctl",
    "program": "wsgi adapter compressor",
}
"""Every module of procman by its band. A new one is written down here, and in docs/architecture.md."""

OFFLINE = {"files", "logread"}
"""Edges that a client may import: it reads a table, and logs, also while no daemon runs."""

BAND = {module: band for band, modules in BANDS.items() for module in modules.split()}

NEVER_PURE = {
    *("asyncio", "os", "socket", "subprocess", "time", "logging", "psutil"),
    *("_thread", "concurrent", "ctypes", "fcntl", "multiprocessing", "pwd", "grp", "select", "selectors", "threading"),
}
"""Modules that do I/O, read a clock or start something: the pure band gets it all as arguments."""

NEVER_NAMED = {"util", "utils", "helper", "helpers", "base", "common", "compat", "manager", "handler", "misc"}

LONGEST = 60
"""Lines of a function."""

RESERVED = [
    ("fork forkpty vfork posix_spawn posix_spawnp", "keeper daemon"),
    ("kill killpg pidfd_send_signal send_signal terminate", "keeper wsgi adapter"),
    ("wait3 wait4 waitpid waitid", "keeper daemon"),
    ("execv execve execvp execvpe", "keeper daemon"),
    ("create_subprocess_exec create_subprocess_shell system popen", ""),
    ("bind create_server start_server", "listeners notify probes wsgi adapter"),
    ("sleep", "probes rollout proving parting logs client ctl wsgi adapter"),
]
ONLY_IN = {call: set(modules.split()) for names, modules in RESERVED for call in names.split()}
"""Calls by name, on whatever object, and the modules that may make them ("keeper" is all of keeper/). House rules 3, 4
and 6. `daemon` goes to the background; a probe is a poll by nature, and binds to know its own port; nobody tells a
rollout that a queue is empty; a canary is probed again and again; the log thread rests while pipes fill up; clients
may wait as they like; wsgi and adapter are programs of their own, and their forks signal themselves."""

IMPORT_ONLY_IN: dict[str, set[str]] = {
    "threading": {"logs", "wsgi", "adapter"},
    "concurrent": {"journal", "reading"},
    "multiprocessing": set(),
    "subprocess": {"ctl", "daemon", "offered"},
}
"""House rule 5: one thread, but for those that use a disk, which may be stuck: the logs', the state file's, and those
that read for clients. Programs of their own have what they need.
Children come from the keeper; the client may run `procmand`, and `--check` a server that is to tell its options."""

DEPENDENCIES: dict[str, set[str]] = {
    "psutil": {"edge", "daemon"},
    "tomli_w": {"client"},
    "waitress": {"program"},
}
"""What is not in the standard library, and the bands that may import it."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sources():
        yield path, ast.parse(path.read_text(), str(path))


def noun(path: Path) -> str:
    """The module a file belongs to: its own name, or its sub-package's; "" for procman/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of each import. `from procman import rpc` counts as procman.rpc."""
    package = ["procman", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module == "procman":
                yield from ((node.lineno, f"procman.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def own_imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module of procman) of each import of another part of procman. Its bare version is no dependency."""
    for line, name in imported(path, tree):
        parts = name.split(".")
        if parts[0] == "procman" and len(parts) > 1 and parts[1] not in {"__version__", noun(path)}:
            yield line, parts[1]


def may_import(importer: str, target: str) -> bool:
    """The rule of the bands, for two different modules."""
    mine, its = BAND[importer], BAND[target]
    return {
        "pure": its == "pure",
        "keeper": target == "errors",
        "edge": its == "pure" or target == "folders",
        "daemon": its in {"pure", "edge", "daemon", "keeper"},
        "client": its in {"pure", "client"} or target in OFFLINE,
        "program": False,
    }[mine]


def calls(tree: ast.Module) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, last name of what is called, the call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            yield node.lineno, name, node


def broken_rules(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of one file."""
    me = noun(path)
    if not me:
        return
    if me not in BAND:
        yield 1, f"{me} has no band in tests/test_layers.py"
        return
    for line, target in own_imports(path, tree):
        if target not in BAND:
            yield line, f"imports procman.{target}, which has no band in tests/test_layers.py"
        elif not may_import(me, target):
            yield line, f"{BAND[me]} module {me} imports {BAND[target]} module {target}"
    for line, name in imported(path, tree):
        top = name.split(".")[0]
        if BAND[me] == "pure" and top in NEVER_PURE:
            yield line, f"pure module {me} imports {name}"
        if me not in IMPORT_ONLY_IN.get(top, {me}):
            yield line, f"{me} imports {name}: only {sorted(IMPORT_ONLY_IN[top])} may"
        if top not in {"procman", *sys.stdlib_module_names} and BAND[me] not in DEPENDENCIES.get(top, ()):
            yield line, f"{BAND[me]} module {me} imports {name}, which is no dependency of its band"
    yield from broken_calls(me, tree)


def harmless(name: str, call: ast.Call) -> bool:
    """A call that only shares a reserved name: sleep(0) lets others have a turn, a bare bind() is no socket's."""
    if name == "sleep":
        return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0
    return name == "bind" and not isinstance(call.func, ast.Attribute)


def broken_calls(me: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name, call in calls(tree):
        if harmless(name, call):
            continue
        if me not in ONLY_IN.get(name, {me}):
            yield line, f"{me} calls {name}(): only {sorted(ONLY_IN[name])} may"
        if name == "start_unix_server" and "sock" not in {keyword.arg for keyword in call.keywords}:
            yield line, f"{me} binds by start_unix_server(): give it a socket of listeners.py"
        if "preexec_fn" in {keyword.arg for keyword in call.keywords}:
            yield line, f"{me} uses preexec_fn: the child's set-up stands in keeper/spawn.py"
        if BAND[me] == "pure" and name in {"open", "print", "input", "now", "today", "utcnow"}:
            yield line, f"pure module {me} calls {name}()"


def test_bands_hold() -> None:
    found = [
        f"{path.relative_to(PROJECT)}:{line}: {text}"
        for path, tree in trees()
        for line, text in broken_rules(path, tree)
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path, tree in trees():
        graph.setdefault(noun(path), set()).update(target for _line, target in own_imports(path, tree))
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(PROJECT)}:{node.lineno}: {node.name} has {lines} lines"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]
    assert not long, "\n" + "\n".join(long)


def test_modules_are_named_for_what_they_hold() -> None:
    assert not [str(path) for path in sources() if NEVER_NAMED & {path.stem, path.parent.name}]


def test_modules_say_what_they_are_for() -> None:
    assert not [str(path) for path, tree in trees() if path.name != "__main__.py" and not ast.get_docstring(tree)]


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("rpc.py", "import json, os.path", "pure module rpc imports os.path"),
        ("rpc.py", "def f() -> None:\n    from time import monotonic", "pure module rpc imports time"),
        ("rpc.py", "open('x')", "pure module rpc calls open()"),
        ("rpc.py", "from procman import errors, logs", "pure module rpc imports edge module logs"),
        ("logs.py", "import procman.store", "edge module logs imports edge module store"),
        ("logs.py", "from .store import load", "edge module logs imports edge module store"),
        ("keeper/spawn.py", "from procman.config import Program", "keeper module keeper imports pure module config"),
        ("keeper/spawn.py", "from ..config import Program", "keeper module keeper imports pure module config"),
        ("keeper/spawn.py", "from . import wire\nfrom procman.keeper.wire import send\nfrom procman import errors", ""),
        ("ctl/main.py", "from procman.logs import Stream", "client module ctl imports edge module logs"),
        ("ctl/main.py", "from procman.reading import Reading", "client module ctl imports daemon module reading"),
        ("ctl/main.py", "from procman import table, files, logread", ""),
        ("ctl/main.py", "from procman.client import Client", ""),
        ("client.py", "from procman import server", "client module client imports daemon module server"),
        ("wsgi.py", "from procman import errors", "program module wsgi imports pure module errors"),
        ("supervisor.py", "from procman import logs, table, __version__\nfrom procman.keeper import wire", ""),
        (
            "supervisor.py",
            "import os\nos.kill(1, 9)",
            "supervisor calls kill(): only ['adapter', 'keeper', 'wsgi'] may",
        ),
        ("process.py", "from asyncio import sleep\nawait_ = sleep(1)", "process calls sleep()"),
        ("process.py", "asyncio.sleep(0)", ""),
        ("keeper/tree.py", "import psutil", "keeper module keeper imports psutil"),
        ("resources.py", "import psutil, yaml", "edge module resources imports yaml"),
        ("process.py", "import threading", "process imports threading"),
        ("server.py", "asyncio.start_unix_server(f, path)", "server binds by start_unix_server()"),
        ("server.py", "asyncio.start_unix_server(f, sock=s)", ""),
        ("store.py", "sock.bind(path)", "store calls bind()"),
        ("watcher.py", "", "watcher has no band"),
    ],
)
def test_a_broken_rule_is_found(file: str, text: str, wrong: str) -> None:
    found = [message for _line, message in broken_rules(PACKAGE / file, ast.parse(text))]
    assert len(found) == bool(wrong), found
    assert all(message.startswith(wrong) for message in found)

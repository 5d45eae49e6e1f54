"""What the daemon answers: METHODS, one row a method, and the functions behind them.

A function checks nothing about its caller and draws nothing: `server` has checked role and params, the client draws. It
knows no socket either: a `Call` carries the params and the way back.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import field
from typing import Any, Final, Literal, NoReturn, Protocol

from procman.records import dataclass

from . import logstream, rpc, values
from .canary import AS_TABLE, Wish
from .errors import Failed
from .logread import Held, Position
from .logstream import LogReader, ReadingThread
from .reading import Read
from .rpc import LogSource, Object, Peer, RpcError

MAX_LINES = 100_000  # of the end of a log, for one request
MAX_PIECE = 1024 * 1024  # bytes of a log in one answer
MAX_COUNT = 1000  # processes of one program
MAX_MISSING = 1000  # names that are waited for, of logs that are followed
MAX_NEWS = 10_000  # events that wait for a client that is slow to read them

Role = Literal["look", "operate"]


class Operations(Protocol):
    """What the methods need of the daemon. All raise ProcmanError children; names are as in `rpc`, none means all."""

    def infos(self, names: Sequence[str]) -> list[Object]:
        """One ProcessInfo (rpc.PROCESS_FIELDS) for each process."""

    async def infos_with_workers(self, names: Sequence[str], read: Read) -> list[Object]:
        """The same, and `workers`: what their servers tell. What may be slow goes through `read`."""

    async def show(self, name: str, read: Read) -> Object:
        """The ProcessInfo of one process, and `definition`, `log`, `samples`, `processes`, `workers`."""

    async def why(self, name: str, read: Read) -> Object:
        """Why one process is as it is: state, wanted, why, exit, `history` and the last lines of `output`."""

    async def operate(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
        at_once: int = 1,
        wish: Wish = AS_TABLE,
    ) -> list[Object]:
        """Starts, stops, restarts or reloads (`at_once` processes of one program together, with the canary that `wish`
        says); one {name, ok, state, why} for each process, and the last `output` of a successor that failed."""

    async def decide(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
    ) -> list[Object]:
        """Ends canaries, by "promote" or "rollback"; the same objects for the processes that have one. Raises Failed
        where none has."""

    async def scale(
        self,
        name: str,
        number: int,
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
    ) -> list[Object]:
        """Has `number` processes of the program `name` run, of which the table says that there are several; the same
        objects, for all its processes."""

    def signal(self, names: Sequence[str], signum: int, peer: Peer) -> list[Object]:
        """Sends a signal to the main child of each process; the same objects."""

    def log_sources(self, names: Sequence[str], stderr: bool, *, strict: bool = True) -> list[LogSource]:
        """The logs that can be read; with `stderr` only those of standard error. Not `strict`: names of nobody are left
        out."""

    def unknown(self, names: Sequence[str]) -> list[str]:
        """Those of these names that have left the table, or never stood there."""

    def watch_table(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back in the loop when a process has come to the table, or has left it; returns what ends that."""

    def output_elsewhere(self, names: Sequence[str], stderr: bool) -> dict[str, str]:
        """Of the programs whose output is in no such log, where it goes, in words."""

    def watch_logs(self, keys: Sequence[str], callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back in the loop when one of these logs (LogSource.key) has grown; returns what ends that."""

    def log_begins(self, key: str) -> tuple[str, Position] | None:
        """Which file the output of one of these logs goes to now, and from which place on; None: not known yet."""

    def recent(self) -> list[Object]:
        """The last events, oldest first."""

    def subscribe(self, callback: Callable[[Object], None]) -> Callable[[], None]:
        """Calls back in the loop with each event to come; returns what ends that."""

    async def daemon_status(self) -> Object:
        """The daemon itself: identifier, version, pids, uptime, table, counts."""

    async def shutdown(self, peer: Peer) -> None:
        """Begins to stop all programs and then the daemon; returns when that is on disk and outlives a crash."""

    async def reopen_logs(self, peer: Peer) -> None:
        """Closes and opens every log file, for a rotation by others; from then on nothing is written to the old ones.
        Raises Failed when a disk is stuck."""

    async def reread(
        self,
        peer: Peer,
        *,
        previous: bool,
        progress: Callable[[Object], None],
        wait: bool,
        timeout: float | None,
    ) -> Object:
        """Reads the table again and applies it, or goes back to the `previous` one; what changed, what must be
        restarted to change, and what has `failed`. When it does not wait to the end, `goes_on` and `message`."""

    async def plan(self, *, previous: bool) -> list[Object]:
        """What `reread` would do: one {name, action, keys, cost} for each line."""

    async def upgrade(self, peer: Peer) -> None:
        """Has the daemon become the installed version. Where that works, who asks is not answered: the connection is
        closed by the end of this process. Raises Failed when all is as before."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its checked params and who asks.

    `tell` sends a notification and waits while the client is slow; `mention` only sends, for callbacks.
    `outlive` awaits an operation that goes on when the client has gone. `read` calls a function in a thread. `held`
    tells which files of logs the connection holds, and has room for.
    """

    params: Object
    peer: Peer
    tell: Callable[[str, Object], Awaitable[None]]
    mention: Callable[[str, Object], None]
    outlive: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
    read: Read
    held: Callable[[], Held]


Kind = Literal[
    "names", "some names", "name", "flag", "lines", "count", "number", "seconds", "time", "share", "signal",
    "file", "offset", "bytes", "positions",
]  # fmt: skip
REQUIRED: Final = "required"


@dataclass(frozen=True, slots=True)
class Method:
    """A row: the function, what its caller must be allowed to do, its params as name → (kind, default or REQUIRED)."""

    function: Callable[[Operations, Call], Awaitable[object]]
    role: Role
    params: Mapping[str, tuple[Kind, object]] = field(default_factory=dict)


# --- params ---------------------------------------------------------------------------------------------------------


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_lines(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LINES


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_seconds(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and 0 <= value <= 1e9)  # type: ignore[operator]


def _is_time(value: object) -> bool:
    return _is_seconds(value) and value != 0


def _is_share(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and 0 <= value < 1)  # type: ignore[operator]


def _is_file(value: object) -> bool:
    return isinstance(value, str) and rpc.is_file_id(value)


def _is_offset(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_bytes(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PIECE


def _is_positions(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and one.keys() == {"name", "stream", "file", "offset"}
        and _is_file(one["file"])
        and _is_offset(one["offset"])
        for one in value
    )


def _is_signal(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


_KINDS: dict[Kind, tuple[Callable[[object], bool], str]] = {
    "names": (_is_names, "a list of names"),
    "some names": (lambda value: bool(value) and _is_names(value), "a list of names that is not empty"),
    "name": (lambda value: isinstance(value, str) and bool(value), "a name"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "lines": (_is_lines, f"an integer from 0 to {MAX_LINES}"),
    "count": (_is_count, f"an integer from 1 to {MAX_COUNT}"),
    "number": (_is_number, f"an integer from 0 to {MAX_COUNT}"),
    "seconds": (_is_seconds, "a number of seconds, or null"),
    "time": (_is_time, "a number of seconds that is more than 0, or null"),
    "share": (_is_share, "a share, a number from 0 up to but not 1, or null"),
    "signal": (_is_signal, "the name or number of a signal"),
    "file": (_is_file, "a file as logs.files names it"),
    "offset": (_is_offset, "a number of bytes from 0"),
    "bytes": (_is_bytes, f"an integer from 1 to {MAX_PIECE}"),
    "positions": (_is_positions, "a list of objects of name, stream, file and offset"),
}


def bind(method: Method, params: Object) -> Object:
    """The params of a call with their defaults. Raises RpcError that names the first one that is wrong."""
    for name in params:
        if name not in method.params:
            near = values.suggestion(name[:80], method.params)
            raise RpcError(rpc.INVALID_PARAMS, f"unknown param {name[:80]!r}{near}")
    bound: Object = {}
    for name, (kind, default) in method.params.items():
        if name not in params and default is REQUIRED:
            raise RpcError(rpc.INVALID_PARAMS, f"param {name!r} is missing")
        fits, words = _KINDS[kind]
        bound[name] = params.get(name, default)
        if not fits(bound[name]):
            raise RpcError(rpc.INVALID_PARAMS, f"param {name!r} must be {words}")
    return bound


def _signum(raw: str | int) -> int:
    if isinstance(raw, int) or (raw.isascii() and raw.isdigit()):
        if len(str(raw)) > 2 or not 1 <= int(raw) <= 64:
            raise RpcError(rpc.INVALID_PARAMS, "param 'signal': a signal's number is from 1 to 64")
        return int(raw)
    try:
        return values.signal_number(raw[:40])  # no name of a signal is so long, and the answer repeats it
    except values.BadValue as error:
        raise RpcError(rpc.INVALID_PARAMS, f"param 'signal': {error}") from None


# --- the functions --------------------------------------------------------------------------------------------------


async def _status(operations: Operations, call: Call) -> object:
    if call.params["workers"]:
        return await operations.infos_with_workers(call.params["names"], call.read)
    return operations.infos(call.params["names"])


async def _show(operations: Operations, call: Call) -> object:
    return await operations.show(call.params["name"], call.read)


async def _why(operations: Operations, call: Call) -> object:
    return await operations.why(call.params["name"], call.read)


async def _operate(verb: str, operations: Operations, call: Call) -> object:
    return await call.outlive(
        operations.operate(
            verb,
            call.params["names"],
            call.peer,
            timeout=call.params["timeout"],
            wait=call.params["wait"],
            at_once=call.params.get("at_once", 1),
            wish=Wish(call.params.get("canary"), call.params.get("canary_seconds")),
            progress=functools.partial(call.mention, "progress"),
        )
    )


async def _decide(verb: str, operations: Operations, call: Call) -> object:
    names, timeout, wait = (call.params[key] for key in ("names", "timeout", "wait"))
    progress = functools.partial(call.mention, "progress")
    return await call.outlive(
        operations.decide(verb, names, call.peer, timeout=timeout, wait=wait, progress=progress)
    )


async def _scale(operations: Operations, call: Call) -> object:
    return await call.outlive(
        operations.scale(
            call.params["name"],
            call.params["number"],
            call.peer,
            timeout=call.params["timeout"],
            wait=call.params["wait"],
            progress=functools.partial(call.mention, "progress"),
        )
    )


async def _signal(operations: Operations, call: Call) -> object:
    return operations.signal(call.params["names"], _signum(call.params["signal"]), call.peer)


async def _events(operations: Operations, call: Call) -> object:
    news: deque[Object] = deque()
    arrived = asyncio.Event()

    def heard(event: Object) -> None:
        if len(news) <= MAX_NEWS:
            news.append(event)
        arrived.set()

    follow = call.params["follow"]
    unsubscribe = operations.subscribe(heard) if follow else None  # before recent(): none is missed between the two
    try:
        for event in list(operations.recent()):
            await call.tell("event", event)
        while follow:
            await arrived.wait()
            arrived.clear()
            if len(news) > MAX_NEWS:
                raise Failed("events came faster than you read them", hint="ask again; recent ones are repeated")
            while news:
                await call.tell("event", news.popleft())
    finally:
        if unsubscribe is not None:
            unsubscribe()
    return {}


async def _logs(operations: Operations, call: Call) -> object:
    if call.params["follow"]:
        followed = _Followed(operations, call)
        try:
            await followed.tell()
        finally:
            followed.close()
    sources = operations.log_sources(call.params["names"], call.params["stderr"])
    await call.tell("sources", _told(sources))
    starts = logstream.starts(call.params["after"])
    readers = [LogReader(each, call.params["lines"], starts.get((each.name, each.stream))) for each in sources]
    thread = ReadingThread(readers, call.read)
    try:
        for reader in readers:
            await thread.run(reader.open)
            while data := await thread.run(reader.last):
                await call.tell("log", reader.params(data))
    finally:
        thread.close()
    return {}


def _told(sources: Sequence[LogSource]) -> Object:
    return {"sources": [{"name": source.name, "stream": source.stream} for source in sources]}


class _Followed:
    """The logs that some names mean now and later, followed: `apply` has processes come and go, and has output go to
    other files. A client that comes back tells in `after` where it was: what it does not know began meanwhile, and a
    name may have left the table."""

    def __init__(self, operations: Operations, call: Call) -> None:
        """Raises NoSuchProgram."""
        self._operations, self._call = operations, call
        self._missing = operations.unknown(call.params["names"])
        comes_back = bool(call.params["after"]) and len(self._missing) <= MAX_MISSING
        self._sources = operations.log_sources(call.params["names"], call.params["stderr"], strict=not comes_back)
        starts = logstream.starts(call.params["after"])
        self._known = {(source.name, source.stream): source.path for source in self._sources}
        self._all = set(self._known.items())
        self._readers: list[LogReader] = []
        for source, key in zip(self._sources, self._known, strict=True):
            known = not comes_back or key in starts
            reader = LogReader(source, call.params["lines"], starts.get(key)) if known else self._begun(source)
            self._readers.append(reader)
        self._waiting = [reader for reader in self._readers if reader.waits]
        self._thread = ReadingThread(self._readers, call.read)
        self._news: deque[tuple[str, Object]] = deque()
        self._due: asyncio.Handle | None = None
        # Before the first look: nothing that comes after it is missed.
        self._ends = [self._watch(reader) for reader in self._readers]
        self._ends += [operations.subscribe(self._heard), operations.watch_table(self._look_soon)]

    async def tell(self) -> NoReturn:
        """Tells the client of all that comes."""
        tell = self._call.tell
        await tell("sources", _told(self._sources))
        if self._missing:
            await tell("missing", {"names": self._missing})
        for reader in self._readers[: len(self._sources)]:
            if not reader.waits:
                await self._thread.run(reader.open)
        while True:
            found = await self._thread.news()
            while self._news:
                await tell(*self._news.popleft())
            for reader, data in found:
                await tell("log", reader.params(data))

    def close(self) -> None:
        """Follows no more."""
        if self._due is not None:
            self._due.cancel()
        for end in self._ends:
            end()
        self._thread.close()

    def _watch(self, reader: LogReader) -> Callable[[], None]:
        return self._operations.watch_logs([reader.source.key], functools.partial(self._thread.grown, reader))

    def _heard(self, event: Object) -> None:
        """Something has happened."""
        self._waiting = [reader for reader in self._waiting if reader.waits]
        for reader in self._waiting:  # its file may be open by now
            self._thread.grown(reader)
        if event["type"] in ("daemon", "rollout") or event.get("state") == "STARTING":
            self._look()

    def _look_soon(self) -> None:
        """Another process has come, or gone: there may be many of them."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        params = self._call.params
        now = self._operations.log_sources(params["names"], params["stderr"], strict=False)
        paths = {(source.name, source.stream): source.path for source in now}
        for key in sorted(self._known.keys() | paths.keys()):
            if (path := paths.get(key, "")) != self._known.get(key, ""):
                self._news.append(("moved", {"name": key[0], "stream": key[1], "path": path}))
        for source in now:
            place = (source.name, source.stream), source.path
            if place not in self._all:
                self._all.add(place)
                reader = self._begun(source)
                self._readers.append(reader)
                self._waiting.append(reader)
                self._ends.append(self._watch(reader))
                self._thread.add(reader)
        self._known = paths
        missing = self._operations.unknown(params["names"])
        if missing != self._missing:
            self._missing = missing
            self._news.append(("missing", {"names": missing}))
        if self._news:
            self._thread.wake()

    def _begun(self, source: LogSource) -> LogReader:
        """Reads a log from where its output began in this file; what came before is in its other files."""
        after = [each for each in self._readers if each.source.key == source.key]
        return LogReader(source, 0, begins=functools.partial(self._begins, source), after=after)

    def _begins(self, source: LogSource) -> Position | None:
        """Where it begins in that file; None: nothing has come there yet."""
        begun = self._operations.log_begins(source.key)
        return begun[1] if begun is not None and begun[0] == source.path else None


async def _log_files(operations: Operations, call: Call) -> object:
    sources = operations.log_sources(call.params["names"], call.params["stderr"])
    elsewhere = operations.output_elsewhere(call.params["names"], call.params["stderr"])
    told = [{"name": name, "text": text} for name, text in elsewhere.items()]
    listed = await call.read(functools.partial(logstream.files, sources, call.held()))
    paths = {file["path"] for source in listed for file in source["files"]}
    unread = [source for source in sources if source.path not in paths]
    told += await call.read(functools.partial(logstream.refusals, unread)) if unread else []
    return {"sources": listed, "elsewhere": told}


async def _log_read(operations: Operations, call: Call) -> object:
    name, stream, file, offset, size = (call.params[key] for key in ("name", "stream", "file", "offset", "bytes"))
    sources = operations.log_sources([name], stderr=False)
    source = next((one for one in sources if (one.name, one.stream) == (name, stream)), None)
    if source is None:
        raise Failed(f"no log file holds the output {stream!r:.20} of {name!r:.80}")
    return await call.read(functools.partial(logstream.piece, source, file, offset, size, call.held()))


async def _daemon_status(operations: Operations, _call: Call) -> object:
    return await operations.daemon_status()


async def _shutdown(operations: Operations, call: Call) -> object:
    await operations.shutdown(call.peer)
    return {}


async def _reopen_logs(operations: Operations, call: Call) -> object:
    await operations.reopen_logs(call.peer)
    return {}


async def _reread(operations: Operations, call: Call) -> object:
    previous = call.params.get("previous", False)
    if call.params.get("dry_run"):
        return await call.outlive(operations.plan(previous=previous))
    progress = functools.partial(call.mention, "progress")
    wait, timeout = call.params.get("wait", True), call.params.get("timeout")
    return await call.outlive(
        operations.reread(call.peer, previous=previous, progress=progress, wait=wait, timeout=timeout)
    )


async def _upgrade(operations: Operations, call: Call) -> object:
    await call.outlive(operations.upgrade(call.peer))
    return {}


_OPERATE: dict[str, tuple[Kind, object]] = {
    "names": ("some names", REQUIRED),
    "wait": ("flag", True),
    "timeout": ("seconds", None),
}

METHODS: dict[str, Method] = {
    "status": Method(_status, "look", {"names": ("names", []), "workers": ("flag", False)}),
    "show": Method(_show, "look", {"name": ("name", REQUIRED)}),
    "why": Method(_why, "look", {"name": ("name", REQUIRED)}),
    "start": Method(functools.partial(_operate, "start"), "operate", _OPERATE),
    "stop": Method(functools.partial(_operate, "stop"), "operate", _OPERATE),
    "restart": Method(functools.partial(_operate, "restart"), "operate", _OPERATE),
    "reload": Method(
        functools.partial(_operate, "reload"),
        "operate",
        _OPERATE | {"at_once": ("count", 1), "canary": ("share", None), "canary_seconds": ("time", None)},
    ),
    "promote": Method(functools.partial(_decide, "promote"), "operate", _OPERATE),
    "rollback": Method(functools.partial(_decide, "rollback"), "operate", _OPERATE),
    "scale": Method(
        _scale,
        "operate",
        {
            "name": ("name", REQUIRED),
            "number": ("number", REQUIRED),
            "wait": ("flag", True),
            "timeout": ("seconds", None),
        },
    ),
    "signal": Method(_signal, "operate", {"signal": ("signal", REQUIRED), "names": ("some names", REQUIRED)}),
    "logs": Method(
        _logs,
        "look",
        {
            "names": ("names", []),
            "lines": ("lines", 10),
            "follow": ("flag", False),
            "stderr": ("flag", False),
            "after": ("positions", []),
        },
    ),
    "logs.files": Method(_log_files, "look", {"names": ("names", []), "stderr": ("flag", False)}),
    "logs.read": Method(
        _log_read,
        "look",
        {
            "name": ("name", REQUIRED),
            "stream": ("name", "out"),
            "file": ("file", REQUIRED),
            "offset": ("offset", 0),
            "bytes": ("bytes", MAX_PIECE),
        },
    ),
    "events": Method(_events, "look", {"follow": ("flag", False)}),
    "apply": Method(
        _reread,
        "operate",
        {
            "dry_run": ("flag", False),
            "previous": ("flag", False),
            "wait": ("flag", True),
            "timeout": ("seconds", None),
        },
    ),
    "daemon.status": Method(_daemon_status, "look"),
    "daemon.shutdown": Method(_shutdown, "operate"),
    "daemon.reopen_logs": Method(_reopen_logs, "operate"),
    "daemon.reread": Method(_reread, "operate"),
    "daemon.upgrade": Method(_upgrade, "operate"),
}

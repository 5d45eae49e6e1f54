"""Where procmanctl gets logs from: the daemon, or the files themselves while no daemon runs. Both give the same: which
files a log has, bytes of them, and what comes.

It knows nothing of what is in a log.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from procman import rpc
from procman.client import Client
from procman.errors import NoSuchProgram, ProcmanError, Unreachable

from .tables import printable

if TYPE_CHECKING:
    from procman.config import Program
    from procman.logread import Follower, LogFile
    from procman.rpc import LogSource, Object

PIECE = 1024 * 1024
"""Bytes that are read at once: what the daemon gives in one answer."""

NOWHERE = "0:0"
"""Names the file of a log that has none yet."""

RETRY_SECONDS = 30.0
"""How long `follow` waits for a daemon whose supervisor is being replaced."""

HELD_MAX = 10_000
"""Files that are held open without a daemon, at most."""

POLL_SECONDS = 0.2
"""How often files are looked at without a daemon."""


class File(NamedTuple):
    """A file of a log. `size` is that of the file itself, `holds` that of what it holds, of a compressed one modulo
    2**32; `modified` is in seconds since the epoch."""

    id: str
    path: str
    size: int
    modified: float
    zipped: bool
    holds: int


class Source(NamedTuple):
    """One log: what stream ("out", "err") of process `name` has printed, in `files`, the oldest first."""

    name: str
    stream: str
    files: tuple[File, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others."""
        return self.name, self.stream


Heard = Callable[[tuple[str, str], bytes], None]
"""Told of bytes of a log; of none when another log has come to those that are followed."""

Places = dict[tuple[str, str], tuple[str, int]]
"""By log: a file, and an offset in what it holds."""


class Library(Protocol):
    """Logs that can be read. `elsewhere` says of the programs that `sources` has left out, by name, where their output
    goes."""

    elsewhere: dict[str, str]

    def sources(self, names: Sequence[str], *, stderr: bool) -> list[Source]:
        """The logs of these names (none: all), as they are now. Their files stay readable from the first time on, as
        far as there is room for that, whatever becomes of them. Raises ProcmanError."""

    def files(self, source: Source) -> tuple[File, ...]:
        """Those that this log has by now."""

    def read(self, source: Source, file: File, size: int, offset: int) -> bytes | None:
        """Bytes of a file as it is on disk, at most `size`, b"" at its end; None when it has gone."""

    def follow(self, places: Places, heard: Heard) -> None:
        """Tells of all that comes after these places, for ever, also of logs that the names given to `sources` come to
        mean."""


class Remote:
    """The daemon's logs. `connect` makes a client that waits so many seconds for an answer."""

    def __init__(self, connect: Callable[[float | None], Client], client: Client) -> None:
        self._connect = connect
        self._client = client
        self._asked: Object = {}
        self.elsewhere: dict[str, str] = {}

    def sources(self, names: Sequence[str], *, stderr: bool) -> list[Source]:
        """See `Library`, as for the next three."""
        self._asked = {"names": list(names), "stderr": stderr}
        answer = self._client.call("logs.files", **self._asked)
        self.elsewhere = {str(one["name"]): str(one["text"]) for one in answer.get("elsewhere") or ()}
        return [Source(one["name"], one["stream"], tuple(map(_file, one["files"]))) for one in answer["sources"]]

    def files(self, source: Source) -> tuple[File, ...]:
        with self._connect(RETRY_SECONDS) as client:  # what the first connection holds, it goes on to hold
            found = Remote(self._connect, client).sources([source.name], stderr=source.stream == "err")
        return next((one.files for one in found if one.key == source.key), ())

    def read(self, source: Source, file: File, size: int, offset: int) -> bytes | None:
        answer = self._client.call(
            "logs.read",
            name=source.name,
            stream=source.stream,
            file=file.id,
            offset=offset,
            bytes=min(size, PIECE),
        )
        return None if answer["gone"] else rpc.log_bytes(answer)

    def follow(self, places: Places, heard: Heard) -> None:
        followed = _Followed(places, heard)
        gone = 0.0
        while True:
            try:
                with self._connect(None) as client:
                    client.connect()
                    gone = 0.0
                    client.stream("logs", followed.told, **self._asked, follow=True, lines=0, after=followed.after())
            except Unreachable:
                now = time.monotonic()
                if not gone:
                    _say("the daemon has gone: waiting for it")
                    gone = now
                if now > gone + RETRY_SECONDS:
                    raise
                time.sleep(POLL_SECONDS)


class _Followed:
    """Logs that the daemon has us follow, whichever supervisor tells of them."""

    def __init__(self, places: Places, heard: Heard) -> None:
        self._places = dict(places)
        self._heard = heard
        self._there = set(places)
        self._missing: set[str] = set()

    def after(self) -> list[Object]:
        """Where to go on. A log that is no more may come back."""
        return [
            {"name": name, "stream": stream, "file": file, "offset": offset}
            for (name, stream), (file, offset) in self._places.items()
        ]

    def told(self, method: str, params: Object) -> None:
        """What the daemon has said."""
        if method == "log":
            key = _key(params)
            self._places[key] = str(params.get("file", NOWHERE)), int(params.get("offset", 0))
            self._heard(key, rpc.log_bytes(params))
        elif method == "moved":
            self._goes_to(_key(params), str(params.get("path") or ""))
        elif method == "sources":
            now = {_key(source) for source in params["sources"]}
            for key in sorted(now ^ self._there):
                self._goes_to(key, "" if key in self._there else "?")
        elif method == "missing":
            missing = set(map(str, params["names"]))
            for name in sorted(missing - self._missing):
                _say(f"{name}: the program table has nothing of this name any more: waiting for it")
            self._missing = missing

    def _goes_to(self, key: tuple[str, str], path: str) -> None:
        """The output of a log goes to this file from now on, "" for none, "?" for one that is not known."""
        title = log_title(key)
        if not path:
            self._there.discard(key)
            _say(f"{title}: no log file holds its output now")
        elif key in self._there:
            _say(f"{title}: its log is {path} now")
        else:
            self._there.add(key)
            _say(f"{title}: followed, too, from now on")
            self._heard(key, b"")


def _key(said: Object) -> tuple[str, str]:
    return str(said.get("name")), str(said.get("stream"))


def _say(text: str) -> None:
    print(f"procmanctl: {printable(text)}", file=sys.stderr, flush=True)


def log_title(key: tuple[str, str]) -> str:
    """What a log is called, by process and stream."""
    name, stream = key
    return name if stream == "out" else f"{name}/{stream}"


class Local:
    """The files of the logs of a program table, read by ourselves."""

    def __init__(self, table: str) -> None:
        # What reads a table is needed here alone.
        from procman import files
        from procman import table as tables
        from procman.logread import Held

        self._config = tables.parse(table, files.Machine())
        self._logs: dict[tuple[str, str], LogSource] = {}
        self._held = Held(_room())
        self.elsewhere: dict[str, str] = {}

    def sources(self, names: Sequence[str], *, stderr: bool) -> list[Source]:
        """See `Library`, as for the next three."""
        from procman import launch
        from procman.logread import refusal

        logs = []
        for program in self._named(names):
            if text := launch.elsewhere(program, stderr=stderr):
                self.elsewhere[program.program] = text
            logs += [log for log in launch.log_sources(program) if not stderr or log.stream == "err"]
        self._logs = {(log.name, log.stream): log for log in logs}
        listed = self._held.files([log.path for log in logs])
        paths = {file.path for found in listed for file in found}
        for log in logs:
            if log.path not in paths and (text := refusal(log.path)):
                self.elsewhere[log.name] = text
        return [
            Source(log.name, log.stream, tuple(map(_own_file, found)))
            for log, found in zip(logs, listed, strict=True)
        ]

    def files(self, source: Source) -> tuple[File, ...]:
        from procman import logread

        log = self._logs[source.key]
        return tuple(map(_own_file, logread.files(log.path)))

    def _named(self, names: Sequence[str]) -> Iterator[Program]:
        """Names mean what they mean to the daemon: a process, a program, a group, all."""
        programs = self._config.programs
        for name in names:
            if name != "all" and not any(name in (p.name, p.program, *p.groups) for p in programs):
                raise NoSuchProgram(f"no such program: {name[:200]!r}", hint=f"it is not in {self._config.path}")
        for program in programs:
            if not names or {"all", program.name, program.program, *program.groups} & set(names):
                yield program

    def read(self, source: Source, file: File, size: int, offset: int) -> bytes | None:
        log = self._logs[source.key]
        return self._held.read(log.path, file.id, offset, size)

    def follow(self, places: Places, heard: Heard) -> None:
        from procman.logread import Follower, Position

        with contextlib.ExitStack() as stack:
            followers: list[tuple[tuple[str, str], Follower]] = []
            for key, (file, offset) in places.items():
                follower = Follower(self._logs[key].path, Position.of(file, offset))
                stack.callback(follower.close)
                followers.append((key, follower))
            while True:
                news = False
                for key, follower in followers:
                    if data := follower.read():
                        news = True
                        heard(key, data)
                if not news:
                    time.sleep(POLL_SECONDS)


def _file(said: Object) -> File:
    """One as the daemon tells of it; an older one does not say what it holds."""
    holds = said["holds"] if "holds" in said else 0 if said["zipped"] else said["bytes"]
    return File(said["file"], said["path"], said["bytes"], said["modified"], said["zipped"], holds)


def _own_file(file: LogFile) -> File:
    return File(file.id, file.path, file.size, file.modified, file.zipped, file.holds)


def _room() -> int:
    """How many files we may hold open: some descriptors are for other things."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(0, min(soft, HELD_MAX) - 64)


def reachable(client: Client) -> bool:
    """Whether a daemon answers there. Raises ProcmanError for one that does not let us in."""
    try:
        client.connect()
    except Unreachable as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return False
    except ProcmanError:
        raise
    return True

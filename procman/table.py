"""A program table: from TOML text to `Config`, or every problem at once by file and line.

Pure: files, users and the environment are asked through `World` (the real one is `files.Machine`). This module reads
the files, `[daemon]` and `[listener.*]`, and compares what two programs may not share; `programs` reads one program.
docs/configuration.md is the user's side of it.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Literal

from procman import lognames, positions, programs, rpc, values
from procman.config import Address, Config, Daemon, Listener, Sampling
from procman.errors import ConfigError, Problem
from procman.keys import Layer, Place, Report, Scope, Section, Source, World, dotted
from procman.positions import KeyPath
from procman.programs import Around, Definition
from procman.records import dataclass
from procman.values import BadValue

__all__ = ["KEYS", "World", "located", "parse", "socket_path"]

SAMPLING_KEYS = ("interval", "memory")
DAEMON_KEYS = (
    *("identifier", "socket", "socket_mode", "socket_group", "read_only_group", "state_dir", "log_dir", "log_level"),
    *("log_max_size", "log_keep", "log_min_free", "umask", "open_files", "shutdown_timeout", "exit_when", "sampling"),
)
LISTENER_KEYS = ("bind", "backlog", "mode", "owner", "reuse_port")
SHORTEST_INTERVAL = 0.1
MAIN_KEYS = ("include", "daemon", "defaults", "listener", "program")

# Every key that is understood, by the table it stands in: what the documentation must have, no more and no less.
KEYS: Mapping[str, Sequence[str]] = {
    "": MAIN_KEYS,
    "daemon": DAEMON_KEYS,
    "daemon.sampling": SAMPLING_KEYS,
    "listener": LISTENER_KEYS,
    "program": programs.PROGRAM_KEYS,
    "program.ready": programs.READY_KEYS,
    "program.log": programs.LOG_KEYS,
    "program.limits": programs.LIMITS_KEYS,
    "program.scale": programs.SCALE_KEYS,
}

_LOG_LEVEL: tuple[Literal["debug", "info", "warning", "error"], ...] = ("debug", "info", "warning", "error")
_EXIT_WHEN: tuple[Literal["never", "any-fatal", "all-exited"], ...] = ("never", "any-fatal", "all-exited")
_MEMORY: tuple[Literal["rss", "pss"], ...] = ("rss", "pss")


def parse(path: str, world: World, running: Daemon | None = None) -> Config:
    """The program table in the file `path`, with all that it includes.

    `running` is what a daemon runs with that reads its table again: programs keep its folders, for it can't move.
    Raises ConfigError with every problem that was found. A relative path starts at the daemon's current folder.
    """
    report = Report()
    files = _read_files(posixpath.normpath(posixpath.join(world.cwd, path)), world, report)
    main = files.layers[0]
    daemon, scope = _daemon(main, Scope(report, world.environ), world)
    listeners = dict(_listeners(files, scope, world))
    named = {name: listener for name, (_, listener) in listeners.items()}
    if running is not None:
        scope = scope.knowing(state_dir=running.state_dir, log_dir=running.log_dir)
    around = Around(world, scope, running or daemon, named, files.complete)
    defaults = _table(main, "defaults", report)
    programs.check_defaults(defaults, around)
    found: list[Definition] = []
    for name, layer in _named_tables(files, "program", report):
        found += programs.read(name, layer, defaults, around)
    _check_addresses(daemon, main.place, list(listeners.values()), found, report)
    _check_logs(running or daemon, found, world, report)
    _check_groups(found, report)
    _check_scaled(found, report)
    if report.problems:
        raise ConfigError(list(report.problems))
    sockets = {**named, **{one.name: one for definition in found for _, one in definition.sockets}}
    identified = {name: _identified(listener) for name, listener in sockets.items()}
    return Config(
        path=main.place.source.path,
        files=tuple(layer.place.source.path for layer in files.layers),
        daemon=daemon,
        listeners=tuple(identified.values()),
        programs=tuple(
            replace(program, listen=tuple(identified[name].name for name in program.listen))
            for program in (definition.program for definition in found)
        ),
    )


def _identified(listener: Listener) -> Listener:
    """`listener` by the name of its socket. Until now it had that of its table, which all messages use."""
    name = str(listener.address)
    own = " reuse_port" if listener.reuse_port else ""  # has no socket in common with one of the other kind
    return replace(listener, name=name + own, label="" if listener.name == name else listener.name)


def located(config: Config, world: World, doubts: Iterable[tuple[KeyPath, str]]) -> list[Problem]:
    """Warnings about keys of a table that is good: each with the file and the line in which its key stands, or that of
    [defaults]; else the nearest thing around it."""
    files = _Files([layer for path in config.files if (layer := _read_file(path, None, world, Report())) is not None])
    found = []
    for key, message in doubts:
        own = [layer.place for layer in files.layers if key[:2] in layer.place.source.lines]
        places = [Place(place.source, key) for place in own]
        places += [Place(layer.place.source, ("defaults", *key[2:])) for layer in files.layers[:1]]
        there = (place for place in places if place.path in place.source.lines)
        place = next(there, places[0]) if places else None
        if place is not None:
            found.append(Problem(place.source.path, place.line, "", f"warning: {dotted(key)}: {message}"))
    return sorted(found)


def socket_path(path: str, world: World) -> str:
    """The socket of the daemon that runs this table: what a client needs, though other keys may be bad by now.

    Raises ConfigError when the file or the key `daemon.socket` can't be read.
    """
    report = Report()
    main = _read_file(posixpath.normpath(posixpath.join(world.cwd, path)), None, world, report)
    if main is None:
        raise ConfigError(list(report.problems))
    daemon, _ = _daemon(main, Scope(report, world.environ), world)
    problems = [problem for problem in report.problems if problem.key == "daemon.socket"]
    if problems:
        raise ConfigError(problems)
    return daemon.socket


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Files:
    """The documents of the table, the main one first. `complete`: none is missing."""

    layers: list[Layer] = field(default_factory=list)
    complete: bool = True


def _read_files(path: str, world: World, report: Report) -> _Files:
    main = _read_file(path, None, world, report)
    if main is None:
        raise ConfigError(list(report.problems))
    files = _Files([main])
    section = Section(Scope(report, world.environ), [main], MAIN_KEYS)
    seen = {path}
    for place, pattern in section.items("include", lambda raw: values.path(raw, main.place.source.folder), one=True):
        paths = world.glob(_below(main.place.source.folder, pattern)) if re.search(r"[*?[]", pattern) else [pattern]
        for one in paths:
            if one in seen:
                continue
            seen.add(one)
            layer = _read_file(one, place, world, report)
            if layer is None:
                files.complete = False
                continue
            files.layers.append(layer)
            _check_included(layer, main, report)
    return files


def _below(folder: str, pattern: str) -> str:
    """The pattern, with the folder that it starts in taken literally."""
    rest = pattern.removeprefix(f"{folder}/")
    return pattern if rest == pattern else f"{values.glob_escape(folder)}/{rest}"


def _read_file(path: str, asked: Place | None, world: World, report: Report) -> Layer | None:
    """The document in a file, or None after a problem. `asked` is the entry of `include` that named it."""

    def refuse(message: str, line: int = 0) -> None:
        report.problems.add(Problem(path, line, "", message))

    why = world.trusted(path)
    if why:
        refuse(f"refused, because it decides what root runs: {why}")
        return None
    try:
        data = world.read(path)
    except OSError as error:
        reason = error.strerror or str(error)
        report.add(asked, f"can't read {path}: {reason}") if asked else refuse(f"can't be read: {reason}")
        return None
    try:
        # tomllib.load() reads bytes so, too: a table from another system may end its lines with CR LF.
        text = data.decode().replace("\r\n", "\n")
        content = tomllib.loads(text)
        layer = Layer(Place(Source(path, positions.scan(text)), ()), content)
        huge = list(_huge_integers(layer.place, content))
        for place in huge:
            report.add(place, "does not fit into 64 bits")
        return None if huge else layer
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8: {error.reason}", data.count(b"\n", 0, error.start) + 1)
    except RecursionError:
        refuse("is nested too deeply")
    except ValueError as error:  # TOMLDecodeError is one, and so is what int() says about a number of 5000 digits
        refuse(*_syntax_error(str(error), text))
    return None


def _huge_integers(place: Place, content: object) -> Iterator[Place]:
    """TOML's integers have 64 bits, Python's have no end: one of a million digits could not even be shown."""
    if isinstance(content, int) and not -(2**63) <= content < 2**63:
        yield place
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from _huge_integers(place / key, value)


def _syntax_error(message: str, text: str) -> tuple[str, int]:
    """What tomllib says, and the line of it."""
    what, _, where = message.rpartition(" (at ")
    line = re.match(r"line (\d+)", where)
    what = what[:1].lower() + what[1:]
    return f"no valid TOML: {what or message}", int(line[1]) if line else len(text.splitlines())


def _check_included(layer: Layer, main: Layer, report: Report) -> None:
    for key in layer.content:
        if key in {"include", "daemon", "defaults"}:
            report.add(layer.place / key, f"stands only in the main table, {main.place.source.path}")
        elif key not in MAIN_KEYS:
            report.add(layer.place / key, f"unknown key{values.suggestion(key, ('listener', 'program'))}")


def _table(layer: Layer, key: str, report: Report) -> Layer:
    """The table of this name in a document; an empty one if it is missing."""
    content = layer.content.get(key, {})
    if not isinstance(content, dict):
        report.add(layer.place / key, f"must be a table, not {values.type_name(content)}")
        content = {}
    return Layer(layer.place / key, content)


def _named_tables(files: _Files, kind: str, report: Report) -> Iterator[tuple[str, Layer]]:
    """The tables [kind.NAME] of all files; of two with one name the first."""
    seen: dict[str, Place] = {}
    for document in files.layers:
        tables = _table(document, kind, report)
        for name, content in tables.content.items():
            layer = _table(tables, name, report)
            if not isinstance(content, dict):
                continue
            if name in seen:
                report.add(layer.place, f"is already defined at {seen[name]}")
            else:
                seen[name] = layer.place
                yield name, layer


# --- the daemon and the listeners ---------------------------------------------------------------------------------


def _daemon(main: Layer, scope: Scope, world: World) -> tuple[Daemon, Scope]:
    """The daemon's settings, and the scope of all that may name its folders."""
    layer = _table(main, "daemon", scope.report)
    state_dir, log_dir = _default_folders(world)
    section = Section(scope, [layer], DAEMON_KEYS, {"sampling": SAMPLING_KEYS})
    own_state = section.path("state_dir", state_dir)
    scope = scope.knowing(state_dir=own_state)
    section = Section(scope, [layer], DAEMON_KEYS, {"sampling": SAMPLING_KEYS})
    own_log = section.path("log_dir", log_dir or f"{own_state}/log")
    scope = scope.knowing(log_dir=own_log)
    section = Section(scope, [layer], DAEMON_KEYS, {"sampling": SAMPLING_KEYS})
    sampling = section.table("sampling", SAMPLING_KEYS)
    operators, readers = _group(section, "socket_group", world), _group(section, "read_only_group", world)
    # A file has one group. With a second one in play everybody may connect, and the peer's credentials decide.
    usual_mode = 0o666 if readers >= 0 else 0o660 if operators >= 0 else 0o600
    default = Daemon(socket="", state_dir="", log_dir="")
    daemon = Daemon(
        identifier=section.value("identifier", values.title, default.identifier),
        socket=_socket(section, rpc.default_socket(world.environ, world.uid)),
        socket_mode=section.value("socket_mode", values.mode, usual_mode),
        socket_gid=operators,
        read_only_gid=readers,
        state_dir=own_state,
        log_dir=own_log,
        log_level=section.value("log_level", values.choice(_LOG_LEVEL), default.log_level),
        log_max_size=section.value("log_max_size", values.size, default.log_max_size),
        log_keep=section.value("log_keep", values.integer(0, 10000), default.log_keep),
        log_min_free=section.value("log_min_free", values.room, default.log_min_free),
        umask=section.value("umask", values.mode, default.umask),
        open_files=section.value("open_files", values.integer(64), default.open_files),
        shutdown_timeout=section.value("shutdown_timeout", values.duration, default.shutdown_timeout),
        exit_when=section.value("exit_when", values.choice(_EXIT_WHEN), default.exit_when),
        sampling=Sampling(
            interval=sampling.value("interval", _interval, default.sampling.interval),
            memory=sampling.value("memory", values.choice(_MEMORY), default.sampling.memory),
        ),
    )
    return daemon, scope


def _interval(raw: object) -> float:
    seconds = values.duration(raw)
    if 0 < seconds < SHORTEST_INTERVAL:
        raise BadValue(f"expected 0 (never) or at least {SHORTEST_INTERVAL:g} s: a sample reads all of /proc")
    return seconds


def _default_folders(world: World) -> tuple[str, str]:
    """Where state and logs go if nobody says so; "" for logs: a folder in that of the state."""
    if world.uid == 0:
        return "/var/lib/procman", "/var/log/procman"
    state = world.environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # the XDG Base Directory Specification: a relative one is to be ignored
        account = None if world.environ.get("HOME") else world.account(str(world.uid))
        state = f"{account.home if account else world.environ.get('HOME', '/')}/.local/state"
    return values.path(f"{state}/procman", "/"), ""


def _socket(section: Section, usual: str) -> str:
    path = section.path("socket", usual, values.unix_path)
    if not section.has("socket"):
        try:
            values.unix_path(usual, "/")
        except BadValue as error:
            section.scope.report.add(section.place / "socket", f"{error}; set a shorter one")
    return path


def _group(section: Section, key: str, world: World) -> int:
    def group(raw: object) -> int:
        name = values.account_name(raw)
        gid = world.group(name) if name else -1
        if gid is None:
            raise BadValue(f"unknown group {name!r}")
        return gid

    return section.value(key, group, -1)


def _listeners(files: _Files, scope: Scope, world: World) -> Iterator[tuple[str, tuple[Place, Listener]]]:
    """The named listeners, each with the place of its address. One whose address is bad is there, with none."""
    for name, layer in _named_tables(files, "listener", scope.report):
        try:
            values.check_name(name)
        except BadValue as error:
            scope.report.add(layer.place, str(error))
        section = Section(scope, [layer], LISTENER_KEYS)
        yield name, (section.at("bind"), _listener(name, section, world))


def _listener(name: str, section: Section, world: World) -> Listener:
    nowhere = Address("tcp")
    folder = section.place.source.folder
    address = section.value("bind", lambda raw: values.address(raw, folder), nowhere)
    if not section.has("bind"):
        section.scope.report.add(section.place, 'needs a "bind"')
    default = Listener(name=name, address=address)
    if address != nowhere:
        for key in ("mode", "owner"):
            if section.has(key) and address.kind != "unix":
                section.problem(key, "is for a Unix socket")
        if section.has("reuse_port") and address.kind == "unix":
            section.problem("reuse_port", "is for a TCP socket")

    def owner(raw: object) -> tuple[int, int]:
        user, _, group = values.string(raw).partition(":")
        account = world.account(user) if user else None
        gid = world.group(group) if group else -1
        if user and account is None:
            raise BadValue(f"unknown user {user!r}")
        if gid is None:
            raise BadValue(f"unknown group {group!r}")
        if account and world.uid not in {0, account.uid}:
            raise BadValue(f"needs root, and procmand runs as user {world.uid}")
        return account.uid if account else -1, gid

    uid, gid = section.value("owner", owner, (-1, -1))
    return Listener(
        name=name,
        address=address,
        backlog=section.value("backlog", values.integer(1, 65535), default.backlog),
        mode=section.value("mode", values.mode, default.mode),
        uid=uid,
        gid=gid,
        reuse_port=section.value("reuse_port", values.boolean, default.reuse_port),
    )


# --- what two may not share ---------------------------------------------------------------------------------------


def _check_addresses(
    daemon: Daemon,
    main: Place,
    named: Sequence[tuple[Place, Listener]],
    found: Sequence[Definition],
    report: Report,
) -> None:
    """An address belongs to one named listener, or to one program: two sockets can't be bound to it."""
    taken: dict[object, list[tuple[Address, str, Place]]] = {}

    def hint(holder: str, owner: str) -> str:
        kind, _, name = holder.partition(".")
        if owner.startswith("program."):
            if kind == "listener":
                return f'; to share that socket, list "{name}"'
            if kind == "program":
                return "; to share one socket, make it a [listener.NAME]"
        return ""

    def take(address: Address, owner: str, place: Place) -> None:
        same_door = taken.setdefault(address.port or address.path, [])
        for other, holder, where in same_door:
            if address == other and holder == owner:
                return  # another process of the same program: they share the socket
            if values.overlap(address, other):
                known = holder if address == other else f"{holder} ({other})"
                report.add(place, f"{address} is already the address of {known}, at {where}{hint(holder, owner)}")
                return
        same_door.append((address, owner, place))

    take(Address("unix", path=daemon.socket), "the daemon", main / "daemon" / "socket")
    for place, listener in named:
        if listener.address != Address("tcp"):
            take(listener.address, f"listener.{listener.name}", place)
    for definition in found:
        for place, listener in definition.sockets:
            take(listener.address, f"program.{definition.program.program}", place)
    _check_beside(taken, report)


def _check_beside(taken: Mapping[object, Sequence[tuple[Address, str, Place]]], report: Report) -> None:
    """A Unix listener has a second socket beside it in each reload (`listeners.beside_address`)."""
    doors = [door for same_door in taken.values() for door in same_door if door[0].kind == "unix"]
    for address, owner, place in doors:
        for other, holder, where in doors:
            if other.path == f"{address.path}~" and owner != "the daemon":
                message = f"{other} is where a reload opens the second socket of {owner}, at {place}"
                report.add(where, f"{message}: give {holder} another path")


def _check_logs(daemon: Daemon, found: Sequence[Definition], world: World, report: Report) -> None:
    """A file is written, rotated and removed for one log: what is done for a second one would hit the first."""
    users: dict[str, list[Definition]] = {}
    for definition in found:
        for path in {definition.program.log.path, definition.program.log.error_path} - {""}:
            users.setdefault(path, []).append(definition)
    for path, (first, *more) in users.items():
        for definition in more:
            if definition.program.program == first.program.program:
                report.add(definition.log_place, f'several processes would write {path}: put "${{instance}}" into it')
            else:
                report.add(definition.log_place, f"{path} is already the log of {_holder(first)}")

    def holder(path: str) -> str:
        return _holder(users[path][0]) if path in users else "procmand itself"

    own = daemon.own_log
    for definition in users.pop(own, ()):
        report.add(definition.log_place, f"{own} is the log of procmand itself: choose another path")
    for path, other in lognames.clashes([own, *users], world.real).items():
        whose = f"{other}, the log of {holder(other)}"
        if posixpath.basename(path) == posixpath.basename(other):
            problem = f"{path} is the same file as {whose}: choose another path"
        else:
            problem = f"{path} is a name that procman gives to files of {whose}: choose another path"
        for definition in users[path]:
            report.add(definition.log_place, problem)


def _holder(definition: Definition) -> str:
    return f"program {definition.program.program!r} ({definition.log_place})"


def _check_scaled(found: Sequence[Definition], report: Report) -> None:
    """How many connections wait must say something about the one program whose processes are counted."""
    users: dict[str, set[str]] = {}
    for definition in found:
        for name in definition.program.listen:
            users.setdefault(name, set()).add(definition.program.program)
    for definition in found:
        program = definition.program
        for name in program.listen if program.scale is not None else ():
            others = ", ".join(sorted(users[name] - {program.program}))
            if others:
                message = f"the listener {name} is also of {others}, and its queue says nothing about one of them"
                report.add(definition.place / "scale", f"{message}: give this one a listener of its own")


def _check_groups(found: Sequence[Definition], report: Report) -> None:
    """A name that procmanctl is given means one thing: a program or a group."""
    places = {definition.program.program: definition.place for definition in found}
    for definition in found:
        for place, group in definition.groups:
            if group in places:
                report.add(place, f"{group!r} is the name of a program, at {places[group]}")

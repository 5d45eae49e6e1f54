"""From one `[program.NAME]` table, with `[defaults]` under it, to the processes that it stands for.

Pure. It must not know files, other programs, or how anything is started; what two programs may not share is compared in
`table`, from what a `Definition` carries along.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from procman import canary, servers, units, values
from procman.config import Account, Address, Daemon, Every, Limits, Listener, Log, Program, Ready, Scale
from procman.keys import Layer, Place, Scope, Section, World
from procman.records import dataclass
from procman.values import BadValue

LOG_FILE_KEYS = ("path", "max_size", "rotate_every", "keep", "keep_total", "compress", "on_error", "mode_bits")
LOG_KEYS = ("mode", "stderr", "address", *LOG_FILE_KEYS, "timestamps", "format")
READY_KINDS = ("http", "tcp", "unix", "command", "log", "notify")
READY_KEYS = (*READY_KINDS, "host")
LIMITS_KEYS = ("open_files", "processes", "core", "nice", "oom_score_adj", "cpu_affinity", "no_new_privileges")
SCALE_KEYS = ("min", "max", "idle_timeout", "backlog")
COMMAND_KEYS = ("command", "shell", "instances")
WSGI_KEYS = ("middleware", "access_log")
COUNT_KEYS = ("workers", "threads")
SERVER_KEYS = ("server", "app", *COUNT_KEYS, "server_options", *WSGI_KEYS)
PROGRAM_KEYS = (
    *COMMAND_KEYS,
    *SERVER_KEYS,
    *("listen", "virtualenv", "directory", "user", "group", "umask", "environment", "env_file", "inherit_environment"),
    *("priority", "groups", "autostart", "restart", "success_exit_codes", "start_seconds", "start_timeout"),
    *("start_retries", "restart_delay", "restart_delay_max", "stop_signal", "stop_timeout", "kill", "reload"),
    *("canary", "max_age"),
    *("ready", "log", "limits", "scale"),
)
BELOW = {"ready": READY_KEYS, "log": LOG_KEYS, "limits": LIMITS_KEYS, "scale": SCALE_KEYS}

# A slip of the keyboard must not start a million processes.
MAX_PROCESSES = 1000

_ALWAYS = "is the program's own listener, which procman holds: it takes connections whether the program serves or not"
_STAND_IN = Listener(name="", address=Address("unix", path="/"))
_RESTARTED = values.Reload("restart")
_DEFAULT = Program(name="", program="", argv=())
_LOG = Log()
_RESTART: tuple[Literal["always", "on-failure", "never"], ...] = ("always", "on-failure", "never")
_KILL: tuple[Literal["tree", "main"], ...] = ("tree", "main")
_LOG_MODE: tuple[Literal["file", "inherit", "syslog", "journal", "discard"], ...] = (
    *("file", "inherit", "syslog", "journal", "discard"),
)
_LOG_FORMAT: tuple[Literal["raw", "json"], ...] = ("raw", "json")
_LOG_ONLY = (
    (LOG_FILE_KEYS, ("file",)),
    (("address",), ("syslog",)),
    (("timestamps", "format"), ("file", "inherit")),  # the others have a form of their own, with the time in it
)
"""Keys of a log, and the modes that they are for."""
_STDERR: tuple[Literal["merge", "separate", "discard"], ...] = ("merge", "separate", "discard")
_EVERY: tuple[Every, ...] = ("", "hourly", "daily", "weekly")
_COMPRESS: tuple[Literal["gzip", "none"], ...] = ("gzip", "none")
_ON_ERROR: tuple[Literal["drop", "block"], ...] = ("drop", "block")


@dataclass(frozen=True, slots=True)
class Around:
    """What a program is read against. `complete` is False when a file of the table could not be read: then a listener
    that nobody defined may be defined there, and is not reported."""

    world: World
    scope: Scope
    daemon: Daemon
    listeners: Mapping[str, Listener]
    complete: bool


@dataclass(frozen=True, slots=True)
class Definition:
    """One process, and where the things stand that must not clash with those of others. `sockets`: its addresses."""

    program: Program
    place: Place
    log_place: Place
    sockets: tuple[tuple[Place, Listener], ...]
    groups: tuple[tuple[Place, str], ...]


@dataclass(frozen=True, slots=True)
class _Identity:
    """Which process of a program is read: `label` is its name, `several` whether there are others."""

    label: str
    program: str
    instance: int
    several: bool


def read(name: str, own: Layer, defaults: Layer, around: Around) -> tuple[Definition, ...]:
    """The processes of the program `name`. Problems go to the report of `around.scope`; what is returned then is good
    only for finding the problems of others."""
    report = around.scope.report
    before = len(report.problems)
    try:
        values.name(name)
    except BadValue as error:
        report.add(own.place, str(error))
    layers = (own, defaults)
    alone = _Identity(name, name, 1, several=False)
    first, count = _definition(_section(layers, alone, around), alone, around)
    if count > MAX_PROCESSES:
        report.add(own.place, f"would be {count} processes; procman runs up to {MAX_PROCESSES} of one program")
    if count == 1 or len(report.problems) > before:
        return (first,)
    identities = [_Identity(f"{name}:{i}", name, i, several=True) for i in range(1, count + 1)]
    return tuple(_definition(_section(layers, one, around), one, around)[0] for one in identities)


def check_defaults(defaults: Layer, around: Around) -> None:
    """Reports the problems of `[defaults]` that no program would show, because none uses the key."""
    identity = _Identity("defaults", "defaults", 1, several=False)
    section = _section((defaults,), identity, around)
    _settings(section, identity, around)
    _command(section)
    section.value("instances", values.integer(1, MAX_PROCESSES), 1)
    section.value("server", values.choice(servers.SERVERS), "")
    _request(section, identity, "wsgi", (), around)
    _listen(section, around)
    _scale(section, "", ())
    _ready(section, None, None)
    section.value("canary", values.canary, values.Canary())
    if section.has("command") and section.has("server"):
        section.problem("server", "a program has either command or server, not both")


def _section(layers: Sequence[Layer], identity: _Identity, around: Around) -> Section:
    scope = around.scope.knowing(program=identity.program, instance=str(identity.instance))
    return Section(scope, layers, PROGRAM_KEYS, BELOW)


def _definition(section: Section, identity: _Identity, around: Around) -> tuple[Definition, int]:
    """The process and how many of it there are."""
    program = _settings(section, identity, around)
    sockets = _listen(section, around)
    listeners = [listener for _, listener in sockets]
    program = replace(program, listen=tuple(listener.name for listener in listeners))
    ready = _ready(section, None if section.has("listen") and not listeners else listeners, program.log)
    count = 1
    chosen = _chosen(section)
    scale = _scale(section, chosen, listeners)
    match chosen:
        case "command":
            count = section.value("instances", values.integer(1, MAX_PROCESSES), 1)
            program = replace(program, argv=_command(section))
        case "server":
            plan = _plan(section, identity, listeners, around)
            if plan:
                count = plan.processes
                program = _planned(section, program, plan)
                ready = ready or plan.ready
    if scale is not None:
        count, program = scale.max, replace(program, scale=scale)
    ready = ready or Ready()
    program = replace(program, ready=ready, notify=program.notify or ready.kind == "notify")
    program = _canary(section, _reloaded(section, program, listeners), listeners)
    log = section.table("log", LOG_KEYS)
    definition = Definition(
        program=program,
        place=section.place,
        log_place=log.at("path") if log.has("path") else section.place,
        sockets=tuple((place, listener) for place, listener in sockets if ":" in listener.name),
        groups=tuple(section.items("groups", values.name)),
    )
    return definition, count


# --- what runs ----------------------------------------------------------------------------------------------------


def _chosen(section: Section) -> str:
    """ "command" or "server", whichever the program has; its own choice hides the other one in the defaults."""
    both = ("command", "server")
    chosen = [key for key in both if section.owns(key)] or [key for key in both if section.has(key)]
    if not chosen:
        section.scope.report.add(section.place, 'needs a "command", or a "server" with its "app"')
        return ""
    if len(chosen) == 2:
        line = section.at("command").line
        section.problem("server", f"a program has either command or server, not both (command is on line {line})")
        return ""
    for key in SERVER_KEYS if chosen == ["command"] else COMMAND_KEYS:
        if section.owns(key):
            needed = "server" if chosen == ["command"] else "command"
            instead = '; a server has "workers"' if key == "instances" else ""
            section.problem(key, f'is for a program with a "{needed}"{instead}')
    return chosen[0]


def _command(section: Section) -> tuple[str, ...]:
    if not section.value("shell", values.boolean, False):
        return _argv(section)
    raw = section.raw("command")
    if isinstance(raw, list):
        section.problem("command", "must be a string when shell = true, not an array")
        return ()
    return ("/bin/sh", "-c", section.value("command", values.text, ""))


def _argv(section: Section) -> tuple[str, ...]:
    """The key "command": an array as it is, a string split into words before its variables are replaced, so that no
    value of a variable is ever split."""
    raw = section.raw("command")
    place = section.at("command")
    if isinstance(raw, str):
        try:
            argv = tuple(values.string(section.scope.expand(word, place)) for word in values.words(raw))
        except BadValue as error:
            section.problem("command", str(error))
            return ()
    else:
        argv = section.array("command", values.string, one=True)
        if not isinstance(raw, list) or len(argv) < len(raw):
            return argv  # there is none, or the reason is reported
    if not argv or not argv[0]:
        section.problem("command", "must not be empty")
    return argv


def _scale(section: Section, chosen: str, listeners: Sequence[Listener]) -> Scale | None:
    """How many of them run; None where that is no matter of load. What the defaults say of it is for those programs
    that can have it."""
    table, default = section.table("scale", SCALE_KEYS), Scale()
    scale = Scale(
        min=table.value("min", values.integer(0, MAX_PROCESSES), default.min),
        max=table.value("max", values.integer(1, MAX_PROCESSES), default.max),
        idle_timeout=table.value("idle_timeout", values.positive_duration, default.idle_timeout),
        backlog=table.value("backlog", values.integer(1), default.backlog),
    )
    against = _against_scale(section, chosen, listeners)
    if not section.has("scale") or not chosen:
        return None
    if against:
        if section.owns("scale"):
            section.problem("scale", against)
        return None
    if not table.has("max"):
        section.scope.report.add(table.place, "needs max: how many there can be")
    elif scale.min > scale.max:
        key = "min" if table.has("min") else "max"
        table.problem(key, f"min ({scale.min}) is more than max ({scale.max})")
    elif scale.min == scale.max:
        table.problem("min" if table.has("min") else "max", _fixed(scale, chosen))
    if section.value("restart", values.choice(_RESTART), "always") != "always":
        section.problem("restart", 'must be "always" with scale: how many run is a matter of the connections')
    short = min((listener.backlog for listener in listeners), default=scale.backlog)
    if scale.backlog > short:
        table.problem("backlog", f"backlog ({scale.backlog}) is never reached: the listener has room for {short}")
    count = "instances" if chosen == "command" else "workers"
    if section.owns(count):
        section.problem(count, "is for a fixed number: with scale, scale.max says how many there can be")
    return scale


def _fixed(scale: Scale, chosen: str) -> str:
    """What to do about a range of one number."""
    key = f'{"instances" if chosen == "command" else "workers"} = {scale.max}'
    return f"min and max are both {scale.max}: leave scale out and say {key}, or raise scale.max"


def _against_scale(section: Section, chosen: str, listeners: Sequence[Listener]) -> str:
    """Why the number of processes can't go by load; "" if it can."""
    server = section.raw("server")
    if chosen == "server" and server != "wsgi":
        return f'is for the server "wsgi" and for a command: {server} has workers of its own'
    if not section.has("listen"):
        return "goes by the connections that wait: it needs a listen"
    own = next((listener.name for listener in listeners if listener.reuse_port), "")
    return f"each process has a queue of its own at the listener {own}: leave reuse_port out" if own else ""


def _request(
    section: Section, identity: _Identity, server: str, listen: Sequence[Listener], around: Around
) -> servers.Request:
    """All that a server's plan is made from."""
    world = around.world
    timeout = section.value("stop_timeout", values.duration, -1.0)
    return servers.Request(
        server=server,
        name=identity.label,
        program=identity.program,
        instance=identity.instance,
        app=section.value("app", values.text, ""),
        workers=section.value("workers", values.integer(1, MAX_PROCESSES), 0),
        scaled=section.has("scale"),
        threads=section.value("threads", values.integer(1), 0),
        listen=tuple(listen),
        options=section.mapping("server_options", values.server_option, merge=False),
        middleware=section.array("middleware", values.text)[: None if server == "wsgi" else 0],
        access_log=section.value("access_log", values.boolean, True) or server != "wsgi",
        virtualenv=section.path("virtualenv", "", values.optional_path),
        python=world.python,
        wsgi_script=world.wsgi_script,
        site=world.site,
        runtime_dir=posixpath.dirname(around.daemon.socket),
        stop_timeout=timeout if timeout >= 0 else None,
        reload_signal=section.value("reload", values.reload, _RESTARTED).signal,
        ready_given=section.has("ready"),
    )


def _plan(section: Section, identity: _Identity, listen: Sequence[Listener], around: Around) -> servers.Plan | None:
    """How the server is run; None after a problem."""
    report = section.scope.report
    before = len(report.problems)
    server = section.value("server", values.choice(servers.SERVERS), "")
    for key in WSGI_KEYS:
        if server not in {"", "wsgi"} and section.owns(key):
            section.problem(key, f'is for the server "wsgi", not "{server}"')
    request = _request(section, identity, server, listen, around)
    if not section.has("app"):
        report.add(section.place / "app", 'is required with a "server"')
    if len(report.problems) > before or (section.has("listen") and not listen):
        # What the server would say about those is only an echo; its options are another matter.
        sound = replace(request, app="app:app", middleware=(), listen=request.listen or (_STAND_IN,), stop_timeout=None)
        _accepted(section, sound, only_options=True)
        return None
    plan = _accepted(section, request)
    where = plan.ready.address if plan else None
    if where and where.kind == "unix":
        try:
            values.unix_path(where.path, "/")
        except BadValue as error:
            report.add(section.place, f"{error}; give daemon.socket a shorter folder")
    return plan


def _accepted(section: Section, request: servers.Request, *, only_options: bool = False) -> servers.Plan | None:
    """The plan for the request. A plan refuses the first mistake only: so each is reported and taken out, and the rest
    is asked about again. `only_options`: nothing else is reported. A count of the defaults is for those servers that
    have it."""
    options = dict(request.options)
    sound: dict[str, dict[str, Any]] = {
        "app": {"app": "app:app"},
        "listen": {"listen": request.listen[:1] or (_STAND_IN,)},
        "stop_timeout": {"stop_timeout": None},
        "reload": {"reload_signal": 0},
        "workers": {"workers": 0},
        "threads": {"threads": 0},
    }
    while True:
        try:
            return servers.plan(replace(request, options=options))
        except servers.BadOption as bad:
            table, _, option = bad.key.partition(".")
            if (option or not only_options) and not (table in COUNT_KEYS and not section.owns(table)):
                place = section.at(table) if section.has(table) else section.place / table
                section.scope.report.add(place / option if option else place, bad.message)
            if table in sound:
                request = replace(request, **sound.pop(table))
            elif options.pop(option, None) is None:
                return None


def _planned(section: Section, program: Program, plan: servers.Plan) -> Program:
    """The program as its server needs it; what the user said himself wins."""
    return replace(
        program,
        server=section.value("server", values.string, ""),
        argv=plan.argv,
        environment=tuple(sorted({**dict(plan.environment), **dict(program.environment)}.items())),
        stop_signal=program.stop_signal if section.has("stop_signal") else plan.stop_signal,
        stop_timeout=program.stop_timeout if section.has("stop_timeout") else plan.stop_timeout,
        notify=plan.notify,
    )


# --- settings -----------------------------------------------------------------------------------------------------


def _settings(section: Section, identity: _Identity, around: Around) -> Program:
    """All that stands for itself: everything but what runs, what it listens on and how it shows that it is ready."""
    value, default, here = section.value, _DEFAULT, section.place.source.folder
    delay = value("restart_delay", values.duration, default.restart_delay)
    longest = value("restart_delay_max", values.duration, default.restart_delay_max)
    if delay > longest:
        key = "restart_delay" if section.has("restart_delay") else "restart_delay_max"
        section.problem(key, f"restart_delay ({delay:g} s) is longer than restart_delay_max ({longest:g} s)")
    codes = section.array("success_exit_codes", values.exit_code)
    return Program(
        name=identity.label,
        program=identity.program,
        instance=identity.instance,
        argv=(),
        directory=section.path("directory", here),
        account=_account(section, around),
        umask=value("umask", values.mode, default.umask),
        environment=tuple(sorted(section.mapping("environment", values.variable, naming=values.variable_name).items())),
        env_files=_env_files(section),
        inherit_environment=value("inherit_environment", values.boolean, default.inherit_environment),
        virtualenv=_virtualenv(section, around.world),
        priority=value("priority", values.integer(), default.priority),
        groups=section.array("groups", values.name),
        autostart=value("autostart", values.boolean, default.autostart),
        restart=value("restart", values.choice(_RESTART), default.restart),
        success_exit_codes=frozenset(codes) if section.has("success_exit_codes") else default.success_exit_codes,
        start_seconds=value("start_seconds", values.duration, default.start_seconds),
        start_timeout=value("start_timeout", values.positive_duration, default.start_timeout),
        start_retries=value("start_retries", values.integer(-1), default.start_retries),
        restart_delay=delay,
        restart_delay_max=longest,
        stop_signal=value("stop_signal", values.signal_number, default.stop_signal),
        stop_timeout=value("stop_timeout", values.duration, default.stop_timeout),
        kill=value("kill", values.choice(_KILL), default.kill),
        max_age=value("max_age", values.duration, default.max_age),
        log=_log(section, identity, around.daemon.log_dir),
        limits=_limits(section),
    )


def _reloaded(section: Section, program: Program, listeners: Sequence[Listener]) -> Program:
    """`program`, with what `reload` does: an overlap, where nothing stands against it."""
    own = [listener.name for listener in listeners if listener.reuse_port]
    alone = not servers.overlaps(program)
    usual = listeners and not own and not alone and not units.unproven(program, listeners)
    said = section.value("reload", values.reload, values.Reload("overlap" if usual else "restart"))
    if said.kind == "overlap" and own and section.has("reload"):
        message = f'a successor can\'t share the listener {own[0]}, which has reuse_port: use "restart"'
        section.problem("reload", message)
    if said.kind == "overlap" and alone and section.has("reload"):
        message = "a successor can't tell of its workers at the same stats address: leave stats out, or use \"restart\""
        section.problem("reload", message)
    return replace(program, reload=said.kind, reload_signal=said.signal, reload_command=said.command)


def _canary(section: Section, program: Program, listeners: Sequence[Listener]) -> Program:
    """`program`, with its canary. One of the defaults is for those programs that can have one."""
    said = section.value("canary", values.canary, values.Canary())
    problem = canary.obstacle(program, listeners) if said.share else ""
    if problem and section.owns("canary"):
        section.problem("canary", problem)
    return program if problem else replace(program, canary=said.share, canary_seconds=said.seconds)


def _account(section: Section, around: Around) -> Account | None:
    """Who the program runs as; None: as the daemon."""
    named = [key for key in ("user", "group") if section.value(key, values.account_name, "")]
    if named and around.world.uid != 0:
        for key in named:
            section.problem(key, f"needs root, and procmand runs as user {around.world.uid}")
        return None

    def user(raw: object) -> Account:
        found = around.world.account(values.account_name(raw))
        if found is None:
            raise BadValue(f"unknown user {values.account_name(raw)!r}")
        return found

    def group(raw: object) -> int:
        found = around.world.group(values.account_name(raw))
        if found is None:
            raise BadValue(f"unknown group {values.account_name(raw)!r}")
        return found

    account = section.value("user", user, None) if "user" in named else None
    if "group" not in named:
        return account
    gid = section.value("group", group, -1)
    account = account or around.world.account(str(around.world.uid))
    if account is None or gid < 0:
        return account
    others = (one for one in account.groups if one not in {account.gid, gid})
    return replace(account, gid=gid, groups=(gid, *others))


def _env_files(section: Section) -> tuple[str, ...]:
    folder = section.at("env_file").source.folder
    return section.array("env_file", lambda raw: values.path(raw, folder), one=True)


def _virtualenv(section: Section, world: World) -> str:
    folder = section.path("virtualenv", "", values.optional_path)
    if folder and not world.glob(values.glob_escape(f"{folder}/bin/python")):
        section.problem("virtualenv", f"is no virtual environment: there is no {folder}/bin/python")
    return folder


def _log(section: Section, identity: _Identity, log_dir: str) -> Log:
    table = section.table("log", LOG_KEYS)
    mode = table.value("mode", values.choice(_LOG_MODE), _LOG.mode)
    useless = [(key, modes) for keys, modes in _LOG_ONLY for key in keys if mode not in modes]
    for key, modes in useless:
        if _overrides(table, key, "mode"):
            listed = " or ".join(f'"{one}"' for one in modes)
            table.problem(key, f'is for mode = {listed}, not "{mode}"')
    format_ = table.value("format", values.choice(_LOG_FORMAT), _LOG.format)
    timestamps = table.value("timestamps", values.boolean, _LOG.timestamps)
    if timestamps and format_ == "json" and mode in ("file", "inherit") and _overrides(table, "timestamps", "format"):
        table.problem("timestamps", 'is for format = "raw": each JSON object has its time')
    usual = f"{identity.program}-{identity.instance}.log" if identity.several else f"{identity.program}.log"
    path = table.path("path", f"{log_dir}/{usual}", values.log_path)
    stderr = table.value("stderr", values.choice(_STDERR), _LOG.stderr)
    address = table.path("address", _LOG.address, values.syslog_address)
    is_file = mode == "file"
    return Log(
        mode=mode,
        path=path if is_file else "",
        error_path=f"{path.removesuffix('.log')}.err.log" if is_file and stderr == "separate" else "",
        stderr=stderr,
        address=address if mode == "syslog" else "",
        max_size=table.value("max_size", values.size, _LOG.max_size),
        rotate_every=table.value("rotate_every", values.choice(_EVERY), _LOG.rotate_every),
        keep=table.value("keep", values.integer(0, 10000), _LOG.keep),
        keep_total=table.value("keep_total", values.size, _LOG.keep_total),
        compress=table.value("compress", values.choice(_COMPRESS), _LOG.compress),
        timestamps=timestamps and format_ == "raw" and mode in ("file", "inherit"),
        format=format_ if mode in ("file", "inherit") else _LOG.format,
        on_error=table.value("on_error", values.choice(_ON_ERROR), _LOG.on_error),
        mode_bits=table.value("mode_bits", values.mode, _LOG.mode_bits),
    )


def _overrides(table: Section, key: str, chooser: str) -> bool:
    """Whether `key` was written by whoever wrote `chooser`, or nearer to the program. One of the defaults may be
    useless here, where the program itself chose otherwise."""
    layer, choice = table.find(key), table.find(chooser)
    return bool(layer and choice) and table.layers.index(layer) <= table.layers.index(choice)


def _limits(section: Section) -> Limits:
    table = section.table("limits", LIMITS_KEYS)

    def number(key: str, low: int, high: int | None = None) -> int | None:
        return table.value(key, values.integer(low, high), None) if table.has(key) else None

    return Limits(
        open_files=number("open_files", 0) or None,
        processes=number("processes", 0) or None,
        core=table.value("core", values.size, None) if table.has("core") else None,
        nice=number("nice", -20, 19),
        oom_score_adj=number("oom_score_adj", -1000, 1000),
        cpu_affinity=tuple(sorted(set(table.array("cpu_affinity", values.integer(0, 8191))))),
        no_new_privileges=table.value("no_new_privileges", values.boolean, True),
    )


# --- listening and readiness --------------------------------------------------------------------------------------


def _listen(section: Section, around: Around) -> list[tuple[Place, Listener]]:
    """The sockets of the process, in order: a word with a colon is an address, any other the name of a listener."""
    folder = section.at("listen").source.folder

    def listener_of(raw: object) -> Listener | None:
        word = values.text(raw)
        if ":" in word:
            where = values.address(word, folder)
            return Listener(name=str(where), address=where)
        if word not in around.listeners and around.complete:
            hint = values.suggestion(word, around.listeners) or '; an address is written "HOST:PORT" or "unix:/path"'
            raise BadValue(f"unknown listener {word!r}{hint}")
        return around.listeners.get(word)

    found: list[tuple[Place, Listener]] = []
    for place, listener in section.items("listen", listener_of, one=True):
        if listener is None:
            continue
        if any(listener.name == other.name for _, other in found):
            section.scope.report.add(place, f"{listener.name} is listed twice")
        else:
            found.append((place, listener))
    return found


def _ready(section: Section, listen: Sequence[Listener] | None, log: Log | None) -> Ready | None:
    """The user's own probe. `listen` and `log` are None where nothing can be said about them."""
    table = section.table("ready", READY_KEYS, merge=False)
    kinds = [key for key in READY_KINDS if table.has(key)]
    raw = section.raw("ready")
    if len(kinds) > 1 or (isinstance(raw, dict) and raw.keys() <= {"host"}):
        section.problem("ready", f"needs exactly one of {', '.join(READY_KINDS)}")
    host = table.value("host", values.host, "")
    if host and kinds and kinds != ["http"]:
        table.problem("host", "is for http")
    if len(kinds) != 1:
        return None
    folder = table.place.source.folder

    def tcp(raw: object) -> Ready:
        if values.text(raw).startswith("unix:"):
            raise BadValue('must be like "127.0.0.1:5432"; a Unix socket is asked by { unix = "/path" }')
        address = values.address(raw, folder)
        if any(listener.address == address for listener in listen or ()):
            raise BadValue(f"{_ALWAYS}: use http, notify, log or command")
        return Ready(kind="tcp", address=address)

    def unix(raw: object) -> Ready:
        if values.text(raw).startswith("unix:"):
            raise BadValue('must be a path, without "unix:"')
        address = Address("unix", path=values.unix_path(raw, folder))
        if any(listener.address == address for listener in listen or ()):
            raise BadValue(f"{_ALWAYS}: use http, notify, log or command")
        return Ready(kind="unix", address=address)

    def line(raw: object) -> Ready:
        if log and log.mode == "discard":
            raise BadValue('no line can be seen with log.mode = "discard"')
        return Ready(kind="log", pattern=values.pattern(raw))

    def notify(raw: object) -> Ready:
        if not values.boolean(raw):
            raise BadValue("must be true, or not be there")
        return Ready(kind="notify")

    match kinds[0]:
        case "command":
            return Ready(kind="command", argv=_argv(table))
        case "http":
            found = table.value("http", lambda raw: _http(raw, listen), None)
            return replace(found, host=host) if found and host else found
        case kind:
            return table.value(kind, {"tcp": tcp, "unix": unix, "log": line, "notify": notify}[kind], None)


def _http(raw: object, listen: Sequence[Listener] | None) -> Ready:
    """A GET of a path on the first listener, or of a whole URL."""
    if "://" in values.text(raw):
        if values.text(raw).startswith("https:"):
            raise BadValue('https is not probed: ask it by { command = ["curl", "-fsS", "https://..."] }')
        address, path, host = values.url(raw)
        return Ready(kind="http", address=address, path=path, host=host)
    path = values.url_path(raw)
    if listen is None:
        return Ready(kind="http", path=path)
    if not listen:
        raise BadValue(f"{path!r} is asked on the first listener, and the program has none: give a whole URL")
    address = listen[0].address
    return Ready(kind="http", address=address, path=path, host=values.host_header(address))

"""What a program table says, as frozen values: the result of `table.parse`.

Pure: no I/O, and nothing here knows TOML. Every default, expansion and look-up is already done: durations are seconds,
sizes are bytes, signals are numbers, paths are absolute. "Has it changed?" is `!=`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from procman.records import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket is bound: `tcp` (host may be "" for all addresses; IPv6 without brackets) or `unix` (a path)."""

    kind: Literal["tcp", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Account:
    """A user to run as, already looked up."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket that the daemon opens once and holds.

    `name` says which socket it is: two listeners with one name can be the same open socket, and two names can be open
    beside each other. It is made of the address, so a listener that gets another address is another one. `label` is
    what the table calls it, "" where a program has the address itself.
    """

    name: str
    address: Address
    label: str = ""
    backlog: int = 2048
    mode: int = 0o660
    uid: int = -1
    gid: int = -1
    reuse_port: bool = False

    @property
    def title(self) -> str:
        """What people know it by."""
        return self.label or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """How a process shows that it serves. Fields that its kind does not need are empty.

    seconds   it stayed up for `Program.start_seconds`
    http      GET `path` on `address` answers 200-399 (any HTTP answer at all when `any_status`); `host` is the Host
              header
    tcp unix  `address` accepts a connection
    command   `argv` exits 0
    log       a line of its output matches the regular expression `pattern`
    notify    READY=1 arrives on NOTIFY_SOCKET (sd_notify(3))
    gunicorn  its control socket `address` shows a worker that has sent a heartbeat
    """

    kind: Literal["seconds", "http", "tcp", "unix", "command", "log", "notify", "gunicorn"] = "seconds"
    address: Address | None = None
    path: str = ""
    host: str = ""
    any_status: bool = False
    argv: tuple[str, ...] = ()
    pattern: str = ""


Every = Literal["", "hourly", "daily", "weekly"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Where the output of a process goes. `error_path` is used when `stderr` is "separate". `address` is that of a
    syslog: "unix:/path", "udp:HOST:PORT", or "" for the machine's own. `keep_total` is bytes, for all the rotated files
    of its program; 0: no limit."""

    mode: Literal["file", "inherit", "syslog", "journal", "discard"] = "file"
    path: str = ""
    error_path: str = ""
    stderr: Literal["merge", "separate", "discard"] = "merge"
    address: str = ""
    max_size: int = 50 * 1024 * 1024
    rotate_every: Every = ""
    keep: int = 10
    keep_total: int = 0
    compress: Literal["gzip", "none"] = "gzip"
    timestamps: bool = False
    format: Literal["raw", "json"] = "raw"
    on_error: Literal["drop", "block"] = "drop"
    mode_bits: int = 0o640

    @property
    def by_lines(self) -> bool:
        """Whether it is read line by line; else bytes go from the pipe to the file as they are."""
        return self.mode != "file" or self.timestamps or self.format == "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resource limits of a child. None: as the daemon's own."""

    open_files: int | None = None
    processes: int | None = None
    core: int | None = None
    nice: int | None = None
    oom_score_adj: int | None = None
    cpu_affinity: tuple[int, ...] = ()
    no_new_privileges: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many of the `max` processes of a program run: at least `min`. One more from `backlog` connections in the
    accept queue on; down to `min` after `idle_timeout` seconds without a connection."""

    min: int = 1
    max: int = 1
    idle_timeout: float = 300.0
    backlog: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """All that the table says about one process: a program's keys, with `${instance}` filled in.

    `name` is the process ("shop", or "shop:2" where there are several), `program` the table's name, `instance` counts
    from 1. `reload_signal` and `reload_command` count for their kind of `reload`. `canary` is a share (0 to 1; 0: there
    is none). `success_exit_codes` holds signals as
    negative numbers.

    `slot` is not the table's: a process has two places for a child, each with pipes and sockets of its own, so that a
    successor can start while the one before still serves. `key` names that place.
    """

    name: str
    program: str
    instance: int = 1
    server: str = ""
    argv: tuple[str, ...]
    listen: tuple[str, ...] = ()
    directory: str = "/"
    account: Account | None = None
    umask: int = 0o022
    environment: tuple[tuple[str, str], ...] = ()
    env_files: tuple[str, ...] = ()
    inherit_environment: bool = True
    virtualenv: str = ""
    priority: int = 999
    groups: tuple[str, ...] = ()
    autostart: bool = True
    restart: Literal["always", "on-failure", "never"] = "always"
    success_exit_codes: frozenset[int] = frozenset({0})
    start_seconds: float = 1.0
    start_timeout: float = 60.0
    start_retries: int = -1
    restart_delay: float = 0.1
    restart_delay_max: float = 60.0
    stop_signal: int = 15
    stop_timeout: float = 10.0
    kill: Literal["tree", "main"] = "tree"
    reload: Literal["overlap", "restart", "signal", "command"] = "restart"
    reload_signal: int = 0
    reload_command: tuple[str, ...] = ()
    canary: float = 0.0
    canary_seconds: float = 0.0
    max_age: float = 0.0
    ready: Ready = field(default_factory=Ready)
    notify: bool = False
    log: Log = field(default_factory=Log)
    limits: Limits = field(default_factory=Limits)
    scale: Scale | None = None
    slot: int = 0

    @property
    def key(self) -> str:
        """What names its place: "shop", or "shop~" for the other one. No name of the table has a "~"."""
        return place(self.name, self.slot)


def place(name: str, slot: int) -> str:
    """The name of one of the two places of the process `name`."""
    return f"{name}~" if slot else name


def split_place(key: str) -> tuple[str, int]:
    """The reverse of `place`."""
    return key.removesuffix("~"), int(key.endswith("~"))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How often (seconds; 0: never) CPU and memory are read, and which memory: "rss" or "pss"."""

    interval: float = 5.0
    memory: Literal["rss", "pss"] = "rss"


@dataclass(frozen=True, slots=True)
class Room:
    """What is to stay free on a disk: bytes, or a share of it (0 to 1), whichever is given. Nothing: no matter."""

    bytes: int = 0
    share: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.bytes or self.share)

    def of(self, total: int) -> int:
        """In bytes, on a disk of `total` bytes."""
        return max(self.bytes, int(total * self.share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """The daemon's own settings. `socket_gid` and `read_only_gid` are -1 where no group is named."""

    identifier: str = "procman"
    socket: str
    socket_mode: int = 0o600
    socket_gid: int = -1
    read_only_gid: int = -1
    state_dir: str
    log_dir: str
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_max_size: int = 50 * 1024 * 1024
    log_keep: int = 10
    log_min_free: Room = field(default_factory=Room)
    umask: int = 0o022
    open_files: int = 65536
    shutdown_timeout: float = 60.0
    exit_when: Literal["never", "any-fatal", "all-exited"] = "never"
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def own_log(self) -> str:
        """The daemon's own log, when it runs in the background."""
        return f"{self.log_dir}/procmand.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole program table: `files` are all the files that were read; `programs` has one entry for each process, in
    the order of the table's names, and `listeners` only sockets that a process or a `[listener.*]` table names."""

    path: str
    files: tuple[str, ...]
    daemon: Daemon
    listeners: tuple[Listener, ...]
    programs: tuple[Program, ...]

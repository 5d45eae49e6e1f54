"""From a program of the table to the request that the keeper carries out: environment, descriptors, limits. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from procman import shape
from procman.config import Program
from procman.rpc import LogSource

INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ")
"""What a program with `inherit_environment = false` still gets from the daemon's environment."""

PRIVATE = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "INVOCATION_ID"}
)
"""What the service manager told the daemon, and means nobody else."""

DIGITS_MAX = 18
"""Of a generation number. What is longer was not given by us (and Python does not read one of 5,000)."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def child_id(key: str, generation: int) -> str:
    """How the keeper knows a child: the place that it has (`Program.key`) and its number."""
    return f"{key}#{generation}"


def split_child_id(child: str) -> tuple[str, int]:
    """The reverse of `child_id`; generation 0 for a child that belongs to no process of the table."""
    key, _, number = child.rpartition("#")
    return key, int(number) if number.isascii() and number.isdecimal() and len(number) <= DIGITS_MAX else 0


def environment(
    program: Program,
    inherited: Mapping[str, str],
    from_files: Mapping[str, str],
    notify_socket: str,
    *,
    servers_folder: str = "",
) -> dict[str, str]:
    """The environment of a child; what comes later wins: daemon, user, virtualenv, `env_file`, `environment`,
    procman's.

    `servers_folder` comes last in the PATH of a server without a virtualenv: the one installed beside procman is found.
    """
    if program.inherit_environment:
        result = {key: value for key, value in inherited.items() if key not in PRIVATE}
    else:
        result = {key: inherited[key] for key in INHERITED if key in inherited}
    result.setdefault("PATH", DEFAULT_PATH)
    if program.account is not None:
        result |= {"HOME": program.account.home, "USER": program.account.name, "LOGNAME": program.account.name}
    if program.virtualenv:
        result |= {"VIRTUAL_ENV": program.virtualenv, "PATH": f"{program.virtualenv}/bin:{result['PATH']}"}
        result.pop("PYTHONHOME", None)
    elif program.server and servers_folder:
        result["PATH"] += f":{servers_folder}"
    result |= from_files
    result |= dict(program.environment)
    result |= {"PROCMAN_PROGRAM": program.program, "PROCMAN_PROCESS": program.name}
    result["PROCMAN_INSTANCE"] = str(program.instance)
    if notify_socket:
        result["NOTIFY_SOCKET"] = notify_socket
    return result


def log_sources(program: Program) -> list[LogSource]:
    """The log files of `program`."""
    if program.log.mode != "file":
        return []
    sources = [LogSource(program.name, "out", program.log.path)]
    if program.log.stderr == "separate":
        sources.append(LogSource(program.name, "err", program.log.error_path))
    return sources


def elsewhere(program: Program, *, stderr: bool) -> str:
    """Where the output of `program`, or its standard error, goes that is in no log file of its own; "" where it is."""
    log = program.log
    if log.mode == "file":
        if not stderr or log.stderr == "separate":
            return ""
        if log.stderr == "discard":
            return 'its standard error is dropped (log.stderr = "discard")'
        return f'its standard error is in {log.path} with the rest (log.stderr = "merge"): leave out --stderr'
    goes = {
        "discard": "is dropped",
        "inherit": "goes to the stdout of procmand, or what that was started with",
        "syslog": f"goes to the syslog {f'at {log.address}' if log.address else 'of the machine'}",
        "journal": f"goes to the journal: journalctl PROCMAN_PROGRAM={program.program}",
    }
    return f'its output {goes[log.mode]} (log.mode = "{log.mode}")'


def log_pipes(program: Program) -> tuple[str | None, str | None]:
    """Names under which the keeper holds the pipes for stdout and stderr; None is /dev/null.

    The write end is held as the name with "/w", the read end as the name with "/r".
    """
    log = program.log
    if log.mode == "discard":
        return None, None
    out = f"log/{program.key}/out"
    errors = {"merge": out, "separate": f"log/{program.key}/err", "discard": None}
    return out, errors[log.stderr]


def notify_name(program: Program) -> str:
    """Under which name the keeper holds the notification socket of `program`."""
    return f"notify/{program.key}"


def log_paths(program: Program) -> dict[str, str]:
    """The files to which the bytes of each of `log_pipes` go; "" where they go to none."""
    out, err = log_pipes(program)
    paths = {out: program.log.path, err: program.log.path if err == out else program.log.error_path}
    return {name: path for name, path in paths.items() if name is not None}


def request(program: Program, generation: int, env: Mapping[str, str], listen: Mapping[str, str]) -> dict[str, object]:
    """The keeper's "spawn" request for child number `generation`. `listen` maps listener names to held names, in
    order."""
    out, err = log_pipes(program)
    limits = {key: value for key, value in shape.flat(program.limits).items() if value not in (None, ())}
    asked: dict[str, object] = {
        "child": child_id(program.key, generation),
        "argv": list(program.argv),
        "env": dict(env),
        "directory": program.directory,
        "umask": program.umask,
        "stdout": out and f"{out}/w",
        "stderr": err and f"{err}/w",
        "listen": list(listen.items()),
        "limits": limits,
        "kill": program.kill,
    }
    if program.notify:
        asked["needs"] = [notify_name(program)]
    if program.account is not None:
        account = program.account
        asked |= {"uid": account.uid, "gid": account.gid, "groups": list(account.groups)}
    return asked


def parse_env_file(text: str) -> dict[str, str]:
    """KEY=VALUE lines; `#` comments, blank lines, a leading `export`, and matching quotes around a value are
    understood.

    Raises ValueError that names the line.
    """
    result: dict[str, str] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key.isidentifier():
            raise ValueError(f"line {number}: expected KEY=VALUE")
        if "\0" in value:
            raise ValueError(f"line {number}: no variable can hold a NUL character")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        result[key] = value
    return result

"""The kinds of value that a program table holds, each as one function: what the user wrote → what the program uses.

A converter takes what TOML gave and returns the value, or raises BadValue with the words for the user. It must not
know which key it is for, in which file that stands, or what the machine has: positions and look-ups are the callers'.
"""

from __future__ import annotations

import datetime as dt
import difflib
import ipaddress
import math
import posixpath
import re
import shlex
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from procman.config import Address, Room

T = TypeVar("T")
Converter = Callable[[object], T]

# sockaddr_un.sun_path has 108 bytes, the last one for the NUL: unix(7).
MAX_UNIX_PATH = 107

# The names that procman itself gives to ${...}; all others are environment variables of the daemon.
OWN_NAMES = ("program", "instance", "here", "log_dir", "state_dir")

SUGGESTED_MAX = 200
"""Characters of a word that a near one is looked for: it takes time, and nobody misspells a longer one."""

_MAX_SECONDS = 1e9
_MAX_SIZE = 2**62
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"KB": 1024, "MB": 1024**2, "GB": 1024**3}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_REFERENCE = re.compile(r"\$\$|\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"(env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.ASCII | re.DOTALL)
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_URL_PATH = re.compile(r"/[!-\"$-~]*")  # no "#": a fragment is never sent
_URL = re.compile(rf"http://(\[[0-9a-fA-F:.]+\]|[^/?#@:\s]*)(?::([0-9]+))?({_URL_PATH.pattern})?")
_ALL_HOSTS = ("", "0.0.0.0", "::")
_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),  # before int: Python's bool is an int, TOML's is not
    (str, "a string"),
    (int, "an integer"),
    (float, "a float"),
    (list, "an array"),
    (dict, "a table"),
    (dt.date, "a date"),
    (dt.time, "a time"),
)


class BadValue(Exception):
    """A value that its key can't take; the text says what is wrong, without key and place."""


def type_name(raw: object) -> str:
    """What TOML calls the type of this value, with its article: "a string", "an integer"."""
    return next((name for cls, name in _TYPES if isinstance(raw, cls)), "nothing")


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'X'?" for the nearest of the known words, or "" when none is near."""
    # In a short word two swapped letters are much ("wbe"); in a long one as little likeness is chance.
    if len(word) > SUGGESTED_MAX:
        return ""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6 if len(word) <= 4 else 0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


# --- simple types -------------------------------------------------------------------------------------------------


def string(raw: object) -> str:
    """A string, empty or not, that can be handed to the kernel: it holds no NUL."""
    if not isinstance(raw, str):
        raise BadValue(f"must be a string, not {type_name(raw)}")
    if "\0" in raw:
        raise BadValue("must not hold a NUL character")
    return raw


def text(raw: object) -> str:
    """A string that is not empty."""
    if not string(raw):
        raise BadValue("must not be empty")
    return string(raw)


def boolean(raw: object) -> bool:
    """true or false; nothing else stands for them."""
    if not isinstance(raw, bool):
        raise BadValue(f"must be true or false, not {type_name(raw)}")
    return raw


def integer(low: int | None = None, high: int | None = None) -> Converter[int]:
    """The converter for an integer between `low` and `high`, both included; a boolean or a float is none."""

    def convert(raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int):
            raise BadValue(f"must be an integer, not {type_name(raw)}")
        if low is not None and raw < low:
            raise BadValue(f"must be {low} or more, not {raw}")
        if high is not None and raw > high:
            raise BadValue(f"must be {high} or less, not {raw}")
        return raw

    return convert


def choice(allowed: Sequence[T]) -> Converter[T]:
    """The converter for one of these words."""

    def convert(raw: object) -> T:
        word = string(raw)
        for one in allowed:
            if one == word:
                return one
        words = [str(one) for one in allowed]
        listed = ", ".join(f'"{one}"' for one in words)
        raise BadValue(f"must be one of {listed}, not {word!r}{suggestion(word, words)}")

    return convert


# --- quantities ---------------------------------------------------------------------------------------------------


def duration(raw: object) -> float:
    """Seconds: from a number of seconds, or a string "500ms", "10s", "5m", "2h", "7d"."""
    if isinstance(raw, str):
        match = _DURATION.fullmatch(raw)
        if not match:
            raise BadValue(f'bad duration {raw!r}: give a number of seconds, or "500ms", "10s", "5m", "2h", "7d"')
        # Rounded to microseconds: 0.1 * 0.001 and its like must not make two equal durations differ.
        seconds = round(float(match[1]) * _SECONDS[match[2]], 6)
    elif isinstance(raw, int | float) and not isinstance(raw, bool):
        seconds = float(raw)
    else:
        raise BadValue(f"must be a duration, not {type_name(raw)}")
    if math.isnan(seconds) or seconds < 0:
        raise BadValue(f"must be 0 or more, not {raw}")
    if seconds > _MAX_SECONDS:
        raise BadValue("is too long: more than 30 years")
    return seconds


def positive_duration(raw: object) -> float:
    """Seconds, more than 0."""
    seconds = duration(raw)
    if seconds == 0:
        raise BadValue("must be more than 0")
    return seconds


def size(raw: object) -> int:
    """Bytes: from an integer, or a string "512KB", "50MB", "2GB" (1 KB is 1024 bytes)."""
    if isinstance(raw, str):
        match = _SIZE.fullmatch(raw)
        if not match:
            raise BadValue(f'bad size {raw!r}: give an integer of bytes, or "512KB", "50MB", "2GB"')
        # Compared as a float: "1e400GB" can't be written, but a digit string of that length can.
        amount = float(match[1]) * _BYTES[match[2]]
        if amount > _MAX_SIZE:
            raise BadValue("is too large")
        return int(amount)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise BadValue(f"must be a size, not {type_name(raw)}")
    if raw < 0:
        raise BadValue(f"must be 0 or more, not {raw}")
    if raw > _MAX_SIZE:
        raise BadValue("is too large")
    return raw


def room(raw: object) -> Room:
    """What is to stay free on a disk: a size, or a share of the disk like "5%"; "" or 0: no matter."""
    if raw == "":
        return Room()
    if isinstance(raw, str) and (match := _SHARE.fullmatch(raw)):
        share = round(float(match[1]) / 100, 6)
        if share >= 1:
            raise BadValue(f"a disk that is {raw} free is empty: must be less than 100%")
        return Room(share=share)
    try:
        return Room(bytes=size(raw))
    except BadValue as error:
        if isinstance(raw, str):
            raise BadValue(f'bad room {raw!r}: must be a share like "5%", or a size like "2GB", or ""') from error
        raise


def mode(raw: object) -> int:
    """The permission bits of a file, or a umask: 0 to 0o777."""
    bits = integer(0)(raw)
    if bits <= 0o777:
        return bits
    digits = str(bits)
    meant = f"; did you mean 0o{digits}?" if len(digits) <= 3 and not set(digits) & set("89") else ""
    raise BadValue(f"must be between 0 and 0o777, not {bits} (0o{bits:o}){meant}")


# --- signals ------------------------------------------------------------------------------------------------------

_SIGNALS = {one.name.removeprefix("SIG"): int(one) for one in signal.Signals}


def signal_number(raw: object) -> int:
    """The number of a signal from its name, "TERM" or "SIGTERM" (signal(7))."""
    if not isinstance(raw, str):
        raise BadValue(f'must be a signal name like "TERM", not {type_name(raw)}')
    name = raw.upper().removeprefix("SIG")
    if name not in _SIGNALS:
        raise BadValue(f"unknown signal {raw!r}{suggestion(name, _SIGNALS)}")
    return _SIGNALS[name]


def exit_code(raw: object) -> int:
    """An exit status (0 to 255), or minus the number of a signal that is given by its name."""
    if isinstance(raw, str):
        return -signal_number(raw)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise BadValue(f"must be an exit status or a signal name, not {type_name(raw)}")
    if not 0 <= raw <= 255:
        raise BadValue(f"must be between 0 and 255, not {raw} (a signal is given by its name)")
    return raw


class Reload(NamedTuple):
    """What `reload` says: its kind, the number of the signal, the command."""

    kind: Literal["overlap", "restart", "signal", "command"]
    signal: int = 0
    command: tuple[str, ...] = ()


def reload(raw: object) -> Reload:
    """What `procmanctl reload` does: "overlap", "restart", "signal:HUP", or a command as an array."""
    if isinstance(raw, list):
        if not raw or not all(isinstance(word, str) for word in raw) or not raw[0]:
            raise BadValue("a command is an array of strings, and not empty")
        return Reload("command", command=tuple(raw))
    word = string(raw)
    if word == "overlap":
        return Reload("overlap")
    if word == "restart":
        return Reload("restart")
    if not word.startswith("signal:"):
        near = suggestion(word, ["overlap", "restart"])
        raise BadValue(f'must be "overlap", "restart", like "signal:HUP", or a command as an array, not {word!r}{near}')
    return Reload("signal", signal_number(word.removeprefix("signal:")))


class Canary(NamedTuple):
    """What `canary` says: a share (0 to 1; 0: none) of new connections, for how many seconds (0: as usual)."""

    share: float = 0.0
    seconds: float = 0.0


def canary(raw: object) -> Canary:
    """A share of new connections and how long: "10% for 2m", "10%", "0%" for none."""
    parts = string(raw).split()
    if not parts or len(parts) not in (1, 3) or (len(parts) == 3 and parts[1] != "for"):
        raise BadValue(f'must be like "10% for 2m", not {raw!r}')
    match = _SHARE.fullmatch(parts[0])
    if not match:
        raise BadValue(f'bad share {parts[0]!r}: must be like "10%" or "2.5%"')
    share = round(float(match[1]) / 100, 6)
    if share >= 1:
        raise BadValue(f"must be less than 100%, not {parts[0]}: somebody must still meet the process before")
    return Canary(share, positive_duration(parts[2]) if len(parts) == 3 else 0.0)


# --- names and commands -------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raises BadValue unless this can name a listener, or a program that is not called "all"."""
    if not _NAME.fullmatch(name):
        raise BadValue(f"bad name {name!r}: a name has only letters, digits, '.', '_' and '-'")
    if name.startswith("-"):
        raise BadValue(f"bad name {name!r}: it would look like an option of procmanctl")
    if len(name) > 100:
        raise BadValue("bad name: it is longer than 100 characters")


def name(raw: object) -> str:
    """A string that can name a program or a group: something that procmanctl is asked to operate."""
    check_name(string(raw))
    if raw == "all":
        raise BadValue("'all' can't be a name: procmanctl means every program by it")
    return string(raw)


def title(raw: object) -> str:
    """A name to be shown: one line without control characters."""
    if not text(raw).isprintable():
        raise BadValue("must not hold control characters")
    return text(raw)


def words(raw: object) -> list[str]:
    """The words of a command, split as a shell splits them; nothing is expanded."""
    try:
        return shlex.split(string(raw))
    except ValueError as error:
        raise BadValue(f"can't be split into words: {str(error).lower()}") from error


def pattern(raw: object) -> str:
    """A regular expression in Python's syntax."""
    try:
        re.compile(text(raw))
    except (re.error, OverflowError, RecursionError) as error:
        raise BadValue(f"bad regular expression: {error}") from error
    return text(raw)


# --- paths and addresses ------------------------------------------------------------------------------------------


def path(raw: object, folder: str) -> str:
    """An absolute path without "." and ".."; a relative one starts at `folder`."""
    return posixpath.normpath(posixpath.join(folder, text(raw))).replace("//", "/")


_NO_LOGS = {
    **dict.fromkeys(("/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/console"), "inherit"),
    **{f"{folder}/{number}": "inherit" for folder in ("/dev/fd", "/proc/self/fd") for number in (1, 2)},
    "/dev/null": "discard",
    "/dev/log": "syslog",
}


def log_path(raw: object, folder: str) -> str:
    """An absolute path of a file that can be rotated."""
    result = path(raw, folder)
    if mode := _NO_LOGS.get(result):
        raise BadValue(f'{result} is no file that can be rotated: use mode = "{mode}" instead')
    if text(raw).endswith("/"):
        raise BadValue(f"{result}/ is a folder: give the path of a file in it")
    return result


def unix_path(raw: object, folder: str) -> str:
    """The absolute path of a Unix socket."""
    if text(raw).startswith("@"):
        raise BadValue("abstract sockets are not supported: give a path")
    result = path(raw, folder)
    length = len(result.encode(errors="surrogateescape"))
    if length > MAX_UNIX_PATH:
        raise BadValue(f"the path of the socket has {length} bytes; Linux allows {MAX_UNIX_PATH}: {result}")
    return result


def address(raw: object, folder: str) -> Address:
    """Where a socket is bound: "HOST:PORT", "[::1]:PORT", ":PORT" (all addresses) or "unix:/path"."""
    word = text(raw)
    if word.startswith("unix:"):
        place = unix_path(word.removeprefix("unix:"), folder)
        if len(place.encode(errors="surrogateescape")) == MAX_UNIX_PATH:
            # The socket of a successor has one more byte in its name (`listeners.beside_address`).
            most = MAX_UNIX_PATH - 1
            raise BadValue(f"the path of the socket has {MAX_UNIX_PATH} bytes; {most} are possible here: {place}")
        return Address("unix", path=place)
    host, colon, port = word.rpartition(":")
    if not colon:
        raise BadValue(f'bad address {word!r}: must be like "127.0.0.1:8000", "[::1]:8000", ":8000" or "unix:/path"')
    if not (port.isascii() and port.isdecimal()):
        raise BadValue(f"bad address {word!r}: {port!r} is no port number")
    if not 1 <= int(port[:9]) <= 65535 or len(port) > 9:  # Python reads no 5,000 digits, and nobody writes 10
        raise BadValue(f"bad address {word!r}: a port is between 1 and 65535")
    return Address("tcp", host=_host(word, host), port=int(port))


def syslog_address(raw: object, folder: str) -> str:
    """Where a syslog daemon listens: "unix:/path" or "udp:IP:PORT"."""
    word = text(raw)
    if word.startswith("unix:"):
        return f"unix:{unix_path(word.removeprefix('unix:'), folder)}"
    if not re.fullmatch(r"udp:.*:[^:]*", word):
        raise BadValue(f'bad address {word!r}: must be like "unix:/run/syslog.sock" or "udp:192.0.2.1:514"')
    found = address(word.removeprefix("udp:"), folder)
    if found.kind != "tcp" or not re.fullmatch(r"[0-9.]+|[0-9a-f:.]*:[0-9a-f:.]*", found.host):
        raise BadValue(f"bad address {word!r}: must name an IP address, for no name is looked up while output waits")
    return f"udp:{found}"


def _host(word: str, host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as error:
            raise BadValue(f"bad address {word!r}: {host[1:-1]!r} is no IPv6 address") from error
    if ":" in host:
        raise BadValue(f'bad address {word!r}: an IPv6 address stands in brackets, like "[::1]:8000"')
    if host == "*":
        raise BadValue(f'bad address {word!r}: write ":{word.rpartition(":")[2]}" for all addresses')
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise BadValue(f"bad address {word!r}: {host!r} is no IPv4 address") from error
    if host and not _HOST.fullmatch(host):
        raise BadValue(f"bad address {word!r}: {host!r} is no host name")
    return host.lower()


def url(raw: object) -> tuple[Address, str, str]:
    """Where "http://HOST[:PORT]/PATH" goes to: the address, the path with its query, and the Host header."""
    word = text(raw)
    match = _URL.fullmatch(word)
    if not match or not match[1]:
        raise BadValue(f'bad URL {word!r}: must be like "http://127.0.0.1:8000/healthz"')
    host, port, rest = match.groups()
    return address(f"{host}:{port or 80}", ""), rest or "/", host + (f":{port}" if port else "")


def url_path(raw: object) -> str:
    """The path of an HTTP request, with its query: printable ASCII without spaces, as it goes over the wire."""
    if not _URL_PATH.fullmatch(text(raw)):
        raise BadValue(f"bad path {text(raw)!r}: must begin with '/' and have only printable ASCII without spaces")
    return text(raw)


def overlap(one: Address, other: Address) -> bool:
    """Whether two sockets can't be bound to these addresses at the same time."""
    if one.kind != other.kind:
        return False
    if one.kind == "unix":
        return one.path == other.path
    if one.port != other.port:
        return False
    # procman binds "localhost" as IPv4, "" as both families and "::" as IPv6 alone.
    a, b = ("127.0.0.1" if where.host == "localhost" else where.host for where in (one, other))
    wild = (a in _ALL_HOSTS or b in _ALL_HOSTS) and (":" in a) == (":" in b)
    return a == b or "" in {a, b} or wild


def meets(listener: Address, asked: Address) -> bool:
    """Whether who connects to `asked` comes to a socket at `listener`."""
    # Of two TCP addresses the port decides: a host has many names. Where it is another machine's after all, nothing is
    # lost by it: connections there don't come to our group.
    return listener == asked or (listener.kind == asked.kind == "tcp" and listener.port == asked.port)


def covers(wide: Address, narrow: Address) -> bool:
    """Whether all who come to `narrow` come to a socket at `wide` where there is none at `narrow`."""
    same = wide.host == narrow.host
    return overlap(wide, narrow) and (wide.kind == "unix" or same or wide.host == "" or narrow.host not in _ALL_HOSTS)


def host(raw: object) -> str:
    """A Host header, "shop.example" or "shop.example:8000"."""
    word = text(raw)
    name, _, port = word.partition(":")
    if not _HOST.fullmatch(name) or ((port or word.endswith(":")) and not (port.isascii() and port.isdigit())):
        raise BadValue(f'bad host {word!r}: must be like "shop.example" or "shop.example:8000"')
    return word


def host_header(where: Address) -> str:
    """What a client on this machine sends as Host to a server that listens there."""
    if where.kind == "unix":
        return "localhost"
    return f"localhost:{where.port}" if where.host in _ALL_HOSTS else str(where)


def variable_name(raw: object) -> str:
    """The name of an environment variable."""
    if not text(raw) or "=" in text(raw):
        raise BadValue("can't name an environment variable")
    return text(raw)


def variable(raw: object) -> str:
    """The value of an environment variable: a string, because no other type has one way to be written."""
    if isinstance(raw, bool):
        raise BadValue(f'must be a string, not a boolean: write "{str(raw).lower()}"')
    if isinstance(raw, int | float):
        raise BadValue(f'must be a string, not {type_name(raw)}: write "{raw}"')
    return string(raw)


def server_option(raw: object) -> object:
    """A server's own option: a boolean, a number, a string, or an array of them."""
    for one in raw if isinstance(raw, list) else [raw]:
        if isinstance(one, str):
            string(one)
        elif not isinstance(one, int | float):
            raise BadValue(f"must be a boolean, a number, a string or an array of them, not {type_name(one)}")
    return raw


def account_name(raw: object) -> str:
    """The name or the number of a user or a group, as a string; "" for none."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return str(integer(0)(raw))
    if not isinstance(raw, str):
        raise BadValue(f"must be a name or a number, not {type_name(raw)}")
    return string(raw)


def optional_path(raw: object, folder: str) -> str:
    """An absolute path, or "" for none."""
    return path(raw, folder) if string(raw) else ""


def glob_escape(path: str) -> str:
    """A shell pattern that matches only this path."""
    return re.sub(r"([*?[])", r"[\1]", path)


# --- expansion ----------------------------------------------------------------------------------------------------


def expand(word: str, names: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """`word` with each "${NAME}" replaced. `names` are those of OWN_NAMES that have a meaning at this place.

    "${NAME:-default}" takes the default where the variable is not set or empty, "${env:NAME}" is the environment
    variable even if procman has a name like it, "$$" is a dollar sign. A lone dollar sign stays. Raises BadValue.
    """

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        parts = _VARIABLE.fullmatch(match[1])
        if not match[2]:
            raise BadValue(f"'${{{match[1][:40]}' has no closing brace (a plain dollar sign before a brace is '$$')")
        if not parts or "${" in match[1]:
            raise BadValue(f"bad variable '{match[0]}': must be like ${{NAME}}, ${{NAME:-default}} or ${{env:NAME}}")
        forced, key, default = parts.groups()
        value = environ.get(key) if forced or key not in OWN_NAMES else names.get(key)
        if value or (value is not None and default is None):
            return value
        if default is not None:
            return default
        if key in OWN_NAMES and not forced:
            raise BadValue(f"'${{{key}}}' has no meaning here")
        raise BadValue(f"undefined variable {key!r}{suggestion(key, environ if forced else [*names, *environ])}")

    return _REFERENCE.sub(replacement, word)

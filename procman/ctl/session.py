"""One run of procmanctl: its options, the daemon they name, and where output goes.

It knows no command. What every command shares is here: the options, the connection, JSON and terminals.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from procman import rpc
from procman.client import Client
from procman.errors import ConfigError, Failed, ProcmanError, WrongUse

LOOK_SECONDS = 30.0
"""How long the daemon may take to answer a question: milliseconds, but for a supervisor that is being replaced."""


NAMES = "a process (shop:1), a program (shop), a group, or all"
"""What a NAME on the command line is."""


class Help(argparse.HelpFormatter):
    """argparse's own, but for the width: to find it, argparse imports many modules, even when nobody wants help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(width(sys.stdout) or 100, 100) - 2)


def shared_options() -> argparse.ArgumentParser:
    """The options that stand before or after the command. An absent one leaves no trace in the namespace, so that the
    one after the command does not undo the one before it."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, formatter_class=Help)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-s",
        "--socket",
        metavar="SOCKET",
        help="the daemon's socket (default: $PROCMAN_SOCKET, or the user's own daemon)",
    )
    which.add_argument("-c", "--config", metavar="FILE", help="the program table of the daemon")
    parser.add_argument("--json", action="store_true", help="print one JSON document (streams: one a line)")
    return parser


class Session:
    """What a command gets: the parsed arguments, and ways to ask and to print."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.json: bool = getattr(args, "json", False)
        self.config: str | None = getattr(args, "config", None)
        self.socket: str | None = getattr(args, "socket", None)
        self._path = ""

    def client(self, timeout: float | None = LOOK_SECONDS) -> Client:
        """A client of the daemon that the options, $PROCMAN_SOCKET or the user name, in this order."""
        if self.socket is not None and self.config is not None:
            raise WrongUse("-s and -c both name a daemon: give one of them")
        if self.config is not None:
            self._path = self._path or _socket_of(self.config)  # once: it takes a while, and the table may change
            return Client(self._path, timeout, _quiet)
        own = os.environ.get("PROCMAN_SOCKET") or rpc.default_socket(os.environ, os.geteuid())
        return Client(self.socket or own, timeout, _quiet)

    def print_json(self, document: object) -> None:
        """One JSON document: indented for people on a terminal, in one line for programs."""
        indent = 2 if sys.stdout.isatty() else None
        print(json.dumps(document, indent=indent))

    def print_line(self, document: object) -> None:
        """One JSON document of a stream, on one line, at once."""
        print(json.dumps(document), flush=True)

    def fail(self, error: ProcmanError) -> int:
        """Says what went wrong and what to do; returns the exit status."""
        if self.json:
            self.print_json({"error": {"code": error.code, "message": str(error), "hint": error.hint}})
        print(f"procmanctl: {error}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return error.exit_status


def colours(stream: TextIO) -> bool:
    """Whether to colour: on a terminal that can, unless $NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width(stream: TextIO) -> int | None:
    """Columns of the terminal; None for a file or a pipe, whose lines are never cut."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def seconds(text: str) -> float:
    """The value of a `--timeout`, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not (math.isfinite(seconds) and 0 <= seconds <= 1e9):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def span(text: str) -> float:
    """How long something takes, for argparse: seconds, or "30s", "2m", "1h"; more than none."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    number = text.rstrip("mshd")
    unit = text[len(number) :] or "s"
    plain = number.replace(".", "", 1)
    if not (plain.isascii() and plain.isdigit() and unit in units and 0 < float(number) * units[unit] <= 1e9):
        raise argparse.ArgumentTypeError(f'{text!r} is no time: it must be like "30s", "2m" or "1h"')
    return round(float(number) * units[unit], 6)


def share(text: str) -> float:
    """A share of connections, for argparse: "10%"; "0" is none."""
    number = text.removesuffix("%")
    plain = number.replace(".", "", 1)
    if not (plain.isascii() and plain.isdigit() and len(plain) < 9 and 0 <= float(number) < 100):
        raise argparse.ArgumentTypeError(f'{text!r} is no share: it must be like "10%", and less than 100%')
    if number == text and float(number):
        raise argparse.ArgumentTypeError(f'{text!r} is no share: did you mean "{text}%"?')
    return round(float(number) / 100, 6)


def count(text: str) -> int:
    """A number of processes, for argparse."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1000")
    return int(text)


def number(text: str) -> int:
    """A number of processes that may be none, for argparse."""
    if not (text.isascii() and text.isdigit() and int(text[:9]) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1000")
    return int(text)


def procmand(*arguments: str, capture: bool = False) -> Any:
    """Runs procmand in the foreground, which alone can read a program table; the CompletedProcess.

    -P: this folder's modules must not take the place of Python's own.
    """
    import subprocess

    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command: Sequence[str] = (sys.executable, "-P", "-m", "procman.daemon", *arguments)
    sys.stdout.flush()
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=capture,
        text=True,
        errors="replace",
        check=False,
    )


def _socket_of(path: str) -> str:
    from procman import files, table

    try:
        return table.socket_path(path, files.Machine())
    except ConfigError as error:
        raise Failed(str(error), hint=f"procmanctl check {path}") from None


def _quiet() -> None:
    print("procmanctl: no answer yet: a new supervisor may be on its way; programs go on meanwhile", file=sys.stderr)

"""logs and events: what goes on, as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import Any, BinaryIO

from procman import rpc
from procman.rpc import Object

from . import tables
from .session import LOOK_SECONDS, NAMES, Help, Session, colours

_LONGEST = 1024 * 1024  # bytes of a line that are waited for before it is printed in parts


def add_streams(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The sub-parsers of these commands."""
    words = "print the output of programs"
    parser = commands.add_parser("logs", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{NAMES} (default: all)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    parser.add_argument("-n", "--lines", type=int, default=10, metavar="N", help="the last N lines (default: 10)")
    parser.add_argument(
        "--stderr", action="store_true", help='only standard error, where the table keeps it "separate"'
    )
    parser.set_defaults(run=logs)
    words = "print what has happened lately"
    parser = commands.add_parser("events", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    parser.set_defaults(run=events)


def logs(session: Session) -> int:
    """Prints logs: one as it is, several with the name before each line."""
    args = session.args
    printer = LogPrinter(sys.stdout.buffer, colour=colours(sys.stdout), session=session)
    with session.client(None if args.follow else LOOK_SECONDS) as client:
        try:
            client.stream(
                "logs", printer.heard, names=args.names, lines=args.lines, follow=args.follow, stderr=args.stderr
            )
        finally:
            printer.end()
    return 0


def events(session: Session) -> int:
    """Prints events, one a line."""

    def heard(method: str, params: Object) -> None:
        if method == "event" and session.json:
            session.print_line(params)
        elif method == "event":
            print(tables.event(params), flush=True)

    with session.client(None if session.args.follow else LOOK_SECONDS) as client:
        client.stream("events", heard, follow=session.args.follow)
    return 0


class LogPrinter:
    """Prints `log` notifications. Lines of several sources are never mixed within a line."""

    def __init__(self, out: BinaryIO, *, colour: bool, session: Session) -> None:
        self._out = out
        self._colour = colour
        self._session = session
        self._labels: dict[tuple[str, str], bytes] = {}
        self._rest: dict[tuple[str, str], bytes] = {}

    def heard(self, method: str, params: Object) -> None:
        """A notification of the daemon."""
        if method == "sources":
            sources = params.get("sources") or []
            if not sources:
                print("procmanctl: no log file holds this output (see log in the program table)", file=sys.stderr)
            self._name(sources)
        elif method == "log":
            self._log((str(params.get("name")), str(params.get("stream"))), rpc.log_bytes(params))

    def end(self) -> None:
        """Prints what has come of lines that never ended."""
        for source, rest in self._rest.items():
            if rest:
                self._line(source, rest)
        self._rest.clear()

    def _name(self, sources: list[Object]) -> None:
        keys = [(str(one.get("name")), str(one.get("stream"))) for one in sources]
        if len(keys) < 2:
            return
        names = [name if stream == "out" else f"{name}/{stream}" for name, stream in keys]
        widest = max(map(len, names))
        for number, (key, name) in enumerate(zip(keys, names, strict=True)):
            text = tables.label(f"{name.ljust(widest)} |", number, colour=self._colour)
            self._labels[key] = f"{text} ".encode()

    def _log(self, source: tuple[str, str], data: bytes) -> None:
        if not self._session.json and not self._labels:
            self._out.write(data)
            self._out.flush()
            return
        *whole, rest = (self._rest.pop(source, b"") + data).split(b"\n")
        for line in whole:
            self._line(source, line)
        if len(rest) > _LONGEST:
            self._line(source, rest)
        elif rest:
            self._rest[source] = rest
        self._out.flush()

    def _line(self, source: tuple[str, str], line: bytes) -> None:
        if self._session.json:
            self._session.print_line(rpc.log_params(*source, line))
        else:
            self._out.write(self._labels.get(source, b"") + line + b"\n")

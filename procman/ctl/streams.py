"""events, what goes on, as it comes; and where `logs` is added."""

from __future__ import annotations

import argparse
from typing import Any

from procman.rpc import Object

from . import tables
from .logs import add_logs
from .session import LOOK_SECONDS, Help, Session


def add_streams(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The sub-parsers of these commands."""
    add_logs(commands, shared)
    words = "print what has happened lately"
    parser = commands.add_parser("events", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    parser.set_defaults(run=events)


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

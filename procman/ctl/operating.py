"""start, stop, restart, reload, promote, rollback, scale, signal: commands that change what runs, and the progress that
they show meanwhile."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TextIO

from procman.errors import ProcmanError
from procman.rpc import Object

from . import tables
from .resuming import Operation, again
from .session import LOOK_SECONDS, NAMES, Help, Session, colours, count, number, seconds, share, span, width

_VERBS = {
    "start": "start programs and wait until they are ready",
    "stop": "stop programs and wait until nothing of them is left",
    "restart": "stop programs, then start them again",
    "reload": "replace programs by successors while they serve, or as their table says",
    "promote": "end the canary of programs at once: its successor takes over",
    "rollback": "end the canary of programs at once: all is as before",
}
_ENDED = ("BACKOFF", "FATAL", "EXITED", "STOPPING")  # where the end of the log may tell why
_EXPLAINED = 3  # failed processes whose last output is shown
_OUTPUT = 5  # lines of it
_SUCCESSORS = 20  # lines of the output of a successor, which is not in the log for long


def add_operating(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The sub-parsers of these commands."""
    for verb, words in _VERBS.items():
        parser = commands.add_parser(verb, help=words, description=words, parents=[shared], formatter_class=Help)
        parser.add_argument("names", metavar="NAME", nargs="+", help=NAMES)
        add_waiting(parser)
        if verb == "reload":
            words = "of one program replace N processes at a time (default 1)"
            parser.add_argument("--at-once", dest="at_once", type=count, metavar="N", default=1, help=words)
            words = "first lead this share of new connections (10%%) to the successor; 0: none, whatever the table says"
            parser.add_argument("--canary", type=share, metavar="SHARE", help=words)
            words = "how long (30s, 2m); default: as the table says, else 2m"
            parser.add_argument("--for", dest="canary_seconds", type=span, metavar="TIME", help=words)
        parser.set_defaults(run=operate, verb=verb)
    words = "set how many processes of a program run, between its scale.min and scale.max"
    parser = commands.add_parser("scale", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("name", metavar="NAME", help="a program with a table [program.NAME.scale]")
    parser.add_argument("number", metavar="N", type=number, help="how many processes")
    add_waiting(parser)
    parser.set_defaults(run=scale)
    words = "send a signal to the main process of programs"
    parser = commands.add_parser("signal", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("signal", metavar="SIGNAL", help="a name (HUP, SIGHUP) or a number")
    parser.add_argument("names", metavar="NAME", nargs="+", help=NAMES)
    parser.set_defaults(run=signal)


def add_waiting(parser: argparse.ArgumentParser) -> None:
    """The options of a command that waits."""
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="return at once")
    words = "give up waiting after S seconds; what was asked for goes on"
    parser.add_argument("--timeout", type=seconds, metavar="S", help=words)


def operate(session: Session) -> int:
    """Does one of these verbs: waits with progress, then says what came of it."""
    args = session.args
    progress = Progress(sys.stderr, quiet=session.json)
    try:
        more = _more(args) if args.verb == "reload" else {}
        operation = Operation(session.client, progress.heard, wait=args.wait, timeout=args.timeout, more=more)
        found = operation.run(args.verb, args.names)
    finally:
        progress.clear()
    with session.client() as client:
        return _report(session, client.call, found, f"{args.verb} failed")


def _more(args: argparse.Namespace) -> Object:
    """The params that only a reload has; those that were not given are left to the daemon."""
    more: Object = {"at_once": args.at_once} if args.at_once != 1 else {}
    for key in ("canary", "canary_seconds"):
        if getattr(args, key) is not None:
            more[key] = getattr(args, key)
    return more


def scale(session: Session) -> int:
    """Sets the number and waits until it is reached. Asking again changes nothing, so that is what is done when the
    supervisor is replaced meanwhile."""
    args = session.args
    silence = LOOK_SECONDS if not args.wait else None if args.timeout is None else args.timeout + LOOK_SECONDS
    asked = {"name": args.name, "number": args.number, "wait": args.wait, "timeout": args.timeout}
    progress = Progress(sys.stderr, quiet=session.json)
    try:
        found = again(lambda: session.client(silence), "scale", progress.heard, **asked)
    finally:
        progress.clear()
    with session.client() as client:
        return _report(session, client.call, found, "scale failed")


def signal(session: Session) -> int:
    """Sends the signal and says to whom."""
    args = session.args
    with session.client() as client:
        return _report(
            session, client.call, client.call("signal", signal=args.signal, names=args.names), "signal failed"
        )


def _report(session: Session, ask: Any, found: list[Object], failed: str) -> int:
    """Prints the results; those that failed also on stderr, with the last lines of their output."""
    bad = [one for one in found if not one.get("ok", True)]
    if session.json:
        session.print_json(found)
        return 1 if bad else 0
    for line in tables.results(found, colour=colours(sys.stdout)):
        print(line)
    sys.stdout.flush()
    alike: dict[str, list[Object]] = {}
    for one in bad:
        alike.setdefault(tables.printable(one.get("why") or "no reason is known"), []).append(one)
    for index, (reason, ones) in enumerate(alike.items()):
        names = ", ".join(tables.printable(one.get("name")) for one in ones)
        print(f"procmanctl: {failed}: {names}: {reason}", file=sys.stderr)
        if index < _EXPLAINED:
            one = next((one for one in ones if one.get("output")), ones[0])
            for line in _last_output(ask, one) if one.get("output") or one.get("state") in _ENDED else ():
                print(f"  | {line}", file=sys.stderr)
    if bad:
        print(f"  hint: procmanctl why {tables.printable(bad[0].get('name'))}", file=sys.stderr)
    return 1 if bad else 0


def _last_output(ask: Any, one: Object) -> list[str]:
    """What a successor that failed has printed, else the end of the log."""
    if isinstance(one.get("output"), list):
        return [tables.printable(line) for line in one["output"][-_SUCCESSORS:]]
    name = one.get("name")
    try:
        return [tables.printable(line) for line in (ask("why", name=name).get("output") or [])[-_OUTPUT:]]
    except ProcmanError:
        return []  # the failure itself has been told


class Progress:
    """Shows each change of state while a command waits: in place on a terminal that can, else one line each.

    Where nobody looks, on a pipe or a file, only notices are: what a command waits for, when that may take long.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._shown = stream.isatty() and not quiet
        self._quiet = quiet
        self._noticed: set[str] = set()
        self._colour = colours(stream)
        self._in_place = self._shown and self._colour
        self._dirty = False

    def heard(self, method: str, params: Object) -> None:
        """A notification of the daemon."""
        if method != "progress":
            return
        if params.get("notice"):
            self._notice(f"procmanctl: {tables.printable(params.get('name'))}: {tables.printable(params.get('why'))}\n")
        if not self._shown:
            return
        reason = f"  {tables.printable(params['why'])}" if params.get("why") else ""
        name, state = tables.printable(params.get("name")), str(params.get("state"))
        text = f"{name} {state}{reason}"
        if self._in_place:
            self._stream.write(f"\r\x1b[K{text[: (width(self._stream) or 80) - 1]}")
            self._dirty = True
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _notice(self, line: str) -> None:
        """Once on a line of its own, for a supervisor that replaces another one may say it again."""
        if not self._quiet and line not in self._noticed:
            self.clear()
            self._noticed.add(line)
            self._stream.write(line)
            self._stream.flush()

    def clear(self) -> None:
        """Removes the line in place."""
        if self._dirty:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._dirty = False

"""diff, apply: what another table would change, and having it changed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from procman.rpc import Object

from . import tables
from .operating import Progress, add_waiting
from .resuming import again
from .session import LOOK_SECONDS, Help, Session, colours

_OUTPUT = 20  # lines of a successor that failed


def add_applying(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The sub-parsers of these commands."""
    words = "show what the program table would change, if it was applied now"
    parser = commands.add_parser("diff", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.set_defaults(run=diff)
    words = "read the program table again, and change only what it says otherwise"
    parser = commands.add_parser("apply", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("--dry-run", dest="dry_run", action="store_true", help="only show it, as diff does")
    words = "go back to the table that was in force before, whatever the files say"
    parser.add_argument("--previous", action="store_true", help=words)
    add_waiting(parser)
    parser.set_defaults(run=apply)


def diff(session: Session) -> int:
    """Prints the plan: 0 when nothing would change, 1 when something would."""
    return 1 if _plan(session, previous=False) else 0


def apply(session: Session) -> int:
    """Applies the table, with progress, and says what came of it."""
    args = session.args
    if args.dry_run:
        _plan(session, previous=args.previous)
        return 0
    return reread(session, previous=args.previous, wait=args.wait, timeout=args.timeout)


def reread(
    session: Session, *, previous: bool = False, wait: bool = True, timeout: float | None = None
) -> int:
    """Has the table read again, and prints what that changed. That takes as long as programs take.

    A supervisor that replaces another one goes on with what that one had begun; reading once more changes no more."""
    progress = Progress(sys.stderr, quiet=session.json)
    silence = None if timeout is None else timeout + LOOK_SECONDS
    asked = {"previous": previous, "wait": wait, "timeout": timeout}
    try:
        answer = again(lambda: session.client(silence), "apply", progress.heard, **asked)
    finally:
        progress.clear()
    if answer.get("goes_on"):
        return _goes_on(session, answer, wait=wait)
    failed: Object = answer.get("failed") or {}
    if session.json:
        session.print_json(answer)
        return 1 if failed else 0
    print("\n".join(tables.facts({key: value for key, value in answer.items() if key != "failed"})))
    if not failed:
        return 0
    name, reason = tables.printable(failed.get("name")), tables.printable(failed.get("why"))
    print(f"procmanctl: apply failed: {name}: {reason}", file=sys.stderr)
    for line in (failed.get("output") or [])[-_OUTPUT:]:
        print(f"  | {tables.printable(line)}", file=sys.stderr)
    known = tables.printable(failed.get("stays", name))  # the one that has failed may have gone again
    happened = f"why {known}" if known else "events"
    print(f"  hint: what is left to do: procmanctl diff; what has happened: procmanctl {happened}", file=sys.stderr)
    return 1


def _goes_on(session: Session, answer: Object, *, wait: bool) -> int:
    """Nobody waits any longer: 0 if nobody wanted to, else 1."""
    if session.json:
        session.print_json(answer)
    elif wait:
        print(f"procmanctl: apply: {tables.printable(answer.get('message'))}", file=sys.stderr)
    else:
        print(tables.printable(answer.get("message")))
    return 1 if wait else 0


def _plan(session: Session, *, previous: bool) -> list[Object]:
    lines: list[Object] = again(lambda: session.client(None), "apply", dry_run=True, previous=previous)
    if session.json:
        session.print_json(lines)
    elif lines:
        print("\n".join(tables.plan(lines, colour=colours(sys.stdout))))
    else:
        print("nothing would change")
    return lines

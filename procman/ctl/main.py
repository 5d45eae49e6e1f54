"""The command line of procmanctl: each command is one function beside its sub-parser; the commands that only look, that
work on files, and those for the daemon itself are here, the others in `operating` and `streams`.

Exit statuses: 0 done; 1 failed; 2 wrong use; 3 `status`: something named is neither RUNNING nor scaled down; 4 no such
program; 5 not allowed; 6 daemon not reachable. Ctrl-C gives 130 and a closed pipe 141, as shells show them.

Nothing is imported here that a quick `status` does not need: no asyncio, psutil, tomllib or subprocess.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from procman import __version__
from procman.errors import ProcmanError
from procman.rpc import Object

from . import tables
from .session import LOOK_SECONDS, NAMES, Help, Session, colours, procmand, seconds, shared_options, width

NOT_RUNNING = 3
_EPILOG = (
    "exit status: 0 done; 1 failed; 2 wrong use; 3 status: something named is neither RUNNING nor scaled down; "
    "4 no such program; 5 not allowed; 6 daemon not reachable"
)


def parser(command: str = "") -> argparse.ArgumentParser:
    """The whole command line; with the name of a command only as much of it as that one needs, which starts faster."""
    shared = shared_options()
    top = argparse.ArgumentParser(
        prog="procmanctl",
        description="Look at the programs that procmand keeps running, and operate them.",
        epilog=_EPILOG,
        parents=[shared],
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=f"procmanctl {__version__}")
    commands = top.add_subparsers(prog="procmanctl", metavar="COMMAND", required=True, dest="command")
    known = any(command in names for names, _ in _GROUPS)
    for names, add in _GROUPS:
        if command in names or not known:
            add(commands, shared)
    return top


def _command(argv: Sequence[str]) -> str:
    """The word where the command stands, "" when it takes more than this to find it."""
    words = iter(argv)
    for word in words:
        if word in ("-s", "--socket", "-c", "--config"):
            next(words, "")
        elif word != "--json":
            return word
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Wrong use ends by SystemExit(2), as argparse has it."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        session = Session(parser(_command(argv)).parse_args(argv))
        try:
            status = int(session.args.run(session))
        except ProcmanError as error:
            status = session.fail(error)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone, which is no error. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# --- looking --------------------------------------------------------------------------------------------------------


def _add_looking(commands: Any, shared: argparse.ArgumentParser) -> None:
    words = "show the state of programs; exit status 3 when one that is named is neither RUNNING nor scaled down"
    parser = commands.add_parser("status", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{NAMES} (default: all)")
    words = "show the workers of each process too, as its server tells them, and its listen queues"
    parser.add_argument("-v", "--verbose", action="store_true", help=words)
    parser.set_defaults(run=status)
    words = "show all that is known of a process: workers, figures of the last hour, log, definition"
    parser = commands.add_parser("show", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("name", metavar="NAME", help="a process (shop:1), or a program that has one")
    parser.set_defaults(run=show)
    words = "say why a process is as it is, with the last lines of its output"
    parser = commands.add_parser("why", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("name", metavar="NAME", help="a process (shop:1), or a program that has one")
    parser.set_defaults(run=why)


def status(session: Session) -> int:
    """Prints the table of processes."""
    names = session.args.names
    with session.client() as client:
        # A daemon that is older than this command knows no such param, and is not asked for it in vain.
        infos = client.call("status", names=names, **({"workers": True} if session.args.verbose else {}))
    if session.json:
        session.print_json(infos)
    elif infos:
        print("\n".join(tables.status(infos, colour=colours(sys.stdout), width=width(sys.stdout))))
    else:
        print("the program table has no programs")
    return NOT_RUNNING if names and not all(map(_well, infos)) else 0


def _well(info: Object) -> bool:
    """It runs; or its program needs fewer processes now, maybe none until somebody comes."""
    return info["state"] == "RUNNING" or bool((info.get("scale") or {}).get("idle"))


def show(session: Session) -> int:
    """Prints all that is known of one process."""
    with session.client() as client:
        answer = client.call("show", name=session.args.name)
    if session.json:
        session.print_json(answer)
    else:
        print("\n".join(tables.show(answer, colour=colours(sys.stdout))))
    return 0


def why(session: Session) -> int:
    """Prints why a process is as it is."""
    with session.client() as client:
        answer = client.call("why", name=session.args.name)
    if session.json:
        session.print_json(answer)
    else:
        print("\n".join(tables.why(answer, colour=colours(sys.stdout))))
    return 0


# --- files: no daemon is needed -------------------------------------------------------------------------------------


def _add_files(commands: Any, shared: argparse.ArgumentParser) -> None:
    words = "check a program table and name every problem"
    parser = commands.add_parser("check", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: that of -c, or the one procmand would take")
    parser.set_defaults(run=check)
    words = "write a starter program table"
    parser = commands.add_parser("init", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("folder", metavar="DIR", nargs="?", default=".", help="default: this folder")
    parser.set_defaults(run=init)


def check(session: Session) -> int:
    """Lets procmand read the table; its words and exit status are ours."""
    table = session.args.file or session.config
    done = procmand("--check", *(["-c", table] if table else []), capture=session.json)
    if session.json:
        session.print_json({"ok": done.returncode == 0, "output": (done.stdout + done.stderr).splitlines()})
    return max(int(done.returncode), 0) if done.returncode >= 0 else 1


def init(session: Session) -> int:
    """Writes a starter table."""
    from . import starter

    path = starter.write(session.args.folder)
    if session.json:
        session.print_json({"path": path})
    else:
        print(f"wrote {path}\nnext: procmanctl check {path}, then procmand -c {path}")
    return 0


# --- the daemon itself ----------------------------------------------------------------------------------------------


def _add_daemon(commands: Any, shared: argparse.ArgumentParser) -> None:
    words = "look at the daemon itself, or operate it"
    top = commands.add_parser("daemon", help=words, description=words, parents=[shared], formatter_class=Help)
    actions = top.add_subparsers(prog="procmanctl daemon", metavar="ACTION", required=True, dest="action")
    for name, words, run in (
        ("status", "show the daemon itself", daemon_status),
        ("shutdown", "stop all programs and the daemon, and wait until it has gone", daemon_shutdown),
        ("reopen-logs", "close and open every log file, for a rotation by others", daemon_reopen_logs),
        ("reread", "read the program table again", daemon_reread),
        ("upgrade", "go over to the version that is installed now; programs notice nothing", daemon_upgrade),
    ):
        parser = actions.add_parser(name, help=words, description=words, parents=[shared], formatter_class=Help)
        parser.set_defaults(run=run)
        if run is daemon_shutdown:
            words = "give up waiting after S seconds; the daemon goes on to stop"
            parser.add_argument("--timeout", type=seconds, metavar="S", help=words)


def daemon_status(session: Session) -> int:
    """Prints what the daemon says of itself."""
    return _print(session, "daemon.status")


def daemon_reopen_logs(session: Session) -> int:
    """Has the log files opened again."""
    return _print(session, "daemon.reopen_logs")


def daemon_reread(session: Session) -> int:
    """The same as apply."""
    from .applying import reread

    return reread(session)


def daemon_upgrade(session: Session) -> int:
    """Has supervisor and keeper become the installed version. Programs go on."""
    from .upgrading import upgrade

    done = upgrade(session)
    if session.json:
        session.print_json(done)
    else:
        count = sum(done["daemon"]["processes"].values())
        print(f"upgraded from {done['from']} to {done['to']}; {count} processes went on")
    return 0


def daemon_shutdown(session: Session) -> int:
    """Stops the daemon and returns when it has gone."""
    from .ending import shut_down

    shut_down(session, session.args.timeout)
    if session.json:
        session.print_json({})
    return 0


def _print(session: Session, method: str, timeout: float | None = LOOK_SECONDS) -> int:
    with session.client(timeout) as client:
        answer = client.call(method)
    if session.json:
        session.print_json(answer)
    elif answer:
        print("\n".join(tables.facts(answer)))
    return 0


# --- all of them ----------------------------------------------------------------------------------------------------


def _add_operating(commands: Any, shared: argparse.ArgumentParser) -> None:
    from .operating import add_operating

    add_operating(commands, shared)


def _add_applying(commands: Any, shared: argparse.ArgumentParser) -> None:
    from .applying import add_applying

    add_applying(commands, shared)


def _add_streams(commands: Any, shared: argparse.ArgumentParser) -> None:
    from .streams import add_streams

    add_streams(commands, shared)


_GROUPS: tuple[tuple[tuple[str, ...], Callable[[Any, argparse.ArgumentParser], None]], ...] = (
    (("status", "show", "why"), _add_looking),
    (("start", "stop", "restart", "reload", "scale", "signal"), _add_operating),
    (("diff", "apply"), _add_applying),
    (("logs", "events"), _add_streams),
    (("check", "init"), _add_files),
    (("daemon",), _add_daemon),
)

if __name__ == "__main__":
    sys.exit(main())

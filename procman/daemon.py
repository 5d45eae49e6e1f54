"""`procmand`: the command line, the two processes behind it, and what each of them does first.

    procmand                    becomes the keeper, which starts
    python -m procman.daemon supervisor ... FD      the supervisor, FD being its end of the wire
    python -m procman.daemon check-upgrade ... FD   before an upgrade: could this code take over what FD tells?
    python -m procman.daemon ... --handed-over FD   the keeper's next self after an upgrade

The keeper must stay small: nothing is imported at the top of this module that only the supervisor needs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from procman import __version__
from procman.errors import ConfigError, ProcmanError

EXIT_FAILED = 1
EXIT_BAD_TABLE = 2

CRASH_VARIABLE = "PROCMAN_TEST_CRASH"


def main(argv: Sequence[str] | None = None) -> int:
    """`procmand`. Returns the exit status: 0 done, 1 failed, 2 wrong use or a bad table."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["supervisor"]:
        return _supervisor(arguments[1:])
    if arguments[:1] == ["check-upgrade"]:
        return _check_upgrade(arguments[1:])
    options = _parser().parse_args(arguments)
    options.config = _table_path(options.config)  # before anything changes the current folder
    if options.check or options.socket:
        return _look(options)
    if options.daemonize and options.handed_over < 0:
        return _in_background(options)
    return _keep(options, lambda: None)


class _Help(argparse.HelpFormatter):
    """With a width of its own: to ask for the terminal's, argparse imports shutil and with it bz2 and lzma, which both
    processes would carry for all their life."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="procmand",
        description="The procman daemon: runs the programs of a table. In the foreground by default.",
        formatter_class=_Help,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the program table (default: see below)")
    parser.add_argument("-d", "--daemonize", action="store_true", help="go to the background once the table runs")
    parser.add_argument("--check", action="store_true", help="only check the table: prints every problem")
    parser.add_argument("--socket", action="store_true", help="only print the path of the daemon's socket")
    parser.add_argument(
        "--heartbeat", type=float, default=5.0, metavar="SECONDS",
        help="how often the supervisor must show that it is not stuck; it is replaced after four misses (default: 5)",
    )  # fmt: skip
    parser.add_argument("--no-cgroup", action="store_true", help="do not use cgroups, also where they can be made")
    parser.add_argument("--handed-over", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"procman {__version__}")
    parser.epilog = f"Without -c, the table is the first of: {', '.join(_usual_tables())}."
    return parser


def _usual_tables() -> list[str]:
    """Where a table is looked for when none is named."""
    if os.geteuid() == 0:
        return ["/etc/procman/procman.toml", "/etc/procman.toml"]
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [os.path.join(home, "procman", "procman.toml")]


def _table_path(given: str | None) -> str:
    if given is not None:
        return os.path.abspath(given)
    usual = _usual_tables()
    return next((path for path in usual if os.path.exists(path)), usual[0])


def _look(options: argparse.Namespace) -> int:
    """--check and --socket: read the table, start nothing."""
    from procman import files, offered, table, units

    path = options.config
    try:
        if options.socket:
            print(table.socket_path(path, files.Machine()))
        else:
            config = table.parse(path, files.Machine())
            doubts = (*units.doubtful(config), *offered.warnings(config))
            for warning in table.located(config, files.Machine(), doubts):
                print(warning, file=sys.stderr)
            print(f"{path}: good: {len(config.programs)} processes, {len(config.listeners)} listeners")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_TABLE
    return 0


# --- the keeper -----------------------------------------------------------------------------------------------------


def _keep(options: argparse.Namespace, on_ready: Callable[[], None]) -> int:
    from procman.keeper import keeper

    # -P: whatever lies in the current folder must not be imported, least of all by root.
    daemon = [sys.executable, "-P", "-m", "procman.daemon"]
    table = ["--config", options.config]
    own = [*table, "--heartbeat", str(options.heartbeat)]
    own += [name for name, given in (("-d", options.daemonize), ("--no-cgroup", options.no_cgroup)) if given]
    commands = keeper.Commands(
        supervisor=[*daemon, "supervisor", *table, *(["--log-to-file"] if options.daemonize else [])],
        check=[*daemon, "check-upgrade", *table],
        keeper=[*daemon, *own, "--handed-over"],
    )
    return keeper.run(
        commands,
        heartbeat=options.heartbeat,
        on_ready=on_ready,
        use_cgroup=not options.no_cgroup,
        handed_over=options.handed_over,
    )


def _in_background(options: argparse.Namespace) -> int:
    """Fork twice as daemon(7) says; the first process waits until the table runs, or tells why it does not."""
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready_write)
        return _wait_for_background(pid, ready_read)
    os.close(ready_read)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)

    def tell(status: int) -> None:
        """Once: afterwards the number of the descriptor may be somebody else's. The caller may have gone meanwhile."""
        nonlocal ready_write
        if ready_write >= 0:
            with contextlib.suppress(OSError):
                os.write(ready_write, bytes([status]))
            os.close(ready_write)
            ready_write = -1

    status = _keep(options, lambda: tell(0))
    tell(status)
    os._exit(status)


def _wait_for_background(pid: int, ready: int) -> int:
    os.waitpid(pid, 0)
    answer = os.read(ready, 1)
    if answer == b"\0":
        return 0
    return answer[0] if answer else EXIT_FAILED


# --- the supervisor -------------------------------------------------------------------------------------------------


def _supervisor(arguments: list[str]) -> NoReturn:
    parser = argparse.ArgumentParser(prog="procmand supervisor", formatter_class=_Help)
    parser.add_argument("--config", required=True)
    parser.add_argument("--log-to-file", action="store_true")
    parser.add_argument("wire", type=int)
    options = parser.parse_args(arguments)
    # asyncio imports ssl where it can, which costs 4 MB; nothing in the daemon speaks TLS.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    _let_die()
    from procman.interim import Interim

    try:
        interim = Interim(options.wire)  # at once: before what takes long to import
    except ProcmanError as error:
        print(f"procmand: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
    from procman import supervise

    # Threads may hang on a dead disk: they must not keep the process.
    status = supervise.run(options.config, interim, to_file=options.log_to_file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _let_die() -> None:
    """For crash tests alone. The file that PROCMAN_TEST_CRASH names has a number a line: this supervisor takes the
    first one away, and gets SIGKILL at that crossing, counted from 1 (`crossing`). Their names go to NAME.log. At 0,
    or without a number, it lives."""
    path = os.environ.get(CRASH_VARIABLE)
    if path is None:
        return
    import signal

    from procman import crossing

    with open(path, "r+", encoding="ascii") as file:
        numbers = file.read().split()
        file.seek(0)
        file.truncate()
        file.write("\n".join(numbers[1:]))
    last = int(numbers[0]) if numbers else 0
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    count = itertools.count(1)

    def watch(name: str) -> None:
        number = next(count)
        os.write(log, f"{number} {name}\n".encode())
        if number == last:
            signal.raise_signal(signal.SIGKILL)

    crossing.watcher = watch


def _check_upgrade(arguments: Sequence[str]) -> int:
    """In a process of new code: say whether it understands what the running keeper would hand over."""
    parser = argparse.ArgumentParser(prog="procmand check-upgrade")
    parser.add_argument("--config", required=True)
    parser.add_argument("document", type=int)
    options = parser.parse_args(arguments)
    from procman import supervise
    from procman.keeper import handover

    try:
        supervise.check_table(options.config, handover.read(options.document)["held"])
    except ConfigError as error:
        print(f"version {__version__} refuses the table that runs:\n{error}")
        return EXIT_BAD_TABLE
    except ProcmanError as error:
        print(f"{error}{f' ({error.hint})' if error.hint else ''}")
        return EXIT_FAILED
    print(f"version {__version__} can take over")
    return 0


if __name__ == "__main__":
    sys.exit(main())

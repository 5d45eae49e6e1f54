"""Which options the installed server of a program knows: it is asked for its own help.

Good for a warning only, never for a decision: what a server accepts is its own affair. Wherever that is in doubt,
nothing is said. It runs code of the server, as the user of the program; so it is for `--check`, and no part of a
daemon.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from procman.config import Account, Config, Program
from procman.positions import KeyPath

MODULES = ("gunicorn", "uvicorn", "hypercorn", "daphne", "granian")
"""Servers that are asked as `python -m SERVER --help`."""

OURS: Mapping[str, frozenset[str]] = {"daphne": frozenset({"graceful-timeout"})}
"""Options that `procman.adapter` takes for the server."""

HELP_SECONDS = 20.0
LEAST = 10
"""A help with fewer options is none."""

PLUGINS = frozenset({"plugin", "plugins", "need-plugin", "need-plugins", "ini", "xml", "yaml", "json", "import"})
"""With one of these uWSGI knows more than its help tells."""

_OPTION = re.compile(r"(?<![\w-])--([A-Za-z0-9][A-Za-z0-9_-]*)")


def warnings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Keys of `config` that its servers will not understand, and why. Each server is asked once for each user."""
    asked: dict[tuple[object, ...], frozenset[str]] = {}
    said = set()
    for program in config.programs:
        command = _help(program)
        if not command:
            continue
        key = (*command, program.account)
        if key not in asked:
            asked[key] = options(_ask(command, program.account))
        for option, text in unknown(program.server, program.argv, asked[key]):
            warning = ("program", program.program, "server_options", option), text
            if warning not in said:
                said.add(warning)
                yield warning


def unknown(server: str, argv: Sequence[str], known: frozenset[str]) -> list[tuple[str, str]]:
    """The options of `argv` that a server does not know whose help names `known`, and what to say of each. Pure."""
    given = [match[1] for word in argv if (match := _OPTION.match(word))]
    if len(known) < LEAST or (server == "uwsgi" and not PLUGINS.isdisjoint(given)):
        return []
    found = []
    for name in given:
        # argparse takes the beginning of a name, too.
        if name in OURS.get(server, ()) or any(one.startswith(name) for one in known):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        found.append((name, f"the {server} that is installed knows no option {name!r}{hint}"))
    return found


def options(text: str) -> frozenset[str]:
    """The long options that a help names. Pure."""
    return frozenset(_OPTION.findall(text))


def _help(program: Program) -> list[str]:
    """The command that prints the options of its server; [] where there is none."""
    if program.server in MODULES:
        return [program.argv[0], "-m", program.server, "--help"]
    return [program.argv[0], "--help"] if program.server == "uwsgi" else []


def _ask(command: Sequence[str], account: Account | None) -> str:
    """What it prints; "" where it does not run."""
    who: dict[str, Any] = {}
    if account is not None and os.geteuid() == 0:
        who = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
    environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/", "COLUMNS": "250", "TERM": "dumb"}
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            command,
            env=environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=HELP_SECONDS,
            check=False,
            text=True,
            errors="replace",
            **who,
        )
        return done.stdout if done.returncode == 0 else ""
    return ""

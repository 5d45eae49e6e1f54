"""From the table in force to a new one, while everything runs: add, remove, change, and leave the rest alone.

Only what must restart does: a program whose command, environment or limits changed. Other keys take effect at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

from procman.config import Config, Daemon, Program

HOT = frozenset(
    {
        "priority", "groups", "autostart", "restart", "success_exit_codes", "start_seconds", "start_timeout",
        "start_retries", "restart_delay", "restart_delay_max", "stop_signal", "stop_timeout", "reload", "reload_signal",
        "reload_command", "max_age", "slot",
    }
)  # fmt: skip
"""Keys of a Program that a running child never notices."""

HOT_LOG = frozenset({"path", "error_path", "max_size", "keep", "mode_bits"})
"""Keys of its log that can change between two bytes."""

HOT_DAEMON = frozenset({"log_level", "shutdown_timeout", "exit_when", "sampling"})
"""Keys of [daemon] that take effect without a restart of the daemon."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new table means. `hot` and `restart` hold the new programs, `removed` the old ones.

    `ignored` are keys of [daemon] that need a restart of the daemon.
    """

    added: tuple[Program, ...]
    removed: tuple[Program, ...]
    hot: tuple[Program, ...]
    restart: tuple[Program, ...]
    ignored: tuple[str, ...]


def plan(old: Config, new: Config) -> Plan:
    """Compare two tables. Pure."""
    before = {program.name: program for program in old.programs}
    after = {program.name: program for program in new.programs}
    listeners = {listener.name: listener for listener in old.listeners}
    moved = {listener.name for listener in new.listeners if listeners.get(listener.name, listener) != listener}
    hot, restart = [], []
    for name, program in after.items():
        if name not in before:
            continue
        if not _is_hot(before[name], program) or moved & set(program.listen):
            restart.append(program)
        elif before[name] != program:
            hot.append(program)
    return Plan(
        added=tuple(program for name, program in after.items() if name not in before),
        removed=tuple(program for name, program in before.items() if name not in after),
        hot=tuple(hot),
        restart=tuple(restart),
        ignored=tuple(f"daemon.{key}" for key in _changed(old.daemon, new.daemon) if key not in HOT_DAEMON),
    )


def fingerprint(config: Config, program: Program) -> str:
    """Names all of `program` that a running child would notice a change of: two tables with one fingerprint need no
    restart. Of no use for another version of procman."""
    listeners = [listener for listener in config.listeners if listener.name in program.listen]
    values = [getattr(program, field.name) for field in fields(program) if field.name not in HOT | {"log"}]
    values += [getattr(program.log, field.name) for field in fields(program.log) if field.name not in HOT_LOG]
    return hashlib.sha256(repr((values, listeners)).encode(errors="surrogateescape")).hexdigest()[:16]


def daemon_in_force(old: Daemon, new: Daemon) -> Daemon:
    """The settings of the daemon after `plan`: what needs its restart stays as it is."""
    return replace(old, **{key: getattr(new, key) for key in HOT_DAEMON})


def _is_hot(old: Program, new: Program) -> bool:
    log_changes = set(_changed(old.log, new.log))
    return set(_changed(old, new)) <= HOT | ({"log"} if log_changes <= HOT_LOG else set())


def _changed(old: object, new: object) -> list[str]:
    names = [field.name for field in fields(old)]  # type: ignore[arg-type]
    return [name for name in names if getattr(old, name) != getattr(new, name)]

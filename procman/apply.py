"""From the table in force to a new one, while everything runs: add, remove, change, and leave the rest alone.

Only what must have a new child gets one: a program whose command, environment or limits changed. Other keys take effect
at once. Where a successor can take over, that is how it gets it; else it restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from procman import units
from procman.config import Config, Daemon, Listener, Program

HOT = frozenset(
    {
        "priority", "groups", "autostart", "restart", "success_exit_codes", "start_seconds", "start_timeout",
        "start_retries", "restart_delay", "restart_delay_max", "stop_signal", "stop_timeout", "reload", "reload_signal",
        "reload_command", "canary", "canary_seconds", "max_age", "scale", "slot",
    }
)  # fmt: skip
"""Keys of a Program that a running child never notices."""

HOT_LOG = frozenset({"path", "error_path", "max_size", "keep", "mode_bits"})
"""Keys of its log that can change between two bytes."""

HOT_DAEMON = frozenset({"log_level", "shutdown_timeout", "exit_when", "sampling"})
"""Keys of [daemon] that take effect without a restart of the daemon."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new table means. `hot`, `replace` and `restart` hold the new programs, `removed` the old ones.

    `replace`: a successor takes over, if there is somebody to take over from. `tuned` are listeners whose socket stays,
    with other settings. `ignored` are keys of [daemon] that need a restart of the daemon.
    """

    added: tuple[Program, ...] = ()
    removed: tuple[Program, ...] = ()
    hot: tuple[Program, ...] = ()
    restart: tuple[Program, ...] = ()
    ignored: tuple[str, ...] = ()
    replace: tuple[Program, ...] = ()
    tuned: tuple[Listener, ...] = ()


def plan(old: Config, new: Config) -> Plan:
    """Compare two tables. Pure."""
    before = {program.name: program for program in old.programs}
    after = {program.name: program for program in new.programs}
    listeners = {listener.name: listener for listener in old.listeners}
    changed = [listener for listener in new.listeners if listeners.get(listener.name, listener) != listener]
    tuned = [listener for listener in changed if _is_tuned(listeners[listener.name], listener)]
    moved = {listener.name for listener in changed} - {listener.name for listener in tuned}
    hot: list[Program] = []
    restart: list[Program] = []
    overlap: list[Program] = []
    for name, program in after.items():
        if name not in before:
            continue
        if moved & set(program.listen):
            restart.append(program)
        elif not _is_hot(before[name], program):
            (overlap if program.reload == "overlap" else restart).append(program)
        elif before[name] != program:
            hot.append(program)
    return Plan(
        added=tuple(program for name, program in after.items() if name not in before),
        removed=tuple(program for name, program in before.items() if name not in after),
        hot=tuple(hot),
        restart=tuple(restart),
        replace=tuple(overlap),
        tuned=tuple(tuned),
        ignored=tuple(f"daemon.{key}" for key in _changed(old.daemon, new.daemon) if key not in HOT_DAEMON),
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plan for people: what happens to which process ("" for the daemon), for the sake of which keys, and
    what it costs."""

    name: str
    action: str
    keys: tuple[str, ...]
    cost: str


COSTS = {
    "add": "it starts",
    "remove": "it stops",
    "change": "takes effect at once",
    "replace": "a successor takes over, no request is lost",
    "restart": "it stops, then it starts; connections wait meanwhile",
    "ignore": "needs a restart of the daemon",
}
"""What each action costs, in words."""


def lines(old: Config, new: Config, plan: Plan, running: Collection[str] = ()) -> list[Line]:
    """`plan` in the order in which it is carried out. `running` are the processes that run now."""
    before = {program.name: program for program in old.programs}
    found = [Line("", "ignore", plan.ignored, COSTS["ignore"])] if plan.ignored else []
    daemon = tuple(f"daemon.{key}" for key in _changed(old.daemon, new.daemon) if key in HOT_DAEMON)
    found += [Line("", "change", daemon, COSTS["change"])] if daemon else []
    found += [Line(f"listener {listener.name}", "change", (), COSTS["change"]) for listener in plan.tuned]
    parts = (("change", plan.hot), ("remove", plan.removed), ("restart", plan.restart), ("add", plan.added))
    for action, programs in (*parts, ("replace", plan.replace)):
        for program in programs:
            keys = _keys(before[program.name], program) if program.name in before and action != "remove" else ()
            cost = COSTS[action]
            if action == "replace" and (problem := _no_canary(old, program, plan, running)):
                cost += f"; without its canary: {problem}"
            if action == "add" and not program.autostart:
                cost = "it does not start: autostart = false"
            elif action == "add" and program.scale is not None and program.instance > program.scale.min:
                cost = f"it starts when connections wait: scale.min = {program.scale.min}"
            found.append(Line(program.name, action, keys, cost))
    return found


def _no_canary(old: Config, program: Program, plan: Plan, running: Collection[str]) -> str:
    """Why `program` can't have the canary that it is to have; "" where it can, or has none."""
    if not program.canary:
        return ""
    together = [each for each in plan.replace if each.program == program.program]
    return units.no_canary(old, units.units(old, together, running, together=True), running)


_KEYS = {
    "argv": "command",
    "account": "user",
    "env_files": "env_file",
    "reload_signal": "reload",
    "reload_command": "reload",
    "canary_seconds": "canary",
    "error_path": "stderr",
    "notify": "ready",
}
"""What the table calls a field that has another name."""


def _keys(old: Program, new: Program) -> tuple[str, ...]:
    """The keys of the table that make the difference; a listener that has moved is one."""
    fields_ = [key for key in _changed(old, new) if key not in ("log", "limits")]
    found = [_KEYS.get(key, key) for key in fields_]
    if "command" in found and new.server:
        found[found.index("command")] = "server"
    for part in ("log", "limits"):
        found += [f"{part}.{_KEYS.get(key, key)}" for key in _changed(getattr(old, part), getattr(new, part))]
    return tuple(dict.fromkeys(found)) or ("listen",)


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


def _is_tuned(old: Listener, new: Listener) -> bool:
    """Whether an open socket can be made like `new`."""
    return replace(old, backlog=new.backlog, mode=new.mode, uid=new.uid, gid=new.gid) == new


def _changed(old: object, new: object) -> list[str]:
    names = [field.name for field in fields(old)]  # type: ignore[arg-type]
    return [name for name in names if getattr(old, name) != getattr(new, name)]

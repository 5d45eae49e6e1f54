"""From the table in force to a new one, while everything runs: add, remove, change, and leave the rest alone.

Only what must have a new child gets one: a program whose command, environment or limits changed. Other keys take effect
at once. Where a successor can take over, that is how it gets it; else it restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace

from procman import units, values
from procman.config import Config, Daemon, Listener, Log, Program
from procman.records import dataclass

HOT = frozenset(
    {
        "priority", "groups", "autostart", "restart", "success_exit_codes", "start_seconds", "start_timeout",
        "start_retries", "restart_delay", "restart_delay_max", "stop_signal", "stop_timeout", "reload", "reload_signal",
        "reload_command", "canary", "canary_seconds", "max_age", "scale", "slot",
    }
)  # fmt: skip
"""Keys of a Program that a running child never notices."""

HOT_LOG = frozenset(
    {
        "mode", "path", "error_path", "max_size", "rotate_every", "keep", "keep_total", "compress", "timestamps",
        "format", "on_error", "mode_bits", "address",
    }
)  # fmt: skip
"""Keys of its log that can change between two bytes; `mode` as long as there is a pipe, see `_has_pipe`."""

HOT_LISTENER = frozenset({"backlog", "mode", "uid", "gid"})
"""What of a listener can be changed while its socket is open."""

HOT_DAEMON = frozenset(
    {"log_level", "log_max_size", "log_keep", "log_min_free", "shutdown_timeout", "exit_when", "sampling"}
)
"""Keys of [daemon] that take effect without a restart of the daemon."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new table means. `hot`, `replace` and `restart` hold the new programs, `removed` the old ones.

    `replace`: a successor takes over, if there is somebody to take over from. `tuned` are listeners whose socket stays,
    with other settings. `ignored` are keys of [daemon] that need a restart of the daemon. What stands is known by
    `rolling` alone: `coming` are new ones that are successors, too, with those of `replace` or of `leaving`; these are
    old ones that stop when the others of their program run; `resting` are down, and become what they are to be then.
    """

    added: tuple[Program, ...] = ()
    removed: tuple[Program, ...] = ()
    hot: tuple[Program, ...] = ()
    restart: tuple[Program, ...] = ()
    ignored: tuple[str, ...] = ()
    replace: tuple[Program, ...] = ()
    tuned: tuple[Listener, ...] = ()
    coming: tuple[Program, ...] = ()
    leaving: tuple[Program, ...] = ()
    resting: tuple[Program, ...] = ()


def plan(old: Config, new: Config) -> Plan:
    """Compare two tables. Pure."""
    before = {program.name: program for program in old.programs}
    after = {program.name: program for program in new.programs}
    listeners = {listener.name: listener for listener in old.listeners}
    # Its name says where a socket is bound: what else is said of it can be changed while it is open.
    tuned = [listener for listener in new.listeners if listeners.get(listener.name, listener) != listener]
    renamed = {listener.name for listener in tuned if listeners[listener.name].label != listener.label}
    hot: list[Program] = []
    restart: list[Program] = []
    overlap: list[Program] = []
    for name, program in after.items():
        if name not in before:
            continue
        if not same_child(before[name], program) or renamed & set(program.listen):
            beside = program.reload == "overlap" and not _regroups(old, before[name], new, program)
            (overlap if beside else restart).append(program)
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


def rolling(old: Config, new: Config, plan: Plan, serving: Collection[str], wanted: Collection[str]) -> Plan:
    """`plan` where the processes `serving` serve, and those `wanted` are to: what serves of a program passes on to all
    that there is of it afterwards, whatever the names and the number. Pure."""
    alive = {program.program: program for program in old.programs if program.name in serving}
    stays = {program.program for program in new.programs}
    # What has fallen gets up with the others, when they have shown that the new version is good.
    beside = [p for p in plan.replace if p.name in serving or (p.name in wanted and p.program in alive)]
    resting = [p for p in plan.replace if p not in beside and p.program in alive]
    leaving = [p for p in plan.removed if p.program in stays and p.program in alive]
    passing = {program.program for program in (*beside, *leaving)}
    coming = [
        p
        for p in plan.added
        if p.program in passing and p.reload == "overlap" and not _regroups(old, alive[p.program], new, p)
        if p.scale is None or p.instance <= p.scale.min
    ]
    return replace(
        plan,
        replace=tuple(beside),
        restart=(*plan.restart, *(program for program in plan.replace if program not in (*beside, *resting))),
        removed=tuple(program for program in plan.removed if program not in leaving),
        added=tuple(program for program in plan.added if program not in coming),
        coming=tuple(coming),
        leaving=tuple(leaving),
        resting=tuple(resting),
    )


def turns(programs: Sequence[Program], before: Mapping[str, Program]) -> list[list[Program]]:
    """Which of `programs` get their new version together, one group after the other: the processes of one program, and
    programs of which one gets the socket of another, which can't both have it. `before` has what they were, by name, if
    they were there."""
    groups: list[list[Program]] = []
    for program in programs:
        linked = [group for group in groups if any(_belong(one, program, before) for one in group)]
        place = groups.index(linked[0]) if linked else len(groups)
        merged = [one for group in linked for one in group]
        groups = [group for group in groups if group not in linked]
        groups.insert(place, [*merged, program])
    return groups


def _belong(one: Program, other: Program, before: Mapping[str, Program]) -> bool:
    def hands(giver: Program, taker: Program) -> bool:
        given = set(before[giver.name].listen).difference(giver.listen) if giver.name in before else set()
        had = before[taker.name].listen if taker.name in before else ()
        return bool(given.intersection(taker.listen).difference(had))

    return one.program == other.program or hands(one, other) or hands(other, one)


def steps(
    group: Sequence[Program], before: Mapping[str, Program], old: Mapping[str, Listener], new: Mapping[str, Listener]
) -> list[list[Program]]:
    """A group of `turns`, in the parts that restart at once: one process after the other, so that the rest serves
    meanwhile. All at once where one of them gets a socket that another one has had, or loses one: `old` and `new` are
    the listeners before and now, by name."""

    def stays(program: Program) -> bool:
        same = set(before[program.name].listen) == set(program.listen)
        return same and all(name not in old or old[name].reuse_port == new[name].reuse_port for name in program.listen)

    return [[program] for program in group] if all(map(stays, group)) else [list(group)]


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
    "replace": "a successor takes over",
    "restart": "it stops, then it starts",
    "ignore": "needs a restart of the daemon",
}
"""What each action costs, in words; what clients notice is added: `_meanwhile`."""


def lines(old: Config, new: Config, plan: Plan, running: Collection[str] = ()) -> list[Line]:
    """`plan` in the order in which it is carried out. `running` are the processes that run now."""
    before = {program.name: program for program in old.programs}
    found = [Line("", "ignore", plan.ignored, COSTS["ignore"])] if plan.ignored else []
    daemon = tuple(f"daemon.{key}" for key in _changed(old.daemon, new.daemon) if key in HOT_DAEMON)
    found += [Line("", "change", daemon, COSTS["change"])] if daemon else []
    found += [Line(f"listener {listener.title}", "change", (), COSTS["change"]) for listener in plan.tuned]
    changing = {program.program for program in (*plan.restart, *plan.replace, *plan.coming)}
    late = tuple(program for program in plan.added if program.program in changing)
    parts: tuple[tuple[str, tuple[Program, ...]], ...]
    early = tuple(program for program in plan.added if program not in late)
    parts = (("change", plan.hot), ("remove", plan.removed), ("add", early))
    turns_ = (("restart", (*plan.restart, *plan.resting)), ("replace", plan.replace))
    parts += tuple((action, tuple(sorted(some, key=lambda one: one.priority))) for action, some in turns_)
    parts += (("add", plan.coming), ("add", late), ("remove", plan.leaving))
    alone = {program.name for step in _restarts(old, new, plan) if len(step) == 1 for program in step}
    for action, programs in parts:
        for program in programs:
            keys = differences(before[program.name], program) if program.name in before and action != "remove" else ()
            cost = COSTS[action]
            if program in plan.coming:
                there = next(one for one in old.programs if one.program == program.program)
                cost = "it takes over from those before; "
                cost += _meanwhile("replace", _sockets(old, there), _sockets(new, program), others=False)
            elif program in plan.leaving:
                cost = "it stops when the others serve"
            elif action == "add" and not program.autostart:
                cost = "it does not start: autostart = false"
            elif action == "add" and program.scale is not None and program.instance > program.scale.min:
                cost = f"it starts when connections wait: scale.min = {program.scale.min}"
            elif action == "add" and (had := _had(old, plan.removed, _sockets(new, program))):
                cost += f"; connections wait from the stop of {', '.join(had)} until it is ready"
            elif action == "remove" and (own := [each for each in _sockets(old, program) if each.reuse_port]):
                cost += "; who waits at its own socket of " + ", ".join(str(each.address) for each in own) + " is reset"
            elif action in ("restart", "replace"):
                others = program.name in alone and any(_shares(program, other) for other in new.programs)
                sockets = _sockets(old, before[program.name]), _sockets(new, program)
                cost += "; " + _meanwhile(action, *sockets, others=others)
            if (action == "replace" or program in plan.coming) and (problem := _no_canary(old, program, plan, running)):
                cost += f"; without its canary: {problem}"
            found.append(Line(program.name, action, keys, cost))
    return found


def refused(line: Line, programs: Mapping[str, Program], taken: Mapping[str, str]) -> Line:
    """`line`, where the address that it needs can't be had: `taken` says why, by listener. Then nothing is changed."""
    program = programs.get(line.name) if line.action in ("add", "restart", "replace") else None
    why = next((taken[name] for name in (program.listen if program else ()) if name in taken), "")
    return replace(line, cost=f"apply will be refused: {why}") if why else line


def _restarts(old: Config, new: Config, plan: Plan) -> list[list[Program]]:
    """What restarts at once, one after the other."""
    before = {program.name: program for program in old.programs}
    listeners = [{listener.name: listener for listener in config.listeners} for config in (old, new)]
    groups = turns(sorted(plan.restart, key=lambda one: one.priority), before)
    return [step for group in groups for step in steps(group, before, *listeners)]


def _shares(one: Program, other: Program) -> bool:
    """Whether `other` is another process of the same program, and listens where `one` does."""
    return one.name != other.name and one.program == other.program and not set(one.listen).isdisjoint(other.listen)


def _meanwhile(action: str, before: Sequence[Listener], after: Sequence[Listener], *, others: bool) -> str:
    """What clients notice of a restart, or of a replacement. `others`: further processes of the program serve."""
    gone = [one for one in before if not any(values.covers(listener.address, one.address) for listener in after)]
    new = [listener for listener in after if not _stays(listener, before)]
    closes = "".join(f", {listener.address} closes" for listener in gone)
    if not before and not after:
        return "nothing of it runs meanwhile" if action == "restart" else "for a moment two of it run"
    if action == "replace":
        early = [listener for listener in new if any(values.covers(one.address, listener.address) for one in before)]
        waits = "".join(f", connections to {listener.address} wait until it is ready" for listener in early)
        return f"no request is lost{waits}{closes}"
    if others:
        reset = ", who waits at its own socket is reset" if any(listener.reuse_port for listener in before) else ""
        return f"the others of its program serve meanwhile{reset}"
    if any(listener.reuse_port for listener in (*before, *after)):
        return f"connections are refused meanwhile{closes}"
    return f"connections wait meanwhile{closes}" if after else f"nothing listens any more{closes}"


def _stays(listener: Listener, others: Iterable[Listener]) -> bool:
    return any(listener.name == other.name for other in others)


def _sockets(config: Config, program: Program) -> list[Listener]:
    return [listener for listener in config.listeners if listener.name in program.listen]


def _had(old: Config, programs: Iterable[Program], sockets: Iterable[Listener]) -> list[str]:
    """Which of `programs` had addresses of these sockets."""
    addresses = [listener.address for listener in sockets]
    return [
        program.name
        for program in programs
        if any(values.overlap(one.address, address) for one in _sockets(old, program) for address in addresses)
    ]


def _regroups(old: Config, before: Program, new: Config, program: Program) -> bool:
    """Whether it would have a socket of its own at an address where it shares one, or the other way round: beside each
    other they would take connections from each other."""
    return any(
        one.reuse_port != other.reuse_port and values.overlap(one.address, other.address)
        for one in _sockets(old, before)
        for other in _sockets(new, program)
    )


def _no_canary(old: Config, program: Program, plan: Plan, running: Collection[str]) -> str:
    """Why `program` can't have the canary that it is to have; "" where it can, or has none."""
    if not program.canary:
        return ""
    together = [each for each in (*plan.replace, *plan.coming) if each.program == program.program]
    leaving = {each.name for each in (*plan.removed, *plan.leaving) if each.program == program.program}
    return units.no_canary(old, units.units(old, together, running, leaving), running)


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


def differences(old: Program, new: Program) -> tuple[str, ...]:
    """The keys of the table that make the difference; the name of a listener is one."""
    fields_ = [key for key in _changed(old, new) if key not in ("log", "limits")]
    if _moved(old, new):
        fields_.remove("ready")
    found = [_KEYS.get(key, key) for key in fields_]
    if "command" in found and new.server:
        found[found.index("command")] = "server settings"
    for part in ("log", "limits"):
        found += [f"{part}.{_KEYS.get(key, key)}" for key in _changed(getattr(old, part), getattr(new, part))]
    return tuple(dict.fromkeys(found)) or ("listen",)


def _moved(old: Program, new: Program) -> bool:
    """Whether its probe differs by nothing but the address of its own listener, which is another one."""
    own = str(old.ready.address) in old.listen and str(new.ready.address) in new.listen
    return own and old.ready != new.ready == replace(old.ready, address=new.ready.address) and old.listen != new.listen


def fingerprint(config: Config, program: Program) -> str:
    """Names all of `program` that a running child would notice a change of: two tables with one fingerprint need no
    restart. Of no use for another version of procman."""
    names = [field.name for field in fields(Listener) if field.name not in HOT_LISTENER]
    sockets = [[getattr(listener, name) for name in names] for listener in _sockets(config, program)]
    values = [getattr(program, field.name) for field in fields(program) if field.name not in HOT | {"log"}]
    values += [getattr(program.log, field.name) for field in fields(program.log) if field.name not in HOT_LOG]
    values.append(_has_pipe(program.log))
    return hashlib.sha256(repr((values, sockets)).encode(errors="surrogateescape")).hexdigest()[:16]


def daemon_in_force(old: Daemon, new: Daemon) -> Daemon:
    """The settings of the daemon after `plan`: what needs its restart stays as it is."""
    return replace(old, **{key: getattr(new, key) for key in HOT_DAEMON})


def same_child(old: Program, new: Program) -> bool:
    """Whether a child that was started for `old` can go on for `new`."""
    if _has_pipe(old.log) != _has_pipe(new.log):
        return False
    log_changes = set(_changed(old.log, new.log))
    return set(_changed(old, new)) <= HOT | ({"log"} if log_changes <= HOT_LOG else set())


def _has_pipe(log: Log) -> bool:
    """Whether its program prints to a pipe of ours, and not to /dev/null."""
    return log.mode != "discard"


def _changed(old: object, new: object) -> list[str]:
    names = [field.name for field in fields(old)]  # type: ignore[arg-type]
    return [name for name in names if getattr(old, name) != getattr(new, name)]

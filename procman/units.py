"""Which processes are replaced together, and the listening sockets that pass on to their successors with them. Pure.

What is left out of it shares its sockets: old and new accept from the same queue for a while.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from procman import values
from procman.config import Config, Listener, Program
from procman.positions import KeyPath
from procman.records import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """Processes that are replaced together, and the listeners that pass on with them; they share all others. `names`
    are those of afterwards: some of them may have nobody before them. `leaving` are those of before that have no
    successor of their name, and stop with the ones before."""

    names: tuple[str, ...]
    listeners: tuple[str, ...]
    leaving: tuple[str, ...] = ()


def units(
    config: Config, programs: Sequence[Program], running: Container[str], leaving: Container[str] = ()
) -> list[Unit]:
    """How what runs of one program is replaced by `programs`, whatever their names and number: one unit after the
    other. Those that share a socket pass on together: else nobody could ask a successor alone, and visitors would meet
    it in its trial. Pure.

    Who does not run (`running` are the processes that serve) does not count: should it be started meanwhile, on
    a socket that would close, that start waits (`Trials.hold`). A listener that only one of two versions has does not
    pass on: the other one would get connections there, and have nobody to answer them. `leaving` are processes that are
    to stop when the successors serve; those of the same programs go with them.
    """
    after = {program.name: program for program in programs}
    of = {program.program for program in programs}
    there = [program.name for program in config.programs if program.name in after]
    names = (*there, *(name for name in after if name not in there))
    going = tuple(p.name for p in config.programs if p.name in leaving and p.name in running and p.program in of)
    before = {p.name: p for p in config.programs if p.name in running and (p.name in after or p.name in going)}
    ours: dict[str, set[str]] = {}
    for program in (*before.values(), *programs):
        for listener in program.listen:
            ours.setdefault(listener, set()).add(program.name)
    strange = {listener for listener in ours if company(config, {*names, *going}, [listener], running)}
    shared = {listener for listener, users in ours.items() if len(users) > 1} | strange
    if shared and not strange:
        common = (listener for each in before.values() for listener in each.listen)
        new = {listener for each in programs for listener in each.listen}
        return [Unit(names, tuple(dict.fromkeys(listener for listener in common if listener in new)), going)]
    alone = {name: before[name].listen if name in before else () for name in names}
    own = {name: [each for each in listen if each in after[name].listen] for name, listen in alone.items()}
    return [Unit((name,), tuple(each for each in own[name] if each not in shared)) for name in names]


def company(config: Config, names: Container[str], listen: Container[str], running: Container[str]) -> list[str]:
    """Who runs and has one of the listeners `listen`, but for `names`: in the order of the table. Pure."""
    others = (program for program in config.programs if program.name in running and program.name not in names)
    return [program.name for program in others if any(listener in listen for listener in program.listen)]


def shared(config: Config, names: Container[str], running: Container[str]) -> list[Listener]:
    """The listeners that others go on with when the processes `names` stop. Pure."""
    theirs = {listen for program in config.programs if program.name in names for listen in program.listen}
    listeners = (listener for listener in config.listeners if listener.name in theirs)
    return [each for each in listeners if company(config, names, [each.name], running)]


def no_canary(config: Config, found: Sequence[Unit], running: Container[str]) -> str:
    """Why the units that `units` has `found` can't have a canary; "" where they can. Pure."""
    groups = [(*unit.names, *unit.leaving) for unit in found]
    for names in (tuple(name for group in groups for name in group), *groups):
        listen = {each for program in config.programs if program.name in names for each in program.listen}
        if others := company(config, names, listen, running):
            return f"{others[0]}, which has the same listener, is not replaced with {names[0]}"
    if not all(unit.listeners for unit in found):
        return "the new version has none of the listeners of the one before"
    return ""


def unproven(program: Program, listeners: Iterable[Listener]) -> str:
    """What the readiness probe of `program`, which has `listeners`, asks, where that tells nothing of a successor: the
    process before may be who answers. "" where it does tell. Pure."""
    ready = program.ready
    if ready.kind == "command":
        return "a command"
    asked = ready.address if ready.kind in ("http", "tcp", "unix") else None
    if asked is None or any(values.meets(listener.address, asked) for listener in listeners):
        return ""
    return f"at {asked}, which is no listener of its own"


def doubtful(config: Config) -> list[tuple[KeyPath, str]]:
    """Keys of a table that is good, which do less than one would expect of them, and why: a probe that tells nothing of
    a successor; a canary that will be left out, since programs that share a listener are not replaced together. Pure.
    """
    found: dict[tuple[KeyPath, str], None] = {}
    titles = {listener.name: listener.title for listener in config.listeners}
    for program in config.programs:
        own = [listener for listener in config.listeners if listener.name in program.listen]
        if program.reload == "overlap" and (asked := unproven(program, own)):
            what = f"ready asks {asked}: the process before may answer for its successor, and a bad release take over"
            found[("program", program.program, "reload"), what] = None
        others = (other for other in config.programs if other.program != program.program and program.canary)
        for other in others:
            if shared := [listener for listener in program.listen if listener in other.listen]:
                what = f"program.{other.program} has the listener {titles[shared[0]]!r}, too"
                key = ("program", program.program, "canary")
                found[key, f"{what}: there is no canary while that one runs"] = None
    return list(found)

"""What a keeper that was killed has left: found, judged and given to the new keeper, so that nothing runs twice.

Every process of ours carries a tag (`keeper.tree`): the house, which is the state folder's, and the number of its
child. The state file tells which child that is, and what its main process is. Where that file is lost, or older than
the child, the environment of the processes does; that can be forged, so there the user counts too.

`plan` decides. What it finds becomes part of the snapshot, as if the new keeper had always had it: from there on there
is one path, `Supervisor.begin`. What could be got back of pipes and sockets becomes held, what could not is said.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from procman import __version__, apply, launch, listeners, salvage, servers, store
from procman.config import Config, Listener, Program, split_place
from procman.errors import Failed
from procman.keeper import tree
from procman.keeper.wire import Message
from procman.lifecycle import State
from procman.link import KeeperLink
from procman.process import Process
from procman.snapshot import Snapshot
from procman.sockets import FIRST, SECOND, base_name, beside, held_name

log = logging.getLogger("procman")

OUTPUTS = {"out": 1, "err": 2}
"""Which descriptor of a program is which output of it."""


CHILD_MAX = 200
"""Characters of the name of a child that is believed."""


class Seen(NamedTuple):
    """A process that carries our house, or that the state file names. `uid` is the real one; `child` and `child_pid`
    are what its environment says, "" and 0 where that can't be read."""

    pid: int
    start: int
    tag: int
    uid: int
    child: str = ""
    child_pid: int = 0


class Known(NamedTuple):
    """A child as the state file has it: its process, its tag, and how it is to be ended."""

    pid: int
    start: int
    tag: int
    kill: str


class Register:
    """What is written down of the children that run, for a daemon that has nothing else to go by."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Known]] = {}  # process → (child, what is known)
        self._prints: dict[str, tuple[Program, str]] = {}
        self._last = 0

    def born(self, message: Message, kill: str) -> None:
        """The keeper's "spawned" message, or its record of a child."""
        child = str(message["child"])
        known = Known(int(message["pid"]), int(message.get("start", 0)), int(message.get("tag", 0)), kill)
        self._last = max(self._last, _number(known.tag))
        self._known[launch.split_child_id(child)[0]] = child, known

    def document(self, processes: Iterable[Process], config: Config) -> dict[str, Any]:
        """Part of the state file."""
        children, prints = {}, {}
        for process in processes:
            child, known = self._known.get(process.key, ("", None))
            if known and child == process.child and (process.status.alive or process.status.state is State.STOPPING):
                children[child] = known
                prints[process.key] = self._print(config, process.program)
        return {"children": children, "prints": prints, "last": self._last, "made_by": __version__}

    def _print(self, config: Config, program: Program) -> str:
        cached = self._prints.get(program.key)
        if cached is None or cached[0] is not program:
            as_in_table = servers.in_place(program, 0)
            cached = self._prints[program.key] = program, apply.fingerprint(config, as_in_table)
        return cached[1]


def known_children(document: Mapping[str, Any]) -> dict[str, Known]:
    """The children in a state file; what makes no sense is left out."""
    found = {}
    for child, fields in _mapping(document, "children").items():
        try:
            pid, start, tag, kill = fields
            found[str(child)] = Known(int(pid), int(start), int(tag), str(kill))
        except (TypeError, ValueError, OverflowError):
            continue
    return found


def of_this_boot(document: Mapping[str, Any] | None, boot_id: str) -> dict[str, Any]:
    """What of a state file still counts: a pid of another boot names nobody; what operators have stopped stays so, and
    what is kept of an earlier table."""
    if document is None or document.get("boot_id") == boot_id:
        return dict(document or {})
    return {"down": document.get("down", [])} | {key: document[key] for key in ("kept", "refused") if key in document}


def claim(process: tree.Process, tag: int, house: int, mains: Container[tuple[int, int]]) -> int | None:
    """The tag under which `process`, which carries `tag`, is one of ours; None: it is not, and is left alone. Pure.

    This alone keeps a daemon from another one's programs. Tags of `house` are ours; without one, so is who has the pid
    and the start time of a main process that our state file names. What an environment says makes nobody ours.
    """
    if tag and tag >> tree.NUMBER_BITS == house:
        return tag
    return 0 if (process.pid, process.start) in mains else None


def plan(
    seen: Sequence[Seen],
    known: Mapping[str, Known],
    last: int,
    programs: Mapping[str, Program],
    current: Mapping[str, int] = MappingProxyType({}),
    *,
    trials: Container[str] = (),
) -> list[Message]:
    """The "adopt" requests for what was found; none when nothing of ours is left. Pure.

    `last` is the highest number of a child that the state file knows of. A child that the state file knows is asked for
    also when it is gone: its end is news. What belongs to no process of the table is asked for under a name that no
    process has, and is ended for that. `current` are the numbers of the children that were the current ones of their
    process, as far as the state file knows: the daemon may have died while one passed on to its successor. What was at
    one of the places `trials` had not proven itself, also where there is no other.
    """
    by_tag: dict[int, list[Seen]] = {}
    for process in sorted(seen, key=lambda process: process.start):
        by_tag.setdefault(process.tag, []).append(process)
    alive = {(process.pid, process.start): process for process in seen}
    requests, found = [], False
    for child, entry in known.items():
        main = alive.get((entry.pid, entry.start))
        family = by_tag.pop(entry.tag, [])
        family += [main] if main and main not in family else []
        found = found or bool(family)
        requests.append(_request(child, entry.tag, main, family, entry.kill))
    for tag, family in by_tag.items():
        if request := _judge(tag, family, last, programs):
            requests.append(request)
            found = True
    return _one_each(requests, known, current, trials) if found else []


def _judge(tag: int, family: Sequence[Seen], last: int, programs: Mapping[str, Program]) -> Message | None:
    """What to do about a family that the state file does not know; None: leave it alone."""
    number = _number(tag)
    if not tag:
        return None
    child = next((process.child for process in family if process.child), "")
    name, _ = split_place(launch.split_child_id(child)[0])
    program = programs.get(name)
    if program is None:
        # Without a name: from before the state file was written, so it was left on purpose (kill = "main").
        return None if not child and number <= last else _request(child or f"unknown/left#{number}", tag, None, family)
    uid = os.geteuid() if program.account is None else program.account.uid
    if all(process.uid != uid for process in family):
        log.warning("pid %d says that it belongs to %s, but not its user does: left alone", family[0].pid, name)
        return None
    main = next((p for p in family if p.child_pid == p.pid and p.child == child and p.uid == uid), None)
    if main is None and program.kill == "main":
        return None
    return _request(child, tag, main, family, program.kill)


def _request(child: str, tag: int, main: Seen | None, family: Sequence[Seen], kill: str = "tree") -> Message:
    process = {"pid": main.pid, "start": main.start} if main else {"pid": 0, "start": 0}
    members = [*([main.pid] if main else []), *(member.pid for member in family if member != main)]
    return {"child": child, "tag": tag, "kill": kill, "members": members, **process}


def _one_each(
    requests: list[Message], known: Mapping[str, Known], current: Mapping[str, int], trials: Container[str]
) -> list[Message]:
    """Each process has one child: the one that the state file knows, if it lives, else the newest. The others are
    renamed, so that they are ended."""

    def rank(request: Message) -> tuple[bool, bool, int, bool]:
        lives = bool(request["pid"])
        key, generation = launch.split_child_id(str(request["child"]))
        was_current = current.get(split_place(key)[0]) == generation
        return lives and request["child"] in known, lives and was_current, generation, lives

    taken: set[str] = set()
    for request in sorted(requests, key=rank, reverse=True):
        key, _ = launch.split_child_id(str(request["child"]))
        name, _ = split_place(key)
        if name in taken or key in trials:
            request["child"] = f"{name}/left#{_number(request['tag'])}"
        else:
            taken.add(name)
    return requests


def _number(tag: int) -> int:
    return tag & (1 << tree.NUMBER_BITS) - 1


# --- the machine ----------------------------------------------------------------------------------------------------


def look(house: int, known: Mapping[str, Known]) -> list[Seen]:
    """All processes that carry our house, and those that the state file names."""
    mains = {(entry.pid, entry.start) for entry in known.values()}
    found = []
    for process in tree.every_process():
        tag = claim(process, tree.tag_of(process.pid), house, mains)
        if tag is not None:
            child, child_pid = _environment(process.pid)
            found.append(Seen(process.pid, process.start, tag, _real_uid(process.pid), child, child_pid))
    return found


def _environment(pid: int) -> tuple[str, int]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = dict(line.partition(b"=")[::2] for line in file.read().split(b"\0"))
    except OSError:
        return "", 0
    number = variables.get(tree.MARKER_PID.encode(), b"").decode(errors="replace")
    child = variables.get(tree.MARKER.encode(), b"").decode(errors="replace")
    if len(child) > CHILD_MAX or not child.isprintable():
        child = ""  # a program can write there what it likes: it goes into the log, and to the keeper
    return child, int(number) if number.isascii() and number.isdecimal() and len(number) <= launch.DIGITS_MAX else 0


def _real_uid(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            line = next(line for line in file if line.startswith(b"Uid:"))
    except (OSError, StopIteration):
        return -1
    return int(line.split()[1])


def _time_of(start: int) -> float:
    """The wall-clock time of a number of clock ticks since boot."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
    return time.time() - age


async def adopt(
    link: KeeperLink, snapshot: Snapshot, lock: store.Lock, document: Mapping[str, Any], config: Config
) -> None:
    """Bring into `snapshot` what an earlier keeper has left. The first thing that a new daemon does with its keeper.

    Raises Failed when the keeper can't take it all: then nothing may be started, or it would run twice.
    """
    known = known_children(document)
    last = document.get("last")
    last = last if isinstance(last, int) else 0
    own = {record["tag"] for record in snapshot.children.values() if not record.get("adopted") and record.get("tag")}
    seen = [] if lock.fresh else [process for process in look(lock.house, known) if process.tag not in own]
    programs = {program.name: program for program in config.programs}
    statuses = _mapping(document, "processes")
    current = {name: status["generation"] for name, status in statuses.items() if "generation" in status}
    requests = plan(seen, known, last, programs, current, trials=document.get("trials", ()))
    for request in requests:
        request["at"] = _time_of(request["start"]) if request["pid"] else 0.0
    above = max([last, *(_number(process.tag) for process in seen)])
    records = await link.adopt(lock.house, above, requests)
    if missing := [str(request["child"]) for request in requests if request["child"] not in records]:
        raise Failed(f"can't adopt what runs already: {', '.join(missing)}", hint="the keeper has said why")
    snapshot.children |= records
    rescue = Rescue(link, snapshot, document, config)
    rescue.drop_unfit()
    for request in requests:
        name, slot = split_place(launch.split_child_id(str(request["child"]))[0])
        program = programs.get(name)
        if program is None or not request["members"]:
            continue
        program = servers.in_place(program, slot)
        lost = rescue.get_back(program, request["members"])
        if records[str(request["child"])]["state"] == "running":
            snapshot.adopted[name] = lost
            if not same_program(document, config, program):
                snapshot.changed.add(name)


def same_program(document: Mapping[str, Any], config: Config, program: Program) -> bool:
    """Whether the child of `program` that the state file knows was started from the same lines of the table. Yes, where
    that can't be told."""
    told = _mapping(document, "prints").get(program.key) if document.get("made_by") == __version__ else None
    return told is None or told == apply.fingerprint(config, servers.in_place(program, 0))


# --- what it had open -----------------------------------------------------------------------------------------------


class Rescue:
    """Descriptors that become held again, for `link` and in `snapshot`. `document` is the state file's."""

    def __init__(self, link: KeeperLink, snapshot: Snapshot, document: Mapping[str, Any], config: Config) -> None:
        self._link = link
        self._held = snapshot.held
        self._pipes = _mapping(document, "pipes")
        self._files = {name: tuple(file) for name, file in _mapping(document, "sockets").items() if file}
        self._listeners = {listener.name: listener for listener in config.listeners}
        self._programs = config.programs

    def drop_unfit(self) -> None:
        """Of what the service manager has kept, let go of all that the table does not ask for any more."""
        wanted: dict[str, Listener] = {}
        pipes: set[str] = set()
        for program in self._programs:
            wanted |= self._wanted(program)
            for slot in (0, 1):
                names = launch.log_pipes(servers.in_place(program, slot))
                pipes |= {f"{name}/{end}" for name in names if name is not None for end in "rws"}
        for name, fd in list(self._held.items()):
            base = base_name(name)
            fits = base in wanted and _make_fit(fd, wanted[base])
            if name in pipes or fits or not name.startswith((FIRST, SECOND, "log/")):
                continue
            log.warning("%s, which the service manager has kept, is not in the table any more: closed", name)
            os.close(self._held.pop(name))
            self._link.release(name)

    def get_back(self, program: Program, pids: Sequence[int]) -> list[str]:
        """Hold again what the processes `pids` of `program` have open. Returns what is lost, in words."""
        pipes = {name for name in launch.log_pipes(program) if name is not None and f"{name}/w" not in self._held}
        gone = [name for name in sorted(pipes) if not self._get_pipe(name, pids)]
        lost = ["its output is lost until it is started again: no process of it gives the pipe back"] if gone else []
        missing = {
            name: each
            for name, each in self._wanted(program).items()
            if name not in self._held and beside(name) not in self._held
        }
        denied = self._get_sockets(missing, pids) if missing else ""
        until = f"can't be held until it is started again ({denied})"
        return lost + [f"its listener {listener.title} {until}" for listener in missing.values()]

    def _wanted(self, program: Program) -> dict[str, Listener]:
        return {held_name(self._listeners[name], program.name): self._listeners[name] for name in program.listen}

    def _get_pipe(self, name: str, pids: Sequence[int]) -> bool:
        inode = self._pipes.get(name)
        if not isinstance(inode, int):
            number = OUTPUTS[name.rpartition("/")[2]]
            inode = next((found for pid in pids if (found := salvage.own_pipe(pid, number))), 0)
        ends = salvage.reopen_pipe(pids, inode) if inode else None
        for end, fd in zip("rw", ends or (), strict=False):
            self._hold(f"{name}/{end}", fd)
        return ends is not None

    def _get_sockets(self, missing: dict[str, Listener], pids: Sequence[int]) -> str:
        """Take what is found out of `missing`. Returns why the rest was not found."""
        try:
            for pid in pids:
                for sock in salvage.listening_sockets(pid):
                    for name, listener in missing.items():
                        if listeners.fits(sock, listener, self._files.get(name)):
                            del missing[name]
                            _tune(sock, listener)
                            self._hold(name, sock.detach())
                            break
                    if not missing:
                        return ""
        except PermissionError:
            return "this user may not take it from the program, see ptrace(2)"
        return "the program has it otherwise, or not any more"

    def _hold(self, name: str, fd: int) -> None:
        self._held[name] = fd
        self._link.hold({name: fd})


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _tune(sock: socket.socket, listener: Listener) -> None:
    """The table may have been edited since it was opened."""
    try:
        listeners.tune(sock, listener, listeners.socket_file(listener.address.path))
    except Failed as error:
        log.error("%s", error)


def _make_fit(fd: int, listener: Listener) -> bool:
    """Whether it is the socket of `listener`; then it is as the table says."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        if not listeners.fits(sock, listener):
            return False
        _tune(sock, listener)
        return True
    finally:
        sock.detach()

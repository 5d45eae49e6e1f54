"""The supervisor process: everything is put together here, in order, and taken apart in the reverse order.

    table → lock → own log → sockets → log thread → processes → "ready"

What comes before is in `interim`: the wire, the snapshot, and the output of programs that run already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from procman import (
    apply,
    disks,
    files,
    ground,
    interim,
    kept,
    legacy,
    listeners,
    orphans,
    rollout,
    servers,
    statefile,
    store,
    table,
    takeover,
    wayback,
)
from procman.change import Change, Read
from procman.compression import Compression
from procman.config import Config, Daemon, Log, Program, place
from procman.desk import Desk
from procman.errors import ConfigError, Failed, ProcmanError, is_shortage
from procman.holdings import Holdings
from procman.interim import Interim
from procman.keeper.spawn import trim_heap
from procman.kept import Kept
from procman.launch import log_paths
from procman.link import KeeperLink
from procman.logs import Counters, LogThreads, Rules
from procman.logs import Kept as KeptLog
from procman.ownlog import OwnLog
from procman.places import Places
from procman.recall import Recording, recall
from procman.rollouts import Rollouts
from procman.scaling import Scaling
from procman.server import Access, Server
from procman.supervisor import PAST, Supervisor
from procman.versions import still_kept
from procman.wayback import WayBack

log = logging.getLogger("procman")

"""In `log_dir`: where a daemon in the background writes its own messages."""

STUCK_SECONDS = 5.0
"""How often it is looked whether a disk that is stuck goes on."""
LOGS_SECONDS = 5.0
"""So long the end of the daemon waits for a log thread at most, when it has written everything."""

OWN_LOG_SECONDS = 2.0
"""How often the size of the daemon's own log is looked at."""

OWN_LOG_REST = 600.0
"""When it could not be rotated, that is said, and tried again after this."""

HOLD_AGAIN_SECONDS = 1.0
"""When the keeper could not be given something for want of a descriptor, the next try follows this much later."""

EXIT_FAILED, EXIT_BAD_TABLE = 1, 2


def run(path: str, before: Interim, *, to_file: bool) -> int:
    """Supervise the table at `path` until the end; `before` has read the snapshot. Returns the exit status."""
    return asyncio.run(_run(path, before, to_file))


async def _run(path: str, before: Interim, to_file: bool) -> int:
    snapshot = before.snapshot
    link = KeeperLink(before.wire, snapshot.events)
    done = False
    try:
        parts = _Parts(path, link, before, to_file)
        status = await parts.supervise()
        done = True
    except ConfigError as error:
        print(error, file=sys.stderr)
        status = EXIT_BAD_TABLE
    except ProcmanError as error:
        hint = f"\n({error.hint})" if error.hint else ""
        print(f"procmand: {error}{hint}", file=sys.stderr)
        status = EXIT_FAILED
    if done or snapshot.starts == 1:  # a later one that can't begin is tried again: programs run
        link.send({"op": "exit", "status": status})
    return status


class _Parts:
    """What a running supervisor consists of."""

    def __init__(self, path: str, link: KeeperLink, before: Interim, to_file: bool) -> None:
        self.path, self.link, self.before, self.snapshot = path, link, before, before.snapshot
        self.held = self.snapshot.held
        self._to_file = to_file
        self._own_log = -1
        self._running: Daemon | None = None
        self._memory = -1
        self._kept = Kept()
        self._places: Places | None = None
        self._damage = ""
        self._says = OwnLog(2)
        self.config = self._table_in_force()
        self.daemon = self._running = self.config.daemon
        self._back = WayBack(path, self.daemon.state_dir, self.held.pop(wayback.HELD_NAME, -1))
        self._take_lock()
        self._set_up()

    # --- the table --------------------------------------------------------------------------------------------------

    def _table_in_force(self) -> Config:
        """What the supervisor before had read; the files only where this is the first one."""
        try:
            recalled = _recalled(self.path, self.held)
        except ProcmanError as error:
            # Only damage does that: what is in there was read once. The files are all that is left to go by.
            print(f"procmand: the table in force is lost, its files are read again: {error}", file=sys.stderr)
            recalled = None
        self._table_is_new = recalled is None
        for fd in [self.held.pop("first table", None), *([self.held.pop("table", None)] if recalled is None else [])]:
            if fd is not None:
                os.close(fd)
        if recalled is None:
            self._table, self._memory = self.read()
            if (stale := self.held.pop(kept.HELD_NAME, None)) is not None:
                os.close(stale)
                self.link.release(kept.HELD_NAME)
            return self._table
        self._memory = self.held.pop("table")
        self._table = recalled
        self._kept, problem = legacy.kept_of(self.held)
        if problem:
            print(f"procmand: {problem}", file=sys.stderr)
            self.link.release(kept.HELD_NAME)
        return self._kept.of(recalled)

    def _take_over_tables(self, document: Mapping[str, Any]) -> None:
        """A daemon before has left the way back to its tables on disk, and maybe a change that failed."""
        if self._table_is_new:
            self._find_way_back()
            self._keep_what_ran(document)

    def _keep_what_ran(self, document: Mapping[str, Any]) -> None:
        """The table may still say what had failed: then what ran goes on."""
        path = os.path.join(self.daemon.state_dir, store.STATE_NAME)
        found = still_kept(self._table, document)
        if found and (why := files.Machine().trusted(path)):
            log.error("%s: what it keeps of an earlier table is set aside, as it decides what root runs: %s", path, why)
            found = Kept()
        self._kept = found
        failed = "which failed or was broken off; procmanctl apply tries again"
        for name in self._kept.absent:
            log.warning("%s: came with the last apply, %s", name, failed)
        for name in self._kept.programs:
            log.warning("%s: goes on as it was before the last apply, %s", name, failed)
        self.config = self._kept.of(self._table)
        if self._kept:
            self.link.hand_over(kept.HELD_NAME, self._kept.document())

    def read(self) -> Read:
        """See `change.Tables`, as for the next."""
        recording = Recording()
        config = table.parse(self.path, recording, self._running)
        try:
            return Read(config, recording.memory())
        except OSError as error:
            raise Failed(f"the table can't be read now: {error.strerror}") from error

    def previous(self) -> Read:
        config = table.parse(self.path, self._back.recall(), self._running)
        return Read(config, os.dup(self._back.memory))

    def in_force(self, read: Read, config: Config, together: Mapping[str, int], *, other: bool) -> None:
        if other:
            try:
                together = {**together, **self._back.left(self._memory, read.memory)}
            except OSError as error:
                log.error("there is no way back to the table before: %s", error.strerror)
        os.dup2(read.memory, self._memory, inheritable=False)
        self.daemon = config.daemon
        self._hold_table("table", together=together)
        self._hold_interim(config)
        self._govern(config)
        logging.getLogger().setLevel(config.daemon.log_level.upper())

    def _govern(self, config: Config) -> None:
        """Which log files there are, and how much room is to be kept on their disk."""
        files = [
            KeptLog(program.program, path, program.log)
            for program in config.programs
            for path in (program.log.path, program.log.error_path)
            if path
        ]
        if self._to_file:
            files.append(KeptLog("", config.daemon.own_log, Log(max_size=0)))
        self._log_threads.govern(Rules(config.daemon.log_dir, config.daemon.log_min_free, tuple(files)))

    def settled(self, *, works: bool) -> None:
        try:
            for path, make in self._back.documents(self._memory if works else -1):
                self._journal.beside(path, make)
        except OSError as error:
            log.error("a daemon that is started anew may not know the way back to this table: %s", error)

    def _find_way_back(self) -> None:
        if self._back.memory >= 0:
            return
        for problem in self._back.find(self._memory):
            log.error("%s; apply --previous does without it", problem)
        if self._back.memory >= 0:
            self.link.hold({wayback.HELD_NAME: self._back.memory})

    def _next_table(self, memory: int) -> Read:
        """The table of a change that the supervisor before was about (`legacy`)."""
        return Read(table.parse(self.path, recall(os.dup(memory)), self._running), memory)

    def _hold_table(self, *names: str, together: Mapping[str, int] | None = None) -> None:
        try:
            self.link.hold({**dict.fromkeys(names, self._memory), **(together or {})})
        except ProcmanError as error:
            if not is_shortage(error):
                raise
            # The table is in force all the same; only a successor would not know it yet.
            log.error("the table can't be handed to the keeper now: %s", error)
            self._hold_table_later(*names)

    def _hold_table_later(self, *names: str) -> None:
        asyncio.get_running_loop().call_later(HOLD_AGAIN_SECONDS, self._hold_table, *names)

    def _lost(self, names: list[str], stands: ground.Ground) -> None:
        """The keeper could not take these."""
        tables = [name for name in names if name in ("table", "first table")]
        if tables:
            self._hold_table_later(*tables)
        stands.lost([name for name in names if name not in tables])

    def _hold_interim(self, config: Config) -> None:
        beside = set() if self._places is None else self._places.beside.keys()
        there = {} if self._places is None else self._places.by_key
        programs = [
            there[key].program if program.name in beside and key in there else servers.in_place(program, slot)
            for program in config.programs
            for slot in takeover.SLOTS
            for key in (place(program.name, slot),)
        ]
        # Who writes to the file of one that has to wait has to wait, too: that one may have to finish a line first.
        late = {path for program in programs if _waits(program) for path in log_paths(program).values() if path}
        outputs = [
            interim.Output(key, program.name, program.log, path)
            for program in programs
            if not _waits(program)
            for key, path in log_paths(program).items()
            if path not in late
        ]
        try:
            memory = interim.plan(outputs)
            try:
                self.link.hold({interim.HELD_NAME: memory})
            finally:
                os.close(memory)
        except (OSError, ProcmanError) as error:
            if not is_shortage(error):
                raise
            self.link.release(interim.HELD_NAME)  # the old plan may be wrong now; without one, output only waits longer

    # --- the daemon's own things ------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        """The keeper holds it, and so do we: while one of the two lives, however shortly, no other daemon begins."""
        held = self.held.pop("lock", None)
        if held is not None:
            self.lock = store.Lock(held, 0, fresh=False)  # its house is read where it is needed
        else:
            self.lock = store.lock(self.daemon.state_dir, self.snapshot.keeper_pid)
            self.link.hold({"lock": self.lock.fd})

    def _set_up(self) -> None:
        _set_name(self.daemon.identifier)
        os.umask(self.daemon.umask)
        _raise_open_files(self.daemon.open_files)
        try:
            _make_folder(self.daemon.log_dir)
        except Failed as error:
            if self.snapshot.starts == 1:
                raise
            print(f"procmand: {error}", file=sys.stderr)  # a disk has failed: a successor goes on all the same
        if self._to_file and self.snapshot.starts == 1:  # a later one inherits what the keeper writes to
            self._own_log = self._open_own_log()
            self._says.fd = self._own_log  # until we are ready, errors go to who called procmand
        logging.basicConfig(handlers=[self._says], level=self.daemon.log_level.upper())
        logging.getLogger("asyncio").setLevel(logging.WARNING)

    def _open_own_log(self) -> int:
        path = self.daemon.own_log
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as error:
            raise Failed(f"can't write the daemon's log {path}: {error.strerror}") from error

    def _write_to(self, own_log: int) -> None:
        """Let stdout and stderr of supervisor and keeper be this file, which is then closed here."""
        os.dup2(own_log, 1)
        os.dup2(own_log, 2)
        self.link.send({"op": "log"}, own_log)
        os.close(own_log)

    def _reopen_own_log(self) -> None:
        """Somebody has moved the daemon's own log away: go on in a new one. One that can't be made is said in the
        old."""
        if not self._to_file:
            return
        try:
            self._write_to(self._open_own_log())
        except Failed as error:
            log.error("%s", error)

    def _look_at_own_log(self) -> None:
        """Has it rotated when it has become too large: its own messages are in there, and inherited output."""
        loop, now, most = asyncio.get_running_loop(), os.fstat(1), self.daemon.log_max_size
        again = functools.partial(loop.call_later, OWN_LOG_SECONDS, self._look_at_own_log)
        if not 0 < most <= now.st_size:
            again()
            return

        def done(problem: str) -> None:
            if problem:
                log.error("the daemon's own log %s can't be rotated: %s", self.daemon.own_log, problem)
                loop.call_later(OWN_LOG_REST, self._look_at_own_log)
            else:
                self._reopen_logs()
                again()

        identity = now.st_dev, now.st_ino
        then = functools.partial(_call_soon, loop, done)
        self._log_threads.retire(self.daemon.own_log, identity, self.daemon.log_keep, then)

    def _rpc_socket(self) -> socket.socket:
        held = self.held.pop("rpc", None)
        if held is not None:
            return socket.socket(fileno=held)
        daemon = self.daemon
        sock = listeners.open_rpc_socket(daemon.socket, daemon.socket_mode, daemon.socket_gid)
        self.link.hold({"rpc": sock.fileno()})
        return sock

    def _counters(self, document: Mapping[str, Any]) -> dict[str, Counters]:
        """What became of all output so far; of that of the last moments nobody has told but us."""
        goes_on = self.snapshot.starts > 1 or self.snapshot.children
        counters = ground.counters_from(document.get("logs") if goes_on else None)
        for key, counted in self.before.stop().items():
            counters[key] = interim.add(counters.get(key, Counters()), counted)
        return counters

    def _access(self) -> Access:
        return Access(os.geteuid(), self.daemon.socket_gid, self.daemon.read_only_gid)

    # --- at work ----------------------------------------------------------------------------------------------------

    async def supervise(self) -> int:
        """From the first listener to the last goodbye."""
        document = self._state()
        self._take_over_tables(document)
        if document.get("keeper", "") != self.snapshot.identity or self.snapshot.starts == 1:
            # Nothing was written in this life of the daemon: the supervisors before have died too soon.
            lock = self.lock if self.lock.house else store.held_lock(self.lock.fd)
            await orphans.adopt(self.link, self.snapshot, lock, document, self.config)
        loop = asyncio.get_running_loop()
        compression = Compression(self.link)
        # Not the descriptors of who called procmand: they are open for as long as it runs.
        stdout, stderr = (self._own_log, self._own_log) if self._own_log >= 0 else (1, 2)
        log_thread = self._log_threads = LogThreads(
            lambda path: _call_soon(loop, stands.news, path),
            stdout,
            disks.of,
            lambda: _call_soon(loop, supervisor.journal.dirty),
            stderr,
            on_wish=lambda path: _call_soon(loop, compression.wish, path),
            on_said=lambda text: _call_soon(loop, log.warning, "%s", text),
        )
        counters = self._counters(document)
        holdings = Holdings(self.link, self.held, log_thread, self.daemon, counters=counters, told=document)
        stands = ground.Ground(self.link, holdings, log_thread, os.environ)
        self.link.on_lost = lambda names: self._lost(names, stands)
        rpc_socket = self._rpc_socket()
        rpc_file = listeners.socket_file(self.daemon.socket)
        supervisor = Supervisor(self.config, self.link, stands)
        supervisor.damage = self._damage
        self._places = supervisor.places
        supervisor.on_places = lambda: self._hold_interim(supervisor.config)
        rollouts = Rollouts(supervisor, self.link, stands)
        change = Change(rollouts, self, self._table, self._kept)
        desk = Desk(supervisor, self.link, stands, change, rollouts, scaling=Scaling(supervisor, stands))
        self.server = Server(rpc_socket, desk, self._access())
        stands.on_reopen, self._reopen_logs = self._reopen_own_log, stands.reopen_logs
        self._govern(self.config)
        if self._table_is_new:
            self._hold_table("table", "first table")
        if self._table_is_new or self.before.problem:
            self._hold_interim(self.config)
        self._go_on(supervisor, change, rollouts, document)
        # Not sooner: whoever waits for a line of a child that runs already must see what comes now.
        self._start_logs(log_thread, compression, holdings)
        holdings.close_received()
        await self.server.start()
        self._ready(len(supervisor.processes), desk)
        status = await supervisor.finished
        if supervisor.deserted:
            return status  # the programs go on, and every file and socket of ours is theirs and the next daemon's
        await self.server.close()
        compression.close()
        supervisor.measures.stop()
        written = await stands.written([process.program for process in supervisor.places.everyone()])
        log_thread.stop(LOGS_SECONDS if written else 0.0)
        stands.close()
        if rpc_file is not None:
            listeners.remove_socket_file(self.daemon.socket, rpc_file)
        log.info("procmand ends with status %d", status)
        return status

    def _go_on(
        self, supervisor: Supervisor, change: Change, rollouts: Rollouts, document: dict[str, Any]
    ) -> None:
        """Take up the processes, and what the supervisor before was about."""
        self._journal = supervisor.journal
        left = legacy.take(self.held, self._next_table)
        for problem in left.problems:
            log.error("%s", problem)
        leaving = change.leaving(left.unfinished) if left.unfinished is not None else frozenset()
        rollouts.prepare(left.rollouts)
        passing = rollout.passing(left.rollouts, [program.name for program in self.config.programs])
        passing = {name: one._replace(beside=self._kept.tried.get(name)) for name, one in passing.items()}
        lost = any(not name.startswith(rollout.HELD) for name in left.lost)
        coming = left.unfinished.added if left.unfinished is not None else ()
        known: dict[str, Any] = {"ending": left.ending, "leaving": leaving, "coming": coming, "lost": lost}
        supervisor.begin(self.snapshot, document, rollouts=passing, past=left.past, **known)
        self.link.release(PAST)
        for name in left.lost:
            self.link.release(name)
        rollouts.resume(left.rollouts)
        if left.unfinished is not None:
            change.resume(left.unfinished)
        else:
            change.settled()

    def _state(self) -> dict[str, Any]:
        """What the state file says, or the keeper where it knows better, as far as it can be believed; nothing where
        there is none. What is wrong with it is logged."""
        path = os.path.join(self.daemon.state_dir, store.STATE_NAME)
        loaded = store.load(path)
        document, problem = loaded.document, loaded.problem
        if document is not None:
            document, wrong = statefile.believable(document)
            if wrong:
                kept = store.keep_copy(path)
                problem = f"of the state file {path} this makes no sense and is left out: {wrong}; {kept}"
        in_file = document
        held, unreadable = legacy.state(self.held)
        document = statefile.later(in_file, statefile.believable(held)[0] if held else None, self.snapshot.identity)
        if problem and document is not in_file:
            problem += "; what the keeper holds counts instead"
        elif problem:
            self._damage = f"{problem} (since then, what operators had stopped may run again)"
        for each in filter(None, (problem, unreadable, self.before.problem)):
            log.error("%s", each)
        return orphans.of_this_boot(document, store.boot_id())

    def _start_logs(self, log_thread: LogThreads, compression: Compression, holdings: Holdings) -> None:
        if self.before.ended():
            for key, counted in self.before.late().items():
                if holdings.is_captured(key):
                    log_thread.recount(key, counted)
            log_thread.start()
            compression.begin(log_thread)
        else:
            log.warning("the disk of the logs is stuck: output waits")
            asyncio.get_running_loop().call_later(STUCK_SECONDS, self._start_logs, log_thread, compression, holdings)

    def _ready(self, processes: int, desk: Desk) -> None:
        for problem in desk.rivals() if self.snapshot.starts == 1 else ():
            log.error("%s", problem)
        log.info("procmand is ready: %d processes, socket %s", processes, self.daemon.socket)
        if self._own_log >= 0:
            self._says.fd = 2
            self._write_to(self._own_log)
        if self._to_file:
            asyncio.get_running_loop().call_later(OWN_LOG_SECONDS, self._look_at_own_log)
        self.link.send({"op": "ready"})
        self.link.send({"op": "notify", "state": f"READY=1\nSTATUS={processes} processes"})
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection need look at it again
        trim_heap()


def _waits(program: Program) -> bool:
    """Whether its output waits for a new supervisor until all of that is up: see `interim`."""
    return program.log.mode == "inherit" or program.ready.kind == "log"


def _recalled(path: str, held: Mapping[str, int]) -> Config | None:
    """The table in force, from the memory that the keeper holds; None where it holds none. Raises Failed for damage."""
    if "table" not in held or "first table" not in held:
        return None
    before, now = recall(os.dup(held["first table"])), recall(os.dup(held["table"]))
    # What needs a restart of the daemon is as it was when it started: a crash is no restart.
    began = None if before == now else table.parse(path, before).daemon
    config = table.parse(path, now, began)
    if began is None:
        return config
    return replace(config, daemon=apply.daemon_in_force(began, config.daemon))


def check_table(path: str, held: dict[str, int]) -> None:
    """Before an upgrade: whether this code understands the table that the keeper holds. Raises ConfigError."""
    _recalled(path, held)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: object, *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(callback, *arguments)  # type: ignore[arg-type]
    except RuntimeError:
        pass  # the loop has ended


def _set_name(name: str) -> None:
    """What `ps -o comm` and top call this process: at most 15 bytes (proc(5))."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _raise_open_files(wanted: int) -> None:
    """Raise RLIMIT_NOFILE to `wanted`, or as far as the hard limit lets us; what is missing is said."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, wanted), hard), hard))
        if hard < wanted != Daemon.__dataclass_fields__["open_files"].default:
            print(f"procmand: open_files = {wanted} is more than the hard limit {hard}, which is used", file=sys.stderr)


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as error:
        raise Failed(f"can't make the folder {path}: {error.strerror}") from error

"""What processes stand on: it turns "spawn", "signal" and "tell me when it is ready" into work for keeper, sockets
and logs.

It decides nothing: `Process` asks, this does. It is `process.Surroundings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import signal
import stat
import sys
from asyncio.trsock import TransportSocket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from procman import disks, interim, launch, notify, printed, probes, queues, report, resources, shape, values
from procman.config import Config, Listener, Program
from procman.errors import Failed, ProcmanError
from procman.holdings import Holdings
from procman.keeper.wire import Message
from procman.launch import log_paths
from procman.lifecycle import Exit, Held, Ready, State, Status
from procman.link import KeeperLink
from procman.logread import Position
from procman.logs import Counters, LogThreads, Removed
from procman.parting import Parting
from procman.places import Places
from procman.process import Process
from procman.reading import Reading
from procman.records import dataclass
from procman.report import Info
from procman.resources import OutOfMemory
from procman.sockets import held_name
from procman.trials import Trials

log = logging.getLogger("procman")

CHILDLESS = frozenset({State.STOPPED, State.BACKOFF, State.EXITED, State.FATAL})

PROBED = frozenset({"http", "tcp", "unix", "command", "gunicorn"})
ASKED_AGAIN = frozenset({"http", "tcp", "gunicorn"})
"""Kinds of probes that a successor alone can be asked by, also while it serves."""

TRIES = 16
"""How many tries a probe makes at most before a pause, where others have the socket at which it asks."""

HOLDER_LOOKS = 10
"""So often it is looked who has a connection that was accepted, before that counts as not to be known."""

ENV_FILE_MAX = 1024 * 1024

PAUSE_SECONDS = 10.0
"""How long the log thread may take to come to rest: what it has at hand is written first."""

NOTIFICATIONS_AT_ONCE = 64
"""Of one program. Many may wait when nobody was there for a while; a flood must not hold the loop."""

LINE_MAX = 1024 * 1024
"""Bytes of an unfinished line that a `log` readiness pattern is tried on."""

RELOAD_SECONDS = 60.0
"""How long the command of `reload` may take."""

PAST = "past/"
"""Begins the names of counters whose pipe is gone, in the state file."""

HELD_SECONDS = 1.0
"""How often a process that has to wait for others is told so."""

TRACEBACK_SECONDS = 2.0
"""How long the last traceback may take: for the log to be written, and to be read."""

PATH_SECONDS = 2.0
"""How long a look at the path of a Unix listener may take."""

STUCK_SECONDS = 5.0
"""A disk that has not answered for so long counts as stuck: `daemon status` tells."""


@dataclass(slots=True)
class _NotYet:
    """A child that the keeper will be asked for. `why` not yet; a `problem` if that lasts, `since` monotonic time."""

    task: asyncio.Task[dict[str, str]]
    since: float
    why: str = ""
    problem: str = ""
    called_off: bool = False


class _Line(NamedTuple):
    """The line that means "ready" is waited for: `seen`, and what ends that."""

    seen: asyncio.Event
    end: Callable[[], None]


class Ground:
    """See the module. `environ` is the daemon's own environment."""

    def __init__(self, link: KeeperLink, holdings: Holdings, logs: LogThreads, environ: Mapping[str, str]) -> None:
        self._link = link
        self._holdings = holdings
        self._logs = logs
        self._environ = dict(environ)
        self.on_reopen: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._places = Places()
        self._listeners: dict[str, Listener] = {}
        self._on_change: Callable[[Process, Status], None] = lambda process, before: None
        self._runs: dict[str, asyncio.Future[int]] = {}
        self._run_numbers = itertools.count(1)
        self._matched: dict[str, _Line] = {}  # by place
        self._watching: dict[str, list[Callable[[], None]]] = {}
        self._out_of_memory = OutOfMemory()
        self._slow = Reading()
        self._waiting: dict[str, _NotYet] = {}  # by child
        self._taps: dict[str, tuple[Callable[[bytes], None], ...]] = {}
        self.sockets = holdings.sockets
        self._past = {  # by process and stream: what was counted in the pipes of children before, in the other place
            key.removeprefix(PAST): _ended(counted)
            for key, counted in holdings.counters.items()
            if key.startswith(PAST)
        }
        self._leaving: list[tuple[str, Removed]] = []  # the same for pipes that are being closed
        self.trials = Trials(holdings.sockets)
        self.parting = Parting(holdings.sockets)

    def attach(self, on_change: Callable[[Process, Status], None], places: Places) -> None:
        """Tell `on_change` of every change of a process; `places` has all that there are, now and later."""
        self._on_change = on_change
        self._places = places

    # --- process.Surroundings ---------------------------------------------------------------------------------------

    def spawn(self, process: Process, generation: int) -> None:
        """See `process.Surroundings`, as for the next three."""
        if not process.program.env_files and not self.trials.bars(process.program):
            self._ask(process, generation, {})
            return
        waits = self._loop.create_task(self._before_start(process))
        self._waiting[process.child] = _NotYet(waits, self._loop.time())
        waits.add_done_callback(lambda done: self._can_start(process, generation, done))

    async def _before_start(self, process: Process) -> dict[str, str]:
        """Wait for all that a start has to wait for. Returns the variables of its env files."""
        program, waiting = process.program, self._waiting[process.child]
        if other := self.trials.bars(program):
            waiting.why = f"{other}, which has the same listener, is being replaced"
            log.info("%s: its start waits: %s", program.name, waiting.why)
            await self._turn(process, waiting.why)
        files = ", ".join(program.env_files)
        waiting.why = f"env_file {files} has not been read: is its disk stuck?"
        waiting.problem = "its env_file is not read"
        waiting.since = self._loop.time()
        return await self._env_files(program)

    async def _turn(self, process: Process, reason: str) -> None:
        """Wait until nobody else bars its start. That is none of the time that it has to become ready."""
        why = process.status.why.partition("; it waits: ")[0]  # a supervisor before may have said so
        turn = asyncio.ensure_future(self.trials.turn(process.program))
        try:
            while not turn.done():
                process.feed(Held(f"{why}; it waits: {reason}"))
                await asyncio.wait({turn}, timeout=min(HELD_SECONDS, process.program.start_timeout / 2))
            process.feed(Held(why))
        finally:
            turn.cancel()

    def _can_start(self, process: Process, generation: int, waited: asyncio.Task[dict[str, str]]) -> None:
        """The other half of `spawn`, for one that had to wait."""
        not_yet = self._waiting.pop(launch.child_id(process.key, generation))
        if not process.status.alive or process.status.generation != generation:
            return
        try:
            if not_yet.called_off or waited.cancelled():
                raise Failed(f"can't start: {not_yet.why}")
            self._ask(process, generation, waited.result())
        except ProcmanError as error:
            process.spawn_failed(generation, error)

    def _ask(self, process: Process, generation: int, from_files: Mapping[str, str]) -> None:
        """Ask the keeper for the child; `from_files` are the variables of its env files."""
        program = process.program
        try:
            self._holdings.control_folder(program)
            self._holdings.open_logs(program)
            asked_for = [self._listeners[name] for name in program.listen]
            listen = {each.title: self.trials.socket(program.key, program.name, each) for each in asked_for}
            asked = launch.request(program, generation, self._environment(program, from_files), listen)
        except OSError as error:  # of whatever kind: it must not end what else is being done
            raise Failed(f"can't start: {error.strerror}") from error
        if program.ready.kind == "log":
            self._listen_for_line(program)  # now: a fast child may say it before the keeper says that it runs
        socket = self._holdings.notify_sockets.get(program.key)
        if socket is not None:
            socket.drop()  # what waits there is of a child before
        self._link.spawn(asked | {"note": report.note_of(process.status)})

    def remember(self, process: Process) -> None:
        self._link.note(process.child, report.note_of(process.status))

    def signal(self, process: Process, number: int, tree: bool) -> None:
        pending = self._waiting.get(process.child)
        if pending is not None:  # the keeper knows of no such child yet, and will not
            pending.called_off = True
            pending.task.cancel()
            return
        self._link.signal(process.child, number, tree, note=report.note_of(process.status))

    def changed(self, process: Process, before: Status) -> None:
        status = process.status
        if status.pid is not None and before.pid is None:
            socket = self._holdings.notify_sockets.get(process.key)
            if socket is not None:
                self._loop.add_reader(socket.fileno(), self._notify_readable, socket, process.key)
        elif before.pid is not None and status.pid is None:
            for name in self._holdings.captured(process.program):
                self._logs.flush(name)
        if process.program.listen and status.state in CHILDLESS and before.state not in CHILDLESS:
            self._holdings.sockets.close_own(process.name)
        self._on_change(process, before)

    def watch_ready(
        self, process: Process, ready: Callable[[], None], report: Callable[[str], None]
    ) -> Coroutine[Any, Any, None] | None:
        wanted = process.program.ready
        if wanted.kind in PROBED:
            return self._probe(process, ready, report)
        if wanted.kind == "log":
            report(f"no line of its output matches {wanted.pattern!r} yet")
            line = self._matched.get(process.key)  # None: its child was started by a supervisor that died
            seen = line.seen if line is not None else self._listen_for_line(process.program)
            return self._watch_output(process.program, seen, ready)
        if wanted.kind == "notify":
            report("READY=1 has not arrived")
        return None

    async def _probe(self, process: Process, ready: Callable[[], None], report: Callable[[str], None]) -> None:
        run = functools.partial(self._run, process.program)
        wanted = process.program.ready
        what = f"{wanted.kind} {wanted.address or ' '.join(wanted.argv)}{wanted.path}"
        looked: Counter[int] = Counter()

        def attempt() -> Awaitable[str]:  # each time anew: who has its listener, and which socket, may have changed
            asked, let_through = self.trials.alone(process.key, wanted)
            return probes.ask(asked, run, let_through, self._shared(process, looked))

        await probes.until_good(attempt, lambda reason: report(f"{what}: {reason}"))
        ready()

    def _shared(self, process: Process, looked: Counter[int]) -> probes.Shared | None:
        """How the answer of `process` to its probe is told from those of others that have a listener with it; None
        where it is not asked at one. `looked`: how often was looked for who has a socket, by its inode."""
        program = process.program
        addresses = (self._listeners[name].address for name in program.listen)
        asked = program.ready.address
        if asked is None or not any(values.meets(address, asked) for address in addresses):
            return None
        others = [
            each
            for each in self._places.everyone()
            if each is not process and not set(program.listen).isdisjoint(each.program.listen)
        ]

        async def accepted_by(clients: Sequence[TransportSocket]) -> Sequence[str | None]:
            keys: Sequence[str | None] = [""] * len(clients)
            if any(each.status.alive for each in others):
                mains = {each.key: each.status.pid for each in (process, *others) if each.status.pid}
                with contextlib.suppress(OSError, RuntimeError):  # the kernel does not tell; there is no thread
                    keys = await asyncio.to_thread(_accepted_by, clients, mains, looked)
            names = {each.key: each.name for each in others}
            return [key and names.get(key, "") for key in keys]

        return probes.Shared(accepted_by, min(TRIES, len(others) + 1)) if others else None

    def can_ask(self, process: Process) -> bool:
        """Whether `ask` can."""
        return process.program.ready.kind in ASKED_AGAIN

    async def ask(self, process: Process) -> str:
        """The readiness probe of a process that is ready, once more: "" or why it failed."""
        wanted, let_through = self.trials.alone(process.key, process.program.ready)
        return await probes.ask(wanted, functools.partial(self._run, process.program), let_through)

    def _listen_for_line(self, program: Program) -> asyncio.Event:
        """From now on look for the line that means "ready" in all that comes out of the program's pipes."""
        pattern = re.compile(program.ready.pattern.encode())
        before = self._matched.pop(program.key, None)
        if before is not None:
            before.end()
        seen = asyncio.Event()
        rest = b""

        def look(chunk: bytes) -> None:  # in the log thread
            nonlocal rest
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-LINE_MAX:]
            if any(pattern.search(line) for line in (*lines, rest)):
                self._loop.call_soon_threadsafe(seen.set)

        self._matched[program.key] = _Line(seen, self._tap(self._holdings.captured(program), look))
        return seen

    def tap_streams(self, program: Program, make: Callable[[], Callable[[bytes], None]]) -> Callable[[], None]:
        """As `_tap`, with a callback of its own, made by `make`, for each stream of its output."""
        ends = [self._tap([key], make()) for key in self._holdings.captured(program)]

        def end() -> None:
            for each in ends:
                each()

        return end

    def _tap(self, keys: Sequence[str], callback: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `callback` in the log thread with all that comes out of these pipes, until what is returned is
        called."""

        def heard(chunk: bytes, key: str) -> None:
            for each in self._taps.get(key, ()):
                each(chunk)

        def end() -> None:
            for key in keys:
                left = self._taps[key] = tuple(each for each in self._taps.get(key, ()) if each is not callback)
                if not left:
                    self._taps.pop(key)
                    if self._holdings.is_captured(key):
                        self._logs.tap(key, None)

        for key in keys:
            self._taps[key] = (*self._taps.get(key, ()), callback)
            self._logs.tap(key, functools.partial(heard, key=key))
        return end

    def remember_output(self, program: Program) -> Callable[[], list[str]]:
        """From now on keep the end of all that it prints. What is returned ends that, and returns the lines; it can be
        called once."""
        kept = bytearray()

        def keep(chunk: bytes) -> None:
            kept.extend(chunk)
            del kept[: max(0, len(kept) - printed.MAX_BYTES)]

        end = self._tap(self._holdings.captured(program), keep)

        def lines() -> list[str]:
            end()
            return bytes(kept).decode(errors="replace").splitlines()

        return lines

    async def _watch_output(self, program: Program, seen: asyncio.Event, ready: Callable[[], None]) -> None:
        try:
            await seen.wait()
        finally:
            line = self._matched.get(program.key)
            if line is not None and line.seen is seen:
                del self._matched[program.key]
                line.end()
        ready()

    # --- before a child ---------------------------------------------------------------------------------------------

    def prepare(self, program: Program, config: Config) -> None:
        """Open what `program` needs, or find it open. What can't be opened is said, and tried again at each start."""
        self._listeners = {listener.name: listener for listener in config.listeners}
        for name in program.listen:
            listener, sockets = self._listeners[name], self._holdings.sockets
            if listener.reuse_port and not self._holdings.holds(sockets.current(listener, program.name)):
                continue  # a socket of its own, as long as it has a child: else it would take connections to nobody
            self._try(program, functools.partial(self._holdings.sockets.open, self._listeners[name], program.name))
        self._try(program, lambda: self._holdings.open_logs(program))
        if program.notify:
            self._try(program, lambda: self._open_notify(program))

    @staticmethod
    def _try(program: Program, open_one: Callable[[], object]) -> None:
        try:
            open_one()
        except (ProcmanError, OSError) as error:
            log.error("%s: %s", program.name, error)

    def lost(self, names: Sequence[str]) -> None:
        """The keeper had no room for these (`Holdings.lost`)."""
        for name in names:
            socket = self._holdings.notify_sockets.get(name.removeprefix("notify/"))
            if socket is not None and name.startswith("notify/"):
                self._loop.remove_reader(socket.fileno())  # else the loop takes the next one of this number for it
        self._holdings.lost(names)

    async def written(self, programs: Sequence[Program]) -> bool:
        """Wait until what these have printed is in their logs: what is in a pipe when it closes outlives nobody. Not
        longer than PAUSE_SECONDS: a disk may be stuck, or whoever reads the daemon's stdout be very slow. That is said
        then, and False returned."""
        names = [name for program in programs for name in self._holdings.captured(program)]
        left = len(names)
        empty = asyncio.Event()

        def flushed() -> None:
            nonlocal left
            left -= 1
            if not left:
                empty.set()

        def done() -> None:  # in the log thread
            self._loop.call_soon_threadsafe(flushed)

        for name in names:
            self._logs.flush(name, done)
        if not names:
            return True
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await empty.wait()
        except TimeoutError:
            log.error("output of %s waits for its disk or its reader, and may be lost", ", ".join(names))
            return False
        return True

    def retire(self, program: Program) -> None:
        """One of two children of `program` has gone, and its place with it. What its output was still counts."""
        for name, removed in self._close(program).items():
            self._leaving.append((f"{program.name}/{name.rpartition('/')[2]}", removed))

    def unprepare(self, program: Program) -> None:
        """`program` has gone from the table."""
        for key in [key for key in self._past if key.rpartition("/")[0] == program.name]:
            del self._past[key]
        self._leaving = [each for each in self._leaving if each[0].rpartition("/")[0] != program.name]
        self._close(program)

    def _gone(self) -> dict[str, Counters]:
        """What was counted in pipes that are closed or being closed, by process and stream."""
        for key, removed in [each for each in self._leaving if each[1].ended.is_set()]:
            self._past[key] = interim.add(self._past.get(key, Counters()), _ended(removed.counters()))
            self._leaving.remove((key, removed))
        gone = dict(self._past)
        for key, removed in self._leaving:
            gone[key] = interim.add(gone.get(key, Counters()), removed.counters())
        return gone

    def _close(self, program: Program) -> dict[str, Removed]:
        removed = self._holdings.close_logs(program)
        self._holdings.remove_control_folder(program)
        socket = self._holdings.notify_sockets.get(program.key)
        if socket is not None:
            self._loop.remove_reader(socket.fileno())
            self._holdings.close_notify_socket(program.key)
        return removed

    def close(self) -> None:
        """The daemon ends: nothing may stay behind in its runtime folder."""
        self._slow.close()
        for process in self._places.everyone():
            self._holdings.remove_control_folder(process.program)
        self._holdings.remove_files()

    def open_early(self, config: Config, programs: Iterable[Program]) -> None:
        """Open what `programs` are to listen on, before anything is stopped for them. Raises Failed when something
        can't be opened; it may leave others open (`close_unused`)."""
        known = {listener.name: listener for listener in config.listeners}
        for name in dict.fromkeys(name for program in programs for name in program.listen):
            self._holdings.sockets.open_early(known[name])

    def taken(self, config: Config, programs: Iterable[Program]) -> dict[str, str]:
        """Why `open_early` would fail, by the listener that can't be had."""
        known = {listener.name: listener for listener in config.listeners}
        found = {}
        for name in dict.fromkeys(name for program in programs for name in program.listen):
            try:
                self._holdings.sockets.try_out(known[name])
            except ProcmanError as error:
                found[name] = str(error)
        return found

    def close_unused(self, config: Config, spare: Iterable[Listener] = ()) -> None:
        """Close the listening sockets that no program of `config` has, or that it has otherwise; but not those of
        `spare`, which will be needed."""
        known = self._listeners = {listener.name: listener for listener in config.listeners}
        keep = {held_name(known[name], one.name): known[name] for one in config.programs for name in one.listen}
        plain = {held_name(listener, ""): listener for listener in spare if not listener.reuse_port}
        self._holdings.sockets.close_others(plain | keep)

    def tune(self, listeners: Sequence[Listener]) -> list[str]:
        """Make open sockets like these. Returns what can't be done, which `problems` tells from now on."""
        wrong = []
        for listener in listeners:
            try:
                self._holdings.sockets.tune(listener)
            except ProcmanError as error:
                log.error("%s", error)
                wrong.append(str(error))
        return wrong

    async def path_problems(self) -> list[str]:
        """What is wrong with the paths of Unix listeners. In threads: a disk may be dead."""

        async def look(path: str, problem: Callable[[], str]) -> str:
            try:
                async with asyncio.timeout(PATH_SECONDS):
                    return await self._slow.run(disks.of(path), problem)
            except TimeoutError:
                return f"unix:{path} can't be looked at: is its disk stuck?"
            except (ProcmanError, OSError):  # no descriptor or thread is left
                return ""

        found = await asyncio.gather(*(look(path, problem) for path, problem in self.sockets.paths()))
        return sorted(filter(None, found))

    def change_logs(self, program: Program) -> None:
        """The output of `program` goes where its table says now."""
        for key, path in log_paths(program).items():
            if key in self._holdings.captured(program):
                self._holdings.change_log(key, program.log, path)

    async def _env_files(self, program: Program) -> dict[str, str]:
        """The variables of its env files. In a thread: their disk may be dead, and then this ends by being cancelled.
        Raises Failed."""
        variables: dict[str, str] = {}
        for path in program.env_files:
            try:
                text = await self._slow.run(disks.of(path), functools.partial(_read_regular, path))
                variables |= launch.parse_env_file(text)
            except OSError as error:
                raise Failed(f"can't start: env_file {path}: {error.strerror}") from error
            except ValueError as error:
                raise Failed(f"can't start: env_file {path}: {error}") from error
        return variables

    def _environment(self, program: Program, from_files: Mapping[str, str]) -> dict[str, str]:
        address = ""
        if program.notify:
            address = self._open_notify(program)
        beside = os.path.dirname(sys.executable)
        return launch.environment(program, self._environ, from_files, address, servers_folder=beside)

    # --- READY=1 ----------------------------------------------------------------------------------------------------

    def _open_notify(self, program: Program) -> str:
        known = program.key in self._holdings.notify_sockets
        socket = self._holdings.notify_socket(program)
        if not known:
            self._loop.add_reader(socket.fileno(), self._notify_readable, socket, program.key)
        return socket.path

    def _notify_readable(self, socket: notify.NotifySocket, key: str) -> None:
        process = self._places.by_key.get(key)
        for _ in range(NOTIFICATIONS_AT_ONCE):
            message = socket.peek()
            if message is None:
                return
            if process is not None and process.status.alive:
                if process.status.pid is None:  # faster than the keeper's report that it runs; `changed` waits for that
                    self._loop.remove_reader(socket.fileno())
                    return
                self._notified(process, message)
            socket.take()  # not sooner: the keeper knows by now what it has led to

    def _notified(self, process: Process, message: notify.Message) -> None:
        account = process.program.account
        uid = account.uid if account is not None else os.geteuid()
        if process.status.pid is None or process.program.ready.kind != "notify":
            return
        if not notify.allowed(message.pid, message.uid, process.status.pid, uid):
            log.warning("%s: a notification of pid %d (uid %d) is ignored", process.name, message.pid, message.uid)
        elif message.fields.get("READY") == "1":
            process.feed(Ready())

    # --- commands that probes run -----------------------------------------------------------------------------------

    async def run_reload(self, process: Process) -> tuple[bool, str]:
        """Run the command of `reload`, with the pid of the main process in MAINPID. What it prints goes to the log of
        the program."""
        program = process.program
        variables = {**dict(program.environment), "MAINPID": str(process.status.pid or "")}
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                told = replace(program, environment=tuple(variables.items()))
                status = await self._run(told, program.reload_command, heard=True)
        except TimeoutError:
            return False, f"its reload command did not end within {RELOAD_SECONDS:g} s"
        except ProcmanError as error:
            return False, f"its reload command: {error}"
        if status:
            return False, f"its reload command failed with {f'exit status {status}' if status > 0 else -status}"
        return True, "its reload command has run"

    async def _run(self, program: Program, argv: tuple[str, ...], *, heard: bool = False) -> int:
        """Run a probe's command as the program would run; its exit status, 127 when it can't start. What it prints goes
        nowhere, or, when it is to be `heard`, where the program's own output goes."""
        child = f"{program.key}/probe#{next(self._run_numbers)}-{os.getpid()}"
        told = replace(program, argv=argv, log=program.log if heard else replace(program.log, mode="discard"))
        environment = self._environment(program, await self._env_files(program))
        asked = launch.request(told, 0, environment, {})
        future: asyncio.Future[int] = self._loop.create_future()
        self._runs[child] = future
        self._link.spawn(asked | {"child": child})
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._link.signal(child, signal.SIGKILL, tree=True)

    def ran(self, child: str, message: Message) -> bool:
        """Whether a message of the keeper is about such a command; then it is dealt with."""
        future = self._runs.get(child)
        if future is None:
            return False
        if message["op"] in ("exited", "failed") or message.get("state") == "exited":
            status = message.get("status")
            if not future.done():
                future.set_result(127 if status is None else os.waitstatus_to_exitcode(int(status)))
            if message.get("left"):
                self._link.signal(child, signal.SIGKILL, tree=True)
            del self._runs[child]
            self._link.forget(child)
        return True

    # --- exits ------------------------------------------------------------------------------------------------------

    def explain(self, exit: Exit, pid: int) -> Exit:
        """`exit`, with the reason of a SIGKILL that the kernel sent for want of memory. Slow: not before a restart."""
        if exit.signal == signal.SIGKILL and self._out_of_memory.killed(pid):
            return replace(exit, reason=f"{exit.reason}: the kernel was out of memory")
        return exit

    # --- logs -------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What is wrong with the output of processes now."""
        found = [f"a mistake in the log thread: {self._logs.trouble}"] if self._logs.trouble else []
        found += self.sockets.problems()
        now = self._loop.time()
        found += [f"{path} is not written: is its disk stuck?" for path in self._logs.stuck(STUCK_SECONDS)]
        for child, pending in self._waiting.items():
            if pending.problem and now - pending.since > STUCK_SECONDS:
                found.append(f"{child}: {pending.problem} after {now - pending.since:.0f} s: is its disk stuck?")
        for process in self._places.everyone():
            errors = [self._logs.counters(name).error for name in self._holdings.captured(process.program)]
            found += [f"{process.name}: its output is not written: {error}" for error in errors if error]
        return found

    def output(self, program: Program) -> dict[str, Any] | None:
        """Bytes read, written and dropped of all its output, and what is wrong with it now."""
        streams = list(self._counted(program).values())
        if not streams:
            return None
        sums = {key: sum(getattr(each, key) for each in streams) for key in ("read", "written", "dropped")}
        return sums | {"error": next((each.error for each in streams if each.error), "")}

    def _counted(self, program: Program) -> dict[str, Counters]:
        """By stream, also what came through pipes that are gone."""
        gone = self._gone()
        return {
            stream: interim.add(gone.get(f"{program.name}/{stream}", Counters()), self._logs.counters(name))
            for name in self._holdings.captured(program)
            for stream in (name.rpartition("/")[2],)
        }

    def log_counters(self, program: Program) -> list[dict[str, Any]]:
        """Bytes read, written and dropped of each output."""
        paths = {source.key: source.path for source in launch.log_sources(program)}
        return [
            {"stream": stream, "path": paths.get(f"{program.name}/{stream}"), **asdict(counted)}
            for stream, counted in self._counted(program).items()
        ]

    def held_document(self) -> dict[str, Any]:
        """What is held, for the state file."""
        return self._holdings.document()

    def counters_document(self, programs: Sequence[Program]) -> dict[str, dict[str, Any]]:
        """All counters, for the state file."""
        names = {name for program in programs for name in self._holdings.captured(program)}
        past = {PAST + key: counted.document() for key, counted in self._gone().items()}
        return {name: self._logs.counters(name).document() for name in sorted(names)} | past

    async def last_traceback(self, program: Program) -> Info | None:
        """The last traceback that it has printed, once its output is written; None where there is none, or the disk
        does not tell within TRACEBACK_SECONDS."""
        path = program.log.error_path if program.log.stderr == "separate" else program.log.path
        try:
            async with asyncio.timeout(TRACEBACK_SECONDS):
                await self.written([program])
                look = functools.partial(printed.last_traceback, program, self.recent(program))
                return await self._slow.run(disks.of(path), look)
        except (TimeoutError, ProcmanError) as error:
            log.warning("%s: its last traceback can't be read: %s", program.name, error or "is its disk stuck?")
            return None

    def recent(self, program: Program) -> list[bytes]:
        """The end of what this supervisor took of each of its streams, where no file has it (for `printed`)."""
        if program.log.mode == "file":
            return []
        return [self._logs.recent(key) for key in self._holdings.captured(program)]

    def log_begins(self, key: str) -> tuple[str, Position] | None:
        """Where the output of a log (LogSource.key) goes now, and from which place on; None where that is not known."""
        name, _, stream = key.rpartition("/")
        process = self._places.current.get(name)
        captured = () if process is None else self._holdings.captured(process.program)
        begun = next((self._logs.begun(each) for each in captured if each.rpartition("/")[2] == stream), None)
        return None if begun is None else (begun.path, Position(begun.device, begun.inode, begun.size))

    def watch_logs(self, keys: Sequence[str], callback: Callable[[], None]) -> Callable[[], None]:
        """See `methods.Operations`."""
        paths = [path for key in keys if (path := self._log_path(key))]
        for path in paths:
            self._watching.setdefault(path, []).append(callback)
            self._logs.watch(path)

        def end() -> None:
            for path in paths:
                self._watching[path].remove(callback)

        return end

    def news(self, path: str) -> None:
        """The log file at `path` has grown."""
        callbacks = self._watching.get(path)
        if callbacks:
            self._logs.watch(path)
            for callback in list(callbacks):
                callback()

    def reopen_logs(self) -> asyncio.Event:
        """Close and open every log file, the daemon's own too. What is returned is set when nothing is written to the
        old ones any more."""
        self.on_reopen()
        reopened = asyncio.Event()

        def done() -> None:  # in a log thread
            self._loop.call_soon_threadsafe(reopened.set)

        # After it: stdout is where the daemon's own log is now.
        self._logs.reopen(stdout_fd=1, stderr_fd=2, done=done)
        return reopened

    async def logs_reopened(self) -> None:
        """`reopen_logs`, and wait for it. Raises Failed when a disk keeps it for longer than PAUSE_SECONDS."""
        reopened = self.reopen_logs()
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await reopened.wait()
        except TimeoutError:
            stuck = ", ".join(self._logs.stuck(0)) or "a log"
            raise Failed(f"{stuck} is not opened again yet: is its disk stuck?") from None

    async def pause_logs(self) -> bool:
        """Let the output of programs wait in its pipes until `resume_logs`. False if the log thread does not come to
        rest within PAUSE_SECONDS: then it goes on."""
        paused = asyncio.Event()

        def done() -> None:  # in the log thread
            self._loop.call_soon_threadsafe(paused.set)

        self._logs.pause(done)
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await paused.wait()
        except TimeoutError:
            self._logs.go_on()
            return False
        return True

    def resume_logs(self) -> None:
        """Go on after `pause_logs`. Somebody else may have rotated the files meanwhile."""
        self._logs.go_on()

    def _log_path(self, key: str) -> str:
        name, _, stream = key.rpartition("/")
        process = self._places.current.get(name)
        sources = [] if process is None else launch.log_sources(process.program)
        return next((source.path for source in sources if source.stream == stream), "")


def _accepted_by(
    clients: Sequence[TransportSocket], mains: Mapping[str, int], looked: Counter[int]
) -> list[str | None]:
    """By which of `mains` each of these connections was accepted, "" for one that can't be known, None while nobody
    has."""
    inodes = queues.acceptors(clients)
    keys = resources.holders({*inodes} - {0}, mains)
    # In accept(2) the kernel knows the socket a moment before it has a descriptor: nobody has it yet, for some looks.
    looked.update(inode for inode in inodes if inode and inode not in keys)
    return [keys.get(inode, None if looked[inode] < HOLDER_LOOKS else "") if inode else None for inode in inodes]


def _read_regular(path: str) -> str:
    """The text of a file that may be anybody's. Raises OSError, also for what would make us wait (a FIFO, a device) or
    eat memory, and ValueError for what is no UTF-8."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = file.read(ENV_FILE_MAX + 1)
    if len(content) > ENV_FILE_MAX:
        raise OSError(errno.EFBIG, f"larger than {ENV_FILE_MAX} bytes")
    return content.decode()


def counters_from(document: object) -> dict[str, Counters]:
    """The reverse of `Ground.counters_document`; what makes no sense is left out."""
    found: dict[str, Counters] = {}
    for name, fields in (document if isinstance(document, dict) else {}).items():
        with contextlib.suppress(shape.Misfit):
            found[str(name)] = shape.fit(fields, Counters)
    return found


def _ended(counters: Counters) -> Counters:
    """Those of a pipe that is closed: what its predecessor held then is lost, and nothing has an error any more."""
    return replace(counters, dropped=counters.dropped + counters.held, held=0, unreported=0, error="")

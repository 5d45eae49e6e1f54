"""What processes stand on: it turns "spawn", "signal" and "tell me when it is ready" into work for keeper, sockets
and logs.

It decides nothing: `Process` asks, this does. It is `process.Surroundings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from procman import launch, logread, notify, probes
from procman.config import Config, Listener, Program
from procman.errors import Failed, ProcmanError
from procman.holdings import Holdings, held_name
from procman.keeper.wire import Message
from procman.launch import log_pipes
from procman.lifecycle import Exit, Ready, Status
from procman.link import KeeperLink
from procman.logs import Counters, LogThread
from procman.process import Process
from procman.rpc import LogSource

log = logging.getLogger("procman")

PROBED = frozenset({"http", "tcp", "unix", "command", "gunicorn"})
LINE_MAX = 1024 * 1024
"""Bytes of an unfinished line that a `log` readiness pattern is tried on."""


class Ground:
    """See the module. `environ` is the daemon's own environment."""

    def __init__(self, link: KeeperLink, holdings: Holdings, log_thread: LogThread, environ: Mapping[str, str]) -> None:
        self._link = link
        self._holdings = holdings
        self._logs = log_thread
        self._environ = dict(environ)
        self.on_reopen: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._processes: Mapping[str, Process] = {}
        self._listeners: dict[str, Listener] = {}
        self._on_change: Callable[[Process, Status], None] = lambda process, before: None
        self._runs: dict[str, asyncio.Future[int]] = {}
        self._run_numbers = itertools.count(1)
        self._early: dict[str, list[notify.Message]] = {}
        self._matched: dict[str, asyncio.Event] = {}
        self._watching: dict[str, list[Callable[[], None]]] = {}
        self._oom_kills = _oom_kills()

    def attach(self, on_change: Callable[[Process, Status], None], processes: Mapping[str, Process]) -> None:
        """Tell `on_change` of every change of a process; `processes` are all there are, by name, now and later."""
        self._on_change = on_change
        self._processes = processes

    # --- process.Surroundings ---------------------------------------------------------------------------------------

    def spawn(self, process: Process, generation: int) -> None:
        """See `process.Surroundings`, as for the next three."""
        program = process.program
        self._holdings.control_folder(program)
        listen = {name: self._holdings.listener(self._listeners[name], program.name) for name in program.listen}
        asked = launch.request(program, generation, self._environment(program), listen)
        if program.ready.kind == "log":
            self._listen_for_line(program)  # now: a fast child may say it before the keeper says that it runs
        self._link.spawn(asked)

    def signal(self, child: str, number: int, tree: bool) -> None:
        self._link.signal(child, number, tree)

    def changed(self, process: Process, before: Status) -> None:
        status = process.status
        if status.pid is not None and before.pid is None:
            for message in self._early.pop(process.name, ()):
                self._notified(process, message)
        elif before.pid is not None and status.pid is None:
            for name in {name for name in log_pipes(process.program) if name is not None}:
                self._logs.flush(name)
        self._on_change(process, before)

    def watch_ready(
        self, process: Process, ready: Callable[[], None], report: Callable[[str], None]
    ) -> Coroutine[Any, Any, None] | None:
        wanted = process.program.ready
        if wanted.kind in PROBED:
            return self._probe(process, ready, report)
        if wanted.kind == "log":
            report(f"no line of its output matches {wanted.pattern!r} yet")
            seen = self._matched.get(process.name)  # None: its child was started by a supervisor that died
            return self._watch_output(process.program, seen or self._listen_for_line(process.program), ready)
        if wanted.kind == "notify":
            report("READY=1 has not arrived")
        return None

    async def _probe(self, process: Process, ready: Callable[[], None], report: Callable[[str], None]) -> None:
        async def run(argv: tuple[str, ...]) -> int:
            return await self._run(process.program, argv)

        await probes.wait_ready(process.program.ready, run, report)
        ready()

    def _listen_for_line(self, program: Program) -> asyncio.Event:
        """From now on look for the line that means "ready" in all that comes out of the program's pipes."""
        pattern = re.compile(program.ready.pattern.encode())
        seen = self._matched[program.name] = asyncio.Event()
        rest = b""

        def look(chunk: bytes) -> None:  # in the log thread
            nonlocal rest
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-LINE_MAX:]
            if any(pattern.search(line) for line in (*lines, rest)):
                self._loop.call_soon_threadsafe(seen.set)

        for key in {name for name in log_pipes(program) if name is not None}:
            self._logs.tap(key, look)
        return seen

    async def _watch_output(self, program: Program, seen: asyncio.Event, ready: Callable[[], None]) -> None:
        try:
            await seen.wait()
        finally:
            if self._matched.get(program.name) is seen:
                del self._matched[program.name]
                for key in {name for name in log_pipes(program) if name is not None}:
                    with contextlib.suppress(KeyError):
                        self._logs.tap(key, None)
        ready()

    # --- before a child ---------------------------------------------------------------------------------------------

    def prepare(self, program: Program, config: Config) -> None:
        """Open what `program` needs, or find it open. What can't be opened is said, and tried again at each start."""
        self._listeners = {listener.name: listener for listener in config.listeners}
        for name in program.listen:
            try:
                self._holdings.listener(self._listeners[name], program.name)
            except ProcmanError as error:
                log.error("%s: %s", program.name, error)
        self._holdings.open_logs(program)
        if program.notify:
            try:
                self._open_notify(program)
            except ProcmanError as error:
                log.error("%s: %s", program.name, error)

    def unprepare(self, program: Program) -> None:
        """`program` has gone from the table."""
        self._holdings.close_logs(program)
        self._holdings.remove_control_folder(program)
        socket = self._holdings.notify_sockets.get(program.name)
        if socket is not None:
            self._loop.remove_reader(socket.fileno())
            self._holdings.close_notify_socket(program.name)

    def close(self) -> None:
        """The daemon ends: nothing may stay behind in its runtime folder."""
        for process in self._processes.values():
            self._holdings.remove_control_folder(process.program)
        self._holdings.remove_files()

    def close_unused(self, config: Config) -> None:
        """Close the listening sockets that `config` no longer has, or has otherwise."""
        self._listeners = {listener.name: listener for listener in config.listeners}
        keep = {listener.name: listener for listener in config.listeners}
        names = {
            held_name(keep[name], program.name): keep[name] for program in config.programs for name in program.listen
        }
        plain = {held_name(listener, ""): listener for listener in config.listeners if not listener.reuse_port}
        self._holdings.close_listeners(names | plain)

    def change_logs(self, program: Program) -> None:
        """The output of `program` goes where its table says now."""
        out, err = log_pipes(program)
        for key, path in ((out, program.log.path), (err, program.log.error_path if err != out else program.log.path)):
            if key is not None:
                self._logs.change(key, program.log, path)

    def _environment(self, program: Program) -> dict[str, str]:
        from_files: dict[str, str] = {}
        for path in program.env_files:
            try:
                with open(path, encoding="utf-8") as file:
                    from_files |= launch.parse_env_file(file.read())
            except OSError as error:
                raise Failed(f"can't start: env_file {path}: {error.strerror}") from error
            except ValueError as error:
                raise Failed(f"can't start: env_file {path}: {error}") from error
        address = ""
        if program.notify:
            address = self._open_notify(program)
        beside = os.path.dirname(sys.executable)
        return launch.environment(program, self._environ, from_files, address, servers_folder=beside)

    # --- READY=1 ----------------------------------------------------------------------------------------------------

    def _open_notify(self, program: Program) -> str:
        known = program.name in self._holdings.notify_sockets
        socket = self._holdings.notify_socket(program)
        if not known:
            self._loop.add_reader(socket.fileno(), self._notify_readable, socket, program.name)
        return socket.path

    def _notify_readable(self, socket: notify.NotifySocket, name: str) -> None:
        message = socket.receive()
        process = self._processes.get(name)
        if message is None or process is None or not process.status.alive:
            return
        if process.status.pid is None:  # faster than the keeper's report that it runs
            self._early.setdefault(name, []).append(message)
        else:
            self._notified(process, message)

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

    async def _run(self, program: Program, argv: tuple[str, ...]) -> int:
        """Run a probe's command as the program would run; its exit status, 127 when it can't start."""
        child = f"{program.name}/probe#{next(self._run_numbers)}-{os.getpid()}"
        quiet = replace(program, argv=argv, log=replace(program.log, mode="discard"))
        asked = launch.request(quiet, 0, self._environment(program), {})
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
        op = message["op"]
        if op in ("exited", "failed"):
            if not future.done():
                future.set_result(127 if op == "failed" else os.waitstatus_to_exitcode(int(message["status"])))
            if message.get("left"):
                self._link.signal(child, signal.SIGKILL, tree=True)
            del self._runs[child]
            self._link.forget(child)
        return True

    # --- exits ------------------------------------------------------------------------------------------------------

    def explain(self, exit: Exit) -> Exit:
        """`exit`, with the hint that the kernel killed something for want of memory meanwhile. Slow: not before a
        restart."""
        if exit.signal != signal.SIGKILL:
            return exit
        before, self._oom_kills = self._oom_kills, _oom_kills()
        if self._oom_kills == before:
            return exit
        return replace(exit, reason=f"{exit.reason}; the kernel's out-of-memory killer was at work")

    # --- logs -------------------------------------------------------------------------------------------------------

    def log_sources(self, program: Program) -> list[LogSource]:
        """The log files of `program`."""
        if program.log.mode != "file":
            return []
        sources = [LogSource(program.name, "out", program.log.path, program.log.keep)]
        if program.log.stderr == "separate":
            sources.append(LogSource(program.name, "err", program.log.error_path, program.log.keep))
        return sources

    def log_counters(self, program: Program) -> list[dict[str, Any]]:
        """Bytes read, written and dropped of each output."""
        paths = {source.key: source.path for source in self.log_sources(program)}
        found = []
        for name in dict.fromkeys(name for name in log_pipes(program) if name is not None):
            stream = name.rpartition("/")[2]
            path = paths.get(f"{program.name}/{stream}")
            found.append({"stream": stream, "path": path, **asdict(self._logs.counters(name))})
        return found

    def counters_document(self, programs: Sequence[Program]) -> dict[str, dict[str, Any]]:
        """All counters, for the state file."""
        names = {name for program in programs for name in log_pipes(program) if name is not None}
        found: dict[str, dict[str, Any]] = {}
        for name in sorted(names):
            with contextlib.suppress(KeyError):  # of a program that is being added or removed
                found[name] = asdict(self._logs.counters(name))
        return found

    def last_output(self, program: Program, lines: int) -> list[str]:
        """The last lines of its output; standard error's where they are apart."""
        sources = self.log_sources(program)
        if not sources:
            return []
        source = sources[-1]
        data, _ = logread.tail(source.path, lines, source.keep)
        return data.decode(errors="replace").splitlines()[-lines:]

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

    def reopen_logs(self) -> None:
        """Close and open every log file, the daemon's own too."""
        self._logs.reopen()
        self.on_reopen()

    def _log_path(self, key: str) -> str:
        name, _, stream = key.rpartition("/")
        process = self._processes.get(name)
        sources = [] if process is None else self.log_sources(process.program)
        return next((source.path for source in sources if source.stream == stream), "")

    # --- looking ----------------------------------------------------------------------------------------------------

    def tree(self, pid: int | None) -> list[dict[str, Any]]:
        """Every process of the tree below and with `pid`: pid, command line, memory in bytes (RSS)."""
        if pid is None:
            return []
        import psutil

        found = []
        try:
            main = psutil.Process(pid)
            processes = [main, *main.children(recursive=True)]
        except psutil.Error:
            return []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline()) or process.name()
                found.append({"pid": process.pid, "command": command, "memory_bytes": process.memory_info().rss})
        return found


def counters_from(document: object) -> dict[str, Counters]:
    """The reverse of `Ground.counters_document`; what makes no sense is left out."""
    found: dict[str, Counters] = {}
    for name, fields in (document if isinstance(document, dict) else {}).items():
        with contextlib.suppress(TypeError):
            found[str(name)] = Counters(**fields)
    return found


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot (proc(5), /proc/vmstat)."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0

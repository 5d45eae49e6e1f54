"""The keeper's loop: spawn, reap, signal, hold, and bring the supervisor back. No table, no policy, no parsing.

It is the parent of every program, so it is the one process that must not fail: it does little, asks nobody, and never
waits for the supervisor. While there is none, what happens is kept, and told to the next one as a snapshot.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json import loads
from typing import Any, NoReturn

from procman.keeper import spawn, tree
from procman.keeper.wire import Message, Wire, WireError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})

MISSED_PINGS = 4
"""Pings in a row without an answer after which the supervisor counts as hung."""

RETRY_SECONDS, RETRY_SECONDS_MAX = 0.1, 10.0
"""Delay before a supervisor that never became ready is started again; it doubles up to the second."""

LAST_RESORT_SECONDS = 10.0
"""procmand was told to end, and there is no supervisor that could see to it: how long the keeper waits before it sends
SIGTERM to all programs itself, and then SIGKILL."""


@dataclass(slots=True, eq=False)
class Child:
    """One child, from the request until the supervisor forgets it."""

    id: str
    tag: int
    kill_tree: bool
    pid: int
    report: int
    cgroup: str
    at: float
    state: str = "starting"
    left: bool = False
    session: int = -1
    forgotten: bool = False
    end: Message = field(default_factory=dict)

    def family(self, pid: int) -> tree.Family:
        """What to look for when its tree is meant; `pid` 0 when the child itself is not."""
        return tree.Family(self.tag, pid, self.session, self.cgroup)

    def record(self) -> Message:
        """How the snapshot shows it."""
        shown: Message = {"op": "child", "child": self.id, "state": self.state, "pid": self.pid, "at": self.at}
        return shown | {"left": self.left} | {key: value for key, value in self.end.items() if key != "op"}


class Keeper:
    """See `run`."""

    def __init__(
        self, command: Sequence[str], heartbeat: float, on_ready: Callable[[], None], use_cgroup: bool
    ) -> None:
        self.command = list(command)
        self.heartbeat = heartbeat
        self.on_ready = on_ready
        self.selector = selectors.DefaultSelector()
        self.children: dict[str, Child] = {}
        self.held: dict[str, int] = {}
        self.pending_signals: list[int] = []
        self.cgroup_root = tree.make_cgroup_root() if use_cgroup else ""
        self.tag = 0
        self.notify_address = os.environ.pop("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog_seconds()
        self.exit_status: int | None = None
        # The supervisor
        self.wire: Wire | None = None
        self.supervisor_pid = 0
        self.supervisor_since = 0.0
        self.ready = False
        self.was_ready = False
        self.starts = 0
        self.failures = 0
        self.last = ""
        self.missed = 0
        # Deadlines on CLOCK_MONOTONIC, by what is due
        self.due: dict[str, float] = {}
        self.actions: dict[str, Callable[[], None]] = {
            "supervisor": self._start_supervisor,
            "ping": self._ping,
            "watchdog": self._watchdog,
            "terminate": self._terminate_all,
            "kill": self._kill_all,
        }

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the supervisor asks for the end, or can't be started at all. Returns the exit status."""
        self._set_up()
        self._start_supervisor()
        while self.exit_status is None:
            timeout = max(0.0, min(self.due.values()) - time.monotonic()) if self.due else None
            for key, events in self.selector.select(timeout):
                key.data(events)
            now = time.monotonic()
            for name in [name for name, at in self.due.items() if at <= now]:
                del self.due[name]
                self.actions[name]()
        self._end()
        return self.exit_status

    def _set_up(self) -> None:
        spawn.prctl(spawn.PR_SET_CHILD_SUBREAPER, 1)
        for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)
        spawn.raise_open_files()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._woken)
        if self.watchdog:
            self.due["watchdog"] = time.monotonic()

    def _woken(self, events: int) -> None:
        numbers = os.read(self.wake_read, 4096)
        for number in dict.fromkeys(numbers):
            if number in FORWARDED:
                self._forward(number)
        self._reap()

    def _forward(self, number: int) -> None:
        if self.ready:
            self._tell({"op": "signal", "signal": number})
        if number in ENDING or not self.ready:
            self.pending_signals.append(number)  # the end is asked for until it comes, whoever dies on the way
        if number in ENDING and not self.ready:
            self.due.setdefault("terminate", time.monotonic() + LAST_RESORT_SECONDS)

    def _terminate_all(self) -> None:
        for child in self.children.values():
            self._signal(child, signal.SIGTERM, whole_tree=False)
        self.due["kill"] = time.monotonic() + LAST_RESORT_SECONDS

    def _kill_all(self) -> None:
        self.exit_status = 1

    def _end(self) -> None:
        """Leave nothing behind: what still lives is killed."""
        self._notify("STOPPING=1")
        for child in self.children.values():
            if child.state != "exited" or child.left:
                self._signal(child, signal.SIGKILL, whole_tree=True)
        self._drop_wire()
        deadline = time.monotonic() + 5
        while self._alive() and time.monotonic() < deadline:
            self.selector.select(0.05)  # SIGCHLD ends the wait
            self._drain_wakeups()
            self._reap()
        if self.supervisor_pid:
            os.kill(self.supervisor_pid, signal.SIGKILL)
            os.waitpid(self.supervisor_pid, 0)
        tree.remove_cgroup(self.cgroup_root)

    def _alive(self) -> bool:
        return bool(self.supervisor_pid) or any(c.state != "exited" or c.left for c in self.children.values())

    def _drain_wakeups(self) -> None:
        try:
            os.read(self.wake_read, 4096)
        except BlockingIOError:
            pass

    # --- the supervisor -----------------------------------------------------------------------------------------------

    def _start_supervisor(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def become(report: int) -> NoReturn:
            try:
                spawn.become_supervisor(self.command, theirs.fileno())
            except BaseException as error:
                spawn.fail(report, "exec", getattr(error, "errno", None) or 0, str(error))
            os._exit(127)

        try:
            pid, report = spawn.fork_child(become)
        except OSError as error:
            ours.close()
            theirs.close()
            self.last = f"fork: {error.strerror}"
            self._retry_supervisor(time.monotonic())
            return
        os.close(report)
        theirs.close()
        self.starts += 1
        self.supervisor_pid, self.supervisor_since = pid, time.monotonic()
        self.ready, self.missed = False, 0
        self.wire = Wire(ours)
        self.selector.register(ours.fileno(), selectors.EVENT_READ, self._wire_event)
        self._snapshot()
        self.due["ping"] = time.monotonic() + self.heartbeat

    def _snapshot(self) -> None:
        hello = {"op": "hello", "pid": os.getpid(), "starts": self.starts, "last": self.last, "cgroup": self.cgroup_root}
        self._tell(hello | {"signals": self.pending_signals})
        for child in self.children.values():
            self._tell(child.record())
        for name, fd in self.held.items():
            self._tell({"op": "held", "name": name}, [fd])
        self._tell({"op": "begin"})

    def _supervisor_ended(self, status: int) -> None:
        now = time.monotonic()
        self.last = describe(status)
        self.supervisor_pid = 0
        self.due.pop("ping", None)
        self._drop_wire()
        if self.exit_status is not None:
            return
        if not self.was_ready and not self.children:
            # The first start failed (a bad table, a lock that is held): it has said why. Nobody needs us.
            self.exit_status = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
            return
        if self.ready and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.failures = 0
        print(f"procmand: the supervisor has ended ({self.last}); starting another one", file=sys.stderr, flush=True)
        self.ready = False
        self._retry_supervisor(now)

    def _retry_supervisor(self, now: float) -> None:
        delay = 0.0 if not self.failures else min(RETRY_SECONDS * 2 ** (self.failures - 1), RETRY_SECONDS_MAX)
        self.failures = min(self.failures + 1, 20)
        self.due["supervisor"] = now + delay

    def _drop_wire(self) -> None:
        if self.wire is not None:
            self.selector.unregister(self.wire.fileno())
            self.wire.close()
            self.wire = None

    def _ping(self) -> None:
        if self.missed >= MISSED_PINGS and self.supervisor_pid:
            print("procmand: the supervisor does not answer; replacing it", file=sys.stderr, flush=True)
            os.kill(self.supervisor_pid, signal.SIGKILL)
            return
        self.missed += 1
        self._tell({"op": "ping"})
        self.due["ping"] = time.monotonic() + self.heartbeat

    def _tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        if self.wire is None:
            return
        try:
            self.wire.send(message, descriptors)
            self._watch_wire()
        except WireError:
            self._lost_wire()

    def _watch_wire(self) -> None:
        if self.wire is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.wire.waiting else 0)
            self.selector.modify(self.wire.fileno(), events, self._wire_event)

    def _lost_wire(self) -> None:
        """It closed its end, or talks nonsense: it is of no use any more. Its end is reported by SIGCHLD."""
        self._drop_wire()
        if self.supervisor_pid:
            os.kill(self.supervisor_pid, signal.SIGKILL)

    def _wire_event(self, events: int) -> None:
        if self.wire is None:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self.wire.flush()
            messages = self.wire.receive() if events & selectors.EVENT_READ else []
            self._watch_wire()
        except WireError:
            # It may be on its way out in good order: then its end says more than a signal of ours.
            self._drop_wire()
            return
        for message, descriptors in messages:
            self._obey(message, descriptors)

    def _obey(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case {"op": "spawn", "child": str(name)}:
                self._spawn(name, message)
            case {"op": "signal", "child": str(name), "signal": int(number)}:
                if (child := self.children.get(name)) is not None:
                    self._signal(child, number, whole_tree=bool(message.get("tree")))
            case {"op": "forget", "child": str(name)}:
                self._forget(name)
            case {"op": "hold", "name": str(name)} if descriptors:
                self._release(name)
                self.held[name] = descriptors.pop()
            case {"op": "release", "name": str(name)}:
                self._release(name)
            case {"op": "sync", "number": int(number)}:
                self._tell({"op": "synced", "number": number})
            case {"op": "ready"}:
                self._supervisor_ready()
            case {"op": "notify", "state": str(state)}:
                self._notify(state)
            case {"op": "log"} if descriptors:
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[0], 2)
            case {"op": "pong"}:
                self.missed = 0
            case {"op": "exit", "status": int(status)}:
                self.exit_status = status
        for fd in descriptors:
            os.close(fd)

    def _supervisor_ready(self) -> None:
        self.ready = True
        self.failures = 0 if time.monotonic() - self.supervisor_since > 60 else self.failures
        self.due.pop("terminate", None)
        self.pending_signals = [number for number in self.pending_signals if number in ENDING]
        if not self.was_ready:
            self.was_ready = True
            self.on_ready()

    def _release(self, name: str) -> None:
        if (fd := self.held.pop(name, None)) is not None:
            os.close(fd)

    # --- children -------------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, request: Message) -> None:
        if name in self.children:
            return  # asked again by a successor that did not know: there it is
        cgroup = tree.make_cgroup(self.cgroup_root, name) if self.cgroup_root else ""
        environment = dict(request["env"]) | {tree.MARKER: name}
        self.tag += 1
        asked: Mapping[str, Any] = request | {"env": environment, "rss": tree.TAG_BASE + self.tag}
        try:
            pid, report = spawn.fork_child(lambda report: spawn.become(asked, self.held, cgroup, report))
        except OSError as error:
            tree.remove_cgroup(cgroup)
            failed = {"step": "fork", "errno": error.errno, "message": error.strerror}
            end = {"op": "failed", "child": name, **failed}
            child = Child(name, self.tag, True, 0, -1, "", time.time(), state="exited", end=end)
            self.children[name] = child
            self._tell(child.end)
            return
        kill_tree = request.get("kill") != "main"
        child = Child(name, self.tag, kill_tree, pid, report, cgroup, time.time(), session=pid)
        self.children[name] = child
        self.selector.register(report, selectors.EVENT_READ, lambda events: self._reported(child))

    def _reported(self, child: Child) -> bool:
        """Exec has happened, or failed. Returns True when the child runs, or ran."""
        if child.report < 0:
            return child.state == "running"  # `_reap` was faster
        text = os.read(child.report, 4096)
        self.selector.unregister(child.report)
        os.close(child.report)
        child.report = -1
        if not text:
            child.state = "running"
            self._tell({"op": "spawned", "child": child.id, "pid": child.pid, "at": child.at})
            return True
        child.end = {"op": "failed", "child": child.id, **loads(text)}
        return False

    def _reap(self) -> None:
        """Take note of every child that has ended, programs and orphans alike."""
        strangers = False
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if info is None:
                break
            child = next((c for c in self.children.values() if c.pid == info.si_pid and c.state != "exited"), None)
            if child is not None:
                self._child_ended(child)
                continue
            _, status, _ = os.wait4(info.si_pid, 0)
            if info.si_pid == self.supervisor_pid:
                self._supervisor_ended(status)
            else:
                strangers = True
        if strangers:
            for child in [child for child in self.children.values() if child.left]:
                self._check_gone(child)

    def _child_ended(self, child: Child) -> None:
        if child.report >= 0:
            self._reported(child)
        # Look for what it leaves while its pid can't be given to another process: it is not reaped yet.
        left = tree.members(child.family(0), self._known()) if child.kill_tree else []
        child.left = bool(left)
        if not any(process.session == child.session for process in left):
            child.session = -1
        _, status, usage = os.wait4(child.pid, 0)
        child.state = "exited"
        if not child.end:
            used = {"user": usage.ru_utime, "system": usage.ru_stime, "max_rss_kb": usage.ru_maxrss}
            child.end = {"op": "exited", "child": child.id, "status": status, "ended_at": time.time(), "rusage": used}
        self._tell(child.end | {"left": child.left})
        if not child.left:
            tree.remove_cgroup(child.cgroup)

    def _check_gone(self, child: Child) -> None:
        if tree.members(child.family(0), self._known()):
            return
        child.left = False
        tree.remove_cgroup(child.cgroup)
        self._tell({"op": "gone", "child": child.id})
        if child.forgotten:
            del self.children[child.id]

    def _signal(self, child: Child, number: int, whole_tree: bool) -> None:
        alive = child.state != "exited"
        if whole_tree and child.kill_tree:
            tree.send(child.family(child.pid if alive else 0), self._known(), number)
            if child.left:
                self._check_gone(child)
        elif alive:
            os.kill(child.pid, number)  # not reaped yet, so the pid is still this child's

    def _forget(self, name: str) -> None:
        child = self.children.get(name)
        if child is None or child.state != "exited":
            return
        if child.left:
            child.forgotten = True
        else:
            del self.children[name]

    def _known(self) -> list[int]:
        return [self.supervisor_pid, *(child.pid for child in self.children.values() if child.state != "exited")]

    # --- the service manager ----------------------------------------------------------------------------------------------

    def _notify(self, state: str) -> None:
        """sd_notify(3): best effort, as there."""
        if not self.notify_address:
            return
        address = "\0" + self.notify_address[1:] if self.notify_address.startswith("@") else self.notify_address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(state.encode(), address)
            except OSError:
                pass

    def _watchdog(self) -> None:
        """The keeper is what the service manager watches: it watches the supervisor itself, and replaces it."""
        self._notify("WATCHDOG=1")
        self.due["watchdog"] = time.monotonic() + self.watchdog / 2


def _watchdog_seconds() -> float:
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6


def describe(status: int) -> str:
    """A wait status in words: "exit status 3", "killed by SIGKILL"."""
    if os.WIFSIGNALED(status):
        try:
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        except ValueError:
            return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"


def run(
    command: Sequence[str],
    *,
    heartbeat: float = 5.0,
    on_ready: Callable[[], None] = lambda: None,
    use_cgroup: bool = True,
) -> int:
    """Be the keeper: start `command` as the supervisor (its last argument becomes the descriptor of the wire), bring it back
    whenever it dies, and return the exit status when all is over. `on_ready` is called once, when the supervisor first
    says that the table runs. `heartbeat` is in seconds. Without `use_cgroup` descendants are found by other means only."""
    return Keeper(command, heartbeat, on_ready, use_cgroup).run()

"""The keeper's loop: do what the supervisor asks, tell it what happens, and bring it back when it dies.

It is the parent of every program, so it is the one process that must not fail: it does little, asks nobody, knows no
table and no policy, and never waits for the supervisor. While there is none, what happens is kept, and told to the next
one as a snapshot. Nothing that a supervisor says or a child does ends it: what went wrong is said on stderr, and the
loop goes on.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from procman import __version__
from procman.keeper import asked, handover, spawn, tree
from procman.keeper.children import Children
from procman.keeper.say import describe, say
from procman.keeper.service import ALIVE, Service
from procman.keeper.supervisor import Supervisor
from procman.keeper.upgrade import Upgrade
from procman.keeper.wire import Message

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})

MISSED_PINGS = 4
"""Pings in a row without an answer after which the supervisor counts as hung."""

RETRY_SECONDS, RETRY_SECONDS_MAX = 0.1, 10.0
"""Delay before a supervisor that failed again is started again; it doubles up to the second."""

STEADY_SECONDS = 60.0
"""A supervisor that was ready and has lived this long is no failed one, whatever ends it."""

LAST_RESORT_SECONDS = 10.0
"""procmand was told to end, and there is no supervisor that could see to it: how long the keeper waits before it sends
SIGTERM to all programs itself, and then SIGKILL."""

TABLES = ("table", "first table")
"""Held for the supervisors; the check of an upgrade reads them."""
SERVICE_SECONDS = 0.1
"""What the service manager does not take at once is offered again after this time."""

AGAIN_SECONDS = 1.0
"""What the keeper itself failed to do is tried again after this time."""


class Commands(NamedTuple):
    """What the keeper executes, each with the number of a descriptor as one more argument: the supervisor (its end of
    the wire), and for an upgrade the check of the new code and the keeper's own next self (`handover`)."""

    supervisor: Sequence[str]
    check: Sequence[str]
    keeper: Sequence[str]


class Keeper:
    """See `run`."""

    def __init__(self, commands: Commands, heartbeat: float, on_ready: Callable[[], None], cgroup_root: str) -> None:
        self.commands = commands
        self.heartbeat = heartbeat
        self.on_ready = on_ready
        self.selector = selectors.DefaultSelector()
        self.cgroup_root = cgroup_root
        self.children = Children(self.selector, self._tell, self._own_pids, self.cgroup_root)
        self.pending_signals: list[int] = []
        self.service = Service(lambda: self.due.setdefault("service", time.monotonic() + SERVICE_SECONDS))
        self.held: dict[str, int] = self.service.take_stored()
        self.identity = os.urandom(8).hex()
        self.exit_status: int | None = None
        # The supervisor
        self.supervisor: Supervisor | None = None
        self.upgrade: Upgrade | None = None
        self.upgrades = 0
        self.was_ready = False
        self.starts = 0
        self.failures = 0
        self.last = ""
        # Deadlines on CLOCK_MONOTONIC, by what is due
        self.due: dict[str, float] = {}
        self.actions: dict[str, Callable[[], None]] = {
            "supervisor": self._start_supervisor,
            "ping": self._ping,
            "upgrade": self._upgrade_due,
            "watchdog": self._watchdog,
            "terminate": self._terminate_all,
            "kill": self._kill_all,
            "reap": self._reap,
            "service": self.service.flush,
        }

    def _own_pids(self) -> list[int]:
        supervisor = [self.supervisor.pid] if self.supervisor is not None else []
        return supervisor if self.upgrade is None else [*supervisor, *self.upgrade.pids()]

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, document: handover.Document | None) -> int:
        """Run until the supervisor asks for the end, or can't be started at all. Returns the exit status. `document` is
        what an earlier self handed over."""
        if document is None:
            spawn.raise_open_files()
        else:
            spawn.OPEN_FILES = tuple(document["open_files"])
        self._set_up()
        if document is None:
            self._start_supervisor()
        else:
            self._resume(document)
        while self.exit_status is None:
            timeout = max(0.0, min(self.due.values()) - time.monotonic()) if self.due else None
            for key, events in self.selector.select(timeout):
                self._safely("reap", key.data, events)
            now = time.monotonic()
            for name in [name for name, at in self.due.items() if at <= now]:
                if self.due.pop(name, None) is not None:  # one action may call off another
                    self._safely(name, self.actions[name])
        self._end()
        return self.exit_status

    def _safely(self, again: str, action: Callable[..., None], *arguments: object) -> None:
        """Whatever goes wrong in `action`, the keeper lives: it is said, and the action `again` comes a bit later."""
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - the programs must not pay for a mistake here
            say(f"{type(error).__name__}: {error} (a bug in procman; the programs go on)")
            self.due.setdefault(again, time.monotonic() + AGAIN_SECONDS)

    def _set_up(self) -> None:
        spawn.prctl(spawn.PR_SET_CHILD_SUBREAPER, 1)
        spawn.clear_tag(tree.TAG_BASE)
        spawn.close_on_exec()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._woken)
        if self.service.watchdog:
            self.due["watchdog"] = time.monotonic()

    def _woken(self, events: int) -> None:
        for number in self._wakeups():
            if number in FORWARDED:
                self._forward(number)
        self._reap()

    def _wakeups(self) -> list[int]:
        """The signals that came, each once."""
        try:
            return list(dict.fromkeys(os.read(self.wake_read, 4096)))
        except BlockingIOError:
            return []

    def _forward(self, number: int) -> None:
        listening = self._listening()
        if listening:
            self._tell({"op": "signal", "signal": number})
        if number not in self.pending_signals:
            self.pending_signals.append(number)  # it is told until it is obeyed, whoever dies on the way
        if self.upgrade is not None and number in ENDING:
            self.upgrade.fail("procmand was told to end")
        elif not listening:
            self._expect_end()

    def _listening(self) -> bool:
        """There is a supervisor that does what it is told, and will still be there to have done it."""
        return self.supervisor is not None and self.supervisor.ready and self.upgrade is None

    def _expect_end(self) -> None:
        """There is no ready supervisor: if the end was asked for, it must come in bounded time all the same."""
        if ENDING.intersection(self.pending_signals) and "kill" not in self.due:
            self.due.setdefault("terminate", time.monotonic() + LAST_RESORT_SECONDS)

    def _terminate_all(self) -> None:
        say("told to end, and no supervisor to see to it: ending all programs")
        self.due["kill"] = time.monotonic() + LAST_RESORT_SECONDS
        self.children.terminate()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if "kill" in self.due and self.children.over:
            self._kill_all()

    def _kill_all(self) -> None:
        self.exit_status = 1

    def _end(self) -> None:
        """Leave nothing behind: what still lives is killed."""
        self.service.notify("STOPPING=1")
        if self.upgrade is not None:
            self.upgrade.call_off()
        if self.supervisor is not None:
            self.supervisor.drop_wire()
        deadline = time.monotonic() + 5
        next_kill = 0.0
        while (self.supervisor is not None or not self.children.over) and time.monotonic() < deadline:
            if time.monotonic() >= next_kill:
                self._safely("reap", self.children.kill)
                next_kill = time.monotonic() + AGAIN_SECONDS
            self._safely("reap", self._reap)
            for key, events in self.selector.select(0.05):  # SIGCHLD ends the wait, and the end of an adopted child
                self._safely("reap", key.data, events)
        if self.supervisor is not None:
            self.supervisor.end()
            self._wait_for_supervisor(self.supervisor.pid)
        for name in self.held:
            self.service.drop(name)
        self.service.finish()
        tree.remove_cgroup(self.cgroup_root)

    def _wait_for_supervisor(self, pid: int) -> None:
        """Not without end: a thread of it may be in a write(2) to a dead disk, which no signal ends."""
        deadline = time.monotonic() + AGAIN_SECONDS
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            self.selector.select(0.05)
            self._wakeups()

    # --- the supervisor ---------------------------------------------------------------------------------------------

    def _start_supervisor(self) -> None:
        try:
            self.supervisor = self._another_supervisor()
        except OSError as error:
            self.last = f"fork: {error.strerror}"
            say(f"can't start a supervisor: {error.strerror}; trying again")
            self._retry_supervisor()
            return
        self.due["ping"] = time.monotonic() + self.heartbeat

    def _another_supervisor(self) -> Supervisor:
        supervisor = Supervisor.start(self.commands.supervisor, self.selector, self._obey_safely)
        self.starts += 1
        supervisor.tell(self._hello())
        for record in self.children.records():
            supervisor.tell(record)
        for name, fd in self.held.items():
            supervisor.tell({"op": "held", "name": name}, [fd])
        supervisor.tell({"op": "begin"})
        return supervisor

    def _hello(self) -> Message:
        hello = {"op": "hello", "pid": os.getpid(), "identity": self.identity, "starts": self.starts, "last": self.last}
        return hello | {"cgroup": self.cgroup_root} | self._version()

    def _version(self) -> Message:
        return {"version": __version__, "upgrades": self.upgrades, "upgrading": self.upgrade is not None}

    def _supervisor_ended(self, supervisor: Supervisor, status: int) -> None:
        self.last = describe(status)
        self.due.pop("ping", None)
        supervisor.hear_last_words()
        self.supervisor = None
        if self.exit_status is not None:
            return
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not supervisor.replaced
        if not self.was_ready and not self.children and not killed:
            # The first start failed (a bad table, a lock that is held): it has said why. Nobody needs us.
            self.exit_status = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
            return
        if killed or (supervisor.ready and time.monotonic() - supervisor.since > STEADY_SECONDS):
            # Somebody else ended it: no failure of its own. Before it was ready, it may be for want of memory.
            self.failures = 0 if supervisor.ready else 1
        say(f"the supervisor has ended ({self.last}); starting another one")
        if self.upgrade is not None:
            self.upgrade.incumbent_ended()
        self._expect_end()
        if self.supervisor is None:
            self._retry_supervisor()

    def _retry_supervisor(self) -> None:
        delay = 0.0 if not self.failures else min(RETRY_SECONDS * 2 ** (self.failures - 1), RETRY_SECONDS_MAX)
        self.failures = min(self.failures + 1, 20)
        self.due["supervisor"] = time.monotonic() + delay

    def _ping(self) -> None:
        if self.supervisor is None:
            return
        self.due["ping"] = time.monotonic() + self.heartbeat
        if self.upgrade is not None and self.upgrade.frozen:
            self.supervisor.missed = 0
            return
        if self.supervisor.missed >= MISSED_PINGS:
            self.supervisor.replace("does not answer")
        self.supervisor.missed += 1
        self.supervisor.tell({"op": "ping"})

    def _tell(self, message: Message) -> None:
        """Tell the supervisor, and one that is on trial as well: whichever goes on must know."""
        if self.supervisor is not None:
            self.supervisor.tell(message)
        if self.upgrade is not None and self.upgrade.successor is not None:
            self.upgrade.successor.tell(message)

    # --- an upgrade: see `upgrade` ----------------------------------------------------------------------------------

    def _begin_upgrade(self, supervisor: Supervisor) -> None:
        problem = "an upgrade is under way" if self.upgrade is not None else ""
        if ENDING.intersection(self.pending_signals):
            problem = "procmand was told to end"
        if not problem:
            tables = [self.held[name] for name in TABLES if name in self.held]
            try:
                document = handover.write(self._document())
                try:
                    self.upgrade = Upgrade(self, self.commands.check, document, tables)
                finally:
                    os.close(document)
            except OSError as error:
                problem = f"can't start the check of the new version: {error.strerror}"
        if problem:
            supervisor.tell({"op": "keeper", "problem": problem} | self._version())

    def start_successor(self) -> Supervisor:
        """See `upgrade.Holder`, as for the next six."""
        self.last = "an upgrade"
        return self._another_supervisor()

    def take_successor(self, successor: Supervisor, forgotten: Sequence[str]) -> None:
        self.supervisor = successor
        for name in forgotten:
            self.children.forget(name)
        self.failures = 0
        self.due["ping"] = time.monotonic() + self.heartbeat

    def tell_children(self) -> None:
        if self.supervisor is not None:
            for record in self.children.records():
                self.supervisor.tell(record)

    def wait_for_upgrade(self, seconds: float) -> None:
        self.due["upgrade"] = time.monotonic() + seconds

    def upgrade_over(self, problem: str) -> None:
        self.upgrade = None
        self.due.pop("upgrade", None)
        self._tell({"op": "keeper", "problem": problem} | self._version())
        self._tell_pending()

    def become_new(self) -> str:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.service.flush()
            self._woken(0)  # what comes after this waits, blocked, for our next self
            if self.supervisor is None or ENDING.intersection(self.pending_signals):
                return "procmand was told to end, or has no supervisor"
            if not self.silent():
                return "there is always something half said to the supervisor"
            wire = self.supervisor.wire_number()
            inherited = [*self.held.values(), *self.children.descriptors(), wire]
            environment = {**os.environ, **self.service.told}
            return handover.become(self.commands.keeper, self._document(), inherited, environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def silent(self) -> bool:
        return self.supervisor is not None and self.supervisor.wire_number() >= 0

    def _upgrade_due(self) -> None:
        if self.upgrade is not None:
            self.upgrade.due()

    def _document(self) -> handover.Document:
        """All that the next self must know."""
        supervisor = self.supervisor
        return {
            "identity": self.identity,
            "cgroup": self.cgroup_root,
            "held": self.held,
            "children": self.children.document(),
            "signals": self.pending_signals,
            "supervisor": supervisor and {"pid": supervisor.pid, "wire": supervisor.wire_number()},
            "starts": self.starts,
            "upgrades": self.upgrades + 1,
            "open_files": spawn.OPEN_FILES,
            "name": spawn.name(),
        }

    def _resume(self, document: handover.Document) -> None:
        """Go on where the keeper before, this same process, has become this code."""
        self.identity = document["identity"]
        self.held = document["held"]
        self.pending_signals = document["signals"]
        self.starts, self.upgrades = document["starts"], document["upgrades"]
        self.was_ready = True
        pid, wire = document["supervisor"]["pid"], document["supervisor"]["wire"]
        self.supervisor = Supervisor(pid, socket.socket(fileno=wire), self.selector, self._obey_safely)
        self.supervisor.ready = True
        self.due["ping"] = time.monotonic() + self.heartbeat
        self._tell({"op": "keeper", "problem": ""} | self._version())
        self.children.resume(document["children"])
        self._tell_pending()
        self._reap()
        say(f"the keeper runs version {__version__} now")

    # --- what a supervisor says -------------------------------------------------------------------------------------

    def _obey_safely(self, supervisor: Supervisor, message: Message, descriptors: list[int]) -> None:
        self._safely("reap", self._obey, supervisor, message, descriptors)

    def _obey(self, supervisor: Supervisor, message: Message, descriptors: list[int]) -> None:
        """Do what one message says. `descriptors` that stay in the list are closed by the caller."""
        if self.upgrade is not None and self.upgrade.heard(supervisor, message):
            return
        if "note" in message and asked.nonsense({"note": message["note"]}):
            say(f"a note makes no sense, and is left out: {_shown(message)}")
            del message["note"]  # what it goes with is done all the same
            if message.get("op") == "note":
                return
        if wrong := asked.nonsense(message):
            say(f"the supervisor asks for something that makes no sense: its {wrong!r} in {_shown(message)}")
            return
        match message:
            case {"op": "spawn", "child": str(name)}:
                self.children.spawn(name, message, self.held)
            case {"op": "signal", "child": str(name), "signal": int(number)}:
                if "note" in message:
                    self.children.note(name, str(message["note"]))
                try:
                    self.children.signal(name, number, whole_tree=bool(message.get("tree")))
                except (OSError, OverflowError) as error:
                    say(f"signal {number} for {name}: {error}")
            case {"op": "house", "house": int(house), "last": int(last)}:
                self.children.belong(house, last)
            case {"op": "adopt", "child": str(name), "tag": int()}:
                self.children.adopt(name, message)
            case {"op": "forget", "child": str(name)}:
                self.children.forget(name)
            case {"op": "note", "child": str(name), "note": str(text)}:
                self.children.note(name, text)
            case {"op": "hold", "names": list(names)} if len(names) == len(descriptors) and self._may_hold():
                for name in map(str, names):
                    self._release(name)
                    self.held[name] = descriptors.pop(0)
                    self.service.store(name, self.held[name])
            case {"op": "hold", "names": list(names)} if len(descriptors) in (0, len(names)):
                say(f"no file descriptor is free to hold {', '.join(map(str, names))}")
                self._tell({"op": "lost", "names": names})
            case {"op": "release", "name": str(name)}:
                self._release(name)
            case {"op": "sync", "number": int(number)}:
                supervisor.tell({"op": "synced", "number": number})
            case {"op": "obeyed", "signal": int(number)}:
                self.pending_signals = [other for other in self.pending_signals if other != number]
            case {"op": "ready"}:
                self._supervisor_ready(supervisor)
            case {"op": "notify", "state": str(state)}:
                self.service.notify(state)
            case {"op": "log"} if descriptors:
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[0], 2)
            case {"op": "pong"}:
                supervisor.missed = 0
            case {"op": "upgrade"}:
                self._begin_upgrade(supervisor)
            case {"op": "exit", "status": int(status)}:
                self.exit_status = status
            case _:
                say(f"the supervisor asks for something unknown: {_shown(message)}")

    def _supervisor_ready(self, supervisor: Supervisor) -> None:
        supervisor.ready = True
        self.due.pop("terminate", None)
        self.due.pop("kill", None)
        self._tell_pending()
        if not self.was_ready:
            self.was_ready = True
            spawn.trim_heap()
            self.on_ready()

    def _tell_pending(self) -> None:
        if self._listening():
            for number in self.pending_signals:
                self._tell({"op": "signal", "signal": number})

    def _may_hold(self) -> bool:
        """Whether a successor, who gets a copy of all that is held, could still be started with what has come now."""
        return spawn.room_for(len(self.held) + spawn.SPARE_TO_HOLD)

    def _release(self, name: str) -> None:
        if (fd := self.held.pop(name, None)) is not None:
            self.service.drop(name)
            os.close(fd)

    # --- ends -------------------------------------------------------------------------------------------------------

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
            if self.children.ended(info.si_pid):
                continue
            _, status, _ = os.wait4(info.si_pid, 0)
            if self.supervisor is not None and info.si_pid == self.supervisor.pid:
                self._supervisor_ended(self.supervisor, status)
            elif self.upgrade is None or not self.upgrade.ended(info.si_pid, status):
                strangers = True
        if strangers:
            self.children.stranger_ended()
        self._end_if_over()

    def _watchdog(self) -> None:
        """The keeper is what the service manager watches: it watches the supervisor itself, and replaces it."""
        self.due["watchdog"] = time.monotonic() + self.service.watchdog / 2
        self.service.notify(ALIVE)


def _shown(message: Message) -> str:
    """The beginning of a message, which may hold anything, for a line on stderr."""
    try:
        return str(message)[:200]
    except (ValueError, RecursionError):  # an int of more than 4,300 digits, arrays in arrays
        return "a message that can't be shown"


def run(
    commands: Commands,
    *,
    heartbeat: float = 5.0,
    on_ready: Callable[[], None] = lambda: None,
    use_cgroup: bool = True,
    handed_over: int = -1,
) -> int:
    """Be the keeper: start the supervisor, bring it back whenever it dies, and return the exit status when all is over.
    `on_ready` is called once, when the supervisor first says that the table runs. `heartbeat` is in seconds. Without
    `use_cgroup` descendants are found by other means only. `handed_over` is the descriptor of what an earlier self in
    this process has left. Raises HandoverError when that can't be understood."""
    if handed_over < 0:
        return Keeper(commands, heartbeat, on_ready, tree.make_cgroup_root() if use_cgroup else "").run(None)
    document = handover.read(handed_over)
    os.close(handed_over)
    spawn.set_name(document["name"])
    return Keeper(commands, heartbeat, on_ready, document["cgroup"]).run(document)

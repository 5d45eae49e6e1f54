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
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from procman.keeper import spawn, tree
from procman.keeper.children import Children
from procman.keeper.service import Service
from procman.keeper.wire import Message, Wire, WireClosed, WireError

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

SERVICE_SECONDS = 0.1
"""What the service manager does not take at once is offered again after this time."""

AGAIN_SECONDS = 1.0
"""What the keeper itself failed to do is tried again after this time."""


class Keeper:
    """See `run`."""

    def __init__(
        self, command: Sequence[str], heartbeat: float, on_ready: Callable[[], None], use_cgroup: bool
    ) -> None:
        self.command = list(command)
        self.heartbeat = heartbeat
        self.on_ready = on_ready
        self.selector = selectors.DefaultSelector()
        self.cgroup_root = tree.make_cgroup_root() if use_cgroup else ""
        self.children = Children(self.selector, self._tell, lambda: self.supervisor_pid, self.cgroup_root)
        self.pending_signals: list[int] = []
        self.service = Service(lambda: self.due.setdefault("service", time.monotonic() + SERVICE_SECONDS))
        self.held: dict[str, int] = self.service.take_stored()
        self.exit_status: int | None = None
        # The supervisor
        self.wire: Wire | None = None
        self.supervisor_pid = 0
        self.supervisor_since = 0.0
        self.ready = False
        self.was_ready = False
        self.starts = 0
        self.failures = 0
        self.replaced = False
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
            "reap": self._reap,
            "service": self.service.flush,
        }

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the supervisor asks for the end, or can't be started at all. Returns the exit status."""
        self._set_up()
        self._start_supervisor()
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
        spawn.raise_open_files()
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
        if self.ready:
            self._tell({"op": "signal", "signal": number})
        if (number in ENDING or not self.ready) and number not in self.pending_signals:
            self.pending_signals.append(number)  # the end is asked for until it comes, whoever dies on the way
        if not self.ready:
            self._expect_end()

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
        self._drop_wire()
        deadline = time.monotonic() + 5
        next_kill = 0.0
        while (self.supervisor_pid or not self.children.over) and time.monotonic() < deadline:
            if time.monotonic() >= next_kill:
                self._safely("reap", self.children.kill)
                next_kill = time.monotonic() + AGAIN_SECONDS
            self._safely("reap", self._reap)
            for key, events in self.selector.select(0.05):  # SIGCHLD ends the wait, and the end of an adopted child
                self._safely("reap", key.data, events)
        if self.supervisor_pid:
            os.kill(self.supervisor_pid, signal.SIGKILL)
            os.waitpid(self.supervisor_pid, 0)
        for name in self.held:
            self.service.drop(name)
        self.service.finish()
        tree.remove_cgroup(self.cgroup_root)

    # --- the supervisor ---------------------------------------------------------------------------------------------

    def _start_supervisor(self) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._not_started(error)
            return

        def become(report: int) -> NoReturn:
            try:
                spawn.become_supervisor(self.command, theirs.fileno())
            except BaseException as error:  # noqa: BLE001 - said, and then this process ends
                say(f"can't start the supervisor {self.command[0]}: {error}")
            os._exit(127)

        try:
            pid, report = spawn.fork_child(become)
        except OSError as error:
            ours.close()
            self._not_started(error)
            return
        finally:
            theirs.close()
        os.close(report)
        self.starts += 1
        self.supervisor_pid, self.supervisor_since = pid, time.monotonic()
        self.ready, self.replaced, self.missed = False, False, 0
        self.due["ping"] = time.monotonic() + self.heartbeat
        self.wire = Wire(ours)
        self.selector.register(ours.fileno(), selectors.EVENT_READ, self._wire_event)
        self._snapshot()

    def _not_started(self, error: OSError) -> None:
        self.last = f"fork: {error.strerror}"
        say(f"can't start a supervisor: {error.strerror}; trying again")
        self._retry_supervisor()

    def _snapshot(self) -> None:
        hello = {"op": "hello", "pid": os.getpid(), "starts": self.starts, "last": self.last}
        self._tell(hello | {"cgroup": self.cgroup_root})
        for record in self.children.records():
            self._tell(record)
        for name, fd in self.held.items():
            self._tell({"op": "held", "name": name}, [fd])
        self._tell({"op": "begin"})

    def _supervisor_ended(self, status: int) -> None:
        self.last = describe(status)
        self.supervisor_pid = 0
        self.due.pop("ping", None)
        self._hear_last_words()
        if self.exit_status is not None:
            return
        if not self.was_ready and not self.children:
            # The first start failed (a bad table, a lock that is held): it has said why. Nobody needs us.
            self.exit_status = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
            return
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not self.replaced
        if self.ready and (killed or time.monotonic() - self.supervisor_since > STEADY_SECONDS):
            self.failures = 0
        say(f"the supervisor has ended ({self.last}); starting another one")
        self.ready = False
        self._expect_end()
        self._retry_supervisor()

    def _retry_supervisor(self) -> None:
        delay = 0.0 if not self.failures else min(RETRY_SECONDS * 2 ** (self.failures - 1), RETRY_SECONDS_MAX)
        self.failures = min(self.failures + 1, 20)
        self.due["supervisor"] = time.monotonic() + delay

    def _hear_last_words(self) -> None:
        """What a supervisor said before its end counts: "exit", or a descriptor to hold."""
        while self.wire is not None:
            try:
                messages = self.wire.receive()
            except WireError:
                break
            if not messages:
                break
            self._obey_all(messages)
        self._drop_wire()

    def _drop_wire(self) -> None:
        if self.wire is not None:
            self.selector.unregister(self.wire.fileno())
            self.wire.close()
            self.wire = None

    def _ping(self) -> None:
        if not self.supervisor_pid:
            return
        if self.missed >= MISSED_PINGS:
            self._replace_supervisor("does not answer")
        self.missed += 1
        self.due["ping"] = time.monotonic() + self.heartbeat
        self._tell({"op": "ping"})

    def _replace_supervisor(self, why: str) -> None:
        """It is of no use any more. Its end is reported by SIGCHLD."""
        if self.supervisor_pid:
            say(f"the supervisor {why}; replacing it")
            self.replaced = True
            os.kill(self.supervisor_pid, signal.SIGKILL)
        self._drop_wire()

    def _tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        if self.wire is None:
            return
        try:
            self.wire.send(message, descriptors)
            self._watch_wire()
        except WireClosed:
            pass  # its last words may be on the wire still: `_wire_event` finds them, and the end
        except WireError as error:
            self._replace_supervisor(f"can't be told what happens ({error})")

    def _watch_wire(self) -> None:
        if self.wire is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.wire.waiting else 0)
            self.selector.modify(self.wire.fileno(), events, self._wire_event)

    def _wire_event(self, events: int) -> None:
        if self.wire is None:
            return
        try:
            if events & selectors.EVENT_READ:
                self._obey_all(self.wire.receive())
            if events & selectors.EVENT_WRITE and self.wire is not None:
                self.wire.flush()
                self._watch_wire()
        except WireClosed:
            self._drop_wire()  # it is on its way out; if it is not, pings find out
        except WireError as error:
            self._replace_supervisor(f"talks nonsense ({error})")

    def _obey_all(self, messages: list[tuple[Message, list[int]]]) -> None:
        for message, descriptors in messages:
            self._safely("reap", self._obey, message, descriptors)
            for fd in descriptors:
                os.close(fd)

    def _obey(self, message: Message, descriptors: list[int]) -> None:
        """Do what one message says. `descriptors` that stay in the list are closed by the caller."""
        match message:
            case {"op": "spawn", "child": str(name)}:
                self.children.spawn(name, message, self.held)
            case {"op": "signal", "child": str(name), "signal": int(number)}:
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
            case {"op": "hold", "name": str(name)} if descriptors:
                self._release(name)
                self.held[name] = descriptors.pop()
                self.service.store(name, self.held[name])
            case {"op": "release", "name": str(name)}:
                self._release(name)
            case {"op": "sync", "number": int(number)}:
                self._tell({"op": "synced", "number": number})
            case {"op": "ready"}:
                self._supervisor_ready()
            case {"op": "notify", "state": str(state)}:
                self.service.notify(state)
            case {"op": "log"} if descriptors:
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[0], 2)
            case {"op": "pong"}:
                self.missed = 0
            case {"op": "exit", "status": int(status)}:
                self.exit_status = status
            case _:
                say(f"the supervisor asks for something unknown: {str(message)[:200]}")

    def _supervisor_ready(self) -> None:
        self.ready = True
        self.due.pop("terminate", None)
        self.due.pop("kill", None)
        for number in self.pending_signals:
            self._tell({"op": "signal", "signal": number})
        self.pending_signals = [number for number in self.pending_signals if number in ENDING]
        if not self.was_ready:
            self.was_ready = True
            self.on_ready()

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
            if info.si_pid == self.supervisor_pid:
                self._supervisor_ended(status)
            else:
                strangers = True
        if strangers:
            self.children.stranger_ended()
        self._end_if_over()

    def _watchdog(self) -> None:
        """The keeper is what the service manager watches: it watches the supervisor itself, and replaces it."""
        self.due["watchdog"] = time.monotonic() + self.service.watchdog / 2
        self.service.notify("WATCHDOG=1")


def say(text: str) -> None:
    """A line on stderr, the keeper's only log. Nobody may be there to read it."""
    try:
        print(f"procmand: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


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
    """Be the keeper: start `command` as the supervisor (its last argument becomes the descriptor of the wire), bring it
    back whenever it dies, and return the exit status when all is over. `on_ready` is called once, when the supervisor
    first says that the table runs. `heartbeat` is in seconds. Without `use_cgroup` descendants are found by other means
    only."""
    return Keeper(command, heartbeat, on_ready, use_cgroup).run()

"""New code in both processes, or none in either: one upgrade on its way.

    check    a process of the new code reads what it would be given (`handover`). Nothing has changed if it fails
    yield    the supervisor puts its work down, and waits
    trial    a successor of the new code starts, with the snapshot; if it fails, the old one takes its work up again
    exec     the successor runs the table, the old one has been ended; the keeper becomes the new code itself
    undo     the successor has failed and is being ended. Before it has gone nobody else may write what it writes

It knows the order of these. What the keeper does in each is the keeper's (`Holder`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Literal, NoReturn, Protocol

from procman.keeper import spawn
from procman.keeper.say import describe, say
from procman.keeper.supervisor import Supervisor
from procman.keeper.wire import Message

CHECK_SECONDS, YIELD_SECONDS, TRIAL_SECONDS, EXEC_SECONDS = 60.0, 20.0, 60.0, 5.0
"""How long each phase may take."""

PAUSE = 0.02
"""Seconds between two looks for silence on the wire before the exec."""

OUTPUT_MAX = 2000
"""Bytes of what a failed check has printed that are told."""

Phase = Literal["check", "yield", "trial", "exec", "undo"]


class Holder(Protocol):
    """What an upgrade needs of the keeper."""

    supervisor: Supervisor | None

    def start_successor(self) -> Supervisor:
        """Start another supervisor, with a snapshot. Raises OSError."""

    def take_successor(self, successor: Supervisor, forgotten: Sequence[str]) -> None:
        """From now on it is the supervisor. It has taken note of the ends of the children `forgotten`."""

    def tell_children(self) -> None:
        """Tell the supervisor how each child stands."""

    def wait_for_upgrade(self, seconds: float) -> None:
        """Call `due` after so many seconds, unless another wait begins or the upgrade is over."""

    def silent(self) -> bool:
        """Nothing is half said between the keeper and its supervisor."""

    def become_new(self) -> str:
        """exec the keeper's next self. Returns only when that has failed: why."""

    def upgrade_over(self, problem: str) -> None:
        """It has failed for this reason, or ("") was called off: nobody waits for it any more."""


class Upgrade:
    """One upgrade. `command` starts the check; its last argument becomes the descriptor of the `document`, a file that
    it reads; `inherited` are more descriptors that it needs, under the numbers that they have. Raises OSError."""

    def __init__(self, holder: Holder, command: Sequence[str], document: int, inherited: Sequence[int]) -> None:
        self._holder = holder
        self.phase: Phase = "check"
        self.successor: Supervisor | None = None
        self._forgotten: list[str] = []  # by a successor on trial; if it fails, the old supervisor must hear of them
        self._exec_until = 0.0
        self._problem = ""
        self._output = os.memfd_create("procman-check", os.MFD_CLOEXEC)
        try:
            self._checker = _start_check([*command, str(document)], self._output, [document, *inherited])
        except OSError:
            os.close(self._output)
            raise
        holder.wait_for_upgrade(CHECK_SECONDS)

    @property
    def frozen(self) -> bool:
        """The old supervisor does nothing, and answers nothing."""
        return self.phase in ("yield", "trial", "undo")

    def pids(self) -> list[int]:
        """Processes of the keeper's own that belong to the upgrade."""
        return [pid for pid in (self._checker, self.successor.pid if self.successor else 0) if pid]

    def ended(self, pid: int, status: int) -> bool:
        """Whether `pid`, which has ended, was one of them; then it is dealt with."""
        if pid == self._checker:
            self._checked(status)
            return True
        if self.successor is not None and pid == self.successor.pid:
            self.successor.hear_last_words()
            self.successor = None
            ended = f"the new supervisor ended before it was ready ({describe(status)}); the daemon's log says more"
            self._undone(self._problem or ended)
            return True
        return False

    def heard(self, supervisor: Supervisor, message: Message) -> bool:
        """Whether a message of a supervisor was about this upgrade, and nothing else; then it is dealt with."""
        match message:
            case {"op": "yielded"} if self.phase == "yield" and supervisor is self._holder.supervisor:
                self._try_successor()
            case {"op": "exit"} if supervisor is self.successor:
                pass  # one that is on trial does not decide about the end
            case {"op": "forget", "child": str(name)} if supervisor is self.successor:
                self._forgotten.append(name)
            case {"op": "ready"} if supervisor is self.successor:
                self._promote(supervisor)
                return False  # it is the supervisor now, and this is news of it
            case _:
                return False
        return True

    def due(self) -> None:
        """The time has come that `wait_for_upgrade` was told."""
        if self.phase == "undo":
            return  # a dead disk may hold what was killed: it ends when that goes on, and nobody may write before
        if self.phase != "exec":
            what = {
                "check": f"the new version was not checked within {CHECK_SECONDS:g} s",
                "yield": f"the supervisor did not put its work down within {YIELD_SECONDS:g} s: is a disk stuck?",
                "trial": f"the new supervisor was not ready within {TRIAL_SECONDS:g} s",
            }
            self.fail(what[self.phase])
        elif not self._holder.silent() and time.monotonic() < self._exec_until:
            self._holder.wait_for_upgrade(PAUSE)
        else:
            problem = self._holder.become_new()  # else it does not come back
            say(f"upgrade: the keeper stays as it is: {problem}")
            self._holder.upgrade_over(problem)

    def call_off(self) -> None:
        """The keeper ends."""
        self._end_processes()

    def fail(self, problem: str) -> None:
        """All is to be as it was before."""
        if self.phase == "undo":
            return
        if self.successor is None:
            self._undone(problem)
            return
        self.phase, self._problem = "undo", problem
        self.successor.end()

    def _undone(self, problem: str) -> None:
        """Nothing of the new code runs any more: the old supervisor may go on."""
        frozen = self.frozen
        self._end_processes()
        say(f"upgrade: {problem}; all stays as it is")
        self._holder.upgrade_over(problem)
        if frozen and self._holder.supervisor is not None:
            self._holder.tell_children()  # what the successor has done and heard, the old one has not
            self._holder.supervisor.tell({"op": "resume"})

    def incumbent_ended(self) -> None:
        """The old supervisor is gone: one that is on trial takes its place, and the upgrade is called off."""
        successor, self.successor = self.successor, None
        self._end_processes()
        if successor is not None and self.phase != "undo":
            self._holder.take_successor(successor, self._forgotten)
        self._holder.upgrade_over("")

    # --- the phases -------------------------------------------------------------------------------------------------

    def _checked(self, status: int) -> None:
        self._checker = 0
        size = os.fstat(self._output).st_size
        said = os.pread(self._output, OUTPUT_MAX, max(0, size - OUTPUT_MAX)).decode(errors="replace").strip()
        self._close_output()
        if status != 0:
            if "Traceback" in said:
                say(f"upgrade: {said}")
                lines = said.splitlines()
                place = next((line.strip() for line in reversed(lines) if line.strip().startswith('File "')), "")
                said = f"{lines[-1]} ({place})" if place else lines[-1]
            self.fail(f"the installed version can't take over ({describe(status)}): {said or 'it says nothing'}")
            return
        say(f"upgrade: {said}")
        self.phase = "yield"
        self._holder.wait_for_upgrade(YIELD_SECONDS)
        if self._holder.supervisor is not None:
            self._holder.supervisor.tell({"op": "yield"})

    def _try_successor(self) -> None:
        self.phase = "trial"
        self._holder.wait_for_upgrade(TRIAL_SECONDS)
        try:
            self.successor = self._holder.start_successor()
        except OSError as error:
            self.fail(f"can't start another supervisor: {error.strerror}")

    def _promote(self, successor: Supervisor) -> None:
        old, self.successor = self._holder.supervisor, None
        self.phase = "exec"
        self._exec_until = time.monotonic() + EXEC_SECONDS
        if old is not None:
            old.end()
        self._holder.take_successor(successor, self._forgotten)
        self._holder.wait_for_upgrade(0.0)

    def _end_processes(self) -> None:
        if self._checker:
            os.kill(self._checker, signal.SIGKILL)  # reaped like any stranger
            self._checker = 0
        if self.successor is not None:
            self.successor.end()
            self.successor = None
        self._close_output()

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


def _start_check(command: list[str], output: int, inherited: Sequence[int]) -> int:
    def become(report: int) -> NoReturn:
        spawn.reset_signals()
        os.setsid()
        for fd in inherited:
            os.set_inheritable(fd, True)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execv(command[0], command)

    pid, report = spawn.fork_child(become)
    os.close(report)
    return pid

"""The keeper's children: from the request to spawn one, over its end, until the supervisor has taken note of it.

It knows pids and what descends from them, also of children that an earlier keeper had started (*adopted* ones). It must
not know the wire: what there is to tell goes to `tell`.
"""

from __future__ import annotations

import errno
import functools
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from procman.keeper import adoption, spawn, tree
from procman.keeper.wire import Message

MEMBERS = 1000
"""Of the processes of an adopted child, so many are asked for its cgroup: they are all in the same one."""

AGAIN = 50
"""How often in a row what is left of an adopted child is looked for anew, while it changes under our eyes."""


class Child:
    """One child, from the request until the supervisor forgets it. `report` is -1 once exec has happened or failed.

    It was started `at` the wall-clock time that people are told, `since` the time on CLOCK_MONOTONIC that counts: the
    wall clock may jump. `start` is when its process began, in clock ticks since boot. `note` is what the supervisor
    wants the next one to know of it. `adopted`: an earlier keeper had started it. (No dataclass: that module alone is
    1.6 MB of memory.)
    """

    __slots__ = (
        *("adopted", "at", "cgroup", "end", "forgotten", "id", "kill_tree", "left"),
        *("note", "pid", "report", "session", "since", "start", "state", "tag"),
    )

    def __init__(self, name: str, tag: int, *, pid: int, report: int, cgroup: str, kill_tree: bool) -> None:
        self.id, self.tag, self.pid, self.report = name, tag, pid, report
        self.cgroup, self.kill_tree = cgroup, kill_tree
        self.at, self.since = time.time(), time.monotonic()
        self.start = 0
        self.state = "starting"
        self.left = self.forgotten = self.adopted = False
        self.session = pid or -1
        self.note = ""
        self.end: Message = {}

    @property
    def over(self) -> bool:
        """Neither it nor anything that descends from it is there."""
        return self.state == "exited" and not self.left

    def family(self, pid: int) -> tree.Family:
        """What to look for when its tree is meant; `pid` 0 when the child itself is not."""
        return tree.Family(self.tag, pid, self.session, self.cgroup, self.adopted)

    def record(self) -> Message:
        """How the snapshot shows it."""
        shown: Message = {"op": "child", "child": self.id, "state": self.state, "pid": self.pid}
        shown |= {"at": self.at, "since": self.since, "note": self.note, "start": self.start, "tag": self.tag}
        shown |= {"left": self.left, "adopted": self.adopted}
        return shown | {key: value for key, value in self.end.items() if key != "op"}


class Children:
    """All that are not forgotten. `tell` gets every message for the supervisor, `others` returns the pids of the
    keeper's own processes that are no children of this kind."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        tell: Callable[[Message], None],
        others: Callable[[], list[int]],
        cgroup_root: str,
    ) -> None:
        self._selector = selector
        self._tell = tell
        self._others = others
        self._cgroup_root = cgroup_root
        self._by_id: dict[str, Child] = {}
        self._by_pid: dict[int, Child] = {}  # children of this process that are not reaped yet
        self._house = 0
        self._number = 0
        self._watch = adoption.Watch(selector)

    def __bool__(self) -> bool:
        return bool(self._by_id)

    @property
    def over(self) -> bool:
        """Nothing that was ever started lives."""
        return all(child.over for child in self._by_id.values())

    def records(self) -> list[Message]:
        """The snapshot's messages."""
        return [child.record() for child in self._by_id.values()]

    def document(self) -> dict[str, Any]:
        """All of it as JSON, for the keeper's next self (`handover`), who gets `descriptors` under the same numbers."""
        children = [{name: getattr(child, name) for name in Child.__slots__} for child in self._by_id.values()]
        return {"house": self._house, "number": self._number, "children": children}

    def descriptors(self) -> list[int]:
        """Those that `document` names."""
        return [child.report for child in self._by_id.values() if child.report >= 0]

    def resume(self, document: Mapping[str, Any]) -> None:
        """The reverse of `document`, in the next self. What has ended in between is told: the supervisor must be known
        by then."""
        self._house, self._number = int(document["house"]), int(document["number"])
        for fields in document["children"]:
            child = Child.__new__(Child)
            for name in Child.__slots__:
                setattr(child, name, fields[name])
            self._by_id[child.id] = child
            if child.state != "exited" and not child.adopted:
                self._by_pid[child.pid] = child
            if child.report >= 0:
                self._await_report(child)
        for child in [child for child in self._by_id.values() if child.adopted]:
            ran = child.state != "exited"
            self._watch_adopted(child)
            if ran and child.state == "exited":
                self._tell(child.end | {"left": child.left})
            self._check_gone(child)

    def spawn(self, name: str, request: Mapping[str, Any], held: Mapping[str, int]) -> None:
        """Start the child `name`, unless it was already. Whatever is wrong with `request` is told as "failed"."""
        if name in self._by_id:
            self._tell(self._by_id[name].record())  # asked again by one that did not know: there it is
            return
        self._number += 1
        tag = (self._house << tree.NUMBER_BITS) + self._number
        cgroup = ""
        try:
            if not spawn.room_for(len(held) + spawn.SPARE_TO_FORK):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            cgroup = tree.make_cgroup(self._cgroup_root, name) if self._cgroup_root else ""
            marks = {"marks": {tree.MARKER: name}, "pid_mark": tree.MARKER_PID}
            asked = {**request, **marks, "rss": tree.TAG_BASE + tag}
            pid, report = spawn.fork_child(lambda report: spawn.become(asked, held, report), cgroup)
        except (OSError, ValueError) as error:
            tree.remove_cgroup(cgroup)
            end = {"op": "failed", "child": name, **spawn.failure("fork", error)}
            child = Child(name, tag, pid=0, report=-1, cgroup="", kill_tree=True)
            child.state, child.end, child.note = "exited", end, str(request.get("note") or "")
            self._by_id[name] = child
            self._tell(end | {"left": False})
            return
        kill_tree = request.get("kill") != "main"
        child = Child(name, tag, pid=pid, report=report, cgroup=cgroup, kill_tree=kill_tree)
        child.note = str(request.get("note") or "")
        process = tree.read_process(pid)
        child.start = 0 if process is None else process.start
        self._by_id[name] = self._by_pid[pid] = child
        self._await_report(child)

    def _await_report(self, child: Child) -> None:
        self._selector.register(child.report, selectors.EVENT_READ, lambda events: self._reported(child))

    def _reported(self, child: Child) -> None:
        """Exec has happened, or failed, or the child has ended before."""
        if child.report < 0:
            return  # `ended` was faster
        try:
            text = os.read(child.report, spawn.REPORT_MAX)
        except BlockingIOError:
            if child.state == "starting":
                return
            text = b""
        self._selector.unregister(child.report)
        os.close(child.report)
        child.report = -1
        if text:
            child.end = {"op": "failed", "child": child.id, **spawn.read_report(text)}
            return
        if child.state == "starting":
            child.state = "running"
        born = {"at": child.at, "start": child.start, "tag": child.tag}
        self._tell({"op": "spawned", "child": child.id, "pid": child.pid, **born})

    def belong(self, house: int, last: int) -> None:
        """Children that are started from now on are tagged with `house`, and with numbers above `last`."""
        self._house, self._number = house, max(self._number, last)

    def adopt(self, name: str, request: Mapping[str, Any]) -> None:
        """Take over what an earlier keeper had started as `name`: its process, or what that has left. The answer is its
        record, as in the snapshot.

        `request` has `pid` (0: its end is known) and `start` of the process, and its `tag`; `at`, when it was started;
        `kill` and `note` as they were. Raises OSError when no descriptor is free.
        """
        if name not in self._by_id:
            kill_tree = request.get("kill") != "main"
            pid, start = int(request.get("pid") or 0), int(request.get("start") or 0)
            child = Child(name, int(request["tag"]), pid=pid, report=-1, cgroup="", kill_tree=kill_tree)
            child.adopted, child.start, child.state = True, start, "running"
            child.at, child.note = float(request.get("at") or child.at), str(request.get("note") or "")
            process = tree.read_process(pid) if pid else None
            if process is None or process.start != start or process.session != pid:
                child.session = -1  # the number would be somebody else's
            folders = (tree.old_cgroup(int(member), name) for member in (request.get("members") or [])[:MEMBERS])
            child.cgroup = next(filter(None, folders), "")
            child.since = tree.monotonic_start(start) if start else child.since
            self._watch_adopted(child)
            self._by_id[name] = child
        self._tell(self._by_id[name].record())

    def _watch_adopted(self, child: Child) -> None:
        """Hear of its end, or bury it: it has ended already."""
        if child.state == "exited":
            return
        ended = functools.partial(self._adopted_ended, child)
        if not child.pid or not self._watch.add(child.pid, child.start, ended):
            self._bury(child, None)

    def _adopted_ended(self, child: Child, pidfd: int) -> None:
        self._bury(child, adoption.exit_status(pidfd, child.pid, child.start))
        child.end["lived"] = time.monotonic() - child.since
        self._tell(child.end | {"left": child.left})

    def _bury(self, child: Child, status: int | None) -> None:
        """An adopted child has ended, with a wait status that may not be known."""
        child.state = "exited"
        child.end = {"op": "exited", "child": child.id, "pid": child.pid, "status": status, "ended_at": time.time()}
        child.left = child.kill_tree and self._anything_left(child)
        if not child.left:
            tree.remove_cgroup(child.cgroup)

    def note(self, name: str, text: str) -> None:
        """Remember `text` with the child."""
        if name in self._by_id:
            self._by_id[name].note = text

    def ended(self, pid: int) -> bool:
        """Whether `pid`, which can be reaped, is a child of ours; then it is reaped and its end is told."""
        child = self._by_pid.get(pid)
        if child is None:
            return False
        # Look for what it leaves while its pid can't be given to another process: it is not reaped yet.
        child.left = child.kill_tree and self._anything_left(child)
        _, status, usage = os.wait4(child.pid, 0)
        del self._by_pid[pid]
        child.state = "exited"
        self._reported(child)
        if not child.end:
            used = {"user": usage.ru_utime, "system": usage.ru_stime, "max_rss_kb": usage.ru_maxrss}
            child.end = {"op": "exited", "child": child.id, "pid": pid, "status": status, "rusage": used}
            child.end |= {"ended_at": time.time(), "lived": time.monotonic() - child.since}
        self._tell(child.end | {"left": child.left})
        if not child.left:
            tree.remove_cgroup(child.cgroup)
        return True

    def stranger_ended(self) -> None:
        """A process that was handed down to us has ended: it may have been the last one that a child had left."""
        for child in [child for child in self._by_id.values() if child.left and not child.adopted]:
            self._check_gone(child)

    def _check_gone(self, child: Child) -> None:
        if not child.left or self._anything_left(child):
            return
        child.left = False
        tree.remove_cgroup(child.cgroup)
        self._tell({"op": "gone", "child": child.id})
        if child.forgotten:
            del self._by_id[child.id]

    def _anything_left(self, child: Child) -> bool:
        """Whether something of an ended child still lives. Where nobody can tell (no descriptor free, say): yes."""
        try:
            left = tree.members(child.family(0), self._known())
            for _ in range(AGAIN if child.adopted else 0):  # their end is no SIGCHLD here
                watched = [self._watch.add(p.pid, p.start, lambda pidfd: self._check_gone(child)) for p in left]
                if all(watched):
                    break
                left = tree.members(child.family(0), self._known())
        except OSError:
            return True
        if not any(process.session == child.session for process in left):
            child.session = -1  # the number of an empty session is free, and may be somebody else's soon
        return bool(left)

    def signal(self, name: str, number: int, whole_tree: bool) -> None:
        """Send signal `number` to the child, or to all that is left of it. Raises OSError for a number that is none."""
        child = self._by_id.get(name)
        if child is None:
            return
        alive = child.state != "exited"
        if whole_tree and child.kill_tree:
            tree.send(child.family(child.pid if alive else 0), self._known(), number)
            if child.left:
                self._check_gone(child)
        elif alive and child.adopted:
            tree.send_one(tree.Process(child.pid, 0, -1, child.start), number)
        elif alive:
            os.kill(child.pid, number)  # not reaped yet, so the pid is still this child's

    def terminate(self) -> None:
        """SIGTERM to each that runs."""
        for child in self._by_id.values():
            self.signal(child.id, signal.SIGTERM, whole_tree=False)

    def kill(self) -> None:
        """SIGKILL to all that is left of all."""
        for child in list(self._by_id.values()):
            if not child.over:
                try:
                    self.signal(child.id, signal.SIGKILL, whole_tree=True)
                except OSError:
                    pass  # no descriptor free: the caller comes again

    def forget(self, name: str) -> None:
        """The supervisor has taken note of its end. While something of it is left, it is remembered for that."""
        child = self._by_id.get(name)
        if child is None or child.state != "exited":
            return
        if child.left:
            child.forgotten = True
        else:
            del self._by_id[name]

    def _known(self) -> list[int]:
        return [*self._others(), *self._by_pid]

"""An operation that goes on when the daemon's supervisor is replaced under it: ask again for what is not reached yet.

A new supervisor finishes what the old one had written down, and nobody tells us which that is. So each process is
compared with what it was before the command: its aim is reached or missed, or it is on its way (then `start` and `stop`
change nothing and wait for it), or it stands as before (then it is asked for again).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from procman.client import Client, Closed
from procman.rpc import Object

from .session import LOOK_SECONDS

REPLACED = "procmanctl: the daemon's supervisor was replaced meanwhile; waiting goes on"
ANSWER_SECONDS = 2.0  # for a new supervisor to say what has come of it, when the time is up
AGAIN_SECONDS = 0.1  # from one look at a process to the next
_OVER = ("BACKOFF", "FATAL", "EXITED")

Ask = str
"""The verb that brings a process on its way, or waits for it."""

Connect = Callable[[float | None], Client]
"""Makes a client with this timeout."""

Heard = Callable[[str, Object], None]


def further(verb: str, before: Object | None, now: Object) -> Ask | None:
    """What is still to be asked for a process that was `before` when `verb` was asked and is `now` as it is; None: it
    has missed its aim. Pure. `verb` is "start", "stop" or "restart".

    Where the aim is reached it is asked for once more, too. That changes nothing about the process, but nobody knows
    whether the supervisor before had written down that an operator wants it so.
    """
    state = now["state"]
    if verb == "stop":
        return "stop"
    if before is not None and all(before[key] == now[key] for key in ("state", "pid", "started_at", "exit")):
        return verb
    if state in ("STOPPED", *_OVER):
        return None
    fresh = verb == "start" or before is None or now["pid"] != before["pid"]
    if not fresh and state != "STOPPING":
        return verb
    return "start" if now["wanted"] == "up" else None


def again(connect: Callable[[], Client], method: str, heard: Heard | None = None, **params: object) -> Any:
    """The result of a call that may be made again, until no supervisor is replaced under it. `heard` gets what is told
    meanwhile."""
    while True:
        try:
            with connect() as client:
                return client.stream(method, heard, **params) if heard is not None else client.call(method, **params)
        except Closed:
            print(REPLACED, file=sys.stderr, flush=True)


class Operation:
    """A verb for some processes. `connect` makes the connections, `heard` gets the progress."""

    def __init__(
        self,
        connect: Connect,
        heard: Heard,
        *,
        wait: bool,
        timeout: float | None,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._more = more
        self._connect = connect
        self._heard = heard
        self._wait = wait
        self._timeout = timeout
        self._end: float | None = None
        self._found: dict[str, Object] = {}
        self._said = False

    def run(self, verb: str, names: Sequence[str]) -> list[Object]:
        """One {name, ok, state, why} for each process. Raises what the daemon raises, and Unreachable when nobody
        answers any more."""
        with self._connect(self._look_seconds(self._timeout)) as client:
            before = {info["name"]: info for info in client.call("status", names=names)}
        todo: dict[Ask, list[str]] | None = {verb: list(names)}
        while True:
            try:
                if todo is None:
                    todo = self._rest(verb, names, before)
                for ask, some in todo.items():
                    self._found |= {one["name"]: one for one in self._asked(ask, some)}
            except Closed:
                todo = None
            else:
                order = {name: number for number, name in enumerate(before)}
                return sorted(self._found.values(), key=lambda one: order.get(one["name"], len(order)))

    def _left(self) -> float | None:
        if self._timeout is None or self._end is None:
            return self._timeout
        return round(max(0.0, self._end - time.monotonic()), 1)  # the daemon may show it

    @staticmethod
    def _look_seconds(left: float | None) -> float:
        return LOOK_SECONDS if left is None else min(LOOK_SECONDS, left + ANSWER_SECONDS)

    def _asked(self, verb: str, names: Sequence[str]) -> list[Object]:
        left = self._left()
        if self._end is None and left is not None:
            self._end = time.monotonic() + left
        silence = LOOK_SECONDS if not self._wait else None if left is None else left + LOOK_SECONDS
        more = self._more if verb == "reload" else {}
        with self._connect(silence) as client:
            found: list[Object] = client.stream(verb, self._heard, names=names, wait=self._wait, timeout=left, **more)
        return found

    def _rest(self, verb: str, names: Sequence[str], before: dict[str, Object]) -> dict[Ask, list[str]]:
        """What is still to be asked; the others have their result. Waits for the new supervisor."""
        todo: dict[Ask, list[str]] = {}
        left = self._left()
        with self._connect(self._look_seconds(left)) as client:
            infos = client.call("status", names=names)
            if not self._said:
                print(REPLACED, file=sys.stderr, flush=True)
                self._said = True
            for now in infos:
                name = now["name"]
                if name in self._found:
                    continue
                if verb in ("promote", "rollback"):
                    self._found[name] = self._decided(client, verb, name, before.get(name))
                    continue
                if verb in ("start", "restart") and _enough(names, now):
                    self._found[name] = {"name": name, "ok": True, "state": now["state"], "why": now["why"]}
                    continue
                kind = verb
                if verb == "reload":
                    if _replaced(before.get(name), now):
                        self._found[name] = {"name": name, "ok": True, "state": now["state"], "why": now["why"]}
                        continue
                    restarts = client.call("show", name=name)["definition"]["reload"] == "restart"
                    kind = "restart" if restarts and now["wanted"] == "up" else "reload"
                answer = kind if kind == "reload" else further(kind, before.get(name), now)
                if answer is None:
                    ok = now["state"] == "EXITED" and _succeeded(client, now)
                    self._found[name] = {"name": name, "ok": ok, "state": now["state"], "why": now["why"]}
                else:
                    todo.setdefault(answer, []).append(name)
        return todo


    def _decided(self, client: Client, verb: str, name: str, before: Object | None) -> Object:
        """What has come of a canary that the supervisor before was told to end: a new one ends it, in either way."""
        while True:
            (now,) = client.call("status", names=[name])
            over = now.get("beside") is None
            if over or not self._wait or self._left() == 0:
                break
            time.sleep(AGAIN_SECONDS)
        told = {"name": name, "state": now["state"]}
        if not over:
            return told | {"ok": not self._wait, "why": "the supervisor was replaced meanwhile; the next one ends it"}
        fresh = before is not None and now["pid"] not in (None, before["pid"])
        why = "the successor serves" if fresh else "it was rolled back"
        return told | {"ok": fresh == (verb == "promote"), "why": f"{why}; the supervisor was replaced meanwhile"}

def _enough(names: Sequence[str], now: Object) -> bool:
    """Whether it is not wanted because others of its program are enough; unless somebody has named this very one."""
    told = now.get("scale")
    if told is None or now["wanted"] == "up" or (now["name"] in names and now["name"] != now["program"]):
        return False
    return bool(told["number"] >= max(told["min"], 1))


def _replaced(before: Object | None, now: Object) -> bool:
    """Whether its successor serves, and the one before has gone."""
    fresh = before is not None and now["pid"] not in (None, before["pid"])
    return fresh and now["state"] == "RUNNING" and now.get("beside") is None


def _succeeded(client: Client, now: Object) -> bool:
    """Whether the table counts this end as a success."""
    good = client.call("show", name=now["name"])["definition"]["success_exit_codes"]
    return (now["exit"] or {}).get("code") in good

"""A small daemon for the tests of the socket, the client and procmanctl: real sockets, the real Server, and behind it a
`StandIn` with three processes that only pretend to run. What it does is defined here and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from procman.canary import AS_TABLE, Wish
from procman.client import Client
from procman.errors import Failed, NoSuchProgram, WrongUse
from procman.logread import Position
from procman.reading import Read
from procman.rpc import LogSource, Object, Peer
from procman.server import Access, Server

AT = "2030-01-31T12:00:00.000Z"


def info(name: str, state: str = "RUNNING", **more: Any) -> Object:
    """A ProcessInfo as the daemon makes them."""
    running = state == "RUNNING"
    return {
        "name": name,
        "program": name.partition(":")[0],
        "instance": int(name.partition(":")[2] or 1),
        "groups": ["web"] if name.startswith("shop") else [],
        "state": state,
        "wanted": "up" if running else "down",
        "ready": running,
        "health": None,
        "pid": 4711 if running else None,
        "started_at": AT if running else None,
        "uptime_seconds": 3723.4 if running else None,
        "restarts": 2,
        "cpu_percent": 1.53 if running else None,
        "memory_bytes": 41943040 if running else None,
        "exit": None if running else {"code": 1, "at": AT, "reason": "exit status 1"},
        "why": "autostart" if running else "exit status 1",
        "setback": None,
        "beside": None,
        "scale": None,
        "behind": [],
        "output": {"read": 2048, "written": 1024, "dropped": 1024, "error": ""},
        **more,
    }


def worker(pid: int, **told: Any) -> Object:
    """A worker as the daemon tells of one."""
    keys = ("busy", "requests", "in_flight", "queue", "threads", "average_seconds", "heartbeat_seconds", "memory_bytes")
    return {"pid": pid} | dict.fromkeys(keys) | told


LISTEN = {"name": "web", "address": "127.0.0.1:8000", "queue": 3, "backlog": 2048}
WORKERS: dict[str, Object] = {
    "shop:1": {
        "problem": None,
        "list": [
            worker(
                4712, busy=True, requests=1234, in_flight=1, threads=4, average_seconds=0.0124, memory_bytes=41943040
            ),
            worker(4713, busy=False, requests=9, in_flight=0, threads=4, average_seconds=1.5, memory_bytes=1048576),
        ],
        "left_out": 0,
        "listen": [LISTEN],
    },
    "shop:2": {"problem": "no answer within 1 s", "list": [], "left_out": 0, "listen": [LISTEN | {"queue": None}]},
}
"""What the servers of its processes tell; "blog" has none."""


class StandIn:
    """shop:1 and shop:2 (program "shop", group "web") run, "blog" is FATAL. "blog" never starts; all else succeeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = {"shop:1": info("shop:1"), "shop:2": info("shop:2"), "blog": info("blog", "FATAL")}
        self.asked: list[tuple[object, ...]] = []
        self.wishes: list[Wish] = []
        self.gate = asyncio.Event()  # operations that wait reach their effect when it is set
        self.gate.set()
        self.finished = 0  # operations that came to their end
        self.events: list[Object] = [
            {"at": AT, "type": "state", "name": "blog", "state": "FATAL", "why": "exit status 1"}
        ]
        self.subscribers: list[Callable[[Object], None]] = []
        self.watchers: list[Callable[[], None]] = []
        self.table_watchers: list[Callable[[], None]] = []
        self.down = asyncio.Event()

    def find(self, names: Sequence[str]) -> list[Object]:
        """The processes that names mean."""
        if not names or "all" in names:
            return list(self.processes.values())
        found = []
        for name in names:
            some = [p for p in self.processes.values() if name in (p["name"], p["program"], *p["groups"])]
            if not some:
                raise NoSuchProgram(f"no such program: {name!r}", hint="procmanctl status lists all")
            found += some
        return found

    def infos(self, names: Sequence[str]) -> list[Object]:
        if list(names) == ["bug"]:
            raise ZeroDivisionError("a bug")
        if list(names) == ["nan"]:
            return [{"cpu_percent": float("nan")}]
        if list(names) == ["big"]:
            return [{"why": "x" * 8_000_000}]
        return self.find(names)

    async def infos_with_workers(self, names: Sequence[str], read: Read) -> list[Object]:
        return [info | {"workers": WORKERS.get(info["name"])} for info in self.infos(names)]

    async def show(self, name: str, read: Read) -> Object:
        return {
            **self.find([name])[0],
            "definition": {"argv": ["gunicorn", "shop"], "umask": 18, "account": None},
            "log": [{"stream": "out", "path": str(self.folder / "shop.log"), "read": 2048, "dropped": 0, "error": ""}],
            "samples": [[1.0, 1.0, 1048576], [2.0, 3.0, 3145728]],
            "processes": [{"pid": 4711, "command": "gunicorn shop", "memory_bytes": 41943040}],
            "workers": WORKERS.get(name),
        }

    async def why(self, name: str, read: Read) -> Object:
        found = self.find([name])[0]
        history = [{"at": AT, "state": found["state"], "why": found["why"]}]
        kept = {key: found[key] for key in ("name", "state", "wanted", "why", "exit")}
        return {**kept, "history": history, "output": ["Traceback", "ImportError: \x1b[31mno blog"]}

    async def operate(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
        at_once: int = 1,
        wish: Wish = AS_TABLE,
    ) -> list[Object]:
        self.wishes.append(wish)
        self.asked.append((verb, list(names), peer.uid, timeout, wait))
        found = self.find(names)
        for one in found:
            progress({"name": one["name"], "state": "STOPPING" if verb == "stop" else "STARTING", "why": "asked"})
        if wait:
            await self.gate.wait()
        self.finished += 1
        state = "STOPPED" if verb == "stop" else "RUNNING"
        return [
            {"name": "blog", "ok": False, "state": "FATAL", "why": "exit status 1"}
            if one["name"] == "blog" and verb != "stop"
            else {"name": one["name"], "ok": True, "state": state, "why": "asked by uid 0"}
            for one in found
        ]

    async def decide(
        self,
        verb: str,
        names: Sequence[str],
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
    ) -> list[Object]:
        return await self.operate(verb, names, peer, timeout=timeout, wait=wait, progress=progress)

    async def scale(
        self,
        name: str,
        number: int,
        peer: Peer,
        *,
        timeout: float | None,
        wait: bool,
        progress: Callable[[Object], None],
    ) -> list[Object]:
        self.asked.append(("scale", name, number, peer.uid, timeout, wait))
        found = self.find([name])
        for one in found:
            progress({"name": one["name"], "state": "STARTING", "why": "asked"})
        if number > len(found):
            raise WrongUse(f"{name}: {number} is too many")
        return [{"name": one["name"], "ok": True, "state": "RUNNING", "why": "scaled"} for one in found]

    def signal(self, names: Sequence[str], signum: int, peer: Peer) -> list[Object]:
        self.asked.append(("signal", list(names), signum, peer.uid))
        return [
            {"name": one["name"], "ok": one["pid"] is not None, "state": one["state"], "why": one["why"]}
            for one in self.find(names)
        ]

    def log_sources(self, names: Sequence[str], stderr: bool, *, strict: bool = True) -> list[LogSource]:
        stream, end = ("err", ".err.log") if stderr else ("out", ".log")
        there = names if strict else [name for name in names if not self.unknown([name])]
        found = self.find(there) if there or not names else []
        return [LogSource(one["name"], stream, str(self.folder / (one["name"] + end))) for one in found]

    def unknown(self, names: Sequence[str]) -> list[str]:
        known = {"all"}.union(*((one["name"], one["program"], *one["groups"]) for one in self.processes.values()))
        return [name for name in names if name not in known]

    def watch_table(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.table_watchers.append(callback)
        return lambda: self.table_watchers.remove(callback)

    def output_elsewhere(self, names: Sequence[str], stderr: bool) -> dict[str, str]:
        return {}

    def watch_logs(self, keys: Sequence[str], callback: Callable[[], None]) -> Callable[[], None]:
        self.asked.append(("watch", list(keys)))
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    def log_begins(self, key: str) -> tuple[str, Position] | None:
        return None

    def recent(self) -> list[Object]:
        return list(self.events)

    def subscribe(self, callback: Callable[[Object], None]) -> Callable[[], None]:
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback)

    async def daemon_status(self) -> Object:
        own = {"supervisor_pid": os.getpid(), "keeper_pid": 1, "limits": {"open": 9}, "table": None}
        return {"identifier": "procman", "version": "0.1.0", **own}

    async def shutdown(self, peer: Peer) -> None:
        self.asked.append(("shutdown", peer.uid))
        self.down.set()

    async def upgrade(self, peer: Peer) -> None:
        self.asked.append(("upgrade", peer.uid))

    async def reopen_logs(self, peer: Peer) -> None:
        self.asked.append(("reopen_logs", peer.uid))

    async def plan(self, *, previous: bool) -> list[Object]:
        return [{"name": "blog", "action": "replace", "keys": ["environment"], "cost": f"{previous}"}]

    async def reread(
        self,
        peer: Peer,
        *,
        previous: bool,
        progress: Callable[[Object], None],
        wait: bool,
        timeout: float | None,
    ) -> Object:
        if not wait or timeout is not None:
            self.asked.append(("apply", wait, timeout))
            return {"message": "it goes on", "goes_on": True}
        progress({"name": "blog", "state": "STARTING", "why": f"asked, {previous}"})
        if self.asked and self.asked[-1][0] == "reread":
            raise Failed("the table has problems", hint="procmanctl check")
        self.asked.append(("reread", peer.uid))
        return {"added": ["new"], "removed": [], "changed": [], "restarted": [], "message": "the table was read again"}


class Daemon:
    """A Server of a StandIn on a socket of its own, in a loop and a thread of its own."""

    stand_in: StandIn
    server: Server

    def __init__(self, access: Access | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pm", dir="/tmp")  # short: sockets stand in it
        self.folder = Path(self._folder.name)
        self.path = str(self.folder / "s")
        self.access = access or Access(os.geteuid())
        self.loop = asyncio.new_event_loop()
        self.problems: list[str] = []  # what asyncio had to complain about: nothing, ever
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen(1)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.loop.call_soon_threadsafe(self.stand_in.down.set)
        except RuntimeError:
            pass  # it was shut down by a client, and its loop is closed
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._folder.cleanup()  # and with it the socket, which the keeper would remove
        assert not self.problems, self.problems

    def _run(self) -> None:
        self.loop.set_exception_handler(lambda _loop, context: self.problems.append(str(context)))
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.stand_in = StandIn(self.folder)
        self.server = Server(self._listening, self.stand_in, self.access)
        await self.server.start()
        self._started.set()
        await self.stand_in.down.wait()
        await self.server.close()
        assert not self.server.connections
        assert self.server.held == 0
        assert not self.stand_in.watchers
        assert not self.stand_in.subscribers

    def do(self, work: Callable[[], Any]) -> Any:
        """Calls `work` in the daemon's loop and returns its result."""

        async def run() -> Any:
            return work()

        return self.wait(run())

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine in the daemon's loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def speak(self, event: Object) -> None:
        """Lets an event happen."""
        self.do(lambda: [hear(event) for hear in self.stand_in.subscribers])

    def client(self, timeout: float | None = 10) -> Client:
        """A client of it."""
        return Client(self.path, timeout)

    def raw(self, *lines: bytes, timeout: float = 10) -> socket.socket:
        """A bare connection on which `lines` were sent."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(self.path)
        try:
            for line in lines:
                connection.sendall(line)
        except BaseException:
            connection.close()
            raise
        return connection

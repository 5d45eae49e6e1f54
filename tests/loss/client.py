"""Who asks: connections to one server, each in one mode, whose every answer is checked whole.

It speaks HTTP on bare sockets, for a library would repeat requests and forget how a connection ended. It knows nothing
of procman. What it asks for is what tests/sites/numbered_site.py answers.

How it tells an idle close from a loss: a server that has read a request, and goes without an answer, ends the
connection by FIN alone. One that closed before it read the request answers it by RST. So on a connection that was in
use before, an RST before the first byte is an idle close (the client may ask again), and a bare FIN is a loss.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.loss.tally import Failure, Result, Seen, Tally
from tests.sites.numbered_site import WHO, body

TCP_CLOSE = 7  # include/net/tcp_states.h: after an RST
FIRST_PIECE, PIECE = 16384, 65536
UNUSED_SECONDS = 0.8
"""Who asks less often, be it that this machine is so busy, is closed by the servers at a stop: they wait a second."""
ATTEMPTS = 5
"""How often a request is asked again after idle closes. More in a row is a loss, whatever the RFC allows."""


@dataclass(frozen=True, slots=True)
class Mode:
    """What one connection does all the time.

    `at_once`: requests that are sent together. `upload` and `size`: the largest body up and down; each request takes
    another length from 1 KB on. `post`: by POST, which a proxy does not ask again. `trickle`: seconds over which the
    head of a request is spread. `pause`: seconds between two reads of 16 KB.
    """

    keep: bool = True
    at_once: int = 1
    upload: int = 0
    post: bool = False
    chunked: bool = False
    size: int = 0
    stream: bool = False
    trickle: float = 0.0
    pause: float = 0.0


MODES = {
    "get": Mode(),
    "pipelined": Mode(at_once=8),
    "up": Mode(upload=1 << 20),
    "post": Mode(upload=1 << 14, post=True),
    "chunked": Mode(upload=1 << 18, chunked=True),
    "down": Mode(size=1 << 20),
    "stream": Mode(size=1 << 18, stream=True),
    "trickle": Mode(trickle=0.1),
    "slow-read": Mode(size=1 << 18, pause=0.01),
}
"""By name; "NAME/close" asks on a new connection each time, and says `Connection: close`."""


def mode_of(name: str) -> Mode:
    """The mode that a name stands for. Raises ValueError."""
    base, _, rest = name.partition("/")
    if base not in MODES or rest not in ("", "close"):
        raise ValueError(f"unknown mode {name!r}: {', '.join(MODES)}, each with /close")
    return replace(MODES[base], keep=not rest)


@dataclass(frozen=True, slots=True)
class Plan:
    """`address` is "HOST:PORT" or "unix:PATH". `connections` at one time, in turns of `modes`; `rate` requests a second
    on each (0: one after the other), `work` milliseconds of the site for each, answered within `patience` seconds. It
    ends by itself after `limit` seconds, or when `requests` were asked (0: any number)."""

    address: str
    modes: tuple[str, ...] = ("get", "get/close")
    connections: int = 8
    rate: float = 0.0
    work: int = 0
    patience: float = 20.0
    limit: float = 600.0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and its right answer."""

    number: int
    pieces: tuple[bytes, ...]
    answer: bytes


class Ended(Exception):
    """The connection has ended. `unread`: by RST, so the server has not read all that was sent."""

    def __init__(self, unread: bool) -> None:
        super().__init__("RST" if unread else "FIN")
        self.unread = unread


class Malformed(Exception):
    """What came is no answer."""


@dataclass(slots=True)
class Answer:
    """What came for one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def last(self) -> bool:
        """Whether it is the last one of its connection."""
        return "close" in self.headers.get("connection", "").lower()


class Visitor:
    """One connection after the other to the server, in one mode."""

    def __init__(self, load: Visit, name: str) -> None:
        self.load, self.plan = load, load.plan
        self.name, self.mode = name, mode_of(name)
        self.tally = Tally()
        self._sock: socket.socket | None = None
        self._buffer = bytearray()
        self._who = ""  # who has answered on this connection
        self._used = 0.0  # when it was asked last what it has answered
        self._began = 0.0
        self._pieces_sent = 0

    async def run(self, first_at: float) -> None:
        """Asks until the load is over; what is under way then is finished."""
        next_at = first_at
        while await self.load.wait_until(next_at):
            if self.plan.rate:
                next_at = max(next_at + self.mode.at_once / self.plan.rate, time.monotonic() - 1)
            count = self.mode.at_once
            await self._ask_all([self._ask(last=number == count - 1) for number in range(count)])
        self._close()

    def _ask(self, last: bool) -> Ask:
        """The next request, and whether it is the last one that is sent with others. The lengths are spread, and the
        same in each run."""
        number = self.load.next_number()
        mode = self.mode
        spread = (number * 7919 % 1024) ** 3  # most bodies are small
        size, upload = (1024 + (spread * most >> 30) if most else 0 for most in (mode.size, mode.upload))
        uploaded = (b"%d/" % number * (upload // 2))[:upload]
        query = f"size={size}&work={self.plan.work}{'&stream=1' if mode.stream else ''}"
        method = "POST" if mode.post else "PUT" if mode.upload else "GET"
        head = f"{method} /n/{number}?{query} HTTP/1.1\r\nHost: localhost\r\n"
        head += "Connection: close\r\n" if last and not mode.keep else ""
        if mode.chunked:
            head += "Transfer-Encoding: chunked\r\n"
        elif mode.upload:
            head += f"Content-Length: {len(uploaded)}\r\n"
        whole = f"{head}\r\n".encode()
        if mode.trickle:
            pieces = [whole[at : at + 1 + len(whole) // 5] for at in range(0, len(whole), 1 + len(whole) // 5)]
        elif mode.chunked:
            parts = [uploaded[at : at + 8000] for at in range(0, len(uploaded), 8000)]
            pieces = [whole, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), b"0\r\n\r\n"]
        else:
            whole += uploaded
            pieces = [whole[:FIRST_PIECE], *(whole[at : at + PIECE] for at in range(FIRST_PIECE, len(whole), PIECE))]
        return Ask(number, tuple(pieces), body(number, uploaded, size))

    async def _ask_all(self, asks: list[Ask]) -> None:
        """Requests that are sent together, until each is answered or has failed."""
        self.tally.requests += len(asks)
        for _ in range(ATTEMPTS):
            if self._sock is not None and self._has_ended():
                self._idle_closed()
            try:
                async with asyncio.timeout(self.plan.patience):
                    await self._attempt(asks)
            except TimeoutError:
                self._fail(asks, "slow", f"no whole answer within {self.plan.patience:g} s")
            if not asks:
                return
        self._fail(asks, "reset", f"closed while idle {ATTEMPTS} times in a row")

    async def _attempt(self, asks: list[Ask]) -> None:
        """Takes out of `asks` what is answered, or has failed; the rest may be asked again."""
        self._began = time.monotonic()
        fresh = self._sock is None
        if fresh:
            try:
                await self._connect()
            except OSError as error:
                return self._fail(asks, "refused", str(error))
        await self._send(asks)
        while asks:
            try:
                answer = await self._read_answer()
            except Ended as end:
                in_part = bool(self._buffer)
                if not fresh and end.unread and not in_part and self._pieces_sent <= 1 and self._who:
                    self.tally.retried += len(asks)
                    return self._idle_closed()
                kind = ("cut" if end.unread else "short") if in_part else "reset"
                self._fail(asks[:1], kind, f"{end}, number {asks[0].number}, {len(self._buffer)} bytes")
                del asks[0]
                return self._fail(asks, "reset", f"{end}, pipelined behind a failed one")
            except Malformed as error:
                return self._fail(asks, "wrong", str(error))
            fresh = True  # it has answered: what is lost from now on is lost
            self._judge(asks.pop(0), answer)
            if answer.last or not (asks or self.mode.keep):
                self.tally.told_close += bool(asks or self.mode.keep)
                self.tally.behind_close += len(asks)
                return self._close()
        if self._buffer:
            self.tally.requests += 1  # an answer to none of ours
            self._count("wrong", f"bytes that nobody asked for: {bytes(self._buffer[:100])!r}", time.monotonic())
            self._close()
        return None

    def _judge(self, ask: Ask, answer: Answer) -> None:
        now = time.monotonic()
        found = answer.body
        if answer.status == 200 and found == ask.answer:
            self.tally.right(now - self._began)
            self._who = answer.headers.get(WHO.lower(), "")
            self._used = self._began
            self.load.answered(self._who, now)
            return
        kind = "error" if answer.status >= 500 else "wrong"
        detail = f"{answer.status}, {len(found)} of {len(ask.answer)} bytes: {found[:100]!r}"
        self._count(kind, f"number {ask.number}: {detail}", now)

    def _count(self, kind: str, detail: str, now: float) -> None:
        self.tally.wrong(Failure(self._began, now, kind, self.name, self._who, detail))
        self.load.failed += 1

    def _fail(self, asks: list[Ask], kind: str, detail: str) -> None:
        """These have failed, and the connection is of no more use."""
        now = time.monotonic()
        for _ in asks:
            self._count(kind, detail, now)
        asks.clear()
        self._close()

    # The connection

    async def _connect(self) -> None:
        family, address = address_of(self.plan.address)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        if self.mode.pause:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        try:
            if family == socket.AF_UNIX:
                while (number := sock.connect_ex(address)) == errno.EAGAIN:  # the backlog is full: wait
                    await asyncio.sleep(0.002)
                if number:
                    raise OSError(number, "connect")
            else:
                await asyncio.get_running_loop().sock_connect(sock, address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        self._who = ""
        self.tally.connections += 1

    async def _send(self, asks: list[Ask]) -> None:
        """Sends all. An end of the connection meanwhile is seen by the reader: there may be an answer before it."""
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        pieces = [piece for ask in asks for piece in ask.pieces]
        if self.mode.at_once > 1:
            pieces = [b"".join(pieces)]
        self._pieces_sent = 0
        try:
            for piece in pieces:
                if self._pieces_sent:
                    await asyncio.sleep(self.mode.trickle / len(pieces))
                    if self._has_ended():
                        return
                await loop.sock_sendall(self._sock, piece)
                self._pieces_sent += 1
        except (ConnectionResetError, BrokenPipeError):
            pass

    def _has_ended(self) -> bool:
        """Whether the server has ended the connection, and nothing of an answer is left to read."""
        assert self._sock is not None
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def _receive(self) -> None:
        """More bytes into the buffer. Raises Ended."""
        assert self._sock is not None
        if self.mode.pause:
            await asyncio.sleep(self.mode.pause)
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 16384 if self.mode.pause else 262144)
        except (ConnectionResetError, BrokenPipeError) as error:
            raise Ended(unread=True) from error
        if not data:
            raise Ended(unread=self._was_reset())
        self._buffer += data

    def _was_reset(self) -> bool:
        """Whether an RST has come, perhaps behind a FIN that recv(2) tells first."""
        assert self._sock is not None
        if self._sock.family == socket.AF_UNIX:
            return self._pieces_sent == 0  # sending has failed: nobody was there to read
        return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE

    async def _read_answer(self) -> Answer:
        """Raises Ended, Malformed. What was received stays in the buffer until the answer is whole."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._receive()
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise Malformed(f"no status line: {first[:100]!r}")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        found, rest = await self._read_body(end + 4, headers)
        if version == "HTTP/1.0" and headers.get("connection", "").lower() != "keep-alive":
            headers["connection"] = "close"
        del self._buffer[:rest]
        return Answer(int(status[:3]), headers, found)

    async def _read_body(self, start: int, headers: dict[str, str]) -> tuple[bytes, int]:
        """The body, and where in the buffer it ends."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return await self._read_chunks(start)
        if (length := headers.get("content-length")) is not None:
            if not length.isdigit():
                raise Malformed(f"Content-Length {length!r}")
            end = start + int(length)
            await self._has(end)
            return bytes(self._buffer[start:end]), end
        try:  # until the end, which must be a FIN
            while True:
                await self._receive()
        except Ended as end:
            if end.unread:
                raise
        headers["connection"] = "close"
        return bytes(self._buffer[start:]), len(self._buffer)

    async def _read_chunks(self, at: int) -> tuple[bytes, int]:
        found = []
        while True:
            while (end := self._buffer.find(b"\r\n", at)) < 0:
                await self._receive()
            try:
                size = int(self._buffer[at:end].partition(b";")[0], 16)
            except ValueError as error:
                raise Malformed(f"a chunk of {bytes(self._buffer[at:end][:50])!r} bytes") from error
            at = end + 2 + size
            await self._has(at + 2)
            if self._buffer[at : at + 2] != b"\r\n":
                raise Malformed("no line end behind a chunk, or a trailer")
            found.append(bytes(self._buffer[end + 2 : at]))
            at += 2
            if not size:
                return b"".join(found), at

    async def _has(self, count: int) -> None:
        while len(self._buffer) < count:
            await self._receive()

    def _idle_closed(self) -> None:
        if time.monotonic() - self._used >= UNUSED_SECONDS:
            self.tally.unused_closed += 1
        else:
            self.tally.idle_closed += 1
            self.tally.idle_closed_most += 1
        self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._buffer.clear()


class Visit:
    """A whole load: all connections at work, in one loop, and what they have seen so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asked = self.failed = self.answers = 0
        self.generations: dict[str, Seen] = {}
        self._began = self._last_answer = 0.0
        self._longest_gap = 0.0
        self._stop = asyncio.Event()
        for name in plan.modes:
            mode_of(name)

    def next_number(self) -> int:
        """A number that no other request of this load has."""
        self.asked += 1
        if self.asked == self.plan.requests:
            self.stop()
        return self.asked

    def answered(self, who: str, now: float) -> None:
        """A right answer has come from `who`."""
        self.answers += 1
        self._longest_gap = max(self._longest_gap, now - self._last_answer)
        self._last_answer = now
        seen = self.generations.setdefault(who, Seen(now, now))
        seen.last = now
        seen.answers += 1

    def stop(self) -> None:
        """No new requests from now on."""
        self._stop.set()

    async def wait_until(self, at: float) -> bool:
        """Sleeps until then (monotonic), and says whether the load goes on."""
        seconds = at - time.monotonic()
        if seconds > 0 and not self._stop.is_set():
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except TimeoutError:
                pass
        return not self._stop.is_set()

    async def run(self, report: Callable[[Visit], None] | None = None) -> Result:
        """The load, until `stop()`, or until the plan is over. `report` is called 20 times a second."""
        plan = self.plan
        self._began = self._last_answer = time.monotonic()
        visitors = [Visitor(self, plan.modes[number % len(plan.modes)]) for number in range(plan.connections)]
        spread = 1 / plan.rate / plan.connections if plan.rate else 0.0
        tasks = [asyncio.create_task(each.run(self._began + number * spread)) for number, each in enumerate(visitors)]
        end = self._began + plan.limit
        pending: set[asyncio.Task[None]] = set(tasks)
        while pending:
            _, pending = await asyncio.wait(pending, timeout=0.05)
            if report:
                report(self)
            if time.monotonic() > end:
                self.stop()
        for task in tasks:
            task.result()  # a mistake of ours must not look like a quiet server
        result = Result(time.monotonic() - self._began, self._longest_gap, generations=self.generations)
        for visitor in visitors:
            result.modes.setdefault(visitor.name, Tally()).add(visitor.tally)
        for tally in result.modes.values():
            tally.document()  # its figures
        return result


def address_of(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Family and address for socket(7)."""
    if text.startswith("unix:"):
        return socket.AF_UNIX, text[len("unix:") :]
    host, _, port = text.rpartition(":")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))

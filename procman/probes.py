"""Asking a starting process whether it serves: HTTP, TCP, a Unix socket, a command, gunicorn's control socket.

It knows these protocols. It must not know processes or the keeper: a command runs through the `run` that the caller
gives.

A probe is a poll by nature, so this is the one place of the daemon that sleeps between attempts. A literal address
costs no thread; a host name is resolved in asyncio's resolver thread, because getaddrinfo(3) blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

from procman.config import Address, Ready
from procman.errors import ProcmanError

ATTEMPT_SECONDS = 2.0
"""Time limit of one attempt over a socket."""

COMMAND_SECONDS = 10.0
"""Time limit of one run of a `command` probe: a Python interpreter with an application takes a while to start."""

FIRST_DELAY = 0.05
LAST_DELAY = 0.5

LOOK_SECONDS, HOLD_SECONDS = 0.005, 0.03
"""How often it is looked who has accepted a connection, and how long that of another process is held, which may do
nothing else meanwhile."""

Run = Callable[[tuple[str, ...]], Awaitable[int]]
"""Runs an argv and returns its exit status, negative for a signal. Cancelling it ends what it runs."""

LetThrough = Callable[[int], Callable[[], None]]
"""Has a connection from this local port led where it is wanted; what it returns ends that, for another one from there
may be anybody's."""


class Shared(NamedTuple):
    """Others have the socket that is asked at, too. `accepted_by` tells of connections of ours who has accepted them:
    "" for the process that is asked, and where that can't be known, else the name of another one, None for nobody yet.
    `tries` are worth it before a pause."""

    accepted_by: Callable[[Sequence[TransportSocket]], Awaitable[Sequence[str | None]]]
    tries: int


class Answer(NamedTuple):
    """Of an HTTP server: its status, or 0 and why there is none."""

    status: int
    problem: str


_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_HEAD_MAX = 65536
_DRAIN_SECONDS = 0.2
_REPLY_MAX = 1 << 20
_NO_HTTP = "the answer is no HTTP"


async def wait_ready(
    ready: Ready,
    run: Run,
    report: Callable[[str], None],
    let_through: LetThrough | None = None,
    shared: Shared | None = None,
) -> None:
    """Returns when the probe of `ready` succeeds. Tries for ever, 50 to 500 ms apart: cancel it at the deadline.

    `let_through` is called with the local port of each TCP connection before that is made. Where the socket is
    `shared`, an answer over HTTP counts only if the process itself gives it.

    `report` gets the reason of the last failure whenever it changes: "connection refused", "HTTP 503", "exit status 1".
    Raises ValueError for the kinds that nobody probes (seconds, log, notify) and for a `ready` without its address.
    """
    await until_good(lambda: ask(ready, run, let_through, shared), report)


async def until_good(attempt: Callable[[], Awaitable[str]], report: Callable[[str], None]) -> None:
    """Returns when `attempt` does with "", as `wait_ready`."""
    delay = FIRST_DELAY
    last = ""
    while True:
        reason = await attempt()
        if not reason:
            return
        if reason != last:
            last = reason
            report(reason)
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, LAST_DELAY)


async def ask(ready: Ready, run: Run, let_through: LetThrough | None = None, shared: Shared | None = None) -> str:
    """Probes once: "" or why it failed. Raises as `wait_ready`."""
    limit = COMMAND_SECONDS if ready.kind == "command" else ATTEMPT_SECONDS
    return await _bounded(_attempt(ready, run, let_through, shared), limit)


async def answer(address: Address, path: str, let_through: LetThrough | None, seconds: float) -> Answer:
    """What an HTTP server answers to a GET of `path`, within so many seconds. `let_through` is as in `wait_ready`."""
    status = 0

    async def attempt() -> str:
        nonlocal status
        try:
            async with _connection(address, let_through) as connection:
                status = await _status(Ready(kind="http", address=address, path=path), address, connection)
        except ValueError:
            return _NO_HTTP
        return ""

    problem = await _bounded(attempt, seconds)
    return Answer(status, problem)


def _attempt(
    ready: Ready, run: Run, let_through: LetThrough | None, shared: Shared | None
) -> Callable[[], Awaitable[str]]:
    """One try of the probe: a function that returns "" or why it failed."""
    if ready.kind == "command":
        return lambda: _try_command(ready.argv, run)
    match ready.kind, ready.address:
        case "http", Address() as address:
            return lambda: _try_http(ready, address, let_through, shared)
        case (("tcp" | "unix"), Address() as address):
            return lambda: _try_connect(address, let_through)
        case "gunicorn", Address() as address:
            return lambda: _try_gunicorn(address)
    raise ValueError(f"a {ready.kind!r} readiness with the address {ready.address} can't be probed")


async def _bounded(attempt: Callable[[], Awaitable[str]], limit: float) -> str:
    try:
        async with asyncio.timeout(limit):
            return await attempt()
    except TimeoutError as error:
        # ETIMEDOUT of a connection is a TimeoutError too.
        return _words(error) if error.errno else f"no answer within {limit:g} s"
    except EOFError:
        return "the connection was closed without an answer"
    except OSError as error:
        return _words(error)
    except UnicodeError:
        return "the host name is not valid"
    except ProcmanError as error:
        return str(error)


def _words(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error) or type(error).__name__
    words = os.strerror(error.errno)
    return words[:1].lower() + words[1:]


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def _connection(address: Address, let_through: LetThrough | None = None) -> AsyncIterator[_Connection]:
    if address.kind == "unix":
        reader, writer = await asyncio.open_unix_connection(address.path, limit=_HEAD_MAX)
    else:
        host = _LOOPBACK.get(address.host, address.host)
        sock = await _known_port(host, address.port, let_through) if let_through is not None else None
        where = {"host": host, "port": address.port} if sock is None else {"sock": sock}
        reader, writer = await asyncio.open_connection(**where, limit=_HEAD_MAX)
    try:
        yield reader, writer
    finally:
        # Not close(): that would wait until a peer that does not read has taken what is left.
        writer.transport.abort()


async def _known_port(host: str, port: int, let_through: LetThrough) -> socket.socket:
    """A connection from a port that `let_through` was told before."""
    loop = asyncio.get_running_loop()
    # The same order as `listeners`: a name that has both kinds means IPv4.
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(("", 0))
        end = let_through(sock.getsockname()[1])
        try:
            await loop.sock_connect(sock, where)
        finally:
            end()
    except BaseException:
        sock.close()
        raise
    return sock


async def _try_connect(address: Address, let_through: LetThrough | None) -> str:
    async with _connection(address, let_through):
        return ""


async def _try_command(argv: tuple[str, ...], run: Run) -> str:
    status = await run(argv)
    if status == 0:
        return ""
    return f"exit status {status}" if status > 0 else f"killed by signal {-status}"


async def _try_http(ready: Ready, address: Address, let_through: LetThrough | None, shared: Shared | None) -> str:
    status, other, tries = 0, "", shared.tries if shared else 1
    for number in range(1, tries + 1):
        async with contextlib.AsyncExitStack() as stack:
            # At last many at once: some kernels prefer one process as long as that is idle (EPOLLEXCLUSIVE).
            count = tries if number == tries else 1
            made = [await stack.enter_async_context(_connection(address, let_through)) for _ in range(count)]
            if shared:
                # Nothing is sent before that is known: a connection that ends like this is no news to any server.
                place, other = await _ours(shared, [writer.get_extra_info("socket") for _, writer in made])
                for _, writer in made[:place] + made[place + 1 :]:
                    writer.transport.abort()
                made = made[place : place + 1]
            if other:
                continue
            try:
                status = await _status(ready, address, made[0])
            except ValueError:
                return _NO_HTTP
        return "" if ready.any_status or 200 <= status <= 399 else _refused(ready, address, status)
    return f"answered by {other}, which has the same socket"


def _refused(ready: Ready, address: Address, status: int) -> str:
    """What is said of a status that is not good."""
    if status != 400:
        return f"HTTP {status}"
    said = f"HTTP 400 to the host {_host(ready, address)}"
    key = f'ready = {{ http = "{ready.path or "/"}", host = "..." }}'
    return said if ready.host else f"{said}; say one that it serves (Django: of ALLOWED_HOSTS): {key}"


async def _ours(shared: Shared, clients: Sequence[TransportSocket]) -> tuple[int, str]:
    """The place of the one that the process that is asked has accepted, and "", or the name of another one."""
    loop = asyncio.get_running_loop()
    end = math.inf
    while "" not in (names := await shared.accepted_by(clients)):
        others = [name for name in names if name]
        if len(others) == len(names) or loop.time() > end:
            return 0, others[0]
        if others:
            end = min(end, loop.time() + HOLD_SECONDS)
        await asyncio.sleep(LOOK_SECONDS)
    return names.index(""), ""


async def _status(ready: Ready, address: Address, connection: _Connection) -> int:
    """The status of the answer. Raises ValueError where it is no HTTP."""
    reader, writer = connection
    writer.write(_request(ready, address))
    status = await _read_status(reader)
    await _drain(reader)
    return status


def _host(ready: Ready, address: Address) -> str:
    """The Host header of a request."""
    if address.kind == "unix":
        here = "localhost"
    else:
        here = str(Address("tcp", _LOOPBACK.get(address.host, address.host), address.port))
    return "".join(char for char in ready.host or here if char.isprintable())


def _request(ready: Ready, address: Address) -> bytes:
    # Whatever is no visible ASCII goes percent-encoded, so no path can add a header (RFC 3986, section 2.1).
    path = "".join(chr(byte) if 0x21 <= byte <= 0x7E else f"%{byte:02X}" for byte in (ready.path or "/").encode())
    host = _host(ready, address)
    lines = (f"GET {path} HTTP/1.1", f"Host: {host}", "User-Agent: procman", "Accept: */*", "Connection: close", "", "")
    return "\r\n".join(lines).encode()


async def _read_status(reader: asyncio.StreamReader) -> int:
    """The status of the final answer; interim ones (1xx) are passed over (RFC 9110, section 15.2)."""
    while True:
        line = await reader.readline()
        if not line:
            raise EOFError
        version, _, rest = line.partition(b" ")
        code = rest[:3]
        if not version.startswith(b"HTTP/") or len(code) != 3 or not code.isdigit():
            raise ValueError(line)
        status = int(code)
        if status >= 200:
            return status
        while (await reader.readline()).strip():
            pass


async def _drain(reader: asyncio.StreamReader) -> None:
    """Reads the rest of a short answer: a server whose client vanishes at once would log an error for each probe."""
    left = _HEAD_MAX
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)


async def _try_gunicorn(address: Address) -> str:
    """Asks `show workers`: 4 bytes big-endian length, then JSON, both ways.

    A worker's `booted` stays false in the master for ever. `last_heartbeat` is a large negative number until the worker
    has loaded the application and beats, and seconds (0 or more) from then on.
    """
    request = json.dumps({"id": 1, "command": "show workers"}).encode()
    async with _connection(address) as (reader, writer):
        writer.write(struct.pack(">I", len(request)) + request)
        size: int = struct.unpack(">I", await reader.readexactly(4))[0]
        if size > _REPLY_MAX:
            return "the answer of the control socket is too long"
        try:
            reply = json.loads(await reader.readexactly(size))
        except (ValueError, RecursionError):
            return "the answer of the control socket is no JSON"
    return "" if _has_live_worker(reply) else "no worker has booted yet"


def _has_live_worker(reply: object) -> bool:
    data = reply.get("data") if isinstance(reply, dict) else None
    workers = data.get("workers") if isinstance(data, dict) else None
    if not isinstance(workers, list):
        return False
    beats = (worker.get("last_heartbeat") for worker in workers if isinstance(worker, dict))
    return any(isinstance(beat, int | float) and not isinstance(beat, bool) and beat >= 0 for beat in beats)

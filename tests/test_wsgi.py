"""The built-in WSGI server: always a real child process, real sockets and clients that write raw bytes.

The last part breaks the promise on purpose in every way a stop can meet a connection, and counts what clients see.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import inspect
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote_to_bytes

import pytest
import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.trigger
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procman import wsgi
from tests.harness import PROJECT, wait_until

PYTHON = sys.executable
SCRIPT = PROJECT / "procman" / "wsgi.py"
LIMIT = 15.0  # seconds: what a test waits for anything at most

SITE = r'''
import io, json, os, signal, sys, threading, time
from wsgiref.validate import validator

def plain(start_response, body, status="200 OK", *more):
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), *more])
    return [body]

def show(environ):
    plain_types = (str, bool, tuple)
    return {key: value if isinstance(value, plain_types) else type(value).__name__ for key, value in environ.items()}

def app(environ, start_response):
    path = environ["PATH_INFO"]
    name = path.strip("/").partition("/")[0]
    view = globals().get("view_" + name)
    if view is None:
        return plain(start_response, json.dumps(show(environ)).encode())
    return view(environ, start_response)

def view_echo(environ, start_response):
    return plain(start_response, environ["wsgi.input"].read())

def view_size(environ, start_response):
    total = 0
    while chunk := environ["wsgi.input"].read(65536):
        total += len(chunk)
    length, encoding = environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING")
    return plain(start_response, f"{total} {length} {encoding}".encode())

def view_stream(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"one,"
    yield b"two"

class Closing:
    def __init__(self, fail=False):
        self.fail = fail
    def __iter__(self):
        yield b"first "
        if self.fail:
            raise ValueError("midway")
        yield b"second"
    def close(self):
        print("closed the iterable", file=sys.stderr, flush=True)

def view_closing(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "12")])
    return Closing()

def view_midway(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "12")])
    return Closing(fail=True)

def view_raise(environ, start_response):
    raise ZeroDivisionError("on purpose")

def view_oserror(environ, start_response):
    open("/nonexistent/file")

def view_exit(environ, start_response):
    sys.exit("enough")

def view_silent(environ, start_response):
    return []

def view_replaced(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    try:
        raise KeyError("late")
    except KeyError:
        start_response("503 Sorry", [("Content-Type", "text/plain")], sys.exc_info())
    return [b"replaced answer"]

def view_write(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    write(b"abc")
    return [b"def"]

def view_too_late(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "9")])
    yield b"abc"
    try:
        raise KeyError("late")
    except KeyError:
        start_response("500 Sorry", [("Content-Type", "text/plain")], sys.exc_info())
    yield b"never"

def view_file(environ, start_response):
    size = os.path.getsize(__file__)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
    return environ["wsgi.file_wrapper"](open(__file__, "rb"))

def view_text(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return ["text"]

def view_nothing(environ, start_response):
    start_response("204 No Content", [])
    return []

def view_empty(environ, start_response):
    return plain(start_response, b"")

def view_error(environ, start_response):
    return plain(start_response, b"no", "500 Broken")

def view_wait(environ, start_response):
    """Says that it is there, and waits until the test opens the fifo of that name."""
    os.write(2, f"entered {environ['QUERY_STRING']}\n".encode())
    with open(environ["QUERY_STRING"]) as fifo:
        fifo.read()
    return plain(start_response, b"waited")

def view_aside(environ, start_response):
    """When the test opens the fifo, SIGTERM comes to another thread than that of the loop, which then sleeps."""
    def send():
        with open(environ["QUERY_STRING"]) as fifo:
            fifo.read()
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    threading.Thread(target=send, daemon=True).start()
    return plain(start_response, b"later")

def view_headfirst(environ, start_response):
    """Its head is sent before it waits."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "8")])
    yield b"head"
    os.write(2, f"entered {environ['QUERY_STRING']}\n".encode())
    with open(environ["QUERY_STRING"]) as fifo:
        fifo.read()
    yield b"tail"

def view_big(environ, start_response):
    return plain(start_response, b"x" * (32 << 20))

def view_pid(environ, start_response):
    return plain(start_response, str(os.getpid()).encode())

def view_environ(environ, start_response):
    return plain(start_response, json.dumps([sorted(os.environ), sys.path]).encode())

def view_fork(environ, start_response):
    """A child of the application must die of SIGTERM, and its death must not stop the server."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(read, 1)
    os.kill(pid, 15)
    return plain(start_response, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())

valid = validator(app)

def make():
    return app

class Holder:
    app = staticmethod(app)

def wrong_factory():
    raise LookupError("no database")

def outer(inner):
    def wrapped(environ, start_response):
        environ["test.order"] = environ.get("test.order", "") + "outer "
        return inner(environ, start_response)
    return wrapped

def second(inner):
    def wrapped(environ, start_response):
        environ["test.order"] = environ.get("test.order", "") + "second "
        return inner(environ, start_response)
    return wrapped

def no_middleware(inner):
    return None

number = 7
'''


@dataclass
class Answer:
    """What a client got for one request."""

    status: int
    headers: dict[str, str]
    body: bytes
    lines: list[str]

    @property
    def closes(self) -> bool:
        """Whether it says that the connection ends."""
        return self.headers.get("connection", "").lower() == "close"


class Client:
    """An HTTP client that sends what it is told, byte for byte."""

    def __init__(self, address: Any, timeout: float = LIMIT) -> None:
        family = (
            socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        )
        self.sock = socket.socket(family)
        self.sock.settimeout(timeout)
        self.rest = b""
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Sends raw bytes."""
        self.sock.sendall(data)

    def get(self, target: str, *, method: str = "GET", headers: str = "", version: str = "1.1") -> Answer:
        """One request and its answer; the connection stays open if the server leaves it so."""
        self.send(f"{method} {target} HTTP/{version}\r\nHost: example\r\n{headers}\r\n".encode("latin-1"))
        return self.answer(head=method == "HEAD")

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self.rest += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            assert self._more(), f"the connection ended; there was {self.rest[:200]!r}"
        found, _, self.rest = self.rest.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        parts, have = [self.rest], len(self.rest)
        while have < size:
            data = self.sock.recv(1 << 20)
            assert data, f"the connection ended after {have} of {size} bytes"
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        self.rest = whole[size:]
        return whole[:size]

    def answer(self, head: bool = False) -> Answer:
        """Reads one answer."""
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        if head or status < 200 or status in {204, 304}:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._until(b"\r\n"), 16):
                body += self._exactly(size)
                self._until(b"\r\n")
            self._until(b"\r\n")
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        else:
            body = self.until_end()
        return Answer(status, headers, body, lines)

    def until_end(self) -> bytes:
        """All that comes until the server closes its side. A reset is an error."""
        while self._more():
            pass
        rest, self.rest = self.rest, b""
        return rest


@dataclass
class Server:
    """A running server, its output in files."""

    process: subprocess.Popen[bytes]
    folder: Path
    name: str
    addresses: list[Any] = field(default_factory=list)

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return (self.folder / f"{self.name}.out").read_text("latin-1")

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return (self.folder / f"{self.name}.err").read_text("latin-1")

    def client(self, number: int = 0) -> Client:
        """A new connection."""
        return Client(self.addresses[number])

    def get(self, target: str, **options: Any) -> Answer:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.get(target, **options)

    def term(self, number: int = signal.SIGTERM) -> None:
        """Asks it to stop, and waits until it has heard it."""
        self.process.send_signal(number)

    def ends(self, timeout: float = LIMIT) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def wait_until_served(self) -> None:
        """Waits for its message, and learns its addresses from it."""

        def ready() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"it ended with {self.process.returncode}: {self.err}")
            return " serving " in self.err

        wait_until(ready, LIMIT)
        found = re.search(r"serving \S+ on (.*)", self.err)
        assert found
        for each in found[1].split(", "):
            host, _, port = each.rpartition(":")
            self.addresses.append(port if host == "unix" else (host.strip("[]"), int(port)))


class Serve:
    """Starts servers and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Server] = []
        (folder / "shop.py").write_text(SITE)

    def __call__(
        self,
        app: str = "shop:app",
        *options: str,
        sockets: tuple[socket.socket, ...] = (),
        wait: bool = True,
        command: tuple[str, ...] = (PYTHON, "-m", "procman.wsgi"),
        env: dict[str, str] | None = None,
        open_files: int = 0,
        **popen: Any,
    ) -> Server:
        name = f"server{len(self.made)}"
        if not sockets and not any(each.startswith("--bind") for each in options):
            options = ("--bind=127.0.0.1:0", *options)
        argv = [*command, *options, app]
        search = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": search, **(env or {})}
        numbers: list[int] = []
        if sockets:
            # A new descriptor is high enough not to be in the way of 3, 4, ...
            numbers = [fcntl.fcntl(each, fcntl.F_DUPFD, 60) for each in sockets]
            text = "import os, sys\nfor i, fd in enumerate(map(int, sys.argv[1].split())): os.dup2(fd, 3 + i)\n"
            text += "os.environ.setdefault('LISTEN_PID', str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
            argv = [PYTHON, "-c", text, " ".join(map(str, numbers)), *argv]
            environment["LISTEN_FDS"] = str(len(numbers))
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            process = subprocess.Popen(
                argv,
                **{"stdout": out, "stderr": err, "stdin": subprocess.DEVNULL, "cwd": self.folder, **popen},
                env=environment,
                pass_fds=numbers,
            )
        for number in numbers:
            os.close(number)
        if open_files:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))
        server = Server(process, self.folder, name)
        self.made.append(server)
        if wait:
            server.wait_until_served()
        return server

    def fifo(self, name: str) -> Path:
        """For /wait?NAME: `release` lets the request go on."""
        path = self.folder / name
        os.mkfifo(path)
        return path

    def close(self) -> None:
        """Ends what still runs."""
        for each in self.made:
            if each.process.poll() is None:
                each.process.kill()
            each.process.wait()


def release(fifo: Path) -> None:
    """Lets the request that waits at the fifo go on."""
    fd = os.open(fifo, os.O_WRONLY)
    os.close(fd)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers."""
    maker = Serve(tmp_path)
    yield maker
    maker.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only ask something."""
    maker = Serve(tmp_path_factory.mktemp("shared"))
    yield maker("shop:app")
    maker.close()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with wsgiref.validate around the application."""
    maker = Serve(tmp_path_factory.mktemp("valid"))
    yield maker("shop:valid")
    maker.close()


def heard(server: Server) -> None:
    """Waits until a stopping server has closed its own listening socket: then it drains."""

    def refused() -> bool:
        try:
            server.client().sock.close()
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
            return True  # reset: it came between the last accept(2) and the close, see docs/wsgi.md
        return False

    wait_until(refused, LIMIT)


def listener(family: int = socket.AF_INET, address: Any = ("127.0.0.1", 0)) -> socket.socket:
    """A listening socket, as a supervisor holds one."""
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen(128)
    return sock


# --- waitress itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (waitress.channel.HTTPChannel, "task_class error_task_class parser_class logger will_close close_when_flushed"),
        (waitress.channel.HTTPChannel, "total_outbufs_len request service received handle_close"),
        (waitress.server.BaseWSGIServer, "channel_class logger accept_connections accept readable handle_accept"),
        (waitress.server.BaseWSGIServer, "del_channel pull_trigger fix_addr"),
        (waitress.trigger.trigger, "handle_read pull_trigger"),
        (waitress.server.UnixWSGIServer, "fix_addr"),
        (waitress.task.Task, "service build_response_header write wrote_header close_on_finish chunked_response"),
        (waitress.task.Task, "content_length complete has_body status"),
        (waitress.task.WSGITask, "execute get_environment"),
        (waitress.task.ThreadedTaskDispatcher, "logger queue_logger set_thread_count shutdown"),
        (waitress.wasyncore.dispatcher, "accepting accept del_channel readable writable handle_accept"),
        (waitress.parser.HTTPRequestParser, "parse_header headers_finished header_plus completed"),
        (waitress.adjustments.Adjustments, "_param_map server_name threads cleanup_interval unix_socket_perms"),
    ],
)
def test_waitress_has_what_is_overridden(owner: type, names: str) -> None:
    assert [name for name in names.split() if not hasattr(owner, name)] == []


def test_waitress_works_as_the_overrides_believe() -> None:
    assert importlib.metadata.version("waitress").startswith("3."), "read the new waitress, then change this line"
    close = inspect.getsource(waitress.channel.HTTPChannel.handle_write)
    assert re.search(r"if self.will_close:\s+self.handle_close\(\)", close), (
        "the FIN of a drained connection hangs on it"
    )
    start = inspect.getsource(waitress.task.WSGITask.execute)
    assert start.index("self.complete = True") < start.index("self.content_length = int(v)")
    assert "r, self.trigger = self._fds = os.pipe()" in inspect.getsource(waitress.trigger.trigger.__init__)
    head = inspect.getsource(waitress.task.Task.build_response_header)
    assert 'self.request.headers.get("CONNECTION"' in head


def test_no_module_of_procman_hides_one_of_the_standard_library() -> None:
    # Run by path, its folder is first on sys.path until the imports of the standard library are done.
    names = {path.stem for path in (PROJECT / "procman").iterdir()} - {"__init__", "__pycache__"}
    assert names & set(sys.stdlib_module_names) == set()


# --- PEP 3333 ------------------------------------------------------------------------------------------------------


def environ(server: Server, target: str = "/x", **options: Any) -> dict[str, Any]:
    """The environ that the application saw."""
    answer = server.get(target, **options)
    assert answer.status == 200, answer
    found: dict[str, Any] = json.loads(answer.body)
    return found


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /x?a=b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET //x//y HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%2Fx%00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Type: text/plain\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /closing HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /write HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_the_validator_of_the_standard_library_is_content(valid: Server, request_: bytes) -> None:
    with valid.client() as client:
        client.send(request_)
        assert client.answer(head=request_.startswith(b"HEAD")).status == 200
    assert "Traceback" not in valid.err, valid.err


def test_environ(shared: Server) -> None:
    host, port = shared.addresses[0]
    with shared.client() as client:
        mine = client.sock.getsockname()
        found = json.loads(client.get("/x/y?a=1&b=%C3%A9").body)
    expected = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/x/y",
        "QUERY_STRING": "a=1&b=%C3%A9",
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "waitress",
        "REMOTE_ADDR": mine[0],
        "REMOTE_PORT": str(mine[1]),
        "HTTP_HOST": "example",
        "REQUEST_URI": "/x/y?a=1&b=%C3%A9",
        "wsgi.version": [1, 0],
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.errors": "TextIOWrapper",
        "wsgi.input_terminated": True,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "CONTENT_LENGTH" not in found


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/?", "/", ""),
        ("/a%20b", "/a b", ""),
        ("/a%2Fb", "/a/b", ""),
        ("/caf%C3%A9", "/caf\u00c3\u00a9", ""),  # the bytes as latin-1: PEP 3333, "Unicode Issues"
        ("/%ff", "/\u00ff", ""),
        ("/%zz%", "/%zz%", ""),
        ("/a//b", "/a//b", ""),
        ("//a", "/a", ""),  # waitress: "//host" in a redirect would lead elsewhere; REQUEST_URI has it as it came
        ("/a/../b/.", "/a/../b/.", ""),
        ("/a;p=1", "/a;p=1", ""),
        ("/a?b?c", "/a", "b?c"),
        ("/a+b", "/a+b", ""),
        ("http://other/x?y", "/x", "y"),
        ("http://other", "/", ""),
    ],
)
def test_path(shared: Server, target: str, path: str, query: str) -> None:
    found = environ(shared, target)
    assert (found["PATH_INFO"], found["QUERY_STRING"], found["SCRIPT_NAME"]) == (path, query, "")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*"abz09-._~!$&'()*+,;=:@/%"]) | st.binary(min_size=1, max_size=1), max_size=30))
def test_any_path_is_decoded_by_the_latin_1_rule(shared: Server, parts: list[str | bytes]) -> None:
    target = "/x" + "".join(part if isinstance(part, str) else f"%{part[0]:02X}" for part in parts)
    assert environ(shared, target)["PATH_INFO"] == unquote_to_bytes(target).decode("latin-1")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        b"garbage\r\n\r\n",
    ],
)
def test_a_bad_request_is_answered_400(shared: Server, request_: bytes) -> None:
    with shared.client() as client:
        client.send(request_)
        answer = client.answer()
        assert (answer.status, answer.closes) == (400, True)
        client.until_end()


def test_script_name(serve: Serve) -> None:
    server = serve("shop:valid", "--set", "url_prefix=/shop")
    found = environ(server, "/shop/cart")
    assert (found["SCRIPT_NAME"], found["PATH_INFO"]) == ("/shop", "/cart")
    found = environ(server, "/shop")
    assert (found["SCRIPT_NAME"], found["PATH_INFO"]) == ("/shop", "")


@pytest.mark.parametrize("target", ["/x", "/stream", "/file", "/closing", "/raise", "/silent"])
def test_head_has_no_body(shared: Server, target: str) -> None:
    with shared.client() as client:
        answer = client.get(target, method="HEAD")
        if answer.closes:
            assert client.until_end() == b""
        else:  # a stray byte would spoil the next answer
            assert client.get("/pid").body == str(shared.process.pid).encode()


def test_head_has_the_length_of_get(shared: Server) -> None:
    for target in ("/file", "/closing", "/write"):
        full = shared.get(target)
        assert shared.get(target, method="HEAD").headers["content-length"] == str(len(full.body))


def test_http_1_0(shared: Server) -> None:
    with shared.client() as client:
        answer = client.get("/pid", version="1.0")
        assert answer.closes
        assert client.until_end() == b""
    with shared.client() as client:
        answer = client.get("/pid", version="1.0", headers="Connection: keep-alive\r\n")
        assert [line for line in answer.lines if line.lower().startswith("connection")] == ["Connection: Keep-Alive"]
        assert client.get("/pid", version="1.0").status == 200
    with shared.client() as client:  # an error closes, and says only that
        answer = client.get("/raise", version="1.0", headers="Connection: keep-alive\r\n")
        assert [line for line in answer.lines if line.lower().startswith("connection")] == ["Connection: close"]


def test_bodies(shared: Server) -> None:
    big = os.urandom(3 << 20)
    with shared.client() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(big) + big)
        assert client.answer().body == big
        client.send(b"POST /size HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for size in (1, 70_000, 3):
            client.send(b"%x;ext=1\r\n%s\r\n" % (size, b"c" * size))
        client.send(b"0\r\nTrailer: x\r\n\r\n")
        assert client.answer().body == b"70004 70004 None"
        client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert client.answer().status == 100
        client.send(b"hello")
        assert client.answer().body == b"hello"
        assert len(client.get("/big").body) == 32 << 20


def test_streams_and_files(shared: Server) -> None:
    answer = shared.get("/stream")
    assert (answer.body, answer.headers["transfer-encoding"]) == (b"one,two", "chunked")
    assert shared.get("/stream", version="1.0").body == b"one,two"
    assert shared.get("/file").body == SITE.encode()
    assert shared.get("/write").body == b"abcdef"


def test_head_and_body_are_sent_together(shared: Server) -> None:
    with shared.client() as client:
        for _ in range(20):
            client.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.sock.recv(65536).endswith(f"\r\n\r\n{shared.process.pid}".encode())


def test_an_answer_without_a_body(shared: Server) -> None:
    with shared.client() as client:
        answer = client.get("/nothing")
        assert (answer.status, answer.body) == (204, b"")
        assert client.until_end() == b""
        assert shared.get("/empty").headers["content-length"] == "0"


def test_the_iterable_is_closed(serve: Serve) -> None:
    server = serve()
    assert server.get("/closing").body == b"first second"
    wait_until(lambda: server.err.count("closed the iterable") == 1)
    with server.client() as client:
        client.send(b"GET /midway HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.until_end().endswith(b"\r\n\r\nfirst ")  # too short: the client sees that it is cut
    wait_until(lambda: server.err.count("closed the iterable") == 2)
    wait_until(lambda: "ValueError: midway" in server.err)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("/raise", "ZeroDivisionError: on purpose"),
        ("/oserror", "FileNotFoundError: "),
        ("/exit", "SystemExit: enough"),
        ("/silent", "start_response was not called"),
        ("/text", "must be bytes, and not str"),
    ],
)
def test_an_exception_is_a_500_and_a_traceback(shared: Server, target: str, text: str) -> None:
    with shared.client() as client:
        answer = client.get(target)
        assert answer.status == 500
        assert b"Traceback" not in answer.body
    wait_until(lambda: text in shared.err and f"Exception while serving {target}" in shared.err)
    assert shared.get("/pid").status == 200


def test_a_traceback_begins_in_the_application(shared: Server) -> None:
    shared.get("/raise")
    found: re.Match[str] | None = wait_until(
        lambda: re.search(r"serving /raise\nTraceback.*\n  File \"(.*)\"", shared.err)
    )
    assert found is not None
    assert Path(found[1]).name == "shop.py"


def test_start_response_with_exc_info(shared: Server) -> None:
    answer = shared.get("/replaced")
    assert (answer.status, answer.body) == (503, b"replaced answer")
    with shared.client() as client:
        client.send(b"GET /too_late HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.until_end().endswith(b"\r\n\r\nabc")


def test_an_applications_logging_configuration_hides_no_traceback(serve: Serve) -> None:
    text = "import logging.config\nlogging.config.dictConfig({'version': 1, 'disable_existing_loggers': True})\n"
    (serve.folder / "quiet.py").write_text(text + "def app(environ, start_response):\n    raise KeyError('heard')\n")
    server = serve("quiet:app")
    assert server.get("/").status == 500
    wait_until(lambda: "KeyError: 'heard'" in server.err)


# --- The access log ------------------------------------------------------------------------------------------------

COMBINED = (
    r'(\S+) - - \[(\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "([^ ]+ [^ ]+ HTTP/\d\.\d|-)" (\d+) (\d+)'
    r' "(.*)" "(.*)" \d+\.\dms'
)


def test_access_log(serve: Serve) -> None:
    server = serve()
    requests: list[tuple[str, dict[str, Any], str]] = [
        (
            "/pid",
            {"headers": 'Referer: http://r/\r\nUser-Agent: a "quoted" \\ one\r\n'},
            f"200 {len(str(server.process.pid))}",
        ),
        ("/pid", {"method": "HEAD"}, "200 0"),
        ("/stream", {}, "200 7"),
        ("/file", {}, f"200 {len(SITE)}"),
        ("/replaced", {}, "503 15"),
        ("/raise?x", {}, "500 "),
        ("/caf\u00e9", {}, "400 "),  # RFC 3986: it must be escaped
    ]
    for number, (target, options, _) in enumerate(requests, 1):
        server.get(target, **options)
        wait_until(lambda count=number: server.out.count("\n") == count)  # type: ignore[misc]
    lines = server.out.splitlines()
    for line, (target, options, expected) in zip(lines, requests, strict=True):
        found = re.fullmatch(COMBINED, line)
        assert found, line
        assert found[1] == "127.0.0.1"
        shown = target.replace("\u00e9", r"\xe9")
        assert found[3] == f"{options.get('method', 'GET')} {shown} HTTP/1.1"
        assert f"{found[4]} {found[5]}".startswith(expected)
    assert '"http://r/" "a \\"quoted\\" \\\\ one"' in lines[0]


def test_requests_that_are_none_are_logged_too(serve: Serve) -> None:
    server = serve()
    with server.client() as client:
        client.send(b"garbage\r\n\r\n")
        assert client.answer().status == 400
    wait_until(lambda: '"-" 400 ' in server.out)


def test_a_client_that_goes_away_is_499(serve: Serve) -> None:
    server = serve()
    fifo = serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /headfirst?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.sock.recv(1)
        wait_until(lambda: "entered gate" in server.err)
        # Unread bytes make the close a reset, so that the server's next write fails.
    release(fifo)
    wait_until(lambda: "/headfirst" in server.out)
    assert re.search(r'"GET /headfirst\?gate HTTP/1.1" (200|499) ', server.out)
    assert "Traceback" not in server.err


@given(st.text(st.characters(max_codepoint=255)), st.text(st.characters(max_codepoint=255)))
def test_nothing_breaks_out_of_an_access_line(request_: str, agent: str) -> None:
    line = wsgi.access_line(
        remote="::1", request=request_ * 50, status="200 OK", size=1, referer="", agent=agent * 50, milliseconds=1.25
    )
    assert line.isascii()
    assert len(line) <= 4096
    assert line.count("\n") == 1
    assert line.endswith("ms\n")
    inside = r'(?:[^"\\]|\\.)*'
    assert re.fullmatch(rf'::1 - - \[.*\] "{inside}" 200 1 "-" "{inside}" 1\.2ms\n', line)


def test_no_access_log(serve: Serve) -> None:
    server = serve("shop:app", "--no-access-log")
    assert server.get("/pid").status == 200
    server.term()
    assert server.ends() == 0
    assert server.out == ""


@pytest.mark.parametrize("kind", ["broken pipe", "full", "closed"])
def test_a_dead_stdout_breaks_no_request(serve: Serve, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "closed":
            shell = 'exec "$0" "$@" >&- <&-'
            server = serve(command=("/bin/sh", "-c", shell, PYTHON, "-m", "procman.wsgi"))
        elif kind == "full":
            server = serve(stdout=stack.enter_context(open("/dev/full", "wb")))
        else:
            read, write = os.pipe()
            server = serve(stdout=write)
            os.close(write)
            os.close(read)
        with server.client() as client:
            for _ in range(3):
                assert client.get("/pid").body == str(server.process.pid).encode()
                assert client.rest == b""
        if kind == "closed":  # no socket may have become its stdout
            assert os.readlink(f"/proc/{server.process.pid}/fd/1") == "/dev/null"
        server.term()
        assert server.ends() == 0
    assert "Traceback" not in server.err


# --- Loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["shop:app", "shop:make()", "shop:Holder.app"])
def test_application_specs(serve: Serve, spec: str) -> None:
    assert serve(spec).get("/pid").status == 200


@pytest.mark.parametrize(
    ("spec", "options", "status", "texts"),
    [
        ("shopp:app", (), 3, ["'shopp:app'", "there is no module 'shopp'"]),
        ("shop.deep:app", (), 3, ["there is no module 'shop.deep'"]),
        ("shop:ap", (), 3, ["'shop:ap'", "has no 'ap'", "did you mean 'app'?", "shop.py"]),
        ("shop:number", (), 3, ["it is 'int', which is not callable"]),
        ("shop:wrong_factory()", (), 3, ["LookupError: no database", 'shop.py", line', "in wrong_factory"]),
        ("shop:number()", (), 3, ["TypeError"]),
        ("needs:app", (), 3, ["ModuleNotFoundError: No module named 'nothing'", 'needs.py", line 2']),
        ("syntax:app", (), 3, ["SyntaxError", 'syntax.py", line 1']),
        ("leaves:app", (), 3, ["SystemExit: missing setting"]),
        ("shop", (), 2, ["'shop' is not of the form MODULE:NAME"]),
        ("shop:app(1)", (), 2, ["not of the form"]),
        ("shop:app", ("--middleware=shop:nothing",), 3, ["'shop:nothing'", "has no 'nothing'"]),
        ("shop:app", ("--middleware=shop:no_middleware",), 3, ["shop:no_middleware", "returned 'NoneType'"]),
        ("shop:app", ("--middleware=shop",), 2, ["not of the form"]),
    ],
)
def test_what_cannot_be_loaded(
    serve: Serve, spec: str, options: tuple[str, ...], status: int, texts: list[str]
) -> None:
    (serve.folder / "needs.py").write_text("import os\nimport nothing\n")
    (serve.folder / "syntax.py").write_text("def app(:\n")
    (serve.folder / "leaves.py").write_text("import sys\nsys.exit('missing setting')\n")
    server = serve(spec, *options, wait=False)
    assert server.ends() == status
    assert server.err.startswith("procman.wsgi: ")
    assert [text for text in texts if text not in server.err] == [], server.err
    assert "importlib" not in server.err
    if status == 3:
        assert str(serve.folder) in server.err


def test_middleware_order(serve: Serve) -> None:
    server = serve("shop:app", "--middleware", "shop:outer", "--middleware", "shop:second")
    assert environ(server)["test.order"] == "outer second "


def test_search_path(serve: Serve) -> None:
    extra = serve.folder / "extra"
    extra.mkdir()
    (extra / "only_here.py").write_text("")
    (serve.folder / "config.py").write_text("")  # procman has a config too
    text = "import config, only_here\nassert 'procman' not in config.__file__\nfrom shop import app\n"
    (serve.folder / "main.py").write_text(text)
    for command in [(PYTHON, str(SCRIPT)), (PYTHON, "-m", "procman.wsgi")]:
        server = serve("main:app", "--site", str(extra), command=command)
        path = json.loads(server.get("/environ").body)[1]
        assert path[0] == str(serve.folder)
        assert path[-1] == str(extra)
        assert str(SCRIPT.parent) not in path


def test_waitress_is_found_by_site_alone(serve: Serve) -> None:
    # -S: no site-packages, as in a virtualenv without waitress. The middleware is in this very file.
    site = str(Path(waitress.channel.__file__).parent.parent)
    command = (PYTHON, "-S", str(SCRIPT), f"--site={site}")
    server = serve("shop:app", "--middleware=procman.wsgi:request_logging", command=command, env={"PYTHONPATH": ""})
    assert server.get("/pid").status == 200


def test_request_logging(serve: Serve) -> None:
    (serve.folder / "fast.py").write_text(
        "from functools import partial\n"
        "from procman.wsgi import request_logging\n"
        "log = partial(request_logging, slow_seconds=0)\n"
    )
    server = serve("shop:valid", "--middleware=procman.wsgi:request_logging", "--middleware=shop:outer")
    for target in ("/pid", "/raise", "/error", "/closing", "/midway"):
        with server.client() as client:
            client.send(f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            client.until_end()
    wait_until(lambda: "/midway raised" in server.err)
    assert re.search(r"GET /raise raised ZeroDivisionError after \d\.\d{3} s\nTraceback", server.err)
    assert server.err.count("ZeroDivisionError: on purpose") == 1  # not once more by the server
    assert re.search(r"GET /error was answered 500 Broken after", server.err)
    assert "GET /pid" not in server.err
    wait_until(lambda: server.err.count("closed the iterable") == 2)
    slow = serve("shop:app", "--middleware=fast:log")
    assert slow.get("/file").body == SITE.encode()
    wait_until(lambda: re.search(r"GET /file took \d\.\d{3} s \(200 OK\)", slow.err))


# --- The command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--threads=0"], "--threads 0: at least 1"),
        (["--drain-timeout=-1"], "--drain-timeout -1.0: expected seconds"),
        (["--idle-grace=nan"], "--idle-grace nan"),
        (["--set", "conection_limit=5"], "no option 'conection_limit'; did you mean 'connection_limit'?"),
        (["--set", "connection_limit"], "expected NAME=VALUE"),
        (["--set", "connection_limit=many"], "expected a whole number"),
        (["--set", "expose_tracebacks=maybe"], "expected true or false"),
        (["--set", "unix_socket_perms=9"], "--set"),
        (["--set", "threads=4"], "use --threads"),
        (["--set", "listen=*:80"], "use --bind"),
        (["--set", "asyncore_use_poll=0"], "no option 'asyncore_use_poll'"),
        (["--set", "trusted_proxy_count=1"], "trusted_proxy"),
    ],
)
def test_bad_options(argv: list[str], text: str) -> None:
    with pytest.raises(wsgi.Refused) as caught:
        wsgi.options([*argv, "shop:app"])
    assert text in str(caught.value)
    assert caught.value.status == 2


def test_good_options() -> None:
    found = wsgi.options(["shop:app", "--set", "channel-timeout=5", "--set", "ident=", "--threads", "2"])
    assert (found.adjustments.channel_timeout, found.adjustments.ident, found.adjustments.threads) == (5, None, 2)
    assert found == wsgi.Options(
        app="shop:app",
        bind=(),
        middleware=(),
        access_log=True,
        drain_timeout=30,
        idle_grace=1,
        stats="",
        adjustments=found.adjustments,
    )


@pytest.mark.parametrize("bind", ["8000", "host", "::1:80", "127.0.0.1:99999", "127.0.0.1:http"])
def test_bad_addresses(bind: str) -> None:
    with pytest.raises(wsgi.Refused, match="expected HOST:PORT") as caught:
        wsgi.bound_sockets(bind, 0o600)
    assert caught.value.status == 2


def test_an_address_in_use_is_named(serve: Serve) -> None:
    with listener() as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = serve("shop:app", "--bind", address, wait=False)
        assert server.ends() == 1
        assert f"cannot bind {address}: Address already in use" in server.err


def test_own_sockets(serve: Serve) -> None:
    path = str(serve.folder / "web.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    server = serve("shop:valid", "--bind", f"unix:{path}", "--bind", ":0", "--set", "unix_socket_perms=640")
    assert os.stat(path).st_mode & 0o777 == 0o640
    assert server.addresses[0] == path
    port = server.addresses[1][1]
    found = environ(server)
    assert (found["SERVER_NAME"], found["SERVER_PORT"]) == ("localhost", "80")
    assert (found["REMOTE_ADDR"], found["REMOTE_PORT"]) == ("", "")
    with Client(("127.0.0.1", port)) as client:
        assert client.get("/pid").status == 200
    twice = serve("shop:app", "--bind", f"unix:{path}", wait=False)
    assert twice.ends() == 1
    assert "Address already in use" in twice.err
    server.term()
    assert server.ends() == 0
    assert not os.path.exists(path)
    assert "Traceback" not in server.err


# --- Sockets from a supervisor, and word to it ---------------------------------------------------------------------


def test_listen_fds(serve: Serve) -> None:
    path = str(serve.folder / "held.sock")
    with (
        listener() as v4,
        listener(socket.AF_INET6, ("::1", 0)) as v6,
        listener(socket.AF_UNIX, path) as unix,
    ):
        server = serve("shop:valid", sockets=(v4, v6, unix), env={"LISTEN_FDNAMES": "a:b:c"})
        assert [each if isinstance(each, str) else each[0] for each in server.addresses] == ["127.0.0.1", "::1", path]
        names = []
        for number in range(3):
            with server.client(number) as client:
                found = json.loads(client.get("/x").body)
                names.append((found["SERVER_NAME"], found["REMOTE_ADDR"]))
                assert found["wsgi.multiprocess"] is True
        assert names == [("127.0.0.1", "127.0.0.1"), ("[::1]", "::1"), ("localhost", "")]
        seen = json.loads(server.get("/environ").body)[0]
        assert [name for name in seen if name.startswith("LISTEN_")] == []
        server.term()
        assert server.ends() == 0
        assert os.path.exists(path)  # it is not ours
        for each in (v4, v6, unix):  # they still listen, for the next one
            with Client(each.getsockname()[:2] if each.family != socket.AF_UNIX else path) as client:
                client.send(b"GET /x HTTP/1.1\r\n\r\n")
    assert "Traceback" not in server.err


def test_an_inherited_backlog_is_kept(serve: Serve) -> None:
    with listener() as held:
        serve(sockets=(held,)).get("/pid")
        # TCP_INFO of a listener: tcpi_sacked, the sixth 32-bit field, is its backlog.
        info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(info[28:32], sys.byteorder) == 128


def test_listen_pid_of_another_process(serve: Serve) -> None:
    with listener() as held:
        server = serve("shop:app", "--bind=127.0.0.1:0", sockets=(held,), env={"LISTEN_PID": "1"})
        assert "LISTEN_FDS is for process 1" in server.err
        assert len(server.addresses) == 1
        assert server.addresses[0][1] != held.getsockname()[1]


def test_a_descriptor_that_is_no_listener(serve: Serve) -> None:
    with socket.socket() as plain:
        server = serve(sockets=(plain,), wait=False)
        assert server.ends() == 1
        assert "descriptor 3 of LISTEN_FDS=1 is no listening stream socket" in server.err


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(serve: Serve, abstract: bool) -> None:
    (serve.folder / "slow.py").write_text("open('gate').read()\nfrom shop import app\n")
    fifo = serve.fifo("gate")
    name = f"\0procman-test-{os.getpid()}" if abstract else str(serve.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        receiver.settimeout(0.5)
        server = serve("slow:app", env={"NOTIFY_SOCKET": name.replace("\0", "@")}, wait=False)
        with pytest.raises(TimeoutError):
            receiver.recv(100)  # not before the application is there
        receiver.settimeout(LIMIT)
        release(fifo)
        assert receiver.recv(100) == b"READY=1"
        server.wait_until_served()
        assert "NOTIFY_SOCKET" not in json.loads(server.get("/environ").body)[0]
        server.term()
        assert receiver.recv(100) == b"STOPPING=1"
        assert server.ends() == 0


def test_it_sleeps_when_idle(serve: Serve) -> None:
    server = serve()
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/status")

    def switches() -> int:
        return int(path.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def still() -> bool:
        before = switches()
        time.sleep(0.2)
        return switches() == before

    with server.client() as client:
        client.get("/pid")
        wait_until(still)
        before = switches()
        time.sleep(1.5)
        assert switches() == before


def test_without_descriptors_it_waits_and_recovers(serve: Serve) -> None:
    server = serve("shop:app", "--no-access-log")
    assert server.get("/pid").status == 200
    used = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 2, used + 2))
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(4)]
        assert clients[0].get("/pid").status == 200
        assert clients[1].get("/pid").status == 200
        wait_until(lambda: "cannot accept a connection for now: Too many open files" in server.err)
        clients[0].sock.close()
        clients[1].sock.close()
        assert clients[2].get("/pid").status == 200
        assert clients[3].get("/pid").status == 200
    assert server.err.count("cannot accept") < 5


# --- The stop that no client notices -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(serve: Serve, number: int) -> None:
    server = serve()
    server.get("/pid")
    began = time.monotonic()
    server.term(number)
    assert server.ends() == 0
    assert time.monotonic() - began < 5
    assert "Traceback" not in server.err


def test_a_running_request_is_answered(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0")
    fifo = serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
        server.term()
        heard(server)
        release(fifo)
        answer = client.answer()
        assert (answer.body, answer.closes) == (b"waited", True)
        assert client.until_end() == b""
    assert server.ends() == 0


def test_an_idle_connection_gets_its_next_request_answered(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=20")
    with server.client() as client, server.client() as fresh:
        assert not client.get("/pid").closes
        server.term()
        heard(server)
        for each in (client, fresh):
            answer = each.get("/pid")
            assert (answer.status, answer.closes) == (200, True)
            assert each.until_end() == b""
    assert server.ends() == 0


def test_http_1_0_keep_alive_is_closed_too(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=20")
    with server.client() as client:
        assert not client.get("/pid", version="1.0", headers="Connection: keep-alive\r\n").closes
        server.term()
        heard(server)
        answer = client.get("/pid", version="1.0", headers="Connection: keep-alive\r\n")
        assert [line for line in answer.lines if line.lower().startswith("connection")] == ["Connection: close"]
        assert client.until_end() == b""
    assert server.ends() == 0


def test_an_idle_connection_is_closed_after_the_grace(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0.3")
    with server.client() as client, server.client():
        client.get("/pid")
        began = time.monotonic()
        server.term()
        assert client.until_end() == b""
        assert 0.25 < time.monotonic() - began < 5
    assert server.ends() == 0


def test_a_signal_that_interrupts_nothing_is_heard(serve: Serve) -> None:
    """One that comes just before poll(2) does not end it, and Python calls its function only after it. Rare; here the
    kernel gives the signal to another thread, which is the same."""
    server = serve("shop:app")
    fifo = serve.fifo("gate")
    assert server.get("/aside?gate").status == 200
    release(fifo)
    assert server.ends() == 0


def test_pipelined_requests_are_all_answered(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0", "--threads=1")
    fifo = serve.fifo("gate")
    # More than waitress reads at once (8192 bytes), so that some still wait in the kernel when the drain begins.
    padding = f"X-Padding: {'p' * 1000}\r\n"
    with server.client() as client:
        client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
        client.send(f"GET /pid HTTP/1.1\r\nHost: a\r\n{padding}\r\n".encode() * 30)
        server.term()
        heard(server)
        release(fifo)
        answers = [client.answer() for _ in range(31)]
        assert [answer.status for answer in answers] == [200] * 31
        assert [answer.closes for answer in answers] == [False] * 30 + [True]
        assert client.until_end() == b""
    assert server.ends() == 0


def test_a_slow_upload_is_waited_for(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0")
    with server.client() as body, server.client() as head, server.client() as expecting:
        body.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
        head.send(b"GET /pid HTT")
        expecting.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert expecting.answer().status == 100
        server.term()
        heard(server)
        time.sleep(0.3)  # silence must not count as idle here
        body.send(b"678")
        head.send(b"P/1.1\r\nHost: a\r\n\r\n")
        expecting.send(b"hello")
        body.send(b"90")
        for client, expected in (
            (body, b"1234567890"),
            (head, str(server.process.pid).encode()),
            (expecting, b"hello"),
        ):
            answer = client.answer()
            assert (answer.body, answer.closes) == (expected, True)
            assert client.until_end() == b""
    assert server.ends() == 0


def test_a_line_end_after_a_request_is_no_request(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0.1")
    with server.client() as client:
        client.get("/pid")
        client.send(b"\r\n")
        server.term()
        assert client.until_end() == b""
    assert server.ends(5) == 0


def test_requests_in_the_queue_are_answered(serve: Serve) -> None:
    server = serve("shop:app", "--threads=2", "--idle-grace=0")
    gates = [serve.fifo("gate1"), serve.fifo("gate2")]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(12)]
        for client, gate in zip(clients, gates, strict=False):
            client.send(f"GET /wait?{gate.name} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(lambda: server.err.count("entered gate") == 2)
        for client in clients[2:]:
            client.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
        server.term()
        heard(server)
        for gate in gates:
            release(gate)
        for client in clients:
            answer = client.answer()
            assert (answer.status, answer.closes) == (200, True)
            assert client.until_end() == b""
    assert server.ends() == 0
    assert server.err.count("all threads are busy") == 1  # not one line a request


def test_an_answer_that_had_begun_is_finished(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0.2")
    fifo = serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /headfirst?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
        server.term()
        heard(server)
        release(fifo)
        answer = client.answer()  # its head was sent before: the connection counts as idle afterwards
        assert (answer.body, answer.closes) == (b"headtail", False)
        assert client.until_end() == b""
    assert server.ends() == 0


def test_a_slow_reader_gets_all_of_it(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0.1")
    with server.client() as client:
        client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.sock.recv(1, socket.MSG_PEEK)
        server.term()
        heard(server)
        time.sleep(0.5)
        assert len(client.answer().body) == 32 << 20
    assert server.ends() == 0


def test_bytes_after_the_last_answer_do_not_destroy_it(serve: Serve) -> None:
    """A close with unread bytes is a RST, and a client loses what it has not read yet."""
    server = serve("shop:app", "--idle-grace=5")
    with server.client() as client:
        client.get("/pid")
        server.term()
        heard(server)
        client.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: server.out.count("/pid") == 2)
        for _ in range(20):
            client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\n")
            time.sleep(0.01)
        assert server.process.poll() is None  # it waits for our close
        assert client.answer().closes
        assert client.until_end() == b""
    assert server.ends() == 0


def test_a_client_that_never_closes_delays_it_by_the_grace_only(serve: Serve) -> None:
    server = serve("shop:app", "--idle-grace=0.3")
    with server.client() as client:
        client.get("/pid")
        server.term()
        heard(server)
        assert client.get("/pid").closes
        assert server.ends(5) == 0


def test_a_running_request_is_finished_though_its_client_has_gone(serve: Serve) -> None:
    server = serve("shop:app", "--set", "channel_request_lookahead=1")  # so that it sees the client go
    fifo = serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
    server.term()
    heard(server)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.3)
    release(fifo)
    assert server.ends() == 0


def test_a_request_whose_client_has_gone_is_cut_off_too(serve: Serve) -> None:
    server = serve("shop:app", "--set", "channel_request_lookahead=1", "--drain-timeout=0.4")
    serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
    server.term()
    assert server.ends() == 1
    assert "1 request cut off" in server.err


@pytest.mark.parametrize("kind", ["running", "upload", "unread"])
def test_drain_timeout(serve: Serve, kind: str) -> None:
    server = serve("shop:app", "--drain-timeout=0.4", "--idle-grace=0", "--threads=1")
    serve.fifo("gate")
    with server.client() as client, server.client() as other:
        if kind == "upload":
            client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
            other.get("/pid")
        elif kind == "unread":
            client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.sock.recv(1)
        else:
            client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: "entered gate" in server.err)
            other.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: "all threads are busy" in server.err)
        server.term()
        assert server.ends(8) == 1
    count = "2 requests" if kind == "running" else "1 request"
    assert f"the drain timeout of 0.4 s is over: {count} cut off" in server.err


def test_a_drain_timeout_that_cuts_nothing_is_clean(serve: Serve) -> None:
    server = serve("shop:app", "--drain-timeout=0.2", "--idle-grace=20")
    with server.client() as client:
        client.get("/pid")
        server.term()
        assert server.ends(8) == 0


def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    server = serve()
    serve.fifo("gate")
    with server.client() as client:
        client.send(b"GET /wait?gate HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "entered gate" in server.err)
        server.term()
        heard(server)
        server.term(signal.SIGINT)
        assert server.ends(5) == 1
    assert "a second SIGINT" in server.err


def test_a_signal_while_importing_ends_it(serve: Serve) -> None:
    (serve.folder / "slow.py").write_text(
        "import sys\nprint('here', file=sys.stderr, flush=True)\nopen('gate').read()\n"
    )
    serve.fifo("gate")
    server = serve("slow:app", wait=False)
    wait_until(lambda: "here" in server.err)
    server.term()
    assert server.ends(5) == -signal.SIGTERM


def test_a_fork_of_the_application_dies_alone(serve: Serve) -> None:
    server = serve()
    assert server.get("/fork").body == b"-15"
    assert server.get("/pid").status == 200
    assert server.process.poll() is None


def test_connections_in_its_own_queue_are_answered(serve: Serve) -> None:
    """Whatever connect(2) has accepted for us is answered, even if accept(2) comes after the signal."""
    server = serve("shop:app", "--idle-grace=5")
    server.process.send_signal(signal.SIGSTOP)
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(5)]
        for client in clients:
            client.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
        server.term()
        server.process.send_signal(signal.SIGCONT)
        for client in clients:
            answer = client.answer()
            assert answer.status == 200
            while not answer.closes:  # a thread may get the signal, a moment after the first connection was served
                answer = client.get("/pid")
            assert client.until_end() == b""
    assert server.ends() == 0


# --- what it tells of itself ----------------------------------------------------------------------------------------


def figures(path: Path) -> dict[str, Any]:
    """What `--stats` tells."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT)
        sock.connect(str(path))
        data = b""
        while chunk := sock.recv(4096):
            data += chunk
    found: dict[str, Any] = json.loads(data)
    return found


def test_stats(serve: Serve) -> None:
    stats, fifo = serve.folder / "stats", serve.fifo("gate")
    server = serve("shop:app", f"--stats={stats}", "--threads=1")
    assert stat.S_IMODE(stats.stat().st_mode) == 0o600
    idle = {"threads": 1, "requests": 0, "average_seconds": None, "in_flight": 0, "queue": 0, "connections": 0}
    assert figures(stats) == {"pid": server.process.pid, **idle}
    for target in ("/pid", "/raise", "/nothing"):  # an error is an answer, too
        server.get(target)
    with server.client() as first, server.client() as second:
        first.send(b"NONSENSE\r\n\r\n")
        assert first.answer().status == 400
        second.send(f"GET /wait?{fifo} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(lambda: f"entered {fifo}" in server.err)
        with server.client() as third:
            third.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: figures(stats)["queue"] == 1)
            now = figures(stats)
            assert (now["requests"], now["in_flight"]) == (4, 1)
            assert 0 < now["average_seconds"] < LIMIT
            server.term()  # while it drains, too
            assert figures(stats)["in_flight"] == 1
            release(fifo)
            assert (second.answer().status, third.answer().status) == (200, 200)
            wait_until(lambda: not stats.exists() or figures(stats)["requests"] == 6)
    assert server.ends() == 0
    assert not stats.exists()


def test_what_waits_is_left_to_others(serve: Serve) -> None:
    """--leave-waiting: a busy server accepts nobody, and all the same answers who is connected."""
    stats, fifo = serve.folder / "stats", serve.fifo("gate")
    server = serve("shop:app", f"--stats={stats}", "--threads=1", "--leave-waiting")
    with server.client() as kept, server.client() as busy:
        for client in (kept, busy):
            client.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.answer().status == 200
        busy.send(f"GET /wait?{fifo} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(lambda: f"entered {fifo}" in server.err)
        with server.client() as late:
            late.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            kept.send(b"GET /pid HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: figures(stats)["queue"] == 1)
            assert figures(stats)["connections"] == 2
            release(fifo)
            assert [client.answer().status for client in (busy, kept, late)] == [200] * 3
    server.term()
    assert server.ends() == 0


def test_stats_after_a_sigkill(serve: Serve) -> None:
    stats = serve.folder / "stats"
    first = serve("shop:app", f"--stats={stats}")
    first.process.kill()
    first.ends()
    assert stats.is_socket()
    second = serve("shop:app", f"--stats={stats}")
    assert figures(stats)["pid"] == second.process.pid


@pytest.mark.parametrize("place", ["nowhere/stats", "taken"])
def test_stats_that_cannot_be_told_hinder_nobody(serve: Serve, place: str) -> None:
    (serve.folder / "taken").touch()
    server = serve("shop:app", f"--stats={serve.folder / place}")
    assert f"--stats {serve.folder / place}: " in server.err
    assert server.get("/pid").status == 200
    server.term()
    assert server.ends() == 0
    assert (serve.folder / "taken").exists()


def test_who_asks_for_stats_and_does_not_listen_hinders_nobody(serve: Serve) -> None:
    stats = serve.folder / "stats"
    server = serve("shop:app", f"--stats={stats}")
    with ExitStack() as stack:
        for _ in range(50):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(stats))  # waits for room in the queue
        assert server.get("/pid").status == 200
        assert figures(stats)["requests"] >= 0


@pytest.mark.parametrize("seconds", [[0.5], [0.1, 0.3], [1.0] * 64 + [2.0] * 1000])
def test_the_mean_of_the_last_requests(seconds: list[float]) -> None:
    count = wsgi._Count()
    for each in seconds:
        count.add(each)
    assert count.answered == len(seconds)
    assert count.seconds == pytest.approx(seconds[-1] if len(seconds) > 100 else sum(seconds) / len(seconds), rel=1e-3)


@dataclass
class Load:
    """Clients in threads that ask all the time, and count."""

    address: Any
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, keep_alive: int, close: int) -> None:
        """Some keep their connection until the server closes it, some have one for each request."""
        for number in range(keep_alive + close):
            thread = threading.Thread(target=self.run, args=(number < keep_alive,))
            self.threads.append(thread)
            thread.start()

    def run(self, keep_alive: bool) -> None:
        """One client."""
        while not self.stop.is_set():
            try:
                with Client(self.address) as client:
                    while not self.stop.is_set():
                        answer = client.get("/pid", headers="" if keep_alive else "Connection: close\r\n")
                        assert answer.status == 200
                        self.answered += 1
                        if answer.closes:
                            break
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))

    def end(self) -> None:
        """Stops them all."""
        self.stop.set()
        for thread in self.threads:
            thread.join(LIMIT)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_replacing_processes_under_load_fails_no_request(serve: Serve, kind: str) -> None:
    path = str(serve.folder / "web.sock")
    with listener() if kind == "tcp" else listener(socket.AF_UNIX, path) as held:
        servers = [serve(sockets=(held,)) for _ in range(2)]
        load = Load(servers[0].addresses[0])
        load.start(keep_alive=4, close=4)
        try:
            for number in range(4):
                old = servers[number]
                wait_until(lambda goal=load.answered + 50: load.answered > goal)  # type: ignore[misc]
                servers.append(serve(sockets=(held,)))
                old.term()
                assert old.ends() == 0
        finally:
            load.end()
        assert load.failed == []
        assert load.answered > 200
        assert [each.err for each in servers if "Traceback" in each.err] == []

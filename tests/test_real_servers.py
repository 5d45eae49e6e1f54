"""The plans of servers.py against the real gunicorn, uWSGI and built-in server, with real sites.

No daemon here: a few lines hand over the sockets as procman's keeper does, so that what fails is the plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest

from procman import probes, wsgi
from procman.config import Address, Listener
from procman.servers import Plan, Request, plan, told_at
from tests.harness import PROJECT, group, wait_until
from tests.sites.django_site import APP as DJANGO_APP
from tests.sites.django_site import django_site

SITES = PROJECT / "tests" / "sites"
BIN = Path(sys.prefix) / "bin"
MODULES = {"gunicorn": "gunicorn", "uwsgi": "pyuwsgi", "wsgi": "waitress"}

# Becomes the server with the given descriptors as 3, 4, ... and says so as sd_listen_fds(3) wants it.
HAND_OVER = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ["LISTEN_FDS"] = str(len(high))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


class UnixHTTP(HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Running:
    """A real server, started by its plan."""

    def __init__(
        self, planned: Plan, sockets: list[socket.socket], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.plan = planned
        self.sockets = sockets
        self.output = folder / f"output-{time.monotonic_ns()}"
        self._notified = b""
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify_path = f"{self.output}.notify"
        self._notify.bind(notify_path)
        self._notify.setblocking(False)
        whole = {key: value for key, value in os.environ.items() if key not in {"LISTEN_FDS", "LISTEN_PID"}}
        whole |= {
            "PATH": f"{BIN}:{whole['PATH']}",
            "PYTHONPATH": str(PROJECT),
            **dict(planned.environment),
            **environment,
        }
        whole.pop("NOTIFY_SOCKET", None)
        if planned.notify:
            whole["NOTIFY_SOCKET"] = notify_path
        fds = [sock.fileno() for sock in sockets]
        words = ",".join(str(fd) for fd in fds)
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HAND_OVER, words, *planned.argv],
                pass_fds=fds,
                cwd=environment.get("SITE", SITES),
                env=whole,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said_ready(self) -> bool:
        """READY=1 has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._notified += self._notify.recv(4096) + b"\n"
        return b"READY=1" in self._notified.splitlines()

    def is_ready(self, within: float) -> bool:
        """Whether it becomes what the plan calls ready within so many seconds."""
        try:
            if self.plan.ready.kind == "notify":
                wait_until(self.said_ready, within)
            else:
                probe = probes.wait_ready(self.plan.ready, no_command, lambda reason: None)
                asyncio.run(asyncio.wait_for(probe, within))
        except (AssertionError, TimeoutError):
            return False
        return True

    def wait_ready(self) -> None:
        """Waits until it is ready; fails with the server's output."""
        if not self.is_ready(30):
            pytest.fail(f"not ready\n{self.output.read_text(errors='replace')}")

    def get(self, path: str = "/", listener: int = 0, timeout: float = 20.0) -> tuple[int, str]:
        """Status and body of one request to a listener."""
        name = self.sockets[listener].getsockname()
        connection = UnixHTTP(name) if isinstance(name, str) else HTTPConnection(name[0], name[1])
        connection.timeout = timeout
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Host": "localhost", "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def stop(self) -> tuple[int, float]:
        """Sends the plan's stop signal and returns the exit status, and the seconds that it took."""
        begun = time.monotonic()
        self.process.send_signal(self.plan.stop_signal)
        try:
            status = self.process.wait(self.plan.stop_timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {self.plan.stop_timeout} s\n{self.output.read_text(errors='replace')}")
        return status, time.monotonic() - begun

    def group_is_empty(self) -> bool:
        """Nothing of the server is left, nor of its workers. Zombies do not count: init reaps them when it likes."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return not group(self.process.pid)

    def close(self) -> None:
        """Ends whatever is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._notify.close()
        wait_until(self.group_is_empty)


async def no_command(argv: tuple[str, ...]) -> int:
    raise AssertionError(f"no plan runs a command: {argv}")


Serve = Callable[..., Running]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers from requests; ends them after the test."""
    running: list[Running] = []
    sockets: list[socket.socket] = []

    def start(request: Request, on: list[socket.socket] | None = None, **environment: object) -> Running:
        if on is None:
            on = [socket.create_server(("127.0.0.1", 0), backlog=100)]
        sockets.extend(on)
        listen = tuple(Listener(name=f"l{i}", address=address_of(sock)) for i, sock in enumerate(on))
        planned = plan(replace(request, listen=listen, runtime_dir=str(tmp_path)))
        where = told_at(request.server, planned.argv)
        if where:
            Path(where).parent.mkdir(mode=0o700, exist_ok=True)  # as the daemon does
        running.append(Running(planned, on, tmp_path, {key: str(value) for key, value in environment.items()}))
        return running[-1]

    yield start
    for each in running:
        each.close()
    for sock in sockets:
        sock.close()


def address_of(sock: socket.socket) -> Address:
    name = sock.getsockname()
    return Address("unix", path=name) if isinstance(name, str) else Address("tcp", name[0], name[1])


BASIC = Request(
    server="gunicorn",
    name="site",
    program="site",
    instance=1,
    app="flask_site:app",
    workers=0,
    threads=0,
    listen=(),
    options={},
    middleware=(),
    access_log=True,
    virtualenv="",
    python=sys.executable,
    wsgi_script=str(Path(wsgi.__file__)),
    site=str(Path(str(importlib.util.find_spec("waitress").origin)).parent.parent),  # type: ignore[union-attr]
    runtime_dir="",
    stop_timeout=None,
)
SERVERS = {
    "gunicorn": BASIC,
    "gunicorn without control socket": replace(BASIC, options={"no-control-socket": True}),
    "gunicorn preloaded, threads": replace(BASIC, threads=2, workers=2, options={"preload": True}),
    "gunicorn of a virtualenv": replace(BASIC, virtualenv=sys.prefix),
    "uwsgi": replace(BASIC, server="uwsgi"),
    "uwsgi lazy": replace(BASIC, server="uwsgi", workers=2, options={"lazy-apps": True}),
    "uwsgi threads": replace(BASIC, server="uwsgi", threads=2),
    "uwsgi of a virtualenv": replace(BASIC, server="uwsgi", virtualenv=sys.prefix),
    "wsgi": replace(BASIC, server="wsgi"),
    "wsgi of a virtualenv": replace(BASIC, server="wsgi", virtualenv=sys.prefix),
}


def parameters(*names: str) -> pytest.MarkDecorator:
    """The test runs with each of these rows of SERVERS; one whose server is not installed says so."""
    rows = []
    for name in names:
        module = MODULES[SERVERS[name].server]
        missing = importlib.util.find_spec(module) is None
        rows.append(pytest.param(SERVERS[name], id=name, marks=pytest.mark.skipif(missing, reason=f"needs {module}")))
    return pytest.mark.parametrize("request_", rows)


every_server = parameters("gunicorn", "uwsgi", "wsgi")
every_row = parameters(*SERVERS)


# --- readiness --------------------------------------------------------------------------------------------------------


@every_row
def test_ready_means_that_a_worker_serves(serve: Serve, request_: Request, tmp_path: Path) -> None:
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    server = serve(request_, IMPORT_MARK=mark, IMPORT_GATE=gate)
    wait_until(mark.exists, 20)
    assert not server.is_ready(0.5)  # the listener is open, and gunicorn has even said READY=1
    gate.touch()
    server.wait_ready()
    assert server.get() == (200, "flask\n")


@parameters("gunicorn")
def test_why_gunicorn_is_not_asked_by_notify(
    serve: Serve, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, gunicorn has learnt to say READY=1 when it serves, and its plan can be simpler."""
    honest = plan
    monkeypatch.setattr("tests.test_real_servers.plan", lambda asked: replace(honest(asked), notify=True))
    server = serve(request_, IMPORT_GATE=tmp_path / "never")
    wait_until(server.said_ready, 20)
    with pytest.raises(TimeoutError):
        server.get(timeout=0.5)


@every_server
def test_an_application_that_is_not_there_ends_the_server(serve: Serve, request_: Request) -> None:
    server = serve(replace(request_, app="no_such_site:app"))
    assert server.process.wait(20) > 0
    assert wait_until(server.group_is_empty)
    assert not server.said_ready()
    assert "no_such_site" in server.output.read_text()


# --- listeners --------------------------------------------------------------------------------------------------------


@every_server
def test_all_listeners_are_served_and_stay_open(serve: Serve, request_: Request, tmp_path: Path) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "site.sock"))
    unix.listen(100)
    sockets = [socket.create_server(("127.0.0.1", 0)), unix, socket.create_server(("127.0.0.1", 0))]
    if socket.has_ipv6:
        with contextlib.suppress(OSError):  # compiled in, but not switched on here
            sockets.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
    server = serve(request_, sockets)
    server.wait_ready()
    for number in range(len(sockets)):
        assert server.get(listener=number) == (200, "flask\n")
    server.stop()
    assert (tmp_path / "site.sock").is_socket()
    with ThreadPoolExecutor(len(sockets)) as clients:
        # These connect while nobody serves, and the next server answers them.
        waiting = [clients.submit(server.get, listener=number) for number in range(len(sockets))]
        serve(request_, sockets)
        assert [each.result() for each in waiting] == [(200, "flask\n")] * len(sockets)


# --- stop -------------------------------------------------------------------------------------------------------------


@parameters("gunicorn", "gunicorn preloaded, threads", "uwsgi", "uwsgi lazy", "uwsgi threads", "wsgi")
def test_stop_answers_what_is_worked_on(serve: Serve, request_: Request, tmp_path: Path) -> None:
    server = serve(request_)
    server.wait_ready()
    mark = tmp_path / "begun"
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(server.get, f"/slow?s=1&mark={quote(str(mark))}")
        wait_until(mark.exists)
        status, seconds = server.stop()
        assert answer.result() == (200, "slept\n")
    assert status == 0
    assert seconds > 0.5
    assert wait_until(server.group_is_empty)


@parameters("gunicorn", "uwsgi", "uwsgi lazy", "wsgi")
def test_stop_while_the_application_is_imported(serve: Serve, request_: Request, tmp_path: Path) -> None:
    options = dict(request_.options) | ({"graceful-timeout": 1} if request_.server == "gunicorn" else {})
    mark = tmp_path / "begun"
    server = serve(replace(request_, options=options), IMPORT_MARK=mark, IMPORT_GATE=tmp_path / "never")
    wait_until(mark.exists, 20)
    _, seconds = server.stop()
    assert seconds < 6
    assert wait_until(server.group_is_empty)


@parameters("uwsgi", "uwsgi lazy")
def test_uwsgi_can_be_stopped_at_any_moment_of_its_start(serve: Serve, request_: Request) -> None:
    """Its masters and workers ignore different signals in different phases; a stop that is lost lasts until SIGKILL.

    One in some hundred is lost on a busy machine all the same, where it comes between two of its handlers: then the
    next one must do.
    """
    lost = 0
    for step in range(8):
        server = serve(replace(request_, stop_timeout=10.0))
        time.sleep(step * 0.04)  # nothing to wait for: the moment itself is what varies
        server.process.send_signal(server.plan.stop_signal)
        try:
            server.process.wait(server.plan.stop_timeout)
        except subprocess.TimeoutExpired:
            lost += 1
            server.stop()
        assert wait_until(server.group_is_empty)
    assert lost <= 1


@parameters("uwsgi")
def test_why_uwsgi_may_not_reload_by_sighup(serve: Serve, request_: Request) -> None:
    """If this fails, uWSGI has learnt to keep sockets of LISTEN_FDS over a reload, and the plan can allow it."""
    server = serve(request_)
    server.wait_ready()
    server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(20) != 0


@parameters("uwsgi")
def test_sigterm_by_hand_ends_uwsgi(serve: Serve, request_: Request) -> None:
    """Its worker may serve before the master has done with its start, when it ignores SIGTERM: whoever sends it by hand
    sends it again then. (A stop by procman is another signal, for that reason.)"""
    server = serve(request_)
    server.wait_ready()

    def ended() -> bool:
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(2)
        return server.process.returncode is not None

    wait_until(ended, 20)
    assert server.process.returncode == 0


# --- the rest ---------------------------------------------------------------------------------------------------------


@parameters("gunicorn")
def test_two_gunicorns_have_a_control_socket_each(serve: Serve, request_: Request) -> None:
    shop, blog = (serve(replace(request_, name=name)) for name in ("shop", "blog"))
    paths = []
    for server in (shop, blog):
        server.wait_ready()
        assert server.plan.ready.address
        paths.append(Path(server.plan.ready.address.path))
    shop.stop()
    assert [path.is_socket() for path in paths] == [False, True]
    blog.wait_ready()
    assert blog.get() == (200, "flask\n")


@every_server
def test_a_factory(serve: Serve, request_: Request) -> None:
    server = serve(replace(request_, app="flask_site:make()"))
    server.wait_ready()
    assert server.get() == (200, "flask\n")


@parameters("gunicorn", "uwsgi", "wsgi")
@pytest.mark.parametrize(("workers", "threads"), [(3, 0), (0, 3)], ids=["workers", "threads"])
def test_workers_and_threads(serve: Serve, request_: Request, tmp_path: Path, workers: int, threads: int) -> None:
    at = tmp_path / "at"
    at.mkdir()
    first = serve(replace(request_, workers=workers, threads=threads))
    # Of the built-in server procman runs as many as there are workers, on one socket.
    more = [serve(replace(request_, threads=threads), first.sockets) for _ in range(1, first.plan.processes)]
    for server in (first, *more):
        server.wait_ready()
    with ThreadPoolExecutor(3) as clients:
        paths = [f"/together?n=3&at={quote(str(at))}&mark={number}" for number in range(3)]
        assert [answer for _, answer in clients.map(first.get, paths)] == ["together\n"] * 3


@pytest.fixture(scope="module")
def django(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Django project; its folder."""
    pytest.importorskip("django")
    return django_site(tmp_path_factory.mktemp("django"))


@every_server
def test_django(serve: Serve, request_: Request, django: Path) -> None:
    server = serve(replace(request_, app=DJANGO_APP, workers=2), SITE=django)
    server.wait_ready()
    assert server.get() == (200, "django 0 sessions\n")
    assert server.get("/nothing")[0] == 404
    assert server.stop()[0] == 0

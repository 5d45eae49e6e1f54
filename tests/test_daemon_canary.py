"""A canary: a share of new connections goes to the successor, and what comes of them decides."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import MakeDaemon
from tests.harness import SUPERVISOR, RunningDaemon, command_line, free_port, wait_until

SITE = '''
import os, sys, time
FOLDER = os.environ["SITE_FOLDER"]
VERSION = open(f"{FOLDER}/version").read().strip()
count = 0
def app(environ, start_response):
    global count
    count += 1
    head = [("Content-Type", "text/plain"), ("Content-Length", str(len(VERSION))), ("X-Version", VERSION)]
    if VERSION == "dies" and count == 5:
        os._exit(9)
    if environ["PATH_INFO"] == "/health":
        ill = VERSION == "ill" and count > 1
        start_response("503 Service Unavailable" if ill else "200 OK", head)
        return [VERSION.encode()]
    if VERSION == "hangs":
        time.sleep(1000)
    if VERSION == "picky" and environ["HTTP_HOST"] != "here":
        raise RuntimeError("no such host")
    if VERSION == "raises" and count % 3 == 0:
        raise RuntimeError("a third of its requests")
    start_response("500 Internal Server Error" if VERSION == "fails" and count % 3 == 0 else "200 OK", head)
    return [VERSION.encode()]
'''

SERVERS = {
    "wsgi": 'server = "wsgi"',
    "gunicorn": 'server = "gunicorn"\nserver_options = { access-logfile = "-" }',
    "uwsgi": 'server = "uwsgi"',
}


COMMAND = 'command = ["${PYTHON}", "-m", "procman.wsgi", "release:app"]\nready = { notify = true }'


class Visitors:
    """A load: every request is a new connection. `seen` counts (status, version); lost ones have the status 0."""

    def __init__(self, port: int, threads: int = 3) -> None:
        self._port = port
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.seen: collections.Counter[tuple[int, str]] = collections.Counter()
        self._threads = [threading.Thread(target=self._visit) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _visit(self) -> None:
        while not self._end.wait(0.002):
            met = visit(self._port)
            with self._lock:
                self.seen[met] += 1

    def take(self) -> collections.Counter[tuple[int, str]]:
        """What was seen since the last time."""
        with self._lock:
            seen, self.seen = self.seen, collections.Counter()
        return seen


def visit(port: int) -> tuple[int, str]:
    """Status and version of one answer."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        while data := sock.recv(65536):
            answer += data
    head = answer.partition(b"\r\n\r\n")[0].decode()
    if not head.startswith("HTTP/"):
        return 0, ""
    versions = [line.partition(": ")[2] for line in head.split("\r\n") if line.lower().startswith("x-version")]
    return int(head.split()[1]), versions[0] if versions else "?"


class Site:
    """The daemon with the program `web`, and the port that it listens on."""

    def __init__(self, make: MakeDaemon, folder: Path, lines: str) -> None:
        self.folder = folder
        self.port = free_port()
        (folder / "release.py").write_text(SITE)
        self.release("one")
        app = 'app = "release:app"' if "server" in lines else ""
        self.table = (
            f'[program.web]\n{lines}\n{app}\nlisten = "127.0.0.1:{self.port}"\ndirectory = "{folder}"\n'
            f'environment = {{ SITE_FOLDER = "{folder}" }}\nstart_seconds = 0\n'
        )
        self.daemon: RunningDaemon = make(self.table)
        for name in self.daemon.status():
            self.daemon.wait_for(name, timeout=30)

    def release(self, version: str) -> None:
        """What starts from now on is this version."""
        (self.folder / "version").write_text(version)

    def beside(self, name: str = "web") -> dict[str, Any]:
        found: dict[str, Any] = self.daemon.status()[name]["beside"] or {}
        return found

    def canary(self) -> dict[str, Any]:
        """How the canary stands, when it is under way."""
        stands: dict[str, Any] = wait_until(
            lambda: next((i["beside"]["canary"] for i in self.infos() if i["beside"]), {}), 30
        )
        return stands

    def infos(self) -> list[dict[str, Any]]:
        return list(self.daemon.status().values())

    @contextlib.contextmanager
    def reloading(self, **params: Any) -> Iterator[list[Any]]:
        """A reload that waits, in another thread, begun; its result is there after the block."""
        result: list[Any] = []

        def reload() -> None:
            with self.daemon.client(120) as client:
                result.extend(client.call("reload", names=["web"], **params))

        thread = threading.Thread(target=reload)
        thread.start()
        try:
            yield result
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("server", "version"),
    [("wsgi", "fails"), ("gunicorn", "fails"), ("uwsgi", "fails"), ("gunicorn plain", "raises")],
)
def test_a_release_that_fails_every_third_request(
    daemon: MakeDaemon, tmp_path: Path, server: str, version: str
) -> None:
    """It is rolled back by itself, and few have met it. A gunicorn without an access log tells by its tracebacks."""
    lines = SERVERS.get(server, 'server = "gunicorn"')
    site = Site(daemon, tmp_path, lines)
    before = site.daemon.status()["web"]["pid"]
    site.release(version)
    with Visitors(site.port) as visitors:
        wait_until(lambda: visitors.seen[200, "one"] > 20, 30)
        visitors.take()
        done = site.daemon.ctl("reload", "web", "--canary", "10%", "--for", "2m", timeout=100)
        during = visitors.take()
        wait_until(lambda: visitors.seen[200, "one"] > 50, 30)
        after = visitors.take()
    assert done.returncode == 1, done.stdout
    reason = "tracebacks (before: 0)" if version == "raises" else "answers were 5xx (before: 0 of"
    assert "the canary failed: " in done.stderr
    assert reason in done.stderr
    assert f"rolled back, pid {before} serves as before" in done.stderr
    total, met = during.total(), during.total() - during[200, "one"]
    assert during[0, ""] == 0, during
    assert during[200, version] > 0, during
    assert met <= 0.3 * total, during
    assert set(after) == {(200, "one")}, after
    info = site.daemon.status()["web"]
    assert (info["pid"], info["beside"]) == (before, None)


@pytest.mark.parametrize("server", SERVERS)
def test_a_good_release_is_promoted(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """The key says so; what is seen meanwhile is shown."""
    site = Site(daemon, tmp_path, f'{SERVERS[server]}\ncanary = "30% for 6s"')
    site.release("two")
    with Visitors(site.port) as visitors, site.reloading() as result:
        wait_until(lambda: site.canary()["answers"] and site.canary()["before"]["answers"])
        stands = site.canary()
        assert (stands["share"], stands["errors"], stands["tracebacks"]) == (0.3, 0, 0)
        assert {"exits", "output", "5xx"} <= set(stands["watched"])
        shown = site.daemon.ctl("status").stdout
        assert "  canary" in shown
        assert "30% of new connections" in shown
        assert visitors.seen[200, "one"]
    assert result[0]["ok"], result
    assert "promoted: its canary of 30% for 6 s went well, 0 of " in result[0]["why"]
    assert {status for status, _ in visitors.seen} == {200}
    assert [visit(site.port) for _ in range(5)] == [(200, "two")] * 5
    said = site.daemon.ctl("events").stdout
    assert "what=canary share=0.3 seconds=6" in said
    assert "what=promoted" in said


def test_by_hand(daemon: MakeDaemon, tmp_path: Path) -> None:
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    before = site.daemon.status()["web"]["pid"]
    for verb in ("promote", "rollback"):
        done = site.daemon.ctl(verb, "web")
        assert done.returncode == 1
        assert "no canary is under way for web" in done.stderr
    site.release("two")
    with site.reloading(canary=0.5, canary_seconds=600) as result:
        assert site.canary()["seconds_left"] > 500
        done = site.daemon.ctl("rollback", "web")
        assert done.returncode == 0, done.stderr
        assert "rollback by uid" in done.stdout
        assert site.daemon.status()["web"]["pid"] == before
    assert not result[0]["ok"]
    assert f"rolled back, pid {before} serves as before" in result[0]["why"]
    assert not result[0].get("output")  # it has printed nothing that explains anything
    assert visit(site.port) == (200, "one")
    with site.reloading(canary=0.5) as result:
        assert site.canary()["seconds_left"] > 100
        done = site.daemon.ctl("promote", "web")
        assert done.returncode == 0, done.stderr
        assert "promoted by uid" in done.stdout
        assert visit(site.port) == (200, "two")
    assert result[0]["ok"], result


@pytest.mark.parametrize(("version", "reason"), [("dies", "did not stay up: "), ("ill", "its http probe failed: ")])
def test_one_that_dies_or_is_ill(daemon: MakeDaemon, tmp_path: Path, version: str, reason: str) -> None:
    site = Site(daemon, tmp_path, f'{SERVERS["wsgi"]}\nready = {{ http = "/health" }}')
    before = site.daemon.status()["web"]["pid"]
    site.release(version)
    with Visitors(site.port, threads=1 if version == "dies" else 0):
        done = site.daemon.ctl("reload", "web", "--canary", "40%", timeout=100)
    assert done.returncode == 1
    assert reason in done.stderr, done.stderr
    assert site.daemon.status()["web"]["pid"] == before
    assert [visit(site.port) for _ in range(20)] == [(200, "one")] * 20


@pytest.mark.parametrize("server", SERVERS)
def test_one_that_answers_nothing(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """It is asked: nobody else does, in this time. However short the canary is."""
    site = Site(daemon, tmp_path, f'{SERVERS[server]}\nstop_timeout = "3s"')
    before = site.daemon.status()["web"]["pid"]
    site.release("hangs")
    with site.reloading(canary=0.01, canary_seconds=1) as result:
        assert "answers" in site.canary()["watched"]
    reason = f"does not answer at 127.0.0.1:{site.port}, where the one before does: no answer within 3 s"
    assert reason in result[0]["why"], result
    assert site.daemon.status()["web"]["pid"] == before
    assert [visit(site.port) for _ in range(20)] == [(200, "one")] * 20


@pytest.mark.parametrize("lines", ['server = "wsgi"', COMMAND], ids=["wsgi", "command"])
def test_one_that_accepts_nothing(daemon: MakeDaemon, tmp_path: Path, lines: str) -> None:
    """Of a command nobody knows whether it speaks HTTP: who waits in its queue tells."""
    site = Site(daemon, tmp_path, f'{lines}\nstop_timeout = "1s"')
    before = site.daemon.status()["web"]["pid"]
    site.release("two")
    with Visitors(site.port), site.reloading(canary=0.2, canary_seconds=600) as result:
        assert ("answers" in site.canary()["watched"]) == ("server" in lines)
        assert "queue" in site.canary()["watched"]
        os.kill(site.beside()["pid"], signal.SIGSTOP)
    assert "in its queue since 10 s, and nobody accepts" in result[0]["why"] or "does not answer" in result[0]["why"]
    assert site.daemon.status()["web"]["pid"] == before
    assert [visit(site.port) for _ in range(20)] == [(200, "one")] * 20


@pytest.mark.parametrize("server", ["wsgi", "gunicorn"])
def test_what_asks_it_is_no_visitor(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """A successor that answers it with errors is alive, and they condemn nobody: what visitors get counts."""
    site = Site(daemon, tmp_path, SERVERS[server])
    site.release("picky")
    with site.reloading(canary=0.5, canary_seconds=600) as result:
        wait_until(lambda: "RuntimeError: no such host" in site.daemon.log("web"), 20)
        assert visit(site.port)[0] == 200
        assert site.canary()["tracebacks"] == 0
        assert site.canary()["errors"] == 0
        assert site.daemon.ctl("promote", "web").returncode == 0
    assert result[0]["ok"], result


def test_one_that_speaks_no_http(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A file of settings has it speak TLS: neither version answers, and nobody is condemned for it."""
    key, settings = tmp_path / "pem", tmp_path / "gunicorn.conf.py"
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=here -keyout {key} -out {key}"
    subprocess.run(made.split(), check=True, capture_output=True)
    settings.write_text(f'certfile = keyfile = "{key}"\n')
    site = Site(daemon, tmp_path, f'server = "gunicorn"\nserver_options = {{ config = "{settings}" }}')
    before = site.daemon.status()["web"]["pid"]
    with site.reloading(canary=0.5, canary_seconds=0.1) as result:
        pass
    assert result[0]["ok"], result
    assert site.daemon.status()["web"]["pid"] != before


def test_all_processes_of_a_program_together(daemon: MakeDaemon, tmp_path: Path) -> None:
    site = Site(daemon, tmp_path, f"{SERVERS['wsgi']}\nworkers = 2")
    before = {info["pid"] for info in site.infos()}
    done = site.daemon.ctl("reload", "web:1", "--canary", "10%")
    assert done.returncode == 2
    assert "web:2, which has the same listener, is not replaced with web:1" in done.stderr
    site.release("two")
    with site.reloading(canary=0.5, canary_seconds=600) as result:
        wait_until(lambda: all((info["beside"] or {}).get("canary") for info in site.infos()), 30)
        wait_until(lambda: visit(site.port) == (200, "two"), 30)
        wait_until(lambda: visit(site.port) == (200, "one"), 30)
        done = site.daemon.ctl("promote", "web")
        assert done.returncode == 0, done.stderr
    assert [one["ok"] for one in result] == [True, True]
    assert not before & {info["pid"] for info in site.infos()}
    assert {visit(site.port) for _ in range(20)} == {(200, "two")}


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_who_does_not_run_is_not_in_the_way(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    """And when it is started meanwhile, on a socket that may close, that start waits for the end of it: longer than a
    start may take."""
    site = Site(daemon, tmp_path, f"{SERVERS['wsgi']}\nworkers = 2\nstart_timeout = 3\nstart_retries = 0")
    assert site.daemon.ctl("stop", "web:2").returncode == 0
    site.release("two")
    with site.reloading(canary=0.5, canary_seconds=600):
        site.canary()
        with site.daemon.client() as client:
            client.call("start", names=["web:2"], wait=False)
        wait_until(lambda: "its start waits: web:1, which has the same listener" in site.daemon.said())
        end = time.monotonic() + 4
        while time.monotonic() < end:
            now = site.daemon.status()["web:2"]
            assert (now["state"], now["pid"]) == ("STARTING", None)
        assert "it waits: web:1, which has the same listener, is being replaced" in now["why"]
        assert site.daemon.ctl(verb, "web:1").returncode == 0
    site.daemon.wait_for("web:2", timeout=30)
    # It serves on the socket that is left: when the other one has stopped, it alone answers.
    assert site.daemon.ctl("stop", "web:1").returncode == 0
    assert {visit(site.port) for _ in range(10)} == {(200, "two")}


def test_without_its_canary(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Where there can't be the one of the table, that is said to who asked, and stays on record."""
    site = Site(daemon, tmp_path, f'{SERVERS["wsgi"]}\nworkers = 2\ncanary = "10%"')
    said = "without its canary: web:2, which has the same listener, is not replaced with web:1"
    done = site.daemon.ctl("reload", "web:1")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert said in site.daemon.ctl("why", "web:1").stdout
    assert said in site.daemon.ctl("events").stdout


def test_a_canary_of_another_listener(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Where only one of the two versions listens, nothing is shared out; what nobody names any more closes."""
    site = Site(daemon, tmp_path, f'{SERVERS["wsgi"]}\ncanary = "60% for 10m"')
    both, one = f'["127.0.0.1:{site.port}", "127.0.0.1:{(other := free_port())}"]', f'"127.0.0.1:{site.port}"'

    def apply(listen: str, version: str) -> None:
        site.release(version)
        site.daemon.write_table(site.table.replace(f'listen = {one}', f"listen = {listen}"))
        with site.daemon.client(60) as client:
            answer: list[Any] = []
            applying = threading.Thread(target=lambda: answer.append(client.call("apply")))
            applying.start()
            site.canary()
            wait_until(lambda: visit(site.port) == (200, version), 20)
            if listen == one:
                assert {visit(other) for _ in range(20)} == {(200, "two")}
            assert site.daemon.ctl("promote", "web").returncode == 0
            applying.join()
            assert not answer[0].get("failed"), answer

    apply(both, "two")
    assert {visit(port) for port in (site.port, other) for _ in range(5)} == {(200, "two")}
    apply(one, "three")
    assert visit(site.port) == (200, "three")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", other))
    apply(both, "four")
    assert {visit(port) for port in (site.port, other) for _ in range(5)} == {(200, "four")}


def test_a_change_to_another_listener_has_no_canary(daemon: MakeDaemon, tmp_path: Path) -> None:
    """It is said before, and then. A release that fails leaves nothing bound."""
    site = Site(daemon, tmp_path, f'{SERVERS["wsgi"]}\ncanary = "60% for 10m"')
    other = free_port()
    said = "without its canary: the new version has none of the listeners of the one before"
    site.daemon.write_table(site.table.replace(f"127.0.0.1:{site.port}", f"127.0.0.1:{other}"))
    assert said in site.daemon.ctl("apply", "--dry-run").stdout
    site.release("broken")
    (tmp_path / "release.py").write_text("1 / 0")
    done = site.daemon.ctl("apply")
    assert done.returncode == 1
    assert visit(site.port) == (200, "one")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", other))
    site.release("two")
    (tmp_path / "release.py").write_text(SITE)
    done = site.daemon.ctl("apply")
    assert done.returncode == 0, done.stderr
    assert f"web: {said}" in done.stdout
    assert visit(other) == (200, "two")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", site.port))


@pytest.mark.parametrize("server", ["gunicorn", "uwsgi"])
def test_one_whose_workers_die(daemon: MakeDaemon, tmp_path: Path, server: str) -> None:
    """The server itself lives on, and starts others."""
    site = Site(daemon, tmp_path, SERVERS[server])
    site.release("dies")
    with Visitors(site.port):
        done = site.daemon.ctl("reload", "web", "--canary", "40%", timeout=100)
    assert done.returncode == 1
    assert "of its workers died (before: 0)" in done.stderr, done.stderr
    assert [visit(site.port) for _ in range(20)] == [(200, "one")] * 20


@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_a_stop_wins(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    with site.reloading(canary=0.5, canary_seconds=600) as result:
        site.canary()
        pid = site.beside()["pid"]
        done = site.daemon.ctl(verb, "web")
        assert done.returncode == 0, done.stderr
        info = site.daemon.status()["web"]
        assert info["state"] == ("STOPPED" if verb == "stop" else "RUNNING")
        assert info["beside"] is None
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not result[0]["ok"]


def test_the_supervisor_dies_in_a_canary(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next one rolls back; a command that waits asks again, so there is another canary."""
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    before = site.daemon.status()["web"]["pid"]
    site.release("two")
    with Visitors(site.port) as visitors:
        with site.daemon.client(60) as client:
            client.call("reload", names=["web"], canary=0.2, canary_seconds=600, wait=False)
        site.canary()
        wait_until(lambda: visitors.seen[200, "two"])
        os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not site.beside(), 30)
        assert site.daemon.status()["web"]["pid"] == before
        assert {status for status, _ in visitors.take()} == {200}
        wait_until(lambda: visitors.seen.total() > 30)
        assert set(visitors.take()) == {(200, "one")}
    assert "rolled back: the supervisor was replaced during its canary" in site.daemon.said()
    done: list[Any] = []
    waiting = threading.Thread(
        target=lambda: done.append(site.daemon.ctl("reload", "web", "--canary", "20%", "--for", "10m", timeout=100))
    )
    waiting.start()
    for _ in range(2):
        first = wait_until(lambda: site.canary() and site.beside().get("pid"), 30)
        os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: site.canary() and site.beside().get("pid") != first, 30)  # noqa: B023
    assert site.daemon.ctl("promote", "web").returncode == 0
    waiting.join()
    assert done[0].returncode == 0, done[0].stderr
    assert visit(site.port) == (200, "two")


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_the_supervisor_dies_after_the_decision(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    """What was decided comes about, and no other canary follows."""
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    site.release("two")
    with site.daemon.client(60) as client:
        client.call("reload", names=["web"], canary=0.2, canary_seconds=600, wait=False)
    site.canary()
    with site.daemon.client(60) as client:
        client.call(verb, names=["web"], wait=False)
    wait_until(lambda: site.beside().get("canary") is None, 30)
    if site.beside():
        os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: site.infos()[0]["beside"] is None, 30)
    assert visit(site.port) == (200, "two" if verb == "promote" else "one")


def test_the_supervisor_dies_at_any_moment(daemon: MakeDaemon, tmp_path: Path) -> None:
    """In the trial, the canary, and after it: the command that waits ends with the new version, and nobody is lost."""
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    with Visitors(site.port, threads=1) as visitors:
        for number in range(6):
            site.release(f"v{number}")
            with site.daemon.client(60) as client:
                client.call("reload", names=["web"], canary=0.5, canary_seconds=0.4, wait=False)
            begun = time.monotonic()
            wait_until(lambda: time.monotonic() - begun > 0.2 + number * 0.2)  # noqa: B023
            os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
            done = site.daemon.ctl("reload", "web", "--canary", "50%", "--for", "400ms")
            assert done.returncode == 0, (number, done.stderr)
            assert visit(site.port) == (200, f"v{number}")
    assert {status for status, _ in visitors.seen} == {200}, visitors.seen


def test_the_keeper_dies_in_a_canary(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next daemon keeps the one before, and ends the other."""
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    before = site.daemon.status()["web"]["pid"]
    site.release("two")
    with site.daemon.client(60) as client:
        client.call("reload", names=["web"], canary=0.5, canary_seconds=600, wait=False)
    site.canary()
    beside = site.beside()["pid"]
    site.daemon.look()
    os.kill(site.daemon.keeper_pid, signal.SIGKILL)
    assert site.daemon.process is not None
    site.daemon.process.wait(10)
    wait_until(lambda: not any(SUPERVISOR in command_line(seen.pid) for seen in site.daemon.seen))
    site.daemon.start()
    assert site.daemon.wait_for("web", timeout=30)["pid"] == before
    wait_until(lambda: not Path(f"/proc/{beside}").exists())
    assert {visit(site.port) for _ in range(50)} == {(200, "one")}
    done = site.daemon.ctl("reload", "web", "--canary", "50%", "--for", "100ms")
    assert done.returncode == 0, done.stderr
    assert {visit(site.port) for _ in range(20)} == {(200, "two")}


def test_apply_has_the_canary_of_the_table(daemon: MakeDaemon, tmp_path: Path) -> None:
    site = Site(daemon, tmp_path, SERVERS["wsgi"])
    site.release("fails")
    site.daemon.write_table(f'{site.table}umask = 7\ncanary = "20% for 2m"\n')
    with Visitors(site.port) as visitors:
        done = site.daemon.ctl("apply", timeout=100)
        assert visitors.seen[200, "fails"]
    assert done.returncode == 1
    assert "answers were 5xx" in done.stderr + done.stdout
    waits = [line for line in done.stderr.splitlines() if "waits for its canary" in line]
    what = "20% of new connections go to its successor for 120 s; procmanctl promote or rollback decides at once"
    assert waits == [f"procmanctl: web: waits for its canary: {what}"]
    assert [visit(site.port) for _ in range(10)] == [(200, "one")] * 10


def test_where_there_can_be_none(daemon: MakeDaemon, tmp_path: Path) -> None:
    running = daemon(
        f'[program.web]\ncommand = ["sleep", "1000"]\nlisten = "unix:{tmp_path}/s"\n'
        '[program.job]\ncommand = ["sleep", "1000"]\n'
    )
    for name, reason in (("web", "a canary needs TCP"), ("job", "a canary needs a listener")):
        done = running.ctl("reload", name, "--canary", "10%")
        assert done.returncode == 2
        assert reason in done.stderr
    done = running.ctl("reload", "web", "--for", "2m")
    assert done.returncode == 2

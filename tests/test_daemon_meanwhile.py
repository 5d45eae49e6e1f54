"""What is asked for, and what happens, in the midst of a reload: nobody who waits at one of its two sockets is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import free_port, wait_until
from tests.test_daemon_units import Shop


class Patient(Shop):
    """Servers that leave in the queue what they can't work on yet."""

    def __init__(self, daemon: MakeDaemon, tmp_path: Path, count: int) -> None:
        self.count = count
        super().__init__(daemon, tmp_path, "")

    def table(self, more: str, variables: str = "") -> str:
        return f"""
            [program.shop]
            command = ["${{PYTHON}}", "-m", "procman.wsgi", "--threads=1", "--leave-waiting", "release:app"]
            instances = {self.count}
            directory = "{self.folder}"
            listen = "{self.address}"
            ready.notify = true
            environment = {{ SITE_FOLDER = "{self.folder}" }}
            start_seconds = 0.2
        """

    def passed(self) -> bool:
        """Whether the successors have taken over, and those before run dry."""
        beside = [info["beside"] for info in self.running.status().values()]
        return all(each and each["role"] == "the one before" for each in beside)

    def visit(self, count: int) -> list[socket.socket]:
        """So many who ask for something that takes 0.1 s."""
        return [self.connect("/?work=100") for _ in range(count)]


def answered(clients: Sequence[socket.socket]) -> int:
    """How many get their answer."""
    good = 0
    for client in clients:
        with client, contextlib.suppress(OSError):
            client.settimeout(30)
            good += client.recv(4096).startswith(b"HTTP/1.1 200")
    return good


def passed_with_queue(
    daemon: MakeDaemon, tmp_path: Path, visits: int
) -> tuple[Patient, subprocess.Popen[str], list[socket.socket]]:
    """Successors have taken over, and so many wait for the ones before."""
    shop = Patient(daemon, tmp_path, 3)
    shop.version("two")
    with shop.gate():
        reload = shop.running.begin("reload", "shop")
        wait_until(shop.beside, 20)
    wait_until(lambda: "shop:3 (successor): STARTING" in shop.running.said(), 20)
    clients = shop.visit(visits)
    wait_until(shop.passed, 20)
    return shop, reload, clients


@pytest.mark.parametrize("command", ["stop shop:2", "restart shop:2", "restart shop", "stop shop"])
def test_who_waits_for_the_one_before_is_answered_whatever_is_asked_for(
    daemon: MakeDaemon, tmp_path: Path, command: str
) -> None:
    shop, reload, clients = passed_with_queue(daemon, tmp_path, 100)
    done = shop.running.ctl(*command.split())
    if command == "stop shop":
        assert done.returncode == 0
        shop.good("start", "shop")
    assert answered(clients) == 100
    said = reload.communicate(timeout=60)[0]
    assert "rolled back" not in said
    if command.startswith("stop"):
        assert "it was stopped meanwhile: stop by uid" in said
        assert (reload.returncode, done.returncode) == (1, 0)
    states = {name: info["state"] for name, info in shop.running.status().items()}
    assert states.pop("shop:2") == ("STOPPED" if command == "stop shop:2" else "RUNNING")
    assert set(states.values()) == {"RUNNING"}
    assert not shop.beside()


@pytest.mark.parametrize("command", ["stop shop:2", "rollback shop", "restart shop"])
def test_who_has_met_a_canary_is_answered_whatever_is_asked_for(
    daemon: MakeDaemon, tmp_path: Path, command: str
) -> None:
    shop = Patient(daemon, tmp_path, 3)
    shop.version("two")
    reload = shop.running.begin("reload", "shop", "--canary", "50%", "--for", "60s")
    wait_until(lambda: [one for one in shop.beside() if one["canary"]], 20)
    clients = shop.visit(200)
    done = shop.running.ctl(*command.split())
    assert answered(clients) == 200
    said = reload.communicate(timeout=60)[0]
    assert (reload.returncode, done.returncode) == (1, 0)
    assert "rolled back" in said
    assert ("serve as before" in said) == (command == "rollback shop")


@pytest.mark.parametrize("count", [1, 2])
def test_who_waits_for_a_successor_that_falls_is_answered(daemon: MakeDaemon, tmp_path: Path, count: int) -> None:
    """By the other one, or by one more of those before; only what it had accepted goes with it."""
    shop = Patient(daemon, tmp_path, count)
    shop.version("two")
    reload = shop.running.begin("reload", "shop")
    wait_until(shop.passed, 20)
    clients = shop.visit(20)
    name = "shop:1" if count > 1 else "shop"
    os.kill(shop.pids()[name], signal.SIGKILL)
    assert answered(clients) >= 18  # it works on one, and may have accepted one more
    assert "rolled back" in reload.communicate(timeout=60)[0]
    assert reload.returncode == 1
    assert "(the one before): STOPP" not in shop.running.said()
    assert {info["state"] for info in shop.running.status().values()} == {"RUNNING"}


PROBED = """
import os
FOLDER = os.environ["SITE_FOLDER"]
VERSION = open(FOLDER + "/version").read()
def app(environ, start_response):
    head = [("Content-Length", "3"), ("X-Version", VERSION)]
    if environ["PATH_INFO"] == "/health":
        with open(f"{FOLDER}/port.{VERSION}.new", "w") as file:
            file.write(environ["REMOTE_PORT"])
        os.rename(f"{FOLDER}/port.{VERSION}.new", f"{FOLDER}/port.{VERSION}")
        start_response("503 Service Unavailable" if VERSION == "two" else "200 OK", head)
    else:
        start_response("200 OK", head)
    return [b"ok\\n"]
"""


def test_nobody_meets_a_release_on_trial_by_the_port_of_its_probe(daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text(PROBED)
    (tmp_path / "version").write_text("one")
    port = free_port()
    running = daemon(f"""
        [program.shop]
        server = "wsgi"
        app = "release:app"
        directory = "{tmp_path}"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/health" }}
        environment = {{ SITE_FOLDER = "{tmp_path}" }}
        start_timeout = "5s"
    """)
    running.wait_for("shop", timeout=20)
    (tmp_path / "version").write_text("two")
    reload = running.begin("reload", "shop")
    wait_until((tmp_path / "port.two").exists, 20)
    met: list[bytes] = []
    while reload.poll() is None:
        with socket.socket() as visitor, contextlib.suppress(OSError):
            visitor.settimeout(5)
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            visitor.bind(("127.0.0.1", int((tmp_path / "port.two").read_text())))
            visitor.connect(("127.0.0.1", port))
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            met.append(visitor.recv(4096))
    reload.communicate()
    assert reload.returncode == 1
    assert met
    assert not [answer for answer in met if b"X-Version: one" not in answer]


def test_the_last_order_counts(daemon: MakeDaemon, tmp_path: Path) -> None:
    """A restart and a stop wait until who waits is answered. What is asked for in that time is what they find."""
    shop, reload, clients = passed_with_queue(daemon, tmp_path, 100)
    restart = shop.running.begin("restart", "shop:1", "shop:2")
    stop = shop.running.begin("stop", "shop:3")
    wait_until(lambda: "shop:3: stop by uid" in shop.running.said() and "shop:2: restart by" in shop.running.said())
    assert shop.running.ctl("stop", "shop:2").returncode == 0
    assert shop.running.ctl("start", "shop:3").returncode == 0
    assert answered(clients) == 100
    assert "shop:2" in restart.communicate(timeout=60)[0]
    for each in (reload, stop):
        each.communicate(timeout=60)
    assert restart.returncode == 1
    states = {name: info["state"] for name, info in shop.running.status().items()}
    assert states == {"shop:1": "RUNNING", "shop:2": "STOPPED", "shop:3": "RUNNING"}


def test_a_restart_that_follows_is_no_failure_of_a_reload(daemon: MakeDaemon, tmp_path: Path) -> None:
    shop, reload, clients = passed_with_queue(daemon, tmp_path, 20)
    assert shop.running.ctl("restart", "shop").returncode == 0
    assert answered(clients) == 20
    assert "failed" not in reload.communicate(timeout=60)[0]
    assert reload.returncode == 0


DEAF = """
import os, socket, time
listener = socket.socket(fileno=3)
with open(os.path.join(os.path.dirname(__file__), "version")) as file:
    version = file.read()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
notify.send(b"READY=1")
print("up", version, flush=True)
while True:
    time.sleep(1)
"""


def test_two_stops_of_one_each_are_a_stop_of_all(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Those before accept nobody: no process is started for who waits there, as all of it stops."""
    port = free_port()
    (tmp_path / "deaf.py").write_text(DEAF)
    (tmp_path / "version").write_text("one")
    running = daemon(f"""
        [program.shop]
        command = ["${{PYTHON}}", "{tmp_path}/deaf.py"]
        instances = 2
        listen = "127.0.0.1:{port}"
        ready.notify = true
        start_seconds = 0.1
        stop_timeout = "2s"
    """)
    for name in ("shop:1", "shop:2"):
        running.wait_for(name)
    with socket.create_connection(("127.0.0.1", port)):
        (tmp_path / "version").write_text("two")
        reload = running.begin("reload", "shop")

        def passed() -> bool:
            beside = [info["beside"] for info in running.status().values()]
            return all(each and each["role"] == "the one before" for each in beside)

        wait_until(passed, 20)
        first = running.begin("stop", "shop:1")
        running.wait_for("shop:1", "STOPPED")
        assert running.ctl("stop", "shop:2").returncode == 0
        for each in (first, reload):
            each.communicate(timeout=60)
    assert "one more process" not in running.said()
    assert {info["state"] for info in running.status().values()} == {"STOPPED"}

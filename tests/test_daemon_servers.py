"""Every server that a program can name, in one real daemon, over TCP and over a Unix socket.

tests/test_real_servers.py shows each plan by itself; here the whole way counts: table, sockets, readiness, restart and
stop.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until
from tests.loss.client import Plan
from tests.loss.load import loads

SITES = Path(__file__).parent / "sites"


@dataclass(frozen=True)
class Case:
    """One server. `options` are its server_options; `told` says whether they have reached it, from what it answers to
    GET /scope (ASGI) or /env, its headers, and its log. `several`: one program listens on both sockets."""

    server: str
    options: str
    told: Callable[[str, Message, str], bool]
    more: str = ""
    app: str = "asgi_site:app"
    module: str = ""
    several: bool = True
    processes: int = 1

    def names(self) -> list[tuple[str, str]]:
        """(process, "tcp" or "unix") for each socket."""
        if self.several:
            return [(self.server, "tcp"), (self.server, "unix")]
        return [(f"{self.server}-tcp", "tcp"), (f"{self.server}-unix", "unix")]


def root_path(body: str, headers: Message, log: str) -> bool:
    return bool(json.loads(body)["root_path"] == "/told")


CASES = [
    Case(
        "gunicorn",
        '{ env = "TOLD=yes" }',
        lambda body, headers, log: json.loads(body).get("TOLD") == "yes",
        more="workers = 2",
        app="flask_site:app",
    ),
    Case(
        "uwsgi",
        '{ add-header = "Told: yes" }',
        lambda body, headers, log: headers["Told"] == "yes",
        more="workers = 2",
        app="flask_site:app",
        module="pyuwsgi",
    ),
    Case(
        "wsgi",
        '{ ident = "told" }',
        lambda body, headers, log: headers["Server"] == "told",
        app="flask_site:app",
        module="waitress",
    ),
    Case("uvicorn", '{ root-path = "/told" }', root_path, more="workers = 2", several=False),
    Case("hypercorn", '{ root-path = "/told" }', root_path, more="workers = 2"),
    Case("daphne", '{ server-name = "told" }', lambda body, headers, log: headers["Server"] == "told"),
    Case(
        "granian",
        "{ access-log = true }",
        lambda body, headers, log: '"GET /scope ' in log,
        more="workers = 2",
        several=False,
    ),
]
INSTALLED = [case for case in CASES if importlib.util.find_spec(case.module or case.server)]


class Site:
    """A socket of a program, and how to ask it."""

    def __init__(self, case: Case, process: str, kind: str, folder: Path) -> None:
        self.case, self.process, self.kind = case, process, kind
        self.port = free_port() if kind == "tcp" else 0
        self.path = folder / f"{process}.sock"
        self.listen = f"127.0.0.1:{self.port}" if kind == "tcp" else f"unix:{self.path}"

    def get(self, path: str) -> tuple[int, str, Message]:
        """Status, body and headers."""
        connection = HTTPConnection("127.0.0.1", self.port or 80, timeout=20)
        with contextlib.closing(connection):
            if self.kind == "unix":
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(20)
                connection.sock.connect(str(self.path))
            connection.request("GET", path, headers={"Host": "localhost", "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def hello(self) -> tuple[int, str]:
        return self.get("/")[:2]


def table(sites: list[Site], gate: Path) -> str:
    text = ""
    for case in INSTALLED:
        mine = [site for site in sites if site.case == case]
        for process in dict.fromkeys(site.process for site in mine):
            listen = [site.listen for site in mine if site.process == process]
            text += f"""
                [program.{process}]
                server = "{case.server}"
                app = "{case.app}"
                listen = {json.dumps(listen)}
                server_options = {case.options}
                directory = "{SITES}"
                environment = {{ IMPORT_MARK = "{gate}.{process}", IMPORT_GATE = "{gate}" }}
                {case.more}
                """
    return text


def ready(daemon: RunningDaemon, processes: list[str]) -> None:
    for process in processes:
        daemon.wait_for(process, timeout=40)


def test_every_server_over_tcp_and_a_unix_socket(daemon: MakeDaemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = daemon("", start=False)
    sites = [Site(case, *name, running.folder) for case in INSTALLED for name in case.names()]
    processes = list(dict.fromkeys(site.process for site in sites))
    running.write_table(table(sites, gate))
    running.start()

    # Ready only when it serves: the sockets are open, and the applications are still being imported.
    wait_until(lambda: all(Path(f"{gate}.{process}").exists() for process in processes), 60)
    states = {name: info["state"] for name, info in running.status().items()}
    assert states == dict.fromkeys(processes, "STARTING")
    gate.touch()
    ready(running, processes)

    # Each answers, and its options have reached it.
    for site in sites:
        assert site.hello() == (200, site.case.app.partition("_")[0] + "\n"), site.process
        _, body, headers = site.get("/env" if "flask" in site.case.app else "/scope")

        def told(site: Site = site, body: str = body, headers: Message = headers) -> bool:
            return site.case.told(body, headers, running.log(site.process))

        wait_until(told, what=f"the options of {site.process}: {headers}, {body}")

    # A restart refuses nobody, and the modes of the Unix sockets are ours.
    before = running.status()
    plans = [Plan(site.listen, ("get/close",), connections=2, rate=10) for site in sites]
    with loads(plans) as asked:
        done = running.ctl("restart", "all")
        assert done.returncode == 0, done.stderr
        ready(running, processes)
        for load in asked:
            load.wait(1)
    after = running.status()
    assert not [process for process in processes if before[process]["pid"] == after[process]["pid"]]
    for site, load in zip(sites, asked, strict=True):
        assert "refused" not in load.result.total.failed, (site.listen, list(load.result.lines()))
    assert {site.path.stat().st_mode & 0o777 for site in sites if site.kind == "unix"} == {0o660}

    # A stop leaves nothing.
    running.look()
    children = {seen for seen in running.seen if seen.pid not in (running.keeper_pid, running.supervisor_pid)}
    done = running.ctl("stop", "all")
    assert done.returncode == 0, done.stderr
    assert not [seen for seen in children if seen.alive()]
    assert all(info["state"] == "STOPPED" for info in running.status().values())
    assert "SIGKILL" not in running.said()


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "granian"])
def test_a_failed_lifespan_is_a_failed_start(daemon: MakeDaemon, server: str) -> None:
    pytest.importorskip(server)
    running = daemon(
        f"""
        [program.site]
        server = "{server}"
        app = "asgi_site:app"
        listen = "127.0.0.1:{free_port()}"
        directory = "{SITES}"
        environment = {{ LIFESPAN = "fail" }}
        start_retries = 0
        """
    )
    assert running.wait_for("site", "FATAL", timeout=20)["exit"]["code"] != 0

"""`procmanctl daemon upgrade` with versions that are really installed one over the other: nobody notices."""

from __future__ import annotations

import http.client
import os
import re
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Self

import pytest

from procman import __version__
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, free_port, wait_until
from tests.installed import Installed, broken, build

SITES = Path(__file__).parent / "sites"

NEW = "91.0"

MISTAKES = {
    "import": ("ground.py", "import asyncio\n", "import asyncio_of_the_future\n"),
    "start": (
        "supervisor.py",
        "        self.snapshot = snapshot\n",
        '        raise RuntimeError("a bug of the new one")\n',
    ),
    "keeper": ("keeper/handover.py", "VERSION = 1", "VERSION = 2"),
}
"""What makes a new version fail: it can't be imported, it fails at its first real work, it knows no such keeper."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    good = {version: build(folder, version) for version in (__version__, NEW)}
    return good | {name: broken(good[NEW], folder / name, *change) for name, change in MISTAKES.items()}


@pytest.fixture
def installed(tmp_path: Path, wheels: dict[str, Path]) -> Installed:
    return Installed(tmp_path / "environment", wheels[__version__])


class Visitors:
    """Requests on a port, one after the other, each on a connection of its own, until the end of the block."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=20) as answer:
                    assert answer.read() == b"flask\n"
                self.answers += 1
            except OSError as error:
                self.failures.append(repr(error))


@pytest.fixture
def running(daemon: MakeDaemon, installed: Installed) -> RunningDaemon:
    """A daemon of the present version with a site, numbered lines, and a program that ends on command."""
    port = free_port()
    made = daemon(
        f"""
        [program.site]
        server = "wsgi"
        app = "flask_site:app"
        directory = "{SITES}"
        listen = "127.0.0.1:{port}"
        [program.lines]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/writer.py 500"
        log = {{ max_size = "64KB", keep = 1000 }}
        [program.once]
        command = "sh -c 'read line < fifo; exit 7'"
        directory = "{{folder}}"
        start_seconds = 0
        restart = "never"
        """.replace("{folder}", "${HOME}"),
        installed=installed,
        start=False,
    )
    os.mkfifo(made.folder / "fifo")
    made.start()
    for name in ("site", "lines", "once"):
        made.wait_for(name, timeout=30)
    return made


def port_of(running: RunningDaemon) -> int:
    found = re.search(r"127.0.0.1:(\d+)", running.table.read_text())
    assert found
    return int(found[1])


def pids(running: RunningDaemon) -> dict[str, int]:
    return {name: info["pid"] for name, info in running.status().items()}


def lines(running: RunningDaemon) -> list[int]:
    """The numbers of all lines that `lines` has printed, from the oldest file to the newest."""
    files = sorted(
        running.log_dir.glob("lines.log*"), key=lambda path: -int(path.suffix[1:]) if path.suffix != ".log" else 1
    )
    text = b"".join(path.read_bytes() for path in files)
    return [int(line.split()[0]) for line in text.splitlines()]


def one_line_each(running: RunningDaemon) -> None:
    """The output of `lines` is complete and in order. It is stopped for that: nothing may be rotated meanwhile."""
    assert running.ctl("stop", "lines").returncode == 0
    status = running.json("show", "lines")["log"][0]
    assert (status["dropped"], status["read"]) == (0, status["written"])
    numbers = lines(running)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 100


def test_another_version(running: RunningDaemon, installed: Installed, wheels: dict[str, Path]) -> None:
    before, keeper = pids(running), running.keeper_pid
    kept = http.client.HTTPConnection("127.0.0.1", port_of(running), timeout=20)
    kept.request("GET", "/")
    assert kept.getresponse().read() == b"flask\n"
    connection = kept.sock
    installed.install(wheels[NEW])
    with Visitors(port_of(running)) as visitors:
        wait_until(lambda: visitors.answers > 3)
        done = running.ctl("daemon", "upgrade")
        assert done.returncode == 0, (done.stderr, running.said())
        assert done.stdout == f"upgraded from {__version__} to {NEW}; 3 processes went on\n"
        many = visitors.answers
        wait_until(lambda: visitors.answers > many + 3)
    assert visitors.failures == []
    assert pids(running) == before
    assert [info["restarts"] for info in running.status().values()] == [0, 0, 0]
    kept.request("GET", "/")
    assert kept.getresponse().read() == b"flask\n"
    assert kept.sock is connection, "the same connection as before"
    kept.close()
    status = running.json("daemon", "status")
    assert [status[key] for key in ("version", "keeper_version", "upgrades", "keeper_pid")] == [NEW, NEW, 1, keeper]
    # The new code is as good a daemon as the one before: ends, crashes, operations, and the way back.
    (running.folder / "fifo").write_text("go\n")
    assert running.wait_for("once", "EXITED")["exit"]["code"] == 7
    os.kill(running.supervisor_pid, signal.SIGKILL)
    wait_until(running.answers)
    assert running.ctl("restart", "site").returncode == 0
    assert pids(running)["site"] != before["site"]
    installed.install(wheels[__version__])
    assert f"from {NEW} to {__version__}" in running.ctl("daemon", "upgrade").stdout
    one_line_each(running)
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("mistake", "why"),
    [
        ("import", "No module named 'asyncio_of_the_future'"),
        ("start", "the new supervisor ended before it was ready"),
        ("keeper", "writes its table in version 1, this code reads 2"),
    ],
)
def test_a_version_that_can_not_start(
    running: RunningDaemon, installed: Installed, wheels: dict[str, Path], mistake: str, why: str
) -> None:
    before, supervisor = pids(running), running.supervisor_pid
    installed.install(wheels[mistake])
    with Visitors(port_of(running)) as visitors:
        wait_until(lambda: visitors.answers > 3)
        done = running.ctl("daemon", "upgrade")
    assert done.returncode == 1, (done.stdout, running.said())
    assert why in done.stderr
    assert "the daemon was not upgraded" in done.stderr
    assert f"version {__version__} goes on" in done.stderr
    assert visitors.failures == []
    assert (pids(running), running.supervisor_pid) == (before, supervisor)
    status = running.json("daemon", "status")
    assert [status[key] for key in ("version", "keeper_version", "upgrades")] == [__version__, __version__, 0]
    assert why in status["upgrade_problem"]
    assert why in running.ctl("--json", "events").stdout
    if mistake == "start":
        assert "a bug of the new one" in running.said()
    # The old version goes on as if nothing had been.
    one_line_each(running)
    assert running.ctl("start", "lines").returncode == 0
    (running.folder / "fifo").write_text("go\n")
    assert running.wait_for("once", "EXITED")["exit"]["code"] == 7
    assert running.ctl("daemon", "reread").returncode == 0
    # Mended, it goes through.
    installed.install(wheels[NEW])
    assert running.ctl("daemon", "upgrade").returncode == 0
    assert running.json("daemon", "status")["version"] == NEW


def test_operations_go_on_across_an_upgrade(daemon: MakeDaemon) -> None:
    """Who waits for a command, or asks something, while the daemon is upgraded gets a true answer."""
    table = '[program.slow]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ready.py"\nstart_seconds = 3\nautostart = false\n'
    running = daemon(table)
    answers: list[tuple[int, str]] = []

    def start() -> None:
        done = running.ctl("start", "slow")
        answers.append((done.returncode, done.stdout))

    waiting = threading.Thread(target=start)
    waiting.start()
    running.wait_for("slow", "STARTING")
    pid = pids(running)["slow"]
    over = threading.Event()
    asked: list[int] = []

    def ask() -> None:
        while not over.is_set():
            asked.append(running.ctl("status").returncode)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(2):
            assert running.ctl("daemon", "upgrade").returncode == 0
    finally:
        over.set()
        asking.join(30)
        waiting.join(30)
    assert set(asked) <= {0, 3}
    assert answers[0][0] == 0, answers
    assert running.status()["slow"]["pid"] == pid


def test_in_the_background_as_well(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN, start=False)
    running.start("-d")
    assert running.process is not None
    assert running.process.wait(10) == 0
    keeper = running.json("daemon", "status")["keeper_pid"]
    try:
        before = running.wait_for("it")["pid"]
        assert running.ctl("daemon", "upgrade").returncode == 0
        status = running.json("daemon", "status")
        assert (status["upgrades"], status["keeper_pid"]) == (1, keeper)
        assert running.status()["it"]["pid"] == before
        assert "the keeper runs version" in (running.log_dir / "procmand.log").read_text()
        os.kill(status["supervisor_pid"], signal.SIGKILL)
        wait_until(lambda: running.json("daemon", "status")["supervisor_pid"] != status["supervisor_pid"])
    finally:
        assert running.ctl("daemon", "shutdown").returncode == 0


PLAIN = '[program.it]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ready.py"\nstart_seconds = 0\n'


def test_a_table_change_and_an_upgrade_do_not_meet(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN)
    running.wait_for("it")
    running.write_table(PLAIN + PLAIN.replace("it", "new"))
    results: list[int] = []

    def upgrade() -> None:
        results.append(running.ctl("daemon", "upgrade").returncode)

    thread = threading.Thread(target=upgrade)
    thread.start()
    wait_until(lambda: "upgrading to the installed version" in running.said())
    os.kill(running.keeper_pid, signal.SIGHUP)  # waits for the end of the upgrade
    thread.join(30)
    assert results == [0]
    wait_until(lambda: "new" in running.status())
    running.wait_for("new")


def test_before_any_upgrade(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN)
    running.wait_for("it")
    with running.client() as client:
        status = client.call("daemon.status")
    assert (status["upgrades"], status["upgrading"], status["upgrade_problem"]) == (0, False, "")

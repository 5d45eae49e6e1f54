"""`procmanctl daemon upgrade` with versions that are really installed one over the other: nobody notices."""

from __future__ import annotations

import http.client
import json
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
from tests.harness import RunningDaemon, free_port, wait_until, whole_log
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
    "ready": (
        "supervise.py",
        "        await self.server.start()\n",
        '        await asyncio.sleep(3)\n        raise RuntimeError("a bug of the new one")\n',
    ),
}
"""What makes a new version fail: it can't be imported, it fails at its first real work, it knows no such keeper, or it
works for a while and fails before it is ready."""


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
    text = whole_log(running.log_dir / "lines.log")
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


WAITING = """
    [program.wobbly]
    command = "sh -c 'echo born $$; exit 3'"
    restart_delay = "800ms"
    restart_delay_max = "800ms"
    start_retries = 100
    [program.hopeless]
    command = "sh -c 'echo born $$; exit 3'"
    restart_delay = "50ms"
    start_retries = 1
    [program.starting]
    command = "${PYTHON} -S -E ${PROGRAMS}/notify.py 1000"
    ready = { notify = true }
    start_timeout = "12s"
    restart_delay = "1h"
    restart_delay_max = "1h"
    [program.crashed]
    command = "${PYTHON} -S -E ${PROGRAMS}/lives.py crashed ${HOME}"
    start_seconds = 0
    start_retries = 1000
    restart_delay = "100ms"
    restart_delay_max = "100ms"
    """


def failures(running: RunningDaemon, name: str) -> int:
    """How many starts in a row have failed, as the state file says it."""
    document = json.loads((running.folder / "state" / "state.json").read_text())
    count: int = document["processes"][name]["failures"]
    return count


class Crasher:
    """Ends each life of `name` (tests/programs/lives.py) with status 3, once; `crashes` counts them."""

    def __init__(self, running: RunningDaemon, name: str) -> None:
        self.crashes = 0
        self._lives, self._name = running.folder / "lives", name
        self._ended: set[int] = set()

    def all(self, what: str) -> list[int]:
        """The pids in all lines of this kind: begin, end, double."""
        return [int(pid) for pid in re.findall(rf"^{self._name} {what} (\d+)$", self._lives.read_text(), re.MULTILINE)]

    def crash(self) -> None:
        """Ends what lives now."""
        for pid in set(self.all("begin")) - self._ended:
            os.kill(pid, signal.SIGUSR1)
            self._ended.add(pid)
            self.crashes += 1


@pytest.mark.parametrize("mistake", ["start", "ready"])
def test_what_waits_goes_on_after_a_failed_trial(
    daemon: MakeDaemon, installed: Installed, wheels: dict[str, Path], mistake: str
) -> None:
    """A next start, a number of failures, the end of start_timeout: as if no upgrade had been tried. What the new
    version did before it failed counts, too."""
    running = daemon(WAITING, installed=installed, start=False)
    running.start(timeout=30)
    hopeless = running.wait_for("hopeless", "FATAL")
    running.wait_for("starting", "STARTING")
    running.wait_for("crashed")
    running.wait_for("wobbly", "BACKOFF")
    supervisor, began = running.supervisor_pid, failures(running, "wobbly")
    installed.install(wheels[mistake])
    results: list[tuple[int, str]] = []

    def upgrade() -> None:
        done = running.ctl("daemon", "upgrade")
        results.append((done.returncode, done.stderr))

    asked = threading.Thread(target=upgrade)
    asked.start()
    wait_until(lambda: "can take over" in running.output.read_text(), 30, "the trial begins")
    crasher = Crasher(running, "crashed")
    while asked.is_alive():  # whoever decides just then starts it again
        crasher.crash()
        asked.join(0.01)
    assert results[0][0] == 1, running.said()
    assert "the new supervisor ended before it was ready" in results[0][1]
    assert running.supervisor_pid == supervisor
    # What had failed for good stays so.
    info = running.status()["hopeless"]
    assert {key: info[key] for key in ("state", "restarts", "why", "exit")} == {
        key: hopeless[key] for key in ("state", "restarts", "why", "exit")
    }
    assert running.log("hopeless").count("born") == 2
    # The next start comes, each time, and each counts once.
    known = failures(running, "wobbly")
    assert known >= began
    wait_until(lambda: failures(running, "wobbly") >= known + 2, 20, "it is tried again")
    wait_until(lambda: failures(running, "wobbly") == running.log("wobbly").count("born"), what="each counts")
    assert running.status()["wobbly"]["restarts"] >= failures(running, "wobbly") - 1
    # The time to get ready was counted on, whether it is over by now or not.
    info = running.wait_for("starting", "BACKOFF", 20)
    assert "not ready within 12 s" in info["why"]
    assert info["restarts"] == 0
    assert running.log("starting").count("started") == 1
    # One life after the other.
    running.wait_for("crashed", timeout=20)
    assert running.ctl("stop", "crashed").returncode == 0
    assert crasher.all("double") == []
    assert crasher.crashes > 0
    assert len(crasher.all("begin")) == crasher.crashes + 1


def test_events_and_history_go_over(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Also what a release that had failed before the upgrade has printed."""
    release = tmp_path / "release"
    command = f"test -e {release} && echo bad release && exit 3; exec sleep 1000"
    running = daemon(f'[program.job]\ncommand = ["sh", "-c", "{command}"]\nstart_seconds = 0.3\nreload = "overlap"\n')
    running.wait_for("job")
    release.touch()
    assert running.ctl("reload", "job").returncode == 1
    before, events = running.json("why", "job"), running.ctl("events").stdout
    assert before["output"] == ["bad release"]
    for _ in range(2):
        assert running.ctl("daemon", "upgrade").returncode == 0
    assert running.json("why", "job") == before
    now = running.ctl("events").stdout
    assert now.startswith(events)
    assert now.count("what=upgrade version=") == 2
    old = running.supervisor_pid
    os.kill(old, signal.SIGKILL)  # that memory was for the upgrade alone
    wait_until(lambda: running.supervisor_pid != old)
    wait_until(running.answers)
    assert running.json("why", "job")["history"] == []


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
    pid = wait_until(lambda: pids(running)["slow"])
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

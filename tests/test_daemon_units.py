"""All that there was of a program passes on to all that there is afterwards, whatever their names and their number:
nobody meets a release that has not proven itself, and a good one loses nobody."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import SUPERVISOR, RunningDaemon, command_line, free_port, wait_until
from tests.visitors import Visitors

SITE = '''
import os, threading, time
FOLDER = os.environ["SITE_FOLDER"]
VERSION = open(f"{FOLDER}/version").read().strip()
open(f"{FOLDER}/read.{VERSION}", "w").close()
open(f"{FOLDER}/each.{VERSION}.{os.getpid()}", "w").close()
if VERSION == "broken":
    raise RuntimeError("this release is broken")
while VERSION == "hangs":
    time.sleep(1)
while os.path.exists(f"{FOLDER}/gate"):
    time.sleep(0.01)
def app(environ, start_response):
    work = int(environ["QUERY_STRING"].partition("work=")[2] or 0)
    if work >= 1000:
        busy = f"{FOLDER}/busy.{os.getpid()}.{threading.get_ident()}"
        open(busy, "w").close()
        while os.path.exists(busy):
            time.sleep(0.01)
    time.sleep(min(work, 100) / 1000)
    status = "503 Service Unavailable" if VERSION == "fails" or "FAILS" in os.environ else "200 OK"
    start_response(status, [("X-Who", f"{os.getpid()} {VERSION}"), ("Content-Length", "2")])
    return [b"ok"]
'''


class Shop:
    """The program `shop`, and who visits it. `version` is what it answers with its next start; `gate` keeps that start
    waiting."""

    def __init__(self, daemon: MakeDaemon, tmp_path: Path, more: str, address: str = "") -> None:
        self.folder = tmp_path / "site"
        self.folder.mkdir()
        (self.folder / "release.py").write_text(SITE)
        self.version("one")
        self.address = address or f"127.0.0.1:{free_port()}"
        self.running: RunningDaemon = daemon(self.table(more))
        for name in self.running.status():
            self.running.wait_for(name, timeout=30)

    def table(self, more: str, variables: str = "") -> str:
        return f"""
            [program.shop]
            server = "wsgi"
            app = "release:app"
            directory = "{self.folder}"
            listen = "{self.address}"
            ready = {{ http = "/" }}
            environment = {{ SITE_FOLDER = "{self.folder}"{variables} }}
            start_seconds = 0.2
            {more if "start_timeout" in more else 'start_timeout = "4s"' + chr(10) + more}
        """

    def version(self, text: str) -> None:
        (self.folder / "version.new").write_text(text)
        (self.folder / "version.new").rename(self.folder / "version")

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        (self.folder / "gate").touch()
        try:
            yield
        finally:
            (self.folder / "gate").unlink(missing_ok=True)

    def write(self, more: str, variables: str = "") -> None:
        self.running.write_table(self.table(more, variables))

    def pids(self) -> dict[str, int]:
        return {name: info["pid"] for name, info in self.running.status().items()}

    def beside(self) -> list[dict[str, Any]]:
        return [info["beside"] for info in self.running.status().values() if info["beside"]]

    def good(self, *command: str) -> str:
        done = self.running.ctl(*command, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def bad(self, *command: str) -> str:
        done = self.running.ctl(*command, timeout=60)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    def connect(self, path: str) -> socket.socket:
        """Who has asked for `path`, and waits for the answer."""
        if self.address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.address.removeprefix("unix:"))
        else:
            host, _, port = self.address.rpartition(":")
            sock = socket.create_connection((host, int(port)))
        sock.settimeout(60)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return sock

    @contextlib.contextmanager
    def visited(self, *versions: str) -> Iterator[Visitors]:
        """All are answered, by `versions`, all of them."""
        with Visitors(self.address, 20) as visitors:
            visitors.goes_on()
            yield visitors
            visitors.goes_on()
            wait_until(lambda: visitors.answered.keys() >= set(versions), 20)
        found = set(visitors.answered), visitors.lost, visitors.refused
        assert found == (set(versions), [], 0), f"{visitors.answered}, lost: {visitors.lost[:5]}"


@pytest.mark.parametrize(
    ("before", "after", "unix"), [(1, 2, False), (2, 1, False), (3, 2, False), (2, 3, False), (1, 2, True)]
)
def test_another_version_of_another_number(
    daemon: MakeDaemon, tmp_path: Path, before: int, after: int, unix: bool
) -> None:
    shop = Shop(daemon, tmp_path, f"workers = {before}", f"unix:{tmp_path}/shop.sock" if unix else "")
    pids = shop.pids()
    changed = ', A = "1"' if 1 not in (before, after) else ""  # else all have another name
    shop.version("fails")
    shop.write(f"workers = {after}", changed)
    assert "no request is lost" in shop.running.ctl("diff").stdout
    with shop.visited("one"):
        said = shop.bad("apply")
    assert "503" in said
    assert shop.pids() == pids
    assert f"procmanctl why {next(iter(pids))}" in said
    assert "503" in shop.good("why", next(iter(pids)))
    shop.version("two")
    with shop.visited("one", "two"):
        shop.good("apply")
    assert list(shop.pids()) == (["shop"] if after == 1 else [f"shop:{number + 1}" for number in range(after)])
    shop.good("diff")
    assert not shop.pids().items() & pids.items()


@pytest.mark.parametrize(("verb", "unix"), [("reload", False), ("apply", False), ("reload", True)])
def test_the_ones_before_hang_in_their_start(daemon: MakeDaemon, tmp_path: Path, verb: str, unix: bool) -> None:
    """Who waits for them, and who comes meanwhile, is answered by the version that starts."""
    more = 'workers = 2\nstart_timeout = "2m"\nstop_timeout = "2s"'
    shop = Shop(daemon, tmp_path, more, f"unix:{tmp_path}/shop.sock" if unix else "")
    shop.version("hangs")
    shop.good("restart", "shop", "--no-wait")
    wait_until(lambda: len(list(shop.folder.glob("each.hangs.*"))) == 2, 20)
    wait_until(lambda: {info["state"] for info in shop.running.status().values()} == {"STARTING"}, 20)
    with shop.connect("/") as first, shop.gate():
        shop.version("two")
        if verb == "apply":
            shop.write(more, ', A = "1"')
        shop.good(verb, *["shop"] * (verb == "reload"), "--no-wait")
        wait_until((shop.folder / "read.two").exists, 20)
        with shop.connect("/") as second, Visitors(shop.address, 20) as visitors:
            (shop.folder / "gate").unlink()
            for sock in (first, second):
                answer = sock.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200 OK"), answer
                assert b" two\r\n" in answer
            visitors.goes_on()
    assert (set(visitors.answered), visitors.lost, visitors.refused) == ({"two"}, [], 0)
    wait_until(lambda: not shop.beside(), 20)
    assert {info["state"] for info in shop.running.status().values()} == {"RUNNING"}
    shop.good("diff")


def test_the_ones_before_fall_in_the_trial(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Nobody is there who would answer those that wait for them, but the version that has proven itself."""
    shop = Shop(daemon, tmp_path, 'workers = 2\nstart_timeout = "2m"\nstart_retries = 0')
    pids = shop.pids()
    with shop.gate():
        shop.version("two")
        shop.good("reload", "shop", "--at-once", "2", "--no-wait")
        wait_until(lambda: len(list(shop.folder.glob("each.two.*"))) == 2, 20)
        wait_until(lambda: len([each for each in shop.beside() if each["pid"]]) == 2, 20)
        shop.version("broken")
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: {info["state"] for info in shop.running.status().values()} == {"FATAL"}, 20)
        shop.version("two")
        waiting = [shop.connect("/") for _ in range(3)]
    for sock in waiting:
        with sock:
            assert b" two\r\n" in sock.recv(1000)
    wait_until(lambda: not shop.beside(), 20)
    assert {info["state"] for info in shop.running.status().values()} == {"RUNNING"}


def test_all_that_went_back_say_so(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Also one whose successor had not begun; and whoever waits is told once."""
    shop = Shop(daemon, tmp_path, "workers = 2")
    shop.version("fails")
    said = shop.bad("reload", "shop")
    assert said.count("the successor failed") == 1
    assert "reload failed: shop:1, shop:2: " in said
    assert all("503" in info["setback"]["why"] for info in shop.running.status().values())


@pytest.mark.parametrize("after", [1, 2])
def test_the_keeper_dies_in_the_trial_of_a_changed_table(daemon: MakeDaemon, tmp_path: Path, after: int) -> None:
    """What had not proven itself does not take the place of what serves: the next daemon goes on with that."""
    shop = Shop(daemon, tmp_path, "")
    running = shop.running
    pids = shop.pids()
    shop.version("two")
    shop.write(f"workers = {after}", ', A = "1"')
    with shop.visited("one", "two") as visitors:
        with shop.gate():
            shop.good("apply", "--no-wait")
            wait_until(lambda: [each["pid"] for each in shop.beside() if each["pid"]], 20)
            tried = [each["pid"] for each in shop.beside() if each["pid"]]
            state = running.folder / "state" / "state.json"
            wait_until(lambda: json.loads(state.read_text())["trials"], 20)
            wait_until(lambda: "shop" in json.loads(state.read_text())["kept"]["programs"], 20)
            running.look()
            os.kill(running.keeper_pid, signal.SIGKILL)
            assert running.process is not None
            running.process.wait(10)
            wait_until(lambda: not any(SUPERVISOR in command_line(seen.pid) for seen in running.seen))
            running.start()
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in tried), 20)
            assert shop.pids() == pids
            assert "procmanctl apply" in running.said()
            assert running.ctl("diff").returncode == 1
            visitors.goes_on()
            assert set(visitors.answered) == {"one"}
        shop.good("apply")
    assert list(shop.pids()) == (["shop"] if after == 1 else ["shop:1", "shop:2"])
    shop.good("diff")


def fallen(shop: Shop) -> dict[str, int]:
    """One of three can't get up, since the release in place is broken. Returns the pids of the others."""
    shop.version("broken")
    os.kill(shop.pids()["shop:2"], signal.SIGKILL)
    wait_until(lambda: shop.running.status()["shop:2"]["state"] in ("FATAL", "BACKOFF"), 20)
    return {name: pid for name, pid in shop.pids().items() if pid}


@pytest.mark.parametrize("verb", ["reload", "apply"])
def test_one_of_them_has_fallen(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    """It gets up with the others when the release has proven itself, which is not tried on visitors; and it is not
    forgotten."""
    more = "workers = 3\nstart_retries = 0"
    shop = Shop(daemon, tmp_path, more)
    others = fallen(shop)
    shop.version("fails")
    if verb == "apply":
        shop.write(more, ', A = "1"')
    with shop.visited("one"):
        said = shop.bad(verb, *["shop"] * (verb == "reload"))
    assert "503" in said
    assert {name: pid for name, pid in shop.pids().items() if pid} == others
    info = shop.running.status()["shop:2"]
    assert (info["state"], info["wanted"]) == ("FATAL", "up")
    assert shop.running.ctl("diff").returncode == (verb == "apply")
    shop.version("two")
    with shop.visited("one", "two"):
        shop.good(verb, *["shop"] * (verb == "reload"))
    assert {info["state"] for info in shop.running.status().values()} == {"RUNNING"}
    assert not shop.pids().items() & others.items()


@pytest.mark.parametrize("what", ["stopped", "scaled"])
def test_one_of_them_is_down(daemon: MakeDaemon, tmp_path: Path, what: str) -> None:
    """It is what it was, too, when the new version has failed; and what the table says when that serves."""
    more = 'scale = { min = 1, max = 2, idle_timeout = "1h" }' if what == "scaled" else "workers = 2"
    up = ["scale", "shop", "2"] if what == "scaled" else ["start", "shop:2"]
    shop = Shop(daemon, tmp_path, "workers = 2")
    if what == "scaled":
        shop.write(more)
        shop.good("apply")
        shop.good("scale", "shop", "1")
    else:
        shop.good("stop", "shop:2")
    shop.write(more, ', FAILS = "1"')
    assert "takes effect when it is started" in shop.running.ctl("diff").stdout
    with shop.visited("one"):
        assert "503" in shop.bad("apply")
        shop.good(*up)
        assert all(shop.pids().values())
    shop.good(*(["scale", "shop", "1"] if what == "scaled" else ["stop", "shop:2"]))
    shop.version("two")
    shop.write(more, ', A = "1"')
    with shop.visited("one", "two"):
        shop.good("apply")
        assert shop.pids()["shop:2"] is None
    shop.good("diff")
    shop.good(*up)
    assert b"A=1" in Path(f"/proc/{shop.pids()['shop:2']}/environ").read_bytes()


def test_one_that_has_fallen_is_due_in_the_trial(daemon: MakeDaemon, tmp_path: Path) -> None:
    """It waits: else visitors met the release before it has proven itself."""
    shop = Shop(daemon, tmp_path, 'workers = 3\nstart_timeout = "8s"\nrestart_delay = "3s"\nrestart_delay_max = "3s"')
    others = fallen(shop)
    with shop.visited("one"):
        with shop.gate():
            shop.version("fails")
            shop.good("reload", "shop", "--no-wait")
            wait_until(lambda: "shop:2: its start waits: shop:1, which has" in shop.running.said(), 20)
        wait_until((shop.folder / "read.fails").exists, 20)
        shop.version("broken")  # for those that come when this is over
        wait_until(lambda: not shop.beside(), 30)
    assert {name: shop.pids()[name] for name in others} == others
    shop.version("two")
    shop.good("reload", "shop")
    assert {info["state"] for info in shop.running.status().values()} == {"RUNNING"}


def test_one_of_them_drains(daemon: MakeDaemon, tmp_path: Path) -> None:
    """It accepts no more, so it is not in the way of a trial; what it has is answered. An operator has stopped it: who
    reloads the others does not mean it."""
    shop = Shop(daemon, tmp_path, "workers = 3")
    pids = shop.pids()
    slow: dict[Path, socket.socket] = {}
    while not (busy := [path for path in slow if f".{pids['shop:2']}." in path.name]):
        sock = shop.connect("/?work=1000")
        slow[wait_until(lambda: set(shop.folder.glob("busy.*")) - slow.keys(), 20).pop()] = sock
    for path in slow.keys() - {*busy}:
        path.unlink()
    shop.good("stop", "shop:2", "--no-wait")
    wait_until(lambda: shop.running.status()["shop:2"]["state"] == "STOPPING")
    shop.version("fails")
    with shop.visited("one"):
        assert "503" in shop.bad("reload", "shop")
    assert shop.running.status()["shop:2"]["state"] == "STOPPING"
    assert shop.pids() == pids
    shop.version("two")
    assert "nothing to reload" in shop.good("reload", "shop")
    busy[0].unlink()
    for sock in slow.values():
        with sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert "it does not run" in shop.bad("reload", "shop:2")
    wait_until(lambda: shop.running.status()["shop:2"]["state"] == "STOPPED", 20)
    assert "nothing to reload" in shop.good("reload", "shop")


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_a_canary_of_another_number(daemon: MakeDaemon, tmp_path: Path, verb: str) -> None:
    canary = 'canary = "50% for 10m"'
    shop = Shop(daemon, tmp_path, canary)
    shop.version("two")
    shop.write(f"workers = 2\n{canary}")
    assert "canary" not in shop.running.ctl("diff").stdout
    with shop.visited("one", "two") as visitors:
        shop.good("apply", "--no-wait")
        wait_until(lambda: shop.beside() and all(each["canary"] for each in shop.beside()), 20)
        wait_until(lambda: min(visitors.answered["one"], visitors.answered["two"]) > 5, 20)
        shop.good(verb, "shop")
        wait_until(lambda: not shop.beside(), 20)
    wait_until(lambda: list(shop.pids()) == (["shop:1", "shop:2"] if verb == "promote" else ["shop"]), 20)
    assert shop.running.ctl("diff").returncode == (verb == "rollback")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("phase", ["trial", "passed"])
def test_the_supervisor_dies(daemon: MakeDaemon, tmp_path: Path, phase: str, before: int, after: int) -> None:
    """The next one begins the trial anew, or goes on; nobody comes up on the socket that serves."""
    shop = Shop(daemon, tmp_path, f"workers = {before}")
    pids = shop.pids()
    shop.version("two")
    shop.write(f"workers = {after}")
    with shop.visited("one", "two") as visitors:
        with shop.gate() if phase == "trial" else contextlib.nullcontext():
            shop.good("apply", "--no-wait")
            role = "successor" if phase == "trial" else "the one before"
            first = wait_until(lambda: [each for each in shop.beside() if each["role"] == role], 20)
            os.kill(shop.running.supervisor_pid, signal.SIGKILL)
            if phase == "trial":
                tried = {first[0]["pid"], None}
                wait_until(lambda: any(each["pid"] not in tried for each in shop.beside()), 20)
                visitors.goes_on()
                assert {name: pid for name, pid in shop.pids().items() if pid} == pids
                assert set(visitors.answered) == {"one"}
        names = ["shop"] if after == 1 else ["shop:1", "shop:2"]
        wait_until(lambda: list(shop.pids()) == names and not shop.beside(), 30)
    assert not {*pids.values()} & {*shop.pids().values()}
    shop.good("diff")


def test_the_keeper_dies_in_a_trial(daemon: MakeDaemon, tmp_path: Path) -> None:
    """The next daemon ends what was on trial, also where the process itself did not run."""
    shop = Shop(daemon, tmp_path, 'workers = 2\nstart_retries = 0')
    running = shop.running
    others = fallen(shop)
    shop.version("two")
    with shop.gate():
        shop.good("reload", "shop", "--no-wait", "--at-once", "2")
        wait_until(lambda: len([each["pid"] for each in shop.beside() if each["pid"]]) == 2, 20)
        tried = [each["pid"] for each in shop.beside()]
        state = running.folder / "state" / "state.json"
        wait_until(lambda: json.loads(state.read_text())["trials"] == ["shop:1~", "shop:2~"], 20)
        running.look()
        os.kill(running.keeper_pid, signal.SIGKILL)
        assert running.process is not None
        running.process.wait(10)
        wait_until(lambda: not any(SUPERVISOR in command_line(seen.pid) for seen in running.seen))
        running.start()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in tried), 20)
        assert shop.pids()["shop:1"] == others["shop:1"]
    with shop.visited("one", "two"):
        shop.good("reload", "shop")
    assert {info["state"] for info in running.status().values()} == {"RUNNING"}

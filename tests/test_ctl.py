"""procmanctl: what it prints, and how it ends. Most tests call main() on a stand-in daemon; those about terminals,
pipes and signals run the program."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procman import files, table
from procman.canary import AS_TABLE, NO_CANARY, Wish
from procman.client import Client
from procman.config import Config
from procman.ctl import resuming, session, starter, tables
from procman.ctl.main import main, parser
from procman.ctl.operating import Progress
from procman.methods import METHODS
from procman.rpc import PROCESS_FIELDS
from tests.harness import CTL, PROJECT, wait_until
from tests.rpc_stand_in import AT, WORKERS, Daemon, info, worker

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm"}
for variable in ("NO_COLOR", "PROCMAN_SOCKET", "COLUMNS"):
    ENVIRONMENT.pop(variable, None)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with Daemon() as running:
        monkeypatch.setenv("PROCMAN_SOCKET", running.path)
        yield running


class Ran:
    """What a run of main() came to."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *argv: str) -> None:
        try:
            self.status = main(argv)
        except SystemExit as end:  # as argparse ends
            assert isinstance(end.code, int)
            self.status = end.code
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


# --- exit statuses


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ("status", 0, ""),
        ("status shop:1", 0, ""),
        ("start shop", 0, ""),
        ("stop all", 0, ""),
        ("daemon reopen-logs", 0, ""),
        ("--version", 0, ""),
        ("--help", 0, ""),
        ("start blog", 1, "procmanctl: start failed: blog: exit status 1"),
        ("restart all", 1, "procmanctl: restart failed: blog: exit status 1"),
        ("signal HUP blog", 1, "procmanctl: signal failed: blog"),
        ("", 2, "usage: procmanctl"),
        ("stauts", 2, "invalid choice: 'stauts' (choose from"),
        ("start", 2, "required: NAME"),
        ("start shop --timeout soon", 2, "'soon' is no number of seconds"),
        ("start shop --timeout -1", 2, "'-1' is no number of seconds"),
        ("start shop --timeout nan", 2, "'nan' is no number of seconds"),
        ("status --nonsense", 2, "unrecognized arguments: --nonsense"),
        ("signal TREM shop", 2, "unknown signal 'TREM'; did you mean 'TERM'?"),
        ("logs -n -1", 2, "'-1' is no number of lines from 0"),
        ("-s x -c y status", 2, "not allowed with"),
        ("-s x status -c y", 2, "-s and -c both name a daemon"),
        ("daemon", 2, "required: ACTION"),
        ("daemon stauts", 2, "invalid choice"),
        ("status blog", 3, ""),
        ("status all", 3, ""),
        ("status web blog", 3, ""),
        ("status nobody", 4, "procmanctl: no such program: 'nobody'\n  hint: procmanctl status lists all"),
        ("why nobody", 4, "no such program"),
        ("logs nobody", 4, "no such program"),
        (
            "-s /nowhere/s status",
            6,
            "procmanctl: no daemon listens at /nowhere/s: there is no such socket\n  hint: is procmand",
        ),
        ("daemon shutdown -s /nowhere/s", 6, "no daemon listens"),
    ],
)
def test_exit_statuses(daemon: Daemon, capsys: pytest.CaptureFixture[str], argv: str, status: int, words: str) -> None:
    ran = Ran(capsys, *argv.split())
    assert (ran.status, words in ran.err) == (status, True), ran.err
    assert bool(ran.err) == bool(words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_not_allowed(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    from procman.server import Access

    daemon.server.access = Access(uid=0)
    ran = Ran(capsys, "status")
    assert ran.status == 5
    assert "may not look here" in ran.err


def test_not_allowed_is_5(capsys: pytest.CaptureFixture[str]) -> None:
    from procman.ctl.session import Session
    from procman.errors import NotAllowed

    assert Session(argparse.Namespace()).fail(NotAllowed("no", hint="ask root")) == 5
    assert capsys.readouterr().err == "procmanctl: no\n  hint: ask root\n"


def test_a_bug_of_the_daemon_is_1(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "status", "bug")
    assert ran.status == 1
    assert "the daemon failed to answer this" in ran.err


# --- which daemon


def test_the_socket_option_wins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCMAN_SOCKET", "/nowhere/environment")
    with Daemon() as daemon:
        assert Ran(capsys, "-s", daemon.path, "status").status == 0
        assert Ran(capsys, "status", "--socket", daemon.path).status == 0
    assert "/nowhere/environment" in Ran(capsys, "status").err


def test_the_users_own_daemon_is_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROCMAN_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "/nowhere/procman/procman.sock" in Ran(capsys, "status").err


@pytest.mark.parametrize("before", [True, False])
def test_the_table_names_the_socket(capsys: pytest.CaptureFixture[str], tmp_path: Path, before: bool) -> None:
    with Daemon() as daemon:
        path = tmp_path / "procman.toml"
        path.write_text(f'[daemon]\nsocket = "{daemon.path}"\n')
        argv = ["-c", str(path), "status"] if before else ["status", "--config", str(path)]
        ran = Ran(capsys, *argv)
        assert (ran.status, ran.err) == (0, "")
        assert "shop:1" in ran.out


def test_a_table_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = Ran(capsys, "-c", str(tmp_path / "none.toml"), "status")
    assert ran.status == 1
    assert "none.toml" in ran.err
    assert "hint: procmanctl check" in ran.err


# --- looking


def test_status(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "status").out == (
        "NAME    STATE    READY   PID  UPTIME   CPU   MEMORY  RESTARTS  WHY\n"
        "shop:1  RUNNING  yes    4711   1h02m  1.5%  40.0 MB         2  autostart\n"
        "shop:2  RUNNING  yes    4711   1h02m  1.5%  40.0 MB         2  autostart\n"
        "blog    FATAL    -         -       -     -        -         2  exit status 1\n"
    )


def test_status_with_workers(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = (
        "NAME    STATE    READY   PID  UPTIME   CPU   MEMORY  RESTARTS  WHY\n"
        "shop:1  RUNNING  yes    4711   1h02m  1.5%  40.0 MB         2  autostart\n"
        "  WORKER  DOES  REQUESTS  IN FLIGHT  THREADS  AVERAGE   MEMORY\n"
        "    4712  busy      1234          1        4     12ms  40.0 MB\n"
        "    4713  idle         9          0        4     1.5s   1.0 MB\n"
        "  listen queue of 127.0.0.1:8000: 3 of 2048\n"
        "shop:2  RUNNING  yes    4711   1h02m  1.5%  40.0 MB         2  autostart\n"
        "  workers: no answer within 1 s\n"
        "  listen queue of 127.0.0.1:8000: - of 2048\n"
        "blog    FATAL    -         -       -     -        -         2  exit status 1\n"
    )
    assert Ran(capsys, "status", "-v").out == wanted
    assert Ran(capsys, "status", "--verbose").out == wanted
    assert Ran(capsys, "status", "-v", "shop:2", "--json").json == [info("shop:2", workers=WORKERS["shop:2"])]


@pytest.mark.parametrize(
    ("told", "lines"),
    [
        (None, []),
        ({}, []),
        ({"problem": None, "list": [], "left_out": 0, "listen": []}, []),
        (
            {"list": [worker(7), worker(123, heartbeat_seconds=0.94)]},
            ["WORKER  HEARTBEAT", "     7          -", "   123       0.9s"],
        ),
        ({"list": [worker(7, queue=0, average_seconds=0.00042)]}, ["WORKER  QUEUE  AVERAGE", "     7      0    0.4ms"]),
        ({"list": [worker(7)], "left_out": 44}, ["WORKER", "     7", "and 44 more"]),
        (
            {"problem": "\x1b[2J", "list": [], "listen": [{"address": "\x1b", "queue": "\x1b"}]},
            [
                "workers: �[2J",
                "listen queue of �: � of -",
            ],
        ),
    ],
)
def test_workers(told: Any, lines: list[str]) -> None:
    assert tables.workers(told) == lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0ms"), (0.00994, "9.9ms"), (0.00996, "10ms"), (0.9994, "999ms"), (0.9996, "1.0s"), (75.0, "1m15s")],
)
def test_short_times(seconds: float, text: str) -> None:
    assert tables.workers({"list": [worker(1, average_seconds=seconds)]})[1].split() == ["1", text]


def test_status_of_no_programs(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.stand_in.processes.clear()
    ran = Ran(capsys, "status")
    assert (ran.status, ran.out) == (0, "the program table has no programs\n")
    assert Ran(capsys, "status", "--json").json == []


@pytest.mark.parametrize(
    "argv", [("--json", "status", "blog"), ("status", "--json", "blog"), ("status", "blog", "--json")]
)
def test_json_status(daemon: Daemon, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    ran = Ran(capsys, *argv)
    assert ran.status == 3
    assert ran.json == [info("blog", "FATAL")]
    assert tuple(ran.json[0]) == PROCESS_FIELDS
    assert ran.out.count("\n") == 1


def test_json_errors(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "--json", "status", "nobody")
    hint = "procmanctl status lists all"
    assert ran.json == {"error": {"code": "no-such-program", "message": "no such program: 'nobody'", "hint": hint}}
    assert ran.status == 4


def test_show(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    out = Ran(capsys, "show", "shop:1").out
    for words in (
        "state      RUNNING, wanted up",
        "pid        4711",
        f"started    {AT}, up 1h02m",
        "cpu        1.5% now; last hour: 1.0% min, 2.0% avg, 3.0% max",
        "memory     40.0 MB now; last hour: 1.0 MB min, 2.0 MB avg, 3.0 MB max",
        "\nworkers\n  WORKER  DOES  REQUESTS  IN FLIGHT  THREADS  AVERAGE   MEMORY\n    4712  busy      1234",
        "  listen queue of 127.0.0.1:8000: 3 of 2048\n",
        "read     2.0 KB",
        "4711    -  40.0 MB  gunicorn shop",
        "umask    0o022",
        "argv     gunicorn shop",
    ):
        assert words in out, words
    assert Ran(capsys, "show", "shop:1", "--json").json["definition"]["umask"] == 18


def test_show_without_samples() -> None:
    text = "\n".join(tables.show(info("blog", "FATAL", samples=[], log=[], processes=[], definition={})))
    assert "cpu        -\n" in text
    assert f"last exit  exit status 1, at {AT}" in text


def test_why(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "why", "blog").out == (
        "blog is FATAL, wanted down: exit status 1\n"
        f"last exit: exit status 1, at {AT}\n"
        "\nhistory:\n"
        f"  {AT}  FATAL  exit status 1\n"
        "\nlast output:\n"
        "  Traceback\n"
        "  ImportError: �[31mno blog\n"
    )
    assert Ran(capsys, "why", "blog", "--json").json["output"][1] == "ImportError: \x1b[31mno blog"


# --- operating


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "reload", "promote", "rollback"])
def test_operating(daemon: Daemon, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    ran = Ran(capsys, verb, "shop", "--timeout", "2.5")
    state = "STOPPED" if verb == "stop" else "RUNNING"
    assert ran.out == f"shop:1  {state}  asked by uid 0\nshop:2  {state}  asked by uid 0\n"
    assert (ran.status, ran.err) == (0, "")
    assert Ran(capsys, verb, "--no-wait", "shop:2", "--json").json[0]["state"] == state
    uid = os.geteuid()
    assert daemon.stand_in.asked == [(verb, ["shop"], uid, 2.5, True), (verb, ["shop:2"], uid, None, False)]


@pytest.mark.parametrize(
    ("options", "wish"),
    [
        ([], AS_TABLE),
        (["--canary", "10%"], Wish(0.1)),
        (["--canary", "2.5%", "--for", "90s"], Wish(0.025, 90.0)),
        (["--canary", "0"], NO_CANARY),
        (["--for", "1h"], Wish(None, 3600.0)),
    ],
)
def test_a_canary(daemon: Daemon, capsys: pytest.CaptureFixture[str], options: list[str], wish: Wish) -> None:
    assert Ran(capsys, "reload", "shop", *options).status == 0
    assert daemon.stand_in.wishes == [wish]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--canary", "10"], "did you mean \"10%\"?"),
        (["--canary", "100%"], "less than 100%"),
        (["--canary", "-1%"], "expected one argument"),
        (["--canary", "x%"], "is no share"),
        (["--for", "0"], "is no time"),
        (["--for", "2 weeks"], "is no time"),
        (["--for", "1.2.3s"], "is no time"),
    ],
)
def test_bad_canaries(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    ran = Ran(capsys, "reload", "shop", *options)
    assert ran.status == 2
    assert words in ran.err


def test_a_failure_is_explained(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "start", "all")
    assert ran.out.splitlines()[-1] == "blog    FATAL    exit status 1"
    assert ran.err == (
        "procmanctl: start failed: blog: exit status 1\n"
        "  | Traceback\n"
        "  | ImportError: �[31mno blog\n"
        "  hint: procmanctl why blog\n"
    )
    failed = Ran(capsys, "start", "all", "--json")
    assert [one["ok"] for one in failed.json] == [True, True, False]
    assert (failed.status, failed.err) == (1, "")


def test_signal(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "signal", "usr1", "web").out == "shop:1  RUNNING  autostart\nshop:2  RUNNING  autostart\n"
    assert daemon.stand_in.asked == [("signal", ["web"], 10, os.geteuid())]


def test_scale(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "scale", "shop", "2").out == "shop:1  RUNNING  scaled\nshop:2  RUNNING  scaled\n"
    assert Ran(capsys, "scale", "shop", "0", "--no-wait", "--timeout", "3", "--json").json[0]["ok"]
    ran = Ran(capsys, "scale", "shop", "3")
    assert (ran.status, ran.err) == (2, "procmanctl: shop: 3 is too many\n")
    assert Ran(capsys, "scale", "shop", "-1").status == 2
    assert Ran(capsys, "scale", "shop", "many").status == 2
    uid = os.geteuid()
    assert daemon.stand_in.asked[:2] == [("scale", "shop", 2, uid, None, True), ("scale", "shop", 0, uid, 3.0, False)]


# --- the daemon itself


def test_daemon_status(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    out = Ran(capsys, "daemon", "status").out
    assert out.splitlines()[0] == "identifier      procman"
    assert "keeper pid      1\n" in out
    assert "limits          open 9\n" in out
    assert Ran(capsys, "daemon", "status", "--json").json["keeper_pid"] == 1


def test_daemon_reread(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "daemon", "reread").out == (
        "added      new\nremoved    -\nchanged    -\nrestarted  -\nmessage    the table was read again\n"
    )
    ran = Ran(capsys, "daemon", "reread")
    assert (ran.status, ran.err) == (1, "procmanctl: the table has problems\n  hint: procmanctl check\n")


def test_apply_need_not_wait(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "apply", "--no-wait")
    assert (ran.status, ran.out) == (0, "it goes on\n")
    ran = Ran(capsys, "apply", "--timeout", "3")
    assert (ran.status, ran.out, ran.err) == (1, "", "procmanctl: apply: it goes on\n")
    assert Ran(capsys, "apply", "--no-wait", "--json").json["goes_on"]
    assert daemon.stand_in.asked == [("apply", False, None), ("apply", True, 3.0), ("apply", False, None)]


def test_daemon_shutdown_waits_until_it_has_gone(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "daemon", "shutdown")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert Ran(capsys, "status").status == 6


def test_daemon_shutdown_waits_for_programs_that_stop_slowly(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[float] = []

    def stop() -> None:
        stopped.append(time.monotonic())
        daemon.stand_in.down.set()

    async def shutdown(_peer: object) -> None:
        daemon.loop.call_later(0.5, stop)

    monkeypatch.setattr(daemon.stand_in, "shutdown", shutdown)
    assert Ran(capsys, "daemon", "shutdown").status == 0
    assert stopped


def test_daemon_shutdown_waits_for_the_keeper(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    held = socket.socket(fileno=os.dup(daemon.server._listening.fileno()))  # as the keeper does
    closed: list[float] = []

    def close() -> None:
        wait_until(lambda: not daemon.server.connections and daemon.stand_in.down.is_set())
        time.sleep(0.3)
        closed.append(time.monotonic())
        held.close()

    keeper = threading.Thread(target=close)
    keeper.start()
    assert Ran(capsys, "daemon", "shutdown").status == 0
    assert closed
    keeper.join()


def test_daemon_shutdown_gives_up_after_its_timeout(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shutdown(_peer: object) -> None:
        daemon.stand_in.asked.append(("shutdown",))

    monkeypatch.setattr(daemon.stand_in, "shutdown", shutdown)
    ran = Ran(capsys, "daemon", "shutdown", "--timeout", "0.3")
    assert (ran.status, daemon.stand_in.asked) == (1, [("shutdown",)])
    assert "the daemon is still there after 0.3 s" in ran.err


def drop_all(daemon: Daemon) -> None:
    """What clients see when the supervisor dies. To be called in the daemon's loop."""
    for connection in list(daemon.server.connections):
        connection.drop()


def test_daemon_shutdown_is_asked_again_when_the_daemon_goes_on(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor was replaced and its successor knows nothing of it."""
    asked: list[float] = []

    async def shutdown(_peer: object) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            daemon.loop.call_later(0.1, drop_all, daemon)
        else:
            daemon.stand_in.down.set()

    monkeypatch.setattr(daemon.stand_in, "shutdown", shutdown)
    assert Ran(capsys, "daemon", "shutdown").status == 0
    assert len(asked) == 2


def test_daemon_shutdown_is_done_when_another_daemon_is_there(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def another() -> dict[str, int]:
        return {"keeper_pid": 2}

    async def shutdown(_peer: object) -> None:
        monkeypatch.setattr(daemon.stand_in, "daemon_status", another)
        daemon.loop.call_later(0.1, drop_all, daemon)
        daemon.stand_in.asked.append(("shutdown",))

    monkeypatch.setattr(daemon.stand_in, "shutdown", shutdown)
    assert Ran(capsys, "daemon", "shutdown").status == 0
    assert daemon.stand_in.asked == [("shutdown",)]


def test_reread_waits_without_a_limit(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float | None] = []
    before = session.Session.client

    def client(self: session.Session, timeout: float | None = 30.0) -> Client:
        timeouts.append(timeout)
        return before(self, timeout)

    monkeypatch.setattr(session.Session, "client", client)
    assert Ran(capsys, "daemon", "reread").status == 0
    assert timeouts == [None]


# --- when the supervisor is replaced under a command


UP, DOWN, FAILED = info("it"), info("it", "STOPPED", exit=None), info("it", "BACKOFF", wanted="up")
STARTING = info("it", "STARTING", wanted="up", exit=None)
NEW = info("it", pid=4712, started_at="later")
STOPPING = info("it", "STOPPING", pid=4711, started_at=AT, exit=None)
STOPPING_UP = {**STOPPING, "wanted": "up"}


@pytest.mark.parametrize(
    ("verb", "before", "now", "further"),
    [
        ("stop", UP, UP, "stop"),
        ("stop", UP, STOPPING, "stop"),
        ("stop", UP, DOWN, "stop"),
        ("start", DOWN, DOWN, "start"),
        ("start", UP, UP, "start"),
        ("start", DOWN, STARTING, "start"),
        ("start", STARTING, STARTING, "start"),
        ("start", DOWN, NEW, "start"),
        ("start", DOWN, FAILED, None),
        ("start", FAILED, FAILED, "start"),
        ("start", FAILED, {**FAILED, "exit": {"code": 2}}, None),
        ("start", UP, DOWN, None),
        ("start", UP, STOPPING, None),
        ("restart", UP, UP, "restart"),
        ("restart", STARTING | {"pid": 4711}, UP, "restart"),
        ("restart", UP, STOPPING_UP, "start"),
        ("restart", UP, STOPPING, None),
        ("restart", UP, STARTING, "start"),
        ("restart", UP, NEW, "start"),
        ("restart", UP, FAILED, None),
        ("restart", DOWN, DOWN, "restart"),
        ("restart", DOWN, NEW, "start"),
        ("start", None, NEW, "start"),
    ],
)
def test_what_is_still_to_be_asked(verb: str, before: Any, now: Any, further: object) -> None:
    assert resuming.further(verb, before, now) == further


@pytest.mark.parametrize(
    ("names", "number", "wanted", "enough"),
    [
        (["shop"], 1, "down", True),
        (["web"], 3, "down", True),
        (["shop"], 0, "down", False),  # none is up yet
        (["shop"], 1, "up", False),
        (["shop:2"], 1, "down", False),  # this very one is meant
    ],
)
def test_of_a_program_that_scales_not_all_are_asked_again(
    names: list[str], number: int, wanted: str, enough: bool
) -> None:
    scale = {"number": number, "min": 0, "max": 4}
    now = {"name": "shop:2", "program": "shop", "wanted": wanted, "scale": scale}
    assert resuming._enough(names, now) == enough
    assert not resuming._enough(names, now | {"scale": None})


def test_a_command_goes_on_when_the_supervisor_is_replaced(daemon: Daemon) -> None:
    daemon.do(daemon.stand_in.gate.clear)
    process = start(daemon, "start", "shop", "blog")
    wait_until(lambda: daemon.stand_in.asked)

    def replace() -> None:
        daemon.stand_in.processes["blog"] = info("blog", "STARTING", wanted="up", exit=None)
        drop_all(daemon)
        daemon.stand_in.gate.set()

    daemon.do(replace)
    out, err = process.communicate(timeout=20)
    assert out.decode().splitlines() == [
        "shop:1  RUNNING  asked by uid 0",
        "shop:2  RUNNING  asked by uid 0",
        "blog    FATAL    exit status 1",
    ]
    assert err.decode().startswith(f"{resuming.REPLACED}\nprocmanctl: start failed: blog")
    assert process.returncode == 1
    assert [asked[:2] for asked in daemon.stand_in.asked] == [
        ("start", ["shop", "blog"]),
        ("start", ["shop:1", "shop:2", "blog"]),
    ]


# --- streams


def test_events(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "events").out == f"{AT} state blog FATAL (exit status 1)\n"
    assert Ran(capsys, "events", "--json").json == daemon.stand_in.events[0]


def test_one_log_is_printed_as_it_is(daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    content = b"a\n\xff\x00\x1b[31m\r\nlast without end"
    (daemon.folder / "blog.log").write_bytes(content)
    assert main(["logs", "blog"]) == 0
    assert capfdbinary.readouterr().out == content


def test_several_logs_have_names_before_their_lines(daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (daemon.folder / "shop:1.log").write_bytes(b"one\n\xff\n")
    (daemon.folder / "blog.log").write_bytes(b"two\nrest")
    assert main(["logs"]) == 0
    assert capfdbinary.readouterr().out == b"shop:1 | one\nshop:1 | \xff\nblog   | two\nblog   | rest\n"


def test_logs_as_json_are_one_object_a_line(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    (daemon.folder / "blog.log").write_bytes(b"a\x1b\n\xff\nc")
    lines = [json.loads(line) for line in Ran(capsys, "logs", "--json", "blog").out.splitlines()]
    common = {"name": "blog", "stream": "out", "time": None, "level": None}
    assert lines == [{**common, "text": "a\x1b"}, {**common, "data": "/w=="}, {**common, "text": "c"}]


def test_no_log_at_all_is_said(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.stand_in.processes.clear()
    ran = Ran(capsys, "logs")
    assert (ran.status, ran.out) == (0, "")
    assert "no log file holds this output" in ran.err


def test_a_daemon_that_is_older_is_said_to_be(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(METHODS, "logs.files")
    ran = Ran(capsys, "logs")
    assert ran.status == 1
    assert "the daemon is older than this procmanctl" in ran.err
    assert "hint: procmanctl daemon upgrade" in ran.err


def test_lines_option(daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (daemon.folder / "blog.log").write_bytes(b"".join(b"%d\n" % n for n in range(100)))
    main(["logs", "blog"])
    assert capfdbinary.readouterr().out.split() == [b"%d" % n for n in range(90, 100)]
    main(["logs", "-n", "3", "blog"])
    assert capfdbinary.readouterr().out == b"97\n98\n99\n"


# --- terminals, pipes and signals: the real program


def start(daemon: Daemon, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CTL, "-s", daemon.path, *argv]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{"env": ENVIRONMENT, **pipes, **options})


def test_ctrl_c_is_quiet(daemon: Daemon) -> None:
    process = start(daemon, "events", "-f")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(AT.encode())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 130
    wait_until(lambda: not daemon.stand_in.subscribers)


def test_following_logs(daemon: Daemon) -> None:
    (daemon.folder / "blog.log").write_bytes(b"old\n")
    process = start(daemon, "logs", "-f", "blog")
    assert process.stdout is not None
    assert process.stdout.readline() == b"old\n"
    with (daemon.folder / "blog.log").open("ab") as file:
        file.write(b"no newline yet")
    daemon.do(lambda: [wake() for wake in daemon.stand_in.watchers])
    assert process.stdout.read1(100) == b"no newline yet"  # type: ignore[attr-defined]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize("argv", [("status",), ("logs", "-f", "blog"), ("events", "-f")])
def test_a_closed_pipe_is_quiet(daemon: Daemon, argv: tuple[str, ...]) -> None:
    (daemon.folder / "blog.log").write_bytes(b"x\n" * 10)
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start(daemon, *argv, stdout=write_end)
    os.close(write_end)
    assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 141


class Terminal:
    """A pseudo-terminal of 60 columns, and what was written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        os.system(f"stty cols 60 rows 20 -onlcr < {os.ttyname(self.slave)}")

    def text(self) -> str:
        """All that was written, after the writer's end."""
        os.close(self.slave)
        text = b""
        while True:
            try:
                text += os.read(self._master, 65536)
            except OSError:  # EIO: nobody has it open any more
                os.close(self._master)
                return text.decode()


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_status_on_a_terminal(daemon: Daemon, environment: dict[str, str], coloured: bool) -> None:
    daemon.stand_in.processes["blog"]["why"] = "a very long reason " * 10
    terminal = Terminal()
    process = start(daemon, "status", stdout=terminal.slave, env={**ENVIRONMENT, **environment})
    process.communicate(timeout=20)
    text = terminal.text()
    assert ("\x1b[32mRUNNING\x1b[0m" in text) == coloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert lines[0].startswith("NAME    STATE ")
    assert lines[3].startswith("blog    FATAL    -  ")
    assert lines[3].endswith("…")
    assert max(map(len, lines)) == 60


@pytest.mark.parametrize("in_place", [True, False])
def test_progress_on_a_terminal(daemon: Daemon, in_place: bool) -> None:
    daemon.do(daemon.stand_in.gate.clear)
    terminal = Terminal()
    environment = {**ENVIRONMENT, "TERM": "xterm" if in_place else "dumb"}
    process = start(daemon, "start", "shop", stderr=terminal.slave, env=environment)
    wait_until(lambda: daemon.stand_in.asked)
    daemon.do(daemon.stand_in.gate.set)
    assert process.communicate(timeout=20)[0] == b"shop:1  RUNNING  asked by uid 0\nshop:2  RUNNING  asked by uid 0\n"
    shown = ["shop:1 STARTING  asked", "shop:2 STARTING  asked"]
    if in_place:
        assert terminal.text() == "".join(f"\r\x1b[K{line}" for line in shown) + "\r\x1b[K"
    else:
        assert terminal.text() == "".join(f"{line}\n" for line in shown)


def test_what_is_waited_for_long_is_said_once_also_in_a_pipe() -> None:
    """On a terminal on a line of its own; never where a program reads."""
    told = {"name": "web", "state": "RUNNING", "why": "waits for its canary", "notice": True}
    pipe, quiet = io.StringIO(), io.StringIO()
    for stream, silent in ((pipe, False), (quiet, True)):
        progress = Progress(stream, quiet=silent)
        for params in (told, told, {**told, "notice": False, "why": "119 s left"}):
            progress.heard("progress", params)
        progress.clear()
    assert pipe.getvalue() == "procmanctl: web: waits for its canary\n"
    assert quiet.getvalue() == ""


def test_no_progress_in_a_pipe(daemon: Daemon) -> None:
    assert start(daemon, "start", "shop").communicate(timeout=20)[1] == b""


def test_nothing_heavy_is_imported(daemon: Daemon) -> None:
    """A status must be quick; what it imports is most of its time."""
    code = (
        "import sys; before = set(sys.modules); from procman.ctl.main import main; "
        f"main(['-s', {daemon.path!r}, 'status']); print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=20
    )
    modules = set(done.stdout.splitlines()[-1].split())
    assert "procman.client" in modules
    heavy = {"asyncio", "psutil", "tomllib", "tomli_w", "subprocess", "logging", "shutil", "threading", "difflib"}
    assert not modules & heavy
    ours = {name for name in modules if name.startswith("procman.")}
    assert ours == {
        f"procman.{name}" for name in ("rpc", "errors", "client", "ctl", "ctl.main", "ctl.session", "ctl.tables")
    }


# --- check and init


def parse(path: Path) -> Config:
    return table.parse(str(path), files.Machine())


def test_init_writes_a_table_that_check_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    ran = Ran(capsys, "init")
    assert (ran.status, ran.err) == (0, "")
    assert "next: procmanctl check ./procman.toml" in ran.out
    assert [program.name for program in parse(tmp_path / "procman.toml").programs] == ["worker"]
    done = subprocess.run(
        [sys.executable, "-c", CTL, "check", "procman.toml"], env=ENVIRONMENT, timeout=60, check=False
    )
    assert done.returncode == 0


def test_the_example_of_init_is_right_too(tmp_path: Path) -> None:
    """With the "# " taken away, the web server in the starter table is accepted as well."""
    tmp_path.chmod(0o755)
    head, example = starter.contents().split("name your application.\n")
    path = tmp_path / "procman.toml"
    path.write_text(head + "name your application.\n" + re.sub("^# ", "", example, flags=re.MULTILINE))
    config = parse(path)
    assert {program.program for program in config.programs} == {"shop", "worker"}
    assert [str(listener.address) for listener in config.listeners] == ["127.0.0.1:8000"]


def test_init_makes_the_folder_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "site"
    old = os.umask(0)
    try:
        assert Ran(capsys, "--json", "init", str(folder)).json == {"path": f"{folder}/procman.toml"}
    finally:
        os.umask(old)
    path = folder / "procman.toml"
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_text("mine")
    ran = Ran(capsys, "init", str(folder))
    assert ran.status == 1
    assert ran.err.startswith(f"procmanctl: {path} exists already\n  hint: ")
    assert path.read_text() == "mine"
    assert Ran(capsys, "init", str(path)).err == f"procmanctl: {path} is a file, not a folder\n"
    assert "can't write" in Ran(capsys, "init", "/proc/nowhere").err


def test_check_names_the_problems(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "procman.toml"
    path.write_text('[program.x]\ncommand = "sleep 1"\nstop_signal = "TREM"\n')

    def check(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CTL, *argv]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)

    for argv in (("check", str(path)), ("-c", str(path), "check"), ("check", "-c", str(path))):
        done = check(*argv)
        assert done.returncode == 2
        assert f"{path}:3: program.x.stop_signal: " in done.stderr
    done = check("--json", "check", str(path))
    assert done.returncode == 2
    assert json.loads(done.stdout)["ok"] is False
    assert "stop_signal" in json.loads(done.stdout)["output"][0]


def test_check_is_not_led_astray_by_modules_in_this_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "json.py").write_text("raise SystemExit('I am not json')")
    (tmp_path / "procman.py").write_text("raise SystemExit('I am not procman')")
    (tmp_path / "procman.toml").write_text("")
    code = f"import sys; sys.path.remove(''); sys.path.insert(0, {str(PROJECT)!r}); {CTL.removeprefix('import sys; ')}"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "procman.toml"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# --- figures


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (-1, "0.0s"), (0, "0.0s"), (0.44, "0.4s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"),
        (59.6, "1m00s"), (303, "5m03s"), (3599.7, "1h00m"), (7500, "2h05m"), (86399.9, "1d00h"), (273_600, "3d04h"),
        (86400 * 400, "400d00h"),
    ],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KB"), (1536, "1.5 KB"), (1024**2 - 1, "1.0 MB"),
        (41943040, "40.0 MB"), (3 * 1024**3, "3.0 GB"), (5 * 1024**4, "5.0 TB"), (5000 * 1024**4, "5000.0 TB"),
    ],
)  # fmt: skip
def test_size(count: int | None, text: str) -> None:
    assert tables.size(count) == text


def test_columns() -> None:
    assert tables.columns([("a", "1", "x"), ("bbb", "22", "yyyy")], right=[1]) == ["a     1  x", "bbb  22  yyyy"]
    assert tables.columns([("a", "bbbbbbbbb")], width=6) == ["a  bb…"]


def test_nothing_from_a_program_can_move_the_cursor() -> None:
    evil = "a\x1b[2J\r\nb\x07\x9bc\u202ed"
    assert tables.printable(evil) == "a�[2J� b��c�d"
    for lines in (
        tables.status([info("shop", why=evil)]),
        tables.why({"name": "x", "state": "FATAL", "why": evil, "output": [evil], "history": [{"why": evil}]}),
        tables.results([{"name": evil, "state": evil, "why": evil}]),
        [tables.event({"at": AT, "type": "state", "name": "x", "why": evil})],
        tables.facts({"x": evil, "y": [evil], "z": {"w": evil}}),
    ):
        assert all(line.isprintable() for line in lines)


# --- the docs hold it all

MANUAL = (PROJECT / "docs" / "procmanctl.md").read_text()


def all_parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(command, its parser) of each command, "daemon status" and its like too."""

    def below(name: str, one: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        subs = [action for action in one._actions if isinstance(action, argparse._SubParsersAction)]
        if not subs:
            yield name, one
        for action in subs:
            for word, sub in action.choices.items():
                yield from below(f"{name} {word}".strip(), sub)

    return below("", parser())


def section(title: str) -> str:
    match = re.search(rf"^#+ `procmanctl {re.escape(title)}\b.*?(?=^## |^### |\Z)", MANUAL, re.MULTILINE | re.DOTALL)
    assert match, f"docs/procmanctl.md has no section `procmanctl {title}`"
    return match[0]


@pytest.mark.parametrize(("name", "one"), list(all_parsers()), ids=[name for name, _ in all_parsers()])
def test_each_command_is_in_the_manual(name: str, one: argparse.ArgumentParser) -> None:
    text = section(name)
    assert re.search(r"```.*```", text, re.DOTALL), "no example"
    for action in one._actions:
        if action.help and action.dest not in ("help", "socket", "config", "json"):
            for word in action.option_strings or [str(action.metavar)]:
                assert f"{word}" in text, f"{word} is not explained"
    assert one.description


def test_the_manual_has_no_other_commands() -> None:
    titles = re.findall(r"^#+ `procmanctl ([a-z -]+?)(?: [A-Z\[].*)?`", MANUAL, re.MULTILINE)
    assert sorted(titles) == sorted(name for name, _ in all_parsers())


def test_the_manual_has_the_common_options_and_each_exit_status() -> None:
    for word in ("-s", "--socket", "-c", "--config", "--json", "--version", "$PROCMAN_SOCKET", "NO_COLOR"):
        assert word in MANUAL
    for status in (0, 1, 2, 3, 4, 5, 6, 130, 141):
        assert re.search(rf"^\| {status} \|", MANUAL, re.MULTILINE), status


def test_each_field_of_a_process_is_in_the_manual() -> None:
    for name in PROCESS_FIELDS:
        assert f"| `{name}` |" in MANUAL, name


def test_the_protocol_page_has_each_method_and_param() -> None:
    text = (PROJECT / "docs" / "rpc.md").read_text()
    for name, method in METHODS.items():
        row = re.search(rf"^\| `{re.escape(name)}` \|.*$", text, re.MULTILINE)
        assert row, name
        for param in method.params:
            assert f"`{param}`" in row[0], (name, param)
        assert f"| {method.role} |" in row[0]
    for number in (-32700, -32600, -32601, -32602, -32603, -32000):
        assert str(number) in text


def test_only_as_much_of_the_command_line_is_built_as_needed() -> None:
    whole = {name for name, _ in all_parsers()}
    for name in whole:
        first = name.split()[0]
        some = parser(first)
        assert first in some.format_help()
    assert len(parser("status").format_help()) < len(parser().format_help())
    assert parser("nonsense").format_help() == parser("").format_help()


def test_the_starter_table_is_toml() -> None:
    assert set(tomllib.loads(starter.contents())["program"]) == {"worker"}

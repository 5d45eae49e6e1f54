"""apply with another address: who still comes to the old one is answered or refused at once, and never lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import PROGRAMS, RunningDaemon, free_port, wait_until
from tests.loss.servers import SERVERS, Server
from tests.visitors import Visitors

DROPS = 'command = ["${PYTHON}", "%s", "2"]\nready = { http = "/" }' % (PROGRAMS / "drops.py")
"""Two threads, and each drops what it has accepted when it is told to stop."""


class Moving:
    """Programs, each of another server, with an address of its own that `table` makes of its number."""

    def __init__(self, daemon: MakeDaemon, folder: Path, servers: Mapping[str, Server | str]) -> None:
        self.servers = {
            name: server for name, server in servers.items() if isinstance(server, str) or server.installed
        }
        self.ports = {name: free_port() for name in self.servers}
        self.folder = folder
        self.version = 1
        self._make = daemon
        self.running: RunningDaemon

    def start(self, address: Callable[[str], str]) -> None:
        self.running = self._make(self.table(address))
        for name in self.running.status():
            self.running.wait_for(name, timeout=60)

    def table(self, address: Callable[[str], str]) -> str:
        """Every program at `address` of its name, and with the version that is next."""
        version = self.folder / f"version-{self.version}"
        version.write_text(str(self.version))
        variables = {"VERSION_FILE": str(version), "VERSION": str(self.version)}
        parts = []
        for name, server in self.servers.items():
            more = "start_seconds = 0.1"
            if isinstance(server, Server):
                parts.append(server.program(address(name), variables, more, name))
            else:
                pairs = ", ".join(f'{key} = "{value}"' for key, value in variables.items())
                lines = (server, more, f"listen = {json.dumps(address(name))}", f"environment = {{ {pairs} }}")
                parts.append("\n".join((f"[program.{name}]", *lines)))
        return "\n".join(parts)

    @contextmanager
    def visited(self, address: Callable[[str], str]) -> Iterator[dict[str, Visitors]]:
        with ExitStack() as stack:
            found = {name: stack.enter_context(Visitors(address(name))) for name in self.servers}
            for each in found.values():
                each.goes_on()
            yield found

    def apply(self, address: Callable[[str], str]) -> None:
        """All of them are there afterwards, in the next version."""
        self.version += 1
        self.running.write_table(self.table(address))
        done = self.running.ctl("apply", timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr


def told(name: str, visitors: Visitors) -> str:
    lost = "\n  ".join(visitors.lost[:5])
    return f"{name}: {visitors.answered} answered, {visitors.refused} refused, {len(visitors.lost)} lost\n  {lost}"


def nobody_lost(visitors: Mapping[str, Visitors], *, refused: bool) -> None:
    shown = "\n".join(told(name, each) for name, each in visitors.items())
    assert not any(each.lost for each in visitors.values()), shown
    assert all(bool(each.refused) == refused for each in visitors.values()), shown


EVERY: Mapping[str, Server | str] = {**SERVERS, "drops": DROPS}
FEW = {name: EVERY[name] for name in ("gunicorn", "uvicorn", "drops")}
"""Of processes, of an event loop, and one that loses what it can: the kernel's part is the same for all."""


@pytest.mark.parametrize(("servers", "unix"), [(EVERY, False), (FEW, True)], ids=["tcp", "unix"])
def test_nobody_is_lost_at_an_address_that_moves(
    daemon: MakeDaemon, tmp_path: Path, servers: Mapping[str, Server | str], unix: bool
) -> None:
    """Answered by the one before as long as that lasts, then refused at once."""
    moving = Moving(daemon, tmp_path, servers)
    new = {name: free_port() for name in moving.servers}

    def at(name: str) -> str:
        return f"unix:{tmp_path}/{name}.sock" if unix else f"127.0.0.1:{moving.ports[name]}"

    def moved(name: str) -> str:
        return f"unix:{tmp_path}/{name}.new" if unix else f"127.0.0.1:{new[name]}"

    moving.start(at)
    with moving.visited(at) as before:
        moving.apply(moved)
        wait_until(lambda: all(each.refused for each in before.values()))
    nobody_lost(before, refused=True)
    assert all(set(each.answered) == {"1"} for each in before.values())
    with moving.visited(moved) as after:
        pass
    nobody_lost(after, refused=False)
    assert all(set(each.answered) == {"2"} for each in after.values())


@pytest.mark.parametrize("what", ["restart", "remove"])
def test_nobody_is_lost_at_an_address_that_closes(daemon: MakeDaemon, tmp_path: Path, what: str) -> None:
    """With a program that can only restart, at another address, and with one that leaves the table."""
    lines = f'{DROPS}\nreload = "restart"'
    moving = Moving(daemon, tmp_path, {"drops": lines})
    old, new = (f"127.0.0.1:{port}" for port in (moving.ports["drops"], free_port()))
    moving.start(lambda name: old)
    with moving.visited(lambda name: old) as visitors:
        if what == "restart":
            moving.apply(lambda name: new)
        else:
            moving.running.write_table('[program.other]\ncommand = "sleep 1000"')
            assert moving.running.ctl("apply").returncode == 0
        wait_until(lambda: visitors["drops"].refused)
    nobody_lost(visitors, refused=True)


def test_nobody_is_lost_or_refused_from_one_address_to_all_and_back(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Clients of 127.0.0.1 need not move."""
    moving = Moving(daemon, tmp_path, FEW)

    def narrow(name: str) -> str:
        return f"127.0.0.1:{moving.ports[name]}"

    def wide(name: str) -> str:
        return f":{moving.ports[name]}"

    moving.start(narrow)
    with moving.visited(narrow) as visitors:
        for number, address in (("2", wide), ("3", narrow)):
            moving.apply(address)
            for name, each in visitors.items():
                wait_until(lambda each=each: each.answered[number], 30, f"{name} answers as {number}")  # type: ignore[misc]  # noqa: B023
    nobody_lost(visitors, refused=False)
    assert all(set(each.answered) == {"1", "2", "3"} for each in visitors.values())


def test_a_successor_that_fails_at_a_narrower_address(daemon: MakeDaemon, tmp_path: Path) -> None:
    """Who comes there in its trial is answered by the one before."""
    moving = Moving(daemon, tmp_path, {"drops": DROPS})
    port = moving.ports["drops"]
    moving.start(lambda name: f":{port}")
    with moving.visited(lambda name: f"127.0.0.1:{port}") as visitors:
        moving.servers = {"drops": 'command = ["sh", "-c", "sleep 2; exit 1"]\nready = { http = "/" }'}
        moving.running.write_table(moving.table(lambda name: f"127.0.0.1:{port}"))
        done = moving.running.ctl("apply", timeout=60)
        assert (done.returncode, "rolled back" in done.stderr) == (1, True), done.stderr
        visitors["drops"].goes_on()
    nobody_lost(visitors, refused=False)
    assert set(visitors["drops"].answered) == {"1"}


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("refuses", [False, True], ids=["passed", "leaving"])
def test_the_supervisor_dies_meanwhile(daemon: MakeDaemon, tmp_path: Path, unix: bool, refuses: bool) -> None:
    """Before the old address refuses who comes, and afterwards. The next one goes on from there: who waits in it is
    answered, and the processes of before go."""
    moving = Moving(daemon, tmp_path, {"drops": f"instances = 2\n{DROPS}"})
    old = f"unix:{tmp_path}/old" if unix else f"127.0.0.1:{moving.ports['drops']}"
    new = f"unix:{tmp_path}/new" if unix else f"127.0.0.1:{free_port()}"
    moving.start(lambda name: old)
    before = {info["pid"] for info in moving.running.status().values()}
    with moving.visited(lambda name: old) as visitors:
        moving.version += 1
        moving.running.write_table(moving.table(lambda name: new))
        assert moving.running.ctl("apply", "--no-wait").returncode == 0
        wait_until(lambda: visitors["drops"].refused if refuses else _serves(moving.running), 30)
        os.kill(moving.running.supervisor_pid, signal.SIGKILL)
        assert all(Path(f"/proc/{pid}").exists() for pid in before)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), 30)
    nobody_lost(visitors, refused=True)
    with moving.visited(lambda name: new) as after:
        pass
    nobody_lost(after, refused=False)
    assert wait_until(lambda: moving.running.ctl("diff").returncode == 0)
    assert set(after["drops"].answered) == {"2"}


def _serves(running: RunningDaemon) -> bool:
    """Whether the successors do, and the ones before are still there."""
    return all((info["beside"] or {}).get("role") == "the one before" for info in running.status().values())

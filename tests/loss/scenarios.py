"""What a site goes through while it is asked all the time: each scenario is one function, for any server.

    with Site("gunicorn", front="nginx") as site, site.load(connections=8) as running:
        SCENARIOS["reload"](site, running, 3)
    running.result

A scenario waits for what it has caused, each time: the new process answers, and goes on to answer. It judges nothing.
`reload` and `rollback` use `procmanctl reload` as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import RunningDaemon, free_port, wait_until
from tests.loss import nginx
from tests.loss.load import Running, load
from tests.loss.servers import SERVERS, version_file
from tests.sites.numbered_site import BROKEN

FRONTS = ("tcp", "unix", "nginx", "nginx-unix")
"""Who is asked: the server itself, over TCP or a Unix socket, or an nginx before it."""

AFTER = 60
"""Answers that must come after each step before the next one."""

READY_SECONDS = 40.0


class Site(AbstractContextManager["Site"]):
    """A daemon whose program `site` is a real server, with a release of its own, and perhaps an nginx before it.

    `gated`: nothing is imported until `open_gate()`. `make` makes the daemon (the fixture `daemon` of the tests, say);
    without it the daemon is the site's own, and what it leaves behind is an error.
    """

    def __init__(
        self,
        server: str,
        front: str = "tcp",
        *,
        more: str = "",
        gated: bool = False,
        make: Callable[..., RunningDaemon] | None = None,
    ) -> None:
        self.server, self.front = SERVERS[server], front
        self.killed: list[tuple[int, float]] = []  # pids, and when (monotonic)
        self.version = 1
        self._folder = Path(tempfile.mkdtemp(prefix="pml", dir="/tmp"))
        self._more, self._gated, self._make = more, gated, make
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._folder)
            self._folder.chmod(0o755)
            unix = self.front.endswith("unix")
            upstream = f"unix:{self._folder}/site.sock" if unix else f"127.0.0.1:{free_port()}"
            version_file(self._folder, str(self.version))
            environment = {"VERSION_FILE": str(self._folder / "version")}
            if self._gated:
                environment["IMPORT_GATE"] = str(self._folder / "gate")
            table = self.server.program(upstream, environment, self._more)
            if self._make:
                self.daemon = self._make(table)
            else:
                self.daemon = RunningDaemon(table)
                stack.callback(self._close)
                self.daemon.start()
            if not self._gated:
                self.wait_running()
            self.address = stack.enter_context(nginx.nginx(upstream)) if "nginx" in self.front else upstream
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _close(self) -> None:
        wrong = self.daemon.close()
        if wrong:
            raise RuntimeError("\n".join(wrong))

    def load(self, **plan: Any) -> AbstractContextManager[Running]:
        """A load on it, as tests/loss/load.py has it."""
        return load(self.address, **plan)

    def open_gate(self) -> None:
        """Lets the import go on, now and from now on."""
        (self._folder / "gate").touch()

    def release(self, version: str = "") -> str:
        """Puts another release in place; the next one, if none is named. Returns its version."""
        if not version:
            self.version += 1
            version = str(self.version)
        version_file(self._folder, version)
        return version

    def status(self) -> Mapping[str, Mapping[str, Any]]:
        """The ProcessInfo of its processes."""
        return self.daemon.status()

    def wait_running(self) -> None:
        """Waits until all its processes are RUNNING."""

        def all_run() -> bool:
            for info in self.status().values():
                assert info["state"] == "RUNNING", info
            return True

        wait_until(all_run, READY_SECONDS, "the site runs")
        self.daemon.look()

    def kill(self, name: str) -> int:
        """SIGKILL for a process; its pid."""
        pid: int = self.status()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        self.killed.append((pid, time.monotonic()))
        return pid

    def ctl(self, *arguments: str) -> None:
        """A command that must succeed."""
        done = self.daemon.ctl(*arguments, timeout=120)
        if done.returncode:
            raise RuntimeError(f"procmanctl {' '.join(arguments)}: {done.returncode}, {done.stdout}{done.stderr}")


def start(site: Site, running: Running, times: int) -> None:
    """The first start of a gated site, while all connections wait; then stop and start, again and again."""
    connections = running.plan.connections
    wait_until(lambda: running.progress["asked"] >= connections, what="all connections wait")
    assert running.progress["answers"] == 0
    site.open_gate()
    site.wait_running()
    running.wait(AFTER)
    for _ in range(times - 1):
        version = site.release()
        site.ctl("stop", "site")
        site.ctl("start", "site")
        running.wait_for_version(version)
        running.wait(AFTER)


def restart(site: Site, running: Running, times: int, command: str = "restart") -> None:
    """`procmanctl restart`, each time with another release."""
    for _ in range(times):
        version = site.release()
        running.wait(AFTER)
        site.ctl(command, "site")
        running.wait_for_version(version)
    running.wait(AFTER)


def reload(site: Site, running: Running, times: int) -> None:
    """`procmanctl reload`, each time with another release. A site of several processes is reloaded one by one."""
    restart(site, running, times, "reload")


def rollback(site: Site, running: Running, times: int) -> None:
    """A release that can't be imported is reloaded; the command must fail. Then the one before is put back."""
    for _ in range(times):
        running.wait(AFTER)
        site.release(BROKEN)
        done = site.daemon.ctl("reload", "site", timeout=120)
        site.release(str(site.version))
        if not done.returncode:
            raise RuntimeError(f"procmanctl reload of a broken release: {done.stdout}")
        if any(info["state"] != "RUNNING" for info in site.status().values()):
            site.ctl("start", "site")  # nothing was rolled back
    running.wait(AFTER)


def kill(site: Site, running: Running, times: int) -> None:
    """SIGKILL for one process of the site, each time another one of them; its successor answers."""
    for number in range(times):
        running.wait(AFTER)
        names = sorted(site.status())
        name = names[number % len(names)]
        killed = site.kill(name)

        def replaced(name: str = name, killed: int = killed) -> bool:
            info = site.status()[name]
            return bool(info["state"] == "RUNNING" and info["pid"] != killed)

        wait_until(replaced, READY_SECONDS, f"{name} runs again")
        running.wait(AFTER)


def supervisor(site: Site, running: Running, times: int) -> None:
    """SIGKILL for the supervisor."""
    for _ in range(times):
        running.wait(AFTER)
        os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
        wait_until(site.daemon.answers, READY_SECONDS, "the daemon answers")
    running.wait(AFTER)


def upgrade(site: Site, running: Running, times: int) -> None:
    """`procmanctl daemon upgrade`, to the version that is installed."""
    for _ in range(times):
        running.wait(AFTER)
        site.ctl("daemon", "upgrade")
    running.wait(AFTER)


SCENARIOS: Mapping[str, Callable[[Site, Running, int], None]] = {
    function.__name__: function for function in (start, restart, reload, rollback, kill, supervisor, upgrade)
}

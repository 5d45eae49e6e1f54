"""What a site goes through while it is asked all the time: each scenario is one function, for any server.

    with Site("gunicorn", nginx=True) as site, site.load(connections=8) as direct, site.load("nginx") as proxied:
        SCENARIOS["reload"](site, 3)
    direct.result, proxied.result

A scenario waits for what it has caused, each time: the new process answers, and goes on to answer. It judges nothing.
`reload` and `rollback` use `procmanctl reload` as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import RunningDaemon, free_port, wait_until
from tests.loss.load import Running, load
from tests.loss.nginx import nginx as nginx_before
from tests.loss.servers import SERVERS, version_file
from tests.sites.numbered_site import BROKEN

AFTER = 40
"""Answers that must come after each step before the next one."""

READY_SECONDS = 40.0


class Site(AbstractContextManager["Site"]):
    """A daemon whose program `site` is a real server, with a release of its own, and perhaps an nginx before it.

    `unix`: it listens on a Unix socket. `gated`: nothing is imported until `open_gate()`. `make` makes the daemon (the
    fixture `daemon` of the tests, say); without it the daemon is the site's own, and what it leaves behind is an error.
    """

    def __init__(
        self,
        server: str,
        *,
        unix: bool = False,
        nginx: bool = False,
        more: str = "",
        gated: bool = False,
        make: Callable[..., RunningDaemon] | None = None,
    ) -> None:
        self.server = SERVERS[server]
        self.loads: list[Running] = []  # that go on
        self.killed: list[tuple[int, float, float]] = []  # pids, and between when and when (monotonic)
        self.version = 1
        self._folder = Path(tempfile.mkdtemp(prefix="pml", dir="/tmp"))
        self._unix, self._nginx, self._more, self._gated, self._make = unix, nginx, more, gated, make
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._folder)
            self._folder.chmod(0o755)
            upstream = f"unix:{self._folder}/site.sock" if self._unix else f"127.0.0.1:{free_port()}"
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
            self.addresses = {"direct": upstream}
            if self._nginx:
                self.addresses["nginx"] = stack.enter_context(nginx_before(upstream))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _close(self) -> None:
        wrong = self.daemon.close()
        if wrong:
            raise RuntimeError("\n".join(wrong))

    @contextmanager
    def load(self, front: str = "direct", **plan: Any) -> Iterator[Running]:
        """A load on it, as tests/loss/load.py has it; `front` is "direct" or "nginx"."""
        with load(self.addresses[front], **plan) as running:
            self.loads.append(running)
            yield running
            self.loads.remove(running)

    def wait_for_version(self, version: str) -> None:
        """Waits until this version has answered each load."""
        for running in self.loads:
            running.wait_for_version(version)

    def goes_on(self) -> None:
        """Waits until each load has got some more answers."""
        for running in self.loads:
            running.wait(AFTER)

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
        before = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.killed.append((pid, before, time.monotonic()))
        return pid

    def ctl(self, *arguments: str) -> None:
        """A command that must succeed."""
        done = self.daemon.ctl(*arguments, timeout=120)
        if done.returncode:
            raise RuntimeError(f"procmanctl {' '.join(arguments)}: {done.returncode}, {done.stdout}{done.stderr}")


def start(site: Site, times: int) -> None:
    """The first start of a gated site, while all connections wait; then stop and start, again and again."""
    for running in site.loads:
        connections = running.plan.connections
        wait_until(lambda: running.progress["asked"] >= connections, what="all connections wait")  # noqa: B023
        assert running.progress["answers"] == 0
    site.open_gate()
    site.wait_running()
    site.goes_on()
    for _ in range(times - 1):
        version = site.release()
        site.ctl("stop", "site")
        site.ctl("start", "site")
        site.wait_for_version(version)
        site.goes_on()


def restart(site: Site, times: int, command: str = "restart") -> None:
    """`procmanctl restart`, each time with another release."""
    for _ in range(times):
        version = site.release()
        site.goes_on()
        site.ctl(command, "site")
        site.wait_for_version(version)
    site.goes_on()


def reload(site: Site, times: int) -> None:
    """`procmanctl reload`, each time with another release. A site of several processes is reloaded one by one."""
    restart(site, times, "reload")


def rollback(site: Site, times: int) -> None:
    """A release that can't be imported is reloaded; the command must fail. Then the one before is put back."""
    for _ in range(times):
        site.goes_on()
        site.release(BROKEN)
        done = site.daemon.ctl("reload", "site", timeout=120)
        site.release(str(site.version))
        if not done.returncode:
            raise RuntimeError(f"procmanctl reload of a broken release: {done.stdout}")
        if any(info["state"] != "RUNNING" for info in site.status().values()):
            site.ctl("start", "site")  # nothing was rolled back
    site.goes_on()


def kill(site: Site, times: int) -> None:
    """SIGKILL for one process of the site, each time another one of them; its successor answers."""
    for number in range(times):
        site.goes_on()
        names = sorted(site.status())
        name = names[number % len(names)]
        killed = site.kill(name)

        def replaced(name: str = name, killed: int = killed) -> bool:
            info = site.status()[name]
            return bool(info["state"] == "RUNNING" and info["pid"] != killed)

        wait_until(replaced, READY_SECONDS, f"{name} runs again")
        site.goes_on()


def supervisor(site: Site, times: int) -> None:
    """SIGKILL for the supervisor."""
    for _ in range(times):
        site.goes_on()
        os.kill(site.daemon.supervisor_pid, signal.SIGKILL)
        wait_until(site.daemon.answers, READY_SECONDS, "the daemon answers")
    site.goes_on()


def upgrade(site: Site, times: int) -> None:
    """`procmanctl daemon upgrade`, to the version that is installed."""
    for _ in range(times):
        site.goes_on()
        site.ctl("daemon", "upgrade")
    site.goes_on()


SCENARIOS: Mapping[str, Callable[[Site, int], None]] = {
    function.__name__: function for function in (start, restart, reload, rollback, kill, supervisor, upgrade)
}

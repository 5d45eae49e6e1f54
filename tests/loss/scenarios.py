"""What a site goes through while it is asked all the time: each scenario is one function, for any server.

    with Site("gunicorn", nginx=True) as site, site.load(connections=8) as direct, site.load("nginx") as proxied:
        SCENARIOS["reload"](site, 3)
    direct.result, proxied.result

`side_by_side` has several sites in one daemon. A scenario waits for what it has caused, each time: the new process
answers, and goes on to answer. It judges nothing.
`reload` and `rollback` use `procmanctl reload` as it is.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.harness import RunningDaemon, descendants, free_port, wait_until
from tests.loss.load import Running, load
from tests.loss.nginx import nginx as nginx_before
from tests.loss.servers import SERVERS, Server, version_file
from tests.sites.numbered_site import BROKEN

AFTER = 40
"""Answers that must come after each step before the next one; fewer where there are few connections."""

READY_SECONDS = 40.0


class Killed(NamedTuple):
    """A process and those below it, which go with it, and between when and when they did (monotonic)."""

    pids: tuple[int, ...]
    before: float
    after: float


class Site(AbstractContextManager["Site"]):
    """A daemon whose program `name` is a real server, with a release of its own, and perhaps an nginx before it.

    `unix`: it listens on a Unix socket. `gated`: nothing is imported until `open_gate()`. `make` makes the daemon (the
    fixture `daemon` of the tests, say); without it the daemon is the site's own, and what it leaves behind is an error.
    """

    def __init__(
        self,
        server: str | Server,
        *,
        name: str = "site",
        unix: bool = False,
        nginx: bool = False,
        more: str = "",
        gated: bool = False,
        make: Callable[..., RunningDaemon] | None = None,
    ) -> None:
        self.server = SERVERS[server] if isinstance(server, str) else server
        self.name = name
        self.loads: list[Running] = []  # that go on
        self.killed: list[Killed] = []
        self.version = 1
        self._folder = Path(tempfile.mkdtemp(prefix="pml", dir="/tmp"))
        self._unix, self._nginx, self._more, self._gated, self._make = unix, nginx, more, gated, make
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            table = self.prepare(stack)
            if self._make:
                daemon = self._make(table)
            else:
                daemon = RunningDaemon(table)
                stack.callback(_close, daemon)
                daemon.start()
            self.attach(daemon, stack)
            self._stack = stack.pop_all()
        return self

    def prepare(self, stack: ExitStack) -> str:
        """Makes its folder. Returns its part of the program table."""
        stack.callback(shutil.rmtree, self._folder)
        self._folder.chmod(0o755)
        self._upstream = f"unix:{self._folder}/site.sock" if self._unix else f"127.0.0.1:{free_port()}"
        version_file(self._folder, str(self.version))
        environment = {"VERSION_FILE": str(self._folder / "version"), "IMPORT_GATE": str(self._folder / "gate")}
        if not self._gated:
            self.open_gate()
        return self.server.program(self._upstream, environment, self._more, self.name)

    def attach(self, daemon: RunningDaemon, stack: ExitStack) -> None:
        """`daemon` has its program, and has started."""
        self.daemon = daemon
        if not self._gated:
            self.wait_running()
        self.addresses = {"direct": self._upstream}
        if self._nginx:
            self.addresses["nginx"] = stack.enter_context(nginx_before(self._upstream))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

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
            running.wait(min(AFTER, 2 * running.plan.connections))

    def open_gate(self) -> None:
        """Lets the import go on, now and from now on."""
        (self._folder / "gate").touch()

    def close_gate(self) -> None:
        """Keeps the next start in its import."""
        (self._folder / "gate").unlink()

    def release(self, version: str = "") -> str:
        """Puts another release in place; the next one, if none is named. Returns its version."""
        if not version:
            self.version += 1
            version = str(self.version)
        version_file(self._folder, version)
        return version

    def status(self) -> Mapping[str, Mapping[str, Any]]:
        """The ProcessInfo of its processes."""
        return {name: info for name, info in self.daemon.status().items() if name.partition(":")[0] == self.name}

    def pids(self) -> dict[str, int]:
        """Those of its current processes."""
        return {name: info["pid"] for name, info in self.status().items()}

    def begin_reload(self) -> None:
        """Asks for a reload, and does not wait for it."""
        with self.daemon.client(60) as client:
            client.call("reload", names=[self.name], wait=False)

    def in_trial(self) -> bool:
        """Whether a successor is on trial."""
        return any((info["beside"] or {}).get("role") == "successor" for info in self.status().values())

    def passed(self) -> bool:
        """Whether a successor serves, and the one before is still there."""
        return any((info["beside"] or {}).get("role") == "the one before" for info in self.status().values())

    def settled(self) -> bool:
        """Whether nobody is beside its processes, which all run."""
        return all(info["beside"] is None and info["state"] == "RUNNING" for info in self.status().values())

    def kill_supervisor(self) -> None:
        """SIGKILL; waits for the next one."""
        os.kill(self.daemon.supervisor_pid, signal.SIGKILL)
        wait_until(self.daemon.answers, READY_SECONDS, "the daemon answers")

    def wait_running(self) -> None:
        """Waits until all its processes are RUNNING."""

        def all_run() -> bool:
            for info in self.status().values():
                assert info["state"] == "RUNNING", info
            return True

        wait_until(all_run, READY_SECONDS, "the site runs")
        self.daemon.look()

    def kill(self, name: str) -> int:
        """SIGKILL for a process; its pid. Waits until it has gone: then its connections are closed."""
        pid: int = self.status()[name]["pid"]
        tree = (pid, *(each.pid for each in descendants(pid)))
        with ExitStack() as stack:
            ends = [os.pidfd_open(each) for each in tree]
            for end in ends:
                stack.callback(os.close, end)
            before = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: len(select.select(ends, (), (), 0)[0]) == len(ends), READY_SECONDS, "they have gone")
        self.killed.append(Killed(tree, before, time.monotonic()))
        return pid

    def ctl(self, *arguments: str) -> None:
        """A command that must succeed."""
        done = self.daemon.ctl(*arguments, timeout=120)
        if done.returncode:
            raise RuntimeError(f"procmanctl {' '.join(arguments)}: {done.returncode}, {done.stdout}{done.stderr}")


def _close(daemon: RunningDaemon) -> None:
    wrong = daemon.close()
    if wrong:
        raise RuntimeError("\n".join(wrong))


@contextmanager
def side_by_side(sites: Sequence[Site], make: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    """One daemon with all these sites, each with a name of its own."""
    with ExitStack() as stack:
        daemon = make("\n".join(site.prepare(stack) for site in sites))
        for site in sites:
            site.attach(daemon, stack)
        yield daemon


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
        site.ctl("stop", site.name)
        site.ctl("start", site.name)
        site.wait_for_version(version)
        site.goes_on()


def restart(site: Site, times: int, *command: str) -> None:
    """`procmanctl restart`, each time with another release."""
    for _ in range(times):
        version = site.release()
        site.goes_on()
        site.ctl(*(command or ("restart",)), site.name)
        site.wait_for_version(version)
    site.goes_on()


def reload(site: Site, times: int) -> None:
    """`procmanctl reload`, each time with another release. A site of several processes is reloaded one by one."""
    restart(site, times, "reload")


def reload_two(site: Site, times: int) -> None:
    """`procmanctl reload --at-once 2`, the same."""
    restart(site, times, "reload", "--at-once", "2")


def rollback(site: Site, times: int) -> None:
    """A release that can't be imported is reloaded; the command must fail. The one before serves as before."""
    for _ in range(times):
        site.goes_on()
        site.release(BROKEN)
        before = site.pids()
        done = site.daemon.ctl("reload", site.name, timeout=120)
        site.release(str(site.version))
        if not done.returncode or "rolled back" not in done.stderr:
            raise RuntimeError(f"procmanctl reload of a broken release: {done.stdout}{done.stderr}")
        if site.pids() != before:
            raise RuntimeError(f"{site.name}: {before} before, {site.pids()} afterwards")
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
        site.kill_supervisor()
    site.goes_on()


def killed_in_trial(sites: Sequence[Site]) -> None:
    """SIGKILL for the supervisor while successors of all `sites` are on trial: those before serve as before."""
    before = [site.pids() for site in sites]
    for site in sites:
        site.close_gate()
        site.release("never")
        site.begin_reload()
    wait_until(lambda: all(site.in_trial() for site in sites), READY_SECONDS, "all successors start")
    sites[0].kill_supervisor()
    for site in sites:
        site.open_gate()  # else a gunicorn that is told to stop waits for the import as long as it may
    wait_until(lambda: all(site.settled() for site in sites), READY_SECONDS, "they have gone")
    if [site.pids() for site in sites] != before:
        raise RuntimeError(f"{before} before, {[site.pids() for site in sites]} afterwards")
    for site in sites:
        site.goes_on()


def killed_when_passed(sites: Sequence[Site]) -> None:
    """SIGKILL for the supervisor while a successor of each of `sites` serves and the one before is still there.

    They do not come so far at the same time: who is in the trial is tried again, with those that are left."""
    left = list(sites)
    while left:
        left = _some_killed_when_passed(left)
    for site in sites:
        site.goes_on()


def _some_killed_when_passed(sites: Sequence[Site]) -> list[Site]:
    """Those that had not come so far."""
    for site in sites:
        site.release()
        site.begin_reload()
    wait_until(lambda: any(site.passed() for site in sites), READY_SECONDS, "a successor serves")
    done = [site for site in sites if site.passed()]
    sites[0].kill_supervisor()
    wait_until(lambda: all(site.settled() for site in sites), READY_SECONDS, "all are settled")
    for site in done:
        site.wait_for_version(str(site.version))
    return [site for site in sites if site not in done]


def supervisor_in_trial(site: Site, times: int) -> None:
    """SIGKILL for the supervisor while a successor is on trial."""
    for _ in range(times):
        killed_in_trial([site])


def supervisor_passed(site: Site, times: int) -> None:
    """SIGKILL for the supervisor when a successor serves, and the one before is still there."""
    for _ in range(times):
        killed_when_passed([site])


def nothing(site: Site, times: int) -> None:
    """It goes on."""
    for _ in range(times):
        site.goes_on()


def upgrade(site: Site, times: int) -> None:
    """`procmanctl daemon upgrade`, to the version that is installed."""
    for _ in range(times):
        site.goes_on()
        site.ctl("daemon", "upgrade")
    site.goes_on()


SCENARIOS: Mapping[str, Callable[[Site, int], None]] = {
    function.__name__: function
    for function in (
        *(nothing, start, restart, reload, reload_two, rollback, kill),
        *(supervisor, supervisor_in_trial, supervisor_passed, upgrade),
    )
}

"""How many requests are lost when a site gets a new release, again and again, under load.

Each manager runs the same site (tests/sites/numbered_site.py) on the same real server, and is asked by the same client:
half of the connections are kept alive, half are new for each request. procman does `reload`, Circus `reload` with a
socket that it holds, the others their only way, a restart, and a gunicorn without any manager gets SIGHUP, as its
documentation says. A step is over when the new release has answered.

`reload` is a short one, with gunicorn only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench import tools
from tests.bench.circusd import Circusd
from tests.bench.contenders import Contender
from tests.bench.figures import OURS, Figure, Limit
from tests.bench.lineup import present
from tests.bench.machine import TooSlow, kill_all, run_timed
from tests.bench.plan import Plan
from tests.bench.pm2 import Pm2
from tests.bench.suites import Runsvdir, Svscan
from tests.bench.supervisord import Supervisord
from tests.harness import descendants, free_port, wait_until
from tests.loss.load import load
from tests.loss.scenarios import Site
from tests.loss.servers import SERVERS, SITES, version_file
from tests.loss.tally import Result

NAMES = ("losses",)
SHORT = ("reload",)

CONNECTIONS, RATE = 16, 100.0
"""Requests a second on each: the same for all, and a refused one must not be asked again at once, for ever."""

STEP_SECONDS = 60.0
"""Bound of one reload."""

PATHS = [str(SITES), *filter(None, [os.environ.get("PYTHONPATH")])]

FOUR = ("-w", "4", "numbered_site:app")
OWN: dict[str, Sequence[str]] = {
    "gunicorn": ("python", "-m", "gunicorn", "--no-control-socket", "-b", "{bind}", *FOUR),
    "gthread": (
        "python", "-m", "gunicorn", "--no-control-socket", "-b", "{bind}", "--threads=8", "-w", "2", "numbered_site:app"
    ),
    "uwsgi": (
        "uwsgi", "--master", "--die-on-term", "--need-app", "--disable-logging", "--processes=4",
        "--http-socket={bind}", "--module=numbered_site:app",
    ),
    "uvicorn": (
        "python", "-m", "uvicorn", "--log-level=warning", "--host={host}", "--port={port}", "numbered_site:asgi"
    ),
    "hypercorn": ("python", "-m", "hypercorn", "-b", "{bind}", "numbered_site:asgi"),
    "daphne": ("python", "-m", "daphne", "-v0", "-b", "{host}", "-p", "{port}", "numbered_site:asgi"),
    "granian": (
        "python", "-m", "granian", "--interface=asgi", "--no-ws", "--host={host}", "--port={port}", "numbered_site:asgi"
    ),
}  # fmt: skip
"""Each server on a socket of its own, as people run it under a manager that holds none."""

HELD: dict[str, Sequence[str]] = {
    "gunicorn": ("python", "-m", "gunicorn", "--no-control-socket", "-b", "fd://{fd}", *FOUR),
    "uvicorn": ("python", "-m", "uvicorn", "--log-level=warning", "--fd={fd}", "numbered_site:asgi"),
    "hypercorn": ("python", "-m", "hypercorn", "-b", "fd://{fd}", "numbered_site:asgi"),
    "daphne": ("python", "-m", "daphne", "-v0", "--fd={fd}", "numbered_site:asgi"),
}
"""Those that take a socket by its number, which is how Circus gives it."""


def argv(words: Sequence[str], port: int, fd: str = "") -> list[str]:
    """The command of a server."""
    first = {"python": sys.executable, "uwsgi": f"{Path(sys.executable).parent}/uwsgi"}
    bind = f"127.0.0.1:{port}"
    return [first.get(word, word).format(bind=bind, host="127.0.0.1", port=port, fd=fd) for word in words]


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one contender with one server."""

    contender: str
    server: str
    reloads: int
    result: Result

    def document(self) -> dict[str, object]:
        """As JSON shows it."""
        total = self.result.total
        return {
            "contender": self.contender, "server": self.server, "reloads": self.reloads, "requests": total.requests,
            "failed": total.failed, "idle_closed": total.idle_closed, "idle_closed_most": total.idle_closed_most,
            "longest_gap": self.result.longest_gap, "p99": total.p99, "slowest": total.slowest,
        }  # fmt: skip


class Reloaded(AbstractContextManager["Reloaded"]):
    """A site at work that can get a new release."""

    title = ""

    def __init__(self, server: str) -> None:
        self.server = server
        self.folder = Path(tempfile.mkdtemp(prefix="pmb", dir="/tmp"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {"VERSION_FILE": f"{self.folder}/version", "PYTHONPATH": ":".join(PATHS)}
        version_file(self.folder, "1")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def start(self) -> None:
        """Starts the site."""

    @abstractmethod
    def reload(self) -> None:
        """Has the release that was put in place taken up."""

    def release(self, version: str) -> None:
        """Puts it in place."""
        version_file(self.folder, version)

    def close(self) -> None:
        """Ends all, also what was started in part only."""
        shutil.rmtree(self.folder)


class ByProcman(Reloaded):
    """`procmanctl reload`."""

    title = "procmanctl reload"

    def start(self) -> None:
        self._stack = ExitStack()
        self._site = self._stack.enter_context(Site(self.server))
        self.address = self._site.addresses["direct"]

    def release(self, version: str) -> None:
        self._site.release(version)

    def reload(self) -> None:
        self._site.ctl("reload", "site")

    def close(self) -> None:
        super().close()
        self._stack.close()


class ByRestart(Reloaded):
    """A manager that holds no socket."""

    manager: type[Contender]

    def start(self) -> None:
        pairs = [f"{name}={value}" for name, value in self.environment.items()]
        self._manager = self.manager({"site": ["/usr/bin/env", *pairs, *argv(OWN[self.server], self.port)]})
        self._manager.start()
        self._manager.wait_running(1)

    def reload(self) -> None:
        self._manager.run(self._manager.renew_argv("site"), STEP_SECONDS)

    def close(self) -> None:
        self._manager.close()
        super().close()


class BySupervisor(ByRestart):
    """`supervisorctl restart`."""

    title = "supervisorctl restart"
    manager = Supervisord


class ByPm2(ByRestart):
    """`pm2 reload`, which of a program that is not Node.js is a restart."""

    title = "pm2 reload"
    manager = Pm2


class BySvc(ByRestart):
    """`s6-svc -r`."""

    title = "s6-svc -r"
    manager = Svscan


class BySv(ByRestart):
    """`sv restart`."""

    title = "sv restart"
    manager = Runsvdir


class Spawned(Reloaded):
    """Something in the foreground that we start ourselves."""

    def command(self) -> list[str]:
        """What to start."""
        return argv(OWN[self.server], self.port)

    def start(self) -> None:
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        below = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        kill_all(child.pid for child in below if child.alive())
        super().close()


class ByHup(Spawned):
    """gunicorn alone."""

    title = "SIGHUP to gunicorn"

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)


class ByCircus(Spawned):
    """`circusctl reload`: a second process beside the first, then the first is ended. Both have Circus' socket."""

    title = "circusctl reload"

    def command(self) -> list[str]:
        """circusd with its configuration."""
        self._endpoint = f"tcp://127.0.0.1:{free_port()}"
        words = " ".join(argv(HELD[self.server], self.port, "$(circus.sockets.site)"))
        pairs = "\n".join(f"{name} = {value}" for name, value in self.environment.items())
        ini = self.folder / "circus.ini"
        ini.write_text(
            f"[circus]\nendpoint = {self._endpoint}\npubsub_endpoint = tcp://127.0.0.1:{free_port()}\n"
            f"[watcher:site]\ncmd = {words}\nuse_sockets = True\ncopy_env = True\ngraceful_timeout = 30\n"
            f"[socket:site]\nhost = 127.0.0.1\nport = {self.port}\n[env:site]\n{pairs}\n"
        )
        return [tools.find("circusd"), str(ini)]

    def reload(self) -> None:
        command = [tools.find("circusctl"), "--endpoint", self._endpoint, "reload", "site", "--waiting"]
        run_timed(command, os.environ, STEP_SECONDS)


RESTARTS: Sequence[type[ByRestart]] = (BySupervisor, ByPm2, BySvc, BySv)


def contenders(servers: Collection[str], peers: Collection[str]) -> Iterator[tuple[type[Reloaded], str]]:
    """What is measured, with which of these servers, beside which peers (none: with all)."""
    here = present(peers)
    for server, each in SERVERS.items():
        if not each.installed or (servers and server not in servers):
            continue
        yield ByProcman, server
        if server in OWN:
            yield from ((each, server) for each in RESTARTS if each.manager in here)
        if OWN.get(server, ("", "", ""))[2] == "gunicorn":
            yield ByHup, server
        if server in HELD and Circusd in here:
            yield ByCircus, server


def run(plan: Plan, servers: Collection[str], say: Callable[[str], None]) -> list[Row]:
    """`plan.reloads` reloads, spread over at least `plan.reload_requests` requests, for each contender and server. One
    that does not come to its end is left out, and said."""
    rows = []
    for make, server in contenders(servers, plan.peers):
        say(f"{plan.reloads} reloads of {server} by {make.title}")
        try:
            with make(server) as site:
                row = Row(make.title, server, plan.reloads, measure(site, plan))
        except (AssertionError, RuntimeError, TooSlow) as error:
            say(f"  left out: {error}")
            continue
        rows.append(row)
        say(f"  {row.result.total.line()}")
    return rows


def short(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Failed requests of a few reloads of a gunicorn site: the figure `reload`."""
    fewer = replace(plan, reloads=plan.short_reloads, reload_requests=plan.short_requests)
    totals = {row.contender: row.result.total for row in run(fewer, ["gunicorn"], say)}
    rows = {by: 100 * total.failed_count / max(total.requests, 1) for by, total in totals.items()}
    notes = [f"by {by}: {total.failed_count} of {total.requests}" for by, total in totals.items()]
    titles = {ByProcman.title: OURS, ByCircus.title: Circusd.title}
    titles |= {each.title: each.manager.title for each in RESTARTS}
    sides = {title: (rows[by],) for by, title in titles.items() if by in rows}
    alone = rows.get(ByHup.title)
    limit = None if alone is None else Limit("SIGHUP to gunicorn alone", (alone,))
    title = f"requests failed in {plan.short_reloads} reloads of gunicorn, {CONNECTIONS} connections"
    return [Figure("reload", title, "%", sides, limit, notes=tuple(notes))] if sides else []


def measure(site: Reloaded, plan: Plan) -> Result:
    """One contender with one server."""
    wait_for_first_answer(site.address)
    modes = ("get/close", "get") if SERVERS[site.server].keeps else ("get/close",)
    limit = plan.reloads * STEP_SECONDS
    with load(site.address, modes=modes, connections=CONNECTIONS, rate=RATE, limit=limit) as running:
        for number in range(plan.reloads):
            running.wait_for_asked(plan.reload_requests * (2 * number + 1) // (2 * plan.reloads), STEP_SECONDS)
            site.release(str(number + 2))
            site.reload()
            running.wait_for_version(str(number + 2), STEP_SECONDS)
        running.wait_for_asked(plan.reload_requests, STEP_SECONDS)
    return running.result


def wait_for_first_answer(address: str) -> None:
    """Waits until the site serves."""
    end = time.monotonic() + STEP_SECONDS

    def served() -> bool:
        with load(address, modes=("get/close",), connections=1, requests=1, patience=STEP_SECONDS) as probe:
            probe.wait_for_end()
        return not probe.result.total.failed

    wait_until(served, end - time.monotonic(), "the site answers")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as a Markdown table, which docs/performance.md takes as it is."""
    head = ("server", "by", "failed of requests", "how", "idle closes", "longest gap")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        total = row.result.total
        how = ", ".join(f"{kind} {count}" for kind, count in sorted(total.failed.items())) or "–"
        failed = f"{total.failed_count} of {total.requests}"
        cells.append(
            (row.server, row.contender, failed, how, str(total.idle_closed), f"{row.result.longest_gap:.2f} s")
        )
    widths = [max(len(each[column]) for each in cells) for column in range(len(head))]
    for each in cells:
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(each, widths, strict=True))} |"

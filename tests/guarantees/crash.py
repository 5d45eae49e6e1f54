"""The supervisor dies at every boundary that it crosses, and each time nothing is lost.

A fixed scenario (start, crash of a program, restart, stop, reload, a successor that takes over, a canary that is
promoted, more processes, rotation, another table by which a program is replaced, shutdown) is played once for each
crossing of it (`procman.crossing`): at that one the supervisor gets SIGKILL. Afterwards the operator's commands must
have been done or cleanly refused, and what the programs themselves wrote down is compared with what the daemon says: no
second child, no missing one, of each one the right last exit (status or signal, and the reason), also in the state file
that is left, the right wanted states, every line of the logs once, a listener that nobody was refused at, and no
process left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from procman.ctl.main import main as procmanctl
from procman.daemon import CRASH_VARIABLE
from procman.errors import ProcmanError
from tests.harness import RunningDaemon, log_content, log_files, wait_until

SECONDS = 20.0
"""For any single step of the scenario. Generous: the machine may be busy."""

UNREACHABLE = 6
"""procmanctl's exit status for a daemon that ended the connection: what was asked for may be done, or not."""

STEADY = ("site", "hup")
"""What nothing happens to."""

ENDS = ("lines", "crasher", "late", "edited")
"""What ends in the scenario, and stays in the table."""

SERVED = ("site", "deployed", "proven", "scaled:1", "scaled:2")
"""What visitors come to."""

SITE_ENDS = ("killed by SIGTERM", "exit status 0")
"""It may be asked to end before it has its handler."""


def table(folder: Path, ports: Sequence[int], *, changed: bool) -> str:
    """The program table, before its change and after it."""
    port, deployed, proven, scaled = ports

    def lives(name: str, rate: str = "", more: str = "") -> str:
        command = f'command = "${{PYTHON}} -S -E ${{PROGRAMS}}/lives.py {name} {folder} {rate}"'
        return f"[program.{name}]\n{command}\nstart_seconds = 0\n{more}\n"

    programs = [
        f"""[program.site]
            command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
            listen = "127.0.0.1:{port}"
            ready = {{ http = "/" }}""",
        f"""[program.deployed]
            command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
            listen = ["127.0.0.1:{deployed}", "unix:{folder}/deployed.sock"]
            ready = {{ http = "/" }}
            start_seconds = 0""",
        f"""[program.proven]
            command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
            listen = "127.0.0.1:{proven}"
            environment = {{ CHANGED = '{int(changed)}' }}
            ready = {{ http = "/" }}
            start_seconds = 0""",
        f"""[program.scaled]
            command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
            listen = "127.0.0.1:{scaled}"
            scale = {{ min = 1, max = 3, idle_timeout = "1h", backlog = 1000 }}
            ready = {{ http = "/" }}
            start_seconds = 0""",
        lives("lines", "150", "log = { max_size = 1000, keep = 1000 }"),
        lives("crasher", more='restart_delay = "50ms"\nlog = { format = "json" }'),
        lives("late", more='autostart = false\nstop_signal = "USR2"'),
        lives("hup", more='reload = "signal:HUP"\nready = { notify = true }\nlog = { timestamps = true }'),
        lives("edited", more=f"environment = {{ EDITED = '{int(changed)}' }}\nready = {{ notify = true }}"),
        lives("added" if changed else "removed", more="ready = { notify = true }"),
    ]
    return "\n".join(programs)


@dataclass(slots=True)
class Result:
    """One play. `crossings` are the names of all that the dead supervisors crossed, with their numbers."""

    deaths: tuple[int, ...]
    died: list[str] = field(default_factory=list)
    crossings: list[str] = field(default_factory=list)
    requests: int = 0
    lines: int = 0
    problems: list[str] = field(default_factory=list)


class Visitor(threading.Thread):
    """Asks the site again and again, on new connections. Nothing happens to the site, so each one is answered."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.requests = 0
        self.problems: list[str] = []
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.01):
            try:
                with socket.create_connection(("127.0.0.1", self._port), 10) as connection:
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    answer = b"".join(iter(lambda: connection.recv(4096), b""))
                if not answer.startswith(b"HTTP/1.1 200 "):
                    self.problems.append(f"the site answered {answer[:40]!r}")
            except OSError as error:
                self.problems.append(f"the site was not reached: {error}")
            self.requests += 1

    def stop(self) -> None:
        """Ends it, before the site is stopped."""
        self._over.set()
        self.join()


class Play:
    """One play of the scenario. `running` is its daemon."""

    def __init__(self, deaths: tuple[int, ...], compiled: Path) -> None:
        self.result = Result(deaths)
        self.folder = Path(tempfile.mkdtemp(prefix="pmc", dir="/tmp"))
        # Bound while the play lasts, but it does not listen: so the daemon can, and no play beside it gets the same.
        self.reserved = [socket.socket() for _ in range(4)]
        for reserved in self.reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
        self.ports = [reserved.getsockname()[1] for reserved in self.reserved]
        self.deployed = self.proven = 0
        self.crash = self.folder / "crash"
        self.crash.write_text("\n".join(map(str, deaths)))
        environment = {CRASH_VARIABLE: str(self.crash)}
        environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(compiled)}
        self.running = RunningDaemon(table(self.folder, self.ports, changed=False), environment=environment)
        self.visitors = [Visitor(port) for port in self.ports]

    # --- what is seen -----------------------------------------------------------------------------------------------

    def wrong(self, problem: str) -> None:
        """The promise is broken."""
        self.result.problems.append(problem)

    def lives(self, name: str) -> list[tuple[str, int]]:
        """What the program itself wrote down: (what, pid)."""
        rows = [line.split() for line in self._account()]
        return [(row[1], int(row[2])) for row in rows if row[0] == name]

    def _account(self) -> list[str]:
        try:
            return (self.folder / "lives").read_text().splitlines()
        except FileNotFoundError:
            return []

    def last_end(self, name: str) -> dict[str, Any] | None:
        """How its last life that is over has ended, by its own account, in the daemon's words; None while none is."""
        ends = [line.split()[3] for line in self._account() if line.startswith(f"{name} end ")]
        if not ends:
            return None
        if ends[-1].isdecimal():
            return {"code": int(ends[-1]), "reason": f"exit status {ends[-1]}"}
        return {"signal": ends[-1], "reason": f"killed by {ends[-1]}"}

    def begun(self, name: str) -> list[int]:
        """The pids of its lives."""
        return [pid for what, pid in self.lives(name) if what == "begin"]

    def info(self, name: str) -> dict[str, Any]:
        """The daemon's ProcessInfo."""
        return self.running.status()[name]

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """Waits until the daemon answers and `condition` holds."""

        def holds() -> bool:
            try:
                return bool(condition())
            except ProcmanError:
                return False  # no supervisor just now

        try:
            wait_until(holds, SECONDS, what)
        except AssertionError:
            with contextlib.suppress(ProcmanError):
                what += f"; status: {self.running.status()}; lives: {(self.folder / 'lives').read_text()}"
            raise TimeoutError(f"it never came to this: {what}; the daemon said: {self.running.said()}") from None

    def until_runs(self, name: str) -> None:
        """Waits until the process is RUNNING."""
        self.until(f"{name} runs", lambda: self.info(name)["state"] == "RUNNING")

    def until_begun(self, name: str, pid: int) -> None:
        """Waits until the last life of the program is this one: a process may be RUNNING before that writes a line."""
        self.until(f"{name} lives as {pid}", lambda: self.begun(name)[-1:] == [pid])

    def ctl(self, *arguments: str) -> tuple[int, str]:
        """procmanctl, in this process: a new one takes longer than all the rest. Its exit status, and what it said."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = procmanctl(["-s", str(self.running.socket), *arguments])
        return status, said.getvalue()

    def command(self, *arguments: str, done: Callable[[], object], undone: Callable[[], object]) -> None:
        """An operator's command. It is done, as `done` says, when it claims so; otherwise it is as `done` or `undone`
        says, and can be given again."""
        for _ in range(3):
            status, said = self.ctl(*arguments)
            if status == 0:
                if not self._holds(done):
                    self.wrong(f"{' '.join(arguments)} said that it is done: {said!r}; {self.running.status()}")
                return
            if status != UNREACHABLE or "procmanctl:" not in said:
                self.wrong(f"{' '.join(arguments)} ended with {status}: {said!r}")
                return
            self.until(f"{' '.join(arguments)} is done or not", lambda: done() or undone())
        self.wrong(f"{' '.join(arguments)} failed again and again: {said!r}")

    def _holds(self, condition: Callable[[], object]) -> bool:
        """Whether `condition` holds now, with a supervisor that may still be coming up."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                return bool(condition())
            except ProcmanError:
                time.sleep(0.02)
        return False

    # --- the scenario -----------------------------------------------------------------------------------------------

    def play(self) -> Result:
        """All of it, and the judgement."""
        try:
            self.running.start(timeout=SECONDS)
            self._scenario()
        except Exception as error:  # noqa: BLE001 - whatever it is, the play is broken, and the others go on
            self.wrong(f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}")
        finally:
            for visitor in self.visitors:
                if visitor.is_alive():
                    visitor.stop()
                self.result.problems += visitor.problems[:3]
                self.result.requests += visitor.requests
            self.result.problems += self.running.close()
            self._read_crossings()
            for reserved in self.reserved:
                reserved.close()
            shutil.rmtree(self.folder)
        return self.result

    def _scenario(self) -> None:
        names = ("site", "deployed", "proven", "scaled:1", "lines", "crasher", "hup", "edited", "removed")
        self.until("all run", lambda: all(self.info(name)["state"] == "RUNNING" for name in names))
        for visitor in self.visitors:
            visitor.start()
        before = {name: self.info(name)["pid"] for name in STEADY}
        self.command(
            "start",
            "late",
            done=lambda: self.info("late")["state"] == "RUNNING",
            undone=lambda: self.info("late")["state"] == "STOPPED",
        )
        self._crash()
        self.until("the log is rotated", lambda: len(self._files("lines")) > 3)
        self._restart()
        self.command(
            "stop",
            "late",
            done=lambda: self.info("late")["state"] == "STOPPED",
            undone=lambda: self.info("late")["state"] == "RUNNING",
        )
        self.command("reload", "hup", done=self.hung_up, undone=lambda: self.hups() == 0)
        if self.hups() > 2:
            self.wrong(f"one reload sent {self.hups()} signals")
        self._deploy()
        self._prove()
        self._scale()
        self._change()
        self._judge_running(before)
        for visitor in self.visitors:
            visitor.stop()
        self._judge_sockets()
        self._shut_down()
        self.judge_lines()
        self.judge_lives()
        self._judge_record()

    def hung_up(self) -> bool:
        """Waits until a signal has come: it was sent, but a program may be slow to write it down."""
        self.until("the signal has come", self.hups)
        return True

    def hups(self) -> int:
        """How many signals for a reload have come."""
        return sum(what == "hup" for what, _ in self.lives("hup"))

    def _crash(self) -> None:
        self.until("crasher has begun", lambda: len(self.begun("crasher")) == 1)
        os.kill(self.begun("crasher")[0], signal.SIGUSR1)
        self.until("crasher is started again", lambda: len(self.begun("crasher")) == 2)

        def settled() -> bool:
            info = self.info("crasher")
            return bool(info["state"] == "RUNNING" and info["pid"] == self.begun("crasher")[-1])

        self.until("crasher runs again", settled)
        info = self.info("crasher")
        if self.last_end("crasher") != {"code": 3, "reason": "exit status 3"} or info["restarts"] != 1:
            self.wrong(f"crasher ended with 3 and was started again once: {info}")
        self.judge_exits(self.running.status(), ("crasher",))

    def _restart(self) -> None:
        (pid,) = self.begun("lines")
        self.command(
            "restart",
            "lines",
            done=lambda: self.info("lines")["pid"] not in (None, pid) and self.info("lines")["state"] == "RUNNING",
            undone=lambda: self.info("lines")["pid"] == pid,
        )

    def _deploy(self) -> None:
        """A successor takes over, and one from that: both places, and both sockets of a listener, are used."""
        for _ in range(2):
            self._reload_deployed()
        self.deployed = self.info("deployed")["pid"]

    def settled(self, name: str) -> int:
        """Its pid, when it runs and nobody is beside it; else 0."""
        info = self.info(name)
        return int(info["pid"] or 0) if info["beside"] is None and info["state"] == "RUNNING" else 0

    def _reload_deployed(self) -> None:
        pid = self.info("deployed")["pid"]
        self.command(
            "reload",
            "deployed",
            done=lambda: self.settled("deployed") not in (0, pid),
            undone=lambda: self.settled("deployed") == pid,
        )
        left = sorted(path.name for path in self.folder.glob("deployed.sock*"))
        if left != ["deployed.sock"]:
            self.wrong(f"sockets of the reload: {left}")

    def _prove(self) -> None:
        """A canary that an operator promotes. A supervisor that dies in it leaves the version before, and it has to be
        begun anew; one that dies after that has promoted it."""
        before = self.settled("proven")

        def proving() -> bool:
            return bool((self.info("proven")["beside"] or {}).get("canary"))

        def promote() -> bool:
            return bool(self.ctl("promote", "proven"))

        for _ in range(1 + len(self.result.deaths)):
            begin = ("reload", "proven", "--canary", "50%", "--for", "10m", "--no-wait")
            self.command(*begin, done=lambda: True, undone=lambda: proving() or self.settled("proven"))
            self.until("the canary is under way, or over", lambda: proving() or self.settled("proven"))
            status, said = self.ctl("promote", "proven")
            # Asked too early, before the canary has begun, that was refused.
            self.until("one of the two is left", lambda: self.settled("proven") or (proving() and not promote()))
            now = self.settled("proven")
            if now != before:
                break
            if status == 0:
                self.wrong(f"promote said that it is done: {said!r}; {self.running.status()}")
        else:
            self.wrong(f"the canary was not promoted: {said!r}")
        self.proven = now

    def _scale(self) -> None:
        def number() -> int:
            states = [self.info(f"scaled:{each}")["state"] for each in (1, 2, 3)]
            return states.count("RUNNING") if set(states) <= {"RUNNING", "STOPPED"} else 0

        self.command("scale", "scaled", "2", done=lambda: number() == 2, undone=lambda: number() == 1)

    def _change(self) -> None:
        self.running.write_table(table(self.folder, self.ports, changed=True))

        def all_names() -> set[str]:
            return set(self.running.status())

        self.command(
            "daemon",
            "reread",
            done=lambda: "added" in all_names() and "removed" not in all_names(),
            undone=lambda: "removed" in all_names(),
        )
        for name in ("added", "edited"):
            self.until_runs(name)
        self.until("removed has ended", lambda: len(self.lives("removed")) == 2)
        self.until("proven was replaced", lambda: self.settled("proven") not in (0, self.proven))

    def _shut_down(self) -> None:
        status, said = self.ctl("daemon", "shutdown")
        if status:
            self.wrong(f"shutdown ended with {status}: {said!r}")
        process = self.running.process
        assert process is not None
        if process.wait(SECONDS):
            self.wrong(f"procmand ended with {process.returncode}")

    # --- the judgement ----------------------------------------------------------------------------------------------

    def _judge_running(self, before: dict[str, int]) -> None:
        names = (*SERVED, "lines", "crasher", "hup", "edited", "added")
        wanted = dict.fromkeys(names, "up") | {"late": "down", "scaled:3": "down"}
        found = self.running.status()
        if {name: info["wanted"] for name, info in found.items()} != wanted:
            self.wrong(f"wanted: {found}")
        self.judge_exits(found, ENDS)
        for name in ("site", "hup", "added"):
            if found[name]["exit"] is not None:
                self.wrong(f"{name} never ended: {found[name]}")
        self.until("it is on record what operators want down", lambda: self._down_on_disk() == ["late"])
        for name, pid in before.items():
            if found[name]["pid"] != pid:
                self.wrong(f"{name} was pid {pid}: {found[name]}")
        if found["deployed"]["pid"] != self.deployed:
            self.wrong(f"deployed was pid {self.deployed}: {found['deployed']}")
        for name, info in found.items():
            if info["wanted"] == "up" and (info["state"] != "RUNNING" or info["restarts"] != (name == "crasher")):
                self.wrong(f"{name}: {info}")
            if name not in (*SERVED, "scaled:3", "late"):
                self.until_begun(name, info["pid"])

    def _judge_sockets(self) -> None:
        """Who is started anew is reached at both listeners: the sockets that clients come to are those that it has."""
        pid = self.info("deployed")["pid"]
        os.kill(pid, signal.SIGKILL)
        self.until("deployed runs again", lambda: self.info("deployed")["pid"] not in (None, pid))
        self.until_runs("deployed")
        now = self.info("deployed")["pid"]
        for address in (("127.0.0.1", self.ports[1]), str(self.folder / "deployed.sock")):
            with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
                connection.settimeout(SECONDS)
                try:
                    connection.connect(address)
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    answer = b"".join(iter(lambda: connection.recv(4096), b""))
                    if not answer.endswith(f"{now}\n".encode()):
                        self.wrong(f"{address} answered {answer[-40:]!r}, not {now}")
                except OSError as error:
                    self.wrong(f"{address} was not reached: {error}")

    def _down_on_disk(self) -> object:
        """What the next daemon would leave stopped."""
        return json.loads((self.running.folder / "state" / "state.json").read_text())["down"]

    def judge_exits(self, told: dict[str, dict[str, Any]], names: Iterable[str]) -> None:
        """The last end of each is told as it was: its status or signal, and the reason."""
        for name in names:
            ended = told.get(name, {}).get("exit") or {}
            shown = {key: ended[key] for key in ("code", "signal", "reason") if ended.get(key) is not None}
            if (expected := self.last_end(name)) is None or shown != expected:
                self.wrong(f"{name} ended last with {expected}, the daemon says {ended}")
            elif not ended["at"]:
                self.wrong(f"{name} ended, and nobody says when: {ended}")

    def _judge_record(self) -> None:
        """What the next daemon will know of the ends, the last ones included. The site keeps no account."""
        told = json.loads((self.running.folder / "state" / "state.json").read_text())["processes"]
        for status in told.values():
            if status["exit"] is not None and status["exit"]["signal"] is not None:
                status["exit"]["signal"] = signal.Signals(status["exit"]["signal"]).name
        self.judge_exits(told, (*ENDS, "hup", "added"))
        if (told["site"]["exit"] or {}).get("reason") not in SITE_ENDS:
            self.wrong(f"the site was ended by SIGTERM: {told['site']}")

    def judge_lives(self) -> None:
        """Each life has begun and ended once, and no two at once."""
        counts = {"lines": 2, "crasher": 2, "late": 1, "hup": 1, "edited": 2, "removed": 1, "added": 1}
        for name, count in counts.items():
            told = [(what, pid) for what, pid in self.lives(name) if what != "hup"]
            expected = [(what, pid) for pid in self.begun(name) for what in ("begin", "end")]
            if told != expected or len(self.begun(name)) != count:
                self.wrong(f"{name} should have had {count} lives, one after the other: {told}")

    def judge_lines(self) -> None:
        """Every line once and whole, in order, across the rotated files."""
        for name in ("lines", "crasher", "late", "hup", "edited", "removed", "added"):
            expected = []
            found = undressed(b"".join(log_content(file) for file in self._files(name)).decode(errors="replace"))
            for pid in self.begun(name):
                numbers = [int(match[1]) for match in re.finditer(rf"^{pid} (\d+) ?x*$", found, re.MULTILINE)]
                count = max(numbers, default=0) if name == "lines" else 0
                lines = (f"{pid} {number} {'x' * (number % 50)}" for number in range(1, count + 1))
                expected += [f"{pid} begin", *lines, f"{pid} end"]
            got = found.splitlines()
            self.result.lines += len(got)
            if got != expected:
                pairs = enumerate(itertools.zip_longest(got, expected))
                first = next((f"{n}: {one!r}, not {other!r}" for n, (one, other) in pairs if one != other), "")
                self.wrong(f"the log of {name} is not what it wrote, from line {first}")

    def _files(self, name: str) -> list[Path]:
        """The log of `name`, oldest first."""
        return log_files(self.running.log_dir / f"{name}.log")

    def _read_crossings(self) -> None:
        trace = Path(f"{self.crash}.log")
        rows = trace.read_text().splitlines() if trace.exists() else []
        lives: list[list[str]] = []
        for row in rows:
            if row.startswith("1 "):
                lives.append([])
            lives[-1].append(row)
        self.result.crossings = rows
        for life, number in zip(lives, self.result.deaths, strict=False):
            if 0 < number <= len(life):
                self.result.died.append(life[number - 1])


def undressed(text: str) -> str:
    """Lines as their program has printed them; what can't be read as it should be stays."""
    found = []
    for line in text.splitlines(keepends=True):
        try:
            line = json.loads(line)["message"] + "\n" if line.startswith("{") else line
        except ValueError:
            pass
        found.append(re.sub(r"^\d{4}-\d\d-\d\dT[0-9:.]+Z ", "", line))
    return "".join(found)


def play(deaths: tuple[int, ...], compiled: Path) -> Result:
    """One play, in which the first supervisors die at these crossings, one each."""
    return Play(deaths, compiled).play()


def play_all(plays: Iterable[tuple[int, ...]], at_once: int) -> Iterator[Result]:
    """Each of them, several at once: they mostly wait."""
    compiled = Path(tempfile.mkdtemp(prefix="pmcompiled", dir="/tmp"))
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(at_once, mp_context=context) as pool:
            for future in [pool.submit(play, deaths, compiled) for deaths in plays]:
                yield future.result()
    finally:
        shutil.rmtree(compiled)


def census(compiled_at_once: int = 1) -> Result:
    """A play in which nobody dies: how many crossings there are."""
    (result,) = play_all([(0,)], compiled_at_once)
    return result


def main(argv: list[str]) -> int:
    """`python -m tests.guarantees crash`: 1 when the promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--at", type=int, nargs="*", help="one play: the first supervisor dies there, the next ...")
    parser.add_argument("--every", type=int, default=1, help="only every Nth crossing")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--second", type=int, default=0, help="the next supervisor dies too, at its Nth crossing")
    parser.add_argument("--at-once", type=int, default=4, help="plays at one time")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if options.at:
        plays = [tuple(options.at)]
    else:
        none = census()
        sys.stdout.write(f"crossings {len(none.crossings)} in a play without a death, problems {none.problems}\n")
        more = (options.second,) if options.second else ()
        plays = [(number, *more) for number in range(options.first, len(none.crossings) + 1, options.every)]
    results: list[Result] = []
    for result in play_all(plays, options.at_once):
        results.append(result)
        if result.problems or options.at:
            sys.stdout.write(f"{result.deaths} died at {result.died}\n")
            sys.stdout.writelines(f"  BROKEN {problem}\n" for problem in result.problems)
            sys.stdout.flush()
    if not options.at and sum(bool(result.died) for result in results) < 0.9 * len(results):
        results[-1].problems.append("in too many plays nobody died: this has proved little")
    broken = [result for result in results if result.problems]
    sys.stdout.write(
        f"plays {len(results)} in {time.monotonic() - start:.0f} s, deaths {sum(len(r.died) for r in results)}, "
        f"requests {sum(r.requests for r in results)}, lines {sum(r.lines for r in results)}: "
        f"{f'{len(broken)} plays broke a promise' if broken else 'good, no promise was broken'}\n"
    )
    return 1 if broken else 0

"""Programs print numbered lines in every mode that reads lines, while the supervisor is killed again and again.

At last each line must be there, whole. In files none may be there twice. On the daemon's stdout the lines of one write
(4 KiB), to syslog and to the journal one message may be doubled by each death; how many were is counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests import syslogs
from tests.guarantees.kill import kill
from tests.harness import RunningDaemon, wait_until

BACK_SECONDS = 60.0
"""For a successor to come up, on a busy machine."""

SIZE = 100
"""Bytes of a line."""

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "

WRITE = 4096
"""Bytes of lines in one write to stdout."""


@dataclass(frozen=True, slots=True)
class Options:
    """`lines` of each file; on stdout half of them are printed, to syslog and the journal a tenth. Killed until all
    have come, and at least `kills` times."""

    lines: int = 2_000_000
    kills: int = 50


@dataclass(slots=True)
class Mode:
    """What came of one mode: `doubled` has how many lines in a row were there again, for each place where some were."""

    name: str
    wanted: int
    bound: int
    lost: int = 0
    torn: int = 0
    doubled: list[int] = field(default_factory=list)

    def judge(self, found: Iterator[int]) -> None:
        """Compares what is there with 1 to `wanted`; 0 stands for a line that is not whole."""
        seen = bytearray(self.wanted + 1)
        expected, again = 1, 0
        for number in found:
            if not 0 < number <= self.wanted:
                self.torn += 1
                continue
            if number < expected and not again:
                again = expected
                self.doubled.append(expected - number)
            elif number >= again:
                again = 0
            expected = number + 1
            seen[number] = 1
        self.lost = self.wanted - sum(seen)

    def line(self) -> str:
        """For people."""
        most = max(self.doubled, default=0)
        doubled = f"{sum(self.doubled)} doubled in {len(self.doubled)} places (at most {most}, allowed {self.bound})"
        return f"{self.name:10} {self.wanted} lines, {self.lost} lost, {self.torn} torn, {doubled}"

    def problems(self, kills: int) -> list[str]:
        """What breaks the promise."""
        bad = self.lost or self.torn or max(self.doubled, default=0) > self.bound or len(self.doubled) > kills
        return [self.line()] if bad else []


@dataclass(slots=True)
class Result:
    """One run."""

    kills: int = 0
    seconds: float = 0.0
    modes: list[Mode] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.kills} kills in {self.seconds:.0f} s"
        yield from (mode.line() for mode in self.modes)


def table(options: Options, modes: dict[str, Mode]) -> str:
    """A program for each mode."""
    logs = {
        "times": "timestamps = true, max_size = '1MB', keep = 10000, compress = 'none'",
        "json": "format = 'json', max_size = '1MB', keep = 10000, compress = 'none'",
        "raw": "max_size = '1MB', keep = 10000, compress = 'none'",
        "inherit": "mode = 'inherit'",
        "syslog": "mode = 'syslog'",
        "journal": "mode = 'journal'",
    }
    return "\n".join(
        f"""
        [program.{name}]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/writer.py 0 {modes[name].wanted} {SIZE}"
        start_seconds = 0
        log = {{ {logs[name]} }}
        """
        for name in modes
    )


def run(options: Options) -> Result:
    """See the module."""
    counts = {"times": options.lines, "json": options.lines, "raw": options.lines, "inherit": options.lines // 2}
    bounds = {"inherit": WRITE // SIZE, "syslog": 1, "journal": 1}
    if syslogs.possible():
        counts |= {"syslog": options.lines // 10, "journal": options.lines // 10}
    modes = {name: Mode(name, count, bounds.get(name, 0)) for name, count in counts.items()}
    running, result = RunningDaemon(table(options, modes)), Result(modes=list(modes.values()))
    readers = {name: syslogs.Reader(running.folder / f"{name}.sock") for name in ("syslog", "journal")}
    try:
        running.start(prefix=syslogs.prefix(running.folder) if "syslog" in modes else (), timeout=BACK_SECONDS)
        pids = {name: running.wait_for(name, timeout=BACK_SECONDS)["pid"] for name in modes}
        began = time.monotonic()
        sources = {name: Source(running, name, readers) for name in modes}
        result.kills = keep_killing(running, options.kills, list(sources.values()))
        result.seconds = time.monotonic() - began
        wait_until(running.answers, BACK_SECONDS)
        for name, source in sources.items():
            wait_until(source.is_done, BACK_SECONDS, f"all of {name} is there")
            modes[name].judge(source.numbers())
            result.problems += modes[name].problems(result.kills)
            info = running.status()[name]
            if info["pid"] != pids[name] or info["restarts"]:
                result.problems.append(f"{name} was started again")
    finally:
        result.problems += running.close()
        for reader in readers.values():
            reader.close()
    return result


def keep_killing(running: RunningDaemon, least: int, sources: list[Source]) -> int:
    """Until all lines have come, and `least` times. Every other supervisor is killed while it comes up, the next one
    when all is up, some time later."""
    pid = 0
    for kills in itertools.count():
        for source in sources:
            source.check()
        done = [source.is_done() for source in sources]
        if kills >= least and all(done):
            return kills
        if kills % 2:
            time.sleep(0.02 * (kills % 23))
        else:
            wait_until(running.answers, BACK_SECONDS)
            time.sleep(0.01 * (kills % 29))
        pid = wait_until(lambda last=pid: kill(running, last), BACK_SECONDS, "another supervisor runs")  # type: ignore[misc]
    raise AssertionError


class Source:
    """Where the lines of a mode have come, and what they say."""

    def __init__(self, running: RunningDaemon, name: str, readers: dict[str, syslogs.Reader]) -> None:
        self._running = running
        self._name = name
        self._readers = readers
        self._done = False
        self._number: Callable[[str], int] = _json if name == "json" else _plain
        self._before = {
            "times": TIME,
            "inherit": re.escape(f"{name} | "),
            "syslog": rf"<30>1 {TIME}\S+ syslog syslog stdout - ",
        }.get(name, "")

    def is_done(self) -> bool:
        """Whether the last line has come. Asked again and again, for the daemon's own messages may follow on stdout."""
        self._done = self._done or any("done" in each for each in self._newest())
        return self._done

    def check(self) -> None:
        """Raises AssertionError where output was dropped: then it is no death that has cost lines."""
        told = [each for each in self._newest() if "bytes of output were dropped" in each]
        assert not told, told

    def numbers(self) -> Iterator[int]:
        """That of each line, 0 for what is not whole; the last one is left out."""
        for line in self._lines():
            rest = re.sub(f"^{self._before}", "", line) if self._before else line
            if rest != line or not self._before:
                number = self._number(rest)
                if number >= 0:
                    yield number

    def _newest(self) -> list[str]:
        if self._name in self._readers:
            return [_message(each) for each in self._readers[self._name].messages[-1:]]
        return [_end(self._running.output if self._name == "inherit" else self._running.log_dir / f"{self._name}.log")]

    def _lines(self) -> Iterator[str]:
        if self._name in self._readers:
            yield from map(_message, self._readers[self._name].messages)
            return
        if self._name == "inherit":
            paths = [self._running.output]
        else:
            logs = self._running.log_dir
            old = sorted(logs.glob(f"{self._name}.log.*"), key=lambda path: -int(path.suffix[1:]))
            paths = [*old, logs / f"{self._name}.log"]
        for path in paths:
            with path.open(errors="replace", newline="\n") as file:
                yield from (line.removesuffix("\n") for line in file)


def _end(path: Path) -> str:
    """The last of a file; messages of the daemon may stand behind the last line on its stdout."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 5000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:  # it is being rotated
        return ""


def _message(data: bytes) -> str:
    """That of an entry of the journal, or all of a message of syslog."""
    return data.partition(b"\nMESSAGE\n")[2][8:-1].decode() if b"\nMESSAGE\n" in data else data.decode()


def _plain(line: str) -> int:
    """0: it is not whole. -1: it is the last one."""
    if line == "done":
        return -1
    return int(line[:10]) if re.fullmatch(rf"\d{{10}} x{{{SIZE - 12}}}", line) else 0


def _json(line: str) -> int:
    try:
        return _plain(json.loads(line)["message"])
    except ValueError:
        return 0


def main(argv: list[str]) -> int:
    """`python -m tests.guarantees modes`: prints the figures; 1 when the promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarantees modes", description=__doc__.partition("\n")[0])
    plain = Options()
    parser.add_argument("--lines", type=int, default=plain.lines, help="of each file; less in the other modes")
    parser.add_argument("--kills", type=int, default=plain.kills, help="at least")
    options = Options(**vars(parser.parse_args(argv)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing is left behind
    result = run(options)
    for line in (*result.lines(), *(f"BROKEN {problem}" for problem in result.problems)):
        sys.stdout.write(f"{line}\n")
    return 1 if result.problems else 0

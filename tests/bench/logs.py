"""How fast a manager takes what one program prints, and at what cost: lines into a file that is rotated at 50 MB.

Lines have 10, 100 and 1,000 bytes, or 100 with the time before each. All writers stand (SIGSTOP) but for the one that
is measured.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench import limits
from tests.bench.contenders import LOG_BYTES, Contender
from tests.bench.figures import OURS, Figure, Limit
from tests.bench.lineup import Notes, present
from tests.bench.machine import MB, TooSlow, cpu_seconds, written_bytes
from tests.bench.plan import Plan
from tests.bench.procmand import Procmand
from tests.harness import log_files, wait_until

NAMES = ("logs",)

KEEP = 2
"""Rotated files, so that a run needs little disk."""

WARM_SECONDS = 0.3
"""After SIGCONT, before the window begins."""

CALM_SECONDS = 10.0
"""Bound of what a manager has still to do when the writer stands."""

LENGTHS = (10, 100, 1000)
STAMPED = "100 with the time"
PACKED = "100 compressed"
"""By procman only: beside what the others do without."""

PACK_SECONDS = 120.0
"""A bound, not a figure."""

PATIENCE_SECONDS = 10.0
"""A busy machine may let nobody write for a while: so long it is waited for the first byte."""


@dataclass(slots=True)
class Writing:
    """A program that writes as fast as it can, and who takes it: `pids` are the manager's."""

    pid: int
    pids: Sequence[int]
    taken: Callable[[Sequence[int]], int]
    trim: Callable[[], None] = lambda: None

    def window(self, seconds: float) -> tuple[float, float]:
        """MB/s and CPU seconds per GB while it writes; it stands before and after."""
        os.kill(self.pid, signal.SIGCONT)
        try:
            time.sleep(WARM_SECONDS)
            start, before, used = time.monotonic(), self.taken([self.pid]), cpu_seconds(self.pids)
            time.sleep(seconds)
            while not (size := self.taken([self.pid]) - before) and time.monotonic() < start + PATIENCE_SECONDS:
                time.sleep(seconds)
            took = time.monotonic() - start
            used = cpu_seconds(self.pids) - used
        finally:
            os.kill(self.pid, signal.SIGSTOP)
        self.calm()
        self.trim()
        if not size:
            raise TooSlow("nothing of the output was taken")
        return size / MB / took, used / (size / 1e9)

    def calm(self) -> None:
        """Waits until the manager has done what it had still to do."""
        end = time.monotonic() + CALM_SECONDS
        while time.monotonic() < end:
            before = cpu_seconds(self.pids)
            time.sleep(0.05)
            if cpu_seconds(self.pids) - before < 0.005:
                return


def run(plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """MB/s and CPU seconds for a GB, in turns."""
    command = shutil.which("yes")
    if command is None:
        say("logs: not measured, there is no `yes`")
        return []
    programs = {f"w{length}": [command, "x" * (length - 1)] for length in LENGTHS}
    measured: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    notes, packed = Notes(say), Notes(say)
    with ExitStack() as stack:
        writings: dict[tuple[str, str], Writing] = {}
        for kind in present(plan.peers):
            with notes.leaving_out(kind.title):
                plain = stack.enter_context(kind(programs, keep_logs=KEEP))
                for length, writing in zip(LENGTHS, _stand(plain, list(programs.values())), strict=True):
                    writings[kind.title, str(length)] = writing
                stack.callback(_note_losses, plain, notes)
                if kind.can_timestamp:
                    one = {"w100": programs["w100"]}
                    stamped = stack.enter_context(kind(one, keep_logs=KEEP, timestamps=True))
                    [writings[kind.title, STAMPED]] = _stand(stamped, [one["w100"]])
        with notes.leaving_out(f"{OURS} that compresses"):
            one = {"w100": programs["w100"]}
            packing = stack.enter_context(Procmand(one, keep_logs=KEEP, compress=True))
            [writings[OURS, PACKED]] = _stand(packing, [one["w100"]])
            stack.callback(_note_compressor, packing, packed)
        for length in LENGTHS:
            pids = stack.enter_context(limits.copying(programs[f"w{length}"], LOG_BYTES, KEEP))
            os.kill(pids[0], signal.SIGSTOP)
            writings["limit", str(length)] = Writing(pids[0], [pids[1]], _written)
        for number in range(1, plan.log_rounds + 1):
            for (title, lines), writing in writings.items():
                say(f"round {number} of {plan.log_rounds}: lines of {lines} under {title}")
                with notes.leaving_out(title):
                    measured[title, lines].append(writing.window(plan.log_seconds))
                    if lines == PACKED:
                        _wait_packed(packing)
    for kind in present(plan.peers)[1:]:
        measured[kind.title, PACKED] = measured[kind.title, "100"]
    said = {"logs-10": notes.texts, "logs-100-gzip": packed.texts}
    known = [lines for lines in (*map(str, LENGTHS), STAMPED, PACKED) if any(lines == what for _, what in measured)]
    return [figure for lines in known for figure in _figures(lines, measured, said)]


def _written(writers: Iterable[int]) -> int:
    return sum(map(written_bytes, writers))


def _stand(contender: Contender, commands: Sequence[Sequence[str]]) -> list[Writing]:
    """Starts it and makes its programs stand."""
    contender.start()
    pids = [contender.pid_of(command) for command in commands]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    contender.wait_running(len(pids))
    own = contender.own_pids()
    return [Writing(pid, own, contender.taken_bytes, contender.trim) for pid in pids]


def _wait_packed(procmand: Procmand) -> None:
    """Waits until all is compressed: it would take part of the next one's window."""
    path = procmand.logs / "w100.log"
    wait_until(lambda: all(file.suffix == ".gz" for file in log_files(path)[:-1]), PACK_SECONDS, "all is compressed")


def _note_compressor(procmand: Procmand, notes: Notes) -> None:
    used = cpu_seconds(procmand.compressor_pids()) / (procmand.counters("w100")["written"] / 1e9)
    notes.add(f"the compressor, with nice 19, has used {used:.2f} s for each GB that procman wrote")


def _note_losses(contender: Contender, notes: Notes) -> None:
    lost = contender.lost_bytes()
    if lost:
        notes.add(f"{contender.title} dropped {lost / MB:.1f} MB")


def _figures(
    lines: str, measured: dict[tuple[str, str], list[tuple[float, float]]], notes: Mapping[str, Sequence[str]]
) -> list[Figure]:
    name = f"logs-{lines.replace(' with the time', '-stamped').replace(' compressed', '-gzip')}"
    more = {STAMPED: ", the time before each", PACKED: ", rotated files compressed by procman"}.get(lines, "")
    words = f"{lines.partition(' ')[0]}-byte lines{more}"

    def figure(suffix: str, title: str, unit: str, index: int, more: bool) -> Figure:
        sides = {who: tuple(each[index] for each in all_) for (who, what), all_ in measured.items() if what == lines}
        least = sides.pop("limit", None)
        limit = Limit("bare splice", least) if least else None
        said = tuple(notes.get(name + suffix, ()))
        return Figure(name + suffix, title, unit, sides, limit, more_is_better=more, notes=said)

    return [
        figure("", f"log throughput of one program, {words}", "MB/s", 0, True),
        figure("-cpu", f"CPU of the manager for 1 GB of log, {words}", "s", 1, False),
    ]

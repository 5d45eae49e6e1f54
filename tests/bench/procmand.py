"""procman in the benchmark: keeper and supervisor, with and without sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

from procman.client import Client
from tests.bench import tools
from tests.bench.contenders import Contender
from tests.bench.figures import OURS
from tests.bench.wires import JsonLines, Wire
from tests.harness import SUPERVISOR, command_line, descendants, wait_until


class Procmand(Contender):
    """procman with its defaults."""

    title = OURS
    sampling: ClassVar[int] = 5
    """Seconds between two samples of CPU and memory, 0: none."""

    def configure(self) -> None:
        own = f'socket = "{self.folder}/s"\nstate_dir = "{self.folder}/state"\nlog_dir = "{self.logs}"'
        parts = [f"[daemon]\n{own}\n[daemon.sampling]\ninterval = {self.sampling}"]
        packed = "gzip" if self.compress else "none"
        stamped = "true" if self.timestamps else "false"
        log = f'max_size = {self.log_bytes}, keep = {self.keep_logs}, compress = "{packed}", timestamps = {stamped}'
        for name, command in self.programs.items():
            parts.append(f"[program.{name}]\ncommand = {json.dumps(command)}\nlog = {{ {log} }}")
        (self.folder / "procman.toml").write_text("\n".join(parts))

    def environment(self) -> dict[str, str]:
        return tools.procman_environment(super().environment())

    def argv(self) -> Sequence[str]:
        return [*tools.procman("procmand"), "-c", f"{self.folder}/procman.toml"]

    def _ctl(self, *words: str) -> Sequence[str]:
        return [*tools.procman("procmanctl"), "-s", f"{self.folder}/s", *words]

    def status_argv(self) -> Sequence[str]:
        return self._ctl("status")

    def count_running(self, output: str) -> int:
        return output.count(" RUNNING ")

    def operate_argv(self, verb: str) -> Sequence[str]:
        return self._ctl(verb, "all")

    def wire(self, name: str) -> Wire:
        call = {"jsonrpc": "2.0", "id": 1, "method": "status", "params": {"names": [name]}}
        return JsonLines(f"{self.folder}/s", json.dumps(call).encode() + b"\n")

    def own_pids(self) -> list[int]:
        return [self.main_pid, self.deciding_pid]

    @property
    def deciding_pid(self) -> int:
        """The supervisor. Waits for it: after a crash there is none for a moment."""

        def found() -> int:
            below = (child.pid for child in descendants(self.main_pid))
            return next((pid for pid in below if SUPERVISOR in command_line(pid)), 0)

        return wait_until(found, what="a supervisor of procman runs")

    def counters(self, name: str) -> dict[str, int]:
        """What became of the output of a program."""
        with Client(f"{self.folder}/s", 20) as client:
            counters: dict[str, int] = client.call("show", name=name)["log"][0]
        return counters

    def lost_bytes(self) -> int:
        return sum(self.counters(name)["dropped"] for name in self.programs)

    def compressor_pids(self) -> list[int]:
        """The process that compresses rotated files; none while there is nothing to do. It is counted by itself."""
        below = (child.pid for child in descendants(self.main_pid))
        return [pid for pid in below if "compressor.py" in command_line(pid)]


class Unsampled(Procmand):
    """procman that measures no CPU and memory of its programs, as most of the others."""

    title = "procman without sampling"
    sampling = 0

"""pm2 in the benchmark, as its documentation configures it: a JSON file of applications, and a home of its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench import tools
from tests.bench.contenders import START_SECONDS, Contender
from tests.bench.machine import runs, written_bytes
from tests.bench.wires import Axon, Wire, axon_request
from tests.harness import wait_until


class Pm2(Contender):
    """Its daemon goes to the background. It does not rotate logs: that takes a module of its own."""

    title = "pm2"
    commands = ("node", "pm2")
    install = "install Node.js and npm (Debian: apt install npm), then `make bench` installs it (npm install pm2)"

    @classmethod
    def version_argv(cls) -> Sequence[str]:
        package = Path(tools.find("pm2")).resolve().parent.parent / "package.json"
        return [tools.find("node"), "-p", f"require({json.dumps(str(package))}).version"]

    def configure(self) -> None:
        apps = []
        for name, (script, *arguments) in self.programs.items():
            log = f"{self.logs}/{name}.log"
            apps.append({
                "name": name, "script": script, "args": arguments, "interpreter": "none", "merge_logs": True,
                "out_file": log, "error_file": log, "time": self.timestamps,
            })  # fmt: skip
        (self.folder / "apps.json").write_text(json.dumps({"apps": apps}))

    def environment(self) -> dict[str, str]:
        home = {"PM2_HOME": f"{self.folder}/home", "PM2_DISCRETE_MODE": "true", "PM2_DISABLE_VERSION_CHECK": "true"}
        return {**super().environment(), **home}

    def argv(self) -> Sequence[str]:
        words = ["start", f"{self.folder}/apps.json"] if self.programs else ["ping"]
        return [tools.find("pm2"), *words]

    @property
    def main_pid(self) -> int:
        return wait_until(self._god, START_SECONDS, "pm2 runs in the background")

    def _god(self) -> int:
        try:
            pid = int((self.folder / "home" / "pm2.pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return pid if runs(pid) else 0

    def ended(self) -> bool:
        return super().ended() and not self._god()

    def status(self) -> tuple[float, str]:
        """Only after the command that starts it: another one before would start a second daemon."""
        assert self._process is not None
        self._process.wait(START_SECONDS)
        return super().status()

    def status_argv(self) -> Sequence[str]:
        return [tools.find("pm2"), "list", "--no-color"]

    def count_running(self, output: str) -> int:
        return len(re.findall(r"\bonline\b", output))

    def operate_argv(self, verb: str) -> Sequence[str]:
        return [tools.find("pm2"), verb, "all"]

    def renew_argv(self, name: str) -> Sequence[str]:
        return [tools.find("pm2"), "reload", name]

    def wire(self, name: str) -> Wire:
        del name  # there is no such call: `pm2 list` asks for all
        return Axon(f"{self.folder}/home/rpc.sock", axon_request("getMonitorData"))

    def taken_bytes(self, writers: Iterable[int]) -> int:
        """It reads without an end and writes later: what counts is what it has written."""
        del writers
        return written_bytes(self.main_pid)

    def trim(self) -> None:
        for log in self.logs.iterdir():
            os.truncate(log, 0)

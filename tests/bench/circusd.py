"""Circus in the benchmark, as its documentation configures it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench import tools
from tests.bench.contenders import Contender
from tests.bench.wires import Wire, Zmtp, zmtp_request


class Circusd(Contender):
    """A watcher for each program. Its streams can't share a file, so each has two, as in its documentation."""

    title = "Circus"
    commands = ("circusd", "circusctl")
    install = "`make bench` installs it (pip install circus)"
    slow_restart = True  # it looks at programs each `check_delay`: 5 seconds, if nothing else is said

    def configure(self) -> None:
        folder = self.folder
        parts = [f"[circus]\nendpoint = ipc://{folder}/s\npubsub_endpoint = ipc://{folder}/pubsub"]
        for name, command in self.programs.items():
            streams = [
                f"{stream}.class = FileStream\n{stream}.filename = {self.logs}/{name}{suffix}\n"
                f"{stream}.max_bytes = {self.log_bytes}\n{stream}.backup_count = {self.keep_logs}"
                + (f"\n{stream}.time_format = %Y-%m-%dT%H:%M:%S" if self.timestamps else "")
                for stream, suffix in (("stdout_stream", ".log"), ("stderr_stream", ".err"))
            ]
            parts.append("\n".join([f"[watcher:{name}]\ncmd = {' '.join(command)}\ncopy_env = True", *streams]))
        (folder / "circus.ini").write_text("\n\n".join(parts) + "\n")

    def argv(self) -> Sequence[str]:
        return [tools.find("circusd"), f"{self.folder}/circus.ini"]

    def _ctl(self, *words: str) -> Sequence[str]:
        return [tools.find("circusctl"), "--timeout", "60", "--endpoint", f"ipc://{self.folder}/s", *words]

    def status_argv(self) -> Sequence[str]:
        return self._ctl("status")

    def count_running(self, output: str) -> int:
        return output.count(": active")

    def operate_argv(self, verb: str) -> Sequence[str]:
        return self._ctl(verb, "--waiting")

    def renew_argv(self, name: str) -> Sequence[str]:
        return self._ctl("restart", name, "--waiting")

    def wire(self, name: str) -> Wire:
        return Zmtp(f"{self.folder}/s", zmtp_request("status", name=name))

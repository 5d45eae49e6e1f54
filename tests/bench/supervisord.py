"""Supervisor in the benchmark, as its documentation configures it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench import tools
from tests.bench.contenders import Contender
from tests.bench.wires import Wire, XmlRpc, xml_request

RPC_FACTORY = "supervisor.rpcinterface:make_main_rpcinterface"


class Supervisord(Contender):
    """In the foreground, as procmand is."""

    title = "Supervisor"
    commands = ("supervisord", "supervisorctl")
    install = "`make bench` installs it (pip install supervisor)"
    slow_restart = True  # its loop looks at programs once a second
    can_timestamp = False

    def configure(self) -> None:
        folder = self.folder
        files = 1024 + 4 * len(self.programs)
        parts = [
            f"[unix_http_server]\nfile={folder}/s.sock",
            f"[supervisord]\nnodaemon=true\nsilent=true\nlogfile={folder}/s.log\npidfile={folder}/s.pid\nminfds={files}",
            f"[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory={RPC_FACTORY}",
            f"[supervisorctl]\nserverurl=unix://{folder}/s.sock",
        ]
        for name, command in self.programs.items():
            rotation = f"stdout_logfile_maxbytes={self.log_bytes}\nstdout_logfile_backups={self.keep_logs}"
            log = f"stdout_logfile={self.logs}/{name}.log\n{rotation}\nredirect_stderr=true"
            parts.append(f"[program:{name}]\ncommand={' '.join(command)}\nautorestart=true\n{log}")
        (folder / "supervisord.conf").write_text("\n\n".join(parts) + "\n")

    def argv(self) -> Sequence[str]:
        return [tools.find("supervisord"), "-c", f"{self.folder}/supervisord.conf"]

    def _ctl(self, *words: str) -> Sequence[str]:
        return [tools.find("supervisorctl"), "-c", f"{self.folder}/supervisord.conf", *words]

    def status_argv(self) -> Sequence[str]:
        return self._ctl("status")

    def count_running(self, output: str) -> int:
        return output.count(" RUNNING ")

    def operate_argv(self, verb: str) -> Sequence[str]:
        return self._ctl(verb, "all")

    def renew_argv(self, name: str) -> Sequence[str]:
        return self._ctl("restart", name)

    def wire(self, name: str) -> Wire:
        return XmlRpc(f"{self.folder}/s.sock", xml_request("supervisor.getProcessInfo", name))

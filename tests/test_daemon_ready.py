"""Readiness where several processes have one socket: each proves itself, nobody answers for another."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import MakeDaemon
from tests.harness import free_port, wait_until

SITES = Path(__file__).parent / "sites"
BY_NUMBER = '{ IMPORT_GATE = "%s/gate${instance}" }'

COMMANDS = {
    "uvicorn": "uvicorn --fd 3 --log-level=warning numbered_site:asgi",
    "gunicorn": "gunicorn --no-control-socket --workers=2 numbered_site:app",
    "granian": "procman.adapter granian 512 --interface=asgi --no-ws numbered_site:asgi",
}
HOW = {name: f'command = "${{PYTHON}} -m {command}"\ninstances = 3' for name, command in COMMANDS.items()}
HOW["wsgi"] = 'server = "wsgi"\napp = "numbered_site:app"\nworkers = 3'
"""Three processes each. A command is asked by HTTP, and so is a server whose table says so."""


def table(folder: Path, kind: str) -> str:
    programs = []
    for name, how in HOW.items():
        listen = f"127.0.0.1:{free_port()}" if kind == "tcp" else f"unix:{folder}/{name}.sock"
        programs.append(
            f'[program.{name}]\n{how}\nlisten = "{listen}"\ndirectory = "{SITES}"\nready = {{ http = "/n/1" }}\n'
            f'environment = {BY_NUMBER % folder}\nstart_timeout = "6s"\nstop_timeout = "1s"\n'
            'restart_delay = "0.1s"\nrestart_delay_max = "1s"\nstart_retries = -1\n'
        )
    return "\n".join(programs)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_one_of_three_that_never_serves_is_not_ready(daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    """The others serve at the same socket, and are ready. It is, too, as soon as it serves."""
    tmp_path.chmod(0o755)
    gates = {number: tmp_path / f"gate{number}" for number in (1, 2, 3)}
    for number in (1, 3):
        gates[number].touch()
    running = daemon(table(tmp_path, kind))

    def wait_for_refusals() -> None:
        """Until each program's second process was not ready because another one answered, while those others run."""
        left = set(HOW)

        def all_refused() -> bool:
            status = running.status()
            left.difference_update(name for name in HOW if not_ready(name, status[f"{name}:2"]["why"]))
            others = {info["state"] for name, info in status.items() if not name.endswith(":2")}
            return not left and others == {"RUNNING"}

        wait_until(all_refused, 150, "each program's second process is refused")

    def all_run() -> bool:
        return {info["state"] for info in running.status().values()} == {"RUNNING"}

    def not_ready(name: str, why: str) -> bool:
        said = f"not ready within 6 s: http {'127.0.0.1:' if kind == 'tcp' else 'unix:'}"
        others = [f"answered by {name}:{number}, which has the same socket" for number in (1, 3)]
        return said in why and any(other in why for other in others)

    wait_for_refusals()
    gates[2].touch()
    wait_until(all_run, 40)
    if kind == "tcp":  # one that is started again, while the others serve
        gates[2].unlink()
        for name in HOW:
            os.kill(running.status()[f"{name}:2"]["pid"], signal.SIGKILL)
            wait_until(lambda: "SIGKILL" in running.status()[f"{name}:2"]["why"])  # noqa: B023
        wait_for_refusals()
        gates[2].touch()
        wait_until(all_run, 40)
        gates[2].unlink()  # and a release of which one hangs
        done = running.ctl("reload", "uvicorn")
        assert done.returncode == 1
        assert "rolled back" in done.stderr
        assert "which has the same socket" in done.stderr

"""The real servers, as programs of a table: each runs tests/sites/numbered_site.py on a socket that procman holds."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from procman.servers import SERVERS as KNOWN
from tests.harness import PROJECT

SITES = PROJECT / "tests" / "sites"


@dataclass(frozen=True, slots=True)
class Server:
    """One kind of server.

    `lines` of its program, where procman knows the server; `module` must be installed. `command` runs it where procman
    does not know it (yet): the socket is descriptor 3. `keeps` connections alive; takes `chunked` uploads; `pipelines`;
    ends an answer that waits for its client as a `whole` when it is told to stop.
    """

    module: str
    lines: str = ""
    known: str = ""
    command: Sequence[str] = ()
    keeps: bool = True
    chunked: bool = True
    pipelines: bool = True
    whole: bool = True

    @property
    def binds_itself(self) -> bool:
        """Whether procman can't hold its socket: connections are refused while it restarts."""
        return self.known not in KNOWN and any("{port}" in word for word in self.command)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def program(self, address: str, environment: dict[str, str], more: str = "", name: str = "site") -> str:
        """The table with the program `name` of this server."""
        if self.known in KNOWN:
            how = f'server = "{self.known}"\n{self.lines}'
        else:
            host, _, port = address.rpartition(":")
            words = [word.format(host=host, port=port) for word in self.command]
            how = f"command = {json.dumps([sys.executable, *words])}\n"
            how += f'ready = {{ http = "{f"http://{address}" if self.binds_itself else ""}/" }}\n'
        listen = "" if self.binds_itself else f'listen = "{address}"\n'
        pairs = ", ".join(f'{name} = "{value}"' for name, value in environment.items())
        return f'[program.{name}]\n{how}\n{listen}directory = "{SITES}"\nenvironment = {{ {pairs} }}\n{more}\n'


LONG = "server_options = {{ {} = 20 }}"
"""For those that close an idle connection after 2 or 5 seconds: such a close has nothing to do with what is tested."""

WSGI, ASGI = 'app = "numbered_site:app"\n', 'app = "numbered_site:asgi"\n'

SERVERS = {
    "wsgi": Server("waitress", WSGI + "workers = 2\nthreads = 4\naccess_log = false", "wsgi"),
    "gunicorn": Server("gunicorn", WSGI + "workers = 4", "gunicorn", keeps=False, pipelines=False),
    "gthread": Server("gunicorn", f"{WSGI}workers = 2\nthreads = 8\n{LONG.format('keep-alive')}", "gunicorn"),
    "uwsgi": Server("pyuwsgi", WSGI + "workers = 4", "uwsgi", keeps=False, chunked=False, pipelines=False, whole=False),
    "uvicorn": Server(
        "uvicorn", ASGI + LONG.format("timeout-keep-alive"), "uvicorn",
        ("-m", "uvicorn", "--fd", "3", "--log-level=warning", "numbered_site:asgi"),
    ),
    "hypercorn": Server(
        "hypercorn", ASGI + LONG.format("keep-alive"), "hypercorn",
        ("-m", "hypercorn", "-b", "fd://3", "numbered_site:asgi"),
    ),
    "daphne": Server("daphne", ASGI, "daphne", ("-m", "daphne", "--fd", "3", "-v0", "numbered_site:asgi")),
    "granian": Server(
        "granian", ASGI, "granian",
        ("-m", "granian", "--interface=asgi", "--no-ws", "--host={host}", "--port={port}", "numbered_site:asgi"),
    ),
}  # fmt: skip
"""By the names of `--server`. granian takes no socket: it binds its own until procman knows better."""


def version_file(folder: Path, version: str) -> None:
    """Puts a release of the site in place, for the next start of its server."""
    new = folder / "version.new"
    new.write_text(version)
    new.replace(folder / "version")

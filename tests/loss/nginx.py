"""A real nginx before a site, with connections to it that are kept alive. Debian's package nginx-light will do."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import free_port, wait_until
from tests.loss.client import address_of

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"

# One upstream and no second try with another one: what nginx hides is a kept-alive connection that was closed, which it
# asks again by itself, as any client may.
CONFIGURATION = """
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_max_body_size 16m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream site {{
        server {upstream};
        keepalive 32;
    }}
    server {{
        listen {address};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://site;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
        }}
    }}
}}
"""


def found() -> str | None:
    """The path of nginx, if there is one."""
    return shutil.which("nginx", path=PATH)


@contextmanager
def nginx(upstream: str) -> Iterator[str]:
    """The address of an nginx that asks `upstream`, "HOST:PORT" or "unix:PATH". After the block it has gone."""
    program = found()
    assert program is not None, "nginx is not installed"
    folder = Path(tempfile.mkdtemp(prefix="pmn", dir="/tmp"))
    address = f"127.0.0.1:{free_port()}"
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers could not reach a socket in root's folder
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=folder, user=user, upstream=upstream, address=address))
    log = folder / "error.log"
    process = subprocess.Popen(
        [program, "-p", str(folder), "-c", str(file), "-e", str(log)], stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(lambda: _answers(process, address, log), what="nginx accepts connections")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(folder)


def _answers(process: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"nginx ended with {process.returncode}: {log.read_text() if log.exists() else ''}")
    family, where = address_of(address)
    with socket.socket(family) as probe:
        return probe.connect_ex(where) == 0

"""`make run` and `make stop`: starts the demo's daemon, shows that it works, and ends it.

All that the demo writes goes to the folder .run of the project. A Unix socket's path has at most 107 bytes, so for a
project in a deep folder the demo makes a short folder of its own and keeps its name in .run/folder.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from procman import files

here = Path(__file__).resolve().parent
project = here.parent.parent
longest_folder = 70  # bytes: leaves room for the names of the sockets in it
stop_seconds = 90.0
unreachable = 6  # exit status of procmanctl: no daemon answers


def main() -> int:
    """`run` and `stop` say in words what they did; the exit status is 0 when the demo runs (or is gone) afterwards."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("action", choices=("run", "stop"))
    parser.add_argument("--port", type=int, default=8642, choices=range(1, 65536), metavar="PORT", help="of the site")
    parser.add_argument("--record", type=Path, default=project / ".run", help="folder of what the demo writes")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    try:
        return stop(options.record) if options.action == "stop" else run(options.record, options.port)
    except PermissionError as error:
        return failed(f"{error}. Was the demo last run by another user? That user's `make clean` removes what it left")


def run(record: Path, port: int) -> int:
    folder = runtime_folder(record)
    if ctl(folder, "daemon", "status", quiet=True) != unreachable:
        port = int((folder / "port").read_text())
        print("The demo already runs.")
        return show(folder, port)
    taken = holder(port)
    if taken:
        return failed(f"127.0.0.1:{port}: {taken}. Choose another port: make run PORT={port + 1}")
    (folder / "port").write_text(f"{port}\n")
    environment = {**os.environ, "PROCMAN_DEMO_DIR": str(folder), "PROCMAN_DEMO_PORT": str(port)}
    command = [sys.executable, "-m", "procman.daemon", "--daemonize", "-c", str(table(folder))]
    if subprocess.run(command, env=environment, cwd="/", stdin=subprocess.DEVNULL, check=False).returncode:
        return failed("procmand did not start; the reason stands above")
    if ctl(folder, "start", "all", "--timeout", "60", quiet=True):
        ctl(folder, "status")
        ctl(folder, "logs", "all")
        stop(record)
        return failed("the demo's programs did not start; their output stands above")
    return show(folder, port)


def show(folder: Path, port: int) -> int:
    """Prints the status table and a real answer of the site."""
    command = f"{shown(Path(sys.executable).parent / 'procmanctl')} -s {shown(folder / 'procman.sock')}"
    print(f"$ {command} status", flush=True)
    if ctl(folder, "status") == unreachable:
        return failed("the daemon has gone")
    address = f"http://127.0.0.1:{port}/"
    print(f"$ curl {address}")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the user's environment
    try:
        with direct.open(address, timeout=10) as answer:
            print(answer.read().decode(), end="")
    except OSError as error:
        return failed(f"{address} does not answer: {error}")
    print(f"It goes on running; its logs are in {shown(folder / 'log')}. `make stop` ends it.")
    return 0


def stop(record: Path) -> int:
    """Ends the daemon and waits until it and its programs have gone. Nothing to end is no error."""
    folder = recorded_folder(record)
    status = ctl(folder, "daemon", "shutdown", quiet=True) if folder else unreachable
    if folder is None or status == unreachable:
        print("The demo does not run.")
        return 0
    if status:
        ctl(folder, "daemon", "shutdown")
        return failed("the daemon refused to stop")
    end = time.monotonic() + stop_seconds
    while answers(folder / "procman.sock"):
        if time.monotonic() > end:
            return failed(f"the daemon still answers after {stop_seconds:.0f} s; see {folder / 'log'}")
        time.sleep(0.02)
    print("The demo has stopped.")
    return 0


def runtime_folder(record: Path) -> Path:
    """The folder of the socket, the state and the logs, made when it is not there. Only its owner can look into it."""
    record.mkdir(mode=0o700, exist_ok=True)
    folder = recorded_folder(record)
    if folder is None:
        folder = record
        if len(os.fsencode(record)) > longest_folder:
            short = os.environ.get("XDG_RUNTIME_DIR", "")
            folder = Path(tempfile.mkdtemp(prefix="procman-", dir=short if os.access(short, os.W_OK) else "/tmp"))
            print(f"{record} is too long for a Unix socket: {folder} is used.")
        (record / "folder").write_text(f"{folder}\n")
    return folder


def recorded_folder(record: Path) -> Path | None:
    """The folder of the last run, None when there is none. Raises PermissionError when it belongs to somebody else."""
    note = record / "folder"
    folder = Path(note.read_text().strip()) if note.exists() else None
    if folder is None or not folder.is_dir():
        return None
    # /tmp is cleaned now and then, and then anybody can make a folder of that name. Root may work in the owner's.
    if folder.stat().st_uid not in {os.geteuid(), record.stat().st_uid}:
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def table(folder: Path) -> Path:
    """The program table: etc/demo/procman.toml, or a copy that belongs to root.

    Root's daemon refuses a table that others can write. The project of an ordinary user is one, so with `sudo make run`
    the demo runs from a copy. That opens no door: this file comes from the same folder.
    """
    source = here / "procman.toml"
    reason = files.Machine().trusted(str(source))
    if not reason:
        return source
    copy = folder / "demo"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(mode=0o700)
    for file in (*here.glob("*.py"), source):
        shutil.copyfile(file, copy / file.name)
        (copy / file.name).chmod(0o600)
    print(f"procmand would refuse {shown(source)} ({reason}): it gets a copy, in {shown(copy)}.")
    return copy / source.name


def holder(port: int) -> str:
    """Why the site can't have this port, or "" when it can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            return "another program uses it" if error.errno == errno.EADDRINUSE else str(error)
    return ""


def answers(path: Path) -> bool:
    """Whether somebody still listens on the daemon's socket."""
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def ctl(folder: Path, *arguments: str, quiet: bool = False) -> int:
    """Runs procmanctl on the demo's daemon and returns its exit status."""
    output = subprocess.DEVNULL if quiet else None
    command = [sys.executable, "-m", "procman.ctl.main", "-s", str(folder / "procman.sock"), *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode


def shown(path: Path) -> str:
    """The path as a user in the project's folder would type it."""
    return str(path.relative_to(project)) if path.is_relative_to(project) else str(path)


def failed(reason: str) -> int:
    print(f"make: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

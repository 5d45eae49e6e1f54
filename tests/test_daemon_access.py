"""Who may do what with the daemon, and what many clients cost it."""

from __future__ import annotations

import grp
import json
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, User, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become users of several groups")
PLAIN = '[program.it]\ncommand = "${PYTHON} -S -E ${PROGRAMS}/ready.py"\nstart_seconds = 0\n'
CTL = "import sys; from procman.ctl.main import main; sys.exit(main())"


def as_member(
    user: User, running: RunningDaemon, groups: list[int], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """procmanctl, run by the ordinary user with these supplementary groups."""
    command = [user.python, "-c", CTL, "-s", str(running.socket), *arguments]
    options: dict[str, Any] = user.options() | {"extra_groups": groups}
    return subprocess.run(command, timeout=30, text=True, capture_output=True, check=False, **options)


def two_groups() -> tuple[grp.struct_group, grp.struct_group]:
    """Two groups that exist, and that are nobody's own."""
    return grp.getgrnam("daemon"), grp.getgrnam("mail")


@AS_ROOT
def test_the_owner_alone_may_connect_without_groups(daemon: MakeDaemon, as_user: User) -> None:
    running = daemon(PLAIN)
    running.folder.chmod(0o755)
    running.wait_for("it")
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o600
    done = as_member(as_user, running, [], "status")
    assert done.returncode == 6, done
    assert str(running.socket) in done.stderr


@AS_ROOT
def test_groups_that_may_operate_or_look(daemon: MakeDaemon, as_user: User) -> None:
    operators, readers = two_groups()
    settings = f'socket_group = "{operators.gr_name}"\nread_only_group = "{readers.gr_name}"'
    running = daemon(PLAIN, settings=settings)
    running.folder.chmod(0o755)
    pid = running.wait_for("it")["pid"]
    for group, look, operate in ((operators, 0, 0), (readers, 0, 5), (None, 5, 5)):
        groups = [group.gr_gid] if group else []
        for arguments in (["status"], ["why", "it"], ["logs", "it"], ["daemon", "status"]):
            done = as_member(as_user, running, groups, *arguments)
            assert done.returncode == look, (group, arguments, done)
        for arguments in (["restart", "it"], ["signal", "WINCH", "it"], ["daemon", "reopen-logs"]):
            done = as_member(as_user, running, groups, *arguments)
            assert done.returncode == operate, (group, arguments, done)
            assert not operate or "allow" in done.stderr or "may" in done.stderr, done.stderr
    assert as_member(as_user, running, [readers.gr_gid], "daemon", "shutdown").returncode == 5
    assert running.status()["it"]["pid"] != pid, "one of them restarted it"
    assert f"restart by uid {as_user.uid}" in running.said()
    events = [json.loads(line) for line in running.ctl("--json", "events").stdout.splitlines()]
    done_by = {event["what"]: event["uid"] for event in events if event["type"] == "operation"}
    assert done_by["restart"] == as_user.uid


@AS_ROOT
def test_socket_group_alone_owns_the_socket(daemon: MakeDaemon, as_user: User) -> None:
    operators, readers = two_groups()
    running = daemon(PLAIN, settings=f'socket_group = "{operators.gr_name}"')
    running.folder.chmod(0o755)
    running.wait_for("it")
    found = running.socket.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, operators.gr_gid)
    assert as_member(as_user, running, [operators.gr_gid], "restart", "it").returncode == 0
    assert as_member(as_user, running, [readers.gr_gid], "status").returncode == 6


def test_two_hundred_clients_at_once(daemon: MakeDaemon) -> None:
    """All have connected and asked before the first one reads, and some never do."""
    running = daemon(PLAIN)
    running.wait_for("it")
    request = b'{"jsonrpc": "2.0", "id": 1, "method": "status", "params": {}}\n'
    clients = []
    try:
        for _ in range(200):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(20)
            client.connect(str(running.socket))
            client.sendall(request)
            clients.append(client)
        for client in clients[::2]:
            with client.makefile("rb") as file:
                answer = json.loads(file.readline())
            assert answer["result"][0]["name"] == "it"
        assert running.ctl("status", "it").returncode == 0
    finally:
        for client in clients:
            client.close()
    assert running.ctl("restart", "it").returncode == 0
    supervisor = running.supervisor_pid
    wait_until(lambda: len(os.listdir(f"/proc/{supervisor}/fd")) < 100, what="their descriptors are closed")


def resident_kb(pid: int) -> int:
    """RSS of a process in KB (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_two_thousand_requests_do_not_make_the_daemon_grow(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN)
    running.wait_for("it")
    looks: list[tuple[str, dict[str, Any]]] = [("status", {"names": ["it"]})] * 16
    methods = [*looks, ("status", {}), ("why", {"name": "it"}), ("show", {"name": "it"}), ("daemon.status", {})]
    pids = [running.keeper_pid, running.supervisor_pid]

    def ask(times: int) -> int:
        for _ in range(times // len(methods)):
            with running.client() as client:
                for method, params in methods:
                    client.call(method, **params)
        return sum(resident_kb(pid) for pid in pids)

    before = ask(400)
    after = ask(1600)
    assert after < before * 1.1, f"{before} KB, then {after} KB"
    assert running.supervisor_pid == pids[1], "it is still the same one"

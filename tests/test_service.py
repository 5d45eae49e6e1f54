"""What the keeper tells the service manager: the test is the service manager, with a socket of its own."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman.keeper.service import NAME_MAX, Service
from tests.harness import PROJECT, wait_until


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where NOTIFY_SOCKET leads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(manager: socket.socket) -> tuple[str, list[int]]:
    """One message: its text, and the inodes of its descriptors."""
    data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(64))
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    inodes = [os.fstat(fd).st_ino for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    return data.decode(), inodes


def test_what_is_stored_and_what_is_not(manager: socket.socket) -> None:
    service = Service()
    read_end, write_end = os.pipe()
    try:
        for name in ("lock", "table", "rpc", "notify/it", "log/" + "x" * NAME_MAX):
            service.store(name, read_end)
            service.drop(name) if not name.startswith("log/") else None
        service.store("log/shop:1/out%/r", read_end)
        inode = os.fstat(read_end).st_ino
        assert heard(manager) == ("FDSTORE=1\nFDPOLL=0\nFDNAME=log/shop%3A1/out%25/r", [inode])
        service.drop("log/shop:1/out%/r")
        assert heard(manager) == ("FDSTOREREMOVE=1\nFDNAME=log/shop%3A1/out%25/r", [])
        with pytest.raises(BlockingIOError):
            heard(manager)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_what_is_not_taken_at_once_waits_in_order(manager: socket.socket) -> None:
    """Also when the descriptor was closed meanwhile: nobody may get what has its number next."""
    later: list[int] = []
    service = Service(lambda: later.append(1))
    sent = 0
    while not later:
        read_end, write_end = os.pipe()
        service.store(f"log/{sent}/r", read_end)
        os.close(read_end)
        os.close(write_end)
        sent += 1
        assert sent < 10_000
    service.drop("log/0/r")
    service.notify("WATCHDOG=1")  # there will be others: this one may be lost
    service.notify("READY=1")
    service.flush()
    assert len(later) > 1, "it is still full"
    expected = [f"FDSTORE=1\nFDPOLL=0\nFDNAME=log/{number}/r" for number in range(sent)]
    expected += ["FDSTOREREMOVE=1\nFDNAME=log/0/r", "READY=1"]
    texts: list[str] = []
    while len(texts) < len(expected):
        text, inodes = heard(manager)
        texts.append(text)
        assert len(inodes) == text.startswith("FDSTORE=")
        service.flush()
    assert texts == expected


@pytest.mark.parametrize("variables", [{}, {"FDSTORE": "0"}])
def test_nobody_keeps(manager: socket.socket, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables:
        monkeypatch.delenv("NOTIFY_SOCKET")
    service = Service()
    service.store("log/a/r", 0)
    service.finish()
    with pytest.raises(BlockingIOError):
        heard(manager)


TAKER = """
import json, os, sys
if sys.argv[1]: os.environ["LISTEN_PID"] = str(os.getpid())
from procman.keeper.service import Service
print(json.dumps([Service().take_stored(), "LISTEN_FDS" in os.environ]))
"""


@pytest.mark.parametrize(
    ("mine", "count", "names", "expected"),
    [
        ("1", "3", "listener/web:other.socket:log/a%3A1/out/r", {"listener/web": 3, "log/a:1/out/r": 5}),
        ("1", "2", "log/a/r:log/a/r", {"log/a/r": 3}),
        ("1", "9", "log/a/r", {"log/a/r": 3}),
        ("1", "x", "log/a/r", {}),
        ("1", "", "", {}),
        ("", "1", "log/a/r", {}),
    ],
)
def test_what_was_stored_comes_back(mine: str, count: str, names: str, expected: dict[str, int]) -> None:
    environment = {"LISTEN_FDS": count, "LISTEN_FDNAMES": names, "LISTEN_PID": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", TAKER, mine], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [expected, False]


def test_the_end_waits_for_a_slow_manager(manager: socket.socket) -> None:
    """A bit: what it no longer needs is said even when its queue was full a moment ago."""
    later: list[int] = []
    service = Service(lambda: later.append(1))
    sent = 0
    while not later:
        service.drop(f"log/{sent}/r")
        sent += 1
    pid = os.fork()
    if pid == 0:  # it reads while we wait
        try:
            for _ in range(sent):
                wait_until(lambda: heard(manager))
        finally:
            os._exit(0)
    service.finish()
    later.clear()
    service.flush()
    assert not later
    os.waitpid(pid, 0)

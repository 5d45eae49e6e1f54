"""notify.py, with real datagrams from this process and from real children."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import notify
from procman.errors import Failed
from procman.holdings import make_notify_folder
from procman.notify import MESSAGE_MAX, Message, NotifySocket, allowed
from tests.harness import wait_until


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can write; pytest's own ones are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[NotifySocket]:
    made = NotifySocket(str(tmp_path / "notify.sock"), os.geteuid())
    yield made
    made.close()


def send(path: str, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, path)


def from_me(**fields: str) -> Message:
    return Message(fields, os.getpid(), os.getuid())


@pytest.mark.parametrize("left_over", [False, True])
def test_its_folder_is_open_to_all_users_whatever_the_umask(tmp_path: Path, left_over: bool) -> None:
    folder = tmp_path / "run" / "notify"
    if left_over:
        folder.mkdir(0o700, parents=True)
    before = os.umask(0o077)
    try:
        make_notify_folder(str(folder))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_the_file_is_for_the_programs_user_alone(tmp_path: Path) -> None:
    uid = 12345 if os.geteuid() == 0 else os.geteuid()
    path = tmp_path / "notify.sock"
    NotifySocket(str(path), uid).close()
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, uid)


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "notify.sock"
    NotifySocket(str(path), os.geteuid()).close()
    receiver = NotifySocket(str(path), os.geteuid())
    send(str(path), b"READY=1")
    assert receiver.receive() == from_me(READY="1")
    receiver.close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(Failed, match="Address already in use"):
        NotifySocket(str(path), os.geteuid())
    assert path.read_text() == "precious"


def test_impossible_paths(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="takes 107 bytes"):
        NotifySocket("/" + "x" * 107, os.geteuid())
    with pytest.raises(Failed, match="No such file or directory"):
        NotifySocket(str(tmp_path / "nowhere" / "notify.sock"), os.geteuid())


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (b"READY=1", {"READY": "1"}),
        (b"READY=1\nSTATUS=up = fine\nMAINPID=7\n", {"READY": "1", "STATUS": "up = fine", "MAINPID": "7"}),
        (b"STATUS=\n", {"STATUS": ""}),
        (b"nonsense\n=x\nREADY=1", {"READY": "1"}),
        (b"STATUS=\xff\0", {"STATUS": "\ufffd\0"}),
        (b"READY=1\nREADY=0", {"READY": "0"}),
        (b"S=" + b"x" * (MESSAGE_MAX - 2), {"S": "x" * (MESSAGE_MAX - 2)}),
        (b"S=" + b"x" * (MESSAGE_MAX - 1), None),
        (b"", None),
        (b"nonsense", None),
        (b"=1", None),
        (b"\xff" * 100, None),
    ],
)
def test_messages(receiver: NotifySocket, data: bytes, fields: dict[str, str] | None) -> None:
    send(receiver.path, data)
    assert receiver.receive() == (None if fields is None else from_me(**fields))
    assert receiver.ignored == (fields is None)
    assert receiver.receive() is None


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_no_bytes_do_harm(messages: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        receiver = NotifySocket(f"{folder}/s", os.geteuid())
        for data in [*messages, b"LAST=1"]:
            send(receiver.path, data)
        seen = []
        while message := receiver.receive():
            seen.append(message)
        receiver.close()
    assert seen[-1] == from_me(LAST="1")
    assert len(seen) + receiver.ignored == len(messages) + 1


def test_bad_messages_hide_no_good_one_and_a_flood_does_not_hold_the_loop(
    receiver: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_IGNORED_IN_A_ROW", 3)
    for _ in range(7):
        send(receiver.path, b"bad")
    send(receiver.path, b"READY=1")  # eight: the kernel queues ten by default (max_dgram_qlen)
    assert [receiver.receive() for _ in range(4)] == [None, None, from_me(READY="1"), None]
    assert receiver.ignored == 7


def test_descriptors_sent_along_are_closed(receiver: NotifySocket) -> None:
    """sd_notify_barrier(3) waits for just that."""
    before = len(os.listdir("/proc/self/fd"))
    for count in (1, 250):
        ours, theirs = os.pipe()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs] * count))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendmsg([b"BARRIER=1"], [rights], 0, receiver.path)
        os.close(theirs)
        assert receiver.receive() == from_me(BARRIER="1")
        assert os.read(ours, 1) == b""  # the last writer is gone
        os.close(ours)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_message_outlives_who_has_only_looked_at_it(receiver: NotifySocket) -> None:
    send(receiver.path, b"READY=1")
    assert receiver.peek() == receiver.peek() == from_me(READY="1")
    successor = NotifySocket.from_fd(os.dup(receiver.fileno()))
    assert successor.peek() == from_me(READY="1")
    successor.take()
    assert successor.peek() is receiver.peek() is None
    successor.take()  # none waits: nothing to take
    successor.close()


def test_what_a_child_before_has_left_can_be_dropped(receiver: NotifySocket) -> None:
    for _ in range(3):
        send(receiver.path, b"READY=1")
    receiver.drop()
    assert receiver.peek() is None


def test_another_object_goes_on_with_the_descriptor(receiver: NotifySocket) -> None:
    send(receiver.path, b"READY=1")
    successor = NotifySocket.from_fd(os.dup(receiver.fileno()))
    assert successor.path == receiver.path
    assert successor.receive() == from_me(READY="1")
    assert successor.receive() is None
    successor.close()


def test_the_sender_is_the_one_that_the_kernel_names(open_folder: Path) -> None:
    uid = 12345 if os.geteuid() == 0 else os.geteuid()
    receiver = NotifySocket(str(open_folder / "notify.sock"), uid)
    code = (
        f"import os, socket, sys; os.setresuid({uid}, {uid}, {uid})\n"
        "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s: s.sendto(b'READY=1', sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, receiver.path]) as child:
        message = wait_until(receiver.receive)
    receiver.close()
    assert message is not None
    assert (message.pid, message.uid) == (child.pid, uid)


# Who may speak

FAMILY = """
import os, sys, time
def report(name):
    os.write(1, f"{name} {os.getpid()}\\n".encode())  # one write: several processes share the pipe
if os.fork() == 0:
    if os.fork() == 0:
        report("grandchild")
        sys.stdin.read()
        os._exit(0)
    if os.fork() == 0:
        if os.fork() == 0:
            report("orphan")
            sys.stdin.read()
        os._exit(0)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            report("stranger")
            sys.stdin.read()
        os._exit(0)
    os.wait(); os.wait()
    report("child")
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie: who reaps orphans here, and when, is not ours to say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def family() -> Iterator[dict[str, int]]:
    """A main process in a session of its own, with descendants; "stranger" left both the session and the family."""
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as main:
        assert main.stdin is not None
        assert main.stdout is not None
        pids = {"main": main.pid}
        while len(pids) < 5:
            name, pid = main.stdout.readline().split()
            pids[name] = int(pid)
        yield pids
        main.stdin.close()
        main.wait(10)
        wait_until(lambda: not any(runs(pid) for pid in pids.values()))


def test_who_may_speak_for_a_program(family: dict[str, int]) -> None:
    me = os.geteuid()
    verdicts = {name: allowed(pid, me, family["main"], me) for name, pid in family.items()}
    assert verdicts == {"main": True, "child": True, "grandchild": True, "orphan": True, "stranger": False}
    assert not allowed(os.getpid(), me, family["main"], me)
    assert not allowed(1, 0, family["main"], me)


@pytest.mark.parametrize(("uid", "expected"), [(0, True), (os.geteuid(), True), (1001, True), (1002, False)])
def test_the_user_must_fit(family: dict[str, int], uid: int, expected: bool) -> None:
    if uid == os.geteuid() == 1002:
        pytest.skip("runs as the user that the test takes for a foreign one")
    assert allowed(family["child"], uid, family["main"], 1001) is expected


def test_a_sender_that_has_gone_or_is_invisible_is_judged_by_its_user() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, 0):
        assert allowed(pid, 1001, os.getpid(), 1001)
        assert not allowed(pid, 1002, os.getpid(), 1001) or os.geteuid() == 1002

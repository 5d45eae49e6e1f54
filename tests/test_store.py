"""store.py: what is read back after every kind of damage, and who holds the lock."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from procman import store
from procman.errors import Failed
from procman.store import VERSION, Loaded, boot_id, load, lock, save
from tests.harness import PROJECT, wait_until

DOCUMENT = {"processes": {"shop": {"wanted": True, "retries": 3, "note": "ü\0\u2028"}}, "empty": []}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / store.STATE_NAME)


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_saved_is_loaded(path: str, durable: bool) -> None:
    save(path, {"old": 1}, durable=durable)
    save(path, DOCUMENT, durable=durable)
    loaded = load(path)
    assert loaded.problem == ""
    assert loaded.document is not None
    written_at = dt.datetime.fromisoformat(loaded.document["written_at"])
    assert abs(dt.datetime.now(dt.UTC) - written_at) < dt.timedelta(minutes=1)
    stamps = {"version": VERSION, "boot_id": boot_id(), "written_at": loaded.document["written_at"]}
    assert loaded.document == {**DOCUMENT, **stamps}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(os.path.dirname(path)) == [store.STATE_NAME]


def test_boot_id_names_this_boot() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_nothing_there_is_no_problem(path: str) -> None:
    assert load(path) == Loaded(None, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "is damaged"),
        (b"\xff\xfe\xff", "is damaged"),
        (b"[" * 200_000, "is damaged"),
        (b"null", "is no state file of procman"),
        (b"[1]", "is no state file of procman"),
        (b"{}", "is no state file of procman"),
        (b'{"version": 0}', f"has version 0, this procman writes {VERSION}"),
        (b'{"version": 99}', "has version 99"),
        (b'{"version": "1"}', "has version '1'"),
    ],
)
def test_a_bad_file_is_put_aside(path: str, content: bytes, reason: str) -> None:
    Path(path).write_bytes(content)
    loaded = load(path)
    assert loaded.document is None
    assert loaded.problem.startswith(f"the state file {path} {reason}")
    assert loaded.problem.endswith(f"it is kept as {path}.bad-1")
    assert Path(f"{path}.bad-1").read_bytes() == content
    assert load(path) == Loaded(None, "")


def test_no_torn_file_is_taken_for_a_whole_one(path: str) -> None:
    save(path, DOCUMENT)
    whole = Path(path).read_bytes()
    for size in range(len(whole)):
        Path(path).write_bytes(whole[:size])
        assert load(path).document is None


def test_three_bad_files_are_kept_the_newest(path: str) -> None:
    Path(f"{path}.bad-x").touch()
    for number in range(1, 7):
        Path(path).write_text(f"bad {number}")
        assert load(path).problem.endswith(f"bad-{number}")
    kept = sorted(Path(path).parent.iterdir())
    assert [file.name.rpartition("-")[2] for file in kept] == ["4", "5", "6", "x"]
    assert [file.read_text() for file in kept] == ["bad 4", "bad 5", "bad 6", ""]


def test_a_file_that_cannot_be_read_stays(path: str) -> None:
    os.symlink(path, path)
    loaded = load(path)
    assert loaded.document is None
    assert loaded.problem == f"can't read the state file {path}: Too many levels of symbolic links; starting without it"
    assert os.path.islink(path)


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a socket", "a device"])
def test_what_is_no_file_is_put_aside_and_not_waited_for(path: str, kind: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        match kind:
            case "a folder":
                os.makedirs(f"{path}/with/something")
            case "a FIFO":
                os.mkfifo(path)
            case "a socket":
                sock.bind(path)
            case _:
                os.symlink("/dev/zero", path)
        loaded = load(path)
    assert loaded == Loaded(None, f"the state file {path} is no file; starting without it, it is kept as {path}.bad-1")
    save(path, DOCUMENT)
    assert load(path).document is not None


def test_a_file_of_any_size_is_not_read(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(store.SIZE_MAX + 1)
    assert f"has {store.SIZE_MAX + 1} bytes, more than any that procman writes" in load(path).problem


@pytest.mark.parametrize("version", ["[" * 500 + "]" * 500, "9" * 4300, '"' + "x" * 100_000 + '"'])
def test_the_message_does_not_grow_with_the_file(path: str, version: str) -> None:
    Path(path).write_text(f'{{"version": {version}}}')
    assert len(load(path).problem) < 500


def test_a_copy_outlives_the_next_save(path: str) -> None:
    save(path, {"old": 1})
    assert store.keep_copy(path) == f"it is kept as {path}.bad-1"
    save(path, {"new": 1})
    assert json.loads(Path(f"{path}.bad-1").read_text())["old"] == 1
    assert (load(path).document or {})["new"] == 1


def test_a_bad_file_that_cannot_be_put_aside(path: str) -> None:
    Path(path).write_text("bad")
    os.makedirs(f"{path}.bad-1/x")
    os.makedirs(f"{path}.bad-2/x")
    assert load(path).problem.endswith("bad-3")
    Path(path).write_text("bad")
    assert load(path).problem.endswith("bad-4")  # a folder in the way of the clean-up is no reason to stop


def test_a_failed_save_leaves_the_old_file(path: str) -> None:
    save(path, {"old": 1})
    os.mkdir(f"{path}.new")
    with pytest.raises(Failed, match=f"can't write the state file {path}: Is a directory") as caught:
        save(path, DOCUMENT)
    assert caught.value.hint
    loaded = load(path).document
    assert loaded is not None
    assert loaded["old"] == 1


def test_a_full_disk_leaves_the_old_file(path: str) -> None:
    """A limit on the size of files fails the write half way, as a full disk does."""
    save(path, {"old": 1})
    code = (
        "import resource, signal, sys; from procman.errors import Failed; from procman.store import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: save(sys.argv[1], {'much': 'x' * 10000})\n"
        "except Failed as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == f"can't write the state file {path}: File too large\n"
    assert os.listdir(os.path.dirname(path)) == [store.STATE_NAME]
    assert (load(path).document or {})["old"] == 1


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(path: str) -> None:
    code = (
        "import itertools, sys; from procman.store import save\n"
        "for n in itertools.count(1): save(sys.argv[1], {'n': n, 'much': [n] * 20000})"
    )
    for _ in range(5):
        if os.path.exists(path):
            os.unlink(path)
        with subprocess.Popen([sys.executable, "-c", code, path], cwd=PROJECT) as writer:
            wait_until(lambda: os.path.exists(path))
            for _ in range(20):
                document = load(path).document
                assert document is not None, "a reader saw a torn file"
                assert document["much"] == [document["n"]] * 20000
            writer.send_signal(signal.SIGKILL)
        assert load(path).document is not None


# The lock


def test_lock_makes_the_folder_and_holds(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    fd = lock(str(folder), os.getpid()).fd
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not os.get_inheritable(fd)
    with pytest.raises(Failed, match=f"another procmand \\(pid {os.getpid()}\\) uses state_dir {folder}") as caught:
        lock(str(folder), os.getpid())
    assert "daemon.state_dir" in caught.value.hint
    os.close(fd)
    os.close(lock(str(folder), os.getpid()).fd)


def test_a_failed_lock_leaks_nothing(tmp_path: Path) -> None:
    fd = lock(str(tmp_path), os.getpid()).fd
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(Failed):
            lock(str(tmp_path), os.getpid())
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_the_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    code = "import os, sys; from procman.store import lock; lock(sys.argv[1], os.getpid()); "
    code += "print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Failed, match=f"pid {holder.pid}"):
            lock(str(tmp_path), os.getpid())
        holder.kill()
    os.close(lock(str(tmp_path), os.getpid()).fd)


def test_a_copy_of_the_descriptor_holds_the_lock(tmp_path: Path) -> None:
    fd = lock(str(tmp_path), os.getpid()).fd
    copy = os.dup(fd)
    os.close(fd)
    with pytest.raises(Failed, match="another procmand"):
        lock(str(tmp_path), os.getpid())
    os.close(copy)


def test_a_state_dir_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match=r"can't use state_dir .*: Not a directory") as caught:
        lock(str(tmp_path / "file" / "state"), os.getpid())
    assert caught.value.hint
    with pytest.raises(Failed, match=r"can't use state_dir .*: File exists"):
        lock(str(tmp_path / "file"), os.getpid())


def test_garbage_in_the_lock_file_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / store.LOCK_NAME).write_bytes(b"\x1b[31m\xff")
    other = os.open(tmp_path / store.LOCK_NAME, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(Failed, match="another procmand uses state_dir"):
        lock(str(tmp_path), os.getpid())
    os.close(other)


def test_the_house_of_a_state_folder_stays(tmp_path: Path) -> None:
    first = lock(str(tmp_path), 123456789)
    assert first.fresh
    assert 0 < first.house < 1 << store.HOUSE_BITS
    os.close(first.fd)
    again = lock(str(tmp_path), 7)
    assert (again.house, again.fresh) == (first.house, False)
    assert (tmp_path / store.LOCK_NAME).read_text() == f"7\nhouse={first.house}\n"
    os.close(again.fd)


@pytest.mark.parametrize("second", ["", "house=0", "x", f"house={1 << store.HOUSE_BITS}", "house=-1", "house=\u00b2"])
def test_a_lock_file_without_a_house_gets_one(tmp_path: Path, second: str) -> None:
    (tmp_path / store.LOCK_NAME).write_text(f"77\n{second}\n")
    taken = lock(str(tmp_path), 7)
    assert taken.fresh
    assert (tmp_path / store.LOCK_NAME).read_text() == f"7\nhouse={taken.house}\n"
    os.close(taken.fd)


def test_the_rest_of_a_killed_daemon_is_waited_for(tmp_path: Path) -> None:
    """Its keeper has gone, its supervisor is about to."""
    fd = lock(str(tmp_path), 2**22 + 1).fd  # there is no such pid
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    taken = lock(str(tmp_path), os.getpid())
    timer.join()
    os.close(taken.fd)


def test_documents_are_plain_json(path: str) -> None:
    save(path, DOCUMENT)
    assert json.loads(Path(path).read_text())["processes"] == DOCUMENT["processes"]

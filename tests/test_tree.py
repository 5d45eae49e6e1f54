"""Whose a process is, with real ones: the test makes itself a subreaper, as the keeper is."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from procman.keeper import spawn, tree
from procman.keeper.tree import Family, Process
from tests.harness import wait_until

DETACH = "import os, sys, time\nif os.fork(): os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
FAMILY = """
import os, subprocess, sys
inner = subprocess.Popen([sys.executable, "-S", "-E", "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(inner.stdout.readline(), end="", flush=True)
inner.wait()
os.execvp("sleep", ["sleep", "60"])
"""
TAG = 4711


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    spawn.prctl(spawn.PR_SET_CHILD_SUBREAPER, 1)
    yield
    spawn.prctl(spawn.PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A child in a session of its own with our tag, and its grandchild, which left that session and its parent."""

    def tagged() -> None:
        resource.setrlimit(resource.RLIMIT_RSS, (tree.TAG_BASE + TAG, resource.getrlimit(resource.RLIMIT_RSS)[1]))

    command = [sys.executable, "-S", "-E", "-c", FAMILY, DETACH]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=tagged  # noqa: PLW1509 - no threads
    ) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        wait_until(lambda: grandchild in tree.direct_children(), what="it becomes ours")
        yield child, grandchild
        child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(grandchild, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(grandchild, 0)


def pids(processes: list[Process]) -> set[int]:
    return {process.pid for process in processes}


def test_a_live_child_and_all_below(family: tuple[subprocess.Popen[str], int]) -> None:
    child, grandchild = family
    assert pids(tree.members(Family(TAG, child.pid, child.pid, ""), [child.pid])) == {child.pid, grandchild}


def test_what_an_ended_child_left_is_told_by_its_tag(family: tuple[subprocess.Popen[str], int]) -> None:
    child, grandchild = family
    child.kill()
    child.wait()
    assert pids(tree.members(Family(TAG, 0, child.pid, ""), [])) == {grandchild}
    assert tree.members(Family(TAG + 1, 0, -1, ""), []) == []
    os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: not tree.members(Family(TAG, 0, child.pid, ""), []), what="a zombie is nothing that is left")


def test_the_session_tells_too(family: tuple[subprocess.Popen[str], int]) -> None:
    """A program that cleared its tag, but stays in the session."""
    child, grandchild = family
    child.kill()
    child.wait()
    assert pids(tree.members(Family(TAG + 1, 0, grandchild, ""), [])) == {grandchild}
    assert tree.members(Family(TAG + 1, 0, child.pid, ""), []) == []


def test_below_a_stranger_without_a_tag_the_session_is_looked_for_everywhere() -> None:
    """It shed its tag and left the session; what it had started before has done neither the second."""
    with subprocess.Popen(["sleep", "60"]) as unmarked, subprocess.Popen(
        ["sh", "-c", "sleep 60 & exec sleep 60"], start_new_session=True
    ) as child:
        family = Family(TAG, child.pid, -1, "")
        below = wait_until(lambda: pids(tree.members(family, [])) - {child.pid}, what="it has a child")
        assert pids(tree.members(Family(TAG, 0, child.pid, ""), [child.pid])) == {child.pid, *below}
        for pid in (unmarked.pid, child.pid, *below):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kernel_tells", [True, False])
def test_a_family_of_three_generations(monkeypatch: pytest.MonkeyPatch, kernel_tells: bool) -> None:
    """Also where the kernel does not list the children of a process."""
    monkeypatch.setattr(tree, "CHILDREN_KNOWN", kernel_tells)
    script = "sh -c 'sleep 60 & exec sleep 60' & exec sleep 60"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as child:
        family = Family(TAG, child.pid, -1, "")
        wait_until(lambda: len(tree.members(family, [child.pid])) == 3, what="there are three")
        tree.send(family, [child.pid], signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL


def test_kill_takes_all(family: tuple[subprocess.Popen[str], int]) -> None:
    child, grandchild = family
    tree.send(Family(TAG, child.pid, child.pid, ""), [child.pid], signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert os.waitpid(grandchild, 0)[1] == signal.SIGKILL


def test_another_signal_takes_all_once(family: tuple[subprocess.Popen[str], int]) -> None:
    child, grandchild = family
    tree.send(Family(TAG, child.pid, child.pid, ""), [child.pid], signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    assert os.waitpid(grandchild, 0)[1] == signal.SIGTERM


@pytest.mark.parametrize("number", [-1, 65, 2**40])
def test_a_number_that_is_no_signal(number: int) -> None:
    with pytest.raises(OSError, match="no such signal"):
        tree.send(Family(TAG, 0, -1, ""), [], number)


def test_a_pid_that_is_somebody_elses_by_now_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = tree.read_process(child.pid)
        assert process is not None
        tree.send_one(process._replace(start=process.start - 1), signal.SIGKILL)
        tree.send_one(process._replace(pid=2**22 + 1), signal.SIGKILL)
        assert child.poll() is None
        tree.send_one(process, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM


def test_we_are_never_among_them() -> None:
    own = tree.read_process(os.getpid())
    assert own is not None
    assert own.parent == os.getppid()
    assert own.session == os.getsid(0)
    found = tree.members(Family(0, os.getpid(), -1, ""), [])
    assert os.getpid() not in pids(found)


def test_names_with_parentheses_and_spaces(tmp_path: Path) -> None:
    odd = tmp_path / ") R 1 (x"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as child:
        process = tree.read_process(child.pid)
        assert process is not None
        assert process.parent == os.getpid()
        child.kill()
        child.wait()
        assert tree.read_process(child.pid) is None


def test_no_descriptor_is_free() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            tree.members(Family(TAG, 0, -1, ""), [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def cgroup() -> Iterator[str]:
    root = tree.make_cgroup_root()
    if not root:
        pytest.skip("no cgroup can be made here")
    path = tree.make_cgroup(root, "a/b#1")
    assert path == f"{root}/a_b#1"
    yield path
    tree.remove_cgroup(root)
    assert not os.path.exists(root)


def test_a_cgroup(cgroup: str) -> None:
    """Nothing gets out of it: no tag, no session and no parent is needed."""
    os.mkdir(f"{cgroup}/made-by-the-program")
    with subprocess.Popen(["sleep", "60"]) as child, subprocess.Popen(["sleep", "60"]) as other:
        Path(cgroup, "cgroup.procs").write_text(str(child.pid))
        Path(cgroup, "made-by-the-program", "cgroup.procs").write_text(str(other.pid))
        family = Family(TAG, 0, -1, cgroup)
        assert pids(tree.members(family, [child.pid, other.pid])) == {child.pid, other.pid}
        tree.remove_cgroup(cgroup)
        assert os.path.exists(cgroup), "it is in use"
        tree.send(family, [child.pid, other.pid], signal.SIGKILL)
        assert (child.wait(10), other.wait(10)) == (-signal.SIGKILL, -signal.SIGKILL)
    wait_until(lambda: not tree.members(family, []), what="it is empty")
    tree.remove_cgroup(cgroup)
    assert not os.path.exists(cgroup)


def test_empty_folders_of_killed_keepers_are_removed(cgroup: str) -> None:
    beside = Path(cgroup).parent.parent
    old, used, other = beside / f"procman-{2**22 + 1}", beside / f"procman-{2**22 + 2}", beside / "procman-x"
    for folder in (old / "a#1" / "inner", used / "a#1", other):
        folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            Path(used, "a#1", "cgroup.procs").write_text(str(child.pid))
            assert tree.make_cgroup_root() == str(Path(cgroup).parent), "that of a living keeper stays"
            assert [path.exists() for path in (old, used, other)] == [False, True, True]
            assert tree.old_cgroup(child.pid, "a#1") == f"{used}/a#1"
            assert tree.old_cgroup(child.pid, "b#1") == ""
            assert tree.old_cgroup(os.getpid(), "a#1") == ""
            assert tree.old_cgroup(2**22 + 1, "a#1") == ""
        finally:
            child.kill()
            child.wait(10)
            wait_until(lambda: not tree.members(Family(TAG, 0, -1, f"{used}/a#1"), []), what="it is empty")
            for folder in (old, used, other):
                tree.remove_cgroup(str(folder))


def test_no_cgroup() -> None:
    assert tree.make_cgroup("/nonexistent", "a#1") == ""
    tree.remove_cgroup("")
    tree.remove_cgroup("/nonexistent")
    assert tree.members(Family(TAG, 0, -1, "/nonexistent"), []) == []


def test_a_family_without_a_tag_is_not_the_whole_machine() -> None:
    """0 is what every process has that was not started by us: an adopted child with it was killed with all the rest."""
    with subprocess.Popen(["sleep", "60"]) as bystander, subprocess.Popen(["sleep", "60"]) as main:
        family = Family(tag=0, pid=main.pid, session=-1, cgroup="", adopted=True)
        assert [process.pid for process in tree.members(family, [])] == [main.pid]
        bystander.kill()
        main.kill()

"""The report of a child that could not be made, and fork itself; the steps before exec are tested in test_keeper.py."""

from __future__ import annotations

import errno
import json
import os
import signal
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.keeper import spawn


@given(st.text(), st.text(max_size=20), st.integers(0, 200))
def test_a_report_is_whole_in_one_read(text: str, step: str, number: int) -> None:
    failure = spawn.failure(step, OSError(number, text * 50))
    report = json.dumps(failure).encode()
    assert len(report) <= spawn.REPORT_MAX
    assert spawn.read_report(report) == failure


@pytest.mark.parametrize(
    ("error", "number", "message"),
    [
        (OSError(errno.ENOENT, "No such file"), errno.ENOENT, "No such file"),
        (OSError("no number"), errno.EINVAL, "no number"),
        (KeyError("argv"), errno.EINVAL, "KeyError: 'argv'"),
        (ValueError("x" * 400), errno.EINVAL, "ValueError: " + "x" * 287 + "…"),
    ],
)
def test_failure(error: Exception, number: int, message: str) -> None:
    assert spawn.failure("exec", error) == {"step": "exec", "errno": number, "message": message}


@given(st.binary() | st.text().map(str.encode) | st.just(b"[" * 4000))
def test_whatever_arrives_is_a_report(text: bytes) -> None:
    report = spawn.read_report(text)
    assert {name: type(value) for name, value in report.items()} == {"step": str, "errno": int, "message": str}


@pytest.mark.parametrize("text", [b"7", b"{}", b'{"step": "exec", "errno": null, "message": ""}', b'{"step": "ex'])
def test_a_report_that_was_cut(text: bytes) -> None:
    report = spawn.read_report(text)
    assert (report["step"], report["errno"]) == ("report", errno.EPROTO)


def forked(code: object) -> tuple[int, bytes]:
    """Exit status and report of a child that raises `code`, or only ends."""

    def run(report: int) -> NoReturn:
        if isinstance(code, BaseException):
            raise code
        os.write(report, b"said")
        os._exit(3)

    pid, report = spawn.fork_child(run)
    _, status = os.waitpid(pid, 0)
    with open(report, "rb") as file:
        return os.waitstatus_to_exitcode(status), file.read()


def test_a_child_never_comes_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert forked(0) == (3, b"said")
    assert forked(RuntimeError("a bug")) == (127, b"")
    assert forked(SystemExit(0)) == (127, b"")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_cgroup_that_does_not_exist_is_no_obstacle() -> None:
    pid, report = spawn.fork_child(lambda report: os._exit(5), "/nonexistent")
    os.close(report)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_close_on_exec() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    spawn.close_on_exec()
    assert not os.get_inheritable(write_end)
    assert all(os.get_inheritable(fd) for fd in (1, 2))
    os.close(read_end)
    os.close(write_end)

"""Fixtures: `daemon` makes real daemons, `as_user` is an ordinary user to run things as."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.harness import PROGRAMS, PROJECT, Installed, RunningDaemon, User

# A job in the background of a shell ignores it, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

started = pytest.StashKey[list[RunningDaemon]]()


class MakeDaemon(Protocol):
    """What the fixture `daemon` is; its arguments are those of RunningDaemon. `start=False`: the test starts it."""

    def __call__(
        self,
        table: str,
        *,
        settings: str = "",
        user: User | None = None,
        environment: Mapping[str, str] | None = None,
        installed: Installed | None = None,
        start: bool = True,
    ) -> RunningDaemon: ...


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[MakeDaemon]:
    """Makes running daemons. After the test each one is ended, and the test fails if anything of it is left."""
    made: list[RunningDaemon] = []
    request.node.stash[started] = made

    def make(
        table: str,
        *,
        settings: str = "",
        user: User | None = None,
        environment: Mapping[str, str] | None = None,
        installed: Installed | None = None,
        start: bool = True,
    ) -> RunningDaemon:
        new = RunningDaemon(table, settings=settings, user=user, environment=environment, installed=installed)
        made.append(new)
        if start:
            new.start()
        return new

    yield make
    wrong = [line for each in reversed(made) for line in each.close()]
    if wrong:
        pytest.fail("\n".join(wrong))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows with a failed test what its daemons said."""
    report = yield
    if report.when == "call" and report.failed:
        for each in item.stash.get(started, []):
            if each.output.exists():
                report.sections.append(("procmand", each.said()))
    return report


@pytest.fixture(scope="session")
def as_user() -> Iterator[User]:
    """An ordinary user: `nobody` for root, else the one who runs the tests. Skips when nobody can run no Python."""
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
    try:
        folder.chmod(0o755)
        _copy_all_of_procman(folder)
        for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
            user = User(account.pw_name, account.pw_uid, account.pw_gid, python, folder)
            if _works(user):
                break
        else:
            pytest.skip(f"no Python >= 3.11 that user {account.pw_name} can run ({sys.executable} is out of reach)")
        yield user
    finally:
        shutil.rmtree(folder)


def _copy_all_of_procman(folder: Path) -> None:
    """Into a folder that everybody can read: the checkout may be below /root. Dependencies go to `site` in it."""
    waste = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(PROJECT / "procman", folder / "procman", ignore=waste)
    shutil.copytree(PROGRAMS, folder / "programs", ignore=waste)
    for name in ("psutil", "waitress", "tomli_w"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        assert spec.origin is not None, f"{name} is no package"
        shutil.copytree(Path(spec.origin).parent, folder / "site" / name, ignore=waste)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def _works(user: User) -> bool:
    code = "import sys, psutil, procman; assert sys.version_info >= (3, 11)"
    try:
        return user.run("python", "-c", code).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False

"""What stands around the code: Makefile, packaging, unit, demo, docs. Each is used here as its users use it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import procman
from tests import architecture
from tests.harness import PROJECT, free_port, wait_until

DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *DOCS]
PYTHONS = ("python3", "python3.13", "python3.12", "python3.11")

TOP_LEVEL = {
    *(".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
    *("docs", "etc", "procman", "tests"),
}
NOT_OURS = {".git", ".venv", ".run", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "build", "dist"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())


def project_files() -> Iterator[Path]:
    """All that belongs to the project, without what tools have made."""
    for name in TOP_LEVEL:
        top = PROJECT / name
        yield from [top] if top.is_file() else (path for path in top.rglob("*") if path.is_file())


# The folder


def test_nothing_else_at_the_top_level() -> None:
    made = {path.name for path in PROJECT.iterdir() if path.name.endswith(".egg-info") or path.name == "__pycache__"}
    assert {path.name for path in PROJECT.iterdir()} - NOT_OURS - made == TOP_LEVEL


def test_no_file_names_the_folder_it_was_written_in() -> None:
    files = [path for path in project_files() if path.suffix != ".pyc"]
    assert not [path for path in files if f"{PROJECT}/".encode() in path.read_bytes()]


# pyproject.toml


def test_scripts_exist() -> None:
    for target in pyproject()["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_each_dependency_has_a_reason() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    project = pyproject()["project"]
    for name in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        assert re.search(rf'^    "{re.escape(name)}", +# \w', text, re.MULTILINE), f"{name} has no comment"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {procman.__version__}" in (PROJECT / "CHANGELOG.md").read_text()


# Makefile


def make(folder: Path, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs make in `folder` with `path` before everything else on PATH, free of a make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = f"{path}:/usr/bin:/bin"
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with only what the Makefile needs to install, and `bin` with Pythons that do not run, as shims may."""
    if not shutil.which("make", path="/usr/bin:/bin"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path / name)
    for name in PYTHONS:
        script(tmp_path / "bin" / name, 'echo "shim: $0: command not found" >&2; exit 127')
    return tmp_path


RECORDING = """
echo "$(basename "$0") $*" >>"{log}"
case "$1 $2" in
  "-m venv") for last in "$@"; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
  "--version "*) echo "Python 3.12.0" ;;
esac
"""


def test_make_says_that_no_python_is_new_enough(checkout: Path) -> None:
    done = make(checkout, "run", path=checkout / "bin")
    assert done.returncode != 0
    assert "procman needs Python 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_takes_a_python_that_runs_and_installs_once(checkout: Path) -> None:
    log = checkout / "log"
    script(checkout / "bin" / "python3.12", RECORDING.format(log=log))
    first = make(checkout, ".venv/installed", path=checkout / "bin")
    assert first.returncode == 0, first.stderr
    assert "Python 3.12.0 makes .venv" in first.stdout
    assert [line.split()[:3] for line in log.read_text().splitlines()][-2:] == [
        ["python3.12", "-m", "venv"],
        ["python", "-m", "pip"],
    ]
    before = log.read_text()
    assert make(checkout, ".venv/installed", path=checkout / "bin").returncode == 0
    assert log.read_text() == before
    (checkout / "pyproject.toml").touch()
    os.utime(checkout / ".venv" / "installed", (1, 1))
    assert make(checkout, ".venv/installed", path=checkout / "bin").returncode == 0
    assert "pip install" in log.read_text().removeprefix(before)


def test_make_says_what_to_do_without_venv(checkout: Path) -> None:
    script(checkout / "bin" / "python3", 'case "$2" in venv) exit 1;; esac')
    done = make(checkout, "test", path=checkout / "bin")
    assert done.returncode != 0
    assert "python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_stop_needs_no_installation(checkout: Path) -> None:
    done = make(checkout, "stop", path=checkout / "bin")
    assert (done.returncode, done.stdout) == (0, "The demo does not run.\n")


# The demo


def demo(action: str, record: Path, port: int, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "etc/demo/demo.py"), action, "--record", str(record), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=40, check=False, **options
    )


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Path]:
    """A folder for the demo to write to. What it started is ended, and the short folder it may have made is removed."""
    folder = tmp_path / "run"
    yield folder
    done = demo("stop", folder, 1)
    note = folder / "folder"
    if note.exists() and Path(note.read_text().strip()) != folder:
        shutil.rmtree(note.read_text().strip())
    assert done.returncode == 0, done.stderr


def test_the_demo_runs_answers_and_stops(record: Path) -> None:
    port = free_port()
    first = demo("run", record, port)
    assert first.returncode == 0, first.stdout + first.stderr
    for line in (r"hello:1 .*RUNNING", r"hello:2 .*RUNNING", r"visitor .*RUNNING", r"Hello from hello:[12] \(pid \d+"):
        assert re.search(line, first.stdout), first.stdout
    second = demo("run", record, free_port())
    assert second.returncode == 0, second.stderr
    assert "already runs" in second.stdout
    assert f"http://127.0.0.1:{port}/" in second.stdout
    pids = [int(pid) for pid in re.findall(r"RUNNING +\S+ +(\d+)", first.stdout)]
    assert len(pids) == 3
    assert demo("stop", record, port).stdout == "The demo has stopped.\n"
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], what="the demo's programs have gone")
    assert demo("stop", record, port).stdout == "The demo does not run.\n"


def test_the_demo_names_a_taken_port(record: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = demo("run", record, port)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: another program uses it. Choose another port: make run PORT={port + 1}" in done.stderr


def test_the_demo_makes_a_short_folder_for_a_deep_project(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / "run"
    deep.parent.mkdir()
    module = _demo_module()
    folder = module.runtime_folder(deep)
    try:
        assert len(str(folder)) <= module.longest_folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert module.runtime_folder(deep) == folder
    finally:
        folder.rmdir()


def test_the_demo_copies_a_table_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's daemon refuses a table that others can write")
    module = _demo_module()
    shutil.copytree(PROJECT / "etc/demo", tmp_path / "demo")
    (tmp_path / "run").mkdir()
    (tmp_path / "demo").chmod(0o777)
    monkeypatch.setattr(module, "here", tmp_path / "demo")
    table = module.table(tmp_path / "run")
    assert table != tmp_path / "demo" / "procman.toml"
    assert table.read_text() == (PROJECT / "etc/demo/procman.toml").read_text()
    assert (table.parent / "hello.py").exists()


def _demo_module() -> Any:
    """etc/demo/demo.py, which is a script in no package."""
    spec = importlib.util.spec_from_file_location("demo", PROJECT / "etc/demo/demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# systemd


def test_the_unit_is_sound(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (PROJECT / "etc/procman.service").read_text()
    unit = tmp_path / "procman.service"  # with a command that exists here, else systemd complains of that
    unit.write_text(text.replace("/opt/procman/bin/procmand", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in done.stderr.splitlines() if "procman.service" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_unit_says() -> None:
    lines = (PROJECT / "etc/procman.service").read_text().splitlines()
    assert {"Type=notify", "NotifyAccess=main", "Delegate=yes", "KillMode=process"} <= set(lines)


# Docs


def test_the_architecture_page_is_drawn_from_the_code() -> None:
    page = architecture.PAGE.read_text()
    assert architecture.drawn(page) == page, "old: run `python -m tests.architecture`"


def test_the_source_map_has_every_module() -> None:
    page = architecture.PAGE.read_text()
    names = [str(path.relative_to(PROJECT / "procman")) for path in (PROJECT / "procman").rglob("*.py")]
    assert not [name for name in names if name != "__init__.py" and f"`{name}`" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_guarantees_name_what_there_is() -> None:
    """The tests that prove them, and the commands of their long forms."""
    page = (PROJECT / "docs/guarantees.md").read_text()
    tests = set(re.findall(r"`(?:[^`]*=)?(tests/[a-z_/]+\.py)", page))
    assert {f"tests/{path.name}" for path in (PROJECT / "tests").glob("test_guarantee*.py")} <= tests
    assert not [name for name in tests if not (PROJECT / name).exists()]
    makefile = (PROJECT / "Makefile").read_text()
    commands = set(re.findall(r"(?:`|    )make ([a-z]+)", page))
    assert {"crash", "soak", "fuzz"} <= commands
    assert not [name for name in commands if f"\n{name}:" not in makefile]


def test_the_first_screen_of_the_readme() -> None:
    screen = (PROJECT / "README.md").read_text().split("\n## ")[0]
    assert len(screen.splitlines()) <= 50
    for part in ("make run", "make test", "$ procmanctl status", "\n    NAME "):
        assert part in screen
    table = re.findall(r"```toml\n(.*?)```", screen, re.DOTALL)
    assert len(table) == 1
    assert len([line for line in table[0].splitlines() if line]) <= 15


def tables() -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in (PROJECT / "README.md", PROJECT / "docs/getting-started.md")
        for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL), 1)
    ]


@pytest.mark.parametrize("text", tables())
def test_tables_in_the_docs_are_accepted(text: str, tmp_path: Path) -> None:
    """With this machine's folders in the place of /srv, and without users and groups that it does not have."""
    for name in set(re.findall(r'virtualenv = "([^"]+)"', text)):
        python = tmp_path / name.lstrip("/") / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.symlink_to(sys.executable)
    text = re.sub(r'(?m)^(user|owner|socket_group) = .*\n', "", text.replace('"/srv/', f'"{tmp_path}/srv/'))
    table = tmp_path / "procman.toml"
    table.write_text(text)
    command = [sys.executable, "-m", "procman.daemon", "--check", "-c", str(table)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The programs that other tests stand on


def test_the_double_forker_leaves_a_grandchild() -> None:
    """Else every test of "no descendant is left" would pass for nothing."""
    command = [sys.executable, str(PROJECT / "tests/programs/double_fork.py"), "--clean", "--leave"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = sorted((child.stdout.readline(), child.stdout.readline()))
        grandchild = int(lines[0].removeprefix("grandchild "))
        assert child.wait(10) == 0
        try:
            assert os.getsid(grandchild) != os.getsid(0)
            assert not Path(f"/proc/{grandchild}/environ").read_bytes()
        finally:
            os.kill(grandchild, signal.SIGKILL)

"""procman really installed: versions of it as wheels, and a virtual environment in which they replace each other.

What procman needs (psutil, waitress) comes from the interpreter that runs the tests, by a .pth file; so does
setuptools, which builds the wheels. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from tests.harness import PROJECT

PACKAGED = ("procman", "pyproject.toml", "README.md", "LICENSE")


def build(folder: Path, version: str) -> Path:
    """A wheel of this checkout as `version`."""
    source = folder / f"source-{version}"
    source.mkdir(parents=True)
    for name in PACKAGED:
        path = PROJECT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source)
    first = source / "procman" / "__init__.py"
    lines = [line for line in first.read_text().splitlines() if not line.startswith("__version__")]
    first.write_text("\n".join([*lines, f'__version__ = "{version}"', ""]))
    wheels = folder / "wheels"
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source))
    return next(wheels.glob(f"procman-{version}-*.whl"))


def broken(wheel: Path, folder: Path, name: str, old: str, new: str) -> Path:
    """That wheel with `old` replaced by `new` in the file procman/NAME."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(folder / wheel.name, "w") as target:
        for entry in source.namelist():
            text = source.read(entry)
            if entry == f"procman/{name}":
                assert old.encode() in text, (name, old)
                text = text.replace(old.encode(), new.encode(), 1)
            target.writestr(entry, text)
    return folder / wheel.name


class Installed:
    """A virtual environment in `folder` that procman is installed in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
        self.python = str(folder / "bin" / "python")
        outer = sysconfig.get_paths()["purelib"]
        inner = next(folder.glob("lib/python*/site-packages"))
        (inner / "outer.pth").write_text(f"{outer}\n")
        self.install(wheel)

    def install(self, wheel: Path) -> None:
        """What `pip install --upgrade` does, to any version, also a lower one."""
        options = ("--quiet", "--no-deps", "--no-index", "--force-reinstall", "--no-compile")
        _pip("--python", self.python, "install", *options, str(wheel))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])

"""etc/procman.service under a real systemd, in a box of its own: notify, reload, watchdog, stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import CTL, PROGRAMS, PROJECT, wait_until

BOX = PROGRAMS / "systemd_box.sh"
UNIT = PROJECT / "etc" / "procman.service"


def _missing() -> str:
    """What a box needs and this machine lacks, in words; "" when it can be had."""
    if os.geteuid() != 0:
        return "a systemd of one's own needs root"
    absent = [name for name in ("unshare", "nsenter", "setsid") if shutil.which(name) is None]
    if not Path("/usr/lib/systemd/systemd").exists():
        absent.append("systemd")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if not any(mount[2] == "cgroup2" and os.access(mount[1], os.W_OK) for mount in mounts):
        absent.append("a cgroup v2 mount")
    return f"not here: {', '.join(absent)}" if absent else ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "it is all here")


class Box:
    """A booted systemd with procman's unit, its paths replaced by those of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shown = dict.fromkeys(str(Path(path).resolve()) for path in (PROJECT, sys.prefix))
        state = self._box("up", *shown, timeout=40).stdout.strip()
        assert state in ("running", "degraded"), (folder / "log").read_text()

    def _box(self, verb: str, *arguments: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        command = [str(BOX), verb, str(self.folder), *arguments]
        return subprocess.run(command, text=True, capture_output=True, timeout=timeout, check=False)

    def run(self, *command: str) -> str:
        """What a command prints inside; a failure is an error."""
        done = self._box("in", *command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def write(self, path: str, text: str) -> None:
        command = [str(BOX), "in", str(self.folder), "sh", "-c", f"mkdir -p {Path(path).parent} && cat > {path}"]
        subprocess.run(command, input=text, text=True, check=True, timeout=30)

    def ctl(self, *arguments: str) -> Any:
        """`procmanctl --json ...` inside."""
        environment = ["env", f"PYTHONPATH={PROJECT}"]
        return json.loads(self.run(*environment, sys.executable, "-c", CTL, "--json", *arguments))

    def pid(self, name: str) -> int | None:
        found: int | None = next(info["pid"] for info in self.ctl("status") if info["name"] == name)
        return found

    def show(self, key: str) -> str:
        return self.run("systemctl", "show", "-P", key, "procman").strip()

    def down(self) -> None:
        self._box("down", timeout=60)


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
    box = Box(folder)
    try:
        unit = UNIT.read_text().replace("/opt/procman/bin/procmand", f"{sys.executable} -m procman.daemon")
        unit = unit.replace("WatchdogSec=30", f"WatchdogSec=2\nEnvironment=PYTHONPATH={PROJECT}")
        box.write("/run/systemd/system/procman.service", unit)
        box.write("/etc/procman.toml", f'[program.one]\ncommand = "{sys.executable} -S -E {PROGRAMS}/ready.py"\n')
        box.run("systemctl", "daemon-reload")
        box.run("systemctl", "start", "procman")  # Type=notify: it returns when READY=1 has come
        yield box
    finally:
        box.down()
        shutil.rmtree(folder, ignore_errors=True)


def test_ready_means_that_the_table_runs(box: Box) -> None:
    assert box.show("ActiveState") == "active"
    assert box.show("StatusText") == "1 processes"
    wait_until(lambda: box.pid("one"), what="the program has a child")


def test_each_child_has_a_cgroup_below_the_service(box: Box) -> None:
    assert str(box.ctl("daemon", "status")["cgroup"]).startswith("/sys/fs/cgroup/system.slice/procman.service/")
    pid = wait_until(lambda: box.pid("one"))
    assert "/system.slice/procman.service/procman-" in box.run("cat", f"/proc/{pid}/cgroup")


def test_reload_rereads_the_table(box: Box) -> None:
    before = wait_until(lambda: box.pid("one"))
    with_two = "".join(
        f'[program.{name}]\ncommand = "{sys.executable} -S -E {PROGRAMS}/ready.py"\n' for name in ("one", "two")
    )
    box.write("/etc/procman.toml", with_two)
    box.run("systemctl", "reload", "procman")
    wait_until(lambda: any(info["name"] == "two" for info in box.ctl("status")))
    assert box.pid("one") == before


def test_the_watchdog_is_fed_while_the_supervisor_is_replaced(box: Box) -> None:
    before, pid = box.ctl("daemon", "status"), box.pid("one")
    box.run("kill", "-9", str(before["supervisor_pid"]))
    wait_until(lambda: box.ctl("daemon", "status")["supervisor_starts"] > before["supervisor_starts"])
    stamp = int(box.show("WatchdogTimestampMonotonic"))
    wait_until(lambda: int(box.show("WatchdogTimestampMonotonic")) > stamp, what="WATCHDOG=1 comes")
    assert box.show("NRestarts") == "0"
    assert box.pid("one") == pid


def test_stop_leaves_nothing(box: Box) -> None:
    cgroup = box.show("ControlGroup")
    pid = box.pid("one")
    box.run("systemctl", "stop", "procman")
    assert box.show("Result") == "success"
    assert box.run("sh", "-c", f"cat /proc/{pid}/stat 2>/dev/null || echo gone").strip() == "gone"
    assert box.run("sh", "-c", f"ls -d /sys/fs/cgroup{cgroup} /run/procman 2>/dev/null; true").strip() == ""
    journal = box.run("journalctl", "-u", "procman", "-o", "cat", "--no-pager")
    assert "procmand ends with status 0" in journal

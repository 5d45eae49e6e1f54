"""procman.disks: which disk a path is on, as the list of mounts tells."""

from __future__ import annotations

import os

import pytest

from procman import disks

MOUNTS = b"""\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw - proc proc rw
30 21 8:2 / /srv rw - ext4 /dev/sda2 rw
31 30 8:3 / /srv/my\\040sites rw - ext4 /dev/sda3 rw
32 30 8:4 / /srv/logs rw - ext4 /dev/sda4 rw
33 32 0:40 / /srv/logs rw - nfs4 host:/logs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "disk"),
    [
        ("/etc/x", "8:1"),
        ("/", "8:1"),
        ("/srv", "8:2"),
        ("/srv/a.log", "8:2"),
        ("/srvx/a.log", "8:1"),
        ("/srv/my sites/a.log", "8:3"),
        ("/srv/logs/a.log", "0:40"),  # mounted over another one
        ("/srv/logs2/a.log", "8:2"),
    ],
)
def test_the_nearest_mount_counts(path: str, disk: str) -> None:
    assert disks.disk_of(path, disks.parse(MOUNTS)) == disk


def test_no_mounts_known() -> None:
    assert disks.disk_of("/x", []) == ""


def test_this_machine() -> None:
    device = os.stat("/proc").st_dev
    assert disks.of("/proc/self") == f"{os.major(device)}:{os.minor(device)}"
    assert disks.of("/proc/self") != disks.of("/")

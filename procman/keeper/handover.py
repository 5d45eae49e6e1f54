"""What the keeper hands to its next self, which is new code in the same process: its table, by exec(2), in a memfd.

The children stay children, for the process is the same. The descriptors stay open under their numbers. All else that
the keeper knows is a JSON document in a file without a name (memfd_create(2)), whose number is the last argument.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from procman.errors import ProcmanError

VERSION = 1
"""Of the document. Raise it when older code would misunderstand; a new keeper may read older ones."""

Document = dict[str, Any]


class HandoverError(ProcmanError):
    """This code can't go on where that keeper stood."""

    code = "handover"


def write(document: Document) -> int:
    """The descriptor of a memfd that holds `document`."""
    fd = os.memfd_create("procman-keeper", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps({**document, "version": VERSION}).encode())
    return fd


def read(fd: int) -> Document:
    """What `write` wrote. Raises HandoverError for what this code does not understand."""
    try:
        size = os.fstat(fd).st_size
        document = json.loads(os.pread(fd, size, 0))
    except (OSError, ValueError, RecursionError) as error:
        raise HandoverError(f"the keeper's table can't be read: {error}") from error
    if not isinstance(document, dict) or document.get("version") != VERSION:
        found = document.get("version") if isinstance(document, dict) else None
        raise HandoverError(
            f"the running keeper writes its table in version {found!r}, this code reads {VERSION}",
            hint="install a version that both understand first, or restart the daemon",
        )
    try:
        _check(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HandoverError(f"the keeper's table makes no sense: {type(error).__name__}: {error}") from error
    return document


def _check(document: Document) -> None:
    """Raises one of Python's own errors unless every part that `Keeper` goes on with has its type."""
    children = document["children"]
    numbers = [*document["held"].values(), *document["signals"], *document["open_files"]]
    numbers += [document["starts"], document["upgrades"], children["house"], children["number"]]
    texts = [document["cgroup"], document["name"], *document["held"]]
    if document["supervisor"] is not None:  # None: the check of an upgrade reads it while a supervisor comes up
        numbers += [document["supervisor"]["pid"], document["supervisor"]["wire"]]
    for child in children["children"]:
        numbers += [child["pid"], child["report"], child["session"], child["start"], child["tag"]]
        texts += [child["id"], child["state"], child["note"], child["cgroup"]]
    if len(document["open_files"]) != 2:
        raise ValueError("open_files")
    if not all(type(number) is int and -1 <= number < 1 << 63 for number in numbers):
        raise ValueError("a number is none")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")


def become(command: Sequence[str], document: Document, inherited: Sequence[int], environment: dict[str, str]) -> str:
    """exec `command` with the number of the document's memfd as one more argument, and with `inherited` open. Returns
    only when that has failed: why, and all is as before."""
    try:
        descriptors = [write(document), *inherited]
    except OSError as error:
        return f"no room for the keeper's table: {error.strerror}"
    try:
        for fd in descriptors:
            os.set_inheritable(fd, True)
        os.execve(command[0], [*command, str(descriptors[0])], environment)
    except OSError as error:
        for fd in inherited:
            os.set_inheritable(fd, False)
        os.close(descriptors[0])
        return f"exec of {command[0]}: {error.strerror}"

"""The program table that `procmanctl init` writes: small, commented, and accepted by `procmanctl check` as it is."""

from __future__ import annotations

import os

from procman.errors import Failed

NAME = "procman.toml"

_HEAD = """\
# The program table of procman: what runs here, and how. docs/configuration.md explains every key.
#   procmanctl check {name}      says what is wrong with it
#   procmand -c {name}           starts the daemon on it

# One table for each program. This one only shows that procman works: put your own command in its place.
"""
_SERVER = """\

# A web server. procman holds its socket: a connection that comes while it restarts waits, and does not fail.
# Take away the "# " before the lines below, and name your application.
"""


def write(folder: str) -> str:
    """Writes the starter table into `folder`, which is made if it is missing, and returns its path.

    Raises Failed when there is such a file already: it is never overwritten.
    """
    path = os.path.join(folder, NAME)
    text = contents()
    try:
        os.makedirs(folder, exist_ok=True)
        # 0o644: as root, procmand takes no table that others can write, whatever the umask is
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError as error:
        if error.filename == folder:
            raise Failed(f"{folder} is a file, not a folder") from None
        raise Failed(f"{path} exists already", hint="name another folder: procmanctl init DIR") from None
    except OSError as error:
        raise Failed(f"can't write {path}: {error.strerror}") from None
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def contents() -> str:
    """The text of the starter table."""
    import tomli_w  # only here: every other command starts faster without it

    worker = {"command": ["sh", "-c", "while :; do date; sleep 10; done"]}
    server = {"server": "wsgi", "app": "shop:app", "listen": "127.0.0.1:8000", "workers": 2, "threads": 4}
    example = tomli_w.dumps({"program": {"shop": server}})
    commented = "".join(f"# {line}\n" for line in example.splitlines() if line)
    return _HEAD.format(name=NAME) + tomli_w.dumps({"program": {"worker": worker}}) + _SERVER + commented

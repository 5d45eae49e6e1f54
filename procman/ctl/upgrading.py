"""`procmanctl daemon upgrade`: has the daemon become the version that is installed now, and tells what came of it.

The supervisor that is asked does not survive it. So the connection that closes is the sign that its successor runs, and
that one knows the end.
"""

from __future__ import annotations

import time

from procman.client import Closed
from procman.errors import Failed
from procman.rpc import Object

from .session import LOOK_SECONDS, Session

PAUSE = 0.05  # seconds between two looks while the keeper takes the last step


def upgrade(session: Session) -> Object:
    """What runs afterwards: `from` and `to`, the versions of the keeper before and after, and the daemon's status.

    Raises Failed when all is as it was before, with the reason.
    """
    with session.client() as client:
        before = client.call("daemon.status")
    try:
        with session.client(None) as client:  # the daemon bounds each step itself
            client.call("daemon.upgrade")
    except Closed:
        pass
    end = time.monotonic() + LOOK_SECONDS
    while (after := _status(session))["upgrading"] and time.monotonic() < end:
        time.sleep(PAUSE)
    if after["upgrades"] == before["upgrades"]:
        part = "" if after["version"] == before["version"] else f"; the supervisor is {after['version']} already"
        raise Failed(
            f"the daemon was not upgraded: {after['upgrade_problem'] or 'it was interrupted'}{part}",
            hint="programs are as they were; mend what it says, and try again",
        )
    return {"from": before["keeper_version"], "to": after["keeper_version"], "daemon": after}


def _status(session: Session) -> Object:
    with session.client() as client:
        answer: Object = client.call("daemon.status")
    return answer

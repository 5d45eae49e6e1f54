"""How soon a daemon answers, so that a busy machine breaks no test: p99 of many calls, the best of some windows."""

from __future__ import annotations

import time
from typing import Any

from tests.harness import RunningDaemon

CALLS, WINDOWS = 300, 3

PACE = 0.005
"""Seconds between two calls, as long as the daemon keeps up."""


def p99(running: RunningDaemon, method: str = "status", **params: Any) -> float:
    """Seconds that such a call takes at most, but for the slowest of a hundred.

    A call that takes long stands for all that somebody else would have made meanwhile: else a daemon that stalls for a
    second would have one slow answer.
    """
    found = []
    with running.client(60) as client:
        for _ in range(CALLS):
            began = time.perf_counter()
            client.call(method, **params)
            took = time.perf_counter() - began
            found.append(took)
            found += [took - number * PACE for number in range(1, int(took / PACE) + 1)]
            time.sleep(max(0.0, PACE - took))
    return sorted(found)[len(found) * 99 // 100 - 1]


def p99_below(running: RunningDaemon, bound: float, method: str = "status", **params: Any) -> float:
    """As `p99`, which must be below `bound` in one of some windows: the machine may stall now and then, a daemon that
    waits for something that lasts stalls in each of them."""
    found: list[float] = []
    while len(found) < WINDOWS:
        found.append(p99(running, method, **params))
        if found[-1] < bound:
            return found[-1]
    shown = ", ".join(f"{each * 1000:.1f}" for each in found)
    raise AssertionError(f"p99 of {method}: {shown} ms, never below {bound * 1000:.0f}")

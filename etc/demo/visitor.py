"""The demo's worker: visits the site every few seconds and prints what it saw."""

from __future__ import annotations

import os
import time
import urllib.request

every = 5.0  # seconds
address = f"http://127.0.0.1:{os.environ['PROCMAN_DEMO_PORT']}/"
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the user's environment


def visit() -> str:
    """One line about one visit."""
    start = time.monotonic()
    try:
        with direct.open(address, timeout=every) as answer:
            text = answer.read().decode().strip()
    except OSError as error:
        return f"no answer: {error}"
    return f"{text} It took {1000 * (time.monotonic() - start):.1f} ms."


if __name__ == "__main__":
    while True:
        print(visit(), flush=True)
        time.sleep(every)

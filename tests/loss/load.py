"""A load in a process of its own, so that nothing that a test does disturbs it.

    with load("127.0.0.1:8000", modes=("get", "up/close"), connections=8) as running:
        running.wait(answers=100)          # of all connections, from now on
        ...
        running.wait_for_version("2")
    running.result.total.failed            # {"reset": 2, ...}; {} when every request was answered rightly

The arguments are those of `client.Plan`. The load ends with the block: no new requests, and those under way get their
answers. `result` is there after it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from tests.harness import PROJECT, wait_until
from tests.loss.client import Plan, Visit
from tests.loss.tally import Result

WAIT_SECONDS = 40.0


class Running:
    """A load that goes on. `progress` is what it has told last: `asked`, `answers`, `failed`, `generations`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.result = Result()
        self.progress: dict[str, Any] = {"asked": 0, "answers": 0, "failed": 0, "generations": []}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.loss.load", json.dumps(asdict(plan))],
            cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "modes" in told:
                self.result = Result.of(told)
            else:
                self.progress = told

    def wait(self, answers: int, timeout: float = WAIT_SECONDS) -> None:
        """Waits for so many more right answers."""
        before = self.progress["answers"]
        self._wait_for(lambda: self.progress["answers"] >= before + answers, f"{answers} answers", timeout)

    def wait_for_asked(self, asked: int, timeout: float = WAIT_SECONDS) -> None:
        """Waits until so many requests were asked since the load began."""
        self._wait_for(lambda: self.progress["asked"] >= asked, f"{asked} requests", timeout)

    def wait_for_version(self, version: str, timeout: float = WAIT_SECONDS) -> None:
        """Waits until this version has answered."""
        self._wait_for(
            lambda: any(who.partition(" ")[2] == version for who in self.progress["generations"]),
            f"version {version} answers",
            timeout,
        )

    def wait_for_pid(self, pid: int, timeout: float = WAIT_SECONDS) -> None:
        """Waits until this process has answered."""
        self._wait_for(
            lambda: any(who.partition(" ")[0] == str(pid) for who in self.progress["generations"]),
            f"process {pid} answers",
            timeout,
        )

    def wait_for_end(self) -> None:
        """Waits until the plan is over: its `requests`, or its `limit`."""
        self._wait_for(lambda: self._process.poll() is not None, "the load ends", self.plan.limit + WAIT_SECONDS)

    def _wait_for(self, reached: Callable[[], bool], what: str, timeout: float) -> None:
        wait_until(lambda: reached() or self._gone(), timeout, what)
        if not reached():
            raise RuntimeError(f"the load ended before: {what}; {self.progress}")

    def _gone(self) -> bool:
        return self._process.poll() is not None and not self._reader.is_alive()

    def end(self, kill: bool = False) -> None:
        """Ends it. Raises RuntimeError when it has no result."""
        assert self._process.stdin is not None
        try:
            if kill:
                self._process.kill()
            self._process.stdin.close()
            status = self._process.wait(self.plan.patience * 2 + WAIT_SECONDS)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()
        if not kill and (status or not self.result.modes):
            raise RuntimeError(f"the load ended with {status}, and no result")


@contextmanager
def load(address: str, **plan: Any) -> Iterator[Running]:
    """See the module."""
    running = Running(Plan(address, **plan))
    try:
        yield running
    except BaseException:
        running.end(kill=True)
        raise
    running.end()


def run(plan: Plan) -> Result:
    """A load in this process, until the plan is over."""
    return asyncio.run(Visit(plan).run())


async def _run(plan: Plan, stdin: IO[str], stdout: IO[str]) -> None:
    visit = Visit(plan)
    loop = asyncio.get_running_loop()

    def wait_for_end() -> None:
        stdin.read()
        loop.call_soon_threadsafe(visit.stop)

    threading.Thread(target=wait_for_end, daemon=True).start()
    told = (0, 0, 0)

    def report(visit: Visit) -> None:
        nonlocal told
        now = (visit.asked, visit.answers, visit.failed)
        if now != told:
            told = now
            asked, answers, failed = now
            say({"asked": asked, "answers": answers, "failed": failed, "generations": list(visit.generations)})

    def say(document: dict[str, Any]) -> None:
        stdout.write(f"{json.dumps(document)}\n")
        stdout.flush()

    say((await visit.run(report)).document())


def main() -> int:
    """`python -m tests.loss.load PLAN`: until its stdin ends; lines of JSON on stdout, the result as the last one."""
    told = json.loads(sys.argv[1])
    asyncio.run(_run(Plan(**{**told, "modes": tuple(told["modes"])}), sys.stdin, sys.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A load in a process of its own, so that nothing that a test does disturbs it.

    with load("127.0.0.1:8000", modes=("get", "up/close"), connections=8) as running:
        running.wait(answers=100)          # of all connections, from now on
        ...
        running.wait_for_version("2")
    running.result.total.failed            # {"reset": 2, ...}; {} when every request was answered rightly

The arguments are those of `client.Plan`. The load ends with the block: no new requests, and those under way get their
answers. `result` is there after it. `loads` is for several of them, which share one process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from tests.harness import PROJECT, wait_until
from tests.loss.client import Plan, Visit
from tests.loss.tally import Result

WAIT_SECONDS = 40.0


class Client:
    """The process, and what it has told of each of its loads."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        self.results = [Result() for _ in plans]
        self.progress: list[dict[str, Any]] = [
            {"asked": 0, "answers": 0, "failed": 0, "generations": []} for _ in plans
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.loss.load", json.dumps([asdict(plan) for plan in plans])],
            cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, told = json.loads(line)
            if "modes" in told:
                self.results[number] = Result.of(told)
            else:
                self.progress[number] = told

    def ended(self) -> bool:
        """Whether it has gone by itself."""
        return self._process.poll() is not None

    def gone(self) -> bool:
        """Whether nothing more will be told."""
        return self.ended() and not self._reader.is_alive()

    def end(self, kill: bool = False) -> None:
        """Ends it. Raises RuntimeError when a load has no result."""
        assert self._process.stdin is not None
        try:
            if kill:
                self._process.kill()
            self._process.stdin.close()
            status = self._process.wait(max(plan.patience for plan in self.plans) * 2 + WAIT_SECONDS)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._reader.join()
            assert self._process.stdout is not None
            self._process.stdout.close()
        if not kill and (status or not all(result.modes for result in self.results)):
            raise RuntimeError(f"the load ended with {status}, and no result")


class Running:
    """A load that goes on. `progress` is what it has told last: `asked`, `answers`, `failed`, `generations`."""

    def __init__(self, client: Client, number: int) -> None:
        self.plan = client.plans[number]
        self._client, self._number = client, number

    @property
    def progress(self) -> dict[str, Any]:
        return self._client.progress[self._number]

    @property
    def result(self) -> Result:
        return self._client.results[self._number]

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
        self._wait_for(self._client.ended, "the load ends", self.plan.limit + WAIT_SECONDS)

    def _wait_for(self, reached: Callable[[], bool], what: str, timeout: float) -> None:
        wait_until(lambda: reached() or self._client.gone(), timeout, what)
        if not reached():
            raise RuntimeError(f"the load ended before: {what}; {self.progress}")


@contextmanager
def loads(plans: Sequence[Plan]) -> Iterator[list[Running]]:
    """See the module."""
    client = Client(plans)
    try:
        yield [Running(client, number) for number in range(len(plans))]
    except BaseException:
        client.end(kill=True)
        raise
    client.end()


@contextmanager
def load(address: str, **plan: Any) -> Iterator[Running]:
    """See the module."""
    with loads([Plan(address, **plan)]) as running:
        yield running[0]


def run(plan: Plan) -> Result:
    """A load in this process, until the plan is over."""
    return asyncio.run(Visit(plan).run())


async def _run(plans: Sequence[Plan], stdin: IO[str], stdout: IO[str]) -> None:
    visits = [Visit(plan) for plan in plans]
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for visit in visits:
            visit.stop()

    def wait_for_end() -> None:
        stdin.read()
        loop.call_soon_threadsafe(stop)

    threading.Thread(target=wait_for_end, daemon=True).start()

    def say(number: int, document: dict[str, Any]) -> None:
        stdout.write(f"{json.dumps((number, document))}\n")
        stdout.flush()

    async def one(number: int, visit: Visit) -> None:
        told: dict[str, Any] = {}

        def report(visit: Visit) -> None:
            nonlocal told
            now = {"asked": visit.asked, "answers": visit.answers, "failed": visit.failed}
            if now != told:
                told = now
                say(number, {**now, "generations": list(visit.generations)})

        say(number, (await visit.run(report)).document())

    await asyncio.gather(*(one(number, visit) for number, visit in enumerate(visits)))


def main() -> int:
    """`python -m tests.loss.load PLANS`: until its stdin ends; lines of JSON on stdout, the results last."""
    plans = [Plan(**{**told, "modes": tuple(told["modes"])}) for told in json.loads(sys.argv[1])]
    asyncio.run(_run(plans, sys.stdin, sys.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""CPU and memory of the processes, taken now and then and kept for an hour."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from procman.config import Sampling
from procman.resources import Ring, Sample, Sampler

log = logging.getLogger("procman")


class Measures:
    """Samples every `interval` seconds what `mains` returns: process names and their main pids."""

    def __init__(self, sampling: Sampling, mains: Callable[[], Mapping[str, int]]) -> None:
        self._mains = mains
        self._failed = False
        self._timer: asyncio.TimerHandle | None = None
        self._latest: dict[str, Sample] = {}
        self._rings: dict[str, Ring] = {}
        self.change(sampling)

    def change(self, sampling: Sampling) -> None:
        """Other settings from now on; an interval of 0 stops sampling."""
        self.sampling = sampling
        self._sampler = Sampler(sampling.memory)
        self._rings.clear()
        self._latest.clear()
        self.stop()
        if sampling.interval > 0:
            self._timer = asyncio.get_running_loop().call_later(min(1.0, sampling.interval), self._take)

    def stop(self) -> None:
        """No more samples."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def latest(self, name: str) -> Sample | None:
        """The last sample of a process, None while there is none of its present child."""
        return self._latest.get(name)

    def history(self, name: str) -> list[tuple[float, float, int]]:
        """(seconds since the epoch, CPU percent, memory in bytes) of the last hour, oldest first."""
        ring = self._rings.get(name)
        return [] if ring is None else [(at, sample.cpu_percent, sample.memory_bytes) for at, sample in ring.items()]

    def forget(self, name: str, *, history: bool = False) -> None:
        """The child that was measured has gone; with `history` the process too."""
        self._latest.pop(name, None)
        if history:
            self._rings.pop(name, None)

    def _take(self) -> None:
        interval = self.sampling.interval
        self._timer = asyncio.get_running_loop().call_later(interval, self._take)
        mains = self._mains()
        if not mains:
            return
        try:
            self._latest = self._sampler.sample(mains)
        except OSError as error:
            if not self._failed:  # no descriptor free, say: once, not at each interval
                log.error("CPU and memory are not measured now: %s", error.strerror)
            self._failed = True
            return
        self._failed = False
        now = time.time()
        for name, sample in self._latest.items():
            self._rings.setdefault(name, Ring(interval)).add(now, sample)

"""What an application server says of its workers: from its answer to figures. Pure.

A server runs the user's code and is not trusted. What is not of the expected kind is no figure (None), and a worker
without a pid is none; no text of an answer is passed on. What each server tells comes from gunicorn's
`ctl/handlers.py` (27.0.1), uWSGI's `core/stats.c` (2.0.30) and `wsgi.Service.figures`; tests/test_workers.py runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from procman.records import dataclass

WORKERS_MAX = 256
"""Workers of one process that are told; more are counted only."""

COUNT_MAX = 1 << 53
NUMBER_MAX = 1e15
PID_MAX = 1 << 22


class Unreadable(ValueError):
    """The answer is none. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker; None is what its server does not tell.

    `requests` it has answered, `in_flight` it works on now, `queue` wait for one of its `threads`. `average_seconds` is
    what a request takes, as the server reckons it. `heartbeat_seconds` have passed since its last sign of life.
    """

    pid: int
    busy: bool | None = None
    requests: int | None = None
    in_flight: int | None = None
    queue: int | None = None
    threads: int | None = None
    average_seconds: float | None = None
    heartbeat_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The workers of one process, in the server's order; `left_out` are those beyond WORKERS_MAX. `serial`: each has
    a connection for as long as it works on its request, and no other."""

    workers: tuple[Worker, ...]
    left_out: int = 0
    serial: bool = False


def read(server: str, answer: bytes) -> Workload:
    """The workers that `answer` tells of. Raises Unreadable."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        raise Unreadable("its answer is no JSON") from None
    found: dict[int, Worker] = {}
    for worker in _READERS[server](document):
        found.setdefault(worker.pid, worker)
    workers = tuple(found.values())
    return Workload(workers[:WORKERS_MAX], len(workers[WORKERS_MAX:]), server == "gunicorn" and _is_serial(document))


def busy(load: Workload, worker: Worker, connections: int | None) -> bool | None:
    """Whether a worker works on a request, from the number of connections that it has accepted, where its server does
    not say it: without any it does not. What keeps connections open between two requests may be idle with some."""
    if worker.busy is not None or connections is None:
        return worker.busy
    return False if not connections else True if load.serial else None


def _is_serial(document: object) -> bool:
    """`show config` after `show workers`: {"data": {"worker_class": "<class 'gunicorn.workers.sync.SyncWorker'>"}}."""
    config = _member(document[1], "data") if isinstance(document, list) and len(document) > 1 else None
    return _member(config, "worker_class") == "<class 'gunicorn.workers.sync.SyncWorker'>"


def _gunicorn(document: object) -> Iterator[Worker]:
    """`show workers`: {"status": "ok", "data": {"workers": [{"pid", "last_heartbeat", ...}]}}. No more than that."""
    shown = document[0] if isinstance(document, list) and document else None
    for pid, worker in _workers(_member(shown, "data")):
        yield Worker(pid=pid, heartbeat_seconds=_number(worker.get("last_heartbeat")))


def _uwsgi(document: object) -> Iterator[Worker]:
    """Its stats: {"workers": [{"pid", "status", "requests", "avg_rt" (microseconds), "cores": [{"in_request"}]}]}. A
    worker that is not running now ("cheap") has pid 0."""
    for pid, worker in _workers(document):
        listed = worker.get("cores")
        cores = listed if isinstance(listed, list) else []
        average = _number(worker.get("avg_rt"))
        yield Worker(
            pid=pid,
            busy={"busy": True, "idle": False}.get(str(worker.get("status"))),
            requests=_count(worker.get("requests")),
            in_flight=sum(_member(core, "in_request") == 1 for core in cores) if cores else None,
            threads=len(cores) or None,
            average_seconds=None if average is None else average / 1e6,
        )


def _wsgi(document: object) -> Iterator[Worker]:
    """The built-in server: an object of one worker."""
    for pid, worker in _workers({"workers": [document]}):
        in_flight = _count(worker.get("in_flight"))
        yield Worker(
            pid=pid,
            busy=None if in_flight is None else in_flight > 0,
            requests=_count(worker.get("requests")),
            in_flight=in_flight,
            queue=_count(worker.get("queue")),
            threads=_count(worker.get("threads")),
            average_seconds=_number(worker.get("average_seconds")),
        )


_READERS: dict[str, Callable[[object], Iterator[Worker]]] = {"gunicorn": _gunicorn, "uwsgi": _uwsgi, "wsgi": _wsgi}


def _workers(document: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """(pid, worker) of each object in the list "workers" that has a pid. Raises Unreadable."""
    workers = _member(document, "workers")
    if not isinstance(workers, list):
        raise Unreadable("its answer tells of no workers")
    for worker in workers:
        pid = _count(_member(worker, "pid"))
        if pid is not None and 0 < pid <= PID_MAX:
            yield pid, worker


def _member(document: object, key: str) -> object:
    return document.get(key) if isinstance(document, dict) else None


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < COUNT_MAX else None  # type: ignore[operator, return-value]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= NUMBER_MAX else None  # neither of which NaN is

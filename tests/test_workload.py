"""workload.py: what servers say of their workers, as a table; hostile answers are no figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import servers, workload
from procman.workload import Unreadable, Worker, Workload

IDLE_CORE: dict[str, Any] = {"id": 0, "requests": 3, "in_request": 0, "vars": []}
BUSY_CORE = IDLE_CORE | {"in_request": 1, "vars": ["HTTP_COOKIE=secret"]}
UWSGI: dict[str, Any] = {
    "pid": 11,
    "status": "busy",
    "requests": 7,
    "avg_rt": 1500,
    "rss": 0,
    "cores": [IDLE_CORE, BUSY_CORE],
}
WSGI: dict[str, Any] = {
    "pid": 12,
    "threads": 4,
    "requests": 9,
    "average_seconds": 0.25,
    "in_flight": 1,
    "queue": 2,
    "connections": 3,
}
GUNICORN: dict[str, Any] = {"pid": 13, "age": 1, "booted": False, "aborted": False, "last_heartbeat": 0.5}


SYNC = "<class 'gunicorn.workers.sync.SyncWorker'>"
GTHREAD = "<class 'gunicorn.workers.gthread.ThreadWorker'>"


def gunicorn(*workers: object, kind: object = GTHREAD) -> object:
    shown = {"id": 1, "status": "ok", "data": {"workers": workers, "count": len(workers)}}
    return [shown, {"id": 2, "status": "ok", "data": {"worker_class": kind}}]


def uwsgi(*workers: object) -> object:
    return {"version": "2.0.30", "listen_queue": 0, "workers": workers}


TOLD: list[tuple[str, object, list[Worker]]] = [
    ("gunicorn", gunicorn(), []),
    ("gunicorn", gunicorn(GUNICORN), [Worker(pid=13, heartbeat_seconds=0.5)]),
    ("gunicorn", gunicorn(GUNICORN | {"last_heartbeat": -4711.5}), [Worker(pid=13)]),  # it has not booted
    ("uwsgi", uwsgi(), []),
    (
        "uwsgi",
        uwsgi(UWSGI, UWSGI | {"pid": 14, "status": "idle", "cores": [IDLE_CORE]}),
        [
            Worker(pid=11, busy=True, requests=7, in_flight=1, threads=2, average_seconds=0.0015),
            Worker(pid=14, busy=False, requests=7, in_flight=0, threads=1, average_seconds=0.0015),
        ],
    ),
    ("uwsgi", uwsgi({"pid": 0, "status": "cheap"}), []),
    ("uwsgi", uwsgi({"pid": 15, "status": "pause"}), [Worker(pid=15)]),
    (
        "wsgi",
        WSGI,
        [Worker(pid=12, busy=True, requests=9, in_flight=1, queue=2, threads=4, average_seconds=0.25)],
    ),
    (
        "wsgi",
        WSGI | {"in_flight": 0, "average_seconds": None},
        [Worker(pid=12, busy=False, requests=9, in_flight=0, queue=2, threads=4)],
    ),
]

BUSY: list[tuple[bool | None, bool, int | None, bool | None]] = [
    # what its server says, whether a connection is a request, its connections, what it does
    (None, True, None, None),
    (None, True, 0, False),
    (None, True, 1, True),
    (None, False, 0, False),
    (None, False, 1, None),
    (False, True, 1, False),
    (True, True, 0, True),
]


@pytest.mark.parametrize(("said", "serial", "connections", "busy"), BUSY)
def test_what_connections_tell(said: bool | None, serial: bool, connections: int | None, busy: bool | None) -> None:
    load = Workload((Worker(pid=1, busy=said),), 0, serial)
    assert workload.busy(load, load.workers[0], connections) is busy


@pytest.mark.parametrize(
    ("answer", "serial"),
    [
        (gunicorn(kind=SYNC), True),
        (gunicorn(kind=GTHREAD), False),
        (gunicorn(kind=["\x1b"]), False),
        ([{"data": {"workers": []}}], False),
        ([{"data": {"workers": []}}, {"status": "error"}], False),
    ],
)
def test_only_gunicorns_sync_workers_are_serial(answer: object, serial: bool) -> None:
    assert workload.read("gunicorn", json.dumps(answer).encode()).serial is serial


WHOLE: dict[str, tuple[dict[str, Any], Callable[[object], object]]] = {
    "gunicorn": (GUNICORN, gunicorn),
    "uwsgi": (UWSGI, uwsgi),
    "wsgi": (WSGI, lambda one: one),
}
WRONG: list[object] = [None, True, "7", "\x1b[2J", -1, 1.5, 1e400, float("nan"), 1 << 53, 10**30, [], {}, [1]]


@pytest.mark.parametrize(("server", "document", "workers"), TOLD)
def test_what_each_server_tells(server: str, document: object, workers: list[Worker]) -> None:
    assert workload.read(server, json.dumps(document).encode()) == Workload(tuple(workers))


@pytest.mark.parametrize("server", list(servers.TELLING))
@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"null", b"[]", b"{}", b"7", b'"x"', b"{", b"\xff", b'{"workers": 7}', b'{"data": []}'),
        *(b"[" * 100_000, b"1" * 5000, b'{"workers": {"pid": 1}}', b'{"pid": "1"}', b'{"data": {"workers": {}}}'),
        *(b'{"status": "error", "error": "\\u001b[2J"}', b'[{"status": "error"}]', b"[[]]", b"[7, 7]"),
    ],
)
def test_an_answer_that_is_none(server: str, answer: bytes) -> None:
    try:
        assert workload.read(server, answer) == Workload(())
    except Unreadable as error:
        assert str(error) in ("its answer is no JSON", "its answer tells of no workers")


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("server", list(servers.TELLING))
def test_a_figure_of_the_wrong_kind_is_none(server: str, value: object) -> None:
    honest, wrap = WHOLE[server]
    for key in honest:
        answer = json.dumps(wrap(honest | {key: value})).encode()
        for worker in workload.read(server, answer).workers:
            assert isinstance(worker.pid, int)
            assert 0 < worker.pid <= workload.PID_MAX
            for name in ("requests", "in_flight", "queue", "threads"):
                figure = getattr(worker, name)
                assert figure is None or (type(figure) is int and 0 <= figure < workload.COUNT_MAX)
            for name in ("average_seconds", "heartbeat_seconds"):
                figure = getattr(worker, name)
                assert figure is None or (type(figure) is float and 0 <= figure <= workload.NUMBER_MAX)
            assert worker.busy in (None, True, False)


def test_more_workers_than_anybody_has_are_counted_only() -> None:
    answer = json.dumps(gunicorn(*({"pid": pid} for pid in range(1, 1001)), {"pid": 1})).encode()
    load = workload.read("gunicorn", answer)
    assert (len(load.workers), load.left_out) == (workload.WORKERS_MAX, 1000 - workload.WORKERS_MAX)


def test_a_worker_is_told_once() -> None:
    assert len(workload.read("gunicorn", json.dumps(gunicorn(GUNICORN, GUNICORN)).encode()).workers) == 1


@given(st.binary(max_size=200), st.sampled_from(sorted(servers.TELLING)))
def test_any_bytes(answer: bytes, server: str) -> None:
    try:
        workload.read(server, answer)
    except Unreadable:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["workers", "data", *UWSGI, *WSGI, *GUNICORN, "in_request"]), inner, max_size=6
        )
    ),
    max_leaves=20,
)


@given(JSON, st.sampled_from(sorted(servers.TELLING)))
def test_any_document(document: object, server: str) -> None:
    try:
        workload.read(server, json.dumps(document).encode())
    except Unreadable:
        pass

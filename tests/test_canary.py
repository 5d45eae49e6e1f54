"""Canaries: what lines of output tell, what it means, and the instructions that share connections out."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import canary, routing, values
from procman.canary import (
    AS_TABLE,
    LINE_MAX,
    NO_CANARY,
    PATH,
    WAIT_LOOKS,
    Canary,
    Counts,
    Silence,
    Tally,
    Waiting,
    Wish,
    count,
    judge,
    obstacle,
)  # fmt: skip
from procman.config import Address, Config, Daemon, Listener, Program
from procman.ctl import session
from procman.units import Unit, doubtful, no_canary, units

AGENT = r'"-" "\"GET / HTTP/1.1\" 500"'

LINES = [
    # the built-in server
    (f'127.0.0.1 - - [26/Nov/2026:23:00:28 +0000] "GET /a\\"b?x=0 HTTP/1.1" 503 2 {AGENT} 0.2ms', Counts(1, 1)),
    (f'127.0.0.1 - - [26/Nov/2026:23:00:28 +0000] "GET /a\\"b?x=1 HTTP/1.1" 200 2 {AGENT} 0.2ms', Counts(1, 0)),
    ('- - - [26/Nov/2026:23:00:28 +0000] "GET / HTTP/1.0" 404 2 "-" "curl" 0.2ms', Counts(1, 0)),
    ('::1 - - [26/Nov/2026:23:00:28 +0000] "-" 400 2 "-" "-" 0.2ms', Counts()),
    ("procman.wsgi: Exception while serving /", Counts()),
    # gunicorn
    (f'127.0.0.1 - - [26/Nov/2026:23:00:29 +0000] "GET /a\\"b?x=0 HTTP/1.1" 503 2 {AGENT}', Counts(1, 1)),
    ('127.0.0.1 - - [26/Nov/2026:23:00:29 +0000] "POST /a HTTP/1.1" 500 0 "-" "-"', Counts(1, 1)),
    ('127.0.0.1 - me\\"GET / HTTP/1.1\\" 500 [26/Nov/2026:23:00:29] "GET / HTTP/1.1" 200 0 "-" "-"', Counts(1, 0)),
    ("[2026-11-26 23:00:29 +0000] [19278] [ERROR] Error handling request GET /a", Counts()),
    ("[2026-11-26 23:10:18 +0000] [14228] [WARNING] Worker (pid:14315) was sent SIGSEGV!", Counts(deaths=1)),
    ("[2026-11-26 23:10:18 +0000] [14228] [ERROR] Worker (pid:14315) exited with code 9.", Counts(deaths=1)),
    ("[2026-11-26 23:10:18 +0000] [14228] [INFO] Worker (pid:14315) was sent SIGTERM!", Counts()),
    ("[2026-11-26 23:10:20 +0000] [14346] [INFO] Worker exiting (pid: 14346)", Counts()),
    # uWSGI
    (
        (
            "[pid: 19655|app: 0|req: 1/1] 127.0.0.1 () {24 vars in 260 bytes} [Thu Nov 26 23:00:31 2026] GET /a?x=0 =>"
            " generated 2 bytes in 0 msecs (HTTP/1.1 503) 1 headers in 38 bytes (1 switches on core 0)"
        ),
        Counts(1, 1),
    ),
    (
        (
            "[pid: 19655|app: 0|req: 2/2] 127.0.0.1 () {24 vars in 260 bytes} [Thu Nov 26 23:00:31 2026] GET /a?x=1 =>"
            " generated 2 bytes in 12 micros via sendfile() (HTTP/1.1 200) 1 headers in 38 bytes (1 switches on core 0)"
        ),
        Counts(1, 0),
    ),
    (
        (
            "[pid: 19655|app: -|req: -/3] 127.0.0.1 () {24 vars in 260 bytes} [Thu Nov 26 23:00:31 2026] GET /a?x=2 =>"
            " generated 0 bytes in 0 msecs (HTTP/1.1 500) 0 headers in 0 bytes (0 switches on core 0)"
        ),
        Counts(1, 1),
    ),
    ("DAMN ! worker 1 (pid: 14458) died :( trying respawn ...", Counts(deaths=1)),
    ("DAMN ! worker 2 (pid: 14459) died, killed by signal 9 :( trying respawn ...", Counts(deaths=1)),
    ("spawned uWSGI worker 1 (pid: 19655, cores: 1)", Counts()),
    # uvicorn
    ('INFO:     127.0.0.1:54321 - "GET / HTTP/1.1" 500 Internal Server Error', Counts(1, 1)),
    # granian, daphne
    ('[2026-11-26 23:00:29 +0000] 127.0.0.1 - "GET /a?x=0 HTTP/1.1" 503 1.414', Counts(1, 1)),
    ('127.0.0.1:54321 - - [26/Nov/2026:23:00:29] "GET /a?x=0" 500 2', Counts(1, 1)),
    # anybody
    ("Traceback (most recent call last):", Counts(tracebacks=1)),
    ("  File \"x.py\", line 1, in app\n    raise RuntimeError('\"GET / HTTP/1.1 500')", Counts()),
    ("2026-11-26 ERROR Traceback (most recent call last):", Counts(tracebacks=1)),
    ('he said "nothing" 500 times', Counts()),
    (
        (
            "Traceback (most recent call last):\nKeyError: 1\n\nDuring handling of the above exception, another"
            " exception occurred:\n\nTraceback (most recent call last):\nValueError: 2"
        ),
        Counts(tracebacks=1),
    ),
    ("", Counts()),
]


@pytest.mark.parametrize(("line", "found"), LINES)
def test_lines(line: str, found: Counts) -> None:
    assert count(line.encode()) == found


@given(st.lists(st.integers(1, 400)))
def test_however_the_output_is_cut(sizes: list[int]) -> None:
    text = "".join(f"{line}\n" for line, _ in LINES).encode()
    tally = Tally()
    for size in sizes:
        tally.feed(text[:size])
        text = text[size:]
    tally.feed(text)
    assert tally.counts == sum((found for _, found in LINES), Counts())


def test_trouble_is_told_and_memory_is_bounded() -> None:
    told: list[bool] = []
    tally = Tally(lambda: told.append(True))
    tally.feed(b'- "GET / HTTP/1.1" 200 0\n')
    assert not told
    tally.feed(b'- "GET / HTTP/1.1" 50')
    assert not told
    tally.feed(b"0 0\n")
    assert told == [True]
    for _ in range(100):
        tally.feed(b"x" * LINE_MAX)
    assert len(tally._rest) <= LINE_MAX
    tally.feed(b'\n- "GET / HTTP/1.1" 500 0\n')
    assert tally.counts == Counts(3, 2)


@given(st.binary(max_size=300))
def test_any_output(data: bytes) -> None:
    count(data)


@pytest.mark.parametrize(
    ("successor", "before", "bad"),
    [
        (Counts(0, 0), Counts(0, 0), False),
        (Counts(9, 9), Counts(90, 0), False),  # too few answers
        (Counts(10, 2), Counts(90, 0), False),  # too few of them are bad
        (Counts(10, 3), Counts(90, 0), True),
        (Counts(12, 4), Counts(0, 0), True),  # nobody to compare with
        (Counts(60, 3), Counts(0, 0), False),
        (Counts(20, 3), Counts(200, 10), False),  # the one before fails as well
        (Counts(20, 7), Counts(200, 10), True),
        (Counts(1000, 60), Counts(9000, 450), False),
        (Counts(1000, 100), Counts(9000, 450), True),
        (Counts(100, 100), Counts(900, 900), False),
        (Counts(1000, 3), Counts(9000, 9), False),
        (Counts(1000, 3), Counts(9000, 0), True),  # few, but there were none before
        (Counts(tracebacks=2), Counts(), False),
        (Counts(tracebacks=3), Counts(), True),
        (Counts(tracebacks=3), Counts(tracebacks=20), False),
        (Counts(tracebacks=20), Counts(tracebacks=20), True),
        (Counts(100, 0, tracebacks=20), Counts(100, 0, tracebacks=20), False),  # there was as much work for both
        (Counts(deaths=3), Counts(), True),
        (Counts(deaths=3), Counts(deaths=30), False),
        (Counts(tracebacks=-1), Counts(tracebacks=-1), False),
    ],
)
def test_the_judge(successor: Counts, before: Counts, bad: bool) -> None:
    assert bool(judge(0.1, successor, before)) == bad


def test_what_the_judge_says() -> None:
    assert judge(0.1, Counts(12, 4), Counts(90, 1)) == "4 of its 12 answers were 5xx (before: 1 of 90)"
    assert judge(0.1, Counts(tracebacks=3), Counts()) == "it printed 3 tracebacks (before: 0)"
    assert judge(0.1, Counts(deaths=3), Counts()) == "3 of its workers died (before: 0)"


@pytest.mark.parametrize(
    ("told", "ends", "settled", "of_use"),
    [
        ([""], False, True, True),
        (["x"], False, False, True),
        (["x", "x"], False, False, True),
        (["x", "x", "x"], True, False, True),
        (["x", "x", "", "x", "x"], False, False, True),
        (["x", "xx", "x", "xx", "x"], True, False, True),  # what both do not answer counts for nothing
        (["xx"], False, False, True),
        (["xx", "xx", "xx"], False, True, False),  # neither has ever answered: it is no HTTP
        (["", "xx", "xx", "xx"], False, True, True),
        (["", "x", "xx"], False, True, True),
    ],
)
def test_silence(told: list[str], ends: bool, settled: bool, of_use: bool) -> None:
    """"x": the successor did not answer, "xx": nor did the one before."""
    silence = Silence()
    said = [silence.heard("late" if each else "", "late" if each == "xx" else "") for each in told]
    assert (bool(said[-1]), silence.settled, silence.of_use) == (ends, settled, of_use)
    assert not any(said[:-1])


A, B, C = (b"\x7f\0\0\1", 1), (b"\x7f\0\0\1", 2), (b"\x7f\0\0\1", 3)


@pytest.mark.parametrize(
    ("looks", "found"),
    [
        ([({A}, 0)] * WAIT_LOOKS, 0),
        ([({A}, 0)] * (WAIT_LOOKS + 1), 1),
        ([({A}, 0), *[({A, B}, 0)] * WAIT_LOOKS], 1),
        ([({A, B}, 0)] * (WAIT_LOOKS + 1), 2),
        ([({A}, 0)] * 5 + [({B}, 0)] * WAIT_LOOKS, 0),  # somebody accepts
        ([({A}, 0)] * 5 + [(set[Any](), 0)] + [({A}, 0)] * WAIT_LOOKS, 0),
        ([({A}, 1)] * 2 * WAIT_LOOKS, 0),  # it may be the one before where it waits
        ([({A, B, C}, 1), *[({A}, 0)] * WAIT_LOOKS], 1),
        ([({A}, 1)] * WAIT_LOOKS + [({A}, 0)], 1),
        ([(set[Any](), 0)] * 50, 0),
    ],
)
def test_waiting(looks: list[tuple[set[Any], int]], found: int) -> None:
    waiting = Waiting()
    assert [waiting.look(frozenset(clients), others) for clients, others in looks][-1] == found


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.integers(0, 3)), max_size=40))
def test_nobody_is_said_to_wait_who_came_lately(looks: list[tuple[set[int], int]]) -> None:
    waiting = Waiting()
    for number, (ports, others) in enumerate(looks):
        if waiting.look(frozenset((b"", port) for port in ports), others):
            last = [seen for seen, _ in looks[number - WAIT_LOOKS : number + 1]]
            assert len(last) == WAIT_LOOKS + 1
            assert set.intersection(*last)


def test_our_own_requests_do_not_count() -> None:
    for line in (
        f'127.0.0.1 - - [26/Nov/2026:23:00:28 +0000] "GET {PATH} HTTP/1.1" 503 2 "-" "procman" 0.2ms',
        f'INFO:     127.0.0.1:54321 - "GET {PATH} HTTP/1.1" 500 Internal Server Error',
        next(line for line, _ in LINES if line.startswith("[pid: ")).replace("/a?x=0", PATH),
    ):
        assert count(f"{line}\n{LINES[0][0]}".encode()) == Counts(1, 1)
        assert count(line.replace(PATH, "/").encode()) == Counts(1, 1)


SHOP = Program(name="shop", program="shop", argv=("x",), reload="overlap", canary=0.1, canary_seconds=60.0)


@pytest.mark.parametrize(
    ("wish", "said", "meant"),
    [
        (AS_TABLE, (0.1, 60.0), Canary(0.1, 60.0)),
        (AS_TABLE, (0.1, 0.0), Canary(0.1, 120.0)),
        (AS_TABLE, (0.0, 0.0), None),
        (NO_CANARY, (0.1, 60.0), None),
        (Wish(0.5), (0.1, 60.0), Canary(0.5, 60.0)),
        (Wish(0.5), (0.0, 0.0), Canary(0.5, 120.0)),
        (Wish(None, 5.0), (0.1, 60.0), Canary(0.1, 5.0)),
        (Wish(None, 5.0), (0.0, 0.0), None),
    ],
)
def test_wishes(wish: Wish, said: tuple[float, float], meant: Canary | None) -> None:
    program = Program(name="shop", program="shop", argv=("x",), canary=said[0], canary_seconds=said[1])
    assert wish.of(program) == meant


def test_obstacles() -> None:
    tcp, unix = Address("tcp", "127.0.0.1", 80), Address("unix", path="/s")
    assert obstacle(SHOP, [Listener(name="web", address=tcp)]) == ""
    assert "needs a listener" in obstacle(SHOP, [])
    assert "/s can't be shared out" in obstacle(SHOP, [Listener(name="web", address=unix)])
    assert "web, which has reuse_port" in obstacle(SHOP, [Listener(name="web", address=tcp, reuse_port=True)])
    restarted = Program(name="shop", program="shop", argv=("x",))
    assert 'needs reload = "overlap"' in obstacle(restarted, [Listener(name="web", address=tcp)])


def made(*said: tuple[str, str, tuple[str, ...]]) -> Config:
    """A table of processes: (name, server, listeners)."""
    programs = [
        Program(name=name, program=name.partition(":")[0], argv=("x",), server=server, listen=listen)
        for name, server, listen in said
    ]
    names = dict.fromkeys(each for program in programs for each in program.listen)
    listeners = tuple(Listener(name=each, address=Address("tcp", "127.0.0.1", 80)) for each in names)
    daemon = Daemon(socket="", state_dir="", log_dir="")
    return Config(path="", files=(), daemon=daemon, listeners=listeners, programs=tuple(programs))


TWO = [("shop:1", "wsgi", ("web",)), ("shop:2", "wsgi", ("web",))]
ODD = [(name, "uwsgi", listen) for name, _, listen in TWO]
OWN = [("shop:1", "uwsgi", ("web", "a1")), ("shop:2", "uwsgi", ("web", "a2"))]
BLOG = ("blog", "wsgi", ("web",))


@pytest.mark.parametrize(
    ("table", "running", "names", "found", "problem"),
    [
        # Those that share a socket together, whatever their server does at its stop.
        (TWO, "shop:1 shop:2", "shop:1 shop:2", [(["shop:1", "shop:2"], ["web"])], ""),
        (TWO, "shop:1 shop:2", "shop:1", [(["shop:1"], [])], "shop:2, which has"),
        (ODD, "shop:1 shop:2", "shop:1 shop:2", [(["shop:1", "shop:2"], ["web"])], None),
        # Who does not run has no socket.
        (TWO, "shop:1", "shop:1", [(["shop:1"], ["web"])], ""),
        (ODD, "shop:2", "shop:2", [(["shop:2"], ["web"])], None),
        ([*TWO, BLOG], "shop:1 shop:2", "shop:1 shop:2", [(["shop:1", "shop:2"], ["web"])], ""),
        ([*TWO, BLOG], "shop:1 shop:2 blog", "shop:1 shop:2", [(["shop:1"], []), (["shop:2"], [])], "blog, which"),
        # Each listener of each of them.
        (OWN, "shop:1 shop:2", "shop:1 shop:2", [(["shop:1", "shop:2"], ["web", "a1", "a2"])], None),
        (OWN, "shop:1 shop:2", "shop:1", [(["shop:1"], ["a1"])], None),
    ],
)
def test_units(table: list[Any], running: str, names: str, found: list[Any], problem: str | None) -> None:
    """`problem`: of a canary; None: there is to be none."""
    config, up = made(*table), running.split()
    programs = [program for program in config.programs if program.name in names.split()]
    got = units(config, programs, up)
    assert got == [Unit(tuple(who), tuple(listen)) for who, listen in found]
    if problem is not None:
        said = no_canary(config, got, up)
        assert said.startswith(problem)
        assert bool(said) == bool(problem)


@pytest.mark.parametrize("runs", [True, False])
def test_who_leaves_goes_with_the_others_of_its_program(runs: bool) -> None:
    """Where it runs and has their socket. So there can be a canary."""
    config = made(*TWO, ("shop:3", "wsgi", ("web",)), ("job:1", "wsgi", ()))
    up = ["shop:1", "shop:2", "job:1", *["shop:3"] * runs]
    found = units(config, config.programs[:2], up, ["shop:3", "job:1"])
    assert found == [Unit(("shop:1", "shop:2"), ("web",), ("shop:3",) if runs else ())]
    assert no_canary(config, found, up) == ""
    assert units(config, config.programs[:2], up)[0].listeners == (() if runs else ("web",))


def test_units_of_other_names_and_another_number() -> None:
    """One becomes two, and two become one, on the same address and on another one; one of two has fallen."""
    one, two, gone = made(("shop", "wsgi", ("web",))), made(*TWO), made(("shop", "wsgi", ("old",)))
    both = ("shop:1", "shop:2")
    assert units(one, two.programs, ["shop"], ["shop"]) == [Unit(both, ("web",), ("shop",))]
    assert units(two, one.programs, both, both) == [Unit(("shop",), ("web",), both)]
    assert units(gone, two.programs, ["shop"], ["shop"]) == [Unit(both, (), ("shop",))]
    assert units(two, two.programs, ["shop:1"]) == [Unit(both, ("web",))]
    there = replace(two, programs=(*one.programs, *two.programs))  # when it has come into force
    assert units(there, two.programs, ["shop"], ["shop"]) == [Unit(both, ("web",), ("shop",))]
    # With a program on the same socket that is not replaced, each for itself.
    others = replace(there, programs=(*there.programs, *made(BLOG).programs))
    assert units(others, two.programs, ["shop", "blog"], ["shop"]) == [Unit((name,), ()) for name in both]


def test_what_a_table_tells_of_it_beforehand() -> None:
    config = made(*TWO, BLOG)
    assert doubtful(config) == []
    config = replace(config, programs=tuple(replace(p, canary=0.1) for p in config.programs[:2]) + config.programs[2:])
    said = "program.blog has the listener 'web', too: there is no canary while that one runs"
    assert doubtful(config) == [(("program", "shop", "canary"), said)]
    assert doubtful(replace(config, programs=config.programs[:2])) == []


def test_what_both_versions_listen_on() -> None:
    """Only that passes on, and without it there is no canary."""
    config = made(("shop", "wsgi", ("a", "b")))
    for listen, passes in (("a", ["a"]), ("ac", ["a"]), ("ba", ["a", "b"]), ("c", [])):
        after = replace(config.programs[0], listen=tuple(listen))
        got = units(config, [after], ["shop"])
        assert got == [Unit(("shop",), tuple(passes))]
        assert bool(no_canary(config, got, ["shop"])) == (not passes)


def test_words() -> None:
    stands = {
        "share": 0.1, "seconds_left": 59.6, "watched": ["exits", "output"], "answers": 0, "errors": 0, "tracebacks": 1,
        "deaths": 0, "before": {"answers": 0, "errors": 0, "tracebacks": 0, "deaths": 0},
    }  # fmt: skip
    plain = "10% of new connections, 60 s left, tracebacks 1 (before: 0); watched: exits, output"
    assert canary.words(stands) == plain
    stands |= {"answers": 12, "errors": 1, "deaths": 2}
    assert "5xx 1 of 12 (before: 0 of 0)" in canary.words(stands)
    assert "dead workers 2 (before: 0)" in canary.words(stands)


# --- instructions ---------------------------------------------------------------------------------------------------


def test_by_chance() -> None:
    assert routing.by_chance(0.0, 1, 0) == [(0x06, 0, 0, 0)]
    tenth = [(0x20, 0, 0, 0xFFFFF038), (0x35, 1, 0, 429496730), (0x06, 0, 0, 1), (0x06, 0, 0, 0)]
    assert routing.by_chance(0.1, 1, 0) == tenth
    assert routing.by_chance(1.0, 1, 0)[1] == (0x35, 1, 0, 0xFFFFFFFF)
    assert routing.from_port(80, 1, tenth)[-6:] == [(0x15, 0, 1, 80), (0x06, 0, 0, 1), *tenth]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_shares_connections_out(host: str) -> None:
    """Within what chance allows, and a known port always gets through."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as first, socket.socket(family) as second:
        for sock in (first, second):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(first.getsockname() if sock is second else (host, 0))
            sock.listen(1000)
            sock.setblocking(False)
        place = first.getsockname()[:2]

        def connect(times: int, port: int | None = None) -> Counter[str]:
            for _ in range(times):
                with socket.socket(family) as client:
                    client.bind((host, 0))
                    if port is not None:
                        routing.lead_port(first, client.getsockname()[1], port, 0, 0.2)
                    client.connect(place)
            got: Counter[str] = Counter()
            for name, sock in (("first", first), ("second", second)):
                try:
                    while True:
                        sock.accept()[0].close()
                        got[name] += 1
                except BlockingIOError:
                    pass
            return got

        routing.lead_share(first, 0.2, 1, 0)
        got = connect(500)
        assert got.total() == 500
        assert 50 < got["second"] < 160, got  # 100 are expected, and the standard deviation is 9
        assert connect(20, port=1) == {"second": 20}
        assert 0 < connect(100)["second"] < 60
        assert connect(20, port=0) == {"first": 20}
        assert 0 < connect(100)["second"] < 60  # who asks the one before does not change the share of others
        routing.lead(first, 0)
        assert connect(50) == {"first": 50}


def test_the_words_of_the_table_are_those_of_the_command() -> None:
    for share, span in (("10%", "2m"), ("2.5%", "500ms"), ("0%", "1.5h"), ("99%", "7d")):
        said = values.canary(f"{share} for {span}")
        assert (session.share(share), session.span(span)) == (said.share, said.seconds)

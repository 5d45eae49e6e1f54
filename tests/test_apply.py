"""What a changed table does to what runs: key by key, and no key without a decision."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from procman.apply import (
    HOT,
    HOT_DAEMON,
    HOT_LOG,
    Line,
    Plan,
    daemon_in_force,
    differences,
    lines,
    plan,
    rolling,
    steps,
    turns,
)
from procman.config import (
    Account,
    Address,
    Config,
    Daemon,
    Limits,
    Listener,
    Log,
    Program,
    Ready,
    Room,
    Sampling,
    Scale,
)
from procman.kept import Kept, keep, still

DAEMON = Daemon(socket="/run/p.sock", state_dir="/var/lib/p", log_dir="/var/log/p")
WEB = Program(name="web", program="web", argv=("web",), listen=("http",))
JOB = Program(name="job", program="job", argv=("job",))
HTTP = Listener(name="http", address=Address("tcp", "127.0.0.1", 80))
OLD = Config(path="/t", files=("/t",), daemon=DAEMON, listeners=(HTTP,), programs=(WEB, JOB))
NOTHING = Plan()

HOT_CHANGES: dict[str, object] = {
    "priority": 1, "groups": ("site",), "autostart": False, "restart": "never", "success_exit_codes": frozenset({3}),
    "start_seconds": 2.0, "start_timeout": 3.0, "start_retries": 4, "restart_delay": 5.0, "restart_delay_max": 6.0,
    "stop_signal": 2, "stop_timeout": 7.0, "reload": "overlap", "reload_signal": 1, "reload_command": ("true",),
    "canary": 0.1, "canary_seconds": 8.0, "max_age": 9.0, "scale": Scale(max=2), "slot": 1,
}  # fmt: skip
RESTART_CHANGES: dict[str, object] = {
    "program": "other", "instance": 2, "server": "wsgi", "argv": ("web", "-v"), "listen": (), "directory": "/srv",
    "account": Account("www", 33, 33, (), "/"), "umask": 0o77, "environment": (("A", "1"),), "env_files": ("/e",),
    "inherit_environment": False, "virtualenv": "/v", "kill": "main", "ready": Ready(kind="log", pattern="x"),
    "notify": True, "limits": Limits(open_files=10),
}  # fmt: skip
HOT_LOG_CHANGES: dict[str, object] = {
    "path": "/l", "error_path": "/e", "max_size": 1, "keep": 1, "mode_bits": 0o600, "mode": "journal",
    "rotate_every": "daily", "keep_total": 1, "compress": "none", "on_error": "block",
    "timestamps": True, "format": "json", "address": "unix:/s",
}  # fmt: skip
RESTART_LOG_CHANGES: dict[str, object] = {"stderr": "separate"}
HOT_DAEMON_CHANGES: dict[str, object] = {
    "log_level": "debug", "shutdown_timeout": 1.0, "exit_when": "any-fatal", "sampling": Sampling(1.0),
    "log_min_free": Room(1), "log_max_size": 1, "log_keep": 1,
}  # fmt: skip
IGNORED_DAEMON_CHANGES: dict[str, object] = {
    "identifier": "x", "socket": "/x", "socket_mode": 0o666, "state_dir": "/x", "log_dir": "/x", "umask": 0,
    "open_files": 1, "socket_gid": 1, "read_only_gid": 2,
}  # fmt: skip


def with_web(web: Program) -> Config:
    return replace(OLD, programs=(web, JOB))


def test_every_key_is_decided_about() -> None:
    """A new field of the table must be put in one of the two: does what runs notice it?"""
    assert {f.name for f in fields(Program)} == HOT_CHANGES.keys() | RESTART_CHANGES.keys() | {"name", "log"}
    assert {f.name for f in fields(Log)} == HOT_LOG_CHANGES.keys() | RESTART_LOG_CHANGES.keys()
    assert {f.name for f in fields(Daemon)} == HOT_DAEMON_CHANGES.keys() | IGNORED_DAEMON_CHANGES.keys()
    assert HOT_CHANGES.keys() == HOT
    assert HOT_LOG_CHANGES.keys() == HOT_LOG
    assert HOT_DAEMON_CHANGES.keys() == HOT_DAEMON


def test_the_same_table_changes_nothing() -> None:
    assert plan(OLD, OLD) == NOTHING
    assert plan(OLD, replace(OLD, path="/elsewhere", files=("/a", "/b"), programs=(JOB, WEB))) == NOTHING


@pytest.mark.parametrize(("key", "value"), HOT_CHANGES.items())
def test_hot(key: str, value: object) -> None:
    new = replace(WEB, **{key: value})  # type: ignore[arg-type]
    assert plan(OLD, with_web(new)) == replace(NOTHING, hot=(new,))


@pytest.mark.parametrize(("key", "value"), RESTART_CHANGES.items())
def test_restart(key: str, value: object) -> None:
    new = replace(WEB, **{key: value})  # type: ignore[arg-type]
    assert plan(OLD, with_web(new)) == replace(NOTHING, restart=(new,))


@pytest.mark.parametrize(("key", "value"), HOT_LOG_CHANGES.items())
def test_hot_log(key: str, value: object) -> None:
    new = replace(WEB, log=replace(WEB.log, **{key: value}))  # type: ignore[arg-type]
    assert plan(OLD, with_web(new)) == replace(NOTHING, hot=(new,))


@pytest.mark.parametrize(("key", "value"), RESTART_LOG_CHANGES.items())
def test_restart_log(key: str, value: object) -> None:
    new = replace(WEB, log=replace(WEB.log, **{key: value}))  # type: ignore[arg-type]
    assert plan(OLD, with_web(new)) == replace(NOTHING, restart=(new,))


def test_from_a_pipe_to_dev_null_and_back_takes_a_restart() -> None:
    silent = replace(WEB, log=replace(WEB.log, mode="discard"))
    assert plan(OLD, with_web(silent)) == replace(NOTHING, restart=(silent,))
    assert plan(with_web(silent), OLD) == replace(NOTHING, restart=(WEB,))


@pytest.mark.parametrize(("key", "value"), HOT_DAEMON_CHANGES.items())
def test_hot_daemon(key: str, value: object) -> None:
    new = replace(DAEMON, **{key: value})  # type: ignore[arg-type]
    assert plan(OLD, replace(OLD, daemon=new)) == NOTHING
    assert daemon_in_force(DAEMON, new) == new


@pytest.mark.parametrize(("key", "value"), IGNORED_DAEMON_CHANGES.items())
def test_ignored_daemon(key: str, value: object) -> None:
    new = replace(DAEMON, **{key: value})  # type: ignore[arg-type]
    assert plan(OLD, replace(OLD, daemon=new)) == replace(NOTHING, ignored=(f"daemon.{key}",))
    assert daemon_in_force(DAEMON, new) == DAEMON


def test_one_key_that_restarts_is_enough() -> None:
    new = replace(WEB, priority=1, argv=("other",), log=replace(WEB.log, path="/l"))
    assert plan(OLD, with_web(new)) == replace(NOTHING, restart=(new,))


def test_added_and_removed() -> None:
    new = replace(JOB, name="job:1")
    assert plan(OLD, replace(OLD, programs=(WEB, new))) == replace(NOTHING, added=(new,), removed=(JOB,))


def test_another_name_at_the_same_address_waits_for_it() -> None:
    """It is another program: nothing says that it takes over."""
    new = replace(OLD, programs=(replace(WEB, name="shop", program="shop", listen=("http",)), JOB))
    before = replace(OLD, programs=(replace(WEB, listen=("http",)), JOB))
    told = {line.name: (line.action, line.cost) for line in lines(before, new, plan(before, new))}
    assert told["shop"] == ("add", "it starts; connections wait from the stop of web until it is ready")


MOVED = Listener(name="127.0.0.1:81", label="http", address=Address("tcp", "127.0.0.1", 81))
WIDE = Listener(name="0.0.0.0:80", label="http", address=Address("tcp", "0.0.0.0", 80))
REUSED = replace(HTTP, name="127.0.0.1:80 reuse_port", reuse_port=True)


@pytest.mark.parametrize(
    ("before", "after", "reload", "action", "cost"),
    [
        (HTTP, MOVED, "overlap", "replace", "a successor takes over; no request is lost, {} closes"),
        (HTTP, MOVED, "restart", "restart", "it stops, then it starts; connections wait meanwhile, {} closes"),
        (HTTP, WIDE, "overlap", "replace", "a successor takes over; no request is lost$"),
        (HTTP, WIDE, "restart", "restart", "it stops, then it starts; connections wait meanwhile$"),
        (WIDE, HTTP, "overlap", "replace", "lost, connections to {} wait until it is ready, 0.0.0.0:80 closes$"),
        (HTTP, REUSED, "restart", "restart", "connections are refused meanwhile"),
        (REUSED, HTTP, "overlap", "restart", "connections are refused meanwhile"),
        (HTTP, HTTP, "restart", "restart", "it stops, then it starts; connections wait meanwhile"),
        (HTTP, None, "restart", "restart", "nothing listens any more, {} closes"),
        (None, None, "restart", "restart", "it stops, then it starts; nothing of it runs meanwhile"),
        (None, None, "overlap", "replace", "for a moment two of it run"),
    ],
)
def test_what_a_new_version_costs(
    before: Listener | None, after: Listener | None, reload: str, action: str, cost: str
) -> None:
    def table(listener: Listener | None, argument: str) -> Config:
        listen = (listener.name,) if listener else ()
        web = replace(WEB, argv=("web", argument), listen=listen, reload=reload)  # type: ignore[arg-type]
        return replace(OLD, listeners=(listener,) if listener else (), programs=(web,))

    old, new = table(before, "1"), table(after, "2")
    (line,) = lines(old, new, plan(old, new))
    assert line.action == action
    assert cost.format(HTTP.address) in f"{line.cost}$"


def test_a_listener_that_is_called_otherwise() -> None:
    """Its socket stays; LISTEN_FDNAMES of a child says what it is called."""
    other = replace(HTTP, label="web")
    assert plan(OLD, replace(OLD, listeners=(other,))) == replace(NOTHING, restart=(WEB,), tuned=(other,))


def test_who_gets_a_new_version_together() -> None:
    """The processes of one program, and who passes a socket to another."""

    def program(name: str, *listen: str, of: str = "") -> Program:
        return Program(name=name, program=of or name, argv=("x",), listen=listen)

    some = (program("a", "1"), program("b", "2"), program("c", "3"), program("d:1", of="d"), program("d:2", of="d"))
    before = {one.name: one for one in some}
    after = [program("a", "2"), program("d:1", of="d"), program("b", "4"), program("c", "5"), program("d:2", of="d")]
    assert [[one.name for one in group] for group in turns(after, before)] == [["a", "b"], ["d:1", "d:2"], ["c"]]


def test_a_socket_that_can_be_made_like_it_stays() -> None:
    tuned = replace(HTTP, backlog=1, mode=0o600, uid=1, gid=1)
    found = plan(OLD, replace(OLD, listeners=(tuned,)))
    assert found == replace(NOTHING, tuned=(tuned,))
    assert lines(OLD, replace(OLD, listeners=(tuned,)), found) == [
        Line("listener http", "change", (), "takes effect at once")
    ]


def test_who_can_pass_on_is_replaced() -> None:
    """What a running child would notice, in a program whose reload is an overlap."""
    web = replace(WEB, reload="overlap")
    old = with_web(web)
    new = replace(web, argv=("web", "-v"), environment=(("A", "1"),), priority=3)
    found = plan(old, with_web(new))
    assert found == replace(NOTHING, replace=(new,))
    keys = ("command", "environment", "priority")
    assert lines(old, with_web(new), found) == [
        Line("web", "replace", keys, "a successor takes over; no request is lost")
    ]
    # The new table decides.
    assert plan(old, with_web(replace(new, reload="restart"))).restart
    assert plan(with_web(WEB), with_web(new)) == replace(NOTHING, replace=(new,))


def test_the_lines_of_a_plan_come_in_its_order() -> None:
    daemon = replace(DAEMON, log_level="debug", umask=0)
    added = replace(JOB, name="new", autostart=False)
    hot = replace(WEB, priority=7)
    new = replace(OLD, daemon=daemon, programs=(hot, added))
    assert [(line.name, line.action, line.keys) for line in lines(OLD, new, plan(OLD, new))] == [
        ("", "ignore", ("daemon.umask",)),
        ("", "change", ("daemon.log_level",)),
        ("web", "change", ("priority",)),
        ("job", "remove", ()),
        ("new", "add", ()),
    ]


def test_what_comes_to_a_program_that_changes_comes_after_it() -> None:
    shop = [replace(WEB, name=f"shop:{number}", program="shop", reload="overlap", canary=0.1) for number in (1, 2, 3)]
    old = replace(OLD, programs=(*shop[:2], JOB))
    new = replace(OLD, programs=(*(replace(one, argv=("other",)) for one in shop), replace(JOB, name="new")))
    found = lines(old, new, plan(old, new), {"shop:1", "shop:2"})
    assert [(line.name, line.action) for line in found] == [
        ("job", "remove"), ("new", "add"), ("shop:1", "replace"), ("shop:2", "replace"), ("shop:3", "add"),
    ]  # fmt: skip
    assert not any("canary" in line.cost for line in found)
    fewer = replace(old, programs=(replace(shop[0], argv=("other",)), JOB))
    found = lines(old, fewer, plan(old, fewer), {"shop:1", "shop:2"})
    assert [(line.name, line.action) for line in found] == [("shop:2", "remove"), ("shop:1", "replace")]
    assert not any("canary" in line.cost for line in found)


def test_all_that_serves_of_a_program_passes_on() -> None:
    """To all that there is of it afterwards; nothing does, where nothing serves."""
    one = replace(WEB, name="shop", program="shop", reload="overlap", canary=0.1)
    three = [replace(one, name=f"shop:{number}", instance=number) for number in (1, 2, 3)]
    changed = [replace(each, argv=("other",)) for each in three]

    def rolled(before: list[Program], after: list[Program], serving: str, wanted: str = "") -> Plan:
        old, new = replace(OLD, programs=tuple(before)), replace(OLD, programs=tuple(after))
        return rolling(old, new, plan(old, new), serving.split(), f"{serving} {wanted}".split())

    more = rolled([one], three, "shop")
    assert more == Plan(coming=tuple(three), leaving=(one,))
    assert rolled(three, [one], "shop:2", "shop:3") == Plan(coming=(one,), leaving=tuple(three))
    assert rolled([one], three, "") == Plan(added=tuple(three), removed=(one,))
    assert rolled(three[:2], changed, "shop:1 shop:2") == Plan(replace=tuple(changed[:2]), coming=(changed[2],))
    assert rolled(three[:2], three, "shop:1 shop:2") == Plan(added=(three[2],))
    assert rolled(three, three[:2], "shop:1 shop:2") == Plan(leaving=(three[2],))
    # One has fallen, one is down.
    assert rolled(three, changed, "shop:1", "shop:2") == Plan(replace=tuple(changed[:2]), resting=(changed[2],))
    assert rolled(three, changed, "", "shop:2") == Plan(restart=tuple(changed))
    # Without overlap they just start beside, and so do those that a number by load has from the beginning.
    beside = [replace(each, reload="restart") for each in three]
    assert rolled([one], beside, "shop") == Plan(added=tuple(beside), leaving=(one,))
    scaled = [replace(each, scale=Scale(min=1, max=3)) for each in three]
    assert rolled([one], scaled, "shop") == Plan(added=tuple(scaled[1:]), coming=(scaled[0],), leaving=(one,))
    old, new = replace(OLD, programs=(one,)), replace(OLD, programs=tuple(three[:2]))
    found = rolling(old, new, plan(old, new), ["shop"], ["shop"])
    assert lines(old, new, found, ["shop"]) == [
        Line("shop:1", "add", (), "it takes over from those before; no request is lost"),
        Line("shop:2", "add", (), "it takes over from those before; no request is lost"),
        Line("shop", "remove", (), "it stops when the others serve"),
    ]


def test_what_came_with_a_version_that_failed_is_not_there() -> None:
    """Nor for the next daemon, as long as its table says the same."""
    shop = [replace(WEB, name=f"shop:{number}", program="shop") for number in (1, 2)]
    before = Kept({"shop": replace(WEB, name="shop", program="shop")}, {"http": HTTP}, absent=("shop:1", "shop:2"))
    table = replace(OLD, programs=(*shop, JOB))
    assert {program.name for program in before.of(table).programs} == {"shop", "job"}
    assert Kept.read(json.loads(json.dumps(before.document()))) == before
    refused = keep(table, ["shop:1", "shop:2"], {"http": HTTP})
    assert still(before, refused, table) == before
    assert still(before, refused, replace(table, programs=(*shop[:1], JOB))) == Kept()
    assert still(before, refused, replace(table, programs=(shop[0], replace(shop[1], umask=7)))) == Kept()
    one = Kept(absent=("shop:2",))
    assert one
    assert still(one, refused, table) == one
    assert not Kept()
    assert before.trying(["shop"]).failed(["shop"]) == before
    assert before.without(["shop"]).absent == before.absent


def test_a_listener_that_is_new_restarts_nobody() -> None:
    other = replace(HTTP, name="other")
    assert plan(OLD, replace(OLD, listeners=(HTTP, other))) == NOTHING


def several(number: int, argument: str, listener: Listener, label: str = "web") -> Config:
    """A table with so many processes of one program on `listener`."""
    web = replace(WEB, program="web", argv=("web", argument), listen=(listener.name,), reload="restart")
    names = [label] if number == 1 else [f"{label}:{each}" for each in range(1, number + 1)]
    return replace(OLD, listeners=(listener,), programs=tuple(replace(web, name=name) for name in names))


@pytest.mark.parametrize(
    ("before", "after", "steps_", "cost"),
    [
        (HTTP, HTTP, [1, 1, 1], "the others of its program serve meanwhile"),
        (REUSED, REUSED, [1, 1, 1], "the others of its program serve meanwhile, who waits at its own socket is reset"),
        # Beside each other they would take connections from each other, or at an address that closes.
        (HTTP, REUSED, [3], "connections are refused meanwhile"),
        (HTTP, MOVED, [3], "connections wait meanwhile, 127.0.0.1:80 closes"),
    ],
)
def test_processes_of_one_program_restart_one_after_the_other(
    before: Listener, after: Listener, steps_: list[int], cost: str
) -> None:
    old, new = several(3, "1", before), several(3, "2", after)
    found = plan(old, new)
    was = {program.name: program for program in old.programs}
    (group,) = turns(found.restart, was)
    assert [len(step) for step in steps(group, was, {before.name: before}, {after.name: after})] == steps_
    assert [line.cost for line in lines(old, new, found)] == [f"it stops, then it starts; {cost}"] * 3


def test_what_a_process_less_costs() -> None:
    reset = "it stops; who waits at its own socket of 127.0.0.1:80 is reset"
    for listener, cost in ((HTTP, "it stops"), (REUSED, reset)):
        old, new = several(3, "1", listener), several(2, "1", listener)
        assert [(line.name, line.cost) for line in lines(old, new, plan(old, new))] == [("web:3", cost)]


def test_a_probe_that_moves_with_the_listener_is_no_difference_of_its_own() -> None:
    def at(port: int, asked: int, path: str = "/") -> Program:
        ready = Ready(kind="http", address=Address("tcp", host="127.0.0.1", port=asked), path=path)
        return replace(WEB, listen=(f"127.0.0.1:{port}",), ready=ready)

    assert differences(at(8000, 8000), at(8001, 8001)) == ("listen",)
    assert differences(at(8000, 8000), at(8001, 8001, "/up")) == ("listen", "ready")
    assert differences(at(8000, 9000), at(8001, 9001)) == ("listen", "ready")

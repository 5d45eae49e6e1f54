"""What becomes of what a killed keeper has left: `plan` by cases and by its invariants."""

from __future__ import annotations

import os
import resource
import subprocess
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman import launch, orphans
from procman.config import Account, Program
from procman.keeper import tree
from procman.orphans import Known, Seen
from tests.harness import wait_until

HOUSE = 77 << tree.NUMBER_BITS
ME = os.geteuid()
WWW = Account("www", 33, 33, (33,), "/")
PROGRAMS = {
    "shop": Program(name="shop", program="shop", argv=("shop",)),
    "www": Program(name="www", program="www", argv=("www",), account=WWW),
    "loose": Program(name="loose", program="loose", argv=("loose",), kill="main"),
}


def seen(pid: int, number: int, child: str = "", *, main: bool = False, uid: int = ME) -> Seen:
    return Seen(pid, pid * 10, HOUSE + number, uid, child, pid if main else 1)


def known(pid: int, number: int, kill: str = "tree") -> Known:
    return Known(pid, pid * 10, HOUSE + number, kill)


CASES: dict[str, tuple[list[Seen], dict[str, Known], list[tuple[str, int, list[int], str]]]] = {
    "nothing": ([], {}, []),
    "nothing is left of what is known": ([], {"shop#1": known(5, 1)}, []),
    "known and alive": ([seen(5, 1, "shop#1")], {"shop#1": known(5, 1)}, [("shop#1", 5, [5], "tree")]),
    "known by its pid, though it has taken its tag off": (
        [Seen(5, 50, 0, ME)], {"shop#1": known(5, 1)}, [("shop#1", 5, [5], "tree")]
    ),
    "its pid is another one's": (
        [seen(5, 1), Seen(6, 61, 0, ME)], {"shop#1": known(6, 1)}, [("shop#1", 0, [5], "tree")]
    ),
    "one has gone, another one is there": (
        [seen(5, 1)], {"shop#1": known(5, 1), "www#2": known(6, 2)},
        [("shop#1", 5, [5], "tree"), ("www#2", 0, [], "tree")],
    ),
    "how to end it is as it was started": (
        [seen(5, 1)], {"shop#1": known(5, 1, "main")}, [("shop#1", 5, [5], "main")]
    ),
    "not known: its environment tells": ([seen(5, 9, "shop#4", main=True)], {}, [("shop#4", 5, [5], "tree")]),
    "not known, and it is not the child itself": ([seen(5, 9, "shop#4")], {}, [("shop#4", 0, [5], "tree")]),
    "not known, of its user": (
        [seen(5, 9, "www#4", main=True, uid=33), seen(6, 9, uid=34)], {}, [("www#4", 5, [5, 6], "tree")]
    ),
    "not known, and another user's process says that it is the child": (
        [seen(5, 9, "www#4", main=True, uid=34), seen(6, 9, "www#4", uid=33)], {}, [("www#4", 0, [5, 6], "tree")]
    ),
    "not known, of another user": ([seen(5, 9, "www#4", main=True, uid=34)], {}, []),
    "not known, of no program": ([seen(5, 9, "gone#4", main=True)], {}, [("gone#4", 0, [5], "tree")]),
    "not known, a probe": ([seen(5, 9, "shop/probe#4-7", main=True)], {}, [("shop/probe#4-7", 0, [5], "tree")]),
    "nameless and newer than the file": ([seen(5, 9)], {}, [("unknown/left#9", 0, [5], "tree")]),
    "nameless and left on purpose": ([seen(5, 2)], {}, []),
    "left on purpose": ([seen(5, 9, "loose#4")], {}, []),
    "left on purpose, beside its successor": (
        [seen(5, 2, "loose#1"), seen(6, 3, "loose#2", main=True)], {"loose#2": known(6, 3, "main")},
        [("loose#2", 6, [6], "main")],
    ),
    "an older one of the same process": (
        [seen(5, 8, "shop#4", main=True), seen(6, 9, "shop#5", main=True)], {},
        [("shop/left#8", 5, [5], "tree"), ("shop#5", 6, [6], "tree")],
    ),
    "the successor of the known one was not written down": (
        [seen(6, 9, "shop#2", main=True)], {"shop#1": known(5, 1)},
        [("shop/left#1", 0, [], "tree"), ("shop#2", 6, [6], "tree")],
    ),
    "what is known and lives comes first": (
        [seen(5, 1, "shop#1", main=True), seen(6, 9, "shop#2", main=True)], {"shop#1": known(5, 1)},
        [("shop#1", 5, [5], "tree"), ("shop/left#9", 6, [6], "tree")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    found, state, expected = CASES[case]
    requests = orphans.plan(found, state, 5, PROGRAMS)
    assert [(r["child"], r["pid"], r["members"], r["kill"]) for r in requests] == expected


OURS, OTHERS = 77, 78
MAINS = {(5, 50)}
CLAIMS: dict[str, tuple[tree.Process, int, int | None]] = {
    "our tag": (tree.Process(9, 1, 9, 90), (OURS << tree.NUMBER_BITS) + 3, (OURS << tree.NUMBER_BITS) + 3),
    "the tag of another house": (tree.Process(9, 1, 9, 90), (OTHERS << tree.NUMBER_BITS) + 3, None),
    "no tag": (tree.Process(9, 1, 9, 90), 0, None),
    "a number of a child, of no house": (tree.Process(9, 1, 9, 90), 3, None),
    "the house alone, more digits": (tree.Process(9, 1, 9, 90), (OURS << tree.NUMBER_BITS + 1) + 3, None),
    "known, with our tag": (tree.Process(5, 1, 5, 50), (OURS << tree.NUMBER_BITS) + 3, (OURS << tree.NUMBER_BITS) + 3),
    "known, and it has taken its tag off": (tree.Process(5, 1, 5, 50), 0, 0),
    "a pid that is known, of another start": (tree.Process(5, 1, 5, 51), 0, None),
    "a start that is known, of another pid": (tree.Process(6, 1, 6, 50), 0, None),
    "a pid that is known, now another house's": (tree.Process(5, 1, 5, 51), (OTHERS << tree.NUMBER_BITS) + 3, None),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_what_is_ours(case: str) -> None:
    process, tag, expected = CLAIMS[case]
    assert orphans.claim(process, tag, OURS, MAINS) == expected


@given(st.integers(0, 2**63 - 1 - tree.TAG_BASE), st.integers(1, 2**30 - 1), st.integers(2, 2**22), st.integers(1))
def test_no_tag_is_of_two_houses(tag: int, house: int, pid: int, start: int) -> None:
    process = tree.Process(pid, 1, pid, start)
    expected = tag if tag >> tree.NUMBER_BITS == house else None
    assert orphans.claim(process, tag, house, set()) == expected
    of_house = (house << tree.NUMBER_BITS) + tag % 2**tree.NUMBER_BITS
    assert orphans.claim(process, of_house, house, set()) == of_house
    assert orphans.claim(process, of_house, house % (2**30 - 1) + 1, set()) is None


def test_what_was_on_trial_is_ended() -> None:
    """Also where its process had no other child."""
    found = [seen(5, 1, "shop~#4", main=True), seen(6, 2, "www#1", main=True), seen(7, 3, "www~#2", main=True)]
    state = {"shop~#4": known(5, 1), "www#1": known(6, 2), "www~#2": known(7, 3)}
    requests = orphans.plan(found, state, 3, PROGRAMS, {"shop": 3, "www": 1}, trials=["shop~", "www~"])
    assert {request["pid"]: request["child"] for request in requests} == {
        5: "shop/left#1", 6: "www#1", 7: "www/left#3",
    }  # fmt: skip


def test_of_another_boot_only_what_operators_stopped_counts() -> None:
    """A pid and a start time of another boot may well be somebody else's now."""
    document = {"boot_id": "a", "children": {"shop#1": [5, 50, 3, "tree"]}, "last": 4, "down": ["www"]}
    assert orphans.of_this_boot(document, "a") == document
    assert orphans.of_this_boot(document, "b") == {"down": ["www"]}
    assert orphans.of_this_boot({"children": {}}, "b") == {"down": []}
    assert orphans.of_this_boot(None, "a") == {}


@pytest.mark.parametrize("tagged", ["not", "with another house's tag"])
def test_an_environment_alone_makes_nobody_ours(tagged: str) -> None:
    """A real process that says in its environment that it is a child: one of another state folder says the same."""
    tag = 0 if tagged == "not" else ((2**29 + os.getpid()) << tree.NUMBER_BITS) + 4

    def limit() -> None:
        if tag:
            resource.setrlimit(resource.RLIMIT_RSS, (tree.TAG_BASE + tag, resource.getrlimit(resource.RLIMIT_RSS)[1]))

    environment = {"PATH": os.defpath, tree.MARKER: "shop#4", tree.MARKER_PID: "77"}
    with subprocess.Popen(["sleep", "60"], preexec_fn=limit, env=environment) as process:  # noqa: PLW1509 - no threads
        try:
            assert tree.tag_of(process.pid) == tag
            assert orphans.look(2**28 + os.getpid(), {}) == []
        finally:
            process.kill()


def test_only_our_own_house_is_looked_at() -> None:
    """A real process with a tag, and one that the state file names."""
    house, number = 2**29 + os.getpid(), 5
    tag = (house << tree.NUMBER_BITS) + number

    def tagged() -> None:
        resource.setrlimit(resource.RLIMIT_RSS, (tree.TAG_BASE + tag, resource.getrlimit(resource.RLIMIT_RSS)[1]))

    environment = {"PATH": os.defpath, tree.MARKER: "shop#4", tree.MARKER_PID: "77"}
    with subprocess.Popen(["sleep", "60"], preexec_fn=tagged, env=environment) as process:  # noqa: PLW1509 - no threads
        try:
            found = tree.read_process(process.pid)
            assert found is not None
            mine = Seen(process.pid, found.start, tag, os.getuid(), "shop#4", 77)
            assert orphans.look(house, {}) == [mine]
            assert orphans.look(house + 2**20, {}) == []
            state = {"shop#4": Known(process.pid, found.start, 1, "tree")}
            assert orphans.look(house + 2**20, state) == [mine._replace(tag=0)]
            assert orphans.look(house + 2**20, {"shop#4": state["shop#4"]._replace(start=1)}) == []
        finally:
            process.kill()


processes = st.builds(
    Seen,
    pid=st.integers(2, 12),
    start=st.integers(1, 3),
    tag=st.sampled_from([0, *(HOUSE + number for number in range(1, 9))]),
    uid=st.sampled_from([ME, 33, 34]),
    child=st.sampled_from(["", "shop#1", "shop#2", "www#1", "loose#1", "gone#1", "shop/probe#1"]),
    child_pid=st.integers(2, 12),
)
children = st.dictionaries(
    st.sampled_from(["shop#1", "shop#2", "www#1", "loose#1", "gone#1"]),
    st.builds(Known, st.integers(2, 12), st.integers(1, 3), st.integers(1, 8).map(HOUSE.__add__), st.just("tree")),
)


@given(st.lists(processes, unique_by=lambda process: process.pid), children, st.integers(0, 8))
def test_no_second_copy(found: list[Seen], state: dict[str, Known], last: int) -> None:
    """Whatever is found: one child for a process at most, everything asked for once, and nobody else's processes."""
    requests = orphans.plan(found, state, last, PROGRAMS)
    names = Counter(launch.split_child_id(request["child"])[0] for request in requests)
    assert all(count == 1 for name, count in names.items() if name in PROGRAMS)
    assert len({request["child"] for request in requests}) == len(requests)
    by_pid = {process.pid: process for process in found}
    for request in requests:
        assert not request["pid"] or request["members"][0] == request["pid"]
        for pid in request["members"]:
            assert by_pid[pid].tag in {request["tag"], 0} or any(pid == entry.pid for entry in state.values())
    asked = {pid for request in requests for pid in request["members"]}
    for process in found:
        spared = process.uid not in {ME, 33} or process.child in {"loose#1", ""} or process.child.startswith("www")
        if process.tag and process.uid == ME and not spared:
            family = [other for other in found if other.tag == process.tag]
            named = next(other.child for other in sorted(family, key=lambda other: other.start) if other.child)
            if not named.startswith(("loose", "www")):
                assert process.pid in asked, "it would run beside its successor"


@pytest.mark.parametrize("children", [None, [], {"a#1": 3}, {"a#1": [1, 2]}, {"a#1": [1, "x", 3, "tree"]}])
def test_a_state_file_that_makes_no_sense(children: Any) -> None:
    assert orphans.known_children({"children": children}) == {}
    assert orphans.known_children({"children": {"a#1": [1, 2, 3, "tree"]}}) == {"a#1": Known(1, 2, 3, "tree")}


@pytest.mark.parametrize("number", ["9" * 5000, "\u00b2", "x", "-1"])
def test_what_a_program_wrote_into_its_own_environment_stops_nobody(number: str) -> None:
    """Python reads no int of 5,000 digits: a daemon that met one did not start."""
    names = {"long": "x" * 300 + "#1", "odd": "x\nERROR all is lost#1"}
    for child in names.values():
        environment = {tree.MARKER: child, tree.MARKER_PID: number}
        with subprocess.Popen(["sleep", "60"], env=environment) as process:
            assert wait_until(lambda: orphans._environment(process.pid) == ("", 0))
            process.kill()
    assert launch.split_child_id(f"shop#{number}") == ("shop", 0)


@pytest.mark.parametrize("last", [1 << 32, -5, "3", None])
def test_children_of_a_state_file_that_makes_no_sense(last: object) -> None:
    document = {"last": last, "children": {"a#1": [float("inf"), 1, 2, "tree"], "b#1": None, "c#1": [1, 2, 3]}}
    assert orphans.known_children(document) == {}

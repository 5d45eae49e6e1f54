"""The short form of `python -m tests.guarantees crash`, and that its judgement can find something."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guarantees.crash import Play, census, play_all

KINDS = {"hear", "tell", "told", "receive", "state", "enter", "leave", "log", "asked", "answer", "answered"}
"""First words of the names of crossings: each boundary has some."""


@pytest.mark.timeout(400)
def test_the_supervisor_may_die_at_any_boundary() -> None:
    """At the first crossing of each name; the long form dies at every one. Which one a number means may differ from
    play to play, for the keeper, the programs and the log thread go their own pace."""
    alive = census()
    assert not alive.problems, "\n".join(alive.problems)
    names = [row.partition(" ")[2] for row in alive.crossings]
    assert {name.partition(" ")[0] for name in names} == KINDS
    numbers = {name: number for number, name in reversed(list(enumerate(names, 1)))}
    results = list(play_all([(number,) for number in numbers.values()], at_once=3))
    broken = [f"{result.deaths} {result.died}: {problem}" for result in results for problem in result.problems]
    assert not broken, "\n".join(broken)
    assert sum(len(result.died) for result in results) > 0.8 * len(results)
    assert len(numbers) > 40


def test_a_successor_may_die_as_well() -> None:
    """While it takes up what the first one has left: each of these dies in the midst of something else."""
    results = list(play_all([(120, 3), (120, 30, 40), (220, 20), (300, 45)], at_once=3))
    broken = [f"{result.deaths} {result.died}: {problem}" for result in results for problem in result.problems]
    assert not broken, "\n".join(broken)


# --- a judgement that finds nothing proves nothing -------------------------------------------------------------------

GOOD_LIVES = "".join(
    f"{name} begin {pid}\n{name} end {pid}\n"
    for name, pids in {
        "lines": (1, 2), "crasher": (3, 4), "edited": (5, 6),
        "late": (7,), "hup": (8,), "removed": (9,), "added": (10,),
    }.items()
    for pid in pids
)


@pytest.fixture
def unplayed(tmp_path: Path) -> Iterator[Play]:
    """A play whose daemon never ran: what it would find is written by the test."""
    play = Play((0,), tmp_path)
    play.running.log_dir.mkdir()
    yield play
    play.running.close()
    for reserved in play.reserved:
        reserved.close()
    with contextlib.suppress(FileNotFoundError):
        for path in play.folder.iterdir():
            path.unlink()
        play.folder.rmdir()


@pytest.mark.parametrize(
    ("wrong", "about"),
    [
        ("", ""),
        ("late begin 11\nlate end 11\n", "late"),
        ("hup begin 11\n", "hup"),
        ("added double 11\nadded begin 11\nadded end 11\n", "added"),
    ],
)
def test_a_life_too_many_is_found(unplayed: Play, wrong: str, about: str) -> None:
    (unplayed.folder / "lives").write_text(GOOD_LIVES + wrong)
    unplayed.judge_lives()
    assert [problem.split()[0] for problem in unplayed.result.problems] == ([about] if about else [])


EXITS: dict[str, dict[str, object]] = {
    "late": {"signal": "SIGUSR2", "at": "2030-01-31T12:00:00Z", "reason": "killed by SIGUSR2"},
    "crasher": {"code": 3, "at": "2030-01-31T12:00:00Z", "reason": "exit status 3"},
}


@pytest.mark.parametrize(
    ("name", "wrong", "broken"),
    [
        ("late", {}, False),
        ("late", {"signal": "SIGTERM"}, True),
        ("late", {"reason": "killed by SIGTERM"}, True),
        ("late", {"code": 0, "signal": None, "reason": "exit status 0"}, True),
        ("crasher", {"code": None, "reason": "ended; how is not known"}, True),
        ("crasher", {"code": 0, "reason": "exit status 0"}, True),  # that of the life before
    ],
)
def test_a_wrong_exit_is_found(unplayed: Play, name: str, wrong: dict[str, object], broken: bool) -> None:
    ends = "late begin 1\nlate end 1 SIGUSR2\ncrasher begin 2\ncrasher end 2 0\ncrasher begin 3\ncrasher end 3 3\n"
    (unplayed.folder / "lives").write_text(ends + "crasher begin 4\n")
    told = {each: {"exit": exit | (wrong if each == name else {})} for each, exit in EXITS.items()}
    unplayed.judge_exits(told, EXITS)
    assert [problem.split()[0] for problem in unplayed.result.problems] == ([name] if broken else [])


def test_an_exit_that_is_lost_is_found(unplayed: Play) -> None:
    (unplayed.folder / "lives").write_text("late begin 1\nlate end 1 SIGUSR2\n")
    unplayed.judge_exits({"late": {"exit": None}}, ["late"])
    assert len(unplayed.result.problems) == 1


def test_a_missing_end_is_found(unplayed: Play) -> None:
    (unplayed.folder / "lives").write_text(GOOD_LIVES.replace("crasher end 3\n", ""))
    unplayed.judge_lives()
    assert len(unplayed.result.problems) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("1 2 xx\n", ""),  # lost
        ("1 2 xx\n", "1 2 xx\n1 2 xx\n"),  # doubled
        ("1 2 xx\n", "1 2 x\n"),  # torn
        ("1 1 x\n1 2 xx\n", "1 2 xx\n1 1 x\n"),  # in another order
        ("2 end\n", ""),
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_found(unplayed: Play, old: str, new: str) -> None:
    (unplayed.folder / "lives").write_text(GOOD_LIVES)
    for name in ("crasher", "late", "hup", "edited", "removed", "added"):
        text = "".join(f"{pid} begin\n{pid} end\n" for pid in unplayed.begun(name))
        (unplayed.running.log_dir / f"{name}.log").write_text(text)
    rotated, now = "1 begin\n1 1 x\n1 2 xx\n", "1 3 xxx\n1 end\n2 begin\n2 1 x\n2 end\n"
    for path, text in (("lines.log.1", rotated), ("lines.log", now)):
        (unplayed.running.log_dir / path).write_text(text.replace(old, new) if old else text)
    unplayed.judge_lines()
    assert len(unplayed.result.problems) == bool(old)

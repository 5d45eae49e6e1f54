"""The state machine: tables of (before, event, after), and the invariants under every order of events."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from procman import lifecycle
from procman.config import Program
from procman.config import Ready as Probe
from procman.lifecycle import (
    KILL_AGAIN_SECONDS,
    LEGAL,
    WAITING,
    Action,
    Deadline,
    Event,
    Exit,
    Exited,
    Gone,
    Held,
    IllegalEvent,
    Ready,
    Restart,
    Signal,
    Spawn,
    Spawned,
    SpawnFailed,
    Start,
    State,
    Status,
    Stop,
    adopted,
    backoff_seconds,
    restore,
    step,
)

PLAIN = Program(name="web", program="web", argv=("web",), restart_delay=1.0, restart_delay_max=8.0)
PROBED = replace(PLAIN, ready=Probe(kind="notify"))
GOOD = Exit(0, None, 0.0, "exit status 0")
BAD = Exit(3, None, 0.0, "exit status 3")
KILLED = Exit(None, signal.SIGKILL, 0.0, "killed by SIGKILL")

TERM = Signal(signal.SIGTERM)
KILL_TREE = Signal(signal.SIGKILL, tree=True)


def play(program: Program, *events: tuple[float, Event]) -> tuple[Status, list[Action]]:
    """Feed (time, event) pairs to a process that was never started; the last status and the last actions."""
    status, actions = Status(), list[Action]()
    for now, event in events:
        before = status
        status, actions = step(program, status, event, now)
        assert status.state is before.state or status.state in LEGAL[before.state]
    return status, actions


STARTED: tuple[tuple[float, Event], ...] = ((0.0, Start("test")), (0.1, Spawned(100, 5.0)))
RUNNING: tuple[tuple[float, Event], ...] = (*STARTED, (1.1, Deadline()))

CASES: list[tuple[str, Program, tuple[tuple[float, Event], ...], State, list[Action]]] = [
    ("a start asks for child 1", PLAIN, ((0.0, Start("test")),), State.STARTING, [Spawn(1)]),
    ("a start of what starts changes nothing", PLAIN, (*STARTED, (0.2, Start("again"))), State.STARTING, []),
    ("up for start_seconds is RUNNING", PLAIN, RUNNING, State.RUNNING, []),
    ("a deadline that came too early changes nothing", PLAIN, (*STARTED, (1.0, Deadline())), State.STARTING, []),
    (
        "start_seconds = 0 is RUNNING with the child",
        replace(PLAIN, start_seconds=0.0),
        STARTED,
        State.RUNNING,
        [],
    ),
    ("a probe decides, not the time", PROBED, (*STARTED, (30.0, Deadline())), State.STARTING, []),
    ("ready is RUNNING", PROBED, (*STARTED, (0.3, Ready())), State.RUNNING, []),
    ("ready before there is a child means nothing", PROBED, ((0.0, Start("test")), (0.3, Ready())), State.STARTING, []),
    (
        "the time begins anew when others were in the way",
        PROBED,
        ((0.0, Start("test")), (59.0, Held("others")), (60.0, Deadline())),
        State.STARTING,
        [],
    ),
    (
        "a child that is there has its time",
        PROBED,
        (*STARTED, (59.0, Held("x")), (60.0, Deadline())),
        State.STOPPING,
        [TERM],
    ),
    ("missed readiness is stopped", PROBED, (*STARTED, (60.0, Deadline("HTTP 503"))), State.STOPPING, [TERM]),
    (
        "missed readiness ends in BACKOFF",
        PROBED,
        (*STARTED, (60.0, Deadline()), (60.1, Exited(GOOD))),
        State.BACKOFF,
        [],
    ),
    ("no child is BACKOFF", PLAIN, ((0.0, Start("test")), (0.1, SpawnFailed("exec: no"))), State.BACKOFF, []),
    ("an exit before start_seconds is BACKOFF", PLAIN, (*STARTED, (0.5, Exited(GOOD))), State.BACKOFF, []),
    ("a crash is started again at once", PLAIN, (*RUNNING, (9.0, Exited(KILLED))), State.STARTING, [Spawn(2)]),
    ("how long it ran counts", PLAIN, (*RUNNING, (9.0, Exited(BAD, lived=1.0))), State.STARTING, [Spawn(2)]),
    ("not when that is heard", PLAIN, (*RUNNING, (9.0, Exited(BAD, lived=0.9))), State.BACKOFF, []),
    (
        "nor does killing what it left make it longer",
        PLAIN,
        (*RUNNING, (2.0, Exited(BAD, left=True, lived=0.9)), (9.0, Gone())),
        State.BACKOFF,
        [],
    ),
    ("also after exit status 0", PLAIN, (*RUNNING, (9.0, Exited(GOOD))), State.STARTING, [Spawn(2)]),
    (
        "on-failure: success is EXITED",
        replace(PLAIN, restart="on-failure"),
        (*RUNNING, (9.0, Exited(GOOD))),
        State.EXITED,
        [],
    ),
    (
        "on-failure: success is EXITED also while STARTING",
        replace(PLAIN, restart="on-failure"),
        (*STARTED, (0.5, Exited(GOOD))),
        State.EXITED,
        [],
    ),
    (
        "on-failure: a listed signal is success",
        replace(PLAIN, restart="on-failure", success_exit_codes=frozenset({0, -signal.SIGKILL})),
        (*RUNNING, (9.0, Exited(KILLED))),
        State.EXITED,
        [],
    ),
    (
        "on-failure: failure is started again",
        replace(PLAIN, restart="on-failure"),
        (*RUNNING, (9.0, Exited(BAD))),
        State.STARTING,
        [Spawn(2)],
    ),
    ("never: any exit is EXITED", replace(PLAIN, restart="never"), (*RUNNING, (9.0, Exited(BAD))), State.EXITED, []),
    (
        "never: a failed start is FATAL",
        replace(PLAIN, restart="never"),
        (*STARTED, (0.5, Exited(BAD))),
        State.FATAL,
        [],
    ),
    (
        "never: a start that did its work is EXITED",
        replace(PLAIN, restart="never"),
        (*STARTED, (0.5, Exited(GOOD))),
        State.EXITED,
        [],
    ),
    (
        "start_retries = 0: the first failed start is FATAL",
        replace(PLAIN, start_retries=0),
        (*STARTED, (0.5, Exited(BAD))),
        State.FATAL,
        [],
    ),
    (
        "what is ready but dies young waits",
        PROBED,
        (*STARTED, (0.2, Ready()), (0.9, Exited(BAD))),
        State.BACKOFF,
        [],
    ),
    ("BACKOFF ends in a start", PLAIN, (*STARTED, (0.5, Exited(BAD)), (2.0, Deadline())), State.STARTING, [Spawn(2)]),
    (
        "an operator's start ends BACKOFF at once",
        PLAIN,
        (*STARTED, (0.5, Exited(BAD)), (0.6, Start("op"))),
        State.STARTING,
        [Spawn(2)],
    ),
    ("a stop in BACKOFF is STOPPED", PLAIN, (*STARTED, (0.5, Exited(BAD)), (0.6, Stop("op"))), State.STOPPED, []),
    ("a stop signals", PLAIN, (*RUNNING, (2.0, Stop("op"))), State.STOPPING, [TERM]),
    ("a stop without a pid signals too", PLAIN, ((0.0, Start("t")), (0.05, Stop("op"))), State.STOPPING, [TERM]),
    ("its end is STOPPED", PLAIN, (*RUNNING, (2.0, Stop("op")), (2.1, Exited(GOOD))), State.STOPPED, []),
    (
        "no child after a stop is STOPPED",
        PLAIN,
        ((0.0, Start("t")), (0.05, Stop("op")), (0.1, SpawnFailed("x"))),
        State.STOPPED,
        [],
    ),
    ("stop_timeout kills", PLAIN, (*RUNNING, (2.0, Stop("op")), (12.0, Deadline())), State.STOPPING, [KILL_TREE]),
    (
        "and again",
        PLAIN,
        (*RUNNING, (2.0, Stop("op")), (12.0, Deadline()), (12.0 + KILL_AGAIN_SECONDS, Deadline())),
        State.STOPPING,
        [KILL_TREE],
    ),
    (
        "what a stopped child leaves gets the stop signal",
        PLAIN,
        (*RUNNING, (2.0, Stop("op")), (2.1, Exited(GOOD, left=True))),
        State.STOPPING,
        [Signal(signal.SIGTERM, tree=True)],
    ),
    (
        "what is left after stop_timeout is killed",
        PLAIN,
        (*RUNNING, (2.0, Stop("op")), (12.5, Exited(GOOD, left=True))),
        State.STOPPING,
        [KILL_TREE],
    ),
    (
        "STOPPED when nothing is left",
        PLAIN,
        (*RUNNING, (2.0, Stop("op")), (2.1, Exited(GOOD, left=True)), (2.2, Gone())),
        State.STOPPED,
        [],
    ),
    (
        "what a crashed child leaves is killed first",
        PLAIN,
        (*RUNNING, (9.0, Exited(KILLED, left=True))),
        State.STOPPING,
        [KILL_TREE],
    ),
    (
        "then its successor starts",
        PLAIN,
        (*RUNNING, (9.0, Exited(KILLED, left=True)), (9.1, Gone())),
        State.STARTING,
        [Spawn(2)],
    ),
    (
        "stop and start is a restart",
        PLAIN,
        (*RUNNING, (2.0, Stop("op")), (2.0, Start("op")), (2.1, Exited(GOOD))),
        State.STARTING,
        [Spawn(2)],
    ),
    ("a restart signals", PLAIN, (*RUNNING, (2.0, Restart("op"))), State.STOPPING, [TERM]),
    (
        "and then starts",
        PLAIN,
        (*RUNNING, (2.0, Restart("op")), (2.1, Exited(GOOD))),
        State.STARTING,
        [Spawn(2)],
    ),
    ("a restart of what is down starts it", PLAIN, ((0.0, Restart("op")),), State.STARTING, [Spawn(1)]),
    (
        "restart and stop is a stop",
        PLAIN,
        (*RUNNING, (2.0, Restart("op")), (2.05, Stop("op")), (2.1, Exited(GOOD))),
        State.STOPPED,
        [],
    ),
    (
        "a stop of EXITED is STOPPED",
        replace(PLAIN, restart="never"),
        (*RUNNING, (9.0, Exited(BAD)), (9.1, Stop("op"))),
        State.STOPPED,
        [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "events", "state", "actions"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_step(
    program: Program, events: tuple[tuple[float, Event], ...], state: State, actions: list[Action]
) -> None:
    status, done = play(program, *events)
    assert (status.state, done) == (state, actions)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ((*STARTED, (0.5, Exited(BAD))), "exit status 3"),
        (((0.0, Start("test")), (0.1, SpawnFailed("can't start: exec: ..."))), "can't start: exec: ..."),
        ((*RUNNING, (9.0, Exited(KILLED))), "started again: killed by SIGKILL"),
        ((*RUNNING, (2.0, Stop("stop by uid 7"))), "stop by uid 7"),
        ((*RUNNING, (2.0, Stop("stop by uid 7")), (2.1, Exited(GOOD))), "stop by uid 7"),
        ((*RUNNING,), "test"),
        ((*STARTED, (0.5, Exited(GOOD))), "exit status 0 before start_seconds = 1 s"),
        ((*RUNNING, (2.0, Stop("down")), (2.0, Start("up again")), (2.1, Exited(GOOD))), "up again"),
    ],
)
def test_every_state_says_why(events: tuple[tuple[float, Event], ...], why: str) -> None:
    status, _ = play(PLAIN, *events)
    assert status.why == why


def test_missed_readiness_says_what_the_probe_saw() -> None:
    status, _ = play(PROBED, *STARTED, (60.0, Deadline("HTTP 503")))
    assert status.why == "not ready within 60 s: HTTP 503"


def test_what_nobody_watched_gets_a_moment_to_show_that_it_is_ready() -> None:
    """The supervisor was away when `start_timeout` was over: stopped, replaced, or frozen in an upgrade."""
    late = (*STARTED, (70.0, Deadline()))
    status, actions = play(PROBED, *late)
    assert (status.state, status.deadline, actions) == (State.STARTING, 73.0, [])
    status, _ = play(PROBED, *late, (71.0, Ready()))
    assert status.state is State.RUNNING
    status, actions = play(PROBED, *late, (73.0, Deadline()))
    assert (status.state, status.ending, actions) == (State.STOPPING, "failed", [Signal(signal.SIGTERM)])


def test_gives_up_after_start_retries() -> None:
    program = replace(PLAIN, start_retries=2)
    status, now, states = Status(), 0.0, []
    status, _ = step(program, status, Start("test"), now)
    for _ in range(3):
        status, _ = step(program, status, Spawned(100, 0.0), now)
        status, _ = step(program, status, Exited(BAD), now)
        states.append(status.state)
        if status.deadline is not None:
            now = status.deadline
            status, _ = step(program, status, Deadline(), now)
    assert states == [State.BACKOFF, State.BACKOFF, State.FATAL]
    assert status.why == "exit status 3; gave up after 3 failed starts"


@pytest.mark.parametrize("restart", ["always", "never"])
def test_a_shortage_is_no_failed_start(restart: Literal["always", "never"]) -> None:
    """However often: it is tried again, ever later. What fails by itself afterwards has its last try as ever."""
    program = replace(PLAIN, restart=restart, start_retries=2)
    status, _ = play(program, (0.0, Start("t")))
    delays = []
    for _ in range(10):
        status, _ = step(program, status, SpawnFailed("fork: no", shortage=True), 0.0)
        assert (status.state, status.why, status.alive) == (State.BACKOFF, "fork: no", False)
        assert status.deadline is not None
        delays.append(status.deadline)
        status, actions = step(program, status, Deadline(), status.deadline)
        assert actions == [Spawn(status.generation)]
    assert delays[0] < delays[1] == delays[9]
    status, _ = step(program, status, SpawnFailed("exec: no"), 0.0)
    assert status.state is State.FATAL


def test_a_shortage_while_it_is_stopped() -> None:
    status, _ = play(PLAIN, (0.0, Start("t")), (0.1, Stop("op")), (0.2, SpawnFailed("fork: no", shortage=True)))
    assert status.state is State.STOPPED


def test_counts_restarts_and_forgets_failures_after_a_good_run() -> None:
    status, _ = play(PLAIN, *STARTED, (0.5, Exited(BAD)), (2.0, Deadline()), (2.1, Spawned(101, 5.0)))
    assert (status.restarts, status.failures) == (1, 1)
    status, _ = step(PLAIN, status, Deadline(), 3.2)
    status, _ = step(PLAIN, status, Exited(KILLED), 9.0)
    assert (status.state, status.restarts, status.failures) == (State.STARTING, 2, 0)


def test_backoff_doubles_up_to_the_maximum_with_jitter() -> None:
    delays = [backoff_seconds(PLAIN, failures) for failures in range(1, 100)]
    for failures, delay in enumerate(delays, 1):
        exact = min(2.0 ** (failures - 1), 8.0)
        assert 0.9 * exact <= delay <= 1.1 * exact
    others = {backoff_seconds(replace(PLAIN, name=f"web:{i}"), 1) for i in range(50)}
    assert len(others) > 40


@pytest.mark.parametrize("event", [Spawned(1, 0.0), SpawnFailed("x"), Exited(BAD), Gone()])
def test_reports_without_a_child_are_refused(event: Event) -> None:
    for status in (Status(), Status(state=State.BACKOFF, wanted=True, deadline=1.0), Status(state=State.FATAL)):
        with pytest.raises(IllegalEvent):
            step(PLAIN, status, event, 0.0)


def test_a_restored_deadline_is_never_further_than_the_table_allows() -> None:
    far = Status(state=State.BACKOFF, wanted=True, deadline=1e9)
    assert restore(PLAIN, far, 100.0).deadline == 100.0 + 60.0
    none = Status(state=State.STOPPING, alive=True, deadline=None)
    assert restore(PLAIN, none, 100.0).deadline == 100.0 + KILL_AGAIN_SECONDS
    assert restore(PLAIN, Status(state=State.RUNNING, alive=True, deadline=3.0), 100.0).deadline is None


def test_an_adopted_child_takes_the_usual_way() -> None:
    before = Status(generation=3, state=State.BACKOFF, deadline=1.0, failures=2)
    status = adopted(PLAIN, before, 4, started=50.0, now=70.0)
    assert (status.state, status.alive, status.generation, status.deadline) == (State.STARTING, True, 4, 130.0)
    status, _ = step(PLAIN, status, Spawned(7, 0.0), 52.0)
    status, _ = step(PLAIN, status, Deadline(), 53.0)
    assert status.state is State.RUNNING


class Life(RuleBasedStateMachine):
    """Any order of events that a keeper, a clock and operators can produce, with the rules of the module's
    docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.status = Status()
        self.children: set[int] = set()
        self.leftovers = False
        self.program = PLAIN

    def feed(self, event: Event) -> None:
        before = self.status
        self.status, actions = step(self.program, before, event, self.now)
        assert self.status.state is before.state or self.status.state in LEGAL[before.state]
        for action in actions:
            if isinstance(action, Spawn):
                assert not self.children, "two children of one process"
                assert not self.leftovers, "a child beside what the last one left"
                assert action.generation == before.generation + 1
                self.children.add(action.generation)
            else:
                assert self.children or self.leftovers, "a signal to nobody"

    @rule(
        restart=st.sampled_from(["always", "on-failure", "never"]),
        kind=st.sampled_from(["seconds", "notify"]),
        retries=st.integers(-1, 2),
        seconds=st.sampled_from([0.0, 1.0, 5.0]),
    )
    def another_table(self, restart: str, kind: str, retries: int, seconds: float) -> None:
        changed = replace(PLAIN, ready=Probe(kind=kind), start_retries=retries)  # type: ignore[arg-type]
        self.program = replace(changed, restart=restart, start_seconds=seconds)  # type: ignore[arg-type]

    @rule()
    def start(self) -> None:
        self.feed(Start("op"))
        assert self.status.wanted

    @rule()
    def stop(self) -> None:
        self.feed(Stop("op"))
        assert not self.status.wanted

    @rule()
    def restart(self) -> None:
        self.feed(Restart("op"))
        assert self.status.wanted

    @rule(seconds=st.floats(0.0, 100.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Deadline())

    @precondition(lambda self: self.status.deadline is not None)
    @rule()
    def deadline_comes(self) -> None:
        assert self.status.deadline is not None
        self.now = max(self.now, self.status.deadline)
        self.feed(Deadline())

    @precondition(lambda self: self.children and self.status.pid is None)
    @rule()
    def spawned(self) -> None:
        self.feed(Spawned(4711, self.now))

    @precondition(lambda self: self.children and self.status.pid is None)
    @rule()
    def spawn_fails(self) -> None:
        self.children.clear()
        self.feed(SpawnFailed("no"))

    @rule()
    def ready(self) -> None:
        self.feed(Ready())

    @rule()
    def others_are_in_the_way(self) -> None:
        self.feed(Held("others"))

    @precondition(lambda self: bool(self.children))
    @rule(exit=st.sampled_from([GOOD, BAD, KILLED]), left=st.booleans())
    def exits(self, exit: Exit, left: bool) -> None:
        self.children.clear()
        self.leftovers = left
        self.feed(Exited(exit, left))

    @precondition(lambda self: self.leftovers)
    @rule()
    def gone(self) -> None:
        self.leftovers = False
        self.feed(Gone())

    @rule()
    def supervisor_is_replaced(self) -> None:
        self.status = restore(self.program, self.status, self.now)

    @invariant()
    def alive_is_true(self) -> None:
        assert self.status.alive == bool(self.children)
        assert len(self.children) <= 1

    @invariant()
    def deadlines_exist_where_it_waits(self) -> None:
        assert (self.status.deadline is not None) == (self.status.state in WAITING)

    @invariant()
    def states_without_a_child_have_none(self) -> None:
        if self.status.state in (State.STOPPED, State.BACKOFF, State.EXITED, State.FATAL):
            assert not self.children
            assert not self.leftovers
        if self.status.state in (State.STARTING, State.RUNNING):
            assert self.children
            assert self.status.wanted

    def teardown(self) -> None:
        """Wanted down ends STOPPED, once the child does what a child can't help: it ends, and nothing is left."""
        self.feed(Stop("end"))
        if self.children:
            self.deadline_comes()
            self.exits(KILLED, False)
        if self.leftovers:
            self.gone()
        assert self.status.state is State.STOPPED


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


FILE = Status(State.RUNNING, wanted=True, alive=True, generation=3, pid=77, started=1.5)


@pytest.mark.parametrize(
    ("noted", "later"),
    [
        (None, FILE),
        (replace(FILE, generation=2, wanted=False), FILE),  # of an older child
        (replace(FILE, generation=4, state=State.STARTING, pid=None), "noted"),
        (replace(FILE, state=State.STOPPING, wanted=False, ending="asked"), "noted"),
        (replace(FILE, pid=None), FILE),  # of the same moment: the file knows the pid
        (replace(FILE, failures=1), "noted"),
    ],
)
def test_the_later_account_counts(noted: Status | None, later: Status | str) -> None:
    assert lifecycle.later(FILE, noted) == (noted if later == "noted" else later)

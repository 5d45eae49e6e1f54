"""An upgrade, seen from the keeper: the order of its phases, and every way in which it can fail or be crossed."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procman import __version__
from procman.errors import ProcmanError
from procman.keeper import handover
from procman.keeper.handover import HandoverError
from procman.keeper.wire import HEADER
from tests.harness import wait_until
from tests.test_keeper import Orphan, RunningKeeper, Supervisor, adopt, alive, python

FAILS = ["/bin/sh", "-c", "echo this is no version for you; exit 3"]
ENDLESS = ["/bin/sh", "-c", "sleep 60"]


class Stage:
    """A keeper whose first supervisor is ready, and has a child that exits with the number that it is sent."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.keeper = RunningKeeper(folder, settings, {})
        self.old = self.keeper.supervisor()
        self.old.send("ready")
        self.child = self.old.spawned("it#1")
        read, self.write = os.pipe()
        self.old.send("hold", read, names=["pipe"])
        os.close(read)
        self.old.sync()

    def begin(self) -> None:
        self.old.send("upgrade")

    def trial(self) -> Supervisor:
        """Up to the phase in which both supervisors are there."""
        self.begin()
        self.old.expect("yield")
        self.old.send("yielded")
        return self.keeper.supervisor()

    def upgraded(self, new: Supervisor) -> None:
        """The keeper has become its next self, and is as good as the one before."""
        assert new.expect("keeper") == {
            "op": "keeper",
            "problem": "",
            "version": __version__,
            "upgrades": new.hello["upgrades"] + 1,
            "upgrading": False,
        }
        self.works(new)

    def works(self, boss: Supervisor) -> None:
        """What the keeper had it still has, and what is asked of it is done."""
        assert self.keeper.process.poll() is None
        boss.spawn("it#1")  # the same child, so nothing happens
        pid = boss.spawned("other#1", python("raise SystemExit(5)"))
        assert boss.expect("exited", child="other#1")["pid"] == pid
        boss.send("signal", child="it#1", signal=signal.SIGTERM)
        ended = boss.expect("exited", child="it#1")
        assert (ended["pid"], ended["status"]) == (self.child, signal.SIGTERM)
        boss.die()
        last = self.keeper.supervisor()
        assert last.children["it#1"]["status"] == signal.SIGTERM
        os.write(self.write, b"still open")
        assert os.read(last.held["pipe"], 100) == b"still open"
        last.send("ready")
        os.kill(self.keeper.process.pid, signal.SIGTERM)
        last.expect("signal", signal=signal.SIGTERM)
        last.send("exit", status=4)
        assert self.keeper.wait() == 4

    def close(self) -> None:
        os.close(self.write)
        self.keeper.close()


class Make:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Stage] = []

    def __call__(self, **settings: Any) -> Stage:
        self.made.append(Stage(self.folder, **settings))
        return self.made[-1]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Make]:
    make = Make(tmp_path)
    yield make
    for each in make.made:
        each.close()


@pytest.fixture
def orphan() -> Iterator[Orphan]:
    made = Orphan()
    yield made
    made.close()


def ready_and(new: Supervisor, more: bytes) -> None:
    """It says that it is ready, and `more` behind it in one write: the keeper never has the first without the other."""
    text = b'{"op":"ready"}'
    new.socket.sendall(HEADER.pack(len(text), 0) + text + more)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_the_way_it_should_go(stage: Make) -> None:
    on = stage()
    pid = on.keeper.process.pid
    new = on.trial()
    assert new.hello | {"last": "an upgrade", "upgrading": True, "starts": 2} == new.hello
    assert new.children["it#1"]["pid"] == on.child
    assert not gone(on.old.pid), "the old one is there until the new one is ready"
    new.send("ready")
    wait_until(lambda: gone(on.old.pid))
    on.upgraded(new)
    assert on.keeper.process.pid == pid


def test_again_and_again(stage: Make) -> None:
    on = stage()
    boss = on.old
    for number in range(3):
        boss.send("upgrade")
        boss.expect("yield")
        boss.send("yielded")
        boss = on.keeper.supervisor()
        assert boss.hello["upgrades"] == number
        boss.send("ready")
        if number < 2:
            boss.expect("keeper", problem="")
    on.upgraded(boss)


def test_what_is_under_way_goes_on(stage: Make) -> None:
    """A child that is between fork and exec, one that ends meanwhile, one that left something: nothing is forgotten."""
    on = stage(use_cgroup=True)
    new = on.trial()
    fifo = on.keeper.output.parent / "fifo"
    os.mkfifo(fifo)
    new.spawn("slow#1", python(f"open({str(fifo)!r}).read(); raise SystemExit(9)"))
    new.spawn("waiting#1", ["sleep", "60"], directory="/")
    new.send("ready")
    new.expect("keeper", problem="")
    fifo.write_text("go")
    assert new.expect("exited", child="slow#1")["status"] == 9 << 8
    new.expect("spawned", child="waiting#1")
    new.send("signal", child="waiting#1", signal=signal.SIGKILL, tree=True)
    new.expect("exited", child="waiting#1")
    on.works(new)


def test_an_adopted_child_is_watched_by_the_next_self(stage: Make, orphan: Orphan) -> None:
    """It is no child of the keeper's: a pidfd tells of its end, and of the end of what it leaves, and no pidfd is
    handed over."""
    on = stage()
    adopt(on.old, orphan)
    new = on.trial()
    new.send("ready")
    new.expect("keeper", problem="")
    assert new.children["a#7"]["state"] == "running"
    orphan.end()
    assert new.expect("exited", child="a#7")["left"] is True
    assert alive(orphan.grandchild)
    new.send("upgrade")  # the next one has only what it left to watch
    new.expect("yield")
    new.send("yielded")
    last = on.keeper.supervisor()
    last.send("ready")
    last.expect("keeper", problem="")
    assert (last.children["a#7"]["state"], last.children["a#7"]["left"]) == ("exited", True)
    os.kill(orphan.grandchild, signal.SIGKILL)
    last.expect("gone", child="a#7")
    on.works(last)


@pytest.mark.parametrize("ends", ["all of it", "its main process", "what it had left"])
def test_an_adopted_child_ends_while_the_code_changes(
    stage: Make, orphan: Orphan, tmp_path: Path, ends: str
) -> None:
    """When nobody watches: between the old self and the new one."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    on = stage(gate=str(gate))
    adopt(on.old, orphan)
    if ends == "what it had left":
        orphan.end()
        assert on.old.expect("exited", child="a#7")["left"] is True
    new = on.trial()
    new.send("ready")
    wait_until(lambda: Path(f"/proc/{on.keeper.process.pid}/comm").read_text() == "sh\n", what="nobody is the keeper")
    ending = {"all of it": (orphan.pid, orphan.grandchild), "its main process": (orphan.pid,)}
    for pid in ending.get(ends, (orphan.grandchild,)):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in ending.get(ends, (orphan.grandchild,))))
    gate.write_text("go\n")
    new.expect("keeper", problem="")
    if ends != "what it had left":
        left = ends == "its main process"
        assert new.expect("exited", child="a#7")["left"] is left
        if left:
            os.kill(orphan.grandchild, signal.SIGKILL)
    if ends != "all of it":
        new.expect("gone", child="a#7")
    on.works(new)


def test_both_hear_what_happens_during_the_trial(stage: Make) -> None:
    on = stage()
    new = on.trial()
    pid = new.spawned("other#1")
    os.kill(pid, signal.SIGKILL)
    for each in (new, on.old):
        assert each.expect("exited", child="other#1")["pid"] == pid
    new.send("note", child="it#1", note="ready")
    new.leave(1)
    on.old.expect("keeper")
    on.old.expect("resume")
    assert on.old.children["it#1"]["note"] == "ready"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"check": FAILS}, "can't take over (exit status 3): this is no version for you"),
        ({"check": ["/nowhere/python"]}, "can't take over (exit status 127)"),
        ({"check": ENDLESS, "CHECK_SECONDS": 0.3}, "was not checked within"),
    ],
)
def test_a_check_that_fails_changes_nothing(stage: Make, settings: dict[str, Any], why: str) -> None:
    on = stage(**settings)
    on.begin()
    answer = on.old.expect("keeper")
    assert why in answer["problem"]
    assert (answer["upgrades"], answer["upgrading"]) == (0, False)
    assert not [message for message in on.old.messages if message["op"] in ("yield", "resume")]
    on.works(on.old)


def test_a_supervisor_that_can_not_put_its_work_down(stage: Make) -> None:
    on = stage(YIELD_SECONDS=0.3)
    on.begin()
    on.old.expect("yield")
    assert "did not put its work down" in on.old.expect("keeper")["problem"]
    on.old.expect("resume")
    on.old.send("yielded")  # too late: nobody waits for it
    on.works(on.old)


@pytest.mark.parametrize("how", ["exits", "is killed", "hangs", "wants the end", "talks nonsense"])
def test_a_successor_that_fails_is_taken_back(stage: Make, how: str) -> None:
    on = stage(TRIAL_SECONDS=0.5 if how == "hangs" else 60)
    new = on.trial()
    match how:
        case "exits":
            new.leave(3)
        case "is killed":
            new.die()
        case "wants the end":
            new.send("exit", status=0)
            new.sync()
            new.leave(0)
        case "talks nonsense":
            new.socket.sendall(b"\xff" * 100)
    answer = on.old.expect("keeper")
    assert gone(new.pid), "two may never write the same files"
    assert "the new supervisor" in answer["problem"]
    on.old.expect("resume")
    on.works(on.old)


def test_a_check_needs_a_descriptor(stage: Make) -> None:
    on = stage()
    before = resource.prlimit(on.keeper.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(on.keeper.process.pid, resource.RLIMIT_NOFILE, (0, before[1]))
    on.begin()
    assert "Too many open files" in on.old.expect("keeper")["problem"]
    resource.prlimit(on.keeper.process.pid, resource.RLIMIT_NOFILE, before)
    on.works(on.old)


def test_an_exec_that_fails_leaves_the_keeper_as_it_was(stage: Make) -> None:
    on = stage(again=["/nowhere/python"])
    new = on.trial()
    new.send("ready")
    answer = new.expect("keeper")
    assert answer["problem"] == "exec of /nowhere/python: No such file or directory"
    assert (answer["upgrades"], answer["upgrading"]) == (0, False)
    on.works(new)


@pytest.mark.parametrize("phase", ["check", "yield"])
def test_the_supervisor_dies_before_there_is_another(stage: Make, phase: str) -> None:
    on = stage(**({"check": ENDLESS} if phase == "check" else {}))
    on.begin()
    if phase == "yield":
        on.old.expect("yield")
    else:
        wait_until(lambda: len(on.keeper.below()) >= 3, what="the check runs")
    on.old.die()
    new = on.keeper.supervisor()
    assert (new.hello["last"], new.hello["upgrading"]) == ("killed by SIGKILL", False)
    new.send("ready")
    on.works(new)


def test_the_supervisor_dies_during_the_trial(stage: Make) -> None:
    """Then the one on trial is the only one."""
    on = stage()
    new = on.trial()
    on.old.die()
    assert new.expect("keeper")["upgrading"] is False
    new.send("ready")
    on.works(new)


def test_the_new_supervisor_dies_before_the_exec(stage: Make) -> None:
    on = stage(EXEC_SECONDS=60.0)
    new = on.trial()
    # Half a message: the keeper waits for the rest, and has not become new code yet.
    ready_and(new, b"\0\0\0\x20")
    wait_until(lambda: gone(on.old.pid))
    new.die()
    third = on.keeper.supervisor()
    assert (third.hello["upgrades"], third.hello["upgrading"]) == (0, False)
    third.send("ready")
    on.works(third)


def test_half_a_message_delays_the_exec(stage: Make) -> None:
    on = stage(EXEC_SECONDS=60.0)
    new = on.trial()
    text = b'{"op":"sync","number":3}'
    ready_and(new, len(text).to_bytes(4, "big"))
    wait_until(lambda: gone(on.old.pid))
    new.socket.sendall(b"\0" + text)
    new.expect("synced", number=3)
    on.upgraded(new)


def test_a_wire_that_is_never_silent(stage: Make) -> None:
    on = stage(EXEC_SECONDS=0.3)
    new = on.trial()
    text = b'{"op":"sync","number":3}'
    ready_and(new, len(text).to_bytes(4, "big"))
    assert "half said" in new.expect("keeper")["problem"]
    new.socket.sendall(b"\0" + text)
    new.expect("synced", number=3)
    on.works(new)


@pytest.mark.parametrize("phase", ["check", "yield", "trial"])
def test_the_end_is_asked_for_meanwhile(stage: Make, phase: str) -> None:
    on = stage(**({"check": ENDLESS} if phase == "check" else {}))
    if phase == "trial":
        on.trial()
    else:
        on.begin()
        if phase == "yield":
            on.old.expect("yield")
        else:
            wait_until(lambda: len(on.keeper.below()) >= 3, what="the check runs")
    os.kill(on.keeper.process.pid, signal.SIGTERM)
    assert "told to end" in on.old.expect("keeper")["problem"]
    on.old.expect("signal", signal=signal.SIGTERM)
    on.old.send("exit", status=0)
    assert on.keeper.wait() == 0


def test_the_end_is_asked_for_in_the_last_moment(stage: Make) -> None:
    on = stage(EXEC_SECONDS=60.0)
    new = on.trial()
    ready_and(new, b"\0\0")
    wait_until(lambda: gone(on.old.pid))
    os.kill(on.keeper.process.pid, signal.SIGTERM)
    assert "told to end" in new.expect("keeper")["problem"]
    new.expect("signal", signal=signal.SIGTERM)


def test_other_signals_wait_for_the_end_of_it(stage: Make) -> None:
    on = stage()
    new = on.trial()
    os.kill(on.keeper.process.pid, signal.SIGHUP)
    new.send("ready")
    new.expect("keeper", problem="")
    new.expect("signal", signal=signal.SIGHUP)
    assert not [message for message in on.old.messages if message["op"] == "signal"]


def test_many_signals_during_the_exec_are_not_lost(stage: Make) -> None:
    """They are blocked when the code changes: none kills the keeper, and the one that counts arrives."""
    on = stage()
    new = on.trial()
    new.send("ready")
    end = time.monotonic() + 20
    arrived = False
    while not arrived and time.monotonic() < end:
        os.kill(on.keeper.process.pid, signal.SIGUSR2)
        new.look(0.001)
        arrived = any(message["op"] == "keeper" for message in new.messages)
    os.kill(on.keeper.process.pid, signal.SIGUSR1)
    new.expect("signal", signal=signal.SIGUSR1)
    on.upgraded(new)


def test_a_second_one_is_refused(stage: Make) -> None:
    on = stage(check=ENDLESS)
    on.begin()
    on.begin()
    answer = on.old.expect("keeper")
    assert (answer["problem"], answer["upgrading"]) == ("an upgrade is under way", True)


def test_the_document(tmp_path: Path) -> None:
    children = {"house": 1, "number": 2, "children": []}
    rest: dict[str, Any] = {"cgroup": "", "signals": [], "supervisor": None, "starts": 1, "upgrades": 0, "name": ""}
    fd = handover.write({"held": {"a": 3}, "children": children, "open_files": [9, 9], **rest})
    assert handover.read(fd)["held"] == {"a": 3}
    os.close(fd)
    for content in (b"", b"{", b"[]", b'{"version": 99}', b'"x"', b"\xff\xfe", b"[" * 100_000):
        path = tmp_path / "document"
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(HandoverError) as caught:
            handover.read(file.fileno())
        assert isinstance(caught.value, ProcmanError)

"""The keeper is killed: its programs go on, and the next procmand finds them, adopts them or ends them."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from procman import queues
from procman.config import Address
from procman.daemon import CRASH_VARIABLE
from procman.keeper import tree
from tests.conftest import MakeDaemon
from tests.harness import RunningDaemon, User, command_line, free_port, wait_until

PLAIN = '[program.{}]\ncommand = "${{PYTHON}} -S -E ${{PROGRAMS}}/ready.py"\nstart_seconds = 0\n'
DOUBLE = """
    [program.daemonish]
    command = "${PYTHON} -S -E ${PROGRAMS}/double_fork.py --clean --ignore-term"
    start_seconds = 0
    stop_timeout = "300ms"
    """
ADOPTED = "adopted: the procmand before was killed"
WAYS = [pytest.param([], id="as-it-comes"), pytest.param(["--no-cgroup"], id="without-cgroup")]


def kill_keeper(running: RunningDaemon) -> None:
    """SIGKILL, as the kernel does for memory."""
    assert running.process is not None
    running.look()
    running.process.kill()
    running.process.wait(10)


def replace_daemon(running: RunningDaemon, *arguments: str) -> None:
    kill_keeper(running)
    running.start(*arguments)


def written_down(running: RunningDaemon, name: str) -> None:
    """Wait until the state file says that `name` is RUNNING, with the child that it has now."""
    wanted, pid = f'"{name}":{{"state":"RUNNING"', f'"pid":{running.status()[name]["pid"]},'
    wait_until(lambda: wanted in (text := state_file(running)) and pid in text, what=f"{name} is written down")


def state_file(running: RunningDaemon) -> str:
    """Its text; "" before the first write."""
    path = running.folder / "state" / "state.json"
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    return tree.read_process(pid) is not None


def number(running: RunningDaemon, name: str, word: str) -> int:
    """The number that a program printed last after `word`."""
    found = wait_until(lambda: re.findall(rf"{word} (\d+)", running.log(name)), what=f"{name} says {word}")
    return int(found[-1])


def ask(port: int) -> int:
    """The pid of whoever answers there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/")
    answer = int(connection.getresponse().read())
    connection.close()
    return answer


def lines(running: RunningDaemon, name: str) -> list[int]:
    return [int(line.split()[0]) for line in running.log(name).splitlines()]


@pytest.fixture(params=["root", "user"])
def who(request: pytest.FixtureRequest) -> User | None:
    """Run as who runs the tests, and as an ordinary user."""
    if request.param == "root":
        return None
    if os.geteuid() != 0:
        pytest.skip("an ordinary user runs the tests: the other one is the same")
    user: User = request.getfixturevalue("as_user")
    return user


def everything(port: int, folder: str) -> str:
    return f"""
    [program.site]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
    listen = "127.0.0.1:{port}"
    ready = {{ http = "/" }}
    [program.beside]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
    listen = "unix:{folder}/beside.sock"
    start_seconds = 0
    [program.writer]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/writer.py 300"
    start_seconds = 0
    [program.fast]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/writer.py 0 300000"
    start_seconds = 0
    log = {{ keep = 1000, max_size = "500MB" }}
    [program.said]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/notify.py"
    ready = {{ notify = true }}
    [program.once]
    command = "true"
    restart = "never"
    start_seconds = 0
    {PLAIN.format("down").replace("{{", "{").replace("}}", "}")}
    """


def test_all_goes_on(daemon: MakeDaemon, who: User | None) -> None:
    """Pids, uptimes, requests and lines, through two kills; then exits, restarts and stops work as ever."""
    port = free_port()
    running = daemon("", user=who, start=False)
    running.write_table(everything(port, str(running.folder)))
    running.start()
    names = ["site", "beside", "writer", "fast", "said"]
    for name in [*names, "down"]:
        running.wait_for(name)
    assert running.ctl("stop", "down").returncode == 0
    running.wait_for("once", "EXITED")
    written_down(running, "said")
    before = running.status()
    for _ in range(2):
        kill_keeper(running)
        assert ask(port) == before["site"]["pid"], "it serves while there is no procmand"
        running.start()
        assert ask(port) == before["site"]["pid"]
    after = running.status()
    for name in names:
        assert (name, after[name]["why"]) == (name, ADOPTED)
        for key in ("pid", "state", "started_at", "restarts", "wanted", "exit"):
            assert after[name][key] == before[name][key], (name, key)
        assert after[name]["uptime_seconds"] > before[name]["uptime_seconds"]
    assert (after["down"]["state"], after["down"]["wanted"]) == ("STOPPED", "down")
    assert after["once"]["state"] == "EXITED"
    events = [json.loads(line) for line in running.ctl("--json", "events").stdout.splitlines()]
    assert [event["name"] for event in events if event["type"] == "adopted"] == names
    wait_until(lambda: "done" in running.log("fast"), 60, "all of its lines")
    assert [int(line[:10]) for line in running.log("fast").splitlines()[:-1]] == list(range(1, 300_001))
    seen = lines(running, "writer")
    assert seen == list(range(1, len(seen) + 1)), "no line is lost or doubled"
    last = seen[-1]
    wait_until(lambda: lines(running, "writer")[-1] > last, what="it goes on")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(running.folder / "beside.sock"))
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(1000).endswith(f"\r\n{before['beside']['pid']}\n".encode())
    _ends_and_comes_back(running, port, before["site"]["pid"])


def _ends_and_comes_back(running: RunningDaemon, port: int, pid: int) -> None:
    os.kill(pid, signal.SIGSEGV)
    wait_until(lambda: running.status()["site"]["pid"] not in {None, pid}, 20)
    replaced = running.wait_for("site", timeout=20)
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 15):
        assert replaced["exit"]["signal"] == "SIGSEGV"
    else:  # its new parent may have been faster
        assert replaced["exit"]["reason"].startswith(("killed by SIGSEGV", "ended; how is not known"))
    assert replaced["restarts"] == 1
    assert ask(port) == replaced["pid"]
    for verb in ("restart", "stop"):
        assert running.ctl(verb, "beside", "said").returncode == 0
    assert running.ctl("start", "beside", "down").returncode == 0


@pytest.mark.parametrize("arguments", WAYS)
def test_stop_ends_the_whole_tree_of_an_adopted_one(daemon: MakeDaemon, arguments: list[str]) -> None:
    running = daemon(DOUBLE, start=False)
    running.start(*arguments)
    running.wait_for("daemonish")
    grandchild = number(running, "daemonish", "grandchild")
    written_down(running, "daemonish")
    replace_daemon(running, *arguments)
    main = running.status()["daemonish"]["pid"]
    running.seen.clear()
    assert alive(main)
    assert alive(grandchild)
    assert running.ctl("stop", "daemonish").returncode == 0
    assert not alive(main)
    assert not alive(grandchild)
    folders = Path(running.json("daemon", "status")["cgroup"] or "/nowhere").parent.glob("procman-*/daemonish*")
    assert not list(folders), "its cgroup is removed"


@pytest.mark.parametrize("arguments", WAYS)
def test_what_outlived_its_main_process_is_ended_before_the_next_start(
    daemon: MakeDaemon, arguments: list[str]
) -> None:
    running = daemon(PLAIN.format("other") + DOUBLE, start=False)
    running.start(*arguments)
    main, grandchild = running.wait_for("daemonish")["pid"], number(running, "daemonish", "grandchild")
    written_down(running, "daemonish")
    kill_keeper(running)
    os.kill(main, signal.SIGKILL)
    wait_until(lambda: not alive(main))
    running.start(*arguments)
    after = running.wait_for("daemonish", timeout=20)
    assert not alive(grandchild)
    assert after["pid"] != main
    assert after["exit"]["reason"].startswith(("ended; how is not known", "killed by SIGKILL"))
    assert after["restarts"] == 1
    assert running.ctl("why", "daemonish").returncode == 0


def test_all_is_found_without_the_state_file(daemon: MakeDaemon, who: User | None) -> None:
    """By tag and environment; what the state file alone knew is gone."""
    port = free_port()
    running = daemon("", user=who, start=False)
    running.write_table(everything(port, str(running.folder)) + DOUBLE)
    running.start()
    names = ["site", "beside", "writer", "said", "daemonish"]
    for name in names:
        running.wait_for(name)
    before, grandchild = running.status(), number(running, "daemonish", "grandchild")
    supervisor = running.supervisor_pid
    kill_keeper(running)
    wait_until(lambda: not alive(supervisor), what="nobody writes the file any more")
    (running.folder / "state" / "state.json").write_text("{")
    running.start()
    for name in names:
        after = running.wait_for(name)
        assert after["pid"] == before[name]["pid"], name
        assert after["why"].startswith(ADOPTED)
        assert abs(after["uptime_seconds"] - before[name]["uptime_seconds"]) < 60
    assert "counts as ready" in running.status()["said"]["why"]
    assert ask(port) == before["site"]["pid"]
    last = lines(running, "writer")[-1]
    wait_until(lambda: lines(running, "writer")[-1] > last, what="its pipe was found again")
    assert running.ctl("stop", "daemonish").returncode == 0
    assert not alive(grandchild)


def test_one_that_serves_for_long_is_asked_again_whether_it_does(daemon: MakeDaemon) -> None:
    """Without the state file nobody knows that it was ready. It gets all of start_timeout to show it, not what was left
    of that when it was started."""
    port = free_port()
    running = daemon(
        f"""
        [program.site]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/" }}
        start_timeout = "2s"
        """
    )
    pid = running.wait_for("site")["pid"]
    wait_until(lambda: running.status()["site"]["uptime_seconds"] > 2.2)
    kill_keeper(running)
    (running.folder / "state" / "state.json").unlink()
    running.start()
    assert running.wait_for("site")["pid"] == pid
    assert running.status()["site"]["restarts"] == 0


def test_of_a_damaged_state_file_the_rest_counts(daemon: MakeDaemon) -> None:
    """Each of these parts kept every daemon from starting, while the programs went on without one."""
    running = daemon(PLAIN.format("a") + PLAIN.format("b"))
    before = {name: running.wait_for(name) for name in "ab"}
    for name in "ab":
        written_down(running, name)
    supervisor = running.supervisor_pid
    kill_keeper(running)
    wait_until(lambda: not alive(supervisor), what="nobody writes the file any more")
    document = json.loads(state_file(running))
    document |= {"down": 5, "last": 10**30, "exit_status": [], "sockets": {"listener/x": 5}, "logs": {"log/a/out": 1}}
    document["processes"]["b"]["generation"] = "many"
    (running.folder / "state" / "state.json").write_text(json.dumps(document))
    running.start()
    for name in "ab":
        assert running.wait_for(name)["pid"] == before[name]["pid"]
    path = running.folder / "state" / "state.json"
    assert f"of the state file {path} this makes no sense and is left out: " in running.said()
    assert "down: must be an array, not 5" in running.said()
    assert json.loads(path.with_name("state.json.bad-1").read_text())["down"] == 5


def test_what_cannot_be_kept_is_said(daemon: MakeDaemon, as_user: User) -> None:
    port = free_port()
    table = f"""
    [program.secretive]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/secretive.py"
    listen = "127.0.0.1:{port}"
    ready = {{ http = "/" }}
    """
    running = daemon(table, user=as_user)
    pid = running.wait_for("secretive")["pid"]
    written_down(running, "secretive")
    replace_daemon(running)
    why = running.status()["secretive"]["why"]
    assert why.startswith(f"{ADOPTED}; its output is lost until it is started again")
    assert f"its listener 127.0.0.1:{port} can't be held until it is started again" in why
    assert f"127.0.0.1:{port} is in use by" in running.said()
    assert ask(port) == pid
    assert running.ctl("restart", "secretive").returncode == 0
    assert ask(port) == running.status()["secretive"]["pid"] != pid


def test_a_table_that_changed_in_between(daemon: MakeDaemon) -> None:
    """The table in force is the new one: what left it is ended, what changed is restarted, the rest goes on."""
    running = daemon("".join(map(PLAIN.format, ["gone", "changed", "same", "hot"])))
    for name in ("gone", "changed", "same", "hot"):
        running.wait_for(name)
    before = running.status()
    written_down(running, "hot")
    kill_keeper(running)
    changed = PLAIN.format("changed") + 'environment = { NEW = "1" }\n'
    hot = PLAIN.format("hot") + 'stop_timeout = "3s"\n'
    running.write_table(changed + PLAIN.format("same") + hot + PLAIN.format("new"))
    running.start()
    wait_until(lambda: running.status()["changed"]["pid"] not in {None, before["changed"]["pid"]}, 20)
    running.wait_for("new")
    after = running.status()
    assert after["same"]["pid"] == before["same"]["pid"]
    assert after["hot"]["pid"] == before["hot"]["pid"]
    wait_until(lambda: not alive(before["gone"]["pid"]), what="the removed one is ended")
    assert not alive(before["changed"]["pid"])


REPLACED = """
    [program.{name}]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/lives.py {name} ${{HOME}}"
    start_seconds = 0
    environment = {{ TURN = "{turn}" }}
    {keys}
    """
SLOW_STOP = """
    [program.slow]
    command = "${{PYTHON}} -S -E ${{PROGRAMS}}/ignore_term.py"
    start_seconds = 0
    stop_timeout = "{patience}"
    environment = {{ TURN = "{turn}" }}
    """


@pytest.mark.parametrize("half", ["stop", "start"])
def test_what_a_change_of_the_table_was_replacing_is_started(daemon: MakeDaemon, half: str) -> None:
    """The keeper is killed while a change has restarted some programs and stops another one, or when that starts.
    Whoever was up is up again, once, as the new table says; whoever was down stays down."""
    ups = ["plain", "by_hand"]

    def table(turn: int) -> str:
        manual = "autostart = false"
        programs = {"plain": "", "by_hand": manual, "never": manual, "down": ""} | ({} if turn else {"removed": ""})
        texts = [REPLACED.format(name=name, keys=keys, turn=turn) for name, keys in programs.items()]
        return "".join(texts) + SLOW_STOP.format(turn=turn, patience="1s" if turn else "1h")

    running = daemon(table(0))
    assert running.ctl("start", "by_hand").returncode == 0
    assert running.ctl("stop", "down").returncode == 0
    before = {name: running.wait_for(name)["pid"] for name in (*ups, "removed", "slow")}
    number(running, "slow", "ready")
    for name in before:
        written_down(running, name)
    running.write_table(table(1))
    os.kill(running.keeper_pid, signal.SIGHUP)
    running.wait_for("slow", "STOPPING")
    wait_until(lambda: '"replacing":["slow"]' in state_file(running))
    if half == "start":
        os.kill(before["slow"], signal.SIGKILL)
        wait_until(lambda: "slow: STARTING" in running.output.read_text().partition("read again")[2])
    replace_daemon(running)
    after = {name: running.wait_for(name, timeout=30)["pid"] for name in ups}
    if half == "stop":
        info = running.status()["slow"]
        assert (info["state"], info["pid"]) == ("STOPPING", before["slow"])
        os.kill(before["slow"], signal.SIGKILL)
    wait_until(lambda: running.status()["slow"]["pid"] not in {None, before["slow"]}, 30)
    after["slow"] = running.wait_for("slow")["pid"]
    for name, pid in after.items():
        assert pid != before[name]
        assert b"TURN=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"), name
    states = {name: info["state"] for name, info in running.status().items()}
    assert states == dict.fromkeys([*ups, "slow"], "RUNNING") | {"never": "STOPPED", "down": "STOPPED"}
    assert running.ctl("stop", "all").returncode == 0
    lives = (running.folder / "lives").read_text()
    assert "double" not in lives
    begun = {name: lives.count(f"{name} begin ") for name in (*ups, "never", "down", "removed")}
    assert begun == dict.fromkeys(ups, 2) | {"never": 0, "down": 1, "removed": 1}
    assert running.log("slow").count("ready ") == 2


STUBBORN = """
    [program.stubborn]
    command = "${PYTHON} -S -E ${PROGRAMS}/ignore_term.py"
    stop_timeout = "2s"
    start_seconds = 0
    """


def test_an_operators_stop_is_finished(daemon: MakeDaemon) -> None:
    running = daemon(PLAIN.format("other") + STUBBORN)
    number(running, "stubborn", "ready")
    pid = running.wait_for("stubborn")["pid"]
    assert running.ctl("stop", "--no-wait", "stubborn").returncode == 0
    wait_until(lambda: '"state":"STOPPING"' in state_file(running))
    replace_daemon(running)
    after = running.wait_for("stubborn", "STOPPED", 20)
    assert after["wanted"] == "down"
    assert not alive(pid)


def test_a_shutdown_is_not_continued(daemon: MakeDaemon) -> None:
    """Who starts a procmand wants the programs up, whatever the one before was about to do."""
    running = daemon(STUBBORN)
    number(running, "stubborn", "ready")
    pid = running.wait_for("stubborn")["pid"]
    os.kill(running.keeper_pid, signal.SIGTERM)
    wait_until(lambda: '"closing":true' in state_file(running))
    replace_daemon(running)
    assert wait_until(lambda: running.status()["stubborn"]["pid"] not in {None, pid}, 20)
    assert not alive(pid)


@pytest.mark.parametrize("lost", [False, True], ids=["with-state-file", "without-state-file"])
def test_houses_are_apart(daemon: MakeDaemon, lost: bool) -> None:
    """Two daemons with the same programs: only the state folder tells whose each is. One is killed and comes back,
    even without what it had written down, and with a table that makes it end one: the other one notices nothing."""
    table = PLAIN.format("it") + PLAIN.format("gone")
    one, other = daemon(table), daemon(table)
    for each in (one, other):
        each.wait_for("it")
        each.wait_for("gone")
        written_down(each, "gone")
    before, others = one.status(), other.status()
    supervisors = one.supervisor_pid, other.supervisor_pid
    kill_keeper(one)
    wait_until(lambda: not alive(supervisors[0]), what="nobody writes the file any more")
    if lost:
        (one.folder / "state" / "state.json").unlink()
    one.write_table(PLAIN.format("it"))
    one.start()
    after = one.status()
    assert set(after) == {"it"}, "nothing of the other one is listed"
    assert after["it"]["pid"] == before["it"]["pid"]
    wait_until(lambda: not alive(before["gone"]["pid"]), what="the one that left the table is ended")
    kept = {name: (info["pid"], info["restarts"], info["why"]) for name, info in other.status().items()}
    assert kept == {name: (info["pid"], info["restarts"], info["why"]) for name, info in others.items()}
    assert all(alive(info["pid"]) for info in others.values())
    assert other.supervisor_pid == supervisors[1]
    said = one.output.read_text()
    assert not [name for name, info in others.items() if str(info["pid"]) in re.findall(r"\d+", said)]
    # The other way round, with the first one running.
    replace_daemon(other)
    assert {name: info["pid"] for name, info in other.status().items()} == {n: i["pid"] for n, i in others.items()}
    assert one.status()["it"]["pid"] == before["it"]["pid"]


def upgrade(running: RunningDaemon) -> None:
    done = running.ctl("daemon", "upgrade")
    assert done.returncode == 0, (done.stderr, running.said())


def kill_supervisor(running: RunningDaemon) -> None:
    supervisor = running.supervisor_pid
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: running.supervisor_pid != supervisor)
    wait_until(running.answers)


def test_a_supervisor_that_dies_while_it_adopts(daemon: MakeDaemon, tmp_path: Path) -> None:
    """At every third crossing from its start on (`procman.crossing`): the next one adopts the rest, and still knows
    that the table has changed meanwhile."""
    crash = tmp_path / "crash"
    crash.touch()
    port = free_port()
    site = f"""
        [program.site]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/" }}
        """

    def table(turn: int) -> str:
        return site + PLAIN.format("changed") + f'environment = {{ TURN = "{turn}" }}'

    running = daemon(table(0), environment={CRASH_VARIABLE: str(crash)})
    running.wait_for("site")
    for at in range(1, 53, 3):
        for name in ("site", "changed"):
            written_down(running, name)
        before = {name: info["pid"] for name, info in running.status().items()}
        kill_keeper(running)
        running.write_table(table(at))
        crash.write_text(str(at))
        Path(f"{crash}.log").unlink(missing_ok=True)
        running.start()
        wait_until(lambda: "\n1 " in Path(f"{crash}.log").read_text(), what="one has died")
        assert ask(port) == before["site"]
        assert running.wait_for("site")["pid"] == before["site"]
        pid = before["changed"]
        wait_until(lambda pid=pid: not alive(pid), what="it is restarted")  # type: ignore[misc]
        running.wait_for("changed")


@pytest.mark.parametrize("arguments", WAYS)
@pytest.mark.parametrize("then", [upgrade, kill_supervisor, replace_daemon])
def test_adopted_ones_stay_in_care(
    daemon: MakeDaemon, then: Callable[[RunningDaemon], None], arguments: list[str]
) -> None:
    """After an adoption something else happens to the daemon: exits are noticed as before, a stop ends a whole tree,
    nothing runs twice."""
    running = daemon(PLAIN.format("plain") + PLAIN.format("same") + DOUBLE, start=False)
    running.start(*arguments)
    names = ["plain", "same", "daemonish"]
    before = {name: running.wait_for(name)["pid"] for name in names}
    grandchild = number(running, "daemonish", "grandchild")
    for name in names:
        written_down(running, name)
    replace_daemon(running, *arguments)
    assert {name: running.status()[name]["pid"] for name in names} == before
    if then is replace_daemon:
        for name in names:
            written_down(running, name)
        replace_daemon(running, *arguments)
    else:
        then(running)
    assert {name: running.status()[name]["pid"] for name in names} == before
    os.kill(before["plain"], signal.SIGKILL)
    wait_until(lambda: running.status()["plain"]["pid"] not in {None, before["plain"]}, 20, "its end is noticed")
    assert running.wait_for("plain")["restarts"] == 1
    assert running.status()["same"]["pid"] == before["same"]
    assert running.ctl("stop", "daemonish").returncode == 0
    assert not alive(before["daemonish"])
    assert not alive(grandchild)
    assert running.ctl("start", "daemonish").returncode == 0

    def starts() -> dict[str, int]:
        return {name: running.log(name).count("ready ") for name in names}

    expected = {"plain": 2, "same": 1, "daemonish": 2}
    wait_until(lambda: starts() == expected, what="each start is in the log")
    assert running.ctl("stop", "all").returncode == 0
    assert starts() == expected, "nothing was started twice"
    running.look()
    assert not [seen for seen in running.leftovers() if "programs/" in command_line(seen.pid)]


@pytest.fixture
def forger(as_user: User) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of an ordinary user who would like to be somebody's child."""
    made: list[subprocess.Popen[bytes]] = []
    yield made
    for process in made:
        process.kill()
        process.wait(10)


def test_a_forged_marker(daemon: MakeDaemon, as_user: User, forger: list[subprocess.Popen[bytes]]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs two users")
    running = daemon(PLAIN.format("it") + PLAIN.format("other"))
    pids = {name: running.wait_for(name)["pid"] for name in ("it", "other")}
    written_down(running, "other")
    house = tree.tag_of(pids["it"]) >> tree.NUMBER_BITS
    kill_keeper(running)
    tag = tree.TAG_BASE + (house << tree.NUMBER_BITS) + 99
    code = "import os; os.environ.update(PROCMAN_CHILD='it#99', PROCMAN_CHILD_PID=str(os.getpid())); "
    code += "os.execvp('sleep', ['sleep', '60'])"

    def forge() -> None:
        resource.setrlimit(resource.RLIMIT_RSS, (tag, tag))

    command = [as_user.python, "-S", "-c", code]
    forged = subprocess.Popen(command, preexec_fn=forge, **as_user.options())  # noqa: PLW1509 - no threads here
    forger.append(forged)
    wait_until(lambda: b"PROCMAN_CHILD=it#99" in Path(f"/proc/{forged.pid}/environ").read_bytes())
    running.start()
    after = running.status()
    assert {name: after[name]["pid"] for name in pids} == pids
    assert forged.poll() is None
    assert "says that it belongs to it, but not its user does" in running.said()


def test_no_request_fails(daemon: MakeDaemon) -> None:
    """A client that never stops, through three kills of the keeper: while it is away, and while it comes back."""
    port = free_port()
    running = daemon(
        f"""
        [program.site]
        command = "${{PYTHON}} -S -E ${{PROGRAMS}}/http_one.py"
        listen = "127.0.0.1:{port}"
        ready = {{ http = "/" }}
        """
    )
    pid = running.wait_for("site")["pid"]
    written_down(running, "site")
    answers: list[int | str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                answers.append(ask(port))
            except OSError as error:
                answers.append(repr(error))

    client = threading.Thread(target=load)
    client.start()
    try:
        for _ in range(3):
            replace_daemon(running)
            seen = len(answers)
            wait_until(lambda seen=seen: len(answers) > seen + 10, 30)  # type: ignore[misc]
    finally:
        stop.set()
        client.join(30)
    assert set(answers) == {pid}


def test_settings_of_a_listener_restart_nobody(daemon: MakeDaemon, tmp_path: Path) -> None:
    """What is changed while the program runs is no reason for a restart after the keeper was killed, whether it was
    changed before that or meanwhile; it is as the table says."""
    port, path = free_port(), f"/tmp/{tmp_path.name[-20:]}-{os.getpid()}.sock"

    def table(backlog: int, mode: str) -> str:
        listeners = f'[listener.a]\nbind = "127.0.0.1:{port}"\nbacklog = {backlog}\n'
        listeners += f'[listener.b]\nbind = "unix:{path}"\nmode = {mode}\n'
        return listeners + '[program.site]\ncommand = "sleep 1000"\nlisten = ["a", "b"]\nstart_seconds = 0\n'

    def looks() -> tuple[int, str]:
        address = Address("tcp", "127.0.0.1", port)
        return queues.queues([address])[address].room, oct(os.stat(path).st_mode & 0o777)

    running = daemon(table(100, "0o660"))
    pid = running.wait_for("site")["pid"]
    running.write_table(table(50, "0o600"))
    assert running.ctl("apply").returncode == 0
    written_down(running, "site")
    replace_daemon(running)
    assert (running.wait_for("site")["pid"], *looks()) == (pid, 50, "0o600")
    kill_keeper(running)
    running.write_table(table(60, "0o666"))
    running.start()
    assert (running.wait_for("site")["pid"], *looks()) == (pid, 60, "0o666")

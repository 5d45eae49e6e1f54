"""A whole program table: what it means, and what is said about one that is wrong.

The folders of tests/golden hold tables with mistakes and, in expected.txt, all that must be said about each: whole
messages, "DIR" standing for the folder. The rest reads tables from memory, on a machine that the test describes.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from procman import table
from procman.config import Account, Address, Config, Limits, Listener, Log, Program, Ready, Sampling
from procman.errors import ConfigError
from procman.files import Machine
from procman.units import doubtful

PROJECT = Path(__file__).parent.parent
GOLDEN = sorted((PROJECT / "tests" / "golden").iterdir())
USER = {"HOME": "/home/ann", "XDG_RUNTIME_DIR": "/run/user/1000"}
WWW = Account("www", 33, 33, (33, 4), "/srv/www")
MAIN = "/etc/procman.toml"


@dataclass(frozen=True)
class Paper:
    """A machine on paper: its files are given by the test."""

    files: Mapping[str, str]
    uid: int = 0
    environ: Mapping[str, str] = field(default_factory=lambda: {"HOME": "/root"})
    untrusted: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/root"
    python: str = "/opt/procman/bin/python"
    wsgi_script: str = "/opt/procman/wsgi.py"
    site: str = "/opt/procman/site-packages"

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self.files[path].encode(errors="surrogateescape")

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in self.files if fnmatch.fnmatchcase(path, pattern))

    def trusted(self, path: str) -> str:
        return self.untrusted.get(path, "")

    def real(self, folder: str) -> str:
        return self.links.get(folder, folder)

    def account(self, name_or_id: str) -> Account | None:
        root = Account("root", 0, 0, (0,), "/root")
        return {"www": WWW, "33": WWW, "root": root, "0": root}.get(name_or_id)

    def group(self, name_or_id: str) -> int | None:
        return {"root": 0, "www": 33, "33": 33, "adm": 4, "staff": 50}.get(name_or_id)


def parse(text: str, **machine: Any) -> Config:
    files = {MAIN: text, **machine.pop("files", {})}
    return table.parse(MAIN, Paper(files, **machine))


def problems(text: str, **machine: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, **machine)
    return str(caught.value).split("\n")


def program(text: str, **machine: Any) -> Program:
    """The one process of a table that has one program "p"."""
    [only] = parse(f"[program.p]\n{text}", **machine).programs
    return only


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_messages(folder: Path) -> None:
    machine = Machine(environ=USER, uid=1000, cwd="/")
    with pytest.raises(ConfigError) as caught:
        table.parse(str(folder / "procman.toml"), machine)
    said = str(caught.value).replace(str(folder), "DIR") + "\n"
    assert said == (folder / "expected.txt").read_text()


def test_a_missing_table() -> None:
    with pytest.raises(ConfigError) as caught:
        table.parse("nope.toml", Paper({}))
    assert str(caught.value) == "/root/nope.toml: can't be read: No such file or directory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = '\udcff'", f"{MAIN}:2: is not UTF-8: invalid start byte"),
        ("a = 1\nb = [\n", f"{MAIN}:2: no valid TOML: invalid value"),
        ("a = " + "9" * 5000, f"{MAIN}:1: no valid TOML: "),
        ("\na = " + "[" * 50_000, f"{MAIN}: is nested too deeply"),
    ],
)
def test_text_that_is_no_table(text: str, message: str) -> None:
    [problem] = problems(text)
    assert problem.startswith(message)


def test_a_bad_server_option_is_said_with_all_others() -> None:
    said = problems(
        """[program.p]
server = "gunicorn"
app = "x:y"
listen = ":8000"

[program.p.server_options]
bind = ":1"
max-requests = 10
daemon = true
"""
    )
    assert [line.split(": ")[:2] for line in said] == [
        [f"{MAIN}:7", "program.p.server_options.bind"],
        [f"{MAIN}:9", "program.p.server_options.daemon"],
    ]


def test_what_a_server_needs_is_said_at_the_program() -> None:
    [problem] = problems('[program.p]\nserver = "wsgi"\napp = "x:y"\n')
    assert problem.startswith(f"{MAIN}:1: program.p.listen: ")


def test_a_control_socket_that_is_too_long() -> None:
    [problem] = problems(
        f'daemon.socket = "/run/{"x" * 98}/s"\nprogram.p = {{ server = "gunicorn", app = "x:y", listen = ":8000" }}'
    )
    assert problem.startswith(f"{MAIN}:2: program.p")
    assert "107" in problem


def test_each_bad_key_is_said_once_for_all_instances() -> None:
    assert len(problems('program.p = { command = "x", instances = 5, stop_signal = "X" }')) == 1
    long = "x" * 110
    assert len(problems(f'program.p = {{ command = "x", instances = 5, listen = "unix:{long}${{instance}}" }}')) == 1


def test_a_default_socket_that_is_too_long() -> None:
    environ = {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/" + "x" * 100}
    [problem] = problems("[daemon]", uid=1000, environ=environ)
    assert problem.startswith(f"{MAIN}:1: daemon.socket: the path of the socket has 126 bytes")
    assert problem.endswith("; set a shorter one")
    assert parse('daemon.socket = "/run/s"', uid=1000, environ=environ).daemon.socket == "/run/s"


def test_as_root_a_file_that_others_can_write_is_refused() -> None:
    text = 'include = ["a.toml"]\n'
    files = {"/etc/a.toml": "bad = 1"}
    why = "/etc/a.toml can be written by everybody"
    said = problems(text, files=files, untrusted={"/etc/a.toml": why})
    assert said == [f"/etc/a.toml: refused, because it decides what root runs: {why}"]
    said = problems(text, files=files, untrusted={MAIN: "/etc belongs to user 5"})
    assert said == [f"{MAIN}: refused, because it decides what root runs: /etc belongs to user 5"]


@pytest.mark.parametrize("key", ["user", "group"])
def test_as_root_an_unknown_account(key: str) -> None:
    said = problems(f'[program.p]\ncommand = "x"\n{key} = "nobody-knows"')
    assert said == [f"{MAIN}:3: program.p.{key}: unknown {key} 'nobody-knows'"]


@settings(deadline=None)  # a busy machine is no failure
@given(st.data())
def test_any_value_for_any_key_is_a_problem_or_a_config(data: st.DataObject) -> None:
    """No key lets an exception through, whatever stands there."""
    place = data.draw(st.sampled_from([name for name in table.KEYS if name]))
    key = data.draw(st.sampled_from(table.KEYS[place]))
    leaf = st.one_of(
        st.text(max_size=5),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.sampled_from(["10s", "TERM", "${here}", "$", ":80", "wsgi", "unix:x", "file", "x:y"]),
        st.dates(),
    )
    value = data.draw(leaf | st.lists(leaf, max_size=2) | st.dictionaries(st.text(max_size=3), leaf, max_size=2))
    steps = place.split(".")
    if steps[0] in {"listener", "program"}:
        steps.insert(1, "x")
    document: dict[str, Any] = {"program": {"x": {"command": "x", "listen": ":80"}}}
    here = document
    for step in steps:
        here = here.setdefault(step, {})
    here[key] = value
    try:
        text = tomli_w.dumps(document)
    except UnicodeEncodeError:
        return
    try:
        parse(text)
    except ConfigError as error:
        assert error.problems
        assert all(problem.file == MAIN and problem.line > 0 for problem in error.problems)


def key_paths() -> list[tuple[str, str]]:
    return [(place, key) for place, keys in table.KEYS.items() if place for key in keys]


@pytest.mark.parametrize(("place", "key"), key_paths())
def test_every_key_is_read(place: str, key: str) -> None:
    """A date is good for no key: one that took it silently would do nothing."""
    server_keys = ("server", "app", "workers", "threads", "server_options", "middleware", "access_log")
    head = place.replace("listener", "listener.x").replace("program", "program.x", 1)
    text = f"[{head}]\n{key} = 1979-05-27\n"
    other = "" if key == "command" else 'server = "wsgi"\napp = "x:y"\n' if key in server_keys else 'command = "x"\n'
    if place == "program":
        text += "\n".join(line for line in other.split("\n") if not line.startswith(key))
    elif place.startswith("program"):
        text = f"[program.x]\n{other}{text}"
    line = text.split("\n").index(f"{key} = 1979-05-27") + 1
    assert any(one.startswith(f"{MAIN}:{line}: {head}.{key}: must be ") for one in problems(text))


# --- what is right ------------------------------------------------------------------------------------------------


def test_the_least_table() -> None:
    config = parse("")
    assert (config.path, config.files, config.listeners, config.programs) == (MAIN, (MAIN,), (), ())


def test_a_whole_command_program() -> None:
    config = parse(
        """
[listener.web]
bind = "unix:web.sock"
backlog = 10
mode = 0o600
owner = "www:adm"

[program.p]
command = "python -m 'my shop' --home ${HOME}"
listen = ["web", "[::1]:80"]
directory = "shop"
user = "www"
group = "staff"
umask = 0o077
environment = { B = "${program}:${instance}", A = "$$" }
env_file = "a.env"
inherit_environment = false
priority = -1
groups = ["sites"]
autostart = false
restart = "on-failure"
success_exit_codes = [0, 3, "TERM"]
start_seconds = "2s"
start_timeout = 30
start_retries = 3
restart_delay = "1s"
restart_delay_max = "10s"
stop_signal = "INT"
stop_timeout = "1m"
kill = "main"
reload = "signal:HUP"
ready = { http = "/healthz" }

[program.p.log]
path = "x/p.log"
stderr = "separate"
max_size = "1KB"
rotate_every = "weekly"
keep = 0
keep_total = "2KB"
compress = "none"
on_error = "block"
mode_bits = 0o600

[program.p.limits]
open_files = 100
processes = 0
core = 0
nice = -5
oom_score_adj = 100
cpu_affinity = [3, 1, 3]
no_new_privileges = false
"""
    )
    there = Address("unix", path="/etc/web.sock")
    web = Listener(name="unix:/etc/web.sock", label="web", address=there, backlog=10, mode=0o600, uid=33, gid=4)
    assert config.listeners == (web, Listener(name="[::1]:80", address=Address("tcp", host="::1", port=80)))
    assert config.programs == (
        Program(
            name="p",
            program="p",
            argv=("python", "-m", "my shop", "--home", "/root"),
            listen=("unix:/etc/web.sock", "[::1]:80"),
            directory="/etc/shop",
            account=Account("www", 33, 50, (50, 4), "/srv/www"),
            umask=0o077,
            environment=(("A", "$"), ("B", "p:1")),
            env_files=("/etc/a.env",),
            inherit_environment=False,
            priority=-1,
            groups=("sites",),
            autostart=False,
            restart="on-failure",
            success_exit_codes=frozenset({0, 3, -15}),
            start_seconds=2.0,
            start_timeout=30.0,
            start_retries=3,
            restart_delay=1.0,
            restart_delay_max=10.0,
            stop_signal=2,
            stop_timeout=60.0,
            kill="main",
            reload="signal",
            reload_signal=1,
            ready=Ready(kind="http", address=web.address, path="/healthz", host="localhost"),
            log=Log(
                path="/etc/x/p.log",
                error_path="/etc/x/p.err.log",
                stderr="separate",
                max_size=1024,
                rotate_every="weekly",
                keep=0,
                keep_total=2048,
                compress="none",
                on_error="block",
                mode_bits=0o600,
            ),
            limits=Limits(
                open_files=100, core=0, nice=-5, oom_score_adj=100, cpu_affinity=(1, 3), no_new_privileges=False
            ),
        ),
    )


def test_what_a_program_is_when_nothing_is_said() -> None:
    expected = Program(name="p", program="p", argv=("x",), directory="/etc", log=Log(path="/var/log/procman/p.log"))
    assert program('command = "x"') == expected


@pytest.mark.parametrize(
    ("written", "argv"),
    [
        ("command = \"a 'b c'\"", ("a", "b c")),
        ('command = ["a", "b c"]', ("a", "b c")),
        ('command = ["a", ""]', ("a", "")),
        ('command = "a ${SPACED}"', ("a", "b c")),  # a value is never split
        ('command = "a | b"\nshell = true', ("/bin/sh", "-c", "a | b")),
        ('command = "a"\nshell = false', ("a",)),
    ],
)
def test_the_words_of_a_command(written: str, argv: tuple[str, ...]) -> None:
    assert program(written, environ={"SPACED": "b c"}).argv == argv


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('http = "/"', Ready(kind="http", address=Address("tcp", port=80), path="/", host="localhost:80")),
        (
            'http = "http://[::1]:81/x"',
            Ready(kind="http", address=Address("tcp", host="::1", port=81), path="/x", host="[::1]:81"),
        ),
        (
            'http = "/", host = "shop.example"',
            Ready(kind="http", address=Address("tcp", port=80), path="/", host="shop.example"),
        ),
        (
            'http = "http://127.0.0.1:81/", host = "shop.example:8000"',
            Ready(kind="http", address=Address("tcp", host="127.0.0.1", port=81), path="/", host="shop.example:8000"),
        ),
        ('tcp = "db:5432"', Ready(kind="tcp", address=Address("tcp", host="db", port=5432))),
        ('unix = "x.sock"', Ready(kind="unix", address=Address("unix", path="/etc/x.sock"))),
        ('command = "test -e x"', Ready(kind="command", argv=("test", "-e", "x"))),
        ('command = ["test"]', Ready(kind="command", argv=("test",))),
        ('log = "^ready$"', Ready(kind="log", pattern="^ready$")),
        ("notify = true", Ready(kind="notify")),
    ],
)
def test_the_probes(written: str, expected: Ready) -> None:
    one = program(f'command = "x"\nlisten = ":80"\nready = {{ {written} }}')
    assert (one.ready, one.notify) == (expected, expected.kind == "notify")


def test_only_a_file_has_paths() -> None:
    for mode in ("inherit", "discard"):
        log = program(f'command = "x"\nlog = {{ mode = "{mode}", stderr = "separate" }}').log
        assert (log.mode, log.path, log.error_path, log.stderr) == (mode, "", "", "separate")


def test_instances_are_numbered_and_have_their_own_files() -> None:
    config = parse(
        """[program.shop]
command = ["shop", "${instance}"]
instances = 3
listen = ["unix:shop-${instance}.sock", ":80"]
environment.N = "${instance}"
"""
    )
    assert [(one.name, one.instance, one.argv[1], one.log.path) for one in config.programs] == [
        (f"shop:{n}", n, str(n), f"/var/log/procman/shop-{n}.log") for n in (1, 2, 3)
    ]
    assert [one.listen for one in config.programs] == [(f"unix:/etc/shop-{n}.sock", ":80") for n in (1, 2, 3)]
    assert len(config.listeners) == 4  # :80 is shared


def test_servers_get_what_they_need() -> None:
    config = parse(
        """[listener.web]
bind = ":80"

[program.blog]
server = "wsgi"
app = "blog:app"
listen = "web"
workers = 2
middleware = ["a:b", "c:d"]

[program.shop]
server = "gunicorn"
app = "shop:app"
listen = "web"
virtualenv = "venv"
stop_signal = "QUIT"
stop_timeout = "99s"
environment = { X = "1" }
ready = { tcp = ":81" }

[program.old]
server = "uwsgi"
app = "old:app"
listen = "web"
""",
        files={"/etc/venv/bin/python": ""},
    )
    blog1, blog2, shop, old = config.programs
    assert [one.name for one in config.programs] == ["blog:1", "blog:2", "shop", "old"]
    assert [one.server for one in config.programs] == ["wsgi", "wsgi", "gunicorn", "uwsgi"]
    assert {one.listen for one in config.programs} == {(":80",)}
    assert [word.replace("blog:1.wsgi", "blog:2.wsgi") for word in blog1.argv] == list(blog2.argv)
    assert blog1.argv[0] == "/opt/procman/bin/python"
    assert re.search("a:b .*c:d", " ".join(blog1.argv))
    assert (blog1.ready.kind, blog1.notify) == ("notify", True)
    assert shop.argv[0] == "/etc/venv/bin/python"
    assert (shop.stop_signal, shop.stop_timeout, shop.ready.kind) == (3, 99.0, "tcp")
    assert ("X", "1") in shop.environment
    assert old.stop_timeout > 10


def test_defaults_are_under_every_program() -> None:
    config = parse(
        """
include = ["conf.d/*.toml"]
[defaults]
stop_timeout = 3
directory = "work"
environment = { A = "d", B = "d" }
log = { keep = 3, max_size = "1KB" }
ready = { tcp = ":2" }
workers = 9
command = "default"
[program.p]
environment = { B = "p" }
log.keep = 5
[program.quiet]
log.mode = "discard"
""",
        files={"/etc/conf.d/q.toml": '[program.q]\nserver="wsgi"\napp="x:y"\nlisten=":7"\nready={unix="q"}'},
    )
    p, quiet, q = config.programs[:3]
    assert (p.argv, p.stop_timeout, p.directory, p.ready.kind) == (("default",), 3.0, "/etc/work", "tcp")
    assert p.environment == (("A", "d"), ("B", "p"))
    assert (p.log.keep, p.log.max_size) == (5, 1024)
    assert quiet.log == Log(mode="discard", keep=3, max_size=1024)
    # "work" is relative to the file it stands in, "q" to the included one; its server hides the default command
    assert (q.directory, q.ready.address, q.server) == ("/etc/work", Address("unix", path="/etc/conf.d/q"), "wsgi")
    assert len(config.programs) == 2 + 9


def test_a_command_hides_the_server_of_the_defaults() -> None:
    text = '[defaults]\nserver = "gunicorn"\napp = "x:y"\naccess_log = false\n[program.p]\ncommand = "x"'
    assert [(one.argv, one.server) for one in parse(text).programs] == [(("x",), "")]


def test_included_files_come_in_sorted_order_and_once() -> None:
    config = parse(
        'include = ["conf.d/*.toml", "conf.d/b.toml", "/etc/*.toml"]',
        files={f"/etc/conf.d/{name}.toml": f'program.{name}.command = "x"' for name in "ba"},
    )
    assert config.files == (MAIN, "/etc/conf.d/a.toml", "/etc/conf.d/b.toml")
    assert [one.name for one in config.programs] == ["a", "b"]
    assert [one.directory for one in config.programs] == ["/etc/conf.d"] * 2


def test_a_folder_may_have_the_characters_of_a_pattern() -> None:
    files = {"/srv/[x]/procman.toml": 'include = ["*.d/*"]', "/srv/[x]/a.d/b": "", "/srv/x/a.d/c": ""}
    assert table.parse("/srv/[x]/procman.toml", Paper(files)).files == ("/srv/[x]/procman.toml", "/srv/[x]/a.d/b")


@pytest.mark.parametrize(
    ("uid", "environ", "expected"),
    [
        (0, {}, ("/run/procman/procman.sock", "/var/lib/procman", "/var/log/procman")),
        (
            1000,
            USER,
            ("/run/user/1000/procman/procman.sock", *["/home/ann/.local/state/procman" + end for end in ("", "/log")]),
        ),
        (
            1000,
            {"HOME": "/h", "XDG_STATE_HOME": "/s"},
            ("/tmp/procman-1000/procman.sock", "/s/procman", "/s/procman/log"),
        ),
        (
            33,
            {"XDG_STATE_HOME": "relative"},
            ("/tmp/procman-33/procman.sock", "/srv/www/.local/state/procman", "/srv/www/.local/state/procman/log"),
        ),
    ],
)
def test_where_the_daemon_lives(uid: int, environ: dict[str, str], expected: tuple[str, str, str]) -> None:
    daemon = parse("", uid=uid, environ=environ).daemon
    assert (daemon.socket, daemon.state_dir, daemon.log_dir) == expected


def test_the_settings_of_the_daemon() -> None:
    daemon = parse(
        """[daemon]
identifier = "shops"
socket = "${state_dir}/s"
state_dir = "state"
log_dir = "${state_dir}/logs"
socket_group = "staff"
log_level = "debug"
umask = 0o077
open_files = 1000
shutdown_timeout = "1m"
exit_when = "all-exited"
sampling = { interval = 0, memory = "pss" }
"""
    ).daemon
    assert (daemon.identifier, daemon.socket, daemon.state_dir) == ("shops", "/etc/state/s", "/etc/state")
    assert (daemon.log_dir, daemon.socket_gid, daemon.socket_mode) == ("/etc/state/logs", 50, 0o660)
    assert (daemon.log_level, daemon.umask, daemon.open_files) == ("debug", 0o077, 1000)
    assert (daemon.shutdown_timeout, daemon.exit_when) == (60.0, "all-exited")
    assert daemon.sampling == Sampling(0.0, "pss")


@pytest.mark.parametrize(
    ("written", "mode"),
    [
        ("", 0o600),
        ('socket_group = "staff"', 0o660),
        ('read_only_group = "adm"', 0o666),
        ('read_only_group = "adm"\nsocket_mode = 0o640', 0o640),
        ('socket_group = ""', 0o600),
    ],
)
def test_who_may_connect(written: str, mode: int) -> None:
    assert parse(f"[daemon]\n{written}").daemon.socket_mode == mode


def test_the_socket_of_a_table_with_mistakes() -> None:
    files = {MAIN: '[daemon]\nsocket = "s"\nbad = 1\n[program.x]'}
    assert table.socket_path(MAIN, Paper(files)) == "/etc/s"
    assert table.socket_path(MAIN, Paper({MAIN: ""})) == "/run/procman/procman.sock"
    for text in ("[daemon]\nsocket = 1\nbad = 1", "["):
        with pytest.raises(ConfigError) as caught:
            table.socket_path(MAIN, Paper({MAIN: text}))
        assert len(caught.value.problems) == 1


def test_unnamed_environment_and_order_do_not_change_a_program() -> None:
    one = program('command = "x"\nenvironment = { A = "1", B = "2" }')
    assert one == program('command = "x"\nenvironment = { B = "2", A = "1" }')


# --- the shipped table and the documentation ----------------------------------------------------------------------


def documented(text: str) -> set[str]:
    """The keys of docs/configuration.md: each has a heading `table.key`."""
    return set(re.findall(r"^#+ `([^`]+)`$", text, re.MULTILINE))


def known() -> set[str]:
    return {f"{place}.{key}" if place else key for place, keys in table.KEYS.items() for key in keys}


def test_the_documentation_has_every_key_and_no_other() -> None:
    assert documented((PROJECT / "docs" / "configuration.md").read_text()) == known()


def test_every_example_of_the_documentation_is_a_table() -> None:
    text = (PROJECT / "docs" / "configuration.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) > 10
    for example in examples:
        parse(example, environ={"HOME": "/root", "SECRET": "x"}, files=DOCUMENTED_FILES)


DOCUMENTED_FILES = {
    "/srv/shop/venv/bin/python": "",
    "/etc/conf.d/shop.toml": "",
    "/etc/conf.d/blog.toml": "",
}


def test_a_canary_of_the_defaults_is_for_those_that_can_have_one() -> None:
    config = parse(
        """
[defaults]
canary = "10% for 30s"
[program.a]
command = "x"
listen = "127.0.0.1:8000"
[program.b]
command = "x"
listen = "unix:/run/b.sock"
[program.c]
command = "x"
[program.d]
command = "x"
listen = "127.0.0.1:8001"
canary = "0%"
"""
    )
    found = {program.name: (program.canary, program.canary_seconds) for program in config.programs}
    assert found == {"a": (0.1, 30.0), "b": (0.0, 0.0), "c": (0.0, 0.0), "d": (0.0, 0.0)}


def test_the_shipped_table_has_every_key_with_its_default() -> None:
    """A key that can't be active beside the others stands there as a comment: `# key = value`."""
    text = (PROJECT / "etc" / "procman.toml").read_text()
    active = parse(text)
    every = re.sub(r"^# ([a-z_]+ = |\[)", r"\1", text, flags=re.MULTILINE)
    assert keys_of(every) == known()
    assert active.daemon == parse("").daemon
    [one] = [one for one in active.programs if one.program == "worker"]
    assert one == Program(
        name="worker",
        program="worker",
        argv=("python", "-m", "shop.worker"),
        directory="/etc",
        log=Log(path="/var/log/procman/worker.log"),
    )


def keys_of(text: str) -> set[str]:
    """The keys in a table, without the names of programs and listeners; those of [defaults] are a program's."""
    document = tomllib.loads(text)
    found = set(document)
    tables: list[tuple[str, dict[str, Any]]] = [("daemon", document["daemon"]), ("program", document["defaults"])]
    for kind in ("listener", "program"):
        tables += [(kind, content) for content in document[kind].values()]
    for place, content in tables:
        for key, value in content.items():
            found.add(f"{place}.{key}")
            if f"{place}.{key}" in table.KEYS:
                tables.append((f"{place}.{key}", value))
    return found


# --- servers ----------------------------------------------------------------------------------------------------------


def test_counts_of_the_defaults_are_for_servers_that_have_them() -> None:
    config = parse(
        """
        [defaults]
        workers = 2
        threads = 3
        [program.a]
        server = "daphne"
        app = "a:app"
        listen = ":8001"
        [program.b]
        server = "uvicorn"
        app = "b:app"
        listen = ":8002"
        [program.c]
        server = "gunicorn"
        app = "c:app"
        listen = ":8003"
        """
    )
    daphne, uvicorn, gunicorn = (program.argv for program in config.programs)
    assert not any("workers" in word or "threads" in word for word in daphne)
    assert "--workers=2" in uvicorn
    assert not any("threads" in word for word in uvicorn)
    assert {"--workers=2", "--threads=3"} <= set(gunicorn)


def test_a_count_of_its_own_that_a_server_does_not_have_is_wrong() -> None:
    text = """[program.a]
        server = "daphne"
        app = "a:app"
        listen = ":8001"
        workers = 2
        threads = 3
        """
    assert [line.partition(": ")[0].rpartition(":")[2] for line in problems(text)] == ["5", "6"]


def test_who_says_how_to_ask_may_use_tls() -> None:
    text = 'server = "uvicorn"\napp = "a:app"\nlisten = ":8443"\nserver_options = { ssl-certfile = "/c" }\n'
    assert "which ssl-certfile rules out" in problems(f"[program.p]\n{text}")[0]
    assert "--ssl-certfile=/c" in program(text + 'ready = { command = ["true"] }').argv


def test_warnings_stand_where_their_keys_do(tmp_path: Path) -> None:
    """In the file of their program, in [defaults], or else at the nearest thing around them."""
    tmp_path.chmod(0o755)
    main, more = tmp_path / "procman.toml", tmp_path / "more.toml"
    main.write_text('include = ["more.toml"]\n[defaults]\numask = 7\n[program.a]\ncommand = "true"\npriority = 3\n')
    more.write_text('[program.b]\ncommand = "true"\n\npriority = 4\n')

    class Trusting(Machine):
        def trusted(self, path: str) -> str:
            return ""

    config = table.parse(str(main), Trusting())
    doubts = [(("program", name, key), "odd") for name in "ab" for key in ("priority", "umask", "log")]
    assert [str(one) for one in table.located(config, Trusting(), doubts)] == [
        f"{more}:1: warning: program.b.log: odd",
        f"{more}:4: warning: program.b.priority: odd",
        f"{main}:3: warning: program.a.umask: odd",
        f"{main}:3: warning: program.b.umask: odd",
        f"{main}:4: warning: program.a.log: odd",
        f"{main}:6: warning: program.a.priority: odd",
    ]


@pytest.mark.parametrize(
    ("lines", "reload", "doubt"),
    [
        ('listen = ":8000"\nready = { http = "/" }', "overlap", ""),
        ('listen = ":8000"\nready = { http = "http://127.0.0.1:8000/health" }', "overlap", ""),
        ('listen = [":8000", "unix:/s"]\nready = { log = "up" }', "overlap", ""),
        # Whoever is there may answer: the process before, or nginx.
        ('listen = ":8000"\nready = { http = "http://127.0.0.1:8001/health" }', "restart", ""),
        ('listen = ":8000"\nready = { tcp = ":8001" }', "restart", ""),
        ('listen = ":8000"\nready = { unix = "/s" }', "restart", ""),
        ('listen = ":8000"\nready = { command = "true" }', "restart", ""),
        ('listen = ":8000"\nreload = "overlap"\nready = { tcp = ":8001" }', "overlap", "at :8001, which is no"),
        ('listen = ":8000"\nreload = "overlap"\nready = { command = "true" }', "overlap", "ready asks a command: "),
        ('reload = "overlap"\nready = { tcp = ":8001" }', "overlap", "ready asks at :8001"),
    ],
)
def test_an_overlap_is_usual_where_the_probe_is_answered_by_the_successor(lines: str, reload: str, doubt: str) -> None:
    config = parse(f'[program.p]\ncommand = "serve"\n{lines}')
    assert config.programs[0].reload == reload
    found = doubtful(config)
    assert [key for key, _ in found] == [("program", "p", "reload")] * bool(doubt)
    assert not doubt or doubt in found[0][1]


@pytest.mark.parametrize("first", [True, False])
def test_the_second_socket_of_a_listener_has_a_place(first: bool) -> None:
    one = '[program.one]\ncommand = "x"\nlisten = "unix:/run/a.sock"\n'
    two = '[program.two]\ncommand = "x"\nlisten = "unix:/run/a.sock~"\n'
    [problem] = problems(one + two if first else two + one)
    assert f"{MAIN}:{6 if first else 3}: program.two.listen: unix:/run/a.sock~ is where a reload opens" in problem
    assert f"of program.one, at {MAIN}:{3 if first else 6}: give program.two another path" in problem


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ("web.log", "web.log.1", "/l/web.log.1 is a name that procman gives to files of /l/web.log, the log of"),
        ("web.log", "web.log.12.gz", "/l/web.log.12.gz is a name that procman gives to files of /l/web.log"),
        ("web.log.next", "web.log", "/l/web.log.next is a name that procman gives to files of /l/web.log"),
        ("web.log", "web.log.partial", "/l/web.log.partial is a name that procman gives to files of /l/web.log"),
        ("web.log", "web.log.gz.partial", "/l/web.log.gz.partial is a name that procman gives to files of /l/web.log"),
        ("web.log", "/link/web.log", "/link/web.log is the same file as /l/web.log, the log of program 'a'"),
        ("web.log", "/link/web.log.1", "/link/web.log.1 is a name that procman gives to files of /l/web.log"),
        ("x.log", "procmand.log", "/l/procmand.log is the log of procmand itself: choose another path"),
        ("x.log", "/link/procmand.log", "/link/procmand.log is the same file as /l/procmand.log, the log of procmand"),
        ("x.log", "procmand.log.1", "/l/procmand.log.1 is a name that procman gives to files of /l/procmand.log"),
    ],
)
def test_two_logs_that_would_take_each_others_files(one: str, two: str, said: str) -> None:
    text = f"""
        [daemon]
        log_dir = "/l"
        [program.a]
        command = "x"
        log.path = "${{log_dir}}/{one}"
        [program.b]
        command = "x"
        log.path = "{two if two.startswith("/") else f"${{log_dir}}/{two}"}"
        """
    found = problems(text, links={"/link": "/l"})
    assert len(found) == 1
    assert said in found[0]
    assert ".log.path: " in found[0]


def test_a_program_with_the_name_of_the_daemon_needs_another_log() -> None:
    assert "is the log of procmand itself" in problems('[program.procmand]\ncommand = "x"')[0]
    parse('[program.procmand]\ncommand = "x"\nlog.path = "elsewhere.log"')


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/dev/stdout", '/dev/stdout is no file that can be rotated: use mode = "inherit" instead'),
        ("/dev/fd/2", 'use mode = "inherit" instead'),
        ("/dev/null", 'use mode = "discard" instead'),
        ("/dev/log", 'use mode = "syslog" instead'),
        ("logs/", "/etc/logs/ is a folder: give the path of a file in it"),
    ],
)
def test_what_is_no_file_for_a_log(path: str, said: str) -> None:
    found = problems(f'[program.a]\ncommand = "x"\nlog.path = "{path}"')
    assert len(found) == 1
    assert found[0].startswith(f"{MAIN}:3: program.a.log.path: ")
    assert said in found[0]

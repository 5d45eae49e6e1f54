"""From a program to the request for a child: what its environment holds, and which line of an env file means what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procman.config import Account, Limits, Log, Program
from procman.launch import (
    DEFAULT_PATH,
    PRIVATE,
    child_id,
    environment,
    log_pipes,
    parse_env_file,
    request,
    split_child_id,
)

WEB = Program(name="web:2", program="web", instance=2, argv=("web", "-v"))
OWN = {"PROCMAN_PROGRAM": "web", "PROCMAN_PROCESS": "web:2", "PROCMAN_INSTANCE": "2"}
WWW = Account("www", 33, 34, (34, 35), "/srv")
HERS = {"HOME": "/srv", "USER": "www", "LOGNAME": "www"}

ENVIRONMENTS: list[tuple[str, Program, dict[str, str], dict[str, str], str, dict[str, str]]] = [
    ("nothing at all", WEB, {}, {}, "", {"PATH": DEFAULT_PATH}),
    ("all of the daemon's", WEB, {"PATH": "/b", "A": "1"}, {}, "", {"PATH": "/b", "A": "1"}),
    (
        "only what everybody needs",
        replace(WEB, inherit_environment=False),
        {"PATH": "/b", "A": "1", "TZ": "UTC", "HOME": "/root"},
        {},
        "",
        {"PATH": "/b", "TZ": "UTC", "HOME": "/root"},
    ),
    ("what the service manager said", WEB, dict.fromkeys(PRIVATE, "x"), {}, "", {"PATH": DEFAULT_PATH}),
    ("the user's home", replace(WEB, account=WWW), {"HOME": "/root"}, {}, "", {"PATH": DEFAULT_PATH, **HERS}),
    (
        "its virtualenv comes first",
        replace(WEB, virtualenv="/v"),
        {"PATH": "/b", "PYTHONHOME": "/p"},
        {},
        "",
        {"PATH": "/v/bin:/b", "VIRTUAL_ENV": "/v"},
    ),
    ("env_file over the daemon", WEB, {"A": "1", "PATH": ""}, {"A": "2"}, "", {"A": "2", "PATH": ""}),
    (
        "env_file over user and virtualenv",
        replace(WEB, account=WWW, virtualenv="/v"),
        {},
        {"HOME": "/h", "PATH": "/p", "VIRTUAL_ENV": ""},
        "",
        {**HERS, "HOME": "/h", "PATH": "/p", "VIRTUAL_ENV": ""},
    ),
    (
        "environment over env_file",
        replace(WEB, environment=(("A", "3"),)),
        {"A": "1", "PATH": ""},
        {"A": "2"},
        "",
        {"A": "3", "PATH": ""},
    ),
    (
        "procman's own over all",
        replace(WEB, environment=(("PROCMAN_PROCESS", "x"), ("NOTIFY_SOCKET", "x"))),
        {"PROCMAN_PROGRAM": "x", "PATH": ""},
        {"PROCMAN_INSTANCE": "x"},
        "/run/n",
        {"PATH": "", "NOTIFY_SOCKET": "/run/n"},
    ),
]


@pytest.mark.parametrize(
    ("program", "inherited", "files", "notify", "expected"),
    [case[1:] for case in ENVIRONMENTS],
    ids=[case[0] for case in ENVIRONMENTS],
)
def test_environment(
    program: Program, inherited: dict[str, str], files: dict[str, str], notify: str, expected: dict[str, str]
) -> None:
    before = dict(inherited)
    assert environment(program, inherited, files, notify) == expected | OWN
    assert inherited == before


def test_request() -> None:
    asked = request(WEB, 7, {"A": "1"}, {"web": "listener/web", "api": "listener/api@web:2"})
    assert asked == {
        "child": "web:2#7",
        "argv": ["web", "-v"],
        "env": {"A": "1"},
        "directory": "/",
        "umask": 0o022,
        "stdout": "log/web:2/out/w",
        "stderr": "log/web:2/out/w",
        "listen": [("web", "listener/web"), ("api", "listener/api@web:2")],
        "limits": {"no_new_privileges": True},
        "kill": "tree",
    }


def test_request_of_somebody_else_with_limits() -> None:
    limits = Limits(open_files=0, nice=-5, cpu_affinity=(0, 1), no_new_privileges=False)
    asked = request(replace(WEB, account=WWW, limits=limits, kill="main"), 1, {}, {})
    assert (asked["uid"], asked["gid"], asked["groups"], asked["kill"]) == (33, 34, [34, 35], "main")
    assert asked["limits"] == {"open_files": 0, "nice": -5, "cpu_affinity": (0, 1), "no_new_privileges": False}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (Log(), ("log/web:2/out", "log/web:2/out")),
        (Log(stderr="separate"), ("log/web:2/out", "log/web:2/err")),
        (Log(stderr="discard"), ("log/web:2/out", None)),
        (Log(mode="inherit"), ("log/web:2/out", "log/web:2/out")),
        (Log(mode="discard", stderr="separate"), (None, None)),
    ],
)
def test_log_pipes(log: Log, expected: tuple[str | None, str | None]) -> None:
    program = replace(WEB, log=log)
    assert log_pipes(program) == expected
    asked = request(program, 1, {}, {})
    assert (asked["stdout"], asked["stderr"]) == tuple(name and f"{name}/w" for name in expected)


@given(st.text(), st.integers(min_value=0, max_value=10**18 - 1))
def test_child_ids_round_trip(name: str, generation: int) -> None:
    assert split_child_id(child_id(name, generation)) == (name, generation)


@given(st.text(alphabet="a#²٣1-"))
def test_what_is_no_child_id(text: str) -> None:
    _, generation = split_child_id(text)
    assert generation >= 0


ENV_FILES: list[tuple[str, dict[str, str]]] = [
    ("", {}),
    ("A=1\nB=2\n", {"A": "1", "B": "2"}),
    ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    ("A=1\nA=2", {"A": "2"}),
    ("# comment\n\n  \n   # another\nA=1", {"A": "1"}),
    ("export A=1", {"A": "1"}),
    ("  A  =  1 2  ", {"A": "1 2"}),
    ("A=", {"A": ""}),
    ('A="1 # 2"', {"A": "1 # 2"}),
    ("A='  1  '", {"A": "  1  "}),
    ("A='1\"", {"A": "'1\""}),
    ("A='", {"A": "'"}),
    ("A=''", {"A": ""}),
    ("A=b=c", {"A": "b=c"}),
    ("A=$HOME", {"A": "$HOME"}),
    ("A=1 # not a comment", {"A": "1 # not a comment"}),
    ("A=x\u2028y\x0bz\x85", {"A": "x\u2028y\x0bz"}),
]


@pytest.mark.parametrize(("text", "expected"), ENV_FILES, ids=[repr(text) for text, _ in ENV_FILES])
def test_env_file(text: str, expected: dict[str, str]) -> None:
    assert parse_env_file(text) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [("A", 1), ("\n\nA", 3), ("=1", 1), ("A B=1", 1), ("1A=1", 1), ("A=1\n# x\nA-B=1", 3), ("A=1\0", 1), ("A='\0'", 1)],
)
def test_env_file_mistakes(text: str, line: int) -> None:
    with pytest.raises(ValueError, match=rf"^line {line}: "):
        parse_env_file(text)


VALUES = st.text(st.characters(exclude_characters="\n\0", codec="utf-8"))


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), VALUES))
def test_quoted_values_come_back_as_they_are(values: dict[str, str]) -> None:
    assert parse_env_file("".join(f'{key}="{value}"\n' for key, value in values.items())) == values


@given(st.text())
def test_any_text_is_variables_or_a_mistake(text: str) -> None:
    try:
        found = parse_env_file(text)
    except ValueError as error:
        assert str(error).startswith("line ")
    else:
        assert all(key.isidentifier() and "\n" not in value and "\0" not in value for key, value in found.items())

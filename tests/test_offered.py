"""What an installed server knows: a warning where it surely does not know an option, and silence otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from procman import daemon
from procman.offered import LEAST, options, unknown

HELP = "usage: gunicorn [OPTIONS]\n  -b, --bind ADDRESS  x\n" + "".join(f"  --option-{n}=N\n" for n in range(LEAST))


@pytest.mark.parametrize(
    ("server", "argv", "said"),
    [
        ("gunicorn", ["python", "-m", "gunicorn", "--bind=x", "--option-3", "7", "x:y"], []),
        ("gunicorn", ["--optoin-3=1"], ["'optoin-3'; did you mean 'option-3'?"]),
        ("gunicorn", ["--something"], ["knows no option 'something'"]),
        ("gunicorn", ["--opti"], []),  # argparse takes the beginning of a name
        ("daphne", ["--graceful-timeout=3"], []),  # of procman.adapter
        ("uwsgi", ["--plugin=x", "--something"], []),  # that may be the plugin's
        ("uwsgi", ["--something"], ["knows no option 'something'"]),
    ],
)
def test_what_is_said(server: str, argv: list[str], said: list[str]) -> None:
    found = unknown(server, argv, options(HELP))
    assert len(found) == len(said)
    assert all(part in text for (_, text), part in zip(found, said, strict=True))


def test_a_help_that_is_none_says_nothing() -> None:
    assert unknown("gunicorn", ["--something"], options("--help: no such thing")) == []
    assert unknown("gunicorn", ["--something"], options("")) == []


SERVERS = {
    "gunicorn": ("max-requests = 10, graceful-timeout = 5", "max-requets"),
    "uvicorn": ("limit-concurrency = 10", "limit-concurency"),
    "hypercorn": ("keep-alive = 10", "keep-alife"),
    "daphne": ("http-timeout = 10, graceful-timeout = 5, websocket_timeout = 5", "http-timeot"),
    "granian": ("backpressure = 10", "backpresure"),
}


@pytest.mark.parametrize("server", SERVERS)
def test_the_installed_servers(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they know is no false alarm, and a slip of the keyboard is named; the table is good all the same."""
    pytest.importorskip(server)
    good, bad = SERVERS[server]
    table = tmp_path / "procman.toml"
    for given, said in ((good, ""), (f"{good}, {bad} = 1", f"knows no option '{bad}'; did you mean")):
        app = f'[program.web]\nserver = "{server}"\napp = "shop:app"\nlisten = ":8000"\n'
        table.write_text(f"{app}server_options = {{ {given} }}\n")
        assert daemon.main(["--check", "-c", str(table)]) == 0
        told = capsys.readouterr()
        assert "good: 1 processes" in told.out
        assert said in told.err
        assert not said or f"{table}:5: warning: program.web.server_options.{bad}: the {server} that" in told.err
        assert bool(said) == bool(told.err), told.err


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    table = tmp_path / "procman.toml"
    app = 'server = "gunicorn"\napp = "shop:app"\nlisten = ":8000"\nserver_options = { something = 1 }\n'
    table.write_text(f'[program.web]\n{app}virtualenv = "{tmp_path}/venv"\n')
    assert daemon.main(["--check", "-c", str(table)]) == 0
    assert capsys.readouterr().err == ""

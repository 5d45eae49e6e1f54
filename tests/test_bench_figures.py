"""What the benchmark does with its samples: medians, ratios, tables, growth, the plot; and the bytes that it speaks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import growth, install, lineup, page, plot, tools
from tests.bench.contenders import Contender
from tests.bench.figures import Figure, Limit, digits, percentile, read, table
from tests.bench.growth import Growth
from tests.bench.machine import undisturbed
from tests.bench.plan import FULL, QUICK, TINY
from tests.bench.wires import Axon, JsonLines, Wire, XmlRpc, Zmtp, axon_request, zmtp_request
from tests.harness import PROJECT


def figure(more: bool = False, limit: Limit | None = None, **sides: tuple[float, ...]) -> Figure:
    return Figure("a", "boot", "ms", sides, limit, more_is_better=more)


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 50, 2.5),
        ([float(number) for number in range(1, 101)], 99, 99.0),
        ([1.0, 9.0], 99, 9.0),
        ([5.0], 99, 5.0),
    ],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == expected


def test_a_ratio_above_1_is_good_for_procman() -> None:
    assert figure(procman=(2.0,), pm2=(8.0,)).ratio("pm2") == 4
    assert figure(True, procman=(8.0,), pm2=(2.0,)).ratio("pm2") == 4
    assert figure(limit=Limit("bare", (1.0,)), procman=(4.0,)).limit_ratio == 0.25
    assert math.isnan(figure(procman=(), pm2=(8.0,)).ratio("pm2"))
    assert math.isnan(figure(procman=(0.0,), pm2=(8.0,)).ratio("pm2"))
    assert math.isnan(figure(procman=(1.0,)).ratio("s6"))


def test_the_best_peer_is_never_procman() -> None:
    assert figure(procman=(1.0,), pm2=(3.0,), s6=(2.0,), runit=()).best_peer == "s6"
    assert figure(True, procman=(9.0,), pm2=(3.0,), s6=(2.0,)).best_peer == "pm2"
    assert figure(procman=(1.0,)).best_peer == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.5, "0.50"), (1.26, "1.3"), (12.6, "13"), (99.6, "100"), (1056.4, "1056")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_shows_what_there_is() -> None:
    sides = {"procman": (4.0, 2.0), "pm2": (8.0, 9.0), "s6": (30.0,), "Circus": ()}
    one = Figure("a", "boot", "ms", sides, Limit("bare", (1.0,)), programs=1000, cut=("s6",), notes=("odd",))
    head, _line, row, note = table([one], lineup.ORDER)
    assert cells(head) == ["", "procman", "pm2", "s6", "best peer", "limit"]
    assert cells(row) == [
        "boot, 1,000 programs, ms", "3.0 (2.0–4.0)", "8.5 (8.0–9.0), 2.8 ×", "> 30, 10 ×", "pm2: 2.8 ×",
        "1.0, 0.33 ×: bare",
    ]  # fmt: skip
    assert note == "boot, 1,000 programs, ms: odd"
    assert cells(next(table([figure(s6=(4.0,))], lineup.ORDER)))[1:3] == ["procman", "s6"]
    *_, row = table([figure(procman=(4.0,))], lineup.ORDER)
    assert cells(row) == ["boot, ms", "4.0", "–", "–"]


def test_json_holds_all_that_is_needed_to_read_it_again() -> None:
    one = Figure(
        "boot", "start", "ms", {"procman": (4.0, 2.0), "pm2": (8.0,)}, Limit("bare", (1.0,)), True, 99.0, 100,
        ("pm2",), ("odd",),
    )  # fmt: skip
    document = json.loads(json.dumps({"figures": [one.document()]}))
    assert read(document) == [one]
    assert document["figures"][0]["sides"]["pm2"]["procman_is_better_by"] == 0.5
    assert figure(procman=(0.0,), pm2=(8.0,)).document()["sides"]["pm2"]["procman_is_better_by"] is None


# Growth


@pytest.mark.parametrize(
    ("values", "power", "each"),
    [
        ({10: 1.0, 100: 10.0, 1000: 100.0}, 1.0, 0.1),
        ({10: 5.0, 1000: 5.0}, 0.0, 0.0),
        ({10: 1.0, 100: 100.0}, 2.0, 1.1),
        ({1: 70.0, 10: 1.0, 100: 10.0}, 1.0, 0.1),  # what is below LEAST says nothing of growth
        ({10: 0.0, 100: 0.0}, math.nan, 0.0),
        ({100: 3.0}, math.nan, math.nan),
    ],
)
def test_growth(values: Mapping[int, float], power: float, each: float) -> None:
    assert Growth(values).power == pytest.approx(power, nan_ok=True)
    assert Growth(values).each == pytest.approx(each, nan_ok=True)


def test_the_end_of_growth_is_seen() -> None:
    assert Growth({10: 300.0, 100: 300.0, 1000: 1000.0, 10000: 100000.0}).power_at_the_end == pytest.approx(2.0)


@given(st.floats(0.1, 1e6), st.floats(-0.5, 2.5))
def test_the_power_of_a_power_is_found(factor: float, power: float) -> None:
    assert Growth({many: factor * many**power for many in (10, 100, 1000, 3000)}).power == pytest.approx(power)


def booted(programs: int, **sides: float) -> Figure:
    return Figure("boot", "start", "ms", {side: (value,) for side, value in sides.items()}, programs=programs)


def test_growth_is_a_table_of_procman() -> None:
    *_, row = growth.table([booted(1000, procman=50.0), booted(10, procman=5.0, pm2=9.0)])
    assert cells(row) == ["start until all run, ms", "5.0", "50", "0.045", "0.50", "0.50"]
    assert list(growth.table([booted(10, procman=5.0)])) == []


def test_who_was_not_waited_for_has_no_place_in_growth() -> None:
    late = Figure("boot", "start", "ms", {"procman": (1.0,), "pm2": (60.0,)}, programs=100, cut=("pm2",))
    assert set(growth.growths([late], "boot")) == {"procman"}


# The plot


def test_the_plot_is_a_picture_with_a_line_for_each() -> None:
    figures = [booted(10, procman=5.0, s6=0.0), booted(100, procman=50.0, s6=7.0), booted(3000, procman=900.0)]
    root = ET.fromstring(plot.svg(growth.panels(figures), "2 cores & more"))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points", "").split() for line in root.iter(f"{space}polyline")]
    assert [len(points) for points in lines] == [3, 2]
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"procman", "s6", "3,000", "start until all run, ms", "2 cores & more"} <= set(texts)
    width, height = (float(root.get(side, "")) for side in ("width", "height"))
    for points in lines:
        for x, y in (point.split(",") for point in points):
            assert 0 < float(x) < width
            assert 0 < float(y) < height
    assert "prefers-color-scheme: dark" in (root.findtext(f"{space}style") or "")


def test_a_panel_of_nothing_says_so() -> None:
    assert "0 everywhere" in plot.svg([plot.Panel("idle", {"s6": {10: 0.0}})], "")


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 200), max_size=9))
def test_names_do_not_lie_on_each_other(wanted: dict[str, float]) -> None:
    placed = plot.spread(wanted, 12, 216)
    assert set(placed) == set(wanted)
    heights = list(placed.values())
    assert all(low + 11.999 <= high for low, high in pairwise(heights))
    assert all(height <= 216 for height in heights)
    assert [wanted[name] for name in placed] == sorted(wanted.values())


# The page


def test_the_page_takes_the_figures_of_a_run() -> None:
    figures = [booted(10, procman=5.0, s6=1.0), booted(1000, procman=50.0), figure(procman=(1.0,), s6=(2.0,))]
    document = {
        "machine": "2 cores, procman 1", "seconds": 90.0, "left_out": {"pm2": "there is no npm"},
        "figures": [each.document() for each in figures],
    }  # fmt: skip
    text = page.PAGE.read_text()
    filled = page.filled(text, document)
    for expected in ("One run: 2 cores", "pm2 was left out", "### 1,000 programs", "start, 10 programs", "boot, ms"):
        assert expected in filled
    assert page.filled(filled, document) == filled
    assert filled.startswith(text.partition("<!-- begin: figures -->")[0])
    assert filled.endswith(text.rpartition("<!-- end: growth -->")[2])
    with pytest.raises(ValueError, match="once each"):
        page.filled("# Performance\n", document)


# What is spoken


HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<RUNNING>"
AMP = bytes([0x12]) + struct.pack(">I", 12) + b'j:["online"]' + struct.pack(">I", 3) + b"s:1"
FRAME = b'{"status": "active"}'
ANSWERS: dict[Wire, bytes] = {
    JsonLines("", b""): b'{"jsonrpc":"2.0","id":1,"result":[{"state":"RUNNING"}]}\n',
    XmlRpc("", b""): HTTP,
    Axon("", axon_request("getMonitorData")): AMP,
    Zmtp("", zmtp_request("status", name="p0")): bytes([0, len(FRAME)]) + FRAME,
}


@pytest.mark.parametrize("wire", ANSWERS, ids=lambda wire: type(wire).__name__)
def test_an_answer_is_whole_at_its_last_byte_only(wire: Wire) -> None:
    answer = ANSWERS[wire]
    assert wire.whole(answer)
    assert not any(wire.whole(answer[:end]) for end in range(1, len(answer)))


def test_a_greeting_of_circus_may_come_in_parts(tmp_path: Path) -> None:
    ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"ROUTER"
    greeting = bytes(64) + bytes([4, len(ready)]) + ready
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def greet() -> None:
            with listener.accept()[0] as peer:
                for part in (greeting[:10], greeting[10:40], greeting[40:66], greeting[66:70], greeting[70:]):
                    peer.sendall(part)
                    time.sleep(0.01)  # so that they do not become one
                peer.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        with Zmtp(str(tmp_path / "s"), b"").connect() as connection:
            connection.sendall(b"x")
        thread.join()


def test_a_long_frame_of_circus() -> None:
    body = FRAME.ljust(300)
    answer = b"\x02" + struct.pack(">Q", len(body)) + body
    assert Zmtp("", b"").whole(answer)
    assert not any(Zmtp("", b"").whole(answer[:end]) for end in range(1, len(answer)))


@pytest.mark.parametrize("wire", ANSWERS, ids=lambda wire: type(wire).__name__)
def test_a_wrong_answer_is_no_figure(wire: Wire) -> None:
    wrong = ANSWERS[wire].replace(b"RUNNING", b"STOPPED").replace(b"online", b"errors").replace(b"active", b"failed")
    with pytest.raises(ValueError, match="answered"):
        wire.whole(wrong)


# Who is measured


def test_who_is_missing_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda command: "" if command.startswith(("s6-", "circus")) else command)
    assert [kind.title for kind in lineup.present()] == ["procman", "Supervisor", "pm2", "runit"]
    assert set(lineup.left_out()) == {"s6", "Circus"}
    assert "s6-svscan" in lineup.left_out()["s6"]
    assert "apt install s6" in lineup.left_out()["s6"]
    assert [kind.title for kind in lineup.present(["pm2", "s6"])] == ["procman", "pm2"]


@pytest.mark.parametrize("kind", lineup.ALL[1:], ids=lambda kind: kind.title)
def test_who_can_be_missing_says_how_it_is_installed(kind: type[Contender]) -> None:
    assert kind.commands
    assert kind.install


def test_installing_goes_on_without_what_it_cannot_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(argv: Sequence[str]) -> str:
        ran.append(argv[-1])
        return "no network" if argv[-1].startswith("circus") else ""

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(install, "_current", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    monkeypatch.setattr(tools, "find", lambda command: "")
    assert install.main() == 0
    assert ran[-2:] == list(install.PEERS)
    said = capsys.readouterr()
    assert "pip can't install circus:\nno network" in said.err
    assert "pm2 is left out: there is no node, pm2: install Node.js" in said.out
    monkeypatch.setattr(install, "_current", lambda: False)
    monkeypatch.setattr(install, "_install_procman", lambda python: "no space")
    assert install.main() == 1
    assert "no space" in capsys.readouterr().err


def test_a_failure_of_one_is_said_once_and_the_run_goes_on() -> None:
    said: list[str] = []
    notes = lineup.Notes(said.append)
    for _ in range(2):
        with notes.leaving_out("pm2"):
            raise RuntimeError("it ended")
    assert notes.texts == ["pm2 is left out: it ended"]
    assert len(said) == 2


def test_tidying_up_is_not_disturbed() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all")
        done.append("more")
    assert done == ["all"]


def test_who_ends_the_run_ends_it_even_when_tidying_up_fails() -> None:
    notes = lineup.Notes(lambda text: None)
    with pytest.raises(SystemExit, match="ended by SIGTERM"), notes.leaving_out("s6"):
        try:
            sys.exit("ended by SIGTERM")
        finally:
            raise OSError("tidying up failed")
    assert notes.texts == []


def test_plans() -> None:
    assert {each.programs for each in FULL.fleets} >= {0, 1, 10, 100, 1000, 3000}
    assert FULL.fleet(100) is not None
    assert FULL.fleet(250).rounds == FULL.fleet(100).rounds
    assert TINY.fleet(0).programs == 0
    assert sum(each.programs for each in QUICK.fleets) <= 100


def test_the_checkout_runs_while_the_installed_one_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "VENV", tmp_path)
    package = tmp_path / "lib" / "python3" / "site-packages" / "procman"
    tools.installed.cache_clear()
    assert not tools.installed()
    for path in (PROJECT / "procman").rglob("*.py"):
        copy = package / path.relative_to(PROJECT / "procman")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    tools.installed.cache_clear()
    assert tools.installed()
    assert tools.procman("procmanctl") == [f"{tmp_path}/bin/procmanctl"]
    assert "PYTHONPATH" not in tools.procman_environment({})
    (package / "rpc.py").write_text("old = True\n")
    tools.installed.cache_clear()
    assert not tools.installed()
    assert tools.procman_environment({})["PYTHONPATH"] == str(PROJECT)
    tools.installed.cache_clear()

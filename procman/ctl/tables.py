"""What people see: tables, lists and figures as text. Pure: objects from the daemon in, strings out.

It knows no terminal: whether to colour and how wide is the caller's to say.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from procman.rpc import Object

Cell = str
Row = tuple[Cell, Cell, Cell, Cell, Cell, Cell, Cell, Cell, Cell]
TRACEBACK_LINES = 40
"""Of a traceback that are shown."""

_RESET = "\x1b[0m"
_COLOURS = {
    "RUNNING": "\x1b[32m",
    "STARTING": "\x1b[33m",
    "STOPPING": "\x1b[33m",
    "BACKOFF": "\x1b[31m",
    "FATAL": "\x1b[1;31m",
    "EXITED": "\x1b[2m",
    "STOPPED": "\x1b[2m",
}
_PALETTE = ("\x1b[36m", "\x1b[35m", "\x1b[32m", "\x1b[33m", "\x1b[34m", "\x1b[96m", "\x1b[95m", "\x1b[92m")
_STATUS = ("NAME", "STATE", "READY", "PID", "UPTIME", "CPU", "MEMORY", "RESTARTS", "WHY")


def duration(seconds: float | None) -> Cell:
    """Two units at most: "0.4s", "12s", "5m03s", "2h05m", "3d04h"; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    for unit, name, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // below:02}{part}"
    return f"{whole}s"


def size(count: float | None) -> Cell:
    """ "512 B", "1.5 KB", "48.2 MB" (1 KB = 1024 bytes, as in the program table); "-" for None."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB", "TB"):
        count /= 1024
        if count < 1023.95 or unit == "TB":
            break
    return f"{count:.1f} {unit}"


def percent(value: float | None) -> Cell:
    """ "1.5%" of one processor; "-" for None."""
    return "-" if value is None else f"{value:.1f}%"


def printable(text: object) -> str:
    """The text on one line, without what could move the cursor or change colours."""
    return "".join(c if c.isprintable() else "�" for c in str(text).replace("\n", " ").replace("\t", " "))


def columns(rows: Sequence[Sequence[Cell]], right: Iterable[int] = (), width: int | None = None) -> list[str]:
    """Aligned lines; the columns in `right` are flushed right, a last column that is too wide for `width` is cut."""
    numbers = frozenset(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        lines.append(line[: width - 1] + "…" if width is not None and len(line) > width > 1 else line)
    return lines


def status(infos: Sequence[Object], *, colour: bool = False, width: int | None = None) -> list[str]:
    """The table of `procmanctl status`."""
    shown = []
    for info in infos:
        shown.append(info)
        if isinstance(info.get("beside"), dict):  # while it is being replaced
            shown.append({**info["beside"], "name": f"  {info['beside'].get('role')}"})
    rows = [_STATUS, *map(_status_row, shown)]
    lines = columns(rows, right=(3, 4, 5, 6, 7), width=width)
    at = max(len(row[0]) for row in rows) + 2  # where the second column begins
    drawn = [lines[0]]
    for info, line, row in zip(shown, lines[1:], rows[1:], strict=True):
        drawn.append(_coloured(line, at, row[1]) if colour else line)
        drawn += [f"  {below}" for below in workers(info.get("workers"))]
    return drawn


def workers(told: Object | None) -> list[str]:
    """What a server tells of its workers, and the queues of its listeners: a table of the columns that have figures."""
    if not told:
        return []
    lines = []
    rows = [[draw(worker.get(key)) for _, key, draw in _WORKER] for worker in told.get("list") or ()]
    if rows:
        used = [number for number in range(len(_WORKER)) if any(row[number] != "-" for row in rows)]
        table = [[heading for heading, _, _ in _WORKER], *rows]
        lines += columns([[row[number] for number in used] for row in table], right=range(len(used)))
    if told.get("left_out"):
        lines.append(f"and {_plain(told['left_out'])} more")
    if told.get("problem"):
        lines.append(f"workers: {printable(told['problem'])}")
    for one in told.get("listen") or ():
        queue, backlog = _plain(one.get("queue")), _plain(one.get("backlog"))
        lines.append(f"listen queue of {printable(one.get('address'))}: {queue} of {backlog}")
    return lines


def _busy(value: object) -> Cell:
    return "-" if value is None else "busy" if value else "idle"


def _brief(seconds: float | None) -> Cell:
    """ "0.3ms", "12ms", "1.5s", "5m03s"; "-" for None."""
    if seconds is None or seconds >= 0.9995:
        return duration(seconds)
    return f"{seconds * 1000:.1f}ms" if seconds < 0.00995 else f"{seconds * 1000:.0f}ms"


def _status_row(info: Object) -> Row:
    return (
        printable(info.get("name", "?")),
        printable(info.get("state", "?")),
        "yes" if info.get("ready") else "-" if info.get("pid") is None else "no",
        _plain(info.get("pid")),
        duration(info.get("uptime_seconds")),
        percent(info.get("cpu_percent")),
        size(info.get("memory_bytes")),
        _plain(info.get("restarts")),
        reason(info) + _log_problem(info),
    )


def _log_problem(info: Object) -> str:
    """What is wrong with its output, for whoever only looks at the status."""
    error = (info.get("output") or {}).get("error")
    return f"; its log: {printable(error)}" if error else ""


def reason(info: Object) -> str:
    """Why a process is as it is, and that it is not what the table says, if so."""
    text, behind = printable(info.get("why") or ""), ", ".join(map(printable, info.get("behind") or ()))
    if setback := info.get("setback"):
        text += f"; at {printable(_short_time(str(setback.get('at'))))} {printable(setback.get('why'))}"
    return f"{text}; not as the table says: {behind}" if behind else text


def _short_time(at: str) -> str:
    """"2030-01-31 12:00", in local time, for RFC 3339."""
    try:
        return dt.datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return at


def _coloured(line: str, at: int, state: str) -> str:
    end = at + len(state)
    return f"{line[:at]}{state_text(state, colour=True)}{line[end:]}" if line[at:end] == state else line


def state_text(state: str, *, colour: bool) -> str:
    """The name of a state, in its colour."""
    return f"{_COLOURS[state]}{state}{_RESET}" if colour and state in _COLOURS else state


def label(text: str, number: int, *, colour: bool) -> str:
    """The name of a source before its log lines; `number` picks the colour."""
    return f"{_PALETTE[number % len(_PALETTE)]}{text}{_RESET}" if colour else text


def results(found: Sequence[Object], *, colour: bool = False) -> list[str]:
    """What an operation reached, one line for each process."""
    rows = [
        [printable(one.get("name", "?")), printable(one.get("state", "?")), printable(one.get("why") or "")]
        for one in found
    ]
    if not rows:
        return []
    at = max(len(row[0]) for row in rows) + 2
    lines = columns(rows)
    return [_coloured(line, at, row[1]) if colour else line for line, row in zip(lines, rows, strict=True)]


def event(one: Object) -> str:
    """One event on one line: when, what kind, who, then the rest as it comes; a traceback below it."""
    rest = {key: value for key, value in one.items() if key not in ("at", "type", "name", "state", "why", "traceback")}
    words = [one.get("at"), one.get("type"), one.get("name"), one.get("state")]
    words += [f"{key}={_plain(value)}" for key, value in rest.items()]
    words.append(one.get("why") and f"({one['why']})")
    line = " ".join(printable(word) for word in words if word not in (None, "", "()"))
    trace = _shortened(str((one.get("traceback") or {}).get("text", "")), str(one.get("name")))
    return "\n".join([line, *(f"  | {printable(part)}" for part in trace)])


_SIGNS = {"add": "+", "remove": "-", "ignore": "!"}


def plan(lines: Sequence[Object], *, colour: bool = False) -> list[str]:
    """What another table would change: a sign, the process, the action, its keys, what it costs."""
    rows: list[tuple[Cell, ...]] = [
        (
            _SIGNS.get(str(line.get("action")), "~"),
            printable(line.get("name") or "daemon"),
            printable(line.get("action")),
            printable(", ".join(map(str, line.get("keys") or [])) or "-"),
            printable(line.get("cost")),
        )
        for line in lines
    ]
    text = columns([(" ", "NAME", "ACTION", "KEYS", "COST"), *rows])
    signs = {"+": "32", "-": "31", "~": "33", "!": "35"}
    coloured = [f"\x1b[{signs[line[0]]}m{line[0]}{_RESET}{line[1:]}" for line in text[1:]]
    return [text[0], *(coloured if colour else text[1:])]


def why(answer: Object, *, colour: bool = False) -> list[str]:
    """All of `procmanctl why`: the reason, the last exit, what went before, the last lines of output."""
    state = state_text(str(answer.get("state")), colour=colour)
    lines = [
        f"{printable(answer.get('name'))} is {state}, wanted {answer.get('wanted')}: {reason(answer)}"
    ]
    if answer.get("exit"):
        lines.append(f"last exit: {ended(answer['exit'])}")
    if answer.get("history"):
        rows = [[printable(one.get(key, "")) for key in ("at", "state", "why")] for one in answer["history"]]
        lines += ["", "history:", *(f"  {line}" for line in columns(rows))]
    output = [str(line) for line in answer.get("output") or ()]
    trace = str((answer.get("traceback") or {}).get("text", ""))
    if trace and "\n".join(output) in trace:
        output = []  # the traceback is all of it, and more
    shown = _shortened(trace, str(answer.get("name")))
    of = " of what has failed" if answer.get("output_of") == "setback" else ""
    for title, text in (("last traceback", shown), ("last output", output)):
        if text:
            lines += ["", f"{title}{of}:", *(f"  {printable(line)}" for line in text)]
    return lines


def _shortened(trace: str, name: str) -> list[str]:
    """The lines of a traceback for people: of a long one the first and the last exception."""
    if trace.count("\n") < TRACEBACK_LINES:
        return trace.split("\n") if trace else []
    from procman import tracebacks  # which has many patterns

    hint = f" (procmanctl logs {name} shows them)"
    shown = []
    for part in tracebacks.shortened(trace.split("\n"), TRACEBACK_LINES):
        if isinstance(part, int):
            shown.append(f"… {part} lines left out{hint}")
            hint = ""
        else:
            shown.append(part)
    return shown



def ended(exit_: Object) -> str:
    """How a child ended, and when."""
    return f"{printable(exit_.get('reason', '?'))}, at {printable(exit_.get('at', '?'))}"


def show(answer: Object, *, colour: bool = False) -> list[str]:
    """All of `procmanctl show`."""
    groups = ", ".join(answer.get("groups") or ()) or "-"
    facts = [
        ("state", f"{state_text(str(answer.get('state')), colour=colour)}, wanted {answer.get('wanted')}"),
        ("why", reason(answer) or "-"),
        ("ready", "yes" if answer.get("ready") else "no"),
        ("program", f"{answer.get('program')}, instance {answer.get('instance')}, groups: {groups}"),
        ("pid", _plain(answer.get("pid"))),
        ("started", f"{answer.get('started_at') or '-'}, up {duration(answer.get('uptime_seconds'))}"),
        ("restarts", _plain(answer.get("restarts"))),
        ("last exit", ended(answer["exit"]) if answer.get("exit") else "-"),
        ("cpu", _last_hour(answer, "cpu_percent", 1, percent)),
        ("memory", _last_hour(answer, "memory_bytes", 2, size)),
    ]
    lines = [printable(answer.get("name")), *_facts(facts)]
    if answer.get("workers"):
        lines += ["", "workers", *(f"  {line}" for line in workers(answer["workers"]))]
    for log in answer.get("log") or ():
        lines += ["", f"log ({log.get('stream', 'out')})", *_facts(_log_facts(log))]
    if answer.get("processes"):
        lines += ["", "processes", *(f"  {line}" for line in _processes(answer["processes"]))]
    if answer.get("definition"):
        lines += ["", "definition", *_facts((key, _value(key, value)) for key, value in answer["definition"].items())]
    return lines


def _last_hour(answer: Object, key: str, column: int, unit: Any) -> str:
    values = [sample[column] for sample in answer.get("samples") or () if sample[column] is not None]
    now = unit(answer.get(key))
    if not values:
        return str(now)
    low, mean, high = min(values), sum(values) / len(values), max(values)
    return f"{now} now; last hour: {unit(low)} min, {unit(mean)} avg, {unit(high)} max"


def _log_facts(log: Object) -> Iterator[tuple[str, str]]:
    for key, value in log.items():
        if key != "stream" and value not in ("", None):
            draw = size if key in ("read", "written", "dropped") else duration if key == "waited" else _plain
            yield key, draw(value)


def _processes(processes: Sequence[Object]) -> list[str]:
    rows = [["PID", "CPU", "MEMORY", "COMMAND"]]
    for one in processes:
        memory, cpu = size(one.get("memory_bytes")), percent(one.get("cpu_percent"))
        rows.append([_plain(one.get("pid")), cpu, memory, printable(one.get("command") or "")])
    return columns(rows, right=(0, 1, 2))


def facts(answer: Object) -> list[str]:
    """An object as lines of key and value."""
    return [line.removeprefix("  ") for line in _facts((key, _value(key, value)) for key, value in answer.items())]


def _facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    rows = [[key.removesuffix("_bytes").replace("_", " "), value] for key, value in pairs]
    return [f"  {line}" for line in columns(rows)] if rows else []


def _value(key: str, value: object) -> str:
    """A value as people read one with this key."""
    if isinstance(value, int) and not isinstance(value, bool):
        if key in ("umask", "mode_bits", "mode", "socket_mode"):
            return f"0o{value:03o}"
        if key.endswith(("_bytes", "max_size")):
            return size(value)
    if key == "problems" and isinstance(value, list) and value:
        return "; ".join(map(printable, value))
    if isinstance(value, dict) and value:
        return ", ".join(f"{inner.replace('_', ' ')} {_value(inner, one)}" for inner, one in value.items())
    return _plain(value)


def _plain(value: object) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(_plain(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{printable(key)} {_plain(one)}" for key, one in value.items())
    return printable(value)


_WORKER: tuple[tuple[Cell, str, Callable[[Any], Cell]], ...] = (
    ("WORKER", "pid", _plain),
    ("DOES", "busy", _busy),
    ("REQUESTS", "requests", _plain),
    ("IN FLIGHT", "in_flight", _plain),
    ("QUEUE", "queue", _plain),
    ("THREADS", "threads", _plain),
    ("AVERAGE", "average_seconds", _brief),
    ("HEARTBEAT", "heartbeat_seconds", duration),
    ("MEMORY", "memory_bytes", size),
)
"""The columns of `workers`: heading, key, how it is drawn."""

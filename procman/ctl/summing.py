"""`procmanctl logs --summary`: what logs amount to, as text and as JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from procman.logsummary import Summary
from procman.rpc import Object

from .session import Session
from .tables import columns, printable, size

if TYPE_CHECKING:
    from .logs import Reader

ERRORS = 10
"""Errors that are shown."""

PATHS = 10


def summarise(session: Session, reader: Reader) -> int:
    """Reads it all, and prints what it amounts to: for each log and, where there are several, for all together."""
    documents: list[Object] = []
    whole = Summary()
    for text in reader.texts:
        own = Summary()
        for record in reader.records(text):
            own.add(record)
            if len(reader.texts) > 1:
                whole.add(record)
        documents.append({"name": text.source.name, "stream": text.source.stream, **own.document()})
    reader.tell_losses()
    together = whole.document() if len(documents) > 1 else None
    if session.json:
        session.print_json({"logs": documents, "all": together})
        return 0
    for number, document in enumerate(documents):
        name = str(document["name"]) + ("" if document["stream"] == "out" else f"/{document['stream']}")
        print("\n".join(([""] if number else []) + draw(name, document, errors=len(documents) == 1)))
    if together is not None:
        print("\n".join(["", *draw("all", together, errors=True)]))
    return 0


def draw(name: str, document: Object, *, errors: bool) -> list[str]:
    """The summary of one log; with `errors` a full sample of each."""
    lines = [f"{printable(name)}: {document['lines']} lines, {size(document['bytes'])}"]
    if document["first"] is not None:
        rate = f"{_rate(document['lines_a_minute'])} lines, {size(document['bytes_a_minute'])} a minute"
        bars = document["bars"]
        most = max(bars, key=lambda bar: bar["lines"])
        every = "" if document["bar_seconds"] == 60 else f" in {document['bar_seconds'] // 60} minutes"
        lines += [
            f"  time     {_when(document['first'])} to {_when(document['last'])}",
            f"  rate     {rate}; most: {most['lines']} lines{every} at {_when(most['at'])}",
        ]
    for title, key in (("levels", "levels"), ("answers", "statuses")):
        if document[key]:
            counts = ", ".join(f"{name} {count}" for name, count in document[key].items())
            lines.append(f"  {title.ljust(7)}  {counts}")
    lines += _paths(document)
    lines += _errors(document, samples=errors)
    return lines


def _paths(document: Object) -> list[str]:
    rows = [
        (
            str(path["count"]),
            str(path["errors"]),
            _seconds(path["average_seconds"]),
            _seconds(path["slowest_seconds"]),
            printable(f"{path['method']} {path['path']}"),
        )
        for path in document["paths"][:PATHS]
    ]
    if not rows:
        return []
    timed = any(path["average_seconds"] is not None for path in document["paths"])
    title = "the slowest paths" if timed else "paths (this log does not tell how long answers took)"
    table = columns([("COUNT", "5XX", "AVERAGE", "SLOWEST", "PATH"), *rows], right=range(4))
    return ["", f"  {title}:", *(f"    {line}" for line in table)]


def _errors(document: Object, *, samples: bool) -> list[str]:
    lines: list[str] = []
    for error in document["errors"][:ERRORS]:
        when = ""
        if error["first"] is not None:
            first, last = _when(error["first"]), _when(error["last"])
            when = f", {first}" if first == last else f", {first} to {last}"
        message = f": {printable(error['message'])[:120]}" if error["message"] else ""
        lines.append(f"    {error['count']} × {printable(error['exception'])}{message}{when}")
        if samples:
            lines += [f"      | {printable(line)}" for line in error["sample"].split("\n")]
    more, rare = max(len(document["errors"]) - ERRORS, 0), document["other_errors"]
    left = [f"{more} other error{'s' if more > 1 else ''}"] if more else []
    left += [f"{rare} traceback{'s' if rare > 1 else ''} of rare {'ones' if more else 'errors'}"] if rare else []
    lines += [f"    and {', and '.join(left)}"] if left else []
    return ["", "  errors:", *lines] if lines else []


def _rate(value: float) -> str:
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if value >= 1 else f"{value:.2f}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f}ms" if value < 1 else f"{value:.2f}s"

"""Puts the figures of a run into docs/performance.md, and draws its plot: what stands there is what was measured.

    python -m tests.bench.page FILE.json

FILE.json is what `python -m tests.bench --json FILE.json` wrote. Only the parts of the page between its markers change,
and docs/performance.svg. The run goes to docs/performance.json, from which the same can be made again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import growth, lineup, plot
from tests.bench.figures import Figure, read, table
from tests.harness import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
PICTURE = PROJECT / "docs" / "performance.svg"
RUN = PROJECT / "docs" / "performance.json"


def filled(page: str, document: Mapping[str, Any]) -> str:
    """The page with the figures of a run. Raises ValueError for a page without its markers."""
    figures = read(document)
    for name, lines in (("figures", _figures(document, figures)), ("growth", _growth(figures))):
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page needs the lines {begin!r} and {end!r}, once each")
        before, rest = page.split(begin)
        text = "\n".join(lines)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def _figures(document: Mapping[str, Any], figures: Sequence[Figure]) -> Iterator[str]:
    """A table of each number of programs, for one of all would be long."""
    yield f"One run: {document['machine']}; {document['seconds'] / 60:.0f} minutes."
    for title, why in document["left_out"].items():
        yield f"{title} was left out: {why}."
    for heading, rows in _groups(figures):
        if not rows:
            continue
        yield from ("", f"### {heading}", "")
        lines = list(table(rows, lineup.ORDER))
        width = 2 + len(rows)
        yield from lines[:width]
        yield from (line for note in lines[width:] for line in ("", note))


def _groups(figures: Sequence[Figure]) -> Iterator[tuple[str, list[Figure]]]:
    fleets = [each for each in figures if each.programs is not None and _family(each) in growth.FAMILIES]
    yield "Restarts, calls, logs, reloads", [each for each in figures if each not in fleets]
    for count in sorted({each.programs for each in fleets if each.programs is not None}):
        yield f"{count:,} program{'' if count == 1 else 's'}", [each for each in fleets if each.programs == count]


def _family(figure: Figure) -> str:
    return figure.name.partition("-")[0]


def _growth(figures: Sequence[Figure]) -> Iterator[str]:
    yield "![Figures by number of programs](performance.svg)"
    yield ""
    yield from growth.table(figures)


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    if len(arguments) != 1:
        print("usage: python -m tests.bench.page FILE.json", file=sys.stderr)
        return 2
    document = json.loads(Path(arguments[0]).read_text())
    RUN.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), document))
    machine = re.sub(r", procman .*", "", document["machine"])
    PICTURE.write_text(plot.svg(growth.panels(read(document)), machine))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

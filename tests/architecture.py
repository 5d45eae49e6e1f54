"""Draws the parts of docs/architecture.md that come from the code: the source map and the state diagram.

    python -m tests.architecture        writes them anew (tests/test_project.py fails when they are old)
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from procman.lifecycle import LEGAL, State
from tests.harness import PROJECT
from tests.test_layers import BAND, BANDS, PACKAGE, noun, sources

PAGE = PROJECT / "docs" / "architecture.md"


def drawn(page: str) -> str:
    """The page with its generated parts made anew."""
    for name, text in (("source map", source_map()), ("states", state_diagram())):
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        assert page.count(begin) == page.count(end) == 1, f"the page has no place for the {name}"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def source_map() -> str:
    """A table of all modules by band, each with the first sentence of its docstring."""
    rows = ["| band | module | what it is for |", "|---|---|---|"]
    for band in BANDS:
        rows += [
            f"| {band} | `{path.relative_to(PACKAGE)}` | {first_sentence(path)} |"
            for path in sources()
            if BAND.get(noun(path)) == band
        ]
    return "\n".join(rows)


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0].replace("|", "\\|")


def state_diagram() -> str:
    """A Mermaid diagram of the legal moves, in the order of the states."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.STOPPED}"]
    lines += [f"    {state} --> {target}" for state in State for target in State if target in LEGAL[state]]
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))

"""How figures grow with the number of programs: what one more costs, and with which power of the number they grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench import plot
from tests.bench.figures import OURS, Figure, digits, markdown

NAMES = {
    "boot": "start until all run",
    "stop": "stop of all",
    "again": "restart of one",
    "recover": "status after a SIGKILL",
    "status": "status command",
    "crash-decides": "SIGKILL of what decides",
    "crash-parent": "SIGKILL of the parent",
    "status-call": "calls for one of them",
    "status-call-p99": "such a call, 99th percentile",
    "print": "log of one beside them",
    "memory": "memory, PSS",
    "idle": "idle CPU in a second",
    "idle-wake-ups": "idle wake-ups",
}
"""What grows, and how the plot calls it."""

FAMILIES = {name.partition("-")[0] for name in NAMES}
"""Figures whose names begin so are measured for each number of programs."""

LEAST = 10
"""Programs. Below, it is the fixed part that is measured."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One contender's values of one figure by number of programs, in order."""

    values: Mapping[int, float]

    @property
    def power(self) -> float:
        """n, if the value grows as the n-th power of the number of programs: 0 is not at all, 1 is linear. By least
        squares between the logarithms; NaN with fewer than two values above 0."""
        pairs = [(math.log(many), math.log(value)) for many, value in self._large() if value > 0]
        if len(pairs) < 2:
            return math.nan
        middle = [sum(each) / len(pairs) for each in zip(*pairs, strict=True)]
        above: float = sum((x - middle[0]) * (y - middle[1]) for x, y in pairs)
        below: float = sum((x - middle[0]) ** 2 for x, _ in pairs)
        return above / below

    @property
    def power_at_the_end(self) -> float:
        """As `power`, between the two largest numbers alone."""
        return Growth(dict(self._large()[-2:])).power

    @property
    def each(self) -> float:
        """What one more program costs, between the smallest and the largest number; NaN with fewer than two."""
        large = self._large()
        if len(large) < 2:
            return math.nan
        (few, low), (many, high) = large[0], large[-1]
        return (high - low) / (many - few)

    def _large(self) -> list[tuple[int, float]]:
        return [(many, value) for many, value in self.values.items() if many >= LEAST]


def growths(figures: Sequence[Figure], name: str) -> dict[str, Growth]:
    """By contender. What was not waited for is left out: it is no value."""
    found: dict[str, dict[int, float]] = {}
    for figure in sorted((each for each in figures if each.name == name), key=lambda each: each.programs or 0):
        for side, samples in figure.sides.items():
            if samples and figure.programs and side not in figure.cut:
                found.setdefault(side, {})[figure.programs] = figure.value(side)
    return {side: Growth(values) for side, values in found.items()}


def table(figures: Sequence[Figure]) -> Iterator[str]:
    """procman by number of programs in Markdown; nothing when there is only one number."""
    counts = sorted({each.programs for each in figures if each.name in NAMES and each.programs})
    if len(counts) < 2:
        return
    rows = []
    for name, words in NAMES.items():
        ours = growths(figures, name).get(OURS)
        if ours:
            unit = next(each.unit for each in figures if each.name == name)
            cells = [digits(ours.values[count]) if count in ours.values else "–" for count in counts]
            powers = ("–" if math.isnan(each) else f"{each:.2f}" for each in (ours.power, ours.power_at_the_end))
            more = [_or_dash(ours.each), *powers]
            rows.append([f"{words}, {unit}", *cells, *more])
    head = ["procman", *(f"{count:,}" for count in counts), "one program more", "power", "at the end"]
    yield from markdown(head, rows)


def _or_dash(value: float) -> str:
    return "–" if math.isnan(value) else f"{'-' if value < 0 else ''}{digits(abs(value))}"


def panels(figures: Sequence[Figure]) -> list[plot.Panel]:
    """What the plot shows: a panel for each of NAMES."""
    found = []
    for name, words in NAMES.items():
        lines = {side: growth.values for side, growth in growths(figures, name).items()}
        if lines:
            unit = next(each.unit for each in figures if each.name == name)
            found.append(plot.Panel(f"{words}, {unit}", lines))
    return found

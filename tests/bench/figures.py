"""What a benchmark yields, as values, and how it is shown: samples of two managers, their medians, spread and ratio.

It knows nothing of how a sample is taken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: the samples of procman, of Supervisor, and of the least that the work can cost (`limit`, may be empty).

    `median_of` says how samples become one number: their median, or a percentile (0-100) where it is set.
    """

    name: str
    title: str
    unit: str
    procman: tuple[float, ...]
    supervisor: tuple[float, ...]
    limit: tuple[float, ...] = ()
    limit_title: str = ""
    more_is_better: bool = False
    percentile: float = 50.0
    notes: tuple[str, ...] = field(default=())

    def value(self, samples: Sequence[float]) -> float:
        """The one number of these samples; NaN when there are none."""
        return percentile(samples, self.percentile)

    @property
    def ratio(self) -> float:
        """How many times procman is better than Supervisor: 2 is half the time, or twice the throughput."""
        ours, theirs = self.value(self.procman), self.value(self.supervisor)
        return quotient(ours, theirs) if self.more_is_better else quotient(theirs, ours)

    def document(self) -> dict[str, Any]:
        """As JSON shows it, samples included. What could not be measured is null."""
        sides = {"procman": self.procman, "supervisor": self.supervisor, "limit": self.limit}
        return {
            "name": self.name, "title": self.title, "unit": self.unit, "ratio": _number(self.ratio),
            "limit_title": self.limit_title, "notes": list(self.notes),
            **{side: self._side(samples) for side, samples in sides.items()},
        }  # fmt: skip

    def _side(self, samples: Sequence[float]) -> dict[str, Any] | None:
        if not samples:
            return None
        return {"value": _number(self.value(samples)), "min": min(samples), "max": max(samples), "samples": samples}


def percentile(samples: Sequence[float], percent: float) -> float:
    """The median for 50, else the smallest sample that so many percent do not exceed (nearest rank); NaN for none."""
    if not samples:
        return math.nan
    if percent == 50:
        return statistics.median(samples)
    return sorted(samples)[max(0, math.ceil(len(samples) * percent / 100) - 1)]


def quotient(above: float, below: float) -> float:
    """above / below; NaN where that has no value."""
    return above / below if below else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(figures: Sequence[Figure]) -> Iterator[str]:
    """The figures as a Markdown table, which docs/performance.md takes as it is; notes below it."""
    head = ("", "procman", "Supervisor", "ratio", "limit")
    rows = [_row(figure) for figure in figures]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
    for figure in figures:
        for note in figure.notes:
            yield f"{figure.title}: {note}"


def _row(figure: Figure) -> tuple[str, ...]:
    ratio = "–" if math.isnan(figure.ratio) else f"{digits(figure.ratio)} ×"
    limit = _cell(figure, figure.limit)
    if figure.limit:
        limit = f"{limit}: {figure.limit_title}"
    title = f"{figure.title}, {figure.unit}"
    return title, _cell(figure, figure.procman), _cell(figure, figure.supervisor), ratio, limit


def _cell(figure: Figure, samples: Sequence[float]) -> str:
    """'4.1 (3.9–5.0)'."""
    if not samples:
        return "–"
    return f"{digits(figure.value(samples))} ({digits(min(samples))}–{digits(max(samples))})"


def digits(value: float) -> str:
    """A number with as many digits as a benchmark can stand for."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"

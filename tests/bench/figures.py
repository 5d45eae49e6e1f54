"""What a benchmark yields, as values, and how it is shown: samples of each contender, their medians, spread and ratios.

It knows nothing of how a sample is taken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "procman"


@dataclass(frozen=True, slots=True)
class Limit:
    """The least that the work can cost, measured in the same run: by whom, and the samples."""

    title: str
    samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: the samples of each contender that could be measured, procman among them, and the physical limit.

    `percentile` says how samples become one number: their median, or another percentile (0-100). `programs` is how many
    the manager had. `cut` names the contenders that were not waited for: their samples are how long they had.
    """

    name: str
    title: str
    unit: str
    sides: Mapping[str, tuple[float, ...]]
    limit: Limit | None = None
    more_is_better: bool = False
    percentile: float = 50.0
    programs: int | None = None
    cut: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def heading(self) -> str:
        """The title with the number of programs and the unit."""
        many = "" if self.programs is None else f", {counted(self.programs)}"
        return f"{self.title}{many}, {self.unit}"

    @property
    def peers(self) -> list[str]:
        """The others that were measured."""
        return [side for side, samples in self.sides.items() if side != OURS and samples]

    def value(self, side: str) -> float:
        """The one number of a contender; NaN when there is none."""
        return self.of(self.sides.get(side, ()))

    def of(self, samples: Sequence[float]) -> float:
        """The one number of these samples; NaN when there are none."""
        return percentile(samples, self.percentile)

    def ratio(self, peer: str) -> float:
        """How many times procman is better than this peer: 2 is half the time, or twice the throughput."""
        return self._better(self.value(peer))

    @property
    def limit_ratio(self) -> float:
        """The same to the limit: 0.5 is twice what the work must cost."""
        return self._better(self.of(self.limit.samples)) if self.limit else math.nan

    @property
    def best_peer(self) -> str:
        """Who of the peers is best, "" when there is none."""
        known = {peer: self.value(peer) for peer in self.peers}
        best = max if self.more_is_better else min
        return best(known, key=known.__getitem__) if known else ""

    def _better(self, theirs: float) -> float:
        ours = self.value(OURS)
        return quotient(ours, theirs) if self.more_is_better else quotient(theirs, ours)

    def document(self) -> dict[str, Any]:
        """As JSON shows it, samples included. What could not be measured is null, or not there."""
        sides = {side: self._side(samples) for side, samples in self.sides.items() if samples}
        for side, shown in sides.items():
            shown["procman_is_better_by"] = _number(self.ratio(side))
        limit = None
        if self.limit and self.limit.samples:
            better = {"procman_is_better_by": _number(self.limit_ratio)}
            limit = {"title": self.limit.title, **self._side(self.limit.samples), **better}
        return {
            "name": self.name, "title": self.title, "unit": self.unit, "programs": self.programs,
            "percentile": self.percentile, "more_is_better": self.more_is_better, "cut": list(self.cut),
            "notes": list(self.notes), "best_peer": self.best_peer or None, "limit": limit, "sides": sides,
        }  # fmt: skip

    def _side(self, samples: Sequence[float]) -> dict[str, Any]:
        return {"value": self.of(samples), "min": min(samples), "max": max(samples), "samples": list(samples)}


def read(document: Mapping[str, Any]) -> list[Figure]:
    """The figures of a JSON document that a run wrote."""
    return [
        Figure(
            row["name"], row["title"], row["unit"],
            {side: tuple(shown["samples"]) for side, shown in row["sides"].items()},
            Limit(row["limit"]["title"], tuple(row["limit"]["samples"])) if row["limit"] else None,
            row["more_is_better"], row["percentile"], row["programs"], tuple(row["cut"]), tuple(row["notes"]),
        )
        for row in document["figures"]
    ]  # fmt: skip


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


def counted(count: int) -> str:
    """'1 program', '1,000 programs'."""
    return f"{count:,} program{'' if count == 1 else 's'}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(figures: Sequence[Figure], order: Sequence[str]) -> Iterator[str]:
    """The figures as a Markdown table, which docs/performance.md takes as it is; notes below it.

    A column for procman and each other one of `order` that is in it: the median, smallest and largest, and how many
    times procman is better. The last two columns are that ratio to the best peer and to the limit.
    """
    sides = [side for side in order if side == OURS or any(figure.sides.get(side) for figure in figures)]
    yield from markdown(("", *sides, "best peer", "limit"), (_row(figure, sides) for figure in figures))
    for figure in figures:
        for note in figure.notes:
            yield f"{figure.heading}: {note}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, its columns aligned in the source too."""
    cells = [head, *rows]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *cells[1:]):
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"


def _row(figure: Figure, sides: Sequence[str]) -> list[str]:
    cells = [figure.heading]
    for side in sides:
        text = _cell(figure, figure.sides.get(side, ()), "> " if side in figure.cut else "")
        cells.append(text if side == OURS else text + times(figure.ratio(side), ", "))
    best = figure.best_peer
    cells.append(f"{best}{times(figure.ratio(best), ': ')}" if best else "–")
    limit = figure.limit
    if limit and limit.samples:
        cells.append(f"{_cell(figure, limit.samples)}{times(figure.limit_ratio, ', ')}: {limit.title}")
    else:
        cells.append("–")
    return cells


def times(ratio: float, before: str = "") -> str:
    """'4.1 ×'; nothing when there is no ratio."""
    return "" if math.isnan(ratio) else f"{before}{digits(ratio)} ×"


def _cell(figure: Figure, samples: Sequence[float], before: str = "") -> str:
    """'4.1 (3.9–5.0)'."""
    if not samples:
        return "–"
    spread = f" ({digits(min(samples))}–{digits(max(samples))})" if len(samples) > 1 else ""
    return f"{before}{digits(figure.of(samples))}{spread}"


def digits(value: float) -> str:
    """A number with as many digits as a benchmark can stand for."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"

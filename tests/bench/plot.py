"""Draws values by number of programs as an SVG: small panels side by side, both axes logarithmic, one line a contender.

The picture brings its own background and follows the reader's light or dark scheme. It knows nothing of benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLUMNS = 2
WIDTH, HEIGHT = 400, 250
"""Of a panel with its margins."""

LEFT, RIGHT, TOP, BOTTOM = 56, 74, 34, 30
HEAD, FOOT = 8, 26

STYLE = """\
text { font: 11px system-ui, sans-serif; fill: #333 }
.title { font-size: 13px; font-weight: 600 }
.back { fill: #fff } .grid { stroke: #ddd } .faint { fill: #777 }
polyline { fill: none; stroke-width: 1.6 } .c0 polyline { stroke-width: 3 } .c0 text { font-weight: 700 }
"""
DARK = "text { fill: #ddd } .back { fill: #15181c } .grid { stroke: #333 } .faint { fill: #999 }"

COLOURS = ("#1668dc", "#c2410c", "#7c3aed", "#15803d", "#6b7280", "#0e7490", "#be185d")
DARK_COLOURS = ("#6cb2ff", "#ff8a5c", "#b79aff", "#5fd08a", "#b8bec9", "#4fd0e0", "#ff7fb8")
"""Of the lines; each has its name at its end, so that colours need not be told apart."""


@dataclass(frozen=True, slots=True)
class Panel:
    """`lines`: values by number of programs, by name; the first one is drawn thick."""

    title: str
    lines: Mapping[str, Mapping[int, float]]


def svg(panels: Sequence[Panel], foot: str) -> str:
    """The picture; `foot` is a line of text below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, HEAD + rows * HEIGHT + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}{_colours(COLOURS)}",
        f"@media (prefers-color-scheme: dark) {{ {DARK} {_colours(DARK_COLOURS)}}}</style>",
        f'<rect class="back" width="{width}" height="{height}"/>',
    ]
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        parts.append(f'<g transform="translate({column * WIDTH} {HEAD + row * HEIGHT})">')
        parts += _panel(panel, names)
        parts.append("</g>")
    parts.append(f'<text class="faint" x="{LEFT}" y="{height - 10}">{escape(foot)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colours(colours: Sequence[str]) -> str:
    return "".join(
        f".c{index} polyline {{ stroke: {colour} }} .c{index} text, .c{index} circle {{ fill: {colour} }} "
        for index, colour in enumerate(colours)
    )


class Axis:
    """A logarithmic scale from values to coordinates."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        self.low, self.high = math.log10(low), math.log10(high)
        if self.high - self.low < 1:  # a decade at least, so that little differences look little
            middle = (self.high + self.low) / 2
            self.low, self.high = middle - 0.5, middle + 0.5
        self.begin, self.end = begin, end

    def at(self, value: float) -> float:
        """The coordinate of a value above 0."""
        return self.begin + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Powers of ten within; where there are few of them, twice and five times them too."""
        powers = range(math.floor(self.low), math.floor(self.high + 1e-9) + 1)
        whole = [tick for tick in (float(f"1e{power}") for power in powers) if self._has(tick)]
        if len(whole) > 2:
            return whole
        return [tick for power in powers for step in (1, 2, 5) if self._has(tick := float(f"{step}e{power}"))]

    def _has(self, value: float) -> bool:
        return self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9


def _panel(panel: Panel, names: Sequence[str]) -> Iterator[str]:
    counts = sorted({count for line in panel.lines.values() for count in line})
    values = [value for line in panel.lines.values() for value in line.values() if value > 0]
    yield f'<text class="title" x="{LEFT}" y="20">{escape(panel.title)}</text>'
    if not values:
        yield f'<text class="faint" x="{LEFT}" y="{HEIGHT / 2:.0f}">0 everywhere</text>'
        return
    across = Axis(counts, LEFT, WIDTH - RIGHT)
    up = Axis(values, HEIGHT - BOTTOM, TOP)
    for tick in up.ticks():
        y = up.at(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
    for count in counts:
        x = across.at(count)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{count:,}</text>'
    yield from _lines(panel, names, across, up)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _lines(panel: Panel, names: Sequence[str], across: Axis, up: Axis) -> Iterator[str]:
    """A value of 0 has no place on a logarithmic axis: it lies on the lower edge."""
    floor = 10**up.low
    ends = {}
    for name, line in panel.lines.items():
        points = [(across.at(count), up.at(max(value, floor))) for count, value in sorted(line.items())]
        ends[name] = points[-1]
        yield f'<g class="c{names.index(name)}">'
        yield f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
        yield "</g>"
    last = max(x for x, _ in ends.values())
    for name, y in spread({name: y for name, (_, y) in ends.items()}, 12, HEIGHT - BOTTOM + 4).items():
        yield f'<g class="c{names.index(name)}"><text x="{last + 8:.1f}" y="{y + 4:.1f}">{escape(name)}</text></g>'


def spread(wanted: Mapping[str, float], gap: float, lowest: float) -> dict[str, float]:
    """Places near the wanted ones, in the same order, that are `gap` apart at least and not below `lowest`."""
    placed: dict[str, float] = {}
    at = -math.inf
    for name, y in sorted(wanted.items(), key=lambda item: item[1]):
        at = max(y, at + gap)
        placed[name] = at
    bound = lowest
    for name in reversed(placed):
        placed[name] = bound = min(placed[name], bound)
        bound -= gap
    return placed

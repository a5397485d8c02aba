"""The plots of report.html, as inline SVG: a heat map of kinds and blocks, a line plot of blocks.

Colours are CSS classes and variables (style.py), so that both colour schemes fit. Every
plot has a title and a description for screen readers; each value is a tooltip, and stands in a
table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 900  # of a plot, in its own units; the page scales it
STEPS = 9  # shades of a heat map
SIDEWAYS = '<p class="sideways">Wider than this screen: scroll it sideways.</p>'
INDEX = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


def place_of(name: str) -> tuple[str, str]:
    """Block and kind: "3" and "attn.q" of "model.layers.3.attn.q"; experts' numbers become "*"."""
    found = INDEX.match(name)
    if not found:
        return "-", name
    kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", found[2])
    return found[1], kind


def percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "not finite"


def heat_map(title: str, about: str, values: Mapping[str, float]) -> str:
    """values: by name of the linear, >= 0. A row a kind, a column a block; experts are averaged.

    Where they differ by less than a thousandth, a sentence says so instead.
    """
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (math.inf, math.inf)
    if len(finite) in (0, len(values)) and not high - low > high / 1000:
        told = " to ".join(dict.fromkeys((percent(low), percent(high))))
        return f'<p class="box">{escape(title)}: {told} in every linear.</p>'
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        block, kind = place_of(name)
        cells.setdefault((kind, block), []).append(value)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = list(dict.fromkeys(block for _, block in cells))
    left, top, row = 7.2 * max(map(len, kinds)) + 12, 8, 24
    step = (WIDTH - left - 8) / len(blocks)
    bottom = top + row * len(kinds)
    parts = []
    for y, kind in enumerate(kinds):
        middle = top + row * y + row / 2
        parts.append(f'<text class="end" x="{left - 8:g}" y="{middle + 4:g}">{escape(kind)}</text>')
        for x, block in enumerate(blocks):
            if (kind, block) in cells:
                found = cells[kind, block]
                value = sum(found) / len(found)
                share = (value - low) / (high - low or 1.0)
                shade = min(STEPS - 1, int(share * STEPS)) if math.isfinite(share) else STEPS - 1
                gap = 1 if step > 5 else 0.5
                parts.append(
                    f'<rect class="h{shade}" x="{left + step * x:.1f}" y="{top + row * y + 1}" '
                    f'width="{step - gap:.1f}" height="{row - 2}"><title>block {escape(block)}, '
                    f"{escape(kind)}: {percent(value)}</title></rect>"
                )
    parts += _ticks(blocks, [left + step * (x + 0.5) for x in range(len(blocks))], bottom + 16)
    legend = bottom + 32
    parts.append(f'<text class="end" x="{left - 8:g}" y="{legend + 11}">{percent(low)}</text>')
    for shade in range(STEPS):
        parts.append(
            f'<rect class="h{shade}" x="{left + 18 * shade:g}" y="{legend}" width="18" '
            'height="14"/>'
        )
    right = left + 18 * STEPS + 8
    parts.append(f'<text x="{right:g}" y="{legend + 11}">{percent(high)}</text>')
    return _figure(title, about, legend + 20, parts)


def line_plot(
    title: str, about: str, blocks: Sequence[str], lines: Mapping[str, Sequence[float]]
) -> str:
    """lines: label -> a value >= 0 for each block. What is not finite is left out."""
    left, top, height = 64, 34, 200
    bottom = top + height
    values = [v for line in lines.values() for v in line if math.isfinite(v)]
    high = _round_up(max(values, default=0.0))
    step = (WIDTH - left - 24) / max(1, len(blocks) - 1)
    columns = [left + step * x for x in range(len(blocks))]
    dot = 2 if step < 16 else 3.5
    parts = []
    for part in range(5):
        y = bottom - height * part / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 20}" y1="{y:g}" y2="{y:g}"/>')
        label = f"{high * part / 4:.3g}" if high < 1e-4 else f"{high * part / 4:.4g}"
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 4:g}">{label}</text>')
    parts += _ticks(blocks, columns, bottom + 18)
    for number, (label, line) in enumerate(lines.items()):
        points = [
            (x, bottom - height * value / high, block, value)
            for x, value, block in zip(columns, line, blocks, strict=True)
            if math.isfinite(value)
        ]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="l{number}" points="{joined}"/>')
        parts += [
            f'<circle class="l{number}" cx="{x:.1f}" cy="{y:.1f}" r="{dot}"><title>block '
            f"{escape(block)}, {escape(label)}: {value:.4g}</title></circle>"
            for x, y, block, value in points
        ]
        at = left + 220 * number
        parts.append(f'<rect class="k{number}" x="{at}" y="8" width="18" height="4" rx="2"/>')
        parts.append(f'<text x="{at + 26}" y="15">{escape(label)}</text>')
    return _figure(title, about, bottom + 28, parts)


def _ticks(labels: Sequence[str], columns: Sequence[float], y: float) -> list[str]:
    """At most 16 labels under the columns, evenly."""
    every = -(-len(labels) // 16)
    return [
        f'<text class="mid" x="{x:.1f}" y="{y:g}">{escape(label)}</text>'
        for number, (x, label) in enumerate(zip(columns, labels, strict=True))
        if number % every == 0
    ]


def _round_up(value: float) -> float:
    """To 1, 2, 4 or 8 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-9))


def _figure(title: str, about: str, height: float, parts: Sequence[str]) -> str:
    tag = re.sub(r"\W+", "-", title.lower())
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{SIDEWAYS}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{tag}-t {tag}-d">'
        f'<title id="{tag}-t">{escape(title)}</title><desc id="{tag}-d">{escape(about)}</desc>'
        f'{"".join(parts)}</svg></div><p class="about">{escape(about)}</p></figure>'
    )

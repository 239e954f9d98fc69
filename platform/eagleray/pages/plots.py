"""Charts as inline SVG and plain HTML: no script, no library, colours from the page, so that both schemes can be read.

A chart is as wide as its place: positions are percentages and only shapes stretch, so text keeps its size on a phone.
Bars with names are a real table, each with a small SVG bar, which a screen reader reads as numbers.

Example:
    >>> svg = histogram(Histogram("Scores", edges=(0.0, 0.5, 1.0), counts=(3, 9)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from eagleray.assure import phrases
from eagleray.assure.report import Bars, Curve, Curves, Heatmap, Histogram, Line
from eagleray.pages import wording

NUM_TICKS = 5
DEEPEST = 0.55  # opacity of a full cell: text on it keeps a contrast of 4.5 in both schemes
FEW_COLUMNS = 14  # of a heatmap: so few have room for large cells
CHAR_PX = 7  # of a digit at the axis' 12 px, for the room to the left of the y axis
SECOND_STEPS = (1, 2, 5, 10, 15, 20, 30, 60)
MINUTE_STEPS = tuple(60 * step for step in (1, 2, 5, 10, 15, 20, 30, 60))
HOUR_STEPS = tuple(3600 * step for step in (1, 2, 3, 6, 12, 24, 48, 72, 168))


def bars(block: Bars) -> str:
    """A table with one bar a row."""
    top = max((bar.value for bar in block.bars), default=0.0) or 1.0
    whole = block.whole
    head = f'<th scope="col">name</th><th></th><th scope="col">{escape(wording.visible(block.unit or "value"))}</th>'
    head += '<th scope="col">share</th>' if whole is not None else ""
    rows = []
    for bar in block.bars:
        label, key = wording.visible(bar.label), wording.visible(bar.key)
        name = f"<bdi>{escape(wording.shorten(label, 60))}</bdi>"
        share = f'<td class="n soft">{escape(phrases.share(bar.value, whole))}</td>' if whole is not None else ""
        width = max(100 * bar.value / top, 0.4 if bar.value > 0 else 0.0)
        rows.append(
            f'<tr title="{escape(f"{label} {key}".strip())}"><th scope="row">{name}</th>'
            f'<td class="track"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="mark" width="{width:.2f}" height="10"/></svg></td>'
            f'<td class="n">{escape(wording.number(bar.value))}</td>{share}</tr>'
        )
    return (
        f'<table class="bars"><caption class="unseen">{escape(wording.visible(block.title))}</caption>'
        f'<thead class="unseen"><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def histogram(block: Histogram) -> str:
    """Bars between edges, over a linear axis, with the numbers in a folded table."""
    first, last = block.edges[0], block.edges[-1]
    span = (last - first) or 1.0
    ticks = nice_ticks(max(block.counts), is_count=True)
    marks = []
    for (left, right), count in zip(pairwise(block.edges), block.counts, strict=True):
        x, width = 100 * (left - first) / span, 100 * (right - left) / span
        height = max(100 * count / ticks[-1], 0.7) if count else 0.0
        told = f"{edge(left)} to {edge(right)}: {count:,} {block.y_label}".strip()
        marks.append(
            f'<rect class="mark" x="{x + 0.06 * width:.3f}%" y="{100 - height:.3f}%" width="{0.88 * width:.3f}%" '
            f'height="{height:.3f}%"><title>{escape(wording.visible(told))}</title></rect>'
        )
    x_ticks = [(100 * (tick - first) / span, edge(tick)) for tick in inner_ticks(first, last)]
    peak = max(range(len(block.counts)), key=lambda index: block.counts[index])
    told = (
        f"{block.title}: histogram of {sum(block.counts):,} {block.y_label} over {block.x_label}; the highest bar is "
        f"{block.counts[peak]:,}, from {edge(block.edges[peak])} to {edge(block.edges[peak + 1])}"
    )
    return frame("".join(marks), told, x_ticks, ticks, (block.x_label, block.y_label)) + _numbers(block)


def line(block: Line) -> str:
    """A line over a filled area, from zero, with its reference level."""
    if len(block.points) < 2:
        return '<p class="soft">Too few samples to draw.</p>'
    xs, ys = [x for x, _ in block.points], [y for _, y in block.points]
    first, last = (min(0.0, xs[0]) if block.x_unit == "s" else xs[0]), xs[-1]
    span = (last - first) or 1.0
    ticks = nice_ticks(max(*ys, block.reference or 0.0))
    shape = " ".join(f"{1000 * (x - first) / span:.1f},{1000 - 1000 * y / ticks[-1]:.1f}" for x, y in block.points)
    begin, end = (1000 * (x - first) / span for x in (xs[0], last))
    marks = (
        '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">'
        f'<polygon class="area" points="{begin:.1f},1000 {shape} {end:.1f},1000"/>'
        f'<polyline class="stroke" points="{shape}"/></svg>'
    )
    if block.reference is not None:
        y = 100 - 100 * block.reference / ticks[-1]
        marks += f'<line class="level" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
        marks += _level_label(block.reference_label, y, ys[0] - block.reference, ys[-1] - block.reference)
    if block.x_unit == "s":
        x_ticks = [(100 * (tick - first) / span, label) for tick, label in time_ticks(last)]
    else:
        x_ticks = [(100 * (tick - first) / span, edge(tick)) for tick in inner_ticks(first, last)]
    told = (
        f"{block.title}: {block.y_label} over {block.x_label}; lowest {wording.number(min(ys))}, "
        f"highest {wording.number(max(ys))}, {block.reference_label}"
    )
    return frame(marks, told, x_ticks, ticks, (block.x_label, block.y_label))


def curves(block: Curves) -> str:
    """Lines over common axes, told apart by colour and by dashes, with a legend above where there are several."""
    points = [point for curve in block.curves for point in curve.points]
    if not points:
        return '<p class="soft">Nothing to draw.</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    first, last = (0.0, 1.0) if block.is_unit else (min(xs), max(xs))
    span = (last - first) or 1.0
    ticks = (
        [index / NUM_TICKS for index in range(NUM_TICKS + 1)]
        if block.is_unit
        else enclosing_ticks(min(0.0, *ys), max(ys))
    )
    low, high = ticks[0], ticks[-1]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return 100 * (point[0] - first) / span, 100 - 100 * (point[1] - low) / (high - low)

    diagonal = '<line class="level" x1="0" y1="100%" x2="100%" y2="0"/>' if block.has_diagonal else ""
    lines, dots = [], []
    for index, curve in enumerate(block.curves):
        at = [place(point) for point in curve.points]
        shape = " ".join(f"{10 * x:.1f},{10 * y:.1f}" for x, y in at)
        lines.append(f'<polyline class="stroke s{index}" points="{shape}"/>')
        for (x, y), point in zip(at, curve.points, strict=True) if block.has_marks else ():
            told = f"{curve.label}: {edge(point[0])}, {wording.number(point[1], 3)}"
            title = f"<title>{escape(wording.visible(told))}</title>"
            dots.append(f'<circle class="dot s{index}" cx="{x:.2f}%" cy="{y:.2f}%" r="3.500">{title}</circle>')
    marks = (
        f'{diagonal}<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'overflow="visible">{"".join(lines)}</svg>{"".join(dots)}'
    )
    x_ticks = [(100 * (tick - first) / span, edge(tick)) for tick in inner_ticks(first, last)]
    ends = "; ".join(
        f"{curve.label} ends at {wording.number(curve.points[-1][1], 3)}" for curve in block.curves if curve.points
    )
    told = f"{block.title}: {block.y_label} over {block.x_label}; {ends}"
    return _legend(block.curves) + frame(marks, told, x_ticks, ticks, (block.x_label, block.y_label))


def _legend(shown: Sequence[Curve]) -> str:
    if len(shown) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="stroke s{index}" d="M0 4h26"/></svg>'
        f"<bdi>{escape(wording.shorten(wording.visible(curve.label), 48))}</bdi></li>"
        for index, curve in enumerate(shown)
    )
    return f'<ul class="legend">{items}</ul>'


def heatmap(block: Heatmap) -> str:
    """A real table, each cell shaded by the cube root of its share of its row, so that one percent shows.

    Where rows and columns are the same, the diagonal is of the main colour and what lies beside it of another.
    """
    is_square = block.rows == block.columns
    heads = "".join(
        f'<th scope="col" title="{escape(wording.visible(name))}">'
        f"<span>{escape(wording.shorten(wording.visible(name), 24))}</span></th>"
        for name in block.columns
    )
    rows = []
    for at, (name, counts) in enumerate(zip(block.rows, block.counts, strict=True)):
        whole = sum(counts) or 1
        label = wording.visible(name)
        cells = [
            _cell(count, count / whole, f"{label} / {wording.visible(column)}: {count:,}", is_square and at != index)
            for index, (count, column) in enumerate(zip(counts, block.columns, strict=True))
        ]
        head = f'<th scope="row" title="{escape(label)}"><bdi>{escape(wording.shorten(label, 32))}</bdi></th>'
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    row_label, column_label, title = (
        escape(wording.visible(text)) for text in (block.row_label, block.column_label, block.title)
    )
    size = " large" if len(block.columns) <= FEW_COLUMNS else ""
    return (
        f'<div class="scroll"><table class="heat{size}"><caption class="unseen">{title}</caption><thead>'
        f'<tr class="over"><td></td><th colspan="{max(1, len(block.columns))}">{column_label}</th></tr>'
        f'<tr><td class="corner">{row_label}</td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(count: int, share: float, told: str, is_beside: bool) -> str:
    if not count:
        return "<td></td>"
    css = ' class="beside"' if is_beside else ""
    shade = f'<i style="opacity:{DEEPEST * share ** (1 / 3):.3f}"></i>'
    return f'<td{css} title="{escape(told)}">{shade}<b>{escape(wording.number(count))}</b></td>'


def _level_label(label: str, y: float, at_start: float, at_end: float) -> str:
    """The text of a reference level, at the end and on the side where the line is farther away."""
    is_left = abs(at_start) > abs(at_end)
    is_below = (at_start if is_left else at_end) > 0
    place = f'x="{0 if is_left else 100}%" dx="{6 if is_left else 0}" y="{y:.2f}%" dy="{16 if is_below else -7}"'
    anchor = "start" if is_left else "end"
    return f'<text class="halo" {place} text-anchor="{anchor}">{escape(wording.visible(label))}</text>'


def nice_ticks(top: float, *, is_count: bool = False) -> list[float]:
    """From 0 up to at least ``top`` (>= 0) in at most NUM_TICKS steps of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        top: The largest value.
        is_count: Whether halves make no sense.
    """
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / NUM_TICKS))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * NUM_TICKS >= top * (1 - 1e-9))
    if is_count and step != int(step):
        step = float(math.ceil(step))
    return [step * index for index in range(math.ceil(top / step - 1e-9) + 1)]


def enclosing_ticks(low: float, high: float) -> list[float]:
    """Round values that enclose ``low`` (<= 0) to ``high``."""
    step = nice_ticks(high - low)[1]
    return [step * index for index in range(math.floor(low / step + 1e-9), max(1, math.ceil(high / step - 1e-9)) + 1)]


def time_ticks(last_s: float) -> list[tuple[float, str]]:
    """Ticks of a time axis from 0 to ``last_s`` seconds, in the unit that reads best."""
    if last_s <= 4:
        ticks = nice_ticks(last_s)
        return [(tick, f"{wording.axis_number(tick, ticks[1])} s") for tick in ticks if tick <= last_s * 1.001]
    steps, unit_s, unit = HOUR_STEPS, wording.HOUR_S, "h"
    if last_s <= 3 * wording.MINUTE_S:
        steps, unit_s, unit = SECOND_STEPS, 1, "s"
    elif last_s <= 3 * wording.HOUR_S:
        steps, unit_s, unit = MINUTE_STEPS, wording.MINUTE_S, "min"
    step = next((step for step in steps if last_s / step <= NUM_TICKS), steps[-1] * math.ceil(last_s / steps[-1] / 5))
    return [(tick, f"{tick // unit_s:,} {unit}" if tick else "0") for tick in range(0, int(last_s) + 1, step)]


def inner_ticks(first: float, last: float) -> list[float]:
    """Round values from ``first`` to ``last``, ends included when they are round."""
    span = last - first
    if span <= 0:
        return [first]
    step = nice_ticks(span)[1]
    return [step * index for index in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)]


def edge(value: float) -> str:
    """A value on an axis or in a hint."""
    return f"{value:.6g}"


def frame(
    marks: str, told: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[float], labels: tuple[str, str]
) -> str:
    """Axes, ticks and labels around marks that fill 0 to 100 % both ways."""
    y_texts = [wording.axis_number(tick, y_ticks[1] - y_ticks[0]) for tick in y_ticks]
    room = 12 + CHAR_PX * max(len(text) for text in y_texts)
    parts = [
        f'<svg class="plot" role="img" aria-label="{escape(wording.visible(told))}" style="padding-left:{room}px">'
    ]
    for tick, text in zip(y_ticks, y_texts, strict=True):
        y = 100 - 100 * (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        parts.append(f'<text x="0" dx="-8" y="{y:.2f}%" dy="4" text-anchor="end">{text}</text>')
    parts.append(marks)
    for x, text in x_ticks:
        anchor = "start" if x < 2 else "end" if x > 98 else "middle"
        parts.append(f'<text x="{x:.2f}%" y="100%" dy="20" text-anchor="{anchor}">{escape(text)}</text>')
    x_label, y_label = (escape(wording.visible(label)) for label in labels)
    parts.append(f'<text class="label" x="50%" y="100%" dy="42" text-anchor="middle">{x_label}</text>')
    parts.append(f'<text class="label" x="0" dx="-{room}" y="0" dy="-16">{y_label}</text></svg>')
    return "".join(parts)


def _numbers(block: Histogram) -> str:
    rows = "".join(
        f"<tr><td>{edge(left)} to {edge(right)}</td><td class='n'>{count:,}</td></tr>"
        for (left, right), count in zip(pairwise(block.edges), block.counts, strict=True)
    )
    x_label, y_label = (escape(wording.visible(label)) for label in (block.x_label, block.y_label))
    return (
        f'<details class="numbers"><summary>The numbers</summary><table><thead><tr><th scope="col">{x_label}</th>'
        f'<th scope="col" class="n">{y_label}</th></tr></thead><tbody>{rows}</tbody></table></details>'
    )

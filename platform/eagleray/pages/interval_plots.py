"""Figures with their intervals: a forest of rows on one axis, and named points of a trade-off.

As in ``pages.plots``: inline SVG in percentages, text that keeps its size, a real table where there are names.

Example:
    >>> html = intervals(Intervals("By site", (Interval("north", 0.9, 0.86, 0.93),), "top-1"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from eagleray.assure.report import Interval, Intervals, Mark, Scatter
from eagleray.pages import wording
from eagleray.pages.plots import edge, enclosing_ticks, frame, inner_ticks

ROOM = 0.06  # of the span, beyond the outermost bounds
LABEL_ABOVE, LABEL_BELOW = -11, 19  # px from a point to the foot of its name
NEAR = 9.0  # percent of the height within which two names at like x would meet
SIDE = 55.0  # percent of the width from which a name stands left of its point
SAME_X = 22.0  # percent of the width that a name is taken to fill


def intervals(block: Intervals) -> str:
    """A table with one interval a row, over a common axis whose ticks stand in the last row."""
    if not block.intervals:
        return '<p class="soft">Nothing to draw.</p>'
    known = [x for row in block.intervals for x in (row.value, row.low, row.high) if x is not None]
    known += [block.reference] if block.reference is not None else []
    low, high = _room(known)

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    level = ""
    if block.reference is not None:
        at = place(block.reference)
        level = f'<line class="level" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>'
    rows = []
    for row in block.intervals:
        label, note = wording.visible(row.label), wording.visible(row.note)
        marks = _whisker(row, place)
        text = f"{row.value:.{block.decimals}f}"
        bounds = ""
        if row.low is not None and row.high is not None:
            bounds = f"{row.low:.{block.decimals}f} to {row.high:.{block.decimals}f}"
        weak = ' class="weak"' if row.is_weak else ""
        rows.append(
            f'<tr{weak}><th scope="row" title="{escape(label)}"><bdi>{escape(wording.shorten(label, 48))}</bdi></th>'
            f'<td class="soft">{escape(note)}</td>'
            f'<td class="track"><svg aria-hidden="true">{level}{marks}</svg></td>'
            f'<td class="n">{text}</td><td class="n soft">{bounds}</td></tr>'
        )
    ticks = "".join(
        f'<text x="{place(tick):.2f}%" y="14" text-anchor="{_anchor(place(tick))}">{edge(tick)}</text>'
        for tick in inner_ticks(low, high)
    )
    told = f"{block.x_label}; the dotted line is {block.reference_label}" if block.reference_label else block.x_label
    title, axis = escape(wording.visible(block.title)), escape(wording.visible(told))
    head = '<th scope="col">name</th><th></th><th></th><th scope="col">value</th><th scope="col">interval</th>'
    return (
        f'<div class="scroll"><table class="forest"><caption class="unseen">{title}</caption>'
        f'<thead class="unseen"><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><td></td><td></td><td class="track"><svg class="ticks" aria-hidden="true">{ticks}</svg></td>'
        f'<td></td><td></td></tr></tfoot></table></div><p class="note">{axis}</p>'
    )


def _whisker(row: Interval, place: Callable[[float], float]) -> str:
    """The interval's line and the figure's dot."""
    line = ""
    if row.low is not None and row.high is not None:
        line = f'<line class="whisker" x1="{place(row.low):.2f}%" x2="{place(row.high):.2f}%" y1="50%" y2="50%"/>'
    return f'{line}<circle class="point" cx="{place(row.value):.2f}%" cy="50%" r="4"/>'


def scatter(block: Scatter) -> str:
    """Points with vertical bars and their names, a level across, axes around."""
    if not block.marks:
        return '<p class="soft">Nothing to draw.</p>'
    ys = [y for mark in block.marks for y in (mark.y, mark.y_low, mark.y_high) if y is not None]
    ys += [block.reference] if block.reference is not None else []
    low, high = _room(ys)
    step = enclosing_ticks(0.0, high - low)[1]
    y_ticks = [step * index for index in range(math.floor(low / step), math.ceil(high / step) + 1)]
    low, high = y_ticks[0], y_ticks[-1]
    last = 1.12 * max(mark.x for mark in block.marks) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * x / last, 100 - 100 * (y - low) / (high - low)

    parts = []
    if block.reference is not None:
        y = place(0, block.reference)[1]
        label = escape(wording.visible(block.reference_label))
        parts.append(f'<line class="level" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        parts.append(f'<text class="halo" x="0" dx="6" y="{y:.2f}%" dy="-7">{label}</text>')
    at = [place(mark.x, mark.y) for mark in block.marks]
    for index, mark in enumerate(block.marks):
        x, y = at[index]
        css = "point bad" if mark.is_good is False else "point"
        if mark.y_low is not None and mark.y_high is not None:
            ends = [place(mark.x, bound)[1] for bound in (mark.y_low, mark.y_high)]
            parts.append(f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="{ends[0]:.2f}%" y2="{ends[1]:.2f}%"/>')
        told = escape(wording.visible(_told(mark, block)))
        parts.append(f'<circle class="{css}" cx="{x:.2f}%" cy="{y:.2f}%" r="5.5"><title>{told}</title></circle>')
        is_left = x > SIDE
        side = f'dx="{-10 if is_left else 10}" text-anchor="{"end" if is_left else "start"}"'
        drop = LABEL_BELOW if _is_crowded(at, index) else LABEL_ABOVE
        name = escape(wording.shorten(wording.visible(mark.label), 36))
        parts.append(f'<text class="halo" x="{x:.2f}%" y="{y:.2f}%" {side} dy="{drop}">{name}</text>')
    x_ticks = [(100 * tick / last, edge(tick)) for tick in inner_ticks(0.0, last)]
    told = f"{block.title}: {block.y_label} over {block.x_label}; " + "; ".join(_told(m, block) for m in block.marks)
    return frame("".join(parts), told, x_ticks, y_ticks, (block.x_label, block.y_label))


def _is_crowded(at: Sequence[tuple[float, float]], index: int) -> bool:
    """Whether the name above a point would meet that of an earlier one."""
    x, y = at[index]
    return any(abs(x - other) < SAME_X and abs(y - height) < NEAR for other, height in at[:index])


def _told(mark: Mark, block: Scatter) -> str:
    bounds = f" ({mark.y_low:.3f} to {mark.y_high:.3f})" if mark.y_low is not None and mark.y_high is not None else ""
    return f"{mark.label}: {edge(mark.x)} {block.x_label}, {mark.y:.3f}{bounds}"


def _room(values: Sequence[float]) -> tuple[float, float]:
    """The span of an axis: the values, and some room beyond them."""
    low, high = min(values), max(values)
    more = ROOM * (high - low) or 0.05
    return low - more, high + more


def _anchor(percent: float) -> str:
    return "start" if percent < 2 else "end" if percent > 98 else "middle"

"""The charts of a Report: bars, histograms, lines, curves, heatmaps; plain values that ``pages.plots`` draws.

Refused: a chart that does not hold together (edges that do not ascend, rows of unequal length).

Example:
    >>> Curves("Calibration", (Curve("model", ((0.1, 0.2), (0.9, 0.8))),), is_unit=True, has_diagonal=True)
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_CURVES = 6


@dataclass(frozen=True)
class Bar:
    """One bar: ``label`` is shown, ``key`` (an id) is shown small beside it; ``value`` >= 0."""

    label: str
    value: float
    key: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar for each name, largest first or in the order that means something.

    Attributes:
        title: Heading.
        bars: The bars.
        unit: What a value counts, e.g. "images".
        whole: What 100 % is; None shows no shares.
        note: A line under the heading.
    """

    title: str
    bars: tuple[Bar, ...]
    unit: str = ""
    whole: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges.

    Attributes:
        title: Heading.
        edges: n + 1 ascending values.
        counts: n counts.
        x_label, y_label: Axes.
        note: A line under the heading.
    """

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    x_label: str = ""
    y_label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1 or list(self.edges) != sorted(self.edges) or not self.counts:
            raise ValueError(f"histogram {self.title!r}: {len(self.counts)} counts need one more edge, ascending")


@dataclass(frozen=True)
class Line:
    """A value over another.

    Attributes:
        title: Heading.
        points: (x, y) pairs, x ascending.
        x_label, y_label: Axes.
        x_unit: "s" shows x as a duration; "" as a number.
        reference: A level drawn across (a mean, a limit), or None.
        reference_label: What that level is.
        note: A line under the heading.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    x_label: str = ""
    y_label: str = ""
    x_unit: str = ""
    reference: float | None = None
    reference_label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if [x for x, _ in self.points] != sorted(x for x, _ in self.points):
            raise ValueError(f"line {self.title!r}: x does not ascend")


@dataclass(frozen=True)
class Curve:
    """One of the lines of Curves: ``points`` are (x, y) pairs, x ascending."""

    label: str
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if [x for x, _ in self.points] != sorted(x for x, _ in self.points):
            raise ValueError(f"curve {self.label!r}: x does not ascend")


@dataclass(frozen=True)
class Curves:
    """Several values over another, or one without a filled area.

    Attributes:
        title: Heading.
        curves: At most 6: more cannot be told apart.
        x_label, y_label: Axes.
        is_unit: Whether both axes run from 0 to 1 (rates); otherwise they fit the points.
        has_diagonal: Whether y = x is drawn (what a perfectly calibrated model would give).
        has_marks: Whether each point is marked.
        note: A line under the heading.
    """

    title: str
    curves: tuple[Curve, ...]
    x_label: str = ""
    y_label: str = ""
    is_unit: bool = False
    has_diagonal: bool = False
    has_marks: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.curves) > MOST_CURVES:
            raise ValueError(f"curves {self.title!r}: {len(self.curves)} of them, at most {MOST_CURVES}")


@dataclass(frozen=True)
class Heatmap:
    """Counts by two names each, dark where many.

    Attributes:
        title: Heading.
        rows: Row names.
        columns: Column names.
        counts: One tuple a row, one count a column, >= 0.
        row_label, column_label: What rows and columns are.
        note: A line under the heading.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    row_label: str = ""
    column_label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.rows) or any(len(row) != len(self.columns) for row in self.counts):
            raise ValueError(f"heatmap {self.title!r}: not {len(self.rows)} rows of {len(self.columns)} counts")


@dataclass(frozen=True)
class Interval:
    """One row of Intervals: a figure with its bounds, None where it has none; ``is_weak`` is drawn faint."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    is_weak: bool = False


@dataclass(frozen=True)
class Intervals:
    """Figures with their intervals under each other on one axis (a forest plot).

    Attributes:
        title: Heading.
        intervals: The rows, in the order that means something.
        x_label: What the axis is.
        reference: A level drawn through all rows (the whole, zero), or None.
        reference_label: What that level is.
        decimals: Digits after the point.
        note: A line under the heading.
    """

    title: str
    intervals: tuple[Interval, ...]
    x_label: str = ""
    reference: float | None = None
    reference_label: str = ""
    decimals: int = 3
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """One point of a Scatter with its vertical interval; ``is_good`` False is drawn as one that did not pass."""

    label: str
    x: float
    y: float
    y_low: float | None = None
    y_high: float | None = None
    is_good: bool | None = None


@dataclass(frozen=True)
class Scatter:
    """Named points, each with its interval: what is given up for what.

    Attributes:
        title: Heading.
        marks: The points.
        x_label, y_label: Axes; x starts at 0, y fits the points.
        reference: A level drawn across (the lowest value that passes), or None.
        reference_label: What that level is.
        note: A line under the heading.
    """

    title: str
    marks: tuple[Mark, ...]
    x_label: str = ""
    y_label: str = ""
    reference: float | None = None
    reference_label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if any(mark.x < 0 for mark in self.marks):
            raise ValueError(f"scatter {self.title!r}: x is from 0")

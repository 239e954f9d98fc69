"""Report: what was found, as plain blocks that a page shows, a file keeps and a test reads.

A judge (the score of an archive, an evaluation, a robustness sweep, a drift check) makes one Report and knows no HTML;
the pages floor shows any Report and knows no judge. The kinds of block are a closed union: a new kind is a change of
schema. A sheet's tile names its picture by uri; ``pages.sheets`` fills in the thumbnail.

Refused: values that JSON cannot hold (NaN, infinity), a report of a newer schema, a block that does not hold together.

Example:
    >>> report = Report("A run", created="2026-01-31T12:00:00Z", blocks=(Totals((Total("images", 12),)),))
    >>> Report.from_json(report.to_json()) == report
    True
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args, get_origin

from eagleray.assure.charts import (
    Bar,
    Bars,
    Curve,
    Curves,
    Heatmap,
    Histogram,
    Interval,
    Intervals,
    Line,
    Mark,
    Scatter,
)
from eagleray.core.errors import ArtifactError

__all__ = [
    "Bar",
    "Bars",
    "Block",
    "Code",
    "Curve",
    "Curves",
    "Heatmap",
    "Histogram",
    "Interval",
    "Intervals",
    "Line",
    "Mark",
    "Report",
    "Scatter",
    "Sheet",
    "Table",
    "Text",
    "Tile",
    "Total",
    "Totals",
    "Verdict",
]  # charts are blocks too

SCHEMA = 3  # 2: heatmap, curves, decimals of a table; 3: intervals, scatter

Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True)
class Verdict:
    """The one line that a reader takes away.

    Attributes:
        text: The line.
        is_good: True, False, or None where there is nothing to pass or fail.
    """

    text: str
    is_good: bool | None = None


@dataclass(frozen=True)
class Total:
    """One figure.

    Attributes:
        label: What it counts.
        value: The figure; a number is shown with thousands separators, text as it stands.
        note: A few words below it.
        tone: "" | "good" | "warn" | "bad".
    """

    label: str
    value: str | int | float
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Totals:
    """A row of figures, or an equation of them.

    Attributes:
        items: The figures.
        operators: Empty, or one sign between each two figures, e.g. ``("=", "+")``.
        title: Heading; may be empty.
        note: A line under the heading.
    """

    items: tuple[Total, ...]
    operators: tuple[str, ...] = ()
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.operators and len(self.operators) != len(self.items) - 1:
            raise ValueError(f"{len(self.items)} figures need {len(self.items) - 1} signs, not {len(self.operators)}")


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers are set to the right.

    Attributes:
        title: Heading.
        columns: Column names; all empty names show no header (a list of facts).
        rows: Cells, as many in each row as there are columns.
        note: A line under the heading.
        code_columns: Indices of columns set in a fixed-width face (digests, paths).
        is_folded: Whether the page shows it closed at first.
        decimals: Digits after the point of every number that is no int; None: as many as each needs.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    code_columns: tuple[int, ...] = ()
    is_folded: bool = False
    decimals: int | None = None

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.title!r}: a row has not {len(self.columns)} cells")


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        uri: Where the picture is; in full on hover.
        lines: Caption lines, the first one strong.
        name: Short name of the picture, shown on one line below them.
        image: ``data:image/...`` URI, or empty: then ``pages.sheets`` fills it or the page shows a plain tile.
        tag: One word on the picture, or on the plain tile in its place (a reason code, a share).
        is_unsafe: The picture must not be opened (it was refused as poison).
    """

    uri: str
    lines: tuple[str, ...] = ()
    name: str = ""
    image: str = ""
    tag: str = ""
    is_unsafe: bool = False

    def __post_init__(self) -> None:
        if self.image and not self.image.startswith("data:image/"):
            raise ValueError("a tile's image is a data:image/ URI: a page asks no network for anything")


@dataclass(frozen=True)
class Sheet:
    """A contact sheet."""

    title: str
    tiles: tuple[Tile, ...]
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy: a command or a few lines of a program."""

    title: str
    code: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text."""

    paragraphs: tuple[str, ...]
    title: str = ""


Block: TypeAlias = (
    Totals | Table | Bars | Histogram | Line | Curves | Heatmap | Intervals | Scatter | Sheet | Code | Text
)
KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in get_args(Block)}


@dataclass(frozen=True)
class Report:
    """One of the seven nouns: what a judge found.

    Attributes:
        title: What was judged.
        created: ISO 8601, UTC.
        blocks: In reading order.
        subtitle: A line under the title (which data, which model).
        verdict: The one-line finding, or None.
        schema: Of this noun.
    """

    title: str
    created: str
    blocks: tuple[Block, ...]
    subtitle: str = ""
    verdict: Verdict | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values.

        Raises:
            ValueError: A number is not finite.
        """
        whole: dict[str, Any] = _encode(self)
        whole["blocks"] = [{"kind": type(block).__name__.lower(), **_encode(block)} for block in self.blocks]
        return whole

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """The report that ``to_json`` gave.

        Raises:
            ArtifactError: It is not a report, is of a newer schema, or does not hold together.
        """
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise ArtifactError(
                "this is not a report", expected="a JSON object with a schema number", fix="make it again"
            )
        if data["schema"] > SCHEMA:
            raise ArtifactError(
                f"the report has schema {data['schema']}",
                expected=f"schema {SCHEMA} or older",
                fix="use a newer eagleray",
            )
        try:
            blocks = [_decode(KINDS[block["kind"]], _without_kind(block)) for block in data["blocks"]]
            report: Report = _decode(cls, {**data, "blocks": ()})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the report does not hold together: {type(error).__name__}: {error}",
                expected=f"blocks of {', '.join(KINDS)}",
                fix="make it again",
            ) from None
        return dataclasses.replace(report, blocks=tuple(blocks))


def _without_kind(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "kind"}


def _encode(value: Any) -> Any:
    """Dataclasses to objects, tuples to lists; numbers must be finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be kept in JSON")
    return value


def _decode(kind: Any, value: Any) -> Any:
    """The inverse of ``_encode``, led by the type hints of the nouns above."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, not {type(value).__name__}")
        if parts[-1] is Ellipsis:
            return tuple(_decode(parts[0], item) for item in value)
        return tuple(_decode(part, item) for part, item in zip(parts, value, strict=True))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, not {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        return kind(**{key: _decode(hints[key], item) for key, item in value.items()})
    if isinstance(kind, types.UnionType):
        return _decode_union(get_args(kind), value)
    if not isinstance(value, kind) and not (kind is float and type(value) is int):
        raise TypeError(f"expected {kind.__name__}, not {type(value).__name__}")
    return value


def _decode_union(options: tuple[Any, ...], value: Any) -> Any:
    for option in options:
        try:
            return _decode(option, value)
        except TypeError:
            continue
    raise TypeError(f"no place for a {type(value).__name__}")

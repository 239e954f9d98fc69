"""What is kept of a scored archive's rows as they stream by: its size depends on the number of classes, not of images.

Only the parts that the final manifest lists are read. The result does not depend on the order of parts or rows.

Example:
    >>> tally = count_rows("runs/archive")
    >>> tally.scored, tally.quarantined
    (2012, 1)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eagleray.core.commits import read_parts

SHEET_TILES = 24
SCORE_BINS = 20
BATCH_ROWS = 8_192  # about 3 MB, whatever the size of the archive
COLUMNS = ("id", "uri", "status", "reason", "detail", "label", "label_name", "score", "decision")
SCHEMA = pa.schema([(name, pa.float32() if name == "score" else pa.string()) for name in COLUMNS])
NO_REASON = "unknown"


@dataclass(frozen=True)
class Row:
    """One row of the scores, as far as a sheet shows it."""

    id: str
    uri: str
    reason: str
    detail: str
    label: str
    label_name: str
    score: float


@dataclass
class Best:
    """The ``SHEET_TILES`` distinct images with the highest (sign 1) or lowest (sign -1) score, best first."""

    sign: int
    rows: list[Row] = field(default_factory=list)

    def add(self, table: pa.Table, score: np.ndarray) -> None:
        """Takes in scored rows; ``score`` is their column as float32 (N,), all finite."""
        if len(self.rows) == SHEET_TILES:
            near = np.flatnonzero(self.sign * score >= self.sign * self.rows[-1].score)
            table = table.take(pa.array(near))
        if not len(table):
            return
        order = [("score", "descending" if self.sign > 0 else "ascending"), ("id", "ascending"), ("uri", "ascending")]
        for limit in (4 * SHEET_TILES, len(table)):  # a few suffice, unless exact duplicates crowd the top
            picked = table.take(pc.select_k_unstable(table, min(limit, len(table)), order))
            fresh = _distinct(_rows(picked))
            if len(fresh) >= SHEET_TILES or limit >= len(table):
                break
        merged = sorted(self.rows + fresh, key=lambda row: (-self.sign * row.score, row.id, row.uri))
        self.rows = _distinct(merged)[:SHEET_TILES]


@dataclass
class Tally:
    """Counts and the few rows to show.

    Attributes:
        scored, quarantined: Rows of each status.
        odd: Scored rows whose score is not finite; they are in no histogram and on no sheet.
        histogram: int64 (SCORE_BINS,) over scores from 0 to 1.
        score_sum: Of the finite scores.
        labels: Images of each label id.
        names: Name of each label id.
        decisions: Images of each decision, where the bundle has thresholds.
        reasons: Images of each reason code.
        refused: Up to SHEET_TILES rows of each reason, by uri.
    """

    scored: int = 0
    quarantined: int = 0
    odd: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))
    score_sum: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)
    decisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    refused: dict[str, list[Row]] = field(default_factory=dict)
    most: Best = field(default_factory=lambda: Best(1))
    least: Best = field(default_factory=lambda: Best(-1))

    @property
    def mean_score(self) -> float | None:
        """Mean of the finite scores; None when there are none."""
        finite = self.scored - self.odd
        return self.score_sum / finite if finite else None

    def add(self, table: pa.Table) -> None:
        """Takes in rows with the columns COLUMNS."""
        is_scored = pc.fill_null(pc.equal(table["status"], "scored"), False)
        scored, refused = table.filter(is_scored), table.filter(pc.invert(is_scored))
        self.scored += len(scored)
        self.quarantined += len(refused)
        if len(scored):
            self._add_scored(scored)
        if len(refused):
            self._add_refused(refused)

    def _add_scored(self, table: pa.Table) -> None:
        for row in table.group_by(["label", "label_name"]).aggregate([([], "count_all")]).to_pylist():
            label = row["label"] or ""
            self.labels[label] += row["count_all"]
            self.names.setdefault(label, row["label_name"] or label)
        for row in pc.value_counts(pc.drop_null(table["decision"])).to_pylist():
            self.decisions[row["values"]] += row["counts"]
        score = pc.fill_null(table["score"], float("nan")).to_numpy().astype(np.float32)
        is_finite = np.isfinite(score)
        if not is_finite.all():
            self.odd += int((~is_finite).sum())
            table, score = table.filter(pa.array(is_finite)), score[is_finite]
        self.histogram += np.histogram(np.clip(score, 0.0, 1.0), SCORE_BINS, (0.0, 1.0))[0]
        self.score_sum += float(score.sum(dtype=np.float64))
        self.most.add(table, score)
        self.least.add(table, score)

    def _add_refused(self, table: pa.Table) -> None:
        reasons = pc.fill_null(table["reason"], NO_REASON)
        for row in pc.value_counts(reasons).to_pylist():
            reason = row["values"]
            self.reasons[reason] += row["counts"]
            of_reason = table.filter(pc.equal(reasons, reason))
            first = pc.select_k_unstable(of_reason, min(SHEET_TILES, len(of_reason)), [("uri", "ascending")])
            rows = self.refused.get(reason, []) + _rows(of_reason.take(first))
            self.refused[reason] = sorted(rows, key=lambda kept: kept.uri)[:SHEET_TILES]


def count_rows(folder: str | Path) -> Tally:
    """Streams the listed parts of a finished run.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A listed part does not hold.
    """
    tally = Tally()
    for table in _tables(folder):
        tally.add(table)
    return tally


def _tables(folder: str | Path) -> Iterator[pa.Table]:
    """The rows in tables of about BATCH_ROWS; a column that an older run has not is null."""
    held: list[pa.Table] = []
    for part in read_parts(folder, COLUMNS):
        columns = [part[name] if name in part.column_names else pa.nulls(len(part)) for name in COLUMNS]
        held.append(pa.table(columns, list(COLUMNS)).cast(SCHEMA))
        if sum(len(table) for table in held) >= BATCH_ROWS:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _rows(table: pa.Table) -> list[Row]:
    def text(row: dict[str, Any], name: str) -> str:
        return str(row[name]) if row[name] is not None else ""

    names = ("id", "uri", "reason", "detail", "label", "label_name")
    return [
        Row(**{name: text(row, name) for name in names}, score=float(row["score"] if row["score"] is not None else 0.0))
        for row in table.to_pylist()
    ]


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """The first row of each image, in order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.id or row.uri, row)
    return list(first.values())

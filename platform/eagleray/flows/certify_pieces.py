"""Which images choose thresholds and which certify them: a division of a split that is blind to labels.

By a hash of the image, or of its group, under names of their own: neither division has to do with that of the corpus.
Where there are groups, one image stands for each: shots of one object are no independent evidence, and the two pieces
must be drawn alike for one to foresee the other.

Example:
    >>> pieces = divide(subject, piece=1.0, selection=0.25, seed=0)
    >>> int(pieces.is_selection.sum()), int((~pieces.is_selection).sum())
    (102, 301)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.flows.evaluate import Subject
from eagleray.vision.corpus import open_corpus
from eagleray.vision.splits import SplitRule, hash_points

Bool = npt.NDArray[np.bool_]

CALIBRATION = ("calibration", "calib", "cal")  # names of a split that is made for this
HELD_OUT = "test"


@dataclass(frozen=True)
class Pieces:
    """The division.

    Attributes:
        keep: bool (N,) of the whole corpus: images of either piece.
        is_selection: bool (n,) of those kept: whether it chooses; the others certify.
        num_set_aside: Images of the split that are in neither piece: held back, or not the one of their group.
        unit: ``image`` or ``group``: what an image stands for.
    """

    keep: Bool
    is_selection: Bool
    num_set_aside: int
    unit: str


def split_name(corpus: str, asked: str, rule: SplitRule) -> str:
    """The split to take: as asked; of ``auto`` one that is named for calibration, else the held-out part.

    Raises:
        ArtifactError: There is no corpus.
    """
    if asked != "auto":
        return asked
    opened = open_corpus(corpus)
    names: Collection[str] = rule.fractions
    if rule.column and rule.column in opened.columns:
        parts = [pq.read_table(opened.shard_path(shard), columns=[rule.column]) for shard in opened.shards]
        names = set(pc.unique(pa.concat_tables(parts)[rule.column]).to_pylist()) if parts else ()
    return next((name for name in CALIBRATION if name in names), HELD_OUT)


def divide(subject: Subject, *, piece: float, selection: float, seed: int) -> Pieces:
    """Divides the images of a subject.

    Args:
        subject: Whose ``keep`` is divided.
        piece: Share of the groups that is used at all.
        selection: Share of those that chooses.
        seed: Another seed is another division.
    """
    at = np.flatnonzero(subject.keep)
    ids = [name.decode() for name in subject.index.ids[at].tolist()]
    texts = _texts(subject, at, ids)
    # Texts of their own: by the plain text the images of a hashed split all lie in one interval
    is_used = hash_points([f"certify piece:{text}" for text in texts], seed) < piece
    is_selection = hash_points([f"certify selection:{text}" for text in texts], seed) < selection
    if subject.splits.group_column:
        candidates = np.flatnonzero(is_used)
        points = hash_points([f"certify image:{ids[row]}" for row in candidates.tolist()], seed)
        ranked = candidates[np.argsort(points, kind="stable")]
        first = np.unique(subject.splits.groups[at[ranked]], return_index=True)[1]
        is_one = np.zeros(len(at), bool)
        is_one[ranked[first]] = True
        is_used &= is_one
    keep = np.zeros(len(subject.keep), bool)
    keep[at[is_used]] = True
    unit = "group" if subject.splits.group_column else "image"
    return Pieces(keep, is_selection[is_used], int((~is_used).sum()), unit)


def _texts(subject: Subject, at: npt.NDArray[np.int64], ids: list[str]) -> list[str]:
    """What is hashed for each image: its group, or itself."""
    column = subject.splits.group_column
    if not column:
        return ids
    named = subject.index.columns[column].take(pa.array(at)).to_pylist()
    return [name or own for name, own in zip(named, ids, strict=True)]

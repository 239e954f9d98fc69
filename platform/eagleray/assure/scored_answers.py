"""The scores of a run as a matrix of probabilities, in the order of given images: what an evaluation is made of.

A run keeps the most probable labels of an image, 1,000 at most. Of a model with more, the rest count as probability 0:
that leaves top-k, F1 and calibration exact and changes ROC-AUC and mAP only below the thousandth label.

Example:
    >>> read_answers("runs/eval/scoring", bundle.label_ids, ids).probabilities.shape
    (250, 1000)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from eagleray.core.commits import open_scores

BATCH_ROWS = 2048  # about 50 MB of labels and scores at 1,000 labels a row
COLUMNS = ["id", "uri", "status", "topk_labels", "topk_scores"]


@dataclass(frozen=True)
class ScoredAnswers:
    """What the model said of some images.

    Attributes:
        probabilities: float32 (N, C); 0 for labels that the run did not keep and for images that it did not score.
        uris: N uris; empty where there is none.
        is_scored: bool (N,).
    """

    probabilities: npt.NDArray[np.float32]
    uris: list[str]
    is_scored: npt.NDArray[np.bool_]


def read_answers(folder: str | Path, label_ids: Sequence[str], ids: Sequence[str]) -> ScoredAnswers:
    """Reads the parts that the run's manifest lists.

    Args:
        folder: A finished run.
        label_ids: The model's C labels, in order.
        ids: The N images, SHA-256 in hex, each once.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A listed part does not hold.
    """
    wanted, labels = pa.array(ids, pa.string()), pa.array(label_ids, pa.string())
    probabilities = np.zeros((len(ids), len(label_ids)), np.float32)
    uris, is_scored = [""] * len(ids), np.zeros(len(ids), bool)
    for part in open_scores(folder).get_fragments():
        for batch in part.to_batches(columns=COLUMNS, batch_size=BATCH_ROWS):
            at = pc.index_in(batch["id"], value_set=wanted)
            is_mine = pc.and_(pc.is_valid(at), pc.equal(batch["status"], "scored"))
            rows, places = batch.filter(is_mine), at.filter(is_mine).to_numpy().astype(np.int64)
            if not len(places):
                continue
            columns = pc.index_in(pc.list_flatten(rows["topk_labels"]), value_set=labels).to_numpy()
            scores = pc.list_flatten(rows["topk_scores"]).to_numpy()
            lengths = pc.list_value_length(rows["topk_labels"]).to_numpy()
            probabilities[np.repeat(places, lengths), columns] = scores
            is_scored[places] = True
            for place, uri in zip(places.tolist(), rows["uri"].to_pylist(), strict=True):
                uris[place] = uri
    return ScoredAnswers(probabilities, uris, is_scored)

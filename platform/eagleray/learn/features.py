"""Features of a frozen backbone: read from finished scores, and fed to the loop as batches.

Example:
    >>> features = read_features("runs/embeddings", index)
    >>> fitted = fit_head(features, index.first_targets, HeadSettings(), num_classes=len(index.labels))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eagleray.core.commits import open_scores
from eagleray.core.errors import DataError
from eagleray.learn.corpus_index import CorpusIndex, Ints
from eagleray.learn.feeding import Batch, FeedSettings
from eagleray.learn.order import Position, check_world, mix64, steps, steps_in


def read_features(scores: str | Path, index: CorpusIndex) -> NDArray[np.float32]:
    """The embeddings of an index's images from a finished ``score`` run over its corpus.

    Args:
        scores: The ``--out`` folder of ``eagleray score --embeddings``.
        index: Which images, in which order.

    Returns:
        float32 (N, D).

    Raises:
        DataError: The run kept no embeddings, or lacks images of the index.
    """
    dataset = open_scores(scores)
    names = set(dataset.schema.names)
    if not {"embedding", "id"} <= names:
        raise DataError(
            f"{scores} holds no embeddings", expected="a run that kept them", fix="score again with --embeddings"
        )
    wanted = {index.id_of(position): position for position in range(len(index))}
    found: NDArray[np.float32] | None = None
    has = np.zeros(len(index), np.bool_)
    for batch in dataset.to_batches(columns=["id", "embedding"]):
        column = batch.column("embedding")
        width = column.type.list_size
        values = np.asarray(column.values, np.float16).reshape(-1, width)[column.offset : column.offset + len(column)]
        if found is None:
            found = np.empty((len(index), width), np.float32)
        is_valid = np.asarray(column.is_valid())
        for row, image_id in enumerate(batch.column("id").to_pylist()):
            position = wanted.get(image_id)
            if position is not None and is_valid[row]:
                found[position], has[position] = values[row], True
    if found is None or not has.all():
        raise DataError(
            f"{scores} has no embedding of {int((~has).sum()):,} of {len(index):,} images",
            expected="every image scored",
            fix="score the corpus again with --embeddings, and look at what was quarantined",
        )
    return found


def read_probabilities(scores: str | Path, index: CorpusIndex) -> NDArray[np.float32]:
    """What a model said of an index's images, from a finished ``score`` run over its corpus that kept every label.

    Args:
        scores: The ``--out`` folder of ``eagleray score --top-k``, with as many as the model has labels.
        index: Which images, in which order; its labels are the columns.

    Returns:
        float32 (N, C).

    Raises:
        DataError: The run lacks images or labels of the index.
    """
    wanted = {index.id_of(position): position for position in range(len(index))}
    found = np.full((len(index), len(index.labels)), np.nan, np.float32)
    columns = pa.array(index.labels, pa.string())
    for batch in open_scores(scores).to_batches(columns=["id", "topk_labels", "topk_scores"]):
        places = [wanted.get(image_id, -1) for image_id in batch.column("id").to_pylist()]
        lists = batch.column("topk_labels")
        rows = np.repeat(np.array(places, np.int64), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
        labels = pc.fill_null(pc.index_in(lists.flatten(), value_set=columns), -1).to_numpy()
        values = batch.column("topk_scores").flatten().to_numpy()
        is_ours = (rows >= 0) & (labels >= 0)
        found[rows[is_ours], labels[is_ours]] = values[is_ours]
    has = ~np.isnan(found).any(1)
    if not has.all():
        raise DataError(
            f"{scores} does not say all {len(index.labels)} labels of {int((~has).sum()):,} of {len(index):,} images",
            expected="every image scored, with every label",
            fix=f"score the corpus again with --top-k {len(index.labels)}, and look at what was quarantined",
        )
    return found


class ArrayBatches:
    """Batches of rows of arrays: a ``BatchSource`` over features that are in memory.

    Args:
        arrays: Name to array, the first axis is the image; ``key`` is added where it is absent.
        settings: Batch size, seed and last batch are used.
        rank: Of this worker.
        world_size: Workers.
        repeats: int64 (N,): how often each row comes; None: once.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        settings: FeedSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        repeats: Ints | None = None,
    ) -> None:
        check_world(settings.batch_size, world_size)
        num_rows = len(next(iter(arrays.values())))
        self._arrays = {"key": np.arange(num_rows, dtype=np.uint64), **arrays}
        self._settings, self._rank, self._world_size = settings, rank, world_size
        self._rows = np.arange(num_rows) if repeats is None else np.repeat(np.arange(num_rows), repeats)
        self._steps_per_epoch = steps_in(len(self._rows), settings.batch_size, keeps_last=settings.keeps_last)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._steps_per_epoch

    def iterate(self, start: Position) -> Iterator[Batch]:
        """Batches from a position on, epoch after epoch, without end."""
        settings, epoch, consumed = self._settings, start.epoch, start.consumed
        while True:
            salt = mix64(mix64(np.array([settings.seed], np.uint64)) ^ np.uint64(epoch))
            points = mix64(np.arange(len(self._rows), dtype=np.uint64) ^ salt)
            order = self._rows[np.argsort(points, kind="stable")]
            for step in steps(
                order,
                settings.batch_size,
                rank=self._rank,
                world_size=self._world_size,
                start=consumed,
                keeps_last=settings.keeps_last,
            ):
                arrays = {name: values[step.positions] for name, values in self._arrays.items()}
                yield Batch(arrays, Position(epoch, step.consumed), epoch, step.num_images, step.weight)
            epoch, consumed = epoch + 1, 0

"""Which images a run sees: ids, places and targets of a corpus, read without the image bytes.

44 bytes an image and its targets: a hundred million images fit a machine. The index knows no order; order.py does.

Example:
    >>> index = build_index(open_corpus("corpora/photos"))
    >>> train = index.subset(index.metadata_mask("split", "train"))
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eagleray.core.errors import ConfigError, DataError
from eagleray.vision.corpus import ShardManifest

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CorpusIndex:
    """The images of a run.

    Attributes:
        root: The corpus folder.
        corpus_digest: Of the corpus that it was built from.
        shards: Shard paths, relative to the root.
        shard: int32 (N,): number of each image's shard.
        row: int32 (N,): its row there.
        ids: uint8 (N, 32): SHA-256 of its bytes.
        offsets: int64 (N + 1,): its targets are ``classes[offsets[i]:offsets[i + 1]]``.
        classes: int32: class indices.
        labels: Label id of each class index.
        metadata: Columns that were asked for: object (N,) of str or None.
    """

    root: Path
    corpus_digest: str
    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    ids: NDArray[np.uint8]
    offsets: Ints
    classes: NDArray[np.int32]
    labels: tuple[str, ...]
    metadata: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    def id_of(self, position: int) -> str:
        """The id of one image, hex."""
        return self.ids[position].tobytes().hex()

    def targets_of(self, position: int) -> tuple[int, ...]:
        """The class indices of one image; empty when it has no label."""
        start, stop = self.offsets[position], self.offsets[position + 1]
        return tuple(int(value) for value in self.classes[start:stop])

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """uint64 (N,): as ``task.keys`` gives them, what seeds random choices about an image."""
        return np.ascontiguousarray(self.ids[:, :8]).view(">u8")[:, 0].astype(np.uint64)

    @property
    def num_targets(self) -> Ints:
        """int64 (N,): how many labels each image has."""
        return np.diff(self.offsets)

    @cached_property
    def first_targets(self) -> Ints:
        """int64 (N,): the first class index of each image, -1 where it has none."""
        first = np.full(len(self), -1, np.int64)
        has = self.num_targets > 0
        first[has] = self.classes[self.offsets[:-1][has]]
        return first

    @cached_property
    def class_counts(self) -> Ints:
        """int64 (C,): images of each class; an image with two labels counts for both."""
        return np.bincount(self.classes, minlength=len(self.labels)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the images, their places, their targets and the labels: what a run's data is."""
        total = hashlib.sha256(b"eagleray-index-v1\n")
        for array in (self.ids, self.shard, self.row, self.offsets, self.classes):
            total.update(np.ascontiguousarray(array).tobytes())
        total.update("\n".join(self.labels).encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def metadata_mask(self, column: str, value: str) -> NDArray[np.bool_]:
        """bool (N,): where a metadata column has a value.

        Raises:
            ConfigError: The column was not asked for.
        """
        if column not in self.metadata:
            raise ConfigError(
                f"the index has no column {column!r}", expected=f"one of {', '.join(self.metadata) or 'none'}"
            )
        return np.asarray(self.metadata[column] == value, np.bool_)

    def subset(self, chosen: NDArray[Any]) -> CorpusIndex:
        """The index of some of its images, in its own order.

        Args:
            chosen: bool (N,), or positions in any order.
        """
        mask = np.zeros(len(self), np.bool_)
        mask[chosen] = True
        counts = self.num_targets
        return replace(
            self,
            shard=self.shard[mask],
            row=self.row[mask],
            ids=self.ids[mask],
            offsets=np.concatenate([[0], np.cumsum(counts[mask])]).astype(np.int64),
            classes=self.classes[np.repeat(mask, counts)],
            metadata={name: values[mask] for name, values in self.metadata.items()},
        )


def build_index(
    corpus: ShardManifest, *, labels: Sequence[str] | None = None, columns: Sequence[str] = ()
) -> CorpusIndex:
    """Scans a corpus without its image bytes.

    Args:
        corpus: The corpus.
        labels: Label ids in class order; None takes those of the corpus, sorted.
        columns: Metadata columns to keep, e.g. ``("split",)``.

    Raises:
        DataError: ``labels`` are given and the corpus has others; they are named.
        ConfigError: The corpus has no such column.
    """
    absent = sorted(set(columns) - set(corpus.columns))
    if absent:
        raise ConfigError(
            f"{corpus.path} has no column {', '.join(absent)}",
            expected=f"of {', '.join(corpus.columns) or 'none: its source had no metadata'}",
            fix="name a column of the corpus",
        )
    paths = tuple(str(shard["path"]) for shard in corpus.shards)
    tables = [_read(corpus.path / path, columns) for path in paths]
    table = pa.concat_tables(tables) if tables else _empty(columns)
    lists = table["labels"].combine_chunks()
    values = lists.flatten()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    names, classes = _classes(values, labels, corpus)
    rows = [part.num_rows for part in tables]
    numbers = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    return CorpusIndex(
        root=corpus.path,
        corpus_digest=corpus.digest,
        shards=paths,
        shard=numbers,
        row=np.concatenate([np.arange(count, dtype=np.int32) for count in rows] or [np.empty(0, np.int32)]),
        ids=np.frombuffer(bytes.fromhex("".join(table["id"].to_pylist())), np.uint8).reshape(-1, 32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        classes=classes,
        labels=names,
        metadata={name: np.array(table[name].to_pylist(), dtype=object) for name in columns},
    )


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    return pq.read_table(path, columns=["id", "labels", *columns], use_threads=False, memory_map=False)


def _empty(columns: Sequence[str]) -> pa.Table:
    fields = [("id", pa.string()), ("labels", pa.list_(pa.string())), *((name, pa.string()) for name in columns)]
    return pa.schema(fields).empty_table()


def _classes(
    values: pa.Array, labels: Sequence[str] | None, corpus: ShardManifest
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The label ids in class order, and the class index of every label of every image."""
    seen = values.dictionary_encode()
    words = seen.dictionary.to_pylist()
    names = tuple(sorted(words)) if labels is None else tuple(labels)
    number = {name: index for index, name in enumerate(names)}
    unknown = sorted(word for word in words if word not in number)
    if unknown:
        raise DataError(
            f"{corpus.path} has {len(unknown)} labels that are not among the classes: {', '.join(unknown[:5])}",
            expected=f"of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}",
            fix="choose the classes from the corpus, or correct its labels",
        )
    table = np.array([number[word] for word in words], np.int32)
    codes = np.asarray(seen.indices.to_numpy(zero_copy_only=False), np.int64)
    return names, table[codes] if len(codes) else np.empty(0, np.int32)

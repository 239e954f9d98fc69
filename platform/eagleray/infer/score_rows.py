"""The rows of a unit: where its images are read from, what the model said of each, and the Parquet part they become.

Example:
    >>> rows = UnitRows.open(unit, Limits(), Duplicates(""))
    >>> answers = Answers(classifier, rows.num_images, has_embeddings=False)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.errors import ArtifactError
from eagleray.infer.classifier import Classifier
from eagleray.infer.probabilities import top_k
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.inputs import read_unit_listing
from eagleray.vision.prediction import decide
from eagleray.vision.sources import read_items

SCORED, QUARANTINED = "scored", "quarantined"


@dataclass(frozen=True)
class Item:
    """One image to decode: position in the unit, its bytes or why there are none, its id where it is known."""

    position: int
    data: bytes | ImageRefused
    id: str | None = None


@dataclass(frozen=True)
class Decoded:
    """What became of an item: its id, the position of the same bytes seen before, or why it has no pixels."""

    id: str | None
    same_as: int | None
    refusal: ImageRefused | None

    @property
    def has_pixels(self) -> bool:
        """Whether its slot of the batch holds an image."""
        return self.same_as is None and self.refusal is None


class Duplicates:
    """The further uris of images that a corpus keeps once.

    Args:
        path: ``duplicates.parquet`` of a corpus, or "" when there is none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._by_id: dict[str, list[str]] | None = None

    def uris(self, image_id: str) -> Sequence[str]:
        """The further uris of one image."""
        if self._by_id is None:
            self._by_id = {}
            if self._path and Path(self._path).exists():
                table = pq.read_table(self._path, columns=["id", "uri"])
                for name, uri in zip(table["id"].to_pylist(), table["uri"].to_pylist(), strict=True):
                    self._by_id.setdefault(name, []).append(uri)
        return self._by_id.get(image_id, ())


@dataclass(frozen=True)
class UnitRows:
    """A unit, opened.

    Attributes:
        kind: ``listing``, ``corpus`` or ``set_aside``.
        table: Its rows: a listing, or id and image, or uri, reason and detail.
        uris: One uri an output row.
        positions: The image's position in the unit, an output row; int64.
        limits: Caps on one image.
    """

    kind: str
    table: pa.Table
    uris: Sequence[str]
    positions: np.ndarray
    limits: Limits

    @classmethod
    def open(cls, unit: Mapping[str, Any], limits: Limits, duplicates: Duplicates) -> UnitRows:
        """Reads what a unit names.

        Raises:
            ArtifactError: A shard of the corpus cannot be read, or holds another number of images.
        """
        if unit["kind"] == "listing":
            table = read_unit_listing(dict(unit))
        else:
            table = _read_groups(unit)
        uris = table.column("uri").to_pylist()
        positions = np.arange(len(uris), dtype=np.int64)
        if table.num_rows != unit["images"]:
            raise ArtifactError(
                f"{unit['path']} holds {table.num_rows} images in unit {unit['unit']}",
                expected=f"{unit['images']}, as when the run began",
                fix="ingest the source again into a new corpus",
            )
        if unit["kind"] == "corpus" and not unit.get("keep"):  # of a selection each image counts once
            more = [(at, uri) for at, name in enumerate(table["id"].to_pylist()) for uri in duplicates.uris(name)]
            uris = uris + [uri for _, uri in more]
            positions = np.concatenate([positions, np.array([at for at, _ in more], dtype=np.int64)])
        return cls(unit["kind"], table, uris, positions, limits)

    @property
    def num_images(self) -> int:
        """Images to decode."""
        return int(self.table.num_rows)

    def items(self) -> Iterator[Item]:
        """The images in order, read as they are asked for."""
        if self.kind == "listing":
            for position, data in read_items(self.table, self.limits):
                yield Item(position, data)
        else:
            ids, images = self.table["id"], self.table["image"]
            for position in range(self.table.num_rows):
                yield Item(position, images[position].as_py(), ids[position].as_py())


def _read_groups(unit: Mapping[str, Any]) -> pa.Table:
    columns = ["id", "uri", "image"] if unit["kind"] == "corpus" else ["uri", "reason", "detail"]
    try:
        with pq.ParquetFile(unit["path"]) as file:
            groups = range(unit["first_group"], unit["first_group"] + unit["num_groups"])
            if not unit.get("keep"):
                return file.read_row_groups(groups, columns=columns)
            return pa.concat_tables(_kept(file, groups, bytes.fromhex(unit["keep"]), columns))
    except (OSError, pa.ArrowException, IndexError) as error:
        raise ArtifactError(
            f"{unit['path']} cannot be read: {str(error).splitlines()[0]}",
            expected="the shard as its corpus' manifest lists it",
            fix="ingest the source again into a new corpus",
        ) from error


def _kept(file: pq.ParquetFile, groups: range, packed: bytes, columns: list[str]) -> Iterator[pa.Table]:
    """The rows whose bit is set; one row group is held at a time, those without any are not read."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
    at = 0
    for group in groups:
        rows = file.metadata.row_group(group).num_rows
        here = bits[at : at + rows]
        at += rows
        if here.any():
            yield file.read_row_group(group, columns=columns).filter(pa.array(here))


class Answers:
    """What the model said of a unit's images.

    Args:
        classifier: Compiled.
        num_images: Images of the unit.
        has_embeddings: Whether embeddings are kept.
    """

    def __init__(self, classifier: Classifier, num_images: int, *, has_embeddings: bool) -> None:
        self._classifier, self._has_embeddings = classifier, has_embeddings
        self._ids: list[str | None] = [None] * num_images
        self._refusals: dict[int, ImageRefused] = {}
        self._same_as: dict[int, int] = {}
        self._answer = np.full(num_images, -1, np.int64)  # position -> row of the arrays below
        self._top: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._embeddings: list[np.ndarray] = []
        self._decisions: list[str | None] = []

    @property
    def num_inferred(self) -> int:
        """Images that the engine has seen."""
        return len(self._decisions)

    def add(self, items: Sequence[Item], decoded: Sequence[Decoded], pixels_u8_nhwc: np.ndarray) -> None:
        """Infers a batch and keeps what was said.

        Args:
            items: The batch.
            decoded: What became of each.
            pixels_u8_nhwc: uint8 (n, H, W, 3): those that have pixels, in order.
        """
        at = self.num_inferred
        for item, result in zip(items, decoded, strict=True):
            self._ids[item.position] = result.id
            if result.refusal is not None:
                self._refusals[item.position] = result.refusal
            elif result.same_as is not None:
                self._same_as[item.position] = result.same_as
            else:
                self._answer[item.position] = at
                at += 1
        if not len(pixels_u8_nhwc):
            return
        inference = self._classifier.infer(pixels_u8_nhwc)
        bundle = self._classifier.bundle
        order, scores = top_k(inference.probabilities, self._classifier.top_k)
        self._top.append(order)
        self._scores.append(scores)
        self._decisions += decide(bundle.policy, bundle.label_ids, inference.probabilities)
        if self._has_embeddings and inference.embedding is not None:
            self._embeddings.append(inference.embedding.astype(np.float16))

    def table(self, rows: UnitRows) -> pa.Table:
        """The output rows, one a uri."""
        for position, first in self._same_as.items():
            if first in self._refusals:
                self._refusals[position] = self._refusals[first]
            self._answer[position] = self._answer[first]
        positions = rows.positions
        answer = self._answer[positions]
        refusals = [self._refusals.get(position) for position in positions.tolist()]
        ids = [self._ids[position] for position in positions.tolist()]
        return _table(rows.uris, ids, refusals, self._columns(answer), self._classifier)

    def _columns(self, answer: np.ndarray) -> dict[str, pa.Array]:
        """The model's columns for each output row; null where ``answer`` is negative."""
        k = self._classifier.top_k
        is_null = answer < 0
        at = np.where(is_null, 0, answer)
        order = np.concatenate(self._top) if self._top else np.zeros((1, k), np.int64)
        scores = np.concatenate(self._scores) if self._scores else np.zeros((1, k), np.float32)
        order, scores = order[at], scores[at].astype(np.float32)
        labels = self._classifier.bundle.labels
        ids, names = pa.array([label.id for label in labels]), pa.array([label.name for label in labels])
        best = pa.array(order[:, 0], mask=is_null)
        decisions = [None if d < 0 else self._decisions[d] for d in answer.tolist()]
        columns = {
            "label": ids.take(best),
            "label_name": names.take(best),
            "score": pa.array(scores[:, 0], pa.float32(), mask=is_null),
            "topk_labels": _lists(ids.take(pa.array(order.ravel())), k, is_null),
            "topk_scores": _lists(pa.array(scores.ravel(), pa.float32()), k, is_null),
            "decision": pa.array(decisions, pa.string()),
        }
        if self._has_embeddings:
            width = self._classifier.bundle.embedding_dim or 0
            kept = np.concatenate(self._embeddings) if self._embeddings else np.zeros((1, width), np.float16)
            flat = pa.array(kept[at].ravel(), pa.float16())
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(is_null))
        return columns


def _lists(values: pa.Array, k: int, is_null: np.ndarray) -> pa.ListArray:
    offsets = pa.array(np.arange(len(is_null) + 1, dtype=np.int32) * k)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(is_null))


def _table(
    uris: Sequence[str],
    ids: Sequence[str | None],
    refusals: Sequence[ImageRefused | None],
    columns: Mapping[str, pa.Array],
    classifier: Classifier,
) -> pa.Table:
    digest = classifier.bundle.model_digest
    head = {
        "id": pa.array(ids, pa.string()),
        "uri": pa.array(uris, pa.string()),
        "status": pa.array([SCORED if r is None else QUARANTINED for r in refusals], pa.string()),
        "reason": pa.array([None if r is None else str(r.reason) for r in refusals], pa.string()),
        "detail": pa.array([None if r is None else r.detail for r in refusals], pa.string()),
    }
    return pa.table({**head, **columns, "model_digest": pa.array([digest] * len(uris), pa.string())})


def set_aside_table(rows: UnitRows, classifier: Classifier, has_embeddings: bool) -> pa.Table:
    """Rows of what ingest had quarantined: they count, and were never decoded again."""
    reasons, details = rows.table["reason"].to_pylist(), rows.table["detail"].to_pylist()
    refusals = [ImageRefused(Reason(reason), detail or "") for reason, detail in zip(reasons, details, strict=True)]
    answers = Answers(classifier, rows.num_images, has_embeddings=has_embeddings)
    items = [Item(position, refusal) for position, refusal in enumerate(refusals)]
    answers.add(items, [Decoded(None, None, refusal) for refusal in refusals], np.empty((0, 0, 0, 3), np.uint8))
    return answers.table(rows)


def reuse(part: Path, rows: UnitRows) -> pa.Table:
    """The rows of an earlier part whose items are still in the unit, in the unit's order."""
    table = pq.read_table(part)
    at = pc.index_in(pa.array(rows.uris, pa.string()), value_set=table.column("uri").combine_chunks())
    if at.null_count:
        raise ArtifactError(f"{part} lacks {at.null_count} rows of its unit", expected="all", fix="use a new --out")
    return table.take(at)


def count(table: pa.Table) -> dict[str, int]:
    """``rows``, ``scored`` and ``quarantined`` of a part."""
    scored = pc.sum(pc.equal(table["status"], SCORED)).as_py() or 0
    return {"rows": table.num_rows, "scored": scored, "quarantined": table.num_rows - scored}


def write_part(table: pa.Table, path: Path) -> dict[str, Any]:
    """Writes a part under its attempt-unique name, durably.

    Returns:
        ``bytes`` and ``sha256`` of the file.

    Raises:
        StorageError: The storage refused; nothing is left.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    storage.write_new(path, data)
    return {"bytes": len(data), "sha256": storage.sha256_bytes(data)}

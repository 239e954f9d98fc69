"""Images of the training split that a release calibrates with, and others of it that choose what stays in float.

Neither may judge: an image, or a group, that stands in the split that judges is refused by its digest. They are drawn
by their ids, which are digests, so that the same corpus gives the same images anywhere.

Example:
    >>> pictures = draw(config, bundle.image_spec, 256, needs_labels=bundle.label_ids)
    >>> next(pictures.batches(32)).shape
    (32, 224, 224, 3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eagleray.core.config import digest_json
from eagleray.core.errors import DataError
from eagleray.flows.release_plan import ReleaseConfig
from eagleray.flows.training_data import VALIDATIONS
from eagleray.vision.corpus import open_corpus
from eagleray.vision.images import ImageRefused, ImageSpec, decode
from eagleray.vision.splits import CorpusIndex, Splits, assign, check_leaks, read_index

if TYPE_CHECKING:
    from eagleray.infer.runtimes import Runtime

ONE_BATCH = 32

Uint8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """Decoded images for calibration, and labelled ones that choose.

    Attributes:
        calibration: uint8 (N, H, W, 3).
        ids: Of the calibration images.
        choosing: uint8 (M, H, W, 3).
        labels: The label id of each of them.
        split: The split that those are of.
        train_split: That the calibration images are of.
    """

    calibration: Uint8
    ids: tuple[str, ...]
    choosing: Uint8
    labels: tuple[str, ...]
    split: str
    train_split: str

    def batches(self, size: int) -> Iterator[Uint8]:
        """The calibration images, uint8 (<= size, H, W, 3) at a time."""
        for start in range(0, len(self.calibration), size):
            yield self.calibration[start : start + size]

    def accuracy(self, runtime: Runtime, label_ids: Sequence[str]) -> float:
        """Share of the choosing images that a compiled model is right about, 0..1."""
        right = 0
        for start in range(0, len(self.choosing), ONE_BATCH):
            found = runtime.run(self.choosing[start : start + ONE_BATCH]).logits.argmax(axis=1)
            wanted = self.labels[start : start + ONE_BATCH]
            right += sum(label_ids[int(index)] == label for index, label in zip(found, wanted, strict=True))
        return right / max(1, len(self.choosing))

    def to_json(self) -> dict[str, Any]:
        """What makes the same draw again."""
        return {
            "split": self.train_split,
            "images": len(self.ids),
            "digest": digest_json(sorted(self.ids)),
            "chosen_by": {"split": self.split, "images": len(self.choosing)},
        }


def draw(config: ReleaseConfig, spec: ImageSpec, count: int, *, needs_labels: Sequence[str]) -> Pictures:
    """Draws and decodes.

    Args:
        config: The release's: corpus, splits, which one judges.
        spec: Of the model.
        count: Calibration images; as many others choose.
        needs_labels: Label ids of the model: only images of these choose.

    Raises:
        DataError: The training split is not there, or shares an image or a group with the one that judges.
    """
    corpus = open_corpus(config.corpus)
    index = read_index(corpus, config.splits)
    splits = assign(index, config.splits)
    check_leaks(splits, index)
    train = splits.mask(config.train_split)
    refuse_overlap(index, train, splits.mask(config.split), f"{config.train_split!r} and {config.split!r}")
    held = next((name for name in VALIDATIONS if name != config.split and splits.counts.get(name)), config.train_split)
    order = np.argsort(index.ids, kind="stable")
    mine = [int(at) for at in order if train[at]]
    calibration = mine[:count]
    if not calibration:
        raise DataError(f"no image is in the split {config.train_split!r}", expected="images to calibrate with")
    others = mine[count:] if held == config.train_split else [int(at) for at in order if splits.mask(held)[at]]
    known = _labelled(index, set(needs_labels))
    choosing = [at for at in others if at in known][:count] or [at for at in calibration if at in known]
    wanted = sorted({*calibration, *choosing})
    pixels = _decoded(config, index, wanted, spec)
    kept = [at for at in calibration if at in pixels]
    chosen = [at for at in choosing if at in pixels]
    return Pictures(
        np.stack([pixels[at] for at in kept]),
        tuple(index.ids[at].decode() for at in kept),
        np.stack([pixels[at] for at in chosen]) if chosen else np.zeros((0, spec.height, spec.width, 3), np.uint8),
        tuple(known[at] for at in chosen),
        held,
        config.train_split,
    )


def refuse_overlap(index: CorpusIndex, first: Any, second: Any, what: str) -> None:
    """Refuses an image whose digest stands on both sides.

    Raises:
        DataError: With how many, and one of them.
    """
    both = np.intersect1d(index.ids[first], index.ids[second])
    if len(both):
        raise DataError(
            f"{len(both):,} images are in both {what}, e.g. {both[0].decode()[:16]}...",
            expected="calibration images that the model is not judged by",
            fix="name another train_split, or mend the corpus' split column",
        )


def sample(config: ReleaseConfig, splits: Splits, index: CorpusIndex, count: int) -> list[bytes]:
    """The bytes of some images of the split that judges, by their ids: what decoding is timed on."""
    keep = splits.mask(config.split)
    chosen = [int(at) for at in np.argsort(index.ids, kind="stable") if keep[at]][:count]
    return [data for _, data in _read(config, chosen)]


def _labelled(index: CorpusIndex, known: set[str]) -> dict[int, str]:
    """Place to the one label of each image that has one label, and one that the model knows."""
    labels = index.labels
    single = labels.per_image == 1
    return {
        int(at): labels.names[label]
        for at, label in zip(labels.images.tolist(), labels.classes.tolist(), strict=True)
        if single[at] and labels.names[label] in known
    }


def _decoded(config: ReleaseConfig, index: CorpusIndex, places: Sequence[int], spec: ImageSpec) -> dict[int, Uint8]:
    found: dict[int, Uint8] = {}
    for at, data in _read(config, places):
        try:
            found[at] = decode(data, spec)
        except ImageRefused:
            continue
    return found


def _read(config: ReleaseConfig, places: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The bytes of images, by their places in the order of the corpus' shards and rows."""
    import pyarrow.parquet as pq

    corpus = open_corpus(config.corpus)
    wanted, start = sorted(places), 0
    for shard in corpus.shards:
        rows = int(shard["rows"])
        mine = [at for at in wanted if start <= at < start + rows]
        if mine:
            with pq.ParquetFile(corpus.shard_path(shard), pre_buffer=False) as file:
                begin = start
                for group in range(file.metadata.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    inside = [at for at in mine if begin <= at < begin + size]
                    if inside:
                        column = file.read_row_group(group, columns=["image"])["image"]
                        yield from ((at, column[at - begin].as_py()) for at in inside)
                    begin += size
        start += rows

"""Who teaches a student: a bundle that runs in the step, or what it has said of every image already.

Both speak of the student's classes in the student's order, matched by label id.

Example:
    >>> teacher = Teacher(load_bundle("bundles/large"), labels=index.labels, seen_by=student_spec)
    >>> logits, embedding = teacher(pixels_nchw)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from eagleray.core.errors import ConfigError, DataError
from eagleray.learn.corpus_index import CorpusIndex
from eagleray.learn.features import read_features, read_probabilities
from eagleray.learn.starting_point import load_model
from eagleray.learn.task import Item, Transform, keys
from eagleray.vision import backbones
from eagleray.vision.bundle import ModelBundle
from eagleray.vision.images import ImageSpec

LEAST = 1e-30  # of a probability before its logarithm: what float32 still tells from 0, with room
LEAST_ALONE = 1e-6  # of a label by itself: nearer to 1 float32 has few numbers left


def check_teacher(
    bundle: ModelBundle, labels: Sequence[str], *, is_multi_label: bool = False, needs_embedding: bool = False
) -> None:
    """Refuses a teacher of other classes than the student's.

    Args:
        bundle: The teacher.
        labels: The student's label ids.
        is_multi_label: Whether the student's labels are each by itself.
        needs_embedding: Whether its embedding is to be matched.

    Raises:
        DataError: It has other labels; those that differ are named.
        ConfigError: Its outputs are of another kind, or it gives no embedding.
    """
    missing = [one for one in labels if one not in set(bundle.label_ids)]
    more = [one for one in bundle.label_ids if one not in set(labels)]
    if missing or more:
        said = [f"does not know {len(missing)}: {_shown(missing)}"] if missing else []
        said += [f"has {len(more)} more: {_shown(more)}"] if more else []
        raise DataError(
            f"the teacher {bundle.name} has other labels than the student; it {'; it '.join(said)}",
            expected=f"a teacher of the same {len(labels)} labels, in any order",
            fix="fine-tune the teacher on this corpus first",
        )
    if (bundle.output == "multi_label_logits") != is_multi_label:
        wanted = "each by itself (multi_label_logits)" if is_multi_label else "one an image (logits)"
        raise ConfigError(
            f"the teacher {bundle.name} gives {bundle.output}",
            expected=f"a teacher whose labels are {wanted}",
            fix=f"give is_multi_label={str(not is_multi_label).lower()}, or another teacher",
        )
    if needs_embedding and not bundle.embedding_dim:
        raise ConfigError(
            f"the teacher {bundle.name} gives no embedding", expected="one, for distill.feature_weight above 0",
            fix="give distill.feature_weight=0",
        )  # fmt: skip


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")


class Teacher:
    """A bundle that answers in the step, on the very pixels that the student sees: no module of the student's, takes
    no gradient and stands in no checkpoint.

    Args:
        bundle: Of a timm architecture, checked by ``check_teacher``.
        labels: The student's label ids, in the order of its outputs.
        seen_by: The student's preprocessing: pixels are brought to the teacher's size (bilinear) and order of colours.

    Raises:
        ConfigError: The bundle has no weights that torch runs.
    """

    def __init__(self, bundle: ModelBundle, *, labels: Sequence[str], seen_by: ImageSpec) -> None:
        self._model = load_model(bundle).requires_grad_(False).to(memory_format=torch.channels_last)
        self._order = torch.tensor([bundle.label_ids.index(one) for one in labels])
        self._size = (bundle.image_spec.height, bundle.image_spec.width)
        self._is_mirrored = bundle.image_spec.color != seen_by.color
        self._constants = tuple(torch.from_numpy(one[:, None, None]) for one in bundle.image_spec.scale_and_bias)
        self.width = bundle.embedding_dim

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Itself: nothing in it ever changes."""
        return self

    def __call__(self, pixels_nchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, C) and embedding (N, D), without gradient.

        Args:
            pixels_nchw: float (N, 3, H, W), 0 to 255, mixed or not.
        """
        self._follow(pixels_nchw.device)
        scale, bias = self._constants
        with torch.no_grad():
            x = pixels_nchw.flip(1) if self._is_mirrored else pixels_nchw
            if tuple(x.shape[-2:]) != self._size:
                x = functional.interpolate(x, self._size, mode="bilinear", antialias=True, align_corners=False)
            logits, embedding = backbones.logits_and_embedding(self._model, x * scale + bias)
            return logits[:, self._order].float(), embedding.float()

    def _follow(self, device: torch.device) -> None:
        """Moves to the student's device, the first time."""
        if self._order.device == device:
            return
        self._model = self._model.to(device)
        self._constants = tuple(one.to(device) for one in self._constants)
        self._order = self._order.to(device)


@dataclass(frozen=True)
class CachedTeacher:
    """A transform that adds what a teacher has said of each image: ``teacher_logits`` and ``teacher_embedding``.

    The answers are read from a finished scoring run in the process that makes the batches, once.

    Attributes:
        transform: What makes the student's arrays.
        scores: The ``--out`` folder of the scoring run, with every label of a row.
        index: The images.
        is_multi_label: Whether labels are each by itself.
        has_embedding: Whether the embeddings are added.
    """

    transform: Transform
    scores: Path
    index: CorpusIndex
    is_multi_label: bool = False
    has_embedding: bool = False

    @cached_property
    def answers(self) -> tuple[NDArray[np.uint64], dict[str, NDArray[np.float32]]]:
        """The images' keys in order, and the arrays in that order.

        Raises:
            DataError: The run lacks images or labels.
        """
        p = read_probabilities(self.scores, self.index)
        if self.is_multi_label:
            p = p.clip(LEAST_ALONE, 1 - LEAST_ALONE)
            arrays = {"teacher_logits": np.log(p) - np.log1p(-p)}
        else:
            arrays = {"teacher_logits": np.log(p.clip(LEAST))}
        if self.has_embedding:
            arrays["teacher_embedding"] = read_features(self.scores, self.index)
        order = np.argsort(self.index.keys, kind="stable")
        return self.index.keys[order], {name: np.asarray(value[order], np.float32) for name, value in arrays.items()}

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        """The transform's arrays, and the teacher's."""
        known, arrays = self.answers
        rows = np.searchsorted(known, keys([item.id for item in items]))
        return {**self.transform(items, epoch), **{name: value[rows] for name, value in arrays.items()}}

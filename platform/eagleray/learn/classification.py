"""The supervised task: a timm model, one label an image or several, its backbone frozen for a while or for good.

Example:
    >>> start = begin("models/lite0", labels=index.labels)
    >>> task = ClassificationTask(start.model, start.spec, ClassificationSettings(), class_counts=index.class_counts)
    >>> train(task, batches, settings)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eagleray.core.errors import DataError
from eagleray.learn import parallel
from eagleray.learn.corpus_index import CorpusIndex, Ints
from eagleray.learn.head import Head, folded, standardisation
from eagleray.learn.mixing import mix
from eagleray.learn.optimization import layer_groups
from eagleray.learn.supervision import ClassificationLoss, ClassificationSettings
from eagleray.learn.task import Progress, StepOutput
from eagleray.vision import backbones
from eagleray.vision.images import ImageSpec


class ClassificationTask(nn.Module):  # type: ignore[misc]
    """A ``task.Task`` over batches with ``image`` uint8 (N, H, W, 3) and ``target`` int64 (N,) or ``labels`` (N, C).

    Args:
        model: A timm classifier with one output a class.
        spec: How pixels become its input.
        settings: See ClassificationSettings.
        class_counts: int64 (C,): images of each class of the training data, for weights and priors.
        num_images: Of the training data, for the weights of multi-label classes; None: the sum of the counts.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ImageSpec,
        settings: ClassificationSettings,
        *,
        class_counts: Ints,
        num_images: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.spec, self.settings = model, spec, settings
        self.loss = ClassificationLoss(settings, class_counts=class_counts, num_images=num_images)
        self._head = {id(one) for one in backbones.head(model).parameters()}
        for name, value in zip(("_scale", "_bias"), spec.scale_and_bias, strict=True):  # of the spec: no state
            self.register_buffer(name, torch.from_numpy(value[:, None, None]), persistent=False)
        self._is_frozen: bool | None = None
        self._run = backbones.logits_and_embedding

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compiles the model's forward pass; the arguments are torch.compile's."""
        self._run = torch.compile(backbones.logits_and_embedding, *args, **settings)

    def before_step(self, progress: Progress) -> None:
        """Freezes or thaws the backbone, as the schedule says."""
        until = self.settings.frozen_epochs
        is_frozen = until is None or progress.epoch < until
        if is_frozen != self._is_frozen:
            for parameter in self.backbone.parameters():
                parameter.requires_grad_(not is_frozen or id(parameter) in self._head)
            self._is_frozen = is_frozen
            self.train(self.training)

    def train(self, mode: bool = True) -> ClassificationTask:
        """Training mode; a frozen backbone keeps its running statistics and drops nothing."""
        super().train(mode)
        if mode and self._is_frozen:
            self.backbone.eval()
            backbones.head(self.backbone).train()
        return self

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        """The loss of a batch; logs the share of images whose best class is right, where nothing is mixed."""
        x, targets = self.mixed(self.normalized(batch["image"]), self.loss.targets(batch), progress)
        logits, embedding = self.run(x)
        logs = {} if self.settings.mixing.is_on else accuracy(logits, batch)
        return StepOutput(self.loss(logits, targets), logs, embedding.detach())

    def run(self, x_nchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, C) and embedding (N, D) of normalised images, compiled where that was asked for."""
        logits, embedding = self._run(self.backbone, x_nchw)
        return logits, embedding

    def mixed(
        self, x_nchw: torch.Tensor, targets: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets (N, any number of columns) mixed as the settings say, from (seed, step, rank)."""
        if not self.settings.mixing.is_on:
            return x_nchw, targets
        generator = np.random.default_rng([self.settings.seed, progress.step, parallel.rank()])
        return mix(x_nchw, targets, self.settings.mixing, generator)

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float (N, C) of a batch as it is: nothing is mixed."""
        logits: torch.Tensor = self._run(self.backbone, self.normalized(batch["image"]))[0]
        return logits

    def normalized(self, image_u8_nhwc: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) as the model's input, float (N, 3, H, W), channels last in memory."""
        return image_u8_nhwc.permute(0, 3, 1, 2).float() * self._scale + self._bias

    def after_step(self, progress: Progress) -> None:
        """Nothing moves by itself."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head, and the backbone at its own rates; all of them, as those that are frozen thaw later."""
        settings = self.settings
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self._is_frozen = None
        head = [one for one in self.parameters() if id(one) in self._head]
        groups: list[dict[str, Any]] = [{"params": head, "lr_scale": 1.0}]
        if settings.frozen_epochs is None:
            return groups
        found = layer_groups(self.backbone, layer_decay=settings.layer_decay, lr_scale=settings.backbone_lr_scale)
        for group in found:
            params = [one for one in group["params"] if id(one) not in self._head]
            if params:
                groups.append({**group, "params": params})
        return groups


class HeadTask(nn.Module):  # type: ignore[misc]
    """A linear head over the features of a frozen backbone: a ``task.Task`` over batches with ``features`` (N, D).

    Args:
        features: float (N, D): all of the training data, for the standardisation.
        settings: Mixing, freezing and the backbone's rates have no meaning here.
        class_counts: int64 (C,): images of each class.
        seed: Of the first weights.
    """

    def __init__(
        self, features: NDArray[Any], settings: ClassificationSettings, *, class_counts: Ints, seed: int = 0
    ) -> None:
        super().__init__()
        self.loss = ClassificationLoss(settings, class_counts=class_counts, num_images=len(features))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(features.shape[1], len(class_counts))
        mean, scale = standardisation(torch.from_numpy(np.asarray(features, np.float32)))
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        """The loss of a batch; logs the share of images whose best class is right."""
        features = batch["features"].float()
        logits = self.layer((features - self.mean) / self.scale)
        return StepOutput(self.loss(logits, self.loss.targets(batch)), accuracy(logits, batch), features)

    def after_step(self, progress: Progress) -> None:
        """Nothing moves by itself."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The layer."""
        return [{"params": list(self.layer.parameters())}]

    def head(self) -> Head:
        """The layer over features as they are."""
        return folded(self.layer.weight.detach(), self.layer.bias.detach(), self.mean, self.scale)


def accuracy(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The share of images whose best class is right, as a log; nothing where there may be several labels."""
    if "labels" in batch:
        return {}
    return {"accuracy": (logits.detach().argmax(-1) == batch["target"]).float().mean()}


def check_labels(
    index: CorpusIndex, *, is_multi_label: bool = False, keeps_unlabelled: bool = False
) -> tuple[CorpusIndex, tuple[str, ...]]:
    """The images that a classifier can learn from, and what to tell of the others.

    Args:
        index: Of the training images.
        is_multi_label: Whether an image may have several labels.
        keeps_unlabelled: Whether images without a label stay: a teacher tells what they are.

    Returns:
        The index, without images that have no label unless they are kept; a line for each thing that a person should
        know.

    Raises:
        DataError: No image has a label, all have the same, or some have several and it is not multi-label.
    """
    counts = index.num_targets
    if not counts.any():
        raise DataError(
            f"{index.root} has no labels", expected="class folders, or a label column", fix="ingest with labels"
        )
    check_one_label(index, is_multi_label=is_multi_label)
    present = [label for label, count in zip(index.labels, index.class_counts, strict=True) if count]
    if len(present) < 2 and not is_multi_label:
        raise DataError(
            f"every labelled image is of one class, {present[0]!r}", expected="two classes or more", fix="add another"
        )
    notes = []
    if (counts == 0).any():
        then = "learn from the teacher alone" if keeps_unlabelled else "are left out"
        notes.append(f"{int((counts == 0).sum()):,} of {len(index):,} images have no label and {then}")
    absent = [label for label in index.labels if label not in set(present)]
    if absent:
        notes.append(f"no training image of {len(absent)} classes: {', '.join(absent[:5])}")
    return index if keeps_unlabelled else index.subset(counts > 0), tuple(notes)


def check_one_label(index: CorpusIndex, *, is_multi_label: bool) -> None:
    """Refuses images of several labels where an image is of one class.

    Raises:
        DataError: How many there are.
    """
    several = int((index.num_targets > 1).sum())
    if several and not is_multi_label:
        raise DataError(
            f"{several:,} of {len(index):,} images have several labels",
            expected="one label an image",
            fix="give is_multi_label=true",
        )


def check_split(name: str, index: CorpusIndex, labels: Sequence[str]) -> None:
    """Refuses a split that lacks a class.

    Raises:
        DataError: It does; the classes are named.
    """
    counts = index.class_counts
    absent = [label for label in labels if label not in index.labels or not counts[index.labels.index(label)]]
    if absent:
        raise DataError(
            f"split {name!r} has no image of {len(absent)} classes: {', '.join(absent[:5])}",
            expected="every class in every split",
            fix="use a stratified split, or more images of these classes",
        )

"""What a classifier is told: how it learns, and the loss of its logits.

One definition for whole models and for heads on features, so that both modes take the same settings.

Example:
    >>> loss = ClassificationLoss(ClassificationSettings(balance="weights"), class_counts=index.class_counts)
    >>> loss(logits, loss.targets(batch)).backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from eagleray.core.config import Config
from eagleray.learn.balance import (
    WeightRule,
    class_weights,
    positive_weights,
    prior_logits,
    soft_binary_cross_entropy,
    soft_cross_entropy,
)
from eagleray.learn.corpus_index import Ints
from eagleray.learn.mixing import MixSettings, soft_labels, soft_targets


class ClassificationSettings(Config):
    """How a classifier learns.

    Attributes:
        is_multi_label: Each label by itself (sigmoid), as many an image as it has; else exactly one (softmax).
        label_smoothing: Share of a target that goes to all classes alike.
        mixing: Mixup and CutMix.
        balance: ``none``, ``weights`` (in the loss), ``sampler`` (in the order; see Batches) or ``logits`` (adjusted by
            the prior; one label only).
        weight_rule: Of ``weights``.
        focal_gamma: Of the focal loss; 0: plain cross-entropy.
        frozen_epochs: Epochs in which the backbone stays as it is and only the head learns; None: all of them.
        backbone_lr_scale: Learning rate of the backbone over that of the head.
        layer_decay: Of the backbone's learning rates, layer by layer (optimization.layer_groups); None: alike.
        seed: Of mixing.
    """

    is_multi_label: bool = False
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixing: MixSettings = MixSettings()
    balance: Literal["none", "weights", "sampler", "logits"] = "none"
    weight_rule: WeightRule = "inverse"
    focal_gamma: float = Field(0.0, ge=0)
    frozen_epochs: int | None = Field(0, ge=0)
    backbone_lr_scale: float = Field(1.0, ge=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> ClassificationSettings:
        if self.is_multi_label and self.balance in ("logits", "sampler"):
            raise ValueError(f"balance={self.balance} is for one label an image; use weights")
        return self


class ClassificationLoss(nn.Module):  # type: ignore[misc]
    """The loss of logits, with weights or priors of the training data.

    Args:
        settings: See ClassificationSettings.
        class_counts: int64 (C,): images of each class of the training data.
        num_images: Of the training data, for the weights of multi-label classes; None: the sum of the counts.
    """

    def __init__(self, settings: ClassificationSettings, *, class_counts: Ints, num_images: int | None = None) -> None:
        super().__init__()
        self.settings, self.num_classes = settings, len(class_counts)
        constants: dict[str, NDArray[np.float32] | None] = {"_weight": None, "_prior": None}
        if settings.balance == "weights" and settings.is_multi_label:
            total = int(class_counts.sum()) if num_images is None else num_images
            constants["_weight"] = positive_weights(class_counts, total)
        elif settings.balance == "weights":
            constants["_weight"] = class_weights(class_counts, rule=settings.weight_rule)
        elif settings.balance == "logits":
            constants["_prior"] = prior_logits(class_counts)
        for name, value in constants.items():  # functions of the settings: no state
            self.register_buffer(name, None if value is None else torch.from_numpy(value), persistent=False)

    def targets(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float (N, C): ``target`` int64 (N,), or ``labels`` (N, C) where there may be several, smoothed."""
        smoothing = self.settings.label_smoothing
        if self.settings.is_multi_label:
            return soft_labels(batch["labels"], smoothing=smoothing)
        return soft_targets(batch["target"], self.num_classes, smoothing=smoothing)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Scalar loss of logits (N, C) against targets (N, C).

        Args:
            logits: The model's.
            targets: As ``targets`` gives them.
            known: float (N,): the share of an image that has a label, for batches with images that have none: 0 of
                such, 1 of others, between them where both are mixed. Its targets are times it, and so is its part of
                the mean, which stays one over all N images.
        """
        settings = self.settings
        adjusted = logits.float() if self._prior is None else logits.float() + self._prior
        loss_of = soft_binary_cross_entropy if settings.is_multi_label else soft_cross_entropy
        if known is not None:
            targets = targets / known.clamp(min=1e-6)[:, None]
        return loss_of(adjusted, targets, weight=self._weight, gamma=settings.focal_gamma, share=known)

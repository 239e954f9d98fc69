"""Classes of unequal size: weights, a balanced order, focal loss, logit adjustment.

Weights are normalised to a mean of 1 over the data, so that the mean loss over a batch stays what it was in scale and
no batch is normalised by its own labels: the gradient is the same however the batch is cut among workers.

Example:
    >>> weights = class_weights(index.class_counts, rule="inverse")
    >>> batches = Batches(index, transform, settings, sampler=BalancedSampler(index.first_targets, seed=0))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from eagleray.core.errors import DataError
from eagleray.learn.corpus_index import Ints
from eagleray.learn.order import mix64

WeightRule = Literal["inverse", "effective"]


def class_weights(counts: Ints, *, rule: WeightRule = "inverse", beta: float = 0.999) -> NDArray[np.float32]:
    """A weight for each class, 1 on average over the images.

    Args:
        counts: int64 (C,): images of each class.
        rule: ``inverse``: 1 / n; ``effective``: (1 - beta) / (1 - beta^n). Source: Cui et al. 2019, equation 2.
        beta: Of ``effective``.

    Returns:
        float32 (C,); 0 for a class without an image.

    Raises:
        DataError: No class has an image.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.sum():
        raise DataError("no image has a label", expected="labels", fix="give a corpus with labels")
    has = counts > 0
    weights = np.zeros_like(counts)
    weights[has] = 1 / counts[has] if rule == "inverse" else (1 - beta) / (1 - beta ** counts[has])
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


@dataclass(frozen=True, eq=False)
class BalancedSampler:
    """How often each image comes in an epoch, so that every class is seen alike: for ``Batches``.

    An epoch stays as long as it was. A class of n images gets its equal share of it: each image comes so many whole
    times, and which come once more is drawn anew each epoch, without replacement, from (seed, epoch).

    Attributes:
        targets: int64 (N,): class of each image; -1, without a label, never comes.
        seed: Of the draw.
        strength: 0: as the data is; 1: every class alike; between them, the shares are mixed.
    """

    targets: Ints
    seed: int = 0
    strength: float = 1.0

    def __call__(self, epoch: int) -> Ints:
        """int64 (N,): repeats of each image; they sum to the number of labelled images.

        Raises:
            DataError: No image has a label.
        """
        known = self.targets >= 0
        counts = np.bincount(self.targets[known])
        total, present = int(counts.sum()), np.flatnonzero(counts)
        if not total:
            raise DataError("no image has a label", expected="labels", fix="give a corpus with labels")
        shares = (1 - self.strength) * counts[present] / total + self.strength / len(present)
        wanted = _rounded(shares * total, total)
        salt = mix64(np.array([self.seed], np.uint64)) ^ np.uint64(epoch)
        points = mix64(np.arange(len(self.targets), dtype=np.uint64) ^ mix64(salt))
        repeats = np.zeros(len(self.targets), np.int64)
        for label, want in zip(present, wanted, strict=True):
            places = np.flatnonzero(self.targets == label)
            whole, more = divmod(int(want), len(places))
            repeats[places] = whole
            repeats[places[np.argsort(points[places], kind="stable")[:more]]] += 1
        return repeats


def _rounded(values: NDArray[np.float64], total: int) -> Ints:
    """Whole numbers that sum to ``total``, by largest remainders."""
    whole = np.floor(values).astype(np.int64)
    order = np.argsort(whole - values, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def soft_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    gamma: float = 0.0,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy against class probabilities, weighted, focal when gamma > 0.

    ``- sum_c w_c t_c (1 - p_c)^gamma log p_c``, mean over the batch.
    Source: Lin et al. 2017, equation 4, with softmax, and soft targets as a sum over classes.

    Args:
        logits: float (N, C).
        targets: float (N, C): each row sums to 1.
        weight: float (C,).
        gamma: How much less a well-known example counts.
        share: float (N,): how much of each image counts; None: all of it.

    Returns:
        Scalar.
    """
    log_p = functional.log_softmax(logits.float(), dim=-1)
    terms = -targets * log_p
    if gamma:
        terms = terms * (1 - log_p.exp()) ** gamma
    if weight is not None:
        terms = terms * weight
    rows = terms.sum(-1)
    return rows.mean() if share is None else (rows * share).mean()


def soft_binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    gamma: float = 0.0,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross-entropy of every label by itself, weighted, focal when gamma > 0.

    With ``p_t = p t + (1 - p)(1 - t)``: ``(1 - p_t)^gamma`` times the cross-entropy. Source: Lin et al. 2017, eq. 4.

    Args:
        logits: float (N, C).
        targets: float (N, C), 0 to 1.
        weight: float (C,): of the positive part of each label.
        gamma: How much less a well-known example counts.
        share: float (N,): how much of each image counts; None: all of it.

    Returns:
        Scalar: mean over images and labels.
    """
    logits = logits.float()
    terms = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    if gamma:
        p = logits.sigmoid()
        terms = terms * (1 - p * targets - (1 - p) * (1 - targets)) ** gamma
    return terms.mean() if share is None else (terms.mean(-1) * share).mean()


def positive_weights(counts: Ints, num_images: int) -> NDArray[np.float32]:
    """Of multi-label classes: negatives over positives, at most 100; 1 for a label that no image has."""
    counts = np.asarray(counts, np.float64)
    ratio = (num_images - counts) / np.maximum(counts, 1)
    return np.where(counts > 0, np.clip(ratio, 0.01, 100), 1).astype(np.float32)


def prior_logits(counts: Ints, tau: float = 1.0) -> NDArray[np.float32]:
    """What is added to the logits in training only, so that the plain logits are those of balanced classes.

    ``tau log pi_c``. Source: Menon et al. 2021, equation 10. A class without an image counts as one.
    """
    counts = np.maximum(np.asarray(counts, np.float64), 1)
    return (tau * np.log(counts / counts.sum())).astype(np.float32)

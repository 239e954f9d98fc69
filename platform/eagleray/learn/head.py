"""A classifier's last layer, fitted on the features of a frozen backbone: seconds instead of epochs.

The backbone has run once over the corpus, through the scoring path; what is left is a convex problem. Features are
standardised, multinomial logistic regression (one-vs-rest for several labels) is solved by L-BFGS, its one setting C
chosen by cross-validation, and the standardisation is folded into weight and bias: the result is an ordinary linear
layer, and the model with it an ordinary timm model.

Example:
    >>> fitted = fit_head(features, targets, HeadSettings(), num_classes=6)
    >>> put_head(model, fitted)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn
from torch.nn import functional

from eagleray.core.config import Config
from eagleray.core.errors import CapabilityError, DataError
from eagleray.learn.order import mix64
from eagleray.vision import backbones

# Above so many numbers float64 features no longer fit a laptop beside the rest (400 MB), and float32 is used
_MOST_DOUBLES = 50_000_000
_ONE_FOLD_FROM = 20_000  # images from which one held-out fold says as much as five
# To choose C, a held-out fold need not be solved to the last digit: on 863 x 1,280 features of Lite0, 25 solutions of
# 300 steps each took two minutes of one core
_ROUGH_ITERATIONS, _ROUGH_GRADIENT, _ROUGH_CHANGE = 60, 1e-5, 1e-7


class HeadSettings(Config):
    """How a head is fitted.

    Attributes:
        c_values: Inverse strengths of the penalty to choose from, as in scikit-learn; one value: nothing is chosen.
        num_folds: Of the cross-validation.
        max_iterations: Of L-BFGS.
        is_balanced: Weigh every class alike.
        seed: Of the folds.
    """

    c_values: tuple[float, ...] = Field((0.001, 0.01, 0.1, 1.0, 10.0), min_length=1)
    num_folds: int = Field(5, ge=2)
    max_iterations: int = Field(300, ge=1)
    is_balanced: bool = False
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer over features as they are.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
        c: The chosen inverse strength of the penalty; None where it was not chosen so.
        scores: C to its cross-validated accuracy (mean log-likelihood for several labels); empty when one was given.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    c: float | None = None
    scores: dict[float, float] = field(default_factory=dict)

    def logits(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """float32 (N, C) of float (N, D)."""
        return features.astype(np.float32) @ self.weight.T + self.bias


def fit_head(
    features: NDArray[Any],
    targets: NDArray[Any],
    settings: HeadSettings,
    *,
    num_classes: int,
    groups: Sequence[str] | None = None,
) -> Head:
    """Fits a head.

    Args:
        features: float (N, D), e.g. the scoring path's embeddings.
        targets: int (N,) class indices, or 0/1 (N, C) for several labels an image.
        settings: See HeadSettings.
        num_classes: C.
        groups: What must not straddle two folds (site, patient), one for each image.

    Raises:
        DataError: Nothing to learn from: no images, one class only, or features that are not finite.
    """
    _check(features, targets, num_classes)
    kind = torch.float64 if features.size <= _MOST_DOUBLES else torch.float32
    x = torch.from_numpy(np.asarray(features, np.float32)).to(kind)
    y = torch.from_numpy(np.ascontiguousarray(targets))
    y = functional.one_hot(y.long(), num_classes).to(kind) if y.ndim == 1 else y.to(kind)
    problem = _Problem(x, y, is_multi_label=targets.ndim == 2, settings=settings)
    scores: dict[float, float] = {}
    if len(settings.c_values) > 1:
        folds = make_folds(targets, settings.num_folds, seed=settings.seed, groups=groups)
        scores = problem.cross_validate(folds)
    best = max(scores, key=lambda c: (scores[c], -c)) if scores else settings.c_values[0]  # of equals the simplest
    mean, scale = standardisation(x)
    solved = problem.solve((x - mean) / scale, y, best, start=None)
    return folded(solved[:, :-1], solved[:, -1], mean, scale, c=best, scores=scores)


def standardisation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) of rows (N, D); 1 where a feature is constant."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    floor = 1e-6 * x.abs().amax(0).clamp(min=1)
    return mean, torch.where(scale > floor, scale, torch.ones_like(scale))


def folded(weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, **about: Any) -> Head:
    """A layer over standardised features as one over features as they are: ``W / s`` and ``b - (W / s) m``."""
    plain = weight.double() / scale.double()
    shifted = bias.double() - plain @ mean.double()
    return Head(plain.float().cpu().numpy(), shifted.float().cpu().numpy(), **about)


def put_head(model: nn.Module, head: Head) -> None:
    """Makes a head the last layer of a timm model, whose embedding it was fitted on.

    Raises:
        CapabilityError: The model's last layer is not a linear one over its embedding.
    """
    backbones.renew_head(model, len(head.bias), seed=0)
    layer = backbones.head(model)
    if not isinstance(layer, nn.Linear) or layer.bias is None or layer.weight.shape != head.weight.shape:
        raise CapabilityError(
            f"the last layer of {backbones.architecture_of(model)} is a {type(layer).__name__}, not linear over its "
            f"embedding of {head.weight.shape[1]} numbers",
            expected="a backbone with a linear classifier",
            fix="give mode full, or another backbone",
        )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))


def make_folds(
    targets: NDArray[Any], num_folds: int, *, seed: int = 0, groups: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """The fold of each image: every class spread over all of them, no group over two.

    Args:
        targets: int (N,), or 0/1 (N, C), which are spread by chance.
        num_folds: How many.
        seed: Of the draw.
        groups: One for each image; they are spread by chance.

    Returns:
        int64 (N,), 0 to num_folds - 1.
    """
    if groups is not None:
        names, of = np.unique(np.asarray(groups), return_inverse=True)
        points = mix64(np.arange(len(names), dtype=np.uint64) ^ mix64(np.array([seed], np.uint64)))
        place = np.empty(len(names), np.int64)
        place[np.argsort(points, kind="stable")] = np.arange(len(names))
        return (place % num_folds)[of]
    points = mix64(np.arange(len(targets), dtype=np.uint64) ^ mix64(np.array([seed], np.uint64)))
    strata = targets if targets.ndim == 1 else np.zeros(len(targets), np.int64)
    order = np.lexsort((points, strata))
    folds = np.empty(len(targets), np.int64)
    folds[order] = np.arange(len(targets)) % num_folds
    return folds


class _Problem:
    """Features, targets and settings of one fit."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, *, is_multi_label: bool, settings: HeadSettings) -> None:
        self.x, self.y, self.is_multi_label, self.settings = x, y, is_multi_label, settings

    def solve(
        self, x: torch.Tensor, y: torch.Tensor, c: float, *, start: torch.Tensor | None, is_rough: bool = False
    ) -> torch.Tensor:
        """(C, D + 1): weight and bias that minimise ``mean loss + |W|^2 / (2 C n)``, the bias free.

        The objective of scikit-learn's LogisticRegression, divided by C n. ``is_rough`` is enough to compare C.
        """
        most = self.settings.max_iterations
        weights = self._row_weights(y)
        first = torch.zeros(y.shape[1], x.shape[1] + 1, dtype=x.dtype) if start is None else start.clone()
        solution = first.requires_grad_(True)
        penalty = 1 / (2 * c * float(weights.sum()))
        optimizer = torch.optim.LBFGS(
            [solution],
            max_iter=min(most, _ROUGH_ITERATIONS) if is_rough else most,
            tolerance_grad=_ROUGH_GRADIENT if is_rough else 1e-7,
            tolerance_change=_ROUGH_CHANGE if is_rough else 1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = x @ solution[:, :-1].T + solution[:, -1]
            losses = self._losses(logits, y)
            value = (losses * weights).sum() / weights.sum() + penalty * solution[:, :-1].square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return solution.detach()

    def cross_validate(self, folds: NDArray[np.int64]) -> dict[float, float]:
        """C to its mean score over the held-out folds."""
        totals = dict.fromkeys(sorted(self.settings.c_values), 0.0)
        count = 0
        for fold in range(self.settings.num_folds if len(folds) < _ONE_FOLD_FROM else 1):
            held = torch.from_numpy(folds == fold)
            if not held.any() or held.all():
                continue
            mean, scale = standardisation(self.x[~held])
            inside, outside = ((self.x[mask] - mean) / scale for mask in (~held, held))
            start = None
            for c in totals:  # from the strongest penalty on, each starting where the last one ended
                start = self.solve(inside, self.y[~held], c, start=start, is_rough=True)
                logits = outside @ start[:, :-1].T + start[:, -1]
                totals[c] += self._score(logits, self.y[held])
            count += int(held.sum())
        return {c: total / max(1, count) for c, total in totals.items()}

    def _losses(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(N,): the loss of each row; several labels: the sum over them."""
        if self.is_multi_label:
            return functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
        return -(y * functional.log_softmax(logits, 1)).sum(1)

    def _score(self, logits: torch.Tensor, y: torch.Tensor) -> float:
        """Sum over rows: right or not, each class alike where that was asked for; log-likelihood for several labels."""
        if self.is_multi_label:
            return float(-self._losses(logits, y).sum())
        return float(((logits.argmax(1) == y.argmax(1)) * self._row_weights(y)).sum())

    def _row_weights(self, y: torch.Tensor) -> torch.Tensor:
        """(N,): 1, or what makes every class weigh alike."""
        if not self.settings.is_balanced or self.is_multi_label:
            return torch.ones(len(y), dtype=y.dtype)
        counts = y.sum(0)
        return (len(y) / (counts > 0).sum() / counts.clamp(min=1))[y.argmax(1)]


def _check(features: NDArray[Any], targets: NDArray[Any], num_classes: int) -> None:
    if len(features) != len(targets) or not len(features):
        raise DataError(f"{len(features)} features, {len(targets)} targets", expected="as many of both, and some")
    if not np.isfinite(features).all():
        raise DataError(
            f"{int((~np.isfinite(features)).any(1).sum())} images have features that are not finite",
            expected="finite embeddings",
            fix="check the model: eagleray inspect BUNDLE",
        )
    if targets.ndim == 1:
        if targets.min() < 0 or targets.max() >= num_classes:
            raise DataError(f"class indices {targets.min()} to {targets.max()}", expected=f"0 to {num_classes - 1}")
        if len(np.unique(targets)) < 2:
            raise DataError("every image is of one class", expected="two classes or more", fix="add another")

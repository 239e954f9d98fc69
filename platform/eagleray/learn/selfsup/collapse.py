"""Whether a representation is collapsing: all images to one point, to few directions, or a teacher that says nothing.

A falling loss does not show it: BYOL's and DINO's are lowest when every image gets the same answer. Three measures do:

    spread = sqrt(D) * mean over dimensions of std(e / |e|): 0 at one point, near 1 on the whole sphere. Of features and
        of what the loss sees: behind a last batch norm a backbone's features stay spread while BYOL's projections fall
        into one point (seen: 0.78 beside 0.04)
    effective rank = exp(-sum p log p), p = s / sum s, s the singular values of the centred e / |e|: 1 for one direction
    teacher (DINO): the entropy of its mean distribution falls to 0 when one output takes all, the mean entropy of its
        distributions rises to log K when all outputs are alike; KL(teacher || student) falls to 0 either way

Source: spread: Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1. Effective rank:
Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1. Entropy and
KL: DINO, section 5.3 and figure 7.

Example:
    >>> detector = CollapseDetector(CollapseConfig(action="stop"))
    >>> detector.observe(output, step=50)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from eagleray.core.config import Config
from eagleray.core.errors import TrainingDiverged
from eagleray.learn.selfsup.synchronization import gathered, mean_over_workers
from eagleray.learn.task import StepOutput

logger = logging.getLogger(__name__)

FIXES = (
    "lower the learning rate or lengthen its warm-up, raise the batch size, or take another method; for dino, lower "
    "teacher_temperature or raise frozen_epochs; collapse.action=warn goes on all the same"
)


class CollapseConfig(Config):
    """When a representation counts as collapsed.

    The floors lie between what was measured on crops of scikit-image's photos, 64 a batch: spread of random backbones
    in train mode 0.61 to 0.86 (six architectures of timm), of learning ones 0.51 to 0.82 and of their projections 0.75
    to 1.0; of BYOL collapsed (no predictor, momentum 0; from step 40) 0.02 to 0.09 in projections, 0.09 to 0.11
    in a ViT's features. KL: of learning DINO 0.06 and more, below 0.0001 once all its teacher's outputs were alike.

    Attributes:
        action: "warn" logs each finding, "stop" ends the run at the ``patience``-th in a row, "off" measures only.
        every_steps: Steps between two measurements; one costs a singular value decomposition of (N, D).
        grace_steps: Steps before a finding counts.
        patience: Findings in a row, at measurements, that end a run.
        min_spread: Floor of the spread, of features and of projections.
        min_effective_rank: Floor of the features' effective rank; a tiny ViT of 2 x 2 patches learns with 2.6 to 5.
        min_entropy_share: Floor of the entropy of the teacher's mean distribution, as a share of log K.
        max_entropy_share: Ceiling of the mean entropy of its distributions, likewise.
        min_kl: Floor of KL(teacher || student), in nats.
    """

    action: Literal["off", "warn", "stop"] = "warn"
    every_steps: int = Field(default=50, ge=1)
    grace_steps: int = Field(default=100, ge=0)
    patience: int = Field(default=3, ge=1)
    min_spread: float = Field(default=0.1, ge=0)
    min_effective_rank: float = Field(default=1.5, ge=1)
    min_entropy_share: float = Field(default=0.01, ge=0, le=1)
    max_entropy_share: float = Field(default=0.999, ge=0, le=1)
    min_kl: float = Field(default=1e-4, ge=0)


@dataclass(frozen=True, slots=True)
class CollapseReport:
    """What one measurement found. What a method does not give is None.

    Attributes:
        step: The step.
        spread: sqrt(D) times the mean standard deviation of a dimension, of the features.
        effective_rank: Of the features, 1 to min(N, D).
        projection_spread: As ``spread``, of what the loss compares.
        teacher_entropy: Mean entropy of the teacher's distributions, in nats.
        teacher_marginal_entropy: Entropy of their mean, in nats.
        teacher_student_kl: In nats.
        findings: What is wrong, in words with both numbers; empty when nothing is.
    """

    step: int
    spread: float
    effective_rank: float
    projection_spread: float | None = None
    teacher_entropy: float | None = None
    teacher_marginal_entropy: float | None = None
    teacher_student_kl: float | None = None
    findings: tuple[str, ...] = ()


TOLD = ("projection_spread", "teacher_entropy", "teacher_marginal_entropy", "teacher_student_kl")  # a step's own logs


class CollapseDetector:
    """Measures now and then, warns, and can end a run.

    With several workers each of them calls it at the same steps: they measure the union, so all decide alike.

    Args:
        config: When a representation counts as collapsed.
        num_outputs: K of the teacher's distribution; None when the method has none.
    """

    def __init__(self, config: CollapseConfig | None = None, *, num_outputs: int | None = None) -> None:
        self.config = config or CollapseConfig()
        self.num_outputs = num_outputs
        self.in_a_row = 0

    def observe(self, output: StepOutput, *, step: int) -> CollapseReport | None:
        """Measures a step's embedding and logs, every ``every_steps``.

        Args:
            output: Of a training step; of its logs, those of TOLD are read.
            step: Optimizer steps done.

        Returns:
            The measurement, or None at the steps between and where the step gives no embedding.

        Raises:
            TrainingDiverged: The action is "stop" and the findings of ``patience`` measurements in a row say collapse.
        """
        if output.embedding is None or step % self.config.every_steps:
            return None
        report = self.measure(output, step=step)
        if step < self.config.grace_steps or self.config.action == "off":
            return report
        self.in_a_row = self.in_a_row + 1 if report.findings else 0
        if report.findings:
            self._answer(report)
        return report

    def measure(self, output: StepOutput, *, step: int) -> CollapseReport:
        """One measurement; it neither warns nor counts."""
        assert output.embedding is not None
        unit = torch.nn.functional.normalize(gathered(output.embedding.detach().float()), dim=1)
        told: dict[str, Any] = {name: _number(output, name) for name in TOLD if name in output.logs}
        report = CollapseReport(step, float(embedding_spread(unit)), effective_rank(unit - unit.mean(0)), **told)
        return replace(report, findings=tuple(self._findings(report)))

    def _findings(self, seen: CollapseReport) -> Iterator[str]:
        """Each fault; the comparisons are written so that NaN is one."""
        limits, most = self.config, math.log(self.num_outputs or 2)
        told = [("features", seen.spread), ("projections", seen.projection_spread)]
        for what, spread in told:
            if spread is not None and not spread >= limits.min_spread:
                yield f"{what} lie close to one point: spread {spread:.3g}, floor {limits.min_spread:g}"
        if not seen.effective_rank >= limits.min_effective_rank:
            rank, floor = f"{seen.effective_rank:.3g}", f"{limits.min_effective_rank:g}"
            yield f"features lie along one line: effective rank {rank}, floor {floor}"
        marginal, entropy, kl = seen.teacher_marginal_entropy, seen.teacher_entropy, seen.teacher_student_kl
        if self.num_outputs and marginal is not None and not marginal >= limits.min_entropy_share * most:
            yield f"one output of the teacher takes all: entropy of its mean {marginal:.3g} of {most:.3g} nats"
        if self.num_outputs and entropy is not None and not entropy <= limits.max_entropy_share * most:
            yield f"all outputs of the teacher are alike: entropy {entropy:.4g} of {most:.4g} nats"
        if kl is not None and not kl >= limits.min_kl:
            yield f"the student has nothing to learn of the teacher: KL {kl:.3g} nats, floor {limits.min_kl:g}"

    def _answer(self, report: CollapseReport) -> None:
        words = "; ".join(report.findings)
        if self.config.action == "stop" and self.in_a_row >= self.config.patience:
            raise TrainingDiverged(
                f"the representation collapsed by step {report.step}: {words}",
                expected=f"features that tell images apart; {self.in_a_row} measurements in a row said they do not",
                fix=FIXES,
            )
        logger.warning("step %d: the representation may be collapsing: %s", report.step, words)


def embedding_spread(unit: torch.Tensor) -> torch.Tensor:
    """sqrt(D) times the mean over dimensions of the standard deviation over images: a scalar, without gradient.

    Args:
        unit: Embeddings of length 1, float (N, D), N >= 2.
    """
    return unit.detach().std(0, correction=0).mean() * math.sqrt(unit.shape[1])


def projection_spread(projected: torch.Tensor) -> torch.Tensor:
    """The spread of what a loss compares, float (N, P) of any length: a scalar for a step's logs, without gradient."""
    return embedding_spread(torch.nn.functional.normalize(projected.detach().float(), dim=1))


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the normalized singular values: 1 for one direction, min(N, D) when all are equal.

    Args:
        matrix: Float (N, D).

    Source: Roy and Vetterli 2007, definition 1; 0 log 0 is 0. A matrix of zeros has rank 0.
    """
    if not bool(torch.isfinite(matrix).all()):
        return math.nan
    singular = torch.linalg.svdvals(matrix.double() if matrix.device.type == "cpu" else matrix)
    total = singular.sum()
    if float(total) == 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def _number(output: StepOutput, name: str) -> float:
    """A log of the step, as the mean over workers."""
    assert output.embedding is not None
    value = torch.as_tensor(output.logs[name], dtype=torch.float32, device=output.embedding.device)
    return float(mean_over_workers(value))

"""Distillation: a student learns from the labels and from what a teacher says of the same pixels.

Each image has its own loss, and a batch has their mean over all of its images, so that the gradient is the same however
the batch is cut among workers::

    labelled      (1 - alpha) label + alpha T^2 KL(teacher || student) + w (1 - cos(P student, teacher))
    unlabelled                        alpha T^2 KL(teacher || student) + w (1 - cos(P student, teacher))

with both logits divided by T in the KL, P a linear layer from the student's embedding to the teacher's, which is
trained along and thrown away. Mixed images are shown to the teacher mixed.

Source: logits: Hinton, Vinyals, Dean 2015, section 2 and 2.1 (T^2). Features: Romero et al. 2015 (FitNets), equation 3:
a regressor from the student's to the teacher's; here between embeddings, by their angle, which knows no scale. The
same crop for both: Beyer et al. 2022.

Example:
    >>> teacher = Teacher(load_bundle("bundles/large"), labels=index.labels, seen_by=start.spec)
    >>> task = DistillationTask(student, DistillSettings(), teacher=teacher)
    >>> train(task, batches, settings)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from eagleray.learn.classification import ClassificationTask
from eagleray.learn.distill_settings import DistillSettings
from eagleray.learn.task import Progress, StepOutput
from eagleray.learn.teacher import Teacher
from eagleray.vision import backbones


def softened(logits: torch.Tensor, temperature: float, *, is_multi_label: bool = False) -> torch.Tensor:
    """A teacher's logits (N, C) as probabilities at a temperature: softmax, or sigmoid of each label by itself."""
    scaled = logits.float() / temperature
    return scaled.sigmoid() if is_multi_label else scaled.softmax(-1)


def answer_losses(
    logits: torch.Tensor, probabilities: torch.Tensor, temperature: float, *, is_multi_label: bool = False
) -> torch.Tensor:
    """T^2 times the KL divergence of the student from the teacher, for each image.

    Source: Hinton, Vinyals, Dean 2015, section 2.1; of several labels, the mean of each one's binary divergence.

    Args:
        logits: float (N, C), the student's.
        probabilities: float (N, C), the teacher's at this temperature, as ``softened`` gives them.
        temperature: T.
        is_multi_label: Each label by itself.

    Returns:
        float (N,), 0 where they agree.
    """
    scaled = logits.float() / temperature
    entropy = torch.special.xlogy(probabilities, probabilities)
    if is_multi_label:
        entropy = entropy + torch.special.xlogy(1 - probabilities, 1 - probabilities)
        crossed = functional.binary_cross_entropy_with_logits(scaled, probabilities, reduction="none")
        return temperature**2 * (entropy + crossed).mean(-1)
    return temperature**2 * (entropy - probabilities * functional.log_softmax(scaled, -1)).sum(-1)


def feature_losses(projected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One less the cosine of the student's projected embedding (N, D) and the teacher's, for each image: float (N,)."""
    return 1 - functional.cosine_similarity(projected.float(), wanted.float(), dim=-1)


class DistillationTask(nn.Module):  # type: ignore[misc]
    """A ``task.Task`` over the batches of a ClassificationTask; ``target`` -1, or no label of ``labels``: unlabelled.

    Args:
        student: The task of the labels: its mixing, freezing and rates are this one's.
        settings: See DistillSettings.
        teacher: Who answers in the step; None: the batch has ``teacher_logits``, and ``teacher_embedding`` where
            embeddings are matched.
        teacher_width: Of the teacher's embedding; None: the teacher's own.
    """

    def __init__(
        self,
        student: ClassificationTask,
        settings: DistillSettings,
        *,
        teacher: Teacher | None = None,
        teacher_width: int | None = None,
    ) -> None:
        super().__init__()
        self.student, self.settings, self.teacher = student, settings, teacher
        self._is_multi_label = student.settings.is_multi_label
        self.projector: nn.Linear | None = None
        wanted = teacher_width or (teacher.width if teacher else None)
        if settings.feature_weight and wanted:
            width = backbones.embedding_width(student.backbone, student.spec)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(student.settings.seed)
                self.projector = nn.Linear(width, wanted)

    @property
    def backbone(self) -> nn.Module:
        """The student's model."""
        return self.student.backbone

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compiles the student's forward pass; the arguments are torch.compile's."""
        self.student.compile(*args, **settings)

    def before_step(self, progress: Progress) -> None:
        """Freezes or thaws the student's backbone, as its schedule says."""
        self.student.before_step(progress)

    def after_step(self, progress: Progress) -> None:
        """Nothing moves by itself."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's, and the projector at the rate of the head."""
        groups = self.student.parameter_groups()
        return groups if self.projector is None else [*groups, {"params": list(self.projector.parameters())}]

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The student's, float (N, C), of a batch as it is: what a validation measures."""
        return self.student.logits(batch)

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        """The loss of a batch; logs the share right of the labelled, and how often student and teacher agree."""
        student, settings = self.student, self.settings
        pixels, is_known = batch["image"].permute(0, 3, 1, 2).float(), self._known(batch)
        columns = [self._targets(batch, is_known), is_known[:, None]]
        if self.teacher is None:
            columns.append(self._softened(batch["teacher_logits"]))
        pixels, mixed = student.mixed(pixels, torch.cat(columns, 1), progress)
        count = student.loss.num_classes
        targets, known = mixed[:, :count], mixed[:, count]
        if self.teacher is None:
            answers, wanted = mixed[:, count + 1 :], batch.get("teacher_embedding")
        else:
            said, wanted = self.teacher(pixels)
            answers = self._softened(said)
        logits, embedding = student.run(student.normalized(pixels.permute(0, 2, 3, 1)))
        taught = answer_losses(logits, answers, settings.temperature, is_multi_label=self._is_multi_label).mean()
        loss = (1 - settings.alpha) * student.loss(logits, targets, known) + settings.alpha * taught
        if self.projector is not None and wanted is not None:
            loss = loss + settings.feature_weight * feature_losses(self.projector(embedding), wanted).mean()
        return StepOutput(loss, self._logs(logits, answers, batch), embedding.detach())

    def _known(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float (N,): 1 where an image has a label, else 0."""
        known = batch["labels"].any(1) if self._is_multi_label else batch["target"] >= 0
        return known.float()

    def _targets(self, batch: Mapping[str, torch.Tensor], is_known: torch.Tensor) -> torch.Tensor:
        """float (N, C): as the loss takes them, zeros where there is no label."""
        named = batch if self._is_multi_label else {"target": batch["target"].clamp(min=0)}
        return self.student.loss.targets(named) * is_known[:, None]

    def _softened(self, logits: torch.Tensor) -> torch.Tensor:
        return softened(logits, self.settings.temperature, is_multi_label=self._is_multi_label)

    def _logs(
        self, logits: torch.Tensor, answers: torch.Tensor, batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if self._is_multi_label or self.student.settings.mixing.is_on:
            return {}
        best, known = logits.detach().argmax(-1), batch["target"] >= 0
        right = (best == batch["target"]) & known
        return {
            "accuracy": right.sum() / known.sum().clamp(min=1),
            "teacher_agreement": (best == answers.argmax(-1)).float().mean(),
        }

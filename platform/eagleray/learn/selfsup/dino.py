"""DINO: a student tells from any view what the teacher, an average of its past, tells from the global ones.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021,
https://arxiv.org/abs/2104.14294.

    h = f(view) (N, D);  y = g(h) (N, K): three layers, length 1 in the bottleneck, last layer with rows of length 1

    P_s = softmax(y_s / tau_s);  P_t = softmax((y_t - c) / tau_t), global views only                      (equation 1)

    L = mean over images and pairs of different views (t global, s any) of -sum over K of P_t log P_s     (equation 3)

    c <- m c + (1 - m) mean of y_t over the global views of all workers' images                           (equation 4)

    theta_t <- lambda theta_t + (1 - lambda) theta_s;  lambda as BYOL's tau;  tau_t rises in a line, then stays

The loss is the teacher's entropy plus KL(P_t || P_s) (equation 5): both are logged; a KL of 0 is a collapse.
The centre moves after the step, with what all micro-batches of the step gave.

Example:
    >>> DINO(backbone, width, DINOConfig()).training_step({"views": [*two_global, *six_local]}, progress).loss
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, remove_weight_norm

from eagleray.learn.selfsup.configs import DINOConfig
from eagleray.learn.selfsup.parts import parameter_groups, views_of
from eagleray.learn.selfsup.schedules import cosine, linear_warmup
from eagleray.learn.selfsup.synchronization import mean_over_workers, synchronize_batch_norms, wide
from eagleray.learn.selfsup.teacher import follow, frozen_copy
from eagleray.learn.selfsup.upstream import DINOLoss, DINOProjectionHead, center_momentum
from eagleray.learn.task import Progress, StepOutput


class DINO(nn.Module):  # type: ignore[misc]
    """DINO as a task.

    Args:
        backbone: f, float (N, 3, H, W) to (N, D), of any size that a view has.
        width: D.
        config: Its settings.
    """

    def __init__(self, backbone: nn.Module, width: int, config: DINOConfig | None = None) -> None:
        super().__init__()
        self.config = config or DINOConfig()
        self.backbone = backbone
        self.projector = _head(width, self.config)
        self.teacher_backbone = frozen_copy(self.backbone)
        self.teacher_projector = frozen_copy(self.projector)
        self.criterion = DeferredCenterLoss(
            self.config.output_dim,
            student_temp=self.config.student_temperature,
            center_momentum=self.config.center_momentum,
            warmup_teacher_temp_epochs=0,  # lightly's own schedule is by epoch; ours is given with each call
        )
        if self.config.sync_batch_norm:
            synchronize_batch_norms(self)

    def plan(self, size_px: int) -> Any:
        """The paper's multi-crop; a local view's side is a whole number of the backbone's patches."""
        from eagleray.learn.selfsup.views import dino_plan

        return dino_plan(size_px, self.local_px(size_px), self.config.num_local)

    def local_px(self, size_px: int) -> int:
        """The side of a local view beside global ones of ``size_px``."""
        patch = getattr(getattr(self.backbone, "patch_embed", None), "patch_size", (1, 1))
        return max(1, round(self.config.local_share * size_px / patch[0])) * int(patch[0])

    def training_step(self, batch: Mapping[str, Any], progress: Progress) -> StepOutput:
        """The loss of global and local views; views of one size go through the student as one batch.

        Args:
            batch: With ``views``: float tensors (N, 3, H, W), ``num_global`` global ones first.
            progress: Where the run stands.

        Raises:
            ConfigError: Fewer views than global ones, or than two.
        """
        num_global = self.config.num_global
        views = views_of(batch, at_least=max(2, num_global))
        features = torch.cat([self.backbone(torch.cat(group)) for group in _by_size(views)])
        told = self.projector(features).chunk(len(views))
        with torch.no_grad():
            seen = self.teacher_projector(self.teacher_backbone(torch.cat(views[:num_global]))).chunk(num_global)
        temperature = self.teacher_temperature(progress)
        with torch.autocast(features.device.type, enabled=False):  # K terms a sum: not in half precision
            teacher, student = [wide(one) for one in seen], [wide(one) for one in told]
            loss = self.criterion(teacher, student, teacher_temp=temperature)
            entropy, marginal_entropy = self.criterion.teacher_entropies(teacher, temperature)
        logs = {
            "momentum": self.momentum(progress),
            "teacher_temperature": temperature,
            "teacher_entropy": entropy,
            "teacher_marginal_entropy": marginal_entropy,
            "teacher_student_kl": loss.detach() - entropy,
        }
        return StepOutput(loss=loss, logs=logs, embedding=wide(features.detach()[: len(views[0])]))

    def momentum(self, progress: Progress) -> float:
        """lambda of a step."""
        start, end = self.config.momentum_start, self.config.momentum_end
        return cosine(progress.step, progress.num_steps, start=start, end=end)

    def teacher_temperature(self, progress: Progress) -> float:
        """tau_t of a step."""
        warmup_steps = round(self.config.teacher_temperature_warmup * progress.num_steps)
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return linear_warmup(progress.step, warmup_steps, start=start, end=end)

    def before_step(self, progress: Progress) -> None:
        """Freezes the last layer in the first epochs: called by the loop before every step.

        It then has no gradient at all, as in the authors' code: the optimizer neither decays it nor counts the step.
        """
        self._freeze_last_layer(progress.epoch < self.config.frozen_epochs)

    def _freeze_last_layer(self, is_frozen: bool) -> None:
        weight = self.projector.last_layer.parametrizations.weight
        weight.original1.requires_grad_(not is_frozen)
        weight.original0.requires_grad_(not is_frozen and not self.config.norm_last_layer)

    def after_step(self, progress: Progress) -> None:
        """Moves the teacher and its centre."""
        pairs = [(self.backbone, self.teacher_backbone), (self.projector, self.teacher_projector)]
        follow(pairs, momentum=self.momentum(progress))
        self.criterion.move_center()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, and biases and norms without decay, as in the authors' code; the last layer too, which thaws."""
        self._freeze_last_layer(False)
        return parameter_groups(self, self.backbone)


class DeferredCenterLoss(DINOLoss):  # type: ignore[misc]
    """lightly's DINO loss, whose centre waits for the step's end and is then the mean over all workers.

    So a loss asked for twice is the same twice, and gradient accumulation moves the centre once a step.
    """

    def __init__(self, output_dim: int, **settings: Any) -> None:
        super().__init__(output_dim, **settings)
        self._waiting: list[torch.Tensor] = []

    @torch.no_grad()
    def update_center(self, teacher_out: torch.Tensor) -> None:
        """Keeps the mean (1, 1, K) of a micro-batch, float (views, N, K); called by the loss."""
        if self.training:
            self._waiting.append(teacher_out.mean(dim=(0, 1), keepdim=True))

    @torch.no_grad()
    def move_center(self) -> None:
        """Moves the centre by what was kept (equation 4); every worker has to call it."""
        if self._waiting:
            batch_center = mean_over_workers(torch.stack(self._waiting).mean(0))
            self.center.copy_(center_momentum(self.center, batch_center, self.center_momentum))
        self._waiting.clear()

    @torch.no_grad()
    def teacher_entropies(self, teacher_out: Sequence[torch.Tensor], temperature: float) -> tuple[torch.Tensor, ...]:
        """The mean entropy of P_t, and the entropy of the mean P_t, in nats: each 0 to log K."""
        p = torch.softmax((torch.cat(list(teacher_out)) - self.center[0]) / temperature, dim=-1)
        return torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()


def _head(width: int, config: DINOConfig) -> DINOProjectionHead:
    """lightly's head, its weight norm as a parametrization: the older form that lightly takes cannot be deep-copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of the older weight norm that goes here
        head = DINOProjectionHead(
            input_dim=width,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            output_dim=config.output_dim,
            batch_norm=config.batch_norm,
        )
    head.last_layer = parametrizations.weight_norm(remove_weight_norm(head.last_layer))
    length = head.last_layer.parametrizations.weight.original0
    length.data.fill_(1.0)
    length.requires_grad_(not config.norm_last_layer)
    return head


def _by_size(views: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of views of one size, in order."""
    return [list(group) for _, group in groupby(views, key=lambda view: tuple(view.shape[-2:]))]

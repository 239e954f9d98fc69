"""BYOL: an online network predicts what a slowly moving copy of itself says of another view; there are no negatives.

Source: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020,
https://arxiv.org/abs/2006.07733.

    online: h = f(v) (N, D), z = g(h) (N, P), p = q(z) (N, P);  target: z' = g'(f'(v')) (N, P), no gradient

    L(v, v') = |p / |p| - z' / |z'||^2 = 2 - 2 cos(p, z')                                                 (equation 2)

    L = L(v, v') + L(v', v);  xi <- tau xi + (1 - tau) theta;  tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2

The loss given here is lightly's, the mean of -cos over both directions, in [-1, 1]: the paper's is 4 + 4 times it.

Example:
    >>> BYOL(backbone, width, BYOLConfig()).training_step({"views": [view_0, view_1]}, progress).loss
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eagleray.learn.selfsup.collapse import projection_spread
from eagleray.learn.selfsup.configs import BYOLConfig
from eagleray.learn.selfsup.parts import parameter_groups, views_of
from eagleray.learn.selfsup.schedules import cosine
from eagleray.learn.selfsup.synchronization import synchronize_batch_norms, wide
from eagleray.learn.selfsup.teacher import follow, frozen_copy
from eagleray.learn.selfsup.upstream import BYOLPredictionHead, BYOLProjectionHead, NegativeCosineSimilarity
from eagleray.learn.task import Progress, StepOutput


class BYOL(nn.Module):  # type: ignore[misc]
    """BYOL as a task.

    Args:
        backbone: f, float (N, 3, H, W) to (N, D).
        width: D.
        config: Its settings.
    """

    def __init__(self, backbone: nn.Module, width: int, config: BYOLConfig | None = None) -> None:
        super().__init__()
        self.config = config or BYOLConfig()
        hidden_dim, output_dim = self.config.hidden_dim or 2 * width, self.config.output_dim
        self.backbone = backbone
        self.projector = BYOLProjectionHead(width, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.teacher_backbone = frozen_copy(self.backbone)
        self.teacher_projector = frozen_copy(self.projector)
        self.criterion = NegativeCosineSimilarity()
        if self.config.sync_batch_norm:
            synchronize_batch_norms(self)

    def plan(self, size_px: int) -> Any:
        """The paper's views: the two differ in blur and solarization."""
        from eagleray.learn.selfsup.views import byol_plan

        return byol_plan(size_px)

    def training_step(self, batch: Mapping[str, Any], progress: Progress) -> StepOutput:
        """The loss of two views, both ways; each view is its own batch for the norms, as in the paper.

        Args:
            batch: With ``views``: two float tensors (N, 3, H, W).
            progress: Where the run stands.

        Raises:
            ConfigError: Not two views.
        """
        views = views_of(batch, at_least=2, at_most=2)
        features = [self.backbone(view) for view in views]
        projected = [self.projector(one) for one in features]
        predicted = [self.predictor(one) for one in projected]
        with torch.no_grad():
            targets = [self.teacher_projector(self.teacher_backbone(view)) for view in views]
        with torch.autocast(predicted[0].device.type, enabled=False):
            there = self.criterion(wide(predicted[0]), wide(targets[1]))
            back = self.criterion(wide(predicted[1]), wide(targets[0]))
        logs = {"momentum": self.momentum(progress), "projection_spread": projection_spread(projected[0])}
        return StepOutput(loss=(there + back) / 2, logs=logs, embedding=wide(features[0].detach()))

    def momentum(self, progress: Progress) -> float:
        """tau of a step."""
        start, end = self.config.momentum_start, self.config.momentum_end
        return cosine(progress.step, progress.num_steps, start=start, end=end)

    def after_step(self, progress: Progress) -> None:
        """Moves the target network."""
        pairs = [(self.backbone, self.teacher_backbone), (self.projector, self.teacher_projector)]
        follow(pairs, momentum=self.momentum(progress))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, and biases and norms without decay (the paper keeps them out of LARS and of weight decay)."""
        return parameter_groups(self, self.backbone)

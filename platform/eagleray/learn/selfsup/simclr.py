"""SimCLR: two views of an image attract, views of other images repel.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020, https://arxiv.org/abs/2002.05709.

    h = f(view) (N, D);  z = g(h) / |g(h)| (N, P);  sim(i, j) = z_i . z_j

    l(i, j) = -log [ exp(sim(i, j) / tau) / sum over k != i of exp(sim(i, k) / tau) ]                     (equation 1)

    L = mean of l(i, j) and l(j, i) over the N W positive pairs: 2 N W - 2 negatives each, of all W workers

Example:
    >>> SimCLR(backbone, width, SimCLRConfig()).training_step({"views": [view_0, view_1]}, progress).loss
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eagleray.learn.selfsup.collapse import projection_spread
from eagleray.learn.selfsup.configs import SimCLRConfig
from eagleray.learn.selfsup.parts import parameter_groups, views_of
from eagleray.learn.selfsup.synchronization import synchronize_batch_norms, wide
from eagleray.learn.selfsup.upstream import NTXentLoss, SimCLRProjectionHead
from eagleray.learn.task import Progress, StepOutput


class SimCLR(nn.Module):  # type: ignore[misc]
    """SimCLR as a task.

    Args:
        backbone: f, float (N, 3, H, W) to (N, D).
        width: D.
        config: Its settings.
    """

    def __init__(self, backbone: nn.Module, width: int, config: SimCLRConfig | None = None) -> None:
        super().__init__()
        self.config = config or SimCLRConfig()
        self.backbone = backbone
        self.projector = SimCLRProjectionHead(
            width, self.config.hidden_dim or width, self.config.output_dim, num_layers=self.config.num_layers
        )
        # Without gathering, a worker would see the negatives of its own images only.
        self.criterion = NTXentLoss(temperature=self.config.temperature, gather_distributed=True)
        if self.config.sync_batch_norm:
            synchronize_batch_norms(self)

    def plan(self, size_px: int) -> Any:
        """The paper's views."""
        from eagleray.learn.selfsup.views import simclr_plan

        return simclr_plan(size_px)

    def training_step(self, batch: Mapping[str, Any], progress: Progress) -> StepOutput:
        """The loss of two views; each is its own batch for the norms, as in lightly's examples.

        The authors' code takes both as one batch: then the running averages, with which the finished backbone sees,
        move half as often. Which is better is not known: after 100 and 150 steps the intervals include 0.

        Args:
            batch: With ``views``: two float tensors (N, 3, H, W).
            progress: Where the run stands; not used.

        Raises:
            ConfigError: Not two views.
        """
        views = views_of(batch, at_least=2, at_most=2)
        features = [self.backbone(view) for view in views]
        projected = [self.projector(one) for one in features]
        with torch.autocast(projected[0].device.type, enabled=False):  # similarities over tau: not in half precision
            loss = self.criterion(*(wide(one) for one in projected))
        logs = {"projection_spread": projection_spread(torch.cat(projected))}
        return StepOutput(loss=loss, logs=logs, embedding=wide(features[0].detach()))

    def after_step(self, progress: Progress) -> None:
        """Nothing: there is no teacher."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, and biases and norms without decay (the paper keeps them out of LARS and of weight decay)."""
        return parameter_groups(self, self.backbone)

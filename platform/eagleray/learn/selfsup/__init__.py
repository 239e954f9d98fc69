"""METHODS: how a backbone learns from images alone. One law for all, held by tests/contract/test_selfsup.py.

Each method is an nn.Module and a ``learn.task.Task``: a backbone with its heads, the loss of a batch of views, and what
moves after a step. The same images split over two workers give the same loss and the same gradient as in one.
Importing this package or ``configs`` loads no torch.

Example:
    >>> backbone, width = create_headless(Backbone(name="resnet18"), size_px=64)
    >>> method = resolve(METHODS, "simclr", what="method")(backbone, width, SimCLRConfig())
    >>> method.training_step({"views": [view_0, view_1]}, progress).loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from eagleray.core.tables import Entry
from eagleray.learn.selfsup.configs import MethodConfig

if TYPE_CHECKING:
    from torch import nn

    from eagleray.learn.task import Progress, StepOutput

METHODS = {
    "simclr": Entry("eagleray.learn.selfsup.simclr:SimCLR", extra="learn", needs="lightly"),
    "byol": Entry("eagleray.learn.selfsup.byol:BYOL", extra="learn", needs="lightly"),
    "dino": Entry("eagleray.learn.selfsup.dino:DINO", extra="learn", needs="lightly"),
}


class Method(Protocol):
    """One way to learn without labels: an nn.Module with these, and a Task."""

    backbone: nn.Module
    """The student, float32 (N, 3, H, W) to features (N, D): what becomes the bundle."""

    def __init__(self, backbone: nn.Module, width: int, config: MethodConfig) -> None:
        """Builds heads and teacher around a headless backbone (``vision.backbones.create_headless``)."""

    def plan(self, size_px: int) -> Any:
        """The ViewPlan of the paper, for a largest view of ``size_px`` pixels."""

    def training_step(self, batch: Mapping[str, Any], progress: Progress) -> StepOutput:
        """The loss of ``batch["views"]``: float32 (N, 3, H, W) tensors, the global views first.

        It changes neither teacher nor centre: asked again, it answers the same.
        """

    def after_step(self, progress: Progress) -> None:
        """After the optimizer's step, with the progress that its training_step was given."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains: weights, and what is not decayed."""

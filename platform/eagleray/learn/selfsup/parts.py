"""What the methods share: reading the views of a batch, and which parameters are not decayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eagleray.core.errors import ConfigError


def views_of(batch: Mapping[str, Any], *, at_least: int, at_most: int | None = None) -> list[torch.Tensor]:
    """The views of a batch.

    Args:
        batch: With ``views``: float tensors (N, 3, H, W), the global ones first.
        at_least: How many the method needs.
        at_most: How many it can take; None for any number.

    Raises:
        ConfigError: There are more or fewer, or they are not of the same images.
    """
    views = list(batch["views"])
    counts = sorted({len(view) for view in views})
    if len(views) < at_least or (at_most is not None and len(views) > at_most) or len(counts) != 1:
        expected = f"{at_least} views" if at_least == at_most else f"at least {at_least} views"
        raise ConfigError(
            f"a batch has {len(views)} views, of {' and '.join(map(str, counts)) or 'no'} images",
            expected=f"{expected}, each of the same images",
            fix="take the views of the method's own plan",
        )
    return views


def parameter_groups(task: nn.Module, backbone: nn.Module) -> list[dict[str, Any]]:
    """Two groups for the optimizer: weights, and what no paper decays (biases, norms, a ViT's tokens and positions).

    Args:
        task: The method; parameters without gradient are left out.
        backbone: Its student, which may name more in timm's ``no_weight_decay``.
    """
    named = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # type: ignore[operator]
    spared = {parameter for name, parameter in backbone.named_parameters() if name in named}
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    plain = [parameter for parameter in trained if parameter.ndim <= 1 or parameter in spared]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1 and parameter not in spared]},
        {"params": plain, "weight_decay": 0.0},
    ]

"""Mixup, CutMix and label smoothing, on a batch, on its device, from a generator of the run's own.

What timm.data.Mixup does in its batch mode, with one difference: its numbers come from numpy's global generator, these
from (seed, step, rank), so that a resumed run mixes as it would have.

Example:
    >>> x, targets = mix(x, soft_targets(target, 10, smoothing=0.1), settings, np.random.default_rng([seed, step]))
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from eagleray.core.config import Config


class MixSettings(Config):
    """What is mixed.

    Attributes:
        mixup_alpha: Beta parameter of mixup (Zhang et al. 2018); 0: none.
        cutmix_alpha: Beta parameter of CutMix (Yun et al. 2019); 0: none.
        probability: Of mixing a batch at all.
        switch_probability: Of CutMix where both are on.
    """

    mixup_alpha: float = Field(0.0, ge=0)
    cutmix_alpha: float = Field(0.0, ge=0)
    probability: float = Field(1.0, ge=0, le=1)
    switch_probability: float = Field(0.5, ge=0, le=1)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


def soft_targets(target: torch.Tensor, num_classes: int, *, smoothing: float = 0.0) -> torch.Tensor:
    """Class indices int64 (N,) as probabilities float (N, C); ``smoothing`` is spread over all classes alike.

    Source: Szegedy et al. 2016, section 7.
    """
    hard = functional.one_hot(target, num_classes).float()
    return hard * (1 - smoothing) + smoothing / num_classes


def soft_labels(labels: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Multi-hot labels (N, C) as probabilities, smoothed towards a half."""
    return labels.float() * (1 - smoothing) + 0.5 * smoothing


def mix(
    x_nchw: torch.Tensor, targets: torch.Tensor, settings: MixSettings, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes every image with its mirror in the batch: the first with the last, and so on.

    Args:
        x_nchw: float (N, C, H, W).
        targets: float (N, C).
        settings: See MixSettings.
        generator: Of this step.

    Returns:
        Images and targets, mixed in the same proportion.
    """
    if not settings.is_on or generator.random() >= settings.probability:
        return x_nchw, targets
    cuts = settings.cutmix_alpha > 0 and (settings.mixup_alpha == 0 or generator.random() < settings.switch_probability)
    alpha = settings.cutmix_alpha if cuts else settings.mixup_alpha
    share = float(generator.beta(alpha, alpha))
    if cuts:
        height, width = x_nchw.shape[-2:]
        top, bottom, left, right = cut_box(height, width, share, generator.integers(height), generator.integers(width))
        mixed = x_nchw.clone()
        mixed[:, :, top:bottom, left:right] = x_nchw.flip(0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = x_nchw * share + x_nchw.flip(0) * (1 - share)
    return mixed, targets * share + targets.flip(0) * (1 - share)


def cut_box(height: int, width: int, share: float, y: int, x: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of CutMix's box around a point, cut at the border.

    Source: Yun et al. 2019, equation 2, as timm rounds it.
    """
    ratio = float(np.sqrt(1 - share))
    tall, wide = int(height * ratio), int(width * ratio)
    return (
        int(np.clip(y - tall // 2, 0, height)),
        int(np.clip(y + (tall + 1) // 2, 0, height)),
        int(np.clip(x - wide // 2, 0, width)),
        int(np.clip(x + (wide + 1) // 2, 0, width)),
    )

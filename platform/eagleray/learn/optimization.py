"""Optimizers, parameter groups and schedules.

The learning rate in the settings is for ``base_batch`` images: a batch of B takes ``lr * B / base_batch`` (the linear
scaling rule; Goyal et al. 2017, section 2.1). It rises linearly over the warm-up and falls by half a cosine to
``min_lr_ratio`` of its height, step by step. Norms and biases get no weight decay, and under LARS no adaptation.

Example:
    >>> optimizer = make_optimizer(task.parameter_groups(), settings, batch_size=512)
    >>> set_rates(optimizer, settings, progress, batch_size=512)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from eagleray.core.config import Config
from eagleray.learn.task import Progress
from eagleray.vision.torchvision_guard import ensure_importable

ensure_importable()

from timm.optim import Lars, param_groups_layer_decay  # noqa: E402  torchvision must be importable first

FUSED_ON = ("cpu", "cuda")


class OptimizerSettings(Config):
    """What moves the weights.

    Attributes:
        name: ``adamw`` (Loshchilov, Hutter 2019), ``sgd`` with momentum, or ``lars`` (You et al. 2017).
        lr: Peak learning rate for ``base_batch`` images.
        base_batch: The batch that ``lr`` is for; None: ``lr`` is taken as it stands.
        weight_decay: Of weights; norms and biases get none.
        weight_decay_end: Where weight decay goes by half a cosine over the run (DINO); None: it stays.
        momentum: Of sgd and lars.
        betas: Of adamw.
        trust_coefficient: Of lars.
        warmup_epochs: Of the linear warm-up.
        min_lr_ratio: The last learning rate, as a share of the peak.
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    base_batch: int | None = Field(256, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    trust_coefficient: float = Field(0.001, gt=0)
    warmup_epochs: float = Field(1.0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)


def peak_lr(settings: OptimizerSettings, batch_size: int) -> float:
    """The learning rate at the end of the warm-up, by the linear scaling rule."""
    return settings.lr if settings.base_batch is None else settings.lr * batch_size / settings.base_batch


def lr_factor(progress: Progress, settings: OptimizerSettings) -> float:
    """What the peak learning rate is multiplied by at a step.

    Warm-up: ``(step + 1) / warmup``; then ``min + (1 - min) (1 + cos(pi t)) / 2`` with t from 0 to 1 over the rest.
    Source: Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    warmup = min(round(settings.warmup_epochs * progress.steps_per_epoch), progress.num_steps - 1)
    if progress.step < warmup:
        return (progress.step + 1) / warmup
    share = (progress.step - warmup) / max(1, progress.num_steps - warmup)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def weight_decay_at(progress: Progress, settings: OptimizerSettings) -> float:
    """The weight decay of weights at a step. Source: Caron et al. 2021 (DINO), appendix: half a cosine over the run."""
    start, end = settings.weight_decay, settings.weight_decay_end
    if end is None:
        return start
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress.fraction))) / 2


def split_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups with ``lr_scale``, and with ``weight_decay`` 0 for norms and biases (all of one dimension or none).

    Args:
        groups: As a task gives them. A group that says its ``weight_decay`` is left whole: 0 stays 0, any other value
            means the settings'.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        scale, params = float(group.get("lr_scale", 1.0)), list(group["params"])
        if "weight_decay" in group:
            split.append({"params": params, "lr_scale": scale, "has_decay": bool(group["weight_decay"])})
            continue
        parts = [
            ([one for one in params if one.ndim > 1], True),
            ([one for one in params if one.ndim <= 1], False),
        ]
        split += [{"params": part, "lr_scale": scale, "has_decay": decays} for part, decays in parts if part]
    return split


def layer_groups(model: nn.Module, *, layer_decay: float | None = None, lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Groups of a timm model, deeper layers at smaller learning rates.

    Args:
        model: A timm model; parameters that take no gradient are left out.
        layer_decay: Layer k of L learns at ``layer_decay ** (L - k)`` (Bao et al. 2021, BEiT); None: alike.
        lr_scale: Of all of them, on top.
    """
    if layer_decay is None:
        names: set[str] = getattr(model, "no_weight_decay", set)()
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        plain = [one for name, one in named if name in names]
        groups: list[dict[str, Any]] = [
            {"params": [one for name, one in named if name not in names], "lr_scale": lr_scale}
        ]
        return groups + ([{"params": plain, "lr_scale": lr_scale, "weight_decay": 0.0}] if plain else [])
    found = param_groups_layer_decay(
        model, weight_decay=1.0, no_weight_decay_list=getattr(model, "no_weight_decay", set)(), layer_decay=layer_decay
    )
    return [{**group, "lr_scale": group["lr_scale"] * lr_scale} for group in found]


def make_optimizer(
    groups: Iterable[Mapping[str, Any]], settings: OptimizerSettings, *, batch_size: int
) -> torch.optim.Optimizer:
    """The optimizer over a task's groups.

    Args:
        groups: ``params`` and optionally ``lr_scale`` and ``weight_decay`` (see split_groups).
        settings: See OptimizerSettings.
        batch_size: Images a step, for the linear scaling rule.
    """
    lr = peak_lr(settings, batch_size)
    split = [
        {**group, "lr": lr * group["lr_scale"], "weight_decay": settings.weight_decay if group["has_decay"] else 0.0}
        for group in split_groups(groups)
    ]
    if settings.name == "adamw":
        # one kernel over all tensors: on a CPU 2.8 ms a step for Lite0, where the default takes 9 (docs/log.md)
        is_fused = all(one.device.type in FUSED_ON for group in split for one in group["params"])
        return torch.optim.AdamW(split, lr=lr, betas=settings.betas, fused=is_fused)
    if settings.name == "sgd":
        return torch.optim.SGD(split, lr=lr, momentum=settings.momentum)
    # timm's Lars leaves groups without weight decay at the plain learning rate: norms and biases are not adapted
    optimizer: torch.optim.Optimizer = Lars(
        split, lr=lr, momentum=settings.momentum, trust_coeff=settings.trust_coefficient
    )
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Goes on from a kept state, each part laid out in memory as its parameter is: as if it had never been saved."""
    optimizer.load_state_dict(dict(state))
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_rates(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, progress: Progress, *, batch_size: int
) -> float:
    """Sets learning rate and weight decay of every group for a step.

    Returns:
        The learning rate of groups of ``lr_scale`` 1.
    """
    lr, decay = peak_lr(settings, batch_size) * lr_factor(progress, settings), weight_decay_at(progress, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["has_decay"] else 0.0
    return lr

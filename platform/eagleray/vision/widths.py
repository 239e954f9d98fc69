"""Widths of a model's layers as JSON: what a pruned architecture is besides its timm name.

``model_args["channels"]`` of a pruned bundle holds them: a module's dotted name to a list of whole numbers, for every
module that is narrower than timm makes it. ``backbones.create`` makes the wide model and narrows it here, so that a
pruned bundle loads without pickle and without torch-pruning. timm alone does not know these widths: it cannot load
such a bundle by ``local-dir:``.

| module | numbers |
|---|---|
| convolution | output channels, input channels, groups |
| linear layer | outputs, inputs; the outputs of the classifier are those of the labels at hand |
| batch, group or layer norm | channels |
| attention | heads; the width of a head stays |
| the model itself, by the name "" | channels of its feature map, width of its embedding |

Example:
    >>> narrow(model, {"conv1": [40, 3, 1], "bn1": [40], "layer1.0.conv1": [40, 40, 1]})
    >>> differences(wide, model)["bn1"]
    [40]
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from eagleray.core.errors import ArtifactError

CHANNELS = "channels"  # the key of model_args
ROOT = ""  # the model itself among its modules
_CONV = nn.modules.conv._ConvNd
_NORM = nn.modules.batchnorm._NormBase  # batch and instance norms
_FIX = "prune the model again, or get the bundle again"


def widths(module: nn.Module) -> list[int] | None:
    """The widths of one module; None where it has none of its own."""
    if isinstance(module, _CONV):
        return [module.out_channels, module.in_channels, module.groups]
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    if isinstance(module, _NORM):
        return [module.num_features]
    if isinstance(module, nn.GroupNorm):
        return [module.num_channels]
    if isinstance(module, nn.LayerNorm):
        return [int(module.normalized_shape[-1])]
    if hasattr(module, "num_features") and hasattr(module, "head_hidden_size"):  # a timm model
        return [int(module.num_features), int(module.head_hidden_size)]
    if hasattr(module, "attn_dim") and hasattr(module, "num_heads"):  # timm's attentions
        return [int(module.num_heads)]
    return None


def differences(wide: nn.Module, narrowed: nn.Module) -> dict[str, list[int]]:
    """The widths of a model's modules that are not those of another of the same architecture.

    Args:
        wide: As timm makes it, with the same classes.
        narrowed: What became of it.
    """
    before = {name: widths(module) for name, module in wide.named_modules()}
    after = {name: widths(module) for name, module in narrowed.named_modules()}
    return {name: value for name, value in after.items() if value is not None and value != before.get(name)}


def narrow(model: nn.Module, channels: Mapping[str, Sequence[int]]) -> None:
    """Narrows a timm model in place: the first channels of each layer stay; weights that were trained come after.

    Args:
        model: As timm makes it.
        channels: Module name to widths, as ``differences`` gave them.

    Raises:
        ArtifactError: A module is unknown, or cannot have such widths; nothing is made that is wider than the model.
    """
    modules = dict(model.named_modules())
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    faults = []
    for name, value in channels.items():
        module = modules.get(name)
        if module is None:
            near = difflib.get_close_matches(name, modules, n=1)
            faults.append(f"no layer {name!r}" + (f" (there is {near[0]!r})" if near else ""))
        elif module is head and isinstance(module, nn.Identity):
            continue  # a model without a classifier
        else:
            wanted = [module.out_features, *value[1:]] if module is head and isinstance(module, nn.Linear) else value
            faults += [f"{name or 'the model'}: {fault}" for fault in _narrow_one(module, wanted)]
    if faults:
        raise ArtifactError(
            f"the widths of a pruned model do not fit the architecture in {len(faults)} places: "
            f"{'; '.join(faults[:4])}",
            expected="widths that pruning this architecture gave",
            fix=_FIX,
        )


def _narrow_one(module: nn.Module, wanted: Any) -> list[str]:
    """Narrows one module; what is wrong with the widths, else an empty list."""
    have = widths(module)
    if have is None:
        return [f"a {type(module).__name__} has no widths"]
    is_list = isinstance(wanted, list | tuple) and all(type(value) is int for value in wanted)
    if not is_list or len(wanted) != len(have):
        return [f"{wanted!r} are not {len(have)} whole numbers"]
    if not all(1 <= new <= old for new, old in zip(wanted, have, strict=True)):
        return [f"{list(wanted)} is not within 1 and {have}"]
    if isinstance(module, _CONV):
        return _narrow_convolution(module, *wanted)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = wanted
        _cut(module, "weight", *wanted)
    elif isinstance(module, _NORM | nn.GroupNorm | nn.LayerNorm):
        return _narrow_norm(module, wanted[0])
    elif hasattr(module, "attn_dim"):
        module.num_heads, module.attn_dim = wanted[0], wanted[0] * int(module.head_dim)  # type: ignore[assignment]
    else:
        module.num_features, module.head_hidden_size = wanted  # type: ignore[assignment]
    _cut(module, "bias", wanted[0])
    return []


def _narrow_convolution(module: Any, out: int, inputs: int, groups: int) -> list[str]:
    if out % groups or inputs % groups or inputs // groups > module.weight.shape[1]:
        return [f"{out} and {inputs} channels do not go in {groups} groups"]
    module.out_channels, module.in_channels, module.groups = out, inputs, groups
    _cut(module, "weight", out, inputs // groups)
    _cut(module, "bias", out)
    return []


def _narrow_norm(module: Any, count: int) -> list[str]:
    if isinstance(module, nn.GroupNorm):
        if count % module.num_groups:
            return [f"{count} channels do not go in {module.num_groups} groups"]
        module.num_channels = count
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (*module.normalized_shape[:-1], count)
    else:
        module.num_features = count
    for name in ("weight", "bias", "running_mean", "running_var"):
        _cut(module, name, count)
    return []


def _cut(module: nn.Module, name: str, *sizes: int) -> None:
    """Keeps the first rows (and columns) of a parameter or buffer, where there is one."""
    value = getattr(module, name, None)
    if not isinstance(value, torch.Tensor):
        return
    part = value.detach()[tuple(slice(size) for size in sizes)].clone()
    setattr(module, name, nn.Parameter(part, value.requires_grad) if isinstance(value, nn.Parameter) else part)

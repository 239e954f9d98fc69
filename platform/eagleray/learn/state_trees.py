"""State as tensors and JSON: any tree of dicts, lists, tensors and plain values, apart and together again, bit for bit.

An optimizer's state is nested and keyed by numbers, with counters beside tensors; safetensors holds flat names and
tensors only. ``flatten`` puts tensors under dotted names and leaves a JSON tree that says where each belongs.

Example:
    >>> plain, tensors = flatten(optimizer.state_dict())
    >>> optimizer.load_state_dict(unflatten(plain, tensors))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

# One-key dicts that say what JSON cannot: a tensor's name, a mapping with keys that are no strings, a tuple, a float
# that is not finite.
TENSOR, PAIRS, TUPLE, FLOAT = "$tensor", "$pairs", "$tuple", "$float"


def flatten(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tree as JSON values and named tensors.

    Args:
        tree: Of dicts, lists, tuples, tensors, str, int, float, bool and None.

    Returns:
        The tree with each tensor replaced by its name; the tensors, contiguous copies on the CPU.

    Raises:
        TypeError: The tree holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            while name in tensors:  # {"a.b": ..., "a": {"b": ...}}
                name += "'"
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {TENSOR: name}
        if isinstance(value, Mapping):
            items = [(key, visit(item, f"{name}.{key}" if name else str(key))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(items)
            return {PAIRS: [[visit(key, ""), item] for key, item in items]}
        if isinstance(value, list | tuple):
            items = [visit(item, f"{name}.{index}") for index, item in enumerate(value)]
            return {TUPLE: items} if isinstance(value, tuple) else items
        if isinstance(value, float) and not math.isfinite(value):
            return {FLOAT: repr(value)}
        if value is None or isinstance(value, str | int | float):
            return value
        raise TypeError(f"{name} is a {type(value).__name__}: no state that can be kept")

    return visit(tree, ""), tensors


def unflatten(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that ``flatten`` took apart."""
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if PAIRS in plain:
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in plain[PAIRS]}
    if TUPLE in plain:
        return tuple(unflatten(item, tensors) for item in plain[TUPLE])
    if FLOAT in plain:
        return float(plain[FLOAT])
    return {key: unflatten(item, tensors) for key, item in plain.items()}

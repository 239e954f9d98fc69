"""Batches as tensors: onto the device, in parts, laid out.

Example:
    >>> tensors = on_device(batch.arrays, torch.device("cuda"))
    >>> for part, share in parts(tensors, 4): ...
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from eagleray.learn.memory import rows_of

Tensors = Mapping[str, Any]


def on_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> Tensors:
    """A batch's arrays as tensors on a device; to CUDA through pinned memory, beside what the device does."""
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensors[name] = (
            tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
        )
    return tensors


def parts(tensors: Tensors, count: int) -> list[tuple[Tensors, float]]:
    """A batch in ``count`` consecutive parts, or as many as it has images; each with its share of the images."""
    rows = rows_of(tensors)
    count = min(count, rows)
    edges = [rows * number // count for number in range(count + 1)]
    return [
        ({name: value[low:high] for name, value in tensors.items()}, (high - low) / rows)
        for low, high in pairwise(edges)
    ]


def channels_last(value: Any) -> Any:
    """Images, float (N, C, H, W), alone or in lists, with their channels last in memory; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(channels_last(one) for one in value)
    is_image = isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if is_image else value

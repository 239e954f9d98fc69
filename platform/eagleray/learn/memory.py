"""Whether a batch fits the memory: an estimate on the CPU before it is too late, the device's own word on CUDA.

And on the CPU, memory that one step has freed is kept for the next.

Example:
    >>> refuse_if_too_large(estimate_bytes(task, loss, batch), free_bytes(device), rows=256, ...)
    >>> with kept_for_reuse(device): ...
"""

from __future__ import annotations

import copy
import ctypes
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagleray.core.errors import CapabilityError

PROBE_ROWS = 2  # the least that batch statistics allow
USABLE = 0.9  # of what is free: the rest is for the decoders and the allocator's slack
# glibc's mallopt(3): its numbers, what a run asks for, and the most that its moving thresholds come to by themselves
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20}
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 128 * 2**10}


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far: of the device where it is CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_bytes(device: torch.device) -> int:
    """What can still be had: on the CPU the least of the machine's and the container's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        reclaimable = _reclaimable(Path("/sys/fs/cgroup/memory.stat").read_text())
        return free if limit == "max" else min(free, int(limit) - int(used) + reclaimable)
    except (OSError, ValueError):
        return free


def _reclaimable(stat: str) -> int:
    """Page cache that the kernel gives back when it is asked. Source: Linux, cgroup-v2.rst, memory.stat."""
    return sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith(("inactive_file ",)))


@contextmanager
def kept_for_reuse(device: torch.device) -> Iterator[None]:
    """Within it, what this process frees stays with it; afterwards the system has it back.

    A step's activations are some of the largest blocks there are: glibc returns them and asks for them anew at every
    step, as zeroed pages, one fault for each 4 KiB. Lite0 at 224 px, 16 a batch: 200,000 faults and a quarter of the
    step's time (docs/log.md). A device's allocator keeps its memory by itself; other C libraries are left alone.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    try:
        for number, value in _KEEPING.items():
            libc.mallopt(number, value)
        yield
    finally:
        for number, value in _USUAL.items():
            libc.mallopt(number, value)
        libc.malloc_trim(0)


def rows_of(batch: Mapping[str, Any]) -> int:
    """How many images a batch has."""
    value = next(iter(batch.values()))
    return len(value[0] if isinstance(value, list) else value)


def estimate_bytes(
    task: nn.Module, loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any]
) -> int:
    """What a training step of a batch keeps for its backward pass, from a forward pass of two of its images.

    Args:
        task: It is copied: nothing of its own moves, not a statistic, a teacher or a centre.
        loss: Of (task, batch), with its graph.
        batch: Tensors whose first axis is the image.

    Returns:
        Bytes of saved tensors (those that are no weights), scaled to the batch, and of gradients and two moments.
    """
    few = {name: value[:PROBE_ROWS] for name, value in batch.items()}
    twin = copy.deepcopy(task)
    weights = {one.untyped_storage().data_ptr() for one in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # while it is held, no other tensor can have its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and place not in kept:
            kept[place] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(twin, few)
    held.clear()
    moving = sum(one.numel() * one.element_size() for one in task.parameters() if one.requires_grad)
    return sum(kept.values()) * rows_of(batch) // max(1, rows_of(few)) + 3 * moving


def refuse_if_too_large(estimate: int, free: int, *, rows: int, accumulation: int, batch_size: int) -> None:
    """Refuses a batch that will not fit.

    Raises:
        CapabilityError: The estimate is above what is free.
    """
    if estimate > USABLE * free:
        raise CapabilityError(
            f"a step of {rows} images needs about {estimate / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free",
            expected="a step that fits the memory",
            fix=advice(rows, accumulation, batch_size, shortage=estimate / max(1.0, USABLE * free)),
        )


@contextmanager
def explained(*, rows: int, accumulation: int, batch_size: int, device: torch.device) -> Iterator[None]:
    """Says CUDA's out-of-memory in our words.

    Raises:
        CapabilityError: The device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
        raise CapabilityError(
            f"a step of {rows} images does not fit the device: {peak_gib(device):.1f} of {total:.1f} GiB were in use",
            expected="a step that fits the memory",
            fix=advice(rows, accumulation, batch_size, shortage=2.0),
        ) from error


def advice(rows: int, accumulation: int, batch_size: int, *, shortage: float) -> str:
    """What to do: the accumulation that would fit, where the batch divides by it."""
    wanted = accumulation * max(2, -(-shortage // 1))
    fitting = [n for n in range(accumulation + 1, batch_size + 1) if n >= wanted and batch_size % n == 0]
    if fitting and rows > 1:
        return (
            f"give accumulation={fitting[0]}: the same batch of {batch_size} in smaller parts; or a smaller batch_size"
        )
    return "give a smaller batch_size or image size"

"""What the parts of a training run say to one another: items, transforms, tasks, progress. Knows no Ray, no files.

A *transform* turns encoded images into arrays, on CPU threads of the worker or in Ray Data tasks: the same function of
(items, epoch), so that where it runs cannot change a pixel. A *task* turns a batch of those arrays into a loss; a
self-supervised method and a classifier are tasks. The loop of training.py knows these two and nothing else.

Example:
    >>> output = task.training_step(batch, Progress(step=0, num_steps=100, epoch=0, steps_per_epoch=10))
    >>> output.loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded image on its way into a batch.

    Attributes:
        id: SHA-256 of the bytes, hex: with seed and epoch it seeds every random choice about the image.
        data: The encoded bytes.
        targets: Class indices; empty when there is no label.
    """

    id: str
    data: bytes
    targets: tuple[int, ...] = ()


class Transform(Protocol):
    """Items to arrays: a pure function of (items, epoch), picklable, thread-safe."""

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        """Arrays whose first axis is the item. ``key`` is always there: uint64 (N,), see ``keys``."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands when a step begins.

    Attributes:
        step: Optimizer steps done.
        num_steps: Optimizer steps of the whole run.
        epoch: From 0.
        steps_per_epoch: Optimizer steps an epoch.
    """

    step: int
    num_steps: int
    epoch: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / max(1, self.num_steps)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a task says of one batch.

    Attributes:
        loss: Scalar, with its graph.
        logs: Numbers to report, by name; tensors are read only when they are shown.
        embedding: Detached backbone features, float (N, D), for probes and the collapse detector; None when absent.
    """

    loss: torch.Tensor
    logs: Mapping[str, Any] = field(default_factory=dict)
    embedding: torch.Tensor | None = None


class Task(Protocol):
    """What is trained: an nn.Module with these methods. Its state_dict is all that it must keep across a resume."""

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        """The loss of a batch (the transform's arrays as tensors on the task's device)."""

    def after_step(self, progress: Progress) -> None:
        """Called after every optimizer step, e.g. to move a teacher."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer: ``params``, and optionally ``lr_scale`` and ``weight_decay``."""


def keys(ids: Sequence[str]) -> np.ndarray:
    """The first 8 bytes of each id as uint64 (N,): what seeds random choices on a device."""
    import numpy as np

    return np.array([int(name[:16], 16) for name in ids], np.uint64)

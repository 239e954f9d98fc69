"""Several workers, one step: gradients averaged by DistributedDataParallel, decisions taken together.

Only torch.distributed, and only where somebody has initialised it (flows/train.py, torchrun): here nobody starts a
process. A decision that one rank alone takes would leave the others waiting in a collective for ever, so whether to
stop, to checkpoint, or to give up a diverged run is voted once a step, with the loss in the same small message.

Example:
    >>> step = wrap(task)
    >>> step(batch, progress).loss.backward()
    >>> votes = vote(Votes(loss=1.3), device)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from eagleray.learn.task import Progress, StepOutput, Task


@dataclass(frozen=True)
class Votes:
    """What one rank says of a step; of several, the sums.

    Attributes:
        loss: The rank's mean loss times its weight; together: the mean over the global batch times the world size.
        is_bad: Above 0: a loss is not finite.
        stops: Above 0: a rank was told to stop.
        saves: Above 0: a rank wants a checkpoint now.
        reports: Above 0: it is time for a report.
    """

    loss: float = 0.0
    is_bad: float = 0.0
    stops: float = 0.0
    saves: float = 0.0
    reports: float = 0.0


class StepModule(nn.Module):  # type: ignore[misc]
    """A task whose forward is its training step: what DistributedDataParallel can wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Mapping[str, Any], progress: Progress) -> StepOutput:
        """The loss of a batch."""
        return self.task.training_step(batch, progress)


def world_size() -> int:
    """Workers of the process group; 1 without one."""
    return torch.distributed.get_world_size() if _is_on() else 1


def rank() -> int:
    """This worker's number; 0 without a process group."""
    return torch.distributed.get_rank() if _is_on() else 0


def _is_on() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wrap(task: Task) -> nn.Module:
    """The task's step, with gradients averaged over the ranks where there are several.

    Parameters that take no gradient now are left out, so it is wrapped anew when that changes.
    """
    step = StepModule(task)
    if world_size() == 1:
        return step
    return nn.parallel.DistributedDataParallel(step)


def no_sync(step: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, backward adds up gradients on this rank only: for all but the last of accumulated batches."""
    if isinstance(step, nn.parallel.DistributedDataParallel):
        return step.no_sync()
    return contextlib.nullcontext()


def vote(own: Votes, device: torch.device) -> Votes:
    """The sums over all ranks: the same on each."""
    if world_size() == 1:
        return own
    counts = torch.tensor(astuple(own), dtype=torch.float64, device=device)
    if not counts[0].isfinite():
        counts[0] = 0.0  # a sum with a NaN says nothing of the others; is_bad says it
    torch.distributed.all_reduce(counts)
    return Votes(*counts.tolist())


def total(values: torch.Tensor) -> torch.Tensor:
    """The sums over all ranks: the same on each."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Gives every rank the running statistics of rank 0, which are those of its checkpoints."""
    if world_size() > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def trainable(task: nn.Module) -> tuple[bool, ...]:
    """Which parameters take a gradient, in order."""
    return tuple(parameter.requires_grad for parameter in task.parameters())

"""A loss that is not a number: the run stops, and what made it can be run again.

The folder that is left holds the batch as the task saw it and the task's state before the step, as safetensors, and
the place in the run as JSON: enough to compute the same loss in a debugger.

Example:
    >>> replay("runs/a/diverged-step-00000120-rank-0", task)
    tensor(nan)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from eagleray.core import storage
from eagleray.core.errors import TrainingDiverged
from eagleray.learn.state_trees import flatten, unflatten
from eagleray.learn.task import Progress, Task

HEAD, BATCH, TASK = "diverged.json", "batch.safetensors", "task.safetensors"


def keep_batch(
    home: Path, task: nn.Module, batch: Mapping[str, Any], progress: Progress, *, seed: int, rank: int
) -> Path:
    """Writes what is needed to run the step again.

    Args:
        home: The run's folder.
        task: In its state before the step.
        batch: As the task saw it.
        progress: Of the step.
        seed: What the generator was seeded with.
        rank: Of this worker.

    Returns:
        The folder.

    Raises:
        StorageError: The storage refuses.
    """
    from safetensors.torch import save

    folder = storage.make_folder(home / f"diverged-step-{progress.step:08d}-rank-{rank}")
    plain, tensors = flatten(dict(batch))
    state = {name: value.detach().cpu().clone().contiguous() for name, value in task.state_dict().items()}
    files = {BATCH: bytes(save(tensors)), TASK: bytes(save(state))}
    for name, data in files.items():
        storage.write_atomic(folder / name, data)
    ids = [f"{int(key):016x}" for key in batch["key"].tolist()] if "key" in batch else []
    storage.write_json(
        folder / HEAD,
        {
            "progress": asdict(progress),
            "seed": seed,
            "rank": rank,
            "batch": plain,
            "image_ids_start_with": ids,
            "files": {name: storage.sha256_bytes(data) for name, data in files.items()},
        },
    )
    return folder


def replay(folder: str | Path, task: nn.Module) -> torch.Tensor:
    """The loss of a kept batch, with the weights that it was kept with.

    Args:
        folder: What ``keep_batch`` wrote.
        task: Of the same making; its state is replaced.
    """
    from safetensors.torch import load

    folder = Path(folder)
    head = storage.read_json(folder / HEAD)
    task.load_state_dict(load((folder / TASK).read_bytes()))
    batch = unflatten(head["batch"], load((folder / BATCH).read_bytes()))
    task.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head["seed"])
        return cast(Task, task).training_step(batch, Progress(**head["progress"])).loss


def diverged(loss: float, progress: Progress, folder: Path | None) -> TrainingDiverged:
    """The error that says it, on the worker whose loss it is and on the others."""
    seen = f"the loss is {loss}" if not math.isfinite(loss) else "the loss of another worker is not finite"
    return TrainingDiverged(
        f"{seen} at step {progress.step} (epoch {progress.epoch})",
        expected="a finite loss",
        fix="lower the learning rate, lengthen the warm-up, or clip gradients"
        + (f"; the batch is kept in {folder} (learn.divergence.replay)" if folder else ""),
    )

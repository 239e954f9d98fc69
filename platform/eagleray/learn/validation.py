"""Accuracy on images that are held out, measured while a run goes on: for its curve, and to keep the best weights.

Measured are the weights as a bundle would have them (the average where one is kept), on images as they are scored.
Whole batches of one size are shared out among the workers, so that every image has the same neighbours, and so the same
answer, in any number of workers. A run that is stopped between the last step of an epoch and the measurement measures
when it goes on.

Example:
    >>> validation = Validation(index, EvalTransform(spec))
    >>> train(task, batches, settings, hooks=Hooks(validation=validation))
    >>> validation.best, validation.best_step
    (0.853, 120)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from eagleray.learn import parallel
from eagleray.learn.batch_tensors import on_device
from eagleray.learn.corpus_index import CorpusIndex
from eagleray.learn.feeding import Arrays, join_arrays, make_arrays, read_items
from eagleray.learn.task import Progress, Transform
from eagleray.vision.shard_images import ShardImages

METRIC = "val_accuracy"  # its name in metrics.jsonl, in checkpoints and on the page
CHUNK_IMAGES = 8  # that one thread decodes at a time


class Answering(Protocol):
    """A task that answers: what is measured."""

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float (N, C) of a batch as the transform makes it."""


class Validation:
    """Measures a task on held-out images.

    The share of images whose best class is right; of images with several labels, whose best class is one of them.

    Args:
        index: The images; each has a label.
        transform: Items to arrays, as they are scored.
        every_epochs: Epochs between measurements; the last step of the run has one always.
        keeps_best: Whether the best weights so far are to be checkpointed, and kept.
        batch_size: Images a batch, on each worker.
        num_threads: That decode.
    """

    def __init__(
        self,
        index: CorpusIndex,
        transform: Transform,
        *,
        every_epochs: int = 1,
        keeps_best: bool = False,
        batch_size: int = 64,
        num_threads: int = 1,
    ) -> None:
        self.index, self.keeps_best = index, keeps_best
        self._transform, self._every_epochs = transform, every_epochs
        self._batch_size, self._num_threads = batch_size, max(1, num_threads)
        self.step, self.value = 0, math.nan
        self.best_step, self.best = 0, -math.inf
        self._is_news = False

    def is_due(self, progress: Progress) -> bool:
        """Whether the weights of this moment are to be measured and have not been."""
        every = self._every_epochs * progress.steps_per_epoch
        is_end = progress.step == progress.num_steps or progress.step % every == 0
        return is_end and progress.step > self.step

    def measure(self, task: Answering, progress: Progress, device: torch.device) -> None:
        """Measures a task that is in eval mode; every worker calls it at the same step, and all get the same number.

        Raises:
            DataError: An image can no longer be decoded.
            ArtifactError: A shard has changed.
        """
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for arrays in self._arrays():
            batch = on_device(arrays, device)
            best = task.logits(batch).argmax(-1)
            is_right = batch["labels"].gather(1, best[:, None]) if "labels" in batch else best == batch["target"]
            counts += torch.stack([is_right.sum(), torch.tensor(len(best), device=device)])
        right, total = parallel.total(counts).tolist()
        self.step, self.value, self._is_news = progress.step, right / total, True
        if self.value > self.best:  # of equals the earliest
            self.best_step, self.best = self.step, self.value

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the weights of a step are the best so far, and to be kept."""
        return self.keeps_best and self.best_step == step > 0

    def figures(self) -> dict[str, float]:
        """What was measured since the last time."""
        found = {METRIC: self.value} if self._is_news else {}
        self._is_news = False
        return found

    def metrics(self, progress: Progress) -> dict[str, float]:
        """For the checkpoint of a step: its own figure, where it has one."""
        return {METRIC: self.value} if self.step == progress.step > 0 else {}

    def state_dict(self) -> dict[str, float]:
        """For ``load_state_dict``."""
        return {"step": self.step, "value": self.value, "best_step": self.best_step, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""
        self.step, self.value = int(state["step"]), float(state["value"])
        self.best_step, self.best = int(state["best_step"]), float(state["best"])

    def _arrays(self) -> Iterator[Arrays]:
        """This worker's batches; the next is decoded while one is answered."""
        positions, size = np.arange(len(self.index), dtype=np.int64), self._batch_size
        batches = [positions[first : first + size] for first in range(0, len(positions), size)]
        mine = batches[parallel.rank() :: parallel.world_size()]
        with ShardImages(self.index.root) as images, ThreadPoolExecutor(self._num_threads) as workers:

            def start(chosen: np.ndarray) -> list[Future[dict[str, np.ndarray]]]:
                items = read_items(images, self.index, chosen)
                chunks = [items[first : first + CHUNK_IMAGES] for first in range(0, len(items), CHUNK_IMAGES)]
                return [workers.submit(make_arrays, chunk, self._transform, 0) for chunk in chunks]

            waiting: list[Future[dict[str, np.ndarray]]] = []
            for chosen in [*mine, None]:
                ahead = [] if chosen is None else start(chosen)
                if waiting:
                    yield join_arrays([part.result() for part in waiting])
                waiting = ahead

"""Batches made by Ray Data: step descriptors in, arrays out, in the order of the steps.

The same ``read_items`` and ``make_arrays`` as in the worker (learn/feeding.py), run as tasks wherever the cluster has
CPUs: for GPUs whose own machine cannot decode fast enough. A descriptor is the places of a few images; index and
transform go once into the object store. Which image is in which step stays the plan's, so both forms give the same ids,
order and pixels (a test compares them).

Example:
    >>> for batch in RayBatches(work, Seat()).iterate(Position()): ...
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from eagleray.core.errors import ClusterError, EagleError
from eagleray.flows.pool import error_json, rebuild_error
from eagleray.flows.train_worker import Seat

if TYPE_CHECKING:
    from eagleray.learn.feeding import Batch
    from eagleray.learn.order import Position, Step
    from eagleray.learn.work import Work

CHUNK_IMAGES = 32  # of a task: some 50 ms of decoding and crops against some 2 ms that a task costs
MOST_ROWS = 2000  # of one dataset: its driver holds a row each; the next begins when they are used


def ray_batches(work: Work, seat: Seat) -> RayBatches:
    """The batches of a worker; for ``run_worker``."""
    return RayBatches(work, seat)


class RayBatches:
    """A ``BatchSource`` whose arrays Ray Data tasks make. Ray must be connected.

    Args:
        work: The run.
        seat: Of this worker.
    """

    def __init__(self, work: Work, seat: Seat) -> None:
        self._work, self._batches = work, work.batches(rank=seat.rank, world_size=seat.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._batches.steps_per_epoch

    def iterate(self, start: Position) -> Iterator[Batch]:
        """Batches from a position to the end of the run.

        Raises:
            DataError: An image can no longer be decoded.
            ArtifactError: A shard has changed.
            ClusterError: Ray lost the tasks.
        """
        import ray

        settings, per_epoch = self._work.settings, self.steps_per_epoch
        done = start.epoch * per_epoch + start.consumed // self._work.feed.batch_size
        plan = islice(self._batches.plan(start), (settings.max_steps or settings.epochs * per_epoch) - done)
        shared = ray.put((self._work.index, self._work.transform))
        while steps := _stretch(plan):
            yield from self._made(steps, shared)

    def _made(self, steps: Sequence[tuple[int, Step]], shared: Any) -> Iterator[Batch]:
        """The batches of some steps, by one dataset."""
        from ray.exceptions import RayError

        from eagleray.learn.feeding import Batch, join_arrays
        from eagleray.learn.order import Position

        chunks = [_chunks(step) for _, step in steps]
        rows = [
            {"epoch": epoch, "positions": chunk.tobytes()}
            for (epoch, _), parts in zip(steps, chunks, strict=True)
            for chunk in parts
        ]
        made = _run(rows, shared)
        try:
            for (epoch, step), parts in zip(steps, chunks, strict=True):
                arrays = join_arrays([_arrays(next(made)) for _ in parts])
                yield Batch(arrays, Position(epoch, step.consumed), epoch, step.num_images, step.weight)
        except RayError as error:
            cause = str(error).strip().splitlines()
            raise ClusterError(
                f"Ray lost the tasks that make batches: {cause[-1] if cause else type(error).__name__}",
                expected="tasks that run",
                fix="run the same command again: it resumes; or with data=worker",
            ) from error


def _stretch(plan: Iterator[tuple[int, Step]]) -> list[tuple[int, Step]]:
    """The next steps, of at most MOST_ROWS rows."""
    steps, rows = [], 0
    for epoch, step in plan:
        steps.append((epoch, step))
        rows += len(_chunks(step))
        if rows >= MOST_ROWS:
            break
    return steps


def _chunks(step: Step) -> list[np.ndarray]:
    positions = step.positions
    return [positions[first : first + CHUNK_IMAGES] for first in range(0, len(positions), CHUNK_IMAGES)]


def _run(rows: list[dict[str, Any]], shared: Any) -> Iterator[dict[str, Any]]:
    """Runs the tasks; rows come in order."""
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.enable_auto_log_stats = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        make_row, fn_kwargs={"shared": [shared]}, num_cpus=1
    )
    return iter(dataset.iter_rows())


def make_row(row: dict[str, Any], *, shared: list[Any]) -> dict[str, Any]:
    """One task: reads and transforms a few images. An error of ours is an answer, not a failed task."""
    import json

    from eagleray.learn.feeding import make_arrays, read_items

    (reference,) = shared
    index, transform, images = _opened(reference)
    try:
        items = read_items(images, index, np.frombuffer(row["positions"], np.int64))
        return {**make_arrays(items, transform, int(row["epoch"])), "error": ""}
    except EagleError as error:
        return {"error": json.dumps(error_json(error))}


@lru_cache(maxsize=2)
def _opened(reference: Any) -> tuple[Any, Any, Any]:
    """Index, transform and the corpus' open shards, once a process."""
    import ray

    from eagleray.vision.shard_images import ShardImages

    index, transform = ray.get(reference)
    return index, transform, ShardImages(index.root)


def _arrays(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a row, writable and off the object store; an error of ours is raised."""
    import json

    error = row.pop("error")
    if error:
        raise rebuild_error(json.loads(error))
    return {name: np.array(value) for name, value in row.items()}

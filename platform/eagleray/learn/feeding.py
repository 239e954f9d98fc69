"""Batches from a corpus: the order of order.py, image bytes read as they are needed, transformed on threads, ahead.

What a batch holds is a pure function of (index, transform, settings, place in the order): the same arrays whether they
are made here, with any number of threads, or in Ray Data tasks by the same ``read_items`` and ``make_arrays``.

Example:
    >>> batches = Batches(index, transform, FeedSettings(batch_size=256), rank=0, world_size=2)
    >>> for batch in batches.iterate(Position(epoch=3, consumed=512)):
    ...     batch.arrays["image"], batch.position
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field

from eagleray.core.config import Config
from eagleray.core.errors import DataError
from eagleray.learn.corpus_index import CorpusIndex, Ints
from eagleray.learn.order import WINDOW_SHARDS, Position, Step, check_world, epoch_order, steps, steps_in
from eagleray.learn.task import Item, Transform
from eagleray.vision.image_headers import ImageRefused
from eagleray.vision.shard_images import ShardImages

Arrays = Mapping[str, np.ndarray]
CHUNKS_A_THREAD = 2  # a slice is cut finer than the threads, so that one slow image does not hold all of them


class FeedSettings(Config):
    """How a corpus becomes batches.

    Attributes:
        batch_size: Images an optimizer step, over all workers and accumulations.
        seed: Of the order.
        window_shards: Shards whose images are mixed.
        keeps_last: Keep a short last batch of an epoch; else those images wait for the next epoch's order.
        num_threads: Threads that transform; 0: in the caller's thread, nothing ahead.
        prefetch: Batches made ahead.
    """

    batch_size: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    window_shards: int = Field(WINDOW_SHARDS, ge=1)
    keeps_last: bool = False
    num_threads: int = Field(2, ge=0)
    prefetch: int = Field(2, ge=1)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of one global batch.

    Attributes:
        arrays: Of the transform, and ``target`` int64 (n,): the first class index, -1 without a label.
        position: Where the data stands when the batch is used.
        epoch: The epoch that the batch belongs to.
        num_images: Images of the global batch.
        weight: What this rank's mean loss counts for (order.Step).
    """

    arrays: Arrays
    position: Position
    epoch: int
    num_images: int
    weight: float = 1.0


class BatchSource(Protocol):
    """What the loop of training.py feeds on: ``Batches`` here, or the same batches made elsewhere."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""

    def iterate(self, start: Position) -> Iterator[Batch]:
        """Batches from a position on, epoch after epoch, without end."""


class Batches:
    """The batches of one rank, made in this process.

    Args:
        index: The images.
        transform: Items to arrays.
        settings: See FeedSettings.
        rank: Of this worker.
        world_size: Workers.
        sampler: Epoch to repeats of each image (balance.BalancedSampler); None: each once.

    Raises:
        ConfigError: The batch does not divide among the workers.
        DataError: There are fewer images than a batch has.
    """

    def __init__(
        self,
        index: CorpusIndex,
        transform: Transform,
        settings: FeedSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        sampler: Callable[[int], Ints] | None = None,
    ) -> None:
        check_world(settings.batch_size, world_size)
        self.index, self.settings = index, settings
        self._transform, self._rank, self._world_size, self._sampler = transform, rank, world_size, sampler
        images = len(index) if sampler is None else int(sampler(0).sum())
        self._steps_per_epoch = steps_in(images, settings.batch_size, keeps_last=settings.keeps_last)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._steps_per_epoch

    def plan(self, start: Position) -> Iterator[tuple[int, Step]]:
        """(epoch, step) from a position on, without end: what ``iterate`` makes, as descriptors."""
        settings, epoch, consumed = self.settings, start.epoch, start.consumed
        while True:
            order = epoch_order(
                self.index,
                seed=settings.seed,
                epoch=epoch,
                window_shards=settings.window_shards,
                repeats=None if self._sampler is None else self._sampler(epoch),
            )
            for step in steps(
                order,
                settings.batch_size,
                rank=self._rank,
                world_size=self._world_size,
                start=consumed,
                keeps_last=settings.keeps_last,
            ):
                yield epoch, step
            epoch, consumed = epoch + 1, 0

    def iterate(self, start: Position) -> Iterator[Batch]:
        """Batches from a position on, epoch after epoch, without end.

        Raises:
            DataError: An image can no longer be decoded.
            ArtifactError: A shard has changed.
        """
        if self.settings.num_threads == 0:
            yield from self._one_by_one(start)
        else:
            yield from self._ahead(start)

    def _one_by_one(self, start: Position) -> Iterator[Batch]:
        with ShardImages(self.index.root) as images:
            for epoch, step in self.plan(start):
                items = read_items(images, self.index, step.positions)
                yield _batch(make_arrays(items, self._transform, epoch), epoch, step)

    def _ahead(self, start: Position) -> Iterator[Batch]:
        threads, plan = self.settings.num_threads, self.plan(start)
        # One thread reads and hands on, so that bytes come in order; the others decode, which releases the GIL
        with (
            ShardImages(self.index.root) as images,
            ThreadPoolExecutor(threads, "eagleray-transform") as workers,
            ThreadPoolExecutor(1, "eagleray-read") as reader,
        ):

            def make(epoch: int, step: Step) -> list[Future[Arrays]]:
                items = read_items(images, self.index, step.positions)
                size = max(1, -(-len(items) // (threads * CHUNKS_A_THREAD)))
                chunks = [items[first : first + size] for first in range(0, len(items), size)]
                return [workers.submit(make_arrays, chunk, self._transform, epoch) for chunk in chunks]

            waiting: deque[tuple[int, Step, Future[list[Future[Arrays]]]]] = deque()
            try:
                while True:
                    while len(waiting) <= self.settings.prefetch:
                        epoch, step = next(plan)
                        waiting.append((epoch, step, reader.submit(make, epoch, step)))
                    epoch, step, made = waiting.popleft()
                    yield _batch(join_arrays([part.result() for part in made.result()]), epoch, step)
            finally:
                reader.shutdown(cancel_futures=True)
                workers.shutdown(cancel_futures=True)


def read_items(images: ShardImages, index: CorpusIndex, positions: Ints) -> list[Item]:
    """The encoded images at some positions.

    Raises:
        ArtifactError: A shard is missing or no longer whole.
    """
    return [
        Item(
            id=index.id_of(position),
            data=images.read(index.shards[index.shard[position]], int(index.row[position])),
            targets=index.targets_of(position),
        )
        for position in positions.tolist()
    ]


def make_arrays(items: Sequence[Item], transform: Transform, epoch: int) -> dict[str, np.ndarray]:
    """The transform's arrays, and ``target`` int64 (n,) where it makes none: the first class index, -1 without one.

    Raises:
        DataError: An image can no longer be decoded; it is named.
    """
    try:
        arrays = dict(transform(items, epoch))
    except ImageRefused:
        for item in items:  # each alone, to name the one
            _try_one(item, transform, epoch)
        raise
    arrays.setdefault("target", np.array([item.targets[0] if item.targets else -1 for item in items], np.int64))
    return arrays


def _try_one(item: Item, transform: Transform, epoch: int) -> None:
    try:
        transform([item], epoch)
    except ImageRefused as error:
        raise DataError(
            f"image {item.id} of the corpus cannot be decoded: {error}",
            expected="images as they were validated when the corpus was made",
            fix="check the corpus: eagleray inspect CORPUS, or ingest again",
        ) from error


def join_arrays(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """The arrays of consecutive items as one."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batch(arrays: Arrays, epoch: int, step: Step) -> Batch:
    return Batch(arrays, Position(epoch, step.consumed), epoch, step.num_images, step.weight)

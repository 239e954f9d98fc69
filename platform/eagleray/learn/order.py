"""The order in which a run sees its images: a pure function of (index, seed, epoch), whatever the number of workers.

Shards come in a permuted order, a window of a few shards at a time, the images of a window permuted. Global step s is
``order[s * B : (s + 1) * B]`` and rank r of W takes its contiguous slice, so every world size sees the same global
batches and "images consumed in this epoch" is all that a checkpoint must keep. Permutations are sorts by a hash of
(seed, epoch, image id), not draws of a library's generator: the same on every machine and version.

Example:
    >>> order = epoch_order(index, seed=0, epoch=3)
    >>> [step.positions for step in steps(order, 256, rank=1, world_size=2)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eagleray.core.errors import ConfigError, DataError
from eagleray.learn.corpus_index import CorpusIndex, Ints

WINDOW_SHARDS = 4  # 4 shards of 64 MiB (the ingest's default): what a page cache holds, and some 2,000 photos mixed


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands in its data.

    Attributes:
        epoch: From 0.
        consumed: Images of this epoch's order that have been used.
    """

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of one global batch, as positions of the index.

    Attributes:
        positions: int64 (n,) of the index; never empty.
        consumed: Images of the epoch used when the step is done, over all ranks.
        num_images: Images of the global batch.
        weight: What this rank's mean loss counts for, so that the mean over ranks is the mean over the global batch:
            1 but for a short last batch that does not divide; 0 where a rank only keeps the others company.
    """

    positions: Ints
    consumed: int
    num_images: int
    weight: float = 1.0


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective hash of uint64. Source: SplitMix64 (Steele, Lea, Flood 2014), its output function."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mixed(*numbers: int) -> int:
    """One number of several, below 2 ** 63: a seed that belongs to all of them."""
    value = np.zeros(1, np.uint64)
    for number in numbers:
        value = mix64(value ^ np.uint64(number))
    return int(value[0] >> np.uint64(1))


def epoch_order(
    index: CorpusIndex, *, seed: int, epoch: int, window_shards: int = WINDOW_SHARDS, repeats: Ints | None = None
) -> Ints:
    """The positions of an epoch in order.

    Args:
        index: The images.
        seed: Of the run.
        epoch: From 0.
        window_shards: Shards whose images are mixed.
        repeats: int64 (N,): how often each image comes (balance.py); None: once.

    Returns:
        int64 (N,), or as many as the repeats sum to.
    """
    salt = mix64(mix64(np.array([seed], np.uint64)) ^ np.uint64(epoch))
    draws = mix64(np.arange(len(index.shards), dtype=np.uint64) ^ mix64(salt))
    place = np.empty(len(index.shards), np.int64)
    present = np.unique(index.shard)
    place[present[np.argsort(draws[present], kind="stable")]] = np.arange(len(present))
    positions = np.arange(len(index), dtype=np.int64)
    points = mix64(index.keys ^ salt)
    if repeats is not None:
        starts = np.concatenate([[0], np.cumsum(repeats)[:-1]])
        positions = np.repeat(positions, repeats)
        copies = np.arange(len(positions)) - np.repeat(starts, repeats)
        points = mix64(points[positions] + copies.astype(np.uint64))
    window = place[index.shard[positions]] // window_shards
    return positions[np.lexsort((points, window))]


def steps_in(num_images: int, batch_size: int, *, keeps_last: bool = False) -> int:
    """Steps of an epoch.

    Raises:
        DataError: There are fewer images than a batch has.
    """
    count = -(-num_images // batch_size) if keeps_last else num_images // batch_size
    if count == 0:
        raise DataError(
            f"{num_images} images, batches of {batch_size}",
            expected="at least one batch an epoch",
            fix="give a smaller batch_size, or more images",
        )
    return count


def check_world(batch_size: int, world_size: int, accumulation: int = 1) -> None:
    """Refuses a batch that does not divide.

    Raises:
        ConfigError: It does not; the message names the nearest that would.
    """
    parts = world_size * accumulation
    if batch_size % parts:
        near = max(parts, round(batch_size / parts) * parts)
        raise ConfigError(
            f"a batch of {batch_size} images does not divide among {world_size} workers x {accumulation} accumulations",
            expected=f"a multiple of {parts}, e.g. {near}",
            fix=f"give batch_size={near}, or other workers",
        )


def steps(
    order: Ints, batch_size: int, *, rank: int = 0, world_size: int = 1, start: int = 0, keeps_last: bool = False
) -> Iterator[Step]:
    """One rank's steps of one epoch: plain descriptors, from which a batch can be made anywhere.

    Args:
        order: Of the epoch.
        batch_size: Images of a global batch.
        rank: Of this worker.
        world_size: Workers.
        start: Images of the epoch that are used already.
        keeps_last: Keep a short last batch.
    """
    for first in range(start, len(order), batch_size):
        batch = order[first : first + batch_size]
        count = len(batch)
        if count < batch_size and not keeps_last:
            return
        low, high = count * rank // world_size, count * (rank + 1) // world_size
        consumed, weight = first + count, (high - low) * world_size / count
        yield Step(batch[low:high] if high > low else batch[:1], consumed, count, weight)

"""Stratified division of images, or of groups of them, so that every class is shared out as the fractions say.

One greedy rule for single labels, several labels and groups: the class with the fewest images left goes first; each of
its bags goes to the part that lacks that class most. Of single-labelled images without groups, every part gets its
share of every class to within one image. The order among equals comes from hash points, so it is the same everywhere.

Source: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, ECML PKDD 2011, algorithm 1;
extended to bags of images (a group counts with all of its labels).

Example:
    >>> stratify(Bags(np.arange(4), np.arange(4), np.array([0, 0, 1, 1]), 2), points, (0.5, 0.5))
    array([0, 1, 1, 0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bags:
    """What is to be divided: bags of images that stay together.

    Attributes:
        bag_of: int64 (N,): the bag of each image, 0..G-1.
        images: int64 (M,): the image of each label.
        classes: int64 (M,): its class.
        num_classes: C.
    """

    bag_of: Int64
    images: Int64
    classes: Int64
    num_classes: int

    def contents(self) -> list[list[tuple[int, int]]]:
        """(class, images of it) of each bag."""
        pairs, counts = np.unique(
            np.stack([self.bag_of[self.images], self.classes], axis=1), axis=0, return_counts=True
        )
        held: list[list[tuple[int, int]]] = [[] for _ in range(int(self.bag_of.max(initial=-1)) + 1)]
        for (bag, label), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            held[bag].append((label, count))
        return held


def stratify(bags: Bags, points: npt.NDArray[np.float64], shares: Sequence[float]) -> Int64:
    """Divides bags.

    Args:
        bags: G bags.
        points: float64 (G,): settles the order among equals.
        shares: Of each part; they sum to 1.

    Returns:
        int64 (G,): the part of each bag.
    """
    contents = bags.contents()
    sizes = np.bincount(bags.bag_of, minlength=len(contents)).tolist()
    left = np.bincount(bags.classes, minlength=bags.num_classes).astype(np.int64)
    wanted = [[share * count for share in shares] for count in left.tolist()]
    room = [share * len(bags.bag_of) for share in shares]
    holders: list[list[tuple[int, float, int]]] = [[] for _ in range(bags.num_classes)]
    for bag, held in enumerate(contents):
        for label, count in held:
            holders[label].append((-count, float(points[bag]), bag))
    parts = np.full(len(contents), -1, np.int64)
    usable = [part for part, share in enumerate(shares) if share > 0]

    def put(bag: int, want: list[float]) -> None:
        part = max(usable, key=lambda p: (want[p], room[p], -p))
        parts[bag] = part
        room[part] -= sizes[bag]
        for label, count in contents[bag]:
            wanted[label][part] -= count
            left[label] -= count

    while (left > 0).any():
        rarest = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        for _, _, bag in sorted(holders[rarest]):
            if parts[bag] < 0:
                put(bag, wanted[rarest])
    for bag in sorted(np.flatnonzero(parts < 0).tolist(), key=lambda b: (-sizes[b], points[b])):
        put(bag, room)
    return parts

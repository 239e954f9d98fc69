"""A piece of a split, held out of it: to validate on while the rest is trained on.

Example:
    >>> held = piece(index, splits, splits.mask("train"), 0.1)
    >>> rest = splits.mask("train") & ~held
"""

from __future__ import annotations

import numpy as np

from eagleray.vision.splits import Bool, CorpusIndex, Splits, hash_points
from eagleray.vision.stratification import Bags, stratify


def piece(index: CorpusIndex, splits: Splits, mask: Bool, share: float) -> Bool:
    """bool (N,): a share of some images, of every class alike, no group divided; the same wherever it is asked for.

    Args:
        index: Of N images.
        splits: Of the same; its groups stay together, its rule's seed is another draw.
        mask: bool (N,): of which images.
        share: 0 to 1.
    """
    labels, found = index.labels, np.zeros(len(mask), bool)
    at, is_in = np.flatnonzero(mask), mask[index.labels.images]
    bag_of = np.unique(splits.groups[at], return_inverse=True)[1].astype(np.int64)
    place = np.cumsum(mask) - 1
    bags = Bags(bag_of, place[labels.images[is_in]], labels.classes[is_in], len(labels.names))
    points = np.ones(int(bag_of.max(initial=-1)) + 1)  # of each bag: that of its first image in the order of hashes
    np.minimum.at(points, bag_of, hash_points([f"piece:{index.ids[one].decode()}" for one in at], splits.rule.seed))
    found[at] = stratify(bags, points, (1 - share, share))[bag_of] == 1
    return found

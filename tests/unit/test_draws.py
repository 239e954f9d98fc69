"""Random numbers belong to an image: they do not know the batch, and they are uniform and independent."""

from __future__ import annotations

import numpy as np
from eagleray.learn.draws import uniforms

KEYS = np.random.default_rng(0).integers(0, 2**63, 4_000, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def test_an_image_draws_the_same_alone_and_in_any_order() -> None:
    together = uniforms(seed=3, epoch=5, keys=KEYS[:50], streams=[0, 1, 7], count=6)
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(
        uniforms(seed=3, epoch=5, keys=KEYS[order], streams=[7, 0], count=6), together[order][:, [2, 0]]
    )
    np.testing.assert_array_equal(
        uniforms(seed=3, epoch=5, keys=KEYS[9:10], streams=[1], count=2)[0, 0], together[9, 1, :2]
    )


def test_a_number_of_today_is_that_of_tomorrow() -> None:
    """A resume with a later version must see the same views: the hash is a format."""
    found = uniforms(seed=1, epoch=2, keys=np.array([3], np.uint64), streams=[4], count=2)[0, 0]
    assert found.tolist() == [0.6512433656512819, 0.5640520354118461]


def test_seed_epoch_image_and_stream_each_change_all_numbers() -> None:
    base = uniforms(seed=0, epoch=0, keys=KEYS[:100], streams=[0], count=8)
    for others in (
        uniforms(seed=1, epoch=0, keys=KEYS[:100], streams=[0], count=8),
        uniforms(seed=-1, epoch=0, keys=KEYS[:100], streams=[0], count=8),
        uniforms(seed=0, epoch=1, keys=KEYS[:100], streams=[0], count=8),
        uniforms(seed=0, epoch=0, keys=KEYS[:100] + np.uint64(1), streams=[0], count=8),
        uniforms(seed=0, epoch=0, keys=KEYS[:100], streams=[1], count=8),
    ):
        assert (others != base).all()
        # 1 / sqrt(800) is 0.035; six times that is out of reach of chance
        assert abs(np.corrcoef(base.ravel(), others.ravel())[0, 1]) < 0.2


def test_numbers_are_uniform_and_independent_of_one_another() -> None:
    """Of 32,000 numbers: mean within 5 standard errors of 1/2, each of 16 cells within 5 of its share."""
    for keys in (KEYS, np.arange(4_000, dtype=np.uint64)):  # keys that follow one another too
        numbers = uniforms(seed=0, epoch=0, keys=keys, streams=[0, 1], count=4)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 5 * np.sqrt(1 / 12 / numbers.size)
        cells = np.histogram(numbers, 16, (0, 1))[0] / numbers.size
        np.testing.assert_allclose(cells, 1 / 16, atol=5 * np.sqrt(1 / 16 / numbers.size))
        mixed = np.corrcoef(numbers.reshape(len(keys), -1).T) - np.eye(8)
        assert np.abs(mixed).max() < 5 / np.sqrt(len(keys))

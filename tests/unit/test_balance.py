"""Balance and mixing against slow formulas, torch and timm."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from eagleray.core.errors import DataError
from eagleray.learn.balance import (
    BalancedSampler,
    class_weights,
    positive_weights,
    prior_logits,
    soft_binary_cross_entropy,
    soft_cross_entropy,
)
from eagleray.learn.mixing import MixSettings, cut_box, mix, soft_labels, soft_targets
from eagleray.learn.supervision import ClassificationLoss, ClassificationSettings
from eagleray.vision.torchvision_guard import ensure_importable
from torch.nn import functional

ensure_importable()
from timm.data import Mixup  # noqa: E402  torchvision must be importable first
from timm.data.mixup import mixup_target, rand_bbox  # noqa: E402

COUNTS = np.array([50, 5, 0, 20])
TARGETS = np.repeat(np.arange(4), COUNTS)


def drawn(seed: int = 0, num: int = 12, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator) * 3, torch.randint(0, width, (num,), generator=generator)


# Weights


@pytest.mark.parametrize("rule", ["inverse", "effective"])
def test_weights_are_one_on_average_and_none_without_images(rule: str) -> None:
    weights = class_weights(COUNTS, rule=rule)  # type: ignore[arg-type]
    assert (weights * COUNTS).sum() / COUNTS.sum() == pytest.approx(1)
    assert weights[2] == 0
    assert weights[1] > weights[3] > weights[0] > 0


def test_inverse_weights_make_classes_weigh_alike() -> None:
    assert (class_weights(COUNTS) * COUNTS)[[0, 1, 3]] == pytest.approx([25, 25, 25])


def test_effective_numbers_are_those_of_the_paper() -> None:
    weights = class_weights(COUNTS, rule="effective", beta=0.9)
    assert weights[1] / weights[0] == pytest.approx(((1 - 0.9**50) / (1 - 0.9**5)), rel=1e-5)


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match="no image has a label"):
        class_weights(np.zeros(3, np.int64))
    with pytest.raises(DataError, match="no image has a label"):
        BalancedSampler(np.full(4, -1))(0)


# The sampler


def test_a_balanced_epoch_has_every_class_alike_and_its_length() -> None:
    targets = np.concatenate([TARGETS, [-1, -1]])
    repeats = BalancedSampler(targets, seed=1)(0)
    assert repeats.sum() == 75
    assert [int(repeats[targets == label].sum()) for label in (0, 1, 3, -1)] == [25, 25, 25, 0]
    for label in (0, 1, 3):  # no image comes twice before all came once
        assert repeats[targets == label].max() - repeats[targets == label].min() <= 1


def test_which_images_come_is_drawn_anew_each_epoch_and_the_same_again() -> None:
    sampler = BalancedSampler(TARGETS, seed=1)
    assert (sampler(3) == sampler(3)).all()
    assert (sampler(3) != sampler(4)).any()
    assert (BalancedSampler(TARGETS, seed=2)(3) != sampler(3)).any()
    seen = sum(sampler(epoch)[:50] for epoch in range(200))
    assert abs(seen / 200 - 0.5).max() < 0.18  # binomial with n = 200: five standard deviations


def test_a_strength_between_mixes_the_shares() -> None:
    repeats = BalancedSampler(TARGETS, strength=0.5)(0)
    assert [int(repeats[label == TARGETS].sum()) for label in (0, 1, 3)] == [38, 15, 22]
    assert (BalancedSampler(TARGETS, strength=0.0)(0) == 1).all()


# Losses


def test_without_focus_the_losses_are_torchs() -> None:
    logits, target = drawn()
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
    soft = soft_targets(target, 4, smoothing=0.1)
    ours = soft_cross_entropy(logits, soft)
    assert ours == pytest.approx(float(functional.cross_entropy(logits, target, label_smoothing=0.1)), rel=1e-6)
    ours = soft_cross_entropy(logits, soft, weight=weight)
    assert ours == pytest.approx(float(functional.cross_entropy(logits, soft, weight=weight)), rel=1e-6)
    labels = (logits > 0).float()
    ours = soft_binary_cross_entropy(logits, labels, weight=weight)
    oracle = functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
    assert ours == pytest.approx(float(oracle), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_losses_are_those_of_the_paper(gamma: float) -> None:
    """FL(p_t) = -(1 - p_t)^gamma log p_t. Source: Lin et al. 2017, equation 4."""
    logits, target = drawn()
    p_t = logits.softmax(1)[torch.arange(12), target]
    oracle = (-((1 - p_t) ** gamma) * p_t.log()).mean()
    torch.testing.assert_close(soft_cross_entropy(logits, soft_targets(target, 4), gamma=gamma), oracle)
    labels = functional.one_hot(target, 4).float()
    p = logits.sigmoid()
    p_t = torch.where(labels > 0, p, 1 - p)
    oracle = (-((1 - p_t) ** gamma) * p_t.log()).mean()
    torch.testing.assert_close(soft_binary_cross_entropy(logits, labels, gamma=gamma), oracle)


def test_the_weighted_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    """So the gradient is the same however a batch is cut among workers; torch's own weighted mean is not."""
    logits, target = drawn()
    loss = ClassificationLoss(ClassificationSettings(balance="weights"), class_counts=np.array([5, 9, 2, 7]))
    targets = loss.targets({"target": target})
    parts = [loss(logits[part], targets[part]) for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(loss(logits, targets), sum(parts) / 2)


def test_adjusted_logits_add_the_prior_in_training() -> None:
    prior = prior_logits(np.array([8, 2]))
    assert prior == pytest.approx([np.log(0.8), np.log(0.2)])
    logits, target = drawn(width=2)
    loss = ClassificationLoss(ClassificationSettings(balance="logits"), class_counts=np.array([8, 2]))
    oracle = functional.cross_entropy(logits + torch.from_numpy(prior), target)
    torch.testing.assert_close(loss(logits, loss.targets({"target": target})), oracle)


def test_positive_weights_are_negatives_over_positives() -> None:
    assert positive_weights(np.array([25, 75, 0, 1]), 100).tolist() == pytest.approx([3, 1 / 3, 1, 99])


def test_a_balance_for_one_label_is_refused_for_several() -> None:
    with pytest.raises(ValueError, match="balance=sampler is for one label"):
        ClassificationSettings(is_multi_label=True, balance="sampler")


# Mixing


class Fixed:
    """A generator that gives what it is told."""

    def __init__(self, share: float, at: tuple[int, int] = (3, 5)) -> None:
        self._share, self._at = share, list(at)

    def random(self) -> float:
        return 0.0

    def beta(self, a: float, b: float) -> float:
        return self._share

    def integers(self, high: int) -> int:
        return self._at.pop(0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_timms_for_the_same_numbers(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(6, 3, 8, 12, generator=generator), torch.randint(0, 4, (6,), generator=generator)
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{kind}_alpha": 0.7}
    ours = mix(x, soft_targets(target, 4, smoothing=0.1), MixSettings(**alphas), Fixed(0.6))  # type: ignore[arg-type]
    timms = Mixup(**alphas, label_smoothing=0.1, num_classes=4)
    with (
        mock.patch("numpy.random.rand", return_value=0.0),
        mock.patch("numpy.random.beta", return_value=0.6),
        mock.patch("numpy.random.randint", side_effect=[3, 5]),
    ):
        oracle = timms(x.clone(), target)
    for one, other in zip(ours, oracle, strict=True):
        torch.testing.assert_close(one, other)


def test_boxes_are_timms() -> None:
    for share, y, x in ((0.0, 0, 0), (0.3, 7, 2), (0.95, 4, 11), (1.0, 3, 3)):
        with mock.patch("numpy.random.randint", side_effect=[y, x]):
            assert cut_box(8, 12, share, y, x) == tuple(int(edge) for edge in rand_bbox((3, 8, 12), share))


def test_targets_are_timms() -> None:
    target = torch.tensor([0, 2, 1, 3])
    torch.testing.assert_close(soft_targets(target, 4, smoothing=0.2), mixup_target(target, 4, smoothing=0.2))
    dense = torch.tensor([[1, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(
        soft_labels(dense, smoothing=0.2), mixup_target(dense, 3, smoothing=0.2, multi_label=True)
    )


def test_mixing_repeats_for_a_seed_and_leaves_a_batch_alone_at_its_probability() -> None:
    x, targets = torch.randn(5, 3, 8, 8), soft_targets(torch.tensor([0, 1, 0, 1, 1]), 2)
    settings = MixSettings(mixup_alpha=0.4, cutmix_alpha=1.0)
    first, again, other = (mix(x, targets, settings, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    never = settings.model_copy(update={"probability": 0.0})
    assert mix(x, targets, never, np.random.default_rng(0))[0] is x

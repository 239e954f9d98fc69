"""Probes tell what slow, obvious ones tell, take no image's own word for it, and give no gradient back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from eagleray.core.errors import DataError
from eagleray.learn.selfsup.probes import UNLABELLED, KnnProbe, LinearProbe, knn_leave_one_out, weighted_knn
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize

CLASSES = 4


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Real handwritten digits as 64 numbers each, with their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target)


def slow_leave_one_out(embeddings: torch.Tensor, labels: torch.Tensor, k: int, temperature: float) -> list[int]:
    unit = normalize(embeddings.double(), dim=1)
    told = []
    for query in range(len(unit)):
        others = sorted(((float(unit[query] @ unit[o]), o) for o in range(len(unit)) if o != query), reverse=True)
        votes: dict[int, float] = {}
        for similarity, other in others[:k]:
            votes[int(labels[other])] = votes.get(int(labels[other]), 0) + math.exp(similarity / temperature)
        told.append(max(votes, key=lambda label: votes[label]))
    return told


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_leave_one_out_is_the_slow_one(k: int, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    embeddings, labels = digits[0][:150], digits[1][:150]
    assert knn_leave_one_out(embeddings, labels, k, 0.07).tolist() == slow_leave_one_out(embeddings, labels, k, 0.07)


def test_leave_one_out_in_pieces_is_the_whole(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, labels = digits[0][:333], digits[1][:333]
    whole = knn_leave_one_out(embeddings, labels)
    monkeypatch.setattr("eagleray.learn.selfsup.probes.ROWS", 100)
    assert torch.equal(knn_leave_one_out(embeddings, labels), whole)


def test_digits_are_told_by_their_pixels(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert (knn_leave_one_out(*digits) == digits[1]).float().mean() > 0.98


def test_votes_order_classes_as_lightly_does(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    from eagleray.vision.torchvision_guard import ensure_importable

    ensure_importable()
    from lightly.utils.benchmarking.knn import knn_predict

    unit = normalize(digits[0], dim=1)
    bank, queries, labels = unit[:1000], unit[1000:1200], digits[1][:1000]
    votes = weighted_knn(queries @ bank.T, labels, num_classes=10, k=20, temperature=0.07)
    theirs = knn_predict(queries, bank.T, labels, num_classes=10, knn_k=20, knn_t=0.07)
    assert torch.equal(votes.argmax(1), theirs[:, 0])


def test_a_cold_temperature_does_not_overflow() -> None:
    votes = weighted_knn(torch.tensor([[1.0, 0.9]]), torch.tensor([1, 0]), num_classes=2, k=2, temperature=0.001)
    assert torch.isfinite(votes).all()
    assert votes.argmax() == 1


@pytest.mark.parametrize(
    ("rows", "labels"), [(1, [0]), (3, [0, 1]), (3, [0, -1, 1])], ids=["one image", "too few labels", "no label"]
)
def test_leave_one_out_refuses(rows: int, labels: list[int]) -> None:
    with pytest.raises(DataError, match=f"{rows} embeddings"):
        knn_leave_one_out(torch.ones(rows, 2), torch.tensor(labels))


def clusters(count: int, *, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings around one corner a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return torch.eye(CLASSES, 8)[labels] + noise * torch.randn(count, 8, generator=generator), labels


class TestKnnProbe:
    def test_it_says_nothing_until_it_has_neighbours(self) -> None:
        probe = KnnProbe(8, num_classes=CLASSES, k=20)
        assert probe.observe(*clusters(16, seed=0)) is None
        assert probe.observe(*clusters(16, seed=1)) is None
        right = probe.observe(*clusters(16, seed=2))
        assert right is not None
        assert right.float().mean() > 0.8

    def test_a_random_bank_is_at_chance(self) -> None:
        probe = KnnProbe(8, num_classes=CLASSES, k=5)
        generator = torch.Generator().manual_seed(5)
        told = []
        for _ in range(40):
            labels = torch.randint(0, CLASSES, (50,), generator=generator)
            right = probe.observe(torch.randn(50, 8, generator=generator), labels)
            told += [right] if right is not None else []
        assert abs(torch.cat(told).float().mean() - 1 / CLASSES) < 0.05  # 1,950 trials: one sigma is 0.01

    def test_an_image_has_no_vote_on_itself(self) -> None:
        """Random features, seen again and again: with its own vote each image would be told right."""
        generator = torch.Generator().manual_seed(6)
        embeddings = torch.randn(200, 8, generator=generator)
        labels = torch.randint(0, CLASSES, (200,), generator=generator)
        keys = torch.arange(200).to(torch.uint64)
        told = {}
        for name, with_keys in (("keys", True), ("none", False)):
            probe = KnnProbe(8, num_classes=CLASSES, k=1, size=400)
            for _ in range(3):
                right = probe.observe(embeddings, labels, keys if with_keys else None)
            assert right is not None
            told[name] = right.float().mean()
        assert told["none"] == 1
        assert told["keys"] < 0.45

    def test_images_without_a_label_neither_vote_nor_count(self) -> None:
        probe = KnnProbe(8, num_classes=CLASSES, k=2)
        embeddings, labels = clusters(10, seed=0)
        labels[5:] = UNLABELLED
        probe.observe(embeddings, labels)
        assert int(probe.seen) == 5
        right = probe.observe(embeddings, labels)
        assert right is not None
        assert len(right) == 5
        assert probe.observe(embeddings, torch.full((10,), UNLABELLED)) is None

    def test_the_oldest_go_first(self) -> None:
        probe = KnnProbe(8, num_classes=CLASSES, k=1, size=10)
        for seed in range(4):
            embeddings, labels = clusters(6, seed=seed)
            probe.observe(embeddings, labels)
        last = torch.cat([normalize(clusters(6, seed=seed)[0], dim=1) for seed in range(4)])[-10:]
        assert sorted(map(tuple, probe.bank.tolist())) == sorted(map(tuple, last.tolist()))
        probe.observe(*clusters(25, seed=9))  # more than it holds
        assert sorted(map(tuple, probe.bank.tolist())) == sorted(
            map(tuple, normalize(clusters(25, seed=9)[0], dim=1)[-10:].tolist())
        )


class TestLinearProbe:
    def test_its_step_is_that_of_autograd(self) -> None:
        probe = LinearProbe(8, num_classes=CLASSES, learning_rate=0.5, momentum=0.9)
        reference = torch.nn.Linear(8, CLASSES)
        torch.nn.init.zeros_(reference.weight)
        torch.nn.init.zeros_(reference.bias)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
        norm = torch.nn.BatchNorm1d(8, affine=False)
        for seed in range(5):
            embeddings, labels = clusters(32, seed=seed)
            probe.observe(embeddings, labels)
            optimizer.zero_grad()
            cross_entropy(reference(norm(embeddings)), labels).backward()
            optimizer.step()
        torch.testing.assert_close(probe.weight[:, :-1], reference.weight.data)
        torch.testing.assert_close(probe.weight[:, -1], reference.bias.data)

    def test_it_learns_and_gives_no_gradient_back(self) -> None:
        probe = LinearProbe(8, num_classes=CLASSES)
        for seed in range(30):
            embeddings, labels = clusters(64, seed=seed)
            embeddings.requires_grad_()
            right = probe.observe(embeddings, labels)
        assert right is not None
        assert right.float().mean() > 0.9
        assert not probe(embeddings).requires_grad
        assert not list(probe.parameters())

    def test_scale_of_the_features_does_not_matter(self) -> None:
        told = []
        for scale in (1.0, 100.0):
            probe = LinearProbe(8, num_classes=CLASSES)
            for seed in range(10):
                embeddings, labels = clusters(64, seed=seed)
                probe.observe(embeddings * scale, labels)
            told.append(probe.weight.clone())
        torch.testing.assert_close(told[0], told[1], rtol=1e-3, atol=1e-4)  # the norm's epsilon beside its variance

    def test_too_few_labels_change_nothing(self) -> None:
        probe = LinearProbe(8, num_classes=CLASSES)
        embeddings, labels = clusters(8, seed=0)
        labels[1:] = UNLABELLED
        assert probe.observe(embeddings, labels) is None
        assert not probe.weight.any()
        assert int(probe.norm.num_batches_tracked) == 0


def test_probes_go_on_from_their_state(tmp_path: Path) -> None:
    for kind in (KnnProbe, LinearProbe):
        first, second = (kind(8, num_classes=CLASSES) for _ in range(2))
        for seed in range(3):
            first.observe(*clusters(32, seed=seed))
        save_file(first.state_dict(), tmp_path / "probe.safetensors")
        second.load_state_dict(load_file(tmp_path / "probe.safetensors"))
        answers = [probe.observe(*clusters(32, seed=9)) for probe in (first, second)]
        assert torch.equal(answers[0], answers[1])
        assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())

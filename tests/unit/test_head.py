"""Heads on features: scikit-learn's answer, and the model that they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from eagleray.core.errors import CapabilityError, DataError
from eagleray.core.storage import sha256_bytes
from eagleray.flows import score
from eagleray.infer.export import export_onnx
from eagleray.learn.classification import HeadTask
from eagleray.learn.corpus_index import build_index
from eagleray.learn.features import ArrayBatches, read_features
from eagleray.learn.feeding import FeedSettings
from eagleray.learn.head import HeadSettings, fit_head, make_folds, put_head
from eagleray.learn.optimization import OptimizerSettings
from eagleray.learn.supervision import ClassificationSettings
from eagleray.learn.training import TrainSettings, train
from eagleray.vision import backbones, images
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle, save_bundle
from eagleray.vision.corpus import ShardManifest, open_corpus
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import to_safetensors
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from tests.source_makers import ingest_here, make_folder

__all__ = ["ingest_here"]
ONE = HeadSettings(c_values=(0.1,))


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real handwritten digits: 64 pixels as features, some of them constant; 10 classes."""
    x, y = load_digits(return_X_y=True)
    return x, y.astype(np.int64)


def test_one_label_is_scikit_learns_answer(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits[0][:900], digits[1][:900]
    head = fit_head(x, y, ONE, num_classes=10)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=0.1, max_iter=2000, tol=1e-8).fit(scaler.transform(x), y)
    shown = head.logits(digits[0][900:])
    theirs = oracle.decision_function(scaler.transform(digits[0][900:]))
    # softmax leaves a constant per row free; both stop within 1e-4 of the minimum
    centred = shown - shown.mean(1, keepdims=True)
    np.testing.assert_allclose(centred, theirs - theirs.mean(1, keepdims=True), atol=1e-3)
    assert (shown.argmax(1) == digits[1][900:]).mean() > 0.9


def test_a_balanced_head_is_scikit_learns_balanced_one(digits: tuple[np.ndarray, np.ndarray]) -> None:
    keep = np.flatnonzero((digits[1] != 3) | (np.arange(len(digits[1])) % 7 == 0))[:700]
    x, y = digits[0][keep], digits[1][keep]
    head = fit_head(x, y, ONE.model_copy(update={"is_balanced": True}), num_classes=10)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=0.1, max_iter=2000, tol=1e-8, class_weight="balanced").fit(scaler.transform(x), y)
    shown, theirs = head.logits(x), oracle.decision_function(scaler.transform(x))
    np.testing.assert_allclose(shown - shown.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-3)


def test_several_labels_are_one_against_the_rest(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits[0][:600], digits[1][:600]
    labels = np.stack([y % 2 == 0, y > 4, y == 0], 1).astype(np.uint8)
    head = fit_head(x, labels, ONE, num_classes=3)
    scaler = StandardScaler().fit(x)
    oracle = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=2000, tol=1e-8)).fit(scaler.transform(x), labels)
    np.testing.assert_allclose(head.logits(x), oracle.decision_function(scaler.transform(x)), atol=1e-3)


def test_c_is_chosen_by_what_was_held_out(digits: tuple[np.ndarray, np.ndarray]) -> None:
    generator = np.random.default_rng(0)
    x, y = digits[0][:300] + generator.normal(0, 8, (300, 64)), digits[1][:300]
    head = fit_head(x, y, HeadSettings(c_values=(0.0001, 0.01, 100.0)), num_classes=10)
    assert head.c == 0.01  # neither blind nor learning the noise by heart
    assert max(head.scores, key=head.scores.__getitem__) == 0.01
    assert all(0 <= score <= 1 for score in head.scores.values())


def test_folds_are_stratified_and_groups_do_not_straddle() -> None:
    targets = np.repeat([0, 1, 2], [50, 11, 5])
    folds = make_folds(targets, 5, seed=1)
    counts = np.array([np.bincount(folds[targets == label], minlength=5) for label in range(3)])
    assert (counts.max(1) - counts.min(1)).max() <= 1
    groups = [f"site-{n % 13}" for n in range(66)]
    by_group = make_folds(targets, 5, groups=groups)
    assert {len({f for g, f in zip(groups, by_group, strict=True) if g == group}) for group in set(groups)} == {1}
    assert set(by_group.tolist()) == set(range(5))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_mambaout"])
def test_the_head_becomes_the_models_last_layer(name: str) -> None:
    torch.manual_seed(0)
    model = backbones.create(backbones.Backbone(name=name, num_classes=7))
    side = backbones.eval_spec(model).height
    x = torch.randn(24, 3, side, side)
    with torch.inference_mode():
        features = backbones.logits_and_embedding(model, x)[1].numpy()
    head = fit_head(features, np.arange(24) % 3, ONE, num_classes=3)
    put_head(model, head)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), torch.from_numpy(head.logits(features)), rtol=1e-4, atol=1e-4)
    assert backbones.head(model).weight.shape[0] == 3


def test_a_last_layer_that_is_not_linear_is_refused() -> None:
    model = backbones.create(backbones.Backbone(name="deit_tiny_distilled_patch16_224", num_classes=2))
    head = fit_head(np.random.default_rng(0).normal(size=(9, 192)), np.arange(9) % 2, ONE, num_classes=2)
    with pytest.raises(CapabilityError, match="not linear over its embedding of 192"):
        put_head(model, head)


def test_features_are_the_embeddings_of_a_finished_score_run(
    tmp_path: Path, make_photo: Callable[..., bytes], ingest_here: Callable[..., ShardManifest]
) -> None:
    files = {f"c{n % 3}/{n}.jpg": make_photo(n) for n in range(12)}
    ingest_here(make_folder(tmp_path, files), tmp_path / "corpus", shard_images=5)
    torch.manual_seed(0)
    model = backbones.create(backbones.Backbone(name="test_resnet", num_classes=2))
    spec = images.ImageSpec(32, 32)
    width = backbones.embedding_width(model, spec)
    labels = (Label("a", "a"), Label("b", "b"))
    draft = ModelBundle(architecture="test_resnet", labels=labels, image_spec=spec, embedding_dim=width)
    weights = {SAFETENSORS: to_safetensors(model, "tiny"), ONNX: export_onnx(model, draft)}
    save_bundle(tmp_path / "tiny", draft, weights)  # type: ignore[arg-type]
    given = {"source": str(tmp_path / "corpus"), "model": str(tmp_path / "tiny"), "has_report": False}
    score.run(score.ScoreConfig(**given, out=str(tmp_path / "run"), embeddings=True, runtime="onnx"), is_quiet=True)
    index = build_index(open_corpus(tmp_path / "corpus")).subset(np.array([11, 3, 7, 0]))
    features = read_features(tmp_path / "run", index)
    by_id = {sha256_bytes(data): data for data in files.values()}
    pixels = np.stack([images.decode(by_id[index.id_of(n)], spec) for n in range(4)])
    with torch.inference_mode():
        oracle = backbones.logits_and_embedding(model, torch.from_numpy(images.normalize(pixels, spec)))[1].numpy()
    np.testing.assert_allclose(features, oracle, rtol=2e-3, atol=2e-3)  # kept as float16
    score.run(score.ScoreConfig(**given, out=str(tmp_path / "bare"), runtime="onnx"), is_quiet=True)
    with pytest.raises(DataError, match="holds no embeddings"):
        read_features(tmp_path / "bare", index)


def test_features_that_teach_nothing_are_refused() -> None:
    x = np.ones((4, 2), np.float32)
    with pytest.raises(DataError, match="every image is of one class"):
        fit_head(x, np.zeros(4, np.int64), ONE, num_classes=2)
    with pytest.raises(DataError, match="class indices -1 to 1"):
        fit_head(x, np.array([0, 1, -1, 0]), ONE, num_classes=2)
    with pytest.raises(DataError, match="1 images have features that are not finite"):
        fit_head(np.array([[1, 2], [np.nan, 1]]), np.array([0, 1]), ONE, num_classes=2)
    with pytest.raises(DataError, match="0 features"):
        fit_head(x[:0], np.zeros(0, np.int64), ONE, num_classes=2)


def test_a_head_trained_by_the_loop_learns_and_folds_exactly(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits[0][:1000], digits[1][:1000]
    settings = ClassificationSettings(balance="weights", label_smoothing=0.1)
    task = HeadTask(x, settings, class_counts=np.bincount(y))
    batches = ArrayBatches({"features": x, "target": y}, FeedSettings(batch_size=50))
    chosen = TrainSettings(epochs=6, batch_size=50, optimizer=OptimizerSettings(lr=0.02, base_batch=None))
    train(task, batches, chosen)
    head = task.head()
    assert (head.logits(digits[0][1000:]).argmax(1) == digits[1][1000:]).mean() > 0.88
    with torch.inference_mode():
        direct = task.layer((torch.from_numpy(x).float() - task.mean) / task.scale)
    torch.testing.assert_close(torch.from_numpy(head.logits(x)), direct, rtol=1e-4, atol=1e-4)

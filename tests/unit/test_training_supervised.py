"""The supervised task: what it sees, what it freezes, what it starts from, and that it learns real digits."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from eagleray.core.errors import ArtifactError, ConfigError, DataError
from eagleray.learn.augmentation import OPERATIONS, AugmentSettings, EvalTransform, TrainTransform
from eagleray.learn.balance import BalancedSampler
from eagleray.learn.checkpoints import Checkpoint
from eagleray.learn.classification import ClassificationTask, check_labels, check_split
from eagleray.learn.corpus_index import CorpusIndex, build_index
from eagleray.learn.feeding import Batches, FeedSettings, make_arrays
from eagleray.learn.mixing import MixSettings
from eagleray.learn.optimization import OptimizerSettings
from eagleray.learn.order import Position
from eagleray.learn.starting_point import begin
from eagleray.learn.supervision import ClassificationSettings
from eagleray.learn.task import Item, Progress
from eagleray.learn.training import Hooks, TrainSettings, train
from eagleray.vision import backbones, images
from eagleray.vision.bundle import SAFETENSORS, ModelBundle, save_bundle
from eagleray.vision.corpus import ShardManifest, open_corpus
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import to_safetensors
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from tests.source_makers import ingest_here, make_folder
from tests.unit.test_checkpoints import same

__all__ = ["ingest_here"]
SPEC = ImageSpec(32, 32, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PLAIN = AugmentSettings(scale=(0.6, 1.0), flip_p=0.0, rand_augment_ops=0)  # a mirrored digit is another sign


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def digits(tmp_path: Path, ingest_here: Callable[..., ShardManifest]) -> CorpusIndex:
    """400 handwritten digits of 8 x 8 pixels, drawn four times as large, in a corpus: five classes."""
    x, y = load_digits(return_X_y=True)
    x, y = x[y < 5][:400], y[y < 5][:400]
    pictures = (x.reshape(-1, 8, 8) / 16 * 255).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    files = {f"{label}/{n}.png": as_png(pixels) for n, (pixels, label) in enumerate(zip(pictures, y, strict=True))}
    ingest_here(make_folder(tmp_path, files), tmp_path / "corpus", shard_images=150)
    return build_index(open_corpus(tmp_path / "corpus"))


def tiny(num_classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backbones.create(backbones.Backbone(name="test_resnet", num_classes=num_classes))


def task_of(index: CorpusIndex, model: nn.Module | None = None, **settings: object) -> ClassificationTask:
    chosen = ClassificationSettings(**settings)  # type: ignore[arg-type]
    return ClassificationTask(model or tiny(), SPEC, chosen, class_counts=index.class_counts)


def accuracy(task: ClassificationTask, index: CorpusIndex) -> float:
    right = count = 0
    task.eval()
    batches = Batches(index, EvalTransform(SPEC), FeedSettings(batch_size=50, keeps_last=True, num_threads=0))
    with torch.inference_mode():
        for batch in batches.iterate(Position()):
            if batch.epoch:
                break
            logits = task.backbone(task.normalized(torch.from_numpy(batch.arrays["image"])))
            right += int((logits.argmax(1).numpy() == batch.arrays["target"]).sum())
            count += len(logits)
    assert count == len(index)
    return right / count


# What it sees


def items(make_photo: Callable[..., bytes], count: int = 3) -> list[Item]:
    return [Item(f"{n:064x}", make_photo(n, width=90, height=70), (n % 2,)) for n in range(1, count + 1)]


def test_a_picture_depends_on_seed_epoch_and_id_alone(make_photo: Callable[..., bytes]) -> None:
    transform = TrainTransform(SPEC, AugmentSettings(jitter=0.4, vertical_flip_p=0.5), seed=1)
    given = items(make_photo, 5)
    whole = transform(given, 0)["image"]
    assert whole.shape == (5, 32, 32, 3)
    for number, item in enumerate(given):
        assert (transform([item], 0)["image"][0] == whole[number]).all()
    assert (pickle.loads(pickle.dumps(transform))(given, 0)["image"] == whole).all()
    assert (transform(given, 1)["image"] != whole).any()
    assert (TrainTransform(SPEC, seed=2)(given, 0)["image"] != whole).any()


def test_without_any_variation_it_is_the_whole_picture(make_photo: Callable[..., bytes]) -> None:
    square = [Item("1" * 64, make_photo(1, width=40, height=40, kind="PNG"))]
    still = AugmentSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_p=0.0, rand_augment_ops=0)
    ours, scored = TrainTransform(SPEC, still)(square, 0)["image"], EvalTransform(SPEC)(square, 0)["image"]
    assert np.abs(ours.astype(int) - scored).max() <= 1  # the same resize, rounded on another grid
    assert (scored[0] == images.decode(square[0].data, SPEC)).all()


def test_several_labels_are_rows_of_zeros_and_ones(make_photo: Callable[..., bytes]) -> None:
    given = [Item("1" * 64, make_photo(1), (0, 2)), Item("2" * 64, make_photo(2))]
    for transform in (TrainTransform(SPEC, num_classes=4), EvalTransform(SPEC, num_classes=4)):
        assert make_arrays(given, transform, 0)["labels"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_colours_come_in_the_order_of_the_spec(make_photo: Callable[..., bytes]) -> None:
    given = items(make_photo)
    bgr = ImageSpec(32, 32, color="bgr")
    rgb = ImageSpec(32, 32)
    assert (TrainTransform(bgr)(given, 0)["image"][..., ::-1] == TrainTransform(rgb)(given, 0)["image"]).all()


def test_an_image_that_can_no_longer_be_decoded_is_named(make_photo: Callable[..., bytes]) -> None:
    given = [*items(make_photo, 2), Item("bad1" * 16, make_photo(1)[:200])]
    with pytest.raises(DataError, match=r"image bad1bad1.*truncated"):
        make_arrays(given, TrainTransform(SPEC), 0)
    with pytest.raises(ConfigError, match="40 x 32"):
        TrainTransform(ImageSpec(32, 40))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_operations_are_timms(make_photo: Callable[..., bytes], name: str, level: float, sign: float) -> None:
    from timm.data import auto_augment

    picture = Image.fromarray(images.decode(make_photo(3), ImageSpec(24, 24)))
    with mock.patch("random.random", return_value=0.9 if sign < 0 else 0.1):
        arguments = auto_augment.LEVEL_TO_ARG[name](level, {}) if auto_augment.LEVEL_TO_ARG[name] else ()
        if name == "PosterizeIncreasing":
            arguments = (max(1, *arguments),)  # timm asks for no bit at the highest level, which Pillow 13 refuses
        oracle = auto_augment.NAME_TO_OP[name](
            picture, *arguments, fillcolor=(128, 128, 128), resample=Image.Resampling.BICUBIC
        )
    assert (np.asarray(OPERATIONS[name](picture, level, sign)) == np.asarray(oracle)).all()


# What it learns


def test_it_learns_real_digits_and_repeats_bit_for_bit(digits: CorpusIndex) -> None:
    train_part = digits.subset(np.arange(len(digits)) % 4 != 0)
    test_part = digits.subset(np.arange(len(digits)) % 4 == 0)
    weights = []
    for _ in range(2):
        task = task_of(train_part, label_smoothing=0.1, mixing=MixSettings(mixup_alpha=0.1, probability=0.5))
        batches = Batches(train_part, TrainTransform(SPEC, PLAIN), FeedSettings(batch_size=30))
        settings = TrainSettings(
            epochs=5, batch_size=30, optimizer=OptimizerSettings(lr=0.01, base_batch=None, warmup_epochs=0.5)
        )
        before = accuracy(task, test_part)
        train(task, batches, settings)
        weights.append(dict(task.state_dict()))
    assert before < 0.5
    assert accuracy(task, test_part) > 0.85
    assert same(weights[0], weights[1])


@pytest.mark.parametrize("balance", ["weights", "sampler", "logits"])
def test_every_balance_trains_and_an_epoch_of_the_sampler_is_balanced(digits: CorpusIndex, balance: str) -> None:
    index = digits.subset((digits.first_targets > 0) | (np.arange(len(digits)) % 5 == 0))
    sampler = BalancedSampler(index.first_targets) if balance == "sampler" else None
    batches = Batches(index, TrainTransform(SPEC, PLAIN), FeedSettings(batch_size=20), sampler=sampler)
    task = task_of(index, balance=balance, focal_gamma=1.0)
    result = train(task, batches, TrainSettings(max_steps=3, batch_size=20))
    assert np.isfinite(result.report.loss)
    if sampler is not None:
        seen = np.zeros(5, np.int64)
        for batch in batches.iterate(Position()):
            if batch.epoch:
                break
            seen += np.bincount(batch.arrays["target"], minlength=5)
        assert seen.max() - seen.min() <= 20  # what did not fill the last batch


def test_several_labels_are_learned(digits: CorpusIndex) -> None:
    settings = ClassificationSettings(is_multi_label=True, balance="weights")
    task = ClassificationTask(tiny(), SPEC, settings, class_counts=digits.class_counts, num_images=len(digits))
    batches = Batches(digits, TrainTransform(SPEC, PLAIN, num_classes=5), FeedSettings(batch_size=40))
    losses: list[float] = []
    hooks = Hooks(on_report=lambda report: losses.append(report.loss))
    chosen = TrainSettings(
        max_steps=30, batch_size=40, report_every_s=0.0, optimizer=OptimizerSettings(lr=0.01, base_batch=None)
    )
    result = train(task, batches, chosen, hooks=hooks)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    assert result.report.logs == {}


def test_a_compiled_task_is_compiled_where_it_runs(digits: CorpusIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compile_(function: Callable[..., object], *_: object, **__: object) -> Callable[..., object]:
        return lambda model, x: calls.append(len(x)) or function(model, x)

    monkeypatch.setattr(torch, "compile", compile_)
    batches = Batches(digits, TrainTransform(SPEC, PLAIN), FeedSettings(batch_size=20))
    train(task_of(digits), batches, TrainSettings(max_steps=2, batch_size=20, compiles=True))
    assert calls == [2, 20, 20]  # the first: what a step needs


# What it freezes


def changed(task: ClassificationTask, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}


def run_frozen(digits: CorpusIndex, frozen_epochs: int | None) -> list[set[str]]:
    """What changed in each of two epochs."""
    task = task_of(digits, frozen_epochs=frozen_epochs, backbone_lr_scale=0.1, layer_decay=0.7)
    batches = Batches(digits, TrainTransform(SPEC, PLAIN), FeedSettings(batch_size=100))
    before = {name: value.clone() for name, value in task.state_dict().items()}
    found: list[set[str]] = []

    def look(progress: Progress, _: object) -> None:
        if progress.step % 4 == 0:
            found.append(changed(task, before))
            before.update({name: value.clone() for name, value in task.state_dict().items()})

    train(task, batches, TrainSettings(epochs=2, batch_size=100), hooks=Hooks(on_step=look))
    return found


def test_a_frozen_backbone_moves_nothing_not_even_its_statistics(digits: CorpusIndex) -> None:
    head = {"backbone.fc.weight", "backbone.fc.bias"}
    first, second = run_frozen(digits, 1)
    assert first == head
    assert "backbone.conv1.weight" in second or len(second) > 10
    assert run_frozen(digits, None) == [head, head]
    assert len(run_frozen(digits, 0)[0]) > 10


def test_a_run_resumed_while_frozen_or_thawed_is_the_run_itself(digits: CorpusIndex) -> None:
    def run(start: Checkpoint | None = None, seed: int = 0, stop: int = 99) -> Checkpoint:
        kept: list[Checkpoint] = []
        task = task_of(digits, tiny(seed=seed), frozen_epochs=1)
        asked = iter(range(1, 100))
        hooks = Hooks(on_checkpoint=lambda capture, _: kept.append(capture()), should_stop=lambda: next(asked) == stop)
        batches = Batches(digits, TrainTransform(SPEC, PLAIN), FeedSettings(batch_size=100))
        train(task, batches, TrainSettings(epochs=2, batch_size=100, ema_decay=0.5), hooks=hooks, start=start)
        return kept[-1]

    whole = run()
    for stop in (2, 6):
        resumed = run(run(stop=stop), seed=8)
        for part in ("model", "optimizer", "ema"):
            assert same(dict(whole.state[part]), dict(resumed.state[part])), (stop, part)


# What it starts from


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    model = tiny(3, seed=4)
    draft = ModelBundle(
        architecture="test_resnet",
        labels=(Label("a", "Ant"), Label("b", "Bee"), Label("c", "Cat")),
        image_spec=SPEC,
        model_args=backbones.saved_args(model),
        embedding_dim=96,
    )
    path = tmp_path_factory.mktemp("bundles") / "insects"
    return save_bundle(path, draft, {SAFETENSORS: to_safetensors(model, "tiny")})


def test_the_same_labels_keep_the_head_in_the_order_asked_for(bundle: ModelBundle) -> None:
    start = begin(str(bundle.path), labels=("c", "a", "b"))
    origin, x = tiny(3, seed=4), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(start.model(x), origin(x)[:, [2, 0, 1]])
    assert [label.name for label in start.labels] == ["Cat", "Ant", "Bee"]
    assert start.notes == ("the head of insects is kept: it has the same 3 labels",)
    assert start.parent["model_digest"] == bundle.model_digest
    assert start.spec == SPEC


def test_other_labels_get_a_new_head_and_are_said(bundle: ModelBundle) -> None:
    start, again = (begin(str(bundle.path), labels=("a", "dog", "emu"), size_px=64, seed=1) for _ in range(2))
    assert start.notes == ("a new head: insects does not know 2 labels (dog, emu)",)
    assert start.model.state_dict()["fc.weight"].shape == (3, 96)
    assert torch.equal(start.model.fc.weight, again.model.fc.weight)
    assert torch.equal(start.model.conv1[0].weight, tiny(3, seed=4).conv1[0].weight)
    assert (start.spec.height, start.spec.crop_pct) == (64, 1.0)
    fewer = begin(str(bundle.path), labels=("a", "b"))
    assert fewer.notes == ("a new head: insects has 3 labels, 2 of them are trained",)


def test_a_name_starts_at_random_from_its_seed() -> None:
    one, same_, other = (begin("test_resnet", labels=("a", "b"), is_pretrained=False, seed=s) for s in (1, 1, 2))
    assert same(dict(one.model.state_dict()), dict(same_.model.state_dict()))
    assert not torch.equal(one.model.fc.weight, other.model.fc.weight)
    assert one.notes == ("test_resnet with random weights of seed 1",)


def test_what_cannot_be_trained_is_refused(bundle: ModelBundle, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        begin("resnet18x", labels=("a", "b"))
    with pytest.raises(ConfigError, match="imported from an ONNX file"):
        begin(str(tiny_model), labels=("a", "b"))
    with pytest.raises(ArtifactError, match="no model bundle"):
        begin(str(tmp_path), labels=("a", "b"))


# What data it takes


def test_images_without_labels_are_left_out_and_said(digits: CorpusIndex) -> None:
    kept, notes = check_labels(digits)
    assert (len(kept), notes) == (400, ())
    few = digits.subset(digits.first_targets != 3)
    assert check_labels(few)[1] == ("no training image of 1 classes: 3",)


def with_targets(index: CorpusIndex, counts: list[int], classes: list[int]) -> CorpusIndex:
    part = index.subset(np.arange(len(counts)))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return replace(part, offsets=offsets, classes=np.array(classes, np.int32))


def test_data_that_no_classifier_can_learn_from_is_refused(digits: CorpusIndex) -> None:
    with pytest.raises(DataError, match="has no labels"):
        check_labels(with_targets(digits, [0, 0, 0], []))
    with pytest.raises(DataError, match="every labelled image is of one class, '2'"):
        check_labels(with_targets(digits, [1, 0, 1], [2, 2]))
    with pytest.raises(DataError, match="1 of 3 images have several labels"):
        check_labels(with_targets(digits, [1, 2, 0], [2, 1, 0]))
    kept, notes = check_labels(with_targets(digits, [1, 2, 0], [2, 1, 0]), is_multi_label=True)
    assert [kept.targets_of(n) for n in range(2)] == [(2,), (1, 0)]
    assert notes[0] == "1 of 3 images have no label and are left out"
    with pytest.raises(DataError, match="split 'test' has no image of 2 classes: 3, 4"):
        check_split("test", digits.subset(digits.first_targets < 3), digits.labels)

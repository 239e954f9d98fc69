"""Distillation: the loss against a slow oracle, what takes a gradient, images without a label, and whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagleray.core.config import load
from eagleray.core.errors import ConfigError, DataError
from eagleray.flows import finetune, ingest, score
from eagleray.flows.run_folder import read_lines
from eagleray.learn.augmentation import AugmentSettings, EvalTransform, TrainTransform
from eagleray.learn.classification import ClassificationTask
from eagleray.learn.corpus_index import CorpusIndex, build_index
from eagleray.learn.distill_settings import DistillSettings
from eagleray.learn.distillation import DistillationTask, answer_losses, feature_losses, softened
from eagleray.learn.feeding import Batches, FeedSettings
from eagleray.learn.mixing import MixSettings
from eagleray.learn.optimization import OptimizerSettings
from eagleray.learn.order import Position
from eagleray.learn.supervision import ClassificationLoss, ClassificationSettings
from eagleray.learn.task import Progress
from eagleray.learn.teacher import CachedTeacher, Teacher, check_teacher
from eagleray.learn.training import TrainSettings, train
from eagleray.vision import backbones
from eagleray.vision.bundle import SAFETENSORS, ModelBundle, load_bundle, save_bundle
from eagleray.vision.corpus import open_corpus
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import to_safetensors
from torch import nn

SPEC = ImageSpec(32, 32, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLASSES = ("a", "b", "c")
START = Progress(step=0, num_steps=10, epoch=0, steps_per_epoch=5)


def make(name: str, seed: int, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    args = backbones.size_args(name, 32)
    return backbones.create(backbones.Backbone(name=name, num_classes=num_classes, model_args=args))


def bundle_of(out: Path, name: str = "test_vit", seed: int = 5, **changes: Any) -> ModelBundle:
    model = make(name, seed)
    values = {
        "architecture": name,
        "labels": tuple(Label(one, one) for one in CLASSES),
        "image_spec": SPEC,
        "embedding_dim": backbones.embedding_width(model, SPEC),
        "model_args": backbones.saved_args(model),
        **changes,
    }
    return save_bundle(out, ModelBundle(**values), {SAFETENSORS: to_safetensors(model, name)})


@pytest.fixture(scope="module")
def teacher_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return bundle_of(tmp_path_factory.mktemp("teachers") / "large")


def student(name: str = "test_vit", seed: int = 1, **settings: Any) -> ClassificationTask:
    """A ViT by default: no batch norm, so that an image's loss knows nothing of the others."""
    chosen = ClassificationSettings(**settings)
    return ClassificationTask(make(name, seed), SPEC, chosen, class_counts=np.array([3, 2, 1]))


def batch_of(targets: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (len(targets), 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {"image": image, "target": torch.tensor(targets)}


def taught(bundle: ModelBundle, task: ClassificationTask | None = None, **settings: Any) -> DistillationTask:
    teacher = Teacher(bundle, labels=CLASSES, seen_by=SPEC)
    return DistillationTask(task or student(), DistillSettings(**settings), teacher=teacher).eval()


# The loss


def slow_softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [value / sum(powers) for value in powers]


def slow_sigmoid(value: float, temperature: float) -> float:
    return 1 / (1 + math.exp(-value / temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.5, 8.0])
def test_the_divergence_is_hintons(temperature: float) -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0, 3, (4, 5)), generator.normal(0, 3, (4, 5))
    wanted = []
    for mine, its in zip(ours.tolist(), theirs.tolist(), strict=True):
        p, q = slow_softmax(its, temperature), slow_softmax(mine, temperature)
        wanted.append(temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    soft = softened(torch.from_numpy(theirs), temperature)
    found = answer_losses(torch.from_numpy(ours), soft, temperature)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # computed in float32
    same = answer_losses(torch.from_numpy(theirs), soft, temperature)
    np.testing.assert_allclose(same, 0, atol=1e-4 * temperature**2)


def test_several_labels_diverge_one_by_one() -> None:
    generator = np.random.default_rng(1)
    ours, theirs, t = generator.normal(0, 3, (4, 5)), generator.normal(0, 3, (4, 5)), 3.0
    wanted = []
    for mine, its in zip(ours.tolist(), theirs.tolist(), strict=True):
        total = 0.0
        for a, b in zip(its, mine, strict=True):
            p, q = slow_sigmoid(a, t), slow_sigmoid(b, t)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        wanted.append(t**2 * total / 5)
    soft = softened(torch.from_numpy(theirs), t, is_multi_label=True)
    found = answer_losses(torch.from_numpy(ours), soft, t, is_multi_label=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_sure_teacher_gives_no_nan() -> None:
    soft = torch.tensor([[1.0, 0.0, 0.0]])
    logits = torch.tensor([[-200.0, 0.0, 300.0]], requires_grad=True)
    for is_multi_label in (False, True):
        value = answer_losses(logits, soft, 1.0, is_multi_label=is_multi_label)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_features_are_compared_by_their_angle() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    other = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(feature_losses(one, other), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_a_masked_label_loss_is_the_mean_over_all_images_of_those_known(is_multi_label: bool) -> None:
    settings = ClassificationSettings(is_multi_label=is_multi_label, balance="weights", focal_gamma=1.5)
    loss = ClassificationLoss(settings, class_counts=np.array([5, 3, 2]))
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    known = torch.tensor([1.0, 1, 0, 1])
    each = [loss(logits[n : n + 1], targets[n : n + 1]) for n in (0, 1, 3)]
    torch.testing.assert_close(loss(logits, targets, known), sum(each) / 4)
    torch.testing.assert_close(loss(logits, targets, torch.ones(4)), loss(logits, targets))
    half = loss(logits[:1], 0.5 * targets[:1], torch.tensor([0.5]))  # mixed half with one that has no label
    torch.testing.assert_close(half, 0.5 * each[0])


def test_the_whole_is_the_sum_of_its_parts(teacher_bundle: ModelBundle) -> None:
    task = taught(teacher_bundle, alpha=0.3, temperature=2.0, feature_weight=0.7)
    batch = batch_of([0, -1, 2, -1])
    x = task.student.normalized(batch["image"])
    logits, embedding = backbones.logits_and_embedding(task.backbone, x)
    said, features = backbones.logits_and_embedding(make("test_vit", 5), x)
    soft = (said / 2).softmax(-1)
    kl = 4 * (soft * (soft.log() - (logits / 2).log_softmax(-1))).sum(-1)
    label = -logits.log_softmax(-1)[torch.tensor([0, 2]), torch.tensor([0, 2])]
    assert task.projector is not None
    angle = 1 - torch.cosine_similarity(task.projector(embedding), features)
    wanted = 0.7 * label.sum() / 4 + 0.3 * kl.mean() + 0.7 * angle.mean()
    output = task.training_step(batch, START)
    torch.testing.assert_close(output.loss, wanted)
    right = (logits.argmax(-1)[[0, 2]] == torch.tensor([0, 2])).float().mean()
    assert output.logs["accuracy"] == pytest.approx(float(right))
    assert output.logs["teacher_agreement"] == pytest.approx(
        float((logits.argmax(-1) == said.argmax(-1)).float().mean())
    )


# What takes a gradient


def gradient(task: DistillationTask, batch: dict[str, torch.Tensor], share: float = 1.0) -> dict[str, torch.Tensor]:
    task.zero_grad()
    (task.training_step(batch, START).loss * share).backward()
    return {name: value.grad.clone() for name, value in task.named_parameters() if value.grad is not None}


def test_no_gradient_reaches_the_teacher_and_no_checkpoint_holds_it(teacher_bundle: ModelBundle) -> None:
    task = taught(teacher_bundle, feature_weight=1.0)
    assert task.teacher is not None
    before = {name: value.clone() for name, value in task.teacher._model.state_dict().items()}
    found = gradient(task, batch_of([0, 1, -1]))
    assert set(found) == {name for name, _ in task.named_parameters()}
    assert all(value.grad is None and not value.requires_grad for value in task.teacher._model.parameters())
    assert not [name for name in task.state_dict() if not name.startswith(("student.", "projector."))]
    task.train()
    task.training_step(batch_of([0, 1, -1]), START)
    assert not task.teacher._model.training
    assert all(torch.equal(value, before[name]) for name, value in task.teacher._model.state_dict().items())


def test_an_image_without_a_label_teaches_by_the_teacher_alone(teacher_bundle: ModelBundle) -> None:
    mixed, alone = batch_of([1, -1]), batch_of([-1, -1])
    labels_only = gradient(taught(teacher_bundle, alpha=1.0), mixed)
    assert all(torch.equal(value, labels_only[name])
               for name, value in gradient(taught(teacher_bundle, alpha=1.0), alone).items())  # fmt: skip
    found = gradient(taught(teacher_bundle, alpha=0.5), alone)
    assert any(value.abs().sum() > 0 for value in found.values())
    wanted = gradient(taught(teacher_bundle, alpha=1.0), alone)
    for name, value in found.items():
        torch.testing.assert_close(value, 0.5 * wanted[name])


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_two_workers_have_the_gradient_of_one(is_multi_label: bool, tmp_path: Path) -> None:
    """The halves of a batch, one with labels and one without, have the mean of their gradients, as DDP takes it."""
    output = "multi_label_logits" if is_multi_label else "logits"
    task = taught(bundle_of(tmp_path / "t", output=output), student(is_multi_label=is_multi_label), feature_weight=0.5)
    batch = batch_of([0, 2, 1, -1, -1, -1])
    batch["labels"] = torch.tensor(
        [[1, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.uint8
    )
    whole = gradient(task, batch)
    halves = [gradient(task, {name: value[part] for name, value in batch.items()}, 0.5)
              for part in (slice(0, 3), slice(3, 6))]  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(value, halves[0][name] + halves[1][name], rtol=1e-4, atol=1e-6)


# Who teaches


def test_answers_come_in_the_students_order_and_on_its_pixels(tmp_path: Path) -> None:
    """The teacher is of another size, of other constants and of the other order of colours."""
    labels = tuple(Label(one, one) for one in ("c", "a", "b"))
    spec = ImageSpec(64, 64, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4), color="bgr")
    bundle = bundle_of(tmp_path / "bgr", "test_resnet", labels=labels, image_spec=spec)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    logits, embedding = Teacher(bundle, labels=CLASSES, seen_by=SPEC)(pixels)
    large = nn.functional.interpolate(pixels.flip(1), (64, 64), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (spec.mean, spec.std))
    with torch.inference_mode():
        said, features = backbones.logits_and_embedding(make("test_resnet", 5), (large / 255 - mean) / std)
    torch.testing.assert_close(logits, said[:, [1, 2, 0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding, features, rtol=1e-4, atol=1e-5)


def test_mixed_images_are_shown_to_the_teacher_mixed(teacher_bundle: ModelBundle) -> None:
    seen: list[torch.Tensor] = []
    task = taught(teacher_bundle, student(mixing=MixSettings(cutmix_alpha=1.0)))
    teacher = task.teacher
    assert teacher is not None

    def look(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(pixels)
        return teacher(pixels)

    task.teacher = look  # type: ignore[assignment]
    batch = batch_of([0, -1, 2, 1])
    assert task.training_step(batch, START).loss.isfinite()
    plain = batch["image"].permute(0, 3, 1, 2).float()
    assert not torch.equal(seen[0], plain)
    assert ((seen[0] == plain) | (seen[0] == plain.flip(0))).all()


def test_a_teacher_of_other_labels_or_outputs_is_refused(teacher_bundle: ModelBundle, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"large has other labels.*does not know 1: d; it has 1 more: c") as refused:
        check_teacher(teacher_bundle, ("a", "d", "b"))
    assert "in any order" in refused.value.expected
    check_teacher(teacher_bundle, ("c", "b", "a"))
    with pytest.raises(ConfigError, match="large gives logits"):
        check_teacher(teacher_bundle, CLASSES, is_multi_label=True)
    with pytest.raises(ConfigError, match="gives no embedding"):
        check_teacher(replace(teacher_bundle, embedding_dim=None), CLASSES, needs_embedding=True)
    foreign = load_bundle(tiny_model)
    with pytest.raises(ConfigError, match="ONNX file"):
        Teacher(foreign, labels=foreign.label_ids, seen_by=SPEC)


# Whole runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """36 little pictures of three tints, 9 of them without a label."""
    from PIL import Image

    home = tmp_path_factory.mktemp("tints")
    rows = []
    for number in range(36):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 120, (36, 40, 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        Image.fromarray(pixels).save(home / f"{number}.png")
        label = "" if number % 4 == 3 else CLASSES[number % 3]
        rows.append(f"{number}.png,{label},{'test' if number % 9 == 0 else 'train'}")
    (home / "metadata.csv").write_text("file_name,label,split\n" + "\n".join(rows) + "\n")
    out = tmp_path_factory.mktemp("corpora") / "tints"
    ingest.run(ingest.IngestConfig(sources=(str(home),), out=str(out), shard_images=10))
    return str(out)


@pytest.fixture(scope="module")
def index(corpus: str) -> CorpusIndex:
    return build_index(open_corpus(corpus))


def config(corpus: str, out: Path, **more: Any) -> finetune.FinetuneConfig:
    fixed = {"parent": "test_resnet", "is_pretrained": False, "size_px": 32, "batch_size": 8, "epochs": 2}
    fixed |= {"runtime": "torch", "threads": 1, "report_every_s": 0, "judge": "", "has_report": False}
    return load(finetune.FinetuneConfig, overrides={**fixed, "corpus": corpus, "out": str(out), **more})


def test_a_student_is_validated_while_it_is_taught(corpus: str, teacher_bundle: ModelBundle, tmp_path: Path) -> None:
    told = config(corpus, tmp_path / "small", teacher=str(teacher_bundle.path), validate_share=0.3, keep="best")
    said = finetune.run(told, is_quiet=True)
    rows = read_lines(Path(said["run"]) / "metrics.jsonl")
    assert len([row for row in rows if "val_accuracy" in row["figures"]]) == 2, "once an epoch"


@pytest.mark.parametrize("cache_teacher", [False, True])
def test_a_run_with_a_teacher_uses_all_images_and_names_it(
    corpus: str, teacher_bundle: ModelBundle, tmp_path: Path, cache_teacher: bool
) -> None:
    told = {"feature_weight": 0.5, "cache_teacher": cache_teacher}
    said = finetune.run(
        config(corpus, tmp_path / "small", teacher=str(teacher_bundle.path), distill=told), is_quiet=True
    )  # fmt: skip
    bundle = load_bundle(said["bundle"])
    known = int((build_index(open_corpus(corpus)).num_targets > 0).sum())
    assert known == 27
    assert said["images"] == 32, "the training split, eight without a label"
    assert bundle.lineage["unlabelled"] == 8
    lineage = bundle.lineage["teacher"]
    assert lineage["model_digest"] == teacher_bundle.model_digest
    assert lineage["distill"]["feature_weight"] == 0.5
    assert set(backbones.create(backbones.Backbone(name="test_resnet", num_classes=3)).state_dict()) == set(
        begin_state(bundle)
    ), "an ordinary bundle"
    rows = read_lines(Path(said["run"]) / "metrics.jsonl")
    assert {"accuracy", "teacher_agreement"} <= set(rows[-1]["logs"])
    record = json.loads((Path(said["run"]) / "record.json").read_text())
    assert teacher_bundle.model_digest in json.dumps(record)
    again = finetune.run(
        config(corpus, tmp_path / "small", teacher=str(teacher_bundle.path), distill=told), is_quiet=True
    )  # fmt: skip
    assert again["digest"] == said["digest"]


def begin_state(bundle: ModelBundle) -> dict[str, torch.Tensor]:
    from eagleray.vision.state_dicts import read_state_dict

    return read_state_dict(bundle.read_verified(SAFETENSORS), SAFETENSORS)


def test_unlabelled_images_can_be_left_out(corpus: str, teacher_bundle: ModelBundle, tmp_path: Path) -> None:
    told = {"use_unlabelled": False}
    work = finetune.make_work(config(corpus, tmp_path / "x", teacher=str(teacher_bundle.path), distill=told))
    assert len(work.index) == 24
    with pytest.raises(ConfigError, match="8 images without a label"):
        finetune.make_work(config(corpus, tmp_path / "y", teacher=str(teacher_bundle.path), balance="sampler"))


def test_a_cached_teacher_says_of_an_image_what_it_says_of_its_pixels(
    corpus: str, index: CorpusIndex, teacher_bundle: ModelBundle, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    score.run(
        score.ScoreConfig(source=corpus, model=str(teacher_bundle.path), out=str(out), runtime="torch", top_k=3,
                          embeddings=True, has_report=False),
        is_quiet=True,
    )  # fmt: skip
    transform = CachedTeacher(EvalTransform(SPEC), out, index, has_embedding=True)
    batches = Batches(index, transform, FeedSettings(batch_size=12, num_threads=0, keeps_last=True))
    teacher = Teacher(teacher_bundle, labels=CLASSES, seen_by=SPEC)
    for batch in batches.iterate(Position()):
        if batch.epoch:
            break
        logits, embedding = teacher(torch.from_numpy(batch.arrays["image"]).permute(0, 3, 1, 2).float())
        said = torch.from_numpy(batch.arrays["teacher_logits"])
        torch.testing.assert_close(said.softmax(-1), logits.softmax(-1), rtol=1e-4, atol=1e-5)
        kept = torch.from_numpy(batch.arrays["teacher_embedding"])
        torch.testing.assert_close(kept, embedding, rtol=2e-3, atol=2e-3)  # kept as float16
    more = replace(index, labels=(*CLASSES, "d"))
    with pytest.raises(DataError, match="does not say all 4 labels of 36 of 36"):
        _ = CachedTeacher(EvalTransform(SPEC), out, more).answers


def test_a_student_learns_what_its_teacher_knows_without_any_label(index: CorpusIndex, tmp_path: Path) -> None:
    """A teacher that has learned the tints teaches a student that sees no label at all."""
    plain = TrainTransform(SPEC, AugmentSettings(scale=(0.6, 1.0), rand_augment_ops=0))
    optimizer = OptimizerSettings(lr=0.02, base_batch=None, warmup_epochs=0.5)
    settings = TrainSettings(epochs=10, batch_size=12, optimizer=optimizer)
    knows = index.subset(index.num_targets > 0)
    large = student("test_resnet", seed=2)
    train(large, Batches(knows, plain, FeedSettings(batch_size=12)), settings)
    bundle = save_bundle(
        tmp_path / "large",
        ModelBundle(architecture="test_resnet", labels=tuple(Label(one, one) for one in CLASSES), image_spec=SPEC,
                    model_args=backbones.saved_args(large.backbone)),
        {SAFETENSORS: to_safetensors(large.backbone, "large")},
    )  # fmt: skip
    blind = replace(index, offsets=np.zeros(len(index) + 1, np.int64), classes=np.empty(0, np.int32))
    task = taught(bundle, student("test_resnet", seed=9), alpha=1.0, temperature=2.0)
    train(task, Batches(blind, plain, FeedSettings(batch_size=12)), settings)
    whole = Batches(knows, EvalTransform(SPEC), FeedSettings(batch_size=len(knows), num_threads=0))
    arrays = next(iter(whole.iterate(Position()))).arrays
    task.eval()
    with torch.inference_mode():
        best = task.student.run(task.student.normalized(torch.from_numpy(arrays["image"])))[0].argmax(-1).numpy()
    assert (best == arrays["target"]).mean() > 0.8


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"distill": {"alpha": 0.9}}, "there is no teacher"),
        ({"teacher": "x", "mode": "head"}, "give mode=full"),
        ({"teacher": "x", "distill": {"alpha": 0}}, "would say nothing"),
        ({"teacher": "x", "distill": {"temperature": 0}}, "greater than 0"),
        ({"teacher": "x", "distill": {"alpha": 1.5}}, "less than or equal to 1"),
        (
            {"teacher": "x", "mixup_alpha": 0.2, "distill": {"cache_teacher": True, "feature_weight": 1.0}},
            "no embedding of mixed images",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    given: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        config("nowhere", tmp_path / "out", **given)


def test_a_teacher_of_other_labels_stops_a_run_before_it_begins(corpus: str, tmp_path: Path) -> None:
    other = bundle_of(tmp_path / "other", labels=tuple(Label(one, one) for one in "abd"))
    with pytest.raises(DataError, match="does not know 1: c; it has 1 more: d"):
        finetune.run(config(corpus, tmp_path / "out", teacher=str(other.path)), is_quiet=True)


# What stays as it was


def test_the_key_of_a_run_without_a_teacher_has_not_changed(corpus: str, tmp_path: Path) -> None:
    work = finetune.make_work(config(corpus, tmp_path / "out"))
    assert {"teacher", "distill"}.isdisjoint(work.key)

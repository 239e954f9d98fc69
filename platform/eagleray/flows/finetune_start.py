"""What fine-tuning begins with, whichever its mode: the config, the labelled images, the model before its first step.

Example:
    >>> chosen, notes = select(config)
    >>> point = start(config, chosen.index.labels)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from eagleray.core.errors import ConfigError, DataError
from eagleray.flows.score import ScoreConfig
from eagleray.flows.scoring_place import RuntimeName
from eagleray.flows.training_config import AUTO, TrainingConfig
from eagleray.flows.training_data import Chosen, choose, with_validation
from eagleray.flows.training_run import Made, Run
from eagleray.learn.distill_settings import DistillSettings
from eagleray.vision.bundle import HEAD, load_bundle

if TYPE_CHECKING:
    from eagleray.learn.corpus_index import CorpusIndex
    from eagleray.learn.starting_point import StartingPoint
    from eagleray.learn.supervision import ClassificationSettings


class FinetuneConfig(TrainingConfig):
    """What to fine-tune, on what, to where.

    Attributes:
        parent: Where to start: a bundle's folder, a timm name, ``lite0``, ``local-dir:`` or ``hf-hub:``.
        mode: ``full``, ``linear`` or ``head``.
        head: ``auto`` keeps the parent's head where it has the very same labels, ``new`` never does, ``keep`` refuses
            labels that it does not know.
        is_pretrained: Load the weights of a name; else new ones of the seed.
        is_multi_label: Each label by itself, as many an image as it has.
        label_smoothing, balance, weight_rule, focal_gamma, frozen_epochs, backbone_lr_scale, layer_decay: As in
            learn.supervision.ClassificationSettings.
        mixup_alpha, cutmix_alpha: As in learn.mixing.MixSettings.
        crop_scale, flip_p, vertical_flip_p, rand_augment_ops, rand_augment_magnitude, jitter: As in
            learn.augmentation.AugmentSettings; ``crop_scale`` is its scale.
        validate_on: Of ``full``: the split whose accuracy is measured while the run goes on: a name, ``auto`` (``val``
            where the corpus has one), or empty for none.
        validate_share: Set a share of the training images aside for that instead: of every class, groups undivided.
        validate_every_epochs: How often; after the last step always.
        keep: Which weights become the bundle: ``last``, or ``best`` by that accuracy, of equals the earliest. The
            best of many looks better than it is: it is then judged on another split where there is one.
        c_values: Of ``head``: inverse strengths of the penalty to choose from.
        allow_missing: Train although a class of the corpus has no image in the split.
        judge: The split on which the page shows the result: a name, ``auto`` (val, else test), or empty for none.
        teacher: A bundle of the same labels that teaches too, in mode ``full`` (learn/distillation.py); none: labels
            alone.
        distill: As in learn.distill_settings.DistillSettings, e.g. ``distill.temperature``.
        runtime, in_process_below: As in ``score``: how features are made, a cached teacher is asked and the result is
            judged.
    """

    parent: str = Field(min_length=1)
    mode: Literal["full", "linear", "head"] = "full"
    head: Literal["auto", "new", "keep"] = "auto"
    is_pretrained: bool = True
    is_multi_label: bool = False
    batch_size: int = Field(64, ge=2)
    lr: float = Field(5e-4, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["none", "weights", "sampler", "logits"] = "none"
    weight_rule: Literal["inverse", "effective"] = "inverse"
    focal_gamma: float = Field(0.0, ge=0)
    frozen_epochs: int | None = Field(0, ge=0)
    backbone_lr_scale: float = Field(1.0, ge=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    mixup_alpha: float = Field(0.0, ge=0)
    cutmix_alpha: float = Field(0.0, ge=0)
    crop_scale: tuple[float, float] = (0.35, 1.0)
    flip_p: float = Field(0.5, ge=0, le=1)
    vertical_flip_p: float = Field(0.0, ge=0, le=1)
    rand_augment_ops: int = Field(2, ge=0)
    rand_augment_magnitude: float = Field(7.0, ge=0, le=10)
    jitter: float = Field(0.0, ge=0, le=1)
    validate_on: str = AUTO
    validate_share: float = Field(0.0, ge=0, le=0.5)
    validate_every_epochs: int = Field(1, ge=1)
    keep: Literal["last", "best"] = "last"
    c_values: tuple[float, ...] = Field((0.001, 0.01, 0.1, 1.0, 10.0), min_length=1)
    allow_missing: bool = False
    judge: str = AUTO
    teacher: str | None = Field(None, min_length=1)
    distill: DistillSettings = DistillSettings()
    runtime: RuntimeName = "auto"
    in_process_below: int = Field(256, ge=0)

    @model_validator(mode="after")
    def _can_be_taught(self) -> FinetuneConfig:
        if self.teacher is None:
            if self.distill != DistillSettings():
                raise ValueError("distill is set, and there is no teacher: give teacher=BUNDLE")
            return self
        if self.mode != "full":
            raise ValueError(f"a teacher, and mode {self.mode}: a teacher teaches a whole model; give mode=full")
        is_mixed = self.mixup_alpha > 0 or self.cutmix_alpha > 0
        if self.distill.cache_teacher and self.distill.feature_weight and is_mixed:
            raise ValueError("a cached teacher has no embedding of mixed images: give distill.cache_teacher=false")
        return self

    @model_validator(mode="after")
    def _has_epochs(self) -> FinetuneConfig:
        asks = self.validate_share or self.keep == "best" or self.validate_on not in (AUTO, "")
        if self.mode != "full" and asks:
            raise ValueError(f"mode={self.mode} has no epochs: validate_on, validate_share and keep=best are of full")
        if self.validate_share and self.validate_on not in (AUTO, ""):
            raise ValueError("validate_on names a split and validate_share asks for a piece: give one of them")
        return self


def select(config: FinetuneConfig) -> tuple[Chosen, tuple[str, ...]]:
    """The labelled images of the split, and what to tell of the others.

    Raises:
        DataError: As ``run`` says.
    """
    from eagleray.learn.classification import check_labels, check_one_label

    chosen = choose(config, labels=_kept_labels(config), needs_classes=True, is_allowed=config.allow_missing)
    if config.mode == "full":
        chosen = with_validation(config, chosen, split=config.validate_on, share=config.validate_share)
    if config.keep == "best" and chosen.validation is None:
        raise DataError(
            "keep=best, and there is nothing to validate on",
            expected="a split named val, or a share of the training images",
            fix="give validate_share=0.1, or name a split with validate_on=",
        )
    is_taught = config.teacher is not None and config.distill.use_unlabelled
    index, notes = check_labels(chosen.index, is_multi_label=config.is_multi_label, keeps_unlabelled=is_taught)
    if config.balance == "sampler" and len(index) > num_labelled(index):
        raise ConfigError(
            f"balance=sampler, and {len(index) - num_labelled(index):,} images without a label for the teacher",
            expected="images with a label: the sampler goes by classes",
            fix="give distill.use_unlabelled=false, or balance=weights",
        )
    if chosen.validation is not None:
        check_one_label(chosen.validation, is_multi_label=config.is_multi_label)
        notes = (*notes, f"validated on {len(chosen.validation):,} images: {chosen.validated_on}")
    return dataclasses.replace(chosen, index=index), (*chosen.notes, *notes)


def num_labelled(index: CorpusIndex) -> int:
    """Images that have a label."""
    return int((index.num_targets > 0).sum())


def _kept_labels(config: FinetuneConfig) -> tuple[str, ...] | None:
    """The parent's labels where its head must be kept."""
    if config.head != "keep":
        return None
    if not (Path(config.parent) / HEAD).is_file():
        raise ConfigError(f"head=keep, and {config.parent} is no bundle", expected="a bundle", fix="give head=auto")
    return load_bundle(config.parent).label_ids


def start(config: FinetuneConfig, labels: tuple[str, ...]) -> StartingPoint:
    """The model before its first step.

    Raises:
        DataError: A label that the parent must know and does not.
    """
    from eagleray.learn.starting_point import begin
    from eagleray.vision import backbones

    point = begin(
        config.parent, labels=labels, size_px=config.size_px, is_pretrained=config.is_pretrained, seed=config.seed
    )
    if config.head == "new":
        backbones.renew_head(point.model, len(labels), seed=config.seed)
    return point


def classification(config: FinetuneConfig) -> ClassificationSettings:
    """How the classifier learns."""
    from eagleray.learn.mixing import MixSettings
    from eagleray.learn.supervision import ClassificationSettings

    names = set(ClassificationSettings.model_fields) & set(FinetuneConfig.model_fields)
    return ClassificationSettings(
        mixing=MixSettings(mixup_alpha=config.mixup_alpha, cutmix_alpha=config.cutmix_alpha),
        **{name: getattr(config, name) for name in names},
    )


def work_key(config: FinetuneConfig, chosen: Chosen, point: StartingPoint) -> dict[str, Any]:
    """What the run is: the settings, the images, and the very weights that it begins with."""
    fields = config.key_fields()
    fields.pop("parent")  # a path, which may move; its digest stays
    parent = {name: point.parent[name] for name in ("source", "source_sha256", "model_digest") if name in point.parent}
    if config.teacher is None:
        del fields["teacher"], fields["distill"]  # the key of a run without one is what it was before there were any
    else:
        fields["teacher"] = load_bundle(config.teacher).model_digest
    if config.keep == "best" and chosen.validation is not None:
        fields["best"] = {"images": chosen.validation.digest, "every_epochs": config.validate_every_epochs}
    return {**fields, "kind": "finetune", "size_px": point.spec.height, "images": chosen.index.digest, "parent": parent}


def made_of(config: FinetuneConfig, chosen: Chosen, point: StartingPoint) -> Made:
    """A trained model with what its bundle says of it."""
    lineage = {
        "kind": "classifier",
        "mode": config.mode,
        "parent": dict(point.parent),
        "trained_on": chosen.trained_on(),
        "images": len(chosen.index),
        "class_counts": dict(zip(chosen.index.labels, chosen.index.class_counts.tolist(), strict=True)),
    }
    if num_labelled(chosen.index) < len(chosen.index):
        lineage["unlabelled"] = len(chosen.index) - num_labelled(chosen.index)
    for parameter in point.model.parameters():
        parameter.requires_grad_(True)
    output = "multi_label_logits" if config.is_multi_label else "logits"
    return Made(point.model.eval(), point.spec, point.labels, output, lineage)


def score_config(
    run: Run, config: FinetuneConfig, *, model: str, folder: str, top_k: int, embeddings: bool
) -> ScoreConfig:
    """A scoring run of the corpus into the run's folder, where and how the run itself goes."""
    return ScoreConfig(
        source=config.corpus,
        model=model,
        out=str(run.folder.root / folder),
        runtime=config.runtime,
        top_k=top_k,
        embeddings=embeddings,
        address=config.address,
        workers=config.workers if isinstance(config.workers, int) else config.workers[1],
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        in_process_below=config.in_process_below if config.is_on_ray else 2**62,
        has_report=False,
    )


def refuse_unjudged(config: FinetuneConfig, chosen: Chosen) -> str:
    """The split to judge on; empty for none.

    Raises:
        DataError: It was named and is not there.
    """
    seen = chosen.validated_on if config.keep == "best" else ""
    name = chosen.judge(without=seen) if config.judge == AUTO else config.judge
    if name and not chosen.splits.counts.get(name):
        raise DataError(
            f"no image is in the split {name!r}, on which the result is to be judged",
            expected=f"one of {', '.join(chosen.splits.counts)}",
            fix="name another with judge=, or none with judge=''",
        )
    return name

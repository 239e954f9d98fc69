"""Fine-tune a classifier on the labels of a corpus, from a bundle of ours or a timm model.

``full`` trains all of it, step by step, in this process or on Ray Train; the accuracy on images set aside may be
measured every epoch (``validate_on``, ``validate_share``) and the best weights kept (``keep=best``; else the last).
``linear`` and ``head`` train the last layer alone: the frozen backbone runs once over the corpus, through the scoring
path, and what is left takes seconds: ``head`` solves it exactly (logistic regression, its penalty chosen by
cross-validation), ``linear`` steps through it with the losses and balances of ``full``.

With a ``teacher``, ``full`` distils: the model learns from what another bundle says of the same pixels too, and from
images without a label (learn/distillation.py).

The result is a bundle that `score`, `predict`, `evaluate` and ``timm.create_model("local-dir:...")`` take at once.

Example:
    >>> run(FinetuneConfig(corpus="corpora/trash", parent="lite0", out="bundles/trash", mode="head"))["bundle"]
    'bundles/trash'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eagleray.flows import finetune_teacher
from eagleray.flows.finetune_start import (
    FinetuneConfig,
    classification,
    made_of,
    num_labelled,
    select,
    start,
    work_key,
)
from eagleray.flows.training_config import feed_settings, train_settings

if TYPE_CHECKING:
    from eagleray.flows.training_data import Chosen
    from eagleray.flows.training_run import Made, Run
    from eagleray.learn.starting_point import StartingPoint
    from eagleray.learn.task import Transform
    from eagleray.learn.validation import Validation
    from eagleray.learn.work import Work

__all__ = ["CONFIG", "FinetuneConfig", "judge", "make_bundle", "make_work", "prepare", "run"]

CONFIG = FinetuneConfig
VALIDATION_BATCH = 64  # at most: without gradients it takes less memory than a training batch of that size


def run(config: FinetuneConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Fine-tunes, or resumes, or finds that there is nothing to do.

    Args:
        config: The run.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The summary: the bundle, the run's folder, steps, the last figures, the evaluation where a split is held out.

    Raises:
        ConfigError: ``out`` holds something else, an unknown parent, a checkpoint of another config.
        DataError: No labels, one class only, a class missing in the split, labels that the parent must know, a leak.
        ArtifactError: The corpus, the parent or every checkpoint does not hold.
        CapabilityError: A package, weights or memory that are not there; or a head that is not linear.
        TrainingDiverged: The loss is not finite.
        ClusterError, StorageError: As they say; the same command resumes.
    """
    if config.mode == "full":
        from eagleray.flows.train import run_training

        return run_training("eagleray.flows.finetune", config, is_quiet=is_quiet, is_live=is_live)
    from eagleray.flows.finetune_head import run_head

    return run_head(config, is_quiet=is_quiet, is_live=is_live)


def make_work(config: FinetuneConfig) -> Work:
    """The run before its first step."""
    from eagleray.flows.training_data import counts_in_words
    from eagleray.learn.augmentation import AugmentSettings, TrainTransform
    from eagleray.learn.balance import BalancedSampler
    from eagleray.learn.classification import ClassificationTask
    from eagleray.learn.work import Work

    chosen, notes = select(config)
    index = chosen.index
    point = start(config, index.labels)
    teacher = finetune_teacher.open_teacher(config, index.labels)
    augment = AugmentSettings(
        scale=config.crop_scale,
        flip_p=config.flip_p,
        vertical_flip_p=config.vertical_flip_p,
        rand_augment_ops=config.rand_augment_ops,
        rand_augment_magnitude=config.rand_augment_magnitude,
        jitter=config.jitter,
    )
    num_classes = len(index.labels) if config.is_multi_label else None
    student = ClassificationTask(
        point.model,
        point.spec,
        classification(config),
        class_counts=index.class_counts,
        num_images=num_labelled(index),
    )
    transform: Transform = TrainTransform(point.spec, augment, seed=config.seed, num_classes=num_classes)
    if config.distill.cache_teacher:
        transform = finetune_teacher.with_answers(config, transform, chosen)
    return Work(
        task=student if teacher is None else finetune_teacher.taught(config, student, teacher, index.labels),
        index=index,
        transform=transform,
        feed=feed_settings(config, keeps_last=True),
        settings=train_settings(config),
        key=work_key(config, chosen, point),
        sampler=BalancedSampler(index.first_targets, seed=config.seed) if config.balance == "sampler" else None,
        validation=make_validation(config, chosen, point),
        notes=(
            *(counts_in_words(chosen), *notes, *point.notes),
            *(() if teacher is None else (finetune_teacher.note_of(config, teacher),)),
        ),
    )


def prepare(run: Run, *, is_quiet: bool = False, is_live: bool | None = None) -> None:
    """What must be there before the first step: the answers of a teacher that is asked once an image."""
    config: FinetuneConfig = run.config  # type: ignore[assignment]
    finetune_teacher.ask(run, config, is_quiet=is_quiet, is_live=is_live)


def make_validation(config: FinetuneConfig, chosen: Chosen, point: StartingPoint) -> Validation | None:
    """What measures while the run goes on; None where no images are set aside for it."""
    from eagleray.learn.augmentation import EvalTransform
    from eagleray.learn.validation import Validation

    if chosen.validation is None:
        return None
    num_classes = len(chosen.index.labels) if config.is_multi_label else None
    return Validation(
        chosen.validation,
        EvalTransform(point.spec, num_classes),
        every_epochs=config.validate_every_epochs,
        keeps_best=config.keep == "best",
        batch_size=min(VALIDATION_BATCH, config.batch_size),
        num_threads=feed_settings(config, keeps_last=True).num_threads,
    )


def make_bundle(config: FinetuneConfig, state: Mapping[str, Any]) -> Made:
    """What the trained weights become.

    Args:
        config: The run's.
        state: State dict of the task.
    """
    chosen, _ = select(config)
    point = start(config, chosen.index.labels)
    teacher = finetune_teacher.open_teacher(config, chosen.index.labels)
    prefix = "backbone." if teacher is None else "student.backbone."
    point.model.load_state_dict(
        {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    )
    made = made_of(config, chosen, point)
    if teacher is None:
        return made
    return replace(made, lineage={**made.lineage, "teacher": finetune_teacher.teacher_lineage(config, teacher)})


def judge(run: Run) -> dict[str, Any]:
    """What the bundle is worth on a split that is held out; for run.json."""
    from eagleray.flows import finetune_judge

    config: FinetuneConfig = run.config  # type: ignore[assignment]
    return finetune_judge.judge(run, config, select(config)[0])

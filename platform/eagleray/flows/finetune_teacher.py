"""The teacher of a distillation: checked, asked once an image where its answers are cached, and put before the task.

Example:
    >>> bundle = open_teacher(config, index.labels)
    >>> task = taught(config, task, bundle, index.labels)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from eagleray.core.errors import ConfigError
from eagleray.flows import finetune_start, score
from eagleray.flows.finetune_start import FinetuneConfig, score_config
from eagleray.flows.training_run import Run
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.inputs import Selection

if TYPE_CHECKING:
    from torch import nn

    from eagleray.flows.training_data import Chosen
    from eagleray.learn.classification import ClassificationTask
    from eagleray.learn.task import Transform

ANSWERS = "teacher"  # the folder of the run that holds what it said
MOST_CACHED = 1000  # labels of a row, as `score` has them at most


def open_teacher(config: FinetuneConfig, labels: tuple[str, ...]) -> ModelBundle | None:
    """The teacher's bundle; None without one.

    Raises:
        DataError: It has other labels; they are named.
        ConfigError: Its outputs are of another kind, it lacks an embedding that is wanted, or has too many labels.
        ArtifactError: It does not hold.
    """
    if config.teacher is None:
        return None
    from eagleray.learn.teacher import check_teacher

    bundle = load_bundle(config.teacher)
    needs = config.distill.feature_weight > 0
    check_teacher(bundle, labels, is_multi_label=config.is_multi_label, needs_embedding=needs)
    if config.distill.cache_teacher and len(labels) > MOST_CACHED:
        raise ConfigError(
            f"{len(labels):,} labels, of which a cache holds {MOST_CACHED:,} a row",
            expected="fewer labels",
            fix="give distill.cache_teacher=false",
        )
    return bundle


def taught(config: FinetuneConfig, task: ClassificationTask, bundle: ModelBundle, labels: tuple[str, ...]) -> nn.Module:
    """The task with the teacher before it."""
    from eagleray.learn.distillation import DistillationTask
    from eagleray.learn.teacher import Teacher

    if config.distill.cache_teacher:
        return DistillationTask(task, config.distill, teacher_width=bundle.embedding_dim)
    return DistillationTask(task, config.distill, teacher=Teacher(bundle, labels=labels, seen_by=task.spec))


def with_answers(config: FinetuneConfig, transform: Transform, chosen: Chosen) -> Transform:
    """The transform that adds what a cached teacher has said; it is read when the first batch is made."""
    from eagleray.learn.teacher import CachedTeacher

    return CachedTeacher(
        transform,
        config.run_folder / ANSWERS,
        chosen.index,
        is_multi_label=config.is_multi_label,
        has_embedding=config.distill.feature_weight > 0,
    )


def ask(run: Run, config: FinetuneConfig, *, is_quiet: bool, is_live: bool | None) -> None:
    """Asks a cached teacher of every image that is trained on, by the scoring path; never twice of one."""
    if config.teacher is None or not config.distill.cache_teacher:
        return
    chosen, _ = finetune_start.select(config)
    asked = score_config(
        run, config, model=config.teacher, folder=ANSWERS, top_k=len(chosen.index.labels),
        embeddings=config.distill.feature_weight > 0,
    )  # fmt: skip
    trained_on = np.isin(chosen.everything.keys, chosen.index.keys)
    said = score.run(asked, selection=Selection(trained_on), is_quiet=is_quiet, is_live=is_live)
    run.where.update(said["where"])


def teacher_lineage(config: FinetuneConfig, bundle: ModelBundle) -> Mapping[str, Any]:
    """For the bundle's lineage: who taught it, and how."""
    return {
        "bundle": bundle.name,
        "model_digest": bundle.model_digest,
        "distill": config.distill.model_dump(mode="json"),
        "lineage": dict(bundle.lineage),
    }


def note_of(config: FinetuneConfig, bundle: ModelBundle) -> str:
    """What a person is told of the teacher before the first step."""
    told = config.distill
    how = "by its answers of each image as it is scored, cached" if told.cache_teacher else "on the student's own crops"
    features = f", embeddings matched with weight {told.feature_weight:g}" if told.feature_weight else ""
    return f"{bundle.name} teaches {how}: temperature {told.temperature:g}, alpha {told.alpha:g}{features}"

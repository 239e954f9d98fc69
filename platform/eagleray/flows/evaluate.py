"""Evaluate a model against the labels of a corpus: score one split, compare, leave the figures, the page and a record.

The split's images go through the same scoring path as an archive (resumable; in process, or on Ray where they are many)
and are read where they lie in the corpus. The same command again does nothing new.

With ``by`` the figures are also given for each value of metadata columns, with ``compare`` a second bundle is scored on
the same images and the difference judged.

Refuses: a corpus without labels, labels that the model does not know, a split that is not there or lacks a class, a
    leak between splits, a model that was trained on the images it is to be judged by.

Example:
    >>> run(EvaluateConfig(corpus="corpora/photos", model="bundles/lite0", out="runs/photos-eval"))["top1"]
    {'value': 0.896, 'low': 0.856, 'high': 0.932}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from eagleray.assure.comparison import Comparison, Contestant, compare
from eagleray.assure.evaluation import Evaluation, evaluate
from eagleray.assure.scored_answers import ScoredAnswers, read_answers
from eagleray.assure.slices import NO_VALUE, Slicing, slice_by
from eagleray.core import storage
from eagleray.core.errors import ConfigError, DataError
from eagleray.core.progress import notes
from eagleray.flows import score
from eagleray.flows.evaluate_subject import COMPARED, SCORING, SHOWN, EvaluateConfig, Subject, names_of, resolve
from eagleray.flows.scoring_place import scoring_place
from eagleray.vision.bootstrap import Resampling
from eagleray.vision.bundle import ModelBundle
from eagleray.vision.inputs import Selection
from eagleray.vision.metrics import Answers

__all__ = [
    "MOST_LABELS",
    "SCORING",
    "EvaluateConfig",
    "Judged",
    "Subject",
    "read_scored",
    "resolve",
    "run",
    "score_images",
    "targets_of",
]

MOST_LABELS = 1000  # of a row that scoring keeps


@dataclass(frozen=True)
class Judged:
    """What the answers are worth.

    Attributes:
        evaluation: Of the model.
        scored: What it said; images that not every model could be asked about count as not scored.
        slicings: One a column of ``by``.
        comparison: With the other bundle.
    """

    evaluation: Evaluation
    scored: ScoredAnswers
    slicings: Sequence[Slicing] = ()
    comparison: Comparison | None = None


def run(config: EvaluateConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Evaluates, or resumes, or finds that there is nothing to do.

    Args:
        config: The evaluation.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The metrics document, as metrics.json has it, with ``out`` and ``report``, the page's path.

    Raises:
        ConfigError: ``out`` holds something else, a column that the corpus lacks, or a wrong setting.
        DataError: The corpus has no labels, lacks the split or a class in it, or leaks; the model lacks its labels.
        ArtifactError: The bundle or the corpus does not hold.
        CapabilityError, StorageError, ClusterError, RunIncomplete: As in ``score``.
    """
    return run_on(resolve(config), is_quiet=is_quiet, is_live=is_live)


def run_on(subject: Subject, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """``run`` for a subject that is resolved already."""
    from eagleray.flows import evaluate_outputs

    note = notes(is_quiet=is_quiet)
    for sentence in subject.warnings:
        note(f"warning: {sentence}")
    _refuse_foreign(subject.root)
    root = storage.make_folder(subject.config.out)
    with storage.only_writer(root / ".lock", what=str(root)):
        score_images(subject, is_quiet=is_quiet, is_live=is_live)
        key = evaluate_outputs.key(subject)
        previous = evaluate_outputs.read_finished(subject, key)
        if previous is not None:
            note(f"nothing to do: {previous['n']:,} images are evaluated in {root}")
            return evaluate_outputs.summary(root, previous)
        return evaluate_outputs.finish(subject, key, _judge(subject))


def _refuse_foreign(root: Path) -> None:
    """A folder that holds something else is not written into."""
    if not root.is_dir() or (root / SCORING).is_dir() or (root / "metrics.json").exists():
        return
    found = sorted(path.name for path in root.iterdir() if path.name != ".lock")
    if found:
        raise ConfigError(
            f"{root} is not empty and holds no `eagleray evaluate`: {', '.join(found[:SHOWN])}",
            expected="a new or empty folder, or the folder of the evaluation to resume",
            fix="give another --out",
        )


def score_images(subject: Subject, *, is_quiet: bool, is_live: bool | None) -> None:
    """Scores the images that are kept, as an archive is scored: what is there already is not scored again."""
    for place, bundle in ((SCORING, subject.bundle), (COMPARED, subject.other)):
        if bundle is not None:
            scoring = _score_config(subject, place, bundle)
            score.run(scoring, selection=Selection(subject.keep), is_quiet=is_quiet, is_live=is_live)


def read_scored(subject: Subject) -> ScoredAnswers:
    """What the model said of the images that are kept, in their order.

    Raises:
        ArtifactError: A part of the scores does not hold.
    """
    return _read(subject, SCORING, subject.bundle)


def _read(subject: Subject, place: str, bundle: ModelBundle) -> ScoredAnswers:
    ids = [name.decode() for name in subject.index.ids[subject.keep].tolist()]
    return read_answers(subject.root / place, bundle.label_ids, ids)


def _score_config(subject: Subject, place: str, bundle: ModelBundle) -> score.ScoreConfig:
    """Every label's probability is kept: ROC-AUC, mAP and top-5 need more than the first answer."""
    asked = subject.config
    return score.ScoreConfig(
        source=asked.corpus,
        model=str(bundle.path),
        out=str(subject.root / place),
        top_k=min(MOST_LABELS, len(bundle.labels)),
        has_report=False,
        **scoring_place(asked),
    )


def _judge(subject: Subject) -> Judged:
    """Compares what was scored with the labels."""
    config, bundle, other = subject.config, subject.bundle, subject.other
    scored = read_scored(subject)
    compared = _read(subject, COMPARED, other) if other else None
    is_scored = scored.is_scored if compared is None else scored.is_scored & compared.is_scored
    scored = replace(scored, is_scored=is_scored)
    if not is_scored.any():
        raise DataError(
            f"none of {len(is_scored):,} images could be scored",
            expected="images that decode",
            fix=f"look at {subject.root / SCORING / 'quarantine.parquet'}",
        )
    groups = None
    if subject.splits.group_column:
        kept = subject.splits.groups[subject.keep][is_scored]
        groups = np.unique(kept, return_inverse=True)[1].astype(np.int64)
    answers = Answers(scored.probabilities[is_scored], targets_of(subject, bundle)[is_scored], config.threshold)
    resampling = Resampling(int(is_scored.sum()), config.resamples, config.seed, config.level, groups)
    comparison = None
    if other is not None and compared is not None:
        theirs = Answers(compared.probabilities[is_scored], targets_of(subject, other)[is_scored], config.threshold)
        first, second = names_of(bundle, other)
        comparison = compare(
            Contestant(first, bundle.label_ids, answers), Contestant(second, other.label_ids, theirs), resampling
        )
    slicings = [
        slice_by(column, _values(subject, column, is_scored), answers, resampling, minimum=config.min_slice)
        for column in config.by
    ]
    return Judged(evaluate(answers, bundle.labels, resampling), scored, slicings, comparison)


def _values(subject: Subject, column: str, is_scored: np.ndarray) -> list[str]:
    """What the metadata says of each judged image; NO_VALUE where it says nothing."""
    values = pc.fill_null(subject.index.columns[column], NO_VALUE).to_pylist()
    return [values[at] for at in np.flatnonzero(subject.keep)[is_scored].tolist()]


def targets_of(subject: Subject, bundle: ModelBundle | None = None) -> np.ndarray:
    """int64 (n,) class of each kept image, or bool (n, C), in the order of a bundle's labels: the subject's own, or
    that of one that it is compared with.
    """
    bundle, labels = bundle or subject.bundle, subject.index.labels
    place = {name: at for at, name in enumerate(bundle.label_ids)}
    to_model = np.array([place.get(name, -1) for name in labels.names], np.int64)
    is_kept = subject.keep[labels.images]
    rows = (np.cumsum(subject.keep) - 1)[labels.images[is_kept]]
    classes = to_model[labels.classes[is_kept]]
    if not subject.is_multi_label:
        return classes  # one a row, and rows ascend
    targets = np.zeros((int(subject.keep.sum()), len(place)), bool)
    targets[rows, classes] = True
    return targets

"""Evaluate a model against the labels of a corpus: score one split, compare, leave the figures, the page and a record.

The split's images go through the same scoring path as an archive (resumable; in process, or on Ray where they are many)
and are read where they lie in the corpus. The same command again does nothing new.

Refuses: a corpus without labels, labels that the model does not know, a split that is not there or lacks a class, a
    leak between splits, a model that was trained on the images it is to be judged by.

Example:
    >>> run(EvaluateConfig(corpus="corpora/photos", model="bundles/lite0", out="runs/photos-eval"))["top1"]
    {'value': 0.896, 'low': 0.856, 'high': 0.932}
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from eagleray.assure.evaluation import Evaluation, evaluate
from eagleray.assure.scored_answers import ScoredAnswers, read_answers
from eagleray.core import storage
from eagleray.core.config import Config
from eagleray.core.errors import ConfigError, DataError
from eagleray.flows import score
from eagleray.infer.runtimes import RUNTIMES
from eagleray.vision.bootstrap import Resampling
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.corpus import ShardManifest, open_corpus
from eagleray.vision.inputs import Selection
from eagleray.vision.metrics import Answers
from eagleray.vision.splits import ALL, CorpusIndex, SplitRule, Splits, assign, check_classes, check_leaks, read_index

SCORING = "scoring"  # under --out: the scoring run of the split's images
MOST_LABELS = 1000  # of a row that scoring keeps
SHOWN = 5

Note = Callable[[str], None]


class EvaluateConfig(Config):
    """What to judge, by which images, to where; the rest says how.

    Attributes:
        corpus: A corpus with labels.
        model: A bundle's folder.
        out: The evaluation's folder: new, empty, or of an evaluation over the same corpus.
        split: A split's name, or ``all``.
        splits: How the corpus is split where it has no ``split`` column, and what must not straddle.
        task: ``auto``: several labels an image when the bundle or the corpus has them.
        threshold: At or above it a label counts as answered; multi-label only.
        resamples: Of the bootstrap; 0 gives no intervals.
        level: Share of the resamples that an interval holds.
        seed: Of the resamples.
        allow_leaks: Judge in spite of a leak; the page says so.
        allow_missing: Judge although the split lacks a class of the corpus.
        allow_unknown: Leave out images with a label that the model does not know.
        runtime, address, workers, num_cpus, num_gpus, threads, decode_threads, batch_size, in_process_below: As in
            ``score``.
        has_report: Write report.html.
    """

    corpus: str
    model: str
    out: str
    split: str = Field("test", min_length=1)
    splits: SplitRule = Field(default_factory=SplitRule)
    task: Literal["auto", "single_label", "multi_label"] = "auto"
    threshold: float = Field(0.5, gt=0, lt=1)
    resamples: int = Field(1000, ge=0)
    level: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    allow_leaks: bool = False
    allow_missing: bool = False
    allow_unknown: bool = False
    runtime: str = "auto"
    address: str | None = None
    workers: int = Field(0, ge=0)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    decode_threads: int | None = Field(None, ge=0)
    batch_size: int = Field(32, ge=1, le=4096)
    in_process_below: int = Field(256, ge=0)
    has_report: bool = True

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, value: str) -> str:
        if value != "auto" and value not in RUNTIMES:
            raise ValueError(f"unknown runtime; one of auto, {', '.join(RUNTIMES)}")
        return value


@dataclass(frozen=True)
class Subject:
    """What is evaluated, resolved and checked.

    Attributes:
        config: As asked.
        corpus: Opened.
        bundle: Loaded.
        index: Ids and labels of the whole corpus.
        splits: Of the whole corpus.
        keep: bool (N,): the images to judge.
        is_multi_label: The task.
        left_out: Images of the split that are not judged, by reason.
        warnings: What was allowed and must be told.
    """

    config: EvaluateConfig
    corpus: ShardManifest
    bundle: ModelBundle
    index: CorpusIndex
    splits: Splits
    keep: np.ndarray
    is_multi_label: bool
    left_out: Mapping[str, int]
    warnings: Sequence[str]

    @property
    def root(self) -> Path:
        """The evaluation's folder."""
        return Path(self.config.out)


def run(config: EvaluateConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Evaluates, or resumes, or finds that there is nothing to do.

    Args:
        config: The evaluation.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The metrics document, as metrics.json has it, with ``out`` and ``report``, the page's path.

    Raises:
        ConfigError: ``out`` holds something else, or a wrong setting.
        DataError: The corpus has no labels, lacks the split or a class in it, or leaks; the model lacks its labels.
        ArtifactError: The bundle or the corpus does not hold.
        CapabilityError, StorageError, ClusterError, RunIncomplete: As in ``score``.
    """
    from eagleray.flows import evaluate_outputs

    note: Note = _silent if is_quiet else _say
    subject = resolve(config)
    for sentence in subject.warnings:
        note(f"warning: {sentence}")
    _refuse_foreign(subject.root)
    root = storage.make_folder(config.out)
    with storage.only_writer(root / ".lock", what=str(root)):
        score_images(subject, is_quiet=is_quiet, is_live=is_live)
        key = evaluate_outputs.key(subject)
        previous = evaluate_outputs.read_finished(subject, key)
        if previous is not None:
            note(f"nothing to do: {previous['n']:,} images are evaluated in {root}")
            return evaluate_outputs.summary(root, previous)
        scored = read_scored(subject)
        return evaluate_outputs.finish(subject, key, scored, _judge(subject, scored))


def resolve(config: EvaluateConfig, *, can_allow: bool = True) -> Subject:
    """Opens and checks everything that is needed before an image is scored.

    Args:
        config: The evaluation.
        can_allow: Whether a leak could be allowed at all, as an error says; what is certified allows none.

    Raises:
        ConfigError, DataError, ArtifactError: As ``run`` says.
    """
    bundle, corpus = load_bundle(config.model), open_corpus(config.corpus)
    index = read_index(corpus, config.splits)
    labels = index.labels
    if not len(labels.images):
        raise DataError(
            f"no image of {config.corpus} has a label",
            expected="class folders, or a column of labels in the source's metadata",
            fix="ingest it again with labels (--labels folder, or a metadata.csv beside the images)",
        )
    splits = assign(index, config.splits)
    in_split = splits.mask(config.split)
    warnings = (
        [] if config.split == ALL else check_leaks(splits, index, is_allowed=config.allow_leaks, can_allow=can_allow)
    )
    warnings += _seen_in_training(config, bundle, corpus, splits, can_allow=can_allow)
    missing = check_classes(splits, labels, config.split, is_allowed=config.allow_missing)
    if missing:
        warnings.append(
            f"{len(missing):,} classes of the corpus have no image in the split: {', '.join(missing[:SHOWN])}"
        )
    is_known = _known(config, bundle, index, in_split)
    is_labelled = labels.per_image > 0
    keep = in_split & is_labelled & is_known
    left_out = {
        "without a label": int((in_split & ~is_labelled).sum()),
        "with a label unknown to the model": int((in_split & ~is_known).sum()),
    }
    if not keep.any():
        raise DataError(
            f"no image of the split {config.split!r} can be judged: {_told(left_out)}",
            expected="images with labels that the model knows",
            fix="name another split or model",
        )
    is_multi = _is_multi_label(config, bundle, index, keep)
    return Subject(config, corpus, bundle, index, splits, keep, is_multi, left_out, tuple(warnings))


def _known(config: EvaluateConfig, bundle: ModelBundle, index: CorpusIndex, in_split: np.ndarray) -> np.ndarray:
    """bool (N,): the images all of whose labels the model has."""
    labels, have = index.labels, set(bundle.label_ids)
    is_unknown = np.array([name not in have for name in labels.names], bool)
    is_known = np.ones(labels.num_images, bool)
    is_known[labels.images[is_unknown[labels.classes]]] = False
    counts = labels.counts(in_split)
    unknown = [f"{labels.names[at]} ({counts[at]:,} images)" for at in np.flatnonzero(is_unknown & (counts > 0))]
    if unknown and not config.allow_unknown:
        by_name = {label.name: label.id for label in bundle.labels}
        hint = next((name for at, name in enumerate(labels.names) if is_unknown[at] and name in by_name), None)
        more = f", ... {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
        raise DataError(
            f"{len(unknown):,} labels of the split {config.split!r} are unknown to {config.model}: "
            + ", ".join(unknown[:SHOWN])
            + more,
            expected=f"label ids of the bundle: {', '.join(bundle.label_ids[:SHOWN])}, ... ({len(have):,} in all)"
            + (f"; {hint!r} is the name of its label {by_name[hint]}, not an id" if hint else ""),
            fix="label the corpus with the bundle's ids, take a model of these classes, or set allow_unknown=true to "
            "leave such images out",
        )
    return is_known


def _is_multi_label(config: EvaluateConfig, bundle: ModelBundle, index: CorpusIndex, keep: np.ndarray) -> bool:
    num_several = int((index.labels.per_image[keep] > 1).sum())
    if config.task == "single_label" and num_several:
        raise DataError(
            f"{num_several:,} images have several labels",
            expected="one label an image for task=single_label",
            fix="evaluate with task=multi_label",
        )
    if config.task == "auto":
        return bool(num_several) or bundle.output == "multi_label_logits"
    return config.task == "multi_label"


def _seen_in_training(
    config: EvaluateConfig, bundle: ModelBundle, corpus: ShardManifest, splits: Splits, *, can_allow: bool
) -> list[str]:
    """Whether the bundle's lineage says that it was trained on images that it is to be judged by.

    ``lineage["trained_on"]`` holds ``corpus`` (its digest), ``split`` (what Splits.to_json gave), ``names`` (the splits
    that were trained on).
    """
    trained = bundle.lineage.get("trained_on")
    if not isinstance(trained, Mapping) or trained.get("corpus") != corpus.digest:
        return []
    names, before = list(trained.get("names", ())), trained.get("split") or {}
    is_same = before.get("digest") == splits.digest
    if is_same and config.split != ALL and config.split not in names:
        return []
    if is_same:
        seen = f"{config.model} was trained on {', '.join(names)} of this very corpus, and {config.split} is asked for"
    else:
        seen = f"{config.model} was trained on this corpus under another split (by {before.get('how', 'none')})"
    if not config.allow_leaks:
        raise DataError(
            seen,
            expected=f"the split of the training, and a part of it that was held out; its rule: {before.get('rule')}",
            fix="name such a split" + (", or set allow_leaks=true to judge all the same" if can_allow else ""),
        )
    return [seen]


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
    scoring = _score_config(subject)
    score.run(scoring, selection=Selection(subject.keep), is_quiet=is_quiet, is_live=is_live)


def read_scored(subject: Subject) -> ScoredAnswers:
    """What the model said of the images that are kept, in their order.

    Raises:
        ArtifactError: A part of the scores does not hold.
    """
    ids = [name.decode() for name in subject.index.ids[subject.keep].tolist()]
    return read_answers(subject.root / SCORING, subject.bundle.label_ids, ids)


def _score_config(subject: Subject) -> score.ScoreConfig:
    """Every label's probability is kept: ROC-AUC, mAP and top-5 need more than the first answer."""
    asked = subject.config
    same = ("runtime", "address", "workers", "num_cpus", "num_gpus", "threads", "decode_threads", "batch_size")
    return score.ScoreConfig(
        source=asked.corpus,
        model=asked.model,
        out=str(subject.root / SCORING),
        top_k=min(MOST_LABELS, len(subject.bundle.labels)),
        in_process_below=asked.in_process_below,
        has_report=False,
        **{name: getattr(asked, name) for name in same},
    )


def _judge(subject: Subject, scored: ScoredAnswers) -> Evaluation:
    """Compares what was scored with the labels."""
    config, bundle = subject.config, subject.bundle
    if not scored.is_scored.any():
        raise DataError(
            f"none of {len(scored.is_scored):,} images could be scored",
            expected="images that decode",
            fix=f"look at {subject.root / SCORING / 'quarantine.parquet'}",
        )
    targets = targets_of(subject)[scored.is_scored]
    groups = None
    if subject.splits.group_column:
        kept = subject.splits.groups[subject.keep][scored.is_scored]
        groups = np.unique(kept, return_inverse=True)[1].astype(np.int64)
    answers = Answers(scored.probabilities[scored.is_scored], targets, config.threshold)
    resampling = Resampling(len(targets), config.resamples, config.seed, config.level, groups)
    return evaluate(answers, bundle.labels, resampling)


def targets_of(subject: Subject) -> np.ndarray:
    """int64 (n,) class of each kept image, or bool (n, C), in the bundle's order of labels."""
    labels = subject.index.labels
    place = {name: at for at, name in enumerate(subject.bundle.label_ids)}
    to_model = np.array([place.get(name, -1) for name in labels.names], np.int64)
    is_kept = subject.keep[labels.images]
    rows = (np.cumsum(subject.keep) - 1)[labels.images[is_kept]]
    classes = to_model[labels.classes[is_kept]]
    if not subject.is_multi_label:
        return classes  # one a row, and rows ascend
    targets = np.zeros((int(subject.keep.sum()), len(place)), bool)
    targets[rows, classes] = True
    return targets


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number) or "none"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _silent(text: str) -> None:
    """Says nothing."""

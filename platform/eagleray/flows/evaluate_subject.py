"""What an evaluation is about, resolved and checked before an image is scored: corpus, split, labels, one model or two.

Refuses what `evaluate` says: a corpus without labels, labels that a model does not know, a split or a column that is
not there, a leak between splits, a model that was trained on the images it is to be judged by.

Example:
    >>> resolve(EvaluateConfig(corpus="corpora/photos", model="bundles/lite0", out="runs/photos-eval")).keep.sum()
    250
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from eagleray.assure.slices import MINIMUM
from eagleray.core.errors import ConfigError, DataError
from eagleray.flows.scoring_place import ScoringPlace
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.corpus import ShardManifest, open_corpus
from eagleray.vision.splits import ALL, CorpusIndex, SplitRule, Splits, assign, check_classes, check_leaks, read_index

SCORING = "scoring"  # under --out: the scoring run of the split's images
COMPARED = "scoring-compared"  # that of the bundle to compare with
SHOWN = 5  # examples in a message


class EvaluateConfig(ScoringPlace):
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
        by: Metadata columns of the corpus; the figures are also given for each of their values.
        min_slice: Fewest images (or groups, where groups are drawn) of a slice that is judged; smaller are marked.
        compare: Another bundle's folder, scored on the same images; what the two differ by is given with its interval.
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
    has_report: bool = True
    by: tuple[str, ...] = ()
    min_slice: int = Field(MINIMUM, ge=1)
    compare: str | None = None

    @field_validator("by", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        """Takes "site,device" as a command line gives it."""
        words = value.split(",") if isinstance(value, str) else value
        return tuple(dict.fromkeys(word.strip() for word in words)) if isinstance(words, list | tuple) else words


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
        other: The bundle to compare with, loaded.
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
    other: ModelBundle | None = None

    @property
    def root(self) -> Path:
        """The evaluation's folder."""
        return Path(self.config.out)


def resolve(config: EvaluateConfig, *, can_allow: bool = True) -> Subject:
    """Opens and checks everything that is needed before an image is scored.

    Args:
        config: The evaluation.
        can_allow: Whether a leak could be allowed at all, as an error says; what is certified allows none.

    Raises:
        ConfigError, DataError, ArtifactError: As ``run`` says.
    """
    bundle, corpus = load_bundle(config.model), open_corpus(config.corpus)
    _check_columns(config, corpus)
    index = read_index(corpus, config.splits, also=config.by)
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
    other = _other(config, index, keep)
    if other is not None:
        warnings += _seen_in_training(config, other, corpus, splits, can_allow=can_allow)
    return Subject(config, corpus, bundle, index, splits, keep, is_multi, left_out, tuple(warnings), other)


def _check_columns(config: EvaluateConfig, corpus: ShardManifest) -> None:
    """Refuses a column that the corpus does not have, with the nearest names."""
    unknown = [name for name in config.by if name not in corpus.columns]
    if not unknown:
        return
    hints = {name: difflib.get_close_matches(name, corpus.columns, n=2) for name in unknown}
    told = "; ".join(
        f"{name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else "") for name, near in hints.items()
    )
    raise ConfigError(
        f"the corpus has no column {told}",
        expected=f"one of {', '.join(corpus.columns) or 'none: this corpus has no metadata'}",
        fix="name its columns with --by, or ingest the corpus again with a metadata.csv that has them",
    )


def _other(config: EvaluateConfig, index: CorpusIndex, keep: np.ndarray) -> ModelBundle | None:
    """The bundle to compare with; it knows every label of the images that are judged."""
    if config.compare is None:
        return None
    other, labels = load_bundle(config.compare), index.labels
    counts, have = labels.counts(keep), set(other.label_ids)
    unknown = [name for name, number in zip(labels.names, counts.tolist(), strict=True) if number and name not in have]
    if unknown:
        raise DataError(
            f"{len(unknown):,} labels of the split {config.split!r} are unknown to {config.compare}: "
            + ", ".join(unknown[:SHOWN]),
            expected="two models of the same classes: only then do the same images judge both",
            fix="compare with a model of these classes",
        )
    return other


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
        seen = f"{bundle.path} was trained on {', '.join(names)} of this very corpus, and {config.split} is asked for"
    else:
        seen = f"{bundle.path} was trained on this corpus under another split (by {before.get('how', 'none')})"
    if not config.allow_leaks:
        raise DataError(
            seen,
            expected=f"the split of the training, and a part of it that was held out; its rule: {before.get('rule')}",
            fix="name such a split" + (", or set allow_leaks=true to judge all the same" if can_allow else ""),
        )
    return [seen]


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number) or "none"


def names_of(first: ModelBundle, second: ModelBundle) -> tuple[str, str]:
    """What two bundles are called beside each other: their folders' names, or as much of the paths as parts them."""
    paths = first.path.resolve(), second.path.resolve()
    if paths[0].name != paths[1].name:
        return paths[0].name, paths[1].name
    return (str(first.path), str(second.path)) if first.path != second.path else (paths[0].name, "the same again")

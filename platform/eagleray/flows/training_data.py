"""Which images of a corpus a run trains on: a split of it, checked for leaks and for classes that are not there.

Example:
    >>> chosen = choose(config, split="train")
    >>> len(chosen.index), chosen.splits.counts
    (2022, {'train': 2022, 'test': 505})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagleray.flows.training_config import AUTO, TrainingConfig
from eagleray.vision.corpus import open_corpus
from eagleray.vision.splits import ALL, Splits, assign, check_classes, check_leaks, read_index

if TYPE_CHECKING:
    from eagleray.learn.corpus_index import CorpusIndex
    from eagleray.vision.corpus import ShardManifest

TRAIN = "train"
JUDGES = ("val", "valid", "validation", "test")  # the split that a page shows the result on, the first that is there


@dataclass(frozen=True)
class Chosen:
    """The images of a run.

    Attributes:
        corpus: Opened.
        index: Those of the split.
        splits: Of the whole corpus.
        split: The name of what was chosen.
        counts: Split name to label id to images.
        notes: What a person should know.
    """

    corpus: ShardManifest
    index: CorpusIndex
    splits: Splits
    split: str
    counts: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()

    @property
    def judge(self) -> str:
        """The split that the result is best shown on; empty when none is held out."""
        if self.split == ALL:
            return ""
        return next((name for name in JUDGES if name != self.split and self.splits.counts.get(name)), "")

    def trained_on(self) -> dict[str, Any]:
        """For a bundle's lineage; `evaluate` reads it."""
        names = list(self.splits.names) if self.split == ALL else [self.split]
        return {"corpus": self.corpus.digest, "split": self.splits.to_json(), "names": names}


def choose(
    config: TrainingConfig,
    *,
    labels: Sequence[str] | None = None,
    needs_classes: bool = False,
    is_allowed: bool = False,
) -> Chosen:
    """Opens a corpus and takes the images of the split that the config names.

    ``auto`` is ``train`` where the corpus has a split column or classes are to be judged, else every image.

    Args:
        config: The run's.
        labels: Label ids in class order; None takes those of the corpus, sorted.
        needs_classes: Whether every class of the corpus must be in the split.
        is_allowed: Whether a class may be missing all the same.

    Raises:
        ArtifactError: There is no corpus, or it does not hold.
        DataError: No such split, a leak, a class without an image, labels that are not among those given.
        ConfigError: The rule names a column that the corpus lacks.
    """
    from eagleray.learn.corpus_index import build_index

    corpus = open_corpus(config.corpus)
    whole = read_index(corpus, config.splits)
    splits = assign(whole, config.splits)
    has_column = bool(config.splits.column) and config.splits.column in corpus.columns
    name = config.split
    if name == AUTO:
        name = TRAIN if has_column or needs_classes else ALL
    mask = splits.mask(name)
    notes = [] if name == ALL else check_leaks(splits, whole, is_allowed=config.allow_leaks)
    if needs_classes:
        missing = check_classes(splits, whole.labels, name, is_allowed=is_allowed)
        notes += [f"no training image of {len(missing):,} classes: {', '.join(missing[:5])}"] if missing else []
    index = build_index(corpus, labels=labels).subset(mask)
    table = splits.class_counts(whole.labels)
    counts = {
        split: dict(zip(whole.labels.names, table[:, at].tolist(), strict=True))
        for at, split in enumerate(splits.names)
    }
    return Chosen(corpus, index, splits, name, counts, tuple(notes))


def counts_in_words(chosen: Chosen) -> str:
    """The class counts of what is trained on, most first; what is printed before the first step."""
    counts = dict(zip(chosen.index.labels, chosen.index.class_counts.tolist(), strict=True))
    ranked = sorted(counts, key=lambda label: -counts[label])
    shown = ", ".join(f"{label} {counts[label]:,}" for label in ranked[:12])
    more = f", ... {len(ranked) - 12:,} more classes" if len(ranked) > 12 else ""
    head = f"{len(chosen.index):,} images of the split {chosen.split!r} (by {chosen.splits.how})"
    if chosen.split == ALL:
        head = f"{len(chosen.index):,} images"
    return f"{head}; {shown}{more}" if ranked else f"{head}, without labels"

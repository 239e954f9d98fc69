"""Which images of a corpus a run trains on, and validates on: splits of it, checked for leaks and missing classes.

Example:
    >>> chosen = choose(config, split="train")
    >>> len(chosen.index), chosen.splits.counts
    (2022, {'train': 2022, 'test': 505})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import DataError
from eagleray.flows.training_config import AUTO, TrainingConfig
from eagleray.vision import splits as vision_splits
from eagleray.vision.corpus import open_corpus
from eagleray.vision.pieces import piece
from eagleray.vision.splits import ALL, Splits, assign, check_classes, check_leaks, read_index

if TYPE_CHECKING:
    from eagleray.learn.corpus_index import CorpusIndex
    from eagleray.vision.corpus import ShardManifest

TRAIN = "train"
VALIDATIONS = ("val", "valid", "validation")
JUDGES = (*VALIDATIONS, "test")  # the split that a page shows the result on, the first that is there


@dataclass(frozen=True)
class Chosen:
    """The images of a run.

    Attributes:
        corpus: Opened.
        index: Those of the split.
        splits: Of the whole corpus.
        split: The name of what was chosen.
        counts: Split name to label id to images.
        everything: Every image of the corpus, in class order of ``index``.
        whole: The same with the labels and columns that splits go by.
        notes: What a person should know.
        validation: Images that are not trained on but measured while the run goes on; None: there are none.
        validated_on: What they are: a split's name, or in words.
    """

    corpus: ShardManifest
    index: CorpusIndex
    splits: Splits
    split: str
    counts: Mapping[str, Mapping[str, int]]
    everything: CorpusIndex
    whole: vision_splits.CorpusIndex
    notes: tuple[str, ...] = ()
    validation: CorpusIndex | None = None
    validated_on: str = ""

    def judge(self, *, without: str = "") -> str:
        """The split that the result is best shown on, another than ``without`` where there is one; empty for none."""
        if self.split == ALL:
            return ""
        there = [name for name in JUDGES if name != self.split and self.splits.counts.get(name)]
        return next((name for name in there if name != without), there[0] if there else "")

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
    everything = build_index(corpus, labels=labels)
    table = splits.class_counts(whole.labels)
    counts = {
        split: dict(zip(whole.labels.names, table[:, at].tolist(), strict=True))
        for at, split in enumerate(splits.names)
    }
    return Chosen(corpus, everything.subset(mask), splits, name, counts, everything, whole, tuple(notes))


def with_validation(config: TrainingConfig, chosen: Chosen, *, split: str, share: float) -> Chosen:
    """Sets images with labels aside to validate on.

    Args:
        config: The run's.
        chosen: What ``choose`` gave for it, images without labels too.
        split: A split's name; ``auto``: ``val`` where one with labels is there and no share is given; empty: none.
        share: Of the images that would be trained on, in place of a split; 0: none.

    Raises:
        DataError: The split is not there, is the one that is trained on, or has no label; the piece is empty.
    """
    is_labelled = chosen.whole.labels.per_image > 0
    name = split
    if name == AUTO:
        others = [one for one in VALIDATIONS if chosen.splits.counts.get(one) and chosen.split not in (one, ALL)]
        there = [one for one in others if (chosen.splits.mask(one) & is_labelled).any()]
        name = there[0] if there and not share else ""
    if not (name or share):
        return chosen
    if name:
        if chosen.split in {name, ALL}:
            raise DataError(
                f"the run trains on {chosen.split!r} and is to validate on {name!r}",
                expected="two splits, or a share of one",
                fix="name another with validate_on=, or give validate_share=0.1",
            )
        held, told = chosen.splits.mask(name) & is_labelled, name
    else:
        mask = chosen.splits.mask(chosen.split)
        held, told = piece(chosen.whole, chosen.splits, mask & is_labelled, share), f"{share:.0%} of {chosen.split!r}"
        chosen = replace(chosen, index=chosen.everything.subset(mask & ~held))
    if not held.any():
        raise DataError(
            f"no image with a label to validate on: {told}",
            expected="one at least",
            fix="name another split with validate_on=" if name else "give a larger validate_share",
        )
    return replace(chosen, validation=chosen.everything.subset(held), validated_on=told)


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

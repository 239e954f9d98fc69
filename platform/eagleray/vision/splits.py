"""Splits of a corpus: which images are for training and which for testing, the same on every machine and every day.

Three ways, all deterministic and independent of the order of the corpus:

- a metadata column names each image's split (``split``, as the source had it);
- else by hash: of the image's content, or of its group (site, device, patient) so that a group never straddles. Adding
  images moves none of those already there;
- stratified, when asked: every class is divided by the shares, as far as groups allow.

A leak (one image or one group in two splits) is a DataError unless it is allowed; by hash or stratified there is none.

Example:
    >>> index = read_index(open_corpus("corpora/photos"), SplitRule())
    >>> splits = assign(index, SplitRule(group="patient"))
    >>> splits.counts
    {'train': 1610, 'test': 402}
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from eagleray.core.config import Config
from eagleray.core.errors import ConfigError, DataError
from eagleray.vision.corpus import ShardManifest, split_of
from eagleray.vision.stratification import Bags, stratify

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ALL = "all"  # the name under which every image is meant
AUTO, GROUP = "auto", "group"  # the column that says what must not straddle, where the corpus has it
SHOWN = 5  # examples in a message


class SplitRule(Config):
    """How a corpus is split.

    Attributes:
        column: Metadata column that names the split; used where the corpus has it, unless it is empty.
        fractions: Split name to its share, for a corpus without that column.
        group: Metadata column whose values never straddle; ``auto``: ``group`` where the corpus has it; empty: none.
        stratify: Divide every class by the shares. Images that are added later may move others.
        seed: Another seed is another, independent draw.
    """

    column: str = "split"
    fractions: dict[str, float] = Field(default_factory=lambda: {"train": 0.8, "test": 0.2})
    group: str = AUTO
    stratify: bool = False
    seed: int = 0

    @field_validator("fractions")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        try:
            split_of("0" * 64, value)
        except ConfigError as error:
            raise ValueError(f"{error.seen}; {error.expected}") from None
        if ALL in value:
            raise ValueError(f"{ALL!r} means every image; name the split otherwise")
        return value


@dataclass(frozen=True)
class LabelTable:
    """The labels of N images; an image may have none, one or several.

    Attributes:
        names: Label ids, sorted.
        images: int64 (M,): the image of each label, ascending.
        classes: int64 (M,): index into ``names``.
        num_images: N.
    """

    names: tuple[str, ...]
    images: Int64
    classes: Int64
    num_images: int

    @classmethod
    def of(cls, labels: Sequence[Sequence[str]] | pa.ChunkedArray) -> LabelTable:
        """Of one list of label ids an image."""
        lists = labels if isinstance(labels, pa.ChunkedArray) else pa.chunked_array([labels], pa.list_(pa.string()))
        whole = lists.combine_chunks() if lists.num_chunks != 1 else lists.chunk(0)
        values, parents = pc.list_flatten(whole), pc.list_parent_indices(whole)
        names = pc.unique(values).sort()
        classes = pc.index_in(values, value_set=names)
        pairs = np.unique(np.stack([_ints(parents), _ints(classes)], axis=1), axis=0)  # a label that stands twice: once
        return cls(tuple(names.to_pylist()), pairs[:, 0], pairs[:, 1], len(whole))

    @property
    def per_image(self) -> Int64:
        """int64 (N,): labels of each image."""
        return np.bincount(self.images, minlength=self.num_images)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has more than one."""
        return bool((self.per_image > 1).any())

    def counts(self, mask: Bool | None = None) -> Int64:
        """int64 (C,): images of each class, of those in ``mask``."""
        classes = self.classes if mask is None else self.classes[mask[self.images]]
        return np.bincount(classes, minlength=len(self.names))

    def of_image(self, image: int) -> tuple[str, ...]:
        """Label ids of one image."""
        first, last = np.searchsorted(self.images, [image, image + 1])
        return tuple(self.names[index] for index in self.classes[first:last])


@dataclass(frozen=True)
class CorpusIndex:
    """What a corpus says of its images without their pixels, in the order of its shards and their rows.

    Attributes:
        ids: bytes (N,): SHA-256 in hex.
        labels: Their labels.
        columns: The metadata columns that were read; text, with nulls.
    """

    ids: npt.NDArray[np.bytes_]
    labels: LabelTable
    columns: Mapping[str, pa.ChunkedArray]


def read_index(corpus: ShardManifest, rule: SplitRule, *, also: Sequence[str] = ()) -> CorpusIndex:
    """Reads ids, labels, and the columns that a rule needs.

    Args:
        corpus: Opened.
        rule: How it is to be split.
        also: Further metadata columns, which the corpus has.

    Raises:
        ConfigError: The rule names a group column that the corpus lacks.
    """
    group = group_column(corpus.columns, rule)
    names = [name for name in dict.fromkeys((rule.column, group, *also)) if name in corpus.columns]
    schema = pa.schema(
        [("id", pa.string()), ("labels", pa.list_(pa.string())), *((name, pa.string()) for name in names)]
    )
    parts = [pq.read_table(corpus.shard_path(shard), columns=schema.names).cast(schema) for shard in corpus.shards]
    table = pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()
    ids = np.array(table["id"].to_pylist(), "S64")
    return CorpusIndex(ids, LabelTable.of(table["labels"]), {name: table[name] for name in names})


def group_column(columns: Sequence[str], rule: SplitRule) -> str:
    """The column whose values must not straddle; empty when there is none.

    Raises:
        ConfigError: It was asked for by name and is not there.
    """
    if rule.group == AUTO:
        return GROUP if GROUP in columns else ""
    if rule.group and rule.group not in columns:
        near = difflib.get_close_matches(rule.group, columns, n=1)
        raise ConfigError(
            f"the corpus has no column {rule.group!r}" + (f"; did you mean {near[0]}?" if near else ""),
            expected=f"one of {', '.join(columns) or 'none: this corpus has no metadata'}",
            fix="name another group column, or none with group=''",
        )
    return rule.group


@dataclass(frozen=True)
class Splits:
    """Which split each image of a corpus is in.

    Attributes:
        names: Split names.
        codes: int64 (N,): index into ``names``; -1 in none.
        how: In words: by which column, or by what hash.
        rule: What was asked.
        group_column: The column whose values were kept together or checked; may be empty.
        groups: int64 (N,): the group of each image; images without one are each their own.
        digest: Of names, image ids and codes; independent of the order of the corpus.
    """

    names: tuple[str, ...]
    codes: Int64
    how: str
    rule: SplitRule
    group_column: str
    groups: Int64
    digest: str

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {name: int((self.codes == code).sum()) for code, name in enumerate(self.names)}

    @property
    def unassigned(self) -> int:
        """Images in no split."""
        return int((self.codes < 0).sum())

    def mask(self, name: str) -> Bool:
        """bool (N,): the images of a split, or every image for ``all``.

        Raises:
            DataError: There is no such split, or it is empty.
        """
        if name == ALL:
            return np.ones(len(self.codes), bool)
        if not self.counts.get(name):
            near = difflib.get_close_matches(name, self.names, n=1)
            there = ", ".join(f"{split} ({count:,} images)" for split, count in self.counts.items())
            raise DataError(
                f"no image is in the split {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                expected=f"one of {there}, or {ALL}, by {self.how}",
                fix="name another split",
            )
        return np.asarray(self.codes == self.names.index(name), np.bool_)

    def class_counts(self, labels: LabelTable) -> Int64:
        """int64 (C, S): images of each class in each split."""
        return np.stack([labels.counts(self.codes == code) for code in range(len(self.names))], axis=1)

    def to_json(self) -> dict[str, Any]:
        """What makes the same split again, and what it holds."""
        return {
            "how": self.how,
            "rule": self.rule.model_dump(mode="json"),
            "group_column": self.group_column,
            "images": self.counts,
            "unassigned": self.unassigned,
            "digest": self.digest,
        }


def assign(index: CorpusIndex, rule: SplitRule) -> Splits:
    """Puts every image into a split.

    Args:
        index: As ``read_index`` gives for this rule.
        rule: How.
    """
    column = group_column(tuple(index.columns), rule)
    texts, groups = _groups(index, column)
    if rule.column and rule.column in index.columns:
        names, codes = _by_column(index.columns[rule.column])
        how = f"column {rule.column!r}"
    else:
        names, points = tuple(rule.fractions), hash_points(texts, rule.seed)
        how = f"hash of the {f'group (column {column!r})' if column else 'image'}, seed {rule.seed}"
        if rule.stratify:
            labels = index.labels
            bags = Bags(groups, labels.images, labels.classes, len(labels.names))
            codes = stratify(bags, points, tuple(rule.fractions.values()))[groups]
            how = f"stratified by class, by {how}"
        else:
            codes = _by_points(points, tuple(rule.fractions.values()))[groups]
    return Splits(names, codes, how, rule, column, groups, _digest(names, index.ids, codes))


def _groups(index: CorpusIndex, column: str) -> tuple[list[str], Int64]:
    """The text that stands for each group, and the group of each image; an image without one is its own."""
    ids = [name.decode() for name in index.ids.tolist()]
    if not column:
        return ids, np.arange(len(ids), dtype=np.int64)
    named = pc.fill_null(index.columns[column], "")
    values = pa.array([value for value in pc.unique(named).to_pylist() if value], pa.string())
    codes = _ints(pc.fill_null(pc.index_in(named, value_set=values), -1))
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(values) + np.arange(len(alone))
    return [*values.to_pylist(), *(ids[at] for at in alone)], codes


def _by_column(values: pa.ChunkedArray) -> tuple[tuple[str, ...], Int64]:
    names = sorted(name for name in pc.unique(values).to_pylist() if name)
    codes = pc.fill_null(pc.index_in(values, value_set=pa.array(names, pa.string())), -1)
    return tuple(names), _ints(codes)


def hash_points(texts: Sequence[str], seed: int) -> npt.NDArray[np.float64]:
    """float64 (N,): a point in [0, 1) for each text, as ``corpus.split_of`` has it."""
    heads = b"".join(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8] for text in texts)
    return np.frombuffer(heads, ">u8").astype(np.float64) / 2.0**64


def _by_points(points: npt.NDArray[np.float64], shares: Sequence[float]) -> Int64:
    """The interval that each point is in; equal to ``corpus.split_of`` for each."""
    last = max(code for code, share in enumerate(shares) if share > 0)
    codes = np.searchsorted(np.cumsum(shares), points, side="right")
    return np.where(codes < len(shares), codes, last).astype(np.int64)


def _digest(names: Sequence[str], ids: npt.NDArray[np.bytes_], codes: Int64) -> str:
    order = np.argsort(ids, kind="stable")
    head = "\n".join(names).encode("utf-8", "surrogatepass")
    return hashlib.sha256(head + b"\0" + ids[order].tobytes() + codes[order].astype("<i8").tobytes()).hexdigest()


def check_leaks(splits: Splits, index: CorpusIndex, *, is_allowed: bool = False, can_allow: bool = True) -> list[str]:
    """Looks for an image or a group that stands in more than one split.

    Args:
        splits: Of the images of ``index``, which may be of several corpora.
        index: Ids and group column.
        is_allowed: Whether leaks are only told.
        can_allow: Whether the error may offer that.

    Returns:
        A sentence for each kind of leak.

    Raises:
        DataError: There is one and it is not allowed.
    """
    images = straddling(np.unique(index.ids, return_inverse=True)[1].astype(np.int64), splits.codes)
    found = []
    if len(images):
        names = [index.ids[at].decode()[:12] for at in images[:SHOWN]]
        found.append(f"{len(images):,} images stand in more than one split, e.g. {', '.join(names)}")
    groups = straddling(splits.groups, splits.codes)
    if len(groups) and splits.group_column:
        column = index.columns[splits.group_column]
        names = [str(column[int(at)].as_py()) for at in groups[:SHOWN]]
        told = f"{len(groups):,} groups (column {splits.group_column!r}) stand in more than one split"
        found.append(f"{told}, e.g. {', '.join(names)}")
    if found and not is_allowed:
        raise DataError(
            "a leak: " + "; ".join(found),
            expected=f"every image and every group in one split, by {splits.how}",
            fix="mend the column, split by hash (splits.column='')"
            + (", or set allow_leaks=true to judge all the same" if can_allow else ""),
        )
    return found


def straddling(members: Int64, codes: Int64) -> Int64:
    """int64: the first image of each member (image id or group) that stands in two splits or more.

    Args:
        members: int64 (N,): what must not straddle.
        codes: int64 (N,): the split of each; -1 counts as none.
    """
    is_in = np.flatnonzero(codes >= 0)
    pairs = np.unique(np.stack([members[is_in], codes[is_in]], axis=1), axis=0)
    twice = np.unique(pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]])
    first = np.full(int(members.max(initial=-1)) + 1, len(members), np.int64)
    np.minimum.at(first, members[is_in], is_in)
    return np.asarray(first[twice], np.int64)


def check_classes(splits: Splits, labels: LabelTable, name: str, *, is_allowed: bool = False) -> list[str]:
    """Looks for classes that the corpus has and a split has not.

    Returns:
        Their label ids.

    Raises:
        DataError: There are some and it is not allowed.
    """
    counts, whole = labels.counts(splits.mask(name)), labels.counts()
    missing = [index for index in range(len(labels.names)) if whole[index] and not counts[index]]
    if missing and not is_allowed:
        told = ", ".join(f"{labels.names[index]} ({whole[index]:,} elsewhere)" for index in missing[:SHOWN])
        more = f", ... {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
        raise DataError(
            f"{len(missing):,} of {len(labels.names):,} classes have no image in the split {name!r}: {told}{more}",
            expected="at least one image of every class of the corpus",
            fix="use splits.stratify=true or another splits.seed, or set allow_missing=true to judge without them",
        )
    return [labels.names[index] for index in missing]


def _ints(values: Any) -> Int64:
    return np.asarray(
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    ).astype(np.int64)

"""Laws of splits: the same everywhere, a group never straddles, classes are shared out, a leak is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from eagleray.core.errors import ConfigError, DataError
from eagleray.vision import splits as module
from eagleray.vision.corpus import split_of
from eagleray.vision.splits import CorpusIndex, LabelTable, SplitRule, assign, check_classes, check_leaks
from eagleray.vision.stratification import Bags, stratify
from hypothesis import given, settings
from hypothesis import strategies as st

THIRDS = {"train": 0.7, "val": 0.1, "test": 0.2}


def make_index(labels: Sequence[Sequence[str]], **columns: Sequence[str | None]) -> CorpusIndex:
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(labels))]
    table = {name: pa.chunked_array([pa.array(values, pa.string())]) for name, values in columns.items()}
    return CorpusIndex(np.array(ids, "S64"), LabelTable.of(labels), table)


def shuffled(index: CorpusIndex, seed: int = 0) -> tuple[CorpusIndex, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(index.ids))
    labels = [index.labels.of_image(int(at)) for at in order]
    columns = {name: pa.chunked_array([values.take(pa.array(order))]) for name, values in index.columns.items()}
    columns = {name: values.combine_chunks() for name, values in columns.items()}
    return CorpusIndex(
        index.ids[order], LabelTable.of(labels), {n: pa.chunked_array([v]) for n, v in columns.items()}
    ), order


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=8), max_size=20),
    st.integers(0, 9),
    st.sampled_from([(0.8, 0.2), (0.1, 0.2, 0.7), (1.0, 0.0)]),
)
def test_a_hashed_split_is_that_of_the_corpus(texts: list[str], seed: int, shares: tuple[float, ...]) -> None:
    fractions = {str(number): share for number, share in enumerate(shares)}
    codes = module._by_points(module.hash_points(texts, seed), shares)
    assert [str(code) for code in codes] == [split_of(text, fractions, seed) for text in texts]


@pytest.mark.parametrize("is_stratified", [False, True])
@pytest.mark.parametrize("group", ["", "site"])
def test_a_split_does_not_depend_on_the_order_of_the_corpus(group: str, is_stratified: bool) -> None:
    rule = SplitRule(group=group, stratify=is_stratified)
    rng = np.random.default_rng(3)
    labels = [[f"c{rng.integers(4)}"] for _ in range(200)]
    index = make_index(labels, site=[f"s{rng.integers(30)}" for _ in range(200)])
    other, order = shuffled(index)
    first, second = assign(index, rule), assign(other, rule)
    np.testing.assert_array_equal(first.codes[order], second.codes)
    assert first.digest == second.digest
    assert first.digest != assign(index, rule.model_copy(update={"seed": 1})).digest


def test_images_that_are_added_move_none_of_a_hashed_split() -> None:
    labels = [["a"]] * 300
    few, many = assign(make_index(labels[:200]), SplitRule()), assign(make_index(labels), SplitRule())
    np.testing.assert_array_equal(few.codes, many.codes[:200])
    assert 30 <= few.counts["test"] <= 52  # 40 +- 2 standard deviations


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_a_group_never_straddles(seed: int, is_stratified: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = [None if rng.random() < 0.2 else f"g{rng.integers(12)}" for _ in range(80)]
    index = make_index([[f"c{rng.integers(3)}"] for _ in groups], patient=groups)
    found = assign(index, SplitRule(group="patient", stratify=is_stratified, fractions=THIRDS))
    parts: dict[str, set[int]] = {}
    for group, code in zip(groups, found.codes.tolist(), strict=True):
        if group:
            parts.setdefault(group, set()).add(code)
    assert all(len(codes) == 1 for codes in parts.values())
    assert check_leaks(found, index) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_a_stratified_split_shares_out_every_class_to_within_one_image(sizes: list[int], seed: int) -> None:
    labels = [[f"c{number}"] for number, size in enumerate(sizes) for _ in range(size)]
    index = make_index(labels)
    found = assign(index, SplitRule(stratify=True, fractions=THIRDS, seed=seed))
    wanted = np.outer(sizes, list(THIRDS.values()))
    assert np.abs(found.class_counts(index.labels) - wanted).max() <= 1 + 1e-9


def test_a_stratified_split_of_several_labels_is_nearer_to_the_shares_than_a_hashed_one() -> None:
    rng = np.random.default_rng(5)
    labels = [[f"c{c}" for c in range(12) if rng.random() < (0.02, 0.1, 0.3)[c % 3]] for _ in range(600)]
    index = make_index(labels)

    def miss(rule: SplitRule) -> float:
        counts = assign(index, rule).class_counts(index.labels)
        return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - [0.8, 0.2]).mean())

    assert miss(SplitRule(stratify=True)) < 0.5 * np.mean([miss(SplitRule(seed=seed)) for seed in range(5)])


def test_stratify_gives_nothing_to_an_empty_share_and_a_place_to_what_has_no_label() -> None:
    bags = Bags(np.arange(5), np.array([0, 1]), np.array([0, 0]), 1)
    parts = stratify(bags, np.linspace(0, 0.9, 5), (0.5, 0.0, 0.5))
    assert set(parts.tolist()) == {0, 2}


def test_a_column_names_the_split_and_what_has_no_name_is_in_none() -> None:
    index = make_index([["a"], ["a"], ["b"], ["b"]], split=["train", "test", None, ""])
    found = assign(index, SplitRule())
    assert found.names == ("test", "train")
    assert found.counts == {"test": 1, "train": 1}
    assert found.unassigned == 2
    assert found.how == "column 'split'"
    assert found.mask("all").all()
    assert assign(index, SplitRule(column="")).unassigned == 0


def test_an_unknown_split_is_answered_with_those_there_are() -> None:
    found = assign(make_index([["a"]] * 3, split=["train", "train", "test"]), SplitRule())
    with pytest.raises(DataError, match="did you mean test") as caught:
        found.mask("tets")
    assert "train (2 images)" in caught.value.expected


def test_a_group_in_two_splits_is_a_leak_unless_it_is_allowed() -> None:
    index = make_index([["a"]] * 4, split=["train", "test", "test", "train"], group=["x", "x", "y", None])
    found = assign(index, SplitRule())
    with pytest.raises(DataError, match=r"1 groups \(column 'group'\) stand in more than one split, e.g. x"):
        check_leaks(found, index)
    assert len(check_leaks(found, index, is_allowed=True)) == 1
    free = SplitRule(group="")
    assert check_leaks(assign(index, free), index) == []


def test_an_image_in_two_splits_is_a_leak() -> None:
    """As of two corpora that are put together."""
    index = make_index([["a"]] * 3, split=["train", "test", "test"])
    twice = CorpusIndex(index.ids[[0, 1, 0]], index.labels, index.columns)
    with pytest.raises(DataError, match="1 images stand in more than one split"):
        check_leaks(assign(twice, SplitRule()), twice)


def test_a_class_that_a_split_lacks_is_said_with_where_it_is() -> None:
    index = make_index([["a"], ["b"], ["b"], ["a"]], split=["train", "train", "test", "train"])
    found = assign(index, SplitRule())
    with pytest.raises(DataError, match=r"1 of 2 classes have no image in the split 'test': a \(2 elsewhere\)"):
        check_classes(found, index.labels, "test")
    assert check_classes(found, index.labels, "test", is_allowed=True) == ["a"]
    assert check_classes(found, index.labels, "train") == []


def test_a_group_column_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean patient"):
        module.group_column(("patient", "split"), SplitRule(group="patent"))
    assert module.group_column(("patient",), SplitRule()) == ""
    assert module.group_column(("group",), SplitRule()) == "group"


def test_shares_must_sum_to_one_and_all_is_taken() -> None:
    for fractions in ({"a": 0.5}, {"all": 1.0}, {}):
        with pytest.raises(ValueError, match="fractions"):
            SplitRule(fractions=fractions)


def test_labels_of_images_without_one_and_with_several() -> None:
    labels = LabelTable.of([["b", "a"], [], ["b"], ["a", "a"]])
    assert labels.names == ("a", "b")
    assert labels.per_image.tolist() == [2, 0, 1, 1]
    assert labels.is_multi_label
    assert labels.counts().tolist() == [2, 2]
    assert labels.counts(np.array([True, True, False, False])).tolist() == [1, 1]
    assert [labels.of_image(at) for at in range(4)] == [("a", "b"), (), ("b",), ("a",)]
    empty = LabelTable.of([[], []])
    assert (empty.names, empty.num_images, empty.is_multi_label) == ((), 2, False)

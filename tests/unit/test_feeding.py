"""Laws of feeding: one order for every world size, every image once, whatever stops and whoever reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from eagleray.core.errors import ArtifactError, ConfigError, DataError
from eagleray.core.storage import sha256_bytes
from eagleray.learn.corpus_index import CorpusIndex, build_index
from eagleray.learn.feeding import Batch, Batches, FeedSettings
from eagleray.learn.order import Position, epoch_order, steps, steps_in
from eagleray.learn.task import Item, keys
from eagleray.vision.corpus import ShardManifest, open_corpus, samples
from eagleray.vision.shard_images import ShardImages

from tests.source_makers import ingest_here, make_folder

__all__ = ["ingest_here"]
NUM = 50


@pytest.fixture
def corpus(
    tmp_path: Path, make_photo: Callable[..., bytes], ingest_here: Callable[..., ShardManifest]
) -> ShardManifest:
    files = {f"class{n % 3}/{n}.png": make_photo(n, width=20, height=16, kind="PNG") for n in range(NUM)}
    ingest_here(make_folder(tmp_path, files), tmp_path / "corpus", shard_images=8)
    return open_corpus(tmp_path / "corpus")


@pytest.fixture
def index(corpus: ShardManifest) -> CorpusIndex:
    return build_index(corpus, columns=("site",))


class Lengths:
    """A transform that says what it was given: id, epoch, digest of the bytes."""

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        assert all(sha256_bytes(item.data) == item.id for item in items)
        return {"key": keys([item.id for item in items]), "epoch": np.full(len(items), epoch)}


def feed(index: CorpusIndex, *, rank: int = 0, world_size: int = 1, **settings: object) -> Batches:
    chosen = FeedSettings(**{"batch_size": 8, "window_shards": 2, **settings})  # type: ignore[arg-type]
    return Batches(index, Lengths(), chosen, rank=rank, world_size=world_size)


def global_batches(index: CorpusIndex, start: Position, count: int, world_size: int, **settings: object) -> list[Batch]:
    """The global batches of all ranks together, in rank order."""
    sources = [feed(index, rank=r, world_size=world_size, **settings).iterate(start) for r in range(world_size)]
    found = []
    for parts in islice(zip(*sources, strict=True), count):
        assert len({(part.position, part.epoch) for part in parts}) == 1
        arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
        found.append(replace(parts[0], arrays=arrays))
    for source in sources:
        source.close()  # type: ignore[attr-defined]
    return found


# The index


def test_the_index_says_what_the_corpus_says(corpus: ShardManifest, index: CorpusIndex) -> None:
    known = list(samples(corpus))
    assert [index.id_of(n) for n in range(NUM)] == [sample.id for sample in known]
    assert [tuple(index.labels[t] for t in index.targets_of(n)) for n in range(NUM)] == [s.labels for s in known]
    assert list(index.metadata["site"]) == [sample.metadata["site"] for sample in known]
    assert index.class_counts.tolist() == [17, 17, 16]
    assert (index.keys == keys([sample.id for sample in known])).all()


def test_a_subset_keeps_ids_targets_and_metadata_together(index: CorpusIndex) -> None:
    mask = index.metadata_mask("site", "site-1") | (index.first_targets == 0)
    part, places = index.subset(mask), np.flatnonzero(mask)
    assert [part.id_of(n) for n in range(len(part))] == [index.id_of(n) for n in places]
    assert [part.targets_of(n) for n in range(len(part))] == [index.targets_of(n) for n in places]
    assert index.subset(places[::-1]).digest == part.digest != index.digest


def test_labels_that_are_no_classes_are_named(corpus: ShardManifest) -> None:
    with pytest.raises(DataError, match="class1, class2"):
        build_index(corpus, labels=("class0",))
    assert build_index(corpus, labels=("more", "class2", "class1", "class0")).class_counts.tolist() == [0, 16, 17, 17]
    with pytest.raises(ConfigError, match="no column split"):
        build_index(corpus, columns=("split",))


# Single images


def test_single_images_are_those_of_the_shard(corpus: ShardManifest) -> None:
    with ShardImages(corpus.path) as images:
        for shard in corpus.shards:
            table = pq.read_table(corpus.path / shard["path"], columns=["id", "image"])
            for row in reversed(range(table.num_rows)):
                assert images.read(shard["path"], row) == table["image"][row].as_py()


def test_an_image_of_our_shards_is_one_read_of_its_own_bytes(
    corpus: ShardManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("a whole row group was read")

    monkeypatch.setattr("eagleray.vision.shard_images._Shard._read_by_arrow", refuse)
    with ShardImages(corpus.path) as images:
        assert all(images.read(shard["path"], row) for shard in corpus.shards for row in range(shard["rows"]))


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_dictionary": True}, {"data_page_size": 64}])
def test_images_of_a_shard_that_others_wrote_are_the_same(
    corpus: ShardManifest, tmp_path: Path, options: dict[str, object]
) -> None:
    shard = corpus.shards[0]["path"]
    table = pq.read_table(corpus.path / shard)
    pq.write_table(table, tmp_path / "other.parquet", row_group_size=3, **options)
    with ShardImages(tmp_path) as images:
        read = [images.read("other.parquet", row) for row in range(table.num_rows)]
    assert read == table["image"].to_pylist()


def test_a_missing_shard_and_a_missing_row_are_said(corpus: ShardManifest) -> None:
    with ShardImages(corpus.path) as images:
        with pytest.raises(ArtifactError, match="is missing"):
            images.read("shards/none.parquet", 0)
        with pytest.raises(ArtifactError, match="row 99"):
            images.read(corpus.shards[0]["path"], 99)


# The order


def test_the_order_is_a_permutation_that_seed_and_epoch_decide(index: CorpusIndex) -> None:
    orders = [epoch_order(index, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(index, seed=0, epoch=0).tolist()


def test_images_of_a_window_of_shards_come_together(index: CorpusIndex) -> None:
    order = epoch_order(index, seed=0, epoch=0, window_shards=2)
    shards = index.shard[order]
    runs = 1 + sum(a != b for a, b in pairwise(shards))
    assert runs > 15  # mixed within a window
    seen: list[set[int]] = []
    at = 0
    while at < NUM:  # each window: two shards, all of their images, before any other
        window = set(shards[at : at + 9].tolist())
        size = int(np.isin(index.shard, list(window)).sum())
        assert len(window) <= 2
        assert set(shards[at : at + size].tolist()) == window
        seen.append(window)
        at += size
    assert sum(map(len, seen)) == len(index.shards)


def test_repeats_are_kept(index: CorpusIndex) -> None:
    repeats = np.arange(NUM) % 3
    order = epoch_order(index, seed=0, epoch=0, repeats=repeats)
    assert np.bincount(order, minlength=NUM).tolist() == repeats.tolist()


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slices_of_all_ranks_are_the_global_batches(world_size: int, keeps_last: bool) -> None:
    order = np.random.default_rng(0).permutation(29)
    ranks = [list(steps(order, 8, rank=r, world_size=world_size, keeps_last=keeps_last)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {steps_in(29, 8, keeps_last=keeps_last)}
    for number, parts in enumerate(zip(*ranks, strict=True)):
        whole = order[number * 8 : number * 8 + 8].tolist()
        assert [p for part in parts if part.weight for p in part.positions] == whole
        assert sum(part.weight for part in parts) == pytest.approx(world_size)
        for part in parts:  # the mean over ranks of weighted means is the mean over the batch
            assert part.weight == pytest.approx(len(part.positions) * world_size / len(whole))


def test_a_rank_without_an_image_of_a_short_batch_keeps_company_at_weight_zero() -> None:
    parts = [next(steps(np.array([7]), 8, rank=rank, world_size=2, keeps_last=True)) for rank in range(2)]
    assert [(part.positions.tolist(), part.weight) for part in parts] == [([7], 0.0), ([7], 2.0)]


# Batches


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_what_a_batch_holds_does_not_depend_on_threads(index: CorpusIndex, num_threads: int) -> None:
    plain = global_batches(index, Position(), 9, 1, num_threads=0)
    other = global_batches(index, Position(), 9, 1, num_threads=num_threads)
    for one, two in zip(plain, other, strict=True):
        assert one.position == two.position
        assert all((one.arrays[name] == two.arrays[name]).all() for name in one.arrays)


def test_the_order_is_the_same_for_one_and_two_workers(index: CorpusIndex) -> None:
    one, two = (global_batches(index, Position(), 13, size) for size in (1, 2))
    assert [b.arrays["key"].tolist() for b in one] == [b.arrays["key"].tolist() for b in two]
    assert [b.position for b in one] == [b.position for b in two]
    assert [b.epoch for b in one] == [0] * 6 + [1] * 6 + [2]


def test_targets_come_with_the_images(index: CorpusIndex) -> None:
    target = dict(zip(index.keys.tolist(), index.first_targets.tolist(), strict=True))
    for batch in global_batches(index, Position(), 6, 1):
        assert batch.arrays["target"].tolist() == [target[key] for key in batch.arrays["key"].tolist()]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2), (1, 2, 4)])
def test_every_image_of_an_epoch_is_seen_once_across_resumes_and_other_worker_counts(
    index: CorpusIndex, sizes: tuple[int, ...]
) -> None:
    undisturbed = global_batches(index, Position(epoch=2), 7, 1, keeps_last=True)
    start, found = Position(epoch=2), []
    for size, count in zip(sizes, (2, 3, 2), strict=True):
        part = global_batches(index, start, count, size, keeps_last=True)
        start = part[-1].position
        found += part
    seen = [key for batch in found for key in batch.arrays["key"].tolist()]
    # a rank without an image of the last, short batch repeats one at weight 0: two images, four workers
    assert sorted(set(seen)) == sorted(index.keys.tolist())
    assert len(seen) - NUM == max(0, sizes[-1] - 2)
    assert [sorted(set(b.arrays["key"].tolist())) for b in found] == [
        sorted(b.arrays["key"].tolist()) for b in undisturbed
    ]
    following = next(iter(global_batches(index, start, 1, 1)))
    assert (following.epoch, following.position.consumed) == (3, 8)


def test_a_source_can_be_left_in_the_middle(index: CorpusIndex) -> None:
    source: Iterator[Batch] = feed(index, num_threads=2).iterate(Position())
    next(source)
    source.close()  # type: ignore[attr-defined]


def test_a_batch_that_does_not_divide_and_a_corpus_too_small_are_refused(index: CorpusIndex) -> None:
    with pytest.raises(ConfigError, match="does not divide among 3 workers"):
        feed(index, world_size=3)
    with pytest.raises(DataError, match="50 images, batches of 64"):
        feed(index, batch_size=64)

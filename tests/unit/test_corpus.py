"""Laws of the corpus: its digest, its splits, what it refuses to open, and what comes back."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from eagleray.core.errors import ArtifactError, ConfigError, DataError
from eagleray.vision import corpus as corpora
from eagleray.vision.corpus import (
    Sample,
    ShardManifest,
    corpus_digest,
    open_corpus,
    read_rows,
    row_hash,
    samples,
    split_of,
    uris_by_id,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.source_makers import ingest_here, make_folder, make_zip

__all__ = ["ingest_here"]
IDS = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]


@pytest.fixture
def corpus(
    tmp_path: Path, make_photo: Callable[..., bytes], ingest_here: Callable[..., ShardManifest]
) -> ShardManifest:
    files = {f"class{n % 3}/{n:02d}.jpg": make_photo(n) for n in range(20)}
    files["class0/again.jpg"] = files["class1/01.jpg"]
    files["class2/empty.jpg"] = b""
    return ingest_here(make_zip(tmp_path, files), tmp_path / "corpus", shard_images=6)


# Splits


def test_splits_have_their_shares_and_names() -> None:
    fractions = {"train": 0.7, "val": 0.1, "test": 0.2}
    found = [split_of(image_id, fractions) for image_id in IDS]
    for name, share in fractions.items():
        # Binomial with n = 4000: five standard deviations are at most 0.04.
        assert abs(found.count(name) / len(IDS) - share) < 0.04


def test_a_split_is_a_function_of_content_alone() -> None:
    fractions = {"train": 0.5, "test": 0.5}
    shuffled = random.Random(1).sample(IDS, len(IDS))
    assert {i: split_of(i, fractions) for i in IDS} == {i: split_of(i, fractions) for i in shuffled}
    same = sum(split_of(i, fractions) == split_of(i, fractions, seed=1) for i in IDS)
    assert abs(same / len(IDS) - 0.5) < 0.04  # another seed is an independent draw


def test_a_growing_train_share_moves_images_only_into_train() -> None:
    small, large = {"train": 0.6, "test": 0.4}, {"train": 0.8, "test": 0.2}
    assert all(split_of(i, large) == "train" for i in IDS if split_of(i, small) == "train")


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 0.5, "b": 0.6}])
def test_shares_that_do_not_sum_to_one_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="splits"):
        split_of(IDS[0], fractions)


def test_shares_as_people_type_them_are_taken() -> None:
    assert split_of(IDS[0], {"a": 0.1, "b": 0.2, "c": 0.7}) in "abc"
    assert {split_of(i, {"never": 0.0, "all": 1.0}) for i in IDS} == {"all"}


def test_the_sources_own_split_wins() -> None:
    sample = Sample(IDS[0], "file:///a", 1, 1, "JPEG", metadata={"split": "holdout"})
    assert sample.split({"train": 1.0}) == "holdout"
    assert Sample(IDS[0], "file:///a", 1, 1, "JPEG").split({"train": 1.0}) == "train"


# Digest

WORD = st.text(max_size=4)
ROW = st.tuples(st.sampled_from(IDS[:9]), st.lists(WORD, max_size=2), st.dictionaries(WORD, WORD, max_size=3))


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(ROW, max_size=8), seed=st.integers(0, 99))
def test_the_digest_does_not_depend_on_order(rows: list[tuple[str, list[str], dict[str, str]]], seed: int) -> None:
    hashes = [row_hash(image_id, tuple(labels), metadata) for image_id, labels, metadata in rows]
    shuffled = random.Random(seed).sample(hashes, len(hashes))
    assert corpus_digest(b"".join(hashes)) == corpus_digest(b"".join(shuffled))


def test_the_digest_depends_on_every_image_label_and_value() -> None:
    base = (IDS[0], ("a", "b"), {"site": "n"})
    others = [
        (IDS[1], ("a", "b"), {"site": "n"}),
        (IDS[0], ("b", "a"), {"site": "n"}),
        (IDS[0], ("a",), {"site": "n"}),
        (IDS[0], ("a", "b"), {"site": "s"}),
        (IDS[0], ("a", "b"), {}),
    ]
    assert len({row_hash(*row) for row in [base, *others]}) == 6
    assert corpus_digest(row_hash(*base)) != corpus_digest(row_hash(*base) * 2) != corpus_digest(b"")


# Opening


def test_a_corpus_opens_as_it_was_made(corpus: ShardManifest) -> None:
    assert open_corpus(corpus.path) == corpus
    assert corpora.is_corpus(corpus.path)
    assert not corpora.is_corpus(corpus.path / "shards")
    assert ShardManifest.from_json(json.loads(json.dumps(corpus.to_json())), corpus.path) == corpus
    verify(corpus)


def test_a_moved_corpus_opens(corpus: ShardManifest, tmp_path: Path) -> None:
    moved = corpus.path.rename(tmp_path / "elsewhere")
    assert open_corpus(moved).digest == corpus.digest
    assert open_corpus(f"file://{moved}").digest == corpus.digest


def test_samples_and_rows_are_what_was_ingested(corpus: ShardManifest) -> None:
    found = {sample.id: sample for sample in samples(corpus)}
    assert len(found) == corpus.images == 20
    seen = []
    for shard in corpus.shards:
        table = read_rows(corpus.shard_path(shard))
        assert table.schema.names == ["id", "uri", "image"]
        seen += table.to_pylist()
    assert all(hashlib.sha256(row["image"]).hexdigest() == row["id"] for row in seen)
    assert {row["id"]: row["uri"] for row in seen} == {i: sample.uri for i, sample in found.items()}
    assert all((s.width, s.height, s.format) == (96, 72, "JPEG") for s in found.values())
    assert all(Sample.from_json(json.loads(json.dumps(s.to_json()))) == s for s in found.values())
    (duplicate,) = uris_by_id(corpus).to_pylist()
    assert found[duplicate["id"]].uri != duplicate["uri"]


def test_row_groups_are_read_in_part(corpus: ShardManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus.shard_path(corpus.shards[0])
    assert read_rows(path, 0, 1).num_rows == read_rows(path).num_rows
    assert read_rows(path, 1).num_rows == read_rows(path, 1, 5).num_rows == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": corpora.CORPUS_SCHEMA + 1}, "has schema 2"),
        ({"images": 21}, "was changed"),
        ({"digest": "0" * 64}, "was changed"),
        ({"schema": None}, "no schema number"),
        ({"shards": None}, "no corpus manifest"),
        ({"extra": 1}, "no corpus manifest"),
    ],
)
def test_a_changed_manifest_is_refused(corpus: ShardManifest, change: dict[str, object], match: str) -> None:
    path = corpus.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=match) as caught:
        open_corpus(corpus.path)
    assert caught.value.expected
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_manifest_is_refused(corpus: ShardManifest, text: str) -> None:
    (corpus.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError):
        open_corpus(corpus.path)


def test_a_missing_or_cut_shard_is_named(corpus: ShardManifest) -> None:
    path = corpus.shard_path(corpus.shards[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=path.name):
        open_corpus(corpus.path)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{path.name} is missing"):
        open_corpus(corpus.path)


def test_a_flipped_byte_is_found_by_verify(corpus: ShardManifest) -> None:
    path = corpus.shard_path(corpus.shards[1])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=path.name):
        verify(open_corpus(corpus.path))


def test_no_corpus_and_an_unfinished_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no corpus"):
        open_corpus(tmp_path)
    with pytest.raises(ArtifactError, match="holds no corpus"):
        open_corpus(tmp_path / "nowhere")
    (tmp_path / "_ingest").mkdir()
    with pytest.raises(ArtifactError, match="an unfinished corpus") as caught:
        open_corpus(tmp_path)
    assert "resumes" in caught.value.fix


def test_image_bytes_are_neither_compressed_nor_repeated_in_the_footer(corpus: ShardManifest) -> None:
    with pq.ParquetFile(corpus.shard_path(corpus.shards[0])) as file:
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index("image"))
        assert column.compression == "UNCOMPRESSED"
        assert column.statistics is None or not column.is_stats_set


def test_a_corpus_shard_is_itself_a_source(
    corpus: ShardManifest, tmp_path: Path, ingest_here: Callable[..., ShardManifest]
) -> None:
    with pytest.raises(DataError, match="is a corpus already"):
        ingest_here(str(corpus.path), tmp_path / "again")
    again = ingest_here(f"{corpus.path}/shards/*.parquet", tmp_path / "again")
    assert again.digest == corpus.digest


def test_make_folder_says_the_same(
    corpus: ShardManifest, tmp_path: Path, make_photo: Callable[..., bytes], ingest_here: Callable[..., ShardManifest]
) -> None:
    """One image more, and the digest is another; its removal brings the digest back."""
    files = {f"class{n % 3}/{n:02d}.jpg": make_photo(n) for n in range(20)}
    files |= {"class0/again.jpg": files["class1/01.jpg"], "class2/empty.jpg": b""}
    assert ingest_here(make_folder(tmp_path / "x", files), tmp_path / "one").digest == corpus.digest
    files["class0/new.jpg"] = make_photo(99)
    assert ingest_here(make_folder(tmp_path / "y", files), tmp_path / "two").digest != corpus.digest

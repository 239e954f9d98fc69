"""One law over every entry of SOURCES: the same archive in any form is the same corpus, and nothing in it is lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from eagleray.core.errors import DataError
from eagleray.vision import sources
from eagleray.vision.corpus import ShardManifest, samples, uris_by_id, verify
from eagleray.vision.sources import LISTING_SCHEMA, SOURCES

from tests.source_makers import MAKERS, Files, ingest_here

__all__ = ["ingest_here"]
KINDS = list(SOURCES)
Ingest = Callable[..., ShardManifest]


@pytest.fixture(scope="module")
def files(make_photo: Callable[..., bytes]) -> Files:
    """23 files in three classes: 18 photos, two exact copies of one of them, and three that are no photos."""
    photos = {
        f"class{n % 3}/photo {n:02d}.jpg": make_photo(n, width=40 + n, kind="PNG" if n % 5 == 0 else "JPEG")
        for n in range(18)
    }
    photo = photos["class1/photo 01.jpg"]
    copies = {"class0/again.jpg": photo, "class2/again.jpg": photo}
    broken = {"class0/empty.jpg": b"", "class1/note.jpg": b"no image", "class2/half.jpg": photo[: len(photo) // 2]}
    return {**photos, **copies, **broken}


def listed(source: str) -> pa.Table:
    return pa.Table.from_batches(list(sources.list_items(source)), LISTING_SCHEMA)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_recognised(kind: str, files: Files, tmp_path: Path) -> None:
    assert sources.detect(MAKERS[kind](tmp_path, files)) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_is_listed_and_read_once(kind: str, files: Files, tmp_path: Path) -> None:
    table = listed(MAKERS[kind](tmp_path, files))
    assert len(set(table["uri"].to_pylist())) == table.num_rows == len(files)
    found = dict(sources.read_items(table))
    assert list(found) == list(range(len(files)))
    assert Counter(found.values()) == Counter(files.values())
    seen = Counter((data, table["labels"][row].as_py()[0]) for row, data in found.items())
    assert seen == Counter((data, name.split("/")[0]) for name, data in files.items())


@pytest.mark.parametrize("kind", KINDS)
def test_items_can_be_read_in_any_order_and_in_parts(kind: str, files: Files, tmp_path: Path) -> None:
    table = listed(MAKERS[kind](tmp_path, files))
    whole = [data for _, data in sources.read_items(table)]
    order = list(range(table.num_rows))
    random.Random(1).shuffle(order)
    assert [data for _, data in sources.read_items(table.take(order))] == [whole[at] for at in order]
    assert [data for _, data in sources.read_items(table.slice(7, 5))] == whole[7:12]


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_that_of_the_folder(kind: str, files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    """Equal digests: neither form nor place nor order nor the cut into shards changes what the images are."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = ingest_here(MAKERS["folder"](tmp_path / "a", files), tmp_path / "expected")
    corpus = ingest_here(MAKERS[kind](tmp_path / "b", files), tmp_path / "out", shard_images=4)
    totals = (corpus.uris_in, corpus.images, corpus.duplicates, corpus.quarantined)
    assert totals == (23, 18, 2, 3) == (23, expected.images, expected.duplicates, expected.quarantined)
    assert corpus.digest == expected.digest
    assert corpus.columns == ("site",)
    verify(corpus)


@pytest.mark.parametrize("kind", KINDS)
def test_every_uri_is_accounted_for(kind: str, files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    import pyarrow.parquet as pq

    source = MAKERS[kind](tmp_path, files)
    corpus = ingest_here(source, tmp_path / "out", shard_images=4)
    kept = [sample.uri for sample in samples(corpus)]
    more = uris_by_id(corpus)["uri"].to_pylist()
    refused = pq.read_table(corpus.path / "quarantine.parquet")["uri"].to_pylist()
    assert sorted(kept + more + refused) == sorted(listed(source)["uri"].to_pylist())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_again_does_nothing(kind: str, files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = MAKERS[kind](tmp_path, files)
    corpus = ingest_here(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert ingest_here(source, tmp_path / "out") == corpus
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_source_is_the_same_corpus(kind: str, files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    (tmp_path / "a").mkdir()
    source = MAKERS[kind](tmp_path / "a", files)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "a"), f"/{tmp_path.name}/{kind}", recursive=True)
    try:
        remote = f"memory://{tmp_path.name}/{kind}/{Path(source).name}"
        corpus = ingest_here(remote, tmp_path / "remote")
        assert corpus.digest == ingest_here(source, tmp_path / "local").digest
        assert (corpus.uris_in, corpus.quarantined) == (23, 3)
        assert all("memory://" in sample.uri for sample in samples(corpus))
        assert not sources.is_random_access(remote)
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("folder", "listing")])
def test_a_cut_archive_is_an_error_and_leaves_nothing(
    kind: str, files: Files, tmp_path: Path, ingest_here: Ingest
) -> None:
    source = MAKERS[kind](tmp_path, files)
    path = Path(source.replace("{000..001}", "001"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError) as caught:
        ingest_here(source, tmp_path / "out")
    assert path.name in caught.value.seen
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_source_is_an_error(kind: str, files: Files, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path, files).replace("{000..001}", "000")
    with pytest.raises(DataError, match="does not exist"):
        list(sources.list_items(f"{source}-gone"))

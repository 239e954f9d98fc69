"""Laws of the ingest flow: whatever interrupts it, the same command ends in the same corpus."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core.errors import ArtifactError, ConfigError, DataError, RunIncomplete, StorageError
from eagleray.flows import ingest
from eagleray.flows.ingest import IngestConfig
from eagleray.vision import sources
from eagleray.vision.corpus import ShardManifest, open_corpus, samples, uris_by_id, verify
from eagleray.vision.slices import SliceSize, write_slices

from tests.source_makers import Files, ingest_here, make_folder, make_listing, make_zip, map_here

__all__ = ["ingest_here"]
Ingest = Callable[..., ShardManifest]
SMALL = {"shard_images": 5}


@pytest.fixture(scope="module")
def files(make_photo: Callable[..., bytes]) -> Files:
    """24 files: 18 photos in 3 classes, 4 copies of three of them in other classes, one empty, one no photo."""
    photos = {f"class{n % 3}/{n:02d}.jpg": make_photo(n, width=40, height=30) for n in range(18)}
    copies = {"class2/copy.jpg": photos["class0/00.jpg"], "class1/copy.jpg": photos["class0/00.jpg"]}
    copies |= {"class0/copy.jpg": photos["class1/01.jpg"], "class0/one more.jpg": photos["class2/17.jpg"]}
    return {**photos, **copies, "class1/empty.jpg": b"", "class2/text.jpg": b"no photo"}


def left_over(root: Path) -> list[str]:
    """Everything in a corpus folder that its manifest does not list."""
    corpus = open_corpus(root)
    known = {"manifest.json", ".lock", *corpus.files, *(str(shard["path"]) for shard in corpus.shards)}
    files = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in known)


def run_and_die(config: IngestConfig, step: int) -> bool:
    """Runs in a child process that dies, as by kill -9, at its n-th change of the disk; whether it died."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 99
    left = step

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os._exit(99)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "mkdir", "unlink", "rmdir", "rename"):
        setattr(os, name, deadly(getattr(os, name)))
    ingest.map_units = map_here
    try:
        ingest.run(config, is_quiet=True)
    finally:
        os._exit(0)


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.full)])
def test_killed_between_any_two_steps_it_ends_in_the_same_corpus(
    stride: int, files: Files, tmp_path: Path, ingest_here: Ingest
) -> None:
    source = make_zip(tmp_path, files)
    expected = ingest_here(source, tmp_path / "undisturbed", **SMALL)
    out = tmp_path / "killed"
    config = IngestConfig(sources=source, out=str(out), in_process_below=10**9, **SMALL)
    deaths = 0
    for step in range(1, 400, stride):
        shutil.rmtree(out, ignore_errors=True)
        if not run_and_die(config, step):
            break
        deaths += 1
        corpus = ingest_here(source, out, **SMALL)
        totals = (corpus.digest, corpus.images, corpus.duplicates, corpus.quarantined, corpus.uris_in)
        assert totals == (expected.digest, 18, 4, 2, 24), f"killed at step {step}"
        assert left_over(out) == []
        verify(corpus)
    assert deaths > 100 // stride


def test_killed_again_and_again_it_gets_there(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    config = IngestConfig(sources=source, out=str(tmp_path / "out"), in_process_below=10**9, **SMALL)
    deaths = 0
    while run_and_die(config, 40):
        deaths += 1
        assert deaths < 20
    assert deaths > 1
    assert ingest_here(source, tmp_path / "out", **SMALL).digest == ingest_here(source, tmp_path / "b", **SMALL).digest


def test_no_space_at_any_sync_and_the_same_command_again(
    files: Files, tmp_path: Path, ingest_here: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_zip(tmp_path, files)
    expected = ingest_here(source, tmp_path / "expected", **SMALL)
    real, left = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    for number in range(1, 200, 11):
        left = number
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            ingest_here(source, tmp_path / "out", **SMALL)
            break
        except StorageError as error:
            failures += "No space left" in error.seen
        assert not (tmp_path / "out" / "manifest.json").exists() or open_corpus(tmp_path / "out").uris_in == 24
        assert ingest_here(source, tmp_path / "out", **SMALL).digest == expected.digest
        assert left_over(tmp_path / "out") == []
    assert failures > 2


@pytest.mark.usefixtures("ingest_here")
def test_nothing_but_bad_items_is_a_corpus_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_zip(tmp_path, {"a/1.jpg": b"", "a/2.jpg": b"no photo"})
    corpus = ingest.run(IngestConfig(sources=source, out=str(tmp_path / "out"), in_process_below=10**9))
    assert "none of the 2 items is an image" in capsys.readouterr().err
    assert (corpus.uris_in, corpus.images, corpus.quarantined, corpus.shards) == (2, 0, 2, ())
    assert open_corpus(tmp_path / "out") == corpus


def test_committed_slices_are_not_done_again(
    files: Files, tmp_path: Path, ingest_here: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def three_only(units: Any, *rest: Any) -> Any:
        for answer in map_here(units[: 3 - len(done)] if len(done) < 3 else units, *rest):
            done.append(answer["unit"])
            yield answer

    source = make_zip(tmp_path, files)
    monkeypatch.setattr(ingest, "map_units", three_only)
    config = IngestConfig(sources=source, out=str(tmp_path / "out"), in_process_below=10**9, **SMALL)
    with pytest.raises(RunIncomplete, match="2 of 5 slices"):
        ingest.run(config, is_quiet=True)
    with pytest.raises(ArtifactError, match="unfinished"):
        open_corpus(tmp_path / "out")
    ingest.run(config, is_quiet=True)
    assert sorted(done) == [f"{number:06d}" for number in range(5)]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_listing_does_not_change_the_corpus(
    seed: int, files: Files, tmp_path: Path, ingest_here: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digest, kept uris, duplicates and quarantine: all the same, whatever comes first and wherever slices are cut."""
    source = make_folder(tmp_path, files)
    expected = ingest_here(source, tmp_path / "expected")
    real = sources.list_items

    def shuffled(*args: Any, **kwargs: Any) -> Any:
        table = pa.Table.from_batches(list(real(*args, **kwargs)))
        order = random.Random(seed).sample(range(table.num_rows), table.num_rows)
        yield from table.take(order).to_batches(max_chunksize=7)

    monkeypatch.setattr(sources, "list_items", shuffled)
    corpus = ingest_here(source, tmp_path / "out", shard_images=3 + seed)
    assert corpus.digest == expected.digest
    for name in ("duplicates.parquet", "quarantine.parquet"):
        assert pq.read_table(corpus.path / name).equals(pq.read_table(expected.path / name))
    by_uri = [{s.uri: s for s in samples(c)} for c in (corpus, expected)]
    assert by_uri[0] == by_uri[1]


def test_the_smallest_uri_is_kept_of_copies_that_say_the_same(
    tmp_path: Path, make_photo: Any, ingest_here: Ingest
) -> None:
    photo = make_photo(1)
    names = [f"a/{n}.jpg" for n in "dbcae"]
    source = make_zip(tmp_path, {**dict.fromkeys(names, photo), "b/x.jpg": make_photo(2)})
    corpus = ingest_here(source, tmp_path / "out", shard_images=1)
    metadata_free = [s.uri.split("::")[0] for s in samples(corpus)]
    assert sorted(metadata_free) == ["zip://a/a.jpg", "zip://b/x.jpg"]
    more = [uri.split("::")[0] for uri in uris_by_id(corpus)["uri"].to_pylist()]
    assert more == ["zip://a/b.jpg", "zip://a/c.jpg", "zip://a/d.jpg", "zip://a/e.jpg"]


def test_a_source_given_twice_is_all_duplicates(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    one = ingest_here(make_zip(tmp_path, files), tmp_path / "one", **SMALL)
    both = ingest_here([make_zip(tmp_path, files), make_folder(tmp_path, files)], tmp_path / "both", **SMALL)
    assert (both.images, both.duplicates, both.quarantined, both.uris_in) == (18, 18 + 8, 4, 48)
    assert both.digest == one.digest
    assert sum(shard["rows"] for shard in both.shards) == 18
    assert left_over(both.path) == []


def test_a_listing_that_names_a_file_twice_keeps_it_once(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = Path(make_listing(tmp_path, files))
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines, *lines[1:]]))
    for shard_images in (2, 100):
        corpus = ingest_here(str(source), tmp_path / f"out{shard_images}", shard_images=shard_images)
        assert (corpus.images, corpus.duplicates, corpus.quarantined, corpus.uris_in) == (18, 26, 4, 48)
        assert ingest_here(str(source), tmp_path / f"out{shard_images}", shard_images=shard_images) == corpus


def test_sources_that_changed_are_told_and_the_corpus_stays(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_folder(tmp_path, files)
    corpus = ingest_here(source, tmp_path / "out", **SMALL)
    (Path(source) / "class0" / "00.jpg").unlink()
    (Path(source) / "class0" / "03.jpg").write_bytes(b"changed")
    (Path(source) / "class0" / "new.jpg").write_bytes(b"new")
    (Path(source) / "class0" / "newer.jpg").write_bytes(b"newer")
    with pytest.raises(DataError, match="2 new, 1 changed, 1 vanished") as caught:
        ingest_here(source, tmp_path / "out", **SMALL)
    assert "another --out" in caught.value.fix
    assert open_corpus(tmp_path / "out") == corpus


def test_a_crash_past_the_manifest_is_cleaned_up(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    corpus = ingest_here(source, tmp_path / "out", **SMALL)
    for name in ("_ingest/slices/000000.parquet", "_ledger/x/parts/000000.json", "shards/part-late.parquet"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"left")
    assert ingest_here(source, tmp_path / "out", **SMALL) == corpus
    assert left_over(tmp_path / "out") == []


# What is refused


def test_a_folder_with_anything_else_is_not_touched(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        ingest_here(make_zip(tmp_path, files), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_other_sources_or_settings_are_refused(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    ingest_here(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="other sources or settings"):
        ingest_here(make_folder(tmp_path, files), tmp_path / "out")
    with pytest.raises(ConfigError, match="other sources or settings"):
        ingest_here(source, tmp_path / "out", labels="none")
    ingest_here(source, tmp_path / "out", workers=3)  # where it runs is no setting of the corpus


def test_an_unfinished_ingest_of_other_sources_is_refused(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    config = IngestConfig(sources=source, out=str(tmp_path / "out"), in_process_below=10**9, **SMALL)
    assert run_and_die(config, 40)
    with pytest.raises(ConfigError, match="an unfinished ingest of other"):
        ingest_here(make_folder(tmp_path, files), tmp_path / "out", **SMALL)


def test_out_inside_a_source_is_refused(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_folder(tmp_path, files)
    with pytest.raises(ConfigError, match="lies in the source"):
        ingest_here(source, Path(source) / "corpus")
    assert not (Path(source) / "corpus").exists()


def test_a_corpus_of_a_newer_schema_is_not_touched(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    ingest_here(source, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ArtifactError, match="schema 2"):
        ingest_here(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere", "a.txt", "empty"])
def test_a_source_that_is_none_leaves_no_folder(name: str, tmp_path: Path, ingest_here: Ingest) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        ingest_here(str(tmp_path / name), tmp_path / "out")
    assert (name in caught.value.seen, bool(caught.value.expected), bool(caught.value.fix)) == (True, True, True)
    assert not (tmp_path / "out").exists()


def test_all_faults_of_the_config_are_told_at_once() -> None:
    from eagleray.core.config import load

    with pytest.raises(ConfigError) as caught:
        load(IngestConfig, overrides={"sources": [], "kind": "rar", "splits": {"a": 0.5}, "shard_image": 3})
    text = str(caught.value)
    for part in ("sources", "zip, tar", "shares that sum to 1", "did you mean shard_images", "out: missing"):
        assert part in text


def test_one_source_may_be_given_as_text(tmp_path: Path) -> None:
    config = IngestConfig(sources=str(tmp_path / "a"), out="b")  # type: ignore[arg-type]
    assert config.sources == (str(tmp_path / "a"),)
    here = IngestConfig(sources=("a",), out="b")
    assert here.sources == (str(Path.cwd() / "a"),)  # the same corpus from any working directory


# Slices


def test_slices_end_at_their_size(files: Files, tmp_path: Path) -> None:
    source = make_zip(tmp_path, files)
    largest = max(len(data) for data in files.values())
    for images, size in ((4, 1 << 30), (1000, 3 * largest), (1000, 1)):
        batches = sources.list_items(source)
        listed = write_slices(batches, tmp_path / "home", SliceSize(images, size))
        tables = [pq.read_table(tmp_path / "home" / path) for path, _ in listed.slices]
        assert sum(table.num_rows for table in tables) == listed.uris == len(files)
        assert all(table.num_rows <= images for table in tables)
        assert all(table.num_rows == 1 or sum(table["size"].to_pylist()) <= size for table in tables)
    assert len(tables) >= len(files) - 1  # one each; an empty file goes with its neighbour


def test_too_many_columns_of_metadata_are_refused(tmp_path: Path, ingest_here: Ingest) -> None:
    table = pa.table({"image": [b"x"], **{f"c{n}": ["v"] for n in range(1001)}})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="1000 different columns"):
        ingest_here(str(tmp_path / "a.parquet"), tmp_path / "out")


# Real archives


def test_the_hostile_archive_is_fully_accounted_for(shared_data: Path, tmp_path: Path, ingest_here: Ingest) -> None:
    import zipfile

    corpus = ingest_here(str(shared_data / "hostile.zip"), tmp_path / "out", shard_images=20)
    with zipfile.ZipFile(shared_data / "hostile.zip") as archive:
        count = sum(not info.is_dir() for info in archive.infolist())
    assert corpus.uris_in == count == corpus.images + corpus.duplicates + corpus.quarantined
    assert corpus.duplicates == 2  # three files are byte-identical
    refused = pq.read_table(corpus.path / "quarantine.parquet")
    assert "zip://hostile.csv::" in " ".join(refused["uri"].to_pylist())
    verify(corpus)


def test_the_one_empty_file_of_plantvillage_is_found(shared_data: Path, tmp_path: Path, ingest_here: Ingest) -> None:
    corpus = ingest_here(str(shared_data / "plantvillage_apple.zip"), tmp_path / "out")
    assert (corpus.uris_in, corpus.quarantined) == (1464, 1)
    (refused,) = pq.read_table(corpus.path / "quarantine.parquet").to_pylist()
    assert refused["reason"] == "empty"
    assert corpus.columns == ("group", "split")
    assert {sample.metadata["split"] for sample in samples(corpus)} == {"train", "test"}
    assert len({sample.labels for sample in samples(corpus)}) == 5


def test_worker_processes_give_the_same_corpus(files: Files, tmp_path: Path, ingest_here: Ingest) -> None:
    source = make_zip(tmp_path, files)
    expected = ingest_here(source, tmp_path / "here", **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        from eagleray.flows.units import map_units

        patch.setattr(ingest, "map_units", map_units)
        corpus = ingest.run(IngestConfig(sources=source, out=str(tmp_path / "out"), **SMALL), is_quiet=True)
    assert (corpus.digest, corpus.uris_in) == (expected.digest, 24)

"""Laws of the frozen input: units stay, new and changed items get units of their own, duplicates meet in one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.infer.score_rows import Duplicates, UnitRows
from eagleray.vision import inputs, shards, sources
from eagleray.vision.corpus import ShardManifest
from eagleray.vision.images import Limits
from eagleray.vision.inputs import (
    FrozenInput,
    Selection,
    freeze_corpus,
    freeze_listing,
    read_unit_listing,
    unit_images,
    unit_sizes,
)


def make_folder(home: Path, count: int) -> Path:
    for number in range(count):
        path = home / f"class{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number % 251]) * (100 + number))
    return home


def freeze(folder: Path, home: Path) -> FrozenInput:
    return freeze_listing(str(folder), sources.list_items(str(folder)), home)


def uris(frozen: FrozenInput) -> list[str]:
    return [uri for unit in frozen.units for uri in read_unit_listing(unit)["uri"].to_pylist()]


def test_every_item_is_in_exactly_one_unit(tmp_path: Path) -> None:
    frozen = freeze(make_folder(tmp_path / "a", 300), tmp_path / "input")
    assert frozen.images_in == 300
    assert len(set(uris(frozen))) == 300 == len(uris(frozen)) == sum(unit["images"] for unit in frozen.units)
    assert len(frozen.units) >= 12  # enough for several workers
    assert len({unit["unit"] for unit in frozen.units}) == len(frozen.units)


def test_freezing_again_changes_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 60)
    first, second = freeze(folder, tmp_path / "input"), freeze(folder, tmp_path / "input")
    assert first == second
    assert not any(second.changes.values())


def test_a_moved_run_keeps_its_units(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 60)
    first = freeze(folder, tmp_path / "input")
    listed = uris(first)
    (tmp_path / "input").rename(tmp_path / "moved")
    second = freeze(folder, tmp_path / "moved")
    assert [unit["unit"] for unit in second.units] == [unit["unit"] for unit in first.units]
    assert uris(second) == listed


def test_new_changed_and_vanished_items(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 90)
    before = freeze(folder, tmp_path / "input")
    (folder / "class0" / "new.jpg").write_bytes(b"new")
    changed, vanished = folder / "class1" / "0001.jpg", folder / "class2" / "0002.jpg"
    changed.write_bytes(b"changed")
    vanished.unlink()
    after = freeze(folder, tmp_path / "input")
    assert after.changes == {"new": 1, "changed": 1, "vanished": 1}
    assert after.images_in == 90
    assert Counter(uris(after)) == Counter(f"file://{path}" for path in folder.rglob("*.jpg"))
    kept = {unit["unit"] for unit in before.units} & {unit["unit"] for unit in after.units}
    derived = [unit for unit in after.units if unit["derived_from"]]
    fresh = [unit for unit in after.units if unit["unit"] not in kept and not unit["derived_from"]]
    assert 1 <= len(derived) <= 2
    assert {unit["derived_from"] for unit in derived} <= {unit["unit"] for unit in before.units} - kept
    assert {uri.rsplit("/", 1)[1] for unit in fresh for uri in read_unit_listing(unit)["uri"].to_pylist()} == {
        "new.jpg",
        "0001.jpg",
    }
    assert not any(freeze(folder, tmp_path / "input").changes.values())


def test_a_touched_file_counts_as_changed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 20)
    freeze(folder, tmp_path / "input")
    path = folder / "class0" / "0000.jpg"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))
    assert freeze(folder, tmp_path / "input").changes == {"new": 0, "changed": 1, "vanished": 0}


def test_files_of_one_size_meet_in_one_unit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 200)
    for number in (3, 77, 150):
        (folder / f"zz{number}.jpg").write_bytes(b"x" * 50_000)
    frozen = freeze(folder, tmp_path / "input")
    homes = {
        unit["unit"] for unit in frozen.units for size in read_unit_listing(unit)["size"].to_pylist() if size == 50_000
    }
    assert len(homes) == 1


def test_windows_do_not_lose_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 50)
    frozen = freeze(make_folder(tmp_path / "a", 333), tmp_path / "input")
    assert len(set(uris(frozen))) == 333


def test_a_unit_s_file_stays_small_in_a_large_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "FILE_UNITS", 3)
    frozen = freeze(make_folder(tmp_path / "a", 333), tmp_path / "input")
    assert len(frozen.units) > 3
    assert max(unit["first_group"] for unit in frozen.units) == 2
    assert len(set(uris(frozen))) == 333


def test_another_source_is_refused(tmp_path: Path) -> None:
    freeze(make_folder(tmp_path / "a", 5), tmp_path / "run" / "input")
    with pytest.raises(ConfigError, match="another source"):
        freeze(make_folder(tmp_path / "b", 5), tmp_path / "run" / "input")


def test_units_grow_with_the_archive() -> None:
    assert unit_sizes(0, 5, is_last=True) == [5]
    assert unit_images(0) == 128
    small = unit_sizes(0, 5000, is_last=True)
    assert sum(small) == 5000
    assert small == sorted(small, reverse=True)  # they shrink towards the end
    assert (small[0], small[-2]) == (128, 32)
    assert sum(unit_sizes(0, 5000, is_last=False)) == 5000
    sizes, cut = [], 0
    while cut < 100_000_000:
        sizes.append(unit_images(cut))
        cut += sizes[-1]
    assert max(sizes) == 4096
    assert len(sizes) < 30_000


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardManifest:
    """Three shards of 50 rows in row groups of 8; ids are the numbers of the rows."""
    monkeypatch.setattr(shards, "ROW_GROUP_IMAGES", 8)
    home, parts = tmp_path / "corpus", []
    (home / "shards").mkdir(parents=True)
    for shard in range(3):
        with shards.ShardWriter(home / "shards" / f"{shard}.parquet", ()) as writer:
            for row in range(50):
                name = f"{50 * shard + row:03d}"
                writer.add({"id": name, "uri": f"file:///{name}", "image": name.encode(), "labels": []})
        parts.append({"path": f"shards/{shard}.parquet", **writer.part})
    return ShardManifest(home, 150, 0, 3, 153, "d" * 64, (), tuple(parts), ())


def rows_of(frozen: FrozenInput) -> list[str]:
    units = [UnitRows.open(unit, Limits(), Duplicates("")) for unit in frozen.units]
    assert all(rows.num_images == unit["images"] for rows, unit in zip(units, frozen.units, strict=True))
    return [item.id or "" for rows in units for item in rows.items()]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_a_selection_is_read_where_it_lies_and_nothing_else(
    corpus: ShardManifest, tmp_path: Path, share: float
) -> None:
    keep = np.random.default_rng(0).random(150) < share
    frozen = freeze_corpus(corpus, tmp_path / "input", Selection(keep))
    assert rows_of(frozen) == [f"{row:03d}" for row in np.flatnonzero(keep)]
    assert frozen.images_in == keep.sum() == sum(unit["images"] for unit in frozen.units)
    assert not list((tmp_path / "input").glob("listing-*"))  # no copy
    assert freeze_corpus(corpus, tmp_path / "input", Selection(keep.copy())) == frozen


def test_row_groups_without_a_chosen_row_are_not_read(
    corpus: ShardManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    keep = np.zeros(150, bool)
    keep[[3, 77, 78]] = True
    frozen = freeze_corpus(corpus, tmp_path / "input", Selection(keep))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **more: read.append(group) or original(self, group, **more),
    )
    assert rows_of(frozen) == ["003", "077", "078"]
    assert read == [0, 3]


def test_another_selection_is_another_input_with_other_units(corpus: ShardManifest, tmp_path: Path) -> None:
    first, second = np.zeros(150, bool), np.zeros(150, bool)
    first[:20], second[:21] = True, True
    a, b = (freeze_corpus(corpus, tmp_path / "input", Selection(keep)) for keep in (first, second))
    whole = freeze_corpus(ShardManifest(**{**vars(corpus), "quarantined": 0}), tmp_path / "input")
    assert len({a.digest, b.digest, whole.digest}) == 3
    assert not {unit["unit"] for unit in a.units} & {unit["unit"] for unit in (*b.units, *whole.units)}


def test_a_selection_that_does_not_fit_is_refused(corpus: ShardManifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        freeze_corpus(corpus, tmp_path / "input", Selection(np.ones(149, bool)))


def test_a_unit_whose_bits_do_not_fit_its_shard_is_an_artifact_error(corpus: ShardManifest, tmp_path: Path) -> None:
    (unit, *_) = freeze_corpus(corpus, tmp_path / "input", Selection(np.ones(150, bool))).units
    with pytest.raises(ArtifactError):
        UnitRows.open({**unit, "keep": "ff"}, Limits(), Duplicates(""))

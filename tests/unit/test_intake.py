"""Laws of the work on one slice: the best copy is kept, counts balance, nothing half-written is left."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core.commits import Ledger
from eagleray.core.errors import StorageError
from eagleray.vision import intake, shards, sources
from eagleray.vision.images import Header, ImageRefused, Limits, Reason
from eagleray.vision.intake import SliceIngester
from eagleray.vision.sources import LISTING_SCHEMA

Files = dict[str, bytes]


def make_unit(root: Path, files: Files) -> dict[str, Any]:
    """A slice over a folder of files, its rows in the order given."""
    for name, data in files.items():
        path = root / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    listing = pa.Table.from_batches(list(sources.list_items(str(root / "source"))), LISTING_SCHEMA)
    uris = listing["uri"].to_pylist()
    order = [uris.index(f"file://{root}/source/{name}") for name in files]
    (root / "corpus" / "slices").mkdir(parents=True, exist_ok=True)
    pq.write_table(listing.take(order), root / "corpus" / "slices" / "0.parquet")
    Ledger(root / "corpus", "key").open()
    return {"unit": "0", "slice": "slices/0.parquet"}


def settings(root: Path, **more: Any) -> dict[str, Any]:
    limits = {"max_pixels": 25_000_000, "max_side_px": 16_384, "max_bytes": 1 << 26}
    usual = {"columns": [], "limits": limits, "splits": {}, "seed": 0, "hang_timeout_s": 0}
    return {"root": str(root / "corpus"), "key": "key", **usual, **more}


def part_of(root: Path) -> dict[str, Any]:
    return Ledger(root / "corpus", "key").committed()["0"]


def shard_rows(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "corpus" / part_of(root)["path"]).to_pylist()


@pytest.mark.parametrize("row_group", [256, 2])
def test_of_copies_in_a_slice_the_best_is_kept(
    row_group: int, tmp_path: Path, make_photo: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best copy may come last, when the first has long been written: then its row is rewritten."""
    monkeypatch.setattr(shards, "ROW_GROUP_IMAGES", row_group)
    one, two = make_photo(1), make_photo(2)
    files = {"z/one.jpg": one, "b/two.jpg": two, "m/one.jpg": one, "c/more.jpg": make_photo(3), "a/one.jpg": one}
    unit = make_unit(tmp_path, files)
    counts = SliceIngester(settings(tmp_path))(unit)
    assert counts == {"unit": "0", "uris": 5, "images": 3, "duplicates": 2, "quarantined": 0, "bytes": counts["bytes"]}
    rows = {row["uri"].split("/source/")[1]: row for row in shard_rows(tmp_path)}
    assert sorted(rows) == ["a/one.jpg", "b/two.jpg", "c/more.jpg"]
    assert rows["a/one.jpg"]["labels"] == ["a"]
    assert all(hashlib.sha256(row["image"]).hexdigest() == row["id"] for row in rows.values())
    index = pq.read_table(tmp_path / "corpus" / part_of(tmp_path)["index"]).to_pylist()
    assert sorted(row["uri"].split("/source/")[1] for row in index if row["is_kept"]) == sorted(rows)
    assert len(index) == 5


def test_a_labelled_copy_wins_over_one_without(tmp_path: Path, make_photo: Callable[..., bytes]) -> None:
    photo = make_photo(1)
    unit = make_unit(tmp_path, {"a.jpg": photo, "z/a.jpg": photo, "y/b.jpg": make_photo(2)})
    SliceIngester(settings(tmp_path))(unit)
    assert sorted((row["uri"].split("/")[-1], row["labels"]) for row in shard_rows(tmp_path)) == [
        ("a.jpg", ["z"]),
        ("b.jpg", ["y"]),
    ]


def test_bad_items_are_quarantined_with_reasons(tmp_path: Path, make_photo: Callable[..., bytes]) -> None:
    photo = make_photo(1)
    files = {"a/ok.jpg": photo, "a/empty.jpg": b"", "a/text.jpg": b"text", "a/half.jpg": photo[: len(photo) // 2]}
    files |= {"b/large.jpg": photo + bytes(100_000), "b/again.jpg": b"text"}
    unit = make_unit(tmp_path, files)
    limits = {"max_pixels": 25_000_000, "max_side_px": 16_384, "max_bytes": 100_000}
    counts = SliceIngester(settings(tmp_path, limits=limits))(unit)
    assert (counts["images"], counts["duplicates"], counts["quarantined"]) == (1, 0, 5)
    refused = pq.read_table(tmp_path / "corpus" / part_of(tmp_path)["refused"]).to_pylist()
    found = {row["uri"].split("/source/")[1]: (row["reason"], row["digest"]) for row in refused}
    head = hashlib.sha256(b"text").hexdigest()
    assert found == {
        "a/empty.jpg": ("empty", hashlib.sha256(b"").hexdigest()),
        "a/text.jpg": ("not_image", head),
        "a/half.jpg": ("truncated", hashlib.sha256(photo[: len(photo) // 2][:4096]).hexdigest()),
        "b/large.jpg": ("too_large", None),  # never read
        "b/again.jpg": ("not_image", head),
    }


def test_a_slice_of_nothing_but_bad_items_is_committed(tmp_path: Path) -> None:
    counts = SliceIngester(settings(tmp_path))(make_unit(tmp_path, {"a.jpg": b"", "b.jpg": b"x"}))
    assert (counts["images"], counts["quarantined"]) == (0, 2)
    assert shard_rows(tmp_path) == []


def test_splits_are_given_where_the_source_names_none(tmp_path: Path, make_photo: Callable[..., bytes]) -> None:
    files = {f"c{n % 2}/{n}.jpg": make_photo(n) for n in range(12)} | {"test/c0/own.jpg": make_photo(99)}
    unit = make_unit(tmp_path, files)
    SliceIngester(settings(tmp_path, columns=["split"], splits={"a": 0.5, "b": 0.5}))(unit)
    rows = shard_rows(tmp_path)
    assert {row["split"] for row in rows if not row["uri"].endswith("own.jpg")} == {"a", "b"}
    assert [row["split"] for row in rows if row["uri"].endswith("own.jpg")] == ["test"]


def test_a_late_second_attempt_changes_nothing(tmp_path: Path, make_photo: Callable[..., bytes]) -> None:
    unit = make_unit(tmp_path, {"a/1.jpg": make_photo(1)})
    SliceIngester(settings(tmp_path))(unit)
    first = part_of(tmp_path)
    SliceIngester(settings(tmp_path))(unit)
    assert part_of(tmp_path) == first
    assert len(list((tmp_path / "corpus" / "shards").iterdir())) == 1


def test_from_the_third_attempt_on_images_are_validated_in_a_child(
    tmp_path: Path, make_photo: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = make_photo(7)

    class Child:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Child:
            return self

        def __exit__(self, *_: object) -> None: ...

        def validate(self, data: bytes) -> Header:
            if data == poison:
                raise ImageRefused(Reason.POISON, "the child died")
            return intake.validate(data)

    def deadly(data: bytes, limits: Limits) -> Header:
        if data == poison:
            raise MemoryError  # stands for whatever takes the process with it
        return Header("JPEG", 1, 1, 1)

    unit = make_unit(tmp_path, {"a/1.jpg": make_photo(1), "a/poison.jpg": poison, "a/2.jpg": make_photo(2)})
    with monkeypatch.context() as patch:
        patch.setattr(intake, "validate", deadly)
        for _ in range(2):
            with pytest.raises(MemoryError):
                SliceIngester(settings(tmp_path))(unit)
    monkeypatch.setattr("eagleray.vision.sandbox.SandboxedDecoder", Child)
    counts = SliceIngester(settings(tmp_path))(unit)
    assert (counts["images"], counts["quarantined"]) == (2, 1)
    (refused,) = pq.read_table(tmp_path / "corpus" / part_of(tmp_path)["refused"]).to_pylist()
    assert (refused["reason"], refused["uri"].split("/")[-1]) == ("poison", "poison.jpg")


def test_the_watch_ends_a_process_that_hangs(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # a child of its own: the watch ends the whole process
        with intake._Watch(0.0) as watch:
            watch.arm()
        with intake._Watch(0.01) as watch:
            watch.arm()
            signal.pause()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets no file of this process grow over a size, as a full disk would, and takes it back."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_shard_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, make_photo: Callable[..., bytes], small_files: Callable[[int], None]
) -> None:
    unit = make_unit(tmp_path, {f"a/{n}.jpg": make_photo(n) for n in range(20)})
    small_files(20_000)
    with pytest.raises(StorageError, match="writing"):
        SliceIngester(settings(tmp_path))(unit)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert list((tmp_path / "corpus" / "shards").iterdir()) == []
    assert Ledger(tmp_path / "corpus", "key").committed() == {}
    assert SliceIngester(settings(tmp_path))(unit)["images"] == 20


def test_no_space_at_any_sync_is_a_storage_error(
    tmp_path: Path, make_photo: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = make_unit(tmp_path, {f"a/{n}.jpg": make_photo(n) for n in range(3)})
    real, left = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    for number in range(1, 30):
        left = number
        key = f"key{number}"
        Ledger(tmp_path / "corpus", key).open()
        try:
            SliceIngester(settings(tmp_path, key=key))(unit)
            break
        except StorageError:
            failures += 1
        for part in Ledger(tmp_path / "corpus", key).committed().values():  # linked, and only the folder's sync failed
            assert pq.read_table(tmp_path / "corpus" / part["path"]).num_rows == 3
        assert list((tmp_path / "corpus").rglob(".aside*")) == []
    assert failures > 3
    assert Ledger(tmp_path / "corpus", key).committed()["0"]["images"] == 3

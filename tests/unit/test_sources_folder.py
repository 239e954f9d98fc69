"""Laws of folders and of what names and metadata files say: labels, splits, metadata, what counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core.errors import DataError
from eagleray.vision import sources
from eagleray.vision.images import ImageRefused, Reason
from eagleray.vision.sources import LISTING_SCHEMA, ListOptions, Tally
from eagleray.vision.sources.annotation import labels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.source_makers import write_tar

NAME = st.binary(min_size=1, max_size=40).filter(
    lambda raw: not {0, 47} & set(raw) and raw not in (b".", b"..") and not raw.startswith((b".", b"metadata."))
)


def put(home: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return home


def said(home: Path, **options: Any) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Path below home to labels and metadata."""
    table = pa.Table.from_batches(
        list(sources.list_items(str(home), ListOptions(**options))), LISTING_SCHEMA
    ).to_pylist()
    return {row["uri"].removeprefix(f"file://{home}/"): (row["labels"], dict(row["metadata"])) for row in table}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        (["cat/deep/er/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        (["photos/cat/1.jpg", "photos/dog/2.jpg"], ["cat", "dog"]),  # one wrapping folder
        (["photos/cat/1.jpg", "photos/2.jpg"], ["cat", None]),
        (["cat/1.jpg", "cat/2.jpg"], ["cat", "cat"]),  # a single class is no wrapping folder
        (["1.jpg", "cat/2.jpg"], [None, "cat"]),
        (["1.jpg", "2.jpg"], [None, None]),
        (["train/cat/1.jpg", "train/dog/2.jpg"], ["cat", "dog"]),
        (["photos/train/cat/1.jpg", "photos/test/dog/2.jpg"], ["cat", "dog"]),
    ],
)
def test_class_folders_are_labels(names: list[str], labels: list[str | None], tmp_path: Path) -> None:
    put(tmp_path / "a", dict.fromkeys(names, b"1"))
    expected = {name: [label] if label else [] for name, label in zip(names, labels, strict=True)}
    assert {name: found for name, (found, _) in said(tmp_path / "a").items()} == expected
    assert all(not found for found, _ in said(tmp_path / "a", labels="none").values())


def test_a_tar_says_the_same_as_its_folder(tmp_path: Path) -> None:
    names = ["photos/train/cat/1.jpg", "photos/validation/dog/2.jpg", "photos/test/3.jpg"]
    put(tmp_path / "a", dict.fromkeys(names, b"1"))
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"1"))
    rows = pa.Table.from_batches(list(sources.list_items(str(tmp_path / "a.tar")))).to_pylist()
    by_tar = {r["uri"].split("::")[0].removeprefix("tar://"): (r["labels"], dict(r["metadata"])) for r in rows}
    assert by_tar == said(tmp_path / "a")
    assert [found[1] for found in by_tar.values()] == [{"split": "train"}, {"split": "val"}, {"split": "test"}]


def test_metadata_is_kept_and_the_deepest_file_wins(tmp_path: Path) -> None:
    put(
        tmp_path / "a",
        {
            "cat/1.jpg": b"1",
            "cat/2.jpg": b"2",
            "dog/3.jpg": b"3",
            "metadata.csv": "file_name,site,split\ncat/1.jpg,north,\n./cat/2.jpg,south,test\ngone.jpg,x,\n",
            "cat/metadata.jsonl": '{"file_name": "2.jpg", "site": "deep", "labels": ["x", "y"], "width": 3, "ok": 1}',
        },
    )
    tally = Tally()
    list(sources.list_items(str(tmp_path / "a"), tally=tally))
    assert said(tmp_path / "a") == {
        "cat/1.jpg": (["cat"], {"site": "north"}),
        "cat/2.jpg": (["x", "y"], {"meta_width": "3", "ok": "1", "site": "deep", "split": "test"}),
        "dog/3.jpg": (["dog"], {}),
    }
    assert (tally.metadata_rows, tally.metadata_matched) == (4, 3)


def test_metadata_as_parquet_with_types(tmp_path: Path) -> None:
    put(tmp_path / "a", {"1.jpg": b"1", "2.jpg": b"2"})
    table = pa.table({"file_name": ["1.jpg", "2.jpg"], "label": [3, None], "score": [0.5, 2.0]})
    pq.write_table(table, tmp_path / "a" / "metadata.parquet")
    assert said(tmp_path / "a") == {"1.jpg": (["3"], {"score": "0.5"}), "2.jpg": ([], {"score": "2"})}


def test_names_match_over_unicode_forms(tmp_path: Path) -> None:
    """macOS writes file names decomposed, a spreadsheet composed."""
    put(tmp_path / "a", {"e\u0301.jpg": b"1", "metadata.csv": "file_name,site\n\u00e9.jpg,north\n"})
    assert list(said(tmp_path / "a").values()) == [([], {"site": "north"})]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file_name,site\nnot/there.jpg,north\n", "none of the 1 rows"),
        ("name,site\n1.jpg,north\n", "no file_name in row 1"),
        ('file_name,site\n"1.jpg,north\n', "cannot be read"),
    ],
)
def test_metadata_that_says_nothing_is_an_error(text: str, match: str, tmp_path: Path) -> None:
    put(tmp_path / "a", {"1.jpg": b"1", "metadata.csv": text})
    with pytest.raises(DataError, match=match) as caught:
        said(tmp_path / "a")
    assert "file_name" in caught.value.expected + caught.value.fix or "CSV" in caught.value.expected


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"label": "a"}, ("a",)),
        ({"label": ["a", "b"]}, ("a", "b")),
        ({"labels": "a; b;a"}, ("a", "b")),
        ({"labels": '["a;b", "c"]'}, ("a;b", "c")),
        ({"labels": ["a", 2]}, ("a", "2")),
        ({"label": "x", "labels": "a;x"}, ("x", "a")),
        ({"label": "", "labels": None}, ()),
        ({"label": 0}, ("0",)),
        ({"label": "[odd"}, ("[odd",)),
    ],
)
def test_labels_of_a_row(row: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert labels_of(row) == labels


def test_links_devices_and_dot_files(tmp_path: Path) -> None:
    home = put(tmp_path / "a", {"x/1.jpg": b"1", "x/.2.jpg": b"2", ".git/3.jpg": b"3", "x/metadata.md": b"4"})
    put(tmp_path / "b", {"4.jpg": b"4"})
    (home / "x" / "link.jpg").symlink_to(tmp_path / "b" / "4.jpg")
    (home / "loop").symlink_to(home)
    (home / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(home / "pipe.jpg")
    tally = Tally()
    table = pa.Table.from_batches(list(sources.list_items(str(home), tally=tally)))
    assert sorted(uri.removeprefix(f"file://{home}/") for uri in table["uri"].to_pylist()) == ["x/1.jpg", "x/link.jpg"]
    assert sorted(data for _, data in sources.read_items(table)) == [b"1", b"4"]
    assert tally.skipped_special == 3


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a", {"x/.hidden": b"1", "metadata.csv": "file_name\n"})
    with pytest.raises(DataError, match="holds no files"):
        said(tmp_path / "a")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a", {"x/1.jpg": b"1", "y/2.jpg": b"2"})
    (tmp_path / "a" / "y").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            said(tmp_path / "a")
    finally:
        (tmp_path / "a" / "y").chmod(0o755)


def test_a_folder_that_cannot_be_listed_ends_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above where the tests run as root; and the other threads end too."""
    put(tmp_path / "a", {f"d{n}/1.jpg": b"1" for n in range(50)})
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("d33"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"d33 cannot be listed: Permission denied"):
        said(tmp_path / "a")


def test_a_listing_that_is_abandoned_ends_its_threads(tmp_path: Path) -> None:
    import threading

    put(tmp_path / "a", {f"d{n}/{m}.jpg": b"1" for n in range(40) for m in range(20)})
    before = threading.active_count()
    batches = sources.list_items(str(tmp_path / "a"))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_file_that_vanishes_or_grows_after_the_listing(tmp_path: Path) -> None:
    home = put(tmp_path / "a", {"1.jpg": b"1", "2.jpg": b"2"})
    table = pa.Table.from_batches(list(sources.list_items(str(home)))).sort_by("uri")
    (home / "1.jpg").unlink()
    (home / "2.jpg").write_bytes(b"longer than before")
    first, second = (data for _, data in sources.read_items(table))
    assert isinstance(first, ImageRefused)
    assert first.reason is Reason.UNREADABLE
    assert second == b"longer than before"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.lists(st.tuples(st.lists(NAME, max_size=3), NAME), max_size=12))
def test_any_tree_is_listed_whole(tree: list[tuple[list[bytes], bytes]], tmp_path: Path) -> None:
    import shutil

    home = tmp_path / "a"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    expected = {}
    for number, (folders, name) in enumerate(tree):
        path = b"/".join([os.fsencode(home), *folders, name])
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                file.write(b"%d" % number)
            expected[path] = b"%d" % number
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    if not expected:
        with pytest.raises(DataError, match="holds no files"):
            list(sources.list_items(str(home)))
        return
    table = pa.Table.from_batches(list(sources.list_items(str(home))))
    found = dict(sources.read_items(table))
    assert {table["member"][row].as_py(): data for row, data in found.items()} == expected

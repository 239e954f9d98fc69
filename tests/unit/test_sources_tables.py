"""Laws of WebDataset shards, Parquet and listings: what a row or a neighbour says about an image, and what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.core.errors import DataError
from eagleray.vision import sources
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.sources import LISTING_SCHEMA, ListOptions

from tests.source_makers import write_tar


def listed(source: Path | str, **options: Any) -> pa.Table:
    return pa.Table.from_batches(list(sources.list_items(str(source), ListOptions(**options))), LISTING_SCHEMA)


def rows(source: Path | str, **options: Any) -> list[tuple[str, list[str], dict[str, str]]]:
    table = listed(source, **options).to_pylist()
    return [(row["uri"].split("::")[0], row["labels"], dict(row["metadata"])) for row in table]


def read(source: Path | str, limits: Limits | None = None) -> list[bytes | ImageRefused]:
    return [data for _, data in sources.read_items(listed(source), limits)]


# WebDataset


def test_neighbours_of_an_image_say_what_it_is_and_do_not_count(tmp_path: Path) -> None:
    about = {"label": "by json", "site": "north", "box": [1, 2], "nothing": None}
    members = {
        "a/1.jpg": b"1",
        "a/1.cls": b"cat\n",
        "a/1.json": json.dumps(about).encode(),
        "a/1.txt": b"a cat",
        "a/1.npy": b"\x93NUMPY",
        "a/2.left.png": b"2l",
        "a/2.right.png": b"2r",
        "a/2.json": b"{broken",
        "a/3.cls": b"no image has this key",
        "a/4.jpg": b"4",
    }
    write_tar(tmp_path / "a.tar", members)
    assert sources.detect(str(tmp_path / "a.tar")) == "webdataset"
    assert rows(tmp_path / "a.tar") == [
        ("tar://a/1.jpg", ["cat"], {"site": "north", "box": "[1, 2]", "txt": "a cat"}),
        ("tar://a/2.left.png", ["a"], {}),
        ("tar://a/2.right.png", ["a"], {}),
        ("tar://a/3.cls", ["a"], {}),
        ("tar://a/4.jpg", ["a"], {}),
    ]


def test_a_pattern_stands_for_its_shards(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"x-{shard:06d}.tar", {f"{shard}.jpg": b"%d" % shard})
    assert read(f"{tmp_path}/x-{{000000..000011}}.tar") == [b"%d" % shard for shard in range(12)]
    assert read(f"{tmp_path}/x-00000{{3,5}}.tar") == [b"3", b"5"]
    assert len(read(f"{tmp_path}/x-*.tar")) == 12
    with pytest.raises(DataError, match=r"x-000012\.tar does not exist"):
        read(f"{tmp_path}/x-{{000000..000012}}.tar")
    with pytest.raises(DataError, match="nothing matches"):
        read(f"{tmp_path}/y-*.tar")


def test_a_compressed_shard_is_read_as_a_stream(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", {"1.jpg": b"1", "1.cls": b"7", "2.jpg": b"2", "2.cls": b"8"}, "w:gz")
    assert [row[1] for row in rows(tmp_path / "a.tar.gz")] == [["7"], ["8"]]
    assert read(tmp_path / "a.tar.gz") == [b"1", b"2"]


@pytest.mark.full  # the library imports torch
def test_shards_as_the_webdataset_library_writes_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(5):
            about = {"n": number}
            writer.write({"__key__": f"s{number:03d}", "jpg": b"image %d" % number, "cls": number, "json": about})
    assert read(tmp_path / "a.tar") == [b"image %d" % number for number in range(5)]
    assert [row[1:] for row in rows(tmp_path / "a.tar")] == [([str(n)], {"n": str(n)}) for n in range(5)]


# Parquet


def test_a_column_of_bytes(tmp_path: Path) -> None:
    table = {"img": [b"1", b"", None, b"4" * 2000], "labels": [["a", "b"], [], None, ["c"]], "n": [1, None, 2.5, 3]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert sources.detect(str(tmp_path / "a.parquet")) == "parquet"
    assert rows(tmp_path / "a.parquet") == [
        ("parquet://0", ["a", "b"], {"n": "1"}),
        ("parquet://1", [], {}),
        ("parquet://2", [], {"n": "2.5"}),
        ("parquet://3", ["c"], {"n": "3"}),
    ]
    first, second, third, fourth = read(tmp_path / "a.parquet", Limits(max_bytes=1000))
    assert (first, second) == (b"1", b"")
    assert isinstance(third, ImageRefused)
    assert isinstance(fourth, ImageRefused)
    assert (third.reason, fourth.reason) == (Reason.EMPTY, Reason.TOO_LARGE)


def test_rows_of_many_row_groups_in_any_order(tmp_path: Path) -> None:
    values = [b"%d" % n * 50 for n in range(1000)]
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet", row_group_size=300)
    table = listed(tmp_path / "a.parquet")
    order = [999, 0, 299, 300, 301, 300, 5, 998, 650]
    assert [data for _, data in sources.read_items(table.take(order))] == [values[at] for at in order]


def test_which_column_holds_the_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"left": [b"1"], "right": [b"2"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="left, right") as caught:
        listed(tmp_path / "a.parquet")
    assert "image_column" in caught.value.fix
    table = listed(tmp_path / "a.parquet", image_column="right")
    assert [data for _, data in sources.read_items(table)] == [b"2"]
    with pytest.raises(DataError, match="'middle'"):
        listed(tmp_path / "a.parquet", image_column="middle")


def test_metadata_named_as_a_column_of_the_corpus_gets_another_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"], "width": [7], "id": ["x"]}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet")[0][2] == {"meta_width": "7", "meta_id": "x"}


def test_a_listing_of_a_parquet_that_shrank_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"] * 10}), tmp_path / "a.parquet")
    table = listed(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"1"] * 3}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 3 is gone"):
        list(sources.read_items(table))


# Listings


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg", "ü ☃,.jpg"):
        (tmp_path / "photos" / name).write_bytes(name.encode())
    return tmp_path


def test_a_csv_listing_of_paths(photos: Path) -> None:
    text = f'path,label,site\nphotos/a.jpg,x,north\n{photos}/photos/b.jpg,,\n"photos/ü ☃,.jpg","a;b",\nfile://{photos}/photos/a.jpg,y,\n'
    (photos / "list.csv").write_text("\ufeff" + text, encoding="utf-8")
    assert rows(photos / "list.csv") == [
        (f"file://{photos}/photos/a.jpg", ["x"], {"site": "north"}),
        (f"file://{photos}/photos/b.jpg", [], {}),
        (f"file://{photos}/photos/ü ☃,.jpg", ["a;b"], {}),
        (f"file://{photos}/photos/a.jpg", ["y"], {}),
    ]
    assert read(photos / "list.csv") == [b"a.jpg", b"b.jpg", "ü ☃,.jpg".encode(), b"a.jpg"]
    assert sources.is_random_access(str(photos / "list.csv"))


def test_jsonl_and_parquet_listings(photos: Path) -> None:
    entries = [{"file_name": "photos/a.jpg", "labels": ["x", "y"], "n": 1}, {"file_name": "photos/b.jpg", "n": None}]
    (photos / "list.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    pq.write_table(pa.Table.from_pylist(entries), photos / "list.parquet")
    expected = [(f"file://{photos}/photos/a.jpg", ["x", "y"], {"n": "1"}), (f"file://{photos}/photos/b.jpg", [], {})]
    assert rows(photos / "list.jsonl") == rows(photos / "list.parquet") == expected
    assert sources.detect(str(photos / "list.parquet")) == "listing"


def test_every_row_is_accounted_for(photos: Path) -> None:
    lines = ["url", "photos/a.jpg", '""', "photos/gone.jpg", "http://127.0.0.1:1/a.jpg", "photos", "bad\x00name.jpg"]
    (photos / "list.csv").write_text("\n".join(lines) + "\n")
    good, *bad = read(photos / "list.csv")
    assert good == b"a.jpg"
    assert [refusal.reason for refusal in bad if isinstance(refusal, ImageRefused)] == [Reason.UNREADABLE] * 5
    details = [refusal.detail for refusal in bad if isinstance(refusal, ImageRefused)]
    assert details[:3] == [
        "the row names no path",
        "No such file or directory",
        "the scheme http is not among those allowed",
    ]


def test_a_table_without_paths_is_no_listing(photos: Path) -> None:
    (photos / "list.csv").write_text("name,value\na,1\n")
    with pytest.raises(DataError, match="no column of paths") as caught:
        listed(photos / "list.csv")
    assert "file_name" in caught.value.expected
    (photos / "named.csv").write_text("name,value\nphotos/a.jpg,1\n")
    assert rows(photos / "named.csv", image_column="name")[0][0] == f"file://{photos}/photos/a.jpg"


@pytest.mark.parametrize("content", ['{"file_name": "a.jpg"}\nnot json\n', "[1]\n", '"text"\n'])
def test_a_broken_listing_is_an_error(content: str, photos: Path) -> None:
    (photos / "list.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"list\.jsonl cannot be read"):
        listed(photos / "list.jsonl")


def test_a_listing_of_remote_objects_is_not_scored_in_place(photos: Path) -> None:
    (photos / "list.csv").write_text("uri\nphotos/a.jpg\ns3://bucket/b.jpg\n")
    assert not sources.is_random_access(str(photos / "list.csv"))


# What a source may be


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"text"), ("a.jpg", b"\xff\xd8\xff"), ("a.bin", b""), ("a.csv", b"")]
)
def test_what_is_no_source_is_said_so(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        sources.detect(str(tmp_path / name))
    assert name in caught.value.seen
    assert "zip" in caught.value.expected
    assert "predict" in caught.value.fix


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        sources.detect(str(tmp_path / "pipe"))

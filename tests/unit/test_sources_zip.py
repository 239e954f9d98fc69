"""Laws of the zip reader: what zipfile reads, it reads; what is hostile costs itself only."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from eagleray.core.errors import DataError
from eagleray.vision import sources
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.sources import LISTING_SCHEMA, ListOptions, Tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


def listed(path: Path, **options: Any) -> pa.Table:
    return pa.Table.from_batches(list(sources.list_items(str(path), ListOptions(**options))), LISTING_SCHEMA)


def read(path: Path, limits: Limits | None = None) -> list[bytes | ImageRefused]:
    return [data for _, data in sources.read_items(listed(path), limits)]


def assert_refused(found: bytes | ImageRefused, reason: Reason, detail: str = "") -> None:
    assert isinstance(found, ImageRefused)
    assert (found.reason, detail in found.detail) == (reason, True)


def write(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def patch(path: Path, old: bytes, new: bytes, *, times: int = -1) -> Path:
    path.write_bytes(path.read_bytes().replace(old, new, times))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_as_zipfile_does(method: int, tmp_path: Path) -> None:
    members = [(f"c/{n}.bin", bytes(range(256)) * n) for n in range(40)]
    path = write(tmp_path / "a.zip", members, method)
    assert read(path) == [data for _, data in members]


def test_a_streamed_zip_has_its_sizes_behind_the_data(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self, file: Any) -> None:
            self.file = file

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            return int(self.file.write(data))

    with open(tmp_path / "a.zip", "wb") as file, zipfile.ZipFile(Pipe(file), "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        archive.writestr("x/a.jpg", b"a" * 5000)
        archive.writestr("y/b.jpg", b"b" * 5000)
    assert read(tmp_path / "a.zip") == [b"a" * 5000, b"b" * 5000]


def test_zip64_and_bytes_before_and_a_comment_behind(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        with archive.open("x/a.jpg", "w", force_zip64=True) as member:
            member.write(b"a" * 100)
        archive.comment = b"PK\x05\x06 is only a comment"
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" + buffer.getvalue())
    assert sources.detect(str(tmp_path / "a.zip")) == "zip"
    assert read(tmp_path / "a.zip") == [b"a" * 100]


def test_a_directory_of_zip64_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 65,536 members and more need them; zipfile is made to think that ten are too many."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
    members = [(f"c/{n}.jpg", bytes([n]) * 600) for n in range(50)]
    path = write(tmp_path / "a.zip", members, zipfile.ZIP_STORED)
    assert b"PK\x06\x06" in path.read_bytes()
    assert read(path) == [data for _, data in members]
    path.write_bytes(b"some bytes before" + path.read_bytes())
    assert read(path) == [data for _, data in members]


def test_repeated_names_are_items_of_their_own(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        path = write(tmp_path / "a.zip", [("x/a.jpg", b"1"), ("x/b.jpg", b"2"), ("x/a.jpg", b"3"), ("x/a.jpg", b"4")])
    names = [uri.split("::")[0] for uri in listed(path)["uri"].to_pylist()]
    assert names == ["zip://x/a.jpg", "zip://x/b.jpg", "zip://x/a.jpg#2", "zip://x/a.jpg#3"]
    assert read(path) == [b"1", b"2", b"3", b"4"]


NAMES = [
    "../../etc/a.jpg",
    "/root/a.jpg",
    "a/../../b.jpg",
    "x/\u202egpj.jpg",
    "x/new\nline.jpg",
    "x/ünï ☃.jpg",
    "C:\\a.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_archive(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.zip", [(name, b"data")])
    before = sorted(tmp_path.rglob("*"))
    assert read(path) == [b"data"]
    assert listed(path)["uri"].to_pylist() == [f"zip://{name}::file://{path}"]
    assert sorted(tmp_path.rglob("*")) == before


def test_names_in_another_encoding_survive(tmp_path: Path) -> None:
    path = patch(write(tmp_path / "a.zip", [("x/aaaa.jpg", b"1")]), b"aaaa", b"\x81\x82\xff\xfe")
    assert listed(path)["uri"].to_pylist()[0].startswith("zip://x/üé\xa0■.jpg::")  # code page 437, as zip says
    assert read(path) == [b"1"]


def test_links_are_skipped_and_counted(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("x/link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    path = write(tmp_path / "a.zip", [(link, b"/etc/passwd"), ("x/a.jpg", b"1"), ("y/", b"")])
    tally = Tally()
    rows = pa.Table.from_batches(list(sources.list_items(str(path), tally=tally)))
    assert (rows.num_rows, tally.skipped_special) == (1, 1)


def test_dot_files_and_resource_forks_are_no_items(tmp_path: Path) -> None:
    names = ["x/a.jpg", "x/.hidden.jpg", ".git/a.jpg", "__MACOSX/x/._a.jpg", "x/metadata.txt"]
    path = write(tmp_path / "a.zip", [(name, b"1") for name in names])
    assert [uri.split("::")[0] for uri in listed(path)["uri"].to_pylist()] == ["zip://x/a.jpg"]


def test_an_encrypted_member_is_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [("x/a.jpg", b"1" * 50), ("x/b.jpg", b"2")], zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    first, second = read(path)
    assert_refused(first, Reason.UNREADABLE, "encrypted")
    assert second == b"2"


def test_an_unknown_method_is_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [("x/a.jpg", b"1" * 50)], zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<H", raw, 8, 99)
    path.write_bytes(raw)
    (found,) = read(path)
    assert_refused(found, Reason.UNREADABLE, "99")


def test_bytes_that_do_not_match_the_check_value_are_corrupt(tmp_path: Path) -> None:
    path = patch(write(tmp_path / "a.zip", [("x/a.jpg", b"hello")], zipfile.ZIP_STORED), b"hello", b"hullo")
    (found,) = read(path)
    assert_refused(found, Reason.CORRUPT, "CRC")


def test_a_member_larger_than_it_says_is_bounded(tmp_path: Path) -> None:
    """A bomb: 200 MB of zeros, declared as 100 bytes; nothing over the limit is unpacked."""
    import tracemalloc

    size = 200 << 20
    path = write(tmp_path / "a.zip", [("x/bomb.jpg", bytes(size)), ("x/a.jpg", b"1")])
    patch(path, struct.pack("<L", size), struct.pack("<L", 100))
    tracemalloc.start()
    bomb, fine = read(path, Limits(max_bytes=1 << 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_refused(bomb, Reason.TOO_LARGE)
    assert fine == b"1"
    assert peak < 8 << 20


def test_a_member_that_says_it_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [("x/a.jpg", b"1" * 2000)])
    (found,) = read(path, Limits(max_bytes=1999))
    assert_refused(found, Reason.TOO_LARGE)
    assert read(path, Limits(max_bytes=2000)) == [b"1" * 2000]


def test_caps_on_members_and_unpacked_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zip", [(f"x/{n}.jpg", bytes(1 << 20)) for n in range(5)])
    with pytest.raises(DataError, match="members") as caught:
        listed(path, max_members=4)
    assert "max_members" in caught.value.fix
    with pytest.raises(DataError, match="unpacked"):
        listed(path, max_unpacked_gib=4 / 1024)
    monkeypatch.setattr("eagleray.vision.sources.options.RATIO_FROM_BYTES", 1 << 20)
    with pytest.raises(DataError, match="times its packed size"):
        listed(path, max_ratio=100)
    assert listed(path, max_members=5, max_unpacked_gib=5 / 1024, max_ratio=2000).num_rows == 5


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and nothing else"])
def test_what_is_no_zip_is_said_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError):
        listed(tmp_path / "a.zip")


def test_an_empty_zip_is_an_empty_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        listed(write(tmp_path / "a.zip", []))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_give_wrong_bytes(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Whatever is flipped: an error of ours, or each item refused or read as some member was written."""
    members = [(f"c{n}/{n}.jpg", bytes([n]) * (50 * n + 1)) for n in range(6)]
    raw = bytearray(write(tmp_path / "a.zip", members).read_bytes())
    for at, change in flips:
        raw[at % len(raw)] ^= change
    (tmp_path / "b.zip").write_bytes(raw)
    whole = {data for _, data in members}
    try:
        found = read(tmp_path / "b.zip")
    except DataError:
        return
    assert all(isinstance(data, ImageRefused) or data in whole for data in found)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(st.tuples(TEXT, st.binary(max_size=300)), max_size=12), method=st.sampled_from(METHODS))
def test_any_names_and_bytes_come_back(members: list[tuple[str, bytes]], method: int, tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(tmp_path / "a.zip", members, method)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        counted = [
            info
            for info in infos
            if (parts := [p for p in info.filename.split("/") if p not in ("", ".", "..")])
            and not any(part.startswith(".") for part in parts)
            and not parts[-1].startswith("metadata.")
        ]
        expected = Counter(archive.read(info) for info in counted)
    if not counted:
        with pytest.raises(DataError):
            listed(path)
        return
    table = listed(path)
    assert Counter(data for _, data in sources.read_items(table)) == expected
    assert len(set(table["uri"].to_pylist())) == table.num_rows
    assert [zlib.crc32(data) for _, data in sources.read_items(table)] == table["crc32"].to_pylist()

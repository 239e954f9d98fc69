"""Laws of the tar reader: offsets are those of the data, streams are read forward, damage is not the end."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from eagleray.core.errors import DataError
from eagleray.vision import sources
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.sources import LISTING_SCHEMA, ListOptions, Tally, compression
from eagleray.vision.sources.containers import Containers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.source_makers import write_tar

FORMS = {"a.tar": "w", "a.tar.gz": "w:gz", "a.tar.bz2": "w:bz2", "a.tar.xz": "w:xz"}


def listed(path: Path, **options: Any) -> pa.Table:
    return pa.Table.from_batches(list(sources.list_items(str(path), ListOptions(**options))), LISTING_SCHEMA)


def read(path: Path, limits: Limits | None = None) -> list[bytes | ImageRefused]:
    return [data for _, data in sources.read_items(listed(path), limits)]


def members(count: int) -> dict[str, bytes]:
    return {f"class{n % 3}/{n:03d}.jpg": bytes([n]) * (400 * n + 1) for n in range(count)}


def compress_by_zstd(path: Path) -> Path:
    target = path.with_name(path.name + ".zst")
    with pa.OSFile(str(target), "wb") as raw, pa.CompressedOutputStream(raw, "zstd") as stream:
        stream.write(path.read_bytes())
    return target


@pytest.mark.parametrize("name", FORMS)
def test_every_compression_reads_the_same(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / name, members(30), FORMS[name])
    assert read(tmp_path / name) == list(members(30).values())
    assert sources.is_random_access(str(tmp_path / name)) == (name == "a.tar")


def test_zstandard_reads_the_same(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(30))
    path = compress_by_zstd(tmp_path / "a.tar")
    assert read(path) == list(members(30).values())
    assert not sources.is_random_access(str(path))


def test_a_compressed_tar_is_known_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "photos.dat", members(5), "w:gz")
    assert sources.detect(str(tmp_path / "photos.dat")) == "tar"
    assert len(read(tmp_path / "photos.dat")) == 5


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_survive(format_: int, tmp_path: Path) -> None:
    names = [
        "class/" + "n" * 90 + ".jpg",
        "class/new\nline.jpg",
        "class/\u202egpj.jpg",
        "../../etc/b.jpg",
        "/root/c.jpg",
    ]
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
    assert listed(tmp_path / "a.tar")["uri"].to_pylist() == [f"tar://{name}::file://{tmp_path}/a.tar" for name in names]
    assert read(tmp_path / "a.tar") == [b"data"] * 5
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a.tar"]


def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    name = b"class/\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    write_tar(tmp_path / "a.tar", {name: b"data"})
    table = listed(tmp_path / "a.tar")
    assert table["uri"].to_pylist() == [f"tar://class/\\xff\\xfe.jpg::file://{tmp_path}/a.tar"]
    assert table["member"].to_pylist() == [b"class/\xff\xfe.jpg"]


def test_what_is_no_regular_file_is_skipped_and_counted(tmp_path: Path) -> None:
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"x/{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("x/a.jpg")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    tally = Tally()
    rows = pa.Table.from_batches(list(sources.list_items(str(tmp_path / "a.tar"), tally=tally)))
    assert (rows.num_rows, tally.skipped_special) == (1, len(kinds))
    assert read(tmp_path / "a.tar") == [b"1"]


def test_a_sparse_member_is_skipped_and_counted(tmp_path: Path) -> None:
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    (tmp_path / "a.jpg").write_bytes(b"1")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "hole.jpg", "a.jpg"], cwd=tmp_path, check=True)
    tally = Tally()
    rows = pa.Table.from_batches(list(sources.list_items(str(tmp_path / "a.tar"), tally=tally)))
    assert (rows.num_rows, tally.skipped_special) == (1, 1)


def test_repeated_names_are_items_of_their_own(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x/a.jpg": b"1", "x/b.jpg": b"2"})
    write_tar(tmp_path / "a.tar", {"x/a.jpg": b"3"}, "a")
    assert [uri.split("::")[0] for uri in listed(tmp_path / "a.tar")["uri"].to_pylist()] == [
        "tar://x/a.jpg",
        "tar://x/b.jpg",
        "tar://x/a.jpg#2",
    ]
    assert read(tmp_path / "a.tar") == [b"1", b"2", b"3"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_cut_tar_is_an_error(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    write_tar(path, members(30), FORMS[name])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"damaged or cut off|no tar"):
        listed(path)


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    """tarfile stops at it without a word, and the members behind it would be lost."""
    write_tar(tmp_path / "a.tar", members(30))
    offset = listed(tmp_path / "a.tar")["offset"][15].as_py() - 512
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[offset + 20] ^= 255
    (tmp_path / "a.tar").write_bytes(raw)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert len(archive.getnames()) == 15
    with pytest.raises(DataError, match="damaged or cut off after 15 members"):
        listed(tmp_path / "a.tar")


@pytest.mark.parametrize("content", [b"no tar" * 200, b"\x1f\x8b\x08 no gzip", b"BZh91AY&SY no bzip2"])
def test_what_is_no_tar_is_said_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="no tar archive"):
        listed(tmp_path / "a.tar")


def test_an_extended_header_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DataError, match="extended header"):
        listed(tmp_path / "a.tar")


def test_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar.gz", {f"x/{n}.jpg": bytes(1 << 20) for n in range(5)}, "w:gz")
    path = tmp_path / "a.tar.gz"
    with pytest.raises(DataError, match="4 members"):
        listed(path, max_members=4)
    with pytest.raises(DataError, match="unpacked"):
        listed(path, max_unpacked_gib=4 / 1024)
    monkeypatch.setattr("eagleray.vision.sources.options.RATIO_FROM_BYTES", 1 << 20)
    with pytest.raises(DataError, match="times its packed size"):
        listed(path, max_ratio=100)
    assert listed(path, max_ratio=2000).num_rows == 5


def test_a_member_over_the_limit_is_refused_and_the_stream_goes_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", {"x/a.jpg": b"1" * 100, "x/b.jpg": b"2" * 5000, "x/c.jpg": b"3" * 100}, "w:gz")
    first, second, third = read(tmp_path / "a.tar.gz", Limits(max_bytes=1000))
    assert (first, third) == (b"1" * 100, b"3" * 100)
    assert isinstance(second, ImageRefused)
    assert second.reason is Reason.TOO_LARGE


def test_later_slices_read_on_and_do_not_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar.gz", members(30), "w:gz")
    table = listed(tmp_path / "a.tar.gz")
    opened = []
    real = compression.open_unpacked
    monkeypatch.setattr(
        "eagleray.vision.sources.stream.open_unpacked", lambda container: opened.append(container) or real(container)
    )
    with Containers() as containers:
        found = [
            data for at in range(0, 30, 5) for _, data in sources.read_items(table.slice(at, 5), containers=containers)
        ]
        assert len(opened) == 1
        again = [data for _, data in sources.read_items(table.slice(0, 5), containers=containers)]
    assert (found, again) == (list(members(30).values()), list(members(5).values()))
    assert len(opened) == 2


def test_an_archive_that_changed_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", members(30), "w:gz")
    table = listed(tmp_path / "a.tar.gz")
    write_tar(tmp_path / "a.tar.gz", members(10), "w:gz")
    with pytest.raises(DataError, match="changed since it was listed"):
        list(sources.read_items(table))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.binary(min_size=1, max_size=150).filter(lambda raw: b"\0" not in raw), min_size=1, max_size=8),
    form=st.sampled_from(["w", "w:gz"]),
)
def test_any_names_come_back(names: list[bytes], form: str, tmp_path: Path) -> None:
    texts = [f"c/n{at}" + raw.decode("utf-8", "surrogateescape").replace("/", "_") for at, raw in enumerate(names)]
    texts = [text.rstrip("/") for text in texts]
    write_tar(tmp_path / "a.tar", {text: str(at).encode() for at, text in enumerate(texts)}, form)
    with tarfile.open(tmp_path / "a.tar") as archive:
        known = [name.encode("utf-8", "surrogateescape") for name in archive.getnames()]
    table = listed(tmp_path / "a.tar")
    assert table["member"].to_pylist() == known
    assert [data for _, data in sources.read_items(table)] == [str(at).encode() for at in range(len(texts))]

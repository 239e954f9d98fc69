"""images.py on broken and hostile files: a typed refusal or the right pixels, never another exception, one verdict."""

from __future__ import annotations

import csv
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from eagleray.vision import image_containers
from eagleray.vision.images import Header, ImageRefused, ImageSpec, Limits, Reason, decode, decode_full, probe, validate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.reference_decode import reference_full
from tests.unit.test_images import PICTURES, photo, saved, tiff

SPEC = ImageSpec(12, 10)
FRAGILE = [
    "jpeg 4:2:0", "jpeg progressive", "jpeg restart markers", "jpeg gray", "jpeg cmyk", "png", "png palette tRNS",
    "apng", "webp", "webp lossless", "gif", "gif animated", "bmp palette", "tiff", "tiff lzw", "tiff 1 bit g4", "avif",
]  # fmt: skip
FILES = {kind: PICTURES[kind]() for kind in FRAGILE}


def verdicts(data: bytes) -> set[str]:
    """What decode, decode_full and validate say of the same bytes; anything but ImageRefused escapes."""
    found = set()
    for read in (lambda: decode(data, SPEC), lambda: decode_full(data), lambda: validate(data)):
        try:
            result = read()
            if isinstance(result, np.ndarray):
                assert result.dtype == np.uint8
                assert result.shape[2] == 3
            found.add("accepted")
        except ImageRefused as refused:
            found.add(str(refused))
    return found


def check_one_verdict(data: bytes) -> set[str]:
    found = verdicts(data)
    assert len(found) == 1, found
    assert not any(text.startswith("unreadable") for text in found)
    header = probe_or_refusal(data)
    if isinstance(header, str):
        assert found == {header}, "the header alone is refused, the whole is not"
    elif found == {"accepted"}:
        assert decode_full(data).shape == (header.height, header.width, 3)
    return found


def probe_or_refusal(data: bytes) -> Header | str:
    try:
        return probe(data)
    except ImageRefused as refused:
        return str(refused)


damaged = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@damaged
@given(st.sampled_from(FRAGILE), st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_or_read(kind: str, where: float) -> None:
    data = FILES[kind]
    check_one_verdict(data[: int(where * len(data))])


@damaged
@given(
    st.sampled_from(FRAGILE), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6)
)
def test_flipped_bytes_are_refused_or_read(kind: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(FILES[kind])
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    check_one_verdict(bytes(data))


@damaged
@given(st.sampled_from(FRAGILE), st.integers(0, 99), st.binary(min_size=1, max_size=24))
def test_bytes_put_into_the_head_are_refused_or_read(kind: str, at: int, junk: bytes) -> None:
    data = FILES[kind]
    check_one_verdict(data[:at] + junk + data[at:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"RIFF", b""]),
       st.binary(max_size=80))  # fmt: skip
def test_noise_behind_any_magic_is_refused_or_read(magic: bytes, noise: bytes) -> None:
    check_one_verdict(magic + noise)


@pytest.mark.parametrize(
    "kind", ["jpeg 4:2:0", "jpeg progressive", "jpeg cmyk", "jpeg gray", "png", "webp", "tiff", "bmp", "gif"]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_never_accepted(kind: str, share: float) -> None:
    data = PICTURES[kind]()
    with pytest.raises(ImageRefused) as caught:
        validate(data[: int(share * len(data))])
    assert caught.value.reason in (Reason.TRUNCATED, Reason.CORRUPT)
    if kind.startswith(("jpeg", "png", "webp")):
        assert caught.value.reason == Reason.TRUNCATED


def test_a_second_look_at_a_refused_file_refuses_it_again() -> None:
    """Pillow's load() after a failed load() passes: each call here opens the bytes anew."""
    data = bytearray(PICTURES["png"]())
    data[len(data) // 2] ^= 0xFF
    for _ in range(3):
        assert verdicts(bytes(data)) != {"accepted"}


# ---- JPEG's warnings


def test_extra_bytes_before_the_end_are_accepted_as_pillow_does() -> None:
    data = PICTURES["jpeg 4:2:0"]()
    padded = data[:-2] + b"\x00" * 7 + data[-2:]
    np.testing.assert_array_equal(decode_full(padded), reference_full(padded))
    assert verdicts(padded) == {"accepted"}


def test_destroyed_entropy_data_is_corrupt_unless_restart_markers_bound_it() -> None:
    for kind, expected in (("jpeg 4:2:0", Reason.CORRUPT), ("jpeg restart markers", None)):
        picture = saved(photo(400, 300), "JPEG", quality=90, **({"restart_marker_rows": 1} if expected is None else {}))
        scan = picture.index(b"\xff\xda") + 14
        middle = (scan + len(picture)) // 2
        broken = picture[: middle - 300] + bytes(40) + picture[middle:]
        if expected is None:
            assert decode_full(broken).shape == (300, 400, 3), kind
        else:
            with pytest.raises(ImageRefused) as caught:
                validate(broken)
            assert caught.value.reason == expected


# ---- caps: each holds on the header, before pixels are allocated


def png(width: int, height: int, chunks: bytes = b"", *, pixels: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = pixels or zlib.compress(b"".join(b"\0" + bytes(min(width, 64)) for _ in range(min(height, 64))))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    deflated = zlib.compress(bytes(50_000_000), 9)
    prefix = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    body = prefix + deflated
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(
    "size", [(100_000, 10), (10, 100_000), (12_000, 12_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_a_claim_over_the_caps_is_too_large(size: tuple[int, int]) -> None:
    with pytest.raises(ImageRefused) as caught:
        probe(png(*size))
    assert caught.value.reason == Reason.TOO_LARGE
    assert verdicts(png(*size)) == {str(caught.value)}


@pytest.mark.parametrize(
    "kind", ["jpeg 4:2:0", "jpeg cmyk", "png", "webp", "webp alpha", "avif", "gif", "bmp", "tiff", "tiff big"]
)
@pytest.mark.parametrize("limits", [Limits(max_pixels=61 * 40 - 1), Limits(max_side_px=60), Limits(max_bytes=100)])
def test_every_cap_holds_in_every_format(kind: str, limits: Limits) -> None:
    data = PICTURES[kind]()
    for read in (probe, validate, decode_full):
        with pytest.raises(ImageRefused) as caught:
            read(data, limits)
        assert caught.value.reason == Reason.TOO_LARGE
    assert probe(data, Limits(max_pixels=61 * 40, max_side_px=61)).width == 61


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_or_profile_bomb_is_not_inflated(kind: bytes) -> None:
    assert decode_full(png(8, 8, text_bomb(kind))).shape == (8, 8, 3)


def test_broken_metadata_chunks_do_not_cost_the_picture() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + b"\0\0\0\0"

    junk = b"".join(
        chunk(kind, b"\xff" * 3) for kind in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"eXIf", b"iCCP")
    )
    assert decode_full(png(8, 8, junk)).shape == (8, 8, 3)


def test_a_png_without_its_end_chunk_has_all_its_pixels() -> None:
    data = PICTURES["png"]()
    np.testing.assert_array_equal(decode_full(data[:-12]), decode_full(data))


def test_scans_of_a_progressive_jpeg_are_counted() -> None:
    data = PICTURES["jpeg progressive"]()
    at = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[at:-2] * image_containers.MAX_JPEG_SCANS + b"\xff\xd9"
    with pytest.raises(ImageRefused) as caught:
        probe(bomb)
    assert caught.value.reason == Reason.TOO_LARGE


def test_segments_of_a_jpeg_are_counted() -> None:
    data = PICTURES["jpeg 4:2:0"]()
    bomb = data[:2] + b"\xff\xfe\x00\x02" * (image_containers.MAX_JPEG_SEGMENTS + 1) + data[2:]
    assert verdicts(bomb) == {f"too_large: the JPEG has more than {image_containers.MAX_JPEG_SEGMENTS:,} segments"}


def test_a_gif_comment_that_pillow_would_gather_for_hours_is_too_large() -> None:
    data = PICTURES["gif"]()
    flags = data[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    comment = b"\x21\xfe" + (b"\xff" + b"a" * 255) * 5000 + b"\0"
    with pytest.raises(ImageRefused) as caught:
        probe(data[:at] + comment + data[at:])
    assert caught.value.reason == Reason.TOO_LARGE


def test_a_tiff_of_too_many_strips_or_of_a_huge_tile_is_too_large() -> None:
    base = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    for more in ([(279, 4, 30_000_000, 8)], [(322, 4, 1, 60_000), (323, 4, 1, 60_000)]):
        with pytest.raises(ImageRefused) as caught:
            probe(tiff([*base, *more], bytes(16)))
        assert caught.value.reason == Reason.TOO_LARGE


# ---- what is no image of ours


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"\0", Reason.NOT_IMAGE),
        (b"hello, this is text", Reason.NOT_IMAGE),
        (b"BMore text than bitmap", Reason.NOT_IMAGE),
        (b"<html><body>404</body></html>", Reason.NOT_IMAGE),
        (b"PK\x03\x04" + bytes(60), Reason.NOT_IMAGE),
        (b"%PDF-1.7" + bytes(60), Reason.NOT_IMAGE),
        (b"\x1f\x8b\x08" + bytes(60), Reason.NOT_IMAGE),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", Reason.NOT_IMAGE),
        (b"8BPS" + bytes(60), Reason.FORMAT_REFUSED),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", Reason.FORMAT_REFUSED),
        (b"\xff\x4f\xff\x51" + bytes(60), Reason.FORMAT_REFUSED),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60), Reason.FORMAT_REFUSED),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Reason.FORMAT_REFUSED),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", Reason.FORMAT_REFUSED),
        (b"\0\0\x01\0\x01\0" + bytes(60), Reason.FORMAT_REFUSED),
        (b"P6 4 4 255\n" + bytes(48), Reason.FORMAT_REFUSED),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.FORMAT_REFUSED),
        (bytes(128) + b"DICM" + bytes(60), Reason.FORMAT_REFUSED),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(60), Reason.FORMAT_REFUSED),
        (b"\xff\xd8\xff\xd9", Reason.TRUNCATED),
    ],
)  # fmt: skip
def test_what_is_no_image_of_ours_says_so(data: bytes, reason: Reason) -> None:
    with pytest.raises(ImageRefused) as caught:
        probe(data)
    assert caught.value.reason == reason
    assert verdicts(data) == {str(caught.value)}


@pytest.mark.parametrize(("precision", "marker"), [(12, 0xC1), (8, 0xC3), (8, 0xC9 + 2)])
def test_jpegs_of_other_processes_are_refused_by_name(precision: int, marker: int) -> None:
    data = bytearray(PICTURES["jpeg 4:2:0"]())
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    with pytest.raises(ImageRefused) as caught:
        probe(bytes(data))
    assert caught.value.reason == Reason.FORMAT_REFUSED


def test_formats_outside_the_list_are_refused_even_where_pillow_reads_them() -> None:
    for kind in ("PPM", "ICO", "JPEG2000", "SGI", "PCX", "TGA", "DDS"):
        with pytest.raises(ImageRefused) as caught:
            validate(saved(photo(), kind))
        assert caught.value.reason in (Reason.FORMAT_REFUSED, Reason.NOT_IMAGE)


# ---- the real ones


def hostile_rows(folder: Path) -> list[tuple[dict[str, str], bytes]]:
    with zipfile.ZipFile(folder / "hostile.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("hostile.csv").decode())))
        return [(row, archive.read(f"files/{row['file']}")) for row in rows]


@pytest.mark.filterwarnings("ignore")  # the reference's
def test_every_hostile_file_is_what_its_row_expects(shared_data: Path) -> None:
    rows = hostile_rows(shared_data)
    assert len(rows) == 110
    accepted = 0
    for row, data in rows:
        found = check_one_verdict(data)
        if row["expect"] in ("accept", "accept-normalised"):
            assert found == {"accepted"}, (row["file"], found)
        elif row["expect"] == "reject":
            assert found != {"accepted"}, row["file"]
        if found == {"accepted"} and row["decode"] == "ok":
            accepted += 1
            np.testing.assert_array_equal(decode_full(data), reference_full(data), err_msg=row["file"])
    assert accepted >= 60


def test_reasons_of_hostile_files(shared_data: Path) -> None:
    expected = {
        "zero_bytes.jpg": "empty", "html.jpg": "not_image", "hopper.tar": "not_image", "hopper.psd": "format_refused",
        "zero_bb.eps": "format_refused", "drawing.wmf": "format_refused", "monkey12.jpg": "format_refused",
        "png_true_bomb_12000x12000.png": "too_large", "decompression_bomb.gif": "too_large",
        "bmp_reallybig.bmp": "too_large", "jpeg_half.jpg": "truncated", "truncated_image.png": "truncated",
        "ultrahdr.jpg": "truncated", "broken_data_stream.png": "corrupt", "png_zero_width.png": "corrupt",
    }  # fmt: skip
    files = {row["file"]: data for row, data in hostile_rows(shared_data)}
    for name, reason in expected.items():
        with pytest.raises(ImageRefused) as caught:
            validate(files[name])
        assert caught.value.reason == reason, name


def test_a_refusal_is_the_same_in_every_run() -> None:
    """Pillow's message for what it cannot identify holds an address in memory."""
    data = b"BM" + bytes(12) + (40).to_bytes(4, "little") + bytes(100)
    assert len(verdicts(data)) == 1
    assert "0x" not in next(iter(verdicts(data)))


def test_a_picture_in_a_gif_larger_than_its_screen_is_capped() -> None:
    data = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b"\x2c")
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ImageRefused) as caught:
        probe(bytes(data))
    assert caught.value.reason == Reason.TOO_LARGE

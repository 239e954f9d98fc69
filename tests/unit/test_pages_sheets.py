"""Laws of the contact sheets: small upright pictures, nothing unsafe opened, no picture worth a failed page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
from eagleray.assure.report import Report, Sheet, Text, Tile
from eagleray.pages.sheets import SIDE_PX, thumbnail, with_pictures
from PIL import Image


def opened(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)), formats=["JPEG"]).convert("RGB")


def report_of(*tiles: Tile) -> Report:
    return Report("t", "c", (Text(("before",)), Sheet("s", tiles)))


def tiles_of(report: Report) -> tuple[Tile, ...]:
    return next(block.tiles for block in report.blocks if isinstance(block, Sheet))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (160, 160), (40, 30), (1000, 3)])
def test_a_thumbnail_keeps_the_shape_and_is_small(
    make_photo: Callable[..., bytes], kind: str, width: int, height: int
) -> None:
    small = opened(thumbnail(make_photo(1, width=width, height=height, kind=kind)))
    scale = min(1, SIDE_PX / max(width, height))
    assert small.size == (max(1, round(width * scale)), max(1, round(height * scale)))


def test_a_thumbnail_looks_like_the_picture(make_photo: Callable[..., bytes]) -> None:
    data = make_photo(3, width=640, height=480)
    whole = Image.open(io.BytesIO(data), formats=["JPEG"]).resize((160, 120), Image.Resampling.BOX)
    difference = np.abs(np.asarray(opened(thumbnail(data)), np.int16) - np.asarray(whole, np.int16))
    assert difference.mean() < 4  # of 255: JPEG at quality 70 with halved chroma, twice


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright(orientation: int) -> None:
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:45, :80] = 255  # a white quarter, upper left when upright
    turn = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p.transpose(1, 0, 2)[::-1],
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(turn(pixels))).save(buffer, "JPEG", quality=95, exif=exif)
    small = np.asarray(opened(thumbnail(buffer.getvalue())))
    assert small.shape == (90, 160, 3)
    assert small[:40, :75].mean() > 240
    assert small[50:].mean() < 15
    assert small[:, 85:].mean() < 15


def test_a_cut_jpeg_is_shown_as_far_as_it_goes(make_photo: Callable[..., bytes]) -> None:
    data = make_photo(5, width=640, height=480)
    small = np.asarray(opened(thumbnail(data[: len(data) // 2])), np.int16)
    whole = np.asarray(opened(thumbnail(data)), np.int16)
    assert max(small.shape[:2]) <= SIDE_PX
    assert small.shape == whole.shape
    assert np.abs(small[:40] - whole[:40]).mean() < 16  # the upper third is there
    assert small[-20:].std() < 8  # the end is one colour


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(40), b"GIF89a", bytes(1000)]
)
def test_what_is_no_picture_has_no_thumbnail(data: bytes) -> None:
    assert thumbnail(data) == ""


def test_every_cut_and_flipped_byte_gives_a_picture_or_none(make_photo: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF"):
        data = make_photo(7, width=200, height=120, kind=kind)
        for _ in range(25):
            hurt = bytearray(data[: rng.integers(1, len(data))])
            hurt[rng.integers(0, len(hurt))] ^= int(rng.integers(1, 256))
            uri = thumbnail(bytes(hurt))
            assert not uri or max(opened(uri).size) <= SIDE_PX


def test_a_picture_that_is_unsafe_is_never_read() -> None:
    def read(uri: str) -> bytes | None:
        raise AssertionError(f"{uri} was opened")

    report = report_of(Tile("file:///poison.jpg", is_unsafe=True))
    assert with_pictures(report, read) == report


def test_each_picture_is_read_once_and_filled_everywhere(make_photo: Callable[..., bytes]) -> None:
    asked: list[str] = []

    def read(uri: str) -> bytes | None:
        asked.append(uri)
        return make_photo(1) if uri.endswith("a.jpg") else None

    report = with_pictures(report_of(Tile("a.jpg"), Tile("b.jpg"), Tile("a.jpg", tag="again")), read)
    first, missing, again = tiles_of(report)
    assert asked == ["a.jpg", "b.jpg"]
    assert first.image == again.image != ""
    assert missing.image == ""
    assert again.tag == "again"


def test_a_tile_that_has_a_picture_keeps_it() -> None:
    report = report_of(Tile("a.jpg", image="data:image/png;base64,AA=="))
    assert with_pictures(report, lambda uri: b"x") == report


def test_an_archive_that_has_moved_costs_pictures_not_the_page() -> None:
    def read(uri: str) -> bytes | None:
        raise FileNotFoundError(uri)

    assert tiles_of(with_pictures(report_of(Tile("a.jpg")), read))[0].image == ""

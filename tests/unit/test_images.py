"""images.py on well-formed files: the policy of every kind of pixel, orientation, geometry, state of the process."""

from __future__ import annotations

import io
import pickle
import struct
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from eagleray.vision import codecs, images
from eagleray.vision.images import ImageRefused, ImageSpec, Limits, Reason, decode, decode_full, probe, validate
from PIL import Image, ImageFile

from tests.reference_decode import differences, reference_decode, reference_full

WIDTH, HEIGHT = 61, 40


def photo(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bit(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)


PICTURES: dict[str, Callable[[], bytes]] = {
    "jpeg 4:2:0": lambda: saved(photo(), "JPEG", quality=90),
    "jpeg 4:4:4": lambda: saved(photo(), "JPEG", quality=95, subsampling=0),
    "jpeg progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "jpeg restart markers": lambda: saved(photo(), "JPEG", restart_marker_rows=1),
    "jpeg gray": lambda: saved(photo().convert("L"), "JPEG"),
    "jpeg cmyk": lambda: saved(photo().convert("CMYK"), "JPEG"),
    "jpeg rgb": lambda: saved(photo(), "JPEG", keep_rgb=True),
    "mpo": lambda: saved(photo(), "MPO", save_all=True, append_images=[photo(seed=1)]),
    "png": lambda: saved(photo(), "PNG"),
    "png 1 bit": lambda: saved(photo().convert("1"), "PNG"),
    "png gray": lambda: saved(photo().convert("L"), "PNG"),
    "png gray tRNS": lambda: saved(photo().convert("L"), "PNG", transparency=7),
    "png gray alpha": lambda: saved(photo().convert("LA"), "PNG"),
    "png rgb tRNS": lambda: saved(photo(), "PNG", transparency=(1, 2, 3)),
    "png rgba": lambda: saved(translucent(), "PNG"),
    "png palette": lambda: saved(photo().quantize(32), "PNG"),
    "png palette tRNS": lambda: saved(photo().quantize(32), "PNG", transparency=bytes(range(0, 256, 8))),
    "png 16 bit gray": lambda: saved(Image.fromarray(sixteen_bit()), "PNG"),
    "apng": lambda: saved(photo(), "PNG", save_all=True, append_images=[photo(seed=1)]),
    "webp": lambda: saved(photo(), "WEBP", quality=80),
    "webp lossless": lambda: saved(photo(), "WEBP", lossless=True),
    "webp alpha": lambda: saved(translucent(), "WEBP", lossless=True, exact=True),
    "webp animated": lambda: saved(photo(), "WEBP", save_all=True, append_images=[photo(seed=1)]),
    "avif": lambda: saved(photo(), "AVIF", quality=80),
    "gif": lambda: saved(photo().quantize(32), "GIF"),
    "gif animated": lambda: saved(photo().quantize(8), "GIF", save_all=True, append_images=[photo(seed=1)]),
    "bmp": lambda: saved(photo(), "BMP"),
    "bmp palette": lambda: saved(photo().quantize(16), "BMP"),
    "tiff": lambda: saved(photo(), "TIFF"),
    "tiff lzw": lambda: saved(photo(), "TIFF", compression="tiff_lzw"),
    "tiff big-endian 16 bit": lambda: saved(Image.fromarray(sixteen_bit().astype(">u2")), "TIFF"),
    "tiff 1 bit g4": lambda: saved(photo().convert("1"), "TIFF", compression="group4"),
    "tiff cmyk": lambda: saved(photo().convert("CMYK"), "TIFF"),
    "tiff rgba": lambda: saved(translucent(), "TIFF"),
    "tiff pages": lambda: saved(photo(), "TIFF", save_all=True, append_images=[photo(seed=1)]),
    "tiff big": lambda: saved(photo(), "TIFF", big_tiff=True),
}


def translucent() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize("kind", sorted(PICTURES))
def test_each_kind_of_pixel_equals_the_reference(kind: str) -> None:
    data = PICTURES[kind]()
    full = decode_full(data)
    np.testing.assert_array_equal(full, reference_full(data))
    assert full.dtype == np.uint8
    assert full.flags.c_contiguous
    assert full.flags.writeable
    header = probe(data)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert validate(data) == header
    spec = ImageSpec(24, 24)
    # bicubic on gray is done once and repeated, box coordinates are float32 in Pillow: a rounding of 1
    assert np.abs(decode(data, spec).astype(int) - reference_decode(data, spec)).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    for data in (PICTURES["png 16 bit gray"](), PICTURES["tiff big-endian 16 bit"]()):
        full = decode_full(data)[..., 0]
        np.testing.assert_array_equal(full, sixteen_bit() >> 8)
        assert len(np.unique(full)) == 256


def tiff(tags: list[tuple[int, int, int, int]], payload: bytes) -> bytes:
    """A little-endian TIFF of one strip: (tag, type, count, value) entries; StripOffsets is put in."""
    offset = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted([*tags, (273, 4, 1, offset)])
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0\0\0\0" + payload


def test_twelve_bits_are_scaled_by_their_own_depth() -> None:
    values = [0x000, 0x7FF, 0x800, 0xFFF]
    packed = bytes([0x00, 0x07, 0xFF, 0x80, 0x0F, 0xFF])
    tags = [
        (256, 3, 1, 4),
        (257, 3, 1, 1),
        (258, 3, 1, 12),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (278, 3, 1, 1),
        (279, 4, 1, 6),
    ]
    pixels = decode_full(tiff(tags, packed))
    assert pixels[0, :, 0].tolist() == [value >> 4 for value in values]


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)])
def test_pixels_without_an_agreed_scale_are_refused(array: np.ndarray) -> None:
    data = saved(Image.fromarray(array), "TIFF")
    for read in (validate, decode_full):
        with pytest.raises(ImageRefused) as caught:
            read(data)
        assert caught.value.reason == Reason.FORMAT_REFUSED


# ---- orientation


def oriented(kind: str, orientation: int, image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    return saved(image or photo(), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_in_every_format(kind: str, orientation: int) -> None:
    data = oriented(kind, orientation)
    np.testing.assert_array_equal(decode_full(data), reference_full(data))
    header = probe(data)
    assert header.orientation == orientation
    assert (header.width, header.height) == ((HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))
    # an even crop of odd margins: a mirrored crop must round as the upright one does
    spec = ImageSpec(20, 26, crop_pct=0.7)
    # turning after the resize swaps the passes of the filter: each rounds once
    assert np.abs(decode(data, spec).astype(int) - reference_decode(data, spec)).max() <= 2


def test_orientation_survives_a_reduced_decode() -> None:
    for orientation in range(1, 9):
        data = oriented("JPEG", orientation, photo(620, 430))
        spec = ImageSpec(56, 40, crop_pct=0.9)
        assert codecs.load(data, Limits(), needed=spec.resized).reduction == 4
        mean, p99 = differences(decode(data, spec), reference_decode(data, spec))
        assert mean <= 1.5, orientation
        assert p99 <= 12, orientation


def test_xmp_orientation_counts_where_exif_has_none() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP"):
        data = saved(photo(), kind, xmp=xmp)
        assert probe(data).orientation == 6
        np.testing.assert_array_equal(decode_full(data), reference_full(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # the reference's
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    data = saved(photo(), "JPEG", exif=exif) if exif else saved(photo(), "JPEG")
    assert probe(data).orientation == 1
    np.testing.assert_array_equal(decode_full(data), reference_full(data))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_is_none(value: int) -> None:
    assert probe(oriented("JPEG", value)).orientation == 1


# ---- geometry and output


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(300, 200), (199, 301), (32, 32), (7, 5), (1, 40)])
def test_decode_equals_resize_then_crop(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    spec = ImageSpec(33, 28, crop_pct=0.8, crop_mode=mode, interpolation=interpolation)
    data = saved(photo(*size), "PNG")
    got, want = decode(data, spec, is_scaled=False).astype(int), reference_decode(data, spec).astype(int)
    # Pillow takes the box in float32, and its filters round their weights to 22 bits
    assert np.abs(got - want).max() <= (0 if interpolation == "nearest" else 2)


@pytest.mark.parametrize("size", [(16_384, 1), (1, 16_384), (3, 16_000), (1, 1)])
def test_the_thinnest_pictures_have_a_target_too(size: tuple[int, int]) -> None:
    data = saved(photo(*size), "PNG")
    for mode in ("center", "squash", "border"):
        for interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
            spec = ImageSpec(24, 32, crop_mode=mode, interpolation=interpolation)
            for is_scaled in (True, False):
                assert decode(data, spec, is_scaled=is_scaled).shape == (24, 32, 3)


def test_a_picture_of_the_target_size_is_not_touched() -> None:
    image = photo(32, 32)
    spec = ImageSpec(32, 32, crop_pct=1.0, interpolation="bilinear")
    np.testing.assert_array_equal(decode(saved(image, "PNG"), spec), np.asarray(image))


def test_out_is_written_in_place_and_bgr_is_rgb_reversed() -> None:
    data = PICTURES["jpeg 4:2:0"]()
    batch = np.zeros((3, 16, 16, 3), np.uint8)
    given_back = decode(data, ImageSpec(16, 16), out=batch[1])
    assert np.shares_memory(given_back, batch)
    assert batch[1].any()
    assert not batch[0].any()
    assert not batch[2].any()
    np.testing.assert_array_equal(decode(data, ImageSpec(16, 16, color="bgr")), batch[1][:, :, ::-1])


def test_out_is_untouched_when_an_image_is_refused() -> None:
    out = np.full((8, 8, 3), 9, np.uint8)
    with pytest.raises(ImageRefused):
        decode(PICTURES["jpeg 4:2:0"]()[:-200], ImageSpec(8, 8), out=out)
    assert (out == 9).all()


def test_a_reduced_decode_never_falls_short_of_the_resize() -> None:
    for width, height in ((2000, 300), (300, 2000), (1024, 768), (257, 4000), (64, 64)):
        spec = ImageSpec(32, 48, crop_pct=1.0)
        factor = codecs._reduction((width, height), spec.resized(width, height))
        resized = spec.resized(width, height)
        assert factor == 1 or all(-(-a // factor) >= b for a, b in zip((width, height), resized, strict=True))


# ---- state of the process


def test_warnings_as_errors_change_no_verdict() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        for kind in ("png palette tRNS", "tiff", "webp alpha", "jpeg cmyk"):
            validate(PICTURES[kind]())
        assert warnings.filters == before


def test_pillow_told_to_load_truncated_images_still_refuses_them_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("jpeg cmyk", "bmp", "tiff"):
        data = PICTURES[kind]()
        with pytest.raises(ImageRefused):
            validate(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_out_of_memory_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object, **__: object) -> None:
        raise MemoryError

    data, fallback = PICTURES["jpeg 4:2:0"](), PICTURES["png"]()
    with monkeypatch.context() as patch:
        patch.setattr(images, "resize", starve)
        patch.setattr(Image.Image, "resize", starve)
        for size in (8, 40):
            with pytest.raises(ImageRefused) as caught:
                decode(data, ImageSpec(size, size))
            assert caught.value.reason == Reason.POISON
    monkeypatch.setattr(codecs.simplejpeg, "decode_jpeg", starve)
    monkeypatch.setattr(ImageFile.ImageFile, "load", starve)
    for each in (data, fallback):
        with pytest.raises(ImageRefused) as caught:
            validate(each)
        assert caught.value.reason == Reason.POISON


def test_threads_decode_as_one_does() -> None:
    kinds = ["jpeg 4:2:0", "jpeg cmyk", "png", "webp", "tiff lzw", "gif"]
    spec = ImageSpec(16, 16)
    pictures = [PICTURES[kind]() for kind in kinds]
    expected = [decode(data, spec) for data in pictures]
    wrong: list[str] = []

    def work(turn: int) -> None:
        for step in range(30):
            index = (step + turn) % len(kinds)
            if not np.array_equal(decode(pictures[index], spec), expected[index]):
                wrong.append(kinds[index])

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    filters, lenient = list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert warnings.filters == filters
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_refusal_survives_pickling() -> None:
    refused = pickle.loads(pickle.dumps(ImageRefused(Reason.CORRUPT, "why")))
    assert (refused.reason, refused.detail, str(refused)) == (Reason.CORRUPT, "why", "corrupt: why")
    assert [str(reason) for reason in Reason] == [
        "empty", "not_image", "format_refused", "too_large", "truncated", "corrupt", "unreadable", "poison"
    ]  # fmt: skip

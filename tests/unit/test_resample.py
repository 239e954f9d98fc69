"""The kernel gives Pillow's bits: every instruction set, filter, window and channel count; and so does its stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from eagleray.core.errors import CapabilityError
from eagleray.vision import resample
from eagleray.vision.resample import PILLOW_FILTERS, SETS, Window, resize, to_planes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

LIBRARY = resample._library()
needs_kernel = pytest.mark.skipif(LIBRARY is None, reason="resample.c was not built: no C compiler at install time")


@pytest.fixture(params=["pillow", *SETS])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to resize that this machine has."""
    if request.param == "pillow":
        monkeypatch.setattr(resample, "_library", lambda: None)
        yield request.param
        return
    if LIBRARY is None:
        pytest.skip("resample.c was not built: no C compiler at install time")
    level = SETS.index(request.param)
    if LIBRARY.eagleray_choose(level) != level:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    LIBRARY.eagleray_choose(len(SETS) - 1)


def picture(rng: np.random.Generator, width: int, height: int, channels: int) -> np.ndarray:
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if rng.random() < 0.3 else pixels  # hard edges overshoot


def oracle(pixels: np.ndarray, x: Window, y: Window, interpolation: str) -> np.ndarray:
    """Pillow resizes all of it; then the window is cut out."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3].copy())
    whole = image.resize((x.total, y.total), PILLOW_FILTERS[interpolation], (x.begin, y.begin, x.end, y.end))
    return np.asarray(whole.convert("RGB"))[y.first : y.first + y.count, x.first : x.first + x.count]


def resized(pixels: np.ndarray, x: Window, y: Window, interpolation: str) -> np.ndarray:
    out = np.empty((y.count, x.count, 3), np.uint8)
    resize(pixels, out, x, y, interpolation=interpolation)
    return out


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_kernel_gives_pillows_bits(kernel: str, interpolation: str, channels: int) -> None:
    rng = np.random.default_rng(channels)
    for width, height, wide, high in ((500, 375, 341, 256), (375, 500, 256, 341), (97, 61, 200, 17), (5, 300, 40, 31),
                                      (300, 5, 31, 40), (1, 1, 7, 9), (64, 64, 64, 64), (33, 20, 1, 1)):  # fmt: skip
        pixels = picture(rng, width, height, channels)
        for _ in range(4):
            first_x, first_y = int(rng.integers(wide)), int(rng.integers(high))
            x = Window.of_whole(width, wide, first_x, int(rng.integers(1, wide - first_x + 1)))
            y = Window.of_whole(height, high, first_y, int(rng.integers(1, high - first_y + 1)))
            expected = oracle(pixels, x, y, interpolation)
            np.testing.assert_array_equal(resized(pixels, x, y, interpolation), expected, err_msg=f"{x} {y}")


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    have=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    want=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
def test_any_crop_of_any_picture_is_pillows_box(
    seed: int, have: tuple[int, int], want: tuple[int, int], interpolation: str
) -> None:
    """What a random resized crop asks: a part of the source, at fractions of a pixel, becomes the whole of the view."""
    rng = np.random.default_rng(seed)
    pixels = picture(rng, *have, 3)
    windows = []
    for length, total in zip(have, want, strict=True):
        begin, end = np.sort(rng.uniform(0, length, 2)).astype(np.float32).tolist()
        windows.append(Window(total, 0, total, begin, max(end, min(float(length), begin + 0.5))))
    image = Image.fromarray(pixels).resize(
        want, PILLOW_FILTERS[interpolation], (windows[0].begin, windows[1].begin, windows[0].end, windows[1].end)
    )
    np.testing.assert_array_equal(resized(pixels, windows[0], windows[1], interpolation), np.asarray(image))


def test_rows_that_do_not_lie_together_are_read_and_written(kernel: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    x, y = Window.of_whole(30, 20, 2, 15), Window.of_whole(40, 20, 1, 18)
    expected = oracle(np.ascontiguousarray(pixels[::-1, ::2]), x, y, "bicubic")
    canvas = np.full((24, 30, 3), 7, np.uint8)
    resize(pixels[::-1, ::2], canvas[3:21, 5:20], x, y, interpolation="bicubic")
    np.testing.assert_array_equal(canvas[3:21, 5:20], expected)
    canvas[3:21, 5:20] = 7
    assert (canvas == 7).all()
    turned = np.empty((15, 18, 3), np.uint8)
    resize(pixels[::-1, ::2], turned.transpose(1, 0, 2), x, y, interpolation="bicubic")
    np.testing.assert_array_equal(turned.transpose(1, 0, 2), expected)


@pytest.mark.parametrize("mirrored", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mirrored_window_is_the_window_mirrored(kernel: str, mirrored: tuple[bool, bool], channels: int) -> None:
    rng = np.random.default_rng(3)
    for width, height in ((97, 61), (5, 300), (7, 9)):
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        x, y = Window(40, 0, 40, 1.25, width - 0.5), Window(31, 2, 20, 0.0, float(height))
        expected = resized(pixels, x, y, "bicubic")[:: -1 if mirrored[1] else 1, :: -1 if mirrored[0] else 1]
        x, y = replace(x, is_mirrored=mirrored[0]), replace(y, is_mirrored=mirrored[1])
        np.testing.assert_array_equal(resized(pixels, x, y, "bicubic"), expected)


@needs_kernel
def test_no_byte_outside_the_arrays_is_written(kernel: str) -> None:
    rng = np.random.default_rng(1)
    for width, height, channels in ((5, 4, 3), (7, 3, 1), (16, 9, 4), (33, 1, 3)):
        flat = np.full(64 + 6 * 11 * 3 + 64, 9, np.uint8)
        out = flat[64:-64].reshape(11, 6, 3)
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        x, y = Window.of_whole(width, 6, 0, 6), Window.of_whole(height, 11, 0, 11)
        for is_down_first in (False, True):
            resize(pixels, out, x, y, interpolation="bicubic", is_down_first=is_down_first)
            assert (flat[:64] == 9).all()
            assert (flat[-64:] == 9).all()


def test_planes_are_numpys_bits(kernel: str) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    scale, bias = rng.normal(size=3).astype(np.float32), rng.normal(size=3).astype(np.float32)
    out = np.empty((3, 13, 17), np.float32)
    to_planes(pixels, scale, bias, out)
    product = pixels.astype(np.float32) * scale
    np.testing.assert_array_equal(out, (product + bias).transpose(2, 0, 1))


def test_the_kernel_that_is_used_has_a_name(kernel: str) -> None:
    assert resample.kernel() in ("pillow", *SETS)
    assert (resample.kernel() == "pillow") == (kernel == "pillow")


@needs_kernel
def test_a_kernel_built_from_another_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "INTERFACE", resample.INTERFACE + 1)
    resample._library.cache_clear()
    with pytest.raises(CapabilityError, match=r"_resample.*another resample\.c"):
        resample.kernel()
    monkeypatch.undo()
    assert resample.kernel() in SETS

"""ImageSpec: what it refuses, that it survives JSON, its geometry against the obvious one, and normalize."""

from __future__ import annotations

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.vision.images import ImageSpec, normalize
from hypothesis import given
from hypothesis import strategies as st

from tests.reference_decode import reference_size


def test_json_round_trip_keeps_the_spec_and_its_digest() -> None:
    spec = ImageSpec(224, 192, crop_pct=0.9, crop_mode="border", color="bgr", value_range=(0, 255), mean=(1, 2, 3))
    assert ImageSpec.from_json(spec.to_json()) == spec
    assert ImageSpec.from_json(spec.to_json()).digest == spec.digest


def test_digest_depends_on_every_setting_and_not_on_int_or_float() -> None:
    base = ImageSpec(224, 224, mean=(0, 0, 0))
    others = [
        ImageSpec(225, 224, mean=(0, 0, 0)),
        ImageSpec(224, 225, mean=(0, 0, 0)),
        ImageSpec(224, 224),
        ImageSpec(224, 224, mean=(0, 0, 0), std=(1, 1, 1)),
        ImageSpec(224, 224, mean=(0, 0, 0), crop_pct=0.9),
        ImageSpec(224, 224, mean=(0, 0, 0), crop_mode="squash"),
        ImageSpec(224, 224, mean=(0, 0, 0), interpolation="bilinear"),
        ImageSpec(224, 224, mean=(0, 0, 0), color="bgr"),
        ImageSpec(224, 224, mean=(0, 0, 0), value_range=(0, 255)),
    ]
    assert len({base.digest, *(spec.digest for spec in others)}) == 1 + len(others)
    assert ImageSpec(224, 224, mean=(0.0, 0.0, 0.0)).digest == base.digest


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"height": 0}, "height=0"),
        ({"width": 5000}, "width=5000"),
        ({"crop_pct": 0.0}, "crop_pct=0.0"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
        ({"crop_mode": "middle"}, "crop_mode='middle'"),
        ({"interpolation": "cubic"}, "interpolation='cubic'"),
        ({"color": "gray"}, "color='gray'"),
        ({"mean": (0.5,)}, "mean="),
        ({"std": (0.0, 1.0, 1.0)}, "std="),
        ({"std": (float("nan"), 1.0, 1.0)}, "std="),
        ({"value_range": (1.0, 0.0)}, "value_range="),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused_by_name(wrong: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageSpec(**{"height": 224, "width": 224, **wrong})  # type: ignore[arg-type]
    assert names in str(caught.value)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ImageSpec(0, 0, crop_mode="middle")
    assert all(part in str(caught.value) for part in ("height", "width", "crop_mode"))


@pytest.mark.parametrize("change", [{"schema": 2}, {"schema": None}, {"sise": 3}])
def test_a_newer_schema_or_an_unknown_key_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        ImageSpec.from_json({**ImageSpec(8, 8).to_json(), **change})
    with pytest.raises(ArtifactError):
        ImageSpec.from_json({"schema": 1})


@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from([1.0, 0.875, 0.9, 0.95, 0.5, 0.224]),
    st.sampled_from(["center", "squash", "border"]),
)
def test_layout_is_timms_geometry_and_stays_inside(w: int, h: int, tw: int, th: int, pct: float, mode: str) -> None:
    spec = ImageSpec(th, tw, crop_pct=pct, crop_mode=mode)
    layout = spec.layout(w, h)
    expected = reference_size(w, h, spec)
    assert layout.resized == (max(1, expected[0]), max(1, expected[1]))
    for axis, target in ((layout.x, tw), (layout.y, th)):
        assert axis.crop_px >= 0
        assert axis.crop_px + axis.content_px <= axis.resized_px
        assert axis.pad_px >= 0
        assert axis.pad_px + axis.content_px <= target
        assert axis.content_px == min(axis.resized_px, target)


def test_no_resize_when_the_picture_has_the_target_size() -> None:
    spec = ImageSpec(32, 32, crop_pct=1.0)
    assert spec.layout(32, 32).resized == (32, 32)
    assert spec.layout(32, 32).x.crop_px == 0


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_normalize_is_the_formula_and_fills_out(value_range: tuple[float, float]) -> None:
    low, high = value_range
    spec = ImageSpec(5, 7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), value_range=value_range)
    batch = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    expected = (low + batch.astype(np.float64) / 255 * (high - low) - np.array(spec.mean)) / np.array(spec.std)
    out = np.full((4, 3, 5, 7), np.nan, np.float32)
    given_back = normalize(batch, spec, out)
    assert given_back is out
    assert normalize(batch, spec).dtype == np.float32
    # float32 keeps 7 digits; the values reach 637
    np.testing.assert_allclose(out, expected.transpose(0, 3, 1, 2), rtol=2e-6, atol=2e-6 * high)
    np.testing.assert_array_equal(out, normalize(batch, spec))


def test_normalize_gives_an_image_the_same_whatever_batch_it_is_in() -> None:
    spec = ImageSpec(9, 9)
    batch = np.random.default_rng(1).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(normalize(batch, spec)[1], normalize(batch[1:2], spec)[0])
    assert normalize(batch[:0], spec).shape == (0, 3, 9, 9)

"""Crops: lightly's values, torchvision's distribution, one decode, Pillow's pixels, and no dependence on the batch."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from eagleray.core.config import load as load_config
from eagleray.core.errors import ConfigError
from eagleray.learn.draws import uniforms
from eagleray.learn.selfsup import views
from eagleray.learn.selfsup.views import (
    ViewPlan,
    ViewSpec,
    ViewTransform,
    byol_plan,
    dino_plan,
    draw_crop,
    simclr_plan,
)
from eagleray.learn.task import Item
from eagleray.vision.images import ImageRefused
from eagleray.vision.torchvision_guard import ensure_importable
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PLANS = {"simclr": simclr_plan(24), "byol": byol_plan(24), "dino": dino_plan(32, 16, 3)}


def item(data: bytes) -> Item:
    return Item(hashlib.sha256(data).hexdigest(), data)


@pytest.fixture(scope="module")
def items(make_photo: Callable[..., bytes]) -> list[Item]:
    sizes = [(96, 72), (60, 90), (11, 7), (1, 1), (200, 30), (64, 64), (500, 400)]
    return [
        item(make_photo(seed, width=width, height=height, kind=kind))
        for seed, (width, height) in enumerate(sizes)
        for kind in ("JPEG", "PNG")
    ]


def lightly_transforms() -> dict[str, list]:
    """The torchvision transforms of each of lightly's views, by method."""
    ensure_importable()
    lightly = pytest.importorskip("lightly.transforms")
    made = {
        "simclr": lightly.SimCLRTransform(input_size=24),
        "byol": lightly.BYOLTransform(
            lightly.BYOLView1Transform(input_size=24), lightly.BYOLView2Transform(input_size=24)
        ),
        "dino": lightly.DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=3),
    }
    return {name: [view.transform.transforms for view in each.transforms] for name, each in made.items()}


def as_spec(transforms: list) -> ViewSpec:
    """What lightly's transforms of one view say, as a spec of ours."""
    by_name = {type(each).__name__: each for each in transforms}
    crop, jitter = by_name["RandomResizedCrop"], by_name["RandomApply"].transforms[0]
    return ViewSpec(
        size_px=crop.size[0],
        scale=crop.scale,
        ratio=crop.ratio,
        interpolation=getattr(crop.interpolation, "value", crop.interpolation),
        flip_p=by_name["RandomHorizontalFlip"].p,
        jitter_p=by_name["RandomApply"].p,
        brightness=jitter.brightness[1] - 1,
        contrast=jitter.contrast[1] - 1,
        saturation=jitter.saturation[1] - 1,
        hue=jitter.hue[1],
        grayscale_p=by_name["RandomGrayscale"].p,
        blur_p=by_name["GaussianBlur"].prob,
        sigma_px=by_name["GaussianBlur"].sigmas,
        solarize_p=by_name["RandomSolarization"].prob if "RandomSolarization" in by_name else 0.0,
    )


@pytest.mark.parametrize("method", PLANS)
def test_plans_have_the_values_of_lightlys_transforms(method: str) -> None:
    theirs = [as_spec(transforms).model_dump() for transforms in lightly_transforms()[method]]
    for ours, expected in zip(PLANS[method].specs, theirs, strict=True):
        found = ours.model_dump()
        strength = found.pop("jitter_strength")
        found |= {name: strength * found[name] for name in ("brightness", "contrast", "saturation", "hue")}
        found["num"] = 1
        del expected["jitter_strength"]
        assert {name: pytest.approx(value) for name, value in expected.items()} == found


@pytest.mark.parametrize("size", [(500, 375), (60, 90), (300, 31)])
@pytest.mark.parametrize("spec", [PLANS["simclr"].specs[0], *PLANS["dino"].specs[1:3]], ids=["simclr", "wide", "local"])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], spec: ViewSpec) -> None:
    """Kolmogorov and Smirnov over 3,000 crops each: the largest distance that chance allows once in 10,000 is 0.057."""
    ensure_importable()
    import torch
    from torchvision.transforms import v2

    (width, height), count = size, 3_000
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(spec.size_px, spec.scale, spec.ratio)
    probe = Image.new("L", size)
    theirs = [crop.make_params([probe]) for _ in range(count)]
    draws = uniforms(seed=0, epoch=0, keys=np.arange(count, dtype=np.uint64), streams=[0], count=views._DRAWS)
    ours = [draw_crop(width, height, spec, row) for row in draws[:, 0].tolist()]

    def facts(left: float, top: float, w: float, h: float) -> list[float]:
        return [w * h / width / height, w / h, left / max(1, width - w), top / max(1, height - h), left + w / 2, top]

    rows = np.array([facts(*each[:4]) for each in ours])
    expected = np.array([facts(each["left"], each["top"], each["width"], each["height"]) for each in theirs])
    for found, wanted in zip(rows.T, expected.T, strict=True):
        grid = np.unique(np.concatenate([found, wanted]))
        steps = [np.searchsorted(np.sort(values), grid, side="right") / count for values in (found, wanted)]
        assert np.abs(steps[0] - steps[1]).max() < 0.057
    assert abs(np.mean([each.is_flipped for each in ours]) - spec.flip_p) < 0.05


def oracle(data: bytes, plan: ViewPlan, epoch: int, id_: str) -> list[np.ndarray]:
    """Whole decode by Pillow, upright first, one boxed resize a view, then the flip."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))).convert("RGB")
    key = np.array([int(id_[:16], 16)], np.uint64)
    streams = views.crop_streams(range(len(plan.specs)))
    draws = uniforms(seed=plan.seed, epoch=epoch, keys=key, streams=streams, count=views._DRAWS)[0]
    shown = []
    for spec, row in zip(plan.specs, draws.tolist(), strict=True):
        crop = draw_crop(*image.size, spec, row)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        view = np.asarray(image.resize((spec.size_px, spec.size_px), FILTERS[spec.interpolation], box))
        shown.append(view[:, ::-1] if crop.is_flipped else view)
    return shown


@pytest.mark.parametrize("method", PLANS)
def test_views_are_pillows_boxed_resizes_bit_for_bit(method: str, items: list[Item]) -> None:
    """Where nothing is reduced; sources smaller than the crop, of one pixel, very wide, JPEG and PNG among them."""
    plan = PLANS[method].model_copy(update={"is_scaled": False})
    arrays = ViewTransform(plan)(items, epoch=2)
    for index, each in enumerate(items):
        for number, expected in enumerate(oracle(each.data, plan, 2, each.id)):
            np.testing.assert_array_equal(arrays[f"view_{number}"][index], expected)


def test_where_nothing_is_reduced_is_scaled_changes_nothing(items: list[Item]) -> None:
    small = items[:-2]  # all but the 500 x 400 pixels, of which views of 24 px need a fraction
    exact = ViewTransform(PLANS["simclr"].model_copy(update={"is_scaled": False}))(small, 0)
    for name, array in ViewTransform(PLANS["simclr"])(small, 0).items():
        np.testing.assert_array_equal(array, exact[name])


def test_a_reduced_decode_is_near_the_exact_one(items: list[Item], make_photo: Callable[..., bytes]) -> None:
    """Mean |d| below 2 levels: noise on smooth colours, as make_photo has it, is harder than photos are (below 1.6)."""
    large = [item(make_photo(9, width=1600, height=1200, kind=kind)) for kind in ("JPEG", "PNG")]
    plan = dino_plan(48, 16, 2)
    exact = ViewTransform(plan.model_copy(update={"is_scaled": False}))(large, 0)
    for name, array in ViewTransform(plan)(large, 0).items():
        assert np.abs(array.astype(float) - exact[name].astype(float)).mean() < 2, name


def test_each_image_is_decoded_once_and_as_small_as_its_sharpest_crop_allows(
    make_photo: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(*args: object, **options: object) -> object:
        picture = load(*args, **options)
        seen.append(picture.reduction)
        return picture

    load = views.load
    monkeypatch.setattr(views, "load", spy)
    photos = [item(make_photo(seed, width=800, height=600)) for seed in range(6)]
    ViewTransform(dino_plan(32, 16, 6))(photos, 0)
    ViewTransform(dino_plan(400, 16, 6))(photos, 0)
    assert len(seen) == 12
    assert min(seen[:6]) >= 2
    assert set(seen[6:]) == {1}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_turned_pictures_are_shown_upright(orientation: int, kind: str, make_photo: Callable[..., bytes]) -> None:
    """Turning and resizing commute but for the rounding between the two passes: mean |d| below 0.5 of a level."""
    image = Image.open(io.BytesIO(make_photo(3, width=97, height=61, kind="PNG")), formats=("PNG",))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    plan = ViewPlan(views=(ViewSpec(size_px=40, num=8),), is_scaled=False)
    made = item(buffer.getvalue())
    arrays = ViewTransform(plan)([made], 0)
    for number, expected in enumerate(oracle(made.data, plan, 0, made.id)):
        found = arrays[f"view_{number}"][0]
        assert np.abs(found.astype(float) - expected).mean() < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_gray_pictures_have_three_equal_channels(kind: str) -> None:
    buffer = io.BytesIO()
    gray = np.random.default_rng(0).integers(0, 256, (50, 70), dtype=np.uint8)
    Image.fromarray(gray).resize((70, 50)).save(buffer, kind)
    made = item(buffer.getvalue())
    arrays = ViewTransform(PLANS["dino"])([made], 0)
    for number, expected in enumerate(oracle(made.data, PLANS["dino"], 0, made.id)):
        np.testing.assert_array_equal(arrays[f"view_{number}"][0], expected)


def test_pixels_do_not_depend_on_the_batch_the_order_or_the_thread(items: list[Item]) -> None:
    transform = pickle.loads(pickle.dumps(ViewTransform(PLANS["dino"])))
    together = transform(items, 4)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda each: transform([each], 4), reversed(items)))[::-1]
    for name, array in together.items():
        np.testing.assert_array_equal(np.concatenate([each[name] for each in alone]), array)
    assert together["key"].tolist() == [int(each.id[:16], 16) for each in items]


def test_another_epoch_seed_or_view_is_another_crop(items: list[Item]) -> None:
    plan = PLANS["simclr"]
    first, later = ViewTransform(plan)(items[:1], 0), ViewTransform(plan)(items[:1], 1)
    other = ViewTransform(plan.model_copy(update={"seed": 1}))(items[:1], 0)
    for array in (later["view_0"], other["view_0"], first["view_1"]):
        assert (array != first["view_0"]).any()


def test_no_images_give_empty_arrays() -> None:
    arrays = ViewTransform(PLANS["dino"])([], 0)
    assert {name: array.shape for name, array in arrays.items()}["view_4"] == (0, 16, 16, 3)
    assert arrays["key"].shape == (0,)


def test_an_image_that_cannot_be_read_is_refused(make_photo: Callable[..., bytes]) -> None:
    with pytest.raises(ImageRefused):
        ViewTransform(PLANS["simclr"])([item(make_photo(0)[:200])], 0)


def test_a_plan_that_cannot_be_meant_is_refused() -> None:
    view = {"size_px": 8}
    for wrong in (
        {"views": []},
        {"views": [view | {"scale": [0.5, 0.2]}]},
        {"views": [view | {"blur_p": 1.5}]},
        {"views": [view | {"hue": 0.4, "jitter_strength": 2}]},
        {"views": [view], "std": [0, 1, 1]},
        {"views": [view | {"sigma": 1}]},
    ):
        with pytest.raises(ConfigError):
            load_config(ViewPlan, overrides=wrong)

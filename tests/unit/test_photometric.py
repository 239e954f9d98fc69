"""Colours: Pillow's by a slow oracle, lightly's by their moments, and the same bits in any batch."""

from __future__ import annotations

import colorsys
import copy
import hashlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from eagleray.learn.draws import uniforms
from eagleray.learn.selfsup.colours import NUM_DRAWS, Colours, blur_taps
from eagleray.learn.selfsup.photometric import Photometric, _turn_hue
from eagleray.learn.selfsup.views import (
    ViewPlan,
    ViewSpec,
    ViewTransform,
    byol_plan,
    colour_streams,
    dino_plan,
    simclr_plan,
)
from eagleray.learn.task import Item
from eagleray.vision.torchvision_guard import ensure_importable
from PIL import Image, ImageFilter, ImageOps

ensure_importable()

from torchvision.transforms import functional as pillow_ops  # noqa: E402  torchvision must be importable first

PLANS = {"simclr": simclr_plan(32), "byol": byol_plan(32), "dino": dino_plan(40, 24, 2)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Real photos, small, so that lightly's side is quick too."""
    data = pytest.importorskip("skimage.data")
    return [
        Image.fromarray(getattr(data, name)()[..., :3]).resize((160, 120), Image.Resampling.LANCZOS)
        for name in ("astronaut", "chelsea", "coffee", "rocket")
    ]


def batch_of(photos: list[Image.Image], plan: ViewPlan, count: int) -> dict[str, torch.Tensor]:
    """The whole of each photo as every view, again and again, with keys of its own."""
    batch = {"key": torch.from_numpy(np.arange(count, dtype=np.uint64))}
    for number, spec in enumerate(plan.specs):
        shown = [np.asarray(photo.resize((spec.size_px, spec.size_px))) for photo in photos]
        batch[f"view_{number}"] = torch.from_numpy(np.stack([shown[index % len(shown)] for index in range(count)]))
    return batch


def oracle(image: Image.Image, spec: ViewSpec, draws: np.ndarray) -> np.ndarray:
    """The same steps, one after the other, by torchvision's functions on Pillow images, as lightly calls them."""
    strengths = [spec.jitter_strength * most for most in (spec.brightness, spec.contrast, spec.saturation)]
    ranges = [(max(0, 1 - most), 1 + most) for most in strengths]
    factors = [low + draw * (high - low) for (low, high), draw in zip(ranges, draws[:3], strict=True)]
    turn = spec.jitter_strength * spec.hue * (2 * draws[3] - 1)
    steps = [
        lambda shown: pillow_ops.adjust_brightness(shown, factors[0]),
        lambda shown: pillow_ops.adjust_contrast(shown, factors[1]),
        lambda shown: pillow_ops.adjust_saturation(shown, factors[2]),
        lambda shown: pillow_ops.adjust_hue(shown, turn),
    ]
    if draws[5] < spec.jitter_p:
        remaining, place = list(range(4)), int(draws[4] * 24)
        for left in (6, 2, 1, 1):
            image = steps[remaining.pop(place // left)](image)
            place %= left
    if draws[6] < spec.grayscale_p:
        image = image.convert("L").convert("RGB")
    if draws[7] < spec.blur_p:
        sigma = spec.sigma_px[0] + draws[9] * (spec.sigma_px[1] - spec.sigma_px[0])
        image = image.filter(ImageFilter.GaussianBlur(float(sigma)))
    if draws[8] < spec.solarize_p:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)


@pytest.mark.parametrize("method", PLANS)
def test_each_view_is_what_pillow_makes_of_it(method: str, photos: list[Image.Image]) -> None:
    """Pillow cuts down to whole levels after each of up to 7 steps, half a level each, and hue to 1/256 of the circle.

    So ours lie higher: measured, by 1.0 to 1.2 levels on average over 400 draws; a single view is off by at most 3.8.
    """
    plan = PLANS[method].model_copy(update=PLAIN)
    batch = batch_of(photos, plan, 120)
    shown = Photometric(plan)(batch, epoch=1)
    differences = []
    for number, spec in enumerate(plan.specs):
        draws = uniforms(
            seed=plan.seed, epoch=1, keys=batch["key"].numpy(), streams=colour_streams(range(number, number + 1)),
            count=NUM_DRAWS,
        )[:, 0]  # fmt: skip
        found = shown[number].permute(0, 2, 3, 1).numpy() * 255
        assert found.min() >= 0
        assert found.max() <= 255.001
        for index in range(len(found)):
            expected = oracle(Image.fromarray(batch[f"view_{number}"][index].numpy()), spec, draws[index])
            differences.append(found[index] - expected)
            assert np.abs(differences[-1]).mean() < 4.5, (number, index)
    assert np.mean([np.abs(each).mean() for each in differences]) < 1.6
    assert 0 <= np.mean([each.mean() for each in differences]) < 1.5


def test_hue_turns_as_colorsys_says() -> None:
    """In float32, so to 1e-3 of a level, but where a channel is nearly gray and 1e-3 stands for no chroma at all."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (300, 3)).astype(np.float64)
    colours[:40] = colours[:40, :1]  # gray has no hue, and stays
    colours[40:80] = generator.choice([0.0, 255.0], (40, 3))
    for turn in (-0.5, -0.2, 0.0, 0.07, 0.4, 0.5):
        x = torch.from_numpy(colours.T.reshape(1, 3, 20, 15)).float()
        chunk = next(Colours.draw(ViewSpec(size_px=1, hue=0.5), np.zeros((1, NUM_DRAWS))).chunks(1, x.device))
        chunk = replace(chunk, turn=torch.full((1, 1, 1), 6 * turn))
        _turn_hue(x, chunk, Photometric(PLANS["dino"]).centres)
        if abs(turn) <= 1 / 3:  # the shorter way of the methods' own plans
            near = torch.from_numpy(colours.T.reshape(1, 3, 20, 15)).float()
            _turn_hue(near, replace(chunk, is_far=False), Photometric(PLANS["dino"]).centres)
            torch.testing.assert_close(near, x, rtol=0, atol=1e-3)
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in (colours / 255).tolist()]
        expected = [colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value) for hue, saturation, value in hsv]
        np.testing.assert_allclose(x.reshape(3, -1).T, 255 * np.array(expected), atol=1e-3)


def test_every_step_and_every_order_is_drawn_at_its_rate() -> None:
    """Of 20,000 rows: 5 standard errors, 0.018 at a rate of 1/2."""
    spec = dino_plan(8, 4).specs[1]
    draws = uniforms(seed=0, epoch=0, keys=np.arange(20_000, dtype=np.uint64), streams=[1], count=NUM_DRAWS)[:, 0]
    colours = Colours.draw(spec, draws)
    for share, rate in (
        ((colours.hue_at >= 0).mean(), spec.jitter_p),
        (colours.is_gray.mean(), spec.grayscale_p),
        ((colours.radius > 0).mean(), spec.blur_p),
        (colours.is_solarized.mean(), spec.solarize_p),
        *(((colours.hue_at == place).mean(), spec.jitter_p / 4) for place in range(4)),
    ):
        assert abs(share - rate) < 0.018
    jittered = colours.blends[colours.hue_at >= 0]
    for step in range(3):
        is_saturation, is_contrast = jittered[:, step, 1] != 0, jittered[:, step, 2] != 0
        assert abs(is_saturation.mean() - 1 / 3) < 0.018
        assert abs(is_contrast.mean() - 1 / 3) < 0.018
    factors = jittered[..., 0]
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.01
    assert sorted(colours.rows.tolist()) == list(range(20_000))


def test_the_blur_has_pillows_kernel() -> None:
    """A white line after Pillow's blur, to one and a half of its whole levels and the largest tap that is left out."""
    for sigma in (0.1, 0.3, 0.5, 0.9, 1.2, 1.5, 1.9, 2.0, 3.0):
        radius, taps = blur_taps(np.array([sigma]))
        assert len(taps[0]) == radius[0] + 1
        kernel = np.concatenate([taps[0, :0:-1], taps[0]])
        assert kernel.sum() == pytest.approx(1)
        line = np.zeros((31, 31), np.uint8)
        line[:, 15] = 255
        blurred = np.asarray(Image.fromarray(line).filter(ImageFilter.GaussianBlur(sigma)))[15] / 255
        row = np.zeros(31)
        row[15 - radius[0] : 16 + radius[0]] = kernel
        np.testing.assert_allclose(row, blurred, atol=1.5 / 255 + 1 / 512)
        variance = (kernel * (np.arange(len(kernel)) - radius[0]) ** 2).sum()
        assert variance == pytest.approx(sigma**2, rel=0.1, abs=0.02)
    radius, taps = blur_taps(np.array([0.0, 1.0]))
    assert radius[0] == 0
    assert taps[0].tolist() == [1.0] + [0.0] * radius[1]


def facts(views: torch.Tensor) -> np.ndarray:
    """Of each (n, 3, H, W): mean and spread of each channel, colourfulness, gradient energy."""
    spread = views.amax(1) - views.amin(1)
    across, down = views.diff(dim=3).square().mean((1, 2, 3)), views.diff(dim=2).square().mean((1, 2, 3))
    columns = [*views.mean((2, 3)).T, *views.std((2, 3)).T, spread.mean((1, 2)), across.sqrt(), down.sqrt()]
    return torch.stack(columns, 1).double().numpy()


NAMES = (*(f"mean {name}" for name in "rgb"), *(f"std {name}" for name in "rgb"), "colour", "across", "down")


def lightly_views(method: str, photos: list[Image.Image], count: int) -> Iterator[torch.Tensor]:
    """(count, 3, H, W) of each of lightly's views, photos in turn."""
    lightly = pytest.importorskip("lightly.transforms")
    make = {
        "simclr": lambda: lightly.SimCLRTransform(input_size=32),
        "byol": lambda: lightly.BYOLTransform(
            lightly.BYOLView1Transform(input_size=32), lightly.BYOLView2Transform(input_size=32)
        ),
        "dino": lambda: lightly.DINOTransform(global_crop_size=40, local_crop_size=24, n_local_views=2),
    }
    torch.manual_seed(0)
    np.random.seed(0)  # lightly's blur and solarization draw from it
    transform = make[method]()
    drawn = [transform(photos[index % len(photos)]) for index in range(count)]
    for number in range(len(drawn[0])):
        yield torch.stack([each[number] for each in drawn])


@pytest.mark.parametrize("method", PLANS)
def test_moments_are_those_of_lightlys_transforms(method: str, photos: list[Image.Image]) -> None:
    """From bytes to tensors, 600 draws each side: means and spreads of nine facts about a view.

    Two means may differ by 4 of their standard errors (a chance of 1 in 16,000 for each of 90 comparisons) and 0.02 (of
    a standard deviation of a channel: half a level a step that Pillow cuts off comes to about 0.01). Two spreads over
    the draws may differ by 15 %: their standard error is 3 % for a normal fact, and twice that for a heavy tail.
    """
    count, plan = 600, PLANS[method]
    items = []
    for index in range(count):
        buffer = io.BytesIO()
        photos[index % len(photos)].save(buffer, "PNG", compress_level=0)
        items.append(Item(hashlib.sha256(f"{method} {index}".encode()).hexdigest(), buffer.getvalue()))
    batch = {name: torch.from_numpy(array) for name, array in ViewTransform(plan)(items, 0).items()}
    ours = Photometric(plan)(batch, 0)
    for number, theirs in enumerate(lightly_views(method, photos, count)):
        found, expected = facts(ours[number]), facts(theirs)
        error = np.sqrt((found.var(0) + expected.var(0)) / count)
        for name, gap, chance in zip(NAMES, np.abs(found.mean(0) - expected.mean(0)), error, strict=True):
            assert gap < 4 * chance + 0.02, (number, name, gap, chance)
        np.testing.assert_allclose(found.std(0), expected.std(0), rtol=0.15, err_msg=f"view {number}")


@pytest.mark.parametrize("size_px", [24, 13, 3, 1])
def test_pixels_are_the_same_bits_alone_in_another_order_and_with_other_threads(
    size_px: int, photos: list[Image.Image]
) -> None:
    plan = dino_plan(size_px, max(1, size_px // 2), 2)
    batch = batch_of(photos, plan, 40)
    together = Photometric(plan)(batch, epoch=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shuffled = Photometric(plan)({name: values[order] for name, values in batch.items()}, epoch=3)
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(together, shuffled, strict=True):
        assert torch.equal(first[order], second)
        assert torch.isfinite(first).all()
    for index in range(0, 40, 7):
        alone = Photometric(plan)({name: values[index : index + 1] for name, values in batch.items()}, epoch=3)
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[index : index + 1], second)


def test_the_size_of_a_chunk_changes_no_bit(photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS["dino"]
    batch = batch_of(photos, plan, 50)
    together = Photometric(plan)(batch, 0)
    monkeypatch.setattr("eagleray.learn.selfsup.photometric._CHUNK_CPU", 1)
    for first, second in zip(together, Photometric(plan)(batch, 0), strict=True):
        assert torch.equal(first, second)


def test_the_way_of_a_device_gives_the_same_bits(photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator runs (gathered bytes, chunks without a limit), on the CPU."""
    plan = PLANS["byol"]
    batch = batch_of(photos, plan, 50)
    together = Photometric(plan)(batch, 0)
    monkeypatch.setattr("eagleray.learn.selfsup.photometric._is_cpu", lambda device: False)
    for first, second in zip(together, Photometric(plan)(batch, 0), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same_views(photos: list[Image.Image]) -> None:
    """To 1e-4 of a standard deviation: a device may fuse a product and a sum into one rounding."""
    plan = PLANS["dino"]
    batch = batch_of(photos, plan, 50)
    expected = Photometric(plan)(batch, 0)
    on_device = {name: values if name == "key" else values.cuda() for name, values in batch.items()}
    for first, second in zip(expected, Photometric(plan).cuda()(on_device, 0), strict=True):
        torch.testing.assert_close(second.cpu(), first, rtol=0, atol=1e-4)


def test_epoch_and_seed_change_the_colours(photos: list[Image.Image]) -> None:
    plan = PLANS["simclr"]
    batch = batch_of(photos, plan, 8)
    first = Photometric(plan)(batch, 0)[0]
    assert not torch.equal(first, Photometric(plan)(batch, 1)[0])
    assert not torch.equal(first, Photometric(plan.model_copy(update={"seed": 1}))(batch, 0)[0])


def test_a_plan_without_colours_only_normalizes(photos: list[Image.Image]) -> None:
    spec = ViewSpec(size_px=20, jitter_p=0, grayscale_p=0, blur_p=0)
    plan = ViewPlan(views=(spec,))
    batch = batch_of(photos, plan, 4)
    expected = (batch["view_0"].permute(0, 3, 1, 2) / 255 - torch.tensor(plan.mean).view(3, 1, 1)) / torch.tensor(
        plan.std
    ).view(3, 1, 1)
    torch.testing.assert_close(Photometric(plan)(batch, 0)[0], expected, rtol=0, atol=1e-5)


def test_an_empty_batch_gives_empty_views() -> None:
    plan = PLANS["dino"]
    batch = {name: torch.from_numpy(array) for name, array in ViewTransform(plan)([], 0).items()}
    assert [tuple(view.shape) for view in Photometric(plan)(batch, 0)] == [
        *((0, 3, 40, 40) for _ in range(2)),
        *((0, 3, 24, 24) for _ in range(2)),
    ]


def test_nothing_of_it_is_saved_with_a_model() -> None:
    assert Photometric(PLANS["dino"]).state_dict() == {}


def test_views_that_are_held_are_not_written_again(photos: list[Image.Image]) -> None:
    """Memory is used again, so: a batch that is kept, whole or one row of it, stays what it was."""
    plan = PLANS["dino"]
    batch, photometric = batch_of(photos, plan, 8), Photometric(plan)
    held = photometric(batch, 0)
    rows, expected = [view[3:4] for view in held], [view.clone() for view in held]
    photometric(batch, 1)
    for view, kept in zip(held, expected, strict=True):
        assert torch.equal(view, kept)
    places = [view.data_ptr() for view in held]
    del held, view
    for epoch in range(2, 6):
        photometric(batch, epoch)
    for row, kept in zip(rows, expected, strict=True):
        assert torch.equal(row, kept[3:4])
    del row, rows
    assert {view.data_ptr() for view in photometric(batch, 6)} & set(places)


def test_a_copy_has_memory_of_its_own(photos: list[Image.Image]) -> None:
    plan = PLANS["simclr"]
    batch, photometric = batch_of(photos, plan, 4), Photometric(plan)
    first = photometric(batch, 0)
    for copied in (copy.deepcopy(photometric), pickle.loads(pickle.dumps(photometric))):
        second = copied(batch, 0)
        assert torch.equal(first[0], second[0])
        assert first[0].data_ptr() != second[0].data_ptr()

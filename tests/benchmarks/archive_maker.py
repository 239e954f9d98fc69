"""The benchmark's archives: real photographs, cropped and perturbed into as many distinct JPEGs as a run needs.

Why: a speed figure needs thousands of images whose bytes cost what real ones cost (JPEGs of 500x375 at about 48 KB,
12 MP at about 3 MB) and no download. The photographs come from scikit-image and scikit-learn; image i of a kind is a
function of (kind, i) alone, so an archive of 200 is the beginning of the archive of 5,000. Nothing here is timed.

Example:
    python archive_maker.py --cache /tmp/eagleray-bench small 5000
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 20261123
PER_FOLDER = 1_000
PHOTOS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/motorcycle_right.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of archive: sizes in pixels, the mean of its JPEGs in bytes, a number that seeds it."""

    name: str
    number: int
    sides_px: tuple[tuple[int, int], tuple[int, int]]  # (least, most) of width, of height
    mean_bytes: int


KINDS = {  # the sizes wanted are a little under what comes out: about 48 kB, 3 MB and 1 MB
    "small": Kind("small", 1, ((500, 500), (375, 375)), 45_000),
    "large": Kind("large", 2, ((4_000, 4_000), (3_000, 3_000)), 2_800_000),
    "medium": Kind("medium", 4, ((2_000, 2_000), (1_500, 1_500)), 960_000),
    "tiny": Kind("tiny", 3, ((32, 64), (32, 64)), 1_400),
}


@cache
def photographs(longest_px: int) -> list[Image.Image]:
    """The source photographs as RGB, shrunk to `longest_px`; their packages are found, not imported."""
    found = []
    for package, name in PHOTOS:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"the benchmark's photographs need {package}: pip install 'eagleray[dev]'")
        path = Path(spec.submodule_search_locations[0]) / name
        photo = Image.open(path, formats=("PNG", "JPEG")).convert("RGB")
        photo.thumbnail((longest_px, longest_px))
        found.append(photo)
    return found


@cache
def _grain() -> np.ndarray:
    """One tile of sensor-like noise (512, 512, 3) int16: without it enlarged photographs compress to nothing."""
    return np.random.default_rng(SEED).normal(0.0, 3.0, (512, 512, 3)).astype(np.int16)


def subject(kind: Kind, index: int) -> int:
    """Which of PHOTOS image `index` of a kind is made from."""
    return int(np.random.default_rng((SEED, kind.number, index)).integers(len(PHOTOS)))


def picture(kind: Kind, index: int) -> Image.Image:
    """Image `index` of a kind: a random crop of a photograph, resized, mirrored, brightened, with grain."""
    rng = np.random.default_rng((SEED, kind.number, index))
    photo = photographs(192 if kind.name == "tiny" else 2_048)[int(rng.integers(len(PHOTOS)))]
    width, height = (int(rng.integers(low, high + 1)) for low, high in kind.sides_px)
    share = rng.uniform(0.45, 1.0)
    crop_width = min(photo.width, photo.height * width / height) * share
    crop_height = crop_width * height / width
    left, top = rng.uniform(0, photo.width - crop_width), rng.uniform(0, photo.height - crop_height)
    image = photo.resize(
        (width, height), Image.Resampling.BICUBIC, box=(left, top, left + crop_width, top + crop_height)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image).astype(np.int16)
    gain = rng.uniform(0.94, 1.06, 3) * 256
    pixels = (pixels.astype(np.int32) * gain.astype(np.int32) >> 8).astype(np.int16)
    rows, columns = (np.arange(side) + rng.integers(512) for side in (height, width))
    pixels += _grain()[rows % 512][:, columns % 512]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, quality: int) -> bytes:
    """The image as a baseline JPEG, chroma at half resolution."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def jpeg(kind: Kind, index: int) -> bytes:
    """Image `index` as JPEG; its quality is searched so that the archive's mean size is about `kind.mean_bytes`."""
    image = picture(kind, index)
    if kind.name == "tiny":
        return encode(image, 85)
    wanted = kind.mean_bytes * np.random.default_rng((SEED, kind.number, index, 1)).lognormal(-0.03, 0.25)
    sample, scale = image, 1.0
    if image.width > 1_500:  # the search looks at the middle sixteenth only
        box = (image.width * 3 // 8, image.height * 3 // 8, image.width * 5 // 8, image.height * 5 // 8)
        sample, scale = image.crop(box), 16.0
    low, high = 40, 97
    while high - low > 2:
        middle = (low + high) // 2
        if len(encode(sample, middle)) * scale < wanted:
            low = middle
        else:
            high = middle
    return encode(image, high)


def _write_folder(kind: Kind, folder: Path, first: int, last: int) -> int:
    folder.mkdir(parents=True)
    total = 0
    for index in range(first, last):
        data = jpeg(kind, index)
        total += len(data)
        (folder / f"{kind.name}-{index:07d}.jpg").write_bytes(data)
    return total


def make(cache_folder: Path, kind_name: str, count: int, workers: int = 2) -> Path:
    """The folder with `count` images of a kind, written once; later calls return it as it is.

    Args:
        cache_folder: where archives live; one folder per kind and count.
        kind_name: a name of KINDS.
        count: how many images.
        workers: processes that write.

    Returns:
        The folder: sub-folders of up to 1,000 files `<kind>-<index>.jpg`.
    """
    kind = KINDS[kind_name]
    done = cache_folder / f"{kind.name}-{count}"
    if done.is_dir():
        return done
    aside = cache_folder / f".{kind.name}-{count}.{os.getpid()}"
    step = min(PER_FOLDER, max(1, -(-count // (4 * workers))))
    slices = [(first, min(first + step, count)) for first in range(0, count, step)]
    try:
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(_write_folder, kind, aside / f"{first:07d}", first, last) for first, last in slices]
            total = sum(job.result() for job in jobs)
        aside.rename(done)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"# made {done}: {count} images, {total / count / 1_000:.1f} kB each", flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> None:
    """Make one archive and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("count", type=int)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench"))
    args = parser.parse_args(argv)
    print(make(args.cache, args.kind, args.count))


if __name__ == "__main__":
    main()

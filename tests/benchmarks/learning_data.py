"""What the benchmarks of learning look at: real image sets as class folders and as corpora, and kNN on their features.

A set is unpacked once, by hard links cut to the size asked for, so that a peer's ImageFolder and `eagleray ingest` see
the same files. Nothing here is timed.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import archive_maker
import numpy as np
from checkout import EAGLERAY, ROOT, environment, make_importable

DATA = ROOT.parent / "shared" / "data"
SETS = {  # name: its zips
    "trashnet": ("trashnet",),
    "cifar": ("cifar10_1000_png", "cifar10_1000_jpeg_q75"),
    "apple": ("plantvillage_apple",),
}
SUFFIXES = (".jpg", ".jpeg", ".png")
CLASSES_OF_LARGE = 4
BATCH = 256


@dataclass(frozen=True)
class Pictures:
    """A set of images: class folders, and the same as a corpus."""

    name: str
    folder: Path
    corpus: Path
    num_images: int
    num_classes: int


def data_folder() -> Path:
    """Where the real images are: $EAGLERAY_DATA, or beside the checkout."""
    return Path(os.environ.get("EAGLERAY_DATA", DATA))


def make(cache: Path, name: str, most: int | None = None) -> Pictures:
    """A set, at most so many images of it, spread over the whole.

    Args:
        cache: Where it is kept.
        name: Of SETS, or "large": 12 MP pictures of archive_maker in four classes by chance.
        most: Images; None: all.
    """
    whole = _large(cache, most or 40) if name == "large" else _unpacked(cache, name)
    files = [path for path in sorted(whole.rglob("*")) if path.suffix.lower() in SUFFIXES and path.stat().st_size]
    if most is not None and most < len(files):
        files = [files[index * len(files) // most] for index in range(most)]
    folder = cache / "sets" / f"{name}-{len(files)}"
    if not folder.is_dir():
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        for path in files:
            target = half / path.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        half.rename(folder)
    classes = {path.parent.name for path in files}
    return Pictures(name, folder, ingested(cache, folder), len(files), len(classes))


def ingested(cache: Path, source: Path) -> Path:
    """The corpus of a source, made once through the command line."""
    corpus = cache / "corpora" / source.name
    if not (corpus / "manifest.json").is_file():
        shutil.rmtree(corpus, ignore_errors=True)
        command = [*EAGLERAY, "ingest", str(source), "--out", str(corpus)]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return corpus


def few_labels(cache: Path, name: str, share: float, seed: int) -> Path:
    """The corpus of a set whose training split keeps a share of each class, one image at least."""
    target = cache / "sets" / f"{name}-share{share:g}-seed{seed}"
    if not target.is_dir():
        half = target.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        whole = _unpacked(cache, name)
        with zipfile.ZipFile(data_folder() / f"{SETS[name][0]}.zip") as opened:
            rows = list(csv.DictReader(opened.read("metadata.csv").decode().splitlines()))
        drawn = _drawn(rows, share, seed)
        kept = [row for row in rows if row["split"] == "test" or row["file_name"] in drawn]
        for row in kept:
            path = half / row["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(whole / row["file_name"], path)
        with (half / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
        half.rename(target)
    return ingested(cache, target)


def _drawn(rows: Sequence[Mapping[str, str]], share: float, seed: int) -> set[str]:
    """File names of a share of each class of the training split."""
    generator, found = np.random.default_rng(seed), set[str]()
    for label in sorted({row["label"] for row in rows}):
        own = [row["file_name"] for row in rows if row["label"] == label and row["split"] == "train"]
        count = max(1, round(share * len(own)))
        found.update(own[index] for index in generator.permutation(len(own))[:count])
    return found


def _unpacked(cache: Path, name: str) -> Path:
    whole = cache / "unpacked" / name
    if whole.is_dir():
        return whole
    half = whole.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    for number, zip_name in enumerate(SETS[name]):
        path = data_folder() / f"{zip_name}.zip"
        if not path.is_file():
            raise SystemExit(f"{path} is not there: give EAGLERAY_DATA, the folder of shared/data")
        with zipfile.ZipFile(path) as opened:
            for entry in opened.namelist():
                if entry.lower().endswith(SUFFIXES):
                    label, _, rest = entry.rpartition("/")
                    target = half / label / (f"{number}-{rest}" if number else rest)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(opened.read(entry))
    half.rename(whole)
    return whole


def _large(cache: Path, count: int) -> Path:
    """12 MP pictures under class folders, the class by number: for speed only."""
    files = sorted(archive_maker.make(cache, "large", count).rglob("*.jpg"))
    whole = cache / "unpacked" / f"large-{count}"
    for number, path in enumerate(files):
        target = whole / f"class{number % CLASSES_OF_LARGE}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(path, target)
    return whole


class Neighbours:
    """Leave-one-out weighted kNN of a set's images, each seen as `score` sees it: whole, then the centre square.

    Args:
        folder: Class folders.
        size_px: Side of the input.
        backbone: timm's name of it.
    """

    def __init__(self, folder: Path, size_px: int, backbone: str) -> None:
        make_importable()
        import torch
        from eagleray.learn.selfsup.views import IMAGENET_MEAN, IMAGENET_STD
        from PIL import Image, ImageOps

        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        names = sorted({path.parent.name for path in files})
        self.labels = torch.tensor([names.index(path.parent.name) for path in files])
        side, self.backbone = (size_px, size_px), backbone
        shown = [ImageOps.fit(Image.open(path).convert("RGB"), side, Image.Resampling.BICUBIC) for path in files]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in shown])).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.x = (pixels - mean) / std

    def right(self, weights: Path | None, seed: int = 0) -> np.ndarray:
        """bool (N,): whether the neighbours tell each image's class.

        Args:
            weights: safetensors of the backbone, or of a bundle with its head; None: as it is before the first step.
            seed: Of the first weights.
        """
        import torch
        from eagleray.learn.selfsup.probes import knn_leave_one_out

        model = untrained(self.backbone, seed, self.x.shape[-1])
        if weights is not None:
            from safetensors.torch import load_file

            missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
            heads = [name for name in unexpected if name.split(".")[0] in ("fc", "classifier", "head")]
            if missing or heads != unexpected:
                raise SystemExit(f"{weights} is not of {self.backbone}: {missing[:3]} {unexpected[:3]}")
        with torch.inference_mode():
            features = torch.cat([model(part) for part in self.x.split(BATCH)])
        return (knn_leave_one_out(features, self.labels) == self.labels).numpy()


def untrained(backbone: str, seed: int, size_px: int):
    """The headless backbone before the first step, as both sides begin."""
    make_importable()
    import torch
    from eagleray.vision import backbones

    torch.manual_seed(seed)
    return backbones.create_headless(backbones.Backbone(name=backbone), size_px=size_px)[0].eval()


def difference(ours: np.ndarray, theirs: np.ndarray, draws: int = 2_000) -> tuple[float, float, float]:
    """Mean paired difference in points and its 95 % interval: seeds and images are both drawn anew.

    Args:
        ours: bool (seeds, N).
        theirs: bool (seeds, N), the same seeds and images.
        draws: Of the bootstrap.
    """
    gain, generator = 100 * (ours.astype(float) - theirs.astype(float)), np.random.default_rng(0)
    seeds, images = gain.shape
    means = [
        gain[generator.integers(seeds, size=seeds)][:, generator.integers(images, size=images)].mean()
        for _ in range(draws)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(gain.mean()), float(low), float(high)

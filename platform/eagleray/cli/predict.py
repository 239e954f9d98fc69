"""``eagleray predict``: a few images in this process, through the same Classifier as a bulk run, without Ray.

Example:
    >>> run(PredictConfig(images=("cat.jpg",), model="bundles/lite0"))[0]["label_name"]
    'tabby, tabby cat'
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from pydantic import Field

from eagleray.core.config import Config
from eagleray.flows.scoring_place import RuntimeName
from eagleray.infer.classifier import Classifier
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import load_bundle
from eagleray.vision.images import ImageRefused, Limits, Reason

LIMITS = Limits()


class PredictConfig(Config):
    """Which images, by which model.

    Attributes:
        images: Paths of image files.
        model: A bundle's folder.
        runtime: ``auto`` (the soonest to start that is installed and fits the bundle: to measure would take longer
            than a few images do) or a name of RUNTIMES.
        top_k: Labels of each image.
        threads: Engine threads.
    """

    images: tuple[str, ...] = Field(min_length=1)
    model: str
    runtime: RuntimeName = "auto"
    top_k: int = Field(5, ge=1, le=1000)
    threads: int = Field(1, ge=1)


def run(config: PredictConfig) -> list[dict[str, Any]]:
    """Scores the images.

    Returns:
        One row an image, in order: ``image`` (the path as given) and what Prediction.to_json gives.

    Raises:
        ArtifactError: The bundle does not hold.
        CapabilityError: The engine is not installed.
    """
    bundle = load_bundle(config.model)
    soonest = candidates(bundle)[:1] if config.runtime == "auto" else (config.runtime,)
    classifier = Classifier(bundle, *soonest, threads=config.threads, top_k=config.top_k)
    rows = []
    for path in config.images:
        try:
            prediction = classifier.predict([read_image(Path(path))])[0]
        except ImageRefused as refusal:
            prediction = classifier.refuse(refusal)
        rows.append({"image": path, "runtime": classifier.runtime_name, **prediction.to_json()})
    return rows


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageRefused: ``unreadable`` (missing, a folder, no permission) or ``too_large`` by its size, before reading it.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder: eagleray score takes folders" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise ImageRefused(Reason.UNREADABLE, kind)
        if found.st_size > LIMITS.max_bytes:
            raise ImageRefused(Reason.TOO_LARGE, f"{found.st_size:,} bytes, the cap is {LIMITS.max_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageRefused(Reason.UNREADABLE, error.strerror or type(error).__name__) from None

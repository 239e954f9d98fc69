"""Makes this release's golden bundle: a tiny model, pictures, and what it says of them, for later releases to repeat.

``PYTHONPATH=platform:. python tests/golden/make.py`` writes tests/golden/VERSION, once a release.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from eagleray import __version__
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import prove
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import ONNX, ModelBundle, load_bundle, save_bundle
from eagleray.vision.prediction import ThresholdPolicy
from PIL import Image

from tests.tiny_model import make_bundle

HOME = Path(__file__).resolve().parent
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def pictures() -> dict[str, bytes]:
    """Small pictures of three kinds and odd sizes; their bytes are kept, so that no later encoder matters."""
    found = {}
    for number, (suffix, kind) in enumerate(KINDS.items()):
        generator = np.random.default_rng(number)
        small = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((61 + 10 * number, 47), Image.Resampling.BICUBIC).save(buffer, kind)
        found[f"picture-{number}.{suffix}"] = buffer.getvalue()
    return found


def answers(bundle: ModelBundle, images: dict[str, bytes]) -> dict[str, object]:
    """What each runtime that is here says, to the last digit that JSON keeps."""
    found = {}
    for runtime in candidates(bundle):
        classifier = Classifier(bundle, runtime, wants_embedding=True)
        found[runtime] = [one.to_json() for one in classifier.predict(list(images.values()))]
    return found


def main() -> int:
    home = HOME / __version__
    if home.exists():
        sys.stderr.write(f"{home} is there: a golden bundle is written once\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        bare = load_bundle(make_bundle(Path(folder) / "tiny"))
        policy = ThresholdPolicy({"circle": 0.2, "star": 0.3, "wave": 0.9}, otherwise="ask")
        draft = replace(bare, files={}, policy=policy)
        bundle = save_bundle(home / "bundle", draft, {ONNX: bare.path / ONNX}, probes=prove)
    images = pictures()
    for name, data in images.items():
        (home / name).write_bytes(data)
    told = {"release": __version__, "model_digest": bundle.model_digest, "pictures": list(images)}
    (home / "answers.json").write_text(json.dumps({**told, "answers": answers(bundle, images)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

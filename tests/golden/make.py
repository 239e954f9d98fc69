"""Makes this release's golden bundles: a tiny model in each precision, pictures, and what each says of them.

``PYTHONPATH=platform:. python tests/golden/make.py`` writes what tests/golden/VERSION lacks: each is written once, for
later releases to repeat.
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
from eagleray.flows.release_steps import _widest
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import check_parity, prove, stated
from eagleray.infer.probes import generated_images
from eagleray.infer.quantization import QuantizationSettings, quantize, to_fp16
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import ONNX, PROBES, ModelBundle, load_bundle, save_bundle
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


def whole(path: Path) -> ModelBundle:
    """The model in FP32, with a policy and a probe set."""
    with tempfile.TemporaryDirectory() as folder:
        bare = load_bundle(make_bundle(Path(folder) / "tiny"))
        policy = ThresholdPolicy({"circle": 0.2, "star": 0.3, "wave": 0.9}, otherwise="ask")
        return save_bundle(path, replace(bare, files={}, policy=policy), {ONNX: bare.path / ONNX}, probes=prove)


def smaller(path: Path, parent: ModelBundle, form: str) -> ModelBundle:
    """The same in less than FP32, held to the FP32 probe set, with how far from it every engine here was seen to be."""
    if form == "fp16":
        data, precision = to_fp16(parent), "fp16"
    else:
        # 7-bit weights: the answers are the same on processors whose 8-bit products overflow
        settings = QuantizationSettings(activations=form, reduce_range=True)  # type: ignore[arg-type]
        pixels = generated_images(parent.image_spec, 64, seed=5)
        data, precision = quantize(parent, [pixels], settings=settings).data, "int8"
    draft = replace(parent, files={}, precision=precision)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trial = save_bundle(Path(folder) / "trial", draft, {ONNX: data}, probes=parent.path / PROBES)
        seen = [stated(check_parity(trial, runtime)) for runtime in candidates(trial)]
    lineage = {**parent.lineage, "tolerance": _widest(seen)}
    return save_bundle(path, replace(draft, lineage=lineage), {ONNX: data}, probes=parent.path / PROBES)


def main() -> int:
    home = HOME / __version__
    bundle = load_bundle(home / "bundle") if (home / "bundle").exists() else whole(home / "bundle")
    made = {"": bundle}
    for form in ("fp16", "int8", "uint8"):
        path = home / f"bundle-{form}"
        made[f"-{form}"] = load_bundle(path) if path.exists() else smaller(path, bundle, form)
    images = pictures()
    for suffix, one in made.items():
        told = home / f"answers{suffix}.json"
        if told.exists():
            sys.stderr.write(f"{told} is there: it is written once\n")
            continue
        for name, data in images.items():
            if not (home / name).exists():
                (home / name).write_bytes(data)
        images = {name: (home / name).read_bytes() for name in images}
        said = {"release": __version__, "model_digest": one.model_digest, "pictures": list(images)}
        told.write_text(json.dumps({**said, "answers": answers(one, images)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

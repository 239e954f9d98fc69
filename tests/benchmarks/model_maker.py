"""The benchmark's two models as bundles: `light` finds the pipeline's limit, `heavy` the engine's.

light = timm's mobilenetv3_small_050: a seeded random backbone, its batch norms fitted to the benchmark's pictures and
its head solved so that it names the photograph a picture was made from. A plain random network would do for the speed,
but it amplifies the last bit of a pixel and answers by hair's breadths: two correct pipelines agree on 40 % of its
answers. So its first spatial filters are shifted towards blurs, and then they agree on 99 %.
heavy = EfficientNet-Lite0 with its published weights, from its package. tiny = a 32 px mean and a matrix, nearly free.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import archive_maker
import numpy as np
from checkout import EAGLERAY, environment, make_importable
from peers import yardstick

SEED = 20261123
FITTED_ON = 600
BLURRED_FILTERS = 5  # measured: features move by 0.8 % between a full and a scaled decode, with none by 26 %
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Model:
    """A bundle and what a peer needs of it."""

    name: str
    bundle: Path
    onnx: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]


def make(cache_folder: Path, name: str) -> Model:
    """The bundle of a model, imported once through the command line; what is there is used.

    Args:
        cache_folder: where bundles live.
        name: "light", "heavy" or "tiny".
    """
    bundle = cache_folder / "bundles" / name
    if not (bundle / "bundle.json").is_file():
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        command = [*EAGLERAY, "import", *_source(cache_folder, name), "--out", str(bundle)]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    told = json.loads((bundle / "bundle.json").read_bytes())
    spec = told["image_spec"]
    labels = tuple(label["id"] for label in told["labels"])
    return Model(name, bundle, bundle / "model.onnx", tuple(spec["mean"]), tuple(spec["std"]), labels)


def _source(cache_folder: Path, name: str) -> list[str]:
    if name == "heavy":
        return ["lite0"]
    home = cache_folder / "bundles" / f"{name}-source"
    home.mkdir(parents=True, exist_ok=True)
    if name == "tiny":
        return _tiny(home)
    weights = home / "mobilenetv3_small_050.safetensors"
    _fit_light(weights)
    return ["mobilenetv3_small_050", "--weights", str(weights)]


def _fit_light(path: Path) -> None:
    make_importable()
    from eagleray.vision.torchvision_guard import ensure_importable

    ensure_importable()
    import timm
    import torch
    from safetensors.torch import save_file

    kind = archive_maker.KINDS["small"]
    indices = range(10_000_000, 10_000_000 + FITTED_ON)  # none of them is in an archive
    pixels = np.stack([yardstick.target_pixels(archive_maker.picture(kind, index)) for index in indices])
    job = yardstick.Job((), "", IMAGENET_MEAN, IMAGENET_STD, Path())
    images = torch.from_numpy(yardstick.normalize(pixels, job))
    wanted = torch.eye(len(archive_maker.PHOTOS))[[archive_maker.subject(kind, index) for index in indices]]
    torch.manual_seed(SEED)
    model = timm.create_model("mobilenetv3_small_050")
    spatial = [each for each in model.modules() if isinstance(each, torch.nn.Conv2d) and each.kernel_size != (1, 1)]
    for layer in spatial[:BLURRED_FILTERS]:
        layer.weight.data += layer.weight.data.abs().mean((2, 3), keepdim=True)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        model.train()
        for batch in images.split(32):
            model(batch)
        model.eval()
        features = torch.cat([model.forward_head(model.forward_features(b), pre_logits=True) for b in images.split(32)])
        mean, spread = features.mean(0), features.std()
        centred = torch.cat([(features - mean) / spread, torch.ones(len(features), 1)], 1).double()
        gram = centred.T @ centred + 10.0 * torch.eye(centred.shape[1])
        solved = torch.linalg.solve(gram, centred.T @ wanted.double()).float() * 8.0
        head = model.get_classifier()
        head.weight.zero_()
        head.bias.fill_(-8.0)
        head.weight[: len(solved.T)] = solved[:-1].T / spread
        head.bias[: len(solved.T)] = solved[-1] - head.weight[: len(solved.T)] @ mean
    save_file(model.state_dict(), path)


def _tiny(home: Path) -> list[str]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(SEED)
    matrix = numpy_helper.from_array(rng.normal(0, 4, (3, 10)).astype(np.float32), "matrix")
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    ends = [("image", ["batch", 3, 32, 32]), ("logits", ["batch", 10])]
    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends)
    graph = helper.make_graph(nodes, "tiny", [image], [logits], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, home / "tiny.onnx")
    (home / "labels.txt").write_text("\n".join(f"colour{number}" for number in range(10)) + "\n")
    mean, std = "0.5,0.5,0.5", "0.25,0.25,0.25"
    return [str(home / "tiny.onnx"), "--labels", str(home / "labels.txt"), "--size", "32", "--mean", mean, "--std", std]

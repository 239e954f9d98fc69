"""The graph before it is quantised: constants folded, BatchNorm folded, every node named, every shape inferred.

Our own passes, not an engine's: ONNX Runtime's would write the operators of its version into the file (it takes
HardSwish apart), and the same bundle must give the same bytes. What is left float stays as it was exported.

Refuses: a graph that is quantised or half precision already.

Example:
    >>> model = prepare(bundle.read_verified("model.onnx"), "lite0/model.onnx")
    >>> [layer.name for layer in layers(model)]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError
from eagleray.vision.onnx_graph import FLOAT, parse
from eagleray.vision.onnx_limits import nodes

WEIGHTED = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")  # what the quantiser of their input can do by itself
PER_CHANNEL_OPSET = 13  # QuantizeLinear and DequantizeLinear gained their axis in it
MOST_FOLDED_BYTES = 64 << 20  # a constant larger than this is not written out: it is made when the model is loaded
QUANTIZED_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "QLinearConv"})
NEVER_FOLDED = frozenset({"RandomNormal", "RandomUniform", "Bernoulli", "Multinomial"})


@dataclass(frozen=True)
class Layer:
    """A node with weights, or a sum of two branches, that can be quantised.

    Attributes:
        name: The node's name.
        op_type: Conv, Gemm, MatMul or Add.
        num_weights: How many weights it holds.
        is_depthwise: A convolution of one input channel an output channel.
    """

    name: str
    op_type: str
    num_weights: int = 0
    is_depthwise: bool = False


def prepare(data: bytes, what: str) -> Any:
    """A ModelProto that is ready to be quantised.

    Args:
        data: A single-file ONNX classifier.
        what: Its name, for messages.

    Raises:
        ArtifactError: Not such a graph, or one that is quantised or half precision already.
    """
    import onnx

    model = parse(data, what)
    found = sorted({node.op_type for node in model.graph.node} & QUANTIZED_OPS)
    if found or any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise ArtifactError(
            f"{what} is no float32 graph: it holds {', '.join(found) or 'half-precision weights'}",
            expected="the fp32 bundle that it was made from",
            fix="name the parent bundle",
        )
    model = _modern(model, what)
    graph = model.graph
    del graph.value_info[:]
    _fold_constants(graph, _opset(model))
    _fold_batch_norms(graph)
    _split_outputs(graph)
    _name_nodes(graph)
    drop_unused(graph)
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ArtifactError(
            f"{what}: its shapes do not fit ({str(error)[:200]})", fix="export and import the model again"
        ) from None


def layers(model: Any) -> tuple[Layer, ...]:
    """What can be quantised of a prepared graph, in the graph's order.

    Convolutions and matrix products by constant weights; and sums of two branches one of which a convolution makes: a
    residual network stays in 8 bits from end to end. The sums of a transformer are left float: its residual stream
    holds outliers that one scale cannot.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == FLOAT}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type in WEIGHTED and node.input[1] in sizes and node.input[0] not in sizes:
            shape = sizes[node.input[1]]
            is_depthwise = node.op_type == "Conv" and shape[1] == 1 and attribute(node, "group", 1) > 1
            found.append(Layer(node.name, node.op_type, math.prod(shape), is_depthwise))
        elif node.op_type == "Add" and not any(name in sizes for name in node.input):
            sources = [_source(makers, name) for name in node.input]
            if any(one is not None and one.op_type == "Conv" for one in sources):
                found.append(Layer(node.name, node.op_type))
    return tuple(found)


def constants(graph: Any) -> dict[str, Any]:
    """Name to TensorProto of a graph's initializers."""
    return {tensor.name: tensor for tensor in graph.initializer}


def consumers(graph: Any) -> dict[str, list[Any]]:
    """Value to the nodes that take it, in graphs inside this one too."""
    found: dict[str, list[Any]] = {}
    for node in nodes(graph):
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def attribute(node: Any, name: str, default: Any) -> Any:
    """A node's attribute, or what it is when it does not stand there."""
    import onnx

    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def serialize(model: Any, words: Mapping[str, str]) -> bytes:
    """The bytes of a finished graph: no shapes in between, no traces of the tools, these words in its metadata."""
    from eagleray import __version__

    del model.graph.value_info[:]
    model.graph.doc_string = model.doc_string = ""
    model.producer_name, model.producer_version = "eagleray", __version__
    kept = {one.key: one.value for one in model.metadata_props if not one.key.startswith("onnx.")} | dict(words)
    del model.metadata_props[:]
    for key in sorted(kept):
        model.metadata_props.add(key=key, value=kept[key])
    used = {node.domain for node in model.graph.node}
    opsets = [one for one in model.opset_import if one.domain in used or not one.domain]
    imports = sorted({(one.domain, one.version) for one in opsets})
    del model.opset_import[:]
    for domain, version in imports:
        model.opset_import.add(domain=domain, version=version)
    return bytes(model.SerializeToString(deterministic=True))


def _modern(model: Any, what: str) -> Any:
    """The graph in an opset that has a scale for each channel."""
    from onnx import version_converter

    if _opset(model) >= PER_CHANNEL_OPSET:
        return model
    try:
        return version_converter.convert_version(model, PER_CHANNEL_OPSET)
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{what} is of opset {_opset(model)} and cannot be raised to {PER_CHANNEL_OPSET}: {str(error)[:200]}",
            expected=f"opset {PER_CHANNEL_OPSET} or newer",
            fix="export the model again",
        ) from None


def _opset(model: Any) -> int:
    return int(next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx")))


def _source(makers: Mapping[str, Any], name: str) -> Any | None:
    """The node that makes a value, behind its activation."""
    node = makers.get(name)
    while node is not None and node.op_type in (*ACTIVATIONS, "HardSwish", "Identity"):
        node = makers.get(node.input[0])
    return node


def _fold_constants(graph: Any, opset: int) -> None:
    """Computes every node whose inputs are constants, by ONNX's reference; Constant nodes become initializers."""
    from onnx import numpy_helper

    known = constants(graph)
    kept = []
    for node in graph.node:
        has_graph = any(one.HasField("g") or one.graphs for one in node.attribute)
        is_constant = all(name in known for name in node.input if name) and node.op_type not in NEVER_FOLDED
        if not is_constant or has_graph or node.domain not in ("", "ai.onnx"):
            kept.append(node)
            continue
        values = _computed(node, {name: known[name] for name in node.input if name}, opset)
        if values is None:
            kept.append(node)
            continue
        for name, value in zip(node.output, values, strict=False):
            known[name] = numpy_helper.from_array(np.asarray(value), name)
            graph.initializer.append(known[name])
    del graph.node[:]
    graph.node.extend(kept)


def _computed(node: Any, inputs: Mapping[str, Any], opset: int) -> list[Any] | None:
    """The outputs of a node of constants; None where the reference does not know it or they are too large."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    sizes = [math.prod(tensor.dims) for tensor in inputs.values()]
    if node.op_type in ("Expand", "Tile", "ConstantOfShape") or sum(sizes) * 4 > MOST_FOLDED_BYTES:
        return None
    graph = helper.make_graph(
        [node], "one", [], [helper.make_empty_tensor_value_info(name) for name in node.output], list(inputs.values())
    )
    try:
        values = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])).run(
            None, {}
        )
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
        return None
    return list(values) if all(isinstance(value, np.ndarray | np.generic) for value in values) else None


def _fold_batch_norms(graph: Any) -> None:
    """Puts a BatchNorm that follows a convolution into its weights: W' = W g / sqrt(v + eps), b' = (b - m) g / ... + B.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, algorithm 2.
    """
    from onnx import numpy_helper

    known, uses = constants(graph), consumers(graph)
    makers = {name: node for node in graph.node for name in node.output}
    ends = {value.name for value in graph.output}
    folded = []
    for node in graph.node:
        conv = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or attribute(node, "training_mode", 0):
            continue
        if len(uses[conv.output[0]]) > 1 or conv.output[0] in ends:
            continue
        if any(name not in known for name in (*node.input[1:5], *conv.input[1:])):
            continue
        scale, shift, mean, variance = (
            numpy_helper.to_array(known[name]).astype(np.float64) for name in node.input[1:5]
        )
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        weight = numpy_helper.to_array(known[conv.input[1]]).astype(np.float64)
        bias = numpy_helper.to_array(known[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
        parts = {
            f"{conv.output[0]}_folded_weight": weight * factor.reshape(-1, *[1] * (weight.ndim - 1)),
            f"{conv.output[0]}_folded_bias": (bias - mean) * factor + shift,
        }
        for name, value in parts.items():
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        conv.input[1:] = list(parts)
        conv.output[0] = node.output[0]
        makers[conv.output[0]] = conv
        folded.append(node)
    for node in folded:
        graph.node.remove(node)


def _split_outputs(graph: Any) -> None:
    """Gives an output that other nodes take an Identity of its own: what they take may be rounded, the output not."""
    from onnx import helper

    uses = consumers(graph)
    for value in graph.output:
        if value.name not in uses:
            continue
        inner = f"{value.name}_inner"
        for node in graph.node:
            node.input[:] = [inner if name == value.name else name for name in node.input]
            node.output[:] = [inner if name == value.name else name for name in node.output]
        graph.node.append(helper.make_node("Identity", [inner], [value.name], name=f"to_{value.name}"))


def _name_nodes(graph: Any) -> None:
    """Every node gets a name of its own: they are what a search leaves out, and what the table names."""
    taken = Counter(node.name for node in graph.node)
    names: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}_{node.output[0]}"
        number = 1
        while name in names or (name != node.name and name in taken):
            number += 1
            name = f"{node.name or node.op_type}_{number}"
        node.name = name
        names.add(name)


def drop_unused(graph: Any) -> None:
    """Takes out constants that no node takes any more."""
    used = {name for node in nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)

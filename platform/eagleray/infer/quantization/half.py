"""Half precision by types in the graph: weights and most arithmetic float16, what sums or normalises float32.

The file is strongly typed, which is how TensorRT 11 takes half precision. Input and outputs stay float32. Operators
that are known to be safe run in float16; every other one stays float32, softmax, layer norm and reductions among them,
and with them the elementwise steps of their decompositions. A Cast stands where the two meet.

Example:
    >>> data = half(bundle.read_verified("model.onnx"), "lite0/model.onnx", {"precision": "fp16"})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError
from eagleray.infer.quantization.graph import constants, consumers, drop_unused, prepare, serialize
from eagleray.vision.onnx_graph import FLOAT

FLOAT16 = 10  # TensorProto.FLOAT16
MOST = 65504.0  # the largest float16
HALF_OPS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max"),
        *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "Erf"),
        *("MaxPool", "AveragePool", "Concat", "Split", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
        *("Slice", "Gather", "Expand", "Pad", "Identity", "Where"),
    }
)
ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
NORMALIZING = ("Reduce", "Pow", "Sqrt", "Reciprocal", "Exp", "Softmax", "LogSoftmax")  # starts of operators' names
ANY_TYPE = ("Shape", "Size")  # take a value of either type and give integers


def half(data: bytes, what: str, words: Mapping[str, str]) -> bytes:
    """The graph in half precision.

    Args:
        data: A single-file float32 ONNX classifier.
        what: Its name, for messages.
        words: For the file's metadata.

    Raises:
        ArtifactError: Not such a graph, or one whose types cannot be told.
    """
    import onnx

    model = prepare(data, what)
    graph = model.graph
    types, known = _types(graph), constants(graph)
    in_half = [_is_half(node, known, types) for node in graph.node]
    _keep_norms(graph, in_half)
    _retype(graph, in_half, types)
    del graph.value_info[:]
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(
            f"{what} cannot be typed in half precision: {str(error).strip().splitlines()[0][:200]}",
            expected="a graph of standard operators",
            fix="release int8, or keep fp32",
        ) from None
    return serialize(model, words)


def _types(graph: Any) -> dict[str, int]:
    """Value to its element type, as far as inference knows it."""
    known = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        known[value.name] = int(value.type.tensor_type.elem_type)
    return known


def _is_half(node: Any, known: Mapping[str, Any], types: Mapping[str, int]) -> bool:
    """Whether a node may run in float16: a known operator, on floats, whose constants float16 can hold."""
    from onnx import numpy_helper

    if node.op_type not in HALF_OPS or node.domain not in ("", "ai.onnx"):
        return False
    if any(types.get(name) is None for name in (*node.input, *node.output) if name):
        return False
    if types[node.output[0]] != FLOAT:
        return False
    fixed = [known[name] for name in node.input if name in known and known[name].data_type == FLOAT]
    return all(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) <= MOST for tensor in fixed)


def _keep_norms(graph: Any, in_half: list[bool]) -> None:
    """Keeps the elementwise steps of a decomposed norm or softmax float32.

    Such a step takes what a reduction, a root or an exponential gave; or it lies between two that are kept.
    """
    makers = {name: at for at, node in enumerate(graph.node) for name in node.output}
    uses = consumers(graph)

    def is_norm(at: int | None) -> bool:
        return at is not None and graph.node[at].op_type.startswith(NORMALIZING)

    has_changed = True
    while has_changed:
        has_changed = False
        for at, node in enumerate(graph.node):
            if not in_half[at] or node.op_type not in ELEMENTWISE:
                continue
            sources = [makers.get(name) for name in node.input]
            made = [source for source in sources if source is not None]
            feeds_norm = any(one.op_type.startswith(NORMALIZING) for one in uses.get(node.output[0], ()))
            is_between = bool(made) and feeds_norm and not any(in_half[source] for source in made)
            if any(is_norm(source) for source in sources) or is_between:
                in_half[at] = False
                has_changed = True


def _retype(graph: Any, in_half: list[bool], types: Mapping[str, int]) -> None:
    """Makes what half nodes give float16, and puts a Cast, or a constant of the other type, where types meet."""
    from onnx import helper

    fixed = constants(graph)
    made_half = {name for node, is_on in zip(graph.node, in_half, strict=True) if is_on for name in node.output if name}
    made_half = {name for name in made_half if types.get(name) == FLOAT}
    cast: dict[tuple[str, bool], str] = {}
    nodes: list[Any] = []

    def as_type(name: str, wants_half: bool) -> str:
        if types.get(name) != FLOAT or (name in made_half) == wants_half:
            return name
        key = (name, wants_half)
        if key not in cast:
            cast[key] = f"{name}_{'half' if wants_half else 'float'}"
            if name in fixed:
                graph.initializer.append(_as_half(fixed[name], cast[key]))
            else:
                to = FLOAT16 if wants_half else FLOAT
                nodes.append(helper.make_node("Cast", [name], [cast[key]], name=f"cast_{cast[key]}", to=to))
        return cast[key]

    for node, is_on in zip(list(graph.node), in_half, strict=True):
        if node.op_type not in ANY_TYPE:
            node.input[:] = [as_type(name, is_on) if name else name for name in node.input]
        nodes.append(node)
    for value in graph.output:
        if value.name in made_half:
            inner = f"{value.name}_as_half"
            for node in nodes:
                node.input[:] = [inner if name == value.name else name for name in node.input]
                node.output[:] = [inner if name == value.name else name for name in node.output]
            nodes.append(helper.make_node("Cast", [inner], [value.name], name=f"cast_{value.name}", to=FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)


def _as_half(tensor: Any, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)

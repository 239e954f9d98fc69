"""What a graph asks for, read from its ONNX: multiply-adds of one image and parameters, whatever its precision.

Counted are the products of convolutions, of Gemm and of MatMul (attention's too); additions, norms and activations are
not, as everywhere in the literature. A quantised graph (Q/DQ) counts as the one it was made of: its shapes are the
same, and scales and zero points are no parameters.

Refuses a graph whose shapes cannot be inferred.

Example:
    >>> count(bundle.read_verified("model.onnx"), "lite0")
    Complexity(macs=384869120, parameters=4652008)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eagleray.core.errors import ArtifactError
from eagleray.vision.onnx_graph import parse

HELD = {"BatchNormalization": (1, 2)}  # inputs that are parameters: mean and variance are not learnt
DATA_ONLY = {"QuantizeLinear": (0,), "DequantizeLinear": (0,)}  # scale and zero point are no parameters
SHAPES_OF = ("Reshape", "Expand", "Slice", "Pad", "Resize", "Tile", "Gather", "ConstantOfShape", "Unsqueeze", "Squeeze")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Complexity:
    """What one image costs.

    Attributes:
        macs: Multiply-adds.
        parameters: Learnt numbers.
    """

    macs: int
    parameters: int


def count(data: bytes, what: str) -> Complexity:
    """Reads a graph.

    Args:
        data: An ONNX file's bytes; its first input has the batch first.
        what: Its name, for messages.

    Raises:
        ArtifactError: It is no graph, or a shape that is needed cannot be inferred.
    """
    import onnx

    model = parse(data, what)
    graph = model.graph
    for entry in graph.input:
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].dim_value <= 0:
            dims[0].ClearField("value")
            dims[0].dim_value = 1
    for entry in graph.output:  # as exported they name the batch
        entry.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise _unknown(what, str(error).strip().splitlines()[0][:200]) from None
    shapes = {entry.name: _dims(entry) for entry in (*inferred.value_info, *inferred.input, *inferred.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    macs = sum(_macs(node, shapes, what) for node in graph.node)
    return Complexity(macs, _parameters(graph))


def _dims(entry: Any) -> Shape:
    """Sizes; -1 where one is not known."""
    dims = entry.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)


def _macs(node: Any, shapes: Mapping[str, Shape], what: str) -> int:
    kind = node.op_type
    if kind not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = (_known(shapes.get(name), node, what) for name in node.input[:2])
    if kind == "MatMul":
        return math.prod(_known(shapes.get(node.output[0]), node, what)) * first[-1]
    if kind == "Gemm":
        inner = first[0] if _attribute(node, "transA") else first[1]
        return math.prod(_known(shapes.get(node.output[0]), node, what)) * inner
    if kind == "ConvTranspose":  # each input value meets the kernel once for each output channel of its group
        return math.prod(first) * math.prod(second[1:])
    return math.prod(_known(shapes.get(node.output[0]), node, what)) * math.prod(second[1:])


def _attribute(node: Any, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _known(shape: Shape | None, node: Any, what: str) -> Shape:
    if shape is None or not shape or min(shape) < 0:
        raise _unknown(what, f"{node.op_type} {node.name or node.output[0]}: the shape {shape} is not known")
    return shape


def _parameters(graph: Any) -> int:
    """Elements of the initializers that are weights: neither shapes, nor scales, nor running statistics.

    As the graph holds them: norms that the exporter folded are in their convolutions, equal tensors stand once.
    """
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer if tensor.dims}
    learnt: set[str] = set()
    for node in graph.node:
        kind = node.op_type
        places: Iterable[int] = range(len(node.input))
        if kind in HELD:
            places = HELD[kind]
        elif kind in DATA_ONLY or kind in SHAPES_OF:
            places = (0,)
        learnt |= {node.input[at] for at in places if at < len(node.input) and node.input[at] in sizes}
    return sum(sizes[name] for name in learnt)


def _unknown(what: str, seen: str) -> ArtifactError:
    return ArtifactError(
        f"{what}: its multiply-adds cannot be counted: {seen}",
        expected="a graph whose shapes follow from its input's",
        fix="export the model again",
    )

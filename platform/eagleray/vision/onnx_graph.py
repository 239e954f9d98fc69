"""Foreign ONNX classifiers: read safely, then given the shape that every runtime here expects.

After ``adapt`` the graph takes "image" (float32 N,3,H,W) and gives "logits" and, where the input of the last Gemm or
MatMul can be found, "embedding". Refused: external data (a file that names other files to read), custom operators,
loops without end (onnx_limits.py), several inputs, other types.

Example:
    >>> foreign = adapt(parse(data, "model.onnx"), "model.onnx")
    >>> foreign.width, foreign.output, foreign.embedding_dim
    (10, 'logits', 64)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.vision.bundle import Output
from eagleray.vision.onnx_limits import refuse_custom, refuse_unbounded

IMAGE, LOGITS, EMBEDDING, BATCH = "image", "logits", "embedding", "batch"
FLOAT = 1  # TensorProto.FLOAT
PASSING = ("Identity", "Cast", "Flatten", "Squeeze", "Reshape", "Dropout")  # change no value, only its form
FINAL = ("Softmax", "Sigmoid")


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A foreign graph, adapted.

    Attributes:
        data: The ONNX file's bytes.
        height: Input height in pixels; None when the graph takes any.
        width_px: Input width in pixels; None when the graph takes any.
        width: Number of outputs; None when the graph does not say.
        output: What the outputs are.
        embedding_dim: Width of the embedding output; None without one.
        fixed_batch: The only batch size that the graph takes; None when it takes any.
    """

    data: bytes
    height: int | None
    width_px: int | None
    width: int | None
    output: Output
    embedding_dim: int | None
    fixed_batch: int | None


def parse(data: bytes, what: str) -> Any:
    """An ONNX ModelProto from bytes; nothing outside the bytes is read.

    Args:
        data: The file's bytes, whose digest the caller knows.
        what: The file's name, for messages.

    Raises:
        ArtifactError: Not an ONNX model, or one that names external data, custom operators or a loop without bound.
        CapabilityError: The package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise CapabilityError(
            "reading ONNX needs the package 'onnx'", fix='pip install "eagleray[onnx]" -c constraints.txt'
        ) from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, TypeError) as error:
        raise _refused(what, f"it is not an ONNX model ({str(error)[:100]})") from None
    if not model.HasField("graph") or not model.graph.node or not model.opset_import:
        raise _refused(what, "it holds no ONNX graph")
    outside = sorted({tensor.name or "a constant" for tensor in _tensors(model) if _is_external(tensor)})
    if outside:
        raise ArtifactError(
            f"{what} keeps {len(outside)} tensors in other files ({', '.join(outside[:3])})",
            expected="a single-file ONNX model",
            fix="save it with all tensors inside (onnx.save(model, FILE, save_as_external_data=False))",
        )
    refuse_custom(model, what)
    refuse_unbounded(model, what)
    return model


def adapt(model: Any, what: str, *, num_labels: int | None = None) -> Foreign:
    """Gives a foreign classifier our names, a batch axis and an embedding output, where that can be done.

    Args:
        model: A ModelProto from parse; it is changed.
        what: The file's name, for messages.
        num_labels: Which of several outputs is meant: the one of this width.

    Raises:
        ArtifactError: The graph is not an image classifier with one float32 input of three channels.
    """
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise _refused(what, f"its shapes do not fit ({str(error)[:200]})") from None
    graph = model.graph
    _name_image(graph, what)
    source = _pick_output(graph, num_labels, what)
    output, last = _trace(graph, source)
    _name_logits(graph, source)
    embedding_dim = _add_embedding(graph, last)
    model, fixed_batch = _free_batch(model, what)
    _, _, height, width_px = _dims(model.graph.input[0])
    shape = _dims(model.graph.output[0])
    classes = [dim for dim in shape[1:] if dim != 1] or [1]
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise _refused(what, f"the graph does not check ({str(error)[:200]})") from None
    return Foreign(
        data=bytes(model.SerializeToString(deterministic=True)),
        height=height if isinstance(height, int) else None,
        width_px=width_px if isinstance(width_px, int) else None,
        width=classes[0] if len(classes) == 1 and isinstance(classes[0], int) else None,
        output=output,
        embedding_dim=embedding_dim,
        fixed_batch=fixed_batch,
    )


def _refused(what: str, seen: str) -> ArtifactError:
    return ArtifactError(
        f"{what} cannot be used: {seen}",
        expected="a single-file ONNX image classifier: one float32 input N,3,H,W, one output N,classes",
        fix="export the model again in that form",
    )


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto anywhere in a protobuf message: initializers, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if isinstance(value, Sequence) or hasattr(value, "add") else (value,):
            yield from _tensors(item)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL or tensor.external_data)


def _dims(value_info: Any) -> list[int | str]:
    """A value's dimensions: numbers where fixed, names (perhaps empty) where not."""
    shape = value_info.type.tensor_type.shape
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in shape.dim]


def _set_dims(value_info: Any, dims: Sequence[int | str]) -> None:
    shape = value_info.type.tensor_type.shape
    del shape.dim[:]
    for dim in dims:
        new = shape.dim.add()
        if isinstance(dim, int):
            new.dim_value = dim
        elif dim:
            new.dim_param = dim


def _name_image(graph: Any, what: str) -> None:
    """Checks the one input, names it "image", and puts a Transpose before a graph that takes N,H,W,3."""
    from onnx import helper

    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise _refused(what, f"it takes {len(inputs)} inputs")
    value = inputs[0]
    dims = _dims(value)
    if value.type.tensor_type.elem_type != FLOAT:
        raise _refused(what, "its input is not float32")
    if len(dims) != 4:
        raise _refused(what, f"its input has {len(dims)} axes")
    is_nhwc = dims[3] == 3 and dims[1] != 3
    channels = dims[3] if is_nhwc else dims[1]
    if isinstance(channels, int) and channels != 3:
        raise _refused(what, f"it takes {channels} channels")
    rename(graph, value.name, IMAGE)
    if is_nhwc:
        inner = _step_aside(graph, IMAGE)
        value.name = IMAGE
        graph.node.insert(0, helper.make_node("Transpose", [IMAGE], [inner], name="to_nhwc", perm=[0, 2, 3, 1]))
        dims = [dims[0], 3, dims[1], dims[2]]
    _set_dims(value, [dims[0], 3, *dims[2:]])
    taken = copy.deepcopy(value)
    del graph.input[:]  # initializers that were listed as inputs stay constants
    graph.input.append(taken)


def rename(graph: Any, old: str, new: str) -> None:
    """Renames a value everywhere in a graph; a value that has the new name already steps aside."""
    if old != new:
        _step_aside(graph, new)
        _walk(graph, lambda name: new if name == old else name)


def _step_aside(graph: Any, name: str) -> str:
    """Gives a value of this name another, that no value has; the new name."""
    taken = {one for node in graph.node for one in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    aside = next(f"{name}_{number}" for number in range(1, 1 << 20) if f"{name}_{number}" not in taken)
    _walk(graph, lambda one: aside if one == name else one)
    return aside


def _walk(graph: Any, naming: Callable[[str], str]) -> None:
    """Applies a naming to every value of a graph and of the graphs inside it."""
    for part in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.name = naming(part.name)
    for node in graph.node:
        node.input[:] = [naming(name) for name in node.input]
        node.output[:] = [naming(name) for name in node.output]
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _walk(inner, naming)


def _pick_output(graph: Any, num_labels: int | None, what: str) -> str:
    fitting = [one.name for one in graph.output if num_labels and num_labels in _dims(one)[1:]]
    if not graph.output:
        raise _refused(what, "it has no output")
    return str((fitting or [graph.output[0].name])[0])


def _trace(graph: Any, source: str) -> tuple[Output, Any | None]:
    """Walks back from the output: whether a Softmax or Sigmoid ends the graph, and its last Gemm or MatMul."""
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    output: Output = "logits"
    name, is_first = source, True
    while (node := makers.get(name)) is not None:
        if node.op_type in ("Gemm", "MatMul"):
            return output, node
        if node.op_type in FINAL and is_first:
            output, is_first = "probabilities", False
        elif node.op_type in ("Add", "LogSoftmax", "Div", "Mul"):  # a bias, a temperature
            is_first = False
        elif node.op_type not in PASSING:
            break
        behind = [one for one in node.input if one and one not in constants]
        if not behind or (len(behind) > 1 and node.op_type in ("Add", "Div", "Mul")):
            break
        name = behind[0]
    return output, None


def _add_embedding(graph: Any, last: Any | None) -> int | None:
    """Adds the input of the last layer as the output "embedding"; its width, or None when it cannot be told."""
    from onnx import helper

    if last is None:
        return None
    shapes: dict[str, list[int | str]] = {value.name: _dims(value) for value in (*graph.value_info, *graph.input)}
    weight = next((tensor.dims for tensor in graph.initializer if tensor.name == last.input[1]), None)
    shape = shapes.get(last.input[0], [])
    is_transposed = any(one.name == "transB" and one.i for one in last.attribute)
    if any(one.name == "transA" and one.i for one in last.attribute) or (last.op_type == "MatMul" and len(shape) != 2):
        return None
    width: Any = None
    if weight is not None and len(weight) == 2:
        width = weight[-1 if is_transposed else -2]
    elif shape:
        width = shape[-1]
    if not isinstance(width, int) or width < 1:
        return None
    _step_aside(graph, EMBEDDING)
    graph.node.append(helper.make_node("Identity", [last.input[0]], [EMBEDDING], name="to_embedding"))
    graph.output.append(helper.make_tensor_value_info(EMBEDDING, FLOAT, [BATCH, width]))
    return int(width)


def _name_logits(graph: Any, source: str) -> None:
    """Keeps the one output that is meant, under the name "logits"."""
    kept = [value for value in graph.output if value.name == source]
    del graph.output[:]
    graph.output.extend(kept)
    rename(graph, source, LOGITS)


def _free_batch(model: Any, what: str) -> tuple[Any, int | None]:
    """Makes the batch axis symbolic; the model and its only batch size when that cannot be shown to be right.

    A leading 1 (or -1) in the constant shape of a Reshape becomes 0, "as the input", where shape inference then carries
    the axis through to the output.
    """
    import onnx

    fixed = _dims(model.graph.input[0])[0]
    is_free = not isinstance(fixed, int)
    patches: list[tuple[int, ...]] = [()] if is_free else [(), (int(fixed),), (int(fixed), -1)]
    for leading in patches:
        trial = copy.deepcopy(model)
        _set_dims(trial.graph.input[0], [BATCH, *_dims(trial.graph.input[0])[1:]])
        for value in trial.graph.output:
            value.type.tensor_type.ClearField("shape")
        del trial.graph.value_info[:]
        _lead_with_zero(trial.graph, leading)
        try:
            shaped = onnx.shape_inference.infer_shapes(trial, strict_mode=not is_free, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError):
            continue
        leads = [(_dims(value) or [""])[0] for value in shaped.graph.output]
        if is_free or all(lead == BATCH for lead in leads):
            for before, value in zip(model.graph.output, shaped.graph.output, strict=True):
                rest = (_dims(value) or _dims(before))[1:] or _dims(before)[1:]
                _set_dims(value, [BATCH, *rest])
            del shaped.graph.value_info[:]
            return shaped, None
    if not isinstance(fixed, int) or fixed < 1:
        raise _refused(what, f"its batch axis is {fixed!r}")
    for value in model.graph.output:
        _set_dims(value, [fixed, *_dims(value)[1:]])
    del model.graph.value_info[:]
    return model, fixed


def _lead_with_zero(graph: Any, leading: tuple[int, ...]) -> None:
    """Puts 0 in place of a leading size of these in the constant shapes of Reshape."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    literals = [node for node in graph.node if node.op_type == "Constant"]
    constants.update((node.output[0], one.t) for node in literals for one in node.attribute if one.name == "value")
    for node in graph.node:
        tensor = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if tensor is None or any(one.name == "allowzero" and one.i for one in node.attribute):
            continue
        shape = numpy_helper.to_array(tensor).copy()
        if shape.ndim == 1 and len(shape) > 1 and shape[0] in leading:
            shape[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))

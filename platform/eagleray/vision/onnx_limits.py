"""What a foreign ONNX graph may ask of an engine: standard operators, and loops whose length it states.

An operator of another domain would need code that no engine here brings; a loop may run for days on one picture. Both
are found in the graph itself, in its functions and in the graphs inside it, before an engine sees a byte.

Example:
    >>> refuse_unbounded(model, "model.onnx")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eagleray.core.errors import ArtifactError

STANDARD = ("", "ai.onnx", "ai.onnx.ml")
MOST_STEPS = 1024  # of a loop, loops inside it multiplied: far above what a classifier's graph needs, seconds at most
INT64 = 7  # TensorProto.INT64


def refuse_custom(model: Any, what: str) -> None:
    """Refuses operators that are neither ONNX's own nor functions of the file.

    Args:
        model: A ModelProto.
        what: The file's name, for the message.

    Raises:
        ArtifactError: Names them.
    """
    own = {(function.domain, function.name) for function in model.functions}
    found = {
        f"{node.domain}:{node.op_type}"
        for node in _allnodes(model)
        if node.domain not in STANDARD and (node.domain, node.op_type) not in own
    }
    if found:
        raise ArtifactError(
            f"{what} uses {len(found)} custom operators: {', '.join(sorted(found)[:5])}",
            expected="operators of ONNX itself, which every engine has",
            fix="export the model again without fusing or custom layers (before ONNX Runtime optimises it)",
        )


def refuse_unbounded(model: Any, what: str) -> None:
    """Refuses loops that are too long, or do not say how long they are.

    Args:
        model: A ModelProto.
        what: The file's name, for the message.

    Raises:
        ArtifactError: With the loop's name and length.
    """
    for part in (model.graph, *model.functions):
        # a function may be called from a loop, or from another function: the steps of its own are nowhere stated
        for name, steps in _loops(part, {}, 1 if part is model.graph else None):
            if steps is None or steps > MOST_STEPS:
                length = "does not say how long it is" if steps is None else f"runs {steps:,} steps"
                raise ArtifactError(
                    f"{what} holds a loop, {name!r}, that {length}",
                    expected=f"no loop, or a Loop of at most {MOST_STEPS:,} steps, given as a constant",
                    fix="export the model again with its loops unrolled",
                )


def _allnodes(model: Any) -> Iterator[Any]:
    """Every node of a model: of its graph, its functions and the graphs inside them."""
    for part in (model.graph, *model.functions):
        yield from nodes(part)


def nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of all graphs inside it."""
    for node in graph.node:
        yield node
        for inner in _inner(node):
            yield from nodes(inner)


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _loops(graph: Any, outer: Mapping[str, int | None], times: int | None) -> Iterator[tuple[str, int | None]]:
    """Name and steps, outer loops multiplied, of each loop; None where the graph does not say."""
    constants = {**outer, **{tensor.name: _scalar(tensor) for tensor in getattr(graph, "initializer", ())}}
    for node in graph.node:
        if node.op_type == "Constant":
            values = {one.name: one for one in node.attribute}
            if "value" in values:
                constants[node.output[0]] = _scalar(values["value"].t)
            elif "value_int" in values:
                constants[node.output[0]] = int(values["value_int"].i)
    for node in graph.node:
        steps = times
        if node.op_type in ("Loop", "Scan") and node.domain in STANDARD:
            own = constants.get(node.input[0]) if node.op_type == "Loop" and node.input else None
            steps = None if own is None or times is None else times * max(own, 1)
            yield node.name or node.op_type, steps
        for inner in _inner(node):
            yield from _loops(inner, constants, steps)


def _scalar(tensor: Any) -> int | None:
    """The value of an int64 tensor of one element; None of any other."""
    if tensor.data_type != INT64 or any(size != 1 for size in tensor.dims):
        return None
    if tensor.raw_data:
        return int.from_bytes(tensor.raw_data[:8], "little", signed=True)
    return int(tensor.int64_data[0]) if tensor.int64_data else None

"""Foreign graphs: external data, custom operators and endless loops are refused before an engine sees a byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from eagleray.core.errors import ArtifactError
from eagleray.infer.export import seal_onnx
from eagleray.vision.bundle import load_bundle
from eagleray.vision.onnx_graph import parse
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_model import make_onnx


def _edited(change: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load_from_string(make_onnx())
    change(model)
    return model.SerializeToString()


def _looped(steps: object, *, inner_steps: object = None, op_type: str = "Loop") -> bytes:
    """The tiny model with a loop that adds 0 to its logits; a loop in the loop, when asked."""

    def body(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{name}_x", TensorProto.FLOAT, None)
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        number = helper.make_tensor_value_info(f"{name}_i", TensorProto.INT64, [])
        go, goes = (helper.make_tensor_value_info(f"{name}_{one}", TensorProto.BOOL, []) for one in ("go", "goes"))
        same = helper.make_node("Identity", [f"{name}_go"], [f"{name}_goes"])
        return helper.make_graph([same, *nodes], name, [number, go, value], [goes, out])

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.node[-1].output[:] = ["before"]
        for name, count in (("steps", steps), ("inner_steps", inner_steps)):
            if isinstance(count, int):
                graph.initializer.append(numpy_helper.from_array(np.array(count, np.int64), name))
        nodes = [helper.make_node("Identity", ["outer_x"], ["outer_y"])]
        if inner_steps is not None:
            inner = body("inner", [helper.make_node("Identity", ["inner_x"], ["inner_y"])])
            nodes = [helper.make_node("Loop", ["inner_steps", "", "outer_x"], ["outer_y"], name="deep", body=inner)]
        count = "steps" if isinstance(steps, int) else str(steps or "")
        node = helper.make_node(op_type, [count, "", "before"], ["logits"], name="around", body=body("outer", nodes))
        graph.node.append(node)

    return _edited(change)


def test_the_models_own_operators_pass() -> None:
    assert parse(make_onnx(), "m.onnx").graph.node


@pytest.mark.parametrize("domain", ["com.microsoft", "my.company", "ai.onnx.contrib"])
def test_a_custom_operator_is_refused_by_name(domain: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = domain

    with pytest.raises(ArtifactError, match=rf"m\.onnx uses 1 custom operators: {domain}:Conv") as caught:
        parse(_edited(change), "m.onnx")
    assert "export the model again" in caught.value.fix


def test_a_custom_operator_in_a_graph_inside_is_found() -> None:
    model = onnx.load_from_string(_looped(3))
    inside = next(one.g for one in model.graph.node[-1].attribute if one.name == "body")
    inside.node[0].domain = "my.company"
    with pytest.raises(ArtifactError, match=r"my\.company:Identity"):
        parse(model.SerializeToString(), "m.onnx")


def test_a_function_of_the_file_is_no_custom_operator_but_what_it_calls_may_be() -> None:
    def change(model: onnx.ModelProto, callee: str = "") -> None:
        node = helper.make_node("Relu", ["x"], ["y"], domain=callee)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.company", 1)]
        model.functions.append(helper.make_function("own", "act", ["x"], ["y"], [node], opsets))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[1].domain, model.graph.node[1].op_type = "own", "act"

    parse(_edited(change), "m.onnx")
    with pytest.raises(ArtifactError, match=r"my\.company:Relu"):
        parse(_edited(lambda model: change(model, "my.company")), "m.onnx")


@pytest.mark.parametrize("steps", [0, 1, 1024])
def test_a_loop_of_few_steps_passes(steps: int) -> None:
    assert parse(_looped(steps), "m.onnx").graph.node


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (_looped(1025), "'around', that runs 1,025 steps"),
        (_looped(2**62), "'around', that runs 4,611,686,018,427,387,904 steps"),
        (_looped(None), "'around', that does not say how long it is"),
        (_looped("before"), "does not say how long"),
        (_looped(33, inner_steps=32), "'deep', that runs 1,056 steps"),
        (_looped(3, op_type="Scan"), "does not say how long"),
    ],
)
def test_a_loop_that_is_long_or_does_not_say_is_refused(data: bytes, seen: str) -> None:
    with pytest.raises(ArtifactError, match=seen):
        parse(data, "m.onnx")


def test_loops_in_loops_are_multiplied_up_to_the_limit() -> None:
    assert parse(_looped(32, inner_steps=32), "m.onnx").graph.node


def test_a_bundle_with_such_a_graph_is_not_exported(tiny_model: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_model)

    def external(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")

    def custom(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "my.company"

    for change, seen in ((external, "keeps 1 tensors in other files"), (custom, "custom operators")):
        with pytest.raises(ArtifactError, match=seen):
            seal_onnx(_edited(change), bundle)

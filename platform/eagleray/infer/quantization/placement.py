"""Where QuantizeLinear and DequantizeLinear stand, by onnxruntime.quantization.

``int8``: in front of the inputs of each quantised layer only, behind the activation of the layer before; zero points
are 0, biases float, int8 weights behind a DequantizeLinear. TensorRT-RTX 1.7 builds it, OpenVINO 2026.4 fuses it whole
(both tried). ``uint8``: affine, outputs of convolutions too, so that ONNX Runtime's kernels run in 8 bits from end to
end. Outputs of the graph are never rounded.

Example:
    >>> quantized = place(model, names, ranges, settings, is_reduced=False)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from eagleray.core.errors import ConfigError
from eagleray.infer.quantization.calibration import Range
from eagleray.infer.quantization.graph import ACTIVATIONS, WEIGHTED, Layer, constants
from eagleray.infer.quantization.settings import QuantizationSettings

OPS = [*WEIGHTED, "Add", *ACTIVATIONS, "MaxPool"]
FLOAT_OUTPUTS = {"int8": OPS, "uint8": ["Gemm", "MatMul"]}
SHAPED = {"onnx.infer": "onnxruntime.quant"}  # tells the quantiser that shapes are inferred: else it writes a file


def tensors(model: Any, layers: Collection[Layer], settings: QuantizationSettings) -> set[str]:
    """The float values whose ranges are needed to quantise these layers."""
    names = {layer.name for layer in layers}
    fixed = constants(model.graph)
    found: set[str] = set()
    for node in _chosen(model.graph, names, settings):
        is_sum = node.op_type == "Add"
        found |= {name for name in (node.input if is_sum else node.input[:1]) if name and name not in fixed}
        if settings.activations == "uint8":
            found.add(node.output[0])
    return found


def place(
    model: Any,
    names: Collection[str],
    ranges: Mapping[str, Range],
    settings: QuantizationSettings,
    *,
    is_reduced: bool,
) -> Any:
    """The graph with these layers in 8 bits.

    Args:
        model: A prepared graph; it is left as it is.
        names: The layers to quantise.
        ranges: Of the values that ``tensors`` names, at least.
        settings: Activations, per_channel.
        is_reduced: Weights of 7 bits.

    Returns:
        A ModelProto.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData

    given = onnx.ModelProto()
    given.CopyFrom(model)
    chosen = [node.name for node in _chosen(given.graph, set(names), settings)]
    if not chosen:
        return given
    for key, value in SHAPED.items():
        given.metadata_props.add(key=key, value=value)
    is_symmetric = settings.activations == "int8"
    known = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # the quantiser speaks through the root logger
    try:
        quantizer = QDQQuantizer(
            given,
            settings.per_channel,
            is_reduced,
            QuantType.QInt8,
            QuantType.QInt8 if is_symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, known),
            chosen,
            [],
            OPS,
            {
                "ActivationSymmetric": is_symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT takes no int32 bias; the other engines make one by themselves
                "OpTypesToExcludeOutputQuantization": FLOAT_OUTPUTS[settings.activations],
            },
        )
        quantizer.quantize_model()
    finally:
        log.setLevel(level)
    quantizer.model.topological_sort()
    return quantizer.model.model


def place_dynamic(model: Any, layers: Collection[Layer], settings: QuantizationSettings, *, is_reduced: bool) -> Any:
    """The graph with matrix products in 8 bits whose scales are found anew for each batch.

    Raises:
        ConfigError: The network is one of convolutions: with the reason.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    held = {kind: sum(layer.num_weights for layer in layers if layer.op_type == kind) for kind in WEIGHTED}
    if held["Conv"] > held["Gemm"] + held["MatMul"]:
        raise ConfigError(
            f"{held['Conv']:,} of {sum(held.values()):,} weights are in convolutions, which dynamic quantization "
            "leaves float: no engine has a fused kernel for them",
            expected="a transformer for scheme=dynamic",
            fix="take scheme=static, with a calibration split",
        )
    given = onnx.ModelProto()
    given.CopyFrom(model)
    for key, value in SHAPED.items():
        given.metadata_props.add(key=key, value=value)
    names = [layer.name for layer in layers if layer.op_type != "Conv" and layer.name not in settings.keep_float]
    kinds = ["MatMul", "Gemm"]
    quantizer = ONNXQuantizer(
        given, settings.per_channel, is_reduced, QuantizationMode.IntegerOps, False, QuantType.QInt8,
        QuantType.QUInt8, None, names, [], kinds, {"MatMulConstBOnly": True},
    )  # fmt: skip
    quantizer.quantize_model()
    return quantizer.model.model


def refuse_per_tensor(layers: Collection[Layer], settings: QuantizationSettings) -> None:
    """Refuses one scale for a whole tensor of a depthwise network.

    Raises:
        ConfigError: With the reason.
    """
    depthwise = [layer for layer in layers if layer.is_depthwise]
    if not depthwise or (settings.scheme == "static" and settings.per_channel):
        return
    how = "dynamic quantization" if settings.scheme == "dynamic" else "per_channel=false"
    raise ConfigError(
        f"{how} gives a tensor one scale, and this network has {len(depthwise)} depthwise convolutions: the weights "
        "of their channels differ in size by orders of magnitude, small channels would become 0 (networks of this "
        "kind fall to 0.1 % accuracy, unseen where nobody measures)",
        expected="scheme=static with per_channel=true for depthwise networks",
        fix="take the defaults, with a calibration split",
    )


def _chosen(graph: Any, names: Collection[str], settings: QuantizationSettings) -> list[Any]:
    """The nodes that the quantiser is to treat: the layers and, for uint8, the activations behind them."""
    chosen = [node for node in graph.node if node.name in names]
    if settings.activations == "int8":
        return chosen
    made = {name for node in chosen for name in node.output}
    behind = [node for node in graph.node if node.op_type in ACTIVATIONS and node.input[0] in made]
    made |= {name for node in behind for name in node.output}
    pools = [node for node in graph.node if node.op_type == "MaxPool" and node.input[0] in made]
    wanted = {node.name for node in (*chosen, *behind, *pools)}  # each has a name of its own
    return [node for node in graph.node if node.name in wanted]

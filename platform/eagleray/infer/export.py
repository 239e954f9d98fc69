"""The one ONNX: input "image" (float32 N,3,H,W), outputs "logits" and "embedding", batch axis "batch", one file.

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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import ArtifactError
from eagleray.vision.bundle import ModelBundle

if TYPE_CHECKING:
    from torch import nn

OPSET = 20  # the newest that TensorRT and OpenVINO both read (ecosystem notes of 2026-11)
MAX_BATCH = 65_536  # upper bound of the symbolic batch axis
MAX_ONNX_BYTES = 2**31 - 1  # one protobuf message


def export_onnx(model: nn.Module, draft: ModelBundle) -> bytes:
    """Exports a timm model.

    Args:
        model: A timm classifier, on the CPU; it is put into eval mode.
        draft: The bundle to be: its labels, preprocessing and policy go into the file's metadata.

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
    _describe(proto, draft)
    if proto.ByteSize() > MAX_ONNX_BYTES:
        raise ArtifactError(f"{draft.architecture} is over 2 GiB as ONNX", expected="a file of at most 2 GiB")
    return bytes(proto.SerializeToString(deterministic=True))


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


def _describe(proto: Any, draft: ModelBundle) -> None:
    """Says in metadata_props what a reader without our bundle needs: labels, preprocessing, thresholds."""
    from eagleray import __version__

    proto.producer_name, proto.producer_version = "eagleray", __version__
    words = {
        "architecture": draft.architecture,
        "labels": [label.to_json() for label in draft.labels],
        "image_spec": draft.image_spec.to_json(),
        "output": draft.output,
        "policy": draft.policy.to_json() if draft.policy else None,
    }
    for key, value in words.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value, sort_keys=True))

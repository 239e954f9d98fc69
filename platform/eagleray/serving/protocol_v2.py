"""The Open Inference Protocol v2: its JSON and the binary tensor extension, to and from what a Service takes.

One input, ``image``: encoded images as BYTES [N] (base64 where the tensor is JSON), or pixels as UINT8 [N, H, W, 3].
Every output of OUTPUTS may be asked for; without a list all are given but the embedding. Where an image cannot be used,
its row is empty, its ``reason`` says why, and the other rows stand.

Example:
    >>> request = read_request(body, header_length=header, card=card, limits=LimitsConfig())
    >>> body, headers = write_response(await service.predict(request.images, ask), request)

Source: https://github.com/kserve/open-inference-protocol (REST), and Triton's extension_binary_data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagleray.serving.answers import encode
from eagleray.serving.json_body import is_integer, is_text, read_object
from eagleray.serving.messages_v2 import InferAnswer, ModelMetadata, ResponseTensor
from eagleray.serving.refusals import Refusal, bad_json, bad_request, bad_tensor, too_many_images
from eagleray.serving.service import Answer, Batch, ModelCard, Uint8
from eagleray.serving.settings import LimitsConfig
from eagleray.serving.uploads import from_base64

INPUT = "image"
OUTPUTS = {
    "probabilities": "FP32",
    "label": "BYTES",
    "label_name": "BYTES",
    "score": "FP32",
    "decision": "BYTES",
    "reason": "BYTES",
    "embedding": "FP32",
}
EMBEDDING = "embedding"
HEADER_LENGTH = "inference-header-content-length"  # of the JSON, where binary tensors follow it
MAX_ID = 256
_LENGTH = struct.Struct("<I")  # before each element of a binary BYTES tensor


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that is asked for, and whether it goes as binary data."""

    name: str
    is_binary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A request of the v2 protocol.

    Attributes:
        id: Echoed in the answer; "" when there is none.
        images: Encoded images, when the input is BYTES.
        pixels: uint8, shape (N, height, width, 3), when the input is UINT8.
        outputs: What to answer.
        timeout_s: The client's own deadline, in s.
    """

    id: str
    images: tuple[bytes, ...] = ()
    pixels: Uint8 | None = None
    outputs: tuple[Wanted, ...]
    timeout_s: float | None = None

    def wants(self, name: str) -> bool:
        """Whether an output is asked for."""
        return any(output.name == name for output in self.outputs)


def metadata(card: ModelCard) -> ModelMetadata:
    """The answer to GET v2/models/NAME."""
    return {
        "name": card.name,
        "versions": [card.version],
        "platform": f"eagleray_{card.runtime}",
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": OUTPUTS[name], "shape": [-1, *_row_shape(name, card)]}
            for name in outputs_of(card)
        ],
    }


def outputs_of(card: ModelCard) -> list[str]:
    """The outputs that a model has."""
    return [name for name in OUTPUTS if name != EMBEDDING or card.embedding_dim is not None]


def read_request(body: bytes, *, header_length: str | None, card: ModelCard, limits: LimitsConfig) -> InferRequest:
    """Reads a request for a model.

    Args:
        body: All of it: JSON, or JSON and the binary tensors after it.
        header_length: The Inference-Header-Content-Length header; None when there is none.
        card: The model that is asked.
        limits: How many images it may hold, how deep its JSON may go.

    Raises:
        Refusal: ``bad_json``, ``bad_request``, ``bad_tensor`` or ``too_many_images``.
    """
    size = _header_size(header_length, len(body))
    value = read_object(body[:size], max_depth=limits.max_json_depth)
    name = value.get("id", "")
    if not is_text(name) or len(name) > MAX_ID:
        raise bad_json(f"id is a string of at most {MAX_ID} characters")
    parameters = _parameters(value)
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise bad_tensor(f"inputs is a list of one tensor, {INPUT}")
    images, pixels = _read_input(inputs[0], body[size:], card, limits)
    return InferRequest(
        id=name,
        images=images,
        pixels=pixels,
        outputs=_read_outputs(value.get("outputs"), card, _flag(parameters, "binary_data_output")),
        timeout_s=_timeout_s(parameters),
    )


def write_response(batch: Batch, request: InferRequest, *, request_id: str) -> tuple[bytes, dict[str, str]]:
    """The answer: JSON, or JSON and the binary tensors after it.

    Args:
        batch: The model's answers.
        request: What was asked.
        request_id: Names the request in logs.

    Returns:
        The body, and its headers: content type, and the length of the JSON where binary tensors follow.
    """
    outputs: list[ResponseTensor] = []
    tail: list[bytes] = []
    for wanted in request.outputs:
        shape = [len(batch.answers), *_row_shape(wanted.name, batch.card)]
        tensor: ResponseTensor = {"name": wanted.name, "datatype": OUTPUTS[wanted.name], "shape": shape}
        values = _values(wanted.name, batch, shape)
        if wanted.is_binary:
            data = _pack(values)
            tail.append(data)
            tensor["parameters"] = {"binary_data_size": len(data)}
        else:
            tensor["data"] = values.ravel().tolist() if isinstance(values, np.ndarray) else values
        outputs.append(tensor)
    answer: InferAnswer = {
        "model_name": batch.card.name,
        "model_version": batch.card.version,
        **({"id": request.id} if request.id else {}),  # type: ignore[typeddict-item]
        "parameters": {"model_digest": batch.card.digest, "request_id": request_id},
        "outputs": outputs,
    }
    text = encode(answer)
    if not tail:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join((text, *tail)), headers


def _header_size(header_length: str | None, body_size: int) -> int:
    if header_length is None:
        return body_size
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise bad_request("Inference-Header-Content-Length is the JSON's length in bytes")
    if int(header_length) > body_size:
        raise bad_request("Inference-Header-Content-Length is longer than the body")
    return int(header_length)


def _parameters(value: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = value.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad_json("parameters is an object")
    if "shared_memory_region" in parameters or "classification" in parameters:
        raise bad_tensor("shared memory and the classification extension are not offered; ask for label and score")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, otherwise: bool = False) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        raise bad_json(f"{name} is true or false")
    return value


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Triton's ``timeout``, in microseconds, in s."""
    value = parameters.get("timeout")
    if value is None:
        return None
    if not is_integer(value) or not 0 < value < 2**63:
        raise bad_json("timeout is a whole number of microseconds, above 0")
    return float(value) / 1e6


def _read_outputs(value: Any, card: ModelCard, is_binary: bool) -> tuple[Wanted, ...]:
    known = outputs_of(card)
    if value is None or value == []:
        return tuple(Wanted(name, is_binary) for name in known if name != EMBEDDING)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad_json("outputs is a list of objects, each with a name")
    names = [item.get("name") for item in value]
    if any(name not in known for name in names) or len(set(names)) < len(names):
        raise bad_tensor(f"outputs are of {', '.join(known)}, each once")
    return tuple(Wanted(item["name"], _flag(_parameters(item), "binary_data", is_binary)) for item in value)


def _read_input(
    tensor: Mapping[str, Any], tail: bytes, card: ModelCard, limits: LimitsConfig
) -> tuple[tuple[bytes, ...], Uint8 | None]:
    shape, datatype = tensor.get("shape"), tensor.get("datatype")
    if tensor.get("name") != INPUT:
        raise bad_tensor(f"the input's name is {INPUT}")
    if not isinstance(shape, list) or not all(is_integer(side) and 0 < side < 2**31 for side in shape):
        raise bad_tensor("shape is a list of whole numbers above 0")
    pixels_shape = [card.height, card.width, 3]
    is_encoded = datatype == "BYTES" and (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))
    if not is_encoded and not (datatype == "UINT8" and shape[1:] == pixels_shape):
        raise bad_tensor(
            f"{INPUT} is BYTES [N] (encoded images) or UINT8 {['N', *pixels_shape]} (pixels)".replace("'", "")
        )
    if shape[0] > limits.max_images_per_request:
        raise too_many_images(limits.max_images_per_request)
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if tail:
            raise bad_tensor(f"{len(tail)} bytes follow the JSON and no tensor has a binary_data_size")
        data = tensor.get("data")
        return (_json_images(data, shape), None) if is_encoded else ((), _json_pixels(data, shape))
    if "data" in tensor or not is_integer(size) or size != len(tail):
        raise bad_tensor(f"binary_data_size is the number of bytes after the JSON, {len(tail)}, and there is no data")
    return (_unpack(tail, shape[0]), None) if is_encoded else ((), _binary_pixels(tail, shape))


def _json_images(data: Any, shape: Sequence[int]) -> tuple[bytes, ...]:
    if not isinstance(data, list) or len(data) != shape[0]:
        raise bad_tensor(f"data is a list of {shape[0]} base64 strings")
    flat = [item[0] if len(shape) == 2 and isinstance(item, list) and len(item) == 1 else item for item in data]
    return tuple(from_base64(item) for item in flat)


def _json_pixels(data: Any, shape: Sequence[int]) -> Uint8:
    expected = f"data is {math.prod(shape)} whole numbers from 0 to 255, flat or nested as the shape"
    if not isinstance(data, list):
        raise bad_tensor(expected)
    try:
        values = np.array(data)
    except (ValueError, OverflowError):
        raise bad_tensor(expected) from None
    is_shaped = values.shape == tuple(shape) or values.shape == (math.prod(shape),)
    if values.dtype.kind not in "iu" or not is_shaped or values.min() < 0 or values.max() > 255:
        raise bad_tensor(expected)
    return values.astype(np.uint8).reshape(shape)


def _binary_pixels(data: bytes, shape: Sequence[int]) -> Uint8:
    if len(data) != math.prod(shape):
        raise bad_tensor(f"{len(data)} bytes of pixels, expected {math.prod(shape)} for the shape")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _unpack(data: bytes, count: int) -> tuple[bytes, ...]:
    """The elements of a binary BYTES tensor: each its length as 4 bytes, little-endian, then itself."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        if at + _LENGTH.size > len(data):
            raise _bad_bytes(count)
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise _bad_bytes(count)
        elements.append(data[start:at])
    if len(elements) != count or at != len(data):
        raise _bad_bytes(count)
    return tuple(elements)


def _bad_bytes(count: int) -> Refusal:
    return bad_tensor(
        f"the binary data is not {count} elements, each its length in 4 bytes (little-endian), then itself"
    )


def _row_shape(name: str, card: ModelCard) -> list[int]:
    """An output's shape for one image."""
    if name == "probabilities":
        return [len(card.labels)]
    return [card.embedding_dim or 0] if name == EMBEDDING else []


def _values(name: str, batch: Batch, shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]] | list[str]:
    """An output's values; a row of an image that cannot be used is zeros or an empty text."""
    if OUTPUTS[name] == "BYTES":
        return [getattr(answer.prediction, name) or "" for answer in batch.answers]
    rows = np.zeros(shape, np.float32)
    for row, answer in enumerate(batch.answers):
        found = _numbers(name, answer)
        if found is not None:
            rows[row] = found
    return rows


def _numbers(name: str, answer: Answer) -> Any:
    if name == "probabilities":
        return answer.probabilities
    return getattr(answer.prediction, name)


def _pack(values: np.ndarray[Any, np.dtype[np.float32]] | list[str]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<f4", copy=False).tobytes()
    texts = [value.encode() for value in values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)

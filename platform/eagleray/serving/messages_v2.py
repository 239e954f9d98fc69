"""The messages of the Open Inference Protocol v2 as types: what protocol_v2 reads and writes, and OpenAPI shows.

Example:
    >>> tensor: ResponseTensor = {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.9]}
"""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic reads typing's own only from Python 3.12 on
)

from annotated_types import Ge, Len
from typing_extensions import TypedDict


class ServerMetadata(TypedDict):
    """The server and its extensions."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """A tensor of a model: -1 is any number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(TypedDict):
    """Whether a model answers now."""

    name: str
    ready: bool


class ServerReady(TypedDict):
    """Whether the service as a whole answers now."""

    ready: bool


class ServerLive(TypedDict):
    """Whether the process answers."""

    live: bool


class RequestTensor(TypedDict):
    """The input: BYTES [N] of encoded images (base64 in JSON), or UINT8 [N, height, width, 3] of pixels."""

    name: Literal["image"]
    shape: Annotated[list[Annotated[int, Ge(1)]], Len(1, 4)]
    datatype: Literal["BYTES", "UINT8"]
    parameters: NotRequired[dict[str, Any]]
    data: NotRequired[list[Any]]


class RequestedOutput(TypedDict):
    """An output that is asked for."""

    name: Literal["probabilities", "label", "label_name", "score", "decision", "reason", "embedding"]
    parameters: NotRequired[dict[str, Any]]


class InferBody(TypedDict):
    """A request for inference."""

    id: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    inputs: Annotated[list[RequestTensor], Len(1, 1)]
    outputs: NotRequired[list[RequestedOutput]]


class ResponseTensor(TypedDict):
    """An output: its values, or in parameters.binary_data_size how many bytes of them follow the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[dict[str, Any]]
    data: NotRequired[list[Any]]


class InferAnswer(TypedDict):
    """The answer to a request for inference."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    parameters: dict[str, Any]
    outputs: list[ResponseTensor]


class ErrorAnswer(TypedDict):
    """The error form of the protocol."""

    error: str

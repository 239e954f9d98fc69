"""The OpenAPI 3.1 document, made from the types that the answers are made of and from the table of refusals.

docs/openapi.json is this document, committed; a test compares them, so that the wire format cannot change unseen.
``python -m eagleray.serving.openapi`` writes it to stdout.

Example:
    >>> document()["paths"]["/v1/predict"]["post"]["responses"]["413"]["description"]
    'The body is too large'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from eagleray import __version__
from eagleray.serving import answers, messages_v2, uploads
from eagleray.serving.calls import MAX_TOP_K
from eagleray.serving.refusals import KINDS, PROBLEM_TYPE
from eagleray.serving.service import DEFAULT_TOP_K

REFERENCE = "#/components/schemas/{model}"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
Json = dict[str, Any]


class Problem(TypedDict):
    """A refusal (RFC 9457): code is one of a closed list, detail says what to do."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    instance: NotRequired[str]
    reason: NotRequired[str]


class Health(TypedDict):
    """Whether the service lives, or is ready."""

    status: str


def document() -> Json:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Eagleray",
            "version": __version__,
            "summary": "Image classification: the same answers as `eagleray score`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"api_key": []}],
        "paths": {**_v1_paths(), **_v2_paths(), **_open_paths()},
        "components": {
            "schemas": _schemas(),
            "parameters": _parameters(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer er_ID_SECRET"},
                "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _schemas() -> Json:
    """Every type of the wire, by name."""
    types: list[Any] = [
        *(answers.ImageAnswer, answers.BatchAnswer, answers.EmbeddingAnswer, answers.EmbeddingBatchAnswer),
        *(answers.ModelList, uploads.OneImage, uploads.SeveralImages, Problem, Health),
        *(messages_v2.ServerMetadata, messages_v2.ModelMetadata, messages_v2.ModelReady, messages_v2.ServerReady),
        *(messages_v2.ServerLive, messages_v2.InferBody, messages_v2.InferAnswer, messages_v2.ErrorAnswer),
    ]
    _, made = TypeAdapter.json_schemas(
        [(kind.__name__, "serialization", TypeAdapter(kind)) for kind in types], ref_template=REFERENCE
    )
    return dict(sorted(made["$defs"].items()))


def _parameters() -> Json:
    name = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}
    top_k = {"type": "integer", "minimum": 1, "maximum": MAX_TOP_K, "default": DEFAULT_TOP_K}
    deadline = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
    return {
        "query_model": _parameter("model", "query", name, "The model; the first of the service where none is named."),
        "top_k": _parameter("top_k", "query", top_k, "How many labels an answer carries, at most."),
        "deadline": _parameter(
            "X-Deadline-Ms", "header", deadline, "After so many milliseconds the answer is of no use: 503."
        ),
        "model": _parameter("model", "path", name, "The model."),
        "version": _parameter("version", "path", {"type": "string"}, "The first 12 digits of the model's digest."),
    }


def _parameter(name: str, place: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


def _v1_paths() -> Json:
    asked = ["query_model", "top_k", "deadline"]
    return {
        "/v1/predict": {
            "post": {
                **_said("predict", "Classifies the images of a request.", asked),
                "requestBody": _upload(),
                "responses": _responses(_either("ImageAnswer", "BatchAnswer"), _ASKED),
            }
        },
        "/v1/embed": {
            "post": {
                **_said("embed", "The embeddings of the images of a request.", ["query_model", "deadline"]),
                "requestBody": _upload(),
                "responses": _responses(_either("EmbeddingAnswer", "EmbeddingBatchAnswer"), _ASKED),
            }
        },
        "/v1/models": {
            "get": {
                **_said("models", "The models that the key opens.", []),
                "responses": _responses(_named("ModelList"), (400, 401, 429, 503)),
            }
        },
    }


def _v2_paths() -> Json:
    paths: Json = {}
    for place, ending in (("/v2/models/{model}", ""), ("/v2/models/{model}/versions/{version}", "_of_version")):
        given = ["model", "version"] if ending else ["model"]
        body = {"required": True, "content": {"application/json": {"schema": _named("InferBody")}}}
        paths[f"{place}/infer"] = {
            "post": {
                **_said(f"infer{ending}", _INFER, [*given, "deadline"]),
                "requestBody": body,
                "responses": _responses(_named("InferAnswer"), _ASKED, is_v2=True),
            }
        }
        paths[f"{place}/ready"] = {
            "get": {
                **_said(f"model_ready{ending}", "Whether the model answers now.", given),
                "responses": {**_responses(_named("ModelReady"), _LOOKED, is_v2=True), **_unready("ModelReady")},
            }
        }
        paths[place] = {
            "get": {
                **_said(f"model{ending}", "The model's inputs and outputs.", given),
                "responses": _responses(_named("ModelMetadata"), _LOOKED, is_v2=True),
            }
        }
    return paths


def _open_paths() -> Json:
    """What anybody may ask."""
    shown = {
        "/v2": ("server", "The server and its extensions.", "ServerMetadata"),
        "/v2/health/live": ("server_live", "Whether the process answers.", "ServerLive"),
        "/v2/health/ready": ("server_ready", "Whether the service answers.", "ServerReady"),
        "/healthz": ("healthz", "Whether the process answers.", "Health"),
        "/readyz": ("readyz", "Whether the service answers.", "Health"),
    }
    paths: Json = {}
    for path, (name, text, schema) in shown.items():
        answers_ready = {**_answer("OK", _named(schema)), **(_unready(schema) if "ready" in name else {})}
        paths[path] = {"get": {**_said(name, text, []), "security": [], "responses": answers_ready}}
    for path, name, text, kind in (
        ("/openapi.json", "openapi", "This document.", "application/json"),
        ("/", "page", "A page where a person drops an image.", "text/html"),
    ):
        content = {kind: {"schema": {"type": "string" if kind == "text/html" else "object"}}}
        responses = {"200": {"description": "OK", "content": content}}
        paths[path] = {"get": {**_said(name, text, []), "security": [], "responses": responses}}
    return paths


_INFER = (
    "Inference by the Open Inference Protocol. Where the header Inference-Header-Content-Length says how long the JSON"
    " is, binary tensors follow; they are answered where binary_data asks for them."
)
_LOOKED = (400, 401, 403, 404, 429, 503)
_ASKED = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)


def _said(name: str, text: str, parameters: Sequence[str]) -> Json:
    said: Json = {"operationId": name, "summary": text}
    if parameters:
        said["parameters"] = [{"$ref": f"#/components/parameters/{each}"} for each in parameters]
    return said


def _upload() -> Json:
    """The forms in which images come."""
    raw = {"schema": {"type": "string", "contentMediaType": "application/octet-stream", "minLength": 1}}
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {
        "type": "object",
        "properties": {"file": {"type": "array", "items": file, "minItems": 1}},
        "required": ["file"],
        "additionalProperties": False,
    }
    return {
        "required": True,
        "content": {
            **dict.fromkeys((*IMAGE_TYPES, uploads.ANY_BYTES), raw),
            uploads.FORM: {"schema": form, "encoding": {"file": {"contentType": ", ".join(IMAGE_TYPES)}}},
            uploads.JSON: {"schema": _either("OneImage", "SeveralImages")},
        },
    }


def _responses(schema: Json, refusals: Sequence[int], *, is_v2: bool = False) -> Json:
    """The answer, and every refusal that may come in its place."""
    kind, name = ("application/json", "ErrorAnswer") if is_v2 else (PROBLEM_TYPE, "Problem")
    found = _answer("OK", schema)
    for status in refusals:
        titles = [each.title for each in KINDS.values() if each.status == status]
        found[str(status)] = {"description": "; ".join(titles), "content": {kind: {"schema": _named(name)}}}
        if status in (429, 503):
            found[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "In s."}}
    return found


def _answer(text: str, schema: Json, status: int = 200) -> Json:
    return {str(status): {"description": text, "content": {"application/json": {"schema": schema}}}}


def _unready(schema: str) -> Json:
    return _answer("Not ready", _named(schema), 503)


def _named(name: str) -> Json:
    return {"$ref": REFERENCE.format(model=name)}


def _either(*names: str) -> Json:
    return {"oneOf": [_named(name) for name in names]}


def main() -> None:
    """Writes the document to stdout."""
    sys.stdout.write(json.dumps(document(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

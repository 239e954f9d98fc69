"""Every way in which the service says no: status, slug, words, what to do; as RFC 9457 or the v2 protocol says it.

A refusal is an answer, not a fault of ours: it carries no stack, no path of the machine, nothing of the input. The
table KINDS is the list that the OpenAPI document, the tests and the operator's page are made from. There is one
constructor a kind, so that a status cannot be chosen where it is raised.

Example:
    >>> raise too_large(limit_bytes=16 << 20)
    >>> to_problem(too_large(limit_bytes=16 << 20), request_id="r-1", instance="/v1/predict")["status"]
    413
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PROBLEM_TYPE = "application/problem+json"  # RFC 9457, section 3
PROBLEM_URN = "urn:eagleray:problem:"  # + the code: an identifier, nothing is fetched from it
V2_PREFIX = "/v2"  # under it an error is {"error": "..."}: Open Inference Protocol v2, "Inference Response JSON Error"
REALM = 'Bearer realm="eagleray"'  # RFC 6750, section 3


@dataclass(frozen=True)
class Kind:
    """One kind of refusal.

    Attributes:
        status: The HTTP status.
        title: The same words for every occurrence (RFC 9457: "SHOULD NOT change from occurrence to occurrence").
    """

    status: int
    title: str


KINDS: dict[str, Kind] = {
    "bad_request": Kind(400, "The request is malformed"),
    "bad_json": Kind(400, "The body is not the JSON that is expected"),
    "bad_tensor": Kind(400, "A tensor has another name, shape or datatype than the model takes"),
    "bad_parameter": Kind(400, "A parameter has a value that is not allowed"),
    "empty_body": Kind(400, "The body is empty"),
    "missing_key": Kind(401, "No API key was given"),
    "wrong_key": Kind(401, "The API key is not valid"),
    "forbidden_model": Kind(403, "The key does not open this model"),
    "forbidden_action": Kind(403, "The key does not allow this action"),
    "forbidden_origin": Kind(403, "The request comes from where it is not answered"),
    "unknown_model": Kind(404, "There is no such model"),
    "unknown_path": Kind(404, "There is no such path"),
    "wrong_method": Kind(405, "The path does not take this method"),
    "body_too_slow": Kind(408, "The body did not arrive in time"),
    "too_large": Kind(413, "The body is too large"),
    "unsupported_media_type": Kind(415, "The content type is not one that is read"),
    "not_an_image": Kind(422, "No image of the request can be classified"),
    "no_embedding": Kind(422, "The model gives no embedding"),
    "too_many_images": Kind(422, "The request holds too many images"),
    "rate_limited": Kind(429, "The rate limit is reached"),
    "quota_used": Kind(429, "The daily quota is used"),
    "fault": Kind(500, "The service failed"),
    "overloaded": Kind(503, "The service is busy"),
    "deadline_passed": Kind(503, "The answer was not ready in time"),
    "not_ready": Kind(503, "The service is not ready"),
}


class Refusal(Exception):
    """A request that is not answered as it was meant.

    Args:
        code: A key of KINDS.
        detail: What was seen and what is expected, for the person who asked; holds nothing of the input but sizes and
            the names that the service itself gave.
        retry_after_s: Seconds after which the same request may do, for the Retry-After header.
        headers: More headers of the answer, lower case.
        extra: More members of the problem (RFC 9457, section 3.2), e.g. the reason of each image.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retry_after_s: float | None = None,
        headers: Iterable[tuple[str, str]] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.retry_after_s = code, detail, retry_after_s
        self.kind = KINDS[code]
        self.extra = dict(extra or {})
        self.headers = tuple(headers)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.kind.status

    @property
    def title(self) -> str:
        """The kind, in words."""
        return self.kind.title

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.detail, self.retry_after_s, self.headers, self.extra))


def _rebuild(
    code: str, detail: str, retry_after_s: float | None, headers: tuple[tuple[str, str], ...], extra: dict[str, Any]
) -> Refusal:
    return Refusal(code, detail, retry_after_s=retry_after_s, headers=headers, extra=extra)


def to_problem(refusal: Refusal, *, request_id: str, instance: str = "") -> dict[str, Any]:
    """The body of RFC 9457: type, title, status, detail, instance; beside them our code and the request id.

    Args:
        refusal: What is refused.
        request_id: The request's id, as in the X-Request-Id header.
        instance: The path that was asked, without the query.
    """
    body: dict[str, Any] = {
        "type": PROBLEM_URN + refusal.code,
        "title": refusal.title,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        "request_id": request_id,
    }
    if instance:
        body["instance"] = instance
    return {**refusal.extra, **body}  # an extra member never replaces a standard one


def to_v2(refusal: Refusal) -> dict[str, Any]:
    """The error body of the Open Inference Protocol v2."""
    return {"error": f"{refusal.title}: {refusal.detail}" if refusal.detail else refusal.title}


def to_answer(
    refusal: Refusal, *, request_id: str, path: str, head_only: bool = False
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """The whole answer in ASGI's terms, in the form that the path asks for.

    Args:
        refusal: What is refused.
        request_id: The request's id; answered in the header too.
        path: The path that was asked; under /v2 the body is the v2 protocol's.
        head_only: The request was a HEAD: the headers stand, the body is left out.

    Returns:
        The status, the headers in lower case (type, length, id, Retry-After, the refusal's own), the body.
    """
    is_v2 = path == V2_PREFIX or path.startswith(V2_PREFIX + "/")
    content = to_v2(refusal) if is_v2 else to_problem(refusal, request_id=request_id, instance=path)
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    headers = [
        (b"content-type", b"application/json" if is_v2 else PROBLEM_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode("latin-1", "replace")),
        (b"cache-control", b"no-store"),
    ]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refusal.retry_after_s))).encode()))
    headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in refusal.headers]
    return refusal.status, headers, b"" if head_only else body


def bad_request(detail: str) -> Refusal:
    """400: the request cannot be read."""
    return Refusal("bad_request", detail)


def bad_json(detail: str) -> Refusal:
    """400: not JSON, nested too deep, or without a member that must be there."""
    return Refusal("bad_json", detail)


def bad_tensor(detail: str) -> Refusal:
    """400: a tensor of the v2 protocol that the model does not take."""
    return Refusal("bad_tensor", detail)


def bad_parameter(name: str, expected: str) -> Refusal:
    """400: a query parameter or member with a wrong value; the value itself is not repeated."""
    return Refusal("bad_parameter", f"{name} must be {expected}")


def empty_body() -> Refusal:
    """400: nothing was sent."""
    return Refusal("empty_body", "send the bytes of an image, files as multipart/form-data, or JSON")


def missing_key() -> Refusal:
    """401: no key in the headers."""
    return Refusal(
        "missing_key",
        "give a key: Authorization: Bearer er_... or X-API-Key: er_... (eagleray apikeys create makes one)",
        headers=(("www-authenticate", REALM),),
    )


def wrong_key() -> Refusal:
    """401: unknown, altered, expired and revoked keys alike: the answer tells no one which."""
    return Refusal(
        "wrong_key",
        "the key is unknown, expired or revoked; ask the operator for another",
        headers=(("www-authenticate", REALM + ', error="invalid_token"'),),
    )


def forbidden_model() -> Refusal:
    """403: the key's scopes do not name the model; the same whether there is such a model or not."""
    return Refusal("forbidden_model", "ask for a model that the key opens: GET /v1/models lists them")


def forbidden_action(action: str) -> Refusal:
    """403: the key opens the model, not for this."""
    return Refusal("forbidden_action", f"the key has no scope {action!r}; ask the operator for one that has")


def forbidden_origin(detail: str) -> Refusal:
    """403: a service without keys, asked from other than this machine or by another site's page."""
    return Refusal("forbidden_origin", detail)


def unknown_model(names: Sequence[str]) -> Refusal:
    """404: no such model.

    Args:
        names: The models that this key opens.
    """
    return Refusal("unknown_model", f"expected one of {', '.join(names) or '(none that this key opens)'}")


def unknown_path() -> Refusal:
    """404: no such path."""
    return Refusal("unknown_path", "GET /openapi.json lists what can be asked")


def wrong_method(allowed: Sequence[str]) -> Refusal:
    """405: with the methods that the path takes in the Allow header (RFC 9110, section 15.5.6)."""
    methods = ", ".join(allowed)
    return Refusal("wrong_method", f"the path takes {methods}", headers=(("allow", methods),))


def body_too_slow(timeout_s: float) -> Refusal:
    """408: the whole body must arrive within timeout_s."""
    return Refusal("body_too_slow", f"the body must arrive within {timeout_s:g} s")


def too_large(limit_bytes: int) -> Refusal:
    """413: the body is over limit_bytes, by its Content-Length or by what arrived."""
    return Refusal(
        "too_large",
        f"a body has at most {limit_bytes} bytes ({limit_bytes / (1 << 20):.3g} MiB); nothing beyond them was read",
        extra={"limit_bytes": limit_bytes},
    )


def unsupported_media_type(expected: Sequence[str]) -> Refusal:
    """415: with the types that are read in the Accept header (RFC 9110, section 15.5.16)."""
    types = ", ".join(expected)
    return Refusal("unsupported_media_type", f"expected one of {types}", headers=(("accept", types),))


def not_an_image(reason: str, detail: str, *, extra: dict[str, Any] | None = None) -> Refusal:
    """422: the image, or every image of the request, is refused.

    Args:
        reason: The code of vision.images.ImageRefused.
        detail: Its words.
        extra: More members, e.g. ``{"results": [...]}`` with the entry of each image.
    """
    return Refusal("not_an_image", detail, extra={**(extra or {}), "reason": reason})


def no_embedding(model: str) -> Refusal:
    """422: an embedding was asked of a model that has none.

    Args:
        model: The model's configured name.
    """
    return Refusal("no_embedding", f"{model} was exported without one; ask another model, or /v1/predict")


def too_many_images(limit: int) -> Refusal:
    """422: more images in one request than limit."""
    return Refusal("too_many_images", f"a request holds at most {limit} images", extra={"limit": limit})


def rate_limited(retry_after_s: float) -> Refusal:
    """429: the tenant's rate is used up for retry_after_s seconds."""
    return Refusal("rate_limited", f"ask again in {retry_after_s:.1f} s", retry_after_s=retry_after_s)


def quota_used(retry_after_s: float) -> Refusal:
    """429: the tenant's images of this day (UTC) are used up; it begins again in retry_after_s seconds."""
    return Refusal("quota_used", "the quota begins again at 00:00 UTC", retry_after_s=retry_after_s)


def overloaded(retry_after_s: float) -> Refusal:
    """503: the queue is longer than the request's deadline, or full."""
    return Refusal("overloaded", "more is waiting than can be answered in time; ask again", retry_after_s=retry_after_s)


def deadline_passed(deadline_s: float | None = None) -> Refusal:
    """503: the request waited for its whole deadline.

    Args:
        deadline_s: How long that was; None where it is not known.
    """
    within = "" if deadline_s is None else f" within {deadline_s:g} s"
    return Refusal("deadline_passed", f"no answer{within}; ask again", retry_after_s=1.0)


def not_ready(detail: str = "the model is being loaded; ask again") -> Refusal:
    """503: no model is ready to answer."""
    return Refusal("not_ready", detail, retry_after_s=1.0)


def fault() -> Refusal:
    """500: a fault of ours; the log has it under the request id, the answer says nothing of the inside."""
    return Refusal("fault", "a fault of the service, not of the request; the request id finds it in the log")

"""What a request asks for, read from its method, path and query alone: before the key is looked at or a byte is read.

The gateway knows the paths so that it can refuse a body early, and can tell what anybody may ask from what needs a key.
It never opens what the app would not: the app checks the model and the action again.

Example:
    >>> target_of("POST", "/v1/predict", b"model=lite0").action
    'predict'
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl

# Health, the page and the documents. GET and HEAD only, and no body of theirs is read.
OPEN: dict[str, str] = {
    "/": "page",
    "/openapi.json": "openapi",
    "/healthz": "health",
    "/readyz": "health",
    "/v2": "server",
    "/v2/health/live": "health",
    "/v2/health/ready": "health",
}
PROXY_HEALTH = "/-/healthz"  # Serve's own, which HAProxy and load balancers ask; the app never sees it
PROXY_PATHS = "/-/"  # what else Serve answers under it (/-/routes) tells the names of applications
IMAGE_TYPES = ("image/*", "application/octet-stream", "multipart/form-data", "application/json")
TENSOR_TYPES = ("application/octet-stream", "application/json")


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked.

    Attributes:
        route: The name under which it is counted: a closed set.
        action: predict or embed; "" for what only tells of models.
        model: The model's name as path or query gives it; "" when none is named.
        is_open: Whether anybody may ask.
        types: Content types of its body; empty when it takes none.
    """

    route: str
    action: str = ""
    model: str = ""
    is_open: bool = False
    types: tuple[str, ...] = ()

    def takes(self, content_type: str) -> bool:
        """Whether a body of this type is read; no type at all is the client's "look yourself"."""
        kind = content_type.partition(";")[0].strip().lower()
        return not kind or any(
            kind == known or (known.endswith("/*") and kind.startswith(known[:-1])) for known in self.types
        )


def target_of(method: str, path: str, query: bytes) -> Target:
    """What a request asks for.

    Args:
        method: HTTP's, upper case.
        path: As ASGI gives it: decoded, without the query.
        query: The raw query string.
    """
    if path in OPEN:
        return Target(OPEN[path], is_open=method in ("GET", "HEAD"))
    if path == PROXY_HEALTH:
        return Target("health", is_open=method in ("GET", "HEAD"))
    is_post = method == "POST"
    if path in ("/v1/predict", "/v1/embed"):
        action = path.removeprefix("/v1/")
        return Target(action, action, _asked_model(query), types=IMAGE_TYPES if is_post else ())
    if path == "/v1/models":
        return Target("models")
    if path.startswith("/v2/models/"):
        model, _, rest = path.removeprefix("/v2/models/").partition("/")
        if rest == "infer" or rest.endswith("/infer"):
            return Target("infer", "predict", model, types=TENSOR_TYPES if is_post else ())
        return Target("model", "", model)
    return Target("unknown")


def _asked_model(query: bytes) -> str:
    if b"model" not in query:
        return ""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=16)
    except ValueError:
        return ""  # too many fields: the app refuses the query
    return next((value for name, value in pairs if name == "model"), "")

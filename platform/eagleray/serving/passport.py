"""Who asks, and what they may do: what the gateway leaves in a request's scope for the app.

The gateway runs in the same process as the app (one uvicorn, Serve's direct ingress) or in Serve's proxy, which pickles
the scope to the replica. A client can set headers, never the scope's state, so nothing that a client sends is believed
twice. The app answers nothing without a passport: where the gateway was not installed, everything is refused.

Example:
    >>> passport = passport_of(scope)
    >>> passport.may("lite0", "predict")
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eagleray.serving.refusals import missing_key

STATE_KEY = "eagleray"  # scope["state"]["eagleray"]
ANY = "*"
ACTIONS = ("predict", "embed", "metrics", "admin")  # predict: /v1/predict, /v2 infer; the last two: operators


@dataclass(frozen=True)
class Passport:
    """One authorised request; plain values only, it is pickled from the proxy to the replica.

    Attributes:
        tenant: The tenant's name in the key file; "local" when keys are off.
        request_id: The request's id, as answered in X-Request-Id and in the body.
        model: The model that path or query asked for; "" when none was named (the default model).
        models: Names of the models that the key opens; "*" is all.
        actions: Which of ACTIONS the key allows; "*" is all.
        trace: The request's own W3C traceparent (a child of the client's, or a new trace).
        key_id: The id part of the key, not secret; "" when keys are off.
        arrived_s: Unix time at which all of the request had come: its deadline runs from here, through Serve's queues.
    """

    tenant: str
    request_id: str
    model: str = ""
    models: tuple[str, ...] = (ANY,)
    actions: tuple[str, ...] = (ANY,)
    trace: str = ""
    key_id: str = ""
    arrived_s: float = 0.0

    def opens(self, model: str) -> bool:
        """Whether the key opens the model."""
        return ANY in self.models or model in self.models

    def may(self, model: str, action: str) -> bool:
        """Whether the key opens the model for the action."""
        return self.opens(model) and (ANY in self.actions or action in self.actions)


def passport_of(scope: Mapping[str, Any]) -> Passport:
    """The passport of a request.

    Raises:
        Refusal: 401, when the request did not come through a gateway.
    """
    found = (scope.get("state") or {}).get(STATE_KEY)
    if not isinstance(found, Passport):
        raise missing_key()
    return found

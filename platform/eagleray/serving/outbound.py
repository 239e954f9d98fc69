"""What leaves the gateway: the app's answer with the headers that every answer has, and Serve's errors in our form.

Serve answers in plain text where the app could not (a full queue, a timeout, an unknown path); such an answer is held
back and told as a Refusal, so that a client sees one form of error and nothing of the inside.

Example:
    >>> outbound = Outbound(send, "r-12345678", path="/v1/predict", is_https=False)
    >>> await app(scope, receive, outbound)
    >>> outbound.num_images
    1
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Send

from eagleray.serving.refusals import PROBLEM_TYPE, Refusal, deadline_passed, fault, not_ready, overloaded, unknown_path

IMAGES_HEADER = b"x-eagleray-images"  # of the app's answer: how many images it held; charged, and taken away
OUR_FORMS = (b"application/json", PROBLEM_TYPE.encode(), b"application/octet-stream")
DEFAULT_RETRY_S = 1.0
SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")  # a page brings its own
STRICT_TRANSPORT = (b"strict-transport-security", b"max-age=31536000")


class Outbound:
    """The app's ``send``.

    Args:
        send: The server's.
        request_id: Answered in X-Request-Id, whatever the app says.
        path: The path that was asked.
        is_https: Whether the connection is encrypted.
    """

    def __init__(self, send: Send, request_id: str, *, path: str, is_https: bool) -> None:
        self._send, self._path, self._is_https = send, path, is_https
        self._request_id = request_id.encode()
        self.status = 0  # until an answer has begun
        self.is_answered = False  # whether it is the app's
        self.on_answer: Callable[[], None] | None = None  # told when the answer is there, however slowly it is read
        self.closes = False  # whether the connection ends after the answer: the rest of the request's body is not read
        self.num_images = 1
        self.refusal: Refusal | None = None

    async def __call__(self, message: Message) -> None:
        """Passes a message of the app on."""
        if message["type"] == "http.response.start":
            status, headers = message["status"], message.get("headers") or []
            self.refusal = _as_refusal(status, headers)
            if self.refusal is None:
                self.is_answered = True
                await self._begin(status, headers)
        elif self.refusal is None:
            await self._send(message)

    async def say(
        self,
        status: int,
        headers: list[tuple[bytes, bytes]],
        content: bytes,
        *,
        linger_s: float = 0.0,
    ) -> None:
        """Sends a whole answer of the gateway; nothing when the app's has begun.

        Args:
            status, headers, content: The answer.
            linger_s: How long a connection that closes is kept open for the client to read the answer: it is closed
                with unread bytes, so it is reset, and a client may then lose what it had not read (RFC 9112, 9.6).
        """
        if self.status:
            return
        await self._begin(status, headers)
        if self.closes and linger_s > 0:
            await self._send({"type": "http.response.body", "body": content, "more_body": True})
            await asyncio.sleep(linger_s)
            content = b""
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        kept: list[tuple[bytes, bytes]] = []
        has_policy = False
        for name, value in headers:
            lower = name.lower()
            if lower == IMAGES_HEADER:
                self.num_images = int(value) if value.isdigit() else 1
            elif lower != b"x-request-id":
                has_policy = has_policy or lower == POLICY[0]
                kept.append((lower, value))
        kept.append((b"x-request-id", self._request_id))
        kept += SECURITY
        if self.closes:
            kept.append((b"connection", b"close"))
        if not has_policy:
            kept.append(POLICY)
        if self._is_https:
            kept.append(STRICT_TRANSPORT)
        if self.on_answer is not None:
            self.on_answer()
        await self._send({"type": "http.response.start", "status": status, "headers": kept})


def _as_refusal(status: int, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
    """An error that is not in our form, as one that is; None for every other answer."""
    if status < 400:
        return None
    said = {name.lower(): value for name, value in headers}
    if said.get(b"content-type", b"").partition(b";")[0].strip().lower() in OUR_FORMS:
        return None
    retry_after = said.get(b"retry-after", b"")
    retry_after_s = float(retry_after) if retry_after.isdigit() else DEFAULT_RETRY_S
    if status == 404:
        return unknown_path()
    if status in (408, 504):  # Serve's own timeout: x-request-timeout-seconds has passed
        return deadline_passed()
    if status in (429, 503):
        return overloaded(retry_after_s)
    if status in (499, 502):
        return not_ready("the replica that had the request is gone; ask again")
    return fault() if status >= 500 else Refusal("bad_request", "the request cannot be answered")

"""Reads a request's body: cut at its limit while it arrives, timed, and counted against what all bodies may take.

Serve's proxy and its direct ingress both read bodies ahead of the app, without a limit: so the body is read here, in
front of them, and handed on whole. It costs no more memory than they would take, replicas hold no slow upload, and a
refused body is never in their queues.

Example:
    >>> body = await read_body(receive, declared=None, limits=BodyLimits(16 << 20, 10.0), budget=Budget(512 << 20))
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from eagleray.serving.refusals import bad_request, body_too_slow, overloaded, too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
RETRY_S = 1.0


class ClientGone(Exception):
    """The client closed the connection before its body had come."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What one body may take.

    Attributes:
        max_bytes: Its size.
        timeout_s: The time in which all of it must come.
    """

    max_bytes: int
    timeout_s: float


class Budget:
    """Bytes that all bodies of this process may hold at a time.

    Args:
        max_bytes: The sum.
        most_each: What one tenant's may hold of it; None = all.
    """

    def __init__(self, max_bytes: int, most_each: int | None = None) -> None:
        self._free = max_bytes
        self._most_each = max_bytes if most_each is None else most_each
        self._held: dict[str, int] = {}  # of tenants that hold any

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self._free

    def check(self, size: int, tenant: str) -> None:
        """Whether a tenant may take a part.

        Raises:
            Refusal: 503: less than that is left, of all or of the tenant's share.
        """
        if size > min(self._free, self._most_each - self._held.get(tenant, 0)):
            raise overloaded(RETRY_S)

    def take(self, size: int, tenant: str) -> None:
        """Takes a part.

        Raises:
            Refusal: As check.
        """
        self.check(size, tenant)
        self._free -= size
        self._held[tenant] = self._held.get(tenant, 0) + size

    def give(self, size: int, tenant: str) -> None:
        """Gives a part back."""
        self._free += size
        left = self._held.pop(tenant, 0) - size
        if left > 0:
            self._held[tenant] = left


class Body:
    """One body; ``release`` when nobody needs it any more.

    Args:
        budget: What it is counted against.
        tenant: Whose it is; may be set until the first byte is read.
    """

    def __init__(self, budget: Budget, tenant: str = "") -> None:
        self.tenant = tenant
        self.data = b""
        self.num_read = 0  # bytes that arrived, of a refused body too
        self.is_whole = False
        self._budget, self._taken = budget, 0

    def announce(self, size: int) -> None:
        """Whether so many bytes could be held now; nothing is taken for what has not come.

        Raises:
            Refusal: 503.
        """
        self._budget.check(size, self.tenant)

    def reserve(self, size: int) -> None:
        """Takes what is missing to ``size`` bytes from the budget.

        Raises:
            Refusal: 503.
        """
        if size > self._taken:
            self._budget.take(size - self._taken, self.tenant)
            self._taken = size

    def release(self) -> None:
        """Gives the budget back and forgets the bytes."""
        self._budget.give(self._taken, self.tenant)
        self.data, self._taken = b"", 0


def declared_size(headers: list[tuple[bytes, bytes]]) -> int | None:
    """The size that Content-Length says; 0 where there is no body; None for one that comes in chunks.

    Raises:
        Refusal: 400: a length that is no number, two that differ, or a length and chunks (RFC 9112, section 6.3: how
            requests are smuggled). Servers refuse these too; the gateway does not rely on it.
    """
    lengths = {value.strip() for name, value in headers if name == b"content-length"}
    is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if is_chunked and lengths:
        raise bad_request("a body has either a Content-Length or a Transfer-Encoding")
    if is_chunked:
        return None
    if not lengths:
        return 0
    length = lengths.pop()
    if lengths or not length.isdigit() or len(length) > 18:
        raise bad_request("Content-Length is one whole number")
    return int(length)


async def read_body(receive: Receive, body: Body, *, declared: int | None, limits: BodyLimits) -> None:
    """Reads all of a body.

    Args:
        receive: ASGI's.
        body: What is filled; its ``num_read`` holds after a refusal too.
        declared: As declared_size gives it.
        limits: Its size and time.

    Raises:
        Refusal: 413 (by the declared size before anything is read, else once what arrived is over the limit), 408, or
            503 when all bodies together take too much.
        ClientGone: The connection ended first.
    """
    if declared == 0:
        body.is_whole = True
        return
    if declared is not None:
        if declared > limits.max_bytes:
            raise too_large(limits.max_bytes)
        body.announce(declared)
    try:
        async with asyncio.timeout(limits.timeout_s):
            await _collect(receive, body, limits.max_bytes)
    except TimeoutError:
        raise body_too_slow(limits.timeout_s) from None


async def _collect(receive: Receive, body: Body, max_bytes: int) -> None:
    chunks: list[bytes] = []
    while not body.is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        body.num_read += len(chunk)
        if body.num_read > max_bytes:
            raise too_large(max_bytes)
        body.reserve(body.num_read)
        chunks.append(chunk)
        body.is_whole = not message.get("more_body", False)
    body.data = chunks[0] if len(chunks) == 1 else b"".join(chunks)

"""The first thing that a request meets: id, key, rate, type and size, before a byte of its body is taken in.

Serve has no authentication, no limit on bodies and no rate; its proxy and its direct ingress both read bodies ahead of
the app. So this is ASGI middleware that Serve itself installs in both (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
``eagleray.flows.serve_gateway:middlewares``). It is the outermost one: what it lets through has an id, a tenant, a
whole body within the limits, and none of the headers by which a client could steer Serve; a key goes no further than
here. What Serve says itself (full, late, gone) leaves in our form of error, without a trace of the inside. When a
replica dies with a request, another is asked, once: the body is here, and a prediction changes nothing.

Example:
    >>> app = Gateway(app, config=config, keys=KeyFile("keys.json"), limiter=RateLimiter(MemoryLedger()))
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.serving.access import KeyFile
from eagleray.serving.admission import MemoryLedger, RateLimiter, Rates
from eagleray.serving.bodies import BodyLimits, Budget, ClientGone, declared_size, read_body
from eagleray.serving.concurrency import TARGET_SHARE, ConcurrencyLimit, Places
from eagleray.serving.outbound import Outbound
from eagleray.serving.passport import ANY, STATE_KEY, Passport
from eagleray.serving.paths import PROXY_HEALTH, PROXY_PATHS
from eagleray.serving.refusals import (
    Refusal,
    deadline_passed,
    fault,
    forbidden_action,
    forbidden_model,
    forbidden_origin,
    not_ready,
    to_answer,
    unknown_path,
    unsupported_media_type,
)
from eagleray.serving.settings import ServingConfig
from eagleray.serving.visits import NOBODY, Visit, Watch, first, open_visit

LOG = logging.getLogger("eagleray.serving.gateway")
LOCAL = "local"  # the tenant of a service without keys
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# By these a client would choose its own timeout, be left to run when it has gone, or pick a replica (Serve 2.60,
# constants.py and http_util.py); Serve takes _ for -.
STEERING = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
)
# Secrets end here; the body's size and the trace are said anew
DROPPED = frozenset(
    [
        *(*STEERING, b"authorization", b"x-api-key", b"cookie", b"x-request-id", b"traceparent"),
        *(b"content-length", b"transfer-encoding", b"expect"),
    ]
)
OURS = b"x-eagleray-"
MULTIPLEXED = b"serve_multiplexed_model_id"  # Serve's router prefers a replica that has this model in memory
TIMEOUT_SLACK_S = 1.0  # the app answers a passed deadline itself; Serve's timeout is for a replica that hangs
SINGLE_TYPES = (b"", b"application/octet-stream")  # beside image/*: the body is the image
LINGER_S = 0.5  # a refused upload's connection is closed so much later: a client that still sends can read the answer
TRIES = 2
MOST_ASIDE = 64  # what asks nothing of a model, at a time: Serve's queue is for what does
OPEN_TIMEOUT_S = 2.0  # what anybody may ask is answered at once, or the replica hangs
TENANT_SHARE = 0.25  # of the bytes that all bodies may hold


class Gateway:
    """The middleware.

    Args:
        app: What it guards.
        config: Limits, rates, models and who may ask.
        keys: The keys; None only where ``config.access.auth`` is "none".
        limiter: Counts what tenants ask; None = in this process's memory.
        watch: What counts, traces and logs.

    Raises:
        ValueError: Keys are on and none were given: a fault of ours.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServingConfig,
        keys: KeyFile | None = None,
        limiter: RateLimiter | None = None,
        watch: Watch | None = None,
    ) -> None:
        if config.access.auth == "keys" and keys is None:
            raise ValueError("a gateway with auth=keys needs the keys")
        self._app, self._config = app, config
        self._keys = keys if config.access.auth == "keys" else None
        self._limiter = limiter or RateLimiter(MemoryLedger(config.rates.max_tenants))
        self._watch = watch or Watch()
        limits = config.limits
        self._limits = BodyLimits(limits.max_body_bytes, limits.body_timeout_s)
        # One tenant's uploads leave room for those of others; without keys there is one
        share = max(limits.max_body_bytes, int(TENANT_SHARE * limits.max_buffered_bytes)) if self._keys else None
        self._budget = Budget(limits.max_buffered_bytes, share)
        self._target_s = TARGET_SHARE * config.max_queue_s
        self._concurrency = ConcurrencyLimit(self._target_s)
        self._open_places, self._other_places = Places(MOST_ASIDE), Places(MOST_ASIDE)
        self._models = tuple(entry.name for entry in config.models)
        self._has_more_than_fit = len(self._models) > config.memory.max_loaded_models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or passes on one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSocket is served here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = open_visit(scope, self._budget)
        outbound = Outbound(send, visit.request_id, path=scope["path"], is_https=scope.get("scheme") == "https")
        try:
            self._check(visit)
            if visit.target.types:
                await read_body(receive, visit.body, declared=visit.declared, limits=self._limits)
            else:
                visit.body.is_whole = visit.declared == 0  # what takes no body is given none
            if visit.target.action:
                await self._pass_on_in_turn(visit, receive, outbound)
            else:
                await self._pass_on_aside(visit, receive, outbound)
            visit.status = outbound.status
        except ClientGone:
            pass
        except Refusal as refusal:
            visit.status, visit.code = refusal.status, refusal.code
            await self._refuse(visit, refusal, outbound)
        finally:
            visit.end()
            self._settle(visit, outbound)
            self._watch.tell(visit, self._models)

    def _check(self, visit: Visit) -> None:
        """All that can be said before the body.

        Raises:
            Refusal: 400, 401, 403, 404, 413, 415, 429.
        """
        scope, target = visit.scope, visit.target
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path: str = scope["path"]
        if path.startswith(PROXY_PATHS) and path != PROXY_HEALTH:
            raise unknown_path()
        visit.declared = declared_size(headers)
        if not target.is_open:
            self._identify(visit, headers)
            visit.body.tenant = visit.tenant
            self._authorize(visit)
        if target.types and visit.declared != 0 and not target.takes(first(headers, b"content-type").decode("latin-1")):
            raise unsupported_media_type(target.types)

    def _identify(self, visit: Visit, headers: list[tuple[bytes, bytes]]) -> None:
        """Finds out who asks."""
        rates = self._config.rates
        if self._keys is None:
            _only_this_machine(visit.scope, headers)
            visit.tenant = LOCAL
            visit.rates = Rates(rates.images_per_s, rates.burst, rates.images_per_day)
            return
        key = self._keys.authorize(headers)
        visit.key, visit.tenant = key, key.tenant
        visit.rates = Rates(
            key.images_per_s or rates.images_per_s, key.burst or rates.burst, key.images_per_day or rates.images_per_day
        )

    def _authorize(self, visit: Visit) -> None:
        """Whether who asks may ask this, now."""
        key, target = visit.key, visit.target
        asked = target.model or (self._models[0] if target.action else "")
        if key is not None and asked and not key.opens(asked):
            raise forbidden_model()
        if key is not None and target.action and not key.allows(target.action):
            raise forbidden_action(target.action)
        if target.action:
            self._concurrency.check()
        if visit.rates is not None:
            # What only tells of models is let in at the rate, and counts nothing of it
            images = 1 if target.action else 0
            visit.held = self._limiter.admit(visit.tenant, visit.rates, images, most=self._most_images(visit))

    def _most_images(self, visit: Visit) -> int:
        """How many images a request may hold, by its type: an image's own body holds one."""
        if not visit.target.action:
            return 0
        kind = first(visit.scope["headers"], b"content-type").partition(b";")[0].strip().lower()
        is_one = visit.target.route != "infer" and (kind in SINGLE_TYPES or kind.startswith(b"image/"))
        return 1 if is_one else self._config.limits.max_images_per_request

    def _settle(self, visit: Visit, outbound: Outbound) -> None:
        """Counts the images of a request, once: those that the app tells of.

        Who goes, or whose time is over, once the app has the request has had it work for all that there may have been.
        """
        if visit.rates is None or not visit.held:
            return
        held, visit.held = visit.held, 0
        if outbound.is_answered:
            images = max(1, outbound.num_images)
        elif visit.taken_s and visit.code in ("", "deadline_passed"):
            images = max(held, self._most_images(visit))
        else:
            images = 1
        self._limiter.settle(visit.tenant, visit.rates, images, held=held)

    async def _pass_on_aside(self, visit: Visit, receive: Receive, outbound: Outbound) -> None:
        """``_pass_on`` of what asks nothing of a model. Who has no key takes no place of those who have one.

        Raises:
            Refusal: 503 when the places are taken, and as ``_pass_on``.
        """
        if visit.scope["path"] == PROXY_HEALTH:  # the proxy answers it: no replica's queue is behind it
            await self._pass_on(visit, receive, outbound)
            return
        give = (self._open_places if visit.target.is_open else self._other_places).take()
        outbound.on_answer = give
        try:
            await self._pass_on(visit, receive, outbound)
        finally:
            give()

    async def _pass_on_in_turn(self, visit: Visit, receive: Receive, outbound: Outbound) -> None:
        """``_pass_on``, counted among what is on its way.

        Raises:
            Refusal: 503 when enough is on its way, and as ``_pass_on``.
        """
        self._concurrency.begin()
        began_s, is_on_its_way = time.monotonic(), True

        def end() -> None:
            nonlocal is_on_its_way
            if outbound.is_answered:
                self._settle(visit, outbound)
            if is_on_its_way:
                is_on_its_way, spent_s = False, time.monotonic() - began_s
                # A quick 503 says nothing of how long answers take
                is_telling = 0 < outbound.status < 500 or spent_s > self._target_s
                self._concurrency.end(spent_s if is_telling else None, images=outbound.num_images)

        # With the answer, not with the app's end: Serve's proxy has still to hear the end of the replica's stream then,
        # and a client that asks again at once would find its own last request on its way, one that reads slowly hold it
        outbound.on_answer = end
        try:
            await self._pass_on(visit, receive, outbound)
        finally:
            end()

    async def _pass_on(self, visit: Visit, receive: Receive, outbound: Outbound) -> None:
        """Gives the request to the app; again, once, when it ends without an answer."""
        visit.taken_s = time.monotonic()
        scope = self._inner_scope(visit)
        outbound.closes = visit.closes
        for attempt in range(TRIES if visit.target.action else 1):
            inbound = _Inbound(visit.body.data, receive)
            # The scope is Serve's to change (root_path), so each try has its own
            await self._ask({**scope, "state": dict(scope["state"])}, inbound, outbound)
            if outbound.refusal is not None:
                raise outbound.refusal
            if outbound.status:
                break
            LOG.warning("request %s ended without an answer, attempt %d", visit.request_id, attempt + 1)
            if time.monotonic() - visit.taken_s >= self._config.limits.deadline_s:
                raise deadline_passed()
        else:
            raise not_ready("the replica that had the request is gone; ask again")

    async def _ask(self, scope: Scope, inbound: _Inbound, outbound: Outbound) -> None:
        """One try.

        Raises:
            ClientGone: Nobody waits for the answer.
            Refusal: 500.
        """
        try:
            await self._app(scope, inbound, outbound)
        except asyncio.CancelledError:
            # Serve's direct ingress ends a request that is late, or whose client has gone, by raising this itself
            # (replica.py, _direct_ingress_asgi); a task that is really cancelled says so
            task = asyncio.current_task()
            if outbound.status or task is None or task.cancelling():
                raise
        except Exception:
            LOG.exception("a request failed in the app")
            if outbound.status:
                raise  # half an answer is out: the server ends the connection
            raise fault() from None
        if inbound.is_gone and not outbound.status:
            raise ClientGone

    def _inner_scope(self, visit: Visit) -> Scope:
        """The scope that the app sees: no secret, nothing that steers Serve, our id, trace and passport."""
        headers = [
            (name, value)
            for name, value in visit.scope["headers"]
            if name.replace(b"_", b"-") not in DROPPED and not name.startswith(OURS)
        ]
        headers.append((b"x-request-id", visit.request_id.encode()))
        headers.append((b"traceparent", visit.trace.to_header().encode()))
        if visit.target.types:
            headers.append((b"content-length", str(len(visit.body.data)).encode()))
        asked = visit.target.model or self._models[0]
        if self._has_more_than_fit and visit.target.action and asked in self._models:
            headers.append((MULTIPLEXED, asked.encode()))
        state = dict(visit.scope.get("state") or {})
        timeout_s = OPEN_TIMEOUT_S if visit.target.is_open else self._config.limits.deadline_s + TIMEOUT_SLACK_S
        headers.append((b"x-request-timeout-seconds", f"{timeout_s:g}".encode()))
        if visit.tenant != NOBODY:
            state[STATE_KEY] = Passport(
                tenant=visit.tenant,
                request_id=visit.request_id,
                model=visit.target.model,
                models=visit.key.models if visit.key else (ANY,),
                actions=visit.key.actions if visit.key else (ANY,),
                trace=visit.trace.to_header(),
                key_id=visit.key.id if visit.key else "",
                arrived_s=time.time(),
            )
        return {**visit.scope, "headers": headers, "state": state}

    async def _refuse(self, visit: Visit, refusal: Refusal, outbound: Outbound) -> None:
        """Sends a refusal; lets a client that is still sending read it before the connection ends."""
        status, headers, content = to_answer(
            refusal,
            request_id=visit.request_id,
            path=visit.scope["path"],
            head_only=visit.scope["method"] == "HEAD",
        )
        visit.end()
        outbound.closes = visit.closes or refusal.code == "body_too_slow"
        await outbound.say(status, headers, content, linger_s=LINGER_S)


class _Inbound:
    """The app's ``receive``: the whole body in one message, then that the client has gone, when it has."""

    def __init__(self, data: bytes, receive: Receive) -> None:
        self._data, self._receive = data, receive
        self._is_given = self.is_gone = False

    async def __call__(self) -> Message:
        if not self._is_given:
            self._is_given = True
            return {"type": "http.request", "body": self._data, "more_body": False}
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.is_gone = True
                return message


def _only_this_machine(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    """Without keys: this machine alone, and not a page of another site in a browser of this machine (DNS rebinding).

    Raises:
        Refusal: 403.
    """
    client = scope.get("client")
    if client and client[0] not in ("127.0.0.1", "::1"):
        raise forbidden_origin("a service without keys answers this machine only")
    host = first(headers, b"host").decode("latin-1").lower()
    if re.sub(r":\d+$", "", host) not in LOOPBACK_NAMES:
        raise forbidden_origin(f"a service without keys is asked as one of {', '.join(LOOPBACK_NAMES)}")
    origin = first(headers, b"origin").decode("latin-1").lower()
    if origin and origin.partition("://")[2] != host:
        raise forbidden_origin("a page of another site cannot ask a service without keys")

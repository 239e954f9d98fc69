"""One HTTP request on its way through a handler: who asks, of which model, with what, and how it is answered.

A handler takes a Call and returns a Reply or raises a Refusal; everything else (the wrong method, a fault of ours, a
client that has gone, the deadline, what is counted and logged) is the same for all of them and stands here once.

Example:
    >>> async def models(call: Call) -> Reply:
    ...     return call.json({"models": []})
    >>> Route("/v1/models", Endpoint(desk, "models", {"GET": models}))
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from eagleray.serving.answers import encode
from eagleray.serving.exchanges import CLIENT_GONE, Exchange, Log, tell
from eagleray.serving.passport import STATE_KEY, Passport
from eagleray.serving.refusals import (
    Refusal,
    bad_parameter,
    deadline_passed,
    fault,
    forbidden_action,
    forbidden_model,
    to_answer,
    too_large,
    unknown_model,
    unknown_path,
    wrong_method,
)
from eagleray.serving.service import DEFAULT_TOP_K, Ask, Batch, ModelCard, Service
from eagleray.serving.settings import LimitsConfig
from eagleray.serving.telemetry import Meter
from eagleray.serving.traces import Tracer

T = TypeVar("T")
JSON_TYPE = "application/json"
IMAGES_HEADER = b"x-eagleray-images"  # images of the request: the gateway charges them to the tenant, and removes it
DEADLINE_HEADER = b"x-deadline-ms"
MAX_TOP_K = 100
MAX_QUERY_FIELDS = 16
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_logger = logging.getLogger("eagleray.serving")


class ClientGone(Exception):
    """The client closed the connection: nobody waits for the answer."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What every call is given.

    Attributes:
        service: The models.
        limits: What a request may take.
        passport: Who asks, by the ASGI scope; raises a Refusal where nobody vouches for the request.
        meter: What counts.
        tracer: Where spans go.
        log: Takes each exchange when it is over; None = no request log.
    """

    service: Service
    limits: LimitsConfig
    passport: Callable[[Scope], Passport]
    meter: Meter
    tracer: Tracer
    log: Log | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in ASGI's terms."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Call:
    """One request, and what a handler asks of it.

    Args:
        desk: What every call is given.
        scope: ASGI's.
        receive: ASGI's.
        exchange: What is told of it afterwards.
    """

    def __init__(self, desk: Desk, scope: Scope, receive: Receive, exchange: Exchange) -> None:
        self.desk, self.scope, self.exchange = desk, scope, exchange
        self._receive = receive
        self._within_s = desk.limits.deadline_s
        self.path: Mapping[str, str] = scope.get("path_params", {})

    def identify(self) -> Passport:
        """Who asks.

        Raises:
            Refusal: 401.
        """
        if self.exchange.passport is None:
            passport = self.desk.passport(self.scope)
            self.exchange.passport, self.exchange.request_id = passport, passport.request_id
            return passport
        return self.exchange.passport

    def header(self, name: bytes) -> str | None:
        """A header's value, which may be empty; None where it is missing."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None)

    def query(self, *known: str) -> dict[str, str]:
        """The query's parameters.

        Args:
            known: The names that the path takes.

        Raises:
            Refusal: An unknown name, or one that stands twice.
        """
        raw: bytes = self.scope.get("query_string", b"")
        if not raw:
            return {}
        try:
            pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
        except ValueError:
            raise bad_parameter("the query", f"at most {MAX_QUERY_FIELDS} parameters") from None
        if len(dict(pairs)) < len(pairs) or any(name not in known for name, _ in pairs):
            raise bad_parameter("a parameter of the query", f"one of {', '.join(known) or '(none)'}, each once")
        return dict(pairs)

    def top_k(self, text: str | None) -> int:
        """How many labels the answer carries, at most.

        Raises:
            Refusal: Not a number from 1 to MAX_TOP_K.
        """
        if text is None:
            return DEFAULT_TOP_K
        if not _NUMBER.fullmatch(text) or int(text) > MAX_TOP_K:
            raise bad_parameter("top_k", f"a whole number from 1 to {MAX_TOP_K}")
        return int(text)

    def model(self, name: str | None, *, action: str) -> ModelCard:
        """The model that is asked.

        Args:
            name: Its name; None is the first one of the service.
            action: What is asked of it: "predict" or "embed"; "" only its description.

        Raises:
            Refusal: The key does not open it, or not for this, or there is none of that name.
        """
        cards, passport = self.desk.service.models(), self.identify()
        wanted = cards[0].name if name is None else name
        if not passport.opens(wanted):
            raise forbidden_model()
        if action and not passport.may(wanted, action):
            raise forbidden_action(action)
        for card in cards:
            if card.name == wanted:
                self.exchange.card = card
                return card
        raise unknown_model([card.name for card in cards if passport.opens(card.name)])

    def ask(self, card: ModelCard, *, top_k: int = 1, wants: str = "", timeout_s: float | None = None) -> Ask:
        """What is asked of the model.

        Args:
            card: The model.
            top_k: How many labels are wanted.
            wants: What beside the labels, in words: "embedding", "probabilities".
            timeout_s: The client's own deadline, in s, beside the header X-Deadline-Ms.

        Raises:
            Refusal: The header is not a number of milliseconds.
        """
        passport, text = self.identify(), self.header(DEADLINE_HEADER)
        if text is not None and not _NUMBER.fullmatch(text):
            raise bad_parameter("X-Deadline-Ms", "a whole number of milliseconds, above 0")
        within_s = min(self.desk.limits.deadline_s, int(text) / 1000 if text else math.inf, timeout_s or math.inf)
        self._within_s = within_s
        return Ask(
            model=card.name,
            deadline=self.exchange.started_s + within_s - self._waited_s(passport, within_s),
            top_k=top_k,
            wants_embedding="embedding" in wants,
            wants_probabilities="probabilities" in wants,
            request_id=passport.request_id,
            tenant=passport.tenant,
        )

    async def body(self) -> bytes:
        """All of the body.

        Raises:
            Refusal: ``too_large``.
            ClientGone: It did not come to its end.
        """
        chunks, size, limit = [], 0, self.desk.limits.max_body_bytes
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            chunks.append(chunk)
            if not message.get("more_body", False):
                self.exchange.body_bytes = size
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def answered(self, work: Coroutine[Any, Any, Batch], ask: Ask) -> Batch:
        """The service's answer, given up when the client goes or the deadline passes.

        Args:
            work: ``service.predict(...)`` or ``service.infer(...)``.
            ask: What is asked; its deadline holds even where the engine hangs.

        Raises:
            Refusal: ``deadline_passed``, or what the service raises.
            ClientGone: Nobody waits for the answer.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone())
        try:
            left_s = max(0.0, ask.deadline - time.monotonic())
            await asyncio.wait({task, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                self.exchange.batch = self._told(task)
                return self.exchange.batch
            if gone.done():
                raise ClientGone
            raise deadline_passed(self._within_s)
        finally:
            gone.cancel()
            task.cancel()

    def _told(self, task: asyncio.Future[Batch]) -> Batch:
        """What the service gave; a deadline is told as the client gave it, not as what was left of it."""
        try:
            return task.result()
        except Refusal as refusal:
            if refusal.code == "deadline_passed":
                raise deadline_passed(self._within_s) from None
            raise

    def json(self, value: Any, *, status: int = 200) -> Reply:
        """An answer in JSON."""
        return self.reply(encode(value), {"content-type": JSON_TYPE}, status=status)

    def reply(self, body: bytes, headers: Mapping[str, str], *, status: int = 200) -> Reply:
        """An answer; its length, the request's id and ``Cache-Control: no-store`` are added."""
        pairs = {"cache-control": "no-store", **headers, "content-length": str(len(body))}
        pairs["x-request-id"] = self.exchange.request_id
        return Reply(status, [(name.encode(), value.encode("latin-1")) for name, value in pairs.items()], body)

    def _waited_s(self, passport: Passport, most_s: float) -> float:
        """How long the request waited between the gateway and the app, in Serve's queues: its deadline ran already."""
        if not passport.arrived_s:
            return 0.0
        return min(max(0.0, self.exchange.started_ns / 1e9 - passport.arrived_s), most_s)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


Handler = Callable[[Call], Awaitable[Reply]]


class Endpoint:
    """An ASGI app of one path: picks the handler by the method, answers whatever happens, tells of it afterwards.

    Args:
        desk: What every call is given.
        route: The name under which it is counted.
        handlers: Method to handler; HEAD is answered by GET's. None at all = there is no such path.
    """

    def __init__(self, desk: Desk, route: str, handlers: Mapping[str, Handler]) -> None:
        self._desk, self._route = desk, route
        self._handlers = {**handlers, **({"HEAD": handlers["GET"]} if "GET" in handlers else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        exchange = Exchange(self._route, _request_id(scope))
        call = Call(self._desk, scope, receive, exchange)
        exchange.status = CLIENT_GONE  # until something is sent
        try:
            reply = await self._reply(call)
            exchange.status = reply.status
            # What was refused unanswered is not charged by its images, but for a client that gave too little time
            if exchange.batch is not None or exchange.code == "deadline_passed":
                reply.headers.append((IMAGES_HEADER, str(exchange.num_images).encode()))
            await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})
        except ClientGone:
            pass
        finally:
            exchange.seconds = time.monotonic() - exchange.started_s
            self._tell(exchange)

    async def _reply(self, call: Call) -> Reply:
        handler = self._handlers.get(call.scope["method"])
        try:
            if handler is None:
                raise wrong_method(sorted(self._handlers)) if self._handlers else unknown_path()
            return await handler(call)
        except Refusal as refusal:
            return refused(refusal, call.scope, call.exchange)
        except ClientGone:
            raise
        except Exception:
            _logger.exception("fault in %s, request %s", self._route, call.exchange.request_id)
            return refused(fault(), call.scope, call.exchange)

    def _tell(self, exchange: Exchange) -> None:
        """Counts and logs; a fault in either is logged and costs no answer."""
        try:
            tell(exchange, meter=self._desk.meter, tracer=self._desk.tracer)
            if self._desk.log is not None:
                self._desk.log(exchange)
        except Exception:
            _logger.exception("request %s could not be counted or logged", exchange.request_id)


def _request_id(scope: Scope) -> str:
    """The gateway's id for the request, where it left one; else a new one."""
    found = (scope.get("state") or {}).get(STATE_KEY)
    return found.request_id if isinstance(found, Passport) else secrets.token_hex(8)


def refused(refusal: Refusal, scope: Scope, exchange: Exchange) -> Reply:
    """A refusal as an answer, in the form that the path asks for."""
    exchange.code = refusal.code
    return Reply(*to_answer(refusal, request_id=exchange.request_id, path=scope["path"]))

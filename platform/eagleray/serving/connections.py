"""Connections under uvicorn that cannot be held for ever: a limit on heads, their time, their number, and each read.

uvicorn 0.49 waits without end for a request's head, takes one of any size (and trailers after a body likewise), and
reads up to 256 KB ahead of the app (uvloop's read size). ASGI middleware sees a request only once its head has come, so
this stands below it: a client that sends its head a byte a second is told 408 and closed, one whose head is too large
431, one connection too many 503; and a body is read in pieces of READ_BYTES, the next one when the app has taken the
last. So a refused upload has taken no more than its limit and one piece. Nor does uvicorn give up a client that never
reads its answers: it waits for it, and so does a connection that is closed with bytes unsent. Here such a connection is
cut after ``body_timeout_s``: answers must be taken as fast as bodies must come.

Serve builds its servers itself and leaves no door for a protocol class; ``install`` puts this one in uvicorn's own
table under the name that Serve's servers use ("auto").

Example:
    >>> install(ServingConfig(...).limits)
    >>> uvicorn.Config(app, http="auto")
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from eagleray.serving.refusals import PROBLEM_TYPE
from eagleray.serving.settings import LimitsConfig

READ_BYTES = 65_536
TARGET = "eagleray.serving.connections:GuardedProtocol"
_limits = LimitsConfig()


def install(limits: LimitsConfig) -> None:
    """Makes every uvicorn server that this process starts from now on use GuardedProtocol with these limits.

    Args:
        limits: ``head_timeout_s``, ``max_head_bytes``, ``max_connections`` and ``body_timeout_s`` count here.
    """
    global _limits
    _limits = limits
    uvicorn.config.HTTP_PROTOCOLS["auto"] = TARGET


class HeadTooLarge(Exception):
    """A request's head is over its limit."""


class _Transport:
    """A connection's transport, for a client that does not read: what is unsent a while after the close is dropped.

    Args:
        transport: The loop's.
        loop: That loop.
        within_s: The time in which what was sent must be taken, once the client has stopped reading or all is sent.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, within_s: float) -> None:
        self._transport, self._loop, self._within_s = transport, loop, within_s
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_lost = False
        self.write, self.is_closing, self.abort = transport.write, transport.is_closing, transport.abort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Sends what is unsent, for a while, and closes."""
        self._transport.close()
        self._abort_later("close")

    def cut(self) -> None:
        """Closes, and drops what is unsent."""
        self._transport.abort() if self._transport.get_write_buffer_size() else self.close()

    def pause(self) -> None:
        """The client does not read."""
        self._abort_later("pause")

    def resume(self) -> None:
        """It reads again."""
        if timer := self._timers.pop("pause", None):
            timer.cancel()

    def lost(self) -> None:
        """The connection is over."""
        self._is_lost = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _abort_later(self, why: str) -> None:
        if not self._is_lost and why not in self._timers:
            self._timers[why] = self._loop.call_later(self._within_s, self._transport.abort)


class _Parser(HttpToolsProtocol):
    """uvicorn's protocol, with what happens to heads and bodies made known."""

    def __init__(self, *args: Any, limits: LimitsConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self.ending: _Transport
        self._timer: asyncio.TimerHandle | None = None
        self.in_head = False
        self.is_whole = True  # whether all of the current request has come
        self.has_body = False  # whether what was fed last held a byte of a body
        self.has_begun = False  # whether a head began in it, perhaps behind the end of a body
        self._refused_as = 0

    def wait_for_head(self) -> None:
        """Begins the time in which a head must come."""
        self.stop_waiting()
        self._timer = self.loop.call_later(self._limits.head_timeout_s, self._too_slow)

    def stop_waiting(self) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wait_if_idle(self) -> None:
        """Begins it where a connection is between two requests and nothing else would end it.

        uvicorn stops its keep-alive clock at any byte, and starts it again only with the next answer: an empty line, or
        the rest of a body that nobody reads, would leave a connection without a clock.
        """
        is_idle = not self.in_head and (self.cycle is None or self.cycle.response_complete)
        if is_idle and self._timer is None and self.timeout_keep_alive_task is None:
            self.wait_for_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.in_head, self.is_whole, self.has_begun = True, False, True
        self.wait_for_head()

    def on_headers_complete(self) -> None:
        """A head ends."""
        self.in_head = False
        self.stop_waiting()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.max_head_bytes:
            self._refused_as = 431
            raise HeadTooLarge  # the parser makes it one of its errors, for which send_400_response is called
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body: the next is read when the app has taken this one."""
        self.has_body = True
        super().on_body(body)
        if self.cycle is not None and not self.cycle.response_complete:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        """A request has come to its end."""
        self.is_whole = True
        self.stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered; what is left of its body, which nobody reads, must come in the time of a head."""
        super().on_response_complete()
        if not self.is_whole and not self.transport.is_closing():
            self.wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or a head that is too large, in our form of error."""
        self.refuse(self._refused_as or 400)

    def refuse(self, status: int) -> None:
        """Answers below HTTP's request and response, and closes."""
        self.stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(_answer(status))
            self.transport.close()

    def _too_slow(self) -> None:
        self._timer = None
        if self.in_head:
            self.refuse(408)
        else:
            self.ending.cut()


class GuardedProtocol(asyncio.BufferedProtocol):
    """What uvicorn makes for each connection: reads in pieces of READ_BYTES, and counts connections and heads.

    It holds uvicorn's protocol instead of being one, because uvloop reads into a protocol's own buffer only where it is
    no ``asyncio.Protocol``.

    Args:
        config, server_state, app_state: uvicorn's.
    """

    # One buffer for all: a loop fills it and hands it on in one step, and what is handed on is copied
    _buffer = memoryview(bytearray(READ_BYTES))

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        self._limits = _limits
        self._parser = _Parser(config, server_state, app_state, _loop, limits=_limits)
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a connection, or refuses it where there are too many."""
        parser = self._parser
        is_full = len(parser.connections) >= self._limits.max_connections
        parser.ending = _Transport(transport, parser.loop, self._limits.body_timeout_s)  # type: ignore[arg-type]
        parser.connection_made(parser.ending)  # type: ignore[arg-type]
        if is_full:
            parser.refuse(503)
        else:
            parser.wait_for_head()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the loop reads to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """What the loop has read."""
        parser = self._parser
        if parser.parser is None or parser.transport.is_closing():
            return
        parser.has_body = parser.has_begun = False
        parser.data_received(bytes(self._buffer[:nbytes]))
        # Counted: a head, and what stands in a body's place and is none of it (trailers, which the parser keeps)
        if not parser.in_head and (parser.is_whole or parser.has_body):
            self._head_bytes = 0
            parser.wait_if_idle()
            return
        # Of a read in which a head began the parser does not tell how much is head; of a whole head it does
        self._head_bytes = 0 if parser.has_begun else self._head_bytes + nbytes
        if self._head_bytes > self._limits.max_head_bytes:
            parser.refuse(431)

    def eof_received(self) -> None:
        """The client has sent all."""
        self._parser.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._parser.stop_waiting()
        self._parser.ending.lost()
        self._parser.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read."""
        self._parser.ending.pause()
        self._parser.pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._parser.ending.resume()
        self._parser.resume_writing()


def _answer(status: int) -> bytes:
    title = {400: "The request is malformed", 408: "The head of the request did not arrive in time"}.get(
        status, HTTPStatus(status).phrase
    )
    body = json.dumps({"type": "about:blank", "title": title, "status": status}).encode()
    retry = b"retry-after: 1\r\n" if status == 503 else b""
    return (
        (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {PROBLEM_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        ).encode()
        + retry
        + b"\r\n"
        + body
    )

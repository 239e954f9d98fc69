"""Peer: the least that can serve: one bare uvicorn process, no framework, the engine in a pool of threads.

Each request is decoded and classified by itself in one thread of the pool: no batches, no keys, no limits.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import picture_engine
import uvicorn

JSON = [(b"content-type", b"application/json")]


class Bare:
    """An ASGI application.

    Args:
        engine: PictureEngine's arguments.
        threads: Cores of one call.
        pool: Calls at a time.
    """

    def __init__(self, engine: dict[str, Any], threads: int, pool: int) -> None:
        self._engine = picture_engine.PictureEngine(**engine, threads=threads)
        self._pool = ThreadPoolExecutor(pool)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        loop = asyncio.get_running_loop()
        answer = json.dumps(await loop.run_in_executor(self._pool, self._one, bytes(body))).encode()
        headers = [*JSON, (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _one(self, data: bytes) -> dict[str, Any]:
        return self._engine.answers([data])[0]


if __name__ == "__main__":
    args = picture_engine.options()
    uvicorn.run(
        Bare(args.engine, **args.settings),
        host="127.0.0.1",
        port=args.port,
        lifespan="off",
        access_log=False,
        log_level="error",
    )

"""A whole service under a bare uvicorn on a loopback port, in a thread: models, app, gateway, guarded connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from eagleray.serving.access import KeyFile, KeyRequest, create_key
from eagleray.serving.app import build_app
from eagleray.serving.gateway import Gateway
from eagleray.serving.models import ModelShelf
from eagleray.serving.settings import ServingConfig


def service_config(keys_file: Path | None, **bundles: Path) -> ServingConfig:
    """A service of bundles, by ONNX Runtime; without a key file anybody of this machine may ask."""
    return ServingConfig.model_validate(
        {
            "models": [{"name": name, "bundle": str(path), "runtime": "onnx"} for name, path in bundles.items()],
            "access": {"auth": "keys", "keys_file": str(keys_file)} if keys_file else {"auth": "none"},
        }
    )


def make_key(keys_file: Path, **request: object) -> str:
    """A new key of a tenant."""
    return create_key(keys_file, KeyRequest.model_validate({"tenant": "acme", **request}))[1]


@contextlib.contextmanager
def running(config: ServingConfig) -> Iterator[str]:
    """Runs it; gives its address, ``http://127.0.0.1:PORT``."""
    ready, stopping, place, faults = threading.Event(), threading.Event(), list[str](), list[BaseException]()

    async def serve() -> None:
        shelf = ModelShelf(config)
        await shelf.start()
        keys = KeyFile(config.access.keys_file) if config.access.keys_file else None
        app = Gateway(build_app(shelf, limits=config.limits), config=config, keys=keys)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        place.append(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
        ready.set()
        await asyncio.to_thread(stopping.wait)
        server.should_exit = True
        await task
        await shelf.drain(5.0)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as fault:
            faults.append(fault)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        if faults:
            raise faults[0]
        yield place[0]
    finally:
        stopping.set()
        thread.join(timeout=30)
    if faults:
        raise faults[0]

"""Peer: Ray Serve as its documentation shows it: FastAPI ingress, the batch decorator, every setting at its default.

The same file behind HAProxy: RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in its environment.
"""

import os
import time
from pathlib import Path
from typing import Any

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the listeners of Ray stay on this machine

import picture_engine
import ray
from fastapi import FastAPI, Request
from ray import serve

app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Naive:
    """One replica with one engine."""

    def __init__(self, engine: dict[str, Any], threads: int) -> None:
        self.engine = picture_engine.PictureEngine(**engine, threads=threads)

    @serve.batch
    async def classify(self, pictures: list[bytes]) -> list[dict[str, Any]]:
        """A batch, decoded and run where it is called."""
        return self.engine.answers(pictures)

    @app.post("/predict")
    async def predict(self, request: Request) -> dict[str, Any]:
        """One picture."""
        return await self.classify(await request.body())


if __name__ == "__main__":
    args = picture_engine.options()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(Naive.bind(args.engine, **args.settings))
    while True:
        time.sleep(3600)

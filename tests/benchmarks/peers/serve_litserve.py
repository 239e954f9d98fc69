"""Peer: LitServe: its four verbs, its own workers, API servers and batching; the settings are swept.

It gets the bare bytes as the others do: FastAPI reads a body that is not JSON into Annotated[bytes, Body()], which
costs it less than a form or base64.
"""

from typing import Annotated, Any

import litserve
import numpy as np
import picture_engine
from fastapi import Body


class Picture(litserve.LitAPI):
    """One engine a worker process."""

    def __init__(self, engine: dict[str, Any], threads: int, batch: int, wait_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait_s)
        self.arguments, self.is_batched = {**engine, "threads": threads}, batch > 1

    def setup(self, device: str) -> None:
        """In the worker."""
        self.engine = picture_engine.PictureEngine(**self.arguments)

    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        """Bytes to pixels."""
        return self.engine.pixels(request)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Pixels to a batch."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> Any:
        """The answers of a batch, or the one."""
        return self.engine.infer(x) if self.is_batched else self.engine.infer(x[None])[0]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch's answers, each for itself."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return output


if __name__ == "__main__":
    args = picture_engine.options()
    given = dict(args.settings)
    workers, servers, is_fast = (given.pop(name) for name in ("workers", "servers", "fast_queue"))
    api = Picture(args.engine, **given)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, fast_queue=is_fast, timeout=30)
    server.run(host="127.0.0.1", port=args.port, num_api_servers=servers, generate_client_file=False, log_level="error")

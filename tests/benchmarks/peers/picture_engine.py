"""What every serving peer shares: a JPEG to an answer, with the pixels and the engine of the other peers, and options.

Peers take the bare bytes of a JPEG at POST /predict and answer JSON with the top-1 index and its probability. The JPEG
is decoded at the least size that covers the target, as the fastest of the scoring peers does. Never eagleray.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import yardstick
from PIL import Image


class PictureEngine:
    """One ONNX Runtime session; may be called from several threads.

    Args:
        onnx: The model.
        mean, std: Its normalisation.
        threads: Cores of one call.
    """

    def __init__(self, onnx: str, mean: Sequence[float], std: Sequence[float], threads: int) -> None:
        self._job = yardstick.Job((), onnx, tuple(mean), tuple(std), Path())
        self._session = yardstick.session(onnx, threads)
        for size in (1, 2, 4, 8):
            self.infer(np.zeros((size, yardstick.CROP, yardstick.CROP, 3), np.uint8))

    def pixels(self, data: bytes) -> np.ndarray:
        """A JPEG as uint8 (224, 224, 3)."""
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        side = yardstick.SHORT_SIDE
        array = simplejpeg.decode_jpeg(data, min_height=side, min_width=side)
        return yardstick.target_pixels(Image.fromarray(array), (width, height))

    def infer(self, batch_u8_nhwc: np.ndarray) -> list[dict[str, Any]]:
        """Answers for pixels (N, 224, 224, 3)."""
        top1, score = yardstick.best(self._session, yardstick.normalize(batch_u8_nhwc, self._job))
        return [{"top1": index, "score": value} for index, value in zip(top1.tolist(), score.tolist(), strict=True)]

    def answers(self, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
        """Decodes and classifies, one after the other in this thread."""
        return self.infer(np.stack([self.pixels(data) for data in pictures]))


def options() -> argparse.Namespace:
    """The options of a serving peer; `engine` holds PictureEngine's arguments but its threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", type=json.loads, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    return parser.parse_args()

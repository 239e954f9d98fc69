"""Fixtures that every floor's tests share: real shared data where it lies, small generated photos elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True)  # no wall time, and the same draws each time
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(scope="session")
def make_photo() -> Callable[..., bytes]:
    """Bytes of a picture that depends on its seed alone: smooth colours with some texture, as photos have."""
    from PIL import Image

    def make(seed: int, *, width: int = 96, height: int = 72, kind: str = "JPEG") -> bytes:
        generator = np.random.default_rng(seed)
        small = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(image, np.int16) + generator.integers(-12, 13, (height, width, 3)), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a seeded little convolutional classifier: 32 x 32 pixels, 5 classes."""
    from tests.tiny_model import make_bundle

    return make_bundle(tmp_path_factory.mktemp("model") / "tiny")

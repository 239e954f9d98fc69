"""Peer: lightly's own transforms in a torch DataLoader, as its examples have it, over the same bytes in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from eagleray.vision.torchvision_guard import ensure_importable
from PIL import Image

ensure_importable()

from lightly.transforms import BYOLTransform, DINOTransform, SimCLRTransform  # noqa: E402
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform  # noqa: E402

CANDIDATES = [{"num_workers": workers} for workers in (0, 1, 2)]
TRANSFORMS = {
    "simclr": lambda: SimCLRTransform(input_size=224),
    "byol": lambda: BYOLTransform(BYOLView1Transform(input_size=224), BYOLView2Transform(input_size=224)),
    "dino": lambda: DINOTransform(global_crop_size=224, local_crop_size=96, n_local_views=6),
}


class Photos(torch.utils.data.Dataset):
    """Encoded images; an item is the list of an image's views."""

    def __init__(self, encoded: list[bytes], method: str) -> None:
        self.encoded, self.transform = encoded, TRANSFORMS[method]()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.open(io.BytesIO(self.encoded[index])).convert("RGB"))


class Loader:
    """A DataLoader that is kept over its epochs, workers too."""

    def __init__(self, encoded: list[bytes], method: str, batch: int, num_workers: int) -> None:
        self.loader = torch.utils.data.DataLoader(
            Photos(encoded, method),
            batch_size=batch,
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def epoch(self, number: int) -> Iterator[list[torch.Tensor]]:
        """Batches: for each view, float32 (N, 3, H, W), normalized."""
        yield from self.loader

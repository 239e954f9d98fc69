"""Views of real pictures for tests of learning: crops of scikit-image's photos, each seen twice and more, seeded."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "colorwheel",
)


def photo_crops(count: int, *, side: int = 44, seed: int = 0) -> torch.Tensor:
    """Float (count, 3, side, side) in 0..1: places drawn at random, the photos in turn, every second pixel."""
    from skimage import data

    generator = np.random.default_rng(seed)
    photos = [getattr(data, name)()[..., :3] for name in PHOTOS]
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        top, left = (generator.integers(0, edge - 2 * side) for edge in photo.shape[:2])
        crops.append(photo[top : top + 2 * side : 2, left : left + 2 * side : 2])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def make_view(images: torch.Tensor, size_px: int, *, share: float, generator: torch.Generator) -> torch.Tensor:
    """A crop of about ``share`` of each picture's area, flipped or not, its channels' gains jittered, standardized."""
    views = []
    for image in images:
        side = int(image.shape[-1] * share**0.5 * (0.7 + 0.3 * torch.rand((), generator=generator)))
        top, left = (int(torch.randint(0, image.shape[-1] - side + 1, (), generator=generator)) for _ in range(2))
        crop = image[None, :, top : top + side, left : left + side]
        view = interpolate(crop, size=(size_px, size_px), mode="bilinear", antialias=True)[0]
        view = view.flip(-1) if torch.rand((), generator=generator) < 0.5 else view
        gains = 0.6 + 0.8 * torch.rand((3, 1, 1), generator=generator)
        views.append(((view * gains).clamp(0, 1) - 0.45) / 0.25)
    return torch.stack(views)


def view_batch(images: torch.Tensor, *, num_local: int, generator: torch.Generator) -> dict[str, list[torch.Tensor]]:
    """A batch as methods take it: two global views of 32 px, then local ones of 16 px."""
    global_views = [make_view(images, 32, share=0.8, generator=generator) for _ in range(2)]
    local_views = [make_view(images, 16, share=0.3, generator=generator) for _ in range(num_local)]
    return {"views": [*global_views, *local_views]}

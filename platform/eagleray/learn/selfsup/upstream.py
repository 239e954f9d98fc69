"""What is used of lightly, imported in one place: lightly imports torchvision, which has to be importable first.

Example:
    >>> from eagleray.learn.selfsup.upstream import NTXentLoss
"""

from __future__ import annotations

from eagleray.vision.torchvision_guard import ensure_importable

ensure_importable()

from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss  # noqa: E402  torchvision must be importable
from lightly.models.modules.center import center_momentum  # noqa: E402
from lightly.models.modules.heads import (  # noqa: E402
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum  # noqa: E402
from lightly.utils.dist import gather, world_size  # noqa: E402
from lightly.utils.scheduler import cosine_schedule  # noqa: E402

__all__ = [
    "BYOLPredictionHead",
    "BYOLProjectionHead",
    "DINOLoss",
    "DINOProjectionHead",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SimCLRProjectionHead",
    "center_momentum",
    "cosine_schedule",
    "deactivate_requires_grad",
    "gather",
    "update_momentum",
    "world_size",
]

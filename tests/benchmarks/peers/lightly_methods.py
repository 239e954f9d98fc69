"""Peer: SimCLR, BYOL and DINO as lightly's examples have them, with their heads, losses and schedules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from eagleray.vision.torchvision_guard import ensure_importable
from torch import nn

ensure_importable()

from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss  # noqa: E402
from lightly.models.modules import heads  # noqa: E402
from lightly.models.utils import deactivate_requires_grad, update_momentum  # noqa: E402
from lightly.transforms import BYOLTransform, DINOTransform, SimCLRTransform  # noqa: E402
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform  # noqa: E402

TRANSFORMS = {
    "simclr": lambda px: SimCLRTransform(input_size=px),
    "byol": lambda px: BYOLTransform(BYOLView1Transform(input_size=px), BYOLView2Transform(input_size=px)),
    "dino": lambda px: DINOTransform(global_crop_size=px, local_crop_size=round(px * 96 / 224), n_local_views=6),
}


class SimCLR(nn.Module):
    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.projection_head = backbone, heads.SimCLRProjectionHead(width, width, 128)
        self.criterion = NTXentLoss()

    def loss(self, views: list[torch.Tensor], epoch: int, momentum: float) -> Any:
        return self.criterion(*(self.projection_head(self.backbone(view)) for view in views))


class BYOL(nn.Module):
    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.projection_head = backbone, heads.BYOLProjectionHead(width, 2 * width, 256)
        self.prediction_head = heads.BYOLPredictionHead(256, 2 * width, 256)
        self.backbone_momentum, self.head_momentum = copy.deepcopy((self.backbone, self.projection_head))
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views: list[torch.Tensor], epoch: int, momentum: float) -> Any:
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.head_momentum, m=momentum)
        told = [self.prediction_head(self.projection_head(self.backbone(view))) for view in views]
        seen = [self.head_momentum(self.backbone_momentum(view)).detach() for view in views]
        return 0.5 * (self.criterion(told[0], seen[1]) + self.criterion(told[1], seen[0]))


class DINO(nn.Module):
    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.teacher_backbone = backbone, copy.deepcopy(backbone)
        self.student_head = heads.DINOProjectionHead(width, 512, 64, 2048, freeze_last_layer=1)
        self.teacher_head = heads.DINOProjectionHead(width, 512, 64, 2048)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=5)

    def loss(self, views: list[torch.Tensor], epoch: int, momentum: float) -> Any:
        update_momentum(self.backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)
        seen = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        told = [self.student_head(self.backbone(view)) for view in views]
        return self.criterion(seen, told, epoch=epoch)


METHODS = {"simclr": SimCLR, "byol": BYOL, "dino": DINO}

"""The settings of each self-supervised method: the paper's values, or smaller ones for small backbones, said where.

They are apart from the methods so that a flow's Config can hold one without loading torch.

Example:
    >>> DINOConfig(output_dim=65536, hidden_dim=2048, bottleneck_dim=256)  # the heads of the paper
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eagleray.core.config import Config

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Width = Annotated[int, Field(ge=1)]


class SimCLRConfig(Config):
    """Settings of SimCLR (Chen et al. 2020).

    Attributes:
        name: The entry of METHODS.
        temperature: tau of NT-Xent. 0.5 is the paper's for CIFAR-10 (appendix B.9), where images and batches are small;
            for ImageNet and batches of 4,096 it is 0.1.
        hidden_dim: Hidden units of the projector; None for the backbone's width, as in the paper.
        output_dim: Dimensions of the contrasted space; the paper's.
        num_layers: Layers of the projector; 2 in the paper, 3 in SimCLR v2.
        sync_batch_norm: Whether batch statistics are of all workers' images (section 2.2: "global BN").
    """

    name: Literal["simclr"] = "simclr"
    temperature: Temperature = 0.5
    hidden_dim: Width | None = None
    output_dim: Width = 128
    num_layers: int = Field(default=2, ge=2, le=4)
    sync_batch_norm: bool = True


class BYOLConfig(Config):
    """Settings of BYOL (Grill et al. 2020).

    Attributes:
        name: The entry of METHODS.
        hidden_dim: Hidden units of projector and predictor; None for twice the backbone's width, which is the paper's
            4,096 for ResNet-50.
        output_dim: Dimensions of the predicted space; the paper's.
        momentum_start: tau_base of the target network; the paper's for 1,000 epochs of ImageNet (0.99 for 300).
        momentum_end: Where the cosine ends.
        sync_batch_norm: Whether batch statistics are of all workers' images, as in the paper.
    """

    name: Literal["byol"] = "byol"
    hidden_dim: Width | None = None
    output_dim: Width = 256
    momentum_start: Share = 0.996
    momentum_end: Share = 1.0
    sync_batch_norm: bool = True


class DINOConfig(Config):
    """Settings of DINO (Caron et al. 2021).

    Attributes:
        name: The entry of METHODS.
        num_global: Views that the teacher sees, first in the batch.
        num_local: Small views that ``plan`` asks for; the paper uses 6 to 10.
        local_share: Side of a local view as a share of a global one's; the paper's 96 of 224 pixels.
        student_temperature: The paper's.
        teacher_temperature_start: Where the teacher's temperature begins; the paper's.
        teacher_temperature: Where it ends; the paper's for ViT-S.
        teacher_temperature_warmup: Share of the run over which it rises in a line: 30 of the paper's 300 epochs.
        momentum_start: lambda of the teacher; the paper's. For small batches its authors advise more: 0.9995 for 256.
        momentum_end: Where the cosine ends.
        center_momentum: m of the centre (equation 4).
        hidden_dim: Hidden units of the head; 2,048 in the paper.
        bottleneck_dim: Its bottleneck; 256 in the paper.
        output_dim: K; 65,536 in the paper, for 1.3 million images; lightly's examples take 2,048.
        batch_norm: Whether the head normalizes batches; the paper's does not.
        norm_last_layer: Whether the rows of the last layer keep length 1 (steadier; the code's default).
        frozen_epochs: Epochs in which the last layer does not move; the paper's 1.
        sync_batch_norm: Whether batch statistics are of all workers' images, as in the authors' code.
    """

    name: Literal["dino"] = "dino"
    num_global: int = Field(default=2, ge=1, le=8)
    num_local: int = Field(default=6, ge=0, le=32)
    local_share: float = Field(default=96 / 224, gt=0, le=1)
    student_temperature: Temperature = 0.1
    teacher_temperature_start: Temperature = 0.04
    teacher_temperature: Temperature = 0.07
    teacher_temperature_warmup: Share = 0.1
    momentum_start: Share = 0.996
    momentum_end: Share = 1.0
    center_momentum: Share = 0.9
    hidden_dim: Width = 512
    bottleneck_dim: Width = 64
    output_dim: Width = 2048
    batch_norm: bool = False
    norm_last_layer: bool = True
    frozen_epochs: int = Field(default=1, ge=0)
    sync_batch_norm: bool = True


MethodConfig = SimCLRConfig | BYOLConfig | DINOConfig

"""The teacher of BYOL and DINO: a copy of the student that only its moving average changes.

Example:
    >>> teacher = frozen_copy(backbone)
    >>> follow([(backbone, teacher)], momentum=0.996)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from eagleray.learn.selfsup.upstream import deactivate_requires_grad, update_momentum


def frozen_copy(student: nn.Module) -> nn.Module:
    """A copy with the same weights, without gradients, dropout or stochastic depth.

    It stays in the student's train or eval mode: in training its batch norms use the batch, as the papers' do.
    """
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "drop_prob", None), float):  # timm's DropPath and DropBlock
            module.drop_prob = 0.0  # type: ignore[assignment]
    return teacher


def follow(pairs: Iterable[tuple[nn.Module, nn.Module]], *, momentum: float) -> None:
    """Moves each teacher: xi <- m xi + (1 - m) theta, over parameters; buffers are the teacher's own.

    Args:
        pairs: (student, teacher).
        momentum: m, 0 to 1; at 1 nothing moves, to the bit.

    Source: BYOL, equation 1; DINO, section 3.1. lightly's update does it in two ``torch._foreach`` calls.
    """
    for student, teacher in pairs:
        update_momentum(student, teacher, momentum)

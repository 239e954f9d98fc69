"""What makes W workers one: batch statistics and measurements over the images of all of them.

A loss whose terms touch one image each needs nothing: the average of the workers' gradients is the gradient of the
union. Batch norms do: their statistics are of the batch. torch.nn.SyncBatchNorm does it on an accelerator only; here it
works over gloo on the CPU too, so that two laptops' cores, and a test, learn what one process would.

Example:
    >>> synchronize_batch_norms(method)
    20
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as AcceleratedSync

from eagleray.learn.selfsup.upstream import gather, world_size


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):  # type: ignore[misc]
    """A batch norm whose statistics are of all workers' images, on any device; one worker alone pays nothing.

    It is no nn.SyncBatchNorm, which DistributedDataParallel refuses to wrap on the CPU; on an accelerator it runs the
    same kernels.

    Args:
        norm: The layer it takes the place of: same parameters and buffers, same names in the state dict; the dropout
            and activation of timm's BatchNormAct2d are kept.

    Source: the pooled moments of groups: mean = sum n_w mean_w / n, var = sum n_w (var_w + (mean_w - mean)^2) / n
    (Chan et al. 1979), which loses less than the sum of squares does.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes (N, C) or (N, C, H, W)."""
        if not self.training or world_size() == 1:
            normalized = super().forward(x)
        elif x.device.type == "cpu":
            normalized = self._on_cpu(x)
        else:
            normalized = self._on_accelerator(x)
        return self.act(self.drop(normalized))

    def _on_accelerator(self, x: torch.Tensor) -> torch.Tensor:
        buffers = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        share = self._count_batch()
        group = torch.distributed.group.WORLD
        return AcceleratedSync.apply(x, self.weight, self.bias, *buffers, self.eps, share, group, world_size())

    def _on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        axes = (0, *range(2, x.ndim))
        variance, mean = torch.var_mean(wide(x), axes, correction=0)
        count = x.numel() // x.shape[1]
        rows = torch.stack(gather(torch.cat([mean, variance, mean.new_tensor([float(count)])])))
        means, variances, counts = rows[:, : len(mean)], rows[:, len(mean) : -1], rows[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        share = self._count_batch()
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * total / (total - 1), share)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = torch.rsqrt(variance + self.eps) * (self.weight if self.affine else 1.0)
        shift = (self.bias if self.affine else 0.0) - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _count_batch(self) -> float:
        """Counts a batch; gives the share that it has in the running statistics."""
        if not self.track_running_stats:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked) if self.momentum is None else float(self.momentum)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any input of two axes or more, as torch's own."""


def synchronize_batch_norms(module: nn.Module) -> int:
    """Puts a SyncedBatchNorm in the place of each batch norm below a module, when there is more than one worker.

    Returns:
        How many; 0 when this process works alone.
    """
    if world_size() == 1:
        return 0
    count = 0
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncedBatchNorm):
            setattr(module, name, SyncedBatchNorm(child))
            count += 1
        else:
            count += synchronize_batch_norms(child)
    return count


def wide(x: torch.Tensor) -> torch.Tensor:
    """Float32 of what is half precision, for sums that half precision would spoil; anything wider as it is."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows of all workers, in the order of their ranks, without gradient; every worker has to call it.

    Args:
        x: (N, ...), of one shape on all workers.
    """
    return torch.cat(gather(x.contiguous())) if world_size() > 1 else x


def mean_over_workers(x: torch.Tensor) -> torch.Tensor:
    """The mean over the workers of a tensor of one shape, without gradient; every worker has to call it."""
    return gathered(x[None]).mean(0)

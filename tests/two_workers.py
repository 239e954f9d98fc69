"""One step of every method in two processes over gloo, and in one process over the union of their batches.

In float64, where only rounding is left to differ: in float32 a gradient was seen to move by 0.7 % of its largest
element. A file of its own, at module level: processes that are spawned import what they run.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from eagleray.core.tables import resolve
from eagleray.learn.selfsup import METHODS
from eagleray.learn.selfsup.collapse import CollapseDetector
from eagleray.learn.selfsup.configs import BYOLConfig, DINOConfig, SimCLRConfig
from eagleray.learn.selfsup.probes import KnnProbe, LinearProbe
from eagleray.learn.task import Progress, StepOutput
from eagleray.vision.backbones import Backbone, create_headless
from torch import nn

IMAGES, WORKERS = 12, 2
CONFIGS = {
    "simclr": SimCLRConfig(output_dim=16),
    "byol": BYOLConfig(output_dim=16, hidden_dim=32, momentum_start=0.9),
    "dino": DINOConfig(output_dim=64, hidden_dim=32, bottleneck_dim=16, batch_norm=True),
}
PROGRESS = Progress(step=3, num_steps=10, epoch=0, steps_per_epoch=10)


def make_method(name: str, backbone: str, *, is_synced: bool = True, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    module, width = create_headless(Backbone(name=backbone), size_px=32)
    config = CONFIGS[name].model_copy(update={"sync_batch_norm": is_synced})
    return resolve(METHODS, name, what="method")(module, width, config).train().double()


def views_for(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    sizes = [32, 32, 16, 16] if name == "dino" else [32, 32]
    return [torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


class Step(nn.Module):
    """A method's step as a forward: what DistributedDataParallel can wrap."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: dict[str, list[torch.Tensor]]) -> StepOutput:
        return self.method.training_step(batch, PROGRESS)


def step_of(method: nn.Module, forward: nn.Module, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, the gradients and the buffers of a step; of a teacher, what it has become."""
    output = forward({"views": views})
    output.loss.backward()
    method.after_step(PROGRESS)
    told = {f"log {key}": torch.as_tensor(value, dtype=torch.float64) for key, value in output.logs.items()}
    return {
        "loss": output.loss.detach(),
        **{f"grad {key}": p.grad.clone() for key, p in method.named_parameters() if p.grad is not None},
        **{f"state {key}": value.clone() for key, value in method.state_dict().items()},
        **{key: value for key, value in told.items() if key != "log projection_spread"},
    }


def cases() -> list[tuple[str, str, bool]]:
    """(method, backbone, whether batch norms are synchronized)."""
    synced = [(name, backbone, True) for name in METHODS for backbone in ("test_resnet", "test_efficientnet")]
    return [*synced, ("dino", "test_vit", True), ("simclr", "test_resnet", False)]


def in_one_process(name: str, backbone: str, *, is_synced: bool) -> dict[str, torch.Tensor]:
    method = make_method(name, backbone, is_synced=is_synced)
    return step_of(method, Step(method), views_for(name))


def measured(rows: slice) -> dict[str, torch.Tensor]:
    """What probes and detector make of these rows of four batches."""
    knn, linear = KnnProbe(8, num_classes=3, k=5), LinearProbe(8, num_classes=3)
    detector = CollapseDetector()
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        embedding = torch.randn(IMAGES, 8, generator=generator)
        labels = torch.randint(-1, 3, (IMAGES,), generator=generator)
        keys = torch.arange(IMAGES, dtype=torch.int64)
        knn.observe(embedding[rows], labels[rows], keys[rows])
        linear.observe(embedding[rows], labels[rows])
        report = detector.measure(StepOutput(torch.zeros(()), embedding=embedding[rows]), step=step)
    told = {"spread": torch.tensor(report.spread), "effective_rank": torch.tensor(report.effective_rank)}
    return {**told, **knn.state_dict(), **linear.state_dict()}


def worker(rank: int, folder: str) -> None:
    """Runs every case as one of the workers, and writes what it saw to ``folder``."""
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS
    )
    seen = {}
    for name, backbone, is_synced in cases():
        method = make_method(name, backbone, is_synced=is_synced)
        mine = [view.chunk(WORKERS)[rank] for view in views_for(name)]
        seen[f"{name} {backbone} {is_synced}"] = step_of(method, DistributedDataParallel(Step(method)), mine)
    share = IMAGES // WORKERS
    seen["measured"] = measured(slice(rank * share, (rank + 1) * share))
    torch.save(seen, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()

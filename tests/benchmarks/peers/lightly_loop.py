"""Peer: self-supervised training as lightly's examples write it: DataLoader, transform, loss, optimizer, a plain loop.

The optimizer, its groups and its schedule are Eagleray's defaults, so that steps are equal. An example has no schedule,
no persistent workers and no channels_last: with them it is faster and learns better, so the peer has them.
"""

from __future__ import annotations

import math

import stopwatch
import torch
from eagleray.vision.torchvision_guard import ensure_importable
from lightly_methods import METHODS, TRANSFORMS
from safetensors.torch import save_file

ensure_importable()

import timm  # noqa: E402  torchvision must be importable first
from lightly.data import LightlyDataset  # noqa: E402
from lightly.utils.scheduler import cosine_schedule  # noqa: E402


def groups(model: torch.nn.Module) -> list[dict]:
    """Weights, and biases and norms, which no paper decays."""
    trained = [one for one in model.parameters() if one.requires_grad]
    plain = [one for one in trained if one.ndim <= 1]
    return [{"params": [one for one in trained if one.ndim > 1]}, {"params": plain, "weight_decay": 0.0}]


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def main() -> None:
    args = stopwatch.options(method="simclr", lr=1e-3, layout="last")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    backbone = timm.create_model(args.backbone, num_classes=0)
    width = backbone.eval()(torch.zeros(1, 3, args.size, args.size)).shape[1]
    torch.manual_seed(args.seed)
    model = METHODS[args.method](backbone, width)
    layout = torch.channels_last if args.layout == "last" else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    loader = torch.utils.data.DataLoader(
        LightlyDataset(args.folder, transform=TRANSFORMS[args.method](args.size)),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr * args.batch / 256, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps, len(loader)))
    watch, losses = stopwatch.Stopwatch(args.warm), []
    for step, (epoch, (views, _, _)) in enumerate(stopwatch.take(loader, args.steps)):
        momentum = cosine_schedule(step, args.steps, 0.996, 1)
        loss = model.loss([view.contiguous(memory_format=layout) for view in views], epoch, momentum)
        loss.backward()
        if args.method == "dino":
            model.student_head.cancel_last_layer_gradients(current_epoch=epoch)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        watch.step(len(views[0]))
    watch.tell(loss=sum(losses[-10:]) / len(losses[-10:]))
    if args.out:
        save_file({name: value.contiguous() for name, value in model.backbone.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()

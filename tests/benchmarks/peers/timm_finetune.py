"""Peer: full fine-tuning as timm is used by hand: its transform and RandAugment, a DataLoader, AdamW, a plain loop."""

from __future__ import annotations

import stopwatch
import torch
from eagleray.vision.torchvision_guard import ensure_importable

ensure_importable()

import timm  # noqa: E402  torchvision must be importable first
from timm.data import ImageDataset, create_transform  # noqa: E402


def main() -> None:
    args = stopwatch.options(classes=6, layout="last", lr=5e-4)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = timm.create_model(args.backbone, num_classes=args.classes)
    layout = torch.channels_last if args.layout == "last" else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    transform = create_transform(
        args.size, is_training=True, scale=(0.35, 1.0), auto_augment="rand-m7-mstd0.5-inc1", interpolation="bicubic"
    )
    loader = torch.utils.data.DataLoader(
        ImageDataset(args.folder, transform=transform),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    decayed = [one for one in model.parameters() if one.ndim > 1]
    plain = [one for one in model.parameters() if one.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=args.lr * args.batch / 256, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    criterion, watch, total = torch.nn.CrossEntropyLoss(), stopwatch.Stopwatch(args.warm), 0.0
    for _, (images, targets) in stopwatch.take(loader, args.steps):
        loss = criterion(model(images.contiguous(memory_format=layout)), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        watch.step(len(images))
    watch.tell(loss=total / args.steps)


if __name__ == "__main__":
    main()

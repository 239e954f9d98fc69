"""Peer: a linear probe that runs the frozen backbone again in each epoch, as most fine-tuning scripts do."""

from __future__ import annotations

import stopwatch
import torch
from eagleray.vision.torchvision_guard import ensure_importable

ensure_importable()

import timm  # noqa: E402  torchvision must be importable first
from timm.data import ImageDataset, create_transform, resolve_data_config  # noqa: E402


def main() -> None:
    args = stopwatch.options(classes=6, epochs=20, layout="last", lr=5e-4)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    backbone = timm.create_model(args.backbone, num_classes=0).eval()
    layout = torch.channels_last if args.layout == "last" else torch.contiguous_format
    backbone = backbone.to(memory_format=layout)
    transform = create_transform(**resolve_data_config({}, model=backbone))
    loader = torch.utils.data.DataLoader(
        ImageDataset(args.folder, transform=transform),
        batch_size=args.batch,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    with torch.inference_mode():
        width = backbone(torch.zeros(1, 3, 224, 224)).shape[1]
    head, steps = torch.nn.Linear(width, args.classes), args.epochs * len(loader)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr * args.batch / 256, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion, watch = torch.nn.CrossEntropyLoss(), stopwatch.Stopwatch(0)
    for _, (images, targets) in stopwatch.take(loader, steps):
        with torch.no_grad():
            features = backbone(images.contiguous(memory_format=layout))
        loss = criterion(head(features), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        watch.step(len(images))
    watch.tell(loss=loss.item())


if __name__ == "__main__":
    main()
